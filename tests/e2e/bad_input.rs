//! What the doors refuse, and how they say it.
#![expect(clippy::disallowed_methods, reason = "tests start the real binaries and watch the real clock")]

use mesh_tests::{Hub, Node, PASSWORD, folder, program, shown, text};
use serde_json::{Value, json};
use std::process::Command;

fn problem(answer: &(u16, Value)) -> (u16, &str) {
    let v = &answer.1;
    for key in ["type", "title", "status", "detail", "code", "request_id"] {
        assert!(v.get(key).is_some(), "{key} is missing in {v}");
    }
    assert_eq!(v["status"], answer.0);
    (answer.0, v["code"].as_str().unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_paths_and_queries() {
    let hub = Hub::start_with(&[("CORTEX_LIMITS_BODY_BYTES", "100000")], &[]).await;
    let raw = async |kind: &str, body: String| {
        let r = hub.request("POST", "/api/v1/dispatch").header("content-type", kind).body(body).send().await.unwrap();
        assert_eq!(r.headers()["content-type"], "application/problem+json");
        assert!(r.headers().contains_key("x-request-id"));
        (r.status().as_u16(), r.json::<Value>().await.unwrap())
    };
    let json_kind = "application/json";
    for (kind, body, want) in [
        (json_kind, "{".to_owned(), (400, "bad_json")),
        (json_kind, r#"{"echo": {"payload": "x"}, "colour": 1}"#.to_owned(), (400, "bad_field")),
        (json_kind, r#"{"echo": {"payload": 5}}"#.to_owned(), (400, "bad_field")),
        (json_kind, r#"{"shell": {"argv": "ls"}}"#.to_owned(), (400, "bad_field")),
        (json_kind, "[null, {\"argv\": [\"ls\"]}]".to_owned(), (400, "bad_field")),
        (json_kind, r#"{"shell": [["ls"]]}"#.to_owned(), (400, "bad_field")),
        (json_kind, r#"{"echo": ["x"]}"#.to_owned(), (400, "bad_field")),
        (json_kind, r#"{"echo": {"payload": "x"}, "retries": [1]}"#.to_owned(), (400, "bad_field")),
        ("text/plain", r#"{"echo": {"payload": "x"}}"#.to_owned(), (415, "unsupported_media_type")),
        (json_kind, format!(r#"{{"echo": {{"payload": "{}"}}}}"#, "x".repeat(200_000)), (413, "body_too_large")),
        (json_kind, "{}".to_owned(), (422, "bad_skill")),
        (json_kind, r#"{"shell": {}}"#.to_owned(), (422, "bad_shell")),
        (json_kind, r#"{"shell": {"argv": []}}"#.to_owned(), (422, "bad_spec")),
        (json_kind, r#"{"shell": {"argv": ["a\u0000b"]}}"#.to_owned(), (422, "bad_spec")),
        (json_kind, r#"{"shell": {"argv": ["ls"], "cwd": "../x"}}"#.to_owned(), (422, "bad_spec")),
        (json_kind, r#"{"shell": {"argv": ["ls"], "cwd": "/etc"}}"#.to_owned(), (422, "bad_spec")),
        (json_kind, r#"{"shell": {"argv": ["ls"], "stdin_base64": "%"}}"#.to_owned(), (422, "bad_base64")),
        (json_kind, r#"{"shell": {"argv": ["ls"]}, "wait_secs": 61}"#.to_owned(), (422, "bad_wait")),
        (json_kind, r#"{"shell": {"argv": ["ls"]}, "timeout_secs": 18446744073709551615}"#.to_owned(), (422, "bad_duration")),
        (json_kind, r#"{"shell": {"argv": ["ls"]}, "queue_secs": 18446744073709551615}"#.to_owned(), (422, "bad_duration")),
        (json_kind, r#"{"shell": {"argv": ["ls"]}, "timeout_secs": -1}"#.to_owned(), (400, "bad_field")),
        (json_kind, r#"{"shell": {"argv": ["ls"]}, "sandbox": "strict"}"#.to_owned(), (422, "not_yet")),
        (json_kind, r#"{"shell": {"argv": ["ls"]}, "network": "none"}"#.to_owned(), (422, "not_yet")),
        (json_kind, r#"{"shell": {"argv": ["ls"], "pty": {"rows": 1, "cols": 1}}}"#.to_owned(), (422, "not_yet")),
        (json_kind, r#"{"shell": {"argv": ["ls"]}, "limits": {"pids": 1}}"#.to_owned(), (422, "not_yet")),
        (json_kind, r#"{"shell": {"argv": ["ls"]}, "all": true, "node": "x"}"#.to_owned(), (422, "bad_select")),
        (json_kind, r#"{"shell": {"argv": ["ls"]}, "all": "yes"}"#.to_owned(), (400, "bad_field")),
        (json_kind, r#"{"shell": {"argv": ["ls"]}, "on_lost": "never"}"#.to_owned(), (422, "bad_value")),
        (json_kind, r#"{"shell": {"argv": ["ls"]}, "lost_after_secs": -1}"#.to_owned(), (400, "bad_field")),
        (json_kind, r#"{"browser": {}}"#.to_owned(), (422, "not_yet")),
    ] {
        let answer = raw(kind, body.clone()).await;
        assert_eq!(problem(&answer), want, "{body}: {}", answer.1);
    }
    let ghost = "0198c0de-0000-7000-8000-000000000000";
    for (method, path, want) in [
        ("GET", format!("/api/v1/nodes/node_{ghost}"), (404, "not_found")),
        ("GET", "/api/v1/nodes/../etc".to_owned(), (404, "not_found")),
        ("GET", format!("/api/v1/sessions/sess_{ghost}"), (404, "not_found")),
        ("POST", format!("/api/v1/sessions/sess_{ghost}/nodes/x"), (405, "method_not_allowed")),
        ("GET", format!("/api/v1/tasks/task_{ghost}"), (404, "not_found")),
        ("GET", format!("/api/v1/tasks/task_{ghost}/output"), (404, "not_found")),
        ("POST", format!("/api/v1/tasks/task_{ghost}/cancel"), (404, "not_found")),
        ("GET", "/api/v1/tasks/7".to_owned(), (404, "not_found")),
        ("GET", "/api/v1/tasks?limit=0".to_owned(), (400, "bad_limit")),
        ("GET", "/api/v1/tasks?limit=501".to_owned(), (400, "bad_limit")),
        ("GET", "/api/v1/tasks?limit=x".to_owned(), (400, "bad_query")),
        ("GET", "/api/v1/tasks?cursor=zzz".to_owned(), (400, "bad_cursor")),
        ("GET", "/api/v1/tasks?state=asleep".to_owned(), (400, "bad_query")),
        ("GET", "/api/v1/tasks?colour=red".to_owned(), (400, "bad_query")),
        ("GET", "/api/v1/approvals".to_owned(), (501, "not_yet")),
        ("GET", "/capabilities".to_owned(), (501, "not_yet")),
        ("GET", "/api/v1/downloads/plan9-mips/cortex-node".to_owned(), (404, "not_found")),
        ("DELETE", "/api/v1/tasks".to_owned(), (405, "method_not_allowed")),
        ("GET", "/nowhere".to_owned(), (404, "not_found")),
    ] {
        let answer = hub.call(method, &path, None).await;
        assert_eq!(problem(&answer), want, "{method} {path}: {}", answer.1);
    }
    let answer = hub.call("POST", "/api/v1/dispatch", Some(json!({"node": "ghost", "echo": {"payload": ""}}))).await;
    assert_eq!(problem(&answer), (404, "not_found"));
    assert_eq!(hub.get("/api/v1/tasks").await["items"], json!([]), "nothing of all this was accepted");
}

#[tokio::test(flavor = "multi_thread")]
async fn credentials() {
    let hub = Hub::start().await;
    let web = reqwest::Client::builder().no_proxy().build().unwrap();
    let url = |p: &str| format!("{}{p}", hub.http);
    for path in ["/healthz", "/readyz", "/api/v1/downloads", "/"] {
        assert_eq!(web.get(url(path)).send().await.unwrap().status(), 200, "{path} needs no log-in");
    }
    for (name, password) in [("admin", "wrong password !"), ("nobody", PASSWORD), ("admin", "")] {
        let answer = hub.call("POST", "/api/v1/auth/login", Some(json!({"username": name, "password": password}))).await;
        assert_eq!(problem(&answer), (401, "unauthenticated"), "{name}");
    }
    // Refresh rotates; a second use ends the family.
    let (_, first) = hub.call("POST", "/api/v1/auth/login", Some(json!({"username": "admin", "password": PASSWORD}))).await;
    let refresh = async |t: &Value| hub.call("POST", "/api/v1/auth/refresh", Some(json!({"refresh_token": t["refresh_token"]}))).await;
    let (status, second) = refresh(&first).await;
    assert_eq!(status, 200);
    assert_eq!(refresh(&first).await.0, 401, "used before");
    assert_eq!(refresh(&second).await.0, 401, "its family has ended");
    let me = web.get(url("/api/v1/auth/me")).bearer_auth(text(&second, "access_token")).send().await.unwrap();
    assert_eq!(me.status(), 401, "and so have its access tokens");

    // Keys: the secret once, scopes as written, and no further.
    let (status, key) = hub.call("POST", "/api/v1/api-keys", Some(json!({"name": "ci", "scopes": ["nodes:read"]}))).await;
    assert_eq!(status, 201);
    let secret = text(&key, "secret");
    assert!(secret.starts_with("cmk_"));
    let listed = hub.get("/api/v1/api-keys").await;
    assert!(listed["items"][0].get("secret").is_none());
    let by_key = async |path: &str| web.get(url(path)).bearer_auth(&secret).send().await.unwrap().status().as_u16();
    assert_eq!((by_key("/api/v1/nodes").await, by_key("/api/v1/tasks").await), (200, 403));
    let made = web.post(url("/api/v1/api-keys")).bearer_auth(&secret).json(&json!({"name": "x", "scopes": ["*"]})).send().await.unwrap();
    assert_eq!(made.status(), 403, "a key makes no keys");
    for scope in ["nodes:*x", "*:", "tasks:approve", "everything"] {
        let answer = hub.call("POST", "/api/v1/api-keys", Some(json!({"name": "x", "scopes": [scope]}))).await;
        assert_eq!(problem(&answer), (422, "bad_scope"), "{scope}");
    }
    assert_eq!(hub.call("DELETE", &format!("/api/v1/api-keys/{}", text(&key, "id")), None).await.0, 204);
    assert_eq!(by_key("/api/v1/nodes").await, 401);
    // No secret stands in the data folder in clear.
    let db = std::fs::read(hub.data().join("hub.db")).unwrap();
    let wal = std::fs::read(hub.data().join("hub.db-wal")).unwrap_or_default();
    for clear in [secret.as_str(), PASSWORD, &text(&second, "refresh_token")] {
        assert!(![&db, &wal].iter().any(|f| f.windows(clear.len()).any(|w| w == clear.as_bytes())));
    }
}

/// Without a given password the first start makes one, prints it once, and keeps it until it is changed.
#[tokio::test(flavor = "multi_thread")]
async fn the_made_password_lives_until_it_is_changed() {
    let dir = folder();
    let start = || {
        let mut c = Command::new(program("cortex-hub"));
        c.args(["serve", "--data-dir"]).arg(dir.path().join("hub"));
        for p in ["HTTP", "NODE", "METRICS"] {
            c.env(format!("CORTEX_{p}_ADDR"), "127.0.0.1:0");
        }
        mesh_tests::Process::start(&mut c, dir.path().join("log"))
    };
    let facts = async |pid: u32| {
        let path = dir.path().join("hub/hub.json");
        let v: Value = mesh_tests::until("the hub", async || {
            let v: Value = serde_json::from_slice(&std::fs::read(&path).ok()?).ok()?;
            (v["pid"] == pid).then_some(v)
        })
        .await;
        format!("http://{}/api/v1", text(&v, "http"))
    };
    let file = dir.path().join("hub/admin-password");
    let mut hub = start();
    let url = facts(hub.id()).await;
    let password = std::fs::read_to_string(&file).unwrap().trim().to_owned();
    assert_eq!(std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&file).unwrap().permissions()) & 0o777, 0o600);
    mesh_tests::until("the password on the screen", async || hub.log().contains(&password).then_some(())).await;
    let web = reqwest::Client::builder().no_proxy().build().unwrap();
    let login = async |url: &str, password: &str| {
        let r = web.post(format!("{url}/auth/login")).json(&json!({"username": "admin", "password": password})).send().await.unwrap();
        (r.status().as_u16(), r.json::<Value>().await.unwrap())
    };
    let (status, tokens) = login(&url, &password).await;
    assert_eq!(status, 200);
    let change = async |current: &str, new: &str| {
        let body = json!({"current_password": current, "new_password": new});
        web.post(format!("{url}/auth/password"))
            .bearer_auth(text(&tokens, "access_token"))
            .json(&body)
            .send()
            .await
            .unwrap()
            .status()
            .as_u16()
    };
    assert_eq!(change("wrong wrong wrong", "a much better one").await, 403);
    assert_eq!(change(&password, "short").await, 422);
    assert_eq!(change(&password, "a much better one").await, 204);
    assert!(!file.exists());
    assert_eq!(login(&url, &password).await.0, 401);
    assert_eq!(hub.terminate().await.code(), Some(0));
    let printed = hub.log().matches("log in as admin").count();
    let again = start();
    let url = facts(again.id()).await;
    assert_eq!(login(&url, "a much better one").await.0, 200);
    assert_eq!((printed, again.log().matches("log in as admin").count(), file.exists()), (1, 1, false), "said once");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_task_asks_for_and_cannot_have() {
    let hub = Hub::start().await;
    let node = Node::join(&hub, "n").await;
    let run = async |body: Value| {
        let t = hub.dispatch(body).await;
        hub.finished(&text(&t, "id")).await
    };
    let t = run(json!({"shell": {"argv": ["no-such-program"]}})).await;
    assert_eq!((t["state"].as_str(), t["reason"]["code"].as_str()), (Some("failed"), Some("not_found")), "{t}");
    let t = run(json!({"shell": {"argv": ["ls"], "cwd": "nowhere"}})).await;
    assert_eq!(t["reason"]["code"], "not_found", "{t}");

    // A symlink that leads out is found where it counts: on the node.
    let (_, s) = hub.call("POST", "/api/v1/sessions", Some(json!({"name": "s"}))).await;
    let sid = text(&s, "id");
    hub.call("PUT", &format!("/api/v1/sessions/{sid}/nodes/{}", node.id), None).await;
    let in_session = async |shell: Value| {
        let (_, t) = hub.call("POST", &format!("/api/v1/sessions/{sid}/dispatch"), Some(json!({"shell": shell}))).await;
        hub.finished(&text(&t, "id")).await
    };
    assert_eq!(in_session(json!({"argv": ["ln", "-s", "/etc", "out"]})).await["state"], "succeeded");
    let t = in_session(json!({"argv": ["ls"], "cwd": "out"})).await;
    assert_eq!(t["reason"]["code"], "policy_denied", "{t}");

    // Not root, no way to become it, and the node's keys are out of reach.
    let secret = node.data().join("identity.key");
    let t = hub
        .sh(&format!("id -u; grep NoNewPrivs /proc/self/status; cat {} 2>&1; ls {} 2>&1", secret.display(), node.data().display()))
        .await;
    let out = text(&t, "stdout");
    let uid: u32 = out.lines().next().unwrap().parse().unwrap();
    if rustix::process::getuid().is_root() {
        assert_ne!(uid, 0);
        assert!(out.matches("ermission denied").count() >= 2, "{out}");
    }
    assert!(out.contains("NoNewPrivs:\t1"), "{out}");
}

#[tokio::test(flavor = "multi_thread")]
async fn settings_and_folders() {
    let dir = folder();
    let config = dir.path().join("hub.toml");
    let hub = |args: &[&str], env: &[(&str, &str)]| {
        let mut c = Command::new(program("cortex-hub"));
        c.args(args).envs(env.iter().copied()).env("CORTEX_DATA_DIR", dir.path().join("data"));
        c.output().unwrap()
    };
    let path = config.to_str().unwrap();
    for (toml, words) in [
        ("[http]\nadr = \"127.0.0.1:0\"\n", ["hub.toml", "http.adr", "unknown key"]),
        ("[http]\naddr = \"127.0.0.1:70000\"\n", ["hub.toml", "http.addr", "invalid"]),
        ("[colour]\n", ["hub.toml", "colour", "unknown field"]),
        ("[log]\nlevel = 5 5\n", ["hub.toml:2", "log.level", ""]),
    ] {
        std::fs::write(&config, toml).unwrap();
        for verb in [&["config", "check"][..], &["serve"]] {
            let mut args = vec!["--config", path];
            args.extend(verb);
            let out = hub(&args, &[]);
            assert_eq!(out.status.code(), Some(2), "{}", shown(&out));
            let said = String::from_utf8_lossy(&out.stderr).into_owned();
            assert!(words.iter().all(|w| said.contains(w)), "{words:?} in {said}");
        }
    }
    std::fs::write(&config, "[http]\naddr = \"127.0.0.1:0\"\n").unwrap();
    assert_eq!(hub(&["--config", path, "config", "check"], &[]).status.code(), Some(0));
    let out = hub(&["serve"], &[("CORTEX_HTTP_ADDR", "127.0.0.1:x")]);
    assert_eq!(out.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&out.stderr).contains("environment CORTEX_HTTP_ADDR: http.addr"), "{}", shown(&out));
    let out = hub(&["serve"], &[("CORTEX_HTTP_ADDR", "0.0.0.0:0")]);
    assert!(out.status.code() == Some(2) && String::from_utf8_lossy(&out.stderr).contains("--insecure-http"), "{}", shown(&out));
    let out = hub(&["audit", "verify", "x"], &[]);
    assert!(out.status.code() == Some(1) && String::from_utf8_lossy(&out.stderr).contains("x: No such file"), "{}", shown(&out));
    let out = hub(&["ca", "rotate"], &[]);
    assert!(out.status.code() == Some(2) && String::from_utf8_lossy(&out.stderr).contains("--begin"), "{}", shown(&out));

    // A port that is taken, and a folder that is in use.
    let running = Hub::start().await;
    let taken = running.http.trim_start_matches("http://").to_owned();
    let out = hub(&["serve"], &[("CORTEX_HTTP_ADDR", &taken), ("CORTEX_NODE_ADDR", "127.0.0.1:0"), ("CORTEX_METRICS_ADDR", "127.0.0.1:0")]);
    assert_eq!(out.status.code(), Some(2), "{}", shown(&out));
    assert!(String::from_utf8_lossy(&out.stderr).contains(&format!("http.addr: cannot listen on {taken}")), "{}", shown(&out));
    let mut second = Command::new(program("cortex-hub"));
    let out = second.args(["serve", "--data-dir"]).arg(running.data()).env("CORTEX_HTTP_ADDR", "127.0.0.1:0").output().unwrap();
    assert_eq!(out.status.code(), Some(1), "{}", shown(&out));
    assert!(String::from_utf8_lossy(&out.stderr).contains("in use by another hub"), "{}", shown(&out));
    running.get("/readyz").await;
}

/// What a stop leaves: nothing that looks alive.
#[tokio::test(flavor = "multi_thread")]
async fn a_stop_is_clean() {
    let mut hub = Hub::start().await;
    let mut node = Node::join(&hub, "n").await;
    let id = text(&hub.dispatch(json!({"shell": {"argv": ["sleep", "600"]}})).await, "id");
    hub.task_when(&id, "to run", |t| t["state"] == "running").await;
    assert_eq!(hub.process.terminate().await.code(), Some(0));
    assert!(!hub.data().join("hub.json").exists() && !hub.data().join("hub.sock").exists());
    // The node goes on without the hub, and tells its owner.
    let status = node.command(&["status"]).output().unwrap();
    assert!(String::from_utf8_lossy(&status.stdout).contains(&id), "{}", shown(&status));
    let out = node.command(&["stop"]).output().unwrap();
    assert!(out.status.success(), "{}", shown(&out));
    node.daemon().ended().await;
    hub.restart().await;
    node.run();
    node.online(&hub).await;
    let t = hub.finished(&id).await;
    assert_eq!((t["state"].as_str(), t["reason"]["detail"].as_str()), (Some("cancelled"), Some("ended on the machine by its owner")));
}

//! Sessions, what they hold, state of agents and statistics, at the REST door.

use mesh_tests::{Hub, Node, shown, text, until};
use serde_json::{Value, json};

fn code(answer: &(u16, Value)) -> (u16, &str) {
    (answer.0, answer.1["code"].as_str().unwrap_or_default())
}

async fn session(hub: &Hub, body: Value) -> String {
    let (status, v) = hub.call("POST", "/api/v1/sessions", Some(body)).await;
    assert_eq!(status, 201, "{v}");
    format!("/api/v1/sessions/{}", text(&v, "id"))
}

fn kinds(page: &Value) -> Vec<String> {
    page["items"].as_array().unwrap().iter().map(|i| text(i, "type")).collect()
}

/// Makes a key of the admin with these scopes; a call with it.
async fn with_key(hub: &Hub, scopes: Value, method: &str, path: &str, body: Option<Value>) -> (u16, Value) {
    let (status, key) = hub.call("POST", "/api/v1/api-keys", Some(json!({"name": "k", "scopes": scopes}))).await;
    assert_eq!(status, 201, "{key}");
    let web = reqwest::Client::builder().no_proxy().build().unwrap();
    let mut r = web.request(method.parse().unwrap(), format!("{}{path}", hub.http)).bearer_auth(text(&key, "secret"));
    if let Some(b) = body {
        r = r.json(&b);
    }
    let r = r.send().await.unwrap();
    (r.status().as_u16(), r.json().await.unwrap_or(Value::Null))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_remembers_and_talks() {
    let mut hub = Hub::start().await;
    let s = session(&hub, json!({"name": "work"})).await;
    let before = hub.get(&s).await;

    let (status, v) = hub.call("PATCH", &s, Some(json!({"name": "better", "ttl_secs": 500}))).await;
    assert_eq!((status, v["name"].as_str(), v["status"].as_str()), (200, Some("better"), Some("active")), "{v}");
    assert!(text(&v, "expires_at") < text(&before, "expires_at"), "a shorter life: {v}");

    // Values are any JSON; keys are any text that can be written.
    let values = [json!(null), json!("é\u{0}"), json!([1, {"a": -1.5}]), json!({"value": 18446744073709551615u64})];
    for (n, value) in values.iter().enumerate() {
        let path = format!("{s}/memory/{}", ["plain", "a%2Fb%20c", "%C3%A9%25", "value"][n]);
        let (status, v) = hub.call("PUT", &path, Some(json!({"value": value}))).await;
        assert_eq!((status, &v["value"], v["key"].as_str()), (200, value, Some(["plain", "a/b c", "é%", "value"][n])), "{v}");
        assert_eq!(hub.get(&path).await, v, "what was stored");
    }
    hub.crash_and_restart().await;
    let keys = hub.get(&format!("{s}/memory")).await;
    let names: Vec<_> = keys["items"].as_array().unwrap().iter().map(|k| text(k, "key")).collect();
    assert_eq!(names, ["value", "é%", "a/b c", "plain"]);
    assert_eq!((keys["items"][3]["bytes"].as_u64(), &keys["next_cursor"]), (Some(4), &Value::Null), "of null");
    assert_eq!(hub.call("DELETE", &format!("{s}/memory/plain"), None).await.0, 204);
    assert_eq!(code(&hub.call("DELETE", &format!("{s}/memory/plain"), None).await), (404, "not_found"));
    assert_eq!(code(&hub.call("GET", &format!("{s}/memory/plain"), None).await), (404, "not_found"));

    for (role, content) in [("system", "be kind"), ("user", "hi\u{0}"), ("assistant", ""), ("tool", "{}")] {
        let (status, v) = hub.call("POST", &format!("{s}/messages"), Some(json!({"role": role, "content": content}))).await;
        assert_eq!((status, v["role"].as_str(), v["content"].as_str()), (201, Some(role), Some(content)), "{v}");
        assert!(text(&v, "id").starts_with("msg_") && s.ends_with(&text(&v, "session_id")), "{v}");
    }
    let first = hub.get(&format!("{s}/messages?limit=3")).await;
    let roles: Vec<_> = first["items"].as_array().unwrap().iter().map(|m| text(m, "role")).collect();
    assert_eq!(roles, ["tool", "assistant", "user"], "newest first");
    let rest = hub.get(&format!("{s}/messages?limit=3&cursor={}", text(&first, "next_cursor"))).await;
    assert_eq!((rest["items"][0]["role"].as_str(), &rest["next_cursor"]), (Some("system"), &Value::Null));
    assert_eq!(rest["items"].as_array().unwrap().len(), 1);
    // A page is cut where it would be too large.
    for _ in 0..10 {
        let big = json!({"role": "user", "content": "x".repeat(1 << 20)});
        assert_eq!(hub.call("POST", &format!("{s}/messages"), Some(big)).await.0, 201);
    }
    let page = hub.get(&format!("{s}/messages")).await;
    assert_eq!(page["items"].as_array().unwrap().len(), 8, "8 MiB");
    let page = hub.get(&format!("{s}/messages?cursor={}", text(&page, "next_cursor"))).await;
    assert_eq!(page["items"].as_array().unwrap().len(), 6);

    let all = hub.get(&format!("{s}/activity?limit=500")).await;
    let told = kinds(&all);
    let tail: Vec<_> = told[10..].iter().map(String::as_str).collect();
    let expect = ["message", "message", "message", "message", "memory_removed", "memory_set", "memory_set", "memory_set", "memory_set"];
    assert_eq!(tail, [&expect[..], &["renamed", "created"]].concat());
    assert!(!all.to_string().contains("be kind"), "what was said is not repeated");
    let (mut paged, mut cursor) = (vec![], String::new());
    loop {
        let page = hub.get(&format!("{s}/activity?limit=4{cursor}")).await;
        paged.extend(page["items"].as_array().unwrap().clone());
        match page["next_cursor"].as_str() {
            Some(next) => cursor = format!("&cursor={next}"),
            None => break,
        }
    }
    assert_eq!(&paged, all["items"].as_array().unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_ends_by_the_clock_and_is_erased() {
    let mut hub = Hub::start().await;
    let node = Node::join(&hub, "n").await;
    let s = session(&hub, json!({"name": "short"})).await;
    let waits = session(&hub, json!({"name": "waits"})).await;
    for path in [&s, &waits] {
        assert_eq!(hub.call("PUT", &format!("{path}/nodes/{}", node.id), None).await.0, 200);
    }
    hub.call("PUT", &format!("{s}/memory/k"), Some(json!({"value": 1}))).await;
    hub.call("POST", &format!("{s}/messages"), Some(json!({"role": "user", "content": "hello"}))).await;
    let dispatch = async |path: &str, script: &str| {
        let (status, t) = hub.call("POST", &format!("{path}/dispatch"), Some(json!({"shell": {"command": script}}))).await;
        assert_eq!(status, 202, "{t}");
        text(&t, "id")
    };
    let loud = dispatch(&s, "head -c 200000 /dev/zero | tr '\\0' x; echo end").await;
    hub.finished(&loud).await;
    let id = dispatch(&s, "while [ ! -e go ]; do sleep 0.1; done").await;
    hub.task_when(&id, "to run", |t| t["state"] == "running").await;

    // Its life is a second from here on, and the task that runs keeps it: its end is moved on.
    let (_, v) = hub.call("PATCH", &s, Some(json!({"ttl_secs": 1}))).await;
    let end = text(&v, "expires_at");
    until("the end to slide", async || {
        let v = hub.get(&s).await;
        assert_eq!(v["status"], "active", "{v}");
        (text(&v, "expires_at") > end).then_some(())
    })
    .await;
    assert_eq!(code(&hub.call("POST", &format!("{s}/purge"), None).await), (409, "session_active"));
    assert_eq!(hub.call("POST", &format!("{s}/messages"), Some(json!({"role": "tool", "content": "still here"}))).await.0, 201);

    // Another one, whose task waits for a node that is gone, ends with that task, also over a restart.
    let mut node = node;
    node.daemon().kill9();
    node.offline(&hub).await;
    let pending = dispatch(&waits, "true").await;
    hub.call("PATCH", &waits, Some(json!({"ttl_secs": 1}))).await;
    hub.process.kill9();
    hub.restart().await;
    let t = hub.finished(&pending).await;
    assert_eq!((t["state"].as_str(), t["reason"]["code"].as_str()), (Some("cancelled"), Some("session_closed")), "{t}");
    let v = hub.get(&waits).await;
    assert_eq!((v["status"].as_str(), v["attached_node_ids"][0].as_str()), (Some("expired"), Some(node.id.as_str())), "{v}");
    assert_eq!(hub.get(&s).await["status"], "active", "in doubt is not ended");
    for (method, path, body) in [
        ("POST", "/dispatch".to_owned(), Some(json!({"echo": {"payload": ""}}))),
        ("PATCH", String::new(), Some(json!({"name": "x"}))),
        ("PUT", format!("/nodes/{}", node.id), None),
        ("PUT", "/memory/k".to_owned(), Some(json!({"value": 1}))),
        ("DELETE", "/memory/k".to_owned(), None),
        ("POST", "/messages".to_owned(), Some(json!({"role": "user", "content": "x"}))),
    ] {
        let answer = hub.call(method, &format!("{waits}{path}"), body).await;
        assert_eq!(code(&answer), (409, "session_ended"), "{method} {path}");
    }

    // The node is back, the work ends, and so does the session.
    node.run();
    node.online(&hub).await;
    assert_eq!(hub.task(&id).await["state"], "running");
    let folder = until("the workspace", async || find(&node.dir.path().join("workspaces"), s.rsplit('_').next().unwrap())).await;
    std::fs::write(folder.join("go"), "").unwrap();
    hub.finished(&id).await;
    until("the session to expire", async || (hub.get(&s).await["status"] == "expired").then_some(())).await;

    let files = || count_files(&hub.data().join("output"));
    assert_eq!(hub.output(&loud, "").await.len(), 200_004);
    assert_eq!(files(), 1);
    assert!(hub.get("/api/v1/system/stats").await["storage"]["output_bytes"].as_u64().unwrap() > 150_000);
    let (status, v) = hub.call("POST", &format!("{s}/purge"), None).await;
    assert_eq!((status, v["status"].as_str()), (200, Some("expired")), "{v}");
    let purged_at = text(&v, "purged_at");
    let (status, v) = hub.call("POST", &format!("{s}/purge"), None).await;
    assert_eq!((status, text(&v, "purged_at")), (200, purged_at), "again is the same as once");
    assert_eq!(files(), 0);
    assert_eq!(hub.get(&format!("{s}/memory")).await["items"], json!([]));
    assert_eq!(hub.get(&format!("{s}/messages")).await["items"], json!([]));
    let told = kinds(&hub.get(&format!("{s}/activity")).await);
    assert_eq!(told, ["purged", "task_ended", "task_accepted", "task_ended", "task_accepted"], "tasks have a history of their own");
    let t = hub.task(&loud).await;
    assert_eq!((t["stdout"].as_str(), t["stdout_bytes"].as_u64(), t["truncated"].as_bool()), (Some(""), Some(200_004), Some(true)), "{t}");
    assert_eq!(hub.output(&loud, "").await, b"");
    assert_eq!(hub.get("/api/v1/system/stats").await["storage"]["output_bytes"], 0);
}

fn find(dir: &std::path::Path, name: &str) -> Option<std::path::PathBuf> {
    for entry in std::fs::read_dir(dir).ok()?.flatten() {
        let path = entry.path();
        if path.is_dir() {
            if entry.file_name().to_string_lossy().contains(name) {
                return Some(path);
            }
            if let Some(found) = find(&path, name) {
                return Some(found);
            }
        }
    }
    None
}

fn count_files(dir: &std::path::Path) -> usize {
    let Ok(entries) = std::fs::read_dir(dir) else { return 0 };
    entries.flatten().map(|e| if e.path().is_dir() { count_files(&e.path()) } else { 1 }).sum()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_sessions_and_state_refuse() {
    let hub = Hub::start().await;
    let s = session(&hub, json!({"name": "s"})).await;
    let other = session(&hub, json!({"name": "other"})).await;
    let ghost = "/api/v1/sessions/sess_0198c0de-0000-7000-8000-000000000000";
    for path in [&s, &other] {
        for n in 0..2 {
            assert_eq!(hub.call("PUT", &format!("{path}/memory/{n}"), Some(json!({"value": n}))).await.0, 200);
            assert_eq!(hub.call("POST", &format!("{path}/messages"), Some(json!({"role": "user", "content": ""}))).await.0, 201);
            assert_eq!(hub.call("PUT", &format!("/api/v1/state/a/{n}"), Some(json!({"value": n}))).await.0, 200);
        }
    }
    let value = Some(json!({"value": 1}));
    let (long, large) = ("k".repeat(256), json!({"value": "x".repeat(256 << 10)}));
    let state = "/api/v1/state";
    for (method, path, body, want) in [
        ("PATCH", s.clone(), Some(json!({"name": ""})), (422, "bad_name")),
        ("PATCH", s.clone(), Some(json!({"name": "a\u{202e}"})), (422, "bad_name")),
        ("PATCH", s.clone(), Some(json!({"ttl_secs": 0})), (422, "bad_ttl")),
        ("PATCH", s.clone(), Some(json!({"ttl_secs": u64::MAX})), (422, "bad_ttl")),
        ("PATCH", s.clone(), Some(json!({"ttl_secs": -1})), (400, "bad_field")),
        ("PATCH", s.clone(), Some(json!({"status": "closed"})), (400, "bad_field")),
        ("PATCH", ghost.to_owned(), Some(json!({"name": "x"})), (404, "not_found")),
        ("PUT", format!("{s}/memory/{long}"), value.clone(), (422, "bad_key")),
        ("PUT", format!("{s}/memory/a%00"), value.clone(), (422, "bad_key")),
        ("PUT", format!("{s}/memory/u%CC%88"), value.clone(), (422, "bad_key")),
        ("PUT", format!("{s}/memory/%ff"), value.clone(), (400, "bad_path")),
        ("PUT", format!("{s}/memory/k"), Some(large.clone()), (422, "value_too_large")),
        ("PUT", format!("{s}/memory/k"), Some(json!({})), (400, "bad_field")),
        ("PUT", format!("{s}/memory/k"), Some(json!({"value": 1, "ttl": 1})), (400, "bad_field")),
        ("PUT", format!("{s}/memory/k"), Some(json!("bare")), (400, "bad_field")),
        ("PUT", format!("{ghost}/memory/k"), value.clone(), (404, "not_found")),
        ("GET", format!("{s}/memory/a%00"), None, (404, "not_found")),
        ("DELETE", format!("{s}/memory/{long}"), None, (404, "not_found")),
        ("POST", format!("{s}/memory/k"), value.clone(), (405, "method_not_allowed")),
        ("POST", format!("{s}/messages"), Some(json!({"role": "robot", "content": "x"})), (422, "bad_role")),
        ("POST", format!("{s}/messages"), Some(json!({"role": "User", "content": "x"})), (422, "bad_role")),
        ("POST", format!("{s}/messages"), Some(json!({"role": "user"})), (400, "bad_field")),
        ("POST", format!("{s}/messages"), Some(json!({"role": "user", "content": "x".repeat((1 << 20) + 1)})), (422, "content_too_large")),
        ("POST", format!("{ghost}/messages"), Some(json!({"role": "user", "content": "x"})), (404, "not_found")),
        ("POST", format!("{s}/purge"), None, (409, "session_active")),
        ("POST", format!("{ghost}/purge"), None, (404, "not_found")),
        ("GET", format!("{ghost}/activity"), None, (404, "not_found")),
        ("GET", format!("{s}/activity?limit=0"), None, (400, "bad_limit")),
        ("GET", format!("{s}/activity?limit=501"), None, (400, "bad_limit")),
        ("GET", format!("{s}/activity?colour=red"), None, (400, "bad_query")),
        ("GET", format!("{s}/messages?limit=0"), None, (400, "bad_limit")),
        ("GET", format!("{s}/messages?limit=501"), None, (400, "bad_limit")),
        ("GET", format!("{s}/memory?limit=501"), None, (400, "bad_limit")),
        ("GET", format!("{state}?limit=0"), None, (400, "bad_limit")),
        ("GET", format!("{state}?agent=a"), None, (400, "bad_query")),
        ("PUT", format!("{state}/{}/k", "a".repeat(64)), value.clone(), (422, "bad_name")),
        ("PUT", format!("{state}/a/{long}"), value.clone(), (422, "bad_key")),
        ("PUT", format!("{state}/a/k"), Some(large), (422, "value_too_large")),
        ("PUT", format!("{state}/a/k"), Some(json!([])), (400, "bad_field")),
        ("GET", format!("{state}/a/%00"), None, (404, "not_found")),
        ("GET", format!("{state}/nobody/0"), None, (404, "not_found")),
        ("DELETE", format!("{state}/a/none"), None, (404, "not_found")),
        ("GET", format!("{state}/a"), None, (404, "not_found")),
    ] {
        let answer = hub.call(method, &path, body).await;
        assert_eq!(code(&answer), want, "{method} {path}: {}", answer.1);
    }
    assert_eq!(hub.get(&format!("{state}?agent_id=%00")).await["items"], json!([]), "nothing is called so");

    // A cursor belongs to one list of one session.
    let lists = [
        format!("{s}/messages"),
        format!("{s}/activity"),
        format!("{s}/memory"),
        format!("{other}/messages"),
        state.to_owned(),
        format!("{state}?agent_id=a"),
    ];
    let and = |path: &str, rest: String| format!("{path}{}{rest}", if path.contains('?') { '&' } else { '?' });
    for one in &lists {
        let cursor = text(&hub.get(&and(one, "limit=1".into())).await, "next_cursor");
        for list in &lists {
            let answer = hub.call("GET", &and(list, format!("limit=1&cursor={cursor}")), None).await;
            let want = if list == one { (200, "") } else { (400, "bad_cursor") };
            assert_eq!(code(&answer), want, "{one}'s cursor for {list}");
        }
    }

    // Scopes: reading is not writing, and each thing has its own permission.
    for (scopes, method, path, body, want) in [
        (json!(["sessions:read"]), "GET", format!("{s}/messages"), None, 200),
        (json!(["sessions:read"]), "GET", format!("{s}/activity"), None, 200),
        (json!(["sessions:read"]), "POST", format!("{s}/messages"), Some(json!({"role": "user", "content": "x"})), 403),
        (json!(["sessions:read"]), "PUT", format!("{s}/memory/k"), value.clone(), 403),
        (json!(["sessions:read"]), "DELETE", format!("{s}/memory/0"), None, 403),
        (json!(["sessions:read"]), "PATCH", s.clone(), Some(json!({"name": "x"})), 403),
        (json!(["sessions:read"]), "POST", format!("{s}/purge"), None, 403),
        (json!(["tasks:*", "agents:*"]), "GET", format!("{s}/memory"), None, 404),
        (json!(["tasks:*", "agents:*"]), "PUT", format!("{s}/memory/k"), value.clone(), 404),
        (json!(["agents:read"]), "GET", format!("{state}/a/0"), None, 200),
        (json!(["agents:read"]), "PUT", format!("{state}/a/0"), value.clone(), 403),
        (json!(["agents:read"]), "DELETE", format!("{state}/a/0"), None, 403),
        (json!(["agents:manage"]), "PUT", format!("{state}/a/0"), value.clone(), 200),
        (json!(["sessions:*"]), "GET", state.to_owned(), None, 403),
        (json!(["sessions:*"]), "GET", format!("{state}/a/0"), None, 403),
        (json!(["nodes:read", "tasks:read"]), "GET", "/api/v1/system/stats".to_owned(), None, 200),
        (json!(["nodes:read"]), "GET", "/api/v1/system/stats".to_owned(), None, 403),
    ] {
        let answer = with_key(&hub, scopes.clone(), method, &path, body).await;
        assert_eq!(answer.0, want, "{scopes} {method} {path}: {}", answer.1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn state_and_statistics() {
    let mut hub = Hub::start().await;
    for (agent, key) in [("crawler", "seen"), ("crawler", "queue/1"), ("writer", "seen")] {
        let path = format!("/api/v1/state/{agent}/{}", key.replace('/', "%2F"));
        let (status, v) = hub.call("PUT", &path, Some(json!({"value": {"of": agent}}))).await;
        assert_eq!(
            (status, v["agent_id"].as_str(), v["key"].as_str(), v["value"]["of"].as_str()),
            (200, Some(agent), Some(key), Some(agent))
        );
        assert_eq!(hub.get(&path).await, v);
    }
    hub.crash_and_restart().await;
    let list = async |query: &str| {
        let page = hub.get(&format!("/api/v1/state{query}")).await;
        page["items"].as_array().unwrap().iter().map(|e| format!("{}/{}", text(e, "agent_id"), text(e, "key"))).collect::<Vec<_>>()
    };
    assert_eq!(list("").await, ["writer/seen", "crawler/queue/1", "crawler/seen"]);
    assert_eq!(list("?agent_id=crawler").await, ["crawler/queue/1", "crawler/seen"]);
    assert_eq!(list("?key=seen").await, ["writer/seen", "crawler/seen"], "exactly that key");
    assert_eq!(list("?key=see").await, Vec::<String>::new());
    assert_eq!(list("?agent_id=writer&key=queue/1").await, Vec::<String>::new());
    assert_eq!(hub.call("DELETE", "/api/v1/state/crawler/seen", None).await.0, 204);
    assert_eq!(list("?agent_id=crawler").await, ["crawler/queue/1"]);

    let (_, waiting) = hub.call("POST", "/api/v1/dispatch", Some(json!({"echo": {"payload": "x"}}))).await;
    let stats = hub.get("/api/v1/system/stats").await;
    assert_eq!(stats["pool"]["waiting"], 1, "{stats}");
    assert_eq!(stats["nodes"]["by_status"], json!({"online": 0, "offline": 0, "draining": 0, "revoked": 0}), "{stats}");
    assert_eq!(hub.call("POST", &format!("/api/v1/tasks/{}/cancel", text(&waiting, "id")), None).await.0, 202);
    let stats = until("the count to be of now", async || {
        let stats = hub.get("/api/v1/system/stats").await;
        (stats["tasks"]["by_state"]["cancelled"] == 1).then_some(stats)
    })
    .await;
    let states = ["pending", "awaiting_approval", "assigned", "running", "succeeded", "failed", "cancelled"];
    let counts: Vec<_> = states.iter().map(|s| stats["tasks"]["by_state"][s].as_u64().unwrap()).collect();
    assert_eq!(counts, [0, 0, 0, 0, 0, 0, 1], "{stats}");
    assert_eq!((&stats["pool"]["waiting"], &stats["storage"]["limit_bytes"]), (&json!(0), &json!(40_u64 << 30)), "{stats}");
    assert!(stats["storage"]["database_bytes"].as_u64().unwrap() > 4096, "{stats}");
    assert!(stats["pool"]["per_second"].is_number() && stats["pool"]["oldest_secs"].is_u64(), "{stats}");
    let sample = &stats["history"].as_array().unwrap()[0];
    for key in ["at", "waiting", "oldest_secs", "per_second", "running", "nodes_online", "database_bytes", "output_bytes"] {
        assert!(sample.get(key).is_some(), "{key}: {sample}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_line() {
    let hub = Hub::start().await;
    hub.cli_login();
    let run = |args: &[&str]| hub.cli().args(args).output().unwrap();
    let json = |args: &[&str]| {
        let out = run(&[args, &["--output", "json"]].concat());
        assert!(out.status.success(), "{}", shown(&out));
        serde_json::from_slice::<Value>(&out.stdout).unwrap()
    };
    json(&["session", "new", "one"]);
    let v = json(&["session", "set", "one", "--name", "two", "--ttl", "77"]);
    assert_eq!(v["name"], "two");
    assert_eq!(run(&["session", "set", "two"]).status.code(), Some(2), "nothing to set");
    let out = run(&["session", "purge", "two"]);
    assert_eq!(out.status.code(), Some(1), "{}", shown(&out));
    assert!(String::from_utf8_lossy(&out.stderr).contains("close it first"), "{}", shown(&out));
    json(&["session", "close", "two"]);
    let v = json(&["session", "purge", "two"]);
    assert!(v["purged_at"].is_string(), "{v}");
}

//! The audit log through the doors: each call that changes something leaves one entry, in its own commit.
#![expect(clippy::disallowed_methods, reason = "tests start the real binaries")]

use mesh_tests::{Hub, Node, PASSWORD, program, shown, text};
use rusqlite::Connection;
use serde_json::{Value, json};
use std::process::Command;

const GHOST: &str = "0198c0de-0000-7000-8000-000000000000";

async fn entries(hub: &Hub, query: &str) -> Vec<Value> {
    hub.get(&format!("/api/v1/audit?limit=500{query}")).await["items"].as_array().unwrap().clone()
}

async fn with_id(hub: &Hub, method: &str, path: &str, body: &Value, id: &str) -> u16 {
    let mut r = hub.request(method, path).header("X-Request-Id", id);
    if !body.is_null() {
        r = r.json(body);
    }
    let (status, _) = mesh_tests::checked(method, path, r.send().await.unwrap()).await;
    status
}

/// What each call that may change something is called in the log, and a body that the door lets through.
/// A call that is not here, or leaves no entry, fails the test.
fn mutating() -> Vec<(&'static str, &'static str, &'static str, Value)> {
    let none = Value::Null;
    vec![
        ("POST", "/auth/login", "auth.login", json!({"username": "admin", "password": "this one is wrong"})),
        ("POST", "/auth/refresh", "auth.refresh", json!({"refresh_token": "cmr_unknown"})),
        ("POST", "/auth/password", "password.change", json!({"current_password": "this one is wrong", "new_password": "another password"})),
        ("POST", "/api-keys", "key.create", json!({"name": "k", "scopes": ["tasks:read"]})),
        ("DELETE", "/api-keys/{id}", "key.remove", none.clone()),
        ("POST", "/auth/accept", "user.accept", json!({"token": "cmi_unknown", "password": "a long enough password"})),
        ("POST", "/users", "user.create", json!({"username": "n", "role": "guest"})),
        ("PATCH", "/users/{id}", "user.change", json!({"role": "viewer"})),
        ("DELETE", "/users/{id}", "user.remove", none.clone()),
        ("POST", "/grants", "grant.create", json!({"subject": "guest", "resource": "an-agent", "permissions": ["agents:read"]})),
        ("DELETE", "/grants/{id}", "grant.remove", none.clone()),
        ("PATCH", "/devices/{id}", "device.change", json!({"trusted": true})),
        ("DELETE", "/devices/{id}", "device.remove", none.clone()),
        ("POST", "/nodes/invites", "invite.create", json!({"name": "n"})),
        ("DELETE", "/nodes/invites/{id}", "invite.revoke", none.clone()),
        ("PATCH", "/nodes/{id}", "node.change", json!({"name": "other"})),
        ("DELETE", "/nodes/{id}", "node.remove", none.clone()),
        ("POST", "/nodes/{id}/drain", "node.drain", none.clone()),
        ("POST", "/nodes/{id}/resume", "node.resume", none.clone()),
        ("POST", "/nodes/{id}/revoke", "node.revoke", none.clone()),
        ("POST", "/sessions", "session.create", json!({"name": "s"})),
        ("PATCH", "/sessions/{id}", "session.change", json!({"name": "t"})),
        ("DELETE", "/sessions/{id}", "session.close", none.clone()),
        ("POST", "/sessions/{id}/purge", "session.purge", none.clone()),
        ("PUT", "/sessions/{id}/nodes/{node_id}", "session.attach", none.clone()),
        ("DELETE", "/sessions/{id}/nodes/{node_id}", "session.detach", none.clone()),
        ("PUT", "/sessions/{id}/memory/{key}", "memory.put", json!({"value": 1})),
        ("DELETE", "/sessions/{id}/memory/{key}", "memory.remove", none.clone()),
        ("POST", "/sessions/{id}/messages", "message.post", json!({"role": "user", "content": "hello"})),
        ("POST", "/sessions/{id}/dispatch", "task.dispatch", json!({"echo": {"payload": "x"}})),
        ("POST", "/agents", "agent.spawn", json!({"name": "a", "agent_type": "basic"})),
        ("POST", "/agents/{id}/kill", "agent.kill", json!({"force": true})),
        ("PUT", "/state/{agent_id}/{key}", "state.put", json!({"value": 1})),
        ("DELETE", "/state/{agent_id}/{key}", "state.remove", none.clone()),
        ("POST", "/dispatch", "task.dispatch", json!({"echo": {"payload": "x"}})),
        ("POST", "/tasks/{id}/cancel", "task.cancel", none.clone()),
        ("POST", "/tasks/{id}/input", "task.input", json!({"seq": 1, "data_base64": "eA=="})),
        ("POST", "/system/ca/rotate", "ca.rotate", json!({"step": "abort"})),
        // Last: it ends the log-in that all of this is done with.
        ("POST", "/auth/logout", "auth.logout", none),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn every_call_that_may_change_something_leaves_one_entry() {
    let hub = Hub::start().await;
    let table = mutating();
    let doc = hub.get("/openapi.json").await;
    for (path, item) in doc["paths"].as_object().unwrap() {
        for method in item.as_object().unwrap().keys().map(|m| m.to_uppercase()).filter(|m| m != "GET" && m != "HEAD") {
            // Their calls are those of REST, each with an entry of its own.
            let Some(below) = path.strip_prefix("/api/v1") else {
                assert!(["/", "/rpc"].contains(&path.as_str()), "{method} {path} has no row here: what are its audit entries?");
                continue;
            };
            assert!(
                table.iter().any(|(m, p, ..)| *m == method && *p == below),
                "{method} {below} has no row here: what is its audit entry?"
            );
        }
    }
    let (_, key) = hub.call("POST", "/api/v1/api-keys", Some(json!({"name": "reader", "scopes": ["system:audit"]}))).await;
    for (n, (method, path, _, body)) in table.iter().enumerate() {
        let prefix = match path.split('/').nth(1).unwrap() {
            "api-keys" => "key",
            "sessions" => "sess",
            "tasks" => "task",
            "agents" => "agent",
            "users" => "user",
            "grants" => "grant",
            "devices" => "dev",
            _ if path.contains("invites") => "inv",
            _ => "node",
        };
        let path = path.replace("{id}", &format!("{prefix}_{GHOST}")).replace("{node_id}", &format!("node_{GHOST}"));
        let path = path.replace("{key}", "k").replace("{agent_id}", "a");
        let status = with_id(&hub, method, &format!("/api/v1{path}"), body, &format!("call-{n}")).await;
        assert!(![400, 405, 415, 501].contains(&status), "{method} {path} did not get past the door: {status}");
    }
    // By a key: the log-in is gone.
    let url = format!("{}/api/v1/audit?limit=500", hub.http);
    let web = reqwest::Client::builder().no_proxy().build().unwrap();
    let page: Value = web.get(url).bearer_auth(text(&key, "secret")).send().await.unwrap().json().await.unwrap();
    for (n, (method, path, action, _)) in table.iter().enumerate() {
        let of_call: Vec<&Value> = page["items"].as_array().unwrap().iter().filter(|e| e["request_id"] == format!("call-{n}")).collect();
        let actions: Vec<&str> = of_call.iter().map(|e| e["action"].as_str().unwrap()).collect();
        assert_eq!(actions, [*action], "{method} {path}");
        assert_eq!((&of_call[0]["address"], &of_call[0]["actor"]["door"]), (&json!("127.0.0.1"), &json!("rest")), "{method} {path}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_entry_says_who_what_where_and_how_it_ended() {
    let hub = Hub::start().await;
    let node = Node::join(&hub, "büro").await;
    let (_, key) = hub.call("POST", "/api/v1/api-keys", Some(json!({"name": "ci", "scopes": ["tasks:*", "sessions:*", "nodes:*"]}))).await;
    let secret = text(&key, "secret");
    let web = reqwest::Client::builder().no_proxy().build().unwrap();
    let by_key = async |method: &str, path: &str, body: Value| {
        let r = web.request(method.parse().unwrap(), format!("{}/api/v1{path}", hub.http)).bearer_auth(&secret).json(&body);
        let answer = r.send().await.unwrap();
        let status = answer.status().as_u16();
        (status, answer.json::<Value>().await.unwrap_or_default())
    };
    let (_, session) = by_key("POST", "/sessions", json!({"name": "büro"})).await;
    let sid = text(&session, "id");
    assert_eq!(by_key("PUT", &format!("/sessions/{sid}/nodes/{}", node.id), json!({})).await.0, 200);
    let argv = json!({"shell": {"argv": ["echo", "an-argument-that-is-nobodys-business"]}, "wait_secs": 30});
    let (_, task) = by_key("POST", &format!("/sessions/{sid}/dispatch"), argv).await;
    let (status, _) = by_key("GET", "/audit", Value::Null).await;
    assert_eq!(status, 403, "a key that does not name system:audit reads none of it");

    let found = entries(&hub, &format!("&resource={}", text(&task, "id"))).await;
    let [dispatch] = found.as_slice() else { panic!("{found:?}") };
    let me = hub.get("/api/v1/auth/me").await;
    let actor = json!({"user_id": me["user"]["id"], "username": "admin", "key_id": key["id"], "agent": null, "door": "rest"});
    assert_eq!(dispatch["actor"], actor, "user, key and task: the whole chain");
    assert_eq!(
        (&dispatch["type"], &dispatch["outcome"], &dispatch["session_id"]),
        (&json!("task_lifecycle"), &json!("ok"), &session["id"])
    );
    assert_eq!(dispatch["detail"]["skill"], "shell");
    assert_eq!(dispatch["detail"]["spec"].as_str().unwrap().len(), 64, "the digest of what was asked");

    let actions = |list: &[Value]| list.iter().map(|e| text(e, "action")).collect::<Vec<_>>();
    assert_eq!(actions(&entries(&hub, &format!("&session={sid}")).await)[1..], ["task.dispatch", "session.attach", "session.create"]);
    let of = hub.get(&format!("/api/v1/audit/sessions/{sid}?type=task_lifecycle")).await;
    assert_eq!(actions(of["items"].as_array().unwrap()), ["task.dispatch"]);
    let user = text(&me["user"], "id");
    let of = hub.get(&format!("/api/v1/audit/users/{user}?type=authentication")).await;
    assert_eq!(actions(of["items"].as_array().unwrap()), ["auth.login"]);
    let joined = entries(&hub, &format!("&resource={}&door=node", node.id)).await;
    assert_eq!((actions(&joined), &joined[0]["detail"]["name"]), (vec!["node.enrol".to_owned()], &json!("büro")));
    let read = &entries(&hub, "&outcome=denied").await[0];
    assert_eq!(
        (&read["type"], &read["action"], &read["actor"]["key_id"]),
        (&json!("authorization_denied"), &json!("audit.read"), &key["id"])
    );
    let readings = entries(&hub, "&type=system_changed").await;
    assert!(actions(&readings).iter().filter(|a| *a == "audit.read").count() >= 6, "each reading is one");

    // Lists go on where they ended, and only with their own filters.
    let first = hub.get("/api/v1/audit?limit=2&door=rest").await;
    let cursor = text(&first, "next_cursor");
    let second = hub.get(&format!("/api/v1/audit?limit=2&door=rest&cursor={cursor}")).await;
    assert!(second["items"][0]["id"].as_str() < first["items"][1]["id"].as_str());
    for bad in
        [format!("cursor={cursor}"), "type=x".into(), "outcome=x".into(), "user=x".into(), "since=x".into(), "limit=0".into(), "x=1".into()]
    {
        assert_eq!(hub.call("GET", &format!("/api/v1/audit?{bad}"), None).await.0, 400, "{bad}");
    }
    assert_eq!(hub.call("GET", "/api/v1/audit/users/x", None).await.0, 404);

    // What is no id is in no row, and secrets are nowhere.
    let export = hub.request("GET", "/api/v1/audit/export").send().await.unwrap().text().await.unwrap();
    for secret in ["nobodys-business", PASSWORD, &secret] {
        assert!(!export.contains(secret), "{secret}");
    }

    // The command line shows the same.
    hub.cli_login();
    let out = hub.cli().args(["audit", "ls", "--type", "node_lifecycle"]).output().unwrap();
    assert!(out.status.success() && String::from_utf8_lossy(&out.stdout).contains("node.enrol"), "{}", shown(&out));
    let out = hub.cli().args(["audit", "verify"]).output().unwrap();
    assert!(out.status.success() && String::from_utf8_lossy(&out.stdout).contains("good"), "{}", shown(&out));
    let file = hub.dir.path().join("cli.jsonl");
    let out = hub.cli().args(["audit", "export"]).arg(&file).output().unwrap();
    assert!(out.status.success(), "{}", shown(&out));
    let out = Command::new(program("cortex-hub")).args(["audit", "verify"]).arg(&file).output().unwrap();
    assert!(out.status.success(), "{}", shown(&out));
    let out = hub.cli().args(["audit", "export"]).arg(&file).output().unwrap();
    assert_eq!(out.status.code(), Some(1), "never over a file");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_refused_calls_is_bounded_and_counted() {
    let hub = Hub::start().await;
    let (_, key) = hub.call("POST", "/api/v1/api-keys", Some(json!({"name": "k", "scopes": ["tasks:read"]}))).await;
    let web = reqwest::Client::builder().no_proxy().build().unwrap();
    for _ in 0..300 {
        let r = web.post(format!("{}/api/v1/sessions", hub.http)).bearer_auth(text(&key, "secret")).json(&json!({"name": "s"}));
        assert_eq!(r.send().await.unwrap().status(), 403);
    }
    let denied = entries(&hub, "&outcome=denied").await;
    // The clock may have passed two minutes on a slow machine.
    assert!((60..300).contains(&denied.len()), "{}", denied.len());
    assert_eq!((&denied[0]["type"], &denied[0]["action"]), (&json!("authorization_denied"), &json!("session.create")));
    assert_eq!((&denied[0]["actor"]["key_id"], &denied[0]["detail"]["permission"]), (&key["id"], &json!("sessions:write")));
}

/// What was done and what is in the log are one commit: without the one there is not the other.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_done_that_cannot_be_logged() {
    let mut hub = Hub::start().await;
    let (_, session) = hub.call("POST", "/api/v1/sessions", Some(json!({"name": "before"}))).await;
    let db = Connection::open(hub.data().join("hub.db")).unwrap();
    db.busy_timeout(std::time::Duration::from_secs(40)).unwrap();
    db.execute_batch("ALTER TABLE audit RENAME TO elsewhere").unwrap();
    let (status, problem) = hub.call("POST", "/api/v1/sessions", Some(json!({"name": "during"}))).await;
    assert_eq!(status, 503, "{problem}");
    let (status, _) = hub.call("POST", "/api/v1/dispatch", Some(json!({"echo": {"payload": "x"}}))).await;
    assert_eq!(status, 503);
    db.execute_batch("ALTER TABLE elsewhere RENAME TO audit").unwrap();
    let names: Vec<String> = hub.get("/api/v1/sessions").await["items"].as_array().unwrap().iter().map(|s| text(s, "name")).collect();
    assert_eq!(names, ["before"]);
    assert_eq!(hub.get("/api/v1/tasks").await["items"], json!([]));
    assert_eq!(hub.get("/api/v1/audit/verify").await["ok"], true, "the chain goes on where it was");

    // Killed at any time: whatever was answered is in the log, and the chain goes on.
    for n in 0..20 {
        hub.call("PUT", &format!("/api/v1/sessions/{}/memory/k{n}", text(&session, "id")), Some(json!({"value": n}))).await;
    }
    hub.crash_and_restart().await;
    let written = entries(&hub, "&type=file_changed").await;
    assert_eq!(written.len(), 20);
    let report = hub.get("/api/v1/audit/verify").await;
    assert_eq!((&report["ok"], report["heads"].as_array().unwrap().len()), (&json!(true), 1), "{report}");
    assert!(report["rows"].as_u64().unwrap() >= 24);

    // A purge takes the details of its session along, and the chain still verifies.
    let sid = text(&session, "id");
    assert_eq!(hub.call("DELETE", &format!("/api/v1/sessions/{sid}"), None).await.0, 204);
    assert_eq!(hub.call("POST", &format!("/api/v1/sessions/{sid}/purge"), None).await.0, 200);
    let erased = entries(&hub, &format!("&session={sid}&type=file_changed")).await;
    assert!(erased.len() == 20 && erased.iter().all(|e| e["detail"].is_null() && e["actor"]["username"] == "admin"), "{}", erased[0]);
    assert_eq!(hub.get("/api/v1/audit/verify").await["ok"], true);
    assert_eq!(hub.process.terminate().await.code(), Some(0));
    hub.restart().await;
    let report = hub.get("/api/v1/audit/verify").await;
    assert!(report["heads"][0]["signed_seq"].as_u64().unwrap() > 24, "a stop signs: {report}");
}

/// Two hubs on one database: each has a chain of its own, and either checks both.
#[tokio::test(flavor = "multi_thread")]
async fn two_hubs_have_two_chains() {
    let server = tokio::task::spawn_blocking(hub_testkit::postgres::Server::start).await.unwrap();
    let url = server.database();
    let one = Hub::start_with(&[("CORTEX_DATABASE_URL", &url)], &[]).await;
    let data = one.dir.path().join("second");
    let keys = data.join("keys");
    std::fs::create_dir_all(&keys).unwrap();
    for file in std::fs::read_dir(one.data().join("keys")).unwrap() {
        let file = file.unwrap();
        std::fs::copy(file.path(), keys.join(file.file_name())).unwrap();
    }
    let two = Hub::start_in(data, &[("CORTEX_DATABASE_URL", &url)], &[]).await;
    for n in 0..10 {
        let make = |hub: &Hub| hub.request("POST", "/api/v1/sessions").json(&json!({"name": format!("s{n}")})).send();
        let (a, b) = futures::future::join(make(&one), make(&two)).await;
        assert!(a.unwrap().status() == 201 && b.unwrap().status() == 201);
    }
    for hub in [&one, &two] {
        let report = hub.get("/api/v1/audit/verify").await;
        assert_eq!((&report["ok"], report["heads"].as_array().unwrap().len()), (&json!(true), 2), "{report}");
    }
    let made = entries(&one, "&type=session_lifecycle").await;
    assert_eq!(made.len(), 20);
    let mut chains: Vec<&str> = made.iter().map(|e| e["chain"].as_str().unwrap()).collect();
    chains.sort_unstable();
    chains.dedup();
    assert_eq!(chains.len(), 2);

    // The database itself refuses to change what was written.
    let told = tokio::task::spawn_blocking(move || {
        [
            "UPDATE audit SET action = 'x'",
            "DELETE FROM audit",
            "TRUNCATE audit",
            "UPDATE audit SET detail = '\\x00'",
            "TRUNCATE audit_checkpoints",
        ]
        .map(|statement| Command::new("psql").arg(&url).args(["-c", statement]).output().unwrap())
    });
    for out in told.await.unwrap() {
        assert!(String::from_utf8_lossy(&out.stderr).contains("append-only"), "{}", shown(&out));
    }
    assert_eq!(one.get("/api/v1/audit/verify").await["ok"], true);
}

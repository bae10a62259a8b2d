//! What people do to a machine, with real programs: rename, label, bound, drain, resume, revoke, remove.

use mesh_tests::{Hub, Node, alive, shown, text, until};
use serde_json::{Value, json};
use std::path::PathBuf;

async fn problem(hub: &Hub, method: &str, path: &str, body: Option<Value>) -> (u16, String) {
    let (status, v) = hub.call(method, path, body).await;
    (status, v["code"].as_str().unwrap_or_default().to_owned())
}

async fn start(hub: &Hub, node: &Node, session: Option<&str>, script: &str) -> String {
    let path = session.map_or("/api/v1/dispatch".to_owned(), |s| format!("/api/v1/sessions/{s}/dispatch"));
    let body = json!({"node": node.id, "shell": {"argv": ["sh", "-c", script]}});
    let (status, t) = hub.call("POST", &path, Some(body)).await;
    assert_eq!(status, 202, "{t}");
    text(&t, "id")
}

fn names(list: &Value) -> Vec<&str> {
    list["items"].as_array().unwrap().iter().map(|n| n["name"].as_str().unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_is_renamed_labelled_and_bounded() {
    let hub = Hub::start().await;
    let (a, b) = (Node::join(&hub, "a").await, Node::join(&hub, "b").await);
    let path = format!("/api/v1/nodes/{}", a.id);
    let patch = async |body: Value| hub.call("PATCH", &path, Some(body)).await;

    let (status, n) = patch(json!({"name": "attic", "labels": {"room": "attic", "gpu": "a100"}, "slots": {"gpu": 2}})).await;
    assert_eq!((status, &n["name"], &n["slots"]), (200, &json!("attic"), &json!({"gpu": 2})), "{n}");
    assert_eq!(n["settings"], json!({"labels": {"room": "attic", "gpu": "a100"}, "slots": {"gpu": 2}, "max_tasks": null}));
    assert_eq!((&n["labels"]["os"], &n["labels"]["room"]), (&json!("linux"), &json!("attic")), "what selectors see");
    assert_eq!(hub.get(&path).await["labels"], n["labels"]);

    for (select, want) in [
        ("gpu", vec!["attic"]),
        ("os=linux,gpu=a100", vec!["attic"]),
        ("os=linux", vec!["b", "attic"]),
        ("", vec!["b", "attic"]),
        ("room=cellar", vec![]),
        ("os=plan9", vec![]),
    ] {
        let list = hub.get(&format!("/api/v1/nodes?select={select}")).await;
        assert_eq!((names(&list), &list["next_cursor"]), (want, &Value::Null), "{select}");
    }
    let first = hub.get("/api/v1/nodes?select=os=linux&limit=1").await;
    let cursor = text(&first, "next_cursor");
    // The order of the terms is no other list; other terms are.
    let second = hub.get(&format!("/api/v1/nodes?select=os=linux&limit=1&cursor={cursor}")).await;
    assert_eq!((names(&first), names(&second), &second["next_cursor"]), (vec!["b"], vec!["attic"], &Value::Null));
    assert_eq!(problem(&hub, "GET", &format!("/api/v1/nodes?select=gpu&cursor={cursor}"), None).await, (400, "bad_cursor".into()));
    assert_eq!(problem(&hub, "GET", &format!("/api/v1/nodes?cursor={cursor}"), None).await, (400, "bad_cursor".into()));

    // Labels go as a whole, slots and the bound go back.
    let (_, n) = patch(json!({"labels": {}, "slots": {}, "max_tasks": 1})).await;
    assert_eq!((&n["settings"], &n["max_tasks"]), (&json!({"labels": {}, "slots": {}, "max_tasks": 1}), &json!(1)));
    assert_eq!(n["slots"], json!({}));
    let running = start(&hub, &a, None, "while ! [ -e stop ]; do sleep 0.1; done").await;
    hub.task_when(&running, "to run", |t| t["state"] == "running").await;
    let n = hub.get(&path).await;
    assert_eq!((&n["schedulable"], &n["status"]), (&json!({"ok": false, "reason": "busy"}), &json!("online")));
    let waiting = start(&hub, &a, None, "echo went").await;
    assert_eq!(hub.task(&waiting).await["waiting"]["code"], "no_slot");
    // Raising the bound lets it go.
    let (_, n) = patch(json!({"max_tasks": 0, "slots": null})).await;
    assert_eq!(n["settings"], json!({"labels": {}, "slots": null, "max_tasks": null}));
    if n["max_tasks"].as_u64() > Some(1) {
        assert_eq!(hub.finished(&waiting).await["stdout"], "went\n");
    }
    hub.call("POST", &format!("/api/v1/tasks/{running}/cancel"), None).await;
    hub.finished(&running).await;

    for (body, want) in [
        (json!({"os": "x"}), (400, "bad_field")),
        (json!({"name": null}), (400, "bad_field")),
        (json!({"labels": null}), (400, "bad_field")),
        (json!({"labels": {"a": 1}}), (400, "bad_field")),
        (json!({"slots": {"gpu": -1}}), (400, "bad_field")),
        (json!({"max_tasks": "many"}), (400, "bad_field")),
        (json!({}), (422, "nothing_to_change")),
        (json!({"name": ""}), (422, "bad_name")),
        (json!({"name": "a\u{202e}"}), (422, "bad_name")),
        (json!({"labels": {"os": "plan9"}}), (422, "bad_label")),
        (json!({"labels": {"hostname": "x"}}), (422, "bad_label")),
        (json!({"slots": {"gpu": 1025}}), (422, "bad_slots")),
        (json!({"max_tasks": 1025}), (422, "bad_max_tasks")),
        (json!({"policy": {"mode": "strict"}}), (422, "not_yet")),
        (json!({"policy": null}), (422, "not_yet")),
    ] {
        let (status, said) = problem(&hub, "PATCH", &path, Some(body.clone())).await;
        assert_eq!((status, said.as_str()), want, "{body}");
    }
    let ghost = "/api/v1/nodes/node_0198c0de-0000-7000-8000-000000000000";
    for (method, end) in [("PATCH", ""), ("DELETE", ""), ("POST", "/drain"), ("POST", "/resume"), ("POST", "/revoke")] {
        let body = (method == "PATCH").then(|| json!({"name": "x"}));
        assert_eq!(problem(&hub, method, &format!("{ghost}{end}"), body).await, (404, "not_found".into()), "{method} {end}");
    }
    for select in ["a=", ",", "a,a=1", "=x"] {
        assert_eq!(problem(&hub, "GET", &format!("/api/v1/nodes?select={select}"), None).await, (400, "bad_selector".into()), "{select}");
    }
    // A key that may only read manages nothing.
    let (_, key) = hub.call("POST", "/api/v1/api-keys", Some(json!({"name": "r", "scopes": ["nodes:read"]}))).await;
    let web = reqwest::Client::builder().no_proxy().build().unwrap();
    let by_key = web.post(format!("{}{path}/drain", hub.http)).bearer_auth(text(&key, "secret")).send().await.unwrap();
    assert_eq!(by_key.status(), 403);

    let status = until("samples", async || {
        let s = hub.get(&format!("{path}/status")).await;
        s["history"].as_array().is_some_and(|h| !h.is_empty()).then_some(s)
    })
    .await;
    let sample = &status["history"][0];
    assert!(sample["at"].is_string() && sample["memory_used_bytes"].as_u64() > Some(0), "{status}");
    drop(b);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drained_machine_ends_what_it_has_and_takes_nothing_new() {
    let mut hub = Hub::start().await;
    hub.cli_login();
    let node = Node::join(&hub, "n").await;
    let flag = node.dir.path().join("go");
    let path = format!("/api/v1/nodes/{}", node.id);
    let script = format!("while ! [ -e {} ]; do sleep 0.1; done; echo done", flag.display());
    let running = start(&hub, &node, None, &script).await;
    hub.task_when(&running, "to run", |t| t["state"] == "running").await;

    let (status, n) = hub.call("POST", &format!("{path}/drain"), None).await;
    assert_eq!((status, &n["status"], &n["schedulable"]), (200, &json!("draining"), &json!({"ok": false, "reason": "draining"})));
    assert_eq!(hub.call("POST", &format!("{path}/drain"), None).await.0, 200, "again is the same");
    let waiting = start(&hub, &node, None, "echo later").await;
    let t = hub.task(&waiting).await;
    assert_eq!((&t["state"], &t["waiting"]["code"]), (&json!("pending"), &json!("no_candidate")), "{t}");
    assert!(t["waiting"]["detail"].as_str().unwrap().contains("draining"), "{t}");

    // The hub forgets it as little as the node forgets its task.
    hub.crash_and_restart().await;
    until("the node back and draining", async || (hub.get(&path).await["status"] == "draining").then_some(())).await;
    std::fs::write(&flag, "").unwrap();
    assert_eq!(hub.finished(&running).await["stdout"], "done\n");
    assert_eq!(hub.task(&waiting).await["state"], "pending");

    let out = hub.cli().args(["node", "resume", "n"]).output().unwrap();
    assert!(out.status.success(), "{}", shown(&out));
    assert_eq!(hub.finished(&waiting).await["stdout"], "later\n");
    let n = hub.get(&path).await;
    assert_eq!((&n["status"], &n["draining"]), (&json!("online"), &json!(false)));
}

/// Folders below the node's workspaces that hold a file of this name.
fn kept(node: &Node, name: &str) -> Vec<PathBuf> {
    let mut folders = vec![node.dir.path().join("workspaces")];
    let mut found = vec![];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).into_iter().flatten().flatten() {
            match entry.file_type().is_ok_and(|t| t.is_dir()) {
                true => folders.push(entry.path()),
                false if entry.file_name() == name => found.push(entry.path()),
                false => {}
            }
        }
    }
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_is_revoked_under_its_running_task() {
    for remove in [false, true] {
        let hub = Hub::start().await;
        hub.cli_login();
        let mut node = Node::join(&hub, "n").await;
        let path = format!("/api/v1/nodes/{}", node.id);
        let (_, s) = hub.call("POST", "/api/v1/sessions", Some(json!({"name": "s"}))).await;
        let session = text(&s, "id");
        assert_eq!(hub.call("PUT", &format!("/api/v1/sessions/{session}/nodes/{}", node.id), None).await.0, 200);
        let mark = format!("mark-{}-{remove}", node.id);
        let script = format!("echo mine > work; (exec -a {mark} sleep 600) & sleep 600; echo {mark}");
        let body = json!({"node": node.id, "shell": {"argv": ["bash", "-c", script]}});
        let (_, t) = hub.call("POST", &format!("/api/v1/sessions/{session}/dispatch"), Some(body)).await;
        let task = text(&t, "id");
        until("the command to work", async || (!kept(&node, "work").is_empty()).then_some(())).await;

        let out = match remove {
            false => hub.cli().args(["node", "revoke", "n"]).output().unwrap(),
            true => hub.cli().args(["node", "rm", "n", "--yes"]).output().unwrap(),
        };
        assert!(out.status.success(), "{}", shown(&out));
        let t = hub.task(&task).await;
        assert_eq!((&t["state"], &t["reason"]["code"]), (&json!("failed"), &json!("node_revoked")), "at once: {t}");
        assert_eq!(node.daemon().ended().await.code(), Some(3));
        assert!(node.daemon().log().contains("this node was revoked by its hub"), "{}", node.daemon().log());
        until("its processes to be gone", async || alive(&mark).is_empty().then_some(())).await;
        assert_eq!(kept(&node, "work").len(), 1, "the workspace stays");
        let said = String::from_utf8_lossy(&node.command(&["status"]).output().unwrap().stdout).into_owned();
        assert!(said.contains("link         revoked"), "{said}");

        // Again and again: the same end, and the same word.
        let again = node.command(&["run"]).output().unwrap();
        assert_eq!(again.status.code(), Some(3), "{}", shown(&again));
        assert!(shown(&again).contains("was revoked by its hub") && shown(&again).contains("fresh invite"), "{}", shown(&again));

        let t = hub.task(&task).await;
        assert_eq!(t["reason"]["code"], "node_revoked", "late words change nothing");
        let history = hub.get(&format!("/api/v1/tasks/{task}/events")).await;
        assert_eq!(history["items"].as_array().unwrap().last().unwrap()["type"], "node_revoked");
        let session = hub.get(&format!("/api/v1/sessions/{session}")).await;
        if remove {
            assert_eq!(problem(&hub, "GET", &path, None).await, (404, "not_found".into()));
            assert_eq!(problem(&hub, "DELETE", &path, None).await, (404, "not_found".into()));
            assert_eq!(session["attached_node_ids"], json!([]));
            assert_eq!(
                hub.get(&format!("/api/v1/tasks?node={}", node.id)).await["items"][0]["id"],
                task.as_str(),
                "its tasks stay to be read"
            );
        } else {
            let n = hub.get(&path).await;
            assert_eq!((&n["status"], &n["schedulable"]["reason"]), (&json!("revoked"), &json!("revoked")));
            assert!(n["revoked_at"].is_string());
            assert_eq!(hub.call("POST", &format!("{path}/revoke"), None).await.0, 200, "again is the same");
            for (method, end, body) in [("POST", "/drain", None), ("POST", "/resume", None), ("PATCH", "", Some(json!({"name": "x"})))] {
                assert_eq!(problem(&hub, method, &format!("{path}{end}"), body).await, (409, "node_revoked".into()), "{method} {end}");
            }
            let echo = json!({"node": node.id, "echo": {"payload": "x"}});
            assert_eq!(problem(&hub, "POST", "/api/v1/dispatch", Some(echo)).await, (409, "node_revoked".into()));
            assert_eq!(hub.call("DELETE", &path, None).await.0, 204);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn revoked_while_its_daemon_is_stopped() {
    for remove in [false, true] {
        let mut hub = Hub::start().await;
        let mut node = Node::join(&hub, "n").await;
        let task = start(&hub, &node, None, "sleep 600").await;
        hub.task_when(&task, "to run", |t| t["state"] == "running").await;
        // The daemon goes, its task runs on below the warden.
        node.daemon().terminate().await;
        node.offline(&hub).await;
        assert_eq!(hub.task(&task).await["waiting"]["code"], "in_doubt");
        let path = format!("/api/v1/nodes/{}", node.id);
        let status = match remove {
            false => hub.call("POST", &format!("{path}/revoke"), None).await.0,
            true => hub.call("DELETE", &path, None).await.0,
        };
        assert_eq!(status, if remove { 204 } else { 200 });
        assert_eq!(hub.task(&task).await["reason"]["code"], "node_revoked");
        hub.crash_and_restart().await;
        assert_eq!(hub.task(&task).await["reason"]["code"], "node_revoked");
        // It hears it at its next word, and ends what ran on.
        node.run();
        assert_eq!(node.daemon().ended().await.code(), Some(3));
        until("the warden to be gone", async || alive(&node.data().display().to_string()).is_empty().then_some(())).await;
        // Without a hub as well: it was said for good.
        hub.process.kill9();
        let again = node.command(&["run"]).output().unwrap();
        assert_eq!(again.status.code(), Some(3), "{}", shown(&again));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_line_manages_machines() {
    let hub = Hub::start().await;
    hub.cli_login();
    let node = Node::join(&hub, "box").await;
    let run = |args: &[&str]| {
        let out = hub.cli().args(args).output().unwrap();
        (out.status.code(), String::from_utf8_lossy(&out.stdout).into_owned(), shown(&out))
    };
    let path = format!("/api/v1/nodes/{}", node.id);
    let settings = async || hub.get(&path).await["settings"].clone();
    assert_eq!(run(&["node", "set", "box"]).0, Some(2), "nothing to change");
    let (code, _, all) = run(&["node", "set", "box", "--label", "room=attic", "--label", "gpu=a", "--slot", "gpu=2", "--max-tasks", "3"]);
    assert_eq!(code, Some(0), "{all}");
    assert_eq!(settings().await, json!({"labels": {"room": "attic", "gpu": "a"}, "slots": {"gpu": 2}, "max_tasks": 3}));
    assert_eq!(
        run(&["node", "set", "box", "--label", "room=hall", "--no-label", "gpu", "--slot", "seat=1", "--max-tasks", "0"]).0,
        Some(0)
    );
    assert_eq!(settings().await, json!({"labels": {"room": "hall"}, "slots": {"gpu": 2, "seat": 1}, "max_tasks": null}));
    assert_eq!(run(&["node", "set", "box", "--default-slots", "--name", "crate"]).0, Some(0));
    assert_eq!(settings().await["slots"], Value::Null);
    let (code, _, all) = run(&["node", "set", "crate", "--label", "os=plan9"]);
    assert!(code == Some(1) && all.contains("the hub sets the label"), "{all}");
    assert_eq!(run(&["node", "set", "crate", "--no-label", "nothing"]).0, Some(1));

    let (_, list, _) = run(&["node", "ls", "--select", "room=hall,os=linux"]);
    assert!(list.contains("crate"), "{list}");
    assert!(!run(&["node", "ls", "--select", "room=attic"]).1.contains("crate"));
    assert_eq!(run(&["node", "ls", "--select", "a="]).0, Some(1));
    let (_, all, _) = run(&["node", "show", "crate"]);
    assert!(all.contains("labels by the hub") && all.contains("room=hall"), "{all}");
    let (code, top, all) = run(&["node", "top"]);
    assert!(code == Some(0) && top.contains("ROUND TRIP") && top.contains("crate") && !top.contains('\u{1b}'), "{all}");
    let (_, top, _) = run(&["--output", "json", "node", "top"]);
    assert_eq!(serde_json::from_str::<Value>(&top).unwrap()["items"][0]["status"]["status"], "online");

    let (code, _, all) = run(&["node", "drain", "crate"]);
    assert!(code == Some(0) && all.contains("draining; nothing runs there"), "{all}");
    assert!(run(&["node", "ls"]).1.contains("draining"));
    assert_eq!(run(&["node", "resume", "crate"]).0, Some(0));
    // Nobody says yes: nothing is removed.
    let (code, _, all) = run(&["node", "rm", "crate"]);
    assert!(code == Some(1) && all.contains("[y/N]") && all.contains("nothing was removed"), "{all}");
    assert_eq!(hub.get(&path).await["status"], "online");
    assert_eq!(run(&["node", "rm", "ghost", "--yes"]).0, Some(1));
    assert_eq!(run(&["node", "rm", "crate", "--yes"]).0, Some(0));
    assert_eq!(problem(&hub, "GET", &path, None).await.0, 404);
}

//! One command on many machines: one result, whatever becomes of some of them. Real programs.

use mesh_tests::{Hub, Node, Process, shown, signal, text, until};
use rustix::process::Signal;
use serde_json::{Value, json};
use std::path::Path;
use std::process::Output;

/// Machines `a`, `b` and `c`.
async fn machines(hub: &Hub) -> [Node; 3] {
    [Node::join(hub, "a").await, Node::join(hub, "b").await, Node::join(hub, "c").await]
}

/// A script that does on each machine what is its own: a workspace lies in its machine's folder.
fn each(nodes: &[Node], scripts: [&str; 3]) -> Value {
    let cases: String = nodes.iter().zip(scripts).map(|(n, script)| format!("{}/*) {script};; ", n.dir.path().display())).collect();
    json!(["sh", "-c", format!("case \"$(pwd -P)\" in {cases}*) echo \"where is $(pwd -P)\"; exit 99;; esac")])
}
fn waits_for(gate: &Path) -> String {
    format!("while [ ! -e {} ]; do sleep 0.05; done", gate.display())
}
async fn all(hub: &Hub, argv: Value, more: Value) -> Value {
    let mut body = json!({"all": true, "shell": {"argv": argv}});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    hub.dispatch(body).await
}
async fn children(hub: &Hub, parent: &str) -> Vec<Value> {
    let page = hub.get(&format!("/api/v1/tasks?parent={parent}")).await;
    let mut items = page["items"].as_array().unwrap().clone();
    items.sort_by_key(|t| text(t, "node_id"));
    items
}
async fn child(hub: &Hub, parent: &str, node: &Node) -> Value {
    children(hub, parent).await.into_iter().find(|t| t["node_id"] == node.id.as_str()).expect("a child on this node")
}
#[track_caller]
fn came_to(t: &Value, state: &str, reason: Value, exit: Value, by_state: Value) {
    let total = by_state.as_object().unwrap().values().map(|n| n.as_u64().unwrap()).sum::<u64>();
    let found = (&t["state"], &t["reason"]["code"], &t["exit_code"], &t["children"]);
    assert_eq!(found, (&json!(state), &reason, &exit, &json!({"total": total, "by_state": by_state})), "{t}");
}

#[tokio::test(flavor = "multi_thread")]
async fn many_machines_come_to_one_result() {
    let mut hub = Hub::start().await;
    let mut nodes = machines(&hub).await;

    // All do well; the parent's is the answer.
    let select = json!({"select": {"labels": {"os": "linux"}}, "wait_secs": 20});
    let t = all(&hub, each(&nodes, ["echo from a", "echo from b", "echo from c"]), select).await;
    let parent = text(&t, "id");
    let t = hub.finished(&parent).await;
    came_to(&t, "succeeded", json!(null), json!(0), json!({"succeeded": 3}));
    assert_eq!((&t["node_id"], &t["parent_id"], t["select"].is_object()), (&json!(null), &json!(null), true));
    let found = children(&hub, &parent).await;
    assert!(found.len() == 3 && found.iter().all(|c| c["parent_id"] == parent.as_str() && c["children"].is_null()), "{found:?}");
    for (node, says) in nodes.iter().zip(["from a\n", "from b\n", "from c\n"]) {
        let id = text(&child(&hub, &parent, node).await, "id");
        assert_eq!(hub.output(&id, "").await, says.as_bytes());
    }
    assert_eq!(hub.output(&parent, "?follow=true").await, b"", "its children have the output");
    let (status, refused) = hub.call("POST", &format!("/api/v1/tasks/{parent}/input"), Some(json!({"seq": 1, "eof": true}))).await;
    assert_eq!((status, &refused["code"]), (409, &json!("no_input")));
    let body = json!({"all": true, "echo": {"payload": "x"}, "select": {"labels": {"zone": "moon"}}});
    let (status, refused) = hub.call("POST", "/api/v1/dispatch", Some(body)).await;
    assert_eq!((status, &refused["code"]), (409, &json!("no_node")), "{refused}");
    let t = hub.dispatch(json!({"all": true, "echo": {"payload": "x"}, "wait_secs": 20})).await;
    came_to(&hub.finished(&text(&t, "id")).await, "succeeded", json!(null), json!(null), json!({"succeeded": 3}));
    let stats = hub.get("/api/v1/system/stats").await;
    assert_eq!(stats["tasks"]["by_state"]["running"].as_u64().unwrap_or(0), 0, "{stats}");

    // The highest exit code, whoever comes first.
    let t = all(&hub, each(&nodes, ["exit 3", "exit 5", "true"]), json!({})).await;
    let t = hub.finished(&text(&t, "id")).await;
    came_to(&t, "failed", json!("exit"), json!(5), json!({"failed": 2, "succeeded": 1}));

    // The owner of one machine allows nothing of it.
    let file = nodes[1].dir.path().join("next.yaml");
    std::fs::write(&file, "mode: permissive\nnetwork: full\nscripts: true\ndeny:\n  - program: sh\n").unwrap();
    let set = nodes[1].command(&["policy", "set", file.to_str().unwrap()]).output().unwrap();
    assert!(set.status.success(), "{}", shown(&set));
    let t = all(&hub, each(&nodes, ["true", "true", "true"]), json!({})).await;
    let t = hub.finished(&text(&t, "id")).await;
    came_to(&t, "failed", json!("policy_denied"), json!(null), json!({"failed": 1, "succeeded": 2}));
    std::fs::write(&file, "mode: permissive\nnetwork: full\nscripts: true\n").unwrap();
    let set = nodes[1].command(&["policy", "set", file.to_str().unwrap()]).output().unwrap();
    assert!(set.status.success(), "{}", shown(&set));

    // One is quick, one is slow, one dies; and so does the hub, in the middle.
    let gate = hub.dir.path().join("gate");
    let never = hub.dir.path().join("never");
    let scripts = ["true", &waits_for(&gate), &waits_for(&never)];
    let t = all(&hub, each(&nodes, scripts), json!({"on_lost": "fail"})).await;
    let parent = text(&t, "id");
    let by_state = |t: &Value| t["children"]["by_state"].clone();
    hub.task_when(&parent, "to have one that ended and two that run", |t| by_state(t) == json!({"succeeded": 1, "running": 2})).await;
    let warden = nodes[2].warden().unwrap();
    nodes[2].daemon().kill9();
    signal(warden, Signal::KILL);
    hub.crash_and_restart().await;
    // Its new warden says that the task is lost.
    nodes[2].run();
    let t = hub.task_when(&parent, "to have lost one", |t| by_state(t)["failed"] == 1).await;
    assert_eq!(t["state"], "running", "{t}");
    let lost = child(&hub, &parent, &nodes[2]).await;
    assert_eq!((&lost["state"], &lost["reason"]["code"]), (&json!("failed"), &json!("lost")), "{lost}");
    std::fs::write(&gate, "").unwrap();
    let t = hub.finished(&parent).await;
    came_to(&t, "failed", json!("lost"), json!(null), json!({"failed": 1, "succeeded": 2}));
    let events = hub.get(&format!("/api/v1/tasks/{parent}/events")).await;
    let kinds: Vec<&str> = events["items"].as_array().unwrap().iter().map(|e| e["type"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["accepted", "children_ended"]);
}

fn cortex(hub: &Hub, args: &[&str]) -> Output {
    hub.cli().args(args).output().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_line_shows_them_together() {
    let hub = Hub::start().await;
    let nodes = machines(&hub).await;
    hub.cli_login();
    let script = |argv: &Value| argv[2].as_str().unwrap().to_owned();
    let argv = each(&nodes, ["echo one; echo two", "printf no-end; exit 4", "echo oops >&2; exit 3"]);
    let run = |more: &[&str], argv: &Value| -> Output {
        let script = script(argv);
        cortex(&hub, &[&["run", "--all"], more, &["--", "sh", "-c", &script]].concat())
    };
    let out = run(&["--select", "os=linux"], &argv);
    assert_eq!(out.status.code(), Some(4), "the highest: {}", shown(&out));
    let said = String::from_utf8(out.stdout.clone()).unwrap();
    let mut lines: Vec<&str> = said.lines().collect();
    lines.sort_unstable();
    assert_eq!(lines, ["a | one", "a | two", "b | no-end"], "{}", shown(&out));
    let noted = String::from_utf8(out.stderr.clone()).unwrap();
    for line in ["c | oops", "cortex: b: failed (exit 4)", "cortex: c: failed (exit 3)", "cortex: 1 of 3 succeeded"] {
        assert!(noted.lines().any(|l| l == line), "{line}: {}", shown(&out));
    }

    let out = run(&["--output", "json"], &argv);
    assert_eq!(out.status.code(), Some(4), "{}", shown(&out));
    let document: Value = serde_json::from_slice(&out.stdout).unwrap();
    came_to(&document["parent"], "failed", json!("exit"), json!(4), json!({"failed": 2, "succeeded": 1}));
    let texts: Vec<&str> = document["children"].as_array().unwrap().iter().map(|c| c["stdout"].as_str().unwrap()).collect();
    assert_eq!(texts, ["one\ntwo\n", "no-end", ""], "by the names of their machines");
    let parent = text(&document["parent"], "id");
    let out = cortex(&hub, &["task", "ls", "--parent", &parent, "--output", "json"]);
    let listed: Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(listed["items"].as_array().unwrap().len(), 3, "{}", shown(&out));
    let out = cortex(&hub, &["task", "show", &parent]);
    assert!(String::from_utf8_lossy(&out.stdout).contains("3: failed=2 succeeded=1"), "{}", shown(&out));

    let out = run(&["--select", "zone=moon"], &argv);
    assert!(out.status.code() == Some(125) && shown(&out).contains("no node is online"), "{}", shown(&out));
    let out = run(&["--node", "a"], &argv);
    assert_eq!(out.status.code(), Some(2), "{}", shown(&out));

    // Ctrl-C ends it everywhere.
    let never = waits_for(&hub.dir.path().join("never"));
    let argv = each(&nodes, [&never, &never, "true"]);
    let mut c = hub.cli();
    c.args(["run", "--all", "--", "sh", "-c", &script(&argv)]);
    let mut following = Process::start(&mut c, hub.dir.path().join("follow.log"));
    let parent = until("a fan-out that runs on two", async || {
        let page = hub.get("/api/v1/tasks?state=running").await;
        let found = page["items"].as_array()?.iter().find(|t| t["children"]["by_state"] == json!({"running": 2, "succeeded": 1}))?.clone();
        Some(text(&found, "id"))
    })
    .await;
    following.signal(Signal::INT);
    assert_eq!(following.ended().await.code(), Some(130), "{}", following.log());
    let t = hub.finished(&parent).await;
    came_to(&t, "cancelled", json!("cancelled_by_user"), json!(null), json!({"cancelled": 2, "succeeded": 1}));
}

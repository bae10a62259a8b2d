//! What a machine's owner says and no hub exceeds: the ceiling, and `disable`. Real programs; the hub asks
//! for more each time.

use mesh_tests::{Hub, Node, Process, shown, text, until};
use serde_json::{Value, json};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::process::Output;

/// A machine that runs as many as four tasks at a time.
async fn machine(hub: &Hub) -> Node {
    let (_, yaml) = hub.invite(json!({"name": "box"})).await;
    let mut node = Node::prepare("box", &yaml);
    let out = call(&node, &["join", "invite.yaml", "--enroll-only"]);
    assert!(out.status.success(), "{}", shown(&out));
    start(hub, &mut node).await;
    node
}
async fn start(hub: &Hub, node: &mut Node) {
    let mut run = node.command(&["run"]);
    run.env("CORTEX_NODE_MAX_TASKS", "4");
    node.process = Some(Process::start(&mut run, node.dir.path().join("node.log")));
    node.online(hub).await;
}
fn call(node: &Node, args: &[&str]) -> Output {
    node.command(args).output().unwrap()
}
fn ok(node: &Node, args: &[&str]) -> String {
    let out = call(node, args);
    assert!(out.status.success(), "{args:?}: {}", shown(&out));
    String::from_utf8(out.stdout).unwrap()
}
/// Puts a ceiling in place as its owner does.
fn set(node: &Node, yaml: &str) {
    let file = node.dir.path().join("next.yaml");
    std::fs::write(&file, yaml).unwrap();
    ok(node, &["policy", "set", file.to_str().unwrap()]);
}
/// Dispatches to this machine and waits for the end.
async fn end(hub: &Hub, node: &Node, mut body: Value) -> Value {
    body["node"] = json!(node.id);
    hub.finished(&text(&hub.dispatch(body).await, "id")).await
}
async fn run(hub: &Hub, node: &Node, argv: &[&str]) -> Value {
    end(hub, node, json!({"shell": {"argv": argv}})).await
}
#[track_caller]
fn succeeded(task: &Value) {
    assert_eq!(task["state"], "succeeded", "{task}");
}
/// Denied, with nothing run, by the rule that its detail begins with.
#[track_caller]
fn denied(task: &Value, rule: &str) {
    assert_eq!((&task["state"], &task["reason"]["code"]), (&json!("failed"), &json!("policy_denied")), "{task}");
    assert!(text(&task["reason"], "detail").starts_with(rule), "{rule}: {task}");
    assert_eq!((&task["started_at"], &task["attempt"]), (&Value::Null, &json!(1)), "{task}");
}
fn record(node: &Node) -> Vec<Value> {
    ok(node, &["log", "--output", "json"]).lines().map(|l| serde_json::from_str(l).unwrap()).collect()
}
async fn schedulable(hub: &Hub, node: &Node, what: &str, want: Value) {
    let path = format!("/api/v1/nodes/{}", node.id);
    until(what, async || (hub.get(&path).await["schedulable"] == want).then_some(())).await;
    let status = hub.get(&format!("{path}/status")).await;
    assert_eq!((&status["schedulable"], &status["status"]), (&want, &json!("online")));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_join_makes_a_ceiling_and_only_a_good_one_takes_its_place() {
    let hub = Hub::start().await;
    let (_, yaml) = hub.invite(json!({"name": "box"})).await;
    let node = Node::prepare("box", &yaml);
    let missing = call(&node, &["policy", "show"]);
    assert_eq!(missing.status.code(), Some(1), "{}", shown(&missing));
    for args in [&["disable"][..], &["enable"], &["policy", "set", "invite.yaml"]] {
        assert_eq!(call(&node, args).status.code(), Some(1), "a folder that is not there is none: {args:?}");
    }
    let said = ok(&node, &["join", "invite.yaml", "--enroll-only"]);
    let file = node.data().join("ceiling.yaml");
    assert!(said.contains("full network") && said.contains(file.to_str().unwrap()), "{said}");
    assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    let made = std::fs::read_to_string(&file).unwrap();
    assert_eq!(ok(&node, &["policy", "show"]), made);
    let show = || serde_json::from_str::<Value>(&ok(&node, &["policy", "show", "--output", "json"])).unwrap();
    let json = show();
    assert_eq!((&json["source"], &json["disabled"]), (&json!("file"), &json!(false)));
    assert_eq!(json["ceiling"], json!({"mode": "permissive", "network": "full", "scripts": true}));

    for (bad, why) in [
        ("mode: strict", "mode: not yet"),
        ("network: proxy", "network: not yet"),
        ("limits: { memory_bytes: 1 }", "limits.memory_bytes: not yet"),
        ("scipts: false", "scipts: unknown key"),
        ("deny: [", "(yaml)"),
        ("allow: [{ program: ../bin/sh }]", "allow[0].program"),
        ("deny: [{ program: rm, match: [[ls]] }]", "does not hit its example"),
        ("users: [alice]", "is not a user's id"),
    ] {
        std::fs::write(node.dir.path().join("bad.yaml"), bad).unwrap();
        let out = call(&node, &["policy", "set", "bad.yaml"]);
        assert_eq!(out.status.code(), Some(2), "{bad}: {}", shown(&out));
        assert!(String::from_utf8_lossy(&out.stderr).contains(why), "{bad}: {}", shown(&out));
    }
    assert_eq!(call(&node, &["policy", "set", "nothing.yaml"]).status.code(), Some(2));
    assert_eq!(std::fs::read_to_string(&file).unwrap(), made, "what is refused changes nothing");
    set(&node, "scripts: false\n");
    assert_eq!(show()["ceiling"], json!({"scripts": false}));
    std::fs::remove_file(&file).unwrap();
    assert_eq!(ok(&node, &["policy", "show"]), made, "without a file the same holds");
    assert_eq!(show()["source"], "default");
    std::fs::write(&file, "nonsense").unwrap();
    assert_eq!(call(&node, &["policy", "show"]).status.code(), Some(2));
}

#[tokio::test(flavor = "multi_thread")]
async fn programs_are_bounded_by_what_would_be_executed() {
    let hub = Hub::start().await;
    let node = machine(&hub).await;
    let dir = node.dir.path();
    // Names that lead to a denied file, where any task could reach them.
    let names = mesh_tests::folder();
    std::fs::set_permissions(names.path(), PermissionsExt::from_mode(0o755)).unwrap();
    let at = |name: &str| names.path().join(name).display().to_string();
    symlink("/bin/rm", at("innocent")).unwrap();
    symlink("/bin", at("bin")).unwrap();
    std::fs::write(at("one"), "#!/bin/sh\necho \"$@\"\n").unwrap();
    std::fs::set_permissions(at("one"), PermissionsExt::from_mode(0o755)).unwrap();
    symlink("one", at("yes-name")).unwrap();
    symlink("one", at("no-name")).unwrap();
    std::fs::write(dir.join("kept"), "").unwrap();
    let kept = dir.join("kept").display().to_string();
    let up = "../".repeat(40);

    set(&node, "deny: [{ program: rm, args_prefix: [-f], match: [[/bin/rm, -f, x]], not_match: [[rm, x]] }]\n");
    let rule = "ceiling: deny[0] {program: \"rm\", args_prefix: [\"-f\"]}";
    for called in ["rm", "/bin/rm", "/usr/../bin/rm", &at("innocent"), &at("bin/rm"), &format!("/{up}bin/rm")] {
        denied(&run(&hub, &node, &[called, "-f", &kept]).await, rule);
    }
    assert!(dir.join("kept").exists());
    succeeded(&run(&hub, &node, &["echo", "rm", "-f"]).await);
    // The task's own PATH leads nobody past the rule.
    let evil = json!({"shell": {"argv": ["innocent", "-f", kept], "env": {"PATH": names.path()}}});
    assert_eq!(end(&hub, &node, evil).await["reason"]["code"], "not_found");
    let plain = json!({"shell": {"argv": ["rm", "-f", kept], "env": {"PATH": names.path()}}});
    denied(&end(&hub, &node, plain).await, rule);
    // A name in the task's own workspace.
    let (_, s) = hub.call("POST", "/api/v1/sessions", Some(json!({"name": "work"}))).await;
    let session = format!("/api/v1/sessions/{}", text(&s, "id"));
    assert!(hub.call("PUT", &format!("{session}/nodes/{}", node.id), Some(json!({}))).await.0 < 300);
    let in_session = async |argv: &[&str]| {
        let (status, t) = hub.call("POST", &format!("{session}/dispatch"), Some(json!({"shell": {"argv": argv}}))).await;
        assert_eq!(status, 202, "{t}");
        hub.finished(&text(&t, "id")).await
    };
    succeeded(&in_session(&["ln", "-s", "/bin/rm", "here"]).await);
    denied(&in_session(&["./here", "-f", &kept]).await, rule);
    succeeded(&in_session(&["ln", "-s", "/bin/sh", "there"]).await);
    assert_eq!(in_session(&["./there", "-c", "echo hi"]).await["stdout"], "hi\n");

    // Of one file with many names only the one that is named; not by way of folders or links of a task.
    set(&node, &format!("allow: [{{ program: id }}, {{ program: {} }}]\ndeny: [{{ program: id, args_prefix: [-g] }}]\n", at("yes-name")));
    succeeded(&run(&hub, &node, &["id", "-u"]).await);
    succeeded(&run(&hub, &node, &["/bin/id"]).await);
    assert_eq!(run(&hub, &node, &[&at("yes-name"), "hi"]).await["stdout"], "hi\n");
    denied(&run(&hub, &node, &["id", "-g"]).await, "ceiling: deny[0]");
    for argv in
        [&["./ls"][..], &["../bin/sh", "-c", "id"], &[&format!("{up}bin/sh")], &["/bin/ls"], &["gone"], &[&at("no-name")], &[&at("one")]]
    {
        denied(&run(&hub, &node, argv).await, "ceiling: allow: no rule names");
    }
    denied(&end(&hub, &node, json!({"shell": {"command": "id"}})).await, "ceiling: allow: no rule names \"");

    set(&node, "scripts: false\n");
    denied(&end(&hub, &node, json!({"shell": {"command": "echo hi"}})).await, "ceiling: scripts: false");
    succeeded(&run(&hub, &node, &["echo", "hi"]).await);

    let record = record(&node);
    let refused: Vec<_> = record.iter().filter(|r| r["end"].as_str().is_some_and(|e| e.starts_with("refused: ceiling: "))).collect();
    assert_eq!(refused.len(), 18, "each is in the machine's own record: {record:?}");
    assert_eq!((&refused[0]["argv"], &refused[0]["end"]), (&json!(["rm", "-f", kept]), &json!(format!("refused: {rule}"))));
    assert_eq!(refused[17]["argv"], json!(["/bin/sh", "-c", "echo hi"]));
    assert!(text(refused[0], "user").starts_with("user_"));
}

#[tokio::test(flavor = "multi_thread")]
async fn users_and_time_outs_are_bounded_from_the_next_task_on() {
    let hub = Hub::start().await;
    let node = machine(&hub).await;
    let me = text(&hub.get("/api/v1/auth/me").await["user"], "id");
    let gate = node.dir.path().join("gate");
    let wait = json!({"node": node.id, "shell": {"argv": ["sh", "-c", format!("while [ ! -e {} ]; do sleep 0.05; done", gate.display())]}});
    let running = text(&hub.dispatch(wait).await, "id");
    hub.task_when(&running, "to run", |t| t["state"] == "running").await;

    set(&node, "users: [user_01980000-0000-7000-8000-000000000001]\nlimits: { timeout_secs: 30 }\n");
    let echo = json!({"echo": {"payload": "hi"}});
    let within = |secs: u64| json!({"shell": {"argv": ["true"]}, "timeout_secs": secs});
    let other = format!("ceiling: users: {me} is not named");
    denied(&end(&hub, &node, within(5)).await, &other);
    denied(&end(&hub, &node, echo.clone()).await, &other);
    // More than travels inside an order.
    denied(&end(&hub, &node, json!({"shell": {"argv": ["cat"], "stdin": "x".repeat(100_000)}})).await, &other);

    set(&node, &format!("users: [{me}]\nlimits: {{ timeout_secs: 30 }}\n"));
    succeeded(&end(&hub, &node, echo).await);
    succeeded(&end(&hub, &node, within(30)).await);
    denied(&end(&hub, &node, within(31)).await, "ceiling: limits.timeout_secs: 30, and the task has 31");
    denied(&end(&hub, &node, within(0)).await, "ceiling: limits.timeout_secs: 30, and the task has no time-out");
    set(&node, "users: []\n");
    denied(&end(&hub, &node, within(5)).await, &other);

    hub.cli_login();
    let out = hub.cli().args(["run", "--node", &node.id, "--", "true"]).output().unwrap();
    assert_eq!(out.status.code(), Some(126), "{}", shown(&out));
    assert_eq!(hub.task(&running).await["state"], "running", "what was begun goes on");
    std::fs::write(&gate, "").unwrap();
    succeeded(&hub.finished(&running).await);
    let refused = record(&node).iter().filter(|r| text(r, "end").starts_with("refused: ")).count();
    assert_eq!(refused, 7);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hub_gives_no_more_at_once_than_the_ceiling_lets_it() {
    let hub = Hub::start().await;
    let node = machine(&hub).await;
    let path = format!("/api/v1/nodes/{}", node.id);
    let shows = async |n: u32| until("the bound to be shown", async || (hub.get(&path).await["max_tasks"] == n).then_some(())).await;
    shows(4).await;
    set(&node, "max_tasks: 1\n");
    shows(1).await;
    let (status, n) = hub.call("PATCH", &path, Some(json!({"max_tasks": 100}))).await;
    assert_eq!((status, &n["max_tasks"]), (200, &json!(1)), "a hub raises nothing: {n}");
    let gate = node.dir.path().join("gate");
    let wait = format!("while [ ! -e {} ]; do sleep 0.05; done", gate.display());
    let mut ids = vec![];
    for _ in 0..3 {
        ids.push(text(&hub.dispatch(json!({"node": node.id, "shell": {"argv": ["sh", "-c", wait]}})).await, "id"));
    }
    let running = |t: &Value| t["state"] == "running";
    hub.task_when(&ids[0], "to run", running).await;
    schedulable(&hub, &node, "the node to be full", json!({"ok": false, "reason": "busy"})).await;
    assert_eq!(hub.task(&ids[1]).await["waiting"]["code"], "no_slot");
    // Its owner raises it, and one more goes while the first runs; lowered, nothing is ended.
    set(&node, "max_tasks: 2\n");
    hub.task_when(&ids[1], "to run beside it", running).await;
    assert_eq!((&hub.task(&ids[0]).await["state"], &hub.task(&ids[2]).await["started_at"]), (&json!("running"), &Value::Null));
    set(&node, "max_tasks: 1\n");
    shows(1).await;
    assert!(ok(&node, &["status"]).contains("of 1\n"));
    std::fs::write(&gate, "").unwrap();
    for id in &ids {
        succeeded(&hub.finished(id).await);
    }
    let starts = |r: &Vec<Value>| r.iter().filter(|r| r["end"] == "exit 0").count();
    assert_eq!(starts(&record(&node)), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disabled_node_takes_nothing_with_or_without_a_hub() {
    let mut hub = Hub::start().await;
    let mut node = machine(&hub).await;
    let gate = node.dir.path().join("gate");
    let wait = format!("while [ ! -e {} ]; do sleep 0.05; done", gate.display());
    let running = text(&hub.dispatch(json!({"node": node.id, "shell": {"argv": ["sh", "-c", wait]}})).await, "id");
    hub.task_when(&running, "to run", |t| t["state"] == "running").await;

    assert!(ok(&node, &["disable"]).starts_with("disabled: "));
    assert!(ok(&node, &["disable"]).starts_with("disabled already: "));
    let disabled = json!({"ok": false, "reason": "disabled"});
    schedulable(&hub, &node, "the node to be disabled", disabled.clone()).await;
    let status = |node: &Node| serde_json::from_str::<Value>(&ok(node, &["status", "--output", "json"])).unwrap();
    assert_eq!(status(&node)["unschedulable"], "disabled");
    let report: Value = serde_json::from_slice(&call(&node, &["doctor", "--output", "json"]).stdout).unwrap();
    let hop = report["checks"].as_array().unwrap().iter().find(|c| c["hop"] == "ceiling").unwrap().clone();
    assert_eq!(hop["verdict"], "warning", "{report}");
    let waiting = text(&hub.dispatch(json!({"node": node.id, "shell": {"argv": ["true"]}})).await, "id");
    assert_eq!(hub.task(&waiting).await["waiting"]["code"], "no_candidate");
    std::fs::write(&gate, "").unwrap();
    succeeded(&hub.finished(&running).await);

    // Over restarts of both, told with the hello.
    node.daemon().terminate().await;
    node.offline(&hub).await;
    assert_eq!(status(&node)["unschedulable"], "disabled");
    hub.crash_and_restart().await;
    start(&hub, &mut node).await;
    schedulable(&hub, &node, "the node to be disabled still", disabled.clone()).await;
    assert_eq!(hub.task(&waiting).await["state"], "pending");

    assert!(ok(&node, &["enable"]).starts_with("enabled: "));
    assert!(ok(&node, &["enable"]).starts_with("enabled already: "));
    succeeded(&hub.finished(&waiting).await);
    schedulable(&hub, &node, "the node to be open", json!({"ok": true, "reason": null})).await;

    // While no hub can be reached.
    hub.process.terminate().await;
    ok(&node, &["disable"]);
    until("the daemon to know", async || (status(&node)["unschedulable"] == "disabled").then_some(())).await;
    hub.crash_and_restart().await;
    schedulable(&hub, &node, "the next hub to know", disabled).await;
    let refused = record(&node).into_iter().filter(|r| text(r, "end").starts_with("refused")).collect::<Vec<_>>();
    assert!(refused.is_empty(), "a hub that is told asks for nothing: {refused:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ceiling_that_cannot_be_read_closes_the_node() {
    let hub = Hub::start().await;
    let mut node = machine(&hub).await;
    let file = node.data().join("ceiling.yaml");
    let closed = json!({"ok": false, "reason": "ceiling_unreadable"});
    let open = json!({"ok": true, "reason": null});
    for bad in ["max_taks: 1\n", "deny: [\n", "mode: strict\n", "deny: [{ program: rm, match: [[ls]] }]\n", ""] {
        std::fs::write(&file, bad).unwrap();
        schedulable(&hub, &node, "the node to be closed", closed.clone()).await;
        set(&node, "{}\n");
        schedulable(&hub, &node, "the node to be open", open.clone()).await;
    }
    std::fs::remove_file(&file).unwrap();
    std::fs::create_dir(&file).unwrap();
    schedulable(&hub, &node, "a folder to be no ceiling", closed.clone()).await;
    let waiting = text(&hub.dispatch(json!({"node": node.id, "shell": {"argv": ["true"]}})).await, "id");
    assert_eq!(hub.task(&waiting).await["waiting"]["code"], "no_candidate");
    assert!(ok(&node, &["status"]).contains("no: ceiling_unreadable"));
    let doctor = call(&node, &["doctor", "--output", "json"]);
    let report: Value = serde_json::from_slice(&doctor.stdout).unwrap();
    assert_eq!((doctor.status.code(), &report["failed"]), (Some(1), &json!("ceiling")), "{report}");
    assert!(ok(&node, &["enable"]).contains("ceiling_unreadable"), "to be enabled is not enough");
    node.daemon().terminate().await;
    node.offline(&hub).await;
    start(&hub, &mut node).await;
    schedulable(&hub, &node, "the next daemon to be closed", closed).await;
    assert_eq!(hub.task(&waiting).await["state"], "pending");
    std::fs::remove_dir(&file).unwrap();
    succeeded(&hub.finished(&waiting).await);
    schedulable(&hub, &node, "the default to hold", open).await;
}

#[test]
#[expect(clippy::disallowed_methods, reason = "a test starts the program it tests, as another user")]
fn a_file_that_its_user_may_not_read_is_no_missing_file() {
    use std::os::unix::process::CommandExt;
    let dir = mesh_tests::folder();
    let node = Node { process: None, id: String::new(), name: String::new(), dir };
    std::fs::create_dir(node.data()).unwrap();
    std::fs::set_permissions(node.data(), PermissionsExt::from_mode(0o755)).unwrap();
    let file = node.data().join("ceiling.yaml");
    std::fs::write(&file, "{}").unwrap();
    // As root everything can be read: somebody else looks.
    let program = node.dir.path().join("program");
    // By another process: what this one holds open for writing, its children would.
    assert!(std::process::Command::new("cp").arg(mesh_tests::program("cortex-node")).arg(&program).status().unwrap().success());
    let show = |mode: u32| {
        std::fs::set_permissions(&file, PermissionsExt::from_mode(mode)).unwrap();
        let mut c = node.command(&["policy", "show"]);
        let mut c = if rustix::process::geteuid().is_root() {
            let mut other = std::process::Command::new(&program);
            other.args(c.get_args()).uid(65534).gid(65534);
            other
        } else {
            c.current_dir("/");
            c
        };
        c.output().unwrap()
    };
    assert!(show(0o644).status.success());
    let out = show(0o000);
    assert_eq!(out.status.code(), Some(2), "{}", shown(&out));
    assert!(String::from_utf8_lossy(&out.stderr).contains("ermission denied"), "{}", shown(&out));
}

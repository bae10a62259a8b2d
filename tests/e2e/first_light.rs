//! The README's way, step by step, through the real programs.
#![expect(clippy::disallowed_methods, reason = "tests start the real binaries and watch the real clock")]

use mesh_tests::{Hub, Node, PASSWORD, program, shown, text, until};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

#[tokio::test(flavor = "multi_thread")]
async fn a_command_runs_on_an_attached_machine_as_the_readme_says() {
    let hub = Hub::start().await;
    hub.cli_login();
    let run = |args: &[&str]| hub.cli().args(args).output().unwrap();

    // Invite: a private file, never over another, and the line to paste.
    let out = run(&["node", "add", "laptop"]);
    assert!(out.status.success(), "{}", shown(&out));
    assert!(String::from_utf8_lossy(&out.stdout).contains("cortex-node join -"), "{}", shown(&out));
    assert!(String::from_utf8_lossy(&out.stdout).starts_with("# This address is loopback"), "{}", shown(&out));
    let yaml_path = hub.dir.path().join("laptop.yaml");
    assert_eq!(std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&yaml_path).unwrap().permissions()) & 0o777, 0o600);
    assert!(!run(&["node", "add", "laptop"]).status.success(), "an existing file is left alone");

    // Join: one line tells that the link is up; the secret is struck from the file.
    let yaml = std::fs::read_to_string(&yaml_path).unwrap();
    let mut node = Node::prepare("laptop", &yaml);
    let log = node.dir.path().join("node.log");
    node.process = Some(mesh_tests::Process::start(&mut node.command(&["join", "invite.yaml"]), log));
    node.online(&hub).await;
    until("the link line", async || node.daemon().log().contains("link up: node laptop").then_some(())).await;
    assert!(!std::fs::read_to_string(node.dir.path().join("invite.yaml")).unwrap().contains("secret:"));

    // Look.
    let ls = run(&["node", "ls"]);
    assert!(String::from_utf8_lossy(&ls.stdout).contains("online"), "{}", shown(&ls));
    let shown_node: Value = serde_json::from_slice(&run(&["--output", "json", "node", "show", "laptop"]).stdout).unwrap();
    assert_eq!(shown_node["capabilities"]["os"], "linux");
    assert!(shown_node["capabilities"]["cpu_cores"].as_u64().unwrap() > 0);
    assert!(shown_node["capabilities"]["memory_bytes"].as_u64().unwrap() > 1 << 20);

    // Session, attach, run: three lines, each after the one before was read here, and exit code 7.
    for args in [&["session", "new", "demo"][..], &["session", "attach", "demo", "laptop"]] {
        let out = run(args);
        assert!(out.status.success(), "{}", shown(&out));
    }
    let read = hub.dir.path().join("read");
    let script = format!("for i in 1 2 3; do echo $i; until [ -e {}$i ]; do sleep 0.05; done; done; exit 7", read.display());
    let mut child = hub.cli().args(["run", "--session", "demo", "--", "sh", "-c", &script]).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = vec![];
    for line in BufReader::new(child.stdout.take().unwrap()).lines() {
        // It goes on only now: lines come as they are written, not at the end.
        let line = line.unwrap();
        std::fs::write(format!("{}{line}", read.display()), "").unwrap();
        lines.push(line);
    }
    assert_eq!(child.wait().unwrap().code(), Some(7));
    assert_eq!(lines, ["1", "2", "3"]);

    // The journal remembers it; logs bring it back.
    let tasks = hub.get("/api/v1/tasks?state=failed").await;
    let id = text(&tasks["items"][0], "id");
    assert!(tasks["items"][0].get("stdout").is_none(), "lists leave the output out");
    let task = hub.task(&id).await;
    assert_eq!((task["exit_code"].as_i64(), task["reason"]["code"].as_str()), (Some(7), Some("exit")));
    assert_eq!(task["stdout"], "1\n2\n3\n");
    assert_eq!(task["attempt"], 1);
    assert!(task["signed"]["key_id"].is_string() && task["started_at"].is_string(), "{task}");
    let logs = run(&["task", "logs", &id]);
    assert_eq!(logs.stdout, b"1\n2\n3\n");
    let show = run(&["task", "show", &id]);
    assert!(String::from_utf8_lossy(&show.stdout).contains("failed"), "{}", shown(&show));
    let history = hub.get(&format!("/api/v1/tasks/{id}/events")).await;
    let kinds: Vec<&str> = history["items"].as_array().unwrap().iter().map(|e| e["type"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["accepted", "assigned", "started", "ended"]);

    // Cancel by hand.
    let detached = run(&["run", "--session", "demo", "--detach", "--", "sleep", "600"]);
    let id = String::from_utf8_lossy(&detached.stdout).trim().to_owned();
    hub.task_when(&id, "to run", |t| t["state"] == "running").await;
    assert!(run(&["task", "cancel", &id]).status.success());
    let task = hub.finished(&id).await;
    assert_eq!((task["state"].as_str(), task["reason"]["code"].as_str()), (Some("cancelled"), Some("cancelled_by_user")));

    // Ctrl-C on the node ends it cleanly, and the hub sees it at once.
    node.daemon().signal(rustix::process::Signal::INT);
    assert_eq!(node.daemon().ended().await.code(), Some(0));
    node.offline(&hub).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn exit_codes_of_run_say_what_happened() {
    let hub = Hub::start().await;
    hub.cli_login();
    let _node = Node::join(&hub, "n").await;
    let code = |args: &[&str]| {
        let out = hub.cli().arg("run").args(args).output().unwrap();
        (out.status.code(), shown(&out))
    };
    for (args, want) in [
        (&["--", "true"][..], 0),
        (&["--", "sh", "-c", "exit 42"], 42),
        (&["--script", "exit 3"], 3),
        (&["--", "sh", "-c", "kill -9 $$"], 137),
        (&["--timeout", "1", "--", "sleep", "60"], 124),
        (&["--", "no-such-program-anywhere"], 127),
        (&["--cwd", "no/such/folder", "--", "true"], 127),
        (&["--env", "LD_PRELOAD=/x.so", "--", "true"], 126),
        (&["--node", "nobody", "--", "true"], 125),
    ] {
        let (got, all) = code(args);
        assert_eq!(got, Some(want), "{args:?}: {all}");
    }
    let out = hub
        .cli()
        .args(["run", "--env", "GREETING=hi", "--", "sh", "-c", "echo $GREETING; echo err >&2; pwd; echo $HOME"])
        .output()
        .unwrap();
    assert!(String::from_utf8_lossy(&out.stdout).starts_with("hi\n"), "{}", shown(&out));
    assert_eq!(out.stderr, b"err\n");
    for words in [&["shell"][..], &["run", "--all", "--node", "n", "--", "true"]] {
        assert_eq!(hub.cli().args(words).output().unwrap().status.code(), Some(2), "{words:?}");
    }
}

/// The line to paste, as it is, in a shell: the binary is fetched and its digest checked, the invite
/// goes by standard input. Over an address that is not loopback, in a network of the test's own.
#[tokio::test(flavor = "multi_thread")]
async fn the_pasted_line_joins_over_a_non_loopback_address() {
    let dir = mesh_tests::folder();
    let script = format!(
        r#"set -eu
ip link set lo up
ip addr add 10.77.0.1/32 dev lo
cd {dir}
HUB={hub} CORTEX={cli}
export CORTEX_HTTP_ADDR=10.77.0.1:18080 CORTEX_NODE_ADDR=10.77.0.1:17443 CORTEX_METRICS_ADDR=127.0.0.1:0
export CORTEX_PUBLIC_URL=http://10.77.0.1:18080 CORTEX_ADMIN_PASSWORD='{PASSWORD}' CORTEX_CONFIG_DIR=$PWD/cli CORTEX_URL=http://10.77.0.1:18080
$HUB serve --data-dir hub --insecure-http >hub.log 2>&1 & HUB_PID=$!
trap 'kill $HUB_PID 2>/dev/null || true; wait' EXIT
for i in $(seq 400); do [ -e hub/hub.json ] && break; sleep 0.05; done
printf %s "$CORTEX_ADMIN_PASSWORD" | $CORTEX login --username admin --password-stdin
$CORTEX node add far >line.sh 2>/dev/null
if grep -q loopback line.sh; then echo "the line warns of loopback"; exit 9; fi
mkdir machine && cd machine
export CORTEX_NODE_DATA_DIR=$PWD/data CORTEX_NODE_WORKSPACE_ROOT=$PWD/work
PATH=/usr/bin:/bin sh ../line.sh >../node.log 2>&1 & NODE_PID=$!
trap 'PATH=/usr/bin:/bin ./cortex-node stop >/dev/null 2>&1 || true; kill $NODE_PID $HUB_PID 2>/dev/null || true; wait' EXIT
for i in $(seq 400); do $CORTEX node ls | grep -q online && break; sleep 0.05; done
cmp cortex-node {node}
$CORTEX run --node far -- echo over the network
"#,
        dir = dir.path().display(),
        hub = program("cortex-hub").display(),
        cli = program("cortex").display(),
        node = program("cortex-node").display(),
    );
    let out = tokio::task::spawn_blocking(move || Command::new("unshare").args(["--net", "sh", "-c", &script]).output())
        .await
        .unwrap()
        .expect("unshare (util-linux) is there");
    let log = |f: &str| std::fs::read_to_string(dir.path().join(f)).unwrap_or_default();
    assert!(out.status.success(), "{}\nhub: {}\nnode: {}", shown(&out), log("hub.log"), log("node.log"));
    assert!(String::from_utf8_lossy(&out.stdout).contains("over the network"), "{}", shown(&out));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_over_rest() {
    let hub = Hub::start().await;
    let node = Node::join(&hub, "rest").await;
    let (status, session) = hub.call("POST", "/api/v1/sessions", Some(json!({"name": "s"}))).await;
    assert_eq!(status, 201);
    let sid = text(&session, "id");
    let (status, attached) = hub.call("PUT", &format!("/api/v1/sessions/{sid}/nodes/{}", node.id), Some(json!({}))).await;
    assert_eq!((status, &attached["attached_node_ids"]), (200, &json!([node.id])));

    // A session's workspace is one place for its tasks, and no one else's.
    let body = |s: &str| json!({"shell": {"argv": ["sh", "-c", s]}, "wait_secs": 20});
    let (status, t) = hub.call("POST", &format!("/api/v1/sessions/{sid}/dispatch"), Some(body("echo kept > f; id -u"))).await;
    assert_eq!((status, t["state"].as_str()), (200, Some("succeeded")), "{t}");
    assert_ne!(t["stdout"], "0\n", "tasks never run as root");
    let (_, t) = hub.call("POST", &format!("/api/v1/sessions/{sid}/dispatch"), Some(body("cat f"))).await;
    assert_eq!(t["stdout"], "kept\n");
    let other = hub.sh("cat f").await;
    assert_eq!(other["state"], "failed", "a task without a session has a workspace of its own");

    // echo, with waiting
    let t = hub.dispatch(json!({"echo": {"payload": "ping"}, "wait_secs": 20})).await;
    assert_eq!((t["state"].as_str(), &t["result"]), (Some("succeeded"), &json!({"payload": "ping"})));

    // stdin, larger than an order carries inline: pulled by hash
    let big = "x".repeat(300_000);
    let t = hub.dispatch(json!({"shell": {"argv": ["wc", "-c"], "stdin": big}, "wait_secs": 20})).await;
    assert_eq!(t["stdout"].as_str().map(str::trim), Some("300000"), "{t}");

    // What the mesh can do, and what serves it.
    let skills = hub.get("/api/v1/skills").await;
    let names: Vec<_> = skills["items"].as_array().unwrap().iter().map(|s| (text(s, "name"), s["online"].as_u64())).collect();
    assert_eq!(names, [("echo".to_owned(), Some(1)), ("shell".to_owned(), Some(1))]);
    let info = hub.get("/api/v1/system/info").await;
    assert!(info["hub_id"].as_str().unwrap().starts_with("hub_") && info["uptime_secs"].is_u64(), "{info}");
    assert!(hub.get("/api/v1/system/stats").await["tasks"]["by_state"]["succeeded"].as_u64() >= Some(2));

    // Status, health and time to the node; downloads give the very binary.
    let path = format!("/api/v1/nodes/{}/status", node.id);
    until("a health sample and a round trip", async || {
        let s = hub.get(&path).await;
        (s["cpu_percent"].is_number() && s["memory"]["total_bytes"].as_u64()? > 0 && s["rtt_ms"].is_number()).then_some(())
    })
    .await;
    let downloads = hub.get("/api/v1/downloads").await;
    let target = text(&downloads["items"][0], "target");
    let bytes = hub.request("GET", &format!("/api/v1/downloads/{target}/cortex-node")).send().await.unwrap().bytes().await.unwrap();
    assert!(bytes == std::fs::read(program("cortex-node")).unwrap());

    // Closing a session ends its tasks.
    let (_, t) = hub.call("POST", &format!("/api/v1/sessions/{sid}/dispatch"), Some(json!({"shell": {"argv": ["sleep", "600"]}}))).await;
    let id = text(&t, "id");
    hub.task_when(&id, "to run", |t| t["state"] == "running").await;
    let (status, _) = hub.call("DELETE", &format!("/api/v1/sessions/{sid}"), None).await;
    assert_eq!(status, 204);
    let t = hub.finished(&id).await;
    assert_eq!((t["state"].as_str(), t["reason"]["code"].as_str()), (Some("cancelled"), Some("session_closed")));
    let (status, p) = hub.call("POST", &format!("/api/v1/sessions/{sid}/dispatch"), Some(body("true"))).await;
    assert_eq!((status, p["code"].as_str()), (409, Some("session_ended")));
}

/// The control socket: the hub's own uid is admin there, without a password.
#[tokio::test(flavor = "multi_thread")]
async fn the_control_socket_is_the_owners() {
    let hub = Hub::start().await;
    let out = Command::new("curl")
        .args(["-s", "--unix-socket"])
        .arg(hub.data().join("hub.sock"))
        .arg("http://hub/api/v1/auth/me")
        .output()
        .expect("curl is there");
    let me: Value = serde_json::from_slice(&out.stdout).unwrap_or_else(|_| panic!("{}", shown(&out)));
    assert_eq!((me["user"]["username"].as_str(), me["role"].as_str()), (Some("admin"), Some("admin")));
}

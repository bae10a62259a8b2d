//! Agents: one process, whatever dies around it; restarts, kills and logs.

use mesh_tests::{Hub, Node, alive, shown, text, until};
use serde_json::{Value, json};
use std::os::unix::fs::PermissionsExt;

async fn spawn(hub: &Hub, name: &str, config: Value) -> String {
    let (status, agent) = hub.call("POST", "/api/v1/agents", Some(json!({"name": name, "agent_type": "process", "config": config}))).await;
    assert_eq!(status, 201, "{agent}");
    text(&agent, "agent_id")
}
async fn kill(hub: &Hub, id: &str, force: bool) -> Value {
    let (status, agent) = hub.call("POST", &format!("/api/v1/agents/{id}/kill"), Some(json!({"force": force}))).await;
    assert_eq!(status, 202, "{agent}");
    agent
}
async fn when(hub: &Hub, id: &str, status: &str) -> Value {
    let path = format!("/api/v1/agents/{id}");
    until(&format!("the agent to be {status}"), async || Some(hub.get(&path).await).filter(|a| a["status"] == status)).await
}
async fn lines(hub: &Hub, id: &str) -> Vec<String> {
    let page = hub.get(&format!("/api/v1/agents/{id}/logs?limit=500")).await;
    page["logs"].as_array().unwrap().iter().map(|l| text(l, "line")).collect()
}
/// Tells the processes by what they wrote of themselves.
fn pids(file: &std::path::Path) -> Vec<String> {
    std::fs::read_to_string(file).unwrap().lines().map(str::to_owned).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn one_process_whatever_dies_around_it() {
    let mut hub = Hub::start().await;
    let mut node = Node::join(&hub, "n").await;
    let (file, gate) = (node.dir.path().join("pids"), node.dir.path().join("gate"));
    std::fs::write(&file, "").unwrap();
    std::fs::set_permissions(&file, PermissionsExt::from_mode(0o666)).unwrap();
    // Its first run ends by the gate; what comes after it only by a signal.
    let script = format!(
        "trap 'echo bye; exit 0' TERM; echo $$ >> {pids}; echo run $(wc -l < {pids}); while [ ! -e {gate} ]; do sleep 0.05; done; \
         [ $(wc -l < {pids}) = 1 ] && exit 3; while :; do sleep 0.05; done",
        pids = file.display(),
        gate = gate.display()
    );
    let config = json!({"node": "n", "argv": ["sh", "-c", script], "restart": {"policy": "on_failure", "max": 3, "backoff_ms": 50}});
    let id = spawn(&hub, "watcher", config.clone()).await;
    let taken = json!({"name": "watcher", "agent_type": "process", "config": config});
    assert_eq!(hub.call("POST", "/api/v1/agents", Some(taken)).await.0, 409, "one of a name lives");
    let first = when(&hub, &id, "running").await;
    until("its first word", async || lines(&hub, &id).await.contains(&"run 1".to_owned()).then_some(())).await;
    assert_eq!(hub.task(&text(&first, "task_id")).await["actor"]["agent"], json!(id), "a run says whose it is");

    node.daemon().kill9();
    node.offline(&hub).await;
    hub.crash_and_restart().await;
    node.run();
    node.online(&hub).await;
    hub.crash_and_restart().await;
    node.online(&hub).await;
    let same = when(&hub, &id, "running").await;
    assert_eq!((&same["task_id"], &same["restarts"]), (&first["task_id"], &json!(0)));
    assert_eq!((pids(&file).len(), alive(&file.display().to_string()).is_empty()), (1, false), "it is the one that there was");

    // It dies, and there is another one, once.
    std::fs::write(&gate, "").unwrap();
    until("its second run", async || lines(&hub, &id).await.contains(&"run 2".to_owned()).then_some(())).await;
    let second = when(&hub, &id, "running").await;
    assert_eq!((second["restarts"].as_u64(), second["task_id"] == first["task_id"]), (Some(1), false));
    assert_eq!(hub.task(&text(&first, "task_id")).await["exit_code"], json!(3));
    let log = lines(&hub, &id).await;
    let at = |line: &str| log.iter().position(|l| l.starts_with(line)).unwrap_or_else(|| panic!("{line} in {log:?}"));
    assert!(at("run 1") < at("run 1 ended: exit") && at("run 1 ended: exit") < at("run 2"), "{log:?}");

    // Its machine is away while it is killed: it ends when that is back, and is not begun again.
    node.daemon().kill9();
    node.offline(&hub).await;
    assert_eq!(kill(&hub, &id, false).await["status"], "stopping");
    hub.crash_and_restart().await;
    assert_eq!(hub.get(&format!("/api/v1/agents/{id}")).await["status"], "stopping", "nobody has said that it ended");
    node.run();
    let killed = when(&hub, &id, "killed").await;
    assert_eq!((&killed["task_id"], pids(&file).len()), (&second["task_id"], 2));
    assert_eq!(alive(&file.display().to_string()), Vec::<u32>::new());
    assert_eq!(lines(&hub, &id).await.iter().filter(|l| *l == "bye").count(), 1, "it had time to end by itself");
    assert_eq!(kill(&hub, &id, true).await, killed, "one that has ended stays as it is");
}

#[tokio::test(flavor = "multi_thread")]
async fn logs_kills_and_the_command_line() {
    let hub = Hub::start_with(&[("CORTEX_LIMITS_OUTPUT_BYTES", "100000")], &[]).await;
    let node = Node::join(&hub, "n").await;
    hub.cli_login();
    let cli = |args: &[&str]| {
        let out = hub.cli().args(args).output().expect("the CLI runs");
        assert!(out.status.success(), "{args:?}: {}", shown(&out));
        String::from_utf8_lossy(&out.stdout).into_owned()
    };

    // Far more than is kept, and its end.
    let made = cli(&["--output", "json", "agent", "spawn", "chatty", "--node", "n", "--", "sh", "-c", "seq 1 100000; echo oops >&2"]);
    let made: Value = serde_json::from_str(&made).unwrap();
    let id = text(&made, "agent_id");
    let followed = hub.request("GET", &format!("/api/v1/agents/{id}/logs?follow=true&offset=99990")).send().await.unwrap();
    assert_eq!(followed.headers()["content-type"], "text/event-stream");
    let followed = followed.text().await.unwrap();
    assert!(followed.contains("event: line") && followed.contains("\"line\":\"oops\""), "{followed}");
    let end = followed.rsplit("event: end\ndata: ").next().unwrap();
    assert_eq!(serde_json::from_str::<Value>(end.trim()).unwrap()["agent"]["status"], "exited", "{end}");
    let page = hub.get(&format!("/api/v1/agents/{id}/logs?limit=500")).await;
    let (total, first) = (page["total"].as_u64().unwrap(), page["first"].as_u64().unwrap());
    assert!(total >= 100_001 && first > 50_000, "{total} {first}");
    assert_eq!(page["logs"][0]["seq"].as_u64(), Some(first + 1), "what is gone is passed over");
    let numbers: Vec<u64> = page["logs"].as_array().unwrap().iter().filter_map(|l| text(l, "line").parse().ok()).collect();
    assert!(numbers.windows(2).all(|w| w[1] == w[0] + 1) && numbers.len() > 400, "{numbers:?}");
    assert!(cli(&["agent", "logs", "chatty", "--lines", "5"]).ends_with("100000\n"));
    let kept: usize = cli(&["agent", "logs", "chatty", "--all"]).len();
    assert!(kept > 20_000 && kept < 100_000, "{kept}");

    // One that does not care for being asked.
    let mark = format!("88{}.5", std::process::id());
    let script = format!("trap '' TERM; echo up; while :; do sleep {mark}; done");
    cli(&["agent", "spawn", "deaf", "--select", "os=linux", "--restart", "always", "--script", &script]);
    until("it to be up", async || cli(&["agent", "logs", "deaf"]).contains("up").then_some(())).await;
    assert!(cli(&["agent", "ls"]).contains("deaf"));
    let killed: Value = serde_json::from_str(&cli(&["--output", "json", "agent", "kill", "deaf", "--force"])).unwrap();
    assert_eq!(killed["status"], "stopping");
    let log = cli(&["agent", "logs", "-f", "deaf"]);
    assert!(log.contains("up"), "{log}");
    assert!(cli(&["agent", "show", "deaf"]).contains("killed"));
    assert_eq!(alive(&mark), Vec::<u32>::new());

    // Dies at once, again and again.
    let quick = json!({"node": node.id, "command": "echo x; exit 1", "restart": {"policy": "on_failure", "max": 2, "backoff_ms": 1}});
    let id = spawn(&hub, "quick", quick).await;
    let dead = when(&hub, &id, "failed").await;
    assert_eq!(dead["restarts"].as_u64(), Some(2), "{dead}");
    assert!(text(&dead, "reason").contains("exit code 1"), "{dead}");
    assert_eq!(lines(&hub, &id).await.iter().filter(|l| *l == "x").count(), 3);

    let (status, basic) = hub.call("POST", "/api/v1/agents", Some(json!({"name": "b", "agent_type": "basic", "config": {"k": 1}}))).await;
    assert_eq!((status, &basic["status"], &basic["task_id"]), (201, &json!("running"), &Value::Null));
    let id = text(&basic, "agent_id");
    assert_eq!(lines(&hub, &id).await, [r#"{"k":1}"#]);
    assert_eq!(kill(&hub, &id, false).await["status"], "killed");
}

//! The same hub on a real PostgreSQL: work survives its crash, and the database's.

use hub_testkit::postgres::Server;
use mesh_tests::{Hub, Node, text, until};
use serde_json::json;

#[tokio::test(flavor = "multi_thread")]
async fn work_survives_the_hub_and_the_database() {
    let server = tokio::task::spawn_blocking(Server::start).await.unwrap();
    let url = server.database();
    let mut hub = Hub::start_with(&[("CORTEX_DATABASE_URL", &url)], &[]).await;
    let mut node = Node::join(&hub, "n").await;
    assert!(!hub.data().join("hub.db").exists());
    let t = hub.sh("echo on postgres; exit 4").await;
    assert_eq!((t["stdout"].as_str(), t["exit_code"].as_i64()), (Some("on postgres\n"), Some(4)));
    let history = hub.get(&format!("/api/v1/tasks/{}/events", text(&t, "id"))).await;
    assert_eq!(history["items"].as_array().unwrap().len(), 4);

    // A task runs on while the hub dies, and while the database is away.
    let gate = node.dir.path().join("gate");
    let script = format!("i=0; while [ ! -e {} ]; do i=$((i+1)); echo $i; sleep 0.05; done", gate.display());
    let id = text(&hub.dispatch(json!({"shell": {"argv": ["sh", "-c", script]}})).await, "id");
    let lines = async |hub: &Hub| hub.output(&id, "").await.iter().filter(|b| **b == b'\n').count();
    until("output", async || (lines(&hub).await > 3).then_some(())).await;
    hub.crash_and_restart().await;
    node.online(&hub).await;

    let server = tokio::task::spawn_blocking(move || {
        server.crash();
        server
    })
    .await
    .unwrap();
    let (status, problem) = hub.call("POST", "/api/v1/dispatch", Some(json!({"echo": {"payload": "x"}}))).await;
    assert_eq!((status, problem["code"].as_str()), (503, Some("store_unavailable")), "clear, and nothing is acknowledged");
    let _server = tokio::task::spawn_blocking(move || {
        server.again();
        server
    })
    .await
    .unwrap();
    until("the hub to go on by itself", async || {
        let (status, t) = hub.call("POST", "/api/v1/dispatch", Some(json!({"echo": {"payload": "back"}, "wait_secs": 10}))).await;
        (status == 200 && t["result"]["payload"] == "back").then_some(())
    })
    .await;
    std::fs::write(&gate, "").unwrap();
    let t = hub.finished(&id).await;
    assert_eq!((t["state"].as_str(), t["attempt"].as_u64()), (Some("succeeded"), Some(1)));
    let out = String::from_utf8(hub.output(&id, "").await).unwrap();
    assert!(out.lines().enumerate().all(|(i, l)| l == (i + 1).to_string()), "whole, once, in order");
    assert_eq!(hub.process.terminate().await.code(), Some(0));
}

//! How a hub ends, and how soon the two sides notice each other's coming and going.
#![expect(clippy::disallowed_methods, reason = "tests start the real binaries and watch the real clock")]

use futures::StreamExt;
use hub_testkit::postgres::Server;
use mesh_core::enrol;
use mesh_core::task::Outcome;
use mesh_process::SystemClock;
use mesh_tests::{Hub, Node, PATIENCE, text, until};
use mesh_wire::node::node_link_client::NodeLinkClient;
use mesh_wire::node::{self as wire, hub_frame, node_frame};
use prost::Message;
use rustix::process::Signal;
use serde_json::{Value, json};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// A store that is there and says nothing, until this is dropped.
struct Stopped(Vec<rustix::process::Pid>);

impl Stopped {
    fn all(url: &str) -> Self {
        let folder = url.split('@').nth(1).unwrap().split('/').next().unwrap().replace("%2F", "/");
        let first = std::fs::read_to_string(format!("{folder}/data/postmaster.pid")).unwrap();
        let first: i32 = first.lines().next().unwrap().parse().unwrap();
        let stop = |pid: i32| {
            let pid = rustix::process::Pid::from_raw(pid)?;
            // One of the children may have ended since.
            rustix::process::kill_process(pid, rustix::process::Signal::STOP).ok().map(|()| pid)
        };
        // The first before its children are counted, so that it makes no more of them.
        let mut all: Vec<_> = stop(first).into_iter().collect();
        let stands = || std::fs::read_to_string(format!("/proc/{first}/stat")).unwrap().rsplit_once(") ").unwrap().1.starts_with('T');
        while !stands() {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        let children = std::fs::read_to_string(format!("/proc/{first}/task/{first}/children")).unwrap();
        all.extend(children.split_whitespace().filter_map(|p| stop(p.parse().unwrap())));
        Self(all)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        for pid in &self.0 {
            let _ = rustix::process::kill_process(*pid, Signal::CONT);
        }
    }
}

async fn postgres() -> (Server, String) {
    let server = tokio::task::spawn_blocking(Server::start).await.unwrap();
    let url = server.database();
    (server, url)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_tells_everybody_and_leaves_nothing_behind() {
    let mut hub = Hub::start().await;
    let mut node = Node::join(&hub, "n").await;
    let script = "i=0; while :; do i=$((i+1)); echo $i; sleep 0.05; done";
    let id = text(&hub.dispatch(json!({"shell": {"argv": ["sh", "-c", script]}})).await, "id");
    until("some output", async || (!hub.output(&id, "").await.is_empty()).then_some(())).await;
    let path = format!("/api/v1/tasks/{id}/output");
    let mut follow = hub.request("GET", &path).header("accept", "text/event-stream").send().await.unwrap().bytes_stream();
    assert!(String::from_utf8_lossy(&follow.next().await.unwrap().unwrap()).contains("event: output"));
    let waiting = hub.request("POST", "/api/v1/dispatch").json(&json!({"shell": {"argv": ["sleep", "600"]}, "wait_secs": 60})).send();
    let stop = async {
        until("both to run", async || (hub.get("/api/v1/tasks?state=running").await["items"].as_array()?.len() == 2).then_some(())).await;
        hub.process.signal(Signal::TERM);
    };
    let (answer, ()) = futures::future::join(waiting, stop).await;
    let answer = answer.unwrap();
    assert_eq!(answer.status().as_u16(), 202);
    assert_eq!(answer.json::<Value>().await.unwrap()["state"], "running", "its caller has the task as it is");
    let mut rest = String::new();
    while let Some(part) = follow.next().await {
        rest.push_str(&String::from_utf8_lossy(&part.expect("the stream ends as it should")));
    }
    let last = rest.trim_end().rsplit("\n\n").next().unwrap();
    assert!(last.starts_with("event: stopping\n") && last.contains("come back"), "{last}");
    assert_eq!(hub.process.ended().await.code(), Some(0));
    let log = hub.process.log();
    assert!(log.contains("stopped: all that was under way has ended"), "{log}");
    assert!(!hub.data().join("hub.json").exists() && !hub.data().join("hub.sock").exists());
    until("the node to know why", async || node.daemon().log().contains("the hub said goodbye: shutdown").then_some(())).await;
    hub.restart().await;
    node.online(&hub).await;
    let before = hub.output(&id, "").await.len();
    until("the task to go on", async || (hub.output(&id, "").await.len() > before).then_some(())).await;
}

/// A node's side of a link, in the hands of the test.
struct Linked {
    to_hub: mpsc::Sender<wire::NodeFrame>,
    from_hub: tonic::Streaming<wire::HubFrame>,
}

impl Linked {
    /// With the identity of a node whose daemon does not run.
    async fn as_node(hub: &Hub, node: &Node) -> Self {
        use node::{link::time::NodeTime, state::DataDir, tls};
        let dir = DataDir::new(node.data());
        let (certificate, root) = dir.certificates().unwrap();
        let pin = tls::spki_sha256(&root).unwrap();
        let own = tls::ClientCertificate { certificate, root, key: dir.identity().unwrap().private() };
        let config = tls::client_config(pin, Some(own), NodeTime::new(0, SystemClock::shared())).unwrap();
        let hub_id = std::fs::read_to_string(hub.data().join("keys/hub-id")).unwrap().trim().parse().unwrap();
        let stream = tls::connect(&hub.node, &enrol::server_name(hub_id), config).await.unwrap();
        let mut link = NodeLinkClient::new(tls::channel(stream).await.unwrap());
        let registration = wire::RegistrationRequest {
            capabilities: Some(wire::Capabilities {
                skills: vec![wire::Skill { name: "echo".into(), version: "1".into() }],
                ..Default::default()
            }),
            ..Default::default()
        };
        link.sync_configuration(registration).await.unwrap();
        let (to_hub, frames) = mpsc::channel(8);
        let spool_id = mesh_core::SpoolId::from_bytes([1; 16]).to_string();
        let hello = wire::Hello { spool_id, max_tasks: 4, ..Default::default() };
        to_hub.send(wire::NodeFrame { kind: Some(node_frame::Kind::Hello(hello)) }).await.unwrap();
        let frames = futures::stream::unfold(frames, async |mut f| f.recv().await.map(|x| (x, f)));
        let from_hub = link.task_stream(Box::pin(frames)).await.unwrap().into_inner();
        // It is no silent node, however long the test takes.
        let beats = to_hub.downgrade();
        tokio::spawn(async move {
            for seq in 1.. {
                tokio::time::sleep(Duration::from_secs(5)).await;
                let Some(to_hub) = beats.upgrade() else { return };
                let beat = wire::Heartbeat { seq, sent_ms: 1, echo_ms: 0, held_ms: 0 };
                if to_hub.send(wire::NodeFrame { kind: Some(node_frame::Kind::Heartbeat(beat)) }).await.is_err() {
                    return;
                }
            }
        });
        Self { to_hub, from_hub }
    }
    async fn say(&self, kind: node_frame::Kind) {
        self.to_hub.send(wire::NodeFrame { kind: Some(kind) }).await.unwrap();
    }
    async fn hear(&mut self) -> hub_frame::Kind {
        let frame = tokio::time::timeout(PATIENCE, self.from_hub.message()).await.expect("a frame in time");
        frame.unwrap().expect("the stream goes on").kind.unwrap()
    }
    async fn hear_until<T>(&mut self, mut is: impl FnMut(hub_frame::Kind) -> Option<T>) -> T {
        loop {
            if let Some(found) = is(self.hear().await) {
                return found;
            }
        }
    }
}

/// The hub has a result in its hands, and its store needs a moment, when the stop comes.
#[tokio::test(flavor = "multi_thread")]
async fn a_result_that_came_before_the_stop_is_kept_and_acknowledged() {
    mesh_process::install_tls_provider();
    let (_server, url) = postgres().await;
    let mut hub = Hub::start_with(&[("CORTEX_DATABASE_URL", &url)], &[]).await;
    let mut node = Node::join(&hub, "n").await;
    node.daemon().terminate().await;
    node.offline(&hub).await;
    let mut link = Linked::as_node(&hub, &node).await;
    let id = text(&hub.dispatch(json!({"node": node.id, "echo": {"payload": "x"}})).await, "id");
    let order = link
        .hear_until(|f| match f {
            hub_frame::Kind::Envelope(e) => wire::OrdersBody::decode(e.body.as_slice()).unwrap().orders.pop(),
            _ => None,
        })
        .await;
    assert_eq!(order.task_id, id);

    let held = Stopped::all(&url);
    link.say(node_frame::Kind::Result(wire::TaskResult {
        task_id: id.clone(),
        attempt: order.attempt,
        outcome: Some((&Outcome::Done).into()),
        last_seq: 0,
        at_ms: 1,
        result: b"x".to_vec(),
        sandbox_applied: String::new(),
        stdout_sha256: vec![],
        stderr_sha256: vec![],
    }))
    .await;
    // Behind it in the stream: once this is answered, the result is in the hub's hands.
    link.say(node_frame::Kind::Heartbeat(wire::Heartbeat { seq: 1, sent_ms: 4711, echo_ms: 0, held_ms: 0 })).await;
    link.hear_until(|f| matches!(f, hub_frame::Kind::Heartbeat(h) if h.echo_ms == 4711).then_some(())).await;
    hub.process.signal(Signal::TERM);
    until("the stop to have begun", async || hub.process.log().contains("stopping").then_some(())).await;
    drop(held);
    let mut heard = vec![];
    link.hear_until(|f| match f {
        hub_frame::Kind::ResultAck(a) => {
            heard.push(a.task_id);
            None
        }
        hub_frame::Kind::Goodbye(g) => {
            heard.push(g.code);
            Some(())
        }
        _ => None,
    })
    .await;
    assert_eq!(heard, [id.as_str(), "shutdown"]);
    assert_eq!(hub.process.ended().await.code(), Some(0));
    hub.restart().await;
    let t = hub.task(&id).await;
    assert_eq!((t["state"].as_str(), t["attempt"].as_u64()), (Some("succeeded"), Some(1)), "{t}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_has_a_limit_and_a_second_signal_ends_it_at_once() {
    let (server, url) = postgres().await;
    let other = server.database();
    let mut patient = Hub::start_with(&[("CORTEX_DATABASE_URL", &url)], &[]).await;
    let mut hasty = Hub::start_with(&[("CORTEX_DATABASE_URL", &other)], &[]).await;
    let held = Stopped::all(&url);
    let mut calls = vec![];
    for hub in [&patient, &hasty] {
        // Under way in the store, which does not answer.
        let call = hub.request("POST", "/api/v1/dispatch").json(&json!({"echo": {"payload": "x"}})).send();
        calls.push(tokio::spawn(call));
    }
    for hub in [&patient, &hasty] {
        until("the write to be under way", async || (!hub.get("/healthz").await.is_null() && waiting(hub).await).then_some(())).await;
        hub.process.signal(Signal::TERM);
        until("the stop to have begun", async || hub.process.log().contains("stopping").then_some(())).await;
    }
    hasty.process.signal(Signal::TERM);
    assert_eq!(hasty.process.ended().await.code(), Some(143));
    assert!(hasty.process.log().contains("a second signal"), "{}", hasty.process.log());
    // The other ends by itself, although its store never answers, and says so.
    assert!(patient.process.ended().await.code().is_some_and(|code| code < 2));
    let log = patient.process.log();
    assert!(log.contains("stopped: ") && !log.contains("a second signal"), "{log}");
    for call in calls {
        match call.await.unwrap() {
            Ok(answer) => assert_eq!(answer.status().as_u16(), 503),
            Err(cut) => assert!(cut.is_request(), "{cut}"),
        }
    }
    drop(held);
    for hub in [&mut patient, &mut hasty] {
        hub.restart().await;
        assert_eq!(hub.call("POST", "/api/v1/dispatch", Some(json!({"echo": {"payload": "x"}, "queue_secs": 0}))).await.0, 202);
        assert_eq!(hub.process.terminate().await.code(), Some(0));
    }
}

/// Does a write wait for the store?
async fn waiting(hub: &Hub) -> bool {
    let facts: Value = serde_json::from_slice(&std::fs::read(hub.data().join("hub.json")).unwrap()).unwrap();
    let web = reqwest::Client::builder().no_proxy().build().unwrap();
    let m = web.get(format!("http://{}/metrics", text(&facts, "metrics"))).send().await.unwrap().text().await.unwrap();
    m.contains("cortex_store_up 0")
}

/// The bounds are generous, since other tests share the machine; the figures are printed.
#[tokio::test(flavor = "multi_thread")]
async fn both_sides_notice_soon() {
    let mut hub = Hub::start().await;
    let mut node = Node::join(&hub, "n").await;
    let mut figures = vec![];
    let mut note = |what: &'static str, begun: Instant, bound: u64| {
        let took = begun.elapsed();
        assert!(took < Duration::from_secs(bound) + PATIENCE, "{what}: {took:?}");
        figures.push(format!("{what} {} ms", took.as_millis()));
    };
    for what in ["back after a restart", "back after another"] {
        assert_eq!(hub.process.terminate().await.code(), Some(0));
        let down = Instant::now();
        until("a second to pass", async || (down.elapsed() >= Duration::from_secs(1)).then_some(())).await;
        hub.restart().await;
        let begun = Instant::now();
        node.online(&hub).await;
        note(what, begun, 2);
    }
    node.daemon().signal(Signal::STOP);
    let begun = Instant::now();
    node.offline(&hub).await;
    note("offline after silence", begun, 16);
    node.daemon().signal(Signal::CONT);
    node.online(&hub).await;
    node.daemon().kill9();
    let begun = Instant::now();
    node.offline(&hub).await;
    note("offline after the end", begun, 1);
    eprintln!("{}", figures.join(", "));
}

//! A node with a true certificate that lies: refused, counted, and nobody else's harm.
#![expect(clippy::disallowed_methods, reason = "a test reads its streams beside")]

use mesh_tests::{Hub, Node, text, until};
use mesh_wire::node::{
    self as wire, Hello, HubData, HubFrame, NodeData, NodeFrame, OrdersBody, hub_data, hub_frame, node_data, node_frame, outcome,
};
use node::link::connect::{Dial, Dialed};
use node::state::{DataDir, State};
use prost::Message;
use serde_json::{Value, json};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

/// A machine that joined by a true invite and then speaks for itself.
struct Liar {
    node: Node,
    id: String,
}

/// One link of it.
struct Link {
    frames: mpsc::Sender<NodeFrame>,
    data: mpsc::Sender<NodeData>,
    heard: mpsc::Receiver<Result<HubFrame, tonic::Status>>,
    answers: mpsc::Receiver<Result<HubData, tonic::Status>>,
    client: wire::node_link_client::NodeLinkClient<tonic::transport::Channel>,
}

impl Liar {
    async fn join(hub: &Hub) -> Self {
        mesh_process::install_tls_provider();
        let (_, yaml) = hub.invite(json!({"name": "liar"})).await;
        let node = Node::prepare("liar", &yaml);
        let out = node.command(&["join", "invite.yaml", "--enroll-only"]).output().unwrap();
        assert!(out.status.success(), "{}", mesh_tests::shown(&out));
        let list = hub.get("/api/v1/nodes").await;
        let id = text(list["items"].as_array().unwrap().iter().find(|n| n["name"] == "liar").unwrap(), "id");
        Self { node, id }
    }

    async fn link(&self, attempts: Vec<wire::KnownAttempt>) -> Link {
        let capabilities = wire::Capabilities {
            cpu_cores: 4,
            skills: vec![wire::Skill { name: "shell".into(), version: "1".into() }],
            ..Default::default()
        };
        let spool_id = mesh_core::SpoolId::from_bytes([7; 16]).to_string();
        let hello = Hello { spool_id, attempts, max_tasks: 4, ..Default::default() };
        // Who stood still for 3 s before its first word was hung up on, and dials again, as a node does.
        let dialed = until("the link to be made", async || {
            let dir = DataDir::new(self.node.data());
            let settings = State::open(&dir).unwrap().settings().unwrap().unwrap().resolve(&|_| Ok(None)).unwrap();
            let time = node::link::time::NodeTime::new(0, mesh_process::SystemClock::shared());
            Dial { settings, dir, time, capabilities: capabilities.clone(), hello: hello.clone() }.run().await.ok()
        })
        .await;
        let Dialed { mut client, from_hub, task_frames, data_frames, data_source, .. } = dialed;
        // It is no silent node, whatever else it is.
        let beats = task_frames.downgrade();
        tokio::spawn(async move {
            for seq in 1.. {
                tokio::time::sleep(Duration::from_secs(5)).await;
                let Some(frames) = beats.upgrade() else { return };
                let beat = wire::Heartbeat { seq, sent_ms: 1, echo_ms: 0, held_ms: 0 };
                if frames.send(NodeFrame { kind: Some(node_frame::Kind::Heartbeat(beat)) }).await.is_err() {
                    return;
                }
            }
        });
        let (heard_in, heard) = mpsc::channel(10_000);
        tokio::spawn(pass_on(from_hub, heard_in));
        let (answers_in, answers) = mpsc::channel(10_000);
        let with = client.clone();
        tokio::spawn(async move {
            match client.data_stream(ReceiverStream::new(data_source)).await {
                Ok(stream) => pass_on(stream.into_inner(), answers_in).await,
                Err(e) => drop(answers_in.send(Err(e)).await),
            }
        });
        Link { frames: task_frames, data: data_frames, heard, answers, client: with }
    }
}

async fn pass_on<T>(mut from: tonic::Streaming<T>, to: mpsc::Sender<Result<T, tonic::Status>>) {
    while let Some(next) = from.message().await.transpose() {
        let end = next.is_err();
        if to.send(next).await.is_err() || end {
            return;
        }
    }
}

const PATIENCE: Duration = mesh_tests::PATIENCE;

impl Link {
    async fn say(&self, kind: node_frame::Kind) -> bool {
        self.frames.send(NodeFrame { kind: Some(kind) }).await.is_ok()
    }
    async fn output(&self, o: wire::OutputFrame) -> bool {
        self.data.send(NodeData { kind: Some(node_data::Kind::Output(o)) }).await.is_ok()
    }
    /// The next frame of interest; an error of the stream, or its end, is the end.
    async fn next(&mut self) -> Option<hub_frame::Kind> {
        loop {
            match tokio::time::timeout(PATIENCE, self.heard.recv()).await.expect("the hub says something") {
                Some(Ok(HubFrame { kind: Some(hub_frame::Kind::Heartbeat(_)) })) => {}
                Some(Ok(frame)) => return frame.kind,
                Some(Err(_)) | None => return None,
            }
        }
    }
    async fn acknowledged(&mut self, task: &str) {
        loop {
            match self.next().await {
                Some(hub_frame::Kind::ResultAck(a)) if a.task_id == task => return,
                Some(_) => {}
                None => panic!("the link ended before {task} was acknowledged"),
            }
        }
    }
    /// The code of the hub's goodbye, or nothing when the connection was simply cut.
    async fn ended(&mut self) -> Option<String> {
        loop {
            match self.next().await {
                Some(hub_frame::Kind::Goodbye(g)) => return Some(g.code),
                Some(_) => {}
                None => return None,
            }
        }
    }
    async fn output_ack(&mut self) -> wire::OutputAck {
        match tokio::time::timeout(PATIENCE, self.answers.recv()).await.expect("the hub answers") {
            Some(Ok(HubData { kind: Some(hub_data::Kind::Output(a)) })) => a,
            other => panic!("{other:?}"),
        }
    }
    async fn data_ended(&mut self) -> String {
        loop {
            match tokio::time::timeout(PATIENCE, self.answers.recv()).await.expect("the hub answers") {
                Some(Ok(_)) => {}
                Some(Err(e)) => return format!("{:?} {}", e.code(), e.message()),
                None => return String::new(),
            }
        }
    }
}

fn result(task: &str, attempt: u64, last_seq: u64) -> node_frame::Kind {
    let outcome = Some(wire::Outcome { kind: outcome::Kind::Exited.into(), ..Default::default() });
    node_frame::Kind::Result(wire::TaskResult { task_id: task.into(), attempt, outcome, last_seq, ..Default::default() })
}

fn started(task: &str, attempt: u64) -> node_frame::Kind {
    node_frame::Kind::Started(wire::TaskStarted { task_id: task.into(), attempt, at_ms: 1 })
}

fn frame(task: &str, attempt: u64, seq: u64, data: &str) -> wire::OutputFrame {
    wire::OutputFrame { task_id: task.into(), attempt, seq, t_ms: 1, stream: 1, data: data.as_bytes().to_vec().into() }
}

fn unknown(n: u64) -> String {
    let mut bytes = [9; 16];
    bytes[8..].copy_from_slice(&n.to_be_bytes());
    mesh_core::TaskId::from_bytes(bytes).to_string()
}

async fn metrics(hub: &Hub) -> String {
    let facts: Value = serde_json::from_slice(&std::fs::read(hub.data().join("hub.json")).unwrap()).unwrap();
    let web = reqwest::Client::builder().no_proxy().build().unwrap();
    web.get(format!("http://{}/metrics", text(&facts, "metrics"))).send().await.unwrap().text().await.unwrap()
}

async fn metric(hub: &Hub, name: &str) -> f64 {
    let all = metrics(hub).await;
    all.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(' ')?.parse().ok()).unwrap_or_else(|| panic!("{name} is not there"))
}

async fn refused(hub: &Hub, what: &str) -> f64 {
    metric(hub, &format!("cortex_refused_reports_total{{what=\"{what}\"}}")).await
}

async fn counted(hub: &Hub, what: &str, n: f64) {
    mesh_tests::until(&format!("{n} reports to be counted as {what}"), async || (refused(hub, what).await == n).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn lies_change_nothing_and_are_counted() {
    let hub = Hub::start().await;
    let honest = Node::join(&hub, "honest").await;
    let gate = honest.dir.path().join("gate");
    let script = format!("echo begun; while [ ! -e {} ]; do sleep 0.05; done; echo over", gate.display());
    let theirs = text(&hub.dispatch(json!({"node": "honest", "shell": {"argv": ["sh", "-c", script]}})).await, "id");
    let t = hub.task_when(&theirs, "to run", |t| t["state"] == "running").await;
    until("its first line", async || (hub.output(&theirs, "").await == b"begun\n").then_some(())).await;
    let digest = mesh_core::sha256(b"made up").to_vec();

    let liar = Liar::join(&hub).await;
    // A hello that claims another's attempt: it is told to end it, and that is all.
    let mut link = liar.link(vec![wire::KnownAttempt { task_id: theirs.clone(), attempt: 1 << 32 | 1, ended: false }]).await;
    assert!(matches!(link.next().await, Some(hub_frame::Kind::Envelope(e)) if e.payload_type.contains("cancel")), "told to end it");
    counted(&hub, "foreign", 1.0).await;
    let own = text(&hub.dispatch(json!({"node": "liar", "shell": {"argv": ["true"]}})).await, "id");
    let attempt = loop {
        if let Some(hub_frame::Kind::Envelope(e)) = link.next().await {
            let body = OrdersBody::decode(e.body.as_slice()).unwrap();
            assert_eq!(body.orders[0].task_id, own);
            break body.orders[0].attempt;
        }
    };

    // Another's task, under its true number and others.
    for no in [attempt, attempt + 1, 0, u64::MAX] {
        assert!(link.say(started(&theirs, no)).await && link.say(result(&theirs, no, 0)).await);
        link.acknowledged(&theirs).await;
    }
    // The word that it started is counted beside that of its end, and maybe after it.
    counted(&hub, "foreign", 7.0).await;
    // Attempts of its own that it never had.
    for no in [attempt + 1, u64::MAX] {
        assert!(link.say(result(&own, no, 0)).await);
        link.acknowledged(&own).await;
    }
    counted(&hub, "foreign", 9.0).await;
    assert_eq!(hub.task(&own).await["state"], "assigned");
    // Tasks that never were.
    assert!(link.say(result(&unknown(1), 1, 7)).await);
    link.acknowledged(&unknown(1)).await;
    counted(&hub, "unknown", 1.0).await;
    // Another's output, and another's secrets.
    assert!(link.output(frame(&theirs, attempt, 2, "forged\n")).await);
    assert_eq!(link.output_ack().await.task_id, theirs, "nobody shall say it for ever");
    let ask = wire::PayloadRequest { task_id: theirs.clone(), attempt, sha256: digest };
    assert!(link.data.send(NodeData { kind: Some(node_data::Kind::Payload(ask)) }).await.is_ok());
    match tokio::time::timeout(PATIENCE, link.answers.recv()).await.unwrap() {
        Some(Ok(HubData { kind: Some(hub_data::Kind::Payload(p)) })) => assert!(!p.refused.is_empty() && p.data.is_empty()),
        other => panic!("{other:?}"),
    }

    // Its own output, with a seq that jumps back: the first word counts.
    assert!(link.say(started(&own, attempt)).await);
    for (seq, data) in [(1, "one\n"), (2, "two\n"), (3, "three\n"), (2, "TWO\n"), (1, "ONE\n"), (3, "THREE\n")] {
        assert!(link.output(frame(&own, attempt, seq, data)).await);
    }
    while link.output_ack().await.durable_seq < 3 {}
    // A result that names output which never came ends the link, and not the task.
    assert!(link.say(result(&own, attempt, 99)).await);
    assert_eq!(link.ended().await.as_deref(), Some("not_recorded"));
    counted(&hub, "output_missing", 1.0).await;
    // One that leaves a gap ends the stream.
    let known = || vec![wire::KnownAttempt { task_id: own.clone(), attempt, ended: false }];
    let mut link = liar.link(known()).await;
    assert!(link.output(frame(&own, attempt, 7, "seven\n")).await);
    assert!(link.data_ended().await.contains("gap"));
    counted(&hub, "gap", 1.0).await;
    // What cannot be read ends the link.
    for bad in [started("task_../../etc/passwd", 1), node_frame::Kind::Hello(Hello::default()), result(&own, attempt, u64::MAX)] {
        let mut link = liar.link(known()).await;
        assert!(link.say(bad).await);
        let code = link.ended().await;
        assert!(["bad_frame", "not_recorded"].contains(&code.as_deref().unwrap()), "{code:?}");
    }
    counted(&hub, "bad_frame", 2.0).await;
    assert_eq!(hub.task(&own).await["state"], "running");

    // The truth is still taken, once.
    let mut link = liar.link(known()).await;
    assert!(link.say(result(&own, attempt, 3)).await);
    link.acknowledged(&own).await;
    let mut late = result(&own, attempt, 3);
    if let node_frame::Kind::Result(r) = &mut late {
        r.outcome = Some(wire::Outcome { kind: outcome::Kind::Signalled.into(), code: 9, ..Default::default() });
    }
    assert!(link.say(late).await);
    link.acknowledged(&own).await;
    let t_own = hub.finished(&own).await;
    assert_eq!((t_own["state"].as_str(), t_own["stdout"].as_str()), (Some("succeeded"), Some("one\ntwo\nthree\n")), "{t_own}");

    // Nobody else has noticed.
    assert_eq!(hub.task(&theirs).await["started_at"], t["started_at"]);
    std::fs::write(&gate, "").unwrap();
    let t = hub.finished(&theirs).await;
    assert_eq!((t["state"].as_str(), t["stdout"].as_str(), t["attempt"].as_u64()), (Some("succeeded"), Some("begun\nover\n"), Some(1)));
    let log = hub.process.log();
    let told = log.lines().filter(|l| l.contains("a report of a node cannot be true") && l.contains(&liar.id)).count();
    assert!((1..10).contains(&told), "it is told, and the log is not filled: {told}");
}

/// What is too large or too much ends the link that it came by, and nothing else.
#[tokio::test(flavor = "multi_thread")]
async fn floods_and_giants_end_their_link_alone() {
    let hub = Hub::start().await;
    let honest = Node::join(&hub, "honest").await;
    let liar = Liar::join(&hub).await;
    let resident = async || metric(&hub, "process_resident_memory_bytes").await;
    assert_eq!(hub.sh("echo warm").await["state"], "succeeded");
    let before = resident().await;
    let at_work = async |what: &str| {
        let t = hub.dispatch(json!({"node": "honest", "shell": {"argv": ["echo", what]}, "wait_secs": 20})).await;
        assert_eq!(hub.finished(&text(&t, "id")).await["stdout"], format!("{what}\n"), "during {what}");
    };

    // 100 MB at once: as a frame, as output, as a call.
    const GIANT: usize = 100 << 20;
    let giant = wire::OutputFrame { data: vec![7; GIANT].into(), ..frame(&unknown(1), 1, 1, "") };
    let link = liar.link(vec![]).await;
    let mut client = link.client.clone().max_encoding_message_size(usize::MAX);
    let one = NodeData { kind: Some(node_data::Kind::Output(giant)) };
    let (answer, ()) = futures::future::join(
        async {
            let mut stream = client.data_stream(futures::stream::iter([one])).await?.into_inner();
            stream.message().await
        },
        at_work("giant output"),
    )
    .await;
    assert!(answer.is_err(), "{answer:?}");
    let hello = NodeFrame { kind: Some(node_frame::Kind::Hello(Hello { spool_id: "x".repeat(GIANT), ..Default::default() })) };
    let (answer, ()) = futures::future::join(client.task_stream(futures::stream::iter([hello])), at_work("giant hello")).await;
    assert!(answer.is_err());
    let call = wire::RegistrationRequest { version: "x".repeat(GIANT), ..Default::default() };
    let (answer, ()) = futures::future::join(client.sync_configuration(call), at_work("giant call")).await;
    assert!(answer.is_err());
    drop((link, client));
    let grown = resident().await - before;
    assert!(grown < 64e6, "a giant is refused unread: {grown} bytes more");

    // As many claims as fit through the wire.
    let mut link = liar.link(vec![]).await;
    let frames = link.frames.clone();
    let claims = async {
        let mut said = 0u64;
        for n in 0..200_000 {
            let kind = if n % 2 == 0 { started(&unknown(n), 1) } else { result(&unknown(n), 1, 0) };
            if frames.send(NodeFrame { kind: Some(kind) }).await.is_err() {
                break;
            }
            said += 1;
        }
        said
    };
    let (said, code, ()) = futures::future::join3(claims, link.ended(), async {
        for n in 0..3 {
            at_work(&format!("claims {n}")).await;
        }
    })
    .await;
    assert!(said < 200_000, "the flood was cut off");
    assert!(code.is_none_or(|c| ["bad_frame", "refused"].contains(&c.as_str())), "the hub ended it");
    assert!(refused(&hub, "unknown").await + refused(&hub, "bad_frame").await >= 1.0);

    // Output of tasks that never were: left unread beyond its window, and in the end cut.
    let mut link = liar.link(vec![]).await;
    let data = link.data.clone();
    let bytes = "y".repeat(64 << 10);
    let flood = async {
        let mut said = 0u64;
        for n in 0..20_000 {
            if data.send(NodeData { kind: Some(node_data::Kind::Output(frame(&unknown(n), 1, 1, &bytes))) }).await.is_err() {
                break;
            }
            said += 1;
        }
        said
    };
    let (said, code, ()) = futures::future::join3(flood, link.ended(), at_work("output")).await;
    assert!(said < 20_000, "the flood was cut off");
    assert!(code.is_none_or(|c| c == "refused"), "the hub ended it");

    let grown = resident().await - before;
    assert!(grown < 256e6, "memory is bounded: {grown} bytes more");
    let n = hub.get(&format!("/api/v1/nodes/{}", honest.id)).await;
    assert_eq!((n["status"].as_str(), n["schedulable"]["ok"].as_bool()), (Some("online"), Some(true)));
    let log = std::fs::read_to_string(honest.dir.path().join("node.log")).unwrap();
    // A machine that stands still for 15 s loses any link, and one for 3 s is not let in: that is nobody's doing.
    let lost = log.lines().filter(|l| l.contains("link down") && !l.contains("was silent for") && !l.contains("TLS with"));
    assert_eq!(lost.collect::<Vec<_>>(), [""; 0], "its link was never touched");
    assert!(hub.process.log().len() < 4 << 20, "and the log was not filled");
}

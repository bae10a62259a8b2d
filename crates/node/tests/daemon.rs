//! The real program, with its real warden, against a scripted hub.

#[path = "support/bundle.rs"]
mod bundle;
mod support;

use mesh_core::spec::{Program, Shell, Spec};
use mesh_core::{SessionId, TaskId};
use mesh_process::entropy;
use mesh_wire::node::outcome::Kind as Ended;
use mesh_wire::node::{Goodbye, InputBody, Order, TaskResult, hub_frame, node_frame};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Output, Stdio};
use std::sync::mpsc;
use support::{Hub, Link, PATIENCE};

struct Node {
    _tmp: tempfile::TempDir,
    dir: PathBuf,
    invite: PathBuf,
    root: PathBuf,
    places: u32,
    child: Option<(Child, mpsc::Receiver<String>)>,
}

#[expect(clippy::disallowed_methods, reason = "a test starts the program it tests")]
fn program() -> std::process::Command {
    std::process::Command::new(env!("CARGO_BIN_EXE_cortex-node"))
}

impl Node {
    fn new(hub: &Hub) -> Self {
        let tmp = tempfile::tempdir().unwrap();
        std::fs::set_permissions(tmp.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        let invite = tmp.path().join("box.yaml");
        std::fs::write(&invite, &hub.yaml).unwrap();
        let (dir, root) = (tmp.path().join("d"), tmp.path().join("w"));
        Self { dir, root, invite, places: 4, _tmp: tmp, child: None }
    }
    fn command(&self, args: &[&str]) -> std::process::Command {
        let mut c = program();
        c.args(args)
            .env("CORTEX_NODE_DATA_DIR", &self.dir)
            .env("CORTEX_NODE_WORKSPACE_ROOT", &self.root)
            .env("CORTEX_NODE_MAX_TASKS", self.places.to_string())
            .env("CORTEX_NODE_LOG", "debug,h2=info,hyper=info,rustls=info,tower=info");
        c
    }
    fn call(&self, args: &[&str]) -> Output {
        self.command(args).stdin(Stdio::null()).output().unwrap()
    }
    fn start(&mut self, args: &[&str]) {
        let mut child = self.command(args).stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
        let out = BufReader::new(child.stdout.take().unwrap());
        let (tx, rx) = mpsc::sync_channel(64);
        std::thread::spawn(move || out.lines().map_while(Result::ok).for_each(|l| drop(tx.send(l))));
        self.child = Some((child, rx));
    }
    fn line(&self) -> String {
        self.child.as_ref().unwrap().1.recv_timeout(PATIENCE).expect("no line on standard output")
    }
    fn wait(&mut self) -> Option<i32> {
        self.child.take().unwrap().0.wait().unwrap().code()
    }
    fn signal(&self, s: rustix::process::Signal) {
        let id = self.child.as_ref().unwrap().0.id() as i32;
        rustix::process::kill_process(rustix::process::Pid::from_raw(id).unwrap(), s).unwrap();
    }
    async fn up(hub: &mut Hub) -> (Self, Link) {
        Self::up_with(hub, 4).await
    }
    async fn up_with(hub: &mut Hub, places: u32) -> (Self, Link) {
        let mut n = Self::new(hub);
        n.places = places;
        let invite = n.invite.to_str().unwrap().to_owned();
        n.start(&["join", &invite]);
        let link = hub.link().await;
        assert!(n.line().starts_with("joined: node box (node_"));
        assert!(n.line().starts_with("ceiling: tasks have the full network"));
        assert_eq!(n.line(), format!("link up: node box ({}) on hub {}", hub.inner.node, hub.inner.hub));
        (n, link)
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = self.call(&["stop"]);
        if let Some((mut c, _)) = self.child.take() {
            let _ = c.kill();
            let _ = c.wait();
        }
        if std::thread::panicking() {
            let log = std::fs::read_to_string(self.dir.join("warden.log")).unwrap_or_default();
            eprintln!("warden.log: {log}");
        }
    }
}

fn task() -> TaskId {
    TaskId::from_parts(1_700_000_000_000, entropy::bytes())
}
fn script(text: &str) -> Spec {
    shell(text, vec![])
}
fn shell(text: &str, stdin: Vec<u8>) -> Spec {
    Spec::Shell(Shell { program: Program::Script(text.into()), cwd: String::new(), env: Default::default(), stdin, stdin_open: false })
}
fn output(hub: &Hub, task: TaskId) -> String {
    String::from_utf8_lossy(hub.knobs().output.get(&(task.to_string(), 1)).map_or(&[][..], |v| v)).into_owned()
}
fn mode(p: &Path) -> u32 {
    std::fs::metadata(p).unwrap().permissions().mode() & 0o777
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn join_link_run_and_stop() {
    let mut hub = support::start().await;
    let (mut node, mut link) = Node::up(&mut hub).await;
    assert!(link.hello.attempts.is_empty());
    assert_eq!(mode(&node.dir.join("identity.key")), 0o600);
    let used = std::fs::read_to_string(&node.invite).unwrap();
    assert!(!used.contains("secret:") && mode(&node.invite) == 0o600, "{used}");

    // a command in a session, its output, its result
    let (t, session) = (task(), SessionId::from_bytes([7; 16]));
    link.orders(vec![hub.order(t, &script("echo out; echo err >&2; pwd; id -u; echo kept > file"), Some(session))]).await;
    assert_eq!(link.started().await.task_id, t.to_string());
    let r = link.result().await;
    let o = r.outcome.clone().unwrap();
    assert_eq!((o.kind(), o.code), (Ended::Exited, 0), "{o:?}");
    let text = output(&hub, t);
    assert!(text.contains("out\n") && text.contains("err\n") && text.contains(&format!("/{session}\n")), "{text}");
    if rustix::process::geteuid().is_root() {
        assert!(text.contains("700000"), "{text}");
        assert!(r.sandbox_applied.ends_with("no_new_privs,uid"), "{}", r.sandbox_applied);
    }
    link.acknowledge(&r).await;

    // the same session again: the same folder; a large payload is pulled; an order sent twice runs once
    let t = task();
    let big = shell("cat file; wc -c; echo x >> count; wc -l < count", vec![b'z'; 300_000]);
    let order = hub.order(t, &big, Some(session));
    assert!(order.payload.is_empty());
    link.orders(vec![order.clone()]).await;
    link.orders(vec![order.clone()]).await;
    let r = link.result().await;
    let text: Vec<String> = output(&hub, t).split_whitespace().map(String::from).collect();
    assert_eq!(text, ["kept", "300000", "1"]);
    // not acknowledged: the order once more gives the result once more, and runs nothing
    link.orders(vec![order]).await;
    let again = link.result().await;
    assert_eq!((again.outcome, again.last_seq), (r.outcome.clone(), r.last_seq));
    assert_eq!(output(&hub, t).split_whitespace().last(), Some("1"));
    link.acknowledge(&r).await;

    // echo, late, and what the policy refuses
    let (e, late, root) = (task(), task(), task());
    let mut preload = script("true");
    if let Spec::Shell(s) = &mut preload {
        s.env.insert("LD_PRELOAD".into(), "x".into());
    }
    let mut late_order = hub.order(late, &script("true"), None);
    late_order.start_before_ms = 1;
    link.orders(vec![hub.order(e, &Spec::Echo { payload: b"hello".to_vec() }, None), late_order, hub.order(root, &preload, None)]).await;
    let mut results = vec![];
    for _ in 0..3 {
        let r = link.result().await;
        link.acknowledge(&r).await;
        results.push((r.task_id.clone(), r.outcome.unwrap().kind(), r.result));
    }
    assert_eq!(
        results,
        [
            (e.to_string(), Ended::Done, b"hello".to_vec()),
            (late.to_string(), Ended::Late, vec![]),
            (root.to_string(), Ended::Refused, vec![])
        ]
    );

    // an altered envelope runs nothing and is answered
    let body = link.orders_body(vec![hub.order(task(), &script("true"), None)]);
    let mut envelope = link.sealed(mesh_core::seal::payload_type::ORDERS, prost::Message::encode_to_vec(&body));
    envelope.body[40] ^= 1;
    link.send(hub_frame::Kind::Envelope(envelope)).await;
    let node_frame::Kind::Rejected(r) = link.frame().await else { panic!() };
    assert_eq!(r.code, "bad_signature");

    // a cancel ends the tree; a cancel of an unknown attempt leaves a refusal behind
    let t = task();
    link.orders(vec![hub.order(t, &script("sleep 100 & sleep 100"), None)]).await;
    link.started().await;
    link.cancel(t).await;
    let r = link.result().await;
    assert_eq!(r.outcome.clone().unwrap().kind(), Ended::Cancelled);
    link.acknowledge(&r).await;
    let t = task();
    link.cancel(t).await;
    let r = link.result().await;
    assert_eq!((r.task_id.clone(), r.outcome.clone().unwrap().kind()), (t.to_string(), Ended::CancelledBeforeStart));
    link.orders(vec![hub.order(t, &script("true"), None)]).await;
    assert_eq!(link.result().await.outcome.unwrap().kind(), Ended::CancelledBeforeStart);

    // status, a second daemon, stop
    let status = String::from_utf8(node.call(&["status"]).stdout).unwrap();
    assert!(status.contains("link         up") && status.contains(&hub.inner.node.to_string()), "{status}");
    let second = node.call(&["run"]);
    assert_eq!(second.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&second.stderr).contains("a daemon runs already"));
    // It is told beside the link, in its own time.
    let healthy = async {
        while hub.knobs().health == 0 {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, healthy).await.expect("the node's health");
    let stopped = node.call(&["stop"]);
    assert!(String::from_utf8_lossy(&stopped.stdout).contains("stopped: daemon, tasks and warden"), "{stopped:?}");
    assert_eq!(node.wait(), Some(0));
    assert!(!node.dir.join("warden.sock").exists());
    let again = node.call(&["join", node.invite.to_str().unwrap()]);
    assert_eq!(again.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&again.stderr).contains("is enrolled already"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn input_is_taken_from_this_hub_alone_and_outlives_the_daemon() {
    use mesh_core::seal::payload_type;
    use mesh_wire::node::input_answer::Code;
    use prost::Message;
    let mut hub = support::start().await;
    let (mut node, mut link) = Node::up(&mut hub).await;
    let t = task();
    assert_eq!(link.input(t, 1, b"x", false).await, (Code::NotRunning, 0), "an attempt that nobody knows here");
    let mut open = script("cat; sleep 600");
    if let Spec::Shell(s) = &mut open {
        s.stdin_open = true;
    }
    link.orders(vec![hub.order(t, &open, None)]).await;
    link.started().await;
    assert_eq!(link.input(t, 1, b"one,", false).await, (Code::Taken, 1));

    // Forged, for another node, for another link, or said twice: nothing of it reaches the task.
    let good = link.input_body(t, 2, b"FORGED", false);
    let mut altered = link.sealed(payload_type::INPUT, good.encode_to_vec());
    *altered.body.last_mut().unwrap() ^= 1;
    let elsewhere = InputBody { node_id: mesh_core::NodeId::from_bytes([9; 16]).to_string(), ..good.clone() };
    let earlier = InputBody { link_session: vec![9; 16], ..good.clone() };
    let stale = InputBody { seq: 1, ..good };
    for (envelope, code) in [
        (altered, "bad_signature"),
        (link.sealed(payload_type::INPUT, elsewhere.encode_to_vec()), "other_node"),
        (link.sealed(payload_type::INPUT, earlier.encode_to_vec()), "other_link"),
        (link.sealed(payload_type::INPUT, stale.encode_to_vec()), "replayed"),
    ] {
        link.send(hub_frame::Kind::Envelope(envelope)).await;
        let node_frame::Kind::Rejected(r) = link.frame().await else { panic!() };
        assert_eq!(r.code, code);
    }
    assert_eq!(link.input(t, 1, b"again", false).await, (Code::Taken, 1));
    assert_eq!(link.input(t, 3, b"early", false).await, (Code::Gap, 1));

    node.signal(rustix::process::Signal::KILL);
    node.child.take().unwrap().0.wait().unwrap();
    link.ended().await;
    node.start(&["run"]);
    let mut link = hub.link().await;
    link.started().await;
    assert_eq!(link.input(t, 1, b"again", false).await, (Code::Taken, 1), "the warden remembers");
    assert_eq!(link.input(t, 2, b"two", true).await, (Code::Taken, 2));
    assert_eq!(link.input(t, 3, b"late", false).await, (Code::Closed, 2));
    // The cancel must not overtake the command's reading.
    let printed = async {
        while output(&hub, t) != "one,two" {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, printed).await.expect("all pieces, once and in order");
    link.cancel(t).await;
    let r = link.result().await;
    assert_eq!(output(&hub, t), "one,two");
    assert_eq!(link.input(t, 3, b"late", false).await.0, Code::Ended);
    link.acknowledge(&r).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tasks_outlive_the_daemon_and_nothing_is_lost() {
    let mut hub = support::start().await;
    let (mut node, mut link) = Node::up(&mut hub).await;
    let t = task();
    let text = "for i in 1 2 3; do echo before; done; while [ ! -e go ]; do sleep 0.05; done; echo after; exit 7";
    let session = SessionId::from_bytes([8; 16]);
    link.orders(vec![hub.order(t, &script(text), Some(session))]).await;
    link.started().await;
    let folder = std::fs::read_dir(&node.root).unwrap().next().unwrap().unwrap().path().join(session.to_string());
    node.signal(rustix::process::Signal::KILL);
    node.child.take().unwrap().0.wait().unwrap();
    link.ended().await;
    std::fs::write(folder.join("go"), "").unwrap();

    node.start(&["run"]);
    let mut link = hub.link().await;
    assert_eq!(link.hello.attempts.len(), 1, "the warden remembers");
    let r = link.result().await;
    let o = r.outcome.clone().unwrap();
    assert_eq!((o.kind(), o.code), (Ended::Exited, 7));
    assert_eq!(output(&hub, t), "before\nbefore\nbefore\nafter\n");
    // the result is told on every link until it is acknowledged
    link.send(hub_frame::Kind::Goodbye(Goodbye { code: "shutdown".into(), detail: String::new() })).await;
    drop(link);
    let mut link = hub.link().await;
    assert_eq!(link.hello.attempts.iter().filter(|a| a.ended).count(), 1);
    let r = link.result().await;
    link.acknowledge(&r).await;

    // SIGTERM leaves tasks alone
    let t = task();
    link.orders(vec![hub.order(t, &script("sleep 100"), None)]).await;
    link.started().await;
    node.signal(rustix::process::Signal::TERM);
    assert_eq!(node.wait(), Some(0));
    let status = String::from_utf8(node.call(&["status"]).stdout).unwrap();
    assert!(status.contains("not running") && status.contains(&t.to_string()), "{status}");
    node.start(&["run"]);
    let mut link = hub.link().await;
    assert_eq!(link.hello.attempts.iter().filter(|a| !a.ended).count(), 1);

    // a revocation ends them
    link.started().await;
    link.send(hub_frame::Kind::Goodbye(Goodbye { code: "revoked".into(), detail: "by its owner".into() })).await;
    assert_eq!(node.wait(), Some(3));
    assert!(folder.join("go").exists(), "the workspace stays");
    assert!(!node.dir.join("warden.sock").exists());
}

/// The machine's own record, newest last: how each attempt ended.
fn record(node: &Node) -> Vec<(String, String)> {
    let out = String::from_utf8(node.call(&["log", "--output", "json"]).stdout).unwrap();
    let lines = out.lines().map(|l| serde_json::from_str::<serde_json::Value>(l).unwrap());
    lines.map(|l| (l["task"].as_str().unwrap().to_owned(), l["end"].as_str().unwrap_or_default().to_owned())).collect()
}
/// The next word of the node about its owner, and what follows from it.
async fn standing(link: &mut Link) -> (u32, String) {
    loop {
        match link.frame().await {
            node_frame::Kind::Standing(s) => return (s.max_tasks, s.closed),
            node_frame::Kind::Started(_) => {}
            other => panic!("{other:?}"),
        }
    }
}
/// Puts a file into the data folder as a whole: nobody sees a part of it.
fn put(node: &Node, name: &str, text: &str) {
    let part = node.dir.join("part");
    std::fs::write(&part, text).unwrap();
    std::fs::rename(part, node.dir.join(name)).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hub_that_asks_all_the_same_gets_nothing() {
    let mut hub = support::start().await;
    let (mut node, mut link) = Node::up(&mut hub).await;
    assert_eq!((link.hello.max_tasks, link.hello.closed.as_str()), (4, ""));
    let gate = node.dir.parent().unwrap().join("gate");
    let waits = script(&format!("while [ ! -e {} ]; do sleep 0.05; done", gate.display()));

    // More at once than the ceiling lets it, with what is to be pulled, too.
    put(&node, "ceiling.yaml", "max_tasks: 1");
    assert_eq!(standing(&mut link).await, (1, String::new()));
    let (first, second, pulled) = (task(), task(), task());
    link.orders(vec![hub.order(first, &waits, None), hub.order(second, &waits, None)]).await;
    link.orders(vec![hub.order(pulled, &shell("cat", vec![b'z'; 300_000]), None)]).await;
    let mut late = vec![];
    while late.len() < 2 {
        let r = link.result().await;
        assert_eq!(r.outcome.as_ref().unwrap().kind(), Ended::Late, "{r:?}");
        link.acknowledge(&r).await;
        late.push(r.task_id);
    }
    assert_eq!(late, [second.to_string(), pulled.to_string()]);
    let over = "refused: ceiling: max_tasks: 1, and as many run";
    let rest = late.iter().map(|t| (t.clone(), over.to_owned()));
    assert_eq!(record(&node), std::iter::once((first.to_string(), String::new())).chain(rest).collect::<Vec<_>>());

    // Anything at all from a node that is closed. What runs goes on.
    for (close, word) in [("disabled", "disabled"), ("ceiling.yaml", "ceiling_unreadable")] {
        put(&node, close, "nonsense");
        let said = standing(&mut link).await;
        assert_eq!(said.1, word);
        let asked = task();
        let echo = Spec::Echo { payload: b"hi".to_vec() };
        link.orders(vec![hub.order(asked, &echo, None)]).await;
        let r = link.result().await;
        assert_eq!((r.task_id.clone(), r.outcome.as_ref().unwrap().kind()), (asked.to_string(), Ended::Late));
        link.acknowledge(&r).await;
        assert_eq!(record(&node).last().unwrap(), &(asked.to_string(), format!("refused: {word}")));
        if close == "disabled" {
            std::fs::remove_file(node.dir.join(close)).unwrap();
            assert_eq!(standing(&mut link).await, (1, String::new()));
        }
    }
    // The next link begins with it.
    node.signal(rustix::process::Signal::TERM);
    assert_eq!(node.wait(), Some(0));
    node.start(&["run"]);
    let mut link = hub.link().await;
    assert_eq!(link.hello.closed, "ceiling_unreadable");
    assert_eq!(link.hello.attempts.len(), 1);
    std::fs::write(&gate, "").unwrap();
    let r = link.result().await;
    assert_eq!((r.task_id.clone(), r.outcome.as_ref().unwrap().kind()), (first.to_string(), Ended::Exited));
    link.acknowledge(&r).await;

    // What no program can be called by is no program under any ceiling.
    put(&node, "ceiling.yaml", "allow: [{ program: id }]");
    assert_eq!(standing(&mut link).await, (4, String::new()));
    for name in ["", "id\0", "\0"] {
        let program = Program::Argv(vec![name.into()]);
        let spec = Spec::Shell(Shell { program, cwd: String::new(), env: Default::default(), stdin: vec![], stdin_open: false });
        link.orders(vec![hub.order(task(), &spec, None)]).await;
        let r = link.result().await;
        let o = r.outcome.clone().unwrap();
        assert_eq!((o.kind(), o.reason_code.as_str()), (Ended::Refused, "bad_request"), "{name:?}: {o:?}");
        link.acknowledge(&r).await;
    }
}

/// The next word about an order that was sent ahead; results on the way are put aside.
async fn ahead_word(link: &mut Link, results: &mut Vec<TaskResult>) -> node_frame::Kind {
    loop {
        match link.frame().await {
            node_frame::Kind::Result(r) => results.push(r),
            other => return other,
        }
    }
}
async fn is_kept(link: &mut Link, t: TaskId) {
    let node_frame::Kind::Kept(k) = link.frame().await else { panic!("it is not kept") };
    assert_eq!((k.task_id, k.attempt), (t.to_string(), 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_order_ahead_asks_for_its_place_and_runs_once_it_is_granted() {
    let mut hub = support::start().await;
    let (mut node, mut link) = Node::up_with(&mut hub, 1).await;
    assert_eq!(link.hello.keeps, 64);
    let (first, session) = (task(), SessionId::from_bytes([9; 16]));
    link.orders(vec![hub.order(first, &script("while [ ! -e go ]; do sleep 0.05; done"), Some(session))]).await;
    link.started().await;
    let counts = script("echo x >> count; wc -l < count");
    let t = task();
    let go = hub.order(t, &counts, Some(session));
    // The window of an order that may not start yet is that of its grant.
    let ahead = Order { granted: false, start_before_ms: 1, ..go.clone() };
    link.orders(vec![ahead.clone()]).await;
    is_kept(&mut link, t).await;
    link.orders(vec![ahead.clone()]).await;
    is_kept(&mut link, t).await;
    // Another spec under the same attempt is no order at all.
    link.orders(vec![Order { granted: false, ..hub.order(t, &script("echo other"), Some(session)) }]).await;
    let node_frame::Kind::Rejected(r) = link.frame().await else { panic!() };
    assert_eq!(r.code, "conflict");
    // One that the hub takes back is forgotten without a word; had it been said, it would come next.
    let moved = task();
    link.orders(vec![Order { granted: false, ..hub.order(moved, &counts, Some(session)) }]).await;
    is_kept(&mut link, moved).await;
    link.cancel(moved).await;

    let folder = std::fs::read_dir(&node.root).unwrap().next().unwrap().unwrap().path().join(session.to_string());
    std::fs::write(folder.join("go"), "").unwrap();
    let mut results = vec![];
    for round in 0..2 {
        // Said again when no answer comes, and nothing starts.
        let node_frame::Kind::Ready(r) = ahead_word(&mut link, &mut results).await else { panic!("not asked in round {round}") };
        assert_eq!((&r.task_id, r.attempt), (&t.to_string(), 1));
        assert_eq!(r.ended.iter().map(|e| e.task_id.clone()).collect::<Vec<_>>(), [first.to_string()], "what made the place");
    }
    // The link is cut between that and the answer: the grant comes on the next, where the order is unknown.
    link.send(hub_frame::Kind::Goodbye(Goodbye { code: "shutdown".into(), detail: String::new() })).await;
    drop(link);
    let mut link = hub.link().await;
    assert_eq!(link.hello.attempts.iter().map(|a| a.task_id.clone()).collect::<Vec<_>>(), [first.to_string()]);
    assert!(!folder.join("count").exists(), "nothing ran without leave");
    link.orders(vec![go.clone()]).await;
    link.orders(vec![go.clone()]).await;
    let mut seen = 0;
    while seen < 2 {
        let r = link.result().await;
        link.acknowledge(&r).await;
        seen += usize::from(r.task_id == first.to_string()) + usize::from(r.task_id == t.to_string());
    }
    assert_eq!(output(&hub, t).trim(), "1");

    // The daemon dies with what it keeps: the next one has forgotten it, and runs what is granted.
    let t = task();
    let go = hub.order(t, &counts, Some(session));
    link.orders(vec![hub.order(task(), &script("sleep 600"), None)]).await;
    while !matches!(link.frame().await, node_frame::Kind::Started(_)) {}
    link.orders(vec![Order { granted: false, ..go.clone() }]).await;
    while !matches!(link.frame().await, node_frame::Kind::Kept(_)) {}
    node.signal(rustix::process::Signal::KILL);
    node.child.take().unwrap().0.wait().unwrap();
    link.ended().await;
    node.start(&["run"]);
    let mut link = hub.link().await;
    assert!(!link.hello.attempts.iter().any(|a| a.task_id == t.to_string()));
    link.orders(vec![go]).await;
    let r = link.result().await;
    assert_eq!(r.task_id, t.to_string());
    assert_eq!(output(&hub, t).trim(), "2");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_certificate_is_renewed_make_before_break() {
    let mut hub = support::start().await;
    // two thirds of its life are over at once
    hub.knobs().certificate = (1_000, 100_000);
    let (node, mut first) = Node::up(&mut hub).await;
    let mut second = hub.link().await;
    assert_eq!(hub.knobs().renewals, [2]);
    let _ = first.send(hub_frame::Kind::Goodbye(Goodbye { code: "superseded".into(), detail: String::new() })).await;
    first.ended().await;
    let t = task();
    second.orders(vec![hub.order(t, &Spec::Echo { payload: b"x".to_vec() }, None)]).await;
    assert_eq!(second.result().await.task_id, t.to_string());
    drop(node);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_asks_for_a_new_certificate_when_its_own_has_ended() {
    let mut hub = support::start().await;
    // It has ended when it comes: the link can only be made with another.
    hub.knobs().certificate = (-5, 100);
    hub.knobs().refuse_recovery = vec![tonic::Status::unavailable("try again"), tonic::Status::unauthenticated("not registered here")];
    let (mut node, link) = Node::up(&mut hub).await;
    assert_eq!(hub.knobs().recoveries, [2, 2, 2], "asked again under the same counter, and for ever");
    drop(link);

    // The hub says so while this machine's clock sees nothing wrong.
    node.signal(rustix::process::Signal::TERM);
    assert_eq!(node.wait(), Some(0));
    hub.knobs().ended = true;
    node.start(&["run"]);
    let mut link = hub.link().await;
    assert_eq!(hub.knobs().recoveries, [2, 2, 2, 3]);
    let t = task();
    link.orders(vec![hub.order(t, &Spec::Echo { payload: b"x".to_vec() }, None)]).await;
    assert_eq!(link.result().await.task_id, t.to_string());

    // Too late: it says what to do, its tasks go on.
    let t = task();
    link.orders(vec![hub.order(t, &script("sleep 100"), None)]).await;
    while link.started().await.task_id != t.to_string() {}
    node.signal(rustix::process::Signal::TERM);
    assert_eq!(node.wait(), Some(0));
    hub.knobs().ended = true;
    hub.knobs().refuse_recovery = vec![tonic::Status::failed_precondition("recover_too_late: it ended")];
    node.start(&["run"]);
    let begun = mesh_process::SystemClock::new();
    let expired = || std::fs::read_to_string(node.dir.join("status.json")).is_ok_and(|s| s.contains("\"expired\""));
    while !expired() {
        assert!(mesh_process::Clock::steady(&begun) < PATIENCE, "it does not say that it is too late");
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    let status = String::from_utf8(node.call(&["status"]).stdout).unwrap();
    assert!(status.contains("link         expired") && status.contains("join anew") && status.contains(&t.to_string()), "{status}");
    assert_eq!(hub.knobs().recoveries, [2, 2, 2, 3, 4]);

    // The next start asks again; a revocation is the last word.
    node.signal(rustix::process::Signal::TERM);
    assert_eq!(node.wait(), Some(0));
    hub.knobs().refuse_recovery = vec![tonic::Status::permission_denied("revoked: by its owner")];
    node.start(&["run"]);
    assert_eq!(node.wait(), Some(3));
    assert!(!node.dir.join("warden.sock").exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn refusals_are_shown_as_the_hub_said_them() {
    let hub = support::start().await;
    hub.knobs().revoked = true;
    let node = Node::new(&hub);
    let invite = node.invite.to_str().unwrap();
    let out = node.call(&["join", invite, "--enroll-only"]);
    assert_eq!(out.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&out.stderr).contains("the hub refused: the invite was used before"), "{out:?}");
    let key = std::fs::read(node.dir.join("identity.key")).unwrap();
    // the secret stays for another try, with the same key
    hub.knobs().revoked = false;
    let out = node.call(&["join", invite, "--enroll-only"]);
    assert_eq!(out.status.code(), Some(0), "{out:?}");
    assert_eq!(std::fs::read(node.dir.join("identity.key")).unwrap(), key);
    assert!(!node.dir.join("warden.sock").exists(), "--enroll-only starts nothing");

    // a hub that is not the pinned one gets no proof
    let other = support::start().await;
    let node = Node::new(&other);
    let text = std::fs::read_to_string(&node.invite).unwrap().replace(&other.address, &hub.address);
    std::fs::write(&node.invite, text).unwrap();
    let out = node.call(&["join", node.invite.to_str().unwrap()]);
    assert_eq!(out.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&out.stderr).contains("ca_pin"), "{out:?}");

    // what cannot be
    assert_eq!(node.call(&["leave", "--x"]).status.code(), Some(2));
    assert_eq!(node.call(&["run"]).status.code(), Some(1));
    std::fs::write(&node.invite, "hub: 3").unwrap();
    let out = node.call(&["join", node.invite.to_str().unwrap()]);
    assert_eq!(out.status.code(), Some(2));
}

/// The warden of a data folder, by its command line. The inits of its tasks have the same, and are its
/// children; their numbers may be lower.
fn warden_pid(dir: &Path) -> rustix::process::Pid {
    let dir = dir.canonicalize().unwrap();
    let alike = std::fs::read_dir("/proc").unwrap().flatten().filter_map(|e| {
        let pid: i32 = e.file_name().to_str()?.parse().ok()?;
        let line = std::fs::read(e.path().join("cmdline")).ok()?;
        let words: Vec<&[u8]> = line.split(|b| *b == 0).collect();
        if words.get(1) != Some(&&b"warden"[..]) || words.get(3) != Some(&dir.as_os_str().as_encoded_bytes()) {
            return None;
        }
        let stat = std::fs::read_to_string(e.path().join("stat")).ok()?;
        let parent: i32 = stat.rsplit_once(") ")?.1.split(' ').nth(1)?.parse().ok()?;
        Some((pid, parent))
    });
    let alike: Vec<(i32, i32)> = alike.collect();
    let warden = alike.iter().find(|(_, parent)| !alike.iter().any(|(pid, _)| pid == parent));
    rustix::process::Pid::from_raw(warden.expect("no warden runs").0).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn output_survives_broken_links_byte_by_byte() {
    let mut hub = support::start().await;
    let (node, mut link) = Node::up(&mut hub).await;
    let (noisy, quiet) = (task(), task());
    let text = "i=0; while [ $i -lt 40 ]; do seq 1 20000; i=$((i+1)); sleep 0.01; done";
    link.orders(vec![hub.order(noisy, &script(text), None)]).await;
    link.started().await;
    for _ in 0..2 {
        link.send(hub_frame::Kind::Goodbye(Goodbye { code: "shutdown".into(), detail: String::new() })).await;
        drop(link);
        link = hub.link().await;
    }
    link.orders(vec![hub.order(quiet, &script("echo quiet"), None)]).await;
    let mut ends = vec![];
    while ends.len() < 2 {
        let r = link.result().await;
        link.acknowledge(&r).await;
        ends.push(r.task_id);
    }
    let once: String = (1..=20_000).map(|n| format!("{n}\n")).collect();
    assert!(output(&hub, noisy) == once.repeat(40), "{} bytes", output(&hub, noisy).len());
    assert_eq!(output(&hub, quiet), "quiet\n");
    drop(node);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_warden_loses_its_tasks_and_says_so() {
    let mut hub = support::start().await;
    let (node, mut link) = Node::up(&mut hub).await;
    let t = task();
    link.orders(vec![hub.order(t, &script("echo seen; sleep 100"), None)]).await;
    link.started().await;
    rustix::process::kill_process(warden_pid(&node.dir), rustix::process::Signal::KILL).unwrap();
    let r = link.result().await;
    assert_eq!((r.task_id.clone(), r.outcome.clone().unwrap().kind()), (t.to_string(), Ended::Lost));
    link.acknowledge(&r).await;
    // and the next one serves
    let t = task();
    let order = hub.order(t, &script("exit 3"), None);
    link.orders(vec![order.clone()]).await;
    let r = link.result().await;
    assert_eq!((r.task_id.clone(), r.outcome.clone().unwrap().code), (t.to_string(), 3));
    // another spec under the same number runs nothing
    let other = hub.order(t, &script("exit 4"), None);
    link.orders(vec![other]).await;
    let node_frame::Kind::Rejected(r) = link.frame().await else { panic!() };
    assert_eq!(r.code, "conflict");
    drop(node);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_superseded_node_waits_and_says_so() {
    let mut hub = support::start().await;
    let (mut node, mut link) = Node::up(&mut hub).await;
    link.send(hub_frame::Kind::Goodbye(Goodbye { code: "superseded".into(), detail: String::new() })).await;
    link.ended().await;
    loop {
        let status = String::from_utf8(node.call(&["status"]).stdout).unwrap();
        if status.contains("link         superseded") {
            assert!(status.contains("5 minutes"), "{status}");
            break;
        }
        assert!(!status.contains("link         connecting"), "{status}");
    }
    assert!(hub.no_link_yet());
    // an answer that says revoked ends it too
    node.signal(rustix::process::Signal::TERM);
    assert_eq!(node.wait(), Some(0));
    hub.knobs().revoked = true;
    node.start(&["run"]);
    assert!(node.line().contains("was revoked by its hub"));
    assert_eq!(node.wait(), Some(3));
}

/// The daemon's number is nobody's any more when it is told: it was just ending by itself.
#[test]
fn a_stop_beside_a_daemon_that_is_ending_is_no_error() {
    use std::io::Write;
    let dir = tempfile::tempdir().unwrap();
    let data = cortex_node::state::DataDir::new(dir.path().to_owned());
    let held = mesh_process::files::Lock::try_take(&data.lock()).unwrap().unwrap();
    // Opened by both sides only when it is read.
    #[expect(clippy::disallowed_methods, reason = "a pipe with a name is made by a program")]
    let made = std::process::Command::new("mkfifo").arg(data.pid()).status().unwrap();
    assert!(made.success());
    let mut stop = program();
    stop.arg("stop").env("CORTEX_NODE_DATA_DIR", dir.path()).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let stop = stop.spawn().unwrap();
    let mut read = std::fs::OpenOptions::new().write(true).open(data.pid()).unwrap();
    std::fs::remove_file(data.pid()).unwrap();
    // More than any machine counts to.
    read.write_all(b"2000000000\n").unwrap();
    drop((read, held));
    let out = stop.wait_with_output().unwrap();
    assert!(out.status.success() && String::from_utf8_lossy(&out.stdout).contains("stopped"), "{out:?}");
}

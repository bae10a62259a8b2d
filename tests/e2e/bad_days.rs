//! What happens to machines: killed daemons and wardens, a lid that is closed, a clock that jumps, a disk
//! that is full, a folder that was copied.
#![expect(clippy::disallowed_methods, reason = "tests start the real binaries and watch the real clock")]

use mesh_process::{Clock, SharedClock, SystemClock};
use mesh_tests::{Hub, Node, alive, program, shown, signal, text, until};
use node::state::DataDir;
use rustix::process::Signal;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant};

/// A task that counts aloud until it is told to end, and notes each of its runs.
struct Counting {
    id: String,
    gate: PathBuf,
    runs: PathBuf,
}

impl Counting {
    async fn start(hub: &Hub, node: &Node, name: &str) -> Self {
        let (gate, runs) = (node.dir.path().join(format!("{name}.gate")), node.dir.path().join(format!("{name}.runs")));
        std::fs::write(&runs, "").unwrap();
        std::fs::set_permissions(&runs, std::os::unix::fs::PermissionsExt::from_mode(0o666)).unwrap();
        let script = format!(
            "echo run >> {runs}; i=0; while [ ! -e {gate} ]; do i=$((i+1)); echo $i; sleep 0.02; done; echo last $i",
            runs = runs.display(),
            gate = gate.display()
        );
        let t = hub.dispatch(json!({"node": node.id, "shell": {"argv": ["sh", "-c", script]}})).await;
        let new = Self { id: text(&t, "id"), gate, runs };
        // Its output comes by another stream than the word that it runs.
        hub.task_when(&new.id, "to run", |t| t["state"] == "running").await;
        new.goes_on(hub).await;
        new
    }
    async fn lines(&self, hub: &Hub) -> usize {
        hub.output(&self.id, "?stream=stdout").await.iter().filter(|b| **b == b'\n').count()
    }
    async fn goes_on(&self, hub: &Hub) {
        let before = self.lines(hub).await;
        until("more output", async || (self.lines(hub).await > before + 3).then_some(())).await;
    }
    fn mark(&self) -> String {
        self.gate.display().to_string()
    }
    fn open(&self) {
        std::fs::write(&self.gate, "").unwrap();
    }
    /// It ended well, ran once, and each line is there once.
    async fn whole(&self, hub: &Hub) {
        let t = hub.finished(&self.id).await;
        assert_eq!((t["state"].as_str(), t["attempt"].as_u64()), (Some("succeeded"), Some(1)), "{t}");
        let out = String::from_utf8(hub.output(&self.id, "?stream=stdout").await).unwrap();
        let lines: Vec<&str> = out.lines().collect();
        let last = lines.len() - 1;
        assert_eq!(lines[last], format!("last {last}"));
        assert!(lines[..last].iter().enumerate().all(|(i, n)| *n == (i + 1).to_string()), "whole, once, in order");
        assert_eq!(std::fs::read_to_string(&self.runs).unwrap(), "run\n", "it ran once");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tasks_outlive_five_daemons_and_end_with_their_warden() {
    let hub = Hub::start().await;
    let mut node = Node::join(&hub, "n").await;
    let counting = Counting::start(&hub, &node, "a").await;
    let warden = node.warden().unwrap();
    for _ in 0..5 {
        node.daemon().kill9();
        node.run();
        counting.goes_on(&hub).await;
    }
    assert_eq!(node.warden(), Some(warden), "it is the same one still");
    counting.open();
    counting.whole(&hub).await;

    // One ends while nobody looks after its warden, one is at work; then the warden is killed.
    let ended = Counting::start(&hub, &node, "b").await;
    let busy = Counting::start(&hub, &node, "c").await;
    node.daemon().kill9();
    ended.open();
    until("the first to have ended on its node", async || {
        let out = node.command(&["status"]).output().unwrap();
        (out.status.success() && !shown(&out).contains(&ended.id)).then_some(())
    })
    .await;
    assert!(!alive(&busy.mark()).is_empty());
    signal(node.warden().unwrap(), Signal::KILL);
    until("nothing of the second to be left", async || alive(&busy.mark()).is_empty().then_some(())).await;
    node.run();
    ended.whole(&hub).await;
    let t = hub.finished(&busy.id).await;
    let reason = (t["reason"]["code"].as_str(), t["reason"]["detail"].as_str());
    assert_eq!((t["state"].as_str(), reason), (Some("failed"), (Some("lost"), Some("warden_ended"))), "{t}");
    let out = String::from_utf8(hub.output(&busy.id, "?stream=stdout").await).unwrap();
    assert!(out.lines().count() > 3 && out.lines().enumerate().all(|(i, n)| n == (i + 1).to_string()), "what it said is kept");
    assert_eq!(std::fs::read_to_string(&busy.runs).unwrap(), "run\n", "and it is not started again");
    assert_eq!(hub.sh("echo on").await["stdout"], "on\n");
}

/// Waits until no more output has come for so long.
async fn stands_still(task: &Counting, hub: &Hub, rest: Duration) {
    let mut seen = (0, Instant::now());
    until("the output to stand still", async || {
        let lines = task.lines(hub).await;
        if lines != seen.0 {
            seen = (lines, Instant::now());
        }
        (seen.1.elapsed() > rest).then_some(())
    })
    .await;
}

/// All processes of a node and of its tasks, stopped at once.
fn everything(node: &Node, task: &Counting) -> Vec<u32> {
    let mut all = alive(&node.data().display().to_string());
    all.extend(alive(&task.mark()));
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn a_laptop_sleeps_in_the_middle_of_everything() {
    let hub = Hub::start().await;
    let node = Node::join(&hub, "n").await;
    let path = format!("/api/v1/nodes/{}", node.id);
    let counting = Counting::start(&hub, &node, "a").await;

    // The warden alone: its node is there, and the task waits for it.
    let warden = node.warden().unwrap();
    signal(warden, Signal::STOP);
    // An answer of the daemon that needs no warden.
    let t = hub.dispatch(json!({"node": node.id, "echo": {"payload": "awake"}, "wait_secs": 20})).await;
    assert_eq!((t["state"].as_str(), hub.get(&path).await["status"].as_str()), (Some("succeeded"), Some("online")), "{t}");
    stands_still(&counting, &hub, Duration::from_secs(1)).await;
    signal(warden, Signal::CONT);
    counting.goes_on(&hub).await;

    // All of it, for longer than the hub believes in it.
    let all = everything(&node, &counting);
    assert!(all.len() >= 4, "daemon, warden, the first process of the task, and the task: {all:?}");
    all.iter().for_each(|p| signal(*p, Signal::STOP));
    node.offline(&hub).await;
    let t = hub.task(&counting.id).await;
    assert_eq!((t["state"].as_str(), t["waiting"]["code"].as_str()), (Some("running"), Some("in_doubt")), "{t}");
    let waiting = text(&hub.dispatch(json!({"node": node.id, "shell": {"argv": ["echo", "morning"]}})).await, "id");
    all.iter().for_each(|p| signal(*p, Signal::CONT));
    until("the node to be back", async || (hub.get(&path).await["status"] == "online").then_some(())).await;
    counting.goes_on(&hub).await;
    assert_eq!(hub.finished(&waiting).await["stdout"], "morning\n");
    counting.open();
    counting.whole(&hub).await;
}

/// A wall clock that the test sets; steady time goes on as it does.
struct Wrong(SystemClock, AtomicI64);

impl Wrong {
    fn set(&self, hours: i64) {
        self.1.store(hours * 3_600_000, Ordering::Release);
    }
}

impl Clock for Wrong {
    fn now_ms(&self) -> i64 {
        self.0.now_ms() + self.1.load(Ordering::Acquire)
    }
    fn steady(&self) -> Duration {
        self.0.steady()
    }
    fn anchored_ms(&self) -> i64 {
        self.0.anchored_ms()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_nodes_clock_may_be_days_off_and_jump() {
    mesh_process::install_tls_provider();
    let mut hub = Hub::start().await;
    let (_, yaml) = hub.invite(json!({"name": "n"})).await;
    let mut node = Node::prepare("n", &yaml);
    let out = node.command(&["join", "invite.yaml", "--enroll-only"]).output().unwrap();
    assert!(out.status.success(), "{}", shown(&out));
    let clock = Arc::new(Wrong(SystemClock::new(), AtomicI64::new(0)));
    clock.set(-24);
    let (dir, given): (_, SharedClock) = (DataDir::new(node.data()), clock.clone());
    // The daemon in this process, so that its clock can be given; its warden is a process as ever.
    let daemon = tokio::spawn(async move { node::daemon::run(dir, &program("cortex-node"), given).await.unwrap() });
    node.online(&hub).await;
    let path = format!("/api/v1/nodes/{}", node.id);
    let certificate = text(&hub.get(&path).await, "certificate_not_after");
    let counting = Counting::start(&hub, &node, "a").await;
    // A day ahead, days back, weeks ahead: a task that runs, one that begins, one with a limit.
    for hours in [24, -72, 24 * 40] {
        clock.set(hours);
        counting.goes_on(&hub).await;
        let body = json!({"node": node.id, "shell": {"argv": ["echo", "in time"]}, "timeout_secs": 60, "wait_secs": 20});
        let t = hub.finished(&text(&hub.dispatch(body).await, "id")).await;
        assert_eq!((t["state"].as_str(), t["stdout"].as_str()), (Some("succeeded"), Some("in time\n")), "{hours} h off: {t}");
        // And a new link, which looks at certificates.
        hub.crash_and_restart().await;
        node.online(&hub).await;
    }
    counting.open();
    counting.whole(&hub).await;
    assert_eq!(text(&hub.get(&path).await, "certificate_not_after"), certificate, "nothing was renewed for it");
    // The daemon is this process, which takes the signal for it.
    let out = tokio::task::spawn_blocking(move || {
        let out = node.command(&["stop"]).output().unwrap();
        (out, node)
    });
    let (out, _node) = out.await.unwrap();
    assert!(out.status.success(), "{}", shown(&out));
    assert_eq!(daemon.await.unwrap(), node::link::engine::Exit::Stopped);
}

/// A disk of a few megabytes, mounted while it lives.
struct Disk(PathBuf);

impl Disk {
    fn mount(at: PathBuf) -> Self {
        std::fs::create_dir_all(&at).unwrap();
        let out = Command::new("mount").args(["-t", "tmpfs", "-o", "size=16m,mode=711", "tmpfs"]).arg(&at).output().unwrap();
        assert!(out.status.success(), "this test needs leave to mount (root, or unshare -rm): {}", shown(&out));
        Self(at)
    }
    fn fill(&self) {
        let mut file = std::fs::File::create(self.0.join("ballast")).unwrap();
        for part in [1 << 20, 4096, 1] {
            let bytes = vec![1; part];
            while std::io::Write::write_all(&mut file, &bytes).is_ok() {}
        }
    }
    fn clear(&self) {
        std::fs::remove_file(self.0.join("ballast")).unwrap();
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Lazily: the node in it may still be ending.
        let _ = Command::new("umount").arg("-l").arg(&self.0).output();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_spool_disk_holds_tasks_up_and_loses_nothing() {
    let mut hub = Hub::start().await;
    let (_, yaml) = hub.invite(json!({"name": "n"})).await;
    let mut node = Node::prepare("n", &yaml);
    let disk = Disk::mount(node.data());
    let out = node.command(&["join", "invite.yaml", "--enroll-only"]).output().unwrap();
    assert!(out.status.success(), "{}", shown(&out));
    node.run();
    node.online(&hub).await;
    let counting = Counting::start(&hub, &node, "a").await;
    disk.fill();
    // A page that was begun is written to its end; then nothing more comes, and the task waits for its pipe.
    stands_still(&counting, &hub, Duration::from_secs(3)).await;
    let path = format!("/api/v1/nodes/{}", node.id);
    assert_eq!(
        (hub.get(&path).await["status"].as_str(), hub.task(&counting.id).await["state"].as_str()),
        (Some("online"), Some("running"))
    );
    assert!(!alive(&counting.mark()).is_empty());
    // What comes meanwhile waits, or says why it cannot; it does not end the node.
    let meanwhile = text(&hub.dispatch(json!({"node": node.id, "shell": {"argv": ["echo", "meanwhile"]}})).await, "id");
    hub.crash_and_restart().await;
    node.online(&hub).await;
    disk.clear();
    counting.goes_on(&hub).await;
    let t = hub.finished(&meanwhile).await;
    assert_eq!((t["state"].as_str(), t["stdout"].as_str()), (Some("succeeded"), Some("meanwhile\n")), "{t}");
    counting.open();
    counting.whole(&hub).await;
    assert_eq!(hub.sh("echo after").await["stdout"], "after\n");
    drop(node);
    drop(disk);
}

/// Takes a data folder to another machine, as it were.
fn copy(from: &Path, to: &Path) {
    let out = Command::new("cp").arg("-a").arg(from).arg(to).output().unwrap();
    assert!(out.status.success(), "{}", shown(&out));
}

async fn said(node: &Node, what: &str) {
    until(&format!("status to say {what}"), async || {
        let out = node.command(&["status"]).output().unwrap();
        shown(&out).contains(what).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_machines_with_one_identity_are_held_and_told_of() {
    let hub = Hub::start().await;
    let mut first = Node::join(&hub, "n").await;
    let path = format!("/api/v1/nodes/{}", first.id);
    first.daemon().terminate().await;
    first.offline(&hub).await;
    let (_, unused) = hub.invite(json!({"name": "unused"})).await;
    let mut second = Node::prepare("n", &unused);
    copy(&first.data(), &second.data());
    first.run();
    first.online(&hub).await;
    let counting = Counting::start(&hub, &first, "a").await;
    // One that restarts, or comes back over a dead connection, is no copy.
    for _ in 0..3 {
        first.daemon().kill9();
        first.run();
        counting.goes_on(&hub).await;
    }
    let n = hub.get(&path).await;
    assert_eq!((n["schedulable"]["ok"].as_bool(), n["notices"].as_array().map(Vec::len)), (Some(true), Some(0)), "{n}");

    // The first supersession: the older link hears it, and its machine stays away.
    second.run();
    said(&first, "superseded").await;
    said(&first, "5 minutes").await;
    let n = hub.get(&path).await;
    assert_eq!((n["status"].as_str(), n["schedulable"]["ok"].as_bool()), (Some("online"), Some(true)), "{n}");
    // What runs on the first is neither lost for it nor sent to the second.
    assert_eq!(hub.task(&counting.id).await["state"], "running");
    // The second one within ten minutes.
    first.daemon().kill9();
    first.run();
    let held = async |n: &Value| n["schedulable"]["reason"] == "superseded";
    // Its links end for it, which takes a moment more.
    let n = until("the identity to be held", async || {
        let n = hub.get(&path).await;
        (held(&n).await && n["status"] == "offline").then_some(n)
    })
    .await;
    assert_eq!(n["schedulable"]["ok"], false, "{n}");
    let notices = n["notices"].as_array().unwrap();
    assert!(notices.len() == 1 && notices[0].as_str().unwrap().contains("two machines"), "{n}");
    for node in [&first, &second] {
        said(node, "superseded").await;
        said(node, "two machines use this node's identity").await;
    }
    // Both are, however often they come.
    second.daemon().kill9();
    second.run();
    said(&second, "two machines use this node's identity").await;
    assert!(held(&hub.get(&path).await).await);
    let t = hub.dispatch(json!({"node": first.id, "shell": {"argv": ["true"]}})).await;
    assert_eq!((t["state"].as_str(), t["waiting"]["code"].as_str()), (Some("pending"), Some("node_offline")), "{t}");
    assert_eq!(std::fs::read_to_string(&counting.runs).unwrap(), "run\n", "nothing ran twice");
    counting.open();
    until("its task to have ended there", async || alive(&counting.mark()).is_empty().then_some(())).await;
}

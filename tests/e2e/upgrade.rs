//! A node's program is replaced under running tasks: the warden of before serves them until it is empty, the
//! new one takes what is new, and whoever is killed between, nothing runs twice.
#![expect(clippy::disallowed_methods, reason = "tests start the real binaries and watch the real clock")]

use mesh_tests::{Hub, Node, Process, alive, program, shown, text, until};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A node whose program can be replaced by another file under the same path.
struct Machine {
    node: Node,
    exe: PathBuf,
}

impl Machine {
    async fn join(hub: &Hub) -> Self {
        let (_, yaml) = hub.invite(json!({"name": "n"})).await;
        let node = Node::prepare("n", &yaml);
        let exe = node.dir.path().join("cortex-node");
        let mut m = Self { node, exe };
        m.install("first");
        let out = m.command(&["join", "invite.yaml", "--enroll-only"]).output().unwrap();
        assert!(out.status.success(), "{}", shown(&out));
        m.run();
        m.node.online(hub).await;
        m
    }
    /// Puts a program of this name in place, as a package manager does: another file under the same path.
    fn install(&self, name: &str) {
        let kept = self.exe.with_file_name(name);
        if !kept.exists() {
            // By a child: a file that is open for writing here, in a process that forks, cannot be run.
            let copied = std::process::Command::new("cp").arg(program("cortex-node")).arg(&kept).status().unwrap();
            assert!(copied.success());
        }
        let fresh = self.exe.with_file_name("fresh");
        std::fs::hard_link(&kept, &fresh).unwrap();
        std::fs::rename(&fresh, &self.exe).unwrap();
        // A rename of two names of one file leaves both.
        let _ = std::fs::remove_file(&fresh);
    }
    fn command(&self, args: &[&str]) -> Command {
        let mut c = Command::new(&self.exe);
        c.args(args).arg("--data-dir").arg(self.node.data()).current_dir(self.node.dir.path());
        c.env("CORTEX_NODE_WORKSPACE_ROOT", self.node.dir.path().join("workspaces")).env("CORTEX_NODE_MAX_TASKS", "8").stdin(Stdio::null());
        c
    }
    fn run(&mut self) {
        self.node.process = Some(Process::start(&mut self.command(&["run"]), self.node.dir.path().join("node.log")));
    }
    /// What an upgrade is: another program, then a restart of the daemon.
    async fn upgrade(&mut self, hub: &Hub, name: &str) {
        self.install(name);
        assert_eq!(self.node.daemon().terminate().await.code(), Some(0));
        self.node.offline(hub).await;
        self.run();
        self.node.online(hub).await;
    }
    /// The warden that lives in a folder of the node, if one does.
    fn warden(&self, seat: &str) -> Option<u32> {
        let home = self.node.data().canonicalize().unwrap();
        mesh_tests::warden(&if seat.is_empty() { home } else { home.join(seat) })
    }
    async fn warden_ends(&self, seat: &str) {
        until("the warden of before to end", async || self.warden(seat).is_none().then_some(())).await;
    }
}

fn kill(pid: Option<u32>) {
    kill_process(Pid::from_raw(pid.expect("it runs") as i32).unwrap(), Signal::KILL).unwrap();
}

/// A task that counts aloud until its gate opens, and notes each of its runs.
struct Counting {
    id: String,
    gate: PathBuf,
    runs: PathBuf,
}

impl Counting {
    async fn start(hub: &Hub, dir: &Path, name: &str) -> Self {
        let (gate, runs) = (dir.join(format!("{name}.gate")), dir.join(format!("{name}.runs")));
        std::fs::write(&runs, "").unwrap();
        std::fs::set_permissions(&runs, std::os::unix::fs::PermissionsExt::from_mode(0o666)).unwrap();
        let script = format!(
            "echo run >> {}; i=0; while [ ! -e {} ]; do i=$((i+1)); echo $i; sleep 0.05; done; echo $i >&2",
            runs.display(),
            gate.display()
        );
        let t = hub.dispatch(json!({"shell": {"argv": ["sh", "-c", script]}})).await;
        let c = Self { id: text(&t, "id"), gate, runs };
        c.goes_on(hub).await;
        c
    }
    async fn lines(&self, hub: &Hub) -> usize {
        hub.output(&self.id, "?stream=stdout").await.iter().filter(|b| **b == b'\n').count()
    }
    async fn goes_on(&self, hub: &Hub) {
        let before = self.lines(hub).await;
        until("its output to go on", async || (self.lines(hub).await > before + 2).then_some(())).await;
    }
    fn ran_once(&self) {
        assert_eq!(std::fs::read_to_string(&self.runs).unwrap(), "run\n");
    }
    /// Lets it end: everything is there, once, in order.
    async fn ends_well(&self, hub: &Hub) {
        std::fs::write(&self.gate, "").unwrap();
        let t = hub.finished(&self.id).await;
        assert_eq!((t["state"].as_str(), t["attempt"].as_u64()), (Some("succeeded"), Some(1)), "{t}");
        let out = String::from_utf8(hub.output(&self.id, "?stream=stdout").await).unwrap();
        assert!(out.lines().enumerate().all(|(i, l)| l == (i + 1).to_string()), "{out}");
        let count = String::from_utf8(hub.output(&self.id, "?stream=stderr").await).unwrap();
        assert_eq!(out.lines().count().to_string(), count.trim());
        self.ran_once();
    }
    async fn is_lost(&self, hub: &Hub) {
        let t = hub.finished(&self.id).await;
        assert_eq!((t["state"].as_str(), t["reason"]["code"].as_str()), (Some("failed"), Some("lost")), "{t}");
        self.ran_once();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn running_tasks_do_not_notice_an_upgrade_nor_a_downgrade() {
    let hub = Hub::start().await;
    let mut m = Machine::join(&hub).await;
    let dir = m.node.dir.path().to_owned();
    let one = Counting::start(&hub, &dir, "one").await;
    let first = m.warden("");
    assert!(first.is_some() && m.warden("w2").is_none());

    // The same program again: nothing changes.
    m.upgrade(&hub, "first").await;
    one.goes_on(&hub).await;
    assert!(m.warden("") == first && m.warden("w2").is_none());

    m.upgrade(&hub, "second").await;
    one.goes_on(&hub).await;
    let two = Counting::start(&hub, &dir, "two").await;
    let second = m.warden("w2");
    assert!(m.warden("") == first && second.is_some());
    let data = m.node.data();
    let has = |seat: &str, t: &Counting| {
        let mut files = std::fs::read_dir(data.join(seat).join("spool/out")).unwrap().flatten();
        files.any(|f| f.file_name().to_str().unwrap().starts_with(&format!("{}-", t.id)))
    };
    assert!(has("", &one) && !has("", &two) && has("w2", &two), "each warden has its own");
    until("both to be shown", async || {
        let shown = std::fs::read_to_string(data.join("status.json")).ok()?;
        (shown.contains(&one.id) && shown.contains(&two.id)).then_some(())
    })
    .await;
    one.ends_well(&hub).await;
    m.warden_ends("").await;
    assert_eq!(m.warden("w2"), second);
    two.goes_on(&hub).await;

    // Back to the program of before, under a task of the newer one.
    m.upgrade(&hub, "first").await;
    two.goes_on(&hub).await;
    let three = Counting::start(&hub, &dir, "three").await;
    assert!(m.warden("").is_some() && m.warden("w2") == second && has("", &three));
    let (status, _) = hub.call("POST", &format!("/api/v1/tasks/{}/cancel", two.id), None).await;
    assert_eq!(status, 202);
    assert_eq!(hub.finished(&two.id).await["state"], "cancelled");
    two.ran_once();
    m.warden_ends("w2").await;
    three.ends_well(&hub).await;
    // And once more: what the folder beside held before is not in the way.
    m.upgrade(&hub, "second").await;
    assert_eq!(hub.sh("echo fresh").await["stdout"], "fresh\n");
    let out = m.command(&["stop"]).output().unwrap();
    assert!(out.status.success(), "{}", shown(&out));
    assert!(m.warden("").is_none() && m.warden("w2").is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_is_killed_between_two_wardens_nothing_runs_twice() {
    let hub = Hub::start().await;
    let mut m = Machine::join(&hub).await;
    let dir = m.node.dir.path().to_owned();
    let [a, b] = [Counting::start(&hub, &dir, "a").await, Counting::start(&hub, &dir, "b").await];
    m.upgrade(&hub, "second").await;
    let [c, d] = [Counting::start(&hub, &dir, "c").await, Counting::start(&hub, &dir, "d").await];

    // The daemon alone: all go on, at both wardens.
    m.node.daemon().kill9();
    m.node.offline(&hub).await;
    m.run();
    m.node.online(&hub).await;
    for t in [&a, &b, &c, &d] {
        t.goes_on(&hub).await;
    }
    b.ends_well(&hub).await;

    // The warden of before: its task is lost, the other's goes on; nobody is left in its place.
    kill(m.warden(""));
    a.is_lost(&hub).await;
    c.goes_on(&hub).await;
    m.warden_ends("").await;
    d.ends_well(&hub).await;

    // Both a warden and the daemon, while one more program comes: memory is found where it lies.
    let e = Counting::start(&hub, &dir, "e").await;
    // It stands still first: a daemon that saw its warden go would start another of its own program.
    m.node.daemon().signal(Signal::STOP);
    kill(m.warden("w2"));
    m.node.daemon().kill9();
    m.install("third");
    m.run();
    c.is_lost(&hub).await;
    e.is_lost(&hub).await;
    m.node.online(&hub).await;
    let f = Counting::start(&hub, &dir, "f").await;

    // All of them at once, with an end that nobody has heard yet.
    m.upgrade(&hub, "fourth").await;
    let g = Counting::start(&hub, &dir, "g").await;
    m.node.daemon().kill9();
    m.node.offline(&hub).await;
    std::fs::write(&f.gate, "").unwrap();
    until("the task to have ended at its node", async || alive(&f.gate.display().to_string()).is_empty().then_some(())).await;
    for seat in ["", "w2"] {
        kill(m.warden(seat));
    }
    m.run();
    m.node.online(&hub).await;
    g.is_lost(&hub).await;
    let t = hub.finished(&f.id).await;
    // Its end was on the disk, or its warden died before it was.
    assert!(t["state"] == "succeeded" || t["reason"]["code"] == "lost", "{t}");
    f.ran_once();
    assert_eq!(hub.sh("echo again").await["stdout"], "again\n");
}

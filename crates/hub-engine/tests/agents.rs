//! The supervisor of agents, with ports in memory, a held clock and a link that the test holds: each run once,
//! whatever dies, is lost, comes twice or late.

use hub_engine::Error;
use hub_engine::agents::{Agents, NewAgent, Process, What};
use hub_engine::delivery::{Delivery, Hello, Reported, Welcome};
use hub_engine::events::Events;
use hub_engine::links::{LINK_QUEUE, LinkCommand, Links};
use hub_engine::nodes::{Lifetimes, Nodes};
use hub_engine::pool::{Pool, Queue};
use hub_engine::ports::{Agents as _, Sessions as _, *};
use hub_engine::records::*;
use hub_engine::rights::Rights;
use hub_engine::sessions::Sessions;
use hub_engine::tasks::TaskService;
use hub_engine::watch::Watchers;
use hub_testkit::contract::{HandClock, sample};
use hub_testkit::journal::{TestJournal, Write};
use hub_testkit::keys::TestKeys;
use hub_testkit::memory::MemoryStore;
use mesh_core::agent::{Policy, Restart, Status};
use mesh_core::permission::{Caller, Role};
use mesh_core::spec::{Program, Shell, Spec};
use mesh_core::task::{AttemptNo, Outcome, TaskState};
use mesh_core::{AgentId, TaskId};
use mesh_process::{Clock, Tasks};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;

struct World {
    store: Arc<MemoryStore>,
    clock: Arc<HandClock>,
    journal: Arc<TestJournal>,
    agents: Arc<Agents>,
    tasks: Arc<TaskService>,
    delivery: Arc<Delivery>,
    node: Node,
}

/// A node that is linked, and what it was told.
struct Machine {
    welcome: Welcome,
    queue: mpsc::Receiver<LinkCommand>,
}

impl World {
    async fn new() -> Self {
        let store = Arc::new(MemoryStore::peopled());
        let (node, invite) = (sample::node(1, 1), sample::invite(1));
        store.add_invite(&invite).await.unwrap();
        assert_eq!(store.claim_invite(invite.id, &node, invite.created_at + 1, 1000).await.unwrap(), Claim::Claimed);
        Self::on(store, Arc::new(HandClock::default())).await
    }

    /// A process on what another one has left.
    async fn on(store: Arc<MemoryStore>, clock: Arc<HandClock>) -> Self {
        let journal = TestJournal::over(store.clone());
        let (links, watchers) = (Arc::new(Links::default()), Watchers::default());
        let events = Events::local(Duration::from_secs(60), clock.clone());
        let pool = Arc::new(Pool {
            journal: journal.clone(),
            sessions: store.clone(),
            accounts: store.clone(),
            rights: Arc::new(Rights::new(store.clone(), store.clone(), clock.clone())),
            keyring: Arc::new(TestKeys),
            links: links.clone(),
            watchers: watchers.clone(),
            events: events.clone(),
            clock: clock.clone(),
            incarnation: 1,
            policy: [0; 32],
            queue: Queue::default(),
        });
        let delivery = Arc::new(Delivery {
            journal: journal.clone(),
            output: store.clone(),
            nodes: store.clone(),
            links: links.clone(),
            pool: pool.clone(),
            clock: clock.clone(),
            output_bytes: 1 << 20,
        });
        let nodes = Arc::new(Nodes {
            hub: sample::hub_id(1),
            store: store.clone(),
            keyring: Arc::new(TestKeys),
            links: links.clone(),
            events: events.clone(),
            history: Default::default(),
            recoveries: Default::default(),
            clock: clock.clone(),
            lifetimes: Lifetimes { certificate_ms: 1, invite_secs: 1 },
        });
        let sessions = Arc::new(Sessions {
            store: store.clone(),
            nodes: nodes.clone(),
            pool: pool.clone(),
            events,
            clock: clock.clone(),
            session_hours: 1,
        });
        let work = Tasks::new();
        let tasks = Arc::new(TaskService {
            journal: journal.clone(),
            output: store.clone(),
            keyring: Arc::new(TestKeys),
            nodes,
            sessions,
            links,
            pool,
            watchers,
            clock: clock.clone(),
            stop: work.token(),
            work,
        });
        let agents = Arc::new(Agents { store: store.clone(), tasks: tasks.clone(), output_bytes: 1 << 20, rests: Default::default() });
        agents.recover().await.unwrap();
        tasks.pool.recover().await.unwrap();
        Self { store, clock, journal, agents, tasks, delivery, node: sample::node(1, 1) }
    }
    /// The process dies, and another one takes up what it left.
    async fn restarted(self) -> Self {
        Self::on(self.store, self.clock).await
    }

    async fn link(&self) -> Machine {
        let (commands, queue) = mpsc::channel(LINK_QUEUE);
        let attempts = self.delivery.links.held(self.node.id);
        let hello = Hello { spool: sample::spool_id(1), max_tasks: 4, keeps: 0, closed: None, attempts };
        Machine { welcome: self.delivery.open_link(&self.node, hello, commands).await.unwrap(), queue }
    }
    fn word(&self, m: &Machine) -> Caller {
        Caller::Node { node: self.node.id, generation: m.welcome.generation }
    }

    async fn spawn(&self, name: &str, restart: Restart, change: impl FnOnce(&mut Process)) -> Result<AgentId, Error> {
        let program = Program::Argv(vec!["watch".into()]);
        let spec = Spec::Shell(Shell { program, cwd: String::new(), env: Default::default(), stdin: vec![], stdin_open: false });
        let mut process = Process { spec, session: None, node: Some(self.node.id.to_string()), select: None, restart };
        change(&mut process);
        let new = NewAgent { name: name.into(), what: What::Process(Box::new(process)), keyed: None };
        Ok(self.agents.spawn(&owner(), new).await?.id)
    }
    async fn look(&self, id: AgentId) -> Agent {
        self.store.agent(id).await.unwrap().unwrap()
    }
    /// Until nothing follows from what has happened.
    async fn settle(&self) {
        for _ in 0..6 {
            self.agents.round().await.unwrap();
        }
    }
    async fn run_of(&self, id: AgentId) -> (TaskId, AttemptNo) {
        let run = self.look(id).await.life.run.unwrap();
        let task = self.store.narrow(run.task).await.unwrap().expect("the task of the run");
        (run.task, task.progress.attempt.map_or(AttemptNo(0), |a| a.no))
    }
    async fn starts(&self, m: &Machine, id: AgentId) -> (TaskId, AttemptNo) {
        self.settle().await;
        let (task, no) = self.run_of(id).await;
        self.delivery.started(&self.word(m), task, no).await.unwrap();
        self.settle().await;
        assert_eq!(self.look(id).await.life.status, Status::Running);
        (task, no)
    }
    async fn ends(&self, m: &Machine, (task, attempt): (TaskId, AttemptNo), outcome: Outcome) {
        let end = Reported { task, attempt, outcome, last_seq: 0, result: None, sandbox_applied: None, digests: None };
        self.delivery.result(&self.word(m), end).await.unwrap();
        self.settle().await;
    }
    /// All tasks that were ever made of it.
    async fn runs(&self, id: AgentId) -> Vec<Task> {
        let all = self.store.tasks(&TaskFilter::default(), Window { before: None, limit: 1000 }).await.unwrap();
        all.into_iter().filter(|t| t.actor.agent == Some(id)).collect()
    }
    /// The texts of a log; and no two lines say the same of one run.
    async fn log(&self, id: AgentId) -> Vec<String> {
        let page = self.store.log(id, 0, 500, 1 << 20).await.unwrap();
        page.lines.iter().map(|(_, l)| String::from_utf8(l.text.clone()).unwrap()).collect()
    }
}

impl Machine {
    fn told(&mut self) -> Vec<LinkCommand> {
        std::iter::from_fn(|| self.queue.try_recv().ok()).collect()
    }
    fn ordered(&mut self) -> Vec<TaskId> {
        self.told().into_iter().filter_map(|c| if let LinkCommand::Order(o) = c { Some(o.task) } else { None }).collect()
    }
}

fn owner() -> Caller {
    Caller::person(sample::user_id(1), Role::Developer)
}
fn always(max: u32) -> Restart {
    Restart { policy: Policy::Always, max, backoff_ms: 1000 }
}
fn code<T: std::fmt::Debug>(r: Result<T, Error>) -> String {
    match r.unwrap_err() {
        Error::Conflict { code, .. } | Error::Invalid { code, .. } | Error::Unavailable { code, .. } => code.into(),
        Error::NotFound(_) => "not_found".into(),
        Error::Forbidden(_) => "forbidden".into(),
        e => panic!("{e}"),
    }
}

#[tokio::test]
async fn a_hundred_quick_deaths_are_slowed_and_then_are_the_end() {
    let w = World::new().await;
    let mut m = w.link().await;
    let id = w.spawn("quick", Restart { policy: Policy::OnFailure, max: 100, backoff_ms: 1000 }, |_| {}).await.unwrap();
    let (mut last, mut deaths) = (None, 0);
    loop {
        w.settle().await;
        let agent = w.look(id).await;
        match agent.life.status {
            Status::Starting | Status::Running => {
                let run = w.run_of(id).await;
                assert_ne!(last.replace(run.0), Some(run.0), "each run is another task");
                w.ends(&m, run, Outcome::Exited(1)).await;
                deaths += 1;
            }
            Status::BackingOff => {
                let wait = agent.life.next_at.unwrap() - w.clock.now_ms();
                assert!(wait > 0 && wait <= 300_000, "{wait}");
                w.clock.advance(Duration::from_millis(wait as u64 - 1));
                w.settle().await;
                assert_eq!(w.look(id).await.life.status, Status::BackingOff, "not before its time");
                w.clock.advance(Duration::from_millis(1));
            }
            Status::Failed => break,
            other => panic!("{other:?}"),
        }
    }
    let agent = w.look(id).await;
    assert_eq!((deaths, agent.life.restarts, w.runs(id).await.len(), m.ordered().len()), (101, 100, 101, 101));
    assert!(agent.life.reason.unwrap().contains("restart.max"));
}

#[tokio::test]
async fn a_process_that_dies_anywhere_begins_each_run_once() {
    let w = World::new().await;
    let id = w.spawn("w", always(0), |_| {}).await.unwrap();
    let decided = w.look(id).await.life.run.unwrap();
    assert_eq!(w.runs(id).await, [], "it is decided, and not made yet");

    // It dies between the two.
    let w = w.restarted().await;
    w.settle().await;
    assert_eq!(w.runs(id).await.iter().map(|t| t.id).collect::<Vec<_>>(), [decided.task]);
    // It dies once more before anything was heard of that.
    let w = w.restarted().await;
    let mut m = w.link().await;
    w.settle().await;
    w.tasks.pool.round().await.unwrap();
    w.settle().await;
    assert_eq!((m.ordered(), w.runs(id).await.len()), (vec![decided.task], 1));
    let run = w.starts(&m, id).await;

    // The node says it again, to another process; then the end, twice.
    drop(m);
    let w = w.restarted().await;
    let mut m = w.link().await;
    w.delivery.started(&w.word(&m), run.0, run.1).await.unwrap();
    w.settle().await;
    assert_eq!((w.look(id).await.life.status, m.ordered()), (Status::Running, vec![]));
    for _ in 0..2 {
        w.ends(&m, run, Outcome::Exited(0)).await;
    }
    assert_eq!((w.look(id).await.life.status, w.runs(id).await.len()), (Status::BackingOff, 1));

    // It dies in the pause, which goes on.
    let w = w.restarted().await;
    let mut m = w.link().await;
    w.settle().await;
    assert_eq!(w.look(id).await.life.status, Status::BackingOff);
    w.clock.advance(Duration::from_secs(1));
    // The write of the task fails, and then its answer is lost.
    w.journal.fail(|write| matches!(write, Write::Accept(_)));
    assert!(w.agents.round().await.is_ok() && w.agents.round().await.is_err());
    w.journal.work();
    w.journal.unanswered.store(true, std::sync::atomic::Ordering::SeqCst);
    assert!(w.agents.round().await.is_err());
    w.journal.unanswered.store(false, std::sync::atomic::Ordering::SeqCst);
    w.settle().await;
    w.tasks.pool.round().await.unwrap();
    w.settle().await;
    assert_eq!(w.runs(id).await.len(), 2);
    assert_eq!(m.ordered().len(), 1);
    assert_eq!(w.look(id).await.life.restarts, 1);
    w.starts(&m, id).await;
}

#[tokio::test]
async fn kills_in_every_state() {
    let w = World::new().await;
    let kill = async |id, force| w.agents.kill(&owner(), id, force).await.unwrap().life.status;

    let id = w.spawn("decided", always(0), |_| {}).await.unwrap();
    assert_eq!(kill(id, false).await, Status::Stopping);
    w.settle().await;
    assert_eq!((w.look(id).await.life.status, w.runs(id).await.len()), (Status::Killed, 0), "what was not made never is");
    assert_eq!(kill(id, true).await, Status::Killed);

    let id = w.spawn("waits", always(0), |_| {}).await.unwrap();
    w.settle().await;
    assert_eq!(w.runs(id).await[0].progress.state, TaskState::Pending);
    kill(id, false).await;
    w.settle().await;
    assert_eq!(w.look(id).await.life.status, Status::Killed);

    let mut m = w.link().await;
    let id = w.spawn("runs", always(0), |_| {}).await.unwrap();
    let run = w.starts(&m, id).await;
    m.told();
    kill(id, false).await;
    w.settle().await;
    let cancel = LinkCommand::Cancel { task: run.0, attempt: run.1 };
    assert_eq!((m.told(), w.look(id).await.life.status), (vec![cancel], Status::Stopping));
    kill(id, false).await;
    w.settle().await;
    assert_eq!(m.told(), [], "asking again changes nothing");
    kill(id, true).await;
    w.settle().await;
    let force = LinkCommand::Kill { task: run.0, attempt: run.1 };
    assert!(m.told().contains(&force));
    // Its machine goes and comes back: it hears of both again.
    drop(m);
    let mut m = w.link().await;
    w.settle().await;
    assert!(m.told().contains(&force) && w.look(id).await.life.status == Status::Stopping);
    w.ends(&m, run, Outcome::Exited(0)).await;
    assert_eq!(w.look(id).await.life.status, Status::Killed, "however it ended, it is not run again");

    let id = w.spawn("rests", always(0), |_| {}).await.unwrap();
    let run = w.starts(&m, id).await;
    w.ends(&m, run, Outcome::Exited(0)).await;
    assert_eq!(kill(id, false).await, Status::Killed);
    w.clock.advance(Duration::from_secs(3600));
    w.settle().await;
    assert_eq!((w.look(id).await.life.status, w.runs(id).await.len()), (Status::Killed, 1));
}

#[tokio::test]
async fn the_owners_rights_hold_at_each_run() {
    let w = World::new().await;
    let m = w.link().await;
    let session = Session { nodes: vec![w.node.id], ..sample::session(1, 1) };
    w.store.add_session(&session).await.unwrap();
    w.store.attach(session.id, w.node.id, None, w.clock.now_ms()).await.unwrap();
    let rests = async |name: &str, change: fn(&mut Process)| {
        let id = w.spawn(name, always(0), change).await.unwrap();
        let run = w.starts(&m, id).await;
        w.ends(&m, run, Outcome::Exited(0)).await;
        id
    };
    let due = async |id| {
        w.clock.advance(Duration::from_secs(1));
        w.settle().await;
        w.look(id).await.life
    };
    let closed = rests("closed", |p| p.session = Some(sample::session_id(1))).await;
    assert!(w.store.close_session(session.id, None, w.clock.now_ms()).await.unwrap());
    let life = due(closed).await;
    assert_eq!(life.status, Status::Failed);
    assert!(life.reason.as_deref().unwrap().contains("session"), "{life:?}");

    let disabled = rests("disabled", |_| {}).await;
    let change = UserChange { disabled: Some(true), ..UserChange::default() };
    w.store.create_user(&User { role: Role::Admin, ..sample::user(77, "boss") }, None).await.unwrap();
    w.store.change_user(sample::user_id(1), &change, w.clock.now_ms()).await.unwrap();
    let life = due(disabled).await;
    assert!(life.status == Status::Failed && life.reason.as_deref().unwrap().contains("disabled"), "{life:?}");
    let change = UserChange { disabled: Some(false), ..UserChange::default() };
    w.store.change_user(sample::user_id(1), &change, w.clock.now_ms()).await.unwrap();

    let demoted = rests("demoted", |_| {}).await;
    w.store.set_role(sample::user_id(1), Role::Viewer);
    let life = due(demoted).await;
    assert!(life.status == Status::Failed && life.reason.as_deref().unwrap().contains("agents:manage"), "{life:?}");
    w.store.set_role(sample::user_id(1), Role::Developer);

    let revoked = rests("revoked", |_| {}).await;
    w.store.revoke_node(w.node.id, w.clock.now_ms()).await.unwrap();
    let life = due(revoked).await;
    assert!(life.status == Status::Failed && life.reason.as_deref().unwrap().contains("revoked"), "{life:?}");
    for id in [closed, disabled, demoted, revoked] {
        assert_eq!(w.runs(id).await.len(), 1, "nothing was begun");
    }
}

#[tokio::test]
async fn who_may_what() {
    let w = World::new().await;
    let id = w.spawn("mine", always(0), |_| {}).await.unwrap();
    let stranger = Caller::person(sample::user_id(2), Role::Developer);
    let viewer = Caller::person(sample::user_id(3), Role::Viewer);
    let guest = Caller::person(sample::user_id(4), Role::Guest);
    assert_eq!(code(w.agents.get(&stranger, id).await), "not_found");
    assert_eq!(code(w.agents.kill(&stranger, id, true).await), "not_found");
    assert_eq!(code(w.agents.kill(&viewer, id, true).await), "forbidden");
    assert!(w.agents.get(&viewer, id).await.is_ok() && w.agents.logs(&viewer, id, 0, 10).await.is_ok());
    assert_eq!(code(w.agents.logs(&stranger, id, 0, 10).await), "not_found");
    for caller in [&viewer, &guest] {
        let new = NewAgent { name: "x".into(), what: What::Basic("{}".into()), keyed: None };
        assert_eq!(code(w.agents.spawn(caller, new).await), "forbidden");
    }
    let window = Window { before: None, limit: 9 };
    assert_eq!(w.agents.list(&stranger, None, None, window).await.unwrap(), []);
    assert_eq!(w.agents.list(&viewer, None, None, window).await.unwrap().len(), 1);
    let new = NewAgent { name: "mine".into(), what: What::Basic("{}".into()), keyed: None };
    assert_eq!(code(w.agents.spawn(&stranger, new).await), "name_taken");
    assert_eq!(code(w.spawn("mine", always(0), |_| {}).await), "name_taken");
    assert_eq!(code(w.spawn("", always(0), |_| {}).await), "bad_name");
    assert_eq!(code(w.spawn("y", Restart { backoff_ms: u64::MAX, ..always(0) }, |_| {}).await), "bad_restart");
    assert_eq!(code(w.spawn("y", always(0), |p| p.node = Some("nowhere".into())).await), "not_found");
}

#[tokio::test]
async fn what_a_run_writes_is_in_the_log_once() {
    let w = World::new().await;
    let m = w.link().await;
    let id = w.spawn("w", always(0), |_| {}).await.unwrap();
    let run = w.starts(&m, id).await;
    let frames = [sample::frame(1, Stream::Stdout, "one\ntw"), sample::frame(2, Stream::Stdout, "o\nopen")];
    let mut ear = w.agents.listen(id);
    ear.seen();
    assert_eq!(w.delivery.append(&w.word(&m), run.0, run.1, frames[..1].to_vec()).await.unwrap(), Some(1));
    ear.changed().await;
    // The answer was lost: the node says it again, to another process.
    drop(m);
    let w = w.restarted().await;
    let m = w.link().await;
    assert_eq!(w.delivery.append(&w.word(&m), run.0, run.1, frames.to_vec()).await.unwrap(), Some(2));
    assert_eq!(w.delivery.append(&w.word(&m), run.0, run.1, vec![sample::frame(4, Stream::Stdout, "x")]).await.unwrap(), None, "a gap");
    let end = Reported {
        task: run.0,
        attempt: run.1,
        outcome: Outcome::Exited(7),
        last_seq: 2,
        result: None,
        sandbox_applied: None,
        digests: None,
    };
    w.delivery.result(&w.word(&m), end).await.unwrap();
    w.settle().await;
    let log = w.log(id).await;
    let written: Vec<&String> = log.iter().filter(|l| !l.starts_with("run 1")).collect();
    assert_eq!(written, ["one", "two", "open"], "{log:?}");
    assert!(log.last().unwrap().contains("exit code 7"), "{log:?}");

    // Of what it writes without end, its task keeps the beginning alone.
    w.clock.advance(Duration::from_secs(1));
    let run = w.starts(&m, id).await;
    let lines = "x".repeat(999) + "\n";
    for seq in 1..=200 {
        let frame = sample::frame(seq, Stream::Stdout, lines.clone());
        assert_eq!(w.delivery.append(&w.word(&m), run.0, run.1, vec![frame]).await.unwrap(), Some(seq));
    }
    let totals = w.store.totals(run.0, run.1).await.unwrap();
    assert!(totals.truncated && totals.kept_seq <= 66 && totals.durable_seq == 200, "{totals:?}");
}

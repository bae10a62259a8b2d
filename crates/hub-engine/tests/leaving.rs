//! How people leave and how their rights change, at moments that no door can choose: in memory, with a
//! clock and a journal that the test holds.

use async_trait::async_trait;
use hub_engine::Error;
use hub_engine::accounts::{Accounts, Lifetimes, Recent};
use hub_engine::agents::Agents;
use hub_engine::delivery::{Delivery, Hello, Welcome};
use hub_engine::events::Events;
use hub_engine::leaving::{Departures, Will};
use hub_engine::links::{LINK_QUEUE, LinkCommand, Links};
use hub_engine::manage::Management;
use hub_engine::nodes::{self, Nodes};
use hub_engine::pool::{Pool, Queue};
use hub_engine::ports::{self, AgentState, Agents as _, Journal, NodeDirectory, Passwords, Users as _};
use hub_engine::records::*;
use hub_engine::rights::Rights;
use hub_engine::sessions::Sessions;
use hub_engine::tasks::TaskService;
use hub_engine::throttle::Throttle;
use hub_engine::users::{Change, Users};
use hub_engine::watch::Watchers;
use hub_testkit::TestJournal;
use hub_testkit::contract::{HandClock, sample};
use hub_testkit::journal::Write;
use hub_testkit::keys::TestKeys;
use hub_testkit::memory::MemoryStore;
use mesh_core::permission::{Caller, Role};
use mesh_core::task::{Event, Outcome, Progress, TaskState, Terms};
use mesh_core::*;
use mesh_process::{Clock, Tasks};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;

struct Plain;
#[async_trait]
impl Passwords for Plain {
    async fn hash(&self, password: String) -> hub_engine::Result<String> {
        Ok(format!("plain {password}"))
    }
    async fn verify(&self, password: String, hash: Option<String>) -> hub_engine::Result<bool> {
        Ok(hash == Some(format!("plain {password}")))
    }
}

/// One hub's process over a store that may be shared.
struct World {
    store: Arc<MemoryStore>,
    journal: Arc<TestJournal>,
    clock: Arc<HandClock>,
    pool: Arc<Pool>,
    delivery: Arc<Delivery>,
    manage: Arc<Management>,
    users: Arc<Users>,
    departures: Arc<Departures>,
}

impl World {
    /// Ada (1) is an admin, bob (2) and eve (3) are developers.
    async fn new() -> Self {
        let store = Arc::new(MemoryStore::new());
        for (n, name, role) in [(1, "ada", Role::Admin), (2, "bob", Role::Developer), (3, "eve", Role::Developer)] {
            assert!(store.create_user(&User { role, ..sample::user(n, name) }, None).await.unwrap());
        }
        Self::over(store, Arc::new(HandClock::default()))
    }
    /// Another process on the same store.
    fn again(&self) -> Self {
        Self::over(self.store.clone(), self.clock.clone())
    }
    fn over(store: Arc<MemoryStore>, clock: Arc<HandClock>) -> Self {
        let (links, watchers, work) = (Arc::new(Links::default()), Watchers::default(), Tasks::new());
        let journal = TestJournal::over(store.clone());
        let events = Events::local(Duration::from_secs(60), clock.clone());
        let rights = Arc::new(Rights::new(store.clone(), store.clone(), clock.clone()));
        let accounts = Arc::new(Accounts {
            recent: Recent::default(),
            store: store.clone(),
            keyring: Arc::new(TestKeys),
            passwords: Arc::new(Plain),
            clock: clock.clone(),
            events: events.clone(),
            lifetimes: Lifetimes { access_secs: 600, refresh_days: 30 },
            throttle: Throttle::new(1000, 1000, clock.clone()),
            work: work.clone(),
            rights: rights.clone(),
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
            lifetimes: nodes::Lifetimes { certificate_ms: 1000, invite_secs: 60 },
        });
        let pool = Arc::new(Pool {
            rights,
            journal: journal.clone(),
            sessions: store.clone(),
            accounts: store.clone(),
            keyring: Arc::new(TestKeys),
            links: links.clone(),
            watchers: watchers.clone(),
            events: events.clone(),
            clock: clock.clone(),
            incarnation: 3,
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
        let manage = Arc::new(Management {
            nodes: nodes.clone(),
            journal: journal.clone(),
            pool: pool.clone(),
            work: work.clone(),
            seen: Default::default(),
        });
        let sessions = Arc::new(Sessions {
            store: store.clone(),
            nodes: nodes.clone(),
            pool: pool.clone(),
            events,
            clock: clock.clone(),
            session_hours: 24,
        });
        let tasks = Arc::new(TaskService {
            journal: journal.clone(),
            output: store.clone(),
            keyring: Arc::new(TestKeys),
            nodes,
            sessions,
            links,
            pool: pool.clone(),
            watchers,
            clock: clock.clone(),
            stop: work.token(),
            work,
        });
        let users = Arc::new(Users { store: store.clone(), accounts, pool: Some(pool.clone()) });
        let agents = Arc::new(Agents { store: store.clone(), tasks: tasks.clone(), output_bytes: 1 << 20, rests: Default::default() });
        let departures = Arc::new(Departures {
            users: users.clone(),
            journal: journal.clone(),
            audit: store.clone(),
            tasks,
            manage: manage.clone(),
            agents,
        });
        Self { store, journal, clock, pool, delivery, manage, users, departures }
    }

    /// A machine of this user, with a link.
    async fn machine(&self, n: u16, owner: u16, max_tasks: u32) -> (Node, Welcome, mpsc::Receiver<LinkCommand>) {
        let node = Node { owner: sample::user_id(owner), ..sample::node(n, n as u8) };
        let invite = Invite { owner: node.owner, ..sample::invite(n) };
        self.store.add_invite(&invite).await.unwrap();
        assert_eq!(self.store.claim_invite(invite.id, &node, invite.created_at + 1, 1000).await.unwrap(), Claim::Claimed);
        let (commands, queue) = mpsc::channel(LINK_QUEUE);
        let hello = Hello { spool: sample::spool_id(1), max_tasks, keeps: 0, closed: None, attempts: vec![] };
        let welcome = self.delivery.open_link(&node, hello, commands).await.unwrap();
        (node, welcome, queue)
    }
    async fn ask(&self, n: u16, user: u16, role: Role) -> Task {
        self.ask_with(n, user, role, Terms::default()).await
    }
    async fn ask_with(&self, n: u16, user: u16, role: Role, terms: Terms) -> Task {
        let mut task = Task { queue_secs: 0, terms, ..sample::task(n) };
        task.progress = Progress::new();
        (task.actor.user, task.created_at) = (sample::user_id(user), self.clock.now_ms());
        self.pool.accept(task, &Caller::person(sample::user_id(user), role), None).await.unwrap()
    }
    async fn state(&self, task: &Task) -> TaskState {
        self.store.task(task.id).await.unwrap().unwrap().progress.state
    }
    async fn end(&self, task: &Task, outcome: Outcome) {
        let a = self.store.task(task.id).await.unwrap().unwrap().progress.attempt.unwrap();
        for event in [Event::Started { attempt: a.no }, Event::Ended { attempt: a.no, outcome }] {
            let applied = self.pool.journal.apply(task.id, &event, Default::default(), self.clock.now_ms()).await.unwrap();
            assert!(matches!(applied, ports::Applied::Done(..)), "{applied:?}");
        }
        self.pool.links.release(a.node, task.id);
    }
    async fn own(&self, n: u16, user: u16) {
        ports::Sessions::add_session(&*self.store, &sample::session(n, user)).await.unwrap();
    }
}

async fn owner_of(store: &MemoryStore, session: u16) -> UserId {
    ports::Sessions::session(store, sample::session_id(session)).await.unwrap().unwrap().owner
}

fn ada() -> Caller {
    Caller::person(sample::user_id(1), Role::Admin)
}

#[tokio::test]
async fn what_a_process_left_undone_is_taken_up() {
    let w = World::new().await;
    let (node, _welcome, _queue) = w.machine(1, 2, 1).await;
    w.own(1, 2).await;
    let entry = StateEntry {
        id: sample::entry_id(1),
        agent: "bot".into(),
        key: "k".into(),
        owner: sample::user_id(2),
        value: b"1".to_vec(),
        updated_at: 0,
    };
    w.store.put_state(&entry, 9).await.unwrap();
    let (runs, waits) = (w.ask(1, 2, Role::Developer).await, w.ask(2, 2, Role::Developer).await);
    assert_eq!((w.state(&runs).await, w.state(&waits).await), (TaskState::Assigned, TaskState::Pending));
    // The process ends just after the removal is committed.
    let at = runs.created_at + 10;
    let leaving = Leaving { user: sample::user_id(2), successor: sample::user_id(3), cancel: false, purge: false, at };
    assert_eq!(w.store.remove_user(&leaving).await.unwrap(), Removal::Done);

    let next = w.again();
    next.departures.round().await.unwrap();
    assert_eq!(w.store.node(node.id).await.unwrap().unwrap().owner, sample::user_id(3));
    assert_eq!(owner_of(&w.store, 1).await, sample::user_id(3));
    assert_eq!(w.store.state_owner("bot").await.unwrap(), Some(sample::user_id(3)));
    assert_eq!((w.state(&runs).await, w.state(&waits).await), (TaskState::Assigned, TaskState::Cancelled));

    // What a call brings that was under way then, though it had its node at once.
    w.own(2, 2).await;
    let mut late = sample::assigned_task(3);
    (late.actor.user, late.created_at) = (sample::user_id(2), at + 1);
    w.store.accept(&late).await.unwrap();
    next.departures.round().await.unwrap();
    assert_eq!(owner_of(&w.store, 2).await, sample::user_id(3));
    assert!(w.store.task(late.id).await.unwrap().unwrap().progress.cancel.is_some());

    w.end(&runs, Outcome::Exited(0)).await;
    w.end(&late, Outcome::Exited(0)).await;
    next.departures.round().await.unwrap();
    assert_eq!(w.store.leaving(9).await.unwrap(), [leaving], "something may still be on its way");
    w.clock.advance(Duration::from_millis((at + 300_000 - w.clock.now_ms()).max(0) as u64));
    next.departures.round().await.unwrap();
    assert_eq!(w.store.leaving(9).await.unwrap(), vec![]);
    assert_eq!(w.state(&runs).await, TaskState::Succeeded);
}

#[tokio::test]
async fn what_fails_is_tried_again() {
    let w = World::new().await;
    let (_node, _welcome, _queue) = w.machine(1, 2, 1).await;
    let runs = w.ask(1, 2, Role::Developer).await;
    w.own(1, 2).await;
    w.journal.fail(|write| matches!(write, Write::Apply(Event::CancelRequested { .. })));
    let will = Will { cancel: true, ..Will::default() };
    w.departures.remove(&ada(), sample::user_id(2), will).await.unwrap();
    assert_eq!(owner_of(&w.store, 1).await, sample::user_id(1), "to who asks");
    let cancelled = async || w.store.task(runs.id).await.unwrap().unwrap().progress.cancel.is_some();
    assert!(!cancelled().await);
    assert!(w.departures.round().await.is_err());
    w.journal.work();
    w.departures.round().await.unwrap();
    assert!(cancelled().await);
}

#[tokio::test]
async fn what_finishes_is_not_run_again() {
    let w = World::new().await;
    let (_node, _welcome, _queue) = w.machine(1, 2, 1).await;
    let terms = Terms { retries: 3, ..Terms::default() };
    let runs = w.ask_with(1, 2, Role::Developer, terms).await;
    let will = Will { transfer_to: Some(sample::user_id(3)), ..Will::default() };
    w.departures.remove(&ada(), sample::user_id(2), will).await.unwrap();
    assert_eq!(w.state(&runs).await, TaskState::Assigned);
    w.end(&runs, Outcome::Exited(1)).await;
    assert_eq!(w.state(&runs).await, TaskState::Pending, "it would be tried again");
    w.departures.round().await.unwrap();
    assert_eq!(w.state(&runs).await, TaskState::Cancelled);
}

/// A parent runs nothing itself: it finishes with those of its children that finish.
#[tokio::test]
async fn a_fan_out_finishes_with_what_runs_of_it() {
    let w = World::new().await;
    let mut fan = sample::fan(10, 2);
    for task in std::iter::once(&mut fan.parent).chain(&mut fan.children) {
        (task.actor.user, task.created_at) = (sample::user_id(2), w.clock.now_ms());
    }
    w.store.accept_fan(&fan).await.unwrap();
    let will = Will { transfer_to: Some(sample::user_id(3)), ..Will::default() };
    w.departures.remove(&ada(), sample::user_id(2), will).await.unwrap();
    let parent = w.store.task(fan.parent.id).await.unwrap().unwrap();
    assert_eq!((parent.progress.state, parent.progress.cancel), (TaskState::Running, None));
    assert_eq!((w.state(&fan.children[0]).await, w.state(&fan.children[1]).await), (TaskState::Assigned, TaskState::Cancelled));
}

/// Nobody inherits a program that begins again and again.
#[tokio::test]
async fn agents_that_run_finish_and_others_end() {
    use mesh_core::agent::{End, Event as Step, Life, Policy, Status};
    let w = World::new().await;
    let restart = mesh_core::agent::Restart { policy: Policy::Always, max: 0, backoff_ms: 1 };
    for n in 1..=3 {
        let mut agent = hub_engine::records::Agent { owner: sample::user_id(2), restart, ..sample::agent(n) };
        if n == 1 {
            (agent.kind, agent.life) = (mesh_core::agent::Kind::Basic, Life::basic(1));
        }
        assert_eq!(w.store.add_agent(&agent).await.unwrap(), Spawned::Done);
    }
    let step = async |n: u16, event: Step| w.store.apply_agent(sample::agent_id(n), &event, 5, 1 << 20).await.unwrap();
    for n in [2, 3] {
        step(n, Step::Started { task: sample::task_id(n), node: None }).await;
    }
    step(3, Step::Ended { task: sample::task_id(3), end: End::Clean }).await;
    let look = async |n: u16| w.store.agent(sample::agent_id(n)).await.unwrap().unwrap();
    assert_eq!(look(3).await.life.status, Status::BackingOff);
    let will = Will { transfer_to: Some(sample::user_id(3)), ..Will::default() };
    w.departures.remove(&ada(), sample::user_id(2), will).await.unwrap();
    assert_eq!((look(1).await.life.status, look(3).await.life.status), (Status::Killed, Status::Killed));
    let runs = look(2).await;
    assert_eq!((runs.life.status, runs.owner), (Status::Running, sample::user_id(3)));
    step(2, Step::Ended { task: sample::task_id(2), end: End::Clean }).await;
    assert_eq!(look(2).await.life.status, Status::Exited, "once, and no more");
}

#[tokio::test]
async fn a_machine_that_is_linked_has_its_new_owner_at_once() {
    let w = World::new().await;
    let (_node, _welcome, _queue) = w.machine(1, 2, 4).await;
    let waits = w.ask(1, 3, Role::Developer).await;
    assert_eq!(w.state(&waits).await, TaskState::Pending, "the machine is bob's");
    let will = Will { transfer_to: Some(sample::user_id(3)), ..Will::default() };
    w.departures.remove(&ada(), sample::user_id(2), will).await.unwrap();
    w.pool.round().await.unwrap();
    assert_eq!(w.state(&waits).await, TaskState::Assigned, "now it is eve's");
}

/// Of a demoted admin, who may use their own machines alone: the rights that were read a moment ago are
/// not placed by, neither here nor on another hub.
#[tokio::test]
async fn waiting_tasks_follow_the_rights_of_now() {
    for elsewhere in [false, true] {
        let w = World::new().await;
        w.store.create_user(&User { role: Role::Admin, ..sample::user(4, "root") }, None).await.unwrap();
        let (node, _welcome, _queue) = w.machine(1, 2, 1).await;
        let first = w.ask(1, 4, Role::Admin).await;
        let waits = w.ask(2, 4, Role::Admin).await;
        w.pool.round().await.unwrap();
        assert_eq!((w.state(&first).await, w.state(&waits).await), (TaskState::Assigned, TaskState::Pending));
        // It has its rights read, and one before it goes.
        w.end(&first, Outcome::Exited(0)).await;
        w.pool.round().await.unwrap();
        assert_eq!(w.state(&waits).await, TaskState::Assigned);
        let waits_too = w.ask(3, 4, Role::Admin).await;
        w.pool.round().await.unwrap();

        let other = w.again();
        let demoted = Change { role: Some("developer".into()), ..Change::default() };
        let hub = if elsewhere { &other } else { &w };
        hub.users.change(&ada(), sample::user_id(4), demoted).await.unwrap();
        if elsewhere {
            w.manage.follow().await.unwrap();
        }
        w.end(&waits, Outcome::Exited(0)).await;
        w.pool.round().await.unwrap();
        assert_eq!(w.state(&waits_too).await, TaskState::Pending, "elsewhere: {elsewhere}; {node:?} is bob's");
    }
}

#[tokio::test]
async fn nobody_but_an_admin_removes_anybody() {
    let w = World::new().await;
    for caller in [
        Caller::person(sample::user_id(3), Role::Developer),
        Caller::key(sample::key_id(1), sample::user_id(1), Role::Admin, [permission::Scope::Everything]),
        Caller::Node { node: sample::node_id(1), generation: 1 },
    ] {
        for id in [2, 3, 9] {
            let removed = w.departures.remove(&caller, sample::user_id(id), Will::default()).await;
            assert!(matches!(removed, Err(Error::Forbidden(_))), "{caller:?} {removed:?}");
        }
    }
    assert!(w.store.leaving(9).await.unwrap().is_empty());
}

//! The end of sessions, what may be written when, and whose state is whose: in memory, with a clock that
//! the test holds.

use async_trait::async_trait;
use hub_engine::Error;
use hub_engine::agents::Agents;
use hub_engine::bus::Next;
use hub_engine::events::{Data, Events, SessionNews};
use hub_engine::expiry::{Expiry, Unsettled};
use hub_engine::links::{Link, Links};
use hub_engine::manage::Management;
use hub_engine::memory::Memory;
use hub_engine::messages::Messages;
use hub_engine::nodes::{Lifetimes, Nodes};
use hub_engine::pool::{Pool, Queue};
use hub_engine::ports::{self, Agents as _, *};
use hub_engine::records::*;
use hub_engine::restore::Recovery;
use hub_engine::rights::Rights;
use hub_engine::sessions::Sessions;
use hub_engine::state::State;
use hub_engine::stats::{Remembered, SAMPLE_EVERY, SAMPLES, Statistics};
use hub_engine::tasks::TaskService;
use hub_engine::watch::Watchers;
use hub_testkit::TestJournal;
use hub_testkit::contract::{HandClock, sample};
use hub_testkit::memory::MemoryStore;
use mesh_core::agent::Status;
use mesh_core::permission::{Caller, Role};
use mesh_core::seal::Intent;
use mesh_core::task::{Event, Outcome, ReasonCode, TaskState};
use mesh_core::*;
use mesh_process::{Clock, Tasks};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

struct FakeKeys;
impl Keyring for FakeKeys {
    fn sign(&self, _: &str, _: &[u8]) -> (String, [u8; 64]) {
        ("key".into(), [0; 64])
    }
    fn key_id(&self) -> String {
        "key".into()
    }
    fn seal(&self, intent: &Intent) -> Digest {
        intent.seal(&[7; 32])
    }
    fn is_sealed(&self, intent: &Intent, seal: &Digest) -> bool {
        intent.is_sealed_by(&[7; 32], seal)
    }
    fn token_mac(&self, _: &str) -> Digest {
        [0; 32]
    }
    fn issue_access(&self, _: UserId, _: LoginId, _: UnixMs, _: UnixMs) -> String {
        String::new()
    }
    fn read_access(&self, _: &str, _: UnixMs) -> Option<(UserId, LoginId)> {
        None
    }
    fn issue_certificate(&self, _: NodeId, _: &[u8], _: UnixMs, _: UnixMs, _: &[Digest]) -> Stored<Vec<u8>> {
        Ok(vec![])
    }
}

/// The memory's counts, which take their time.
struct SlowGauges {
    inner: Arc<MemoryStore>,
    counts: AtomicU32,
    count_ms: AtomicU64,
    clock: Arc<HandClock>,
}

#[async_trait]
impl Gauges for SlowGauges {
    async fn tasks_by_state(&self) -> Stored<BTreeMap<TaskState, u64>> {
        self.counts.fetch_add(1, Ordering::SeqCst);
        self.clock.advance(Duration::from_millis(self.count_ms.load(Ordering::SeqCst)));
        self.inner.tasks_by_state().await
    }
    async fn storage(&self) -> Stored<StorageUse> {
        self.inner.storage().await
    }
}

struct World {
    store: Arc<MemoryStore>,
    journal: Arc<TestJournal>,
    gauges: Arc<SlowGauges>,
    clock: Arc<HandClock>,
    sessions: Arc<Sessions>,
    tasks: Arc<TaskService>,
    pool: Arc<Pool>,
    expiry: Arc<Expiry>,
    memory: Memory,
    messages: Messages,
    state: State,
    statistics: Statistics,
    bus: Arc<dyn hub_engine::bus::Bus>,
}

impl World {
    fn new() -> Self {
        Self::on(Arc::new(MemoryStore::peopled()), Arc::new(HandClock::default()))
    }

    /// A process on a store that may have had one before.
    fn on(store: Arc<MemoryStore>, clock: Arc<HandClock>) -> Self {
        let journal = TestJournal::over(store.clone());
        let (counts, count_ms) = (AtomicU32::new(0), AtomicU64::new(0));
        let gauges = Arc::new(SlowGauges { inner: store.clone(), counts, count_ms, clock: clock.clone() });
        let keyring = Arc::new(FakeKeys);
        let bus: Arc<dyn hub_engine::bus::Bus> = Arc::new(hub_engine::bus::LocalBus::new(1000, Duration::from_secs(9999), clock.clone()));
        let events = Events::new(bus.clone(), clock.clone());
        let (links, watchers, work) = (Arc::new(Links::default()), Watchers::default(), Tasks::new());
        let nodes = Arc::new(Nodes {
            hub: sample::hub_id(1),
            store: store.clone(),
            keyring: keyring.clone(),
            links: links.clone(),
            events: events.clone(),
            history: Default::default(),
            recoveries: Default::default(),
            clock: clock.clone(),
            lifetimes: Lifetimes { certificate_ms: 1, invite_secs: 1 },
        });
        let pool = Arc::new(Pool {
            journal: journal.clone(),
            sessions: store.clone(),
            accounts: store.clone(),
            rights: Arc::new(Rights::new(store.clone(), store.clone(), clock.clone())),
            keyring: keyring.clone(),
            links: links.clone(),
            watchers: watchers.clone(),
            events: events.clone(),
            clock: clock.clone(),
            incarnation: 3,
            policy: [0; 32],
            queue: Queue::default(),
        });
        let sessions = Arc::new(Sessions {
            store: store.clone(),
            nodes: nodes.clone(),
            pool: pool.clone(),
            events: events.clone(),
            clock: clock.clone(),
            session_hours: 24,
        });
        let tasks = Arc::new(TaskService {
            journal: journal.clone(),
            output: store.clone(),
            keyring,
            nodes: nodes.clone(),
            sessions: sessions.clone(),
            links,
            pool: pool.clone(),
            watchers,
            clock: clock.clone(),
            work: work.clone(),
            stop: work.token(),
        });
        let expiry = Arc::new(Expiry {
            sessions: sessions.clone(),
            tasks: tasks.clone(),
            purges: store.clone(),
            clock: clock.clone(),
            unsettled: Unsettled::default(),
        });
        let memory = Memory { store: store.clone(), sessions: sessions.clone(), clock: clock.clone() };
        let messages = Messages { store: store.clone(), sessions: sessions.clone(), clock: clock.clone() };
        let state = State { store: store.clone(), clock: clock.clone() };
        let statistics =
            Statistics { gauges: gauges.clone(), nodes, pool: pool.clone(), clock: clock.clone(), remembered: Remembered::default() };
        Self { store, journal, gauges, clock, sessions, tasks, pool, expiry, memory, messages, state, statistics, bus }
    }

    /// The next process on the same store.
    fn again(&self) -> Self {
        Self::on(self.store.clone(), self.clock.clone())
    }

    async fn session(&self, secs: u64) -> Session {
        self.sessions.create(&user(1), "s", Some(secs), None).await.unwrap()
    }
    fn advance(&self, secs: u64) {
        self.clock.advance(Duration::from_secs(secs));
    }
    async fn status(&self, id: SessionId) -> &'static str {
        let s = self.sessions.get(&user(1), id).await.unwrap();
        if s.is_active() {
            "active"
        } else if s.closed_at.is_some() {
            "closed"
        } else {
            "expired"
        }
    }
    async fn task(&self, n: u16, session: SessionId, running: bool) -> TaskId {
        let t = if running { sample::assigned_task(n) } else { sample::task(n) };
        let t = Task { session: Some(session), ..t };
        self.store.accept(&t).await.unwrap();
        t.id
    }
    async fn task_state(&self, id: TaskId) -> (TaskState, Option<ReasonCode>) {
        let p = self.store.task(id).await.unwrap().unwrap().progress;
        (p.state, p.reason.map(|r| r.code))
    }
}

fn user(n: u16) -> Caller {
    Caller::person(sample::user_id(n), Role::Developer)
}
fn someone(n: u16, role: Role) -> Caller {
    Caller::person(sample::user_id(n), role)
}

fn code<T: std::fmt::Debug>(r: hub_engine::Result<T>) -> &'static str {
    match r.unwrap_err() {
        Error::NotFound(_) => "not_found",
        Error::Forbidden(_) => "forbidden",
        Error::Conflict { code, .. } | Error::Invalid { code, .. } => code,
        other => panic!("{other:?}"),
    }
}

const CANCELLED: (TaskState, Option<ReasonCode>) = (TaskState::Cancelled, Some(ReasonCode::SessionClosed));

#[tokio::test]
async fn a_use_keeps_a_session_and_silence_ends_it() {
    let w = World::new();
    let (s, me) = (w.session(100).await, user(1));
    let mut uses = 0;
    for _ in 0..3 {
        for n in 0..5 {
            w.advance(99);
            w.expiry.round().await.unwrap();
            match n {
                0 => drop(w.memory.put(&me, s.id, "k", b"1".to_vec()).await.unwrap()),
                1 => drop(w.messages.post(&me, s.id, "user", "hi".into()).await.unwrap()),
                2 => w.memory.remove(&me, s.id, "k").await.unwrap(),
                3 => drop(w.sessions.change(&me, s.id, Some(format!("n{n}")), None).await.unwrap()),
                _ => drop(w.sessions.change(&me, s.id, None, Some(100)).await.unwrap()),
            }
            uses += 1;
        }
    }
    assert_eq!((uses, w.status(s.id).await), (15, "active"));
    // Looking is no use.
    w.advance(99);
    w.sessions.activity(&me, s.id, None, 10).await.unwrap();
    w.messages.list(&me, s.id, Window { before: None, limit: 10 }).await.unwrap();
    let next = w.expiry.round().await.unwrap();
    assert_eq!((w.status(s.id).await, next), ("active", Duration::from_secs(1)), "woken when it ends");
    w.advance(1);
    w.expiry.round().await.unwrap();
    assert_eq!(w.status(s.id).await, "expired");
    assert_eq!(code(w.memory.put(&me, s.id, "k", b"1".to_vec()).await), "session_ended");
    assert_eq!(code(w.messages.post(&me, s.id, "user", "hi".into()).await), "session_ended");
    assert_eq!(code(w.sessions.change(&me, s.id, None, Some(100)).await), "session_ended");
}

#[tokio::test]
async fn work_keeps_a_session_and_its_end_starts_the_clock() {
    let w = World::new();
    let s = w.session(100).await;
    let running = w.task(1, s.id, true).await;
    for _ in 0..10 {
        w.advance(100);
        w.expiry.round().await.unwrap();
        assert_eq!(w.status(s.id).await, "active", "a task is at work");
    }
    w.advance(60);
    let ended = Event::Ended { attempt: sample::attempt(1), outcome: Outcome::Exited(0) };
    w.pool.apply(running, &ended, Besides::default()).await.unwrap();
    // A task that only waits keeps nothing, and ends with its session.
    let waiting = w.task(2, s.id, false).await;
    w.advance(99);
    w.expiry.round().await.unwrap();
    assert_eq!(w.status(s.id).await, "active", "99 s after the end of its work");
    w.advance(1);
    w.expiry.round().await.unwrap();
    assert_eq!(w.status(s.id).await, "expired");
    assert_eq!(w.task_state(waiting).await, CANCELLED);
}

#[tokio::test]
async fn an_end_is_told_once_and_finished_after_a_failure_or_a_crash() {
    let w = World::new();
    let mut reader = w.bus.subscribe(None);
    let (a, b) = (w.session(10).await, w.session(20).await);
    let (of_a, of_b) = (w.task(1, a.id, false).await, w.task(2, b.id, false).await);
    w.advance(10);
    w.journal.failing_looks.store(1, Ordering::SeqCst);
    assert!(w.expiry.round().await.is_err());
    assert_eq!((w.status(a.id).await, w.task_state(of_a).await.0), ("expired", TaskState::Pending), "between the two");
    w.expiry.round().await.unwrap();
    assert_eq!(w.task_state(of_a).await, CANCELLED, "the next round goes on with it");

    // The process ends between the two; the next one takes up what it finds.
    w.advance(10);
    w.journal.failing_looks.store(1, Ordering::SeqCst);
    assert!(w.expiry.round().await.is_err());
    assert_eq!(w.task_state(of_b).await.0, TaskState::Pending);
    let w2 = w.again();
    w2.expiry.round().await.unwrap();
    w2.pool.recover().await.unwrap();
    assert_eq!(w2.task_state(of_b).await, CANCELLED);
    let mut expired = 0;
    // Whatever stands in the bus is there already.
    while let Ok(Next::Event(_, e)) = tokio::time::timeout(Duration::from_millis(1), reader.next()).await {
        if matches!(&e.data, Data::Session(_, SessionNews::Expired)) {
            expired += 1;
        }
    }
    assert_eq!(expired, 2);
}

#[tokio::test]
async fn a_dispatch_that_comes_with_the_end_ends_too() {
    let w = World::new();
    let s = w.session(10).await;
    // Sessions end just before the task is in the journal.
    let (store, clock) = (w.store.clone(), w.clock.clone());
    w.journal.before_accept(move || {
        let (store, clock) = (store.clone(), clock.clone());
        Box::pin(async move {
            clock.advance(Duration::from_secs(3600));
            ports::Sessions::expire_sessions(&*store, clock.now_ms(), 10).await.unwrap();
        })
    });
    let dispatch = || hub_engine::tasks::Dispatch {
        session: Some(s.id),
        all: false,
        node: None,
        spec: mesh_core::spec::Spec::Echo { payload: vec![] },
        timeout_secs: 0,
        queue_secs: 0,
        terms: Default::default(),
        wait_secs: 0,
        keyed: None,
    };
    // What is dispatched crosses several boxes and threads, and is copied each time.
    let (me, asked) = (user(1), size_of::<hub_engine::tasks::Dispatch>());
    let size = size_of_val(&w.tasks.dispatch(&me, dispatch()));
    assert!(size < 3 * asked + 1024, "the future of a dispatch takes {size} bytes, what it is given {asked}");
    let t = w.tasks.dispatch(&user(1), dispatch()).await.unwrap();
    assert_eq!(w.status(s.id).await, "expired");
    assert_eq!(w.task_state(t.id).await, CANCELLED, "the end did not see it, so it saw the end");
    assert_eq!(code(w.tasks.dispatch(&user(1), dispatch()).await), "session_ended");
}

#[tokio::test]
async fn an_erasure_needs_an_end_and_goes_on_after_a_crash() {
    let w = World::new();
    let (s, me) = (w.session(10).await, user(1));
    w.messages.post(&me, s.id, "user", "secret".into()).await.unwrap();
    let id = w.task(1, s.id, true).await;
    w.store.append(id, sample::attempt(1), vec![sample::frame(1, Stream::Stdout, "secret")], 99).await.unwrap();
    assert_eq!(code(w.expiry.purge(&me, s.id).await), "session_active");
    w.tasks.close_session(&me, s.id).await.unwrap();
    assert_eq!(code(w.expiry.purge(&me, s.id).await), "tasks_open", "it was asked to end and has not yet");
    let ended = Event::Ended { attempt: sample::attempt(1), outcome: Outcome::Cancelled };
    w.pool.apply(id, &ended, Besides::default()).await.unwrap();
    assert_eq!(code(w.expiry.purge(&user(2), s.id).await), "not_found");
    assert_eq!(code(w.expiry.purge(&someone(2, Role::Viewer), s.id).await), "forbidden");
    // Begun, and then the process ends.
    assert_eq!(w.store.begin_purge(s.id, None, 5).await.unwrap(), PurgeStart::Begun);
    let w = w.again();
    w.expiry.finish_purges().await.unwrap();
    assert_eq!(w.store.purging(9).await.unwrap(), vec![]);
    let all = Window { before: None, limit: 10 };
    assert_eq!(w.messages.list(&me, s.id, all).await.unwrap().items, vec![]);
    assert_eq!(w.store.read(id, sample::attempt(1), 0, 99).await.unwrap(), vec![]);
    for _ in 0..2 {
        assert_eq!(w.expiry.purge(&me, s.id).await.unwrap().purged_at, Some(5), "once is enough");
    }
}

#[tokio::test]
async fn what_is_anothers_is_not_there_or_not_to_be_changed() {
    let w = World::new();
    let s = w.session(100).await;
    w.memory.put(&user(1), s.id, "k", b"1".to_vec()).await.unwrap();
    let all = || Window { before: None, limit: 10 };
    for (caller, reads, writes) in [
        (user(2), "not_found", "not_found"),
        (someone(2, Role::Guest), "not_found", "not_found"),
        (someone(2, Role::Viewer), "", "forbidden"),
        (someone(2, Role::Admin), "", ""),
    ] {
        let of = |r: hub_engine::Result<()>| if r.is_ok() { "" } else { code(r) };
        assert_eq!(of(w.memory.get(&caller, s.id, "k").await.map(drop)), reads);
        assert_eq!(of(w.memory.keys(&caller, s.id, Window { before: None, limit: 1 }).await.map(drop)), reads);
        assert_eq!(of(w.messages.list(&caller, s.id, Window { before: None, limit: 1 }).await.map(drop)), reads);
        assert_eq!(of(w.sessions.activity(&caller, s.id, None, 1).await.map(drop)), reads);
        assert_eq!(of(w.memory.put(&caller, s.id, "k", b"2".to_vec()).await.map(drop)), writes);
        assert_eq!(of(w.messages.post(&caller, s.id, "user", "x".into()).await.map(drop)), writes);
        assert_eq!(of(w.sessions.change(&caller, s.id, Some("n".into()), None).await.map(drop)), writes);
        assert_eq!(of(w.memory.remove(&caller, s.id, "k").await), writes);
    }

    // State: an agent belongs to who wrote its first key, until its last is gone.
    w.state.put(&user(1), "bot", "k", b"1".to_vec()).await.unwrap();
    assert_eq!(code(w.state.put(&user(2), "bot", "other", b"1".to_vec()).await), "not_found");
    assert_eq!(code(w.state.get(&user(2), "bot", "k").await), "not_found");
    assert_eq!(code(w.state.remove(&user(2), "bot", "k").await), "not_found");
    assert_eq!(w.state.list(&user(2), None, None, all()).await.unwrap().items, vec![]);
    let viewer = someone(3, Role::Viewer);
    assert_eq!(w.state.get(&viewer, "bot", "k").await.unwrap().value, b"1");
    assert_eq!(w.state.list(&viewer, None, None, all()).await.unwrap().items.len(), 1);
    assert_eq!(code(w.state.remove(&viewer, "bot", "k").await), "forbidden");
    assert_eq!(code(w.state.put(&viewer, "new", "k", b"1".to_vec()).await), "forbidden");
    assert_eq!(w.state.list(&someone(4, Role::Guest), None, None, all()).await.unwrap().items, vec![], "nothing was granted");
    let by_admin = w.state.put(&someone(5, Role::Admin), "bot", "more", b"2".to_vec()).await.unwrap();
    assert_eq!(by_admin.owner, sample::user_id(1), "the agent stays whose it is");
    for key in ["k", "more"] {
        w.state.remove(&user(1), "bot", key).await.unwrap();
    }
    assert_eq!(w.state.put(&user(2), "bot", "k", b"3".to_vec()).await.unwrap().owner, sample::user_id(2));
}

#[tokio::test]
async fn bounds() {
    let w = World::new();
    let (s, me) = (w.session(100).await, user(1));
    let max = hub_engine::memory::MAX_VALUE_BYTES;
    w.memory.put(&me, s.id, "big", vec![b'1'; max]).await.unwrap();
    assert_eq!(code(w.memory.put(&me, s.id, "big", vec![b'1'; max + 1]).await), "value_too_large");
    for n in 1..hub_engine::memory::MAX_KEYS {
        w.memory.put(&me, s.id, &n.to_string(), b"1".to_vec()).await.unwrap();
    }
    assert_eq!(code(w.memory.put(&me, s.id, "more", b"1".to_vec()).await), "memory_full");
    w.memory.put(&me, s.id, "7", b"2".to_vec()).await.unwrap();
    let max = hub_engine::messages::MAX_CONTENT_BYTES;
    w.messages.post(&me, s.id, "tool", "x".repeat(max)).await.unwrap();
    assert_eq!(code(w.messages.post(&me, s.id, "tool", "x".repeat(max + 1)).await), "content_too_large");
}

#[tokio::test]
async fn statistics_of_an_hour_and_counts_that_cost_little() {
    let w = World::new();
    let s = w.session(100_000).await;
    for n in 1..=3 {
        w.task(n, s.id, false).await;
    }
    w.pool.recover().await.unwrap();
    let admin = someone(9, Role::Admin);
    assert_eq!(code(w.statistics.get(&user(1)).await), "forbidden", "it tells of everybody's");
    assert_eq!(code(w.statistics.get(&someone(1, Role::Guest)).await), "forbidden");
    w.statistics.get(&someone(1, Role::Viewer)).await.unwrap();
    w.advance(30);
    let now = w.statistics.get(&admin).await.unwrap();
    assert_eq!((now.now.waiting, now.now.oldest_secs, now.tasks[&TaskState::Pending]), (3, 30, 3));
    assert_eq!(now.now.per_second, 0.0, "nothing to compare with yet");

    // Six ended in a minute.
    w.statistics.sample().await.unwrap();
    for n in 10..16 {
        let t = w.task(n, s.id, false).await;
        w.tasks.cancel(&user(1), t).await.unwrap();
        w.advance(10);
        if n % 2 == 1 && n < 15 {
            w.statistics.sample().await.unwrap();
        }
    }
    let now = w.statistics.get(&admin).await.unwrap();
    assert!((now.now.per_second - 0.1).abs() < 1e-9, "{}", now.now.per_second);
    for _ in 0..SAMPLES + 7 {
        w.clock.advance(SAMPLE_EVERY);
        w.statistics.sample().await.unwrap();
    }
    let now = w.statistics.get(&admin).await.unwrap();
    assert_eq!(now.history.len(), SAMPLES, "an hour and no more");
    assert!(now.history.windows(2).all(|p| p[0].at < p[1].at), "oldest first");
    assert_eq!(now.now.per_second, 0.0, "a rate is of now");

    // A count that takes 0.1 s is told for two seconds.
    let counts = |w: &World| w.gauges.counts.swap(0, Ordering::SeqCst);
    w.gauges.count_ms.store(100, Ordering::SeqCst);
    w.advance(60);
    counts(&w);
    for _ in 0..10 {
        w.statistics.get(&admin).await.unwrap();
        w.clock.advance(Duration::from_millis(190));
    }
    assert_eq!(counts(&w), 1);
    w.advance(1);
    w.statistics.get(&admin).await.unwrap();
    assert_eq!(counts(&w), 1);
    w.gauges.count_ms.store(5000, Ordering::SeqCst);
    w.advance(60);
    w.statistics.get(&admin).await.unwrap();
    w.advance(14);
    w.statistics.get(&admin).await.unwrap();
    assert_eq!(counts(&w), 1);
    w.advance(2);
    w.statistics.get(&admin).await.unwrap();
    assert_eq!(counts(&w), 1, "at most 15 s old");
}

#[tokio::test]
async fn a_change_of_nodes_counts_at_once_for_those_who_wait() {
    let w = World::new();
    let session = w.session(1000).await;
    let node = sample::node(1, 1);
    let invite = sample::invite(1);
    w.store.add_invite(&invite).await.unwrap();
    w.store.claim_invite(invite.id, &node, invite.created_at + 1, 1000).await.unwrap();
    let (commands, _queue) = tokio::sync::mpsc::channel(16);
    w.pool.links.open(Link {
        node: node.id,
        owner: node.owner,
        generation: 1,
        spool: sample::spool_id(1),
        own_tasks: 1,
        task_limit: None,
        max_tasks: 1,
        closed: None,
        keeps: 0,
        offers: Arc::new(node.offers()),
        draining: false,
        epoch: 0,
        cut: Default::default(),
        commands,
        health: None,
        rtt: None,
    });
    let owner = someone(1, Role::Admin);
    let accept = async |n: u16| {
        let task = Task { session: Some(session.id), ..sample::task(n) };
        w.pool.accept(task, &Caller::person(session.owner, Role::Developer), Some(&session)).await.unwrap().id
    };
    let (first, second) = (accept(1).await, accept(2).await);
    w.pool.round().await.unwrap();
    assert_eq!(w.task_state(first).await.0, TaskState::Pending, "no node is attached");
    w.sessions.attach(&owner, session.id, &node.id.to_string()).await.unwrap();
    w.pool.round_of_changes().await.unwrap();
    assert_eq!((w.task_state(first).await.0, w.task_state(second).await.0), (TaskState::Assigned, TaskState::Pending));
    w.sessions.detach(&owner, session.id, node.id).await.unwrap();
    w.pool.links.release(node.id, first);
    w.pool.round().await.unwrap();
    assert_eq!(w.task_state(second).await.0, TaskState::Pending, "there is a place, and it is not the session's any more");
}

fn recovery(w: &World) -> Recovery {
    let manage = Management {
        nodes: w.tasks.nodes.clone(),
        journal: w.journal.clone(),
        pool: w.pool.clone(),
        work: w.tasks.work.clone(),
        seen: Default::default(),
    };
    Recovery {
        meta: w.store.clone(),
        journal: w.journal.clone(),
        links: w.pool.links.clone(),
        pool: w.pool.clone(),
        manage: Arc::new(manage),
        expiry: w.expiry.clone(),
        agents: Arc::new(Agents { store: w.store.clone(), tasks: w.tasks.clone(), output_bytes: 1 << 20, rests: Default::default() }),
    }
}

/// What waited in a backup may have run since: it is not run again. Until the word, nothing ends.
#[tokio::test]
async fn a_restored_hub_holds_back_and_then_ends_what_waited() {
    let w = World::new();
    let meta = HubMeta { id: sample::hub_id(1), incarnation: 2, created_at: 1 };
    w.store.hub(meta).await.unwrap();
    w.store.mark_restored(w.clock.now_ms(), 1, 3).await.unwrap();
    let waits = w.store.accept(&sample::task(1)).await.map(|()| sample::task(1).id).unwrap();
    let mut later = sample::task(2);
    later.terms.not_before = Some(w.clock.now_ms() + 1);
    w.store.accept(&later).await.unwrap();
    // An agent whose next run was due before the restore, one whose is due later, one whose run was decided.
    let agents = [(11, w.clock.now_ms() - 1), (12, w.clock.now_ms() + 1), (13, i64::MAX)];
    for (n, due) in agents {
        let mut agent = sample::agent(n);
        if due < i64::MAX {
            (agent.life.status, agent.life.next_at) = (Status::BackingOff, Some(due));
        }
        assert_eq!(w.store.add_agent(&agent).await.unwrap(), Spawned::Done);
    }
    let (s, idle) = (w.session(1).await, w.session(1).await);
    let open = w.task(3, s.id, false).await;
    w.advance(5);

    let w = w.again();
    let r = recovery(&w);
    assert!(!r.start().await.unwrap());
    assert!(!r.look().await.unwrap());
    assert_eq!((w.task_state(waits).await.0, w.task_state(open).await.0), (TaskState::Pending, TaskState::Pending));
    assert_eq!(w.status(idle.id).await, "active", "its end comes when the hub goes on");
    let refused = w.tasks.cancel(&someone(1, Role::Admin), waits).await;
    assert!(matches!(refused, Err(Error::Unavailable { code: "restored", .. })), "{refused:?}");
    assert!(r.found(&user(1)).await.is_err() && r.found(&someone(1, Role::Admin)).await.unwrap().is_some());

    // The word is kept: a process that ends in the middle leaves it to the next.
    assert!(w.store.ask_go().await.unwrap());
    w.journal.failing_looks.store(1, Ordering::SeqCst);
    assert!(r.look().await.is_err());
    assert!(w.store.restored().await.unwrap().is_some() && w.pool.links.holds_back());
    let w = w.again();
    assert!(recovery(&w).start().await.unwrap(), "no second word is needed");
    const LOST: (TaskState, Option<ReasonCode>) = (TaskState::Failed, Some(ReasonCode::Lost));
    assert_eq!((w.task_state(waits).await, w.task_state(open).await), (LOST, LOST));
    assert_eq!(w.task_state(later.id).await.0, TaskState::Pending, "its time had not come before the restore");
    let mut standing = vec![];
    for (n, _) in agents {
        standing.push(w.store.agent(sample::agent_id(n)).await.unwrap().unwrap().life.status);
    }
    assert_eq!(standing, [Status::Failed, Status::BackingOff, Status::Failed], "what may have begun since does not begin again");
    assert_eq!(w.status(idle.id).await, "expired");
    assert_eq!(w.store.restored().await.unwrap(), None);
    assert!(!w.pool.links.holds_back());
}

/// A node counts its renewals, and a hub that was restored has forgotten some.
#[tokio::test]
async fn a_renewal_may_be_ahead_of_a_restored_hub_and_never_behind() {
    let w = World::new();
    let (node, invite, spki) = (sample::node(1, 1), sample::invite(1), b"a key".to_vec());
    let mut node = Node { certificate: NodeCertificate { counter: 0, ..node.certificate.clone() }, ..node };
    node.certificate.spki = sha256(&spki);
    w.store.add_invite(&invite).await.unwrap();
    w.store.claim_invite(invite.id, &node, invite.created_at + 1, 1000).await.unwrap();
    let caller = Caller::Node { node: node.id, generation: 1 };
    let renew = async |counter: u64| w.tasks.nodes.renew(&caller, &spki, counter, &[]).await;
    assert_eq!(renew(1).await.unwrap().counter, 1);
    assert_eq!(renew(9).await.unwrap().counter, 9);
    assert_eq!(renew(9).await.unwrap().counter, 9, "the same again is the same answer");
    for stale in [0, 1, 8, 10 + 64, u64::MAX] {
        assert_eq!(code(renew(stale).await), "stale_counter", "{stale}");
    }
    assert_eq!(renew(10).await.unwrap().counter, 10);
}

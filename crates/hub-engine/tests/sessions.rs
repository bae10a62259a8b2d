//! The end of sessions, what may be written when, and whose state is whose: in memory, with a clock that
//! the test holds.

use async_trait::async_trait;
use hub_engine::Error;
use hub_engine::bus::Next;
use hub_engine::events::{Data, Events, SessionNews};
use hub_engine::expiry::{Expiry, Unsettled};
use hub_engine::links::Links;
use hub_engine::memory::Memory;
use hub_engine::messages::Messages;
use hub_engine::nodes::{Lifetimes, Nodes};
use hub_engine::pool::{Pool, Queue};
use hub_engine::ports::{self, *};
use hub_engine::records::*;
use hub_engine::sessions::Sessions;
use hub_engine::state::State;
use hub_engine::stats::{Remembered, SAMPLE_EVERY, SAMPLES, Statistics};
use hub_engine::tasks::TaskService;
use hub_engine::watch::Watchers;
use hub_testkit::contract::{HandClock, sample};
use hub_testkit::memory::MemoryStore;
use mesh_core::permission::{Caller, Role};
use mesh_core::seal::Intent;
use mesh_core::task::{Event, Outcome, ReasonCode, TaskState};
use mesh_core::*;
use mesh_process::{Clock, Tasks};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
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
    fn issue_certificate(&self, _: NodeId, _: &[u8], _: UnixMs, _: UnixMs) -> Stored<Vec<u8>> {
        Ok(vec![])
    }
}

/// The memory's journal, which can fail to say what is open, and its counts, which take their time.
struct Frail {
    inner: Arc<MemoryStore>,
    failures: AtomicU32,
    /// Sessions end just before a task is in the journal.
    end_at_accept: AtomicBool,
    counts: AtomicU32,
    count_ms: AtomicU64,
    clock: Arc<HandClock>,
}

#[async_trait]
impl Journal for Frail {
    async fn accept(&self, task: &Task) -> Stored<()> {
        if self.end_at_accept.load(Ordering::SeqCst) {
            self.clock.advance(Duration::from_secs(3600));
            ports::Sessions::expire_sessions(&*self.inner, self.clock.now_ms(), 10).await?;
        }
        self.inner.accept(task).await
    }
    async fn apply(&self, id: TaskId, event: &Event, besides: Besides, now: UnixMs) -> Stored<Applied> {
        self.inner.apply(id, event, besides, now).await
    }
    async fn task(&self, id: TaskId) -> Stored<Option<Task>> {
        self.inner.task(id).await
    }
    async fn tasks(&self, filter: &TaskFilter, window: Window<TaskId>) -> Stored<Vec<Task>> {
        self.inner.tasks(filter, window).await
    }
    async fn specs(&self, ids: &[TaskId], max_bytes: usize) -> Stored<Vec<(TaskId, Vec<u8>)>> {
        self.inner.specs(ids, max_bytes).await
    }
    async fn open_tasks(&self, session: Option<SessionId>, after: Option<TaskId>, limit: u32) -> Stored<Vec<Task>> {
        if self.failures.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1)).is_ok() {
            return Err(StoreError::new("journal.open_tasks", "the test says so"));
        }
        self.inner.open_tasks(session, after, limit).await
    }
    async fn history(&self, id: TaskId) -> Stored<Vec<TaskEvent>> {
        self.inner.history(id).await
    }
}

#[async_trait]
impl Gauges for Frail {
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
    frail: Arc<Frail>,
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
        Self::on(Arc::new(MemoryStore::new()), Arc::new(HandClock::default()))
    }

    /// A process on a store that may have had one before.
    fn on(store: Arc<MemoryStore>, clock: Arc<HandClock>) -> Self {
        let frail = Arc::new(Frail {
            inner: store.clone(),
            failures: AtomicU32::new(0),
            end_at_accept: AtomicBool::new(false),
            counts: AtomicU32::new(0),
            count_ms: AtomicU64::new(0),
            clock: clock.clone(),
        });
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
            clock: clock.clone(),
            lifetimes: Lifetimes { certificate_ms: 1, invite_secs: 1 },
        });
        let sessions = Arc::new(Sessions {
            store: store.clone(),
            nodes: nodes.clone(),
            events: events.clone(),
            clock: clock.clone(),
            session_hours: 24,
        });
        let pool = Arc::new(Pool {
            journal: frail.clone(),
            sessions: store.clone(),
            accounts: store.clone(),
            keyring: keyring.clone(),
            links: links.clone(),
            watchers: watchers.clone(),
            events,
            clock: clock.clone(),
            incarnation: 3,
            policy: [0; 32],
            queue: Queue::default(),
        });
        let tasks = Arc::new(TaskService {
            journal: frail.clone(),
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
            Statistics { gauges: frail.clone(), nodes, pool: pool.clone(), clock: clock.clone(), remembered: Remembered::default() };
        Self { store, frail, clock, sessions, tasks, pool, expiry, memory, messages, state, statistics, bus }
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
    Caller::User { user: sample::user_id(n), role: Role::Developer }
}
fn someone(n: u16, role: Role) -> Caller {
    Caller::User { user: sample::user_id(n), role }
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
    w.frail.failures.store(1, Ordering::SeqCst);
    assert!(w.expiry.round().await.is_err());
    assert_eq!((w.status(a.id).await, w.task_state(of_a).await.0), ("expired", TaskState::Pending), "between the two");
    w.expiry.round().await.unwrap();
    assert_eq!(w.task_state(of_a).await, CANCELLED, "the next round goes on with it");

    // The process ends between the two; the next one takes up what it finds.
    w.advance(10);
    w.frail.failures.store(1, Ordering::SeqCst);
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
    w.frail.end_at_accept.store(true, Ordering::SeqCst);
    let dispatch = || hub_engine::tasks::Dispatch {
        session: Some(s.id),
        node: None,
        spec: mesh_core::spec::Spec::Echo { payload: vec![] },
        timeout_secs: 0,
        queue_secs: 0,
        terms: Default::default(),
        wait_secs: 0,
        keyed: None,
        door: "rest",
        request_id: None,
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
    assert_eq!(code(w.state.list(&someone(4, Role::Guest), None, None, all()).await), "forbidden");
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
    let counts = |w: &World| w.frail.counts.swap(0, Ordering::SeqCst);
    w.frail.count_ms.store(100, Ordering::SeqCst);
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
    w.frail.count_ms.store(5000, Ordering::SeqCst);
    w.advance(60);
    w.statistics.get(&admin).await.unwrap();
    w.advance(14);
    w.statistics.get(&admin).await.unwrap();
    assert_eq!(counts(&w), 1);
    w.advance(2);
    w.statistics.get(&admin).await.unwrap();
    assert_eq!(counts(&w), 1, "at most 15 s old");
}

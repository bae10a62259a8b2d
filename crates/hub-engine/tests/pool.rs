//! Who goes first, who waits and why, and what a restart, a failing commit or a deadline makes of it.
//! In memory, with a clock and a journal that the test holds.

use async_trait::async_trait;
use hub_engine::delivery::{Delivery, Hello, Reported, Welcome};
use hub_engine::events::Events;
use hub_engine::idempotency::{Idempotency, Keyed};
use hub_engine::links::{LINK_QUEUE, LinkCommand, Links};
use hub_engine::pool::{Accepted, Pool, Queue};
use hub_engine::ports::{Accounts, Journal, Keyring, NodeDirectory, Stored, Window};
use hub_engine::records::{ApiKey, Device, DeviceChange, Node, RefreshToken, Rotation, Task, TaskFilter, User};
use hub_engine::rights::Rights;
use hub_engine::watch::Watchers;
use hub_testkit::contract::{HandClock, sample};
use hub_testkit::journal::Write;
use hub_testkit::{MemoryStore, TestJournal, TestKeys};
use mesh_core::capability::{Capabilities, Gpu};
use mesh_core::permission::{Caller, Role};
use mesh_core::placement::Waiting;
use mesh_core::select::Selector;
use mesh_core::task::{Event, OnLost, Outcome, Progress, ReasonCode, TaskState, Terms};
use mesh_core::{ApiKeyId, DeviceId, Digest, LoginId, NodeId, TaskId, UnixMs, UserId, sha256};
use mesh_process::Clock;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::sync::mpsc;

fn admin() -> Caller {
    Caller::person(sample::user_id(1), Role::Admin)
}

/// The memory's accounts, which count how often a user is read and can be made to wait with it.
struct Slow {
    inner: Arc<MemoryStore>,
    reads: AtomicUsize,
    /// Whose reading says so and waits for a permit.
    slow: std::sync::Mutex<Option<UserId>>,
    entered: tokio::sync::Semaphore,
    go_on: tokio::sync::Semaphore,
}

#[async_trait]
impl Accounts for Slow {
    async fn user(&self, id: UserId) -> Stored<Option<User>> {
        self.reads.fetch_add(1, Ordering::SeqCst);
        let slow = *self.slow.lock().unwrap();
        if slow == Some(id) {
            self.entered.add_permits(1);
            self.go_on.acquire().await.unwrap().forget();
        }
        self.inner.user(id).await
    }
    async fn add_user(&self, user: &User) -> Stored<bool> {
        self.inner.add_user(user).await
    }
    async fn user_named(&self, username: &str) -> Stored<Option<User>> {
        self.inner.user_named(username).await
    }
    async fn oldest_admin(&self) -> Stored<Option<User>> {
        self.inner.oldest_admin().await
    }
    async fn count_users(&self) -> Stored<u64> {
        self.inner.count_users().await
    }
    async fn set_password(&self, id: UserId, was: &str, hash: &str, keep: Option<LoginId>) -> Stored<bool> {
        self.inner.set_password(id, was, hash, keep).await
    }
    async fn add_login(&self, device: &Device, token: &RefreshToken) -> Stored<()> {
        self.inner.add_login(device, token).await
    }
    async fn rotate_refresh(&self, old: &Digest, new_mac: &Digest, new_expires_at: UnixMs, now: UnixMs) -> Stored<Rotation> {
        self.inner.rotate_refresh(old, new_mac, new_expires_at, now).await
    }
    async fn refresh_of(&self, mac: &Digest) -> Stored<Option<(UserId, LoginId)>> {
        self.inner.refresh_of(mac).await
    }
    async fn end_login(&self, login: LoginId) -> Stored<()> {
        self.inner.end_login(login).await
    }
    async fn device(&self, id: DeviceId, now: UnixMs) -> Stored<Option<Device>> {
        self.inner.device(id, now).await
    }
    async fn devices(&self, user: UserId, now: UnixMs, window: Window<DeviceId>) -> Stored<Vec<Device>> {
        self.inner.devices(user, now, window).await
    }
    async fn change_device(&self, id: DeviceId, change: &DeviceChange) -> Stored<()> {
        self.inner.change_device(id, change).await
    }
    async fn device_seen(&self, id: DeviceId, address: Option<IpAddr>, now: UnixMs) -> Stored<()> {
        self.inner.device_seen(id, address, now).await
    }
    async fn add_key(&self, key: &ApiKey) -> Stored<()> {
        self.inner.add_key(key).await
    }
    async fn key_by_mac(&self, mac: &Digest) -> Stored<Option<ApiKey>> {
        self.inner.key_by_mac(mac).await
    }
    async fn key(&self, id: ApiKeyId) -> Stored<Option<ApiKey>> {
        self.inner.key(id).await
    }
    async fn keys(&self, user: UserId, window: Window<ApiKeyId>) -> Stored<Vec<ApiKey>> {
        self.inner.keys(user, window).await
    }
    async fn remove_key(&self, id: ApiKeyId) -> Stored<bool> {
        self.inner.remove_key(id).await
    }
    async fn key_used(&self, id: ApiKeyId, now: UnixMs) -> Stored<()> {
        self.inner.key_used(id, now).await
    }
}

struct Hub {
    store: Arc<MemoryStore>,
    journal: Arc<TestJournal>,
    accounts: Arc<Slow>,
    clock: Arc<HandClock>,
    links: Arc<Links>,
    pool: Arc<Pool>,
    delivery: Delivery,
    idempotency: Idempotency,
}

/// A node that is linked.
struct Machine {
    node: Node,
    welcome: Welcome,
    queue: mpsc::Receiver<LinkCommand>,
}

impl Hub {
    fn new() -> Self {
        Self::on(Arc::new(MemoryStore::new()), Arc::new(HandClock::default()))
    }
    /// A process on what another one may have left.
    fn on(store: Arc<MemoryStore>, clock: Arc<HandClock>) -> Self {
        let journal = TestJournal::over(store.clone());
        let accounts = Arc::new(Slow {
            inner: store.clone(),
            reads: AtomicUsize::new(0),
            slow: Default::default(),
            entered: tokio::sync::Semaphore::new(0),
            go_on: tokio::sync::Semaphore::new(0),
        });
        let links = Arc::new(Links::default());
        let pool = Arc::new(Pool {
            journal: journal.clone(),
            sessions: store.clone(),
            accounts: accounts.clone(),
            rights: Arc::new(Rights::new(store.clone(), store.clone(), clock.clone())),
            keyring: Arc::new(TestKeys),
            links: links.clone(),
            watchers: Watchers::default(),
            events: Events::local(Duration::from_secs(60), clock.clone()),
            clock: clock.clone(),
            incarnation: 1,
            policy: [0; 32],
            queue: Queue::default(),
        });
        let delivery = Delivery {
            journal: journal.clone(),
            output: store.clone(),
            nodes: store.clone(),
            links: links.clone(),
            pool: pool.clone(),
            clock: clock.clone(),
            output_bytes: 1 << 20,
        };
        let idempotency = Idempotency { store: store.clone(), clock: clock.clone() };
        Self { store, journal, accounts, clock, links, pool, delivery, idempotency }
    }
    /// The process dies, and another one takes up what it left.
    async fn restarted(self) -> Self {
        let hub = Self::on(self.store, self.clock);
        hub.pool.recover().await.unwrap();
        hub
    }

    /// A machine of the `n`th user's with so many places; `gpus` are its slots.
    async fn machine(&self, n: u16, max_tasks: u32, gpus: usize) -> Machine {
        let gpu = Gpu { name: "a100".into(), memory_bytes: 1 };
        let capabilities = Capabilities { os: "linux".into(), gpus: vec![gpu; gpus], ..Default::default() };
        let node = Node { capabilities, owner: sample::user_id(1), ..sample::node(n, n as u8) };
        let invite = sample::invite(n);
        self.store.add_invite(&invite).await.unwrap();
        self.store.claim_invite(invite.id, &node, invite.created_at + 1, 1000).await.unwrap();
        self.link(node, max_tasks, vec![]).await
    }
    async fn link(&self, node: Node, max_tasks: u32, attempts: Vec<(TaskId, mesh_core::task::AttemptNo)>) -> Machine {
        let (commands, queue) = mpsc::channel(LINK_QUEUE);
        let hello = Hello { spool: sample::spool_id(1), max_tasks, keeps: 0, closed: None, attempts };
        let welcome = self.delivery.open_link(&node, hello, commands).await.unwrap();
        Machine { node, welcome, queue }
    }

    fn task(&self, n: u16, user: u16, terms: Terms) -> Task {
        let mut task = Task { queue_secs: 0, terms, created_at: self.clock.now_ms(), ..sample::task(n) };
        task.progress = Progress::new();
        task.actor.user = sample::user_id(user);
        task.digest = sha256(&task.spec);
        task
    }
    /// Accepts it for an admin, so that any node will do.
    async fn accept(&self, mut task: Task) -> TaskId {
        task.seal = TestKeys.seal(&task.intent());
        self.pool.accept(task, &admin(), None).await.unwrap().id
    }
    async fn ask(&self, n: u16, user: u16, terms: Terms) -> TaskId {
        self.accept(self.task(n, user, terms)).await
    }
    async fn progress(&self, id: TaskId) -> Progress {
        self.store.task(id).await.unwrap().unwrap().progress
    }
    async fn reason(&self, id: TaskId) -> (TaskState, Option<ReasonCode>) {
        let p = self.progress(id).await;
        (p.state, p.reason.map(|r| r.code))
    }
    async fn why(&self, id: TaskId) -> Option<Waiting> {
        self.pool.why_waiting(&self.store.task(id).await.unwrap().unwrap())
    }
    async fn later(&self, ms: u64) {
        self.clock.advance(Duration::from_millis(ms));
        self.pool.round_of_changes().await.unwrap();
    }
    async fn end(&self, m: &Machine, task: TaskId, outcome: Outcome) {
        let attempt = self.progress(task).await.attempt.unwrap().no;
        let caller = Caller::Node { node: m.node.id, generation: m.welcome.generation };
        let r = Reported { task, attempt, outcome, last_seq: 0, result: None, sandbox_applied: None, digests: None };
        self.delivery.result(&caller, r).await.unwrap();
        self.pool.round_of_changes().await.unwrap();
    }
    /// Nobody ever asks for another's nodes here: users are admins, as their tasks were accepted.
    async fn admins(&self, users: std::ops::RangeInclusive<u16>) {
        for n in users {
            let user = User { role: Role::Admin, ..sample::user(n, &format!("u{n}")) };
            self.store.add_user(&user).await.unwrap();
        }
    }
}

impl Machine {
    fn orders(&mut self) -> Vec<TaskId> {
        self.commands().into_iter().filter_map(|c| if let LinkCommand::Order(o) = c { Some(o.task) } else { None }).collect()
    }
    fn cancels(&mut self) -> Vec<TaskId> {
        self.commands().into_iter().filter_map(|c| if let LinkCommand::Cancel { task, .. } = c { Some(task) } else { None }).collect()
    }
    fn commands(&mut self) -> Vec<LinkCommand> {
        std::iter::from_fn(|| self.queue.try_recv().ok()).collect()
    }
}

fn priority(priority: i32) -> Terms {
    Terms { priority, ..Terms::default() }
}
fn select(text: &str, gpus: u32) -> Terms {
    let mut s = Selector::parse(text).unwrap();
    if gpus > 0 {
        s.slots.insert("gpu".into(), gpus);
    }
    Terms { select: Some(s), ..Terms::default() }
}

#[tokio::test]
async fn the_higher_goes_first_then_users_take_turns_then_age() {
    let hub = Hub::new();
    hub.admins(1..=3).await;
    let mut m = hub.machine(1, 1, 0).await;
    let running = hub.ask(1, 3, Terms::default()).await;
    let mut ids = vec![];
    // One asks for much and early, another for little and late; one task is urgent and last.
    for (n, user, p) in [(2, 1, 0), (3, 1, 0), (4, 1, 0), (5, 2, 0), (6, 2, 0), (7, 2, 5), (8, 1, -1)] {
        ids.push(hub.ask(n, user, priority(p)).await);
    }
    assert_eq!(m.orders(), [running]);
    hub.pool.round().await.unwrap();
    assert_eq!(hub.why(ids[0]).await, Some(Waiting::NoSlot));
    let mut order = vec![];
    let mut current = running;
    for _ in 0..ids.len() {
        hub.end(&m, current, Outcome::Exited(0)).await;
        current = m.orders()[0];
        order.push(ids.iter().position(|id| *id == current).unwrap() + 2);
    }
    assert_eq!(order, [7, 2, 5, 3, 6, 4, 8]);
}

#[tokio::test]
async fn users_take_turns_where_several_places_are_free() {
    let hub = Hub::new();
    hub.admins(1..=2).await;
    let mut ids = vec![];
    for n in 1..=6 {
        ids.push(hub.ask(n, 1, Terms::default()).await);
    }
    for n in 7..=8 {
        ids.push(hub.ask(n, 2, Terms::default()).await);
    }
    let mut m = hub.machine(1, 4, 0).await;
    hub.pool.round().await.unwrap();
    let got: Vec<_> = m.orders().iter().map(|t| ids.iter().position(|id| id == t).unwrap() + 1).collect();
    let mut sorted = got.clone();
    sorted.sort_unstable();
    assert_eq!(sorted, [1, 2, 7, 8], "two each, though one came first with six");
    // Who has fewer attempts is next.
    hub.end(&m, ids[6], Outcome::Exited(0)).await;
    assert_eq!(m.orders(), [ids[2]], "nobody else waits");
}

#[tokio::test]
async fn a_freed_slot_costs_those_nothing_who_cannot_use_it() {
    let hub = Hub::new();
    hub.admins(1..=1).await;
    let away = NodeId::from_bytes([9; 16]);
    for n in 0..10_000u16 {
        hub.accept(Task { named_node: Some(away), ..hub.task(1000 + n, 1, Terms::default()) }).await;
    }
    for n in 0..1000u16 {
        hub.ask(20_000 + n, 1, select("zone=nowhere", 0)).await;
    }
    let m = hub.machine(1, 1, 0).await;
    let here = async |n| hub.accept(Task { named_node: Some(m.node.id), ..hub.task(n, 1, Terms::default()) }).await;
    let (first, second) = (here(1).await, here(2).await);
    hub.pool.round().await.unwrap();
    let before = hub.pool.queue.weighed();
    hub.end(&m, first, Outcome::Exited(0)).await;
    assert_eq!(hub.progress(second).await.state, TaskState::Assigned);
    assert_eq!(hub.pool.queue.weighed() - before, 1, "one that waited for this node, and nobody else");
    let before = hub.pool.queue.weighed();
    hub.end(&m, second, Outcome::Exited(0)).await;
    assert_eq!(hub.pool.queue.weighed() - before, 0, "there is room, and of those who wait nobody can use it");
    // A look at everything costs the groups and not the tasks.
    let before = hub.pool.queue.weighed();
    hub.pool.round().await.unwrap();
    assert_eq!(hub.pool.queue.weighed() - before, 2);
}

#[tokio::test]
async fn who_is_new_passes_those_of_other_groups_and_none_of_its_own() {
    let hub = Hub::new();
    hub.admins(1..=1).await;
    let mut m = hub.machine(1, 2, 1).await;
    let gpu = hub.ask(1, 1, select("", 1)).await;
    let waits = hub.ask(2, 1, select("", 1)).await;
    assert_eq!(m.orders(), [gpu]);
    hub.pool.round().await.unwrap();
    assert_eq!(hub.why(waits).await, Some(Waiting::NoSlot), "the one gpu is taken");
    // Nobody waits for a plain place: it is given at once, without a round.
    let plain = hub.ask(3, 1, Terms::default()).await;
    assert_eq!(m.orders(), [plain]);
    hub.end(&m, plain, Outcome::Exited(0)).await;
    // The gpu is free, and nobody has looked yet: still, who waited goes first.
    hub.links.release(m.node.id, gpu);
    let third = hub.ask(4, 1, select("", 1)).await;
    assert_eq!(m.orders(), []);
    hub.pool.round().await.unwrap();
    assert_eq!(m.orders(), [waits]);
    assert_eq!(hub.why(third).await, Some(Waiting::NoSlot));
}

#[tokio::test]
async fn who_is_new_takes_no_place_that_somebody_waits_for() {
    let hub = Hub::new();
    hub.admins(1..=2).await;
    let mut m = hub.machine(1, 1, 0).await;
    let runs = hub.ask(1, 1, Terms::default()).await;
    // Of other groups than the newcomers, and one that could never use this node.
    let older = hub.ask(2, 2, select("os=linux", 0)).await;
    let higher = hub.ask(3, 2, Terms { priority: 3, ..select("arch", 0) }).await;
    hub.ask(4, 2, Terms { priority: 9, ..select("zone=nowhere", 0) }).await;
    hub.pool.round().await.unwrap();
    assert_eq!(m.orders(), [runs]);
    // A place is free, and nobody has looked yet.
    hub.links.release(m.node.id, runs);
    let equal = hub.ask(5, 1, Terms::default()).await;
    let between = hub.ask(6, 1, Terms { priority: 2, ..select("os", 0) }).await;
    assert_eq!(m.orders(), [], "both would have passed somebody");
    assert_eq!(hub.why(equal).await, Some(Waiting::NoSlot));
    // One that goes before all of them anyway need not wait for the look.
    let urgent = hub.ask(7, 1, Terms { priority: 4, ..select("os", 0) }).await;
    assert_eq!(m.orders(), [], "its own kind waits: the look decides");
    hub.pool.round_of_changes().await.unwrap();
    let mut order = m.orders();
    for _ in 0..4 {
        hub.end(&m, *order.last().unwrap(), Outcome::Exited(0)).await;
        order.extend(m.orders());
    }
    assert_eq!(order, [urgent, higher, between, older, equal], "of the last two, user 2 was given something longer ago");
    hub.end(&m, equal, Outcome::Exited(0)).await;
    // Nobody is left who could use it.
    let plain = hub.ask(8, 1, Terms::default()).await;
    assert_eq!(m.orders(), [plain]);
    hub.links.release(m.node.id, plain);
    let waits = hub.ask(9, 1, select("gpu", 0)).await;
    hub.pool.round().await.unwrap();
    let first = hub.ask(10, 2, Terms { priority: 1, ..Terms::default() }).await;
    assert_eq!((m.orders(), hub.why(waits).await), (vec![first], Some(Waiting::NoCandidate)));
}

#[tokio::test]
async fn looks_read_rights_only_where_there_is_a_place_and_not_each_time() {
    const USERS: u16 = 2000;
    let hub = Hub::new();
    hub.admins(1..=USERS + 1).await;
    let m = hub.machine(1, 1, 0).await;
    let runs = hub.ask(1, USERS + 1, Terms::default()).await;
    for n in 1..=USERS {
        hub.ask(1 + n, n, Terms::default()).await;
    }
    let reads = |hub: &Hub| hub.accounts.reads.swap(0, Ordering::SeqCst);
    for _ in 0..3 {
        hub.pool.round().await.unwrap();
        hub.clock.advance(Duration::from_secs(60));
    }
    assert_eq!(reads(&hub), 0, "as they were accepted, and no node has a place");
    let hub = hub.restarted().await;
    let mut m = hub.link(m.node, 1, vec![(runs, hub.progress(runs).await.attempt.unwrap().no)]).await;
    hub.pool.round().await.unwrap();
    assert_eq!(reads(&hub), usize::from(USERS), "each once, so that it is known why they wait");
    for _ in 0..3 {
        hub.clock.advance(Duration::from_secs(60));
        hub.pool.round().await.unwrap();
    }
    assert_eq!(reads(&hub), 0);
    // A place: it is given by rights of now, and the reading ends with it.
    hub.end(&m, runs, Outcome::Exited(0)).await;
    assert_eq!(m.orders().len(), 1);
    let read = reads(&hub);
    assert!((1..=32).contains(&read), "{read}");
}

#[tokio::test]
async fn rights_that_were_read_are_good_for_a_while() {
    let hub = Hub::new();
    // An admin when it was accepted, and nobody any more.
    let id = hub.ask(1, 2, Terms::default()).await;
    let _m = hub.machine(1, 1, 0).await;
    let reads = async |ms: u64| {
        hub.clock.advance(Duration::from_millis(ms));
        hub.pool.round().await.unwrap();
        hub.accounts.reads.swap(0, Ordering::SeqCst)
    };
    assert_eq!([reads(0).await, reads(1000).await, reads(3000).await, reads(1).await, reads(1000).await], [1, 0, 0, 1, 0]);
    assert_eq!(hub.why(id).await, Some(Waiting::NoCandidate));
}

#[tokio::test]
async fn who_has_a_place_does_not_wait_while_others_rights_are_read() {
    let hub = Hub::new();
    hub.admins(1..=2).await;
    let first = hub.ask(1, 1, priority(1)).await;
    let hub = hub.restarted().await;
    hub.pool.round().await.unwrap();
    let second = hub.ask(2, 2, Terms::default()).await;
    *hub.accounts.slow.lock().unwrap() = Some(sample::user_id(2));
    let mut m = hub.machine(1, 2, 0).await;
    let meanwhile = async {
        hub.accounts.entered.acquire().await.unwrap().forget();
        assert_eq!(m.orders(), [first], "committed and sent before the other's rights are known");
        hub.accounts.go_on.add_permits(1);
    };
    let (looked, ()) = futures::future::join(hub.pool.round(), meanwhile).await;
    looked.unwrap();
    assert_eq!(m.orders(), [second]);
}

#[tokio::test]
async fn slots_are_held_while_it_runs_and_known_after_a_restart() {
    let hub = Hub::new();
    hub.admins(1..=1).await;
    let mut m = hub.machine(1, 8, 2).await;
    let two = hub.ask(1, 1, select("os=linux", 2)).await;
    let one = hub.ask(2, 1, select("", 1)).await;
    let never = hub.ask(3, 1, select("", 3)).await;
    let other = hub.ask(4, 1, select("os=darwin", 0)).await;
    assert_eq!(m.orders(), [two]);
    let attempt = hub.progress(two).await.attempt.unwrap().no;
    let hub = hub.restarted().await;
    assert_eq!(hub.why(one).await, Some(Waiting::HubStarting), "nobody has looked yet");
    let mut m = hub.link(m.node, 8, vec![(two, attempt)]).await;
    hub.pool.round().await.unwrap();
    assert_eq!(m.orders(), [], "the journal says who holds the slots");
    assert_eq!(hub.why(one).await, Some(Waiting::NoSlot));
    assert_eq!(hub.why(never).await, Some(Waiting::NoCandidate));
    assert_eq!(hub.why(other).await, Some(Waiting::NoCandidate));
    hub.end(&m, two, Outcome::Exited(0)).await;
    assert_eq!(m.orders(), [one]);
}

#[tokio::test]
async fn a_selector_nobody_fits_waits_as_long_as_it_was_told() {
    let hub = Hub::new();
    hub.admins(1..=1).await;
    let _m = hub.machine(1, 8, 0).await;
    let id = hub.accept(Task { queue_secs: 5, ..hub.task(1, 1, select("zone=mars", 0)) }).await;
    hub.later(5000).await;
    assert_eq!(hub.why(id).await, Some(Waiting::NoCandidate));
    hub.later(1).await;
    let p = hub.progress(id).await;
    assert_eq!((p.state, p.reason.unwrap().detail), (TaskState::Failed, "no_candidate".into()));
}

#[tokio::test]
async fn it_is_not_started_before_its_time_and_waits_for_a_node_only_from_then_on() {
    let hub = Hub::new();
    hub.admins(1..=1).await;
    let start = hub.clock.now_ms() + 10_000;
    let terms = Terms { not_before: Some(start), ..Terms::default() };
    let id = hub.accept(Task { queue_secs: 2, ..hub.task(1, 1, terms) }).await;
    assert_eq!(hub.why(id).await, Some(Waiting::NotBefore));
    hub.later(9_999).await;
    assert_eq!(hub.why(id).await, Some(Waiting::NotBefore));
    let hub = hub.restarted().await;
    assert_eq!(hub.why(id).await, Some(Waiting::NotBefore), "the stored time counts");
    hub.later(1).await;
    assert_eq!(hub.why(id).await, Some(Waiting::NoCandidate), "its queue_secs begin now");
    let mut m = hub.machine(1, 1, 0).await;
    hub.later(0).await;
    assert_eq!(m.orders(), [id]);
}

#[tokio::test]
async fn retries_rest_longer_each_time_and_only_the_last_attempt_ends_the_task() {
    let hub = Hub::new();
    hub.admins(1..=1).await;
    let mut m = hub.machine(1, 1, 0).await;
    let id = hub.ask(1, 1, Terms { retries: 2, backoff_ms: 500, ..Terms::default() }).await;
    for (ordinal, pause) in [(1, 500), (2, 1000)] {
        assert_eq!(m.orders(), [id]);
        assert_eq!(hub.progress(id).await.attempt.unwrap().no.ordinal(), ordinal);
        hub.end(&m, id, Outcome::Exited(9)).await;
        assert_eq!((hub.reason(id).await, hub.why(id).await), ((TaskState::Pending, None), Some(Waiting::Backoff)));
        assert_eq!(hub.links.running(m.node.id), 0, "a pause holds no place");
        hub.later(pause - 1).await;
        assert_eq!(m.orders(), []);
        hub.later(1).await;
    }
    assert_eq!(m.orders(), [id]);
    hub.end(&m, id, Outcome::Exited(9)).await;
    assert_eq!(hub.reason(id).await, (TaskState::Failed, Some(ReasonCode::Exit)));
    let ends = hub.store.history(id).await.unwrap().into_iter().filter(|l| l.kind == "ended").count();
    assert_eq!(ends, 3, "the history shows each");
}

/// The hub dies between the failed attempt's commit and the next attempt.
#[tokio::test]
async fn a_restart_in_a_pause_keeps_the_pause() {
    let hub = Hub::new();
    hub.admins(1..=1).await;
    let m = hub.machine(1, 1, 0).await;
    let id = hub.ask(1, 1, Terms { retries: 1, backoff_ms: 60_000, ..Terms::default() }).await;
    hub.end(&m, id, Outcome::TimedOut).await;
    hub.later(59_000).await;
    let hub = hub.restarted().await;
    let mut m = hub.link(m.node, 1, vec![]).await;
    hub.later(999).await;
    assert_eq!((m.orders(), hub.why(id).await), (vec![], Some(Waiting::Backoff)));
    hub.later(1).await;
    assert_eq!(m.orders(), [id]);
    assert_eq!(hub.progress(id).await.attempt.unwrap().no.ordinal(), 2);
    // And a hub that was away for longer does not wait again.
    let hub = hub.restarted().await;
    assert_eq!(hub.progress(id).await.retried, 1);
}

#[tokio::test]
async fn a_deadline_ends_what_waits_at_once() {
    let hub = Hub::new();
    hub.admins(1..=1).await;
    let at = hub.clock.now_ms() + 1000;
    let plain = hub.ask(1, 1, Terms { deadline: Some(at), ..Terms::default() }).await;
    let resting = hub.ask(2, 1, Terms { deadline: Some(at), not_before: Some(at - 1), ..Terms::default() }).await;
    hub.later(998).await;
    assert_eq!(hub.progress(plain).await.state, TaskState::Pending);
    // The store fails at the very moment: it is tried again.
    hub.journal.fail(|write| matches!(write, Write::Apply(_)));
    hub.clock.advance(Duration::from_millis(2));
    assert!(hub.pool.round_of_changes().await.is_err());
    hub.journal.work();
    hub.later(0).await;
    for id in [plain, resting] {
        assert_eq!(hub.reason(id).await, (TaskState::Failed, Some(ReasonCode::Deadline)));
    }
    let mut m = hub.machine(1, 4, 0).await;
    hub.pool.round().await.unwrap();
    assert_eq!(m.orders(), [], "and it is gone from the queue");
}

#[tokio::test]
async fn a_deadline_of_granted_work_asks_its_node_whenever_that_is_there() {
    let hub = Hub::new();
    hub.admins(1..=1).await;
    let mut m = hub.machine(1, 4, 0).await;
    let at = hub.clock.now_ms() + 1000;
    let deadline = Some(at);
    let here = hub.ask(1, 1, Terms { deadline, retries: 5, ..Terms::default() }).await;
    let doubt = hub.ask(2, 1, Terms { deadline, ..Terms::default() }).await;
    let starts: Vec<_> = m.commands().into_iter().map(|c| if let LinkCommand::Order(o) = c { o.start_before } else { 0 }).collect();
    assert_eq!(starts, [at; 2], "a node does not start it past its deadline");
    hub.later(1000).await;
    assert_eq!(m.cancels(), [here, doubt]);
    assert_eq!(hub.reason(here).await, (TaskState::Assigned, None), "until the node has answered");
    hub.end(&m, here, Outcome::Cancelled).await;
    assert_eq!(hub.reason(here).await, (TaskState::Failed, Some(ReasonCode::Deadline)), "no cancel, and no retry");
    // The node goes away before it answers, and so does the hub.
    let attempt = hub.progress(doubt).await.attempt.unwrap().no;
    let hub = hub.restarted().await;
    assert_eq!(hub.why(doubt).await, Some(Waiting::InDoubt));
    hub.later(60_000).await;
    assert_eq!(hub.progress(doubt).await.state, TaskState::Assigned, "no clock decides what its node alone knows");
    let mut m = hub.link(m.node, 4, vec![(doubt, attempt)]).await;
    assert_eq!(m.cancels(), [doubt], "asked again");
    hub.end(&m, doubt, Outcome::Lost { detail: "maybe_ran".into() }).await;
    assert_eq!(hub.reason(doubt).await, (TaskState::Failed, Some(ReasonCode::Deadline)));
}

/// The deadline comes while the hub is down.
#[tokio::test]
async fn a_deadline_that_came_while_the_hub_was_away_counts() {
    let hub = Hub::new();
    hub.admins(1..=1).await;
    let m = hub.machine(1, 1, 0).await;
    let terms = Terms { deadline: Some(hub.clock.now_ms() + 1000), ..Terms::default() };
    let (runs, waits) = (hub.ask(1, 1, terms.clone()).await, hub.ask(2, 1, terms).await);
    hub.clock.advance(Duration::from_secs(5));
    let hub = hub.restarted().await;
    hub.pool.round_of_changes().await.unwrap();
    assert_eq!(hub.reason(waits).await, (TaskState::Failed, Some(ReasonCode::Deadline)));
    let attempt = hub.progress(runs).await.attempt.unwrap().no;
    let mut m = hub.link(m.node, 1, vec![(runs, attempt)]).await;
    assert_eq!(m.cancels(), [runs]);
}

#[tokio::test]
async fn a_commit_that_fails_after_a_reservation_gives_all_of_it_back() {
    let hub = Hub::new();
    hub.admins(1..=1).await;
    let id = hub.ask(1, 1, select("", 1)).await;
    let mut m = hub.machine(1, 1, 1).await;
    hub.journal.fail(|write| matches!(write, Write::Apply(_)));
    assert!(hub.pool.round().await.is_err());
    assert_eq!((hub.links.running(m.node.id), hub.links.share(sample::user_id(1)).attempts), (0, 0));
    hub.journal.work();
    hub.pool.round_of_changes().await.unwrap();
    assert_eq!(m.orders(), [id], "nobody had to wake it");
    assert_eq!(hub.links.share(sample::user_id(1)).attempts, 1);
}

#[tokio::test]
async fn what_was_written_without_an_answer_goes_its_way_all_the_same() {
    let hub = Hub::new();
    hub.admins(1..=1).await;
    let unanswered = |on: bool| hub.journal.unanswered.store(on, Ordering::SeqCst);
    let accept = async |n: u16| {
        let mut task = hub.task(n, 1, Terms::default());
        task.seal = TestKeys.seal(&task.intent());
        unanswered(true);
        assert!(hub.pool.accept(task, &admin(), None).await.is_err());
        unanswered(false);
        sample::task_id(n)
    };
    // One that has to wait.
    let waits = accept(1).await;
    hub.pool.round_of_changes().await.unwrap();
    assert_eq!(hub.why(waits).await, Some(Waiting::NoCandidate));
    // The commit that places it.
    let mut m = hub.machine(1, 3, 0).await;
    unanswered(true);
    assert!(hub.pool.round().await.is_err());
    assert_eq!((m.orders(), hub.links.running(m.node.id)), (vec![], 0));
    unanswered(false);
    hub.pool.round_of_changes().await.unwrap();
    assert_eq!((m.orders(), hub.links.running(m.node.id)), (vec![waits], 1));
    // One that was placed as it was accepted.
    let placed = accept(2).await;
    assert_eq!(m.orders(), []);
    hub.pool.round_of_changes().await.unwrap();
    assert_eq!((m.orders(), hub.links.running(m.node.id)), (vec![placed], 2));
    // An end that is to be retried.
    let retried = hub.ask(3, 1, Terms { retries: 1, backoff_ms: 1000, ..Terms::default() }).await;
    assert_eq!(m.orders(), [retried]);
    let caller = Caller::Node { node: m.node.id, generation: m.welcome.generation };
    let attempt = hub.progress(retried).await.attempt.unwrap().no;
    let failed = || Reported {
        task: retried,
        attempt,
        outcome: Outcome::Exited(1),
        last_seq: 0,
        result: None,
        sandbox_applied: None,
        digests: None,
    };
    unanswered(true);
    assert!(hub.delivery.result(&caller, failed()).await.is_err());
    unanswered(false);
    hub.pool.round_of_changes().await.unwrap();
    assert_eq!((hub.why(retried).await, hub.links.running(m.node.id)), (Some(Waiting::Backoff), 2));
    hub.delivery.result(&caller, failed()).await.unwrap();
    hub.later(1001).await;
    assert_eq!(m.orders(), [retried]);
    // And one that ends.
    unanswered(true);
    let attempt = hub.progress(waits).await.attempt.unwrap().no;
    let done =
        Reported { task: waits, attempt, outcome: Outcome::Exited(0), last_seq: 0, result: None, sandbox_applied: None, digests: None };
    assert!(hub.delivery.result(&caller, done).await.is_err());
    unanswered(false);
    assert_eq!(hub.links.running(m.node.id), 3);
    hub.pool.round_of_changes().await.unwrap();
    assert_eq!(hub.links.running(m.node.id), 2, "its place is free");
}

#[tokio::test]
async fn one_key_makes_one_task_whatever_comes_between() {
    let hub = Hub::new();
    hub.admins(1..=1).await;
    let mut m = hub.machine(1, 4, 0).await;
    let caller = Caller::person(UserId::from_bytes([1; 16]), Role::Admin);
    let keyed = |request: u8| -> Keyed { hub.idempotency.keyed(&caller, "POST /dispatch", "k", [request; 32]) };
    let accept = async |n: u16, keyed: Keyed| {
        let mut task = hub.task(n, 1, Terms::default());
        task.seal = TestKeys.seal(&task.intent());
        hub.pool.accept_once(Box::new(task), &admin(), None, Some(&keyed)).await
    };
    let Ok(Accepted::New(first)) = accept(1, keyed(1)).await else { panic!() };
    assert!(matches!(accept(2, keyed(1)).await, Ok(Accepted::Before(id)) if id == first.id));
    assert_eq!(accept(3, keyed(2)).await.unwrap_err().to_string().split(' ').next(), Some("this"), "another request");
    assert_eq!(m.orders(), [first.id]);
    assert_eq!(hub.links.running(m.node.id), 1, "who came second holds no place");
    assert_eq!(hub.store.tasks(&TaskFilter::default(), Window { before: None, limit: 9 }).await.unwrap().len(), 1);
    // A day later the key is free again.
    hub.clock.advance(Duration::from_secs(86_400 - 1));
    assert!(matches!(accept(4, keyed(1)).await, Ok(Accepted::Before(_))));
    assert_eq!(hub.idempotency.forget_old().await.unwrap(), 0);
    hub.clock.advance(Duration::from_secs(1));
    assert!(matches!(accept(5, keyed(2)).await, Ok(Accepted::New(_))));
    hub.clock.advance(Duration::from_secs(86_400));
    assert_eq!(hub.idempotency.forget_old().await.unwrap(), 1);
}

fn losing(on_lost: OnLost, lost_after: Option<u64>) -> Terms {
    Terms { on_lost, lost_after, ..Terms::default() }
}

#[tokio::test]
async fn a_node_that_stays_away_loses_what_its_callers_gave_up() {
    let hub = Hub::new();
    hub.admins(1..=1).await;
    let m = hub.machine(1, 8, 0).await;
    let fails = hub.ask(1, 1, losing(OnLost::Fail, Some(5))).await;
    let again = hub.ask(2, 1, losing(OnLost::Requeue, Some(5))).await;
    let waits = hub.ask(3, 1, Terms::default()).await;
    let ever = hub.ask(4, 1, losing(OnLost::Wait, Some(0))).await;
    let unwanted = hub.ask(5, 1, losing(OnLost::Requeue, Some(5))).await;
    let first = hub.progress(again).await.attempt.unwrap().no;
    hub.clock.advance(Duration::from_secs(9));
    hub.pool.round().await.unwrap();
    assert_eq!(hub.progress(fails).await.state, TaskState::Assigned, "its node is here");

    let event = Event::CancelRequested { reason: ReasonCode::CancelledByUser };
    hub.pool.apply(unwanted, &event, hub_engine::ports::Besides::default()).await.unwrap();
    let Machine { node, welcome, .. } = m;
    drop(welcome);
    let look = async |ms| {
        hub.clock.advance(Duration::from_millis(ms));
        hub.pool.round().await.unwrap();
    };
    look(0).await;
    look(4999).await;
    for id in [fails, again, waits, ever, unwanted] {
        assert_eq!((hub.progress(id).await.state, hub.why(id).await), (TaskState::Assigned, Some(Waiting::InDoubt)));
    }
    look(1).await;
    assert_eq!(hub.reason(fails).await, (TaskState::Failed, Some(ReasonCode::Lost)));
    assert_eq!(hub.reason(unwanted).await, (TaskState::Cancelled, Some(ReasonCode::CancelledByUser)));
    assert_eq!((hub.reason(again).await, hub.why(again).await), ((TaskState::Pending, None), Some(Waiting::Backoff)));
    assert_eq!(hub.links.held(node.id).len(), 2, "what is lost holds no place");

    let mut other = hub.machine(2, 1, 0).await;
    look(499).await;
    assert_eq!(other.orders(), []);
    look(1).await;
    assert_eq!(other.orders(), [again]);
    assert_eq!(hub.progress(again).await.attempt.unwrap().no.ordinal(), 2);

    // The old node comes back and has it all: it ends what is no longer its own, and its word about it is
    // late.
    let known = [waits, ever].map(|t| (t, first)).into_iter().chain([(again, first), (fails, first)]).collect();
    let mut m = hub.link(node, 8, known).await;
    let mut cancels = m.cancels();
    cancels.sort_unstable();
    assert_eq!(cancels, [fails, again]);
    let caller = Caller::Node { node: m.node.id, generation: m.welcome.generation };
    for task in [again, fails] {
        let outcome = Outcome::Exited(0);
        let r = Reported { task, attempt: first, outcome, last_seq: 3, result: None, sandbox_applied: None, digests: None };
        hub.delivery.result(&caller, r).await.unwrap();
        assert!(m.commands().contains(&LinkCommand::ResultAck { task, attempt: first }));
    }
    assert_eq!(hub.progress(again).await.state, TaskState::Assigned);
    assert_eq!(hub.reason(fails).await, (TaskState::Failed, Some(ReasonCode::Lost)));

    // Away again: its clock begins anew, and anew with the process of the hub.
    let Machine { node, welcome, .. } = m;
    drop(welcome);
    look(0).await;
    look(3_599_999).await;
    assert_eq!(hub.progress(waits).await.state, TaskState::Assigned);
    let hub = hub.restarted().await;
    hub.pool.round().await.unwrap();
    hub.clock.advance(Duration::from_secs(3599));
    hub.pool.round().await.unwrap();
    assert_eq!(hub.progress(waits).await.state, TaskState::Assigned);
    hub.clock.advance(Duration::from_secs(1));
    hub.pool.round().await.unwrap();
    assert_eq!(hub.reason(waits).await, (TaskState::Failed, Some(ReasonCode::Lost)));
    assert_eq!(hub.progress(ever).await.state, TaskState::Assigned, "it asked to be waited for");
    assert_eq!(hub.links.held(node.id), [(ever, first)]);
}

/// The node itself says that it cannot tell, and the database is away when the clock runs out.
#[tokio::test]
async fn a_lost_attempt_is_followed_by_another_once() {
    let hub = Hub::new();
    hub.admins(1..=1).await;
    let mut m = hub.machine(1, 2, 0).await;
    let id = hub.ask(1, 1, losing(OnLost::Requeue, None)).await;
    assert_eq!(m.orders(), [id]);
    hub.end(&m, id, Outcome::Lost { detail: "warden_ended".into() }).await;
    hub.later(500).await;
    assert_eq!(m.orders(), [id]);
    drop(m.welcome);
    hub.pool.round().await.unwrap();
    hub.clock.advance(Duration::from_secs(60));
    hub.journal.fail(|write| matches!(write, Write::Apply(_)));
    assert!(hub.pool.round().await.is_err());
    hub.journal.work();
    hub.pool.round().await.unwrap();
    let p = hub.progress(id).await;
    assert_eq!((p.state, p.attempt.map(|a| a.no.ordinal())), (TaskState::Pending, Some(2)));
    assert_eq!(hub.links.held(m.node.id), []);
    let kinds: Vec<String> = hub.store.history(id).await.unwrap().into_iter().map(|l| l.kind).collect();
    assert_eq!(kinds, ["accepted", "assigned", "ended", "assigned", "node_silent"]);
}

#[tokio::test]
async fn a_word_about_an_erased_task_changes_nothing_and_is_acknowledged() {
    use hub_engine::ports::Retention;
    let hub = Hub::new();
    hub.admins(1..=1).await;
    let mut m = hub.machine(1, 4, 0).await;
    let id = hub.ask(1, 1, Terms::default()).await;
    let attempt = hub.progress(id).await.attempt.unwrap().no;
    hub.end(&m, id, Outcome::Exited(0)).await;
    assert_eq!(hub.store.erase_tasks(i64::MAX, u64::MAX, 9).await.unwrap().tasks, 1);
    m.commands();
    let caller = Caller::Node { node: m.node.id, generation: m.welcome.generation };
    let r = Reported { task: id, attempt, outcome: Outcome::Exited(0), last_seq: 7, result: None, sandbox_applied: None, digests: None };
    hub.delivery.started(&caller, id, attempt).await.unwrap();
    hub.delivery.result(&caller, r).await.unwrap();
    assert_eq!(m.commands(), [LinkCommand::ResultAck { task: id, attempt }]);
    // One that a node still knows of at its next hello is ended there, whatever became of it.
    let mut m = hub.link(m.node, 4, vec![(id, attempt)]).await;
    assert_eq!(m.cancels(), [id]);
    assert_eq!(hub.store.task(id).await.unwrap(), None);
}

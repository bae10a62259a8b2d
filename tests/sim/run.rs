//! One seed: a hub, a few nodes, callers, and somebody who breaks things; then peace, and the reckoning.

use crate::carry::{Carrier, MOST_NODES};
use crate::hub::Hub;
use crate::node::Machine;
use crate::oracle::Oracle;
use crate::plan::{Break, Fault, Point, Write};
use crate::store::{leave_ungranted, requeue_on_clock};
use crate::world::{StoreMood, T0, Violation, World, lock};
use hub_engine::pool::Accepted;
use hub_engine::ports::{Accounts, Journal, NodeDirectory, Window};
use hub_engine::records::{Actor, Claim, Node, NodeCertificate, OutputTotals, Task, TaskFilter};
use hub_testkit::MemoryStore;
use hub_testkit::contract::sample;
use mesh_core::permission::{Caller, Role};
use mesh_core::spec::{Program, Shell, Spec};
use mesh_core::task::{OnLost, Progress, TaskState, Terms};
use mesh_core::{NodeId, TaskId, UserId};
use mesh_process::Clock;
use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, Once};
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;

/// After the last fault everything is at rest within this: superseded nodes wait for five minutes, and
/// a back-off and a queue are added to that.
const REST: Duration = Duration::from_secs(1500);

thread_local! {
    static PANICS: Cell<u32> = const { Cell::new(0) };
}

/// What all seeds of a run have in common.
#[derive(Debug, Clone, Copy, Default)]
pub struct How {
    pub broken: Option<Break>,
    /// Over what really carries links.
    pub carried: bool,
}

pub struct Report {
    pub violation: Option<Violation>,
    pub trace: Vec<String>,
    pub counts: BTreeMap<String, u64>,
}

/// Runs one seed in a runtime of its own, whose time is simulated.
pub fn run(seed: u64, how: How) -> Report {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            PANICS.with(|p| p.set(p.get() + 1));
            usual(info);
        }));
    });
    PANICS.with(|p| p.set(0));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().expect("a runtime");
    let report = runtime.block_on(async {
        let world = World::new(seed, how.broken, how.carried.then(Carrier::shared));
        let mut sim = Sim::new(&world).await;
        sim.play().await;
        let panics = PANICS.with(Cell::get);
        if panics > 0 {
            world.violated("no_panic", format_args!("{panics} panics"));
        }
        Report { violation: world.violation(), trace: world.trace(), counts: world.counts() }
    });
    runtime.shutdown_background();
    report
}

struct Sim {
    world: Arc<World>,
    disk: Arc<MemoryStore>,
    hub: watch::Sender<Option<Arc<Hub>>>,
    machines: Vec<Arc<Machine>>,
    /// When the next hub starts, once this one is dead.
    hub_due: Option<Instant>,
    hub_no: u64,
    incarnation: u32,
    /// A back-up: the database and what was true then.
    backup: Option<(MemoryStore, Oracle)>,
    restore: bool,
    daemon_due: BTreeMap<usize, Instant>,
    dispatched: Arc<Mutex<Vec<TaskId>>>,
    silent_since: BTreeMap<NodeId, Instant>,
    /// Slow, failing or lossy store; the end of it.
    mood_until: Option<Instant>,
    peace: bool,
    /// Held by each caller that has no answer yet.
    asking: Arc<()>,
    /// By which hub, and which machine.
    revoked_again: BTreeSet<(u64, usize)>,
}

fn caller(user: u16) -> Caller {
    Caller::person(sample::user_id(user), Role::Admin)
}

impl Sim {
    async fn new(world: &Arc<World>) -> Self {
        let disk = Arc::new(MemoryStore::new());
        for n in 1..=2 {
            let user = hub_engine::records::User { role: Role::Admin, ..sample::user(n, &format!("u{n}")) };
            disk.add_user(&user).await.expect("memory");
        }
        let (hub, watched) = watch::channel(None);
        let mut machines = vec![];
        let count = world.rng(|r| r.between(1, MOST_NODES as u64)) as usize;
        for n in 1..=count {
            let invite = sample::invite(n as u16);
            disk.add_invite(&invite).await.expect("memory");
            let certificate = NodeCertificate { spki: world.node_key(n), der: vec![], not_after: i64::MAX, counter: 0 };
            let node = Node { id: sample::node_id(n as u16), name: format!("n{n}"), certificate, ..sample::node(n as u16, n as u8) };
            let claimed = disk.claim_invite(invite.id, &node, T0, 1000).await.expect("memory");
            assert_eq!(claimed, Claim::Claimed);
            let max_tasks = world.rng(|r| r.between(1, 4)) as u32;
            machines.push(Machine::new(world, n, node.id, max_tasks, watched.clone()));
        }
        Self {
            world: world.clone(),
            disk,
            hub,
            machines,
            hub_due: Some(Instant::now()),
            hub_no: 0,
            incarnation: 1,
            backup: None,
            restore: false,
            daemon_due: BTreeMap::new(),
            dispatched: Arc::default(),
            silent_since: BTreeMap::new(),
            mood_until: None,
            peace: false,
            asking: Arc::default(),
            revoked_again: BTreeSet::new(),
        }
    }

    async fn play(&mut self) {
        let steps = self.world.rng(|r| r.between(25, 70));
        for _ in 0..steps {
            let wait = self.world.rng(|r| if r.chance(15) { r.between(3000, 20_000) } else { r.between(20, 1500) });
            if self.wait(Duration::from_millis(wait)).await {
                return;
            }
            self.act().await;
        }
        self.heal();
        let until = Instant::now() + REST;
        loop {
            if self.wait(Duration::from_secs(2)).await {
                return;
            }
            let left = self.left().await;
            if left.is_none() {
                break;
            }
            if Instant::now() > until {
                let (invariant, what) = left.unwrap_or_default();
                return self.world.violated(invariant, what);
            }
        }
        // What comes late must change nothing.
        if !self.wait(Duration::from_secs(30)).await {
            self.world.check_end(&self.disk).await;
            if let Some((invariant, what)) = self.left().await {
                self.world.violated(invariant, format_args!("again: {what}"));
            }
        }
    }

    /// Lets time pass, and starts again what has died. True when the seed is decided.
    async fn wait(&mut self, how_long: Duration) -> bool {
        let until = Instant::now() + how_long;
        loop {
            self.keep_up().await;
            if self.world.violation().is_some() || PANICS.with(Cell::get) > 0 {
                return true;
            }
            let now = Instant::now();
            if now >= until {
                return false;
            }
            let step = if self.peace { Duration::from_secs(1) } else { Duration::from_millis(250) };
            tokio::time::sleep((until - now).min(step)).await;
        }
    }

    async fn keep_up(&mut self) {
        let now = Instant::now();
        let dead = self.hub.borrow().as_ref().is_none_or(|h| h.life.dead());
        if dead {
            let soon = self.world.rng(|r| if r.chance(15) { r.between(10_000, 40_000) } else { r.between(50, 3000) });
            let due = *self.hub_due.get_or_insert(now + Duration::from_millis(soon));
            if now >= due {
                self.start_hub().await;
            }
        }
        for m in &self.machines {
            if m.has_daemon() || m.revoked.load(Ordering::SeqCst) {
                self.daemon_due.remove(&m.n);
                continue;
            }
            let soon = self.world.rng(|r| if r.chance(10) { r.between(10_000, 60_000) } else { r.between(50, 3000) });
            if now >= *self.daemon_due.entry(m.n).or_insert(now + Duration::from_millis(soon)) {
                m.start_daemon();
            }
        }
        if self.mood_until.is_some_and(|t| now >= t) {
            self.mood_until = None;
            *lock(&self.world.mood) = StoreMood::default();
        }
        if self.peace {
            self.revoke_again();
        }
        if self.world.is(Break::RequeueOnClock) {
            self.requeue_silent().await;
        }
    }

    async fn start_hub(&mut self) {
        self.hub_due = None;
        if std::mem::take(&mut self.restore)
            && let Some((disk, oracle)) = self.backup.take()
        {
            self.world.fault(Fault::HubRestore, "");
            // Whatever the old hub said is long gone by now.
            for m in &self.machines {
                lock(&m.wires).drain(..).for_each(|w| w.cut(Some(Duration::ZERO), Some(Duration::ZERO)));
            }
            self.world.restored(oracle);
            self.disk = Arc::new(disk);
            if !self.world.is(Break::ForgetIncarnation) {
                self.incarnation += 1;
            }
        } else if self.hub_no > 0 && self.world.rng(|r| r.chance(30)) {
            self.leave_ungranted().await;
        }
        self.hub_no += 1;
        let hub = Hub::new(&self.world, &self.disk, self.hub_no, self.incarnation);
        hub.start();
        self.hub.send_replace(Some(hub));
    }

    async fn leave_ungranted(&self) {
        let filter = TaskFilter { state: Some(TaskState::Pending), ..Default::default() };
        let waiting = self.disk.tasks(&filter, Window { before: None, limit: 10 }).await.unwrap_or_default();
        let free = waiting.into_iter().find(|t| t.named_node.is_none());
        if let Some(task) = free {
            let node = self.world.rng(|r| self.machines[r.below(self.machines.len() as u64) as usize].id);
            let now = self.world.clock().now_ms();
            leave_ungranted(&self.world, &self.disk, &task, node, self.incarnation, now).await;
        }
    }

    async fn requeue_silent(&mut self) {
        let Some(hub) = self.hub.borrow().clone().filter(|h| h.serves()) else { return };
        for m in &self.machines {
            if hub.links.get(m.id).is_some() {
                self.silent_since.remove(&m.id);
                continue;
            }
            let since = *self.silent_since.entry(m.id).or_insert_with(Instant::now);
            if since.elapsed() < Duration::from_secs(10) {
                continue;
            }
            for (id, _) in hub.links.held(m.id) {
                if let Ok(Some(task)) = self.disk.task(id).await {
                    let pool = hub.pool.clone();
                    let _ = hub.life.tasks.complete("requeue", async move { requeue_on_clock(&pool, &task).await }).await;
                }
            }
        }
    }

    fn machine(&self) -> Arc<Machine> {
        self.world.rng(|r| self.machines[r.below(self.machines.len() as u64) as usize].clone())
    }

    async fn act(&mut self) {
        let roll = self.world.rng(|r| r.below(100));
        match roll {
            0..=44 => {
                for _ in 0..self.world.rng(|r| r.between(1, 4)) {
                    self.dispatch(false, false);
                }
            }
            45..=48 => self.dispatch(true, false),
            49..=55 => self.cancel(),
            56..=72 => {
                let point = self.world.rng(|r| r.pick(&Point::ALL));
                self.world.arm(point);
                if matches!(point, Point::HubBefore(Write::Revoke) | Point::HubAfter(Write::Revoke)) {
                    self.revoke();
                }
                if point == Point::WardenBeforeRefused {
                    self.dispatch(false, true);
                }
                if matches!(point, Point::HubBefore(Write::CancelRequested) | Point::HubAfter(Write::CancelRequested)) {
                    self.cancel();
                }
            }
            _ => self.disturb(),
        }
    }

    fn disturb(&mut self) {
        let (world, m) = (self.world.clone(), self.machine());
        let seconds = |low: u64, high: u64| Duration::from_millis(world.rng(|r| r.between(low * 1000, high * 1000)));
        match world.rng(|r| r.below(21)) {
            0 => {
                world.fault(Fault::HubCrash, "");
                self.kill_hub();
            }
            1 if self.backup.is_some() => {
                self.kill_hub();
                self.restore = true;
            }
            1 | 2 => {
                world.note("back-up");
                self.backup = Some((self.disk.copy(), lock(&world.oracle).clone()));
            }
            3 => {
                world.fault(Fault::DaemonCrash, m.n);
                m.kill_daemon();
            }
            4 => {
                world.fault(Fault::WardenCrash, m.n);
                m.kill_warden();
            }
            5 => {
                world.fault(Fault::PowerCut, m.n);
                m.power_cut();
            }
            6 => {
                world.fault(Fault::SpoolReplaced, m.n);
                m.replace_spool();
            }
            7 | 8 => {
                let wire = lock(&m.wires).last().cloned();
                if let Some(wire) = wire {
                    let half = world.rng(|r| r.chance(40));
                    world.fault(if half { Fault::HalfOpen } else { Fault::LinkCut }, m.n);
                    let soon = Some(seconds(0, 1));
                    match world.rng(|r| r.below(2)) {
                        _ if !half => wire.cut(soon, soon),
                        0 => wire.cut(soon, None),
                        _ => wire.cut(None, soon),
                    }
                }
            }
            9 | 10 => {
                world.fault(Fault::Partition, m.n);
                lock(&world.partitions).insert(m.n, Instant::now() + seconds(1, 40));
            }
            11 => {
                world.fault(Fault::SlowLink, m.n);
                let mut slow = lock(&world.slow_links);
                if !slow.remove(&m.n) {
                    slow.insert(m.n);
                }
            }
            12 | 19 => m.swap.store(true, Ordering::SeqCst),
            // A second machine is no node of the model where the hub itself tells them apart.
            13 if world.rng(|r| r.chance(30)) && world.carrier.is_none() => self.intrude(&m),
            13 | 14 => {
                let mood = world.rng(|r| match r.below(3) {
                    0 => StoreMood { slow_ms: r.between(50, 400), ..StoreMood::default() },
                    1 => StoreMood { fails: r.between(10, 60), ..StoreMood::default() },
                    _ => StoreMood { unanswered: r.between(10, 60), ..StoreMood::default() },
                });
                if mood.slow_ms > 0 {
                    world.fault(Fault::SlowStore, mood.slow_ms);
                }
                world.note(format_args!("{mood:?}"));
                *lock(&world.mood) = mood;
                self.mood_until = Some(Instant::now() + seconds(1, 8));
            }
            15 if world.rng(|r| r.chance(40)) => {
                world.fault(Fault::OwnerCloses, m.n);
                m.closed.fetch_xor(true, Ordering::SeqCst);
            }
            15 => self.drain(&m),
            16 => {
                let by = world.rng(|r| if r.chance(50) { -(r.between(1000, 3_600_000) as i64) } else { r.between(1000, 600_000) as i64 });
                world.fault(Fault::ClockJump, by);
                world.jump(by);
            }
            17 if world.rng(|r| r.chance(40)) => self.revoke(),
            17 | 18 => {
                world.fault(Fault::NodeStop, m.n);
                m.stop.store(true, Ordering::SeqCst);
            }
            _ => self.cancel(),
        }
    }

    fn kill_hub(&self) {
        if let Some(hub) = self.hub.borrow().as_ref() {
            hub.life.kill(&self.world);
        }
    }

    /// Nothing goes wrong from here on.
    fn heal(&mut self) {
        let world = &self.world;
        world.note("---- peace ----");
        world.set_clock();
        self.peace = true;
        world.disarm();
        lock(&world.partitions).clear();
        lock(&world.slow_links).clear();
        *lock(&world.mood) = StoreMood::default();
        self.mood_until = None;
        for m in &self.machines {
            m.stop.store(false, Ordering::SeqCst);
            m.swap.store(false, Ordering::SeqCst);
            m.closed.store(false, Ordering::SeqCst);
        }
        self.undrain();
    }

    /// A back-up may have brought nodes back that are gone for good, also a moment after the peace.
    fn revoke_again(&mut self) {
        let Some(no) = self.hub.borrow().as_ref().filter(|h| h.serves()).map(|h| h.life.no) else { return };
        for m in self.machines.iter().filter(|m| m.revoked.load(Ordering::SeqCst)) {
            if self.revoked_again.insert((no, m.n)) {
                let id = m.id;
                self.on_hub("revoke again", move |hub| async move { hub.manage.revoke(&caller(1), id).await.is_ok() });
            }
        }
    }

    /// What keeps this from being at rest, and which invariant it would break for ever.
    async fn left(&self) -> Option<(&'static str, String)> {
        let hub = self.hub.borrow().clone();
        let Some(hub) = hub.filter(|h| h.serves()) else { return Some(("comes_to_rest", "the hub does not serve".into())) };
        if Arc::strong_count(&self.asking) > 1 {
            return Some(("comes_to_rest", "somebody still asks for something".into()));
        }
        let open = self.disk.open_tasks(None, None, 1).await.unwrap_or_default();
        if let Some(open) = open.first() {
            return Some(("comes_to_rest", format!("{} is {:?}", open.id, open.progress)));
        }
        let revoked: BTreeSet<usize> = self.machines.iter().filter(|m| m.revoked.load(Ordering::SeqCst)).map(|m| m.n).collect();
        if let Some(m) = self.machines.iter().find(|m| !revoked.contains(&m.n) && !m.is_at_rest()) {
            return Some(("comes_to_rest", format!("node {} keeps {:?}", m.n, lock(&m.spool))));
        }
        for m in &self.machines {
            let held = hub.links.held(m.id);
            if !held.is_empty() {
                return Some(("slots_given_back", format!("node {} holds {held:?}", m.n)));
            }
        }
        let waiting = hub.pool.queue.waiting();
        let shares: u32 = [1, 2].map(|u| hub.links.share(sample::user_id(u)).attempts).iter().sum();
        (waiting > 0 || shares > 0).then(|| ("slots_given_back", format!("{waiting} wait, {shares} shares are held")))
    }

    // ---- callers ----

    fn task(&self, large: bool) -> Task {
        let clock = self.world.clock();
        let now = clock.now_ms();
        let nodes: Vec<NodeId> = self.machines.iter().map(|m| m.id).collect();
        self.world.rng(|r| {
            let id = TaskId::from_parts(now, r.bytes());
            let mut argv = vec!["work".to_owned(), r.word().to_string()];
            if r.chance(10) || large {
                argv.push("x".repeat(5000));
            }
            let program = Program::Argv(argv);
            let spec = Spec::Shell(Shell { program, cwd: String::new(), env: BTreeMap::new(), stdin: vec![], stdin_open: false });
            let spec = if r.chance(6) && !large { Spec::Echo { payload: b"again".to_vec() } } else { spec };
            let skill = spec.skill().to_owned();
            let retries = if r.chance(30) { r.between(1, 2) as u32 } else { 0 };
            let not_before = r.chance(8).then(|| now + r.between(100, 20_000) as i64);
            let deadline = r.chance(15).then(|| not_before.unwrap_or(now) + r.between(500, 30_000) as i64);
            let on_lost = if r.chance(30) { r.pick(&[OnLost::Fail, OnLost::Requeue]) } else { OnLost::Wait };
            let lost_after = (on_lost != OnLost::Wait).then(|| r.between(0, 20));
            let (backoff_ms, priority) = (r.between(0, 2000), r.between(0, 2) as i32);
            let terms = Terms { retries, backoff_ms, not_before, deadline, priority, select: None, on_lost, lost_after };
            let spec = spec.encode();
            let mut task = Task {
                id,
                session: None,
                named_node: r.chance(25).then(|| r.pick(&nodes)),
                actor: Actor { user: sample::user_id(1 + r.below(2) as u16), key: None, agent: None, door: "rest".into() },
                skill,
                digest: mesh_core::sha256(&spec),
                spec,
                seal: [0; 32],
                timeout_secs: if r.chance(20) { r.between(1, 5) } else { 120 },
                queue_secs: if r.chance(15) { r.between(1, 60) } else { 120 },
                terms,
                created_at: now,
                progress: Progress::new(),
                output: OutputTotals::default(),
                result: None,
                sandbox_applied: None,
                signed: None,
                digests: None,
                parent: None,
                children: None,
            };
            task.seal = self.world.keys().seal(&task.intent());
            task
        })
    }

    /// A caller who wants something run. With a key it asks until it has an answer, and `twice` at once.
    /// Who is `hasty` cancels at once what still has to be fetched.
    fn dispatch(&self, twice: bool, hasty: bool) {
        let task = self.task(hasty);
        let key = (twice || self.world.rng(|r| r.chance(30))).then(|| task.id.to_string());
        if twice {
            self.world.fault(Fault::DuplicateDispatch, task.id);
        }
        for copy in 0..if twice { 2 } else { 1 } {
            let mut task = task.clone();
            if copy > 0 {
                // A door makes a new id for each request.
                task.id = TaskId::from_parts(task.created_at, self.world.rng(|r| r.bytes()));
                task.seal = self.world.keys().seal(&task.intent());
            }
            let (world, hub, key, told) = (self.world.clone(), self.hub.subscribe(), key.clone(), self.dispatched.clone());
            let asks = self.asking.clone();
            self.world.tasks.spawn_until_cancelled("caller", async move {
                let _asks = asks;
                loop {
                    world.pause(0, 50).await;
                    if let Some(id) = ask(&world, &hub, task.clone(), key.as_deref()).await {
                        world.told_accepted(id, key.as_deref());
                        lock(&told).push(id);
                        let now = hub.borrow().clone().filter(|h| hasty && h.serves());
                        if let Some(now) = now {
                            let who = caller(1);
                            world.fault(Fault::Cancel, id);
                            let token = now.life.tasks.token();
                            tokio::select! {
                                biased;
                                () = token.cancelled() => {}
                                _ = now.tasks.cancel(&who, id) => {}
                            }
                        }
                        return;
                    }
                    if key.is_none() {
                        return;
                    }
                    world.pause(500, 3000).await;
                    task.id = TaskId::from_parts(task.created_at, world.rng(|r| r.bytes()));
                    task.seal = world.keys().seal(&task.intent());
                }
            });
        }
    }

    fn cancel(&self) {
        let id = {
            let told = lock(&self.dispatched);
            if told.is_empty() {
                return;
            }
            let newest = told.len().saturating_sub(6);
            self.world.rng(|r| told[newest + r.below((told.len() - newest) as u64) as usize])
        };
        self.world.fault(Fault::Cancel, id);
        self.on_hub("cancel", move |hub| async move { hub.tasks.cancel(&caller(1), id).await.is_ok() });
    }

    fn revoke(&self) {
        let left: Vec<_> = self.machines.iter().filter(|m| !m.revoked.load(Ordering::SeqCst)).cloned().collect();
        let Some(m) = left.last() else { return };
        self.world.fault(Fault::Revoke, m.n);
        for _ in 0..2 {
            self.dispatch(false, true);
            self.cancel();
        }
        let id = m.id;
        self.on_hub("revoke", move |hub| async move { hub.manage.revoke(&caller(1), id).await.is_ok() });
    }

    fn drain(&self, m: &Machine) {
        self.world.fault(Fault::Drain, m.n);
        let (id, resume) = (m.id, self.world.rng(|r| r.chance(60)));
        self.on_hub("drain", move |hub| async move {
            let done = if resume { hub.manage.resume(&caller(1), id).await } else { hub.manage.drain(&caller(1), id).await };
            done.is_ok()
        });
    }
    fn undrain(&self) {
        for m in &self.machines {
            let id = m.id;
            self.on_hub("resume", move |hub| async move {
                match hub.manage.resume(&caller(1), id).await {
                    Ok(_) => true,
                    Err(e) => e.to_string().contains("revoked"),
                }
            });
        }
    }

    /// Asks the hub of the moment until it has answered.
    fn on_hub<F>(&self, what: &'static str, ask: impl Fn(Arc<Hub>) -> F + Send + 'static)
    where
        F: Future<Output = bool> + Send + 'static,
    {
        let (world, hub) = (self.world.clone(), self.hub.subscribe());
        self.world.tasks.spawn_until_cancelled(what, async move {
            for _ in 0..200 {
                world.pause(0, 100).await;
                let now = hub.borrow().clone().filter(|h| h.serves());
                if let Some(now) = now {
                    let token = now.life.tasks.token();
                    let done = tokio::select! {
                        biased;
                        () = token.cancelled() => false,
                        done = ask(now) => done,
                    };
                    if done {
                        return world.note(format_args!("{what} is done"));
                    }
                }
                world.pause(200, 1500).await;
            }
        });
    }

    /// A second machine with the node's identity links, and leaves again.
    fn intrude(&self, m: &Arc<Machine>) {
        let hub = self.hub.borrow().clone().filter(|h| h.serves());
        let Some(hub) = hub else { return };
        self.world.fault(Fault::Intruder, m.n);
        let no = m.wire_no.fetch_add(1, Ordering::SeqCst) + 1;
        let (mut near, far) = crate::net::Wire::make(&self.world, m.n, no);
        let hello = crate::net::Hello {
            spool: m.spool_id(),
            attempts: vec![],
            max_tasks: m.max_tasks,
            closed: None,
            last_session: lock(&m.session).clone(),
        };
        hub.accept(far, m.id, hello);
        let stay = Duration::from_millis(self.world.rng(|r| r.between(10, 5000)));
        self.world.tasks.spawn_until_cancelled("intruder", async move {
            let _ = tokio::time::timeout(stay, async { while near.receive.receive().await.is_some() {} }).await;
        });
    }
}

/// One request to accept a task; the id that the caller is told.
async fn ask(world: &World, hub: &watch::Receiver<Option<Arc<Hub>>>, task: Task, key: Option<&str>) -> Option<TaskId> {
    let hub = hub.borrow().clone().filter(|h| h.serves())?;
    let token = hub.life.tasks.token();
    let user: UserId = task.actor.user;
    let request = mesh_core::sha256(&task.spec);
    let keyed = key.map(|k| hub.idempotency.keyed(&Caller::person(user, Role::Admin), "POST /dispatch", k, request));
    let own = hub.clone();
    let work = hub.life.tasks.complete("dispatch", async move {
        if let Some(made) = hub_engine::idempotency::before::<TaskId>(keyed.as_ref()).await? {
            return Ok(Accepted::Before(made));
        }
        own.pool.accept_once(Box::new(task), &Caller::person(user, Role::Admin), None, keyed.as_ref()).await
    });
    let answer = tokio::select! {
        biased;
        () = token.cancelled() => None,
        answer = work => answer,
    };
    match answer? {
        Ok(Accepted::New(task)) => Some(task.id),
        Ok(Accepted::Before(id)) => Some(id),
        Err(error) => {
            world.note(format_args!("not accepted: {error}"));
            None
        }
    }
}

//! What one seed consists of: randomness, simulated time, a trace, what was covered, what went wrong.

use crate::carry::Carrier;
use crate::hub::SimKeys;
use crate::oracle::Oracle;
use crate::plan::{Break, Fault, Point};
use hub_engine::ports::Keyring;
use mesh_core::{Digest, HubId};
use mesh_process::{Clock, Tasks};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::time::Instant;

/// The wall clock's zero: some moment of 2023.
pub const T0: i64 = 1_700_000_000_000;

/// SplitMix64 (Steele, Lea, Flood, 2014): small, and the same on every machine.
#[derive(Debug)]
pub struct Rng(pub u64);

impl Rng {
    pub fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
    pub fn below(&mut self, n: u64) -> u64 {
        self.word() % n.max(1)
    }
    pub fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.below(high - low + 1)
    }
    pub fn chance(&mut self, per_cent: u64) -> bool {
        self.below(100) < per_cent
    }
    pub fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize]
    }
    pub fn bytes<const N: usize>(&mut self) -> [u8; N] {
        let mut b = [0; N];
        b.iter_mut().for_each(|x| *x = self.word() as u8);
        b
    }
}

/// Simulated time; the wall clock jumps when the seed says so.
pub struct SimClock {
    begun: Instant,
    wall: Arc<AtomicI64>,
    /// The wall clock and the steady one when this process began.
    anchor: (i64, Duration),
}

impl SimClock {
    fn new(begun: Instant, wall: Arc<AtomicI64>) -> Self {
        let steady = Instant::now() - begun;
        let anchor = (T0 + steady.as_millis() as i64 + wall.load(Ordering::SeqCst), steady);
        Self { begun, wall, anchor }
    }
}

impl Clock for SimClock {
    fn now_ms(&self) -> i64 {
        T0 + self.steady().as_millis() as i64 + self.wall.load(Ordering::SeqCst)
    }
    fn steady(&self) -> Duration {
        Instant::now() - self.begun
    }
    fn anchored_ms(&self) -> i64 {
        self.anchor.0 + (self.steady() - self.anchor.1).as_millis() as i64
    }
}

/// How the hub's store behaves now.
#[derive(Debug, Clone, Copy, Default)]
pub struct StoreMood {
    /// The longest that one write takes.
    pub slow_ms: u64,
    /// Of a hundred calls, so many fail before anything is done …
    pub fails: u64,
    /// … and so many writes are done and their answer is lost.
    pub unanswered: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    pub invariant: &'static str,
    pub detail: String,
}

/// Shared by everything in one seed.
pub struct World {
    pub broken: Option<Break>,
    begun: Instant,
    wall: Arc<AtomicI64>,
    /// As far ahead as the wall clock ever was.
    ahead: AtomicI64,
    rng: Mutex<Rng>,
    trace: Mutex<Vec<String>>,
    counts: Mutex<BTreeMap<String, u64>>,
    violation: Mutex<Option<Violation>>,
    pub oracle: Mutex<Oracle>,
    pub mood: Mutex<StoreMood>,
    /// The process that reaches this point next dies there.
    armed: Mutex<Option<Point>>,
    pub partitions: Mutex<BTreeMap<usize, Instant>>,
    /// Nodes whose link is slow now.
    pub slow_links: Mutex<BTreeSet<usize>>,
    /// None: links carry messages as they are.
    pub carrier: Option<Arc<Carrier>>,
    /// What belongs to no simulated process: callers, the director.
    pub tasks: Tasks,
}

impl World {
    pub fn new(seed: u64, broken: Option<Break>, carrier: Option<Arc<Carrier>>) -> Arc<Self> {
        Arc::new(Self {
            broken,
            begun: Instant::now(),
            wall: Arc::default(),
            ahead: AtomicI64::new(0),
            rng: Mutex::new(Rng(seed.wrapping_mul(0xA24B_AED4_963E_E407))),
            trace: Mutex::default(),
            counts: Mutex::default(),
            violation: Mutex::default(),
            oracle: Mutex::default(),
            mood: Mutex::default(),
            armed: Mutex::default(),
            partitions: Mutex::default(),
            slow_links: Mutex::default(),
            carrier,
            tasks: Tasks::new(),
        })
    }
    pub fn keys(&self) -> Arc<dyn Keyring> {
        match &self.carrier {
            Some(c) => c.keys.clone(),
            None => Arc::new(SimKeys::default()),
        }
    }
    /// Its id, and the key that its orders are signed with.
    pub fn hub_identity(&self) -> (HubId, [u8; 32]) {
        match &self.carrier {
            Some(c) => (c.keys.hub, c.keys.task_key()),
            None => (SimKeys::hub(), SimKeys::default().public()),
        }
    }
    pub fn node_key(&self, n: usize) -> Digest {
        self.carrier.as_ref().map_or([n as u8; 32], |c| c.node_key(n))
    }
    pub fn clock(&self) -> Arc<SimClock> {
        Arc::new(SimClock::new(self.begun, self.wall.clone()))
    }
    pub fn jump(&self, by_ms: i64) {
        let now = self.wall.fetch_add(by_ms, Ordering::SeqCst) + by_ms;
        self.ahead.fetch_max(now, Ordering::SeqCst);
    }
    /// Somebody sets the wall clock; what was to come at a time that had been is due.
    pub fn set_clock(&self) {
        self.wall.store(self.ahead.load(Ordering::SeqCst), Ordering::SeqCst);
    }
    pub fn steady(&self) -> Duration {
        Instant::now() - self.begun
    }
    pub fn rng<T>(&self, f: impl FnOnce(&mut Rng) -> T) -> T {
        f(&mut lock(&self.rng))
    }
    pub async fn pause(&self, low_ms: u64, high_ms: u64) {
        let ms = self.rng(|r| r.between(low_ms, high_ms));
        tokio::time::sleep(Duration::from_millis(ms)).await;
    }
    pub fn is(&self, broken: Break) -> bool {
        self.broken == Some(broken)
    }

    pub fn note(&self, what: impl Display) {
        let line = format!("{:>9} {what}", self.steady().as_millis());
        lock(&self.trace).push(line);
    }
    pub fn trace(&self) -> Vec<String> {
        lock(&self.trace).clone()
    }
    pub fn count(&self, what: impl Into<String>) {
        *lock(&self.counts).entry(what.into()).or_default() += 1;
    }
    pub fn counts(&self) -> BTreeMap<String, u64> {
        lock(&self.counts).clone()
    }
    pub fn fault(&self, fault: Fault, detail: impl Display) {
        self.count(format!("fault {fault:?}"));
        self.note(format_args!("FAULT {fault:?} {detail}"));
    }
    /// The first one counts; the seed ends soon after.
    pub fn violated(&self, invariant: &'static str, detail: impl Display) {
        self.note(format_args!("VIOLATED {invariant}: {detail}"));
        lock(&self.violation).get_or_insert(Violation { invariant, detail: detail.to_string() });
    }
    pub fn violation(&self) -> Option<Violation> {
        lock(&self.violation).clone()
    }

    pub fn arm(&self, point: Point) {
        self.note(format_args!("armed {point:?}"));
        *lock(&self.armed) = Some(point);
    }
    pub fn disarm(&self) {
        *lock(&self.armed) = None;
    }
    /// Is this where the process dies?
    pub fn dies_at(&self, point: Point) -> bool {
        let hit = lock(&self.armed).take_if(|p| *p == point).is_some();
        if hit {
            self.count(format!("crash {point:?}"));
            self.note(format_args!("CRASH {point:?}"));
        }
        hit
    }
    pub fn partitioned_until(&self, node: usize) -> Option<Instant> {
        lock(&self.partitions).get(&node).copied().filter(|until| *until > Instant::now())
    }
}

pub fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

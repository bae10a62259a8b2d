//! How much there is and how fast it goes: now, and over the last hour.

use crate::access::visible;
use crate::error::{Error, Result};
use crate::nodes::Nodes;
use crate::pool::{Pool, PoolStanding};
use crate::ports::{Gauges, Window};
use crate::records::StorageUse;
use mesh_core::UnixMs;
use mesh_core::permission::{Caller, Permission};
use mesh_core::task::TaskState;
use mesh_process::SharedClock;
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

pub const SAMPLE_EVERY: Duration = Duration::from_secs(15);
/// Samples of an hour.
pub const SAMPLES: usize = 240;
/// Samples over which a rate is taken: a minute.
const RATE_SAMPLES: usize = 4;
/// What was counted is told for this many times as long as counting took, so that counting, however
/// much there is, takes a small part of the time; and at most for so long.
const COUNT_REST: u32 = 20;
const COUNT_AT_MOST: Duration = Duration::from_secs(15);
const NODES_AT_ONCE: u32 = 500;

/// What is sampled.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sample {
    pub at: UnixMs,
    pub waiting: u64,
    pub oldest_secs: u64,
    /// Tasks that ended, a second.
    pub per_second: f64,
    pub running: u64,
    pub nodes_online: u64,
    pub storage: StorageUse,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Stats {
    pub tasks: BTreeMap<TaskState, u64>,
    pub nodes: BTreeMap<&'static str, u64>,
    pub now: Sample,
    /// Oldest first.
    pub history: Vec<Sample>,
}

/// What was counted, when by the steady clock, and how long that took.
#[derive(Debug, Clone)]
struct Counted {
    tasks: BTreeMap<TaskState, u64>,
    nodes: BTreeMap<&'static str, u64>,
    at: Duration,
    took: Duration,
}

/// What is remembered between two looks.
#[derive(Debug, Default)]
pub struct Remembered {
    samples: Mutex<VecDeque<Sample>>,
    /// Steady time and ended tasks of the newest samples.
    ended: Mutex<VecDeque<(Duration, u64)>>,
    counted: tokio::sync::Mutex<Option<Counted>>,
}

pub struct Statistics {
    pub gauges: Arc<dyn Gauges>,
    pub nodes: Arc<Nodes>,
    pub pool: Arc<Pool>,
    pub clock: SharedClock,
    pub remembered: Remembered,
}

impl Statistics {
    /// For those who may read all nodes and all tasks: it tells of everybody's.
    pub async fn get(&self, caller: &Caller) -> Result<Stats> {
        for p in [Permission::NodesRead, Permission::TasksRead] {
            if visible(caller, p)?.is_some() {
                return Err(Error::Forbidden(format!("this needs the permission {} for all, and not only for one's own", p.as_str())));
            }
        }
        let counted = self.counted().await?;
        let history = lock(&self.remembered.samples).iter().copied().collect();
        Ok(Stats { tasks: counted.tasks, nodes: counted.nodes, now: self.now().await?, history })
    }

    /// Takes a sample; a reconciler calls it.
    pub async fn sample(&self) -> Result<()> {
        let sample = self.now().await?;
        let mut samples = lock(&self.remembered.samples);
        if samples.len() == SAMPLES {
            samples.pop_front();
        }
        samples.push_back(sample);
        drop(samples);
        let mut ended = lock(&self.remembered.ended);
        if ended.len() == RATE_SAMPLES {
            ended.pop_front();
        }
        ended.push_back((self.clock.steady(), self.pool.standing().finished));
        Ok(())
    }

    async fn now(&self) -> Result<Sample> {
        let storage = self.gauges.storage().await?;
        let pool = self.pool.standing();
        let links = self.pool.links.all();
        let running = links.iter().map(|l| u64::from(self.pool.links.running(l.node))).sum();
        Ok(Sample {
            at: self.clock.now_ms(),
            waiting: pool.waiting,
            oldest_secs: pool.oldest.as_secs(),
            per_second: self.rate(&pool),
            running,
            nodes_online: links.len() as u64,
            storage,
        })
    }

    /// Since the oldest of the newest samples; before the first sample there is no rate yet.
    fn rate(&self, pool: &PoolStanding) -> f64 {
        let Some((then, ended)) = lock(&self.remembered.ended).front().copied() else { return 0.0 };
        let secs = self.clock.steady().saturating_sub(then).as_secs_f64();
        if secs > 0.0 { pool.finished.saturating_sub(ended) as f64 / secs } else { 0.0 }
    }

    /// Whoever comes while somebody counts waits for that count.
    async fn counted(&self) -> Result<Counted> {
        let mut kept = self.remembered.counted.lock().await;
        let at = self.clock.steady();
        if let Some(c) = kept.as_ref().filter(|c| at.saturating_sub(c.at) < (c.took * COUNT_REST).min(COUNT_AT_MOST)) {
            return Ok(c.clone());
        }
        let tasks = self.gauges.tasks_by_state().await?;
        let nodes = self.nodes_by_status().await?;
        let done = self.clock.steady();
        let counted = Counted { tasks, nodes, at: done, took: done.saturating_sub(at) };
        *kept = Some(counted.clone());
        Ok(counted)
    }

    async fn nodes_by_status(&self) -> Result<BTreeMap<&'static str, u64>> {
        let mut by_status = BTreeMap::new();
        let mut window = Window { before: None, limit: NODES_AT_ONCE };
        loop {
            let nodes = self.nodes.store.nodes(None, window).await?;
            for n in &nodes {
                *by_status.entry(self.nodes.standing(n).status).or_insert(0) += 1;
            }
            match nodes.last() {
                Some(last) if nodes.len() == NODES_AT_ONCE as usize => window.before = Some(last.id),
                _ => return Ok(by_status),
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

//! Samples of the last hour, per node, in memory alone.
//!
//! A sample takes 20 bytes and a node has at most 240 of them, in a ring that grows to 256 places:
//! 5 KiB a node, some 50 MB for 10,000. They stay over reconnects and go an hour after the last one.

use crate::links::Health;
use mesh_core::{NodeId, UnixMs};
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Samples are so far apart, more or less: nodes send one in 15 s.
const APART_SECS: u32 = 12;
const KEPT_SECS: u32 = 3600;
pub const MAX_SAMPLES: usize = 240;
/// Nodes with samples; past it the one that was silent longest gives way.
const MAX_NODES: usize = 20_000;
const MIB: u64 = 1 << 20;

/// What a node was like at one moment. Memory and disk in whole MiB.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sample {
    pub at: UnixMs,
    pub cpu_percent: f64,
    pub memory_used: u64,
    pub disk_used: u64,
    pub load_1m: f64,
    pub running: u32,
    pub rtt_ms: Option<f64>,
}

/// One sample as it is kept; each value ends at the most that it can hold.
#[derive(Debug, Clone, Copy)]
struct Packed {
    /// Unix seconds.
    at: u32,
    memory_mib: u32,
    disk_mib: u32,
    /// Hundredths.
    cpu: u16,
    load: u16,
    running: u16,
    /// Tenths of a millisecond; all bits set: not known.
    rtt: u16,
}

const NO_RTT: u16 = u16::MAX;

impl Packed {
    fn of(at_secs: u32, h: &Health, rtt: Option<Duration>) -> Self {
        // `as` ends at the bounds of the type and takes what is no number for 0.
        let rtt = rtt.map_or(NO_RTT, |r| ((r.as_secs_f64() * 10_000.0) as u16).min(NO_RTT - 1));
        let mib = |bytes: u64| u32::try_from(bytes / MIB).unwrap_or(u32::MAX);
        let hundredths = |x: f64| (x * 100.0).round() as u16;
        Self {
            at: at_secs,
            memory_mib: mib(h.memory_used),
            disk_mib: mib(h.disk_used),
            cpu: hundredths(h.cpu_percent),
            load: hundredths(h.load_1m),
            running: u16::try_from(h.running).unwrap_or(u16::MAX),
            rtt,
        }
    }
    fn open(&self) -> Sample {
        Sample {
            at: i64::from(self.at) * 1000,
            cpu_percent: f64::from(self.cpu) / 100.0,
            memory_used: u64::from(self.memory_mib) * MIB,
            disk_used: u64::from(self.disk_mib) * MIB,
            load_1m: f64::from(self.load) / 100.0,
            running: u32::from(self.running),
            rtt_ms: (self.rtt != NO_RTT).then(|| f64::from(self.rtt) / 10.0),
        }
    }
}

#[derive(Debug, Default)]
pub struct History(Mutex<BTreeMap<NodeId, VecDeque<Packed>>>);

impl History {
    fn rings(&self) -> MutexGuard<'_, BTreeMap<NodeId, VecDeque<Packed>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps a sample, unless the last one is too young. `now` does not go back.
    pub fn note(&self, node: NodeId, now: UnixMs, health: &Health, rtt: Option<Duration>) {
        let at = secs(now);
        let mut rings = self.rings();
        if rings.len() >= MAX_NODES && !rings.contains_key(&node) {
            let silent = rings.iter().min_by_key(|(_, ring)| ring.back().map_or(0, |s| s.at)).map(|(id, _)| *id);
            silent.and_then(|id| rings.remove(&id));
        }
        let ring = rings.entry(node).or_default();
        if ring.back().is_some_and(|last| at < last.at.saturating_add(APART_SECS)) {
            return;
        }
        while ring.len() >= MAX_SAMPLES || ring.front().is_some_and(|s| is_old(s, at)) {
            ring.pop_front();
        }
        ring.push_back(Packed::of(at, health, rtt));
    }

    /// The samples of the last hour, oldest first.
    pub fn of(&self, node: NodeId, now: UnixMs) -> Vec<Sample> {
        let at = secs(now);
        let rings = self.rings();
        rings.get(&node).map(|ring| ring.iter().filter(|s| !is_old(s, at)).map(Packed::open).collect()).unwrap_or_default()
    }

    pub fn forget(&self, node: NodeId) {
        self.rings().remove(&node);
    }

    /// Lets nodes go that have sent nothing for an hour.
    pub fn prune(&self, now: UnixMs) {
        let at = secs(now);
        self.rings().retain(|_, ring| ring.back().is_some_and(|s| !is_old(s, at)));
    }
}

fn secs(now: UnixMs) -> u32 {
    u32::try_from(now / 1000).unwrap_or(0)
}

fn is_old(s: &Packed, at: u32) -> bool {
    s.at.saturating_add(KEPT_SECS) <= at
}

#[cfg(test)]
mod tests {
    use super::*;

    const T0: UnixMs = 1_700_000_000_000;

    fn health(cpu_percent: f64) -> Health {
        Health { cpu_percent, memory_used: 3 * MIB + 5, disk_used: 7 * MIB, load_1m: 1.5, running: 2, ..Default::default() }
    }
    fn node(n: u32) -> NodeId {
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&n.to_be_bytes());
        NodeId::from_bytes(bytes)
    }

    #[test]
    fn an_hour_at_most() {
        assert_eq!(size_of::<Packed>(), 20, "docs and the head of this file name it");
        let h = History::default();
        for n in 0..500 {
            h.note(node(1), T0 + n * 15_000, &health(n as f64 / 10.0), Some(Duration::from_micros(1230)));
            // A node that sends more often is not kept more often.
            h.note(node(1), T0 + n * 15_000 + 3000, &health(9.0), None);
        }
        let now = T0 + 499 * 15_000;
        let kept = h.of(node(1), now);
        assert_eq!(kept.len(), MAX_SAMPLES);
        let expect =
            Sample { at: now, cpu_percent: 49.9, memory_used: 3 * MIB, disk_used: 7 * MIB, load_1m: 1.5, running: 2, rtt_ms: Some(1.2) };
        assert_eq!(kept.last(), Some(&expect));
        assert!(kept.windows(2).all(|w| w[1].at - w[0].at == 15_000), "oldest first");
        assert_eq!(h.of(node(1), now + 3_599_000).len(), 1, "what is older than an hour is not shown");
        assert_eq!(h.of(node(1), now + 3_600_000), []);
        assert_eq!(h.of(node(2), now), []);
        h.prune(now + 3_599_000);
        assert_eq!(h.rings().len(), 1);
        h.prune(now + 3_600_000);
        assert_eq!(h.rings().len(), 0);
    }

    #[test]
    fn what_a_node_claims_cannot_grow() {
        let h = History::default();
        let wild = Health { cpu_percent: f64::NAN, memory_used: u64::MAX, load_1m: 1e9, running: u32::MAX, ..Default::default() };
        h.note(node(1), T0, &wild, Some(Duration::MAX));
        let s = h.of(node(1), T0)[0];
        assert_eq!((s.cpu_percent, s.load_1m, s.running), (0.0, 655.35, 65_535));
        assert_eq!(s.rtt_ms, Some(6553.4));
        for n in 0..MAX_NODES as u32 + 10 {
            h.note(node(n), T0 + i64::from(n) * 10, &health(1.0), None);
        }
        assert_eq!(h.rings().len(), MAX_NODES);
        assert!(h.of(node(MAX_NODES as u32 + 9), T0)[0].rtt_ms.is_none(), "the newest has its place");
    }
}

//! Node time: the hub's time at the Welcome plus the boot-time clock since, which runs through suspend.
//!
//! The wall clock is never compared with anything. Before the first Welcome it serves, together with
//! the last hub time that was stored, to judge the hub's certificate, and for that alone.

use mesh_process::SharedClock;
use rustls::pki_types::UnixTime;
use rustls::time_provider::TimeProvider;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Milliseconds since boot, suspend included.
pub fn boot_ms() -> i64 {
    let t = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    t.tv_sec * 1000 + t.tv_nsec / 1_000_000
}

/// The pure part: every clock reading is an argument.
#[derive(Debug, Clone, Copy, Default)]
pub struct Anchor {
    /// Hub time and boot time of one moment.
    at: Option<(i64, i64)>,
    /// No answer is earlier: the last hub time that was stored.
    floor: i64,
}

impl Anchor {
    pub fn new(floor: i64) -> Self {
        Self { at: None, floor }
    }
    pub fn set(&mut self, hub_ms: i64, boot_ms: i64) {
        self.at = Some((hub_ms, boot_ms));
    }
    /// None before the first Welcome.
    pub fn now(&self, boot_ms: i64) -> Option<i64> {
        self.at.map(|(hub, boot)| hub.saturating_add(boot_ms.saturating_sub(boot).max(0)))
    }
    /// For certificates: node time, else the later of wall clock and stored hub time.
    pub fn for_tls(&self, boot_ms: i64, wall_ms: i64) -> i64 {
        self.now(boot_ms).unwrap_or_else(|| wall_ms.max(self.floor))
    }
}

/// Node time, shared with rustls.
#[derive(Clone)]
pub struct NodeTime {
    anchor: Arc<Mutex<Anchor>>,
    wall: SharedClock,
}

impl fmt::Debug for NodeTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NodeTime({:?})", self.now())
    }
}

impl NodeTime {
    pub fn new(stored_hub_ms: i64, wall: SharedClock) -> Self {
        Self { anchor: Arc::new(Mutex::new(Anchor::new(stored_hub_ms))), wall }
    }
    fn anchor(&self) -> std::sync::MutexGuard<'_, Anchor> {
        self.anchor.lock().unwrap_or_else(PoisonError::into_inner)
    }
    pub fn welcome(&self, hub_ms: i64) {
        self.anchor().set(hub_ms, boot_ms());
    }
    /// Hub time in milliseconds; none before the first Welcome.
    pub fn now(&self) -> Option<i64> {
        self.anchor().now(boot_ms())
    }
    pub fn for_tls(&self) -> i64 {
        self.anchor().for_tls(boot_ms(), self.wall.now_ms())
    }
}

impl TimeProvider for NodeTime {
    fn current_time(&self) -> Option<UnixTime> {
        Some(UnixTime::since_unix_epoch(Duration::from_millis(self.for_tls().max(0) as u64)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wall_clock_counts_only_before_the_first_welcome() {
        let mut a = Anchor::new(1_000);
        assert_eq!(a.now(50), None);
        assert_eq!(a.for_tls(50, 10), 1_000, "a wall clock in the past is raised to the stored hub time");
        assert_eq!(a.for_tls(50, 9_000), 9_000);
        a.set(2_000, 100);
        for wall in [0, i64::MAX] {
            assert_eq!(a.for_tls(150, wall), 2_050);
        }
        assert_eq!(a.now(150), Some(2_050));
        assert_eq!(a.now(90), Some(2_000), "it never goes back behind the welcome");
        a.set(3_000, 200);
        assert_eq!(a.now(200), Some(3_000));
        assert_eq!(Anchor { at: Some((i64::MAX, 0)), floor: 0 }.now(i64::MAX), Some(i64::MAX));
    }

    #[test]
    fn the_boot_clock_runs() {
        let a = boot_ms();
        assert!(a > 0 && boot_ms() >= a);
    }
}

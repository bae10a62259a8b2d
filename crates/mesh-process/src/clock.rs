//! Time as a thing that is given.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// The wall clock and a steady clock.
pub trait Clock: Send + Sync + 'static {
    /// Milliseconds since the Unix epoch, UTC. May jump.
    fn now_ms(&self) -> i64;
    /// Time since some fixed moment. Never jumps back.
    fn steady(&self) -> Duration;
    /// The wall clock as it was at the start, carried on by the steady clock: for two times of one
    /// process that are compared with each other.
    fn anchored_ms(&self) -> i64;
}

pub type SharedClock = Arc<dyn Clock>;

/// The machine's own clocks.
#[derive(Debug)]
pub struct SystemClock {
    start: Instant,
    start_ms: i64,
}

impl SystemClock {
    #[expect(clippy::disallowed_methods, reason = "the one home of Instant::now")]
    pub fn new() -> Self {
        Self { start: Instant::now(), start_ms: wall_ms() }
    }
    pub fn shared() -> SharedClock {
        Arc::new(Self::new())
    }
}

impl Default for SystemClock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for SystemClock {
    fn now_ms(&self) -> i64 {
        wall_ms()
    }
    fn anchored_ms(&self) -> i64 {
        self.start_ms + self.start.elapsed().as_millis() as i64
    }
    fn steady(&self) -> Duration {
        self.start.elapsed()
    }
}

#[expect(clippy::disallowed_methods, reason = "the one home of SystemTime::now")]
fn wall_ms() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as i64)
}

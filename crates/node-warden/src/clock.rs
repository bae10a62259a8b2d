//! The one place that reads a clock. The warden stands outside the daemon's runtime and its given
//! time; its tests set bounds instead.
#![allow(clippy::disallowed_methods, reason = "the clock's one home in this crate")]

use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// For deadlines.
pub(crate) fn now() -> Instant {
    Instant::now()
}

/// For people; no decision of the warden rests on it.
pub(crate) fn unix_ms() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |d| i64::try_from(d.as_millis()).unwrap_or(i64::MAX))
}

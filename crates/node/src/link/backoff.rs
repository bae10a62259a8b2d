//! How long to wait before the next try: full jitter, up to as long as the hub has been away, at least half a
//! second and at most 30 s, for ever.

use std::time::Duration;

const FIRST: Duration = Duration::from_millis(500);
const MOST: Duration = Duration::from_secs(30);

/// Full jitter: any wait from nothing to a bound, so that many nodes never come together. The bound is the
/// outage's own length: after a short one all are back soon, after any within half a minute.
#[derive(Debug, Clone, Copy, Default)]
pub struct Backoff {
    /// When the last good link was lost, or the first try began.
    since: Option<Duration>,
}

impl Backoff {
    /// The next wait, from a random number over its whole range.
    pub fn next(&mut self, now: Duration, random: u64) -> Duration {
        let away = now.saturating_sub(*self.since.get_or_insert(now));
        away.clamp(FIRST, MOST).mul_f64(random as f64 / u64::MAX as f64)
    }
    pub fn reset(&mut self) {
        self.since = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    #[test]
    fn the_longest_wait_is_the_outage_so_far() {
        let mut b = Backoff::default();
        for (now, want) in [(100, 500), (101, 500), (600, 500), (1_100, 1_000), (20_100, 20_000), (40_000, 30_000), (9_000_000, 30_000)] {
            assert_eq!(b.next(ms(now), u64::MAX), ms(want), "{now}");
        }
        assert!(b.next(ms(9_000_000), u64::MAX / 2) <= ms(15_000));
        assert_eq!(b.next(ms(9_000_000), 0), Duration::ZERO);
        b.reset();
        assert_eq!(b.next(ms(9_000_000), u64::MAX), FIRST);
    }

    /// Whatever the dice say: tries that fail at once until the hub is there again, and then one that does not.
    #[test]
    fn nobody_comes_much_later_than_the_hub() {
        for (away, latest) in [(1_000, 2_000), (60_000, 91_000), (3_600_000, 3_631_000)] {
            let mut dice = 0x9e37_79b9_7f4a_7c15_u64;
            for _ in 0..2_000 {
                let (mut b, mut now) = (Backoff::default(), ms(5_000));
                while now < ms(5_000 + away) {
                    dice = dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    now += b.next(now, dice).max(Duration::from_micros(100));
                }
                assert!(now <= ms(5_000 + latest), "{now:?} after {away} ms");
            }
        }
    }
}

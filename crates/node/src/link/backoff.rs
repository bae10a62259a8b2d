//! How long to wait before the next try: full jitter, 0.5 s doubling to 30 s, for ever.

use std::time::Duration;

const FIRST: Duration = Duration::from_millis(500);
const MOST: Duration = Duration::from_secs(30);

/// Full jitter: any wait from nothing to a bound that doubles, so that many nodes never come together.
#[derive(Debug, Clone, Copy, Default)]
pub struct Backoff {
    failures: u32,
}

impl Backoff {
    /// The bound of the next wait.
    pub fn bound(&self) -> Duration {
        FIRST.saturating_mul(1 << self.failures.min(10)).min(MOST)
    }
    /// The next wait, from a random number over its whole range.
    pub fn next(&mut self, random: u64) -> Duration {
        let bound = self.bound();
        self.failures = self.failures.saturating_add(1);
        bound.mul_f64(random as f64 / u64::MAX as f64)
    }
    pub fn reset(&mut self) {
        self.failures = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_double_up_to_half_a_minute() {
        let mut b = Backoff::default();
        for want in [500, 1_000, 2_000, 4_000, 8_000, 16_000, 30_000, 30_000] {
            assert_eq!(b.bound(), Duration::from_millis(want));
            assert_eq!(b.next(u64::MAX), Duration::from_millis(want));
        }
        for _ in 0..100_000 {
            assert!(b.next(u64::MAX / 2) <= Duration::from_secs(15));
        }
        assert_eq!(b.next(0), Duration::ZERO);
        b.reset();
        assert_eq!(b.bound(), FIRST);
    }
}

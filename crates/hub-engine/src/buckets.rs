//! Token buckets by key, in bounded room. A bucket is one number, the moment at which it will be full
//! again; one that is full is as good as none and is forgotten when there is need of room.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hash, RandomState};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

const SHARDS: usize = 16;
/// Buckets of a shard that are kept apart; keys beyond them share one.
const KEPT: usize = 4096;
/// How soon after a vain search for full buckets the next is made.
const SEARCH_AGAIN: u64 = Duration::from_secs(1).as_nanos() as u64;

/// So many tokens at once, and how soon each comes back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    step: u64,
    room: u64,
}

impl Rate {
    /// Both from 1.
    pub fn new(each: Duration, tokens: u64, burst: u64) -> Self {
        let step = (each.as_nanos() as u64 / tokens.max(1)).max(1);
        Self { step, room: step.saturating_mul(burst.max(1)) }
    }
}

struct Shard<K> {
    /// Nanoseconds of the steady clock.
    full_at: HashMap<K, u64>,
    /// For keys that there is no room for.
    others: u64,
    searched: u64,
}

/// Buckets of one rate.
pub struct Buckets<K> {
    rate: Rate,
    hasher: RandomState,
    shards: [Mutex<Shard<K>>; SHARDS],
}

impl<K: Hash + Eq> Buckets<K> {
    pub fn new(rate: Rate) -> Self {
        let shard = |_| Mutex::new(Shard { full_at: HashMap::new(), others: 0, searched: 0 });
        Self { rate, hasher: RandomState::new(), shards: std::array::from_fn(shard) }
    }

    fn shard(&self, key: &K) -> MutexGuard<'_, Shard<K>> {
        // Another half of the hash than the map uses for its places.
        let shard = (self.hasher.hash_one(key) >> 32) as usize % SHARDS;
        self.shards[shard].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a token, or says how long to wait for one.
    pub fn take(&self, key: K, now: Duration) -> Result<(), Duration> {
        let now = now.as_nanos() as u64;
        let mut shard = self.shard(&key);
        let bucket = shard.bucket(key, now);
        let full_at = (*bucket).max(now) + self.rate.step;
        let beyond = (full_at - now).saturating_sub(self.rate.room);
        if beyond > 0 {
            return Err(Duration::from_nanos(beyond));
        }
        *bucket = full_at;
        Ok(())
    }

    /// Gives a token back that was not meant to count.
    pub fn give_back(&self, key: &K) {
        if let Some(full_at) = self.shard(key).full_at.get_mut(key) {
            *full_at = full_at.saturating_sub(self.rate.step);
        }
    }

    #[cfg(test)]
    fn kept(&self) -> usize {
        self.shards.iter().map(|s| s.lock().unwrap().full_at.len()).sum()
    }
}

impl<K: Hash + Eq> Shard<K> {
    fn bucket(&mut self, key: K, now: u64) -> &mut u64 {
        let full = self.full_at.len() >= KEPT;
        if full && !self.full_at.contains_key(&key) {
            if now >= self.searched + SEARCH_AGAIN {
                self.searched = now;
                self.full_at.retain(|_, full_at| *full_at > now);
            }
            if self.full_at.len() >= KEPT {
                return &mut self.others;
            }
        }
        self.full_at.entry(key).or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn granted(b: &Buckets<u32>, key: u32, now: Duration) -> usize {
        (0..10_000).take_while(|_| b.take(key, now).is_ok()).count()
    }

    #[test]
    fn a_burst_and_then_the_rate() {
        let b = Buckets::new(Rate::new(SECOND, 10, 20));
        let t = |ms: u64| Duration::from_millis(5_000 + ms);
        assert_eq!(granted(&b, 1, t(0)), 20);
        assert_eq!(b.take(1, t(0)), Err(Duration::from_millis(100)), "it says how long");
        assert_eq!(granted(&b, 2, t(0)), 20, "each key for itself");
        assert_eq!(granted(&b, 1, t(99)), 0);
        assert_eq!(granted(&b, 1, t(100)), 1);
        assert_eq!(granted(&b, 1, t(1_100)), 10);
        assert_eq!(granted(&b, 1, t(60_000)), 20, "never more than the burst");
        b.give_back(&1);
        b.give_back(&3);
        assert_eq!((granted(&b, 1, t(60_000)), granted(&b, 3, t(60_000))), (1, 20));
    }

    #[test]
    fn room_is_bounded_and_used_again() {
        let b = Buckets::new(Rate::new(SECOND, 1, 3));
        let many = 4 * (SHARDS * KEPT) as u32;
        let first = (0..many).filter(|k| b.take(*k, SECOND * 9).is_ok()).count();
        assert_eq!(b.kept(), SHARDS * KEPT);
        assert!(first < many as usize / 2, "those beyond share what is left: {first}");
        assert_eq!(granted(&b, 0, SECOND * 9), 2, "who was there before feels nothing");
        // All of them are full again: strangers find room, and nothing is left of those that went.
        assert_eq!(granted(&b, many + 1, SECOND * 99), 3);
        let left = (0..many).find(|k| b.take(*k, SECOND * 99).is_err());
        assert!(b.kept() <= SHARDS * KEPT && left.is_some());
    }

    #[test]
    fn threads_together_get_no_more_than_one() {
        let b = Buckets::new(Rate::new(SECOND, 1, 500));
        let granted: usize = std::thread::scope(|s| {
            let all: Vec<_> = (0..8).map(|_| s.spawn(|| granted(&b, 1, SECOND))).collect();
            all.into_iter().map(|t| t.join().unwrap()).sum()
        });
        assert_eq!(granted, 500);
    }

    /// The figure is for people; the bound only finds what is wrong by orders of magnitude.
    #[test]
    fn taking_is_cheap() {
        use mesh_process::Clock;
        const TAKES: u32 = 400_000;
        let (b, clock) = (Buckets::new(Rate::new(SECOND, 1_000_000, 1_000_000)), mesh_process::SystemClock::new());
        let begun = clock.steady();
        for k in 0..TAKES {
            let _ = b.take(k % 1_000, clock.steady());
        }
        let each = (clock.steady() - begun) / TAKES;
        println!("a token takes {each:?}");
        assert!(each < Duration::from_micros(100), "{each:?}");
    }
}

//! Orders that the hub sent ahead: they wait here for a place, and for its leave to start.
//!
//! In memory alone, and of one link: what the hub has not granted was not started, so it may be
//! forgotten at any time. The hub takes it back when the link ends.

use super::orders::Key;
use mesh_core::Digest;
use std::collections::VecDeque;
use std::time::Duration;

/// As many are kept; hubs never send more.
pub const MOST: usize = 64;
/// Cancels that are remembered: more than can cross with what the hub has on its way.
const REMEMBERED: usize = 1024;

#[derive(Debug)]
struct Waiting {
    key: Key,
    digest: Digest,
    /// When the hub was last told that there is a place for it.
    told: Option<Duration>,
}

/// What became of an order that came ahead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keeping {
    Kept,
    /// The attempt is known with another spec.
    Conflict,
    Full,
}

#[derive(Debug, Default)]
pub struct Ahead {
    waiting: VecDeque<Waiting>,
    /// Those that the hub took back, newest last. Its word and the leave to start cross on their way; an
    /// attempt that it took back is never wanted again.
    cancelled: VecDeque<Key>,
}

impl Ahead {
    /// Keeps an order; one that is kept already stays where it is.
    pub fn keep(&mut self, key: Key, digest: Digest) -> Keeping {
        match self.waiting.iter().find(|w| w.key == key) {
            Some(known) if known.digest != digest => Keeping::Conflict,
            Some(_) => Keeping::Kept,
            None if self.waiting.len() >= MOST => Keeping::Full,
            None => {
                self.waiting.push_back(Waiting { key, digest, told: None });
                Keeping::Kept
            }
        }
    }
    /// Forgets an order: it may start now, or is not wanted any more. Gives what it was to run.
    pub fn take(&mut self, key: &Key) -> Option<Digest> {
        let at = self.waiting.iter().position(|w| w.key == *key)?;
        self.waiting.remove(at).map(|w| w.digest)
    }
    /// Forgets an order that the hub takes back. False when there is none.
    pub fn cancel(&mut self, key: &Key) -> bool {
        if self.take(key).is_none() {
            return false;
        }
        if self.cancelled.len() >= REMEMBERED {
            self.cancelled.pop_front();
        }
        self.cancelled.push_back(*key);
        true
    }
    /// Was it taken back?
    pub fn was_cancelled(&self, key: &Key) -> bool {
        self.cancelled.contains(key)
    }
    pub fn clear(&mut self) {
        self.waiting.clear();
        self.cancelled.clear();
    }
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }
    /// The first ones, one for each of the `free` places, of which the hub was not told within `again`.
    pub fn ready(&mut self, free: usize, now: Duration, again: Duration) -> Vec<Key> {
        let due = self.waiting.iter_mut().take(free).filter(|w| w.told.is_none_or(|t| now.saturating_sub(t) >= again));
        due.map(|w| {
            w.told = Some(now);
            w.key
        })
        .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_core::TaskId;
    use mesh_core::task::AttemptNo;

    fn key(n: u8) -> Key {
        Key { task: TaskId::from_bytes([n; 16]), attempt: AttemptNo(1) }
    }
    const AGAIN: Duration = Duration::from_secs(5);

    #[test]
    fn what_was_taken_back_is_remembered() {
        let mut a = Ahead::default();
        a.keep(key(1), [1; 32]);
        assert!(a.cancel(&key(1)) && !a.cancel(&key(1)) && !a.cancel(&key(2)));
        assert!(a.was_cancelled(&key(1)) && !a.was_cancelled(&key(2)) && a.is_empty());
        a.clear();
        assert!(!a.was_cancelled(&key(1)), "the next link's hello tells anew");
    }

    #[test]
    fn each_place_is_asked_for_once_and_again_when_no_answer_came() {
        let mut a = Ahead::default();
        for n in 1..=3 {
            assert_eq!(a.keep(key(n), [n; 32]), Keeping::Kept);
        }
        assert_eq!(a.keep(key(2), [2; 32]), Keeping::Kept, "an order that came twice");
        assert_eq!(a.keep(key(2), [9; 32]), Keeping::Conflict);
        let at = |s| Duration::from_secs(s);
        assert_eq!(a.ready(0, at(0), AGAIN), []);
        assert_eq!(a.ready(1, at(0), AGAIN), [key(1)]);
        assert_eq!(a.ready(2, at(1), AGAIN), [key(2)]);
        assert_eq!(a.ready(2, at(4), AGAIN), []);
        assert_eq!(a.ready(2, at(5), AGAIN), [key(1)], "said again");
        assert_eq!((a.take(&key(1)), a.take(&key(1))), (Some([1; 32]), None));
        assert_eq!(a.ready(2, at(5), AGAIN), [key(3)]);
        a.clear();
        assert!(a.is_empty());
    }

    #[test]
    fn there_is_an_end_to_what_is_kept() {
        let mut a = Ahead::default();
        for n in 0..MOST as u8 {
            assert_eq!(a.keep(key(n), [0; 32]), Keeping::Kept);
        }
        assert_eq!(a.keep(key(200), [0; 32]), Keeping::Full);
        assert_eq!(a.keep(key(0), [0; 32]), Keeping::Kept);
    }
}

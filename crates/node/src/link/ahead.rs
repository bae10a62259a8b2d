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
pub struct Ahead(VecDeque<Waiting>);

impl Ahead {
    /// Keeps an order; one that is kept already stays where it is.
    pub fn keep(&mut self, key: Key, digest: Digest) -> Keeping {
        match self.0.iter().find(|w| w.key == key) {
            Some(known) if known.digest != digest => Keeping::Conflict,
            Some(_) => Keeping::Kept,
            None if self.0.len() >= MOST => Keeping::Full,
            None => {
                self.0.push_back(Waiting { key, digest, told: None });
                Keeping::Kept
            }
        }
    }
    /// Forgets an order: it may start now, or is not wanted any more. Gives what it was to run.
    pub fn take(&mut self, key: &Key) -> Option<Digest> {
        let at = self.0.iter().position(|w| w.key == *key)?;
        self.0.remove(at).map(|w| w.digest)
    }
    pub fn clear(&mut self) {
        self.0.clear();
    }
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
    /// The first ones, one for each of the `free` places, of which the hub was not told within `again`.
    pub fn ready(&mut self, free: usize, now: Duration, again: Duration) -> Vec<Key> {
        let due = self.0.iter_mut().take(free).filter(|w| w.told.is_none_or(|t| now.saturating_sub(t) >= again));
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

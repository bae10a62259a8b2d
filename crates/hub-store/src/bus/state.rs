//! What a hub knows of the stream, and what it does with each entry: no network, no waiting.

use super::entry::{Bad, Entry, Life, Sealer, Word, tag};
use super::ring::{ADRIFT, Id, Kept, Place, Ring};
use hub_engine::events::Event;
use mesh_core::UnixMs;
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

/// Events of this hub that are on their way through Redis. More of them: Redis is too slow to live with.
pub const QUEUE: usize = 8192;
/// Lives of hubs whose numbers are remembered; those heard of last stay.
const LIVES: usize = 1024;
/// How far clocks of hubs may differ.
const SKEW_MS: i64 = 5 * 60_000;
/// How often a rejected entry is logged.
const LOG_EVERY: Duration = Duration::from_secs(60);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// What is in the stream is not known yet.
    Starting,
    /// Events come by the stream alone.
    Carried,
    /// Redis is away: what this hub tells reaches its own readers, and nobody else.
    Adrift,
}

/// The last entry that was read, as it stood in the stream.
#[derive(Debug, Clone, PartialEq)]
pub struct Read {
    pub place: Place,
    /// None for what no hub writes.
    pub sealed: Option<Vec<u8>>,
}

/// An entry as it came, and what it says.
pub struct Come {
    pub read: Read,
    pub opened: Result<Option<Entry>, Bad>,
}

impl Come {
    pub fn of(read: Read, sealer: &Sealer) -> Self {
        let opened = read.sealed.as_deref().map_or(Err(Bad::Malformed), |sealed| sealer.open(sealed));
        Self { read, opened }
    }
}

struct Out {
    number: u64,
    word: Arc<Word>,
}

/// The time, on both clocks.
#[derive(Debug, Clone, Copy)]
pub struct Now {
    pub wall: UnixMs,
    pub steady: Duration,
}

pub struct State {
    pub mode: Mode,
    pub ring: Ring,
    pub life: Life,
    keep_for: Duration,
    /// Number of the next event of this hub.
    next: u64,
    /// Told and not come back by the stream yet.
    outbox: VecDeque<Out>,
    /// So many of them are written on this connection.
    written: usize,
    lives: BTreeMap<Life, (u64, Duration)>,
    pub read: Option<Read>,
    /// So many events that other hubs did not hear, and do not know of yet.
    pub unheard: u64,
    adrift: u64,
    /// Rounds of reading that were begun, and the last that found the end of the stream.
    pub begun: u64,
    pub ended: u64,
    /// Somebody waits for the end of this round.
    pub wanted: u64,
    logged: BTreeMap<&'static str, Duration>,
}

impl State {
    pub fn new(life: Life, keep: usize, keep_for: Duration) -> Self {
        Self {
            mode: Mode::Starting,
            ring: Ring::new(keep),
            life,
            keep_for,
            next: 1,
            outbox: VecDeque::new(),
            written: 0,
            lives: BTreeMap::new(),
            read: None,
            unheard: 0,
            adrift: 0,
            begun: 0,
            ended: 0,
            wanted: 0,
            logged: BTreeMap::new(),
        }
    }

    /// What this hub tells from now on has at least this number.
    pub fn next_number(&self) -> u64 {
        self.next
    }
    pub fn read_place(&self) -> Place {
        self.read.as_ref().map_or((0, 0), |r| r.place)
    }

    /// Never more than [`QUEUE`] are on their way; past that the hub is adrift.
    pub fn publish(&mut self, event: Event, now: Now) {
        if self.mode == Mode::Adrift {
            return self.tell_here(Arc::new(event), 0, now);
        }
        self.queue(Word::Event(event));
        if self.outbox.len() > QUEUE {
            self.go_adrift(now);
        }
    }

    fn queue(&mut self, word: Word) {
        let number = self.take_number();
        self.outbox.push_back(Out { number, word: Arc::new(word) });
    }
    /// Other hubs are told that they missed something.
    pub fn tell_gap(&mut self) {
        self.queue(Word::Gap);
    }

    fn tell_here(&mut self, event: Arc<Event>, own: u64, now: Now) {
        self.unheard += 1;
        self.adrift += 1;
        metrics::counter!("cortex_bus_unsent_total").increment(1);
        self.ring.push(Kept { id: self.adrift_id(), until: now.steady + self.keep_for, own, event });
    }
    fn adrift_id(&self) -> Id {
        Id { place: (ADRIFT, self.adrift), tag: tag(&self.life) }
    }

    /// Own readers wait no longer for what Redis does not bring back.
    pub fn go_adrift(&mut self, now: Now) {
        self.mode = Mode::Adrift;
        self.written = 0;
        for out in std::mem::take(&mut self.outbox) {
            match Arc::unwrap_or_clone(out.word) {
                Word::Event(event) => self.tell_here(Arc::new(event), out.number, now),
                _ => self.unheard += 1,
            }
        }
        if self.ring.newest_id().is_none() {
            self.ring.pass(self.adrift_id());
        }
    }

    /// A number for something that is not in the queue.
    pub fn take_number(&mut self) -> u64 {
        self.next += 1;
        self.next - 1
    }

    /// A new connection: what was written on the last one may or may not have arrived. What comes twice
    /// is dropped by its number.
    pub fn write_anew(&mut self) {
        self.written = 0;
    }
    pub fn unwritten(&self, most: usize) -> Vec<(u64, Arc<Word>)> {
        self.outbox.iter().skip(self.written).take(most).map(|o| (o.number, o.word.clone())).collect()
    }
    /// Written up to this number.
    pub fn note_written(&mut self, last: u64) {
        self.written = self.outbox.partition_point(|o| o.number <= last);
    }

    /// Takes the whole stream anew. Whoever was reading has missed something.
    pub fn load(&mut self, all: Vec<Come>, now: Now) {
        if self.mode != Mode::Starting {
            metrics::counter!("cortex_bus_resets_total").increment(1);
        }
        self.ring.cut();
        self.lives.clear();
        self.read = None;
        for come in all {
            self.take(come, true, now);
        }
        self.ring.trim(now.steady);
    }

    /// One entry of the stream, in its order.
    pub fn take(&mut self, come: Come, loading: bool, now: Now) {
        let Come { read, opened } = come;
        let id = Id { place: read.place, tag: read.sealed.as_deref().map_or([0; 8], tag) };
        self.read = Some(read);
        match opened {
            Ok(Some(entry)) => self.take_entry(entry, id, loading, now),
            Ok(None) => self.ring.pass(id),
            Err(bad) => {
                self.reject(if bad == Bad::Forged { "forged" } else { "malformed" }, now);
                // A stranger's place is not given to readers, unless there is no other.
                if self.ring.newest_id().is_none() {
                    self.ring.pass(id);
                }
            }
        }
    }

    fn take_entry(&mut self, entry: Entry, id: Id, loading: bool, now: Now) {
        let age_ms = now.wall.saturating_sub(entry.sent).max(0);
        let keep_ms = i64::try_from(self.keep_for.as_millis()).unwrap_or(i64::MAX);
        // Somebody put it there again: the lives of that time may be forgotten.
        if !loading && age_ms > keep_ms.saturating_add(SKEW_MS) {
            return self.reject("stale", now);
        }
        let before = self.lives.get(&entry.life).map(|(number, _)| *number);
        if before.is_some_and(|n| entry.number <= n) {
            return self.reject("repeated", now);
        }
        let hole = before.is_some_and(|n| entry.number > n + 1) || entry.word == Word::Gap;
        self.remember(entry.life, entry.number, now);
        let own = if entry.life == self.life { entry.number } else { 0 };
        if own != 0 {
            let back = self.outbox.iter().take_while(|o| o.number <= own).count();
            self.outbox.drain(..back);
            self.written = self.written.saturating_sub(back);
        }
        if hole {
            if !loading {
                metrics::counter!("cortex_bus_resets_total").increment(1);
            }
            self.ring.cut();
        }
        // What is new is kept in full, whatever the writer's clock says.
        let left = if loading { keep_ms - age_ms } else { keep_ms };
        match entry.word {
            Word::Event(event) if left >= 0 => {
                let until = now.steady + Duration::from_millis(left.unsigned_abs());
                self.ring.push(Kept { id, until, own, event: Arc::new(event) });
            }
            _ => self.ring.pass(id),
        }
    }

    fn remember(&mut self, life: Life, number: u64, now: Now) {
        self.lives.insert(life, (number, now.steady));
        if self.lives.len() > LIVES {
            let oldest = self.lives.iter().min_by_key(|(_, (_, heard))| *heard).map(|(life, _)| *life);
            oldest.map(|life| self.lives.remove(&life));
        }
    }

    /// Counted each time, logged now and then.
    fn reject(&mut self, why: &'static str, now: Now) {
        metrics::counter!("cortex_bus_rejected_total", "reason" => why).increment(1);
        if self.logged.get(why).is_none_or(|at| now.steady.saturating_sub(*at) >= LOG_EVERY) {
            self.logged.insert(why, now.steady);
            tracing::warn!(reason = why, "an entry of the Redis stream is not taken: somebody else writes there, or a hub has other keys");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bus::ring::Found;
    use hub_engine::events::{Data, NodeNews};
    use mesh_core::{NodeId, UserId};

    const NOW: Now = Now { wall: 1_000_000, steady: Duration::from_secs(5) };

    fn event() -> Event {
        Event { at: 1, owner: UserId::from_bytes([1; 16]), data: Data::Node(NodeId::from_bytes([2; 16]), NodeNews::Online) }
    }

    #[test]
    fn what_redis_does_not_take_is_bounded() {
        let mut state = State::new([1; 16], 100, Duration::from_secs(600));
        state.mode = Mode::Carried;
        for _ in 0..QUEUE {
            state.publish(event(), NOW);
        }
        assert_eq!((state.mode, state.outbox.len(), state.unheard), (Mode::Carried, QUEUE, 0));
        for _ in 0..QUEUE {
            state.publish(event(), NOW);
        }
        assert_eq!((state.mode, state.outbox.len(), state.unheard), (Mode::Adrift, 0, 2 * QUEUE as u64));
        assert_eq!(state.ring.newest() + 1 - state.ring.first(), 100);
    }

    fn come(seq: u64, number: u64, sent: UnixMs, word: Word) -> Come {
        let entry = Entry { life: [9; 16], number, sent, word };
        Come { read: Read { place: (1, seq), sealed: Some(vec![seq as u8]) }, opened: Ok(Some(entry)) }
    }

    #[test]
    fn nobody_goes_on_across_the_word_of_a_gap() {
        for loading in [false, true] {
            let mut state = State::new([1; 16], 100, Duration::from_secs(600));
            state.take(come(1, 1, NOW.wall, Word::Event(event())), loading, NOW);
            let before = state.ring.newest_id().unwrap();
            let reader = state.ring.newest();
            state.take(come(2, 2, NOW.wall, Word::Gap), loading, NOW);
            assert_eq!(state.ring.find(before, state.read_place()), Found::Gone);
            assert!(reader + 1 < state.ring.first(), "who has read so far is told");
            let gap = state.ring.newest_id().unwrap();
            state.take(come(3, 3, NOW.wall, Word::Event(event())), loading, NOW);
            assert_eq!(state.ring.find(gap, state.read_place()), Found::At(state.ring.newest() - 1), "but from there on");
        }
    }

    #[test]
    fn a_writer_whose_clock_lags_is_heard_and_a_revenant_is_not() {
        let mut state = State::new([1; 16], 100, Duration::from_secs(1));
        let mut heard = |seq, sent| {
            let before = state.ring.newest();
            state.take(come(seq, seq, sent, Word::Event(event())), false, NOW);
            state.ring.newest() > before
        };
        assert!(heard(1, NOW.wall - 1_000 - SKEW_MS));
        assert!(heard(2, NOW.wall + SKEW_MS));
        assert!(!heard(3, NOW.wall - 1_001 - SKEW_MS));
    }

    #[test]
    fn lives_are_forgotten_oldest_first() {
        let mut state = State::new([1; 16], 100, Duration::from_secs(600));
        for n in 0..LIVES as u32 + 10 {
            let mut life = [0; 16];
            life[..4].copy_from_slice(&n.to_be_bytes());
            state.remember(life, 1, Now { steady: Duration::from_secs(n.into()), ..NOW });
        }
        assert_eq!(state.lives.len(), LIVES);
        assert_eq!(state.lives.values().map(|(_, heard)| heard.as_secs()).min(), Some(10));
    }
}

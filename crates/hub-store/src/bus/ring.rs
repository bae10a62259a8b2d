//! The newest events in the order of the stream, and the names of their places.

use super::entry::Tag;
use hub_engine::bus::EventId;
use hub_engine::events::Event;
use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

/// A place in the stream, as Redis orders them.
pub type Place = (u64, u64);

/// No stream reaches here by itself: places of what one hub told while Redis was away.
pub const ADRIFT: u64 = u64::MAX;

/// Names an event to readers: its place, and what stood there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Id {
    pub place: Place,
    pub tag: Tag,
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}-{:x}-{:016x}", self.place.0, self.place.1, u64::from_be_bytes(self.tag))
    }
}

impl Id {
    pub fn parse(id: &EventId) -> Option<Self> {
        let mut parts = id.as_str().split('-').map(|p| u64::from_str_radix(p, 16).ok());
        let found = Self { place: (parts.next()??, parts.next()??), tag: parts.next()??.to_be_bytes() };
        // One text per id.
        (parts.next().is_none() && found.to_string() == id.as_str()).then_some(found)
    }
    pub fn public(self) -> EventId {
        EventId::new(self.to_string())
    }
}

pub struct Kept {
    pub id: Id,
    /// Steady time at which it is too old.
    pub until: Duration,
    /// Its number among those that this hub has told; 0 for others'.
    pub own: u64,
    pub event: Arc<Event>,
}

/// Where an id is.
#[derive(Debug, PartialEq, Eq)]
pub enum Found {
    /// This is its number here: what follows is kept without a hole.
    At(u64),
    /// Behind all that was read.
    Ahead,
    Gone,
}

/// Numbers are this ring's own and only rise.
pub struct Ring {
    /// Number of the front, or of the next event when there is none.
    first: u64,
    events: VecDeque<Kept>,
    /// What stood before the front.
    floor: Option<Id>,
    keep: usize,
}

impl Ring {
    pub fn new(keep: usize) -> Self {
        Self { first: 1, events: VecDeque::new(), floor: None, keep: keep.max(1) }
    }
    pub fn first(&self) -> u64 {
        self.first
    }
    /// Number of the last, or of the one before the next when there is none.
    pub fn newest(&self) -> u64 {
        self.first + self.events.len() as u64 - 1
    }
    pub fn newest_id(&self) -> Option<Id> {
        self.events.back().map(|k| k.id).or(self.floor)
    }
    pub fn floor(&self) -> Option<Id> {
        self.floor
    }
    pub fn get(&self, number: u64) -> Option<&Kept> {
        self.events.get(usize::try_from(number.checked_sub(self.first)?).ok()?)
    }

    pub fn push(&mut self, kept: Kept) {
        self.events.push_back(kept);
        while self.events.len() > self.keep {
            self.pop();
        }
    }
    /// What is read of the stream and is no event moves the floor of an empty ring.
    pub fn pass(&mut self, id: Id) {
        if self.events.is_empty() {
            self.floor = Some(id);
        }
    }
    pub fn trim(&mut self, now: Duration) {
        while self.events.front().is_some_and(|k| k.until < now) {
            self.pop();
        }
    }
    fn pop(&mut self) {
        self.floor = self.events.pop_front().map(|k| k.id);
        self.first += 1;
    }
    /// Nobody can go on from before here.
    pub fn cut(&mut self) {
        self.first = self.newest() + 2;
        self.events.clear();
        self.floor = None;
    }

    /// What stands before all that this hub told from this own number on, or while Redis was away.
    pub fn before_own(&self, number: u64) -> (u64, Option<Id>) {
        let later = self.events.iter().rev().take_while(|k| k.id.place.0 == ADRIFT || (k.own != 0 && k.own >= number)).count();
        let before = self.events.len() - later;
        (self.first + before as u64 - 1, before.checked_sub(1).map_or(self.floor, |i| Some(self.events[i].id)))
    }

    /// `read`: the last place of the stream that was read.
    pub fn find(&self, id: Id, read: Place) -> Found {
        if self.floor == Some(id) {
            return Found::At(self.first - 1);
        }
        match self.events.binary_search_by_key(&id.place, |k| k.id.place) {
            Ok(i) if self.events[i].id == id => Found::At(self.first + i as u64),
            Err(_) if id.place > read && id.place.0 != ADRIFT => Found::Ahead,
            _ => Found::Gone,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_has_one_text() {
        let id = Id { place: (1_790_000_000_000, 12), tag: [0, 1, 2, 3, 4, 5, 6, 7] };
        assert_eq!(id.to_string(), "1a0c4506c00-c-0001020304050607");
        assert_eq!(Id::parse(&id.public()), Some(id));
        let longest = Id { place: (u64::MAX, u64::MAX), tag: [255; 8] };
        assert!(longest.to_string().len() <= 64);
        assert_eq!(Id::parse(&longest.public()), Some(longest));
        for bad in
            ["", "-", "1-2", "1-2-3", "1-2-0000000000000003-", "01-2-0000000000000003", "1-2-000000000000000A", "+1-2-0000000000000003"]
        {
            assert_eq!(Id::parse(&EventId::new(bad)), None, "{bad}");
        }
    }
}

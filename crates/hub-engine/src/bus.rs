//! The bus: carries events to whoever listens, and keeps the newest for who comes back.

use crate::events::Event;
use async_trait::async_trait;
use mesh_process::{SharedClock, entropy};
use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::watch;

/// Recent events that a hub keeps for readers that come back or are slow; a few hundred bytes each.
pub const EVENTS_KEPT: usize = 65_536;

/// Names one event. Opaque to readers; what it means is the bus's own business.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct EventId(String);

impl EventId {
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for EventId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Carries events from whoever causes them to whoever listens. A port.
pub trait Bus: Send + Sync {
    /// Never waits, whatever readers do.
    fn publish(&self, event: Event);
    /// Reads on after that event, or from now on. What one reader makes the bus hold is bounded, and
    /// does not grow while it does not read.
    fn subscribe(&self, after: Option<&EventId>) -> Box<dyn Receiver>;
    /// How many read now.
    fn readers(&self) -> usize;
}

#[async_trait]
pub trait Receiver: Send {
    /// The next event, in the order of publication. Dropping the future loses nothing.
    async fn next(&mut self) -> Next;
    /// What to resume after. None while a reset is due.
    fn position(&self) -> Option<EventId>;
}

#[derive(Debug, Clone, PartialEq)]
pub enum Next {
    Event(EventId, Arc<Event>),
    /// Events were missed: of another life, older than what is kept, or overtaken by newer ones. It
    /// goes on with what is published from now on, after this id.
    Reset(EventId),
}

/// The bus of a hub that is alone: one ring in memory, bounded by count and by age. A reader is a
/// place in the ring and holds nothing else.
pub struct LocalBus(Arc<Local>);

struct Local {
    /// Of this process: an id of another life means nothing here.
    life: String,
    clock: SharedClock,
    keep: usize,
    keep_for: Duration,
    ring: Mutex<Ring>,
    /// The newest number; wakes readers.
    newest: watch::Sender<u64>,
}

struct Ring {
    /// Number of the front, or of the next event when there is none.
    first: u64,
    /// With the steady time of publication.
    events: VecDeque<(Duration, Arc<Event>)>,
}

impl LocalBus {
    pub fn new(keep: usize, keep_for: Duration, clock: SharedClock) -> Self {
        let life = entropy::bytes::<8>().iter().map(|b| format!("{b:02x}")).collect();
        let ring = Mutex::new(Ring { first: 1, events: VecDeque::new() });
        Self(Arc::new(Local { life, clock, keep: keep.max(1), keep_for, ring, newest: watch::channel(0).0 }))
    }
}

impl Ring {
    fn newest(&self) -> u64 {
        self.first + self.events.len() as u64 - 1
    }
    fn trim(&mut self, keep: usize, oldest: Duration) {
        while self.events.len() > keep || self.events.front().is_some_and(|(at, _)| *at < oldest) {
            self.events.pop_front();
            self.first += 1;
        }
    }
}

impl Local {
    fn ring(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }
    fn id(&self, number: u64) -> EventId {
        EventId(format!("{}-{number}", self.life))
    }
    fn number(&self, id: &EventId) -> Option<u64> {
        let (life, number) = id.0.split_once('-')?;
        (life == self.life).then(|| number.parse().ok()).flatten()
    }
    fn trimmed(&self) -> MutexGuard<'_, Ring> {
        let oldest = self.clock.steady().saturating_sub(self.keep_for);
        let mut ring = self.ring();
        ring.trim(self.keep, oldest);
        ring
    }
}

impl Bus for LocalBus {
    fn publish(&self, event: Event) {
        let at = self.0.clock.steady();
        let newest = {
            let mut ring = self.0.ring();
            ring.events.push_back((at, Arc::new(event)));
            ring.trim(self.0.keep, at.saturating_sub(self.0.keep_for));
            ring.newest()
        };
        // Another publisher may have told a higher one already.
        self.0.newest.send_if_modified(|n| {
            let newer = newest > *n;
            *n = newest.max(*n);
            newer
        });
    }

    fn subscribe(&self, after: Option<&EventId>) -> Box<dyn Receiver> {
        // Before the ring is read, so that no event falls between.
        let news = self.0.newest.subscribe();
        let ring = self.0.trimmed();
        let newest = ring.newest();
        let at = match after {
            None => Some(newest),
            // A number that was never given counts as one of another life.
            Some(id) => self.0.number(id).filter(|n| (ring.first - 1..=newest).contains(n)),
        };
        drop(ring);
        Box::new(LocalReceiver { bus: self.0.clone(), at, news })
    }

    fn readers(&self) -> usize {
        self.0.newest.receiver_count()
    }
}

struct LocalReceiver {
    bus: Arc<Local>,
    /// The last event that was read; none when it cannot be resumed after.
    at: Option<u64>,
    news: watch::Receiver<u64>,
}

impl LocalReceiver {
    fn look(&mut self) -> Option<Next> {
        let ring = self.bus.ring();
        match self.at {
            Some(at) if at + 1 >= ring.first => {
                let (_, event) = ring.events.get((at + 1 - ring.first) as usize)?;
                self.at = Some(at + 1);
                Some(Next::Event(self.bus.id(at + 1), event.clone()))
            }
            _ => {
                let newest = ring.newest();
                self.at = Some(newest);
                Some(Next::Reset(self.bus.id(newest)))
            }
        }
    }
}

#[async_trait]
impl Receiver for LocalReceiver {
    async fn next(&mut self) -> Next {
        loop {
            self.news.borrow_and_update();
            if let Some(next) = self.look() {
                return next;
            }
            // The sender lives as long as this holds the bus.
            let _ = self.news.changed().await;
        }
    }
    fn position(&self) -> Option<EventId> {
        self.at.map(|n| self.bus.id(n))
    }
}

//! The bus of several hubs: one Redis stream, read once by each hub into a ring that all its readers
//! share.
//!
//! ```text
//! publish ──► queue ──► XADD ──► stream ──► XREAD ──► ring ──► readers
//!               └───────── Redis is away ──────────────┘
//! ```
//! What comes out of the stream is the order of events, for the hub that told them too. Who can write to
//! Redis can delay and drop events, and neither make nor alter one.

mod carrier;
mod entry;
mod ring;
mod state;
mod stream;
mod url;

pub use url::RedisUrl;

use async_trait::async_trait;
use carrier::Carrier;
use hub_engine::bus::{Bus, EventId, Next, Receiver};
use hub_engine::events::Event;
use mesh_core::HubId;
use mesh_process::{SharedClock, Tasks, entropy};
use ring::{Found, Id};
use state::{Mode, Now, State};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{Notify, watch};

/// Of which deployment, and how much is kept.
pub struct RedisPlan {
    pub url: RedisUrl,
    pub hub: HubId,
    /// Only the hubs of this deployment know it.
    pub key: [u8; 32],
    pub keep: usize,
    pub keep_for: Duration,
    pub clock: SharedClock,
}

/// A bus that several hubs share over Redis.
pub struct RedisBus(Arc<Shared>);

struct Shared {
    clock: SharedClock,
    state: Mutex<State>,
    /// Readers look again.
    news: watch::Sender<()>,
    /// There is something to write.
    work: Notify,
    connected: watch::Sender<bool>,
    readers: AtomicUsize,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
    fn now(&self) -> Now {
        Now { wall: self.clock.now_ms(), steady: self.clock.steady() }
    }
    fn go_adrift(&self) {
        let now = self.now();
        self.state().go_adrift(now);
        self.news.send_replace(());
    }
}

impl RedisBus {
    /// Begins to connect, in a task of `tasks` that goes on until they end. Returns at once.
    pub fn start(plan: RedisPlan, tasks: &Tasks) -> Self {
        let state = State::new(entropy::bytes(), plan.keep, plan.keep_for);
        let shared = Arc::new(Shared {
            clock: plan.clock.clone(),
            state: Mutex::new(state),
            news: watch::channel(()).0,
            work: Notify::new(),
            connected: watch::channel(false).0,
            readers: AtomicUsize::new(0),
        });
        tasks.spawn("bus", Carrier::new(shared.clone(), plan, tasks.token()).run());
        Self(shared)
    }

    /// Waits until it carries events; false when that took longer than `most`.
    pub async fn connected(&self, most: Duration) -> bool {
        let mut connected = self.0.connected.subscribe();
        tokio::time::timeout(most, connected.wait_for(|c| *c)).await.is_ok_and(|c| c.is_ok())
    }
}

impl Bus for RedisBus {
    fn publish(&self, event: Event) {
        let now = self.0.now();
        let mode = {
            let mut state = self.0.state();
            state.publish(event, now);
            state.mode
        };
        if mode == Mode::Adrift {
            self.0.news.send_replace(());
        }
        // Adrift as well: the queue may have run over just now.
        self.0.work.notify_one();
    }

    fn subscribe(&self, after: Option<&EventId>) -> Box<dyn Receiver> {
        // Before the ring is looked at, so that no event falls between.
        let news = self.0.news.subscribe();
        let now = self.0.now();
        let mut state = self.0.state();
        state.ring.trim(now.steady);
        let skip = if after.is_none() { state.next_number() } else { 0 };
        let (at, id) = match after.map(Id::parse) {
            None if state.mode != Mode::Starting => (At::Here(state.ring.newest()), state.ring.newest_id()),
            None => (At::Waits { after: None, round: 0 }, None),
            Some(Some(id)) => (At::Waits { after: Some(id), round: state.begun + 1 }, None),
            Some(None) => (At::Reset, None),
        };
        self.0.readers.fetch_add(1, Ordering::AcqRel);
        let mut receiver = RedisReceiver { bus: self.0.clone(), at, id, skip, news };
        receiver.settle(&mut state);
        drop(state);
        Box::new(receiver)
    }

    fn readers(&self) -> usize {
        self.0.readers.load(Ordering::Acquire)
    }
}

enum At {
    /// For the stream to be read that far; an id that is not found by the end of that round was never given.
    Waits {
        after: Option<Id>,
        round: u64,
    },
    /// Has read this number of the ring.
    Here(u64),
    Reset,
}

struct RedisReceiver {
    bus: Arc<Shared>,
    at: At,
    /// What to resume after.
    id: Option<Id>,
    /// What this hub told before that number was told before the reader was there.
    skip: u64,
    news: watch::Receiver<()>,
}

impl RedisReceiver {
    /// Finds its place, if that can be said already.
    fn settle(&mut self, state: &mut State) {
        let At::Waits { after, round } = self.at else { return };
        self.id = after;
        self.at = match (state.mode, after) {
            (Mode::Starting, _) => return,
            (_, None) => {
                let (number, id) = state.ring.before_own(self.skip);
                self.id = id;
                At::Here(number)
            }
            (mode, Some(id)) => match state.ring.find(id, state.read_place()) {
                Found::At(n) => At::Here(n),
                // Another hub has read it before this one.
                Found::Ahead if mode == Mode::Carried && state.ended < round => {
                    state.wanted = state.wanted.max(round);
                    return;
                }
                _ => At::Reset,
            },
        };
        if matches!(self.at, At::Reset) {
            self.id = None;
        }
    }

    fn look(&mut self) -> Option<Next> {
        let bus = self.bus.clone();
        let mut state = bus.state();
        self.settle(&mut state);
        loop {
            match self.at {
                At::Waits { .. } => return None,
                At::Here(at) if at + 1 >= state.ring.first() => {
                    let kept = state.ring.get(at + 1)?;
                    self.at = At::Here(at + 1);
                    self.id = Some(kept.id);
                    if kept.own == 0 || kept.own >= self.skip {
                        return Some(Next::Event(kept.id.public(), kept.event.clone()));
                    }
                }
                _ => {
                    // Nothing is given as a place to come back to before there is one.
                    let id = state.ring.newest_id()?;
                    self.at = At::Here(state.ring.newest());
                    self.id = Some(id);
                    self.skip = state.next_number();
                    return Some(Next::Reset(id.public()));
                }
            }
        }
    }
}

#[async_trait]
impl Receiver for RedisReceiver {
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
        let overtaken = matches!(self.at, At::Here(at) if at + 1 < self.bus.state().ring.first());
        self.id.filter(|_| !overtaken).map(Id::public)
    }
}

impl Drop for RedisReceiver {
    fn drop(&mut self) {
        self.bus.readers.fetch_sub(1, Ordering::AcqRel);
    }
}

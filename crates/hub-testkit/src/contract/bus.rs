//! What every bus does. Each part takes fresh buses; a clock that the test holds ages events.

use super::T0;
use super::sample::{node_id, user_id};
use hub_engine::bus::{Bus, EventId, Next, Receiver};
use hub_engine::events::{Data, Event, NodeNews};
use mesh_process::{Clock, SharedClock};
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

/// A clock that moves when it is told to.
#[derive(Debug, Default)]
pub struct HandClock(AtomicU64);

impl HandClock {
    pub fn advance(&self, by: Duration) {
        self.0.fetch_add(by.as_millis() as u64, Ordering::SeqCst);
    }
}

impl Clock for HandClock {
    fn now_ms(&self) -> i64 {
        T0 + self.0.load(Ordering::SeqCst) as i64
    }
    fn anchored_ms(&self) -> i64 {
        self.now_ms()
    }
    fn steady(&self) -> Duration {
        Duration::from_millis(self.0.load(Ordering::SeqCst))
    }
}

/// What a bus is made of: how many events it keeps, for how long, by which clock. Two that are made
/// are two lives.
pub struct BusPlan {
    pub keep: usize,
    pub keep_for: Duration,
    pub clock: SharedClock,
}

const AGE: Duration = Duration::from_secs(600);
/// Long for a test, short for a person; only a bus that is broken waits for it.
const PATIENCE: Duration = Duration::from_secs(90);

pub async fn bus(make: impl AsyncFn(BusPlan) -> Arc<dyn Bus>) {
    let clock = Arc::new(HandClock::default());
    let fresh = async |keep| make(BusPlan { keep, keep_for: AGE, clock: clock.clone() }).await;
    order(&*fresh(1000).await).await;
    resume(&*fresh(1000).await).await;
    another_life(&*fresh(1000).await, &*fresh(1000).await).await;
    too_many(&*fresh(10).await).await;
    too_old(&*fresh(1000).await, &clock).await;
    slow_reader(&*fresh(50).await).await;
    forgets(&*fresh(20).await).await;
    many_readers(fresh(20_000).await).await;
    cancelled_waits(&*fresh(1000).await).await;
}

/// The `n`th event; the number is in its data.
fn event(n: u64) -> Event {
    Event { at: T0, owner: user_id(1), data: Data::Node(node_id(1), NodeNews::Registered { version: n.to_string() }) }
}
fn number(event: &Event) -> u64 {
    match &event.data {
        Data::Node(_, NodeNews::Registered { version }) => version.parse().expect("the suite made it"),
        other => panic!("the suite did not publish {other:?}"),
    }
}

async fn next(r: &mut dyn Receiver) -> Next {
    tokio::time::timeout(PATIENCE, r.next()).await.expect("a reader that has something to read is not left waiting")
}
async fn one(r: &mut dyn Receiver) -> (EventId, u64) {
    match next(r).await {
        Next::Event(id, e) => (id, number(&e)),
        Next::Reset(_) => panic!("nothing was missed"),
    }
}
async fn numbers(r: &mut dyn Receiver, n: usize) -> Vec<u64> {
    let mut out = vec![];
    for _ in 0..n {
        out.push(one(r).await.1);
    }
    out
}
async fn reset(r: &mut dyn Receiver) -> EventId {
    match next(r).await {
        Next::Reset(id) => id,
        Next::Event(_, e) => panic!("event {} came without a word of what was missed", number(&e)),
    }
}
/// Nothing more is there now: a marker is the next thing to come.
async fn nothing_more(bus: &dyn Bus, r: &mut dyn Receiver) {
    bus.publish(event(999_999));
    assert_eq!(one(r).await.1, 999_999);
}

async fn order(bus: &dyn Bus) {
    bus.publish(event(0));
    let mut r = bus.subscribe(None);
    assert_eq!(bus.readers(), 1);
    let mut ids = BTreeSet::new();
    for n in 1..=300 {
        bus.publish(event(n));
        if n % 7 == 0 {
            for wanted in n - 6..=n {
                let (id, got) = one(&mut *r).await;
                assert_eq!(got, wanted, "in the order of publication, and nothing from before the subscription");
                assert_eq!(r.position().as_ref(), Some(&id));
                assert!(id.as_str().len() <= 64 && id.as_str().bytes().all(|b| b.is_ascii_graphic()), "fits a header line: {id}");
                assert!(ids.insert(id.to_string()), "an id names one event");
            }
        }
    }
    drop(r);
    assert_eq!(bus.readers(), 0);
}

async fn resume(bus: &dyn Bus) {
    let mut r = bus.subscribe(None);
    let start = r.position().expect("a place to come back to, before the first event");
    (1..=20).for_each(|n| bus.publish(event(n)));
    let mut seen = vec![(start, 0)];
    for _ in 0..20 {
        seen.push(one(&mut *r).await);
    }
    let mut resumed = vec![];
    for (id, n) in &seen {
        let mut again = bus.subscribe(Some(id));
        assert_eq!(again.position().as_ref(), Some(id));
        assert_eq!(numbers(&mut *again, 20 - *n as usize).await, (*n + 1..=20).collect::<Vec<_>>(), "none lost, none twice");
        resumed.push(again);
    }
    bus.publish(event(21));
    for mut r in resumed {
        assert_eq!(one(&mut *r).await.1, 21, "and on with what is new, with nothing between");
    }
}

async fn another_life(bus: &dyn Bus, earlier: &dyn Bus) {
    let mut r = earlier.subscribe(None);
    earlier.publish(event(1));
    let foreign = one(&mut *r).await.0;
    // As many events here, so that only the life tells them apart.
    bus.publish(event(1));
    let mut mine = bus.subscribe(None);
    bus.publish(event(2));
    let own = one(&mut *mine).await.0;
    let mut bad =
        vec![foreign, EventId::new(""), EventId::new("-"), EventId::new("1"), EventId::new("nonsense-1"), EventId::new("ä".repeat(64))];
    bad.push(EventId::new(format!("{own}9999")));
    for id in bad {
        let mut r = bus.subscribe(Some(&id));
        assert_eq!(r.position(), None, "a reset is due: {id}");
        let place = reset(&mut *r).await;
        assert_eq!(r.position(), Some(place.clone()));
        nothing_more(bus, &mut *r).await;
        let mut again = bus.subscribe(Some(&place));
        assert_eq!(one(&mut *again).await.1, 999_999, "the reset's id is a place to come back to");
    }
}

async fn too_many(bus: &dyn Bus) {
    let mut r = bus.subscribe(None);
    let start = r.position().expect("a place");
    let mut seen = vec![];
    for n in 1..=30 {
        bus.publish(event(n));
        seen.push(one(&mut *r).await.0);
    }
    for old in [&start, &seen[0], &seen[18]] {
        let mut gone = bus.subscribe(Some(old));
        assert_eq!(gone.position(), None, "a reset is due");
        reset(&mut *gone).await;
    }
    let mut kept = bus.subscribe(Some(&seen[19]));
    assert_eq!(numbers(&mut *kept, 10).await, (21..=30).collect::<Vec<_>>(), "exactly what is kept can be resumed");
}

async fn too_old(bus: &dyn Bus, clock: &HandClock) {
    let mut r = bus.subscribe(None);
    let start = r.position().expect("a place");
    bus.publish(event(1));
    let first = one(&mut *r).await.0;
    clock.advance(AGE / 2);
    bus.publish(event(2));
    assert_eq!(numbers(&mut *bus.subscribe(Some(&start)), 2).await, [1, 2]);
    clock.advance(AGE / 2 + Duration::from_secs(1));
    reset(&mut *bus.subscribe(Some(&start))).await;
    assert_eq!(one(&mut *bus.subscribe(Some(&first))).await.1, 2, "missed nothing but what is kept");
    clock.advance(AGE);
    reset(&mut *bus.subscribe(Some(&first))).await;
    let place = reset(&mut *r).await;
    nothing_more(bus, &mut *r).await;
    // Silence makes no place too old: nothing was missed.
    clock.advance(AGE * 2);
    let mut quiet = bus.subscribe(r.position().as_ref());
    nothing_more(bus, &mut *quiet).await;
    reset(&mut *bus.subscribe(Some(&place))).await;
}

async fn slow_reader(bus: &dyn Bus) {
    let (mut slow, mut quick) = (bus.subscribe(None), bus.subscribe(None));
    for n in 1..=20_000 {
        bus.publish(event(n));
        assert_eq!(one(&mut *quick).await.1, n, "a slow reader keeps nobody else waiting");
    }
    reset(&mut *slow).await;
    nothing_more(bus, &mut *slow).await;
}

/// What was overtaken is given back, although a reader has not read it.
async fn forgets(bus: &dyn Bus) {
    let (_stopped, mut quick) = (bus.subscribe(None), bus.subscribe(None));
    let mut seen: Vec<Weak<Event>> = vec![];
    for n in 1..=20_000 {
        bus.publish(event(n));
        match next(&mut *quick).await {
            Next::Event(_, e) => seen.push(Arc::downgrade(&e)),
            Next::Reset(_) => panic!("the quick reader missed nothing"),
        }
    }
    let alive = seen.iter().filter(|e| e.strong_count() > 0).count();
    assert!(alive <= 20, "{alive} of 20,000 events are still held");
}

async fn many_readers(bus: Arc<dyn Bus>) {
    const READERS: usize = 200;
    const EVENTS: u64 = 2000;
    let readers: Vec<_> = (0..READERS).map(|_| bus.subscribe(None)).collect();
    assert_eq!(bus.readers(), READERS);
    let read = readers.into_iter().map(|mut r| async move {
        let mut all = vec![];
        for _ in 0..EVENTS {
            all.push(one(&mut *r).await);
        }
        all
    });
    let publish = async {
        for n in 1..=EVENTS {
            bus.publish(event(n));
            if n % 50 == 0 {
                tokio::task::yield_now().await;
            }
        }
    };
    let (all, ()) = futures::join!(futures::future::join_all(read), publish);
    assert!(all[0].iter().map(|(_, n)| *n).eq(1..=EVENTS));
    assert!(all.iter().all(|a| a == &all[0]), "all see the same events under the same ids");
    assert_eq!(bus.readers(), 0);
}

/// A wait that was given up took nothing with it.
async fn cancelled_waits(bus: &dyn Bus) {
    let mut r = bus.subscribe(None);
    for n in 1..=50 {
        {
            let wait = std::pin::pin!(r.next());
            assert!(futures::poll!(wait).is_pending());
        }
        bus.publish(event(n));
        assert_eq!(one(&mut *r).await.1, n);
    }
}

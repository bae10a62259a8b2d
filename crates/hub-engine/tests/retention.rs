//! What goes when: in memory, with a clock that the test holds.

use hub_engine::ports::{Applied, Besides, Gauges, Journal, Output};
use hub_engine::records::{Stream, Task, TaskFilter};
use hub_engine::retention::{Left, Limits, Retention};
use hub_testkit::contract::{HandClock, sample};
use hub_testkit::memory::MemoryStore;
use mesh_core::task::{Event, Outcome};
use mesh_process::Clock;
use std::sync::Arc;
use std::time::Duration;

const DAY: Duration = Duration::from_secs(86_400);
const LARGE: usize = 50_000;

struct Hub {
    store: Arc<MemoryStore>,
    clock: Arc<HandClock>,
    retention: Retention,
}

impl Hub {
    fn new(limits: Limits) -> Self {
        let (store, clock) = (Arc::new(MemoryStore::new()), Arc::new(HandClock::default()));
        let retention = Retention {
            agents: store.clone(),
            store: store.clone(),
            purges: store.clone(),
            gauges: store.clone(),
            clock: clock.clone(),
            limits,
            warned: Default::default(),
        };
        Self { store, clock, retention }
    }
    /// A task with output, which ends now or goes on.
    async fn task(&self, n: u16, ends: bool) {
        let t = sample::assigned_task(n);
        self.store.accept(&t).await.unwrap();
        let frames = vec![sample::frame(1, Stream::Stdout, vec![b'x'; LARGE])];
        self.store.append(t.id, sample::attempt(1), frames, 1 << 20).await.unwrap();
        if ends {
            let ended = Event::Ended { attempt: sample::attempt(1), outcome: Outcome::Exited(0) };
            let applied = self.store.apply(t.id, &ended, Besides::default(), self.clock.now_ms()).await.unwrap();
            assert!(matches!(applied, Applied::Done(..)));
        }
    }
    async fn settle(&self) -> u32 {
        let mut rounds = 1;
        while self.retention.round().await.unwrap() == Left::More {
            rounds += 1;
        }
        rounds
    }
    /// Tasks, and those of them with output.
    async fn counts(&self) -> (usize, usize) {
        let all = hub_engine::ports::Window { before: None, limit: 10_000 };
        let tasks: Vec<Task> = self.store.tasks(&TaskFilter::default(), all).await.unwrap();
        (tasks.len(), tasks.iter().filter(|t| t.output.kept_seq > 0).count())
    }
}

#[tokio::test]
async fn output_goes_before_its_task_and_what_runs_stays() {
    let hub = Hub::new(Limits { journal_days: 30, output_days: 7, ..Limits::default() });
    for n in 1..=3 {
        hub.task(n, n != 3).await;
        hub.clock.advance(DAY);
    }
    // Three days after the end of the first, two after that of the second.
    hub.settle().await;
    assert_eq!(hub.counts().await, (3, 3));
    hub.clock.advance(4 * DAY);
    hub.settle().await;
    assert_eq!(hub.counts().await, (3, 3), "seven days are not over before they are");
    hub.clock.advance(Duration::from_millis(1));
    hub.settle().await;
    assert_eq!(hub.counts().await, (3, 2));
    hub.clock.advance(DAY);
    hub.settle().await;
    assert_eq!(hub.counts().await, (3, 1));
    hub.clock.advance(22 * DAY);
    hub.settle().await;
    assert_eq!(hub.counts().await, (2, 1));
    hub.clock.advance(900 * DAY);
    hub.settle().await;
    assert_eq!(hub.counts().await, (1, 1), "the third has not ended");
}

#[tokio::test]
async fn nothing_goes_where_nothing_limits() {
    let hub = Hub::new(Limits::default());
    hub.task(1, true).await;
    hub.clock.advance(100_000 * DAY);
    hub.settle().await;
    assert_eq!(hub.counts().await, (1, 1));
    assert_eq!(hub.retention.warned.now(), [].into());
}

#[tokio::test]
async fn beyond_its_bytes_the_oldest_output_goes_at_once() {
    let hub = Hub::new(Limits { output_bytes: 4 * LARGE as u64, ..Limits::default() });
    hub.task(1, false).await;
    for n in 2..=3 {
        hub.task(n, true).await;
    }
    hub.settle().await;
    assert_eq!((hub.counts().await, hub.retention.warned.now()), ((3, 3), [].into()), "75 % of the bound");
    hub.task(4, true).await;
    hub.settle().await;
    assert_eq!((hub.counts().await, hub.retention.warned.now()), ((4, 4), ["output"].into()));
    hub.task(5, true).await;
    hub.task(6, true).await;
    hub.settle().await;
    assert_eq!(hub.counts().await, (6, 4));
    assert!(hub.store.storage().await.unwrap().output_bytes <= 4 * LARGE as u64);
    let kept = |n| hub.store.read(sample::task_id(n), sample::attempt(1), 0, usize::MAX);
    assert!(!kept(1).await.unwrap().is_empty(), "it is the oldest and has not ended");
    assert!(kept(2).await.unwrap().is_empty() && kept(3).await.unwrap().is_empty());
    // What runs alone may hold more than there is room for.
    for n in 7..=12 {
        hub.task(n, false).await;
    }
    hub.settle().await;
    assert_eq!(hub.counts().await, (12, 7), "all that has ended gives way, and the rest is waited for");
}

#[tokio::test]
async fn beyond_its_bytes_a_task_stays_for_a_day() {
    let hub = Hub::new(Limits { journal_bytes: 1, ..Limits::default() });
    for n in 1..=3 {
        hub.task(n, n < 3).await;
        hub.clock.advance(DAY / 2);
    }
    hub.settle().await;
    assert_eq!(hub.counts().await.0, 2, "the second ended a day ago, and not longer");
    assert_eq!(hub.retention.warned.now(), ["journal"].into());
    hub.clock.advance(DAY);
    hub.settle().await;
    assert_eq!(hub.counts().await.0, 1);
}

#[tokio::test]
async fn a_look_does_not_take_the_hub_for_itself() {
    let hub = Hub::new(Limits { journal_days: 1, ..Limits::default() });
    for n in 1..=4500 {
        hub.task(n, true).await;
    }
    hub.clock.advance(2 * DAY);
    assert_eq!(hub.retention.round().await.unwrap(), Left::More);
    assert_eq!(hub.counts().await.0, 2500, "so many in one look");
    assert_eq!(hub.settle().await, 2);
    assert_eq!(hub.counts().await.0, 0);
}

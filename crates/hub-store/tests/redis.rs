//! The bus on Redis: the suite of every bus, and what only a real server can do to it.

use hub_engine::bus::{Bus, EventId, Next, Receiver};
use hub_engine::events::{Data, Event, NodeNews};
use hub_store::{RedisBus, RedisPlan, RedisUrl};
use hub_testkit::contract::sample::{node_id, user_id};
use hub_testkit::contract::{self, BusPlan};
use hub_testkit::redis::Server;
use mesh_core::HubId;
use mesh_process::tasks::Ended;
use mesh_process::{SystemClock, Tasks};
use std::cell::Cell;
use std::sync::Arc;
use std::time::Duration;

/// Long for a test, short for a person.
const PATIENCE: Duration = Duration::from_secs(90);
const KEY: [u8; 32] = [7; 32];

fn deployment(n: u8) -> HubId {
    HubId::from_bytes([n; 16])
}
fn plan(server: &Server, hub: u8) -> RedisPlan {
    RedisPlan {
        url: RedisUrl::parse(&server.url()).unwrap(),
        hub: deployment(hub),
        key: KEY,
        keep: 1000,
        keep_for: Duration::from_secs(600),
        clock: SystemClock::shared(),
    }
}
async fn joined(plan: RedisPlan, tasks: &Tasks) -> RedisBus {
    let bus = RedisBus::start(plan, tasks);
    assert!(bus.connected(PATIENCE).await);
    bus
}

/// A hub's bus, as long as its tasks live.
struct Hub {
    bus: RedisBus,
    tasks: Tasks,
}
impl Hub {
    async fn new(server: &Server) -> Self {
        Self::with(plan(server, 1)).await
    }
    async fn with(plan: RedisPlan) -> Self {
        let tasks = Tasks::new();
        Self { bus: joined(plan, &tasks).await, tasks }
    }
    fn tell(&self, n: u64) {
        self.bus.publish(event(n));
    }
    fn reader(&self) -> Box<dyn Receiver> {
        self.bus.subscribe(None)
    }
    async fn stop(self) {
        assert_eq!(self.tasks.end(PATIENCE).await, Ended::Clean);
    }
}

fn event(n: u64) -> Event {
    Event { at: 1, owner: user_id(1), data: Data::Node(node_id(1), NodeNews::Registered { version: n.to_string() }) }
}
/// The event's number; None for a reset.
async fn next(r: &mut dyn Receiver) -> (EventId, Option<u64>) {
    match tokio::time::timeout(PATIENCE, r.next()).await.expect("something to read, in time") {
        Next::Reset(id) => (id, None),
        Next::Event(id, e) => match &e.data {
            Data::Node(_, NodeNews::Registered { version }) => (id, Some(version.parse().unwrap())),
            other => panic!("{other:?}"),
        },
    }
}
async fn numbers(r: &mut dyn Receiver, n: usize) -> Vec<Option<u64>> {
    let mut all = vec![];
    for _ in 0..n {
        all.push(next(r).await.1);
    }
    all
}
fn some(numbers: impl IntoIterator<Item = u64>) -> Vec<Option<u64>> {
    numbers.into_iter().map(Some).collect()
}
/// Reads on until the reset, past what came before it.
async fn until_reset(r: &mut dyn Receiver) -> EventId {
    loop {
        if let (id, None) = next(r).await {
            return id;
        }
    }
}
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(work).await.unwrap()
}
async fn server() -> Arc<Server> {
    Arc::new(blocking(Server::start).await)
}
async fn to(server: &Arc<Server>, what: fn(&Server)) {
    let server = server.clone();
    blocking(move || what(&server)).await;
}
async fn command(server: &Arc<Server>, words: &[&[u8]]) -> String {
    let (server, words) = (server.clone(), words.iter().map(|w| w.to_vec()).collect::<Vec<_>>());
    blocking(move || server.command(&words.iter().map(Vec::as_slice).collect::<Vec<_>>())).await
}
fn key(hub: u8) -> String {
    format!("cortex:{}:events", deployment(hub))
}
/// All that stands in the stream, as places and sealed bytes.
async fn stream(server: &Server) -> Vec<(String, Vec<u8>)> {
    let mut conn = redis::Client::open(server.url()).unwrap().get_multiplexed_async_connection().await.unwrap();
    type Fields = Vec<(String, Vec<u8>)>;
    let all: Vec<(String, Fields)> = redis::cmd("XRANGE").arg(key(1)).arg("-").arg("+").query_async(&mut conn).await.unwrap();
    all.into_iter().map(|(place, mut fields)| (place, fields.remove(0).1)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn bus() {
    let (server, tasks, made) = (server().await, Tasks::new(), Cell::new(10));
    let make = async |p: BusPlan| {
        made.set(made.get() + 1);
        let BusPlan { keep, keep_for, clock } = p;
        Arc::new(joined(RedisPlan { keep, keep_for, clock, ..plan(&server, made.get()) }, &tasks).await) as _
    };
    contract::bus(make).await;
    assert_eq!(tasks.end(PATIENCE).await, Ended::Clean);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_hubs_tell_the_same_story() {
    let server = server().await;
    let (a, b) = (Hub::new(&server).await, Hub::new(&server).await);
    let (mut at_a, mut at_b) = (a.reader(), b.reader());
    for n in 0..200 {
        if n % 2 == 0 { a.tell(n) } else { b.tell(n) }
    }
    let (mut story, mut same) = (vec![], vec![]);
    for _ in 0..200 {
        story.push(next(&mut *at_a).await);
        same.push(next(&mut *at_b).await);
    }
    assert_eq!(story, same, "one order and the same ids");
    let of = |rest: u64| story.iter().filter_map(|(_, n)| *n).filter(move |n| n % 2 == rest).collect::<Vec<_>>();
    assert_eq!(of(0), (0..200).step_by(2).collect::<Vec<_>>(), "each hub's in its order, none lost, none twice");
    assert_eq!(of(1), (1..200).step_by(2).collect::<Vec<_>>());

    // Who read at one hub goes on at the other, at one that came later, and after all have stopped.
    let later = Hub::new(&server).await;
    for hub in [&a, &b, &later] {
        for from in [0, 77, 198] {
            let mut r = hub.bus.subscribe(Some(&story[from].0));
            assert_eq!(r.position().as_ref(), Some(&story[from].0));
            for wanted in &story[from + 1..] {
                assert_eq!(&next(&mut *r).await, wanted);
            }
        }
    }
    drop((at_a, at_b));
    for hub in [a, b, later] {
        hub.stop().await;
    }
    let anew = Hub::new(&server).await;
    let mut r = anew.bus.subscribe(Some(&story[150].0));
    for wanted in &story[151..] {
        assert_eq!(&next(&mut *r).await, wanted);
    }
    anew.tell(1000);
    assert_eq!(next(&mut *r).await.1, Some(1000));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_id_that_one_hub_gave_is_waited_for_by_the_other() {
    let server = server().await;
    let (a, b) = (Hub::new(&server).await, Hub::new(&server).await);
    let mut r = a.reader();
    for n in 1..=300 {
        a.tell(n);
        let (id, _) = next(&mut *r).await;
        // Whether the other hub has read it already or not.
        let mut there = b.bus.subscribe(Some(&id));
        a.tell(n + 1000);
        assert_eq!(next(&mut *r).await.1, Some(n + 1000));
        assert_eq!(next(&mut *there).await.1, Some(n + 1000), "{n}");
    }
    // One that was never given is not waited for any longer than it takes to see that.
    let mut never = b.bus.subscribe(Some(&EventId::new("1ffffffffff-0-0000000000000001")));
    assert_eq!(next(&mut *never).await.1, None);
    let other = Hub::with(plan(&server, 2)).await;
    let (id, _) = {
        let mut r = other.reader();
        other.tell(1);
        next(&mut *r).await
    };
    assert_eq!(next(&mut *b.bus.subscribe(Some(&id))).await.1, None, "an id of another deployment");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_no_hub_wrote_is_not_told() {
    let server = server().await;
    let hub = Hub::new(&server).await;
    let mut r = hub.reader();
    hub.tell(1);
    hub.tell(2);
    let (first, _) = next(&mut *r).await;
    assert_eq!(next(&mut *r).await.1, Some(2));
    let genuine = stream(&server).await.pop().unwrap().1;
    let mut forged = genuine.clone();
    *forged.last_mut().unwrap() ^= 1;
    let key = key(1);
    let add = async |fields: &[&[u8]]| {
        let mut words: Vec<&[u8]> = vec![b"XADD", key.as_bytes(), b"*"];
        words.extend(fields);
        let answer = command(&server, &words).await;
        assert!(answer.starts_with('$'), "{answer}");
    };
    add(&[b"e", &forged]).await;
    add(&[b"e", &genuine]).await;
    add(&[b"e", &genuine[32..]]).await;
    add(&[b"e", b""]).await;
    add(&[b"e", &[0xff; 100_000]]).await;
    add(&[b"x", &genuine]).await;
    add(&[b"\xff\xfe", b"\xff", b"e", &genuine]).await;
    // Another hub with other keys, in the same stream.
    let stranger = Hub::with(RedisPlan { key: [8; 32], ..plan(&server, 1) }).await;
    stranger.tell(66);
    let mut heard = stranger.reader();
    stranger.tell(67);
    while next(&mut *heard).await.1 != Some(67) {}
    hub.tell(3);
    assert_eq!(next(&mut *r).await.1, Some(3), "nothing between, and no reset");
    let mut again = hub.bus.subscribe(Some(&first));
    assert_eq!(numbers(&mut *again, 2).await, some([2, 3]), "nor for who comes back");
    // A hub that reads all of it from the beginning sees the same.
    let later = Hub::new(&server).await;
    let mut again = later.bus.subscribe(Some(&first));
    assert_eq!(numbers(&mut *again, 2).await, some([2, 3]));
}

/// An old entry that is put in again after it and its time were forgotten.
#[tokio::test(flavor = "multi_thread")]
async fn an_old_entry_is_no_news() {
    let server = server().await;
    let clock = Arc::new(contract::HandClock::default());
    let of = || RedisPlan { clock: clock.clone(), ..plan(&server, 1) };
    let before = Hub::with(of()).await;
    let mut r = before.reader();
    before.tell(1);
    next(&mut *r).await;
    let genuine = stream(&server).await.pop().unwrap().1;
    drop(r);
    before.stop().await;
    command(&server, &[b"FLUSHALL"]).await;
    clock.advance(Duration::from_secs(600 + 301));
    let hub = Hub::with(of()).await;
    let mut r = hub.reader();
    command(&server, &[b"XADD", key(1).as_bytes(), b"*", b"e", &genuine]).await;
    hub.tell(2);
    assert_eq!(next(&mut *r).await.1, Some(2));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hole_in_what_a_hub_told_is_a_reset() {
    let server = server().await;
    let (a, b) = (Hub::new(&server).await, Hub::new(&server).await);
    let (mut at_a, mut at_b) = (a.reader(), b.reader());
    (1..=5).for_each(|n| a.tell(n));
    assert_eq!(numbers(&mut *at_a, 5).await, some(1..=5));
    let (first, _) = next(&mut *at_b).await;
    assert_eq!(numbers(&mut *at_b, 4).await, some(2..=5));
    let places = stream(&server).await;
    let third = &places[places.len() - 3].0;
    command(&server, &[b"XDEL", key(1).as_bytes(), third.as_bytes()]).await;
    assert_eq!(numbers(&mut *b.bus.subscribe(Some(&first)), 4).await, some(2..=5), "who has read it keeps it");
    let later = Hub::new(&server).await;
    assert_eq!(next(&mut *later.bus.subscribe(Some(&first))).await.1, None, "nobody goes on across the hole");
}

#[tokio::test(flavor = "multi_thread")]
async fn cut_connections_are_not_noticed() {
    let server = server().await;
    let (a, b) = (Hub::new(&server).await, Hub::new(&server).await);
    let (mut at_a, mut at_b) = (a.reader(), b.reader());
    for n in 1..=50 {
        a.tell(n);
    }
    command(&server, &[b"CLIENT", b"KILL", b"TYPE", b"normal"]).await;
    for n in 51..=100 {
        a.tell(n);
    }
    assert_eq!(numbers(&mut *at_a, 100).await, some(1..=100));
    assert_eq!(numbers(&mut *at_b, 100).await, some(1..=100), "none lost, none twice, no reset");
}

#[tokio::test(flavor = "multi_thread")]
async fn readers_of_a_hub_hear_it_while_redis_is_away() {
    let server = server().await;
    let (a, b) = (Hub::new(&server).await, Hub::new(&server).await);
    let (mut at_a, mut at_b) = (a.reader(), b.reader());
    a.tell(1);
    assert_eq!((next(&mut *at_a).await.1, next(&mut *at_b).await.1), (Some(1), Some(1)));
    let before = at_a.position().unwrap();
    to(&server, Server::crash).await;
    (2..=20).for_each(|n| a.tell(n));
    b.tell(100);
    assert_eq!(numbers(&mut *at_a, 19).await, some(2..=20), "no reset yet: nothing that could be known is missing");
    assert_eq!(next(&mut *at_b).await.1, Some(100), "each hub its own");
    let adrift = at_a.position().unwrap();
    a.tell(21);
    assert_eq!(next(&mut *a.bus.subscribe(Some(&adrift))).await.1, Some(21), "who comes back to the hub it was at goes on");
    assert_eq!(next(&mut *b.bus.subscribe(Some(&adrift))).await.1, None);
    to(&server, Server::again).await;
    until_reset(&mut *at_a).await;
    until_reset(&mut *at_b).await;
    assert!(a.bus.connected(PATIENCE).await && b.bus.connected(PATIENCE).await);
    for old in [&before, &adrift] {
        assert_eq!(next(&mut *a.bus.subscribe(Some(old))).await.1, None, "and so do those who come back");
    }
    // Later words of a gap may still be on their way.
    b.tell(200);
    while next(&mut *at_a).await.1 != Some(200) {}
    while next(&mut *at_b).await.1 != Some(200) {}
    a.tell(22);
    assert_eq!((next(&mut *at_a).await.1, next(&mut *at_b).await.1), (Some(22), Some(22)));
}

/// One hub was cut off, the other was not.
#[tokio::test(flavor = "multi_thread")]
async fn what_others_did_not_hear_is_a_reset_for_them() {
    let server = Arc::new(blocking(Server::start).await);
    let wall = Wall::before(&server).await;
    let a = Hub::with(RedisPlan { url: RedisUrl::parse(&wall.url()).unwrap(), ..plan(&server, 1) }).await;
    let b = Hub::new(&server).await;
    let (mut at_a, mut at_b) = (a.reader(), b.reader());
    a.tell(1);
    assert_eq!((next(&mut *at_a).await.1, next(&mut *at_b).await.1), (Some(1), Some(1)));
    let id = at_b.position().unwrap();
    wall.close().await;
    a.tell(2);
    assert_eq!(next(&mut *at_a).await.1, Some(2));
    b.tell(50);
    assert_eq!(next(&mut *at_b).await.1, Some(50));
    wall.open();
    until_reset(&mut *at_a).await;
    until_reset(&mut *at_b).await;
    let later = Hub::new(&server).await;
    assert_eq!(next(&mut *later.bus.subscribe(Some(&id))).await.1, None, "nobody resumes across it, wherever");
    a.tell(3);
    while next(&mut *at_a).await.1 != Some(3) {}
    while next(&mut *at_b).await.1 != Some(3) {}
}

/// Stands before a server and lets connections through, or not.
struct Wall {
    port: u16,
    open: tokio::sync::watch::Sender<bool>,
    _tasks: Tasks,
}
impl Wall {
    async fn before(server: &Server) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (port, behind) = (listener.local_addr().unwrap().port(), server.port());
        let (open, is_open) = tokio::sync::watch::channel(true);
        let tasks = Tasks::new();
        let each = tasks.clone();
        tasks.spawn("wall", async move {
            while let Ok((mut near, _)) = listener.accept().await {
                let mut is_open = is_open.clone();
                each.spawn("through", async move {
                    if !*is_open.borrow() {
                        return;
                    }
                    let mut far = tokio::net::TcpStream::connect(("127.0.0.1", behind)).await.unwrap();
                    tokio::select! {
                        _ = tokio::io::copy_bidirectional(&mut near, &mut far) => {}
                        _ = is_open.wait_for(|open| !open) => {}
                    }
                });
            }
        });
        Self { port, open, _tasks: tasks }
    }
    fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }
    /// Nothing passes any more once this returns.
    async fn close(&self) {
        self.open.send_replace(false);
        let cut = async {
            // The one that is left accepts.
            while self.open.receiver_count() > 1 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::time::timeout(PATIENCE, cut).await.expect("all connections are cut");
    }
    fn open(&self) {
        self.open.send_replace(true);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flushed_redis_is_a_reset_for_all() {
    let server = server().await;
    let (a, b) = (Hub::new(&server).await, Hub::new(&server).await);
    let (mut at_a, mut at_b) = (a.reader(), b.reader());
    (1..=3).for_each(|n| a.tell(n));
    assert_eq!(numbers(&mut *at_a, 3).await, some(1..=3));
    let (id, _) = next(&mut *at_b).await;
    assert_eq!(numbers(&mut *at_b, 2).await, some(2..=3));
    command(&server, &[b"FLUSHALL"]).await;
    until_reset(&mut *at_a).await;
    until_reset(&mut *at_b).await;
    a.tell(4);
    assert_eq!((next(&mut *at_a).await.1, next(&mut *at_b).await.1), (Some(4), Some(4)));
    let later = Hub::new(&server).await;
    for hub in [&a, &b, &later] {
        assert_eq!(next(&mut *hub.bus.subscribe(Some(&id))).await.1, None);
    }
    // Flushed while everybody tells.
    for n in 5..=500 {
        a.tell(n);
        if n == 100 {
            command(&server, &[b"FLUSHALL"]).await;
        }
    }
    let (mut missed, mut last, mut told) = (false, 4, 500);
    while last <= 500 {
        // Until one comes through; those that did not are a reset.
        let Ok((_, got)) = tokio::time::timeout(Duration::from_millis(100), next(&mut *at_b)).await else {
            told += 1;
            assert!(told < 1000, "nothing comes through any more");
            a.tell(told);
            continue;
        };
        match got {
            None => missed = true,
            Some(n) => {
                assert!(n == last + 1 || missed, "{n} after {last} without a reset");
                (last, missed) = (n, false);
            }
        }
    }
}

/// A server that takes everything and answers nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_hanging_redis_holds_nobody() {
    let server = server().await;
    let hub = Hub::new(&server).await;
    let mut r = hub.reader();
    hub.tell(0);
    assert_eq!(next(&mut *r).await.1, Some(0));
    to(&server, Server::freeze).await;
    // Far more than the queue and the ring hold; one that waited would wait for ever.
    let all = 50_000;
    (1..=all).for_each(|n| hub.tell(n));
    assert_eq!(next(&mut *r).await.1, None, "too slow a reader is told so, as ever");
    hub.tell(all + 1);
    assert_eq!(next(&mut *r).await.1, Some(all + 1), "and hears its own hub");
    to(&server, Server::thaw).await;
    until_reset(&mut *r).await;
    assert!(hub.bus.connected(PATIENCE).await);
    let other = Hub::new(&server).await;
    let mut there = other.reader();
    comes_through(&hub, &mut *there).await;
}
/// Tells until a reader elsewhere hears it.
async fn comes_through(hub: &Hub, r: &mut dyn Receiver) {
    for n in 1_000_000..1_000_400 {
        hub.tell(n);
        if let Ok(heard) = tokio::time::timeout(Duration::from_millis(100), next(r)).await
            && heard.1.is_some_and(|n| n >= 1_000_000)
        {
            return;
        }
    }
    panic!("nothing comes through any more");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hub_starts_without_redis_and_finds_it_later() {
    let server = server().await;
    to(&server, Server::crash).await;
    let tasks = Tasks::new();
    let bus = RedisBus::start(plan(&server, 1), &tasks);
    let mut r = bus.subscribe(None);
    let mut returned = bus.subscribe(Some(&EventId::new("1a0c4506c00-c-0001020304050607")));
    bus.publish(event(1));
    assert_eq!(next(&mut *r).await.1, Some(1));
    assert_eq!(next(&mut *returned).await.1, None);
    to(&server, Server::again).await;
    assert!(bus.connected(PATIENCE).await);
    until_reset(&mut *r).await;
    bus.publish(event(2));
    assert_eq!(next(&mut *r).await.1, Some(2));
    assert_eq!(tasks.end(PATIENCE).await, Ended::Clean);
}

/// What was told just before a stop is there for the others.
#[tokio::test(flavor = "multi_thread")]
async fn the_last_words_of_a_hub_are_written() {
    let server = server().await;
    // Fewer than are kept: a reader that lags behind those is sent to the newest, past the last word.
    let kept = || RedisPlan { keep: 3000, ..plan(&server, 1) };
    let (a, b) = (Hub::with(kept()).await, Hub::with(kept()).await);
    let mut r = b.reader();
    (1..=2000).for_each(|n| a.tell(n));
    a.stop().await;
    assert_eq!(numbers(&mut *r, 2000).await, some(1..=2000));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_password_is_used_and_a_wrong_one_only_delays() {
    let server = Arc::new(blocking(|| Server::start_with(&["--requirepass", "geheim"])).await);
    let url = |p: &str| RedisUrl::parse(&format!("redis://{p}@127.0.0.1:{}/2", server.port())).unwrap();
    // The account that the manual names.
    let account = "ACL SETUSER hub on >wort ~cortex:* +xadd +xrange +xrevrange +xread +xtrim +expire +select";
    let made = server.clone();
    let answer = blocking(move || {
        let words: Vec<&[u8]> = account.split(' ').map(str::as_bytes).collect();
        made.commands(&[&[b"AUTH", b"geheim"], &words])
    });
    assert_eq!(answer.await, "+OK");
    let clock = Arc::new(contract::HandClock::default());
    let hub = Hub::with(RedisPlan { url: url("hub:wort"), clock: clock.clone(), ..plan(&server, 1) }).await;
    let mut r = hub.reader();
    hub.tell(1);
    assert_eq!(next(&mut *r).await.1, Some(1));
    // Time to let go of old entries, which the account may do as well.
    clock.advance(Duration::from_secs(11));
    (2..=20).for_each(|n| hub.tell(n));
    assert_eq!(numbers(&mut *r, 19).await, some(2..=20));
    let tasks = Tasks::new();
    let wrong = RedisBus::start(RedisPlan { url: url(":wrong"), ..plan(&server, 1) }, &tasks);
    let mut r = wrong.subscribe(None);
    wrong.publish(event(2));
    assert_eq!(next(&mut *r).await.1, Some(2), "told here alone");
    assert!(!wrong.connected(Duration::ZERO).await);
}

//! Links between nodes and the hub: ordered streams that are slow, cut, or silent.

use crate::world::{World, lock};
use hub_engine::records::OutputFrame;
use mesh_process::CancellationToken;
use mesh_wire::node::{Envelope, PayloadChunk, PayloadRequest, ResultAck, node_frame};
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::oracle::Key;

/// Messages under way in one direction.
const UNDER_WAY: usize = 65_536;

pub struct Hello {
    pub spool: mesh_core::SpoolId,
    pub attempts: Vec<Key>,
    pub max_tasks: u32,
    pub closed: Option<mesh_core::ceiling::Closed>,
    /// Of the newest welcome that its machine has had.
    pub last_session: Vec<u8>,
}

/// Both streams of a link, from the node …
pub enum ToHub {
    Frame(node_frame::Kind),
    Output(Key, OutputFrame),
    Pull(PayloadRequest),
}

/// … and from the hub.
pub enum ToNode {
    Welcome { link_session: [u8; 16], hub_time_ms: i64, marks: Vec<(Key, u64)> },
    Heartbeat,
    Envelope(Envelope),
    ResultAck(ResultAck),
    OutputAck(Key, u64),
    Payload(PayloadChunk),
    Goodbye(&'static str),
}

/// What came of a dial: a link, its session, the hub's time, and what it has of each output.
pub type Dialed = Result<(NodeEnd, [u8; 16], i64, Vec<(Key, u64)>), &'static str>;

/// One connection.
pub struct Wire {
    world: Arc<World>,
    pub node: usize,
    pub no: u64,
    /// Within one process: nothing is slow or lost there.
    direct: bool,
    /// What is under way to the hub, or to the node, never arrives.
    pub lost_up: AtomicBool,
    pub lost_down: AtomicBool,
    /// A side has been told by its network that the connection is gone.
    pub reset_hub: CancellationToken,
    pub reset_node: CancellationToken,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Way {
    Up,
    Down,
}

pub struct Sender<T> {
    wire: Arc<Wire>,
    way: Way,
    out: mpsc::Sender<(Instant, Option<T>)>,
    /// Nothing overtakes.
    last: Arc<Mutex<Instant>>,
}

pub struct Receiver<T> {
    wire: Arc<Wire>,
    way: Way,
    queue: mpsc::Receiver<(Instant, Option<T>)>,
    next: Option<(Instant, Option<T>)>,
}

/// One side's hold on a connection; dropped, the other side reads the end of the stream.
pub struct End<S, R> {
    pub wire: Arc<Wire>,
    pub send: Sender<S>,
    pub receive: Receiver<R>,
}

pub type NodeEnd = End<ToHub, ToNode>;
pub type HubEnd = End<ToNode, ToHub>;

impl Wire {
    pub fn make<S, R>(world: &Arc<World>, node: usize, no: u64) -> (End<S, R>, End<R, S>) {
        Self::ends(world, node, no, false)
    }
    pub fn direct<S, R>(world: &Arc<World>, node: usize, no: u64) -> (End<S, R>, End<R, S>) {
        Self::ends(world, node, no, true)
    }
    fn ends<S, R>(world: &Arc<World>, node: usize, no: u64, direct: bool) -> (End<S, R>, End<R, S>) {
        let wire = Arc::new(Self {
            direct,
            world: world.clone(),
            node,
            no,
            lost_up: AtomicBool::new(false),
            lost_down: AtomicBool::new(false),
            reset_hub: CancellationToken::new(),
            reset_node: CancellationToken::new(),
        });
        let (up, from_node) = pipe(&wire, Way::Up);
        let (down, from_hub) = pipe(&wire, Way::Down);
        (End { wire: wire.clone(), send: up, receive: from_hub }, End { wire, send: down, receive: from_node })
    }
    /// Cut: what is under way is gone, and each side hears of it when its network says so.
    pub fn cut(&self, tell_node: Option<Duration>, tell_hub: Option<Duration>) {
        self.lost_up.store(true, Ordering::SeqCst);
        self.lost_down.store(true, Ordering::SeqCst);
        for (token, after) in [(&self.reset_node, tell_node), (&self.reset_hub, tell_hub)] {
            let Some(after) = after else { continue };
            let token = token.clone();
            self.world.tasks.spawn_until_cancelled("reset", async move {
                tokio::time::sleep(after).await;
                token.cancel();
            });
        }
    }
    fn lost(&self, way: Way) -> bool {
        match way {
            Way::Up => self.lost_up.load(Ordering::SeqCst),
            Way::Down => self.lost_down.load(Ordering::SeqCst),
        }
    }
}

fn pipe<T>(wire: &Arc<Wire>, way: Way) -> (Sender<T>, Receiver<T>) {
    let (out, queue) = mpsc::channel(UNDER_WAY);
    let last = Arc::new(Mutex::new(Instant::now()));
    (Sender { wire: wire.clone(), way, out, last }, Receiver { wire: wire.clone(), way, queue, next: None })
}

impl<T> Sender<T> {
    pub fn send(&self, message: T) -> bool {
        self.put(Some(message))
    }
    fn put(&self, message: Option<T>) -> bool {
        if self.wire.lost(self.way) {
            // The local network takes it all the same.
            return true;
        }
        let world = &self.wire.world;
        let slow = lock(&world.slow_links).contains(&self.wire.node);
        let ms = match self.wire.direct {
            true => 0,
            false => world.rng(|r| if slow { r.between(200, 3000) } else { r.between(0, 20) }),
        };
        let mut last = lock(&self.last);
        *last = (*last).max(Instant::now() + Duration::from_millis(ms));
        self.out.try_send((*last, message)).is_ok()
    }
}

impl<T> Drop for Sender<T> {
    fn drop(&mut self) {
        if self.out.strong_count() == 1 {
            self.put(None);
        }
    }
}

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Self {
        Self { wire: self.wire.clone(), way: self.way, out: self.out.clone(), last: self.last.clone() }
    }
}

impl<T> Receiver<T> {
    /// The next message; none at the end of the stream. Nothing is lost when the wait is given up.
    pub async fn receive(&mut self) -> Option<T> {
        loop {
            if self.next.is_none() {
                match self.queue.recv().await {
                    Some(next) => self.next = Some(next),
                    // A stream that lost its end: silence alone tells.
                    None => std::future::pending().await,
                }
            }
            let at = self.next.as_ref().map_or_else(Instant::now, |n| n.0);
            tokio::time::sleep_until(at).await;
            let apart = if self.wire.direct { None } else { self.wire.world.partitioned_until(self.wire.node) };
            if let Some(until) = apart {
                tokio::time::sleep_until(until).await;
                continue;
            }
            let next = self.next.take();
            if self.wire.lost(self.way) {
                continue;
            }
            return next.and_then(|n| n.1);
        }
    }
}

//! One life of the hub: the real engine on the simulated store, and the link's conversation as the hub's
//! link holds it.

use crate::carry::{self, Port};
use crate::net::{HubEnd, ToHub, ToNode};
use crate::oracle::Key;
use crate::plan::{Break, Fault, Point};
use crate::store::{Life, SimStore};
use crate::world::{SimClock, World};
use hub::link::envelope::Sealer;
use hub_engine::delivery::{Delivery, Presence, Reported};
use hub_engine::events::Events;
use hub_engine::idempotency::Idempotency;
use hub_engine::links::{LINK_QUEUE, LinkCommand, Links, Order};
use hub_engine::manage::Management;
use hub_engine::nodes::{Lifetimes, Nodes};
use hub_engine::pool::{Pool, Queue};
use hub_engine::ports::{Keyring, NodeDirectory, Stored};
use hub_engine::records::OutputFrame;
use hub_engine::rights::Rights;
use hub_engine::sessions::Sessions;
use hub_engine::tasks::TaskService;
use hub_engine::watch::Watchers;
use hub_testkit::MemoryStore;
use mesh_core::ceiling::Closed;
use mesh_core::permission::Caller;
use mesh_core::seal::{self, Intent};
use mesh_core::task::{AttemptNo, Outcome};
use mesh_core::{Digest, HubId, LoginId, NodeId, TaskId, UnixMs, UserId};
use mesh_process::{CancellationToken, Clock, Tasks};
use mesh_wire::limits::{HEARTBEAT_SECS, ORDERS_PER_ENVELOPE, PAYLOAD_CHUNK_BYTES, SILENCE_SECS};
use mesh_wire::node::{Envelope, OrdersBody, PayloadChunk, PayloadRequest, ResultAck, node_frame};
use prost::Message;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::sync::mpsc;

pub const POLICY: Digest = [9; 32];
const SILENCE: Duration = Duration::from_secs(SILENCE_SECS);
const TOGETHER: usize = 64;
const REPORTS: usize = 2048;
const REPORTS_AT_ONCE: usize = 256;

/// Keys that sign and seal truly.
pub struct SimKeys(ed25519_dalek::SigningKey);

impl Default for SimKeys {
    fn default() -> Self {
        Self(ed25519_dalek::SigningKey::from_bytes(&[7; 32]))
    }
}

impl SimKeys {
    pub fn hub() -> HubId {
        HubId::from_bytes([1; 16])
    }
    pub fn public(&self) -> [u8; 32] {
        self.0.verifying_key().to_bytes()
    }
}

impl Keyring for SimKeys {
    fn sign(&self, kind: &str, body: &[u8]) -> (String, [u8; 64]) {
        (self.key_id(), seal::sign(&self.0, kind, body))
    }
    fn key_id(&self) -> String {
        seal::key_id(&self.public())
    }
    fn seal(&self, intent: &Intent) -> Digest {
        intent.seal(&[8; 32])
    }
    fn is_sealed(&self, intent: &Intent, seal: &Digest) -> bool {
        intent.is_sealed_by(&[8; 32], seal)
    }
    fn token_mac(&self, token: &str) -> Digest {
        mesh_core::sha256(token.as_bytes())
    }
    fn issue_access(&self, _: UserId, _: LoginId, _: UnixMs, _: UnixMs) -> String {
        String::new()
    }
    fn read_access(&self, _: &str, _: UnixMs) -> Option<(UserId, LoginId)> {
        None
    }
    fn issue_certificate(&self, _: NodeId, _: &[u8], _: UnixMs, _: UnixMs, _: &[Digest]) -> Stored<Vec<u8>> {
        Ok(vec![])
    }
}

pub struct Hub {
    pub life: Arc<Life>,
    world: Arc<World>,
    pub store: SimStore,
    keys: Arc<dyn Keyring>,
    pub clock: Arc<SimClock>,
    pub links: Arc<Links>,
    pub pool: Arc<Pool>,
    pub delivery: Arc<Delivery>,
    pub manage: Arc<Management>,
    pub tasks: Arc<TaskService>,
    pub idempotency: Idempotency,
    ready: AtomicBool,
    port: OnceLock<Port>,
}

impl Hub {
    /// The parts of `cortex-hub` that matter here, wired as it wires them.
    pub fn new(world: &Arc<World>, disk: &Arc<MemoryStore>, no: u64, incarnation: u32) -> Arc<Self> {
        let life = Arc::new(Life { no, dead: AtomicBool::new(false), tasks: Tasks::new() });
        let store = SimStore { disk: disk.clone(), world: world.clone(), life: life.clone(), writer: Arc::default() };
        let (clock, keys) = (world.clock(), world.keys());
        let port = Arc::new(store.clone());
        let events = Events::local(Duration::from_secs(60), clock.clone());
        let (links, watchers) = (Arc::new(Links::telling(events.clone())), Watchers::default());
        let nodes = Arc::new(Nodes {
            hub: world.hub_identity().0,
            store: port.clone(),
            keyring: keys.clone(),
            links: links.clone(),
            events: events.clone(),
            history: Default::default(),
            recoveries: Default::default(),
            clock: clock.clone(),
            lifetimes: Lifetimes { certificate_ms: 86_400_000, invite_secs: 3600 },
        });
        let pool = Arc::new(Pool {
            journal: port.clone(),
            sessions: disk.clone(),
            accounts: disk.clone(),
            rights: Arc::new(Rights::new(disk.clone(), disk.clone(), clock.clone())),
            keyring: keys.clone(),
            links: links.clone(),
            watchers: watchers.clone(),
            events: events.clone(),
            clock: clock.clone(),
            incarnation,
            policy: POLICY,
            queue: Queue::default(),
        });
        let sessions = Arc::new(Sessions {
            store: disk.clone(),
            nodes: nodes.clone(),
            pool: pool.clone(),
            events,
            clock: clock.clone(),
            session_hours: 24,
        });
        let delivery = Arc::new(Delivery {
            journal: port.clone(),
            output: port.clone(),
            nodes: port.clone(),
            links: links.clone(),
            pool: pool.clone(),
            clock: clock.clone(),
            output_bytes: 1 << 20,
        });
        let work = life.tasks.clone();
        let manage = Arc::new(Management {
            nodes: nodes.clone(),
            journal: port.clone(),
            pool: pool.clone(),
            work: work.clone(),
            seen: Default::default(),
        });
        let tasks = Arc::new(TaskService {
            journal: port.clone(),
            output: port.clone(),
            keyring: keys.clone(),
            nodes,
            sessions,
            links: links.clone(),
            pool: pool.clone(),
            watchers,
            clock: clock.clone(),
            work,
            stop: CancellationToken::new(),
        });
        let idempotency = Idempotency { store: port, clock: clock.clone() };
        let (world, ready, port) = (world.clone(), AtomicBool::new(false), OnceLock::new());
        Arc::new(Self { life, world, store, keys, clock, links, pool, delivery, manage, tasks, idempotency, ready, port })
    }

    /// Takes up what the journal holds, and then serves. A start that fails ends the process.
    pub fn start(self: &Arc<Self>) {
        let hub = self.clone();
        self.life.tasks.spawn_until_cancelled("start", async move {
            hub.world.pause(10, 200).await;
            let recovered = async {
                hub.pool.recover().await?;
                hub.manage.recover().await
            };
            if let Err(error) = recovered.await {
                hub.world.note(format_args!("hub {} cannot start: {error}", hub.life.no));
                return hub.life.kill(&hub.world);
            }
            if let Some(c) = &hub.world.carrier {
                let _ = hub.port.set(carry::serve(&hub, c.keys.clone()).await);
            }
            hub.ready.store(true, Ordering::SeqCst);
            hub.world.note(format_args!("hub {} is ready", hub.life.no));
            let (pool, manage) = (hub.pool.clone(), hub.manage.clone());
            hub.life.tasks.spawn_until_cancelled("pool", async move { pool.run().await });
            hub.life.tasks.spawn_until_cancelled("registry", async move { manage.run().await });
        });
    }
    pub fn port(&self) -> Option<&Port> {
        self.port.get()
    }
    pub fn serves(&self) -> bool {
        self.ready.load(Ordering::SeqCst) && !self.life.dead()
    }

    /// A node has connected: its conversation, until either side ends it.
    pub fn accept(self: &Arc<Self>, end: HubEnd, node: NodeId, hello: crate::net::Hello) {
        let hub = self.clone();
        self.life.tasks.spawn_until_cancelled("link", async move {
            let (no, to_node) = (end.wire.no, end.send.clone());
            let code = hub.converse(end, node, hello).await;
            hub.world.note(format_args!("link {no} ended by the hub: {code}"));
            to_node.send(ToNode::Goodbye(code));
        });
    }

    async fn converse(self: &Arc<Self>, end: HubEnd, node: NodeId, hello: crate::net::Hello) -> &'static str {
        let row = match self.store.node(node).await {
            Ok(Some(row)) if row.revoked_at.is_none() => row,
            Ok(_) => return "revoked",
            Err(_) => return "unavailable",
        };
        let (commands, mut queue) = mpsc::channel(LINK_QUEUE);
        // A hello that names just what the hub holds leaves nothing to reconcile.
        let skip = self.world.is(Break::SkipReconcile);
        let attempts = if skip { self.links.held(node) } else { hello.attempts };
        // Machines with one identity are told apart elsewhere: here all are the same one.
        let named = hello.last_session;
        self.links.copies().judge(node, &named, false, self.clock.steady());
        let hello =
            hub_engine::delivery::Hello { spool: hello.spool, max_tasks: hello.max_tasks, keeps: 0, closed: hello.closed, attempts };
        let hub = self.clone();
        let opening = async move { hub.delivery.open_link(&row, hello, commands).await };
        let opened = match self.life.tasks.complete("link open", opening).await {
            Some(Ok(opened)) => opened,
            Some(Err(e)) if e.to_string().contains("revoked") => return "revoked",
            _ => return "unavailable",
        };
        let mut first = vec![];
        if skip || self.world.is(Break::DropResend) {
            while let Ok(c) = queue.try_recv() {
                first.extend(Some(c).filter(|c| !skip && !matches!(c, LinkCommand::Order(_))));
            }
        }
        let link_session: [u8; 16] = self.world.rng(|r| r.bytes());
        self.links.copies().linked(node, &named, &link_session);
        let marks = opened.marks.iter().map(|(t, a, seq)| ((*t, *a), *seq)).collect();
        let generation = opened.generation;
        self.world.note(format_args!("link {} is generation {generation} of node {}", end.wire.no, end.wire.node));
        end.send.send(ToNode::Welcome { link_session, hub_time_ms: self.clock.anchored_ms(), marks });
        let HubEnd { wire, send, mut receive } = end;
        let (reports, report_queue) = mpsc::channel(REPORTS);
        let (output, output_queue) = mpsc::channel(TOGETHER * 64);
        let group = &self.life.tasks;
        let data_ended = CancellationToken::new();
        let (hub, to_node, ended) = (self.clone(), send.clone(), data_ended.clone());
        group.spawn_until_cancelled("link worker", async move { hub.carry(node, generation, report_queue).await });
        let hub = self.clone();
        group.spawn_until_cancelled("link data", async move {
            hub.keep(node, generation, output_queue, &to_node).await;
            ended.cancel();
        });
        let late = output.clone();
        let mut talk = Talk {
            hub: self.clone(),
            node,
            generation,
            _presence: opened.presence,
            send,
            reports,
            output,
            link_session,
            seq: 0,
            key: self.world.node_key(wire.node),
        };
        for command in first {
            talk.pass(vec![command]);
        }
        let code = tokio::select! {
            biased;
            () = opened.cut.cancelled() => "revoked",
            () = wire.reset_hub.cancelled() => "broken",
            () = data_ended.cancelled() => "data stream ended",
            code = talk.run(&mut receive, queue) => code,
        };
        // The second stream is one of its own: what still comes there meets the fence.
        group.spawn_until_cancelled("late data", async move {
            let read = async {
                while let Some(message) = receive.receive().await {
                    let full = match message {
                        ToHub::Output(key, frame) => late.try_send(Data::Output(key, frame)).is_err(),
                        ToHub::Pull(p) => late.try_send(Data::Pull(p)).is_err(),
                        ToHub::Frame(_) => false,
                    };
                    if full {
                        return;
                    }
                }
            };
            let _ = tokio::time::timeout(SILENCE, read).await;
        });
        code
    }

    /// What counts as the node's word: that of the link that is in place.
    fn caller(&self, node: NodeId, generation: u64) -> (Caller, bool) {
        let stale = !self.links.is_current(node, generation);
        let shown = match self.links.get(node) {
            Some(link) if self.world.is(Break::SkipFence) => link.generation,
            _ => generation,
        };
        (Caller::Node { node, generation: shown }, stale)
    }
    fn heard<T>(&self, stale: bool, said: &hub_engine::Result<T>) {
        if stale {
            self.world.count("stale words");
            if said.is_ok() {
                self.world.violated("superseded_changes_nothing", "the word of an older link was taken");
            }
        }
    }

    async fn carry(&self, node: NodeId, generation: u64, mut queue: mpsc::Receiver<node_frame::Kind>) {
        let mut round = vec![];
        while queue.recv_many(&mut round, REPORTS_AT_ONCE).await > 0 {
            let reports = round.drain(..).map(|kind| async move {
                let (caller, stale) = self.caller(node, generation);
                let said = match kind {
                    node_frame::Kind::Started(s) => {
                        let Ok(task) = s.task_id.parse() else { return Ok(()) };
                        self.delivery.started(&caller, task, AttemptNo(s.attempt)).await
                    }
                    node_frame::Kind::Result(r) => {
                        let (Ok(task), Some(Ok(outcome))) = (r.task_id.parse(), r.outcome.as_ref().map(Outcome::try_from)) else {
                            self.world.violated("no_panic", "a node reports what cannot be read");
                            return Ok(());
                        };
                        let last_seq = if self.world.is(Break::ResultBeforeOutput) { 0 } else { r.last_seq };
                        let reported = Reported {
                            task,
                            attempt: AttemptNo(r.attempt),
                            outcome,
                            last_seq,
                            result: None,
                            sandbox_applied: Some(r.sandbox_applied),
                            digests: None,
                        };
                        self.delivery.result(&caller, reported).await
                    }
                    _ => return Ok(()),
                };
                self.heard(stale, &said);
                said
            });
            for error in futures::future::join_all(reports).await.into_iter().filter_map(Result::err) {
                self.world.note(format_args!("a report of {node} was not recorded: {error}"));
                if self.links.is_current(node, generation) {
                    let close = LinkCommand::Close { code: "not_recorded", detail: String::new() };
                    self.links.send(node, close);
                }
            }
        }
    }

    async fn keep(&self, node: NodeId, generation: u64, mut queue: mpsc::Receiver<Data>, to_node: &crate::net::Sender<ToNode>) {
        let mut round = vec![];
        while queue.recv_many(&mut round, TOGETHER).await > 0 {
            let mut attempts: BTreeMap<Key, Vec<OutputFrame>> = BTreeMap::new();
            for data in round.drain(..) {
                match data {
                    Data::Output(key, frame) => attempts.entry(key).or_default().push(frame),
                    Data::Pull(p) => self.payload(node, generation, p, to_node).await,
                }
            }
            let appends = attempts.into_iter().map(|(key, frames)| async move {
                let (caller, stale) = self.caller(node, generation);
                let said = self.delivery.append(&caller, key.0, key.1, frames).await;
                self.heard(stale, &said);
                (key, said)
            });
            for (key, said) in futures::future::join_all(appends).await {
                match said {
                    Ok(Some(durable)) => drop(to_node.send(ToNode::OutputAck(key, durable))),
                    Ok(None) => return self.world.note(format_args!("output of {} has a gap", key.0)),
                    Err(error) => return self.world.note(format_args!("output was not kept: {error}")),
                }
            }
        }
    }

    async fn payload(&self, node: NodeId, generation: u64, p: PayloadRequest, to_node: &crate::net::Sender<ToNode>) {
        let Ok(task) = p.task_id.parse::<TaskId>() else { return };
        let chunk = |data: bytes::Bytes, last: bool, refused: String| PayloadChunk {
            sha256: p.sha256.clone(),
            data,
            last,
            refused,
            task_id: p.task_id.clone(),
            attempt: p.attempt,
        };
        let (caller, stale) = self.caller(node, generation);
        let said = self.delivery.payload(&caller, task, AttemptNo(p.attempt), &p.sha256).await;
        self.heard(stale, &said);
        match said {
            Ok(bytes) => {
                let mut bytes = bytes::Bytes::from(bytes);
                loop {
                    let piece = bytes.split_to(bytes.len().min(PAYLOAD_CHUNK_BYTES));
                    let last = bytes.is_empty();
                    to_node.send(ToNode::Payload(chunk(piece, last, String::new())));
                    if last {
                        return;
                    }
                }
            }
            Err(e) => drop(to_node.send(ToNode::Payload(chunk(bytes::Bytes::new(), true, e.to_string())))),
        }
    }
}

enum Data {
    Output(Key, OutputFrame),
    Pull(PayloadRequest),
}

struct Talk {
    hub: Arc<Hub>,
    node: NodeId,
    generation: u64,
    _presence: Presence,
    send: crate::net::Sender<ToNode>,
    reports: mpsc::Sender<node_frame::Kind>,
    output: mpsc::Sender<Data>,
    link_session: [u8; 16],
    seq: u64,
    key: Digest,
}

impl Talk {
    async fn run(&mut self, receive: &mut crate::net::Receiver<ToHub>, mut commands: mpsc::Receiver<LinkCommand>) -> &'static str {
        let silence = tokio::time::sleep(SILENCE);
        tokio::pin!(silence);
        let mut beat = tokio::time::interval(Duration::from_secs(HEARTBEAT_SECS));
        let mut batch = Vec::with_capacity(ORDERS_PER_ENVELOPE);
        loop {
            tokio::select! {
                biased;
                () = &mut silence => return "silent",
                _ = beat.tick() => drop(self.send.send(ToNode::Heartbeat)),
                n = commands.recv_many(&mut batch, ORDERS_PER_ENVELOPE) => {
                    if n == 0 {
                        return "overrun";
                    }
                    if let Some(code) = self.pass(std::mem::take(&mut batch)) {
                        return code;
                    }
                    self.hub.life.alive().await;
                }
                message = receive.receive() => {
                    silence.as_mut().reset(tokio::time::Instant::now() + SILENCE);
                    let full = match message {
                        None => return "closed",
                        Some(ToHub::Frame(node_frame::Kind::Heartbeat(_))) => false,
                        Some(ToHub::Frame(node_frame::Kind::Standing(s))) => {
                            let caller = Caller::Node { node: self.node, generation: self.generation };
                            let _ = self.hub.delivery.standing(&caller, s.max_tasks, Closed::parse(&s.closed));
                            false
                        }
                        Some(ToHub::Frame(kind)) => self.reports.try_send(kind).is_err(),
                        Some(ToHub::Output(key, frame)) => self.output.try_send(Data::Output(key, frame)).is_err(),
                        Some(ToHub::Pull(p)) => self.output.try_send(Data::Pull(p)).is_err(),
                    };
                    if full {
                        return "overrun";
                    }
                }
            }
        }
    }

    fn pass(&mut self, batch: Vec<LinkCommand>) -> Option<&'static str> {
        let (mut orders, mut cancels, mut acks, mut close) = (vec![], vec![], vec![], None);
        for command in batch {
            match command {
                LinkCommand::Order(o) => orders.push(*o),
                LinkCommand::Cancel { task, attempt } => cancels.push((task, attempt, false)),
                LinkCommand::Kill { task, attempt } => cancels.push((task, attempt, true)),
                LinkCommand::ResultAck { task, attempt } => acks.push((task, attempt)),
                LinkCommand::Input(_) => {}
                LinkCommand::Close { code, .. } => close = Some(code),
            }
        }
        if close.is_some() {
            return close;
        }
        let (world, keys) = (self.hub.world.clone(), self.hub.keys.clone());
        let ordered = !orders.is_empty();
        let stray = world.rng(|r| ordered && r.chance(6)).then(|| self.stray(&orders[0]));
        let mut sealer = Sealer {
            keyring: &*keys,
            hub: world.hub_identity().0,
            node: self.node,
            node_key: self.key,
            link_session: self.link_session,
            seq: self.seq,
            believed: vec![],
        };
        let mut envelopes = sealer.orders(orders);
        envelopes.extend(sealer.cancels(&cancels));
        if let Some(stray) = stray {
            world.fault(Fault::UngrantedOrder, stray.task);
            for sealed in sealer.orders(vec![stray]) {
                envelopes.push(ungranted(&*keys, sealed));
            }
        }
        self.seq = sealer.seq;
        for e in envelopes {
            self.send.send(ToNode::Envelope(e));
        }
        let acked = !acks.is_empty();
        for (task, attempt) in acks {
            self.send.send(ToNode::ResultAck(ResultAck { task_id: task.to_string(), attempt: attempt.0 }));
        }
        let dies = (ordered && world.dies_at(Point::HubOrderSent)) || (acked && world.dies_at(Point::HubResultAckSent));
        if dies {
            self.hub.life.kill(&world);
        }
        world.note(format_args!(
            "hub said to {} on generation {}: orders {ordered}, cancels {}, acks {acked}",
            self.node,
            self.generation,
            cancels.len()
        ));
        None
    }

    /// An attempt that a later version would assign ahead, and that nobody has granted.
    fn stray(&self, like: &Order) -> Order {
        let random = self.hub.world.rng(|r| r.bytes());
        Order { task: TaskId::from_parts(self.hub.clock.now_ms(), random), ..like.clone() }
    }
}

/// The same orders as a version would sign them that assigns ahead.
fn ungranted(keys: &dyn Keyring, sealed: Envelope) -> Envelope {
    let mut body = OrdersBody::decode(sealed.body.as_slice()).unwrap_or_default();
    body.orders.iter_mut().for_each(|o| o.granted = false);
    let body = body.encode_to_vec();
    let (key_id, signature) = keys.sign(&sealed.payload_type, &body);
    Envelope { body, key_id, signature: signature.to_vec(), ..sealed }
}

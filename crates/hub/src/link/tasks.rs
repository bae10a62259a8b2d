//! One node's task stream: heartbeats both ways, orders down, starts and results up.
//!
//! Two tasks serve a link. The *conversation* owns both directions and never waits on the store; the
//! *worker* carries what the node reports to the journal, in order, as many at once as there are.

use super::envelope::Sealer;
use super::wire::{HubFrames, bad_message, bundle, status};
use super::{LinkContext, Peer, ROOT_RETIRED};
use crate::keys::Authority;
use futures::{FutureExt, StreamExt};
use hub_engine::Error;
use hub_engine::delivery::{DIGEST_MISMATCH, Hello, Presence, Reported};
use hub_engine::input::Answer;
use hub_engine::links::{LINK_QUEUE, LinkCommand};
use hub_engine::ports::Keyring;
use hub_engine::records::Node;
use hub_engine::rotation::Phase;
use mesh_core::bundle::MOST as MOST_KEYS;
use mesh_core::ceiling::Closed;
use mesh_core::input::Fate;
use mesh_core::permission::Caller;
use mesh_core::task::{AttemptNo, Outcome};
use mesh_core::{TaskId, UnixMs, seal};
use mesh_process::{CancellationToken, entropy};
use mesh_wire::convert::{BadMessage, digests, id};
use mesh_wire::limits::{HEARTBEAT_SECS, ORDERS_PER_ENVELOPE, SILENCE_SECS, STOOD_STILL_MS};
use mesh_wire::node::{self as wire, hub_frame, node_frame};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

/// Frames between the conversation and the socket.
const OUT_QUEUE: usize = 64;
/// Reports between the conversation and the journal; a node cannot hold more attempts than this.
const REPORT_QUEUE: usize = 2048;
/// Reports that share a round to the journal.
const REPORTS_AT_ONCE: usize = 256;
/// The word by which a node knows that it is revoked.
const GOODBYE_REVOKED: &str = "revoked";
/// Bytes of results on that way; what goes beyond ends the link, and the node says it again on the next.
const REPORT_BYTES: usize = 32 << 20;
const LINK_SESSION_BYTES: usize = 16;
/// A node refuses a few envelopes and then drops the link itself.
const MOST_REJECTED: u32 = 100;
/// Nodes are asked for a new certificate one after the other, on average so far apart.
const RENEWALS_APART: Duration = Duration::from_millis(20);
const MAX_KEY_ID: usize = 64;
const HELLO_DEADLINE: Duration = Duration::from_secs(10);

/// Something a node reports about an attempt.
enum Report {
    Started(TaskId, AttemptNo),
    /// With those that have ended.
    Ready(TaskId, AttemptNo, Vec<(TaskId, AttemptNo)>),
    /// The trust bundle of this sequence is there.
    Bundle(u64),
    /// With its part of [`REPORT_BYTES`].
    Result(Box<Reported>, OwnedSemaphorePermit),
}

pub async fn open(context: Arc<LinkContext>, peer: Peer, node: Node, mut inbound: Streaming<wire::NodeFrame>) -> Result<HubFrames, Status> {
    let first = tokio::time::timeout(HELLO_DEADLINE, inbound.message()).await.map_err(|_| Status::deadline_exceeded("no hello came"))??;
    let Some(wire::NodeFrame { kind: Some(node_frame::Kind::Hello(hello)) }) = first else {
        return Err(Status::failed_precondition("the first frame is a hello"));
    };
    let named = hello.last_link_session.clone();
    if named.len() > LINK_SESSION_BYTES {
        return Err(bad_message(BadMessage::new("hello.last_link_session", "too long")));
    }
    let (has, believed) = (hello.bundle_seq, key_ids(&hello.task_keys));
    let hello = read_hello(hello).map_err(bad_message)?;
    context.delivery.tell_copies_apart(&node, &named).await.map_err(|e| status(&e))?;
    let (commands, queue) = mpsc::channel(LINK_QUEUE);
    let (own, its_node) = (context.clone(), node.clone());
    // To its end even if the node hangs up: a link half in place would be a ghost.
    let opened = context.tasks.complete("link open", async move { own.delivery.open_link(&its_node, hello, commands).await }).await;
    let welcome = opened.ok_or_else(|| Status::unavailable("the hub is stopping"))?.map_err(|e| status(&e))?;
    tracing::info!(node = %node.id, name = %node.name, generation = welcome.generation, "node online");
    metrics::counter!("cortex_links_opened_total").increment(1);
    let link_session: [u8; LINK_SESSION_BYTES] = entropy::bytes();
    context.delivery.links.copies().linked(node.id, &named, &link_session);
    let (out, frames) = mpsc::channel(OUT_QUEUE);
    // Before the bundle is read, so that none is missed.
    let changes = context.keys.changes();
    let authority = context.keys.authority();
    let frame = hub_frame::Kind::Welcome(wire::Welcome {
        hub_id: context.keys.hub.to_string(),
        hub_time_ms: context.clock.anchored_ms(),
        link_session: link_session.to_vec(),
        generation: welcome.generation,
        marks: welcome
            .marks
            .into_iter()
            .map(|(t, a, seq)| wire::OutputMark { task_id: t.to_string(), attempt: a.0, durable_seq: seq })
            .collect(),
        bundle: (has < authority.seq).then(|| sent(&authority)),
    });
    let _ = out.send(Ok(wire::HubFrame { kind: Some(frame) })).await;
    let (reports, report_queue) = mpsc::channel(REPORT_QUEUE);
    if has > node.bundle_seq {
        // The queue is new and empty: this cannot fail.
        let _ = reports.try_send(Report::Bundle(has));
    }
    let caller = Caller::Node { node: node.id, generation: welcome.generation };
    let tasks = context.tasks.clone();
    // It ends with its queue, so that what has come is recorded also when the hub stops.
    let (carried, settled) = oneshot::channel();
    let work = carry(context.clone(), caller, report_queue);
    tasks.spawn("link worker", async move {
        work.await;
        let _ = carried.send(());
    });
    let mut conversation = Conversation {
        context,
        peer,
        generation: welcome.generation,
        _presence: welcome.presence,
        cut: welcome.cut,
        link_session,
        out,
        commands: queue,
        reports: Some(reports),
        settled,
        room: Arc::new(Semaphore::new(REPORT_BYTES)),
        rejected: 0,
        changes,
        told: authority.seq.max(has),
        believed,
        ask_renewal: Asking::No,
    };
    conversation.look_at_certificate(&authority);
    tasks.spawn("link", conversation.run(inbound));
    Ok(ReceiverStream::new(frames).boxed())
}

struct Conversation {
    context: Arc<LinkContext>,
    peer: Peer,
    generation: u64,
    _presence: Presence,
    cut: CancellationToken,
    link_session: [u8; 16],
    out: mpsc::Sender<Result<wire::HubFrame, Status>>,
    commands: mpsc::Receiver<LinkCommand>,
    /// None once nothing more is taken.
    reports: Option<mpsc::Sender<Report>>,
    /// The worker has recorded all that it was given.
    settled: oneshot::Receiver<()>,
    room: Arc<Semaphore>,
    rejected: u32,
    changes: watch::Receiver<()>,
    /// The highest sequence of a bundle that the node has or was sent.
    told: u64,
    /// Ids of the task keys that it believes.
    believed: Vec<String>,
    ask_renewal: Asking,
}

/// Whether the node is asked for a new certificate, because its root goes out of use.
enum Asking {
    No,
    At(Instant),
    Asked,
}

impl Conversation {
    async fn run(mut self, inbound: Streaming<wire::NodeFrame>) {
        let cut = self.cut.clone();
        let (code, detail) = tokio::select! {
            biased;
            // Whatever the conversation is doing: a node that is not ours waits for nothing.
            () = cut.cancelled() => (GOODBYE_REVOKED, "its owner or an admin revoked or removed it".to_owned()),
            end = self.talk(inbound) => end,
        };
        tracing::info!(node = %self.peer.node, generation = self.generation, code, detail, "link ended");
        metrics::counter!("cortex_links_closed_total", "code" => code).increment(1);
        let bye = hub_frame::Kind::Goodbye(wire::Goodbye { code: code.into(), detail });
        let _ = self.out.try_send(Ok(wire::HubFrame { kind: Some(bye) }));
        // Dropping the presence puts the node offline at once; a newer link of it stays untouched.
    }

    /// Serves until something ends the link; says what.
    async fn talk(&mut self, mut inbound: Streaming<wire::NodeFrame>) -> (&'static str, String) {
        let context = self.context.clone();
        let clock = context.clock.clone();
        let stop = context.tasks.token();
        let mut sealer = Sealer {
            keyring: &*context.keys,
            hub: context.keys.hub,
            node: self.peer.node,
            node_key: self.peer.spki,
            link_session: self.link_session,
            seq: 0,
            believed: self.believed.clone(),
        };
        let life = (self.peer.not_after - clock.now_ms()).max(0) as u64;
        let certificate_end = tokio::time::sleep(Duration::from_millis(life));
        tokio::pin!(certificate_end);
        let silence = tokio::time::sleep(Duration::from_secs(SILENCE_SECS));
        tokio::pin!(silence);
        let mut beat = tokio::time::interval(Duration::from_secs(HEARTBEAT_SECS));
        beat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut beats = 0;
        // The newest heartbeat of the node, to be answered with ours: (sent_ms, when it came).
        let mut heard: Option<(UnixMs, Duration)> = None;
        let mut batch = Vec::with_capacity(ORDERS_PER_ENVELOPE);
        loop {
            tokio::select! {
                biased;
                () = stop.cancelled() => {
                    self.settle(&mut sealer, &mut inbound, &mut heard).await;
                    return ("shutdown", "the hub is stopping".into());
                }
                () = &mut certificate_end => return ("certificate_expired", "the certificate of this link has ended".into()),
                () = &mut silence => {
                    let now = tokio::time::Instant::now();
                    // Whoever stood still itself has not listened: what came meanwhile is heard first.
                    if now - silence.deadline() < Duration::from_millis(STOOD_STILL_MS) {
                        return ("silent", format!("no frame came for {SILENCE_SECS} s"));
                    }
                    silence.as_mut().reset(now + Duration::from_secs(HEARTBEAT_SECS));
                }
                _ = beat.tick() => {
                    beats += 1;
                    let now = clock.steady();
                    let (echo_ms, held) = heard.map_or((0, Duration::ZERO), |(ms, at)| (ms, now.saturating_sub(at)));
                    let beat = wire::Heartbeat { seq: beats, sent_ms: now.as_millis() as i64, echo_ms, held_ms: held.as_millis() as i64 };
                    if !self.say(hub_frame::Kind::Heartbeat(beat)).await {
                        return ("gone", "the stream was closed".into());
                    }
                }
                Ok(()) = self.changes.changed() => {
                    if let Some(end) = self.authority_changed().await {
                        return end;
                    }
                }
                () = until(&self.ask_renewal) => {
                    self.ask_renewal = Asking::Asked;
                    if !self.say(hub_frame::Kind::Renew(wire::RenewNow {})).await {
                        return ("gone", "the stream was closed".into());
                    }
                }
                n = self.commands.recv_many(&mut batch, ORDERS_PER_ENVELOPE) => {
                    if n == 0 {
                        return ("overrun", "the link was too slow for its orders; connect again".into());
                    }
                    if let Some(end) = self.pass(&mut sealer, std::mem::take(&mut batch)).await {
                        return end;
                    }
                }
                frame = inbound.message() => {
                    let frame = match frame {
                        Ok(Some(f)) => f,
                        Ok(None) => return ("closed", "the node closed the stream".into()),
                        Err(e) => return ("broken", e.message().to_owned()),
                    };
                    silence.as_mut().reset(tokio::time::Instant::now() + Duration::from_secs(SILENCE_SECS));
                    if let Err(e) = self.hear(frame, &mut heard) {
                        context.delivery.links.refuse(self.peer.node, "bad_frame", &e);
                        return ("bad_frame", e);
                    }
                    sealer.believed.clone_from(&self.believed);
                }
            }
        }
    }

    /// What the node has told is recorded and acknowledged, as far as the stop's time allows.
    async fn settle(&mut self, sealer: &mut Sealer<'_>, inbound: &mut Streaming<wire::NodeFrame>, heard: &mut Option<(UnixMs, Duration)>) {
        while let Some(Ok(Some(frame))) = inbound.message().now_or_never() {
            if self.hear(frame, heard).is_err() {
                break;
            }
        }
        self.reports = None;
        let mut batch = Vec::with_capacity(ORDERS_PER_ENVELOPE);
        loop {
            tokio::select! {
                biased;
                n = self.commands.recv_many(&mut batch, ORDERS_PER_ENVELOPE) => {
                    if n == 0 || self.pass(sealer, std::mem::take(&mut batch)).await.is_some() {
                        return;
                    }
                }
                // Looked at after the commands: acknowledgements that it has sent are passed on first.
                _ = &mut self.settled => return,
            }
        }
    }

    /// Tells the node of a new bundle, and ends the link whose root counts no more.
    async fn authority_changed(&mut self) -> Option<(&'static str, String)> {
        let authority = self.context.keys.authority();
        if authority.seq > self.told {
            self.told = authority.seq;
            if !self.say(hub_frame::Kind::Bundle(sent(&authority))).await {
                return Some(("gone", "the stream was closed".into()));
            }
        }
        if !self.context.keys.counts(&self.peer.certificate) {
            return Some(("certificate_expired", ROOT_RETIRED.into()));
        }
        self.look_at_certificate(&authority);
        None
    }

    /// A certificate by a root that goes out of use is replaced as soon as the node believes the new one.
    fn look_at_certificate(&mut self, authority: &Authority) {
        let new = authority.issuing();
        let due = authority.phase == Phase::Issuing
            && !new.issued(&self.peer.certificate)
            && self.believed.contains(&seal::key_id(&new.public()));
        if !due {
            self.ask_renewal = Asking::No;
        } else if matches!(self.ask_renewal, Asking::No) {
            let spread = RENEWALS_APART.as_millis() as u64 * self.context.delivery.links.all().len().max(1) as u64;
            let wait = Duration::from_millis(u64::from_be_bytes(entropy::bytes()) % spread);
            self.ask_renewal = Asking::At(Instant::now() + wait);
        }
    }

    async fn say(&self, kind: hub_frame::Kind) -> bool {
        // A socket that takes nothing for as long as silence may last counts as gone.
        self.out.send_timeout(Ok(wire::HubFrame { kind: Some(kind) }), Duration::from_secs(SILENCE_SECS)).await.is_ok()
    }

    /// Carries a batch of the engine's commands to the node, orders sharing envelopes.
    async fn pass(&self, sealer: &mut Sealer<'_>, batch: Vec<LinkCommand>) -> Option<(&'static str, String)> {
        let (mut orders, mut cancels, mut inputs, mut acks, mut close) = (vec![], vec![], vec![], vec![], None);
        for command in batch {
            match command {
                LinkCommand::Order(o) => orders.push(*o),
                LinkCommand::Cancel { task, attempt } => cancels.push((task, attempt, false)),
                LinkCommand::Kill { task, attempt } => cancels.push((task, attempt, true)),
                LinkCommand::Input(i) => inputs.push(*i),
                LinkCommand::ResultAck { task, attempt } => acks.push(wire::ResultAck { task_id: task.to_string(), attempt: attempt.0 }),
                LinkCommand::Close { code, detail } => close = Some((code, detail)),
            }
        }
        if close.is_some() {
            return close;
        }
        // A cancel may be for an order of this very batch: orders first.
        let mut envelopes = sealer.orders(orders);
        envelopes.extend(sealer.cancels(&cancels));
        envelopes.extend(inputs.into_iter().map(|i| sealer.input(i)));
        let frames = envelopes.into_iter().map(hub_frame::Kind::Envelope).chain(acks.into_iter().map(hub_frame::Kind::ResultAck));
        for kind in frames {
            if !self.say(kind).await {
                return Some(("gone", "the stream was closed".into()));
            }
        }
        None
    }

    fn hear(&mut self, frame: wire::NodeFrame, heard: &mut Option<(UnixMs, Duration)>) -> Result<(), String> {
        let now = self.context.clock.steady();
        let report = match frame.kind {
            None => return Ok(()), // a kind of a later version
            Some(node_frame::Kind::Hello(_)) => return Err("a second hello".into()),
            Some(node_frame::Kind::Heartbeat(b)) => {
                *heard = Some((b.sent_ms, now));
                let back = (now.as_millis() as i64).saturating_sub(b.echo_ms).saturating_sub(b.held_ms);
                if b.echo_ms > 0 && (0..3_600_000).contains(&back) {
                    self.context.delivery.links.set_rtt(self.peer.node, Duration::from_millis(back as u64));
                }
                return Ok(());
            }
            Some(node_frame::Kind::Rejected(r)) => {
                metrics::counter!("cortex_envelopes_rejected_total").increment(1);
                let detail: String = r.detail.chars().take(200).collect();
                let code: String = r.code.chars().take(64).collect();
                self.rejected += 1;
                match self.rejected {
                    ..=MOST_REJECTED => {
                        tracing::error!(node = %self.peer.node, seq = r.seq, ?code, ?detail, "the node refused an envelope");
                        return Ok(());
                    }
                    _ => return Err("more refusals than envelopes".into()),
                }
            }
            Some(node_frame::Kind::Input(a)) => {
                let caller = Caller::Node { node: self.peer.node, generation: self.generation };
                // A code of a later version is no answer: the caller asks again. An older link's word is none either.
                if let Some(answer) = read_answer(&a).map_err(|e| e.to_string())? {
                    let _ = self.context.delivery.input_answered(&caller, answer);
                }
                return Ok(());
            }
            Some(node_frame::Kind::Started(s)) => {
                Report::Started(id("started.task_id", &s.task_id).map_err(|e: BadMessage| e.to_string())?, AttemptNo(s.attempt))
            }
            Some(node_frame::Kind::Kept(k)) => {
                let caller = Caller::Node { node: self.peer.node, generation: self.generation };
                let task = id("kept.task_id", &k.task_id).map_err(|e: BadMessage| e.to_string())?;
                // Noted in memory alone, and at once: a slow store is no silence of the node.
                let _ = self.context.delivery.kept(&caller, task, AttemptNo(k.attempt));
                return Ok(());
            }
            Some(node_frame::Kind::Standing(s)) => {
                let caller = Caller::Node { node: self.peer.node, generation: self.generation };
                // At once, and before whatever the node says next. An older link's word is none.
                let _ = self.context.delivery.standing(&caller, s.max_tasks, Closed::parse(&s.closed));
                return Ok(());
            }
            Some(node_frame::Kind::Bundle(b)) => {
                metrics::counter!("cortex_bundles_acknowledged_total").increment(1);
                let authority = self.context.keys.authority();
                if b.seq == authority.seq {
                    self.believed = authority.bundle().key_ids();
                    self.look_at_certificate(&authority);
                }
                Report::Bundle(b.seq)
            }
            Some(node_frame::Kind::Ready(r)) => {
                let task = id("ready.task_id", &r.task_id).map_err(|e: BadMessage| e.to_string())?;
                let ended = attempts("ready.ended", &r.ended[..r.ended.len().min(ORDERS_PER_ENVELOPE)]).map_err(|e| e.to_string())?;
                Report::Ready(task, AttemptNo(r.attempt), ended)
            }
            Some(node_frame::Kind::Result(r)) => {
                let result = read_result(r).map_err(|e| e.to_string())?;
                let bytes = result.result.as_ref().map_or(0, Vec::len) as u32;
                let room = self.room.clone().try_acquire_many_owned(bytes).map_err(|_| "results come faster than they are stored")?;
                Report::Result(Box::new(result), room)
            }
        };
        match &self.reports {
            Some(reports) => reports.try_send(report).map_err(|_| "more reports than attempts".into()),
            // The hub is stopping: it is said again on the next link.
            None => Ok(()),
        }
    }
}

/// Carries reports to the journal; those of a round share commits.
async fn carry(context: Arc<LinkContext>, caller: Caller, mut queue: mpsc::Receiver<Report>) {
    let mut round = Vec::with_capacity(REPORTS_AT_ONCE);
    while queue.recv_many(&mut round, REPORTS_AT_ONCE).await > 0 {
        let (delivery, nodes, caller) = (&context.delivery, &context.nodes, &caller);
        // All begin in their order and share a commit; the journal keeps that order.
        let reports = round.drain(..).map(|report| async move {
            match report {
                Report::Bundle(seq) => nodes.has_bundle(caller, seq).await,
                Report::Started(t, a) => delivery.started(caller, t, a).await,
                Report::Ready(t, a, ended) => delivery.ready(caller, t, a, &ended).await,
                Report::Result(r, _room) => delivery.result(caller, *r).await,
            }
        });
        for error in futures::future::join_all(reports).await.into_iter().filter_map(Result::err) {
            // Not acknowledged: the node says it again on its next link, and this one is closed.
            tracing::warn!(?caller, %error, "a report could not be recorded");
            if let Caller::Node { node, generation } = *caller
                && context.delivery.links.is_current(node, generation)
            {
                let (code, detail) = match &error {
                    Error::Invalid { code: DIGEST_MISMATCH, detail } => (DIGEST_MISMATCH, detail.clone()),
                    _ => ("not_recorded", "the hub could not record a report; connect again".into()),
                };
                let close = LinkCommand::Close { code, detail };
                context.delivery.links.send(node, close);
            }
        }
    }
}

async fn until(asking: &Asking) {
    match asking {
        Asking::At(at) => tokio::time::sleep_until(*at).await,
        Asking::No | Asking::Asked => std::future::pending().await,
    }
}

fn sent(authority: &Authority) -> wire::SignedBundle {
    metrics::counter!("cortex_bundles_sent_total").increment(1);
    bundle(authority)
}

fn key_ids(said: &[String]) -> Vec<String> {
    said.iter().take(MOST_KEYS).filter(|id| id.len() <= MAX_KEY_ID).cloned().collect()
}

fn read_hello(h: wire::Hello) -> Result<Hello, BadMessage> {
    let attempts = attempts("hello.attempts", &h.attempts)?;
    Ok(Hello {
        spool: id("hello.spool_id", &h.spool_id)?,
        max_tasks: h.max_tasks,
        keeps: h.keeps,
        closed: Closed::parse(&h.closed),
        attempts,
    })
}

fn attempts(field: &'static str, named: &[wire::KnownAttempt]) -> Result<Vec<(TaskId, AttemptNo)>, BadMessage> {
    named.iter().map(|a| Ok((id(field, &a.task_id)?, AttemptNo(a.attempt)))).collect()
}

fn read_answer(a: &wire::InputAnswer) -> Result<Option<Answer>, BadMessage> {
    let (task, attempt) = (id("input.task_id", &a.task_id)?, AttemptNo(a.attempt));
    let fate = Fate::try_from(a.code()).ok();
    Ok(fate.map(|fate| Answer { task, attempt, request: a.request, fate, taken: a.taken_seq }))
}

/// What a skill without a process may give back.
const MAX_RESULT_BYTES: usize = 256 << 10;

fn read_result(r: wire::TaskResult) -> Result<Reported, BadMessage> {
    let outcome = r.outcome.as_ref().ok_or_else(|| BadMessage::new("result.outcome", "missing"))?;
    if r.result.len() > MAX_RESULT_BYTES {
        return Err(BadMessage::new("result.result", "too large"));
    }
    Ok(Reported {
        task: id("result.task_id", &r.task_id)?,
        attempt: AttemptNo(r.attempt),
        outcome: Outcome::try_from(outcome)?,
        last_seq: r.last_seq,
        digests: digests(&r)?,
        result: (!r.result.is_empty()).then_some(r.result),
        sandbox_applied: (!r.sandbox_applied.is_empty()).then(|| r.sandbox_applied.chars().take(500).collect()),
    })
}

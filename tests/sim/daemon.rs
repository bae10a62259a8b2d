//! The daemon's engine at message level: the node's own checker, table of attempts, pulls and back-off,
//! between a simulated link and a simulated warden. It follows `node::link::engine` step by step.

use crate::net::{Dialed, Hello, NodeEnd, ToHub, ToNode, Wire};
use crate::node::Machine;
use crate::oracle::Key as Attempt;
use crate::plan::{Break, Fault, Point};
use crate::warden::ToWarden;
use crate::world::lock;
use mesh_core::ceiling::Closed;
use mesh_core::policy::{self, Asked, Grant, Place, judge};
use mesh_core::spec::Spec;
use mesh_core::task::{AttemptNo, NeverStarted, Outcome, Reason, ReasonCode};
use mesh_process::Tasks;
use mesh_wire::node::{Envelope, Heartbeat, PayloadRequest, Standing, node_frame};
use node::link::attempts::Attempts;
use node::link::backoff::Backoff;
use node::link::data::{Pulled, Pulls};
use node::link::orders::{Accepted, Checked, Checker, Key, Payload};
use node_warden::frames::{Event, Request};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::Instant;

const HEARTBEAT: Duration = Duration::from_secs(5);
const SILENCE: Duration = Duration::from_secs(15);
const REPEAT: Duration = Duration::from_secs(15);
const SUPERSEDED_WAIT: Duration = Duration::from_secs(300);
const GOOD_LINK: Duration = Duration::from_secs(10);
const DIAL_TIMEOUT: Duration = Duration::from_secs(10);
const EVENTS: usize = 8192;
/// Frames that are sent and not yet durable.
const IN_FLIGHT: u64 = 8;

#[derive(Default)]
struct Tail {
    last: u64,
    sent: u64,
    durable: u64,
}

struct Up {
    end: NodeEnd,
    checker: Checker,
    hub_time: (i64, Duration),
    since: Instant,
    heard: Instant,
    heartbeat_due: Instant,
    repeat_due: Instant,
    /// What the hub knows of the owner's word.
    told: Option<Closed>,
}

pub struct Daemon {
    m: Arc<Machine>,
    life: u64,
    tasks: Tasks,
    warden: Option<mpsc::Sender<ToWarden>>,
    events: Option<mpsc::Receiver<Event>>,
    attach_due: Instant,
    attached: bool,
    spool: Option<mesh_core::SpoolId>,
    attempts: Attempts,
    tails: BTreeMap<Key, Tail>,
    pulls: Pulls,
    starting: BTreeMap<Key, Grant>,
    cancelling: BTreeSet<Key>,
    to_warden: VecDeque<Request>,
    up: Option<Up>,
    dialled: (mpsc::Sender<Dialed>, mpsc::Receiver<Dialed>),
    dialling: bool,
    /// In the hello of the newest try.
    hello_told: Option<Closed>,
    dial_due: Option<Instant>,
    backoff: Backoff,
    swapping: bool,
    stopping: Option<Instant>,
    dead: bool,
}

impl Daemon {
    pub fn new(m: Arc<Machine>, life: u64, tasks: Tasks) -> Self {
        Self {
            m,
            life,
            tasks,
            warden: None,
            events: None,
            attach_due: Instant::now(),
            attached: false,
            spool: None,
            attempts: Attempts::default(),
            tails: BTreeMap::new(),
            pulls: Pulls::default(),
            starting: BTreeMap::new(),
            cancelling: BTreeSet::new(),
            to_warden: VecDeque::new(),
            up: None,
            dialled: mpsc::channel(4),
            dialling: false,
            hello_told: None,
            dial_due: None,
            backoff: Backoff::default(),
            swapping: false,
            stopping: None,
            dead: false,
        }
    }

    pub async fn run(mut self) {
        loop {
            if self.due() {
                self.up = None;
                self.m.daemon_ended(self.life);
                return;
            }
            self.flush();
            if self.dead {
                return std::future::pending().await;
            }
            let next = self.next_due();
            let broken = async |up: &mut Option<Up>| match up {
                Some(up) => {
                    tokio::select! {
                        biased;
                        () = up.end.wire.reset_node.cancelled() => None,
                        message = up.end.receive.receive() => Some(message),
                    }
                }
                None => std::future::pending().await,
            };
            tokio::select! {
                biased;
                event = async { match &mut self.events { Some(e) => e.recv().await, None => std::future::pending().await } } => match event {
                    Some(event) => self.on_warden(event),
                    None => {
                        (self.warden, self.events, self.attached) = (None, None, false);
                        self.attach_due = Instant::now() + Duration::from_secs(1);
                    }
                },
                Some(dialed) = self.dialled.1.recv() => self.on_dialed(dialed),
                message = broken(&mut self.up) => match message {
                    Some(Some(message)) => self.on_hub(message),
                    Some(None) => self.lost("the hub closed the stream", true),
                    None => self.lost("the stream broke", true),
                },
                () = tokio::time::sleep_until(next) => {}
            }
        }
    }

    // ---- time ----

    fn now(&self) -> Duration {
        self.m.world.steady()
    }
    fn node_time(&self) -> Option<i64> {
        let up = self.up.as_ref()?;
        Some(up.hub_time.0 + (self.now() - up.hub_time.1).as_millis() as i64)
    }
    fn next_due(&self) -> Instant {
        let mut due = Instant::now() + Duration::from_secs(if self.stopping.is_some() || self.up.is_some() { 1 } else { 5 });
        if let Some(up) = &self.up {
            due = due.min(up.heartbeat_due).min(up.heard + SILENCE);
        }
        let attaches = self.events.is_none() && self.stopping.is_none();
        due.min(self.dial_due.unwrap_or(due)).min(if attaches { self.attach_due } else { due })
    }
    fn die_at(&mut self, point: Point) -> bool {
        if self.m.world.dies_at(point) {
            self.dead = true;
            self.m.kill_daemon();
        }
        self.dead
    }

    /// True when the daemon has come to its end.
    fn due(&mut self) -> bool {
        let now = Instant::now();
        if self.events.is_none() && now >= self.attach_due && self.stopping.is_none() {
            let (events, heard) = mpsc::channel(EVENTS);
            let warden = self.m.warden();
            if warden.try_send(ToWarden::Attach(events)).is_ok() {
                (self.warden, self.events) = (Some(warden), Some(heard));
            }
        }
        if self.m.stop.swap(false, Ordering::SeqCst) && self.stopping.is_none() {
            self.to_warden.push_back(Request::Stop);
            self.stopping = Some(now + Duration::from_secs(20));
        }
        if let Some(until) = self.stopping
            && (now >= until || (self.events.is_none() && (self.up.is_none() || !self.attempts.has_untold())))
        {
            self.m.kill_warden();
            return true;
        }
        self.look_at_owner();
        if let Some(up) = &mut self.up {
            if now >= up.heard + SILENCE {
                self.lost("the hub was silent", true);
            } else {
                if now >= up.heartbeat_due {
                    up.heartbeat_due = now + HEARTBEAT;
                    up.end.send.send(ToHub::Frame(node_frame::Kind::Heartbeat(Heartbeat::default())));
                }
                if now >= up.repeat_due {
                    up.repeat_due = now + REPEAT;
                    self.tell_all();
                }
                if self.pulls.timed_out(self.now()) {
                    self.lost("a payload did not come", true);
                }
            }
        }
        if self.dial_due.is_some_and(|t| now >= t) {
            self.dial_due = None;
            self.dial();
        }
        if self.up.is_some() && !self.swapping && self.m.swap.swap(false, Ordering::SeqCst) {
            self.swapping = true;
            self.m.world.fault(Fault::SecondLink, self.m.n);
            self.dial();
        }
        self.m.revoked.load(Ordering::SeqCst) && self.stopping.is_none()
    }

    /// Tells the hub what the machine's owner has changed.
    fn look_at_owner(&mut self) {
        let (closed, max_tasks) = (self.m.closed(), self.m.max_tasks);
        if let Some(up) = self.up.as_mut().filter(|up| up.told != closed) {
            up.told = closed;
            let closed = closed.map_or("", Closed::as_str).to_owned();
            up.end.send.send(ToHub::Frame(node_frame::Kind::Standing(Standing { max_tasks, closed })));
        }
    }

    fn flush(&mut self) {
        // Nothing is said before the warden has welcomed, as the socket's pump does it.
        while self.attached
            && let Some(request) = self.to_warden.pop_front()
        {
            if self.warden.as_ref().is_none_or(|w| w.try_send(ToWarden::Say(request)).is_err()) {
                break;
            }
        }
        self.outflow();
    }

    // ---- the link ----

    fn dial(&mut self) {
        let Some(_) = self.spool else { return };
        if self.dialling || self.stopping.is_some() || self.m.revoked.load(Ordering::SeqCst) {
            return;
        }
        self.dialling = true;
        let known = self.attempts.known();
        let attempts = known.iter().filter_map(|k| Some((k.task_id.parse().ok()?, AttemptNo(k.attempt)))).collect();
        let (max_tasks, closed) = (self.m.max_tasks, self.m.closed());
        self.hello_told = closed;
        let hello = Hello { spool: self.m.spool_id(), attempts, max_tasks, closed, last_session: lock(&self.m.session).clone() };
        let (m, told, tasks) = (self.m.clone(), self.dialled.0.clone(), self.tasks.clone());
        self.tasks.spawn_until_cancelled("dial", async move {
            let dialed = tokio::time::timeout(DIAL_TIMEOUT, connect(&m, hello, &tasks)).await.unwrap_or(Err("timed out"));
            let _ = told.send(dialed).await;
        });
    }

    fn lost(&mut self, why: &str, wait_by_backoff: bool) {
        if self.up.as_ref().is_some_and(|up| up.since.elapsed() >= GOOD_LINK) {
            self.backoff.reset();
        }
        self.m.world.note(format_args!("node {}: link down: {why}", self.m.n));
        self.drop_link();
        if self.dialling {
            return;
        }
        let random = self.m.world.rng(|r| r.word());
        let wait =
            if wait_by_backoff { self.backoff.next(mesh_process::Clock::steady(&*self.m.world.clock()), random) } else { Duration::ZERO };
        self.dial_due = Some(Instant::now() + wait);
    }
    fn drop_link(&mut self) {
        if self.up.take().is_some() {
            self.pulls.clear();
        }
    }

    fn on_dialed(&mut self, dialed: Dialed) {
        self.dialling = false;
        let swap = std::mem::take(&mut self.swapping);
        let (end, link_session, hub_time, marks) = match dialed {
            Ok(d) => d,
            Err("revoked") => return self.revoked(),
            Err(_) if self.up.is_some() => return,
            Err(why) => return self.lost(why, true),
        };
        if self.stopping.is_some() {
            return;
        }
        self.drop_link();
        *lock(&self.m.session) = link_session.to_vec();
        let (m, now) = (&self.m, Instant::now());
        let (hub, public) = m.world.hub_identity();
        let checker = Checker::new(hub, m.id, m.world.node_key(m.n), vec![public], link_session);
        m.world.note(format_args!("node {}: link {} up{}", m.n, end.wire.no, if swap { ", swapped" } else { "" }));
        self.up = Some(Up {
            end,
            checker,
            hub_time: (hub_time, self.now()),
            since: now,
            heard: now,
            heartbeat_due: now,
            repeat_due: now + REPEAT,
            told: self.hello_told,
        });
        let marks: BTreeMap<Attempt, u64> = marks.into_iter().collect();
        for (key, tail) in &mut self.tails {
            let mark = marks.get(&(key.task, key.attempt)).copied().unwrap_or(0).min(tail.last);
            tail.durable = tail.durable.max(mark);
            tail.sent = tail.durable;
        }
        self.attempts.relink();
        self.tell_all();
        self.dial_due = None;
    }

    fn revoked(&mut self) {
        self.m.world.note(format_args!("node {} hears that it is revoked", self.m.n));
        self.m.revoked.store(true, Ordering::SeqCst);
        self.drop_link();
        self.m.kill_warden();
    }

    fn on_hub(&mut self, message: ToNode) {
        if let Some(up) = &mut self.up {
            up.heard = Instant::now();
        }
        match message {
            ToNode::Welcome { .. } | ToNode::Heartbeat => {}
            ToNode::Envelope(e) => self.on_envelope(&e),
            ToNode::ResultAck(a) => {
                let Ok(task) = a.task_id.parse() else { return };
                self.on_result_ack(Key { task, attempt: AttemptNo(a.attempt) });
            }
            ToNode::OutputAck((task, attempt), seq) => {
                let key = Key { task, attempt };
                self.check_output_ack(key, seq);
                if let Some(tail) = self.tails.get_mut(&key) {
                    tail.durable = tail.durable.max(seq.min(tail.sent));
                    self.to_warden.push_back(Request::Acked { task, attempt, offset: tail.durable });
                }
                self.tell(&key);
            }
            ToNode::Payload(c) => {
                match self.pulls.chunk(c, self.now()) {
                    Pulled::More | Pulled::Stray => return,
                    Pulled::Done(o, bytes) => match self.admit(&o) {
                        Ok(()) => self.begin(&o, &bytes),
                        Err(outcome) => self.over(&o, outcome),
                    },
                    Pulled::Failed(o, why) => {
                        let reason = Reason::new(ReasonCode::BadRequest, why);
                        self.over(&o, Outcome::NeverStarted(NeverStarted::Refused(reason)));
                    }
                }
                self.start_pull();
            }
            ToNode::Goodbye("revoked") => self.revoked(),
            ToNode::Goodbye("superseded") if self.swapping => self.drop_link(),
            ToNode::Goodbye("superseded") => {
                self.m.world.note(format_args!("node {} is superseded", self.m.n));
                self.m.world.count("superseded");
                self.drop_link();
                self.dial_due = Some(Instant::now() + SUPERSEDED_WAIT);
            }
            ToNode::Goodbye(code) => self.lost(code, true),
        }
    }

    // ---- orders ----

    fn on_envelope(&mut self, e: &Envelope) {
        self.look_at_owner();
        let Some(up) = &mut self.up else { return };
        match up.checker.check(e) {
            Ok(Accepted::Orders(orders)) => {
                if self.die_at(Point::DaemonOrderReceived) {
                    return;
                }
                orders.into_iter().for_each(|o| self.on_order(o));
            }
            Ok(Accepted::Cancels(keys)) => keys.into_iter().for_each(|(k, _)| self.on_cancel(k)),
            Ok(Accepted::Input(_)) => {}
            Err(r) => self.m.world.violated("envelope_is_accepted", format_args!("{}: {}", r.code, r.detail)),
        }
        self.start_pull();
    }

    fn on_order(&mut self, mut o: Checked) {
        let key = o.key;
        if self.starting.contains_key(&key) || self.pulls.holds(&key) {
            return;
        }
        if self.attempts.get(&key).is_some() && !self.m.world.is(Break::StartKnownAgain) {
            self.attempts.retell(&key);
            return self.tell(&key);
        }
        o.granted |= self.m.world.is(Break::SkipGrant);
        if !o.granted {
            // This machine says that it keeps none: what comes all the same is not started.
            return;
        }
        match self.admit(&o) {
            Err(outcome) => self.over(&o, outcome),
            Ok(()) => match &o.payload {
                Payload::Inline(bytes) => {
                    let bytes = bytes.clone();
                    self.begin(&o, &bytes);
                }
                Payload::Pull(_) => self.pulls.push(o),
            },
        }
    }

    fn admit(&self, o: &Checked) -> Result<(), Outcome> {
        o.admit(self.node_time().unwrap_or(i64::MAX))?;
        if self.stopping.is_some() || (o.granted && self.m.closed().is_some()) {
            return Err(Outcome::NeverStarted(NeverStarted::Late));
        }
        Ok(())
    }

    fn begin(&mut self, o: &Checked, payload: &[u8]) {
        if let Ok(Spec::Echo { .. }) = o.spec(payload) {
            return self.over(o, Outcome::Done);
        }
        let granted = o.spec(payload).and_then(|spec: Spec| {
            let (task, attempt) = (o.key.task, o.key.attempt);
            let asked = Asked { task, attempt, user: o.user, spec: &spec, digest: o.digest, timeout_secs: o.timeout_secs };
            let place = Place { workspace: "/w".into(), run_as: Some(1000), ephemeral: false };
            judge(&asked, place, &policy::Machine::OPEN).map_err(|reason| Outcome::NeverStarted(NeverStarted::Refused(reason)))
        });
        match granted {
            Err(outcome) => self.over(o, outcome),
            Ok(grant) => {
                self.to_warden.push_back(Request::Start { grant: grant.clone() });
                self.starting.insert(o.key, grant);
            }
        }
    }

    /// An end that no process made.
    fn over(&mut self, o: &Checked, outcome: Outcome) {
        let at = self.node_time().unwrap_or(0);
        self.m.world.note(format_args!("node {}: {} is over: {outcome:?}", self.m.n, o.key.task));
        self.attempts.over(o.key, o.digest, outcome, vec![], at);
        self.tell(&o.key);
    }

    fn on_cancel(&mut self, key: Key) {
        self.pulls.cancel(&key);
        if self.attempts.get(&key).is_some_and(|a| a.end.is_some()) {
            self.attempts.retell(&key);
            return self.tell(&key);
        }
        self.cancelling.insert(key);
        self.to_warden.push_back(Request::Cancel { task: key.task, attempt: key.attempt });
    }

    fn start_pull(&mut self) {
        let now = self.now();
        let Some(up) = &self.up else { return };
        if let Some(o) = self.pulls.start(now) {
            let (task_id, attempt, sha256) = (o.key.task.to_string(), o.key.attempt.0, o.digest.to_vec());
            up.end.send.send(ToHub::Pull(PayloadRequest { task_id, attempt, sha256 }));
        }
    }

    fn on_result_ack(&mut self, key: Key) {
        if self.attempts.get(&key).is_none_or(|a| a.end.is_none()) || self.die_at(Point::DaemonAckReceived) {
            return;
        }
        let (m, attempt) = (self.m.clone(), (key.task, key.attempt));
        if let Some(hub) = m.hub.borrow().as_ref() {
            let (world, disk, node) = (m.world.clone(), hub.store.disk.clone(), m.id);
            // The memory's store never waits: this is done at once.
            futures::executor::block_on(world.saw_result_ack(&disk, node, attempt));
        }
        self.tails.remove(&key);
        if self.attempts.remove(&key).is_some_and(|a| !a.local) {
            if m.world.dies_at(Point::WardenBeforeForget) {
                return m.kill_warden();
            }
            self.to_warden.push_back(Request::Forget { task: key.task, attempt: key.attempt });
        }
    }
    fn check_output_ack(&self, key: Key, seq: u64) {
        if let Some(hub) = self.m.hub.borrow().as_ref() {
            let disk = hub.store.disk.clone();
            futures::executor::block_on(self.m.world.saw_output_ack(&disk, self.m.id, (key.task, key.attempt), seq));
        }
    }

    // ---- the warden ----

    fn on_warden(&mut self, event: Event) {
        match event {
            Event::Welcome { spool, attempts, .. } => {
                self.attached = true;
                let gone = self.attempts.restore(&attempts, self.m.now_ms());
                self.tails.retain(|k, _| !gone.contains(k));
                for k in &attempts {
                    let key = Key { task: k.task, attempt: k.attempt };
                    self.answered(&key);
                    self.grown(key, k.last_seq);
                }
                let again = self.starting.values().map(|g| Request::Start { grant: g.clone() });
                self.to_warden.retain(|r| !matches!(r, Request::Start { .. } | Request::Cancel { .. }));
                self.to_warden.extend(again);
                self.cancelling.retain(|k| self.attempts.get(k).is_none_or(|a| a.end.is_none()));
                let again = self.cancelling.iter().map(|k| Request::Cancel { task: k.task, attempt: k.attempt });
                self.to_warden.extend(again);
                let first = self.spool.replace(spool);
                if first.is_none() {
                    self.dial();
                } else if self.up.is_some() && (first != Some(spool) || !gone.is_empty()) {
                    self.lost("the warden's memory changed", false);
                }
                self.tell_all();
            }
            Event::Started { task, attempt, at_ms } => {
                let key = Key { task, attempt };
                self.attempts.started(key, at_ms);
                self.answered(&key);
                self.tell(&key);
            }
            Event::Output { task, attempt, last_seq, .. } => self.grown(Key { task, attempt }, last_seq),
            Event::Ended { task, attempt, outcome, last_seq, at_ms, .. } => {
                let key = Key { task, attempt };
                self.cancelling.remove(&key);
                self.grown(key, last_seq);
                self.attempts.ended(key, outcome, last_seq, at_ms, None);
                self.answered(&key);
                self.tell(&key);
            }
            Event::Conflict { task, attempt } => {
                self.starting.remove(&Key { task, attempt });
                self.m.world.violated("one_spec_per_attempt", task);
            }
            Event::Input { .. } => {}
        }
    }
    fn answered(&mut self, key: &Key) {
        if let Some(grant) = self.starting.remove(key) {
            self.attempts.set_digest(key, *grant.spec());
        }
    }

    // ---- to the hub ----

    fn grown(&mut self, key: Key, last: u64) {
        let tail = self.tails.entry(key).or_default();
        tail.last = tail.last.max(last);
    }

    /// Sends output, one frame an attempt in turn.
    fn outflow(&mut self) {
        let Some(up) = &self.up else { return };
        let mut settled = vec![];
        loop {
            let mut sent = false;
            for (key, tail) in &mut self.tails {
                if tail.sent >= tail.last || tail.sent - tail.durable >= IN_FLIGHT {
                    continue;
                }
                let attempt = (key.task, key.attempt);
                match lock(&self.m.spool).frame_after(&attempt, tail.sent) {
                    Some(frame) if frame.seq <= tail.last => {
                        if tail.sent == tail.durable && frame.seq > tail.durable + 1 {
                            tail.durable = frame.seq - 1;
                        }
                        tail.sent = frame.seq;
                        up.end.send.send(ToHub::Output(attempt, frame));
                        sent = true;
                    }
                    // Everything that was there has been freed, which only the hub's word can have done.
                    _ if tail.sent == tail.durable => {
                        (tail.sent, tail.durable) = (tail.last, tail.last);
                        settled.push(*key);
                    }
                    _ => {}
                }
            }
            if !sent {
                break;
            }
        }
        settled.iter().for_each(|key| self.tell(key));
    }

    fn tell_all(&mut self) {
        for key in self.attempts.keys().collect::<Vec<_>>() {
            self.tell(&key);
        }
    }

    fn tell(&mut self, key: &Key) {
        let now = self.now();
        let Some(up) = &self.up else { return };
        let early = self.m.world.is(Break::ResultBeforeOutput);
        let durable = |k: &Key, seq: u64| early || seq == 0 || self.tails.get(k).is_some_and(|t| t.durable >= seq);
        let frames = self.attempts.tell(key, now, REPEAT, "sim", durable);
        let (mut started, mut result) = (false, false);
        for kind in frames {
            started |= matches!(kind, node_frame::Kind::Started(_));
            result |= matches!(kind, node_frame::Kind::Result(_));
            up.end.send.send(ToHub::Frame(kind));
        }
        if started {
            self.die_at(Point::DaemonStartedTold);
        }
        if result {
            self.die_at(Point::DaemonResultTold);
        }
    }
}

/// Dials the hub and says hello.
async fn connect(m: &Arc<Machine>, hello: Hello, tasks: &Tasks) -> Dialed {
    m.world.pause(1, 50).await;
    if let Some(until) = m.world.partitioned_until(m.n) {
        tokio::time::sleep_until(until).await;
    }
    let hub = m.hub.borrow().clone().filter(|h| h.serves()).ok_or("refused")?;
    let no = m.wire_no.fetch_add(1, Ordering::SeqCst) + 1;
    if m.world.carrier.is_some() {
        return crate::carry::connect(m, &hub, no, hello, tasks).await;
    }
    let (mut near, far): (NodeEnd, _) = Wire::make(&m.world, m.n, no);
    m.note_wire(&near.wire);
    m.world.pause(0, 20).await;
    hub.accept(far, m.id, hello);
    let first = tokio::select! {
        biased;
        () = near.wire.reset_node.cancelled() => None,
        first = near.receive.receive() => first,
    };
    match first {
        Some(ToNode::Welcome { link_session, hub_time_ms, marks, .. }) => Ok((near, link_session, hub_time_ms, marks)),
        Some(ToNode::Goodbye(code)) => Err(code),
        _ => Err("closed"),
    }
}

//! The loop that owns attempts, output, link and warden. See the module above for its states.

mod input;
mod intake;
mod uplink;

use super::ahead::Ahead;
use super::attempts::Attempts;
use super::backoff::Backoff;
use super::connect::{DialError, Dialed};
use super::data::{Next, Outflow, Pulls};
use super::orders::{Checker, Key, RejectionWindow};
use super::time::NodeTime;
use super::tracks::Tracks;
use crate::capabilities::Health;
use crate::ceiling::Owner;
use crate::config::Resolved;
use crate::enrolment::Validity;
use crate::record::Record;
use crate::state::{DataDir, Identity, State};
use crate::status::Status;
use crate::warden::Warden;
use crate::workspace::WorkspaceRoot;
use mesh_core::SpoolId;
use mesh_core::ceiling::Closed;
use mesh_core::policy::Grant;
use mesh_core::task::AttemptNo;
use mesh_process::signals::Asked;
use mesh_process::{SharedClock, Tasks};
use mesh_wire::node::node_link_client::NodeLinkClient;
use mesh_wire::node::{self as wire, Capabilities, CertificateReply, Heartbeat, HubData, HubFrame, NodeData, NodeFrame, RecoverReply};
use mesh_wire::node::{node_data, node_frame};
use mesh_wire::{convert, limits};
use node_warden::frames::Request;
use std::collections::{BTreeMap, VecDeque};
use std::io::Write as _;
use std::time::Duration;
use tokio::sync::mpsc;
use tonic::Status as Refusal;
use tonic::transport::Channel;

/// What readers and background calls may have waiting for the loop.
const INBOX: usize = 128;
/// Words of the warden that are taken in one turn of the loop.
const EVENTS_AT_ONCE: usize = 64;
const HEARTBEAT: Duration = Duration::from_secs(limits::HEARTBEAT_SECS);
const SILENCE: Duration = Duration::from_secs(limits::SILENCE_SECS);
const STOOD_STILL: Duration = Duration::from_millis(limits::STOOD_STILL_MS);
const HEALTH: Duration = Duration::from_secs(15);
/// A result that was not acknowledged is told again.
const REPEAT: Duration = Duration::from_secs(15);
/// The hub has not answered that there is a place for an order: say it again.
const ASK_AGAIN: Duration = Duration::from_secs(5);
/// Another machine has this node's identity: stay away for a while.
const SUPERSEDED_WAIT: Duration = Duration::from_secs(300);
/// From the clean end of the second stream to the link's own.
const LAST_WORD: Duration = Duration::from_secs(1);
/// A link that stood so long was a good one.
const GOOD_LINK: Duration = Duration::from_secs(10);
/// The hub gives no certificate any more. Its clock may be wrong, so that it is asked again now and then.
const EXPIRED_WAIT: Duration = Duration::from_secs(600);
const STORE_TIME: Duration = Duration::from_secs(600);
const RENEW_RETRY: Duration = Duration::from_secs(60);
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// From the warden's stop to our own end, at most.
const STOP_LIMIT: Duration = Duration::from_secs(20);
/// After the tasks have ended: time for their results to reach the hub.
const LAST_WORDS: Duration = Duration::from_secs(3);
const STATUS_EVERY: Duration = Duration::from_secs(1);
/// What the owner has said is looked at so often, and before each order.
const OWNER_EVERY: Duration = Duration::from_secs(1);

/// How the daemon ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// Tasks and warden were ended.
    Stopped,
    /// Tasks and warden go on.
    Left,
    Revoked,
}

/// Everything that an engine is made of.
pub struct Parts {
    pub settings: Resolved,
    pub dir: DataDir,
    pub state: State,
    pub identity: Identity,
    pub certificate: Validity,
    pub time: NodeTime,
    pub clock: SharedClock,
    pub capabilities: Capabilities,
    pub sandbox_applied: String,
    pub root: WorkspaceRoot,
    pub warden: Warden,
    pub tasks: Tasks,
    pub signals: mpsc::Receiver<Asked>,
}

enum News {
    Dialed(Box<Result<Dialed, DialError>>),
    Frame(HubFrame),
    Data(HubData),
    Closed(Option<Refusal>),
    Renewed(Result<CertificateReply, Refusal>),
    Recovered(Box<Result<RecoverReply, DialError>>),
    /// What the hub answered to a report, and the report.
    Health(wire::HealthAck, wire::HealthReport),
}

/// A link that is up.
struct Up {
    no: u64,
    readers: Tasks,
    client: NodeLinkClient<Channel>,
    task_frames: mpsc::Sender<NodeFrame>,
    data_frames: mpsc::Sender<NodeData>,
    checker: Checker,
    rejections: RejectionWindow,
    /// Why no task may start under this hub's policy.
    policy_problem: Option<String>,
    /// What the hub knows of the owner's word.
    told: Told,
    heartbeat: Option<Heartbeat>,
    control: VecDeque<node_frame::Kind>,
    requests: VecDeque<wire::PayloadRequest>,
    since: Duration,
    heard: Duration,
    heartbeat_due: Duration,
    heartbeat_seq: u64,
    /// `sent_ms` of the hub's newest heartbeat, and when it came.
    hub_sent: (i64, Duration),
    health_due: Duration,
    repeat_due: Duration,
}

/// Tasks at once, and why none are taken.
type Told = (u32, Option<Closed>);

enum Ending {
    No,
    /// The warden was told to stop.
    Tasks {
        exit: Exit,
        until: Duration,
    },
    /// The warden has ended; results may still go out.
    Results {
        exit: Exit,
        until: Duration,
    },
}

pub struct Engine {
    p: Parts,
    owner: Owner,
    owner_due: Duration,
    inbox: mpsc::Receiver<(u64, News)>,
    news: mpsc::Sender<(u64, News)>,
    spool: Option<SpoolId>,
    attempts: Attempts,
    outflow: Outflow,
    pulls: Pulls,
    ahead: Ahead,
    /// Given to the warden, which has not answered yet.
    starting: BTreeMap<Key, Box<Grant>>,
    /// Cancels that the warden has not answered with an end yet.
    /// With whether they give no time to end by itself.
    cancelling: BTreeMap<Key, bool>,
    to_warden: VecDeque<Request>,
    /// What both speak, from its welcome.
    warden_version: u32,
    tracks: Tracks,
    record: Record,
    up: Option<Up>,
    dialling: Option<u64>,
    /// In the hello of the newest try.
    hello_told: Told,
    dial_due: Option<Duration>,
    next_no: u64,
    /// Of the newest welcome.
    link_session: Vec<u8>,
    backoff: Backoff,
    /// The next link replaces the present one under a new certificate.
    swapping: bool,
    /// The hub says that the certificate has ended, whatever this machine's clock says.
    certificate_ended: bool,
    renewing: bool,
    /// The hub wants it done before its time.
    renew_asked: bool,
    renew_retry: Duration,
    store_time_due: Duration,
    health: Health,
    status: Status,
    /// Something that the status shows has changed since it was written; what runs is listed then.
    status_stale: bool,
    status_written: Option<Duration>,
    ending: Ending,
}

impl Engine {
    pub fn new(p: Parts) -> Self {
        let (news, inbox) = mpsc::channel(INBOX);
        let owner = Owner::new(p.dir.clone());
        match (owner.closed(), owner.problem()) {
            (_, Some(problem)) => tracing::error!(%problem, "the ceiling cannot be read: no task is taken until it is mended"),
            (Some(_), None) => tracing::warn!("this node is disabled: no task is taken until `cortex-node enable`"),
            (None, None) => {}
        }
        let status = Status {
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").into(),
            node_id: p.settings.node.to_string(),
            node_name: p.settings.node_name.clone(),
            hub_id: p.settings.hub.to_string(),
            hub: p.settings.way.to_string(),
            workspace_root: p.root.path().to_owned(),
            certificate_not_after: convert::rfc3339(p.certificate.not_after_ms),
            max_tasks: owner.places(p.settings.max_tasks),
            ..Status::default()
        };
        Self {
            outflow: Outflow::new(p.dir.path()),
            health: Health::new(p.root.path()),
            inbox,
            news,
            spool: None,
            attempts: Attempts::default(),
            pulls: Pulls::default(),
            ahead: Ahead::default(),
            starting: BTreeMap::new(),
            cancelling: BTreeMap::new(),
            to_warden: VecDeque::new(),
            warden_version: 0,
            tracks: Tracks::default(),
            record: Record::open(p.dir.path()),
            up: None,
            dialling: None,
            hello_told: (0, None),
            dial_due: None,
            next_no: 1,
            link_session: p.state.link_session().unwrap_or_default(),
            backoff: Backoff::default(),
            swapping: false,
            certificate_ended: false,
            renewing: false,
            renew_asked: false,
            renew_retry: Duration::ZERO,
            store_time_due: p.clock.steady() + STORE_TIME,
            status,
            status_stale: false,
            status_written: None,
            ending: Ending::No,
            owner,
            owner_due: Duration::ZERO,
            p,
        }
    }

    fn now(&self) -> Duration {
        self.p.clock.steady()
    }

    pub async fn run(mut self) -> Exit {
        self.link_state("connecting", "waiting for the warden");
        loop {
            if let Some(exit) = self.due() {
                self.drop_link();
                if exit != Exit::Revoked {
                    self.link_state("stopped", "");
                }
                self.write_status();
                return exit;
            }
            self.hand_on();
            let sleep = self.next_due().saturating_sub(self.now());
            let up = self.up.as_ref();
            let control = up.filter(|u| u.heartbeat.is_some() || !u.control.is_empty()).map(|u| u.task_frames.clone());
            let data = up.filter(|u| !u.requests.is_empty() || self.outflow.wants()).map(|u| u.data_frames.clone());
            let to_warden = (!self.to_warden.is_empty()).then(|| self.p.warden.requests.clone());
            let warden_lives = !matches!(self.ending, Ending::Results { .. });
            tokio::select! {
                biased;
                asked = self.p.signals.recv() => match asked {
                    Some(Asked::Interrupt) => self.stop(Exit::Stopped),
                    Some(Asked::Terminate) | None => {
                        self.drop_link();
                        self.link_state("stopped", "");
                        self.write_status();
                        return Exit::Left;
                    }
                },
                event = self.p.warden.events.recv(), if warden_lives => match event {
                    Some(e) => {
                        self.on_warden(e);
                        // What came together is told together.
                        for _ in 1..EVENTS_AT_ONCE {
                            let Ok(e) = self.p.warden.events.try_recv() else { break };
                            self.on_warden(e);
                        }
                    }
                    None => self.warden_gone(),
                },
                Ok(permit) = room(to_warden) => if let Some(r) = self.to_warden.pop_front() { let _ = permit.send(r); },
                Some((no, news)) = self.inbox.recv() => self.on_news(no, news),
                Ok(permit) = room(control) => if let Some(kind) = self.next_control() { let _ = permit.send(NodeFrame { kind: Some(kind) }); },
                Ok(permit) = room(data) => if let Some(kind) = self.next_data() { let _ = permit.send(NodeData { kind: Some(kind) }); },
                () = tokio::time::sleep(sleep) => {}
            }
        }
    }

    // ---- time ----

    /// Does what is due; gives the exit when it is time.
    fn due(&mut self) -> Option<Exit> {
        let now = self.now();
        if now >= self.owner_due {
            self.look_at_owner();
        }
        match self.ending {
            Ending::Tasks { exit, until } if now >= until => return Some(exit),
            Ending::Results { exit, until } if now >= until || self.up.is_none() || !self.attempts.has_untold() => return Some(exit),
            _ => {}
        }
        if let Some(up) = &mut self.up {
            if now >= up.heard + SILENCE + STOOD_STILL {
                // Who stood still itself has not listened: what came meanwhile is heard first.
                up.heard = (now + HEARTBEAT).saturating_sub(SILENCE);
            }
            if now >= up.heard + SILENCE {
                self.lost("the hub was silent for 15 s", true);
            } else {
                if now >= up.heartbeat_due {
                    up.heartbeat_due = now + HEARTBEAT;
                    up.heartbeat_seq += 1;
                    up.heartbeat = Some(Heartbeat {
                        seq: up.heartbeat_seq,
                        sent_ms: now.as_millis() as i64,
                        echo_ms: up.hub_sent.0,
                        held_ms: now.saturating_sub(up.hub_sent.1).as_millis() as i64,
                    });
                }
                if now >= up.health_due {
                    up.health_due = now + HEALTH;
                    self.report_health();
                }
                self.repeat(now);
                self.ask_for_next(now);
                self.renew(now);
                if self.pulls.timed_out(now) {
                    self.lost("a payload did not come", true);
                }
            }
        }
        if now >= self.store_time_due {
            self.store_time_due = now + STORE_TIME;
            self.store_time();
        }
        if self.dial_due.is_some_and(|t| now >= t) {
            self.dial_due = None;
            self.dial();
        }
        self.write_status_sometimes(now);
        None
    }

    fn next_due(&self) -> Duration {
        let mut due = self.now() + Duration::from_secs(5);
        let mut also = |t: Duration| due = due.min(t);
        if let Some(u) = &self.up {
            also(u.heard + SILENCE);
            also(u.heartbeat_due);
            if let (false, Some(node_now)) = (self.renewing, self.p.time.now()) {
                let at = if self.renew_asked { 0 } else { self.p.certificate.renew_at_ms() };
                let left = at.saturating_sub(node_now).max(0) as u64;
                also((self.now() + Duration::from_millis(left)).max(self.renew_retry));
            }
        }
        if let Some(t) = self.dial_due {
            also(t);
        }
        also(self.owner_due);
        if let Ending::Tasks { until, .. } | Ending::Results { until, .. } = self.ending {
            also(until);
        }
        if let Some(at) = self.status_written.filter(|_| self.status_stale) {
            also(at + STATUS_EVERY);
        }
        due
    }

    fn repeat(&mut self, now: Duration) {
        let Some(up) = &mut self.up else { return };
        if now < up.repeat_due {
            return;
        }
        up.repeat_due = now + REPEAT;
        self.tell_all();
    }

    fn store_welcome(&self) {
        let Some(ms) = self.p.time.now() else { return };
        if let Err(error) = self.p.state.set_linked(&self.link_session, ms) {
            tracing::warn!(%error, "the welcome cannot be stored");
        }
    }

    fn store_time(&self) {
        if let Some(ms) = self.p.time.now()
            && let Err(error) = self.p.state.set_hub_time_ms(ms)
        {
            tracing::warn!(%error, "the hub's time cannot be stored");
        }
    }

    // ---- the owner ----

    /// Takes over what the owner has changed, and tells the hub.
    fn look_at_owner(&mut self) {
        self.owner_due = self.now() + OWNER_EVERY;
        if self.owner.look() {
            let closed = self.owner.closed().map(Closed::as_str);
            match self.owner.problem() {
                Some(problem) => tracing::error!(%problem, "the ceiling cannot be read: no task is taken until it is mended"),
                None => tracing::info!(closed, max_tasks = self.places(), "the owner has changed what is taken"),
            }
            if let Some(up) = &mut self.up {
                // Its answer says how the hub sees it now.
                up.health_due = Duration::ZERO;
            }
            self.show_owner();
        }
        self.tell_standing();
    }

    fn show_owner(&mut self) {
        self.status.max_tasks = self.places();
        match self.owner.closed() {
            Some(closed) => self.status.unschedulable = closed.as_str().into(),
            None if self.up.is_none() => self.status.unschedulable = "offline".into(),
            // As the hub says it.
            None => {}
        }
        (self.status_stale, self.status_written) = (true, None);
    }

    /// Tasks at once, by the settings and the ceiling.
    fn places(&self) -> u32 {
        self.owner.places(self.p.settings.max_tasks)
    }

    fn standing(&self) -> Told {
        (self.places(), self.owner.closed())
    }

    fn tell_standing(&mut self) {
        let now = self.standing();
        if let Some(up) = self.up.as_mut().filter(|u| u.told != now) {
            up.told = now;
            let (max_tasks, closed) = (now.0, now.1.map_or("", Closed::as_str).to_owned());
            up.control.push_back(node_frame::Kind::Standing(wire::Standing { max_tasks, closed }));
        }
    }

    // ---- the end ----

    fn stop(&mut self, exit: Exit) {
        if !matches!(self.ending, Ending::No) {
            return;
        }
        tracing::info!("ending tasks and the warden");
        self.to_warden.push_back(Request::Stop);
        self.ending = Ending::Tasks { exit, until: self.now() + STOP_LIMIT };
    }

    fn warden_gone(&mut self) {
        let (exit, until) = match self.ending {
            Ending::Tasks { exit, .. } => (exit, self.now() + LAST_WORDS),
            _ => {
                tracing::error!("the warden's handle ended by itself");
                (Exit::Left, self.now())
            }
        };
        self.ending = Ending::Results { exit, until };
    }

    fn revoked(&mut self, words: &str) {
        let words = words.trim_start_matches("revoked: ");
        // Kept before anything ends: whoever starts this node again goes on from here.
        if let Err(error) = self.p.state.set_revoked(words) {
            tracing::error!(%error, "the revocation cannot be kept; the hub will say it again");
        }
        let text = revoked_text(words, self.p.root.path());
        tracing::error!("{text}");
        tell(&text);
        self.drop_link();
        self.dial_due = None;
        self.link_state("revoked", words);
        self.write_status();
        match &mut self.ending {
            // It was stopping anyway, and ends as what it is now.
            Ending::Tasks { exit, .. } | Ending::Results { exit, .. } => *exit = Exit::Revoked,
            Ending::No => self.stop(Exit::Revoked),
        }
    }

    // ---- to the hub ----

    fn tell_all(&mut self) {
        for key in self.attempts.keys().collect::<Vec<_>>() {
            self.tell(&key);
        }
    }

    /// Queues what the hub must hear about one attempt now.
    fn tell(&mut self, key: &Key) {
        let now = self.now();
        let Some(up) = &mut self.up else { return };
        let outflow = &self.outflow;
        up.control.extend(self.attempts.tell(key, now, REPEAT, &self.p.sandbox_applied, |k, seq| outflow.is_durable(k, seq)));
    }

    fn free(&mut self) {
        for (key, offset) in self.outflow.take_freed() {
            self.to_warden.push_back(Request::Acked { task: key.task, attempt: key.attempt, offset });
        }
    }

    /// Gives away at once what there is room for; what is left waits for room beside all else.
    fn hand_on(&mut self) {
        // Before the warden or the hub hears of anything that it tells of.
        self.record.write();
        while !self.to_warden.is_empty()
            && let Ok(permit) = self.p.warden.requests.try_reserve()
            && let Some(request) = self.to_warden.pop_front()
        {
            permit.send(request);
        }
        let Some(up) = &mut self.up else { return };
        while (up.heartbeat.is_some() || !up.control.is_empty())
            && let Ok(permit) = up.task_frames.try_reserve()
        {
            let kind = up.heartbeat.take().map(node_frame::Kind::Heartbeat).or_else(|| up.control.pop_front());
            permit.send(NodeFrame { kind });
        }
    }

    fn next_control(&mut self) -> Option<node_frame::Kind> {
        let up = self.up.as_mut()?;
        up.heartbeat.take().map(node_frame::Kind::Heartbeat).or_else(|| up.control.pop_front())
    }

    fn next_data(&mut self) -> Option<node_data::Kind> {
        if let Some(r) = self.up.as_mut()?.requests.pop_front() {
            return Some(node_data::Kind::Payload(r));
        }
        let next = self.outflow.next_frame();
        self.free();
        match next {
            Ok(Next::Frame(f)) => Some(node_data::Kind::Output(*f)),
            Ok(Next::Settled(key)) => {
                self.tell(&key);
                None
            }
            Ok(Next::Nothing) => None,
            Err((key, error)) => {
                tracing::error!(task = %key, %error, "output cannot be read from the spool");
                // An end must be told even so; what is missing is missing.
                if self.attempts.get(&key).is_some_and(|a| a.end.is_some()) {
                    let last = self.outflow.cut(&key);
                    self.attempts.cut(&key, last);
                    self.tell(&key);
                }
                None
            }
        }
    }

    // ---- status ----

    fn link_state(&mut self, state: &str, detail: &str) {
        self.show_owner();
        if self.status.link != state {
            self.status.since = convert::rfc3339(self.p.clock.now_ms());
        }
        self.status.link = state.to_owned();
        self.status.link_detail = detail.to_owned();
    }

    fn write_status_sometimes(&mut self, now: Duration) {
        if self.status_written.is_none_or(|at| self.status_stale && now >= at + STATUS_EVERY) {
            self.write_status();
        }
    }

    fn write_status(&mut self) {
        self.status.running = self.attempts.running().chain(self.starting.keys().copied()).map(|k| k.to_string()).collect();
        self.status.write(&self.p.dir);
        (self.status_stale, self.status_written) = (false, Some(self.now()));
    }
}

/// What a revoked node says, at that moment and at each start after it.
pub fn revoked_text(words: &str, workspace: &str) -> String {
    format!("this node was revoked by its hub ({words}); its tasks are ended, its workspace stays in {workspace}")
}

/// A line for who started the daemon, if anybody still listens.
pub(super) fn tell(line: &str) {
    let _ = writeln!(std::io::stdout(), "{line}");
}

fn key(task: &str, attempt: u64) -> Option<Key> {
    Some(Key { task: task.parse().ok()?, attempt: AttemptNo(attempt) })
}

/// Waits for room in a queue; for ever when there is nothing to send.
async fn room<T>(sender: Option<mpsc::Sender<T>>) -> Result<mpsc::OwnedPermit<T>, ()> {
    match sender {
        Some(s) => s.reserve_owned().await.map_err(drop),
        None => std::future::pending().await,
    }
}

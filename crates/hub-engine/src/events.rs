//! Live events: what happens in the hub, told to those who may see it.
//!
//! An event is a hint that is published after its commit; the store holds the truth. Who was away
//! resumes after the last id it saw, and hears [`Told::Reset`] when that cannot be done without loss.

use crate::access::visible;
use crate::accounts::Authenticated;
use crate::bus::{Bus, EVENTS_KEPT, EventId, LocalBus, Next, Receiver};
use crate::error::{Error, Result};
use crate::links::{Health, Link};
use crate::records::{MessageRole, Node, Task};
use mesh_core::ceiling::Closed;
use mesh_core::permission::{Permission, Role, Thing, allows};
use mesh_core::task::{Event as TaskStep, Reason, TaskState};
use mesh_core::{ApiKeyId, LoginId, MessageId, NodeId, SessionId, TaskId, UnixMs, UserId};
use mesh_process::SharedClock;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::watch;

/// One health sample per node in this time.
const HEALTH_EVERY: Duration = Duration::from_secs(15);
/// Of a reason's detail, since a node may send a long one.
const DETAIL_CHARS: usize = 256;

/// What a reader subscribes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Topic {
    Nodes,
    Tasks,
    Sessions,
    Files,
    Approvals,
    Notifications,
    Audit,
}

impl Topic {
    pub const ALL: [Topic; 7] = [Self::Nodes, Self::Tasks, Self::Sessions, Self::Files, Self::Approvals, Self::Notifications, Self::Audit];
    /// Those that something is published on; the others are named by the contract and not built yet.
    pub const BUILT: [Topic; 3] = [Self::Nodes, Self::Tasks, Self::Sessions];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Nodes => "nodes",
            Self::Tasks => "tasks",
            Self::Sessions => "sessions",
            Self::Files => "files",
            Self::Approvals => "approvals",
            Self::Notifications => "notifications",
            Self::Audit => "audit",
        }
    }
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|t| t.as_str() == text)
    }
    /// What one needs to hear of it. An event is shown as far as this reaches from its owner.
    pub fn permission(self) -> Permission {
        match self {
            Self::Nodes => Permission::NodesRead,
            Self::Tasks | Self::Approvals | Self::Notifications => Permission::TasksRead,
            Self::Sessions | Self::Files => Permission::SessionsRead,
            Self::Audit => Permission::SystemAudit,
        }
    }
}

/// Something that happened.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    pub at: UnixMs,
    /// Whose thing it is: who may see it hangs on this.
    pub owner: UserId,
    pub data: Data,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Data {
    Node(NodeId, NodeNews),
    Task(Box<TaskNews>),
    Session(SessionId, SessionNews),
    /// Somebody's rights changed: open streams look again. No reader is shown it.
    Rights(Whose),
}

#[derive(Debug, Clone, PartialEq)]
pub enum NodeNews {
    /// A machine joined.
    Enrolled {
        name: String,
    },
    /// Its version and capabilities were told anew.
    Registered {
        version: String,
    },
    Online,
    Offline,
    Renewed {
        not_after: UnixMs,
    },
    /// Its certificate had ended, and it has a new one.
    Recovered {
        not_after: UnixMs,
    },
    Health(Health),
    Renamed {
        name: String,
    },
    /// Labels (all that selectors see), slots or the hub's bound on tasks.
    Changed {
        labels: BTreeMap<String, String>,
        slots: BTreeMap<String, u32>,
        task_limit: Option<u32>,
    },
    Draining,
    Resumed,
    Revoked,
    Removed,
    /// Two machines use its identity, and neither is given a link.
    Superseded,
    /// Its owner lets it take no work, or takes that back, or bounds anew how many tasks it takes.
    Takes {
        closed: Option<Closed>,
        max_tasks: u32,
    },
}

/// What a task's event tells: the task as it was after it.
#[derive(Debug, Clone, PartialEq)]
pub struct TaskNews {
    pub kind: TaskKind,
    pub task: TaskId,
    pub session: Option<SessionId>,
    pub node: Option<NodeId>,
    pub skill: String,
    pub state: TaskState,
    /// 1, 2, 3 … per task; 0 before the first.
    pub attempt: u32,
    pub reason: Option<Reason>,
    pub exit_code: Option<i32>,
    pub signal: Option<i32>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TaskKind {
    Accepted,
    Assigned,
    /// The task waits again: an attempt was taken back before it started, or failed and is retried.
    Requeued,
    Started,
    CancelRequested,
    /// The state is final. Told once per task.
    Ended,
}

#[derive(Debug, Clone, PartialEq)]
pub enum SessionNews {
    Created {
        name: String,
    },
    Renamed {
        name: String,
    },
    Closed,
    /// Its end had come.
    Expired,
    /// What it held is erased.
    Purged,
    Attached(NodeId),
    Detached(NodeId),
    Message {
        id: MessageId,
        role: MessageRole,
    },
}

/// Whose rights changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Whose {
    User(UserId),
    Key(ApiKeyId),
    Login(LoginId),
    /// Everybody's who has it.
    Role(Role),
}

impl Whose {
    fn concerns(self, who: &Authenticated) -> bool {
        match self {
            Self::User(id) => who.caller.user() == Some(id),
            Self::Key(id) => who.caller.key_id() == Some(id),
            Self::Login(id) => who.login == Some(id),
            Self::Role(role) => who.caller.as_person().is_some_and(|p| p.role == role),
        }
    }
}

impl Event {
    /// None for what no reader is shown.
    pub fn topic(&self) -> Option<Topic> {
        match &self.data {
            Data::Node(..) => Some(Topic::Nodes),
            Data::Task(_) => Some(Topic::Tasks),
            Data::Session(..) => Some(Topic::Sessions),
            Data::Rights(_) => None,
        }
    }
    /// What it tells of, as far as grants tell things apart.
    fn thing(&self) -> Thing<'static> {
        match &self.data {
            Data::Node(id, _) => Thing::Node(*id),
            Data::Task(news) => Thing::Task { node: news.node, session: news.session },
            Data::Session(id, _) => Thing::Session(*id),
            Data::Rights(_) => Thing::Other,
        }
    }
    /// The event's type within its topic.
    pub fn kind(&self) -> &'static str {
        match &self.data {
            Data::Node(_, n) => match n {
                NodeNews::Enrolled { .. } => "enrolled",
                NodeNews::Registered { .. } => "registered",
                NodeNews::Online => "online",
                NodeNews::Offline => "offline",
                NodeNews::Renewed { .. } => "renewed",
                NodeNews::Recovered { .. } => "recovered",
                NodeNews::Health(_) => "health",
                NodeNews::Renamed { .. } => "renamed",
                NodeNews::Changed { .. } => "changed",
                NodeNews::Draining => "draining",
                NodeNews::Resumed => "resumed",
                NodeNews::Revoked => "revoked",
                NodeNews::Removed => "removed",
                NodeNews::Superseded => "superseded",
                NodeNews::Takes { closed: Some(_), .. } => "closed",
                NodeNews::Takes { closed: None, .. } => "opened",
            },
            Data::Task(t) => match t.kind {
                TaskKind::Accepted => "accepted",
                TaskKind::Assigned => "assigned",
                TaskKind::Requeued => "requeued",
                TaskKind::Started => "started",
                TaskKind::CancelRequested => "cancel_requested",
                TaskKind::Ended => "ended",
            },
            Data::Session(_, s) => match s {
                SessionNews::Created { .. } => "created",
                SessionNews::Renamed { .. } => "renamed",
                SessionNews::Closed => "closed",
                SessionNews::Expired => "expired",
                SessionNews::Purged => "purged",
                SessionNews::Message { .. } => "message",
                SessionNews::Attached(_) => "attached",
                SessionNews::Detached(_) => "detached",
            },
            Data::Rights(_) => "rights",
        }
    }
}

/// Where the engine says what happened, and where doors listen. Clones share all of it.
#[derive(Clone)]
pub struct Events {
    bus: Arc<dyn Bus>,
    clock: SharedClock,
    /// Steady time of the last health sample that was told.
    health: Arc<Mutex<BTreeMap<NodeId, Duration>>>,
    /// How often somebody's rights were changed by this process.
    rights: watch::Sender<u64>,
}

impl fmt::Debug for Events {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Events")
    }
}

impl Events {
    pub fn new(bus: Arc<dyn Bus>, clock: SharedClock) -> Self {
        Self { bus, clock, health: Arc::default(), rights: watch::Sender::default() }
    }
    /// In this process alone.
    pub fn local(keep_for: Duration, clock: SharedClock) -> Self {
        Self::new(Arc::new(LocalBus::new(EVENTS_KEPT, keep_for, clock.clone())), clock)
    }

    pub fn tell(&self, owner: UserId, data: Data) {
        self.bus.publish(Event { at: self.clock.now_ms(), owner, data });
    }

    fn health_told(&self) -> MutexGuard<'_, BTreeMap<NodeId, Duration>> {
        self.health.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn online(&self, link: &Link) {
        self.tell(link.owner, Data::Node(link.node, NodeNews::Online));
    }
    pub fn offline(&self, link: &Link) {
        self.health_told().remove(&link.node);
        self.tell(link.owner, Data::Node(link.node, NodeNews::Offline));
    }
    /// What the owner of a linked node lets it take now.
    pub fn takes(&self, link: &Link) {
        let news = NodeNews::Takes { closed: link.closed, max_tasks: link.own_tasks };
        self.tell(link.owner, Data::Node(link.node, news));
    }
    pub fn node(&self, node: &Node, news: NodeNews) {
        self.tell(node.owner, Data::Node(node.id, news));
    }
    pub fn enrolled(&self, node: &Node) {
        self.tell(node.owner, Data::Node(node.id, NodeNews::Enrolled { name: node.name.clone() }));
    }
    pub fn registered(&self, node: &Node, version: String) {
        self.tell(node.owner, Data::Node(node.id, NodeNews::Registered { version }));
    }
    /// A sample of a linked node, at most one in a while, and none while nobody listens.
    pub fn health(&self, link: &Link, health: Health) {
        if self.bus.readers() == 0 {
            return;
        }
        let now = self.clock.steady();
        let mut told = self.health_told();
        if told.get(&link.node).is_some_and(|t| now.saturating_sub(*t) < HEALTH_EVERY) {
            return;
        }
        told.insert(link.node, now);
        drop(told);
        self.tell(link.owner, Data::Node(link.node, NodeNews::Health(health)));
    }

    /// A task that is in the journal now, perhaps with its first attempt.
    pub fn accepted(&self, task: &Task) {
        let mut news = TaskNews::of(TaskKind::Accepted, task);
        if !task.is_parent() {
            (news.state, news.node, news.attempt) = (TaskState::Pending, None, 0);
        }
        self.tell(task.actor.user, Data::Task(Box::new(news)));
        if task.progress.attempt.is_some() {
            self.task(TaskKind::Assigned, task);
        }
    }
    /// A transition that was committed, and the task after it.
    pub fn stepped(&self, task: &Task, step: &TaskStep) {
        let ended = task.progress.state.is_final();
        match step {
            TaskStep::Assigned { .. } => self.task(TaskKind::Assigned, task),
            TaskStep::Started { .. } => self.task(TaskKind::Started, task),
            TaskStep::CancelRequested { .. } => self.task(TaskKind::CancelRequested, task),
            _ if ended => {}
            // The hub asks its node for the end.
            TaskStep::DeadlinePassed => self.task(TaskKind::CancelRequested, task),
            TaskStep::Granted { .. } => {}
            _ => self.task(TaskKind::Requeued, task),
        }
        if ended {
            self.task(TaskKind::Ended, task);
        }
    }
    fn task(&self, kind: TaskKind, task: &Task) {
        self.tell(task.actor.user, Data::Task(Box::new(TaskNews::of(kind, task))));
    }

    pub fn session(&self, id: SessionId, owner: UserId, news: SessionNews) {
        self.tell(owner, Data::Session(id, news));
    }

    /// What was remembered of anybody's rights counts no more, and streams look them up again at once,
    /// not only each minute. To be said after the commit.
    pub fn rights_changed(&self, whose: Whose) {
        self.rights.send_modify(|n| *n += 1);
        self.tell(UserId::from_bytes([0; 16]), Data::Rights(whose));
    }

    /// Counts changes of rights.
    pub fn rights(&self) -> watch::Receiver<u64> {
        self.rights.subscribe()
    }

    /// Opens a stream. Without `topics`: all that the caller may read.
    pub fn open(&self, who: Authenticated, topics: Option<Vec<Topic>>, after: Option<&EventId>) -> Result<Feed> {
        let may = |t: &Topic| visible(&who.caller, t.permission());
        let topics = match topics {
            Some(mut asked) => {
                asked.sort();
                asked.dedup();
                for t in &asked {
                    may(t)?;
                }
                if let Some(t) = asked.iter().find(|t| !Topic::BUILT.contains(t)) {
                    return Err(Error::Invalid {
                        code: "not_yet",
                        detail: format!("the topic {} is not built yet; leave it out", t.as_str()),
                    });
                }
                asked
            }
            None => Topic::BUILT.into_iter().filter(|t| may(t).is_ok()).collect(),
        };
        if topics.is_empty() {
            return Err(Error::Forbidden("there is no topic that you may read".into()));
        }
        Ok(Feed { receiver: self.bus.subscribe(after), who, topics, begun: false })
    }
}

impl TaskNews {
    fn of(kind: TaskKind, task: &Task) -> Self {
        let p = &task.progress;
        Self {
            kind,
            task: task.id,
            session: task.session,
            node: p.attempt.as_ref().map(|a| a.node),
            skill: task.skill.clone(),
            state: p.state,
            attempt: p.attempt.as_ref().map_or(0, |a| a.no.ordinal()),
            reason: p.reason.as_ref().map(|r| Reason::new(r.code, r.detail.chars().take(DETAIL_CHARS).collect::<String>())),
            exit_code: p.exit_code,
            signal: p.signal,
        }
    }
}

/// One reader's stream: its topics, as far as its rights reach.
pub struct Feed {
    receiver: Box<dyn Receiver>,
    who: Authenticated,
    topics: Vec<Topic>,
    begun: bool,
}

/// What a feed gives.
#[derive(Debug)]
pub enum Told {
    Event(EventId, Arc<Event>),
    /// Events were missed; those from now on follow.
    Reset {
        id: EventId,
        /// It happened under way, since the reader was too slow.
        behind: bool,
    },
    /// The reader's rights may have changed: [`Feed::set_rights`] before anything more is told.
    LookAgain,
}

impl Feed {
    pub fn topics(&self) -> &[Topic] {
        &self.topics
    }
    pub fn who(&self) -> &Authenticated {
        &self.who
    }
    pub fn position(&self) -> Option<EventId> {
        self.receiver.position()
    }
    /// Waits for what this reader may see. Dropping the future loses nothing.
    pub async fn next(&mut self) -> Told {
        loop {
            let next = self.receiver.next().await;
            let behind = std::mem::replace(&mut self.begun, true);
            match next {
                Next::Reset(id) => return Told::Reset { id, behind },
                Next::Event(id, event) => match (&event.data, event.topic()) {
                    (Data::Rights(whose), _) if whose.concerns(&self.who) => return Told::LookAgain,
                    (_, Some(t)) if self.topics.contains(&t) && allows(&self.who.caller, t.permission(), event.owner, event.thing()) => {
                        return Told::Event(id, event);
                    }
                    _ => {}
                },
            }
        }
    }
    /// Takes the rights of now; an error when a topic may not be read any more.
    pub fn set_rights(&mut self, who: Authenticated) -> Result<()> {
        for t in &self.topics {
            visible(&who.caller, t.permission())?;
        }
        self.who = who;
        Ok(())
    }
}

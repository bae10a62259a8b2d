//! What the hub keeps, in the words of the engine. Stores map these to rows, doors to JSON.

mod agents;

pub use agents::*;

use mesh_core::audit;
use mesh_core::capability::Capabilities;
use mesh_core::fan;
use mesh_core::output::Digests;
use mesh_core::permission::{Permissions, Role, Scope, Thing};
use mesh_core::seal::Intent;
use mesh_core::select::Offers;
use mesh_core::task::{
    Action, AttemptNo, Event, NeverStarted, OnLost, Outcome, Progress, Reason, ReasonCode, Refused, TaskState, Terms, step, verdict,
};
use mesh_core::{
    AgentId, ApiKeyId, DeviceId, Digest, EntryId, GrantId, HubId, InviteId, LoginId, MessageId, NodeId, SessionId, TaskId, UnixMs, UserId,
};
use std::collections::BTreeMap;
use std::net::IpAddr;

/// Facts about this deployment that its database holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HubMeta {
    pub id: HubId,
    /// Begins every attempt number; raised by a restore.
    pub incarnation: u32,
    pub created_at: UnixMs,
}

/// The store was restored from a backup, and its hub holds back until somebody says go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Restored {
    /// When the backup was put in place.
    pub at: UnixMs,
    /// When the backup was made.
    pub backup_at: UnixMs,
    /// The word to go has been given, and what it asks for is not done yet.
    pub go: bool,
}

/// How many nodes the database knows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct NodeCounts {
    /// All of them.
    pub known: u64,
    pub revoked: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    pub id: UserId,
    pub username: String,
    pub role: Role,
    /// PHC string (argon2id).
    pub password_hash: String,
    pub created_at: UnixMs,
}

/// How a person stands with the hub.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    Active,
    /// Has no password yet; chooses one by the link that was sent, until then.
    Invited {
        until: UnixMs,
    },
    /// May not log in, and no key of theirs counts.
    Disabled,
    Removed {
        at: UnixMs,
    },
}

/// A person as those see them who administer the hub.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UserEntry {
    pub id: UserId,
    /// None once it is erased.
    pub username: Option<String>,
    pub role: Role,
    pub standing: Standing,
    pub created_at: UnixMs,
}

/// A link to choose a password by. `mac` is HMAC-SHA256 of its token under a key outside the database.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UserInvite {
    pub mac: Digest,
    pub expires_at: UnixMs,
}

/// What is changed of a person. None leaves a thing as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct UserChange {
    pub username: Option<String>,
    pub role: Option<Role>,
    /// Disabled persons have no log-ins.
    pub disabled: Option<bool>,
    /// Takes the place of the link before it.
    pub invite: Option<UserInvite>,
    /// Of a password; every log-in ends.
    pub password_hash: Option<String>,
}

/// What became of a change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum UserChanged {
    Done {
        before: UserEntry,
        now: UserEntry,
    },
    Unknown,
    NameTaken,
    /// Nobody would be left who can administer the hub.
    LastAdmin,
    /// They have a password, and need no link.
    HasPassword,
}

/// A person who is removed, and what becomes of what was theirs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leaving {
    pub user: UserId,
    /// To whom their nodes, sessions and agents pass.
    pub successor: UserId,
    /// Whether running work of theirs is cancelled, or finishes.
    pub cancel: bool,
    /// What tells who they were is erased.
    pub purge: bool,
    pub at: UnixMs,
}

/// What became of a removal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Removal {
    Done,
    Unknown,
    LastAdmin,
    /// The successor is not an active person with this least of roles: developer.
    NoSuccessor,
}

/// One link of a refresh chain. `mac` is HMAC-SHA256 of the token under a key outside the database.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RefreshToken {
    pub mac: Digest,
    pub login: LoginId,
    pub user: UserId,
    pub expires_at: UnixMs,
}

/// A log-in, as the person whose it is sees it. It lives while its family of refresh tokens does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    pub id: DeviceId,
    pub user: UserId,
    pub name: String,
    /// What its program called itself, shortened.
    pub user_agent: Option<String>,
    /// Where it logged in from; None: this machine, by the control socket.
    pub first_address: Option<IpAddr>,
    /// Where it was used from last.
    pub address: Option<IpAddr>,
    pub last_seen_at: UnixMs,
    /// None: nobody has said yet, it is new.
    pub trusted: Option<bool>,
}

/// What of a device is set anew.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DeviceChange {
    pub name: Option<String>,
    pub trusted: Option<bool>,
}

/// What became of a refresh.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Rotation {
    Rotated {
        user: UserId,
        login: LoginId,
    },
    /// It had been used before: the whole family is ended now.
    Reused {
        user: UserId,
        login: LoginId,
    },
    /// Unknown, expired or ended.
    Unknown,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiKey {
    pub id: ApiKeyId,
    pub user: UserId,
    pub name: String,
    /// The first characters of the secret, to recognise it by.
    pub prefix: String,
    pub mac: Digest,
    pub scopes: Vec<Scope>,
    pub created_at: UnixMs,
    pub expires_at: Option<UnixMs>,
    pub last_used_at: Option<UnixMs>,
}

/// What somebody may do with something that is not theirs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grant {
    pub id: GrantId,
    pub subject: Subject,
    pub resource: Resource,
    /// At least one.
    pub permissions: Permissions,
    pub created_by: UserId,
    pub created_at: UnixMs,
    pub expires_at: Option<UnixMs>,
}

/// To whom something is granted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Subject {
    User(UserId),
    /// Everybody who has it.
    Role(Role),
}

/// On what something is granted.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Resource {
    Node(NodeId),
    Session(SessionId),
    Agent(String),
    /// The nodes that have all of these at the time, as selectors see them; at least one.
    Labels(BTreeMap<String, String>),
}

/// Which grants a list shows: those that one person made, and those made to any of some.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GrantFilter {
    pub made_by: Option<UserId>,
    pub to: Vec<Subject>,
}

impl GrantFilter {
    pub fn has(&self, g: &Grant) -> bool {
        self.made_by == Some(g.created_by) || self.to.contains(&g.subject)
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Invite {
    pub id: InviteId,
    pub owner: UserId,
    /// Ed25519; the seed leaves the hub once and is not kept.
    pub public_key: [u8; 32],
    pub name: Option<String>,
    pub labels: BTreeMap<String, String>,
    pub created_at: UnixMs,
    pub expires_at: UnixMs,
    pub revoked_at: Option<UnixMs>,
    pub used: Option<InviteUse>,
    /// Stay on the entry until seen.
    pub notices: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InviteUse {
    pub at: UnixMs,
    /// SHA-256 of the key that used it.
    pub spki: Digest,
    pub node: NodeId,
}

/// What became of a claim, decided in one atomic statement.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Claim {
    Claimed,
    /// The same key came again within ten minutes, since the answer was lost: the same certificate.
    Again {
        node: Box<Node>,
    },
    Expired,
    Revoked,
    /// Used before, by another key or too long ago; the owner is told by a notice.
    Used,
    Unknown,
    /// The same key came again, and its node was removed meanwhile.
    Removed,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    pub id: NodeId,
    pub name: String,
    pub owner: UserId,
    /// The owner's. What selectors see is [`Node::all_labels`].
    pub labels: BTreeMap<String, String>,
    /// The owner's; none: the GPUs found.
    pub slots: Option<BTreeMap<String, u32>>,
    /// As many as the machine itself takes at once.
    pub max_tasks: u32,
    /// The hub's own bound on that; see [`Node::takes_at_once`].
    pub task_limit: Option<u32>,
    /// Takes no new work, until it is resumed.
    pub draining: bool,
    /// That of the registry when this row was last changed by people: the higher is the newer.
    pub epoch: u64,
    pub version: String,
    pub capabilities: Capabilities,
    pub created_at: UnixMs,
    pub last_seen_at: Option<UnixMs>,
    /// Raised each time a hello is accepted: fences the frames of older links.
    pub generation: u64,
    pub certificate: NodeCertificate,
    pub revoked_at: Option<UnixMs>,
    pub notices: Vec<String>,
    /// The sequence of the trust bundle that it has said it has; 0 before the first.
    pub bundle_seq: u64,
}

/// Labels that the hub sets from what the machine says of itself, and nobody else can.
pub const HUB_LABELS: [&str; 3] = ["os", "arch", "hostname"];

impl Node {
    /// What an act on it is done to.
    pub fn thing(&self) -> (UserId, Thing<'static>) {
        (self.owner, Thing::Node(self.id))
    }
    /// The owner's labels and those that the hub sets: `os`, `arch`, `hostname` and each runtime found.
    pub fn all_labels(&self) -> BTreeMap<String, String> {
        let c = &self.capabilities;
        let mut all = self.labels.clone();
        all.extend(c.runtimes.iter().map(|(name, version)| (name.clone(), version.clone())));
        all.extend(HUB_LABELS.map(str::to_owned).into_iter().zip([&c.os, &c.arch, &c.hostname].map(String::clone)));
        all
    }
    /// May only the hub set this label of this machine?
    pub fn is_hub_label(&self, key: &str) -> bool {
        HUB_LABELS.contains(&key) || self.capabilities.runtimes.contains_key(key)
    }
    /// Tasks at once, when the machine itself takes `own`.
    pub fn takes_at_once(&self, own: u32) -> u32 {
        self.task_limit.map_or(own, |limit| own.min(limit))
    }
    /// What placement sees of it. Slots default to the GPUs found.
    pub fn offers(&self) -> Offers {
        let gpus = self.capabilities.gpus.len() as u32;
        let found = || if gpus == 0 { BTreeMap::new() } else { [("gpu".to_owned(), gpus)].into() };
        let slots = self.slots.clone().unwrap_or_else(found);
        Offers { labels: self.all_labels(), skills: self.capabilities.skills.keys().cloned().collect(), slots }
    }
}

/// What people change of a node. None leaves a thing as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NodeChange {
    pub name: Option<String>,
    /// Replaces the owner's labels as a whole.
    pub labels: Option<BTreeMap<String, String>>,
    /// `Some(None)`: the GPUs found, again.
    pub slots: Option<Option<BTreeMap<String, u32>>>,
    /// `Some(None)`: no bound of the hub.
    pub task_limit: Option<Option<u32>>,
    pub draining: Option<bool>,
}

/// What people changed in the registry after some epoch.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RegistryChanges {
    /// All changes up to here are told.
    pub epoch: u64,
    /// As they are now; a revoked one says so.
    pub nodes: Vec<Node>,
    pub removed: Vec<NodeId>,
    /// Whose rights were changed, or ended.
    pub users: Vec<UserId>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeCertificate {
    /// SHA-256 of the SubjectPublicKeyInfo (DER) of the node's identity key.
    pub spki: Digest,
    pub der: Vec<u8>,
    pub not_after: UnixMs,
    /// 0 at enrolment; each renewal names the next.
    pub counter: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Session {
    pub id: SessionId,
    pub owner: UserId,
    pub name: String,
    pub created_at: UnixMs,
    pub expires_at: UnixMs,
    pub ttl_ms: i64,
    pub closed_at: Option<UnixMs>,
    /// When its end had come and was written down. That, and not the clock, makes it expired: a task
    /// that runs keeps its session.
    pub expired_at: Option<UnixMs>,
    /// When its erasure was asked for.
    pub purged_at: Option<UnixMs>,
    /// That it was made on; None: by a key.
    pub device: Option<DeviceId>,
    /// In the order in which they were attached.
    pub nodes: Vec<NodeId>,
}

impl Session {
    /// What an act on it is done to.
    pub fn thing(&self) -> (UserId, Thing<'static>) {
        (self.owner, Thing::Session(self.id))
    }
    pub fn is_active(&self) -> bool {
        self.closed_at.is_none() && self.expired_at.is_none()
    }
}

/// What of a session is set anew.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SessionChange {
    pub name: Option<String>,
    pub ttl_ms: Option<i64>,
}

/// What became of the start of a session's erasure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PurgeStart {
    Begun,
    /// It was erased before, to the end.
    Done,
    /// It is still active.
    Active,
    /// A task of it has not ended.
    TasksOpen,
    Unknown,
}

/// The part of an erasure that one step did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PurgeStep {
    /// There is more; its tasks are erased up to this one.
    Until(Option<TaskId>),
    Done,
}

/// What happened in a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SessionAct {
    Created,
    Renamed,
    Attached,
    Detached,
    Closed,
    Expired,
    Purged,
    Message,
    MemorySet,
    MemoryRemoved,
}

impl SessionAct {
    pub const ALL: [Self; 10] = [
        Self::Created,
        Self::Renamed,
        Self::Attached,
        Self::Detached,
        Self::Closed,
        Self::Expired,
        Self::Purged,
        Self::Message,
        Self::MemorySet,
        Self::MemoryRemoved,
    ];
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Renamed => "renamed",
            Self::Attached => "attached",
            Self::Detached => "detached",
            Self::Closed => "closed",
            Self::Expired => "expired",
            Self::Purged => "purged",
            Self::Message => "message",
            Self::MemorySet => "memory_set",
            Self::MemoryRemoved => "memory_removed",
        }
    }
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|a| a.as_str() == text)
    }
}

/// A place in a session's activity. Sorts by time; the number tells lines of one id apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place(pub EntryId, pub u8);

impl Place {
    /// A line of the session's own; a task's acceptance; a task's end.
    pub const OWN: u8 = 0;
    pub const ACCEPTED: u8 = 1;
    pub const ENDED: u8 = 2;

    /// Where a task's end stands: at that time, told apart as the tasks' ids are.
    pub fn of_end(task: TaskId, at: UnixMs) -> Self {
        let tail: [u8; 10] = task.as_bytes()[6..].try_into().expect("an id has 16 bytes");
        Self(EntryId::from_parts(at, tail), Self::ENDED)
    }
    pub fn of_acceptance(task: TaskId) -> Self {
        Self(EntryId::from_bytes(*task.as_bytes()), Self::ACCEPTED)
    }
}

/// A line of a session's activity.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Activity {
    pub place: Place,
    pub at: UnixMs,
    pub actor: Option<UserId>,
    pub what: Happened,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Happened {
    /// `subject` is a name, a key, or the id of a node or message.
    Session {
        act: SessionAct,
        subject: String,
    },
    TaskAccepted {
        task: TaskId,
        skill: String,
    },
    TaskEnded {
        task: TaskId,
        skill: String,
        state: TaskState,
        reason: Option<ReasonCode>,
    },
}

/// Some items, and whether there are more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part<T> {
    pub items: Vec<T>,
    pub more: bool,
}

/// What a session remembers under one key. The value is JSON, which the engine does not read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryEntry {
    pub id: EntryId,
    pub session: SessionId,
    pub key: String,
    pub value: Vec<u8>,
    pub updated_at: UnixMs,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryKey {
    pub id: EntryId,
    pub key: String,
    pub bytes: u64,
    pub updated_at: UnixMs,
}

/// What became of a write into a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Written {
    Done,
    /// There is nothing under this key.
    Absent,
    /// It has as many keys as it may have.
    Full,
    /// The session is not there, or has ended.
    Ended,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MessageRole {
    System,
    User,
    Assistant,
    Tool,
}

impl MessageRole {
    pub const ALL: [Self; 4] = [Self::System, Self::User, Self::Assistant, Self::Tool];
    pub fn as_str(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
            Self::Tool => "tool",
        }
    }
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|r| r.as_str() == text)
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    pub id: MessageId,
    pub session: SessionId,
    pub role: MessageRole,
    pub content: String,
    pub created_at: UnixMs,
}

/// What an agent keeps under one key. The value is JSON, which the engine does not read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateEntry {
    pub id: EntryId,
    pub agent: String,
    pub key: String,
    /// Who wrote the agent's first key.
    pub owner: UserId,
    pub value: Vec<u8>,
    pub updated_at: UnixMs,
}

/// Which entries a list of state shows. Every field narrows.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StateFilter {
    pub within: Option<Within>,
    pub agent: Option<String>,
    pub key: Option<String>,
}

/// What became of a write of state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StateWritten {
    Done,
    /// The agent belongs to somebody else than the entry says.
    Foreign,
    Full,
}

/// How much the hub keeps.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StorageUse {
    /// On its disk.
    pub database_bytes: u64,
    /// Of these, what is in use: a database keeps the room of what was erased for what comes. PostgreSQL
    /// gives an estimate, of tasks alone.
    pub journal_bytes: u64,
    /// Of output files.
    pub output_bytes: u64,
    /// The disk of the data folder, and what is free of it; 0 where nobody knows.
    pub disk_bytes: u64,
    pub disk_free_bytes: u64,
}

/// What one step of retention has erased.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Erased {
    pub tasks: u32,
    pub bytes: u64,
}

/// Who asked, through what.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Actor {
    pub user: UserId,
    pub key: Option<ApiKeyId>,
    /// Of a run of an agent: whose run it is.
    pub agent: Option<AgentId>,
    /// rest, socket, …
    pub door: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Task {
    pub id: TaskId,
    pub session: Option<SessionId>,
    /// The node that the caller named.
    pub named_node: Option<NodeId>,
    pub actor: Actor,
    pub skill: String,
    /// The canonical encoding; see `mesh_core::spec`. Empty when it is long and the task was read without it.
    pub spec: Vec<u8>,
    pub digest: Digest,
    /// MAC over the sealed intent.
    pub seal: Digest,
    pub timeout_secs: u64,
    /// 0 waits for ever.
    pub queue_secs: u64,
    pub terms: Terms,
    /// The time in its id.
    pub created_at: UnixMs,
    pub progress: Progress,
    pub output: OutputTotals,
    /// Of all that its newest attempt wrote, as the node told at its end.
    pub digests: Option<Digests>,
    /// Of skills without a process.
    pub result: Option<Vec<u8>>,
    pub sandbox_applied: Option<String>,
    /// The key that signed the newest order, and the digest of the policy in it.
    pub signed: Option<(String, Digest)>,
    /// The fan-out that it is a child of.
    pub parent: Option<TaskId>,
    /// Of a fan-out's parent, which is never placed itself.
    pub children: Option<Children>,
}

/// How the children of a parent stand.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Children {
    pub total: u32,
    /// States that none is in are left out.
    pub by_state: BTreeMap<TaskState, u32>,
}

impl Children {
    pub fn of<'t>(children: impl IntoIterator<Item = &'t Task>) -> Self {
        let mut all = Self::default();
        for child in children {
            all.total += 1;
            *all.by_state.entry(child.progress.state).or_default() += 1;
        }
        all
    }
}

/// Attempts that an accepted task may have.
pub const MAX_ATTEMPTS: u32 = 1000;

impl Task {
    /// The node that it is on, was on last, or is meant for.
    pub fn node(&self) -> Option<NodeId> {
        self.progress.attempt.as_ref().map(|a| a.node).or(self.named_node)
    }
    /// What an act on it is done to.
    pub fn thing(&self) -> (UserId, Thing<'static>) {
        (self.actor.user, Thing::Task { node: self.node(), session: self.session })
    }
    pub fn is_parent(&self) -> bool {
        self.children.is_some()
    }
    /// Decides one transition: a parent's, or that of a task which runs somewhere.
    pub fn decide(&self, event: &Event, now: UnixMs) -> Result<(Progress, Vec<Action>), Refused> {
        if self.is_parent() { fan::step(&self.progress, event, now) } else { step(&self.terms, &self.progress, event, now) }
    }
    /// What was permitted at acceptance, rebuilt from the stored row; its seal shows whether the row
    /// is still the accepted one.
    pub fn intent(&self) -> Intent {
        Intent {
            task: self.id,
            spec: self.digest,
            actor: self.actor.user,
            node: self.named_node,
            timeout_secs: self.timeout_secs,
            accepted_at: self.created_at,
            max_attempts: MAX_ATTEMPTS,
            terms: self.terms.clone(),
        }
    }
}

/// Counts of an attempt's output that is durable here.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct OutputTotals {
    pub durable_seq: u64,
    /// Bytes that the program wrote, kept or not.
    pub stdout_bytes: u64,
    pub stderr_bytes: u64,
    /// The end of what is kept: the first frames, up to `limits.output_bytes`.
    pub kept_seq: u64,
    pub truncated: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutputFrame {
    pub seq: u64,
    pub t_ms: UnixMs,
    pub stream: Stream,
    pub data: bytes::Bytes,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    Stdout,
    Stderr,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TaskEvent {
    /// 1, 2, 3 … per task.
    pub seq: u64,
    pub at: UnixMs,
    pub kind: String,
    pub attempt: Option<AttemptNo>,
    /// The state after it.
    pub state: TaskState,
    pub node: Option<NodeId>,
    pub detail: String,
}

impl TaskEvent {
    /// The history of a task that was just accepted: `accepted`, and `assigned` when it has an attempt
    /// already.
    pub fn first(task: &Task) -> Vec<Self> {
        let nodes = task.children.as_ref().map(|c| format!(" on {} nodes", c.total));
        let accepted = Self {
            seq: 1,
            at: task.created_at,
            kind: "accepted".into(),
            attempt: None,
            state: if task.is_parent() { task.progress.state } else { TaskState::Pending },
            node: None,
            detail: format!("{} by {}{}", task.skill, task.actor.door, nodes.unwrap_or_default()),
        };
        let assigned = task.progress.attempt.as_ref().map(|a| {
            let event = Event::Assigned { attempt: a.no, node: a.node, granted: a.granted };
            Self::of(2, task.progress.assigned_at.unwrap_or(task.created_at), &event, task)
        });
        std::iter::once(accepted).chain(assigned).collect()
    }

    /// The line of history for an event that led to `task` as it is now.
    pub fn of(seq: u64, at: UnixMs, event: &Event, task: &Task) -> Self {
        let p = &task.progress;
        let node = event.attempt().and(p.attempt.as_ref()).map(|a| a.node);
        let detail = match event {
            Event::Assigned { node, granted: Some(_), .. } => format!("{node} may start"),
            Event::Assigned { node, granted: None, .. } => format!("{node} must ask before it starts"),
            Event::Granted { .. } => "may start now".into(),
            Event::Withdrawn { .. } => "taken back before it was granted".into(),
            Event::Started { .. } => String::new(),
            Event::Ended { outcome: Outcome::NeverStarted(NeverStarted::Late), .. } if p.reason.is_none() => {
                "the node had it too late to start it".into()
            }
            Event::Ended { outcome, .. } => {
                let lost = matches!(outcome, Outcome::Lost { .. });
                with_retry(task, at, lost, sentence(p.reason.clone().or_else(|| verdict(outcome, None).1)))
            }
            Event::NodeRevoked { .. } => with_retry(task, at, true, String::new()),
            Event::NodeSilent { .. } => with_retry(task, at, true, "its node was away too long".into()),
            Event::CancelRequested { reason } => reason.as_str().into(),
            Event::DeadlinePassed => String::new(),
            Event::Expired { detail } => detail.clone(),
            Event::Restored | Event::ChildrenEnded { .. } => sentence(p.reason.clone()),
        };
        Self { seq, at, kind: event.kind().into(), attempt: event.attempt(), state: p.state, node, detail }
    }
}

fn sentence(reason: Option<Reason>) -> String {
    match reason {
        None => "succeeded".into(),
        Some(r) if r.detail.is_empty() => r.code.as_str().into(),
        Some(r) => format!("{}: {}", r.code.as_str(), r.detail),
    }
}

/// How an attempt ended, and what follows.
fn with_retry(task: &Task, at: UnixMs, lost: bool, end: String) -> String {
    let Some(retry_at) = task.progress.retry_at else { return end };
    let between = if end.is_empty() { "" } else { "; " };
    let pause = retry_at.saturating_sub(at);
    if lost && task.terms.on_lost == OnLost::Requeue {
        return format!("{end}{between}run again in {pause} ms, as on_lost asks");
    }
    format!("{end}{between}retry {} of {} in {pause} ms", task.progress.retried, task.terms.retries)
}

/// What a caller may see who may not see everything: what they own, and what was granted to them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Within {
    pub owner: Option<UserId>,
    pub nodes: Vec<NodeId>,
    pub sessions: Vec<SessionId>,
    pub agents: Vec<String>,
}

impl Within {
    pub fn owned_by(user: UserId) -> Self {
        Self { owner: Some(user), ..Self::default() }
    }
    pub fn has_invite(&self, i: &Invite) -> bool {
        self.owner == Some(i.owner)
    }
    pub fn has_node(&self, n: &Node) -> bool {
        self.owner == Some(n.owner) || self.nodes.contains(&n.id)
    }
    pub fn has_session(&self, s: &Session) -> bool {
        self.owner == Some(s.owner) || self.sessions.contains(&s.id)
    }
    pub fn has_entry(&self, e: &StateEntry) -> bool {
        self.owner == Some(e.owner) || self.agents.contains(&e.agent)
    }
    pub fn has_task(&self, t: &Task) -> bool {
        self.owner == Some(t.actor.user)
            || t.session.is_some_and(|s| self.sessions.contains(&s))
            || t.node().is_some_and(|n| self.nodes.contains(&n))
    }
}

/// Which tasks a list shows. Every field narrows.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TaskFilter {
    pub within: Option<Within>,
    pub session: Option<SessionId>,
    pub node: Option<NodeId>,
    pub user: Option<UserId>,
    pub state: Option<TaskState>,
    pub skill: Option<String>,
    /// Children of this one.
    pub parent: Option<TaskId>,
    /// Inclusive.
    pub since: Option<UnixMs>,
    /// Exclusive.
    pub until: Option<UnixMs>,
}

/// What a list of audit entries is narrowed to. Texts are compared as they are.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AuditFilter {
    pub kind: Option<audit::Kind>,
    pub user: Option<UserId>,
    pub session: Option<SessionId>,
    /// The id of what something was done to.
    pub resource: Option<String>,
    pub outcome: Option<audit::Outcome>,
    pub door: Option<String>,
    pub since: Option<UnixMs>,
    pub until: Option<UnixMs>,
}

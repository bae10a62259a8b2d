//! What the engine needs from the world. Each port is narrow, each has a contract suite in
//! `hub-testkit` that every implementation passes.
//!
//! A method that writes returns once the write is durable (committed and synced).

use crate::audit;
use crate::records::*;
use crate::rotation::{Phase, Step};
use async_trait::async_trait;
use mesh_core::audit::{Head, Row, Signed};
use mesh_core::fan::ChildEnd;
use mesh_core::output::Digests;
use mesh_core::task::{Action, AttemptNo, Event, Refused, TaskState};
use mesh_core::{
    AgentId, ApiKeyId, AuditId, ChainId, DeviceId, Digest, EntryId, GrantId, InviteId, LoginId, MessageId, NodeId, SessionId, TaskId,
    UnixMs, UserId,
};
use std::collections::BTreeMap;
use std::net::IpAddr;
use tokio::sync::watch;

/// A store that failed, and at what.
#[derive(Debug, thiserror::Error)]
#[error("{operation}: {source}")]
pub struct StoreError {
    pub operation: &'static str,
    #[source]
    pub source: Box<dyn std::error::Error + Send + Sync>,
}

impl StoreError {
    pub fn new(operation: &'static str, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self { operation, source: source.into() }
    }

    /// Is it for want of room? A layer between may have kept the words alone, so they count: those of
    /// the system and of SQLite do not change, and PostgreSQL repeats the system's.
    pub fn is_full(&self) -> bool {
        let mut error: Option<&(dyn std::error::Error + 'static)> = Some(&*self.source);
        while let Some(e) = error {
            let io = e.downcast_ref::<std::io::Error>().map(std::io::Error::kind);
            let text = e.to_string();
            if matches!(io, Some(std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded))
                || ["database or disk is full", "No space left on device"].iter().any(|words| text.contains(words))
            {
                return true;
            }
            error = e.source();
        }
        false
    }
}

pub type Stored<T> = Result<T, StoreError>;

/// A page of a list by creation, newest first: at most `limit` items older than `before`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window<Id> {
    pub before: Option<Id>,
    pub limit: u32,
}

/// What one event did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Applied {
    /// The task after it, and what must now happen.
    Done(Box<Task>, Vec<Action>),
    Refused(Refused),
    Unknown,
}

/// What is written beside an event, in the same commit.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Besides {
    pub result: Option<Vec<u8>>,
    pub sandbox_applied: Option<String>,
    pub signed: Option<(String, Digest)>,
    /// Of the output of the event's attempt.
    pub digests: Option<Digests>,
}

/// A *narrow* task is one whose `spec` is empty if it is longer than `mesh_core::spec::INLINE_SPEC_BYTES`.
#[async_trait]
pub trait Journal: Send + Sync {
    /// Writes a new task and its history: `accepted`, and `assigned` when it has an attempt already,
    /// all in one commit.
    async fn accept(&self, task: &Task) -> Stored<()>;
    /// The same of a parent and its children, of which all are written or none.
    async fn accept_fan(&self, fan: &Fan) -> Stored<()>;
    /// Runs `mesh_core::task::step` on the stored state and writes what it decides, with a line of
    /// history, in one commit; concurrent events on one task are serialised. A start may be seen before
    /// it is synced: it is durable with the next write.
    ///
    /// The task that it answers with is narrow, except when an order must follow.
    async fn apply(&self, id: TaskId, event: &Event, besides: Besides, now: UnixMs) -> Stored<Applied>;
    async fn task(&self, id: TaskId) -> Stored<Option<Task>>;
    /// The task, narrow: for who looks at it again and again.
    async fn narrow(&self, id: TaskId) -> Stored<Option<Task>>;
    /// Narrow tasks. A time is compared with the one in a task's id.
    async fn tasks(&self, filter: &TaskFilter, window: Window<TaskId>) -> Stored<Vec<Task>>;
    /// The specs of `ids`, in their order, until about `max_bytes` (at least one); none for an unknown id.
    async fn specs(&self, ids: &[TaskId], max_bytes: usize) -> Stored<Vec<(TaskId, Vec<u8>)>>;
    /// At most `limit` narrow tasks that are not final, oldest first, newer than `after`; of one session, or all.
    async fn open_tasks(&self, session: Option<SessionId>, after: Option<TaskId>, limit: u32) -> Stored<Vec<Task>>;
    async fn history(&self, id: TaskId) -> Stored<Vec<TaskEvent>>;
    /// How the children of a parent ended, in any order; None while one of them is open. To know that takes
    /// as long as one row, however many there are.
    async fn ends_of(&self, parent: TaskId) -> Stored<Option<Vec<ChildEnd>>>;
}

/// One task for each of many nodes, before it is written.
#[derive(Debug, Clone)]
pub struct Fan {
    pub parent: Task,
    /// At least one; each has its node named.
    pub children: Vec<Task>,
}

impl Fan {
    /// The parent first.
    pub fn tasks(&self) -> impl Iterator<Item = &Task> {
        std::iter::once(&self.parent).chain(&self.children)
    }
}

/// A thing that a caller's key makes once.
#[derive(Debug, Clone)]
pub enum Creation {
    Task(Box<Task>),
    Fan(Box<Fan>),
    Session(Session),
    Invite(Invite),
    Key(ApiKey),
    Grant(Grant),
    User(User, Option<UserInvite>),
    Agent(Box<Agent>),
}

impl Creation {
    /// Its id as text.
    pub fn id(&self) -> String {
        match self {
            Self::Task(t) => t.id.to_string(),
            Self::Fan(f) => f.parent.id.to_string(),
            Self::Session(s) => s.id.to_string(),
            Self::Invite(i) => i.id.to_string(),
            Self::Key(k) => k.id.to_string(),
            Self::Grant(g) => g.id.to_string(),
            Self::User(u, _) => u.id.to_string(),
            Self::Agent(a) => a.id.to_string(),
        }
    }
}

/// A request that makes one thing, however often it comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Once {
    /// Digest of who asked, by what call, under which key.
    pub scope: Digest,
    /// Digest of what was asked.
    pub request: Digest,
    pub at: UnixMs,
    /// What was remembered at or before this counts as forgotten.
    pub since: UnixMs,
}

/// What a key has made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Known {
    pub request: Digest,
    /// The id of the thing, as text.
    pub thing: String,
}

#[async_trait]
pub trait Idempotency: Send + Sync {
    /// Writes the thing and remembers it by its scope, in one commit. Gives what the scope had made
    /// before, if anything; then nothing is written. Of many at once exactly one writes.
    async fn create(&self, thing: Creation, once: &Once) -> Stored<Option<Known>>;
    /// What the scope has made after `since`.
    async fn known(&self, scope: &Digest, since: UnixMs) -> Stored<Option<Known>>;
    /// Forgets what was remembered at or before `until`, at most `limit` of it; gives how many.
    async fn forget(&self, until: UnixMs, limit: u32) -> Stored<u64>;
}

#[async_trait]
pub trait Output: Send + Sync {
    /// Adds frames of one attempt. Frames at or below the durable seq are dropped as repeated; a gap
    /// is refused by `None`. The newest attempt's totals are the task's. Up to `keep_bytes` of data are
    /// kept, the rest is counted. Concurrent calls share syncs and commits.
    async fn append(&self, task: TaskId, attempt: AttemptNo, frames: Vec<OutputFrame>, keep_bytes: u64) -> Stored<Option<OutputTotals>>;
    /// Zero totals for an attempt that has none.
    async fn totals(&self, task: TaskId, attempt: AttemptNo) -> Stored<OutputTotals>;
    /// Of all that the attempt has written so far; `None` when not all of it is kept.
    async fn digests(&self, task: TaskId, attempt: AttemptNo) -> Stored<Option<Digests>>;
    /// Kept frames after `after_seq`, in order, until about `max_bytes` of data (at least one frame).
    async fn read(&self, task: TaskId, attempt: AttemptNo, after_seq: u64, max_bytes: usize) -> Stored<Vec<OutputFrame>>;
    /// The last `max_bytes` of one stream.
    async fn tail(&self, task: TaskId, attempt: AttemptNo, stream: Stream, max_bytes: usize) -> Stored<Vec<u8>>;
    /// Frames up to `to_seq` that are not here never come: they count as durable, and from there on
    /// nothing is kept (truncated). Where nothing is missing, nothing changes.
    async fn give_up(&self, task: TaskId, attempt: AttemptNo, to_seq: u64) -> Stored<()>;
}

#[async_trait]
pub trait NodeDirectory: Send + Sync {
    async fn add_invite(&self, invite: &Invite) -> Stored<()>;
    async fn invite(&self, id: InviteId) -> Stored<Option<Invite>>;
    async fn invites(&self, within: Option<&Within>, window: Window<InviteId>) -> Stored<Vec<Invite>>;
    /// False when it is unknown or was used.
    async fn revoke_invite(&self, id: InviteId, now: UnixMs) -> Stored<bool>;
    /// Uses the invite for `node.certificate.spki` and adds `node`, in one atomic statement and commit.
    /// `again_ms` is how long the same key gets the same answer.
    async fn claim_invite(&self, id: InviteId, node: &Node, now: UnixMs, again_ms: i64) -> Stored<Claim>;

    async fn node(&self, id: NodeId) -> Stored<Option<Node>>;
    /// Newest first.
    async fn nodes(&self, within: Option<&Within>, window: Window<NodeId>) -> Stored<Vec<Node>>;
    async fn nodes_named(&self, name: &str) -> Stored<Vec<Node>>;
    async fn count_nodes(&self) -> Stored<NodeCounts>;
    async fn register(&self, id: NodeId, version: &str, capabilities: &mesh_core::capability::Capabilities) -> Stored<()>;
    /// Raises and returns the generation; notes the time as seen. None when it is unknown or revoked.
    async fn raise_generation(&self, id: NodeId, now: UnixMs) -> Stored<Option<u64>>;
    async fn seen(&self, ids: &[NodeId], now: UnixMs) -> Stored<()>;
    /// Notes the sequence of the trust bundle that it has, where that is higher than what is known.
    async fn note_bundle(&self, id: NodeId, seq: u64) -> Stored<()>;
    /// Adds a line for people to its entry, with the time behind it; beyond a fixed number none.
    async fn add_notice(&self, id: NodeId, words: &str, now: UnixMs) -> Stored<()>;
    /// Replaces the certificate when its counter is one above the stored and the node is not revoked;
    /// false otherwise.
    async fn renew(&self, id: NodeId, certificate: &NodeCertificate) -> Stored<bool>;

    /// Changes a node and raises the epoch, in one commit. None when it is unknown or revoked.
    async fn change_node(&self, id: NodeId, change: &NodeChange) -> Stored<Option<Node>>;
    /// Revokes it for good and raises the epoch, in one commit; the first revocation keeps its time.
    /// None when it is unknown.
    async fn revoke_node(&self, id: NodeId, now: UnixMs) -> Stored<Option<Node>>;
    /// Takes the node and its attachments to sessions away, keeps its id as a removed one and raises the
    /// epoch, in one commit. False when it is unknown.
    async fn remove_node(&self, id: NodeId, now: UnixMs) -> Stored<bool>;
    /// Was there such a node, which was removed?
    async fn was_removed(&self, id: NodeId) -> Stored<bool>;
    /// Those of `ids` that are there and not revoked, in any order.
    async fn living(&self, ids: &[NodeId]) -> Stored<Vec<NodeId>>;
    /// What was changed after `epoch`, by whichever hub. Nothing that was committed up to the epoch in
    /// the answer is missing from it.
    async fn changed_since(&self, epoch: u64) -> Stored<RegistryChanges>;
    /// The epoch of now.
    async fn registry_epoch(&self) -> Stored<u64>;
}

#[async_trait]
pub trait Accounts: Send + Sync {
    /// False when the name (ASCII case ignored) is taken.
    async fn add_user(&self, user: &User) -> Stored<bool>;
    /// Only who may act: nobody who is disabled, was removed, or was invited and has not accepted.
    async fn user(&self, id: UserId) -> Stored<Option<User>>;
    /// The same.
    async fn user_named(&self, username: &str) -> Stored<Option<User>>;
    /// The first admin who may act.
    async fn oldest_admin(&self) -> Stored<Option<User>>;
    /// All who are there, whether or not they may act.
    async fn count_users(&self) -> Stored<u64>;
    /// Sets the hash in place of `was`, and ends every log-in of the user but `keep`. False when another one
    /// stands there.
    async fn set_password(&self, id: UserId, was: &str, hash: &str, keep: Option<LoginId>) -> Stored<bool>;

    /// Adds a log-in and its first refresh token, and takes away what has ended of the same user's, in
    /// one commit.
    async fn add_login(&self, device: &Device, token: &RefreshToken) -> Stored<()>;
    /// Marks `old` as used and adds `new_mac` in its family, in one commit.
    async fn rotate_refresh(&self, old: &Digest, new_mac: &Digest, new_expires_at: UnixMs, now: UnixMs) -> Stored<Rotation>;
    /// Whose token this is or was: those of a log-in are known for as long as any of its row is there.
    async fn refresh_of(&self, mac: &Digest) -> Stored<Option<(UserId, LoginId)>>;
    async fn end_login(&self, login: LoginId) -> Stored<()>;
    /// One that lives: its log-in has a refresh token that is neither used up nor ended.
    async fn device(&self, id: DeviceId, now: UnixMs) -> Stored<Option<Device>>;
    /// Those of a user that live, newest first.
    async fn devices(&self, user: UserId, now: UnixMs, window: Window<DeviceId>) -> Stored<Vec<Device>>;
    async fn change_device(&self, id: DeviceId, change: &DeviceChange) -> Stored<()>;
    async fn device_seen(&self, id: DeviceId, address: Option<IpAddr>, now: UnixMs) -> Stored<()>;

    async fn add_key(&self, key: &ApiKey) -> Stored<()>;
    async fn key_by_mac(&self, mac: &Digest) -> Stored<Option<ApiKey>>;
    async fn key(&self, id: ApiKeyId) -> Stored<Option<ApiKey>>;
    async fn keys(&self, user: UserId, window: Window<ApiKeyId>) -> Stored<Vec<ApiKey>>;
    async fn remove_key(&self, id: ApiKeyId) -> Stored<bool>;
    async fn key_used(&self, id: ApiKeyId, now: UnixMs) -> Stored<()>;
}

/// What was granted. What has expired counts as gone, and goes with the next grant to the same subject;
/// what is granted on a node, a session or an agent goes with that.
#[async_trait]
pub trait Grants: Send + Sync {
    /// Fails when what it is on is not there.
    async fn add_grant(&self, grant: &Grant) -> Stored<()>;
    async fn grant(&self, id: GrantId, now: UnixMs) -> Stored<Option<Grant>>;
    /// Newest first; without a filter all.
    async fn grants(&self, filter: Option<&GrantFilter>, now: UnixMs, window: Window<GrantId>) -> Stored<Vec<Grant>>;
    async fn remove_grant(&self, id: GrantId) -> Stored<bool>;
}

/// The people of the hub: how they come, change and leave. The last admin who may act stays one: that is
/// decided in the write.
#[async_trait]
pub trait Users: Send + Sync {
    /// Adds a person; with an invite, the hash of their password is empty. False when the name (ASCII
    /// case ignored) is taken.
    async fn create_user(&self, user: &User, invite: Option<&UserInvite>) -> Stored<bool>;
    /// Also one who was removed.
    async fn user_entry(&self, id: UserId) -> Stored<Option<UserEntry>>;
    /// None for who was removed.
    async fn entry_named(&self, username: &str) -> Stored<Option<UserEntry>>;
    /// Newest first, without those who were removed.
    async fn user_entries(&self, window: Window<UserId>) -> Stored<Vec<UserEntry>>;
    async fn change_user(&self, id: UserId, change: &UserChange, now: UnixMs) -> Stored<UserChanged>;
    /// Whose link this is, if it can be used now.
    async fn invited(&self, mac: &Digest, now: UnixMs) -> Stored<Option<UserId>>;
    /// Uses the link up and sets the password, in one commit. None when it cannot be used (any more).
    async fn accept_invite(&self, mac: &Digest, hash: &str, now: UnixMs) -> Stored<Option<UserEntry>>;
    /// Removes a person with their log-ins and keys, and revokes the invites of machines that they made and
    /// nobody used, in one commit. What they own is handed over afterwards, until [`Users::left`].
    async fn remove_user(&self, leaving: &Leaving) -> Stored<Removal>;
    /// Hands up to `limit` nodes and as many sessions, and one agent, over to the successor of somebody who
    /// leaves, and removes their log-ins and keys. True when there was nothing left of any of it.
    async fn hand_over(&self, user: UserId, limit: u32) -> Stored<bool>;
    /// Those who were removed and have not left yet, in any order.
    async fn leaving(&self, limit: u32) -> Stored<Vec<Leaving>>;
    async fn left(&self, user: UserId) -> Stored<()>;
    /// Erases what tells who a removed person was; their id stays. False when no such person was removed.
    async fn erase_user(&self, id: UserId) -> Stored<bool>;
}

/// The newest lines of a session's own activity that are kept.
pub const ACTIVITY_KEPT: u32 = 10_000;
/// How many older ones may still be there: they go some at a time.
pub const ACTIVITY_OVER: u32 = 256;

#[async_trait]
pub trait Sessions: Send + Sync {
    async fn add_session(&self, session: &Session) -> Stored<()>;
    async fn session(&self, id: SessionId) -> Stored<Option<Session>>;
    async fn sessions(&self, within: Option<&Within>, window: Window<SessionId>) -> Stored<Vec<Session>>;
    /// False when it is unknown or was closed before. One that has expired can still be closed, one
    /// that was purged cannot.
    async fn close_session(&self, id: SessionId, by: Option<UserId>, now: UnixMs) -> Stored<bool>;
    /// Idempotent; slides the end.
    async fn attach(&self, id: SessionId, node: NodeId, by: Option<UserId>, now: UnixMs) -> Stored<()>;
    /// False when it was not attached; slides the end.
    async fn detach(&self, id: SessionId, node: NodeId, by: Option<UserId>, now: UnixMs) -> Stored<bool>;
    /// Slides the end: `expires_at = now + ttl`. False when there is no such active session.
    async fn touch_session(&self, id: SessionId, now: UnixMs) -> Stored<bool>;
    /// Sets what `change` has, and slides the end. False when there is no such active session.
    async fn change_session(&self, id: SessionId, change: &SessionChange, by: Option<UserId>, now: UnixMs) -> Stored<bool>;
    /// Ends as expired up to `limit` active sessions whose end has come, and gives them with their
    /// owners. The end of one with a task that is assigned or running slides on, as does that of one
    /// whose last task ended less than its time to live ago.
    async fn expire_sessions(&self, now: UnixMs, limit: u32) -> Stored<Vec<(SessionId, UserId)>>;
    /// The earliest end of an active session.
    async fn next_end(&self) -> Stored<Option<UnixMs>>;
    /// What happened in it, newest first: at most `limit` lines before `before`. Lines of tasks come
    /// from the tasks themselves; all others were written in the commit of what they tell, and of them the
    /// newest [`ACTIVITY_KEPT`] are there, and at most [`ACTIVITY_OVER`] more.
    async fn activity(&self, id: SessionId, before: Option<Place>, limit: u32) -> Stored<Vec<Activity>>;
}

/// The erasure of what a session held: first what rows hold, step by step, then files. What was begun
/// and not finished is found again by [`Purges::purging`].
#[async_trait]
pub trait Purges: Send + Sync {
    /// Marks an ended session without open tasks.
    async fn begin_purge(&self, id: SessionId, by: Option<UserId>, now: UnixMs) -> Stored<PurgeStart>;
    /// Erases up to `limit` keys, messages or lines of activity, and once these are gone the output and
    /// results of up to `limit` tasks after `after`.
    async fn purge_step(&self, id: SessionId, after: Option<TaskId>, limit: u32) -> Stored<PurgeStep>;
    async fn purging(&self, limit: u32) -> Stored<Vec<SessionId>>;
    /// Removes up to `limit` files that no row counts on any more; gives how many there were.
    async fn sweep(&self, limit: u32) -> Stored<u32>;
}

/// The erasure of what was kept long enough. Only tasks that have ended are touched, in steps of one
/// commit each; files go by [`Purges::sweep`].
#[async_trait]
pub trait Retention: Send + Sync {
    /// Erases the output and results of up to `limit` tasks that ended before `before`, first those that
    /// ended first. One whose output was erased so is passed over from then on.
    async fn erase_output(&self, before: UnixMs, limit: u32) -> Stored<Erased>;
    /// Erases the output and results of up to `limit` tasks with output in files, the oldest first,
    /// until `enough` bytes are gone.
    async fn erase_files(&self, enough: u64, limit: u32) -> Stored<Erased>;
    /// Takes away up to `limit` tasks that ended before `before`, first those that ended first, with all
    /// that is theirs, until about `enough` bytes of the database are gone. A parent goes with its children, and
    /// they with it: then there may be more than `limit`.
    async fn erase_tasks(&self, before: UnixMs, enough: u64, limit: u32) -> Stored<Erased>;
}

/// What sessions remember, by key. A write slides the session's end.
#[async_trait]
pub trait Memory: Send + Sync {
    /// Adds the entry or sets its value; one that was there keeps its id.
    async fn put_memory(&self, entry: &MemoryEntry, by: Option<UserId>, most: u32) -> Stored<Written>;
    async fn memory(&self, session: SessionId, key: &str) -> Stored<Option<MemoryEntry>>;
    /// Newest first.
    async fn memory_keys(&self, session: SessionId, window: Window<EntryId>) -> Stored<Vec<MemoryKey>>;
    async fn remove_memory(&self, session: SessionId, key: &str, by: Option<UserId>, now: UnixMs) -> Stored<Written>;
}

#[async_trait]
pub trait Messages: Send + Sync {
    /// Adds a message and slides the session's end; gives it with an id that is above all of its
    /// session. `None` when the session is not there or has ended.
    async fn add_message(&self, message: &Message, by: Option<UserId>) -> Stored<Option<Message>>;
    /// Newest first: at least one, if there is one, and then as many as `limit` and about `max_bytes` of
    /// content allow.
    async fn messages(&self, session: SessionId, window: Window<MessageId>, max_bytes: u64) -> Stored<Part<Message>>;
}

/// What agents keep, by agent and key.
#[async_trait]
pub trait AgentState: Send + Sync {
    /// Adds the entry or sets its value; one that was there keeps its id. An agent with no entry comes
    /// to belong to `entry.owner`.
    async fn put_state(&self, entry: &StateEntry, most: u32) -> Stored<StateWritten>;
    async fn state(&self, agent: &str, key: &str) -> Stored<Option<StateEntry>>;
    /// Whose a name is: theirs who have an entry under it, or an agent of that name.
    async fn state_owner(&self, agent: &str) -> Stored<Option<UserId>>;
    /// Newest first: at least one, if there is one, and then as many as `limit` and about `max_bytes` of
    /// values allow.
    async fn states(&self, filter: &StateFilter, window: Window<EntryId>, max_bytes: u64) -> Stored<Part<StateEntry>>;
    /// False when there is no such entry of this owner.
    async fn remove_state(&self, agent: &str, key: &str, owner: UserId) -> Stored<bool>;
}

/// Agents, and their logs. A name is one person's at a time: theirs who have an agent of that name, or state
/// under it; and of one name one agent lives.
#[async_trait]
pub trait Agents: Send + Sync {
    /// Adds an agent; the config of a basic one is the first line of its log. Under a key ([`Idempotency::create`])
    /// a name that cannot be had is an error.
    async fn add_agent(&self, agent: &Agent) -> Stored<Spawned>;
    /// Runs `mesh_core::agent::step` on the stored life and writes what it decides, with a line of the log, in one
    /// commit. The log keeps about the newest `keep_bytes`.
    async fn apply_agent(&self, id: AgentId, event: &mesh_core::agent::Event, now: UnixMs, keep_bytes: u64) -> Stored<AgentApplied>;
    async fn agent(&self, id: AgentId) -> Stored<Option<Agent>>;
    /// Newest first.
    async fn agents(&self, filter: &AgentFilter, window: Window<AgentId>) -> Stored<Vec<Agent>>;
    /// At most `limit` that have not ended, oldest first, newer than `after`.
    async fn living_agents(&self, after: Option<AgentId>, limit: u32) -> Stored<Vec<Agent>>;
    /// Within what a caller may see; statuses that no agent is in are left out.
    async fn agents_by_status(&self, within: Option<&Within>) -> Stored<BTreeMap<mesh_core::agent::Status, u64>>;
    /// Adds what a run wrote, cut into lines; gives the seq up to which all of the source is taken. Frames that were
    /// taken before are dropped as repeated. A gap is refused by `None`, unless `from_here` says that what is
    /// missing never comes.
    async fn add_log(
        &self,
        id: AgentId,
        source: LogSource,
        frames: Vec<OutputFrame>,
        from_here: bool,
        keep_bytes: u64,
    ) -> Stored<Option<u64>>;
    /// Up to which seq the source is taken.
    async fn log_mark(&self, id: AgentId, source: LogSource) -> Stored<u64>;
    /// At most `limit` lines from `offset` on, or from the oldest that is there, and about `max_bytes` of them (at
    /// least one, if there is one).
    async fn log(&self, id: AgentId, offset: u64, limit: u32, max_bytes: usize) -> Stored<LogPage>;
    /// Takes away up to `limit` agents that ended before `before`, with their logs; gives how many.
    async fn erase_agents(&self, before: UnixMs, limit: u32) -> Stored<u64>;
}

/// How much there is.
#[async_trait]
pub trait Gauges: Send + Sync {
    /// States that no task is in are left out. It may take as long as there are tasks.
    async fn tasks_by_state(&self) -> Stored<BTreeMap<TaskState, u64>>;
    async fn storage(&self) -> Stored<StorageUse>;
}

#[async_trait]
pub trait Meta: Send + Sync {
    /// The deployment's facts; made from `fresh` when the store is new.
    async fn hub(&self, fresh: HubMeta) -> Stored<HubMeta>;
    /// After a restore: raises the incarnation, to `least` at least, and marks the store as restored from
    /// a backup of `backup_at`, in one commit. Fails when there is no hub yet or no higher number left.
    async fn mark_restored(&self, at: UnixMs, backup_at: UnixMs, least: u32) -> Stored<HubMeta>;
    /// None when it never was, or has been released since.
    async fn restored(&self) -> Stored<Option<Restored>>;
    /// Notes the word to go; false when the store is not marked.
    async fn ask_go(&self) -> Stored<bool>;
    /// Takes the mark away.
    async fn released(&self) -> Stored<()>;
    /// A cheap read that shows the store answers.
    async fn ping(&self) -> Stored<()>;
}

/// The audit log, as rows: one chain for each hub process, appended to and never changed, but for what is
/// erased beside the rows. A write of any port takes along the entry that [`audit::ticket`] gives, in its
/// own commit, when it changes anything.
#[async_trait]
pub trait Audit: Send + Sync {
    /// From here on this process appends to `chain`. When that has no row, `first` becomes it.
    async fn begin(&self, chain: ChainId, first: &audit::Entry) -> Stored<()>;
    /// Adds an entry by itself.
    async fn add_entry(&self, entry: &audit::Entry) -> Stored<()>;
    /// Where this process's chain stands, as far as it is durable.
    fn head(&self) -> watch::Receiver<Head>;
    /// Of all chains, in any order.
    async fn heads(&self) -> Stored<Vec<Head>>;
    /// Rows of a chain after `after` and up to `to`, in order. One that cannot be read is there all the same
    /// and does not verify.
    async fn rows(&self, chain: ChainId, after: u64, to: u64, limit: u32) -> Stored<Vec<Row>>;
    /// Of all chains, newest first.
    async fn entries(&self, filter: &AuditFilter, window: Window<AuditId>) -> Stored<Vec<Row>>;
    /// Keeps a checkpoint of one chain. The same again is the same as once.
    async fn add_checkpoint(&self, signed: &Signed) -> Stored<()>;
    /// Of a chain, beyond `after`, in order.
    async fn checkpoints(&self, chain: ChainId, after: u64, limit: u32) -> Stored<Vec<Signed>>;
    /// The seq of the newest checkpoint of each chain that has one.
    async fn newest_checkpoints(&self) -> Stored<Vec<(ChainId, u64)>>;
    /// Erases who the user was and what else is known of up to `limit` of their entries; gives how many.
    async fn erase_person(&self, user: UserId, limit: u32) -> Stored<u64>;
}

/// Checkpoints outside the database, where whoever changes that does not reach them. All of it blocks.
pub trait Witness: Send + Sync {
    /// Adds a checkpoint of one chain; it is on the disk when this returns.
    fn note(&self, signed: &Signed) -> std::io::Result<()>;
    /// The chains that there are, and how many bytes are noted of each.
    fn chains(&self) -> std::io::Result<Vec<(ChainId, u64)>>;
    /// The first `bytes` of what was noted of a chain, in its order; a line that was not finished is left out.
    fn read_to(&self, chain: ChainId, bytes: u64) -> std::io::Result<Noted>;
    fn read(&self, chain: ChainId) -> std::io::Result<Noted> {
        self.read_to(chain, u64::MAX)
    }
}

pub type Noted = Box<dyn Iterator<Item = std::io::Result<Signed>> + Send>;

/// Keys that never leave their holder. Answers are signatures, seals and certificates.
pub trait Keyring: Send + Sync {
    /// Signs an envelope; gives the key's id and the signature.
    fn sign(&self, payload_type: &str, body: &[u8]) -> (String, [u8; 64]);
    /// The same for who believes only these keys, by their ids: by the newest of them that may sign, and by the
    /// oldest for who believes none or does not say.
    fn sign_for(&self, _believed: &[String], payload_type: &str, body: &[u8]) -> (String, [u8; 64]) {
        self.sign(payload_type, body)
    }
    /// Public keys that sign or have signed the audit log; the one that signs now is the first.
    fn signers(&self) -> Vec<[u8; 32]> {
        vec![]
    }
    /// Id of the key that signs now.
    fn key_id(&self) -> String;
    fn seal(&self, intent: &mesh_core::seal::Intent) -> Digest;
    fn is_sealed(&self, intent: &mesh_core::seal::Intent, seal: &Digest) -> bool;
    /// HMAC of a token under a key outside the database.
    fn token_mac(&self, token: &str) -> Digest;
    /// A signed access token (JWT, EdDSA) for this hub's doors.
    fn issue_access(&self, user: UserId, login: LoginId, now: UnixMs, expires_at: UnixMs) -> String;
    /// Whose it is, if it is genuine and lives.
    fn read_access(&self, token: &str, now: UnixMs) -> Option<(UserId, LoginId)>;
    /// Is this certificate by a root that still counts?
    fn counts(&self, _certificate: &[u8]) -> bool {
        true
    }
    /// Signs a client certificate for a node's key (SubjectPublicKeyInfo, DER). Nothing but the key is
    /// taken from the node. By the newest root that it believes (SHA-256 of their SubjectPublicKeyInfo), and
    /// by the oldest when it believes none or does not say.
    fn issue_certificate(&self, node: NodeId, spki_der: &[u8], now: UnixMs, not_after: UnixMs, believed: &[Digest]) -> Stored<Vec<u8>>;
}

/// The hub's roots and task keys, as far as a rotation must know them.
#[async_trait]
pub trait Authority: Send + Sync {
    /// The phase, and the sequence of the bundle that says so.
    fn stands(&self) -> (Phase, u64);
    /// Is this certificate by the root that issues now?
    fn issues(&self, certificate: &[u8]) -> bool;
    /// Durable before it answers, and then true for everything that is given out.
    async fn step(&self, step: Step, now: UnixMs) -> Stored<()>;
}

/// Password hashing, bounded in how many run at once and how many wait; beyond that it says `busy`.
#[async_trait]
pub trait Passwords: Send + Sync {
    async fn hash(&self, password: String) -> crate::Result<String>;
    /// Takes the same time when there is no hash to compare with.
    async fn verify(&self, password: String, hash: Option<String>) -> crate::Result<bool>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn want_of_room_is_known_below_other_words() {
        #[derive(Debug, thiserror::Error)]
        #[error("writing a segment")]
        struct Above(#[source] std::io::Error);
        let full = || std::io::Error::from(std::io::ErrorKind::StorageFull);
        assert!(StoreError::new("x", full()).is_full());
        assert!(StoreError::new("x", Above(full())).is_full());
        assert!(StoreError::new("x", "the transaction failed: (code: 13) database or disk is full").is_full());
        assert!(StoreError::new("x", "could not extend file \"base/1\": No space left on device").is_full());
        assert!(!StoreError::new("x", Above(std::io::ErrorKind::PermissionDenied.into())).is_full());
        assert!(!StoreError::new("x", "UNIQUE constraint failed").is_full());
    }
}

//! The audit: who did what, to which thing, when, from where and how it ended.
//!
//! A door puts each call into a [`scope`]. An engine entry says in its first line what is being done
//! ([`doing`]), and where it knows more, [`about`] what. The first write of that call that changes anything
//! takes the entry along, so that a change and its entry are one commit. What changed nothing, was denied
//! or failed leaves its entry when the scope ends, also when its caller has hung up.

mod log;
mod verify;

pub use log::{Log, Reading};
pub use verify::{Export, HeadReport, Report};

use mesh_core::audit::{Detail, Kind, Outcome, Person, Row, Salt};
use mesh_core::permission::{Caller, Permission, Thing, Via};
use mesh_core::{
    AgentId, ApiKeyId, AuditId, ChainId, DeviceId, Digest, GrantId, InviteId, LoginId, NodeId, SessionId, TaskId, UnixMs, UserId, sha256,
};
use mesh_process::entropy;
use std::collections::BTreeMap;
use std::fmt::Display;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

macro_rules! actions {
    ($($kind:ident { $($name:ident = $text:literal),* $(,)? })*) => {
        /// What can be done. One line makes another.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Action { $($($name),*),* }
        impl Action {
            pub const ALL: &'static [Action] = &[$($(Action::$name),*),*];
            pub fn as_str(self) -> &'static str { match self { $($(Self::$name => $text),*),* } }
            pub fn kind(self) -> Kind { match self { $($(Self::$name => Kind::$kind),*),* } }
        }
    };
}

actions! {
    Authentication {
        Login = "auth.login", Refresh = "auth.refresh", Logout = "auth.logout", Authenticate = "auth.token",
    }
    AuthorizationDenied { Read = "access.read" }
    UserChanged {
        PasswordChange = "password.change", KeyCreate = "key.create", KeyRemove = "key.remove",
        UserCreate = "user.create", UserAccept = "user.accept", UserChange = "user.change", UserRemove = "user.remove",
        DeviceChange = "device.change", DeviceRemove = "device.remove", GrantCreate = "grant.create", GrantRemove = "grant.remove",
    }
    NodeLifecycle {
        InviteCreate = "invite.create", InviteRevoke = "invite.revoke", NodeEnrol = "node.enrol", NodeRecover = "node.recover",
        NodeRenew = "node.renew", NodeChange = "node.change", NodeDrain = "node.drain", NodeResume = "node.resume",
        NodeRevoke = "node.revoke", NodeRemove = "node.remove",
    }
    SessionLifecycle {
        SessionCreate = "session.create", SessionChange = "session.change", SessionClose = "session.close",
        SessionPurge = "session.purge", SessionAttach = "session.attach", SessionDetach = "session.detach",
    }
    TaskLifecycle {
        TaskDispatch = "task.dispatch", TaskCancel = "task.cancel", TaskInput = "task.input",
        AgentSpawn = "agent.spawn", AgentKill = "agent.kill",
    }
    FileChanged {
        MemoryPut = "memory.put", MemoryRemove = "memory.remove", MessagePost = "message.post",
        StatePut = "state.put", StateRemove = "state.remove",
    }
    SystemChanged {
        AuditBegin = "audit.begin", AuditRead = "audit.read", AuditExport = "audit.export", AuditVerify = "audit.verify",
        AuditSuppress = "audit.suppress", HubRestore = "hub.restore", HubGo = "hub.go", CaRotate = "ca.rotate",
    }
}

/// What something was done to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Resource {
    pub kind: &'static str,
    pub id: String,
    session: Option<SessionId>,
}

impl Resource {
    pub fn new(kind: &'static str, id: impl Display) -> Self {
        Self { kind, id: bounded(id), session: None }
    }
}

macro_rules! resources {
    ($($id:ident = $kind:literal),*) => {$(
        impl From<$id> for Resource {
            fn from(id: $id) -> Self { Self::new($kind, id) }
        }
    )*};
}
resources!(
    UserId = "user",
    ApiKeyId = "key",
    InviteId = "invite",
    NodeId = "node",
    TaskId = "task",
    AgentId = "agent",
    LoginId = "login",
    DeviceId = "device",
    GrantId = "grant",
    ChainId = "audit"
);

impl From<SessionId> for Resource {
    fn from(id: SessionId) -> Self {
        Self { session: Some(id), ..Self::new("session", id) }
    }
}

/// Characters of one text, and texts of one detail: what a caller sends must not fill the log.
const MAX_TEXT: usize = 200;
const MAX_PAIRS: usize = 16;

fn bounded(text: impl Display) -> String {
    text.to_string().chars().take(MAX_TEXT).collect()
}

/// An entry before it has its place in a chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub id: AuditId,
    pub at: UnixMs,
    pub kind: Kind,
    pub action: Action,
    pub user: Option<UserId>,
    pub key: Option<ApiKeyId>,
    pub via: Via,
    pub resource: Resource,
    pub session: Option<SessionId>,
    pub outcome: Outcome,
    pub detail: BTreeMap<String, String>,
    /// For the two parts that can be erased.
    pub salts: [Salt; 2],
}

impl Entry {
    pub fn new(action: Action, at: UnixMs, via: Via) -> Self {
        let id = AuditId::from_parts(at, entropy::bytes());
        let kind = action.kind();
        let (user, key, resource, session, outcome) = (None, None, Resource::default(), None, Outcome::Ok);
        Self {
            id,
            at,
            kind,
            action,
            user,
            key,
            via,
            resource,
            session,
            outcome,
            detail: BTreeMap::new(),
            salts: [entropy::bytes(), entropy::bytes()],
        }
    }
    /// What the hub does of its own.
    pub fn of_hub(action: Action, at: UnixMs) -> Self {
        Self::new(action, at, Via::default())
    }
    pub fn with(mut self, key: &str, value: impl Display) -> Self {
        self.detail.insert(key.to_owned(), bounded(value));
        self
    }
    /// The row behind `prev`.
    pub fn row(&self, chain: ChainId, seq: u64, prev: Digest, username: &str) -> Row {
        let person = Person {
            username: username.to_owned(),
            address: self.via.address.map(|a| a.to_string()),
            request_id: self.via.request_id.as_deref().map(str::to_owned),
        };
        let (person, detail) = (person.encode(&self.salts[0]), Detail(self.detail.clone()).encode(&self.salts[1]));
        let mut row = Row {
            chain,
            seq,
            id: self.id,
            at: self.at,
            kind: self.kind.as_str().into(),
            action: self.action.as_str().into(),
            user: self.user,
            key: self.key,
            agent: None,
            door: self.via.door.into(),
            resource_kind: self.resource.kind.into(),
            resource_id: self.resource.id.clone(),
            outcome: self.outcome.as_str().into(),
            session: self.session,
            person_digest: sha256(&person),
            detail_digest: sha256(&detail),
            prev,
            hash: [0; 32],
            person: Some(person),
            detail: Some(detail),
        };
        row.hash = row.digest();
        row
    }
}

/// How a call ended, as its door knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    Done,
    /// Said to be forbidden, or without credentials that count.
    Refused,
    /// Said not to be there: it may be hidden from this caller.
    Absent,
    Failed,
}

impl Ending {
    pub fn of<T>(outcome: &crate::Result<T>) -> Self {
        match outcome {
            Ok(_) => Self::Done,
            Err(crate::Error::Forbidden(_) | crate::Error::Unauthenticated(_)) => Self::Refused,
            Err(crate::Error::NotFound(_)) => Self::Absent,
            Err(_) => Self::Failed,
        }
    }
}

/// One call at a door, until its entry is written.
struct Call {
    log: Arc<Log>,
    via: Via,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    entry: Option<Entry>,
    /// Whoever asks again is not asked twice: the entry of this call has been written.
    written: bool,
    /// What is asked for was done before, and is not done again.
    repeated: bool,
    denied: Option<(Option<UserId>, Option<ApiKeyId>, Permission, Resource)>,
}

tokio::task_local! { static CALL: Arc<Call>; }

impl Call {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
    fn begin(&self, action: Action) -> Entry {
        Entry::new(action, self.log.clock.now_ms(), self.via.clone())
    }
    /// What is left to be written when the call ends so.
    fn left(&self, ending: Ending) -> Option<Entry> {
        let (entry, denied, repeated) = {
            let mut state = self.state();
            (state.entry.take(), state.denied.take(), state.repeated)
        };
        if repeated && ending == Ending::Done {
            return None;
        }
        let hidden = denied.filter(|_| matches!(ending, Ending::Refused | Ending::Absent));
        let mut entry = match (entry, &hidden) {
            (Some(entry), _) => entry,
            (None, Some(_)) => self.begin(Action::Read),
            (None, None) => return None,
        };
        entry.outcome = match ending {
            Ending::Done => Outcome::Ok,
            Ending::Refused => Outcome::Denied,
            _ if hidden.is_some() => Outcome::Denied,
            _ => Outcome::Failed,
        };
        if let Some((user, key, permission, thing)) = hidden {
            entry.kind = Kind::AuthorizationDenied;
            (entry.user, entry.key) = (entry.user.or(user), entry.key.or(key));
            entry.session = entry.session.or(thing.session);
            if entry.resource.id.is_empty() {
                entry.resource = thing;
            }
            entry.detail.insert("permission".into(), permission.as_str().into());
        }
        Some(entry)
    }
}

impl Drop for Call {
    /// Nobody waited for the end of the call.
    fn drop(&mut self) {
        if let Some(entry) = self.left(Ending::Failed) {
            self.log.leave_later(entry);
        }
    }
}

/// Runs one call of a door. `ending` says how it ended.
pub async fn scope<T>(log: &Arc<Log>, via: Via, work: impl Future<Output = T>, ending: impl FnOnce(&T) -> Ending) -> T {
    let call = Arc::new(Call { log: log.clone(), via, state: Mutex::default() });
    let done = CALL.scope(call.clone(), work).await;
    if let Some(entry) = call.left(ending(&done)) {
        log.leave(entry).await;
    }
    done
}

/// The same call, for work that goes on elsewhere.
pub fn carry<F: Future>(work: F) -> impl Future<Output = F::Output> {
    let call = CALL.try_with(Arc::clone).ok();
    async move {
        match call {
            Some(call) => CALL.scope(call, work).await,
            None => work.await,
        }
    }
}

/// Says what `caller` is about to do. Of several within one call the first counts.
pub fn doing(caller: &Caller, action: Action) {
    begin(action, caller.user(), caller.key_id());
    if let Caller::Node { node, .. } = caller {
        about(*node);
    }
}

/// The same where who calls is not known yet, or never.
pub fn asked(action: Action) {
    begin(action, None, None);
}

fn begin(action: Action, user: Option<UserId>, key: Option<ApiKeyId>) {
    let _ = CALL.try_with(|call| {
        let entry = Entry { user, key, ..call.begin(action) };
        let mut state = call.state();
        if !state.written {
            state.entry.get_or_insert(entry);
        }
    });
}

fn change(change: impl FnOnce(&mut Entry)) {
    let _ = CALL.try_with(|call| call.state().entry.as_mut().map(change));
}

/// Who it turned out to be.
pub fn by(user: UserId) {
    change(|e| e.user = Some(user));
}

/// What it is done to.
pub fn about(thing: impl Into<Resource>) {
    change(|e| {
        e.resource = thing.into();
        e.session = e.session.or(e.resource.session);
    });
}

/// The session in which it is done.
pub fn within(session: Option<SessionId>) {
    change(|e| e.session = e.session.or(session));
}

/// What else to know; it can be erased. No secrets, no content.
pub fn detail(key: &str, value: impl Display) {
    change(|e| {
        if e.detail.len() < MAX_PAIRS {
            e.detail.insert(key.to_owned(), bounded(value));
        }
    });
}

/// It was done before, under the same key: unless it is refused this leaves nothing, as it changes nothing.
pub(crate) fn repeated() {
    let _ = CALL.try_with(|call| call.state().repeated = true);
}

/// The choke point refused.
pub(crate) fn denied(caller: &Caller, permission: Permission, thing: Option<Thing<'_>>) {
    let resource = match thing {
        Some(Thing::Node(id)) => id.into(),
        Some(Thing::Session(id)) => id.into(),
        Some(Thing::Task { session: Some(id), .. }) => Resource { session: Some(id), ..Resource::new("task", "") },
        Some(Thing::Agent(name)) => Resource::new("agent", name),
        _ => Resource::default(),
    };
    let _ = CALL.try_with(|call| call.state().denied = Some((caller.user(), caller.key_id(), permission, resource)));
}

/// Writes the entry of this call before anything is shown.
pub(crate) async fn now() -> crate::Result<()> {
    let Ok(call) = CALL.try_with(Arc::clone) else { return Ok(()) };
    let entry = call.state().entry.clone();
    if let Some(entry) = entry {
        call.log.store.add_entry(&entry).await?;
        let mut state = call.state();
        (state.entry, state.written) = (None, true);
    }
    Ok(())
}

/// For stores: the entry that the next write takes along.
#[derive(Clone)]
pub struct Ticket(Arc<Call>);

impl std::fmt::Debug for Ticket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Ticket")
    }
}

/// Of the call that is under way, if it has something to write.
pub fn ticket() -> Option<Ticket> {
    let due = |state: &State| state.entry.is_some() && !state.repeated;
    CALL.try_with(|call| due(&call.state()).then(|| Ticket(call.clone()))).ok().flatten()
}

impl Ticket {
    /// None when another write of the call has taken it.
    pub fn entry(&self, outcome: Outcome) -> Option<Entry> {
        self.0.state().entry.clone().map(|entry| Entry { outcome, ..entry })
    }
    /// Its commit has succeeded.
    pub fn written(&self) {
        let mut state = self.0.state();
        (state.entry, state.written) = (None, true);
    }
    /// Two writes of one call are one entry.
    pub fn is(&self, other: &Ticket) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

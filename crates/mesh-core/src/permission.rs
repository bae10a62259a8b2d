//! Who may do what: roles, permissions, scopes of keys, and the one question [`allows`].

use crate::{ApiKeyId, DeviceId, NodeId, SessionId, UserId};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

macro_rules! permissions {
    ($($name:ident = $text:literal),* $(,)?) => {
        /// The thirteen permissions, as `category:action`.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Permission { $($name),* }
        impl Permission {
            pub const ALL: &'static [Permission] = &[$(Permission::$name),*];
            pub fn as_str(self) -> &'static str { match self { $(Self::$name => $text),* } }
            pub fn parse(text: &str) -> Option<Self> { match text { $($text => Some(Self::$name),)* _ => None } }
        }
    };
}

permissions! {
    NodesRead = "nodes:read", NodesInvite = "nodes:invite", NodesManage = "nodes:manage",
    SessionsRead = "sessions:read", SessionsWrite = "sessions:write", SessionsAttach = "sessions:attach",
    TasksRead = "tasks:read", TasksDispatch = "tasks:dispatch", TasksApprove = "tasks:approve",
    AgentsRead = "agents:read", AgentsManage = "agents:manage",
    SystemAudit = "system:audit", SystemAdminister = "system:administer",
}

impl Permission {
    /// Can it be granted on one thing? Joining and managing machines, approval and the hub itself cannot.
    pub fn is_grantable(self) -> bool {
        use Permission::*;
        !matches!(self, NodesInvite | NodesManage | TasksApprove | SystemAudit | SystemAdminister)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    Admin,
    Developer,
    Viewer,
    Guest,
}

impl Role {
    pub const ALL: [Role; 4] = [Self::Admin, Self::Developer, Self::Viewer, Self::Guest];
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Admin => "admin",
            Self::Developer => "developer",
            Self::Viewer => "viewer",
            Self::Guest => "guest",
        }
    }
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|r| r.as_str() == text)
    }
    /// How far a role's permission reaches.
    pub fn reach(self, p: Permission) -> Reach {
        use Permission::*;
        match (self, p) {
            (Role::Admin, _) => Reach::All,
            (Role::Developer, SystemAudit | SystemAdminister) => Reach::None,
            (Role::Developer, NodesInvite | NodesManage | TasksApprove) => Reach::Own,
            (Role::Developer, _) => Reach::OwnAndGranted,
            (Role::Viewer, NodesRead | SessionsRead | TasksRead | AgentsRead) => Reach::All,
            (Role::Viewer, _) => Reach::None,
            (Role::Guest, NodesRead | SessionsRead | TasksRead | TasksDispatch | AgentsRead) => Reach::Granted,
            (Role::Guest, _) => Reach::None,
        }
    }
}

/// How far a permission reaches; each reaches further than the one before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reach {
    None,
    /// What was granted.
    Granted,
    /// What one made or owns.
    Own,
    OwnAndGranted,
    All,
}

impl Reach {
    pub fn is_to_own(self) -> bool {
        self >= Self::Own
    }
    pub fn is_to_granted(self) -> bool {
        matches!(self, Self::Granted | Self::OwnAndGranted | Self::All)
    }
}

/// A set of permissions.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Permissions(u16);

impl Permissions {
    pub fn has(self, p: Permission) -> bool {
        self.0 & (1 << p as u16) != 0
    }
    pub fn add(&mut self, other: Permissions) {
        self.0 |= other.0;
    }
    /// In the order of [`Permission::ALL`].
    pub fn iter(self) -> impl Iterator<Item = Permission> {
        Permission::ALL.iter().copied().filter(move |p| self.has(*p))
    }
}

impl Granted {
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty() && self.sessions.is_empty() && self.agents.is_empty()
    }
}

impl FromIterator<Permission> for Permissions {
    fn from_iter<I: IntoIterator<Item = Permission>>(all: I) -> Self {
        Self(all.into_iter().fold(0, |set, p| set | 1 << p as u16))
    }
}

/// What was granted to somebody, resolved: grants to nodes by label are grants to those nodes.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Granted {
    pub nodes: BTreeMap<NodeId, Permissions>,
    pub sessions: BTreeMap<SessionId, Permissions>,
    pub agents: BTreeMap<String, Permissions>,
}

impl Granted {
    /// Does any grant give it?
    pub fn has(&self, p: Permission) -> bool {
        let mut all = self.nodes.values().chain(self.sessions.values()).chain(self.agents.values());
        all.any(|given| given.has(p))
    }
    fn on(&self, thing: Thing<'_>, p: Permission) -> bool {
        let node = |id: &NodeId, p| self.nodes.get(id).is_some_and(|given| given.has(p));
        let session = |id: &SessionId, p| self.sessions.get(id).is_some_and(|given| given.has(p));
        match thing {
            Thing::Node(id) => node(&id, p),
            Thing::Session(id) => session(&id, p),
            Thing::Agent(name) => self.agents.get(name).is_some_and(|given| given.has(p)),
            // Who may dispatch to a node may not for that end what others run there.
            Thing::Task { node: id, session: of } => {
                of.is_some_and(|id| session(&id, p)) || (p == Permission::TasksRead && id.is_some_and(|id| node(&id, p)))
            }
            Thing::Other => false,
        }
    }
}

/// What an act is done to, as far as grants tell things apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Thing<'a> {
    Node(NodeId),
    Session(SessionId),
    /// A task: the node that it is on or meant for, and its session.
    Task {
        node: Option<NodeId>,
        session: Option<SessionId>,
    },
    Agent(&'a str),
    /// What nobody can be granted.
    Other,
}

/// A pattern in an API key: `*`, `category:*` or `category:action`; wildcards only as a whole segment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Scope {
    Everything,
    Category(String),
    One(Permission),
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadScope {
    #[error("{0:?} is not a scope; use a permission such as tasks:dispatch, a category such as nodes:*, or *")]
    Unknown(String),
    #[error("no key approves: approvals need a person's own log-in")]
    Approve,
}

impl Scope {
    pub fn parse(text: &str) -> Result<Self, BadScope> {
        if text == "*" {
            return Ok(Self::Everything);
        }
        if text == Permission::TasksApprove.as_str() {
            return Err(BadScope::Approve);
        }
        if let Some(p) = Permission::parse(text) {
            return Ok(Self::One(p));
        }
        match text.strip_suffix(":*") {
            Some(c) if Permission::ALL.iter().any(|p| category(*p) == c) => Ok(Self::Category(c.to_owned())),
            _ => Err(BadScope::Unknown(text.to_owned())),
        }
    }
    pub fn covers(&self, p: Permission) -> bool {
        // No scope gives approval, and reading the audit is always named.
        match self {
            _ if p == Permission::TasksApprove => false,
            Scope::One(one) => *one == p,
            _ if p == Permission::SystemAudit => false,
            Scope::Everything => category(p) != "system",
            Scope::Category(c) => category(p) == c,
        }
    }
}

impl std::fmt::Display for Scope {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Scope::Everything => f.write_str("*"),
            Scope::Category(c) => write!(f, "{c}:*"),
            Scope::One(p) => f.write_str(p.as_str()),
        }
    }
}

fn category(p: Permission) -> &'static str {
    p.as_str().split(':').next().expect("every permission has a category")
}

/// Who acts. Every engine entry takes one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Caller {
    Person(Person),
    /// The far end of a link, fenced by the generation it was accepted with.
    Node {
        node: NodeId,
        generation: u64,
    },
    /// A reconciler of the hub itself.
    System(&'static str),
}

/// A person with their own log-in, or a program with a key of theirs: the person's rights of now, cut by
/// the key's scopes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Person {
    pub user: UserId,
    pub role: Role,
    pub key: Option<Key>,
    pub granted: Arc<Granted>,
    pub via: Via,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Key {
    pub id: ApiKeyId,
    pub scopes: Arc<[Scope]>,
}

/// By what way a call came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Via {
    /// rest, socket …
    pub door: &'static str,
    /// None: this machine, by a socket file.
    pub address: Option<IpAddr>,
    /// For logs and the audit.
    pub request_id: Option<Arc<str>>,
    /// None: no log-in, but a key or a socket file.
    pub device: Option<DeviceId>,
}

impl Default for Via {
    fn default() -> Self {
        Self { door: "hub", address: None, request_id: None, device: None }
    }
}

impl Caller {
    /// A person who was granted nothing.
    pub fn person(user: UserId, role: Role) -> Self {
        Self::Person(Person { user, role, key: None, granted: Arc::default(), via: Via::default() })
    }
    /// A program with a key of a person who was granted nothing.
    pub fn key(key: ApiKeyId, user: UserId, role: Role, scopes: impl Into<Arc<[Scope]>>) -> Self {
        let key = Some(Key { id: key, scopes: scopes.into() });
        Self::Person(Person { user, role, key, granted: Arc::default(), via: Via::default() })
    }
    pub fn as_person(&self) -> Option<&Person> {
        match self {
            Self::Person(person) => Some(person),
            Self::Node { .. } | Self::System(_) => None,
        }
    }
    /// The person behind the call, if one is.
    pub fn user(&self) -> Option<UserId> {
        self.as_person().map(|p| p.user)
    }
    /// The key that was used, if one was.
    pub fn key_id(&self) -> Option<ApiKeyId> {
        self.as_person()?.key.as_ref().map(|k| k.id)
    }
    /// The person, if it is their own log-in that acts.
    pub fn in_person(&self) -> Option<UserId> {
        self.as_person().filter(|p| p.key.is_none()).map(|p| p.user)
    }
    /// The role behind the call; nodes and reconcilers dispatch nothing and have the least.
    pub fn role(&self) -> Role {
        self.as_person().map_or(Role::Guest, |p| p.role)
    }
    /// The furthest this caller's permission reaches, whatever the resource.
    pub fn reach(&self, p: Permission) -> Reach {
        match self {
            Self::Person(person) => person.reach(p),
            Self::Node { .. } => Reach::None,
            Self::System(_) => Reach::All,
        }
    }
}

impl Person {
    pub fn reach(&self, p: Permission) -> Reach {
        match &self.key {
            Some(key) if !key.scopes.iter().any(|s| s.covers(p)) => Reach::None,
            _ => self.role.reach(p),
        }
    }
    fn may(&self, p: Permission, owner: UserId, thing: Thing<'_>) -> bool {
        let reach = self.reach(p);
        reach == Reach::All
            || (reach.is_to_own() && owner == self.user)
            || (reach.is_to_granted() && (self.granted.on(thing, p) || self.may_follow(p, owner, thing)))
    }
    /// Who was granted a place to run something at, and no more, still sees and ends what they run, which may
    /// wait for any such place.
    fn may_follow(&self, p: Permission, owner: UserId, thing: Thing<'_>) -> bool {
        let own_task = owner == self.user && matches!(thing, Thing::Task { .. });
        own_task && matches!(p, Permission::TasksRead | Permission::TasksDispatch) && self.granted.has(Permission::TasksDispatch)
    }
}

/// May `caller` use `permission` on `thing`, which `owner` owns? Deny is the default.
pub fn allows(caller: &Caller, permission: Permission, owner: UserId, thing: Thing<'_>) -> bool {
    match caller {
        Caller::Person(person) => person.may(permission, owner, thing),
        Caller::Node { .. } => false,
        Caller::System(_) => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scopes_are_whole_segments() {
        for bad in ["nodes:*x", "*:", "*:*", "", "nodes", "nodes:", ":read", "nodes:fly", "**"] {
            assert!(Scope::parse(bad).is_err(), "{bad}");
        }
        assert_eq!(Scope::parse("tasks:approve"), Err(BadScope::Approve));
        let all = Scope::parse("*").unwrap();
        assert!(all.covers(Permission::TasksDispatch));
        assert!(!all.covers(Permission::SystemAdminister) && !all.covers(Permission::TasksApprove));
        let system = Scope::parse("system:*").unwrap();
        assert!(system.covers(Permission::SystemAdminister) && !system.covers(Permission::SystemAudit));
        assert!(Scope::parse("system:audit").unwrap().covers(Permission::SystemAudit));
        assert!(!Scope::parse("tasks:*").unwrap().covers(Permission::TasksApprove));
    }

    const OWN: UserId = UserId::from_bytes([1; 16]);
    const OTHER: UserId = UserId::from_bytes([2; 16]);

    #[test]
    fn a_key_never_exceeds_its_owner() {
        let key = |role| Caller::key(ApiKeyId::from_bytes([3; 16]), OWN, role, [Scope::Everything]);
        let may = |role, p, owner| allows(&key(role), p, owner, Thing::Node(NodeId::from_bytes([4; 16])));
        assert!(may(Role::Admin, Permission::NodesManage, OTHER));
        assert!(may(Role::Developer, Permission::NodesManage, OWN));
        assert!(!may(Role::Developer, Permission::NodesManage, OTHER));
        assert!(!may(Role::Viewer, Permission::NodesManage, OWN));
        assert!(!may(Role::Guest, Permission::NodesRead, OWN));
    }

    #[test]
    fn a_grant_gives_what_it_says_where_it_says() {
        let (node, session) = (NodeId::from_bytes([4; 16]), SessionId::from_bytes([5; 16]));
        let given = |all: &[Permission]| all.iter().copied().collect::<Permissions>();
        let granted = Arc::new(Granted {
            nodes: [(node, given(&[Permission::NodesRead, Permission::TasksDispatch, Permission::NodesManage]))].into(),
            sessions: [(session, given(&[Permission::SessionsRead, Permission::SessionsWrite, Permission::TasksDispatch]))].into(),
            agents: BTreeMap::new(),
        });
        let may = |role, p, owner, thing| {
            let person = Person { user: OWN, role, key: None, granted: granted.clone(), via: Via::default() };
            allows(&Caller::Person(person), p, owner, thing)
        };
        use Permission::*;
        for role in [Role::Developer, Role::Guest] {
            assert!(may(role, NodesRead, OTHER, Thing::Node(node)));
            assert!(!may(role, NodesRead, OTHER, Thing::Node(NodeId::from_bytes([9; 16]))));
            assert!(may(role, TasksDispatch, OTHER, Thing::Node(node)));
            assert!(!may(role, NodesManage, OTHER, Thing::Node(node)), "no grant gives it");
            assert!(!may(role, TasksRead, OTHER, Thing::Node(node)));
            let on = |session| Thing::Task { node: Some(node), session };
            assert!(!may(role, TasksRead, OTHER, on(None)), "it was not granted");
            assert!(!may(role, TasksDispatch, OTHER, on(None)), "what another runs there is not theirs to end");
            assert!(may(role, TasksDispatch, OTHER, on(Some(session))), "but in a session that was granted");
            assert!(may(role, TasksRead, OWN, on(None)) && may(role, TasksDispatch, OWN, on(None)), "their own");
        }
        let waits = Thing::Task { node: None, session: None };
        assert!(may(Role::Guest, TasksRead, OWN, waits), "for any of the places");
        assert!(!allows(&Caller::person(OWN, Role::Guest), TasksRead, OWN, waits), "the grant ended");
        assert!(may(Role::Developer, SessionsWrite, OTHER, Thing::Session(session)));
        assert!(!may(Role::Guest, SessionsWrite, OTHER, Thing::Session(session)), "more than the role can have");
        assert!(!may(Role::Viewer, TasksDispatch, OTHER, Thing::Node(node)), "more than the role can have");
        assert!(may(Role::Viewer, NodesRead, OTHER, Thing::Node(NodeId::from_bytes([9; 16]))));
    }
}

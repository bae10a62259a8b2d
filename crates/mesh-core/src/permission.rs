//! Who may do what: roles, permissions, scopes of keys, and the one question [`allows`].

use crate::{ApiKeyId, NodeId, UserId};

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

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
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
            (Role::Developer, _) => Reach::Own,
            (Role::Viewer, NodesRead | SessionsRead | TasksRead | AgentsRead) => Reach::All,
            (Role::Viewer, _) => Reach::None,
            // A guest has only what is granted to it, and grants are not there yet.
            (Role::Guest, _) => Reach::None,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    None,
    Own,
    All,
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
    /// A person with their own log-in.
    User { user: UserId, role: Role },
    /// A program with a key of a person: that person's rights of now, cut by the key's scopes.
    Key { key: ApiKeyId, user: UserId, role: Role, scopes: Vec<Scope> },
    /// The far end of a link, fenced by the generation it was accepted with.
    Node { node: NodeId, generation: u64 },
    /// A reconciler of the hub itself.
    System(&'static str),
}

impl Caller {
    /// The person behind the call, if one is.
    pub fn user(&self) -> Option<UserId> {
        match self {
            Caller::User { user, .. } | Caller::Key { user, .. } => Some(*user),
            Caller::Node { .. } | Caller::System(_) => None,
        }
    }
    /// The role behind the call; nodes and reconcilers dispatch nothing and have the least.
    pub fn role(&self) -> Role {
        match self {
            Caller::User { role, .. } | Caller::Key { role, .. } => *role,
            Caller::Node { .. } | Caller::System(_) => Role::Guest,
        }
    }
    /// The furthest this caller's permission reaches, whatever the resource.
    pub fn reach(&self, p: Permission) -> Reach {
        match self {
            Caller::User { role, .. } => role.reach(p),
            Caller::Key { role, scopes, .. } if scopes.iter().any(|s| s.covers(p)) => role.reach(p),
            Caller::Key { .. } | Caller::Node { .. } => Reach::None,
            Caller::System(_) => Reach::All,
        }
    }
}

/// May `caller` use `permission` on something that `owner` owns? Deny is the default.
pub fn allows(caller: &Caller, permission: Permission, owner: UserId) -> bool {
    match caller.reach(permission) {
        Reach::All => true,
        Reach::Own => caller.user() == Some(owner),
        Reach::None => false,
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

    #[test]
    fn a_key_never_exceeds_its_owner() {
        let (user, other) = (UserId::from_bytes([1; 16]), UserId::from_bytes([2; 16]));
        let key = |role| Caller::Key { key: ApiKeyId::from_bytes([3; 16]), user, role, scopes: vec![Scope::Everything] };
        assert!(allows(&key(Role::Admin), Permission::NodesManage, other));
        assert!(allows(&key(Role::Developer), Permission::NodesManage, user));
        assert!(!allows(&key(Role::Developer), Permission::NodesManage, other));
        assert!(!allows(&key(Role::Viewer), Permission::NodesManage, user));
        assert!(!allows(&key(Role::Guest), Permission::NodesRead, user));
    }
}

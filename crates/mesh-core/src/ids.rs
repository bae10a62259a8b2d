//! One typed id per kind of thing, so that a session can never be passed where a task is meant.
//!
//! The text form is `prefix_` and a lower-case hyphenated UUIDv7 (RFC 9562); ids sort by creation.

use std::fmt;
use std::str::FromStr;

/// A text that is not an id of the expected kind.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a {kind} id; it looks like {prefix}_0198…")]
pub struct BadId {
    pub kind: &'static str,
    pub prefix: &'static str,
    pub text: String,
}

macro_rules! ids {
    ($($(#[$doc:meta])* $name:ident = $prefix:literal, $kind:literal;)*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(uuid::Uuid);

        impl $name {
            pub const PREFIX: &'static str = $prefix;

            /// Makes an id from a time and ten random bytes, both given by the caller.
            pub fn from_parts(unix_ms: crate::UnixMs, random: [u8; 10]) -> Self {
                Self(uuid::Builder::from_unix_timestamp_millis(unix_ms.max(0) as u64, &random).into_uuid())
            }
            pub const fn from_bytes(bytes: [u8; 16]) -> Self { Self(uuid::Uuid::from_bytes(bytes)) }
            pub const fn as_bytes(&self) -> &[u8; 16] { self.0.as_bytes() }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result { write!(f, "{}_{}", $prefix, self.0.hyphenated()) }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result { fmt::Display::fmt(self, f) }
        }
        impl FromStr for $name {
            type Err = BadId;
            fn from_str(text: &str) -> Result<Self, BadId> {
                let bad = || BadId { kind: $kind, prefix: $prefix, text: text.chars().take(80).collect() };
                let rest = text.strip_prefix(concat!($prefix, "_")).ok_or_else(bad)?;
                let id = uuid::Uuid::try_parse(rest).map_err(|_| bad())?;
                // One text per id: upper case, braces and the unhyphenated form are refused.
                if id.hyphenated().to_string() == rest { Ok(Self(id)) } else { Err(bad()) }
            }
        }
    )*};
}

ids! {
    /// A deployment of the hub, chosen at its first start; several hub processes may share it.
    HubId = "hub", "hub";
    /// A machine that joined. It survives renewals and restarts; a new invite makes a new node.
    NodeId = "node", "node";
    /// A working context with an owner, attached nodes and one workspace.
    SessionId = "sess", "session";
    /// One piece of work. Its executions are attempts, numbered by [`crate::task::AttemptNo`].
    TaskId = "task", "task";
    UserId = "user", "user";
    /// A one-time permission to enrol one machine.
    InviteId = "inv", "invite";
    ApiKeyId = "key", "API key";
    /// A supervised process, run after run.
    AgentId = "agent", "agent";
    /// A log-in as its person sees it: the same bytes as its [`LoginId`].
    DeviceId = "dev", "device";
    /// What somebody may do with something that is not theirs.
    GrantId = "grant", "grant";
    /// One call at a door; appears in errors and logs so that both can be matched.
    RequestId = "req", "request";
    /// The memory of one warden: made when its spool folder is made, never reused.
    SpoolId = "spool", "spool";
    /// A message in a session.
    MessageId = "msg", "message";
    /// A place in a list: a key's entry, or a line of a session's activity.
    EntryId = "ent", "entry";
    /// A log-in and all refresh tokens that descend from it.
    LoginId = "login", "log-in";
    /// An entry of the audit log.
    AuditId = "aud", "audit entry";
    /// A chain of audit entries: what one hub process wrote, from one restore to the next.
    ChainId = "chain", "audit chain";
}

impl From<LoginId> for DeviceId {
    fn from(login: LoginId) -> Self {
        Self(login.0)
    }
}
impl From<DeviceId> for LoginId {
    fn from(device: DeviceId) -> Self {
        Self(device.0)
    }
}
impl DeviceId {
    /// When the log-in was made, in milliseconds since the Unix epoch.
    pub fn made_at(&self) -> crate::UnixMs {
        time_of(self.as_bytes())
    }
}
impl TaskId {
    /// When it was decided, in milliseconds since the Unix epoch.
    pub fn made_at(&self) -> crate::UnixMs {
        time_of(self.as_bytes())
    }
}

fn time_of(id: &[u8; 16]) -> crate::UnixMs {
    id[..6].iter().fold(0, |ms, b| ms << 8 | crate::UnixMs::from(*b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_a_log_in() {
        let login = LoginId::from_parts(1_790_000_000_123, [7; 10]);
        let device = DeviceId::from(login);
        assert_eq!((device.made_at(), LoginId::from(device)), (1_790_000_000_123, login));
        assert!(device.to_string().starts_with("dev_") && login.to_string().ends_with(&device.to_string()[4..]));
    }

    #[test]
    fn text_form_round_trips_and_is_unique() {
        let id = TaskId::from_parts(1_700_000_000_000, [7; 10]);
        let text = id.to_string();
        assert!(text.starts_with("task_"));
        assert_eq!(text.parse::<TaskId>().unwrap(), id);
        assert!(text.to_uppercase().parse::<TaskId>().is_err());
        assert!(text.replace("task_", "node_").parse::<TaskId>().is_err());
        assert!(text.replace('-', "").parse::<TaskId>().is_err());
    }

    #[test]
    fn ids_sort_by_time() {
        assert!(TaskId::from_parts(1, [255; 10]) < TaskId::from_parts(2, [0; 10]));
    }
}

//! One suite per port. Each takes a function that makes a fresh, empty store, and panics where the
//! store does not do what the port's documentation says.

mod accounts;
mod agents;
mod audit;
mod bus;
mod gauges;
mod grants;
mod idempotency;
mod journal;
mod memory;
mod messages;
mod meta;
mod nodes;
mod output;
mod purges;
mod retention;
mod sessions;
mod state;
mod users;

pub use accounts::accounts;
pub use agents::agents;
pub use audit::audit;
pub use bus::{BusPlan, HandClock, bus};
pub use gauges::gauges;
pub use grants::grants;
pub use idempotency::idempotency;
pub use journal::{journal, journal_and_output};
pub use memory::memory;
pub use messages::messages;
pub use meta::meta;
pub use nodes::{nodes, nodes_and_sessions};
pub use output::output;
pub use purges::purges;
pub use retention::retention;
pub use sessions::{activity_has_a_bound, sessions, sessions_and_tasks};
pub use state::state;
pub use users::users;

use hub_engine::ports::Window;

/// A moment to count from.
pub(crate) const T0: i64 = 1_700_000_000_000;

pub(crate) fn window<I>(before: Option<I>, limit: u32) -> Window<I> {
    Window { before, limit }
}
pub(crate) fn all<I>() -> Window<I> {
    Window { before: None, limit: 1000 }
}

/// Samples, for suites and for tests of single stores.
pub mod sample {
    use super::T0;
    use hub_engine::ports::Fan;
    use hub_engine::records::*;
    use mesh_core::agent::{Kind, Life, Policy, Restart};
    use mesh_core::capability::Capabilities;
    use mesh_core::permission::{Permission, Role};
    use mesh_core::task::{Attempt, AttemptNo, Progress, TaskState, Terms};
    use mesh_core::*;

    macro_rules! ids {
        ($($name:ident -> $id:ident),*) => {$(
            /// The `n`th; a higher `n` is newer.
            pub fn $name(n: u16) -> $id {
                let mut random = [0xA5; 10];
                random[8..].copy_from_slice(&n.to_be_bytes());
                $id::from_parts(T0 + i64::from(n), random)
            }
        )*};
    }
    ids!(agent_id -> AgentId, task_id -> TaskId, node_id -> NodeId, user_id -> UserId, session_id -> SessionId, invite_id -> InviteId,
        key_id -> ApiKeyId, message_id -> MessageId, entry_id -> EntryId, grant_id -> GrantId, login_id -> LoginId, spool_id -> SpoolId, hub_id -> HubId);

    pub fn attempt(n: u32) -> AttemptNo {
        (1..n).fold(AttemptNo::first(3), |no, _| no.next(3))
    }

    pub fn task(n: u16) -> Task {
        Task {
            id: task_id(n),
            session: None,
            named_node: None,
            actor: Actor { user: user_id(1), key: None, agent: None, door: "rest".into() },
            skill: "shell".into(),
            spec: vec![1, 2, 0, 255, n as u8],
            digest: [4; 32],
            seal: [5; 32],
            timeout_secs: 60,
            queue_secs: u64::MAX,
            terms: Terms::default(),
            created_at: T0 + i64::from(n),
            progress: Progress::new(),
            output: OutputTotals::default(),
            digests: None,
            result: None,
            sandbox_applied: None,
            signed: None,
            parent: None,
            children: None,
        }
    }

    /// One that has its first attempt, granted, on [`node_id`]`(1)`.
    pub fn assigned_task(n: u16) -> Task {
        let mut task = task(n);
        task.progress.state = TaskState::Assigned;
        task.progress.attempt = Some(Attempt { no: attempt(1), node: node_id(1), granted: Some(spool_id(1)) });
        task.progress.assigned_at = Some(task.created_at);
        task
    }

    /// A parent, the `n`th task, of as many children, which follow it; the first of them has its attempt.
    pub fn fan(n: u16, children: u16) -> Fan {
        let of = |(i, mut t): (u16, Task)| {
            (t.parent, t.named_node) = (Some(task_id(n)), Some(node_id(i)));
            t
        };
        let children: Vec<Task> = (1..=children).map(|i| of((i, if i == 1 { assigned_task(n + i) } else { task(n + i) }))).collect();
        let mut parent = task(n);
        (parent.progress, parent.children) = (mesh_core::fan::begun(parent.created_at), Some(Children::of(&children)));
        Fan { parent, children }
    }
    /// A process of the first user, called `a{n}`, whose first run is [`task_id`]`(n)`.
    pub fn agent(n: u16) -> Agent {
        Agent {
            id: agent_id(n),
            name: format!("a{n}"),
            owner: user_id(1),
            key: None,
            door: "rest".into(),
            kind: Kind::Process,
            session: None,
            node: Some(node_id(1)),
            select: None,
            spec: vec![1, 2, 0, 255],
            restart: Restart { policy: Policy::OnFailure, max: 3, backoff_ms: 1000 },
            created_at: T0 + i64::from(n),
            life: Life::begun(task_id(n)),
        }
    }

    pub fn frame(seq: u64, stream: Stream, data: impl Into<bytes::Bytes>) -> OutputFrame {
        OutputFrame { seq, t_ms: T0 + seq as i64, stream, data: data.into() }
    }

    pub fn user(n: u16, name: &str) -> User {
        User { id: user_id(n), username: name.into(), role: Role::Developer, password_hash: format!("$argon2id${n}"), created_at: T0 }
    }

    pub fn device(login: u16, user: u16) -> Device {
        Device {
            id: login_id(login).into(),
            user: user_id(user),
            name: format!("büro {login}"),
            user_agent: Some("curl/8.5.0".into()),
            first_address: Some([192, 0, 2, 1].into()),
            address: Some([192, 0, 2, 1].into()),
            last_seen_at: T0,
            trusted: None,
        }
    }

    pub fn session(n: u16, owner: u16) -> Session {
        Session {
            id: session_id(n),
            owner: user_id(owner),
            name: format!("work {n}"),
            created_at: T0,
            expires_at: T0 + 1000,
            ttl_ms: 1000,
            closed_at: None,
            expired_at: None,
            purged_at: None,
            device: (n % 2 == 1).then(|| DeviceId::from(login_id(n))),
            nodes: vec![],
        }
    }

    /// The `n`th: to the first user, of reading and using, until 1000 ms after the start.
    pub fn grant(n: u16, resource: Resource) -> Grant {
        Grant {
            id: grant_id(n),
            subject: Subject::User(user_id(1)),
            resource,
            permissions: [Permission::TasksDispatch, Permission::NodesRead].into_iter().collect(),
            created_by: user_id(9),
            created_at: T0,
            expires_at: Some(T0 + 1000),
        }
    }

    pub fn invite(n: u16) -> Invite {
        Invite {
            id: invite_id(n),
            owner: user_id(1),
            public_key: [n as u8; 32],
            name: Some("büro".into()),
            labels: [("zone".to_owned(), "a \"b\"".to_owned()), ("gpu".to_owned(), String::new())].into(),
            created_at: T0,
            expires_at: T0 + 1000,
            revoked_at: None,
            used: None,
            notices: vec![],
        }
    }

    /// A node whose key is `spki`.
    pub fn node(n: u16, spki: u8) -> Node {
        Node {
            id: node_id(n),
            name: "build".into(),
            owner: user_id(1),
            labels: [("os".to_owned(), "linux".to_owned())].into(),
            slots: None,
            max_tasks: 4,
            task_limit: None,
            draining: false,
            epoch: 0,
            version: "0.1.0".into(),
            capabilities: Capabilities { os: "linux".into(), cpu_cores: 8, ..Default::default() },
            created_at: T0,
            last_seen_at: None,
            generation: 0,
            certificate: NodeCertificate { spki: [spki; 32], der: vec![0x30, spki], not_after: T0 + 9000, counter: 0 },
            revoked_at: None,
            notices: vec!["new here".into()],
            bundle_seq: 0,
        }
    }
}

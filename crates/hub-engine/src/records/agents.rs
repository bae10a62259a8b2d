//! What is kept of agents.

use super::Within;
use mesh_core::agent::{Action, Kind, Life, Refused, Restart, Status};
use mesh_core::lines::Line;
use mesh_core::permission::Thing;
use mesh_core::select::Selector;
use mesh_core::task::AttemptNo;
use mesh_core::{AgentId, ApiKeyId, NodeId, SessionId, TaskId, UnixMs, UserId};

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Agent {
    pub id: AgentId,
    pub name: String,
    pub owner: UserId,
    /// Who spawned it, if a program did, and through what.
    pub key: Option<ApiKeyId>,
    pub door: String,
    pub kind: Kind,
    /// In whose workspace it runs.
    pub session: Option<SessionId>,
    /// The node that was named.
    pub node: Option<NodeId>,
    pub select: Option<Selector>,
    /// Of a process the canonical spec of its runs, of a basic one its config as JSON text.
    pub spec: Vec<u8>,
    pub restart: Restart,
    pub created_at: UnixMs,
    pub life: Life,
}

impl Agent {
    /// What an act on it is done to.
    pub fn thing(&self) -> (UserId, Thing<'_>) {
        (self.owner, Thing::Agent(&self.name))
    }
}

/// What became of a new agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Spawned {
    Done,
    /// One of this name has not ended.
    NameTaken,
    /// The name, and what is kept under it, is somebody else's.
    Foreign,
}

/// What one event did to an agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AgentApplied {
    /// The agent after it, and what must now happen.
    Done(Box<Agent>, Vec<Action>),
    Refused(Refused),
    Unknown,
}

/// Which agents a list shows. Every field narrows.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AgentFilter {
    pub within: Option<Within>,
    pub name: Option<String>,
    pub status: Option<Status>,
}

impl AgentFilter {
    pub fn has(&self, a: &Agent) -> bool {
        self.within.as_ref().is_none_or(|w| w.owner == Some(a.owner) || w.agents.contains(&a.name))
            && self.name.as_ref().is_none_or(|name| *name == a.name)
            && self.status.is_none_or(|status| status == a.life.status)
    }
}

/// From what frames come that an agent's log takes: one attempt of one of its runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogSource {
    pub task: TaskId,
    pub attempt: AttemptNo,
}

/// A part of an agent's log.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LogPage {
    /// Lines that were ever written.
    pub total: u64,
    /// The offset of the oldest that is still there.
    pub first: u64,
    /// With their offsets, which follow one another.
    pub lines: Vec<(u64, Line)>,
}

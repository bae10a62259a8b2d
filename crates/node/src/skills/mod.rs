//! What a node can do for an order. One file per skill; a skill decides and starts nothing itself.

pub mod echo;
pub mod shell;

use mesh_core::task::{NeverStarted, Outcome, Reason, ReasonCode};
use mesh_wire::node::Skill;

/// What follows from an order whose payload is here and checked.
#[derive(Debug)]
pub enum Step {
    /// The warden is to start this.
    Start(Box<mesh_core::policy::Grant>),
    /// It is over without a process.
    Over { outcome: Outcome, result: Vec<u8> },
}

pub(crate) fn refused(code: ReasonCode, detail: impl Into<String>) -> Step {
    Step::Over { outcome: Outcome::NeverStarted(NeverStarted::Refused(Reason::new(code, detail))), result: vec![] }
}

/// Names and versions, as a node tells them to its hub.
pub fn list() -> Vec<Skill> {
    [shell::NAME, echo::NAME].map(|n| Skill { name: n.into(), version: env!("CARGO_PKG_VERSION").into() }).into()
}

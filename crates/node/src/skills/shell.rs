//! A command or script: judged here, started by the warden.

use super::{Step, refused};
use crate::link::orders::Checked;
use crate::state::State;
use crate::workspace::WorkspaceRoot;
use mesh_core::policy::{Asked, judge};
use mesh_core::spec::Spec;
use mesh_core::task::ReasonCode;

pub const NAME: &str = "shell";

pub fn step(order: &Checked, spec: &Spec, root: &WorkspaceRoot, state: &State) -> Step {
    let place = match root.place(state, order.user, order.session, order.key.task) {
        Ok(p) => p,
        Err(e) => {
            tracing::error!(task = %order.key, error = %e, "no place for a task");
            return refused(ReasonCode::Limit, e.to_string());
        }
    };
    let asked = Asked { task: order.key.task, attempt: order.key.attempt, spec, digest: order.digest, timeout_secs: order.timeout_secs };
    match judge(&asked, place) {
        Ok(grant) => Step::Start(Box::new(grant)),
        Err(r) => refused(r.code, r.detail),
    }
}

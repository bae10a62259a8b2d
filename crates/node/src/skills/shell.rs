//! A command or script: judged here, started by the warden.

use super::{Step, refused};
use crate::ceiling::find;
use crate::link::orders::Checked;
use crate::state::State;
use crate::workspace::WorkspaceRoot;
use mesh_core::ceiling::Ceiling;
use mesh_core::policy::{Asked, Machine, judge};
use mesh_core::spec::Spec;
use mesh_core::task::ReasonCode;
use std::path::Path;

pub const NAME: &str = "shell";

pub fn step(order: &Checked, spec: &Spec, ceiling: &Ceiling, root: &WorkspaceRoot, state: &State) -> Step {
    let place = match root.place(state, order.user, order.session, order.key.task) {
        Ok(p) => p,
        Err(e) => {
            tracing::error!(task = %order.key, error = %e, "no place for a task");
            return refused(ReasonCode::Limit, e.to_string());
        }
    };
    let Checked { key, user, digest, timeout_secs, .. } = *order;
    let asked = Asked { task: key.task, attempt: key.attempt, user, spec, digest, timeout_secs };
    let cwd = if let Spec::Shell(s) = spec { s.cwd.as_str() } else { "" };
    let folder = Path::new(&place.workspace).join(cwd);
    match judge(&asked, place, &Machine { ceiling, find: &|name| find(Some(&folder), name) }) {
        Ok(grant) => Step::Start(Box::new(grant)),
        Err(r) => refused(r.code, r.detail),
    }
}

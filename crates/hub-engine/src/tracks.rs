//! The marks that a task leaves in logs and metrics, one line for each of its steps.
//!
//! The target is `task`, so that a filter such as `info,task=debug` shows them alone. The lines of a hub
//! and of its nodes are joined by `task`, and by `request_id` as long as one process lives.

use crate::links::Order;
use crate::records::Task;
use mesh_core::task::{Event, NeverStarted, Outcome};
use mesh_core::{NodeId, TaskId};
use metrics::{Counter, Histogram};
use std::collections::BTreeMap;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};

// Looked up once, since a name is dearer to find than to count; a hub takes up counting before its first task.
static ACCEPTED: LazyLock<Counter> = LazyLock::new(|| metrics::counter!("cortex_tasks_accepted_total"));
static START_SECONDS: LazyLock<Histogram> = LazyLock::new(|| metrics::histogram!("cortex_task_start_seconds"));

/// A hub with more open tasks than this forgets which requests the older ones came by.
const MOST: usize = 100_000;

/// Requests by the open tasks that they asked for. Only in memory: it is for logs alone.
#[derive(Debug, Default)]
pub struct Origins(Mutex<BTreeMap<TaskId, Arc<str>>>);

impl Origins {
    fn map(&self) -> MutexGuard<'_, BTreeMap<TaskId, Arc<str>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
    pub fn note(&self, task: TaskId, request: Arc<str>) {
        let mut map = self.map();
        if map.len() >= MOST {
            map.pop_first();
        }
        map.insert(task, request);
    }
    pub fn of(&self, task: TaskId) -> Option<Arc<str>> {
        self.map().get(&task).cloned()
    }
    pub fn forget(&self, task: TaskId) {
        self.map().remove(&task);
    }
}

/// Leaves marks; nothing of a spec is ever among them.
pub(crate) struct Tracks<'p>(pub &'p Origins);

macro_rules! mark {
    ($own:expr, $task:expr, $attempt:expr, $($rest:tt)*) => {
        // The request is looked up only for who listens.
        if tracing::enabled!(target: "task", tracing::Level::DEBUG) {
            let request = $own.0.of($task);
            let request_id = request.as_deref().unwrap_or_default();
            tracing::debug!(target: "task", task = %$task, attempt = $attempt, request_id, $($rest)*);
        }
    };
}

impl Tracks<'_> {
    pub fn accepted(&self, task: &Task) {
        // A parent is no work of its own: its children are counted.
        if !task.is_parent() {
            ACCEPTED.increment(1);
        }
        mark!(self, task.id, attempt(task), user = %task.actor.user, door = task.actor.door, skill = task.skill, "accepted");
    }
    pub fn ordered(&self, order: &Order, node: NodeId) {
        mark!(self, order.task, order.attempt.ordinal(), %node, "order sent");
    }
    pub fn stepped(&self, task: &Task, event: &Event) {
        match event {
            Event::Started { .. } => {
                // A short task's start and end may be told together: its times stand in the journal.
                self.started(task);
                mark!(self, task.id, attempt(task), "started");
            }
            Event::Withdrawn { .. } | Event::Ended { outcome: Outcome::NeverStarted(NeverStarted::Late), .. } => {
                metrics::counter!("cortex_attempts_moved_total").increment(1);
            }
            Event::Ended { outcome: Outcome::Lost { .. }, .. } => metrics::counter!("cortex_attempts_lost_total").increment(1),
            Event::CancelRequested { reason } => mark!(self, task.id, attempt(task), reason = reason.as_str(), "cancel asked"),
            _ => {}
        }
    }
    fn started(&self, task: &Task) {
        if let Some(at) = task.progress.started_at {
            START_SECONDS.record((at - task.created_at).max(0) as f64 / 1000.0);
        }
    }
    pub fn finished(&self, task: &Task) {
        let state = task.progress.state.as_str();
        let reason = task.progress.reason.as_ref().map_or("none", |r| r.code.as_str());
        if !task.is_parent() {
            metrics::counter!("cortex_tasks_finished_total", "state" => state, "reason" => reason).increment(1);
        }
        mark!(self, task.id, attempt(task), state, reason, "result stored");
        self.0.forget(task.id);
    }
}

fn attempt(task: &Task) -> u32 {
    task.progress.attempt.as_ref().map_or(0, |a| a.no.ordinal())
}

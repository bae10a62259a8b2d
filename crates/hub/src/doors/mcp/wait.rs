//! Waiting for the end of a task, with words on the way. Nothing here ever cancels one.

use crate::doors::rest::events::GRANTED_EVERY;
use crate::doors::rest::{App, Refusal, Who};
use hub_engine::Error;
use hub_engine::records::Task;
use mesh_core::TaskId;
use mesh_core::task::TaskState;
use mesh_process::CancellationToken;
use rmcp::RoleServer;
use rmcp::model::{ProgressNotificationParam, ProgressToken};
use rmcp::service::{Peer, RequestContext};
use std::time::Duration;
use tokio::time::Instant;

/// The longest that a tool waits.
pub const MAX_SECS: u64 = 50;
/// How long it waits when nothing is said.
pub const DEFAULT_SECS: u64 = 20;
/// How often one who waits hears that the task goes on.
const PROGRESS_EVERY: Duration = Duration::from_secs(2);

/// The caller, as long as it listens.
#[derive(Clone)]
pub struct Ear {
    gone: CancellationToken,
    peer: Peer<RoleServer>,
    /// Wants to hear of progress.
    token: Option<ProgressToken>,
}

impl Ear {
    pub fn of(context: &RequestContext<RoleServer>) -> Self {
        Self { gone: context.ct.clone(), peer: context.peer.clone(), token: context.meta.get_progress_token() }
    }

    async fn say(&self, passed: Duration, secs: u64, task: &Task) {
        let Some(token) = self.token.clone() else { return };
        let (p, o) = (&task.progress, &task.output);
        let node = p.attempt.as_ref().map(|a| format!(" on {}", a.node)).unwrap_or_default();
        let message = format!("{} is {}{node}, {} bytes of output", task.id, p.state.as_str(), o.stdout_bytes + o.stderr_bytes);
        let progress = ProgressNotificationParam::new(token, passed.as_secs_f64()).with_total(secs as f64).with_message(message);
        // Who does not listen any more is heard of by `gone`.
        let _ = self.peer.notify_progress(progress).await;
    }
}

/// Waits until the task needs nobody's waiting any more, the time is over, the caller left or the hub stops.
/// Gives the caller with the rights of now; an error when they have ended.
pub async fn until_end(app: &App, mut who: Who, id: TaskId, secs: u64, ear: &Ear) -> Result<Who, Refusal> {
    who.asked.may_wait(secs);
    let mut rights = app.events.rights();
    // Who it is was found out before: what was changed since is looked up.
    rights.mark_changed();
    let mut watch = app.tasks.watchers.subscribe(id);
    let begun = Instant::now();
    let (until, mut look_at) = (begun + Duration::from_secs(secs), begun);
    loop {
        if rights.has_changed().unwrap_or(false) || Instant::now() >= look_at {
            rights.mark_unchanged();
            who.renew(app).await?;
            look_at = Instant::now() + GRANTED_EVERY;
        }
        let task = app.tasks.journal.narrow(id).await.map_err(Error::from)?.ok_or(Error::NotFound("task"))?;
        let now = Instant::now();
        // Approval is a person's, and takes its time.
        if task.progress.state.is_final() || task.progress.state == TaskState::AwaitingApproval || now >= until {
            return Ok(who);
        }
        ear.say(now - begun, secs, &task).await;
        tokio::select! {
            biased;
            () = ear.gone.cancelled() => return Ok(who),
            () = app.stop.cancelled() => return Ok(who),
            _ = watch.ended() => {}
            _ = rights.changed() => rights.mark_changed(),
            () = tokio::time::sleep_until(until.min(now + PROGRESS_EVERY)) => {}
        }
    }
}

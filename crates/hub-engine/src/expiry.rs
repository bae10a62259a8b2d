//! The end of sessions: those whose time has come are ended, with their tasks, and what was asked to be
//! erased is erased. All of it is written down first, so that a hub that starts again goes on with it.

use crate::audit::{self, Action};
use crate::error::{Error, Result};
use crate::events::SessionNews;
use crate::ports::Purges;
use crate::records::{PurgeStart, PurgeStep, Session};
use crate::sessions::Sessions;
use crate::tasks::{TaskService, stopped};
use mesh_core::permission::{Caller, Permission};
use mesh_core::{SessionId, TaskId};
use mesh_process::SharedClock;
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// The longest between two looks; the shortest life of a session, so that none is overlooked.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// The shortest, when ends stand close together.
const LOOK_SOON: Duration = Duration::from_millis(20);
/// Sessions that one commit ends.
const ENDED_AT_ONCE: u32 = 100;
/// Rows that one commit erases.
const ERASED_AT_ONCE: u32 = 200;
/// Looks between two at what an earlier process may have left of an erasure.
const SWEEP_EVERY: u32 = 60;

pub struct Expiry {
    pub sessions: Arc<Sessions>,
    pub tasks: Arc<TaskService>,
    pub purges: Arc<dyn Purges>,
    pub clock: SharedClock,
    pub unsettled: Unsettled,
}

/// Sessions that have ended and whose tasks were not all asked to end yet.
#[derive(Debug, Default)]
pub struct Unsettled(Mutex<BTreeSet<SessionId>>);

impl Unsettled {
    fn lock(&self) -> MutexGuard<'_, BTreeSet<SessionId>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Expiry {
    /// The reconciler. Runs until dropped.
    pub async fn run(&self) {
        for n in 0u32.. {
            let next = self.round().await.unwrap_or_else(|error| {
                tracing::warn!(%error, "ending sessions failed; it is tried again");
                LOOK_AGAIN
            });
            if n % SWEEP_EVERY == 0
                && let Err(error) = self.finish_purges().await
            {
                tracing::warn!(%error, "erasing closed sessions failed; it is tried again");
            }
            tokio::time::sleep(next).await;
        }
    }

    /// Ends the sessions whose time has come; gives how long until the next look. Idempotent.
    pub async fn round(&self) -> Result<Duration> {
        loop {
            let ended = self.sessions.store.expire_sessions(self.clock.now_ms(), ENDED_AT_ONCE).await?;
            for (id, owner) in &ended {
                self.sessions.events.session(*id, *owner, SessionNews::Expired);
                self.unsettled.lock().insert(*id);
            }
            // Also those of an earlier round that failed half-way.
            let unsettled = self.unsettled.lock().clone();
            if unsettled.is_empty() {
                break;
            }
            self.tasks.end_tasks_of(&unsettled).await?;
            self.unsettled.lock().retain(|id| !unsettled.contains(id));
        }
        let until = match self.sessions.store.next_end().await? {
            None => LOOK_AGAIN,
            Some(end) => Duration::from_millis(end.saturating_sub(self.clock.now_ms()).max(0) as u64),
        };
        Ok(until.clamp(LOOK_SOON, LOOK_AGAIN))
    }

    /// Erases what an ended session held: memory, messages, activity, output and results of its tasks.
    /// Asking again is the same as once.
    pub async fn purge(self: &Arc<Self>, caller: &Caller, id: SessionId) -> Result<Session> {
        audit::doing(caller, Action::SessionPurge);
        audit::about(id);
        let session = self.sessions.permitted(caller, id, Permission::SessionsWrite).await?;
        self.tasks.not_restored()?;
        let (own, by) = (self.clone(), caller.user());
        let purge = async move {
            match own.purges.begin_purge(id, by, own.clock.now_ms()).await? {
                PurgeStart::Unknown => return Err(Error::NotFound("session")),
                PurgeStart::Active => {
                    return Err(Error::conflict("session_active", "only a closed or expired session is erased; close it first"));
                }
                PurgeStart::TasksOpen => {
                    return Err(Error::conflict("tasks_open", "a task of the session has not ended yet; it may still send output"));
                }
                PurgeStart::Done => return Ok(()),
                PurgeStart::Begun => {}
            }
            own.erase(id).await?;
            own.sessions.events.session(session.id, session.owner, SessionNews::Purged);
            Ok(())
        };
        self.tasks.work.complete("purge session", audit::carry(purge)).await.ok_or_else(stopped)??;
        self.sessions.get(caller, id).await
    }

    async fn erase(&self, id: SessionId) -> Result<()> {
        let mut after: Option<TaskId> = None;
        while let PurgeStep::Until(task) = self.purges.purge_step(id, after, ERASED_AT_ONCE).await? {
            after = task;
        }
        self.sweep().await
    }

    async fn sweep(&self) -> Result<()> {
        while self.purges.sweep(ERASED_AT_ONCE).await? > 0 {}
        Ok(())
    }

    /// Goes on with what was begun and not finished.
    pub async fn finish_purges(&self) -> Result<()> {
        for id in self.purges.purging(ENDED_AT_ONCE).await? {
            self.erase(id).await?;
        }
        self.sweep().await
    }
}

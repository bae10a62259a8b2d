//! How a person leaves: at once they may do nothing more, and what was theirs passes to a successor.
//!
//! One write removes the person, their log-ins and keys, and says in the row what is to follow. The rest is
//! done in steps from that row, each as often as it takes: by whoever removed the person, and by a
//! reconciler where that failed, the process ended, or something of theirs came a moment later.

use crate::agents::Agents;
use crate::audit::{self, Action};
use crate::error::{Error, Result};
use crate::manage::Management;
use crate::ports::{Audit, Journal, Window};
use crate::records::{Leaving, Removal, Standing, Task, TaskFilter};
use crate::tasks::{TaskService, stopped};
use crate::users::{Users, administers, last_admin};
use mesh_core::permission::Caller;
use mesh_core::task::{ReasonCode, TaskState};
use mesh_core::{TaskId, UserId};
use std::sync::Arc;
use std::time::Duration;

/// How soon a reconciler goes on with what is left.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Things that one commit hands over, and tasks that one read brings.
const AT_ONCE: u32 = 200;
/// A call that began before the removal is over by then, on every hub.
const LATE_MS: i64 = 300_000;

pub struct Departures {
    pub users: Arc<Users>,
    pub journal: Arc<dyn Journal>,
    pub audit: Arc<dyn Audit>,
    pub tasks: Arc<TaskService>,
    pub manage: Arc<Management>,
    pub agents: Arc<Agents>,
}

/// What becomes of a person's things.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Will {
    /// None: to who asks.
    pub transfer_to: Option<UserId>,
    /// Running work is cancelled, and does not finish.
    pub cancel: bool,
    /// What tells who the person was is erased.
    pub purge: bool,
}

impl Departures {
    /// Removes a person. Of one who was removed before, what tells who they were can still be erased.
    pub async fn remove(self: &Arc<Self>, caller: &Caller, id: UserId, will: Will) -> Result<()> {
        audit::doing(caller, Action::UserRemove);
        audit::about(id);
        audit::detail("purge", will.purge);
        administers(caller)?;
        let store = &self.users.store;
        let entry = store.user_entry(id).await?.ok_or(Error::NotFound("user"))?;
        if matches!(entry.standing, Standing::Removed { .. }) {
            if !will.purge || !store.erase_user(id).await? {
                return Err(Error::NotFound("user"));
            }
            return self.erase_tracks(id).await;
        }
        self.tasks.not_restored()?;
        let successor = will.transfer_to.or(caller.user()).filter(|to| *to != id).ok_or_else(|| {
            Error::invalid("bad_successor", "nobody inherits from themselves; name with transfer_to who is to have what this user owns")
        })?;
        let own = self.clone();
        let remove = async move {
            let leaving = Leaving { user: id, successor, cancel: will.cancel, purge: will.purge, at: own.users.now() };
            match own.users.store.remove_user(&leaving).await? {
                Removal::Done => {}
                Removal::Unknown => return Err(Error::NotFound("user")),
                Removal::LastAdmin => return Err(last_admin()),
                Removal::NoSuccessor => {
                    return Err(Error::invalid(
                        "bad_successor",
                        "transfer_to is the id of an active admin or developer: who can own machines",
                    ));
                }
            }
            tracing::info!(user = %id, %successor, cancel = will.cancel, "user removed");
            own.users.rights_changed(id);
            if let Err(error) = own.settle(&leaving).await {
                tracing::warn!(user = %id, %error, "not all that a removed user owned could be handed over; it is tried again");
            }
            if leaving.purge { own.erase_tracks(id).await } else { Ok(()) }
        };
        self.tasks.work.complete("remove user", audit::carry(remove)).await.ok_or_else(stopped)?
    }

    /// The reconciler. Runs until dropped.
    pub async fn run(&self) {
        loop {
            if let Err(error) = self.round().await {
                tracing::warn!(%error, "handing over what removed users owned failed; it is tried again");
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// One look at those who leave. Idempotent.
    pub async fn round(&self) -> Result<()> {
        for leaving in self.users.store.leaving(AT_ONCE).await? {
            self.settle(&leaving).await?;
        }
        Ok(())
    }

    async fn settle(&self, leaving: &Leaving) -> Result<()> {
        let store = &self.users.store;
        let mut moved = false;
        // Under their own name still, so that whoever inherits the rest begins nothing of it.
        self.agents.end_all_of(leaving.user, leaving.cancel).await?;
        while !store.hand_over(leaving.user, AT_ONCE).await? {
            moved = true;
        }
        if moved {
            // The links of their machines have a new owner, and so have those who wait for these.
            self.manage.follow().await?;
        }
        let open = self.end_work(leaving).await?;
        if !moved && !open && self.users.now() >= leaving.at + LATE_MS {
            // Calls that began before the removal have left their entries by now.
            if leaving.purge {
                self.erase_tracks(leaving.user).await?;
            }
            store.left(leaving.user).await?;
        }
        Ok(())
    }

    /// Who they were, in the audit: what they did stays.
    async fn erase_tracks(&self, user: UserId) -> Result<()> {
        while self.audit.erase_person(user, AT_ONCE).await? > 0 {}
        Ok(())
    }

    /// Ends what is not to finish; gives whether anything goes on.
    async fn end_work(&self, leaving: &Leaving) -> Result<bool> {
        let mut open = false;
        for state in [TaskState::Pending, TaskState::AwaitingApproval, TaskState::Assigned, TaskState::Running] {
            let filter = TaskFilter { user: Some(leaving.user), state: Some(state), ..Default::default() };
            let mut before: Option<TaskId> = None;
            loop {
                let page = self.journal.tasks(&filter, Window { before, limit: AT_ONCE }).await?;
                open |= !page.is_empty();
                for task in page.iter().filter(|t| t.progress.cancel.is_none() && !finishes(leaving, t)) {
                    self.tasks.request_cancel(task.id, ReasonCode::CancelledByUser).await?;
                }
                match page.last() {
                    Some(last) if page.len() == AT_ONCE as usize => before = Some(last.id),
                    _ => break,
                }
            }
        }
        Ok(open)
    }
}

/// Only what a machine may be running by now: nothing begins in the name of somebody who is gone.
fn finishes(leaving: &Leaving, task: &Task) -> bool {
    let granted = task.progress.state != TaskState::Pending && task.progress.attempt.as_ref().is_some_and(|a| a.granted.is_some());
    // A parent runs nothing itself: its children are looked at one by one, and it ends with them.
    !leaving.cancel && (granted || task.is_parent()) && task.created_at <= leaving.at
}

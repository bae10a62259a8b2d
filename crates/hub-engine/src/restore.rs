//! After a restore the journal is older than the world: nodes have run what it does not know, and have
//! forgotten what it believes to be under way.
//!
//! So the hub *holds back* until somebody has looked and said go: links are accepted and left alone,
//! nothing is dispatched, ended or acknowledged. Then, in this order, each step again after a crash:
//! what waited ends as lost, the reconcilers take up the rest, the mark goes, and nodes link anew.

use crate::access::authorize_own;
use crate::agents::Agents;
use crate::audit::{self, Action, Resource};
use crate::error::{Error, Result};
use crate::expiry::Expiry;
use crate::links::{Links, Told};
use crate::manage::Management;
use crate::open_tasks::OpenTasks;
use crate::pool::Pool;
use crate::ports::{Applied, Besides, Journal, Meta};
use crate::records::Restored;
use mesh_core::permission::{Caller, Permission};
use mesh_core::task::{Event, TaskState};
use mesh_core::{NodeId, UnixMs};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// How often a hub that holds back looks whether it may go on.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// What is answered while the hub holds back.
pub fn holds_back() -> Error {
    let detail = "the hub was restored from a backup and does nothing until its operator has looked and run: cortex-hub restore --go";
    Error::Unavailable { code: "restored", detail: detail.into() }
}

pub struct Recovery {
    pub meta: Arc<dyn Meta>,
    pub journal: Arc<dyn Journal>,
    pub links: Arc<Links>,
    pub pool: Arc<Pool>,
    pub manage: Arc<Management>,
    pub expiry: Arc<Expiry>,
    pub agents: Arc<Agents>,
}

impl Recovery {
    /// What a start does before anybody can ask: ends what ended meanwhile and takes up what is open.
    /// False when the hub must hold back first; then [`Recovery::wait`] does it.
    pub async fn start(&self) -> Result<bool> {
        match self.meta.restored().await? {
            Some(mark) if !mark.go => {
                self.links.hold_back();
                Ok(false)
            }
            mark => self.take_up(mark).await.map(|()| true),
        }
    }

    /// Holds back until the word comes, and then does what a start does.
    pub async fn wait(&self) {
        loop {
            match self.look().await {
                Ok(true) => return,
                Ok(false) => {}
                Err(error) => tracing::warn!(%error, "going on after a restore failed; it is tried again"),
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// One look; true when the hub has gone on.
    pub async fn look(&self) -> Result<bool> {
        match self.meta.restored().await? {
            Some(mark) if !mark.go => return Ok(false),
            // Another hub of this store may have done it.
            mark => self.take_up(mark).await?,
        }
        self.links.go();
        tracing::warn!("the hub goes on after its restore");
        Ok(true)
    }

    async fn take_up(&self, mark: Option<Restored>) -> Result<()> {
        if let Some(mark) = mark {
            self.end_waiting(mark.at).await?;
            self.agents.end_restored(mark.at).await?;
        }
        self.expiry.round().await?;
        self.pool.recover().await?;
        self.manage.recover().await?;
        if mark.is_some() {
            audit::asked(Action::HubGo);
            audit::about(Resource::new("hub", ""));
            self.meta.released().await?;
        }
        Ok(())
    }

    /// What waited in the backup may have been given to a node since, run and been forgotten there.
    async fn end_waiting(&self, restored_at: UnixMs) -> Result<()> {
        let mut open = OpenTasks::all(&*self.journal);
        let mut ended = 0;
        while let Some(task) = open.next().await? {
            let p = &task.progress;
            // Its time had not come when the hub of before had ended.
            let not_yet = task.terms.not_before.max(p.retry_at).is_some_and(|at| at > restored_at);
            let may_have_run = match p.state {
                TaskState::Pending | TaskState::AwaitingApproval => !not_yet,
                // A node was told of it ahead, and may have been let go on since.
                TaskState::Assigned => p.attempt.as_ref().is_some_and(|a| a.granted.is_none()),
                _ => false,
            };
            if may_have_run {
                if let Applied::Done(task, actions) = self.pool.apply(task.id, &Event::Restored, Besides::default()).await? {
                    self.pool.perform(&task, &actions);
                }
                ended += 1;
            }
        }
        if ended > 0 {
            tracing::warn!(ended, "tasks that waited in the backup may have run since; they are ended as lost");
        }
        Ok(())
    }

    /// For who looks before the word is given: the mark, and what nodes told of since this process started.
    pub async fn found(&self, caller: &Caller) -> Result<Option<(Restored, BTreeMap<NodeId, Vec<Told>>)>> {
        authorize_own(caller, Permission::SystemAdminister)?;
        let Some(told) = self.links.told() else { return Ok(None) };
        Ok(self.meta.restored().await?.map(|mark| (mark, told)))
    }
}

//! Which tasks are runs of agents: where what they write goes, and who is to hear how they fare.

use crate::error::Result;
use crate::ports;
use crate::records::{LogSource, OutputFrame, Task};
use mesh_core::task::AttemptNo;
use mesh_core::{AgentId, TaskId};
use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use tokio::sync::{Notify, watch};

/// So much of what a run writes stays with its task: its beginning. All of it goes to the agent's log.
pub const RUN_OUTPUT_BYTES: u64 = 64 << 10;

/// Clones share all of it. A hub without agents has none in it.
#[derive(Clone, Default)]
pub struct Runs(Arc<Inner>);

#[derive(Default)]
struct Inner {
    state: Mutex<State>,
    woken: Notify,
    log: OnceLock<(Arc<dyn ports::Agents>, u64)>,
}

#[derive(Default)]
struct State {
    /// Of agents that live. It is filled before any link is there.
    agents: HashMap<TaskId, AgentId>,
    /// To be looked at: a hint, however often it is given.
    changed: BTreeSet<AgentId>,
    ears: HashMap<AgentId, watch::Sender<u64>>,
}

impl fmt::Debug for Runs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Runs")
    }
}

impl Runs {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where logs are kept, and how much of each.
    pub(crate) fn log_to(&self, store: Arc<dyn ports::Agents>, keep_bytes: u64) {
        let _ = self.0.log.set((store, keep_bytes));
    }
    pub(crate) fn note(&self, task: TaskId, agent: AgentId) {
        self.state().agents.insert(task, agent);
    }
    pub(crate) fn forget(&self, task: TaskId) {
        self.state().agents.remove(&task);
    }

    /// Something happened to a task.
    pub(crate) fn stepped(&self, task: &Task) {
        if let Some(agent) = task.actor.agent {
            self.changed(agent);
        }
    }
    pub(crate) fn changed(&self, agent: AgentId) {
        self.state().changed.insert(agent);
        self.0.woken.notify_one();
    }
    pub(crate) fn take_changed(&self) -> BTreeSet<AgentId> {
        std::mem::take(&mut self.state().changed)
    }
    pub(crate) async fn woken(&self) {
        self.0.woken.notified().await;
    }

    /// Takes what a run wrote into its agent's log. None: it is no run. `Some(None)`: a frame between is missing.
    pub(crate) async fn wrote(
        &self,
        task: TaskId,
        attempt: AttemptNo,
        frames: &[OutputFrame],
        from_here: bool,
    ) -> Result<Option<Option<u64>>> {
        let agent = self.state().agents.get(&task).copied();
        let (Some(agent), Some((store, keep))) = (agent, self.0.log.get()) else { return Ok(None) };
        let taken = store.add_log(agent, LogSource { task, attempt }, frames.to_vec(), from_here, *keep).await?;
        self.told(agent);
        Ok(Some(taken))
    }

    /// There is more in an agent's log, or it has changed itself.
    pub(crate) fn told(&self, agent: AgentId) {
        if let Some(ear) = self.state().ears.get(&agent) {
            ear.send_modify(|n| *n = n.wrapping_add(1));
        }
    }
    /// Subscribes before reading, so that no news falls between.
    pub(crate) fn listen(&self, agent: AgentId) -> Ear {
        let news = self.state().ears.entry(agent).or_insert_with(|| watch::channel(0).0).subscribe();
        Ear { agent, news: Some(news), runs: self.clone() }
    }
}

/// Of one who follows an agent. The last one takes its entry away.
#[derive(Debug)]
pub struct Ear {
    agent: AgentId,
    news: Option<watch::Receiver<u64>>,
    runs: Runs,
}

impl Ear {
    /// From here on, only what comes later counts as news.
    pub fn seen(&mut self) {
        if let Some(news) = &mut self.news {
            news.borrow_and_update();
        }
    }
    /// Waits for news.
    pub async fn changed(&mut self) {
        if let Some(news) = &mut self.news {
            // The sender lives as long as an ear does, so this ends by news alone.
            let _ = news.changed().await;
        }
    }
}

impl Drop for Ear {
    fn drop(&mut self) {
        let mut state = self.runs.state();
        drop(self.news.take());
        if state.ears.get(&self.agent).is_some_and(|ear| ear.receiver_count() == 0) {
            state.ears.remove(&self.agent);
        }
    }
}

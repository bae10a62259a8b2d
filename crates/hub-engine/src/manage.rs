//! What people do to a machine: rename, label, bound, drain, revoke, remove; and how that takes effect
//! on its link and its tasks, on every hub.
//!
//! The row comes first. Then the node is *retired* in [`crate::links`], which cuts its link, and only
//! then its tasks are ended. An attempt that is committed in between looks there after its commit, so
//! either the one sees the other or the other sees the one.

use crate::access::authorize;
use crate::audit::{self, Action};
use crate::error::{Error, Result};
use crate::events::{NodeNews, Whose};
use crate::nodes::{Nodes, check_labels};
use crate::open_tasks::OpenTasks;
use crate::pool::Pool;
use crate::ports::{Applied, Besides, Journal, Window};
use crate::records::{Node, NodeChange, Task, TaskFilter};
use mesh_core::permission::{Caller, Permission};
use mesh_core::select::{MAX_SLOTS, MAX_TERMS};
use mesh_core::task::{Event, TaskState};
use mesh_core::{NodeId, TaskId, name};
use mesh_process::Tasks;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// How soon another hub's changes are noticed here, and what failed is tried again.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// Tasks that one read of the journal brings.
const TASKS_AT_ONCE: u32 = 500;
/// The most that a hub allows a machine at once.
pub const MAX_TASK_LIMIT: u32 = 1024;
/// The last word on a task that waits for a node which never comes back.
const NAMED_NODE_GONE: &str = "node_revoked";

pub struct Management {
    pub nodes: Arc<Nodes>,
    pub journal: Arc<dyn Journal>,
    pub pool: Arc<Pool>,
    /// What crosses a commit runs here to its end, whether or not its caller waits.
    pub work: Tasks,
    pub seen: Seen,
}

/// How far this hub has followed the registry.
#[derive(Debug, Default)]
pub struct Seen(AtomicU64);

impl Management {
    /// Changes what is named and leaves the rest; gives the node as it is then.
    pub async fn change(self: &Arc<Self>, caller: &Caller, id: NodeId, change: NodeChange) -> Result<Node> {
        audit::doing(caller, Action::NodeChange);
        audit::about(id);
        let before = self.permitted(caller, id).await?;
        if change == NodeChange::default() {
            return Err(Error::invalid("nothing_to_change", "name what is to change: name, labels, slots or max_tasks"));
        }
        check(&before, &change)?;
        let own = self.clone();
        self.finish("change node", async move {
            let node = own.nodes.store.change_node(id, &change).await?.ok_or_else(gone)?;
            own.tell_changes(&before, &node);
            own.apply(&node);
            Ok(node)
        })
        .await
    }

    /// No new work until it is resumed; what runs goes on. Doing it again changes nothing.
    pub async fn drain(self: &Arc<Self>, caller: &Caller, id: NodeId) -> Result<Node> {
        self.set_draining(caller, id, true).await
    }
    pub async fn resume(self: &Arc<Self>, caller: &Caller, id: NodeId) -> Result<Node> {
        self.set_draining(caller, id, false).await
    }
    async fn set_draining(self: &Arc<Self>, caller: &Caller, id: NodeId, draining: bool) -> Result<Node> {
        audit::doing(caller, if draining { Action::NodeDrain } else { Action::NodeResume });
        audit::about(id);
        let before = self.permitted(caller, id).await?;
        if before.draining == draining && before.revoked_at.is_none() {
            return Ok(before);
        }
        self.change(caller, id, NodeChange { draining: Some(draining), ..Default::default() }).await
    }

    /// Ends the node for good: its link at once, its granted attempts as `node_revoked`. The entry stays.
    pub async fn revoke(self: &Arc<Self>, caller: &Caller, id: NodeId) -> Result<Node> {
        audit::doing(caller, Action::NodeRevoke);
        audit::about(id);
        let before = self.permitted(caller, id).await?;
        let own = self.clone();
        self.finish("revoke node", async move {
            let node = own.nodes.store.revoke_node(id, own.nodes.clock.now_ms()).await?.ok_or(Error::NotFound("node"))?;
            own.nodes.links.retire(id);
            if before.revoked_at.is_none() {
                tracing::info!(node = %id, name = %node.name, "node revoked");
                own.nodes.events.node(&node, NodeNews::Revoked);
            }
            own.settle_or_later(id).await;
            Ok(node)
        })
        .await
    }

    /// As a revocation, and its entry and attachments go too. Its tasks stay to be read.
    pub async fn remove(self: &Arc<Self>, caller: &Caller, id: NodeId) -> Result<()> {
        audit::doing(caller, Action::NodeRemove);
        audit::about(id);
        let node = self.permitted(caller, id).await?;
        let own = self.clone();
        self.finish("remove node", async move {
            if !own.nodes.store.remove_node(id, own.nodes.clock.now_ms()).await? {
                return Err(Error::NotFound("node"));
            }
            own.nodes.links.retire(id);
            own.nodes.history.forget(id);
            tracing::info!(node = %id, name = %node.name, "node removed");
            own.nodes.events.node(&node, NodeNews::Removed);
            own.settle_or_later(id).await;
            Ok(())
        })
        .await
    }

    async fn finish<T: Send + 'static>(&self, what: &'static str, work: impl Future<Output = Result<T>> + Send + 'static) -> Result<T> {
        self.work.complete(what, audit::carry(work)).await.ok_or_else(crate::tasks::stopped)?
    }

    async fn permitted(&self, caller: &Caller, id: NodeId) -> Result<Node> {
        let node = self.nodes.store.node(id).await?.ok_or(Error::NotFound("node"))?;
        authorize(caller, Permission::NodesManage, node.thing(), Permission::NodesRead, "node")?;
        Ok(node)
    }

    fn tell_changes(&self, before: &Node, node: &Node) {
        let events = &self.nodes.events;
        if before.name != node.name {
            events.node(node, NodeNews::Renamed { name: node.name.clone() });
        }
        let terms = |n: &Node| (n.labels.clone(), n.slots.clone(), n.task_limit);
        if terms(before) != terms(node) {
            let offers = node.offers();
            let (labels, slots) = (offers.labels, offers.slots);
            events.node(node, NodeNews::Changed { labels, slots, task_limit: node.task_limit });
        }
        if before.draining != node.draining {
            events.node(node, if node.draining { NodeNews::Draining } else { NodeNews::Resumed });
        }
    }

    /// Takes a row of the registry over to the live link.
    fn apply(&self, node: &Node) {
        self.nodes.links.set(node);
        self.pool.wake();
    }

    /// Ends or moves what the journal holds for a retired node. What fails is done by [`Self::follow`].
    async fn settle_or_later(&self, id: NodeId) {
        if self.nodes.links.holds_back() {
            // What the journal says of its tasks may be out of date; they are ended when the hub goes on.
            return self.nodes.links.unsettle(id);
        }
        if let Err(error) = self.settle(id).await {
            tracing::warn!(node = %id, %error, "the tasks of a revoked node could not be ended; it is tried again");
            self.nodes.links.unsettle(id);
        }
    }

    async fn settle(&self, id: NodeId) -> Result<()> {
        self.nodes.links.begin_settling(id);
        // In the order of a task's life, so that none passes by between two reads, and once more those that
        // wait: some came back to that meanwhile.
        for state in [TaskState::Pending, TaskState::Assigned, TaskState::Running, TaskState::Pending] {
            let filter = TaskFilter { node: Some(id), state: Some(state), ..Default::default() };
            let mut before: Option<TaskId> = None;
            loop {
                let page = self.journal.tasks(&filter, Window { before, limit: TASKS_AT_ONCE }).await?;
                let ends = page.iter().map(|task| self.pool.leave(task, id));
                futures::future::join_all(ends).await.into_iter().collect::<Result<Vec<_>>>()?;
                match page.last() {
                    Some(last) if page.len() == TASKS_AT_ONCE as usize => before = Some(last.id),
                    _ => break,
                }
            }
        }
        Ok(())
    }

    /// Ends what a process left that ended between a node's row and its tasks. To be called at the start.
    pub async fn recover(&self) -> Result<()> {
        // First: what is changed from here on is followed.
        self.seen.0.store(self.nodes.store.registry_epoch().await?, Ordering::SeqCst);
        let mut named = BTreeSet::new();
        let mut open = OpenTasks::all(&*self.journal);
        while let Some(task) = open.next().await? {
            named.extend(task.progress.attempt.as_ref().map(|a| a.node));
            named.extend(task.named_node);
        }
        let ids: Vec<NodeId> = named.iter().copied().collect();
        for id in self.nodes.store.living(&ids).await? {
            named.remove(&id);
        }
        for id in named {
            self.nodes.links.retire(id);
            self.settle(id).await?;
        }
        Ok(())
    }

    /// The reconciler: takes over what any hub changed, and ends what could not be ended before. Runs
    /// until dropped.
    pub async fn run(&self) {
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            if let Err(error) = self.follow().await {
                tracing::warn!(%error, "following the registry failed; it is tried again");
            }
        }
    }

    /// One look at the registry. Idempotent.
    pub async fn follow(&self) -> Result<()> {
        let links = &self.nodes.links;
        let news = self.nodes.store.changed_since(self.seen.0.load(Ordering::SeqCst)).await?;
        for node in &news.nodes {
            match node.revoked_at {
                Some(_) => links.retire(node.id),
                None => self.apply(node),
            }
        }
        news.removed.iter().for_each(|id| links.retire(*id));
        for user in &news.users {
            self.pool.rights_changed();
            self.nodes.events.rights_changed(Whose::User(*user));
        }
        self.seen.0.store(news.epoch, Ordering::SeqCst);
        for id in links.unsettled() {
            self.settle_or_later(id).await;
        }
        Ok(())
    }
}

impl Pool {
    /// Gives the task as it is once its commit has met a revocation that came at the same moment.
    pub(crate) async fn after_commit(&self, task: Box<Task>) -> Box<Task> {
        let node = task.progress.attempt.as_ref().map(|a| a.node).or(task.named_node);
        let Some(node) = node.filter(|n| self.links.is_retired(*n)) else { return task };
        match self.leave(&task, node).await {
            Ok(left) => left.map_or(task, Box::new),
            Err(error) => {
                tracing::warn!(task = %task.id, %error, "a task on a revoked node could not be ended; it is tried again");
                self.links.unsettle(node);
                task
            }
        }
    }

    /// Takes a task from a retired node: a granted attempt ends, one that was not granted goes elsewhere,
    /// and a task that may run nowhere else fails. None when the task has nothing to do with the node.
    pub(crate) async fn leave(&self, task: &Task, node: NodeId) -> Result<Option<Task>> {
        let mut left: Option<Task> = None;
        loop {
            let now = left.as_ref().unwrap_or(task);
            let p = &now.progress;
            let event = match (&p.attempt, p.state) {
                (Some(a), TaskState::Assigned | TaskState::Running) if a.node == node => match a.granted {
                    Some(_) => Event::NodeRevoked { attempt: a.no },
                    None => Event::Withdrawn { attempt: a.no },
                },
                (_, TaskState::Pending) if now.named_node == Some(node) => Event::Expired { detail: NAMED_NODE_GONE.into() },
                _ => return Ok(left),
            };
            match self.apply(now.id, &event, Besides::default()).await? {
                Applied::Done(task, actions) => {
                    if task.progress.state.is_final() {
                        self.forget(task.id);
                    }
                    self.perform(&task, &actions);
                    left = Some(*task);
                }
                // It went on meanwhile; whoever did that looks for retired nodes too.
                Applied::Refused(_) | Applied::Unknown => return Ok(left),
            }
        }
    }
}

fn gone() -> Error {
    Error::conflict("node_revoked", "this node was revoked; it can only be removed")
}

fn check(node: &Node, change: &NodeChange) -> Result<()> {
    if let Some(n) = &change.name {
        name::check(n).map_err(|e| Error::invalid("bad_name", e))?;
    }
    if let Some(labels) = &change.labels {
        check_labels(labels)?;
        if let Some(key) = labels.keys().find(|k| node.is_hub_label(k)) {
            return Err(Error::invalid("bad_label", format!("the hub sets the label {key:?} from the machine itself")));
        }
    }
    if let Some(Some(slots)) = &change.slots {
        check_slots(slots)?;
    }
    match change.task_limit {
        Some(Some(n)) if !(1..=MAX_TASK_LIMIT).contains(&n) => {
            Err(Error::invalid("bad_max_tasks", format!("max_tasks is 1 to {MAX_TASK_LIMIT}, or 0 for no bound of the hub, not {n}")))
        }
        _ => Ok(()),
    }
}

fn check_slots(slots: &BTreeMap<String, u32>) -> Result<()> {
    let bad = |text: String| Error::invalid("bad_slots", text);
    if slots.len() > MAX_TERMS {
        return Err(bad(format!("a node has at most {MAX_TERMS} kinds of slot")));
    }
    for (kind, n) in slots {
        name::check(kind).map_err(|e| bad(format!("slot {kind:?}: {e}")))?;
        if kind.contains(['=', ',']) {
            return Err(bad(format!("slot {kind:?} holds '=' or ',', which selectors use")));
        }
        if *n > MAX_SLOTS {
            return Err(bad(format!("slots of {kind:?} are 0 to {MAX_SLOTS}, not {n}")));
        }
    }
    Ok(())
}

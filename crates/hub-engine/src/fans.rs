//! Fan-outs: one task for each node that matches, and their parent.
//!
//! Parent and children are one commit. The parent's end is a step of its own: whoever ends a child notes
//! the parent, and the pool's next look ends it if that was the last one. A start notes every open parent,
//! so a hub that dies between the two goes on where it was.

use crate::audit;
use crate::error::{Error, Result};
use crate::idempotency::Keyed;
use crate::links::LinkCommand;
use crate::pool::{Accepted, PLACE_AT_ONCE, Pool};
use crate::ports::{Applied, Besides, Creation, Fan, Window};
use crate::queue::Eligible;
use crate::records::{Children, Session, Task, TaskFilter};
use mesh_core::fan::MAX_CHILDREN;
use mesh_core::permission::Caller;
use mesh_core::select::Selector;
use mesh_core::task::{Event, Progress, ReasonCode, Refused};
use mesh_core::{NodeId, TaskId};
use mesh_process::entropy;
use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// What the specs of one fan-out's children come to: each has its own.
pub const MAX_FAN_BYTES: usize = 32 << 20;

/// Parents of which a child has ended since the last look.
#[derive(Debug, Default)]
pub(crate) struct Fans(Mutex<BTreeSet<TaskId>>);

impl Fans {
    fn noted(&self) -> MutexGuard<'_, BTreeSet<TaskId>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
    pub(crate) fn note(&self, parent: TaskId) {
        self.noted().insert(parent);
    }
    fn take(&self) -> Vec<TaskId> {
        std::mem::take(&mut *self.noted()).into_iter().collect()
    }
}

impl Pool {
    /// Writes a parent with a child for each node that is online, takes work, fits the selector and may be
    /// used by the caller; each child has its first attempt if there is a place for it now.
    pub(crate) async fn accept_fan(
        &self,
        parent: Box<Task>,
        caller: &Caller,
        session: Option<&Session>,
        keyed: Option<&Keyed>,
    ) -> Result<Accepted> {
        let eligible = self.eligible_now(caller, session).await?;
        let nodes = self.matching(&parent, &eligible);
        if nodes.is_empty() {
            return Err(Error::conflict("no_node", "no node is online that takes work, fits the selector and may be used by you"));
        }
        if nodes.len() > MAX_CHILDREN {
            let detail = format!("{} nodes match, and one fan-out goes to at most {MAX_CHILDREN}; narrow the selector", nodes.len());
            return Err(Error::invalid("too_many_nodes", detail));
        }
        if parent.spec.len().saturating_mul(nodes.len()) > MAX_FAN_BYTES {
            let most = MAX_FAN_BYTES / nodes.len();
            let detail = format!(
                "for {} nodes a task may have {most} bytes, its input included, and this one has {}",
                nodes.len(),
                parent.spec.len()
            );
            return Err(Error::invalid("too_large", detail));
        }
        audit::detail("nodes", nodes.len());
        let mut fan = self.fan(*parent, &nodes);
        let placed: Vec<_> = fan.children.iter_mut().map(|child| self.first_place(child, &eligible)).collect();
        fan.parent.children = Some(Children::of(&fan.children));
        let written = match keyed {
            Some(k) => k.create(Creation::Fan(Box::new(fan.clone()))).await,
            None => self.journal.accept_fan(&fan).await.map(|()| None).map_err(Error::from),
        };
        let Ok(None) = written else {
            self.queue.origins.forget(fan.parent.id);
            for (child, placed) in fan.children.iter().zip(&placed) {
                self.unplace(child, placed);
            }
            return match written {
                Ok(before) => before.map(Accepted::Before).ok_or(Error::NotFound("task")),
                // It may have been done all the same.
                Err(e) => {
                    fan.tasks().for_each(|t| self.queue.doubt(t.id));
                    Err(e)
                }
            };
        };
        self.events.accepted(&fan.parent);
        self.tracks().accepted(&fan.parent);
        let request = self.queue.origins.of(fan.parent.id);
        for (child, placed) in fan.children.into_iter().zip(placed) {
            if let Some(request) = &request {
                self.queue.origins.note(child.id, request.clone());
            }
            self.accepted(&child, placed, &eligible);
            self.after_commit(Box::new(child)).await;
        }
        Ok(Accepted::New(Box::new(fan.parent)))
    }

    /// In a fixed order.
    fn matching(&self, parent: &Task, eligible: &Eligible) -> Vec<NodeId> {
        let select = parent.terms.select.as_ref();
        let links = self.links.all();
        let fit = links.iter().filter(|l| l.is_open() && eligible.allows(l) && select.is_none_or(|s| s.fits(&l.offers)));
        fit.map(|l| l.node).collect()
    }

    fn fan(&self, mut parent: Task, nodes: &[NodeId]) -> Fan {
        let now = parent.created_at;
        // The labels have chosen; what is held of a node is still to be held.
        let slots = parent.terms.select.as_ref().map(|s| s.slots.clone()).filter(|slots| !slots.is_empty());
        let mut base = Task { parent: Some(parent.id), children: None, progress: Progress::new(), ..parent.clone() };
        base.terms.select = slots.map(|slots| Selector { slots, ..Selector::default() });
        let child = |node: &NodeId| {
            let mut child = Task { id: TaskId::from_parts(now, entropy::bytes()), named_node: Some(*node), ..base.clone() };
            child.seal = self.keyring.seal(&child.intent());
            child
        };
        let children = nodes.iter().map(child).collect();
        parent.seal = self.keyring.seal(&parent.intent());
        Fan { parent, children }
    }

    /// Ends the parents whose last child has ended. A failed look leaves them to the next.
    pub(crate) async fn end_fans(&self) -> Result<()> {
        let mut failed = Ok(());
        for some in self.queue.fans.take().chunks(PLACE_AT_ONCE) {
            let ends = some.iter().map(|id| async move { (*id, self.end_fan(*id).await) });
            for (id, ended) in futures::future::join_all(ends).await {
                if ended.is_err() {
                    self.queue.fans.note(id);
                    failed = ended;
                }
            }
        }
        failed
    }
    async fn end_fan(&self, parent: TaskId) -> Result<()> {
        let Some(ends) = self.journal.ends_of(parent).await? else { return Ok(()) };
        let applied = self.apply(parent, &Event::ChildrenEnded { ends }, Besides::default()).await?;
        if let Applied::Done(task, actions) = applied {
            self.perform(&task, &actions);
        }
        Ok(())
    }

    /// Asks for the end of a task; of a parent's, for that of each child.
    pub(crate) async fn ask_end(&self, id: TaskId, reason: ReasonCode) -> Result<Applied> {
        let applied = self.ask_end_of_one(id, reason).await?;
        let parent = match &applied {
            Applied::Done(task, _) => task.is_parent(),
            // Its children may not have heard the first one.
            Applied::Refused(Refused::Repeated) => self.journal.narrow(id).await?.is_some_and(|t| t.is_parent()),
            _ => false,
        };
        if parent {
            self.cancel_children(id, reason).await?;
        }
        Ok(applied)
    }

    pub(crate) async fn cancel_children(&self, parent: TaskId, reason: ReasonCode) -> Result<()> {
        let filter = TaskFilter { parent: Some(parent), ..TaskFilter::default() };
        let mut before = None;
        loop {
            let page = self.journal.tasks(&filter, Window { before, limit: PLACE_AT_ONCE as u32 }).await?;
            let Some(last) = page.last() else { return Ok(()) };
            before = Some(last.id);
            let open = page.iter().filter(|t| !t.progress.state.is_final());
            let asked = open.map(|t| self.ask_end_of_one(t.id, reason));
            futures::future::join_all(asked).await.into_iter().collect::<Result<Vec<_>>>()?;
        }
    }

    async fn ask_end_of_one(&self, id: TaskId, reason: ReasonCode) -> Result<Applied> {
        let applied = self.apply(id, &Event::CancelRequested { reason }, Besides::default()).await?;
        match &applied {
            Applied::Done(task, actions) => self.perform(task, actions),
            // The node may not have heard the first one; it takes a second as the same.
            Applied::Refused(Refused::Repeated) => {
                if let Some(task) = self.journal.narrow(id).await?
                    && let Some(a) = task.progress.attempt.filter(|_| !task.progress.state.is_final())
                {
                    self.links.send(a.node, LinkCommand::Cancel { task: id, attempt: a.no });
                }
            }
            Applied::Refused(_) | Applied::Unknown => {}
        }
        Ok(applied)
    }
}

//! Tasks: accept, look, cancel. What happens on the way to a node is in [`crate::pool`], what a node
//! says of them in [`crate::delivery`].

use crate::access::{deny, visible};
use crate::audit::{self, Action};
use crate::error::{Error, Result};
use crate::idempotency::{self, Keyed};
use crate::links::Links;
use crate::nodes::Nodes;
use crate::open_tasks::OpenTasks;
use crate::pool::{Accepted, Pool};
use crate::ports::{Applied, Journal, Keyring, Output, Window};
use crate::records::{Actor, Children, OutputFrame, OutputTotals, Session, Stream, Task, TaskEvent, TaskFilter};
use crate::sessions::Sessions;
use crate::watch::{Watch, Watchers};
use mesh_core::fan;
use mesh_core::permission::{Caller, Permission, allows};
use mesh_core::spec::Spec;
use mesh_core::task::{AttemptNo, Progress, ReasonCode, Refused, Terms};
use mesh_core::{NodeId, SessionId, TaskId};
use mesh_process::{CancellationToken, SharedClock, Tasks, entropy};
use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

/// The longest time-out and the longest wait for a node.
const MAX_SECS: u64 = 366 * 86_400;
/// The longest that a dispatch waits for the end.
pub const MAX_WAIT_SECS: u64 = 60;
/// The last part of each stream that a task shows.
pub const TAIL_BYTES: usize = 64 << 10;

/// Specs that one page of a list holds, apart from the small ones.
pub const PAGE_SPEC_BYTES: usize = 4 << 20;

/// What a door asks to be run.
#[derive(Debug, Clone)]
pub struct Dispatch {
    pub session: Option<SessionId>,
    /// Id or name.
    pub node: Option<String>,
    /// On every node that matches: a parent, and a child for each.
    pub all: bool,
    pub spec: Spec,
    pub timeout_secs: u64,
    pub queue_secs: u64,
    pub wait_secs: u64,
    pub terms: Terms,
    /// Makes one task, however often it is asked for.
    pub keyed: Option<Keyed>,
}

/// A task with the ends of its output.
#[derive(Debug, Clone)]
pub struct TaskDetail {
    pub task: Task,
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
}

pub struct TaskService {
    pub journal: Arc<dyn Journal>,
    pub output: Arc<dyn Output>,
    pub keyring: Arc<dyn Keyring>,
    pub nodes: Arc<Nodes>,
    pub sessions: Arc<Sessions>,
    pub links: Arc<Links>,
    pub pool: Arc<Pool>,
    pub watchers: Watchers,
    pub clock: SharedClock,
    /// What crosses a commit runs here to its end, whether or not its caller waits.
    pub work: Tasks,
    /// Ends waits, since the hub is stopping.
    pub stop: CancellationToken,
}

impl TaskService {
    /// Accepts a task: durable, with its sealed intent and — when a node has a free slot — its first
    /// granted attempt, in one commit, before the caller hears of it.
    pub async fn dispatch(self: &Arc<Self>, caller: &Caller, d: Dispatch) -> Result<Task> {
        audit::doing(caller, Action::TaskDispatch);
        audit::within(d.session);
        d.spec.validate().map_err(|e| Error::invalid("bad_spec", e))?;
        for (field, secs) in [("timeout_secs", d.timeout_secs), ("queue_secs", d.queue_secs)] {
            if secs > MAX_SECS {
                return Err(Error::invalid("bad_duration", format!("{field} is at most {MAX_SECS} (a year); 0 means no end")));
            }
        }
        if d.wait_secs > MAX_WAIT_SECS {
            return Err(Error::invalid("bad_wait", format!("wait_secs is at most {MAX_WAIT_SECS}; wait again, or follow the output")));
        }
        let user = crate::access::authorize_own(caller, Permission::TasksDispatch)?;
        let via = caller.as_person().map(|p| p.via.clone()).unwrap_or_default();
        self.not_restored()?;
        if let Some(made) = idempotency::before(d.keyed.as_ref()).await? {
            audit::about(made);
            // What was true when it was made need not hold any more: a session closed, a deadline passed.
            Box::pin(self.permitted(caller, made, Permission::TasksDispatch)).await?;
            return Box::pin(self.awaited(made, d.wait_secs)).await;
        }
        let now = self.clock.now_ms();
        d.terms.validate(now).map_err(|e| Error::invalid(e.code(), e))?;
        if d.node.is_some() && d.terms.select.is_some() {
            return Err(Error::invalid("bad_select", "give node or select: a node that is named is the only candidate"));
        }
        if d.node.is_some() && d.all {
            return Err(Error::invalid("bad_select", "give node or all: a node that is named is the only one"));
        }
        let session = match d.session {
            None => None,
            Some(id) => Some(self.sessions.active(caller, id, Permission::TasksDispatch).await?),
        };
        let named_node = match &d.node {
            None => None,
            Some(text) => Some(self.named(caller, text, session.as_ref()).await?),
        };
        let id = TaskId::from_parts(now, entropy::bytes());
        let spec = d.spec.encode();
        let digest = mesh_core::sha256(&spec);
        // Boxed, since a future that is given it and gives it on would hold it twice.
        let mut task = Box::new(Task {
            id,
            session: d.session,
            named_node,
            actor: Actor { user, key: caller.key_id(), agent: None, door: via.door.to_owned() },
            skill: d.spec.skill().to_owned(),
            spec,
            digest,
            seal: [0; 32],
            timeout_secs: d.timeout_secs,
            queue_secs: d.queue_secs,
            terms: d.terms,
            created_at: now,
            progress: if d.all { fan::begun(now) } else { Progress::new() },
            output: OutputTotals::default(),
            digests: None,
            result: None,
            sandbox_applied: None,
            signed: None,
            parent: None,
            children: d.all.then(Children::default),
        });
        task.seal = self.keyring.seal(&task.intent());
        let mut watch = self.watchers.subscribe(id);
        if let Some(request) = via.request_id {
            self.pool.queue.origins.note(id, request);
        }
        audit::about(id);
        audit::detail("skill", &task.skill);
        audit::detail("spec", Hex(&digest));
        if let Some(node) = named_node {
            audit::detail("node", node);
        }
        let own = self.clone();
        let caller = caller.clone();
        let accepted = async move { own.accept(task, &caller, session, d.keyed).await };
        let accepted = match self.work.complete("dispatch", audit::carry(accepted)).await.ok_or_else(stopped)?? {
            Accepted::New(task) => task,
            // Another request with the same key was there first, a moment ago.
            Accepted::Before(made) => return self.awaited(made, d.wait_secs).await,
        };
        if d.wait_secs == 0 {
            return Ok(*accepted);
        }
        self.end_of(accepted, &mut watch, d.wait_secs).await
    }

    /// A task that is there already, or as it is at its end when that comes in time.
    async fn awaited(&self, id: TaskId, wait_secs: u64) -> Result<Task> {
        let mut watch = self.watchers.subscribe(id);
        let task = self.journal.task(id).await?.ok_or(Error::NotFound("task"))?;
        if wait_secs == 0 || task.progress.state.is_final() {
            return Ok(task);
        }
        self.end_of(Box::new(task), &mut watch, wait_secs).await
    }

    async fn end_of(&self, task: Box<Task>, watch: &mut Watch, wait_secs: u64) -> Result<Task> {
        let id = task.id;
        tokio::select! {
            biased;
            // It may be narrow, and the spec is here.
            ended = watch.ended() => return Ok(Task { spec: task.spec, ..Arc::unwrap_or_clone(ended) }),
            () = self.stop.cancelled() => {}
            () = tokio::time::sleep(Duration::from_secs(wait_secs)) => {}
        }
        self.journal.task(id).await?.ok_or(Error::NotFound("task"))
    }

    pub(crate) async fn accept(
        &self,
        task: Box<Task>,
        caller: &Caller,
        session: Option<Session>,
        keyed: Option<Keyed>,
    ) -> Result<Accepted> {
        let id = task.id;
        let accepted = if task.is_parent() {
            self.pool.accept_fan(task, caller, session.as_ref(), keyed.as_ref()).await?
        } else {
            self.pool.accept_once(task, caller, session.as_ref(), keyed.as_ref()).await?
        };
        if let (Some(s), Accepted::New(_)) = (session, &accepted)
            && let Err(error) = self.use_session(s.id, id).await
        {
            // The task is accepted, and its caller must hear so; the pool looks at it again.
            tracing::warn!(task = %id, %error, "the use of a session could not be noted");
            self.pool.queue.doubt(id);
        }
        Ok(accepted)
    }

    async fn use_session(&self, session: SessionId, task: TaskId) -> Result<()> {
        // Ended meanwhile: either its end saw this task, or it is seen here.
        if !self.sessions.store.touch_session(session, self.clock.now_ms()).await? {
            self.request_cancel(task, ReasonCode::SessionClosed).await?;
        }
        Ok(())
    }

    pub(crate) async fn named(&self, caller: &Caller, text: &str, session: Option<&Session>) -> Result<NodeId> {
        // In another's session it is that one's nodes that count, and who may use them.
        let attached = match session.filter(|s| caller.user() != Some(s.owner)) {
            Some(s) => self.nodes.among(&s.nodes, text).await?,
            None => None,
        };
        let node = match attached {
            Some(node) => node,
            None => self.nodes.find(caller, text, Permission::TasksDispatch).await?,
        };
        if node.revoked_at.is_some() {
            return Err(Error::conflict("node_revoked", "this node was revoked"));
        }
        if session.is_some_and(|s| !s.nodes.contains(&node.id)) {
            return Err(Error::conflict("not_attached", format!("node {} is not attached to the session; attach it first", node.name)));
        }
        Ok(node.id)
    }

    pub async fn get(&self, caller: &Caller, id: TaskId) -> Result<Task> {
        self.permitted(caller, id, Permission::TasksRead).await
    }

    /// The same, narrow: for who looks at it again and again.
    pub async fn get_narrow(&self, caller: &Caller, id: TaskId) -> Result<Task> {
        self.permitted_narrow(caller, id, Permission::TasksRead).await
    }

    /// The task with the last 64 KiB of each stream.
    pub async fn detail(&self, task: Task) -> Result<TaskDetail> {
        let (mut stdout, mut stderr) = (vec![], vec![]);
        if let Some(a) = &task.progress.attempt {
            if task.output.stdout_bytes > 0 {
                stdout = self.output.tail(task.id, a.no, Stream::Stdout, TAIL_BYTES).await?;
            }
            if task.output.stderr_bytes > 0 {
                stderr = self.output.tail(task.id, a.no, Stream::Stderr, TAIL_BYTES).await?;
            }
        }
        Ok(TaskDetail { task, stdout, stderr })
    }

    /// A page, with the specs; it ends early when those come to more than [`PAGE_SPEC_BYTES`]. Says
    /// whether it did.
    pub async fn list(&self, caller: &Caller, mut filter: TaskFilter, window: Window<TaskId>) -> Result<(Vec<Task>, bool)> {
        let within = visible(caller, Permission::TasksRead)?;
        // Of all machines this would read what nobody asks for; of one it is the machine's own list.
        filter.within = match filter.node {
            Some(node) if within.is_some() && self.owns(caller, node, Permission::TasksRead).await? => None,
            _ => within,
        };
        let tasks = self.journal.tasks(&filter, window).await?;
        with_specs(&*self.journal, tasks).await
    }

    pub async fn history(&self, caller: &Caller, id: TaskId) -> Result<Vec<TaskEvent>> {
        self.get(caller, id).await?;
        Ok(self.journal.history(id).await?)
    }

    /// Output of an attempt after `after_seq`; empty when there is no more now.
    pub async fn output(&self, task: &Task, attempt: Option<AttemptNo>, after_seq: u64, max_bytes: usize) -> Result<Vec<OutputFrame>> {
        match attempt {
            None => Ok(vec![]),
            Some(no) => Ok(self.output.read(task.id, no, after_seq, max_bytes).await?),
        }
    }

    /// Asks for the end. Waiting work ends at once; granted work keeps its state until its node has
    /// answered. Asking again, or for an ended task, changes nothing.
    pub async fn cancel(self: &Arc<Self>, caller: &Caller, id: TaskId) -> Result<Task> {
        audit::doing(caller, Action::TaskCancel);
        audit::about(id);
        let task = self.journal.narrow(id).await?.ok_or(Error::NotFound("task"))?;
        self.judge(caller, &task, Permission::TasksDispatch, On::OwnMachines).await?;
        audit::within(task.session);
        self.not_restored()?;
        let own = self.clone();
        let cancel = async move { own.request_cancel(id, ReasonCode::CancelledByUser).await };
        self.work.complete("cancel", audit::carry(cancel)).await.ok_or_else(stopped)??;
        self.journal.task(id).await?.ok_or(Error::NotFound("task"))
    }

    /// Closes the session and asks for the end of its tasks.
    pub async fn close_session(self: &Arc<Self>, caller: &Caller, id: SessionId) -> Result<()> {
        audit::doing(caller, Action::SessionClose);
        audit::about(id);
        self.sessions.permitted(caller, id, Permission::SessionsWrite).await?;
        self.not_restored()?;
        let (own, caller) = (self.clone(), caller.clone());
        let close = async move {
            own.sessions.close(&caller, id).await?;
            own.end_tasks_of(&[id].into()).await
        };
        self.work.complete("close session", audit::carry(close)).await.ok_or_else(stopped)?
    }

    /// Asks for the end of what is open in sessions that have ended.
    pub(crate) async fn end_tasks_of(&self, ended: &BTreeSet<SessionId>) -> Result<()> {
        for session in ended {
            let mut open = OpenTasks::of(&*self.journal, *session);
            while let Some(t) = open.next().await? {
                self.request_cancel(t.id, ReasonCode::SessionClosed).await?;
            }
        }
        Ok(())
    }

    pub(crate) async fn request_cancel(&self, id: TaskId, reason: ReasonCode) -> Result<()> {
        match self.pool.ask_end(id, reason).await? {
            Applied::Done(..) | Applied::Refused(Refused::Final | Refused::Repeated) => Ok(()),
            Applied::Refused(r) => Err(Error::conflict("bad_state", r)),
            Applied::Unknown => Err(Error::NotFound("task")),
        }
    }

    /// Refuses what would reach a node while the hub holds back after a restore.
    pub(crate) fn not_restored(&self) -> Result<()> {
        if self.links.holds_back() { Err(crate::restore::holds_back()) } else { Ok(()) }
    }

    pub(crate) async fn permitted(&self, caller: &Caller, id: TaskId, permission: Permission) -> Result<Task> {
        let task = self.journal.task(id).await?.ok_or(Error::NotFound("task"))?;
        self.judge(caller, &task, permission, On::of(permission)).await?;
        Ok(task)
    }

    pub(crate) async fn permitted_narrow(&self, caller: &Caller, id: TaskId, permission: Permission) -> Result<Task> {
        let task = self.journal.narrow(id).await?.ok_or(Error::NotFound("task"))?;
        self.judge(caller, &task, permission, On::of(permission)).await?;
        Ok(task)
    }

    /// Permits an act on a task. Who owns the machine that it is on, or is meant for, sees it, and may end it.
    async fn judge(&self, caller: &Caller, task: &Task, permission: Permission, on: On) -> Result<()> {
        let (owner, thing) = task.thing();
        if allows(caller, permission, owner, thing) {
            return Ok(());
        }
        let mut seen = allows(caller, Permission::TasksRead, owner, thing);
        if let Some(node) = task.node() {
            if on == On::OwnMachines && self.owns(caller, node, permission).await? {
                return Ok(());
            }
            seen = seen || self.owns(caller, node, Permission::TasksRead).await?;
        }
        Err(deny(caller, permission, thing, seen, "task"))
    }

    /// Is this a machine of theirs, and has the permission any reach to one's own?
    async fn owns(&self, caller: &Caller, node: NodeId, permission: Permission) -> Result<bool> {
        let Some(user) = caller.user().filter(|_| caller.reach(permission).is_to_own()) else { return Ok(false) };
        Ok(self.nodes.store.node(node).await?.is_some_and(|n| n.owner == user))
    }
}

/// What an act on others' tasks may be done to.
#[derive(Clone, Copy, PartialEq, Eq)]
enum On {
    /// What they run on machines of the caller's.
    OwnMachines,
    Nothing,
}

impl On {
    fn of(permission: Permission) -> Self {
        if permission == Permission::TasksRead { Self::OwnMachines } else { Self::Nothing }
    }
}

struct Hex<'a>(&'a [u8]);

impl std::fmt::Display for Hex<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

pub(crate) fn stopped() -> Error {
    Error::Unavailable { code: "stopping", detail: "the hub is stopping; ask it again when it is back".into() }
}

/// A page of narrow tasks, newest first, with their specs: as many tasks as [`PAGE_SPEC_BYTES`] allow, and
/// whether others were left out.
pub async fn with_specs(journal: &dyn Journal, mut tasks: Vec<Task>) -> Result<(Vec<Task>, bool)> {
    let narrow: Vec<TaskId> = tasks.iter().filter(|t| t.spec.is_empty()).map(|t| t.id).collect();
    if narrow.is_empty() {
        return Ok((tasks, false));
    }
    let mut specs: BTreeMap<TaskId, Vec<u8>> = journal.specs(&narrow, PAGE_SPEC_BYTES).await?.into_iter().collect();
    let oldest = specs.keys().next().copied();
    let cut = tasks.iter().position(|t| t.spec.is_empty() && oldest.is_some_and(|oldest| t.id < oldest));
    tasks.truncate(cut.unwrap_or(tasks.len()));
    for task in tasks.iter_mut().filter(|t| t.spec.is_empty()) {
        task.spec = specs.remove(&task.id).unwrap_or_default();
    }
    Ok((tasks, cut.is_some()))
}

//! Agents: processes that are supervised, run after run.
//!
//! What was decided of an agent is in its row; the supervisor brings the world to that. It looks at an agent when
//! something happened to its run, when somebody asked for its end, and when a pause is over, and each look
//! may be taken again: the id of a run's task is in the row before the task is made, so that a process that died in
//! between, or a write whose answer was lost, makes no second one.

use crate::access::{authorize, authorize_own, visible};
use crate::audit::{self, Action};
use crate::error::{Error, Result};
use crate::idempotency::{self, Keyed};
use crate::links::LinkCommand;
use crate::ports::{self, Creation, Window};
use crate::records::{Actor, Agent, AgentApplied, AgentFilter, LogPage, OutputTotals, Spawned, Task};
use crate::runs::{Ear, Runs};
use crate::tasks::{TaskService, stopped};
use mesh_core::agent::{End, Event, Kind, Life, Refused, Restart, Run, Status};
use mesh_core::permission::{Caller, Permission, Person, Via};
use mesh_core::select::Selector;
use mesh_core::spec::Spec;
use mesh_core::task::{MAYBE_RAN, Progress, ReasonCode, TaskState, Terms};
use mesh_core::{AgentId, SessionId, TaskId, UnixMs, UserId, name};
use mesh_process::entropy;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Agents of one person that have not ended.
pub const MAX_LIVING: u64 = 1000;
/// Agents that are looked at together.
const AT_ONCE: usize = 32;
/// Agents that one read at the start brings.
const READ_AT_ONCE: u32 = 200;
/// How long a look that failed rests.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// Lines of one page of a log, and about how many bytes.
pub const MAX_LINES: u32 = 500;
const MAX_PAGE_BYTES: usize = 1 << 20;
/// The longest config of a basic agent.
const MAX_CONFIG: usize = 64 << 10;

/// What a door asks to be spawned.
#[derive(Debug, Clone)]
pub struct NewAgent {
    pub name: String,
    pub what: What,
    /// Makes one agent, however often it is asked for.
    pub keyed: Option<Keyed>,
}

#[derive(Debug, Clone)]
pub enum What {
    /// Its config as JSON text.
    Basic(String),
    Process(Box<Process>),
}

#[derive(Debug, Clone)]
pub struct Process {
    pub spec: Spec,
    pub session: Option<SessionId>,
    /// Id or name.
    pub node: Option<String>,
    pub select: Option<Selector>,
    pub restart: Restart,
}

/// Pauses that are under way.
#[derive(Debug, Default)]
pub struct Rests(Mutex<BTreeSet<(UnixMs, AgentId)>>);

impl Rests {
    fn lock(&self) -> MutexGuard<'_, BTreeSet<(UnixMs, AgentId)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub struct Agents {
    pub store: Arc<dyn ports::Agents>,
    pub tasks: Arc<TaskService>,
    /// So much of a log is kept: the newest.
    pub output_bytes: u64,
    pub rests: Rests,
}

impl Agents {
    fn runs(&self) -> &Runs {
        &self.tasks.watchers.runs
    }
    fn now(&self) -> UnixMs {
        self.tasks.clock.now_ms()
    }

    /// The agent is durable, and of a process the id of its first run with it, before the caller hears of it.
    pub async fn spawn(self: &Arc<Self>, caller: &Caller, new: NewAgent) -> Result<Agent> {
        audit::doing(caller, Action::AgentSpawn);
        let owner = authorize_own(caller, Permission::AgentsManage)?;
        name::check(&new.name).map_err(|e| Error::invalid("bad_name", e))?;
        audit::detail("name", &new.name);
        let kind = match &new.what {
            What::Basic(config) if config.len() > MAX_CONFIG => {
                return Err(Error::invalid("bad_config", format!("the config of a basic agent has at most {MAX_CONFIG} bytes")));
            }
            What::Basic(_) => Kind::Basic,
            What::Process(process) => {
                audit::within(process.session);
                authorize_own(caller, Permission::TasksDispatch)?;
                process.spec.validate().map_err(|e| Error::invalid("bad_spec", e))?;
                process.restart.validate().map_err(|e| Error::invalid("bad_restart", e))?;
                Kind::Process
            }
        };
        self.tasks.not_restored()?;
        if let Some(made) = idempotency::before(new.keyed.as_ref()).await? {
            audit::about(made);
            return self.permitted(caller, made, Permission::AgentsManage).await;
        }
        let now = self.now();
        let id = AgentId::from_parts(now, entropy::bytes());
        let via = caller.as_person().map(|p| p.via.clone()).unwrap_or_default();
        let mut agent = Agent {
            id,
            name: new.name,
            owner,
            key: caller.key_id(),
            door: via.door.to_owned(),
            kind,
            session: None,
            node: None,
            select: None,
            spec: vec![],
            restart: Restart::default(),
            created_at: now,
            life: Life::basic(now),
        };
        match new.what {
            What::Basic(config) => agent.spec = config.into_bytes(),
            What::Process(process) => {
                let Process { spec, session, node, select, restart } = *process;
                if node.is_some() && select.is_some() {
                    return Err(Error::invalid("bad_select", "give node or select: a node that is named is the only candidate"));
                }
                let open = match session {
                    Some(id) => Some(self.tasks.sessions.active(caller, id, Permission::TasksDispatch).await?),
                    None => None,
                };
                if let Some(text) = node {
                    agent.node = Some(self.tasks.named(caller, &text, open.as_ref()).await?);
                }
                if let Some(select) = &select {
                    select.validate().map_err(|e| Error::invalid("bad_select", e))?;
                }
                (agent.session, agent.select, agent.spec, agent.restart) = (session, select, spec.encode(), restart);
                agent.life = Life::begun(TaskId::from_parts(now, entropy::bytes()));
            }
        }
        if let Err(full) = self.has_room(&agent).await {
            // It may be the very agent that another request with the same key has made a moment ago.
            let Some(made) = idempotency::before(new.keyed.as_ref()).await? else { return Err(full) };
            audit::about(made);
            return self.permitted(caller, made, Permission::AgentsManage).await;
        }
        audit::about(id);
        let own = self.clone();
        let spawn = async move {
            match new.keyed {
                Some(keyed) => {
                    if let Some(made) = keyed.create::<AgentId>(Creation::Agent(Box::new(agent.clone()))).await? {
                        return own.store.agent(made).await?.ok_or(Error::NotFound("agent"));
                    }
                }
                None => match own.store.add_agent(&agent).await? {
                    Spawned::Done => {}
                    Spawned::NameTaken => return Err(name_taken()),
                    Spawned::Foreign => return Err(name_foreign()),
                },
            }
            tracing::info!(agent = %agent.id, kind = agent.kind.as_str(), "agent spawned");
            own.runs().changed(agent.id);
            Ok(agent)
        };
        self.tasks.work.complete("spawn agent", audit::carry(spawn)).await.ok_or_else(stopped)?
    }

    /// Looked at again in the write, which alone decides.
    async fn has_room(&self, agent: &Agent) -> Result<()> {
        let within = crate::records::Within::owned_by(agent.owner);
        let counts = self.store.agents_by_status(Some(&within)).await?;
        if counts.iter().filter(|(status, _)| !status.is_final()).map(|(_, n)| n).sum::<u64>() >= MAX_LIVING {
            return Err(Error::conflict("agents_full", format!("you have {MAX_LIVING} agents that have not ended; kill one first")));
        }
        let filter = AgentFilter { name: Some(agent.name.clone()), ..AgentFilter::default() };
        match self.store.agents(&filter, Window { before: None, limit: 1 }).await?.first() {
            Some(other) if other.owner != agent.owner => Err(name_foreign()),
            Some(other) if !other.life.status.is_final() => Err(name_taken()),
            _ => Ok(()),
        }
    }

    pub async fn get(&self, caller: &Caller, id: AgentId) -> Result<Agent> {
        self.permitted(caller, id, Permission::AgentsRead).await
    }

    pub async fn list(&self, caller: &Caller, name: Option<String>, status: Option<Status>, window: Window<AgentId>) -> Result<Vec<Agent>> {
        let within = visible(caller, Permission::AgentsRead)?;
        Ok(self.store.agents(&AgentFilter { within, name, status }, window).await?)
    }

    /// How many of those that the caller may see are in each status.
    pub async fn counts(&self, caller: &Caller) -> Result<BTreeMap<Status, u64>> {
        let within = visible(caller, Permission::AgentsRead)?;
        Ok(self.store.agents_by_status(within.as_ref()).await?)
    }

    /// Lines from `offset` on, oldest first.
    pub async fn logs(&self, caller: &Caller, id: AgentId, offset: u64, limit: u32) -> Result<(Agent, LogPage)> {
        let agent = self.get(caller, id).await?;
        let page = self.store.log(id, offset, limit.min(MAX_LINES), MAX_PAGE_BYTES).await?;
        Ok((agent, page))
    }

    /// Tells who follows an agent that there is more to read.
    pub fn listen(&self, id: AgentId) -> Ear {
        self.runs().listen(id)
    }

    /// Asks for the end: time to end by itself, or with `force` none. One that has ended stays as it is, and asking
    /// again changes nothing, unless it is by force for the first time.
    pub async fn kill(self: &Arc<Self>, caller: &Caller, id: AgentId, force: bool) -> Result<Agent> {
        audit::doing(caller, Action::AgentKill);
        audit::about(id);
        audit::detail("force", force);
        self.permitted(caller, id, Permission::AgentsManage).await?;
        self.tasks.not_restored()?;
        let own = self.clone();
        let kill = async move { own.apply(id, &Event::KillAsked { force }).await };
        match self.tasks.work.complete("kill agent", audit::carry(kill)).await.ok_or_else(stopped)?? {
            Some(agent) => Ok(agent),
            None => self.store.agent(id).await?.ok_or(Error::NotFound("agent")),
        }
    }

    async fn permitted(&self, caller: &Caller, id: AgentId, permission: Permission) -> Result<Agent> {
        // Who may read nothing at all hears that, and not what there is.
        visible(caller, Permission::AgentsRead).or_else(|e| visible(caller, Permission::AgentsManage).map_err(|_| e))?;
        let agent = self.store.agent(id).await?.ok_or(Error::NotFound("agent"))?;
        authorize(caller, permission, agent.thing(), Permission::AgentsRead, "agent")?;
        Ok(agent)
    }

    /// The agent after it; None when it changed nothing.
    async fn apply(&self, id: AgentId, event: &Event) -> Result<Option<Agent>> {
        match self.store.apply_agent(id, event, self.now(), self.output_bytes).await? {
            AgentApplied::Done(agent, _) => {
                tracing::debug!(agent = %id, ?event, status = agent.life.status.as_str(), "an agent stepped");
                self.runs().told(id);
                self.runs().changed(id);
                Ok(Some(*agent))
            }
            AgentApplied::Refused(Refused::Illegal) => Err(Error::conflict("bad_state", "the agent changed in this moment; ask again")),
            AgentApplied::Refused(_) => Ok(None),
            AgentApplied::Unknown => Err(Error::NotFound("agent")),
        }
    }

    /// Takes up what has not ended, at the start of the process: before any node is linked.
    pub async fn recover(&self) -> Result<()> {
        self.runs().log_to(self.store.clone(), self.output_bytes);
        let mut living = Living::of(&*self.store);
        while let Some(agent) = living.next().await? {
            if let Some(run) = agent.life.run {
                self.runs().note(run.task, agent.id);
            }
            self.runs().changed(agent.id);
        }
        Ok(())
    }

    /// Ends what somebody who leaves has, but for processes that run by now and may finish.
    pub(crate) async fn end_all_of(&self, owner: UserId, running_too: bool) -> Result<()> {
        let mut living = Living::of(&*self.store);
        while let Some(agent) = living.next().await? {
            let finishes = agent.kind == Kind::Process && agent.life.status == Status::Running && !running_too;
            if agent.owner == owner && !finishes && agent.life.kill.is_none() {
                self.apply(agent.id, &Event::KillAsked { force: false }).await?;
            }
        }
        Ok(())
    }

    /// After a restore: what may have been begun since the backup is not begun again.
    pub(crate) async fn end_restored(&self, restored_at: UnixMs) -> Result<()> {
        let mut living = Living::of(&*self.store);
        while let Some(agent) = living.next().await? {
            let begun = match (agent.life.status, agent.life.run) {
                (Status::BackingOff, _) => agent.life.next_at.is_some_and(|at| at <= restored_at),
                (Status::Starting, Some(run)) => self.tasks.journal.narrow(run.task).await?.is_none(),
                _ => false,
            };
            if begun {
                let why = "it may have been begun after the backup that was restored".into();
                self.apply(agent.id, &Event::Barred { why }).await?;
            }
        }
        Ok(())
    }

    /// The supervisor. Runs until dropped.
    pub async fn run(&self) {
        loop {
            if let Err(error) = self.round().await {
                tracing::warn!(%error, "looking after agents failed; it is tried again");
                tokio::time::sleep(LOOK_AGAIN).await;
                continue;
            }
            let next = self.rests.lock().first().map(|(at, _)| *at);
            match next {
                None => self.runs().woken().await,
                Some(at) => {
                    let pause = Duration::from_millis(at.saturating_sub(self.now()).max(0) as u64);
                    let _ = tokio::time::timeout(pause, self.runs().woken()).await;
                }
            }
        }
    }

    /// One look at those to whom something happened, and at those whose pause is over. Idempotent.
    pub async fn round(&self) -> Result<()> {
        let now = self.now();
        let mut changed = self.runs().take_changed();
        {
            let mut rests = self.rests.lock();
            let later = rests.split_off(&(now.saturating_add(1), AgentId::from_bytes([0; 16])));
            changed.extend(std::mem::replace(&mut *rests, later).into_iter().map(|(_, id)| id));
        }
        let changed: Vec<AgentId> = changed.into_iter().collect();
        let mut worst = Ok(());
        for some in changed.chunks(AT_ONCE) {
            let looks = some.iter().map(|id| async move { self.settle(*id).await.inspect_err(|_| self.runs().changed(*id)) });
            worst = futures::future::join_all(looks).await.into_iter().fold(worst, |worst, look| worst.and(look));
        }
        worst
    }

    /// Brings one agent and the world to what its row says.
    async fn settle(&self, id: AgentId) -> Result<()> {
        let Some(agent) = self.store.agent(id).await? else { return Ok(()) };
        let life = &agent.life;
        if life.status == Status::BackingOff {
            if let Some(run) = life.run {
                self.runs().forget(run.task);
            }
            let Some(at) = life.next_at.filter(|at| *at > self.now()) else {
                let task = TaskId::from_parts(self.now(), entropy::bytes());
                return self.apply(id, &Event::Due { task }).await.map(drop);
            };
            self.rests.lock().insert((at, id));
            return Ok(());
        }
        let Some(run) = life.run else { return Ok(()) };
        if life.status.is_final() {
            self.runs().forget(run.task);
            return Ok(());
        }
        // Before its task can write anything.
        self.runs().note(run.task, id);
        let event = match self.tasks.journal.narrow(run.task).await? {
            Some(task) if task.progress.state.is_final() => Event::Ended { task: task.id, end: end_of(&agent, &task) },
            Some(task) => match (life.status, task.progress.state) {
                (Status::Starting, TaskState::Running) => Event::Started { task: task.id, node: task.node() },
                (Status::Running, state) if state != TaskState::Running => Event::Waits { task: task.id },
                (Status::Stopping, _) => {
                    let force = life.kill.is_some_and(|kill| kill.force);
                    if force || task.progress.cancel.is_none() {
                        self.tasks.stop_run(task.id, force).await?;
                    }
                    return Ok(());
                }
                _ => return Ok(()),
            },
            None if life.status == Status::Starting => match self.begin(&agent, run).await {
                Ok(()) => return Ok(()),
                Err(error @ (Error::Store(_) | Error::Unavailable { .. })) => return Err(error),
                Err(why) => Event::Barred { why: why.to_string() },
            },
            None if life.status == Status::Stopping => Event::Ended { task: run.task, end: End::Cancelled },
            None => Event::Ended { task: run.task, end: End::Final("its task is not there any more".into()) },
        };
        self.apply(id, &event).await.map(drop)
    }

    /// Makes the task of a run, by the rights that its owner has now.
    async fn begin(&self, agent: &Agent, run: Run) -> Result<()> {
        let pool = &self.tasks.pool;
        let gone = || Error::Forbidden("the agent's owner is disabled or gone".into());
        let owner = pool.accounts.user(agent.owner).await?.ok_or_else(gone)?;
        let granted = pool.rights.of(owner.id, owner.role).await?;
        let via = Via { door: "hub", ..Via::default() };
        let caller = Caller::Person(Person { user: owner.id, role: owner.role, key: None, granted, via });
        for needed in [Permission::AgentsManage, Permission::TasksDispatch] {
            authorize_own(&caller, needed)
                .map_err(|_| Error::Forbidden(format!("the agent's owner has no {} any more", needed.as_str())))?;
        }
        let tasks = self.tasks.clone();
        let agent = agent.clone();
        let begin = async move { tasks.begin_run(&agent, run, &caller).await };
        self.tasks.work.complete("agent run", begin).await.ok_or_else(stopped)?
    }
}

/// Each agent that has not ended, oldest first.
struct Living<'a> {
    store: &'a dyn ports::Agents,
    page: std::vec::IntoIter<Agent>,
    after: Option<AgentId>,
    more: bool,
}

impl<'a> Living<'a> {
    fn of(store: &'a dyn ports::Agents) -> Self {
        Self { store, page: vec![].into_iter(), after: None, more: true }
    }
    async fn next(&mut self) -> Result<Option<Agent>> {
        if self.page.as_slice().is_empty() && self.more {
            let page = self.store.living_agents(self.after, READ_AT_ONCE).await?;
            (self.after, self.more) = (page.last().map(|a| a.id), page.len() == READ_AT_ONCE as usize);
            self.page = page.into_iter();
        }
        Ok(self.page.next())
    }
}

impl TaskService {
    /// Accepts the task of a run under the id that was decided for it; the journal takes an id once.
    async fn begin_run(self: &Arc<Self>, agent: &Agent, run: Run, caller: &Caller) -> Result<()> {
        let session = match agent.session {
            Some(id) => Some(self.sessions.active(caller, id, Permission::TasksDispatch).await?),
            None => None,
        };
        let named_node = match agent.node {
            Some(node) => Some(self.named(caller, &node.to_string(), session.as_ref()).await?),
            None => None,
        };
        let spec = Spec::decode(&agent.spec).map_err(|e| Error::invalid("bad_spec", e))?;
        let mut task = Box::new(Task {
            id: run.task,
            session: agent.session,
            named_node,
            actor: Actor { user: agent.owner, key: agent.key, agent: Some(agent.id), door: agent.door.clone() },
            skill: spec.skill().to_owned(),
            spec: agent.spec.clone(),
            digest: mesh_core::sha256(&agent.spec),
            parent: None,
            children: None,
            seal: [0; 32],
            timeout_secs: 0,
            queue_secs: 0,
            terms: Terms { select: agent.select.clone(), ..Terms::default() },
            created_at: run.task.made_at(),
            progress: Progress::new(),
            output: OutputTotals::default(),
            digests: None,
            result: None,
            sandbox_applied: None,
            signed: None,
        });
        task.seal = self.keyring.seal(&task.intent());
        self.accept(task, caller, session, None).await.map(drop)
    }

    /// Asks for the end of a run.
    async fn stop_run(&self, id: TaskId, force: bool) -> Result<()> {
        self.request_cancel(id, ReasonCode::CancelledByUser).await?;
        if force && let Some(a) = self.journal.narrow(id).await?.and_then(|t| t.progress.attempt.filter(|_| !t.progress.state.is_final())) {
            self.links.send(a.node, LinkCommand::Kill { task: id, attempt: a.no });
        }
        Ok(())
    }
}

/// What the end of its task is to an agent.
fn end_of(agent: &Agent, task: &Task) -> End {
    use ReasonCode::*;
    let p = &task.progress;
    let Some(reason) = &p.reason else {
        return if p.state == TaskState::Succeeded { End::Clean } else { End::Failure(p.state.as_str().into()) };
    };
    let why = match reason.detail.as_str() {
        "" => reason.code.as_str().to_owned(),
        detail => format!("{}: {detail}", reason.code.as_str()),
    };
    match reason.code {
        SessionClosed => End::Final(why),
        CancelledByUser => End::Cancelled,
        PolicyDenied | ApprovalDenied | ApprovalTimeout | BadRequest | NotFound => End::Final(why),
        // Nobody can say that it does not run any more.
        Lost if reason.detail == MAYBE_RAN => End::Final(why),
        NodeRevoked if agent.node.is_some() => End::Final(why),
        _ => End::Failure(why),
    }
}

fn name_taken() -> Error {
    Error::conflict("name_taken", "an agent of this name has not ended; kill it first, or take another name")
}
fn name_foreign() -> Error {
    Error::conflict("name_taken", "this name is somebody else's; take another one")
}

//! The pool: waiting tasks, and their way to a node.
//!
//! An attempt is synced before its order leaves the hub. Placement itself is a pure function of
//! `mesh_core`; a slot is reserved in memory first and given back if the commit fails. Who waits goes
//! by priority, then the user who has least of the nodes, then age; see [`crate::queue`].

use crate::error::{Error, Result};
use crate::events::Events;
use crate::idempotency::Keyed;
use crate::links::{Hold, Link, LinkCommand, Links, Order, Share};
use crate::open_tasks::OpenTasks;
use crate::ports::{Applied, Besides, Creation, Journal, Keyring, Sessions};
use crate::queue::{Ahead, Changed, Eligible, Group, Head, Holder, Hopeful, Until, usable};
use crate::records::{Session, Task};
use crate::tracks::Tracks;
use crate::watch::Watchers;
use mesh_core::permission::{Caller, Permission, Reach};
use mesh_core::placement::{Candidate, Waiting, choose};
use mesh_core::spec::INLINE_SPEC_BYTES;
use mesh_core::task::{Action, AttemptNo, Event, MAYBE_RAN, Outcome, ReasonCode, TaskState};
use mesh_core::{Digest, NodeId, SessionId, TaskId, UserId};
use mesh_process::SharedClock;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

pub use crate::queue::{PoolStanding, Queue};

/// A node refuses to start an order later than this after it was sent: hub time.
const START_WITHIN_MS: i64 = 120_000;
/// Tasks that one round of placing commits together.
pub(crate) const PLACE_AT_ONCE: usize = 256;
/// Attempts that a task may have; one that comes too late at every node fails in the end.
const MAX_ATTEMPTS: u32 = crate::records::MAX_ATTEMPTS;
/// How long a task rests before it is placed again after it came too late.
const PLACE_AGAIN: Duration = Duration::from_secs(1);
/// How often everything is looked at, whatever was signalled.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// What was read of a session's nodes, a user's role or their grants is good for so long. What this hub changes
/// itself is known at once; see [`Pool::attachments_changed`] and [`Pool::rights_changed`].
const RIGHTS_FOR: Duration = Duration::from_secs(4);
/// A node that was told of an attempt ahead says within this time that it keeps it.
const KEPT_WITHIN: Duration = Duration::from_secs(5);
/// Orders are told ahead only in so many of a task's attempts: each takes a number.
const AHEAD_ATTEMPTS: u32 = 100;
/// Rights that are read at the same time; what was placed before them is committed first.
const RIGHTS_AT_ONCE: usize = 32;

/// What became of a new task.
#[derive(Debug)]
pub enum Accepted {
    /// It was written; as it was then.
    New(Box<Task>),
    /// Its key had made this one before, and nothing was written.
    Before(TaskId),
}

/// Where a new task goes at once and what that asks for, or why it waits.
pub(crate) type FirstPlace = std::result::Result<(NodeId, Vec<Action>), Waiting>;

/// Which nodes a group may use.
enum Rights {
    Read(Eligible),
    /// Read too long ago to place by, and no node has a place.
    Old(Eligible),
}

/// What is reserved, or to be told ahead, and not yet committed.
struct Placement {
    id: TaskId,
    attempt: AttemptNo,
    link: Link,
    how: How,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum How {
    /// A new attempt, which may start at once.
    Assign,
    /// The node was told of this attempt ahead, and may start it now.
    Go,
    /// A new attempt, of which the node is told and which it may not start.
    Ahead,
}

type Placed = Vec<Placement>;

pub struct Pool {
    pub journal: Arc<dyn Journal>,
    pub sessions: Arc<dyn Sessions>,
    pub accounts: Arc<dyn crate::ports::Accounts>,
    pub rights: Arc<crate::rights::Rights>,
    pub keyring: Arc<dyn Keyring>,
    pub links: Arc<Links>,
    pub watchers: Watchers,
    pub events: Events,
    pub clock: SharedClock,
    pub incarnation: u32,
    /// Digest of the policy that orders name.
    pub policy: Digest,
    pub queue: Queue,
}

impl Pool {
    /// Was it handed out before the store was restored? Then its node may have run and forgotten it.
    pub(crate) fn is_of_before(&self, attempt: AttemptNo) -> bool {
        // The first is 1.
        (1..self.incarnation).contains(&attempt.incarnation())
    }

    pub(crate) fn tracks(&self) -> Tracks<'_> {
        Tracks(&self.queue.origins)
    }

    /// Takes up what the journal holds as not ended, at the start of the process.
    pub async fn recover(&self) -> Result<()> {
        let mut closed: BTreeMap<SessionId, bool> = BTreeMap::new();
        let mut cancelled: Vec<(TaskId, ReasonCode)> = vec![];
        let mut open = OpenTasks::all(&*self.journal);
        while let Some(task) = open.next().await? {
            if let Some(id) = task.session {
                let ended = match closed.get(&id) {
                    Some(known) => *known,
                    None => self.sessions.session(id).await?.is_none_or(|s| !s.is_active()),
                };
                closed.insert(id, ended);
                if ended && task.progress.cancel.is_none() {
                    // The process ended between the session's end and its tasks'.
                    let event = Event::CancelRequested { reason: ReasonCode::SessionClosed };
                    if let Applied::Done(task, actions) = self.apply(task.id, &event, Besides::default()).await? {
                        self.perform(&task, &actions);
                        if task.progress.state.is_final() {
                            continue;
                        }
                    }
                }
            }
            cancelled.extend(task.progress.cancel.as_ref().filter(|_| task.is_parent()).map(|c| (task.id, c.reason)));
            self.take_up(&task).await?;
        }
        for (parent, reason) in cancelled {
            // The process ended between the parent's cancel and its children's.
            self.cancel_children(parent, reason).await?;
        }
        Ok(())
    }

    /// Takes up an open task as the journal holds it: what is granted has its slot, what is not waits.
    async fn take_up(&self, task: &Task) -> Result<()> {
        if task.is_parent() {
            // The process may have ended between its last child's end and its own.
            self.queue.child_ended(task.id);
            return Ok(());
        }
        self.queue.watch_deadline(task);
        match (task.progress.state, &task.progress.attempt) {
            (TaskState::Assigned | TaskState::Running, Some(a)) if a.granted.is_some() => self.links.hold(a.node, task, a.no),
            (TaskState::Assigned, Some(a)) => {
                let event = Event::Withdrawn { attempt: a.no };
                if let Applied::Done(t, mut actions) = self.apply(task.id, &event, Besides::default()).await? {
                    // It waits from now on, in its turn, and has nothing to rest from.
                    actions.retain(|action| *action != Action::Requeue);
                    self.enqueue(&t, Waiting::HubStarting, Duration::ZERO);
                    self.perform(&t, &actions);
                }
            }
            _ => self.enqueue(task, Waiting::HubStarting, Duration::ZERO),
        }
        Ok(())
    }

    /// Looks at the tasks of which a commit failed. It may have been done all the same, when the
    /// connection to the database was lost: then what it asked for is still to be performed.
    async fn settle_doubts(&self) -> Result<()> {
        for id in self.queue.doubts() {
            // First: what comes to be doubted meanwhile is looked at again.
            self.queue.settled(id);
            let settled = async {
                if let Some(task) = self.journal.task(id).await? {
                    self.settle_doubt(&task).await?;
                }
                Result::Ok(())
            };
            settled.await.inspect_err(|_| self.queue.doubt(id))?;
        }
        Ok(())
    }

    async fn settle_doubt(&self, task: &Task) -> Result<()> {
        let (p, attempt) = (&task.progress, task.progress.attempt.as_ref());
        if p.state.is_final() {
            if let Some(a) = attempt {
                self.links.send(a.node, LinkCommand::Cancel { task: task.id, attempt: a.no });
                self.give_back(a.node, task.id);
            }
            self.forget(task.id);
            self.watchers.finished(task);
            task.parent.into_iter().for_each(|parent| self.queue.child_ended(parent));
            return Ok(());
        }
        match attempt.filter(|_| p.state != TaskState::Pending) {
            Some(a) if a.granted.is_some() => {
                self.queue.remove(task.id);
                if self.links.get(a.node).is_some_and(|l| Some(l.spool) != a.granted) {
                    // Its node came back with another memory while the grant was committed.
                    let event = Event::Ended { attempt: a.no, outcome: Outcome::Lost { detail: MAYBE_RAN.into() } };
                    if let Applied::Done(task, actions) = self.apply(task.id, &event, Besides::default()).await? {
                        self.perform(&task, &actions);
                    }
                    return Ok(());
                }
                self.take_up(task).await?;
                // A node that knows it starts nothing twice.
                self.send_order(task, a.node, a.no);
                if p.cancel.is_some() {
                    self.links.send(a.node, LinkCommand::Cancel { task: task.id, attempt: a.no });
                }
                self.after_commit(Box::new(task.clone())).await;
            }
            Some(_) => self.take_up(task).await?,
            None if task.is_parent() => {
                self.take_up(task).await?;
                if let Some(c) = &p.cancel {
                    self.cancel_children(task.id, c.reason).await?;
                }
            }
            None if self.queue.why(task.id).is_some() => self.queue.taken_back(task.id),
            None => {
                if let Some(a) = attempt {
                    self.give_back(a.node, task.id);
                }
                self.take_up(task).await?;
            }
        }
        if task.progress.cancel.is_none()
            && let Some(session) = task.session
            && self.sessions.session(session).await?.is_none_or(|s| !s.is_active())
        {
            self.ask_end(task.id, ReasonCode::SessionClosed).await?;
        }
        Ok(())
    }

    /// Writes a new task, already with a granted attempt if a node has a slot for it now.
    /// Gives it as it was written.
    pub async fn accept(&self, task: Task, caller: &Caller, session: Option<&Session>) -> Result<Task> {
        match self.accept_once(Box::new(task), caller, session, None).await? {
            Accepted::New(task) => Ok(*task),
            Accepted::Before(id) => Err(Error::conflict("bad_state", format!("{id} came without a key"))),
        }
    }

    /// As [`Pool::accept`]; under a key only if that has made nothing before.
    pub async fn accept_once(
        &self,
        mut task: Box<Task>,
        caller: &Caller,
        session: Option<&Session>,
        keyed: Option<&Keyed>,
    ) -> Result<Accepted> {
        let eligible = self.eligible_now(caller, session).await?;
        let placed = self.first_place(&mut task, &eligible);
        match self.write(&task, keyed).await {
            Ok(None) => {
                self.accepted(&task, placed, &eligible);
                Ok(Accepted::New(self.after_commit(task).await))
            }
            Ok(Some(before)) => {
                self.unplace(&task, &placed);
                Ok(Accepted::Before(before))
            }
            Err(e) => {
                self.unplace(&task, &placed);
                self.queue.doubt(task.id);
                Err(e)
            }
        }
    }

    /// Which nodes may take what this caller asks for now.
    pub(crate) async fn eligible_now(&self, caller: &Caller, session: Option<&Session>) -> Result<Eligible> {
        let own = || caller.as_person().map_or_else(Eligible::none, |p| Eligible::of(p.user, p.role, &p.granted));
        let Some(s) = session else { return Ok(own()) };
        let owners = if caller.user() == Some(s.owner) { own() } else { self.usable_by(s.owner).await? };
        Ok(Eligible::Attached(s.nodes.clone(), Box::new(owners)))
    }

    /// Reserves a place for a new task, if one is free and nobody waits for it, and gives the task its first
    /// attempt there.
    pub(crate) fn first_place(&self, task: &mut Task, eligible: &Eligible) -> FirstPlace {
        let now = self.clock.now_ms();
        let attempt = AttemptNo::first(self.incarnation);
        let group = Group::of(task);
        let link = match task.terms.not_before {
            Some(start) if start > now => Err(Waiting::NotBefore),
            // Those of the same kind that wait go first.
            _ if self.queue.is_waiting(&group) => Err(Waiting::NoSlot),
            _ => self.reserve(
                task.id,
                |_| Hold::of(task, attempt),
                &group,
                eligible,
                |link, taken| {
                    let wanted = self.queue.is_wanted(link, taken, task.terms.priority);
                    if wanted { Err(Waiting::NoSlot) } else { Ok(()) }
                },
            ),
        }?;
        let event = Event::Assigned { attempt, node: link.node, granted: Some(link.spool) };
        let Ok((progress, actions)) = task.decide(&event, now) else {
            self.give_back(link.node, task.id);
            return Err(Waiting::NoSlot);
        };
        task.progress = progress;
        task.signed = Some((self.keyring.key_id(), self.policy));
        Ok((link.node, actions))
    }
    /// A new task is committed.
    pub(crate) fn accepted(&self, task: &Task, placed: FirstPlace, eligible: &Eligible) {
        self.events.accepted(task);
        self.tracks().accepted(task);
        self.queue.watch_deadline(task);
        match placed {
            Ok((_, actions)) => self.perform(task, &actions),
            Err(why) => {
                self.enqueue(task, why, Duration::ZERO);
                self.queue.seed_rights(&Group::of(task), eligible);
            }
        }
    }
    /// A new task was not committed, as far as is known.
    pub(crate) fn unplace(&self, task: &Task, placed: &FirstPlace) {
        if let Ok((node, _)) = placed {
            self.give_back(*node, task.id);
        }
    }

    /// Gives the task that the key has made before; then nothing is written.
    async fn write(&self, task: &Task, keyed: Option<&Keyed>) -> Result<Option<TaskId>> {
        let written = match keyed {
            Some(k) => k.create(Creation::Task(Box::new(task.clone()))).await,
            None => self.journal.accept(task).await.map(|()| None).map_err(Error::from),
        };
        if !matches!(written, Ok(None)) {
            self.queue.origins.forget(task.id);
        }
        written
    }

    fn reserve(
        &self,
        id: TaskId,
        hold: impl FnOnce(NodeId) -> Hold,
        group: &Group,
        eligible: &Eligible,
        yields: impl FnOnce(&Link, &BTreeMap<String, u32>) -> std::result::Result<(), Waiting>,
    ) -> std::result::Result<Link, Waiting> {
        let choose = |candidates: &[Candidate]| choose(id, group.named, group.select.as_ref(), candidates);
        // One that is named is the only candidate.
        let eligible = |l: &Link| group.named.is_none_or(|n| n == l.node) && eligible.allows(l);
        self.links.reserve(id, hold, eligible, choose, yields)
    }
    /// Gives back what was reserved, to whoever waits for it.
    fn give_back(&self, node: NodeId, id: TaskId) {
        self.links.release(node, id);
        self.queue.changed_on(node);
    }

    async fn eligible(&self, session: Option<SessionId>, user: UserId) -> Result<Eligible> {
        // The rights of now, not those of the moment when the task was accepted.
        let Some(id) = session else { return self.usable_by(user).await };
        let Some(session) = self.sessions.session(id).await? else { return Ok(Eligible::none()) };
        if user != session.owner && !self.may_use(user, id).await? {
            return Ok(Eligible::none());
        }
        Ok(Eligible::Attached(session.nodes, Box::new(self.usable_by(session.owner).await?)))
    }
    /// The nodes that somebody may use outside of sessions. Nothing begins for who is gone, or disabled.
    async fn usable_by(&self, user: UserId) -> Result<Eligible> {
        let Some(user) = self.accounts.user(user).await? else { return Ok(Eligible::none()) };
        Ok(Eligible::of(user.id, user.role, &self.rights.of(user.id, user.role).await?))
    }
    /// May what this user has asked for in another's session still start?
    async fn may_use(&self, user: UserId, session: SessionId) -> Result<bool> {
        let Some(user) = self.accounts.user(user).await? else { return Ok(false) };
        let reach = user.role.reach(Permission::TasksDispatch);
        let granted = self.rights.of(user.id, user.role).await?;
        Ok(reach == Reach::All || granted.sessions.get(&session).is_some_and(|given| given.has(Permission::TasksDispatch)))
    }
    /// Somebody may use more than before, or less: tasks of theirs may wait, and of others in their sessions.
    pub fn rights_changed(&self) {
        self.queue.rights_changed();
    }

    /// The nodes of a session changed, of which tasks may wait.
    pub fn attachments_changed(&self, session: SessionId) {
        self.queue.attachments_changed(session);
    }

    /// What is known of a group's rights. None: they are to be read, since they never were, or not lately
    /// and there is a place that its head might take.
    fn rights(&self, group: &Group, head: TaskId, since: Duration) -> Option<Rights> {
        if let Some(eligible) = self.queue.rights(group, since) {
            return Some(Rights::Read(eligible));
        }
        let old = self.queue.old_rights(group)?;
        let place = self.links.weigh(|_| true, |candidates| choose(head, group.named, group.select.as_ref(), candidates));
        place.is_err().then_some(Rights::Old(old))
    }
    async fn read_rights(&self, holders: BTreeSet<Holder>) -> Result<()> {
        let at = self.clock.steady();
        self.queue.begin_reading(&holders);
        let reads = holders.into_iter().map(|(user, session)| async move { (user, session, self.eligible(session, user).await) });
        for (user, session, eligible) in futures::future::join_all(reads).await {
            self.queue.learn((user, session), eligible?, at);
        }
        Ok(())
    }

    /// Lets a task wait: until its time has come, then for a node.
    fn enqueue(&self, task: &Task, why: Waiting, pause: Duration) {
        let next = match &task.progress.attempt {
            None => AttemptNo::first(self.incarnation),
            Some(a) => a.no.next(self.incarnation),
        };
        let (now, steady) = (self.clock.now_ms(), self.clock.steady());
        let later = |at: Option<i64>| at.filter(|at| *at > now).map(Until::Wall);
        let (why, rest) = if let Some(until) = later(task.progress.retry_at) {
            (Waiting::Backoff, Some(until))
        } else if let Some(until) = later(task.terms.not_before) {
            (Waiting::NotBefore, Some(until))
        } else {
            (why, (!pause.is_zero()).then(|| Until::Steady(steady + pause)))
        };
        self.queue.add(task, next, why, rest, steady);
    }

    /// Why a task waits, while it does.
    pub fn why_waiting(&self, task: &Task) -> Option<Waiting> {
        if let Some(why) = self.queue.why(task.id) {
            return Some(why);
        }
        if self.links.holds_back() && !task.progress.state.is_final() {
            return Some(Waiting::HubStarting);
        }
        let a = task.progress.attempt.as_ref()?;
        let open = matches!(task.progress.state, TaskState::Assigned | TaskState::Running);
        (open && self.links.get(a.node).is_none()).then_some(Waiting::InDoubt)
    }

    pub fn standing(&self) -> PoolStanding {
        self.queue.standing(self.clock.steady())
    }

    /// Takes a task out of the queue, since it has ended.
    pub fn forget(&self, id: TaskId) {
        self.queue.remove(id);
        self.queue.forget_deadline(id);
    }

    /// Something changed that may let any waiting task go: a node came, or changed.
    pub fn wake(&self) {
        self.queue.changed_everywhere();
    }

    pub async fn apply(&self, id: TaskId, event: &Event, besides: Besides) -> Result<Applied> {
        let applied = self.journal.apply(id, event, besides, self.clock.now_ms()).await.inspect_err(|_| self.queue.doubt(id))?;
        if let Applied::Done(task, _) = &applied {
            self.events.stepped(task, event);
            self.tracks().stepped(task, event);
            self.watchers.stepped(task);
        }
        Ok(applied)
    }

    /// Performs what a transition asked for. `task` is the task after it.
    pub fn perform(&self, task: &Task, actions: &[Action]) {
        for action in actions {
            match action {
                Action::Order { node, attempt } => self.send_order(task, *node, *attempt),
                Action::Cancel { node, attempt } => {
                    self.links.send(*node, LinkCommand::Cancel { task: task.id, attempt: *attempt });
                }
                Action::Release { node } => self.give_back(*node, task.id),
                Action::Requeue => {
                    // What has run or may have has its own pause; all else came back without that.
                    let pause = if task.progress.retry_at.is_some() { Duration::ZERO } else { PLACE_AGAIN };
                    self.enqueue(task, Waiting::NoSlot, pause);
                }
                Action::Finished => {
                    self.forget(task.id);
                    if !task.is_parent() {
                        self.queue.count_finished();
                    }
                    task.parent.into_iter().for_each(|parent| self.queue.child_ended(parent));
                    self.tracks().finished(task);
                    self.watchers.finished(task);
                }
            }
        }
    }

    /// Hands an attempt to its node's link, with leave to start it if it is granted. A row that no longer
    /// fits its seal is never signed.
    pub fn send_order(&self, task: &Task, node: NodeId, attempt: AttemptNo) {
        let granted = task.progress.attempt.as_ref().and_then(|a| a.granted);
        match self.links.takes(node, granted) {
            Some(true) => {}
            // Here with another memory than the one it was granted to: its hello came before this commit.
            Some(false) if granted.is_some() => return self.queue.doubt(task.id),
            // Not here: the next hello settles it.
            _ => return,
        }
        if self.is_of_before(attempt) {
            // Its node has told of it, or it is lost: it is never sent again.
            return;
        }
        if mesh_core::sha256(&task.spec) != task.digest || !self.keyring.is_sealed(&task.intent(), &task.seal) {
            tracing::error!(task = %task.id, "the stored task does not fit its seal; it is not sent");
            metrics::counter!("cortex_broken_seals_total").increment(1);
            return;
        }
        let start_before = self.clock.anchored_ms() + START_WITHIN_MS;
        let order = Order {
            task: task.id,
            attempt,
            skill: task.skill.clone(),
            spec: if task.spec.len() <= INLINE_SPEC_BYTES { task.spec.clone() } else { vec![] },
            spec_bytes: task.spec.len() as u64,
            digest: task.digest,
            user: task.actor.user,
            session: task.session,
            timeout_secs: task.timeout_secs,
            start_before: task.terms.deadline.map_or(start_before, |deadline| start_before.min(deadline)),
            policy: self.policy,
            granted: granted.is_some(),
            request_id: self.queue.origins.of(task.id),
        };
        self.tracks().ordered(&order, node);
        self.links.send(node, LinkCommand::Order(Box::new(order)));
    }

    /// The reconciler: places what can be placed, ends what waited too long or is past its deadline.
    /// Runs until dropped.
    pub async fn run(&self) {
        let mut full = None;
        loop {
            let steady = self.clock.steady();
            if full.is_none_or(|at| steady.saturating_sub(at) >= LOOK_AGAIN) {
                full = Some(steady);
                self.queue.changed_everywhere();
            }
            let lost = if full == Some(steady) { self.end_lost().await } else { Ok(()) };
            if let Err(error) = lost.and(self.round_of_changes().await) {
                tracing::warn!(%error, "placing waiting tasks failed; it is tried again");
                tokio::time::sleep(LOOK_AGAIN).await;
            }
            let due = self.queue.next_due(self.clock.now_ms(), self.clock.steady());
            let _ = tokio::time::timeout(due.unwrap_or(LOOK_AGAIN).min(LOOK_AGAIN), self.queue.woken()).await;
        }
    }

    /// One look at everything that waits. Idempotent.
    pub async fn round(&self) -> Result<()> {
        self.queue.changed_everywhere();
        self.end_lost().await.and(self.round_of_changes().await)
    }

    /// Ends, or lets run again, what was granted to a node that has been away too long. A failed commit
    /// leaves it to the next look.
    async fn end_lost(&self) -> Result<()> {
        for some in self.links.lost(self.clock.steady()).chunks(PLACE_AT_ONCE) {
            let ends = some.iter().map(|(id, attempt)| async move {
                // What was just granted and is not committed yet is refused, and looked at again.
                if let Applied::Done(task, actions) = self.apply(*id, &Event::NodeSilent { attempt: *attempt }, Besides::default()).await? {
                    tracing::warn!(task = %id, attempt = attempt.ordinal(), "its node is away too long; it counts as lost");
                    self.perform(&task, &actions);
                }
                Ok(())
            });
            futures::future::join_all(ends).await.into_iter().collect::<Result<()>>()?;
        }
        Ok(())
    }

    /// One look at those for whom something changed, and at what is due.
    pub async fn round_of_changes(&self) -> Result<()> {
        self.settle_doubts().await?;
        if self.queue.is_changed_everywhere() {
            self.withdraw_unkept().await?;
        }
        let ended = self.end_overdue().await;
        self.queue.wake_rested(self.clock.now_ms(), self.clock.steady());
        let mut placed = vec![];
        let looked = self.look(&mut placed).await;
        // What was reserved is committed or given back, whatever the look came to.
        let committed = self.commit_placed(placed).await;
        let expired = self.end_expired().await;
        let fans = self.end_fans().await;
        let all = ended.and(looked).and(committed).and(expired).and(fans);
        if all.is_err() {
            // Who was not reached has not been looked at.
            self.queue.changed_everywhere();
        }
        all
    }

    /// Places the heads of the groups for which something changed.
    async fn look(&self, placed: &mut Placed) -> Result<()> {
        let changed = self.queue.take_changed();
        let since = self.clock.steady().saturating_sub(RIGHTS_FOR);
        if changed.all {
            self.queue.forget_rights(since);
        }
        let links: Vec<Link> = changed.nodes.iter().filter_map(|n| self.links.get(*n)).collect();
        let mut groups = self.queue.hopeful(&changed, &links);
        let mut heads: BTreeSet<(Reverse<i32>, Share, TaskId, usize)> = BTreeSet::new();
        for (i, Hopeful { group, .. }) in groups.iter().enumerate() {
            heads.extend(self.queue.head(group).map(|h| (h.order, self.links.share(group.user), h.id, i)));
        }
        let mut joined: BTreeSet<usize> = BTreeSet::new();
        while let Some((order, share, id, i)) = heads.pop_first() {
            let group = groups[i].group.clone();
            // Each attempt that a user is given puts the next of theirs behind the others'.
            let share_now = self.links.share(group.user);
            if share_now > share {
                heads.insert((order, share_now, id, i));
                continue;
            }
            // So that it is known why they wait, some are looked at whether there is room or not.
            let fresh = std::mem::take(&mut groups[i].fresh);
            if fresh {
                joined.insert(i);
            } else if !self.links.room((!joined.contains(&i)).then_some(&changed.nodes)) {
                continue;
            }
            let Some(rights) = self.rights(&group, id, since) else {
                // The next ones are read with it. Who has a place by now need not wait for them.
                let next = heads.iter().take(4 * RIGHTS_AT_ONCE).map(|(_, _, id, i)| (*id, &groups[*i].group));
                let next = next.filter(|(id, group)| self.rights(group, *id, since).is_none());
                let holders = std::iter::once(group.holder()).chain(next.map(|(_, group)| group.holder())).take(RIGHTS_AT_ONCE);
                let holders = holders.collect();
                self.commit_placed(std::mem::take(placed)).await?;
                self.read_rights(holders).await?;
                groups[i].fresh = fresh;
                heads.insert((order, share, id, i));
                continue;
            };
            let Some(head) = self.queue.head(&group) else { continue };
            if self.place(&group, head, &rights, placed).await? {
                heads.extend(self.queue.head(&group).map(|h| (h.order, self.links.share(group.user), h.id, i)));
            }
        }
        self.tell_ahead(&changed, placed).await
    }

    /// Tells nodes without a place of some who wait for one, so that they ask for the next by themselves.
    async fn tell_ahead(&self, changed: &Changed, placed: &mut Placed) -> Result<()> {
        let mut nodes = self.links.ahead((!changed.all).then_some(&changed.nodes), |node| self.queue.ahead_on(node));
        if nodes.is_empty() {
            return Ok(());
        }
        let groups = self.queue.untold();
        let place = |i: usize, h: &Head| (h.order, self.links.share(groups[i].0.user), h.id, i);
        let mut heads: BTreeMap<_, Head> = groups.iter().enumerate().map(|(i, (_, _, h))| (place(i, h), *h)).collect();
        while let Some(((_, _, id, i), head)) = heads.pop_first() {
            let (group, eligible, _) = &groups[i];
            let none = BTreeMap::new();
            let fitting = nodes.iter().filter(|(link, _)| usable(group, Some(eligible), link));
            let candidates: Vec<Candidate> = fitting
                .map(|(l, room)| Candidate { node: l.node, online: true, schedulable: true, room: *room, offers: &l.offers, taken: &none })
                .collect();
            let Ok(node) = choose(id, group.named, group.select.as_ref(), &candidates) else { continue };
            if head.next.ordinal() > AHEAD_ATTEMPTS || !self.queue.begin(id) {
                continue;
            }
            let at = nodes.iter().position(|(link, _)| link.node == node).expect("it was chosen among them");
            nodes[at].1 -= 1;
            placed.push(Placement { id, attempt: head.next, link: nodes[at].0.clone(), how: How::Ahead });
            if nodes[at].1 == 0 {
                nodes.swap_remove(at);
            }
            if nodes.is_empty() {
                break;
            }
            if placed.len() >= PLACE_AT_ONCE {
                self.commit_placed(std::mem::take(placed)).await?;
            }
            heads.extend(self.queue.next_untold(group).map(|h| (place(i, &h), h)));
        }
        Ok(())
    }

    /// Reserves a node for a head. False when there is none, and so none for its group.
    async fn place(&self, group: &Arc<Group>, head: Head, rights: &Rights, placed: &mut Placed) -> Result<bool> {
        if head.next.ordinal() > MAX_ATTEMPTS {
            self.expire(head.id, format!("{MAX_ATTEMPTS} attempts came too late or were lost")).await?;
            return Ok(true);
        }
        self.queue.count_weighing();
        let slots = group.select.as_ref().map(|s| s.slots.clone()).unwrap_or_default();
        let told = |node: NodeId| head.ahead.filter(|a| a.node == node).map(|a| a.attempt);
        let hold = |node| Hold {
            attempt: told(node).unwrap_or(head.next),
            user: group.user,
            slots: slots.clone(),
            lost_after: head.lost_after,
            over: false,
        };
        let reserve = |eligible: &dyn Fn(&Link) -> bool| {
            let choose = |candidates: &[Candidate]| choose(head.id, group.named, group.select.as_ref(), candidates);
            self.links.reserve(head.id, hold, eligible, choose, |_, _| Ok(()))
        };
        let (eligible, reserved) = match rights {
            Rights::Read(eligible) => {
                // The node that was told of it comes first: nobody else has to hear anything.
                let there = head.ahead.and_then(|_| reserve(&|l| told(l.node).is_some() && eligible.allows(l)).ok());
                (eligible, there.map_or_else(|| reserve(&|l| eligible.allows(l)), Ok))
            }
            Rights::Old(eligible) => {
                let choose = |candidates: &[Candidate]| choose(head.id, group.named, group.select.as_ref(), candidates);
                match self.links.weigh(|l| eligible.allows(l), choose) {
                    Err(why) => (eligible, Err(why)),
                    // A place came free in this moment, and is to be given by rights of now.
                    Ok(node) => {
                        self.queue.changed_on(node);
                        return Ok(false);
                    }
                }
            }
        };
        match reserved {
            Err(why) => {
                self.queue.blocked(group, why, eligible.clone());
                return Ok(false);
            }
            Ok(link) if self.queue.begin(head.id) => placed.push(match told(link.node) {
                Some(attempt) => Placement { id: head.id, attempt, link, how: How::Go },
                None => Placement { id: head.id, attempt: head.next, link, how: How::Assign },
            }),
            // It was cancelled in this moment.
            Ok(link) => self.give_back(link.node, head.id),
        }
        if placed.len() >= PLACE_AT_ONCE {
            self.commit_placed(std::mem::take(placed)).await?;
        }
        Ok(true)
    }

    /// Ends what has waited for a node longer than its caller allowed.
    async fn end_expired(&self) -> Result<()> {
        for (id, why) in self.queue.expired(self.clock.steady()) {
            self.expire(id, why.as_str().to_owned()).await?;
        }
        Ok(())
    }
    async fn expire(&self, id: TaskId, detail: String) -> Result<()> {
        let applied = self.apply(id, &Event::Expired { detail }, Besides::default()).await?;
        self.queue.remove(id);
        if let Applied::Done(task, actions) = applied {
            self.perform(&task, &actions);
        }
        Ok(())
    }

    /// Asks for the end of what is past its deadline. A failed commit leaves it due.
    async fn end_overdue(&self) -> Result<()> {
        let overdue = self.queue.overdue(self.clock.now_ms());
        for some in overdue.chunks(PLACE_AT_ONCE) {
            let ends = some.iter().map(|id| async move {
                let applied = self.apply(*id, &Event::DeadlinePassed, Besides::default()).await?;
                self.queue.forget_deadline(*id);
                if let Applied::Done(task, actions) = applied {
                    self.perform(&task, &actions);
                }
                Ok(())
            });
            futures::future::join_all(ends).await.into_iter().collect::<Result<()>>()?;
        }
        Ok(())
    }

    /// Syncs the attempts, together, and only then sends their orders.
    async fn commit_placed(&self, placed: Placed) -> Result<()> {
        let commits = placed.into_iter().map(|Placement { id, attempt, link, how }| async move {
            let event = match how {
                How::Assign => Event::Assigned { attempt, node: link.node, granted: Some(link.spool) },
                How::Go => Event::Granted { attempt, spool: link.spool },
                How::Ahead => Event::Assigned { attempt, node: link.node, granted: None },
            };
            let besides = Besides { signed: Some((self.keyring.key_id(), self.policy)), ..Default::default() };
            let applied = self.apply(id, &event, besides).await;
            if !matches!(applied, Ok(Applied::Done(..))) && how != How::Ahead {
                self.give_back(link.node, id);
            }
            match applied {
                Ok(Applied::Done(task, actions)) => {
                    if how == How::Ahead {
                        let (generation, sent) = (link.generation, self.clock.steady());
                        let ahead = Ahead { node: link.node, generation, attempt, sent, kept: false };
                        self.queue.told(id, ahead, attempt.next(self.incarnation), sent);
                    } else {
                        self.queue.placed(id, attempt);
                    }
                    self.perform(&task, &actions);
                    self.after_commit(task).await;
                    Ok(())
                }
                // It ended or moved meanwhile.
                Ok(Applied::Refused(_) | Applied::Unknown) if how == How::Assign => {
                    self.queue.placed(id, attempt);
                    Ok(())
                }
                Ok(Applied::Refused(_) | Applied::Unknown) => {
                    self.queue.put_back(id, self.clock.steady());
                    self.queue.doubt(id);
                    Ok(())
                }
                Err(e) => {
                    self.queue.put_back(id, self.clock.steady());
                    Err(e)
                }
            }
        });
        futures::future::join_all(commits).await.into_iter().collect()
    }

    /// Takes back what a node was told ahead and does not have: its link went, it is drained, or it has
    /// not said in time that it keeps it.
    async fn withdraw_unkept(&self) -> Result<()> {
        let now = self.clock.steady();
        let unkept = |(_, a): &(TaskId, Ahead)| {
            let Some(link) = self.links.get(a.node).filter(|l| l.generation == a.generation) else { return true };
            let silent = !a.kept && now.saturating_sub(a.sent) >= KEPT_WITHIN;
            if silent {
                tracing::warn!(node = %a.node, "orders that were sent ahead are not acknowledged; this link gets no more of them");
                self.links.keeps_none(a.node, a.generation);
            }
            silent || !link.is_open()
        };
        let unkept: Vec<_> = self.queue.ahead().into_iter().filter(unkept).collect();
        for some in unkept.chunks(PLACE_AT_ONCE) {
            let withdrawn = some.iter().map(|(id, a)| async move {
                if let Applied::Done(task, mut actions) =
                    self.apply(*id, &Event::Withdrawn { attempt: a.attempt }, Besides::default()).await?
                {
                    // It waits where it waited; and what an older link was told, the node forgot with it.
                    let told = self.links.is_current(a.node, a.generation);
                    actions.retain(|action| *action != Action::Requeue && (told || !matches!(action, Action::Cancel { .. })));
                    self.queue.taken_back(*id);
                    self.perform(&task, &actions);
                    self.after_commit(task).await;
                } else {
                    self.queue.doubt(*id);
                }
                Ok(())
            });
            futures::future::join_all(withdrawn).await.into_iter().collect::<Result<()>>()?;
        }
        Ok(())
    }

    /// A node keeps what it was told ahead. False when it is to forget it: that was moved or has ended.
    pub(crate) fn kept(&self, node: NodeId, task: TaskId, attempt: AttemptNo) -> bool {
        self.queue.kept(node, task, attempt)
    }
    /// A node has a place free for what it was told ahead. Who gets it is decided as ever.
    pub(crate) fn place_free(&self, node: NodeId) {
        self.queue.changed_on(node);
    }
}

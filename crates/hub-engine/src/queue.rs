//! The tasks that wait, in groups: tasks that ask for the same nodes in the same name. Where one of a
//! group finds no place none of them does, so a look costs what there are groups, and not tasks.
//!
//! ```text
//! resting (not_before, backoff, came late) ──► ready, by priority and age ──► placing ──► gone
//!                                                 ▲                            │
//!                                                 └── ahead, or commit failed ─┘
//! ```
//! A task of which a node was told ahead waits on in its place here: who goes first is decided when a
//! place is free, and not when an order is sent ahead.
//!
//! Kept in memory alone; [`crate::pool::Pool::recover`] rebuilds it from the journal.

use crate::fans::Fans;
use crate::links::Link;
use crate::records::Task;
use crate::tracks::Origins;
use mesh_core::permission::{Granted, Permission, Reach, Role};
use mesh_core::placement::{Waiting, has_slots};
use mesh_core::select::Selector;
use mesh_core::task::AttemptNo;
use mesh_core::{NodeId, SessionId, TaskId, UnixMs, UserId};
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;

/// Which nodes may take a task.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Eligible {
    /// Those attached to the session when asked, as far as its owner may use them.
    Attached(Vec<NodeId>, Box<Eligible>),
    /// What one owns, where that counts, and what one was granted.
    Theirs {
        owner: Option<UserId>,
        granted: Arc<Granted>,
    },
    Any,
}

impl Eligible {
    pub(crate) fn none() -> Self {
        Self::Theirs { owner: None, granted: Arc::default() }
    }
    pub(crate) fn of(user: UserId, role: Role, granted: &Arc<Granted>) -> Self {
        let reach = role.reach(Permission::TasksDispatch);
        if reach == Reach::All {
            return Self::Any;
        }
        let granted = if reach.is_to_granted() { granted.clone() } else { Arc::default() };
        Self::Theirs { owner: reach.is_to_own().then_some(user), granted }
    }
    pub(crate) fn allows(&self, link: &Link) -> bool {
        match self {
            Self::Attached(nodes, owners) => nodes.contains(&link.node) && owners.allows(link),
            Self::Theirs { owner, granted } => {
                *owner == Some(link.owner) || granted.nodes.get(&link.node).is_some_and(|given| given.has(Permission::TasksDispatch))
            }
            Self::Any => true,
        }
    }
}

/// What decides which nodes will do for a task.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Group {
    pub user: UserId,
    pub session: Option<SessionId>,
    pub named: Option<NodeId>,
    pub select: Option<Selector>,
}

/// Whose rights decide for a group.
pub(crate) type Holder = (UserId, Option<SessionId>);

impl Group {
    pub(crate) fn holder(&self) -> Holder {
        (self.user, self.session)
    }
    pub(crate) fn of(task: &Task) -> Self {
        Self { user: task.actor.user, session: task.session, named: task.named_node, select: task.terms.select.clone() }
    }
}

/// Until when a task rests: by the wall clock where a person said or is told a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Until {
    Wall(UnixMs),
    Steady(Duration),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Resting(Until, Waiting),
    Ready,
    /// A node is reserved for it, and the attempt is being committed.
    Placing,
}

/// An attempt that is not granted, and the link that was told of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ahead {
    pub node: NodeId,
    pub generation: u64,
    pub attempt: AttemptNo,
    /// By the steady clock.
    pub sent: Duration,
    /// The node has said that it has it.
    pub kept: bool,
}

#[derive(Debug)]
struct Entry {
    group: Arc<Group>,
    priority: i32,
    next: AttemptNo,
    ahead: Option<Ahead>,
    queue_secs: u64,
    lost_after: Option<Duration>,
    place: Place,
    /// By the steady clock: since when it waits, and when it has waited too long for a node.
    since: Duration,
    expires: Option<Duration>,
}

#[derive(Debug)]
struct Members {
    ready: BTreeSet<(Reverse<i32>, TaskId)>,
    /// Those of them of which no node was told ahead.
    untold: BTreeSet<(Reverse<i32>, TaskId)>,
    /// Tasks of the group in any place.
    all: usize,
    why: Waiting,
    /// As it was when it was last looked at; good for guesses, and not to place by.
    eligible: Option<Eligible>,
    /// Somebody joined since the last look.
    fresh: bool,
}

/// For whom something may have changed.
#[derive(Debug, Default)]
pub(crate) struct Changed {
    pub all: bool,
    /// A slot is free there.
    pub nodes: BTreeSet<NodeId>,
}

/// A group that is worth a look.
#[derive(Debug)]
pub(crate) struct Hopeful {
    pub group: Arc<Group>,
    /// It is to be looked at in any case: somebody joined it, or anything may have changed.
    pub fresh: bool,
}

/// A task at the head of its group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Head {
    pub order: Reverse<i32>,
    pub id: TaskId,
    pub next: AttemptNo,
    /// How long its node may then be away.
    pub lost_after: Option<Duration>,
    pub ahead: Option<Ahead>,
}

#[derive(Debug, Default)]
struct Line {
    tasks: BTreeMap<TaskId, Entry>,
    groups: BTreeMap<Arc<Group>, Members>,
    rests: BTreeSet<(UnixMs, TaskId)>,
    pauses: BTreeSet<(Duration, TaskId)>,
    expiring: BTreeSet<(Duration, TaskId)>,
    /// Of every open task, waiting or granted.
    deadlines: BTreeSet<(UnixMs, TaskId)>,
    deadline_of: BTreeMap<TaskId, UnixMs>,
    changed: Changed,
    /// Tasks of which nodes were told ahead.
    ahead: BTreeMap<NodeId, BTreeSet<TaskId>>,
    /// What was read of rights, and when.
    rights: BTreeMap<Holder, (Eligible, Duration)>,
    /// Those that are being read and did not change meanwhile.
    reading: BTreeSet<Holder>,
    /// Tasks of which a commit failed: what the journal holds of them is to be seen.
    doubts: BTreeSet<TaskId>,
}

/// The tasks that wait, and the signal that something may have changed for them.
#[derive(Debug, Default)]
pub struct Queue {
    line: Mutex<Line>,
    wake: Notify,
    weighed: AtomicU64,
    finished: AtomicU64,
    /// Which request a task came by, until it has ended or this process has.
    pub origins: Origins,
    pub(crate) fans: Fans,
}

/// How the pool stands.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PoolStanding {
    pub waiting: u64,
    /// How long the one that waits longest has waited.
    pub oldest: Duration,
    /// Tasks that this process brought to their end.
    pub finished: u64,
}

/// May the group's tasks run on this node, whether or not it has room? `eligible` as far as it is known.
pub(crate) fn usable(group: &Group, eligible: Option<&Eligible>, link: &Link) -> bool {
    let wanted = match group.named {
        Some(node) => node == link.node,
        None => group.select.as_ref().is_none_or(|s| s.fits(&link.offers)),
    };
    wanted && eligible.is_none_or(|e| e.allows(link))
}

impl Line {
    /// Ready, and to be looked at.
    fn ready(&mut self, id: TaskId, now: Duration) {
        self.stand(id, now);
        if let Some(members) = self.tasks.get(&id).and_then(|e| self.groups.get_mut(&e.group)) {
            members.fresh = true;
        }
    }
    fn stand(&mut self, id: TaskId, now: Duration) {
        let Some(entry) = self.tasks.get_mut(&id) else { return };
        entry.place = Place::Ready;
        if entry.queue_secs > 0 && entry.expires.is_none() {
            let at = now.saturating_add(Duration::from_secs(entry.queue_secs));
            entry.expires = Some(at);
            self.expiring.insert((at, id));
        }
        if let Some(members) = self.groups.get_mut(&entry.group) {
            members.ready.insert((Reverse(entry.priority), id));
            if entry.ahead.is_none() {
                members.untold.insert((Reverse(entry.priority), id));
            }
        }
    }
    /// No node knows of it any more.
    fn take_back(&mut self, id: TaskId) {
        let Some(entry) = self.tasks.get_mut(&id) else { return };
        let Some(ahead) = entry.ahead.take() else { return };
        if entry.place == Place::Ready
            && let Some(members) = self.groups.get_mut(&entry.group)
        {
            members.untold.insert((Reverse(entry.priority), id));
        }
        if let Some(tasks) = self.ahead.get_mut(&ahead.node) {
            tasks.remove(&id);
            if tasks.is_empty() {
                self.ahead.remove(&ahead.node);
            }
        }
    }

    fn remove(&mut self, id: TaskId) {
        self.take_back(id);
        let Some(entry) = self.tasks.remove(&id) else { return };
        match entry.place {
            Place::Resting(Until::Wall(at), _) => drop(self.rests.remove(&(at, id))),
            Place::Resting(Until::Steady(at), _) => drop(self.pauses.remove(&(at, id))),
            Place::Ready | Place::Placing => {}
        }
        if let Some(at) = entry.expires {
            self.expiring.remove(&(at, id));
        }
        if let Some(members) = self.groups.get_mut(&entry.group) {
            members.ready.remove(&(Reverse(entry.priority), id));
            members.untold.remove(&(Reverse(entry.priority), id));
            members.all -= 1;
            if members.all == 0 {
                self.groups.remove(&entry.group);
            }
        }
    }
}

impl Line {
    fn head(&self, first: Option<&(Reverse<i32>, TaskId)>) -> Option<Head> {
        let (order, id) = *first?;
        let entry = self.tasks.get(&id)?;
        Some(Head { order, id, next: entry.next, lost_after: entry.lost_after, ahead: entry.ahead })
    }
}

impl Queue {
    fn line(&self) -> MutexGuard<'_, Line> {
        // Each change is complete in itself: a panic elsewhere cannot leave half of one.
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The rights of a new task's group, unless they are known.
    pub(crate) fn seed_rights(&self, group: &Group, eligible: &Eligible) {
        if let Some(members) = self.line().groups.get_mut(group) {
            members.eligible.get_or_insert_with(|| eligible.clone());
        }
    }

    /// Adds a task that waits for its attempt `next`; with `rest`, not before that.
    pub(crate) fn add(&self, task: &Task, next: AttemptNo, why: Waiting, rest: Option<Until>, now: Duration) {
        let mut line = self.line();
        line.remove(task.id);
        let group = Arc::new(Group::of(task));
        let members = line.groups.entry(group.clone()).or_insert_with(|| Members {
            ready: BTreeSet::new(),
            untold: BTreeSet::new(),
            all: 0,
            why,
            eligible: None,
            fresh: true,
        });
        members.all += 1;
        if members.ready.is_empty() && rest.is_none() {
            members.why = why;
        }
        let place = rest.map_or(Place::Ready, |until| Place::Resting(until, why));
        let entry = Entry {
            group,
            priority: task.terms.priority,
            next,
            ahead: None,
            queue_secs: task.queue_secs,
            lost_after: task.terms.lost_after_secs().map(Duration::from_secs),
            place,
            since: now,
            expires: None,
        };
        line.tasks.insert(task.id, entry);
        match rest {
            None => line.ready(task.id, now),
            Some(Until::Wall(at)) => drop(line.rests.insert((at, task.id))),
            Some(Until::Steady(at)) => drop(line.pauses.insert((at, task.id))),
        }
        drop(line);
        self.wake.notify_one();
    }

    /// Ends a task when its time comes, whether it waits or runs.
    pub(crate) fn watch_deadline(&self, task: &Task) {
        let Some(at) = task.terms.deadline.filter(|_| !task.progress.state.is_final() && task.progress.cancel.is_none()) else { return };
        let mut line = self.line();
        line.deadlines.insert((at, task.id));
        line.deadline_of.insert(task.id, at);
        drop(line);
        self.wake.notify_one();
    }
    pub(crate) fn forget_deadline(&self, id: TaskId) {
        let mut line = self.line();
        if let Some(at) = line.deadline_of.remove(&id) {
            line.deadlines.remove(&(at, id));
        }
    }

    /// Takes a task out, since it waits no longer.
    pub(crate) fn remove(&self, id: TaskId) {
        self.line().remove(id);
    }

    /// Takes out a task whose attempt was committed; it may wait for a later one by now.
    pub(crate) fn placed(&self, id: TaskId, attempt: AttemptNo) {
        let mut line = self.line();
        if line.tasks.get(&id).is_some_and(|e| e.next <= attempt || e.ahead.is_some_and(|a| a.attempt == attempt)) {
            line.remove(id);
        }
    }
    /// A write about this task failed, and it is not known whether it was done all the same.
    pub fn doubt(&self, id: TaskId) {
        self.line().doubts.insert(id);
        self.wake.notify_one();
    }
    pub(crate) fn doubts(&self) -> Vec<TaskId> {
        self.line().doubts.iter().copied().collect()
    }
    pub(crate) fn settled(&self, id: TaskId) {
        self.line().doubts.remove(&id);
    }
    /// Does anybody of this group wait for a node now?
    pub(crate) fn is_waiting(&self, group: &Group) -> bool {
        self.line().groups.get(group).is_some_and(|m| !m.ready.is_empty())
    }
    /// Does a task that may go before a newcomer of this priority wait, and could run on this node now?
    /// Whoever was not looked at yet counts as one who could.
    pub(crate) fn is_wanted(&self, link: &Link, taken: &BTreeMap<String, u32>, priority: i32) -> bool {
        let line = self.line();
        let first = |m: &Members| m.ready.first().is_some_and(|(Reverse(p), _)| *p >= priority);
        let could = |group: &Group, m: &Members| {
            let eligible = m.eligible.as_ref().filter(|_| !line.changed.all);
            usable(group, eligible, link) && group.select.as_ref().is_none_or(|s| has_slots(s, &link.offers, taken))
        };
        line.groups.iter().any(|(group, m)| first(m) && could(group, m))
    }
    pub(crate) fn why(&self, id: TaskId) -> Option<Waiting> {
        let line = self.line();
        let entry = line.tasks.get(&id)?;
        match entry.place {
            Place::Resting(_, why) => Some(why),
            Place::Ready | Place::Placing => line.groups.get(&entry.group).map(|m| m.why),
        }
    }

    pub(crate) fn changed_everywhere(&self) {
        self.line().changed.all = true;
        self.wake.notify_one();
    }
    /// A place is free there. Where nobody waits there is nothing to look for: who comes is looked at in any case.
    pub(crate) fn changed_on(&self, node: NodeId) {
        let mut line = self.line();
        if line.tasks.is_empty() {
            return;
        }
        line.changed.nodes.insert(node);
        drop(line);
        self.wake.notify_one();
    }
    /// A child of this parent has ended, perhaps the last one.
    pub(crate) fn child_ended(&self, parent: TaskId) {
        self.fans.note(parent);
        self.wake.notify_one();
    }
    pub(crate) async fn woken(&self) {
        self.wake.notified().await;
    }

    /// Lets those go on whose rest is over.
    pub(crate) fn wake_rested(&self, wall: UnixMs, steady: Duration) {
        let mut line = self.line();
        while let Some(&(at, id)) = line.rests.first().filter(|(at, _)| *at <= wall) {
            line.rests.remove(&(at, id));
            line.ready(id, steady);
        }
        while let Some(&(at, id)) = line.pauses.first().filter(|(at, _)| *at <= steady) {
            line.pauses.remove(&(at, id));
            line.ready(id, steady);
        }
        // What is about to be given up is looked at once more.
        let due: Vec<TaskId> = line.expiring.iter().take_while(|(at, _)| *at < steady).map(|(_, id)| *id).collect();
        for id in due {
            let group = line.tasks.get(&id).map(|e| e.group.clone());
            if let Some(members) = group.and_then(|g| line.groups.get_mut(&g)) {
                members.fresh = true;
            }
        }
    }
    /// Tasks that have waited too long, and why they still wait.
    pub(crate) fn expired(&self, steady: Duration) -> Vec<(TaskId, Waiting)> {
        let line = self.line();
        let due = line.expiring.iter().take_while(|(at, _)| *at < steady);
        due.filter_map(|(_, id)| {
            let entry = line.tasks.get(id).filter(|e| e.place == Place::Ready)?;
            Some((*id, line.groups.get(&entry.group)?.why))
        })
        .collect()
    }
    pub(crate) fn overdue(&self, wall: UnixMs) -> Vec<TaskId> {
        self.line().deadlines.iter().take_while(|(at, _)| *at <= wall).map(|(_, id)| *id).collect()
    }
    /// The time until something here is due.
    pub(crate) fn next_due(&self, wall: UnixMs, steady: Duration) -> Option<Duration> {
        let line = self.line();
        let walls = [line.rests.first(), line.deadlines.first()].into_iter().flatten();
        let by_wall = walls.map(|(at, _)| Duration::from_millis(u64::try_from(at.saturating_sub(wall)).unwrap_or(0)));
        let by_steady = line.pauses.first().map(|(at, _)| at.saturating_sub(steady));
        by_wall.chain(by_steady).min()
    }

    pub(crate) fn is_changed_everywhere(&self) -> bool {
        self.line().changed.all
    }
    /// What changed since the last call.
    pub(crate) fn take_changed(&self) -> Changed {
        std::mem::take(&mut self.line().changed)
    }
    /// The groups for which something may have changed. `links` are the nodes of `changed` that are here.
    pub(crate) fn hopeful(&self, changed: &Changed, links: &[Link]) -> Vec<Hopeful> {
        let mut line = self.line();
        let worth = |group: &Group, m: &Members| {
            !m.ready.is_empty() && (m.fresh || changed.all || links.iter().any(|l| usable(group, m.eligible.as_ref(), l)))
        };
        let found = line.groups.iter_mut().filter(|(group, m)| worth(group, m));
        found.map(|(group, m)| Hopeful { group: group.clone(), fresh: std::mem::take(&mut m.fresh) || changed.all }).collect()
    }
    pub(crate) fn head(&self, group: &Arc<Group>) -> Option<Head> {
        let line = self.line();
        line.head(line.groups.get(group)?.ready.first())
    }

    // ---- orders ahead ----

    /// A node is told of it, and it waits on. False when it waits no longer.
    pub(crate) fn told(&self, id: TaskId, ahead: Ahead, next: AttemptNo, now: Duration) -> bool {
        let mut line = self.line();
        line.take_back(id);
        let Some(entry) = line.tasks.get_mut(&id).filter(|e| e.place == Place::Placing) else { return false };
        (entry.ahead, entry.next) = (Some(ahead), next);
        line.ahead.entry(ahead.node).or_default().insert(id);
        line.stand(id, now);
        true
    }
    /// The attempt was withdrawn, and the task waits on.
    pub(crate) fn taken_back(&self, id: TaskId) {
        self.line().take_back(id);
    }
    pub(crate) fn ahead(&self) -> Vec<(TaskId, Ahead)> {
        let line = self.line();
        let tasks = line.ahead.values().flatten();
        tasks.filter_map(|id| Some((*id, line.tasks.get(id)?.ahead?))).collect()
    }
    pub(crate) fn ahead_on(&self, node: NodeId) -> u32 {
        let line = self.line();
        // Who is being given a place makes room for the next.
        let waits = |id: &&TaskId| line.tasks.get(id).is_some_and(|e| e.place == Place::Ready);
        line.ahead.get(&node).map_or(0, |tasks| tasks.iter().filter(waits).count() as u32)
    }
    /// The node says that it has it. False when it is not told of this attempt any more.
    pub(crate) fn kept(&self, node: NodeId, id: TaskId, attempt: AttemptNo) -> bool {
        let mut line = self.line();
        let ahead = line.tasks.get_mut(&id).and_then(|e| e.ahead.as_mut());
        ahead.filter(|a| a.node == node && a.attempt == attempt).map(|a| a.kept = true).is_some()
    }
    /// Groups that wait for a place and hold no slots, with the first of each of which no node was told.
    pub(crate) fn untold(&self) -> Vec<(Arc<Group>, Eligible, Head)> {
        let line = self.line();
        let fit = |group: &Group, m: &Members| m.why == Waiting::NoSlot && group.select.as_ref().is_none_or(|s| s.slots.is_empty());
        let found = line.groups.iter().filter(|(group, m)| fit(group, m));
        found.filter_map(|(group, m)| Some((group.clone(), m.eligible.clone()?, line.head(m.untold.first())?))).collect()
    }
    pub(crate) fn next_untold(&self, group: &Arc<Group>) -> Option<Head> {
        let line = self.line();
        line.head(line.groups.get(group)?.untold.first())
    }

    /// Begins to read rights.
    pub(crate) fn begin_reading(&self, holders: &BTreeSet<Holder>) {
        self.line().reading.extend(holders);
    }
    /// Rights as they were read, begun at `at`; no word of what changed meanwhile.
    pub(crate) fn learn(&self, holder: Holder, eligible: Eligible, at: Duration) {
        let mut line = self.line();
        if line.reading.remove(&holder) {
            line.rights.insert(holder, (eligible, at));
        }
    }
    /// What was read of a group's rights, not before `since`.
    pub(crate) fn rights(&self, group: &Group, since: Duration) -> Option<Eligible> {
        self.line().rights.get(&group.holder()).filter(|(_, at)| *at >= since).map(|(eligible, _)| eligible.clone())
    }
    /// As they were known at the last look at the group, or when its first task came.
    pub(crate) fn old_rights(&self, group: &Group) -> Option<Eligible> {
        self.line().groups.get(group)?.eligible.clone()
    }
    pub(crate) fn forget_rights(&self, before: Duration) {
        self.line().rights.retain(|_, (_, at)| *at >= before);
    }
    /// Nodes were attached to the session, or detached.
    pub(crate) fn attachments_changed(&self, session: SessionId) {
        let mut line = self.line();
        line.rights.retain(|(_, of), _| *of != Some(session));
        line.reading.retain(|(_, of)| *of != Some(session));
        for (_, members) in line.groups.iter_mut().filter(|(group, _)| group.session == Some(session)) {
            (members.eligible, members.fresh) = (None, true);
        }
        drop(line);
        self.wake.notify_one();
    }
    /// Somebody may use more nodes than before, or fewer.
    pub(crate) fn rights_changed(&self) {
        let mut line = self.line();
        line.rights.clear();
        line.reading.clear();
        line.groups.values_mut().for_each(|members| (members.eligible, members.fresh) = (None, true));
        drop(line);
        self.wake.notify_one();
    }
    /// A node is reserved for it. False when it waits no longer.
    pub(crate) fn begin(&self, id: TaskId) -> bool {
        let mut line = self.line();
        let Some(entry) = line.tasks.get_mut(&id).filter(|e| e.place == Place::Ready) else { return false };
        entry.place = Place::Placing;
        let (group, key) = (entry.group.clone(), (Reverse(entry.priority), id));
        if let Some(members) = line.groups.get_mut(&group) {
            members.ready.remove(&key);
            members.untold.remove(&key);
        }
        true
    }
    /// Its commit failed: it waits on.
    pub(crate) fn put_back(&self, id: TaskId, now: Duration) {
        let mut line = self.line();
        if line.tasks.get(&id).is_some_and(|e| e.place == Place::Placing) {
            line.ready(id, now);
        }
    }
    pub(crate) fn blocked(&self, group: &Arc<Group>, why: Waiting, eligible: Eligible) {
        if let Some(members) = self.line().groups.get_mut(group) {
            (members.why, members.eligible) = (why, Some(eligible));
        }
    }

    /// How many tasks wait for a node.
    pub fn waiting(&self) -> usize {
        self.line().tasks.len()
    }
    pub(crate) fn count_finished(&self) {
        self.finished.fetch_add(1, Ordering::Relaxed);
    }
    pub(crate) fn standing(&self, now: Duration) -> PoolStanding {
        let line = self.line();
        let oldest = line.tasks.values().map(|e| now.saturating_sub(e.since)).max().unwrap_or_default();
        PoolStanding { waiting: line.tasks.len() as u64, oldest, finished: self.finished.load(Ordering::Relaxed) }
    }

    pub(crate) fn count_weighing(&self) {
        self.weighed.fetch_add(1, Ordering::Relaxed);
    }
    /// How often a waiting task was weighed against the nodes: what looks have cost.
    pub fn weighed(&self) -> u64 {
        self.weighed.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_that_nobody_waits_for_is_no_news() {
        let queue = Queue::default();
        queue.changed_on(NodeId::from_bytes([1; 16]));
        assert!(queue.take_changed().nodes.is_empty());
    }
}

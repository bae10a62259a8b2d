//! The nodes that are here now: live links, their slots, health and presence.
//!
//! Kept in memory alone; the store's generation says which link is the true one.

use crate::copies::Copies;
use crate::events::{Events, NodeNews};
use crate::input::{Input, Inputs};
use crate::records::{Node, Task};
use crate::refusals::Refusals;
use mesh_core::ceiling::Closed;
use mesh_core::placement::Candidate;
use mesh_core::select::Offers;
use mesh_core::task::AttemptNo;
use mesh_core::{NodeId, SpoolId, TaskId, UserId};
use mesh_process::CancellationToken;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::mpsc;

/// Commands that may wait for one link's writer. A node holds at most its slots' worth of orders, each
/// with a cancel and an acknowledgement; past this the link is too slow to live and is closed.
pub const LINK_QUEUE: usize = 4096;

/// Orders that a node is told of ahead, at most.
const MOST_AHEAD: u32 = 64;

/// What the engine wants said to a node; the link signs and frames it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LinkCommand {
    Order(Box<Order>),
    Cancel {
        task: TaskId,
        attempt: AttemptNo,
    },
    /// The same, and without time to end by itself.
    Kill {
        task: TaskId,
        attempt: AttemptNo,
    },
    /// The result is durable here: the node may forget it.
    ResultAck {
        task: TaskId,
        attempt: AttemptNo,
    },
    /// Live input for a running attempt. What a full queue or a broken link loses, its caller says again.
    Input(Box<Input>),
    Close {
        code: &'static str,
        detail: String,
    },
}

/// One order before it is signed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Order {
    pub task: TaskId,
    pub attempt: AttemptNo,
    pub skill: String,
    /// The canonical spec when it is small enough to travel inside, else empty; its size and digest.
    pub spec: Vec<u8>,
    pub spec_bytes: u64,
    pub digest: mesh_core::Digest,
    pub user: UserId,
    pub session: Option<mesh_core::SessionId>,
    pub timeout_secs: u64,
    pub start_before: mesh_core::UnixMs,
    pub policy: mesh_core::Digest,
    /// The node may start it; else it keeps it until this comes again with leave to start.
    pub granted: bool,
    /// The request that the task came by, while this process remembers it.
    pub request_id: Option<Arc<str>>,
}

/// A sample from the node.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Health {
    pub cpu_percent: f64,
    pub memory_used: u64,
    pub memory_total: u64,
    pub disk_used: u64,
    pub disk_total: u64,
    pub load_1m: f64,
    pub running: u32,
    /// Kept there for the hub; a limit of 0 is not known.
    pub spool_bytes: u64,
    pub spool_limit: u64,
}

/// A link that was accepted.
#[derive(Debug, Clone)]
pub struct Link {
    pub node: NodeId,
    pub owner: UserId,
    pub generation: u64,
    pub spool: SpoolId,
    /// As many as the machine itself takes at once.
    pub own_tasks: u32,
    /// The hub's own bound on that.
    pub task_limit: Option<u32>,
    /// As many as it is given.
    pub max_tasks: u32,
    /// It takes no work, by its own word.
    pub closed: Option<Closed>,
    /// Orders that it keeps without leave to start them; 0 for a node that knows nothing of that.
    pub keeps: u32,
    /// Labels, skills and slots, as placement sees them.
    pub offers: Arc<Offers>,
    /// Takes no new work.
    pub draining: bool,
    /// Of the registry's row that the above is from.
    pub epoch: u64,
    /// Ends the streams of this link at once, whatever they are doing: the node is no longer ours.
    pub cut: CancellationToken,
    pub commands: mpsc::Sender<LinkCommand>,
    pub health: Option<Health>,
    pub rtt: Option<Duration>,
}

impl Link {
    /// Takes new work, as far as people have their say.
    pub fn is_open(&self) -> bool {
        !self.draining && self.closed.is_none()
    }
    /// Why it takes no more work, with so much of it running. Placement goes by the same facts.
    pub fn refuses(&self, running: u32) -> Option<&'static str> {
        match () {
            // Before all that the hub could change: its owner alone opens it.
            () if self.closed.is_some() => self.closed.map(Closed::as_str),
            () if self.draining => Some("draining"),
            () if running >= self.max_tasks => Some("busy"),
            () => None,
        }
    }
}

/// What a granted attempt holds on its node.
#[derive(Debug, Clone)]
pub struct Hold {
    pub attempt: AttemptNo,
    pub user: UserId,
    /// Besides its place as a task: slots by kind.
    pub slots: BTreeMap<String, u32>,
    /// How long its node may be away before it counts as lost; None is for ever.
    pub lost_after: Option<Duration>,
    /// It has ended on its node, and takes no place there while its result is on the way.
    pub over: bool,
}

impl Hold {
    pub fn of(task: &Task, attempt: AttemptNo) -> Self {
        let slots = task.terms.select.as_ref().map(|s| s.slots.clone()).unwrap_or_default();
        let lost_after = task.terms.lost_after_secs().map(Duration::from_secs);
        Self { attempt, user: task.actor.user, slots, lost_after, over: false }
    }
}

/// An attempt that a node told of while the hub holds back after a restore.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Told {
    pub task: TaskId,
    pub attempt: AttemptNo,
    /// It is an open attempt in the journal too. What is not ends when the hub goes on.
    pub known: bool,
}

/// What is held on one node.
#[derive(Debug, Default)]
struct Held {
    tasks: BTreeMap<TaskId, Hold>,
    /// Those that are not over, and the sum of their slots.
    running: u32,
    slots: BTreeMap<String, u32>,
}

impl Held {
    /// Gives its place back.
    fn free(&mut self, hold: &Hold) {
        self.running = self.running.saturating_sub(1);
        for (kind, n) in &hold.slots {
            if let Some(count) = self.slots.get_mut(kind) {
                *count = count.saturating_sub(*n);
            }
        }
    }
}

#[derive(Debug, Default)]
struct State {
    links: BTreeMap<NodeId, Link>,
    /// Granted attempts by node, whether it is here or not.
    held: BTreeMap<NodeId, Held>,
    /// Nodes that are away with granted work, and since when by the steady clock.
    away: BTreeMap<NodeId, Duration>,
    shares: BTreeMap<UserId, Share>,
    /// Counts what was ever given out.
    turn: u64,
    /// Revoked and removed since this process started.
    retired: BTreeSet<NodeId>,
    /// Of them, those with tasks that may still have to be ended.
    unsettled: BTreeSet<NodeId>,
    /// Set while the hub holds back after a restore: what nodes told of meanwhile.
    restored: Option<BTreeMap<NodeId, Vec<Told>>>,
}

/// What a user has of the nodes: who has less goes first.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Share {
    /// Attempts on nodes now.
    pub attempts: u32,
    /// The turn at which the newest was given.
    pub turn: u64,
}

impl State {
    fn running(&self, node: NodeId) -> u32 {
        self.held.get(&node).map_or(0, |h| h.running)
    }
    fn has_room(&self, link: &Link) -> bool {
        link.refuses(self.running(link.node)).is_none()
    }
    /// Slots that are taken on a node, by kind.
    fn taken(&self, node: NodeId) -> &BTreeMap<String, u32> {
        static NONE: BTreeMap<String, u32> = BTreeMap::new();
        self.held.get(&node).map_or(&NONE, |h| &h.slots)
    }
    fn weigh<E>(&self, eligible: impl Fn(&Link) -> bool, choose: impl FnOnce(&[Candidate]) -> Result<NodeId, E>) -> Result<NodeId, E> {
        let candidates: Vec<_> = self
            .links
            .values()
            .filter(|l| eligible(l))
            .map(|l| Candidate {
                node: l.node,
                online: true,
                schedulable: l.is_open(),
                room: l.max_tasks.saturating_sub(self.running(l.node)),
                offers: &l.offers,
                taken: self.taken(l.node),
            })
            .collect();
        choose(&candidates)
    }
    fn hold(&mut self, node: NodeId, task: TaskId, hold: Hold) {
        self.release(node, task);
        let held = self.held.entry(node).or_default();
        held.running += 1;
        for (kind, n) in &hold.slots {
            *held.slots.entry(kind.clone()).or_default() += n;
        }
        self.turn += 1;
        let share = self.shares.entry(hold.user).or_default();
        (share.attempts, share.turn) = (share.attempts + 1, self.turn);
        held.tasks.insert(task, hold);
    }
    fn release(&mut self, node: NodeId, task: TaskId) {
        let Some(held) = self.held.get_mut(&node) else { return };
        let Some(gone) = held.tasks.remove(&task) else { return };
        if !gone.over {
            held.free(&gone);
        }
        if held.tasks.is_empty() {
            self.held.remove(&node);
        }
        if !gone.over {
            self.lessen(gone.user);
        }
    }
    fn lessen(&mut self, user: UserId) {
        if let Some(share) = self.shares.get_mut(&user) {
            share.attempts = share.attempts.saturating_sub(1);
        }
    }
}

#[derive(Debug, Default)]
pub struct Links(Mutex<State>, Option<Events>, Inputs, Copies, Refusals);

impl Links {
    /// Links that tell who comes and goes.
    pub fn telling(events: Events) -> Self {
        Self(Mutex::default(), Some(events), Inputs::default(), Copies::default(), Refusals::default())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Each change below is complete in itself: a panic elsewhere cannot leave half of one.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a link in place; an older one of the same node is told that it is superseded. False, and
    /// nothing happens, when a newer one is there already or the node is retired.
    pub fn open(&self, link: Link) -> bool {
        let old = {
            let mut s = self.state();
            if s.retired.contains(&link.node) || s.links.get(&link.node).is_some_and(|l| l.generation > link.generation) {
                return false;
            }
            if let (Some(events), false) = (&self.1, s.links.contains_key(&link.node)) {
                events.online(&link);
            }
            s.away.remove(&link.node);
            s.links.insert(link.node, link)
        };
        if let Some(old) = old {
            self.2.hang_up(old.node, old.generation);
            let _ =
                old.commands.try_send(LinkCommand::Close { code: "superseded", detail: "a newer link of this node was accepted".into() });
        }
        true
    }
    /// Takes a link away if it is still the one of that generation; true when the node is gone now.
    pub fn close(&self, node: NodeId, generation: u64) -> bool {
        let mut s = self.state();
        if s.links.get(&node).is_some_and(|l| l.generation == generation) {
            // Told under the lock, so that coming and going are told in their true order.
            if let (Some(gone), Some(events)) = (s.links.remove(&node), &self.1) {
                events.offline(&gone);
            }
            self.2.hang_up(node, generation);
            return true;
        }
        false
    }
    /// The callers that wait for a word about their input.
    pub(crate) fn inputs(&self) -> &Inputs {
        &self.2
    }
    pub fn copies(&self) -> &Copies {
        &self.3
    }
    /// Counts a word of a node that cannot be true; a link that says too many is closed.
    pub fn refuse(&self, node: NodeId, what: &'static str, detail: &dyn std::fmt::Display) {
        metrics::counter!("cortex_refused_reports_total", "what" => what).increment(1);
        let generation = self.get(node).map_or(0, |l| l.generation);
        let noted = self.4.note(node, generation);
        if noted.tell {
            tracing::warn!(%node, what, %detail, "a report of a node cannot be true; it is refused");
        }
        if noted.too_many {
            self.send(node, LinkCommand::Close { code: "refused", detail: "too many reports of this link cannot be true".into() });
        }
    }
    pub(crate) fn tell(&self, node: &Node, news: NodeNews) {
        if let Some(events) = &self.1 {
            events.node(node, news);
        }
    }
    /// Takes over what the registry says of a node; an older row than the one that is known changes nothing.
    pub fn set(&self, node: &Node) {
        if let Some(l) = self.state().links.get_mut(&node.id).filter(|l| l.epoch <= node.epoch) {
            l.owner = node.owner;
            l.offers = Arc::new(node.offers());
            (l.task_limit, l.max_tasks) = (node.task_limit, node.takes_at_once(l.own_tasks));
            l.draining = node.draining;
            l.epoch = node.epoch;
        }
    }
    /// Takes over what the machine's owner says of it, by the link of that generation. False when nothing changed.
    pub fn set_standing(&self, node: NodeId, generation: u64, own_tasks: u32, closed: Option<Closed>) -> bool {
        let mut s = self.state();
        let link = s.links.get_mut(&node).filter(|l| l.generation == generation);
        let Some(l) = link.filter(|l| (l.own_tasks, l.closed) != (own_tasks, closed)) else { return false };
        (l.own_tasks, l.closed) = (own_tasks, closed);
        l.max_tasks = l.task_limit.map_or(own_tasks, |limit| own_tasks.min(limit));
        if let Some(events) = &self.1 {
            events.takes(l);
        }
        true
    }
    /// From now on this node is never given anything, and its streams end at once.
    pub fn retire(&self, node: NodeId) {
        let mut s = self.state();
        if s.retired.insert(node) {
            s.unsettled.insert(node);
        }
        if let Some(gone) = s.links.remove(&node) {
            gone.cut.cancel();
            self.2.hang_up(node, gone.generation);
            if let Some(events) = &self.1 {
                events.offline(&gone);
            }
        }
    }
    pub fn is_retired(&self, node: NodeId) -> bool {
        self.state().retired.contains(&node)
    }
    /// Its tasks are to be looked at (again).
    pub fn unsettle(&self, node: NodeId) {
        self.state().unsettled.insert(node);
    }
    pub fn unsettled(&self) -> Vec<NodeId> {
        self.state().unsettled.iter().copied().collect()
    }
    /// Begins to settle; what comes meanwhile is noted anew.
    pub fn begin_settling(&self, node: NodeId) {
        self.state().unsettled.remove(&node);
    }
    /// From now on links are accepted and nothing is done with them, until [`Links::go`].
    pub fn hold_back(&self) {
        self.state().restored = Some(BTreeMap::new());
    }
    pub fn holds_back(&self) -> bool {
        self.state().restored.is_some()
    }
    /// Notes what a node told of. False, and nothing is noted, when the hub does not hold back any more.
    pub fn note_told(&self, node: NodeId, told: Vec<Told>) -> bool {
        self.state().restored.as_mut().map(|r| r.insert(node, told)).is_some()
    }
    /// What the nodes told of; None when the hub does not hold back.
    pub fn told(&self) -> Option<BTreeMap<NodeId, Vec<Told>>> {
        self.state().restored.clone()
    }
    /// Ends the holding back. Nodes are asked to link anew, so that each is reconciled.
    pub fn go(&self) {
        let mut s = self.state();
        if s.restored.take().is_some() {
            let word = || LinkCommand::Close { code: "restored", detail: "the hub goes on after a restore; connect again".into() };
            // None is current any more: what it still says is not taken. Without its sender, one whose queue
            // is full ends too.
            for gone in std::mem::take(&mut s.links).into_values() {
                let _ = gone.commands.try_send(word());
                self.2.hang_up(gone.node, gone.generation);
                if let Some(events) = &self.1 {
                    events.offline(&gone);
                }
            }
        }
    }
    /// The link and how much runs there, at one moment.
    pub fn look(&self, node: NodeId) -> (Option<Link>, u32) {
        let s = self.state();
        (s.links.get(&node).cloned(), s.running(node))
    }
    pub fn get(&self, node: NodeId) -> Option<Link> {
        self.state().links.get(&node).cloned()
    }
    /// Can an order go to this node: granted to the memory that it has, or not granted and it keeps such?
    /// None when it is not here.
    pub fn takes(&self, node: NodeId, granted: Option<SpoolId>) -> Option<bool> {
        self.state().links.get(&node).map(|l| granted.map_or(l.keeps > 0, |spool| l.spool == spool))
    }
    pub fn is_current(&self, node: NodeId, generation: u64) -> bool {
        self.state().links.get(&node).is_some_and(|l| l.generation == generation)
    }
    pub fn all(&self) -> Vec<Link> {
        self.state().links.values().cloned().collect()
    }
    pub fn set_health(&self, node: NodeId, health: Health) {
        if let Some(l) = self.state().links.get_mut(&node) {
            l.health = Some(health);
        }
    }
    pub fn set_rtt(&self, node: NodeId, rtt: Duration) {
        if let Some(l) = self.state().links.get_mut(&node) {
            l.rtt = Some(rtt);
        }
    }

    /// Chooses by `choose` among the live nodes and takes what `hold` says there, in one step; unless
    /// `yields`, which sees the chosen one and the slots that are taken there, leaves it to somebody else.
    pub fn reserve<E>(
        &self,
        task: TaskId,
        hold: impl FnOnce(NodeId) -> Hold,
        eligible: impl Fn(&Link) -> bool,
        choose: impl FnOnce(&[Candidate]) -> Result<NodeId, E>,
        yields: impl FnOnce(&Link, &BTreeMap<String, u32>) -> Result<(), E>,
    ) -> Result<Link, E> {
        let mut s = self.state();
        let node = s.weigh(eligible, choose)?;
        yields(&s.links[&node], s.taken(node))?;
        s.hold(node, task, hold(node));
        Ok(s.links[&node].clone())
    }
    /// What [`Links::reserve`] would choose now.
    pub fn weigh<E>(&self, eligible: impl Fn(&Link) -> bool, choose: impl FnOnce(&[Candidate]) -> Result<NodeId, E>) -> Result<NodeId, E> {
        self.state().weigh(eligible, choose)
    }
    /// Notes an attempt that was granted before this process started.
    pub fn hold(&self, node: NodeId, task: &Task, attempt: AttemptNo) {
        self.state().hold(node, task.id, Hold::of(task, attempt));
    }
    pub fn release(&self, node: NodeId, task: TaskId) {
        self.state().release(node, task);
    }
    /// The node says that this attempt has ended: its place is free, though its result is not here yet.
    /// False when that was known, or the attempt is not one that it holds.
    pub fn over(&self, node: NodeId, task: TaskId, attempt: AttemptNo) -> bool {
        let mut s = self.state();
        let Some(held) = s.held.get_mut(&node) else { return false };
        let Some(hold) = held.tasks.get_mut(&task).filter(|h| h.attempt == attempt && !h.over) else { return false };
        hold.over = true;
        let gone = hold.clone();
        held.free(&gone);
        s.lessen(gone.user);
        true
    }
    /// Nodes without a place, of which `of` are looked at if it is given, that can be told of more orders
    /// ahead than the `ahead` of each; and of how many more.
    pub(crate) fn ahead(&self, of: Option<&BTreeSet<NodeId>>, ahead: impl Fn(NodeId) -> u32) -> Vec<(Link, u32)> {
        let s = self.state();
        let more = |l: &Link| {
            let full = l.is_open() && s.running(l.node) >= l.max_tasks;
            let most = if full { l.keeps.min(l.max_tasks).min(MOST_AHEAD) } else { 0 };
            if most == 0 { 0 } else { most.saturating_sub(ahead(l.node)) }
        };
        let asked: Vec<&Link> = match of {
            None => s.links.values().collect(),
            Some(nodes) => nodes.iter().filter_map(|n| s.links.get(n)).collect(),
        };
        asked.into_iter().map(|l| (l, more(l))).filter(|(_, n)| *n > 0).map(|(l, n)| (l.clone(), n)).collect()
    }
    /// This link answers nothing about orders ahead: it is sent none any more.
    pub(crate) fn keeps_none(&self, node: NodeId, generation: u64) {
        if let Some(l) = self.state().links.get_mut(&node).filter(|l| l.generation == generation) {
            l.keeps = 0;
        }
    }
    /// Is this the attempt that the node holds a slot for?
    pub fn holds(&self, node: NodeId, task: TaskId, attempt: AttemptNo) -> bool {
        self.state().held.get(&node).and_then(|h| h.tasks.get(&task)).is_some_and(|held| held.attempt == attempt)
    }
    pub fn held(&self, node: NodeId) -> Vec<(TaskId, AttemptNo)> {
        self.state().held.get(&node).map(|h| h.tasks.iter().map(|(t, h)| (*t, h.attempt)).collect()).unwrap_or_default()
    }
    pub fn running(&self, node: NodeId) -> u32 {
        self.state().running(node)
    }
    /// Granted attempts whose node has been away longer than their callers allow. Who went away since
    /// the last call counts as away from now on, and so does everybody at the first one.
    pub fn lost(&self, now: Duration) -> Vec<(TaskId, AttemptNo)> {
        let State { links, held, away, retired, .. } = &mut *self.state();
        let is_away = |node: &NodeId| held.contains_key(node) && !links.contains_key(node) && !retired.contains(node);
        away.retain(|node, _| is_away(node));
        let mut lost = vec![];
        for (node, held) in held.iter().filter(|(node, _)| is_away(node)) {
            let gone = now.saturating_sub(*away.entry(*node).or_insert(now));
            let over = held.tasks.iter().filter(|(_, h)| h.lost_after.is_some_and(|after| gone >= after));
            lost.extend(over.map(|(task, h)| (*task, h.attempt)));
        }
        lost
    }
    /// Granted attempts of nodes that are away: nobody but these can say what became of them.
    pub fn in_doubt(&self) -> usize {
        let s = self.state();
        s.held.iter().filter(|(node, _)| !s.links.contains_key(node)).map(|(_, h)| h.tasks.len()).sum()
    }
    /// Can any node that is here take one more task; with `of`, any of those?
    pub fn room(&self, of: Option<&BTreeSet<NodeId>>) -> bool {
        let s = self.state();
        match of {
            None => s.links.values().any(|l| s.has_room(l)),
            Some(nodes) => nodes.iter().filter_map(|n| s.links.get(n)).any(|l| s.has_room(l)),
        }
    }
    pub fn share(&self, user: UserId) -> Share {
        self.state().shares.get(&user).copied().unwrap_or_default()
    }

    /// Hands a command to the node's link. A link whose queue is full is closed: what it missed is
    /// said again when the node is back.
    pub fn send(&self, node: NodeId, command: LinkCommand) -> bool {
        let (sent, generation) = match self.state().links.get(&node) {
            None => return false,
            Some(link) => (link.commands.try_send(command).is_ok(), link.generation),
        };
        if !sent {
            self.close(node, generation);
        }
        sent
    }
}

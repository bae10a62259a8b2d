//! The hub's store: the memory's, behind a writer that takes one write after the other, may be slow, may
//! fail before it has done anything, and may lose the answer to what it has done. It is also where a hub
//! dies: before a commit, or after it and before anybody hears of it.

use crate::plan::{Break, Fault, Point, Write};
use crate::world::{World, lock};
use async_trait::async_trait;
use hub_engine::ports::*;
use hub_engine::records::*;
use hub_testkit::MemoryStore;
use mesh_core::capability::Capabilities;
use mesh_core::fan::ChildEnd;
use mesh_core::output::Digests;
use mesh_core::task::{Action, AttemptNo, Event, Outcome, TaskState};
use mesh_core::{Digest, InviteId, NodeId, SessionId, TaskId, UnixMs};
use mesh_process::Tasks;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// One life of the hub's process, as far as its store must know.
pub struct Life {
    pub no: u64,
    pub dead: AtomicBool,
    /// All that this process runs.
    pub tasks: Tasks,
}

impl Life {
    pub fn dead(&self) -> bool {
        self.dead.load(Ordering::SeqCst)
    }
    /// The process is gone, in the middle of whatever it was doing.
    pub fn kill(&self, world: &World) {
        if !self.dead.swap(true, Ordering::SeqCst) {
            world.note(format_args!("hub {} is dead", self.no));
            self.tasks.token().cancel();
        }
    }
    /// Nothing goes on in a dead process.
    pub async fn alive(&self) {
        if self.dead() {
            std::future::pending::<()>().await;
        }
    }
}

#[derive(Clone)]
pub struct SimStore {
    pub disk: Arc<MemoryStore>,
    pub world: Arc<World>,
    pub life: Arc<Life>,
    /// Writes wait here for their turn.
    pub writer: Arc<tokio::sync::Mutex<()>>,
}

impl SimStore {
    async fn die_at(&self, point: Point) {
        if self.world.dies_at(point) {
            self.life.kill(&self.world);
        }
        self.life.alive().await;
    }

    async fn write<T>(&self, operation: &'static str, what: Option<Write>, commit: impl Future<Output = Stored<T>>) -> Stored<T> {
        self.life.alive().await;
        let turn = self.writer.lock().await;
        let mood = *lock(&self.world.mood);
        self.world.pause(0, mood.slow_ms.max(2)).await;
        self.life.alive().await;
        if self.world.rng(|r| r.chance(mood.fails)) {
            self.world.fault(Fault::StoreError, operation);
            return Err(StoreError::new(operation, "the simulated store fails"));
        }
        if let Some(what) = what {
            self.die_at(Point::HubBefore(what)).await;
        }
        let done = commit.await;
        drop(turn);
        if let Some(what) = what {
            self.die_at(Point::HubAfter(what)).await;
        }
        self.world.pause(0, 2).await;
        self.life.alive().await;
        if what.is_some() && self.world.rng(|r| r.chance(mood.unanswered)) {
            self.world.fault(Fault::StoreUnanswered, operation);
            return Err(StoreError::new(operation, "the simulated store does not answer"));
        }
        done
    }

    /// What is read is of the moment of the read, and its reader hears of it a little later.
    async fn read<T>(&self, operation: &'static str, read: impl Future<Output = Stored<T>>) -> Stored<T> {
        self.life.alive().await;
        let mood = *lock(&self.world.mood);
        if self.world.rng(|r| r.chance(mood.fails)) {
            self.world.fault(Fault::StoreError, operation);
            return Err(StoreError::new(operation, "the simulated store fails"));
        }
        let found = read.await;
        self.world.pause(0, 1 + mood.slow_ms / 10).await;
        self.life.alive().await;
        found
    }

    async fn committed_apply(&self, id: TaskId, event: &Event, besides: Besides, now: UnixMs) -> Stored<Applied> {
        let before = self.disk.task(id).await?;
        let applied = self.disk.apply(id, event, besides, now).await?;
        self.world.saw_apply(&self.disk, before, event, now, &applied).await;
        Ok(applied)
    }

    /// Broken on purpose: answers now, commits two seconds later.
    async fn apply_later(&self, id: TaskId, event: &Event, besides: Besides, now: UnixMs) -> Stored<Applied> {
        let Some(mut task) = self.disk.task(id).await? else { return Ok(Applied::Unknown) };
        let (progress, actions) = match task.decide(event, now) {
            Ok(decided) => decided,
            Err(refused) => return Ok(Applied::Refused(refused)),
        };
        task.progress = progress;
        let (own, event) = (self.clone(), event.clone());
        self.life.tasks.spawn_until_cancelled("late commit", async move {
            tokio::time::sleep(Duration::from_secs(2)).await;
            let _ = own.committed_apply(id, &event, besides, now).await;
        });
        Ok(Applied::Done(Box::new(task), actions))
    }
}

fn kind(event: &Event) -> Option<Write> {
    match event {
        Event::Assigned { .. } => Some(Write::Assigned),
        Event::Started { .. } => Some(Write::Started),
        Event::Ended { .. } | Event::NodeRevoked { .. } | Event::NodeSilent { .. } => Some(Write::Ended),
        Event::CancelRequested { .. } | Event::DeadlinePassed => Some(Write::CancelRequested),
        Event::Granted { .. } | Event::Withdrawn { .. } | Event::Expired { .. } | Event::Restored | Event::ChildrenEnded { .. } => None,
    }
}

#[async_trait]
impl Journal for SimStore {
    async fn accept(&self, task: &Task) -> Stored<()> {
        let commit = async {
            self.disk.accept(task).await?;
            self.world.saw_accept(task);
            Ok(())
        };
        if self.world.is(Break::AcceptBeforeCommit) {
            let (own, task) = (self.clone(), task.clone());
            self.life.tasks.spawn_until_cancelled("late commit", async move {
                tokio::time::sleep(Duration::from_secs(2)).await;
                if own.disk.accept(&task).await.is_ok() {
                    own.world.saw_accept(&task);
                }
            });
            return Ok(());
        }
        self.write("journal.accept", Some(Write::Accept), commit).await
    }

    async fn apply(&self, id: TaskId, event: &Event, besides: Besides, now: UnixMs) -> Stored<Applied> {
        let early = match event {
            Event::Assigned { .. } => self.world.is(Break::OrderBeforeCommit),
            Event::Ended { .. } => self.world.is(Break::AckResultBeforeCommit),
            _ => false,
        };
        if early {
            self.life.alive().await;
            return self.apply_later(id, event, besides, now).await;
        }
        let applied = self.write("journal.apply", kind(event), self.committed_apply(id, event, besides, now)).await?;
        Ok(match applied {
            Applied::Done(task, mut actions) if self.world.is(Break::LoseRelease) => {
                for action in &mut actions {
                    if let Action::Release { node } = action {
                        *node = NodeId::from_bytes([0xEE; 16]);
                    }
                }
                Applied::Done(task, actions)
            }
            other => other,
        })
    }

    async fn task(&self, id: TaskId) -> Stored<Option<Task>> {
        self.read("journal.task", self.disk.task(id)).await
    }
    async fn narrow(&self, id: TaskId) -> Stored<Option<Task>> {
        self.read("journal.narrow", self.disk.narrow(id)).await
    }
    async fn tasks(&self, filter: &TaskFilter, window: Window<TaskId>) -> Stored<Vec<Task>> {
        self.read("journal.tasks", self.disk.tasks(filter, window)).await
    }
    async fn specs(&self, ids: &[TaskId], max_bytes: usize) -> Stored<Vec<(TaskId, Vec<u8>)>> {
        self.read("journal.specs", self.disk.specs(ids, max_bytes)).await
    }
    async fn open_tasks(&self, session: Option<SessionId>, after: Option<TaskId>, limit: u32) -> Stored<Vec<Task>> {
        self.read("journal.open_tasks", self.disk.open_tasks(session, after, limit)).await
    }
    async fn history(&self, id: TaskId) -> Stored<Vec<TaskEvent>> {
        self.read("journal.history", self.disk.history(id)).await
    }
    async fn accept_fan(&self, fan: &Fan) -> Stored<()> {
        self.write("journal.accept", Some(Write::Accept), self.disk.accept_fan(fan)).await
    }
    async fn ends_of(&self, parent: TaskId) -> Stored<Option<Vec<ChildEnd>>> {
        self.read("journal.ends_of", self.disk.ends_of(parent)).await
    }
}

#[async_trait]
impl Idempotency for SimStore {
    async fn create(&self, thing: Creation, once: &Once) -> Stored<Option<Known>> {
        let commit = async {
            let task = if let Creation::Task(t) = &thing { Some(t.clone()) } else { None };
            let known = self.disk.create(thing, once).await?;
            if let (Some(task), None) = (task, &known) {
                self.world.saw_accept(&task);
            }
            Ok(known)
        };
        self.write("idempotency.create", Some(Write::Accept), commit).await
    }
    async fn known(&self, scope: &Digest, since: UnixMs) -> Stored<Option<Known>> {
        self.read("idempotency.known", self.disk.known(scope, since)).await
    }
    async fn forget(&self, until: UnixMs, limit: u32) -> Stored<u64> {
        self.write("idempotency.forget", None, self.disk.forget(until, limit)).await
    }
}

#[async_trait]
impl Output for SimStore {
    async fn append(&self, task: TaskId, no: AttemptNo, frames: Vec<OutputFrame>, keep_bytes: u64) -> Stored<Option<OutputTotals>> {
        if self.world.is(Break::AckOutputBeforeCommit) {
            let mut totals = self.disk.totals(task, no).await?;
            totals.durable_seq = totals.durable_seq.max(frames.last().map_or(0, |f| f.seq));
            let own = self.clone();
            self.life.tasks.spawn_until_cancelled("late commit", async move {
                tokio::time::sleep(Duration::from_secs(2)).await;
                let _ = own.disk.append(task, no, frames, keep_bytes).await;
            });
            return Ok(Some(totals));
        }
        self.write("output.append", Some(Write::Output), self.disk.append(task, no, frames, keep_bytes)).await
    }
    async fn totals(&self, task: TaskId, no: AttemptNo) -> Stored<OutputTotals> {
        self.read("output.totals", self.disk.totals(task, no)).await
    }
    async fn digests(&self, task: TaskId, no: AttemptNo) -> Stored<Option<Digests>> {
        SimStore::read(self, "output.digests", self.disk.digests(task, no)).await
    }
    async fn give_up(&self, task: TaskId, no: AttemptNo, to_seq: u64) -> Stored<()> {
        self.write("output.give_up", None, self.disk.give_up(task, no, to_seq)).await
    }
    async fn read(&self, task: TaskId, no: AttemptNo, after_seq: u64, max_bytes: usize) -> Stored<Vec<OutputFrame>> {
        SimStore::read(self, "output.read", self.disk.read(task, no, after_seq, max_bytes)).await
    }
    async fn tail(&self, task: TaskId, no: AttemptNo, stream: Stream, max_bytes: usize) -> Stored<Vec<u8>> {
        SimStore::read(self, "output.tail", self.disk.tail(task, no, stream, max_bytes)).await
    }
}

#[async_trait]
impl NodeDirectory for SimStore {
    async fn add_invite(&self, invite: &Invite) -> Stored<()> {
        self.disk.add_invite(invite).await
    }
    async fn invite(&self, id: InviteId) -> Stored<Option<Invite>> {
        self.disk.invite(id).await
    }
    async fn invites(&self, within: Option<&Within>, window: Window<InviteId>) -> Stored<Vec<Invite>> {
        self.disk.invites(within, window).await
    }
    async fn revoke_invite(&self, id: InviteId, now: UnixMs) -> Stored<bool> {
        self.disk.revoke_invite(id, now).await
    }
    async fn claim_invite(&self, id: InviteId, node: &Node, now: UnixMs, again_ms: i64) -> Stored<Claim> {
        self.disk.claim_invite(id, node, now, again_ms).await
    }
    async fn node(&self, id: NodeId) -> Stored<Option<Node>> {
        SimStore::read(self, "nodes.node", self.disk.node(id)).await
    }
    async fn nodes(&self, within: Option<&Within>, window: Window<NodeId>) -> Stored<Vec<Node>> {
        SimStore::read(self, "nodes.nodes", self.disk.nodes(within, window)).await
    }
    async fn nodes_named(&self, name: &str) -> Stored<Vec<Node>> {
        SimStore::read(self, "nodes.nodes_named", self.disk.nodes_named(name)).await
    }
    async fn count_nodes(&self) -> Stored<NodeCounts> {
        self.disk.count_nodes().await
    }
    async fn register(&self, id: NodeId, version: &str, capabilities: &Capabilities) -> Stored<()> {
        self.write("nodes.register", None, self.disk.register(id, version, capabilities)).await
    }
    async fn raise_generation(&self, id: NodeId, now: UnixMs) -> Stored<Option<u64>> {
        self.write("nodes.raise_generation", Some(Write::Hello), self.disk.raise_generation(id, now)).await
    }
    async fn seen(&self, ids: &[NodeId], now: UnixMs) -> Stored<()> {
        self.write("nodes.seen", None, self.disk.seen(ids, now)).await
    }
    async fn note_bundle(&self, id: NodeId, seq: u64) -> Stored<()> {
        self.write("nodes.note_bundle", None, self.disk.note_bundle(id, seq)).await
    }
    async fn renew(&self, id: NodeId, certificate: &NodeCertificate) -> Stored<bool> {
        self.write("nodes.renew", None, self.disk.renew(id, certificate)).await
    }
    async fn change_node(&self, id: NodeId, change: &NodeChange) -> Stored<Option<Node>> {
        self.write("nodes.change_node", None, self.disk.change_node(id, change)).await
    }
    async fn revoke_node(&self, id: NodeId, now: UnixMs) -> Stored<Option<Node>> {
        self.write("nodes.revoke_node", Some(Write::Revoke), self.disk.revoke_node(id, now)).await
    }
    async fn remove_node(&self, id: NodeId, now: UnixMs) -> Stored<bool> {
        self.write("nodes.remove_node", None, self.disk.remove_node(id, now)).await
    }
    async fn was_removed(&self, id: NodeId) -> Stored<bool> {
        SimStore::read(self, "nodes.was_removed", self.disk.was_removed(id)).await
    }
    async fn living(&self, ids: &[NodeId]) -> Stored<Vec<NodeId>> {
        SimStore::read(self, "nodes.living", self.disk.living(ids)).await
    }
    async fn changed_since(&self, epoch: u64) -> Stored<RegistryChanges> {
        SimStore::read(self, "nodes.changed_since", self.disk.changed_since(epoch)).await
    }
    async fn add_notice(&self, id: NodeId, notice: &str, epoch: i64) -> Stored<()> {
        self.write("nodes.add_notice", None, self.disk.add_notice(id, notice, epoch)).await
    }
    async fn registry_epoch(&self) -> Stored<u64> {
        SimStore::read(self, "nodes.registry_epoch", self.disk.registry_epoch()).await
    }
}

/// What a dead hub of another version leaves: an attempt that was assigned ahead and never granted.
pub async fn leave_ungranted(world: &World, disk: &MemoryStore, task: &Task, node: NodeId, incarnation: u32, now: UnixMs) {
    let attempt = task.progress.attempt.as_ref().map_or(AttemptNo::first(incarnation), |a| a.no.next(incarnation));
    let event = Event::Assigned { attempt, node, granted: None };
    if let Ok(applied) = disk.apply(task.id, &event, Besides::default(), now).await {
        world.fault(Fault::UngrantedAttempt, task.id);
        world.saw_apply(disk, Some(task.clone()), &event, now, &applied).await;
    }
}

/// Broken on purpose: what a silent node may be running is given to another.
pub async fn requeue_on_clock(pool: &hub_engine::pool::Pool, task: &Task) {
    let Some(a) = task.progress.attempt.as_ref().filter(|_| task.progress.state == TaskState::Assigned) else { return };
    let event = Event::Ended { attempt: a.no, outcome: Outcome::NeverStarted(mesh_core::task::NeverStarted::Late) };
    if let Ok(Applied::Done(task, actions)) = pool.apply(task.id, &event, Besides::default()).await {
        pool.perform(&task, &actions);
    }
}

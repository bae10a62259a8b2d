//! The ports in memory: one mutex, ordered maps, no waiting. The same calls give the same answers.

mod agents;
mod audit;
mod content;
mod grants;
mod users;

use async_trait::async_trait;
use hub_engine::ports::*;
use hub_engine::records::*;
use mesh_core::capability::Capabilities;
use mesh_core::fan::ChildEnd;
use mesh_core::output::{Digests, Hashing};
use mesh_core::permission::Role;
use mesh_core::spec::INLINE_SPEC_BYTES;
use mesh_core::task::{Action, AttemptNo, Event};
use mesh_core::*;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};

const MAX_NOTICES: usize = 20;

#[derive(Debug, Default)]
pub struct MemoryStore(Mutex<State>);

#[derive(Debug, Default, Clone)]
struct State {
    hub: Option<HubMeta>,
    restored: Option<Restored>,
    tasks: BTreeMap<TaskId, (Task, Vec<TaskEvent>)>,
    outputs: BTreeMap<(TaskId, AttemptNo), (OutputTotals, Vec<OutputFrame>)>,
    digests: BTreeMap<(TaskId, AttemptNo), Digests>,
    /// Tasks whose output was erased.
    erased: BTreeSet<TaskId>,
    invites: BTreeMap<InviteId, Invite>,
    nodes: BTreeMap<NodeId, Node>,
    /// With the epoch of the removal.
    removed: BTreeMap<NodeId, u64>,
    registry_epoch: u64,
    users: BTreeMap<UserId, User>,
    disabled: BTreeSet<UserId>,
    user_invites: BTreeMap<UserId, UserInvite>,
    /// With whether they have left.
    removed_users: BTreeMap<UserId, (UserEntry, Leaving, bool)>,
    user_epochs: BTreeMap<UserId, u64>,
    refresh: BTreeMap<Digest, Refresh>,
    devices: BTreeMap<DeviceId, Device>,
    keys: BTreeMap<ApiKeyId, ApiKey>,
    sessions: BTreeMap<SessionId, Session>,
    output_erased: BTreeSet<TaskId>,
    /// Sessions whose erasure is under way.
    purging: BTreeSet<SessionId>,
    /// Oldest first.
    activity: BTreeMap<SessionId, VecDeque<Activity>>,
    memory: BTreeMap<(SessionId, String), MemoryEntry>,
    messages: BTreeMap<MessageId, Message>,
    state: BTreeMap<(String, String), StateEntry>,
    made: BTreeMap<Digest, (Known, UnixMs)>,
    grants: BTreeMap<GrantId, Grant>,
    agents: BTreeMap<AgentId, (Agent, agents::Log)>,
    audit: audit::Rows,
}

#[derive(Debug, Clone)]
struct Refresh {
    token: RefreshToken,
    used: bool,
    ended: bool,
}

impl MemoryStore {
    pub fn new() -> Self {
        Self::default()
    }
    /// With developers of the first ids of the samples: nothing begins for who is not there.
    pub fn peopled() -> Self {
        let store = Self::default();
        let people = (1..=9).map(|n| crate::contract::sample::user(n, &format!("u{n}")));
        store.state().users.extend(people.map(|u| (u.id, u)));
        store
    }
    /// As it is now, apart from what comes: a back-up.
    pub fn copy(&self) -> Self {
        Self(Mutex::new(self.state().clone()))
    }
    /// As another hub would.
    pub fn set_role(&self, id: UserId, role: mesh_core::permission::Role) {
        if let Some(user) = self.state().users.get_mut(&id) {
            user.role = role;
        }
    }
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The page of `window`, newest first, of what `shown` lets through.
fn page<I: Ord + Copy, T: Clone>(map: &BTreeMap<I, T>, window: Window<I>, shown: impl Fn(&T) -> bool) -> Vec<T> {
    let older = map.iter().rev().filter(|(id, _)| window.before.is_none_or(|before| **id < before));
    older.map(|(_, item)| item).filter(|item| shown(item)).take(window.limit as usize).cloned().collect()
}

fn narrow(mut task: Task) -> Task {
    if task.spec.len() > INLINE_SPEC_BYTES {
        task.spec = vec![];
    }
    task
}

fn add<I: Ord, T>(map: &mut BTreeMap<I, T>, operation: &'static str, id: I, item: T) -> Stored<()> {
    if map.contains_key(&id) {
        return Err(StoreError::new(operation, "there is one with this id"));
    }
    map.insert(id, item);
    Ok(())
}

impl State {
    /// A task as it is read: with the totals of its newest attempt.
    fn shown(&self, task: &Task) -> Task {
        let no = task.progress.attempt.as_ref().map(|a| a.no);
        let output = no.and_then(|no| self.outputs.get(&(task.id, no))).map(|o| o.0).unwrap_or_default();
        let digests = no.and_then(|no| self.digests.get(&(task.id, no))).copied();
        let children = task.is_parent().then(|| Children::of(self.children(task.id)));
        Task { output, digests, children, ..task.clone() }
    }
    fn children(&self, parent: TaskId) -> impl Iterator<Item = &Task> {
        self.tasks.values().map(|(t, _)| t).filter(move |t| t.parent == Some(parent))
    }
    fn add_fan(&mut self, operation: &'static str, fan: &Fan) -> Stored<()> {
        if fan.tasks().any(|t| self.tasks.contains_key(&t.id)) {
            return Err(StoreError::new(operation, "there is one with this id"));
        }
        self.tasks.extend(fan.tasks().map(|t| (t.id, (t.clone(), TaskEvent::first(t)))));
        Ok(())
    }
    fn raise_epoch(&mut self) -> u64 {
        self.registry_epoch += 1;
        self.registry_epoch
    }
    /// Log-ins with a token that can still be used.
    fn living(&self, now: UnixMs) -> BTreeSet<LoginId> {
        self.refresh.values().filter(|r| !r.used && !r.ended && r.token.expires_at > now).map(|r| r.token.login).collect()
    }
    fn end_login(&mut self, login: LoginId) {
        self.refresh.values_mut().filter(|r| r.token.login == login).for_each(|r| r.ended = true);
    }
}

#[async_trait]
impl Journal for MemoryStore {
    async fn accept(&self, task: &Task) -> Stored<()> {
        let history = TaskEvent::first(task);
        add(&mut self.state().tasks, "journal.accept", task.id, (task.clone(), history))
    }

    async fn accept_fan(&self, fan: &Fan) -> Stored<()> {
        self.state().add_fan("journal.accept", fan)
    }

    async fn apply(&self, id: TaskId, event: &Event, besides: Besides, now: UnixMs) -> Stored<Applied> {
        let mut state = self.state();
        let Some((task, history)) = state.tasks.get_mut(&id) else { return Ok(Applied::Unknown) };
        let (progress, actions) = match task.decide(event, now) {
            Ok(decided) => decided,
            Err(refused) => return Ok(Applied::Refused(refused)),
        };
        if matches!(event, Event::Assigned { .. }) {
            // Of the attempt before.
            (task.result, task.sandbox_applied) = (None, None);
        }
        task.progress = progress;
        task.result = besides.result.or(task.result.take());
        task.sandbox_applied = besides.sandbox_applied.or(task.sandbox_applied.take());
        task.signed = besides.signed.or(task.signed.take());
        history.push(TaskEvent::of(history.len() as u64 + 1, now, event, task));
        let task = task.clone();
        if let (Some(digests), Some(no)) = (besides.digests, event.attempt()) {
            state.digests.insert((id, no), digests);
        }
        let ordered = actions.iter().any(|a| matches!(a, Action::Order { .. }));
        let shown = state.shown(&task);
        Ok(Applied::Done(Box::new(if ordered { shown } else { narrow(shown) }), actions))
    }

    async fn task(&self, id: TaskId) -> Stored<Option<Task>> {
        let state = self.state();
        Ok(state.tasks.get(&id).map(|(task, _)| state.shown(task)))
    }

    async fn narrow(&self, id: TaskId) -> Stored<Option<Task>> {
        Ok(self.task(id).await?.map(narrow))
    }

    async fn tasks(&self, filter: &TaskFilter, window: Window<TaskId>) -> Stored<Vec<Task>> {
        let state = self.state();
        let f = filter;
        let shown = |(t, _): &(Task, Vec<TaskEvent>)| {
            let node = t.progress.attempt.as_ref().map(|a| a.node).or(t.named_node);
            f.within.as_ref().is_none_or(|w| w.has_task(t))
                && f.session.is_none_or(|s| t.session == Some(s))
                && f.node.is_none_or(|n| node == Some(n))
                && f.user.is_none_or(|u| t.actor.user == u)
                && f.state.is_none_or(|s| t.progress.state == s)
                && f.skill.as_ref().is_none_or(|s| t.skill == *s)
                && f.parent.is_none_or(|p| t.parent == Some(p))
                && f.since.is_none_or(|s| t.created_at >= s)
                && f.until.is_none_or(|u| t.created_at < u)
        };
        Ok(page(&state.tasks, window, shown).iter().map(|(t, _)| narrow(state.shown(t))).collect())
    }

    async fn specs(&self, ids: &[TaskId], max_bytes: usize) -> Stored<Vec<(TaskId, Vec<u8>)>> {
        let state = self.state();
        let mut taken = vec![];
        let mut sum = 0usize;
        for (id, spec) in ids.iter().filter_map(|id| Some((*id, &state.tasks.get(id)?.0.spec))) {
            sum = sum.saturating_add(spec.len());
            if sum > max_bytes && !taken.is_empty() {
                break;
            }
            taken.push((id, spec.clone()));
        }
        Ok(taken)
    }

    async fn open_tasks(&self, session: Option<SessionId>, after: Option<TaskId>, limit: u32) -> Stored<Vec<Task>> {
        let state = self.state();
        let open = state.tasks.values().map(|(t, _)| t).filter(|t| !t.progress.state.is_final());
        let asked = open.filter(|t| after.is_none_or(|id| t.id > id) && session.is_none_or(|id| t.session == Some(id)));
        Ok(asked.take(limit as usize).map(|t| narrow(state.shown(t))).collect())
    }

    async fn history(&self, id: TaskId) -> Stored<Vec<TaskEvent>> {
        Ok(self.state().tasks.get(&id).map(|(_, history)| history.clone()).unwrap_or_default())
    }

    async fn ends_of(&self, parent: TaskId) -> Stored<Option<Vec<ChildEnd>>> {
        let state = self.state();
        let end = |t: &Task| {
            let p = t.progress.clone();
            let at = p.finished_at?;
            Some(ChildEnd { id: t.id, at, state: p.state, reason: p.reason, exit_code: p.exit_code, signal: p.signal })
        };
        Ok(state.children(parent).map(end).collect())
    }
}

#[async_trait]
impl Idempotency for MemoryStore {
    async fn create(&self, thing: Creation, once: &Once) -> Stored<Option<Known>> {
        let mut state = self.state();
        let known = state.made.get(&once.scope).filter(|(_, at)| *at > once.since);
        if let Some((known, _)) = known {
            return Ok(Some(known.clone()));
        }
        let id = thing.id();
        match thing {
            Creation::Task(t) => {
                let history = TaskEvent::first(&t);
                add(&mut state.tasks, "idempotency.create", t.id, (*t, history))
            }
            Creation::Fan(f) => state.add_fan("idempotency.create", &f),
            Creation::Session(s) => add(&mut state.sessions, "idempotency.create", s.id, s),
            Creation::Invite(i) => add(&mut state.invites, "idempotency.create", i.id, i),
            Creation::User(u, invite) => {
                if state.named(&u.username).is_some() {
                    return Err(StoreError::new("idempotency.create", "the user name is taken"));
                }
                state.user_invites.extend(invite.map(|i| (u.id, i)));
                add(&mut state.users, "idempotency.create", u.id, u)
            }
            Creation::Agent(a) => match state.add_agent(&a) {
                Spawned::Done => Ok(()),
                Spawned::NameTaken | Spawned::Foreign => Err(StoreError::new("idempotency.create", "the name of the agent is taken")),
            },
            Creation::Key(k) => add(&mut state.keys, "idempotency.create", k.id, k),
            Creation::Grant(g) => state.add_grant(&g),
        }?;
        state.made.insert(once.scope, (Known { request: once.request, thing: id }, once.at));
        Ok(None)
    }
    async fn known(&self, scope: &Digest, since: UnixMs) -> Stored<Option<Known>> {
        Ok(self.state().made.get(scope).filter(|(_, at)| *at > since).map(|(known, _)| known.clone()))
    }
    async fn forget(&self, until: UnixMs, limit: u32) -> Stored<u64> {
        let mut state = self.state();
        let old: Vec<Digest> =
            state.made.iter().filter(|(_, (_, at))| *at <= until).map(|(scope, _)| *scope).take(limit as usize).collect();
        old.iter().for_each(|scope| drop(state.made.remove(scope)));
        Ok(old.len() as u64)
    }
}

#[async_trait]
impl Output for MemoryStore {
    async fn append(&self, task: TaskId, no: AttemptNo, frames: Vec<OutputFrame>, keep_bytes: u64) -> Stored<Option<OutputTotals>> {
        let mut state = self.state();
        let (mut totals, mut kept) = state.outputs.get(&(task, no)).cloned().unwrap_or_default();
        for frame in frames {
            if frame.seq <= totals.durable_seq {
                continue;
            }
            if frame.seq != totals.durable_seq + 1 {
                return Ok(None);
            }
            let size = frame.data.len() as u64;
            totals.truncated |= state.erased.contains(&task);
            totals.truncated |= totals.stdout_bytes + totals.stderr_bytes + size > keep_bytes;
            totals.durable_seq = frame.seq;
            match frame.stream {
                Stream::Stdout => totals.stdout_bytes += size,
                Stream::Stderr => totals.stderr_bytes += size,
            }
            if !totals.truncated {
                totals.kept_seq = frame.seq;
                kept.push(frame);
            }
        }
        state.outputs.insert((task, no), (totals, kept));
        Ok(Some(totals))
    }

    async fn give_up(&self, task: TaskId, no: AttemptNo, to_seq: u64) -> Stored<()> {
        let mut state = self.state();
        let (totals, _) = state.outputs.entry((task, no)).or_default();
        if to_seq > totals.durable_seq {
            (totals.durable_seq, totals.truncated) = (to_seq, true);
        }
        Ok(())
    }

    async fn totals(&self, task: TaskId, no: AttemptNo) -> Stored<OutputTotals> {
        Ok(self.state().outputs.get(&(task, no)).map(|o| o.0).unwrap_or_default())
    }

    async fn digests(&self, task: TaskId, no: AttemptNo) -> Stored<Option<Digests>> {
        let state = self.state();
        let Some((totals, kept)) = state.outputs.get(&(task, no)) else { return Ok(Some(Digests::of_nothing())) };
        let mut hashing = Hashing::default();
        for frame in kept {
            match frame.stream {
                Stream::Stdout => hashing.stdout(&frame.data),
                Stream::Stderr => hashing.stderr(&frame.data),
            }
        }
        Ok((!totals.truncated).then(|| hashing.digests()))
    }

    async fn read(&self, task: TaskId, no: AttemptNo, after_seq: u64, max_bytes: usize) -> Stored<Vec<OutputFrame>> {
        let state = self.state();
        let mut window: Vec<OutputFrame> = vec![];
        let mut bytes = 0;
        for frame in state.outputs.get(&(task, no)).iter().flat_map(|o| &o.1).filter(|f| f.seq > after_seq) {
            bytes += frame.data.len();
            if !window.is_empty() && bytes > max_bytes {
                break;
            }
            window.push(frame.clone());
        }
        Ok(window)
    }

    async fn tail(&self, task: TaskId, no: AttemptNo, stream: Stream, max_bytes: usize) -> Stored<Vec<u8>> {
        let state = self.state();
        let frames = state.outputs.get(&(task, no)).into_iter().flat_map(|o| &o.1).filter(|f| f.stream == stream);
        let mut all: Vec<u8> = frames.flat_map(|f| f.data.to_vec()).collect();
        Ok(all.split_off(all.len().saturating_sub(max_bytes)))
    }
}

#[async_trait]
impl NodeDirectory for MemoryStore {
    async fn add_invite(&self, invite: &Invite) -> Stored<()> {
        add(&mut self.state().invites, "nodes.add_invite", invite.id, invite.clone())
    }
    async fn invite(&self, id: InviteId) -> Stored<Option<Invite>> {
        Ok(self.state().invites.get(&id).cloned())
    }
    async fn invites(&self, within: Option<&Within>, window: Window<InviteId>) -> Stored<Vec<Invite>> {
        Ok(page(&self.state().invites, window, |i| within.is_none_or(|w| w.has_invite(i))))
    }
    async fn revoke_invite(&self, id: InviteId, now: UnixMs) -> Stored<bool> {
        let mut state = self.state();
        let Some(invite) = state.invites.get_mut(&id).filter(|i| i.used.is_none()) else { return Ok(false) };
        invite.revoked_at.get_or_insert(now);
        Ok(true)
    }
    async fn claim_invite(&self, id: InviteId, node: &Node, now: UnixMs, again_ms: i64) -> Stored<Claim> {
        let mut state = self.state();
        let State { invites, nodes, .. } = &mut *state;
        let Some(invite) = invites.get_mut(&id) else { return Ok(Claim::Unknown) };
        let spki = node.certificate.spki;
        let Some(used) = &invite.used else {
            if invite.revoked_at.is_some() {
                return Ok(Claim::Revoked);
            }
            if invite.expires_at <= now {
                return Ok(Claim::Expired);
            }
            add(nodes, "nodes.claim_invite", node.id, node.clone())?;
            invite.used = Some(InviteUse { at: now, spki, node: node.id });
            return Ok(Claim::Claimed);
        };
        let same = used.spki == spki;
        if same && now.saturating_sub(used.at) <= again_ms {
            return Ok(nodes.get(&used.node).map_or(Claim::Removed, |node| Claim::Again { node: Box::new(node.clone()) }));
        }
        if invite.notices.len() < MAX_NOTICES {
            let who = if same { "the same key, too late," } else { "another key" };
            invite.notices.push(format!("used again by {who} at {now}"));
        }
        Ok(Claim::Used)
    }

    async fn node(&self, id: NodeId) -> Stored<Option<Node>> {
        Ok(self.state().nodes.get(&id).cloned())
    }
    async fn nodes(&self, within: Option<&Within>, window: Window<NodeId>) -> Stored<Vec<Node>> {
        Ok(page(&self.state().nodes, window, |n| within.is_none_or(|w| w.has_node(n))))
    }
    async fn count_nodes(&self) -> Stored<NodeCounts> {
        let s = self.state();
        let revoked = s.nodes.values().filter(|n| n.revoked_at.is_some()).count();
        Ok(NodeCounts { known: s.nodes.len() as u64, revoked: revoked as u64 })
    }
    async fn nodes_named(&self, name: &str) -> Stored<Vec<Node>> {
        Ok(self.state().nodes.values().rev().filter(|n| n.name == name).cloned().collect())
    }
    async fn register(&self, id: NodeId, version: &str, capabilities: &Capabilities) -> Stored<()> {
        if let Some(node) = self.state().nodes.get_mut(&id) {
            node.version = version.to_owned();
            node.capabilities = capabilities.clone();
        }
        Ok(())
    }
    async fn note_bundle(&self, id: NodeId, seq: u64) -> Stored<()> {
        if let Some(node) = self.state().nodes.get_mut(&id) {
            node.bundle_seq = node.bundle_seq.max(seq);
        }
        Ok(())
    }
    async fn add_notice(&self, id: NodeId, words: &str, now: UnixMs) -> Stored<()> {
        if let Some(node) = self.state().nodes.get_mut(&id).filter(|n| n.notices.len() < MAX_NOTICES) {
            node.notices.push(format!("{words} at {now}"));
        }
        Ok(())
    }
    async fn raise_generation(&self, id: NodeId, now: UnixMs) -> Stored<Option<u64>> {
        let mut state = self.state();
        let Some(node) = state.nodes.get_mut(&id).filter(|n| n.revoked_at.is_none()) else { return Ok(None) };
        node.generation += 1;
        node.last_seen_at = Some(now);
        Ok(Some(node.generation))
    }
    async fn seen(&self, ids: &[NodeId], now: UnixMs) -> Stored<()> {
        let mut state = self.state();
        for id in ids {
            if let Some(node) = state.nodes.get_mut(id) {
                node.last_seen_at = Some(now);
            }
        }
        Ok(())
    }
    async fn renew(&self, id: NodeId, certificate: &NodeCertificate) -> Stored<bool> {
        let mut state = self.state();
        let node = state.nodes.get_mut(&id).filter(|n| n.revoked_at.is_none() && n.certificate.counter + 1 == certificate.counter);
        Ok(node.map(|n| n.certificate = certificate.clone()).is_some())
    }

    async fn change_node(&self, id: NodeId, change: &NodeChange) -> Stored<Option<Node>> {
        let mut state = self.state();
        let epoch = state.raise_epoch();
        let Some(node) = state.nodes.get_mut(&id).filter(|n| n.revoked_at.is_none()) else { return Ok(None) };
        let c = change.clone();
        node.name = c.name.unwrap_or_else(|| node.name.clone());
        node.labels = c.labels.unwrap_or_else(|| node.labels.clone());
        node.slots = c.slots.unwrap_or_else(|| node.slots.clone());
        node.task_limit = c.task_limit.unwrap_or(node.task_limit);
        node.draining = c.draining.unwrap_or(node.draining);
        node.epoch = epoch;
        Ok(Some(node.clone()))
    }
    async fn revoke_node(&self, id: NodeId, now: UnixMs) -> Stored<Option<Node>> {
        let mut state = self.state();
        let epoch = state.raise_epoch();
        let Some(node) = state.nodes.get_mut(&id) else { return Ok(None) };
        node.revoked_at.get_or_insert(now);
        node.epoch = epoch;
        Ok(Some(node.clone()))
    }
    async fn remove_node(&self, id: NodeId, _now: UnixMs) -> Stored<bool> {
        let mut state = self.state();
        let epoch = state.raise_epoch();
        if state.nodes.remove(&id).is_none() {
            return Ok(false);
        }
        state.sessions.values_mut().for_each(|s| s.nodes.retain(|n| *n != id));
        state.grants.retain(|_, g| g.resource != Resource::Node(id));
        state.removed.insert(id, epoch);
        Ok(true)
    }
    async fn was_removed(&self, id: NodeId) -> Stored<bool> {
        Ok(self.state().removed.contains_key(&id))
    }
    async fn living(&self, ids: &[NodeId]) -> Stored<Vec<NodeId>> {
        let state = self.state();
        let lives = |id: &NodeId| state.nodes.get(id).is_some_and(|n| n.revoked_at.is_none());
        Ok(ids.iter().copied().filter(lives).collect())
    }
    async fn changed_since(&self, epoch: u64) -> Stored<RegistryChanges> {
        let state = self.state();
        Ok(RegistryChanges {
            epoch: state.registry_epoch,
            nodes: state.nodes.values().filter(|n| n.epoch > epoch).cloned().collect(),
            removed: state.removed.iter().filter(|(_, e)| **e > epoch).map(|(id, _)| *id).collect(),
            users: state.user_epochs.iter().filter(|(_, e)| **e > epoch).map(|(id, _)| *id).collect(),
        })
    }
    async fn registry_epoch(&self) -> Stored<u64> {
        Ok(self.state().registry_epoch)
    }
}

#[async_trait]
impl Accounts for MemoryStore {
    async fn add_user(&self, user: &User) -> Stored<bool> {
        let mut state = self.state();
        if state.named(&user.username).is_some() {
            return Ok(false);
        }
        add(&mut state.users, "accounts.add_user", user.id, user.clone()).map(|()| true)
    }
    async fn user(&self, id: UserId) -> Stored<Option<User>> {
        let state = self.state();
        Ok(state.users.get(&id).filter(|u| state.may_act(u)).cloned())
    }
    async fn user_named(&self, username: &str) -> Stored<Option<User>> {
        let state = self.state();
        Ok(state.named(username).filter(|u| state.may_act(u)).cloned())
    }
    async fn oldest_admin(&self) -> Stored<Option<User>> {
        let state = self.state();
        Ok(state.users.values().find(|u| u.role == Role::Admin && state.may_act(u)).cloned())
    }
    async fn count_users(&self) -> Stored<u64> {
        Ok(self.state().users.len() as u64)
    }
    async fn set_password(&self, id: UserId, was: &str, hash: &str, keep: Option<LoginId>) -> Stored<bool> {
        let mut state = self.state();
        let Some(user) = state.users.get_mut(&id).filter(|u| u.password_hash == was) else { return Ok(false) };
        user.password_hash = hash.to_owned();
        let others = state.refresh.values_mut().filter(|r| r.token.user == id && Some(r.token.login) != keep);
        others.for_each(|r| r.ended = true);
        Ok(true)
    }

    async fn add_login(&self, device: &Device, token: &RefreshToken) -> Stored<()> {
        let mut state = self.state();
        let (user, now) = (device.user, device.last_seen_at);
        let living = state.living(now);
        state.refresh.retain(|_, r| r.token.user != user || living.contains(&r.token.login));
        state.devices.retain(|id, d| d.user != user || living.contains(&LoginId::from(*id)));
        add(&mut state.devices, "accounts.add_login", device.id, device.clone())?;
        let new = Refresh { token: token.clone(), used: false, ended: false };
        add(&mut state.refresh, "accounts.add_login", token.mac, new)
    }
    async fn rotate_refresh(&self, old: &Digest, new_mac: &Digest, new_expires_at: UnixMs, now: UnixMs) -> Stored<Rotation> {
        let mut state = self.state();
        let Some(found) = state.refresh.get(old).filter(|r| !r.ended) else { return Ok(Rotation::Unknown) };
        let (user, login) = (found.token.user, found.token.login);
        if found.used {
            state.end_login(login);
            return Ok(Rotation::Reused { user, login });
        }
        if found.token.expires_at <= now {
            return Ok(Rotation::Unknown);
        }
        let token = RefreshToken { mac: *new_mac, login, user, expires_at: new_expires_at };
        add(&mut state.refresh, "accounts.rotate_refresh", *new_mac, Refresh { token, used: false, ended: false })?;
        state.refresh.entry(*old).and_modify(|r| r.used = true);
        Ok(Rotation::Rotated { user, login })
    }
    async fn refresh_of(&self, mac: &Digest) -> Stored<Option<(UserId, LoginId)>> {
        Ok(self.state().refresh.get(mac).map(|r| (r.token.user, r.token.login)))
    }
    async fn end_login(&self, login: LoginId) -> Stored<()> {
        self.state().end_login(login);
        Ok(())
    }
    async fn device(&self, id: DeviceId, now: UnixMs) -> Stored<Option<Device>> {
        let state = self.state();
        Ok(state.devices.get(&id).filter(|_| state.living(now).contains(&id.into())).cloned())
    }
    async fn devices(&self, user: UserId, now: UnixMs, window: Window<DeviceId>) -> Stored<Vec<Device>> {
        let state = self.state();
        let living = state.living(now);
        Ok(page(&state.devices, window, |d| d.user == user && living.contains(&d.id.into())))
    }
    async fn change_device(&self, id: DeviceId, change: &DeviceChange) -> Stored<()> {
        if let Some(device) = self.state().devices.get_mut(&id) {
            device.name = change.name.clone().unwrap_or_else(|| device.name.clone());
            device.trusted = change.trusted.or(device.trusted);
        }
        Ok(())
    }
    async fn device_seen(&self, id: DeviceId, address: Option<IpAddr>, now: UnixMs) -> Stored<()> {
        if let Some(device) = self.state().devices.get_mut(&id) {
            (device.address, device.last_seen_at) = (address, now);
        }
        Ok(())
    }

    async fn add_key(&self, key: &ApiKey) -> Stored<()> {
        let mut state = self.state();
        if state.keys.values().any(|k| k.mac == key.mac) {
            return Err(StoreError::new("accounts.add_key", "there is one with this secret"));
        }
        add(&mut state.keys, "accounts.add_key", key.id, key.clone())
    }
    async fn key_by_mac(&self, mac: &Digest) -> Stored<Option<ApiKey>> {
        Ok(self.state().keys.values().find(|k| k.mac == *mac).cloned())
    }
    async fn key(&self, id: ApiKeyId) -> Stored<Option<ApiKey>> {
        Ok(self.state().keys.get(&id).cloned())
    }
    async fn keys(&self, user: UserId, window: Window<ApiKeyId>) -> Stored<Vec<ApiKey>> {
        Ok(page(&self.state().keys, window, |k| k.user == user))
    }
    async fn remove_key(&self, id: ApiKeyId) -> Stored<bool> {
        Ok(self.state().keys.remove(&id).is_some())
    }
    async fn key_used(&self, id: ApiKeyId, now: UnixMs) -> Stored<()> {
        if let Some(key) = self.state().keys.get_mut(&id) {
            key.last_used_at = Some(now);
        }
        Ok(())
    }
}

#[async_trait]
impl Meta for MemoryStore {
    async fn hub(&self, fresh: HubMeta) -> Stored<HubMeta> {
        Ok(*self.state().hub.get_or_insert(fresh))
    }
    async fn mark_restored(&self, at: UnixMs, backup_at: UnixMs, least: u32) -> Stored<HubMeta> {
        let mut state = self.state();
        let next = state.hub.and_then(|h| Some(HubMeta { incarnation: h.incarnation.checked_add(1)?.max(least), ..h }));
        let next = next.ok_or_else(|| StoreError::new("meta.mark_restored", "no hub, or no number left"))?;
        (state.hub, state.restored) = (Some(next), Some(Restored { at, backup_at, go: false }));
        Ok(next)
    }
    async fn restored(&self) -> Stored<Option<Restored>> {
        Ok(self.state().restored)
    }
    async fn ask_go(&self) -> Stored<bool> {
        Ok(self.state().restored.as_mut().map(|r| r.go = true).is_some())
    }
    async fn released(&self) -> Stored<()> {
        self.state().restored = None;
        Ok(())
    }
    async fn ping(&self) -> Stored<()> {
        Ok(())
    }
}

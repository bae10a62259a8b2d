//! Sessions, what they hold, and what agents keep.

use super::*;
use mesh_core::task::TaskState;
use mesh_process::entropy;

impl State {
    fn note(&mut self, id: SessionId, act: SessionAct, subject: impl ToString, actor: Option<UserId>, at: UnixMs) {
        let lines = self.activity.entry(id).or_default();
        let newest = lines.back().map(|a| *a.place.0.as_bytes());
        let place = Place(EntryId::from_bytes(above(newest, *EntryId::from_parts(at, entropy::bytes()).as_bytes())), Place::OWN);
        let what = Happened::Session { act, subject: subject.to_string() };
        lines.push_back(Activity { place, at, actor, what });
        if lines.len() > ACTIVITY_KEPT as usize {
            lines.pop_front();
        }
    }
    fn active(&mut self, id: SessionId) -> Option<&mut Session> {
        self.sessions.get_mut(&id).filter(|s| s.is_active())
    }
    fn touch(&mut self, id: SessionId, now: UnixMs) -> bool {
        self.active(id).map(|s| s.expires_at = now + s.ttl_ms).is_some()
    }
    /// Gives the bytes of what is no more.
    fn erase_outputs(&mut self, tasks: &[TaskId]) -> u64 {
        let mut bytes = 0;
        for task in tasks {
            self.tasks.entry(*task).and_modify(|(t, _)| t.result = None);
            self.erased.insert(*task);
            for (_, (totals, kept)) in self.outputs.iter_mut().filter(|((t, _), o)| t == task && o.0.kept_seq > 0) {
                bytes += kept.iter().map(|f| f.data.len() as u64).sum::<u64>();
                (totals.kept_seq, totals.truncated) = (0, true);
                kept.clear();
            }
        }
        bytes
    }
    fn kept_of(&self, id: TaskId) -> u64 {
        self.outputs.iter().filter(|((t, _), _)| *t == id).flat_map(|(_, o)| &o.1).map(|f| f.data.len() as u64).sum()
    }
    /// Tasks that ended before, in the order in which they did.
    fn ended(&self, before: UnixMs) -> Vec<TaskId> {
        let ends = self.tasks.values().filter_map(|(t, _)| Some((t.progress.finished_at.filter(|at| *at < before)?, t.id)));
        let ends: BTreeSet<_> = ends.collect();
        ends.into_iter().map(|(_, id)| id).collect()
    }
    fn tasks_of(&self, id: SessionId) -> impl Iterator<Item = &Task> {
        self.tasks.values().map(|(t, _)| t).filter(move |t| t.session == Some(id))
    }
}

fn above(newest: Option<[u8; 16]>, fresh: [u8; 16]) -> [u8; 16] {
    match newest {
        Some(newest) if newest >= fresh => u128::from_be_bytes(newest).wrapping_add(1).to_be_bytes(),
        _ => fresh,
    }
}

/// As many of `items`, newest first, as count and bytes allow, but at least one.
fn part<T>(items: impl Iterator<Item = T>, limit: u32, max_bytes: u64, size: impl Fn(&T) -> usize) -> Part<T> {
    let (mut kept, mut bytes) = (vec![], 0);
    for item in items {
        bytes += size(&item) as u64;
        if !kept.is_empty() && (kept.len() >= limit as usize || bytes > max_bytes) {
            return Part { items: kept, more: true };
        }
        kept.push(item);
    }
    Part { items: kept, more: false }
}

#[async_trait]
impl Sessions for MemoryStore {
    async fn add_session(&self, session: &Session) -> Stored<()> {
        let mut state = self.state();
        add(&mut state.sessions, "sessions.add_session", session.id, session.clone())?;
        state.note(session.id, SessionAct::Created, &session.name, Some(session.owner), session.created_at);
        Ok(())
    }
    async fn session(&self, id: SessionId) -> Stored<Option<Session>> {
        Ok(self.state().sessions.get(&id).cloned())
    }
    async fn sessions(&self, within: Option<&Within>, window: Window<SessionId>) -> Stored<Vec<Session>> {
        Ok(page(&self.state().sessions, window, |s| within.is_none_or(|w| w.has_session(s))))
    }
    async fn close_session(&self, id: SessionId, by: Option<UserId>, now: UnixMs) -> Stored<bool> {
        let mut state = self.state();
        let open = state.sessions.get_mut(&id).filter(|s| s.closed_at.is_none() && s.purged_at.is_none());
        let closed = open.map(|s| s.closed_at = Some(now)).is_some();
        if closed {
            state.note(id, SessionAct::Closed, "", by, now);
        }
        Ok(closed)
    }
    async fn attach(&self, id: SessionId, node: NodeId, by: Option<UserId>, now: UnixMs) -> Stored<()> {
        let mut state = self.state();
        let session = state.sessions.get_mut(&id).ok_or_else(|| StoreError::new("sessions.attach", format!("there is no {id}")))?;
        let new = !session.nodes.contains(&node);
        if new {
            session.nodes.push(node);
        }
        state.touch(id, now);
        if new {
            state.note(id, SessionAct::Attached, node, by, now);
        }
        Ok(())
    }
    async fn detach(&self, id: SessionId, node: NodeId, by: Option<UserId>, now: UnixMs) -> Stored<bool> {
        let mut state = self.state();
        let Some(session) = state.sessions.get_mut(&id) else { return Ok(false) };
        let before = session.nodes.len();
        session.nodes.retain(|n| *n != node);
        let detached = session.nodes.len() < before;
        if detached {
            state.touch(id, now);
            state.note(id, SessionAct::Detached, node, by, now);
        }
        Ok(detached)
    }
    async fn touch_session(&self, id: SessionId, now: UnixMs) -> Stored<bool> {
        Ok(self.state().touch(id, now))
    }
    async fn change_session(&self, id: SessionId, change: &SessionChange, by: Option<UserId>, now: UnixMs) -> Stored<bool> {
        let mut state = self.state();
        let Some(session) = state.active(id) else { return Ok(false) };
        session.ttl_ms = change.ttl_ms.unwrap_or(session.ttl_ms);
        let renamed = change.name.clone().filter(|n| *n != session.name);
        if let Some(name) = &renamed {
            session.name = name.clone();
        }
        state.touch(id, now);
        if let Some(name) = renamed {
            state.note(id, SessionAct::Renamed, name, by, now);
        }
        Ok(true)
    }
    async fn expire_sessions(&self, now: UnixMs, limit: u32) -> Stored<Vec<(SessionId, UserId)>> {
        let mut state = self.state();
        let mut due: Vec<_> = state.sessions.values().filter(|s| s.is_active() && s.expires_at <= now).cloned().collect();
        due.sort_by_key(|s| s.expires_at);
        due.truncate(limit as usize);
        let mut ended = vec![];
        for s in due {
            let works = state.tasks_of(s.id).any(|t| !t.progress.state.is_final() && t.progress.attempt.is_some());
            let worked = state.tasks_of(s.id).filter_map(|t| t.progress.finished_at).max().map(|at| at + s.ttl_ms);
            let session = state.sessions.get_mut(&s.id).expect("it was there");
            match worked {
                _ if works => session.expires_at = now + s.ttl_ms,
                Some(until) if until > now => session.expires_at = until,
                _ => {
                    session.expired_at = Some(now);
                    state.note(s.id, SessionAct::Expired, "", None, now);
                    ended.push((s.id, s.owner));
                }
            }
        }
        Ok(ended)
    }
    async fn next_end(&self) -> Stored<Option<UnixMs>> {
        Ok(self.state().sessions.values().filter(|s| s.is_active()).map(|s| s.expires_at).min())
    }
    async fn activity(&self, id: SessionId, before: Option<Place>, limit: u32) -> Stored<Vec<Activity>> {
        let state = self.state();
        let mut lines: Vec<Activity> = state.activity.get(&id).into_iter().flatten().cloned().collect();
        for t in state.tasks_of(id) {
            let (task, actor) = (t.id, Some(t.actor.user));
            let what = Happened::TaskAccepted { task, skill: t.skill.clone() };
            lines.push(Activity { place: Place::of_acceptance(task), at: t.created_at, actor, what });
            if let Some(at) = t.progress.finished_at {
                let reason = t.progress.reason.as_ref().map(|r| r.code);
                let what = Happened::TaskEnded { task, skill: t.skill.clone(), state: t.progress.state, reason };
                lines.push(Activity { place: Place::of_end(task, at), at, actor, what });
            }
        }
        lines.retain(|a| before.is_none_or(|b| a.place < b));
        lines.sort_by_key(|a| std::cmp::Reverse(a.place));
        lines.truncate(limit as usize);
        Ok(lines)
    }
}

#[async_trait]
impl Purges for MemoryStore {
    async fn begin_purge(&self, id: SessionId, by: Option<UserId>, now: UnixMs) -> Stored<PurgeStart> {
        let mut state = self.state();
        let Some(session) = state.sessions.get(&id) else { return Ok(PurgeStart::Unknown) };
        if session.is_active() {
            return Ok(PurgeStart::Active);
        }
        if session.purged_at.is_some() {
            return Ok(if state.purging.contains(&id) { PurgeStart::Begun } else { PurgeStart::Done });
        }
        if state.tasks_of(id).any(|t| t.progress.finished_at.is_none()) {
            return Ok(PurgeStart::TasksOpen);
        }
        state.memory.retain(|(s, _), _| *s != id);
        state.activity.remove(&id);
        state.sessions.entry(id).and_modify(|s| s.purged_at = Some(now));
        state.purging.insert(id);
        state.grants.retain(|_, g| g.resource != Resource::Session(id));
        state.note(id, SessionAct::Purged, "", by, now);
        Ok(PurgeStart::Begun)
    }
    async fn purge_step(&self, id: SessionId, after: Option<TaskId>, limit: u32) -> Stored<PurgeStep> {
        let mut state = self.state();
        let messages: Vec<MessageId> = state.messages.values().filter(|m| m.session == id).map(|m| m.id).take(limit as usize).collect();
        if !messages.is_empty() {
            messages.iter().for_each(|m| drop(state.messages.remove(m)));
            return Ok(PurgeStep::Until(after));
        }
        if state.audit.erase_session(id, limit) > 0 {
            return Ok(PurgeStep::Until(after));
        }
        state.agents.values_mut().filter(|(a, _)| a.session == Some(id)).for_each(|(_, log)| log.erase());
        let tasks: Vec<TaskId> = state.tasks_of(id).map(|t| t.id).filter(|t| after.is_none_or(|a| *t > a)).take(limit as usize).collect();
        let Some(last) = tasks.last() else {
            state.purging.remove(&id);
            return Ok(PurgeStep::Done);
        };
        state.erase_outputs(&tasks);
        Ok(PurgeStep::Until(Some(*last)))
    }
    async fn purging(&self, limit: u32) -> Stored<Vec<SessionId>> {
        Ok(self.state().purging.iter().copied().take(limit as usize).collect())
    }
    async fn sweep(&self, _limit: u32) -> Stored<u32> {
        Ok(0)
    }
}

/// Frames of less stay in the row of a real store, and are no file.
const FILE_FROM: u64 = 8192;

#[async_trait]
impl Retention for MemoryStore {
    async fn erase_output(&self, before: UnixMs, limit: u32) -> Stored<Erased> {
        let mut state = self.state();
        let due = state.ended(before).into_iter().filter(|id| !state.output_erased.contains(id));
        let due: Vec<TaskId> = due.take(limit as usize).collect();
        state.output_erased.extend(&due);
        Ok(Erased { tasks: due.len() as u32, bytes: state.erase_outputs(&due) })
    }
    async fn erase_files(&self, enough: u64, limit: u32) -> Stored<Erased> {
        let mut state = self.state();
        let ended = state.tasks.values().filter(|(t, _)| t.progress.finished_at.is_some()).map(|(t, _)| t.id);
        let large: Vec<TaskId> = ended.filter(|id| state.kept_of(*id) > FILE_FROM).take(limit as usize).collect();
        let mut erased = Erased::default();
        for id in large {
            if erased.bytes >= enough {
                break;
            }
            state.output_erased.insert(id);
            erased.bytes += state.erase_outputs(&[id]);
            erased.tasks += 1;
        }
        Ok(erased)
    }
    async fn erase_tasks(&self, before: UnixMs, enough: u64, limit: u32) -> Stored<Erased> {
        let mut state = self.state();
        let mut erased = Erased::default();
        let roots = state.ended(before).into_iter().filter(|id| state.tasks[id].0.parent.is_none());
        for root in roots.collect::<Vec<_>>() {
            let family: Vec<TaskId> = state.children(root).map(|t| t.id).chain([root]).collect();
            let full = erased.tasks + family.len() as u32 > limit && erased.tasks > 0;
            if full || erased.bytes >= enough {
                break;
            }
            for id in family {
                let Some((task, history)) = state.tasks.remove(&id) else { continue };
                state.outputs.retain(|(t, _), _| *t != id);
                erased.bytes += 1000 + (task.spec.len() + 150 * history.len()) as u64;
                erased.tasks += 1;
            }
        }
        Ok(erased)
    }
}

#[async_trait]
impl Memory for MemoryStore {
    async fn put_memory(&self, entry: &MemoryEntry, by: Option<UserId>, most: u32) -> Stored<Written> {
        let mut state = self.state();
        if !state.touch(entry.session, entry.updated_at) {
            return Ok(Written::Ended);
        }
        let count = state.memory.keys().filter(|(s, _)| *s == entry.session).count();
        let place = (entry.session, entry.key.clone());
        match state.memory.get_mut(&place) {
            Some(known) => *known = MemoryEntry { id: known.id, ..entry.clone() },
            None if count >= most as usize => return Ok(Written::Full),
            None => drop(state.memory.insert(place, entry.clone())),
        }
        state.note(entry.session, SessionAct::MemorySet, &entry.key, by, entry.updated_at);
        Ok(Written::Done)
    }
    async fn memory(&self, session: SessionId, key: &str) -> Stored<Option<MemoryEntry>> {
        Ok(self.state().memory.get(&(session, key.to_owned())).cloned())
    }
    async fn memory_keys(&self, session: SessionId, window: Window<EntryId>) -> Stored<Vec<MemoryKey>> {
        let state = self.state();
        let keys = state.memory.values().filter(|e| e.session == session);
        let keys = keys.map(|e| (e.id, MemoryKey { id: e.id, key: e.key.clone(), bytes: e.value.len() as u64, updated_at: e.updated_at }));
        Ok(page(&keys.collect(), window, |_| true))
    }
    async fn remove_memory(&self, session: SessionId, key: &str, by: Option<UserId>, now: UnixMs) -> Stored<Written> {
        let mut state = self.state();
        if !state.touch(session, now) {
            return Ok(Written::Ended);
        }
        if state.memory.remove(&(session, key.to_owned())).is_none() {
            return Ok(Written::Absent);
        }
        state.note(session, SessionAct::MemoryRemoved, key, by, now);
        Ok(Written::Done)
    }
}

#[async_trait]
impl Messages for MemoryStore {
    async fn add_message(&self, message: &Message, by: Option<UserId>) -> Stored<Option<Message>> {
        let mut state = self.state();
        if !state.touch(message.session, message.created_at) {
            return Ok(None);
        }
        let newest = state.messages.values().filter(|m| m.session == message.session).map(|m| *m.id.as_bytes()).max();
        let message = Message { id: MessageId::from_bytes(above(newest, *message.id.as_bytes())), ..message.clone() };
        add(&mut state.messages, "messages.add_message", message.id, message.clone())?;
        state.note(message.session, SessionAct::Message, message.id, by, message.created_at);
        Ok(Some(message))
    }
    async fn messages(&self, session: SessionId, window: Window<MessageId>, max_bytes: u64) -> Stored<Part<Message>> {
        let all = page(&self.state().messages, Window { limit: u32::MAX, ..window }, |m| m.session == session);
        Ok(part(all.into_iter(), window.limit, max_bytes, |m| m.content.len()))
    }
}

#[async_trait]
impl AgentState for MemoryStore {
    async fn put_state(&self, entry: &StateEntry, most: u32) -> Stored<StateWritten> {
        let mut state = self.state();
        if state.name_owner(&entry.agent).is_some_and(|owner| owner != entry.owner) {
            return Ok(StateWritten::Foreign);
        }
        let count = state.state.values().filter(|e| e.agent == entry.agent).count();
        let place = (entry.agent.clone(), entry.key.clone());
        match state.state.get_mut(&place) {
            Some(known) => *known = StateEntry { id: known.id, ..entry.clone() },
            None if count >= most as usize => return Ok(StateWritten::Full),
            None => drop(state.state.insert(place, entry.clone())),
        }
        Ok(StateWritten::Done)
    }
    async fn state(&self, agent: &str, key: &str) -> Stored<Option<StateEntry>> {
        Ok(MemoryStore::state(self).state.get(&(agent.to_owned(), key.to_owned())).cloned())
    }
    async fn state_owner(&self, agent: &str) -> Stored<Option<UserId>> {
        Ok(MemoryStore::state(self).name_owner(agent))
    }
    async fn states(&self, filter: &StateFilter, window: Window<EntryId>, max_bytes: u64) -> Stored<Part<StateEntry>> {
        let f = filter;
        let by_id: BTreeMap<EntryId, StateEntry> = MemoryStore::state(self).state.values().map(|e| (e.id, e.clone())).collect();
        let shown = |e: &StateEntry| {
            f.within.as_ref().is_none_or(|w| w.has_entry(e))
                && f.agent.as_ref().is_none_or(|a| e.agent == *a)
                && f.key.as_ref().is_none_or(|k| e.key == *k)
        };
        let all = page(&by_id, Window { limit: u32::MAX, ..window }, shown);
        Ok(part(all.into_iter(), window.limit, max_bytes, |e| e.value.len()))
    }
    async fn remove_state(&self, agent: &str, key: &str, owner: UserId) -> Stored<bool> {
        let mut state = MemoryStore::state(self);
        let place = (agent.to_owned(), key.to_owned());
        let owned = state.state.get(&place).is_some_and(|e| e.owner == owner);
        let removed = owned && state.state.remove(&place).is_some();
        if removed {
            state.release_name(agent);
        }
        Ok(removed)
    }
}

#[async_trait]
impl Gauges for MemoryStore {
    async fn tasks_by_state(&self) -> Stored<BTreeMap<TaskState, u64>> {
        let mut counts = BTreeMap::new();
        for (t, _) in self.state().tasks.values().filter(|(t, _)| !t.is_parent()) {
            *counts.entry(t.progress.state).or_insert(0) += 1;
        }
        Ok(counts)
    }
    async fn storage(&self) -> Stored<StorageUse> {
        let state = self.state();
        let output_bytes = state.outputs.values().flat_map(|o| &o.1).map(|f| f.data.len() as u64).sum();
        let journal_bytes = state.tasks.values().map(|(t, history)| 1000 + (t.spec.len() + 150 * history.len()) as u64).sum();
        Ok(StorageUse { database_bytes: journal_bytes, journal_bytes, output_bytes, ..StorageUse::default() })
    }
}

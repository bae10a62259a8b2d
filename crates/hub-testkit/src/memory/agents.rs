//! Agents, and their logs.

use super::*;
use mesh_core::agent::{Event, Kind, Status, step, words};
use mesh_core::lines::{Cutter, Line, Source};

#[derive(Debug, Default, Clone)]
pub(super) struct Log {
    first: u64,
    lines: VecDeque<Line>,
    cutter: Cutter,
    source: Option<LogSource>,
    seq: u64,
}

impl Log {
    pub(super) fn erase(&mut self) {
        self.first += self.lines.len() as u64;
        (self.lines, self.cutter) = (VecDeque::new(), Cutter::default());
    }
    fn add(&mut self, lines: Vec<Line>, keep: u64) {
        self.lines.extend(lines);
        while self.lines.len() > 1 && self.lines.iter().map(|l| l.text.len() as u64 + 13).sum::<u64>() > keep {
            self.lines.pop_front();
            self.first += 1;
        }
    }
}

impl State {
    /// Whose a name is.
    pub(super) fn name_owner(&self, name: &str) -> Option<UserId> {
        let agent = || self.agents.values().map(|(a, _)| a).find(|a| a.name == name).map(|a| a.owner);
        self.state.values().find(|e| e.agent == name).map(|e| e.owner).or_else(agent)
    }
    /// With the last of its keys and agents a name is nobody's.
    pub(super) fn release_name(&mut self, name: &str) {
        if self.name_owner(name).is_none() {
            self.grants.retain(|_, g| g.resource != Resource::Agent(name.to_owned()));
        }
    }
    pub(super) fn add_agent(&mut self, agent: &Agent) -> Spawned {
        if self.name_owner(&agent.name).is_some_and(|owner| owner != agent.owner) {
            return Spawned::Foreign;
        }
        if self.agents.values().any(|(a, _)| a.name == agent.name && !a.life.status.is_final()) {
            return Spawned::NameTaken;
        }
        let mut log = Log::default();
        if agent.kind == Kind::Basic {
            let mut lines = vec![];
            log.cutter.take(agent.created_at, Source::Stdout, &agent.spec, &mut lines);
            log.cutter.flush(&mut lines);
            lines.iter_mut().for_each(|line| line.source = Source::Agent);
            log.add(lines, u64::MAX);
        }
        self.agents.insert(agent.id, (agent.clone(), log));
        Spawned::Done
    }
}

#[async_trait]
impl Agents for MemoryStore {
    async fn add_agent(&self, agent: &Agent) -> Stored<Spawned> {
        Ok(self.state().add_agent(agent))
    }
    async fn apply_agent(&self, id: AgentId, event: &Event, now: UnixMs, keep_bytes: u64) -> Stored<AgentApplied> {
        let mut state = self.state();
        let Some((agent, log)) = state.agents.get_mut(&id) else { return Ok(AgentApplied::Unknown) };
        let (life, actions) = match step(&agent.restart, &agent.life, event, now) {
            Ok(decided) => decided,
            Err(refused) => return Ok(AgentApplied::Refused(refused)),
        };
        agent.life = life;
        let mut lines = vec![];
        if matches!(event, Event::Ended { .. }) {
            log.cutter.flush(&mut lines);
        }
        lines.extend(words(event, &agent.life).map(|words| Line::said(now, &words)));
        log.add(lines, keep_bytes);
        Ok(AgentApplied::Done(Box::new(agent.clone()), actions))
    }
    async fn agent(&self, id: AgentId) -> Stored<Option<Agent>> {
        Ok(self.state().agents.get(&id).map(|(agent, _)| agent.clone()))
    }
    async fn agents(&self, filter: &AgentFilter, window: Window<AgentId>) -> Stored<Vec<Agent>> {
        Ok(page(&self.state().agents, window, |(a, _)| filter.has(a)).into_iter().map(|(a, _)| a).collect())
    }
    async fn living_agents(&self, after: Option<AgentId>, limit: u32) -> Stored<Vec<Agent>> {
        let state = self.state();
        let living = state.agents.values().map(|(a, _)| a).filter(|a| !a.life.status.is_final() && after.is_none_or(|id| a.id > id));
        Ok(living.take(limit as usize).cloned().collect())
    }
    async fn agents_by_status(&self, within: Option<&Within>) -> Stored<BTreeMap<Status, u64>> {
        let filter = AgentFilter { within: within.cloned(), ..AgentFilter::default() };
        let mut counts = BTreeMap::new();
        for (agent, _) in self.state().agents.values().filter(|(a, _)| filter.has(a)) {
            *counts.entry(agent.life.status).or_insert(0) += 1;
        }
        Ok(counts)
    }
    async fn add_log(
        &self,
        id: AgentId,
        source: LogSource,
        frames: Vec<OutputFrame>,
        from_here: bool,
        keep_bytes: u64,
    ) -> Stored<Option<u64>> {
        let mut state = self.state();
        let Some((_, kept)) = state.agents.get_mut(&id) else { return Ok(Some(frames.last().map_or(0, |f| f.seq))) };
        let mut log = kept.clone();
        let mut lines = vec![];
        if log.source != Some(source) {
            log.cutter.flush(&mut lines);
            (log.source, log.seq) = (Some(source), 0);
        }
        for frame in frames.iter().filter(|f| f.seq > kept.seq || kept.source != Some(source)) {
            if frame.seq != log.seq + 1 && !from_here {
                return Ok(None);
            }
            let from = if frame.stream == Stream::Stderr { Source::Stderr } else { Source::Stdout };
            log.cutter.take(frame.t_ms, from, &frame.data, &mut lines);
            log.seq = frame.seq;
        }
        log.add(lines, keep_bytes);
        *kept = log;
        Ok(Some(kept.seq))
    }
    async fn log_mark(&self, id: AgentId, source: LogSource) -> Stored<u64> {
        Ok(self.state().agents.get(&id).filter(|(_, log)| log.source == Some(source)).map_or(0, |(_, log)| log.seq))
    }
    async fn log(&self, id: AgentId, offset: u64, limit: u32, max_bytes: usize) -> Stored<LogPage> {
        let state = self.state();
        let Some((_, log)) = state.agents.get(&id) else { return Ok(LogPage::default()) };
        let mut page = LogPage { total: log.first + log.lines.len() as u64, first: log.first, lines: vec![] };
        let mut bytes = 0;
        for (at, line) in (log.first..).zip(&log.lines).filter(|(at, _)| *at >= offset) {
            bytes += line.text.len();
            if page.lines.len() >= limit as usize || (!page.lines.is_empty() && bytes > max_bytes) {
                break;
            }
            page.lines.push((at, line.clone()));
        }
        Ok(page)
    }
    async fn erase_agents(&self, before: UnixMs, limit: u32) -> Stored<u64> {
        let mut state = self.state();
        let ended: Vec<(AgentId, String)> = state
            .agents
            .values()
            .filter(|(a, _)| a.life.ended_at.is_some_and(|at| at < before))
            .map(|(a, _)| (a.id, a.name.clone()))
            .collect();
        let gone = ended.iter().take(limit as usize);
        for (id, name) in gone.clone() {
            state.agents.remove(id);
            state.release_name(name);
        }
        Ok(gone.count() as u64)
    }
}

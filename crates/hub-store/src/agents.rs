//! Agents, and their logs.
//!
//! A log is a ring of chunks: rows of some kilobytes, of which the oldest go when there is more than is to be kept.
//! The newest lines are held in its head until they are worth a row. What is taken of a run, the lines that it made
//! and how far it is taken are one commit, so that a crash neither loses a line nor doubles it.

use crate::dialect::{Conn, Row};
use crate::rows::{Columns, Id, all, blob};
use crate::sql::{Rows, Sql, Value, sql, values};
use crate::state;
use crate::store::{Failed, Store};
use async_trait::async_trait;
use hub_engine::ports::{Agents, StoreError, Stored, Window};
use hub_engine::records::{Agent, AgentApplied, AgentFilter, LogPage, LogSource, OutputFrame, Spawned, Stream, Within};
use mesh_core::agent::{Event, Kill, Kind, Life, Policy, Restart, Run, Status, step, words};
use mesh_core::lines::{self, Cutter, Line, Source};
use mesh_core::select::Selector;
use mesh_core::task::AttemptNo;
use mesh_core::{AgentId, TaskId, UnixMs, UserId};
use std::collections::BTreeMap;

/// Lines of so many bytes together become a chunk.
const CHUNK: usize = 8 * 1024;
/// The most bytes of lines in one chunk, but for its last line.
const CHUNK_AT_MOST: usize = 64 * 1024;
/// About what the row of a chunk takes beside its lines.
const CHUNK_ROW: u64 = 100;

const COLUMNS: &str = "id, name, owner, key, door, kind, session, node, selector, spec, restart_policy, restart_max, backoff_ms, \
    created_at, status, run, task, on_node, restarts, in_a_row, kill_at, kill_force, started_at, next_at, ended_at, reason";
const CHANGING: [&str; 12] =
    ["status", "run", "task", "on_node", "restarts", "in_a_row", "kill_at", "kill_force", "started_at", "next_at", "ended_at", "reason"];

#[async_trait]
impl Agents for Store {
    async fn add_agent(&self, agent: &Agent) -> Stored<Spawned> {
        self.write("agents.add_agent", agent.clone(), |conn, agent| Box::pin(insert(conn, agent))).await
    }

    async fn apply_agent(&self, id: AgentId, event: &Event, now: UnixMs, keep_bytes: u64) -> Stored<AgentApplied> {
        let with = (id, event.clone(), now, keep_bytes);
        self.write("agents.apply_agent", with, |conn, (id, event, now, keep)| Box::pin(apply(conn, *id, event, *now, *keep))).await
    }

    async fn agent(&self, id: AgentId) -> Stored<Option<Agent>> {
        self.one("agents.agent", sql(format!("SELECT {COLUMNS} FROM agents WHERE id = $1")).bind(id.blob()), agent).await
    }

    async fn agents(&self, filter: &AgentFilter, window: Window<AgentId>) -> Stored<Vec<Agent>> {
        let narrow = |mut q: Sql| {
            if let Some(w) = &filter.within {
                q = q.and_any(
                    self.read.dialect(),
                    [("owner", all(&w.owner)), ("name", w.agents.iter().map(|a| a.clone().into()).collect())],
                );
            }
            if let Some(name) = &filter.name {
                q = q.and(" AND name = ", name.as_str());
            }
            if let Some(status) = filter.status {
                q = q.and(" AND status = ", status.as_str());
            }
            q
        };
        self.page("agents.agents", (COLUMNS, "agents"), narrow, window, agent).await
    }

    async fn living_agents(&self, after: Option<AgentId>, limit: u32) -> Stored<Vec<Agent>> {
        let q = sql(format!("SELECT {COLUMNS} FROM agents WHERE ended_at IS NULL"));
        let q = match after {
            Some(id) => q.and(" AND id > ", id.blob()),
            None => q,
        };
        self.all("agents.living_agents", q.and(" ORDER BY id LIMIT ", limit), agent).await
    }

    async fn agents_by_status(&self, within: Option<&Within>) -> Stored<BTreeMap<Status, u64>> {
        let mut q = sql("SELECT status, COUNT(*) FROM agents WHERE TRUE");
        if let Some(w) = within {
            q = q.and_any(self.read.dialect(), [("owner", all(&w.owner)), ("name", w.agents.iter().map(|a| a.clone().into()).collect())]);
        }
        let q = Sql { text: format!("{} GROUP BY status", q.text).into(), values: q.values };
        let counts = self.all("agents.agents_by_status", q, |row| {
            let c = &mut Columns::of(row);
            Ok((c.word(Status::parse)?, c.unsigned()?))
        });
        Ok(counts.await?.into_iter().collect())
    }

    async fn add_log(
        &self,
        id: AgentId,
        source: LogSource,
        frames: Vec<OutputFrame>,
        from_here: bool,
        keep_bytes: u64,
    ) -> Stored<Option<u64>> {
        let with = (id, source, frames, from_here, keep_bytes);
        let taken = self.write("agents.add_log", with, |conn, (id, source, frames, from_here, keep)| {
            Box::pin(add_log(conn, *id, *source, frames, *from_here, *keep))
        });
        Ok(taken.await?.0)
    }

    async fn log_mark(&self, id: AgentId, source: LogSource) -> Stored<u64> {
        let q = sql("SELECT seq FROM agent_log_heads WHERE agent = $1 AND task = $2 AND attempt = $3");
        let q = q.bind(id.blob()).bind(source.task.blob()).bind(source.attempt.0);
        Ok(self.one("agents.log_mark", q, |row| Columns::of(row).unsigned()).await?.unwrap_or(0))
    }

    async fn log(&self, id: AgentId, offset: u64, limit: u32, max_bytes: usize) -> Stored<LogPage> {
        // What is dropped between two reads is read again, from where the log begins by then.
        let Some(head) = self.one("agents.log", head_of(id), head).await? else { return Ok(LogPage::default()) };
        let mut page = LogPage { total: head.total, first: head.first, lines: vec![] };
        let (mut next, mut bytes) = (offset.max(head.first), 0);
        while next < head.open_first {
            let q = sql("SELECT first, data FROM agent_log WHERE agent = $1 AND first + lines > $2 ORDER BY first LIMIT 1");
            let chunk = self.one("agents.log", q.bind(id.blob()).bind(next), |row| {
                let c = &mut Columns::of(row);
                Ok((c.unsigned()?, lines::decode(c.get()?)?))
            });
            let Some((first, lines)) = chunk.await? else { break };
            if first > next {
                if !page.lines.is_empty() {
                    return Ok(page);
                }
                (page.first, next) = (first, first);
            }
            if !fill(&mut page, &mut bytes, (first, lines), next, limit, max_bytes) {
                return Ok(page);
            }
            next = page.lines.last().map_or(next, |(at, _)| at + 1);
        }
        if next >= head.open_first {
            let open = lines::decode(&head.open).map_err(|e| StoreError::new("agents.log", e))?;
            fill(&mut page, &mut bytes, (head.open_first, open), next, limit, max_bytes);
        }
        Ok(page)
    }

    async fn erase_agents(&self, before: UnixMs, limit: u32) -> Stored<u64> {
        self.write("agents.erase_agents", (before, limit), |conn, (before, limit)| Box::pin(erase(conn, *before, *limit))).await
    }
}

/// Adds lines from `next` on; false when the page is full.
fn fill(page: &mut LogPage, bytes: &mut usize, (first, lines): (u64, Vec<Line>), next: u64, limit: u32, max_bytes: usize) -> bool {
    for (at, line) in (first..).zip(lines).filter(|(at, _)| *at >= next) {
        *bytes += line.text.len();
        if page.lines.len() >= limit as usize || (!page.lines.is_empty() && *bytes > max_bytes) {
            return false;
        }
        page.lines.push((at, line));
    }
    true
}

/// How far a log has taken its source.
pub(crate) struct Taken(pub Option<u64>);
pub(crate) async fn insert(conn: &mut Conn, a: &Agent) -> Result<Spawned, Failed> {
    state::alone(conn, &a.name).await?;
    if conn.row(&state::owner(&a.name), |row| Columns::of(row).id::<UserId>()).await?.is_some_and(|owner| owner != a.owner) {
        return Ok(Spawned::Foreign);
    }
    let living = sql("SELECT 1 FROM agents WHERE name = $1 AND ended_at IS NULL").bind(a.name.as_str());
    if conn.row(&living, |_| Ok(())).await?.is_some() {
        return Ok(Spawned::NameTaken);
    }
    let row = fixed(a).into_iter().chain(changing(&a.life)).collect::<Vec<_>>();
    conn.insert("agents", COLUMNS, &Rows { width: row.len(), values: row }, "").await?;
    let mut head = Head::new(a.id);
    if a.kind == Kind::Basic {
        let (mut cutter, mut lines) = (Cutter::default(), vec![]);
        cutter.take(a.created_at, Source::Stdout, &a.spec, &mut lines);
        cutter.flush(&mut lines);
        lines.iter_mut().for_each(|line| line.source = Source::Agent);
        head.add(conn, &lines, u64::MAX).await?;
    }
    head.write(conn).await?;
    Ok(Spawned::Done)
}

async fn apply(conn: &mut Conn, id: AgentId, event: &Event, now: UnixMs, keep: u64) -> Result<AgentApplied, Failed> {
    conn.lock("agents", vec![id.blob()]).await?;
    let q = sql(format!("SELECT {COLUMNS} FROM agents WHERE id = $1")).bind(id.blob());
    let Some(mut agent) = conn.row(&q, agent).await? else { return Ok(AgentApplied::Unknown) };
    let (life, actions) = match step(&agent.restart, &agent.life, event, now) {
        Ok(decided) => decided,
        Err(refused) => return Ok(AgentApplied::Refused(refused)),
    };
    agent.life = life;
    let row: Vec<Value<'_>> = changing(&agent.life).into_iter().chain([id.blob().into()]).collect();
    conn.update("agents", &CHANGING, &Rows { width: row.len(), values: row }).await?;
    let mut lines = vec![];
    let mut head = Head::read(conn, id).await?.unwrap_or_else(|| Head::new(id));
    if matches!(event, Event::Ended { .. }) {
        head.cutter.flush(&mut lines);
    }
    lines.extend(words(event, &agent.life).map(|words| Line::said(now, &words)));
    if !lines.is_empty() {
        head.add(conn, &lines, keep).await?;
        head.write(conn).await?;
    }
    Ok(AgentApplied::Done(Box::new(agent), actions))
}

async fn add_log(
    conn: &mut Conn,
    id: AgentId,
    source: LogSource,
    frames: &[OutputFrame],
    from_here: bool,
    keep: u64,
) -> Result<Taken, Failed> {
    conn.lock("agents", vec![id.blob()]).await?;
    // Erased: nobody asks for its lines any more.
    let Some(mut head) = Head::read(conn, id).await? else { return Ok(Taken(Some(frames.last().map_or(0, |f| f.seq)))) };
    let mut lines = vec![];
    if head.source != Some(source) {
        // What an attempt before it left without an end has none.
        head.cutter.flush(&mut lines);
        (head.source, head.seq) = (Some(source), 0);
    }
    for frame in frames {
        if frame.seq <= head.seq {
            continue;
        }
        if frame.seq != head.seq + 1 && !from_here {
            return Ok(Taken(None));
        }
        let from = match frame.stream {
            Stream::Stdout => Source::Stdout,
            Stream::Stderr => Source::Stderr,
        };
        head.cutter.take(frame.t_ms, from, &frame.data, &mut lines);
        head.seq = frame.seq;
    }
    head.add(conn, &lines, keep).await?;
    head.write(conn).await?;
    Ok(Taken(Some(head.seq)))
}

async fn erase(conn: &mut Conn, before: UnixMs, limit: u32) -> Result<u64, Failed> {
    let q = sql("SELECT id, name FROM agents WHERE ended_at < $1 ORDER BY ended_at LIMIT $2").bind(before).bind(limit);
    let ended = conn.rows(&q, |row| {
        let c = &mut Columns::of(row);
        Ok((c.id::<AgentId>()?, c.get::<String>()?))
    });
    let ended = ended.await?;
    for (id, name) in &ended {
        state::alone(conn, name).await?;
        for q in
            ["DELETE FROM agent_log WHERE agent = $1", "DELETE FROM agent_log_heads WHERE agent = $1", "DELETE FROM agents WHERE id = $1"]
        {
            conn.execute(&sql(q).bind(id.blob())).await?;
        }
        state::release(conn, name).await?;
    }
    Ok(ended.len() as u64)
}

/// A log but for its chunks.
struct Head {
    agent: AgentId,
    total: u64,
    first: u64,
    bytes: u64,
    open_first: u64,
    open: Vec<u8>,
    cutter: Cutter,
    source: Option<LogSource>,
    seq: u64,
}

const HEAD: &str = "agent, total, first, bytes, open_first, open, carry, task, attempt, seq";

fn head_of(id: AgentId) -> Sql {
    sql(format!("SELECT {HEAD} FROM agent_log_heads WHERE agent = $1")).bind(id.blob())
}

fn head(row: &Row) -> Result<Head, Failed> {
    let c = &mut Columns::of(row);
    let (agent, total, first, bytes, open_first, open) = (c.id()?, c.unsigned()?, c.unsigned()?, c.unsigned()?, c.unsigned()?, c.get()?);
    let cutter = Cutter::decode(c.get()?)?;
    let (task, attempt, seq) = (c.id_or_null::<TaskId>()?, AttemptNo(c.unsigned()?), c.unsigned()?);
    Ok(Head { agent, total, first, bytes, open_first, open, cutter, source: task.map(|task| LogSource { task, attempt }), seq })
}

impl Head {
    fn new(agent: AgentId) -> Self {
        Self { agent, total: 0, first: 0, bytes: 0, open_first: 0, open: vec![], cutter: Cutter::default(), source: None, seq: 0 }
    }
    async fn read(conn: &mut Conn, id: AgentId) -> Result<Option<Self>, Failed> {
        conn.row(&head_of(id), head).await
    }

    async fn write(&self, conn: &mut Conn) -> Result<(), Failed> {
        let row = values![
            self.agent.blob(),
            self.total,
            self.first,
            self.bytes,
            self.open_first,
            &self.open[..],
            self.cutter.encode(),
            self.source.map(|s| s.task.blob()),
            self.source.map_or(0, |s| s.attempt.0),
            self.seq,
        ];
        let set: Vec<String> = HEAD.split(", ").skip(1).map(|column| format!("{column} = excluded.{column}")).collect();
        let after = format!(" ON CONFLICT (agent) DO UPDATE SET {}", set.join(", "));
        conn.insert("agent_log_heads", HEAD, &Rows::of([row]), &after).await
    }

    /// Adds lines behind the others, and lets the oldest go that are beyond `keep` bytes.
    async fn add(&mut self, conn: &mut Conn, lines: &[Line], keep: u64) -> Result<(), Failed> {
        // What goes at once is a small part of what is kept.
        let at_most = usize::try_from(keep / 8).unwrap_or(usize::MAX).clamp(CHUNK, CHUNK_AT_MOST);
        for line in lines {
            lines::encode(line, &mut self.open);
            self.total += 1;
            if self.open.len() >= at_most {
                self.close(conn).await?;
            }
        }
        if self.open.len() >= CHUNK {
            self.close(conn).await?;
        }
        self.drop_oldest(conn, keep).await
    }

    async fn close(&mut self, conn: &mut Conn) -> Result<(), Failed> {
        let data = std::mem::take(&mut self.open);
        self.bytes += data.len() as u64 + CHUNK_ROW;
        let row = values![self.agent.blob(), self.open_first, self.total - self.open_first, data];
        self.open_first = self.total;
        conn.insert("agent_log", "agent, first, lines, data", &Rows::of([row]), "").await
    }

    async fn drop_oldest(&mut self, conn: &mut Conn, keep: u64) -> Result<(), Failed> {
        while self.bytes > 0 && self.bytes + self.open.len() as u64 > keep {
            let q = sql("SELECT first, lines, CAST(octet_length(data) AS BIGINT) FROM agent_log WHERE agent = $1 ORDER BY first LIMIT 1");
            let q = q.bind(self.agent.blob());
            let oldest = conn.row(&q, |row| {
                let c = &mut Columns::of(row);
                Ok((c.unsigned()?, c.unsigned()?, c.unsigned()?))
            });
            let Some((first, lines, length)) = oldest.await? else { break };
            let q = sql("DELETE FROM agent_log WHERE agent = $1 AND first = $2");
            conn.execute(&q.bind(self.agent.blob()).bind(first)).await?;
            self.bytes = self.bytes.saturating_sub(length + CHUNK_ROW);
            self.first = first + lines;
        }
        Ok(())
    }
}

fn fixed(a: &Agent) -> [Value<'_>; 14] {
    values![
        a.id.blob(),
        a.name.as_str(),
        a.owner.blob(),
        blob(a.key),
        a.door.as_str(),
        a.kind.as_str(),
        blob(a.session),
        blob(a.node),
        a.select.as_ref().map(Selector::encode),
        &a.spec[..],
        a.restart.policy.as_str(),
        a.restart.max,
        a.restart.backoff_ms,
        a.created_at,
    ]
}

fn changing(life: &Life) -> [Value<'_>; 12] {
    values![
        life.status.as_str(),
        life.run.map(|run| i64::from(run.no)),
        life.run.map(|run| run.task.blob()),
        blob(life.node),
        life.restarts,
        life.in_a_row,
        life.kill.map(|kill| kill.at),
        life.kill.is_some_and(|kill| kill.force),
        life.started_at,
        life.next_at,
        life.ended_at,
        life.reason.as_deref(),
    ]
}

fn agent(row: &Row) -> Result<Agent, Failed> {
    let c = &mut Columns::of(row);
    let (id, name, owner, key, door, kind) = (c.id()?, c.get()?, c.id()?, c.id_or_null()?, c.get()?, c.word(Kind::parse)?);
    let (session, node) = (c.id_or_null()?, c.id_or_null()?);
    let select = c.get::<Option<&[u8]>>()?.map(Selector::decode).transpose()?;
    let spec = c.get()?;
    let restart = Restart { policy: c.word(Policy::parse)?, max: c.small()?, backoff_ms: c.unsigned()? };
    let created_at = c.get()?;
    let status = c.word(Status::parse)?;
    let run = c.get::<Option<i64>>()?.map(u32::try_from).transpose()?.zip(c.id_or_null()?).map(|(no, task)| Run { no, task });
    let (node_now, restarts, in_a_row) = (c.id_or_null()?, c.small()?, c.small()?);
    let (killed, force) = (c.get::<Option<i64>>()?, c.get()?);
    let life = Life {
        status,
        run,
        node: node_now,
        restarts,
        in_a_row,
        kill: killed.map(|at| Kill { at, force }),
        started_at: c.get()?,
        next_at: c.get()?,
        ended_at: c.get()?,
        reason: c.get()?,
    };
    Ok(Agent { id, name, owner, key, door, kind, session, node, select, spec, restart, created_at, life })
}

//! Erasing what a session held. Rows first, in steps that are short for the writer; a file goes once the
//! rows that counted on it are committed, and is remembered until it is gone.

use crate::dialect::{Conn, Row};
use crate::rows::{Columns, Id};
use crate::sessions::note;
use crate::sql::{Value, sql};
use crate::store::{Failed, Store, failed};
use async_trait::async_trait;
use hub_engine::ports::{Purges, Stored};
use hub_engine::records::{PurgeStart, PurgeStep, SessionAct};
use mesh_core::task::AttemptNo;
use mesh_core::{SessionId, TaskId, UnixMs, UserId};

#[async_trait]
impl Purges for Store {
    async fn begin_purge(&self, id: SessionId, by: Option<UserId>, now: UnixMs) -> Stored<PurgeStart> {
        self.write("purges.begin_purge", (id, by, now), |conn, (id, by, now)| Box::pin(begin(conn, *id, *by, *now))).await
    }

    async fn purge_step(&self, id: SessionId, after: Option<TaskId>, limit: u32) -> Stored<PurgeStep> {
        let erased = self
            .write("purges.purge_step", (id, after, limit), |conn, (id, after, limit)| Box::pin(erase(conn, *id, *after, *limit)))
            .await?;
        let (step, files) = erased;
        self.outputs.erased(&files).await;
        Ok(step)
    }

    async fn purging(&self, limit: u32) -> Stored<Vec<SessionId>> {
        let q = sql("SELECT id FROM sessions WHERE purging ORDER BY id LIMIT $1");
        self.all("purges.purging", q.bind(limit), |row| Columns::of(row).id()).await
    }

    async fn sweep(&self, limit: u32) -> Stored<u32> {
        let q = sql("SELECT task, attempt FROM erased_output LIMIT $1").bind(limit);
        let files = self.all("purges.sweep", q, |row| attempt(&mut Columns::of(row))).await?;
        if files.is_empty() {
            return Ok(0);
        }
        let count = files.len() as u32;
        self.outputs.remove_files(files.clone()).await.map_err(failed("purges.sweep"))?;
        self.write("purges.sweep", files, |conn, files| {
            Box::pin(async move {
                for (task, no) in files {
                    let q = sql("DELETE FROM erased_output WHERE task = $1 AND attempt = $2");
                    conn.execute(&q.bind(task.blob()).bind(no.0)).await?;
                }
                Ok(())
            })
        })
        .await?;
        Ok(count)
    }
}

fn attempt(c: &mut Columns<'_, '_>) -> Result<(TaskId, AttemptNo), Failed> {
    Ok((c.id()?, AttemptNo(c.unsigned()?)))
}

async fn begin(conn: &mut Conn, id: SessionId, by: Option<UserId>, now: UnixMs) -> Result<PurgeStart, Failed> {
    conn.lock("sessions", vec![id.blob()]).await?;
    let q = sql("SELECT closed_at IS NULL AND expired_at IS NULL, purged_at IS NOT NULL, purging FROM sessions WHERE id = $1");
    let standing = |row: &Row| {
        let c = &mut Columns::of(row);
        Ok((c.get::<bool>()?, c.get::<bool>()?, c.get::<bool>()?))
    };
    let Some((active, purged, purging)) = conn.row(&q.bind(id.blob()), standing).await? else { return Ok(PurgeStart::Unknown) };
    if active {
        return Ok(PurgeStart::Active);
    }
    if purged {
        return Ok(if purging { PurgeStart::Begun } else { PurgeStart::Done });
    }
    let open = sql("SELECT 1 FROM tasks WHERE session = $1 AND finished_at IS NULL LIMIT 1").bind(id.blob());
    if conn.row(&open, |_| Ok(())).await?.is_some() {
        return Ok(PurgeStart::TasksOpen);
    }
    conn.execute(&sql("UPDATE sessions SET purged_at = $1, purging = TRUE WHERE id = $2").bind(now).bind(id.blob())).await?;
    conn.execute(&sql("DELETE FROM grants WHERE session = $1").bind(id.blob())).await?;
    note(conn, id, (SessionAct::Purged, ""), by, now).await?;
    Ok(PurgeStart::Begun)
}

/// Attempts whose output is no more, and the bytes that their files had.
pub(crate) type Gone = Vec<(TaskId, AttemptNo, u64)>;

async fn erase(conn: &mut Conn, id: SessionId, after: Option<TaskId>, limit: u32) -> Result<(PurgeStep, Gone), Failed> {
    for (table, but) in [("session_memory", ""), ("messages", ""), ("session_events", "AND kind <> 'purged'")] {
        let q = format!("DELETE FROM {table} WHERE id IN (SELECT id FROM {table} WHERE session = $1 {but} ORDER BY id LIMIT $2)");
        if conn.execute(&sql(q).bind(id.blob()).bind(limit)).await? > 0 {
            return Ok((PurgeStep::Until(after), vec![]));
        }
    }
    if crate::audit::erase_session(conn, id, limit).await? > 0 {
        return Ok((PurgeStep::Until(after), vec![]));
    }
    if erase_logs(conn, id, limit).await? > 0 {
        return Ok((PurgeStep::Until(after), vec![]));
    }
    // Before the first id is the empty one.
    let after = after.map_or(vec![], |t| t.blob().to_vec());
    let q = sql("SELECT id FROM tasks WHERE session = $1 AND id > $2 ORDER BY id LIMIT $3");
    let tasks = conn.rows(&q.bind(id.blob()).bind(after).bind(limit), |row| Columns::of(row).id::<TaskId>()).await?;
    let Some(last) = tasks.last().copied() else {
        conn.execute(&sql("UPDATE sessions SET purging = FALSE WHERE id = $1").bind(id.blob())).await?;
        return Ok((PurgeStep::Done, vec![]));
    };
    Ok((PurgeStep::Until(Some(last)), erase_outputs(conn, &tasks).await?))
}

/// What the session's agents wrote. How many lines there were stays known.
async fn erase_logs(conn: &mut Conn, id: SessionId, limit: u32) -> Result<u64, Failed> {
    let chunks = "DELETE FROM agent_log WHERE (agent, first) IN (SELECT l.agent, l.first FROM agent_log l \
         JOIN agents a ON a.id = l.agent WHERE a.session = $1 LIMIT $2)";
    let erased = conn.execute(&sql(chunks).bind(id.blob()).bind(limit)).await?;
    if erased > 0 {
        return Ok(erased);
    }
    let heads = "UPDATE agent_log_heads SET first = total, open_first = total, bytes = 0, open = $1, carry = $1 \
         WHERE agent IN (SELECT id FROM agents WHERE session = $2) AND (first < total OR octet_length(carry) > 0)";
    conn.execute(&sql(heads).bind(Vec::<u8>::new()).bind(id.blob())).await
}

/// A row of `task, attempt, kept_len`.
pub(crate) fn file(row: &Row) -> Result<(TaskId, AttemptNo, u64), Failed> {
    let c = &mut Columns::of(row);
    let (task, no) = attempt(c)?;
    Ok((task, no, c.unsigned()?))
}

/// Erases the output and results of tasks that have ended, and names the files that go with it.
pub(crate) async fn erase_outputs(conn: &mut Conn, tasks: &[TaskId]) -> Result<Gone, Failed> {
    let ids = || Value::List(tasks.iter().map(Id::blob).collect());
    let listed = conn.dialect().listed("$1");
    conn.lock("tasks", tasks.iter().map(Id::blob).collect()).await?;
    // First the end of all keeping, for what is on its way too: no row gets more from here on, also none
    // of an attempt that has not sent anything yet. Then what each has is what it had.
    let none = sql(format!(
        "INSERT INTO outputs (task, attempt, durable_seq, kept_seq, kept_len, stdout_bytes, stderr_bytes, truncated, held) \
         SELECT DISTINCT task, attempt, 0, 0, 0, 0, 0, TRUE, $2 FROM task_events \
         WHERE task IN ({listed}) AND attempt IS NOT NULL ON CONFLICT DO NOTHING"
    ));
    conn.execute(&none.bind(ids()).bind(Vec::<u8>::new())).await?;
    let closed = sql(format!("UPDATE outputs SET truncated = TRUE WHERE task IN ({listed}) AND NOT truncated"));
    conn.execute(&closed.bind(ids())).await?;
    let q = sql(format!("SELECT task, attempt, kept_len FROM outputs WHERE task IN ({listed}) AND kept_seq > 0"));
    let gone = conn.rows(&q.bind(ids()), file).await?;
    let files = sql(format!(
        "INSERT INTO erased_output (task, attempt) SELECT task, attempt FROM outputs \
         WHERE task IN ({listed}) AND kept_len > 0 ON CONFLICT DO NOTHING"
    ));
    conn.execute(&files.bind(ids())).await?;
    let rows = sql(format!("UPDATE outputs SET kept_seq = 0, kept_len = 0, held = $2 WHERE task IN ({listed}) AND kept_seq > 0"));
    conn.execute(&rows.bind(ids()).bind(Vec::<u8>::new())).await?;
    let results = sql(format!("UPDATE tasks SET result = NULL WHERE id IN ({listed}) AND result IS NOT NULL"));
    conn.execute(&results.bind(ids())).await?;
    Ok(gone)
}

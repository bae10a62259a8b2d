//! Erasing what was kept long enough. Each step is one short transaction, which names the files that
//! nobody counts on any more; they go by the sweep of [`crate::purges`].

use crate::dialect::{Conn, Row};
use crate::purges::{Gone, erase_outputs, file};
use crate::rows::{Columns, Id};
use crate::sql::{Sql, Value, sql};
use crate::store::{Failed, Store};
use async_trait::async_trait;
use hub_engine::ports::{Retention, Stored};
use hub_engine::records::Erased;
use mesh_core::{TaskId, UnixMs};
use std::collections::BTreeMap;

/// About what the row of a task and its places in indexes take beside its spec and result.
const TASK_ROW: i64 = 1000;
/// The same of a line of history.
const EVENT_ROW: i64 = 150;

#[async_trait]
impl Retention for Store {
    async fn erase_output(&self, before: UnixMs, limit: u32) -> Stored<Erased> {
        let with = (before, limit);
        let (tasks, gone) =
            self.write("retention.erase_output", with, |conn, (before, limit)| Box::pin(aged_output(conn, *before, *limit))).await?;
        Ok(self.gone(tasks, &gone).await)
    }

    async fn erase_files(&self, enough: u64, limit: u32) -> Stored<Erased> {
        let with = (enough, limit);
        let (tasks, gone) =
            self.write("retention.erase_files", with, |conn, (enough, limit)| Box::pin(oldest_files(conn, *enough, *limit))).await?;
        Ok(self.gone(tasks, &gone).await)
    }

    async fn erase_tasks(&self, before: UnixMs, enough: u64, limit: u32) -> Stored<Erased> {
        let with = (before, enough, limit);
        let (tasks, bytes, gone) = self
            .write("retention.erase_tasks", with, |conn, (before, enough, limit)| Box::pin(aged_tasks(conn, *before, *enough, *limit)))
            .await?;
        self.outputs.erased(&gone).await;
        Ok(Erased { tasks, bytes })
    }
}

impl Store {
    async fn gone(&self, tasks: u32, gone: &Gone) -> Erased {
        self.outputs.erased(gone).await;
        Erased { tasks, bytes: gone.iter().map(|(.., bytes)| bytes).sum() }
    }
}

fn ended(conn: &Conn, columns: &str, erased: bool, which: &str, before: UnixMs, limit: u32) -> Sql {
    let by_end = conn.dialect().by_index("tasks_end");
    let erased = if erased { "TRUE" } else { "FALSE" };
    let q = format!(
        "SELECT {columns} FROM tasks{by_end} WHERE output_erased = {erased} AND finished_at < $1 {which} ORDER BY finished_at, id LIMIT $2"
    );
    sql(q).bind(before).bind(limit)
}

async fn aged_output(conn: &mut Conn, before: UnixMs, limit: u32) -> Result<(u32, Gone), Failed> {
    let q = ended(conn, "id", false, "", before, limit);
    let tasks = conn.rows(&q, |row| Columns::of(row).id::<TaskId>()).await?;
    let gone = erase_outputs(conn, &tasks).await?;
    mark(conn, &tasks).await?;
    Ok((tasks.len() as u32, gone))
}

async fn oldest_files(conn: &mut Conn, enough: u64, limit: u32) -> Result<(u32, Gone), Failed> {
    let by_task = conn.dialect().by_index("outputs_in_files");
    let q = format!(
        "SELECT o.task, CAST(SUM(o.kept_len) AS BIGINT) FROM outputs o{by_task} JOIN tasks t ON t.id = o.task \
         WHERE o.kept_len > 0 AND t.finished_at IS NOT NULL GROUP BY o.task ORDER BY o.task LIMIT $1"
    );
    let found = conn.rows(&sql(q).bind(limit), sized).await?;
    let (tasks, _) = until(enough, found);
    let gone = erase_outputs(conn, &tasks).await?;
    mark(conn, &tasks).await?;
    Ok((tasks.len() as u32, gone))
}

async fn aged_tasks(conn: &mut Conn, before: UnixMs, enough: u64, limit: u32) -> Result<(u32, u64, Gone), Failed> {
    let mut ends: Vec<(UnixMs, TaskId)> = vec![];
    for erased in [true, false] {
        // A fan-out goes as a whole, when its parent is due: that one ended last.
        let q = ended(conn, "finished_at, id", erased, "AND parent IS NULL", before, limit);
        let place = |row: &Row| {
            let c = &mut Columns::of(row);
            Ok((c.get()?, c.id()?))
        };
        ends.extend(conn.rows(&q, place).await?);
    }
    ends.sort_unstable();
    ends.truncate(limit as usize);
    if ends.is_empty() {
        return Ok((0, 0, vec![]));
    }
    let listed = conn.dialect().listed("$1");
    let sizes_by = |column: &str| {
        format!(
            "SELECT t.id, CAST({TASK_ROW} + {EVENT_ROW} * t.events + octet_length(t.spec) + COALESCE(octet_length(t.result), 0) \
             + COALESCE((SELECT octet_length(s.spec) FROM task_specs s WHERE s.task = t.id), 0) \
             + COALESCE((SELECT SUM(octet_length(o.held)) FROM outputs o WHERE o.task = t.id), 0) AS BIGINT), t.parent \
             FROM tasks t WHERE t.{column} IN ({listed})"
        )
    };
    // Two selects, each by its index; what has no parent is nobody's child, so that none is in both.
    let q = format!("{} UNION ALL {}", sizes_by("id"), sizes_by("parent"));
    let children = sql(format!("SELECT parent, COUNT(*) FROM tasks WHERE parent IN ({listed}) GROUP BY parent"));
    let listed_ends = |ends: &[(UnixMs, TaskId)]| Value::List(ends.iter().map(|(_, id)| id.blob()).collect());
    let children: BTreeMap<TaskId, u64> = conn.rows(&children.bind(listed_ends(&ends)), sized).await?.into_iter().collect();
    // One at least, and of the next as many as one step may take with their children.
    let mut rows = 0u64;
    let fits = |(_, id): &(UnixMs, TaskId)| {
        let first = rows == 0;
        rows += 1 + children.get(id).copied().unwrap_or(0);
        first || rows <= u64::from(limit)
    };
    let ends: Vec<_> = ends.into_iter().take_while(fits).collect();
    let mut sizes: BTreeMap<TaskId, (u64, Vec<TaskId>)> = BTreeMap::new();
    let family = |row: &Row| {
        let c = &mut Columns::of(row);
        Ok((c.id::<TaskId>()?, c.unsigned()?, c.id_or_null::<TaskId>()?))
    };
    for (id, bytes, parent) in conn.rows(&sql(q).bind(listed_ends(&ends)), family).await? {
        let (sum, ids) = sizes.entry(parent.unwrap_or(id)).or_default();
        *sum = sum.saturating_add(bytes);
        ids.push(id);
    }
    let found = ends.iter().filter_map(|(_, id)| Some((*id, sizes.get(id)?.0))).collect();
    let (roots, bytes) = until(enough, found);
    let tasks: Vec<TaskId> = roots.iter().filter_map(|id| sizes.remove(id)).flat_map(|(_, ids)| ids).collect();
    let ids = || Value::List(tasks.iter().map(Id::blob).collect());
    conn.lock("tasks", tasks.iter().map(Id::blob).collect()).await?;
    let q = sql(format!("SELECT task, attempt, kept_len FROM outputs WHERE task IN ({listed})"));
    let gone = conn.rows(&q.bind(ids()), file).await?;
    let files = sql(format!(
        "INSERT INTO erased_output (task, attempt) SELECT task, attempt FROM outputs \
         WHERE task IN ({listed}) AND kept_len > 0 ON CONFLICT DO NOTHING"
    ));
    conn.execute(&files.bind(ids())).await?;
    for table in ["outputs", "task_events", "task_specs"] {
        conn.execute(&sql(format!("DELETE FROM {table} WHERE task IN ({listed})")).bind(ids())).await?;
    }
    let count = conn.execute(&sql(format!("DELETE FROM tasks WHERE id IN ({listed})")).bind(ids())).await?;
    Ok((count as u32, bytes, gone))
}

async fn mark(conn: &mut Conn, tasks: &[TaskId]) -> Result<(), Failed> {
    let listed = conn.dialect().listed("$1");
    let ids = Value::List(tasks.iter().map(Id::blob).collect());
    conn.execute(&sql(format!("UPDATE tasks SET output_erased = TRUE WHERE id IN ({listed})")).bind(ids)).await.map(drop)
}

fn sized(row: &Row) -> Result<(TaskId, u64), Failed> {
    let c = &mut Columns::of(row);
    Ok((c.id()?, c.unsigned()?))
}

/// As many of the first as come to `enough` bytes, and what they come to.
fn until(enough: u64, found: Vec<(TaskId, u64)>) -> (Vec<TaskId>, u64) {
    let (mut taken, mut sum) = (vec![], 0u64);
    for (id, bytes) in found {
        if sum >= enough {
            break;
        }
        sum = sum.saturating_add(bytes);
        taken.push(id);
    }
    (taken, sum)
}

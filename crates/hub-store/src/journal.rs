//! Tasks and their history.

use crate::dialect::{Conn, Row};
use crate::lists;
use crate::rows::{Columns, EVENT_COLUMNS, Id, TASK_COLUMNS, TASK_OUTPUT, blob, child_end, event, task};
use crate::sql::{IdBytes, Rows, Value, sql, values};
use crate::store::{Failed, Store};
use crate::writer::Bulk;
use async_trait::async_trait;
use futures::future::BoxFuture;
use hub_engine::ports::{Applied, Besides, Fan, Journal, Stored, Window};
use hub_engine::records::{OutputTotals, Task, TaskEvent, TaskFilter};
use mesh_core::fan::ChildEnd;
use mesh_core::output::Digests;
use mesh_core::select::Selector;
use mesh_core::spec::INLINE_SPEC_BYTES;
use mesh_core::task::{Action, AttemptNo, Event, Progress};
use mesh_core::{SessionId, TaskId, UnixMs};
use std::collections::BTreeMap;
use std::sync::LazyLock;

#[async_trait]
impl Journal for Store {
    async fn accept(&self, task: &Task) -> Stored<()> {
        self.writer.bulk(Accept::One(Box::new(task.clone()))).await
    }

    async fn accept_fan(&self, fan: &Fan) -> Stored<()> {
        self.writer.bulk(Accept::Fan(Box::new(fan.clone()))).await
    }

    async fn apply(&self, id: TaskId, event: &Event, besides: Besides, now: UnixMs) -> Stored<Applied> {
        self.writer.bulk(Apply::new(id, event.clone(), besides, now)).await
    }

    async fn task(&self, id: TaskId) -> Stored<Option<Task>> {
        let Some(mut task) = self.narrow(id).await? else { return Ok(None) };
        if task.spec.is_empty()
            && let Some((_, spec)) = self.specs(&[id], usize::MAX).await?.pop()
        {
            task.spec = spec;
        }
        Ok(Some(task))
    }

    async fn narrow(&self, id: TaskId) -> Stored<Option<Task>> {
        self.one("journal.task", sql(TASK_BY_ID.as_str()).bind(id.blob()), only_task).await
    }

    async fn tasks(&self, filter: &TaskFilter, window: Window<TaskId>) -> Stored<Vec<Task>> {
        match lists::tasks(self.read.dialect(), filter, window) {
            Some(q) => self.all("journal.tasks", q, only_task).await,
            None => Ok(vec![]),
        }
    }

    async fn specs(&self, ids: &[TaskId], max_bytes: usize) -> Stored<Vec<(TaskId, Vec<u8>)>> {
        let list = self.read.dialect().listed("$1");
        let query = |columns: &str| format!("SELECT t.id, {columns} FROM {SPEC_TABLES} WHERE t.id IN ({list})");
        let bytes = |ids: &[TaskId]| Value::List(ids.iter().map(Id::blob).collect());
        // A length is read without what it is the length of.
        let q = sql(query("CAST(octet_length(t.spec) AS BIGINT), CAST(octet_length(s.spec) AS BIGINT)")).bind(bytes(ids));
        let lengths = self.all("journal.specs", q, |row| {
            let c = &mut Columns::of(row);
            Ok((c.id::<TaskId>()?, c.length()? + c.length()?))
        });
        let lengths: BTreeMap<TaskId, usize> = lengths.await?.into_iter().collect();
        let mut taken: Vec<TaskId> = vec![];
        let mut sum = 0usize;
        for id in ids {
            let Some(length) = lengths.get(id) else { continue };
            sum = sum.saturating_add(*length);
            if sum > max_bytes && !taken.is_empty() {
                break;
            }
            taken.push(*id);
        }
        let q = sql(query("COALESCE(s.spec, t.spec)")).bind(bytes(&taken));
        let read = self.all("journal.specs", q, |row| {
            let c = &mut Columns::of(row);
            Ok((c.id::<TaskId>()?, c.get::<Vec<u8>>()?))
        });
        let mut specs: BTreeMap<TaskId, Vec<u8>> = read.await?.into_iter().collect();
        Ok(taken.into_iter().filter_map(|id| specs.remove_entry(&id)).collect())
    }

    async fn open_tasks(&self, session: Option<SessionId>, after: Option<TaskId>, limit: u32) -> Stored<Vec<Task>> {
        self.all("journal.open_tasks", lists::open_tasks(self.read.dialect(), session, after, limit), only_task).await
    }

    async fn history(&self, id: TaskId) -> Stored<Vec<TaskEvent>> {
        let q = sql(format!("SELECT {EVENT_COLUMNS} FROM task_events WHERE task = $1 ORDER BY seq"));
        self.all("journal.history", q.bind(id.blob()), event).await
    }

    async fn ends_of(&self, parent: TaskId) -> Stored<Option<Vec<ChildEnd>>> {
        if self.one("journal.ends_of", lists::open_child(self.read.dialect(), parent), |_| Ok(())).await?.is_some() {
            return Ok(None);
        }
        // What has ended changes no more.
        let q = sql("SELECT id, finished_at, state, reason_code, reason_detail, exit_code, signal FROM tasks WHERE parent = $1");
        self.all("journal.ends_of", q.bind(parent.blob()), child_end).await.map(Some)
    }
}

static TASK_SELECT: LazyLock<String> = LazyLock::new(|| format!("SELECT {TASK_COLUMNS} FROM tasks t {TASK_OUTPUT}"));
static TASK_BY_ID: LazyLock<String> = LazyLock::new(|| format!("{} WHERE t.id = $1", *TASK_SELECT));
const SPEC_TABLES: &str = "tasks t LEFT JOIN task_specs s ON s.task = t.id";

fn only_task(row: &Row) -> Result<Task, Failed> {
    task(row).map(|(task, _)| task)
}

pub(crate) enum Accept {
    One(Box<Task>),
    Fan(Box<Fan>),
}

impl Accept {
    fn tasks(&self) -> impl Iterator<Item = &Task> {
        let (one, fan) = match self {
            Self::One(task) => (Some(&**task), None),
            Self::Fan(fan) => (None, Some(fan.tasks())),
        };
        one.into_iter().chain(fan.into_iter().flatten())
    }
}

impl Bulk for Accept {
    type Outcome = ();
    const OPERATION: &'static str = "journal.accept";

    fn write<'c>(conn: &'c mut Conn, jobs: &'c [&'c Self]) -> BoxFuture<'c, Result<Vec<()>, Failed>> {
        Box::pin(async move {
            let mut lines = vec![];
            let mut tasks = vec![];
            for task in jobs.iter().flat_map(|job| job.tasks()) {
                let history = TaskEvent::first(task);
                tasks.push((task, history.len() as u64));
                lines.extend(history.into_iter().map(|line| (task.id, line)));
            }
            insert_tasks(conn, &tasks).await?;
            insert_specs(conn, tasks.iter().map(|(task, _)| *task)).await?;
            insert_lines(conn, &lines).await?;
            Ok(vec![(); jobs.len()])
        })
    }
}

pub(crate) struct Apply {
    id: TaskId,
    event: Event,
    besides: Besides,
    now: UnixMs,
}

/// A stored task while a group of events passes over it.
struct Held {
    task: Task,
    events: u64,
    changed: bool,
    /// It has another node, or an attempt on one for the first time.
    moved: bool,
    /// Told of the output of this attempt.
    digests: Option<(AttemptNo, Digests)>,
}

impl Bulk for Apply {
    type Outcome = Applied;
    const OPERATION: &'static str = "journal.apply";

    fn write<'c>(conn: &'c mut Conn, jobs: &'c [&'c Self]) -> BoxFuture<'c, Result<Vec<Applied>, Failed>> {
        Box::pin(async move {
            let mut held = load(conn, jobs).await?;
            let mut lines = vec![];
            let mut outcomes = Vec::with_capacity(jobs.len());
            for job in jobs {
                outcomes.push(match held.get_mut(&job.id) {
                    None => Applied::Unknown,
                    Some(held) => job.step(held, &mut lines),
                });
            }
            // A column that is not set keeps its indexes as they are.
            let (moved, stayed): (Vec<&Held>, Vec<&Held>) = held.values().filter(|h| h.changed).partition(|h| h.moved);
            update_tasks(conn, &moved, &CHANGING_COLUMNS).await?;
            update_tasks(conn, &stayed, &CHANGING_COLUMNS[1..]).await?;
            insert_lines(conn, &lines).await?;
            set_digests(conn, held.values()).await?;
            bring_specs(conn, &mut outcomes).await?;
            Ok(outcomes)
        })
    }
}

/// An order says what is to be done; whoever is told of another step has no need to know.
async fn bring_specs(conn: &mut Conn, outcomes: &mut [Applied]) -> Result<(), Failed> {
    for outcome in outcomes {
        let Applied::Done(task, actions) = outcome else { continue };
        if task.spec.is_empty() && actions.iter().any(|a| matches!(a, Action::Order { .. })) {
            let q = sql("SELECT spec FROM task_specs WHERE task = $1").bind(task.id.blob());
            task.spec = conn.row(&q, |row| row.get(0)).await?.unwrap_or_default();
        }
    }
    Ok(())
}

impl Apply {
    pub(crate) fn new(id: TaskId, event: Event, besides: Besides, now: UnixMs) -> Self {
        Self { id, event, besides, now }
    }
    /// A start is acknowledged to nobody, and its node says it again on each new link.
    pub(crate) fn may_lag(&self) -> bool {
        matches!(self.event, Event::Started { .. })
    }

    fn step(&self, held: &mut Held, lines: &mut Vec<(TaskId, TaskEvent)>) -> Applied {
        let task = &mut held.task;
        let (progress, actions) = match task.decide(&self.event, self.now) {
            Ok(decided) => decided,
            Err(refused) => return Applied::Refused(refused),
        };
        if progress.attempt.as_ref().map(|a| a.no) != task.progress.attempt.as_ref().map(|a| a.no) {
            // Nothing of the attempt before is shown for this one.
            task.output = OutputTotals::default();
            (task.result, task.sandbox_applied, task.digests) = (None, None, None);
        }
        let node = |p: &Progress| p.attempt.as_ref().map(|a| a.node);
        held.moved |= node(&progress) != node(&task.progress);
        task.progress = progress;
        let Besides { result, sandbox_applied, signed, digests } = self.besides.clone();
        task.result = result.or(task.result.take());
        task.sandbox_applied = sandbox_applied.or(task.sandbox_applied.take());
        task.signed = signed.or(task.signed.take());
        if let (Some(digests), Some(no)) = (digests, self.event.attempt()) {
            task.digests = Some(digests);
            held.digests = Some((no, digests));
        }
        held.events += 1;
        held.changed = true;
        lines.push((task.id, TaskEvent::of(held.events, self.now, &self.event, task)));
        Applied::Done(Box::new(task.clone()), actions)
    }
}

/// The tasks of a group, kept from other hubs until its commit.
async fn load(conn: &mut Conn, jobs: &[&Apply]) -> Result<BTreeMap<TaskId, Held>, Failed> {
    let mut ids: Vec<IdBytes> = jobs.iter().map(|j| j.id.blob()).collect();
    ids.sort_unstable();
    ids.dedup();
    conn.lock("tasks", ids.clone()).await?;
    let found = conn.each((&TASK_SELECT, "t.id"), ids, task).await?;
    Ok(found.into_iter().map(|(task, events)| (task.id, Held { task, events, changed: false, moved: false, digests: None })).collect())
}

/// What never changes in a task.
const FIXED_COLUMNS: &str = "id, session, named_node, \"user\", key, agent, door, skill, digest, seal, timeout_secs, queue_secs, \
    selector, priority, not_before, deadline, retries, backoff_ms, on_lost, lost_after, created_at, spec, parent, children";

const FIXED: usize = 24;

fn fixed(task: &Task) -> [Value<'_>; FIXED] {
    values![
        task.id.blob(),
        blob(task.session),
        blob(task.named_node),
        task.actor.user.blob(),
        blob(task.actor.key),
        blob(task.actor.agent),
        task.actor.door.as_str(),
        task.skill.as_str(),
        &task.digest,
        &task.seal,
        task.timeout_secs,
        task.queue_secs,
        task.terms.select.as_ref().map(Selector::encode),
        task.terms.priority,
        task.terms.not_before,
        task.terms.deadline,
        task.terms.retries,
        task.terms.backoff_ms,
        task.terms.on_lost.as_str(),
        task.terms.lost_after,
        task.created_at,
        if is_apart(task) { &[] } else { &task.spec[..] },
        blob(task.parent),
        task.children.as_ref().map(|c| c.total),
    ]
}

/// The node comes first, since few changes are of it.
const CHANGING_COLUMNS: [&str; 20] = [
    "attempt_node",
    "state",
    "attempt",
    "granted",
    "cancel_at",
    "cancel_reason",
    "reason_code",
    "reason_detail",
    "exit_code",
    "signal",
    "assigned_at",
    "started_at",
    "finished_at",
    "retried",
    "retry_at",
    "sandbox_applied",
    "signed_key",
    "signed_digest",
    "result",
    "events",
];

fn changing(task: &Task, events: u64) -> [Value<'_>; 20] {
    let p = &task.progress;
    let attempt = p.attempt.as_ref();
    values![
        attempt.map(|a| a.node.blob()),
        p.state.as_str(),
        attempt.map(|a| a.no.0 as i64),
        attempt.and_then(|a| blob(a.granted)),
        p.cancel.as_ref().map(|c| c.at),
        p.cancel.as_ref().map(|c| c.reason.as_str()),
        p.reason.as_ref().map(|r| r.code.as_str()),
        p.reason.as_ref().map(|r| r.detail.as_str()),
        p.exit_code,
        p.signal,
        p.assigned_at,
        p.started_at,
        p.finished_at,
        p.retried,
        p.retry_at,
        task.sandbox_applied.as_deref(),
        task.signed.as_ref().map(|s| s.0.as_str()),
        task.signed.as_ref().map(|s| &s.1),
        task.result.as_deref(),
        events,
    ]
}

/// Whether the spec has a row of its own.
fn is_apart(task: &Task) -> bool {
    task.spec.len() > INLINE_SPEC_BYTES
}

async fn insert_tasks(conn: &mut Conn, tasks: &[(&Task, u64)]) -> Result<(), Failed> {
    let values = tasks.iter().flat_map(|(task, events)| fixed(task).into_iter().chain(changing(task, *events)));
    let rows = Rows { width: FIXED + CHANGING_COLUMNS.len(), values: values.collect() };
    conn.insert("tasks", &format!("{FIXED_COLUMNS}, {}", CHANGING_COLUMNS.join(", ")), &rows, "").await
}

async fn insert_specs(conn: &mut Conn, tasks: impl Iterator<Item = &Task> + Send) -> Result<(), Failed> {
    let rows = Rows::of(tasks.filter(|t| is_apart(t)).map(|t| values![t.id.blob(), &t.spec[..]]));
    conn.insert("task_specs", "task, spec", &rows, "").await
}

/// Sets `columns`, the last of [`CHANGING_COLUMNS`].
async fn update_tasks(conn: &mut Conn, tasks: &[&Held], columns: &[&str]) -> Result<(), Failed> {
    let others = CHANGING_COLUMNS.len() - columns.len();
    let values = tasks.iter().flat_map(|h| changing(&h.task, h.events).into_iter().skip(others).chain(values![h.task.id.blob()]));
    let rows = Rows { width: columns.len() + 1, values: values.collect() };
    conn.update("tasks", columns, &rows).await
}

/// Beside what the row has, which is the output's; a program that wrote nothing has no row yet.
async fn set_digests(conn: &mut Conn, held: impl Iterator<Item = &Held> + Send) -> Result<(), Failed> {
    let told = held.filter_map(|h| h.digests.as_ref().map(|(no, d)| (h.task.id, no, d)));
    let rows =
        Rows::of(told.map(|(task, no, d)| values![task.blob(), no.0, 0i64, 0i64, 0i64, 0i64, 0i64, false, &[][..], &d.stdout, &d.stderr]));
    let columns =
        "task, attempt, durable_seq, kept_seq, kept_len, stdout_bytes, stderr_bytes, truncated, held, stdout_sha256, stderr_sha256";
    let after = " ON CONFLICT (task, attempt) DO UPDATE SET stdout_sha256 = excluded.stdout_sha256, stderr_sha256 = excluded.stderr_sha256";
    conn.insert("outputs", columns, &rows, after).await
}

async fn insert_lines(conn: &mut Conn, lines: &[(TaskId, TaskEvent)]) -> Result<(), Failed> {
    let rows = Rows::of(lines.iter().map(|(task, line)| {
        values![
            task.blob(),
            line.seq,
            line.at,
            line.kind.as_str(),
            line.attempt.map(|a| a.0 as i64),
            line.state.as_str(),
            blob(line.node),
            line.detail.as_str(),
        ]
    }));
    conn.insert("task_events", "task, seq, at, kind, attempt, state, node, detail", &rows, "").await
}

//! How long a page of a list takes in a store of many tasks, and how long the store takes to open.
//!
//! `cargo bench -p hub-store --bench pages [-- --rows 1000000 --samples 200 --json FILE]`. A table of times on one
//! machine; nothing is asserted here. What must hold anywhere (each list is read in the order of an index)
//! is a test in `src/lists.rs`.

use futures::StreamExt;
use hub_engine::ports::{Besides, Journal, Meta, Window};
use hub_engine::records::{Task, TaskFilter};
use hub_store::{Database, Store};
use hub_testkit::contract::sample;
use mesh_core::task::{Attempt, Event, Outcome, TaskState};
use mesh_core::{NodeId, SessionId, TaskId, UserId};
use mesh_process::{Clock, SystemClock, Tasks};
use rusqlite::{Connection, params};
use std::fmt::Write;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

const T0: i64 = 1_700_000_000_000;
/// Milliseconds between two tasks.
const STEP: i64 = 10;
const GRACE: Duration = Duration::from_secs(60);
/// Most items of a page, and the one that says that there is another page.
const LIMIT: u32 = 501;

/// Two users have nearly everything, and each has what the other has not.
const ANN: u64 = 1;
const BEN: u64 = 2;
/// Three tasks.
const EVE: u64 = 3;
const NOBODY: u64 = 99;

/// The first bytes are a time, as in a real id.
fn bytes(kind: u8, n: u64) -> [u8; 16] {
    let mut id = [kind; 16];
    id[8..].copy_from_slice(&n.to_be_bytes());
    id
}
fn user(n: u64) -> UserId {
    UserId::from_bytes(bytes(1, n))
}
fn node(n: u64) -> NodeId {
    NodeId::from_bytes(bytes(2, n))
}
fn session(n: u64) -> SessionId {
    SessionId::from_bytes(bytes(3, n))
}
fn task_id(i: i64) -> TaskId {
    // Spread like random bits, and the same in each run.
    let spread = (i as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15).to_be_bytes();
    let mut random = [0; 10];
    random[..8].copy_from_slice(&spread);
    TaskId::from_parts(T0 + i * STEP, random)
}

struct Made {
    user: u64,
    node: u64,
    session: Option<u64>,
    state: TaskState,
    skill: &'static str,
}

fn made(i: i64, rows: i64) -> Made {
    let ann = i % 2 == 0;
    let eve = i == 5 || i == rows / 2 + 1 || i == rows - 1;
    Made {
        user: if eve {
            EVE
        } else if ann {
            ANN
        } else {
            BEN
        },
        node: if ann { 1 + (i as u64 / 2) % 20 } else { 21 + (i as u64 / 2) % 20 },
        // One of Ben's has a tenth of everything.
        session: match i % 10 {
            1 => Some(1),
            2 => Some(10 + (i as u64 / 10) % 500),
            _ => None,
        },
        state: match i {
            _ if i >= rows - 200 => TaskState::Pending,
            _ if i >= rows - 250 => TaskState::Running,
            _ if i == rows / 3 => TaskState::Cancelled,
            _ if !ann && i % 4 == 1 => TaskState::Failed,
            _ => TaskState::Succeeded,
        },
        skill: match i {
            _ if i == 7 || i == rows / 2 => "browser",
            _ if !ann && i % 3 == 0 => "echo",
            _ => "shell",
        },
    }
}

fn fill(dir: &Path, rows: i64) {
    let mut conn = Connection::open(dir.join("hub.db")).unwrap();
    // Only for filling it: a page of 4 KiB a time, and nothing need survive.
    conn.execute_batch("PRAGMA synchronous = OFF; PRAGMA cache_size = -262144; PRAGMA foreign_keys = OFF").unwrap();
    let t = conn.transaction().unwrap();
    {
        let mut insert = t
            .prepare(
                "INSERT INTO tasks (id, session, named_node, user, door, skill, digest, seal, timeout_secs, queue_secs, created_at, \
                 state, attempt, attempt_node, granted, exit_code, assigned_at, started_at, finished_at, sandbox_applied, signed_key, \
                 signed_digest, events, spec) VALUES (?, ?, NULL, ?, 'rest', ?, ?, ?, 60, 60, ?, ?, ?, ?, ?, 0, ?, ?, ?, 'none', 'key', ?, 4, ?)",
            )
            .unwrap();
        let mut output = t.prepare("INSERT INTO outputs VALUES (?, 4294967297, 2, 2, 0, 60, 0, 0, ?)").unwrap();
        for i in 0..rows {
            let (m, id, at) = (made(i, rows), task_id(i), T0 + i * STEP);
            let placed = m.state != TaskState::Pending;
            let end = m.state.is_final().then_some(at + 9);
            let session = m.session.map(session);
            insert
                .execute(params![
                    &id.as_bytes()[..],
                    session.as_ref().map(|s| &s.as_bytes()[..]),
                    &user(m.user).as_bytes()[..],
                    m.skill,
                    &[4u8; 32][..],
                    &[5u8; 32][..],
                    at,
                    m.state.as_str(),
                    placed.then_some(4_294_967_297i64),
                    placed.then(|| node(m.node).as_bytes().to_vec()),
                    placed.then(|| bytes(9, 1).to_vec()),
                    at,
                    at + 5,
                    end,
                    &[6u8; 32][..],
                    &[7u8; 60][..],
                ])
                .unwrap();
            if i % 3 == 0 {
                output.execute(params![&id.as_bytes()[..], &[8u8; 60][..]]).unwrap();
            }
        }
    }
    t.commit().unwrap();
    conn.execute_batch("PRAGMA wal_checkpoint(TRUNCATE)").unwrap();
}

/// What is asked for, in words.
fn filters(rows: i64) -> Vec<(String, TaskFilter)> {
    let f = TaskFilter::default;
    let at = |part: i64| T0 + rows * STEP * part / 100;
    let narrow: Vec<(&str, TaskFilter)> = vec![
        ("node", TaskFilter { node: Some(node(1)), ..f() }),
        ("node of Ben", TaskFilter { node: Some(node(21)), ..f() }),
        ("node, none", TaskFilter { node: Some(node(77)), ..f() }),
        ("session, 1/10", TaskFilter { session: Some(session(1)), ..f() }),
        ("session", TaskFilter { session: Some(session(10)), ..f() }),
        ("session, none", TaskFilter { session: Some(session(7)), ..f() }),
        ("state succeeded", TaskFilter { state: Some(TaskState::Succeeded), ..f() }),
        ("state failed", TaskFilter { state: Some(TaskState::Failed), ..f() }),
        ("state cancelled, 1", TaskFilter { state: Some(TaskState::Cancelled), ..f() }),
        ("state running", TaskFilter { state: Some(TaskState::Running), ..f() }),
        ("state assigned, none", TaskFilter { state: Some(TaskState::Assigned), ..f() }),
        ("skill shell", TaskFilter { skill: Some("shell".into()), ..f() }),
        ("skill echo", TaskFilter { skill: Some("echo".into()), ..f() }),
        ("skill browser, 2", TaskFilter { skill: Some("browser".into()), ..f() }),
        ("skill, none", TaskFilter { skill: Some("container".into()), ..f() }),
        ("since half", TaskFilter { since: Some(at(50)), ..f() }),
        ("until half", TaskFilter { until: Some(at(50)), ..f() }),
        ("since and until, 1/100", TaskFilter { since: Some(at(49)), until: Some(at(50)), ..f() }),
        ("since the future", TaskFilter { since: Some(at(200)), ..f() }),
        ("until the past", TaskFilter { until: Some(T0 - 1), ..f() }),
    ];
    let mut all = vec![("everything".to_owned(), f())];
    for (name, who) in [("Ann", ANN), ("Eve, 3", EVE), ("nobody", NOBODY)] {
        all.push((format!("user {name}"), TaskFilter { user: Some(user(who)), ..f() }));
    }
    all.extend(narrow.iter().map(|(name, filter)| (name.to_string(), filter.clone())));
    for (name, who) in [("Ann", ANN), ("Eve", EVE)] {
        all.extend(
            narrow.iter().map(|(what, filter)| (format!("user {name} + {what}"), TaskFilter { user: Some(user(who)), ..filter.clone() })),
        );
    }
    all
}

struct Table {
    clock: SystemClock,
    cpu: Duration,
    text: String,
    rows: Vec<serde_json::Value>,
}

impl Table {
    /// CPU time is of the whole process, and of the mean: a neighbour on the machine does not change it much.
    fn row(&mut self, what: &str, mut times: Vec<Duration>, note: String) {
        let cpu = cpu_time();
        let each = (cpu - self.cpu).as_secs_f64() * 1e3 / times.len() as f64;
        times.sort();
        let at = |part: usize| times[(times.len() * part / 100).min(times.len() - 1)].as_secs_f64() * 1e3;
        let (p50, p99) = (at(50), at(99));
        let _ = writeln!(self.text, "| {what} | {p50:.3} | {p99:.3} | {each:.3} | {note} |");
        self.rows.push(serde_json::json!({ "what": what, "p50_ms": p50, "p99_ms": p99, "cpu_ms": each, "note": note }));
        self.cpu = cpu_time();
    }
    async fn timed<T>(&self, work: impl Future<Output = T>) -> (Duration, T) {
        let start = self.clock.steady();
        let done = work.await;
        (self.clock.steady() - start, done)
    }
}

fn cpu_time() -> Duration {
    let t = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(t.tv_sec as u64, t.tv_nsec as u32)
}

fn setting(name: &str, default: i64) -> i64 {
    let all: Vec<String> = std::env::args().collect();
    let at = all.iter().position(|a| a == name);
    at.and_then(|at| all.get(at + 1)).map_or(default, |v| v.parse().expect("a number"))
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() {
    let (rows, samples) = (setting("--rows", 1_000_000), setting("--samples", 200));
    let dir = tempfile::tempdir().unwrap();
    let mut table = Table { clock: SystemClock::new(), cpu: cpu_time(), text: String::new(), rows: vec![] };
    let tasks = Tasks::new();
    drop(Store::open(dir.path(), &Database::Sqlite, &tasks).await.unwrap());
    tasks.end(GRACE).await;
    let (took, ()) = table.timed(async { fill(dir.path(), rows) }).await;
    println!("{rows} tasks were made in {:.1} s; {samples} pages of {} for each row of the table\n", took.as_secs_f64(), LIMIT - 1);

    table.cpu = cpu_time();
    let (mut opened, mut open) = (vec![], 0);
    for _ in 0..5 {
        let tasks = Tasks::new();
        let start = async { open_tasks(&Store::open(dir.path(), &Database::Sqlite, &tasks).await.unwrap()).await };
        let (took, read) = table.timed(start).await;
        opened.push(took);
        open = read;
        tasks.end(GRACE).await;
    }
    table.row("opening the store, reading what is open", opened, format!("{open} open tasks"));

    let tasks = Tasks::new();
    let store = Store::open(dir.path(), &Database::Sqlite, &tasks).await.unwrap();
    for (what, filter) in filters(rows) {
        let (mut times, mut most) = (vec![], 0);
        for n in 0..samples {
            // The first page, then from everywhere.
            let before = (n > 0).then(|| task_id(n * 7919 % samples * rows / samples));
            let (took, page) = table.timed(store.tasks(&filter, Window { before, limit: LIMIT })).await;
            times.push(took);
            most = most.max(page.unwrap().len());
        }
        table.row(&what, times, format!("{most} rows at most"));
    }
    by_key(&store, &mut table, rows, samples).await;
    writes(&store, &mut table).await;
    tasks.end(GRACE).await;

    println!("| what | p50 ms | p99 ms | CPU ms | |\n|---|---|---|---|---|\n{}", table.text);
    let args: Vec<String> = std::env::args().collect();
    if let Some(at) = args.iter().position(|a| a == "--json") {
        let json = serde_json::json!({ "tasks": rows, "samples": samples, "rows": table.rows });
        std::fs::write(&args[at + 1], json.to_string()).expect("the file can be written");
    }
}

async fn open_tasks(store: &Store) -> usize {
    let (mut after, mut read) = (None, 0);
    loop {
        let page = store.open_tasks(None, after, 500).await.unwrap();
        let Some(last) = page.last() else { return read };
        after = Some(last.id);
        read += page.len();
    }
}

/// A read where it is asked, and one that is handed over.
async fn by_key(store: &Arc<Store>, table: &mut Table, rows: i64, samples: i64) {
    let (mut by_id, mut here, mut handed) = (vec![], vec![], vec![]);
    for n in 0..samples * 20 {
        let id = task_id(n * 7919 % rows);
        let (took, found) = table.timed(store.task(id)).await;
        assert!(found.unwrap().is_some());
        by_id.push(took);
    }
    table.row("a task by its id", by_id, String::new());
    for _ in 0..samples * 20 {
        here.push(table.timed(store.ping()).await.0);
    }
    table.row("a read of nothing, where it is asked", here, String::new());
    for _ in 0..samples * 20 {
        handed.push(table.timed(store.history(task_id(-1))).await.0);
    }
    table.row("a read of nothing, handed over", handed, String::new());
}

/// The whole life of tasks, 256 at a time: three writes each.
async fn writes(store: &Arc<Store>, table: &mut Table) {
    const LIVES: i64 = 20_000;
    let first = 1_000_000_000;
    let before = store.commits();
    let life = |i: i64| async move {
        let mut t: Task = sample::assigned_task(1);
        t.id = task_id(first + i);
        t.created_at = T0 + (first + i) * STEP;
        t.progress.attempt = t.progress.attempt.map(|a| Attempt { node: node(1), ..a });
        let no = sample::attempt(1);
        store.accept(&t).await.unwrap();
        store.apply(t.id, &Event::Started { attempt: no }, Besides::default(), 5).await.unwrap();
        let end = Event::Ended { attempt: no, outcome: Outcome::Exited(0) };
        store.apply(t.id, &end, Besides::default(), 9).await.unwrap();
    };
    let (took, ()) = table.timed(futures::stream::iter(0..LIVES).for_each_concurrent(256, life)).await;
    let note = format!("{:.0} lives/s, {} commits", LIVES as f64 / took.as_secs_f64(), store.commits() - before);
    table.row("accept, start, end; 256 in flight; a life", vec![took / LIVES as u32; LIVES as usize], note);
}

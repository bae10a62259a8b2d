//! The databases of earlier releases are carried forward, and a copy of what was there stays.

use hub_engine::ports::{Accounts, Applied, Besides, Journal, Meta, NodeDirectory, Output, Sessions, Window};
use hub_engine::records::{HubMeta, Stream, TaskFilter};
use hub_store::{Database, OpenError, Store};
use hub_testkit::contract::sample::{attempt, hub_id, node_id, spool_id};
use hub_testkit::postgres::Server;
use mesh_core::permission::Role;
use mesh_core::task::{Action, Event, TaskState};
use mesh_core::{TaskId, sha256};
use mesh_process::Tasks;
use rusqlite::Connection;
use sqlx::Connection as _;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

const SQLITE: &str = include_str!("fixtures/release-1/sqlite.sql");
const POSTGRES: &str = include_str!("fixtures/release-1/postgres.sql");
const OUTPUT: &str = "output/28/01a1fd7b-66a3-7623-ba48-8205cfda9b28-100000001";
const GRACE: Duration = Duration::from_secs(90);

fn everything<I>() -> Window<I> {
    Window { before: None, limit: 100 }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02X}")).collect()
}

/// Puts the big output of the first release where the store looks for that of `task`.
fn put_output(dir: &Path, task: TaskId) {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/release-1").join(OUTPUT);
    let name = task.to_string();
    let to = dir.join(format!("output/{:02x}/{}-100000001", task.as_bytes()[15], name.trim_start_matches("task_")));
    std::fs::create_dir_all(to.parent().unwrap()).unwrap();
    std::fs::copy(from, to).unwrap();
}

/// A data folder as the first release left it.
fn release_1(dir: &Path) -> Connection {
    let conn = Connection::open(dir.join("hub.db")).unwrap();
    conn.execute_batch(SQLITE).unwrap();
    conn.pragma_update(None, "journal_mode", "wal").unwrap();
    conn
}

async fn open(dir: &Path) -> Result<(Arc<Store>, Tasks), OpenError> {
    let tasks = Tasks::new();
    Store::open(dir, &Database::Sqlite, &tasks).await.map(|store| (store, tasks))
}

/// Every table with every value, as text.
fn dump(path: &Path) -> Vec<String> {
    let conn = Connection::open(path).unwrap();
    let texts = |sql: &str| -> Vec<String> {
        let mut read = conn.prepare(sql).unwrap();
        let width = read.column_count();
        let row = |r: &rusqlite::Row| Ok((0..width).map(|i| format!("{:?}|", r.get_ref(i).unwrap())).collect::<String>());
        read.query_map([], row).unwrap().map(Result::unwrap).collect()
    };
    let mut all = texts("SELECT type, name, tbl_name, sql FROM sqlite_schema ORDER BY name");
    let mut names = conn.prepare("SELECT name FROM sqlite_schema WHERE type = 'table' ORDER BY name").unwrap();
    let names: Vec<String> = names.query_map([], |r| r.get(0)).unwrap().map(Result::unwrap).collect();
    all.extend(names.iter().flat_map(|name| texts(&format!("SELECT '{name}', * FROM {name} ORDER BY 2, 3"))));
    all
}

/// What a hub of the first release had is there, to the last field that hangs on a signature.
async fn all_is_readable(store: &Store, dir: &Path, fixture: &str) {
    let tasks = store.tasks(&TaskFilter::default(), everything()).await.unwrap();
    let states: Vec<_> = tasks.iter().map(|t| (t.skill.as_str(), t.progress.state)).collect();
    use TaskState::*;
    assert_eq!(states, [("shell", Pending), ("echo", Succeeded), ("shell", Succeeded), ("shell", Failed)]);
    let said = fixture.to_ascii_uppercase();
    for t in &tasks {
        assert_eq!(store.task(t.id).await.unwrap().as_ref(), Some(t));
        assert_eq!(sha256(&t.spec), t.digest, "the spec is what was accepted");
        assert!(said.contains(&hex(&t.seal)) && said.contains(&hex(&t.digest)), "the seal is what was made at acceptance");
        assert_eq!((t.terms.clone(), t.timeout_secs), (Default::default(), 0));
    }
    let mut lines = vec![];
    for t in &tasks {
        let history = store.history(t.id).await.unwrap();
        assert_eq!(history.last().unwrap().state, t.progress.state);
        lines.push(history.len());
    }
    assert_eq!(lines, [1, 3, 4, 4]);
    let [pending, echo, big, failed] = &tasks[..] else { panic!() };

    put_output(dir, big.id);
    let no = big.progress.attempt.as_ref().unwrap().no;
    assert_eq!((big.output.stdout_bytes, big.output.kept_seq), (13_893, 1));
    let frames = store.read(big.id, no, 0, usize::MAX).await.unwrap();
    let numbers: String = (1..=3000).map(|n| format!("{n}\n")).collect();
    assert!(frames.iter().flat_map(|f| f.data.iter().copied()).eq(numbers.bytes()), "the big output is whole");
    assert_eq!(store.tail(big.id, no, Stream::Stdout, 5).await.unwrap(), b"3000\n");
    assert_eq!((failed.progress.exit_code, failed.sandbox_applied.as_deref()), (Some(7), Some("pid_namespace,no_new_privs,uid")));
    let no = failed.progress.attempt.as_ref().unwrap().no;
    assert_eq!(store.tail(failed.id, no, Stream::Stdout, 99).await.unwrap(), b"out\n");
    assert_eq!(store.tail(failed.id, no, Stream::Stderr, 99).await.unwrap(), b"err\n");
    assert_eq!(echo.result.as_deref(), Some(&b"hi"[..]));

    let [node] = &store.nodes(None, everything()).await.unwrap()[..] else { panic!("one node") };
    assert_eq!((node.name.as_str(), node.max_tasks, node.version.as_str()), ("fx-laptop", 2, "0.1.0"));
    assert_eq!(node.capabilities.os, "linux");
    assert_eq!(Some(node.id), pending.named_node);
    let invite = &store.invites(None, everything()).await.unwrap()[0];
    assert_eq!(invite.used.as_ref().map(|u| u.node), Some(node.id));
    let sessions = store.sessions(None, everything()).await.unwrap();
    assert_eq!(sessions.iter().map(|s| (s.name.as_str(), s.nodes.len())).collect::<Vec<_>>(), [("later", 0), ("demo", 1)]);
    assert_eq!(failed.session, Some(sessions[1].id));
    let user = store.user_named("Admin").await.unwrap().unwrap();
    assert_eq!((user.role, user.id), (Role::Admin, pending.actor.user));
    assert!(user.password_hash.starts_with("$argon2id$"));
    let [key] = &store.keys(user.id, everything()).await.unwrap()[..] else { panic!("one key") };
    assert_eq!((key.name.as_str(), key.scopes.len()), ("ci", 2));
    assert_eq!(store.key_by_mac(&key.mac).await.unwrap().as_ref(), Some(key));
    let fresh = HubMeta { id: hub_id(1), incarnation: 9, created_at: 9 };
    assert_eq!(store.hub(fresh).await.unwrap().incarnation, 1, "it is the same deployment");

    // And it goes on from there.
    let event = Event::Assigned { attempt: attempt(1), node: node_id(1), granted: Some(spool_id(1)) };
    let Applied::Done(after, actions) = store.apply(pending.id, &event, Besides::default(), 5).await.unwrap() else { panic!() };
    assert_eq!(actions, [Action::Order { node: node_id(1), attempt: attempt(1) }]);
    assert_eq!((after.spec, after.seal), (pending.spec.clone(), pending.seal));
    assert_eq!(store.history(pending.id).await.unwrap().len(), 2);
}

#[tokio::test]
async fn the_first_release_on_sqlite_is_carried_forward() {
    let dir = tempfile::tempdir().unwrap();
    let (home, aside) = (dir.path().join("home"), dir.path().join("aside"));
    std::fs::create_dir_all(&home).unwrap();
    std::fs::create_dir_all(&aside).unwrap();
    // What is in the log alone belongs to the copy too, so the connections stay open.
    let (left, right) = (release_1(&home), release_1(&aside));
    std::fs::write(home.join("hub.db.schema-0"), "older").unwrap();
    std::fs::write(home.join("hub.db.schema-mine"), "not ours").unwrap();
    let (store, tasks) = open(&home).await.unwrap();
    all_is_readable(&store, &home, SQLITE).await;

    let copy = home.join("hub.db.schema-1");
    assert_eq!(std::fs::metadata(&copy).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(dump(&copy), dump(&aside.join("hub.db")), "the copy is what was there");
    assert_ne!(dump(&copy), dump(&home.join("hub.db")));
    assert!(!home.join("hub.db.schema-0").exists(), "the newest copy is kept");
    assert!(home.join("hub.db.schema-mine").exists() && !home.join("hub.db.schema-copy").exists());
    tasks.end(GRACE).await;
    drop((store, left, right));

    // The next start changes nothing and copies nothing.
    let before = copies(&home);
    let (_store, tasks) = open(&home).await.unwrap();
    assert_eq!(copies(&home), before);
    tasks.end(GRACE).await;
}

fn copies(dir: &Path) -> Vec<PathBuf> {
    let names = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path());
    let mut all: Vec<PathBuf> = names.filter(|p| p.to_string_lossy().contains(".schema-")).collect();
    all.sort();
    all
}

#[tokio::test]
async fn a_new_database_has_nothing_to_copy() {
    let dir = tempfile::tempdir().unwrap();
    let (_store, _tasks) = open(dir.path()).await.unwrap();
    assert_eq!(copies(dir.path()), Vec::<PathBuf>::new());
}

#[tokio::test]
async fn without_a_copy_nothing_is_changed() {
    let dir = tempfile::tempdir().unwrap();
    drop(release_1(dir.path()));
    let (database, copy) = (dir.path().join("hub.db"), dir.path().join("hub.db.schema-1"));
    let before = dump(&database);
    // Nothing can take this name.
    std::fs::create_dir(&copy).unwrap();
    let refused = open(dir.path()).await.unwrap_err();
    assert!(matches!(refused, OpenError::Copy { .. }), "{refused:?}");
    let text = refused.to_string();
    assert!(text.contains("hub.db") && text.contains("copy") && text.contains("refused"), "{text}");
    assert_eq!(dump(&database), before);
    assert_eq!(copies(dir.path()), std::slice::from_ref(&copy), "and nothing unfinished stays");

    std::fs::remove_dir(&copy).unwrap();
    // What an interrupted start has left is no copy.
    std::fs::write(dir.path().join("hub.db.schema-copy"), "half").unwrap();
    let (store, _tasks) = open(dir.path()).await.unwrap();
    assert_eq!(store.tasks(&TaskFilter::default(), everything()).await.unwrap().len(), 4);
    assert_eq!(dump(&copy), before);
}

#[tokio::test]
async fn long_specs_of_before_lie_apart_and_are_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let conn = release_1(dir.path());
    conn.execute("UPDATE tasks SET spec = zeroblob(100000) WHERE state = 'pending'", []).unwrap();
    conn.execute("UPDATE tasks SET spec = zeroblob(2048) WHERE skill = 'echo'", []).unwrap();
    drop(conn);
    let (store, _tasks) = open(dir.path()).await.unwrap();
    let tasks = store.tasks(&TaskFilter::default(), everything()).await.unwrap();
    assert_eq!(tasks.iter().map(|t| t.spec.len()).take(2).collect::<Vec<_>>(), [0, 2048]);
    assert!(store.task(tasks[0].id).await.unwrap().unwrap().spec == vec![0; 100_000]);
    let conn = Connection::open(dir.path().join("hub.db")).unwrap();
    let apart: i64 = conn.query_row("SELECT count(*) FROM task_specs", [], |r| r.get(0)).unwrap();
    assert_eq!(apart, 1);
}

#[tokio::test]
async fn the_first_release_on_postgres_is_carried_forward() {
    let (dir, url, tasks) = (tempfile::tempdir().unwrap(), Server::shared().database(), Tasks::new());
    let mut conn = sqlx::PgConnection::connect(&url).await.unwrap();
    sqlx::raw_sql(POSTGRES).execute(&mut conn).await.unwrap();
    let store = Store::open(dir.path(), &Database::parse(&url).unwrap(), &tasks).await.unwrap();
    all_is_readable(&store, dir.path(), POSTGRES).await;
    assert_eq!(copies(dir.path()), Vec::<PathBuf>::new(), "copies of a server are its operator's");
}

/// Half a migration is none.
#[tokio::test]
async fn a_failing_migration_on_postgres_leaves_what_was_there() {
    let (dir, url) = (tempfile::tempdir().unwrap(), Server::shared().database());
    let mut conn = sqlx::PgConnection::connect(&url).await.unwrap();
    sqlx::raw_sql(POSTGRES).execute(&mut conn).await.unwrap();
    // The last index of the newest migration cannot be made.
    sqlx::raw_sql("CREATE TABLE tasks_skill (x bigint)").execute(&mut conn).await.unwrap();
    let refused = Store::open(dir.path(), &Database::parse(&url).unwrap(), &Tasks::new()).await.unwrap_err();
    assert!(matches!(refused, OpenError::Migrate { .. }), "{refused:?}");
    let there = "SELECT to_regclass('task_specs') IS NULL AND to_regclass('tasks_user') IS NOT NULL";
    assert!(sqlx::query_scalar::<_, bool>(there).fetch_one(&mut conn).await.unwrap());
    sqlx::raw_sql("DROP TABLE tasks_skill").execute(&mut conn).await.unwrap();
    let store = Store::open(dir.path(), &Database::parse(&url).unwrap(), &Tasks::new()).await.unwrap();
    all_is_readable(&store, dir.path(), POSTGRES).await;
}

//! What a store promises beyond the ports: it survives, it shares commits, it keeps others out.

use async_trait::async_trait;
use futures::FutureExt;
use futures::future::join_all;
use hub_engine::accounts::{self, Lifetimes};
use hub_engine::events::Events;
use hub_engine::ports::{Accounts, Applied, Besides, Gauges, Journal, Meta, Output, Passwords, Purges, Sessions};
use hub_engine::records::{OutputFrame, PurgeStart, PurgeStep, RefreshToken, Stream, Task, TaskFilter};
use hub_engine::rights::Rights;
use hub_engine::throttle::Throttle;
use hub_store::{Database, OpenError, Store};
use hub_testkit::TestKeys;
use hub_testkit::contract::sample::{assigned_task, attempt, device, frame, login_id, session, session_id, task, task_id, user_id};
use mesh_core::output::Digests;
use mesh_core::permission::{Caller, Role};
use mesh_core::task::{Event, Outcome};
use mesh_core::{TaskId, sha256};
use mesh_process::tasks::Ended;
use mesh_process::{SystemClock, Tasks};
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};
use sqlx::{ConnectOptions, Row};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

const KEEP: u64 = 1 << 30;
const GRACE: Duration = Duration::from_secs(90);

async fn open(dir: &Path) -> (Arc<Store>, Tasks) {
    let tasks = Tasks::new();
    (Store::open(dir, &Database::Sqlite, &tasks).await.unwrap(), tasks)
}

async fn raw(dir: &Path) -> SqliteConnection {
    SqliteConnectOptions::new().filename(dir.join("hub.db")).connect().await.unwrap()
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(dir) else { return vec![] };
    let paths = entries.map(|e| e.unwrap().path());
    paths.flat_map(|p| if p.is_dir() { files(&p) } else { vec![p] }).collect()
}

/// More than a row holds.
fn huge(seq: u64) -> OutputFrame {
    frame(seq, Stream::Stdout, vec![seq as u8; 20_000])
}

fn big(seq: u64) -> OutputFrame {
    frame(seq, if seq.is_multiple_of(3) { Stream::Stderr } else { Stream::Stdout }, vec![seq as u8; 5000])
}

#[tokio::test]
async fn reopening_keeps_everything() {
    let dir = tempfile::tempdir().unwrap();
    let (store, tasks) = open(dir.path()).await;
    store.accept(&assigned_task(1)).await.unwrap();
    let started = Event::Started { attempt: attempt(1) };
    assert!(matches!(store.apply(task_id(1), &started, Besides::default(), 5).await.unwrap(), Applied::Done(..)));
    store.add_session(&session(1, 1)).await.unwrap();
    store.append(task_id(1), attempt(1), (1..=30).map(big).collect(), KEEP).await.unwrap();
    store.append(task_id(1), attempt(1), vec![frame(31, Stream::Stdout, "small")], KEEP).await.unwrap();
    let (before, history) = (store.task(task_id(1)).await.unwrap(), store.history(task_id(1)).await.unwrap());
    assert_eq!(tasks.end(GRACE).await, Ended::Clean);
    assert!(store.accept(&task(2)).await.is_err(), "an ended store says so");
    assert!(store.append(task_id(1), attempt(1), vec![big(32)], KEEP).await.is_err());
    drop(store);

    let (store, _tasks) = open(dir.path()).await;
    assert_eq!(store.task(task_id(1)).await.unwrap(), before);
    assert_eq!(store.history(task_id(1)).await.unwrap(), history);
    assert_eq!(store.session(session_id(1)).await.unwrap(), Some(session(1, 1)));
    let mut expect: Vec<OutputFrame> = (1..=30).map(big).collect();
    expect.push(frame(31, Stream::Stdout, "small"));
    assert!(store.read(task_id(1), attempt(1), 0, usize::MAX).await.unwrap() == expect);
    assert_eq!(store.tail(task_id(1), attempt(1), Stream::Stdout, 7).await.unwrap(), [&[29u8; 2][..], b"small"].concat());
    store.append(task_id(1), attempt(1), vec![big(32)], KEEP).await.unwrap().unwrap();
    expect.push(big(32));
    assert!(store.read(task_id(1), attempt(1), 29, usize::MAX).await.unwrap() == expect[29..]);
}

#[tokio::test]
async fn concurrent_writes_share_commits() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _tasks) = open(dir.path()).await;
    let all: Vec<_> = (0..200).map(assigned_task).collect();
    let before = store.commits();
    for outcome in join_all(all.iter().map(|t| store.accept(t))).await {
        outcome.unwrap();
    }
    let accepts = store.commits() - before;
    assert!(accepts < 60, "200 accepts took {accepts} commits");
    let started = Event::Started { attempt: attempt(1) };
    for outcome in join_all(all.iter().map(|t| store.apply(t.id, &started, Besides::default(), 5))).await {
        assert!(matches!(outcome.unwrap(), Applied::Done(..)));
    }
    for outcome in join_all(all.iter().map(|t| store.append(t.id, attempt(1), vec![frame(1, Stream::Stdout, "hi")], KEEP))).await {
        outcome.unwrap().unwrap();
    }
    let all = store.commits() - before;
    assert!(all < 180, "600 writes took {all} commits");
    assert_eq!(files(&dir.path().join("output")), Vec::<PathBuf>::new(), "a line of output costs no file");
}

#[tokio::test]
async fn one_write_is_one_commit() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _tasks) = open(dir.path()).await;
    let before = store.commits();
    store.accept(&task(1)).await.unwrap();
    store.append(task_id(1), attempt(1), (1..=9).map(big).collect(), KEEP).await.unwrap();
    assert_eq!(store.commits() - before, 2);
    store.append(task_id(1), attempt(1), (1..=9).map(big).collect(), KEEP).await.unwrap();
    store.read(task_id(1), attempt(1), 0, 1).await.unwrap();
    assert_eq!(store.commits() - before, 2, "what changes nothing costs nothing");

    // Digests come with the end, and are compared without a write.
    let before = store.commits();
    store.accept(&assigned_task(2)).await.unwrap();
    store.append(task_id(2), attempt(1), vec![frame(1, Stream::Stdout, "small")], KEEP).await.unwrap();
    let digests = store.digests(task_id(2), attempt(1)).await.unwrap();
    let end = Event::Ended { attempt: attempt(1), outcome: Outcome::Exited(0) };
    store.apply(task_id(2), &end, Besides { digests, ..Default::default() }, 9).await.unwrap();
    assert_eq!(store.commits() - before, 3);
    assert_eq!(store.task(task_id(2)).await.unwrap().unwrap().digests, digests);
    assert_eq!(files(&dir.path().join("output")).len(), 1, "of the first task alone");
}

/// What a power cut may leave behind, for as long as `still` is held. The pages of the database are
/// copied first: those that a checkpoint writes meanwhile are in the log too, and the open reader
/// keeps the log from being begun anew.
async fn crash_copy(from: &Path, to: &Path) {
    let mut still = raw(from).await;
    sqlx::query("BEGIN").execute(&mut still).await.unwrap();
    sqlx::query("SELECT count(*) FROM tasks").fetch_one(&mut still).await.unwrap();
    std::fs::create_dir_all(to).unwrap();
    for name in ["hub.db", "hub.db-wal"] {
        std::fs::copy(from.join(name), to.join(name)).unwrap();
    }
    for file in files(&from.join("output")) {
        let copy = to.join(file.strip_prefix(from).unwrap());
        std::fs::create_dir_all(copy.parent().unwrap()).unwrap();
        std::fs::copy(&file, copy).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crash_loses_nothing_that_was_acknowledged() {
    let dir = tempfile::tempdir().unwrap();
    let (store, tasks) = open(&dir.path().join("live")).await;
    let (acknowledged, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
    for lane in 0..4u16 {
        let (store, acknowledged, stop) = (store.clone(), acknowledged.clone(), stop.clone());
        tasks.spawn("writes", async move {
            for n in 0.. {
                let id = lane * 10_000 + n;
                store.accept(&assigned_task(id)).await.unwrap();
                for seq in 1..=4 {
                    if lane == 3 {
                        // So that a copy finds one of its attempts in the middle, however the lanes share commits.
                        tokio::time::sleep(Duration::from_millis(20)).await;
                    }
                    store.append(task_id(id), attempt(1), vec![big(seq)], KEEP).await.unwrap().unwrap();
                }
                let end = Event::Ended { attempt: attempt(1), outcome: Outcome::Exited(0) };
                store.apply(task_id(id), &end, Besides::default(), 9).await.unwrap();
                if lane == 0 {
                    acknowledged.store(u64::from(n) + 1, Ordering::SeqCst);
                }
                if stop.load(Ordering::SeqCst) {
                    break;
                }
            }
        });
    }
    let mut copies = vec![];
    for round in 1..=4u64 {
        while acknowledged.load(Ordering::SeqCst) < round * 15 {
            tokio::task::yield_now().await;
        }
        let (sure, to) = (acknowledged.load(Ordering::SeqCst), dir.path().join(format!("copy{round}")));
        crash_copy(&dir.path().join("live"), &to).await;
        copies.push((sure, to));
    }
    stop.store(true, Ordering::SeqCst);
    assert_eq!(tasks.end(GRACE).await, Ended::Clean);

    let mut ahead = 0;
    for (sure, copy) in copies {
        let (store, _tasks) = open(&copy).await;
        let rows: String = sqlx::query("PRAGMA integrity_check").fetch_one(&mut raw(&copy).await).await.unwrap().get(0);
        assert_eq!(rows, "ok");
        for n in 0..sure as u16 {
            let t = store.task(task_id(n)).await.unwrap().unwrap_or_else(|| panic!("acknowledged task {n} is gone"));
            assert!(t.progress.state.is_final());
            assert_eq!(t.output.durable_seq, 4);
        }
        let tasks = store.tasks(&TaskFilter::default(), hub_engine::ports::Window { before: None, limit: u32::MAX }).await.unwrap();
        for t in tasks {
            let frames = store.read(t.id, attempt(1), 0, usize::MAX).await.unwrap();
            let durable = t.output.durable_seq;
            assert!(frames == (1..=durable).map(big).collect::<Vec<_>>(), "every counted frame is there, whole");
            ahead += u32::from(durable < 4);
            // What the crash cut short goes on where it was.
            let more = store.append(t.id, attempt(1), (durable + 1..=6).map(big).collect(), KEEP).await.unwrap().unwrap();
            assert_eq!(more.durable_seq, 6);
            assert!(store.read(t.id, attempt(1), 0, usize::MAX).await.unwrap() == (1..=6).map(big).collect::<Vec<_>>());
        }
    }
    assert!(ahead > 0, "no copy caught an attempt in the middle; the test shows nothing");
}

#[tokio::test]
async fn bytes_behind_the_counted_end_are_cut_off() {
    let dir = tempfile::tempdir().unwrap();
    let (store, tasks) = open(dir.path()).await;
    store.append(task_id(1), attempt(1), (1..=3).map(big).collect(), KEEP).await.unwrap();
    tasks.end(GRACE).await;
    let [file] = &files(&dir.path().join("output"))[..] else { panic!("one file") };
    assert_eq!(std::fs::metadata(file).unwrap().permissions().mode() & 0o777, 0o600);
    let whole = std::fs::read(file).unwrap();
    std::fs::write(file, [&whole[..], &[0xEE; 70_000]].concat()).unwrap();

    let (store, tasks) = open(dir.path()).await;
    assert!(store.read(task_id(1), attempt(1), 0, usize::MAX).await.unwrap() == (1..=3).map(big).collect::<Vec<_>>());
    store.append(task_id(1), attempt(1), (4..=5).map(big).collect(), KEEP).await.unwrap().unwrap();
    assert!(store.read(task_id(1), attempt(1), 0, usize::MAX).await.unwrap() == (1..=5).map(big).collect::<Vec<_>>());
    let length = std::fs::metadata(file).unwrap().len();
    assert_eq!(length, whole.len() as u64 / 3 * 5, "nothing is left behind the end");
    tasks.end(GRACE).await;

    std::fs::write(file, &whole[..100]).unwrap();
    let (store, tasks) = open(dir.path()).await;
    let lost = store.append(task_id(1), attempt(1), vec![big(6), big(7)], KEEP).await.unwrap_err().to_string();
    assert!(lost.contains("100 bytes") && lost.contains("output"), "a short file is said, not papered over: {lost}");
    tasks.end(GRACE).await;

    let mut bent = whole.clone();
    bent[60] ^= 1;
    std::fs::write(file, [&bent[..], &whole[..], &whole[..]].concat()).unwrap();
    let (store, _tasks) = open(dir.path()).await;
    let bent = store.read(task_id(1), attempt(1), 0, 1).await.unwrap_err().to_string();
    assert!(bent.contains("damaged"), "{bent}");
}

#[tokio::test]
async fn callers_who_give_up_leave_output_whole() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _tasks) = open(dir.path()).await;
    for seq in 1..=40 {
        let mut append = Box::pin(store.append(task_id(1), attempt(1), vec![big(seq)], KEEP));
        // Polled once, so that it has begun; then dropped.
        let _ = futures::poll!(&mut append);
        drop(append);
        // The next one comes behind it, whatever became of it.
        let t = store.append(task_id(1), attempt(1), vec![big(seq)], KEEP).await.unwrap().unwrap();
        assert_eq!(t.durable_seq, seq);
    }
    assert!(store.read(task_id(1), attempt(1), 0, usize::MAX).await.unwrap() == (1..=40).map(big).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_later_schema_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let (_, tasks) = open(dir.path()).await;
    tasks.end(GRACE).await;
    let later =
        "INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time) VALUES (9000, 'later', 1, x'00', 0)";
    sqlx::query(later).execute(&mut raw(dir.path()).await).await.unwrap();
    let refused = Store::open(dir.path(), &Database::Sqlite, &Tasks::new()).await.unwrap_err();
    assert!(matches!(refused, OpenError::Newer { found: 9000, .. }), "{refused:?}");
    let text = refused.to_string();
    assert!(text.contains("9000") && text.contains("hub.db") && text.contains("later version"), "{text}");
}

#[tokio::test]
async fn settings_and_modes() {
    let dir = tempfile::tempdir().unwrap();
    let home = dir.path().join("data");
    let (store, _tasks) = open(&home).await;
    store.ping().await.unwrap();
    store.accept(&task(1)).await.unwrap();
    store.append(task_id(1), attempt(1), (1..=3).map(big).collect(), KEEP).await.unwrap();
    let mode = |p: &Path| std::fs::metadata(p).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&home), 0o700);
    assert!(home.join("hub.db-wal").exists());
    for file in files(&home) {
        assert_eq!(mode(&file), 0o600, "{}", file.display());
    }
    let journal: String = sqlx::query("PRAGMA journal_mode").fetch_one(&mut raw(&home).await).await.unwrap().get(0);
    assert_eq!(journal, "wal");

    // A database that others could read is closed to them.
    let old = dir.path().join("old");
    std::fs::create_dir(&old).unwrap();
    std::fs::write(old.join("hub.db"), b"").unwrap();
    std::fs::set_permissions(old.join("hub.db"), std::fs::Permissions::from_mode(0o644)).unwrap();
    let _open = open(&old).await;
    assert_eq!(mode(&old.join("hub.db")), 0o600);
}

/// How long the log is while nothing can begin it anew.
fn log_bytes(dir: &Path) -> u64 {
    std::fs::metadata(dir.join("hub.db-wal")).unwrap().len()
}

#[tokio::test]
async fn a_long_spec_is_written_once() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _tasks) = open(dir.path()).await;
    // From an empty log on, a reader of what is there now keeps whatever comes in it: without the first, the
    // next checkpoint could have it begun anew, and what it has grown by would say nothing.
    let mut still = raw(dir.path()).await;
    while sqlx::query("PRAGMA wal_checkpoint(TRUNCATE)").fetch_one(&mut still).await.unwrap().get::<i64, _>(0) != 0 {}
    sqlx::query("BEGIN").execute(&mut still).await.unwrap();
    sqlx::query("SELECT count(*) FROM tasks").fetch_one(&mut still).await.unwrap();
    store.accept(&task(1)).await.unwrap();
    let mut long = task(2);
    long.spec = vec![7; 1 << 20];
    let before = log_bytes(dir.path());
    store.accept(&long).await.unwrap();
    let accepted = log_bytes(dir.path());
    assert!((1 << 20..5 << 18).contains(&(accepted - before)), "it is there, once: {}", accepted - before);
    let assigned = Event::Assigned { attempt: attempt(1), node: hub_testkit::contract::sample::node_id(1), granted: None };
    for event in [
        assigned,
        Event::Granted { attempt: attempt(1), spool: hub_testkit::contract::sample::spool_id(1) },
        Event::Started { attempt: attempt(1) },
        Event::Ended { attempt: attempt(1), outcome: Outcome::Exited(0) },
    ] {
        assert!(matches!(store.apply(long.id, &event, Besides::default(), 9).await.unwrap(), Applied::Done(..)));
    }
    let written = log_bytes(dir.path()) - accepted;
    assert!((1..200_000).contains(&written), "four steps wrote {written} bytes");
    assert!(store.task(long.id).await.unwrap().unwrap().spec == long.spec);
}

#[tokio::test]
async fn a_long_spec_is_read_only_when_it_is_wanted() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _tasks) = open(dir.path()).await;
    let mut long = assigned_task(1);
    long.spec = vec![7; 1 << 20];
    store.accept(&long).await.unwrap();
    // Whoever looks for it now is told that it is gone.
    sqlx::query("DROP TABLE task_specs").execute(&mut raw(dir.path()).await).await.unwrap();
    assert!(store.task(long.id).await.unwrap_err().to_string().contains("task_specs"));
    assert_eq!(store.narrow(long.id).await.unwrap().unwrap().spec, b"");
    assert_eq!(store.open_tasks(None, None, 9).await.unwrap().len(), 1);
    assert_eq!(store.tasks(&TaskFilter::default(), hub_engine::ports::Window { before: None, limit: 9 }).await.unwrap().len(), 1);
    for event in [Event::Started { attempt: attempt(1) }, Event::Ended { attempt: attempt(1), outcome: Outcome::Exited(0) }] {
        assert!(matches!(store.apply(long.id, &event, Besides::default(), 9).await.unwrap(), Applied::Done(..)));
    }
}

/// Comparing the output of a small task asks nobody: what came is remembered.
#[tokio::test]
async fn the_digests_of_small_output_cost_no_read() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _tasks) = open(dir.path()).await;
    let (small, large) = (task_id(1), task_id(2));
    store.append(small, attempt(1), vec![frame(1, Stream::Stdout, "out"), frame(2, Stream::Stderr, "err")], KEEP).await.unwrap();
    store.append(large, attempt(1), vec![huge(1)], KEEP).await.unwrap();
    let expect = Digests { stdout: sha256(b"out"), stderr: sha256(b"err") };
    // Neither the database nor a file is there to be asked.
    sqlx::query("DROP TABLE outputs").execute(&mut raw(dir.path()).await).await.unwrap();
    files(&dir.path().join("output")).iter().for_each(|f| std::fs::remove_file(f).unwrap());
    assert_eq!(store.totals(small, attempt(1)).await.unwrap().durable_seq, 2);
    assert_eq!(store.digests(small, attempt(1)).await.unwrap(), Some(expect));
    assert!(store.digests(large, attempt(1)).await.is_err(), "a large one is read from its file");
}

/// An append that was half-way when its session was erased: nothing of it stays, in a row or in a file.
#[test]
fn what_is_on_its_way_during_an_erasure_is_not_kept() {
    // One thread for whatever blocks, so that the test can keep a file from being written; all else runs when
    // the test waits.
    let runtime = tokio::runtime::Builder::new_current_thread().max_blocking_threads(1).enable_all().build().unwrap();
    runtime.block_on(async {
        for before in [0, 2] {
            let dir = tempfile::tempdir().unwrap();
            let (store, _tasks) = open(dir.path()).await;
            let (session_id, id) = (session_id(1), task_id(1));
            store.add_session(&session(1, 1)).await.unwrap();
            store.accept(&Task { session: Some(session_id), ..assigned_task(1) }).await.unwrap();
            if before > 0 {
                store.append(id, attempt(1), (1..=before).map(huge).collect(), KEEP).await.unwrap();
            }
            assert_eq!(store.totals(id, attempt(1)).await.unwrap().kept_seq, before, "and remembered");
            let (release, held) = std::sync::mpsc::sync_channel::<()>(1);
            let (enter, entered) = tokio::sync::oneshot::channel();
            let blocked = tokio::task::spawn_blocking(move || {
                enter.send(()).unwrap();
                let _ = held.recv();
            });
            entered.await.unwrap();
            let mut late = Box::pin(store.append(id, attempt(1), vec![huge(before + 1)], KEEP));
            // It asks nobody before it waits for the file.
            for _ in 0..100 {
                assert!(futures::poll!(&mut late).is_pending());
                tokio::task::yield_now().await;
            }
            // Its node was revoked, so it ended without it; then all was erased.
            store.apply(id, &Event::NodeRevoked { attempt: attempt(1) }, Besides::default(), 5).await.unwrap();
            store.close_session(session_id, None, 6).await.unwrap();
            assert_eq!(store.begin_purge(session_id, None, 7).await.unwrap(), PurgeStart::Begun);
            let purge = async {
                let mut after = None;
                while let PurgeStep::Until(task) = store.purge_step(session_id, after, 9).await.unwrap() {
                    after = task;
                }
            };
            let watch = async {
                let rows = async || {
                    let (kept_seq, truncated): (i64, bool) =
                        sqlx::query_as("SELECT kept_seq, truncated FROM outputs").fetch_one(&mut raw(dir.path()).await).await.ok()?;
                    (kept_seq == 0 && truncated).then_some(())
                };
                let erased = async {
                    while rows().await.is_none() {
                        tokio::time::sleep(Duration::from_millis(5)).await;
                    }
                };
                tokio::time::timeout(2 * GRACE, erased).await.expect("its row is not erased");
                release.send(()).unwrap();
            };
            futures::join!(purge, watch);
            blocked.await.unwrap();
            let late = late.await.unwrap().unwrap();
            while store.sweep(9).await.unwrap() > 0 {}

            assert_eq!((late.durable_seq, late.kept_seq, late.truncated), (before + 1, 0, true), "counted, so that its node forgets it");
            assert_eq!(store.task(id).await.unwrap().unwrap().output, late);
            assert_eq!(store.read(id, attempt(1), 0, usize::MAX).await.unwrap(), vec![]);
            assert_eq!(store.storage().await.unwrap().output_bytes, 0);
            assert_eq!(files(&dir.path().join("output")), [] as [PathBuf; 0]);
        }
    });
}

/// The writer is a thread of this process, and the only one that a store keeps for its statements.
#[tokio::test]
async fn the_writer_has_a_thread_that_ends_with_its_tasks() {
    let dir = tempfile::tempdir().unwrap();
    let writers = || {
        let threads = std::fs::read_dir("/proc/self/task").unwrap().flatten();
        let names = threads.filter_map(|t| std::fs::read_to_string(t.path().join("comm")).ok());
        names.filter(|n| n.trim() == "store writer").count()
    };
    let (store, tasks) = open(dir.path()).await;
    store.accept(&task(1)).await.unwrap();
    assert!(writers() >= 1, "a thread of this name");
    let second = task(2);
    let waiting = store.accept(&second);
    let (accepted, ended) = futures::join!(waiting, tasks.end(GRACE));
    accepted.expect("what was in the queue is served");
    assert_eq!(ended, Ended::Clean, "the group waits for the thread");
}

/// The process may end after each step of an erasure: rows first, files after, and the next start goes on.
#[tokio::test]
async fn an_erasure_that_was_cut_short_is_finished_later() {
    let dir = tempfile::tempdir().unwrap();
    let (store, tasks) = open(dir.path()).await;
    let id = session_id(1);
    store.add_session(&session(1, 1)).await.unwrap();
    for n in 1..=6 {
        // One of another session among them.
        let of = if n == 3 { None } else { Some(id) };
        store.accept(&Task { session: of, ..assigned_task(n) }).await.unwrap();
        store.append(task_id(n), attempt(1), (1..=10).map(big).collect(), KEEP).await.unwrap();
        let ended = Event::Ended { attempt: attempt(1), outcome: Outcome::Exited(0) };
        store.apply(task_id(n), &ended, Besides::default(), 5).await.unwrap();
    }
    let output = dir.path().join("output");
    let (count, one) = (files(&output).len(), store.storage().await.unwrap().output_bytes / 6);
    assert_eq!(count, 6);
    store.close_session(id, None, 5).await.unwrap();
    assert_eq!(store.begin_purge(id, None, 6).await.unwrap(), PurgeStart::Begun);
    let mut after = None;
    while after.is_none() {
        let PurgeStep::Until(task) = store.purge_step(id, after, 2).await.unwrap() else { panic!("there is more") };
        after = task;
    }
    assert_eq!(tasks.end(GRACE).await, Ended::Clean);
    drop(store);

    let (store, tasks) = open(dir.path()).await;
    assert_eq!(store.storage().await.unwrap().output_bytes, 4 * one, "counted anew");
    assert_eq!(store.purging(9).await.unwrap(), [id]);
    let mut after = None;
    while let PurgeStep::Until(task) = store.purge_step(id, after, 2).await.unwrap() {
        after = task;
    }
    assert_eq!(files(&output).len(), 6, "files go after the rows");
    assert_eq!(store.storage().await.unwrap().output_bytes, one);
    assert_eq!(tasks.end(GRACE).await, Ended::Clean);
    drop(store);

    // A file that is gone already stops nobody.
    let some = files(&output);
    let kept = store_file_of(task_id(3));
    std::fs::remove_file(some.iter().find(|p| !p.ends_with(&kept)).unwrap()).unwrap();
    let (store, _tasks) = open(dir.path()).await;
    assert_eq!(store.purging(9).await.unwrap(), vec![]);
    let mut swept = 0;
    loop {
        match store.sweep(2).await.unwrap() {
            0 => break,
            n => swept += n,
        }
    }
    let left = files(&output);
    assert_eq!((swept, left.len()), (5, 1));
    assert!(left[0].ends_with(&kept), "another's stays: {left:?}");
    assert_eq!(store.read(task_id(3), attempt(1), 0, usize::MAX).await.unwrap().len(), 10);
}

fn store_file_of(task: TaskId) -> String {
    format!("{}-{:x}", task.to_string().trim_start_matches("task_"), attempt(1).0)
}

/// An index answers what the hub asks again and again, however many rows there are.
#[tokio::test]
async fn what_is_asked_often_reads_an_index() {
    let dir = tempfile::tempdir().unwrap();
    let (_store, _tasks) = open(dir.path()).await;
    let mut conn = raw(dir.path()).await;
    for (query, index) in [
        ("SELECT MIN(expires_at) FROM sessions WHERE closed_at IS NULL AND expired_at IS NULL", "INDEX sessions_end"),
        ("SELECT state, COUNT(*) FROM tasks GROUP BY state", "COVERING INDEX tasks_state"),
        (
            "SELECT 1 FROM tasks WHERE session = x'00' AND finished_at IS NULL AND state IN ('assigned', 'running')",
            "INDEX tasks_session_end (session=? AND finished_at=?)",
        ),
        ("SELECT MAX(finished_at) FROM tasks WHERE session = x'00'", "INDEX tasks_session_end (session=?)"),
        ("SELECT id FROM sessions WHERE purging ORDER BY id LIMIT 5", "sessions_purging"),
        ("SELECT CAST(COALESCE(SUM(kept_len), 0) AS BIGINT) FROM outputs WHERE kept_len > 0", "COVERING INDEX outputs_in_files"),
    ] {
        let rows = sqlx::query(sqlx::AssertSqlSafe(format!("EXPLAIN QUERY PLAN {query}"))).fetch_all(&mut conn).await.unwrap();
        let plan: Vec<String> = rows.iter().map(|r| r.get::<String, _>(3)).collect();
        assert!(plan.iter().any(|line| line.contains(index)), "{query}: {plan:?}");
    }
}

struct NoPasswords;

#[async_trait]
impl Passwords for NoPasswords {
    async fn hash(&self, password: String) -> hub_engine::Result<String> {
        Ok(password)
    }
    async fn verify(&self, _: String, _: Option<String>) -> hub_engine::Result<bool> {
        Ok(false)
    }
}

/// The engine on a store that takes its time: what ends rights is told to open streams, though nobody waits for
/// the answer any more.
#[tokio::test]
async fn who_hangs_up_while_a_log_in_ends_keeps_no_stream_open() {
    let dir = tempfile::tempdir().unwrap();
    let (store, tasks) = open(dir.path()).await;
    let token = RefreshToken { mac: [1; 32], login: login_id(1), user: user_id(1), expires_at: i64::MAX };
    store.add_login(&device(1, 1), &token).await.unwrap();
    let clock = SystemClock::shared();
    let events = Events::local(Duration::from_secs(600), clock.clone());
    let accounts = accounts::Accounts {
        recent: Default::default(),
        store: store.clone(),
        rights: Arc::new(Rights::new(store.clone(), store.clone(), clock.clone())),
        keyring: Arc::new(TestKeys),
        passwords: Arc::new(NoPasswords),
        clock: clock.clone(),
        events: events.clone(),
        lifetimes: Lifetimes { access_secs: 600, refresh_days: 30 },
        throttle: Throttle::new(10, 5, clock),
        work: tasks.clone(),
    };
    let mut rights = events.rights();
    rights.mark_unchanged();
    let caller = Caller::person(user_id(1), Role::Developer);
    let hung_up = accounts.logout(&caller, login_id(1)).now_or_never();
    tokio::time::timeout(GRACE, rights.changed()).await.expect("streams are told").unwrap();
    assert!(store.device(login_id(1).into(), 0).await.unwrap().is_none(), "after it has ended");
    drop(hung_up);
}

//! The store on PostgreSQL, a real server: the suites, several hubs on one database, and a server that
//! goes away and comes back.

use futures::future::join_all;
use hub_engine::ports::{
    Accounts, Applied, Besides, Creation, Gauges, Idempotency, Journal, Meta, NodeDirectory, Once, Output, Purges, Retention, Sessions,
    Window,
};
use hub_engine::records::{Claim, Node, NodeChange, OutputFrame, PurgeStart, PurgeStep, RefreshToken, Rotation, Stream, Task, TaskFilter};
use hub_store::{Database, OpenError, Store};
use hub_testkit::contract;
use hub_testkit::contract::sample::*;
use hub_testkit::postgres::Server;
use mesh_core::TaskId;
use mesh_core::task::{Event, Outcome};
use mesh_process::Tasks;
use mesh_process::tasks::Ended;
use sqlx::{Connection, PgConnection, Row};
use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

const KEEP: u64 = 1 << 30;
const GRACE: Duration = Duration::from_secs(90);
const PATIENCE: Duration = Duration::from_secs(90);

/// Hubs of one test: each store has a folder of its own, all gone when this is.
struct Hubs {
    folder: tempfile::TempDir,
    tasks: Tasks,
    made: Cell<u32>,
}

impl Hubs {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap(), tasks: Tasks::new(), made: Cell::new(0) }
    }
    async fn store(&self, url: &str) -> Arc<Store> {
        self.made.set(self.made.get() + 1);
        open(&self.folder.path().join(self.made.get().to_string()), url, &self.tasks).await.unwrap()
    }
    async fn fresh(&self) -> Arc<Store> {
        self.store(&Server::shared().database()).await
    }
    async fn pair(&self) -> [Arc<Store>; 2] {
        let url = Server::shared().database();
        [self.store(&url).await, self.store(&url).await]
    }
}

async fn open(dir: &Path, url: &str, tasks: &Tasks) -> Result<Arc<Store>, OpenError> {
    Store::open(dir, &Database::parse(url).unwrap(), tasks).await
}

macro_rules! suites {
    ($($name:ident),*) => {$(
        #[tokio::test]
        async fn $name() {
            let hubs = Hubs::new();
            contract::$name(async || hubs.fresh().await as _).await;
        }
    )*};
}
suites!(journal, output, nodes, accounts, sessions, activity_has_a_bound, state, meta);

macro_rules! joint_suites {
    ($($name:ident),*) => {$(
        #[tokio::test]
        async fn $name() {
            let fresh = Hubs::new();
            contract::$name(async || fresh.fresh().await).await;
        }
    )*};
}
joint_suites!(
    agents,
    audit,
    idempotency,
    journal_and_output,
    nodes_and_sessions,
    sessions_and_tasks,
    memory,
    messages,
    purges,
    retention,
    gauges,
    grants,
    users
);

fn ended(code: i32) -> Event {
    Event::Ended { attempt: attempt(1), outcome: Outcome::Exited(code) }
}
fn big(seq: u64) -> OutputFrame {
    frame(seq, Stream::Stdout, vec![seq as u8; 5000])
}
fn everything<I>() -> Window<I> {
    Window { before: None, limit: u32::MAX }
}

#[tokio::test]
async fn reopening_keeps_everything() {
    let (dir, url) = (tempfile::tempdir().unwrap(), Server::shared().database());
    let tasks = Tasks::new();
    let store = open(dir.path(), &url, &tasks).await.unwrap();
    store.accept(&assigned_task(1)).await.unwrap();
    let started = Event::Started { attempt: attempt(1) };
    assert!(matches!(store.apply(task_id(1), &started, Besides::default(), 5).await.unwrap(), Applied::Done(..)));
    store.add_session(&session(1, 1)).await.unwrap();
    store.append(task_id(1), attempt(1), (1..=30).map(big).collect(), KEEP).await.unwrap();
    store.append(task_id(1), attempt(1), vec![frame(31, Stream::Stdout, "small")], KEEP).await.unwrap();
    let (before, history) = (store.task(task_id(1)).await.unwrap(), store.history(task_id(1)).await.unwrap());
    assert_eq!(tasks.end(GRACE).await, Ended::Clean);
    assert!(store.accept(&task(2)).await.is_err(), "an ended store says so");
    drop(store);

    let tasks = Tasks::new();
    let store = open(dir.path(), &url, &tasks).await.unwrap();
    assert_eq!(store.task(task_id(1)).await.unwrap(), before);
    assert_eq!(store.history(task_id(1)).await.unwrap(), history);
    assert_eq!(store.session(session_id(1)).await.unwrap(), Some(session(1, 1)));
    let mut expect: Vec<OutputFrame> = (1..=30).map(big).collect();
    expect.push(frame(31, Stream::Stdout, "small"));
    assert!(store.read(task_id(1), attempt(1), 0, usize::MAX).await.unwrap() == expect);
    assert!(!dir.path().join("hub.db").exists(), "there is one database, not two");
}

#[tokio::test]
async fn concurrent_writes_share_commits() {
    let hubs = Hubs::new();
    let store = hubs.fresh().await;
    let all: Vec<_> = (0..200).map(assigned_task).collect();
    for outcome in join_all(all.iter().map(|t| store.accept(t))).await {
        outcome.unwrap();
    }
    let accepts = store.commits();
    assert!(accepts < 60, "200 accepts took {accepts} commits");
    let started = Event::Started { attempt: attempt(1) };
    for outcome in join_all(all.iter().map(|t| store.apply(t.id, &started, Besides::default(), 5))).await {
        assert!(matches!(outcome.unwrap(), Applied::Done(..)));
    }
    for outcome in join_all(all.iter().map(|t| store.append(t.id, attempt(1), vec![frame(1, Stream::Stdout, "hi")], KEEP))).await {
        outcome.unwrap().unwrap();
    }
    let all = store.commits();
    assert!(all < 180, "600 writes took {all} commits");
}

#[tokio::test]
async fn one_write_is_one_commit() {
    let hubs = Hubs::new();
    let store = hubs.fresh().await;
    store.accept(&task(1)).await.unwrap();
    store.append(task_id(1), attempt(1), (1..=9).map(big).collect(), KEEP).await.unwrap();
    assert_eq!(store.commits(), 2);
    store.read(task_id(1), attempt(1), 0, 1).await.unwrap();
    assert_eq!(store.commits(), 2);
}

#[tokio::test]
async fn a_failing_job_hurts_nobody_else() {
    let hubs = Hubs::new();
    let store = hubs.fresh().await;
    store.add_session(&session(7, 1)).await.unwrap();
    let all: Vec<_> = (0..20).map(|n| session(n, 1)).collect();
    let outcomes = join_all(all.iter().map(|s| store.add_session(s))).await;
    for (n, outcome) in outcomes.iter().enumerate() {
        assert_eq!(outcome.is_err(), n == 7, "{n}: {outcome:?}");
    }
    assert_eq!(store.sessions(None, everything()).await.unwrap().len(), 20);
}

/// What a node says is kept, whatever it says.
#[tokio::test]
async fn a_nul_in_a_text_stops_no_report() {
    let hubs = Hubs::new();
    let store = hubs.fresh().await;
    store.accept(&assigned_task(1)).await.unwrap();
    let lost = Event::Ended { attempt: attempt(1), outcome: Outcome::Lost { detail: "a\0b".into() } };
    assert!(matches!(store.apply(task_id(1), &lost, Besides::default(), 5).await.unwrap(), Applied::Done(..)));
    let reason = store.task(task_id(1)).await.unwrap().unwrap().progress.reason.unwrap();
    assert!(reason.detail.contains("a\u{FFFD}b"), "{reason:?}");
}

#[tokio::test]
async fn lists_use_their_indexes() {
    let url = Server::shared().database();
    let hubs = Hubs::new();
    let _store = hubs.store(&url).await;
    let mut conn = PgConnection::connect(&url).await.unwrap();
    sqlx::raw_sql("SET enable_seqscan = off; SET enable_sort = off; SET enable_bitmapscan = off").execute(&mut conn).await.unwrap();
    for (condition, index) in [
        ("session = '\\x00'", "tasks_session"),
        ("\"user\" = '\\x00' AND state = 'running'", "tasks_user_state"),
        ("skill = 'shell'", "tasks_skill"),
        ("state = 'running'", "tasks_state"),
        ("COALESCE(attempt_node, named_node) = '\\x00'", "tasks_node"),
        ("TRUE", "tasks_pkey"),
    ] {
        let sql = format!("EXPLAIN SELECT * FROM tasks WHERE {condition} AND id < '\\x01' ORDER BY id DESC LIMIT 9");
        let plan = sqlx::query(sqlx::AssertSqlSafe(sql)).fetch_all(&mut conn).await.unwrap();
        let plan: Vec<String> = plan.iter().map(|r| r.get(0)).collect();
        assert!(plan.iter().any(|p| p.contains(&format!("Index Scan Backward using {index}"))), "{condition}: {plan:?}");
    }
}

#[tokio::test]
async fn a_later_schema_is_refused_by_name() {
    let url = Server::shared().database();
    let hubs = Hubs::new();
    drop(hubs.store(&url).await);
    let mut conn = PgConnection::connect(&url).await.unwrap();
    let later =
        "INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time) VALUES (9000, 'later', true, '\\x00', 0)";
    sqlx::query(later).execute(&mut conn).await.unwrap();
    let refused = open(hubs.folder.path(), &url.replace("postgres@", "postgres:geheim@"), &Tasks::new()).await.unwrap_err();
    assert!(matches!(refused, OpenError::Newer { found: 9000, .. }), "{refused:?}");
    let text = refused.to_string();
    let name = url.rsplit('/').next().unwrap();
    assert!(text.contains("9000") && text.contains(name) && text.contains("later version") && !text.contains("geheim"), "{text}");
}

#[tokio::test]
async fn a_database_that_is_not_there_is_named() {
    let url = Server::shared().database().replace("/test", "/nothing").replace("postgres@", "postgres:geheim@");
    let refused = open(tempfile::tempdir().unwrap().path(), &url, &Tasks::new()).await.unwrap_err().to_string();
    assert!(refused.contains("nothing") && refused.contains("does not exist") && !refused.contains("geheim"), "{refused}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hubs_that_start_at_once_bring_the_schema_up_once() {
    let url = Server::shared().database();
    let (dir, tasks) = (tempfile::tempdir().unwrap(), Tasks::new());
    let folders: Vec<_> = (0..5).map(|n| dir.path().join(n.to_string())).collect();
    let stores = join_all(folders.iter().map(|f| open(f, &url, &tasks))).await;
    let facts = |n| hub_engine::records::HubMeta { id: hub_id(n), incarnation: 1, created_at: 1 };
    let said = join_all(stores.iter().zip(1..).map(|(s, n)| s.as_ref().unwrap().hub(facts(n)))).await;
    let said: Vec<_> = said.into_iter().map(Result::unwrap).collect();
    assert!(said.iter().all(|s| *s == said[0]), "one deployment: {said:?}");
}

/// The events of one task come through both hubs at once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hubs_give_a_task_one_end() {
    let hubs = Hubs::new();
    let stores = hubs.pair().await;
    for n in 0..10 {
        let id = task_id(n);
        stores[usize::from(n % 2)].accept(&assigned_task(n)).await.unwrap();
        let events: Vec<Event> = (0..50).map(ended).collect();
        let racing = events.iter().zip(stores.iter().cycle()).map(|(e, store)| store.apply(id, e, Besides::default(), 9));
        let outcomes: Vec<Applied> = join_all(racing).await.into_iter().map(Result::unwrap).collect();
        let done: Vec<_> = outcomes.iter().filter_map(|o| if let Applied::Done(t, _) = o { Some(t) } else { None }).collect();
        assert_eq!(done.len(), 1, "exactly one is done");
        for store in &stores {
            let kept = store.task(id).await.unwrap().unwrap();
            assert_eq!(kept.progress, done[0].progress, "both hubs hold what was answered");
            assert_eq!(store.history(id).await.unwrap().len(), 3, "accepted, assigned, ended");
        }
    }
}

/// Both hubs go over the same tasks at once, each in its own order.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hubs_share_the_events_of_many_tasks() {
    let hubs = Hubs::new();
    let stores = hubs.pair().await;
    let tasks: Vec<_> = (0..100).map(assigned_task).collect();
    join_all(tasks.iter().map(|t| stores[0].accept(t))).await.into_iter().for_each(Result::unwrap);
    let end = ended(0);
    let one = join_all(tasks.iter().map(|t| stores[0].apply(t.id, &end, Besides::default(), 9)));
    let two = join_all(tasks.iter().rev().map(|t| stores[1].apply(t.id, &end, Besides::default(), 9)));
    let (one, mut two) = futures::join!(one, two);
    two.reverse();
    for (one, two) in one.into_iter().zip(two) {
        let done = [one.unwrap(), two.unwrap()].iter().filter(|o| matches!(o, Applied::Done(..))).count();
        assert_eq!(done, 1, "each task ends by one of them");
    }
}

/// One hub erases while output is on its way to another, which goes by what it remembers.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hubs_keep_nothing_of_what_one_erases() {
    let hubs = Hubs::new();
    let url = Server::shared().database();
    let (one, two) = (&hubs.store(&url).await, &hubs.store(&url).await);
    let (session_id, no) = (session_id(1), attempt(1));
    one.add_session(&session(1, 1)).await.unwrap();
    // Nothing, little and much before.
    let some = |n: u16, seq| frame(seq, Stream::Stdout, vec![n as u8; usize::from(n) * 1000]);
    for n in 1..=20 {
        one.accept(&Task { session: Some(session_id), ..assigned_task(n) }).await.unwrap();
        if n % 5 > 0 {
            one.append(task_id(n), no, vec![some(n, 1)], KEEP).await.unwrap().unwrap();
        }
        one.totals(task_id(n), no).await.unwrap();
        assert!(matches!(one.apply(task_id(n), &ended(0), Besides::default(), 9).await.unwrap(), Applied::Done(..)));
    }
    assert!(one.close_session(session_id, None, 10).await.unwrap());
    assert_eq!(two.begin_purge(session_id, None, 11).await.unwrap(), PurgeStart::Begun);
    let erase = async {
        let mut after = None;
        while let PurgeStep::Until(task) = two.purge_step(session_id, after, 3).await.unwrap() {
            after = task;
        }
    };
    let more = async |seq| {
        let late = (1..=20).map(|n| one.append(task_id(n), no, vec![some(n, seq + u64::from(n % 5 > 0))], KEEP));
        join_all(late).await.into_iter().map(|t| t.unwrap().unwrap().durable_seq).collect::<Vec<u64>>()
    };
    let ((), first) = futures::join!(erase, more(1));
    let second = more(2).await;
    assert!(first.iter().zip(&second).all(|(a, b)| a + 1 == *b), "what comes is acknowledged");
    let fresh = hubs.store(&url).await;
    for n in 1..=20 {
        let t = fresh.totals(task_id(n), no).await.unwrap();
        assert_eq!((t.durable_seq, t.kept_seq, t.truncated), (second[usize::from(n) - 1], 0, true), "{n}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hubs_give_an_invite_one_node() {
    let hubs = Hubs::new();
    let stores = hubs.pair().await;
    for round in 0..5 {
        let invite = invite(round);
        stores[0].add_invite(&invite).await.unwrap();
        let candidates: Vec<Node> = (1..=20).map(|n| node(round * 100 + n, n as u8)).collect();
        let claims = candidates.iter().zip(stores.iter().cycle());
        let outcomes = join_all(claims.map(|(n, store)| store.claim_invite(invite.id, n, invite.created_at, 600))).await;
        let outcomes: Vec<Claim> = outcomes.into_iter().map(Result::unwrap).collect();
        assert_eq!(outcomes.iter().filter(|c| **c == Claim::Claimed).count(), 1, "exactly one wins");
        assert_eq!(outcomes.iter().filter(|c| **c == Claim::Used).count(), 19);
        assert_eq!(stores[1].nodes(None, everything()).await.unwrap().len(), usize::from(round) + 1);
        assert_eq!(stores[1].invite(invite.id).await.unwrap().unwrap().notices.len(), 19, "no notice overwrote another");
    }
}

/// The same keys at both hubs at once, each hub in its own order.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hubs_make_one_thing_of_a_key() {
    let hubs = Hubs::new();
    let stores = hubs.pair().await;
    let create = async |hub: usize, scope: u8| {
        let thing = Creation::Task(Box::new(task(u16::from(scope) * 2 + hub as u16)));
        stores[hub].create(thing, &Once { scope: [scope; 32], request: [1; 32], at: 9, since: 0 }).await.unwrap()
    };
    let one = join_all((0..60).map(|scope| create(0, scope)));
    let two = join_all((0..60).rev().map(|scope| create(1, scope)));
    let (one, mut two) = futures::join!(one, two);
    two.reverse();
    for (scope, pair) in one.into_iter().zip(two).enumerate() {
        let (first, thing) = match pair {
            (None, Some(known)) => (0, known.thing),
            (Some(known), None) => (1, known.thing),
            other => panic!("{scope}: {other:?}"),
        };
        assert_eq!(thing, task_id(scope as u16 * 2 + first).to_string(), "the loser hears of the winner's");
    }
    assert_eq!(stores[0].tasks(&TaskFilter::default(), everything()).await.unwrap().len(), 60);
}

/// Each transaction holds rows that the other one wants, so one of them has to be done again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hubs_in_each_others_way_both_get_through() {
    let hubs = Hubs::new();
    let stores = hubs.pair().await;
    let nodes: Vec<_> = (1..=10).map(|n| node(n, n as u8)).collect();
    for (n, node) in nodes.iter().enumerate() {
        stores[0].add_invite(&invite(n as u16)).await.unwrap();
        assert_eq!(stores[0].claim_invite(invite_id(n as u16), node, node.created_at, 600).await.unwrap(), Claim::Claimed);
    }
    for round in 0..10 {
        let one = join_all(nodes.iter().map(|n| stores[0].raise_generation(n.id, 5)));
        let two = join_all(nodes.iter().rev().map(|n| stores[1].raise_generation(n.id, 5)));
        let (one, mut two) = futures::join!(one, two);
        two.reverse();
        for (one, two) in one.into_iter().zip(two) {
            let both = BTreeSet::from([one.unwrap().unwrap(), two.unwrap().unwrap()]);
            assert_eq!(both, BTreeSet::from([2 * round + 1, 2 * round + 2]), "no generation is given twice, none is skipped");
        }
    }
}

/// A log-in that one hub ends while another one rotates its token has ended.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_token_escapes_the_end_of_its_log_in() {
    let hubs = Hubs::new();
    let stores = hubs.pair().await;
    assert!(stores[0].add_user(&user(1, "ada")).await.unwrap());
    for n in 0..40u16 {
        let mac = |k: u8| {
            let mut m = [k; 32];
            m[..2].copy_from_slice(&n.to_be_bytes());
            m
        };
        let login = login_id(n);
        let token = RefreshToken { mac: mac(1), login, user: user_id(1), expires_at: 1000 };
        stores[0].add_login(&device(n, 1), &token).await.unwrap();
        let (old, new) = (mac(1), mac(2));
        let rotate = stores[0].rotate_refresh(&old, &new, 1000, 5);
        let end = async {
            if n % 2 == 0 {
                return stores[1].end_login(login).await.unwrap();
            }
            let was = stores[1].user(user_id(1)).await.unwrap().unwrap().password_hash;
            assert!(stores[1].set_password(user_id(1), &was, &format!("new {n}"), None).await.unwrap());
        };
        let (rotated, ()) = futures::join!(rotate, end);
        assert!(matches!(rotated.unwrap(), Rotation::Rotated { .. } | Rotation::Unknown));
        assert!(stores[0].device(login.into(), 6).await.unwrap().is_none(), "round {n}");
    }
}

/// COMMIT itself may fail: here by a reference that is checked only then.
#[tokio::test]
async fn a_failing_commit_is_not_acknowledged() {
    let url = Server::shared().database();
    let hubs = Hubs::new();
    let store = hubs.store(&url).await;
    let mut conn = PgConnection::connect(&url).await.unwrap();
    let later = "ALTER TABLE session_nodes ALTER CONSTRAINT session_nodes_session_fkey DEFERRABLE INITIALLY DEFERRED";
    sqlx::query(later).execute(&mut conn).await.unwrap();
    let (session, stranger) = (session(1, 1), session_id(9));
    let (beside, lost) = futures::join!(store.add_session(&session), store.attach(stranger, node_id(1), None, 5));
    let lost = lost.unwrap_err().to_string();
    assert!(lost.contains("the transaction failed") && lost.contains("foreign key"), "{lost}");
    // It may have shared the commit or had one of its own; what was said is what is there.
    assert_eq!(store.session(session.id).await.unwrap().is_some(), beside.is_ok());
    store.accept(&task(1)).await.expect("the writer goes on");
}

/// A connection ends in the middle of a transaction, as by a fault of the network.
#[tokio::test]
async fn a_lost_connection_is_told_and_replaced() {
    let url = Server::shared().database();
    let hubs = Hubs::new();
    let store = hubs.store(&url).await;
    store.add_session(&session(1, 1)).await.unwrap();
    let mut other = PgConnection::connect(&url).await.unwrap();
    sqlx::raw_sql("BEGIN; SELECT 1 FROM sessions FOR UPDATE").execute(&mut other).await.unwrap();
    let mut blocked = Box::pin(store.close_session(session_id(1), None, 5));
    let cut = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'";
    let cutting = async {
        while sqlx::query(cut).fetch_all(&mut other).await.unwrap().is_empty() {
            sqlx::query("SELECT pg_stat_clear_snapshot()").execute(&mut other).await.unwrap();
        }
    };
    let (lost, ()) = tokio::time::timeout(PATIENCE, async { futures::join!(&mut blocked, cutting) }).await.unwrap();
    let lost = lost.unwrap_err().to_string();
    assert!(lost.contains("the connection to the database was lost") && lost.contains("not known"), "{lost}");
    sqlx::query("ROLLBACK").execute(&mut other).await.unwrap();
    assert!(store.close_session(session_id(1), None, 6).await.unwrap(), "the next write has a new connection");
}

/// A server that was started anew while nobody looked has closed every connection.
#[tokio::test]
async fn a_restart_that_nobody_saw_fails_nobody() {
    let server = Server::start();
    let (dir, tasks) = (tempfile::tempdir().unwrap(), Tasks::new());
    let store = open(dir.path(), &server.database(), &tasks).await.unwrap();
    for outcome in join_all((0..50).map(|_| store.ping())).await {
        outcome.unwrap();
    }
    server.stop();
    server.again();
    store.ping().await.expect("a read asks again on another connection");
    store.accept(&task(1)).await.expect("and so does a write of which nothing was said yet");
}

/// The server goes twice, once cleanly and once not, each time for seconds.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_goes_and_comes_back() {
    let server = Server::start();
    let url = server.database();
    let (dir, tasks) = (tempfile::tempdir().unwrap(), Tasks::new());
    let store = open(dir.path(), &url, &tasks).await.unwrap();
    store.ping().await.unwrap();
    let (acknowledged, stop) = (Arc::new(Mutex::new(BTreeSet::<TaskId>::new())), Arc::new(AtomicBool::new(false)));
    let lanes = Tasks::new();
    // How many may be there at most: writers that ran while this test stood still must not run out of tasks.
    let enough = Arc::new(AtomicUsize::new(0));
    for lane in 0..4u16 {
        let (store, acknowledged, stop, enough) = (store.clone(), acknowledged.clone(), stop.clone(), enough.clone());
        lanes.spawn("writes", async move {
            for n in 0..10_000 {
                while acknowledged.lock().unwrap().len() >= enough.load(Ordering::SeqCst) && !stop.load(Ordering::SeqCst) {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
                let task = assigned_task(lane * 10_000 + n);
                match store.accept(&task).await {
                    Ok(()) => drop(acknowledged.lock().unwrap().insert(task.id)),
                    // Not in a hurry while there is no server.
                    Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
                }
                if stop.load(Ordering::SeqCst) {
                    break;
                }
            }
        });
    }
    let count = || acknowledged.lock().unwrap().len();
    let more = async |than: usize| {
        enough.store(than + 2_000, Ordering::SeqCst);
        let wait = async {
            while count() < than + 100 {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(PATIENCE, wait).await.expect("writes go on by themselves");
    };
    for crash in [false, true] {
        more(count()).await;
        if crash {
            server.crash()
        } else {
            server.stop()
        }
        for _ in 0..3 {
            let refused = store.add_session(&session(1, 1)).await.unwrap_err().to_string();
            assert!(refused.contains("the database cannot be reached") || refused.contains("lost"), "{refused}");
            let refused = store.ping().await.unwrap_err().to_string();
            assert!(refused.contains("the database cannot be reached") || refused.contains("lost"), "{refused}");
        }
        let before = count();
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert_eq!(count(), before, "nothing is acknowledged without a server");
        server.again();
        store.ping().await.expect("reads are back at once");
        more(before).await;
    }
    stop.store(true, Ordering::SeqCst);
    assert_eq!(lanes.end(PATIENCE).await, Ended::Clean);
    let kept = store.tasks(&TaskFilter::default(), everything()).await.unwrap();
    let kept: BTreeSet<TaskId> = kept.iter().map(|t| t.id).collect();
    let acknowledged = acknowledged.lock().unwrap().clone();
    let gone: Vec<_> = acknowledged.difference(&kept).collect();
    assert!(gone.is_empty(), "{} of {} acknowledged tasks are gone: {gone:?}", gone.len(), acknowledged.len());
    assert_eq!(store.history(*acknowledged.last().unwrap()).await.unwrap().len(), 2);
    assert_eq!(tasks.end(GRACE).await, Ended::Clean);
}

/// Both hubs change nodes while a third reads along: it misses nothing, whatever it met half-way.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hub_that_follows_the_registry_misses_nothing() {
    let hubs = Hubs::new();
    let stores = hubs.pair().await;
    let ids: Vec<_> = (1..=20).map(node_id).collect();
    for n in 1..=20 {
        stores[0].add_invite(&invite(n)).await.unwrap();
        let one = node(n, n as u8);
        assert_eq!(stores[0].claim_invite(invite_id(n), &one, one.created_at, 600).await.unwrap(), Claim::Claimed);
    }
    let done = AtomicBool::new(false);
    let writing = async {
        let both = ids.iter().zip(stores.iter().cycle()).map(|(id, store)| async move {
            for n in 0..10 {
                let change = NodeChange { task_limit: Some(Some(n)), ..Default::default() };
                store.change_node(*id, &change).await.unwrap().unwrap();
            }
            if id.as_bytes()[15] % 2 == 0 {
                assert!(store.remove_node(*id, 5).await.unwrap())
            }
        });
        join_all(both).await;
        done.store(true, Ordering::SeqCst);
    };
    let reading = async {
        let (mut epoch, mut known, mut removed) = (0, BTreeMap::new(), BTreeSet::new());
        loop {
            let last = done.load(Ordering::SeqCst);
            let news = stores[1].changed_since(epoch).await.unwrap();
            assert!(news.epoch >= epoch);
            epoch = news.epoch;
            known.extend(news.nodes.into_iter().map(|n| (n.id, n.task_limit)));
            removed.extend(news.removed);
            if last {
                return (epoch, known, removed);
            }
        }
    };
    let ((), (epoch, known, removed)) = futures::join!(writing, reading);
    assert_eq!(epoch, stores[0].registry_epoch().await.unwrap());
    assert_eq!(epoch, 200 + removed.len() as u64, "each change has one of its own");
    assert_eq!(removed, ids.iter().copied().filter(|id| id.as_bytes()[15] % 2 == 0).collect());
    assert!(ids.iter().filter(|id| !removed.contains(id)).all(|id| known[id] == Some(9)));
}

#[tokio::test]
async fn the_room_in_use_is_estimated_and_falls_with_what_is_erased() {
    let hubs = Hubs::new();
    let store = hubs.fresh().await;
    for n in 1..=300 {
        let mut t = task(n);
        t.spec = (0..2000u32).map(|i| (i.wrapping_mul(2_654_435_761).wrapping_add(u32::from(n)) >> 13) as u8).collect();
        store.accept(&t).await.unwrap();
        store.apply(t.id, &Event::Expired { detail: "x".into() }, Besides::default(), t.created_at).await.unwrap();
    }
    // The server counts a little later.
    let told = async |is: &dyn Fn(u64) -> bool| {
        let deadline = tokio::time::Instant::now() + PATIENCE;
        loop {
            let used = store.storage().await.unwrap();
            assert!(used.database_bytes > 1_000_000, "{used:?}");
            if is(used.journal_bytes) {
                return used.journal_bytes;
            }
            assert!(tokio::time::Instant::now() < deadline, "{used:?}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    let full = told(&|n| n > 600_000).await;
    assert!(full < 3_000_000, "{full}");
    let erased = store.erase_tasks(i64::MAX, u64::MAX, 250).await.unwrap();
    assert!(erased.tasks == 250 && erased.bytes > full / 3 && erased.bytes < full * 3, "{erased:?} {full}");
    told(&|n| n < full / 3).await;
}

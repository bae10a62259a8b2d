//! The one writer: whatever waits shares a transaction and its commit.
//!
//! There is no timer: while one commit syncs, the next group gathers. The three writes of the hot
//! path (accept, apply, output totals) go as one statement per table for the whole group; a group
//! that fails is tried again one by one. Each other job runs in a savepoint of its own. Answers
//! leave after COMMIT has succeeded; when it fails, all of the group hear that.
//!
//! A group of starts alone is committed without a sync: nothing is answered to a node for one, and a
//! node whose hub has lost it says it again. It is durable with the next group.
//!
//! Another hub on the same database may be in the way: then the whole transaction is done again. A
//! connection that is lost is told to all that wait, and the next group asks for a new one.

use crate::audit::{Chain, Due, Effect};
use crate::dialect::{Conn, Connector, Verdict};
use crate::journal::{Accept, Apply};
use crate::output::Raise;
use crate::store::Failed;
use futures::future::BoxFuture;
use hub_engine::audit::{Entry, Ticket, ticket};
use hub_engine::ports::{StoreError, Stored};
use mesh_core::audit::Head;
use mesh_core::{ChainId, Digest};
use mesh_process::Tasks;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;

/// Callers beyond this many wait for a place in the queue.
const QUEUE: usize = 1024;
/// Most jobs of one transaction.
const GROUP: usize = 512;
/// How often a transaction is done when others are in its way.
const TURNS: u32 = 8;
/// A database that could not be reached is not asked again for so long.
const PAUSE: Duration = Duration::from_millis(200);

/// A kind of write of which many are done by a few statements.
pub(crate) trait Bulk: Sized + Send + Sync {
    type Outcome: Effect + Send + 'static;
    const OPERATION: &'static str;
    /// Does all of `jobs` and gives their outcomes in the same order.
    fn write<'c>(conn: &'c mut Conn, jobs: &'c [&'c Self]) -> BoxFuture<'c, Result<Vec<Self::Outcome>, Failed>>;
}

/// Where an outcome waits for the commit.
struct Reply<T> {
    operation: &'static str,
    to: oneshot::Sender<Stored<T>>,
    outcome: Option<Stored<T>>,
    /// The audit entry of the call that asked.
    ticket: Option<Ticket>,
}

impl<T: Effect> Reply<T> {
    fn new(operation: &'static str) -> (Self, oneshot::Receiver<Stored<T>>) {
        let (to, answer) = oneshot::channel();
        (Self { operation, to, outcome: None, ticket: ticket() }, answer)
    }
    /// The entry that goes with what was done, if anything was.
    fn due(&self) -> Option<Due> {
        let ticket = self.ticket.as_ref()?;
        let outcome = self.outcome.as_ref()?.as_ref().ok()?.outcome()?;
        Some(Due { entry: ticket.entry(outcome)?, ticket: Some(ticket.clone()) })
    }
    fn keep(&mut self, outcome: Result<T, Failed>) {
        self.outcome = Some(outcome.map_err(|e| StoreError::new(self.operation, e)));
    }
    fn send(self, lost: Option<&str>) {
        let missing = || Err(StoreError::new(self.operation, "a job gave no outcome"));
        // Who asked may have gone; the write stands.
        let _ = self.to.send(match lost {
            None => self.outcome.unwrap_or_else(missing),
            Some(why) => Err(StoreError::new(self.operation, why.to_owned())),
        });
    }
}

pub(crate) struct Asked<B: Bulk> {
    job: B,
    reply: Reply<B::Outcome>,
}

/// A job of any other kind.
pub(crate) trait Work: Send {
    /// Jobs that wait for one another across hubs go in this order, so that no two hubs wait in a circle.
    fn place(&self) -> Option<Digest>;
    /// Keeps the outcome; gives the error when nothing of the job may stay.
    fn run<'c>(&'c mut self, conn: &'c mut Conn) -> BoxFuture<'c, Result<(), Failed>>;
    /// Says that the job failed, and nobody else did.
    fn fail(&mut self, error: Failed);
    /// The audit entry that goes with what was done.
    fn due(&self) -> Option<Due>;
    fn send(self: Box<Self>, lost: Option<&str>);
}

struct Job<A, T> {
    place: Option<Digest>,
    with: A,
    work: for<'c> fn(&'c mut Conn, &'c A) -> BoxFuture<'c, Result<T, Failed>>,
    reply: Reply<T>,
}

impl<A: Send + Sync, T: Effect + Send> Work for Job<A, T> {
    fn place(&self) -> Option<Digest> {
        self.place
    }
    fn run<'c>(&'c mut self, conn: &'c mut Conn) -> BoxFuture<'c, Result<(), Failed>> {
        Box::pin(async move {
            let outcome = (self.work)(conn, &self.with).await?;
            self.reply.keep(Ok(outcome));
            Ok(())
        })
    }
    fn fail(&mut self, error: Failed) {
        self.reply.keep(Err(error));
    }
    fn due(&self) -> Option<Due> {
        self.reply.due()
    }
    fn send(self: Box<Self>, lost: Option<&str>) {
        self.reply.send(lost);
    }
}

/// Boxed, so that the queue and the futures on the way to it stay small.
pub(crate) enum Request {
    Accept(Box<Asked<Accept>>),
    Apply(Box<Asked<Apply>>),
    Raise(Box<Asked<Raise>>),
    Other(Box<dyn Work>),
    /// An audit entry by itself.
    Entry(Box<Lone>),
}

/// Nothing is done but what the entry itself says.
pub(crate) struct Lone {
    entry: Entry,
    reply: Reply<()>,
}

impl Request {
    /// Whether its commit may wait for the sync of the next one.
    fn may_lag(&self) -> bool {
        matches!(self, Self::Apply(a) if a.job.may_lag())
    }
    fn due(&self) -> Option<Due> {
        match self {
            Self::Accept(a) => a.reply.due(),
            Self::Apply(a) => a.reply.due(),
            Self::Raise(a) => a.reply.due(),
            Self::Other(work) => work.due(),
            Self::Entry(lone) => Some(Due { entry: lone.entry.clone(), ticket: None }),
        }
    }
    fn send(self, lost: Option<&str>) {
        match self {
            Self::Accept(a) => a.reply.send(lost),
            Self::Apply(a) => a.reply.send(lost),
            Self::Raise(a) => a.reply.send(lost),
            Self::Other(work) => work.send(lost),
            Self::Entry(mut lone) => {
                lone.reply.keep(Ok(()));
                lone.reply.send(lost);
            }
        }
    }
}

impl From<Asked<Accept>> for Request {
    fn from(asked: Asked<Accept>) -> Self {
        Self::Accept(Box::new(asked))
    }
}
impl From<Asked<Apply>> for Request {
    fn from(asked: Asked<Apply>) -> Self {
        Self::Apply(Box::new(asked))
    }
}
impl From<Asked<Raise>> for Request {
    fn from(asked: Asked<Raise>) -> Self {
        Self::Raise(Box::new(asked))
    }
}

/// The writer's handle.
#[derive(Debug, Clone)]
pub(crate) struct Writer {
    queue: mpsc::Sender<Request>,
    shared: Arc<Shared>,
    head: watch::Sender<Head>,
}

#[derive(Debug, Default)]
struct Shared {
    commits: AtomicU64,
    catch_up: AtomicBool,
    chain: OnceLock<ChainId>,
}

impl Writer {
    pub(crate) fn start(conn: Conn, connector: Connector, tasks: &Tasks) -> std::io::Result<Self> {
        let (queue, waiting) = mpsc::channel(QUEUE);
        let shared = Arc::new(Shared::default());
        let head = watch::Sender::new(Head::none(ChainId::from_bytes([0; 16])));
        let link = Link { conn: Some(conn), connector, refused: None, chain: Chain::new(head.clone()) };
        let on_file = matches!(link.connector, Connector::Sqlite(_));
        let writing = write_groups(link, waiting, shared.clone(), tasks.token());
        if on_file {
            // Its statements block, so it has a thread; nothing else in it waits by a timer.
            tasks.spawn_vital_thread("store writer", || futures::executor::block_on(writing))?;
        } else {
            tasks.spawn_vital("store writer", writing);
        }
        Ok(Self { queue, shared, head })
    }
    pub(crate) fn commits(&self) -> u64 {
        self.shared.commits.load(Ordering::Acquire)
    }
    /// From here on audit entries go into this chain.
    pub(crate) fn chain(&self, chain: ChainId) -> Result<(), Failed> {
        if *self.shared.chain.get_or_init(|| chain) == chain { Ok(()) } else { Err("another chain was begun".into()) }
    }
    pub(crate) fn head(&self) -> watch::Receiver<Head> {
        self.head.subscribe()
    }
    /// Where the chain stands, before anything was added.
    pub(crate) fn tell_head(&self, head: Head) {
        self.head.send_replace(head);
    }
    pub(crate) fn waiting(&self) -> usize {
        self.queue.max_capacity() - self.queue.capacity()
    }
    /// Asks for a checkpoint between two transactions.
    pub(crate) fn catch_up(&self) {
        self.shared.catch_up.store(true, Ordering::Release);
    }

    pub(crate) async fn bulk<B: Bulk>(&self, job: B) -> Stored<B::Outcome>
    where
        Request: From<Asked<B>>,
    {
        let (reply, answer) = Reply::new(B::OPERATION);
        self.ask(B::OPERATION, Asked { job, reply }.into(), answer).await
    }

    pub(crate) async fn run<A, T>(
        &self,
        operation: &'static str,
        place: Option<Digest>,
        with: A,
        work: for<'c> fn(&'c mut Conn, &'c A) -> BoxFuture<'c, Result<T, Failed>>,
    ) -> Stored<T>
    where
        A: Send + Sync + 'static,
        T: Effect + Send + 'static,
    {
        let (reply, answer) = Reply::new(operation);
        self.ask(operation, Request::Other(Box::new(Job { place, with, work, reply })), answer).await
    }

    pub(crate) async fn append(&self, entry: Entry) -> Stored<()> {
        let (reply, answer) = Reply::new("audit.append");
        self.ask("audit.append", Request::Entry(Box::new(Lone { entry, reply })), answer).await
    }

    async fn ask<T>(&self, operation: &'static str, request: Request, answer: oneshot::Receiver<Stored<T>>) -> Stored<T> {
        self.queue.send(request).await.map_err(|_| StoreError::new(operation, "the store has ended"))?;
        answer.await.map_err(|_| StoreError::new(operation, "the store has ended"))?
    }
}

async fn write_groups(
    mut link: Link,
    mut waiting: mpsc::Receiver<Request>,
    shared: Arc<Shared>,
    end: mesh_process::CancellationToken,
) -> Result<(), Failed> {
    let mut group = Vec::with_capacity(GROUP);
    let mut ending = false;
    loop {
        tokio::select! {
            biased;
            () = end.cancelled(), if !ending => {
                // Whoever is in the queue is still served; nobody joins it.
                waiting.close();
                ending = true;
                continue;
            }
            n = waiting.recv_many(&mut group, GROUP) => if n == 0 { break },
        }
        link.chain.id = shared.chain.get().copied();
        let begun = Instant::now();
        let written = link.write(&mut group).await;
        count(written.is_ok(), group.len(), begun.elapsed());
        let lost = match &written {
            Ok(()) => {
                shared.commits.fetch_add(1, Ordering::AcqRel);
                None
            }
            Err(error) => Some(error.to_string()),
        };
        for request in group.drain(..) {
            request.send(lost.as_deref());
        }
        if shared.catch_up.swap(false, Ordering::AcqRel)
            && let Some(conn) = &mut link.conn
            && let Err(error) = conn.checkpoint().await
        {
            tracing::warn!(%error, "checkpoint between transactions failed");
        }
    }
    match link.conn {
        Some(conn) => conn.close().await,
        None => Ok(()),
    }
}

fn count(committed: bool, jobs: usize, took: Duration) {
    if !committed {
        return metrics::counter!("cortex_store_commits_failed_total").increment(1);
    }
    metrics::counter!("cortex_store_commits_total").increment(1);
    metrics::histogram!("cortex_store_commit_jobs").record(jobs as f64);
    metrics::histogram!("cortex_store_commit_seconds").record(took.as_secs_f64());
}

/// The writer's connection, or what is needed to have it again.
struct Link {
    conn: Option<Conn>,
    connector: Connector,
    /// When the database could not be reached, and why.
    refused: Option<(Instant, String)>,
    chain: Chain,
}

impl Link {
    /// Does the whole group in one transaction. An error is for all of them.
    async fn write(&mut self, group: &mut [Request]) -> Result<(), Failed> {
        let (mut turn, mut fresh) = (1, self.conn.is_none());
        let synced = !group.iter().all(Request::may_lag);
        loop {
            let mut conn = self.connected().await?;
            let begun = self.connector.in_time(conn.begin(synced)).await;
            let written = match begun {
                // It may have been lost long ago, and nothing was asked of it yet.
                Err(error) if !fresh && self.connector.verdict(&error) == Verdict::Connection => {
                    tracing::warn!(%error, "the connection to the database was lost; a new one is made");
                    fresh = true;
                    continue;
                }
                Err(error) => Err(error),
                Ok(()) => self.connector.in_time(transaction(&mut conn, &self.connector, group, &mut self.chain)).await,
            };
            let Err(error) = written else {
                self.chain.committed();
                self.conn = Some(conn);
                return Ok(());
            };
            self.chain.lost();
            let verdict = self.connector.verdict(&error);
            self.clear(conn, verdict).await;
            if verdict == Verdict::Again && turn < TURNS {
                tracing::debug!(%error, turn, "others were in the way of a transaction; once more");
                tokio::time::sleep(Duration::from_millis(2) * turn).await;
                turn += 1;
                continue;
            }
            tracing::error!(%error, jobs = group.len(), "a transaction failed as a whole");
            let why = match verdict {
                Verdict::Connection => "the connection to the database was lost, so it is not known whether this was written",
                _ => "the transaction failed",
            };
            return Err(format!("{why}: {error}").into());
        }
    }

    /// The connection, or a new one.
    async fn connected(&mut self) -> Result<Conn, Failed> {
        if let Some(conn) = self.conn.take() {
            return Ok(conn);
        }
        if let Some((at, why)) = &self.refused
            && at.elapsed() < PAUSE
        {
            return Err(why.clone().into());
        }
        match self.connector.connect().await {
            Ok(conn) => {
                if self.refused.take().is_some() {
                    tracing::info!("the database is back");
                }
                Ok(conn)
            }
            Err(error) => {
                if self.refused.is_none() {
                    tracing::error!(%error, "writes are refused until the database is back");
                }
                self.refused = Some((Instant::now(), error.to_string()));
                Err(error)
            }
        }
    }

    /// Makes a connection ready for the next transaction, or gives it up.
    async fn clear(&mut self, mut conn: Conn, verdict: Verdict) {
        if verdict == Verdict::Connection {
            return;
        }
        // Fails when the transaction was gone already, or when the connection is of no more use.
        if self.connector.in_time(conn.rollback()).await.is_ok() {
            self.conn = Some(conn);
        }
    }
}

/// One that has begun.
struct Transaction<'c> {
    conn: &'c mut Conn,
    connector: &'c Connector,
    /// How many jobs have been begun.
    jobs: u32,
}

async fn transaction(conn: &mut Conn, connector: &Connector, group: &mut [Request], chain: &mut Chain) -> Result<(), Failed> {
    let mut t = Transaction { conn, connector, jobs: 0 };
    let (mut accepts, mut raises, mut applies, mut others) = (vec![], vec![], vec![], vec![]);
    for request in &mut *group {
        match request {
            Request::Accept(a) => accepts.push(&mut **a),
            Request::Raise(a) => raises.push(&mut **a),
            Request::Apply(a) => applies.push(&mut **a),
            Request::Other(work) => others.push(work),
            Request::Entry(_) => {}
        }
    }
    // Callers in one group are concurrent, so any order between kinds is right.
    t.bulk(&mut accepts).await?;
    t.bulk(&mut raises).await?;
    t.bulk(&mut applies).await?;
    others.sort_by_key(|work| work.place());
    for work in others {
        t.begin().await?;
        if let Err(error) = work.run(t.conn).await {
            work.fail(t.alone(error).await?);
        }
    }
    // What was done and is not in the audit log was not done: an error here is one of all.
    let due: Vec<Due> = group.iter().filter_map(Request::due).collect();
    chain.append(t.conn, due).await?;
    t.conn.commit().await
}

impl Transaction<'_> {
    /// The first job has its savepoint from the beginning on.
    async fn begin(&mut self) -> Result<(), Failed> {
        if self.jobs > 0 {
            self.conn.next_job().await?;
        }
        self.jobs += 1;
        Ok(())
    }
    /// Undoes a job that failed and gives its error back, or fails when it is an error of all.
    async fn alone(&mut self, error: Failed) -> Result<Failed, Failed> {
        if self.connector.verdict(&error) != Verdict::Job {
            return Err(error);
        }
        self.conn.undo_job().await?;
        Ok(error)
    }

    async fn bulk<B: Bulk>(&mut self, asked: &mut [&mut Asked<B>]) -> Result<(), Failed> {
        let jobs: Vec<&B> = asked.iter().map(|a| &a.job).collect();
        if jobs.is_empty() {
            return Ok(());
        }
        let mut outcomes = Vec::with_capacity(jobs.len());
        match self.attempt(&jobs).await? {
            Ok(all) => outcomes.extend(all.into_iter().map(Ok)),
            Err(error) if jobs.len() == 1 => outcomes.push(Err(error)),
            Err(_) => {
                for job in jobs {
                    let one = self.attempt(&[job]).await?;
                    outcomes.push(one.and_then(|mut o| o.pop().ok_or_else(|| "a job gave no outcome".into())));
                }
            }
        }
        for (asked, outcome) in asked.iter_mut().zip(outcomes) {
            asked.reply.keep(outcome);
        }
        Ok(())
    }

    /// The outer error means that the transaction itself is broken.
    async fn attempt<B: Bulk>(&mut self, jobs: &[&B]) -> Result<Result<Vec<B::Outcome>, Failed>, Failed> {
        self.begin().await?;
        match B::write(self.conn, jobs).await {
            Ok(outcomes) => Ok(Ok(outcomes)),
            Err(error) => Ok(Err(self.alone(error).await?)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dialect::Lane;
    use crate::sql::sql;
    use crate::{Database, Store};
    use std::path::Path;

    const INSERT: &str = "INSERT INTO sessions (id, owner, name, created_at, expires_at, ttl_ms) VALUES ($1, x'00', '', 0, 0, 0)";

    async fn open(dir: &Path) -> Arc<Store> {
        Store::open(dir, &Database::Sqlite, &Tasks::new()).await.unwrap()
    }

    async fn insert(store: &Store, id: u8, then: Result<(), &'static str>) -> Stored<()> {
        store
            .write("test", (id, then), |conn, (id, then)| {
                Box::pin(async move {
                    conn.execute(&sql(INSERT).bind(vec![*id])).await?;
                    Ok((*then)?)
                })
            })
            .await
    }
    async fn ids(store: &Store) -> Vec<u8> {
        let q = sql("SELECT id FROM sessions ORDER BY id");
        store.read.rows(Lane::Quick, q, |r| Ok(r.get::<&[u8]>(0)?[0])).await.unwrap()
    }
    /// Holds the writer in a transaction of its own until it is let go, so that what follows is one group.
    fn gate(store: &Store) -> (oneshot::Sender<()>, impl Future<Output = Stored<()>> + '_) {
        let (go, held) = oneshot::channel::<()>();
        let job = store.write("gate", tokio::sync::Mutex::new(held), |_, held| {
            Box::pin(async move {
                let _ = (&mut *held.lock().await).await;
                Ok(())
            })
        });
        (go, job)
    }
    async fn one_group<T>(store: &Store, jobs: impl Future<Output = T>) -> T {
        let (go, gate) = gate(store);
        let (mut gate, mut jobs) = (Box::pin(gate), Box::pin(jobs));
        assert!(futures::poll!(&mut gate).is_pending());
        while store.writer.queue.capacity() < QUEUE {
            tokio::task::yield_now().await;
        }
        assert!(futures::poll!(&mut jobs).is_pending());
        let before = store.commits();
        let _ = go.send(());
        gate.await.unwrap();
        let done = jobs.await;
        assert!(store.commits() - before <= 2, "the gate's commit and at most one more");
        done
    }

    #[tokio::test]
    async fn a_failing_job_hurts_nobody_else() {
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path()).await;
        let jobs = async {
            futures::join!(insert(&store, 1, Ok(())), insert(&store, 2, Err("no")), insert(&store, 1, Ok(())), insert(&store, 3, Ok(())))
        };
        let (one, two, again, three) = one_group(&store, jobs).await;
        assert!(one.is_ok() && three.is_ok());
        assert_eq!(two.unwrap_err().to_string(), "test: no");
        assert!(again.unwrap_err().to_string().contains("UNIQUE"));
        assert_eq!(ids(&store).await, [1, 3], "what the failing job had written is gone");
    }

    #[tokio::test]
    async fn a_failing_commit_is_told_to_all() {
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path()).await;
        // A reference that is checked only at COMMIT.
        let spoil = || {
            store.write("spoil", (), |conn, ()| {
                Box::pin(async move {
                    conn.execute(&sql("PRAGMA defer_foreign_keys = ON")).await?;
                    conn.execute(&sql("INSERT INTO session_nodes VALUES (x'77', x'78', 1, 1)")).await?;
                    Ok(())
                })
            })
        };
        let jobs = async { futures::join!(insert(&store, 1, Ok(())), spoil(), insert(&store, 2, Ok(()))) };
        let (one, spoilt, two) = one_group(&store, jobs).await;
        for lost in [one, spoilt, two] {
            let lost = lost.unwrap_err().to_string();
            assert!(lost.contains("the transaction failed") && lost.contains("FOREIGN KEY"), "{lost}");
        }
        assert_eq!(ids(&store).await, Vec::<u8>::new());
        insert(&store, 4, Ok(())).await.unwrap();
        assert_eq!(ids(&store).await, [4], "the writer goes on");
    }

    #[tokio::test]
    async fn starts_alone_wait_for_the_next_sync() {
        use hub_engine::ports::{Besides, Journal};
        use hub_testkit::contract::sample::{assigned_task, attempt, task_id};
        use mesh_core::task::{Event, Outcome};

        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path()).await;
        for n in 1..=2 {
            store.accept(&assigned_task(n)).await.unwrap();
        }
        let connector = Connector::Sqlite(dir.path().join("hub.db"));
        let told = watch::Sender::new(Head::none(ChainId::from_bytes([0; 16])));
        let mut link = Link { conn: Some(connector.connect().await.unwrap()), connector, refused: None, chain: Chain::new(told) };
        // How a group was committed: 1 is with the next sync, 2 with one of its own.
        let mut commit = async |mut group: Vec<Request>| {
            link.write(&mut group).await.unwrap();
            let Some(Conn::Sqlite(conn)) = &link.conn else { panic!("no connection") };
            conn.query_row("PRAGMA synchronous", [], |row| row.get::<_, i64>(0)).unwrap()
        };
        let apply = |n, event| -> Request {
            let (reply, _) = Reply::new("test");
            Asked { job: Apply::new(task_id(n), event, Besides::default(), 5), reply }.into()
        };
        let started = || Event::Started { attempt: attempt(1) };
        let ended = || Event::Ended { attempt: attempt(1), outcome: Outcome::Exited(0) };
        assert_eq!(commit(vec![apply(1, started())]).await, 1);
        assert!(store.task(task_id(1)).await.unwrap().unwrap().progress.started_at.is_some(), "it is seen at once");
        assert_eq!(commit(vec![apply(2, started()), apply(1, ended())]).await, 2);
        assert_eq!(commit(vec![apply(1, started())]).await, 1);
        assert_eq!(commit(vec![apply(2, ended())]).await, 2);
    }

    #[tokio::test]
    async fn a_lost_transaction_is_told_to_all() {
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path()).await;
        // As SQLite does by itself on a full disk.
        let lose = || store.write("lose", (), |conn, ()| Box::pin(conn.rollback()));
        let jobs = async { futures::join!(insert(&store, 1, Ok(())), lose(), insert(&store, 2, Ok(()))) };
        let (one, lost, two) = one_group(&store, jobs).await;
        assert!(one.is_err() && lost.is_err() && two.is_err());
        insert(&store, 4, Ok(())).await.unwrap();
        assert_eq!(ids(&store).await, [4], "the writer goes on");
    }
}

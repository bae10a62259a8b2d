//! A journal whose moments the test holds: writes that wait, that fail, whose answer is lost.

use async_trait::async_trait;
use futures::future::BoxFuture;
use hub_engine::ports::{Applied, Besides, Fan, Journal, StoreError, Stored, Window};
use hub_engine::records::{Task, TaskEvent, TaskFilter};
use mesh_core::fan::ChildEnd;
use mesh_core::task::Event;
use mesh_core::{SessionId, TaskId, UnixMs};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::Semaphore;

/// Writes at once while none is held.
const OPEN: usize = 1000;

/// What a journal is about to write.
#[derive(Debug, Clone, Copy)]
pub enum Write<'a> {
    Accept(&'a Task),
    AcceptFan(&'a Fan),
    Apply(&'a Event),
}

type Fails = Box<dyn Fn(&Write<'_>) -> bool + Send>;
type Before = Arc<dyn Fn() -> BoxFuture<'static, ()> + Send + Sync>;

/// A journal over another one, which it leaves alone until a switch is set.
pub struct TestJournal {
    inner: Arc<dyn Journal>,
    gate: Semaphore,
    begun: Semaphore,
    fails: Mutex<Option<Fails>>,
    before_accept: Mutex<Option<Before>>,
    /// What is asked is done, and the answer is lost: as when a connection breaks at the commit.
    pub unanswered: AtomicBool,
    /// So many looks at what is open fail.
    pub failing_looks: AtomicU32,
    /// Tasks that were read whole, one by one.
    pub whole_reads: AtomicU32,
}

impl TestJournal {
    pub fn over(inner: Arc<dyn Journal>) -> Arc<Self> {
        Arc::new(Self {
            inner,
            gate: Semaphore::new(OPEN),
            begun: Semaphore::new(0),
            fails: Mutex::default(),
            before_accept: Mutex::default(),
            unanswered: AtomicBool::new(false),
            failing_looks: AtomicU32::new(0),
            whole_reads: AtomicU32::new(0),
        })
    }

    /// Writes that begin from now on wait for [`Self::release`].
    pub fn hold(&self) {
        self.gate.forget_permits(OPEN);
        self.begun.forget_permits(usize::MAX >> 4);
    }
    pub fn release(&self) {
        self.gate.add_permits(OPEN);
    }
    /// Waits for a write that has begun since [`Self::hold`]; each is told once.
    pub async fn begun(&self) {
        self.begun.acquire().await.expect("it is never closed").forget();
    }
    /// Writes fail, undone, for which `fails` says so.
    pub fn fail(&self, fails: impl Fn(&Write<'_>) -> bool + Send + 'static) {
        *self.fails.lock().unwrap_or_else(PoisonError::into_inner) = Some(Box::new(fails));
    }
    pub fn work(&self) {
        *self.fails.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
    /// What happens just before a task is written.
    pub fn before_accept(&self, before: impl Fn() -> BoxFuture<'static, ()> + Send + Sync + 'static) {
        *self.before_accept.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(before));
    }

    async fn write<T>(&self, write: Write<'_>, done: impl Future<Output = Stored<T>> + Send) -> Stored<T> {
        self.begun.add_permits(1);
        let _permit = self.gate.acquire().await.map_err(|e| StoreError::new("journal", e))?;
        if self.fails.lock().unwrap_or_else(PoisonError::into_inner).as_ref().is_some_and(|fails| fails(&write)) {
            return Err(StoreError::new("journal", "the test says so"));
        }
        let done = done.await?;
        if self.unanswered.load(Ordering::SeqCst) { Err(StoreError::new("journal", "no answer came")) } else { Ok(done) }
    }
}

#[async_trait]
impl Journal for TestJournal {
    async fn accept(&self, task: &Task) -> Stored<()> {
        let before = self.before_accept.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(before) = before {
            before().await;
        }
        self.write(Write::Accept(task), self.inner.accept(task)).await
    }
    async fn accept_fan(&self, fan: &Fan) -> Stored<()> {
        self.write(Write::AcceptFan(fan), self.inner.accept_fan(fan)).await
    }
    async fn ends_of(&self, parent: TaskId) -> Stored<Option<Vec<ChildEnd>>> {
        self.inner.ends_of(parent).await
    }
    async fn apply(&self, id: TaskId, event: &Event, besides: Besides, now: UnixMs) -> Stored<Applied> {
        self.write(Write::Apply(event), self.inner.apply(id, event, besides, now)).await
    }
    async fn task(&self, id: TaskId) -> Stored<Option<Task>> {
        self.whole_reads.fetch_add(1, Ordering::SeqCst);
        self.inner.task(id).await
    }
    async fn narrow(&self, id: TaskId) -> Stored<Option<Task>> {
        self.inner.narrow(id).await
    }
    async fn tasks(&self, filter: &TaskFilter, window: Window<TaskId>) -> Stored<Vec<Task>> {
        self.inner.tasks(filter, window).await
    }
    async fn specs(&self, ids: &[TaskId], max_bytes: usize) -> Stored<Vec<(TaskId, Vec<u8>)>> {
        self.inner.specs(ids, max_bytes).await
    }
    async fn open_tasks(&self, session: Option<SessionId>, after: Option<TaskId>, limit: u32) -> Stored<Vec<Task>> {
        if self.failing_looks.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1)).is_ok() {
            return Err(StoreError::new("journal.open_tasks", "the test says so"));
        }
        self.inner.open_tasks(session, after, limit).await
    }
    async fn history(&self, id: TaskId) -> Stored<Vec<TaskEvent>> {
        self.inner.history(id).await
    }
}

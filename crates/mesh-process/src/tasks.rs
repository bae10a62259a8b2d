//! Background work with a name, an owner and an end.

use std::future::Future;
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::Instrument;

/// A group of background tasks that one owner starts and ends. Cloning shares the group.
#[derive(Debug, Clone, Default)]
pub struct Tasks {
    tracker: TaskTracker,
    token: CancellationToken,
}

/// Ends the group when it is dropped armed: by an error, or by the unwinding of a panic.
struct Alarm {
    token: CancellationToken,
    name: &'static str,
    armed: bool,
}

impl Drop for Alarm {
    fn drop(&mut self) {
        if self.armed && !self.token.is_cancelled() {
            tracing::error!(name = self.name, "vital work is gone; the process ends");
            self.token.cancel();
        }
    }
}

/// How a group ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    Clean,
    /// This many tasks had not returned within the grace.
    Left(usize),
}

impl Tasks {
    pub fn new() -> Self {
        Self::default()
    }
    /// Cancelled when the group is asked to end.
    pub fn token(&self) -> CancellationToken {
        self.token.clone()
    }
    /// A group that ends with this one, or earlier by itself.
    pub fn child(&self) -> Self {
        Self { tracker: TaskTracker::new(), token: self.token.child_token() }
    }
    /// Runs `work` until it returns; it must watch [`Tasks::token`] itself.
    pub fn spawn<F>(&self, name: &'static str, work: F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        self.tracker.spawn(work.instrument(tracing::debug_span!("task", name)));
    }
    /// Runs `work` until it returns or the group ends, whichever is first.
    pub fn spawn_until_cancelled<F>(&self, name: &'static str, work: F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let token = self.token.clone();
        self.spawn(name, async move {
            tokio::select! {
                biased;
                () = token.cancelled() => {}
                () = work => {}
            }
        });
    }
    /// Runs `work` to its end even if the caller stops waiting: what crosses a commit must not be
    /// dropped half-way because somebody hung up. `None` when the work panicked.
    ///
    /// The work begins with the call. It is boxed once: each future that holds another holds it twice,
    /// as what it was given and as what it waits for.
    pub fn complete<F>(&self, name: &'static str, work: F) -> impl Future<Output = Option<F::Output>> + Send + use<F>
    where
        F: Future + Send + 'static,
        F::Output: Send,
    {
        let (done, answer) = tokio::sync::oneshot::channel();
        // It is its caller's work: what it logs belongs to the caller's request.
        let work = Box::pin(work.in_current_span());
        self.spawn(name, async move {
            // An error says that nobody waits any more, which is what this is for.
            let _ = done.send(work.await);
        });
        async move { answer.await.ok() }
    }
    /// Runs work that must not be lost; an error or a panic asks the whole group to end.
    pub fn spawn_vital<F, E>(&self, name: &'static str, work: F)
    where
        F: Future<Output = Result<(), E>> + Send + 'static,
        E: std::fmt::Display + Send,
    {
        let alarm = Alarm { token: self.token.clone(), name, armed: true };
        self.spawn(name, async move {
            // Taken in whole: captured by field, it would not be there to ring.
            let mut alarm = alarm;
            match work.await {
                Ok(()) => alarm.armed = false,
                Err(error) => tracing::error!(name, %error, "vital work failed"),
            }
        });
    }
    /// Like [`Tasks::spawn_vital`], for work that blocks: it has a thread for itself, of this name.
    pub fn spawn_vital_thread<F, E>(&self, name: &'static str, work: F) -> std::io::Result<()>
    where
        F: FnOnce() -> Result<(), E> + Send + 'static,
        E: std::fmt::Display,
    {
        let (alarm, counted) = (Alarm { token: self.token.clone(), name, armed: true }, self.tracker.token());
        let body = move || {
            // Taken in whole, and in this order: the alarm rings before the thread counts as gone.
            let _counted = counted;
            let mut alarm = alarm;
            let _span = tracing::debug_span!("task", name).entered();
            match work() {
                Ok(()) => alarm.armed = false,
                Err(error) => tracing::error!(name, %error, "vital work failed"),
            }
        };
        std::thread::Builder::new().name(name.to_owned()).spawn(body).map(drop)
    }
    /// Asks all to end and waits, at most `grace`.
    pub async fn end(&self, grace: Duration) -> Ended {
        self.token.cancel();
        self.tracker.close();
        match tokio::time::timeout(grace, self.tracker.wait()).await {
            Ok(()) => Ended::Clean,
            Err(_) => Ended::Left(self.tracker.len()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    #[tokio::test]
    async fn work_that_was_begun_is_completed() {
        let tasks = Tasks::new();
        let (go, gone) = tokio::sync::oneshot::channel::<()>();
        let (told, tell) = tokio::sync::oneshot::channel();
        let work = async move {
            let _ = gone.await;
            let _ = told.send(());
        };
        {
            let waiting = tasks.complete("work", work);
            tokio::pin!(waiting);
            assert!(futures_now(waiting.as_mut()).await.is_none());
            // The caller hangs up here.
        }
        go.send(()).unwrap();
        tell.await.expect("the work went on");
        assert_eq!(tasks.complete("panics", async { panic!("on purpose") }).await, None::<()>);
    }

    async fn futures_now<F: Future>(mut f: std::pin::Pin<&mut F>) -> Option<F::Output> {
        std::future::poll_fn(|cx| {
            std::task::Poll::Ready(match f.as_mut().poll(cx) {
                std::task::Poll::Ready(v) => Some(v),
                std::task::Poll::Pending => None,
            })
        })
        .await
    }

    #[tokio::test]
    async fn a_thread_is_waited_for() {
        let tasks = Tasks::new();
        let (go, gone) = tokio::sync::oneshot::channel::<()>();
        let named = Arc::new(Mutex::new(None));
        let told = named.clone();
        let work = move || {
            let _ = gone.blocking_recv();
            *told.lock().unwrap() = std::thread::current().name().map(str::to_owned);
            Ok::<(), &str>(())
        };
        tasks.spawn_vital_thread("slow", work).unwrap();
        assert_eq!(tasks.end(Duration::ZERO).await, Ended::Left(1));
        go.send(()).unwrap();
        assert_eq!(tasks.end(Duration::from_secs(20)).await, Ended::Clean);
        assert_eq!(named.lock().unwrap().as_deref(), Some("slow"));
    }

    #[tokio::test]
    async fn vital_work_ends_the_group_by_error_and_by_panic() {
        for panics in [false, true] {
            let tasks = Tasks::new();
            tasks.spawn_vital("vital", async move { if panics { panic!("on purpose") } else { Err("on purpose") } });
            tasks.token().cancelled().await;
        }
        for panics in [false, true] {
            let tasks = Tasks::new();
            let work = move || if panics { panic!("on purpose") } else { Err("on purpose") };
            tasks.spawn_vital_thread("vital", work).unwrap();
            tasks.token().cancelled().await;
        }
        let tasks = Tasks::new();
        tasks.spawn_vital("fine", async { Ok::<(), &str>(()) });
        tasks.end(Duration::from_secs(5)).await;
    }
}

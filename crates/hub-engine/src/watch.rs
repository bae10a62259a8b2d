//! Tells those who follow a task that there is something new to read.

use crate::records::Task;
use crate::runs::Runs;
use mesh_core::TaskId;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::watch;

/// How much has been told, and the task once it has ended.
type News = (u64, Option<Arc<Task>>);
type Map = HashMap<TaskId, watch::Sender<News>>;

/// A hint, not data: a follower reads the journal and the output, and waits here between reads.
#[derive(Debug, Clone, Default)]
pub struct Watchers {
    map: Arc<Mutex<Map>>,
    /// Of them, those of agents.
    pub runs: Runs,
}

/// One follower's ear. The last one of a task takes its entry away.
#[derive(Debug)]
pub struct Watch {
    task: TaskId,
    news: Option<watch::Receiver<News>>,
    watchers: Watchers,
}

impl Watchers {
    fn map(&self) -> MutexGuard<'_, Map> {
        self.map.lock().unwrap_or_else(PoisonError::into_inner)
    }
    /// Subscribes before reading, so that no news falls between.
    pub fn subscribe(&self, task: TaskId) -> Watch {
        let news = self.map().entry(task).or_insert_with(|| watch::channel((0, None)).0).subscribe();
        Watch { task, news: Some(news), watchers: self.clone() }
    }
    pub fn notify(&self, task: TaskId) {
        if let Some(tx) = self.map().get(&task) {
            tx.send_modify(|n| n.0 = n.0.wrapping_add(1));
        }
    }
    /// A step of a task was committed.
    pub fn stepped(&self, task: &Task) {
        self.notify(task.id);
        self.runs.stepped(task);
    }
    /// The task has ended, as it is now: who waits for that need not read it again.
    pub fn finished(&self, task: &Task) {
        self.runs.stepped(task);
        if let Some(tx) = self.map().get(&task.id) {
            tx.send_modify(|n| *n = (n.0.wrapping_add(1), Some(Arc::new(task.clone()))));
        }
    }
}

impl Watch {
    /// From here on, only what comes later counts as news.
    pub fn seen(&mut self) {
        if let Some(news) = &mut self.news {
            news.borrow_and_update();
        }
    }
    /// Waits for the end.
    pub async fn ended(&mut self) -> Arc<Task> {
        loop {
            if let Some(task) = self.news.as_ref().and_then(|n| n.borrow().1.clone()) {
                return task;
            }
            self.changed().await;
        }
    }
    /// Waits for news.
    pub async fn changed(&mut self) {
        if let Some(news) = &mut self.news {
            // The sender lives as long as an ear does, so this ends by news alone.
            let _ = news.changed().await;
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let mut map = self.watchers.map();
        drop(self.news.take());
        if map.get(&self.task).is_some_and(|tx| tx.receiver_count() == 0) {
            map.remove(&self.task);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn news_reach_all_and_nothing_stays_behind() {
        let (w, task) = (Watchers::default(), TaskId::from_bytes([1; 16]));
        w.notify(task);
        let (mut a, mut b) = (w.subscribe(task), w.subscribe(task));
        a.seen();
        w.notify(task);
        a.changed().await;
        b.changed().await;
        drop(a);
        assert_eq!(w.map().len(), 1);
        drop(b);
        assert_eq!(w.map().len(), 0);
    }
}

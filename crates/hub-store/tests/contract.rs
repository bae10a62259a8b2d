//! The store on SQLite passes the suites that every store passes.

use hub_engine::ports::{Besides, Gauges, Journal, Retention};
use hub_store::{Database, Store};
use hub_testkit::contract::{self, sample};
use mesh_core::task::Event;
use mesh_process::Tasks;
use std::cell::Cell;
use std::sync::Arc;

/// Makes fresh stores in folders of their own, all gone when it is.
struct Fresh {
    folder: tempfile::TempDir,
    tasks: Tasks,
    made: Cell<u32>,
}

impl Fresh {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap(), tasks: Tasks::new(), made: Cell::new(0) }
    }
    async fn store(&self) -> Arc<Store> {
        self.made.set(self.made.get() + 1);
        Store::open(&self.folder.path().join(self.made.get().to_string()), &Database::Sqlite, &self.tasks).await.unwrap()
    }
}

macro_rules! suites {
    ($($name:ident),*) => {$(
        #[tokio::test]
        async fn $name() {
            let fresh = Fresh::new();
            contract::$name(async || fresh.store().await as _).await;
        }
    )*};
}
suites!(journal, output, nodes, accounts, sessions, activity_has_a_bound, state, meta);

macro_rules! joint_suites {
    ($($name:ident),*) => {$(
        #[tokio::test]
        async fn $name() {
            let fresh = Fresh::new();
            contract::$name(async || fresh.store().await).await;
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

#[tokio::test]
async fn room_that_was_given_back_counts_as_free_though_the_file_stays() {
    let fresh = Fresh::new();
    let store = fresh.store().await;
    for n in 1..=500 {
        let mut t = sample::task(n);
        t.spec = vec![n as u8; 2000];
        store.accept(&t).await.unwrap();
        store.apply(t.id, &Event::Expired { detail: "x".into() }, Besides::default(), t.created_at).await.unwrap();
    }
    let before = store.storage().await.unwrap();
    assert!(before.journal_bytes > 1_000_000 && before.journal_bytes <= before.database_bytes, "{before:?}");
    assert!(before.disk_bytes > before.disk_free_bytes && before.disk_free_bytes > 0, "{before:?}");
    let erased = store.erase_tasks(i64::MAX, u64::MAX, 1000).await.unwrap();
    assert_eq!(erased.tasks, 500);
    let after = store.storage().await.unwrap();
    let gone = before.journal_bytes - after.journal_bytes;
    assert!(gone * 10 > before.journal_bytes * 7, "{before:?} {after:?}");
    assert!(erased.bytes > gone / 2 && erased.bytes < gone * 2, "what is told is about what is gone: {erased:?} {gone}");
    assert!(after.database_bytes >= before.database_bytes, "the file does not shrink");
}

#[tokio::test]
async fn a_fan_out_to_a_thousand_is_one_commit() {
    let fresh = Fresh::new();
    let store = fresh.store().await;
    let before = store.commits();
    store.accept_fan(&sample::fan(1, 1000)).await.unwrap();
    assert_eq!(store.commits() - before, 1);
    let parent = store.narrow(sample::task_id(1)).await.unwrap().unwrap();
    assert_eq!(parent.children.unwrap().by_state.values().sum::<u32>(), 1000);
}

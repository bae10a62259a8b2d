//! The store on SQLite passes the suites that every store passes.

use hub_store::{Database, Store};
use hub_testkit::contract;
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
suites!(journal, output, nodes, accounts, sessions, state, meta);

macro_rules! joint_suites {
    ($($name:ident),*) => {$(
        #[tokio::test]
        async fn $name() {
            let fresh = Fresh::new();
            contract::$name(async || fresh.store().await).await;
        }
    )*};
}
joint_suites!(idempotency, journal_and_output, nodes_and_sessions, sessions_and_tasks, memory, messages, purges, retention, gauges);

//! The in-memory ports pass the suites that every store passes.

use hub_testkit::{MemoryStore, contract};
use std::sync::Arc;

macro_rules! suites {
    ($($name:ident),*) => {$(
        #[tokio::test]
        async fn $name() {
            contract::$name(async || Arc::new(MemoryStore::new()) as _).await;
        }
    )*};
}
suites!(journal, output, nodes, accounts, sessions, activity_has_a_bound, state, meta);

macro_rules! joint_suites {
    ($($name:ident),*) => {$(
        #[tokio::test]
        async fn $name() {
            contract::$name(async || Arc::new(MemoryStore::new())).await;
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

//! What a call leaves in the audit log, however it ends.

use hub_engine::audit::{self, Action, Ending, Log, Reading};
use hub_engine::error::Error;
use hub_engine::idempotency::Idempotency;
use hub_engine::ports::{Audit, Creation, Window};
use hub_engine::records::AuditFilter;
use hub_testkit::contract::sample;
use hub_testkit::{MemoryStore, Nowhere, TestKeys};
use mesh_core::audit::{Detail, Row};
use mesh_core::permission::{Caller, Permission, Role, Via};
use mesh_core::{HubId, SessionId, TaskId, UserId};
use mesh_process::{SystemClock, Tasks};
use std::sync::Arc;

struct World {
    log: Arc<Log>,
    store: Arc<MemoryStore>,
}

impl World {
    async fn new() -> Self {
        let store = Arc::new(MemoryStore::new());
        let log = Arc::new(Log {
            store: store.clone(),
            witness: Arc::new(Nowhere),
            keyring: Arc::new(TestKeys),
            hub: HubId::from_bytes([1; 16]),
            clock: SystemClock::shared(),
            work: Tasks::new(),
            bounds: Default::default(),
        });
        log.start(&[1; 16], 1, false).await.unwrap();
        Self { log, store }
    }
    async fn call<T>(&self, work: impl Future<Output = hub_engine::Result<T>>) -> hub_engine::Result<T> {
        audit::scope(&self.log, Via { door: "rest", ..Via::default() }, work, Ending::of).await
    }
    /// All but the first, oldest first.
    async fn rows(&self) -> Vec<Row> {
        let mut rows = self.store.entries(&AuditFilter::default(), Window { before: None, limit: 500 }).await.unwrap();
        // Of one millisecond, ids are in any order.
        rows.sort_by_key(|r| r.seq);
        rows.split_off(1)
    }
}

fn admin() -> Caller {
    Caller::person(UserId::from_bytes([2; 16]), Role::Admin)
}
fn guest() -> Caller {
    Caller::person(UserId::from_bytes([3; 16]), Role::Guest)
}

/// An engine entry: one line, then what it does.
async fn cancel(caller: &Caller, ends: hub_engine::Result<()>) -> hub_engine::Result<()> {
    audit::doing(caller, Action::TaskCancel);
    audit::about(TaskId::from_bytes([4; 16]));
    hub_engine::access::authorize_own(caller, Permission::SystemAdminister)?;
    audit::doing(caller, Action::NodeChange);
    ends
}

#[tokio::test]
async fn a_call_leaves_one_entry_that_says_how_it_ended() {
    let w = World::new().await;
    w.call(cancel(&admin(), Ok(()))).await.unwrap();
    w.call(cancel(&admin(), Err(Error::conflict("x", "y")))).await.unwrap_err();
    w.call(cancel(&guest(), Ok(()))).await.unwrap_err();
    w.call(async { Ok(()) }).await.unwrap();
    let rows = w.rows().await;
    let shown: Vec<_> = rows.iter().map(|r| (r.kind.as_str(), r.action.as_str(), r.outcome.as_str())).collect();
    let life = "task_lifecycle";
    assert_eq!(shown, [(life, "task.cancel", "ok"), (life, "task.cancel", "failed"), ("authorization_denied", "task.cancel", "denied")]);
    assert!(rows.iter().all(|r| r.resource_id.starts_with("task_") && r.door == "rest"));
    assert_eq!(rows[2].user, guest().user());
    let (detail, _) = Detail::decode(rows[2].detail.as_ref().unwrap()).unwrap();
    assert_eq!(detail.0["permission"], "system:administer");
}

/// The second of two equal requests changes nothing, and the log tells of changes.
#[tokio::test]
async fn a_request_that_comes_again_under_its_key_leaves_nothing() {
    let w = World::new().await;
    let keys = Idempotency { store: w.store.clone(), clock: SystemClock::shared() };
    let make = async |body: u8, before: bool| {
        let keyed = keys.keyed(&admin(), "POST /sessions", "k", [body; 32]);
        let work = async {
            audit::doing(&admin(), Action::SessionCreate);
            let made = match before {
                true => keyed.before::<SessionId>().await?,
                false => keyed.create(Creation::Session(sample::session(1, 1))).await?,
            };
            Ok(made)
        };
        w.call(work).await
    };
    assert_eq!(make(1, false).await.unwrap(), None, "the first makes it");
    for before in [false, true] {
        assert_eq!(make(1, before).await.unwrap(), Some(sample::session_id(1)));
    }
    make(2, true).await.unwrap_err();
    let told: Vec<_> = w.rows().await.iter().map(|r| (r.action.clone(), r.outcome.clone())).collect();
    assert_eq!(told, ["ok", "failed"].map(|outcome| ("session.create".to_owned(), outcome.to_owned())), "and another request is refused");
}

#[tokio::test]
async fn what_is_hidden_is_denied_and_a_read_that_is_denied_is_counted() {
    let w = World::new().await;
    let read = || async {
        hub_engine::access::authorize_own(&guest(), Permission::SystemAudit)?;
        Ok(())
    };
    for _ in 0..5 {
        w.call(read()).await.unwrap_err();
    }
    let rows = w.rows().await;
    assert_eq!(rows.len(), 1, "the others are counted");
    assert_eq!((rows[0].action.as_str(), rows[0].outcome.as_str()), ("access.read", "denied"));
    // A look at what one may not do, in a call that succeeds, is nothing.
    let probe = async {
        let _ = hub_engine::access::authorize_own(&admin(), Permission::SystemAudit);
        let _ = hub_engine::access::authorize_own(&guest(), Permission::SystemAdminister);
        Ok(())
    };
    w.call(probe).await.unwrap();
    assert_eq!(w.rows().await.len(), 1);
}

#[tokio::test]
async fn who_hangs_up_leaves_an_entry_all_the_same() {
    let w = World::new().await;
    let (go, gone) = tokio::sync::oneshot::channel::<()>();
    let log = w.log.clone();
    {
        let work = async {
            audit::asked(Action::Login);
            let _ = gone.await;
        };
        let call = audit::scope(&log, Via::default(), work, |()| Ending::Done);
        let mut call = Box::pin(call);
        assert!(futures::poll!(&mut call).is_pending());
    }
    drop(go);
    let mut head = w.store.head();
    tokio::time::timeout(std::time::Duration::from_secs(40), head.wait_for(|h| h.seq == 2)).await.unwrap().unwrap();
    let rows = w.rows().await;
    assert_eq!((rows[0].action.as_str(), rows[0].outcome.as_str()), ("auth.login", "failed"));
}

#[tokio::test]
async fn reading_is_written_before_it_is_shown_and_needs_its_permission() {
    let w = World::new().await;
    let reading = Reading { filter: AuditFilter::default(), window: Window { before: None, limit: 9 } };
    let shown = w.call(w.log.read(&admin(), &reading)).await.unwrap();
    assert!(shown.iter().any(|r| r.action == "audit.read"), "its own entry is there already");
    assert!(w.call(w.log.read(&guest(), &reading)).await.is_err());
    let report = w.call(w.log.verify(&admin())).await.unwrap();
    assert!(report.ok() && report.rows == 4, "{report:?}");
    let actions: Vec<String> = w.rows().await.into_iter().map(|r| r.action).collect();
    assert_eq!(actions, ["audit.read", "audit.read", "audit.verify"]);
}

#[tokio::test]
async fn what_a_caller_sends_does_not_fill_the_log() {
    let w = World::new().await;
    let long = async {
        audit::doing(&admin(), Action::SessionCreate);
        (0..1000).for_each(|n| audit::detail(&format!("{n}"), "ä".repeat(1 << 16)));
        Ok(())
    };
    w.call(long).await.unwrap();
    let detail = w.rows().await.pop().unwrap().detail.unwrap();
    assert!(detail.len() < 8000, "{}", detail.len());
}

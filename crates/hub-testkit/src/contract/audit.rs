use super::sample::{hub_id, key_id, session, session_id, user, user_id};
use super::{T0, all, window};
use hub_engine::audit::{Action, Entry};
use hub_engine::ports::{Accounts, Audit, Purges, Sessions};
use hub_engine::records::{AuditFilter, PurgeStep};
use mesh_core::audit::{Checkpoint, Detail, Head, Kind, Outcome, Person, Row, Signed, follow};
use mesh_core::permission::Via;
use mesh_core::{ChainId, SessionId};
use std::sync::Arc;

const CHAIN: ChainId = ChainId::from_bytes([7; 16]);

fn entry(n: i64, action: Action) -> Entry {
    let via = Via { door: "rest", address: Some([10, 0, 0, 7].into()), request_id: Some("req-1".into()), device: None };
    Entry::new(action, T0 + n, via).with("name", "büro")
}

fn in_session(n: i64, action: Action, session: SessionId) -> Entry {
    Entry { resource: session.into(), session: Some(session), user: Some(user_id(1)), ..entry(n, action) }
}

/// Each row follows from the one before it.
fn check(rows: &[Row]) -> Head {
    rows.iter().fold(Head::none(CHAIN), |head, row| follow(&head, row).unwrap())
}

async fn whole(store: &(impl Audit + ?Sized)) -> Vec<Row> {
    store.rows(CHAIN, 0, u64::MAX >> 1, 1000).await.unwrap()
}

pub async fn audit<S: Audit + Accounts + Sessions + Purges + 'static>(make: impl AsyncFn() -> Arc<S>) {
    let store = make().await;
    assert!(store.add_entry(&entry(0, Action::Login)).await.is_err(), "there is no chain yet");
    assert!(store.heads().await.unwrap().is_empty());
    store.add_user(&user(1, "ada")).await.unwrap();
    let mut told = store.head();
    store.begin(CHAIN, &entry(0, Action::AuditBegin)).await.unwrap();
    store.begin(CHAIN, &entry(1, Action::AuditBegin)).await.unwrap();
    assert!(store.begin(ChainId::from_bytes([8; 16]), &entry(1, Action::AuditBegin)).await.is_err(), "one process, one chain");
    let by_ada = Entry {
        user: Some(user_id(1)),
        key: Some(key_id(3)),
        outcome: Outcome::Denied,
        kind: Kind::AuthorizationDenied,
        ..entry(2, Action::TaskCancel)
    };
    let unknown = Entry { user: Some(user_id(9)), ..entry(3, Action::Logout) };
    let (a, b) = futures::join!(store.add_entry(&by_ada), store.add_entry(&unknown));
    assert!(a.is_ok() && b.is_ok());
    let rows = whole(&*store).await;
    assert_eq!(rows.len(), 3, "begun once");
    let head = check(&rows);
    assert_eq!((store.heads().await.unwrap(), *told.borrow_and_update()), (vec![head], head));
    let row = rows.iter().find(|r| r.action == "task.cancel").unwrap();
    let shown = (row.kind.as_str(), row.outcome.as_str(), row.door.as_str(), row.user, row.key, row.at, row.id);
    assert_eq!(shown, ("authorization_denied", "denied", "rest", Some(user_id(1)), Some(key_id(3)), T0 + 2, by_ada.id));
    let person = Person { username: "ada".into(), address: Some("10.0.0.7".into()), request_id: Some("req-1".into()) };
    assert_eq!(Person::decode(row.person.as_ref().unwrap()).unwrap().0, person);
    assert_eq!(Detail::decode(row.detail.as_ref().unwrap()).unwrap().0.0["name"], "büro");
    let other = rows.iter().find(|r| r.action == "auth.logout").unwrap();
    assert_eq!(Person::decode(other.person.as_ref().unwrap()).unwrap().0.username, "", "nobody has this id");
    assert_eq!(store.rows(CHAIN, 1, 2, 9).await.unwrap(), rows[1..2]);
    assert_eq!(store.rows(CHAIN, 0, 9, 2).await.unwrap(), rows[..2]);
    lists(&*store).await;
    checkpoints(&*store, head).await;
    erased(&*make().await).await;
}

async fn lists(store: &(impl Audit + ?Sized)) {
    store.add_entry(&in_session(10, Action::SessionCreate, session_id(4))).await.unwrap();
    let of = async |filter: AuditFilter| {
        let found = store.entries(&filter, all()).await.unwrap();
        found.into_iter().map(|r| r.action).collect::<Vec<_>>()
    };
    let any = AuditFilter::default;
    assert_eq!(of(any()).await, ["session.create", "auth.logout", "task.cancel", "audit.begin"], "newest first");
    assert_eq!(of(AuditFilter { user: Some(user_id(1)), ..any() }).await, ["session.create", "task.cancel"]);
    assert_eq!(of(AuditFilter { session: Some(session_id(4)), ..any() }).await, ["session.create"]);
    assert_eq!(of(AuditFilter { resource: Some(session_id(4).to_string()), ..any() }).await, ["session.create"]);
    assert_eq!(of(AuditFilter { kind: Some(Kind::AuthorizationDenied), ..any() }).await, ["task.cancel"]);
    assert_eq!(of(AuditFilter { kind: Some(Kind::TaskLifecycle), ..any() }).await, [""; 0]);
    assert_eq!(of(AuditFilter { outcome: Some(Outcome::Denied), ..any() }).await, ["task.cancel"]);
    assert_eq!(of(AuditFilter { outcome: Some(Outcome::Ok), user: Some(user_id(1)), ..any() }).await, ["session.create"]);
    assert_eq!(of(AuditFilter { door: Some("socket".into()), ..any() }).await, [""; 0]);
    assert_eq!(of(AuditFilter { since: Some(T0 + 2), until: Some(T0 + 10), ..any() }).await, ["auth.logout", "task.cancel"]);
    let first = store.entries(&any(), window(None, 2)).await.unwrap();
    let rest = store.entries(&any(), window(Some(first[1].id), 9)).await.unwrap();
    assert_eq!((first.len(), rest.len()), (2, 2));
}

async fn checkpoints(store: &(impl Audit + ?Sized), head: Head) {
    let signed = |seq| {
        let checkpoint = Checkpoint { hub: hub_id(1), at: T0, heads: vec![Head { seq, ..head }] };
        Signed { checkpoint, key: [3; 32], signature: vec![4; 64] }
    };
    assert!(store.newest_checkpoints().await.unwrap().is_empty());
    for seq in [1, 3, 3] {
        store.add_checkpoint(&signed(seq)).await.unwrap();
    }
    let both = Signed { checkpoint: Checkpoint { heads: vec![head; 2], ..signed(4).checkpoint }, ..signed(4) };
    assert!(store.add_checkpoint(&both).await.is_err(), "one chain each");
    assert_eq!(store.checkpoints(CHAIN, 0, 9).await.unwrap(), [signed(1), signed(3)]);
    assert_eq!(store.checkpoints(CHAIN, 1, 9).await.unwrap(), [signed(3)]);
    assert_eq!(store.checkpoints(CHAIN, 0, 1).await.unwrap(), [signed(1)]);
    assert_eq!(store.newest_checkpoints().await.unwrap(), [(CHAIN, 3)]);
}

/// What is erased is gone, and the chain verifies as before.
async fn erased<S: Audit + Accounts + Sessions + Purges>(store: &S) {
    store.add_user(&user(1, "ada")).await.unwrap();
    store.begin(CHAIN, &entry(0, Action::AuditBegin)).await.unwrap();
    store.add_session(&session(4, 1)).await.unwrap();
    for n in 1..=3 {
        store.add_entry(&in_session(n, Action::MemoryPut, session_id(4))).await.unwrap();
    }
    store.add_entry(&in_session(4, Action::SessionCreate, session_id(5))).await.unwrap();
    store.close_session(session_id(4), None, T0).await.unwrap();
    store.begin_purge(session_id(4), None, T0).await.unwrap();
    let mut after = None;
    while let PurgeStep::Until(task) = store.purge_step(session_id(4), after, 2).await.unwrap() {
        after = task;
    }
    let rows = whole(store).await;
    let head = check(&rows);
    let known: Vec<bool> = rows.iter().map(|r| r.detail.is_some()).collect();
    assert_eq!(known, [true, false, false, false, true]);
    assert!(rows.iter().all(|r| r.person.is_some()), "who did it is not of the session");

    assert_eq!(store.erase_person(user_id(1), 3).await.unwrap(), 3);
    assert_eq!(store.erase_person(user_id(1), 9).await.unwrap(), 1);
    assert_eq!(store.erase_person(user_id(1), 9).await.unwrap(), 0);
    let rows = whole(store).await;
    assert_eq!(check(&rows), head, "no hash has changed");
    assert!(rows[0].person.is_some() && rows[1..].iter().all(|r| r.person.is_none() && r.detail.is_none()));
    assert!(rows[1..].iter().all(|r| r.user == Some(user_id(1))), "ids stay");
    store.add_entry(&entry(9, Action::Logout)).await.unwrap();
    assert_eq!(check(&whole(store).await).seq, 6);
}

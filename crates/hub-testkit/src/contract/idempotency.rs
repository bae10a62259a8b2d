use super::T0;
use super::sample::{assigned_task, fan, grant, grant_id, invite, key_id, session, session_id, task, task_id, user_id};
use futures::future::join_all;
use hub_engine::ports::{Accounts, Creation, Grants, Idempotency, Journal, Known, NodeDirectory, Once, Sessions};
use hub_engine::records::{ApiKey, Grant, Resource, TaskFilter};
use std::sync::Arc;

const DAY: i64 = 86_400_000;

fn once(scope: u8, request: u8, at: i64) -> Once {
    Once { scope: [scope; 32], request: [request; 32], at, since: at - DAY }
}
fn a_task(n: u16) -> Creation {
    Creation::Task(Box::new(task(n)))
}
fn a_grant(n: u16) -> Grant {
    grant(n, Resource::Labels([("zone".to_owned(), "a".to_owned())].into()))
}
fn a_key(n: u16) -> ApiKey {
    ApiKey {
        id: key_id(n),
        user: user_id(1),
        name: "ci".into(),
        prefix: "cmk_abc".into(),
        mac: [n as u8; 32],
        scopes: vec![],
        created_at: T0,
        expires_at: None,
        last_used_at: None,
    }
}

/// For stores that keep the things too.
pub async fn idempotency<S: Idempotency + Journal + Sessions + NodeDirectory + Accounts + Grants + ?Sized>(make: impl AsyncFn() -> Arc<S>) {
    every_thing_once(&*make().await).await;
    a_fan_out_once(&*make().await).await;
    of_many_at_once_one_writes(&*make().await).await;
    what_fails_is_not_remembered(&*make().await).await;
    a_day_later(&*make().await).await;
}

async fn a_fan_out_once<S: Idempotency + Journal + ?Sized>(store: &S) {
    let scope = once(9, 7, T0);
    assert_eq!(store.create(Creation::Fan(Box::new(fan(51, 2))), &scope).await.unwrap(), None);
    let known = Some(Known { request: [7; 32], thing: task_id(51).to_string() });
    assert_eq!(store.create(Creation::Fan(Box::new(fan(61, 2))), &scope).await.unwrap(), known);
    for (n, there) in [(51, true), (52, true), (53, true), (61, false), (62, false)] {
        assert_eq!(store.task(task_id(n)).await.unwrap().is_some(), there, "{n}");
    }
    // One of its children is there already: nothing of it is written, and the key is free.
    let other = once(10, 7, T0);
    assert!(store.create(Creation::Fan(Box::new(fan(50, 1))), &other).await.is_err());
    assert_eq!((store.task(task_id(50)).await.unwrap(), store.known(&other.scope, other.since).await.unwrap()), (None, None));
}

async fn every_thing_once<S: Idempotency + Journal + Sessions + NodeDirectory + Accounts + Grants + ?Sized>(store: &S) {
    assert_eq!(store.known(&[1; 32], 0).await.unwrap(), None);
    let placed = assigned_task(1);
    let things = |n: u16| {
        [
            Creation::Task(Box::new(if n == 1 { placed.clone() } else { task(n) })),
            Creation::Session(session(n, 1)),
            Creation::Invite(invite(n)),
            Creation::Key(a_key(n)),
            Creation::Grant(a_grant(n)),
        ]
    };
    for (first, second) in things(1).into_iter().zip(things(2)) {
        let scope = once(first.id().as_bytes()[0], 7, T0);
        let known = Some(Known { request: [7; 32], thing: first.id() });
        assert_eq!(store.create(first, &scope).await.unwrap(), None);
        assert_eq!(store.known(&scope.scope, scope.since).await.unwrap(), known);
        // Another thing, even by another request, meets the first.
        let again = Once { request: [8; 32], ..scope };
        assert_eq!(store.create(second, &again).await.unwrap(), known);
    }
    assert_eq!(store.task(task_id(1)).await.unwrap(), Some(placed));
    let kinds: Vec<String> = store.history(task_id(1)).await.unwrap().into_iter().map(|l| l.kind).collect();
    assert_eq!(kinds, ["accepted", "assigned"], "the same as without a key");
    assert_eq!(store.session(session_id(1)).await.unwrap(), Some(session(1, 1)));
    assert_eq!(store.invite(invite(1).id).await.unwrap(), Some(invite(1)));
    assert_eq!(store.key(key_id(1)).await.unwrap(), Some(a_key(1)));
    assert_eq!(store.grant(grant_id(1), T0).await.unwrap(), Some(a_grant(1)));
    assert_eq!(store.grant(grant_id(2), T0).await.unwrap(), None);
    let seconds = (
        store.task(task_id(2)).await.unwrap(),
        store.session(session_id(2)).await.unwrap(),
        store.invite(invite(2).id).await.unwrap(),
        store.key(key_id(2)).await.unwrap(),
    );
    assert_eq!(seconds, (None, None, None, None), "nothing of the second is written");
}

async fn of_many_at_once_one_writes<S: Idempotency + Journal + ?Sized>(store: &S) {
    // Two scopes, so that groups of writes hold more than one; and plain ones between.
    let scopes = [once(1, 1, T0), once(2, 1, T0)];
    let keyed = join_all((0..40).map(|n| store.create(a_task(n), &scopes[usize::from(n % 2)])));
    let plain: Vec<_> = (100..120).map(task).collect();
    let (keyed, plain) = futures::future::join(keyed, join_all(plain.iter().map(|t| store.accept(t)))).await;
    plain.into_iter().for_each(|p| p.unwrap());
    let keyed: Vec<_> = keyed.into_iter().map(Result::unwrap).collect();
    for (i, scope) in scopes.iter().enumerate() {
        let known = store.known(&scope.scope, scope.since).await.unwrap().unwrap();
        let of = || keyed.iter().skip(i).step_by(2);
        assert_eq!(of().filter(|k| k.is_none()).count(), 1, "exactly one is the first");
        assert!(of().flatten().all(|k| *k == known), "all others hear of it");
    }
    let written = store.tasks(&TaskFilter::default(), super::all()).await.unwrap();
    assert_eq!(written.len(), 22);
}

async fn what_fails_is_not_remembered<S: Idempotency + Journal + ?Sized>(store: &S) {
    store.accept(&task(1)).await.unwrap();
    let scope = once(1, 1, T0);
    assert!(store.create(a_task(1), &scope).await.is_err(), "an id is used once");
    assert_eq!(store.known(&scope.scope, scope.since).await.unwrap(), None, "both or none");
    assert_eq!(store.create(a_task(2), &scope).await.unwrap(), None);
}

async fn a_day_later<S: Idempotency + Journal + ?Sized>(store: &S) {
    let known = |n: u16| Some(Known { request: [1; 32], thing: task(n).id.to_string() });
    store.create(a_task(1), &once(1, 1, T0)).await.unwrap();
    store.create(a_task(2), &once(2, 1, T0 + 5)).await.unwrap();
    let just = once(1, 1, T0 + DAY - 1);
    assert_eq!(store.known(&just.scope, just.since).await.unwrap(), known(1));
    assert_eq!(store.create(a_task(3), &just).await.unwrap(), known(1));
    // Forgotten by time alone, whether it was swept or not.
    let late = once(1, 1, T0 + DAY);
    assert_eq!(store.known(&late.scope, late.since).await.unwrap(), None);
    assert_eq!(store.create(a_task(4), &late).await.unwrap(), None);
    assert_eq!(store.known(&late.scope, late.since).await.unwrap(), known(4), "its place is taken");
    assert_eq!(store.create(a_task(5), &late).await.unwrap(), known(4));
    assert_eq!(store.forget(T0 + 4, 10).await.unwrap(), 0);
    assert_eq!(store.forget(T0 + 5, 0).await.unwrap(), 0, "at most so many");
    assert_eq!(store.forget(T0 + 5, 10).await.unwrap(), 1);
    assert_eq!(store.known(&[2; 32], 0).await.unwrap(), None);
    assert_eq!(store.known(&[1; 32], 0).await.unwrap(), known(4));
    assert!(store.task(task_id(2)).await.unwrap().is_some(), "the thing itself stays");
}

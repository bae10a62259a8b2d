use super::sample::{entry_id, grant, grant_id, invite, node, node_id, session, session_id, user_id};
use super::{T0, all, window};
use hub_engine::ports::{AgentState, Grants, NodeDirectory, Purges, Sessions};
use hub_engine::records::{Grant, GrantFilter, PurgeStart, Resource, StateEntry, Subject};
use mesh_core::permission::{Permission, Role};
use std::sync::Arc;

fn labels(zone: &str) -> Resource {
    Resource::Labels([("zone".to_owned(), zone.to_owned()), ("büro \"x\"".to_owned(), "a,b=c".to_owned())].into())
}

/// For stores that keep the things too.
pub async fn grants<S: Grants + NodeDirectory + Sessions + AgentState + Purges + ?Sized>(make: impl AsyncFn() -> Arc<S>) {
    what_is_kept(&*make().await).await;
    whose_they_are(&*make().await).await;
    they_expire(&*make().await).await;
    they_go_with_the_thing(&*make().await).await;
}

async fn add_things<S: NodeDirectory + Sessions + AgentState + ?Sized>(store: &S) {
    for n in 1..=2 {
        store.add_invite(&invite(n)).await.unwrap();
        store.claim_invite(invite(n).id, &node(n, n as u8), T0, 1).await.unwrap();
        store.add_session(&session(n, 1)).await.unwrap();
    }
    for key in ["a", "b"] {
        store.put_state(&entry(key, 1), 10).await.unwrap();
    }
}

fn entry(key: &str, owner: u16) -> StateEntry {
    let id = entry_id(u16::from(key.as_bytes()[0]));
    StateEntry { id, agent: "bot".into(), key: key.into(), owner: user_id(owner), value: "1".into(), updated_at: T0 }
}

fn each() -> [Resource; 4] {
    [Resource::Node(node_id(1)), Resource::Session(session_id(1)), Resource::Agent("bot".into()), labels("ä")]
}

async fn what_is_kept<S: Grants + NodeDirectory + Sessions + AgentState + ?Sized>(store: &S) {
    add_things(store).await;
    let every = Permission::ALL.iter().copied().collect();
    for (n, resource) in (1..).zip(each()) {
        let own = Grant { permissions: every, expires_at: None, ..grant(n, resource.clone()) };
        let of_role = Grant { id: grant_id(100 + n), subject: Subject::Role(Role::Guest), ..grant(n, resource) };
        for g in [own, of_role] {
            store.add_grant(&g).await.unwrap();
            assert_eq!(store.grant(g.id, T0).await.unwrap(), Some(g.clone()));
            assert!(store.add_grant(&g).await.is_err(), "an id is used once");
        }
    }
    assert_eq!(store.grant(grant_id(77), T0).await.unwrap(), None);
    assert!(store.remove_grant(grant_id(1)).await.unwrap());
    assert!(!store.remove_grant(grant_id(1)).await.unwrap());
    assert_eq!(store.grant(grant_id(1), T0).await.unwrap(), None);
    assert_eq!(store.grants(None, T0, all()).await.unwrap().len(), 7);
}

async fn whose_they_are<S: Grants + ?Sized>(store: &S) {
    let (guests, viewers) = (Subject::Role(Role::Guest), Subject::Role(Role::Viewer));
    let one = |n| Subject::User(user_id(n));
    for (n, subject, by) in [(1, one(1), 9), (2, one(2), 9), (3, guests, 9), (4, viewers, 8), (5, one(1), 8)] {
        store.add_grant(&Grant { subject, created_by: user_id(by), ..grant(n, labels("a")) }).await.unwrap();
    }
    let ids = async |filter: GrantFilter, w| {
        let found = store.grants(Some(&filter), T0, w).await.unwrap();
        (1..=5u16).rev().filter(|n| found.iter().any(|g| g.id == grant_id(*n))).collect::<Vec<_>>()
    };
    let f = |made_by: Option<u16>, to: &[Subject]| GrantFilter { made_by: made_by.map(user_id), to: to.to_vec() };
    assert_eq!(ids(f(None, &[one(1)]), all()).await, [5, 1]);
    assert_eq!(ids(f(None, &[one(1), guests]), all()).await, [5, 3, 1]);
    assert_eq!(ids(f(None, &[guests, viewers]), all()).await, [4, 3]);
    assert_eq!(ids(f(Some(8), &[]), all()).await, [5, 4]);
    assert_eq!(ids(f(Some(8), &[one(2)]), all()).await, [5, 4, 2]);
    assert_eq!(ids(f(Some(7), &[one(7)]), all()).await, [0u16; 0]);
    assert_eq!(ids(f(None, &[]), all()).await, [0u16; 0], "a filter that names nobody finds nothing");
    assert_eq!(ids(f(Some(9), &[one(1)]), window(Some(grant_id(5)), 2)).await, [3, 2], "pages, newest first");
    let found = store.grants(None, T0, window(None, 3)).await.unwrap();
    assert_eq!(found.iter().map(|g| g.id).collect::<Vec<_>>(), [grant_id(5), grant_id(4), grant_id(3)]);
}

async fn they_expire<S: Grants + ?Sized>(store: &S) {
    let end = |n: u16, at: Option<i64>| Grant { expires_at: at, ..grant(n, labels("a")) };
    let other = Subject::User(user_id(2));
    for g in [end(1, Some(T0 + 5)), end(2, Some(T0 + 6)), end(3, None), Grant { subject: other, ..end(4, Some(T0 + 5)) }] {
        store.add_grant(&g).await.unwrap();
    }
    let count = async |now| store.grants(None, now, all()).await.unwrap().len();
    assert_eq!((count(T0 + 4).await, count(T0 + 5).await, count(T0 + 6).await), (4, 2, 1));
    assert!(store.grant(grant_id(1), T0 + 4).await.unwrap().is_some());
    assert!(store.grant(grant_id(1), T0 + 5).await.unwrap().is_none(), "at its end it is over");
    store.add_grant(&Grant { created_at: T0 + 5, ..end(5, None) }).await.unwrap();
    assert!(store.grant(grant_id(1), T0).await.unwrap().is_none(), "it went with the next grant to the same subject");
    assert!(store.grant(grant_id(2), T0).await.unwrap().is_some());
    assert!(store.grant(grant_id(4), T0).await.unwrap().is_some(), "another's stays");
}

async fn they_go_with_the_thing<S: Grants + NodeDirectory + Sessions + AgentState + Purges + ?Sized>(store: &S) {
    add_things(store).await;
    for (n, resource) in (1..).zip(each()) {
        store.add_grant(&grant(n, resource)).await.unwrap();
    }
    store.add_grant(&grant(5, Resource::Node(node_id(2)))).await.unwrap();
    store.add_grant(&grant(6, Resource::Session(session_id(2)))).await.unwrap();
    let left = async || {
        let mut ids: Vec<_> = store.grants(None, T0, all()).await.unwrap().iter().map(|g| g.id).collect();
        ids.reverse();
        (1..=6u16).filter(|n| ids.contains(&grant_id(*n))).collect::<Vec<_>>()
    };
    assert!(store.remove_node(node_id(1), T0).await.unwrap());
    assert_eq!(left().await, [2, 3, 4, 5, 6]);
    assert!(store.remove_state("bot", "a", user_id(1)).await.unwrap());
    assert!(!store.remove_state("bot", "b", user_id(2)).await.unwrap());
    assert_eq!(left().await, [2, 3, 4, 5, 6], "it has a key still");
    assert!(store.remove_state("bot", "b", user_id(1)).await.unwrap());
    assert_eq!(left().await, [2, 4, 5, 6]);
    assert!(store.close_session(session_id(1), None, T0).await.unwrap());
    assert_eq!(left().await, [2, 4, 5, 6], "what was done in a closed session can be read");
    assert_eq!(store.begin_purge(session_id(1), None, T0).await.unwrap(), PurgeStart::Begun);
    assert_eq!(left().await, [4, 5, 6]);
    // And none comes after it.
    for resource in [Resource::Node(node_id(1)), Resource::Session(session_id(1)), Resource::Agent("bot".into())] {
        assert!(store.add_grant(&grant(9, resource.clone())).await.is_err(), "{resource:?}");
    }
    assert_eq!(left().await, [4, 5, 6]);
}

use super::sample::{device, entry_id, invite, invite_id, key_id, login_id, node, node_id, session, session_id, user, user_id};
use super::{T0, all, window};
use hub_engine::ports::{Accounts, AgentState, NodeDirectory, Sessions, Users};
use hub_engine::records::*;
use mesh_core::permission::{Role, Scope};
use std::sync::Arc;

/// For stores that are all of it.
pub async fn users<S>(make: impl AsyncFn() -> Arc<S>)
where
    S: Accounts + Users + NodeDirectory + Sessions + AgentState + ?Sized,
{
    coming(&*make().await).await;
    changing(&*make().await).await;
    the_last_admin(&*make().await).await;
    racing(&*make().await).await;
    leaving(&*make().await).await;
    successors(&*make().await).await;
}

fn person(n: u16, name: &str, role: Role) -> User {
    User { role, ..user(n, name) }
}
fn bare(n: u16, name: &str, role: Role) -> User {
    User { password_hash: String::new(), ..person(n, name, role) }
}
fn link(mac: u8, expires_at: i64) -> UserInvite {
    UserInvite { mac: [mac; 32], expires_at }
}
async fn log_in<S: Accounts + ?Sized>(store: &S, n: u16, user: u16) {
    let token = RefreshToken { mac: [n as u8; 32], login: login_id(n), user: user_id(user), expires_at: T0 + 100 };
    store.add_login(&device(n, user), &token).await.unwrap();
}
async fn lives<S: Accounts + ?Sized>(store: &S, login: u16) -> bool {
    store.device(login_id(login).into(), T0).await.unwrap().is_some()
}
fn key(n: u16, user: u16) -> ApiKey {
    ApiKey {
        id: key_id(n),
        user: user_id(user),
        name: "ci".into(),
        prefix: "cmk_ab".into(),
        mac: [n as u8; 32],
        scopes: vec![Scope::Everything],
        created_at: T0,
        expires_at: None,
        last_used_at: None,
    }
}

async fn standing<S: Users + ?Sized>(store: &S, n: u16) -> Option<Standing> {
    store.user_entry(user_id(n)).await.unwrap().map(|e| e.standing)
}

async fn coming<S: Accounts + Users + ?Sized>(store: &S) {
    assert!(store.create_user(&person(1, "Ada", Role::Admin), None).await.unwrap());
    assert!(!store.create_user(&bare(2, "aDA", Role::Guest), Some(&link(1, T0 + 10))).await.unwrap(), "the name is taken");
    assert_eq!(store.invited(&[1; 32], T0).await.unwrap(), None, "nothing was written of it");
    assert!(store.create_user(&bare(2, "bob", Role::Developer), Some(&link(2, T0 + 10))).await.unwrap());
    assert_eq!(standing(store, 1).await, Some(Standing::Active));
    assert_eq!(standing(store, 2).await, Some(Standing::Invited { until: T0 + 10 }));
    assert_eq!(standing(store, 9).await, None);
    assert_eq!(store.user(user_id(2)).await.unwrap(), None, "who was invited may not act yet");
    assert_eq!(store.user_named("bob").await.unwrap(), None);
    assert_eq!(store.count_users().await.unwrap(), 2);
    let ids = async |w| store.user_entries(w).await.unwrap().iter().map(|e| e.id).collect::<Vec<_>>();
    assert_eq!(ids(all()).await, [user_id(2), user_id(1)], "newest first");
    assert_eq!(ids(window(Some(user_id(2)), 1)).await, [user_id(1)]);
    assert_eq!(store.entry_named("ADA").await.unwrap().unwrap().username.as_deref(), Some("Ada"));

    for (mac, now) in [([3; 32], T0), ([2; 32], T0 + 10)] {
        assert_eq!(store.invited(&mac, now).await.unwrap(), None);
        assert_eq!(store.accept_invite(&mac, "x", now).await.unwrap(), None);
    }
    assert_eq!(store.invited(&[2; 32], T0 + 9).await.unwrap(), Some(user_id(2)));
    let bob = store.accept_invite(&[2; 32], "hash", T0 + 9).await.unwrap().unwrap();
    assert_eq!((bob.id, bob.standing, bob.role), (user_id(2), Standing::Active, Role::Developer));
    assert_eq!(store.user_named("BOB").await.unwrap().unwrap().password_hash, "hash");
    assert_eq!(store.accept_invite(&[2; 32], "again", T0).await.unwrap(), None, "once");

    // A new link takes the place of the old one, and a password set otherwise that of both.
    store.create_user(&bare(3, "eve", Role::Guest), Some(&link(4, T0 + 10))).await.unwrap();
    let again = UserChange { invite: Some(link(5, T0 + 20)), ..Default::default() };
    assert!(matches!(store.change_user(user_id(3), &again, T0).await.unwrap(), UserChanged::Done { .. }));
    assert_eq!(standing(store, 3).await, Some(Standing::Invited { until: T0 + 20 }));
    assert_eq!(store.accept_invite(&[4; 32], "x", T0).await.unwrap(), None);
    assert_eq!(store.change_user(user_id(2), &again, T0).await.unwrap(), UserChanged::HasPassword);
    let password = UserChange { password_hash: Some("set".into()), username: Some("Eva".into()), ..Default::default() };
    log_in(store, 33, 3).await;
    log_in(store, 34, 2).await;
    let taken = UserChange { username: Some("bob".into()), ..password.clone() };
    assert_eq!(store.change_user(user_id(3), &taken, T0).await.unwrap(), UserChanged::NameTaken);
    assert_eq!((standing(store, 3).await, lives(store, 33).await), (Some(Standing::Invited { until: T0 + 20 }), true), "all or nothing");
    let UserChanged::Done { now, .. } = store.change_user(user_id(3), &password, T0).await.unwrap() else { panic!("a password is set") };
    assert_eq!((now.username.as_deref(), now.standing), (Some("Eva"), Standing::Active));
    assert_eq!((lives(store, 33).await, lives(store, 34).await), (false, true), "their log-ins end, and nobody else's");
    assert_eq!(store.accept_invite(&[5; 32], "x", T0).await.unwrap(), None);
    assert_eq!(store.user(user_id(3)).await.unwrap().unwrap().password_hash, "set");
}

async fn changing<S: Accounts + Users + NodeDirectory + ?Sized>(store: &S) {
    store.create_user(&person(1, "ada", Role::Admin), None).await.unwrap();
    store.create_user(&person(2, "bob", Role::Developer), None).await.unwrap();
    store.create_user(&bare(3, "eve", Role::Guest), Some(&link(1, T0 + 10))).await.unwrap();
    for (n, owner) in [(1, 1), (2, 2)] {
        store.add_invite(&Invite { owner: user_id(owner), ..invite(n) }).await.unwrap();
    }
    let change = async |n, c: UserChange| store.change_user(user_id(n), &c, T0).await.unwrap();
    let name = |text: &str| UserChange { username: Some(text.into()), ..Default::default() };
    assert_eq!(change(9, name("x")).await, UserChanged::Unknown);
    assert_eq!(change(2, name("ADA")).await, UserChanged::NameTaken);
    let epoch = store.registry_epoch().await.unwrap();
    let UserChanged::Done { before, now } = change(2, name("BOB")).await else { panic!("another case of the own name") };
    assert_eq!((before.username.as_deref(), now.username.as_deref()), (Some("bob"), Some("BOB")));
    assert_eq!(store.changed_since(epoch).await.unwrap().users, vec![], "no right is changed by a name");
    let role = UserChange { role: Some(Role::Viewer), ..Default::default() };
    assert!(matches!(change(2, role).await, UserChanged::Done { now, .. } if now.role == Role::Viewer));
    assert_eq!(store.changed_since(epoch).await.unwrap().users, [user_id(2)], "other hubs notice");
    assert_eq!(store.invite(invite_id(2)).await.unwrap().unwrap().revoked_at, Some(T0), "who may have no machines invites none");
    assert_eq!(store.invite(invite_id(1)).await.unwrap().unwrap().revoked_at, None, "others do");

    log_in(store, 1, 2).await;
    log_in(store, 2, 1).await;
    store.add_key(&key(1, 2)).await.unwrap();
    let off = |disabled| UserChange { disabled: Some(disabled), ..Default::default() };
    change(2, off(true)).await;
    change(3, off(true)).await;
    assert_eq!(standing(store, 2).await, Some(Standing::Disabled));
    assert_eq!(store.user(user_id(2)).await.unwrap(), None);
    assert!(!lives(store, 1).await && lives(store, 2).await);
    assert_eq!(store.accept_invite(&[1; 32], "x", T0).await.unwrap(), None, "nor does their link work");
    change(2, off(false)).await;
    change(3, off(false)).await;
    assert_eq!(standing(store, 2).await, Some(Standing::Active));
    assert!(!lives(store, 1).await, "what has ended stays so");
    assert!(store.key(key_id(1)).await.unwrap().is_some());
    assert!(store.accept_invite(&[1; 32], "x", T0).await.unwrap().is_some());
}

async fn the_last_admin<S: Accounts + Users + ?Sized>(store: &S) {
    store.create_user(&person(1, "ada", Role::Admin), None).await.unwrap();
    store.create_user(&bare(2, "bob", Role::Admin), Some(&link(1, T0 + 10))).await.unwrap();
    store.create_user(&person(3, "eve", Role::Developer), None).await.unwrap();
    let demoted = UserChange { role: Some(Role::Viewer), ..Default::default() };
    let disabled = UserChange { disabled: Some(true), ..Default::default() };
    let leaves = |user, successor| Leaving { user: user_id(user), successor: user_id(successor), cancel: false, purge: true, at: T0 };
    for change in [&demoted, &disabled] {
        assert_eq!(store.change_user(user_id(1), change, T0).await.unwrap(), UserChanged::LastAdmin, "an invited one does not count");
    }
    assert_eq!(store.remove_user(&leaves(1, 3)).await.unwrap(), Removal::LastAdmin);
    assert_eq!(store.oldest_admin().await.unwrap().unwrap().id, user_id(1));
    store.accept_invite(&[1; 32], "x", T0).await.unwrap();
    assert!(matches!(store.change_user(user_id(1), &disabled, T0).await.unwrap(), UserChanged::Done { .. }));
    assert_eq!(store.oldest_admin().await.unwrap().unwrap().id, user_id(2));
    assert_eq!(store.change_user(user_id(2), &demoted, T0).await.unwrap(), UserChanged::LastAdmin, "nor does a disabled one");
    assert!(matches!(store.change_user(user_id(1), &demoted, T0).await.unwrap(), UserChanged::Done { .. }));
    let rename = UserChange { username: Some("bobby".into()), role: Some(Role::Admin), ..Default::default() };
    assert!(matches!(store.change_user(user_id(2), &rename, T0).await.unwrap(), UserChanged::Done { .. }));
}

/// Whoever is first, one is left; a link is used once.
async fn racing<S: Accounts + Users + ?Sized>(store: &S) {
    store.create_user(&person(100, "first", Role::Admin), None).await.unwrap();
    let mut last = 100;
    for n in 1..=10u16 {
        store.create_user(&bare(n, &format!("u{n}"), Role::Admin), Some(&link(n as u8, T0 + 10))).await.unwrap();
        let mac = [n as u8; 32];
        let (one, two) = futures::join!(store.accept_invite(&mac, "one", T0), store.accept_invite(&mac, "two", T0));
        assert!(one.unwrap().is_some() != two.unwrap().is_some(), "one wins");
        let demoted = UserChange { role: Some(Role::Viewer), ..Default::default() };
        let off = UserChange { disabled: Some(true), ..Default::default() };
        let (a, b) = futures::join!(store.change_user(user_id(last), &demoted, T0), store.change_user(user_id(n), &off, T0));
        let refused = [&a, &b].map(|r| *r.as_ref().unwrap() == UserChanged::LastAdmin);
        assert_eq!(refused.iter().filter(|r| **r).count(), 1, "{a:?} {b:?}");
        last = if refused[0] { last } else { n };
        assert_eq!(store.oldest_admin().await.unwrap().unwrap().id, user_id(last));
    }
}

fn state(n: u16, agent: &str, owner: u16) -> StateEntry {
    StateEntry { id: entry_id(n), agent: agent.into(), key: format!("k{n}"), owner: user_id(owner), value: b"1".to_vec(), updated_at: T0 }
}

async fn leaving<S>(store: &S)
where
    S: Accounts + Users + NodeDirectory + Sessions + AgentState + ?Sized,
{
    store.create_user(&person(1, "bob", Role::Developer), None).await.unwrap();
    store.create_user(&person(2, "ada", Role::Admin), None).await.unwrap();
    for n in 1..=5 {
        store.add_invite(&invite(n)).await.unwrap();
        store.claim_invite(invite_id(n), &node(n, n as u8), T0, 1).await.unwrap();
        store.add_session(&session(n, 1)).await.unwrap();
        store.put_state(&state(n, if n < 3 { "a" } else { "b" }, 1), 9).await.unwrap();
        log_in(store, n, 1).await;
        store.add_key(&key(n, 1)).await.unwrap();
    }
    store.add_invite(&invite(6)).await.unwrap();
    store.add_session(&session(6, 2)).await.unwrap();
    store.add_key(&key(6, 2)).await.unwrap();
    let epoch = store.registry_epoch().await.unwrap();
    let plan = Leaving { user: user_id(1), successor: user_id(2), cancel: true, purge: false, at: T0 + 5 };
    assert_eq!(store.remove_user(&plan).await.unwrap(), Removal::Done);
    assert_eq!(store.remove_user(&plan).await.unwrap(), Removal::Unknown, "once");

    assert_eq!(store.user(user_id(1)).await.unwrap(), None);
    assert_eq!(store.user_entries(all()).await.unwrap().len(), 1);
    let entry = store.user_entry(user_id(1)).await.unwrap().unwrap();
    assert_eq!((entry.username.as_deref(), entry.standing), (Some("bob"), Standing::Removed { at: T0 + 5 }));
    assert_eq!(store.entry_named("bob").await.unwrap(), None);
    assert!(store.create_user(&person(7, "Bob", Role::Guest), None).await.unwrap(), "the name is free again");
    assert!(!lives(store, 1).await);
    assert_eq!(store.rotate_refresh(&[1; 32], &[99; 32], T0 + 9, T0).await.unwrap(), Rotation::Unknown);
    assert_eq!(store.key_by_mac(&[1; 32]).await.unwrap(), None);
    assert_eq!(store.invite(invite_id(6)).await.unwrap().unwrap().revoked_at, Some(T0 + 5));
    assert_eq!(store.invite(invite_id(1)).await.unwrap().unwrap().revoked_at, None, "it was used");
    assert!(store.changed_since(epoch).await.unwrap().users.contains(&user_id(1)));

    assert_eq!(store.leaving(9).await.unwrap(), std::slice::from_ref(&plan), "found again after a crash");
    let mut steps = 0;
    while !store.hand_over(user_id(1), 2).await.unwrap() {
        steps += 1;
    }
    assert!(steps >= 3, "a step does no more than it may: {steps}");
    for n in 1..=5 {
        let node = store.node(node_id(n)).await.unwrap().unwrap();
        assert_eq!(node.owner, user_id(2));
        assert!(node.epoch > epoch, "every hub takes its new owner over");
        assert_eq!(Sessions::session(store, session_id(n)).await.unwrap().unwrap().owner, user_id(2));
        let agent = if n < 3 { "a" } else { "b" };
        assert_eq!(store.state_owner(agent).await.unwrap(), Some(user_id(2)));
        assert_eq!(store.state(agent, &format!("k{n}")).await.unwrap().unwrap().owner, user_id(2));
    }
    // What was on its way when they left.
    store.add_session(&session(8, 1)).await.unwrap();
    store.add_invite(&invite(8)).await.unwrap();
    log_in(store, 50, 1).await;
    store.add_key(&key(50, 1)).await.unwrap();
    assert!(!store.hand_over(user_id(1), 2).await.unwrap());
    assert_eq!(Sessions::session(store, session_id(8)).await.unwrap().unwrap().owner, user_id(2));
    assert!(store.invite(invite_id(8)).await.unwrap().unwrap().revoked_at.is_some());
    assert!(!lives(store, 50).await);
    assert_eq!(store.key(key_id(50)).await.unwrap(), None);
    assert!(store.hand_over(user_id(1), 2).await.unwrap());
    assert!(store.key(key_id(6)).await.unwrap().is_some(), "others keep theirs");
    store.left(user_id(1)).await.unwrap();
    assert_eq!(store.leaving(9).await.unwrap(), vec![]);
    assert!(store.hand_over(user_id(2), 2).await.unwrap(), "nobody who stays hands anything over");
    assert_eq!(Sessions::session(store, session_id(6)).await.unwrap().unwrap().owner, user_id(2));

    assert!(!store.erase_user(user_id(2)).await.unwrap(), "not one who is here");
    assert!(store.erase_user(user_id(1)).await.unwrap());
    assert!(store.erase_user(user_id(1)).await.unwrap(), "twice is once");
    let entry = store.user_entry(user_id(1)).await.unwrap().unwrap();
    assert_eq!((entry.id, entry.username, entry.role), (user_id(1), None, Role::Developer));
}

async fn successors<S: Accounts + Users + Sessions + ?Sized>(store: &S) {
    for (n, role) in [(1, Role::Admin), (2, Role::Developer), (3, Role::Viewer), (4, Role::Guest), (5, Role::Developer)] {
        store.create_user(&person(n, &format!("u{n}"), role), None).await.unwrap();
    }
    store.create_user(&bare(6, "u6", Role::Developer), Some(&link(1, T0 + 10))).await.unwrap();
    store.change_user(user_id(5), &UserChange { disabled: Some(true), ..Default::default() }, T0).await.unwrap();
    let leaves = |user, successor| Leaving { user: user_id(user), successor: user_id(successor), cancel: false, purge: true, at: T0 };
    for no in [2, 3, 4, 5, 6, 9] {
        assert_eq!(store.remove_user(&leaves(2, no)).await.unwrap(), Removal::NoSuccessor, "{no}");
    }
    assert_eq!(store.remove_user(&leaves(6, 2)).await.unwrap(), Removal::Done, "also one who never came");
    assert_eq!(store.accept_invite(&[1; 32], "x", T0).await.unwrap(), None);
    assert_eq!(store.user_entry(user_id(6)).await.unwrap().unwrap().username, None, "erased in the same write");
    // What was to come to one who leaves too comes to their successor.
    assert_eq!(store.remove_user(&leaves(2, 1)).await.unwrap(), Removal::Done);
    store.add_session(&session(1, 6)).await.unwrap();
    while !store.hand_over(user_id(6), 9).await.unwrap() {}
    assert_eq!(Sessions::session(store, session_id(1)).await.unwrap().unwrap().owner, user_id(1));
}

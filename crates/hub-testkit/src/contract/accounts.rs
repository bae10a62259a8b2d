use super::sample::{device, key_id, login_id, user, user_id};
use super::{T0, all, window};
use hub_engine::ports::Accounts;
use hub_engine::records::{ApiKey, Device, DeviceChange, RefreshToken, Rotation};
use mesh_core::permission::{Role, Scope};
use std::sync::Arc;

pub async fn accounts(make: impl AsyncFn() -> Arc<dyn Accounts>) {
    users(&*make().await).await;
    rotation(&*make().await).await;
    racing_rotation(&*make().await).await;
    log_ins_end(&*make().await).await;
    devices(&*make().await).await;
    what_has_ended_goes(&*make().await).await;
    keys(&*make().await).await;
}

async fn users(store: &dyn Accounts) {
    assert_eq!(store.count_users().await.unwrap(), 0);
    assert_eq!(store.user(user_id(1)).await.unwrap(), None);
    assert_eq!(store.user_named("ada").await.unwrap(), None);
    let mut ada = user(1, "Ada");
    ada.role = Role::Admin;
    assert!(store.add_user(&ada).await.unwrap());
    assert!(!store.add_user(&user(2, "aDA")).await.unwrap(), "the name is taken");
    assert_eq!(store.user(user_id(2)).await.unwrap(), None, "who was refused is not there");
    assert!(store.add_user(&user(2, "Äda")).await.unwrap());
    assert!(store.add_user(&user(3, "äda")).await.unwrap(), "only the case of ASCII is ignored");
    assert!(store.add_user(&user(1, "bob")).await.is_err(), "an id is used once");
    assert_eq!(store.user(user_id(1)).await.unwrap(), Some(ada.clone()), "as it was given");
    assert_eq!(store.user_named("ADA").await.unwrap(), Some(ada));
    assert_eq!(store.count_users().await.unwrap(), 3);
}

fn token(mac: u8, login: u16, user: u16) -> RefreshToken {
    RefreshToken { mac: [mac; 32], login: login_id(login), user: user_id(user), expires_at: T0 + 100 }
}

/// A log-in whose first token has this secret.
async fn log_in(store: &dyn Accounts, mac: u8, login: u16, user: u16) {
    store.add_login(&device(login, user), &token(mac, login, user)).await.unwrap();
}

async fn lives(store: &dyn Accounts, login: u16, now: i64) -> bool {
    store.device(login_id(login).into(), now).await.unwrap().is_some()
}

async fn rotation(store: &dyn Accounts) {
    let (user, login) = (user_id(1), login_id(1));
    let rotate = async |old: u8, new: u8, now| store.rotate_refresh(&[old; 32], &[new; 32], now + 100, now).await.unwrap();
    let lives_at = async |now| lives(store, 1, now).await;
    assert!(!lives_at(T0).await);
    log_in(store, 1, 1, 1).await;
    log_in(store, 50, 2, 1).await;
    assert!(lives_at(T0 + 99).await);
    assert!(!lives_at(T0 + 100).await, "its last token has expired");
    assert_eq!(rotate(9, 10, T0).await, Rotation::Unknown);
    assert_eq!(rotate(1, 2, T0 + 100).await, Rotation::Unknown, "expired");
    assert_eq!(rotate(1, 2, T0 + 50).await, Rotation::Rotated { user, login });
    assert!(lives_at(T0 + 149).await, "by the new token's own end");
    assert_eq!(rotate(2, 3, T0 + 60).await, Rotation::Rotated { user, login });
    assert_eq!(rotate(1, 4, T0 + 70).await, Rotation::Reused { user, login });
    assert!(!lives_at(T0 + 70).await, "the whole family has ended");
    assert_eq!(rotate(3, 5, T0 + 70).await, Rotation::Unknown, "its newest token too");
    assert_eq!(rotate(4, 6, T0 + 70).await, Rotation::Unknown, "nothing was given for the reused one");
    let whose = async |mac: u8| store.refresh_of(&[mac; 32]).await.unwrap();
    for known in [1, 2, 3] {
        assert_eq!(whose(known).await, Some((user, login)), "used up or ended, it is known whose it was");
    }
    assert_eq!((whose(50).await, whose(4).await), (Some((user, login_id(2))), None));
    assert!(lives(store, 2, T0).await, "another log-in of the same user lives on");
}

async fn racing_rotation(store: &dyn Accounts) {
    log_in(store, 1, 1, 1).await;
    let macs: Vec<[u8; 32]> = (100..110).map(|b| [b; 32]).collect();
    let all = (0..10).map(|i| store.rotate_refresh(&[1; 32], &macs[i], T0 + 100, T0));
    let outcomes = futures::future::join_all(all).await;
    let rotated = outcomes.iter().filter(|o| matches!(o, Ok(Rotation::Rotated { .. }))).count();
    let reused = outcomes.iter().filter(|o| matches!(o, Ok(Rotation::Reused { .. }))).count();
    assert_eq!((rotated, reused), (1, 1), "one wins, the second ends the family, the rest find it ended: {outcomes:?}");
    assert!(!lives(store, 1, T0).await);
}

async fn log_ins_end(store: &dyn Accounts) {
    assert!(store.add_user(&user(1, "ada")).await.unwrap());
    for login in 1..=4 {
        log_in(store, login as u8, login, if login == 4 { 2 } else { 1 }).await;
    }
    let all = async || {
        let mut living = vec![];
        for n in 1..=4 {
            if lives(store, n, T0).await {
                living.push(n);
            }
        }
        living
    };
    store.end_login(login_id(1)).await.unwrap();
    store.end_login(login_id(77)).await.unwrap();
    assert_eq!(all().await, [2, 3, 4]);
    assert_eq!(store.rotate_refresh(&[1; 32], &[90; 32], T0 + 9, T0).await.unwrap(), Rotation::Unknown, "ended");
    let old = user(1, "ada").password_hash;
    assert!(store.set_password(user_id(1), &old, "new", Some(login_id(3))).await.unwrap());
    assert_eq!(all().await, [3, 4], "all but the kept one, and nobody else's");
    let hash = async || store.user(user_id(1)).await.unwrap().unwrap().password_hash;
    assert_eq!(hash().await, "new");
    for was in [old.as_str(), "", "NEW"] {
        assert!(!store.set_password(user_id(1), was, "stale", None).await.unwrap(), "another one was set meanwhile");
    }
    assert!(!store.set_password(user_id(77), "new", "stale", None).await.unwrap());
    assert_eq!((hash().await.as_str(), all().await), ("new", vec![3, 4]), "and nothing ends by it");
    assert!(store.set_password(user_id(1), "new", "newer", None).await.unwrap());
    assert_eq!(all().await, [4]);
    let (one, two) =
        futures::join!(store.set_password(user_id(1), "newer", "one", None), store.set_password(user_id(1), "newer", "two", None));
    assert_ne!(one.unwrap(), two.unwrap(), "of two at once one is set");
}

async fn devices(store: &dyn Accounts) {
    for (login, user) in [(1, 1), (2, 2), (3, 1), (4, 1)] {
        log_in(store, login as u8, login, user).await;
    }
    let bare = Device { user_agent: None, first_address: None, address: Some("2001:db8::7".parse().unwrap()), ..device(5, 1) };
    store.add_login(&bare, &token(5, 5, 1)).await.unwrap();
    assert!(store.add_login(&device(1, 1), &token(99, 1, 1)).await.is_err(), "an id is used once");
    assert_eq!(store.rotate_refresh(&[99; 32], &[98; 32], T0 + 9, T0).await.unwrap(), Rotation::Unknown, "nothing of it was written");
    assert_eq!(store.device(login_id(5).into(), T0).await.unwrap(), Some(bare.clone()), "as it was given");
    assert_eq!(store.device(login_id(77).into(), T0).await.unwrap(), None);

    let change = DeviceChange { name: Some("attic".into()), trusted: Some(false) };
    store.change_device(login_id(3).into(), &change).await.unwrap();
    store.change_device(login_id(3).into(), &DeviceChange { trusted: Some(true), ..DeviceChange::default() }).await.unwrap();
    store.change_device(login_id(77).into(), &change).await.unwrap();
    store.device_seen(login_id(3).into(), None, T0 + 7).await.unwrap();
    store.device_seen(login_id(77).into(), None, T0 + 7).await.unwrap();
    let third = Device { name: "attic".into(), trusted: Some(true), address: None, last_seen_at: T0 + 7, ..device(3, 1) };
    assert_eq!(store.device(login_id(3).into(), T0).await.unwrap(), Some(third.clone()));

    let list = async |now, w| store.devices(user_id(1), now, w).await.unwrap();
    assert_eq!(list(T0, all()).await, [bare, device(4, 1), third, device(1, 1)], "newest first, of that user");
    let ids = async |w| list(T0, w).await.iter().map(|d| d.id).collect::<Vec<_>>();
    assert_eq!(ids(window(None, 1)).await, [login_id(5).into()]);
    assert_eq!(ids(window(Some(login_id(4).into()), 1)).await, [login_id(3).into()]);
    store.end_login(login_id(4)).await.unwrap();
    assert_eq!(ids(all()).await, [5, 3, 1].map(|n| login_id(n).into()), "what has ended is not shown");
    assert!(list(T0 + 100, all()).await.is_empty(), "nor what has expired");
    // A log-in lives on with its newest token.
    store.rotate_refresh(&[1; 32], &[11; 32], T0 + 500, T0 + 50).await.unwrap();
    assert_eq!(list(T0 + 100, all()).await.iter().map(|d| d.id).collect::<Vec<_>>(), [login_id(1).into()]);
}

async fn what_has_ended_goes(store: &dyn Accounts) {
    for (login, user) in [(1, 1), (2, 1), (3, 2)] {
        log_in(store, login as u8, login, user).await;
    }
    store.rotate_refresh(&[2; 32], &[20; 32], T0 + 500, T0).await.unwrap();
    store.end_login(login_id(1)).await.unwrap();
    let later = Device { last_seen_at: T0 + 200, ..device(4, 1) };
    store.add_login(&later, &RefreshToken { expires_at: T0 + 900, ..token(4, 4, 1) }).await.unwrap();
    assert!(lives(store, 2, T0 + 200).await && lives(store, 4, T0 + 200).await);
    // An id that is free again says that its row is gone.
    store.add_login(&Device { last_seen_at: T0 + 200, ..device(1, 1) }, &token(1, 1, 1)).await.unwrap();
    assert!(store.add_login(&device(3, 2), &token(30, 3, 2)).await.is_err(), "another user's stay until that one comes");
    let reused = store.rotate_refresh(&[2; 32], &[21; 32], T0 + 900, T0 + 200).await.unwrap();
    assert!(matches!(reused, Rotation::Reused { .. }), "what a living log-in has used up is still known: {reused:?}");
}

async fn keys(store: &dyn Accounts) {
    let key = |n: u16, user: u16| ApiKey {
        id: key_id(n),
        user: user_id(user),
        name: format!("ci {n}"),
        prefix: "cmk_ab".into(),
        mac: [n as u8; 32],
        scopes: ["tasks:dispatch", "nodes:*", "*"].map(|s| Scope::parse(s).unwrap()).into(),
        created_at: T0,
        expires_at: (n == 1).then_some(T0 + 5),
        last_used_at: None,
    };
    for n in 1..=4 {
        store.add_key(&key(n, 1 + n % 2)).await.unwrap();
    }
    assert!(store.add_key(&ApiKey { mac: [99; 32], ..key(1, 1) }).await.is_err(), "an id is used once");
    assert!(store.add_key(&ApiKey { id: key_id(99), ..key(1, 1) }).await.is_err(), "a secret is used once");
    assert_eq!(store.key(key_id(1)).await.unwrap(), Some(key(1, 2)));
    assert_eq!(store.key_by_mac(&[2; 32]).await.unwrap(), Some(key(2, 1)));
    assert_eq!(store.key_by_mac(&[77; 32]).await.unwrap(), None);
    assert_eq!(store.key(key_id(77)).await.unwrap(), None);
    let ids = async |w| store.keys(user_id(2), w).await.unwrap().iter().map(|k| k.id).collect::<Vec<_>>();
    assert_eq!(ids(all()).await, [key_id(3), key_id(1)], "newest first, of that user");
    assert_eq!(ids(window(None, 1)).await, [key_id(3)]);
    assert_eq!(ids(window(Some(key_id(3)), 9)).await, [key_id(1)]);
    store.key_used(key_id(3), T0 + 7).await.unwrap();
    assert_eq!(store.key(key_id(3)).await.unwrap().unwrap().last_used_at, Some(T0 + 7));
    assert!(store.remove_key(key_id(3)).await.unwrap());
    assert!(!store.remove_key(key_id(3)).await.unwrap());
    assert_eq!(store.key_by_mac(&[3; 32]).await.unwrap(), None);
    assert_eq!(ids(all()).await, [key_id(1)]);
}

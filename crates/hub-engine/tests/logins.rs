//! Log-ins, devices and keys, with what is kept in memory and a clock that the test holds.

use async_trait::async_trait;
use hub_engine::accounts::{Accounts, Lifetimes, Recent};
use hub_engine::audit::{self, Ending, Log};
use hub_engine::devices::LoginFrom;
use hub_engine::events::{Data, Events, NodeNews, Told, Topic, Whose};
use hub_engine::ports::{Accounts as _, Audit, Keyring, Passwords, Stored, Window};
use hub_engine::records::{AuditFilter, User};
use hub_engine::rights::Rights;
use hub_engine::throttle::Throttle;
use hub_engine::{Error, Result};
use hub_testkit::contract::{HandClock, sample};
use hub_testkit::{MemoryStore, Nowhere, TestKeys};
use mesh_core::permission::{Caller, Permission, Reach, Role, Via};
use mesh_core::seal::Intent;
use mesh_core::{Digest, LoginId, NodeId, UnixMs, UserId};
use mesh_process::{Clock, Tasks};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Says what it was asked; a password fits its own text.
#[derive(Default)]
struct Plain(Mutex<Vec<Option<String>>>);

#[async_trait]
impl Passwords for Plain {
    async fn hash(&self, password: String) -> Result<String> {
        Ok(password)
    }
    async fn verify(&self, password: String, hash: Option<String>) -> Result<bool> {
        self.0.lock().unwrap().push(hash.clone());
        Ok(hash == Some(password))
    }
}

/// Tokens that anybody can read.
struct Open;

impl Keyring for Open {
    fn sign(&self, kind: &str, body: &[u8]) -> (String, [u8; 64]) {
        TestKeys.sign(kind, body)
    }
    fn key_id(&self) -> String {
        TestKeys.key_id()
    }
    fn seal(&self, intent: &Intent) -> Digest {
        TestKeys.seal(intent)
    }
    fn is_sealed(&self, intent: &Intent, seal: &Digest) -> bool {
        TestKeys.is_sealed(intent, seal)
    }
    fn token_mac(&self, token: &str) -> Digest {
        TestKeys.token_mac(token)
    }
    fn issue_access(&self, user: UserId, login: LoginId, _: UnixMs, expires_at: UnixMs) -> String {
        format!("{user} {login} {expires_at}")
    }
    fn read_access(&self, token: &str, now: UnixMs) -> Option<(UserId, LoginId)> {
        let parts: Vec<&str> = token.split(' ').collect();
        let [user, login, end] = parts[..] else { return None };
        (end.parse::<UnixMs>().ok()? > now).then_some((user.parse().ok()?, login.parse().ok()?))
    }
    fn issue_certificate(&self, _: NodeId, _: &[u8], _: UnixMs, _: UnixMs, _: &[Digest]) -> Stored<Vec<u8>> {
        Ok(vec![])
    }
}

struct Stage {
    store: Arc<MemoryStore>,
    clock: Arc<HandClock>,
    passwords: Arc<Plain>,
    events: Events,
    accounts: Accounts,
}

const ALL: Window<mesh_core::DeviceId> = Window { before: None, limit: 100 };

async fn stage(role: Role) -> Stage {
    let (store, clock, passwords) = (Arc::new(MemoryStore::new()), Arc::new(HandClock::default()), Arc::new(Plain::default()));
    let user = User { role, password_hash: "right".into(), ..sample::user(1, "ada") };
    store.add_user(&user).await.unwrap();
    let events = Events::local(Duration::from_secs(600), clock.clone());
    let accounts = Accounts {
        recent: Recent::default(),
        store: store.clone(),
        keyring: Arc::new(Open),
        passwords: passwords.clone(),
        clock: clock.clone(),
        events: events.clone(),
        lifetimes: Lifetimes { access_secs: 600, refresh_days: 30 },
        throttle: Throttle::new(1000, 1000, clock.clone()),
        work: Tasks::new(),
        rights: Arc::new(Rights::new(store.clone(), store.clone(), clock.clone())),
    };
    Stage { store, clock, passwords, events, accounts }
}

fn person(role: Role) -> Caller {
    Caller::person(sample::user_id(1), role)
}

#[tokio::test]
async fn an_unknown_name_costs_what_a_wrong_password_does() {
    let s = stage(Role::Developer).await;
    let log_in = async |name: &str, password: &str| s.accounts.login(name, password.into(), LoginFrom::default()).await.map(drop);
    let wrong = log_in("ada", "wrong").await.unwrap_err();
    let unknown = log_in("nobody", "wrong").await.unwrap_err();
    assert!(matches!(wrong, Error::Unauthenticated(_)) && wrong.to_string() == unknown.to_string());
    assert_eq!(*s.passwords.0.lock().unwrap(), [Some("right".to_owned()), None], "each was compared with something");
    log_in("ADA", "right").await.unwrap();
}

#[tokio::test]
async fn what_was_remembered_of_somebody_counts_no_more_once_their_rights_change() {
    let s = stage(Role::Admin).await;
    let made = s.accounts.create_key(&person(Role::Admin), "k", &["nodes:*".into(), "system:*".into()], None, None).await.unwrap();
    let reach = async |p| s.accounts.authenticate(&made.secret, None).await.unwrap().caller.reach(p);
    assert_eq!(reach(Permission::NodesManage).await, Reach::All);
    s.store.set_role(sample::user_id(1), Role::Viewer);
    // As another hub would: it counts after a moment.
    assert_eq!(reach(Permission::NodesManage).await, Reach::All);
    // As this hub does: at once.
    s.events.rights_changed(Whose::User(sample::user_id(1)));
    for p in [Permission::NodesManage, Permission::NodesInvite, Permission::SystemAdminister] {
        assert_eq!(reach(p).await, Reach::None, "a key gives no more than its owner has now");
    }
    assert_eq!(reach(Permission::NodesRead).await, Reach::All, "what a viewer has");
    s.store.set_role(sample::user_id(1), Role::Admin);
    s.clock.advance(Duration::from_secs(2));
    assert_eq!(reach(Permission::NodesManage).await, Reach::All);
}

#[tokio::test]
async fn a_scope_is_no_more_than_who_makes_the_key_has() {
    let bad = [
        (Role::Admin, "tasks:approve"),
        (Role::Developer, "system:administer"),
        (Role::Developer, "system:audit"),
        (Role::Developer, "system:*"),
        (Role::Viewer, "tasks:dispatch"),
        (Role::Viewer, "nodes:manage"),
        (Role::Guest, "sessions:write"),
    ];
    for (role, scope) in bad {
        let s = stage(role).await;
        let made = s.accounts.create_key(&person(role), "k", &["tasks:read".into(), scope.into()], None, None).await;
        assert!(matches!(made, Err(Error::Invalid { code: "bad_scope", .. })), "{role:?} {scope}");
    }
    for (role, scope) in [(Role::Admin, "system:audit"), (Role::Developer, "*"), (Role::Viewer, "nodes:*"), (Role::Guest, "tasks:dispatch")]
    {
        let s = stage(role).await;
        s.accounts.create_key(&person(role), "k", &[scope.into()], None, None).await.unwrap();
    }
}

#[tokio::test]
async fn a_stream_of_somebody_demoted_ends() {
    let s = stage(Role::Admin).await;
    let tokens = s.accounts.login("ada", "right".into(), LoginFrom::default()).await.unwrap();
    let who = s.accounts.authenticate(&tokens.access, None).await.unwrap();
    let mut feed = s.events.open(who, Some(vec![Topic::Nodes]), None).unwrap();
    let news = || s.events.tell(sample::user_id(2), Data::Node(sample::node_id(1), NodeNews::Online));
    news();
    assert!(matches!(feed.next().await, Told::Event(..)));
    s.store.set_role(sample::user_id(1), Role::Developer);
    s.events.rights_changed(Whose::User(sample::user_id(1)));
    news();
    assert!(matches!(feed.next().await, Told::LookAgain), "before anything more is told");
    let now = s.accounts.still(feed.who()).await.unwrap();
    feed.set_rights(now).unwrap();
    s.events.tell(sample::user_id(1), Data::Node(sample::node_id(2), NodeNews::Online));
    let Told::Event(_, event) = feed.next().await else { panic!() };
    assert_eq!(event.owner, sample::user_id(1), "of others' nodes it hears no more");
    // Its log-in ends: there is nothing left.
    s.accounts.logout(&person(Role::Guest), tokens.login).await.unwrap();
    assert!(matches!(feed.next().await, Told::LookAgain));
    assert!(matches!(s.accounts.still(feed.who()).await, Err(Error::Unauthenticated(_))));
}

/// Also a token that counts no more belongs to somebody, and a log that does not say to whom is of no use.
#[tokio::test]
async fn a_refresh_names_whose_token_it_was() {
    let s = stage(Role::Developer).await;
    let log = Arc::new(Log {
        store: s.store.clone(),
        witness: Arc::new(Nowhere),
        keyring: Arc::new(Open),
        hub: sample::hub_id(1),
        clock: s.clock.clone(),
        work: Tasks::new(),
        bounds: Default::default(),
    });
    log.start(&[1; 16], 1, false).await.unwrap();
    let refresh = async |token: &str| audit::scope(&log, Via::default(), s.accounts.refresh(token, None), Ending::of).await;
    let ended = s.accounts.login("ada", "right".into(), LoginFrom::default()).await.unwrap();
    let old = s.accounts.login("ada", "right".into(), LoginFrom::default()).await.unwrap();
    let first = s.accounts.login("ada", "right".into(), LoginFrom::default()).await.unwrap();
    s.accounts.logout(&person(Role::Developer), ended.login).await.unwrap();
    refresh(&first.refresh).await.unwrap();
    refresh(&first.refresh).await.map(drop).expect_err("it was used before");
    refresh(&ended.refresh).await.map(drop).expect_err("its log-in has ended");
    s.clock.advance(Duration::from_secs(31 * 86_400));
    refresh(&old.refresh).await.map(drop).expect_err("it has expired");
    refresh("cmr_nobodys").await.map(drop).expect_err("nobody made it");
    let mut rows = s.store.entries(&AuditFilter::default(), Window { before: None, limit: 10 }).await.unwrap();
    rows.sort_by_key(|r| r.seq);
    let told: Vec<_> = rows[1..].iter().map(|r| (r.action.as_str(), r.outcome.as_str(), r.user, r.resource_id.clone())).collect();
    let of = |outcome, login: LoginId| ("auth.refresh", outcome, Some(sample::user_id(1)), login.to_string());
    let (first, ended, old) = (first.login, ended.login, old.login);
    let all =
        [of("ok", first), of("denied", first), of("denied", ended), of("denied", old), ("auth.refresh", "denied", None, String::new())];
    assert_eq!(told, all);
}

#[tokio::test]
async fn a_device_is_seen_at_most_once_a_minute() {
    let s = stage(Role::Developer).await;
    let at = |last: u8| Some([192, 0, 2, last].into());
    let from = LoginFrom { name: Some("desk".into()), user_agent: None, address: at(1) };
    let tokens = s.accounts.login("ada", "right".into(), from).await.unwrap();
    let made = s.clock.now_ms();
    let seen = async || {
        let all = s.accounts.devices(&person(Role::Developer), ALL).await.unwrap();
        let [one] = &all[..] else { panic!("{all:?}") };
        (one.first_address, one.address, one.last_seen_at)
    };
    s.clock.advance(Duration::from_secs(59));
    s.accounts.authenticate(&tokens.access, at(2)).await.unwrap();
    assert_eq!(seen().await, (at(1), at(1), made));
    s.clock.advance(Duration::from_secs(2));
    s.accounts.authenticate(&tokens.access, at(2)).await.unwrap();
    assert_eq!(seen().await, (at(1), at(2), made + 61_000));
    s.accounts.refresh(&tokens.refresh, at(3)).await.unwrap();
    assert_eq!(seen().await, (at(1), at(3), made + 61_000));
}

#[tokio::test]
async fn nobody_touches_devices_of_others_nor_by_a_key() {
    let s = stage(Role::Developer).await;
    let tokens = s.accounts.login("ada", "right".into(), LoginFrom::default()).await.unwrap();
    let id = tokens.login.into();
    let change = hub_engine::records::DeviceChange { name: None, trusted: Some(true) };
    let other = Caller::person(sample::user_id(2), Role::Admin);
    assert!(s.accounts.devices(&other, ALL).await.unwrap().is_empty());
    assert!(matches!(s.accounts.change_device(&other, id, change.clone()).await, Err(Error::NotFound(_))));
    assert!(matches!(s.accounts.remove_device(&other, id).await, Err(Error::NotFound(_))));
    let made = s.accounts.create_key(&person(Role::Developer), "k", &["*".into()], None, None).await.unwrap();
    let key = s.accounts.authenticate(&made.secret, None).await.unwrap().caller;
    assert!(matches!(s.accounts.devices(&key, ALL).await, Err(Error::Forbidden(_))));
    assert!(matches!(s.accounts.change_device(&key, id, change).await, Err(Error::Forbidden(_))));
    assert!(matches!(s.accounts.remove_device(&key, id).await, Err(Error::Forbidden(_))));
    s.accounts.remove_device(&person(Role::Developer), id).await.unwrap();
    assert!(s.accounts.authenticate(&tokens.access, None).await.is_err());
}

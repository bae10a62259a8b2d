//! Who may share what with whom, what that lets them do, and how soon it ends.

use async_trait::async_trait;
use hub_engine::accounts::{self, Accounts, Authenticated};
use hub_engine::audit::{self, Ending, Log};
use hub_engine::error::{Error, Result};
use hub_engine::events::{Events, NodeNews, Told};
use hub_engine::grants::{Grants, NewGrant, On};
use hub_engine::idempotency::Idempotency;
use hub_engine::links::{Link, Links};
use hub_engine::nodes::{Lifetimes, Nodes};
use hub_engine::pool::{Pool, Queue};
use hub_engine::ports::{Accounts as _, AgentState, Audit, Grants as _, Journal, NodeDirectory, Passwords, Sessions as _, Window};
use hub_engine::records::*;
use hub_engine::rights::{MAX_GRANTS, Rights};
use hub_engine::sessions::Sessions;
use hub_engine::throttle::Throttle;
use hub_engine::watch::Watchers;
use hub_testkit::contract::{HandClock, sample};
use hub_testkit::{MemoryStore, Nowhere, TestKeys};
use mesh_core::permission::{Caller, Permission, Role, Scope, Thing, Via, allows};
use mesh_core::task::TaskState;
use mesh_core::{NodeId, TaskId, sha256};
use mesh_process::{Clock, Tasks};
use std::sync::Arc;
use std::time::Duration;

struct NoPasswords;
#[async_trait]
impl Passwords for NoPasswords {
    async fn hash(&self, password: String) -> hub_engine::Result<String> {
        Ok(password)
    }
    async fn verify(&self, _: String, _: Option<String>) -> hub_engine::Result<bool> {
        Ok(false)
    }
}

const ADMIN: u16 = 1;
const OWNER: u16 = 2;
const FRIEND: u16 = 3;
const VIEWER: u16 = 4;
const GUEST: u16 = 5;

struct World {
    store: Arc<MemoryStore>,
    clock: Arc<HandClock>,
    accounts: Arc<Accounts>,
    pool: Arc<Pool>,
    nodes: Arc<Nodes>,
    sessions: Sessions,
    grants: Arc<Grants>,
    events: Events,
}

impl World {
    /// An admin, two developers, a viewer and a guest; the first developer owns everything.
    async fn new() -> Self {
        let (store, clock) = (Arc::new(MemoryStore::new()), Arc::new(HandClock::default()));
        let events = Events::local(Duration::from_secs(60), clock.clone());
        let rights = Arc::new(Rights::new(store.clone(), store.clone(), clock.clone()));
        let links = Arc::new(Links::default());
        let accounts = Arc::new(Accounts {
            recent: Default::default(),
            store: store.clone(),
            rights: rights.clone(),
            keyring: Arc::new(TestKeys),
            passwords: Arc::new(NoPasswords),
            clock: clock.clone(),
            events: events.clone(),
            lifetimes: accounts::Lifetimes { access_secs: 600, refresh_days: 1 },
            throttle: Throttle::new(1000, 1000, clock.clone()),
            work: Tasks::new(),
        });
        let nodes = Arc::new(Nodes {
            hub: sample::hub_id(1),
            store: store.clone(),
            keyring: Arc::new(TestKeys),
            links: links.clone(),
            events: events.clone(),
            history: Default::default(),
            recoveries: Default::default(),
            clock: clock.clone(),
            lifetimes: Lifetimes { certificate_ms: 1, invite_secs: 1 },
        });
        let pool = Arc::new(Pool {
            journal: store.clone(),
            sessions: store.clone(),
            accounts: store.clone(),
            rights,
            keyring: Arc::new(TestKeys),
            links,
            watchers: Watchers::default(),
            events: events.clone(),
            clock: clock.clone(),
            incarnation: 1,
            policy: [0; 32],
            queue: Queue::default(),
        });
        let sessions = Sessions {
            store: store.clone(),
            nodes: nodes.clone(),
            pool: pool.clone(),
            events: events.clone(),
            clock: clock.clone(),
            session_hours: 24,
        };
        let grants = Arc::new(Grants {
            store: store.clone(),
            nodes: store.clone(),
            sessions: store.clone(),
            state: store.clone(),
            accounts: accounts.clone(),
            pool: pool.clone(),
            clock: clock.clone(),
            work: Tasks::new(),
        });
        for (n, role) in
            [(ADMIN, Role::Admin), (OWNER, Role::Developer), (FRIEND, Role::Developer), (VIEWER, Role::Viewer), (GUEST, Role::Guest)]
        {
            assert!(store.add_user(&User { role, ..sample::user(n, &format!("u{n}")) }).await.unwrap());
        }
        Self { store, clock, accounts, pool, nodes, sessions, grants, events }
    }
    /// With the rights of now.
    async fn caller(&self, n: u16) -> Caller {
        let user = self.store.user(sample::user_id(n)).await.unwrap().unwrap();
        let who = Authenticated { caller: Caller::person(user.id, user.role), login: None };
        self.accounts.still(&who).await.unwrap().caller
    }
    /// A machine of the owner's, linked, with one place.
    async fn machine(&self, n: u16, labels: &[(&str, &str)]) -> NodeId {
        let labels = labels.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        let node = Node { owner: sample::user_id(OWNER), name: format!("m{n}"), labels, ..sample::node(n, n as u8) };
        self.store.add_invite(&sample::invite(n)).await.unwrap();
        self.store.claim_invite(sample::invite_id(n), &node, sample::invite(n).created_at, 1).await.unwrap();
        let (commands, queue) = tokio::sync::mpsc::channel(16);
        // Nobody reads it, and it stays open.
        std::mem::forget(queue);
        self.pool.links.open(Link {
            node: node.id,
            owner: node.owner,
            generation: 1,
            spool: sample::spool_id(1),
            own_tasks: 1,
            max_tasks: 1,
            keeps: 0,
            offers: Arc::new(node.offers()),
            draining: false,
            closed: None,
            task_limit: None,
            epoch: 0,
            cut: Default::default(),
            commands,
            health: None,
            rtt: None,
        });
        node.id
    }
    async fn session(&self, n: u16, nodes: &[NodeId]) -> Session {
        self.store.add_session(&Session { nodes: nodes.to_vec(), ..sample::session(n, OWNER) }).await.unwrap();
        self.store.session(sample::session_id(n)).await.unwrap().unwrap()
    }
    async fn give(&self, by: u16, to: &str, on: impl ToString, permissions: &[&str]) -> Result<Grant> {
        self.create(by, NewGrant { expires_at: None, ..new(to, On::One(on.to_string()), permissions) }).await
    }
    async fn create(&self, by: u16, new: NewGrant) -> Result<Grant> {
        let caller = self.caller(by).await;
        self.grants.create(&caller, new, None).await
    }
    async fn task(&self, n: u16, user: u16, session: Option<&Session>, named: Option<NodeId>) -> TaskId {
        let mut task = Task { queue_secs: 0, named_node: named, session: session.map(|s| s.id), ..sample::task(n) };
        task.actor.user = sample::user_id(user);
        task.digest = sha256(&task.spec);
        let caller = self.caller(user).await;
        self.pool.accept(task, &caller, session).await.unwrap().id
    }
    async fn on(&self, task: TaskId) -> Option<NodeId> {
        let p = self.store.task(task).await.unwrap().unwrap().progress;
        p.attempt.filter(|_| p.state == TaskState::Assigned).map(|a| a.node)
    }
    /// Ends what holds a place, so that the next can have it.
    async fn free(&self, node: NodeId, task: TaskId) {
        self.pool.links.release(node, task);
        self.pool.round().await.unwrap();
    }
}

fn new(to: &str, resource: On, permissions: &[&str]) -> NewGrant {
    let permissions = permissions.iter().map(|p| (*p).to_owned()).collect();
    NewGrant { subject: to.into(), resource, permissions, expires_at: None }
}
fn labels(pairs: &[(&str, &str)]) -> On {
    On::Labels(pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect())
}
fn id(n: u16) -> String {
    sample::user_id(n).to_string()
}
fn code<T: std::fmt::Debug>(answer: Result<T>) -> &'static str {
    match answer.expect_err("it is refused") {
        Error::NotFound(_) => "not_found",
        Error::Forbidden(_) => "forbidden",
        Error::Invalid { code, .. } | Error::Conflict { code, .. } => code,
        other => panic!("{other:?}"),
    }
}
const ALL: Window<mesh_core::GrantId> = Window { before: None, limit: 100 };

#[tokio::test]
async fn who_may_share_what_and_how_it_is_refused() {
    let w = World::new().await;
    let node = w.machine(1, &[]).await;
    let session = w.session(1, &[]).await.id;
    let entry = StateEntry {
        id: sample::entry_id(1),
        agent: "bot".into(),
        key: "k".into(),
        owner: sample::user_id(OWNER),
        value: "1".into(),
        updated_at: 1,
    };
    w.store.put_state(&entry, 9).await.unwrap();
    let things = [node.to_string(), session.to_string(), "bot".to_owned()];
    let read = ["nodes:read", "sessions:read", "agents:read"];
    for (thing, read) in things.iter().zip(read) {
        for by in [FRIEND, GUEST] {
            assert_eq!(code(w.give(by, &id(VIEWER), thing, &[read]).await), "not_found", "{by} {thing}");
        }
        assert_eq!(code(w.give(VIEWER, &id(FRIEND), thing, &[read]).await), "forbidden", "what one may see and not share");
        for by in [OWNER, ADMIN] {
            w.give(by, &id(FRIEND), thing, &[read]).await.unwrap();
        }
        assert_eq!(code(w.give(FRIEND, &id(GUEST), thing, &[read]).await), "forbidden", "what was granted is not passed on");
    }
    let grant = |to: &str, permissions: &[&str]| new(to, On::One(node.to_string()), permissions);
    for (new, want) in [
        (grant(&id(99), &["nodes:read"]), "not_found"),
        (grant("nobody", &["nodes:read"]), "not_found"),
        (grant("", &["nodes:read"]), "not_found"),
        (grant(&id(OWNER), &["nodes:read"]), "bad_subject"),
        (grant("u2", &["nodes:read"]), "bad_subject"),
        (grant("u3", &[]), "bad_permission"),
        (grant("u3", &["nodes:fly"]), "bad_permission"),
        (grant("u3", &["*"]), "bad_permission"),
        (grant("u3", &["nodes:read", "nodes:manage"]), "bad_permission"),
        (grant("u3", &["nodes:invite"]), "bad_permission"),
        (grant("u3", &["tasks:approve"]), "bad_permission"),
        (grant("u3", &["system:audit"]), "bad_permission"),
        (grant("u3", &["system:administer"]), "bad_permission"),
        (NewGrant { expires_at: Some(w.clock.now_ms()), ..grant("u3", &["nodes:read"]) }, "bad_time"),
        (new("u3", On::One(sample::node_id(9).to_string()), &["nodes:read"]), "not_found"),
        (new("u3", On::One("node_x".into()), &["nodes:read"]), "not_found"),
        (new("u3", On::One(sample::session_id(9).to_string()), &["sessions:read"]), "not_found"),
        (new("u3", On::One("sess_".into()), &["sessions:read"]), "not_found"),
        (new("u3", On::One("no such agent".into()), &["agents:read"]), "not_found"),
        (new("u3", On::One(String::new()), &["agents:read"]), "not_found"),
        (new("u3", labels(&[("zone", "a")]), &["nodes:read"]), "forbidden"),
    ] {
        let text = format!("{new:?}");
        assert_eq!(code(w.create(OWNER, new).await), want, "{text}");
    }
    for (pairs, want) in [(labels(&[]), "bad_label"), (labels(&[("", "a")]), "bad_label"), (labels(&[("a", "\u{202e}")]), "bad_label")] {
        assert_eq!(code(w.create(ADMIN, new("u3", pairs, &["nodes:read"])).await), want);
    }
    // A key grants no more than its scopes have, and only what they may manage.
    let key = |scopes: &[&str]| {
        let scopes: Vec<Scope> = scopes.iter().map(|s| Scope::parse(s).unwrap()).collect();
        Caller::key(sample::key_id(1), sample::user_id(OWNER), Role::Developer, scopes)
    };
    let by = async |scopes: &[&str], p: &str| w.grants.create(&key(scopes), grant("u3", &[p]), None).await;
    assert_eq!(code(by(&["tasks:dispatch", "nodes:read"], "tasks:dispatch").await), "forbidden");
    assert_eq!(code(by(&["nodes:*"], "tasks:dispatch").await), "forbidden");
    assert_eq!(code(by(&["tasks:dispatch"], "tasks:dispatch").await), "not_found");
    by(&["*"], "tasks:dispatch").await.unwrap();
    // The bound is the subject's.
    for n in 0..MAX_GRANTS as u16 {
        let grant = Grant { expires_at: None, ..sample::grant(1000 + n, Resource::Node(node)) };
        w.store.add_grant(&Grant { subject: Subject::Role(Role::Guest), ..grant }).await.unwrap();
    }
    assert_eq!(code(w.give(OWNER, "guest", node, &["nodes:read"]).await), "grants_full");
    w.give(OWNER, "u5", node, &["nodes:read"]).await.unwrap();
}

#[tokio::test]
async fn a_repeated_request_makes_one_grant() {
    let w = World::new().await;
    let node = w.machine(1, &[]).await;
    let keys = Idempotency { store: w.store.clone(), clock: w.clock.clone() };
    let caller = w.caller(OWNER).await;
    let asked = || new("u3", On::One(node.to_string()), &["nodes:read"]);
    let keyed = |request: u8| Some(keys.keyed(&caller, "POST /grants", "k", [request; 32]));
    let first = w.grants.create(&caller, asked(), keyed(1)).await.unwrap();
    assert_eq!(w.grants.create(&caller, asked(), keyed(1)).await.unwrap(), first);
    assert_eq!(code(w.grants.create(&caller, asked(), keyed(2)).await), "idempotency_mismatch");
    let (a, b) = futures::future::join(
        w.grants.create(&caller, asked(), Some(keys.keyed(&caller, "POST /grants", "l", [1; 32]))),
        w.grants.create(&caller, asked(), Some(keys.keyed(&caller, "POST /grants", "l", [1; 32]))),
    )
    .await;
    assert_eq!(a.unwrap(), b.unwrap());
    assert_eq!(w.grants.list(&caller, ALL).await.unwrap().len(), 2);
}

#[tokio::test]
async fn one_sees_what_one_gave_and_was_given_and_takes_back_what_one_may() {
    let w = World::new().await;
    let node = w.machine(1, &[]).await;
    let to_guest = w.give(OWNER, "u5", node, &["nodes:read"]).await.unwrap();
    let to_guests = w.give(ADMIN, "guest", node, &["nodes:read"]).await.unwrap();
    let to_friend = w.give(ADMIN, "u3", node, &["nodes:read"]).await.unwrap();
    let seen = async |n: u16| {
        let found = w.grants.list(&w.caller(n).await, ALL).await.unwrap();
        [&to_guest, &to_guests, &to_friend].map(|g| found.contains(g))
    };
    assert_eq!(seen(ADMIN).await, [true, true, true]);
    assert_eq!(seen(OWNER).await, [true, false, false]);
    assert_eq!(seen(GUEST).await, [true, true, false]);
    assert_eq!(seen(FRIEND).await, [false, false, true]);
    assert_eq!(seen(VIEWER).await, [false, false, false]);
    let take = async |n: u16, g: &Grant| w.grants.remove(&w.caller(n).await, g.id).await;
    assert_eq!(code(take(GUEST, &to_guest).await), "forbidden");
    assert_eq!(code(take(FRIEND, &to_guest).await), "not_found");
    assert_eq!(code(take(VIEWER, &to_guest).await), "not_found");
    take(OWNER, &to_friend).await.expect("it is on what is theirs, whoever made it");
    take(ADMIN, &to_guest).await.unwrap();
    assert_eq!(code(take(ADMIN, &to_guest).await), "not_found");
    take(ADMIN, &to_guests).await.unwrap();
    assert_eq!(seen(ADMIN).await, [false, false, false]);
    // What has expired is gone.
    let end = w.clock.now_ms() + 10;
    let short = NewGrant { expires_at: Some(end), ..new("u5", On::One(node.to_string()), &["nodes:read"]) };
    let short = w.create(OWNER, short).await.unwrap();
    w.clock.advance(Duration::from_millis(10));
    assert!(w.grants.list(&w.caller(ADMIN).await, ALL).await.unwrap().is_empty());
    assert_eq!(code(take(OWNER, &short).await), "not_found");
}

#[tokio::test]
async fn labels_are_matched_whole_and_as_they_are_now() {
    let w = World::new().await;
    let own = w.machine(1, &[("domain", "corp.com"), ("zone", "a")]).await;
    let alike = w.machine(2, &[("domain", "evil-corp.com"), ("zone", "a")]).await;
    let longer = w.machine(3, &[("domain", "corp.com.evil"), ("zone", "a")]).await;
    let half = w.machine(4, &[("domain", "corp.com")]).await;
    w.create(ADMIN, new("guest", labels(&[("domain", "corp.com"), ("zone", "a")]), &["nodes:read", "tasks:dispatch"])).await.unwrap();
    let reached = async || {
        let caller = w.caller(GUEST).await;
        let may = |n: &NodeId| allows(&caller, Permission::TasksDispatch, sample::user_id(OWNER), Thing::Node(*n));
        [own, alike, longer, half].map(|n| may(&n))
    };
    assert_eq!(reached().await, [true, false, false, false]);
    // What people change counts at once.
    let relabel = |zone: &str| NodeChange {
        labels: Some([("domain".to_owned(), "corp.com".to_owned()), ("zone".to_owned(), zone.to_owned())].into()),
        ..Default::default()
    };
    w.store.change_node(half, &relabel("a")).await.unwrap();
    w.store.change_node(own, &relabel("b")).await.unwrap();
    assert_eq!(reached().await, [false, false, false, true]);
    w.store.revoke_node(half, w.clock.now_ms()).await.unwrap();
    assert_eq!(reached().await, [false, false, false, false]);
    // What a machine tells of itself is a label too, and counts within seconds.
    w.create(ADMIN, new("guest", labels(&[("python", "3.12")]), &["nodes:read"])).await.unwrap();
    let reads = async || {
        let caller = w.caller(GUEST).await;
        allows(&caller, Permission::NodesRead, sample::user_id(OWNER), Thing::Node(longer))
    };
    assert!(!reads().await);
    let mut capabilities = sample::node(3, 3).capabilities;
    capabilities.runtimes.insert("python".into(), "3.12".into());
    w.store.register(longer, "1", &capabilities).await.unwrap();
    w.clock.advance(Duration::from_secs(4));
    assert!(reads().await);
}

#[tokio::test]
async fn a_task_goes_where_its_person_may_and_follows_when_that_ends() {
    let w = World::new().await;
    let node = w.machine(1, &[]).await;
    let [guests, friends, viewers] =
        [w.task(1, GUEST, None, None).await, w.task(2, FRIEND, None, None).await, w.task(3, VIEWER, None, None).await];
    w.pool.round().await.unwrap();
    assert_eq!([w.on(guests).await, w.on(friends).await, w.on(viewers).await], [None; 3], "nobody granted them anything");
    w.give(OWNER, "viewer", node, &["tasks:dispatch"]).await.unwrap();
    w.give(OWNER, "u5", node, &["nodes:read"]).await.unwrap();
    w.pool.round_of_changes().await.unwrap();
    assert_eq!([w.on(guests).await, w.on(friends).await, w.on(viewers).await], [None; 3], "that is not enough, or more than the role has");
    let given = w.give(OWNER, "u5", node, &["tasks:dispatch"]).await.unwrap();
    w.pool.round_of_changes().await.unwrap();
    assert_eq!(w.on(guests).await, Some(node), "the grant itself lets it go");
    // Those behind it wait for the place, and the grant ends before there is one.
    let (any, named) = (w.task(4, GUEST, None, None).await, w.task(5, GUEST, None, Some(node)).await);
    w.grants.remove(&w.caller(OWNER).await, given.id).await.unwrap();
    w.free(node, guests).await;
    assert_eq!([w.on(any).await, w.on(named).await], [None, None]);
    // One that expires ends by itself, at any hub, within 5 s.
    let end = w.clock.now_ms() + 1000;
    let short = NewGrant { expires_at: Some(end), ..new("u3", On::One(node.to_string()), &["tasks:dispatch"]) };
    let owners = w.task(6, OWNER, None, Some(node)).await;
    w.pool.round_of_changes().await.unwrap();
    assert_eq!(w.on(owners).await, Some(node), "who waits in vain is in nobody's way");
    w.create(OWNER, short).await.unwrap();
    w.pool.round().await.unwrap();
    w.clock.advance(Duration::from_secs(5));
    w.free(node, owners).await;
    assert_eq!(w.on(friends).await, None);
}

/// By whoever may see the grant, and by whoever may not.
#[tokio::test]
async fn who_may_not_take_a_grant_back_is_denied_and_told_of() {
    let w = World::new().await;
    let node = w.machine(1, &[]).await;
    let given = w.give(OWNER, "u3", node, &["nodes:read"]).await.unwrap();
    let log = Arc::new(Log {
        store: w.store.clone(),
        witness: Arc::new(Nowhere),
        keyring: Arc::new(TestKeys),
        hub: sample::hub_id(1),
        clock: w.clock.clone(),
        work: Tasks::new(),
        bounds: Default::default(),
    });
    log.start(&[1; 16], 1, false).await.unwrap();
    for (who, says) in [(FRIEND, "forbidden"), (GUEST, "not_found")] {
        let caller = w.caller(who).await;
        let remove = w.grants.remove(&caller, given.id);
        assert_eq!(code(audit::scope(&log, Via::default(), remove, Ending::of).await), says);
    }
    let mut rows = w.store.entries(&AuditFilter::default(), Window { before: None, limit: 10 }).await.unwrap();
    rows.sort_by_key(|r| r.seq);
    let told: Vec<_> = rows[1..].iter().map(|r| (r.kind.as_str(), r.action.as_str(), r.outcome.as_str(), r.user)).collect();
    let of = |who| ("authorization_denied", "grant.remove", "denied", Some(sample::user_id(who)));
    assert_eq!(told, [of(FRIEND), of(GUEST)]);
    assert!(rows[1..].iter().all(|r| r.resource_id == given.id.to_string()));
}

#[tokio::test]
async fn in_a_session_its_owners_nodes_count() {
    let w = World::new().await;
    let node = w.machine(1, &[]).await;
    let session = w.session(1, &[node]).await;
    w.give(OWNER, "u5", session.id, &["tasks:dispatch"]).await.unwrap();
    let guests = w.task(1, GUEST, Some(&session), None).await;
    assert_eq!(w.on(guests).await, Some(node), "the session was granted, and its node with it");
    let outside = w.task(2, GUEST, None, None).await;
    // A friend's session uses the owner's node only while the friend may.
    let given = w.give(OWNER, "u3", node, &["tasks:dispatch"]).await.unwrap();
    let theirs = Session { owner: sample::user_id(FRIEND), ..sample::session(2, FRIEND) };
    w.store.add_session(&theirs).await.unwrap();
    let caller = w.caller(FRIEND).await;
    w.sessions.attach(&caller, theirs.id, &node.to_string()).await.expect("who may dispatch there may attach it");
    let theirs = w.store.session(theirs.id).await.unwrap().unwrap();
    let (first, second) = (w.task(3, FRIEND, Some(&theirs), None).await, w.task(4, FRIEND, Some(&theirs), None).await);
    w.free(node, guests).await;
    assert_eq!([w.on(first).await, w.on(second).await, w.on(outside).await], [Some(node), None, None]);
    w.grants.remove(&w.caller(OWNER).await, given.id).await.unwrap();
    w.free(node, first).await;
    assert_eq!(w.on(second).await, None, "its owner may not any more");
    // What a guest left in the session waits for ever once the session is not granted any more.
    let waits = w.task(5, GUEST, Some(&session), None).await;
    assert_eq!(w.on(waits).await, Some(node));
    let behind = w.task(6, GUEST, Some(&session), None).await;
    let all = w.grants.list(&w.caller(OWNER).await, ALL).await.unwrap();
    for grant in all {
        w.grants.remove(&w.caller(OWNER).await, grant.id).await.unwrap();
    }
    w.free(node, waits).await;
    assert_eq!(w.on(behind).await, None);
    // A node is found by who may use it, though they may not read it.
    w.give(OWNER, "u5", node, &["tasks:dispatch"]).await.unwrap();
    assert_eq!(w.nodes.find(&w.caller(GUEST).await, "m1", Permission::TasksDispatch).await.unwrap().id, node);
    assert_eq!(code(w.nodes.find(&w.caller(GUEST).await, "m1", Permission::NodesRead).await), "not_found");
    assert_eq!(code(w.nodes.find(&w.caller(VIEWER).await, "m1", Permission::TasksDispatch).await), "forbidden");
}

#[tokio::test]
async fn what_one_can_do_somewhere_is_told_and_streams_look_again() {
    let w = World::new().await;
    let node = w.machine(1, &[]).await;
    let may = async |n: u16| w.accounts.me(&w.caller(n).await).await.unwrap().1;
    assert_eq!(may(GUEST).await, []);
    assert_eq!(may(VIEWER).await.len(), 4);
    let login = Authenticated { caller: w.caller(GUEST).await, login: None };
    let mut feed = w.events.open(login, None, None).unwrap();
    let other = Authenticated { caller: w.caller(FRIEND).await, login: None };
    let mut others = w.events.open(other, None, None).unwrap();
    let news = async || {
        let node = w.store.node(node).await.unwrap().unwrap();
        w.events.node(&node, NodeNews::Draining);
    };
    news().await;
    let given = w.give(OWNER, "guest", node, &["nodes:read", "tasks:dispatch"]).await.unwrap();
    assert_eq!(may(GUEST).await, [Permission::NodesRead, Permission::TasksDispatch]);
    assert!(matches!(feed.next().await, Told::LookAgain), "the news before was not for them");
    let now = w.accounts.still(feed.who()).await.unwrap();
    feed.set_rights(now).unwrap();
    news().await;
    assert!(matches!(feed.next().await, Told::Event(..)));
    w.grants.remove(&w.caller(OWNER).await, given.id).await.unwrap();
    assert!(matches!(feed.next().await, Told::LookAgain));
    assert!(futures::FutureExt::now_or_never(others.next()).is_none(), "whom it does not concern hears nothing");
    assert_eq!(may(GUEST).await, []);
}

/// The first use of what was remembered of a caller comes after the grant has ended.
#[tokio::test]
async fn a_grant_that_ends_counts_no_longer_at_once() {
    let w = World::new().await;
    let node = w.machine(1, &[]).await;
    let key = ApiKey {
        id: sample::key_id(1),
        user: sample::user_id(GUEST),
        name: "k".into(),
        prefix: "cmk_".into(),
        mac: hub_engine::ports::Keyring::token_mac(&TestKeys, "cmk_x"),
        scopes: vec![Scope::Everything],
        created_at: 0,
        expires_at: None,
        last_used_at: Some(w.clock.now_ms()),
    };
    w.store.add_key(&key).await.unwrap();
    let may = async || {
        let who = w.accounts.authenticate("cmk_x", None).await.unwrap();
        allows(&who.caller, Permission::TasksDispatch, sample::user_id(OWNER), Thing::Node(node))
    };
    assert!(!may().await);
    let given = w.give(OWNER, "u5", node, &["tasks:dispatch"]).await.unwrap();
    assert!(may().await);
    w.grants.remove(&w.caller(OWNER).await, given.id).await.unwrap();
    assert!(!may().await);
    // At another hub's word, that is in the store alone, within 5 s; so for a role that was lowered.
    let given = w.give(OWNER, "u5", node, &["tasks:dispatch"]).await.unwrap();
    assert!(may().await);
    w.store.remove_grant(given.id).await.unwrap();
    w.clock.advance(Duration::from_secs(5));
    assert!(!may().await);
}

//! Who may call what: every role on every route, with what is its own, what was granted to it and what is
//! another's, through every door there is.
//!
//! The table is written by hand and is what the contract says, never what the code computes. A route
//! without a row fails the test.

use hub::config::{Config, Flags};
use hub::serve::Hub;
use hub_engine::ports::*;
use hub_engine::records::*;
use hub_testkit::contract::sample;
use mesh_core::permission::{Permission, Role, Scope};
use mesh_core::spec::Spec;
use mesh_core::*;
use mesh_process::{SystemClock, entropy};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::str::FromStr;

/// A route, a body (empty: none) and what it answers: for admin, developer, viewer and guest, each with a
/// thing of their own, a granted one and another's.
///
/// 2 is any success, 0 is 400, 1 is 401, 3 is 403, 4 is 404, 5 is 422, 9 is 409. In a body `$node`,
/// `$other` and `$session` are ids of a node and a session as the column says, and of another user.
type Row = (&'static str, &'static str, &'static str);

#[rustfmt::skip]
const TABLE: &[Row] = &[
    // Without credentials, and so the same for all.
    ("GET /", "", ALL),
    ("GET /healthz", "", ALL),
    ("GET /readyz", "", ALL),
    ("GET /openapi.json", "", ALL),
    ("GET /docs", "", ALL),
    ("GET /docs/{file}", "", NOBODY),
    ("GET /api/v1/downloads", "", ALL),
    ("GET /api/v1/downloads/{target}/cortex-node", "", NOBODY),
    ("POST /api/v1/auth/login", r#"{"username": "x", "password": "$long"}"#, "111 111 111 111"),
    ("POST /api/v1/auth/refresh", r#"{"refresh_token": "cmr_x"}"#, "111 111 111 111"),
    // Oneself.
    ("POST /api/v1/auth/logout", "", ALL),
    ("GET /api/v1/auth/me", "", ALL),
    ("POST /api/v1/auth/password", r#"{"current_password": "x", "new_password": "short"}"#, "555 555 555 555"),
    ("GET /api/v1/api-keys", "", ALL),
    ("POST /api/v1/api-keys", r#"{"name": "k", "scopes": ["tasks:read"]}"#, ALL),
    ("DELETE /api/v1/api-keys/{id}", "", "222 244 244 244"),
    ("POST /api/v1/auth/accept", r#"{"token": "cmi_x", "password": "$long"}"#, "111 111 111 111"),
    ("GET /api/v1/users", "", ADMIN),
    ("POST /api/v1/users", r#"{"username": "$new", "role": "guest"}"#, ADMIN),
    ("GET /api/v1/users/{id}", "", ADMIN),
    ("PATCH /api/v1/users/{id}", r#"{"username": "$new"}"#, "222 233 233 233"),
    ("DELETE /api/v1/users/{id}", "", "522 333 333 333"),
    ("GET /api/v1/devices", "", ALL),
    ("PATCH /api/v1/devices/{id}", r#"{"trusted": true}"#, "244 244 244 244"),
    ("DELETE /api/v1/devices/{id}", "", "244 244 244 244"),
    ("GET /api/v1/audit", "", ADMIN),
    ("GET /api/v1/audit/users/{id}", "", ADMIN),
    ("GET /api/v1/audit/sessions/{id}", "", ADMIN),
    ("GET /api/v1/audit/export", "", ADMIN),
    ("GET /api/v1/audit/verify", "", ADMIN),
    ("GET /api/v1/grants", "", ALL),
    ("POST /api/v1/grants", r#"{"subject": "$other", "resource": "$node", "permissions": ["tasks:dispatch"]}"#, "222 234 333 434"),
    ("DELETE /api/v1/grants/{id}", "", "222 234 334 334"),
    // Machines.
    ("GET /api/v1/nodes/invites", "", "222 222 333 333"),
    ("POST /api/v1/nodes/invites", "{}", "222 222 333 333"),
    ("DELETE /api/v1/nodes/invites/{id}", "", "222 244 444 444"),
    ("GET /api/v1/nodes", "", ALL),
    ("GET /api/v1/nodes/{id}", "", READ),
    ("GET /api/v1/nodes/{id}/status", "", READ),
    ("PATCH /api/v1/nodes/{id}", r#"{"name": "new"}"#, OWNER),
    ("POST /api/v1/nodes/{id}/drain", "", OWNER),
    ("POST /api/v1/nodes/{id}/resume", "", OWNER),
    ("POST /api/v1/nodes/{id}/revoke", "", OWNER),
    ("DELETE /api/v1/nodes/{id}", "", OWNER),
    ("GET /api/v1/skills", "", ALL),
    // Sessions and what they hold.
    ("GET /api/v1/sessions", "", ALL),
    ("POST /api/v1/sessions", r#"{"name": "s"}"#, "222 222 333 333"),
    ("GET /api/v1/sessions/{id}", "", READ),
    ("PATCH /api/v1/sessions/{id}", r#"{"name": "new"}"#, WRITE),
    ("DELETE /api/v1/sessions/{id}", "", WRITE),
    ("POST /api/v1/sessions/{id}/purge", "", WRITE),
    ("GET /api/v1/sessions/{id}/activity", "", READ),
    ("GET /api/v1/sessions/{id}/memory", "", READ),
    ("GET /api/v1/sessions/{id}/memory/{key}", "", READ),
    ("PUT /api/v1/sessions/{id}/memory/{key}", r#"{"value": 1}"#, WRITE),
    ("DELETE /api/v1/sessions/{id}/memory/{key}", "", WRITE),
    ("GET /api/v1/sessions/{id}/messages", "", READ),
    ("POST /api/v1/sessions/{id}/messages", r#"{"role": "user", "content": "x"}"#, WRITE),
    ("PUT /api/v1/sessions/{id}/nodes/{node_id}", "", WRITE),
    ("DELETE /api/v1/sessions/{id}/nodes/{node_id}", "", WRITE),
    ("POST /api/v1/sessions/{id}/dispatch", r#"{"echo": {"payload": "x"}}"#, DISPATCH),
    // Tasks.
    ("POST /api/v1/dispatch", r#"{"node": "$node", "echo": {"payload": "x"}}"#, DISPATCH),
    ("GET /api/v1/tasks", "", ALL),
    ("GET /api/v1/tasks/{id}", "", READ),
    ("GET /api/v1/tasks/{id}/events", "", READ),
    ("GET /api/v1/tasks/{id}/output", "", READ),
    ("POST /api/v1/tasks/{id}/cancel", "", "222 224 333 424"),
    ("POST /api/v1/tasks/{id}/input", r#"{"seq": 1, "data_base64": "eA=="}"#, "999 994 333 494"),
    // Agents.
    ("GET /api/v1/state", "", ALL),
    ("GET /api/v1/state/{agent_id}/{key}", "", READ),
    ("PUT /api/v1/state/{agent_id}/{key}", r#"{"value": 1}"#, "222 224 333 333"),
    ("DELETE /api/v1/state/{agent_id}/{key}", "", WRITE),
    // The hub.
    ("GET /api/v1/events", "", ALL),
    ("GET /api/v1/ws", "", "000 000 000 000"),
    ("GET /api/v1/system/info", "", ALL),
    ("GET /api/v1/system/stats", "", "222 333 222 333"),
    ("GET /api/v1/system/restored", "", "444 333 333 333"),
    ("GET /api/v1/system/ca", "", ADMIN),
    ("POST /api/v1/system/ca/rotate", r#"{"step": "abort"}"#, "999 333 333 333"),
];
const ALL: &str = "222 222 222 222";
const ADMIN: &str = "222 333 333 333";
const NOBODY: &str = "444 444 444 444";
const READ: &str = "222 224 222 424";
const WRITE: &str = "222 224 333 434";
const OWNER: &str = "222 234 333 434";
const DISPATCH: &str = "222 224 333 323";

/// Where an API key with every scope answers otherwise than its owner in person, in the same form.
const BY_KEY: &[(&str, &str)] = &[
    ("POST /api/v1/auth/password", "333 333 333 333"),
    ("POST /api/v1/api-keys", "333 333 333 333"),
    ("DELETE /api/v1/api-keys/{id}", "333 344 344 344"),
    ("PATCH /api/v1/users/{id}", ADMIN),
    ("GET /api/v1/devices", "333 333 333 333"),
    ("PATCH /api/v1/devices/{id}", "333 333 333 333"),
    ("DELETE /api/v1/devices/{id}", "333 333 333 333"),
];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Relation {
    Own,
    Granted,
    Others,
}
const RELATIONS: [Relation; 3] = [Relation::Own, Relation::Granted, Relation::Others];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Door {
    Token,
    Key,
    /// The hub's own uid, as the first admin.
    Socket,
}

struct World {
    hub: Hub,
    /// Somebody of each role for each column, so that what is granted in one is not in another.
    people: BTreeMap<(Role, usize), UserId>,
    admin: UserId,
    /// Owns what is another's.
    other: UserId,
    /// Has nothing to do with any of it.
    third: UserId,
    web: reqwest::Client,
    socket: reqwest::Client,
    _dir: tempfile::TempDir,
}

fn now() -> i64 {
    mesh_process::Clock::now_ms(&SystemClock::new())
}
macro_rules! fresh {
    ($id:ident) => {
        $id::from_parts(now(), entropy::bytes())
    };
}

impl World {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("hub.toml");
        std::fs::write(&file, "[http]\naddr = \"127.0.0.1:0\"\n[node]\naddr = \"127.0.0.1:0\"\n[metrics]\naddr = \"127.0.0.1:0\"\n[limits]\napi_per_second = 0\n")
            .unwrap();
        let flags = Flags { config: Some(file), data_dir: Some(dir.path().join("hub")), ..Flags::default() };
        let hub = Hub::start(Config::load(&flags).unwrap(), SystemClock::shared()).await.unwrap();
        let admin = hub.store.user_named("admin").await.unwrap().unwrap().id;
        let plain = || reqwest::Client::builder().no_proxy();
        let socket = plain().unix_socket(hub.socket.clone()).build().unwrap();
        let people = BTreeMap::new();
        let (other, third) = (fresh!(UserId), fresh!(UserId));
        let mut world = Self { hub, people, admin, other, third, web: plain().build().unwrap(), socket, _dir: dir };
        world.add(other, "other", Role::Developer).await;
        world.add(third, "third", Role::Developer).await;
        for role in Role::ALL {
            for (column, relation) in RELATIONS.iter().enumerate() {
                let user = fresh!(UserId);
                world.add(user, &format!("{}-{relation:?}", role.as_str()), role).await;
                world.people.insert((role, column), user);
            }
        }
        world
    }
    async fn add(&self, user: UserId, name: &str, role: Role) {
        let record = User { id: user, username: name.into(), role, ..sample::user(1, name) };
        assert!(self.hub.store.add_user(&record).await.unwrap());
    }
    /// With every scope that a key can have; its id and its secret.
    async fn key(&self, user: UserId) -> (ApiKeyId, String) {
        let id = fresh!(ApiKeyId);
        let secret = format!("cmk_{id}");
        let scopes = ["*", "system:*", "system:audit"].map(|s| Scope::parse(s).unwrap()).to_vec();
        let mac = Keyring::token_mac(&*self.hub.keys, &secret);
        let (name, prefix) = ("all".to_owned(), "cmk_".to_owned());
        let key = ApiKey { id, user, name, prefix, mac, scopes, created_at: now(), expires_at: None, last_used_at: Some(now()) };
        self.hub.store.add_key(&key).await.unwrap();
        (id, secret)
    }
    /// An access token of a log-in of its own.
    async fn token(&self, user: UserId) -> String {
        let (login, expires_at) = self.log_in(user).await;
        Keyring::issue_access(&*self.hub.keys, user, login, now(), expires_at)
    }
    async fn log_in(&self, user: UserId) -> (LoginId, i64) {
        let (login, expires_at) = (fresh!(LoginId), now() + 3_600_000);
        let device = Device { id: login.into(), user, ..sample::device(1, 1) };
        self.hub.store.add_login(&device, &RefreshToken { mac: entropy::bytes(), login, user, expires_at }).await.unwrap();
        (login, expires_at)
    }

    async fn invite(&self, owner: UserId) -> InviteId {
        let invite = Invite { id: fresh!(InviteId), owner, created_at: now(), expires_at: now() + 3_600_000, ..sample::invite(1) };
        self.hub.store.add_invite(&invite).await.unwrap();
        invite.id
    }
    async fn node(&self, owner: UserId) -> NodeId {
        let invite = self.invite(owner).await;
        let id = fresh!(NodeId);
        let certificate = NodeCertificate { spki: entropy::bytes(), ..sample::node(1, 1).certificate };
        let node = Node { id, owner, name: id.to_string(), certificate, notices: vec![], ..sample::node(1, 1) };
        assert_eq!(self.hub.store.claim_invite(invite, &node, now(), 1).await.unwrap(), Claim::Claimed);
        id
    }
    async fn session(&self, owner: UserId) -> SessionId {
        let (created_at, ttl_ms) = (now(), 3_600_000);
        let id = fresh!(SessionId);
        let session = Session { id, owner, created_at, expires_at: created_at + ttl_ms, ttl_ms, ..sample::session(1, 1) };
        self.hub.store.add_session(&session).await.unwrap();
        id
    }
    async fn task(&self, user: UserId, session: SessionId) -> TaskId {
        let spec = Spec::Echo { payload: b"x".to_vec() }.encode();
        let mut task = Task { id: fresh!(TaskId), session: Some(session), skill: "echo".into(), created_at: now(), ..sample::task(1) };
        (task.digest, task.spec, task.actor.user) = (sha256(&spec), spec, user);
        self.hub.store.accept(&task).await.unwrap();
        task.id
    }
    async fn agent(&self, owner: UserId) -> String {
        let id = fresh!(EntryId);
        let entry = StateEntry { id, agent: id.to_string(), key: "k".into(), owner, value: "1".into(), updated_at: now() };
        assert_eq!(self.hub.store.put_state(&entry, 9).await.unwrap(), StateWritten::Done);
        entry.agent
    }
    async fn grant(&self, by: UserId, to: UserId, resource: Resource) -> GrantId {
        let permissions = Permission::ALL.iter().copied().filter(|p| p.is_grantable()).collect();
        let (id, subject) = (fresh!(GrantId), Subject::User(to));
        let grant = Grant { id, subject, resource, permissions, created_by: by, created_at: now(), expires_at: None };
        self.hub.store.add_grant(&grant).await.unwrap();
        id
    }
}

/// A route as a row names it.
struct Route<'r> {
    method: &'r str,
    path: &'r str,
}

impl<'r> Route<'r> {
    fn of(row: &'r str) -> Self {
        let (method, path) = row.split_once(' ').expect("a method and a path");
        Self { method, path }
    }
    fn is_below(&self, first: &str) -> bool {
        self.path.strip_prefix("/api/v1").is_some_and(|p| p.starts_with(first))
    }
}

/// One cell: makes the thing that the route is about, and asks. Gives the status.
async fn ask(world: &World, (row, body, _): &Row, role: Role, column: usize, door: Door) -> u16 {
    let route = Route::of(row);
    let relation = RELATIONS[column];
    let me = if door == Door::Socket { world.admin } else { world.people[&(role, column)] };
    let owner = if relation == Relation::Own { me } else { world.other };
    let share = async |resource: Resource| {
        if relation == Relation::Granted {
            world.grant(world.other, me, resource).await;
        }
    };
    let store = &world.hub.store;
    let mut path = route.path.replace("{key}", "k").replace("{file}", "none").replace("{target}", "none");
    let (mut node, mut session) = (None, None);
    if route.is_below("/nodes/{id}") || path.contains("{node_id}") || body.contains("$node") {
        let id = world.node(owner).await;
        share(Resource::Node(id)).await;
        node = Some(id);
    }
    if route.is_below("/sessions/{id}") || route.is_below("/tasks/{id}") {
        let id = world.session(owner).await;
        share(Resource::Session(id)).await;
        session = Some(id);
        if path.contains("/memory/k") {
            let entry = MemoryEntry { id: fresh!(EntryId), session: id, key: "k".into(), value: "1".into(), updated_at: now() };
            assert_eq!(store.put_memory(&entry, None, 9).await.unwrap(), Written::Done);
        }
        if let (Some(node), "DELETE") = (node, route.method) {
            store.attach(id, node, None, now()).await.unwrap();
        }
        if path.ends_with("/purge") {
            assert!(store.close_session(id, None, now()).await.unwrap());
        }
    }
    let id = match () {
        () if route.is_below("/tasks/{id}") => world.task(owner, session.expect("it has one")).await.to_string(),
        () if route.is_below("/nodes/invites/{id}") => world.invite(owner).await.to_string(),
        () if route.is_below("/nodes/{id}") => node.expect("there is one").to_string(),
        () if route.is_below("/sessions/{id}") => session.expect("there is one").to_string(),
        () if route.is_below("/api-keys/{id}") => world.key(owner).await.0.to_string(),
        () if route.is_below("/users/{id}") && relation == Relation::Own => me.to_string(),
        () if route.is_below("/users/{id}") => {
            let id = fresh!(UserId);
            world.add(id, &id.to_string(), Role::Guest).await;
            id.to_string()
        }
        () if route.is_below("/devices/{id}") => DeviceId::from(world.log_in(owner).await.0).to_string(),
        () if route.is_below("/audit/users/{id}") => owner.to_string(),
        () if route.is_below("/audit/sessions/{id}") => fresh!(SessionId).to_string(),
        () if route.is_below("/grants/{id}") => {
            // One's own is what one made oneself, a granted one what was made to one.
            let of = Resource::Node(world.node(owner).await);
            let to = if relation == Relation::Granted { me } else { fresh!(UserId) };
            world.grant(owner, to, of).await.to_string()
        }
        () => String::new(),
    };
    path = path.replace("{id}", &id);
    if path.contains("{agent_id}") {
        let agent = world.agent(owner).await;
        share(Resource::Agent(agent.clone())).await;
        path = path.replace("{agent_id}", &agent);
    }
    let node = node.map(|id| id.to_string()).unwrap_or_default();
    path = path.replace("{node_id}", &node);
    assert!(!path.contains(['{', '$']), "the test does not know what stands for {path}; teach it in `ask`");
    let (client, host) = match door {
        Door::Socket => (&world.socket, "http://hub".to_owned()),
        _ => (&world.web, format!("http://{}", world.hub.http)),
    };
    let mut request = client.request(route.method.parse().unwrap(), format!("{host}{path}")).header("accept", "application/json");
    request = match door {
        Door::Token => request.bearer_auth(world.token(me).await),
        // A key of its own: what is granted behind the hub's back counts for a remembered one only after a second.
        Door::Key => request.bearer_auth(world.key(me).await.1),
        Door::Socket => request,
    };
    if !body.is_empty() {
        let body = body
            .replace("$node", &node)
            .replace("$other", &world.third.to_string())
            .replace("$long", &"x".repeat(2000))
            .replace("$new", &fresh!(UserId).to_string());
        request = request.json(&Value::from_str(&body).expect("a body is JSON"));
    }
    loop {
        let status = request.try_clone().expect("its body is in memory").send().await.expect("the hub answers").status().as_u16();
        // So much at once is busy now and then: it is asked again.
        if status != 503 {
            return status;
        }
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
}

fn is(expected: char, status: u16) -> bool {
    match expected {
        '2' => (200..300).contains(&status),
        '0' => status == 400,
        '1' => status == 401,
        '3' => status == 403,
        '4' => status == 404,
        '5' => status == 422,
        '9' => status == 409,
        other => panic!("{other:?} is no answer; see the head of the table"),
    }
}

fn cells(expected: &str) -> Vec<Vec<char>> {
    let cells: Vec<Vec<char>> = expected.split(' ').map(|of| of.chars().collect()).collect();
    assert!(cells.len() == Role::ALL.len() && cells.iter().all(|of| of.len() == RELATIONS.len()), "{expected:?} is not four times three");
    cells
}

/// The routes that the hub says it has.
async fn routes(world: &World) -> BTreeSet<String> {
    let url = format!("http://{}/openapi.json", world.hub.http);
    let doc: Value = world.web.get(url).send().await.unwrap().json().await.unwrap();
    let methods = |(path, item): (&String, &Value)| {
        let methods: Vec<_> = item.as_object().unwrap().keys().map(|m| format!("{} {path}", m.to_uppercase())).collect();
        methods
    };
    doc["paths"].as_object().unwrap().iter().flat_map(methods).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_role_on_every_route_through_every_door() {
    use futures::StreamExt;
    let world = World::new().await;
    let rows: BTreeSet<String> = TABLE.iter().map(|(row, ..)| (*row).to_owned()).collect();
    assert_eq!(rows.len(), TABLE.len(), "a route has one row");
    let routes = routes(&world).await;
    let missing: Vec<_> = routes.difference(&rows).collect();
    assert!(
        missing.is_empty(),
        "routes that nobody has said who may call: {missing:#?}. Add a row for each to TABLE in tests/e2e/matrix.rs: the route, \
         a body that would do, and by what the contract says (not by what the hub answers) one digit for each of admin, developer, \
         viewer and guest with a thing of their own, a granted one and another's, such as READ"
    );
    let gone: Vec<_> = rows.difference(&routes).collect();
    assert!(gone.is_empty(), "rows without a route: {gone:#?}");

    let mut asked = vec![];
    for row in TABLE {
        for (r, role) in Role::ALL.into_iter().enumerate() {
            for column in 0..RELATIONS.len() {
                for door in [Door::Token, Door::Key, Door::Socket] {
                    if door == Door::Socket && role != Role::Admin {
                        continue;
                    }
                    let by_key = BY_KEY.iter().find(|(of, _)| *of == row.0 && door == Door::Key).map(|(_, expected)| *expected);
                    asked.push((row, role, column, door, cells(by_key.unwrap_or(row.2))[r][column]));
                }
            }
        }
    }
    let shared = &world;
    let wrong: Vec<String> = futures::stream::iter(asked)
        .map(|(row, role, column, door, expected)| async move {
            let status = ask(shared, row, role, column, door).await;
            let at = || format!("{} as {} on {:?} by {door:?}: {status}, and not {expected}", row.0, role.as_str(), RELATIONS[column]);
            (!is(expected, status)).then(at)
        })
        .buffer_unordered(32)
        .filter_map(async |wrong| wrong)
        .collect()
        .await;
    assert!(wrong.is_empty(), "{} cells are wrong:\n{}", wrong.len(), wrong.join("\n"));
    world.hub.stop().await;
}

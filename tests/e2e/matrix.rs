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
use mesh_core::agent::{Kind, Life};
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
    ("POST /", r#"{"jsonrpc": "2.0", "method": "system.health", "id": 1}"#, ALL),
    ("POST /rpc", r#"{"jsonrpc": "2.0", "method": "system.health", "id": 1}"#, ALL),
    ("GET /rpc/ws", "", "000 000 000 000"),
    ("GET /healthz", "", ALL),
    ("GET /readyz", "", ALL),
    ("GET /openapi.json", "", ALL),
    ("GET /docs", "", ALL),
    ("GET /llms.txt", "", ALL),
    ("GET /docs/skill.md", "", ALL),
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
    ("GET /api/v1/agents", "", ALL),
    ("POST /api/v1/agents", r#"{"name": "$new", "agent_type": "basic"}"#, "222 222 333 333"),
    ("GET /api/v1/agents/{id}", "", READ),
    ("POST /api/v1/agents/{id}/kill", "", WRITE),
    ("GET /api/v1/agents/{id}/logs", "", READ),
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
/// Of another's task on a machine that is one's own, on which one was granted all there is, or which is another's.
const ON_NODE: &[Row] = &[
    ("GET /api/v1/tasks/{id}", "", READ),
    ("GET /api/v1/tasks/{id}/events", "", READ),
    ("GET /api/v1/tasks/{id}/output", "", READ),
    ("POST /api/v1/tasks/{id}/cancel", "", "222 234 333 434"),
    ("POST /api/v1/tasks/{id}/input", r#"{"seq": 1, "data_base64": "eA=="}"#, "999 334 333 434"),
];
const ALL: &str = "222 222 222 222";
const ADMIN: &str = "222 333 333 333";
const NOBODY: &str = "444 444 444 444";
const READ: &str = "222 224 222 424";
const WRITE: &str = "222 224 333 434";
const OWNER: &str = "222 234 333 434";
const DISPATCH: &str = "222 224 333 323";

/// Methods of JSON-RPC, each with the route that it answers as: by whoever asks, and whatever it is about.
#[rustfmt::skip]
const METHODS: &[(&str, &str)] = &[
    ("system.health", "POST /rpc"),
    ("rpc.discover", "GET /api/v1/system/info"),
    ("node.list", "GET /api/v1/nodes"),
    ("node.get", "GET /api/v1/nodes/{id}"),
    ("node.invite", "POST /api/v1/nodes/invites"),
    ("node.revoke", "POST /api/v1/nodes/{id}/revoke"),
    ("session.create", "POST /api/v1/sessions"),
    ("session.get", "GET /api/v1/sessions/{id}"),
    ("session.list", "GET /api/v1/sessions"),
    ("session.close", "DELETE /api/v1/sessions/{id}"),
    ("session.attach", "PUT /api/v1/sessions/{id}/nodes/{node_id}"),
    ("session.detach", "DELETE /api/v1/sessions/{id}/nodes/{node_id}"),
    ("task.dispatch", "POST /api/v1/dispatch"),
    ("task.dispatch", "POST /api/v1/sessions/{id}/dispatch"),
    ("task.get", "GET /api/v1/tasks/{id}"),
    ("task.list", "GET /api/v1/tasks"),
    ("task.cancel", "POST /api/v1/tasks/{id}/cancel"),
    ("task.output", "GET /api/v1/tasks/{id}/output"),
    ("state.query", "GET /api/v1/state"),
    ("agent.spawn", "POST /api/v1/agents"),
    ("agent.list", "GET /api/v1/agents"),
    ("agent.kill", "POST /api/v1/agents/{id}/kill"),
    ("agent.logs", "GET /api/v1/agents/{id}/logs"),
    ("system.metrics", "GET /api/v1/system/stats"),
];
/// Those that only a WebSocket has.
const ON_SOCKETS: &[&str] = &["event.subscribe", "event.unsubscribe"];

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
    async fn task(&self, user: UserId, session: Option<SessionId>, named_node: Option<NodeId>) -> TaskId {
        let spec = Spec::Echo { payload: b"x".to_vec() }.encode();
        let mut task = Task { id: fresh!(TaskId), session, named_node, skill: "echo".into(), created_at: now(), ..sample::task(1) };
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
    /// One that runs.
    async fn living(&self, owner: UserId) -> (AgentId, String) {
        let id = fresh!(AgentId);
        let agent = Agent { id, owner, name: id.to_string(), kind: Kind::Basic, life: Life::basic(now()), ..sample::agent(1) };
        assert_eq!(self.hub.store.add_agent(&agent).await.unwrap(), Spawned::Done);
        (id, agent.name)
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

/// The status that a JSON-RPC answer stands for.
fn status_of(answer: &Value) -> u16 {
    match answer["error"]["code"].as_i64() {
        None => 200,
        Some(-32602) => 422,
        Some(-32001) => 401,
        Some(-32002) => 403,
        Some(-32003) => 404,
        Some(-32004) => 409,
        Some(-32008) => 503,
        Some(_) => 500,
    }
}

/// One cell: makes the thing that the route is about, and asks, by a method of JSON-RPC if one is named. Gives
/// the status.
async fn ask(
    world: &World,
    (row, body, _): &Row,
    (on_node, method): (bool, Option<&str>),
    (role, column): (Role, usize),
    door: Door,
) -> u16 {
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
    if route.is_below("/nodes/{id}") || path.contains("{node_id}") || body.contains("$node") || on_node {
        let id = world.node(owner).await;
        share(Resource::Node(id)).await;
        node = Some(id);
    }
    if route.is_below("/sessions/{id}") || (route.is_below("/tasks/{id}") && !on_node) {
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
        () if route.is_below("/agents/{id}") => {
            let (id, name) = world.living(owner).await;
            share(Resource::Agent(name)).await;
            id.to_string()
        }
        () if on_node => world.task(world.other, None, node).await.to_string(),
        () if route.is_below("/tasks/{id}") => world.task(owner, session, None).await.to_string(),
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
    let mut params = serde_json::Map::new();
    if path.contains("{id}") {
        let noun = path.split('/').nth(3).expect("a noun").trim_end_matches('s');
        params.insert(format!("{noun}_id"), id.clone().into());
    }
    path = path.replace("{id}", &id);
    if path.contains("{agent_id}") {
        let agent = world.agent(owner).await;
        share(Resource::Agent(agent.clone())).await;
        path = path.replace("{agent_id}", &agent);
    }
    let node = node.map(|id| id.to_string()).unwrap_or_default();
    if path.contains("{node_id}") {
        params.insert("node_id".into(), node.clone().into());
    }
    path = path.replace("{node_id}", &node);
    assert!(!path.contains(['{', '$']), "the test does not know what stands for {path}; teach it in `ask`");
    let (client, host) = match door {
        Door::Socket => (&world.socket, "http://hub".to_owned()),
        _ => (&world.web, format!("http://{}", world.hub.http)),
    };
    let mut request = match method {
        None => client.request(route.method.parse().unwrap(), format!("{host}{path}")).header("accept", "application/json"),
        Some(_) => client.post(format!("{host}/rpc")),
    };
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
        let body = Value::from_str(&body).expect("a body is JSON");
        match (method, body) {
            (None, body) => request = request.json(&body),
            (Some("system.health"), _) => {}
            (Some(_), Value::Object(fields)) => params.extend(fields),
            (Some(_), body) => panic!("{body} has no names"),
        }
    }
    if let Some(method) = method {
        request = request.json(&serde_json::json!({"jsonrpc": "2.0", "method": method, "params": params, "id": 1}));
    }
    loop {
        let answer = request.try_clone().expect("its body is in memory").send().await.expect("the hub answers");
        let mut status = answer.status().as_u16();
        if method.is_some() && status == 200 {
            status = status_of(&answer.json().await.expect("an answer"));
        }
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

    let info: Value = world.web.get(format!("http://{}/", world.hub.http)).send().await.unwrap().json().await.unwrap();
    let methods: BTreeSet<&str> = info["methods"].as_array().unwrap().iter().map(|m| m.as_str().unwrap()).collect();
    let named: BTreeSet<&str> = METHODS.iter().map(|(method, _)| *method).chain(ON_SOCKETS.iter().copied()).collect();
    assert_eq!(methods, named, "each method has a row in METHODS of tests/e2e/matrix.rs: the route that it answers as");

    let calls = METHODS.iter().map(|(method, route)| {
        let row = TABLE.iter().find(|(r, ..)| r == route).unwrap_or_else(|| panic!("{method}: no route {route}"));
        (row, (false, Some(*method)))
    });
    let mut asked = vec![];
    let on_nodes = ON_NODE.iter().map(|row| (row, (true, None)));
    for (row, how) in TABLE.iter().map(|row| (row, (false, None))).chain(on_nodes).chain(calls) {
        for (r, role) in Role::ALL.into_iter().enumerate() {
            for column in 0..RELATIONS.len() {
                for door in [Door::Token, Door::Key, Door::Socket] {
                    if door == Door::Socket && role != Role::Admin {
                        continue;
                    }
                    let by_key = BY_KEY.iter().find(|(of, _)| *of == row.0 && door == Door::Key).map(|(_, expected)| *expected);
                    asked.push((row, how, (role, column), door, cells(by_key.unwrap_or(row.2))[r][column]));
                }
            }
        }
    }
    let shared = &world;
    let wrong: Vec<String> = futures::stream::iter(asked)
        .map(|(row, how, (role, column), door, expected)| async move {
            let status = ask(shared, row, how, (role, column), door).await;
            let place = if how.0 { " (another's, on a node)" } else { "" };
            let at = || {
                let (what, role) = (how.1.unwrap_or(row.0), role.as_str());
                format!("{what}{place} as {role} on {:?} by {door:?}: {status}, and not {expected}", RELATIONS[column])
            };
            (!is(expected, status)).then(at)
        })
        .buffer_unordered(32)
        .filter_map(async |wrong| wrong)
        .collect()
        .await;
    assert!(wrong.is_empty(), "{} cells are wrong:\n{}", wrong.len(), wrong.join("\n"));
    world.hub.stop().await;
}

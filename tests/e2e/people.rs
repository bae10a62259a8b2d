//! How people come, change and leave, through the doors of a real hub.
#![expect(clippy::disallowed_methods, reason = "tests start the real binaries")]

use mesh_tests::{Hub, Node, PASSWORD, checked, program, shown, text, until};
use serde_json::{Value, json};
use std::process::{Command, Output, Stdio};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const NEW: &str = "a password of their own";

/// A caller with a token of their own, or without one.
struct As<'h> {
    hub: &'h Hub,
    token: String,
}

impl As<'_> {
    async fn call(&self, method: &str, path: &str, body: Option<Value>) -> (u16, Value) {
        let web = reqwest::Client::builder().no_proxy().build().unwrap();
        let mut r = web.request(method.parse().unwrap(), format!("{}{path}", self.hub.http));
        if !self.token.is_empty() {
            r = r.bearer_auth(&self.token);
        }
        if let Some(body) = body {
            r = r.json(&body);
        }
        let (status, bytes) = checked(method, path, r.send().await.expect("the hub answers")).await;
        (status, serde_json::from_slice(&bytes).unwrap_or(Value::Null))
    }
}

fn nobody(hub: &Hub) -> As<'_> {
    As { hub, token: String::new() }
}

async fn login<'h>(hub: &'h Hub, username: &str, password: &str) -> As<'h> {
    let (status, reply) = nobody(hub).call("POST", "/api/v1/auth/login", Some(json!({"username": username, "password": password}))).await;
    assert_eq!(status, 200, "{reply}");
    As { hub, token: text(&reply, "access_token") }
}

async fn add(hub: &Hub, body: Value) -> Value {
    let (status, user) = hub.call("POST", "/api/v1/users", Some(body)).await;
    assert_eq!(status, 201, "{user}");
    user
}

async fn user<'h>(hub: &'h Hub, name: &str, role: &str) -> (String, As<'h>) {
    let made = add(hub, json!({"username": name, "role": role, "password": NEW})).await;
    (text(&made, "id"), login(hub, name, NEW).await)
}

async fn refused(hub: &Hub, method: &str, path: &str, body: Value) -> (u16, String) {
    let (status, problem) = hub.call(method, path, (!body.is_null()).then_some(body)).await;
    (status, text(&problem, "code"))
}

fn token(user: &Value) -> String {
    let url = text(user, "invite_url");
    let (page, token) = url.split_once('#').expect("the token is in the fragment");
    assert!(page.ends_with("/accept") && token.len() > 40, "{url}");
    token.to_owned()
}

async fn accept(hub: &Hub, token: &str, password: &str) -> (u16, Value) {
    nobody(hub).call("POST", "/api/v1/auth/accept", Some(json!({"token": token, "password": password}))).await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_invited_person_chooses_a_password_once() {
    let hub = Hub::start().await;
    let made = add(&hub, json!({"username": "Ada", "role": "developer"})).await;
    let (id, link) = (text(&made, "id"), token(&made));
    assert_eq!((made["status"].as_str(), made["role"].as_str()), (Some("invited"), Some("developer")));
    let shown = hub.get(&format!("/api/v1/users/{id}")).await;
    assert_eq!((shown.get("invite_url"), shown["invite_expires_at"].is_string()), (None, true), "told once");
    for name in ["hub.db", "hub.db-wal"] {
        let kept = std::fs::read(hub.data().join(name)).unwrap_or_default();
        assert!(!kept.windows(link.len()).any(|w| w == link.as_bytes()), "the token is not kept in {name}");
    }
    let (status, _) = nobody(&hub).call("POST", "/api/v1/auth/login", Some(json!({"username": "ada", "password": ""}))).await;
    assert_eq!(status, 401, "no password is no password");

    // One answer to all that is wrong with a link.
    let mut altered = link.clone().into_bytes();
    let last = altered.len() - 1;
    altered[last] = if altered[last] == b'a' { b'b' } else { b'a' };
    let altered = String::from_utf8(altered).unwrap();
    let mut answers = vec![];
    for wrong in ["", "x", "cmi_", altered.as_str(), &link[1..], "\u{0}ü"] {
        let (status, problem) = accept(&hub, wrong, NEW).await;
        answers.push((status, text(&problem, "detail"), text(&problem, "code")));
    }
    for bad in ["12345678901".to_owned(), "x".repeat(257)] {
        let (status, problem) = accept(&hub, &link, &bad).await;
        assert_eq!((status, problem["code"].as_str()), (422, Some("bad_password")));
        assert_eq!(accept(&hub, "x", &bad).await.0, 401, "who has no link is told nothing of passwords");
    }
    let (status, reply) = accept(&hub, &link, NEW).await;
    assert_eq!(status, 200, "{reply}");
    let ada = As { hub: &hub, token: text(&reply, "access_token") };
    let (_, me) = ada.call("GET", "/api/v1/auth/me", None).await;
    assert_eq!((me["user"]["username"].as_str(), me["role"].as_str()), (Some("Ada"), Some("developer")));
    login(&hub, "ADA", NEW).await;
    let (status, problem) = accept(&hub, &link, "another password").await;
    answers.push((status, text(&problem, "detail"), text(&problem, "code")));
    assert!(answers.iter().all(|a| *a == answers[0] && a.0 == 401), "{answers:?}");
    login(&hub, "ada", NEW).await;

    // A new link ends the one before; of two at once one wins.
    let eve = add(&hub, json!({"username": "eve", "role": "guest"})).await;
    let path = format!("/api/v1/users/{}", text(&eve, "id"));
    let (_, again) = hub.call("PATCH", &path, Some(json!({"invite": true}))).await;
    assert_eq!(accept(&hub, &token(&eve), NEW).await.0, 401);
    let link = token(&again);
    let (one, two) = tokio::join!(accept(&hub, &link, NEW), accept(&hub, &link, "the other password"));
    let mut both = [one.0, two.0];
    both.sort_unstable();
    assert_eq!(both, [200, 401]);
    login(&hub, "eve", if one.0 == 200 { NEW } else { "the other password" }).await;
    assert_eq!(refused(&hub, "PATCH", &path, json!({"invite": true})).await, (409, "has_password".into()));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_is_refused() {
    let hub = Hub::start().await;
    let (ada, as_ada) = user(&hub, "ada", "developer").await;
    let all = "/api/v1/users";
    for (body, status, code) in [
        (json!({"username": "ADA", "role": "guest"}), 409, "name_taken"),
        (json!({"username": "", "role": "guest"}), 422, "bad_name"),
        (json!({"username": "a\u{202e}b", "role": "guest"}), 422, "bad_name"),
        (json!({"username": " a", "role": "guest"}), 422, "bad_name"),
        (json!({"username": "x".repeat(64), "role": "guest"}), 422, "bad_name"),
        (json!({"username": "bob", "role": "king"}), 422, "bad_role"),
        (json!({"username": "bob", "role": "guest", "password": "12345678901"}), 422, "bad_password"),
        (json!({"username": "bob", "role": "guest", "password": "x".repeat(257)}), 422, "bad_password"),
        (json!({"username": "bob", "role": "guest", "admin": true}), 400, "bad_field"),
        (json!({"username": "bob"}), 400, "bad_field"),
    ] {
        assert_eq!(refused(&hub, "POST", all, body.clone()).await, (status, code.to_owned()), "{body}");
    }
    let path = format!("{all}/{ada}");
    for (body, status, code) in [
        (json!({}), 422, "nothing_to_change"),
        (json!({"invite": false}), 422, "nothing_to_change"),
        (json!({"username": "ADMIN"}), 409, "name_taken"),
        (json!({"username": "a\nb"}), 422, "bad_name"),
        (json!({"role": ""}), 422, "bad_role"),
        (json!({"password": "short"}), 422, "bad_password"),
        (json!({"password": NEW, "invite": true}), 422, "bad_field"),
    ] {
        assert_eq!(refused(&hub, "PATCH", &path, body.clone()).await, (status, code.to_owned()), "{body}");
    }
    let unknown = format!("{all}/user_01900000-0000-7000-8000-000000000000");
    for (method, body) in [("GET", Value::Null), ("PATCH", json!({"role": "guest"})), ("DELETE", Value::Null)] {
        assert_eq!(refused(&hub, method, &unknown, body).await.0, 404, "{method}");
    }

    // The last admin, who is also who asks.
    let (_, me) = hub.call("GET", "/api/v1/auth/me", None).await;
    let own = format!("{all}/{}", text(&me["user"], "id"));
    assert_eq!(refused(&hub, "PATCH", &own, json!({"role": "developer"})).await, (409, "last_admin".into()));
    assert_eq!(refused(&hub, "PATCH", &own, json!({"disabled": true})).await, (409, "last_admin".into()));
    assert_eq!(refused(&hub, "DELETE", &own, Value::Null).await, (422, "bad_successor".into()), "to whom?");
    assert_eq!(refused(&hub, "DELETE", &format!("{own}?transfer_to={ada}"), Value::Null).await, (409, "last_admin".into()));
    assert_eq!(refused(&hub, "PATCH", &own, json!({"password": NEW})).await.0, 403, "the own one needs the old one");

    // Who may not administer: only their own name is theirs.
    let denied = [
        ("GET", all.to_owned(), None),
        ("GET", path.clone(), None),
        ("POST", all.to_owned(), Some(json!({"username": "bob", "role": "admin"}))),
        ("PATCH", path.clone(), Some(json!({"role": "admin"}))),
        ("PATCH", path.clone(), Some(json!({"username": "x", "role": "admin"}))),
        ("PATCH", own.clone(), Some(json!({"username": "x"}))),
        ("PATCH", unknown.clone(), Some(json!({"username": "x"}))),
        ("DELETE", path.clone(), None),
    ];
    for (method, path, body) in denied {
        let (status, problem) = as_ada.call(method, &path, body).await;
        assert_eq!((status, problem["code"].as_str()), (403, Some("forbidden")), "{method} {path}");
    }
    let (_, key) = as_ada.call("POST", "/api/v1/api-keys", Some(json!({"name": "ci", "scopes": ["*"]}))).await;
    let key = As { hub: &hub, token: text(&key, "secret") };
    assert_eq!(key.call("PATCH", &path, Some(json!({"username": "keyed"}))).await.0, 403, "a key is not the person");
    let (status, renamed) = as_ada.call("PATCH", &path, Some(json!({"username": "Ada Lovelace"}))).await;
    assert_eq!((status, renamed["username"].as_str()), (200, Some("Ada Lovelace")));
    login(&hub, "ada lovelace", NEW).await;

    // The same key is the same person, and a password is not kept as a digest that can be guessed at.
    let keyed = async |body: Value| {
        let r = hub.request("POST", all).header("Idempotency-Key", "once").json(&body).send().await.unwrap();
        let (status, bytes) = checked("POST", all, r).await;
        (status, serde_json::from_slice::<Value>(&bytes).unwrap())
    };
    let bob = json!({"username": "bob", "role": "guest", "password": NEW});
    let (first, second) = (keyed(bob.clone()).await, keyed(bob).await);
    assert_eq!((first.0, second.0, &first.1["id"]), (201, 201, &second.1["id"]));
    assert_eq!(keyed(json!({"username": "bob", "role": "guest", "password": "another password"})).await.0, 422);
    let users = hub.get(all).await;
    assert_eq!(users["items"].as_array().unwrap().len(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn rights_end_at_once() {
    let hub = Hub::start().await;
    let (id, bob) = user(&hub, "bob", "developer").await;
    let path = format!("/api/v1/users/{id}");
    let (_, key) = bob.call("POST", "/api/v1/api-keys", Some(json!({"name": "ci", "scopes": ["*"]}))).await;
    let key = As { hub: &hub, token: text(&key, "secret") };
    let stream = async || {
        let web = reqwest::Client::builder().no_proxy().build().unwrap();
        let r = web.get(format!("{}/api/v1/events?topics=sessions", hub.http)).bearer_auth(&bob.token).send().await.unwrap();
        assert_eq!(r.status(), 200);
        r
    };
    let ends = async |mut r: reqwest::Response| {
        until("the stream to end", async || matches!(r.chunk().await, Ok(None) | Err(_)).then_some(())).await
    };

    // A guest may make no sessions; nothing has to be logged in anew.
    let session = json!({"name": "s"});
    assert_eq!(bob.call("POST", "/api/v1/sessions", Some(session.clone())).await.0, 201);
    assert_eq!(key.call("POST", "/api/v1/sessions", Some(session.clone())).await.0, 201);
    assert_eq!(hub.call("PATCH", &path, Some(json!({"role": "guest"}))).await.0, 200);
    assert_eq!(bob.call("POST", "/api/v1/sessions", Some(session.clone())).await.0, 403);
    assert_eq!(key.call("POST", "/api/v1/sessions", Some(session.clone())).await.0, 403);
    hub.call("PATCH", &path, Some(json!({"role": "developer"}))).await;
    assert_eq!(bob.call("POST", "/api/v1/sessions", Some(session.clone())).await.0, 201);

    let open = stream().await;
    let (status, off) = hub.call("PATCH", &path, Some(json!({"disabled": true}))).await;
    assert_eq!((status, off["status"].as_str()), (200, Some("disabled")));
    ends(open).await;
    for who in [&bob, &key] {
        assert_eq!(who.call("GET", "/api/v1/auth/me", None).await.0, 401);
    }
    let credentials = json!({"username": "bob", "password": NEW});
    assert_eq!(nobody(&hub).call("POST", "/api/v1/auth/login", Some(credentials.clone())).await.0, 401);
    hub.call("PATCH", &path, Some(json!({"disabled": false}))).await;
    assert_eq!(bob.call("GET", "/api/v1/auth/me", None).await.0, 401, "an ended log-in stays ended");
    assert_eq!(key.call("GET", "/api/v1/auth/me", None).await.0, 200);
    let bob = login(&hub, "bob", NEW).await;

    // An admin sets a password: the log-ins end, the old password too.
    assert_eq!(hub.call("PATCH", &path, Some(json!({"password": "set by an admin"}))).await.0, 200);
    assert_eq!(bob.call("GET", "/api/v1/auth/me", None).await.0, 401);
    assert_eq!(nobody(&hub).call("POST", "/api/v1/auth/login", Some(credentials)).await.0, 401);
    login(&hub, "bob", "set by an admin").await;
}

/// A request of which the hub knows the caller, and waits for the body.
struct Begun {
    stream: TcpStream,
    body: String,
}

async fn begun(who: &As<'_>, path: &str, body: Value) -> Begun {
    let (body, token) = (body.to_string(), &who.token);
    let mut stream = TcpStream::connect(who.hub.address()).await.unwrap();
    let head = format!(
        "POST {path} HTTP/1.1\r\nHost: {}\r\nAuthorization: Bearer {token}\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\nExpect: 100-continue\r\nConnection: close\r\n\r\n",
        who.hub.address(),
        body.len()
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    // A body is asked for once something wants to read it: after all that the head alone decides.
    let mut go = String::new();
    while !go.ends_with("\r\n\r\n") {
        go.push(char::from(stream.read_u8().await.expect("the hub asks for the body")));
    }
    assert!(go.starts_with("HTTP/1.1 100 "), "{go}");
    Begun { stream, body }
}

impl Begun {
    async fn ends(mut self) -> u16 {
        self.stream.write_all(self.body.as_bytes()).await.unwrap();
        let mut answer = String::new();
        self.stream.read_to_string(&mut answer).await.unwrap();
        answer.split(' ').nth(1).and_then(|s| s.parse().ok()).unwrap_or_else(|| panic!("{answer}"))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_takes_its_time_is_judged_by_the_rights_of_its_end() {
    let hub = Hub::start_with(&[("CORTEX_LIMITS_REQUEST_SECS", "600")], &[]).await;
    let (eve, eves) = user(&hub, "eve", "developer").await;
    let (bob, bobs) = user(&hub, "bob", "developer").await;
    let (_, ada) = user(&hub, "ada", "developer").await;
    let (eve, bob) = (format!("/api/v1/users/{eve}"), format!("/api/v1/users/{bob}"));
    let (_, key) = ada.call("POST", "/api/v1/api-keys", Some(json!({"name": "ci", "scopes": ["*"]}))).await;
    let (program, key) = (As { hub: &hub, token: text(&key, "secret") }, text(&key, "id"));
    let session = |who| begun(who, "/api/v1/sessions", json!({"name": "s"}));
    let set = async |path: &str, to: Value| assert_eq!(hub.call("PATCH", path, Some(to)).await.0, 200);

    let (of_eve, of_bob, of_program, of_ada) = (session(&eves).await, session(&bobs).await, session(&program).await, session(&ada).await);
    set(&eve, json!({"role": "guest"})).await;
    set(&bob, json!({"disabled": true})).await;
    assert_eq!(ada.call("DELETE", &format!("/api/v1/api-keys/{key}"), None).await.0, 204);
    assert_eq!(of_eve.ends().await, 403, "who was demoted");
    assert_eq!(of_bob.ends().await, 401, "who was disabled");
    assert_eq!(of_program.ends().await, 401, "a key that was removed");
    assert_eq!(of_ada.ends().await, 201, "what became of others is theirs");
    // More rights count as well as fewer.
    let of_eve = session(&eves).await;
    set(&eve, json!({"role": "developer"})).await;
    assert_eq!(of_eve.ends().await, 201);
}

/// A machine that somebody else than the admin invited.
async fn machine_of(owner: &As<'_>, name: &str) -> Node {
    let (status, invite) = owner.call("POST", "/api/v1/nodes/invites", Some(json!({"name": name}))).await;
    assert_eq!(status, 201, "{invite}");
    let mut node = Node::prepare(name, &text(&invite, "config_yaml"));
    let out = node.command(&["join", "invite.yaml", "--enroll-only"]).output().unwrap();
    assert!(out.status.success(), "{}", shown(&out));
    node.run();
    node.online(owner.hub).await;
    node
}

async fn dispatched(who: &As<'_>, node: &Node, script: String) -> String {
    let body = json!({"node": node.id, "shell": {"argv": ["sh", "-c", script]}});
    let (status, task) = who.call("POST", "/api/v1/dispatch", Some(body)).await;
    assert_eq!(status, 202, "{task}");
    text(&task, "id")
}

#[tokio::test(flavor = "multi_thread")]
async fn who_owns_a_machine_sees_and_ends_what_others_run_on_it() {
    let hub = Hub::start().await;
    let ((_, bob), (_, ada), (_, eve)) =
        (user(&hub, "bob", "developer").await, user(&hub, "ada", "developer").await, user(&hub, "eve", "developer").await);
    let node = machine_of(&bob, "bobs").await;
    let share = json!({"subject": "ada", "resource": node.id, "permissions": ["tasks:dispatch"]});
    assert_eq!(bob.call("POST", "/api/v1/grants", Some(share)).await.0, 201);
    let runs = dispatched(&ada, &node, "echo hers; sleep 1000".into()).await;
    hub.task_when(&runs, "to run", |t| t["state"] == "running").await;

    let task = format!("/api/v1/tasks/{runs}");
    let listed = async |who: &As<'_>, query: String| {
        let (status, page) = who.call("GET", &format!("/api/v1/tasks{query}"), None).await;
        assert_eq!(status, 200, "{page}");
        page["items"].as_array().unwrap().iter().map(|t| text(t, "id")).collect::<Vec<_>>()
    };
    let on = format!("?node={}", node.id);
    assert_eq!(listed(&bob, on.clone()).await, [runs.as_str()], "the machine's own list");
    assert_eq!(listed(&bob, String::new()).await, [""; 0], "and not among all that is bob's");
    assert_eq!(listed(&eve, on).await, [""; 0]);
    let (status, seen) = bob.call("GET", &task, None).await;
    assert_eq!((status, &seen["state"]), (200, &json!("running")), "{seen}");
    assert_eq!((eve.call("GET", &task, None).await.0, eve.call("POST", &format!("{task}/cancel"), None).await.0), (404, 404));
    let input = json!({"seq": 1, "data_base64": "eA=="});
    assert_eq!(bob.call("POST", &format!("{task}/input"), Some(input)).await.0, 403, "what they are told is not the machine's");
    assert_eq!(bob.call("POST", &format!("{task}/cancel"), None).await.0, 202);
    assert_eq!(hub.finished(&runs).await["state"], "cancelled");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_leaves_hands_over() {
    let mut hub = Hub::start().await;
    let (_, me) = hub.call("GET", "/api/v1/auth/me", None).await;
    let admin = text(&me["user"], "id");
    let (heir, _) = user(&hub, "heir", "developer").await;
    let (guest, _) = user(&hub, "guest", "guest").await;
    let (id, bob) = user(&hub, "bob", "developer").await;
    let node = machine_of(&bob, "bobs").await;
    let slots = hub.call("PATCH", &format!("/api/v1/nodes/{}", node.id), Some(json!({"max_tasks": 1}))).await;
    assert_eq!(slots.0, 200);
    let (_, session) = bob.call("POST", "/api/v1/sessions", Some(json!({"name": "work"}))).await;
    bob.call("PUT", &format!("/api/v1/sessions/{}/nodes/{}", text(&session, "id"), node.id), Some(json!({}))).await;
    assert_eq!(bob.call("PUT", "/api/v1/state/bot/k", Some(json!({"value": 1}))).await.0, 200);
    let (_, unused) = bob.call("POST", "/api/v1/nodes/invites", Some(json!({}))).await;
    let (_, key) = bob.call("POST", "/api/v1/api-keys", Some(json!({"name": "ci", "scopes": ["*"]}))).await;
    let key = As { hub: &hub, token: text(&key, "secret") };
    let gate = node.dir.path().join("gate");
    let runs = dispatched(&bob, &node, format!("while [ ! -e {} ]; do sleep 0.05; done; echo whole", gate.display())).await;
    hub.task_when(&runs, "to run", |t| t["state"] == "running").await;
    let waits = dispatched(&bob, &node, "echo never".into()).await;

    let path = format!("/api/v1/users/{id}");
    for no in [id.as_str(), guest.as_str(), "user_01900000-0000-7000-8000-000000000000", "nonsense"] {
        assert_eq!(refused(&hub, "DELETE", &format!("{path}?transfer_to={no}"), Value::Null).await, (422, "bad_successor".into()), "{no}");
    }
    assert_eq!(refused(&hub, "DELETE", &format!("{path}?work=later"), Value::Null).await, (422, "bad_work".into()));
    assert_eq!(refused(&hub, "DELETE", &format!("{path}?force=true"), Value::Null).await, (400, "bad_query".into()));
    assert_eq!(bob.call("GET", "/api/v1/auth/me", None).await.0, 200, "nothing has happened yet");

    assert_eq!(hub.call("DELETE", &format!("{path}?transfer_to={heir}"), None).await.0, 204);
    for who in [&bob, &key] {
        assert_eq!(who.call("GET", "/api/v1/auth/me", None).await.0, 401);
    }
    assert_eq!(hub.get(&format!("/api/v1/nodes/{}", node.id)).await["owner_id"], heir.as_str());
    assert_eq!(hub.get(&format!("/api/v1/sessions/{}", text(&session, "id"))).await["user_id"], heir.as_str());
    let as_heir = login(&hub, "heir", NEW).await;
    assert_eq!(as_heir.call("PUT", "/api/v1/state/bot/k", Some(json!({"value": 2}))).await.0, 200, "the agent is theirs");
    let invites = hub.get("/api/v1/nodes/invites").await;
    let unused = invites["items"].as_array().unwrap().iter().find(|i| i["id"] == unused["id"]).unwrap();
    assert_eq!(unused["status"], "revoked");
    // Nothing begins any more; what ran finishes, on a machine that has another owner by now.
    let waited = hub.finished(&waits).await;
    // Its machine may have been told of it ahead, and was not let start it.
    assert_eq!((waited["state"].as_str(), &waited["started_at"]), (Some("cancelled"), &Value::Null), "{waited}");
    assert_eq!(hub.task(&runs).await["state"], "running");
    let theirs = as_heir.call("POST", "/api/v1/dispatch", Some(json!({"node": node.id, "echo": {"payload": "mine now"}}))).await;
    assert_eq!(theirs.0, 202, "{}", theirs.1);
    hub.crash_and_restart().await;
    std::fs::write(&gate, "").unwrap();
    let ran = hub.finished(&runs).await;
    assert_eq!((ran["state"].as_str(), ran["stdout"].as_str()), (Some("succeeded"), Some("whole\n")));
    assert_eq!(ran["user_id"], id.as_str(), "history keeps who made it");
    assert_eq!(hub.finished(&text(&theirs.1, "id")).await["state"], "succeeded");

    // History stays readable, also when who it was is erased.
    let removed = hub.get(&path).await;
    assert_eq!((removed["status"].as_str(), removed["username"].as_str()), (Some("removed"), Some("bob")));
    assert_eq!(refused(&hub, "DELETE", &path, Value::Null).await.0, 404);
    assert_eq!(refused(&hub, "PATCH", &path, json!({"role": "admin"})).await.0, 404);
    for _ in 0..2 {
        assert_eq!(hub.call("DELETE", &format!("{path}?purge=true"), None).await.0, 204, "twice is once");
    }
    let erased = hub.get(&path).await;
    assert_eq!((erased["status"].as_str(), &erased["username"]), (Some("removed"), &Value::Null));
    assert_eq!(hub.task(&runs).await["user_id"], id.as_str());

    // The name is free; by default all passes to who asks, and work can be cancelled.
    let (id, bob) = user(&hub, "Bob", "developer").await;
    let (_, session) = bob.call("POST", "/api/v1/sessions", Some(json!({"name": "more"}))).await;
    let second = machine_of(&bob, "second").await;
    let runs = dispatched(&bob, &second, "sleep 1000".into()).await;
    hub.task_when(&runs, "to run", |t| t["state"] == "running").await;
    assert_eq!(hub.call("DELETE", &format!("/api/v1/users/{id}?work=cancel&purge=true"), None).await.0, 204);
    hub.crash_and_restart().await;
    assert_eq!(hub.finished(&runs).await["state"], "cancelled");
    assert_eq!(hub.get(&format!("/api/v1/sessions/{}", text(&session, "id"))).await["user_id"], admin.as_str());
    assert_eq!(hub.get(&format!("/api/v1/nodes/{}", second.id)).await["owner_id"], admin.as_str());
}

fn piped(command: &mut Command, input: &str) -> Output {
    use std::io::Write;
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // One that refuses for another reason may have ended without reading it.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    child.wait_with_output().unwrap()
}

fn admin(hub: &Hub, args: &[&str], input: &str) -> (Option<i32>, String) {
    let out = piped(Command::new(program("cortex-hub")).arg("admin").args(args).arg("--data-dir").arg(hub.data()), input);
    (out.status.code(), shown(&out))
}

/// The password that a command made and showed.
fn made(said: &str) -> String {
    let line = said.lines().find_map(|l| l.strip_prefix("password")).unwrap_or_else(|| panic!("no password in {said}"));
    line.trim().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_hubs_own_machine_makes_people_and_passwords() {
    let mut hub = Hub::start().await;
    // While the hub runs.
    let (code, said) = admin(&hub, &["create-user", "ada", "--role", "viewer", "--password-stdin"], &format!("{NEW}\n"));
    assert_eq!(code, Some(0), "{said}");
    assert!(!said.contains(NEW), "{said}");
    let ada = login(&hub, "ada", NEW).await;
    let (code, said) = admin(&hub, &["reset-password", "ADA"], "");
    assert_eq!(code, Some(0), "{said}");
    assert_eq!(ada.call("GET", "/api/v1/auth/me", None).await.0, 401, "all log-ins are ended");
    login(&hub, "ada", &made(&said)).await;
    let (code, said) = admin(&hub, &["reset-password", "admin", "--password-stdin"], "the admin's new password");
    assert_eq!(code, Some(0), "the socket may do what a log-in may not: {said}");
    let as_admin = login(&hub, "admin", "the admin's new password").await;
    for (args, input, part) in [
        (&["create-user", "ADA"][..], "", "there is a user named"),
        (&["create-user", "bob", "--role", "king"], "", "not a role"),
        (&["create-user", "bob", "--password-stdin"], "12345678901\n", "12 to 256 characters"),
        (&["create-user", "bob", "--password-stdin"], "", "holds no password"),
        (&["create-user", "a\u{202e}b"], "", "control or text-direction"),
        (&["reset-password", "nobody"], "", "no user"),
    ] {
        let (code, said) = admin(&hub, args, input);
        assert!(code == Some(1) && said.contains(part), "{args:?}: {said}");
    }
    assert_eq!(admin(&hub, &["create-user"], "").0, Some(2));
    // The first admin's name is no longer taken for who stands behind the socket.
    let (_, me) = as_admin.call("GET", "/api/v1/auth/me", None).await;
    let path = format!("/api/v1/users/{}", text(&me["user"], "id"));
    assert_eq!(as_admin.call("PATCH", &path, Some(json!({"username": "root"}))).await.0, 200);
    let (code, said) = admin(&hub, &["create-user", "eve"], "");
    assert_eq!(code, Some(0), "{said}");
    login(&hub, "eve", &made(&said)).await;

    // While none runs.
    let old_token = as_admin.token;
    assert_eq!(hub.process.terminate().await.code(), Some(0));
    let (code, said) = admin(&hub, &["create-user", "bob", "--role", "developer"], "");
    assert_eq!(code, Some(0), "{said}");
    let bobs = made(&said);
    let (code, said) = admin(&hub, &["reset-password", "root", "--password-stdin"], &format!("{PASSWORD} again\n"));
    assert_eq!(code, Some(0), "{said}");
    for (args, part) in [(["create-user", "BOB"], "there is a user named"), (["reset-password", "nobody"], "no such user")] {
        let (code, said) = admin(&hub, &args, "");
        assert!(code == Some(1) && said.contains(part), "{args:?}: {said}");
    }
    hub.restart().await;
    login(&hub, "bob", &bobs).await;
    let root = login(&hub, "root", &format!("{PASSWORD} again")).await;
    // All of it is in the log, which is as whole as before.
    let (status, log) = root.call("GET", "/api/v1/audit?door=command", None).await;
    assert_eq!(status, 200, "{log}");
    let told: Vec<_> = log["items"].as_array().unwrap().iter().map(|e| (e["action"].as_str(), e["outcome"].as_str())).collect();
    let refused = (Some("user.create"), Some("failed"));
    assert_eq!(told, [refused, (Some("user.change"), Some("ok")), (Some("user.create"), Some("ok"))], "{log}");
    let change = &log["items"][1];
    assert_eq!((&change["resource"]["id"], &change["detail"]["password"]), (&me["user"]["id"], &json!("set")));
    assert_eq!(root.call("GET", "/api/v1/audit/verify", None).await.1["ok"], true);
    assert_eq!(standing(&hub, &old_token).await, 401, "ended while the hub was away");
    let empty = hub.dir.path().join("empty");
    let out = Command::new(program("cortex-hub")).args(["admin", "reset-password", "admin", "--data-dir"]).arg(&empty).output().unwrap();
    assert!(out.status.code() == Some(1) && shown(&out).contains("there is no hub in"), "{}", shown(&out));
    assert!(!empty.exists(), "and none is made");
}

async fn standing(hub: &Hub, token: &str) -> u16 {
    As { hub, token: token.to_owned() }.call("GET", "/api/v1/auth/me", None).await.0
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_line_does_it_all() {
    let hub = Hub::start().await;
    hub.cli_login();
    let cli = |args: &[&str], input: &str| {
        let out = piped(hub.cli().arg("user").args(args), input);
        (out.status.code(), String::from_utf8_lossy(&out.stdout).into_owned(), shown(&out))
    };
    let (code, link, said) = cli(&["add", "ada", "--role", "developer"], "");
    assert_eq!(code, Some(0), "{said}");
    assert!(link.lines().count() == 1 && link.contains("/accept#cmi_"), "alone on standard output: {link}");
    let (_, list, _) = cli(&["ls"], "");
    let row = list.lines().find(|l| l.starts_with("ada ")).unwrap_or_else(|| panic!("{list}"));
    assert!(row.contains("developer") && row.contains("invited"), "{row}");
    let (_, again, _) = cli(&["set", "ADA", "--invite"], "");
    assert_ne!(link, again);

    // Another machine, where nobody has logged in.
    let other = |args: &[&str], input: &str| {
        let mut c = Command::new(program("cortex"));
        c.env("CORTEX_CONFIG_DIR", hub.dir.path().join("other")).args(args).current_dir(hub.dir.path());
        let out = piped(&mut c, input);
        (out.status.code(), shown(&out))
    };
    let (code, said) = other(&["user", "accept", "--stdin"], &format!("{link}{NEW}\n"));
    assert!(code == Some(1) && said.contains("was used or has expired"), "{said}");
    for (input, part) in [("nonsense\nx\n", "no link"), ("", "first line"), (again.as_str(), "first line")] {
        let (code, said) = other(&["user", "accept", "--stdin"], input);
        assert!(code == Some(2) && said.contains(part), "{input:?}: {said}");
    }
    let (code, said) = other(&["user", "accept", "--stdin"], &format!("{again}{NEW}\n"));
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("as ada") && !said.contains(NEW), "{said}");
    let (code, said) = other(&["whoami"], "");
    assert!(code == Some(0) && said.contains("developer"), "{said}");
    let (code, said) = other(&["user", "ls"], "");
    assert!(code == Some(1) && said.contains("system:administer"), "{said}");

    let (code, _, said) = cli(&["set", "ada", "--role", "viewer", "--name", "Ada"], "");
    assert_eq!(code, Some(0), "{said}");
    let (_, shown, _) = cli(&["show", "ada", "--output", "json"], "");
    let shown: Value = serde_json::from_str(&shown).unwrap();
    assert_eq!(
        (shown["username"].as_str(), shown["role"].as_str(), shown["status"].as_str()),
        (Some("Ada"), Some("viewer"), Some("active"))
    );
    assert_eq!(cli(&["set", "ada", "--disable"], "").0, Some(0));
    assert_eq!(other(&["whoami"], "").0, Some(1));
    assert_eq!(cli(&["set", "ada", "--enable", "--password-stdin"], "set by the admin").0, Some(0));
    login(&hub, "ada", "set by the admin").await;
    assert_eq!(cli(&["set", "ada"], "").0, Some(2), "say what");

    assert_eq!(cli(&["add", "bob", "--role", "developer", "--password-stdin"], NEW).0, Some(0));
    let (code, _, said) = cli(&["rm", "ada"], "no\n");
    assert!(code == Some(1) && said.contains("nobody was removed"), "{said}");
    let (code, _, said) = cli(&["rm", "ada", "--transfer-to", "bob", "--work", "cancel", "--purge", "--yes"], "");
    assert_eq!(code, Some(0), "{said}");
    let (code, _, said) = cli(&["show", "ada"], "");
    assert!(code == Some(1) && said.contains("cortex user ls"), "{said}");
    let (code, out, _) = cli(&["show", &text(&shown, "id")], "");
    assert!(code == Some(0) && out.contains("a removed person"), "{out}");
    let (_, list, _) = cli(&["ls", "--output", "json"], "");
    let list: Value = serde_json::from_str(&list).unwrap();
    assert_eq!(list["items"].as_array().unwrap().len(), 2);
}

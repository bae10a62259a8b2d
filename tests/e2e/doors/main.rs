//! What every door owes: one list, held against each of them. A new way in gets an adapter in `door.rs` and
//! its expected answers there, by hand; without them `every_way_in_is_a_door_of_this_list` fails.

mod door;
mod wire;

use door::{Ask, Call, Door, Duty, Heard, Told};
use futures::future::join_all;
use mesh_tests::{Hub, Node, PASSWORD, text, until};
use serde_json::{Value, json};
use std::path::Path;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const GHOST: &str = "task_0198c0de-0000-7000-8000-000000000000";

/// A person of a hub, and a key of theirs.
struct Person {
    id: String,
    token: String,
    key_id: String,
    key: String,
}

impl Person {
    async fn add(hub: &Hub, name: &str, role: &str, scopes: &[&str]) -> Self {
        let made = json!({"username": name, "role": role, "password": PASSWORD});
        let (status, user) = hub.call("POST", "/api/v1/users", Some(made)).await;
        assert_eq!(status, 201, "{user}");
        let (_, login) = hub.call("POST", "/api/v1/auth/login", Some(json!({"username": name, "password": PASSWORD}))).await;
        let mut person = Self { id: text(&user, "id"), token: text(&login, "access_token"), key_id: String::new(), key: String::new() };
        (person.key_id, person.key) = person.key(hub, scopes, None).await;
        person
    }

    /// Another key of theirs: its id, and the secret.
    async fn key(&self, hub: &Hub, scopes: &[&str], expires_at: Option<String>) -> (String, String) {
        let body = json!({"name": "k", "scopes": scopes, "expires_at": expires_at});
        let (status, key) = as_bearer(hub, &self.token, "POST", "/api/v1/api-keys", Some(body)).await;
        assert_eq!(status, 201, "{key}");
        (text(&key, "id"), text(&key, "secret"))
    }
}

async fn as_bearer(hub: &Hub, bearer: &str, method: &str, path: &str, body: Option<Value>) -> (u16, Value) {
    let web = reqwest::Client::builder().no_proxy().build().unwrap();
    let mut r = web.request(method.parse().unwrap(), format!("{}{path}", hub.http)).bearer_auth(bearer);
    if let Some(body) = body {
        r = r.json(&body);
    }
    let (status, body) = mesh_tests::checked(method, path, r.send().await.unwrap()).await;
    (status, serde_json::from_slice(&body).unwrap_or_default())
}

fn bearer(secret: &str) -> String {
    format!("Bearer {secret}")
}

/// Asks and holds the answer to what the door owes. None: this door cannot be asked that.
async fn owed(hub: &Hub, door: Door, duty: Duty, ask: &Ask<'_>) -> Option<Told> {
    let want = door.owes(duty);
    let told = door.ask(hub, ask).await.filter(|_| want.is_some());
    let want = want?;
    let told = told.unwrap_or_else(|| panic!("{door:?} owes {duty:?} and has no such call"));
    assert_eq!(told.is(), want, "{door:?} {duty:?}: {told:?}");
    let code = want.code;
    // Every answer names its request, and no error tells more than its sentence.
    let id = told.answer.header("x-request-id").unwrap_or_default();
    assert!(!id.is_empty(), "{door:?} {duty:?}: {told:?}");
    if want.status == 401 {
        assert_eq!(told.answer.header("www-authenticate"), Some("Bearer"), "{door:?} {duty:?}: {told:?}");
    }
    if !code.is_empty() {
        assert_eq!(told.problem["request_id"], id, "{door:?} {duty:?}: {told:?}");
        assert!(told.detail().len() > 10, "{door:?} {duty:?}: an error says what to do: {told:?}");
        let (said, secret) = (told.answer.whole(), ask.by.and_then(|by| by.split(' ').nth(1)));
        assert!(!secret.is_some_and(|s| said.contains(s)), "{door:?} {duty:?} says the credentials back");
        for inner in ["SQL", "sqlite", "no such table", "api_keys", "panicked", ".rs", "/hub.db", "Error("] {
            assert!(!said.contains(inner), "{door:?} {duty:?} tells {inner:?}: {said}");
        }
    }
    Some(told)
}

#[tokio::test(flavor = "multi_thread")]
async fn each_door_answers_as_it_owes() {
    let hub = Hub::start_with(&[("CORTEX_LIMITS_BODY_BYTES", "100000")], &[]).await;
    let scopes = ["nodes:read", "sessions:*", "tasks:read"];
    let ada = Person::add(&hub, "ada", "developer", &scopes).await;
    who_is_asking(&hub, &ada, &scopes).await;
    what_one_may(&hub, &ada).await;
    what_is_asked(&hub, &ada).await;
    how_a_request_is_called(&hub, &ada).await;
    where_it_came_from(&hub, &ada).await;
    what_the_audit_says(&hub, &scopes).await;
    what_breaks_inside_stays_inside(&hub, &ada, &scopes).await;
    assert!(!hub.process.log().contains("panicked"), "{}", hub.process.log());
}

/// Without credentials, and with such as do not count: nobody learns which part was wrong.
async fn who_is_asking(hub: &Hub, ada: &Person, scopes: &[&str]) {
    let end = time::OffsetDateTime::now_utc() + time::Duration::seconds(12);
    let end = end.format(&time::format_description::well_known::Rfc3339).unwrap();
    let (_, expired) = ada.key(hub, scopes, Some(end)).await;
    let (id, removed) = ada.key(hub, scopes, None).await;
    assert_eq!(as_bearer(hub, &removed, "GET", "/api/v1/nodes", None).await.0, 200, "it has counted");
    assert_eq!(as_bearer(hub, &ada.token, "DELETE", &format!("/api/v1/api-keys/{id}"), None).await.0, 204);
    until("the key's end", async || (as_bearer(hub, &expired, "GET", "/api/v1/nodes", None).await.0 == 401).then_some(())).await;
    let unknown = format!("cmk_{}", "A".repeat(43));
    for door in Door::ALL {
        owed(hub, door, Duty::NoCredentials, &Ask::of(Call::Read, None)).await;
        owed(hub, door, Duty::WrongCredentials, &Ask::of(Call::Read, Some("Basic YWRtaW46YWRtaW4="))).await;
        let mut said = vec![];
        for wrong in ["garbage", "a.b.c", &unknown, &expired, &removed] {
            let by = bearer(wrong);
            let told = owed(hub, door, Duty::WrongCredentials, &Ask::of(Call::Read, Some(&by))).await.expect("all can be read");
            said.push(told.detail().to_owned());
        }
        said.dedup();
        assert_eq!(said.len(), 1, "{door:?} tells what was wrong: {said:?}");
        owed(hub, door, Duty::Read, &Ask::of(Call::Read, Some(&bearer(&ada.key)))).await;
    }
}

/// What has no scope is refused; what belongs to somebody else is as absent as what never was.
async fn what_one_may(hub: &Hub, ada: &Person) {
    let others = text(&hub.dispatch(json!({"echo": {"payload": "x"}})).await, "id");
    let by = bearer(&ada.key);
    for door in Door::ALL {
        let told = owed(hub, door, Duty::Forbidden, &Ask::of(Call::Forbidden, Some(&by))).await.expect("all can refuse");
        assert!(told.code().is_empty() || told.detail().contains("permission "), "{door:?} names the permission: {told:?}");
        let hidden = owed(hub, door, Duty::Absent, &Ask::of(Call::Task(&others), Some(&by))).await;
        let absent = owed(hub, door, Duty::Absent, &Ask::of(Call::Task(GHOST), Some(&by))).await;
        assert_eq!(absent.as_ref().map(Told::detail), hidden.as_ref().map(Told::detail), "{door:?}");
        owed(hub, door, Duty::Absent, &Ask::of(Call::Task("7"), Some(&by))).await;
    }
    let made = hub.get("/api/v1/tasks").await;
    assert_eq!(made["items"].as_array().map(Vec::len), Some(1), "nothing was dispatched by who may not: {made}");
}

async fn what_is_asked(hub: &Hub, ada: &Person) {
    let by = bearer(&ada.key);
    for door in Door::ALL {
        owed(hub, door, Duty::Bad, &Ask::of(Call::Bad, Some(&by))).await;
        owed(hub, door, Duty::TooLarge, &Ask::of(Call::Sized(100_001), Some(&by))).await;
    }
    assert_eq!(hub.get("/api/v1/sessions").await["items"], json!([]));
}

async fn how_a_request_is_called(hub: &Hub, ada: &Person) {
    let by = bearer(&ada.key);
    let long = "x".repeat(200);
    for door in Door::ALL {
        for (duty, call) in [(Duty::Read, Call::Read), (Duty::Forbidden, Call::Forbidden)] {
            let ask = Ask::of(call, Some(&by));
            let given = format!("given.{door:?}-1");
            let told = owed(hub, door, duty, &Ask { request_id: Some(&given), ..ask }).await.expect("an answer");
            assert_eq!(told.answer.header("x-request-id"), Some(&given[..]), "{door:?}");
            let mut made = vec![];
            for none in [None, None, Some(&long[..]), Some("two words")] {
                let told = owed(hub, door, duty, &Ask { request_id: none, ..ask }).await.expect("an answer");
                made.push(told.answer.header("x-request-id").unwrap_or_default().to_owned());
            }
            assert!(made.iter().all(|id| id.starts_with("req_")), "{door:?}: {made:?}");
            made.sort_unstable();
            made.dedup();
            assert_eq!(made.len(), 4, "{door:?}: each has its own");
        }
    }
}

async fn where_it_came_from(hub: &Hub, ada: &Person) {
    let by = bearer(&ada.key);
    for door in Door::ALL {
        let ask = Ask::of(Call::Read, Some(&by));
        for host in ["evil.example", "evil.example:80", "localhost.evil.example", "192.0.2.1"] {
            owed(hub, door, Duty::ForeignHost, &Ask { host, ..ask }).await;
        }
        for origin in ["https://evil.example", "null", "http://127.0.0.1:1"] {
            let told = owed(hub, door, Duty::ForeignOrigin, &Ask { origin: Some(origin), ..ask }).await.expect("an answer");
            let allowed = told.answer.headers.iter().any(|(name, _)| name.starts_with("access-control-"));
            assert!(!allowed, "{door:?}: no page of {origin} may read this: {told:?}");
        }
        owed(hub, door, Duty::Read, &Ask { origin: Some(&hub.http), host: hub.address(), ..ask }).await;
    }
}

/// What was done and what was refused, with the door, the address and the key.
async fn what_the_audit_says(hub: &Hub, scopes: &[&str]) {
    for door in Door::ALL {
        // Somebody else at each: of reads that were refused, one a minute is written down.
        let name = format!("{door:?}").to_lowercase();
        let who = Person::add(hub, &name, "developer", scopes).await;
        let by = bearer(&who.key);
        let address = if door == Door::Socket { Value::Null } else { json!("127.0.0.1") };
        let id = |what: &str| format!("audited.{door:?}-{what}");
        let (make, refuse) = (id("make"), id("refuse"));
        let made = door.ask(hub, &Ask { request_id: Some(&make), ..Ask::of(Call::Make("made"), Some(&by)) }).await;
        let refused = Ask { request_id: Some(&refuse), ..Ask::of(Call::Forbidden, Some(&by)) };
        owed(hub, door, Duty::Forbidden, &refused).await.expect("all can refuse");
        let wrong = id("wrong");
        owed(hub, door, Duty::WrongCredentials, &Ask { request_id: Some(&wrong), ..Ask::of(Call::Read, Some("Bearer garbage")) }).await;
        let log = hub.get("/api/v1/audit?limit=500").await;
        let of =
            |request: &str| log["items"].as_array().unwrap().iter().filter(|e| e["request_id"] == request).cloned().collect::<Vec<_>>();
        let entry = &of(&wrong)[..];
        let [entry] = entry else { panic!("{door:?}: one entry of a wrong token, not {entry:?}") };
        assert_eq!((&entry["action"], &entry["outcome"]), (&json!("auth.token"), &json!("denied")), "{door:?}: {entry}");
        assert_eq!((&entry["actor"]["door"], &entry["address"]), (&json!(door.audited_as()), &address), "{door:?}: {entry}");
        let mut entries = vec![(of(&refuse), "denied")];
        if let Some(made) = made {
            let made = made.made.unwrap_or_else(|| panic!("{door:?} made nothing"));
            let entry = of(&make);
            assert_eq!((&entry[0]["action"], &entry[0]["resource"]["id"]), (&json!("session.create"), &json!(made)), "{door:?}");
            entries.push((entry, "ok"));
        }
        for (entry, outcome) in entries {
            let [entry] = entry.as_slice() else { panic!("{door:?} {outcome}: one entry, not {entry:?}") };
            let actor = json!({"user_id": who.id, "username": name, "key_id": who.key_id, "agent": null, "door": door.audited_as()});
            assert_eq!((&entry["outcome"], &entry["actor"], &entry["address"]), (&json!(outcome), &actor, &address), "{door:?}: {entry}");
        }
    }
}

/// A table that is gone, and a key that no door has seen yet.
async fn what_breaks_inside_stays_inside(hub: &Hub, ada: &Person, scopes: &[&str]) {
    let (_, fresh) = ada.key(hub, scopes, None).await;
    let by = bearer(&fresh);
    let db = rusqlite::Connection::open(hub.data().join("hub.db")).unwrap();
    db.busy_timeout(mesh_tests::PATIENCE).unwrap();
    db.execute_batch("ALTER TABLE api_keys RENAME TO elsewhere").unwrap();
    for door in Door::ALL {
        let told = owed(hub, door, Duty::Broken, &Ask::of(Call::Read, Some(&by))).await.expect("an answer");
        assert!(told.answer.header("retry-after").is_some(), "{door:?}: {told:?}");
    }
    db.execute_batch("ALTER TABLE elsewhere RENAME TO api_keys").unwrap();
    assert!(hub.process.log().contains("api_keys"), "what failed is in the log");
    for door in Door::ALL {
        owed(hub, door, Duty::Read, &Ask::of(Call::Read, Some(&by))).await;
    }
}

/// One token a second: no machine is so slow that it would never run out of them.
#[tokio::test(flavor = "multi_thread")]
async fn each_door_counts_who_asks_too_often() {
    let hub = Hub::start_with(&[("CORTEX_LIMITS_API_PER_SECOND", "1"), ("CORTEX_LIMITS_API_BURST", "20")], &[]).await;
    let ada = Person::add(&hub, "ada", "developer", &["nodes:read"]).await;
    for door in Door::ALL {
        // Each with a rate of its own.
        let (_, key) = ada.key(&hub, &["nodes:read"], None).await;
        let by = bearer(&key);
        let ask = Ask::of(Call::Read, Some(&by));
        let (limited, good) = (door.owes(Duty::TooOften).unwrap(), door.owes(Duty::Read).unwrap());
        if limited == good {
            for _ in 0..60 {
                owed(&hub, door, Duty::TooOften, &ask).await;
            }
            continue;
        }
        let mut before = 0;
        let told = until("the key to be limited", async || {
            let told = door.ask(&hub, &ask).await.expect("an answer");
            if told.code() == limited.code {
                return Some(told);
            }
            before += 1;
            assert_eq!(told.is(), good, "{door:?}");
            None
        })
        .await;
        assert!(before >= 8, "{door:?}: a burst is allowed, and it was over after {before}");
        if told.answer.status == 101 {
            // Opening a socket counts, and so does what is said on it: either may be what was too much.
            assert!(door == Door::RpcSocket && told.number == Some(-32005) && told.detail().contains("1 s"), "{door:?}: {told:?}");
        } else {
            assert_eq!((told.is(), told.answer.header("retry-after")), (limited, Some("1")), "{door:?} says how long to wait");
        }
    }
}

/// Who says half of what it means holds nothing up, and nothing is made of it.
#[tokio::test(flavor = "multi_thread")]
async fn half_a_request_is_none() {
    let hub = Hub::start_with(&[("CORTEX_LIMITS_REQUEST_SECS", "10")], &[]).await;
    let ada = Person::add(&hub, "ada", "developer", &["sessions:*", "nodes:read"]).await;
    let by = bearer(&ada.key);
    let (hub, by) = (&hub, &by[..]);
    let silent = join_all(Door::ALL.map(async |door| {
        let io = door.begin(hub, by, "half").await;
        let Some(want) = door.owes(Duty::Silent) else { return assert!(io.is_none(), "{door:?} takes a body") };
        let mut io = io.unwrap_or_else(|| panic!("{door:?} takes no body"));
        let answer = wire::soon("an answer", wire::answer(&mut io)).await.expect("an answer");
        let told = door.told(answer);
        assert_eq!(told.is(), want, "{door:?}: {told:?}");
        let mut rest = vec![];
        let _ = wire::soon("the connection's end", io.read_to_end(&mut rest)).await;
        assert!(rest.is_empty(), "{door:?}: what is left of the body is no other request");
    }));
    let hung_up = join_all(Door::ALL.map(async |door| {
        let Some(mut io) = door.begin(hub, by, "half").await else { return };
        io.shutdown().await.unwrap();
        let answer = wire::soon("an answer or none", wire::answer(&mut io)).await;
        let told = answer.map(|a| door.told(a));
        assert!(told.as_ref().is_none_or(|t| ["bad_body", "body_too_slow"].contains(&t.code())), "{door:?}: {told:?}");
    }));
    let heads = join_all(Door::ALL.map(async |door| {
        let mut io = door.knock(hub).await;
        let mut rest = vec![];
        let _ = wire::soon("the connection's end", io.read_to_end(&mut rest)).await;
        assert!(!String::from_utf8_lossy(&rest).contains(" 200 "), "{door:?} answered half a request");
    }));
    futures::join!(silent, hung_up, heads);
    assert_eq!(hub.get("/api/v1/sessions").await["items"], json!([]));
    for door in Door::ALL {
        owed(hub, door, Duty::Read, &Ask::of(Call::Read, Some(by))).await;
    }
}

/// What a reader loses while its stream is open, and the hub's stop, reach the stream.
#[tokio::test(flavor = "multi_thread")]
async fn open_streams_follow_the_rights_behind_them_and_end_orderly() {
    let mut hub = Hub::start().await;
    let _node = Node::join(&hub, "n").await;
    let body = json!({"shell": {"argv": ["sh", "-c", "echo begun; while :; do sleep 1; done"]}});
    let task = text(&hub.dispatch(body).await, "id");
    hub.task_when(&task, "to run", |t| t["state"] == "running").await;
    let ada = Person::add(&hub, "ada", "admin", &["*"]).await;
    let path = format!("/api/v1/users/{}", ada.id);
    let session = async |token: Option<&str>, name: &str| {
        let body = Some(json!({"name": name}));
        let (status, made) = match token {
            Some(token) => as_bearer(&hub, token, "POST", "/api/v1/sessions", body).await,
            None => hub.call("POST", "/api/v1/sessions", body).await,
        };
        assert_eq!(status, 201, "{made}");
    };
    let created = |heard: Heard| match heard {
        Heard::Event(e) if e["type"] == "created" => text(&e["data"], "name"),
        other => panic!("{other:?}"),
    };

    let mut ears = vec![];
    for door in Door::ALL {
        ears.extend(door.listen(&hub, &ada.key, &task).await.map(|ear| (door, ear)));
    }
    session(None, "one").await;
    for (door, ear) in &mut ears {
        match door {
            Door::Rest => assert!(matches!(ear.next().await, Heard::Event(e) if e["data_base64"] == "YmVndW4K")),
            _ => assert_eq!(created(ear.next().await), "one", "{door:?}"),
        }
    }
    // An admin hears of all; a developer of their own alone.
    assert_eq!(hub.call("PATCH", &path, Some(json!({"role": "developer"}))).await.0, 200);
    session(None, "two").await;
    session(Some(&ada.key), "three").await;
    for (door, ear) in &mut ears {
        match door {
            Door::Rest => assert_eq!(ear.next().await, Heard::End("rights".into()), "another's task"),
            _ => assert_eq!(created(ear.next().await), "three", "{door:?} tells what its reader may not know any more"),
        }
    }
    assert_eq!(hub.call("PATCH", &path, Some(json!({"disabled": true}))).await.0, 200);
    for (door, ear) in &mut ears {
        let word = match door {
            Door::Rest => continue,
            Door::WebSocket | Door::RpcSocket => "1008",
            _ => "rights",
        };
        assert_eq!(ear.end().await, word, "{door:?}");
    }

    let (_, key) = hub.call("POST", "/api/v1/api-keys", Some(json!({"name": "k", "scopes": ["*"]}))).await;
    let mut ears = vec![];
    for door in Door::ALL {
        ears.extend(door.listen(&hub, &text(&key, "secret"), &task).await.map(|ear| (door, ear)));
    }
    hub.process.signal(rustix::process::Signal::TERM);
    let ends = join_all(ears.iter_mut().map(async |(door, ear)| (*door, ear.end().await))).await;
    for (door, end) in ends {
        let word = if matches!(door, Door::WebSocket | Door::RpcSocket) { "1001" } else { "stopping" };
        assert_eq!(end, word, "{door:?}");
    }
    drop(ears);
    assert_eq!(hub.process.ended().await.code(), Some(0));
}

/// Routes that are no part of the description, from the hub's source; a unit test there holds all others to it.
fn undescribed() -> Vec<String> {
    let mut folders = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/hub/src")];
    let mut found = vec![];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") && !path.ends_with("tests.rs") {
                let source = std::fs::read_to_string(path).unwrap();
                let source = source.split("#[cfg(test)]").next().unwrap();
                for call in [".route(\"", ".route_service(\"", ".nest_service(\""] {
                    found.extend(source.split(call).skip(1).map(|s| s.split('"').next().unwrap().to_owned()));
                }
            }
        }
    }
    // A listener of its own, for those who watch the hub.
    found.retain(|path| path != "/metrics");
    found
}

/// Whatever needs credentials outside `/api/v1`, and whatever stays open, is a door.
#[tokio::test(flavor = "multi_thread")]
async fn every_way_in_is_a_door_of_this_list() {
    let hub = Hub::start().await;
    let described = hub.get("/openapi.json").await;
    let mut found = vec![];
    for (path, item) in described["paths"].as_object().unwrap() {
        for (method, operation) in item.as_object().unwrap() {
            if operation["security"] == json!([{}]) {
                continue;
            }
            let streams = operation["responses"]["101"].is_object()
                || operation["responses"].as_object().unwrap().values().any(|r| r["content"]["text/event-stream"].is_object());
            let door = Door::of(path, streams);
            let door = door.unwrap_or_else(|| panic!("{method} {path} is a way in without an adapter: give it one in tests/e2e/doors"));
            found.push(door);
        }
    }
    for path in undescribed() {
        let door = Door::of(&path, true);
        found.push(door.unwrap_or_else(|| panic!("{path} is a way in without an adapter: give it one in tests/e2e/doors")));
    }
    // The control socket serves REST's own routes.
    assert!(Door::ALL.iter().all(|d| *d == Door::Socket || found.contains(d)), "{found:?}");
}

//! The JSON-RPC door as a caller gets it: over HTTP and over a WebSocket, from a real hub and a real node.
#![expect(clippy::disallowed_methods, reason = "tests start the real binaries and watch the real clock")]

use futures::{SinkExt, StreamExt};
use mesh_tests::{Hub, Node, PATIENCE, program, shown, text, until};
use serde_json::{Value, json};
use std::process::Command;
use tokio::net::TcpStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::http::HeaderValue;
use tokio_tungstenite::tungstenite::{Error, Message};

const GHOST: &str = "0198c0de-0000-7000-8000-000000000000";

fn outside() -> reqwest::Client {
    reqwest::Client::builder().no_proxy().build().unwrap()
}

fn call(method: &str, params: Value) -> Value {
    json!({"jsonrpc": "2.0", "method": method, "params": params, "id": 1})
}

/// Sends bytes to `POST /rpc`, as admin or as nobody; gives status, body and `Retry-After`.
async fn post(hub: &Hub, known: bool, kind: &str, body: impl Into<Vec<u8>>) -> (u16, Value, bool) {
    let bare = outside().post(format!("{}/rpc", hub.http));
    let request = if known { hub.request("POST", "/rpc") } else { bare };
    let answer = request.header("content-type", kind).body(body.into()).send().await.expect("the hub answers");
    let later = answer.headers().contains_key("retry-after");
    let (status, bytes) = mesh_tests::checked("POST", "/rpc", answer).await;
    (status, serde_json::from_slice(&bytes).unwrap_or(Value::Null), later)
}

async fn say(hub: &Hub, message: &Value) -> (u16, Value) {
    let (status, said, _) = post(hub, true, "application/json", message.to_string()).await;
    (status, said)
}

/// What a call gives; it must be what the description says of it.
async fn result(hub: &Hub, method: &str, params: Value) -> Value {
    let (status, said) = say(hub, &call(method, params)).await;
    assert_eq!((status, &said["jsonrpc"], &said["id"]), (200, &json!("2.0"), &json!(1)), "{method}: {said}");
    assert!(said.get("error").is_none(), "{method}: {said}");
    said["result"].clone()
}

async fn failure(hub: &Hub, method: &str, params: Value) -> (i64, String) {
    let (status, said) = say(hub, &call(method, params)).await;
    assert!(status == 200 && said.get("result").is_none(), "{method}: {status} {said}");
    (said["error"]["code"].as_i64().unwrap(), said["error"]["data"]["code"].as_str().unwrap_or_default().to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_is_answered_as_the_specification_says() {
    let hub = Hub::start_with(&[("CORTEX_LIMITS_BODY_BYTES", "100000")], &[]).await;
    let health = json!({"jsonrpc": "2.0", "method": "system.health", "id": "a"});
    for path in ["/", "/rpc"] {
        let answer = outside().post(format!("{}{path}", hub.http)).json(&health).send().await.unwrap();
        assert_eq!((answer.status().as_u16(), &answer.headers()["content-type"]), (200, &HeaderValue::from_static("application/json")));
        let said: Value = answer.json().await.unwrap();
        assert_eq!((&said["id"], &said["result"]["status"]), (&json!("a"), &json!("ok")), "{said}");
    }

    // Credentials are asked for where they are needed, and 401 is for those who bring none.
    let json_kind = "application/json";
    let list = call("node.list", json!({}));
    let (status, said, _) = post(&hub, false, json_kind, list.to_string()).await;
    assert_eq!((status, &said["error"]["code"], &said["id"]), (401, &json!(-32001), &json!(1)), "{said}");
    let (status, said, _) = post(&hub, false, json_kind, json!([health, list]).to_string()).await;
    assert_eq!((status, &said[0]["result"]["status"], &said[1]["error"]["code"]), (401, &json!("ok"), &json!(-32001)), "{said}");
    let (status, said, _) = post(&hub, false, json_kind, call("rpc.discover", json!([])).to_string()).await;
    assert_eq!((status, &said["error"]["data"]["code"]), (401, &json!("unauthenticated")), "{said}");
    let bad = outside().post(format!("{}/rpc", hub.http)).bearer_auth("cmk_nobody").json(&list).send().await.unwrap();
    assert_eq!(bad.status(), 200);
    assert_eq!(bad.json::<Value>().await.unwrap()["error"]["code"], -32001);
    let (status, said, _) = post(&hub, false, json_kind, call("no.such", json!({})).to_string()).await;
    assert_eq!((status, &said["error"]["code"]), (200, &json!(-32601)));

    for (what, kind, body, status, code) in [
        ("no JSON", json_kind, b"{".to_vec(), 200, -32700),
        ("no UTF-8", json_kind, b"{\"jsonrpc\":\"2.0\",\"method\":\"\xff\",\"id\":1}".to_vec(), 200, -32700),
        ("no body", json_kind, vec![], 200, -32700),
        ("no call", json_kind, b"[]".to_vec(), 200, -32600),
        ("not said to be JSON", "text/plain", health.to_string().into_bytes(), 415, -32600),
        ("too large", json_kind, vec![b' '; 100_001], 413, -32006),
    ] {
        let (got, said, _) = post(&hub, true, kind, body).await;
        assert_eq!((got, &said["error"]["code"], &said["id"]), (status, &json!(code), &Value::Null), "{what}: {said}");
    }
    let many: Vec<Value> = (0..101).map(|n| json!({"jsonrpc": "2.0", "method": "system.health", "id": n})).collect();
    let (status, said) = say(&hub, &json!(many)).await;
    assert_eq!((status, &said["error"]["code"]), (200, &json!(-32600)), "{said}");
    let (status, said) = say(&hub, &json!(many[..100])).await;
    let ids: Vec<u64> = said.as_array().unwrap().iter().map(|a| a["id"].as_u64().unwrap()).collect();
    assert_eq!((status, ids), (200, (0..100).collect::<Vec<_>>()), "in the order of the batch");
    let keyed = hub.request("POST", "/rpc").header("idempotency-key", "k").json(&health).send().await.unwrap();
    assert_eq!(keyed.json::<Value>().await.unwrap()["error"]["data"]["code"], "bad_idempotency_key", "never taken and ignored");

    // Notifications are done, and nobody answers.
    let quiet = json!({"jsonrpc": "2.0", "method": "session.create", "params": {"name": "quiet"}});
    let wrong = json!({"jsonrpc": "2.0", "method": "session.create", "params": {"name": 7}});
    for message in [json!(quiet), json!([quiet, wrong])] {
        let answer = hub.request("POST", "/rpc").json(&message).send().await.unwrap();
        assert_eq!((answer.status().as_u16(), answer.bytes().await.unwrap().len()), (204, 0));
    }
    let (_, said) = say(&hub, &json!([quiet, health])).await;
    assert_eq!((said.as_array().unwrap().len(), &said[0]["id"]), (1, &json!("a")));
    let made = result(&hub, "session.list", json!([])).await;
    assert_eq!(made["items"].as_array().unwrap().iter().filter(|s| s["name"] == "quiet").count(), 3);

    // Parameters by place and by name; what the door or the engine does not take is said.
    assert_eq!(result(&hub, "session.list", json!([1])).await["items"].as_array().unwrap().len(), 1);
    let all = result(&hub, "session.list", json!({"limit": 500, "cursor": null})).await;
    assert_eq!(all["items"].as_array().unwrap().len(), 3);
    for (method, params, code, word) in [
        ("session.list", json!([0]), -32602, "bad_limit"),
        ("session.list", json!([1, null, 3]), -32602, "bad_params"),
        ("session.list", json!({"limits": 1}), -32602, "bad_params"),
        ("session.create", json!({}), -32602, "bad_params"),
        ("session.create", json!([""]), -32602, "bad_name"),
        ("session.get", json!({}), -32602, "bad_params"),
        ("session.get", json!([7]), -32602, "bad_params"),
        ("session.get", json!(["sess_x"]), -32003, "not_found"),
        ("session.get", json!([format!("sess_{GHOST}")]), -32003, "not_found"),
        ("system.health", json!([1]), -32602, "bad_params"),
        ("task.dispatch", json!({"echo": {"payload": "x"}, "sandbox": "strict"}), -32602, "not_yet"),
        ("task.dispatch", json!({"shell": {"argv": ["true"], "pty": {}}}), -32602, "not_yet"),
        ("event.subscribe", json!([["tasks"]]), -32601, "websocket_only"),
        ("workflow.execute", json!({}), -32601, ""),
        ("file.list", json!({}), -32601, ""),
    ] {
        assert_eq!(failure(&hub, method, params.clone()).await, (code, word.to_owned()), "{method} {params}");
    }
    let (_, said) = say(&hub, &call("session.get", json!([format!("sess_{GHOST}")]))).await;
    let data = &said["error"]["data"];
    assert_eq!((&data["status"], &data["type"], data["request_id"].is_string()), (&json!(404), &json!("about:blank"), true), "{said}");
    let (status, _) = hub.call("GET", "/rpc", None).await;
    assert_eq!(status, 405);
}

/// A description of the methods that checks what they give.
struct Described(Value);

impl Described {
    async fn of(hub: &Hub) -> Self {
        Self(result(hub, "rpc.discover", json!({})).await)
    }
    fn names(&self) -> Vec<&str> {
        self.0["methods"].as_array().unwrap().iter().map(|m| m["name"].as_str().unwrap()).collect()
    }
    fn holds(&self, method: &str, place: &str, value: &Value) {
        let all = self.0["methods"].as_array().unwrap();
        let m = all.iter().find(|m| m["name"] == method).unwrap_or_else(|| panic!("{method} is not described"));
        let mut schema = m.pointer(place).unwrap_or_else(|| panic!("{method} has no {place}")).clone();
        schema["components"] = self.0["components"].clone();
        let validator = jsonschema::options().should_validate_formats(true).build(&schema).unwrap();
        let wrong: Vec<String> = validator.iter_errors(value).map(|e| format!("at {}: {e}", e.instance_path())).collect();
        assert!(wrong.is_empty(), "{method}: {wrong:?}\n{value:#}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_method_does_and_answers_what_its_description_says() {
    let hub = Hub::start().await;
    let node = Node::join(&hub, "büro").await;
    let described = Described::of(&hub).await;
    // The shape of OpenRPC 1.3, as far as it is ours to get wrong.
    assert!(described.0["openrpc"].as_str().unwrap().starts_with("1.3."));
    assert!(described.0["info"]["title"].is_string() && described.0["info"]["version"].is_string());
    for m in described.0["methods"].as_array().unwrap() {
        assert!(m["name"].is_string() && m["summary"].is_string() && m["paramStructure"] == "either", "{m}");
        for p in m["params"].as_array().unwrap().iter().chain([&m["result"]]) {
            assert!(p["name"].is_string() && (p["schema"].is_object() || p["schema"].is_boolean()), "{m}");
        }
        assert!(m["errors"].as_array().unwrap().iter().all(|e| e["code"].is_i64() && e["message"].is_string()), "{m}");
    }
    let info = hub.get("/").await;
    let told: Vec<&str> = info["methods"].as_array().unwrap().iter().map(|m| m.as_str().unwrap()).collect();
    assert_eq!(told, described.names());
    assert!(told.contains(&"task.output") && !told.contains(&"workflow.execute"));

    let asked = std::cell::RefCell::new(std::collections::BTreeSet::new());
    let ask = async |method: &'static str, params: Value| {
        let got = result(&hub, method, params).await;
        described.holds(method, "/result/schema", &got);
        asked.borrow_mut().insert(method);
        got
    };
    ask("system.health", json!({})).await;
    ask("rpc.discover", json!([])).await;
    let nodes = ask("node.list", json!({"select": "os=linux"})).await;
    assert_eq!(nodes["items"][0]["id"], node.id.as_str());
    assert_eq!(ask("node.get", json!([node.id])).await["name"], "büro");
    let invite = ask("node.invite", json!({"name": "attic", "labels": {"room": "lab"}})).await;
    assert!(text(&invite, "config_yaml").contains("attic"));

    let session = ask("session.create", json!(["work", 3600])).await;
    let id = text(&session, "id");
    assert_eq!(ask("session.get", json!({"session_id": id})).await["name"], "work");
    assert_eq!(ask("session.list", json!({})).await["items"][0]["id"], id.as_str());
    let attached = ask("session.attach", json!({"session_id": id, "node_id": "büro"})).await;
    assert_eq!(attached["attached_node_ids"], json!([node.id]));

    let script = "printf 'a€b'; echo err >&2; exit 3";
    let given = json!({"session_id": id, "shell": {"command": script}, "wait_secs": 60, "timeout_secs": null});
    let task = ask("task.dispatch", given).await;
    assert_eq!((&task["state"], &task["exit_code"], &task["session_id"]), (&json!("failed"), &json!(3), &json!(id)), "{task}");
    assert_eq!(task["actor"]["door"], "jsonrpc");
    let alone = ask("task.dispatch", json!({"node": "büro", "echo": {"payload": "x"}, "wait_secs": 60})).await;
    assert_eq!((&alone["state"], &alone["session_id"]), (&json!("succeeded"), &Value::Null), "{alone}");
    let task_id = text(&task, "id");
    assert_eq!(ask("task.get", json!([task_id])).await, hub.task(&task_id).await);
    let of_session = ask("task.list", json!({"session": id, "state": "failed"})).await;
    assert_eq!(of_session["items"].as_array().unwrap().len(), 1);
    assert_eq!(ask("task.cancel", json!({"task_id": task_id})).await["id"], task_id.as_str());

    // Output a part at a time, cut on characters.
    let part = async |params: Value| ask("task.output", params).await;
    let whole = part(json!({"task_id": task_id, "stream": "stdout"})).await;
    assert_eq!(
        (&whole["text"], &whole["next_byte"], &whole["end"], &whole["attempt"]),
        (&json!("a€b"), &json!(5), &json!(true), &json!(1))
    );
    let first = part(json!([task_id, 0, 3, "stdout"])).await;
    assert_eq!((&first["text"], &first["next_byte"], &first["end"]), (&json!("a"), &json!(1), &json!(false)));
    let rest = part(json!([task_id, 1, 3, "stdout"])).await;
    assert_eq!((&rest["text"], &rest["next_byte"], &rest["end"]), (&json!("€"), &json!(4), &json!(false)));
    let last = part(json!([task_id, 4, 1, "stdout"])).await;
    assert_eq!((&last["text"], &last["end"]), (&json!("b"), &json!(true)));
    let bytes = part(json!({"task_id": task_id, "stream": "stdout", "from_byte": 1, "max_bytes": 1, "encoding": "base64"})).await;
    assert_eq!((&bytes["data_base64"], bytes.get("text"), &bytes["next_byte"]), (&json!("4g=="), None, &json!(2)));
    assert_eq!(part(json!({"task_id": task_id, "stream": "stderr"})).await["text"], "err\n");
    assert_eq!(part(json!({"task_id": task_id, "from_byte": 900})).await["text"], "");
    for bad in [json!({"max_bytes": 0}), json!({"max_bytes": 2_000_000}), json!({"stream": "x"}), json!({"encoding": "x"})] {
        let mut params = bad.clone();
        params["task_id"] = json!(task_id);
        assert_eq!(failure(&hub, "task.output", params).await.0, -32602, "{bad}");
    }

    for (agent, key, value) in [("ada", "seen", json!({"n": 1})), ("ada", "todo", json!([])), ("bob", "seen", json!(null))] {
        let (status, said) = hub.call("PUT", &format!("/api/v1/state/{agent}/{key}"), Some(json!({"value": value}))).await;
        assert_eq!(status, 200, "{said}");
    }
    let all = ask("state.query", json!({})).await;
    assert_eq!(all["state"], json!({"ada": {"seen": {"n": 1}, "todo": []}, "bob": {"seen": null}}));
    assert_eq!(ask("state.query", json!(["ada", "seen"])).await["state"], json!({"ada": {"seen": {"n": 1}}}));
    let first = ask("state.query", json!({"key": "seen", "limit": 1})).await;
    let second = ask("state.query", json!({"key": "seen", "limit": 1, "cursor": first["next_cursor"]})).await;
    assert_eq!((&first["state"], &second["state"]), (&json!({"bob": {"seen": null}}), &json!({"ada": {"seen": {"n": 1}}})));

    let agent = ask("agent.spawn", json!(["eve", "basic", {"k": 1}])).await["agent_id"].clone();
    assert_eq!(ask("agent.list", json!({"name": "eve"})).await["count"], 1);
    assert_eq!(ask("system.metrics", json!([])).await["agents"], json!({"running": 1}));
    assert_eq!(ask("agent.kill", json!([agent])).await["status"], "killed");
    assert_eq!(ask("agent.logs", json!([agent])).await["first"], 0);

    assert_eq!(ask("session.detach", json!([id, node.id])).await, Value::Null);
    assert_eq!(ask("session.close", json!([id])).await, Value::Null);
    assert_eq!(failure(&hub, "session.attach", json!([id, node.id])).await, (-32004, "session_ended".into()));
    assert_eq!(ask("node.revoke", json!([node.id])).await["status"], "revoked");
    let mut left: Vec<&str> = told.iter().copied().filter(|m| !asked.borrow().contains(m)).collect();
    left.retain(|m| !m.starts_with("event."));
    assert!(left.is_empty(), "methods that this test has not called: {left:?}");
}

/// The client that `examples` shows does all this with the real hub.
#[tokio::test(flavor = "multi_thread")]
async fn the_example_runs() {
    let hub = Hub::start().await;
    let (_, key) = hub.call("POST", "/api/v1/api-keys", Some(json!({"name": "example", "scopes": ["*"]}))).await;
    let mut example = Command::new(program("examples/jsonrpc"));
    example.env("CORTEX_URL", &hub.http).env("CORTEX_API_KEY", text(&key, "secret")).env("NO_PROXY", "127.0.0.1");
    let out = tokio::task::spawn_blocking(move || example.output().unwrap()).await.unwrap();
    let said = String::from_utf8_lossy(&out.stdout);
    assert!(out.status.success(), "{}", shown(&out));
    for line in ["system.health: ok", "state.query:", "methods:"] {
        assert!(said.contains(line), "{line}: {said}");
    }
    let out = tokio::task::spawn_blocking({
        let url = hub.http.clone();
        move || {
            let mut example = Command::new(program("examples/jsonrpc"));
            example.env("CORTEX_URL", url).env("CORTEX_API_KEY", "cmk_nobody").env("NO_PROXY", "127.0.0.1").output().unwrap()
        }
    });
    let out = out.await.unwrap();
    assert!(!out.status.success() && String::from_utf8_lossy(&out.stderr).contains("-32001"), "{}", shown(&out));
}

#[tokio::test(flavor = "multi_thread")]
async fn each_call_of_a_batch_is_one_in_the_audit_and_one_in_the_rate() {
    // One token a second: no machine is so slow that it would never run out of them.
    let hub = Hub::start_with(&[("CORTEX_LIMITS_API_PER_SECOND", "1"), ("CORTEX_LIMITS_API_BURST", "40")], &[]).await;
    let (_, key) = hub.call("POST", "/api/v1/api-keys", Some(json!({"name": "k", "scopes": ["sessions:*"]}))).await;
    let by_key = async |message: Value| {
        let r = outside().post(format!("{}/rpc", hub.http)).bearer_auth(text(&key, "secret")).header("x-request-id", "the-batch");
        let answer = r.json(&message).send().await.unwrap();
        (answer.status().as_u16(), answer.headers().contains_key("retry-after"), answer.json::<Value>().await.unwrap())
    };
    let one = |n: usize| json!({"jsonrpc": "2.0", "method": "session.create", "params": [format!("s{n}")], "id": n});
    let denied = json!({"jsonrpc": "2.0", "method": "node.invite", "params": {}, "id": 9});
    let (status, _, said) = by_key(json!([one(0), one(1), one(2), denied])).await;
    assert_eq!((status, &said[3]["error"]["code"]), (200, &json!(-32002)), "{said}");
    let entries = hub.get("/api/v1/audit?door=jsonrpc").await;
    let entries = entries["items"].as_array().unwrap();
    let of = |action: &str| entries.iter().filter(|e| e["action"] == action).collect::<Vec<_>>();
    let made = of("session.create");
    assert!(entries.len() == 4 && made.len() == 3 && of("invite.create").len() == 1, "{entries:?}");
    let mut things: Vec<&str> = made.iter().map(|e| e["resource"]["id"].as_str().unwrap()).collect();
    things.sort_unstable();
    things.dedup();
    assert_eq!(things.len(), 3, "each names its own");
    for e in &made {
        assert_eq!((&e["outcome"], &e["request_id"], &e["actor"]["key_id"]), (&json!("ok"), &json!("the-batch"), &key["id"]));
    }
    assert_eq!(of("invite.create")[0]["outcome"], "denied");

    // Four are gone of forty; a hundred more find an end.
    let many: Vec<Value> = (0..100).map(|n| json!({"jsonrpc": "2.0", "method": "session.list", "id": n})).collect();
    let limited = until("the rate to have no room", async || {
        let (status, later, said) = by_key(json!(many)).await;
        assert_eq!(status, 200);
        let limited = said.as_array().unwrap().iter().filter(|a| a["error"]["code"] == -32005).count();
        (limited > 0).then_some((limited, later, said))
    })
    .await;
    assert!(limited.1, "with Retry-After");
    assert!(limited.0 < 100 && limited.2[0]["result"].is_object(), "the first had room: {}", limited.0);
    assert_eq!(limited.2[99]["error"]["data"]["code"], "rate_limited");
    // What needs no credentials counts for the address.
    let healths: Vec<Value> = (0..100).map(|n| json!({"jsonrpc": "2.0", "method": "system.health", "id": n})).collect();
    until("the address to have no room", async || {
        let (status, said, later) = post(&hub, false, "application/json", json!(healths).to_string()).await;
        assert_eq!(status, 200);
        (said[99]["error"]["code"] == -32005 && later).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_has_its_own_time() {
    let hub = Hub::start_with(&[("CORTEX_LIMITS_REQUEST_SECS", "8")], &[]).await;
    // Nobody takes the task: its caller waits longer than a request may take, and hears of it all the same.
    let waits = json!({"jsonrpc": "2.0", "method": "task.dispatch", "params": {"echo": {"payload": "x"}, "wait_secs": 18}, "id": "waits"});
    let health = json!({"jsonrpc": "2.0", "method": "system.health", "id": "health"});
    let begun = std::time::Instant::now();
    let (status, said) = say(&hub, &json!([waits, health])).await;
    assert!(begun.elapsed() >= std::time::Duration::from_secs(18), "it waited");
    assert_eq!((status, &said[0]["result"]["state"], &said[1]["result"]["status"]), (200, &json!("pending"), &json!("ok")), "{said}");
}

type Ws = WebSocketStream<TcpStream>;

/// Opens a WebSocket; the status where the hub refuses.
async fn ws(hub: &Hub, bearer: &str, origin: Option<&str>) -> Result<Ws, u16> {
    let host = hub.address();
    let mut request = format!("ws://{host}/rpc/ws").into_client_request().unwrap();
    if !bearer.is_empty() {
        request.headers_mut().insert("authorization", HeaderValue::try_from(format!("Bearer {bearer}")).unwrap());
    }
    if let Some(o) = origin {
        request.headers_mut().insert("origin", HeaderValue::try_from(o).unwrap());
    }
    let tcp = TcpStream::connect(host).await.unwrap();
    match tokio_tungstenite::client_async(request, tcp).await {
        Ok((socket, _)) => Ok(socket),
        Err(Error::Http(answer)) => Err(answer.status().as_u16()),
        Err(e) => panic!("{e}"),
    }
}

async fn send(socket: &mut Ws, message: &Value) {
    socket.send(Message::text(message.to_string())).await.unwrap();
}

/// The next message; the code of the close frame where there is none any more.
async fn next(socket: &mut Ws) -> Result<Value, u16> {
    loop {
        let came = tokio::time::timeout(PATIENCE, socket.next()).await.expect("a frame in time");
        match came {
            Some(Ok(Message::Text(text))) => return Ok(serde_json::from_str(&text).unwrap()),
            Some(Ok(Message::Close(frame))) => return Err(frame.map_or(1005, |f| f.code.into())),
            Some(Ok(_)) => {}
            Some(Err(_)) | None => return Err(0),
        }
    }
}

/// The answer with this id; what is told meanwhile is kept.
async fn answer(socket: &mut Ws, id: &Value, told: &mut Vec<Value>) -> Value {
    loop {
        let came = next(socket).await.expect("the socket is open");
        if came.get("id") == Some(id) {
            return came;
        }
        told.push(came);
    }
}

/// The next that is told of this session.
async fn event(socket: &mut Ws, session: &Value) -> Value {
    loop {
        let came = next(socket).await.expect("the socket is open");
        if came["params"]["event"]["data"]["session_id"] == *session {
            return came;
        }
    }
}

async fn key(hub: &Hub, scopes: &[&str]) -> (String, String) {
    let (status, v) = hub.call("POST", "/api/v1/api-keys", Some(json!({"name": "k", "scopes": scopes}))).await;
    assert_eq!(status, 201, "{v}");
    (text(&v, "id"), text(&v, "secret"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_socket_carries_calls_and_events() {
    let mut hub = Hub::start().await;
    let (_, all) = key(&hub, &["*"]).await;
    let (id, few) = key(&hub, &["sessions:*"]).await;
    assert_eq!(ws(&hub, &all, Some("https://evil.test")).await.err(), Some(403));
    assert_eq!(ws(&hub, "cmk_nobody", None).await.err(), Some(401));
    let own = hub.http.clone();
    let mut socket = ws(&hub, &all, Some(&own)).await.unwrap();
    let mut told = vec![];

    // A long call holds up nobody; a batch is one frame; a notification has no answer.
    let waits = json!({"jsonrpc": "2.0", "method": "task.dispatch", "params": {"echo": {"payload": "x"}, "wait_secs": 60}, "id": "waits"});
    send(&mut socket, &waits).await;
    send(&mut socket, &json!({"jsonrpc": "2.0", "method": "session.create", "params": ["quiet"]})).await;
    send(&mut socket, &json!([call("system.health", json!({})), call("no.such", json!({}))])).await;
    let batch = next(&mut socket).await.unwrap();
    assert_eq!((&batch[0]["result"]["status"], &batch[1]["error"]["code"]), (&json!("ok"), &json!(-32601)), "{batch}");
    socket.send(Message::text("{")).await.unwrap();
    assert_eq!(next(&mut socket).await.unwrap()["error"]["code"], -32700);
    // It waits until somebody ends its task.
    let task = until("the task to be there", async || hub.get("/api/v1/tasks").await["items"].get(0).map(|t| text(t, "id"))).await;
    assert_eq!(hub.call("POST", &format!("/api/v1/tasks/{task}/cancel"), None).await.0, 202);
    let waited = answer(&mut socket, &json!("waits"), &mut told).await;
    assert_eq!((&waited["result"]["id"], &waited["result"]["state"]), (&json!(task), &json!("cancelled")), "{waited}");

    // Subscriptions: each has an id, which its events name.
    let subscribe =
        |topics: Value, id: &str| json!({"jsonrpc": "2.0", "method": "event.subscribe", "params": {"topics": topics}, "id": id});
    send(&mut socket, &subscribe(json!(["sessions"]), "one")).await;
    let one = answer(&mut socket, &json!("one"), &mut told).await["result"]["subscription_id"].clone();
    send(&mut socket, &subscribe(json!(["sessions", "tasks"]), "two")).await;
    let two = answer(&mut socket, &json!("two"), &mut told).await["result"]["subscription_id"].clone();
    assert!(one.is_string() && two.is_string() && one != two);
    let made = result(&hub, "session.create", json!(["seen"])).await;
    let mut of = [event(&mut socket, &made["id"]).await, event(&mut socket, &made["id"]).await];
    of.sort_by_key(|n| n["params"]["subscription_id"].to_string());
    for (n, id) in of.iter().zip([&one, &two]) {
        assert_eq!((&n["method"], &n["params"]["subscription_id"], n.get("id")), (&json!("event.notify"), id, None), "{n}");
        let event = &n["params"]["event"];
        assert_eq!((&event["topic"], &event["type"], &event["data"]["session_id"]), (&json!("sessions"), &json!("created"), &made["id"]));
    }
    let unsubscribe = |id: &Value| json!({"jsonrpc": "2.0", "method": "event.unsubscribe", "params": [id], "id": "ended"});
    send(&mut socket, &unsubscribe(&one)).await;
    assert_eq!(answer(&mut socket, &json!("ended"), &mut told).await["result"]["subscription_id"], one);
    send(&mut socket, &unsubscribe(&one)).await;
    assert_eq!(answer(&mut socket, &json!("ended"), &mut told).await["error"]["code"], -32003);
    result(&hub, "session.close", json!([made["id"]])).await;
    let closed = event(&mut socket, &made["id"]).await;
    assert_eq!((&closed["params"]["subscription_id"], &closed["params"]["event"]["type"]), (&two, &json!("closed")));
    // What came after an event is asked for with its id.
    let after = of[1]["params"]["event"]["id"].clone();
    send(&mut socket, &json!({"jsonrpc": "2.0", "method": "event.subscribe", "params": [["sessions"], after], "id": "again"})).await;
    let again = answer(&mut socket, &json!("again"), &mut told).await["result"]["subscription_id"].clone();
    let replayed = event(&mut socket, &made["id"]).await;
    assert_eq!((&replayed["params"]["subscription_id"], &replayed["params"]["event"]["type"]), (&again, &json!("closed")));
    for (topics, code) in [(json!([]), -32602), (json!(["x"]), -32602), (json!(["audit"]), -32002), (json!(["files"]), -32602)] {
        send(&mut socket, &subscribe(topics.clone(), "bad")).await;
        assert_eq!(answer(&mut socket, &json!("bad"), &mut told).await["error"]["code"], code, "{topics}");
    }
    // Two are open; more than sixteen are not.
    let mut full = 0;
    for _ in 0..16 {
        send(&mut socket, &subscribe(json!(["nodes"]), "more")).await;
        full += u8::from(answer(&mut socket, &json!("more"), &mut told).await["error"]["code"] == -32006);
    }
    assert_eq!(full, 2);

    // As many calls at once as a batch has, and no more.
    let waiting: Vec<Value> = (0..100)
        .map(|n| json!({"jsonrpc": "2.0", "method": "task.dispatch", "params": {"echo": {"payload": "x"}, "wait_secs": 60}, "id": n}))
        .collect();
    send(&mut socket, &json!(waiting)).await;
    send(&mut socket, &json!({"jsonrpc": "2.0", "method": "system.health", "id": "beyond"})).await;
    assert_eq!(answer(&mut socket, &json!("beyond"), &mut told).await["error"]["data"]["code"], "calls_full");
    drop(socket);

    // A key that cannot see a topic hears so; one that is gone can do nothing, and its socket is ended.
    let mut socket = ws(&hub, &few, None).await.unwrap();
    send(&mut socket, &subscribe(json!(["nodes"]), "bad")).await;
    assert_eq!(next(&mut socket).await.unwrap()["error"]["code"], -32002);
    send(&mut socket, &subscribe(json!(["sessions"]), "good")).await;
    assert!(next(&mut socket).await.unwrap()["result"].is_object());
    assert_eq!(hub.call("DELETE", &format!("/api/v1/api-keys/{id}"), None).await.0, 204);
    let code = loop {
        if let Err(code) = next(&mut socket).await {
            break code;
        }
    };
    assert_eq!(code, 1008);

    // Without credentials: what needs none.
    let mut socket = ws(&hub, "", None).await.unwrap();
    send(&mut socket, &json!([call("system.health", json!({})), call("session.list", json!({}))])).await;
    let said = next(&mut socket).await.unwrap();
    assert_eq!((&said[0]["result"]["status"], &said[1]["error"]["code"]), (&json!("ok"), &json!(-32001)), "{said}");
    socket.send(Message::binary(b"{}".to_vec())).await.unwrap();
    assert_eq!(next(&mut socket).await, Err(1003));

    let mut socket = ws(&hub, &all, None).await.unwrap();
    send(&mut socket, &call("system.health", json!({}))).await;
    next(&mut socket).await.unwrap();
    hub.process.signal(rustix::process::Signal::TERM);
    assert_eq!(next(&mut socket).await, Err(1001));
    assert_eq!(hub.process.ended().await.code(), Some(0));
}

/// A client that asks and does not read is dropped, and is in nobody's way.
#[tokio::test(flavor = "multi_thread")]
async fn a_socket_that_is_not_read_is_dropped() {
    let hub = Hub::start().await;
    let _node = Node::join(&hub, "n").await;
    let task = hub.sh("head -c 1000000 /dev/zero").await;
    assert_eq!(task["stdout_bytes"], 1_000_000, "{task}");
    let (_, all) = key(&hub, &["*"]).await;
    let (mut stuck, mut good) = (ws(&hub, &all, None).await.unwrap(), ws(&hub, &all, None).await.unwrap());
    // More than the kernel takes for one connection.
    for n in 0..40 {
        let params = json!({"task_id": task["id"], "max_bytes": 1_000_000, "encoding": "base64"});
        send(&mut stuck, &json!({"jsonrpc": "2.0", "method": "task.output", "params": params, "id": n})).await;
    }
    let log = || hub.process.log();
    let metrics = async || {
        let facts: Value = serde_json::from_slice(&std::fs::read(hub.data().join("hub.json")).unwrap()).unwrap();
        outside().get(format!("http://{}/metrics", text(&facts, "metrics"))).send().await.unwrap().text().await.unwrap()
    };
    send(&mut good, &call("system.health", json!({}))).await;
    assert_eq!(next(&mut good).await.unwrap()["result"]["status"], "ok");
    // The hub gives it up: the connection has an end though not all was said.
    until("the hub to drop it", async || {
        send(&mut good, &call("system.health", json!({}))).await;
        next(&mut good).await.unwrap();
        metrics().await.lines().find(|l| l.starts_with("cortex_rpc_sockets ") && l.ends_with(" 1")).map(|_| ())
    })
    .await;
    let mut answers = 0;
    while let Ok(said) = next(&mut stuck).await {
        assert!(said["result"]["data_base64"].is_string(), "{said}");
        answers += 1;
    }
    assert!(answers < 40, "it was cut off");
    assert!(!log().contains("panicked"));
}

#[tokio::test(flavor = "multi_thread")]
async fn agents_by_name() {
    let hub = Hub::start().await;
    let _node = Node::join(&hub, "n").await;
    let config = json!({"command": "echo hello; exit 3", "node": "n", "restart": {"policy": "on_failure", "max": 1, "backoff_ms": 1}});
    let spawned = result(&hub, "agent.spawn", json!(["greeter", "process", config])).await;
    assert_eq!(spawned["status"], "starting", "{spawned}");
    let id = text(&spawned, "agent_id");
    assert_eq!(failure(&hub, "agent.spawn", json!({"name": "x", "agent_type": "process", "config": {}})).await.0, -32602);
    let ended = until("the agent to fail", async || {
        let list = result(&hub, "agent.list", json!({"status": "failed"})).await;
        (list["count"] == 1).then(|| list["agents"][0].clone())
    })
    .await;
    assert_eq!((&ended["agent_id"], &ended["restarts"]), (&json!(id), &json!(1)), "{ended}");
    let logs = result(&hub, "agent.logs", json!([id, 500])).await;
    let said = logs["logs"].as_array().unwrap().iter().filter(|l| l["line"] == "hello" && l["stream"] == "stdout").count();
    assert_eq!((said, &logs["first"]), (2, &json!(0)), "{logs}");
    assert_eq!(logs["total"].as_u64(), Some(logs["logs"].as_array().unwrap().len() as u64));
    let second = result(&hub, "agent.logs", json!({"agent_id": id, "limit": 1, "offset": 1})).await;
    assert_eq!(second["logs"][0], logs["logs"][1]);
    let killed = result(&hub, "agent.kill", json!({"agent_id": id, "force": true})).await;
    assert_eq!(killed["status"], "failed", "one that has ended stays as it is: {killed}");
    let basic = result(&hub, "agent.spawn", json!({"name": "b", "agent_type": "basic", "config": {"k": [1]}})).await;
    let metrics = result(&hub, "system.metrics", json!({})).await;
    assert_eq!(metrics["agents"], json!({"failed": 1, "running": 1}), "{metrics}");
    assert!(metrics["system"]["nodes"]["by_status"].is_object() && metrics["timestamp"].is_string(), "{metrics}");
    assert_eq!(result(&hub, "agent.kill", json!([basic["agent_id"]])).await["status"], "killed");
    assert_eq!(failure(&hub, "agent.kill", json!([format!("agent_{GHOST}")])).await.0, -32003);
}

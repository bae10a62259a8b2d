//! Live events as a reader gets them: over SSE and WebSocket, from a real hub and real nodes.
#![expect(clippy::disallowed_methods, reason = "tests start the real binaries and watch the real clock")]

use futures::{SinkExt, StreamExt};
use mesh_tests::{Hub, Node, PATIENCE, text};
use serde_json::{Value, json};
use std::time::{Duration, Instant};
use tokio::net::TcpStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::http::HeaderValue;
use tokio_tungstenite::tungstenite::{Error, Message};

/// An event stream, read one block at a time.
struct Sse {
    body: futures::stream::BoxStream<'static, Result<Vec<u8>, reqwest::Error>>,
    buffer: String,
    /// As a browser keeps it.
    last_id: Option<String>,
}

impl Sse {
    async fn open(hub: &Hub, query: &str, last_id: Option<&str>) -> Self {
        let mut r = hub.request("GET", &format!("/api/v1/events{query}")).header("accept", "text/event-stream");
        if let Some(id) = last_id {
            r = r.header("last-event-id", id);
        }
        let answer = r.send().await.unwrap();
        assert_eq!(answer.status().as_u16(), 200);
        assert_eq!(answer.headers()["content-type"], "text/event-stream");
        let body = answer.bytes_stream().map(|b| b.map(|b| b.to_vec())).boxed();
        Self { body, buffer: String::new(), last_id: last_id.map(str::to_owned) }
    }

    /// The next event: its name and data. None: the stream has ended.
    async fn next(&mut self) -> Option<(String, Value)> {
        loop {
            while let Some(at) = self.buffer.find("\n\n") {
                let block: String = self.buffer.drain(..at + 2).collect();
                let field = |name: &str| block.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(": ").map(str::to_owned));
                if let Some(id) = field("id") {
                    self.last_id = Some(id);
                }
                if let Some(data) = field("data") {
                    return Some((field("event").expect("every event has a name"), serde_json::from_str(&data).unwrap()));
                }
            }
            let piece = tokio::time::timeout(PATIENCE, self.body.next()).await.expect("an event in time")?.ok()?;
            self.buffer.push_str(std::str::from_utf8(&piece).unwrap());
        }
    }

    async fn event(&mut self) -> Value {
        let (name, data) = self.next().await.expect("the stream goes on");
        assert_eq!(data["type"], name.as_str(), "the event's name is its type: {data}");
        data
    }
}

type Ws = WebSocketStream<TcpStream>;

/// Opens a WebSocket; the status where the hub refuses.
async fn ws(hub: &Hub, query: &str, bearer: &str, origin: Option<&str>) -> Result<Ws, u16> {
    let host = hub.http.trim_start_matches("http://");
    let mut request = format!("ws://{host}/api/v1/ws{query}").into_client_request().unwrap();
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

async fn ws_next(socket: &mut Ws) -> Message {
    loop {
        let came = tokio::time::timeout(PATIENCE, socket.next()).await.expect("a frame in time");
        match came.expect("the socket is open").unwrap() {
            Message::Ping(_) | Message::Pong(_) => {}
            other => return other,
        }
    }
}
async fn ws_event(socket: &mut Ws) -> Value {
    let frame = ws_next(socket).await;
    serde_json::from_str(frame.to_text().expect("a text frame")).unwrap()
}

async fn key(hub: &Hub, scopes: &[&str]) -> (String, String) {
    let (status, v) = hub.call("POST", "/api/v1/api-keys", Some(json!({"name": "k", "scopes": scopes}))).await;
    assert_eq!(status, 201, "{v}");
    (text(&v, "id"), text(&v, "secret"))
}

/// A plain call with another credential, headers and all.
async fn status(hub: &Hub, path: &str, bearer: &str, origin: Option<&str>) -> (u16, String) {
    let web = reqwest::Client::builder().no_proxy().build().unwrap();
    let mut r = web.get(format!("{}{path}", hub.http)).bearer_auth(bearer);
    if let Some(o) = origin {
        r = r.header("origin", o);
    }
    let answer = r.send().await.unwrap();
    let status = answer.status().as_u16();
    if status == 200 {
        return (status, String::new());
    }
    let problem: Value = answer.json().await.unwrap();
    (status, text(&problem, "code"))
}

/// Reads until this task has ended; gives the types of its events and their ids.
async fn life(task: &str, mut next: impl AsyncFnMut() -> Value) -> Vec<(String, String)> {
    let mut seen = vec![];
    loop {
        let e = next().await;
        if e["topic"] != "tasks" || e["data"]["task_id"] != task {
            continue;
        }
        let kind = text(&e, "type");
        seen.push((kind.clone(), text(&e, "id")));
        if kind == "ended" {
            assert_eq!(e["data"]["state"], "failed");
            assert_eq!(e["data"]["reason"]["code"], "exit");
            assert_eq!(e["data"]["exit_code"], 3);
            assert_eq!(e["data"]["attempt"], 1);
            assert!(text(&e["data"], "node_id").starts_with("node_"));
            assert!(text(&e, "at").ends_with('Z'));
            return seen;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_is_told_in_order_and_a_node_that_goes_at_once() {
    let hub = Hub::start().await;
    let mut before = Sse::open(&hub, "?topics=nodes", None).await;
    let mut node = Node::join(&hub, "a").await;
    let mut kinds = vec![];
    while kinds.last().is_none_or(|k| k != "online") {
        let e = before.event().await;
        assert_eq!(e["data"]["node_id"], node.id.as_str());
        kinds.push(text(&e, "type"));
    }
    assert_eq!(kinds, ["enrolled", "registered", "online"]);

    let (_, secret) = key(&hub, &["*"]).await;
    let mut sse = Sse::open(&hub, "", None).await;
    let mut socket = ws(&hub, "?topics=tasks,sessions", &secret, Some(&hub.http)).await.unwrap();
    let (status, session) = hub.call("POST", "/api/v1/sessions", Some(json!({"name": "s"}))).await;
    assert_eq!(status, 201);
    let session = text(&session, "id");
    let attach = format!("/api/v1/sessions/{session}/nodes/{}", node.id);
    assert_eq!(hub.call("PUT", &attach, None).await.0, 200);
    assert_eq!(hub.call("PUT", &attach, None).await.0, 200);
    let path = format!("/api/v1/sessions/{session}/dispatch");
    let (_, task) = hub.call("POST", &path, Some(json!({"shell": {"argv": ["sh", "-c", "exit 3"]}}))).await;
    let task = text(&task, "id");
    let over_sse = life(&task, async || sse.event().await).await;
    let words: Vec<&str> = over_sse.iter().map(|(k, _)| k.as_str()).collect();
    assert_eq!(words, ["accepted", "assigned", "started", "ended"]);

    // The socket: the same events under the same ids, and what the session went through.
    for (kind, data) in
        [("created", json!({"session_id": session, "name": "s"})), ("attached", json!({"session_id": session, "node_id": node.id}))]
    {
        let e = ws_event(&mut socket).await;
        assert_eq!((&e["topic"], &e["type"], &e["data"]), (&json!("sessions"), &json!(kind), &data));
    }
    assert_eq!(life(&task, async || ws_event(&mut socket).await).await, over_sse);
    assert_eq!(hub.call("DELETE", &attach, None).await.0, 204);
    assert_eq!(hub.call("DELETE", &format!("/api/v1/sessions/{session}"), None).await.0, 204);
    assert_eq!(ws_event(&mut socket).await["type"], "detached");
    assert_eq!(ws_event(&mut socket).await["type"], "closed");

    // A cancel of what waits ends it.
    let asked = Instant::now();
    node.daemon().signal(rustix::process::Signal::TERM);
    let offline = loop {
        let e = sse.event().await;
        if e["type"] == "offline" {
            break e;
        }
    };
    // One second is the goal on a quiet machine; silence alone would take fifteen.
    assert!(asked.elapsed() < Duration::from_secs(14), "told after {:?}", asked.elapsed());
    assert_eq!(offline["data"], json!({"node_id": node.id}));
    let waiting = hub.dispatch(json!({"node": node.id, "echo": {"payload": "x"}})).await;
    assert_eq!(hub.call("POST", &format!("/api/v1/tasks/{}/cancel", text(&waiting, "id")), None).await.0, 202);
    for kind in ["accepted", "cancel_requested", "ended"] {
        assert_eq!(ws_event(&mut socket).await["type"], kind);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_comes_back_loses_nothing_and_sees_nothing_twice() {
    let mut hub = Hub::start().await;
    let _node = Node::join(&hub, "a").await;
    let (_, secret) = key(&hub, &["*"]).await;
    const TASKS: usize = 40;
    let mut whole = Sse::open(&hub, "?topics=tasks", None).await;
    let mut broken = Sse::open(&hub, "?topics=tasks", None).await;
    let mut socket = ws(&hub, "?topics=tasks", &secret, None).await.unwrap();
    let work = async {
        for _ in 0..TASKS {
            hub.dispatch(json!({"echo": {"payload": "x"}, "wait_secs": 20})).await;
        }
    };
    let read_whole = async {
        let (mut ids, mut ended) = (vec![], 0);
        while ended < TASKS {
            let e = whole.event().await;
            ended += usize::from(e["type"] == "ended");
            ids.push(text(&e, "id"));
        }
        ids
    };
    let read_broken = async {
        let (mut ids, mut ended) = (vec![], 0);
        while ended < TASKS {
            let e = broken.event().await;
            ended += usize::from(e["type"] == "ended");
            ids.push(text(&e, "id"));
            if ids.len() % 7 == 0 {
                let last = broken.last_id.take().unwrap();
                assert_eq!(last, *ids.last().unwrap());
                // Once by the header, once by the query, which a header outweighs.
                broken = if ids.len() % 2 == 0 {
                    Sse::open(&hub, "?topics=tasks&after=outdated", Some(&last)).await
                } else {
                    Sse::open(&hub, &format!("?topics=tasks&after={last}"), None).await
                };
            }
        }
        ids
    };
    let read_socket = async {
        let (mut ids, mut ended) = (vec![], 0);
        while ended < TASKS {
            let e = ws_event(&mut socket).await;
            ended += usize::from(e["type"] == "ended");
            ids.push(text(&e, "id"));
            if ids.len() % 11 == 0 {
                socket = ws(&hub, &format!("?topics=tasks&after={}", ids.last().unwrap()), &secret, None).await.unwrap();
            }
        }
        ids
    };
    let ((), whole_ids, broken_ids, socket_ids) = futures::join!(work, read_whole, read_broken, read_socket);
    let distinct: std::collections::BTreeSet<_> = whole_ids.iter().collect();
    assert_eq!(distinct.len(), whole_ids.len());
    assert!(whole_ids.len() >= 3 * TASKS);
    assert_eq!(broken_ids, whole_ids);
    assert_eq!(socket_ids, whole_ids);

    // Another life of the hub does not know the ids of the last.
    let old = whole_ids.last().unwrap().clone();
    hub.crash_and_restart().await;
    let mut sse = Sse::open(&hub, "", Some(&old)).await;
    let mut reset = vec![];
    for _ in 0..3 {
        let e = sse.event().await;
        assert_eq!(e["type"], "reset");
        reset.push(text(&e, "topic"));
    }
    assert_eq!(reset, ["nodes", "tasks", "sessions"]);
    let place = sse.last_id.clone().unwrap();
    let mut socket = ws(&hub, &format!("?topics=sessions&after={old}"), &secret, None).await.unwrap();
    let e = ws_event(&mut socket).await;
    assert_eq!((&e["type"], &e["topic"]), (&json!("reset"), &json!("sessions")));
    assert_eq!(hub.call("POST", "/api/v1/sessions", Some(json!({"name": "s"}))).await.0, 201);
    assert_eq!(ws_event(&mut socket).await["type"], "created");
    let mut again = Sse::open(&hub, "?topics=sessions", Some(&place)).await;
    assert_eq!(again.event().await["type"], "created", "the reset's id is a place to come back to");
}

#[tokio::test(flavor = "multi_thread")]
async fn only_who_may_hears_what_it_may() {
    let hub = Hub::start().await;
    let (key_id, nodes_only) = key(&hub, &["nodes:read"]).await;
    let (_, no_topic) = key(&hub, &["tasks:dispatch"]).await;
    let (_, all) = key(&hub, &["*"]).await;

    for (query, bearer, wanted) in [
        ("?topics=tasks", &nodes_only, (403, "forbidden")),
        ("?topics=nodes,tasks", &nodes_only, (403, "forbidden")),
        ("?topics=audit", &all, (403, "forbidden")),
        ("", &no_topic, (403, "forbidden")),
        ("?topics=bogus", &all, (400, "bad_topic")),
        ("?topics=", &all, (400, "bad_topic")),
        ("?topics=tasks,bogus", &nodes_only, (400, "bad_topic")),
        ("?topics=files", &all, (422, "not_yet")),
        ("?access_token=x", &all, (400, "bad_query")),
    ] {
        let (code, word) = status(&hub, &format!("/api/v1/events{query}"), bearer, None).await;
        assert_eq!((code, word.as_str()), wanted, "SSE {query}");
        assert_eq!(ws(&hub, query, bearer, None).await.err(), Some(wanted.0), "WS {query}");
    }
    assert_eq!(status(&hub, "/api/v1/events", &all, Some(&hub.http)).await.0, 200);
    let (code, word) = status(&hub, "/api/v1/ws", &all, None).await;
    assert_eq!((code, word.as_str()), (400, "bad_upgrade"), "a plain GET is told what is missing");
    assert_eq!(hub.call("POST", "/api/v1/events", Some(json!({}))).await.0, 405);
    assert_eq!(hub.call("POST", "/api/v1/ws", Some(json!({}))).await.0, 405);

    // By default a key hears what it may read: here nodes alone, although sessions were first.
    let mut socket = ws(&hub, "", &nodes_only, None).await.unwrap();
    assert_eq!(hub.call("POST", "/api/v1/sessions", Some(json!({"name": "s"}))).await.0, 201);
    let node = Node::join(&hub, "a").await;
    let mut kinds = vec![];
    while kinds.last().is_none_or(|k| k != "online") {
        let e = ws_event(&mut socket).await;
        assert_eq!((&e["topic"], &e["data"]["node_id"]), (&json!("nodes"), &json!(node.id)));
        kinds.push(text(&e, "type"));
    }
    // The hub throws away what a client says.
    socket.send(Message::text("{\"topics\":\"tasks\"}")).await.unwrap();
    hub.dispatch(json!({"echo": {"payload": "x"}, "wait_secs": 20})).await;
    // The key goes: the stream ends at once, and says why.
    assert_eq!(hub.call("DELETE", &format!("/api/v1/api-keys/{key_id}"), None).await.0, 204);
    let closed = loop {
        match ws_next(&mut socket).await {
            Message::Close(frame) => break frame.expect("a reason"),
            other => assert!(other.to_text().unwrap().contains("\"nodes\""), "{other}"),
        }
    };
    assert_eq!(u16::from(closed.code), 1008);
    assert!(closed.reason.contains("has ended"), "{}", closed.reason);
}

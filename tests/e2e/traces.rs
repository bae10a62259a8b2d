//! Who asked for what, from the request through hub and node: log lines that can be joined, none of which
//! tells a secret, and spans for a receiver of OpenTelemetry.

use mesh_tests::{Hub, Node, PASSWORD, PATIENCE, text, until};
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::trace::v1::Span;
use prost::Message;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const PARENT: &str = "00f067aa0ba902b7";

/// The lines of a JSON log about one task, by their message.
fn steps(log: &str, task: &str) -> Vec<Value> {
    let lines = log.lines().filter_map(|l| serde_json::from_str::<Value>(l).ok());
    lines.filter(|l| l["target"] == "task" && l["task"] == task).collect()
}

fn messages(steps: &[Value]) -> Vec<&str> {
    steps.iter().filter_map(|s| s["message"].as_str()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn lines_of_hub_and_node_are_joined_and_tell_no_secret() {
    let env = [("CORTEX_LOG_FORMAT", "json"), ("CORTEX_LOG_LEVEL", "debug")];
    let hub = Hub::start_with(&env, &[]).await;
    let mut node = Node::join(&hub, "n").await;
    node.daemon().terminate().await;
    node.offline(&hub).await;
    let log = node.dir.path().join("loud.log");
    let mut loud = node.command(&["run", "--log", "debug", "--log-json"]);
    node.process = Some(mesh_tests::Process::start(&mut loud, log));
    node.online(&hub).await;

    let (status, key) = hub.call("POST", "/api/v1/api-keys", Some(json!({"name": "k", "scopes": ["*"]}))).await;
    assert_eq!(status, 201, "{key}");
    let secret = text(&key, "secret");
    let body = json!({
        "shell": {"argv": ["sh", "-c", "cat; echo argv-geheim >&2; exit 3", "argv-geheim"], "env": {"TOKEN": "env-geheim"}, "stdin": "stdin-geheim"},
        "wait_secs": 20,
    });
    let request = reqwest::Client::builder().no_proxy().build().unwrap().post(format!("{}/api/v1/dispatch", hub.http));
    let request =
        request.bearer_auth(&secret).header("X-Request-Id", "my-request-7").header("traceparent", format!("00-{TRACE}-{PARENT}-01"));
    let answer = request.json(&body).send().await.unwrap();
    assert_eq!(answer.headers()["x-request-id"], "my-request-7");
    let t: Value = answer.json().await.unwrap();
    assert_eq!((t["state"].as_str(), t["stdout"].as_str()), (Some("failed"), Some("stdin-geheim")));
    let id = text(&t, "id");

    // What a node logs at the end may come after our answer.
    until("the node's last line", async || messages(&steps(&node.daemon().log(), &id)).contains(&"result acknowledged").then_some(()))
        .await;
    let (at_hub, at_node) = (steps(&hub.process.log(), &id), steps(&node.daemon().log(), &id));
    assert_eq!(messages(&at_hub), ["accepted", "order sent", "started", "result stored"]);
    assert_eq!(messages(&at_node), ["received", "started", "ended", "result acknowledged"]);
    for step in at_hub.iter().chain(&at_node) {
        assert_eq!((step["request_id"].as_str(), step["attempt"].as_u64()), (Some("my-request-7"), Some(1)), "{step}");
    }
    assert_eq!(at_hub[3]["reason"], "exit");
    // The line of the request itself has the trace that its caller named.
    let lines: Vec<Value> = hub.process.log().lines().filter_map(|l| serde_json::from_str(l).ok()).collect();
    let answered = lines.iter().find(|l| l["message"] == "answered" && l["span"]["request_id"] == "my-request-7").expect("an access line");
    let span = &answered["span"];
    assert_eq!(
        (span["trace_id"].as_str(), span["route"].as_str(), span["door"].as_str()),
        (Some(TRACE), Some("/api/v1/dispatch"), Some("http"))
    );
    assert_eq!(span["user"], t["actor"]["user_id"], "{t}");

    let (status, login) = hub.call("POST", "/api/v1/auth/login", Some(json!({"username": "admin", "password": PASSWORD}))).await;
    assert_eq!(status, 200);
    let tokens = [text(&login, "access_token"), text(&login, "refresh_token")];
    let (status, _) = hub.call("POST", "/api/v1/auth/refresh", Some(json!({"refresh_token": tokens[1]}))).await;
    assert_eq!(status, 200);
    let (hub_log, node_log) = (hub.process.log(), node.daemon().log());
    for secret in ["geheim", PASSWORD, &secret, &tokens[0], &tokens[1], "PRIVATE KEY"] {
        assert!(!hub_log.contains(secret) && !node_log.contains(secret), "{secret:?} stands in a log");
    }
}

/// A receiver of spans: answers every export with nothing, and gives what came.
async fn receive(listener: TcpListener, found: tokio::sync::mpsc::Sender<Span>) {
    loop {
        let (io, _) = listener.accept().await.unwrap();
        let found = found.clone();
        tokio::runtime::Handle::current().spawn(async move {
            let mut io = io;
            while let Some((head, body)) = request(&mut io).await {
                assert!(head.starts_with("POST /v1/traces HTTP/1.1"), "{head}");
                assert!(head.to_lowercase().contains("content-type: application/x-protobuf"), "{head}");
                let export = ExportTraceServiceRequest::decode(body.as_slice()).expect("OTLP");
                for resource in export.resource_spans {
                    for span in resource.scope_spans.into_iter().flat_map(|s| s.spans) {
                        let _ = found.send(span).await;
                    }
                }
                let _ = io.write_all(b"HTTP/1.1 200 OK\r\nContent-Type: application/x-protobuf\r\nContent-Length: 0\r\n\r\n").await;
            }
        });
    }
}

async fn request(io: &mut TcpStream) -> Option<(String, Vec<u8>)> {
    let mut seen = vec![];
    loop {
        if let Some(end) = seen.windows(4).position(|w| w == b"\r\n\r\n") {
            let head = String::from_utf8(seen[..end].to_vec()).unwrap();
            let length = head.lines().find_map(|l| l.to_lowercase().strip_prefix("content-length: ")?.parse::<usize>().ok())?;
            while seen.len() < end + 4 + length {
                (io.read_buf(&mut seen).await.ok()? > 0).then_some(())?;
            }
            return Some((head, seen[end + 4..end + 4 + length].to_vec()));
        }
        (io.read_buf(&mut seen).await.ok()? > 0).then_some(())?;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dispatch_is_a_span_of_the_trace_that_its_caller_named() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let (found, mut spans) = tokio::sync::mpsc::channel(1000);
    let receiver = tokio::runtime::Handle::current().spawn(receive(listener, found));
    let mut hub = Hub::start_with(&[("CORTEX_LOG_OTLP_ENDPOINT", &endpoint)], &[]).await;
    let traceparent = format!("00-{TRACE}-{PARENT}-01");
    let request = hub.request("POST", "/api/v1/dispatch").header("traceparent", &traceparent).json(&json!({"echo": {"payload": "x"}}));
    assert_eq!(request.send().await.unwrap().status().as_u16(), 202);
    // The stop sends what is left.
    assert_eq!(hub.process.terminate().await.code(), Some(0));
    let hex = |b: &[u8]| b.iter().map(|b| format!("{b:02x}")).collect::<String>();
    // What was sent may still lie in a socket: up to ours, and then to the end of all connections.
    let mut all: Vec<Span> = vec![];
    while !all.iter().any(|s| hex(&s.trace_id) == TRACE) {
        all.push(tokio::time::timeout(PATIENCE, spans.recv()).await.expect("our span comes").unwrap());
    }
    receiver.abort();
    let _ = receiver.await;
    while let Some(span) = tokio::time::timeout(PATIENCE, spans.recv()).await.expect("the hub's connections end") {
        all.push(span);
    }
    let ours: Vec<&Span> = all.iter().filter(|s| hex(&s.trace_id) == TRACE).collect();
    assert_eq!(ours.len(), 1, "{all:?}");
    assert_eq!((hex(&ours[0].parent_span_id).as_str(), ours[0].name.as_str()), (PARENT, "POST /api/v1/dispatch"));
    assert!(all.len() > 1, "requests without a trace have their own");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_receiver_that_is_away_hurts_nobody() {
    let gone = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let mut hub = Hub::start_with(&[("CORTEX_LOG_OTLP_ENDPOINT", &format!("http://{gone}"))], &[]).await;
    hub.dispatch(json!({"echo": {"payload": "x"}})).await;
    assert_eq!(hub.process.terminate().await.code(), Some(0));
}

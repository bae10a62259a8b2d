//! The same hub with its events on a real Redis: who comes back after a restart missed nothing.

use futures::StreamExt;
use hub_testkit::redis::Server;
use mesh_tests::{Hub, Node, PATIENCE, text, until};
use serde_json::{Value, json};
use std::net::TcpListener;
use std::sync::Arc;

/// An event stream, read one event at a time.
struct Sse {
    body: futures::stream::BoxStream<'static, Result<Vec<u8>, reqwest::Error>>,
    buffer: String,
}

impl Sse {
    async fn open(hub: &Hub, query: &str, last_id: Option<&str>) -> Self {
        let mut r = hub.request("GET", &format!("/api/v1/events{query}"));
        if let Some(id) = last_id {
            r = r.header("last-event-id", id);
        }
        let answer = r.send().await.unwrap();
        assert_eq!(answer.status().as_u16(), 200);
        Self { body: answer.bytes_stream().map(|b| b.map(|b| b.to_vec())).boxed(), buffer: String::new() }
    }

    async fn event(&mut self) -> Value {
        loop {
            while let Some(at) = self.buffer.find("\n\n") {
                let block: String = self.buffer.drain(..at + 2).collect();
                if let Some(data) = block.lines().find_map(|l| l.strip_prefix("data: ")) {
                    return serde_json::from_str(data).unwrap();
                }
            }
            let piece = tokio::time::timeout(PATIENCE, self.body.next()).await.expect("an event in time");
            self.buffer.push_str(std::str::from_utf8(&piece.expect("the stream goes on").unwrap()).unwrap());
        }
    }
    /// The events of a task up to its end.
    async fn life(&mut self, task: &str) -> Vec<Value> {
        let mut all = vec![];
        while all.last().is_none_or(|e: &Value| e["type"] != "ended") {
            let e = self.event().await;
            assert_eq!(e["data"]["task_id"], task, "nothing else, and no reset: {e}");
            all.push(e);
        }
        all
    }
    async fn reset(&mut self) {
        while self.event().await["type"] != "reset" {}
    }
}

async fn on(server: &Arc<Server>, what: impl FnOnce(&Server) + Send + 'static) {
    let server = server.clone();
    tokio::task::spawn_blocking(move || what(&server)).await.unwrap();
}
async fn started(options: Vec<String>) -> Arc<Server> {
    let start = move || Server::start_with(&options.iter().map(String::as_str).collect::<Vec<_>>());
    Arc::new(tokio::task::spawn_blocking(start).await.unwrap())
}
async fn echo(hub: &Hub) -> String {
    let t = hub.dispatch(json!({"echo": {"payload": "x"}, "wait_secs": 20})).await;
    text(&hub.finished(&text(&t, "id")).await, "id")
}
async fn connected(hub: &Hub, wanted: &str) {
    let facts: Value = serde_json::from_slice(&std::fs::read(hub.data().join("hub.json")).unwrap()).unwrap();
    let url = format!("http://{}/metrics", text(&facts, "metrics"));
    let line = format!("cortex_bus_connected {wanted}");
    let web = reqwest::Client::builder().no_proxy().build().unwrap();
    until(&line, async || {
        let metrics = web.get(&url).send().await.ok()?.text().await.ok()?;
        metrics.lines().any(|l| l == line).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_comes_back_missed_nothing_until_redis_forgets() {
    let server = started(vec!["--requirepass".into(), "geheim".into()]).await;
    let url = format!("redis://:geheim@127.0.0.1:{}/1", server.port());
    let mut hub = Hub::start_with(&[("CORTEX_REDIS_URL", &url)], &[]).await;
    let mut node = Node::join(&hub, "n").await;
    connected(&hub, "1").await;
    let mut sse = Sse::open(&hub, "?topics=tasks", None).await;
    let task = echo(&hub).await;
    let life = sse.life(&task).await;
    let first = text(&life[0], "id");

    // The hub dies; its stream is where it was.
    hub.crash_and_restart().await;
    node.online(&hub).await;
    let mut sse = Sse::open(&hub, "?topics=tasks", Some(&first)).await;
    assert_eq!(sse.life(&task).await, life[1..], "the same events under the same ids");
    let task = echo(&hub).await;
    let life = sse.life(&task).await;

    // Redis is away: readers of this hub hear it go on, and it is ready.
    on(&server, Server::crash).await;
    connected(&hub, "0").await;
    assert_eq!(hub.call("GET", "/readyz", None).await.0, 200);
    let task = echo(&hub).await;
    sse.life(&task).await;
    on(&server, Server::again).await;
    connected(&hub, "1").await;
    sse.reset().await;
    let task = echo(&hub).await;
    sse.life(&task).await;
    // What stood in a stream that is gone cannot be resumed after.
    Sse::open(&hub, "?topics=tasks", Some(&text(&life[0], "id"))).await.reset().await;

    on(&server, |s| assert_eq!(s.commands(&[&[b"AUTH", b"geheim"], &[b"FLUSHALL"]]), "+OK")).await;
    sse.reset().await;
    let task = echo(&hub).await;
    let life = sse.life(&task).await;
    let log = hub.process.log();
    assert!(!log.contains("geheim"), "{log}");
    assert!(log.contains("Redis is away") && log.contains("events are carried by Redis"), "{log}");
    assert!(hub.process.terminate().await.success());
    hub.restart().await;
    let mut sse = Sse::open(&hub, "?topics=tasks", Some(&text(&life[0], "id"))).await;
    assert_eq!(sse.life(&task).await, life[1..]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hub_starts_while_redis_is_away() {
    // Bound and not listened on: nobody answers there, and nobody else is given it.
    let nobody = tokio::net::TcpSocket::new_v4().unwrap();
    nobody.bind(([127, 0, 0, 1], 0).into()).unwrap();
    let url = format!("redis://hub:geheim@127.0.0.1:{}", nobody.local_addr().unwrap().port());
    let hub = Hub::start_with(&[("CORTEX_REDIS_URL", &url)], &[]).await;
    assert_eq!(hub.call("GET", "/readyz", None).await.0, 200);
    let mut sse = Sse::open(&hub, "?topics=sessions", Some("of-another-life")).await;
    sse.reset().await;
    let (status, session) = hub.call("POST", "/api/v1/sessions", Some(json!({"name": "s"}))).await;
    assert_eq!(status, 201, "{session}");
    assert_eq!(sse.event().await["data"]["session_id"], session["id"]);
    let log = hub.process.log();
    assert!(log.contains("the hub starts without Redis") && log.contains("Redis is away"), "{log}");
    assert!(!log.contains("geheim"), "{log}");
}

/// A server that shows a certificate, to a hub that knows its authority and to one that does not.
#[tokio::test(flavor = "multi_thread")]
async fn a_redis_is_trusted_by_its_certificate() {
    use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
    let dir = mesh_tests::folder();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let (root_key, key) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
    let mut root = CertificateParams::default();
    root.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let root_pem = root.self_signed(&root_key).unwrap().pem();
    let leaf = CertificateParams::new(vec!["localhost".into()]).unwrap();
    let leaf_pem = leaf.signed_by(&key, &Issuer::from_params(&root, &root_key)).unwrap().pem();
    for (name, pem) in [("root.pem", root_pem), ("leaf.pem", leaf_pem), ("key.pem", key.serialize_pem())] {
        std::fs::write(path(name), pem).unwrap();
    }
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let options = [
        ("--tls-port", port.to_string()),
        ("--tls-cert-file", path("leaf.pem")),
        ("--tls-key-file", path("key.pem")),
        ("--tls-ca-cert-file", path("root.pem")),
        ("--tls-auth-clients", "no".into()),
    ];
    let _server = started(options.into_iter().flat_map(|(k, v)| [k.to_owned(), v]).collect()).await;
    let url = format!("rediss://localhost:{port}");
    let knows = Hub::start_with(&[("CORTEX_REDIS_URL", &url), ("SSL_CERT_FILE", &path("root.pem"))], &[]).await;
    connected(&knows, "1").await;
    let stranger = Hub::start_with(&[("CORTEX_REDIS_URL", &url)], &[]).await;
    connected(&stranger, "0").await;
    let log = stranger.process.log();
    assert!(log.contains("UnknownIssuer"), "{log}");
}

//! A node whose certificate ended while it slept, or while its hub was away, comes back by itself.
#![expect(clippy::disallowed_methods, reason = "tests start the real binaries and watch the real clock")]

use mesh_core::{HubId, enrol};
use mesh_process::SystemClock;
use mesh_tests::{Hub, Node, alive, folder, shown, text, until};
use mesh_wire::node::enrolment_client::EnrolmentClient;
use mesh_wire::node::{RecoverReply, RecoverRequest};
use node::enrolment::validity;
use node::link::time::NodeTime;
use node::state::DataDir;
use node::tls;
use rcgen::{PublicKeyData, SigningKey};
use serde_json::{Value, json};
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// A hub in this process, since no setting makes certificates that end within seconds.
struct Short {
    hub: hub::serve::Hub,
    url: String,
    token: String,
    web: reqwest::Client,
}

impl Short {
    async fn start(data: &Path, ports: Option<[std::net::SocketAddr; 2]>) -> Self {
        let flags = hub::config::Flags { data_dir: Some(data.to_owned()), ..Default::default() };
        let mut config = hub::config::Config::load(&flags).unwrap();
        let any = "127.0.0.1:0".parse().unwrap();
        [config.http_addr, config.node_addr] = ports.unwrap_or([any; 2]);
        config.metrics_addr = any;
        config.admin_password = Some(mesh_tests::PASSWORD.into());
        config.certificate = Duration::from_secs(6);
        let hub = hub::serve::Hub::start(config, SystemClock::shared()).await.unwrap();
        let web = reqwest::Client::builder().no_proxy().build().unwrap();
        let url = format!("http://{}/api/v1", hub.http);
        let login = web.post(format!("{url}/auth/login")).json(&json!({"username": "admin", "password": mesh_tests::PASSWORD}));
        let token = text(&login.send().await.unwrap().json().await.unwrap(), "access_token");
        Self { hub, url, token, web }
    }
    async fn get(&self, path: &str) -> Value {
        self.web.get(format!("{}{path}", self.url)).bearer_auth(&self.token).send().await.unwrap().json().await.unwrap()
    }
    async fn post(&self, path: &str, body: Value) -> Value {
        self.web.post(format!("{}{path}", self.url)).bearer_auth(&self.token).json(&body).send().await.unwrap().json().await.unwrap()
    }
    async fn is(&self, status: &str) -> Value {
        until(&format!("the node {status}"), async || Some(self.get("/nodes").await["items"][0].clone()).filter(|n| n["status"] == status))
            .await
    }
    async fn finished(&self, id: &str) -> Value {
        until("the task to end", async || {
            let t = self.get(&format!("/tasks/{id}")).await;
            ["succeeded", "failed", "cancelled"].contains(&t["state"].as_str()?).then_some(t)
        })
        .await
    }
}

/// Waits until the certificate that lies in the node's folder has ended.
async fn ended(node: &Node) {
    until("the certificate to end", async || {
        let der = std::fs::read(node.data().join("certificate.der")).unwrap();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis() as i64;
        (validity(&der).unwrap().not_after_ms < now).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_comes_back_by_itself_after_its_certificates_end() {
    mesh_process::install_tls_provider();
    let dir = folder();
    let data = dir.path().join("hub");
    let hub = Short::start(&data, None).await;
    let invite = hub.post("/nodes/invites", json!({"name": "short"})).await;
    let mut node = Node::prepare("short", &text(&invite, "config_yaml"));
    let out = node.command(&["join", "invite.yaml", "--enroll-only"]).output().unwrap();
    assert!(out.status.success(), "{}", shown(&out));
    node.run();
    hub.is("online").await;

    // The daemon dies; its task goes on, and ends while nobody can be told.
    let gate = node.dir.path().join("gate");
    let script = format!("i=0; while [ ! -e {} ]; do i=$((i+1)); echo line $i; sleep 0.05; done; echo $i >&2", gate.display());
    let t = hub.post("/dispatch", json!({"shell": {"argv": ["sh", "-c", script]}})).await;
    let id = text(&t, "id");
    until("the task to run", async || (hub.get(&format!("/tasks/{id}")).await["state"] == "running").then_some(())).await;
    node.daemon().kill9();
    hub.is("offline").await;
    std::fs::write(&gate, "").unwrap();
    until("the task to have ended at its node", async || alive(&gate.display().to_string()).is_empty().then_some(())).await;
    ended(&node).await;

    node.run();
    let t = hub.finished(&id).await;
    assert_eq!((t["state"].as_str(), t["attempt"].as_u64()), (Some("succeeded"), Some(1)), "{t}");
    let (out, count) = (text(&t, "stdout"), text(&t, "stderr"));
    assert!(out.lines().enumerate().all(|(i, l)| l == format!("line {}", i + 1)), "whole, once, in order: {out}");
    assert_eq!(out.lines().count().to_string(), count.trim());
    hub.is("online").await;
    assert!(node.daemon().log().contains("its hub is asked for a new one"), "{}", node.daemon().log());

    // The hub is away over the certificate's end; the daemon is there all the time.
    let ports = [hub.hub.http, hub.hub.node];
    assert!(hub.hub.stop().await, "a clean stop");
    ended(&node).await;
    let hub = Short::start(&data, Some(ports)).await;
    hub.is("online").await;
    let t = hub.post("/dispatch", json!({"shell": {"argv": ["sh", "-c", "echo again"]}})).await;
    assert_eq!(hub.finished(&text(&t, "id")).await["stdout"], "again\n");
    assert!(node.daemon().is_running());
    let _ = node.command(&["stop"]).output();
    assert!(hub.hub.stop().await, "a clean stop");
}

/// A channel without a certificate, and what binds a proof to it.
async fn channel(hub: &Hub) -> (EnrolmentClient<tonic::transport::Channel>, [u8; 32]) {
    let pin = tls::spki_sha256(&std::fs::read(hub.data().join("keys/root.crt")).unwrap()).unwrap();
    let config = tls::client_config(pin, None, NodeTime::new(0, SystemClock::shared())).unwrap();
    let stream = tls::connect(&hub.node, &enrol::server_name(id_of(hub)), config).await.unwrap();
    let exporter = stream.get_ref().1.export_keying_material([0; 32], enrol::EXPORTER_LABEL, None).unwrap();
    (EnrolmentClient::new(tls::channel(stream).await.unwrap()), exporter)
}

fn id_of(hub: &Hub) -> HubId {
    std::fs::read_to_string(hub.data().join("keys/hub-id")).unwrap().trim().parse().unwrap()
}

fn request(hub: &Hub, node: &str, key: &rcgen::KeyPair, exporter: &[u8; 32], counter: u64) -> RecoverRequest {
    let (node_id, nonce) = (node.to_owned(), [7; 32]);
    let spki = mesh_core::sha256(&key.subject_public_key_info());
    let proof = enrol::recover_bytes(id_of(hub), node.parse().unwrap(), exporter, &spki, counter, &nonce);
    let csr = rcgen::CertificateParams::new(Vec::<String>::new()).unwrap().serialize_request(key).unwrap();
    RecoverRequest { node_id, csr_der: csr.der().to_vec(), counter, nonce: nonce.to_vec(), proof: key.sign(&proof).unwrap(), roots: vec![] }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_recovery_is_bound_to_key_node_channel_and_counter() {
    mesh_process::install_tls_provider();
    let hub = Hub::start().await;
    let mut node = Node::join(&hub, "n").await;
    let mut other = Node::join(&hub, "o").await;
    for n in [&mut node, &mut other] {
        n.daemon().terminate().await;
    }
    let identity = DataDir::new(node.data()).identity().unwrap();
    let theirs = DataDir::new(other.data()).identity().unwrap();
    let fresh = rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();

    let (mut one, exporter) = channel(&hub).await;
    let (mut two, exporter_two) = channel(&hub).await;
    let good = request(&hub, &node.id, identity.key(), &exporter, 1);
    let said = |r: Result<tonic::Response<RecoverReply>, tonic::Status>| {
        let s = r.expect_err("it is refused");
        (s.code(), s.message().split(':').next().unwrap_or_default().to_owned())
    };
    for (what, r) in [
        ("overheard on another channel", good.clone()),
        ("by a key that nobody knows", request(&hub, &node.id, &fresh, &exporter_two, 1)),
        ("by another node's key", request(&hub, &node.id, theirs.key(), &exporter_two, 1)),
        ("for another node", request(&hub, &other.id, identity.key(), &exporter_two, 1)),
    ] {
        assert_eq!(said(two.recover(r).await).0, tonic::Code::Unauthenticated, "{what}");
    }
    assert_eq!(said(two.recover(request(&hub, &node.id, identity.key(), &exporter_two, 65)).await).1, "stale_counter");
    let mut damaged = request(&hub, &node.id, identity.key(), &exporter_two, 1);
    damaged.csr_der.truncate(40);
    assert_eq!(said(two.recover(damaged).await).0, tonic::Code::InvalidArgument);

    let first = one.recover(good).await.unwrap().into_inner().certificate.unwrap();
    assert_eq!(first.counter, 1);
    let again = two.recover(request(&hub, &node.id, identity.key(), &exporter_two, 1)).await.unwrap().into_inner();
    assert_eq!(again.certificate.unwrap(), first, "the answer was lost: the same again");
    assert_eq!(said(two.recover(request(&hub, &node.id, identity.key(), &exporter_two, 66)).await).1, "stale_counter");

    assert_eq!(hub.call("POST", &format!("/api/v1/nodes/{}/revoke", node.id), None).await.0, 200);
    let (mut three, exporter) = channel(&hub).await;
    let refused = said(three.recover(request(&hub, &node.id, identity.key(), &exporter, 2)).await);
    assert_eq!(refused, (tonic::Code::PermissionDenied, "revoked".to_owned()));
    let refused = said(three.recover(request(&hub, &node.id, &fresh, &exporter, 2)).await);
    assert_eq!(refused.0, tonic::Code::Unauthenticated, "another key learns nothing");
}

//! What a machine can still do with what it has, once it may no longer; and what it cannot make of it.
#![expect(clippy::disallowed_methods, reason = "tests start the real binaries and watch the real clock")]

use mesh_core::{HubId, InviteId, NodeId, enrol};
use mesh_tests::{Hub, PATIENCE, text, until};
use mesh_wire::node::enrolment_client::EnrolmentClient;
use mesh_wire::node::node_link_client::NodeLinkClient;
use mesh_wire::node::{self as wire, OrdersBody, hub_frame, node_data, node_frame};
use prost::Message;
use rcgen::{CertificateParams, ExtendedKeyUsagePurpose, Issuer, KeyPair, KeyUsagePurpose, PublicKeyData, SanType, SigningKey};
use rustls::HandshakeKind;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use serde_json::json;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::io::AsyncReadExt;
use tokio::net::TcpSocket;
use tokio::sync::mpsc;
use tokio_rustls::client::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Status};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

type Tls = TlsStream<tokio::net::TcpStream>;

/// A machine whose key the test holds.
struct Machine {
    hub: HubId,
    root: Vec<u8>,
    address: SocketAddr,
    key: KeyPair,
    invite: node::config::Invite,
    id: NodeId,
    certificate: Vec<u8>,
}

/// Made of chain and key; it resumes sessions where the other side lets it.
fn config(root: &[u8], own: Option<(Vec<Vec<u8>>, &KeyPair)>) -> Arc<rustls::ClientConfig> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from(root.to_vec())).unwrap();
    let builder = rustls::ClientConfig::builder().with_root_certificates(roots);
    let mut config = match own {
        None => builder.with_no_client_auth(),
        Some((chain, key)) => {
            let chain = chain.into_iter().map(CertificateDer::from).collect();
            builder.with_client_auth_cert(chain, PrivateKeyDer::try_from(key.serialize_der()).unwrap()).unwrap()
        }
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    Arc::new(config)
}

async fn dial(hub: HubId, address: SocketAddr, from: [u8; 4], config: &Arc<rustls::ClientConfig>) -> std::io::Result<Tls> {
    let mut tries = 0;
    loop {
        tries += 1;
        let socket = TcpSocket::new_v4()?;
        socket.bind((from, 0).into())?;
        let begun = Instant::now();
        let tcp = socket.connect(address).await?;
        let name = ServerName::try_from(enrol::server_name(hub)).unwrap();
        match tokio_rustls::TlsConnector::from(config.clone()).connect(name, tcp).await {
            // Who stood still for 3 s before its first word was hung up on, and dials again, as a node does.
            Err(_) if tries < 10 && begun.elapsed() >= Duration::from_secs(3) => {}
            done => return done,
        }
    }
}

const HERE: [u8; 4] = [127, 0, 0, 1];
const THERE: [u8; 4] = [127, 0, 0, 2];

fn plain_csr(key: &KeyPair) -> Vec<u8> {
    CertificateParams::default().serialize_request(key).unwrap().der().to_vec()
}

impl Machine {
    /// One that has an invite, and no certificate yet.
    async fn invited(hub: &Hub) -> Self {
        mesh_process::install_tls_provider();
        let (_, yaml) = hub.invite(json!({})).await;
        let invite = node::config::read_invite("invite", &yaml, &|_| Ok(None)).unwrap();
        Self {
            hub: invite.hub,
            root: std::fs::read(hub.data().join("keys/root.crt")).unwrap(),
            address: hub.node.parse().unwrap(),
            key: KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap(),
            invite,
            id: NodeId::from_bytes([0; 16]),
            certificate: vec![],
        }
    }

    async fn enrolled(hub: &Hub) -> Self {
        let mut m = Self::invited(hub).await;
        m.enrol(plain_csr(&m.key), "machine").await.unwrap();
        m
    }

    /// A channel without a certificate, and what binds a proof to it.
    async fn stranger(&self, from: [u8; 4]) -> (EnrolmentClient<Channel>, [u8; 32]) {
        let tls = dial(self.hub, self.address, from, &config(&self.root, None)).await.unwrap();
        let exporter = tls.get_ref().1.export_keying_material([0; 32], enrol::EXPORTER_LABEL, None).unwrap();
        (EnrolmentClient::new(node::tls::channel(tls).await.unwrap()), exporter)
    }

    fn enrolment(&self, exporter: &[u8; 32], csr_der: Vec<u8>, suggested: &str) -> wire::EnrolRequest {
        let (invite, nonce): (InviteId, _) = (self.invite.invite, [5; 32]);
        let spki = mesh_core::sha256(&self.key.subject_public_key_info());
        let signed = enrol::proof_bytes(self.hub, invite, exporter, &spki, &nonce);
        let registration = wire::RegistrationRequest { suggested_name: suggested.into(), ..Default::default() };
        let seed = ed25519_dalek::SigningKey::from_bytes(&self.invite.seed);
        let proof = ed25519_dalek::Signer::sign(&seed, &signed).to_bytes().to_vec();
        wire::EnrolRequest {
            invite_id: invite.to_string(),
            csr_der,
            nonce: nonce.to_vec(),
            proof,
            registration: Some(registration),
            roots: vec![],
        }
    }

    async fn enrol(&mut self, csr: Vec<u8>, suggested: &str) -> Result<wire::EnrolReply, Status> {
        let (mut client, exporter) = self.stranger(HERE).await;
        let reply = client.enrol(self.enrolment(&exporter, csr, suggested)).await?.into_inner();
        self.id = reply.node_id.parse().unwrap();
        self.certificate = reply.certificate.as_ref().unwrap().certificate_der.clone();
        Ok(reply)
    }

    fn recovery(&self, exporter: &[u8; 32], csr_der: Vec<u8>, counter: u64) -> wire::RecoverRequest {
        let nonce = [7; 32];
        let spki = mesh_core::sha256(&self.key.subject_public_key_info());
        let proof = self.key.sign(&enrol::recover_bytes(self.hub, self.id, exporter, &spki, counter, &nonce)).unwrap();
        wire::RecoverRequest { node_id: self.id.to_string(), csr_der, counter, nonce: nonce.to_vec(), proof, roots: vec![] }
    }

    async fn recover(&self, csr: Vec<u8>, counter: u64) -> Result<wire::CertificateReply, Status> {
        let (mut client, exporter) = self.stranger(HERE).await;
        Ok(client.recover(self.recovery(&exporter, csr, counter)).await?.into_inner().certificate.unwrap())
    }

    fn config(&self) -> Arc<rustls::ClientConfig> {
        config(&self.root, Some((vec![self.certificate.clone()], &self.key)))
    }

    async fn link(&self) -> NodeLinkClient<Channel> {
        let tls = dial(self.hub, self.address, HERE, &self.config()).await.unwrap();
        NodeLinkClient::new(node::tls::channel(tls).await.unwrap())
    }
}

async fn call(channel: Channel) -> Result<(), Status> {
    NodeLinkClient::new(channel).report_health(wire::HealthReport::default()).await.map(drop)
}

/// The root's own issuer, for certificates that the hub would never make.
fn issuer(hub: &Hub) -> Issuer<'static, KeyPair> {
    let keys = hub.data().join("keys");
    let key = KeyPair::from_pem(&std::fs::read_to_string(keys.join("root.key")).unwrap()).unwrap();
    Issuer::from_ca_cert_der(&std::fs::read(keys.join("root.crt")).unwrap().into(), key).unwrap()
}

/// A client's certificate for this key, with so much of its life left.
fn certify(issuer: &Issuer<'_, KeyPair>, key: &KeyPair, uri: &str, left: time::Duration) -> Vec<u8> {
    let mut p = CertificateParams::default();
    p.subject_alt_names = vec![SanType::URI(uri.try_into().unwrap())];
    p.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    p.not_before = time::OffsetDateTime::now_utc() - time::Duration::days(1);
    p.not_after = time::OffsetDateTime::now_utc() + left;
    p.signed_by(key, issuer).unwrap().der().to_vec()
}

/// It is for a client of this one name, and for nothing else.
fn is_only(der: &[u8], m: &Machine) {
    let (_, c) = X509Certificate::from_der(der).unwrap();
    let names = &c.subject_alternative_name().unwrap().unwrap().value.general_names;
    assert!(matches!(names.as_slice(), [GeneralName::URI(u)] if *u == enrol::node_uri(m.hub, m.id)), "{names:?}");
    assert_eq!(c.subject().iter().count(), 0);
    let eku = c.extended_key_usage().unwrap().unwrap().value;
    assert!(eku.client_auth && !eku.server_auth && !eku.any && eku.other.is_empty());
    assert!(!c.is_ca());
    let usage = c.key_usage().unwrap().unwrap().value;
    assert!(usage.digital_signature() && !usage.key_cert_sign() && !usage.crl_sign());
    assert_eq!(c.public_key().raw, m.key.subject_public_key_info());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_for_more_gives_a_client_certificate_of_the_own_node_alone() {
    let hub = Hub::start().await;
    let victim = Machine::enrolled(&hub).await;
    let mut m = Machine::invited(&hub).await;
    let greedy = |key: &KeyPair| {
        let mut p = CertificateParams::new(vec![enrol::server_name(victim.hub), "localhost".into()]).unwrap();
        p.subject_alt_names.push(SanType::URI(enrol::node_uri(victim.hub, victim.id).try_into().unwrap()));
        p.distinguished_name.push(rcgen::DnType::CommonName, victim.id.to_string());
        p.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::Any];
        p.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        p.serialize_request(key).unwrap().der().to_vec()
    };
    // One that is not signed by its own key proves nothing, whoever brings it.
    let mut forged = greedy(&m.key);
    *forged.last_mut().unwrap() ^= 1;
    assert_eq!(m.enrol(forged.clone(), "m").await.unwrap_err().code(), Code::InvalidArgument);
    // Nor does another's, which anybody could have overheard.
    assert_eq!(m.enrol(greedy(&victim.key), "m").await.unwrap_err().code(), Code::InvalidArgument);

    let csr = greedy(&m.key);
    m.enrol(csr.clone(), "m").await.unwrap();
    is_only(&m.certificate, &m);
    let mut link = m.link().await;
    let renewal = |csr_der: &[u8], counter| wire::RenewRequest { csr_der: csr_der.to_vec(), counter, roots: vec![] };
    let renewed = link.renew(renewal(&csr, 1)).await.unwrap().into_inner();
    is_only(&renewed.certificate_der, &m);
    let recovered = m.recover(csr, 2).await.unwrap();
    is_only(&recovered.certificate_der, &m);
    assert_eq!(link.renew(renewal(&forged, 3)).await.unwrap_err().code(), Code::InvalidArgument);
    assert_eq!(link.renew(renewal(&greedy(&victim.key), 3)).await.unwrap_err().code(), Code::PermissionDenied);
    assert_eq!(m.recover(forged, 3).await.unwrap_err().code(), Code::InvalidArgument);
    assert_eq!(hub.get(&format!("/api/v1/nodes/{}", victim.id)).await["id"], victim.id.to_string(), "the other is as it was");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_signs_no_other() {
    let hub = Hub::start().await;
    let (m, victim) = (Machine::enrolled(&hub).await, Machine::enrolled(&hub).await);
    assert!(call(node::tls::channel(dial(m.hub, m.address, HERE, &m.config()).await.unwrap()).await.unwrap()).await.is_ok());
    let own = Issuer::from_ca_cert_der(&m.certificate.clone().into(), KeyPair::try_from(m.key.serialize_der()).unwrap()).unwrap();
    // With the very key that the registry knows for the other node: the chain alone is wrong.
    let leaf = certify(&own, &victim.key, &enrol::node_uri(victim.hub, victim.id), time::Duration::days(1));
    for (what, chain) in [
        ("signed by a node", vec![leaf.clone(), m.certificate.clone()]),
        ("signed by a node, with the root", vec![leaf.clone(), m.certificate.clone(), m.root.clone()]),
        ("signed by a node, alone", vec![leaf]),
    ] {
        let config = config(&m.root, Some((chain, &victim.key)));
        let done = async {
            let tls = dial(m.hub, m.address, HERE, &config).await.map_err(|e| e.to_string())?;
            let channel = node::tls::channel(tls).await.map_err(|e| e.to_string())?;
            call(channel).await.map_err(|e| e.to_string())
        };
        let said = done.await;
        assert!(said.is_err(), "{what}: it was let in");
    }
    let failed = || hub.process.log().matches("a TLS handshake failed").count();
    until("three handshakes to have failed", async || (failed() >= 3).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_session_is_resumed_however_it_began() {
    let hub = Hub::start().await;
    let mut m = Machine::enrolled(&hub).await;
    let use_it = async |tls: Tls| call(node::tls::channel(tls).await.map_err(|e| Status::unavailable(e.to_string()))?).await;
    let (mut served, mut life) = (0, 20);
    // A machine that stood still for the whole of its life gets one that lives longer.
    while served == 0 {
        assert!(life < 1000, "it was never good");
        m.certificate = certify(&issuer(&hub), &m.key, &enrol::node_uri(m.hub, m.id), time::Duration::seconds(life));
        life *= 2;
        // The same configuration keeps what tickets it is given.
        let config = m.config();
        // Calls, and so time and words in which tickets would have come, until the certificate has ended.
        until("the certificate to end", async || {
            let tls = dial(m.hub, m.address, HERE, &config).await.unwrap();
            assert_eq!(tls.get_ref().1.handshake_kind(), Some(HandshakeKind::Full), "after {served} sessions");
            match use_it(tls).await {
                Ok(()) => served += 1,
                // It ended between the handshake and the call.
                Err(e) if e.code() == Code::Unauthenticated => assert_eq!(e.message(), "certificate_expired"),
                Err(e) => return Some(e),
            }
            None
        })
        .await;
    }
    until("the refusal by its date in the log", async || hub.process.log().contains("certificate expired").then_some(())).await;

    // One that has years left, and is revoked.
    m.certificate = certify(&issuer(&hub), &m.key, &enrol::node_uri(m.hub, m.id), time::Duration::days(365));
    let config = m.config();
    let connect = async || dial(m.hub, m.address, HERE, &config).await.unwrap();
    for _ in 0..3 {
        use_it(connect().await).await.unwrap();
    }
    assert_eq!(hub.call("POST", &format!("/api/v1/nodes/{}/revoke", m.id), None).await.0, 200);
    let tls = connect().await;
    assert_eq!(tls.get_ref().1.handshake_kind(), Some(HandshakeKind::Full));
    revoked("a new connection", use_it(tls).await);
}

fn revoked<T>(what: &str, r: Result<T, Status>) {
    match r {
        Err(s) if s.code() == Code::PermissionDenied && s.message().starts_with("revoked") => {}
        Err(s) => panic!("{what}: {s}"),
        Ok(_) => panic!("{what}: it was served"),
    }
}

/// The end of a stream: the hub's last word on it, and when it came.
async fn ended(mut stream: tonic::Streaming<wire::HubFrame>) -> (String, Instant) {
    let mut word = String::new();
    loop {
        match stream.message().await {
            Ok(Some(f)) => {
                if let Some(hub_frame::Kind::Goodbye(g)) = f.kind {
                    word = g.code;
                }
            }
            Ok(None) | Err(_) => return (word, Instant::now()),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_node_is_cut_off_while_it_says_ten_thousand_things_a_second() {
    let hub = Hub::start().await;
    let mut m = Machine::enrolled(&hub).await;
    let mut link = m.link().await;
    let capabilities =
        wire::Capabilities { cpu_cores: 4, skills: vec![wire::Skill { name: "shell".into(), version: "1".into() }], ..Default::default() };
    link.sync_configuration(wire::RegistrationRequest { capabilities: Some(capabilities), ..Default::default() }).await.unwrap();
    let (frames, outgoing) = mpsc::channel(256);
    let spool_id = mesh_core::SpoolId::from_bytes([3; 16]).to_string();
    let hello = node_frame::Kind::Hello(wire::Hello { spool_id, max_tasks: 4, ..Default::default() });
    frames.send(wire::NodeFrame { kind: Some(hello) }).await.unwrap();
    let mut from_hub = link.task_stream(ReceiverStream::new(outgoing)).await.unwrap().into_inner();
    let body = json!({"node": m.id.to_string(), "shell": {"argv": ["true"]}});
    let task = text(&hub.dispatch(body).await, "id");
    let attempt = loop {
        let frame = tokio::time::timeout(PATIENCE, from_hub.message()).await.expect("an order comes").unwrap().unwrap();
        if let Some(hub_frame::Kind::Envelope(e)) = frame.kind {
            break OrdersBody::decode(e.body.as_slice()).unwrap().orders[0].attempt;
        }
    };
    let started = wire::TaskStarted { task_id: task.clone(), attempt, at_ms: 1 };
    frames.send(wire::NodeFrame { kind: Some(node_frame::Kind::Started(started)) }).await.unwrap();
    let (data, data_source) = mpsc::channel(256);
    let mut answers = link.data_stream(ReceiverStream::new(data_source)).await.unwrap().into_inner();

    // Both streams are kept full: output on the one, words on the other.
    let said = Arc::new(AtomicU64::new(0));
    let (counted, of) = (said.clone(), task.clone());
    let flood = tokio::spawn(async move {
        let mut pace = tokio::time::interval(Duration::from_millis(10));
        for seq in 1.. {
            if seq % 50 == 0 {
                pace.tick().await;
            }
            let o = wire::OutputFrame { task_id: of.clone(), attempt, seq, t_ms: 1, stream: 1, data: b"x".as_slice().into() };
            let beat = wire::Heartbeat { seq, sent_ms: 1, echo_ms: 0, held_ms: 0 };
            let output = data.send(wire::NodeData { kind: Some(node_data::Kind::Output(o)) }).await;
            let word = frames.send(wire::NodeFrame { kind: Some(node_frame::Kind::Heartbeat(beat)) }).await;
            // It goes on with the one stream after the other has ended.
            if output.is_err() && word.is_err() {
                return;
            }
            counted.fetch_add(2, Ordering::SeqCst);
        }
    });
    let output_ends = tokio::spawn(async move {
        while let Ok(Some(_)) = answers.message().await {}
        Instant::now()
    });
    let warm = Instant::now();
    until("it to be busy", async || (said.load(Ordering::SeqCst) > 4_000).then_some(())).await;
    let a_second = said.load(Ordering::SeqCst) as f64 / warm.elapsed().as_secs_f64();
    let begun = Instant::now();
    let path = format!("/api/v1/nodes/{}/revoke", m.id);
    let ends = futures::future::join3(hub.call("POST", &path, None), ended(from_hub), output_ends);
    let (revocation, (word, task_end), output_end) = tokio::time::timeout(PATIENCE, ends).await.expect("the hub cuts both streams");
    assert_eq!(revocation.0, 200, "{revocation:?}");
    let output_end = output_end.unwrap();
    println!(
        "{a_second:.0} messages a second; after the request to revoke, the task stream ended in {:?}, the data stream in {:?}",
        task_end - begun,
        output_end - begun
    );
    assert!(word == "revoked" || word.is_empty(), "{word}");
    tokio::time::timeout(PATIENCE, flood).await.expect("nothing takes its words any more").unwrap();
    let t = hub.task(&task).await;
    assert_eq!((t["state"].as_str(), t["reason"]["code"].as_str()), (Some("failed"), Some("node_revoked")), "{t}");

    // The connection itself still stands: nothing on it answers, and nothing new does.
    let csr = plain_csr(&m.key);
    for (what, mut link) in [("the old connection", link), ("a new connection", m.link().await)] {
        let health = wire::HealthReport::default();
        revoked(what, link.sync_configuration(wire::RegistrationRequest::default()).await);
        revoked(what, link.report_health(health).await);
        revoked(what, link.renew(wire::RenewRequest { csr_der: csr.clone(), counter: 1, roots: vec![] }).await);
        revoked(what, link.data_stream(futures::stream::pending()).await);
        revoked(what, link.task_stream(futures::stream::pending()).await);
    }
    revoked("a recovery", m.recover(csr.clone(), 1).await);
    let again = m.enrol(csr, "again").await.unwrap_err();
    assert!(again.code() == Code::InvalidArgument && again.message().contains("revoked"), "{again}");
    assert!(said.load(Ordering::SeqCst) > 4_000 && hub.output(&task, "").await.iter().all(|b| *b == b'x'));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_renewal_counter_serves_once() {
    let hub = Hub::start().await;
    let m = Machine::enrolled(&hub).await;
    let mut link = m.link().await;
    let csr = plain_csr(&m.key);
    let mut renew = async |counter| {
        let r = link.renew(wire::RenewRequest { csr_der: csr.clone(), counter, roots: vec![] }).await;
        r.map(|r| r.into_inner()).map_err(|s| (s.code(), s.message().split(':').next().unwrap_or_default().to_owned()))
    };
    let stale = Err((Code::FailedPrecondition, "stale_counter".to_owned()));
    assert_eq!(renew(0).await, stale, "that of the enrolment");
    let first = renew(1).await.unwrap();
    assert_eq!(renew(1).await.unwrap(), first, "the answer was lost: the same again");
    let second = renew(2).await.unwrap();
    assert_ne!(second, first);
    for old in [0, 1, u64::MAX] {
        assert_eq!(renew(old).await, stale, "{old}");
    }
    assert_eq!(renew(2).await.unwrap(), second, "who is refused changes nothing");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_machine_calls_itself_is_a_name_and_never_a_path() {
    let hub = Hub::start().await;
    let evil = ["../../../tmp/evil", "/etc/passwd", "a\0b", "..\u{202e}", &"x".repeat(10_000), "<img src=x onerror=alert(1)>\n", ""];
    let before = files(&hub.data());
    for name in evil {
        let mut m = Machine::invited(&hub).await;
        let reply = m.enrol(plain_csr(&m.key), name).await.unwrap();
        let shown = text(&hub.get(&format!("/api/v1/nodes/{}", m.id)).await, "name");
        assert_eq!(shown, reply.node_name);
        assert!(mesh_core::name::check(&shown).is_ok(), "{shown:?}");
        // Its words about itself are bounded too.
        let capabilities = wire::Capabilities { hostname: name.into(), os: name.into(), ..Default::default() };
        let version = name.to_owned();
        let r = wire::RegistrationRequest { version, capabilities: Some(capabilities), suggested_name: name.into() };
        m.link().await.sync_configuration(r).await.unwrap();
        let seen = hub.get(&format!("/api/v1/nodes/{}", m.id)).await;
        assert_eq!(text(&seen, "name"), shown, "and are no new name");
        assert!(seen.to_string().len() < 8_000, "{}", seen.to_string().len());
    }
    assert_eq!(files(&hub.data()), before);
}

/// Files below a folder, but for those of the database.
fn files(folder: &std::path::Path) -> Vec<std::path::PathBuf> {
    let mut found = vec![];
    for entry in std::fs::read_dir(folder).unwrap().flatten() {
        match entry.file_type().unwrap().is_dir() {
            true => found.extend(files(&entry.path())),
            false if entry.file_name().to_string_lossy().starts_with("hub.db") => {}
            false => found.push(entry.path()),
        }
    }
    found.sort();
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn strangers_of_one_address_keep_no_other_out() {
    let hub = Hub::start().await;
    let mut m = Machine::invited(&hub).await;
    let config = config(&m.root, None);
    let mut held = vec![];
    until("the address to have enough", async || {
        let knocks = (0..80).map(|_| async {
            let mut tls = dial(m.hub, m.address, HERE, &config).await.ok()?;
            // Who is let in hears the first words of HTTP/2.
            let heard = tokio::time::timeout(PATIENCE, tls.read(&mut [0; 1])).await.expect("it is served or closed");
            matches!(heard, Ok(1)).then_some(tls)
        });
        let let_in: Vec<Tls> = futures::future::join_all(knocks).await.into_iter().flatten().collect();
        let refused = let_in.len() < 80;
        held.extend(let_in);
        // One whose handshake took too long was not refused for the number of the others.
        (refused && held.len() > 32).then_some(())
    })
    .await;
    let (mut client, exporter) = m.stranger(THERE).await;
    let reply = client.enrol(m.enrolment(&exporter, plain_csr(&m.key), "other")).await.unwrap().into_inner();
    m.id = reply.node_id.parse().unwrap();
    drop(held);
}

#[tokio::test(flavor = "multi_thread")]
async fn guesses_at_invites_are_bounded_by_address() {
    let hub = Hub::start().await;
    let mut m = Machine::invited(&hub).await;
    let csr = plain_csr(&m.key);
    let mut refused = 0;
    until("the address to have had its tries", async || {
        let (mut client, exporter) = m.stranger(HERE).await;
        for _ in 0..1000 {
            let mut r = m.enrolment(&exporter, csr.clone(), "m");
            r.proof[0] ^= 1;
            match client.enrol(r).await.unwrap_err().code() {
                Code::InvalidArgument => refused += 1,
                Code::ResourceExhausted => return Some(()),
                // The channel's time was up.
                _ => return None,
            }
        }
        None
    })
    .await;
    assert!(refused >= 127, "{refused}");
    let (mut client, exporter) = m.stranger(THERE).await;
    assert!(client.enrol(m.enrolment(&exporter, csr.clone(), "m")).await.is_ok(), "another address has its own");
    until("its tries to come back", async || m.enrol(csr.clone(), "m").await.ok()).await;
}

//! A hub that does what a test says: its own CA, its own TLS, real tonic services, no store.

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use ed25519_dalek::{SigningKey, VerifyingKey};
use mesh_core::seal::{self, payload_type};
use mesh_core::spec::Spec;
use mesh_core::{HubId, InviteId, NodeId, SessionId, TaskId, UserId, enrol};
use mesh_process::{Clock, SystemClock, Tasks, entropy};
use mesh_wire::node::enrolment_server::{Enrolment, EnrolmentServer};
use mesh_wire::node::node_link_server::{NodeLink, NodeLinkServer};
use mesh_wire::node::*;
use prost::Message;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, PKCS_ED25519,
    SanType,
};
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use rustls::server::WebPkiClientVerifier;
use std::collections::{BTreeMap, BTreeSet};
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;
use time::OffsetDateTime;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Connected;
use tonic::{Request, Response, Status, Streaming};

const QUEUE: usize = 1024;
pub const PATIENCE: Duration = Duration::from_secs(90);

#[derive(Clone, Default)]
pub struct Peer {
    exporter: [u8; 32],
    certificate: Option<Vec<u8>>,
}

/// A TLS connection that tonic can ask who is there.
pub struct Io(TlsStream<TcpStream>);

impl Connected for Io {
    type ConnectInfo = Peer;
    fn connect_info(&self) -> Peer {
        let s = self.0.get_ref().1;
        let exporter = s.export_keying_material([0; 32], enrol::EXPORTER_LABEL, None).unwrap();
        Peer { exporter, certificate: s.peer_certificates().and_then(|c| c.first()).map(|c| c.to_vec()) }
    }
}
impl AsyncRead for Io {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, b: &mut ReadBuf<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, b)
    }
}
impl AsyncWrite for Io {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, b: &[u8]) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, b)
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

/// What the test can turn.
pub struct Knobs {
    /// Life of a certificate from now, in seconds; begun in the past by the second number.
    pub certificate: (i64, i64),
    pub revoked: bool,
    /// How far output is kept, per attempt: survives links.
    pub durable: BTreeMap<(String, u64), u64>,
    pub output: BTreeMap<(String, u64), Vec<u8>>,
    pub payloads: BTreeMap<Vec<u8>, Vec<u8>>,
    pub renewals: Vec<u64>,
    /// Counters that a recovery named.
    pub recoveries: Vec<u64>,
    /// Answers to the recoveries to come, before any succeeds.
    pub refuse_recovery: Vec<Status>,
    /// Links are refused since the certificate has ended, whatever it says.
    pub ended: bool,
    pub health: u32,
    generation: u64,
}

pub struct Inner {
    pub hub: HubId,
    pub node: NodeId,
    invite: InviteId,
    invite_key: VerifyingKey,
    pub task_key: SigningKey,
    issuer: Issuer<'static, KeyPair>,
    pub root: CertificateDer<'static>,
    pub knobs: Mutex<Knobs>,
    spki: Mutex<Option<[u8; 32]>>,
    links: mpsc::Sender<Link>,
}

/// One accepted link, in the hands of the test.
pub struct Link {
    pub hello: Hello,
    pub session: [u8; 16],
    pub seq: u64,
    to_node: mpsc::Sender<Result<HubFrame, Status>>,
    from_node: mpsc::Receiver<NodeFrame>,
    acknowledged: BTreeSet<(String, u64)>,
    inner: Arc<Inner>,
}

pub struct Hub {
    pub inner: Arc<Inner>,
    pub address: String,
    pub yaml: String,
    links: mpsc::Receiver<Link>,
    _tasks: Tasks,
}

fn now_ms() -> i64 {
    SystemClock::new().now_ms()
}

pub async fn start() -> Hub {
    mesh_process::install_tls_provider();
    let ca_key = KeyPair::generate_for(&PKCS_ED25519).unwrap();
    let mut p = CertificateParams::new(Vec::<String>::new()).unwrap();
    p.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    let root = p.self_signed(&ca_key).unwrap().der().clone();
    let pin = mesh_core::sha256(&{
        use rcgen::PublicKeyData;
        ca_key.subject_public_key_info()
    });
    let issuer = Issuer::new(p, ca_key);
    let hub = HubId::from_parts(now_ms(), entropy::bytes());
    let leaf_key = KeyPair::generate_for(&PKCS_ED25519).unwrap();
    let leaf = CertificateParams::new(vec![enrol::server_name(hub)]).unwrap().signed_by(&leaf_key, &issuer).unwrap();
    let mut roots = rustls::RootCertStore::empty();
    roots.add(root.clone()).unwrap();
    let clients = WebPkiClientVerifier::builder(Arc::new(roots)).allow_unauthenticated().build().unwrap();
    let mut tls = rustls::ServerConfig::builder()
        .with_client_cert_verifier(clients)
        .with_single_cert(vec![leaf.der().clone(), root.clone()], PrivatePkcs8KeyDer::from(leaf_key.serialize_der()).into())
        .unwrap();
    tls.alpn_protocols = vec![b"h2".to_vec()];
    tls.send_tls13_tickets = 0;

    let seed: [u8; 32] = entropy::bytes();
    let task_key = SigningKey::from_bytes(&entropy::bytes());
    let invite = InviteId::from_parts(now_ms(), entropy::bytes());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let yaml = format!(
        "hub: {{ id: \"{hub}\", grpc: \"{address}\", url: \"https://h\", server_name: \"{hub}.hub.cortex\" }}\nca_pin: \"sha256:{}\"\ntask_keys: [\"ed25519:{}\"]\ninvite: {{ id: \"{invite}\", secret: \"{}\" }}\nnode: {{ name: \"box\" }}\n",
        pin.iter().map(|b| format!("{b:02x}")).collect::<String>(),
        STANDARD.encode(task_key.verifying_key().to_bytes()),
        URL_SAFE_NO_PAD.encode(seed),
    );
    let (links, link_queue) = mpsc::channel(QUEUE);
    let inner = Arc::new(Inner {
        hub,
        node: NodeId::from_parts(now_ms(), entropy::bytes()),
        invite,
        invite_key: SigningKey::from_bytes(&seed).verifying_key(),
        task_key,
        issuer,
        root,
        knobs: Mutex::new(Knobs {
            certificate: (86_400, 60),
            revoked: false,
            durable: BTreeMap::new(),
            output: BTreeMap::new(),
            payloads: BTreeMap::new(),
            renewals: vec![],
            recoveries: vec![],
            refuse_recovery: vec![],
            ended: false,
            health: 0,
            generation: 0,
        }),
        spki: Mutex::new(None),
        links,
    });
    let tasks = Tasks::new();
    let (accepted, incoming) = mpsc::channel::<Result<Io, std::io::Error>>(QUEUE);
    let acceptor = TlsAcceptor::from(Arc::new(tls));
    tasks.spawn_until_cancelled("accept", async move {
        while let Ok((tcp, _)) = listener.accept().await {
            if let Ok(s) = acceptor.accept(tcp).await {
                let _ = accepted.send(Ok(Io(s))).await;
            }
        }
    });
    let service = Service(inner.clone());
    tasks.spawn_until_cancelled("serve", async move {
        let router = tonic::transport::Server::builder()
            .add_service(EnrolmentServer::new(service.clone()))
            .add_service(NodeLinkServer::new(service));
        let _ = router.serve_with_incoming(ReceiverStream::new(incoming)).await;
    });
    Hub { inner, address, yaml, links: link_queue, _tasks: tasks }
}

impl Hub {
    pub async fn link(&mut self) -> Link {
        tokio::time::timeout(PATIENCE, self.links.recv()).await.expect("no link came").unwrap()
    }
    pub fn no_link_yet(&mut self) -> bool {
        self.links.try_recv().is_err()
    }
    pub fn knobs(&self) -> std::sync::MutexGuard<'_, Knobs> {
        self.inner.knobs.lock().unwrap()
    }
    pub fn order(&self, task: TaskId, spec: &Spec, session: Option<SessionId>) -> Order {
        let payload = spec.encode();
        let inline = payload.len() <= mesh_core::spec::INLINE_SPEC_BYTES;
        if !inline {
            self.knobs().payloads.insert(spec.digest().to_vec(), payload.clone());
        }
        Order {
            task_id: task.to_string(),
            attempt: 1,
            skill: spec.skill().into(),
            payload_sha256: spec.digest().to_vec(),
            payload_bytes: payload.len() as u64,
            payload: if inline { payload } else { vec![] },
            user_id: UserId::from_bytes([1; 16]).to_string(),
            session_id: session.map(|s| s.to_string()).unwrap_or_default(),
            // Longer than any test waits.
            timeout_secs: 3600,
            start_before_ms: now_ms() + 3_600_000,
            granted: true,
            policy_digest: vec![],
            request_id: String::new(),
        }
    }
}

impl Inner {
    fn certificate(&self, csr: &[u8], counter: u64) -> CertificateReply {
        let csr = CertificateSigningRequestParams::from_der(&csr.to_vec().into()).unwrap();
        let (life, past) = self.knobs.lock().unwrap().certificate;
        let at = |s: i64| OffsetDateTime::from_unix_timestamp(now_ms() / 1000 + s).unwrap();
        let mut p = CertificateParams::new(Vec::<String>::new()).unwrap();
        (p.not_before, p.not_after) = (at(-past), at(life));
        p.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        p.subject_alt_names = vec![SanType::URI(enrol::node_uri(self.hub, self.node).try_into().unwrap())];
        let der = p.signed_by(&csr.public_key, &self.issuer).unwrap().der().to_vec();
        *self.spki.lock().unwrap() = cortex_node::tls::spki_sha256(&der);
        CertificateReply { certificate_der: der, root_der: self.root.to_vec(), not_after_ms: now_ms() + life * 1000, counter }
    }
}

impl Link {
    pub async fn send(&self, kind: hub_frame::Kind) {
        // When the link has ended, whoever waits for what follows says so.
        let _ = self.to_node.send(Ok(HubFrame { kind: Some(kind) })).await;
    }
    pub fn orders_body(&mut self, orders: Vec<Order>) -> OrdersBody {
        self.seq += 1;
        OrdersBody {
            hub_id: self.inner.hub.to_string(),
            node_id: self.inner.node.to_string(),
            node_key_sha256: self.inner.spki.lock().unwrap().unwrap().to_vec(),
            link_session: self.session.to_vec(),
            seq: self.seq,
            orders,
        }
    }
    pub fn sealed(&self, kind: &str, body: Vec<u8>) -> Envelope {
        self.sealed_by(&self.inner.task_key, kind, body)
    }
    pub fn sealed_by(&self, key: &SigningKey, kind: &str, body: Vec<u8>) -> Envelope {
        let signature = seal::sign(key, kind, &body).to_vec();
        Envelope { payload_type: kind.into(), key_id: seal::key_id(&key.verifying_key().to_bytes()), body, signature }
    }
    pub async fn orders(&mut self, orders: Vec<Order>) {
        let body = self.orders_body(orders).encode_to_vec();
        self.send(hub_frame::Kind::Envelope(self.sealed(payload_type::ORDERS, body))).await;
    }
    pub async fn orders_by(&mut self, key: &SigningKey, orders: Vec<Order>) {
        let body = self.orders_body(orders).encode_to_vec();
        self.send(hub_frame::Kind::Envelope(self.sealed_by(key, payload_type::ORDERS, body))).await;
    }
    pub async fn cancel(&mut self, task: TaskId) {
        let OrdersBody { hub_id, node_id, node_key_sha256, link_session, seq, .. } = self.orders_body(vec![]);
        let cancels = vec![CancelOrder { task_id: task.to_string(), attempt: 1, now: false }];
        let body = CancelBody { hub_id, node_id, node_key_sha256, link_session, seq, cancels }.encode_to_vec();
        self.send(hub_frame::Kind::Envelope(self.sealed(payload_type::CANCEL, body))).await;
    }
    pub fn input_body(&mut self, task: TaskId, input_seq: u64, data: &[u8], eof: bool) -> InputBody {
        let OrdersBody { hub_id, node_id, node_key_sha256, link_session, seq, .. } = self.orders_body(vec![]);
        let (task_id, data) = (task.to_string(), data.to_vec());
        InputBody { hub_id, node_id, node_key_sha256, link_session, seq, task_id, attempt: 1, request: seq, input_seq, data, eof }
    }
    /// Sends a piece of input and gives what became of it.
    pub async fn input(&mut self, task: TaskId, input_seq: u64, data: &[u8], eof: bool) -> (input_answer::Code, u64) {
        let body = self.input_body(task, input_seq, data, eof);
        self.send(hub_frame::Kind::Envelope(self.sealed(payload_type::INPUT, body.encode_to_vec()))).await;
        match self.frame().await {
            node_frame::Kind::Input(a) => {
                assert_eq!((&a.task_id, a.attempt, a.request), (&body.task_id, 1, body.request));
                (a.code(), a.taken_seq)
            }
            other => panic!("{other:?}"),
        }
    }
    /// The next frame that is no heartbeat, and no result that was acknowledged: a node repeats one after a
    /// while, and the acknowledgement may still be on its way.
    pub async fn frame(&mut self) -> node_frame::Kind {
        loop {
            let f = tokio::time::timeout(PATIENCE, self.from_node.recv()).await.expect("no frame came").expect("the link ended");
            match f.kind.unwrap() {
                node_frame::Kind::Result(r) if self.acknowledged.contains(&(r.task_id.clone(), r.attempt)) => {}
                other => return other,
            }
        }
    }
    pub async fn started(&mut self) -> TaskStarted {
        match self.frame().await {
            node_frame::Kind::Started(s) => s,
            other => panic!("{other:?}"),
        }
    }
    /// The next result, not acknowledged.
    pub async fn result(&mut self) -> TaskResult {
        loop {
            match self.frame().await {
                node_frame::Kind::Result(r) => return r,
                node_frame::Kind::Started(_) => {}
                other => panic!("{other:?}"),
            }
        }
    }
    pub async fn acknowledge(&mut self, r: &TaskResult) {
        self.acknowledged.insert((r.task_id.clone(), r.attempt));
        self.send(hub_frame::Kind::ResultAck(ResultAck { task_id: r.task_id.clone(), attempt: r.attempt })).await;
    }
    pub async fn ended(&mut self) {
        while tokio::time::timeout(PATIENCE, self.from_node.recv()).await.expect("the link did not end").is_some() {}
    }
}

#[derive(Clone)]
struct Service(Arc<Inner>);

impl Service {
    fn check<T>(&self, r: &Request<T>) -> Result<(), Status> {
        let peer = r.extensions().get::<Peer>().cloned().unwrap_or_default();
        if peer.certificate.is_none() {
            return Err(Status::unauthenticated("this call needs a node certificate"));
        }
        if self.0.knobs.lock().unwrap().ended {
            return Err(Status::unauthenticated("certificate_expired"));
        }
        if self.0.knobs.lock().unwrap().revoked { Err(Status::permission_denied("revoked")) } else { Ok(()) }
    }
}

#[tonic::async_trait]
impl Enrolment for Service {
    async fn enrol(&self, r: Request<EnrolRequest>) -> Result<Response<EnrolReply>, Status> {
        let exporter = r.extensions().get::<Peer>().unwrap().exporter;
        let m = r.into_inner();
        let csr = CertificateSigningRequestParams::from_der(&m.csr_der.clone().into()).unwrap();
        let spki = mesh_core::sha256(&{
            use rcgen::PublicKeyData;
            csr.public_key.subject_public_key_info()
        });
        let bytes = enrol::proof_bytes(self.0.hub, self.0.invite, &exporter, &spki, &m.nonce.try_into().unwrap());
        if m.invite_id != self.0.invite.to_string() || seal::verify_by(self.0.invite_key.as_bytes(), &bytes, &m.proof).is_err() {
            return Err(Status::permission_denied("the proof does not match the invite"));
        }
        if self.0.knobs.lock().unwrap().revoked {
            return Err(Status::permission_denied("the invite was used before"));
        }
        Ok(Response::new(EnrolReply {
            node_id: self.0.node.to_string(),
            node_name: m.registration.unwrap().suggested_name,
            certificate: Some(self.0.certificate(&m.csr_der, 1)),
            hub_time_ms: now_ms(),
        }))
    }

    async fn recover(&self, r: Request<RecoverRequest>) -> Result<Response<RecoverReply>, Status> {
        let peer = r.extensions().get::<Peer>().unwrap().clone();
        assert!(peer.certificate.is_none(), "an ended certificate is not shown");
        let m = r.into_inner();
        let csr = CertificateSigningRequestParams::from_der(&m.csr_der.clone().into()).unwrap();
        let spki_der = {
            use rcgen::PublicKeyData;
            csr.public_key.subject_public_key_info()
        };
        let spki = mesh_core::sha256(&spki_der);
        let bytes = enrol::recover_bytes(self.0.hub, self.0.node, &peer.exporter, &spki, m.counter, &m.nonce.try_into().unwrap());
        assert_eq!((m.node_id, *self.0.spki.lock().unwrap()), (self.0.node.to_string(), Some(spki)));
        seal::verify_by(&seal::ed25519_of(&spki_der).unwrap(), &bytes, &m.proof).expect("a proof by the identity key for this channel");
        {
            let mut k = self.0.knobs.lock().unwrap();
            k.recoveries.push(m.counter);
            if !k.refuse_recovery.is_empty() {
                return Err(k.refuse_recovery.remove(0));
            }
            (k.certificate, k.ended) = ((86_400, 60), false);
        }
        Ok(Response::new(RecoverReply { certificate: Some(self.0.certificate(&m.csr_der, m.counter)), hub_time_ms: now_ms() }))
    }
}

#[tonic::async_trait]
impl NodeLink for Service {
    type TaskStreamStream = ReceiverStream<Result<HubFrame, Status>>;
    type DataStreamStream = ReceiverStream<Result<HubData, Status>>;

    async fn sync_configuration(&self, r: Request<RegistrationRequest>) -> Result<Response<SandboxPolicy>, Status> {
        self.check(&r)?;
        assert!(r.into_inner().capabilities.unwrap().memory_bytes > 0);
        Ok(Response::new(SandboxPolicy { mode: "permissive".into(), network: "full".into(), max_tasks: 4, digest: vec![1] }))
    }

    async fn task_stream(&self, r: Request<Streaming<NodeFrame>>) -> Result<Response<Self::TaskStreamStream>, Status> {
        self.check(&r)?;
        let mut inbound = r.into_inner();
        let Some(NodeFrame { kind: Some(node_frame::Kind::Hello(hello)) }) = inbound.message().await? else {
            return Err(Status::failed_precondition("hello first"));
        };
        let (to_node, out) = mpsc::channel(QUEUE);
        let (frames, from_node) = mpsc::channel(QUEUE);
        let session = entropy::bytes();
        let (generation, marks) = {
            let mut k = self.0.knobs.lock().unwrap();
            k.generation += 1;
            let mark = |a: &KnownAttempt| {
                let durable_seq = k.durable.get(&(a.task_id.clone(), a.attempt)).copied().unwrap_or(0);
                OutputMark { task_id: a.task_id.clone(), attempt: a.attempt, durable_seq }
            };
            (k.generation, hello.attempts.iter().map(mark).collect())
        };
        let welcome = Welcome {
            hub_id: self.0.hub.to_string(),
            hub_time_ms: now_ms(),
            link_session: session.to_vec(),
            generation,
            marks,
            bundle: None,
        };
        let _ = to_node.send(Ok(HubFrame { kind: Some(hub_frame::Kind::Welcome(welcome)) })).await;
        // The test alone says how long the link lives.
        let answers = to_node.downgrade();
        let link = Link { hello, session, seq: 0, to_node, from_node, acknowledged: BTreeSet::new(), inner: self.0.clone() };
        let _ = self.0.links.send(link).await;
        Tasks::new().spawn("inbound", async move {
            while let Ok(Some(f)) = inbound.message().await {
                // Answered here, so that no link falls silent while a test looks elsewhere.
                if let Some(node_frame::Kind::Heartbeat(h)) = &f.kind {
                    let beat = Heartbeat { seq: h.seq, sent_ms: now_ms(), echo_ms: h.sent_ms, held_ms: 0 };
                    if let Some(out) = answers.upgrade() {
                        let _ = out.send(Ok(HubFrame { kind: Some(hub_frame::Kind::Heartbeat(beat)) })).await;
                    }
                    continue;
                }
                let _ = frames.send(f).await;
            }
        });
        Ok(Response::new(ReceiverStream::new(out)))
    }

    async fn data_stream(&self, r: Request<Streaming<NodeData>>) -> Result<Response<Self::DataStreamStream>, Status> {
        self.check(&r)?;
        let mut inbound = r.into_inner();
        let (out, stream) = mpsc::channel(QUEUE);
        let inner = self.0.clone();
        Tasks::new().spawn("data", async move {
            while let Ok(Some(d)) = inbound.message().await {
                match d.kind.unwrap() {
                    node_data::Kind::Output(o) => {
                        let key = (o.task_id.clone(), o.attempt);
                        let durable_seq = {
                            let mut k = inner.knobs.lock().unwrap();
                            let seen = k.durable.entry(key.clone()).or_default();
                            let fresh = o.seq > *seen;
                            if fresh {
                                assert_eq!(o.seq, *seen + 1, "a gap in the output");
                                *seen = o.seq;
                            }
                            let seen = *seen;
                            if fresh {
                                k.output.entry(key).or_default().extend_from_slice(&o.data);
                            }
                            seen
                        };
                        let ack = OutputAck { task_id: o.task_id, attempt: o.attempt, durable_seq };
                        let _ = out.send(Ok(HubData { kind: Some(hub_data::Kind::Output(ack)) })).await;
                    }
                    node_data::Kind::Payload(p) => {
                        let bytes = inner.knobs.lock().unwrap().payloads.get(&p.sha256).cloned().unwrap_or_default();
                        let n = bytes.chunks(65_536).count();
                        for (i, c) in bytes.chunks(65_536).enumerate() {
                            let chunk = PayloadChunk {
                                sha256: p.sha256.clone(),
                                data: c.to_vec().into(),
                                last: i + 1 == n,
                                refused: String::new(),
                                task_id: p.task_id.clone(),
                                attempt: p.attempt,
                            };
                            let _ = out.send(Ok(HubData { kind: Some(hub_data::Kind::Payload(chunk)) })).await;
                        }
                    }
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn report_health(&self, r: Request<HealthReport>) -> Result<Response<HealthAck>, Status> {
        assert!(r.into_inner().memory_total > 0);
        self.0.knobs.lock().unwrap().health += 1;
        Ok(Response::new(HealthAck::default()))
    }

    async fn renew(&self, r: Request<RenewRequest>) -> Result<Response<CertificateReply>, Status> {
        self.check(&r)?;
        let m = r.into_inner();
        let mut k = self.0.knobs.lock().unwrap();
        k.renewals.push(m.counter);
        k.certificate = (86_400, 60);
        drop(k);
        Ok(Response::new(self.0.certificate(&m.csr_der, m.counter)))
    }
}

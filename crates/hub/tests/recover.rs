//! A certificate for a node whose last one has ended: who gets one, and who does not.

use cortex_hub::keys::Keys;
use ed25519_dalek::{Signer, SigningKey};
use hub_engine::Error;
use hub_engine::accounts::Authenticated;
use hub_engine::events::{Events, Told, Topic};
use hub_engine::links::Links;
use hub_engine::nodes::{Lifetimes, Nodes, Recovery};
use hub_engine::ports::{Keyring, NodeDirectory};
use hub_engine::records::{Claim, Node, NodeCertificate};
use hub_engine::rotation::Step;
use hub_testkit::contract::sample;
use hub_testkit::memory::MemoryStore;
use mesh_core::permission::{Caller, Role};
use mesh_core::{HubId, NodeId, enrol, sha256};
use mesh_process::Clock;
use rcgen::{KeyPair, PublicKeyData};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

const DAY_MS: i64 = 86_400_000;
const T0: i64 = 1_790_000_000_000;
/// Of the enrolment's certificate.
const END: i64 = T0 + DAY_MS;

struct Hands(AtomicI64);
impl Clock for Hands {
    fn now_ms(&self) -> i64 {
        self.0.load(Ordering::SeqCst)
    }
    fn steady(&self) -> Duration {
        Duration::from_millis(self.now_ms() as u64)
    }
    fn anchored_ms(&self) -> i64 {
        self.now_ms()
    }
}

struct World {
    nodes: Nodes,
    store: Arc<MemoryStore>,
    clock: Arc<Hands>,
    keys: Arc<Keys>,
    _dir: tempfile::TempDir,
}

/// A machine with a key of its own.
struct Machine {
    id: NodeId,
    key: SigningKey,
}

impl Machine {
    fn new(n: u8) -> Self {
        Self { id: sample::node_id(n.into()), key: SigningKey::from_bytes(&[n; 32]) }
    }
    fn spki(&self) -> Vec<u8> {
        const HEAD: &[u8] = b"\x30\x2a\x30\x05\x06\x03\x2b\x65\x70\x03\x21\x00";
        [HEAD, self.key.verifying_key().as_bytes()].concat()
    }
    /// What it says on the channel `exporter` to ask for its certificate number `counter`.
    fn asks(&self, hub: HubId, exporter: u8, counter: u64) -> Recovery {
        let (spki_der, nonce, exporter) = (self.spki(), [3; 32], [exporter; 32]);
        let proof = enrol::recover_bytes(hub, self.id, &exporter, &sha256(&spki_der), counter, &nonce);
        let proof = self.key.sign(&proof).to_bytes().to_vec();
        Recovery { node: self.id, spki_der, counter, nonce, proof, exporter, roots: vec![] }
    }
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let clock = Arc::new(Hands(AtomicI64::new(T0)));
        let keys = Arc::new(Keys::open(dir.path(), T0).unwrap());
        let store = Arc::new(MemoryStore::new());
        let nodes = Nodes {
            hub: keys.hub,
            store: store.clone(),
            keyring: keys.clone(),
            links: Arc::new(Links::default()),
            events: Events::local(Duration::from_secs(60), clock.clone()),
            history: Default::default(),
            recoveries: Default::default(),
            clock: clock.clone(),
            lifetimes: Lifetimes { certificate_ms: DAY_MS, invite_secs: 60 },
        };
        Self { nodes, store, clock, keys, _dir: dir }
    }
    async fn enrolled(&self, n: u8) -> Machine {
        let m = Machine::new(n);
        let certificate = NodeCertificate { spki: sha256(&m.spki()), der: vec![1], not_after: END, counter: 0 };
        let node = Node { certificate, ..sample::node(n.into(), 0) };
        self.store.add_invite(&sample::invite(n.into())).await.unwrap();
        let now = sample::invite(n.into()).created_at;
        assert_eq!(self.store.claim_invite(sample::invite_id(n.into()), &node, now, 1).await.unwrap(), Claim::Claimed);
        m
    }
    fn at(&self, ms: i64) {
        self.clock.0.store(ms, Ordering::SeqCst);
    }
    async fn ask(&self, m: &Machine, counter: u64) -> Result<NodeCertificate, Error> {
        self.nodes.recover(m.asks(self.nodes.hub, 1, counter)).await
    }
}

fn code(e: &Error) -> &'static str {
    match e {
        Error::Unauthenticated(_) => "unauthenticated",
        Error::Forbidden(m) if m.starts_with("revoked:") => "revoked",
        Error::Conflict { code, .. } | Error::Unavailable { code, .. } | Error::Invalid { code, .. } => code,
        _ => "other",
    }
}

async fn refused(w: &World, r: Recovery) -> &'static str {
    let before = (w.store.node(sample::node_id(1)).await.unwrap(), w.store.node(sample::node_id(2)).await.unwrap());
    let code = code(&w.nodes.recover(r).await.expect_err("this is no good recovery"));
    let after = (w.store.node(sample::node_id(1)).await.unwrap(), w.store.node(sample::node_id(2)).await.unwrap());
    assert_eq!(before, after, "who is refused changes nothing");
    code
}

#[tokio::test]
async fn an_answer_whose_root_was_retired_is_given_anew() {
    let w = World::new();
    let m = w.enrolled(1).await;
    let now = END + DAY_MS;
    w.at(now);
    let first = w.ask(&m, 1).await.unwrap();
    for step in [Step::Begin, Step::Issue] {
        w.keys.step(step, now).unwrap();
    }
    assert_eq!(w.ask(&m, 1).await.unwrap(), first, "the old root still counts");
    w.keys.step(Step::Retire, now).unwrap();
    let again = w.ask(&m, 1).await.unwrap();
    assert!(again.counter == 2 && w.keys.counts(&again.der) && !w.keys.counts(&first.der));
    assert_eq!(w.ask(&m, 2).await.unwrap(), again, "and that one is the same again");
}

#[tokio::test]
async fn a_node_gets_one_certificate_for_each_counter() {
    let w = World::new();
    let m = w.enrolled(1).await;
    let caller = Caller::person(sample::user_id(1), Role::Developer);
    let mut told = w.nodes.events.open(Authenticated { caller, login: None }, Some(vec![Topic::Nodes]), None).unwrap();
    w.at(END + DAY_MS);
    let first = w.ask(&m, 1).await.unwrap();
    assert_eq!((first.counter, first.not_after), (1, END + 2 * DAY_MS));
    let peer = cortex_hub::link::tls::read_node_certificate(w.nodes.hub, &first.der).expect("a node certificate of this hub");
    assert_eq!((peer.node, peer.spki, peer.not_after), (m.id, sha256(&m.spki()), first.not_after));
    assert!(matches!(told.next().await, Told::Event(_, e) if e.kind() == "recovered"));

    // The answer was lost: the same again, also much later, and told once.
    w.at(END + 3 * DAY_MS);
    assert_eq!(w.ask(&m, 1).await.unwrap(), first);
    let second = w.ask(&m, 2).await.unwrap();
    assert_eq!((second.counter, second.not_after), (2, END + 4 * DAY_MS));
    let Told::Event(_, e) = told.next().await else { panic!() };
    assert_eq!(format!("{:?}", e.data).matches(&second.not_after.to_string()).count(), 1, "{e:?}");
    // What was given by a renewal whose answer was lost is given again too.
    let caller = Caller::Node { node: m.id, generation: 1 };
    let renewed = w.nodes.renew(&caller, &m.spki(), 3, &[]).await.unwrap();
    assert_eq!(w.ask(&m, 3).await.unwrap(), renewed);
    // Neither what is over nor what is far ahead.
    for stale in [0, 1, 2, 68, u64::MAX] {
        assert_eq!(refused(&w, m.asks(w.nodes.hub, 1, stale)).await, "stale_counter", "{stale}");
    }
}

#[tokio::test]
async fn only_the_key_of_the_last_certificate_on_its_own_channel_recovers() {
    let w = World::new();
    let (m, other) = (w.enrolled(1).await, w.enrolled(2).await);
    w.at(END + 1);
    let hub = w.nodes.hub;
    let good = || m.asks(hub, 1, 1);

    // What was overheard on one channel is worth nothing on another.
    assert_eq!(refused(&w, Recovery { exporter: [2; 32], ..good() }).await, "unauthenticated");
    // Nor is any word of it worth anything once changed.
    assert_eq!(refused(&w, Recovery { nonce: [4; 32], ..good() }).await, "unauthenticated");
    assert_eq!(refused(&w, Recovery { counter: 2, ..good() }).await, "unauthenticated");
    assert_eq!(refused(&w, Recovery { node: other.id, ..good() }).await, "unauthenticated");
    assert_eq!(refused(&w, Recovery { spki_der: other.spki(), ..good() }).await, "unauthenticated");
    assert_eq!(refused(&w, Recovery { proof: vec![], ..good() }).await, "unauthenticated");
    assert_eq!(refused(&w, m.asks(HubId::from_bytes([9; 16]), 1, 1)).await, "unauthenticated");
    // A true proof, by a key that is not this node's.
    let liar = Machine { id: m.id, key: SigningKey::from_bytes(&[8; 32]) };
    assert_eq!(refused(&w, liar.asks(hub, 1, 1)).await, "unauthenticated");
    let liar = Machine { id: m.id, key: other.key.clone() };
    assert_eq!(refused(&w, liar.asks(hub, 1, 1)).await, "unauthenticated");
    // A key of another kind, and of no kind; a key that signs everything.
    let p256 = KeyPair::generate().unwrap().subject_public_key_info();
    let weak = [&m.spki()[..12], &[0; 32]].concat();
    for spki_der in [p256, vec![], m.spki()[..43].to_vec(), weak] {
        assert_eq!(refused(&w, Recovery { spki_der, ..good() }).await, "unauthenticated");
    }
    // Nobody that is known here.
    assert_eq!(refused(&w, Machine::new(5).asks(hub, 1, 1)).await, "unauthenticated");
    // An enrolment's proof is not one: another document begins otherwise.
    let spki = sha256(&m.spki());
    let invite = mesh_core::InviteId::from_bytes(*m.id.as_bytes());
    let proof = m.key.sign(&enrol::proof_bytes(hub, invite, &[1; 32], &spki, &[3; 32])).to_bytes().to_vec();
    assert_eq!(refused(&w, Recovery { proof, ..good() }).await, "unauthenticated");
    // And the true one still serves.
    assert_eq!(w.nodes.recover(good()).await.unwrap().counter, 1);
}

#[tokio::test]
async fn revoked_removed_and_long_gone_nodes_hear_so() {
    let w = World::new();
    let (m, other) = (w.enrolled(1).await, w.enrolled(2).await);
    w.at(END + 30 * DAY_MS + 1);
    assert_eq!(refused(&w, m.asks(w.nodes.hub, 1, 1)).await, "recover_too_late");
    w.at(END + 30 * DAY_MS);
    let last = w.ask(&m, 1).await.expect("the last moment");
    // Its new certificate counts from here on.
    w.at(last.not_after + 30 * DAY_MS);
    assert_eq!(w.ask(&m, 2).await.unwrap().counter, 2);

    w.at(END + 1);
    w.store.revoke_node(m.id, END).await.unwrap().unwrap();
    assert_eq!(refused(&w, m.asks(w.nodes.hub, 1, 3)).await, "revoked");
    assert_eq!(refused(&w, m.asks(w.nodes.hub, 1, 2)).await, "revoked", "also for what it was given before");
    let liar = Machine { id: m.id, key: SigningKey::from_bytes(&[8; 32]) };
    assert_eq!(refused(&w, liar.asks(w.nodes.hub, 1, 3)).await, "unauthenticated", "another key learns nothing");
    assert!(w.store.remove_node(other.id, END).await.unwrap());
    assert_eq!(refused(&w, other.asks(w.nodes.hub, 1, 1)).await, "revoked");
}

#[tokio::test]
async fn a_node_that_recovers_all_the_time_is_made_to_wait() {
    let w = World::new();
    let (m, other) = (w.enrolled(1).await, w.enrolled(2).await);
    w.at(END + 1);
    let mut last = 0;
    let refusal = loop {
        match w.ask(&m, last + 1).await {
            Ok(c) => last = c.counter,
            Err(e) => break code(&e),
        }
        assert!(last < 1000, "it goes on for ever");
    };
    assert_eq!(refusal, "recover_too_often");
    assert_eq!(w.ask(&other, 1).await.unwrap().counter, 1, "others do not feel it");
    w.at(END + 11 * 60_000);
    assert_eq!(w.ask(&m, last + 1).await.unwrap().counter, last + 1);
}

/// The hub's own certificate: connections from now on get the new one, and those that stand go on.
#[tokio::test(flavor = "multi_thread")]
async fn the_hubs_own_certificate_is_replaced_without_a_restart() {
    use cortex_hub::link::tls;
    use rustls::pki_types::{CertificateDer, ServerName};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio_stream::StreamExt;

    mesh_process::install_tls_provider();
    let dir = tempfile::tempdir().unwrap();
    let now = mesh_process::SystemClock::new().now_ms();
    let keys = Keys::open(dir.path(), now).unwrap();
    let (server, end) = tls::ServerTls::new(&keys, now).unwrap();
    assert_eq!(end, now + 30 * DAY_MS);
    let server = Arc::new(server);
    let tasks = mesh_process::Tasks::new();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (gate, mut accepted) = tls::Gate::new(keys.hub, server.clone(), 10);
    tls::accept(listener, gate, None, &tasks);

    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from(keys.authority().issuing().root.clone())).unwrap();
    let mut config = rustls::ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    let name = ServerName::try_from(enrol::server_name(keys.hub)).unwrap();
    let connect = async || {
        let tcp = tokio::net::TcpStream::connect(address).await.unwrap();
        let tls = connector.connect(name.clone(), tcp).await.unwrap();
        let leaf = tls.get_ref().1.peer_certificates().unwrap()[0].to_vec();
        (tls, leaf)
    };
    let (mut old, first) = connect().await;
    let mut served = accepted.next().await.unwrap().unwrap();
    // Dated a week back, so that a clock that lags takes it too.
    let later = now + 20 * DAY_MS;
    assert_eq!(server.renew(&keys, now + DAY_MS).unwrap(), now + 31 * DAY_MS);
    let (_new, second) = connect().await;
    assert_ne!(first, second);
    let dates = |der: &[u8]| {
        use x509_parser::prelude::FromDer;
        let (_, c) = x509_parser::certificate::X509Certificate::from_der(der).unwrap();
        (c.validity().not_before.timestamp() * 1000, c.validity().not_after.timestamp() * 1000)
    };
    let (from, to) = dates(&second);
    assert!(from <= now - 6 * DAY_MS && to > later + 10 * DAY_MS, "{from} {to}");
    old.write_all(b"on").await.unwrap();
    let mut said = [0; 2];
    served.read_exact(&mut said).await.unwrap();
    assert_eq!(&said, b"on");
}

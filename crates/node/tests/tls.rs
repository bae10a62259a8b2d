//! Whom a node believes at the other end of TLS: the pinned root, the fixed name, 1.3, at node time.

use cortex_node::link::time::NodeTime;
use cortex_node::tls::{TlsError, client_config, connect, spki_sha256};
use mesh_process::{Clock, SystemClock};
use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, PKCS_ED25519, SanType};
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use std::sync::Arc;
use std::time::Duration;
use time::OffsetDateTime;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

const NAME: &str = "hub_x.hub.cortex";
const DAY: i64 = 86_400_000;

struct Ca {
    der: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
}

fn ca() -> Ca {
    let key = KeyPair::generate_for(&PKCS_ED25519).unwrap();
    let mut p = CertificateParams::new(Vec::<String>::new()).unwrap();
    p.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    let der = p.self_signed(&key).unwrap().der().clone();
    Ca { der, issuer: Issuer::new(p, key) }
}

fn now_ms() -> i64 {
    SystemClock::new().now_ms()
}

struct Leaf {
    chain: Vec<CertificateDer<'static>>,
    key: KeyPair,
}

fn leaf(ca: &Ca, name: &str, from_ms: i64, to_ms: i64, with_root: bool) -> Leaf {
    let at = |ms: i64| OffsetDateTime::from_unix_timestamp(ms / 1000).unwrap();
    let key = KeyPair::generate_for(&PKCS_ED25519).unwrap();
    let mut p = CertificateParams::new(vec![name.to_owned()]).unwrap();
    (p.not_before, p.not_after) = (at(from_ms), at(to_ms));
    let mut chain = vec![p.signed_by(&key, &ca.issuer).unwrap().der().clone()];
    if with_root {
        chain.push(ca.der.clone());
    }
    Leaf { chain, key }
}

fn good(ca: &Ca) -> Leaf {
    leaf(ca, NAME, now_ms() - DAY, now_ms() + DAY, true)
}

struct Fixed(i64);
impl Clock for Fixed {
    fn now_ms(&self) -> i64 {
        self.0
    }
    fn steady(&self) -> Duration {
        Duration::ZERO
    }
    fn anchored_ms(&self) -> i64 {
        self.0
    }
}

/// Connects to a server with this leaf; says what the node thinks of it.
async fn meet(leaf: Leaf, pin: [u8; 32], stored_ms: i64, wall_ms: i64) -> Result<(), TlsError> {
    mesh_process::install_tls_provider();
    let mut server = rustls::ServerConfig::builder()
        .with_no_client_auth()
        .with_single_cert(leaf.chain, PrivatePkcs8KeyDer::from(leaf.key.serialize_der()).into())
        .unwrap();
    server.alpn_protocols = vec![b"h2".to_vec()];
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let serve = async {
        let (tcp, _) = listener.accept().await.unwrap();
        if let Ok(mut s) = TlsAcceptor::from(Arc::new(server)).accept(tcp).await {
            let _ = s.read(&mut [0; 1]).await;
        }
    };
    let config = client_config(pin, None, NodeTime::new(stored_ms, Arc::new(Fixed(wall_ms)))).unwrap();
    let (_, result) = tokio::join!(serve, async {
        connect(&address, NAME, config).await.map(|s| assert_eq!(s.get_ref().1.alpn_protocol(), Some(&b"h2"[..])))
    });
    result
}

fn handshake_words(r: Result<(), TlsError>) -> String {
    match r.unwrap_err() {
        TlsError::Handshake { source, .. } => source.to_string(),
        other => panic!("{other}"),
    }
}

#[tokio::test]
async fn the_pinned_root_is_believed() {
    let ca = ca();
    meet(good(&ca), spki_sha256(&ca.der).unwrap(), 0, now_ms()).await.unwrap();
}

#[tokio::test]
async fn a_wrong_pin_is_told_clearly() {
    let (ca, other) = (ca(), self::ca());
    let r = meet(good(&ca), spki_sha256(&other.der).unwrap(), 0, now_ms()).await;
    assert!(matches!(&r, Err(TlsError::Pin { .. })), "{r:?}");
    assert!(r.unwrap_err().to_string().contains("ca_pin"));
}

#[tokio::test]
async fn a_chain_without_its_root_is_not_believed() {
    let ca = ca();
    let short = leaf(&ca, NAME, now_ms() - DAY, now_ms() + DAY, false);
    assert!(matches!(meet(short, spki_sha256(&ca.der).unwrap(), 0, now_ms()).await, Err(TlsError::Pin { .. })));
}

#[tokio::test]
async fn the_pinned_root_beside_a_strangers_leaf_is_not_enough() {
    let (ca, stranger) = (ca(), self::ca());
    let mut leaf = leaf(&stranger, NAME, now_ms() - DAY, now_ms() + DAY, false);
    leaf.chain.push(ca.der.clone());
    let words = handshake_words(meet(leaf, spki_sha256(&ca.der).unwrap(), 0, now_ms()).await);
    assert!(words.contains("UnknownIssuer") || words.contains("BadSignature"), "{words}");
}

/// The certificate of a node, which the hub gave it: for a client, and no authority.
#[tokio::test]
async fn a_nodes_certificate_makes_no_hub() {
    let ca = ca();
    let pin = spki_sha256(&ca.der).unwrap();
    let at = |ms: i64| OffsetDateTime::from_unix_timestamp(ms / 1000).unwrap();
    let key = KeyPair::generate_for(&PKCS_ED25519).unwrap();
    let mut p = CertificateParams::default();
    p.subject_alt_names = vec![SanType::URI("spiffe://hub_x/node/node_1".try_into().unwrap())];
    p.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    (p.not_before, p.not_after) = (at(now_ms() - DAY), at(now_ms() + DAY));
    let node = p.signed_by(&key, &ca.issuer).unwrap().der().clone();

    let itself = Leaf { chain: vec![node.clone(), ca.der.clone()], key: KeyPair::try_from(key.serialize_der()).unwrap() };
    handshake_words(meet(itself, pin, 0, now_ms()).await);
    // With the hub's name on it, but for clients.
    let mut p = CertificateParams::new(vec![NAME.to_owned()]).unwrap();
    p.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    (p.not_before, p.not_after) = (at(now_ms() - DAY), at(now_ms() + DAY));
    let named = Leaf {
        chain: vec![p.signed_by(&key, &ca.issuer).unwrap().der().clone(), ca.der.clone()],
        key: KeyPair::try_from(key.serialize_der()).unwrap(),
    };
    handshake_words(meet(named, pin, 0, now_ms()).await);
    // Signed by the node's certificate, beside the true root.
    let maker = Ca { der: node.clone(), issuer: Issuer::from_ca_cert_der(&node, key).unwrap() };
    let mut leaf = leaf(&maker, NAME, now_ms() - DAY, now_ms() + DAY, true);
    leaf.chain.push(ca.der.clone());
    handshake_words(meet(leaf, pin, 0, now_ms()).await);
}

#[tokio::test]
async fn a_wrong_name_is_refused() {
    let ca = ca();
    let other = leaf(&ca, "other.hub.cortex", now_ms() - DAY, now_ms() + DAY, true);
    let words = handshake_words(meet(other, spki_sha256(&ca.der).unwrap(), 0, now_ms()).await);
    assert!(words.contains("not valid for name") || words.contains("NotValidForName"), "{words}");
}

#[tokio::test]
async fn certificates_are_judged_at_the_later_of_wall_clock_and_stored_hub_time() {
    let ca = ca();
    let pin = spki_sha256(&ca.der).unwrap();
    // the wall clock of a machine without a battery
    meet(good(&ca), pin, now_ms(), 0).await.unwrap();
    let words = handshake_words(meet(good(&ca), pin, 0, 0).await);
    assert!(words.contains("not valid yet") || words.contains("NotValidYet"), "{words}");
    let words = handshake_words(meet(good(&ca), pin, now_ms() + 2 * DAY, now_ms()).await);
    assert!(words.contains("expired") || words.contains("Expired"), "{words}");
}

#[tokio::test]
async fn tls_1_2_is_neither_offered_nor_taken() {
    mesh_process::install_tls_provider();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let serve = async {
        let (mut tcp, _) = listener.accept().await.unwrap();
        let mut hello = vec![0; 8192];
        let n = tcp.read(&mut hello).await.unwrap();
        // A ServerHello of TLS 1.2: no extension, suite ECDHE-RSA-AES128-GCM-SHA256.
        let mut body = vec![3, 3];
        body.extend([7; 32]);
        body.extend([0, 0xc0, 0x2f, 0]);
        let mut record = vec![22, 3, 3, 0, (body.len() + 4) as u8, 2, 0, 0, body.len() as u8];
        record.extend(body);
        tcp.write_all(&record).await.unwrap();
        let _ = tcp.read(&mut [0; 64]).await;
        hello.truncate(n);
        hello
    };
    let time = NodeTime::new(0, SystemClock::shared());
    let config = client_config([0; 32], None, time).unwrap();
    let (hello, result) = tokio::join!(serve, connect(&address, NAME, config));
    assert!(matches!(result, Err(TlsError::Handshake { .. })));
    let supported_versions_1_3_only = [0x00, 0x2b, 0x00, 0x03, 0x02, 0x03, 0x04];
    assert!(hello.windows(7).any(|w| w == supported_versions_1_3_only));
    let session_ticket = [0x00, 0x23, 0x00, 0x00];
    assert!(!hello.windows(4).any(|w| w == session_ticket), "no tickets are asked for");
}

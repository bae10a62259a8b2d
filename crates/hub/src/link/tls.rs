//! TLS 1.3 by our own accept loop: it alone can hand the exporter and the verified certificate to the
//! handlers, and tell links from requests where both come to one port.

use super::Peer as Node;
use super::crowd::{self, Crowd};
use crate::doors::https;
use crate::doors::listener::Peer;
use crate::keys::{KeyError, Keys};
use arc_swap::ArcSwap;
use mesh_core::{HubId, UnixMs, enrol, sha256};
use mesh_process::Tasks;
use rustls::RootCertStore;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::Sleep;
use tokio_rustls::LazyConfigAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Connected;

/// Handshakes that are computed at once: the bound on what strangers can make the hub do.
const HANDSHAKES_AT_ONCE: usize = 64;
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Connections that have not finished their handshake, and how long one may stay silent at first:
/// who says nothing keeps nobody else out.
const KNOCKING_AT_ONCE: usize = 4096;
const SILENT_TIMEOUT: Duration = Duration::from_secs(3);
/// Connections without a certificate: they can enrol or recover, which takes two messages, and no more.
const STRANGERS_AT_ONCE: usize = 256;
const STRANGER_LIFE: Duration = Duration::from_secs(15);
/// Connections that have finished their handshake and wait to be served.
const ACCEPTED_QUEUE: usize = 64;
/// Of both, what one network may have: a quarter of the strangers, an eighth of those who knock.
const STRANGERS_A_NETWORK: u32 = 64;
const KNOCKING_A_NETWORK: u32 = 512;
/// How long to rest when the system gives no more connections (descriptors, memory).
const ACCEPT_REST: Duration = Duration::from_millis(100);

#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error(transparent)]
    Key(#[from] KeyError),
    #[error("TLS configuration: {0}")]
    Rustls(#[from] rustls::Error),
    #[error("client verification: {0}")]
    Verifier(#[from] rustls::server::VerifierBuilderError),
}

/// The server's TLS configuration; replaced as a whole when its certificate is renewed.
pub struct ServerTls {
    config: ArcSwap<rustls::ServerConfig>,
}

impl ServerTls {
    pub fn new(keys: &Keys, now: UnixMs) -> Result<(Self, UnixMs), TlsError> {
        let (config, not_after) = config(keys, now)?;
        Ok((Self { config: ArcSwap::new(config) }, not_after))
    }
    /// Takes a new certificate for all connections from now on; gives its end.
    pub fn renew(&self, keys: &Keys, now: UnixMs) -> Result<UnixMs, TlsError> {
        let (config, not_after) = config(keys, now)?;
        self.config.store(config);
        Ok(not_after)
    }
}

fn config(keys: &Keys, now: UnixMs) -> Result<(Arc<rustls::ServerConfig>, UnixMs), TlsError> {
    let identity = keys.server_identity(now)?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut roots = RootCertStore::empty();
    for root in keys.authority().roots() {
        roots.add(CertificateDer::from(root.to_vec()))?;
    }
    // Without a certificate only enrolment and recovery answer; a foreign or expired one fails the handshake.
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone()).allow_unauthenticated().build()?;
    let chain = identity.chain.into_iter().map(CertificateDer::from).collect();
    let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(identity.key));
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)?;
    // A resumed connection would outlive the certificate that began it.
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.max_early_data_size = 0;
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok((Arc::new(config), identity.not_after))
}

/// What a handler may know of its connection.
#[derive(Debug, Clone)]
pub struct Connection {
    pub address: SocketAddr,
    /// RFC 8446 exporter for the enrolment proof.
    pub exporter: [u8; 32],
    /// The client's verified certificate (DER).
    pub certificate: Option<Arc<[u8]>>,
}

pub struct LinkStream {
    tls: TlsStream<TcpStream>,
    connection: Connection,
    /// When a connection without a certificate has had its time.
    stranger: Option<Pin<Box<Sleep>>>,
    _places: Places,
}

/// What a connection has of the port's bounds, until it is closed.
struct Places {
    _any: OwnedSemaphorePermit,
    _stranger: Option<(OwnedSemaphorePermit, crowd::Place)>,
}

impl Drop for Places {
    fn drop(&mut self) {
        metrics::gauge!("cortex_link_connections").decrement(1);
    }
}

impl Connected for LinkStream {
    type ConnectInfo = Connection;
    fn connect_info(&self) -> Connection {
        self.connection.clone()
    }
}

impl AsyncRead for LinkStream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<std::io::Result<()>> {
        if let Some(end) = &mut self.stranger
            && end.as_mut().poll(cx).is_ready()
        {
            return Poll::Ready(Err(std::io::Error::new(std::io::ErrorKind::TimedOut, "an enrolment takes less time")));
        }
        Pin::new(&mut self.tls).poll_read(cx, buf)
    }
}
impl AsyncWrite for LinkStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.tls).poll_write(cx, buf)
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.tls).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.tls).poll_shutdown(cx)
    }
    fn poll_write_vectored(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bufs: &[std::io::IoSlice<'_>]) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.tls).poll_write_vectored(cx, bufs)
    }
    fn is_write_vectored(&self) -> bool {
        self.tls.is_write_vectored()
    }
}

/// What takes the links of every listener that gives some.
#[derive(Clone)]
pub struct Gate {
    tls: Arc<ServerTls>,
    /// The name by which nodes ask for the hub, whatever its address is called.
    name: Arc<str>,
    all: Arc<Semaphore>,
    strangers: Arc<Semaphore>,
    strange: Arc<Crowd>,
    ready: mpsc::Sender<Result<LinkStream, std::io::Error>>,
}

/// Connections of the node port whose handshake is done.
pub type Accepted = ReceiverStream<Result<LinkStream, std::io::Error>>;

impl Gate {
    /// For no more than `connections` at once, and few of them without a certificate.
    pub fn new(hub: HubId, tls: Arc<ServerTls>, connections: usize) -> (Self, Accepted) {
        let (ready, accepted) = mpsc::channel(ACCEPTED_QUEUE);
        let (all, strangers) = (Arc::new(Semaphore::new(connections)), Arc::new(Semaphore::new(STRANGERS_AT_ONCE)));
        let strange = Crowd::new(STRANGERS_A_NETWORK);
        (Self { tls, name: enrol::server_name(hub).into(), all, strangers, strange, ready }, ReceiverStream::new(accepted))
    }
}

/// Accepts connections and finishes their handshakes, a bounded number at a time. With `doors`, who asks
/// for the name that nodes ask for comes to the gate, and anybody else to the doors; without them all come
/// to the gate.
pub fn accept(listener: TcpListener, gate: Gate, doors: Option<https::Door>, tasks: &Tasks) {
    let (knocking, computing) = (Arc::new(Semaphore::new(KNOCKING_AT_ONCE)), Arc::new(Semaphore::new(HANDSHAKES_AT_ONCE)));
    let crowd = Crowd::new(KNOCKING_A_NETWORK);
    let group = tasks.clone();
    tasks.spawn_until_cancelled("TLS accept", async move {
        loop {
            let Ok(place) = knocking.clone().acquire_owned().await else { return };
            let (tcp, address) = match listener.accept().await {
                Ok(x) => x,
                Err(error) => {
                    tracing::warn!(%error, "a connection cannot be accepted");
                    tokio::time::sleep(ACCEPT_REST).await;
                    continue;
                }
            };
            let Some(of_network) = crowd.enter(address.ip()) else {
                refused("network");
                continue;
            };
            // Who can only be a link is refused before anything is read.
            let any = if doors.is_none() { gate.all.clone().try_acquire_owned().ok() } else { None };
            if doors.is_none() && any.is_none() {
                refused("connections");
                continue;
            }
            let knock = Knock {
                tcp,
                address,
                gate: gate.clone(),
                doors: doors.clone(),
                computing: computing.clone(),
                any,
                _places: (place, of_network),
            };
            group.spawn_until_cancelled("TLS handshake", knock.answer());
        }
    });
}

/// A connection before its handshake.
struct Knock {
    tcp: TcpStream,
    address: SocketAddr,
    gate: Gate,
    doors: Option<https::Door>,
    computing: Arc<Semaphore>,
    any: Option<OwnedSemaphorePermit>,
    _places: (OwnedSemaphorePermit, crowd::Place),
}

/// A connection after its handshake, and where it belongs.
enum Came {
    Link(Gate, Box<TlsStream<TcpStream>>, Connection, OwnedSemaphorePermit),
    Door(https::Door, Box<TlsStream<TcpStream>>, Peer),
    /// There is no room for it.
    Refused,
}

impl Knock {
    async fn answer(self) {
        let mut first = [0];
        if !matches!(tokio::time::timeout(SILENT_TIMEOUT, self.tcp.peek(&mut first)).await, Ok(Ok(1))) {
            return;
        }
        if self.doors.is_some() && first[0].is_ascii_uppercase() {
            let _ = tokio::time::timeout(SILENT_TIMEOUT, https::answer_plain(self.tcp)).await;
            return;
        }
        let (metric, address) =
            (if self.doors.is_some() { "cortex_http_handshakes_total" } else { "cortex_link_handshakes_total" }, self.address);
        match tokio::time::timeout(HANDSHAKE_TIMEOUT, self.shake()).await {
            Ok(Ok(Came::Link(gate, tls, connection, any))) => {
                count("cortex_link_handshakes_total", "done");
                gate.take(connection, *tls, any).await;
            }
            Ok(Ok(Came::Door(doors, tls, peer))) => {
                count("cortex_http_handshakes_total", "done");
                let _ = doors.ready.send((*tls, peer)).await;
            }
            Ok(Ok(Came::Refused)) => refused("connections"),
            Ok(Err(error)) => {
                count(metric, "failed");
                tracing::info!(%address, %error, "a TLS handshake failed");
            }
            Err(_) => {
                count(metric, "timed_out");
                tracing::info!(%address, "a TLS handshake took too long");
            }
        }
    }

    async fn shake(self) -> std::io::Result<Came> {
        let peer = Peer::of(&self.tcp, self.address);
        let hello = LazyConfigAcceptor::new(rustls::server::Acceptor::default(), self.tcp).await?;
        let asks_for_link = hello.client_hello().server_name().is_some_and(|n| n.eq_ignore_ascii_case(&self.gate.name));
        let _computing = self.computing.acquire().await.map_err(std::io::Error::other)?;
        match self.doors {
            Some(doors) if !asks_for_link => {
                let tls = hello.into_stream(doors.tls.current()).await?;
                Ok(Came::Door(doors, Box::new(tls), peer))
            }
            _ => {
                let Some(any) = self.any.or_else(|| self.gate.all.clone().try_acquire_owned().ok()) else {
                    return Ok(Came::Refused);
                };
                let tls = hello.into_stream(self.gate.tls.config.load_full()).await?;
                let connection = LinkStream::connection(&tls, self.address)?;
                Ok(Came::Link(self.gate, Box::new(tls), connection, any))
            }
        }
    }
}

fn count(metric: &'static str, result: &'static str) {
    metrics::counter!(metric, "result" => result).increment(1);
}

impl Gate {
    async fn take(self, connection: Connection, tls: TlsStream<TcpStream>, any: OwnedSemaphorePermit) {
        let stranger = connection.certificate.is_none();
        let place = || Some((self.strangers.clone().try_acquire_owned().ok()?, self.strange.enter(connection.address.ip())?));
        let place = if stranger { place().map(Some) } else { Some(None) };
        let Some(place) = place else { return refused("strangers") };
        metrics::gauge!("cortex_link_connections").increment(1);
        let places = Places { _any: any, _stranger: place };
        let stranger = stranger.then(|| Box::pin(tokio::time::sleep(STRANGER_LIFE)));
        let _ = self.ready.send(Ok(LinkStream { tls, connection, stranger, _places: places })).await;
    }
}

fn refused(limit: &'static str) {
    metrics::counter!("cortex_link_connections_refused_total").increment(1);
    tracing::debug!(limit, "a connection of the node port was refused");
}

impl LinkStream {
    fn connection(tls: &TlsStream<TcpStream>, address: SocketAddr) -> std::io::Result<Connection> {
        let (_, session) = tls.get_ref();
        let mut exporter = [0; 32];
        session.export_keying_material(&mut exporter, enrol::EXPORTER_LABEL, None).map_err(std::io::Error::other)?;
        let certificate = session.peer_certificates().and_then(|c| c.first()).map(|c| Arc::from(c.as_ref()));
        Ok(Connection { address, exporter, certificate })
    }
}

/// Reads who a verified certificate is for: exactly one URI of this hub, for a client.
pub fn read_node_certificate(hub: HubId, der: &[u8]) -> Option<Node> {
    use x509_parser::prelude::*;
    let (_, c) = X509Certificate::from_der(der).ok()?;
    let san = c.subject_alternative_name().ok()??;
    let [GeneralName::URI(uri)] = san.value.general_names.as_slice() else { return None };
    if !c.extended_key_usage().ok()??.value.client_auth {
        return None;
    }
    Some(Node {
        node: enrol::parse_node_uri(hub, uri)?,
        spki: sha256(c.public_key().raw),
        not_after: c.validity().not_after.timestamp() * 1000,
        certificate: der.into(),
    })
}

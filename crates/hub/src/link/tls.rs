//! TLS 1.3 on the node port, by our own accept loop: it alone can hand the exporter and the verified
//! certificate to the handlers.

use super::Peer;
use super::crowd::{self, Crowd};
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
use tokio_rustls::TlsAcceptor;
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
    roots.add(CertificateDer::from(keys.root_der().to_vec()))?;
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

/// Accepts connections and finishes their handshakes, a bounded number at a time; no more than
/// `connections` at once, and few of them without a certificate.
pub fn accept(
    listener: TcpListener,
    tls: Arc<ServerTls>,
    connections: usize,
    tasks: &Tasks,
) -> ReceiverStream<Result<LinkStream, std::io::Error>> {
    let (ready, stream) = mpsc::channel(ACCEPTED_QUEUE);
    let (door, gate) = (Arc::new(Semaphore::new(KNOCKING_AT_ONCE)), Arc::new(Semaphore::new(HANDSHAKES_AT_ONCE)));
    let (all, strangers) = (Arc::new(Semaphore::new(connections)), Arc::new(Semaphore::new(STRANGERS_AT_ONCE)));
    let (knocking, strange) = (Crowd::new(KNOCKING_A_NETWORK), Crowd::new(STRANGERS_A_NETWORK));
    let group = tasks.clone();
    tasks.spawn_until_cancelled("node-port accept", async move {
        loop {
            let Ok(place) = door.clone().acquire_owned().await else { return };
            let (tcp, address) = match listener.accept().await {
                Ok(x) => x,
                Err(error) => {
                    tracing::warn!(%error, "the node port cannot accept a connection");
                    tokio::time::sleep(ACCEPT_REST).await;
                    continue;
                }
            };
            let Some(knock) = knocking.enter(address.ip()) else {
                refused("network");
                continue;
            };
            let Ok(any) = all.clone().try_acquire_owned() else {
                refused("connections");
                continue;
            };
            let strange = strange.clone();
            let (config, ready, gate, strangers) = (tls.config.load_full(), ready.clone(), gate.clone(), strangers.clone());
            group.spawn_until_cancelled("node-port handshake", async move {
                if !matches!(tokio::time::timeout(SILENT_TIMEOUT, tcp.readable()).await, Ok(Ok(()))) {
                    return;
                }
                let Ok(permit) = gate.acquire().await else { return };
                let shaken = tokio::time::timeout(HANDSHAKE_TIMEOUT, handshake(config, tcp, address)).await;
                drop((permit, place, knock));
                let count = |result| metrics::counter!("cortex_link_handshakes_total", "result" => result).increment(1);
                match shaken {
                    Ok(Ok((tls, connection))) => {
                        count("done");
                        let stranger = connection.certificate.is_none();
                        let place = || Some((strangers.try_acquire_owned().ok()?, strange.enter(address.ip())?));
                        let place = if stranger { place().map(Some) } else { Some(None) };
                        let Some(place) = place else { return refused("strangers") };
                        metrics::gauge!("cortex_link_connections").increment(1);
                        let places = Places { _any: any, _stranger: place };
                        let stranger = stranger.then(|| Box::pin(tokio::time::sleep(STRANGER_LIFE)));
                        let _ = ready.send(Ok(LinkStream { tls, connection, stranger, _places: places })).await;
                    }
                    Ok(Err(error)) => {
                        count("failed");
                        tracing::info!(%address, %error, "a handshake on the node port failed");
                    }
                    Err(_) => {
                        count("timed_out");
                        tracing::info!(%address, "a handshake on the node port took too long");
                    }
                }
            });
        }
    });
    ReceiverStream::new(stream)
}

fn refused(limit: &'static str) {
    metrics::counter!("cortex_link_connections_refused_total").increment(1);
    tracing::debug!(limit, "a connection of the node port was refused");
}

async fn handshake(
    config: Arc<rustls::ServerConfig>,
    tcp: TcpStream,
    address: SocketAddr,
) -> std::io::Result<(TlsStream<TcpStream>, Connection)> {
    tcp.set_nodelay(true)?;
    let tls = TlsAcceptor::from(config).accept(tcp).await?;
    let (_, session) = tls.get_ref();
    let mut exporter = [0; 32];
    session.export_keying_material(&mut exporter, enrol::EXPORTER_LABEL, None).map_err(std::io::Error::other)?;
    let certificate = session.peer_certificates().and_then(|c| c.first()).map(|c| Arc::from(c.as_ref()));
    Ok((tls, Connection { address, exporter, certificate }))
}

/// Reads who a verified certificate is for: exactly one URI of this hub, for a client.
pub fn read_node_certificate(hub: HubId, der: &[u8]) -> Option<Peer> {
    use x509_parser::prelude::*;
    let (_, c) = X509Certificate::from_der(der).ok()?;
    let san = c.subject_alternative_name().ok()??;
    let [GeneralName::URI(uri)] = san.value.general_names.as_slice() else { return None };
    if !c.extended_key_usage().ok()??.value.client_auth {
        return None;
    }
    Some(Peer {
        node: enrol::parse_node_uri(hub, uri)?,
        spki: sha256(c.public_key().raw),
        not_after: c.validity().not_after.timestamp() * 1000,
    })
}

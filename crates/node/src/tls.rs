//! TLS towards the hub: 1.3 alone, no resumption, trust anchors that are found by their pins.
//!
//! The hub sends its whole chain. The certificates in it whose SubjectPublicKeyInfo has a pinned SHA-256
//! become the only anchors; the leaf is then verified as usual for the hub's fixed name, at
//! node time. The connection is made here and not by tonic, so that the exporter stays in reach.

use crate::link::time::NodeTime;
use crate::trust::Trust;
use mesh_core::Digest;
use mesh_process::proxy::ProxyError;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use std::sync::Arc;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use x509_parser::prelude::{FromDer, X509Certificate};

/// Said by the verifier when no certificate of the chain matches; callers look for it.
pub const WRONG_PIN: &str = "the hub's certificate chain does not hold the pinned root (ca_pin)";

#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("{0:?} is not a server name")]
    Name(String),
    #[error("TLS settings: {0}")]
    Config(#[from] rustls::Error),
    #[error("{address}: {source}")]
    Connect {
        address: String,
        #[source]
        source: std::io::Error,
    },
    #[error("TLS with {address}: {source}")]
    Handshake {
        address: String,
        #[source]
        source: std::io::Error,
    },
    #[error(
        "{WRONG_PIN}; it is another hub or somebody in between, or the hub has retired that root while this machine was away: then join anew with a fresh invite; nothing was sent ({address})"
    )]
    Pin { address: String },
    #[error("{address} did not answer within {secs} s")]
    Late { address: String, secs: u64 },
    #[error(transparent)]
    Proxy(#[from] ProxyError),
    /// What each of the hub's addresses came to.
    #[error("no address of the hub leads to it: {0}")]
    All(String),
}

/// Roots that are believed: by the SHA-256 of their SubjectPublicKeyInfo.
#[derive(Debug, Clone)]
pub struct Roots {
    pins: Vec<Digest>,
    /// Themselves, as far as they are known: they serve when the hub leaves them out of its chain.
    known: Vec<CertificateDer<'static>>,
}

impl From<Digest> for Roots {
    fn from(pin: Digest) -> Self {
        Self { pins: vec![pin], known: vec![] }
    }
}
impl From<&Trust> for Roots {
    fn from(trust: &Trust) -> Self {
        Self { pins: trust.pins.clone(), known: trust.roots.clone() }
    }
}

#[derive(Debug)]
struct PinVerifier {
    roots: Roots,
    provider: Arc<CryptoProvider>,
}

/// SHA-256 of the SubjectPublicKeyInfo in DER.
pub fn spki_sha256(certificate: &[u8]) -> Option<Digest> {
    let (_, c) = X509Certificate::from_der(certificate).ok()?;
    Some(mesh_core::sha256(c.public_key().raw))
}

impl ServerCertVerifier for PinVerifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let pinned = |c: &&CertificateDer<'_>| spki_sha256(c).is_some_and(|h| self.roots.pins.contains(&h));
        let mut roots = RootCertStore::empty();
        for anchor in std::iter::once(leaf).chain(intermediates).filter(pinned) {
            roots.add(anchor.clone().into_owned())?;
        }
        let shown = !roots.is_empty();
        for anchor in self.roots.known.iter().filter(pinned) {
            roots.add(anchor.clone())?;
        }
        if roots.is_empty() {
            return Err(rustls::Error::General(WRONG_PIN.into()));
        }
        WebPkiServerVerifier::builder_with_provider(Arc::new(roots), self.provider.clone())
            .build()
            .map_err(|e| rustls::Error::General(format!("the pinned root is not usable: {e}")))?
            .verify_server_cert(leaf, intermediates, name, ocsp, now)
            .map_err(|e| match e {
                rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer) if !shown => rustls::Error::General(WRONG_PIN.into()),
                e => e,
            })
    }
    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.2 is not spoken".into()))
    }
    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, certificate, signed, &self.provider.signature_verification_algorithms)
    }
    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// Who a node shows itself as.
pub struct ClientCertificate {
    pub certificate: CertificateDer<'static>,
    pub root: CertificateDer<'static>,
    pub key: PrivateKeyDer<'static>,
}

/// TLS 1.3, `h2`, no tickets, no session store; with a client certificate once there is one.
pub fn client_config(roots: impl Into<Roots>, own: Option<ClientCertificate>, time: NodeTime) -> Result<Arc<ClientConfig>, TlsError> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let mut roots = roots.into();
    roots.known.extend(own.as_ref().map(|o| o.root.clone()));
    let builder = ClientConfig::builder_with_details(provider.clone(), Arc::new(time))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(PinVerifier { roots, provider }));
    let mut config = match own {
        Some(own) => builder.with_client_auth_cert(vec![own.certificate], own.key)?,
        None => builder.with_no_client_auth(),
    };
    config.resumption = Resumption::disabled();
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(Arc::new(config))
}

/// Connects to `address` (`host:port`) and asks for `name`, whatever the address is called.
pub async fn connect(address: &str, name: &str, config: Arc<ClientConfig>) -> Result<TlsStream<TcpStream>, TlsError> {
    let tcp = TcpStream::connect(address).await.map_err(|source| TlsError::Connect { address: address.to_owned(), source })?;
    handshake(tcp, address, name, config).await
}

/// TLS over a connection that stands.
pub async fn handshake(tcp: TcpStream, address: &str, name: &str, config: Arc<ClientConfig>) -> Result<TlsStream<TcpStream>, TlsError> {
    let server = ServerName::try_from(name.to_owned()).map_err(|_| TlsError::Name(name.to_owned()))?;
    // Heartbeats and orders are small; waiting to fill a segment would only delay them.
    let _ = tcp.set_nodelay(true);
    TlsConnector::from(config).connect(server, tcp).await.map_err(|source| {
        let address = address.to_owned();
        if source.to_string().contains(WRONG_PIN) { TlsError::Pin { address } } else { TlsError::Handshake { address, source } }
    })
}

/// A gRPC channel over one connection that stands already; when it ends, the channel ends.
pub async fn channel<S>(stream: S) -> Result<tonic::transport::Channel, tonic::transport::Error>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    use mesh_wire::limits;
    let mut once = Some(hyper_util::rt::TokioIo::new(stream));
    let connector = tower::service_fn(move |_: tonic::transport::Uri| {
        let stream = once.take().ok_or_else(|| std::io::Error::other("the connection to the hub has ended"));
        async move { stream }
    });
    tonic::transport::Endpoint::from_static("http://hub.cortex")
        .initial_stream_window_size(limits::STREAM_WINDOW_BYTES)
        .initial_connection_window_size(limits::CONNECTION_WINDOW_BYTES)
        .connect_with_connector(connector)
        .await
}

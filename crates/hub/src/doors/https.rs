//! HTTPS for the doors: a certificate that was given, or one of the hub's own authority. TLS 1.3 alone.

use super::listener::{Accept, Peer};
use crate::keys::{KeyError, Keys};
use arc_swap::ArcSwap;
use mesh_core::{Digest, UnixMs, sha256};
use mesh_process::SharedClock;
use mesh_process::config::BadSetting;
use mesh_wire::convert::rfc3339;
use rustls::ServerConfig;
use rustls::client::verify_server_name;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName};
use rustls::server::ParsedCertificate;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio_rustls::server::TlsStream;
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

/// How often the files of a given certificate are looked at.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// Connections that have finished their handshake and wait to be served.
pub const ACCEPTED_QUEUE: usize = 64;
/// Whoever speaks plain HTTP here hears this.
const PLAIN: &[u8] =
    b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Type: text/plain\r\nContent-Length: 36\r\n\r\nthis address speaks HTTPS, not HTTP\n";

/// So much of what they say is read.
const PLAIN_READ: u64 = 64 << 10;

/// Where the doors' certificate comes from.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Tls {
    /// Plain HTTP.
    #[default]
    None,
    /// The hub's own authority.
    Own,
    Given(Given),
}

/// Two files in PEM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Given {
    pub certificate: PathBuf,
    pub key: PathBuf,
    /// Where the setting stands.
    pub place: String,
    /// What clients call the hub, where that is known; the certificate must be for it.
    pub host: Option<String>,
}

/// A given certificate that can be used.
pub struct Loaded {
    config: Arc<ServerConfig>,
    /// Whom it is for.
    pub names: Vec<String>,
    /// Of the files as they were.
    seen: Digest,
}

impl Given {
    fn bad(&self, key: &str, reason: impl ToString) -> BadSetting {
        BadSetting::new(&self.place, key, reason)
    }
    fn read(&self) -> Result<(Vec<u8>, Vec<u8>, Digest), BadSetting> {
        let read =
            |key: &str, path: &PathBuf| std::fs::read(path).map_err(|e| self.bad(key, format!("{} cannot be read: {e}", path.display())));
        let (certificate, key) = (read("http.tls_cert", &self.certificate)?, read("http.tls_key", &self.key)?);
        let seen = sha256(&[sha256(&certificate), sha256(&key)].concat());
        Ok((certificate, key, seen))
    }

    /// Reads both files and judges them as a client would.
    pub fn load(&self, now: UnixMs) -> Result<Loaded, BadSetting> {
        let (certificate, key, seen) = self.read()?;
        self.judge(&certificate, &key, seen, now)
    }

    fn judge(&self, certificate: &[u8], key: &[u8], seen: Digest, now: UnixMs) -> Result<Loaded, BadSetting> {
        let (path, key_path) = (self.certificate.display(), self.key.display());
        let bad = |reason: String| self.bad("http.tls_cert", reason);
        let chain = CertificateDer::pem_slice_iter(certificate)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|e| bad(format!("{path} is not a certificate in PEM: {e}")))?;
        let leaf = chain.first().ok_or_else(|| bad(format!("{path} holds no certificate in PEM")))?;
        let (_, parsed) = X509Certificate::from_der(leaf).map_err(|e| bad(format!("{path} holds no good certificate: {e}")))?;
        let (from, to) = (parsed.validity().not_before.timestamp() * 1000, parsed.validity().not_after.timestamp() * 1000);
        if to <= now {
            return Err(bad(format!("the certificate in {path} ended at {}; put a new one there", rfc3339(to))));
        }
        if from > now {
            return Err(bad(format!("the certificate in {path} begins only at {}; look at this machine's clock", rfc3339(from))));
        }
        if let Ok(Some(purposes)) = parsed.extended_key_usage()
            && !(purposes.value.server_auth || purposes.value.any)
        {
            return Err(bad(format!("the certificate in {path} is not for a server")));
        }
        let names = names(&parsed);
        if let Some(host) = &self.host {
            let server = ServerName::try_from(host.trim_matches(['[', ']']).to_owned()).map_err(|e| bad(format!("{host:?}: {e}")))?;
            let checked = ParsedCertificate::try_from(leaf).and_then(|c| verify_server_name(&c, &server));
            checked
                .map_err(|_| bad(format!("the certificate in {path} is for {}, and not for {host} (http.public_url)", names.join(", "))))?;
        }
        let key = PrivateKeyDer::from_pem_slice(key)
            .map_err(|e| self.bad("http.tls_key", format!("{key_path} holds no private key in PEM without a passphrase: {e}")))?;
        let config = config(chain, key).map_err(|e| match e {
            rustls::Error::InconsistentKeys(_) => {
                self.bad("http.tls_key", format!("the key in {key_path} does not fit the certificate in {path}"))
            }
            e => self.bad("http.tls_key", format!("{path} and {key_path} cannot be used: {e}")),
        })?;
        Ok(Loaded { config, names, seen })
    }
}

/// DNS names and addresses that a certificate is for.
fn names(certificate: &X509Certificate<'_>) -> Vec<String> {
    let Ok(Some(san)) = certificate.subject_alternative_name() else { return vec![] };
    let name = |n: &GeneralName<'_>| match n {
        GeneralName::DNSName(name) => Some((*name).to_owned()),
        GeneralName::IPAddress(b) => match b.len() {
            4 => <[u8; 4]>::try_from(*b).ok().map(|b| std::net::IpAddr::from(b).to_string()),
            _ => <[u8; 16]>::try_from(*b).ok().map(|b| std::net::IpAddr::from(b).to_string()),
        },
        _ => None,
    };
    san.value.general_names.iter().filter_map(name).collect()
}

fn config(chain: Vec<CertificateDer<'static>>, key: PrivateKeyDer<'static>) -> Result<Arc<ServerConfig>, rustls::Error> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_single_cert(chain, key)?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

#[derive(Debug, thiserror::Error)]
pub enum HttpsError {
    #[error(transparent)]
    Key(#[from] KeyError),
    #[error("TLS configuration: {0}")]
    Rustls(#[from] rustls::Error),
}

/// The doors' TLS configuration; replaced as a whole with its certificate.
pub struct DoorTls {
    config: ArcSwap<ServerConfig>,
}

impl DoorTls {
    pub fn given(loaded: &Loaded) -> Self {
        Self { config: ArcSwap::new(loaded.config.clone()) }
    }
    /// By the hub's own authority, for these names.
    pub fn own(keys: &Keys, door_key: &str, names: &[String], now: UnixMs) -> Result<Self, HttpsError> {
        Ok(Self { config: ArcSwap::new(own(keys, door_key, names, now)?) })
    }
    pub fn renew(&self, keys: &Keys, door_key: &str, names: &[String], now: UnixMs) -> Result<(), HttpsError> {
        self.config.store(own(keys, door_key, names, now)?);
        Ok(())
    }
    pub fn current(&self) -> Arc<ServerConfig> {
        self.config.load_full()
    }

    /// Takes what stands in the files whenever that has changed and is good.
    pub async fn follow(&self, given: Given, loaded: Loaded, clock: SharedClock) {
        let mut seen = loaded.seen;
        let mut told = None;
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            let taken = match given.read() {
                Ok((.., now)) if now == seen => continue,
                Ok((certificate, key, now)) => {
                    seen = now;
                    given.judge(&certificate, &key, now, clock.now_ms())
                }
                Err(e) => Err(e),
            };
            match taken {
                Ok(fresh) => {
                    self.config.store(fresh.config);
                    told = None;
                    tracing::info!(names = fresh.names.join(", "), "the doors have a new certificate");
                }
                // Once for each reason: two files are seldom replaced in one instant.
                Err(error) if told.as_ref() != Some(&error) => {
                    tracing::warn!(%error, "the doors keep their certificate: the new one cannot be used");
                    told = Some(error);
                }
                Err(_) => {}
            }
        }
    }
}

fn own(keys: &Keys, door_key: &str, names: &[String], now: UnixMs) -> Result<Arc<ServerConfig>, HttpsError> {
    let identity = keys.door_identity(door_key, names, now)?;
    let chain = identity.chain.into_iter().map(CertificateDer::from).collect();
    Ok(config(chain, PrivateKeyDer::from(PrivatePkcs8KeyDer::from(identity.key)))?)
}

/// Tells whoever speaks plain HTTP here. What they sent is read to its end, or the answer would be lost with it.
pub async fn answer_plain(mut tcp: TcpStream) -> std::io::Result<()> {
    tcp.write_all(PLAIN).await?;
    tcp.shutdown().await?;
    tokio::io::copy(&mut (&mut tcp).take(PLAIN_READ), &mut tokio::io::sink()).await.map(drop)
}

/// What an accept loop needs to hand connections to the doors.
#[derive(Clone)]
pub struct Door {
    pub tls: Arc<DoorTls>,
    pub ready: mpsc::Sender<(TlsStream<TcpStream>, Peer)>,
}

/// Connections of the doors whose handshake is done.
pub struct Shaken(mpsc::Receiver<(TlsStream<TcpStream>, Peer)>);

impl Door {
    pub fn new(tls: Arc<DoorTls>) -> (Self, Shaken) {
        let (ready, shaken) = mpsc::channel(ACCEPTED_QUEUE);
        (Self { tls, ready }, Shaken(shaken))
    }
}

impl Accept for Shaken {
    type Io = TlsStream<TcpStream>;
    async fn accept(&mut self) -> std::io::Result<Option<(Self::Io, Peer)>> {
        match self.0.recv().await {
            Some(came) => Ok(Some(came)),
            // The accept loop has ended with the hub.
            None => std::future::pending().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::{CertificateParams, ExtendedKeyUsagePurpose, KeyPair};
    use std::path::Path;
    use time::{Duration as Span, OffsetDateTime};

    const NOW: UnixMs = 1_790_000_000_000;

    fn pair(dir: &Path, change: impl FnOnce(&mut CertificateParams)) -> Given {
        let key = KeyPair::generate().unwrap();
        let mut p = CertificateParams::new(vec!["hub.example".to_owned(), "192.0.2.7".into(), "*.lan.example".into()]).unwrap();
        let now = OffsetDateTime::from_unix_timestamp(NOW / 1000).unwrap();
        (p.not_before, p.not_after) = (now - Span::DAY, now + Span::DAY);
        change(&mut p);
        let given = Given { certificate: dir.join("cert.pem"), key: dir.join("key.pem"), place: "hub.toml".into(), host: None };
        std::fs::write(&given.certificate, p.self_signed(&key).unwrap().pem()).unwrap();
        std::fs::write(&given.key, key.serialize_pem()).unwrap();
        given
    }

    #[track_caller]
    fn refused(given: &Given, key: &str, words: &[&str]) {
        let e = given.load(NOW).err().expect("it cannot be used");
        assert!(e.key == key && e.place == "hub.toml" && words.iter().all(|w| e.reason.contains(w)), "{words:?}: {e}");
    }

    #[test]
    fn a_given_certificate_is_judged_as_by_a_client() {
        let dir = tempfile::tempdir().unwrap();
        let mut given = pair(dir.path(), |_| {});
        assert_eq!(given.load(NOW).unwrap().names, ["hub.example", "192.0.2.7", "*.lan.example"]);
        for good in ["hub.example", "192.0.2.7", "a.lan.example"] {
            given.host = Some(good.into());
            assert!(given.load(NOW).is_ok(), "{good}");
        }
        for foreign in ["other.example", "lan.example", "[fd00::1]"] {
            given.host = Some(foreign.into());
            refused(&given, "http.tls_cert", &["is for hub.example", foreign, "http.public_url"]);
        }
        given.host = None;
        std::fs::write(&given.key, KeyPair::generate().unwrap().serialize_pem()).unwrap();
        refused(&given, "http.tls_key", &["does not fit"]);
        std::fs::write(&given.key, "no key").unwrap();
        refused(&given, "http.tls_key", &["no private key"]);
        std::fs::remove_file(&given.key).unwrap();
        refused(&given, "http.tls_key", &["cannot be read"]);
        std::fs::write(&given.certificate, "").unwrap();
        std::fs::write(&given.key, "").unwrap();
        refused(&given, "http.tls_cert", &["holds no certificate"]);

        let ended = pair(dir.path(), |p| p.not_after = p.not_before + Span::HOUR);
        refused(&ended, "http.tls_cert", &["ended at 2026-", "put a new one"]);
        let early = pair(dir.path(), |p| p.not_before = p.not_after - Span::HOUR);
        refused(&early, "http.tls_cert", &["begins only at", "clock"]);
        let client = pair(dir.path(), |p| p.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth]);
        refused(&client, "http.tls_cert", &["not for a server"]);
    }
}

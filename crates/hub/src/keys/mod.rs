//! The keyring: every private key of the hub, in `{data_dir}/keys` (0700), never in the database.

mod authority;
mod passwords;
mod tokens;

pub use authority::{Authority, Pair};
pub use passwords::Argon2Passwords;

use arc_swap::ArcSwap;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use hub_engine::ports::{Keyring, StoreError, Stored};
use hub_engine::rotation::Step;
use mesh_core::seal::{self, Intent};
use mesh_core::{Digest, HubId, LoginId, NodeId, UnixMs, UserId, enrol, sha256};
use mesh_process::{entropy, files};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose, PublicKeyData, SanType,
    SerialNumber, SubjectPublicKeyInfo,
};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use time::OffsetDateTime;
use tokio::sync::watch;

#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    #[error("{path}: {source}")]
    File { path: PathBuf, source: std::io::Error },
    #[error("{path}: {problem}")]
    Damaged { path: PathBuf, problem: String },
    #[error("{0} has a database but no keys: put its keys folder back, or start with another data folder")]
    Missing(PathBuf),
    #[error("it is not the turn of {0}")]
    OutOfTurn(&'static str),
    #[error("making a certificate: {0}")]
    Certificate(#[from] rcgen::Error),
}

/// What a server needs for the node port or the doors.
pub struct ServerIdentity {
    /// Leaf, then root: the node finds its pin in it.
    pub chain: Vec<Vec<u8>>,
    /// PKCS#8 (DER).
    pub key: Vec<u8>,
    pub not_after: UnixMs,
}

pub struct Keys {
    pub hub: HubId,
    dir: PathBuf,
    authority: ArcSwap<Authority>,
    /// Told of each change of it.
    changed: watch::Sender<()>,
    one: Mutex<()>,
    intent: [u8; 32],
    token: [u8; 32],
    jwt: tokens::TokenKeys,
}

/// Every key file that a hub cannot be without, beside those of its authority.
const FILES: [&str; 4] = ["hub-id", "intent.key", "token.key", "jwt.key"];

/// The files of the keys folder, by name.
pub fn files(data_dir: &Path) -> std::io::Result<BTreeMap<String, Vec<u8>>> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(data_dir.join("keys"))? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        // What is hidden was left by a write that did not finish.
        if entry.file_type()?.is_file() && !name.starts_with('.') {
            found.insert(name, std::fs::read(entry.path())?);
        }
    }
    Ok(found)
}
/// Which of those that a hub needs are not among them.
pub fn missing(found: &BTreeMap<String, Vec<u8>>) -> Vec<&'static str> {
    let of_authority = if found.contains_key(authority::FILE) { &[][..] } else { &authority::BORN };
    of_authority.iter().copied().chain(FILES).filter(|name| !found.contains_key(*name)).collect()
}
/// The hub whose keys these are.
pub fn hub_of(found: &BTreeMap<String, Vec<u8>>) -> Option<HubId> {
    std::str::from_utf8(found.get("hub-id")?).ok()?.trim().parse().ok()
}
/// What a hub with these keys seals its backups with.
pub fn backup_key(found: &BTreeMap<String, Vec<u8>>) -> Option<[u8; 32]> {
    let mut intent = [0; 32];
    hex::decode_to_slice(found.get("intent.key")?.trim_ascii(), &mut intent).ok()?;
    Some(derived(&intent, b"cortex-mesh backup key 1"))
}
/// Puts keys into a new folder, that which says that all are there last.
pub fn write(data_dir: &Path, found: &BTreeMap<String, Vec<u8>>) -> Result<(), KeyError> {
    let dir = data_dir.join("keys");
    let wrong = |path: &Path| {
        let path = path.to_owned();
        move |source| KeyError::File { path, source }
    };
    files::private_dir(&dir).map_err(wrong(&dir))?;
    let (last, all): (Vec<_>, Vec<_>) = found.iter().partition(|(name, _)| *name == "hub-id");
    for (name, content) in all.into_iter().chain(last) {
        let path = dir.join(name);
        if Path::new(name).file_name().is_none_or(|plain| plain != name.as_str()) {
            return Err(KeyError::Damaged { path, problem: "no name for a key".into() });
        }
        files::write_private(&path, content).map_err(wrong(&path))?;
    }
    Ok(())
}

/// A key for one purpose. No intent begins like a purpose.
fn derived(intent: &[u8; 32], purpose: &[u8]) -> [u8; 32] {
    use hmac::{Hmac, KeyInit, Mac};
    let mut mac = Hmac::<sha2::Sha256>::new_from_slice(intent).expect("HMAC takes a key of any length");
    mac.update(purpose);
    mac.finalize().into_bytes().into()
}

const ROOT_YEARS: i64 = 10;
const SERVER_DAYS: i64 = 30;
const SERVER_BACK_DAYS: i64 = 7;
const NODE_BACK_MS: i64 = 5 * 60_000;

impl Keys {
    /// Opens the folder, or makes it with all keys on the very first start. A folder whose database
    /// exists without keys is refused: made anew, they would cut every node off.
    pub fn open(data_dir: &Path, now: UnixMs) -> Result<Self, KeyError> {
        let dir = data_dir.join("keys");
        if !dir.join("hub-id").exists() {
            if data_dir.join("hub.db").exists() {
                return Err(KeyError::Missing(data_dir.to_owned()));
            }
            Self::make(&dir, now)?;
        }
        let text = |name: &str| -> Result<String, KeyError> {
            let path = dir.join(name);
            std::fs::read_to_string(&path).map_err(|source| KeyError::File { path, source })
        };
        let secret = |name: &str| -> Result<[u8; 32], KeyError> {
            let path = dir.join(name);
            let mut out = [0; 32];
            hex::decode_to_slice(text(name)?.trim(), &mut out).map_err(|e| KeyError::Damaged { path, problem: e.to_string() })?;
            Ok(out)
        };
        let hub: HubId =
            text("hub-id")?.trim().parse().map_err(|e| KeyError::Damaged { path: dir.join("hub-id"), problem: format!("{e}") })?;
        Ok(Self {
            hub,
            authority: ArcSwap::from_pointee(Authority::open(&dir, hub)?),
            changed: watch::Sender::new(()),
            one: Mutex::new(()),
            intent: secret("intent.key")?,
            token: secret("token.key")?,
            jwt: tokens::TokenKeys::new(&secret("jwt.key")?, hub),
            dir,
        })
    }

    fn make(dir: &Path, now: UnixMs) -> Result<(), KeyError> {
        let put = |name: &str, content: &[u8]| {
            let path = dir.join(name);
            files::write_private(&path, content).map_err(|source| KeyError::File { path, source })
        };
        files::private_dir(dir).map_err(|source| KeyError::File { path: dir.to_owned(), source })?;
        let hub = HubId::from_parts(now, entropy::bytes());
        let pair = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
        let root = root_params(hub, now).self_signed(&pair)?;
        let [root_key, root_crt, task_key] = authority::BORN;
        put(root_key, pair.serialize_pem().as_bytes())?;
        put(root_crt, root.der())?;
        for name in [task_key, "intent.key", "token.key", "jwt.key"] {
            put(name, hex::encode(entropy::bytes::<32>()).as_bytes())?;
        }
        // Last: its presence says that all the others are there.
        put("hub-id", hub.to_string().as_bytes())
    }

    /// Who nodes believe now.
    pub fn authority(&self) -> Arc<Authority> {
        self.authority.load_full()
    }
    /// Told of each change of the authority from now on.
    pub fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }
    /// Takes a step of a rotation: on the disk first, then for all who ask.
    pub fn step(&self, step: Step, now: UnixMs) -> Result<(), KeyError> {
        let _one = self.one.lock().unwrap_or_else(PoisonError::into_inner);
        let next = self.authority().after(step, now)?.ok_or(KeyError::OutOfTurn(step.as_str()))?;
        next.write(&self.dir)?;
        self.authority.store(Arc::new(next));
        Ok(())
    }
    /// Tells who waits for [`Keys::changes`], once all that hangs on the keys has followed.
    pub fn tell(&self) {
        self.changed.send_replace(());
    }

    /// `sha256:` and hex of the SubjectPublicKeyInfo of the root that issues.
    pub fn pin(&self) -> String {
        self.authority().issuing().pin()
    }
    /// The roots in PEM, as clients of the doors want them.
    pub fn roots_pem(&self) -> String {
        let pem = |root: &[u8]| {
            let text = STANDARD.encode(root);
            let lines: Vec<_> = text.as_bytes().chunks(64).map(String::from_utf8_lossy).collect();
            format!("-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n", lines.join("\n"))
        };
        self.authority().roots().map(pem).collect()
    }

    /// The private key (PEM) of the doors' certificate, made when it is first needed. It stays, so that an
    /// invite can pin it over restarts.
    pub fn door_key(data_dir: &Path) -> Result<String, KeyError> {
        let path = data_dir.join("keys").join("https.key");
        match std::fs::read_to_string(&path) {
            Ok(pem) => Ok(pem),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                let pem = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?.serialize_pem();
                files::write_private(&path, pem.as_bytes()).map_err(|source| KeyError::File { path, source })?;
                Ok(pem)
            }
            Err(source) => Err(KeyError::File { path, source }),
        }
    }
    /// The pin of such a key, as curl takes it.
    pub fn door_pin(key: &str) -> Result<String, KeyError> {
        Ok(format!("sha256//{}", STANDARD.encode(sha256(&KeyPair::from_pem(key)?.subject_public_key_info()))))
    }
    /// The public key that orders are signed by.
    pub fn task_key(&self) -> [u8; 32] {
        self.authority().issuing().public()
    }

    /// What hubs of this deployment seal events with that pass through others' hands. Derived, so that
    /// hubs with the same keys folder have the same.
    pub fn bus_key(&self) -> [u8; 32] {
        derived(&self.intent, b"cortex-mesh bus key 1")
    }

    /// A fresh certificate for the node port: 30 days, dated a week back for clocks that lag.
    pub fn server_identity(&self, now: UnixMs) -> Result<ServerIdentity, KeyError> {
        self.identity(KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?, vec![enrol::server_name(self.hub)], now)
    }

    /// The same for the doors, under these names, with the key that [`Keys::door_key`] gives.
    pub fn door_identity(&self, key: &str, names: &[String], now: UnixMs) -> Result<ServerIdentity, KeyError> {
        self.identity(KeyPair::from_pem(key)?, names.to_vec(), now)
    }

    fn identity(&self, pair: KeyPair, names: Vec<String>, now: UnixMs) -> Result<ServerIdentity, KeyError> {
        let mut p = CertificateParams::new(names)?;
        p.use_authority_key_identifier_extension = true;
        p.distinguished_name.push(DnType::CommonName, "Cortex Mesh hub");
        p.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        p.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        p.serial_number = Some(serial());
        p.not_before = at(now) - time::Duration::days(SERVER_BACK_DAYS);
        p.not_after = at(now) + time::Duration::days(SERVER_DAYS);
        let authority = self.authority();
        let leaf = p.signed_by(&pair, &authority.issuing().issuer()?)?;
        Ok(ServerIdentity {
            chain: [vec![leaf.der().to_vec()], authority.chain()].concat(),
            key: pair.serialize_der(),
            not_after: now + SERVER_DAYS * 86_400_000,
        })
    }
}

fn root_params(hub: HubId, now: UnixMs) -> CertificateParams {
    let mut p = CertificateParams::default();
    p.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    p.distinguished_name.push(DnType::CommonName, format!("Cortex Mesh root of {hub}"));
    p.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    p.serial_number = Some(serial());
    p.not_before = at(now) - time::Duration::days(SERVER_BACK_DAYS);
    p.not_after = at(now) + time::Duration::days(365 * ROOT_YEARS);
    p
}

fn at(ms: UnixMs) -> OffsetDateTime {
    OffsetDateTime::from_unix_timestamp(ms / 1000).unwrap_or(OffsetDateTime::UNIX_EPOCH)
}

/// 127 random bits: positive and never twice.
fn serial() -> SerialNumber {
    let mut b: [u8; 16] = entropy::bytes();
    b[0] &= 0x7f;
    SerialNumber::from_slice(&b)
}

impl Keyring for Keys {
    fn sign(&self, payload_type: &str, body: &[u8]) -> (String, [u8; 64]) {
        self.authority().issuing().sign(payload_type, body)
    }
    fn sign_for(&self, believed: &[String], payload_type: &str, body: &[u8]) -> (String, [u8; 64]) {
        self.authority().for_keys(believed).sign(payload_type, body)
    }
    fn key_id(&self) -> String {
        seal::key_id(&self.task_key())
    }
    fn signers(&self) -> Vec<[u8; 32]> {
        self.authority().signers()
    }
    fn seal(&self, intent: &Intent) -> Digest {
        intent.seal(&self.intent)
    }
    fn is_sealed(&self, intent: &Intent, seal: &Digest) -> bool {
        intent.is_sealed_by(&self.intent, seal)
    }
    fn token_mac(&self, token: &str) -> Digest {
        use hmac::{Hmac, KeyInit, Mac};
        let mut mac = Hmac::<sha2::Sha256>::new_from_slice(&self.token).expect("HMAC takes a key of any length");
        mac.update(token.as_bytes());
        mac.finalize().into_bytes().into()
    }
    fn issue_access(&self, user: UserId, login: LoginId, now: UnixMs, expires_at: UnixMs) -> String {
        self.jwt.issue(user, login, now, expires_at)
    }
    fn read_access(&self, token: &str, now: UnixMs) -> Option<(UserId, LoginId)> {
        self.jwt.read(token, now)
    }
    fn counts(&self, certificate: &[u8]) -> bool {
        self.authority().issuer_of(certificate).is_some()
    }
    fn issue_certificate(&self, node: NodeId, spki_der: &[u8], now: UnixMs, not_after: UnixMs, believed: &[Digest]) -> Stored<Vec<u8>> {
        let issue = || -> Result<Vec<u8>, rcgen::Error> {
            let key = SubjectPublicKeyInfo::from_der(spki_der)?;
            let mut p = CertificateParams::default();
            p.distinguished_name = rcgen::DistinguishedName::new();
            p.subject_alt_names = vec![SanType::URI(enrol::node_uri(self.hub, node).try_into()?)];
            p.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
            p.key_usages = vec![KeyUsagePurpose::DigitalSignature];
            p.serial_number = Some(serial());
            // Dated back for another hub's clock that lags, but never by much of a short life.
            p.not_before = at(now - NODE_BACK_MS.min((not_after - now) / 10));
            p.not_after = at(not_after);
            let authority = self.authority();
            Ok(p.signed_by(&key, &authority.for_roots(believed).issuer()?)?.der().to_vec())
        };
        issue().map_err(|e| StoreError::new("issue a node certificate", e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: UnixMs = 1_790_000_000_000;

    #[test]
    fn keys_are_made_once_and_private() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let a = Keys::open(dir.path(), NOW).unwrap();
        let b = Keys::open(dir.path(), NOW + 5).unwrap();
        assert_eq!((a.hub, a.pin(), a.task_key(), a.bus_key()), (b.hub, b.pin(), b.task_key(), b.bus_key()));
        assert!(![a.intent, a.token].contains(&a.bus_key()));
        for f in std::fs::read_dir(dir.path().join("keys")).unwrap() {
            let f = f.unwrap();
            assert_eq!(f.metadata().unwrap().permissions().mode() & 0o777, 0o600, "{f:?}");
        }
        std::fs::write(dir.path().join("hub.db"), "x").unwrap();
        std::fs::remove_dir_all(dir.path().join("keys")).unwrap();
        assert!(matches!(Keys::open(dir.path(), NOW), Err(KeyError::Missing(_))));
    }

    #[test]
    fn a_node_certificate_says_one_thing() {
        use x509_parser::prelude::*;
        let dir = tempfile::tempdir().unwrap();
        let keys = Keys::open(dir.path(), NOW).unwrap();
        let node = NodeId::from_bytes([5; 16]);
        let pair = KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
        let der = keys.issue_certificate(node, &pair.subject_public_key_info(), NOW, NOW + 3_600_000, &[]).unwrap();
        let (_, c) = X509Certificate::from_der(&der).unwrap();
        assert_eq!(c.subject().iter().count(), 0);
        let san = c.subject_alternative_name().unwrap().unwrap();
        assert_eq!(san.value.general_names.len(), 1);
        assert!(matches!(&san.value.general_names[0], GeneralName::URI(u) if enrol::parse_node_uri(keys.hub, u) == Some(node)));
        let eku = c.extended_key_usage().unwrap().unwrap().value;
        assert!(eku.client_auth && !eku.server_auth);
        assert_eq!(c.validity().not_after.timestamp() * 1000, NOW + 3_600_000);
        assert_eq!(sha256(c.public_key().raw), sha256(&pair.subject_public_key_info()));
    }
}

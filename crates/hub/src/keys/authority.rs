//! Who nodes believe: the root with its task key, or two of both while one takes the place of the other.
//!
//! ```text
//!  steady ── begin ──► both ── issue ──► issuing ── retire ──► steady
//!     ▲                 │
//!     └───── abort ─────┘
//! ```
//! Each step is one replaced file, so that there is nothing between two of them.

use super::{KeyError, at, root_params, serial};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use ed25519_dalek::SigningKey;
use hub_engine::rotation::{Phase, Step};
use mesh_core::bundle::{self, Bundle};
use mesh_core::seal::{key_id, payload_type};
use mesh_core::{Digest, HubId, UnixMs, seal, sha256};
use mesh_process::{entropy, files};
use rcgen::{CertificateParams, Issuer, KeyPair, PublicKeyData};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use x509_parser::prelude::{FromDer, X509Certificate};

/// There since the first rotation; before it, [`BORN`] are what it would hold.
pub const FILE: &str = "authority.json";
pub const BORN: [&str; 3] = ["root.key", "root.crt", "task.key"];
const VERSION: u32 = 1;

/// A root and the task key that came with it.
pub struct Pair {
    root_key: String,
    pub root: Vec<u8>,
    pub spki: Digest,
    /// The name in it (DER), which certificates by it give as their issuer.
    subject: Vec<u8>,
    task: SigningKey,
}

impl Pair {
    fn read(path: &Path, root_key: &str, root: Vec<u8>, task: &str) -> Result<Arc<Self>, KeyError> {
        let damaged = |problem: String| KeyError::Damaged { path: path.to_owned(), problem };
        let mut seed = [0; 32];
        hex::decode_to_slice(task.trim(), &mut seed).map_err(|e| damaged(e.to_string()))?;
        let pair = KeyPair::from_pem(root_key).map_err(|e| damaged(e.to_string()))?;
        let (_, parsed) = X509Certificate::from_der(&root).map_err(|e| damaged(format!("no certificate: {e}")))?;
        let subject = parsed.subject().as_raw().to_vec();
        let spki = sha256(&pair.subject_public_key_info());
        if sha256(parsed.public_key().raw) != spki {
            return Err(damaged("the root's certificate is for another key".into()));
        }
        Ok(Arc::new(Self { root_key: root_key.to_owned(), root, spki, subject, task: SigningKey::from_bytes(&seed) }))
    }

    fn make(hub: HubId, seq: u64, now: UnixMs) -> Result<Arc<Self>, KeyError> {
        let pair = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
        let root = params(hub, seq, now).self_signed(&pair)?.der().to_vec();
        Self::read(Path::new(FILE), &pair.serialize_pem(), root, &hex::encode(entropy::bytes::<32>()))
    }

    pub fn issuer(&self) -> Result<Issuer<'static, KeyPair>, rcgen::Error> {
        Issuer::from_ca_cert_der(&self.root.clone().into(), KeyPair::from_pem(&self.root_key)?)
    }
    pub fn pin(&self) -> String {
        format!("sha256:{}", hex::encode(self.spki))
    }
    pub fn public(&self) -> [u8; 32] {
        self.task.verifying_key().to_bytes()
    }
    pub fn sign(&self, kind: &str, body: &[u8]) -> (String, [u8; 64]) {
        (key_id(&self.public()), seal::sign(&self.task, kind, body))
    }
    /// Did this root issue the certificate? Its signature is not looked at.
    pub fn issued(&self, certificate: &[u8]) -> bool {
        X509Certificate::from_der(certificate).is_ok_and(|(_, c)| c.issuer().as_raw() == self.subject)
    }
}

/// Roots after the first are told apart by their names too.
fn params(hub: HubId, seq: u64, now: UnixMs) -> CertificateParams {
    let mut p = root_params(hub, now);
    p.distinguished_name.push(rcgen::DnType::CommonName, format!("Cortex Mesh root of {hub}, {seq}"));
    // Below it stands what the next root is vouched for with.
    p.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Constrained(1));
    p
}

/// What the keys folder says, and the bundle that follows from it.
pub struct Authority {
    hub: HubId,
    pub phase: Phase,
    pub seq: u64,
    made_at: UnixMs,
    /// One, or two in a rotation: the old one first.
    pairs: Vec<Arc<Pair>>,
    /// The new root, vouched for by the old one.
    crossed: Option<Vec<u8>>,
    /// Public keys that signed once; what they signed in the audit log is still theirs.
    retired: Vec<[u8; 32]>,
}

#[derive(Serialize, Deserialize)]
struct Kept {
    version: u32,
    phase: String,
    seq: u64,
    made_at: UnixMs,
    pairs: Vec<KeptPair>,
    crossed: Option<String>,
    retired: Vec<String>,
}

#[derive(Serialize, Deserialize)]
struct KeptPair {
    root_key: String,
    root: String,
    task_key: String,
}

impl Authority {
    pub fn open(dir: &Path, hub: HubId) -> Result<Self, KeyError> {
        let path = dir.join(FILE);
        match std::fs::read(&path) {
            Ok(bytes) => {
                let authority = Self::read(&path, &bytes, hub)?;
                // A crash may have left what the file has taken the place of.
                authority.forget_born(dir)?;
                Ok(authority)
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Self::born(dir, hub),
            Err(source) => Err(KeyError::File { path, source }),
        }
    }

    /// A hub that has never rotated.
    fn born(dir: &Path, hub: HubId) -> Result<Self, KeyError> {
        let read = |name: &str| {
            let path = dir.join(name);
            std::fs::read(&path).map_err(|source| KeyError::File { path, source })
        };
        let text =
            |name: &str| String::from_utf8(read(name)?).map_err(|e| KeyError::Damaged { path: dir.join(name), problem: e.to_string() });
        let pair = Pair::read(&dir.join(BORN[0]), &text(BORN[0])?, read(BORN[1])?, &text(BORN[2])?)?;
        Ok(Self { hub, phase: Phase::Steady, seq: 1, made_at: 0, pairs: vec![pair], crossed: None, retired: vec![] })
    }

    fn read(path: &Path, bytes: &[u8], hub: HubId) -> Result<Self, KeyError> {
        let damaged = |problem: String| KeyError::Damaged { path: path.to_owned(), problem };
        let kept: Kept = serde_json::from_slice(bytes).map_err(|e| damaged(e.to_string()))?;
        if kept.version != VERSION {
            return Err(damaged(format!("version {} is not known to this program; a newer one wrote it", kept.version)));
        }
        let phase = Phase::parse(&kept.phase).ok_or_else(|| damaged(format!("phase {:?}", kept.phase)))?;
        let base64 = |text: &str| STANDARD.decode(text).map_err(|e| damaged(e.to_string()));
        let pairs =
            kept.pairs.iter().map(|p| Pair::read(path, &p.root_key, base64(&p.root)?, &p.task_key)).collect::<Result<Vec<_>, _>>()?;
        let crossed = kept.crossed.as_deref().map(base64).transpose()?;
        let public = |text: &String| {
            let mut key = [0; 32];
            hex::decode_to_slice(text, &mut key).map(|()| key).map_err(|e| damaged(e.to_string()))
        };
        let retired = kept.retired.iter().map(public).collect::<Result<_, _>>()?;
        let two = phase != Phase::Steady;
        if pairs.len() != if two { 2 } else { 1 } || crossed.is_some() != two {
            return Err(damaged(format!("{} roots in the phase {}", pairs.len(), phase.as_str())));
        }
        Ok(Self { hub, phase, seq: kept.seq, made_at: kept.made_at, pairs, crossed, retired })
    }

    /// Replaces the file; only then the files of birth go.
    pub fn write(&self, dir: &Path) -> Result<(), KeyError> {
        let kept = Kept {
            version: VERSION,
            phase: self.phase.as_str().into(),
            seq: self.seq,
            made_at: self.made_at,
            pairs: self.pairs.iter().map(|p| p.kept()).collect(),
            crossed: self.crossed.as_deref().map(|c| STANDARD.encode(c)),
            retired: self.retired.iter().map(hex::encode).collect(),
        };
        let path: PathBuf = dir.join(FILE);
        let bytes = serde_json::to_vec(&kept).map_err(|e| KeyError::Damaged { path: path.clone(), problem: e.to_string() })?;
        files::write_private(&path, &bytes).map_err(|source| KeyError::File { path, source })?;
        self.forget_born(dir)
    }

    fn forget_born(&self, dir: &Path) -> Result<(), KeyError> {
        for name in BORN {
            let path = dir.join(name);
            match std::fs::remove_file(&path) {
                Err(source) if source.kind() != std::io::ErrorKind::NotFound => return Err(KeyError::File { path, source }),
                _ => {}
            }
        }
        Ok(())
    }

    /// What the step makes of it; none when it is not the turn of that step.
    pub fn after(&self, step: Step, now: UnixMs) -> Result<Option<Self>, KeyError> {
        let Some(phase) = self.phase.after(step) else { return Ok(None) };
        // By the clock where it can be, so that a hub that was restored is ahead of what it forgot.
        let seq = if step == Step::Issue { self.seq } else { (self.seq + 1).max((now / 1000).max(0) as u64) };
        let made_at = if step == Step::Issue { self.made_at } else { now };
        let mut next = Self {
            hub: self.hub,
            phase,
            seq,
            made_at,
            pairs: self.pairs.clone(),
            crossed: self.crossed.clone(),
            retired: self.retired.clone(),
        };
        match step {
            Step::Begin => {
                let fresh = Pair::make(self.hub, seq, now)?;
                next.crossed = Some(self.cross(&fresh, seq, now)?);
                next.pairs.push(fresh);
            }
            Step::Issue => {}
            Step::Retire => {
                next.retired.push(next.pairs.remove(0).public());
                next.crossed = None;
            }
            Step::Abort => {
                next.pairs.truncate(1);
                next.crossed = None;
            }
        }
        Ok(Some(next))
    }

    /// A certificate by the old root for the new one's key, for who knows the old one alone.
    fn cross(&self, fresh: &Pair, seq: u64, now: UnixMs) -> Result<Vec<u8>, KeyError> {
        let mut p = params(self.hub, seq, now);
        p.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Constrained(0));
        p.use_authority_key_identifier_extension = true;
        p.serial_number = Some(serial());
        let (_, old) = X509Certificate::from_der(&self.oldest().root)
            .map_err(|e| KeyError::Damaged { path: FILE.into(), problem: format!("no certificate: {e}") })?;
        let end = old.validity().not_after.timestamp() * 1000;
        p.not_after = p.not_after.min(at(end));
        let key = KeyPair::from_pem(&fresh.root_key)?;
        Ok(p.signed_by(&key, &self.oldest().issuer()?)?.der().to_vec())
    }

    /// Whose certificates and signatures are given out.
    pub fn issuing(&self) -> &Pair {
        let last = self.pairs.len() - 1;
        &self.pairs[if self.phase == Phase::Issuing { last } else { 0 }]
    }
    pub fn newest(&self) -> &Pair {
        &self.pairs[self.pairs.len() - 1]
    }
    pub fn oldest(&self) -> &Pair {
        &self.pairs[0]
    }
    /// What may be given out, the newest first.
    fn usable(&self) -> impl Iterator<Item = &Arc<Pair>> {
        let n = if self.phase == Phase::Issuing { self.pairs.len() } else { 1 };
        self.pairs[..n].iter().rev()
    }
    /// The newest that somebody believes; the oldest for who believes none of them, or does not say.
    pub fn for_roots(&self, believed: &[Digest]) -> &Pair {
        self.usable().find(|p| believed.contains(&p.spki)).unwrap_or(&self.pairs[0])
    }
    pub fn for_keys(&self, believed: &[String]) -> &Pair {
        self.usable().find(|p| believed.contains(&key_id(&p.public()))).unwrap_or(&self.pairs[0])
    }
    pub fn issuer_of(&self, certificate: &[u8]) -> Option<&Pair> {
        self.pairs.iter().map(|p| &**p).find(|p| p.issued(certificate))
    }
    pub fn roots(&self) -> impl Iterator<Item = &[u8]> {
        self.pairs.iter().map(|p| p.root.as_slice())
    }
    /// What follows a server's certificate.
    pub fn chain(&self) -> Vec<Vec<u8>> {
        let mut chain = vec![];
        if self.phase == Phase::Issuing {
            // First: who builds a path in order comes to the old root, and who knows the new one stops before.
            chain.extend(self.crossed.clone());
            chain.push(self.oldest().root.clone());
        }
        chain.push(self.issuing().root.clone());
        chain
    }
    /// All keys that ever signed; the one that signs now is the first.
    pub fn signers(&self) -> Vec<[u8; 32]> {
        let first = self.issuing().public();
        let others = self.pairs.iter().map(|p| p.public()).filter(|key| *key != first);
        std::iter::once(first).chain(others).chain(self.retired.iter().copied()).collect()
    }

    pub fn bundle(&self) -> Bundle {
        Bundle {
            hub: self.hub,
            seq: self.seq,
            made_at: self.made_at,
            roots: self.roots().map(<[u8]>::to_vec).collect(),
            task_keys: self.pairs.iter().map(|p| p.public()).collect(),
        }
    }
    /// Signed by each key that is held: whoever believes one of them takes it.
    pub fn signed(&self) -> (Vec<u8>, Vec<bundle::Signature>) {
        let body = self.bundle().encode();
        let signatures = self.pairs.iter().map(|p| p.sign(payload_type::BUNDLE, &body)).map(|(key, s)| (key, s.to_vec())).collect();
        (body, signatures)
    }
}

impl Pair {
    fn kept(&self) -> KeptPair {
        KeptPair { root_key: self.root_key.clone(), root: STANDARD.encode(&self.root), task_key: hex::encode(self.task.to_bytes()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::{self, Keys};
    use hub_engine::ports::Keyring;
    use mesh_core::bundle::{Refused, Verdict, judge};
    use mesh_core::seal::verify;
    use rustls::RootCertStore;
    use rustls::client::WebPkiServerVerifier;
    use rustls::client::danger::ServerCertVerifier;
    use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
    use std::os::unix::fs::PermissionsExt;
    use std::time::Duration;

    const NOW: UnixMs = 1_790_000_000_000;

    /// Does a client that trusts this root alone take what the hub's server shows?
    fn taken(keys: &Keys, root: &[u8]) -> bool {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from(root.to_vec())).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider).build().unwrap();
        let chain: Vec<CertificateDer<'_>> = keys.server_identity(NOW).unwrap().chain.into_iter().map(CertificateDer::from).collect();
        let name = ServerName::try_from(mesh_core::enrol::server_name(keys.hub)).unwrap();
        let now = UnixTime::since_unix_epoch(Duration::from_millis(NOW as u64));
        verifier.verify_server_cert(&chain[0], &chain[1..], &name, &[], now).is_ok()
    }
    /// What a node that believes `trusted` makes of the bundle of now.
    fn told(keys: &Keys, trusted: &[[u8; 32]], stored: Option<&[u8]>) -> Result<Verdict, Refused> {
        let (body, signatures) = keys.authority().signed();
        judge(keys.hub, trusted, stored, &body, &signatures)
    }
    fn node_certificate(keys: &Keys, believed: &[Digest]) -> Vec<u8> {
        let key = KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
        let node = mesh_core::NodeId::from_bytes([5; 16]);
        keys.issue_certificate(node, &key.subject_public_key_info(), NOW, NOW + 3_600_000, believed).unwrap()
    }
    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn nobody_is_shown_what_they_cannot_check_until_the_old_root_is_retired() {
        let dir = tempfile::tempdir().unwrap();
        let keys = Keys::open(dir.path(), NOW).unwrap();
        let sent = |keys: &Keys, believed: &[String]| {
            let (key, signature) = keys.sign_for(believed, payload_type::ORDERS, b"orders");
            move |public: &[u8; 32]| verify(&[*public], &key, payload_type::ORDERS, b"orders", &signature).is_ok()
        };
        let (old, a) = (keys.authority().issuing().root.clone(), keys.task_key());
        let (old_pin, first) = (keys.authority().issuing().spki, keys.authority().signed().0);
        assert!(taken(&keys, &old));
        assert!(keys.step(Step::Issue, NOW).is_err() && keys.step(Step::Retire, NOW).is_err() && keys.step(Step::Abort, NOW).is_err());

        keys.step(Step::Begin, NOW).unwrap();
        let (new, b) = (keys.authority().newest().root.clone(), keys.authority().newest().public());
        let new_pin = keys.authority().newest().spki;
        let ids = [key_id(&a), key_id(&b)];
        assert!(taken(&keys, &old) && !taken(&keys, &new), "the new root is only told of");
        assert!(sent(&keys, &ids)(&a) && keys.task_key() == a);
        assert!(keys.authority().oldest().issued(&node_certificate(&keys, &[old_pin, new_pin])));
        let Ok(Verdict::Newer(both)) = told(&keys, &[a], Some(&first)) else { panic!("it is newer") };
        assert_eq!(both.task_keys, [a, b]);
        let both = both.encode();

        keys.step(Step::Issue, NOW).unwrap();
        assert!(taken(&keys, &old) && taken(&keys, &new), "who knows either root alone");
        assert_eq!(told(&keys, &[a, b], Some(&both)), Ok(Verdict::Same), "the bundle is the same");
        assert!(matches!(told(&keys, &[b], None), Ok(Verdict::Newer(_))), "also for who joins with an invite of now");
        assert!(matches!(told(&keys, &[a], Some(&first)), Ok(Verdict::Newer(_))), "and for who was away");
        for (believed, public, other) in [(&ids[..], b, a), (&ids[..1], a, b), (&ids[..0], a, b)] {
            assert!(sent(&keys, believed)(&public) && !sent(&keys, believed)(&other), "{believed:?}");
        }
        for (believed, root) in [(&[old_pin, new_pin][..], &new), (&[old_pin][..], &old), (&[new_pin][..], &new), (&[][..], &old)] {
            let issued = node_certificate(&keys, believed);
            assert_eq!(&keys.authority().issuer_of(&issued).unwrap().root, root, "{believed:?}");
        }
        assert_eq!(keys.sign(payload_type::AUDIT, b"x").0, ids[1]);
        assert_eq!(keys.signers(), [b, a]);
        let of_old = node_certificate(&keys, &[old_pin]);
        assert!(keys.step(Step::Abort, NOW).is_err(), "what was issued cannot be taken back");

        keys.step(Step::Retire, NOW).unwrap();
        assert!(!taken(&keys, &old) && taken(&keys, &new));
        assert!(!keys.counts(&of_old) && keys.counts(&node_certificate(&keys, &[])));
        assert!(matches!(told(&keys, &[a, b], Some(&both)), Ok(Verdict::Newer(n)) if n.task_keys == [b]));
        assert_eq!(told(&keys, &[a], Some(&first)), Err(Refused::Unsigned), "who was left behind needs a new invite");
        assert_eq!(keys.signers(), [b, a], "what it signed in the audit log stays signed");
        let kept = std::fs::read_to_string(dir.path().join("keys").join(FILE)).unwrap();
        assert!(kept.matches("PRIVATE KEY").count() == 2, "one key, with its first and last line");
    }

    #[test]
    fn each_step_is_one_file_that_is_there_or_not() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("keys");
        let open = || Keys::open(dir.path(), NOW).unwrap().authority();
        let born = {
            let mut all = names(&folder_of(&Keys::open(dir.path(), NOW).unwrap()));
            all.retain(|n| BORN.contains(&n.as_str()));
            all.iter().map(|n| (n.clone(), std::fs::read(folder.join(n)).unwrap())).collect::<Vec<_>>()
        };
        assert_eq!(born.len(), 3);
        let (mut seq, mut before) = (open().seq, None::<Vec<u8>>);
        for step in [Step::Begin, Step::Abort, Step::Begin, Step::Issue, Step::Retire, Step::Begin, Step::Issue, Step::Retire] {
            let was = open();
            Keys::open(dir.path(), NOW).unwrap().step(step, NOW).unwrap();
            let after = std::fs::read(folder.join(FILE)).unwrap();
            assert_eq!(std::fs::metadata(folder.join(FILE)).unwrap().permissions().mode() & 0o777, 0o600);
            assert_eq!(names(&folder), ["authority.json", "hub-id", "intent.key", "jwt.key", "token.key"]);
            // Killed before the file was replaced: its part is hidden, and the step was not taken.
            std::fs::write(folder.join(".authority.json.1.tmp"), &after[..after.len() / 2]).unwrap();
            match &before {
                Some(bytes) => std::fs::write(folder.join(FILE), bytes).unwrap(),
                None => {
                    std::fs::remove_file(folder.join(FILE)).unwrap();
                    born.iter().for_each(|(name, bytes)| std::fs::write(folder.join(name), bytes).unwrap());
                }
            }
            assert_eq!((open().phase, open().seq, open().bundle()), (was.phase, was.seq, was.bundle()), "{step:?}");
            assert!(keys::missing(&keys::files(dir.path()).unwrap()).is_empty());
            // Killed right behind it: it was taken. What it replaced goes with the next start, in any order.
            std::fs::write(folder.join(FILE), &after).unwrap();
            born.iter().skip(1).for_each(|(name, bytes)| std::fs::write(folder.join(name), bytes).unwrap());
            let now = open();
            assert_eq!(Some(now.phase), was.phase.after(step));
            assert!(BORN.iter().all(|name| !folder.join(name).exists()), "{step:?}");
            assert!(keys::missing(&keys::files(dir.path()).unwrap()).is_empty());
            assert_eq!(now.seq > seq, step != Step::Issue, "{step:?}: {} after {seq}", now.seq);
            (seq, before) = (now.seq, Some(after));
            std::fs::remove_file(folder.join(".authority.json.1.tmp")).unwrap();
        }
        assert!(seq > (NOW / 1000) as u64, "ahead of what a restored hub has forgotten");
        for bad in [&b"{}"[..], b"", &before.unwrap()[1..]] {
            std::fs::write(folder.join(FILE), bad).unwrap();
            let Err(e) = Keys::open(dir.path(), NOW) else { panic!("it cannot be read") };
            assert!(e.to_string().contains(FILE), "{e}");
        }
    }

    fn folder_of(keys: &Keys) -> PathBuf {
        keys.dir.clone()
    }
}

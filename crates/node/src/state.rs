//! What a node keeps: its identity key and certificate as private files, the rest in `state.redb`.

use crate::config::Settings;
use crate::trust::Trust;
use mesh_core::SessionId;
use mesh_process::files;
use rcgen::{KeyPair, PKCS_ED25519};
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

const VALUES: TableDefinition<'static, &str, &[u8]> = TableDefinition::new("values");
/// Session → uid that its tasks run as.
const UIDS: TableDefinition<'static, &[u8], u32> = TableDefinition::new("session_uids");

const SETTINGS: &str = "settings";
const HUB_TIME: &str = "hub_time_ms";
/// Of the newest welcome.
const LINK_SESSION: &str = "link_session";
/// The newest trust bundle: the canonical document.
const BUNDLE: &str = "bundle";
const COUNTER: &str = "renewal_counter";
/// The hub's words, once it has said that this node is revoked.
const REVOKED: &str = "revoked";
const NEXT_SESSION_UID: &str = "next_session_uid";
/// Ephemeral uids that one commit reserves.
const EPHEMERAL_BLOCK: u32 = 256;
const NEXT_EPHEMERAL_UID: &str = "next_ephemeral_uid";

/// Uids of sessions, one each, never given twice.
pub const SESSION_UIDS: Range<u32> = 700_000..760_000;
/// Uids of tasks without a session, in rotation.
pub const EPHEMERAL_UIDS: Range<u32> = 760_000..790_000;

#[derive(Debug, thiserror::Error)]
pub enum StateError {
    #[error("{path}: {source}")]
    File {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("the node's state ({path}): {source}")]
    Database {
        path: PathBuf,
        #[source]
        source: Box<redb::Error>,
    },
    #[error("{path}: {problem}")]
    Damaged { path: PathBuf, problem: String },
    #[error("all {0} session uids of this node are given out; leave and join anew")]
    NoUid(usize),
}

/// The folder's files by name.
#[derive(Debug, Clone)]
pub struct DataDir(PathBuf);

impl DataDir {
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }
    /// Makes the folder; only this user may enter it.
    pub fn make(&self) -> Result<(), StateError> {
        files::private_dir(&self.0).map_err(|source| StateError::File { path: self.0.clone(), source })
    }
    pub fn path(&self) -> &Path {
        &self.0
    }
    pub fn key(&self) -> PathBuf {
        self.0.join("identity.key")
    }
    pub fn certificate(&self) -> PathBuf {
        self.0.join("certificate.der")
    }
    pub fn root(&self) -> PathBuf {
        self.0.join("root.der")
    }
    pub fn database(&self) -> PathBuf {
        self.0.join("state.redb")
    }
    pub fn lock(&self) -> PathBuf {
        self.0.join("node.lock")
    }
    pub fn pid(&self) -> PathBuf {
        self.0.join("node.pid")
    }
    /// What the owner allows any hub.
    pub fn ceiling(&self) -> PathBuf {
        self.0.join("ceiling.yaml")
    }
    /// There while the owner wants no work.
    pub fn disabled(&self) -> PathBuf {
        self.0.join("disabled")
    }
    pub fn status(&self) -> PathBuf {
        self.0.join("status.json")
    }
    fn read(&self, path: PathBuf) -> Result<Vec<u8>, StateError> {
        std::fs::read(&path).map_err(|source| StateError::File { path, source })
    }

    /// The identity key, made at the first call and the same ever after.
    pub fn identity(&self) -> Result<Identity, StateError> {
        let path = self.key();
        let damaged = |e: &dyn std::fmt::Display| StateError::Damaged { path: path.clone(), problem: format!("not an Ed25519 key: {e}") };
        match std::fs::read_to_string(&path) {
            Ok(pem) => Ok(Identity { key: KeyPair::from_pkcs8_pem_and_sign_algo(&pem, &PKCS_ED25519).map_err(|e| damaged(&e))? }),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                let key = KeyPair::generate_for(&PKCS_ED25519).map_err(|e| damaged(&e))?;
                // Written whole or not at all: a torn key could never be used, nor be told from a good one.
                files::write_private(&path, key.serialize_pem().as_bytes())
                    .map_err(|source| StateError::File { path: path.clone(), source })?;
                Ok(Identity { key })
            }
            Err(source) => Err(StateError::File { path, source }),
        }
    }

    pub fn store_certificate(&self, certificate: &[u8], root: &[u8]) -> Result<(), StateError> {
        for (path, bytes) in [(self.root(), root), (self.certificate(), certificate)] {
            files::write_private(&path, bytes).map_err(|source| StateError::File { path, source })?;
        }
        Ok(())
    }

    /// The certificate in use and its root.
    pub fn certificates(&self) -> Result<(CertificateDer<'static>, CertificateDer<'static>), StateError> {
        Ok((self.read(self.certificate())?.into(), self.read(self.root())?.into()))
    }
}

/// The key that never leaves this machine.
#[derive(Debug)]
pub struct Identity {
    key: KeyPair,
}

impl Identity {
    pub fn key(&self) -> &KeyPair {
        &self.key
    }
    /// SubjectPublicKeyInfo in DER.
    pub fn spki(&self) -> Vec<u8> {
        use rcgen::PublicKeyData;
        self.key.subject_public_key_info()
    }
    pub fn spki_sha256(&self) -> mesh_core::Digest {
        mesh_core::sha256(&self.spki())
    }
    pub fn private(&self) -> PrivateKeyDer<'static> {
        PrivatePkcs8KeyDer::from(self.key.serialize_der()).into()
    }
    pub fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rcgen::Error> {
        use rcgen::SigningKey;
        self.key.sign(message)
    }
    /// A request of which the hub takes the public key only.
    pub fn csr(&self) -> Result<Vec<u8>, rcgen::Error> {
        Ok(rcgen::CertificateParams::new(Vec::<String>::new())?.serialize_request(&self.key)?.der().to_vec())
    }
}

/// The open database.
pub struct State {
    db: Database,
    path: PathBuf,
    /// Ephemeral uids that are reserved on disk and not given yet.
    ephemeral: Mutex<Range<u32>>,
}

impl State {
    pub fn open(dir: &DataDir) -> Result<Self, StateError> {
        let path = dir.database();
        let db = Database::create(&path).map_err(|e| StateError::Database { path: path.clone(), source: Box::new(e.into()) })?;
        let state = Self { db, path, ephemeral: Mutex::new(0..0) };
        state.write(|tx| {
            tx.open_table(VALUES)?;
            tx.open_table(UIDS)?;
            Ok(())
        })?;
        Ok(state)
    }

    fn wrap(&self, e: redb::Error) -> StateError {
        StateError::Database { path: self.path.clone(), source: Box::new(e) }
    }
    fn write<T>(&self, work: impl FnOnce(&redb::WriteTransaction) -> Result<T, redb::Error>) -> Result<T, StateError> {
        let run = || -> Result<T, redb::Error> {
            let tx = self.db.begin_write()?;
            let out = work(&tx)?;
            tx.commit()?;
            Ok(out)
        };
        run().map_err(|e| self.wrap(e))
    }
    fn read<T>(&self, look: impl FnOnce(&redb::ReadTransaction) -> Result<T, redb::Error>) -> Result<T, StateError> {
        let run = || look(&self.db.begin_read()?);
        run().map_err(|e| self.wrap(e))
    }
    fn value(&self, key: &str) -> Result<Option<Vec<u8>>, StateError> {
        self.read(|tx| Ok(tx.open_table(VALUES)?.get(key)?.map(|v| v.value().to_vec())))
    }
    fn number(&self, key: &str) -> Result<Option<u64>, StateError> {
        Ok(self.value(key)?.and_then(|v| v.try_into().ok()).map(u64::from_be_bytes))
    }

    /// Absent before a join.
    pub fn settings(&self) -> Result<Option<Settings>, StateError> {
        let Some(bytes) = self.value(SETTINGS)? else { return Ok(None) };
        serde_json::from_slice(&bytes).map(Some).map_err(|e| StateError::Damaged { path: self.path.clone(), problem: e.to_string() })
    }
    /// Ends a join: settings, time and counter in one commit.
    pub fn enrolled(&self, settings: &Settings, hub_time_ms: i64, counter: u64) -> Result<(), StateError> {
        let json = serde_json::to_vec(settings).map_err(|e| StateError::Damaged { path: self.path.clone(), problem: e.to_string() })?;
        self.write(|tx| {
            let mut t = tx.open_table(VALUES)?;
            t.insert(SETTINGS, json.as_slice())?;
            t.insert(HUB_TIME, hub_time_ms.to_be_bytes().as_slice())?;
            t.insert(COUNTER, counter.to_be_bytes().as_slice())?;
            Ok(())
        })
    }
    /// The latest hub time that was stored; 0 before the first.
    pub fn hub_time_ms(&self) -> Result<i64, StateError> {
        Ok(self.number(HUB_TIME)?.map_or(0, |v| v as i64))
    }
    pub fn set_hub_time_ms(&self, ms: i64) -> Result<(), StateError> {
        self.write(|tx| {
            tx.open_table(VALUES)?.insert(HUB_TIME, ms.to_be_bytes().as_slice())?;
            Ok(())
        })
    }
    /// The link session of the newest welcome; empty before the first.
    pub fn link_session(&self) -> Result<Vec<u8>, StateError> {
        Ok(self.value(LINK_SESSION)?.unwrap_or_default())
    }
    /// Notes a welcome: its session, and the hub's time.
    pub fn set_linked(&self, session: &[u8], hub_time_ms: i64) -> Result<(), StateError> {
        self.write(|tx| {
            let mut t = tx.open_table(VALUES)?;
            t.insert(LINK_SESSION, session)?;
            t.insert(HUB_TIME, hub_time_ms.to_be_bytes().as_slice())?;
            Ok(())
        })
    }
    /// What the hub said when it revoked this node. It is said for good.
    pub fn revoked(&self) -> Result<Option<String>, StateError> {
        Ok(self.value(REVOKED)?.map(|v| String::from_utf8_lossy(&v).into_owned()))
    }
    pub fn set_revoked(&self, words: &str) -> Result<(), StateError> {
        self.write(|tx| {
            tx.open_table(VALUES)?.insert(REVOKED, words.as_bytes())?;
            Ok(())
        })
    }
    /// Whom this node believes, once a bundle has come. All of it is one value, so one commit.
    pub fn trust(&self) -> Result<Option<Trust>, StateError> {
        let Some(body) = self.value(BUNDLE)? else { return Ok(None) };
        Trust::of_bundle(&body)
            .map(Some)
            .map_err(|e| StateError::Damaged { path: self.path.clone(), problem: format!("the trust bundle: {e}") })
    }
    pub fn set_trust(&self, trust: &Trust) -> Result<(), StateError> {
        self.write(|tx| {
            tx.open_table(VALUES)?.insert(BUNDLE, trust.body())?;
            Ok(())
        })
    }
    /// The renewal that the stored certificate belongs to.
    pub fn counter(&self) -> Result<u64, StateError> {
        Ok(self.number(COUNTER)?.unwrap_or(0))
    }
    pub fn set_counter(&self, counter: u64) -> Result<(), StateError> {
        self.write(|tx| {
            tx.open_table(VALUES)?.insert(COUNTER, counter.to_be_bytes().as_slice())?;
            Ok(())
        })
    }

    /// The uid of a session: the same at every call, of no other session ever.
    pub fn session_uid(&self, session: SessionId) -> Result<u32, StateError> {
        let known = self.read(|tx| Ok(tx.open_table(UIDS)?.get(session.as_bytes().as_slice())?.map(|v| v.value())))?;
        if let Some(uid) = known {
            return Ok(uid);
        }
        let given = self.write(|tx| {
            let mut uids = tx.open_table(UIDS)?;
            if let Some(uid) = uids.get(session.as_bytes().as_slice())?.map(|v| v.value()) {
                return Ok(Some(uid));
            }
            let mut values = tx.open_table(VALUES)?;
            let next = next(&values, NEXT_SESSION_UID, SESSION_UIDS.start)?;
            if !SESSION_UIDS.contains(&next) {
                return Ok(None);
            }
            uids.insert(session.as_bytes().as_slice(), next)?;
            values.insert(NEXT_SESSION_UID, u64::from(next + 1).to_be_bytes().as_slice())?;
            Ok(Some(next))
        })?;
        given.ok_or(StateError::NoUid(SESSION_UIDS.len()))
    }

    /// A uid for one task without a session; it comes again only after all others of its range.
    /// They are reserved by blocks, so that a task costs no sync of its own; a crash skips what is left.
    pub fn ephemeral_uid(&self) -> Result<u32, StateError> {
        let mut block = self.ephemeral.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(uid) = block.next() {
            return Ok(uid);
        }
        *block = self.write(|tx| {
            let mut values = tx.open_table(VALUES)?;
            let first = match next(&values, NEXT_EPHEMERAL_UID, EPHEMERAL_UIDS.start)? {
                n if EPHEMERAL_UIDS.contains(&n) => n,
                _ => EPHEMERAL_UIDS.start,
            };
            let end = (first + EPHEMERAL_BLOCK).min(EPHEMERAL_UIDS.end);
            values.insert(NEXT_EPHEMERAL_UID, u64::from(end).to_be_bytes().as_slice())?;
            Ok(first..end)
        })?;
        Ok(block.next().unwrap_or(EPHEMERAL_UIDS.start))
    }
}

fn next(values: &redb::Table<'_, &'static str, &'static [u8]>, key: &str, first: u32) -> Result<u32, redb::Error> {
    let stored = values.get(key)?.and_then(|v| v.value().try_into().ok()).map(u64::from_be_bytes);
    Ok(stored.and_then(|v| u32::try_from(v).ok()).unwrap_or(first))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn session(n: u8) -> SessionId {
        SessionId::from_bytes([n; 16])
    }

    #[test]
    fn the_identity_is_made_once_and_private() {
        let tmp = tempfile::tempdir().unwrap();
        let dir = DataDir::new(tmp.path().join("d"));
        dir.make().unwrap();
        let a = dir.identity().unwrap();
        let b = dir.identity().unwrap();
        assert_eq!(a.spki(), b.spki());
        assert_eq!(std::fs::metadata(dir.key()).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(std::fs::metadata(dir.path()).unwrap().permissions().mode() & 0o777, 0o700);
        std::fs::write(dir.key(), "rubbish").unwrap();
        assert!(matches!(dir.identity(), Err(StateError::Damaged { .. })));
    }

    #[test]
    fn uids_are_stable_and_never_shared() {
        let tmp = tempfile::tempdir().unwrap();
        let dir = DataDir::new(tmp.path());
        {
            let s = State::open(&dir).unwrap();
            assert_eq!(s.session_uid(session(1)).unwrap(), 700_000);
            assert_eq!(s.session_uid(session(2)).unwrap(), 700_001);
            assert_eq!(s.session_uid(session(1)).unwrap(), 700_000);
            assert_eq!((s.ephemeral_uid().unwrap(), s.ephemeral_uid().unwrap()), (760_000, 760_001));
        }
        let s = State::open(&dir).unwrap();
        assert_eq!(s.session_uid(session(3)).unwrap(), 700_002);
        assert_eq!(s.session_uid(session(2)).unwrap(), 700_001);
        assert_eq!(s.ephemeral_uid().unwrap(), 760_000 + EPHEMERAL_BLOCK, "what a daemon had reserved is skipped after it");
    }

    #[test]
    fn ranges_end() {
        let tmp = tempfile::tempdir().unwrap();
        let s = State::open(&DataDir::new(tmp.path())).unwrap();
        let set = |key: &str, n: u32| {
            s.write(|tx| {
                tx.open_table(VALUES)?.insert(key, u64::from(n).to_be_bytes().as_slice())?;
                Ok(())
            })
            .unwrap();
        };
        set(NEXT_SESSION_UID, SESSION_UIDS.end);
        assert!(matches!(s.session_uid(session(1)), Err(StateError::NoUid(_))));
        set(NEXT_EPHEMERAL_UID, EPHEMERAL_UIDS.end);
        assert_eq!(s.ephemeral_uid().unwrap(), EPHEMERAL_UIDS.start, "the ephemeral range rotates");
    }

    #[test]
    fn values_survive() {
        let tmp = tempfile::tempdir().unwrap();
        let dir = DataDir::new(tmp.path());
        let settings = Settings {
            hub_id: "h".into(),
            grpc: "g:1".into(),
            also: vec!["g:2".into()],
            url: "u".into(),
            server_name: "s".into(),
            ca_pin: "p".into(),
            task_keys: vec![],
            node_id: "n".into(),
            node_name: "x".into(),
            labels: Default::default(),
            workspace_root: "~/c".into(),
            max_tasks: 2,
        };
        {
            let s = State::open(&dir).unwrap();
            assert_eq!(s.settings().unwrap(), None);
            assert_eq!((s.hub_time_ms().unwrap(), s.counter().unwrap()), (0, 0));
            s.enrolled(&settings, 5, 1).unwrap();
        }
        let s = State::open(&dir).unwrap();
        assert_eq!(s.settings().unwrap(), Some(settings));
        s.set_hub_time_ms(9).unwrap();
        s.set_counter(2).unwrap();
        assert_eq!(s.revoked().unwrap(), None);
        s.set_revoked("by its owner").unwrap();
        assert_eq!(s.revoked().unwrap().as_deref(), Some("by its owner"));
        assert_eq!((s.hub_time_ms().unwrap(), s.counter().unwrap()), (9, 2));
    }
}

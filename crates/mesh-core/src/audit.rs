//! The audit log's chain: what a row is, how rows are linked, and how it is found that one was changed.
//!
//! Each row's hash covers all of the row and the hash of the row before it. What a person may ask to have
//! erased lies beside the row, which holds salted digests of it: an erased row still verifies, a changed
//! one does not. A checkpoint is a signature over the newest hash; whoever lacks the key cannot make the
//! hashes anew, and whoever cuts rows off falls behind a checkpoint.

use crate::canon::{Malformed, Reader, Tag, Writer};
use crate::seal::{BadSignature, payload_type, verify_by};
use crate::{ApiKeyId, AuditId, ChainId, Digest, HubId, SessionId, UnixMs, UserId, sha256};
use std::collections::BTreeMap;
use std::fmt;

macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($word:ident = $text:literal),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
        pub enum $name { $($word),* }
        impl $name {
            pub const ALL: &'static [$name] = &[$($name::$word),*];
            pub fn as_str(self) -> &'static str { match self { $(Self::$word => $text),* } }
            pub fn parse(text: &str) -> Option<Self> { match text { $($text => Some(Self::$word),)* _ => None } }
        }
    };
}

words! {
    /// The nine types of entry.
    Kind {
        Authentication = "authentication", AuthorizationDenied = "authorization_denied", UserChanged = "user_changed",
        NodeLifecycle = "node_lifecycle", SessionLifecycle = "session_lifecycle", TaskLifecycle = "task_lifecycle",
        FileChanged = "file_changed", PolicyChanged = "policy_changed", SystemChanged = "system_changed",
    }
}
words! {
    Outcome { Ok = "ok", Denied = "denied", Failed = "failed" }
}

/// Random bytes that keep a digest of few possible values from being guessed after an erasure.
pub type Salt = [u8; 16];

/// Who it was, beyond ids. Erasable.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Person {
    pub username: String,
    pub address: Option<String>,
    pub request_id: Option<String>,
}

impl Person {
    pub fn encode(&self, salt: &Salt) -> Vec<u8> {
        let mut w = Writer::new(Tag::AuditPerson, 1);
        w.raw(salt).str(&self.username);
        for text in [&self.address, &self.request_id] {
            w.option(text.as_deref(), |w, t| {
                w.str(t);
            });
        }
        w.finish()
    }
    pub fn decode(bytes: &[u8]) -> Result<(Self, Salt), Malformed> {
        let mut r = Reader::new(bytes, Tag::AuditPerson, 1)?;
        let salt = r.array()?;
        let username = r.str()?.to_owned();
        let mut text = || r.option(|r| r.str().map(str::to_owned));
        let person = Self { username, address: text()?, request_id: text()? };
        r.end().map(|()| (person, salt))
    }
}

/// What was done, beyond ids. Erasable.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Detail(pub BTreeMap<String, String>);

impl Detail {
    pub fn encode(&self, salt: &Salt) -> Vec<u8> {
        let mut w = Writer::new(Tag::AuditDetail, 1);
        w.raw(salt).u32(self.0.len() as u32);
        for (key, value) in &self.0 {
            w.str(key).str(value);
        }
        w.finish()
    }
    pub fn decode(bytes: &[u8]) -> Result<(Self, Salt), Malformed> {
        let mut r = Reader::new(bytes, Tag::AuditDetail, 1)?;
        let salt = r.array()?;
        let n = r.count()?;
        let pairs = (0..n).map(|_| Ok((r.str()?.to_owned(), r.str()?.to_owned()))).collect::<Result<_, Malformed>>()?;
        r.end().map(|()| (Self(pairs), salt))
    }
}

/// A row as it is kept. Words are text, so that a row with a word that nobody wrote is still a row, which
/// does not verify.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    pub chain: ChainId,
    /// From 1 in each chain, without holes.
    pub seq: u64,
    pub id: AuditId,
    pub at: UnixMs,
    pub kind: String,
    pub action: String,
    pub user: Option<UserId>,
    pub key: Option<ApiKeyId>,
    pub agent: Option<String>,
    pub door: String,
    pub resource_kind: String,
    pub resource_id: String,
    pub outcome: String,
    pub session: Option<SessionId>,
    pub person_digest: Digest,
    pub detail_digest: Digest,
    pub prev: Digest,
    pub hash: Digest,
    /// [`Person::encode`]; none once it is erased.
    pub person: Option<Vec<u8>>,
    /// [`Detail::encode`]; none once it is erased.
    pub detail: Option<Vec<u8>>,
}

impl Row {
    /// What `hash` has to be.
    pub fn digest(&self) -> Digest {
        let mut w = Writer::new(Tag::AuditRow, 1);
        w.raw(self.chain.as_bytes()).u64(self.seq).raw(self.id.as_bytes()).i64(self.at).str(&self.kind).str(&self.action);
        let ids = [
            self.user.as_ref().map(UserId::as_bytes),
            self.key.as_ref().map(ApiKeyId::as_bytes),
            self.session.as_ref().map(SessionId::as_bytes),
        ];
        for id in ids {
            w.option(id, |w, id| {
                w.raw(id);
            });
        }
        w.option(self.agent.as_deref(), |w, agent| {
            w.str(agent);
        });
        w.str(&self.door).str(&self.resource_kind).str(&self.resource_id).str(&self.outcome);
        w.raw(&self.person_digest).raw(&self.detail_digest).raw(&self.prev);
        sha256(&w.finish())
    }
    pub fn head(&self) -> Head {
        Head { chain: self.chain, seq: self.seq, hash: self.hash }
    }
}

/// Where a chain stands. `seq` 0 is one without rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    pub chain: ChainId,
    pub seq: u64,
    pub hash: Digest,
}

impl Head {
    pub fn none(chain: ChainId) -> Self {
        Self { chain, seq: 0, hash: [0; 32] }
    }
}

/// What is wrong with a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flaw {
    /// A row is missing, doubled or out of its place.
    Order,
    /// The row does not follow from the one before it.
    Link,
    /// The row is not what it was.
    Changed,
    /// Its erasable part is not what it was.
    Detail,
    /// The chain is not the one that was signed here.
    Checkpoint,
    /// A signature that does not count stands here.
    Forged,
    /// Rows up to here were signed and are gone.
    Cut,
}

impl fmt::Display for Flaw {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Order => "a row is missing, doubled or out of its place",
            Self::Link => "the row does not follow from the one before it",
            Self::Changed => "the row was changed",
            Self::Detail => "the detail of the row was changed",
            Self::Checkpoint => "the rows up to here are not those that were signed",
            Self::Forged => "a checkpoint here is not signed by the hub",
            Self::Cut => "rows up to here were signed and are gone",
        })
    }
}

/// Adds the next row of a chain, or says why it cannot be that.
pub fn follow(head: &Head, row: &Row) -> Result<Head, Flaw> {
    if row.chain != head.chain || row.seq != head.seq + 1 {
        return Err(Flaw::Order);
    }
    if row.prev != head.hash {
        return Err(Flaw::Link);
    }
    if row.digest() != row.hash {
        return Err(Flaw::Changed);
    }
    let matches = |bytes: &Option<Vec<u8>>, digest: &Digest| bytes.as_ref().is_none_or(|b| sha256(b) == *digest);
    if !matches(&row.person, &row.person_digest) || !matches(&row.detail, &row.detail_digest) {
        return Err(Flaw::Detail);
    }
    Ok(row.head())
}

/// Where chains stood at a time, to be signed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checkpoint {
    pub hub: HubId,
    pub at: UnixMs,
    pub heads: Vec<Head>,
}

impl Checkpoint {
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::new(Tag::AuditCheckpoint, 1);
        w.raw(self.hub.as_bytes()).i64(self.at).u32(self.heads.len() as u32);
        for head in &self.heads {
            w.raw(head.chain.as_bytes()).u64(head.seq).raw(&head.hash);
        }
        w.finish()
    }
    /// Checks a signature by `public`.
    pub fn verify(&self, public: &[u8; 32], signature: &[u8]) -> Result<(), BadSignature> {
        verify_by(public, &crate::seal::pae(payload_type::AUDIT, &self.encode()), signature)
    }
}

/// A checkpoint with its signature.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Signed {
    pub checkpoint: Checkpoint,
    /// The public key.
    pub key: [u8; 32],
    pub signature: Vec<u8>,
}

impl Signed {
    pub fn is_by(&self, keys: &[[u8; 32]]) -> bool {
        keys.contains(&self.key) && self.checkpoint.verify(&self.key, &self.signature).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ed25519_dalek::SigningKey;

    fn row(head: &Head) -> Row {
        let (person, detail) =
            (Person { username: "ada".into(), address: None, request_id: Some("r".into()) }, Detail([("a".into(), "b".into())].into()));
        let (person, detail) = (person.encode(&[1; 16]), detail.encode(&[2; 16]));
        let mut row = Row {
            chain: head.chain,
            seq: head.seq + 1,
            id: AuditId::from_bytes([3; 16]),
            at: 5,
            kind: "authentication".into(),
            action: "auth.login".into(),
            user: Some(UserId::from_bytes([4; 16])),
            key: None,
            agent: None,
            door: "rest".into(),
            resource_kind: "user".into(),
            resource_id: "user_x".into(),
            outcome: "ok".into(),
            session: None,
            person_digest: sha256(&person),
            detail_digest: sha256(&detail),
            prev: head.hash,
            hash: [0; 32],
            person: Some(person),
            detail: Some(detail),
        };
        row.hash = row.digest();
        row
    }

    #[test]
    fn every_field_is_covered_and_what_is_erased_is_not_missed() {
        let head = Head::none(ChainId::from_bytes([9; 16]));
        let good = row(&head);
        let next = follow(&head, &good).unwrap();
        assert_eq!(follow(&next, &row(&next)).unwrap().seq, 2);
        assert_eq!(follow(&head, &Row { person: None, detail: None, ..good.clone() }), Ok(next));
        type Change = fn(&mut Row);
        let changes: [(Flaw, Change); 20] = [
            (Flaw::Order, |r| r.seq = 2),
            (Flaw::Order, |r| r.chain = ChainId::from_bytes([8; 16])),
            (Flaw::Link, |r| r.prev = [1; 32]),
            (Flaw::Changed, |r| r.id = AuditId::from_bytes([0; 16])),
            (Flaw::Changed, |r| r.at += 1),
            (Flaw::Changed, |r| r.kind.push('x')),
            (Flaw::Changed, |r| r.action.push('x')),
            (Flaw::Changed, |r| r.user = None),
            (Flaw::Changed, |r| r.key = Some(ApiKeyId::from_bytes([4; 16]))),
            (Flaw::Changed, |r| r.session = Some(SessionId::from_bytes([4; 16]))),
            (Flaw::Changed, |r| r.agent = Some(String::new())),
            (Flaw::Changed, |r| r.door.push('x')),
            (Flaw::Changed, |r| r.resource_kind.push('x')),
            (Flaw::Changed, |r| r.resource_id.push('x')),
            (Flaw::Changed, |r| r.outcome = "denied".into()),
            (Flaw::Changed, |r| r.person_digest[0] ^= 1),
            (Flaw::Changed, |r| r.detail_digest[0] ^= 1),
            (Flaw::Changed, |r| r.hash[0] ^= 1),
            (Flaw::Detail, |r| r.person = Some(vec![])),
            (Flaw::Detail, |r| r.detail.as_mut().unwrap()[30] ^= 1),
        ];
        for (n, (flaw, change)) in changes.into_iter().enumerate() {
            let mut bad = good.clone();
            change(&mut bad);
            assert_eq!(follow(&head, &bad), Err(flaw), "{n}");
        }
        // Moving a letter from one field to the next is another row.
        let (mut a, mut b) = (good.clone(), good);
        (a.action, a.door) = ("xy".into(), "z".into());
        (b.action, b.door) = ("x".into(), "yz".into());
        assert_ne!(a.digest(), b.digest());
    }

    /// A change of layout would make every log that was written before unreadable.
    #[test]
    fn the_layout_stays() {
        let good = row(&Head::none(ChainId::from_bytes([9; 16])));
        assert_eq!(hex::encode(good.hash), "470d30a566fe32e3328bad7d4c0da7f9a6a52e0adffe09a06922882b7a9ed09c");
        let c = Checkpoint { hub: HubId::from_bytes([1; 16]), at: 2, heads: vec![good.head()] };
        assert_eq!(hex::encode(sha256(&c.encode())), "d9f0708744888cc28e5da4922a4d87270a2f37a7a032b4ccdb1792b300c20a81");
    }

    #[test]
    fn erasable_parts_round_trip() {
        let person = Person { username: "ada".into(), address: Some("::1".into()), request_id: None };
        assert_eq!(Person::decode(&person.encode(&[7; 16])), Ok((person.clone(), [7; 16])));
        assert_ne!(person.encode(&[7; 16]), person.encode(&[8; 16]));
        let detail = Detail([("k".into(), "v".into()), ("l".into(), String::new())].into());
        assert_eq!(Detail::decode(&detail.encode(&[7; 16])), Ok((detail, [7; 16])));
        for bad in [&[][..], &[9, 1], &[10, 1, 0], &[9, 2, 0]] {
            assert!(Person::decode(bad).is_err() && Detail::decode(bad).is_err());
        }
    }

    #[test]
    fn a_checkpoint_counts_by_its_key_alone() {
        let (key, other) = (SigningKey::from_bytes(&[5; 32]), SigningKey::from_bytes(&[6; 32]));
        let checkpoint = Checkpoint { hub: HubId::from_bytes([1; 16]), at: 2, heads: vec![Head::none(ChainId::from_bytes([9; 16]))] };
        let public = key.verifying_key().to_bytes();
        let signature = crate::seal::sign(&key, payload_type::AUDIT, &checkpoint.encode()).to_vec();
        let signed = Signed { checkpoint, key: public, signature };
        assert!(signed.is_by(&[public]) && !signed.is_by(&[other.verifying_key().to_bytes()]) && !signed.is_by(&[]));
        let changes: [fn(&mut Checkpoint); 4] =
            [|c| c.at += 1, |c| c.heads[0].seq = 1, |c| c.heads.clear(), |c| c.hub = HubId::from_bytes([2; 16])];
        for change in changes {
            let mut forged = signed.clone();
            change(&mut forged.checkpoint);
            assert!(!forged.is_by(&[public]));
        }
        assert!(!Signed { signature: vec![0; 64], ..signed.clone() }.is_by(&[public]));
        let orders = crate::seal::sign(&key, payload_type::ORDERS, &signed.checkpoint.encode()).to_vec();
        assert!(!Signed { signature: orders, ..signed }.is_by(&[public]), "what was signed as something else is no checkpoint");
    }
}

//! Signatures and seals. Keys are arguments; where they live is somebody else's business.
//!
//! Orders are signed as exact bytes under DSSE's pre-authentication encoding (PAE) with Ed25519
//! (RFC 8032), checked with the strict rules that refuse small-order keys. Intents carry an
//! HMAC-SHA256 (RFC 2104) under a key that only hubs hold.

use crate::canon::{Tag, Writer};
use crate::task::{OnLost, Terms};
use crate::{Digest, NodeId, TaskId, UnixMs, UserId, sha256};
use ed25519_dalek::{Signature, Signer, SigningKey, VerifyingKey};
use hmac::{Hmac, KeyInit, Mac};

/// Kinds of signed document; one can never be replayed as another.
pub mod payload_type {
    pub const ORDERS: &str = "application/vnd.cortexmesh.orders.v1+proto";
    pub const CANCEL: &str = "application/vnd.cortexmesh.cancel.v1+proto";
    pub const INPUT: &str = "application/vnd.cortexmesh.input.v1+proto";
    pub const AUDIT: &str = "application/vnd.cortexmesh.audit-checkpoint.v1";
    pub const BUNDLE: &str = "application/vnd.cortexmesh.bundle.v1";
}

/// DSSE v1 PAE: `"DSSEv1" SP LEN(type) SP type SP LEN(body) SP body`.
pub fn pae(kind: &str, body: &[u8]) -> Vec<u8> {
    let mut v = Vec::with_capacity(kind.len() + body.len() + 40);
    v.extend_from_slice(format!("DSSEv1 {} {} {} ", kind.len(), kind, body.len()).as_bytes());
    v.extend_from_slice(body);
    v
}

/// The key in a SubjectPublicKeyInfo (DER), if it is an Ed25519 one (RFC 8410).
pub fn ed25519_of(spki_der: &[u8]) -> Option<[u8; 32]> {
    const HEAD: [u8; 12] = [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];
    spki_der.strip_prefix(&HEAD)?.try_into().ok()
}

/// Names a public key: the first eight bytes of its SHA-256, as hex. A hint, never proof.
pub fn key_id(public: &[u8; 32]) -> String {
    hex::encode(&sha256(public)[..8])
}

/// The public key of an Ed25519 seed.
pub fn public_of(seed: &[u8; 32]) -> [u8; 32] {
    SigningKey::from_bytes(seed).verifying_key().to_bytes()
}

pub fn sign(key: &SigningKey, kind: &str, body: &[u8]) -> [u8; 64] {
    key.sign(&pae(kind, body)).to_bytes()
}

/// Why a signature does not count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadSignature {
    #[error("it is signed by a key that is not pinned")]
    UnknownKey,
    #[error("the signature does not match")]
    Mismatch,
}

/// Checks `signature` over `(kind, body)` by the pinned key that `key` names.
pub fn verify(pinned: &[[u8; 32]], key: &str, kind: &str, body: &[u8], signature: &[u8]) -> Result<(), BadSignature> {
    let public = pinned.iter().find(|p| key_id(p) == key).ok_or(BadSignature::UnknownKey)?;
    verify_by(public, &pae(kind, body), signature)
}

/// Checks a plain Ed25519 signature with the strict rules; weak keys are refused.
pub fn verify_by(public: &[u8; 32], message: &[u8], signature: &[u8]) -> Result<(), BadSignature> {
    let key = VerifyingKey::from_bytes(public).map_err(|_| BadSignature::UnknownKey)?;
    if key.is_weak() {
        return Err(BadSignature::UnknownKey);
    }
    let signature = Signature::from_slice(signature).map_err(|_| BadSignature::Mismatch)?;
    key.verify_strict(message, &signature).map_err(|_| BadSignature::Mismatch)
}

/// What was permitted when a task was accepted. A hub checks its seal before it signs an order, so
/// that whoever can write only task rows can delay work but not make or alter it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Intent {
    pub task: TaskId,
    pub spec: Digest,
    pub actor: UserId,
    /// The node that was named; none means any that the actor may use.
    pub node: Option<NodeId>,
    pub timeout_secs: u64,
    pub accepted_at: UnixMs,
    pub max_attempts: u32,
    pub terms: Terms,
}

impl Intent {
    /// Version 1 knows no terms, version 2 nothing of lost work; what asks for neither is still written
    /// so, and older seals hold.
    pub fn encode(&self) -> Vec<u8> {
        let plain = self.terms == Terms::default();
        let losing = self.terms.on_lost != OnLost::Wait || self.terms.lost_after.is_some();
        let mut w = Writer::new(
            Tag::Intent,
            if plain {
                1
            } else if losing {
                3
            } else {
                2
            },
        );
        w.raw(self.task.as_bytes()).raw(&self.spec).raw(self.actor.as_bytes());
        w.option(self.node, |w, n| {
            w.raw(n.as_bytes());
        });
        w.u64(self.timeout_secs).i64(self.accepted_at).u32(self.max_attempts);
        if !plain {
            let t = &self.terms;
            w.option(t.select.as_ref(), |w, s| {
                w.bytes(&s.encode());
            });
            w.u32(t.priority as u32);
            for at in [t.not_before, t.deadline] {
                w.option(at, |w, at| {
                    w.i64(at);
                });
            }
            w.u32(t.retries).u64(t.backoff_ms);
            if losing {
                w.bytes(t.on_lost.as_str().as_bytes());
                w.option(t.lost_after, |w, secs| {
                    w.u64(secs);
                });
            }
        }
        w.finish()
    }
    pub fn seal(&self, key: &[u8; 32]) -> Digest {
        self.mac(key).finalize().into_bytes().into()
    }
    /// Constant-time comparison.
    pub fn is_sealed_by(&self, key: &[u8; 32], seal: &[u8]) -> bool {
        self.mac(key).verify_slice(seal).is_ok()
    }
    fn mac(&self, key: &[u8; 32]) -> Hmac<sha2::Sha256> {
        let mut mac = Hmac::<sha2::Sha256>::new_from_slice(key).expect("HMAC takes a key of any length");
        mac.update(&self.encode());
        mac
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::select::Selector;

    fn key() -> SigningKey {
        SigningKey::from_bytes(&[9; 32])
    }

    #[test]
    fn pae_is_the_published_one() {
        assert_eq!(pae("http://example.com/HelloWorld", b"hello world"), b"DSSEv1 29 http://example.com/HelloWorld 11 hello world");
    }

    #[test]
    fn any_changed_byte_is_found() {
        let (k, body) = (key(), b"orders".to_vec());
        let public = k.verifying_key().to_bytes();
        let id = key_id(&public);
        let sig = sign(&k, payload_type::ORDERS, &body);
        assert_eq!(verify(&[public], &id, payload_type::ORDERS, &body, &sig), Ok(()));
        for i in 0..body.len() {
            let mut b = body.clone();
            b[i] ^= 1;
            assert_eq!(verify(&[public], &id, payload_type::ORDERS, &b, &sig), Err(BadSignature::Mismatch));
        }
        for i in 0..64 {
            let mut s = sig;
            s[i] ^= 1;
            assert_eq!(verify(&[public], &id, payload_type::ORDERS, &body, &s), Err(BadSignature::Mismatch));
        }
        for other in [payload_type::CANCEL, payload_type::INPUT] {
            assert_eq!(verify(&[public], &id, other, &body, &sig), Err(BadSignature::Mismatch));
        }
        assert_eq!(verify(&[[3; 32]], &id, payload_type::ORDERS, &body, &sig), Err(BadSignature::UnknownKey));
    }

    #[test]
    fn a_small_order_key_is_refused() {
        let mut identity = [0u8; 32];
        identity[0] = 1;
        let mut forged = [0u8; 64];
        forged[0] = 1;
        assert_eq!(verify_by(&identity, b"anything", &forged), Err(BadSignature::UnknownKey));
    }

    #[test]
    fn an_intent_binds_every_field() {
        let intent = Intent {
            task: TaskId::from_bytes([1; 16]),
            spec: [2; 32],
            actor: UserId::from_bytes([3; 16]),
            node: Some(NodeId::from_bytes([4; 16])),
            timeout_secs: 5,
            accepted_at: 6,
            max_attempts: 1,
            terms: Terms::default(),
        };
        let with = |change: fn(&mut Terms)| {
            let mut other = intent.clone();
            change(&mut other.terms);
            other
        };
        let (k, seal) = ([7; 32], intent.seal(&[7; 32]));
        assert!(intent.is_sealed_by(&k, &seal));
        assert!(!intent.is_sealed_by(&[8; 32], &seal));
        let changed = [
            Intent { task: TaskId::from_bytes([9; 16]), ..intent.clone() },
            Intent { spec: [9; 32], ..intent.clone() },
            Intent { actor: UserId::from_bytes([9; 16]), ..intent.clone() },
            Intent { node: None, ..intent.clone() },
            Intent { timeout_secs: 9, ..intent.clone() },
            Intent { accepted_at: 9, ..intent.clone() },
            Intent { max_attempts: 9, ..intent.clone() },
            with(|t| t.select = Some(Selector::default())),
            with(|t| t.priority = -1),
            with(|t| t.not_before = Some(9)),
            with(|t| t.deadline = Some(9)),
            with(|t| t.retries = 9),
            with(|t| t.backoff_ms = 9),
            with(|t| t.on_lost = OnLost::Requeue),
            with(|t| t.lost_after = Some(0)),
        ];
        for c in changed {
            assert!(!c.is_sealed_by(&k, &seal), "{c:?}");
        }
        assert_eq!(hex::encode(sha256(&intent.encode())), "86c5ad4b14f36d065cd968dfe28aa40f826267774a42f505b43ff2fd0355b6c2");
        let every = with(|t| {
            *t = Terms {
                select: Selector::parse("os=linux").ok(),
                priority: -1,
                not_before: Some(2),
                deadline: Some(3),
                retries: 4,
                backoff_ms: 5,
                ..Terms::default()
            }
        });
        assert_eq!(hex::encode(sha256(&every.encode())), "3c4cf9ac8862743f5cdd606b9e0c144984b2c289702900db8628ae5e3b1706f4");
        let losing = Intent { terms: Terms { on_lost: OnLost::Fail, lost_after: Some(6), ..every.terms }, ..every };
        assert_eq!(hex::encode(sha256(&losing.encode())), "2b1fe3bdd173d4936c92e7b69728d046fde16921f0288ee2e668c57e81290313");
    }
}

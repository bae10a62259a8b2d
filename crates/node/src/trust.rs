//! Whom this node believes: the roots and task keys of its newest bundle, or those of its invite before
//! the first one came.

use mesh_core::bundle::{self, Bundle, Refused, Verdict};
use mesh_core::seal::key_id;
use mesh_core::{Digest, HubId};
use mesh_wire::node::SignedBundle;
use rustls::pki_types::CertificateDer;

use crate::tls::spki_sha256;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trust {
    /// 0 before the first bundle.
    pub seq: u64,
    /// SHA-256 of the roots' SubjectPublicKeyInfo.
    pub pins: Vec<Digest>,
    /// The roots themselves, as far as they are known.
    pub roots: Vec<CertificateDer<'static>>,
    pub task_keys: Vec<[u8; 32]>,
    /// The bundle that says so.
    body: Option<Vec<u8>>,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadBundle {
    #[error(transparent)]
    Refused(#[from] Refused),
    #[error("a root in it is no certificate")]
    Root,
}

/// What to do about a bundle that was told.
#[derive(Debug, PartialEq, Eq)]
pub enum Told {
    /// Store its body, and then believe this.
    Newer(Trust),
    Known,
}

impl Trust {
    pub fn of_invite(pin: Digest, task_keys: Vec<[u8; 32]>) -> Self {
        Self { seq: 0, pins: vec![pin], roots: vec![], task_keys, body: None }
    }

    /// By a bundle that was judged when it came.
    pub fn of_bundle(body: &[u8]) -> Result<Self, BadBundle> {
        Self::from_parts(Bundle::decode(body).map_err(Refused::from)?, body)
    }

    fn from_parts(b: Bundle, body: &[u8]) -> Result<Self, BadBundle> {
        let pins = b.roots.iter().map(|root| spki_sha256(root).ok_or(BadBundle::Root)).collect::<Result<_, _>>()?;
        let roots = b.roots.into_iter().map(CertificateDer::from).collect();
        Ok(Self { seq: b.seq, pins, roots, task_keys: b.task_keys, body: Some(body.to_vec()) })
    }

    pub fn judge(&self, hub: HubId, told: &SignedBundle) -> Result<Told, BadBundle> {
        let signatures: Vec<bundle::Signature> = told.signatures.iter().map(|s| (s.key_id.clone(), s.signature.clone())).collect();
        match bundle::judge(hub, &self.task_keys, self.body.as_deref(), &told.body, &signatures)? {
            Verdict::Newer(b) => Ok(Told::Newer(Self::from_parts(b, &told.body)?)),
            Verdict::Same => Ok(Told::Known),
        }
    }

    /// The bundle, to be stored.
    pub fn body(&self) -> &[u8] {
        self.body.as_deref().unwrap_or_default()
    }
    pub fn believes(&self, root: &[u8]) -> bool {
        spki_sha256(root).is_some_and(|pin| self.pins.contains(&pin))
    }
    /// As a request for a certificate says it.
    pub fn said_roots(&self) -> Vec<Vec<u8>> {
        self.pins.iter().map(|p| p.to_vec()).collect()
    }
    /// As a hello says it.
    pub fn said_keys(&self) -> Vec<String> {
        self.task_keys.iter().map(key_id).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ed25519_dalek::SigningKey;
    use mesh_core::seal::{self, payload_type, public_of};
    use mesh_wire::node::KeySignature;

    fn signed(seq: u64, roots: Vec<Vec<u8>>, seed: [u8; 32]) -> SignedBundle {
        let body = Bundle { hub: HubId::from_bytes([1; 16]), seq, made_at: 1, roots, task_keys: vec![public_of(&seed)] }.encode();
        let signature = seal::sign(&SigningKey::from_bytes(&seed), payload_type::BUNDLE, &body).to_vec();
        SignedBundle { body, signatures: vec![KeySignature { key_id: key_id(&public_of(&seed)), signature }] }
    }

    #[test]
    fn a_bundle_takes_the_place_of_the_invite() {
        let hub = HubId::from_bytes([1; 16]);
        let key = rcgen::KeyPair::generate().unwrap();
        let root = rcgen::CertificateParams::default().self_signed(&key).unwrap().der().to_vec();
        let before = Trust::of_invite([9; 32], vec![public_of(&[2; 32])]);
        assert!(!before.believes(&root));
        let told = signed(3, vec![root.clone()], [2; 32]);
        let Ok(Told::Newer(now)) = before.judge(hub, &told) else { panic!("it is newer") };
        assert!(now.believes(&root) && now.seq == 3 && !now.pins.contains(&[9; 32]), "{now:?}");
        assert_eq!(Trust::of_bundle(now.body()).unwrap(), now, "and so it is read again");
        assert_eq!(now.judge(hub, &told), Ok(Told::Known));
        assert_eq!(now.judge(hub, &signed(2, vec![root], [2; 32])), Err(Refused::Older { said: 2, known: 3 }.into()));
        assert_eq!(before.judge(hub, &signed(4, vec![vec![1, 2, 3]], [2; 32])), Err(BadBundle::Root));
        assert_eq!(before.judge(HubId::from_bytes([2; 16]), &told), Err(Refused::OtherHub(hub).into()));
    }
}

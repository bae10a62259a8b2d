//! The trust bundle: which roots and task keys a node believes, said by the hub and signed by a key that
//! the node believes already. Its sequence only rises, so that an older bundle never comes back.
//!
//! A bundle carries a signature by each key that the hub holds: whoever believes one of them can check it.

use crate::canon::{Malformed, Reader, Tag, Writer};
use crate::seal::{key_id, payload_type, verify};
use crate::{HubId, UnixMs};

/// Of the whole document: it has to fit into one frame beside others.
pub const MAX_BYTES: usize = 16 << 10;
/// Roots, and task keys. An overlap has two of each.
pub const MOST: usize = 8;
pub const MAX_ROOT_BYTES: usize = 4 << 10;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bundle {
    pub hub: HubId,
    pub seq: u64,
    pub made_at: UnixMs,
    /// Certificates in DER, the oldest first.
    pub roots: Vec<Vec<u8>>,
    /// Ed25519 public keys that sign orders, the oldest first.
    pub task_keys: Vec<[u8; 32]>,
}

impl Bundle {
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::new(Tag::Bundle, 1);
        w.raw(self.hub.as_bytes()).u64(self.seq).i64(self.made_at).u32(self.roots.len() as u32);
        for root in &self.roots {
            w.bytes(root);
        }
        w.u32(self.task_keys.len() as u32);
        for key in &self.task_keys {
            w.raw(key);
        }
        w.finish()
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        if bytes.len() > MAX_BYTES {
            return Err(Malformed::Bounds("the bundle's size"));
        }
        let mut r = Reader::new(bytes, Tag::Bundle, 1)?;
        let (hub, seq, made_at) = (HubId::from_bytes(r.array()?), r.u64()?, r.i64()?);
        let count = |r: &mut Reader<'_>, what| match r.count()? {
            n if (1..=MOST).contains(&n) => Ok(n),
            _ => Err(Malformed::Bounds(what)),
        };
        let n = count(&mut r, "the number of roots")?;
        let roots: Vec<Vec<u8>> = (0..n).map(|_| r.bytes().map(<[u8]>::to_vec)).collect::<Result<_, _>>()?;
        if roots.iter().any(|root| root.is_empty() || root.len() > MAX_ROOT_BYTES) {
            return Err(Malformed::Bounds("the size of a root"));
        }
        let n = count(&mut r, "the number of task keys")?;
        let task_keys = (0..n).map(|_| r.array()).collect::<Result<_, _>>()?;
        r.end()?;
        Ok(Self { hub, seq, made_at, roots, task_keys })
    }

    /// How envelopes name the keys that it holds.
    pub fn key_ids(&self) -> Vec<String> {
        self.task_keys.iter().map(key_id).collect()
    }
}

/// A signature and the id of its key.
pub type Signature = (String, Vec<u8>);

/// What a node makes of a bundle that was told to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// To be stored, and then believed.
    Newer(Bundle),
    /// The one that it has.
    Same,
}

/// Why a bundle is not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    #[error("no key that this node believes has signed it")]
    Unsigned,
    #[error("it cannot be read: {0}")]
    Malformed(#[from] Malformed),
    #[error("it is of {0}, another hub")]
    OtherHub(HubId),
    #[error("its sequence {said} is below {known}: it is an old one")]
    Older { said: u64, known: u64 },
    #[error("it is another one than that which has the sequence {0}")]
    Forked(u64),
}

/// Judges `body` for a node of `hub` that believes `trusted`, and has taken `stored` before.
pub fn judge(hub: HubId, trusted: &[[u8; 32]], stored: Option<&[u8]>, body: &[u8], signatures: &[Signature]) -> Result<Verdict, Refused> {
    if body.len() > MAX_BYTES {
        return Err(Malformed::Bounds("the bundle's size").into());
    }
    let by_one = |(key, signature): &Signature| verify(trusted, key, payload_type::BUNDLE, body, signature).is_ok();
    if !signatures.iter().take(MOST).any(by_one) {
        return Err(Refused::Unsigned);
    }
    let bundle = Bundle::decode(body)?;
    if bundle.hub != hub {
        return Err(Refused::OtherHub(bundle.hub));
    }
    let known = stored.map(Bundle::decode).transpose()?.map_or(0, |b| b.seq);
    match bundle.seq.cmp(&known) {
        std::cmp::Ordering::Greater => Ok(Verdict::Newer(bundle)),
        std::cmp::Ordering::Equal if stored == Some(body) => Ok(Verdict::Same),
        std::cmp::Ordering::Equal => Err(Refused::Forked(known)),
        std::cmp::Ordering::Less => Err(Refused::Older { said: bundle.seq, known }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seal::{self, public_of};
    use crate::sha256;
    use ed25519_dalek::SigningKey;

    const OLD: [u8; 32] = [1; 32];
    const NEW: [u8; 32] = [2; 32];

    fn hub() -> HubId {
        HubId::from_bytes([9; 16])
    }
    fn bundle(seq: u64, seeds: &[[u8; 32]]) -> Bundle {
        let roots = seeds.iter().map(|s| vec![s[0]; 300]).collect();
        Bundle { hub: hub(), seq, made_at: 5, roots, task_keys: seeds.iter().map(public_of).collect() }
    }
    fn signed(kind: &str, body: &[u8], seeds: &[[u8; 32]]) -> Vec<Signature> {
        let by = |seed: &[u8; 32]| (key_id(&public_of(seed)), seal::sign(&SigningKey::from_bytes(seed), kind, body).to_vec());
        seeds.iter().map(by).collect()
    }
    /// Told to a node that believes `trusts`.
    fn told(trusts: &[[u8; 32]], stored: Option<&Bundle>, b: &Bundle, by: &[[u8; 32]]) -> Result<Verdict, Refused> {
        let (body, trusted) = (b.encode(), trusts.iter().map(public_of).collect::<Vec<_>>());
        judge(hub(), &trusted, stored.map(Bundle::encode).as_deref(), &body, &signed(payload_type::BUNDLE, &body, by))
    }

    #[test]
    fn the_encoding_is_a_contract() {
        let b = bundle(7, &[OLD, NEW]);
        assert_eq!(Bundle::decode(&b.encode()), Ok(b.clone()));
        assert_eq!(hex::encode(sha256(&b.encode())), "9c331d67aafa9ce09604569af010d9297f4b6c9772e6ae8b68ea69c35ca8f122");
        for n in 0..b.encode().len() {
            assert!(Bundle::decode(&b.encode()[..n]).is_err(), "cut at {n}");
        }
        assert_eq!(Bundle::decode(&[b.encode(), vec![0]].concat()), Err(Malformed::Trailing(1)));
    }

    #[test]
    fn one_believed_signature_is_enough_and_none_is_not() {
        let both = bundle(2, &[OLD, NEW]);
        for trusts in [[OLD], [NEW]] {
            assert_eq!(told(&trusts, None, &both, &[OLD, NEW]), Ok(Verdict::Newer(both.clone())));
        }
        assert_eq!(told(&[OLD], None, &both, &[NEW]), Err(Refused::Unsigned), "it cannot vouch for itself");
        assert_eq!(told(&[OLD], None, &both, &[]), Err(Refused::Unsigned));
        assert_eq!(told(&[], None, &both, &[OLD]), Err(Refused::Unsigned));
    }

    #[test]
    fn what_was_changed_or_made_for_something_else_is_refused() {
        let (b, trusted) = (bundle(2, &[OLD, NEW]), [public_of(&OLD)]);
        let body = b.encode();
        let good = signed(payload_type::BUNDLE, &body, &[OLD]);
        for i in 0..body.len() {
            let mut forged = body.clone();
            forged[i] ^= 1;
            assert_eq!(judge(hub(), &trusted, None, &forged, &good), Err(Refused::Unsigned), "byte {i}");
        }
        for kind in [payload_type::ORDERS, payload_type::CANCEL, payload_type::INPUT, payload_type::AUDIT] {
            let other = signed(kind, &body, &[OLD]);
            assert_eq!(judge(hub(), &trusted, None, &body, &other), Err(Refused::Unsigned), "{kind}");
            assert!(verify(&trusted, &good[0].0, kind, &body, &good[0].1).is_err(), "nor is a bundle one of {kind}");
        }
        let theirs = Bundle { hub: HubId::from_bytes([8; 16]), ..b.clone() };
        assert_eq!(told(&[OLD], None, &theirs, &[OLD]), Err(Refused::OtherHub(theirs.hub)));
        // Signed by the right key, and no bundle all the same.
        let shapes: [fn(&mut Bundle); 5] = [
            |b| b.roots.clear(),
            |b| b.task_keys.clear(),
            |b| b.roots = vec![vec![1]; MOST + 1],
            |b| b.roots = vec![vec![1; MAX_ROOT_BYTES + 1]],
            |b| b.roots = vec![vec![1; MAX_ROOT_BYTES]; MOST],
        ];
        for (n, change) in shapes.iter().enumerate() {
            let mut odd = b.clone();
            change(&mut odd);
            assert!(matches!(told(&[OLD], None, &odd, &[OLD]), Err(Refused::Malformed(_))), "shape {n}");
        }
        let cut = &body[..body.len() - 1];
        let by = signed(payload_type::BUNDLE, cut, &[OLD]);
        assert_eq!(judge(hub(), &trusted, None, cut, &by), Err(Refused::Malformed(Malformed::Short)));
    }

    #[test]
    fn the_sequence_only_rises() {
        let second = bundle(2, &[OLD, NEW]);
        assert_eq!(told(&[OLD, NEW], Some(&second), &second, &[OLD]), Ok(Verdict::Same));
        assert_eq!(told(&[OLD, NEW], Some(&second), &bundle(1, &[OLD]), &[OLD]), Err(Refused::Older { said: 1, known: 2 }));
        assert_eq!(told(&[OLD, NEW], Some(&second), &bundle(2, &[OLD]), &[OLD]), Err(Refused::Forked(2)));
        let third = bundle(3, &[NEW]);
        assert_eq!(told(&[OLD, NEW], Some(&second), &third, &[NEW]), Ok(Verdict::Newer(third.clone())));
        assert_eq!(told(&[NEW], Some(&third), &bundle(4, &[OLD]), &[OLD]), Err(Refused::Unsigned), "a retired key says nothing any more");
    }
}

//! The envelope: what must hold before a hub's word is acted upon. Pure; nothing here waits or writes.
//!
//! The order of the checks is the order of this file: size → key pinned → signature → type → decode →
//! hub, node and key are mine → link session → seq. One failure refuses the envelope as a whole. What
//! concerns a single order (late, payload, policy) ends that order alone, in [`Checked::admit`].

use mesh_core::seal::{self, BadSignature, payload_type};
use mesh_core::spec::{MAX_SPEC_BYTES, Spec};
use mesh_core::task::{AttemptNo, NeverStarted, Outcome, Reason, ReasonCode};
use mesh_core::{Digest, HubId, NodeId, SessionId, TaskId, UnixMs, UserId};
use mesh_wire::convert::{self, BadMessage};
use mesh_wire::{limits, node as wire};
use prost::Message;

/// The hub takes no longer ones either.
const MAX_REQUEST_ID: usize = 128;

/// Names one attempt of one task.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    pub task: TaskId,
    pub attempt: AttemptNo,
}

impl std::fmt::Display for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.task, self.attempt.ordinal())
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Payload {
    Inline(Vec<u8>),
    /// To be pulled over the second stream; this many bytes.
    Pull(u64),
}

/// An order of an envelope that passed, not yet judged itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checked {
    pub key: Key,
    pub skill: String,
    pub digest: Digest,
    pub payload: Payload,
    pub user: UserId,
    pub session: Option<SessionId>,
    pub timeout_secs: u64,
    pub start_before_ms: UnixMs,
    pub granted: bool,
    /// What the task came by, for logs; empty when the hub did not say.
    pub request_id: String,
}

/// A piece of input of an envelope that passed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    pub key: Key,
    /// Given back in the answer.
    pub request: u64,
    pub seq: u64,
    pub data: Vec<u8>,
    pub eof: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Accepted {
    Orders(Vec<Checked>),
    /// With whether it gives no time to end by itself.
    Cancels(Vec<(Key, bool)>),
    Input(Piece),
}

/// An envelope that is not acted upon.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{code}: {detail}")]
pub struct Rejected {
    /// Of the envelope, when it could be read.
    pub seq: u64,
    pub code: &'static str,
    pub detail: String,
}

fn reject<T>(seq: u64, code: &'static str, detail: impl ToString) -> Result<T, Rejected> {
    Err(Rejected { seq, code, detail: detail.to_string() })
}

/// Whom this node believes, and what it has seen on this link.
#[derive(Debug, Clone)]
pub struct Checker {
    pub hub: HubId,
    pub node: NodeId,
    /// SHA-256 of this node's SubjectPublicKeyInfo.
    pub node_key: Digest,
    pub pinned: Vec<[u8; 32]>,
    pub link_session: [u8; 16],
    last_seq: u64,
}

/// What the two bodies have in common.
struct Head<'a> {
    hub_id: &'a str,
    node_id: &'a str,
    node_key_sha256: &'a [u8],
    link_session: &'a [u8],
    seq: u64,
    count: usize,
}

impl Checker {
    pub fn new(hub: HubId, node: NodeId, node_key: Digest, pinned: Vec<[u8; 32]>, link_session: [u8; 16]) -> Self {
        Self { hub, node, node_key, pinned, link_session, last_seq: 0 }
    }

    /// Judges an envelope. Only one that passes as a whole moves the sequence on.
    pub fn check(&mut self, e: &wire::Envelope) -> Result<Accepted, Rejected> {
        let size = e.encoded_len();
        if size > limits::ENVELOPE_BYTES {
            return reject(0, "too_large", format!("{size} bytes; {} are allowed", limits::ENVELOPE_BYTES));
        }
        match seal::verify(&self.pinned, &e.key_id, &e.payload_type, &e.body, &e.signature) {
            Ok(()) => {}
            Err(x @ BadSignature::UnknownKey) => return reject(0, "unknown_key", x),
            Err(x @ BadSignature::Mismatch) => return reject(0, "bad_signature", x),
        }
        let (seq, accepted) = match e.payload_type.as_str() {
            payload_type::ORDERS => {
                let body = wire::OrdersBody::decode(e.body.as_slice()).or_else(|x| reject(0, "malformed", x))?;
                let head = Head {
                    hub_id: &body.hub_id,
                    node_id: &body.node_id,
                    node_key_sha256: &body.node_key_sha256,
                    link_session: &body.link_session,
                    seq: body.seq,
                    count: body.orders.len(),
                };
                self.head(&head)?;
                let orders = body.orders.into_iter().map(order).collect::<Result<_, _>>();
                (body.seq, Accepted::Orders(orders.or_else(|x| reject(body.seq, "malformed", x))?))
            }
            payload_type::CANCEL => {
                let body = wire::CancelBody::decode(e.body.as_slice()).or_else(|x| reject(0, "malformed", x))?;
                let head = Head {
                    hub_id: &body.hub_id,
                    node_id: &body.node_id,
                    node_key_sha256: &body.node_key_sha256,
                    link_session: &body.link_session,
                    seq: body.seq,
                    count: body.cancels.len(),
                };
                self.head(&head)?;
                let keys = body.cancels.iter().map(|c| key(&c.task_id, c.attempt).map(|key| (key, c.now))).collect::<Result<_, _>>();
                (body.seq, Accepted::Cancels(keys.or_else(|x| reject(body.seq, "malformed", x))?))
            }
            payload_type::INPUT => {
                let body = wire::InputBody::decode(e.body.as_slice()).or_else(|x| reject(0, "malformed", x))?;
                let head = Head {
                    hub_id: &body.hub_id,
                    node_id: &body.node_id,
                    node_key_sha256: &body.node_key_sha256,
                    link_session: &body.link_session,
                    seq: body.seq,
                    count: 1,
                };
                self.head(&head)?;
                let seq = body.seq;
                (seq, Accepted::Input(piece(body).or_else(|x| reject(seq, "malformed", x))?))
            }
            other => return reject(0, "unknown_type", format!("{other:?}")),
        };
        self.last_seq = seq;
        Ok(accepted)
    }

    fn head(&self, h: &Head<'_>) -> Result<(), Rejected> {
        if h.hub_id != self.hub.to_string() {
            return reject(h.seq, "other_hub", format!("it is of {:?}", h.hub_id));
        }
        if h.node_id != self.node.to_string() || h.node_key_sha256 != self.node_key {
            return reject(h.seq, "other_node", format!("it is for {:?}", h.node_id));
        }
        if h.link_session != self.link_session {
            return reject(h.seq, "other_link", "it was made for another link");
        }
        if h.seq <= self.last_seq {
            return reject(h.seq, "replayed", format!("sequence {} after {}", h.seq, self.last_seq));
        }
        if !(1..=limits::ORDERS_PER_ENVELOPE).contains(&h.count) {
            return reject(h.seq, "order_count", format!("{} orders; 1 to {} are allowed", h.count, limits::ORDERS_PER_ENVELOPE));
        }
        Ok(())
    }
}

fn key(task: &str, attempt: u64) -> Result<Key, BadMessage> {
    if attempt == 0 {
        return Err(BadMessage::new("attempt", "0 is not an attempt"));
    }
    Ok(Key { task: convert::id("task_id", task)?, attempt: AttemptNo(attempt) })
}

fn piece(b: wire::InputBody) -> Result<Piece, BadMessage> {
    let key = key(&b.task_id, b.attempt)?;
    if b.input_seq == 0 {
        return Err(BadMessage::new("input_seq", "0 is not a piece"));
    }
    if b.data.len() > limits::INPUT_BYTES || (b.data.is_empty() && !b.eof) {
        return Err(BadMessage::new("data", format!("{} bytes; 1 to {} are allowed, 0 with an end", b.data.len(), limits::INPUT_BYTES)));
    }
    Ok(Piece { key, request: b.request, seq: b.input_seq, data: b.data, eof: b.eof })
}

fn order(o: wire::Order) -> Result<Checked, BadMessage> {
    // An encoded spec is never empty, so an empty field means: pull it.
    let payload = if o.payload.is_empty() { Payload::Pull(o.payload_bytes) } else { Payload::Inline(o.payload) };
    Ok(Checked {
        key: key(&o.task_id, o.attempt)?,
        digest: convert::fixed("payload_sha256", &o.payload_sha256)?,
        payload,
        user: convert::id("user_id", &o.user_id)?,
        session: if o.session_id.is_empty() { None } else { Some(convert::id("session_id", &o.session_id)?) },
        skill: o.skill,
        timeout_secs: o.timeout_secs,
        start_before_ms: o.start_before_ms,
        granted: o.granted,
        request_id: o.request_id.chars().filter(char::is_ascii_graphic).take(MAX_REQUEST_ID).collect(),
    })
}

fn refused(code: ReasonCode, detail: impl Into<String>) -> Outcome {
    Outcome::NeverStarted(NeverStarted::Refused(Reason::new(code, detail)))
}

impl Checked {
    /// What it would execute, as far as its payload is here.
    pub fn argv(&self) -> Vec<String> {
        match &self.payload {
            Payload::Inline(bytes) => Spec::decode(bytes).map_or(vec![], |spec| spec.argv()),
            Payload::Pull(_) => vec![],
        }
    }

    /// Everything about a single order that can be said before its payload is here.
    pub fn admit(&self, now: UnixMs) -> Result<(), Outcome> {
        // One that is only kept is started by another order, which has its own window.
        if self.granted && now >= self.start_before_ms {
            return Err(Outcome::NeverStarted(NeverStarted::Late));
        }
        if let Payload::Pull(n) = self.payload
            && (n == 0 || n > MAX_SPEC_BYTES as u64)
        {
            return Err(refused(ReasonCode::BadRequest, format!("a payload of {n} bytes; 1 to {MAX_SPEC_BYTES} are allowed")));
        }
        Ok(())
    }

    /// Reads the payload, once it is here, after comparing its hash.
    pub fn spec(&self, payload: &[u8]) -> Result<Spec, Outcome> {
        if mesh_core::sha256(payload) != self.digest {
            return Err(refused(ReasonCode::BadRequest, "the payload is not the one that was signed"));
        }
        let spec = Spec::decode(payload).map_err(|e| refused(ReasonCode::BadRequest, format!("the payload: {e}")))?;
        if spec.skill() != self.skill {
            return Err(refused(ReasonCode::BadRequest, format!("a payload of {} in an order of {:?}", spec.skill(), self.skill)));
        }
        spec.validate().map_err(|e| refused(ReasonCode::BadRequest, e.to_string()))?;
        Ok(spec)
    }
}

/// Counts refused envelopes: too many in a short time are no accident.
#[derive(Debug, Default)]
pub struct RejectionWindow(std::collections::VecDeque<std::time::Duration>);

impl RejectionWindow {
    pub const MOST: usize = 5;
    pub const WINDOW: std::time::Duration = std::time::Duration::from_secs(60);

    /// Notes one; true when the link is to be dropped.
    pub fn note(&mut self, now: std::time::Duration) -> bool {
        while self.0.front().is_some_and(|t| now.saturating_sub(*t) >= Self::WINDOW) {
            self.0.pop_front();
        }
        self.0.push_back(now);
        self.0.len() >= Self::MOST
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ed25519_dalek::SigningKey;
    use mesh_core::spec::{Program, Shell};
    use proptest::prelude::*;
    use std::time::Duration;

    const SESSION: [u8; 16] = [5; 16];

    fn hub_key() -> SigningKey {
        SigningKey::from_bytes(&[1; 32])
    }
    fn hub() -> HubId {
        HubId::from_bytes([1; 16])
    }
    fn node() -> NodeId {
        NodeId::from_bytes([2; 16])
    }
    fn checker() -> Checker {
        Checker::new(hub(), node(), [3; 32], vec![hub_key().verifying_key().to_bytes()], SESSION)
    }
    fn spec() -> Spec {
        Spec::Shell(Shell {
            program: Program::Argv(vec!["true".into()]),
            cwd: "".into(),
            env: Default::default(),
            stdin: vec![],
            stdin_open: false,
        })
    }
    fn one_order() -> wire::Order {
        wire::Order {
            task_id: TaskId::from_bytes([4; 16]).to_string(),
            attempt: 1,
            skill: "shell".into(),
            payload_sha256: spec().digest().to_vec(),
            payload: spec().encode(),
            payload_bytes: spec().encode().len() as u64,
            user_id: UserId::from_bytes([6; 16]).to_string(),
            session_id: String::new(),
            timeout_secs: 5,
            start_before_ms: 1_000,
            granted: true,
            policy_digest: vec![],
            request_id: String::new(),
        }
    }
    fn body(seq: u64) -> wire::OrdersBody {
        wire::OrdersBody {
            hub_id: hub().to_string(),
            node_id: node().to_string(),
            node_key_sha256: vec![3; 32],
            link_session: SESSION.to_vec(),
            seq,
            orders: vec![one_order()],
        }
    }
    fn sealed_as(kind: &str, body: Vec<u8>, key: &SigningKey) -> wire::Envelope {
        let signature = seal::sign(key, kind, &body).to_vec();
        wire::Envelope { payload_type: kind.into(), key_id: seal::key_id(&key.verifying_key().to_bytes()), body, signature }
    }
    fn sealed(body: &wire::OrdersBody) -> wire::Envelope {
        sealed_as(payload_type::ORDERS, body.encode_to_vec(), &hub_key())
    }
    fn code(c: &mut Checker, e: &wire::Envelope) -> &'static str {
        c.check(e).unwrap_err().code
    }
    fn checked() -> Checked {
        match checker().check(&sealed(&body(1))).unwrap() {
            Accepted::Orders(mut o) => o.remove(0),
            _ => unreachable!(),
        }
    }

    #[test]
    fn a_good_envelope_passes_once() {
        let mut c = checker();
        let e = sealed(&body(7));
        let Accepted::Orders(o) = c.check(&e).unwrap() else { panic!() };
        assert_eq!(o.len(), 1);
        assert_eq!(o[0].spec(&spec().encode()).unwrap(), spec());
        assert_eq!(code(&mut c, &e), "replayed");
        assert_eq!(code(&mut c, &sealed(&body(6))), "replayed");
        assert!(c.check(&sealed(&body(8))).is_ok());
    }

    #[test]
    fn every_altered_byte_is_found() {
        let good = sealed(&body(1));
        for i in 0..good.body.len() {
            let mut e = good.clone();
            e.body[i] ^= 0x20;
            assert_eq!(code(&mut checker(), &e), "bad_signature", "byte {i}");
        }
        for i in 0..good.signature.len() {
            let mut e = good.clone();
            e.signature[i] ^= 1;
            assert_eq!(code(&mut checker(), &e), "bad_signature", "signature byte {i}");
        }
        for cut in 0..good.body.len() {
            let e = wire::Envelope { body: good.body[..cut].to_vec(), ..good.clone() };
            assert_eq!(code(&mut checker(), &e), "bad_signature");
        }
    }

    #[test]
    fn what_is_meant_for_another_is_refused() {
        let other = HubId::from_bytes([9; 16]).to_string();
        assert_eq!(code(&mut checker(), &sealed(&wire::OrdersBody { hub_id: other, ..body(1) })), "other_hub");
        let other = NodeId::from_bytes([9; 16]).to_string();
        assert_eq!(code(&mut checker(), &sealed(&wire::OrdersBody { node_id: other, ..body(1) })), "other_node");
        assert_eq!(code(&mut checker(), &sealed(&wire::OrdersBody { node_key_sha256: vec![9; 32], ..body(1) })), "other_node");
        assert_eq!(code(&mut checker(), &sealed(&wire::OrdersBody { link_session: vec![9; 16], ..body(1) })), "other_link");
        assert_eq!(code(&mut checker(), &sealed(&wire::OrdersBody { link_session: vec![], ..body(1) })), "other_link");
        assert_eq!(code(&mut checker(), &sealed(&body(0))), "replayed");
    }

    #[test]
    fn unknown_keys_and_types_are_refused() {
        let stranger = SigningKey::from_bytes(&[8; 32]);
        let bytes = body(1).encode_to_vec();
        assert_eq!(code(&mut checker(), &sealed_as(payload_type::ORDERS, bytes.clone(), &stranger)), "unknown_key");
        // a stranger's signature under the hub's key id
        let mut e = sealed_as(payload_type::ORDERS, bytes.clone(), &stranger);
        e.key_id = seal::key_id(&hub_key().verifying_key().to_bytes());
        assert_eq!(code(&mut checker(), &e), "bad_signature");
        // orders under another type: the signature binds the type, and a type of its own is unknown
        let mut e = sealed(&body(1));
        e.payload_type = payload_type::CANCEL.into();
        assert_eq!(code(&mut checker(), &e), "bad_signature");
        assert_eq!(code(&mut checker(), &sealed_as("application/other", bytes, &hub_key())), "unknown_type");
    }

    #[test]
    fn sizes_and_counts() {
        let many =
            |n: usize| wire::OrdersBody { orders: vec![wire::Order { payload: vec![], payload_bytes: 1, ..one_order() }; n], ..body(1) };
        assert!(checker().check(&sealed(&many(64))).is_ok());
        assert_eq!(code(&mut checker(), &sealed(&many(65))), "order_count");
        assert_eq!(code(&mut checker(), &sealed(&many(0))), "order_count");
        let big = wire::OrdersBody { orders: vec![wire::Order { payload: vec![0; limits::ENVELOPE_BYTES], ..one_order() }], ..body(1) };
        assert_eq!(code(&mut checker(), &sealed(&big)), "too_large");
    }

    #[test]
    fn ids_are_read_as_ids() {
        let bad = [
            wire::Order { task_id: "task_../../etc".into(), ..one_order() },
            wire::Order { user_id: "../root".into(), ..one_order() },
            wire::Order { session_id: "sess_x".into(), ..one_order() },
            wire::Order { attempt: 0, ..one_order() },
            wire::Order { payload_sha256: vec![1; 31], ..one_order() },
        ];
        for o in bad {
            let mut c = checker();
            assert_eq!(code(&mut c, &sealed(&wire::OrdersBody { orders: vec![one_order(), o], ..body(1) })), "malformed");
            assert!(c.check(&sealed(&body(1))).is_ok(), "a refused envelope does not use up its number");
        }
    }

    #[test]
    fn cancels() {
        let c = wire::CancelOrder { task_id: TaskId::from_bytes([4; 16]).to_string(), attempt: 3, now: true };
        let b = wire::CancelBody {
            hub_id: hub().to_string(),
            node_id: node().to_string(),
            node_key_sha256: vec![3; 32],
            link_session: SESSION.to_vec(),
            seq: 2,
            cancels: vec![c],
        };
        let e = sealed_as(payload_type::CANCEL, b.encode_to_vec(), &hub_key());
        let mut checker = checker();
        let want = Key { task: TaskId::from_bytes([4; 16]), attempt: AttemptNo(3) };
        assert_eq!(checker.check(&e), Ok(Accepted::Cancels(vec![(want, true)])));
        assert_eq!(code(&mut checker, &sealed(&body(2))), "replayed", "orders and cancels share one sequence");
    }

    fn input(seq: u64) -> wire::InputBody {
        wire::InputBody {
            hub_id: hub().to_string(),
            node_id: node().to_string(),
            node_key_sha256: vec![3; 32],
            link_session: SESSION.to_vec(),
            seq,
            task_id: TaskId::from_bytes([4; 16]).to_string(),
            attempt: 3,
            request: 77,
            input_seq: 1,
            data: b"in".to_vec(),
            eof: false,
        }
    }
    fn sealed_input(b: &wire::InputBody) -> wire::Envelope {
        sealed_as(payload_type::INPUT, b.encode_to_vec(), &hub_key())
    }

    #[test]
    fn input_passes_once_and_for_this_node_alone() {
        let mut c = checker();
        let e = sealed_input(&input(2));
        let key = Key { task: TaskId::from_bytes([4; 16]), attempt: AttemptNo(3) };
        assert_eq!(c.check(&e), Ok(Accepted::Input(Piece { key, request: 77, seq: 1, data: b"in".to_vec(), eof: false })));
        assert_eq!(code(&mut c, &e), "replayed");
        assert_eq!(code(&mut c, &sealed(&body(2))), "replayed", "input and orders share one sequence");
        let other = HubId::from_bytes([9; 16]).to_string();
        assert_eq!(code(&mut checker(), &sealed_input(&wire::InputBody { hub_id: other, ..input(1) })), "other_hub");
        let other = NodeId::from_bytes([9; 16]).to_string();
        assert_eq!(code(&mut checker(), &sealed_input(&wire::InputBody { node_id: other, ..input(1) })), "other_node");
        assert_eq!(code(&mut checker(), &sealed_input(&wire::InputBody { node_key_sha256: vec![9; 32], ..input(1) })), "other_node");
        assert_eq!(code(&mut checker(), &sealed_input(&wire::InputBody { link_session: vec![9; 16], ..input(1) })), "other_link");
    }

    #[test]
    fn forged_input_is_refused() {
        let good = sealed_input(&input(1));
        for i in 0..good.body.len() {
            let mut e = good.clone();
            e.body[i] ^= 0x20;
            assert_eq!(code(&mut checker(), &e), "bad_signature", "byte {i}");
        }
        let stranger = SigningKey::from_bytes(&[8; 32]);
        assert_eq!(code(&mut checker(), &sealed_as(payload_type::INPUT, good.body.clone(), &stranger)), "unknown_key");
        // One kind is never read as another, whichever way they are exchanged.
        for (kind, bytes) in [
            (payload_type::ORDERS, good.body.clone()),
            (payload_type::CANCEL, good.body.clone()),
            (payload_type::INPUT, body(1).encode_to_vec()),
        ] {
            let e = wire::Envelope { payload_type: kind.into(), body: bytes, ..good.clone() };
            assert_eq!(code(&mut checker(), &e), "bad_signature", "{kind}");
        }
    }

    #[test]
    fn input_has_bounds() {
        let at = |n: usize| wire::InputBody { data: vec![1; n], ..input(1) };
        assert!(checker().check(&sealed_input(&at(limits::INPUT_BYTES))).is_ok());
        assert!(checker().check(&sealed_input(&wire::InputBody { eof: true, ..at(0) })).is_ok());
        let bad = [
            at(limits::INPUT_BYTES + 1),
            at(0),
            wire::InputBody { input_seq: 0, ..input(1) },
            wire::InputBody { attempt: 0, ..input(1) },
            wire::InputBody { task_id: "task_../../etc".into(), ..input(1) },
        ];
        for b in bad {
            let mut c = checker();
            assert_eq!(code(&mut c, &sealed_input(&b)), "malformed");
            assert!(c.check(&sealed_input(&input(1))).is_ok(), "a refused envelope does not use up its number");
        }
        assert_eq!(code(&mut checker(), &sealed_input(&at(limits::ENVELOPE_BYTES))), "too_large");
    }

    #[test]
    fn a_single_order_is_judged() {
        let o = checked();
        assert_eq!(o.admit(999), Ok(()));
        assert_eq!(o.admit(1_000), Err(Outcome::NeverStarted(NeverStarted::Late)));
        let is_refused = |o: Result<(), Outcome>| matches!(o, Err(Outcome::NeverStarted(NeverStarted::Refused(_))));
        assert_eq!(Checked { granted: false, ..o.clone() }.admit(i64::MAX), Ok(()), "its window is that of the grant");
        assert!(is_refused(Checked { payload: Payload::Pull(0), ..o.clone() }.admit(1)));
        assert!(is_refused(Checked { payload: Payload::Pull(MAX_SPEC_BYTES as u64 + 1), ..o.clone() }.admit(1)));
        assert_eq!(Checked { payload: Payload::Pull(MAX_SPEC_BYTES as u64), ..o.clone() }.admit(1), Ok(()));
        assert!(is_refused(o.spec(b"other").map(drop)));
        assert!(is_refused(Checked { skill: "echo".into(), ..o.clone() }.spec(&spec().encode()).map(drop)));
        let rubbish = b"\x01\x01rubbish";
        assert!(is_refused(Checked { digest: mesh_core::sha256(rubbish), ..o }.spec(rubbish).map(drop)));
    }

    #[test]
    fn five_refusals_in_a_minute_are_too_many() {
        let mut w = RejectionWindow::default();
        for s in [0, 1, 2, 3] {
            assert!(!w.note(Duration::from_secs(s)));
        }
        assert!(w.note(Duration::from_secs(4)));
        let mut w = RejectionWindow::default();
        for s in 0..100 {
            assert!(!w.note(Duration::from_secs(s * 20)), "{s}");
        }
    }

    proptest! {
        #[test]
        fn garbage_never_panics_and_never_passes(kind in ".{0,20}", body in proptest::collection::vec(any::<u8>(), 0..300), key_id in ".{0,20}", signature in proptest::collection::vec(any::<u8>(), 0..80)) {
            let e = wire::Envelope { payload_type: kind, body, key_id, signature };
            prop_assert!(checker().check(&e).is_err());
        }
        #[test]
        fn signed_garbage_never_panics(body in proptest::collection::vec(any::<u8>(), 0..300), kind in 0usize..3) {
            let kind = [payload_type::ORDERS, payload_type::CANCEL, payload_type::INPUT][kind];
            prop_assert!(checker().check(&sealed_as(kind, body, &hub_key())).is_err());
        }
        #[test]
        fn a_payload_of_garbage_never_panics(payload in proptest::collection::vec(any::<u8>(), 0..300)) {
            let o = Checked { digest: mesh_core::sha256(&payload), ..checked() };
            if let Ok(s) = o.spec(&payload) { prop_assert_eq!(s.skill(), "shell"); }
        }
    }
}

//! Orders, cancels and input into signed envelopes: the exact bytes are signed, once per frame.

use hub_engine::input::Input;
use hub_engine::links::Order;
use hub_engine::ports::Keyring;
use mesh_core::seal::payload_type;
use mesh_core::task::AttemptNo;
use mesh_core::{Digest, HubId, NodeId, TaskId};
use mesh_wire::limits::{ENVELOPE_BYTES, ORDERS_PER_ENVELOPE};
use mesh_wire::node as wire;
use prost::Message;

/// Room for the fields around the orders.
const ENVELOPE_OVERHEAD: usize = 512;

/// Writes envelopes for one link; `seq` binds each to its place on it.
pub struct Sealer<'a> {
    pub keyring: &'a dyn Keyring,
    pub hub: HubId,
    pub node: NodeId,
    pub node_key: Digest,
    pub link_session: [u8; 16],
    pub seq: u64,
    /// Ids of the task keys that the node believes.
    pub believed: Vec<String>,
}

impl Sealer<'_> {
    /// As few envelopes as the limits allow.
    pub fn orders(&mut self, orders: Vec<Order>) -> Vec<wire::Envelope> {
        let (mut envelopes, mut batch, mut bytes) = (vec![], vec![], 0);
        for order in orders.into_iter().map(wire_order) {
            let n = order.encoded_len() + 4;
            if batch.len() == ORDERS_PER_ENVELOPE || bytes + n > ENVELOPE_BYTES - ENVELOPE_OVERHEAD {
                envelopes.push(self.seal_orders(std::mem::take(&mut batch)));
                bytes = 0;
            }
            bytes += n;
            batch.push(order);
        }
        if !batch.is_empty() {
            envelopes.push(self.seal_orders(batch));
        }
        envelopes
    }

    fn seal_orders(&mut self, orders: Vec<wire::Order>) -> wire::Envelope {
        self.seq += 1;
        let body = wire::OrdersBody {
            hub_id: self.hub.to_string(),
            node_id: self.node.to_string(),
            node_key_sha256: self.node_key.to_vec(),
            link_session: self.link_session.to_vec(),
            seq: self.seq,
            orders,
        };
        self.sign(payload_type::ORDERS, body.encode_to_vec())
    }

    /// The last of each: without time to end by itself.
    pub fn cancels(&mut self, cancels: &[(TaskId, AttemptNo, bool)]) -> Vec<wire::Envelope> {
        let mut envelopes = vec![];
        for chunk in cancels.chunks(ORDERS_PER_ENVELOPE) {
            self.seq += 1;
            let body = wire::CancelBody {
                hub_id: self.hub.to_string(),
                node_id: self.node.to_string(),
                node_key_sha256: self.node_key.to_vec(),
                link_session: self.link_session.to_vec(),
                seq: self.seq,
                cancels: chunk.iter().map(|(t, a, now)| wire::CancelOrder { task_id: t.to_string(), attempt: a.0, now: *now }).collect(),
            };
            envelopes.push(self.sign(payload_type::CANCEL, body.encode_to_vec()));
        }
        envelopes
    }

    /// A piece fits by its size, which the engine has checked.
    pub fn input(&mut self, i: Input) -> wire::Envelope {
        self.seq += 1;
        let body = wire::InputBody {
            hub_id: self.hub.to_string(),
            node_id: self.node.to_string(),
            node_key_sha256: self.node_key.to_vec(),
            link_session: self.link_session.to_vec(),
            seq: self.seq,
            task_id: i.task.to_string(),
            attempt: i.attempt.0,
            request: i.request,
            input_seq: i.piece.seq,
            data: i.piece.data,
            eof: i.piece.eof,
        };
        self.sign(payload_type::INPUT, body.encode_to_vec())
    }

    fn sign(&self, kind: &str, body: Vec<u8>) -> wire::Envelope {
        let (key_id, signature) = self.keyring.sign_for(&self.believed, kind, &body);
        wire::Envelope { payload_type: kind.to_owned(), body, key_id, signature: signature.to_vec() }
    }
}

fn wire_order(o: Order) -> wire::Order {
    wire::Order {
        task_id: o.task.to_string(),
        attempt: o.attempt.0,
        skill: o.skill,
        payload_sha256: o.digest.to_vec(),
        payload: o.spec,
        payload_bytes: o.spec_bytes,
        user_id: o.user.to_string(),
        session_id: o.session.map(|s| s.to_string()).unwrap_or_default(),
        timeout_secs: o.timeout_secs,
        start_before_ms: o.start_before,
        granted: o.granted,
        policy_digest: o.policy.to_vec(),
        request_id: o.request_id.as_deref().unwrap_or_default().to_owned(),
    }
}

//! Proof that a machine holds an invite, or a node's key, bound to one TLS channel and one key.

use crate::canon::{Tag, Writer};
use crate::{Digest, HubId, InviteId, NodeId};

/// Label of the TLS exporter (RFC 8446 section 7.5) that binds the proof to its channel.
pub const EXPORTER_LABEL: &[u8] = b"EXPERIMENTAL-cortexmesh-enrol-v1";

/// The bytes that the invite's key signs; the secret itself never leaves the machine.
pub fn proof_bytes(hub: HubId, invite: InviteId, exporter: &[u8; 32], spki: &Digest, nonce: &[u8; 32]) -> Vec<u8> {
    Writer::new(Tag::EnrolProof, 1).raw(hub.as_bytes()).raw(invite.as_bytes()).raw(exporter).raw(spki).raw(nonce).finish()
}

/// The bytes that a node's identity key signs for a new certificate once the last one has ended.
pub fn recover_bytes(hub: HubId, node: NodeId, exporter: &[u8; 32], spki: &Digest, counter: u64, nonce: &[u8; 32]) -> Vec<u8> {
    let mut w = Writer::new(Tag::RecoverProof, 1);
    w.raw(hub.as_bytes()).raw(node.as_bytes()).raw(exporter).raw(spki).u64(counter).raw(nonce).finish()
}

/// The name that a hub's certificate carries and a node asks for, whatever address it dials.
pub fn server_name(hub: HubId) -> String {
    format!("{hub}.hub.cortex")
}

/// The one URI in a node's certificate (SPIFFE's form); ownership and labels live in the database.
pub fn node_uri(hub: HubId, node: NodeId) -> String {
    format!("spiffe://{hub}/node/{node}")
}

/// Reads [`node_uri`] back, refusing another hub's.
pub fn parse_node_uri(hub: HubId, uri: &str) -> Option<NodeId> {
    uri.strip_prefix(&format!("spiffe://{hub}/node/"))?.parse().ok()
}

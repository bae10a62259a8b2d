//! Proof that a machine holds an invite, bound to one TLS channel and one key.

use crate::canon::{Tag, Writer};
use crate::{Digest, HubId, InviteId};

/// Label of the TLS exporter (RFC 8446 section 7.5) that binds the proof to its channel.
pub const EXPORTER_LABEL: &[u8] = b"EXPERIMENTAL-cortexmesh-enrol-v1";

/// The bytes that the invite's key signs; the secret itself never leaves the machine.
pub fn proof_bytes(hub: HubId, invite: InviteId, exporter: &[u8; 32], spki: &Digest, nonce: &[u8; 32]) -> Vec<u8> {
    Writer::new(Tag::EnrolProof, 1).raw(hub.as_bytes()).raw(invite.as_bytes()).raw(exporter).raw(spki).raw(nonce).finish()
}

/// The name that a hub's certificate carries and a node asks for, whatever address it dials.
pub fn server_name(hub: HubId) -> String {
    format!("{hub}.hub.cortex")
}

/// The one URI in a node's certificate (SPIFFE's form); ownership and labels live in the database.
pub fn node_uri(hub: HubId, node: crate::NodeId) -> String {
    format!("spiffe://{hub}/node/{node}")
}

/// Reads [`node_uri`] back, refusing another hub's.
pub fn parse_node_uri(hub: HubId, uri: &str) -> Option<crate::NodeId> {
    uri.strip_prefix(&format!("spiffe://{hub}/node/"))?.parse().ok()
}

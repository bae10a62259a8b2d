//! The invite file that a person carries to their machine.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InviteFile {
    pub hub: HubAddress,
    /// `sha256:` and 64 hex digits: SHA-256 of the root's SubjectPublicKeyInfo (DER).
    pub ca_pin: String,
    /// `ed25519:` and base64 of the 32 bytes of each key that may sign orders.
    pub task_keys: Vec<String>,
    pub invite: InviteSecret,
    pub node: NodeSettings,
}

#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HubAddress {
    pub id: String,
    /// `host:port` of the node port.
    pub grpc: String,
    /// Other addresses of it, to be tried in turn.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub also: Vec<String>,
    pub url: String,
    pub server_name: String,
}

#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InviteSecret {
    pub id: String,
    /// base64url, no padding, of the 32-byte Ed25519 seed; absent once it was used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret: Option<String>,
}

#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeSettings {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    #[serde(default = "default_root")]
    pub workspace_root: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_tasks: Option<u32>,
}

fn default_root() -> String {
    "~/cortex".into()
}

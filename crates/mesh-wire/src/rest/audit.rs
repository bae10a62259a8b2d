//! The audit log.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Something that was done, denied or failed. Hashes and salts are hex.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct AuditEntry {
    /// The chain that it stands in: one for each hub process, and a new one after a restore
    pub chain: String,
    /// From 1 in each chain, without holes
    pub seq: u64,
    pub id: String,
    pub at: String,
    #[serde(rename = "type")]
    pub kind: String,
    /// Such as `task.dispatch`
    pub action: String,
    pub actor: AuditActor,
    pub resource: AuditResource,
    pub outcome: String,
    pub session_id: Option<String>,
    /// Where the call came from; null: this machine, or erased
    pub address: Option<String>,
    pub request_id: Option<String>,
    /// Null once it is erased
    pub detail: Option<BTreeMap<String, String>>,
    /// Hash of `username`, `address` and `request_id` with `person_salt`, which goes with them when they are erased
    pub person_hash: String,
    pub person_salt: Option<String>,
    pub detail_hash: String,
    pub detail_salt: Option<String>,
    pub prev_hash: String,
    pub hash: String,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct AuditActor {
    /// Null: nobody was known, or the hub itself
    pub user_id: Option<String>,
    /// Empty where nobody was known, and once it is erased
    pub username: String,
    pub key_id: Option<String>,
    pub agent: Option<String>,
    /// `rest`, `socket`, `node`, or `hub` for the hub itself
    pub door: String,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct AuditResource {
    pub kind: String,
    pub id: String,
}

/// Where a chain stood.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct AuditHead {
    pub chain: String,
    pub seq: u64,
    pub hash: String,
}

/// Where chains stood, signed by the hub. Key and signature (Ed25519) are hex.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct AuditCheckpoint {
    pub hub_id: String,
    pub at: String,
    pub heads: Vec<AuditHead>,
    pub key: String,
    pub signature: String,
}

/// The last line of an export.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct AuditExportEnd {
    /// Null when something is wrong with the log, which `GET /audit/verify` tells
    pub checkpoint: Option<AuditCheckpoint>,
}

/// What a verification found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct AuditVerification {
    pub ok: bool,
    pub rows: u64,
    /// The lowest of `heads`; absent when all is well
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(nullable = false))]
    pub first_bad_seq: Option<u64>,
    pub heads: Vec<AuditHeadView>,
}

/// One chain, up to where it is good.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct AuditHeadView {
    pub chain: String,
    pub seq: u64,
    pub hash: String,
    /// The newest row that is signed; 0 for none
    pub signed_seq: u64,
    pub first_bad_seq: Option<u64>,
    /// What is wrong there
    pub problem: Option<String>,
    /// A restore went back to where this chain ends
    pub restored: bool,
}

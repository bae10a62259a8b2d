//! What agents keep.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What the JSON-RPC method `state.query` answers.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct StateReply {
    /// By agent and key.
    pub state: BTreeMap<String, BTreeMap<String, serde_json::Value>>,
    /// There is more: `cursor` of the next query with the same filters.
    pub next_cursor: Option<String>,
    pub timestamp: String,
}
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct StateEntryView {
    pub agent_id: String,
    pub key: String,
    pub value: serde_json::Value,
    pub updated_at: String,
}

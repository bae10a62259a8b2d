//! What agents keep.

use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct StateEntryView {
    pub agent_id: String,
    pub key: String,
    pub value: serde_json::Value,
    pub updated_at: String,
}

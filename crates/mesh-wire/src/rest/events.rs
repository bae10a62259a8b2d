//! Live events.

use serde::{Deserialize, Serialize};

/// One live event: the data of an SSE event, or a text frame of the WebSocket. Type `reset` says that
/// events of the topic were missed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct EventView {
    /// Opaque; `Last-Event-ID` and `after` take it.
    pub id: String,
    /// nodes, tasks or sessions.
    pub topic: String,
    #[serde(rename = "type")]
    pub kind: String,
    pub at: String,
    /// By topic and type.
    pub data: serde_json::Value,
}
/// SSE event `end`: the stream ends here, and why. A WebSocket says it in its close frame.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct StreamEnd {
    /// stopping or rights.
    pub code: String,
    pub detail: String,
}

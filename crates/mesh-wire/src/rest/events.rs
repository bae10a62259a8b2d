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

/// What the JSON-RPC method `event.subscribe` takes.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct SubscribeRequest {
    /// nodes, tasks, sessions.
    pub topics: Vec<String>,
    /// The last event that was seen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<String>,
}
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct SubscribeReply {
    pub subscription_id: String,
}
/// What the JSON-RPC method `event.unsubscribe` takes.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct UnsubscribeRequest {
    pub subscription_id: String,
}
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct UnsubscribeReply {
    pub subscription_id: String,
}
/// An OpenRPC 1.3 document.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct DiscoverReply {
    pub openrpc: String,
    pub info: serde_json::Value,
    pub servers: Vec<serde_json::Value>,
    pub methods: Vec<serde_json::Value>,
    pub components: serde_json::Value,
}
/// What the notification `event.notify` carries.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct EventNotice {
    pub subscription_id: String,
    pub event: EventView,
}

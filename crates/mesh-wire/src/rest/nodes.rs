//! Machines and invites.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct InviteRequest {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Not built yet: refused with `not_yet` when present.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<serde_json::Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl_secs: Option<u64>,
}
/// The answer to the POST that made an invite; the secret is in `config_yaml` and nowhere else.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct InviteReply {
    pub id: String,
    pub expires_at: String,
    pub config_yaml: String,
    pub join_command: String,
    pub download_url: String,
}
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct InviteView {
    pub id: String,
    pub name: Option<String>,
    pub labels: BTreeMap<String, String>,
    pub owner_id: String,
    pub created_at: String,
    pub expires_at: String,
    /// open, used, expired or revoked.
    pub status: String,
    pub node_id: Option<String>,
    /// What the owner should know, such as a second use of the invite.
    pub notices: Vec<String>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Schedulable {
    pub ok: bool,
    pub reason: Option<String>,
}
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct CapabilitiesView {
    pub os: String,
    pub arch: String,
    pub kernel: String,
    pub hostname: String,
    pub cpu_model: String,
    pub cpu_cores: u32,
    pub memory_bytes: u64,
    pub disk_bytes: u64,
    pub runtimes: BTreeMap<String, String>,
    pub gpus: Vec<GpuView>,
    pub skills: BTreeMap<String, String>,
    pub sandbox: BTreeMap<String, SandboxFeatureView>,
}
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct GpuView {
    pub name: String,
    pub memory_bytes: u64,
}
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct SandboxFeatureView {
    pub works: bool,
    pub detail: String,
}
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct NodeView {
    pub id: String,
    pub name: String,
    pub owner_id: String,
    /// All that selectors see: the owner's, and those that the hub sets from the machine itself.
    pub labels: BTreeMap<String, String>,
    pub slots: BTreeMap<String, u32>,
    /// The part of it that people set, as a PATCH takes it.
    pub settings: NodeSettings,
    pub capabilities: CapabilitiesView,
    /// revoked, offline, draining or online: the first that applies.
    pub status: String,
    pub schedulable: Schedulable,
    pub last_seen_at: Option<String>,
    pub running: u32,
    pub max_tasks: u32,
    pub version: String,
    pub created_at: String,
    pub certificate_not_after: Option<String>,
    /// Also while it is offline.
    pub draining: bool,
    pub revoked_at: Option<String>,
    pub notices: Vec<String>,
}
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct NodeSettings {
    pub labels: BTreeMap<String, String>,
    /// Null: the GPUs found.
    pub slots: Option<BTreeMap<String, u32>>,
    /// Null: the machine's own bound alone.
    pub max_tasks: Option<u32>,
}
/// What is left out stays as it is.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields, default)]
pub struct NodeChangeRequest {
    #[serde(deserialize_with = "present", skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(nullable = false))]
    pub name: Option<String>,
    /// Replaces the owner's labels as a whole.
    #[serde(deserialize_with = "present", skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(nullable = false))]
    pub labels: Option<BTreeMap<String, String>>,
    /// Null: the GPUs found, again.
    #[serde(deserialize_with = "present", skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(value_type = Option<BTreeMap<String, u32>>))]
    pub slots: Option<Option<BTreeMap<String, u32>>>,
    /// Null or 0: no bound of the hub.
    #[serde(deserialize_with = "present", skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(value_type = Option<u32>))]
    pub max_tasks: Option<Option<u32>>,
    /// Not built yet: refused with `not_yet` when present.
    #[serde(deserialize_with = "present", skip_serializing_if = "Option::is_none")]
    pub policy: Option<serde_json::Value>,
}

/// A field that is there, whatever it holds: null is not the same as left out.
fn present<'de, D: serde::Deserializer<'de>, T: Deserialize<'de>>(d: D) -> Result<Option<T>, D::Error> {
    T::deserialize(d).map(Some)
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct MemoryView {
    pub used_bytes: u64,
    pub total_bytes: u64,
}
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct NodeStatusView {
    pub id: String,
    pub status: String,
    pub schedulable: Schedulable,
    pub last_seen_at: Option<String>,
    pub running: u32,
    pub cpu_percent: Option<f64>,
    pub memory: Option<MemoryView>,
    pub disk: Option<MemoryView>,
    pub load: Option<f64>,
    pub rtt_ms: Option<f64>,
    /// The last hour, 15 s apart, oldest first.
    pub history: Vec<NodeSample>,
}
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct NodeSample {
    pub at: String,
    pub cpu_percent: f64,
    pub memory_used_bytes: u64,
    pub disk_used_bytes: u64,
    pub load: f64,
    pub running: u32,
    pub rtt_ms: Option<f64>,
}

//! The hub itself.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What `GET /` tells.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ServerInfo {
    pub name: String,
    pub version: String,
    pub hub_id: String,
    /// Where the API begins.
    pub api: String,
    /// JSON-RPC methods.
    pub methods: Vec<String>,
}
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Health {
    pub status: String,
}
/// What the JSON-RPC method `system.health` answers.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct HealthReply {
    pub status: String,
    pub version: String,
    pub uptime_secs: u64,
    pub timestamp: String,
}
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Ready {
    pub status: String,
    pub uptime_secs: u64,
    /// Storage that is used to 80 % of its bound or more: `journal`, `output`, `disk`.
    #[serde(default)]
    pub warnings: Vec<String>,
}
/// A hub that holds back after a restore.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct RestoredView {
    pub restored_at: String,
    /// When the backup was made.
    pub backup_at: String,
    /// The machines that linked since the hub started.
    pub nodes: Vec<RestoredNode>,
}
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct RestoredNode {
    pub id: String,
    pub name: String,
    /// What the machine said it holds.
    pub attempts: Vec<RestoredAttempt>,
}
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct RestoredAttempt {
    pub task_id: String,
    pub attempt: u32,
    /// Open in the restored journal too; what is not is ended when the hub goes on.
    pub known: bool,
}
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct SystemInfo {
    pub version: String,
    pub hub_id: String,
    pub started_at: String,
    pub uptime_secs: u64,
}
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct StatsView {
    pub tasks: TaskStats,
    pub pool: PoolStats,
    pub nodes: NodeStats,
    pub storage: StorageStats,
    /// The last hour, oldest first.
    pub history: Vec<StatsSample>,
}
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct TaskStats {
    pub by_state: BTreeMap<String, u64>,
}
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct PoolStats {
    pub waiting: u64,
    pub oldest_secs: u64,
    /// Tasks that ended, over about a minute.
    pub per_second: f64,
}
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct NodeStats {
    pub by_status: BTreeMap<String, u64>,
}
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct StorageStats {
    pub database_bytes: u64,
    pub output_bytes: u64,
    /// Of both bounds together; null unless both are set.
    pub limit_bytes: Option<u64>,
    /// What of the database is in use.
    pub journal_bytes: u64,
    /// Beyond it the oldest tasks go; null: no bound.
    pub journal_limit_bytes: Option<u64>,
    /// Beyond it the oldest output goes; null: no bound.
    pub output_limit_bytes: Option<u64>,
    /// The disk of the data folder.
    pub disk_bytes: Option<u64>,
    pub disk_free_bytes: Option<u64>,
    /// What is used to 80 % of its bound or more: `journal`, `output`, `disk`.
    pub warnings: Vec<String>,
}
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct StatsSample {
    pub at: String,
    pub waiting: u64,
    pub oldest_secs: u64,
    pub per_second: f64,
    pub running: u64,
    pub nodes_online: u64,
    pub database_bytes: u64,
    pub output_bytes: u64,
}
/// A skill that at least one node of the caller's has.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct SkillView {
    pub name: String,
    /// Version to the number of nodes that have it.
    pub versions: BTreeMap<String, u32>,
    /// Of them, those that are online.
    pub online: u32,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct DownloadView {
    /// Such as `linux-x86_64`.
    pub target: String,
    pub version: String,
    pub size: u64,
    pub sha256: String,
}
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Downloads {
    pub items: Vec<DownloadView>,
    /// Targets that this hub has no binary for.
    pub missing: Vec<String>,
}

/// The hub's certificate authority, and where its rotation stands.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct AuthorityView {
    pub phase: String,
    /// Of the bundle that says what nodes believe; it only rises.
    pub seq: u64,
    /// Nodes that are not revoked.
    pub nodes: u64,
    /// How many of them have this bundle.
    pub acknowledged: u64,
    /// Who has not.
    pub stragglers: Vec<StragglerView>,
    /// Nodes that have a living certificate by the root that goes out of use.
    pub old_certificates: u64,
    pub on_old_root: Vec<StragglerView>,
}
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct StragglerView {
    pub id: String,
    pub name: String,
}
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct RotateRequest {
    pub step: String,
    /// Go on although nodes cannot follow: they need a new invite.
    #[serde(default)]
    pub leave_behind: bool,
}

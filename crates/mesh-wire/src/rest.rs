//! Shapes of the REST door, `/api/v1`. Times are RFC 3339 in UTC, ids are `prefix_uuid`.
//!
//! Doc comments here are read by users of the API: they become its description. In a reply, a field
//! that has nothing to tell is null; the few that may be absent instead say `nullable = false`.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// RFC 9457, media type `application/problem+json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Problem {
    #[serde(rename = "type")]
    pub kind: String,
    pub title: String,
    pub status: u16,
    pub detail: String,
    pub code: String,
    pub request_id: String,
}

/// One page of a list, newest first.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Page<T> {
    pub items: Vec<T>,
    pub next_cursor: Option<String>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct LoginRequest {
    pub username: String,
    pub password: String,
    #[serde(default)]
    pub device_name: Option<String>,
}
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct RefreshRequest {
    pub refresh_token: String,
}
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct TokenReply {
    pub access_token: String,
    pub refresh_token: String,
    pub expires_in: u64,
    pub token_type: String,
}
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct PasswordRequest {
    pub current_password: String,
    pub new_password: String,
}
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct UserView {
    pub id: String,
    pub username: String,
}
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct MeReply {
    pub user: UserView,
    pub role: String,
    pub permissions: Vec<String>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct ApiKeyRequest {
    pub name: String,
    pub scopes: Vec<String>,
    #[serde(default)]
    pub expires_at: Option<String>,
}
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ApiKeyView {
    pub id: String,
    pub name: String,
    /// Only in the answer to the POST that made it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(nullable = false))]
    pub secret: Option<String>,
    pub prefix: String,
    pub scopes: Vec<String>,
    pub expires_at: Option<String>,
    pub created_at: String,
    pub last_used_at: Option<String>,
}

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

#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct SessionRequest {
    pub name: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl_secs: Option<u64>,
}
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct SessionView {
    pub id: String,
    pub user_id: String,
    pub name: String,
    /// active, closed or expired.
    pub status: String,
    pub attached_node_ids: Vec<String>,
    pub created_at: String,
    pub expires_at: String,
    pub device_id: Option<String>,
    /// When what it held was erased.
    #[serde(default)]
    pub purged_at: Option<String>,
}
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct AttachRequest {
    /// An existing folder on the node. Not built yet: refused with `not_yet`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
}

/// What of a session is set anew; what is absent stays.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct SessionPatch {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl_secs: Option<u64>,
}
/// The value of a key, in a session's memory or an agent's state: any JSON.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct ValueRequest {
    pub value: serde_json::Value,
}
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct MemoryEntryView {
    pub session_id: String,
    pub key: String,
    pub value: serde_json::Value,
    pub updated_at: String,
}
/// A key of a session's memory, without its value.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct MemoryKeyView {
    pub key: String,
    /// Of the value, as JSON.
    pub bytes: u64,
    pub updated_at: String,
}
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct MessageRequest {
    /// system, user, assistant or tool.
    pub role: String,
    pub content: String,
}
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct MessageView {
    pub id: String,
    pub session_id: String,
    pub role: String,
    pub content: String,
    pub created_at: String,
}
/// Something that happened in a session. What does not belong to its type is absent.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ActivityView {
    pub at: String,
    #[serde(rename = "type")]
    pub kind: String,
    /// Who did it; nobody did what the hub does by itself.
    pub user_id: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(nullable = false))]
    pub name: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(nullable = false))]
    pub node_id: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(nullable = false))]
    pub message_id: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(nullable = false))]
    pub key: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(nullable = false))]
    pub task_id: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(nullable = false))]
    pub skill: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(nullable = false))]
    pub state: Option<String>,
    /// The code of a task's reason.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(nullable = false))]
    pub reason: Option<String>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct StateEntryView {
    pub agent_id: String,
    pub key: String,
    pub value: serde_json::Value,
    pub updated_at: String,
}

/// What to run. Exactly one skill; fields that are named by the contract and not built yet are read
/// as [`serde_json::Value`] so that they can be refused by name.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields, default)]
pub struct DispatchRequest {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    #[serde(deserialize_with = "named", skip_serializing_if = "Option::is_none")]
    pub shell: Option<ShellRequest>,
    #[serde(deserialize_with = "named", skip_serializing_if = "Option::is_none")]
    pub echo: Option<EchoRequest>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout_secs: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queue_secs: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub wait_secs: Option<u64>,
    /// What becomes of the task when its node cannot tell how it went, or is away too long: `wait` (the
    /// default) and `fail` let it fail as `lost`, `requeue` runs it again, though it may have run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub on_lost: Option<String>,
    /// Seconds that its node may be away: 3600 with `wait`, 60 with the others; 0 is for ever.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lost_after_secs: Option<u64>,
    /// `permissive` is what there is; `strict` is refused until the cage is built.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sandbox: Option<String>,
    /// `full` is what there is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub network: Option<String>,
    /// Not with `node`.
    #[serde(deserialize_with = "named", skip_serializing_if = "Option::is_none")]
    pub select: Option<SelectView>,
    /// Not started before it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub not_before: Option<String>,
    /// Ended at it, wherever the task is by then.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub deadline: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub priority: Option<i64>,
    #[serde(deserialize_with = "named", skip_serializing_if = "Option::is_none")]
    pub retries: Option<RetriesView>,
    // Named by the contract, not built yet.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub all: Option<serde_json::Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub browser: Option<serde_json::Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub container: Option<serde_json::Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tool: Option<serde_json::Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub agent: Option<serde_json::Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limits: Option<serde_json::Value>,
}

/// A shape by the names of its fields; a list of their values would do as well otherwise.
fn named<'de, D: serde::Deserializer<'de>, T: serde::de::DeserializeOwned>(d: D) -> Result<Option<T>, D::Error> {
    let fields = Option::<serde_json::Map<String, serde_json::Value>>::deserialize(d)?;
    fields.map(|f| T::deserialize(serde_json::Value::Object(f)).map_err(serde::de::Error::custom)).transpose()
}

/// Which nodes will do; every term must hold.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields, default)]
pub struct SelectView {
    /// `null` asks for the key alone.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, Option<String>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub skills: Vec<String>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub slots: BTreeMap<String, u32>,
}
/// How often what failed is run again, and after which first pause.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields, default)]
pub struct RetriesView {
    pub max: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backoff_ms: Option<u64>,
}

/// Exactly one of `argv` and `command`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields, default)]
pub struct ShellRequest {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub argv: Option<Vec<String>>,
    /// Run by `/bin/sh -c`, and judged as a script.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub command: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stdin: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stdin_base64: Option<String>,
    /// Keeps standard input open behind `stdin`: `POST /tasks/{id}/input` feeds it.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub stdin_open: bool,
    /// Not built yet: refused with `not_yet`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pty: Option<serde_json::Value>,
}
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct EchoRequest {
    pub payload: String,
}

/// Live input for a running task.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct InputRequest {
    /// From 1 for each attempt, without gaps; one that was taken before is answered and not written again.
    pub seq: u64,
    /// At most 16 KiB when decoded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data_base64: Option<String>,
    /// Closes standard input behind the data.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eof: Option<bool>,
    /// Not built yet: refused with `not_yet`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resize: Option<serde_json::Value>,
}
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct InputReply {
    /// The highest piece that the task's node has taken.
    pub seq: u64,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ReasonView {
    pub code: String,
    pub detail: String,
}
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ActorView {
    pub user_id: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(nullable = false))]
    pub key_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(nullable = false))]
    pub agent: Option<String>,
    pub door: String,
}
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct SignedView {
    pub key_id: String,
    pub policy_digest: String,
}
/// `stdout`, `stderr` and `result` are absent in lists.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct TaskView {
    pub id: String,
    pub session_id: Option<String>,
    pub node_id: Option<String>,
    pub user_id: String,
    pub actor: ActorView,
    pub signed: Option<SignedView>,
    pub parent_id: Option<String>,
    pub skill: String,
    pub spec: serde_json::Value,
    pub state: String,
    pub reason: Option<ReasonView>,
    pub exit_code: Option<i32>,
    pub signal: Option<i32>,
    /// 1, 2, 3 … per task; 0 before the first.
    pub attempt: u32,
    pub waiting: Option<ReasonView>,
    pub sandbox_applied: Option<String>,
    pub created_at: String,
    pub assigned_at: Option<String>,
    pub started_at: Option<String>,
    pub finished_at: Option<String>,
    pub cancel_requested_at: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(nullable = false))]
    pub stdout: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(nullable = false))]
    pub stderr: Option<String>,
    pub stdout_lossy: bool,
    pub stderr_lossy: bool,
    pub stdout_bytes: u64,
    pub stderr_bytes: u64,
    /// Hex, of all that was written to it, kept or not; null until the end, and where the node cannot tell.
    pub stdout_sha256: Option<String>,
    /// The same of standard error.
    pub stderr_sha256: Option<String>,
    pub truncated: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(nullable = false))]
    pub result: Option<serde_json::Value>,
    // What was asked for besides, where it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(nullable = false))]
    pub select: Option<SelectView>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(nullable = false))]
    pub priority: Option<i32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(nullable = false))]
    pub not_before: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(nullable = false))]
    pub deadline: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(nullable = false))]
    pub retries: Option<RetriesView>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(nullable = false))]
    pub on_lost: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(nullable = false))]
    pub lost_after_secs: Option<u64>,
}
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct TaskEventView {
    pub seq: u64,
    pub at: String,
    #[serde(rename = "type")]
    pub kind: String,
    pub attempt: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(nullable = false))]
    pub state: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(nullable = false))]
    pub node_id: Option<String>,
    pub detail: String,
}

/// SSE event `output`; `id:` is `seq`, with the attempt before it where that is not the first.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct OutputEvent {
    pub seq: u64,
    /// stdout or stderr.
    pub stream: String,
    /// Milliseconds since the attempt's first output.
    pub t_ms: u64,
    pub data_base64: String,
}
/// SSE event `gap`: sequence numbers that are not kept.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct GapEvent {
    pub from: u64,
    pub to: Option<u64>,
    pub reason: String,
}
/// SSE event `attempt`: the task is run again; `seq` begins at 1 anew.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct AttemptEvent {
    pub attempt: u32,
}
/// SSE event `end`: the task in its final state.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct EndEvent {
    pub task: TaskView,
}

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

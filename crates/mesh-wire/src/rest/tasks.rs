//! Tasks, their input and output.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

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
    /// On every node that is online, takes work and fits `select`: a parent task, and a child for each. Not
    /// with `node`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub all: Option<bool>,
    // Named by the contract, not built yet.
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
pub(super) fn named<'de, D: serde::Deserializer<'de>, T: serde::de::DeserializeOwned>(d: D) -> Result<Option<T>, D::Error> {
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
    /// Of the parent of a fan-out alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(nullable = false))]
    pub children: Option<ChildrenView>,
}
/// How the children of a fan-out stand.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ChildrenView {
    pub total: u32,
    /// States that none is in are left out.
    pub by_state: BTreeMap<String, u32>,
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

/// What the JSON-RPC method `task.output` takes.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct TaskOutputRequest {
    pub task_id: String,
    /// How many bytes to leave out: `next_byte` of the part before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from_byte: Option<u64>,
    /// At most 1 MiB; 64 KiB when it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_bytes: Option<u64>,
    /// stdout, stderr or all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stream: Option<String>,
    /// text or base64.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub encoding: Option<String>,
}
/// A part of what a task has put out so far.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct TaskOutputView {
    pub task_id: String,
    /// Whose output it is: another attempt begins at byte 0 anew. 0 before the first.
    pub attempt: u32,
    pub from_byte: u64,
    pub next_byte: u64,
    /// The task has ended, and nothing follows.
    pub end: bool,
    /// Lossy UTF-8, cut on a character.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(nullable = false))]
    pub text: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(nullable = false))]
    pub data_base64: Option<String>,
}

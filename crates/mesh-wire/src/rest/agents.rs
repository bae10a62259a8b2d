//! Agents.

use super::SelectView;
use super::tasks::named;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What to spawn.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct AgentRequest {
    /// One agent of a name lives at a time.
    pub name: String,
    /// `basic` is there until it is killed, and logs its config; `process` runs what its config says.
    pub agent_type: String,
    /// Of a `process`: an AgentConfig. Of a `basic` one: any object.
    #[serde(default)]
    #[cfg_attr(feature = "openapi", schema(value_type = Object))]
    pub config: serde_json::Map<String, serde_json::Value>,
}

/// The config of a `process`: exactly one of `argv` and `command`, and at most one of `node` and `select`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields, default)]
pub struct AgentConfig {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub argv: Option<Vec<String>>,
    /// Run by `/bin/sh -c`, and judged as a script.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub command: Option<String>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
    /// Id or name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    #[serde(deserialize_with = "named", skip_serializing_if = "Option::is_none")]
    pub select: Option<SelectView>,
    /// In whose workspace it runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub session_id: Option<String>,
    #[serde(deserialize_with = "named", skip_serializing_if = "Option::is_none")]
    pub restart: Option<RestartView>,
}

/// When a process is run again.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields, default)]
pub struct RestartView {
    /// `never` (the default), `on_failure`, or `always`.
    pub policy: String,
    /// Restarts in a row; a run that was well for a minute begins the count anew. 0 is without a bound.
    pub max: u32,
    /// The first pause; it doubles, up to five minutes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backoff_ms: Option<u64>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct AgentView {
    pub agent_id: String,
    pub name: String,
    pub agent_type: String,
    pub owner_id: String,
    pub status: String,
    /// How its newest run ended, or why it is not run again.
    pub reason: Option<String>,
    /// Where it runs, or ran last.
    pub node_id: Option<String>,
    /// Of its newest run.
    pub task_id: Option<String>,
    pub session_id: Option<String>,
    /// That were begun.
    pub restarts: u32,
    /// Of a process.
    pub restart: Option<RestartView>,
    pub created_at: String,
    /// Its newest run.
    pub started_at: Option<String>,
    /// When the pause is over.
    pub next_start_at: Option<String>,
    pub ended_at: Option<String>,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields, default)]
pub struct AgentKillRequest {
    /// At once, without time to end by itself.
    pub force: bool,
}

/// Lines of an agent's log, oldest first.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct AgentLogs {
    pub agent_id: String,
    pub logs: Vec<AgentLogLine>,
    /// Lines that were ever written.
    pub total: u64,
    /// The offset of the oldest that is still there.
    pub first: u64,
}

/// A line of an agent's log; also the SSE event `line`, whose `id:` is `seq`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct AgentLogLine {
    /// From 1; its offset is one less, so that the last `seq` of one page is the `offset` of the next.
    pub seq: u64,
    pub at: String,
    /// stdout, stderr, or agent: the supervisor's own words.
    pub stream: String,
    /// Bytes that are no UTF-8 are replaced.
    pub line: String,
    /// The line was too long, and goes on in the next of this stream.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub cut: bool,
}

/// SSE event `end`: the agent as it ended.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct AgentEnd {
    pub agent: AgentView,
}

/// What the JSON-RPC methods `agent.spawn` and `agent.kill` answer.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct AgentReply {
    pub agent_id: String,
    pub status: String,
    /// A sentence for people.
    pub message: String,
}

/// What the JSON-RPC method `agent.list` answers.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct AgentList {
    pub agents: Vec<AgentView>,
    /// Of those that are listed here.
    pub count: u64,
    /// There are more: `cursor` of the next call with the same filters.
    pub next_cursor: Option<String>,
}

/// Which lines the JSON-RPC method `agent.logs` asks for.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct AgentLogsRequest {
    pub agent_id: String,
    /// 1 to 500; 50.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<u32>,
    /// How many lines to pass over, from the first that was ever written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub offset: Option<u64>,
}

/// What the JSON-RPC method `system.metrics` answers.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct MetricsReply {
    /// How many of those that the caller may see are in each status; the others are in none.
    pub agents: BTreeMap<String, u64>,
    /// As `GET /system/stats`, without its history.
    pub system: super::StatsView,
    pub timestamp: String,
}

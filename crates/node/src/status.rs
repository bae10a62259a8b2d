//! What `cortex-node status` shows: written by the daemon at each change, read by anyone.

use crate::state::DataDir;
use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Status {
    pub pid: u32,
    pub version: String,
    pub node_id: String,
    pub node_name: String,
    pub hub_id: String,
    pub hub: String,
    /// `up`, `connecting`, `waiting`, `superseded`, `expired`, `revoked` or `stopped`.
    pub link: String,
    /// Why it is not up, and what happens next.
    pub link_detail: String,
    pub since: String,
    pub certificate_not_after: String,
    pub workspace_root: String,
    pub spool_id: String,
    /// `task/attempt` of what runs.
    pub running: Vec<String>,
    pub max_tasks: u32,
    /// Why the hub gives this node no work, in its own words of last; empty: it does.
    pub unschedulable: String,
    /// Output that is kept until it is durable at the hub.
    pub spool_bytes: u64,
    pub spool_limit: u64,
    /// How far the machine's clock is ahead of the hub's.
    pub clock_skew_secs: i64,
}

impl Status {
    pub fn write(&self, dir: &DataDir) {
        let json = serde_json::to_vec_pretty(self).unwrap_or_default();
        if let Err(error) = mesh_process::files::show_private(&dir.status(), &json) {
            tracing::warn!(%error, "the status file cannot be written");
        }
    }
    pub fn read(dir: &DataDir) -> Option<Self> {
        serde_json::from_slice(&std::fs::read(dir.status()).ok()?).ok()
    }
}

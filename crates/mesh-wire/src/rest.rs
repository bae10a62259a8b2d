//! Shapes of the REST door, `/api/v1`. Times are RFC 3339 in UTC, ids are `prefix_uuid`.
//!
//! Doc comments here are read by users of the API: they become its description. In a reply, a field
//! that has nothing to tell is null; the few that may be absent instead say `nullable = false`.

mod accounts;
mod agents;
mod audit;
mod events;
mod grants;
mod nodes;
mod sessions;
mod state;
mod system;
mod tasks;

pub use accounts::*;
pub use agents::*;
pub use audit::*;
pub use events::*;
pub use grants::*;
pub use nodes::*;
pub use sessions::*;
pub use state::*;
pub use system::*;
pub use tasks::*;

use serde::{Deserialize, Serialize};

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

//! One call of a door that is carried by a request of another: a JSON-RPC method, a tool of MCP.
//!
//! Such a door calls the handlers of [`super::rest`] as plain functions, so that each call exists once: it
//! gives them `State(app)`, the caller, and the extractors around parameters that it read itself.

use super::rest::{App, Refusal, Who, ended};
use axum::http::StatusCode;
use hub_engine::audit;
use mesh_core::permission::Via;

/// Runs one call as `who`, with an audit entry of its own. Several may share a request.
pub async fn run<T>(app: &App, who: &Who, work: impl Future<Output = Result<T, Refusal>>) -> Result<T, Refusal> {
    let via = who.caller().as_person().map_or_else(Via::default, |p| p.via.clone());
    audit::scope(&app.audit, via, work, |done| ended(done.as_ref().map_or_else(|refusal| refusal.status, |_| StatusCode::OK))).await
}

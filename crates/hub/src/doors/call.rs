//! One call of a door that is carried by a request of another: a JSON-RPC method, a tool of MCP.
//!
//! Such a door calls the handlers of [`super::rest`] as plain functions, so that each call exists once: it
//! gives them `State(app)`, the caller, and the extractors around parameters that it read itself.

use super::rest::requests::Asked;
use super::rest::{App, Refusal, Who, ended};
use axum::extract::FromRequestParts;
use axum::http::StatusCode;
use axum::http::request::Parts;
use hub_engine::audit::{self, Ending};
use mesh_core::permission::Via;

/// Finds out who makes the calls of a request. A token that does not count has an audit entry of its own, under the
/// name of this door: the request that carried it may be answered well all the same.
pub async fn caller(app: &App, parts: &mut Parts, door: &'static str) -> Result<Who, Refusal> {
    let asked = parts.extensions.get::<Asked>();
    let (address, request_id) = asked.map_or((None, None), |asked| (asked.address, Some(asked.request_id.clone())));
    let via = Via { door, address, request_id, device: None };
    audit::scope(&app.audit, via, Who::from_request_parts(parts, app), ending).await
}

fn ending<T>(done: &Result<T, Refusal>) -> Ending {
    ended(done.as_ref().map_or_else(|refusal| refusal.status, |_| StatusCode::OK))
}

/// Runs one call as `who`, with an audit entry of its own. Several may share a request.
pub async fn run<T>(app: &App, who: &Who, work: impl Future<Output = Result<T, Refusal>>) -> Result<T, Refusal> {
    let via = who.caller().as_person().map_or_else(Via::default, |p| p.via.clone());
    audit::scope(&app.audit, via, work, ending).await
}

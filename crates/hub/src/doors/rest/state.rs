//! What agents keep.

use super::App;
use super::body::{Body, PathTexts, Query};
use super::page::{cut, exact, window};
use super::problem::Answer;
use super::views;
use super::who::Who;
use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use mesh_core::EntryId;
use mesh_wire::rest::*;
use serde::Deserialize;
use utoipa::IntoParams;

#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct ListQuery {
    limit: Option<u32>,
    cursor: Option<String>,
    /// Of exactly this agent
    agent_id: Option<String>,
    /// With exactly this key
    key: Option<String>,
}

/// Set a key of an agent's state
///
/// An agent belongs to who wrote its first key, until its last key is removed.
#[utoipa::path(
    put, path = "/state/{agent_id}/{key}", tag = "state",
    params(("agent_id" = String, Path), ("key" = String, Path)),
    request_body(content = ValueRequest, example = json!({"value": {"seen": 17}})),
    responses(
        (status = 200, description = "The entry", body = StateEntryView),
        (status = 409, description = "The agent has 10,000 keys (`state_full`); `state_contended`: try again"),
        (status = 422, description = "`bad_name`, `bad_key`; `value_too_large`: more than 256 KiB as JSON"),
    ),
)]
pub async fn put(
    State(app): State<App>,
    who: Who,
    PathTexts(agent, key): PathTexts,
    Body(r): Body<ValueRequest>,
) -> Answer<Json<StateEntryView>> {
    let value = r.value.to_string().into_bytes();
    Ok(Json(views::state_entry(app.state.put(who.caller(), &agent, &key, value).await?)))
}

/// An entry of an agent's state
#[utoipa::path(
    get, path = "/state/{agent_id}/{key}", tag = "state",
    params(("agent_id" = String, Path), ("key" = String, Path)),
    responses((status = 200, description = "The entry", body = StateEntryView)),
)]
pub async fn get(State(app): State<App>, who: Who, PathTexts(agent, key): PathTexts) -> Answer<Json<StateEntryView>> {
    Ok(Json(views::state_entry(app.state.get(who.caller(), &agent, &key).await?)))
}

/// Entries of agents' states
///
/// A page ends early at 8 MiB.
#[utoipa::path(
    get, path = "/state", tag = "state",
    params(ListQuery),
    responses((status = 200, description = "A page", body = Page<StateEntryView>)),
)]
pub async fn list(State(app): State<App>, who: Who, Query(q): Query<ListQuery>) -> Answer<Json<Page<StateEntryView>>> {
    let filters = format!("state {:?} {:?}", q.agent_id, q.key);
    let w = window(q.limit, q.cursor.as_deref(), &filters, EntryId::from_bytes)?;
    let found = app.state.list(who.caller(), q.agent_id, q.key, exact(w)).await?;
    Ok(Json(cut(found, &filters, |e| *e.id.as_bytes(), views::state_entry)))
}

/// Remove a key from an agent's state
#[utoipa::path(
    delete, path = "/state/{agent_id}/{key}", tag = "state",
    params(("agent_id" = String, Path), ("key" = String, Path)),
    responses((status = 204, description = "Gone")),
)]
pub async fn remove(State(app): State<App>, who: Who, PathTexts(agent, key): PathTexts) -> Answer<StatusCode> {
    app.state.remove(who.caller(), &agent, &key).await?;
    Ok(StatusCode::NO_CONTENT)
}

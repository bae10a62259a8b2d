//! What sessions remember.

use super::App;
use super::body::{Body, PathId, PathTexts, Query};
use super::page::{PlainList, page, window};
use super::problem::Answer;
use super::sessions::session_id;
use super::views;
use super::who::Who;
use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use mesh_core::{EntryId, SessionId};
use mesh_wire::rest::*;

/// Set a key of a session's memory
#[utoipa::path(
    put, path = "/sessions/{id}/memory/{key}", tag = "memory",
    params(("key" = String, Path)),
    request_body(content = ValueRequest, example = json!({"value": {"branch": "main"}})),
    responses(
        (status = 200, description = "The entry", body = MemoryEntryView),
        (status = 409, description = "The session has ended (`session_ended`), or has 1,000 keys (`memory_full`)"),
        (status = 422, description = "`bad_key`; `value_too_large`: more than 256 KiB as JSON"),
    ),
)]
pub async fn put(
    State(app): State<App>,
    who: Who,
    PathTexts(session, key): PathTexts,
    Body(r): Body<ValueRequest>,
) -> Answer<Json<MemoryEntryView>> {
    let value = r.value.to_string().into_bytes();
    Ok(Json(views::memory_entry(app.memory.put(who.caller(), session_id(&session)?, &key, value).await?)))
}

/// An entry of a session's memory
#[utoipa::path(
    get, path = "/sessions/{id}/memory/{key}", tag = "memory",
    params(("key" = String, Path)),
    responses((status = 200, description = "The entry", body = MemoryEntryView)),
)]
pub async fn get(State(app): State<App>, who: Who, PathTexts(session, key): PathTexts) -> Answer<Json<MemoryEntryView>> {
    Ok(Json(views::memory_entry(app.memory.get(who.caller(), session_id(&session)?, &key).await?)))
}

/// The keys of a session's memory
#[utoipa::path(
    get, path = "/sessions/{id}/memory", tag = "memory",
    params(PlainList),
    responses((status = 200, description = "A page, without values", body = Page<MemoryKeyView>)),
)]
pub async fn list(
    State(app): State<App>,
    who: Who,
    PathId(id): PathId<SessionId>,
    Query(q): Query<PlainList>,
) -> Answer<Json<Page<MemoryKeyView>>> {
    let filters = format!("memory {id}");
    let w = window(q.limit, q.cursor.as_deref(), &filters, EntryId::from_bytes)?;
    let found = app.memory.keys(who.caller(), id, w).await?;
    Ok(Json(page(found, w.limit, &filters, |k| *k.id.as_bytes(), views::memory_key)))
}

/// Remove a key from a session's memory
#[utoipa::path(
    delete, path = "/sessions/{id}/memory/{key}", tag = "memory",
    params(("key" = String, Path)),
    responses((status = 204, description = "Gone"), (status = 409, description = "The session has ended (`session_ended`)")),
)]
pub async fn remove(State(app): State<App>, who: Who, PathTexts(session, key): PathTexts) -> Answer<StatusCode> {
    app.memory.remove(who.caller(), session_id(&session)?, &key).await?;
    Ok(StatusCode::NO_CONTENT)
}

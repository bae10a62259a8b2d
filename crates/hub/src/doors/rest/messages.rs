//! Messages in sessions.

use super::App;
use super::body::{Body, PathId, Query};
use super::page::{PlainList, cut, exact, window};
use super::problem::Answer;
use super::views;
use super::who::Who;
use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use mesh_core::{MessageId, SessionId};
use mesh_wire::rest::*;

/// Post a message
#[utoipa::path(
    post, path = "/sessions/{id}/messages", tag = "messages",
    request_body(content = MessageRequest, example = json!({"role": "user", "content": "Build it, please."})),
    responses(
        (status = 201, description = "The message", body = MessageView),
        (status = 409, description = "The session has ended (`session_ended`)"),
        (status = 422, description = "`bad_role`; `content_too_large`: more than 1 MiB"),
    ),
)]
pub async fn post(
    State(app): State<App>,
    who: Who,
    PathId(id): PathId<SessionId>,
    Body(r): Body<MessageRequest>,
) -> Answer<(StatusCode, Json<MessageView>)> {
    let message = app.messages.post(who.caller(), id, &r.role, r.content).await?;
    Ok((StatusCode::CREATED, Json(views::message(message))))
}

/// Messages of a session
///
/// A page ends early at 8 MiB.
#[utoipa::path(
    get, path = "/sessions/{id}/messages", tag = "messages",
    params(PlainList),
    responses((status = 200, description = "A page", body = Page<MessageView>)),
)]
pub async fn list(
    State(app): State<App>,
    who: Who,
    PathId(id): PathId<SessionId>,
    Query(q): Query<PlainList>,
) -> Answer<Json<Page<MessageView>>> {
    let filters = format!("messages {id}");
    let w = window(q.limit, q.cursor.as_deref(), &filters, MessageId::from_bytes)?;
    let found = app.messages.list(who.caller(), id, exact(w)).await?;
    Ok(Json(cut(found, &filters, |m| *m.id.as_bytes(), views::message)))
}

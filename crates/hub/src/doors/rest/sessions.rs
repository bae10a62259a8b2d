//! Sessions and what is attached to them.

use super::App;
use super::body::{Body, Creating, OptionalBody, PathId, PathTexts, Query};
use super::page::{PlainList, page, window};
use super::problem::{Answer, Refusal};
use super::views;
use super::who::Who;
use axum::Json;
use axum::extract::State;
use axum::http::{HeaderName, StatusCode, header};
use hub_engine::records::Place;
use mesh_core::{EntryId, NodeId, SessionId};
use mesh_wire::rest::*;

type Created = (StatusCode, [(HeaderName, String); 1], Json<SessionView>);

/// Make a session
#[utoipa::path(
    post, path = "/sessions", tag = "sessions",
    params(("Idempotency-Key" = Option<String>, Header)),
    request_body(content = SessionRequest, example = json!({"name": "build"})),
    responses(
        (status = 201, description = "Made", body = SessionView, headers(("location" = String, description = "Where it is"))),
        (status = 422, description = "A name or time that cannot be; `idempotency_mismatch`"),
    ),
)]
pub async fn create(State(app): State<App>, who: Who, asked: Creating<SessionRequest>) -> Answer<Created> {
    let (r, keyed) = asked.split(&app, &who);
    let s = app.sessions.create(who.caller(), &r.name, r.ttl_secs, keyed).await?;
    let location = [(header::LOCATION, format!("/api/v1/sessions/{}", s.id))];
    Ok((StatusCode::CREATED, location, Json(views::session(s))))
}

/// Sessions that the caller may see
#[utoipa::path(
    get, path = "/sessions", tag = "sessions",
    params(PlainList),
    responses((status = 200, description = "A page", body = Page<SessionView>)),
)]
pub async fn list(State(app): State<App>, who: Who, Query(q): Query<PlainList>) -> Answer<Json<Page<SessionView>>> {
    let w = window(q.limit, q.cursor.as_deref(), "sessions", SessionId::from_bytes)?;
    let found = app.sessions.list(who.caller(), w).await?;
    Ok(Json(page(found, w.limit, "sessions", |s| *s.id.as_bytes(), views::session)))
}

/// A session
#[utoipa::path(get, path = "/sessions/{id}", tag = "sessions", responses((status = 200, description = "The session", body = SessionView)))]
pub async fn get(State(app): State<App>, who: Who, PathId(id): PathId<SessionId>) -> Answer<Json<SessionView>> {
    let s = app.sessions.get(who.caller(), id).await?;
    Ok(Json(views::session(s)))
}

/// Close a session
///
/// Its tasks end as `cancelled` with the reason `session_closed`.
#[utoipa::path(delete, path = "/sessions/{id}", tag = "sessions", responses((status = 204, description = "Closed")))]
pub async fn close(State(app): State<App>, who: Who, PathId(id): PathId<SessionId>) -> Answer<StatusCode> {
    app.tasks.close_session(who.caller(), id).await?;
    Ok(StatusCode::NO_CONTENT)
}

pub(super) fn session_id(text: &str) -> Answer<SessionId> {
    text.parse().map_err(|e: mesh_core::BadId| Refusal::new(StatusCode::NOT_FOUND, "not_found", e))
}

/// Attach a node
///
/// The body is optional: `{}` or nothing attaches a new folder.
#[utoipa::path(
    put, path = "/sessions/{id}/nodes/{node_id}", tag = "sessions",
    params(("node_id" = String, Path, description = "An id or a name")),
    request_body = Option<AttachRequest>,
    responses(
        (status = 200, description = "Attached", body = SessionView),
        (status = 409, description = "The session has ended, or the node was revoked"),
        (status = 422, description = "`path` is not built yet"),
    ),
)]
pub async fn attach(
    State(app): State<App>,
    who: Who,
    PathTexts(session, node): PathTexts,
    OptionalBody(r): OptionalBody<AttachRequest>,
) -> Answer<Json<SessionView>> {
    if r.path.is_some() {
        return Err(Refusal::not_yet("attaching an existing folder (path)"));
    }
    let s = app.sessions.attach(who.caller(), session_id(&session)?, &node).await?;
    Ok(Json(views::session(s)))
}

/// Detach a node
#[utoipa::path(
    delete, path = "/sessions/{id}/nodes/{node_id}", tag = "sessions",
    params(("node_id" = String, Path, description = "The id of the node")),
    responses((status = 204, description = "Detached"), (status = 409, description = "The session has ended")),
)]
pub async fn detach(State(app): State<App>, who: Who, PathTexts(session, node): PathTexts) -> Answer<StatusCode> {
    let node: NodeId = node.parse().map_err(|e: mesh_core::BadId| Refusal::new(StatusCode::NOT_FOUND, "not_found", e))?;
    app.sessions.detach(who.caller(), session_id(&session)?, node).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Change a session
///
/// What is left out stays; `expires_at` counts from now.
#[utoipa::path(
    patch, path = "/sessions/{id}", tag = "sessions",
    request_body(content = SessionPatch, example = json!({"name": "nightly", "ttl_secs": 86400})),
    responses(
        (status = 200, description = "The session", body = SessionView),
        (status = 409, description = "The session has ended (`session_ended`)"),
        (status = 422, description = "A name or time that cannot be"),
    ),
)]
pub async fn change(
    State(app): State<App>,
    who: Who,
    PathId(id): PathId<SessionId>,
    Body(r): Body<SessionPatch>,
) -> Answer<Json<SessionView>> {
    Ok(Json(views::session(app.sessions.change(who.caller(), id, r.name, r.ttl_secs).await?)))
}

/// Erase what an ended session held
///
/// Memory, messages, activity, and the kept output and results of its tasks. Again is the same as once.
#[utoipa::path(
    post, path = "/sessions/{id}/purge", tag = "sessions",
    responses(
        (status = 200, description = "The session", body = SessionView),
        (status = 409, description = "It is active (`session_active`), or a task of it has not ended (`tasks_open`)"),
    ),
)]
pub async fn purge(State(app): State<App>, who: Who, PathId(id): PathId<SessionId>) -> Answer<Json<SessionView>> {
    Ok(Json(views::session(app.expiry.purge(who.caller(), id).await?)))
}

/// What happened in a session
///
/// Contents and values are not in it.
#[utoipa::path(
    get, path = "/sessions/{id}/activity", tag = "sessions",
    params(PlainList),
    responses((status = 200, description = "A page", body = Page<ActivityView>)),
)]
pub async fn activity(
    State(app): State<App>,
    who: Who,
    PathId(id): PathId<SessionId>,
    Query(q): Query<PlainList>,
) -> Answer<Json<Page<ActivityView>>> {
    let filters = format!("activity {id}");
    let w = window(q.limit, q.cursor.as_deref(), &filters, place)?;
    let found = app.sessions.activity(who.caller(), id, w.before, w.limit).await?;
    Ok(Json(page(found, w.limit, &filters, |a| place_bytes(a.place), views::activity)))
}

/// Where a page of activity ended, as its cursor holds it.
fn place(bytes: [u8; 17]) -> Place {
    let mut id = [0; 16];
    id.copy_from_slice(&bytes[..16]);
    Place(EntryId::from_bytes(id), bytes[16])
}

fn place_bytes(place: Place) -> [u8; 17] {
    let mut bytes = [place.1; 17];
    bytes[..16].copy_from_slice(place.0.as_bytes());
    bytes
}

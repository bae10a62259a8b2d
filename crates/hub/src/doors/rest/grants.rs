//! What is shared with others.

use super::App;
use super::body::{Creating, PathId, Query};
use super::page::{PlainList, page, window};
use super::problem::{Answer, Refusal};
use super::who::Who;
use axum::Json;
use axum::extract::State;
use axum::http::{HeaderName, StatusCode, header};
use hub_engine::grants::{NewGrant, On};
use hub_engine::records::{Grant, Resource, Subject};
use mesh_core::GrantId;
use mesh_wire::convert::{parse_rfc3339, rfc3339};
use mesh_wire::rest::*;

/// Share something
///
/// A node, session or agent by its owner or an admin; nodes by their labels, now and later, by an admin alone. Nobody
/// grants what they may not do there themselves.
#[utoipa::path(
    post, path = "/grants", tag = "grants",
    params(("Idempotency-Key" = Option<String>, Header)),
    request_body(
        content = GrantRequest,
        example = json!({"subject": "guest", "resource": {"labels": {"zone": "lab"}}, "permissions": ["nodes:read", "tasks:dispatch"]}),
    ),
    responses(
        (status = 201, description = "Made", body = GrantView),
        (status = 404, description = "There is no such user, node, session or agent, or the caller may not see it"),
        (status = 409, description = "`grants_full`: the subject has 1,000 grants; `node_revoked`, `session_purged`"),
        (status = 422, description = "`bad_permission`: none, or one that cannot be granted; `bad_subject`: oneself; `bad_label`, `bad_time`; `idempotency_mismatch`"),
    ),
)]
pub async fn create(
    State(app): State<App>,
    who: Who,
    asked: Creating<GrantRequest>,
) -> Answer<(StatusCode, [(HeaderName, String); 1], Json<GrantView>)> {
    let (r, keyed) = asked.split(&app, &who);
    let expires_at = r.expires_at.as_deref().map(parse_rfc3339).transpose().map_err(|e| Refusal::unprocessable("bad_time", e))?;
    let resource = match r.resource {
        GrantResource::One(text) => On::One(text),
        GrantResource::Labels(l) => On::Labels(l.labels),
    };
    let new = NewGrant { subject: r.subject, resource, permissions: r.permissions, expires_at };
    let made = app.grants.create(who.caller(), new, keyed).await?;
    let location = [(header::LOCATION, format!("/api/v1/grants/{}", made.id))];
    Ok((StatusCode::CREATED, location, Json(view(made))))
}

/// Grants that the caller made, and those made to them
///
/// An admin sees all. What has expired is gone.
#[utoipa::path(
    get, path = "/grants", tag = "grants",
    params(PlainList),
    responses((status = 200, description = "A page", body = Page<GrantView>)),
)]
pub async fn list(State(app): State<App>, who: Who, Query(q): Query<PlainList>) -> Answer<Json<Page<GrantView>>> {
    let w = window(q.limit, q.cursor.as_deref(), "grants", GrantId::from_bytes)?;
    let found = app.grants.list(who.caller(), w).await?;
    Ok(Json(page(found, w.limit, "grants", |g| *g.id.as_bytes(), view)))
}

/// Take a grant back
///
/// By who made it, who owns the thing, or an admin. What waits is not started there any more; what runs goes on.
#[utoipa::path(delete, path = "/grants/{id}", tag = "grants", responses((status = 204, description = "Gone")))]
pub async fn remove(State(app): State<App>, who: Who, PathId(id): PathId<GrantId>) -> Answer<StatusCode> {
    app.grants.remove(who.caller(), id).await?;
    Ok(StatusCode::NO_CONTENT)
}

fn view(g: Grant) -> GrantView {
    GrantView {
        id: g.id.to_string(),
        subject: match g.subject {
            Subject::User(id) => id.to_string(),
            Subject::Role(role) => role.as_str().to_owned(),
        },
        resource: match g.resource {
            Resource::Node(id) => GrantResource::One(id.to_string()),
            Resource::Session(id) => GrantResource::One(id.to_string()),
            Resource::Agent(name) => GrantResource::One(name),
            Resource::Labels(labels) => GrantResource::Labels(GrantLabels { labels }),
        },
        permissions: g.permissions.iter().map(|p| p.as_str().to_owned()).collect(),
        created_by: g.created_by.to_string(),
        created_at: rfc3339(g.created_at),
        expires_at: g.expires_at.map(rfc3339),
    }
}

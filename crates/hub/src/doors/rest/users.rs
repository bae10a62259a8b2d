//! People: added or invited, changed, removed.

use super::App;
use super::accounts::{LoginQuery, handed, login_from};
use super::body::{Body, Creating, PathId, Query};
use super::page::{PlainList, page, window};
use super::problem::{Answer, Refusal};
use super::requests::Asked;
use super::views;
use super::who::{ADMIN, Who};
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, Uri};
use axum::{Extension, Json};
use hub_engine::leaving::Will;
use hub_engine::users::{Change, Told};
use mesh_core::UserId;
use mesh_wire::rest::*;
use serde::Deserialize;
use utoipa::IntoParams;

/// People
///
/// Without those who were removed. Only who administers the hub may see them.
#[utoipa::path(get, path = "/users", tag = "users", params(PlainList), responses((status = 200, description = "A page", body = Page<UserView>)))]
pub async fn list(State(app): State<App>, who: Who, Query(q): Query<PlainList>) -> Answer<Json<Page<UserView>>> {
    let w = window(q.limit, q.cursor.as_deref(), "users", UserId::from_bytes)?;
    let found = app.users.list(who.caller(), w).await?;
    let now = app.clock.now_ms();
    Ok(Json(page(found, w.limit, "users", |u| *u.id.as_bytes(), |u| views::user(u, now))))
}

/// One person
///
/// Also one who was removed, whom history names.
#[utoipa::path(get, path = "/users/{id}", tag = "users", responses((status = 200, description = "The person", body = UserView)))]
pub async fn get(State(app): State<App>, who: Who, PathId(id): PathId<UserId>) -> Answer<Json<UserView>> {
    let user = app.users.get(who.caller(), id).await?;
    Ok(Json(views::user(user, app.clock.now_ms())))
}

/// Add a person
///
/// With a password they can log in at once. Without one they are invited: the answer has an `invite_url`, told
/// once and good for 24 hours, by which they choose one.
#[utoipa::path(
    post, path = "/users", tag = "users",
    request_body(content = UserRequest, example = json!({"username": "ada", "role": "developer"})),
    params(("Idempotency-Key" = Option<String>, Header)),
    responses(
        (status = 201, description = "Added", body = UserView),
        (status = 409, description = "The name is taken (`name_taken`); the `Idempotency-Key` has invited somebody before, whose link was told once (`already_created`)"),
        (status = 422, description = "`bad_name`, `bad_role`, `bad_password`; `idempotency_mismatch`"),
    ),
)]
pub async fn create(State(app): State<App>, who: Who, asked: Creating<UserRequest>) -> Answer<(StatusCode, Json<UserView>)> {
    let (r, keyed) = asked.split(&app, &who);
    let made = app.users.create(who.caller(), &r.username, r.password, &r.role, keyed).await?;
    Ok((StatusCode::CREATED, Json(told(&app, made))))
}

/// Change a person
///
/// Everybody may rename themselves with their own log-in; all else is for who administers the hub.
#[utoipa::path(
    patch, path = "/users/{id}", tag = "users",
    request_body(content = UserPatch, example = json!({"role": "viewer"})),
    responses(
        (status = 200, description = "The person", body = UserView),
        (status = 409, description = "`name_taken`; nobody would be left to administer the hub (`last_admin`); who has a password needs no invite (`has_password`)"),
        (status = 422, description = "`bad_name`, `bad_role`, `bad_password`, `bad_field`, `nothing_to_change`"),
    ),
)]
pub async fn change(State(app): State<App>, who: Who, PathId(id): PathId<UserId>, Body(r): Body<UserPatch>) -> Answer<Json<UserView>> {
    let sets_password = r.password.is_some();
    let change = Change { username: r.username, role: r.role, disabled: r.disabled, password: r.password, invite: r.invite == Some(true) };
    let changed = app.users.change(who.caller(), id, change).await?;
    if sets_password && changed.user.username.as_deref() == Some(ADMIN) {
        // The file holds the password that was made at the first start, which counts no more.
        let _ = std::fs::remove_file(&app.facts.made_password_file);
    }
    Ok(Json(told(&app, changed)))
}

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct Removing {
    /// Who is to have their machines, sessions and agents: an active admin or developer. Else the caller
    transfer_to: Option<String>,
    /// What becomes of work of theirs that runs: `finish` or `cancel`. Else it finishes; what waits is cancelled
    work: Option<String>,
    /// Erases what tells who they were
    purge: Option<bool>,
}

/// Remove a person
///
/// Their log-ins and keys end at once, the invites of machines that they made are revoked. Tasks keep their
/// history. Of one who was removed before, `purge=true` still erases what tells who they were.
#[utoipa::path(
    delete, path = "/users/{id}", tag = "users",
    params(Removing),
    responses(
        (status = 204, description = "Removed"),
        (status = 409, description = "Nobody would be left to administer the hub (`last_admin`); the hub holds back after a restore"),
        (status = 422, description = "Nobody who can have what they own (`bad_successor`); `bad_work`"),
    ),
)]
pub async fn remove(State(app): State<App>, who: Who, PathId(id): PathId<UserId>, Query(q): Query<Removing>) -> Answer<StatusCode> {
    let transfer_to = q.transfer_to.as_deref().map(str::parse).transpose();
    let transfer_to = transfer_to.map_err(|e| Refusal::unprocessable("bad_successor", format!("transfer_to is the id of a user: {e}")))?;
    let cancel = match q.work.as_deref() {
        None | Some("finish") => false,
        Some("cancel") => true,
        Some(other) => return Err(Refusal::unprocessable("bad_work", format!("work is finish or cancel, not {other:?}"))),
    };
    app.departures.remove(who.caller(), id, Will { transfer_to, cancel, purge: q.purge == Some(true) }).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Accept an invite
///
/// Sets the password of who was invited and answers as a log-in. The token is what follows the `#` of the link.
#[utoipa::path(
    post, path = "/auth/accept", tag = "auth",
    security(()), params(LoginQuery),
    request_body = AcceptRequest,
    responses(
        (status = 200, description = "Logged in", body = LoginReply),
        (status = 403, description = "`cookie=true` from a page of another origin (`foreign_origin`)"),
        (status = 401, description = "The invite is unknown, was used or has expired"),
        (status = 422, description = "Not 12 to 256 characters (`bad_password`); the invite can still be used"),
    ),
)]
pub async fn accept(
    State(app): State<App>,
    Extension(asked): Extension<Asked>,
    Query(q): Query<LoginQuery>,
    uri: Uri,
    headers: HeaderMap,
    Body(r): Body<AcceptRequest>,
) -> Answer<(HeaderMap, Json<LoginReply>)> {
    let by_cookie = q.by_cookie(&app, &headers, &uri)?;
    let given = app.users.accept(&r.token, r.password, login_from(&asked, &headers, r.device_name)).await?;
    Ok(handed(&app, given, by_cookie))
}

fn told(app: &App, told: Told) -> UserView {
    let invite_url = told.invite.map(|token| format!("{}/accept#{token}", app.facts.public_url));
    UserView { invite_url, ..views::user(told.user, app.clock.now_ms()) }
}

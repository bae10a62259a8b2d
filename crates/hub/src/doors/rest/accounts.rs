//! Log-in and keys.

use super::App;
use super::body::{Body, Creating, PathId, Query};
use super::page::{PlainList, page, window};
use super::problem::{Answer, Refusal};
use super::views;
use super::who::{ADMIN, Who};
use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use hub_engine::accounts::Tokens;
use mesh_core::ApiKeyId;
use mesh_core::name::{MAX_CHARS, is_deceptive};
use mesh_wire::convert::parse_rfc3339;
use mesh_wire::rest::*;
use serde::Deserialize;
use utoipa::IntoParams;

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct LoginQuery {
    /// Not built yet: refused with `not_yet`
    cookie: Option<bool>,
}

/// Log in
///
/// Gives a short-lived access token, and a refresh token for the next one.
#[utoipa::path(
    post, path = "/auth/login", tag = "auth",
    security(()), params(LoginQuery),
    request_body(content = LoginRequest, example = json!({"username": "admin", "password": "correct horse battery"})),
    responses(
        (status = 200, description = "Logged in", body = TokenReply),
        (status = 401, description = "Wrong name or password"),
        (status = 501, description = "`cookie=true` is not built yet"),
    ),
)]
pub async fn login(State(app): State<App>, Query(q): Query<LoginQuery>, Body(r): Body<LoginRequest>) -> Answer<Json<TokenReply>> {
    if q.cookie == Some(true) {
        return Err(Refusal::new(StatusCode::NOT_IMPLEMENTED, "not_yet", "log-in by cookie is not built yet"));
    }
    let given = app.accounts.login(&r.username, r.password).await?;
    // Until devices are kept, the log is where a person's log-ins can be told apart.
    let device: String = r.device_name.unwrap_or_default().chars().filter(|c| !is_deceptive(*c)).take(MAX_CHARS).collect();
    tracing::info!(username = ?r.username, ?device, "log-in");
    Ok(Json(tokens(given)))
}

/// Renew a log-in
///
/// A refresh token works once; one that was used before ends its whole family.
#[utoipa::path(
    post, path = "/auth/refresh", tag = "auth",
    security(()), request_body = RefreshRequest,
    responses((status = 200, description = "New tokens", body = TokenReply), (status = 401, description = "Unknown, used, expired or ended")),
)]
pub async fn refresh(State(app): State<App>, Body(r): Body<RefreshRequest>) -> Answer<Json<TokenReply>> {
    Ok(Json(tokens(app.accounts.refresh(&r.refresh_token).await?)))
}

fn tokens(t: Tokens) -> TokenReply {
    TokenReply { access_token: t.access, refresh_token: t.refresh, expires_in: t.expires_in, token_type: "Bearer".into() }
}

/// Log out
///
/// Ends the log-in of the token that was used. With an API key there is nothing to end.
#[utoipa::path(post, path = "/auth/logout", tag = "auth", responses((status = 204, description = "Ended")))]
pub async fn logout(State(app): State<App>, who: Who) -> Answer<StatusCode> {
    if let Some(login) = who.authenticated.login {
        app.accounts.logout(who.caller(), login).await?;
    }
    Ok(StatusCode::NO_CONTENT)
}

/// Who is calling, and what may they do
#[utoipa::path(get, path = "/auth/me", tag = "auth", responses((status = 200, description = "The caller", body = MeReply)))]
pub async fn me(State(app): State<App>, who: Who) -> Answer<Json<MeReply>> {
    let (user, permissions) = app.accounts.me(who.caller()).await?;
    Ok(Json(MeReply {
        role: user.role.as_str().into(),
        permissions: permissions.iter().map(|p| p.as_str().to_owned()).collect(),
        user: UserView { id: user.id.to_string(), username: user.username },
    }))
}

/// Change the own password
///
/// Ends all other log-ins. A key cannot do this.
#[utoipa::path(
    post, path = "/auth/password", tag = "auth",
    request_body = PasswordRequest,
    responses((status = 204, description = "Changed"), (status = 422, description = "Not 12 to 256 characters")),
)]
pub async fn change_password(State(app): State<App>, who: Who, Body(r): Body<PasswordRequest>) -> Answer<StatusCode> {
    app.accounts.change_password(&who.authenticated, r.current_password, r.new_password).await?;
    let (user, _) = app.accounts.me(who.caller()).await?;
    if user.username == ADMIN {
        // The file held the password that was made at the first start, and is of no more use.
        let _ = std::fs::remove_file(&app.facts.made_password_file);
    }
    Ok(StatusCode::NO_CONTENT)
}

/// Make a key
///
/// The secret is told in this answer alone. A key cannot make keys.
#[utoipa::path(
    post, path = "/api-keys", tag = "api-keys",
    request_body(content = ApiKeyRequest, example = json!({"name": "ci", "scopes": ["tasks:dispatch", "tasks:read"]})),
    params(("Idempotency-Key" = Option<String>, Header)),
    responses(
        (status = 201, description = "Made", body = ApiKeyView),
        (status = 409, description = "The `Idempotency-Key` has made a key before, whose secret was told once (`already_created`)"),
        (status = 422, description = "A name, scope or time that cannot be; `idempotency_mismatch`"),
    ),
)]
pub async fn create_key(State(app): State<App>, who: Who, asked: Creating<ApiKeyRequest>) -> Answer<(StatusCode, Json<ApiKeyView>)> {
    let (r, keyed) = asked.split(&app, &who);
    let expires_at = r.expires_at.as_deref().map(parse_rfc3339).transpose();
    let expires_at = expires_at.map_err(|e| Refusal::unprocessable("bad_time", e))?;
    let made = app.accounts.create_key(who.caller(), &r.name, &r.scopes, expires_at, keyed).await?;
    let mut view = views::api_key(made.key);
    view.secret = Some(made.secret);
    Ok((StatusCode::CREATED, Json(view)))
}

/// The own keys
#[utoipa::path(
    get, path = "/api-keys", tag = "api-keys",
    params(PlainList),
    responses((status = 200, description = "A page", body = Page<ApiKeyView>)),
)]
pub async fn list_keys(State(app): State<App>, who: Who, Query(q): Query<PlainList>) -> Answer<Json<Page<ApiKeyView>>> {
    let w = window(q.limit, q.cursor.as_deref(), "keys", ApiKeyId::from_bytes)?;
    let found = app.accounts.keys(who.caller(), w).await?;
    Ok(Json(page(found, w.limit, "keys", |k| *k.id.as_bytes(), views::api_key)))
}

/// Remove a key
#[utoipa::path(delete, path = "/api-keys/{id}", tag = "api-keys", responses((status = 204, description = "Gone")))]
pub async fn remove_key(State(app): State<App>, who: Who, PathId(id): PathId<ApiKeyId>) -> Answer<StatusCode> {
    app.accounts.remove_key(who.caller(), id).await?;
    Ok(StatusCode::NO_CONTENT)
}

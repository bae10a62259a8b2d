//! Log-in and keys.

use super::App;
use super::body::{Body, Creating, OptionalBody, PathId, Query};
use super::cookie::{self, Cookie};
use super::origin;
use super::page::{PlainList, page, window};
use super::problem::{Answer, Refusal};
use super::requests::Asked;
use super::views;
use super::who::{ADMIN, Who};
use axum::extract::State;
use axum::http::{HeaderMap, Method, StatusCode, Uri, header};
use axum::{Extension, Json};
use hub_engine::accounts::Tokens;
use hub_engine::devices::LoginFrom;
use mesh_core::ApiKeyId;
use mesh_wire::convert::parse_rfc3339;
use mesh_wire::rest::*;
use serde::Deserialize;
use utoipa::IntoParams;

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct LoginQuery {
    /// For pages: the tokens go into a cookie that no script can read, and the answer is CookieReply
    cookie: Option<bool>,
}

impl LoginQuery {
    /// Does a page log in, which must be the hub's own?
    pub(super) fn by_cookie(&self, app: &App, headers: &HeaderMap, uri: &Uri) -> Answer<bool> {
        let by_cookie = self.cookie == Some(true);
        if by_cookie && origin::given(headers, uri, &app.facts.public_url) == origin::Given::Foreign {
            return Err(Refusal::new(StatusCode::FORBIDDEN, "foreign_origin", "a page of another origin may not log in here"));
        }
        Ok(by_cookie)
    }
}

/// Log in
///
/// Gives a short-lived access token, and a refresh token for the next one. With `cookie=true` both are in the
/// cookie `__Host-cortex`; then each call that is not GET or HEAD needs `X-CSRF-Token` and the hub's own `Origin`.
#[utoipa::path(
    post, path = "/auth/login", tag = "auth",
    security(()), params(LoginQuery),
    request_body(content = LoginRequest, example = json!({"username": "admin", "password": "correct horse battery"})),
    responses(
        (status = 200, description = "Logged in", body = LoginReply),
        (status = 401, description = "Wrong name or password"),
        (status = 403, description = "`cookie=true` from a page of another origin (`foreign_origin`)"),
    ),
)]
pub async fn login(
    State(app): State<App>,
    Extension(asked): Extension<Asked>,
    Query(q): Query<LoginQuery>,
    uri: Uri,
    headers: HeaderMap,
    Body(r): Body<LoginRequest>,
) -> Answer<(HeaderMap, Json<LoginReply>)> {
    let by_cookie = q.by_cookie(&app, &headers, &uri)?;
    let given = app.accounts.login(&r.username, r.password, login_from(&asked, &headers, r.device_name)).await?;
    Ok(handed(&app, given, by_cookie))
}

/// What a log-in is told apart by.
pub(super) fn login_from(asked: &Asked, headers: &HeaderMap, name: Option<String>) -> LoginFrom {
    let user_agent = headers.get(header::USER_AGENT).map(|v| String::from_utf8_lossy(v.as_bytes()).into_owned());
    LoginFrom { name, user_agent, address: asked.address }
}

/// Tokens in the answer, or in the cookie alone.
pub(super) fn handed(app: &App, t: Tokens, by_cookie: bool) -> (HeaderMap, Json<LoginReply>) {
    if by_cookie {
        let reply = CookieReply { csrf_token: cookie::csrf_token(app, t.login), expires_in: t.expires_in };
        return (cookie::given(app, &t), Json(LoginReply::Cookie(reply)));
    }
    let reply = TokenReply { access_token: t.access, refresh_token: t.refresh, expires_in: t.expires_in, token_type: "Bearer".into() };
    (HeaderMap::new(), Json(LoginReply::Tokens(reply)))
}

/// Renew a log-in
///
/// A refresh token works once; one that was used before ends its whole family. A page leaves it out: the one
/// in its cookie counts.
#[utoipa::path(
    post, path = "/auth/refresh", tag = "auth",
    security(()), request_body = Option<RefreshRequest>,
    responses(
        (status = 200, description = "New tokens", body = LoginReply),
        (status = 401, description = "Unknown, used, expired or ended"),
        (status = 403, description = "By cookie without `X-CSRF-Token` or the hub's own `Origin`"),
    ),
)]
pub async fn refresh(
    State(app): State<App>,
    Extension(asked): Extension<Asked>,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
    OptionalBody(r): OptionalBody<RefreshRequest>,
) -> Answer<(HeaderMap, Json<LoginReply>)> {
    if let Some(token) = r.refresh_token {
        let given = app.accounts.refresh(&token, asked.address).await?;
        return Ok(handed(&app, given, false));
    }
    let Some(cookie) = Cookie::of(&headers) else {
        let missing = "give refresh_token, or the cookie of a log-in";
        return Err(hub_engine::Error::Unauthenticated(missing).into());
    };
    let login = cookie.login(&app).ok_or(hub_engine::Error::Unauthenticated("this cookie is no log-in of this hub; log in again"))?;
    cookie::permit(&app, login, &method, &uri, &headers)?;
    let given = app.accounts.refresh(cookie.refresh, asked.address).await?;
    Ok(handed(&app, given, true))
}

/// Log out
///
/// Ends the log-in of the token that was used. With an API key there is nothing to end.
#[utoipa::path(post, path = "/auth/logout", tag = "auth", responses((status = 204, description = "Ended")))]
pub async fn logout(State(app): State<App>, who: Who) -> Answer<(StatusCode, HeaderMap)> {
    if let Some(login) = who.authenticated().login {
        app.accounts.logout(who.caller(), login).await?;
    }
    let headers = if who.by_cookie { cookie::taken() } else { HeaderMap::new() };
    Ok((StatusCode::NO_CONTENT, headers))
}

/// Who is calling, and what may they do
#[utoipa::path(get, path = "/auth/me", tag = "auth", responses((status = 200, description = "The caller", body = MeReply)))]
pub async fn me(State(app): State<App>, who: Who) -> Answer<Json<MeReply>> {
    let (user, permissions) = app.accounts.me(who.caller()).await?;
    let csrf_token = who.authenticated().login.filter(|_| who.by_cookie).map(|login| cookie::csrf_token(&app, login));
    Ok(Json(MeReply {
        csrf_token,
        role: user.role.as_str().into(),
        permissions: permissions.iter().map(|p| p.as_str().to_owned()).collect(),
        user: SelfView { id: user.id.to_string(), username: user.username },
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
    app.accounts.change_password(who.authenticated(), r.current_password, r.new_password).await?;
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

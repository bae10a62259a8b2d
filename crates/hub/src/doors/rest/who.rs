//! Who is calling: a bearer token, a page's cookie, or the hub's own uid on the control socket.

use super::App;
use super::cookie::{self, Cookie};
use super::problem::Refusal;
use super::requests::Asked;
use axum::extract::FromRequestParts;
use axum::http::header;
use axum::http::request::Parts;
use hub_engine::accounts::Authenticated;
use mesh_core::permission::{Caller, Via};

/// The name of the first user, who also stands behind the control socket.
pub const ADMIN: &str = "admin";

/// Which listener a request came by; the listener itself puts it there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Door {
    Http,
    /// The control socket, after its peer's uid was checked.
    Socket,
}

/// The authenticated caller of a request.
pub struct Who {
    pub authenticated: Authenticated,
    pub asked: Asked,
    /// It is a page with a cookie.
    pub by_cookie: bool,
}

impl Who {
    pub fn caller(&self) -> &Caller {
        &self.authenticated.caller
    }
}

impl FromRequestParts<App> for Who {
    type Rejection = Refusal;
    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Refusal> {
        let socket = parts.extensions.get::<Door>() == Some(&Door::Socket);
        let door = if socket { "socket" } else { "rest" };
        let asked = parts.extensions.get::<Asked>().cloned().ok_or_else(|| unauthenticated("the request came by no door"))?;
        // What a browser sends by itself counts least.
        let cookie = Cookie::of(&parts.headers).filter(|_| !socket && !parts.headers.contains_key(header::AUTHORIZATION));
        let by_cookie = cookie.is_some();
        let mut authenticated = match (parts.headers.get(header::AUTHORIZATION), cookie) {
            (Some(value), _) => {
                let token = value.to_str().ok().and_then(|v| v.split_once(' ')).filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"));
                let (_, token) = token.ok_or_else(|| unauthenticated("use the header Authorization: Bearer <token or API key>"))?;
                app.accounts.authenticate(token.trim(), asked.address).await?
            }
            (None, Some(cookie)) => {
                let found = app.accounts.authenticate(cookie.access, asked.address).await?;
                // An API key in it is no log-in.
                let login = found.login.ok_or_else(|| unauthenticated("this cookie is no log-in; log in again"))?;
                cookie::permit(app, login, &parts.method, &parts.uri, &parts.headers)?;
                found
            }
            (None, None) if socket => app.accounts.local_admin(ADMIN).await?,
            (None, None) => return Err(unauthenticated("log in, or give an API key: Authorization: Bearer <token or API key>")),
        };
        if let Some(user) = authenticated.caller.user() {
            tracing::Span::current().record("user", tracing::field::display(user));
        }
        let device = authenticated.login.map(Into::into);
        if let Caller::Person(person) = &mut authenticated.caller {
            person.via = Via { door, address: asked.address, request_id: Some(asked.request_id.clone()), device };
        }
        Ok(Self { authenticated, asked, by_cookie })
    }
}

fn unauthenticated(detail: &'static str) -> Refusal {
    hub_engine::Error::Unauthenticated(detail).into()
}

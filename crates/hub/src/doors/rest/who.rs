//! Who is calling: a bearer token, or the hub's own uid on the control socket.

use super::App;
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
        let door = name(socket);
        let mut authenticated = match parts.headers.get(header::AUTHORIZATION) {
            Some(value) => {
                let token = value.to_str().ok().and_then(|v| v.split_once(' ')).filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"));
                let (_, token) = token.ok_or_else(|| unauthenticated("use the header Authorization: Bearer <token or API key>"))?;
                app.accounts.authenticate(token.trim()).await?
            }
            None if socket => app.accounts.local_admin(ADMIN).await?,
            None => return Err(unauthenticated("log in, or give an API key: Authorization: Bearer <token or API key>")),
        };
        if let Some(user) = authenticated.caller.user() {
            tracing::Span::current().record("user", tracing::field::display(user));
        }
        let asked = parts.extensions.get::<Asked>().cloned().ok_or_else(|| unauthenticated("the request came by no door"))?;
        if let Caller::Person(person) = &mut authenticated.caller {
            person.via = Via { door, address: asked.address, request_id: Some(asked.request_id.clone()) };
        }
        Ok(Self { authenticated, asked })
    }
}

/// A door's name for those who ask what came by it.
pub(super) fn name(socket: bool) -> &'static str {
    if socket { "socket" } else { "rest" }
}

fn unauthenticated(detail: &'static str) -> Refusal {
    hub_engine::Error::Unauthenticated(detail).into()
}

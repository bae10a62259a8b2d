//! Who is calling: a bearer token, or the hub's own uid on the control socket.

use super::App;
use super::problem::Refusal;
use super::requests::Asked;
use axum::extract::FromRequestParts;
use axum::http::header;
use axum::http::request::Parts;
use hub_engine::Error;
use hub_engine::accounts::Authenticated;
use hub_engine::throttle::Principal;
use mesh_core::permission::{Caller, Via};

/// The name of the first user.
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
        let door = if socket { "socket" } else { "rest" };
        let asked = parts.extensions.get::<Asked>().cloned().ok_or_else(|| Error::Unauthenticated("the request came by no door"))?;
        let who = identify(parts, app, socket).await;
        let principal = match &who {
            _ if socket => None,
            Ok(who) => Principal::of(&who.caller),
            Err(Error::Unauthenticated(_)) => asked.address.map(Principal::at),
            Err(_) => None,
        };
        principal.map_or(Ok(()), |p| app.rates.admit(p))?;
        let mut authenticated = who?;
        if let Some(user) = authenticated.caller.user() {
            tracing::Span::current().record("user", tracing::field::display(user));
        }
        if let Caller::Person(person) = &mut authenticated.caller {
            person.via = Via { door, address: asked.address, request_id: Some(asked.request_id.clone()) };
        }
        Ok(Self { authenticated, asked })
    }
}

async fn identify(parts: &Parts, app: &App, socket: bool) -> Result<Authenticated, Error> {
    match parts.headers.get(header::AUTHORIZATION) {
        Some(value) => {
            let token = value.to_str().ok().and_then(|v| v.split_once(' ')).filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"));
            let (_, token) = token.ok_or(Error::Unauthenticated("use the header Authorization: Bearer <token or API key>"))?;
            app.accounts.authenticate(token.trim()).await
        }
        None if socket => app.accounts.local_admin().await,
        None => Err(Error::Unauthenticated("log in, or give an API key: Authorization: Bearer <token or API key>")),
    }
}

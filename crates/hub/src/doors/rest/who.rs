//! Who is calling: a bearer token, a page's cookie, or the hub's own uid on the control socket.

use super::App;
use super::cookie::{self, Cookie};
use super::problem::Refusal;
use super::requests::Asked;
use axum::extract::FromRequestParts;
use axum::http::header;
use axum::http::request::Parts;
use hub_engine::Error;
use hub_engine::accounts::{Authenticated, Look};
use hub_engine::throttle::Principal;
use mesh_core::permission::{Caller, Via};
use std::net::IpAddr;
use std::sync::{Arc, OnceLock};

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
#[derive(Clone)]
pub struct Who {
    known: Known,
    pub asked: Asked,
    /// It is a page with a cookie.
    pub by_cookie: bool,
}

/// Who was known before the body of a request arrived, which may take its time: what they may do is decided by
/// their rights of when all of it is there.
#[derive(Clone)]
pub(super) struct Known {
    before: Authenticated,
    look: Look,
    /// The same caller, when something moved meanwhile.
    since: Arc<OnceLock<Authenticated>>,
}

impl Known {
    /// The body is there now; an error when its caller's rights have ended.
    pub async fn again(&self, app: &App) -> Result<(), Refusal> {
        if let Some(now) = app.accounts.since(&self.before, self.look).await? {
            let _ = self.since.set(now);
        }
        Ok(())
    }
}

impl Who {
    pub fn authenticated(&self) -> &Authenticated {
        self.known.since.get().unwrap_or(&self.known.before)
    }
    pub fn caller(&self) -> &Caller {
        &self.authenticated().caller
    }

    /// The same caller with another request, or a part of one.
    pub fn asking(self, asked: Asked) -> Self {
        Self { asked, ..self }
    }

    /// Takes the rights of now, for what goes on for long; an error when they have ended.
    pub async fn renew(&mut self, app: &App) -> Result<(), Error> {
        let look = app.accounts.look();
        let before = app.accounts.still(self.authenticated()).await?;
        self.known = Known { before, look, since: Arc::default() };
        Ok(())
    }

    /// The same caller, for one call of a door within HTTP: it is named in the audit and in the task.
    pub fn through(&self, door: &'static str) -> Self {
        let mut now = self.authenticated().clone();
        if let Caller::Person(person) = &mut now.caller {
            person.via.door = door;
        }
        Self { known: Known { before: now, look: self.known.look, since: Arc::default() }, ..self.clone() }
    }
}

impl FromRequestParts<App> for Who {
    type Rejection = Refusal;
    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Refusal> {
        let socket = parts.extensions.get::<Door>() == Some(&Door::Socket);
        let door = name(socket);
        let asked = parts.extensions.get::<Asked>().cloned().ok_or_else(|| Error::Unauthenticated("the request came by no door"))?;
        // What a browser sends by itself counts least.
        let cookie = Cookie::of(&parts.headers).filter(|_| !socket && !parts.headers.contains_key(header::AUTHORIZATION));
        let by_cookie = cookie.is_some();
        let look = app.accounts.look();
        let who = identify(parts, app, socket, cookie, asked.address).await;
        let principal = match &who {
            _ if socket => None,
            Ok(who) => Principal::of(&who.caller),
            Err(Error::Unauthenticated(_)) => asked.address.map(Principal::at),
            Err(_) => None,
        };
        principal.map_or(Ok(()), |p| app.rates.admit(p))?;
        let mut authenticated = who?;
        if let Some(login) = authenticated.login.filter(|_| by_cookie) {
            cookie::permit(app, login, &parts.method, &parts.uri, &parts.headers)?;
        }
        if let Some(user) = authenticated.caller.user() {
            tracing::Span::current().record("user", tracing::field::display(user));
        }
        let device = authenticated.login.map(Into::into);
        if let Caller::Person(person) = &mut authenticated.caller {
            person.via = Via { door, address: asked.address, request_id: Some(asked.request_id.clone()), device };
        }
        let known = Known { before: authenticated, look, since: Arc::default() };
        parts.extensions.insert(known.clone());
        Ok(Self { known, asked, by_cookie })
    }
}

async fn identify(
    parts: &Parts,
    app: &App,
    socket: bool,
    cookie: Option<Cookie<'_>>,
    address: Option<IpAddr>,
) -> Result<Authenticated, Error> {
    match (parts.headers.get(header::AUTHORIZATION), cookie) {
        (Some(value), _) => {
            let token = value.to_str().ok().and_then(|v| v.split_once(' ')).filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"));
            let (_, token) = token.ok_or(Error::Unauthenticated("use the header Authorization: Bearer <token or API key>"))?;
            app.accounts.authenticate(token.trim(), address).await
        }
        (None, Some(cookie)) => {
            let found = app.accounts.authenticate(cookie.access, address).await?;
            // An API key in it is no log-in.
            if found.login.is_some() { Ok(found) } else { Err(Error::Unauthenticated("this cookie is no log-in; log in again")) }
        }
        (None, None) if socket => app.accounts.local_admin().await,
        (None, None) => Err(Error::Unauthenticated("log in, or give an API key: Authorization: Bearer <token or API key>")),
    }
}

/// Does a request bring anything that says who it is?
pub fn is_anonymous(parts: &Parts) -> bool {
    let socket = parts.extensions.get::<Door>() == Some(&Door::Socket);
    !socket && !parts.headers.contains_key(header::AUTHORIZATION) && Cookie::of(&parts.headers).is_none()
}

/// A door's name for those who ask what came by it.
pub(super) fn name(socket: bool) -> &'static str {
    if socket { "socket" } else { "rest" }
}

//! A log-in by cookie, for pages: no script can read it, and what it is sent along with must prove that a
//! page of this hub asks.

use super::App;
use super::origin::{self, Given};
use super::problem::{Answer, Refusal};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, Uri, header};
use hub_engine::accounts::Tokens;
use hub_engine::ports::Keyring;
use mesh_core::LoginId;

const NAME: &str = "__Host-cortex";
const CSRF_HEADER: &str = "x-csrf-token";
const ATTRIBUTES: &str = "Path=/; Secure; HttpOnly; SameSite=Strict";

/// What the cookie of a request holds.
#[derive(Debug, PartialEq, Eq)]
pub struct Cookie<'h> {
    pub refresh: &'h str,
    pub access: &'h str,
}

impl<'h> Cookie<'h> {
    /// None where there is none, or more than one: then somebody has slipped one in.
    pub fn of(headers: &'h HeaderMap) -> Option<Self> {
        let pairs = headers.get_all(header::COOKIE).iter().filter_map(|v| v.to_str().ok()).flat_map(|v| v.split(';'));
        let mut own = pairs.filter_map(|pair| pair.trim().split_once('=')).filter(|(name, _)| *name == NAME);
        let (Some((_, value)), None) = (own.next(), own.next()) else { return None };
        // A refresh token has no dot in it.
        let (refresh, access) = value.split_once('.')?;
        Some(Self { refresh, access })
    }

    /// Whose it is, whether its access token has expired or not.
    pub fn login(&self, app: &App) -> Option<LoginId> {
        app.keys.read_access(self.access, 0).map(|(_, login)| login)
    }
}

/// The header that gives a page its log-in.
pub fn given(app: &App, tokens: &Tokens) -> HeaderMap {
    let seconds = app.accounts.lifetimes.refresh_days * 86_400;
    set(format!("{NAME}={}.{}; {ATTRIBUTES}; Max-Age={seconds}", tokens.refresh, tokens.access))
}

/// The header that takes it away.
pub fn taken() -> HeaderMap {
    set(format!("{NAME}=; {ATTRIBUTES}; Max-Age=0"))
}

fn set(cookie: String) -> HeaderMap {
    let value = HeaderValue::try_from(cookie).expect("tokens are visible ASCII");
    HeaderMap::from_iter([(header::SET_COOKIE, value)])
}

/// What a page of this log-in shows to have been let read it.
pub fn csrf_token(app: &App, login: LoginId) -> String {
    hex::encode(app.keys.token_mac(&format!("csrf {login}")))
}

/// Permits a call by cookie. A browser sends cookies along for any page that asks it to.
pub fn permit(app: &App, login: LoginId, method: &Method, uri: &Uri, headers: &HeaderMap) -> Answer<()> {
    let refused = |code, detail| Err(Refusal::new(StatusCode::FORBIDDEN, code, detail));
    let changes = !matches!(*method, Method::GET | Method::HEAD);
    // A socket goes both ways, and no browser keeps one from the pages of others.
    let named = changes || headers.contains_key(header::UPGRADE);
    match origin::given(headers, uri, &app.facts.public_url) {
        Given::Own { safe: true } => {}
        Given::Nothing if !named => {}
        Given::Nothing => return refused("foreign_origin", "a call by cookie needs the header Origin, which browsers send by themselves"),
        Given::Own { safe: false } | Given::Foreign => {
            return refused("foreign_origin", "a page of another origin may not use this log-in");
        }
    }
    let mut shown = headers.get_all(CSRF_HEADER).iter();
    // MACs of both are compared, so that the time tells nothing of either.
    let mac = |text: &[u8]| app.keys.token_mac(&format!("csrf token {}", hex::encode(text)));
    let fits = |v: &HeaderValue| mac(v.as_bytes()) == mac(csrf_token(app, login).as_bytes());
    if changes && !matches!((shown.next(), shown.next()), (Some(v), None) if fits(v)) {
        return refused("bad_csrf_token", "a call by cookie that is not GET or HEAD needs X-CSRF-Token, as the log-in gave it");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_cookie_of_that_name() {
        let of = |lines: &[&str]| {
            let headers: HeaderMap = lines.iter().map(|l| (header::COOKIE, l.parse().unwrap())).collect();
            Cookie::of(&headers).map(|c| (c.refresh.to_owned(), c.access.to_owned()))
        };
        let good = Some(("r".to_owned(), "a.b.c".to_owned()));
        assert_eq!(of(&["__Host-cortex=r.a.b.c"]), good);
        assert_eq!(of(&["x=1; __Host-cortex=r.a.b.c;y=2"]), good);
        assert_eq!(of(&["x=1", "__Host-cortex=r.a.b.c"]), good);
        for none in [&["cortex=r.a"][..], &["__host-cortex=r.a"], &["x__Host-cortex=r.a"], &["__Host-cortex=r"], &["__Host-cortex"], &[]] {
            assert_eq!(of(none), None, "{none:?}");
        }
        assert_eq!(of(&["__Host-cortex=r.a; __Host-cortex=r.b"]), None);
        assert_eq!(of(&["__Host-cortex=r.a", "__Host-cortex=r.a"]), None);
    }
}

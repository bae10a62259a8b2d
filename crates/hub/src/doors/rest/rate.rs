//! Requests have a rate: that of the user or key behind them, else that of the address they come from.
//!
//! A caller is counted where it is known, by [`super::Who`]. What never asks who is calling is counted
//! here. The control socket has no rate: who may open it owns the hub, and must reach it in any flood.

use super::openapi::document;
use super::problem::Answer;
use super::{App, Door};
use axum::extract::{MatchedPath, Request};
use axum::http::Method;
use hub_engine::throttle::Principal;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::LazyLock;

/// What load balancers and supervisors ask; it says little, and its answer must not hang on others.
const PROBES: [&str; 2] = ["/healthz", "/readyz"];

/// Doors that are no part of that description, and ask for credentials.
const DOORS: [&str; 1] = ["/mcp"];

/// Methods that ask for credentials, by route: as the description of the API says.
static ASKS: LazyLock<HashMap<&'static str, Vec<&'static str>>> = LazyLock::new(|| {
    let of = |item: &'static Value| {
        let operations = item.as_object().into_iter().flatten();
        operations.filter(|(_, o)| o["security"] != json!([{}])).map(|(method, _)| method.as_str()).collect()
    };
    document()["paths"].as_object().into_iter().flatten().map(|(route, item)| (route.as_str(), of(item))).collect()
});

fn asks(route: &str, method: &Method) -> bool {
    if DOORS.contains(&route) {
        return method == Method::POST;
    }
    let method = if method == Method::HEAD { "GET" } else { method.as_str() };
    ASKS.get(route).is_some_and(|methods| methods.iter().any(|m| m.eq_ignore_ascii_case(method)))
}

/// Counts a request that nobody else will count.
pub fn admit(app: &App, request: &Request, address: Option<IpAddr>) -> Answer<()> {
    let route = request.extensions().get::<MatchedPath>().map_or("", MatchedPath::as_str);
    if request.extensions().get::<Door>() == Some(&Door::Socket) || PROBES.contains(&route) || asks(route, request.method()) {
        return Ok(());
    }
    address.map_or(Ok(()), |a| Ok(app.rates.admit(Principal::at(a))?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_asks_for_no_credentials_is_counted_by_address() {
        for (route, method, is) in [
            ("/api/v1/tasks/{id}", Method::GET, true),
            ("/api/v1/tasks/{id}", Method::HEAD, true),
            ("/api/v1/dispatch", Method::POST, true),
            ("/api/v1/dispatch", Method::GET, false),
            ("/mcp", Method::POST, true),
            ("/mcp", Method::GET, false),
            ("/api/v1/auth/login", Method::POST, false),
            ("/api/v1/auth/refresh", Method::POST, false),
            ("/openapi.json", Method::GET, false),
            ("/nothing", Method::GET, false),
            ("", Method::GET, false),
        ] {
            assert_eq!(asks(route, &method), is, "{method} {route}");
        }
    }
}

//! By which names a request may ask for this hub. A page whose own name was made to mean this machine (DNS
//! rebinding) asks for it by that name, and is refused.

use super::listener::Peer;
use super::rest::{Door, Refusal};
use axum::extract::{Request, State};
use axum::http::{StatusCode, Version, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

/// Names in lower case, addresses without brackets; `*.example.org` is one more label before it.
#[derive(Debug, Clone, Default)]
pub struct Hosts(Arc<BTreeSet<String>>);

impl Hosts {
    pub fn new<'a>(names: impl IntoIterator<Item = &'a str>) -> Self {
        Self(Arc::new(names.into_iter().filter_map(plain).collect()))
    }

    /// May the hub be asked for as `host` (with or without a port) on a connection to its address `local`? It
    /// always may by a loopback name and by the very address that the connection leads to: neither can be
    /// made to mean this machine by others.
    pub fn allow(&self, host: &str, local: Option<IpAddr>) -> bool {
        let Some(name) = plain(host) else { return false };
        if let Ok(ip) = name.parse::<IpAddr>().map(|ip| ip.to_canonical()) {
            return ip.is_loopback() || ip.is_unspecified() || local == Some(ip) || self.0.contains(&ip.to_string());
        }
        let parent = || name.split_once('.').is_some_and(|(_, parent)| self.0.contains(&format!("*.{parent}")));
        name == "localhost" || name.ends_with(".localhost") || self.0.contains(&name) || parent()
    }

    fn check(&self, request: &Request) -> Result<(), Refusal> {
        let local = request.extensions().get::<Peer>().and_then(|peer| peer.local);
        let mut named: Vec<&str> = request.uri().authority().map(|a| a.as_str()).into_iter().collect();
        let headers = request.headers().get_all(header::HOST);
        let (count, texts) = (headers.iter().count(), headers.iter().map(|v| v.to_str().unwrap_or("?")));
        named.extend(texts);
        if count > 1 || (named.is_empty() && request.version() >= Version::HTTP_11) {
            return Err(Refusal::bad_request("bad_host", "a request names its host, and once"));
        }
        match named.iter().find(|host| !self.allow(host, local)) {
            None => Ok(()),
            Some(_) => Err(Refusal::new(
                StatusCode::MISDIRECTED_REQUEST,
                "foreign_host",
                "this hub is not known by the host that the request names; names of its own are listed in http.allowed_hosts, or set as http.public_url",
            )),
        }
    }
}

/// The name of `host` or `host:port` in the one form in which names are compared.
pub fn plain(host: &str) -> Option<String> {
    let (name, rest) = match host.strip_prefix('[') {
        Some(inner) => inner.split_once(']')?,
        // An address of IPv6 may stand without brackets where no port can follow.
        None if host.parse::<IpAddr>().is_ok() => (host, ""),
        None => host.split_at(host.find(':').unwrap_or(host.len())),
    };
    let port = rest.strip_prefix(':').unwrap_or(rest);
    let name = name.strip_suffix('.').unwrap_or(name);
    let known = |b: u8| b.is_ascii_alphanumeric() || b"-._*:".contains(&b);
    let good = !name.is_empty() && name.bytes().all(known) && port.bytes().all(|b| b.is_ascii_digit());
    good.then(|| match name.parse::<IpAddr>() {
        Ok(ip) => ip.to_canonical().to_string(),
        Err(_) => name.to_ascii_lowercase(),
    })
}

/// Refuses what asks for another host. No page can reach the control socket, so it takes any.
pub async fn guard(State(hosts): State<Hosts>, request: Request, next: Next) -> Response {
    if request.extensions().get::<Door>() != Some(&Door::Socket)
        && let Err(mut refusal) = hosts.check(&request)
    {
        // As MCP has it.
        if request.uri().path() == "/mcp" && refusal.status == StatusCode::MISDIRECTED_REQUEST {
            refusal.status = StatusCode::FORBIDDEN;
        }
        return refusal.into_response();
    }
    next.run(request).await
}

/// The same where refusals are plain text.
pub async fn guard_plain(State(hosts): State<Hosts>, request: Request, next: Next) -> Response {
    match hosts.check(&request) {
        Ok(()) => next.run(request).await,
        Err(refusal) => (refusal.status, format!("{}: {}\n", refusal.code, refusal.detail)).into_response(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::body::Body;

    #[test]
    fn own_names_are_allowed_and_no_others() {
        let hosts = Hosts::new(["Hub.Example.org", "box", "*.lan.example", "192.0.2.9", "[fd00::7]:443"]);
        let local = Some("10.0.0.5".parse().unwrap());
        for yes in [
            "hub.example.org",
            "HUB.example.org:8443",
            "hub.example.org.",
            "box:80",
            "a.lan.example",
            "127.0.0.1:8080",
            "127.9.9.9",
            "[::1]:8080",
            "[::ffff:127.0.0.1]",
            "localhost:1",
            "x.localhost",
            "10.0.0.5:8080",
            "192.0.2.9",
            "[fd00::7]",
            "0.0.0.0:8080",
            "[::]:8080",
        ] {
            assert!(hosts.allow(yes, local), "{yes}");
        }
        for no in [
            "evil.example",
            "hub.example.org.evil.example",
            "xhub.example.org",
            "lan.example",
            "a.b.lan.example",
            "10.0.0.6",
            "localhost.evil.example",
            "user@localhost",
            "localhost/",
            "127.1",
            "2130706433",
            "",
            ":80",
            "[::1",
            "box:8x",
            "?",
        ] {
            assert!(!hosts.allow(no, local), "{no}");
        }
        assert!(!hosts.allow("10.0.0.5", None));
    }

    #[test]
    fn every_name_in_a_request_counts() {
        let hosts = Hosts::new(["hub.example"]);
        let check = |uri: &str, version: Version, named: &[&str]| {
            let mut r = Request::builder().uri(uri).version(version);
            for host in named {
                r = r.header("host", *host);
            }
            hosts.check(&r.body(Body::empty()).unwrap()).map_err(|e| e.code)
        };
        let (h1, h2) = (Version::HTTP_11, Version::HTTP_2);
        assert_eq!(check("/", h1, &["hub.example"]), Ok(()));
        assert_eq!(check("/", h1, &["evil.example"]), Err("foreign_host"));
        assert_eq!(check("/", h1, &["hub.example", "hub.example"]), Err("bad_host"));
        assert_eq!(check("/", h1, &[]), Err("bad_host"));
        assert_eq!(check("/", Version::HTTP_10, &[]), Ok(()), "no browser speaks it");
        assert_eq!(check("http://evil.example/", h1, &["hub.example"]), Err("foreign_host"));
        assert_eq!(check("https://hub.example/", h2, &[]), Ok(()));
        assert_eq!(check("https://evil.example/", h2, &[]), Err("foreign_host"));
        assert_eq!(check("https://hub.example/", h2, &["evil.example"]), Err("foreign_host"));
    }
}

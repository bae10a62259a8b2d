//! Which page a browser's request came from.

use crate::config::host_of;
use axum::http::{HeaderMap, Uri, header};
use std::net::IpAddr;

/// What a request says of its page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Given {
    /// No page made it, or one of a browser's own doing.
    Nothing,
    /// A page of this hub. Safe: nobody on the way can have made it up.
    Own {
        safe: bool,
    },
    Foreign,
}

pub fn given(headers: &HeaderMap, uri: &Uri, public_url: &str) -> Given {
    let host = headers.get(header::HOST).and_then(|v| v.to_str().ok()).or(uri.authority().map(|a| a.as_str()));
    let mut given = Given::Nothing;
    for origin in headers.get_all(header::ORIGIN) {
        let Some(origin) = origin.to_str().ok().filter(|o| is_own(o, public_url, host)) else { return Given::Foreign };
        let safe = Origin::of(origin)
            .is_some_and(|o| o.scheme == "https" || is_loopback(&o.host) || Origin::of(public_url).is_some_and(|public| public == o));
        given = Given::Own { safe };
    }
    given
}

/// A name or address of this machine, as browsers see it.
fn is_loopback(host: &str) -> bool {
    let address = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
    address.map_or(host == "localhost" || host.ends_with(".localhost"), |a| a.is_loopback())
}

/// Is a page of this origin this hub's own? `host` is what the request calls the hub.
fn is_own(origin: &str, public_url: &str, host: Option<&str>) -> bool {
    let Some(origin) = Origin::of(origin) else { return false };
    Origin::of(public_url).is_some_and(|own| own == origin)
        // Behind a proxy the scheme of the request is not known.
        || host.and_then(|h| Origin::of(&format!("{}://{h}", origin.scheme))).is_some_and(|own| own == origin)
}

#[derive(PartialEq)]
struct Origin {
    scheme: String,
    host: String,
    port: String,
}

impl Origin {
    fn of(url: &str) -> Option<Self> {
        let url = url.to_ascii_lowercase();
        let (scheme, rest) = url.split_once("://")?;
        let default = match scheme {
            "http" => "80",
            "https" => "443",
            _ => return None,
        };
        let host = host_of(&url)?.to_owned();
        let after = rest.split('/').next()?.strip_prefix(host.as_str())?;
        let port = if after.is_empty() { default } else { after.strip_prefix(':')? };
        Some(Self { scheme: scheme.to_owned(), port: port.to_owned(), host })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn origins() {
        let own = |o: &str| is_own(o, "https://hub.example.org/base", Some("127.0.0.1:8080"));
        for good in ["https://hub.example.org", "https://HUB.example.org:443", "http://127.0.0.1:8080", "https://127.0.0.1:8080"] {
            assert!(own(good), "{good}");
        }
        for bad in [
            "null",
            "",
            "http://hub.example.org",
            "https://hub.example.org:8443",
            "https://hub.example.org.evil.net",
            "https://evil.net/hub.example.org",
            "http://127.0.0.1",
            "http://127.0.0.1:8081",
            "http://127.0.0.1:8080@evil.net",
            "file://127.0.0.1:8080",
        ] {
            assert!(!own(bad), "{bad}");
        }
        assert!(is_own("http://[::1]:80", "http://x", Some("[::1]")));
        assert!(!is_own("http://a", "http://x", None));
    }

    #[test]
    fn what_a_request_says() {
        let given = |origins: &[&str]| {
            let mut headers = HeaderMap::new();
            headers.insert(header::HOST, "hub.example.org:8080".parse().unwrap());
            for origin in origins {
                headers.append(header::ORIGIN, origin.parse().unwrap());
            }
            given(&headers, &Uri::from_static("/"), "https://hub.example.org")
        };
        assert_eq!(given(&[]), Given::Nothing);
        for own in ["https://hub.example.org", "https://hub.example.org:8080"] {
            assert_eq!(given(&[own]), Given::Own { safe: true });
        }
        assert_eq!(given(&["http://hub.example.org:8080"]), Given::Own { safe: false }, "whoever is on the way can be such a page");
        for foreign in ["null", "https://evil.test", "https://sub.hub.example.org", "https://hub.example.org.evil.test", ""] {
            assert_eq!(given(&[foreign]), Given::Foreign, "{foreign}");
        }
        assert_eq!(given(&["https://hub.example.org", "https://evil.test"]), Given::Foreign);
        assert!(is_loopback("localhost") && is_loopback("127.0.0.1") && is_loopback("[::1]") && is_loopback("hub.localhost"));
        assert!(!is_loopback("localhost.evil.test") && !is_loopback("192.0.2.1") && !is_loopback("notlocalhost"));
    }
}

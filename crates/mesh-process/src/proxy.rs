//! The proxy that stands between this machine and another, as the environment names it, and the way
//! through it: HTTP CONNECT (RFC 9110, 9.3.6).
//!
//! Which host goes by which proxy is decided by the same matcher as in the HTTP client of the command
//! line, so that one environment means one thing to all programs.

use crate::config::BadSetting;
use http::Uri;
use http::header::HeaderValue;
use hyper_util::client::proxy::matcher::Matcher;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// How long a proxy may take to be reached, and then to answer.
pub const PATIENCE: Duration = Duration::from_secs(10);
/// More than a proxy has to say.
const HEAD_BYTES: usize = 16 << 10;
const REASON_CHARS: usize = 80;

const HTTPS: [&str; 2] = ["HTTPS_PROXY", "https_proxy"];
const HTTP: [&str; 2] = ["HTTP_PROXY", "http_proxy"];
const ALL: [&str; 2] = ["ALL_PROXY", "all_proxy"];
const NO: [&str; 2] = ["NO_PROXY", "no_proxy"];

/// What the environment says of proxies.
#[derive(Debug, Clone)]
pub struct Proxies(Arc<Matcher>);

impl Default for Proxies {
    /// None at all.
    fn default() -> Self {
        Self(Arc::new(Matcher::builder().build()))
    }
}

impl Proxies {
    /// Reads `HTTPS_PROXY`, `HTTP_PROXY`, `ALL_PROXY` and `NO_PROXY`, each in either case. What cannot be
    /// used is an error that does not repeat it, since it may hold a password.
    pub fn read(lookup: &dyn Fn(&str) -> Result<Option<String>, BadSetting>) -> Result<Self, BadSetting> {
        let first = |names: [&'static str; 2]| -> Result<Option<(&str, String)>, BadSetting> {
            for name in names {
                if let Some(text) = lookup(name)? {
                    return Ok(Some((name, text)));
                }
            }
            Ok(None)
        };
        let proxy = |names| -> Result<String, BadSetting> {
            let Some((name, text)) = first(names)? else { return Ok(String::new()) };
            check(&text).map_err(|reason| BadSetting::new("environment", name, reason))?;
            Ok(text)
        };
        let no = first(NO)?.map(|(_, text)| text).unwrap_or_default();
        Ok(Self(Arc::new(Matcher::builder().https(proxy(HTTPS)?).http(proxy(HTTP)?).all(proxy(ALL)?).no(no).build())))
    }

    /// The proxy by which one goes to `address` (`host:port`, IPv6 in brackets) with this scheme, `https` or
    /// `http`. This machine itself is never reached by one.
    pub fn of(&self, scheme: &str, address: &str) -> Option<Proxy> {
        let target: Uri = format!("{scheme}://{address}").parse().ok()?;
        if is_loopback(target.host()?) {
            return None;
        }
        let found = self.0.intercept(&target)?;
        let host = found.uri().host()?;
        Some(Proxy { address: format!("{host}:{}", found.uri().port_u16().unwrap_or(80)), password: found.basic_auth().cloned() })
    }
}

/// Is it a name or an address (with or without brackets) by which a machine means itself?
pub fn is_loopback(host: &str) -> bool {
    let host = host.trim_matches(['[', ']']);
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.to_canonical().is_loopback())
}

fn check(text: &str) -> Result<(), &'static str> {
    const FORM: &str = "is not the address of a proxy, such as http://user:password@proxy.example:3128";
    let uri: Uri = text.parse().map_err(|_| FORM)?;
    match uri.scheme_str() {
        None | Some("http") => {}
        Some("https") => return Err("names a proxy over TLS, which is not spoken here; use its http:// address"),
        Some(_) => return Err("names a proxy that is not an HTTP proxy; use one of http://"),
    }
    // A path or a port that is no number would be dropped without a word.
    let host = uri.host().filter(|h| !h.is_empty()).ok_or(FORM)?;
    let authority = uri.authority().map_or("", |a| a.as_str());
    let after = authority.rsplit_once('@').map_or(authority, |(_, at)| at).strip_prefix(host).unwrap_or("");
    if after.is_empty() || uri.port_u16().is_some() { Ok(()) } else { Err(FORM) }
}

/// Why one does not come through a proxy.
#[derive(Debug, thiserror::Error)]
pub enum ProxyError {
    #[error("the proxy {proxy} cannot be reached: {source}")]
    Unreachable {
        proxy: String,
        #[source]
        source: std::io::Error,
    },
    #[error("the proxy {proxy} took the connection and does not answer")]
    Silent { proxy: String },
    #[error("the proxy {proxy} wants a user and a password")]
    NoPassword { proxy: String },
    #[error("the proxy {proxy} does not take the user and password that it is given")]
    WrongPassword { proxy: String },
    #[error("the proxy {proxy} does not connect to {target}: {answer}")]
    Refused { proxy: String, target: String, answer: String },
    #[error("what answers at {proxy} is no HTTP proxy")]
    Rubbish { proxy: String },
}

impl ProxyError {
    /// What to do about it.
    pub fn advice(&self) -> &'static str {
        match self {
            Self::Unreachable { .. } => "is the proxy's address right (HTTPS_PROXY), and does it run? NO_PROXY names hosts that need none",
            Self::Silent { .. } | Self::Rubbish { .. } => "is that the proxy's address, and its plain HTTP port? look at HTTPS_PROXY",
            Self::NoPassword { .. } => "write them into the address: HTTPS_PROXY=http://user:password@host:port",
            Self::WrongPassword { .. } => "mend them in HTTPS_PROXY; characters such as @ : / are written as %40 %3A %2F",
            Self::Refused { .. } => "ask who runs the proxy to allow CONNECT to this host and port; many allow port 443 alone",
        }
    }
}

/// One HTTP proxy.
#[derive(Clone)]
pub struct Proxy {
    address: String,
    /// The value of `Proxy-Authorization`.
    password: Option<HeaderValue>,
}

impl std::fmt::Debug for Proxy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Proxy").field("address", &self.address).finish_non_exhaustive()
    }
}

impl Proxy {
    /// `host:port`.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// A connection to the proxy itself.
    pub async fn reach(&self) -> Result<TcpStream, ProxyError> {
        let failed = |source| ProxyError::Unreachable { proxy: self.address.clone(), source };
        let late = || failed(std::io::Error::from(std::io::ErrorKind::TimedOut));
        tokio::time::timeout(PATIENCE, TcpStream::connect(&self.address)).await.map_err(|_| late())?.map_err(failed)
    }

    /// A connection through the proxy to `target` (`host:port`, whose name the proxy resolves).
    pub async fn connect(&self, target: &str) -> Result<TcpStream, ProxyError> {
        let mut stream = self.reach().await?;
        let answer = tokio::time::timeout(PATIENCE, self.ask(&mut stream, target)).await;
        answer.unwrap_or_else(|_| Err(ProxyError::Silent { proxy: self.address.clone() }))?;
        Ok(stream)
    }

    async fn ask(&self, stream: &mut TcpStream, target: &str) -> Result<(), ProxyError> {
        let proxy = || self.address.clone();
        let mut ask = format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n").into_bytes();
        if let Some(password) = &self.password {
            ask.extend_from_slice(b"Proxy-Authorization: ");
            ask.extend_from_slice(password.as_bytes());
            ask.extend_from_slice(b"\r\n");
        }
        ask.extend_from_slice(b"\r\n");
        let mut head = vec![];
        let told = async {
            stream.write_all(&ask).await?;
            while !head.windows(4).any(|w| w == b"\r\n\r\n") && head.len() < HEAD_BYTES {
                if stream.read_buf(&mut head).await? == 0 {
                    break;
                }
            }
            Ok(())
        };
        told.await.map_err(|_: std::io::Error| ProxyError::Rubbish { proxy: proxy() })?;
        let (status, reason) = status_line(&head).ok_or_else(|| ProxyError::Rubbish { proxy: proxy() })?;
        match status {
            // Behind the proxy nobody speaks before we do.
            200..300 if head.ends_with(b"\r\n\r\n") => Ok(()),
            200..300 => Err(ProxyError::Rubbish { proxy: proxy() }),
            407 if self.password.is_none() => Err(ProxyError::NoPassword { proxy: proxy() }),
            407 => Err(ProxyError::WrongPassword { proxy: proxy() }),
            _ => Err(ProxyError::Refused { proxy: proxy(), target: target.to_owned(), answer: format!("{status} {reason}") }),
        }
    }
}

/// Status and reason of a whole head of HTTP/1; the reason as plain text, whatever it was.
fn status_line(head: &[u8]) -> Option<(u16, String)> {
    let end = head.windows(4).position(|w| w == b"\r\n\r\n")?;
    let line = head[..end].split(|b| *b == b'\r').next()?;
    let line: String = line.iter().map(|b| if b.is_ascii_graphic() || *b == b' ' { char::from(*b) } else { '?' }).collect();
    let mut parts = line.strip_prefix("HTTP/1.")?.splitn(3, ' ');
    let (_, status, reason) = (parts.next()?, parts.next()?, parts.next().unwrap_or_default());
    let status = status.parse().ok().filter(|s| (100..600).contains(s))?;
    Some((status, reason.trim().chars().take(REASON_CHARS).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::TcpListener;

    fn read(vars: &[(&str, &str)]) -> Result<Proxies, BadSetting> {
        Proxies::read(&|name| Ok(vars.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_owned())))
    }
    fn of(vars: &[(&str, &str)], scheme: &str, address: &str) -> Option<String> {
        read(vars).unwrap().of(scheme, address).map(|p| p.address)
    }

    #[test]
    fn the_environment_says_who_goes_by_which() {
        let by = Some("proxy.example:3128".to_owned());
        for name in ["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"] {
            for text in ["http://proxy.example:3128", "proxy.example:3128", "http://u:p@proxy.example:3128/"] {
                assert_eq!(of(&[(name, text)], "https", "hub.example:7443"), by, "{name}={text}");
            }
        }
        let one = ("HTTPS_PROXY", "http://proxy.example:3128");
        assert_eq!(of(&[one], "http", "hub.example:80"), None);
        assert_eq!(of(&[("http_proxy", one.1)], "http", "hub.example:80"), by);
        assert_eq!(of(&[one, ("https_proxy", "http://other:1")], "https", "hub.example:1"), by);
        assert_eq!(of(&[("HTTPS_PROXY", "http://proxy.example")], "https", "h:1"), Some("proxy.example:80".into()));
        assert_eq!(of(&[("HTTPS_PROXY", "http://[fd00::1]:8")], "https", "h:1"), Some("[fd00::1]:8".into()));
        for own in ["127.0.0.1:7443", "[::1]:7443", "localhost:7443", "[::ffff:127.0.0.1]:1"] {
            assert_eq!(of(&[one], "https", own), None, "{own}");
        }
        for (no, address, direct) in [
            ("hub.example", "hub.example:1", true),
            (".example", "hub.example:1", true),
            ("example", "hub.example:1", true),
            ("ample", "hub.example:1", false),
            ("10.0.0.0/8, fd00::/8", "10.2.3.4:1", true),
            ("10.0.0.0/8, fd00::/8", "[fd00::5]:1", true),
            ("10.0.0.0/8, fd00::/8", "11.2.3.4:1", false),
            ("*", "hub.example:1", true),
            ("", "hub.example:1", false),
        ] {
            assert_eq!(of(&[one, ("no_proxy", no)], "https", address).is_none(), direct, "NO_PROXY={no} {address}");
        }
        assert!(Proxies::default().of("https", "hub.example:1").is_none());
    }

    #[test]
    fn what_cannot_be_used_is_named_and_not_repeated() {
        for (text, word) in [
            ("https://u:geheim@proxy:3128", "over TLS"),
            ("socks5://u:geheim@proxy:3128", "not an HTTP proxy"),
            ("http://u:geheim@proxy:port", "such as"),
            ("http://u:geheim@proxy:99999", "such as"),
            ("http:// geheim", "such as"),
            ("/geheim", "such as"),
        ] {
            let e = read(&[("https_proxy", text)]).unwrap_err();
            assert_eq!((e.place.as_str(), e.key.as_str()), ("environment", "https_proxy"), "{text}");
            assert!(e.reason.contains(word) && !e.to_string().contains("geheim"), "{e}");
        }
        let p = read(&[("HTTPS_PROXY", "http://u:geheim@proxy:1")]).unwrap();
        assert!(!format!("{p:?} {:?}", p.of("https", "h:1")).contains("geheim"));
    }

    #[test]
    fn only_a_whole_head_counts() {
        assert_eq!(status_line(b"HTTP/1.1 200 OK\r\n\r\n"), Some((200, "OK".into())));
        assert_eq!(status_line(b"HTTP/1.0 403\r\nA: b\r\n\r\nbody"), Some((403, String::new())));
        assert_eq!(status_line("HTTP/1.1 502 \u{1b}[2Jx\r\n\r\n".as_bytes()), Some((502, "?[2Jx".into())));
        for bad in ["", "HTTP/1.1 200 OK\r\n", "HTTP/2 200\r\n\r\n", "HTTP/1.1 2000 x\r\n\r\n", "SSH-2.0-x\r\n\r\n", "HTTP/1.1\r\n\r\n"] {
            assert_eq!(status_line(bad.as_bytes()), None, "{bad:?}");
        }
    }

    /// One connection of a proxy that says this; gives what it was asked.
    async fn said(answer: &'static [u8], userinfo: &str) -> (Result<TcpStream, ProxyError>, String) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let text = format!("http://{userinfo}{}", listener.local_addr().unwrap());
        let proxy = read(&[("HTTPS_PROXY", &text)]).unwrap().of("https", "hub.example:7443").unwrap();
        let serve = async {
            let (mut io, _) = listener.accept().await.unwrap();
            let mut head = vec![];
            while !head.ends_with(b"\r\n\r\n") {
                assert_ne!(io.read_buf(&mut head).await.unwrap(), 0);
            }
            io.write_all(answer).await.unwrap();
            String::from_utf8(head).unwrap()
        };
        tokio::join!(proxy.connect("hub.example:7443"), serve)
    }

    #[tokio::test]
    async fn what_a_proxy_answers() {
        let (through, asked) = said(b"HTTP/1.1 200 Connection established\r\n\r\n", "").await;
        assert!(through.is_ok());
        assert_eq!(asked, "CONNECT hub.example:7443 HTTP/1.1\r\nHost: hub.example:7443\r\n\r\n");
        let (_, asked) = said(b"HTTP/1.1 200 x\r\n\r\n", "me:p%40ss@").await;
        assert!(asked.contains("\r\nProxy-Authorization: Basic bWU6cEBzcw==\r\n"), "{asked}");
        use ProxyError as E;
        assert!(matches!(said(b"HTTP/1.1 407 x\r\n\r\n", "").await.0, Err(E::NoPassword { .. })));
        assert!(matches!(said(b"HTTP/1.1 407 x\r\n\r\n", "me:geheim@").await.0, Err(E::WrongPassword { .. })));
        let refused = said(b"HTTP/1.1 403 Not for you\r\nContent-Length: 2\r\n\r\nno", "me:geheim@").await.0.unwrap_err();
        assert!(matches!(&refused, E::Refused { answer, .. } if answer == "403 Not for you"), "{refused}");
        assert!(!format!("{refused} {refused:?}").contains("geheim"));
        for rubbish in [&b"SSH-2.0-OpenSSH\r\n"[..], b"", b"HTTP/1.1 200 x\r\n\r\nearly"] {
            assert!(matches!(said(rubbish, "").await.0, Err(E::Rubbish { .. })), "{rubbish:?}");
        }
    }
}

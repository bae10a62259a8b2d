//! From where a request truly came: the other end of its connection, or what a proxy says that is trusted.

use axum::http::HeaderMap;
use ipnet::IpNet;
use std::net::{IpAddr, SocketAddr};

const FORWARDED_FOR: &str = "x-forwarded-for";

/// Addresses and networks (`10.0.0.0/8`).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Networks(Vec<IpNet>);

impl Networks {
    pub fn parse<'a>(texts: impl IntoIterator<Item = &'a str>) -> Result<Self, String> {
        let one = |text: &str| {
            let ip = |ip: IpAddr| IpNet::from(ip.to_canonical());
            let found = text.parse::<IpAddr>().map(ip).or_else(|_| text.parse::<IpNet>().map(|n| n.trunc()));
            found.map_err(|_| format!("{text:?} is neither an address nor a network such as 10.0.0.0/8"))
        };
        texts.into_iter().map(one).collect::<Result<_, _>>().map(Self)
    }
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
    pub fn contains(&self, ip: IpAddr) -> bool {
        self.0.iter().any(|n| n.contains(&ip))
    }
}

/// The client of a request: `peer`, unless that is one of the `trusted` proxies. Then it is the last address
/// of `X-Forwarded-For` that is not one of them, since each proxy adds at the end whom it heard. What stands
/// before it is anybody's word.
pub fn client(trusted: &Networks, peer: IpAddr, headers: &HeaderMap) -> IpAddr {
    let mut client = peer;
    let lines = headers.get_all(FORWARDED_FOR).iter().rev();
    // A line that is no text ends the way back, like an address that is none.
    let mut back = lines.flat_map(|v| v.to_str().unwrap_or("?").rsplit(','));
    while trusted.contains(client) {
        match back.next().and_then(address) {
            Some(before) => client = before,
            None => break,
        }
    }
    client
}

/// An address, or one with a port, as some proxies write it.
fn address(text: &str) -> Option<IpAddr> {
    let text = text.trim();
    let plain = text.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>().ok();
    plain.or_else(|| text.parse::<SocketAddr>().ok().map(|a| a.ip())).map(|ip| ip.to_canonical())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(trusted: &[&str], peer: &str, lines: &[&str]) -> String {
        let mut headers = HeaderMap::new();
        for line in lines {
            headers.append(FORWARDED_FOR, line.parse().unwrap());
        }
        client(&Networks::parse(trusted.iter().copied()).unwrap(), peer.parse().unwrap(), &headers).to_string()
    }

    #[test]
    fn only_trusted_proxies_are_believed() {
        let near = &["10.0.0.0/8", "fd00::1"][..];
        for (trusted, peer, lines, is) in [
            // Nobody is trusted, or not this one.
            (&[][..], "10.0.0.1", &["1.2.3.4"][..], "10.0.0.1"),
            (near, "192.0.2.7", &["1.2.3.4"], "192.0.2.7"),
            (near, "192.0.2.7", &["10.0.0.9, 10.0.0.8"], "192.0.2.7"),
            (near, "10.0.0.1", &[], "10.0.0.1"),
            (near, "10.0.0.1", &["1.2.3.4"], "1.2.3.4"),
            // What the client itself had sent stands before.
            (near, "10.0.0.1", &["127.0.0.1, 9.9.9.9, 1.2.3.4"], "1.2.3.4"),
            (near, "10.0.0.1", &["9.9.9.9", "1.2.3.4, 10.0.0.2"], "1.2.3.4"),
            (near, "10.0.0.1", &["9.9.9.9, 1.2.3.4", "10.0.0.2"], "1.2.3.4"),
            // A way back that cannot be read ends at the last that was.
            (near, "10.0.0.1", &["1.2.3.4, unknown, 10.0.0.2"], "10.0.0.2"),
            (near, "10.0.0.1", &[""], "10.0.0.1"),
            (near, "10.0.0.1", &["10.0.0.3, 10.0.0.2"], "10.0.0.3"),
            (near, "fd00::1", &["[2001:db8::7]:443"], "2001:db8::7"),
            (near, "fd00::1", &["2001:db8::7"], "2001:db8::7"),
            (near, "10.0.0.1", &["1.2.3.4:5678"], "1.2.3.4"),
            (near, "10.0.0.1", &["::ffff:1.2.3.4"], "1.2.3.4"),
        ] {
            assert_eq!(of(trusted, peer, lines), is, "{trusted:?} {peer} {lines:?}");
        }
    }

    #[test]
    fn networks_are_checked() {
        for bad in ["10.0.0.0/33", "hub.example", "", "10.0.0"] {
            assert!(Networks::parse([bad]).unwrap_err().contains("neither"), "{bad}");
        }
        let n = Networks::parse(["10.1.2.3/8", "::ffff:1.2.3.4"]).unwrap();
        assert!(n.contains("10.200.0.1".parse().unwrap()) && n.contains("1.2.3.4".parse().unwrap()));
        assert!(!n.contains("11.0.0.1".parse().unwrap()));
    }
}

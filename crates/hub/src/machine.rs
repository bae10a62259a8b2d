//! What this machine is called by others: its name and its addresses.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use sysinfo::Networks;

/// More would only be noise in an invite.
const MOST: usize = 8;
/// Addresses for documentation: asked for the way to them, nothing is sent.
const FAR: [(&str, &str); 2] = [("0.0.0.0:0", "198.51.100.1:9"), ("[::]:0", "[2001:db8::1]:9")];

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Machine {
    pub name: Option<String>,
    /// Without those that no other machine can use; the one that leads to others first.
    pub addresses: Vec<IpAddr>,
}

impl Machine {
    /// As it is now.
    pub fn look() -> Self {
        let name = rustix::system::uname().nodename().to_string_lossy().to_ascii_lowercase();
        let towards = |(from, to): (&str, &str)| -> Option<IpAddr> {
            let socket = UdpSocket::bind(from).ok()?;
            socket.connect(to).ok()?;
            socket.local_addr().ok().map(|a: SocketAddr| a.ip())
        };
        let networks = Networks::new_with_refreshed_list()
            .inspect_err(|error| tracing::warn!(%error, "the addresses of this machine cannot be listed"));
        let mut all: Vec<IpAddr> = networks.iter().flat_map(|n| n.values()).flat_map(|n| n.ip_networks()).map(|n| n.addr).collect();
        // IPv4 first: it is what a home or an office can be counted on to have.
        all.sort();
        Self::of(&name, FAR.into_iter().filter_map(towards).chain(all))
    }

    fn of(name: &str, addresses: impl IntoIterator<Item = IpAddr>) -> Self {
        let named = !name.is_empty() && name != "localhost" && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-.".contains(&b));
        let mut found: Vec<IpAddr> = vec![];
        for ip in addresses.into_iter().map(|ip| ip.to_canonical()).filter(for_others) {
            if !found.contains(&ip) && found.len() < MOST {
                found.push(ip);
            }
        }
        Self { name: named.then(|| name.to_owned()), addresses: found }
    }
}

fn for_others(ip: &IpAddr) -> bool {
    let link_local = match ip {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    !(ip.is_loopback() || ip.is_unspecified() || ip.is_multicast() || link_local)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_others_can_use_is_told() {
        let texts = ["192.168.1.5", "127.0.0.1", "::1", "169.254.3.4", "fe80::1", "0.0.0.0", "fd00::2", "192.168.1.5", "::ffff:10.0.0.1"];
        let m = Machine::of("box", texts.iter().map(|t| t.parse().unwrap()));
        assert_eq!(m.addresses.iter().map(IpAddr::to_string).collect::<Vec<_>>(), ["192.168.1.5", "fd00::2", "10.0.0.1"]);
        assert_eq!(m.name.as_deref(), Some("box"));
        for none in ["", "localhost", "a b", "x\"y"] {
            assert_eq!(Machine::of(none, []), Machine::default(), "{none:?}");
        }
    }
}

//! Where others find this hub: what invites say, whom its certificate is for, by which names it is asked.

use crate::config::{Config, host_of};
use crate::doors::hosts::{Hosts, plain};
use crate::doors::https::Tls;
use crate::machine::Machine;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

#[derive(Debug, Clone)]
pub struct Reach {
    /// What an invite and a download link name.
    pub url: String,
    /// Where nodes dial, and where else they may.
    pub node: String,
    pub also: Vec<String>,
    pub hosts: Hosts,
    /// Whom a certificate for the doors by the hub's own authority is for.
    pub names: Vec<String>,
}

impl Reach {
    /// For a hub that is bound to these addresses; `certified` are the names in a given certificate.
    pub fn of(config: &Config, machine: &Machine, http: SocketAddr, node: SocketAddr, certified: &[String]) -> Self {
        let scheme = if config.tls == Tls::None { "http" } else { "https" };
        let url = match &config.public_url {
            Some(url) => url.trim_end_matches('/').to_owned(),
            None => format!("{scheme}://{}", dialled(http, machine)),
        };
        let public_host = config.public_url.as_deref().and_then(host_of);
        let (node, also) = match (&config.node_public_addr, public_host) {
            (Some(address), _) => (address.clone(), vec![]),
            (None, Some(host)) if node.ip().is_unspecified() => (format!("{host}:{}", node.port()), vec![]),
            (None, _) => (dialled(node, machine).to_string(), others(node, machine)),
        };
        let mut names = vec!["localhost".to_owned(), Ipv4Addr::LOCALHOST.to_string(), Ipv6Addr::LOCALHOST.to_string()];
        names.extend(
            machine.name.iter().flat_map(|n| if n.contains('.') { vec![n.clone()] } else { vec![n.clone(), format!("{n}.local")] }),
        );
        names.extend(public_host.and_then(plain));
        names.extend(config.allowed_hosts.iter().cloned());
        // By its addresses it may be asked for anyhow, each on its own connections.
        let node_host = host_of(&format!("https://{node}")).and_then(plain);
        let hosts = Hosts::new(names.iter().chain(certified).chain(&node_host).map(String::as_str));
        names.extend(machine.addresses.iter().map(IpAddr::to_string));
        if !http.ip().is_unspecified() {
            names.push(http.ip().to_canonical().to_string());
        }
        let mut seen = std::collections::BTreeSet::new();
        names.retain(|n| seen.insert(n.clone()));
        Self { url, node, also, hosts, names }
    }
}

/// Addresses by which others reach a listener on all addresses; of the family that it listens on.
fn own(listens: SocketAddr, machine: &Machine) -> impl Iterator<Item = IpAddr> {
    let all = if listens.ip().is_unspecified() { machine.addresses.as_slice() } else { &[] };
    all.iter().copied().filter(move |ip| listens.is_ipv6() || ip.is_ipv4())
}

/// The address that one dials to come to a listener. One on all addresses of a machine without any but
/// loopback is reached by that alone.
fn dialled(listens: SocketAddr, machine: &Machine) -> SocketAddr {
    let loopback = || match listens.ip() {
        ip if !ip.is_unspecified() => ip,
        IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
    };
    SocketAddr::new(own(listens, machine).next().unwrap_or_else(loopback), listens.port())
}

/// The machine's other addresses, and its name, which other machines may or may not know.
fn others(listens: SocketAddr, machine: &Machine) -> Vec<String> {
    let addresses = own(listens, machine).skip(1).map(|ip| SocketAddr::new(ip, listens.port()).to_string());
    let name = machine.name.as_ref().filter(|_| listens.ip().is_unspecified()).map(|n| format!("{n}:{}", listens.port()));
    addresses.chain(name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Flags;

    fn machine(name: &str, addresses: &[&str]) -> Machine {
        Machine { name: Some(name.to_owned()), addresses: addresses.iter().map(|a| a.parse().unwrap()).collect() }
    }
    fn config(text: &str, lan: bool) -> Config {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("hub.toml");
        std::fs::write(&path, text).unwrap();
        Config::load(&Flags { config: Some(path), lan, ..Default::default() }).unwrap()
    }
    fn at(a: &str) -> SocketAddr {
        a.parse().unwrap()
    }

    #[test]
    fn invites_name_what_other_machines_can_reach() {
        let box_ = machine("box", &["192.168.1.5", "fd00::2"]);
        let of = |text: &str, lan: bool, m: &Machine, http: &str, node: &str| {
            let r = Reach::of(&config(text, lan), m, at(http), at(node), &[]);
            (r.url, r.node, r.also.join(" "))
        };
        let is = |url: &str, node: &str, also: &str| (url.to_owned(), node.to_owned(), also.to_owned());
        assert_eq!(of("", false, &box_, "127.0.0.1:8080", "127.0.0.1:7443"), is("http://127.0.0.1:8080", "127.0.0.1:7443", ""));
        assert_eq!(
            of("", true, &box_, "[::]:8080", "[::]:7443"),
            is("https://192.168.1.5:8080", "192.168.1.5:7443", "[fd00::2]:7443 box:7443")
        );
        assert_eq!(
            of("", true, &box_, "0.0.0.0:8080", "0.0.0.0:7443"),
            is("https://192.168.1.5:8080", "192.168.1.5:7443", "box:7443"),
            "without IPv6"
        );
        assert_eq!(
            of("", true, &machine("box", &["fd00::2"]), "[::]:8080", "[::]:7443"),
            is("https://[fd00::2]:8080", "[fd00::2]:7443", "box:7443")
        );
        // Nothing but loopback: the invite says so.
        assert_eq!(of("", true, &machine("box", &[]), "[::]:80", "[::]:81"), is("https://[::1]:80", "[::1]:81", "box:81"));
        let public = "[http]\npublic_url = \"https://hub.example/x/\"\n";
        assert_eq!(of(public, true, &box_, "[::]:8080", "[::]:7443"), is("https://hub.example/x", "hub.example:7443", ""));
        assert_eq!(of(public, false, &box_, "[::1]:8080", "[::1]:7443"), is("https://hub.example/x", "[::1]:7443", ""));
        let both = format!("{public}[node]\npublic_addr = \"[fd00::9]:443\"\n");
        assert_eq!(of(&both, true, &box_, "[::]:8080", "[::]:7443"), is("https://hub.example/x", "[fd00::9]:443", ""));
    }

    #[test]
    fn certificate_and_hosts_know_the_hubs_names() {
        let text =
            "[http]\npublic_url = \"https://hub.example\"\nallowed_hosts = [\"*.lan.example\"]\n[node]\npublic_addr = \"link.example:1\"\n";
        let r =
            Reach::of(&config(text, true), &machine("box", &["192.168.1.5"]), at("[::]:8080"), at("[::]:7443"), &["given.example".into()]);
        assert_eq!(r.names, ["localhost", "127.0.0.1", "::1", "box", "box.local", "hub.example", "*.lan.example", "192.168.1.5"]);
        for name in ["box", "box.local", "hub.example", "a.lan.example", "given.example", "link.example"] {
            assert!(r.hosts.allow(name, None), "{name}");
        }
        // An address is good on the connections that lead to it.
        assert!(!r.hosts.allow("192.168.1.5", None) && r.hosts.allow("192.168.1.5", Some("192.168.1.5".parse().unwrap())));
        assert!(!r.hosts.allow("evil.example", None));
    }
}

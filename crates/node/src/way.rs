//! How this machine gets to its hub: the addresses that are tried in turn, and the proxy between.

use crate::tls::{self, TlsError};
use mesh_process::proxy::{Proxies, Proxy};
use rustls::ClientConfig;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;

/// How long one address may take to be reached, and then for its handshake.
const PATIENCE: Duration = Duration::from_secs(10);

#[derive(Debug, Clone)]
pub struct Way {
    /// `host:port`; at least one.
    addresses: Arc<[String]>,
    proxies: Proxies,
    /// Which of them was good last.
    good: Arc<AtomicUsize>,
}

impl std::fmt::Display for Way {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.addresses.join(","))
    }
}

impl Way {
    pub fn new(first: &str, also: &[String], proxies: Proxies) -> Self {
        let addresses = std::iter::once(first).chain(also.iter().map(String::as_str)).map(str::to_owned).collect();
        Self { addresses, proxies, good: Arc::default() }
    }
    /// From the text that [`Way`] is displayed as.
    pub fn parse(text: &str, proxies: Proxies) -> Self {
        Self { addresses: text.split(',').map(str::to_owned).collect(), proxies, good: Arc::default() }
    }

    /// All addresses, the one that was good last at the head.
    pub fn addresses(&self) -> impl Iterator<Item = &str> {
        let from = self.good.load(Ordering::Relaxed);
        (0..self.addresses.len()).map(move |i| self.addresses[(from + i) % self.addresses.len()].as_str())
    }
    pub fn proxy(&self, address: &str) -> Option<Proxy> {
        self.proxies.of("https", address)
    }

    /// TLS with the hub at the first address that leads to it, whatever the address is called.
    pub async fn connect(&self, name: &str, config: Arc<ClientConfig>) -> Result<TlsStream<TcpStream>, TlsError> {
        let mut failed: Vec<TlsError> = vec![];
        for address in self.addresses() {
            match self.try_one(address, name, config.clone()).await {
                Ok(stream) => {
                    let good = self.addresses.iter().position(|a| a == address).unwrap_or(0);
                    self.good.store(good, Ordering::Relaxed);
                    return Ok(stream);
                }
                Err(e) => failed.push(e),
            }
        }
        match failed.pop() {
            Some(only) if failed.is_empty() => Err(only),
            last => Err(TlsError::All(failed.into_iter().chain(last).map(|e| e.to_string()).collect::<Vec<_>>().join("; "))),
        }
    }

    async fn try_one(&self, address: &str, name: &str, config: Arc<ClientConfig>) -> Result<TlsStream<TcpStream>, TlsError> {
        let late = || TlsError::Late { address: address.to_owned(), secs: PATIENCE.as_secs() };
        let tcp = self.reach(address).await?;
        tokio::time::timeout(PATIENCE, tls::handshake(tcp, address, name, config)).await.map_err(|_| late())?
    }

    /// The first address that can be reached; else simply the first.
    pub async fn first(&self) -> &str {
        if self.addresses.len() > 1 {
            for address in self.addresses() {
                if self.reach(address).await.is_ok() {
                    return address;
                }
            }
        }
        self.addresses().next().unwrap_or_default()
    }

    /// TCP to the hub's address, or through the proxy.
    pub async fn reach(&self, address: &str) -> Result<TcpStream, TlsError> {
        if let Some(proxy) = self.proxy(address) {
            return Ok(proxy.connect(address).await?);
        }
        match tokio::time::timeout(PATIENCE, TcpStream::connect(address)).await {
            Ok(connected) => connected.map_err(|source| TlsError::Connect { address: address.to_owned(), source }),
            Err(_) => Err(TlsError::Late { address: address.to_owned(), secs: PATIENCE.as_secs() }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::{TcpListener, TcpSocket};

    #[test]
    fn addresses_go_in_and_come_out() {
        let way = Way::new("hub:1", &["[::1]:2".into(), "10.0.0.1:3".into()], Proxies::default());
        assert_eq!(way.to_string(), "hub:1,[::1]:2,10.0.0.1:3");
        assert_eq!(Way::parse(&way.to_string(), Proxies::default()).addresses().collect::<Vec<_>>(), way.addresses().collect::<Vec<_>>());
        way.good.store(2, Ordering::Relaxed);
        assert_eq!(way.addresses().collect::<Vec<_>>(), ["10.0.0.1:3", "hub:1", "[::1]:2"]);
    }

    #[tokio::test]
    async fn each_address_is_tried_and_each_failure_told() {
        // Held, so that nobody else is there.
        let closed = TcpSocket::new_v4().unwrap();
        closed.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let closed_at = closed.local_addr().unwrap().to_string();
        let open = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let open_at = open.local_addr().unwrap().to_string();
        let way = Way::new(&closed_at, std::slice::from_ref(&open_at), Proxies::default());
        assert_eq!(way.first().await, open_at);
        drop(open);
        mesh_process::install_tls_provider();
        let time = crate::link::time::NodeTime::new(0, mesh_process::SystemClock::shared());
        let config = tls::client_config([0; 32], None, time).unwrap();
        let e = way.connect("hub.cortex", config).await.unwrap_err();
        assert!(matches!(e, TlsError::All(_)) && e.to_string().contains(&closed_at) && e.to_string().contains(&open_at), "{e}");
    }
}

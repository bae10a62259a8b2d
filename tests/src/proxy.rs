//! An HTTP proxy that knows CONNECT alone, as small as it can be, and that can be told to misbehave.

use std::sync::{Arc, Mutex};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// What it does to who asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mood {
    Connects,
    /// Connects who brings this value of `Proxy-Authorization`, else 407.
    Wants(&'static str),
    Refuses,
    Hangs,
    Rubbish,
}

/// It knows every name as this machine, so that a test needs no DNS.
pub struct Proxy {
    pub address: String,
    heads: Arc<Mutex<Vec<String>>>,
}

impl Proxy {
    pub async fn start(mood: Mood) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("an address").to_string();
        let heads = Arc::new(Mutex::new(vec![]));
        let asked = heads.clone();
        let runtime = tokio::runtime::Handle::current();
        runtime.clone().spawn(async move {
            while let Ok((io, _)) = listener.accept().await {
                runtime.spawn(serve(io, mood.clone(), asked.clone()));
            }
        });
        Self { address, heads }
    }
    /// Heads of all requests so far.
    pub fn asked(&self) -> Vec<String> {
        self.heads.lock().expect("no test panics with it").clone()
    }
    /// Was a way asked for to this `host:port`?
    pub fn led_to(&self, target: &str) -> bool {
        self.asked().iter().any(|head| head.starts_with(&format!("CONNECT {target} HTTP/1.1\r\n")))
    }
}

async fn serve(mut io: TcpStream, mood: Mood, asked: Arc<Mutex<Vec<String>>>) {
    let mut head = vec![];
    while !head.ends_with(b"\r\n\r\n") {
        if !matches!(io.read_buf(&mut head).await, Ok(n) if n > 0) {
            return;
        }
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    asked.lock().expect("no test panics with it").push(head.clone());
    let refusal = match &mood {
        Mood::Wants(value) if !head.contains(&format!("\r\nProxy-Authorization: {value}\r\n")) => {
            "HTTP/1.1 407 Proxy Authentication Required\r\nProxy-Authenticate: Basic realm=\"x\"\r\nContent-Length: 0\r\n\r\n"
        }
        Mood::Refuses => "HTTP/1.1 403 Not this one\r\nContent-Length: 0\r\n\r\n",
        Mood::Rubbish => "220 mail.example ESMTP\r\n\r\n",
        Mood::Hangs => {
            // Until the other side has had enough.
            let _ = io.read_to_end(&mut vec![]).await;
            return;
        }
        Mood::Connects | Mood::Wants(_) => "",
    };
    if !refusal.is_empty() {
        let _ = io.write_all(refusal.as_bytes()).await;
        return;
    }
    let target = head.split(' ').nth(1).unwrap_or_default();
    let port = target.rsplit_once(':').map_or("0", |(_, port)| port);
    let Ok(mut there) = TcpStream::connect(format!("127.0.0.1:{port}")).await else {
        let _ = io.write_all(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n").await;
        return;
    };
    if io.write_all(b"HTTP/1.1 200 Connection established\r\nVia: test\r\n\r\n").await.is_ok() {
        let _ = tokio::io::copy_bidirectional(&mut io, &mut there).await;
    }
}

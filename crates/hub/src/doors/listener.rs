//! Listeners of the doors: how many connections there may be, and how long each may keep us waiting.
//!
//! One task serves one connection. What it does is written down in its [`Watch`]: by the socket, by each
//! request and by each body that is sent. From that alone follows when it is cut.

mod watch;

use super::forwarded::Networks;
use crate::link::crowd::{self, Crowd};
use axum::Router;
use axum::body::Body;
use futures::future::poll_fn;
use hyper::body::Incoming;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use mesh_process::{CancellationToken, Tasks};
use std::convert::Infallible;
use std::future::Future;
use std::net::{IpAddr, SocketAddr};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::time::Instant;
use tower::ServiceExt;
use watch::{Place, Sent, Socket, Watch};

pub use watch::Cut;

/// What a request may say before its body, in bytes and in lines.
const HEAD_BYTES: usize = 32 << 10;
const HEAD_LINES: usize = 100;
/// Requests at once on one HTTP/2 connection, and what each may have us hold for a reader.
const STREAMS_AT_ONCE: u32 = 100;
const STREAM_WAITING: usize = 64 << 10;
const H2_PING: Duration = Duration::from_secs(20);
/// How long to rest when the system gives no more connections (descriptors, memory).
const ACCEPT_REST: Duration = Duration::from_millis(100);
/// Requests end on tasks of their own: the connection looks again now and then.
const LOOK_AGAIN: Duration = Duration::from_secs(10);
/// Sent bytes that the other machine does not acknowledge for so long say that it is gone.
const UNACKNOWLEDGED_MS: u32 = 90_000;
/// Whoever is too many hears this, if one write can carry it.
const TOO_MANY: &[u8] =
    b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\nContent-Length: 20\r\n\r\ntoo many connections";

/// What one listener grants.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    pub connections: usize,
    /// From the first byte of a request to the end of its headers.
    pub head: Duration,
    /// Without a request.
    pub idle: Duration,
    /// Without taking anything of what is sent.
    pub stalled: Duration,
    /// What a stop leaves to requests under way.
    pub grace: Duration,
}

impl Limits {
    pub fn of(connections: usize) -> Self {
        let s = Duration::from_secs;
        Self { connections, head: s(10), idle: s(75), stalled: s(60), grace: s(8) }
    }
}

/// What each network may have of a listener's connections, so that none takes all of them.
#[derive(Clone)]
pub struct Shares {
    crowd: Arc<Crowd>,
    /// One of them is many.
    proxies: Networks,
}

impl Shares {
    pub fn new(most: u32, proxies: Networks) -> Self {
        Self { crowd: Crowd::new(most), proxies }
    }
    /// None: too many. What comes from this machine is not counted: it may be a proxy that nobody told of.
    fn enter(&self, peer: Peer) -> Option<Option<crowd::Place>> {
        match peer.address.filter(|a| !a.is_loopback() && !self.proxies.contains(*a)) {
            Some(address) => self.crowd.enter(address).map(Some),
            None => Some(None),
        }
    }
}

/// Something that connections come from.
pub trait Accept: Send + Sync + 'static {
    type Io: AsyncRead + AsyncWrite + Unpin + Send + 'static;
    /// `None`: somebody who may not come in.
    fn accept(&mut self) -> impl Future<Output = std::io::Result<Option<(Self::Io, Peer)>>> + Send;
}

/// The far end of a connection. Each request that comes by it has this among its extensions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    /// None: a process of this machine, by a socket file.
    pub address: Option<IpAddr>,
    /// The address of ours that it came to.
    pub local: Option<IpAddr>,
}

impl Peer {
    /// Who is at the other end of a connection that has just come, and prepares it.
    pub fn of(io: &TcpStream, from: SocketAddr) -> Self {
        // Neither is worth a connection.
        let _ = io.set_nodelay(true);
        let _ = rustix::net::sockopt::set_tcp_user_timeout(io, UNACKNOWLEDGED_MS);
        // One listener for both families tells IPv4 addresses in the form of IPv6.
        Self { address: Some(from.ip().to_canonical()), local: io.local_addr().ok().map(|a| a.ip().to_canonical()) }
    }
}

impl Accept for TcpListener {
    type Io = TcpStream;
    async fn accept(&mut self) -> std::io::Result<Option<(TcpStream, Peer)>> {
        let (io, from) = TcpListener::accept(self).await?;
        let peer = Peer::of(&io, from);
        Ok(Some((io, peer)))
    }
}

/// Connections of one uid alone.
pub struct OwnUid {
    pub listener: UnixListener,
    pub own: u32,
}

impl Accept for OwnUid {
    type Io = UnixStream;
    async fn accept(&mut self) -> std::io::Result<Option<(UnixStream, Peer)>> {
        let (io, _) = self.listener.accept().await?;
        if io.peer_cred().is_ok_and(|c| c.uid() == self.own) {
            return Ok(Some((io, Peer { address: None, local: None })));
        }
        tracing::warn!("another uid knocked at the control socket");
        Ok(None)
    }
}

/// Serves `app` until the group is asked to end; then lets requests under way come to theirs.
pub async fn serve<L: Accept>(
    name: &'static str,
    mut listener: L,
    app: Router,
    limits: Limits,
    shares: Option<Shares>,
    tasks: Tasks,
) -> Result<(), Infallible> {
    let stop = tasks.token();
    let places = Arc::new(Semaphore::new(limits.connections));
    // Told once until it is over: what makes it happen makes it happen often.
    let mut full = false;
    loop {
        let came = tokio::select! {
            biased;
            () = stop.cancelled() => return Ok(()),
            came = listener.accept() => came,
        };
        let (io, peer) = match came {
            Ok(Some(came)) => came,
            Ok(None) => continue,
            Err(error) => {
                tracing::warn!(listener = name, %error, "a connection cannot be accepted");
                tokio::time::sleep(ACCEPT_REST).await;
                continue;
            }
        };
        let Ok(permit) = places.clone().try_acquire_owned() else {
            metrics::counter!("cortex_http_connections_refused_total", "listener" => name).increment(1);
            if !std::mem::replace(&mut full, true) {
                tracing::warn!(listener = name, limit = limits.connections, "all connections are taken; more are refused");
            }
            refuse(io);
            continue;
        };
        full = false;
        let Some(share) = shares.as_ref().map_or(Some(None), |shares| shares.enter(peer)) else {
            metrics::counter!("cortex_http_connections_refused_total", "listener" => name).increment(1);
            tracing::debug!(listener = name, address = ?peer.address, "too many connections of one address; more are refused");
            refuse(io);
            continue;
        };
        let watch = Arc::new(Watch::new(limits));
        let socket = Socket::new(io, watch.clone(), Place::take(name, permit, share));
        let connection = connection((name, peer), socket, watch, app.clone(), tasks.clone(), stop.clone());
        tasks.spawn("http connection", connection);
    }
}

fn refuse(mut io: impl AsyncWrite + Unpin) {
    let cx = &mut Context::from_waker(Waker::noop());
    let _ = Pin::new(&mut io).poll_write(cx, TOO_MANY);
    let _ = Pin::new(&mut io).poll_shutdown(cx);
}

async fn connection<I>(
    (name, peer): (&'static str, Peer),
    socket: Socket<I>,
    watch: Arc<Watch>,
    app: Router,
    tasks: Tasks,
    stop: CancellationToken,
) where
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let own = watch.clone();
    let service = hyper::service::service_fn(move |request: hyper::Request<Incoming>| {
        let (mut request, under_way) = (request.map(Body::new), Watch::request(&own));
        request.extensions_mut().insert(peer);
        let answer = app.clone().oneshot(request);
        async move { answer.await.map(|response| response.map(|body| Sent::new(body, under_way))) }
    });
    let mut builder = auto::Builder::new(Streams(tasks));
    // The watch knows the time of heads and of silence; hyper would give both the same.
    builder.http1().timer(TokioTimer::new()).header_read_timeout(None).max_headers(HEAD_LINES).max_buf_size(HEAD_BYTES);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS_AT_ONCE)
        .max_header_list_size(HEAD_BYTES as u32)
        .max_send_buf_size(STREAM_WAITING)
        .keep_alive_interval(H2_PING)
        .keep_alive_timeout(H2_PING);
    let conn = builder.serve_connection_with_upgrades(TokioIo::new(socket), service);
    let mut conn = pin!(conn);
    let mut stopping = pin!(stop.cancelled());
    let mut look = Instant::now() + LOOK_AGAIN;
    let mut timer = pin!(tokio::time::sleep_until(look));
    let cut = poll_fn(|cx| {
        if !watch.is_ending() && stopping.as_mut().poll(cx).is_ready() {
            watch.end();
            conn.as_mut().graceful_shutdown();
        }
        if let Poll::Ready(done) = conn.as_mut().poll(cx) {
            if let Err(error) = done {
                tracing::trace!(listener = name, %error, "a connection broke");
            }
            return Poll::Ready(None);
        }
        loop {
            let (now, due) = (Instant::now(), watch.due());
            if let Some((_, cut)) = due.filter(|(at, _)| *at <= now) {
                return Poll::Ready(Some(cut));
            }
            if look <= now {
                look = now + LOOK_AGAIN;
            }
            let at = due.map_or(look, |(at, _)| at.min(look));
            if timer.deadline() != at {
                timer.as_mut().reset(at);
            }
            if timer.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
        }
    });
    if let Some(cut) = cut.await {
        metrics::counter!("cortex_http_connections_cut_total", "listener" => name, "reason" => cut.as_str()).increment(1);
        if cut == Cut::Stopping && watch.is_busy() {
            tracing::warn!(listener = name, "a request was cut off: the hub stops, and its time was up");
        }
        tracing::debug!(listener = name, reason = cut.as_str(), "a connection was cut");
    }
}

/// Runs the streams of HTTP/2 connections as tasks of the doors.
#[derive(Clone)]
struct Streams(Tasks);

impl<F> hyper::rt::Executor<F> for Streams
where
    F: Future + Send + 'static,
    F::Output: Send,
{
    fn execute(&self, stream: F) {
        self.0.spawn("http stream", async move {
            stream.await;
        });
    }
}

#[cfg(test)]
mod tests;

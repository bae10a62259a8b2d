//! What one connection is doing, and when that has lasted too long.

use super::Limits;
use crate::link::crowd;
use axum::body::{Body, Bytes};
use hyper::body::{Frame, SizeHint};
use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;

/// With these an HTTP/2 connection begins.
const PREFACE: &[u8] = b"PRI ";
/// What a stop leaves to a connection without a request, for its last words.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Why a connection was cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// No request for too long.
    Idle,
    /// The headers of a request did not come to an end.
    SlowHead,
    /// What is sent is not taken.
    Stalled,
    /// The hub stops, and the requests under way have had their time.
    Stopping,
}

impl Cut {
    pub const ALL: [Self; 4] = [Self::Idle, Self::SlowHead, Self::Stalled, Self::Stopping];
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::SlowHead => "slow_head",
            Self::Stalled => "stalled",
            Self::Stopping => "stopping",
        }
    }
}

#[derive(Debug)]
pub struct Watch {
    limits: Limits,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// Requests without their whole answer.
    under_way: u32,
    /// Since when there is none.
    quiet: Instant,
    /// When the head of the next one began.
    head: Option<Instant>,
    /// The first bytes, as far as they fit the preface; `None` when they do not, or were all seen.
    preface: Option<usize>,
    /// HTTP/2 sends frames of its own between requests, so they say nothing of a head.
    h2: bool,
    /// Since when the socket takes nothing.
    blocked: Option<Instant>,
    /// Bodies of which a part was given and not asked for the next: since when.
    untaken: BTreeMap<u64, Instant>,
    next: u64,
    ending: Option<Instant>,
}

impl Watch {
    pub fn new(limits: Limits) -> Self {
        let state = State {
            under_way: 0,
            quiet: Instant::now(),
            head: None,
            preface: Some(0),
            h2: false,
            blocked: None,
            untaken: BTreeMap::new(),
            next: 0,
            ending: None,
        };
        Self { limits, state: Mutex::new(state) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a request; it is under way until what is given is dropped.
    pub fn request(own: &Arc<Self>) -> UnderWay {
        let mut s = own.state();
        s.under_way += 1;
        s.head = None;
        s.next += 1;
        UnderWay { watch: own.clone(), no: s.next }
    }
    /// The hub stops.
    pub fn end(&self) {
        self.state().ending = Some(Instant::now());
    }
    pub fn is_ending(&self) -> bool {
        self.state().ending.is_some()
    }

    /// Has it a request without its whole answer?
    pub fn is_busy(&self) -> bool {
        self.state().under_way > 0
    }

    /// When the connection is to be cut if nothing changes, and why.
    pub fn due(&self) -> Option<(Instant, Cut)> {
        let (s, l) = (self.state(), self.limits);
        let stalled = s.blocked.into_iter().chain(s.untaken.values().copied()).min().map(|t| (t + l.stalled, Cut::Stalled));
        let silent = (s.under_way == 0).then(|| match s.head {
            Some(begun) => (begun + l.head, Cut::SlowHead),
            None => (s.quiet + l.idle, Cut::Idle),
        });
        let ending = s.ending.map(|t| (t + if s.under_way == 0 { LAST_WORDS.min(l.grace) } else { l.grace }, Cut::Stopping));
        [stalled, silent, ending].into_iter().flatten().min_by_key(|(at, _)| *at)
    }

    fn came(&self, bytes: &[u8]) {
        let mut s = self.state();
        if let Some(seen) = s.preface {
            let n = bytes.len().min(PREFACE.len() - seen);
            s.h2 = bytes[..n] == PREFACE[seen..seen + n] && seen + n == PREFACE.len();
            let more = bytes[..n] == PREFACE[seen..seen + n] && seen + n < PREFACE.len();
            s.preface = more.then_some(seen + n);
        }
        if s.h2 {
            s.head = None;
        } else if s.under_way == 0 && s.head.is_none() {
            s.head = Some(Instant::now());
        }
    }
    fn wrote<T>(&self, took: &Poll<T>) {
        let mut s = self.state();
        match took {
            Poll::Pending => {
                s.blocked.get_or_insert_with(Instant::now);
            }
            Poll::Ready(_) => s.blocked = None,
        }
    }
}

/// A request until the end of its answer.
#[derive(Debug)]
pub struct UnderWay {
    watch: Arc<Watch>,
    no: u64,
}

impl UnderWay {
    fn given(&self, part: bool) {
        let mut s = self.watch.state();
        if part {
            s.untaken.insert(self.no, Instant::now());
        } else {
            s.untaken.remove(&self.no);
        }
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        let mut s = self.watch.state();
        s.untaken.remove(&self.no);
        s.under_way -= 1;
        s.quiet = Instant::now();
    }
}

/// The body of an answer: it notes whether the other end takes it.
#[derive(Debug)]
pub struct Sent {
    body: Body,
    under_way: UnderWay,
}

impl Sent {
    pub fn new(body: Body, under_way: UnderWay) -> Self {
        Self { body, under_way }
    }
}

impl hyper::body::Body for Sent {
    type Data = Bytes;
    type Error = axum::Error;
    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let frame = Pin::new(&mut self.body).poll_frame(cx);
        // Nothing to give is our own silence, not theirs.
        self.under_way.given(matches!(frame, Poll::Ready(Some(Ok(_)))));
        frame
    }
    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }
    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// One of the connections that a listener has; given back when its socket is closed, and that may be
/// long after it became a WebSocket.
#[derive(Debug)]
pub struct Place {
    listener: &'static str,
    _permit: OwnedSemaphorePermit,
    _share: Option<crowd::Place>,
}

impl Place {
    pub fn take(listener: &'static str, permit: OwnedSemaphorePermit, share: Option<crowd::Place>) -> Self {
        metrics::gauge!("cortex_http_connections", "listener" => listener).increment(1);
        metrics::counter!("cortex_http_connections_accepted_total", "listener" => listener).increment(1);
        Self { listener, _permit: permit, _share: share }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        metrics::gauge!("cortex_http_connections", "listener" => self.listener).decrement(1);
    }
}

/// A socket that tells the watch what passes.
#[derive(Debug)]
pub struct Socket<I> {
    io: I,
    watch: Arc<Watch>,
    _place: Place,
}

impl<I> Socket<I> {
    pub fn new(io: I, watch: Arc<Watch>, place: Place) -> Self {
        Self { io, watch, _place: place }
    }
}

impl<I: AsyncRead + Unpin> AsyncRead for Socket<I> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<std::io::Result<()>> {
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.io).poll_read(cx, buf))?;
        let came = &buf.filled()[before..];
        if !came.is_empty() {
            self.watch.came(came);
        }
        Poll::Ready(Ok(()))
    }
}

impl<I: AsyncWrite + Unpin> AsyncWrite for Socket<I> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<std::io::Result<usize>> {
        let wrote = Pin::new(&mut self.io).poll_write(cx, buf);
        self.watch.wrote(&wrote);
        wrote
    }
    fn poll_write_vectored(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bufs: &[std::io::IoSlice<'_>]) -> Poll<std::io::Result<usize>> {
        let wrote = Pin::new(&mut self.io).poll_write_vectored(cx, bufs);
        self.watch.wrote(&wrote);
        wrote
    }
    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

//! What WebSockets have in common: how they end, how long things may take, how a frame is handed over.

use super::rest::{App, Refusal, Who};
use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::extract::ws::{CloseFrame, Message, WebSocket};
use axum::http::{HeaderMap, StatusCode, Uri};
use bytes::Bytes;
use hub_engine::throttle::{Principal, Rates};
use mesh_process::CancellationToken;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{Instant, Interval, MissedTickBehavior};

pub const GOING_AWAY: u16 = 1001;
pub const PROTOCOL: u16 = 1002;
/// A kind of frame that this door does not take.
pub const UNSUPPORTED: u16 = 1003;
/// The reader's rights have ended, or it says too much.
pub const POLICY: u16 = 1008;
/// Too slow; come back later.
pub const TRY_AGAIN: u16 = 1013;
/// What a close frame can carry.
const MAX_REASON: usize = 123;
/// Who takes less than so many bytes in a millisecond is too slow for a large frame.
const SLOWEST: u64 = 256;

/// How long things may take.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    pub ping_every: Duration,
    /// Without a pong for this long the other end is gone.
    pub pong_within: Duration,
    /// A frame that cannot be handed over in this time says that the reader is too slow.
    pub send_within: Duration,
    pub close_within: Duration,
}

pub const PACE: Pace = Pace {
    ping_every: Duration::from_secs(20),
    pong_within: Duration::from_secs(60),
    send_within: Duration::from_secs(10),
    close_within: Duration::from_secs(1),
};

/// Why a conversation ends. None: the other end has gone already.
pub type End = Option<(u16, String)>;

/// Whose rate what a client says counts for, as requests do.
pub type Inbound = Option<(Arc<Rates>, Principal)>;

/// The principal behind who asks; nobody on the control socket, which has no rate.
pub fn inbound(app: &App, who: &Who) -> Inbound {
    Principal::of(who.caller()).filter(|_| who.asked.address.is_some()).map(|p| (app.rates.clone(), p))
}

/// Refuses pages of others: no browser keeps a socket from them.
pub fn own_origin(app: &App, uri: &Uri, headers: &HeaderMap) -> Result<(), Refusal> {
    use super::rest::origin::{Given, given};
    match given(headers, uri, &app.facts.public_url) {
        Given::Foreign => {
            Err(Refusal::new(StatusCode::FORBIDDEN, "foreign_origin", "a page of another origin may not read this hub's events"))
        }
        _ => Ok(()),
    }
}

pub fn bad_upgrade(e: WebSocketUpgradeRejection) -> Refusal {
    Refusal::new(e.status(), "bad_upgrade", e.body_text())
}

pub fn stopping() -> End {
    Some((GOING_AWAY, "the hub is stopping".into()))
}

pub fn too_slow() -> End {
    Some((TRY_AGAIN, "too slow: events were kept waiting too long; come back with `after` and the last id".into()))
}

/// Pings, and what came back of them.
pub struct Pulse {
    ping: Interval,
    heard: Instant,
    pace: Pace,
}

impl Pulse {
    pub fn new(pace: Pace) -> Self {
        let begun = Instant::now();
        let mut ping = tokio::time::interval_at(begun + pace.ping_every, pace.ping_every);
        ping.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self { ping, heard: begun, pace }
    }
    /// Notes what came: a pong says that the other end lives.
    pub fn note(&mut self, message: &Message) {
        if matches!(message, Message::Pong(_)) {
            self.heard = Instant::now();
        }
    }
    /// Waits until it is time for a ping. Dropping the future loses nothing.
    pub async fn due(&mut self) {
        self.ping.tick().await;
    }
    pub async fn ping(&self, socket: &mut WebSocket, stop: &CancellationToken) -> Result<(), End> {
        if self.heard.elapsed() >= self.pace.pong_within {
            return Err(Some((PROTOCOL, "no pong came".into())));
        }
        say(socket, Message::Ping(Bytes::new()), stop, self.pace).await
    }
}

/// Hands one frame to the socket. What a slow reader makes the hub hold is this frame.
pub async fn say(socket: &mut WebSocket, message: Message, stop: &CancellationToken, pace: Pace) -> Result<(), End> {
    let size = match &message {
        Message::Text(text) => text.len(),
        Message::Binary(bytes) => bytes.len(),
        _ => 0,
    };
    let within = pace.send_within + Duration::from_millis(size as u64 / SLOWEST);
    tokio::select! {
        biased;
        () = stop.cancelled() => Err(stopping()),
        sent = tokio::time::timeout(within, socket.send(message)) => match sent {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(None),
            Err(_) => Err(too_slow()),
        },
    }
}

/// Says why a conversation ends, where there is somebody to hear it.
pub async fn goodbye(mut socket: WebSocket, end: End, pace: Pace) {
    let Some((code, mut reason)) = end else { return };
    tracing::debug!(code, reason, "a websocket is closed");
    while reason.len() > MAX_REASON {
        reason.pop();
    }
    let goodbye = async {
        if socket.send(Message::Close(Some(CloseFrame { code, reason: reason.into() }))).await.is_ok() {
            // Until the other end agrees: closing on unread words would reset the connection, and the
            // reason with it.
            while let Some(Ok(_)) = socket.recv().await {}
        }
    };
    let _ = tokio::time::timeout(pace.close_within, goodbye).await;
}

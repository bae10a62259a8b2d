//! Live events over a WebSocket: the same events as `/events`, one text frame each.
//!
//! What a client says is thrown away, but for pings. A reader that is too slow is dropped and may
//! come back with `?after=`.

use super::rest::events::{Do, EventsQuery, Reader, json, open};
use super::rest::{App, Query, Refusal, Who};
use super::socket::{End, Inbound, PACE, POLICY, Pace, Pulse, bad_upgrade, goodbye, inbound, say, stopping, too_slow};
use axum::extract::State;
use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::http::{HeaderMap, Uri};
use axum::response::{IntoResponse, Response};
use mesh_process::CancellationToken;

/// Nothing that a client says is needed.
const MAX_INBOUND: usize = 64 << 10;
/// Frames that may wait for the socket, in bytes; past it a frame waits with us.
const MAX_WAITING: usize = 256 << 10;

/// Live events over a WebSocket
///
/// One text frame each, shaped as EventView. What a client says is thrown away, but for pings.
#[utoipa::path(
    get, path = "/ws", tag = "events", operation_id = "websocket",
    params(EventsQuery),
    responses(
        (status = 101, description = "The connection is now a WebSocket"),
        (status = 422, description = "A topic that is not built yet"),
        (status = 426, description = "The request does not ask for a WebSocket"),
    ),
)]
pub async fn get(
    State(app): State<App>,
    who: Who,
    Query(q): Query<EventsQuery>,
    uri: Uri,
    headers: HeaderMap,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Result<Response, Refusal> {
    let inbound = inbound(&app, &who);
    let reader = open(&app, who, &q, &uri, &headers)?.through("websocket");
    let upgrade = upgrade.map_err(bad_upgrade)?;
    let (streams, stop) = (app.streams.clone(), app.stop.clone());
    let upgrade = upgrade.max_message_size(MAX_INBOUND).max_frame_size(MAX_INBOUND).max_write_buffer_size(MAX_WAITING);
    // The hub's stop waits for this group, so that each reader hears of it.
    let serve = async move |socket| streams.spawn("websocket", serve(socket, reader, stop, PACE, inbound));
    Ok(upgrade.write_buffer_size(0).on_upgrade(serve).into_response())
}

/// Serves one reader until either end closes.
pub async fn serve(mut socket: WebSocket, mut reader: Reader, stop: CancellationToken, pace: Pace, inbound: Inbound) {
    let end = talk(&mut socket, &mut reader, &stop, pace, &inbound).await;
    goodbye(socket, end, pace).await;
}

async fn talk(socket: &mut WebSocket, reader: &mut Reader, stop: &CancellationToken, pace: Pace, inbound: &Inbound) -> End {
    let mut pulse = Pulse::new(pace);
    loop {
        // No fixed order: neither a talkative client nor a busy hub keeps the rest from its turn.
        tokio::select! {
            () = stop.cancelled() => return stopping(),
            came = socket.recv() => match came {
                None | Some(Err(_) | Ok(Message::Close(_))) => return None,
                Some(Ok(message)) => {
                    if let Some((rates, who)) = inbound
                        && let Err(error) = rates.admit(*who)
                    {
                        return Some((POLICY, error.to_string()));
                    }
                    pulse.note(&message);
                }
            },
            () = pulse.due() => {
                if let Err(end) = pulse.ping(socket, stop).await {
                    return end;
                }
            }
            next = reader.next() => match next {
                Do::Say(view) => {
                    if let Err(end) = say(socket, Message::text(json(&*view)), stop, pace).await {
                        return end;
                    }
                }
                Do::Reset { behind: true, .. } => return too_slow(),
                Do::Reset { views, .. } => {
                    for view in views {
                        if let Err(end) = say(socket, Message::text(json(&view)), stop, pace).await {
                            return end;
                        }
                    }
                }
                Do::Quiet => {}
                Do::Look => {
                    if let Err(why) = reader.look().await {
                        return Some((POLICY, why));
                    }
                }
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::socket::{PROTOCOL, TRY_AGAIN};
    use super::*;
    use crate::keys::{Argon2Passwords, Keys};
    use axum::Router;
    use axum::routing::any;
    use futures::StreamExt;
    use hub_engine::accounts::{Accounts, Authenticated, Lifetimes};
    use hub_engine::bus::{Bus, LocalBus};
    use hub_engine::events::{Data, Events, NodeNews, Whose};
    use hub_engine::ports::Accounts as _;
    use hub_engine::rights::Rights;
    use hub_testkit::MemoryStore;
    use hub_testkit::contract::sample::{key_id, node_id, user, user_id};
    use mesh_core::permission::{Caller, Role, Scope};
    use mesh_process::{SystemClock, Tasks};
    use std::sync::Arc;
    use std::time::Duration;
    use tokio::net::{TcpListener, TcpStream};
    use tokio::time::Instant;
    use tokio_tungstenite::WebSocketStream;
    use tokio_tungstenite::tungstenite::Message as Came;

    const PATIENCE: Duration = Duration::from_secs(90);
    const QUICK: Pace =
        Pace { ping_every: PATIENCE, pong_within: PATIENCE, send_within: Duration::from_secs(2), close_within: Duration::from_millis(200) };

    /// A bus, a key that reads it, and a socket that serves it.
    struct Stage {
        bus: Arc<LocalBus>,
        events: Events,
        store: Arc<MemoryStore>,
        stop: CancellationToken,
        tasks: Tasks,
        address: std::net::SocketAddr,
        _dir: tempfile::TempDir,
    }

    async fn stage(keep: usize, pace: Pace, look_in: Duration) -> Stage {
        let dir = tempfile::tempdir().unwrap();
        let clock = SystemClock::shared();
        let bus = Arc::new(LocalBus::new(keep, Duration::from_secs(600), clock.clone()));
        let events = Events::new(bus.clone(), clock.clone());
        let store = Arc::new(MemoryStore::new());
        store.add_user(&user(1, "one")).await.unwrap();
        let scopes = vec![Scope::parse("nodes:read").unwrap()];
        let key = hub_engine::records::ApiKey {
            id: key_id(1),
            user: user_id(1),
            name: "k".into(),
            prefix: "cmk_".into(),
            mac: [1; 32],
            scopes: scopes.clone(),
            created_at: 0,
            expires_at: None,
            last_used_at: None,
        };
        store.add_key(&key).await.unwrap();
        let accounts = Arc::new(Accounts {
            recent: Default::default(),
            store: store.clone(),
            rights: Arc::new(Rights::new(store.clone(), store.clone(), clock.clone())),
            keyring: Arc::new(Keys::open(dir.path(), clock.now_ms()).unwrap()),
            passwords: Arc::new(Argon2Passwords::new().unwrap()),
            clock: clock.clone(),
            events: events.clone(),
            lifetimes: Lifetimes { access_secs: 600, refresh_days: 30 },
            throttle: hub_engine::throttle::Throttle::new(10, 5, clock.clone()),
            work: Tasks::new(),
        });
        let (stop, tasks) = (CancellationToken::new(), Tasks::new());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (own, group, token) = (events.clone(), tasks.clone(), stop.clone());
        let get = async move |upgrade: WebSocketUpgrade| {
            let caller = Caller::key(key_id(1), user_id(1), Role::Developer, scopes);
            let feed = own.open(Authenticated { caller, login: None }, None, None).unwrap();
            let mut reader = Reader::new(feed, accounts, clock);
            reader.look_at = Instant::now() + look_in;
            let serve = async move |socket| group.spawn("websocket", serve(socket, reader, token, pace, None));
            upgrade.write_buffer_size(0).max_write_buffer_size(MAX_WAITING).on_upgrade(serve)
        };
        let app = Router::new().route("/", any(get));
        tasks.spawn_until_cancelled("server", async move { axum::serve(listener, app).await.unwrap() });
        Stage { bus, events, store, stop, tasks, address, _dir: dir }
    }

    impl Stage {
        async fn connect(&self) -> WebSocketStream<TcpStream> {
            let tcp = TcpStream::connect(self.address).await.unwrap();
            tokio_tungstenite::client_async(format!("ws://{}/", self.address), tcp).await.unwrap().0
        }
        fn publish(&self, n: u32, size: usize) {
            for i in 0..n {
                let version = format!("{i:0>size$}");
                self.events.tell(user_id(1), Data::Node(node_id(1), NodeNews::Registered { version }));
            }
        }
        async fn nobody_reads(&self) {
            let gone = async {
                while self.bus.readers() > 0 {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            };
            tokio::time::timeout(PATIENCE, gone).await.expect("the reader is dropped");
        }
    }

    /// Text frames until the end, and how it came: the code of a close frame, or nothing.
    async fn rest(socket: &mut WebSocketStream<TcpStream>) -> (usize, Option<(u16, String)>) {
        let mut texts = 0;
        let read = async {
            loop {
                match socket.next().await {
                    Some(Ok(Came::Text(_))) => texts += 1,
                    Some(Ok(Came::Close(frame))) => return frame.map(|f| (u16::from(f.code), f.reason.to_string())),
                    Some(Ok(_)) => {}
                    Some(Err(_)) | None => return None,
                }
            }
        };
        let end = tokio::time::timeout(PATIENCE, read).await.expect("the hub ends the connection");
        (texts, end)
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_reader_that_stops_reading_is_dropped() {
        // Whoever reads is served, also by a machine that stands still for a while.
        let stage = stage(30_000, Pace { send_within: Duration::from_secs(15), ..QUICK }, PATIENCE).await;
        let mut stopped = stage.connect().await;
        let mut good = stage.connect().await;
        // More than the kernel takes for one connection.
        const EVENTS: u32 = 20_000;
        let bus = stage.bus.clone();
        let publish = async {
            for _ in 0..EVENTS / 100 {
                stage.publish(100, 2000);
                tokio::task::yield_now().await;
            }
        };
        let read = async {
            let mut texts = 0;
            while texts < EVENTS {
                let came = tokio::time::timeout(PATIENCE, good.next()).await.expect("the good reader is served");
                let came = came.expect("it is not cut off").expect("it is not broken");
                texts += u32::from(matches!(came, Came::Text(_)));
            }
        };
        futures::join!(publish, read);
        drop(good);
        stage.nobody_reads().await;
        assert_eq!(bus.readers(), 0);
        let (texts, end) = rest(&mut stopped).await;
        assert!(texts < EVENTS as usize, "it was cut off after {texts}");
        assert!(end.is_none_or(|(code, _)| code == TRY_AGAIN));
        stage.tasks.end(PATIENCE).await;
    }

    // One thread: the reader has no turn while events are published.
    #[tokio::test]
    async fn a_reader_that_is_overtaken_hears_1013() {
        let stage = stage(10, QUICK, PATIENCE).await;
        let mut slow = stage.connect().await;
        stage.publish(1, 1);
        assert!(matches!(slow.next().await, Some(Ok(Came::Text(_)))));
        stage.publish(20_000, 1);
        let (texts, end) = rest(&mut slow).await;
        let (code, reason) = end.expect("a close frame");
        assert!(code == TRY_AGAIN && reason.contains("too slow"), "{code} {reason}");
        assert!(texts <= 10, "{texts}");
        stage.nobody_reads().await;
        stage.tasks.end(PATIENCE).await;
    }

    #[tokio::test]
    async fn a_client_that_sends_no_pong_is_given_up() {
        let pace = Pace { ping_every: Duration::from_millis(50), pong_within: Duration::from_millis(150), ..QUICK };
        let stage = stage(10, pace, PATIENCE).await;
        // Answers pings only while it reads.
        let mut silent = stage.connect().await;
        stage.nobody_reads().await;
        // Its late pongs may meet a closed connection before it has read why.
        assert!(rest(&mut silent).await.1.is_none_or(|(code, _)| code == PROTOCOL));

        stage.tasks.end(PATIENCE).await;
    }

    #[tokio::test]
    async fn a_client_that_answers_is_kept() {
        let pace = Pace { ping_every: Duration::from_millis(50), pong_within: PATIENCE, ..QUICK };
        let stage = stage(10, pace, PATIENCE).await;
        let mut lively = stage.connect().await;
        let mut pings = 0;
        while pings < 10 {
            let came = tokio::time::timeout(PATIENCE, lively.next()).await.unwrap();
            assert!(matches!(came, Some(Ok(Came::Ping(_)))), "{came:?}");
            pings += 1;
        }
        drop(lively);
        stage.tasks.end(PATIENCE).await;
    }

    #[tokio::test]
    async fn the_end_has_a_reason() {
        let stage = stage(10, QUICK, PATIENCE).await;
        let mut socket = stage.connect().await;
        // What a client says changes nothing.
        futures::SinkExt::send(&mut socket, Came::text("{\"topics\": \"*\"}")).await.unwrap();
        stage.publish(1, 1);
        assert!(matches!(socket.next().await, Some(Ok(Came::Text(_)))));

        stage.store.remove_key(key_id(1)).await.unwrap();
        stage.events.rights_changed(Whose::Key(key_id(1)));
        stage.publish(1, 1);
        let (texts, end) = rest(&mut socket).await;
        let (code, reason) = end.expect("a close frame");
        assert!(code == POLICY && reason.contains("has ended") && texts == 0, "{code} {reason} {texts}");

        let mut socket = stage.connect().await;
        stage.stop.cancel();
        assert_eq!(rest(&mut socket).await, (0, stopping()));
        stage.nobody_reads().await;
        stage.tasks.end(PATIENCE).await;
    }

    #[tokio::test]
    async fn rights_are_looked_up_again_by_the_clock() {
        let stage = stage(10, QUICK, Duration::from_millis(100)).await;
        stage.store.remove_key(key_id(1)).await.unwrap();
        let mut socket = stage.connect().await;
        assert_eq!(rest(&mut socket).await.1.map(|(code, _)| code), Some(POLICY));
        stage.tasks.end(PATIENCE).await;
    }
}

//! JSON-RPC over a WebSocket: the same calls, and subscriptions to live events.
//!
//! One task holds the socket. Calls run beside it, so that a long one holds up nobody, and their answers wait in a
//! queue that has room for all of them. An event waits for nobody: who reads too slowly is overtaken, and dropped.

use super::failure::failure;
use super::methods::{Act, Work};
use super::params::{Params, Said};
use super::protocol;
use super::{Asker, DOOR, stranger};
use crate::doors::call;
use crate::doors::rest::events::{Do, Reader, reader, topic};
use crate::doors::rest::requests::Asked;
use crate::doors::rest::who::is_anonymous;
use crate::doors::rest::{App, Refusal, Who};
use crate::doors::socket::{
    End, PACE, POLICY, PROTOCOL, Pulse, UNSUPPORTED, bad_upgrade, goodbye, inbound, own_origin, say, stopping, too_slow,
};
use axum::Json;
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::extract::{FromRequestParts, Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use futures::future::select_all;
use hub_engine::Error;
use mesh_process::CancellationToken;
use mesh_wire::rest::{EventNotice, EventView, SubscribeReply, SubscribeRequest, UnsubscribeReply, UnsubscribeRequest};
use std::collections::{BTreeSet, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

/// Calls of one connection that run or whose answers wait for the socket; a whole batch has room.
const IN_FLIGHT: usize = protocol::MAX_BATCH;
/// Subscriptions of one connection.
const MAX_SUBSCRIPTIONS: usize = 16;

/// JSON-RPC 2.0 over a WebSocket
///
/// One message in each text frame. `event.subscribe` brings events as notifications `event.notify`.
#[utoipa::path(
    get, path = "/rpc/ws", tag = "json-rpc", operation_id = "websocket",
    security((), ("bearer" = [])),
    responses(
        (status = 101, description = "The connection is now a WebSocket"),
        (status = 401, description = "Credentials that do not count"),
        (status = 403, description = "A page of another origin"),
        (status = 426, description = "The request does not ask for a WebSocket"),
    ),
)]
pub async fn get(State(app): State<App>, request: Request) -> Result<Response, Refusal> {
    let (mut parts, _) = request.into_parts();
    let asked = parts.extensions.get::<Asked>().cloned();
    let asked = asked.ok_or_else(|| Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", "the request came by no door"))?;
    own_origin(&app, &parts.uri, &parts.headers)?;
    let who = if is_anonymous(&parts) {
        stranger(&app, &asked)?;
        None
    } else {
        Some(call::caller(&app, &mut parts, DOOR).await?)
    };
    let upgrade = WebSocketUpgrade::from_request_parts(&mut parts, &app).await.map_err(bad_upgrade)?;
    let most = app.facts.body_bytes;
    let streams = app.streams.clone();
    let serve = async move |socket| streams.spawn("rpc websocket", serve(socket, app, who, asked));
    Ok(upgrade.max_message_size(most).max_frame_size(most).write_buffer_size(0).on_upgrade(serve).into_response())
}

async fn serve(mut socket: WebSocket, app: App, who: Option<Who>, asked: Asked) {
    let (answers, ready) = mpsc::channel(IN_FLIGHT);
    let connection = Arc::new(Connection {
        answers,
        calls: Arc::new(Semaphore::new(IN_FLIGHT)),
        subscriptions: Arc::new(Semaphore::new(MAX_SUBSCRIPTIONS)),
        next: AtomicU64::new(1),
        gone: app.stop.child_token(),
        live: Mutex::default(),
    });
    let _counted = Counted::new();
    // With the connection the calls go whose answers nobody will hear, as requests do whose caller hangs up.
    let _gone = connection.gone.clone().drop_guard();
    let end = Talk { app, who, asked, connection, ready, open: VecDeque::new() }.go(&mut socket).await;
    goodbye(socket, end, PACE).await;
}

/// One open socket among those that are counted.
struct Counted;

impl Counted {
    fn new() -> Self {
        metrics::gauge!("cortex_rpc_sockets").increment(1);
        Self
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        metrics::gauge!("cortex_rpc_sockets").decrement(1);
    }
}

/// What the calls of a connection share with it.
pub struct Connection {
    answers: mpsc::Sender<Answered>,
    calls: Arc<Semaphore>,
    subscriptions: Arc<Semaphore>,
    next: AtomicU64,
    gone: CancellationToken,
    /// Subscriptions that nobody has ended.
    live: Mutex<BTreeSet<String>>,
}

/// One message of a connection.
pub struct Heard {
    connection: Arc<Connection>,
    /// What it subscribed to: nothing is told of it before its id was.
    opened: Mutex<Vec<Subscription>>,
}

struct Subscription {
    id: String,
    reader: Reader,
    _place: OwnedSemaphorePermit,
}

/// What became of a message.
struct Answered {
    text: Option<String>,
    opened: Vec<Subscription>,
    /// Given back when it has been said.
    _places: OwnedSemaphorePermit,
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Heard {
    pub fn act(self: Arc<Self>, act: Act, app: App, who: Who, p: Params) -> Work {
        Box::pin(async move {
            match act {
                Act::Subscribe => self.subscribe(&app, who, p.read()?)?.said(),
                Act::Unsubscribe => self.unsubscribe(p.read()?)?.said(),
            }
        })
    }

    fn subscribe(&self, app: &App, who: Who, r: SubscribeRequest) -> Result<Json<SubscribeReply>, Refusal> {
        if r.topics.is_empty() {
            return Err(Refusal::bad_request("bad_topic", "topics names none"));
        }
        let topics = r.topics.iter().map(|t| topic(t)).collect::<Result<Vec<_>, _>>()?;
        let full = |_| {
            let detail = format!("a connection has at most {MAX_SUBSCRIPTIONS} subscriptions; end one first, or name more topics in one");
            Refusal::new(StatusCode::CONFLICT, "subscriptions_full", detail)
        };
        let place = self.connection.subscriptions.clone().try_acquire_owned().map_err(full)?;
        let reader = reader(app, who, Some(topics), r.after.as_deref())?.through(DOOR);
        let id = format!("sub_{}", self.connection.next.fetch_add(1, Ordering::Relaxed));
        lock(&self.connection.live).insert(id.clone());
        lock(&self.opened).push(Subscription { id: id.clone(), reader, _place: place });
        Ok(Json(SubscribeReply { subscription_id: id }))
    }

    fn unsubscribe(&self, r: UnsubscribeRequest) -> Result<Json<UnsubscribeReply>, Refusal> {
        if !lock(&self.connection.live).remove(&r.subscription_id) {
            let detail = format!("this connection has no subscription {:?}", r.subscription_id);
            return Err(Refusal::new(StatusCode::NOT_FOUND, "not_found", detail));
        }
        Ok(Json(UnsubscribeReply { subscription_id: r.subscription_id }))
    }
}

struct Talk {
    app: App,
    who: Option<Who>,
    asked: Asked,
    connection: Arc<Connection>,
    ready: mpsc::Receiver<Answered>,
    open: VecDeque<Subscription>,
}

impl Talk {
    async fn go(&mut self, socket: &mut WebSocket) -> End {
        let stop = self.app.stop.clone();
        let mut pulse = Pulse::new(PACE);
        loop {
            {
                let live = lock(&self.connection.live);
                self.open.retain(|s| live.contains(&s.id));
            }
            // No fixed order: neither a talkative client nor a busy hub keeps the rest from its turn.
            let done = tokio::select! {
                () = stop.cancelled() => Err(stopping()),
                came = socket.recv() => match came {
                    None | Some(Ok(Message::Close(_))) => Err(None),
                    Some(Err(e)) => Err(Some((PROTOCOL, e.to_string()))),
                    Some(Ok(message)) => {
                        pulse.note(&message);
                        self.hear(socket, message).await
                    }
                },
                () = pulse.due() => match pulse.ping(socket, &stop).await {
                    Ok(()) => self.look().await,
                    end => end,
                },
                Some(answered) = self.ready.recv() => self.answered(socket, answered).await,
                (at, next) = next_event(&mut self.open) => self.tell(socket, at, next).await,
            };
            if let Err(end) = done {
                return end;
            }
        }
    }

    async fn say(&mut self, socket: &mut WebSocket, text: String) -> Result<(), End> {
        say(socket, Message::text(text), &self.app.stop, PACE).await
    }

    async fn hear(&mut self, socket: &mut WebSocket, message: Message) -> Result<(), End> {
        match message {
            Message::Text(text) => self.call(socket, text.as_bytes()).await,
            Message::Binary(_) => Err(Some((UNSUPPORTED, "send text: one JSON-RPC message in each frame".into()))),
            // What needs no answer counts all the same.
            _ => self.count().map_err(|refusal| Some((POLICY, refusal.detail))),
        }
    }

    fn count(&self) -> Result<(), Refusal> {
        match &self.who {
            None => stranger(&self.app, &self.asked),
            Some(who) => inbound(&self.app, who).map_or(Ok(()), |(rates, p)| Ok(rates.admit(p)?)),
        }
    }

    async fn call(&mut self, socket: &mut WebSocket, text: &[u8]) -> Result<(), End> {
        let mut message = match protocol::read(text) {
            Ok(message) => message,
            Err(no_json) => {
                let refused = self.count().err().map(|refusal| failure(&refusal, &self.asked));
                return self.say(socket, protocol::refusal(refused.unwrap_or(no_json))).await;
            }
        };
        let heard = Arc::new(Heard { connection: self.connection.clone(), opened: Mutex::default() });
        let who = self.who.clone().map(Ok);
        let mut asker = Asker { app: self.app.clone(), who, asked: self.asked.clone(), connection: Some(heard.clone()) };
        asker.admit(&mut message, 0);
        let calls = message.items().len() as u32;
        let Ok(places) = self.connection.calls.clone().try_acquire_many_owned(calls) else {
            let detail = format!("a connection has at most {IN_FLIGHT} calls under way; wait for answers, or open another");
            let failure = failure(&Refusal::new(StatusCode::CONFLICT, "calls_full", detail), &self.asked);
            message.items_mut().iter_mut().for_each(|item| protocol::refuse(item, failure.clone()));
            return match asker.answer(message).await {
                Some(text) => self.say(socket, text).await,
                None => Ok(()),
            };
        };
        let (answers, gone) = (self.connection.answers.clone(), self.connection.gone.clone());
        let work = async move {
            asker.look_again().await;
            let text = asker.answer(message).await;
            let opened = std::mem::take(&mut *lock(&heard.opened));
            // There is room: each holds a place in flight.
            let _ = answers.send(Answered { text, opened, _places: places }).await;
        };
        self.app.streams.spawn("rpc call", async move {
            tokio::select! {
                () = gone.cancelled() => {}
                () = work => {}
            }
        });
        Ok(())
    }

    async fn answered(&mut self, socket: &mut WebSocket, answered: Answered) -> Result<(), End> {
        if let Some(text) = answered.text {
            self.say(socket, text).await?;
        }
        self.open.extend(answered.opened);
        Ok(())
    }

    async fn tell(&mut self, socket: &mut WebSocket, at: usize, next: Do) -> Result<(), End> {
        match next {
            Do::Say(event) => self.notify(socket, at, *event).await?,
            Do::Reset { behind: true, .. } => return Err(too_slow()),
            Do::Reset { views, .. } => {
                for event in views {
                    self.notify(socket, at, event).await?;
                }
            }
            Do::Quiet => {}
            Do::Look => self.open[at].reader.look().await.map_err(|why| Some((POLICY, why)))?,
        }
        // The others first now, so that a busy one leaves them their turn.
        if let Some(served) = self.open.remove(at) {
            self.open.push_back(served);
        }
        Ok(())
    }

    async fn notify(&mut self, socket: &mut WebSocket, at: usize, event: EventView) -> Result<(), End> {
        let notice = EventNotice { subscription_id: self.open[at].id.clone(), event };
        self.say(socket, protocol::notification("event.notify", &notice)).await
    }

    /// Who has lost the right to be here hears it, even if they say nothing.
    async fn look(&mut self) -> Result<(), End> {
        let Some(who) = &self.who else { return Ok(()) };
        match self.app.accounts.still(who.authenticated()).await {
            Err(e @ Error::Unauthenticated(_)) => Err(Some((POLICY, e.to_string()))),
            _ => Ok(()),
        }
    }
}

/// The next of any subscription, and which. Dropping the future loses nothing.
async fn next_event(open: &mut VecDeque<Subscription>) -> (usize, Do) {
    if open.is_empty() {
        return std::future::pending().await;
    }
    let (next, at, _) = select_all(open.iter_mut().map(|s| Box::pin(s.reader.next()))).await;
    (at, next)
}

//! JSON-RPC 2.0: `POST /rpc` and `POST /`, the same calls as REST in another dress.
//!
//! The one rule here is how a message becomes calls. Each call is a handler of [`super::rest`], with an audit
//! entry, a place in its caller's rate and a time of its own.

mod discover;
mod failure;
pub mod methods;
pub mod own;
mod params;
mod protocol;
pub mod ws;

use super::call;
use super::rest::body::{self, IDEMPOTENCY_KEY};
use super::rest::problem::hints;
use super::rest::requests::{Asked, in_time};
use super::rest::who::is_anonymous;
use super::rest::{App, Refusal, Who};
use axum::extract::{Request, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use failure::{failure, of_message};
use hub_engine::tasks::MAX_WAIT_SECS;
use hub_engine::throttle::Principal;
use methods::{Method, Run};
use params::Params;
use protocol::{Call, Failure, Item, Message, Outcome};
use serde_json::value::RawValue;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// The name of this door in tasks and in the audit.
const DOOR: &str = "jsonrpc";

/// JSON-RPC 2.0
///
/// A call, a notification or a batch of at most 100. `rpc.discover` describes the methods. Refusals of calls come
/// with status 200, as error objects whose `data` is the problem.
#[utoipa::path(
    post, path = "/rpc", tag = "json-rpc", operation_id = "call",
    security((), ("bearer" = [])),
    request_body(content = serde_json::Value, example = json!({"jsonrpc": "2.0", "method": "system.health", "id": 1})),
    responses(
        (status = 200, description = "An answer, or a list of them", body = serde_json::Value),
        (status = 204, description = "There were notifications alone"),
        (status = 401, description = "A method needs credentials, and there are none", body = serde_json::Value),
        (status = 408, description = "The body did not come within `limits.request_secs`; the connection is closed", body = serde_json::Value),
        (status = 413, description = "The body is larger than `limits.body_bytes`", body = serde_json::Value),
        (status = 415, description = "The body is not `application/json`", body = serde_json::Value),
    ),
)]
pub async fn post(State(app): State<App>, request: Request) -> Response {
    serve(app, request).await
}

/// JSON-RPC 2.0, as at `/rpc`
#[utoipa::path(
    post, path = "/", tag = "json-rpc", operation_id = "call_at_root",
    security((), ("bearer" = [])),
    request_body(content = serde_json::Value, example = json!({"jsonrpc": "2.0", "method": "system.health", "id": 1})),
    responses(
        (status = 200, description = "An answer, or a list of them", body = serde_json::Value),
        (status = 204, description = "There were notifications alone"),
        (status = 401, description = "A method needs credentials, and there are none", body = serde_json::Value),
        (status = 408, description = "The body did not come within `limits.request_secs`; the connection is closed", body = serde_json::Value),
        (status = 413, description = "The body is larger than `limits.body_bytes`", body = serde_json::Value),
        (status = 415, description = "The body is not `application/json`", body = serde_json::Value),
    ),
)]
pub async fn post_at_root(State(app): State<App>, request: Request) -> Response {
    serve(app, request).await
}

async fn serve(app: App, request: Request) -> Response {
    let Some(asked) = request.extensions().get::<Asked>().cloned() else {
        return StatusCode::INTERNAL_SERVER_ERROR.into_response();
    };
    // Each call keeps its own time, which begins once the body is here.
    asked.may_wait(app.facts.request_secs.saturating_add(MAX_WAIT_SECS));
    let (mut parts, body) = request.into_parts();
    let whole = |status, refusal: Option<&Refusal>, failure| respond(status, refusal, Some(protocol::refusal(failure)));
    if parts.headers.contains_key(IDEMPOTENCY_KEY) {
        let detail = "JSON-RPC takes no Idempotency-Key: a message may hold many calls; leave it out, or use REST";
        let refusal = stranger(&app, &asked).err().unwrap_or_else(|| Refusal::bad_request("bad_idempotency_key", detail));
        return whole(StatusCode::OK, Some(&refusal), of_message(&refusal, &asked));
    }
    let bytes = match body::json(Request::from_parts(parts.clone(), body), &app).await {
        Ok(bytes) => bytes,
        Err(refusal) => {
            let refusal = stranger(&app, &asked).err().unwrap_or(refusal);
            let status = if refusal.status == StatusCode::BAD_REQUEST { StatusCode::OK } else { refusal.status };
            return whole(status, Some(&refusal), of_message(&refusal, &asked));
        }
    };
    let mut message = match protocol::read(&bytes) {
        Ok(message) => message,
        Err(no_json) => {
            let refusal = stranger(&app, &asked).err();
            let failure = refusal.as_ref().map_or(no_json, |r| failure(r, &asked));
            return whole(StatusCode::OK, refusal.as_ref(), failure);
        }
    };
    let needed = message.items().iter().any(|item| needs_caller(item, false));
    let anonymous = needed && is_anonymous(&parts);
    let who = if needed { Some(call::caller(&app, &mut parts, DOOR).await) } else { None };
    let asker = Asker { app, who, asked, connection: None };
    // The caller was counted once when it was looked at.
    let limited = asker.admit(&mut message, 1);
    let silent = message.is_silent();
    let mut answer = asker.answer(message).await;
    let status = match (anonymous, silent) {
        (true, _) => StatusCode::UNAUTHORIZED,
        (false, true) => StatusCode::NO_CONTENT,
        (false, false) => StatusCode::OK,
    };
    let refused = asker.who.and_then(Result::err);
    if let (Some(refusal), None) = (refused.as_ref().filter(|_| anonymous), &answer) {
        // Notifications that nobody will do: that at least is said.
        answer = Some(protocol::refusal(failure(refusal, &asker.asked)));
    }
    // When to come back is said to whoever has to; what to log in with, with HTTP's own 401 alone.
    let hinted = refused.as_ref().filter(|r| anonymous || r.status != StatusCode::UNAUTHORIZED);
    respond(status, limited.as_ref().or(hinted), answer)
}

/// Does a call need to know who makes it? What is only for a WebSocket is no call elsewhere.
fn needs_caller(item: &Item, connected: bool) -> bool {
    let method = item.as_ref().ok().and_then(|call| methods::named(&call.method));
    method.is_some_and(|m| match m.run {
        Run::Known(_) => true,
        Run::Socket(_) => connected,
        Run::Open(_) => false,
    })
}

/// Counts what needs nobody's credentials, for the address that it comes from.
fn stranger(app: &App, asked: &Asked) -> Result<(), Refusal> {
    asked.address.map_or(Ok(()), |address| Ok(app.rates.admit(Principal::at(address))?))
}

/// Who sends a message.
struct Asker {
    app: App,
    /// None where no call needs it.
    who: Option<Result<Who, Refusal>>,
    asked: Asked,
    connection: Option<Arc<ws::Heard>>,
}

impl Asker {
    fn told(&self, refusal: &Refusal) -> Failure {
        failure(refusal, &self.asked)
    }

    /// Counts each call of a message as a request of its caller, of whom `counted` have been counted before.
    /// Those for which the rate has no room are refused; gives the last such refusal.
    fn admit(&self, message: &mut Message, mut counted: usize) -> Option<Refusal> {
        // The control socket has no rate.
        self.asked.address?;
        let principal = self.who.as_ref().and_then(|w| w.as_ref().ok()).and_then(|w| Principal::of(w.caller()));
        let mut limited = None;
        for item in message.items_mut() {
            let admitted = if !needs_caller(item, self.connection.is_some()) {
                stranger(&self.app, &self.asked)
            } else if counted > 0 {
                counted -= 1;
                Ok(())
            } else {
                principal.map_or(Ok(()), |p| self.app.rates.admit(p).map_err(Refusal::from))
            };
            if let Err(refusal) = admitted {
                protocol::refuse(item, self.told(&refusal));
                limited = Some(refusal);
            }
        }
        limited
    }

    /// Takes the rights of now: a connection outlives them.
    async fn look_again(&mut self) {
        if let Some(Ok(who)) = &mut self.who
            && let Err(e) = who.renew(&self.app).await
        {
            self.who = Some(Err(e.into()));
        }
    }

    async fn answer(&self, message: Message) -> Option<String> {
        protocol::answer(message, |call| self.run(call), || self.told(&failure::no_room())).await
    }

    /// Runs one call.
    async fn run(&self, call: Call) -> Outcome {
        let method = methods::named(&call.method).ok_or_else(Failure::method_not_found)?;
        let done = self.work(method, &call).await;
        let outcome = if done.is_ok() { "ok" } else { "refused" };
        metrics::counter!("cortex_rpc_calls_total", "method" => method.name, "outcome" => outcome).increment(1);
        done.map_err(|refusal| self.told(&refusal))
    }

    async fn work(&self, method: &Method, call: &Call) -> Result<Box<RawValue>, Refusal> {
        let until = Instant::now() + Duration::from_secs(self.app.facts.request_secs);
        let params = || call.params(method.params).map(Params).map_err(|e| Refusal::bad_request("bad_params", e));
        if let Run::Open(work) = method.run {
            params()?;
            return in_time(until, &self.asked.alone(), work(self.app.clone())).await?;
        }
        let connection = match (&method.run, &self.connection) {
            (Run::Socket(_), None) => {
                return Err(Refusal::new(StatusCode::NOT_IMPLEMENTED, "websocket_only", format!("{} is for GET /rpc/ws", method.name)));
            }
            (_, connection) => connection,
        };
        let who = match &self.who {
            Some(Ok(who)) => who.through(DOOR).asking(self.asked.alone()),
            Some(Err(refusal)) => return Err(refusal.clone()),
            None => {
                return Err(Refusal::new(StatusCode::UNAUTHORIZED, "unauthenticated", "come with credentials: log in, or use an API key"));
            }
        };
        let (app, asked, params) = (self.app.clone(), who.asked.clone(), params()?);
        let work = match (&method.run, connection) {
            (Run::Known(work), _) => work(app, who.clone(), params),
            (Run::Socket(act), Some(connection)) => connection.clone().act(*act, app, who.clone(), params),
            (Run::Open(_), _) | (Run::Socket(_), None) => unreachable!("answered above"),
        };
        in_time(until, &asked, call::run(&self.app, &who, work)).await?
    }
}

fn respond(status: StatusCode, refusal: Option<&Refusal>, body: Option<String>) -> Response {
    let mut response = match body {
        Some(body) => (status, [(header::CONTENT_TYPE, "application/json")], body).into_response(),
        None => status.into_response(),
    };
    if let Some(refusal) = refusal {
        hints(refusal, response.headers_mut());
    }
    response
}

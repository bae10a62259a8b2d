//! JSON-RPC 2.0: `POST /rpc` and `POST /`, the same calls as REST in another dress.
//!
//! The one rule here is how a message becomes calls. Each call is a handler of [`super::rest`], with an audit
//! entry, a place in its caller's rate and a time of its own.

mod failure;
pub mod methods;
mod own;
mod params;
mod protocol;

use super::call;
use super::rest::body::{self, IDEMPOTENCY_KEY};
use super::rest::problem::hints;
use super::rest::requests::{Asked, in_time};
use super::rest::who::is_anonymous;
use super::rest::{App, Refusal, Who};
use axum::extract::{FromRequestParts, Request, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use failure::{failure, of_message};
use hub_engine::tasks::MAX_WAIT_SECS;
use hub_engine::throttle::Principal;
use methods::{Method, Run};
use params::Params;
use protocol::{Call, Failure, Item, Message, Outcome};
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
    let needed = message.items().iter().any(needs_caller);
    let anonymous = needed && is_anonymous(&parts);
    let who = if needed { Some(Who::from_request_parts(&mut parts, &app).await) } else { None };
    let limited = admit(&app, &mut message, who.as_ref(), &asked);
    let silent = message.is_silent();
    let answer = protocol::answer(message, |call| run(&app, who.as_ref(), call, &asked), || failure(&failure::no_room(), &asked)).await;
    let status = match (anonymous, silent) {
        (true, _) => StatusCode::UNAUTHORIZED,
        (false, true) => StatusCode::NO_CONTENT,
        (false, false) => StatusCode::OK,
    };
    let unknown = who.and_then(Result::err).filter(|_| anonymous);
    respond(status, limited.as_ref().or(unknown.as_ref()), answer)
}

fn method_of(item: &Item) -> Option<&'static Method> {
    item.as_ref().ok().and_then(|call| methods::named(&call.method))
}

fn needs_caller(item: &Item) -> bool {
    method_of(item).is_some_and(|m| matches!(m.run, Run::Known(_)))
}

/// Counts what needs nobody's credentials, for the address that it comes from.
fn stranger(app: &App, asked: &Asked) -> Result<(), Refusal> {
    asked.address.map_or(Ok(()), |address| Ok(app.rates.admit(Principal::at(address))?))
}

/// Counts each call of a message as a request of its caller, who was counted once when it was looked at. Those
/// for which the rate has no room are refused; gives the last such refusal.
fn admit(app: &App, message: &mut Message, who: Option<&Result<Who, Refusal>>, asked: &Asked) -> Option<Refusal> {
    // The control socket has no rate.
    asked.address?;
    let principal = who.and_then(|w| w.as_ref().ok()).and_then(|w| Principal::of(w.caller()));
    let mut counted = true;
    let mut limited = None;
    for item in message.items_mut() {
        let admitted = match needs_caller(item) {
            false => stranger(app, asked),
            true if std::mem::take(&mut counted) => Ok(()),
            true => principal.map_or(Ok(()), |p| app.rates.admit(p).map_err(Refusal::from)),
        };
        if let Err(refusal) = admitted {
            protocol::refuse(item, failure(&refusal, asked));
            limited = Some(refusal);
        }
    }
    limited
}

/// Runs one call.
async fn run(app: &App, who: Option<&Result<Who, Refusal>>, call: Call, asked: &Asked) -> Outcome {
    let method = methods::named(&call.method).ok_or_else(Failure::method_not_found)?;
    let told = |refusal: Refusal| failure(&refusal, asked);
    let until = Instant::now() + Duration::from_secs(app.facts.request_secs);
    let params = || call.params(method.params).map(Params).map_err(|e| told(Refusal::bad_request("bad_params", e)));
    let done = match (&method.run, who) {
        (Run::Open(work), _) => {
            params()?;
            in_time(until, asked, work(app.clone())).await
        }
        (Run::Known(_), None) => Err(Refusal::new(StatusCode::UNAUTHORIZED, "unauthenticated", "nobody is known to ask")),
        (Run::Known(_), Some(Err(refusal))) => Err(refusal.clone()),
        (Run::Known(work), Some(Ok(who))) => {
            let who = Who { asked: asked.alone(), ..who.through(DOOR) };
            let asked = who.asked.clone();
            in_time(until, &asked, call::run(app, &who, work(app.clone(), who.clone(), params()?))).await
        }
    };
    done.and_then(|done| done).map_err(told)
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

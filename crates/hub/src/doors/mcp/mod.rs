//! MCP at `/mcp`: what a model may do here, as tools and resources. The crate `rmcp` stands behind this module
//! alone; every request is a whole of its own, and no session is kept (decision 39).

mod resources;
mod schema;
mod server;
mod tools;
mod untrusted;
mod wait;
mod waiting;

pub use waiting::Waiting;

use super::call;
use super::rest::body::{self, read_text};
use super::rest::{App, Refusal, Who, origin};
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use rmcp::transport::streamable_http_server::session::never::NeverSessionManager;
use rmcp::transport::streamable_http_server::{StreamableHttpServerConfig, StreamableHttpService};
use serde_json::{Value, json};
use server::Server;
use std::sync::Arc;

/// Longest refusal that is taken over from the crate.
const MAX_REASON: usize = 4 << 10;

/// Answers one message. Who asks is found out anew each time, and counted as on any other call.
pub async fn post(State(app): State<App>, request: Request) -> Result<Response, Refusal> {
    let (mut parts, body) = request.into_parts();
    let who = call::caller(&app, &mut parts, "mcp").await?;
    let request = Request::from_parts(parts, body);
    judge(&app, &who, &request)?;
    let (parts, body) = request.into_parts();
    let request = Request::from_parts(parts.clone(), body);
    let bytes = body::json(request, &app).await?;
    let message = match serde_json::from_slice::<Value>(&bytes) {
        Ok(message) => message,
        Err(e) => return Ok(protocol_error(-32700, &format!("the body is no JSON: {e}"))),
    };
    if !message.is_object() {
        return Ok(protocol_error(-32600, "a request is one JSON-RPC message; MCP has no batches"));
    }
    let place = app.waiting.enter(&who)?;
    let server = Server { app: app.clone(), who: who.through("mcp"), _place: Arc::new(place) };
    let config = StreamableHttpServerConfig::default()
        .with_legacy_session_mode(false)
        .with_json_response(true)
        .with_sse_retry(None)
        .with_max_request_body_bytes(app.facts.body_bytes)
        .with_cancellation_token(app.stop.child_token())
        // The hub's own guard has judged the host already, and this module the origin.
        .disable_allowed_hosts();
    let service = StreamableHttpService::new(move || Ok(server.clone()), Arc::new(NeverSessionManager::default()), config);
    let answer = service.handle(Request::from_parts(accepting(parts), Body::from(bytes))).await;
    told(answer.map(Body::new)).await
}

/// What is wrong with a request whatever it says.
fn judge(app: &App, who: &Who, request: &Request) -> Result<(), Refusal> {
    if origin::given(request.headers(), request.uri(), &app.facts.public_url) == origin::Given::Foreign {
        return Err(Refusal::new(StatusCode::FORBIDDEN, "foreign_origin", "a page of another origin may not use this hub's tools"));
    }
    if who.by_cookie {
        let detail = "a page's cookie does not count here; use the header Authorization: Bearer <token or API key>";
        return Err(Refusal::new(StatusCode::UNAUTHORIZED, "unauthenticated", detail));
    }
    if request.headers().contains_key("mcp-session-id") {
        let detail = "this hub keeps no MCP sessions, so this is none of its own; begin anew without Mcp-Session-Id";
        return Err(Refusal::new(StatusCode::NOT_FOUND, "unknown_session", detail));
    }
    Ok(())
}

/// Many programs take whatever comes, or say nothing of it; the crate wants both kinds to be named.
fn accepting(mut parts: axum::http::request::Parts) -> axum::http::request::Parts {
    let any = parts.headers.get(header::ACCEPT).is_none_or(|v| v.as_bytes() == b"*/*");
    if any {
        parts.headers.insert(header::ACCEPT, HeaderValue::from_static("application/json, text/event-stream"));
    }
    parts
}

fn protocol_error(code: i32, message: &str) -> Response {
    let body = json!({"jsonrpc": "2.0", "id": null, "error": {"code": code, "message": message}});
    (StatusCode::BAD_REQUEST, [(header::CONTENT_TYPE, "application/json")], body.to_string()).into_response()
}

fn is_json(headers: &HeaderMap) -> bool {
    headers.get(header::CONTENT_TYPE).is_some_and(|v| v.as_bytes().starts_with(b"application/json"))
}

/// Refusals of the crate, in the form of this house.
async fn told(answer: Response) -> Result<Response, Refusal> {
    let status = answer.status();
    if status.is_success() || is_json(answer.headers()) {
        return Ok(answer);
    }
    let reason = read_text(answer.into_body(), MAX_REASON).await;
    Err(match status {
        // It was JSON, but no message of MCP.
        StatusCode::UNSUPPORTED_MEDIA_TYPE => return Ok(protocol_error(-32600, "this is no JSON-RPC 2.0 message of MCP")),
        StatusCode::NOT_ACCEPTABLE => Refusal::new(status, "not_acceptable", "accept both application/json and text/event-stream"),
        s if s.is_server_error() => {
            Refusal::new(StatusCode::SERVICE_UNAVAILABLE, "stopping", "the answer did not come; ask again by the same id")
        }
        s => Refusal::new(s, "bad_request", reason),
    })
}

//! What surrounds each request: its id and span, its time, its counts.

use super::problem::{Answer, Refusal, written};
use super::{App, Door, rate};
use crate::doors::forwarded;
use crate::doors::listener::Peer;
use axum::body::{Body, Bytes};
use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use hub_engine::audit::{self, Ending};
use hyper::body::{Body as HttpBody, Frame, SizeHint};
use mesh_core::RequestId;
use mesh_core::permission::Via;
use mesh_process::entropy;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::time::{Instant, Sleep};
use tracing::Instrument;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const MAX_REQUEST_ID: usize = 128;

/// What the handlers may know of the request that they answer.
#[derive(Debug, Clone)]
pub struct Asked {
    pub request_id: Arc<str>,
    /// Where it came from; None: this machine, by the control socket.
    pub address: Option<IpAddr>,
    /// Seconds that the handler was asked to wait besides its own time.
    wait_secs: Arc<AtomicU64>,
}

impl Asked {
    /// The caller wants to wait so long for the answer: the time of the request does not count it.
    pub fn may_wait(&self, secs: u64) {
        self.wait_secs.fetch_max(secs, Ordering::AcqRel);
    }
    /// For one call of several that the request carries, each with a time of its own.
    pub fn alone(&self) -> Self {
        Self { wait_secs: Arc::default(), ..self.clone() }
    }
}

/// Until `until`, and as much longer as the work was asked to wait; then it is dropped.
pub async fn in_time<T>(until: Instant, asked: &Asked, work: impl Future<Output = T>) -> Answer<T> {
    let mut work = std::pin::pin!(work);
    loop {
        let waits = asked.wait_secs.load(Ordering::Acquire);
        match tokio::time::timeout_at(until + Duration::from_secs(waits), &mut work).await {
            Ok(done) => return Ok(done),
            // The handler has learnt meanwhile what it was asked to wait.
            Err(_) if asked.wait_secs.load(Ordering::Acquire) > waits => {}
            Err(_) => return Err(Refusal::new(StatusCode::SERVICE_UNAVAILABLE, "timed_out", "the hub took too long; try again")),
        }
    }
}

/// Serves one request.
pub async fn serve(State(app): State<App>, mut request: Request, next: Next) -> Response {
    let begun = Instant::now();
    let given = request.headers().get(&REQUEST_ID).and_then(|v| v.to_str().ok());
    let sane = |id: &&str| !id.is_empty() && id.len() <= MAX_REQUEST_ID && id.bytes().all(|b| b.is_ascii_graphic());
    let id: Arc<str> = match given.filter(sane) {
        Some(id) => id.into(),
        None => RequestId::from_parts(app.clock.now_ms(), entropy::bytes()).to_string().into(),
    };
    let (method, route, door) = (method(request.method()), route(&request), door(&request));
    let span = tracing::info_span!(
        "request",
        request_id = %id,
        trace_id = tracing::field::Empty,
        user = tracing::field::Empty,
        door,
        method,
        route = &*route,
        otel.name = tracing::field::Empty,
        otel.kind = tracing::field::Empty,
        address = tracing::field::Empty,
        http.response.status_code = tracing::field::Empty,
    );
    let trace = TraceParent::of(request.headers());
    if let Some(trace) = &trace {
        span.record("trace_id", trace.trace_id());
    }
    let exported = crate::otlp::begin(&span, trace.as_ref(), method, &route);
    let time = Duration::from_secs(app.facts.request_secs);
    let socket = request.extensions().get::<Door>() == Some(&Door::Socket);
    let peer = request.extensions().get::<Peer>().and_then(|peer| peer.address);
    let address = peer.map(|peer| forwarded::client(&app.facts.trusted_proxies, peer, request.headers()));
    let asked = Asked { request_id: id.clone(), address, wait_secs: Arc::default() };
    if let Some(address) = &asked.address {
        span.record("address", tracing::field::display(address));
    }
    request.extensions_mut().insert(asked.clone());
    // Time for the body, which alone is in the hands of the caller, and as much again for the answer.
    let patience = if request.body().is_end_stream() { time } else { time * 2 };
    let admitted = rate::admit(&app, &request, address);
    let request = request.map(|body| Body::new(InTime { body, until: begun + time, sleep: None }));
    // Streams answer at once and go on; what is bounded is the time until there is an answer.
    let answered = async {
        if let Err(refusal) = admitted {
            return refusal.into_response();
        }
        // Within its time: what goes on without its caller keeps its entry.
        let via = Via { door: super::who::name(socket), address, request_id: Some(id.clone()), device: None };
        let work = audit::scope(&app.audit, via, next.run(request), ending);
        in_time(begun + patience, &asked, work).await.unwrap_or_else(Refusal::into_response)
    };
    let mut response = answered.instrument(span.clone()).await;
    written(&mut response, &id);
    let status = response.status();
    if exported {
        span.record("http.response.status_code", status.as_u16());
    }
    span.in_scope(|| tracing::debug!(status = status.as_u16(), "answered"));
    crate::metrics::answered(method, &route, status, begun.elapsed());
    let headers = response.headers_mut();
    if let Ok(v) = HeaderValue::from_str(&id) {
        headers.insert(REQUEST_ID, v);
    }
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    response
}

fn ending(answer: &Response) -> Ending {
    ended(answer.status())
}

/// How a call with this status ended.
pub fn ended(status: StatusCode) -> Ending {
    match status {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Ending::Refused,
        StatusCode::NOT_FOUND => Ending::Absent,
        status if status.is_client_error() || status.is_server_error() => Ending::Failed,
        _ => Ending::Done,
    }
}

/// A word of a small set: what strangers call their methods is no label.
fn method(m: &Method) -> &'static str {
    match m.as_str() {
        "GET" => "GET",
        "HEAD" => "HEAD",
        "POST" => "POST",
        "PUT" => "PUT",
        "PATCH" => "PATCH",
        "DELETE" => "DELETE",
        "OPTIONS" => "OPTIONS",
        _ => "other",
    }
}

/// The route's template, with no id in it; `none` where there is nothing.
fn route(request: &Request) -> Arc<str> {
    let matched = request.extensions().get::<MatchedPath>().map(MatchedPath::as_str);
    matched.filter(|m| !m.contains("{*")).unwrap_or("none").into()
}

fn door(request: &Request) -> &'static str {
    if request.extensions().get::<Door>() == Some(&Door::Socket) { "socket" } else { "http" }
}

/// A W3C `traceparent` of version 00: which trace a request belongs to, and below which span.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TraceParent<'h> {
    text: &'h str,
}

impl<'h> TraceParent<'h> {
    pub fn of(headers: &'h HeaderMap) -> Option<Self> {
        let mut all = headers.get_all("traceparent").iter();
        // More than one is nobody's.
        let (Some(only), None) = (all.next(), all.next()) else { return None };
        Self::parse(only.to_str().ok()?)
    }
    fn parse(text: &'h str) -> Option<Self> {
        let parts: Vec<&str> = text.split('-').collect();
        let [version, trace, span, flags] = parts.as_slice() else { return None };
        let hex = |s: &str, n: usize| s.len() == n && s.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        let some = |s: &str| s.bytes().any(|b| b != b'0');
        let good = *version == "00" && hex(trace, 32) && some(trace) && hex(span, 16) && some(span) && hex(flags, 2);
        good.then_some(Self { text })
    }
    pub fn trace_id(&self) -> &'h str {
        &self.text[3..35]
    }
    pub fn span_id(&self) -> &'h str {
        &self.text[36..52]
    }
    pub fn sampled(&self) -> bool {
        u8::from_str_radix(&self.text[53..55], 16).is_ok_and(|flags| flags & 1 == 1)
    }
}

/// The body of a request did not come in its time.
#[derive(Debug, thiserror::Error)]
#[error("the body did not come within limits.request_secs")]
struct TooSlow;

/// The refusal for an error of a body, when it came too slowly.
pub fn too_slow(error: &axum::Error) -> Option<Refusal> {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(e) = cause {
        if e.is::<TooSlow>() {
            return Some(Refusal::new(StatusCode::REQUEST_TIMEOUT, "body_too_slow", TooSlow));
        }
        cause = e.source();
    }
    None
}

/// A body that has to come in its time.
struct InTime {
    body: Body,
    until: Instant,
    /// Made when there is something to wait for.
    sleep: Option<Pin<Box<Sleep>>>,
}

impl HttpBody for InTime {
    type Data = Bytes;
    type Error = axum::Error;
    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        if let Poll::Ready(frame) = Pin::new(&mut self.body).poll_frame(cx) {
            // One that is never silent may be too slow as well.
            let late = Instant::now() >= self.until && frame.is_some();
            return Poll::Ready(if late { Some(Err(axum::Error::new(TooSlow))) } else { frame });
        }
        let until = self.until;
        let sleep = self.sleep.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(until)));
        sleep.as_mut().poll(cx).map(|()| Some(Err(axum::Error::new(TooSlow))))
    }
    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }
    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trace_parents() {
        let good = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        let t = TraceParent::parse(good).unwrap();
        assert_eq!((t.trace_id(), t.span_id(), t.sampled()), ("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7", true));
        assert!(!TraceParent::parse(&good.replace("-01", "-00")).unwrap().sampled());
        for bad in [
            "",
            "00",
            "01-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-x",
            "00-4bf92f3577b34da6a3ce929d0e0e473-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e47é6-00f067aa0ba902b7-1",
        ] {
            assert_eq!(TraceParent::parse(bad), None, "{bad:?}");
        }
    }
}

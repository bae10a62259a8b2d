//! Traces for OpenTelemetry: OTLP as protobuf over HTTP, only when `log.otlp_endpoint` names a receiver.
//!
//! The batch has a thread of its own, which is the library's; what it wants sent goes by a task of ours.

use crate::doors::rest::TraceParent;
use anyhow::Context as _;
use async_trait::async_trait;
use bytes::Bytes;
use mesh_process::Tasks;
use mesh_process::telemetry::Besides;
use opentelemetry::Context;
use opentelemetry::trace::{SpanContext, SpanId, TraceContextExt, TraceFlags, TraceId, TraceState, TracerProvider};
use opentelemetry_http::{HttpClient, HttpError, Request, Response};
use opentelemetry_otlp::{SpanExporter, WithExportConfig, WithHttpConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::SdkTracerProvider;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tracing::{Level, Span};
use tracing_opentelemetry::OpenTelemetrySpanExt;
use tracing_subscriber::Layer;
use tracing_subscriber::filter::FilterFn;

/// How long one export may take; what cannot be sent in time is dropped, and the hub goes on.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(10);
/// The last batch, at the stop.
const LAST_WORDS: Duration = Duration::from_secs(3);
/// The library sends one batch at a time.
const EXPORTS: usize = 4;
/// What a receiver's answer may have, and more of it is not read.
const ANSWER_BYTES: usize = 64 << 10;

/// Sends spans until it is stopped.
pub struct Exporter {
    provider: SdkTracerProvider,
    tasks: Tasks,
}

/// Begins to send spans to `endpoint`, a base address such as `http://127.0.0.1:4318`.
pub fn start(endpoint: &str) -> anyhow::Result<(Exporter, Besides)> {
    let tasks = Tasks::new();
    let base = endpoint.trim_end_matches('/');
    let address = if base.ends_with("/v1/traces") { base.to_owned() } else { format!("{base}/v1/traces") };
    let web = reqwest::Client::builder().timeout(EXPORT_TIMEOUT).redirect(reqwest::redirect::Policy::none()).build()?;
    let (exports, queue) = mpsc::channel(EXPORTS);
    tasks.spawn("otlp", send(web, queue));
    let exporter = SpanExporter::builder()
        .with_http()
        .with_http_client(ByTask(exports))
        .with_endpoint(address)
        .with_timeout(EXPORT_TIMEOUT)
        .build()
        .context("log.otlp_endpoint")?;
    let resource = Resource::builder()
        .with_service_name("cortex-hub")
        .with_attribute(opentelemetry::KeyValue::new("service.version", crate::doors::rest::VERSION))
        .build();
    let provider = SdkTracerProvider::builder().with_batch_exporter(exporter).with_resource(resource).build();
    // Spans of requests alone: what the sending itself does would never come to an end.
    let ours = FilterFn::new(|m| m.is_span() && *m.level() <= Level::INFO && m.target().starts_with("cortex_hub"));
    let layer = tracing_opentelemetry::layer().with_tracer(provider.tracer("cortex-hub")).with_threads(false).with_location(false);
    ON.store(true, Ordering::Release);
    Ok((Exporter { provider, tasks }, layer.with_filter(ours).boxed()))
}

impl Exporter {
    /// Sends what is left.
    pub async fn stop(self) {
        let provider = self.provider;
        // It waits for its own thread, which waits for our task.
        let last = tokio::task::spawn_blocking(move || provider.shutdown_with_timeout(LAST_WORDS));
        if let Ok(Err(error)) = last.await {
            tracing::warn!(%error, "the last spans were not sent");
        }
        self.tasks.end(LAST_WORDS).await;
    }
}

/// Whether anybody collects spans.
static ON: AtomicBool = AtomicBool::new(false);

/// Names the span of a request and makes it part of the trace that its caller named. False, and nothing
/// is done, when nobody collects spans.
pub fn begin(span: &Span, parent: Option<&TraceParent<'_>>, method: &str, route: &str) -> bool {
    if !ON.load(Ordering::Acquire) {
        return false;
    }
    if let Some(parent) = parent
        && let (Ok(trace), Ok(above)) = (TraceId::from_hex(parent.trace_id()), SpanId::from_hex(parent.span_id()))
    {
        let flags = if parent.sampled() { TraceFlags::SAMPLED } else { TraceFlags::NOT_SAMPLED };
        let context = SpanContext::new(trace, above, flags, true, TraceState::default());
        // An error says that this span is not among those that are collected.
        let _ = span.set_parent(Context::new().with_remote_span_context(context));
    }
    span.record("otel.name", format_args!("{method} {route}"));
    span.record("otel.kind", "server");
    true
}

type Export = (Request<Bytes>, oneshot::Sender<Result<Response<Bytes>, HttpError>>);

/// Hands exports to the task that sends them.
#[derive(Debug)]
struct ByTask(mpsc::Sender<Export>);

#[async_trait]
impl HttpClient for ByTask {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let (answer, answered) = oneshot::channel();
        self.0.send((request, answer)).await.map_err(|_| "the hub is stopping")?;
        answered.await?
    }
}

async fn send(web: reqwest::Client, mut queue: mpsc::Receiver<Export>) {
    // Whether the last one went well, so that a receiver that is away is told of once.
    let mut well = true;
    while let Some((request, answer)) = queue.recv().await {
        let sent = one(&web, request).await;
        let now_well = sent.as_ref().is_ok_and(|r| r.status().is_success());
        match (well, now_well) {
            (true, false) => tracing::warn!(answer = ?sent.as_ref().map(|r| r.status()), "spans cannot be sent to log.otlp_endpoint"),
            (false, true) => tracing::info!("spans can be sent again"),
            _ => {}
        }
        well = now_well;
        let _ = answer.send(sent);
    }
}

async fn one(web: &reqwest::Client, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
    let mut answer = web.execute(request.try_into()?).await?;
    let mut response = Response::new(Bytes::new());
    *response.status_mut() = answer.status();
    *response.headers_mut() = std::mem::take(answer.headers_mut());
    let mut body = Vec::new();
    while let Some(piece) = answer.chunk().await? {
        if body.len() + piece.len() > ANSWER_BYTES {
            break;
        }
        body.extend_from_slice(&piece);
    }
    *response.body_mut() = body.into();
    Ok(response)
}

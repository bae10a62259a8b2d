//! What a hub tells Prometheus. All names, with their help and their first zeros, stand in [`NAMES`];
//! docs/reference/metrics.md is the same list for people, and a test compares the two.
//!
//! Counters and histograms are kept where things happen; what only has a value of now is looked up when
//! somebody asks. A label is always a word of a small set: never an id, a path or a word of a caller.

use crate::doors::hosts::{self, Hosts};
use crate::doors::listener::Cut;
use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::middleware;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use hub_engine::links::Health;
use hub_engine::pool::Pool;
use hub_engine::ports::{Gauges, NodeDirectory};
use hub_engine::retention::Limits;
use hub_store::Store;
use mesh_process::Tasks;
use metrics::{Unit, counter, gauge, histogram};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use std::cell::RefCell;
use std::collections::HashMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

/// Histograms are folded so often, whether or not anybody asks: their samples take room until then.
const FOLD_EVERY: Duration = Duration::from_secs(5);
/// A database that does not answer in this time keeps no reader of metrics waiting.
const STORE_PATIENCE: Duration = Duration::from_secs(1);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Counter,
    Gauge,
    Histogram(&'static [Seconds]),
}
use Kind::{Counter, Gauge, Histogram};

/// A bound in thousandths, so that a list of them can be compared.
pub type Seconds = u32;

const REQUEST: &[Seconds] = &[5, 25, 100, 500, 2_500, 10_000, 60_000];
const START: &[Seconds] = &[5, 25, 100, 500, 2_500, 10_000, 60_000, 600_000];
const COMMIT: &[Seconds] = &[1, 5, 25, 100, 500, 2_500];
const JOBS: &[Seconds] = &[1_000, 2_000, 8_000, 32_000, 128_000, 512_000];

/// Every name but those of the process itself.
pub const NAMES: &[(&str, Kind, &str)] = &[
    ("cortex_build_info", Gauge, "Always 1; the version is its label."),
    ("cortex_http_requests_total", Counter, "Answers of the doors."),
    ("cortex_http_request_duration_seconds", Histogram(REQUEST), "Time until a request was answered; a stream counts until it begins."),
    ("cortex_http_connections", Gauge, "Open connections, WebSockets among them."),
    ("cortex_http_connections_accepted_total", Counter, "Connections that were let in."),
    ("cortex_http_connections_refused_total", Counter, "Connections beyond the limit, closed at once."),
    ("cortex_http_connections_cut_total", Counter, "Connections that were ended for keeping the hub waiting."),
    ("cortex_http_handshakes_total", Counter, "TLS handshakes of the doors."),
    ("cortex_event_streams", Gauge, "Readers of live events."),
    ("cortex_rpc_calls_total", Counter, "JSON-RPC calls that were run."),
    ("cortex_rpc_sockets", Gauge, "Open WebSockets of JSON-RPC."),
    ("cortex_auth_failures_total", Counter, "Credentials that were missing or not good."),
    ("cortex_rate_limited_total", Counter, "Requests, and messages of streams, beyond the rate of their principal."),
    ("cortex_logins_throttled_total", Counter, "Tries with a password that were refused unlooked at."),
    ("cortex_audit_suppressed_total", Counter, "Audit entries of calls that changed nothing, counted and not kept one by one."),
    ("cortex_audit_lost_total", Counter, "Audit entries that could not be written."),
    ("cortex_tasks_accepted_total", Counter, "Tasks that were accepted."),
    ("cortex_tasks_finished_total", Counter, "Tasks that came to their final state."),
    ("cortex_tasks_waiting", Gauge, "Tasks that wait for a node."),
    ("cortex_tasks_in_doubt", Gauge, "Tasks on nodes that are away."),
    ("cortex_attempts_moved_total", Counter, "Attempts that were taken back before they ran, for another try."),
    ("cortex_attempts_lost_total", Counter, "Attempts of which nobody can say how they ended."),
    ("cortex_task_start_seconds", Histogram(START), "Time from the acceptance of a task to its start on a node."),
    ("cortex_broken_seals_total", Counter, "Stored tasks that do not fit their seal, and were not sent."),
    ("cortex_nodes", Gauge, "Nodes by what this hub sees of them."),
    ("cortex_nodes_spool_bytes", Gauge, "Output that the linked nodes keep until it is durable here."),
    ("cortex_nodes_spool_full", Gauge, "Linked nodes whose spool is used to 80 % or more."),
    ("cortex_link_connections", Gauge, "Open connections of the node port."),
    ("cortex_link_connections_refused_total", Counter, "Connections of the node port beyond a limit, closed at once."),
    ("cortex_link_handshakes_total", Counter, "TLS handshakes on the node port."),
    ("cortex_enrolments_throttled_total", Counter, "Enrolments and recoveries that were refused unlooked at."),
    ("cortex_links_opened_total", Counter, "Links that were accepted."),
    ("cortex_links_closed_total", Counter, "Links that ended."),
    ("cortex_envelopes_rejected_total", Counter, "Envelopes that a node refused."),
    ("cortex_bundles_sent_total", Counter, "Trust bundles that were sent to nodes."),
    ("cortex_bundles_acknowledged_total", Counter, "Trust bundles that nodes have stored."),
    ("cortex_refused_reports_total", Counter, "Reports of nodes that cannot be true, and were not recorded."),
    ("cortex_output_received_bytes_total", Counter, "Output of tasks that came from nodes, repeats included."),
    ("cortex_store_up", Gauge, "1 when the database answers."),
    ("cortex_store_commits_total", Counter, "Transactions that were committed."),
    ("cortex_store_commits_failed_total", Counter, "Transactions that failed as a whole."),
    ("cortex_store_commit_seconds", Histogram(COMMIT), "Time of a transaction, its sync included."),
    ("cortex_store_commit_jobs", Histogram(JOBS), "Writes that shared a transaction."),
    ("cortex_store_queue_depth", Gauge, "Writes that wait for the next transaction."),
    ("cortex_data_folder_free_bytes", Gauge, "Room on the disk of the data folder."),
    ("cortex_storage_used_bytes", Gauge, "What is kept."),
    ("cortex_storage_limit_bytes", Gauge, "The bound of what is kept; 0 for none."),
    ("cortex_storage_warnings", Gauge, "1 for what is used to 80 % of its bound or more."),
    ("cortex_retention_erased_total", Counter, "Tasks of which something was erased for its age or for want of room."),
    ("cortex_bus_connected", Gauge, "1 while live events are carried by Redis."),
    ("cortex_bus_unsent_total", Counter, "Events that other hubs did not hear."),
    ("cortex_bus_resets_total", Counter, "Times that all readers of this hub had missed something on the way through Redis."),
    ("cortex_bus_rejected_total", Counter, "Entries of the Redis stream that were not taken."),
];

static HANDLE: OnceLock<PrometheusHandle> = OnceLock::new();

/// Takes up counting for the whole process; several hubs in one process (tests) share the counts.
pub fn install() {
    HANDLE.get_or_init(|| {
        let mut builder = PrometheusBuilder::new();
        for (name, kind, _) in NAMES {
            if let Histogram(bounds) = kind {
                let bounds: Vec<f64> = bounds.iter().map(|ms| f64::from(*ms) / 1000.0).collect();
                builder =
                    builder.set_buckets_for_metric(Matcher::Full((*name).to_owned()), &bounds).unwrap_or_else(|_| PrometheusBuilder::new());
            }
        }
        let recorder = builder.build_recorder();
        let handle = recorder.handle();
        // Whoever installed another one first has the counts.
        let _ = metrics::set_global_recorder(recorder);
        describe();
        begin();
        handle
    });
}

/// Folds histograms until the group ends.
pub fn fold(tasks: &Tasks) {
    tasks.spawn_until_cancelled("metrics", async {
        loop {
            tokio::time::sleep(FOLD_EVERY).await;
            if let Some(handle) = HANDLE.get() {
                handle.run_upkeep();
            }
        }
    });
}

fn describe() {
    for (name, kind, help) in NAMES {
        match kind {
            Counter => metrics::describe_counter!(*name, Unit::Count, *help),
            Gauge => metrics::describe_gauge!(*name, Unit::Count, *help),
            Histogram(_) => metrics::describe_histogram!(*name, Unit::Count, *help),
        }
    }
}

/// A first zero for each name: an alarm cannot tell what never happened from what is not there.
fn begin() {
    gauge!("cortex_build_info", "version" => crate::doors::rest::VERSION).set(1.0);
    counter!("cortex_http_requests_total", "method" => "GET", "route" => "/healthz", "status" => "2xx").absolute(0);
    let _ = histogram!("cortex_http_request_duration_seconds", "method" => "GET", "route" => "/healthz");
    for listener in ["http", "socket", "metrics"] {
        gauge!("cortex_http_connections", "listener" => listener).set(0.0);
        counter!("cortex_http_connections_accepted_total", "listener" => listener).absolute(0);
        counter!("cortex_http_connections_refused_total", "listener" => listener).absolute(0);
        for cut in Cut::ALL {
            counter!("cortex_http_connections_cut_total", "listener" => listener, "reason" => cut.as_str()).absolute(0);
        }
    }
    for door in ["sse", "websocket", "jsonrpc"] {
        gauge!("cortex_event_streams", "door" => door).set(0.0);
    }
    for outcome in ["ok", "refused"] {
        counter!("cortex_rpc_calls_total", "method" => "system.health", "outcome" => outcome).absolute(0);
    }
    gauge!("cortex_rpc_sockets").set(0.0);
    for kind in ["password", "refresh", "bearer", "node"] {
        counter!("cortex_auth_failures_total", "kind" => kind).absolute(0);
    }
    for principal in ["user", "key", "address"] {
        counter!("cortex_rate_limited_total", "principal" => principal).absolute(0);
    }
    for by in ["address", "account", "busy"] {
        counter!("cortex_logins_throttled_total", "by" => by).absolute(0);
    }
    for state in ["succeeded", "failed", "cancelled"] {
        counter!("cortex_tasks_finished_total", "state" => state, "reason" => "none").absolute(0);
    }
    for result in ["done", "failed", "timed_out"] {
        counter!("cortex_link_handshakes_total", "result" => result).absolute(0);
        counter!("cortex_http_handshakes_total", "result" => result).absolute(0);
    }
    counter!("cortex_links_closed_total", "code" => "closed").absolute(0);
    for what in ["output", "tasks"] {
        counter!("cortex_retention_erased_total", "what" => what).absolute(0);
    }
    for what in ["bad_frame", "digest", "foreign", "gap", "output_missing", "unknown"] {
        counter!("cortex_refused_reports_total", "what" => what).absolute(0);
    }
    for reason in ["forged", "malformed", "stale", "repeated"] {
        counter!("cortex_bus_rejected_total", "reason" => reason).absolute(0);
    }
    for (name, kind, _) in NAMES {
        match (kind, *name) {
            // Their labels stand above.
            (Counter, "cortex_http_requests_total" | "cortex_auth_failures_total" | "cortex_tasks_finished_total")
            | (
                Counter,
                "cortex_http_connections_accepted_total" | "cortex_http_connections_refused_total" | "cortex_http_connections_cut_total",
            )
            | (
                Counter,
                "cortex_link_handshakes_total"
                | "cortex_http_handshakes_total"
                | "cortex_links_closed_total"
                | "cortex_rate_limited_total"
                | "cortex_logins_throttled_total"
                | "cortex_bus_rejected_total"
                | "cortex_refused_reports_total"
                | "cortex_retention_erased_total",
            )
            | (Histogram(_), "cortex_http_request_duration_seconds") => {}
            (Counter, name) => counter!(name).absolute(0),
            (Histogram(_), name) => drop(histogram!(name)),
            (Gauge, "cortex_link_connections" | "cortex_bus_connected") => gauge!(*name).set(0.0),
            // Looked up when somebody asks.
            (Gauge, _) => {}
        }
    }
}

/// What is counted of one route, by method and class of status; there are few of each.
struct OfRoute {
    method: &'static str,
    class: &'static str,
    answers: metrics::Counter,
    time: metrics::Histogram,
}

thread_local! {
    /// Looked up once a thread: three labels are dearer to find than to count.
    static ROUTES: RefCell<HashMap<Arc<str>, Vec<OfRoute>>> = RefCell::default();
}

/// Notes an answer of the doors.
pub fn answered(method: &'static str, route: &Arc<str>, status: StatusCode, took: Duration) {
    let class = match status.as_u16() {
        100..200 => "1xx",
        200..300 => "2xx",
        300..400 => "3xx",
        400..500 => "4xx",
        _ => "5xx",
    };
    ROUTES.with_borrow_mut(|known| {
        let of_route = known.entry(route.clone()).or_default();
        let at = of_route.iter().position(|r| (r.method, r.class) == (method, class)).unwrap_or_else(|| {
            let answers = counter!("cortex_http_requests_total", "method" => method, "route" => route.clone(), "status" => class);
            let time = histogram!("cortex_http_request_duration_seconds", "method" => method, "route" => route.clone());
            of_route.push(OfRoute { method, class, answers, time });
            of_route.len() - 1
        });
        of_route[at].answers.increment(1);
        of_route[at].time.record(took.as_secs_f64());
    });
    if status == StatusCode::UNAUTHORIZED {
        let kind = match &**route {
            "/api/v1/auth/login" => "password",
            "/api/v1/auth/refresh" => "refresh",
            _ => "bearer",
        };
        counter!("cortex_auth_failures_total", "kind" => kind).increment(1);
    }
}

/// What is looked at when somebody asks.
#[derive(Clone)]
pub struct Scraped {
    pub pool: Arc<Pool>,
    pub store: Arc<Store>,
    pub limits: Limits,
    pub data_dir: PathBuf,
}

pub fn router(scraped: Scraped, hosts: Hosts) -> Router {
    let guard = middleware::from_fn_with_state(hosts, hosts::guard_plain);
    Router::new().route("/metrics", get(scrape)).layer(guard).with_state(scraped)
}

async fn scrape(State(s): State<Scraped>) -> Response {
    s.look().await;
    let mut text = HANDLE.get().map(PrometheusHandle::render).unwrap_or_default();
    process(&mut text);
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response()
}

impl Scraped {
    async fn look(&self) {
        gauge!("cortex_tasks_waiting").set(self.pool.queue.waiting() as f64);
        gauge!("cortex_store_queue_depth").set(self.store.waiting() as f64);
        if let Some(free) = free_bytes(&self.data_dir) {
            gauge!("cortex_data_folder_free_bytes").set(free as f64);
        }
        gauge!("cortex_tasks_in_doubt").set(self.pool.links.in_doubt() as f64);
        let links = self.pool.links.all();
        let spools = || links.iter().filter_map(|l| l.health);
        gauge!("cortex_nodes_spool_bytes").set(spools().map(|h| h.spool_bytes as f64).sum::<f64>());
        let full = |h: &Health| h.spool_limit > 0 && h.spool_bytes / 4 >= h.spool_limit / 5;
        gauge!("cortex_nodes_spool_full").set(spools().filter(full).count() as f64);
        let draining = links.iter().filter(|l| l.draining).count() as u64;
        let online = links.len() as u64 - draining;
        let set = |status: &'static str, n: u64| gauge!("cortex_nodes", "status" => status).set(n as f64);
        set("online", online);
        set("draining", draining);
        if let Ok(Ok(used)) = tokio::time::timeout(STORE_PATIENCE, self.store.storage()).await {
            let warned = self.limits.warnings(&used);
            let disk_used = used.disk_bytes.saturating_sub(used.disk_free_bytes);
            let bounds = [
                ("journal", used.journal_bytes, self.limits.journal_bytes),
                ("output", used.output_bytes, self.limits.output_bytes),
                ("disk", disk_used, used.disk_bytes),
            ];
            for (what, bytes, limit) in bounds {
                gauge!("cortex_storage_used_bytes", "what" => what).set(bytes as f64);
                gauge!("cortex_storage_limit_bytes", "what" => what).set(limit as f64);
                gauge!("cortex_storage_warnings", "what" => what).set(if warned.contains(what) { 1.0 } else { 0.0 });
            }
        }
        let counted = tokio::time::timeout(STORE_PATIENCE, self.store.count_nodes()).await;
        gauge!("cortex_store_up").set(if matches!(counted, Ok(Ok(_))) { 1.0 } else { 0.0 });
        if let Ok(Ok(n)) = counted {
            set("revoked", n.revoked);
            set("offline", n.known.saturating_sub(n.revoked + online + draining));
        }
    }
}

/// Room for the hub on the disk of a folder.
pub fn free_bytes(folder: &Path) -> Option<u64> {
    let disk = rustix::fs::statvfs(folder).ok()?;
    Some(disk.f_bavail * disk.f_frsize)
}

/// The names that every exporter gives of its process.
fn process(text: &mut String) {
    let Some(p) = Process::read() else { return };
    let mut one = |name: &str, kind: &str, help: &str, value: f64| {
        let _ = write!(text, "# HELP {name} {help}\n# TYPE {name} {kind}\n{name} {value}\n\n");
    };
    one("process_cpu_seconds_total", "counter", "User and system time of the hub.", p.cpu_seconds);
    one("process_resident_memory_bytes", "gauge", "Memory of the hub that is in use.", p.resident_bytes);
    one("process_open_fds", "gauge", "Open file descriptors.", p.open_fds);
    one("process_max_fds", "gauge", "File descriptors that may be open.", p.max_fds);
    one("process_start_time_seconds", "gauge", "When the hub was started, in Unix time.", p.started);
}

struct Process {
    cpu_seconds: f64,
    resident_bytes: f64,
    open_fds: f64,
    max_fds: f64,
    started: f64,
}

impl Process {
    fn read() -> Option<Self> {
        let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
        // Behind the name, which may hold anything; the first field there is the third of the line.
        let fields: Vec<&str> = stat.rsplit_once(") ")?.1.split(' ').collect();
        let field = |n: usize| fields.get(n - 3)?.parse::<f64>().ok();
        let ticks = rustix::param::clock_ticks_per_second() as f64;
        let boot = std::fs::read_to_string("/proc/stat").ok()?;
        let boot: f64 = boot.lines().find_map(|l| l.strip_prefix("btime "))?.trim().parse().ok()?;
        let most = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        Some(Self {
            cpu_seconds: (field(14)? + field(15)?) / ticks,
            resident_bytes: field(24)? * rustix::param::page_size() as f64,
            // The look itself has one open.
            open_fds: std::fs::read_dir("/proc/self/fd").ok()?.count().saturating_sub(1) as f64,
            max_fds: most.map_or(f64::INFINITY, |n| n as f64),
            started: boot + field(22)? / ticks,
        })
    }
}

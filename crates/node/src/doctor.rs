//! `cortex-node doctor`: the way from this machine to its hub, hop by hop, and what tasks need here. Each
//! hop is tried, not guessed; the first that fails is named, with what to do about it.
//!
//! It changes nothing, and may run beside the daemon: what the daemon holds alone (the state, the link,
//! the warden's ear) is taken from files that it leaves open to be read, and the hub is asked over a
//! connection of its own.

use crate::capabilities::disk_of;
use crate::ceiling;
use crate::config::{self, Resolved, environment};
use crate::enrolment::{self, words};
use crate::link::connect::says_revoked;
use crate::link::time::NodeTime;
use crate::state::{DataDir, Identity, State};
use crate::status::Status;
use crate::tls::{self, ClientCertificate, TlsError};
use crate::way::Way;
use crate::workspace::WorkspaceRoot;
use mesh_process::files::Lock;
use mesh_process::proxy::{Proxies, Proxy};
use mesh_process::{Clock as _, SystemClock};
use mesh_wire::convert::rfc3339;
use mesh_wire::node::node_link_client::NodeLinkClient;
use mesh_wire::node::{HealthAck, HealthReport};
use node_warden::TreeKill;
use serde::Serialize;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::net::{TcpStream, UnixStream};

const PATIENCE: Duration = Duration::from_secs(10);
/// A clock that is off by more is told of.
const SKEW_SECS: i64 = 600;
/// With less a task cannot count on its next write.
const LEAST_FREE_BYTES: u64 = 64 << 20;
const PROXY: &str = "a proxy that ends TLS, or another server, stands in between; the node port must be passed through as it is \
    (TCP, without TLS of its own)";

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    Ok,
    /// It works, and somebody should look at it.
    Warning,
    Failed,
    /// Not tried, since an earlier hop failed.
    Skipped,
}

#[derive(Debug, Clone, Serialize)]
pub struct Check {
    pub hop: &'static str,
    pub verdict: Verdict,
    pub detail: String,
    /// What to do.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub advice: String,
}

#[derive(Debug, Default, Serialize)]
pub struct Report {
    pub ok: bool,
    /// The first hop that failed.
    pub failed: Option<&'static str>,
    pub checks: Vec<Check>,
}

/// What a hop came to.
type Hop<T> = Result<T, (String, String)>;

fn fail<T>(detail: impl ToString, advice: impl ToString) -> Hop<T> {
    Err((detail.to_string(), advice.to_string()))
}

impl Report {
    fn push(&mut self, hop: &'static str, verdict: Verdict, detail: impl ToString, advice: impl ToString) {
        self.checks.push(Check { hop, verdict, detail: detail.to_string(), advice: advice.to_string() });
    }
    /// Notes a hop; gives what the next ones need of it.
    fn note<T>(&mut self, hop: &'static str, found: Hop<(T, String)>) -> Option<T> {
        match found {
            Ok((value, detail)) => {
                self.push(hop, Verdict::Ok, detail, "");
                Some(value)
            }
            Err((detail, advice)) => {
                self.push(hop, Verdict::Failed, detail, advice);
                None
            }
        }
    }
    fn skip(&mut self, hops: &[&'static str]) {
        for hop in hops {
            self.push(hop, Verdict::Skipped, "not tried: a hop before it failed", "");
        }
    }
    fn done(mut self) -> Self {
        self.failed = self.checks.iter().find(|c| c.verdict == Verdict::Failed).map(|c| c.hop);
        self.ok = self.failed.is_none();
        self
    }
}

/// What is known of the node without its daemon's leave.
struct Known {
    way: Way,
    server_name: String,
    workspace_root: String,
    identity: Identity,
    own: (rustls::pki_types::CertificateDer<'static>, rustls::pki_types::CertificateDer<'static>),
    /// Hub time as it was stored last; 0 while the daemon holds it.
    stored_ms: i64,
    daemon: Option<Status>,
}

/// Tries every hop.
pub async fn run(dir: &DataDir) -> Report {
    let mut report = Report::default();
    let folder = report.note("data_folder", data_folder(dir.path()));
    let known = match folder {
        Some(()) => report.note("identity", identity(dir)),
        None => {
            report.skip(&["identity"]);
            None
        }
    };
    match folder {
        Some(()) => ceiling(&mut report, dir),
        None => report.skip(&["ceiling"]),
    }
    match &known {
        Some(known) => to_the_hub(&mut report, known).await,
        None => report.skip(&["resolve", "tcp", "tls", "hub", "clock"]),
    }
    match &known {
        Some(known) => {
            report.note("daemon", daemon(known));
            report.note("warden", warden(dir, known.daemon.is_some()).await);
            report.note("workspace", workspace(&known.workspace_root));
        }
        None => report.skip(&["daemon", "warden", "workspace"]),
    }
    if folder.is_some() {
        report.note("spool", spool(dir.path(), node_warden::SPOOL_NODE_BYTES));
    }
    sandbox(&mut report);
    report.done()
}

fn data_folder(path: &Path) -> Hop<((), String)> {
    let named = path.display();
    let meta = match std::fs::metadata(path) {
        Ok(m) if m.is_dir() => m,
        Ok(_) => return fail(format!("{named} is no folder"), "name the node's folder with --data-dir"),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            return fail(
                format!("{named} is not there"),
                "join a hub with `cortex-node join FILE`, or name the node's folder with --data-dir",
            );
        }
        Err(e) => return fail(format!("{named}: {e}"), "run this as the user that runs the node"),
    };
    let own = rustix::process::geteuid().as_raw();
    if meta.uid() != own {
        return fail(format!("{named} belongs to uid {}, and this is uid {own}", meta.uid()), "run this as the user that runs the node");
    }
    let mode = meta.permissions().mode() & 0o777;
    if mode & 0o077 != 0 {
        return fail(format!("{named} is open to others (mode {mode:o})"), format!("chmod 700 {named}"));
    }
    let probe = path.join(format!(".doctor-{}", std::process::id()));
    let written = std::fs::write(&probe, b"x");
    let _ = std::fs::remove_file(&probe);
    match written {
        Ok(()) => Ok(((), named.to_string())),
        Err(e) => fail(format!("{named} cannot be written: {e}"), "make room on its disk, or mount it for writing"),
    }
}

/// What the machine's owner has said.
fn ceiling(report: &mut Report, dir: &DataDir) {
    match ceiling::load(dir) {
        Err(e) => report.push(
            "ceiling",
            Verdict::Failed,
            format!("no task is taken: {e}"),
            "mend the file, or set another with `cortex-node policy set FILE`",
        ),
        Ok(_) if ceiling::is_disabled(dir) => {
            report.push("ceiling", Verdict::Warning, "this node is disabled by its owner", "`cortex-node enable` takes tasks again");
        }
        Ok((text, _)) => report.push(
            "ceiling",
            Verdict::Ok,
            text.map_or_else(|| "no file: the default holds".to_owned(), |_| dir.ceiling().display().to_string()),
            "",
        ),
    }
}

fn identity(dir: &DataDir) -> Hop<(Known, String)> {
    const ANEW: &str = "take the data folder away and join anew with a fresh invite";
    let joined = [dir.database(), dir.key(), dir.certificate(), dir.root()];
    if let Some(gone) = joined.iter().find(|p| !p.exists()) {
        let advice = if dir.database().exists() { ANEW } else { "join a hub with `cortex-node join FILE`" };
        return fail(format!("{} is missing", gone.display()), advice);
    }
    let mode = std::fs::metadata(dir.key()).map(|m| m.permissions().mode() & 0o777).unwrap_or(0);
    if mode & 0o077 != 0 {
        return fail(
            format!("{} can be read by others (mode {mode:o})", dir.key().display()),
            format!("chmod 600 {}", dir.key().display()),
        );
    }
    let identity = dir.identity().or_else(|e| fail(e, ANEW))?;
    let own = dir.certificates().or_else(|e| fail(e, ANEW))?;
    let Some(validity) = enrolment::validity(&own.0) else { return fail("certificate.der is no certificate", ANEW) };
    if tls::spki_sha256(&own.0) != Some(identity.spki_sha256()) {
        return fail("the certificate is for another key than identity.key", ANEW);
    }
    let settled = settings(dir, &own.1)?;
    let now = SystemClock::new().now_ms().max(settled.2);
    if validity.not_before_ms > now {
        let detail =
            format!("the certificate begins at {} and this machine believes that it is {}", rfc3339(validity.not_before_ms), rfc3339(now));
        return fail(detail, "set this machine's clock");
    }
    if validity.not_after_ms <= now {
        let detail =
            format!("the certificate ended at {}, and this machine believes that it is {}", rfc3339(validity.not_after_ms), rfc3339(now));
        return fail(detail, format!("if the clock is right: {ANEW}"));
    }
    let ((way, server_name, workspace_root), daemon, stored_ms) = settled;
    let detail = format!("certificate until {}", rfc3339(validity.not_after_ms));
    Ok((Known { way, server_name, workspace_root, identity, own, stored_ms, daemon }, detail))
}

type Settled = ((Way, String, String), Option<Status>, i64);

/// Hub, its name and the workspace root; from the daemon's status while it holds the state.
fn settings(dir: &DataDir, root: &[u8]) -> Hop<Settled> {
    // Kept while the state is read: a daemon that starts now waits for it.
    let lock = dir.lock().exists().then(|| Lock::try_take(&dir.lock()));
    if matches!(lock, Some(Ok(None))) {
        // The name is the same for every address of a hub, so that it needs no state.
        let Some(s) = Status::read(dir).filter(|s| !s.hub.is_empty()) else {
            return fail("a daemon runs and has not written status.json yet", "try again in a moment");
        };
        let hub = s.hub_id.parse().or_else(|e| fail(format!("status.json: {e}"), "restart the node"))?;
        let proxies = Proxies::read(&environment).or_else(|e| fail(e, "mend the variable that is named"))?;
        let way = Way::parse(&s.hub, proxies);
        return Ok(((way, mesh_core::enrol::server_name(hub), s.workspace_root.clone()), Some(s), 0));
    }
    let state = State::open(dir).or_else(|e| fail(e, "is another program at the folder? else restore it from a backup, or join anew"))?;
    if let Ok(Some(text)) = state.revoked() {
        return fail(
            format!("the hub has revoked this node: {text}"),
            format!("to join again, take {} away and use a fresh invite", dir.path().display()),
        );
    }
    let settings = match state.settings() {
        Ok(Some(s)) => s,
        Ok(None) => return fail("this machine has not joined a hub yet", "join with `cortex-node join FILE`"),
        Err(e) => return fail(e, "join anew with a fresh invite"),
    };
    let r: Resolved = settings.resolve(&environment).or_else(|e| fail(e, "mend the setting that is named"))?;
    let trust = state.trust().or_else(|e| fail(e, "join anew with a fresh invite"))?.unwrap_or(r.trust);
    if !trust.believes(root) {
        return fail("root.der is none of the roots that this node believes", "restore it, or join anew with a fresh invite");
    }
    let stored = state.hub_time_ms().unwrap_or(0);
    Ok(((r.way, r.server_name, r.workspace_root), None, stored))
}

async fn to_the_hub(report: &mut Report, known: &Known) {
    let address = known.way.first().await;
    let tcp = match known.way.proxy(address) {
        Some(proxy) => {
            let through = through(&proxy, address).await;
            let Some(tcp) = report.note("proxy", through) else { return report.skip(&["resolve", "tcp", "tls", "hub", "clock"]) };
            for hop in ["resolve", "tcp"] {
                report.push(hop, Verdict::Skipped, "the proxy goes there", "");
            }
            tcp
        }
        None => {
            let Some(()) = report.note("resolve", resolve(address).await) else { return report.skip(&["tcp", "tls", "hub", "clock"]) };
            let Some(tcp) = report.note("tcp", tcp(address).await) else { return report.skip(&["tls", "hub", "clock"]) };
            tcp
        }
    };
    let Some(stream) = report.note("tls", handshake(known, tcp, address).await) else { return report.skip(&["hub", "clock"]) };
    let Some(ack) = report.note("hub", ask(known, stream, address).await) else { return report.skip(&["clock"]) };
    clock(report, &ack);
}

/// Has its own patience, which tells a proxy that is silent from one that is not there.
async fn through(proxy: &Proxy, address: &str) -> Hop<(TcpStream, String)> {
    match proxy.connect(address).await {
        Ok(tcp) => Ok((tcp, format!("{} connects to {address}", proxy.address()))),
        Err(e) => fail(&e, e.advice()),
    }
}

async fn in_time<T>(work: impl Future<Output = T>) -> Option<T> {
    tokio::time::timeout(PATIENCE, work).await.ok()
}

async fn resolve(address: &str) -> Hop<((), String)> {
    let host = address.rsplit_once(':').map_or(address, |(h, _)| h);
    let advice = format!(
        "is {host:?} the hub's name? it stands in the invite (hub.grpc), and CORTEX_NODE_HUB_GRPC overrides it; else mend this machine's DNS"
    );
    match in_time(tokio::net::lookup_host(address)).await {
        None => fail(format!("{address}: no answer of the resolver in time"), advice),
        Some(Err(e)) => fail(format!("{address}: {e}"), advice),
        Some(Ok(found)) => {
            let found: Vec<String> = found.map(|a| a.ip().to_string()).collect();
            if found.is_empty() { fail(format!("{address}: no address"), advice) } else { Ok(((), found.join(", "))) }
        }
    }
}

async fn tcp(address: &str) -> Hop<(TcpStream, String)> {
    const REFUSED: &str = "does the hub run there, on this port (node.addr)? does a firewall stand between?";
    match in_time(TcpStream::connect(address)).await {
        None => fail(format!("{address}: no answer in {} s", PATIENCE.as_secs()), "a firewall drops it, or the machine is down"),
        Some(Err(e)) => fail(format!("{address}: {e}"), REFUSED),
        Some(Ok(tcp)) => Ok((tcp, address.to_owned())),
    }
}

type Stream = tokio_rustls::client::TlsStream<TcpStream>;

async fn handshake(known: &Known, tcp: TcpStream, address: &str) -> Hop<(Stream, String)> {
    let time = NodeTime::new(known.stored_ms, SystemClock::shared());
    let (certificate, root) = known.own.clone();
    let Some(pin) = tls::spki_sha256(&root) else { return fail("root.der is no certificate", "join anew with a fresh invite") };
    let own = ClientCertificate { certificate, root, key: known.identity.private() };
    let config = tls::client_config(pin, Some(own), time).or_else(|e| fail(e, "join anew with a fresh invite"))?;
    match in_time(tls::handshake(tcp, address, &known.server_name, config)).await {
        None => fail("the other side says nothing that belongs to TLS", PROXY),
        Some(Ok(stream)) => Ok((stream, "TLS 1.3, by the root that was pinned".into())),
        Some(Err(e @ TlsError::Pin { .. })) => fail(e, PROXY),
        Some(Err(e)) => fail(&e, tls_advice(&e)),
    }
}

fn tls_advice(e: &TlsError) -> &'static str {
    use rustls::{CertificateError as C, Error as T};
    let TlsError::Handshake { source, .. } = e else { return PROXY };
    match source.get_ref().and_then(|e| e.downcast_ref::<T>()) {
        Some(T::InvalidCertificate(C::Expired | C::ExpiredContext { .. } | C::NotValidYet | C::NotValidYetContext { .. })) => {
            "set this machine's clock; if it is right, the hub's certificate was not renewed: look at the hub"
        }
        Some(T::AlertReceived(_)) => "the hub ended the handshake; its log says why",
        _ => PROXY,
    }
}

/// The hub answers, and knows this node by its certificate.
async fn ask(known: &Known, stream: Stream, address: &str) -> Hop<(HealthAck, String)> {
    let hub = "look at the hub's log, and whether it is of a version with this node's";
    let Some(Ok(channel)) = in_time(tls::channel(stream)).await else { return fail("the other side does not speak HTTP/2", PROXY) };
    let question = HealthReport { ask_only: true, ..HealthReport::default() };
    let answer = match in_time(NodeLinkClient::new(channel).report_health(question)).await {
        None => return fail("the hub does not answer", hub),
        Some(a) => a,
    };
    if let Some(s) = known.daemon.as_ref().filter(|s| s.link == "superseded") {
        return fail(&s.link_detail, "this data folder was copied: stop the other machine, revoke this node and join both anew");
    }
    match answer {
        Ok(ack) => {
            let ack = ack.into_inner();
            let takes = match ack.unschedulable.as_str() {
                "" => "gives it work".to_owned(),
                "offline" => "knows this node; its link is not up".to_owned(),
                why => format!("knows this node and gives it no work: {why}"),
            };
            Ok((ack, format!("{address} {takes}")))
        }
        Err(s) if says_revoked(&s) => fail(words(&s), "take the data folder away and join anew with a fresh invite"),
        Err(s) => match s.code() {
            tonic::Code::Unauthenticated | tonic::Code::PermissionDenied | tonic::Code::NotFound => fail(
                format!("the hub does not know this node: {}", words(&s)),
                "take the data folder away and join anew with a fresh invite",
            ),
            // TLS 1.3 tells a client only now that its certificate was not taken.
            _ if said(&s).contains("alert") || said(&s).contains("certificate") => fail(
                format!("the hub did not take this node's certificate: {}", said(&s)),
                "take the data folder away and join anew with a fresh invite",
            ),
            _ => fail(format!("the hub failed: {}", words(&s)), hub),
        },
    }
}

/// An error with all its sources.
fn said(e: &dyn std::error::Error) -> String {
    let mut all = e.to_string();
    let mut source = e.source();
    while let Some(s) = source {
        all = format!("{all}: {s}");
        source = s.source();
    }
    all
}

fn clock(report: &mut Report, ack: &HealthAck) {
    if ack.hub_time_ms == 0 {
        return report.push("clock", Verdict::Skipped, "the hub is of a version that does not tell its time", "");
    }
    let ahead = (SystemClock::new().now_ms() - ack.hub_time_ms) / 1000;
    if ahead.abs() > SKEW_SECS {
        let way = if ahead > 0 { "ahead of" } else { "behind" };
        let detail = format!("this machine's clock is {} s {way} the hub's", ahead.abs());
        return report.push("clock", Verdict::Warning, detail, "set the clock that is wrong; the node works by the hub's time meanwhile");
    }
    report.push("clock", Verdict::Ok, format!("{ahead} s from the hub's"), "");
}

fn daemon(known: &Known) -> Hop<((), String)> {
    match &known.daemon {
        None => fail("no daemon runs", "start it with `cortex-node run`"),
        Some(s) if s.link == "up" => Ok(((), format!("pid {}, link up since {}", s.pid, s.since))),
        Some(s) => fail(
            format!("pid {}, link {} since {}: {}", s.pid, s.link, s.since, s.link_detail),
            "if every hop before this is fine, wait for its next try",
        ),
    }
}

async fn warden(dir: &DataDir, daemon: bool) -> Hop<((), String)> {
    // After an upgrade the one of before has gone, and another serves from its own seat.
    let mut path = node_warden::socket_path(dir.path());
    for seat in node_warden::seats(dir.path()) {
        let other = node_warden::socket_path(&seat);
        if other != path && matches!(in_time(UnixStream::connect(&other)).await, Some(Ok(_))) {
            path = other;
            break;
        }
    }
    if !daemon && !path.exists() {
        return Ok(((), "starts with the daemon".into()));
    }
    // Greeting it would take the daemon's place.
    match in_time(UnixStream::connect(&path)).await {
        Some(Ok(_)) => Ok(((), path.display().to_string())),
        // Left by one that was killed; the next daemon starts another.
        Some(Err(_)) if !daemon => Ok(((), "starts with the daemon".into())),
        Some(Err(e)) => fail(
            format!("{}: {e}", path.display()),
            format!("see {}; `cortex-node stop` and a new start bring a fresh one", dir.path().join("warden.log").display()),
        ),
        None => fail(format!("{}: no answer", path.display()), "`cortex-node stop` and a new start bring a fresh one"),
    }
}

fn workspace(text: &str) -> Hop<((), String)> {
    let root = rustix::process::geteuid().is_root();
    let home = if root { PathBuf::from("/root") } else { config::home().or_else(|e| fail(e, "set HOME"))? };
    // What is not there yet is made by the daemon; here only what can be said of it is said.
    let path = WorkspaceRoot::path_of(text, &home, root).or_else(|e| fail(e, "name another with CORTEX_NODE_WORKSPACE_ROOT"))?;
    if !path.exists() {
        return fail(
            format!("{} is not there", path.display()),
            "`cortex-node run` makes it; if it cannot, name another with CORTEX_NODE_WORKSPACE_ROOT",
        );
    }
    WorkspaceRoot::check(&path, root).or_else(|e| fail(e, "open the way, or name another with CORTEX_NODE_WORKSPACE_ROOT"))?;
    let probe = path.join(format!(".doctor-{}", std::process::id()));
    let made = std::fs::create_dir(&probe);
    let _ = std::fs::remove_dir(&probe);
    if let Err(e) = made {
        return fail(format!("{}: {e}", path.display()), "let the node's user write there");
    }
    free(&path)
}

fn spool(dir: &Path, limit: u64) -> Hop<((), String)> {
    let used = node_warden::spool::used(dir);
    if used >= limit {
        return fail(
            format!("{} of {} are kept for the hub: tasks with output pause", mib(used), mib(limit)),
            "it empties once the hub takes it: look at the hub and at the link",
        );
    }
    let ((), disk) = free(dir)?;
    Ok(((), format!("{} of {} used; {disk}", mib(used), mib(limit))))
}

fn free(path: &Path) -> Hop<((), String)> {
    let (total, free) = disk_of(path);
    let detail = format!("{}: {} of {} free", path.display(), mib(free), mib(total));
    if total > 0 && free < LEAST_FREE_BYTES { fail(detail, "make room on this disk") } else { Ok(((), detail)) }
}

fn mib(bytes: u64) -> String {
    format!("{} MiB", bytes >> 20)
}

fn sandbox(report: &mut Report) {
    let probe = node_warden::probe();
    let tree = match probe.tree_kill {
        TreeKill::PidNamespace => "pid namespace",
        TreeKill::UserPidNamespace => "pid namespace inside a user namespace",
        TreeKill::Cgroup => "cgroup.kill",
        TreeKill::None => {
            let advice = "allow user namespaces (sysctl kernel.unprivileged_userns_clone, user.max_user_namespaces), delegate a cgroup, or run the node as root";
            return report.push("sandbox", Verdict::Failed, "no way to end a whole task was found: every task is refused", advice);
        }
    };
    if !probe.no_new_privs {
        return report.push("sandbox", Verdict::Warning, format!("{tree}; without no_new_privs"), "use a kernel that has it");
    }
    let uid = if rustix::process::geteuid().is_root() { "a uid per session" } else { "one uid for all tasks (the node is not root)" };
    report.push("sandbox", Verdict::Ok, format!("{tree}, no_new_privs, {uid}"), "");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_spool_fails() {
        let dir = tempfile::tempdir().unwrap();
        assert!(spool(dir.path(), 1).is_ok(), "nothing is kept");
        std::fs::create_dir_all(dir.path().join("spool/out")).unwrap();
        std::fs::write(dir.path().join("spool/out/task_1-1"), vec![1; 100_000]).unwrap();
        assert!(node_warden::spool::used(dir.path()) >= 100_000);
        assert!(spool(dir.path(), 1 << 30).is_ok());
        let (detail, advice) = spool(dir.path(), 90_000).unwrap_err();
        assert!(detail.contains("pause") && advice.contains("hub"), "{detail} {advice}");
    }

    #[test]
    fn a_clock_that_is_off_is_a_warning() {
        let verdict = |off_ms: i64| {
            let mut report = Report::default();
            let hub_time_ms = if off_ms == i64::MIN { 0 } else { SystemClock::new().now_ms() - off_ms };
            clock(&mut report, &HealthAck { hub_time_ms, ..HealthAck::default() });
            let report = report.done();
            assert!(report.ok, "the node goes by the hub's time");
            (report.checks[0].verdict, report.checks[0].detail.clone())
        };
        assert_eq!(verdict(60_000).0, Verdict::Ok);
        let (v, detail) = verdict(3_600_000);
        assert!(v == Verdict::Warning && detail.contains("ahead of"), "{detail}");
        let (v, detail) = verdict(-3_600_000);
        assert!(v == Verdict::Warning && detail.contains("behind"), "{detail}");
        assert_eq!(verdict(i64::MIN).0, Verdict::Skipped);
    }
}

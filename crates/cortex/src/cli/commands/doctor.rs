//! The way from here to the hub, hop by hop. Each is tried; the first that fails is named, with what to
//! do about it.

use crate::cli::args::Format;
use crate::cli::config::Settings;
use crate::cli::{Fail, Io, advice, output, report};
use crate::{Client, Error};
use mesh_process::config::env;
use mesh_process::proxy::Proxies;
use serde::Serialize;
use std::time::Duration;
use tokio::net::TcpStream;

const PATIENCE: Duration = Duration::from_secs(10);

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Verdict {
    Ok,
    /// It works, and somebody should look at it.
    Warning,
    Failed,
    /// Not tried.
    Skipped,
}

#[derive(Debug, Serialize)]
struct Check {
    hop: &'static str,
    verdict: Verdict,
    detail: String,
    /// What to do.
    #[serde(skip_serializing_if = "String::is_empty")]
    advice: String,
}

#[derive(Debug, Default, Serialize)]
struct Report {
    ok: bool,
    /// The first hop that failed.
    failed: Option<&'static str>,
    checks: Vec<Check>,
}

impl Report {
    fn push(&mut self, hop: &'static str, verdict: Verdict, detail: impl ToString, advice: impl ToString) {
        self.checks.push(Check { hop, verdict, detail: detail.to_string(), advice: advice.to_string() });
    }
    fn ok(&mut self, hop: &'static str, detail: impl ToString) {
        self.push(hop, Verdict::Ok, detail, "");
    }
    /// Notes why a hop failed, by the hub's client.
    fn fail(&mut self, hop: &'static str, e: &Error, with_key: bool) {
        let else_look = || "look at the hub's log, and whether a hub of this version answers there".to_owned();
        self.push(hop, Verdict::Failed, e, advice(e, with_key).unwrap_or_else(else_look));
    }
}

pub(super) async fn command(settings: Result<Settings, Error>, format: Format, io: &mut Io<'_>) -> u8 {
    let mut found = Report::default();
    try_all(&mut found, settings).await;
    found.failed = found.checks.iter().find(|c| c.verdict == Verdict::Failed).map(|c| c.hop);
    found.ok = found.failed.is_none();
    match show(&found, format, io) {
        Ok(()) => u8::from(!found.ok),
        Err(e) => report(io, &e, false),
    }
}

fn show(found: &Report, format: Format, io: &mut Io<'_>) -> Result<(), Fail> {
    if format == Format::Json {
        return output::json(io, found);
    }
    for c in &found.checks {
        let mark = match c.verdict {
            Verdict::Ok => "ok",
            Verdict::Warning => "WARNING",
            Verdict::Failed => "FAILED",
            Verdict::Skipped => "-",
        };
        writeln!(io.out, "{mark:<8} {:<12} {}", c.hop, output::cell(&c.detail))?;
        if !c.advice.is_empty() {
            writeln!(io.out, "{:<21} → {}", "", output::cell(&c.advice))?;
        }
    }
    match found.failed {
        None => writeln!(io.out, "all is well")?,
        Some(hop) => writeln!(io.out, "the first hop that fails: {hop}")?,
    }
    Ok(io.out.flush()?)
}

/// Ends at the first hop that fails: what lies behind it cannot be seen from here.
async fn try_all(report: &mut Report, settings: Result<Settings, Error>) {
    let client = settings.and_then(|s| s.client().map(|c| (s, c)));
    let (settings, client) = match client {
        Ok(both) => both,
        Err(e) => return report.push("config", Verdict::Failed, e, "mend the setting or the file that is named"),
    };
    report.ok("config", format!("the hub at {}", client.url()));
    if !to_the_port(report, client.url()).await {
        return;
    }
    match client.healthz().await {
        Ok(h) if h.status == "ok" => report.ok("http", "a cortex hub answers"),
        Ok(h) => return report.push("http", Verdict::Failed, format!("it says of itself: {:?}", h.status), "is this the hub's address?"),
        // The port took the connection, so it is the handshake that failed.
        Err(e @ Error::Unreachable { .. }) if client.url().starts_with("https:") => return report.fail("tls", &e, false),
        Err(e) => {
            let advice =
                "the port is open and no hub answers there as one does: is this the hub's address, and not its node port or a proxy?";
            return report.push("http", Verdict::Failed, e, advice);
        }
    }
    match client.readyz().await {
        Ok(r) if r.warnings.is_empty() => report.ok("ready", format!("up for {} s", r.uptime_secs)),
        Ok(r) => {
            let detail = format!("its storage is nearly used up: {}", r.warnings.join(", "));
            report.push("ready", Verdict::Warning, detail, "an admin sees more in GET /api/v1/system/stats and sets [retention]");
        }
        Err(e) => return report.push("ready", Verdict::Failed, e, "the hub lives and cannot serve now; its log says more"),
    }
    version(report, &client).await;
    who(report, &settings, &client).await;
}

async fn to_the_port(report: &mut Report, url: &str) -> bool {
    let Ok(parsed) = reqwest::Url::parse(url) else { return true };
    let (Some(host), Some(port)) = (parsed.host_str(), parsed.port_or_known_default()) else { return true };
    let address = format!("{host}:{port}");
    match Proxies::read(&|name| env(name)).map(|p| p.of(parsed.scheme(), &address)) {
        // The HTTP client knows more kinds of proxies than are tried here.
        Err(e) => report.push("proxy", Verdict::Warning, format!("not tried: {e}"), "if a hop below fails, mend this variable first"),
        Ok(None) => return directly(report, host.trim_matches(['[', ']']), port).await,
        Ok(Some(proxy)) => {
            // What is not secret is asked of the proxy as it is, without CONNECT.
            let tried = if parsed.scheme() == "https" { proxy.connect(&address).await } else { proxy.reach().await };
            match tried {
                Ok(_) => report.ok("proxy", format!("{} leads to {address}", proxy.address())),
                Err(e) => {
                    report.push("proxy", Verdict::Failed, &e, e.advice());
                    return false;
                }
            }
        }
    }
    for hop in ["resolve", "tcp"] {
        report.push(hop, Verdict::Skipped, "the proxy goes there", "");
    }
    true
}

async fn directly(report: &mut Report, host: &str, port: u16) -> bool {
    let advice = "is this the hub's name? another one is given with --url or CORTEX_URL; else mend this machine's DNS";
    match tokio::time::timeout(PATIENCE, tokio::net::lookup_host((host, port))).await.map(|r| r.map(Iterator::collect::<Vec<_>>)) {
        Err(_) => report.push("resolve", Verdict::Failed, format!("{host}: no answer of the resolver in time"), advice),
        Ok(Err(e)) => report.push("resolve", Verdict::Failed, format!("{host}: {e}"), advice),
        Ok(Ok(found)) => {
            report.ok("resolve", found.iter().map(|a| a.ip().to_string()).collect::<Vec<_>>().join(", "));
            let advice = "is the hub running there, and on this port (http.addr)? does a firewall stand between?";
            match tokio::time::timeout(PATIENCE, TcpStream::connect((host, port))).await {
                Ok(Ok(_)) => {
                    report.ok("tcp", format!("{host}:{port}"));
                    return true;
                }
                Ok(Err(e)) => report.push("tcp", Verdict::Failed, format!("{host}:{port}: {e}"), advice),
                Err(_) => report.push("tcp", Verdict::Failed, format!("{host}:{port}: no answer in time"), advice),
            }
        }
    }
    false
}

async fn version(report: &mut Report, client: &Client) {
    const OWN: &str = env!("CARGO_PKG_VERSION");
    match client.server_info().await {
        Ok(i) if minor(&i.version) == minor(OWN) => report.ok("version", format!("hub {}, cortex {OWN}", i.version)),
        Ok(i) => {
            let detail = format!("the hub is {}, and this is cortex {OWN}", i.version);
            report.push("version", Verdict::Warning, detail, "bring both to one version where something does not work");
        }
        Err(e) => report.push("version", Verdict::Warning, e, ""),
    }
}

fn minor(version: &str) -> Vec<&str> {
    version.split('.').take(2).collect()
}

async fn who(report: &mut Report, settings: &Settings, client: &Client) {
    match client.me().await {
        Ok(me) => report.ok("credentials", format!("{}, {}", me.user.username, me.role)),
        Err(e) => return report.fail("credentials", &e, settings.uses_api_key()),
    }
    match client.nodes().await {
        Ok(nodes) => {
            let online = nodes.iter().filter(|n| n.status == "online").count();
            let detail = format!("{online} of {} online", nodes.len());
            match (online, nodes.len()) {
                (0, 0) => report.push("nodes", Verdict::Warning, "there is none", "add one with: cortex node add NAME"),
                (0, _) => report.push("nodes", Verdict::Warning, detail, "on the machine itself, cortex-node doctor names what fails"),
                _ => report.ok("nodes", detail),
            }
        }
        // A key of few scopes is no fault of the way.
        Err(e) => report.push("nodes", Verdict::Warning, e, "what you may do is told by: cortex whoami"),
    }
}

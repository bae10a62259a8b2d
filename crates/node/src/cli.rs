//! The command line. Results go to standard output, all else to standard error.

mod owner;

use crate::capabilities;
use crate::ceiling;
use crate::config::{self, environment, read_invite, strike_secret};
use crate::daemon::{self, DaemonError};
use crate::doctor::{self, Verdict};
use crate::enrolment::{self, EnrolError};
use crate::link::engine::Exit;
use crate::record::{self, Follower, Ran, Reader};
use crate::state::{DataDir, State, StateError};
use crate::status::Status;
use crate::warden::{self, WardenError};
use crate::way::Way;
use clap::{Parser, Subcommand};
use mesh_process::config::BadSetting;
use mesh_process::files::Lock;
use mesh_process::proxy::Proxies;
use mesh_process::{SystemClock, telemetry};
use mesh_wire::convert::rfc3339;
use node_warden::frames::KnownState;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

/// Until a running daemon has ended its tasks: the warden's grace, and some.
const STOP_PATIENCE: Duration = Duration::from_secs(40);
const POLL: Duration = Duration::from_millis(100);
/// A clock that is off by more is shown.
const CLOCK_SKEW_SECS: i64 = 600;
/// Said to scripts when the node was revoked.
const EXIT_REVOKED: u8 = 3;

#[derive(Parser)]
#[command(name = "cortex-node", version, about = "Joins this machine to a Cortex Mesh hub and runs its tasks")]
pub struct Cli {
    /// Where the node keeps its identity and state (default ~/.local/share/cortex-node)
    #[arg(long, global = true, env = "CORTEX_NODE_DATA_DIR", value_name = "FOLDER")]
    data_dir: Option<PathBuf>,
    /// What is logged on standard error, such as info or debug
    #[arg(long, global = true, env = "CORTEX_NODE_LOG", default_value = "info", value_name = "FILTER")]
    log: String,
    /// Log as JSON
    #[arg(long, global = true)]
    log_json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Join a hub with an invite, then run
    Join {
        /// The invite (YAML), or - for standard input; without it CORTEX_NODE_INVITE holds the YAML
        invite: Option<String>,
        /// Only enrol; run it later with `cortex-node run`
        #[arg(long)]
        enroll_only: bool,
    },
    /// Run the enrolled node in the foreground
    Run,
    /// End all tasks, the warden and the daemon
    Stop,
    /// Show id, hub, certificate, link and running tasks
    Status(Shown),
    /// Check this machine and the way to the hub; name the hop that fails
    Doctor(Shown),
    /// Show the machine's own record of what ran
    Log {
        /// Only the last so many
        #[arg(short = 'n', value_name = "N")]
        last: Option<usize>,
        /// Go on, and show each attempt once it has ended
        #[arg(short, long)]
        follow: bool,
        #[command(flatten)]
        shown: Shown,
    },
    /// Parent of all tasks; started by the daemon
    #[command(hide = true)]
    Warden {
        /// The folder of the node in which another warden lives
        #[arg(long)]
        beside: Option<PathBuf>,
    },
    /// Show or set the ceiling: what no hub can exceed on this machine
    Policy {
        #[command(subcommand)]
        command: owner::Policy,
    },
    /// Take no more tasks, with or without a hub; what runs goes on
    Disable,
    /// Take tasks again
    Enable,
    /// Not yet: install or remove a service unit
    Service(Rest),
    /// Not yet: the process that alone opens the container socket
    ComposeAgent(Rest),
    /// Not yet: give the identity back
    Leave(Rest),
    /// Not yet: take the hub's newer version
    Update(Rest),
    /// Not yet: go back to the version before
    Rollback(Rest),
}

#[derive(clap::Args)]
struct Shown {
    #[arg(long, value_name = "FORM", default_value = "table")]
    output: Form,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Form {
    Table,
    Json,
}

#[derive(clap::Args)]
struct Rest {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, hide = true)]
    rest: Vec<String>,
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Setting(#[from] BadSetting),
    #[error("not yet: {0} is not built in this version")]
    NotYet(&'static str),
    #[error(transparent)]
    Enrol(#[from] EnrolError),
    #[error(transparent)]
    Daemon(#[from] DaemonError),
    #[error(transparent)]
    State(#[from] StateError),
    #[error(transparent)]
    Warden(#[from] WardenError),
    #[error("warden: {0}")]
    WardenRun(#[from] node_warden::Error),
    #[error("{what}: {source}")]
    Io {
        what: String,
        #[source]
        source: std::io::Error,
    },
    #[error("the daemon (pid {pid}) did not end within {} s", STOP_PATIENCE.as_secs())]
    StillRuns { pid: i32 },
    #[error("{0} does not name the daemon's process; end it by hand")]
    Pid(PathBuf),
}

impl Error {
    /// 2: asked for what cannot be; 1: it could be, but failed.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Setting(_) | Self::NotYet(_) | Self::Daemon(DaemonError::Setting(_) | DaemonError::Root(_)) => 2,
            _ => 1,
        }
    }
}

fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Error {
    let what = what.into();
    move |source| Error::Io { what, source }
}

/// Runs one command. Must be called before any thread is made: the warden enters namespaces.
pub fn main(cli: Cli) -> Result<ExitCode, Error> {
    let dir = DataDir::new(config::data_dir(cli.data_dir)?);
    let not_yet = match &cli.command {
        Command::Warden { beside } => {
            node_warden::run(node_warden::Config { beside: beside.clone(), ..node_warden::Config::new(dir.path()) })?;
            return Ok(ExitCode::SUCCESS);
        }
        Command::Policy { command } => return owner::policy(&dir, command),
        Command::Disable => return owner::disable(&dir),
        Command::Enable => return owner::enable(&dir),
        Command::Service(_) => "service",
        Command::ComposeAgent(_) => "compose-agent",
        Command::Leave(_) => "leave",
        Command::Update(_) => "update",
        Command::Rollback(_) => "rollback",
        Command::Join { .. } | Command::Run | Command::Stop | Command::Status(_) | Command::Doctor(_) | Command::Log { .. } => "",
    };
    if !not_yet.is_empty() {
        return Err(Error::NotYet(not_yet));
    }
    telemetry::init(&cli.log, cli.log_json).map_err(|e| BadSetting::new("command line", "--log", e))?;
    // One thread: whatever one part of the daemon tells another would else wake a thread of its own.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(io("the runtime"))?;
    let code = runtime.block_on(async {
        match cli.command {
            Command::Join { invite, enroll_only } => {
                join(&dir, invite.as_deref()).await?;
                if enroll_only { Ok(ExitCode::SUCCESS) } else { run(dir).await }
            }
            Command::Run => run(dir).await,
            Command::Stop => stop(&dir).await,
            Command::Doctor(shown) => doctor_command(&dir, shown.output).await,
            Command::Log { last, follow, shown } => log(&dir, last, follow, shown.output).await,
            Command::Status(shown) => status(&dir, shown.output).await,
            _ => Ok(ExitCode::SUCCESS),
        }
    });
    // A read that hangs in a background thread must not hold the end up.
    runtime.shutdown_timeout(Duration::from_secs(1));
    code
}

async fn run(dir: DataDir) -> Result<ExitCode, Error> {
    let exe = std::env::current_exe().map_err(io("finding this program"))?;
    Ok(match daemon::run(dir, &exe, SystemClock::shared()).await? {
        Exit::Stopped | Exit::Left => ExitCode::SUCCESS,
        Exit::Revoked => ExitCode::from(EXIT_REVOKED),
    })
}

async fn join(dir: &DataDir, source: Option<&str>) -> Result<(), Error> {
    const VARIABLE: &str = "CORTEX_NODE_INVITE";
    let (place, text, file) = match source {
        Some("-") => {
            let mut text = String::new();
            std::io::stdin().read_to_string(&mut text).map_err(io("standard input"))?;
            ("standard input".to_owned(), text, None)
        }
        Some(path) => {
            let text = std::fs::read_to_string(path).map_err(|e| BadSetting::new(path, "(file)", e))?;
            (path.to_owned(), text, Some(PathBuf::from(path)))
        }
        None => {
            let text = environment(VARIABLE)?;
            let text = text.ok_or_else(|| BadSetting::new("command line", "FILE", format!("give the invite, -, or {VARIABLE}")))?;
            (format!("environment: {VARIABLE}"), text, None)
        }
    };
    let _lock = daemon::take_lock(dir)?;
    let state = State::open(dir)?;
    if let Some(s) = state.settings()? {
        let folder = dir.path().display().to_string();
        return Err(EnrolError::Enrolled { folder, node: s.node_id, hub: s.hub_id }.into());
    }
    let invite = read_invite(&place, &text, &environment)?;
    // A workspace that cannot serve is better known before the invite is used up.
    let root = daemon::workspace_root(&invite.file.node.workspace_root)?;
    let capabilities = capabilities::gather(Path::new(root.path()), &node_warden::probe());
    let settings = enrolment::join(dir, &state, &invite, capabilities, SystemClock::shared()).await?;
    println!("joined: node {} ({}) on hub {}", settings.node_name, settings.node_id, settings.hub_id);
    owner::make(dir);
    if let Some(path) = file {
        // Through a link, so that the secret does not stay where the link leads.
        let struck = path.canonicalize().and_then(|real| strike_secret(&real, &invite.file));
        if let Err(error) = struck {
            tracing::warn!(file = %path.display(), %error, "the used secret could not be struck out; remove the file");
        }
    }
    Ok(())
}

async fn stop(dir: &DataDir) -> Result<ExitCode, Error> {
    let held = || Lock::try_take(&dir.lock()).map(|l| l.is_none());
    if !dir.path().exists() || !held().map_err(io("the lock"))? {
        let ended = warden::stop(dir.path()).await?;
        println!("{}", if ended { "stopped: tasks and warden" } else { "nothing was running" });
        return Ok(ExitCode::SUCCESS);
    }
    let mut told = None;
    let mut waited = Duration::ZERO;
    while held().map_err(io("the lock"))? {
        if told.is_none() {
            // A daemon that only begins has not written it yet: what stands there is of one before, or nothing.
            let text = std::fs::read_to_string(dir.pid()).unwrap_or_default();
            let pid = text.trim().parse().ok().filter(|p| *p > 1).and_then(rustix::process::Pid::from_raw);
            if let Some(pid) = pid
                && interrupt(pid).map_err(io("signalling the daemon"))?
            {
                told = Some(pid);
            }
        }
        if waited >= STOP_PATIENCE {
            let pid = told.ok_or_else(|| Error::Pid(dir.pid()))?;
            return Err(Error::StillRuns { pid: pid.as_raw_nonzero().get() });
        }
        tokio::time::sleep(POLL).await;
        waited += POLL;
    }
    // A daemon that was on its way out by itself left the tasks to the warden.
    warden::stop(dir.path()).await?;
    println!("stopped: daemon, tasks and warden");
    Ok(ExitCode::SUCCESS)
}

/// Asks a daemon to stop. False when it has just ended by itself.
fn interrupt(pid: rustix::process::Pid) -> std::io::Result<bool> {
    match rustix::process::kill_process(pid, rustix::process::Signal::INT) {
        Ok(()) => Ok(true),
        Err(rustix::io::Errno::SRCH) => Ok(false),
        Err(e) => Err(e.into()),
    }
}

async fn doctor_command(dir: &DataDir, form: Form) -> Result<ExitCode, Error> {
    let report = doctor::run(dir).await;
    if form == Form::Json {
        println!("{}", serde_json::to_string_pretty(&report).unwrap_or_default());
    } else {
        for c in &report.checks {
            let mark = match c.verdict {
                Verdict::Ok => "ok     ",
                Verdict::Warning => "WARNING",
                Verdict::Failed => "FAILED ",
                Verdict::Skipped => "-      ",
            };
            println!("{mark}  {:<12} {}", c.hop, record::shown(&c.detail));
            if !c.advice.is_empty() {
                println!("         {:<12} → {}", "", record::shown(&c.advice));
            }
        }
        match report.failed {
            None => println!("all is well"),
            Some(hop) => println!("the first hop that fails: {hop}"),
        }
    }
    Ok(if report.ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

async fn log(dir: &DataDir, last: Option<usize>, follow: bool, form: Form) -> Result<ExitCode, Error> {
    if !dir.path().exists() {
        return Err(DaemonError::NotEnrolled(dir.path().to_path_buf()).into());
    }
    let mut out = std::io::stdout();
    let mut show = |ran: &[Ran]| {
        ran.iter().try_for_each(|r| {
            let text = if form == Form::Json { serde_json::to_string(r).unwrap_or_default() } else { r.line() };
            writeln!(out, "{text}")
        })?;
        out.flush()
    };
    let newest = |ran: Vec<Ran>| ran[ran.len().saturating_sub(last.unwrap_or(usize::MAX))..].to_vec();
    let shown: std::io::Result<()> = async {
        if !follow {
            return show(&newest(Reader::read(dir.path())));
        }
        let (mut follower, before) = Follower::new(dir.path())?;
        // Those that still run are shown when they have ended.
        show(&newest(before.into_iter().filter(|r| r.end.is_some()).collect()))?;
        loop {
            tokio::time::sleep(POLL).await;
            show(&follower.look()?)?;
        }
    }
    .await;
    match shown {
        // Whoever read it has left.
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => Err(io("the record of what ran")(e)),
        _ => Ok(ExitCode::SUCCESS),
    }
}

async fn status(dir: &DataDir, form: Form) -> Result<ExitCode, Error> {
    let lock = if dir.lock().exists() { Some(Lock::try_take(&dir.lock()).map_err(io("the lock"))?) } else { None };
    let runs = matches!(lock, Some(None));
    let mut s = Status::read(dir).unwrap_or_default();
    if !runs {
        if !dir.database().exists() {
            return Err(DaemonError::NotEnrolled(dir.path().to_path_buf()).into());
        }
        // Under the lock: a daemon that starts now waits for the state.
        let settings = State::open(dir)?.settings()?.ok_or_else(|| DaemonError::NotEnrolled(dir.path().to_path_buf()))?;
        drop(lock);
        let hub = Way::new(&settings.grpc, &settings.also, Proxies::default()).to_string();
        (s.node_id, s.node_name, s.hub_id, s.hub) = (settings.node_id, settings.node_name, settings.hub_id, hub);
        (s.workspace_root, s.max_tasks) = (settings.workspace_root, settings.max_tasks);
        if let Some(v) = dir.certificates().ok().and_then(|c| enrolment::validity(&c.0)) {
            s.certificate_not_after = rfc3339(v.not_after_ms);
        }
        let known = warden::known(dir.path()).await?.unwrap_or_default();
        let running = known.iter().filter(|k| k.state == KnownState::Running);
        s.running = running.map(|k| format!("{}/{}", k.task, k.attempt.ordinal())).collect();
        if s.link != "revoked" {
            s.link = "stopped".into();
            s.link_detail = "no daemon runs".into();
        }
        s.unschedulable = if s.link == "revoked" { "revoked".into() } else { "offline".into() };
        (s.spool_bytes, s.spool_limit) = (node_warden::spool::used(dir.path()), node_warden::SPOOL_NODE_BYTES);
    }
    let owner = ceiling::Owner::new(dir.clone());
    if let Some(closed) = owner.closed().filter(|_| s.link != "revoked") {
        s.unschedulable = closed.as_str().into();
    }
    s.max_tasks = owner.places(s.max_tasks);
    if form == Form::Json {
        println!("{}", serde_json::to_string_pretty(&s).unwrap_or_default());
        return Ok(ExitCode::SUCCESS);
    }
    println!("node         {} ({})", s.node_name, s.node_id);
    println!("hub          {} at {}", s.hub_id, s.hub);
    println!("certificate  until {}", s.certificate_not_after);
    println!("daemon       {}", if runs { format!("running, pid {}", s.pid) } else { "not running".into() });
    let detail = if s.link_detail.is_empty() { String::new() } else { format!(" · {}", s.link_detail) };
    println!("link         {} since {}{detail}", s.link, s.since);
    let no = if s.unschedulable.is_empty() { "yes".to_owned() } else { format!("no: {}", s.unschedulable) };
    println!("takes work   {no}");
    if let Some(problem) = owner.problem() {
        println!("ceiling      {problem}");
    }
    if s.clock_skew_secs.abs() > CLOCK_SKEW_SECS {
        println!("clock        {} s from the hub's: set it", s.clock_skew_secs);
    }
    println!("workspace    {}", s.workspace_root);
    println!("spool        {} of {} MiB", s.spool_bytes >> 20, s.spool_limit >> 20);
    println!("running      {} of {}", s.running.len(), s.max_tasks);
    for r in &s.running {
        println!("             {r}");
    }
    Ok(ExitCode::SUCCESS)
}

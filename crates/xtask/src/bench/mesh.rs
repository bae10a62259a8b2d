//! A hub and a node as real processes in a folder of their own; they end with their owner.

use super::account;
use anyhow::{Context, Result, bail, ensure};
use cortex::rest::{InviteRequest, LoginRequest};
use cortex::{Client, Credentials, Tokens};
use std::fs::File;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

const NODE: &str = "bench";
const PATIENCE: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(10);
/// Of a PostgreSQL database that holds no hub yet, in place of the hub's own file. It may hold a secret,
/// so it is no argument.
const DATABASE: &str = "BENCH_DATABASE_URL";
/// More than any phase keeps in flight.
const MAX_TASKS: &str = "256";

/// A child that is killed, by the id that was kept, when nothing gentler has ended it.
struct Process {
    child: Child,
    log: PathBuf,
}

impl Process {
    fn start(command: &mut Command, log: PathBuf) -> Result<Self> {
        let out = File::create(&log).with_context(|| log.display().to_string())?;
        let err = out.try_clone()?;
        // A group of its own: a Ctrl-C at the terminal is for the benchmark, which then ends its children.
        let child = command.stdin(Stdio::null()).stdout(out).stderr(err).process_group(0).spawn();
        Ok(Self { child: child.with_context(|| format!("{command:?}"))?, log })
    }
    fn running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }
    fn ended_within(&mut self, time: Duration) -> bool {
        let begun = Instant::now();
        while self.running() {
            if begun.elapsed() > time {
                return false;
            }
            std::thread::sleep(POLL);
        }
        true
    }
    fn last_words(&self) -> String {
        let text = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(15)..].join("\n")
    }
    fn terminate(&self) {
        if let Some(pid) = rustix::process::Pid::from_raw(self.child.id().cast_signed()) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.running() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// The node before the hub before their folder: the order in which they go.
pub struct Mesh {
    node: Option<Process>,
    hub: Process,
    password: String,
    dir: TempDir,
    built: PathBuf,
    pub pids: Pids,
    /// `host:port` of the hub's REST door.
    pub address: String,
    pub client: Client,
    pub token: String,
    pub node_id: String,
}

#[derive(Debug, Clone, Copy, Default)]
pub struct Pids {
    pub hub: u32,
    pub daemon: u32,
    pub warden: u32,
}

impl Pids {
    pub fn named(&self) -> [(&'static str, u32); 3] {
        [("hub", self.hub), ("node daemon", self.daemon), ("warden", self.warden)]
    }
}

/// A program, with nothing of the caller's own hubs and nodes in its environment.
fn program(built: &Path, name: &str) -> Result<Command> {
    let path = built.join(name);
    ensure!(path.is_file(), "{} is not built; run: make build", path.display());
    let mut c = Command::new(path);
    for (key, _) in std::env::vars_os() {
        if key.to_string_lossy().starts_with("CORTEX_") {
            c.env_remove(key);
        }
    }
    Ok(c)
}

async fn until<T>(what: &str, process: &mut Process, mut look: impl AsyncFnMut() -> Option<T>) -> Result<T> {
    let begun = Instant::now();
    loop {
        if let Some(found) = look().await {
            return Ok(found);
        }
        if !process.running() || begun.elapsed() > PATIENCE {
            bail!("waited in vain for {what}; the last words:\n{}", process.last_words());
        }
        tokio::time::sleep(POLL).await;
    }
}

/// A hub that serves, and where.
async fn start_hub(built: &Path, dir: &Path, password: &str) -> Result<(Process, String)> {
    let data = dir.join("hub");
    let mut command = program(built, "cortex-hub")?;
    command.arg("serve").arg("--data-dir").arg(&data).env("CORTEX_ADMIN_PASSWORD", password);
    for door in ["HTTP", "NODE", "METRICS"] {
        command.env(format!("CORTEX_{door}_ADDR"), "127.0.0.1:0");
    }
    // Longer than any run.
    command.env("CORTEX_AUTH_ACCESS_SECS", "86400");
    // What is measured is the path of a task, and not the limit of who sends it.
    command.env("CORTEX_LIMITS_API_PER_SECOND", "0");
    if let Some(url) = std::env::var_os(DATABASE) {
        command.env("CORTEX_DATABASE_URL", url);
    }
    let mut hub = Process::start(&mut command, dir.join("hub.log"))?;
    let (facts, pid) = (data.join("hub.json"), hub.child.id());
    let facts = until("the hub", &mut hub, async || {
        let facts: serde_json::Value = serde_json::from_slice(&std::fs::read(&facts).ok()?).ok()?;
        (facts["pid"] == pid).then_some(facts)
    })
    .await?;
    let address = facts["http"].as_str().context("hub.json has no http")?.to_owned();
    Ok((hub, address))
}

impl Mesh {
    pub async fn start(built: &Path) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        // Tasks run under user ids of their own and must get to their workspaces.
        std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o711))?;
        program(built, "cortex-node")?;

        let mut password = [0_u8; 18];
        rustix::rand::getrandom(&mut password, rustix::rand::GetRandomFlags::empty())?;
        let password: String = password.iter().map(|b| format!("{b:02x}")).collect();
        let (hub, address) = start_hub(built, dir.path(), &password).await?;

        let url = format!("http://{address}");
        let login = LoginRequest { username: "admin".into(), password: password.clone(), device_name: None };
        let tokens = Tokens::from(Client::new(&url, Credentials::None)?.login(&login).await?);
        let token = tokens.access_token.clone();
        let client = Client::new(&url, Credentials::Tokens(tokens))?;
        let mut mesh = Self {
            node: None,
            pids: Pids { hub: hub.child.id(), ..Pids::default() },
            hub,
            password,
            dir,
            built: built.to_owned(),
            address,
            client,
            token,
            node_id: String::new(),
        };
        mesh.join().await?;
        Ok(mesh)
    }

    fn node_data(&self) -> PathBuf {
        self.dir.path().join("node")
    }

    fn node_command(&self, arguments: &[&str]) -> Result<Command> {
        let mut c = program(&self.built, "cortex-node")?;
        c.args(arguments).arg("--data-dir").arg(self.node_data()).current_dir(self.dir.path());
        c.env("CORTEX_NODE_WORKSPACE_ROOT", self.dir.path().join("workspaces")).env("CORTEX_NODE_MAX_TASKS", MAX_TASKS);
        Ok(c)
    }

    async fn join(&mut self) -> Result<()> {
        let invite = self.client.create_invite(&InviteRequest { name: Some(NODE.into()), ..InviteRequest::default() }).await?;
        std::fs::write(self.dir.path().join("invite.yaml"), invite.config_yaml)?;
        let out = self.node_command(&["join", "invite.yaml", "--enroll-only"])?.stdin(Stdio::null()).output()?;
        ensure!(out.status.success(), "the node did not join: {}", String::from_utf8_lossy(&out.stderr));

        let mut node = Process::start(&mut self.node_command(&["run"])?, self.dir.path().join("node.log"))?;
        let client = self.client.clone();
        let online = until("the node", &mut node, async || {
            client.nodes().await.ok()?.into_iter().find(|n| n.name == NODE && n.status == "online").map(|n| n.id)
        })
        .await;
        self.pids.daemon = node.child.id();
        self.node = Some(node);
        self.node_id = online?;
        let data = self.node_data().canonicalize()?;
        let data = data.to_str().context("a folder's name that is no text")?;
        self.pids.warden = account::find(&["warden", "--data-dir", data])?.context("no warden runs")?;
        Ok(())
    }
}

impl Mesh {
    /// Ends tasks and warden too, whether the daemon still runs or not.
    pub fn stop_node(&mut self) {
        let Some(mut node) = self.node.take() else { return };
        let data = self.node_data();
        let stopped =
            data.to_str().and_then(|data| program(&self.built, "cortex-node").ok()?.args(["stop", "--data-dir", data]).output().ok());
        if !stopped.is_some_and(|o| o.status.success()) {
            eprintln!("xtask: `cortex-node stop` failed; the node's last words:\n{}", node.last_words());
        }
        node.ended_within(Duration::from_secs(10));
    }

    /// Ends the hub and starts it again, elsewhere; gives how long it took from its start until it served.
    pub async fn restart_hub(&mut self) -> Result<Duration> {
        self.hub.terminate();
        ensure!(self.hub.ended_within(PATIENCE), "the hub does not end; its last words:\n{}", self.hub.last_words());
        let begun = Instant::now();
        let (hub, address) = start_hub(&self.built, self.dir.path(), &self.password).await?;
        let took = begun.elapsed();
        self.pids.hub = hub.child.id();
        (self.hub, self.address) = (hub, address);
        Ok(took)
    }
}

impl Drop for Mesh {
    fn drop(&mut self) {
        self.stop_node();
        self.hub.terminate();
        self.hub.ended_within(Duration::from_secs(20));
    }
}

//! What the end-to-end tests hold: a hub and nodes as real processes in folders of their own, and a
//! client that speaks plain REST.
//!
//! Nothing here sleeps for luck: every wait is for a fact, with a deadline that fails the test.
#![expect(clippy::disallowed_methods, reason = "tests start the real binaries and watch the real clock")]

pub mod contract;
pub mod proxy;

use serde_json::Value;
use std::fs::File;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

pub const PASSWORD: &str = "correct horse battery";
/// Generous, since other tests share the machine; a healthy run needs a fraction.
pub const PATIENCE: Duration = Duration::from_secs(40);

/// The folder with the built programs: where this test itself was built.
pub fn program(name: &str) -> PathBuf {
    let own = std::env::current_exe().expect("a test has a path");
    let dir = own.parent().and_then(Path::parent).expect("tests lie in target/<profile>/deps");
    let path = dir.join(name);
    assert!(path.exists(), "{} is not built; run: cargo build -p cortex-hub -p cortex-node -p cortex --bins --examples", path.display());
    path
}

/// Waits for `look` to give something.
pub async fn until<T, F: AsyncFnMut() -> Option<T>>(what: &str, mut look: F) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(Instant::now() < deadline, "waited {PATIENCE:?} in vain for: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A folder that task uids may pass through.
pub fn folder() -> TempDir {
    let dir = tempfile::tempdir().expect("a temporary folder");
    std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o711)).expect("permissions");
    dir
}

/// A process that ends with its owner, by the id that was kept.
pub struct Process {
    child: Child,
    pub log: PathBuf,
}

impl Process {
    pub fn start(command: &mut Command, log: PathBuf) -> Self {
        let file = File::options().create(true).append(true).open(&log).expect("a log file");
        let err = file.try_clone().expect("a log file");
        // A group of its own, so that a Ctrl-C at the terminal that runs the tests does not reach it.
        let child = command.stdin(Stdio::null()).stdout(file).stderr(err).process_group(0).spawn();
        Self { child: child.unwrap_or_else(|e| panic!("{command:?}: {e}")), log }
    }
    pub fn id(&self) -> u32 {
        self.child.id()
    }
    pub fn signal(&self, signal: rustix::process::Signal) {
        if let Some(pid) = rustix::process::Pid::from_raw(self.child.id() as i32) {
            let _ = rustix::process::kill_process(pid, signal);
        }
    }
    pub fn kill9(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
    pub async fn ended(&mut self) -> ExitStatus {
        until("a process to end", async || self.child.try_wait().expect("a child can be waited for")).await
    }
    pub async fn terminate(&mut self) -> ExitStatus {
        self.signal(rustix::process::Signal::TERM);
        self.ended().await
    }
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.is_running() {
            self.kill9();
        }
        if std::thread::panicking() {
            let log = self.log();
            let tail: Vec<&str> = log.lines().rev().take(30).collect();
            eprintln!("--- end of {}", self.log.display());
            tail.iter().rev().for_each(|l| eprintln!("{l}"));
        }
    }
}

/// A hub as a process.
pub struct Hub {
    // Before its folder, so that a failing test can still show the log.
    pub process: Process,
    pub dir: TempDir,
    data: PathBuf,
    pub http: String,
    pub node: String,
    env: Vec<(String, String)>,
    args: Vec<String>,
    token: String,
    web: reqwest::Client,
}

impl Hub {
    pub async fn start() -> Self {
        Self::start_with(&[], &[]).await
    }

    pub async fn start_with(env: &[(&str, &str)], args: &[&str]) -> Self {
        let dir = folder();
        let data = dir.path().join("hub");
        Self::start_at(dir, data, env, args).await
    }

    /// With its data in a folder of the caller's.
    pub async fn start_in(data: PathBuf, env: &[(&str, &str)], args: &[&str]) -> Self {
        Self::start_at(folder(), data, env, args).await
    }

    async fn start_at(dir: TempDir, data: PathBuf, env: &[(&str, &str)], args: &[&str]) -> Self {
        let own = |list: &[&str]| list.iter().map(|s| s.to_string()).collect::<Vec<_>>();
        let mut all: Vec<(String, String)> =
            ["HTTP", "NODE", "METRICS"].iter().map(|p| (format!("CORTEX_{p}_ADDR"), "127.0.0.1:0".to_owned())).collect();
        all.push(("CORTEX_ADMIN_PASSWORD".into(), PASSWORD.into()));
        // Tests ask more often than people do; those of the limits set their own.
        all.push(("CORTEX_LIMITS_API_PER_SECOND".into(), "0".into()));
        all.extend(["ADDRESS", "ACCOUNT"].map(|of| (format!("CORTEX_LIMITS_LOGIN_PER_MINUTE_{of}"), "100000".to_owned())));
        for (k, v) in env {
            all.retain(|(known, _)| known != k);
            all.push((k.to_string(), v.to_string()));
        }
        let process = Self::spawn(dir.path(), &data, &all, &own(args));
        // Whom one may trust is for the tests of just that.
        let web = reqwest::Client::builder().no_proxy().tls_danger_accept_invalid_certs(true);
        let web = web.redirect(reqwest::redirect::Policy::none()).build().expect("a client");
        let mut hub =
            Self { dir, data, process, http: String::new(), node: String::new(), env: all, args: own(args), token: String::new(), web };
        hub.ready().await;
        if contract::get().is_none() {
            let answer = hub.request("GET", "/openapi.json").send().await.expect("the hub answers");
            contract::learn(answer.json().await.expect("a description"));
        }
        let (status, reply) =
            hub.call("POST", "/api/v1/auth/login", Some(serde_json::json!({"username": "admin", "password": PASSWORD}))).await;
        assert_eq!(status, 200, "{reply}");
        hub.token = text(&reply, "access_token");
        hub
    }

    fn spawn(dir: &Path, data: &Path, env: &[(String, String)], args: &[String]) -> Process {
        let mut c = Command::new(program("cortex-hub"));
        c.arg("serve").arg("--data-dir").arg(data).args(args).envs(env.iter().cloned());
        Process::start(&mut c, dir.join("hub.log"))
    }

    pub fn data(&self) -> PathBuf {
        self.data.clone()
    }

    async fn ready(&mut self) {
        let path = self.data().join("hub.json");
        let pid = self.process.id();
        let facts = until("the hub to be ready", async || {
            assert!(self.process.is_running(), "the hub ended: {}", self.process.log());
            let facts: Value = serde_json::from_slice(&std::fs::read(&path).ok()?).ok()?;
            (facts["pid"] == pid).then_some(facts)
        })
        .await;
        let scheme = if facts["https"].is_null() { "http" } else { "https" };
        // All addresses are reached by that of this machine.
        let http = text(&facts, "http").replace("[::]:", "127.0.0.1:").replace("0.0.0.0:", "127.0.0.1:");
        self.http = format!("{scheme}://{http}");
        self.node = text(&facts, "grpc");
    }

    /// Ends the process without warning and starts it anew, on the ports it had.
    pub async fn crash_and_restart(&mut self) {
        self.process.kill9();
        self.restart().await;
    }

    pub async fn restart(&mut self) {
        let fixed = [("CORTEX_HTTP_ADDR", self.address().to_owned()), ("CORTEX_NODE_ADDR", self.node.clone())];
        for (k, v) in fixed {
            self.env.retain(|(known, _)| known != k);
            self.env.push((k.to_owned(), v));
        }
        self.process = Self::spawn(self.dir.path(), &self.data, &self.env, &self.args);
        self.ready().await;
    }

    /// `host:port` of the doors.
    pub fn address(&self) -> &str {
        self.http.split_once("://").map_or("", |(_, address)| address)
    }

    /// Adds to the environment of the next start, or changes it.
    pub fn set(&mut self, key: &str, value: &str) {
        self.env.retain(|(known, _)| known != key);
        self.env.push((key.to_owned(), value.to_owned()));
    }

    pub fn request(&self, method: &str, path: &str) -> reqwest::RequestBuilder {
        let method = method.parse().expect("a method");
        let r = self.web.request(method, format!("{}{path}", self.http));
        if self.token.is_empty() { r } else { r.bearer_auth(&self.token) }
    }

    /// One call; its status and JSON (null when there is none). An answer that is not as described fails
    /// the test.
    pub async fn call(&self, method: &str, path: &str, body: Option<Value>) -> (u16, Value) {
        let mut r = self.request(method, path);
        if let Some(b) = body {
            r = r.json(&b);
        }
        let answer = r.send().await.expect("the hub answers");
        let (status, bytes) = checked(method, path, answer).await;
        (status, serde_json::from_slice(&bytes).unwrap_or(Value::Null))
    }

    pub async fn get(&self, path: &str) -> Value {
        let (status, v) = self.call("GET", path, None).await;
        assert_eq!(status, 200, "GET {path}: {v}");
        v
    }

    /// Makes an invite; gives its YAML.
    pub async fn invite(&self, body: Value) -> (String, String) {
        let (status, v) = self.call("POST", "/api/v1/nodes/invites", Some(body)).await;
        assert_eq!(status, 201, "{v}");
        (text(&v, "id"), text(&v, "config_yaml"))
    }

    pub async fn dispatch(&self, body: Value) -> Value {
        let (status, v) = self.call("POST", "/api/v1/dispatch", Some(body)).await;
        assert!(status == 200 || status == 202, "{status} {v}");
        v
    }

    pub async fn task(&self, id: &str) -> Value {
        self.get(&format!("/api/v1/tasks/{id}")).await
    }

    pub async fn finished(&self, id: &str) -> Value {
        self.task_when(id, "to end", |t| ["succeeded", "failed", "cancelled"].contains(&t["state"].as_str().unwrap_or(""))).await
    }

    pub async fn task_when(&self, id: &str, what: &str, is: impl Fn(&Value) -> bool) -> Value {
        until(&format!("task {id} {what}"), async || Some(self.task(id).await).filter(&is)).await
    }

    /// Runs a shell command on any node and gives the finished task.
    pub async fn sh(&self, script: &str) -> Value {
        let t = self.dispatch(serde_json::json!({"shell": {"argv": ["sh", "-c", script]}, "wait_secs": 20})).await;
        self.finished(&text(&t, "id")).await
    }

    pub async fn output(&self, id: &str, query: &str) -> Vec<u8> {
        let path = format!("/api/v1/tasks/{id}/output{query}");
        let r = self.request("GET", &path).send().await.expect("the hub answers");
        let (status, body) = checked("GET", &path, r).await;
        assert_eq!(status, 200);
        body
    }

    /// A CLI that is logged in to this hub, with a folder of its own.
    pub fn cli(&self) -> Command {
        let mut c = Command::new(program("cortex"));
        c.env("CORTEX_CONFIG_DIR", self.dir.path().join("cli")).env("CORTEX_URL", &self.http).current_dir(self.dir.path());
        c.stdin(Stdio::null());
        c
    }

    pub fn cli_login(&self) {
        let file = self.dir.path().join("password");
        std::fs::write(&file, PASSWORD).expect("a file");
        let mut c = self.cli();
        c.args(["login", "--username", "admin", "--password-stdin"]).stdin(File::open(file).expect("a file"));
        let out = c.output().expect("the CLI runs");
        assert!(out.status.success(), "{out:?}");
    }
}

/// A node: its folder, and its daemon while one runs.
pub struct Node {
    pub process: Option<Process>,
    pub dir: TempDir,
    pub id: String,
    pub name: String,
}

impl Node {
    /// Invites, joins and runs a machine, and waits until the hub shows it online.
    pub async fn join(hub: &Hub, name: &str) -> Self {
        let (_, yaml) = hub.invite(serde_json::json!({"name": name})).await;
        let mut node = Self::prepare(name, &yaml);
        let out = node.command(&["join", "invite.yaml", "--enroll-only"]).output().expect("cortex-node runs");
        assert!(out.status.success(), "{}", shown(&out));
        node.run();
        node.online(hub).await;
        node
    }

    /// A folder with an invite, not joined yet.
    pub fn prepare(name: &str, yaml: &str) -> Self {
        let dir = folder();
        std::fs::write(dir.path().join("invite.yaml"), yaml).expect("a file");
        Self { dir, process: None, id: String::new(), name: name.to_owned() }
    }

    pub fn data(&self) -> PathBuf {
        self.dir.path().join("node")
    }

    pub fn command(&self, args: &[&str]) -> Command {
        let mut c = Command::new(program("cortex-node"));
        c.args(args).arg("--data-dir").arg(self.data()).current_dir(self.dir.path());
        c.env("CORTEX_NODE_WORKSPACE_ROOT", self.dir.path().join("workspaces")).stdin(Stdio::null());
        c
    }

    pub fn run(&mut self) {
        self.process = Some(Process::start(&mut self.command(&["run"]), self.dir.path().join("node.log")));
    }

    pub async fn online(&mut self, hub: &Hub) {
        let name = self.name.clone();
        self.id = until(&format!("node {name} to be online"), async || {
            let list = hub.get("/api/v1/nodes").await;
            let items = list["items"].as_array()?.clone();
            let found = items.iter().find(|n| n["name"] == name.as_str() && n["status"] == "online")?;
            Some(text(found, "id"))
        })
        .await;
    }

    pub async fn offline(&self, hub: &Hub) {
        let path = format!("/api/v1/nodes/{}", self.id);
        until("the node to be offline", async || (hub.get(&path).await["status"] == "offline").then_some(())).await;
    }

    /// The warden's process. Those that begin its tasks look like it, and are its children.
    pub fn warden(&self) -> Option<u32> {
        warden(&self.data())
    }

    pub fn daemon(&mut self) -> &mut Process {
        self.process.as_mut().expect("the daemon was started")
    }
}

/// The warden that lives in this folder, if one does.
pub fn warden(folder: &Path) -> Option<u32> {
    let all = alive(&format!("warden\0--data-dir\0{}\0", folder.display()));
    all.iter().copied().find(|p| parent(*p).is_some_and(|of| !all.contains(&of)))
}

impl Drop for Node {
    fn drop(&mut self) {
        // Ends tasks and warden too, whether a daemon runs or not.
        let _ = self.command(&["stop"]).output();
    }
}

/// The status and body of an answer, held to the hub's description.
pub async fn checked(method: &str, path: &str, answer: reqwest::Response) -> (u16, Vec<u8>) {
    let status = answer.status().as_u16();
    let content_type = answer.headers().get("content-type").and_then(|v| v.to_str().ok()).unwrap_or_default().to_owned();
    let body = answer.bytes().await.expect("a body").to_vec();
    let contract = contract::get().expect("the first hub told its description");
    let answer = contract::Answer { status, content_type: &content_type, body: &body };
    contract.check(method, path, &answer).unwrap_or_else(|wrong| panic!("{wrong}"));
    (status, body)
}

/// A text field that must be there.
pub fn text(v: &Value, key: &str) -> String {
    v[key].as_str().unwrap_or_else(|| panic!("{key} is missing in {v}")).to_owned()
}

/// What a program said, for a failing test.
pub fn shown(out: &Output) -> String {
    format!("{}\n{}{}", out.status, String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr))
}

/// Sends a signal to a process by the id that was kept; one that has ended is none the worse.
pub fn signal(pid: u32, signal: rustix::process::Signal) {
    if let Some(pid) = rustix::process::Pid::from_raw(pid as i32) {
        let _ = rustix::process::kill_process(pid, signal);
    }
}

fn parent(pid: u32) -> Option<u32> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(") ")?.1.split(' ').nth(1)?.parse().ok()
}

/// Is any process alive whose command line holds this mark?
pub fn alive(mark: &str) -> Vec<u32> {
    let mut found = vec![];
    for entry in std::fs::read_dir("/proc").expect("/proc").flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<u32>() else { continue };
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        if pid != std::process::id() && String::from_utf8_lossy(&line).contains(mark) {
            found.push(pid);
        }
    }
    found
}

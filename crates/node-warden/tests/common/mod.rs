//! A warden process of its own per test, and a blocking client for it.
#![allow(dead_code, reason = "each test file uses its part")]
#![allow(clippy::disallowed_methods, reason = "these tests are about processes and real time")]

use mesh_core::input::Fate;
use mesh_core::output::Digests;
use mesh_core::policy::{Asked, Grant, Machine, Place, judge};
use mesh_core::spec::{Program, Shell, Spec};
use mesh_core::task::{AttemptNo, Outcome};
use mesh_core::{Digest, SpoolId, TaskId, UserId};
use node_warden::frames::{Decoder, Event, Known, Request, VERSION};
use node_warden::spool::{OutputFrame, OutputReader, Stream};
use std::collections::HashMap;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

pub const PATIENCE: Duration = Duration::from_secs(90);
/// Whom tasks run as when the tests are root.
pub const NOBODY: u32 = 65534;

pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}
pub fn run_as() -> Option<u32> {
    is_root().then_some(NOBODY)
}
pub fn task_uid() -> u32 {
    run_as().unwrap_or_else(|| rustix::process::geteuid().as_raw())
}

pub fn example() -> PathBuf {
    if let Ok(path) = std::env::var("NODE_WARDEN_EXAMPLE") {
        return path.into();
    }
    let exe = std::env::current_exe().unwrap();
    exe.parent().unwrap().parent().unwrap().join("examples/warden")
}

/// Copies a program by another process. A child that this one begins meanwhile, for another test, would hold
/// the copy open for writing until its exec, and what is open for writing cannot be executed.
pub fn copy_program(from: &Path, to: &Path) {
    assert!(Command::new("cp").arg(from).arg(to).status().unwrap().success());
}

pub fn until<T>(what: &str, mut f: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(v) = f() {
            return v;
        }
        assert!(begun.elapsed() < PATIENCE, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A data directory, and the warden that may run in it.
pub struct Node {
    pub dir: tempfile::TempDir,
    pub args: Vec<String>,
    pub warden: Option<Child>,
}

impl Node {
    pub fn new(args: &[&str]) -> Self {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::Builder::new().prefix("warden-").tempdir().unwrap();
        // Workspaces lie inside, and tasks of another user must get there.
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o711)).unwrap();
        let mut p = Self { dir, args: args.iter().map(|s| s.to_string()).collect(), warden: None };
        p.start();
        p
    }
    pub fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }
    pub fn workspace(&self) -> PathBuf {
        self.dir.path().join("work/space")
    }
    /// A file that tasks may write.
    pub fn open_file(&self, name: &str) -> PathBuf {
        use std::os::unix::fs::PermissionsExt;
        let path = self.dir.path().join(name);
        std::fs::write(&path, "").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o666)).unwrap();
        path
    }
    pub fn start(&mut self) {
        let child = Command::new(example())
            .args(["warden", "--data-dir"])
            .arg(self.data())
            .args(&self.args)
            .env("SECRET_OF_THE_NODE", "1")
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        self.warden = Some(child);
    }
    pub fn pid(&self) -> u32 {
        self.warden.as_ref().unwrap().id()
    }
    pub fn kill(&mut self) {
        let mut w = self.warden.take().unwrap();
        w.kill().unwrap();
        w.wait().unwrap();
    }
    pub fn wait_end(&mut self) -> std::process::ExitStatus {
        let mut w = self.warden.take().unwrap();
        until("the warden ends", || w.try_wait().unwrap())
    }
    pub fn connect(&self) -> Client {
        Client::connect(&self.data())
    }
    pub fn read_output(&self, key: Key, end: u64) -> Vec<OutputFrame> {
        let Some(mut r) = OutputReader::open(&self.data(), key.0, key.1).unwrap() else { return vec![] };
        std::iter::from_fn(|| r.next(end).unwrap()).collect()
    }
    pub fn text(&self, key: Key, end: u64, stream: Stream) -> Vec<u8> {
        self.read_output(key, end).into_iter().filter(|f| f.stream == stream).flat_map(|f| f.bytes).collect()
    }

    pub fn order(&self, argv: &[&str]) -> OrderOf {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let mut id = [0; 16];
        id[..8].copy_from_slice(&NEXT.fetch_add(1, Ordering::Relaxed).to_be_bytes());
        id[8..12].copy_from_slice(&std::process::id().to_be_bytes());
        OrderOf {
            task: TaskId::from_bytes(id),
            argv: argv.iter().map(|s| s.to_string()).collect(),
            env: vec![],
            cwd: String::new(),
            stdin: vec![],
            stdin_open: false,
            timeout_secs: 0,
            place: Place { workspace: self.workspace().to_str().unwrap().into(), run_as: run_as(), ephemeral: false },
            digest: None,
        }
    }
    pub fn sh(&self, script: &str) -> OrderOf {
        self.order(&["/bin/sh", "-c", script])
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(mut w) = self.warden.take() {
            let _ = w.kill();
            let _ = w.wait();
        }
    }
}

pub type Key = (TaskId, AttemptNo);

pub struct OrderOf {
    pub task: TaskId,
    pub argv: Vec<String>,
    pub env: Vec<(String, String)>,
    pub cwd: String,
    pub stdin: Vec<u8>,
    pub stdin_open: bool,
    pub timeout_secs: u64,
    pub place: Place,
    pub digest: Option<Digest>,
}

impl OrderOf {
    pub fn key(&self) -> Key {
        (self.task, AttemptNo(1))
    }
    pub fn open(mut self) -> Self {
        self.stdin_open = true;
        self
    }
    pub fn grant(&self) -> Grant {
        let env = self.env.iter().cloned().collect();
        let program = Program::Argv(self.argv.clone());
        let spec = Spec::Shell(Shell { program, cwd: self.cwd.clone(), env, stdin: self.stdin.clone(), stdin_open: self.stdin_open });
        let digest = self.digest.unwrap_or_else(|| spec.digest());
        let asked = Asked {
            task: self.task,
            attempt: AttemptNo(1),
            user: UserId::from_bytes([1; 16]),
            spec: &spec,
            digest,
            timeout_secs: self.timeout_secs,
        };
        judge(&asked, self.place.clone(), &Machine::OPEN).unwrap()
    }
}

#[derive(Debug, Clone)]
pub struct End {
    pub outcome: Outcome,
    pub output_end: u64,
    pub last_seq: u64,
    pub at_ms: i64,
    pub digests: Option<Digests>,
}

pub struct Client {
    pub stream: UnixStream,
    decoder: Decoder<Event>,
    pub spool: SpoolId,
    pub known: Vec<Known>,
    pub ends: HashMap<Key, End>,
    pub started: HashMap<Key, i64>,
    pub output: HashMap<Key, (u64, u64)>,
    pub conflicts: Vec<Key>,
    pub answers: HashMap<u64, (Key, Fate, u64)>,
    requests: u64,
}

impl Client {
    pub fn connect(data: &Path) -> Self {
        Self::speaking(data, VERSION)
    }
    /// A daemon of an earlier version.
    ///
    /// A killed warden's child that has not yet become its program holds the old socket for a moment: who
    /// reached that one is hung up without a word, and asks again, as the daemon does.
    pub fn speaking(data: &Path, version: u32) -> Self {
        until("the warden says welcome", || Self::greeted(data, version))
    }
    pub fn try_connect(data: &Path) -> Option<Self> {
        Self::greeted(data, VERSION)
    }
    fn greeted(data: &Path, version: u32) -> Option<Self> {
        let mut stream = UnixStream::connect(node_warden::socket_path(data)).ok()?;
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(&Request::Hello { version }.encode()).ok()?;
        let mut c = Self {
            stream,
            decoder: Decoder::new(),
            spool: SpoolId::from_bytes([0; 16]),
            known: vec![],
            ends: HashMap::new(),
            started: HashMap::new(),
            output: HashMap::new(),
            conflicts: vec![],
            answers: HashMap::new(),
            requests: 0,
        };
        let Event::Welcome { version: both, spool, attempts } = c.read()? else { panic!("no welcome") };
        assert_eq!(both, version);
        (c.spool, c.known) = (spool, attempts);
        Some(c)
    }
    pub fn send(&mut self, r: &Request) {
        self.stream.write_all(&r.encode()).unwrap();
    }
    /// The next event; none at the end of the connection.
    pub fn read(&mut self) -> Option<Event> {
        loop {
            if let Some(e) = self.decoder.pop().unwrap() {
                return Some(e);
            }
            let mut b = [0; 65536];
            match self.stream.read(&mut b) {
                Ok(0) => return None,
                Ok(n) => self.decoder.push(&b[..n]),
                Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset => return None,
                Err(e) => panic!("no event: {e}"),
            }
        }
    }
    pub fn step(&mut self) -> bool {
        match self.read() {
            None => return false,
            Some(Event::Welcome { .. }) => panic!("a second welcome"),
            Some(Event::Started { task, attempt, at_ms }) => {
                self.started.insert((task, attempt), at_ms);
            }
            Some(Event::Output { task, attempt, end, last_seq }) => {
                self.output.insert((task, attempt), (end, last_seq));
            }
            Some(Event::Ended { task, attempt, outcome, output_end, last_seq, at_ms, leftover, digests }) => {
                assert_eq!(leftover, 0);
                self.ends.insert((task, attempt), End { outcome, output_end, last_seq, at_ms, digests });
            }
            Some(Event::Conflict { task, attempt }) => self.conflicts.push((task, attempt)),
            Some(Event::Input { task, attempt, request, fate, taken }) => {
                self.answers.insert(request, ((task, attempt), fate, taken));
            }
        }
        true
    }
    pub fn start(&mut self, o: &OrderOf) -> Key {
        self.send(&Request::Start { grant: o.grant() });
        o.key()
    }
    pub fn wait_end(&mut self, key: Key) -> End {
        while !self.ends.contains_key(&key) {
            assert!(self.step(), "the warden hung up");
        }
        self.ends.remove(&key).unwrap()
    }
    pub fn wait_started(&mut self, key: Key) {
        while !self.started.contains_key(&key) {
            assert!(self.step(), "the warden hung up");
        }
    }
    pub fn wait_output(&mut self, key: Key, at_least: u64) -> (u64, u64) {
        loop {
            if let Some(o) = self.output.get(&key).filter(|o| o.0 >= at_least) {
                return *o;
            }
            assert!(self.step(), "the warden hung up");
        }
    }
    pub fn run(&mut self, o: &OrderOf) -> End {
        let key = self.start(o);
        self.wait_end(key)
    }
    pub fn cancel(&mut self, (task, attempt): Key) {
        self.send(&Request::Cancel { task, attempt });
    }
    /// Sends a piece of input; gives what became of it and how far the input has come.
    pub fn input(&mut self, (task, attempt): Key, seq: u64, data: &[u8], eof: bool) -> (Fate, u64) {
        self.requests += 1;
        let request = self.requests;
        self.send(&Request::Input { task, attempt, request, seq, data: data.to_vec(), eof });
        while !self.answers.contains_key(&request) {
            assert!(self.step(), "the warden hung up");
        }
        let (key, fate, taken) = self.answers.remove(&request).unwrap();
        assert_eq!(key, (task, attempt));
        (fate, taken)
    }
    pub fn acked(&mut self, (task, attempt): Key, offset: u64) {
        self.send(&Request::Acked { task, attempt, offset });
    }
    pub fn forget(&mut self, (task, attempt): Key) {
        self.send(&Request::Forget { task, attempt });
    }
}

/// Processes whose command line holds `mark`, by looking.
pub fn processes(mark: &str) -> Vec<u32> {
    let mut found = vec![];
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse::<u32>().ok()) else { continue };
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        if pid != std::process::id() && String::from_utf8_lossy(&line).contains(mark) {
            found.push(pid);
        }
    }
    found
}

/// A number of seconds that no other process sleeps for: a mark in `/proc`.
pub fn mark() -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    format!("{}.{:06}{:03}", 4000, std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

//! The main loop: what comes in, what is written, what is told, in this order each turn.
//!
//! One turn takes everything that epoll has, then makes all of it durable by one sync of the journal,
//! and only then starts children and tells ends. So concurrent starts and ends share their syncs.

mod children;
mod daemons;
mod input;
mod orders;

use children::outcome;
use input::{Piece, Stdin};
use orders::mark_of;

use crate::cgroup;
use crate::clock::{self, unix_ms};
use crate::frames::{Event, Known, KnownState, Request, VERSION};
use crate::launch::{make_data_dir, socket_path, try_lock};
use crate::link::{Conn, News, Pending};
use crate::process::{Child, Order, Program, RawEnd, Spawner, refusal};
use crate::sandbox::{self, TreeKill};
use crate::spool::journal::Record;
use crate::spool::{self, FRAME_HEAD, MAX_FRAME_BYTES, OutputWriter, Spool, Stream};
use crate::workspace::{self, Remover};
use crate::{Config, Error, Key, sys};
use mesh_core::input::Sequence;
use mesh_core::output::Digests;
use mesh_core::policy::Grant;
use mesh_core::task::{NeverStarted, Outcome, Reason, ReasonCode};
use mesh_core::{Digest, UnixMs};
use rustix::event::epoll;
use rustix::io::Errno;
use std::collections::{BTreeSet, HashMap, VecDeque};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Attempts that are remembered; their list must fit into one frame.
const MAX_KNOWN: usize = 50_000;
/// Connections at once; more than one is a daemon that is being replaced.
const MAX_CONNS: usize = 16;
/// Acknowledged output is freed in steps of such a part of what an attempt may hold: each costs a sync of
/// the journal, which others wait for.
const FREE_PART: u64 = 16;
/// After a failed write, until it is tried again.
const RETRY: Duration = Duration::from_secs(1);
/// How long a pipe is read on after everything in the task's namespace is dead. Only a descriptor
/// that the task has given away to a process outside can keep it open for so long.
const LINGER: Duration = Duration::from_secs(1);
/// How long the inits of a killed warden may take to end: at once, but on a machine that has no time for them.
const LOCK_PATIENCE: Duration = Duration::from_secs(30);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    Listener,
    Signal,
    Status,
    Conn,
    Exit,
    Stdout,
    Stderr,
    Stdin,
}

/// Source, slot and generation in one word: what arrives for a slot's former tenant is told apart.
fn token(source: Source, slot: usize, generation: u32) -> u64 {
    (u64::from(generation) << 32) | ((slot as u64) << 3) | source as u64
}

fn untoken(t: u64) -> (Source, usize, u32) {
    use Source::*;
    let source = [Listener, Signal, Status, Conn, Exit, Stdout, Stderr, Stdin][(t & 7) as usize];
    (source, (t as u32 >> 3) as usize, (t >> 32) as u32)
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    /// Noted, its fate is decided within this turn.
    Deciding,
    Running(usize),
    Ended {
        outcome: Outcome,
        at: UnixMs,
    },
}

/// What is remembered of an attempt until it is forgotten.
struct Attempt {
    /// None for one that a cancel forbade before its start came.
    spec: Option<Digest>,
    state: State,
    output_end: u64,
    last_seq: u64,
    acked: u64,
    /// Up to here the space was given back, or is about to be.
    freed: u64,
    started_at: UnixMs,
    ephemeral: Option<PathBuf>,
    /// Of its whole output, once it has run to its end.
    digests: Option<Digests>,
}

impl Attempt {
    fn new(spec: Option<Digest>) -> Self {
        let (state, ephemeral, digests) = (State::Deciding, None, None);
        Self { spec, state, output_end: 0, last_seq: 0, acked: 0, freed: 0, started_at: 0, ephemeral, digests }
    }
    fn unacked(&self) -> u64 {
        self.output_end - self.acked
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cause {
    Cancel,
    Timeout,
}

/// A task that has a child, or whose child's output is still being read.
struct Run {
    key: Key,
    generation: u32,
    child: Option<Child>,
    end: Option<RawEnd>,
    pipes: [Option<OwnedFd>; 2],
    watched: [bool; 2],
    stdin: Option<Stdin>,
    /// None for a task that takes no live input.
    input: Option<Sequence>,
    output: Option<OutputWriter>,
    /// A frame that the disk had no room for.
    stuck: Option<(Stream, Vec<u8>)>,
    cause: Option<Cause>,
    deadline: Option<Instant>,
    started: bool,
    program: String,
    cwd: String,
    cgroup: Option<PathBuf>,
}

struct Ready {
    grant: Grant,
    program: Program,
    cwd: OwnedFd,
    cancelled: bool,
}

/// An end that is in the journal's buffer, and counts once that is synced.
struct Settled {
    key: Key,
    outcome: Outcome,
    at: UnixMs,
}

struct Warden {
    config: Config,
    tree: TreeKill,
    root: bool,
    uid: u32,
    spool: Spool,
    spawner: Spawner,
    epoll: OwnedFd,
    listener: OwnedFd,
    signal: OwnedFd,
    status: OwnedFd,
    attempts: HashMap<Key, Attempt>,
    unacked: u64,
    runs: Vec<Option<Run>>,
    free: Vec<usize>,
    generation: u32,
    paused: bool,
    conns: Vec<Option<Conn>>,
    pending: Pending,
    /// Answers about attempts that are not remembered.
    oneoff: VecDeque<Event>,
    /// What became of pieces of input, for the daemon that brought them.
    answers: VecDeque<Event>,
    ready: Vec<Ready>,
    ended: Vec<Run>,
    settled: Vec<Settled>,
    frees: Vec<(Key, u64, u64)>,
    timers: BTreeSet<(Instant, usize, u32)>,
    retry_at: Option<Instant>,
    alone_since: Instant,
    stopping: bool,
    /// A disk that takes nothing must not keep the warden for ever.
    stop_by: Option<Instant>,
    remover: Remover,
    buffer: Vec<u8>,
    // Held until the very end.
    _lock: std::fs::File,
}

/// Runs the warden of `config.data_dir` in this process until it is told to stop. To be called by a
/// process made for it, before it has any thread: signals, session, umask and (without root) the user
/// namespace of the whole process change.
pub fn run(config: Config) -> Result<(), Error> {
    let dir = make_data_dir(&config.data_dir)?;
    let config = Config { data_dir: dir, ..config };
    keep_standard_descriptors()?;
    // Inits inherit the place; it must pin nobody's folder.
    std::env::set_current_dir("/").map_err(Error::io("enter /"))?;
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    // Fails for a leader of a process group, who then is apart from the daemon's terminal anyway.
    let _ = rustix::process::setsid();
    let lock = wait_for_lock(&config.data_dir)?;
    let signal = sys::take_signals().map_err(Error::io("take signals"))?;
    let tree = sandbox::enter();
    sandbox::hide();
    if tree == TreeKill::None {
        say!("warden: neither pid namespaces nor control groups work here; every start is refused");
    }
    let mut warden = Warden::open(config, lock, signal, tree)?;
    let result = warden.serve();
    let _ = std::fs::remove_file(socket_path(&warden.config.data_dir));
    result
}

/// A descriptor 0, 1 or 2 must never become something that a child would take for its own.
fn keep_standard_descriptors() -> Result<(), Error> {
    loop {
        let fd = std::fs::File::options().read(true).write(true).open("/dev/null").map_err(Error::io("open /dev/null"))?;
        if fd.as_raw_fd() > 2 {
            return Ok(());
        }
        std::mem::forget(fd);
    }
}

/// The inits of a killed warden hold its lock until they are gone too.
fn wait_for_lock(dir: &Path) -> Result<std::fs::File, Error> {
    let begun = clock::now();
    loop {
        if let Some(lock) = try_lock(dir)? {
            return Ok(lock);
        }
        if begun.elapsed() > LOCK_PATIENCE {
            return Err(Error::Running(dir.to_owned()));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn listen(dir: &Path) -> Result<OwnedFd, Error> {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
    let path = socket_path(dir);
    let bad = || Error::io(format!("listen on {}", path.display()));
    let _ = std::fs::remove_file(&path);
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let fd = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).map_err(|e| bad()(e.into()))?;
    let address = SocketAddrUnix::new(&path).map_err(|e| bad()(e.into()))?;
    rustix::net::bind(&fd, &address).map_err(|e| bad()(e.into()))?;
    // The folder is closed to others already; the mode says the same once more.
    rustix::fs::chmod(&path, rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR).map_err(|e| bad()(e.into()))?;
    rustix::net::listen(&fd, 64).map_err(|e| bad()(e.into()))?;
    Ok(fd)
}

impl Warden {
    fn open(config: Config, lock: std::fs::File, signal: OwnedFd, tree: TreeKill) -> Result<Self, Error> {
        let os = |e: Errno| Error::io("set up the warden")(e.into());
        let (spool, records) = Spool::open(&config.data_dir, config.beside.as_deref())?;
        let (status, status_far) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(os)?;
        rustix::fs::fcntl_setfl(&status, rustix::fs::OFlags::NONBLOCK).map_err(os)?;
        let spawner = Spawner::new(status_far, lock.as_raw_fd()).map_err(Error::io("set up the warden"))?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(os)?;
        let uid = rustix::process::geteuid();
        if tree == TreeKill::Cgroup {
            cgroup::sweep(&spool.name);
        }
        let listener = listen(&config.data_dir)?;
        let mut w = Self {
            config,
            tree,
            root: uid.is_root(),
            uid: uid.as_raw(),
            spool,
            spawner,
            epoll,
            listener,
            signal,
            status,
            attempts: HashMap::new(),
            unacked: 0,
            runs: vec![],
            free: vec![],
            generation: 0,
            paused: false,
            conns: vec![],
            pending: Pending::default(),
            oneoff: VecDeque::new(),
            answers: VecDeque::new(),
            ready: vec![],
            ended: vec![],
            settled: vec![],
            frees: vec![],
            timers: BTreeSet::new(),
            retry_at: None,
            alone_since: clock::now(),
            stopping: false,
            stop_by: None,
            remover: Remover::new(),
            buffer: vec![0; FRAME_HEAD + MAX_FRAME_BYTES],
            _lock: lock,
        };
        w.recover(records)?;
        w.watch(&w.listener, token(Source::Listener, 0, 0), epoll::EventFlags::IN).map_err(os)?;
        w.watch(&w.signal, token(Source::Signal, 0, 0), epoll::EventFlags::IN).map_err(os)?;
        w.watch(&w.status, token(Source::Status, 0, 0), epoll::EventFlags::IN).map_err(os)?;
        Ok(w)
    }

    /// Makes the memory whole again: what was started and has no end is lost.
    fn recover(&mut self, records: Vec<Record>) -> Result<(), Error> {
        let mut acked: HashMap<Key, (u64, u64)> = HashMap::new();
        for record in records {
            let key = record.key();
            let a = self.attempts.entry(key).or_insert_with(|| Attempt::new(None));
            match record {
                Record::Starting { spec, at, ephemeral, .. } => {
                    a.spec = Some(spec);
                    a.started_at = at;
                    a.ephemeral = ephemeral.map(PathBuf::from);
                }
                Record::Acked { offset, seq, .. } => {
                    acked.insert(key, (offset, seq));
                }
                Record::Exit { outcome, output_end, last_seq, at, started_at, digests, .. } => {
                    (a.output_end, a.last_seq, a.started_at, a.digests) = (output_end, last_seq, started_at, digests);
                    a.state = State::Ended { outcome, at };
                }
                Record::Refused { spec, outcome, at, .. } => {
                    a.spec = spec;
                    a.state = State::Ended { outcome, at };
                }
                Record::Forgotten { .. } => {}
            }
        }
        let now = unix_ms();
        for (key, a) in &mut self.attempts {
            let path = self.spool.output_path(key);
            let mark = acked.get(key).copied();
            let found = spool::recover(&path, mark, (a.state != State::Deciding).then_some(a.output_end));
            match found.map_err(Error::io(format!("read {}", path.display())))? {
                Some((end, last, from)) => {
                    // An end that was told stands, even if a broken disk has kept less than it says.
                    if a.state == State::Deciding {
                        (a.output_end, a.last_seq) = (end, last);
                    }
                    a.acked = from.min(a.output_end);
                }
                None => a.acked = a.output_end,
            }
            a.freed = a.acked;
            self.unacked += a.unacked();
            if a.state == State::Deciding {
                let outcome = Outcome::Lost { detail: "warden_ended".into() };
                self.spool.journal.append(&Record::Exit {
                    key: *key,
                    outcome: outcome.clone(),
                    output_end: a.output_end,
                    last_seq: a.last_seq,
                    at: now,
                    started_at: a.started_at,
                    // A part of it may have been given back, and with it what a digest needs.
                    digests: None,
                });
                a.state = State::Ended { outcome, at: now };
            }
            if let Some(path) = &a.ephemeral {
                self.remover.remove(path, &mark_of(key));
            }
        }
        let names: std::collections::HashSet<String> =
            self.attempts.keys().filter_map(|k| Some(self.spool.output_path(k).file_name()?.to_str()?.to_owned())).collect();
        self.spool.sweep(|name| names.contains(name));
        self.spool.journal.commit().map_err(Error::io("write the journal"))
    }

    fn watch(&self, fd: impl AsFd, token: u64, flags: epoll::EventFlags) -> Result<(), Errno> {
        epoll::add(&self.epoll, fd, epoll::EventData::new_u64(token), flags)
    }

    fn serve(&mut self) -> Result<(), Error> {
        let mut events: Vec<epoll::Event> = Vec::with_capacity(256);
        loop {
            let timeout = self.timeout();
            events.clear();
            match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), timeout.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(e) => return Err(Error::io("wait for events")(e.into())),
            }
            for event in &events {
                let (source, slot, generation) = untoken(event.data.u64());
                match source {
                    Source::Listener => self.accept(),
                    Source::Signal => self.on_signal(),
                    Source::Status => self.on_status(),
                    Source::Conn => self.on_conn(slot, generation),
                    Source::Exit if self.is_current(slot, generation) => self.on_exit(slot),
                    Source::Stdout if self.is_current(slot, generation) => self.read_pipe(slot, 0),
                    Source::Stderr if self.is_current(slot, generation) => self.read_pipe(slot, 1),
                    Source::Stdin if self.is_current(slot, generation) => self.write_stdin(slot),
                    Source::Exit | Source::Stdout | Source::Stderr | Source::Stdin => {}
                }
            }
            self.on_time();
            self.settle();
            self.tell();
            if self.stopping && (self.is_idle() || self.stop_by.is_some_and(|at| at <= clock::now())) {
                self.say_goodbye();
                return Ok(());
            }
        }
    }

    fn is_current(&self, slot: usize, generation: u32) -> bool {
        self.runs.get(slot).and_then(Option::as_ref).is_some_and(|r| r.generation == generation)
    }

    fn is_idle(&self) -> bool {
        self.runs.len() == self.free.len()
            && self.ready.is_empty()
            && self.ended.is_empty()
            && self.settled.is_empty()
            && self.retry_at.is_none()
    }

    fn timeout(&self) -> Option<rustix::event::Timespec> {
        let orphan = (!self.has_daemon()).then(|| self.alone_since + self.config.orphan_after);
        let next = [self.timers.first().map(|t| t.0), self.retry_at, self.stop_by, orphan.filter(|_| !self.stopping)];
        let next = next.into_iter().flatten().min()?;
        let left = next.saturating_duration_since(clock::now());
        Some(rustix::event::Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() })
    }

    fn set_deadline(&mut self, slot: usize, deadline: Option<Instant>) {
        let Some(run) = self.runs[slot].as_mut() else { return };
        if let Some(old) = run.deadline {
            self.timers.remove(&(old, slot, run.generation));
        }
        run.deadline = deadline;
        if let Some(at) = deadline {
            self.timers.insert((at, slot, run.generation));
        }
    }

    fn on_time(&mut self) {
        let now = clock::now();
        while let Some(&(at, slot, generation)) = self.timers.first()
            && at <= now
        {
            self.timers.remove(&(at, slot, generation));
            if self.is_current(slot, generation) {
                self.on_deadline(slot, now);
            }
        }
        if self.retry_at.is_some_and(|at| at <= now) {
            self.retry_at = None;
            for slot in 0..self.runs.len() {
                self.retry_stuck(slot);
            }
        }
        if !self.stopping && !self.has_daemon() && now.duration_since(self.alone_since) >= self.config.orphan_after {
            say!("warden: no daemon for {} s; ending", self.config.orphan_after.as_secs());
            self.stop();
        }
    }

    fn on_deadline(&mut self, slot: usize, now: Instant) {
        let Some(run) = self.runs[slot].as_mut() else { return };
        run.deadline = None;
        if run.end.is_some() && run.stuck.is_some() {
            // What waits for room on the disk is not dropped.
            self.set_deadline(slot, Some(now + LINGER));
        } else if run.end.is_some() {
            for fd in run.pipes.iter_mut().filter_map(Option::take) {
                let _ = epoll::delete(&self.epoll, &fd);
            }
            self.check_complete(slot);
        } else if run.cause.is_some() {
            if let Some(child) = &run.child {
                child.kill();
            }
        } else {
            self.terminate(slot, Cause::Timeout, now);
        }
    }

    /// Asks the task to end; a task that has ended by itself keeps its own end.
    fn terminate(&mut self, slot: usize, cause: Cause, now: Instant) {
        let Some(run) = self.runs[slot].as_mut() else { return };
        let Some(child) = run.child.as_ref().filter(|c| run.cause.is_none() && !c.has_ended()) else { return };
        run.cause = Some(cause);
        child.terminate();
        self.set_deadline(slot, Some(now + self.config.grace));
    }

    fn on_signal(&mut self) {
        let mut info = [0u8; 128];
        while rustix::io::read(&self.signal, &mut info).is_ok() {}
        self.stop();
    }

    fn stop(&mut self) {
        let now = clock::now();
        self.stopping = true;
        self.stop_by.get_or_insert(now + self.config.grace + Duration::from_secs(10));
        for ready in &mut self.ready {
            ready.cancelled = true;
        }
        for slot in 0..self.runs.len() {
            self.terminate(slot, Cause::Cancel, now);
        }
    }
}

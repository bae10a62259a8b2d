//! The warden: parent of every task on a node, a process of its own that outlives the daemon.
//!
//! It takes a [`mesh_core::policy::Grant`] and nothing else, builds the child, starts it, spools its
//! output, ends its whole tree and records its exit. One thread, one epoll, no runtime. It talks to
//! the daemon of its own uid over a Unix socket in [`frames`]; its only memory is the [`spool`].
//!
//! ```text
//!  daemon ══ warden.sock ══ warden (serve) ──clone3──► init (pid 1 of a new pid namespace) ──► task
//!                             │   ▲  ▲                   │ reaps, forwards TERM, tells exec
//!                             │   │  └── status pipe ────┘
//!                             │   └── stdout, stderr pipes, pidfd of init
//!                             └──► spool/journal, spool/out/*
//! ```
//! When init ends, the kernel ends everything in its namespace; when the warden ends, init ends. So
//! no process of a task survives either.
//!
//! It does *not* know networks, skills or policy, and decides nothing about what may run.

/// A line in the log. It may lie on a disk that is full, and nothing may hang on it: `eprintln!` would
/// end the warden, and with it every task.
macro_rules! say {
    ($($line:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stderr(), $($line)*);
    }};
}

mod cgroup;
mod child;
mod clock;
mod codec;
pub mod frames;
mod launch;
mod link;
mod process;
mod sandbox;
mod serve;
pub mod spool;
mod sys;
mod workspace;

pub use launch::{Wardens, launch, launch_all, seats, socket_path};
pub use sandbox::{Probe, TreeKill, probe};
pub use serve::run;
pub use workspace::sweep_doomed;

use std::path::PathBuf;
use std::time::Duration;

/// One attempt of one task: the key of everything that the warden knows.
pub type Key = (mesh_core::TaskId, mesh_core::task::AttemptNo);

/// Where a warden lives and how far it may go.
#[derive(Debug, Clone)]
pub struct Config {
    /// Holds the socket, the lock, the log and the spool; made with mode 0700 when missing.
    pub data_dir: PathBuf,
    /// The node's data folder, when this warden lives beside the first one in it: the memory of both counts
    /// as one, under one id.
    pub beside: Option<PathBuf>,
    /// Unacknowledged output of one attempt, in bytes, beyond which its pipes are left unread.
    pub spool_attempt_bytes: u64,
    /// The same, over all attempts of the node.
    pub spool_node_bytes: u64,
    /// From TERM to KILL when a task is cancelled, timed out or the warden stops.
    pub grace: Duration,
    /// Without a daemon for so long, the warden ends its tasks and itself.
    pub orphan_after: Duration,
}

/// Unacknowledged output that a node keeps, unless its warden is told otherwise.
pub const SPOOL_NODE_BYTES: u64 = 2 << 30;

impl Config {
    pub fn new(data_dir: impl Into<PathBuf>) -> Self {
        Self {
            data_dir: data_dir.into(),
            beside: None,
            spool_attempt_bytes: 256 << 20,
            spool_node_bytes: SPOOL_NODE_BYTES,
            grace: Duration::from_secs(3),
            orphan_after: Duration::from_secs(3600),
        }
    }
}

/// Why a warden cannot run or be started.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{what}: {source}")]
    Io { what: String, source: std::io::Error },
    #[error("another warden already runs in {0}")]
    Running(PathBuf),
    #[error("the spool in {path} cannot be used: {why}")]
    Spool { path: PathBuf, why: String },
    #[error("the path of {0} is too long for a Unix socket; choose a shorter data directory")]
    PathTooLong(PathBuf),
    #[error("the warden did not answer within {secs} s; see {log}")]
    Silent { secs: u64, log: PathBuf },
    #[error("the warden ended at once ({status}); see {log}")]
    Died { status: std::process::ExitStatus, log: PathBuf },
}

impl Error {
    pub(crate) fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }
}

//! `cortex-node run`: everything is checked and opened here, then the engine runs until it ends.

use crate::config::{self, Resolved, Settings};
use crate::link::engine::{Engine, Exit, Parts, revoked_text};
use crate::link::time::NodeTime;
use crate::state::{DataDir, State, StateError};
use crate::status::Status;
use crate::warden::{self, WardenError};
use crate::workspace::{BadRoot, WorkspaceRoot};
use crate::{capabilities, enrolment};
use mesh_process::config::BadSetting;
use mesh_process::files::{self, Lock};
use mesh_process::{SharedClock, Tasks, signals};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::sync::mpsc;

/// Signals that may wait while the engine is busy; more would say nothing new.
const SIGNALS: usize = 4;
const GRACE: Duration = Duration::from_secs(5);
/// Who only looks (`status`, `doctor`) has the lock for less.
const LOOKERS: Duration = Duration::from_secs(3);
const LOOKERS_AGAIN: Duration = Duration::from_millis(20);

#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    #[error("a daemon runs already in {0}; stop it with `cortex-node stop`")]
    Running(PathBuf),
    #[error("this machine has not joined a hub yet ({0}); join with `cortex-node join FILE`")]
    NotEnrolled(PathBuf),
    #[error("{path}: {source}")]
    Io {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error(transparent)]
    State(#[from] StateError),
    #[error(transparent)]
    Setting(#[from] BadSetting),
    #[error(transparent)]
    Root(#[from] BadRoot),
    #[error(transparent)]
    Warden(#[from] WardenError),
    #[error("{0} is not a certificate; leave and join anew")]
    Certificate(PathBuf),
}

/// Makes the folder and takes its lock: one daemon, or one join, at a time.
pub fn take_lock(dir: &DataDir) -> Result<Lock, DaemonError> {
    dir.make()?;
    let path = dir.lock();
    match Lock::try_take(&path) {
        Ok(Some(lock)) => Ok(lock),
        Ok(None) => Err(DaemonError::Running(dir.path().to_path_buf())),
        Err(source) => Err(DaemonError::Io { path, source }),
    }
}

/// The same, behind those who only look and will soon be gone.
async fn lock_behind_lookers(dir: &DataDir) -> Result<Lock, DaemonError> {
    let free = async {
        loop {
            match take_lock(dir) {
                Err(DaemonError::Running(_)) => tokio::time::sleep(LOOKERS_AGAIN).await,
                taken => return taken,
            }
        }
    };
    tokio::time::timeout(LOOKERS, free).await.unwrap_or_else(|_| Err(DaemonError::Running(dir.path().to_path_buf())))
}

/// Where tasks may work, prepared and checked.
pub fn workspace_root(text: &str) -> Result<WorkspaceRoot, DaemonError> {
    let root = rustix::process::geteuid().is_root();
    let home = if root { PathBuf::from("/root") } else { config::home()? };
    Ok(WorkspaceRoot::prepare(text, &home, root)?)
}

/// Runs an enrolled node in the foreground until a signal, a revocation or a stop.
pub async fn run(dir: DataDir, exe: &Path, clock: SharedClock) -> Result<Exit, DaemonError> {
    let _lock = lock_behind_lookers(&dir).await?;
    let tasks = Tasks::new();
    let (asked, signals_in) = mpsc::channel(SIGNALS);
    tasks.spawn_until_cancelled("signals", async move {
        while let Ok(a) = signals::shutdown().await {
            if asked.send(a).await.is_err() {
                return;
            }
        }
    });
    let pid = dir.pid();
    files::write_private(&pid, format!("{}\n", std::process::id()).as_bytes()).map_err(|source| DaemonError::Io { path: pid, source })?;

    let state = State::open(&dir)?;
    let settings: Settings = state.settings()?.ok_or_else(|| DaemonError::NotEnrolled(dir.path().to_path_buf()))?;
    let mut settings = settings.resolve(&config::environment)?;
    if let Some(trust) = state.trust()? {
        settings.trust = trust;
    }
    if let Some(words) = state.revoked()? {
        return Ok(still_revoked(&dir, settings, &words).await?);
    }
    let identity = dir.identity()?;
    let certificate = enrolment::validity(&dir.certificates()?.0).ok_or_else(|| DaemonError::Certificate(dir.certificate()))?;
    let root = workspace_root(&settings.workspace_root)?;
    let doomed = root.path().to_owned();
    tasks.spawn_until_cancelled("workspace sweep", async move {
        let swept = tokio::task::spawn_blocking(move || node_warden::sweep_doomed(Path::new(&doomed))).await;
        if let Ok(count @ 1..) = swept {
            tracing::info!(count, "removed workspaces that were left half removed");
        }
    });
    let probe = node_warden::probe();
    let capabilities = capabilities::gather(Path::new(root.path()), &probe);
    let time = NodeTime::new(state.hub_time_ms()?, clock.clone());
    if time.for_tls() >= certificate.not_after_ms {
        tracing::info!("the certificate of this node has ended; its hub is asked for a new one");
    }
    let warden = warden::attach(exe.to_path_buf(), dir.path().to_path_buf(), &tasks).await?;
    let engine = Engine::new(Parts {
        settings,
        dir,
        state,
        identity,
        certificate,
        time,
        clock,
        capabilities,
        sandbox_applied: capabilities::sandbox_applied(&probe),
        root,
        warden,
        tasks: tasks.clone(),
        signals: signals_in,
    });
    let exit = engine.run().await;
    let ended = tasks.end(GRACE).await;
    tracing::info!(?exit, ?ended, "the daemon ends");
    Ok(exit)
}

/// A node that was revoked before. What a daemon that was killed in the middle left is ended now.
async fn still_revoked(dir: &DataDir, settings: Resolved, words: &str) -> Result<Exit, WardenError> {
    warden::stop(dir.path()).await?;
    let before = Status::read(dir).unwrap_or_default();
    // The path as it was prepared, where that is known.
    let workspace = Some(&before.workspace_root).filter(|w| !w.is_empty()).unwrap_or(&settings.workspace_root);
    let text = revoked_text(words, workspace);
    println!("{text}; to join again, take {} away and use a fresh invite", dir.path().display());
    let status = Status { pid: std::process::id(), link: "revoked".into(), link_detail: words.to_owned(), running: vec![], ..before };
    status.write(dir);
    Ok(Exit::Revoked)
}

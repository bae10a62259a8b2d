//! Starting a warden from the daemon, so that it outlives it.

use crate::Error;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::Mutex;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(15);

/// Wardens that this process has started: collected when they have ended, so that none stays a zombie.
static STARTED: Mutex<Vec<Child>> = Mutex::new(Vec::new());

/// Where the warden of `data_dir` listens.
pub fn socket_path(data_dir: &Path) -> PathBuf {
    data_dir.join("warden.sock")
}

pub(crate) fn lock_path(data_dir: &Path) -> PathBuf {
    data_dir.join("warden.lock")
}

pub(crate) fn make_data_dir(data_dir: &Path) -> Result<PathBuf, Error> {
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(data_dir);
    made.map_err(Error::io(format!("make {}", data_dir.display())))?;
    let path = data_dir.canonicalize().map_err(Error::io(format!("find {}", data_dir.display())))?;
    if socket_path(&path).as_os_str().len() > 107 {
        return Err(Error::PathTooLong(path));
    }
    Ok(path)
}

/// Takes the lock that says *a warden lives here*; none when it is held.
pub(crate) fn try_lock(data_dir: &Path) -> Result<Option<std::fs::File>, Error> {
    let path = lock_path(data_dir);
    let file = std::fs::File::options().write(true).create(true).truncate(false).mode(0o600).open(&path);
    let file = file.map_err(Error::io(format!("open {}", path.display())))?;
    match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(file)),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
        Err(e) => Err(Error::io(format!("lock {}", path.display()))(e.into())),
    }
}

/// Makes sure that a warden answers in `data_dir`: finds the one that runs, or starts
/// `exe warden --data-dir {data_dir}` in a session of its own and waits until it listens. Blocks for
/// at most some seconds.
pub fn launch(exe: &Path, data_dir: &Path) -> Result<(), Error> {
    let dir = make_data_dir(data_dir)?;
    let socket = socket_path(&dir);
    let log = dir.join("warden.log");
    let begun = crate::clock::now();
    let mut started = STARTED.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    started.retain_mut(|c| matches!(c.try_wait(), Ok(None)));
    let mut mine: Option<Child> = None;
    loop {
        if UnixStream::connect(&socket).is_ok() {
            started.extend(mine);
            return Ok(());
        }
        if let Some(child) = &mut mine {
            if let Some(status) = child.try_wait().map_err(Error::io("watch the warden"))? {
                // One that lost a race for the lock leaves the winner, who will listen.
                if try_lock(&dir)?.is_some() {
                    return Err(Error::Died { status, log });
                }
                mine = None;
            }
        } else if try_lock(&dir)?.is_some() {
            mine = Some(spawn(exe, &dir, &log)?);
        }
        if begun.elapsed() > PATIENCE {
            started.extend(mine);
            return Err(Error::Silent { secs: PATIENCE.as_secs(), log });
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[expect(clippy::disallowed_methods, reason = "the one place that starts a warden")]
fn spawn(exe: &Path, dir: &Path, log: &Path) -> Result<Child, Error> {
    let stderr = std::fs::File::options().append(true).create(true).mode(0o600).open(log);
    let stderr = stderr.map_err(Error::io(format!("open {}", log.display())))?;
    std::process::Command::new(exe)
        .arg("warden")
        .arg("--data-dir")
        .arg(dir)
        // The daemon's environment holds what a task's parent must not know.
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(stderr)
        .spawn()
        .map_err(Error::io(format!("start {}", exe.display())))
}

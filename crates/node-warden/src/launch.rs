//! Starting wardens from the daemon, so that they outlive it.
//!
//! A warden lives in a *seat*: a folder with its lock, socket, log and spool. The node's data folder is the
//! first; `w2` to `w9` in it serve while a warden of another program has tasks. So after an upgrade, or a
//! downgrade, new tasks go to a warden of the present program, and the one before keeps what it began until
//! it is empty. A seat whose warden is gone belongs to whoever starts one there next: a seat is its spool.

use crate::{Error, spool};
use mesh_core::SpoolId;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::Mutex;
use std::time::Duration;

/// Longer than a start ever takes on a machine that has time for it.
const PATIENCE: Duration = Duration::from_secs(60);

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
    launch_in(exe, &dir, None)
}

/// The warden that takes new tasks, and those that have tasks from before.
#[derive(Debug)]
pub struct Wardens {
    /// Their seats; the first takes new tasks.
    pub seats: Vec<PathBuf>,
    /// What the hub is told: the newest of all. Once a seat has lost its memory, that is a new one.
    pub spool: SpoolId,
}

/// Makes sure that a warden of the program `exe` answers, and one in each seat that remembers anything. To be
/// called by one daemon at a time. Blocks for at most some seconds a seat.
pub fn launch_all(exe: &Path, data_dir: &Path) -> Result<Wardens, Error> {
    let dir = make_data_dir(data_dir)?;
    let own = program_of(exe);
    let (mut current, mut free, mut dead, mut before) = (None, None, vec![], vec![]);
    for seat in seats(&dir) {
        if seat.is_dir() && try_lock(&seat)?.is_none() {
            // It may be starting still.
            launch_in(exe, &seat, Some(&dir))?;
            let same = own.is_none() || std::fs::read_to_string(program_path(&seat)).ok() == own;
            if same && current.is_none() { current = Some(seat) } else { before.push(seat) }
        } else if spool::remembers(&seat, &dir) {
            dead.push(seat);
        } else {
            if seat != dir {
                spool::remove_beside(&seat, &dir).map_err(Error::io(format!("remove {}", seat.display())))?;
            }
            free.get_or_insert(seat);
        }
    }
    let mut dead = dead.into_iter();
    let current = match current.or_else(|| dead.next()).or(free) {
        Some(seat) => seat,
        // Nine programs at once: one of them serves on.
        None => before.remove(0),
    };
    let mut all = vec![current];
    all.extend(dead);
    for seat in &all {
        launch_in(exe, seat, Some(&dir))?;
    }
    all.extend(before);
    let newest = seats(&dir).filter_map(|s| spool::read_id(&s).ok()).max();
    let spool = newest.ok_or_else(|| Error::Spool { path: dir, why: "it has no id".into() })?;
    Ok(Wardens { seats: all, spool })
}

/// All places where a warden of this node may live.
pub fn seats(data_dir: &Path) -> impl Iterator<Item = PathBuf> {
    let dir = data_dir.to_owned();
    std::iter::once(dir.clone()).chain((2..=9).map(move |n| dir.join(format!("w{n}"))))
}

/// Which file a path leads to now. A running warden keeps its own file from being another's.
fn program_of(exe: &Path) -> Option<String> {
    use std::os::unix::fs::MetadataExt;
    let m = std::fs::metadata(exe).ok()?;
    Some(format!("{} {}\n", m.dev(), m.ino()))
}

/// Says of which program the warden of a seat is; holds while it lives.
fn program_path(seat: &Path) -> PathBuf {
    seat.join("warden.program")
}

fn launch_in(exe: &Path, seat: &Path, home: Option<&Path>) -> Result<(), Error> {
    let dir = make_data_dir(seat)?;
    let home = home.filter(|h| *h != dir);
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
            let program = program_of(exe).unwrap_or_default();
            std::fs::write(program_path(&dir), program).map_err(Error::io(format!("write in {}", dir.display())))?;
            mine = Some(spawn(exe, &dir, home, &log)?);
        }
        if begun.elapsed() > PATIENCE {
            started.extend(mine);
            return Err(Error::Silent { secs: PATIENCE.as_secs(), log });
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[expect(clippy::disallowed_methods, reason = "the one place that starts a warden")]
fn spawn(exe: &Path, dir: &Path, home: Option<&Path>, log: &Path) -> Result<Child, Error> {
    let stderr = std::fs::File::options().append(true).create(true).mode(0o600).open(log);
    let stderr = stderr.map_err(Error::io(format!("open {}", log.display())))?;
    let mut command = std::process::Command::new(exe);
    command.arg("warden").arg("--data-dir").arg(dir);
    if let Some(home) = home {
        command.arg("--beside").arg(home);
    }
    command
        // The daemon's environment holds what a task's parent must not know.
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(stderr)
        .spawn()
        .map_err(Error::io(format!("start {}", exe.display())))
}

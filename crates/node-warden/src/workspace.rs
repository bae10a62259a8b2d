//! The folder of a task: made, entered and removed without following a link out of it.

use mesh_core::policy::{Grant, Place};
use mesh_core::task::{Reason, ReasonCode};
use rustix::fs::{AtFlags, Gid, Mode, OFlags, ResolveFlags, Uid};
use rustix::io::Errno;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc;

const DIR: OFlags = OFlags::DIRECTORY.union(OFlags::CLOEXEC);

fn refuse(code: ReasonCode, detail: String) -> Reason {
    Reason::new(code, detail)
}

/// Opens the folder in which the task begins; makes the workspace first if it is missing.
pub(crate) fn enter(grant: &Grant) -> Result<OwnedFd, Reason> {
    let place = grant.place();
    let root = open_workspace(place)
        .map_err(|e| refuse(ReasonCode::PolicyDenied, format!("workspace {:?} cannot be used: {e}", place.workspace)))?;
    if grant.cwd().is_empty() || grant.cwd() == "." {
        return Ok(root);
    }
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    let mut tries = 0;
    loop {
        match rustix::fs::openat2(&root, grant.cwd(), OFlags::PATH | DIR, Mode::empty(), resolve) {
            Ok(fd) => return Ok(fd),
            // The kernel could not be sure while somebody renamed a folder on the way.
            Err(Errno::AGAIN | Errno::INTR) if tries < 16 => tries += 1,
            Err(Errno::NOENT | Errno::NOTDIR) => {
                return Err(refuse(ReasonCode::NotFound, format!("cwd {:?} is no folder of the workspace", grant.cwd())));
            }
            Err(Errno::XDEV | Errno::LOOP) => {
                return Err(refuse(ReasonCode::PolicyDenied, format!("cwd {:?} leads out of the workspace", grant.cwd())));
            }
            Err(e) => {
                return Err(refuse(ReasonCode::PolicyDenied, format!("cwd {:?} cannot be entered: {e}", grant.cwd())));
            }
        }
    }
}

fn open_workspace(place: &Place) -> io::Result<OwnedFd> {
    let path = Path::new(&place.workspace);
    if !path.is_absolute() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "its path is not absolute"));
    }
    let own_user = place.run_as.filter(|_| rustix::process::geteuid().is_root()).map(|id| (Uid::from_raw(id), Gid::from_raw(id)));
    match rustix::fs::open(path, OFlags::PATH | OFlags::NOFOLLOW | DIR, Mode::empty()) {
        Err(Errno::NOENT) => {}
        Err(e) => return Err(e.into()),
        Ok(dir) => {
            // Still root's: an earlier start ended between making it and handing it over.
            if let Some((uid, gid)) = own_user.filter(|_| rustix::fs::fstat(&dir).is_ok_and(|s| s.st_uid == 0)) {
                rustix::fs::chownat(&dir, "", Some(uid), Some(gid), AtFlags::EMPTY_PATH)?;
            }
            return Ok(dir);
        }
    }
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is the root"));
    };
    // The way to a workspace must be open to the task's user, the workspace to nobody else.
    let _open_way = Umask::set(0o022);
    let open_parent = || rustix::fs::open(parent, OFlags::RDONLY | DIR, Mode::empty());
    let parent = match open_parent() {
        Err(Errno::NOENT) => {
            std::fs::DirBuilder::new().recursive(true).mode(0o711).create(parent)?;
            open_parent()?
        }
        there => there?,
    };
    match rustix::fs::mkdirat(&parent, name, Mode::RWXU) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(e) => return Err(e.into()),
    }
    let dir = rustix::fs::openat(&parent, name, OFlags::RDONLY | OFlags::NOFOLLOW | DIR, Mode::empty())?;
    if let Some((uid, gid)) = own_user {
        rustix::fs::fchown(&dir, Some(uid), Some(gid))?;
    }
    Ok(dir)
}

struct Umask(Mode);

impl Umask {
    fn set(mask: u32) -> Self {
        Self(rustix::process::umask(Mode::from_raw_mode(mask)))
    }
}

impl Drop for Umask {
    fn drop(&mut self) {
        rustix::process::umask(self.0);
    }
}

/// Workspaces that wait for their removal; more stay until a warden starts anew.
const MAX_DOOMED: usize = 4096;

/// Removes ephemeral workspaces beside the main loop: a tree can be large.
pub(crate) struct Remover {
    work: Option<mpsc::SyncSender<PathBuf>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

/// The name that a workspace gets before it is removed; the next task of the same name is then safe.
fn doomed(path: &Path, mark: &str) -> Option<PathBuf> {
    let mut name = OsString::from(".");
    name.push(path.file_name()?);
    name.push(format!(".gone-{mark}"));
    Some(path.with_file_name(name))
}

impl Remover {
    pub fn new() -> Self {
        Self { work: None, thread: None }
    }

    /// Takes the folder out of the way at once and removes it later. `mark` names the attempt; what a
    /// killed warden left under that name is removed too.
    pub fn remove(&mut self, path: &Path, mark: &str) {
        // Most tasks leave nothing behind; that folder goes by one call.
        if rustix::fs::unlinkat(rustix::fs::CWD, path, AtFlags::REMOVEDIR).is_ok() {
            return;
        }
        let Some(doomed) = doomed(path, mark) else { return };
        if let Err(e) = std::fs::rename(path, &doomed)
            && e.kind() != io::ErrorKind::NotFound
        {
            say!("warden: workspace {}: {e}", path.display());
            return;
        }
        if doomed.symlink_metadata().is_err() {
            return;
        }
        if self.work.is_none() {
            let (work, orders) = mpsc::sync_channel::<PathBuf>(MAX_DOOMED);
            let thread = std::thread::Builder::new().name("workspace-remover".into()).spawn(move || {
                for path in orders {
                    if let Err(e) = remove_tree(&path) {
                        say!("warden: remove {}: {e}", path.display());
                    }
                }
            });
            let Ok(thread) = thread else { return };
            (self.work, self.thread) = (Some(work), Some(thread));
        }
        if let Some(Err(e)) = self.work.as_ref().map(|w| w.try_send(doomed)) {
            say!("warden: a workspace stays for now: {e}");
        }
    }
}

impl Drop for Remover {
    fn drop(&mut self) {
        self.work = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Removes what wardens that were killed have left half removed under `root`, in the folders of its users:
/// an attempt that the hub has acknowledged meanwhile is in no journal any more. Gives how many there
/// were. Only doomed names go: another node may have its workspaces under the same root.
pub fn sweep_doomed(root: &Path) -> usize {
    let mut count = 0;
    let folders = |at: &Path| std::fs::read_dir(at).into_iter().flatten().flatten().filter(|e| e.file_type().is_ok_and(|t| t.is_dir()));
    for user in folders(root) {
        for entry in folders(&user.path()) {
            let name = entry.file_name();
            if !name.to_str().is_some_and(|n| n.starts_with(".ephemeral-") && n.contains(".gone-")) {
                continue;
            }
            match remove_tree(&entry.path()) {
                Ok(()) => count += 1,
                Err(e) => eprintln!("remove {}: {e}", entry.path().display()),
            }
        }
    }
    count
}

/// Removes a tree by descriptors, following no link. Folders deeper than some levels are moved up
/// first, so that a task cannot exhaust descriptors by nesting.
fn remove_tree(path: &Path) -> io::Result<()> {
    const DEPTH: usize = 64;
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return Ok(()) };
    let parent = rustix::fs::open(parent, OFlags::RDONLY | DIR, Mode::empty())?;
    let open = |at: &OwnedFd, name: &OsStr| rustix::fs::openat(at, name, OFlags::RDONLY | OFlags::NOFOLLOW | DIR, Mode::empty());
    let root = match open(&parent, name) {
        Ok(fd) => fd,
        // Not a folder: the name alone goes.
        Err(Errno::NOTDIR | Errno::LOOP) => return Ok(rustix::fs::unlinkat(&parent, name, AtFlags::empty())?),
        Err(Errno::NOENT) => return Ok(()),
        Err(e) => return Err(e.into()),
    };
    let mut moved = 0u64;
    let mut stack: Vec<(OwnedFd, OsString)> = vec![];
    let mut here = (rustix::io::fcntl_dupfd_cloexec(&root, 3)?, OsString::new());
    loop {
        let mut deeper = None;
        for entry in rustix::fs::Dir::read_from(&here.0)? {
            let entry = entry?;
            let name = OsStr::from_bytes(entry.file_name().to_bytes());
            if name == "." || name == ".." {
                continue;
            }
            match rustix::fs::unlinkat(&here.0, name, AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => continue,
                Err(Errno::ISDIR | Errno::PERM) => {}
                Err(e) => return Err(e.into()),
            }
            if rustix::fs::unlinkat(&here.0, name, AtFlags::REMOVEDIR).is_ok() {
                continue;
            }
            if stack.len() >= DEPTH {
                moved += 1;
                rustix::fs::renameat(&here.0, name, &root, format!(".moved-{moved}"))?;
                continue;
            }
            // Its own user may have closed it. Root needs no permission, and must not follow a name
            // that somebody may have made a link meanwhile; any other uid is the task's own here.
            if !rustix::process::geteuid().is_root() {
                let _ = rustix::fs::chmodat(&here.0, name, Mode::RWXU, AtFlags::empty());
            }
            deeper = Some((open(&here.0, name)?, OsString::from_vec(name.as_bytes().to_vec())));
            break;
        }
        match deeper {
            Some(next) => stack.push(std::mem::replace(&mut here, next)),
            None => {
                let Some(up) = stack.pop() else { break };
                let done = std::mem::replace(&mut here, up);
                match rustix::fs::unlinkat(&here.0, &*done.1, AtFlags::REMOVEDIR) {
                    // Something was moved in or made meanwhile: it is listed again.
                    Ok(()) | Err(Errno::NOTEMPTY | Errno::EXIST) => {}
                    Err(e) => return Err(e.into()),
                }
            }
        }
    }
    drop(here);
    match rustix::fs::unlinkat(&parent, name, AtFlags::REMOVEDIR) {
        // What was moved up to the root after it had been listed.
        Err(Errno::NOTEMPTY | Errno::EXIST) if moved > 0 => remove_tree(path),
        other => Ok(other?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_killed_warden_left_half_removed_goes_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let user = dir.path().join("user_1");
        let doomed = user.join(".ephemeral-task_1.gone-task_1-1");
        std::fs::create_dir_all(doomed.join("a/b")).unwrap();
        std::fs::write(doomed.join("a/f"), "x").unwrap();
        let kept = ["ephemeral-task_2", "sess_3", ".hidden", ".other.gone-1"];
        kept.iter().for_each(|name| std::fs::create_dir(user.join(name)).unwrap());
        let elsewhere = tempfile::tempdir().unwrap();
        std::fs::create_dir(elsewhere.path().join(".ephemeral-t.gone-t")).unwrap();
        std::os::unix::fs::symlink(elsewhere.path(), dir.path().join("link")).unwrap();
        assert_eq!(sweep_doomed(dir.path()), 1);
        assert!(!doomed.exists() && kept.iter().all(|name| user.join(name).exists()));
        assert!(elsewhere.path().join(".ephemeral-t.gone-t").exists(), "no link is followed");
        assert_eq!(sweep_doomed(dir.path()), 0);
    }

    #[test]
    fn a_deep_tree_with_links_goes_and_what_it_points_to_stays() {
        let dir = tempfile::tempdir().unwrap();
        let outside = dir.path().join("outside");
        std::fs::write(&outside, "kept").unwrap();
        let kept = dir.path().join("kept");
        std::fs::create_dir(&kept).unwrap();
        std::fs::write(kept.join("file"), "kept").unwrap();
        let tree = dir.path().join("tree");
        let mut deep = tree.clone();
        for _ in 0..200 {
            deep.push("d");
        }
        std::fs::create_dir_all(&deep).unwrap();
        for at in [&tree, &deep] {
            std::fs::write(at.join("f"), "x").unwrap();
            std::os::unix::fs::symlink(&kept, at.join("link")).unwrap();
            std::os::unix::fs::symlink(&outside, at.join("link2")).unwrap();
        }
        let mut remover = Remover::new();
        let empty = dir.path().join("empty");
        std::fs::create_dir(&empty).unwrap();
        remover.remove(&empty, "0");
        assert!(!empty.exists() && remover.work.is_none(), "nothing in it: gone at once, without the thread");
        remover.remove(&tree, "1");
        assert!(!tree.exists(), "out of the way at once");
        drop(remover);
        let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().flatten().map(|e| e.file_name()).collect();
        assert_eq!(left.len(), 2, "{left:?}");
        assert_eq!(std::fs::read_to_string(kept.join("file")).unwrap(), "kept");
    }
}

//! The fallback where no pid namespace can be made: a control group (version 2) per task.

use rustix::fs::{Mode, OFlags};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The control group (version 2) below which this process may make groups that it can kill.
pub(crate) fn parent() -> Option<PathBuf> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").ok()?;
    let mount = mounts.lines().find(|l| l.contains(" - cgroup2 "))?.split(' ').nth(4)?.to_owned();
    let own = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    let own = own.lines().find_map(|l| l.strip_prefix("0::"))?.trim_start_matches('/').to_owned();
    let parent = Path::new(&mount).join(own);
    let probe = parent.join(format!("cortex-probe-{}", std::process::id()));
    std::fs::create_dir(&probe).ok()?;
    let can_kill = rustix::fs::access(probe.join("cgroup.kill"), rustix::fs::Access::WRITE_OK).is_ok();
    let _ = std::fs::remove_dir(&probe);
    can_kill.then_some(parent)
}

fn name(spool: &str) -> String {
    format!("cortex-{spool}-")
}

/// A new group and a descriptor to clone into it.
pub(crate) fn make(spool: &str, slot: usize, generation: u32) -> io::Result<(PathBuf, OwnedFd)> {
    let parent = parent().ok_or(io::ErrorKind::NotFound)?;
    let path = parent.join(format!("{}{slot}-{generation}", name(spool)));
    std::fs::create_dir(&path)?;
    match rustix::fs::open(&path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()) {
        Ok(fd) => Ok((path, fd)),
        Err(e) => {
            remove(&path);
            Err(e.into())
        }
    }
}

/// Ends every process of the group.
pub(crate) fn kill(path: &Path) {
    if let Err(e) = std::fs::write(path.join("cgroup.kill"), "1") {
        say!("warden: control group {}: {e}", path.display());
    }
}

/// Removes a group whose processes were killed; the last of them may need a moment.
pub(crate) fn remove(path: &Path) {
    let begun = crate::clock::now();
    while let Err(e) = std::fs::remove_dir(path) {
        if e.kind() == io::ErrorKind::NotFound || begun.elapsed() > Duration::from_millis(200) {
            return;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Ends what a killed warden of this spool has left.
pub(crate) fn sweep(spool: &str) {
    let Some(parent) = parent() else { return };
    for entry in std::fs::read_dir(parent).into_iter().flatten().flatten() {
        if entry.file_name().to_str().is_some_and(|n| n.starts_with(&name(spool))) {
            kill(&entry.path());
            remove(&entry.path());
        }
    }
}

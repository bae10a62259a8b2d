//! Files that belong to this process alone.

use std::fs::{DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

/// Makes a folder (and its parents) that only this user may enter.
pub fn private_dir(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// Replaces a file as a whole, readable by its owner alone: after a crash the old or the new content
/// is there, never a part.
pub fn write_private(path: &Path, content: &[u8]) -> io::Result<()> {
    replace(path, content, true)
}

/// As [`write_private`], for what is only shown: it waits for no disk, and a power cut may leave it empty.
pub fn show_private(path: &Path, content: &[u8]) -> io::Result<()> {
    replace(path, content, false)
}

fn replace(path: &Path, content: &[u8], synced: bool) -> io::Result<()> {
    let dir = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let name = path.file_name().ok_or_else(|| io::Error::other("a file needs a name"))?;
    let tmp = dir.join(format!(".{}.{}.tmp", name.to_string_lossy(), std::process::id()));
    let write = || -> io::Result<()> {
        let mut f = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&tmp)?;
        f.write_all(content)?;
        if synced {
            f.sync_all()?;
        }
        std::fs::rename(&tmp, path)?;
        if synced { File::open(dir)?.sync_all() } else { Ok(()) }
    };
    write().inspect_err(|_| {
        let _ = std::fs::remove_file(&tmp);
    })
}

/// Makes a new private file and refuses to touch an existing one.
pub fn create_private(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut f = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    f.write_all(content)?;
    f.sync_all()
}

/// An advisory lock on a file, held until dropped; the kernel frees it when the process dies.
#[derive(Debug)]
pub struct Lock(#[allow(dead_code)] File);

impl Lock {
    /// `None` when another process holds it.
    pub fn try_take(path: &Path) -> io::Result<Option<Self>> {
        let f = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path)?;
        match f.try_lock() {
            Ok(()) => Ok(Some(Self(f))),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(e)) => Err(e),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn private_files() {
        let dir = tempfile::tempdir().unwrap();
        let p = dir.path().join("key");
        write_private(&p, b"one").unwrap();
        write_private(&p, b"two").unwrap();
        assert_eq!(std::fs::read(&p).unwrap(), b"two");
        show_private(&p, b"seen").unwrap();
        assert_eq!(std::fs::read(&p).unwrap(), b"seen");
        assert_eq!(std::fs::metadata(&p).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(create_private(&p, b"three").is_err());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "no temporary file stays");
    }

    #[test]
    fn a_lock_is_held_once() {
        let dir = tempfile::tempdir().unwrap();
        let p = dir.path().join("lock");
        let held = Lock::try_take(&p).unwrap();
        assert!(held.is_some());
        assert!(Lock::try_take(&p).unwrap().is_none());
        drop(held);
        assert!(Lock::try_take(&p).unwrap().is_some());
    }
}

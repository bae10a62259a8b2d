//! Where and as whom tasks run. The path is made of typed ids alone, never of a text from the wire.

use crate::state::{State, StateError};
use mesh_core::policy::Place;
use mesh_core::{SessionId, TaskId, UserId};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// Where `~` leads for a daemon that is root: a root home is closed to the uids of tasks.
const ROOT_HOME: &str = "/var/lib/cortex";

#[derive(Debug, thiserror::Error)]
pub enum BadRoot {
    #[error("workspace_root {0:?} is not an absolute path (or one below ~)")]
    NotAbsolute(String),
    #[error("workspace_root {0:?} is not UTF-8 once ~ is resolved")]
    NotUtf8(PathBuf),
    #[error("workspace_root {root}: {path} cannot be made or read: {source}")]
    Io {
        root: PathBuf,
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error(
        "workspace_root {root}: tasks run under their own user ids and cannot pass {path} (mode {mode:o}); choose another root or allow it: chmod o+x {path}"
    )]
    Closed { root: PathBuf, path: PathBuf, mode: u32 },
}

/// The folder under which all workspaces lie, checked.
#[derive(Debug, Clone)]
pub struct WorkspaceRoot {
    path: String,
    /// The daemon is root, so that each session gets a uid of its own.
    root: bool,
}

/// Resolves `~`: the home folder, or [`ROOT_HOME`] for root (then without a second `cortex`).
fn expand(text: &str, home: &Path, root: bool) -> Result<PathBuf, BadRoot> {
    let base = if root { Path::new(ROOT_HOME) } else { home };
    let path = match text {
        "~" => base.to_path_buf(),
        "~/cortex" if root => base.to_path_buf(),
        t => match t.strip_prefix("~/") {
            Some(rest) => base.join(rest),
            None => PathBuf::from(t),
        },
    };
    if path.is_absolute() && !path.components().any(|c| c == std::path::Component::ParentDir) {
        Ok(path)
    } else {
        Err(BadRoot::NotAbsolute(text.to_owned()))
    }
}

/// Whether uids other than the owner's may pass every folder of `path`.
fn check_passable(path: &Path) -> Result<(), BadRoot> {
    let io = |p: &Path, source| BadRoot::Io { root: path.into(), path: p.into(), source };
    let real = path.canonicalize().map_err(|e| io(path, e))?;
    for folder in real.ancestors() {
        let mode = std::fs::metadata(folder).map_err(|e| io(folder, e))?.permissions().mode() & 0o7777;
        if mode & 0o001 == 0 {
            return Err(BadRoot::Closed { root: path.into(), path: folder.into(), mode });
        }
    }
    Ok(())
}

impl WorkspaceRoot {
    /// What a setting names.
    pub fn path_of(text: &str, home: &Path, root: bool) -> Result<PathBuf, BadRoot> {
        expand(text, home, root)
    }
    /// Can tasks reach it? Only those of root have other uids.
    pub fn check(path: &Path, root: bool) -> Result<(), BadRoot> {
        if root { check_passable(path) } else { Ok(()) }
    }
    /// Makes the folder where it is missing, and checks that tasks can reach it.
    pub fn prepare(text: &str, home: &Path, root: bool) -> Result<Self, BadRoot> {
        let path = expand(text, home, root)?;
        let fresh = !path.exists();
        std::fs::create_dir_all(&path).map_err(|source| BadRoot::Io { root: path.clone(), path: path.clone(), source })?;
        if root {
            if fresh {
                // Passable, not listable: one session's user cannot see who else is here.
                let _ = std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o711));
            }
            check_passable(&path)?;
        }
        let path = path.into_os_string().into_string().map_err(|p| BadRoot::NotUtf8(p.into()))?;
        Ok(Self { path, root })
    }

    pub fn path(&self) -> &str {
        &self.path
    }

    /// The place of a task: its session's folder, or one of its own that goes with it.
    pub fn place(&self, state: &State, user: UserId, session: Option<SessionId>, task: TaskId) -> Result<Place, StateError> {
        let folder = match session {
            Some(s) => s.to_string(),
            None => format!("ephemeral-{task}"),
        };
        let run_as = match (self.root, session) {
            (false, _) => None,
            (true, Some(s)) => Some(state.session_uid(s)?),
            (true, None) => Some(state.ephemeral_uid()?),
        };
        Ok(Place { workspace: format!("{}/{user}/{folder}", self.path.trim_end_matches('/')), run_as, ephemeral: session.is_none() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::DataDir;

    #[test]
    fn the_tilde() {
        let home = Path::new("/home/u");
        for (text, root, want) in [
            ("~/cortex", false, "/home/u/cortex"),
            ("~", false, "/home/u"),
            ("/srv/w", false, "/srv/w"),
            ("~/cortex", true, "/var/lib/cortex"),
            ("~/x", true, "/var/lib/cortex/x"),
            ("/srv/w", true, "/srv/w"),
        ] {
            assert_eq!(expand(text, home, root).unwrap(), Path::new(want), "{text} {root}");
        }
        assert!(expand("w", home, false).is_err());
        assert!(expand("~/../x", home, false).is_err());
    }

    #[test]
    fn a_closed_ancestor_is_named() {
        let tmp = tempfile::tempdir().unwrap();
        std::fs::set_permissions(tmp.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        let closed = tmp.path().join("closed");
        std::fs::create_dir(&closed).unwrap();
        std::fs::set_permissions(&closed, std::fs::Permissions::from_mode(0o700)).unwrap();
        let err = WorkspaceRoot::prepare(closed.join("w").to_str().unwrap(), Path::new("/"), true).unwrap_err();
        let real = closed.canonicalize().unwrap();
        assert!(matches!(&err, BadRoot::Closed { path, .. } if *path == real), "{err}");
        assert!(err.to_string().contains("chmod o+x"));
        std::fs::set_permissions(&closed, std::fs::Permissions::from_mode(0o711)).unwrap();
        WorkspaceRoot::prepare(closed.join("w").to_str().unwrap(), Path::new("/"), true).unwrap();
    }

    #[test]
    fn places() {
        let tmp = tempfile::tempdir().unwrap();
        let state = State::open(&DataDir::new(tmp.path())).unwrap();
        let (user, task) = (UserId::from_bytes([1; 16]), TaskId::from_bytes([2; 16]));
        let (s1, s2) = (SessionId::from_bytes([3; 16]), SessionId::from_bytes([4; 16]));
        let root = WorkspaceRoot { path: "/w".into(), root: true };
        let a = root.place(&state, user, Some(s1), task).unwrap();
        assert_eq!((a.workspace, a.run_as, a.ephemeral), (format!("/w/{user}/{s1}"), Some(700_000), false));
        assert_eq!(root.place(&state, user, Some(s2), task).unwrap().run_as, Some(700_001));
        assert_eq!(root.place(&state, user, Some(s1), task).unwrap().run_as, Some(700_000));
        let e = root.place(&state, user, None, task).unwrap();
        assert_eq!((e.workspace, e.run_as, e.ephemeral), (format!("/w/{user}/ephemeral-{task}"), Some(760_000), true));
        let plain = WorkspaceRoot { path: "/w".into(), root: false };
        assert_eq!(plain.place(&state, user, Some(s1), task).unwrap().run_as, None);
    }
}

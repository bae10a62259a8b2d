//! The warden's only memory: `{data_dir}/spool`.
//!
//! | file | what |
//! |---|---|
//! | `id` | the random id of this memory; made last, so that it never outlives the journal's loss |
//! | `journal` | checksummed records, appended and synced in groups ([`journal`]) |
//! | `out/{task}-{attempt}` | the output of one attempt, made at its first byte ([`output`]) |
//!
//! `starting` is synced before the exec, the output before `exit`, and `exit` before anybody is told.
//! A folder whose journal is gone gets a new id: what it knew must not be answered as *unknown*.

pub(crate) mod journal;
mod output;

pub(crate) use output::{FILE_HEAD, FRAME_HEAD, MAX_FRAME_BYTES, OutputWriter, recover};
pub use output::{OutputFrame, OutputReader, Stream};

use crate::{Error, Key};
use journal::{Journal, Record};
use mesh_core::SpoolId;
use rustix::fs::{Mode, OFlags};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

pub(crate) struct Spool {
    pub id: SpoolId,
    /// The id, and which of those under it: names what is this warden's alone.
    pub name: String,
    pub journal: Journal,
    out: PathBuf,
    out_dir: OwnedFd,
}

pub(crate) fn output_path(data_dir: &Path, (task, attempt): &Key) -> PathBuf {
    data_dir.join("spool/out").join(format!("{task}-{}", attempt.0))
}

/// Bytes on the disk of all output that is kept for the hub, by all wardens.
pub fn used(data_dir: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let files = crate::seats(data_dir).filter_map(|seat| std::fs::read_dir(seat.join("spool/out")).ok()).flatten().flatten();
    files.filter_map(|f| f.metadata().ok()).map(|m| m.blocks() * 512).sum()
}

fn open_dir(path: &Path) -> io::Result<OwnedFd> {
    Ok(rustix::fs::open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?)
}

fn sync_dir(path: &Path) -> io::Result<()> {
    Ok(rustix::fs::fsync(open_dir(path)?)?)
}

fn make_dir(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    match std::fs::DirBuilder::new().mode(0o700).create(path) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(e) => Err(e),
        Ok(()) => sync_dir(path.parent().unwrap_or(Path::new("/"))),
    }
}

impl Spool {
    /// Opens or makes the spool and gives the records that still count, in their order.
    pub fn open(data_dir: &Path, beside: Option<&Path>) -> Result<(Self, Vec<Record>), Error> {
        let dir = data_dir.join("spool");
        let out = dir.join("out");
        let bad = |what: &str| Error::io(format!("{what} {}", dir.display()));
        make_dir(&dir).map_err(bad("make"))?;
        make_dir(&out).map_err(bad("make"))?;
        let had_journal = dir.join("journal").exists();
        let (journal, records) = Journal::open(&dir).map_err(bad("open the journal in"))?;
        let id = match std::fs::read(dir.join("id")) {
            Ok(bytes) if had_journal => {
                let text = String::from_utf8_lossy(&bytes);
                text.trim().parse().map_err(|e| Error::Spool { path: dir.clone(), why: format!("id: {e}") })?
            }
            Ok(_) => {
                say!("warden: the journal is gone; the spool gets a new id");
                make_id(&dir).map_err(bad("make an id in"))?
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                // One memory with the first; unless there was one here that is gone.
                let first = beside.filter(|home| !mark(data_dir, home).exists()).and_then(|home| read_id(home).ok());
                first.map_or_else(|| make_id(&dir), |id| write_id(&dir, id)).map_err(bad("make an id in"))?
            }
            Err(e) => return Err(bad("read the id in")(e)),
        };
        let mut name = id.to_string();
        if let Some(home) = beside {
            name = format!("{name}.{}", seat_name(data_dir));
            let mark = mark(data_dir, home);
            if !mark.exists() {
                std::fs::File::create(&mark).and_then(|_| sync_dir(&home.join("spool"))).map_err(bad("note"))?;
            }
        }
        let out_dir = open_dir(&out).map_err(bad("open"))?;
        Ok((Self { id, name, journal, out, out_dir }, records))
    }

    pub fn output_path(&self, (task, attempt): &Key) -> PathBuf {
        self.out.join(format!("{task}-{}", attempt.0))
    }

    pub fn remove_output(&self, key: &Key) {
        match std::fs::remove_file(self.output_path(key)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => say!("warden: remove output of {}: {e}", key.0),
            _ => {}
        }
    }

    /// Makes the names of new output files durable.
    pub fn sync_names(&self) -> io::Result<()> {
        Ok(rustix::fs::fsync(&self.out_dir)?)
    }

    /// Removes output that no record speaks of.
    pub fn sweep(&self, known: impl Fn(&str) -> bool) {
        for entry in std::fs::read_dir(&self.out).into_iter().flatten().flatten() {
            if !entry.file_name().to_str().is_some_and(&known) {
                let _ = std::fs::remove_file(entry.path());
            }
        }
    }
}

/// The id of the spool in a data folder.
pub(crate) fn read_id(data_dir: &Path) -> io::Result<SpoolId> {
    let text = std::fs::read_to_string(data_dir.join("spool/id"))?;
    text.trim().parse().map_err(|_| io::ErrorKind::InvalidData.into())
}

fn seat_name(data_dir: &Path) -> std::borrow::Cow<'_, str> {
    data_dir.file_name().unwrap_or_default().to_string_lossy()
}

/// Beside the first one's id: that there is, or was, a spool in this folder. Made before anything can start
/// there, so that a folder that is taken away is not taken for one that never was.
fn mark(data_dir: &Path, home: &Path) -> PathBuf {
    home.join("spool").join(format!("beside-{}", seat_name(data_dir)))
}

/// Must a warden be started in a folder that has none, so that all is told that is known, or known to be gone?
pub(crate) fn remembers(data_dir: &Path, home: &Path) -> bool {
    let (id, first) = (read_id(data_dir).ok(), read_id(home).ok());
    if data_dir == home && first.is_none() && crate::launch::seats(home).skip(1).any(|s| s.exists()) {
        return true;
    }
    if data_dir != home && !data_dir.exists() && !mark(data_dir, home).exists() {
        return false;
    }
    id != first || journal::remembers(&data_dir.join("spool"))
}

/// Takes away a folder beside the first that remembers nothing, so that the next one there begins anew.
pub(crate) fn remove_beside(data_dir: &Path, home: &Path) -> io::Result<()> {
    if !data_dir.exists() && !mark(data_dir, home).exists() {
        return Ok(());
    }
    // In this order: a crash between leaves an empty memory under the same id.
    let there = |e: io::Result<()>| e.or_else(|e| if e.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(e) });
    there(std::fs::remove_file(mark(data_dir, home)))?;
    sync_dir(&home.join("spool"))?;
    there(std::fs::remove_dir_all(data_dir))
}

fn make_id(dir: &Path) -> io::Result<SpoolId> {
    let mut random = [0u8; 10];
    rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
    write_id(dir, SpoolId::from_parts(crate::clock::unix_ms(), random))
}

fn write_id(dir: &Path, id: SpoolId) -> io::Result<SpoolId> {
    let fresh = dir.join("id.new");
    let mut file = std::fs::File::create(&fresh)?;
    writeln!(file, "{id}")?;
    file.sync_all()?;
    std::fs::rename(&fresh, dir.join("id"))?;
    sync_dir(dir)?;
    Ok(id)
}

//! One attempt's output while it is remembered: its open file, its totals, its sparse index.

use super::frames::Source;
use bytes::Bytes;
use hub_engine::records::OutputTotals;
use mesh_core::TaskId;
use mesh_core::output::Digests;
use mesh_core::task::AttemptNo;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The index has about one mark in this many bytes.
const STRIDE: u64 = 256 * 1024;

/// Bytes of a file that are synced at once. Whoever syncs meanwhile, the journal above all, waits for the
/// disk to take what is before it.
const SYNC_AT_ONCE: usize = 1 << 20;

/// What the row says.
#[derive(Debug, Clone, Default)]
pub(crate) struct Kept {
    pub totals: OutputTotals,
    /// So much of the file counts.
    pub in_file: u64,
    /// Encoded frames that follow it.
    pub held: Bytes,
}

#[derive(Debug)]
pub(super) struct Entry {
    pub task: TaskId,
    pub no: AttemptNo,
    pub path: PathBuf,
    /// Held while an append is under way, so appends to one attempt come one after the other.
    pub file: tokio::sync::Mutex<Option<OpenFile>>,
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    kept: Option<Kept>,
    /// How often `kept` was forgotten: what was read before that may be out of date.
    forgotten: u64,
    /// From a frame's seq to its offset. Frames never move, so a mark stays true.
    marks: BTreeMap<u64, u64>,
    /// Of the frames up to that one, once somebody has asked.
    digests: Option<(u64, Digests)>,
}

impl Entry {
    pub(super) fn new(folder: &Path, task: TaskId, no: AttemptNo) -> Self {
        let text = task.to_string();
        let uuid = text.strip_prefix(TaskId::PREFIX).unwrap_or(&text).trim_start_matches('_');
        // The last byte: the first ones are the time, and would put all into one folder.
        let path = folder.join(format!("{:02x}", task.as_bytes()[15])).join(format!("{uuid}-{:x}", no.0));
        Self { task, no, path, file: tokio::sync::Mutex::new(None), known: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is remembered; or a number to [`Entry::learn`] with.
    pub(super) fn kept(&self) -> Result<Kept, u64> {
        let known = self.lock();
        known.kept.clone().ok_or(known.forgotten)
    }
    /// Remembers what the database said, unless an append knows better by now.
    pub(super) fn learn(&self, seen: u64, kept: Kept) -> Kept {
        let mut known = self.lock();
        if known.kept.is_none() && known.forgotten == seen {
            known.kept = Some(kept.clone());
        }
        known.kept.clone().unwrap_or(kept)
    }
    pub(super) fn publish(&self, kept: Kept, marks: Vec<(u64, u64)>) {
        self.lock().kept = Some(kept);
        self.note(marks);
    }
    pub(super) fn forget(&self) {
        let mut known = self.lock();
        known.kept = None;
        known.forgotten += 1;
    }
    pub(super) fn digests(&self, kept_seq: u64) -> Option<Digests> {
        self.lock().digests.filter(|(seq, _)| *seq == kept_seq).map(|(_, digests)| digests)
    }
    pub(super) fn set_digests(&self, kept_seq: u64, digests: Digests) {
        self.lock().digests = Some((kept_seq, digests));
    }
    pub(super) fn close(&self) {
        if let Ok(mut file) = self.file.try_lock() {
            *file = None;
        }
    }

    pub(super) fn source(&self, kept: &Kept) -> Source {
        Source { path: self.path.clone(), in_file: kept.in_file, held: kept.held.clone() }
    }
    /// Takes in those places that are far enough from a known one. They come in order.
    pub(super) fn note(&self, places: Vec<(u64, u64)>) {
        let marks = &mut self.lock().marks;
        for (seq, at) in places {
            let near = marks.range(..=seq).next_back().map_or(0, |(_, at)| *at);
            if at >= near + STRIDE {
                marks.insert(seq, at);
            }
        }
    }
    /// Where to begin so as to pass over the frame `seq`.
    pub(super) fn mark_before(&self, seq: u64) -> u64 {
        self.lock().marks.range(..=seq).next_back().map_or(0, |(_, at)| *at)
    }
    /// The last known beginning of a frame below the offset `end`.
    pub(super) fn mark_below(&self, end: u64) -> u64 {
        self.lock().marks.values().rev().find(|at| **at < end).copied().unwrap_or(0)
    }
}

/// A file that is counted among the open ones.
#[derive(Debug)]
pub(super) struct OpenFile(File, Arc<AtomicUsize>);

impl Drop for OpenFile {
    fn drop(&mut self) {
        self.1.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Writes `bytes` at `at`, the counted end, and syncs them. Blocks.
pub(super) fn write(open: Option<OpenFile>, path: &Path, at: u64, bytes: &[u8], count: Arc<AtomicUsize>) -> io::Result<OpenFile> {
    let named = |e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", path.display()));
    let open = match open {
        Some(open) => open,
        None => {
            let file = open_at(path, at).map_err(named)?;
            count.fetch_add(1, Ordering::AcqRel);
            OpenFile(file, count)
        }
    };
    let mut at = at;
    for part in bytes.chunks(SYNC_AT_ONCE) {
        open.0.write_all_at(part, at).map_err(named)?;
        open.0.sync_data().map_err(named)?;
        at += part.len() as u64;
    }
    Ok(open)
}

/// Removes files that may be gone already; their folders are synced, so that none comes back. Blocks.
pub(super) fn remove(paths: &[PathBuf]) -> io::Result<()> {
    let named = |path: &Path, e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", path.display()));
    let mut folders = BTreeSet::new();
    for path in paths {
        match std::fs::remove_file(path) {
            Ok(()) => folders.extend(path.parent()),
            Err(e) if e.kind() == io::ErrorKind::NotFound => folders.extend(path.parent().filter(|f| f.exists())),
            Err(e) => return Err(named(path, e)),
        }
    }
    folders.into_iter().try_for_each(|folder| File::open(folder).and_then(|f| f.sync_all()).map_err(|e| named(folder, e)))
}

/// Opens or makes the file, and cuts off what a crash left behind its counted end.
fn open_at(path: &Path, end: u64) -> io::Result<File> {
    let folder = path.parent().ok_or_else(|| io::Error::other("a file needs a folder"))?;
    let options = || {
        let mut o = OpenOptions::new();
        o.read(true).write(true).mode(0o600);
        o
    };
    let file = match options().open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            mesh_process::files::private_dir(folder)?;
            let file = options().create(true).truncate(false).open(path)?;
            // The names must last as long as the row that counts on them.
            File::open(folder)?.sync_all()?;
            for above in folder.ancestors().skip(1).take(2) {
                File::open(above)?.sync_all()?;
            }
            file
        }
        Err(e) => return Err(e),
    };
    let length = file.metadata()?.len();
    if length < end {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("it has {length} bytes where {end} were written")));
    }
    if length > end {
        file.set_len(end)?;
    }
    Ok(file)
}

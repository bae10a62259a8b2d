//! Output of attempts: frames in append-only files, synced before the commit that counts them.
//!
//! A crash between the two leaves bytes behind the counted end; they are cut off before the next
//! write. Output of a few lines never reaches a file: it is held in the row (see `outputs` in the
//! schema) until it is worth a sync of its own.

mod attempt;
mod frames;

use crate::dialect::{Conn, Readers};
use crate::rows::{Columns, Id};
use crate::sql::{Rows, sql, values};
use crate::store::{Failed, Store, failed};
use crate::writer::{Bulk, Writer};
use async_trait::async_trait;
use attempt::{Entry, Kept};
use bytes::Bytes;
use frames::Source;
use futures::future::BoxFuture;
use hub_engine::ports::{Output, StoreError, Stored};
use hub_engine::records::{OutputFrame, OutputTotals, Stream};
use mesh_core::TaskId;
use mesh_core::output::{Digests, Hashing};
use mesh_core::task::AttemptNo;
use mesh_process::Tasks;
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::{Semaphore, oneshot};

/// Frames of up to this many bytes together stay in the row.
const HELD: usize = 8 * 1024;
/// Attempts that are remembered without asking the database.
const ENTRIES: usize = 1024;
/// Files that stay open for the next append.
const FILES: usize = 256;
/// Files that are hashed at the same time: it takes a core, and all of the file.
const HASHED_AT_ONCE: usize = 2;

#[async_trait]
impl Output for Store {
    async fn append(&self, task: TaskId, no: AttemptNo, frames: Vec<OutputFrame>, keep_bytes: u64) -> Stored<Option<OutputTotals>> {
        self.outputs.append(task, no, frames, keep_bytes).await
    }

    async fn give_up(&self, task: TaskId, no: AttemptNo, to_seq: u64) -> Stored<()> {
        let (reply, answer) = oneshot::channel();
        let outputs = self.outputs.clone();
        self.outputs.tasks.spawn("output given up", async move {
            let _ = reply.send(outputs.give_up(task, no, to_seq).await);
        });
        answer.await.map_err(|_| StoreError::new("output.give_up", "the store has ended"))?
    }

    async fn totals(&self, task: TaskId, no: AttemptNo) -> Stored<OutputTotals> {
        let entry = self.outputs.entry(task, no);
        Ok(self.outputs.kept(&entry).await.map_err(failed("output.totals"))?.totals)
    }

    async fn digests(&self, task: TaskId, no: AttemptNo) -> Stored<Option<Digests>> {
        self.outputs.digests(task, no).await.map_err(failed("output.digests"))
    }

    async fn read(&self, task: TaskId, no: AttemptNo, after_seq: u64, max_bytes: usize) -> Stored<Vec<OutputFrame>> {
        self.outputs.read(task, no, after_seq, max_bytes).await.map_err(failed("output.read"))
    }

    async fn tail(&self, task: TaskId, no: AttemptNo, stream: Stream, max_bytes: usize) -> Stored<Vec<u8>> {
        self.outputs.tail(task, no, stream, max_bytes).await.map_err(failed("output.tail"))
    }
}

/// Of an attempt's file below the folder of all output.
pub(crate) fn output_name(task: TaskId, no: AttemptNo) -> String {
    Entry::new(std::path::Path::new(""), task, no).path.display().to_string()
}

#[derive(Debug)]
pub(crate) struct Outputs {
    folder: PathBuf,
    read: Readers,
    writer: Writer,
    tasks: Tasks,
    entries: Mutex<Entries>,
    files: Arc<AtomicUsize>,
    hashing: Semaphore,
    /// What is kept in files, in bytes; rows count as part of the database.
    in_files: AtomicU64,
}

#[derive(Debug, Default)]
struct Entries {
    /// With the turn at which each was last asked for.
    known: BTreeMap<(TaskId, AttemptNo), (Arc<Entry>, u64)>,
    turn: u64,
}

impl Outputs {
    pub(crate) fn new(folder: PathBuf, read: Readers, writer: Writer, tasks: Tasks, in_files: u64) -> Arc<Self> {
        let (entries, files, hashing) = (Mutex::default(), Arc::default(), Semaphore::new(HASHED_AT_ONCE));
        Arc::new(Self { folder, read, writer, tasks, entries, files, hashing, in_files: AtomicU64::new(in_files) })
    }

    pub(crate) fn bytes_in_files(&self) -> u64 {
        self.in_files.load(Ordering::Relaxed)
    }

    /// The size of the disk below, and what is free of it for us; zeros where the system does not say.
    pub(crate) fn disk(&self) -> (u64, u64) {
        // The folder itself is made with the first file in it.
        let place = self.folder.parent().unwrap_or(&self.folder);
        rustix::fs::statvfs(place).map_or((0, 0), |s| (s.f_blocks.saturating_mul(s.f_frsize), s.f_bavail.saturating_mul(s.f_frsize)))
    }

    /// Forgets what was remembered of attempts whose rows count on nothing any more.
    pub(crate) async fn erased(&self, gone: &[(TaskId, AttemptNo, u64)]) {
        for (task, no, bytes) in gone {
            let known = self.entries.lock().unwrap_or_else(PoisonError::into_inner).known.get(&(*task, *no)).map(|k| k.0.clone());
            if let Some(entry) = known {
                let mut file = entry.file.lock().await;
                entry.forget();
                *file = None;
            }
            let _ = self.in_files.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| Some(n.saturating_sub(*bytes)));
        }
    }

    /// Removes files, and syncs the folders that named them.
    pub(crate) async fn remove_files(&self, gone: Vec<(TaskId, AttemptNo)>) -> Result<(), Failed> {
        let paths: Vec<PathBuf> = gone.into_iter().map(|(task, no)| Entry::new(&self.folder, task, no).path).collect();
        tokio::task::spawn_blocking(move || attempt::remove(&paths)).await?.map_err(Into::into)
    }

    /// The one entry of an attempt; a second one would not know of the first one's writes.
    fn entry(&self, task: TaskId, no: AttemptNo) -> Arc<Entry> {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        entries.turn += 1;
        let turn = entries.turn;
        let (entry, used) = entries.known.entry((task, no)).or_insert_with(|| (Arc::new(Entry::new(&self.folder, task, no)), turn));
        *used = turn;
        let entry = entry.clone();
        let (crowded, many_files) = (entries.known.len() > ENTRIES, self.files.load(Ordering::Acquire) > FILES);
        if crowded || many_files {
            let mut turns: Vec<u64> = entries.known.values().map(|e| e.1).collect();
            turns.sort_unstable();
            let old = turns[turns.len() / 2];
            entries.known.retain(|_, (e, used)| {
                // Only this map holds it: nobody is in the middle of using it.
                let idle = *used <= old && Arc::strong_count(e) == 1;
                if idle && many_files {
                    e.close();
                }
                !(idle && crowded)
            });
        }
        entry
    }

    /// What is kept of an attempt now, from memory or the database.
    async fn kept(&self, entry: &Entry) -> Result<Kept, Failed> {
        let seen = match entry.kept() {
            Ok(kept) => return Ok(kept),
            Err(seen) => seen,
        };
        let q = sql("SELECT durable_seq, stdout_bytes, stderr_bytes, kept_seq, truncated, kept_len, held FROM outputs \
             WHERE task = $1 AND attempt = $2");
        let kept = self.read.row(q.bind(entry.task.blob()).bind(entry.no.0), |row| {
            let c = &mut Columns::of(row);
            let totals = OutputTotals {
                durable_seq: c.unsigned()?,
                stdout_bytes: c.unsigned()?,
                stderr_bytes: c.unsigned()?,
                kept_seq: c.unsigned()?,
                truncated: c.get()?,
            };
            Ok(Kept { totals, in_file: c.unsigned()?, held: Bytes::from(c.get::<Vec<u8>>()?) })
        });
        Ok(entry.learn(seen, kept.await?.unwrap_or_default()))
    }

    async fn append(self: &Arc<Self>, task: TaskId, no: AttemptNo, frames: Vec<OutputFrame>, keep: u64) -> Stored<Option<OutputTotals>> {
        let (reply, answer) = oneshot::channel();
        let this = self.clone();
        // On its own, so that a caller who gives up cannot leave file and row half told of each other.
        self.tasks.spawn("output append", async move {
            let _ = reply.send(this.append_whole(task, no, frames, keep).await);
        });
        answer.await.map_err(|_| StoreError::new("output.append", "the store has ended"))?
    }

    async fn append_whole(&self, task: TaskId, no: AttemptNo, frames: Vec<OutputFrame>, keep: u64) -> Stored<Option<OutputTotals>> {
        let wrong = failed::<Failed>;
        let entry = self.entry(task, no);
        let mut file = entry.file.lock().await;
        let mut before = self.kept(&entry).await.map_err(wrong("output.append"))?;
        loop {
            let Some((kept, totals)) = plan(before.totals, &frames, keep) else { return Ok(None) };
            if totals == before.totals {
                return Ok(Some(totals));
            }
            let mut bytes = before.held.to_vec();
            let mut marks = vec![];
            for frame in &kept {
                marks.push((frame.seq, before.in_file + bytes.len() as u64));
                frames::encode(frame, &mut bytes);
            }
            let after = if bytes.len() <= HELD {
                Kept { totals, in_file: before.in_file, held: bytes.into() }
            } else {
                let in_file = before.in_file + bytes.len() as u64;
                let open = file.take();
                let (path, at, files) = (entry.path.clone(), before.in_file, self.files.clone());
                let written = tokio::task::spawn_blocking(move || attempt::write(open, &path, at, &bytes, files)).await;
                *file = Some(written.map_err(|e| wrong("output.append")(e.into()))?.map_err(|e| wrong("output.append")(e.into()))?);
                Kept { totals, in_file, held: Bytes::new() }
            };
            let raised = self.writer.bulk(Raise { task, no, kept: after.clone() }).await;
            if let Ok(true) = raised {
                self.in_files.fetch_add(after.in_file - before.in_file, Ordering::Relaxed);
                entry.publish(after, marks);
                return Ok(Some(totals));
            }
            // What the database holds now is not known: ask it again, and cut the file to that.
            entry.forget();
            *file = None;
            raised?;
            // It was erased while this was under way: nothing more is kept, and what was written goes.
            before = self.kept(&entry).await.map_err(wrong("output.append"))?;
            if before.in_file == 0 && after.in_file > 0 {
                self.remove_files(vec![(task, no)]).await.map_err(wrong("output.append"))?;
            }
            if !before.totals.truncated {
                return Err(StoreError::new("output.append", "the row is not what it was, and was not erased"));
            }
        }
    }

    async fn digests(&self, task: TaskId, no: AttemptNo) -> Result<Option<Digests>, Failed> {
        let entry = self.entry(task, no);
        let kept = self.kept(&entry).await?;
        if kept.totals.truncated {
            return Ok(None);
        }
        let source = entry.source(&kept);
        if source.in_file == 0 {
            return Ok(Some(hash(&source)?));
        }
        let _turn = self.hashing.acquire().await?;
        // Whoever asks again for the same, as a node may, costs nothing more.
        if let Some(digests) = entry.digests(kept.totals.kept_seq) {
            return Ok(Some(digests));
        }
        let digests = off_thread(source, hash).await?;
        entry.set_digests(kept.totals.kept_seq, digests);
        Ok(Some(digests))
    }

    async fn give_up(&self, task: TaskId, no: AttemptNo, to_seq: u64) -> Stored<()> {
        let entry = self.entry(task, no);
        let _file = entry.file.lock().await;
        loop {
            let mut kept = self.kept(&entry).await.map_err(failed("output.give_up"))?;
            if to_seq <= kept.totals.durable_seq {
                return Ok(());
            }
            (kept.totals.durable_seq, kept.totals.truncated) = (to_seq, true);
            let raised = self.writer.bulk(Raise { task, no, kept: kept.clone() }).await;
            if let Ok(true) = raised {
                entry.publish(kept, vec![]);
                return Ok(());
            }
            // Erased meanwhile: what is left of the row is read again, and takes the same.
            entry.forget();
            raised?;
        }
    }

    async fn read(&self, task: TaskId, no: AttemptNo, after_seq: u64, max_bytes: usize) -> Result<Vec<OutputFrame>, Failed> {
        let entry = self.entry(task, no);
        let kept = self.kept(&entry).await?;
        if after_seq >= kept.totals.kept_seq {
            return Ok(vec![]);
        }
        let source = entry.source(&kept);
        let from = match source.held_seq() {
            Some(first) if first <= after_seq + 1 => source.in_file,
            _ => entry.mark_before(after_seq + 1),
        };
        let scan = move |source: &Source| {
            let (mut frames, mut marks, mut bytes) = (vec![], vec![], 0);
            source.scan(from, source.end(), |at, frame| {
                marks.push((frame.seq, at));
                if frame.seq <= after_seq {
                    return ControlFlow::Continue(());
                }
                if !frames.is_empty() && bytes + frame.data.len() > max_bytes {
                    return ControlFlow::Break(());
                }
                bytes += frame.data.len();
                frames.push(frame);
                ControlFlow::Continue(())
            })?;
            Ok::<_, std::io::Error>((frames, marks))
        };
        let (frames, marks) = off_thread(source, scan).await?;
        entry.note(marks);
        Ok(frames)
    }

    async fn tail(&self, task: TaskId, no: AttemptNo, stream: Stream, max_bytes: usize) -> Result<Vec<u8>, Failed> {
        let entry = self.entry(task, no);
        let kept = self.kept(&entry).await?;
        let written = match stream {
            Stream::Stdout => kept.totals.stdout_bytes,
            Stream::Stderr => kept.totals.stderr_bytes,
        };
        if written == 0 || max_bytes == 0 {
            return Ok(vec![]);
        }
        let source = entry.source(&kept);
        let mut tail = vec![];
        let mut end = source.end();
        // From the end to the beginning, a stretch of the index at a time.
        while end > 0 && tail.len() < max_bytes && (tail.len() as u64) < written {
            let from = if end > source.in_file { source.in_file } else { entry.mark_below(end) };
            let missing = max_bytes - tail.len();
            let (mut part, marks) = off_thread(source.clone(), move |s| last_of(s, from, end, stream, missing)).await?;
            entry.note(marks);
            part.append(&mut tail);
            tail = part;
            end = from;
        }
        Ok(tail)
    }
}

fn hash(source: &Source) -> std::io::Result<Digests> {
    let mut hashing = Hashing::default();
    source.scan(0, source.end(), |_, frame| {
        match frame.stream {
            Stream::Stdout => hashing.stdout(&frame.data),
            Stream::Stderr => hashing.stderr(&frame.data),
        }
        ControlFlow::Continue(())
    })?;
    Ok(hashing.digests())
}

type Marks = Vec<(u64, u64)>;

fn last_of(source: &Source, from: u64, end: u64, stream: Stream, max: usize) -> std::io::Result<(Vec<u8>, Marks)> {
    let (mut last, mut marks) = (vec![], vec![]);
    source.scan(from, end, |at, frame| {
        marks.push((frame.seq, at));
        if frame.stream == stream {
            last.extend_from_slice(&frame.data);
            // Cut seldom, so that each byte moves about once.
            if last.len() > max.saturating_mul(2).saturating_add(64 * 1024) {
                last.drain(..last.len() - max);
            }
        }
        ControlFlow::Continue(())
    })?;
    last.drain(..last.len().saturating_sub(max));
    Ok((last, marks))
}

/// Runs a scan where a disk may be waited for; what lies in memory is scanned at once.
async fn off_thread<T, F>(source: Source, scan: F) -> Result<T, Failed>
where
    T: Send + 'static,
    F: FnOnce(&Source) -> std::io::Result<T> + Send + 'static,
{
    if source.in_file == 0 {
        return Ok(scan(&source)?);
    }
    let path = source.path.clone();
    let done = tokio::task::spawn_blocking(move || scan(&source)).await?;
    done.map_err(|e| format!("{}: {e}", path.display()).into())
}

/// Which of `frames` are kept, and the totals after them; `None` for a gap.
fn plan(before: OutputTotals, frames: &[OutputFrame], keep: u64) -> Option<(Vec<&OutputFrame>, OutputTotals)> {
    let mut t = before;
    let mut kept = vec![];
    for frame in frames {
        if frame.seq <= t.durable_seq {
            continue;
        }
        if frame.seq != t.durable_seq + 1 {
            return None;
        }
        let size = frame.data.len() as u64;
        // The first frames are kept, whole; from the first that does not fit on, none is.
        t.truncated |= t.stdout_bytes + t.stderr_bytes + size > keep;
        t.durable_seq = frame.seq;
        match frame.stream {
            Stream::Stdout => t.stdout_bytes += size,
            Stream::Stderr => t.stderr_bytes += size,
        }
        if !t.truncated {
            t.kept_seq = frame.seq;
            kept.push(frame);
        }
    }
    Some((kept, t))
}

/// Sets the row of one attempt. False, and nothing is set, when more is to be kept of what was cut short or
/// erased meanwhile.
pub(crate) struct Raise {
    task: TaskId,
    no: AttemptNo,
    kept: Kept,
}

impl Bulk for Raise {
    type Outcome = bool;
    const OPERATION: &'static str = "output.append";

    fn write<'c>(conn: &'c mut Conn, jobs: &'c [&'c Self]) -> BoxFuture<'c, Result<Vec<bool>, Failed>> {
        Box::pin(async move {
            // In one order, so that two hubs do not wait for each other.
            let mut rows: Vec<&Self> = jobs.to_vec();
            rows.sort_unstable_by_key(|r| (r.task, r.no));
            let rows = Rows::of(rows.into_iter().map(|Raise { task, no, kept }| {
                values![
                    task.blob(),
                    no.0,
                    kept.totals.durable_seq,
                    kept.totals.kept_seq,
                    kept.in_file,
                    kept.totals.stdout_bytes,
                    kept.totals.stderr_bytes,
                    kept.totals.truncated,
                    &kept.held[..],
                ]
            }));
            let columns = "task, attempt, durable_seq, kept_seq, kept_len, stdout_bytes, stderr_bytes, truncated, held";
            let after = " ON CONFLICT (task, attempt) DO UPDATE SET durable_seq = excluded.durable_seq, kept_seq = excluded.kept_seq, \
                 kept_len = excluded.kept_len, stdout_bytes = excluded.stdout_bytes, stderr_bytes = excluded.stderr_bytes, \
                 truncated = excluded.truncated, held = excluded.held \
                 WHERE NOT outputs.truncated OR outputs.kept_seq = excluded.kept_seq";
            if conn.insert_counted("outputs", columns, &rows, after).await? == jobs.len() as u64 {
                return Ok(vec![true; jobs.len()]);
            }
            let mut set = vec![];
            for Raise { task, no, kept } in jobs {
                let q = sql("SELECT 1 FROM outputs WHERE task = $1 AND attempt = $2 AND kept_seq = $3 AND durable_seq = $4");
                let q = q.bind(task.blob()).bind(no.0).bind(kept.totals.kept_seq).bind(kept.totals.durable_seq);
                set.push(conn.row(&q, |_| Ok(())).await?.is_some());
            }
            Ok(set)
        })
    }
}

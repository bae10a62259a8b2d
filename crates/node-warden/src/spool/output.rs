//! The output of one attempt: a head, then frames over both streams with one rising number.
//!
//! ```text
//! head:  resume u64, seq u64, zeros to 32 bytes    where the first frame that is kept begins
//! frame: seq u64, t_ms u64, stream u8, len u32, bytes
//! ```
//! What the hub holds is freed by punching a hole between the head's page and `resume`. A reader
//! that finds itself in the hole, since no frame begins with zeros, looks at the head again.

use crate::Key;
use mesh_core::output::{Digests, Hashing};
use rustix::fs::FallocateFlags;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

/// Bytes of a frame before its content.
pub(crate) const FRAME_HEAD: usize = 21;
/// Content of one frame, at most.
pub(crate) const MAX_FRAME_BYTES: usize = 64 << 10;
/// Bytes of a file before its first frame.
pub(crate) const FILE_HEAD: u64 = 32;
const PAGE: u64 = 4096;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Stream {
    Stdout = 1,
    Stderr = 2,
}

/// What was read at once from one of a task's streams.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutputFrame {
    /// 1, 2, 3 … over both streams of an attempt.
    pub seq: u64,
    /// When it was read, by this machine's wall clock.
    pub t_ms: u64,
    pub stream: Stream,
    pub bytes: Vec<u8>,
    /// File offset behind this frame: what to say in `Acked`.
    pub end_offset: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Head {
    seq: u64,
    t_ms: u64,
    stream: Stream,
    len: usize,
}

impl Head {
    /// None for anything that no writer writes, a hole above all.
    fn parse(b: &[u8]) -> Option<Self> {
        let u64_at = |i: usize| u64::from_be_bytes(b[i..i + 8].try_into().expect("eight bytes"));
        let stream = match b[16] {
            1 => Stream::Stdout,
            2 => Stream::Stderr,
            _ => return None,
        };
        let len = u32::from_be_bytes(b[17..21].try_into().expect("four bytes")) as usize;
        let head = Self { seq: u64_at(0), t_ms: u64_at(8), stream, len };
        (head.seq > 0 && (1..=MAX_FRAME_BYTES).contains(&len)).then_some(head)
    }
}

/// Where the kept frames begin, and with which number.
fn resume(file: &File) -> io::Result<(u64, u64)> {
    let mut b = [0; 16];
    file.read_exact_at(&mut b, 0)?;
    let offset = u64::from_be_bytes(b[..8].try_into().expect("eight bytes"));
    let seq = u64::from_be_bytes(b[8..].try_into().expect("eight bytes"));
    // A power cut may leave a file whose head was never written: its frames begin at the beginning.
    Ok(if offset < FILE_HEAD { (FILE_HEAD, 1) } else { (offset, seq) })
}

fn set_resume(file: &File, offset: u64, seq: u64) -> io::Result<()> {
    let mut b = [0; FILE_HEAD as usize];
    b[..8].copy_from_slice(&offset.to_be_bytes());
    b[8..16].copy_from_slice(&seq.to_be_bytes());
    file.write_all_at(&b, 0)
}

/// The warden's end of an output file.
pub(crate) struct OutputWriter {
    file: File,
    end: u64,
    last_seq: u64,
    synced: u64,
    /// Everything before is a hole already.
    punched: u64,
    hashing: Hashing,
}

impl OutputWriter {
    pub fn create(path: &Path) -> io::Result<Self> {
        let file = File::options().read(true).write(true).create_new(true).mode(0o600).open(path)?;
        if let Err(e) = set_resume(&file, FILE_HEAD, 1) {
            let _ = std::fs::remove_file(path);
            return Err(e);
        }
        Ok(Self { file, end: FILE_HEAD, last_seq: 0, synced: 0, punched: PAGE, hashing: Hashing::default() })
    }

    /// Appends `frame`, whose first [`FRAME_HEAD`] bytes are room for the head. After an error the
    /// file is as before.
    pub fn append(&mut self, stream: Stream, frame: &mut [u8]) -> io::Result<()> {
        let t_ms = crate::clock::unix_ms().max(0) as u64;
        let len = (frame.len() - FRAME_HEAD) as u32;
        frame[..8].copy_from_slice(&(self.last_seq + 1).to_be_bytes());
        frame[8..16].copy_from_slice(&t_ms.to_be_bytes());
        frame[16] = stream as u8;
        frame[17..21].copy_from_slice(&len.to_be_bytes());
        if let Err(e) = self.file.write_all_at(frame, self.end) {
            let _ = self.file.set_len(self.end);
            return Err(e);
        }
        match stream {
            Stream::Stdout => self.hashing.stdout(&frame[FRAME_HEAD..]),
            Stream::Stderr => self.hashing.stderr(&frame[FRAME_HEAD..]),
        }
        self.end += frame.len() as u64;
        self.last_seq += 1;
        Ok(())
    }

    pub fn end(&self) -> u64 {
        self.end
    }
    pub fn last_seq(&self) -> u64 {
        self.last_seq
    }
    /// Of all that was appended.
    pub fn digests(&self) -> Digests {
        self.hashing.digests()
    }

    /// Starts writing to the disk what is not there yet, so that a group of files is synced at the
    /// price of one.
    pub fn push_out(&self) {
        #[allow(unsafe_code, reason = "not in rustix")]
        // SAFETY: a plain system call on a descriptor that is open.
        unsafe {
            use std::os::fd::AsRawFd;
            libc::sync_file_range(self.file.as_raw_fd(), self.synced as i64, 0, libc::SYNC_FILE_RANGE_WRITE);
        }
    }
    pub fn sync(&mut self) -> io::Result<()> {
        self.file.sync_data()?;
        self.synced = self.end;
        Ok(())
    }

    /// The number of the frame at `offset`, if a frame begins or the output ends there.
    pub fn frame_at(&self, offset: u64) -> Option<u64> {
        if offset == self.end {
            return Some(self.last_seq + 1);
        }
        let mut b = [0; FRAME_HEAD];
        self.file.read_exact_at(&mut b, offset).ok()?;
        let head = Head::parse(&b)?;
        (offset + (FRAME_HEAD + head.len) as u64 <= self.end && head.seq <= self.last_seq).then_some(head.seq)
    }

    /// Frees the space before `offset`, where frame `seq` begins. The journal must know it durably.
    pub fn free(&mut self, offset: u64, seq: u64) -> io::Result<()> {
        set_resume(&self.file, offset, seq)?;
        let to = offset / PAGE * PAGE;
        if to > self.punched {
            let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            rustix::fs::fallocate(&self.file, mode, self.punched, to - self.punched)?;
            self.punched = to;
        }
        Ok(())
    }
}

/// Finds the last whole frame of a file that a warden left behind, and cuts what follows. `acked` is
/// what the journal says to be free; `told` is the end that was told already, which stands. Gives the end, the number of the last frame, and where the kept
/// frames begin; none without a file.
pub(crate) fn recover(path: &Path, acked: Option<(u64, u64)>, told: Option<u64>) -> io::Result<Option<(u64, u64, u64)>> {
    let file = match File::options().read(true).write(true).open(path) {
        Ok(f) => f,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e),
    };
    let len = file.metadata()?.len();
    if len < FILE_HEAD {
        file.set_len(FILE_HEAD)?;
    }
    let (mut from, mut seq) = resume(&file)?;
    if let Some((offset, first)) = acked.filter(|(offset, _)| *offset > from && *offset <= len) {
        (from, seq) = (offset, first);
    }
    set_resume(&file, from, seq)?;
    if let Some(end) = told {
        return Ok(Some((end, 0, from)));
    }
    let mut reader = OutputReader { file, at: from, buffer: vec![], base: 0 };
    let (mut end, mut last) = (from, seq - 1);
    while let Some(head) = reader.head(len)? {
        let next = end + (FRAME_HEAD + head.len) as u64;
        if head.seq != last + 1 || next > len {
            break;
        }
        (end, last) = (next, head.seq);
        reader.at = next;
    }
    reader.file.set_len(end)?;
    reader.file.sync_all()?;
    Ok(Some((end, last, from)))
}

/// Reads the frames of one attempt, in any process of the same user, also while they are written.
pub struct OutputReader {
    file: File,
    at: u64,
    /// Bytes of the file from `base` on.
    buffer: Vec<u8>,
    base: u64,
}

impl OutputReader {
    /// Stands before the first frame that is kept. None while the attempt has no output.
    pub fn open(data_dir: &Path, task: mesh_core::TaskId, attempt: mesh_core::task::AttemptNo) -> io::Result<Option<Self>> {
        let key: Key = (task, attempt);
        let mut found = None;
        // Whichever warden has it: an attempt is one's alone.
        for seat in crate::launch::seats(data_dir) {
            match File::open(super::output_path(&seat, &key)) {
                Ok(f) => found = Some(f),
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                Err(e) => return Err(e),
            }
            break;
        }
        let Some(file) = found else { return Ok(None) };
        let (at, _) = resume(&file)?;
        Ok(Some(Self { file, at, buffer: vec![], base: 0 }))
    }

    /// The next frame that ends at or before `end`, an offset that the warden has told.
    pub fn next(&mut self, end: u64) -> io::Result<Option<OutputFrame>> {
        let Some(head) = self.whole_head(end)? else { return Ok(None) };
        let total = FRAME_HEAD + head.len;
        let bytes = self.peek(total, end)?[FRAME_HEAD..].to_vec();
        self.at += total as u64;
        Ok(Some(OutputFrame { seq: head.seq, t_ms: head.t_ms, stream: head.stream, bytes, end_offset: self.at }))
    }

    /// Moves behind every kept frame up to number `seq`, and gives the offset reached. Reads no
    /// further than `end`.
    pub fn seek_after(&mut self, seq: u64, end: u64) -> io::Result<u64> {
        while let Some(head) = self.whole_head(end)? {
            if head.seq > seq {
                break;
            }
            self.at += (FRAME_HEAD + head.len) as u64;
        }
        Ok(self.at)
    }

    /// File offset of the next frame.
    pub fn offset(&self) -> u64 {
        self.at
    }

    fn whole_head(&mut self, end: u64) -> io::Result<Option<Head>> {
        if self.at + FRAME_HEAD as u64 > end {
            return Ok(None);
        }
        let head = match self.head(end)? {
            Some(h) => h,
            None => {
                let (at, _) = resume(&self.file)?;
                self.buffer.clear();
                // Freed meanwhile: the kept frames begin further on.
                if at > self.at {
                    self.at = at;
                    return self.whole_head(end);
                }
                let (at, damage) = (self.at, io::ErrorKind::InvalidData);
                return Err(io::Error::new(damage, format!("no output frame begins at offset {at}")));
            }
        };
        Ok((self.at + (FRAME_HEAD + head.len) as u64 <= end).then_some(head))
    }

    fn head(&mut self, end: u64) -> io::Result<Option<Head>> {
        if self.at + FRAME_HEAD as u64 > end {
            return Ok(None);
        }
        Ok(Head::parse(self.peek(FRAME_HEAD, end)?))
    }

    /// The `n` bytes at the current offset, which must lie before `end`.
    fn peek(&mut self, n: usize, end: u64) -> io::Result<&[u8]> {
        let has = |r: &Self| r.at >= r.base && r.at + n as u64 <= r.base + r.buffer.len() as u64;
        if !has(self) {
            let want = (end - self.at).min(256 << 10) as usize;
            self.buffer.resize(want, 0);
            self.base = self.at;
            if let Err(e) = self.file.read_exact_at(&mut self.buffer, self.at) {
                self.buffer.clear();
                return Err(e);
            }
        }
        let from = (self.at - self.base) as usize;
        Ok(&self.buffer[from..from + n])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_core::TaskId;
    use mesh_core::task::AttemptNo;

    fn place(dir: &Path) -> (Key, std::path::PathBuf) {
        let key = (TaskId::from_bytes([1; 16]), AttemptNo(1));
        std::fs::create_dir_all(dir.join("spool/out")).unwrap();
        (key, super::super::output_path(dir, &key))
    }
    fn append(w: &mut OutputWriter, stream: Stream, bytes: &[u8]) {
        let mut frame = vec![0; FRAME_HEAD];
        frame.extend_from_slice(bytes);
        w.append(stream, &mut frame).unwrap();
    }
    fn all(dir: &Path, key: &Key, end: u64) -> Vec<OutputFrame> {
        let mut r = OutputReader::open(dir, key.0, key.1).unwrap().unwrap();
        std::iter::from_fn(|| r.next(end).unwrap()).collect()
    }

    #[test]
    fn frames_come_back() {
        let dir = tempfile::tempdir().unwrap();
        let (key, path) = place(dir.path());
        assert!(OutputReader::open(dir.path(), key.0, key.1).unwrap().is_none());
        let mut w = OutputWriter::create(&path).unwrap();
        append(&mut w, Stream::Stdout, b"a\0\xff");
        append(&mut w, Stream::Stderr, b"b");
        let got = all(dir.path(), &key, w.end());
        let view: Vec<_> = got.iter().map(|f| (f.seq, f.stream, &f.bytes[..])).collect();
        assert_eq!(view, [(1, Stream::Stdout, &b"a\0\xff"[..]), (2, Stream::Stderr, b"b")]);
        assert_eq!(got[1].end_offset, w.end());
        assert_eq!(all(dir.path(), &key, got[0].end_offset).len(), 1, "never beyond what was told");
        let mut r = OutputReader::open(dir.path(), key.0, key.1).unwrap().unwrap();
        assert_eq!(r.seek_after(1, w.end()).unwrap(), got[0].end_offset);
        assert_eq!(r.next(w.end()).unwrap().unwrap().seq, 2);
    }

    #[test]
    fn freed_space_is_skipped_also_by_a_reader_inside_it() {
        let dir = tempfile::tempdir().unwrap();
        let (key, path) = place(dir.path());
        let mut w = OutputWriter::create(&path).unwrap();
        let mut ends = vec![];
        for n in 0..20u8 {
            append(&mut w, Stream::Stdout, &[n; 3000]);
            ends.push(w.end());
        }
        let mut old = OutputReader::open(dir.path(), key.0, key.1).unwrap().unwrap();
        let first = all(dir.path(), &key, w.end()).len();
        assert_eq!(w.frame_at(ends[14]), Some(16));
        assert_eq!(w.frame_at(ends[14] + 1), None);
        w.free(ends[14], 16).unwrap();
        assert_eq!((first, all(dir.path(), &key, w.end())[0].seq), (20, 16));
        // The head's page is kept, so the first frame may still be whole; what follows is a hole.
        let mut seqs = vec![];
        while let Some(f) = old.next(w.end()).unwrap() {
            seqs.push(f.seq);
        }
        assert_eq!(seqs.last(), Some(&20));
        assert!(seqs.windows(2).all(|p| p[0] < p[1]));
        assert!(seqs.contains(&16));
        let mut r = OutputReader::open(dir.path(), key.0, key.1).unwrap().unwrap();
        assert_eq!(r.seek_after(17, w.end()).unwrap(), ends[16]);
        assert_eq!(recover(&path, Some((ends[14], 16)), None).unwrap(), Some((w.end(), 20, ends[14])));
    }

    #[test]
    fn a_torn_tail_is_cut() {
        let dir = tempfile::tempdir().unwrap();
        let (key, path) = place(dir.path());
        let mut w = OutputWriter::create(&path).unwrap();
        append(&mut w, Stream::Stdout, b"whole");
        let end = w.end();
        append(&mut w, Stream::Stdout, b"torn");
        w.file.set_len(w.end() - 2).unwrap();
        assert_eq!(recover(&path, None, None).unwrap(), Some((end, 1, FILE_HEAD)));
        assert_eq!(all(dir.path(), &key, end).len(), 1);
        std::fs::write(&path, b"").unwrap();
        assert_eq!(recover(&path, None, None).unwrap(), Some((FILE_HEAD, 0, FILE_HEAD)));
    }
}

//! An append-only file of checksummed records, synced in groups.
//!
//! `u32 length, 8 bytes of SHA-256, body`. The file is extended by whole chunks of written zeros, so
//! that a sync writes data and no metadata; the first record that does not check ends the scan. Each
//! opening rewrites what still counts into a new file: nothing stale can lie behind the end.

use crate::Key;
use crate::codec::{PutWords, TakeWords};
use mesh_core::canon::Malformed;
use mesh_core::canon::{Reader, Writer};
use mesh_core::output::Digests;
use mesh_core::task::Outcome;
use mesh_core::{Digest, UnixMs, sha256};
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

const CHUNK: usize = 1 << 20;
const HEAD: usize = 12;
/// A record larger than this is damage.
const MAX_RECORD: usize = 64 << 10;
/// Below this size a rewrite is not worth its syncs.
const COMPACT_FROM: u64 = 16 << 20;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Record {
    /// From here on the attempt may have run.
    Starting {
        key: Key,
        spec: Digest,
        at: UnixMs,
        ephemeral: Option<String>,
    },
    Exit {
        key: Key,
        outcome: Outcome,
        output_end: u64,
        last_seq: u64,
        at: UnixMs,
        started_at: UnixMs,
        /// Of its whole output; none for what did not run to its end, and in what a version before wrote.
        digests: Option<Digests>,
    },
    /// It was never started and never will be. Without a digest any start gets this answer.
    Refused {
        key: Key,
        spec: Option<Digest>,
        outcome: Outcome,
        at: UnixMs,
    },
    /// Output before `offset` is durable elsewhere and may be freed; the frame there has number `seq`.
    Acked {
        key: Key,
        offset: u64,
        seq: u64,
    },
    Forgotten {
        key: Key,
    },
}

impl Record {
    pub fn key(&self) -> Key {
        match self {
            Self::Starting { key, .. }
            | Self::Exit { key, .. }
            | Self::Refused { key, .. }
            | Self::Acked { key, .. }
            | Self::Forgotten { key } => *key,
        }
    }

    fn encode(&self) -> Vec<u8> {
        let mut p = Writer::plain(&[]);
        match self {
            Self::Starting { key, spec, at, ephemeral } => {
                p.u8(1).key(key).raw(spec).i64(*at);
                match ephemeral {
                    None => p.u8(0),
                    Some(path) => p.u8(1).bytes(path.as_bytes()),
                };
            }
            Self::Exit { key, outcome, output_end, last_seq, at, started_at, digests } => {
                // Without digests in the words that a version before reads too.
                p.u8(if digests.is_some() { 6 } else { 2 });
                p.key(key).outcome(outcome).u64(*output_end).u64(*last_seq).i64(*at).i64(*started_at);
                if digests.is_some() {
                    p.digests(digests.as_ref());
                }
            }
            Self::Refused { key, spec, outcome, at } => {
                p.u8(3).key(key);
                match spec {
                    None => p.u8(0),
                    Some(d) => p.u8(1).raw(d),
                };
                p.outcome(outcome).i64(*at);
            }
            Self::Acked { key, offset, seq } => {
                p.u8(4).key(key).u64(*offset).u64(*seq);
            }
            Self::Forgotten { key } => {
                p.u8(5).key(key);
            }
        }
        p.finish()
    }

    fn decode(body: &[u8]) -> Result<Self, Malformed> {
        let mut t = Reader::plain(body);
        let flag = |t: &mut Reader<'_>| match t.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            v => Err(Malformed::Unknown { what: "flag", value: v.into() }),
        };
        let record = match t.u8()? {
            1 => {
                let (key, spec, at) = (t.key()?, t.digest()?, t.i64()?);
                let ephemeral = if flag(&mut t)? { Some(t.str()?.to_owned()) } else { None };
                Self::Starting { key, spec, at, ephemeral }
            }
            kind @ (2 | 6) => Self::Exit {
                key: t.key()?,
                outcome: t.outcome()?,
                output_end: t.u64()?,
                last_seq: t.u64()?,
                at: t.i64()?,
                started_at: t.i64()?,
                digests: if kind == 6 { t.digests()? } else { None },
            },
            3 => {
                let key = t.key()?;
                let spec = if flag(&mut t)? { Some(t.digest()?) } else { None };
                Self::Refused { key, spec, outcome: t.outcome()?, at: t.i64()? }
            }
            4 => Self::Acked { key: t.key()?, offset: t.u64()?, seq: t.u64()? },
            5 => Self::Forgotten { key: t.key()? },
            v => return Err(Malformed::Unknown { what: "record", value: v.into() }),
        };
        t.end()?;
        Ok(record)
    }
}

fn put(buffer: &mut Vec<u8>, record: &Record) {
    let body = record.encode();
    buffer.extend_from_slice(&(body.len() as u32).to_be_bytes());
    buffer.extend_from_slice(&sha256(&body)[..8]);
    buffer.extend_from_slice(&body);
}

fn scan(mut bytes: &[u8]) -> Vec<Record> {
    let mut records = vec![];
    while bytes.len() >= HEAD {
        let n = u32::from_be_bytes(bytes[..4].try_into().expect("four bytes")) as usize;
        if n == 0 || n > MAX_RECORD || bytes.len() < HEAD + n {
            break;
        }
        let body = &bytes[HEAD..HEAD + n];
        if sha256(body)[..8] != bytes[4..HEAD] {
            break;
        }
        // A record that checks but cannot be read is of a version to come: stopping here would lose
        // what follows.
        match Record::decode(body) {
            Ok(r) => records.push(r),
            Err(e) => say!("warden: a journal record is skipped: {e}"),
        }
        bytes = &bytes[HEAD + n..];
    }
    records
}

/// Drops what a later record has made void; keeps the order of first mention.
fn live(records: Vec<Record>) -> Vec<Record> {
    #[derive(Default)]
    struct Of {
        start: Option<Record>,
        acked: Option<Record>,
        end: Option<Record>,
    }
    let mut place: HashMap<Key, usize> = HashMap::new();
    let mut all: BTreeMap<usize, Of> = BTreeMap::new();
    for (i, r) in records.into_iter().enumerate() {
        let at = *place.entry(r.key()).or_insert(i);
        let of = all.entry(at).or_default();
        match r {
            Record::Starting { .. } => of.start = Some(r),
            Record::Acked { .. } => of.acked = Some(r),
            Record::Exit { .. } | Record::Refused { .. } => of.end = Some(r),
            Record::Forgotten { key } => {
                all.remove(&at);
                place.remove(&key);
            }
        }
    }
    all.into_values().flat_map(|of| [of.start, of.acked, of.end]).flatten().collect()
}

/// Does the journal of a spool hold anything that counts? One that cannot be read may.
pub(crate) fn remembers(dir: &Path) -> bool {
    match std::fs::read(dir.join("journal")) {
        Ok(bytes) => !live(scan(&bytes)).is_empty(),
        Err(e) => e.kind() != io::ErrorKind::NotFound,
    }
}

pub(crate) struct Journal {
    dir: PathBuf,
    file: File,
    /// End of what is synced.
    at: u64,
    allocated: u64,
    /// Size right after the last rewrite.
    base: u64,
    buffer: Vec<u8>,
    dirty: bool,
    failed: bool,
}

impl Journal {
    pub fn open(dir: &Path) -> io::Result<(Self, Vec<Record>)> {
        let records = match std::fs::read(dir.join("journal")) {
            Ok(bytes) => live(scan(&bytes)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => vec![],
            Err(e) => return Err(e),
        };
        let (file, at, allocated) = write_new(dir, &records)?;
        Ok((Self { dir: dir.to_owned(), file, at, allocated, base: at, buffer: vec![], dirty: false, failed: false }, records))
    }

    pub fn append(&mut self, record: &Record) {
        put(&mut self.buffer, record);
        self.dirty = true;
    }

    /// Appends what may be lost without harm: it goes with the next sync that is needed anyway.
    pub fn append_idle(&mut self, record: &Record) {
        put(&mut self.buffer, record);
        self.dirty |= self.buffer.len() > MAX_RECORD;
    }

    pub fn is_dirty(&self) -> bool {
        self.dirty
    }
    /// Whether the last commit went wrong.
    pub fn has_failed(&self) -> bool {
        self.failed
    }

    /// Makes everything appended durable by one sync. After an error nothing counts as written and
    /// the same bytes are written again by the next call.
    pub fn commit(&mut self) -> io::Result<()> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        self.failed = true;
        let end = self.at + self.buffer.len() as u64;
        while end + HEAD as u64 > self.allocated {
            self.file.write_all_at(&vec![0; CHUNK], self.allocated)?;
            self.allocated += CHUNK as u64;
        }
        self.file.write_all_at(&self.buffer, self.at)?;
        self.file.sync_data()?;
        self.at = end;
        self.buffer.clear();
        (self.dirty, self.failed) = (false, false);
        if self.at > COMPACT_FROM.max(self.base * 4) {
            // A failed rewrite leaves the old file in use.
            if let Err(e) = self.compact() {
                say!("warden: the journal cannot be rewritten: {e}");
                self.base = self.at;
            }
        }
        Ok(())
    }

    fn compact(&mut self) -> io::Result<()> {
        let mut bytes = vec![0; self.at as usize];
        self.file.read_exact_at(&mut bytes, 0)?;
        let (file, at, allocated) = write_new(&self.dir, &live(scan(&bytes)))?;
        (self.file, self.at, self.allocated, self.base) = (file, at, allocated, at);
        Ok(())
    }
}

fn write_new(dir: &Path, records: &[Record]) -> io::Result<(File, u64, u64)> {
    let mut bytes = vec![];
    for r in records {
        put(&mut bytes, r);
    }
    let at = bytes.len();
    bytes.resize((at + HEAD).next_multiple_of(CHUNK), 0);
    let fresh = dir.join("journal.new");
    let file = File::options().read(true).write(true).create(true).truncate(true).open(&fresh)?;
    file.write_all_at(&bytes, 0)?;
    file.sync_all()?;
    std::fs::rename(&fresh, dir.join("journal"))?;
    super::sync_dir(dir)?;
    Ok((file, at as u64, bytes.len() as u64))
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_core::TaskId;
    use mesh_core::task::{AttemptNo, NeverStarted};

    fn key(n: u8) -> Key {
        (TaskId::from_bytes([n; 16]), AttemptNo(1))
    }
    fn starting(n: u8) -> Record {
        Record::Starting { key: key(n), spec: [n; 32], at: 5, ephemeral: (n == 2).then(|| "/w".into()) }
    }
    fn exit(n: u8) -> Record {
        let outcome = Outcome::Exited(n.into());
        let digests = match n {
            1 => Some(Digests { stdout: [1; 32], stderr: [2; 32] }),
            2 => Some(Digests::of_nothing()),
            _ => None,
        };
        Record::Exit { key: key(n), outcome, output_end: 1, last_seq: 2, at: 3, started_at: 4, digests }
    }
    fn fill(dir: &Path, records: &[Record]) {
        let (mut j, _) = Journal::open(dir).unwrap();
        for r in records {
            j.append(r);
        }
        j.commit().unwrap();
    }
    fn read(dir: &Path) -> Vec<Record> {
        Journal::open(dir).unwrap().1
    }

    #[test]
    fn records_survive_and_the_forgotten_go() {
        let dir = tempfile::tempdir().unwrap();
        let cancelled = Outcome::NeverStarted(NeverStarted::Cancelled);
        let refused = Record::Refused { key: key(4), spec: None, outcome: cancelled, at: 1 };
        let acked = Record::Acked { key: key(1), offset: 77, seq: 3 };
        let gone = Record::Forgotten { key: key(3) };
        fill(dir.path(), &[starting(1), starting(2), starting(3), acked.clone(), exit(1), exit(3), gone, refused.clone()]);
        let expect = [starting(1), acked, exit(1), starting(2), refused];
        assert_eq!(read(dir.path()), expect);
        assert_eq!(read(dir.path()), expect, "the rewrite changes nothing");
    }

    #[test]
    fn an_end_without_digests_is_read_as_a_version_before_wrote_it() {
        let mut body = vec![2];
        body.extend_from_slice(&[3; 16]);
        body.extend_from_slice(&1u64.to_be_bytes());
        body.extend_from_slice(&[0, 0, 0, 0, 3]);
        for n in [1u64, 2, 3, 4] {
            body.extend_from_slice(&n.to_be_bytes());
        }
        assert_eq!(Record::decode(&body), Ok(exit(3)));
        assert_eq!(exit(3).encode(), body);
    }

    #[test]
    fn a_torn_tail_ends_the_scan_and_never_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        fill(dir.path(), &[starting(1), starting(2), exit(2)]);
        let path = dir.path().join("journal");
        let mut bytes = std::fs::read(&path).unwrap();
        let mut first = vec![];
        put(&mut first, &starting(1));
        // One bit inside the second record: the third still checks by itself, yet must not count.
        bytes[first.len() + HEAD + 3] ^= 1;
        std::fs::write(&path, &bytes).unwrap();
        assert_eq!(read(dir.path()), [starting(1)]);
        fill(dir.path(), &[starting(2)]);
        assert_eq!(read(dir.path()), [starting(1), starting(2)]);
    }

    #[test]
    fn any_cut_is_a_prefix() {
        let all = [starting(1), starting(2), exit(1), exit(2)];
        let mut bytes = vec![];
        for r in &all {
            put(&mut bytes, r);
        }
        for n in 0..=bytes.len() {
            let got = scan(&bytes[..n]);
            assert_eq!(got[..], all[..got.len()]);
        }
        assert_eq!(scan(&bytes).len(), 4);
    }

    #[test]
    fn it_grows_by_chunks_and_shrinks_by_rewriting() {
        let dir = tempfile::tempdir().unwrap();
        let (mut j, _) = Journal::open(dir.path()).unwrap();
        let mut n = 0u64;
        while j.at + 4096 < COMPACT_FROM {
            for _ in 0..2000 {
                n += 1;
                let key = (TaskId::from_bytes([1; 16]), AttemptNo(n));
                j.append(&Record::Starting { key, spec: [0; 32], at: 0, ephemeral: None });
                j.append(&Record::Forgotten { key });
            }
            j.commit().unwrap();
            if j.at < 4096 {
                break;
            }
        }
        j.append(&starting(1));
        j.commit().unwrap();
        assert_eq!(std::fs::metadata(dir.path().join("journal")).unwrap().len() % CHUNK as u64, 0);
        assert!(j.at < COMPACT_FROM + (1 << 20));
        drop(j);
        assert_eq!(read(dir.path()), [starting(1)]);
    }
}

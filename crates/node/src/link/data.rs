//! The second stream: output up, payloads down.
//!
//! [`Outflow`] knows for each attempt how far its output is written, sent and durable, and says what
//! to send next: one frame an attempt, in turn, so that a noisy one cannot starve the others. What is
//! sent and not yet durable is bounded over the whole link. [`Pulls`] fetches one payload at a time.

use super::orders::{Checked, Key, Payload};
use mesh_core::Digest;
use mesh_wire::node::{OutputFrame, PayloadChunk};
use node_warden::spool::OutputReader;
use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// Output that is sent and not yet durable at the hub.
pub const IN_FLIGHT_BYTES: usize = 4 << 20;
/// A pull that brings nothing for longer means that something is wrong with the link.
pub const PULL_TIMEOUT: Duration = Duration::from_secs(60);

struct Flight {
    seq: u64,
    /// File offset behind the frame.
    end: u64,
    bytes: usize,
}

#[derive(Default)]
struct Tail {
    /// Offset that the warden has told.
    end: u64,
    last_seq: u64,
    sent: u64,
    durable: u64,
    reader: Option<OutputReader>,
    flying: VecDeque<Flight>,
    queued: bool,
}

pub enum Next {
    Frame(Box<OutputFrame>),
    /// Nothing to send of this one, since all of it is durable already.
    Settled(Key),
    Nothing,
}

/// All output on its way up.
pub struct Outflow {
    data_dir: PathBuf,
    tails: BTreeMap<Key, Tail>,
    ready: VecDeque<Key>,
    in_flight: usize,
    /// Offsets that became durable: to be told to the warden.
    freed: Vec<(Key, u64)>,
}

impl Outflow {
    pub fn new(data_dir: impl Into<PathBuf>) -> Self {
        Self { data_dir: data_dir.into(), tails: BTreeMap::new(), ready: VecDeque::new(), in_flight: 0, freed: vec![] }
    }

    fn enqueue(ready: &mut VecDeque<Key>, key: Key, tail: &mut Tail) {
        if !tail.queued && tail.sent < tail.last_seq {
            tail.queued = true;
            ready.push_back(key);
        }
    }

    /// The warden told of output.
    pub fn grown(&mut self, key: Key, end: u64, last_seq: u64) {
        let tail = self.tails.entry(key).or_default();
        tail.end = tail.end.max(end);
        tail.last_seq = tail.last_seq.max(last_seq);
        Self::enqueue(&mut self.ready, key, tail);
    }

    /// A new link: everything behind the hub's mark is sent again.
    pub fn relink(&mut self, marks: &BTreeMap<Key, u64>) {
        self.ready.clear();
        self.in_flight = 0;
        for (key, tail) in &mut self.tails {
            let mark = marks.get(key).copied().unwrap_or(0).min(tail.last_seq);
            tail.durable = tail.durable.max(mark);
            tail.sent = tail.durable;
            tail.reader = None;
            tail.flying.clear();
            tail.queued = false;
            Self::enqueue(&mut self.ready, *key, tail);
        }
    }

    pub fn wants(&self) -> bool {
        !self.ready.is_empty() && self.in_flight < IN_FLIGHT_BYTES
    }

    /// Whether all output up to `last_seq` is durable at the hub.
    pub fn is_durable(&self, key: &Key, last_seq: u64) -> bool {
        last_seq == 0 || self.tails.get(key).is_some_and(|t| t.durable >= last_seq)
    }

    pub fn forget(&mut self, key: &Key) {
        if let Some(t) = self.tails.remove(key) {
            self.in_flight -= t.flying.iter().map(|f| f.bytes).sum::<usize>();
        }
        self.ready.retain(|k| k != key);
    }

    pub fn take_freed(&mut self) -> Vec<(Key, u64)> {
        std::mem::take(&mut self.freed)
    }

    /// Reads the next frame to send. An error concerns one attempt, which is then left alone until the
    /// next link.
    pub fn next_frame(&mut self) -> Result<Next, (Key, io::Error)> {
        let Some(key) = self.ready.pop_front() else { return Ok(Next::Nothing) };
        let Some(tail) = self.tails.get_mut(&key) else { return Ok(Next::Nothing) };
        tail.queued = false;
        let next = Self::read(&self.data_dir, key, tail, &mut self.freed).map_err(|e| (key, e))?;
        if let Next::Frame(f) = &next {
            self.in_flight += f.data.len();
            Self::enqueue(&mut self.ready, key, tail);
        }
        Ok(next)
    }

    fn read(data_dir: &std::path::Path, key: Key, tail: &mut Tail, freed: &mut Vec<(Key, u64)>) -> io::Result<Next> {
        let reader = match &mut tail.reader {
            Some(r) => r,
            None => {
                let Some(mut r) = OutputReader::open(data_dir, key.task, key.attempt)? else {
                    return Err(io::Error::new(io::ErrorKind::NotFound, "the spool holds no output of this attempt"));
                };
                let first = r.offset();
                let at = r.seek_after(tail.durable, tail.end)?;
                if at > first {
                    freed.push((key, at));
                }
                tail.reader.insert(r)
            }
        };
        let Some(frame) = reader.next(tail.end)? else {
            if reader.offset() >= tail.end {
                // Everything that was there has been freed, which only the hub's word can have done.
                tail.sent = tail.last_seq;
                if tail.flying.is_empty() {
                    tail.durable = tail.last_seq;
                    return Ok(Next::Settled(key));
                }
            }
            return Ok(Next::Nothing);
        };
        if tail.flying.is_empty() && frame.seq > tail.durable + 1 {
            tail.durable = frame.seq - 1;
        }
        tail.sent = frame.seq;
        tail.flying.push_back(Flight { seq: frame.seq, end: frame.end_offset, bytes: frame.bytes.len() });
        Ok(Next::Frame(Box::new(OutputFrame {
            task_id: key.task.to_string(),
            attempt: key.attempt.0,
            seq: frame.seq,
            t_ms: frame.t_ms as i64,
            stream: frame.stream as u32,
            data: frame.bytes.into(),
        })))
    }

    /// The rest of this output cannot be read any more. Gives the last number that was sent.
    pub fn cut(&mut self, key: &Key) -> u64 {
        let Some(tail) = self.tails.get_mut(key) else { return 0 };
        tail.last_seq = tail.flying.back().map_or(tail.durable, |f| f.seq);
        tail.sent = tail.last_seq;
        tail.last_seq
    }

    /// The hub holds everything up to `seq` durably.
    pub fn acked(&mut self, key: Key, seq: u64) {
        let Some(tail) = self.tails.get_mut(&key) else { return };
        let mut freed = None;
        while tail.flying.front().is_some_and(|f| f.seq <= seq) {
            if let Some(f) = tail.flying.pop_front() {
                self.in_flight -= f.bytes;
                freed = Some(f.end);
                tail.durable = tail.durable.max(f.seq);
            }
        }
        self.freed.extend(freed.map(|end| (key, end)));
    }
}

/// A payload that is being fetched.
struct Active {
    order: Checked,
    expected: u64,
    bytes: Vec<u8>,
    since: Duration,
}

/// Payloads to be fetched: one at a time, so that memory is bounded by one spec.
#[derive(Default)]
pub struct Pulls {
    active: Option<Active>,
    waiting: VecDeque<Checked>,
}

#[derive(Debug, PartialEq, Eq)]
pub enum Pulled {
    More,
    /// Not asked for: an answer to a cancelled pull.
    Stray,
    Done(Box<Checked>, Vec<u8>),
    /// The hub's refusal, or an answer that cannot be right.
    Failed(Box<Checked>, String),
}

impl Pulls {
    pub fn holds(&self, key: &Key) -> bool {
        self.active.as_ref().is_some_and(|a| a.order.key == *key) || self.waiting.iter().any(|o| o.key == *key)
    }
    pub fn count(&self) -> usize {
        self.waiting.len() + usize::from(self.active.is_some())
    }
    pub fn push(&mut self, order: Checked) {
        self.waiting.push_back(order);
    }
    pub fn cancel(&mut self, key: &Key) {
        self.waiting.retain(|o| o.key != *key);
        self.active.take_if(|a| a.order.key == *key);
    }
    pub fn clear(&mut self) {
        *self = Self::default();
    }
    /// The next order whose payload is to be asked for, when none is on its way.
    pub fn start(&mut self, now: Duration) -> Option<&Checked> {
        if self.active.is_some() {
            return None;
        }
        let order = self.waiting.pop_front()?;
        let expected = match &order.payload {
            Payload::Pull(n) => *n,
            Payload::Inline(b) => b.len() as u64,
        };
        Some(&self.active.insert(Active { order, expected, bytes: vec![], since: now }).order)
    }
    pub fn timed_out(&self, now: Duration) -> bool {
        self.active.as_ref().is_some_and(|a| now.saturating_sub(a.since) > PULL_TIMEOUT)
    }

    /// A piece arrived. Size and hash are checked before anybody may use the payload.
    pub fn chunk(&mut self, c: PayloadChunk, now: Duration) -> Pulled {
        // What is left of a cancelled pull may be of the same payload: the attempt tells them apart.
        let asked = |a: &mut Active| {
            let key = a.order.key;
            c.sha256 == a.order.digest && c.task_id == key.task.to_string() && c.attempt == key.attempt.0
        };
        let Some(mut a) = self.active.take_if(asked) else { return Pulled::Stray };
        a.since = now;
        if !c.refused.is_empty() {
            return Pulled::Failed(Box::new(a.order), c.refused);
        }
        if a.bytes.len() as u64 + c.data.len() as u64 > a.expected {
            return Pulled::Failed(Box::new(a.order), format!("the payload is longer than the {} bytes that were signed", a.expected));
        }
        a.bytes.extend_from_slice(&c.data);
        if !c.last {
            self.active = Some(a);
            return Pulled::More;
        }
        let digest: Digest = mesh_core::sha256(&a.bytes);
        if a.bytes.len() as u64 != a.expected || digest != a.order.digest {
            return Pulled::Failed(Box::new(a.order), "the payload is not the one that was signed".into());
        }
        Pulled::Done(Box::new(a.order), a.bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_core::task::AttemptNo;
    use mesh_core::{TaskId, UserId};

    const NOW: Duration = Duration::ZERO;

    fn key(n: u8) -> Key {
        Key { task: TaskId::from_bytes([n; 16]), attempt: AttemptNo(1) }
    }
    fn order(n: u8, payload: &[u8]) -> Checked {
        Checked {
            key: key(n),
            skill: "shell".into(),
            digest: mesh_core::sha256(payload),
            payload: Payload::Pull(payload.len() as u64),
            user: UserId::from_bytes([1; 16]),
            session: None,
            timeout_secs: 0,
            start_before_ms: 1,
            granted: true,
            request_id: String::new(),
        }
    }
    fn piece(n: u8, of: &[u8], data: &[u8], last: bool) -> PayloadChunk {
        let key = key(n);
        PayloadChunk {
            sha256: mesh_core::sha256(of).to_vec(),
            data: data.to_vec().into(),
            last,
            refused: String::new(),
            task_id: key.task.to_string(),
            attempt: key.attempt.0,
        }
    }

    #[test]
    fn one_pull_at_a_time() {
        let mut p = Pulls::default();
        p.push(order(1, b"abc"));
        p.push(order(2, b"xyz"));
        assert_eq!(p.start(NOW).map(|o| o.key), Some(key(1)));
        assert!(p.start(NOW).is_none());
        assert!(p.holds(&key(1)) && p.holds(&key(2)) && !p.holds(&key(3)));
        assert_eq!(p.chunk(piece(1, b"abc", b"ab", false), NOW), Pulled::More);
        assert_eq!(p.chunk(piece(2, b"xyz", b"xyz", true), NOW), Pulled::Stray);
        assert_eq!(p.chunk(piece(1, b"abc", b"c", true), NOW), Pulled::Done(Box::new(order(1, b"abc")), b"abc".to_vec()));
        assert_eq!(p.start(NOW).map(|o| o.key), Some(key(2)));
        assert!(!p.timed_out(PULL_TIMEOUT) && p.timed_out(PULL_TIMEOUT + Duration::from_millis(1)));
        p.cancel(&key(2));
        assert_eq!(p.chunk(piece(2, b"xyz", b"xyz", true), NOW), Pulled::Stray);
    }

    #[test]
    fn a_wrong_payload_is_never_given_out() {
        for (data, last) in [(&b"abcd"[..], false), (b"abd", true), (b"ab", true)] {
            let mut p = Pulls::default();
            p.push(order(1, b"abc"));
            p.start(NOW);
            assert!(matches!(p.chunk(piece(1, b"abc", data, last), NOW), Pulled::Failed(..)), "{data:?}");
        }
        let mut p = Pulls::default();
        p.push(order(1, b"abc"));
        p.start(NOW);
        let no = PayloadChunk { refused: "gone".into(), ..piece(1, b"abc", b"", false) };
        assert!(matches!(p.chunk(no, NOW), Pulled::Failed(_, why) if why == "gone"));
    }

    #[test]
    fn what_is_left_of_a_cancelled_pull_spoils_no_other() {
        let mut p = Pulls::default();
        p.push(order(1, b"abc"));
        p.push(order(2, b"abc"));
        p.start(NOW);
        assert_eq!(p.chunk(piece(1, b"abc", b"a", false), NOW), Pulled::More);
        p.cancel(&key(1));
        p.start(NOW);
        assert_eq!(p.chunk(piece(1, b"abc", b"bc", true), NOW), Pulled::Stray);
        // Slow is not silent: the patience begins anew with each piece.
        assert_eq!(p.chunk(piece(2, b"abc", b"ab", false), PULL_TIMEOUT), Pulled::More);
        assert!(!p.timed_out(PULL_TIMEOUT * 2));
        assert_eq!(p.chunk(piece(2, b"abc", b"c", true), PULL_TIMEOUT), Pulled::Done(Box::new(order(2, b"abc")), b"abc".to_vec()));
    }

    /// Writes a spool file as the warden lays it out.
    fn spool(dir: &std::path::Path, key: Key, frames: &[&[u8]]) -> u64 {
        let path = dir.join("spool/out");
        std::fs::create_dir_all(&path).unwrap();
        let mut file = vec![0u8; 32];
        file[..8].copy_from_slice(&32u64.to_be_bytes());
        file[8..16].copy_from_slice(&1u64.to_be_bytes());
        for (i, data) in frames.iter().enumerate() {
            file.extend_from_slice(&(i as u64 + 1).to_be_bytes());
            file.extend_from_slice(&7u64.to_be_bytes());
            file.push(1);
            file.extend_from_slice(&(data.len() as u32).to_be_bytes());
            file.extend_from_slice(data);
        }
        std::fs::write(path.join(format!("{}-{}", key.task, key.attempt.0)), &file).unwrap();
        file.len() as u64
    }
    fn sent(o: &mut Outflow) -> Vec<(String, u64)> {
        let mut all = vec![];
        while o.wants() {
            match o.next_frame().map_err(|e| e.1).unwrap() {
                Next::Frame(f) => all.push((f.task_id, f.seq)),
                Next::Settled(_) | Next::Nothing => {}
            }
        }
        all
    }

    #[test]
    fn attempts_take_turns_and_marks_are_kept() {
        let tmp = tempfile::tempdir().unwrap();
        let (a, b) = (key(1), key(2));
        let (end_a, end_b) = (spool(tmp.path(), a, &[b"1", b"2", b"3"]), spool(tmp.path(), b, &[b"x"]));
        let mut o = Outflow::new(tmp.path());
        o.grown(a, end_a, 3);
        o.grown(b, end_b, 1);
        o.relink(&BTreeMap::new());
        let (ta, tb) = (a.task.to_string(), b.task.to_string());
        assert_eq!(sent(&mut o), [(ta.clone(), 1), (tb, 1), (ta.clone(), 2), (ta.clone(), 3)]);
        assert!(!o.is_durable(&a, 3) && !o.is_durable(&b, 1));
        o.acked(a, 2);
        o.acked(b, 9);
        assert!(o.is_durable(&b, 1) && !o.is_durable(&a, 3));
        assert_eq!(o.take_freed().len(), 2);
        // a new link goes on behind what is durable
        o.relink(&BTreeMap::from([(a, 1)]));
        assert_eq!(sent(&mut o), [(ta.clone(), 3)]);
        // a daemon that starts anew learns it from the hub's mark
        let mut o = Outflow::new(tmp.path());
        o.grown(a, end_a, 3);
        o.relink(&BTreeMap::from([(a, 2)]));
        assert_eq!(sent(&mut o), [(ta, 3)]);
        assert_eq!(o.take_freed().len(), 1, "what the mark covers is freed");
        o.acked(a, 3);
        assert!(o.is_durable(&a, 3));
        assert_eq!(o.in_flight, 0);
        // all durable by the mark alone
        let mut o = Outflow::new(tmp.path());
        o.grown(a, end_a, 3);
        o.relink(&BTreeMap::from([(a, 3)]));
        assert!(o.is_durable(&a, 3) && !o.wants());
    }

    #[test]
    fn what_was_freed_before_needs_no_mark() {
        let tmp = tempfile::tempdir().unwrap();
        let a = key(1);
        let end = spool(tmp.path(), a, &[b"1", b"2"]);
        let path = tmp.path().join("spool/out").join(format!("{}-1", a.task));
        let mut file = std::fs::read(&path).unwrap();
        file[..8].copy_from_slice(&end.to_be_bytes());
        file[8..16].copy_from_slice(&3u64.to_be_bytes());
        std::fs::write(&path, file).unwrap();
        let mut o = Outflow::new(tmp.path());
        o.grown(a, end, 2);
        o.relink(&BTreeMap::new());
        assert!(matches!(o.next_frame(), Ok(Next::Settled(k)) if k == a));
        assert!(o.is_durable(&a, 2));
    }

    #[test]
    fn in_flight_is_bounded() {
        let tmp = tempfile::tempdir().unwrap();
        let a = key(1);
        let block = vec![0u8; 64 << 10];
        let frames = vec![block.as_slice(); 80];
        let end = spool(tmp.path(), a, &frames);
        let mut o = Outflow::new(tmp.path());
        o.grown(a, end, 80);
        assert_eq!(sent(&mut o).len(), 64);
        o.acked(a, 1);
        assert_eq!(sent(&mut o).len(), 1);
        o.forget(&a);
        assert_eq!(o.in_flight, 0);
    }
}

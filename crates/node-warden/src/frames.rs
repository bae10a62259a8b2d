//! What daemon and warden say to each other: `u32` length, kind, body, both ways.
//!
//! A daemon says [`Request::Hello`] first and gets [`Event::Welcome`], which lists everything that the
//! warden knows. From then on events tell what changes. [`Event::Output`] is a level, not an edge:
//! only the newest per attempt is kept while the daemon does not read.

use crate::Key;
use crate::codec::{PutWords, TakeWords};
use mesh_core::canon::{Malformed, Reader, Writer};
use mesh_core::input::Fate;
use mesh_core::output::Digests;
use mesh_core::policy::Grant;
use mesh_core::task::{AttemptNo, Outcome};
use mesh_core::{SpoolId, TaskId, UnixMs};
use std::marker::PhantomData;

/// Raised by what an older peer cannot read. The warden answers with the lower of both, and neither
/// says what that version does not know: a daemon is replaced while its warden and the tasks go on.
pub const VERSION: u32 = 4;
/// From this version on there is live input.
pub const WITH_INPUT: u32 = 2;
/// From this version on an end says the digests of its output.
pub const WITH_DIGESTS: u32 = 3;
/// From this version on there is an end without time.
pub const WITH_KILL: u32 = 4;
/// Bytes of one frame; a larger length ends the connection.
pub const MAX_FRAME: usize = 16 << 20;

/// From the daemon to the warden.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    Hello {
        version: u32,
    },
    /// Start this attempt, or tell its status if it is known.
    Start {
        grant: Grant,
    },
    /// End this attempt; an unknown one will never start.
    Cancel {
        task: TaskId,
        attempt: AttemptNo,
    },
    /// The same, without time to end by itself.
    Kill {
        task: TaskId,
        attempt: AttemptNo,
    },
    /// The output before this file offset, the end of a frame, is durable at the hub.
    Acked {
        task: TaskId,
        attempt: AttemptNo,
        offset: u64,
    },
    /// The hub has acknowledged the end durably: everything kept about this attempt may go.
    Forget {
        task: TaskId,
        attempt: AttemptNo,
    },
    /// End all tasks, record their ends, then exit.
    Stop,
    /// A piece of live input; [`Event::Input`] with the same `request` says what became of it.
    Input {
        task: TaskId,
        attempt: AttemptNo,
        request: u64,
        seq: u64,
        data: Vec<u8>,
        eof: bool,
    },
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KnownState {
    Running,
    Ended(Outcome),
}

/// One line of the warden's memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Known {
    pub task: TaskId,
    pub attempt: AttemptNo,
    pub state: KnownState,
    /// File offset behind the last whole output frame; 0 without output.
    pub output_end: u64,
    /// Number of the last output frame; 0 without output.
    pub last_seq: u64,
    /// 0 when it was never started.
    pub started_at_ms: UnixMs,
    /// As in [`Event::Ended`].
    pub digests: Option<Digests>,
}

/// From the warden to the daemon.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    Welcome {
        version: u32,
        spool: SpoolId,
        attempts: Vec<Known>,
    },
    /// Its program runs.
    Started {
        task: TaskId,
        attempt: AttemptNo,
        at_ms: UnixMs,
    },
    /// There is output up to here.
    Output {
        task: TaskId,
        attempt: AttemptNo,
        end: u64,
        last_seq: u64,
    },
    /// Durably recorded before it is told.
    Ended {
        task: TaskId,
        attempt: AttemptNo,
        outcome: Outcome,
        output_end: u64,
        last_seq: u64,
        at_ms: UnixMs,
        /// Processes of the task that could not be ended; 0 with namespaces.
        leftover: u32,
        /// Of its whole output; none for what did not run to its end.
        digests: Option<Digests>,
    },
    /// A start named another spec than the one known for this attempt; nothing was done.
    Conflict {
        task: TaskId,
        attempt: AttemptNo,
    },
    /// What became of a piece of input. Told once, to the daemon that brought it.
    Input {
        task: TaskId,
        attempt: AttemptNo,
        request: u64,
        fate: Fate,
        /// The highest piece that was taken; 0 for none, or when it is not known any more.
        taken: u64,
    },
}

/// Why a peer's bytes are not frames; the connection is of no further use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    #[error("a frame of {0} bytes is longer than {MAX_FRAME}")]
    TooLong(usize),
    #[error("a frame is malformed: {0}")]
    Malformed(#[from] Malformed),
}

/// A message of either direction.
pub trait Message: Sized {
    /// The whole frame with its length.
    fn encode(&self) -> Vec<u8>;
    /// Reads the body of a frame, without its length.
    fn decode(body: &[u8]) -> Result<Self, FrameError>;
}

fn frame(kind: u8, fill: impl FnOnce(&mut Writer)) -> Vec<u8> {
    let mut p = Writer::plain(&[0, 0, 0, 0, kind]);
    fill(&mut p);
    let mut bytes = p.finish();
    let n = (bytes.len() - 4) as u32;
    bytes[..4].copy_from_slice(&n.to_be_bytes());
    bytes
}

impl Request {
    pub fn encode(&self) -> Vec<u8> {
        Message::encode(self)
    }
}

impl Message for Request {
    fn encode(&self) -> Vec<u8> {
        let keyed = |kind, task: &TaskId, attempt: &AttemptNo| {
            frame(kind, |p| {
                p.key(&(*task, *attempt));
            })
        };
        match self {
            Self::Hello { version } => frame(1, |p| {
                p.u32(*version);
            }),
            Self::Start { grant } => frame(2, |p| {
                p.raw(&grant.encode());
            }),
            Self::Cancel { task, attempt } => keyed(3, task, attempt),
            Self::Kill { task, attempt } => keyed(8, task, attempt),
            Self::Acked { task, attempt, offset } => frame(4, |p| {
                p.key(&(*task, *attempt)).u64(*offset);
            }),
            Self::Forget { task, attempt } => keyed(5, task, attempt),
            Self::Stop => frame(6, |_| {}),
            Self::Input { task, attempt, request, seq, data, eof } => frame(7, |p| {
                p.key(&(*task, *attempt)).u64(*request).u64(*seq).u8((*eof).into()).bytes(data);
            }),
        }
    }

    fn decode(body: &[u8]) -> Result<Self, FrameError> {
        let mut t = Reader::plain(body);
        let request = match t.u8()? {
            1 => Self::Hello { version: t.u32()? },
            2 => return Ok(Self::Start { grant: Grant::decode(t.rest())? }),
            3 => {
                let (task, attempt) = t.key()?;
                Self::Cancel { task, attempt }
            }
            4 => {
                let (task, attempt) = t.key()?;
                Self::Acked { task, attempt, offset: t.u64()? }
            }
            5 => {
                let (task, attempt) = t.key()?;
                Self::Forget { task, attempt }
            }
            6 => Self::Stop,
            7 => {
                let (task, attempt) = t.key()?;
                let (request, seq) = (t.u64()?, t.u64()?);
                let eof = match t.u8()? {
                    0 => false,
                    1 => true,
                    v => return Err(Malformed::Unknown { what: "flag", value: v.into() }.into()),
                };
                Self::Input { task, attempt, request, seq, data: t.bytes()?.to_vec(), eof }
            }
            8 => {
                let (task, attempt) = t.key()?;
                Self::Kill { task, attempt }
            }
            v => return Err(Malformed::Unknown { what: "request", value: v.into() }.into()),
        };
        t.end()?;
        Ok(request)
    }
}

impl Known {
    pub fn key(&self) -> Key {
        (self.task, self.attempt)
    }
}

impl Event {
    pub fn encode(&self) -> Vec<u8> {
        Message::encode(self)
    }

    /// Without what a peer of this version cannot read.
    pub fn for_version(mut self, version: u32) -> Self {
        if version < WITH_DIGESTS {
            match &mut self {
                Self::Welcome { attempts, .. } => attempts.iter_mut().for_each(|k| k.digests = None),
                Self::Ended { digests, .. } => *digests = None,
                _ => {}
            }
        }
        self
    }
}

impl Message for Event {
    fn encode(&self) -> Vec<u8> {
        match self {
            Self::Welcome { version, spool, attempts } => {
                let any = attempts.iter().any(|k| k.digests.is_some());
                frame(if any { 7 } else { 1 }, |p| {
                    p.u32(*version).raw(spool.as_bytes()).u32(attempts.len() as u32);
                    for k in attempts {
                        p.key(&k.key());
                        match &k.state {
                            KnownState::Running => p.u8(0),
                            KnownState::Ended(o) => p.u8(1).outcome(o),
                        };
                        p.u64(k.output_end).u64(k.last_seq).i64(k.started_at_ms);
                        if any {
                            p.digests(k.digests.as_ref());
                        }
                    }
                })
            }
            Self::Started { task, attempt, at_ms } => frame(2, |p| {
                p.key(&(*task, *attempt)).i64(*at_ms);
            }),
            Self::Output { task, attempt, end, last_seq } => frame(3, |p| {
                p.key(&(*task, *attempt)).u64(*end).u64(*last_seq);
            }),
            Self::Ended { task, attempt, outcome, output_end, last_seq, at_ms, leftover, digests } => {
                frame(if digests.is_some() { 8 } else { 4 }, |p| {
                    p.key(&(*task, *attempt)).outcome(outcome).u64(*output_end).u64(*last_seq).i64(*at_ms).u32(*leftover);
                    if digests.is_some() {
                        p.digests(digests.as_ref());
                    }
                })
            }
            Self::Conflict { task, attempt } => frame(5, |p| {
                p.key(&(*task, *attempt));
            }),
            Self::Input { task, attempt, request, fate, taken } => frame(6, |p| {
                p.key(&(*task, *attempt)).u64(*request).fate(*fate).u64(*taken);
            }),
        }
    }

    fn decode(body: &[u8]) -> Result<Self, FrameError> {
        let mut t = Reader::plain(body);
        let event = match t.u8()? {
            kind @ (1 | 7) => {
                let version = t.u32()?;
                let spool = SpoolId::from_bytes(t.array()?);
                let n = t.u32()?;
                let mut attempts = Vec::new();
                for _ in 0..n {
                    let (task, attempt) = t.key()?;
                    let state = match t.u8()? {
                        0 => KnownState::Running,
                        1 => KnownState::Ended(t.outcome()?),
                        v => return Err(Malformed::Unknown { what: "state", value: v.into() }.into()),
                    };
                    let (output_end, last_seq, started_at_ms) = (t.u64()?, t.u64()?, t.i64()?);
                    let digests = if kind == 7 { t.digests()? } else { None };
                    attempts.push(Known { task, attempt, state, output_end, last_seq, started_at_ms, digests });
                }
                Self::Welcome { version, spool, attempts }
            }
            2 => {
                let (task, attempt) = t.key()?;
                Self::Started { task, attempt, at_ms: t.i64()? }
            }
            3 => {
                let (task, attempt) = t.key()?;
                Self::Output { task, attempt, end: t.u64()?, last_seq: t.u64()? }
            }
            kind @ (4 | 8) => {
                let (task, attempt) = t.key()?;
                let outcome = t.outcome()?;
                let (output_end, last_seq, at_ms, leftover) = (t.u64()?, t.u64()?, t.i64()?, t.u32()?);
                let digests = if kind == 8 { t.digests()? } else { None };
                Self::Ended { task, attempt, outcome, output_end, last_seq, at_ms, leftover, digests }
            }
            5 => {
                let (task, attempt) = t.key()?;
                Self::Conflict { task, attempt }
            }
            6 => {
                let (task, attempt) = t.key()?;
                Self::Input { task, attempt, request: t.u64()?, fate: t.fate()?, taken: t.u64()? }
            }
            v => return Err(Malformed::Unknown { what: "event", value: v.into() }.into()),
        };
        t.end()?;
        Ok(event)
    }
}

/// Cuts a byte stream into messages; holds at most one frame and what was pushed with it.
#[derive(Debug)]
pub struct Decoder<M> {
    buffer: Vec<u8>,
    at: usize,
    kind: PhantomData<M>,
}

impl<M> Default for Decoder<M> {
    fn default() -> Self {
        Self { buffer: Vec::new(), at: 0, kind: PhantomData }
    }
}

impl<M: Message> Decoder<M> {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn push(&mut self, bytes: &[u8]) {
        if self.at > 0 {
            self.buffer.drain(..self.at);
            self.at = 0;
        }
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole message; none while its bytes are not all here. After an error the stream has
    /// no further meaning.
    pub fn pop(&mut self) -> Result<Option<M>, FrameError> {
        let rest = &self.buffer[self.at..];
        let Some((head, rest)) = rest.split_first_chunk::<4>() else { return Ok(None) };
        let n = u32::from_be_bytes(*head) as usize;
        if n > MAX_FRAME {
            return Err(FrameError::TooLong(n));
        }
        let Some(body) = rest.get(..n) else { return Ok(None) };
        let message = M::decode(body)?;
        self.at += 4 + n;
        if self.at == self.buffer.len() {
            // A large frame must not keep its memory for ever.
            self.at = 0;
            self.buffer.clear();
            self.buffer.shrink_to(64 << 10);
        }
        Ok(Some(message))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_core::task::{NeverStarted, Reason, ReasonCode};
    use proptest::prelude::*;

    const DIGESTS: Digests = Digests { stdout: [1; 32], stderr: [2; 32] };

    fn outcomes() -> Vec<Outcome> {
        vec![
            Outcome::Exited(-3),
            Outcome::Signalled(9),
            Outcome::TimedOut,
            Outcome::Cancelled,
            Outcome::Done,
            Outcome::Lost { detail: "warden_ended".into() },
            Outcome::NeverStarted(NeverStarted::Late),
            Outcome::NeverStarted(NeverStarted::Cancelled),
            Outcome::NeverStarted(NeverStarted::Refused(Reason::new(ReasonCode::NotFound, "program x"))),
        ]
    }

    fn samples() -> Vec<Event> {
        let (task, attempt) = (TaskId::from_bytes([3; 16]), AttemptNo(7));
        let mut all: Vec<Event> = outcomes()
            .into_iter()
            .zip([None, Some(Digests::of_nothing()), Some(DIGESTS)].into_iter().cycle())
            .map(|(outcome, digests)| Event::Ended { task, attempt, outcome, output_end: 1, last_seq: 2, at_ms: 3, leftover: 0, digests })
            .collect();
        let known = |state, digests| Known { task, attempt, state, output_end: 9, last_seq: 8, started_at_ms: 7, digests };
        let running = known(KnownState::Running, None);
        for digests in [None, Some(DIGESTS)] {
            let attempts = vec![running.clone(), known(KnownState::Ended(Outcome::Exited(1)), digests)];
            all.push(Event::Welcome { version: VERSION, spool: SpoolId::from_bytes([1; 16]), attempts });
        }
        all.push(Event::Started { task, attempt, at_ms: 1 });
        all.push(Event::Output { task, attempt, end: 1, last_seq: 2 });
        all.push(Event::Conflict { task, attempt });
        all.extend(Fate::ALL.map(|fate| Event::Input { task, attempt, request: 4, fate, taken: 5 }));
        all
    }

    #[test]
    fn events_survive_any_cut() {
        let all = samples();
        let bytes: Vec<u8> = all.iter().flat_map(Event::encode).collect();
        for step in [1, 3, 7, 4096] {
            let mut decoder = Decoder::<Event>::new();
            let mut got = vec![];
            for part in bytes.chunks(step) {
                decoder.push(part);
                while let Some(e) = decoder.pop().unwrap() {
                    got.push(e);
                }
            }
            assert_eq!(got, all);
        }
    }

    /// The frames of version 2, byte by byte: what a daemon of it reads.
    #[test]
    fn an_older_daemon_is_told_in_its_own_words() {
        let (task, attempt) = (TaskId::from_bytes([3; 16]), AttemptNo(7));
        let (outcome, output_end, last_seq, at_ms, leftover, digests) = (Outcome::Exited(1), 2, 3, 4, 5, Some(DIGESTS));
        let ended = Event::Ended { task, attempt, outcome, output_end, last_seq, at_ms, leftover, digests };
        let key = [&[3; 16][..], &7u64.to_be_bytes()].concat();
        let body = [&[4], &key[..], &[0, 0, 0, 0, 1], &2u64.to_be_bytes(), &3u64.to_be_bytes(), &4u64.to_be_bytes(), &5u32.to_be_bytes()];
        assert_eq!(ended.clone().for_version(2).encode()[4..], body.concat());
        assert_eq!(ended.clone().for_version(3), ended);
        let state = KnownState::Ended(Outcome::Exited(1));
        let attempts = vec![Known { task, attempt, state, output_end, last_seq, started_at_ms: at_ms, digests }];
        let welcome = Event::Welcome { version: 2, spool: SpoolId::from_bytes([9; 16]), attempts };
        let head = [&[1], &2u32.to_be_bytes()[..], &[9; 16], &1u32.to_be_bytes()].concat();
        let body = [&head, &key[..], &[1, 0, 0, 0, 0, 1], &2u64.to_be_bytes(), &3u64.to_be_bytes(), &4u64.to_be_bytes()];
        assert_eq!(welcome.for_version(2).encode()[4..], body.concat());
    }

    #[test]
    fn requests_round_trip() {
        let (task, attempt) = (TaskId::from_bytes([3; 16]), AttemptNo(7));
        for r in [
            Request::Hello { version: 4 },
            Request::Cancel { task, attempt },
            Request::Kill { task, attempt },
            Request::Acked { task, attempt, offset: 99 },
            Request::Forget { task, attempt },
            Request::Stop,
            Request::Input { task, attempt, request: 5, seq: 6, data: b"in".to_vec(), eof: false },
            Request::Input { task, attempt, request: 5, seq: 7, data: vec![], eof: true },
        ] {
            let mut d = Decoder::<Request>::new();
            d.push(&r.encode());
            assert_eq!(d.pop().unwrap(), Some(r));
            assert_eq!(d.pop().unwrap(), None);
        }
    }

    #[test]
    fn a_frame_has_a_bound() {
        let mut d = Decoder::<Event>::new();
        d.push(&(MAX_FRAME as u32 + 1).to_be_bytes());
        assert_eq!(d.pop(), Err(FrameError::TooLong(MAX_FRAME + 1)));
    }

    proptest! {
        #[test]
        fn decoders_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Event::decode(&bytes);
            let _ = Request::decode(&bytes);
        }
    }
}

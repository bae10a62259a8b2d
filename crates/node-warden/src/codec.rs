//! Words of the mesh in the byte layout of `mesh_core::canon`, as frames and journal share them.

use crate::Key;
use mesh_core::canon::{Malformed, Reader, Writer};
use mesh_core::input::Fate;
use mesh_core::output::Digests;
use mesh_core::task::{AttemptNo, NeverStarted, Outcome, Reason, ReasonCode};
use mesh_core::{Digest, TaskId};

/// Bytes of a free text that are kept: a refusal says a sentence, and the list of all that is known
/// must fit into one frame.
const MAX_DETAIL: usize = 200;

/// Words of the mesh, written. Details are cut to what is kept.
pub(crate) trait PutWords {
    fn detail(&mut self, v: &str) -> &mut Self;
    fn key(&mut self, key: &Key) -> &mut Self;
    fn outcome(&mut self, v: &Outcome) -> &mut Self;
    fn fate(&mut self, v: Fate) -> &mut Self;
    fn digests(&mut self, v: Option<&Digests>) -> &mut Self;
}

/// The same words, read.
pub(crate) trait TakeWords {
    fn key(&mut self) -> Result<Key, Malformed>;
    fn digest(&mut self) -> Result<Digest, Malformed>;
    fn outcome(&mut self) -> Result<Outcome, Malformed>;
    fn fate(&mut self) -> Result<Fate, Malformed>;
    fn digests(&mut self) -> Result<Option<Digests>, Malformed>;
}

impl PutWords for Writer {
    fn detail(&mut self, v: &str) -> &mut Self {
        let mut end = v.len().min(MAX_DETAIL);
        while !v.is_char_boundary(end) {
            end -= 1;
        }
        self.bytes(&v.as_bytes()[..end])
    }
    fn key(&mut self, (task, attempt): &Key) -> &mut Self {
        self.raw(task.as_bytes()).u64(attempt.0)
    }
    fn outcome(&mut self, v: &Outcome) -> &mut Self {
        match v {
            Outcome::Exited(code) => self.u8(0).u32(*code as u32),
            Outcome::Signalled(n) => self.u8(1).u32(*n as u32),
            Outcome::TimedOut => self.u8(2),
            Outcome::Cancelled => self.u8(3),
            Outcome::Done => self.u8(4),
            Outcome::Lost { detail } => self.u8(5).detail(detail),
            Outcome::NeverStarted(NeverStarted::Late) => self.u8(6),
            Outcome::NeverStarted(NeverStarted::Cancelled) => self.u8(7),
            Outcome::NeverStarted(NeverStarted::Refused(r)) => self.u8(8).detail(r.code.as_str()).detail(&r.detail),
        }
    }
    fn fate(&mut self, v: Fate) -> &mut Self {
        self.u8(match v {
            Fate::Taken => 1,
            Fate::Gap => 2,
            Fate::Full => 3,
            Fate::Closed => 4,
            Fate::NoInput => 5,
            Fate::NotRunning => 6,
            Fate::Ended => 7,
        })
    }
    /// Those of nothing take one byte, so that the list of all that is known stays within its frame.
    fn digests(&mut self, v: Option<&Digests>) -> &mut Self {
        match v {
            None => self.u8(0),
            Some(d) if *d == Digests::of_nothing() => self.u8(1),
            Some(d) => self.u8(2).raw(&d.stdout).raw(&d.stderr),
        }
    }
}

impl TakeWords for Reader<'_> {
    fn key(&mut self) -> Result<Key, Malformed> {
        Ok((TaskId::from_bytes(self.array()?), AttemptNo(self.u64()?)))
    }
    fn digest(&mut self) -> Result<Digest, Malformed> {
        self.array()
    }
    fn outcome(&mut self) -> Result<Outcome, Malformed> {
        Ok(match self.u8()? {
            0 => Outcome::Exited(self.u32()? as i32),
            1 => Outcome::Signalled(self.u32()? as i32),
            2 => Outcome::TimedOut,
            3 => Outcome::Cancelled,
            4 => Outcome::Done,
            5 => Outcome::Lost { detail: self.str()?.to_owned() },
            6 => Outcome::NeverStarted(NeverStarted::Late),
            7 => Outcome::NeverStarted(NeverStarted::Cancelled),
            8 => {
                let code = ReasonCode::parse(self.str()?).ok_or(Malformed::Unknown { what: "reason", value: 0 })?;
                Outcome::NeverStarted(NeverStarted::Refused(Reason::new(code, self.str()?)))
            }
            v => return Err(Malformed::Unknown { what: "outcome", value: v.into() }),
        })
    }
    fn fate(&mut self) -> Result<Fate, Malformed> {
        Ok(match self.u8()? {
            1 => Fate::Taken,
            2 => Fate::Gap,
            3 => Fate::Full,
            4 => Fate::Closed,
            5 => Fate::NoInput,
            6 => Fate::NotRunning,
            7 => Fate::Ended,
            v => return Err(Malformed::Unknown { what: "fate", value: v.into() }),
        })
    }
    fn digests(&mut self) -> Result<Option<Digests>, Malformed> {
        Ok(match self.u8()? {
            0 => None,
            1 => Some(Digests::of_nothing()),
            2 => Some(Digests { stdout: self.array()?, stderr: self.array()? }),
            v => return Err(Malformed::Unknown { what: "digests", value: v.into() }),
        })
    }
}

//! Live input of a running task: numbered pieces, each taken once and in order.

/// Bytes of one piece.
pub const MAX_PIECE_BYTES: usize = 16 << 10;
/// Bytes that may wait for a task that does not read; the kernel's pipe holds some more.
pub const MAX_WAITING_BYTES: usize = 256 << 10;

/// What became of a piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// Now or before: it reaches the task's pipe once, behind all pieces before it.
    Taken,
    /// A piece before it is missing.
    Gap,
    /// The task does not read; the same piece may come again.
    Full,
    /// By an end that was said before, or by the task itself.
    Closed,
    /// The task was not started with an open standard input.
    NoInput,
    /// Not yet, or not known.
    NotRunning,
    Ended,
}

impl Fate {
    pub const ALL: [Self; 7] = [Self::Taken, Self::Gap, Self::Full, Self::Closed, Self::NoInput, Self::NotRunning, Self::Ended];
}

/// How far one attempt's input has come.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sequence {
    taken: u64,
    closed: bool,
}

impl Sequence {
    /// The highest piece that was taken; 0 for none.
    pub fn taken(&self) -> u64 {
        self.taken
    }
    pub fn is_closed(&self) -> bool {
        self.closed
    }
    pub fn close(&mut self) {
        self.closed = true;
    }
    /// May this piece be written now? `waiting` bytes are not written yet. `Err` says what to answer
    /// instead, and nothing is to be done.
    pub fn admit(&self, seq: u64, bytes: usize, waiting: usize) -> Result<(), Fate> {
        if seq <= self.taken {
            Err(Fate::Taken)
        } else if self.closed {
            Err(Fate::Closed)
        } else if seq - self.taken > 1 {
            Err(Fate::Gap)
        } else if bytes > 0 && waiting.saturating_add(bytes) > MAX_WAITING_BYTES {
            Err(Fate::Full)
        } else {
            Ok(())
        }
    }
    /// An admitted piece was taken.
    pub fn take(&mut self, seq: u64, eof: bool) {
        self.taken = seq;
        self.closed |= eof;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn order_repeats_gaps_and_ends() {
        let mut s = Sequence::default();
        assert_eq!(s.admit(2, 1, 0), Err(Fate::Gap));
        assert_eq!(s.admit(u64::MAX, 1, 0), Err(Fate::Gap));
        assert_eq!(s.admit(1, 1, 0), Ok(()));
        s.take(1, false);
        assert_eq!(s.admit(1, 1, 0), Err(Fate::Taken));
        assert_eq!(s.admit(2, 1, MAX_WAITING_BYTES), Err(Fate::Full));
        assert_eq!(s.admit(2, 1, MAX_WAITING_BYTES - 1), Ok(()));
        assert_eq!(s.admit(2, 0, MAX_WAITING_BYTES), Ok(()), "an end needs no room");
        s.take(2, true);
        assert_eq!(s.admit(2, 0, 0), Err(Fate::Taken), "also the last one, said again");
        assert_eq!(s.admit(3, 1, 0), Err(Fate::Closed));
        assert_eq!(s.admit(9, 1, 0), Err(Fate::Closed));
    }

    proptest! {
        /// However callers repeat, skip and race: what is taken is 1, 2, 3 … each once.
        #[test]
        fn any_calls_take_each_piece_once_and_in_order(calls in proptest::collection::vec((0u64..20, 0usize..3, 0usize..3), 0..200)) {
            let (mut s, mut written) = (Sequence::default(), vec![]);
            for (seq, bytes, waiting) in calls {
                if s.admit(seq, bytes, waiting).is_ok() {
                    s.take(seq, false);
                    written.push(seq);
                }
            }
            prop_assert_eq!(&written, &(1..=written.len() as u64).collect::<Vec<_>>());
        }
    }
}

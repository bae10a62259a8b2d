//! Standard input of a task: what was given with its start, then live pieces, each once.
//!
//! The pipe never blocks and what waits for it is bounded: a task that does not read costs its caller
//! a `Full`, and nobody else anything. The number of the last piece lives here, with the task, so that
//! a daemon or hub that comes back can have a piece repeated without its being written twice.

use super::*;
use mesh_core::input::Fate;

/// Answers that may wait for a daemon; one that is dropped is asked for again.
const MAX_ANSWERS: usize = 1024;

/// The near end of a task's standard input, and what it has not taken yet.
pub(super) struct Stdin {
    fd: OwnedFd,
    bytes: Vec<u8>,
    at: usize,
    /// More may come.
    open: bool,
    watched: bool,
}

enum Flow {
    /// The pipe took everything.
    Empty,
    /// It takes no more for now.
    Blocked,
    /// Nobody reads it any more.
    Broken,
}

impl Stdin {
    pub fn new(fd: OwnedFd, bytes: Vec<u8>, open: bool) -> Self {
        Self { fd, bytes, at: 0, open, watched: false }
    }

    fn waiting(&self) -> usize {
        self.bytes.len() - self.at
    }

    fn push(&mut self, data: &[u8]) {
        self.bytes.drain(..self.at);
        self.at = 0;
        self.bytes.extend_from_slice(data);
    }

    /// Hears of room in the pipe while something waits for it, and of nothing else.
    pub fn watch(&mut self, epoll: &OwnedFd, token: u64) -> Result<(), Errno> {
        let wanted = self.waiting() > 0;
        if wanted && !self.watched {
            epoll::add(epoll, &self.fd, epoll::EventData::new_u64(token), epoll::EventFlags::OUT)?;
        } else if !wanted && self.watched {
            epoll::delete(epoll, &self.fd)?;
        }
        self.watched = wanted;
        Ok(())
    }

    fn write(&mut self) -> Flow {
        while self.at < self.bytes.len() {
            match rustix::io::write(&self.fd, &self.bytes[self.at..]) {
                Ok(n) => self.at += n,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Flow::Blocked,
                Err(_) => return Flow::Broken,
            }
        }
        // Given back: most of an open input's life nothing waits.
        (self.bytes, self.at) = (Vec::new(), 0);
        Flow::Empty
    }
}

/// One piece, as a daemon hands it on.
pub(super) struct Piece {
    pub key: Key,
    pub request: u64,
    pub seq: u64,
    pub data: Vec<u8>,
    pub eof: bool,
}

impl Warden {
    /// Gives the pipe what it takes, after an event or a piece.
    pub(super) fn write_stdin(&mut self, slot: usize) {
        self.pump(slot);
    }

    /// False when the task will read no more: its end of the pipe is closed.
    fn pump(&mut self, slot: usize) -> bool {
        let Some(run) = self.runs[slot].as_mut() else { return false };
        let token = token(Source::Stdin, slot, run.generation);
        let Some(stdin) = run.stdin.as_mut() else { return false };
        let (over, alive) = match stdin.write() {
            Flow::Empty => (!stdin.open, true),
            Flow::Blocked => (false, true),
            // That is the task's business.
            Flow::Broken => (true, false),
        };
        if over {
            self.close_stdin(slot);
        } else if let Err(e) = stdin.watch(&self.epoll, token) {
            say!("warden: a task's input cannot be watched: {e}");
            self.close_stdin(slot);
            return false;
        }
        alive
    }

    /// The task reads the end behind what it was given.
    pub(super) fn close_stdin(&mut self, slot: usize) {
        let Some(run) = self.runs[slot].as_mut() else { return };
        if let Some(stdin) = run.stdin.take()
            && stdin.watched
        {
            // A child between clone and exec may hold a copy, and a copy keeps a registration.
            let _ = epoll::delete(&self.epoll, &stdin.fd);
        }
        if let Some(input) = run.input.as_mut() {
            input.close();
        }
    }

    pub(super) fn on_input(&mut self, piece: &Piece) {
        let (fate, taken) = self.take_piece(piece);
        if self.answers.len() < MAX_ANSWERS {
            let (task, attempt) = piece.key;
            self.answers.push_back(Event::Input { task, attempt, request: piece.request, fate, taken });
        }
    }

    /// What becomes of a piece, and the highest number that was taken.
    fn take_piece(&mut self, piece: &Piece) -> (Fate, u64) {
        let slot = match self.attempts.get(&piece.key).map(|a| &a.state) {
            None | Some(State::Deciding) => return (Fate::NotRunning, 0),
            Some(State::Ended { .. }) => return (Fate::Ended, 0),
            Some(State::Running(slot)) => *slot,
        };
        // The slot is free again while an end waits for its sync.
        let Some(run) = self.runs[slot].as_mut().filter(|r| r.key == piece.key) else { return (Fate::Ended, 0) };
        let Some(input) = run.input else { return (Fate::NoInput, 0) };
        let taken = input.taken();
        let waiting = run.stdin.as_ref().map_or(0, Stdin::waiting);
        match input.admit(piece.seq, piece.data.len(), waiting) {
            Ok(()) => {}
            Err(Fate::Closed) if run.end.is_some() => return (Fate::Ended, taken),
            Err(fate) => return (fate, taken),
        }
        let Some(stdin) = run.stdin.as_mut() else { return (Fate::Closed, taken) };
        stdin.push(&piece.data);
        stdin.open &= !piece.eof;
        if !self.pump(slot) {
            return (Fate::Closed, taken);
        }
        if let Some(input) = self.runs[slot].as_mut().and_then(|r| r.input.as_mut()) {
            input.take(piece.seq, piece.eof);
        }
        (Fate::Taken, piece.seq)
    }
}

//! Live input, on its way from the hub to the warden and its answer back. Nothing of it is kept here:
//! the warden counts the pieces, so that this daemon may be replaced between any two.

use super::Engine;
use crate::link::orders::{Key, Piece};
use mesh_core::input::Fate;
use mesh_wire::node::{self as wire, node_frame};
use node_warden::frames::{Request, WITH_INPUT};

/// Pieces that may wait for the warden's socket: 1 MiB.
const MAX_QUEUED: usize = 64;

impl Engine {
    pub(super) fn warden_takes_input(&self) -> bool {
        self.warden_version >= WITH_INPUT
    }

    pub(super) fn on_input(&mut self, p: Piece) {
        let refusal = match self.attempts.get(&p.key) {
            Some(a) if a.end.is_some() => Some(Fate::Ended),
            // No task with an open input was ever started by such a warden.
            Some(_) if !self.warden_takes_input() => Some(Fate::NoInput),
            Some(_) if self.queued_input() >= MAX_QUEUED => Some(Fate::Full),
            Some(_) => None,
            None => Some(Fate::NotRunning),
        };
        if let Some(fate) = refusal {
            return self.answer_input(p.key, p.request, fate, 0);
        }
        let Key { task, attempt } = p.key;
        self.to_warden.push_back(Request::Input { task, attempt, request: p.request, seq: p.seq, data: p.data, eof: p.eof });
    }

    fn queued_input(&self) -> usize {
        self.to_warden.iter().filter(|r| matches!(r, Request::Input { .. })).count()
    }

    /// Without a link the answer is lost, and the caller says the piece again.
    pub(super) fn answer_input(&mut self, key: Key, request: u64, fate: Fate, taken: u64) {
        let Some(up) = &mut self.up else { return };
        up.control.push_back(node_frame::Kind::Input(wire::InputAnswer {
            task_id: key.task.to_string(),
            attempt: key.attempt.0,
            request,
            code: wire::input_answer::Code::from(fate).into(),
            taken_seq: taken,
        }));
    }
}

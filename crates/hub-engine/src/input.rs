//! Live input: from a caller to the running task, and its node's word about each piece.
//!
//! Nothing is kept: the task's warden alone counts the pieces. Whoever did not hear an answer (a hub
//! or daemon that ended, a link that broke, a node that was slow) says the same piece again, and it
//! reaches the task once.

use crate::audit::{self, Action};
use crate::delivery::Delivery;
use crate::error::{Error, Result};
use crate::links::{Link, LinkCommand};
use crate::tasks::{TaskService, stopped};
use mesh_core::input::{Fate, MAX_PIECE_BYTES};
use mesh_core::permission::{Caller, Permission};
use mesh_core::spec::{INLINE_SPEC_BYTES, Spec};
use mesh_core::task::{AttemptNo, TaskState};
use mesh_core::{Digest, NodeId, TaskId};
use mesh_process::entropy;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};

/// How long a node may take to say what became of a piece.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);
/// Pieces under way to one node, 1 MiB: input never fills a link's queue, which orders share.
const MAX_UNDER_WAY: usize = 64;

/// One piece, as a door hands it in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// From 1 for each attempt, without gaps.
    pub seq: u64,
    pub data: Vec<u8>,
    /// Closes standard input behind the data.
    pub eof: bool,
}

/// A piece on its way to a node, before it is signed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Input {
    pub task: TaskId,
    pub attempt: AttemptNo,
    /// Unguessable, so that an answer to an earlier process or caller is never taken for another's.
    pub request: u64,
    pub piece: Piece,
}

/// What a node says of a piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Answer {
    pub task: TaskId,
    pub attempt: AttemptNo,
    pub request: u64,
    pub fate: Fate,
    /// The highest piece that was taken.
    pub taken: u64,
}

#[derive(Debug)]
struct Waiting {
    node: NodeId,
    generation: u64,
    task: TaskId,
    attempt: AttemptNo,
    answer: oneshot::Sender<Answer>,
}

/// Tasks with a long spec that is remembered to take input.
const MAX_FED: usize = 1024;

/// The callers that wait for a node's word. Each waits on one link, and hears at once when it is gone.
#[derive(Debug, Default)]
pub struct Inputs {
    waiting: Mutex<BTreeMap<u64, Waiting>>,
    /// By task and digest of the spec: what was read of a long spec once, so that not every piece reads it.
    fed: Mutex<BTreeSet<(TaskId, Digest)>>,
}

/// A place among those who wait; given back when the caller leaves.
struct Place<'a>(&'a Inputs, u64);

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.0.waiting().remove(&self.1);
    }
}

impl Inputs {
    fn waiting(&self) -> MutexGuard<'_, BTreeMap<u64, Waiting>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_fed(&self, task: TaskId, spec: Digest) -> bool {
        self.fed.lock().unwrap_or_else(PoisonError::into_inner).contains(&(task, spec))
    }
    fn feed(&self, task: TaskId, spec: Digest) {
        let mut fed = self.fed.lock().unwrap_or_else(PoisonError::into_inner);
        fed.insert((task, spec));
        if fed.len() > MAX_FED {
            // The oldest: ids begin with the time.
            fed.pop_first();
        }
    }

    /// None while as many pieces as may be are under way to the node.
    fn wait(&self, link: &Link, task: TaskId, attempt: AttemptNo) -> Option<(Place<'_>, oneshot::Receiver<Answer>)> {
        let mut waiting = self.waiting();
        if waiting.values().filter(|w| w.node == link.node).count() >= MAX_UNDER_WAY {
            return None;
        }
        let request = u64::from_be_bytes(entropy::bytes());
        let (answer, heard) = oneshot::channel();
        waiting.insert(request, Waiting { node: link.node, generation: link.generation, task, attempt, answer });
        Some((Place(self, request), heard))
    }

    /// Gives a node's word to the caller who waits for it on that very link; nobody else hears it.
    fn answered(&self, node: NodeId, generation: u64, a: Answer) {
        let mut waiting = self.waiting();
        let fits = |w: &Waiting| w.node == node && w.generation == generation && w.task == a.task && w.attempt == a.attempt;
        if waiting.get(&a.request).is_some_and(fits)
            && let Some(w) = waiting.remove(&a.request)
        {
            let _ = w.answer.send(a);
        }
    }

    /// A link is gone, and with it every answer that was to come over it.
    pub(crate) fn hang_up(&self, node: NodeId, generation: u64) {
        self.waiting().retain(|_, w| w.node != node || w.generation != generation);
    }
}

impl TaskService {
    /// Hands a piece of input to the running task; gives the highest piece that its node has taken.
    pub async fn input(&self, caller: &Caller, id: TaskId, piece: Piece) -> Result<u64> {
        audit::doing(caller, Action::TaskInput);
        audit::about(id);
        let mut task = self.permitted_narrow(caller, id, Permission::TasksDispatch).await?;
        check(&piece)?;
        if task.is_parent() {
            return Err(Error::conflict("no_input", "the parent of a fan-out takes no live input; send it to its children"));
        }
        self.not_restored()?;
        let inputs = self.links.inputs();
        let known = task.spec.is_empty() && inputs.is_fed(id, task.digest);
        if !known {
            if task.spec.is_empty() {
                task = self.journal.task(id).await?.ok_or(Error::NotFound("task"))?;
            }
            if !Spec::decode(&task.spec).is_ok_and(|s| s.takes_input()) {
                return Err(no_input());
            }
        }
        let attempt = match (task.progress.state, &task.progress.attempt) {
            (s, _) if s.is_final() => return Err(ended()),
            (TaskState::Running, Some(a)) => a,
            _ => return Err(not_running()),
        };
        if (!known && mesh_core::sha256(&task.spec) != task.digest) || !self.keyring.is_sealed(&task.intent(), &task.seal) {
            // Whoever wrote this row may have made somebody else's task their own.
            tracing::error!(task = %id, "the stored task does not fit its seal; it gets no input");
            metrics::counter!("cortex_broken_seals_total").increment(1);
            return Err(Error::conflict("bad_state", "the stored task does not fit its seal"));
        }
        if !known && task.spec.len() > INLINE_SPEC_BYTES {
            inputs.feed(id, task.digest);
        }
        let (no, node) = (attempt.no, attempt.node);
        let link = self.links.get(node).ok_or_else(offline)?;
        let (place, heard) = inputs.wait(&link, id, no).ok_or_else(|| full("too much input is under way to its node"))?;
        let seq = piece.seq;
        let command = LinkCommand::Input(Box::new(Input { task: id, attempt: no, request: place.1, piece }));
        match link.commands.try_send(command) {
            Ok(()) => {}
            Err(mpsc::error::TrySendError::Full(_)) => return Err(full("the link to its node is busy")),
            Err(mpsc::error::TrySendError::Closed(_)) => return Err(offline()),
        }
        if !self.links.is_current(node, link.generation) {
            // Gone before the wait began: nobody would end it.
            return Err(offline());
        }
        let answer = tokio::select! {
            biased;
            answer = heard => answer.map_err(|_| offline())?,
            () = self.stop.cancelled() => return Err(stopped()),
            () = tokio::time::sleep(ANSWER_WITHIN) => return Err(unanswered()),
        };
        verdict(seq, answer)
    }
}

impl Delivery {
    /// What a node says of a piece of input.
    pub fn input_answered(&self, caller: &Caller, answer: Answer) -> Result<()> {
        let node = self.fence(caller)?;
        if let Caller::Node { generation, .. } = caller {
            self.links.inputs().answered(node, *generation, answer);
        }
        Ok(())
    }
}

fn check(p: &Piece) -> Result<()> {
    if p.seq == 0 {
        return Err(Error::invalid("bad_seq", "seq counts from 1"));
    }
    if p.data.len() > MAX_PIECE_BYTES {
        return Err(Error::invalid("input_too_large", format!("a piece of input has at most {MAX_PIECE_BYTES} bytes; send several")));
    }
    if p.data.is_empty() && !p.eof {
        return Err(Error::invalid("empty_input", "give data_base64, or eof, or both"));
    }
    Ok(())
}

fn verdict(seq: u64, a: Answer) -> Result<u64> {
    let conflict = |code, detail: &str| Err(Error::conflict(code, detail));
    match a.fate {
        Fate::Taken => Ok(a.taken),
        Fate::Gap => {
            let taken = a.taken;
            Err(Error::conflict("input_gap", format!("piece {seq} came and {taken} were taken; send {} next", taken.saturating_add(1))))
        }
        Fate::Full => Err(full("the task does not read")),
        Fate::Closed => conflict("input_closed", "the task's standard input is closed"),
        Fate::NoInput => Err(no_input()),
        Fate::NotRunning => Err(not_running()),
        Fate::Ended => Err(ended()),
    }
}

fn no_input() -> Error {
    Error::conflict("no_input", "the task takes no live input; dispatch it with shell.stdin_open")
}
fn not_running() -> Error {
    Error::conflict("not_running", "the task does not run yet; send the piece again when it does")
}
fn ended() -> Error {
    Error::conflict("task_ended", "the task has ended")
}
fn full(why: &str) -> Error {
    Error::conflict("input_full", format!("{why}; send the same piece again later"))
}
fn offline() -> Error {
    Error::Unavailable { code: "node_offline", detail: "the task's node is not here; send the same piece again when it is back".into() }
}
fn unanswered() -> Error {
    let detail = "the task's node did not answer in time; send the same piece again, it is written once".into();
    Error::Unavailable { code: "input_unanswered", detail }
}

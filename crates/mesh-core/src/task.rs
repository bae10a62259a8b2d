//! The life of a task.
//!
//! ```text
//!                        ┌─► moved, while not granted
//! pending ──────────────► assigned ──► running ──► succeeded | failed | cancelled
//!   │  ▲                    │  │          │
//!   │  └── withdrawn, late ─┘  └──────────┴──► (the node's word ends it, or the hub's on a revoked node)
//!   │  └── failed, and a retry is left ───┤
//!   │  └── lost, and on_lost is requeue ──┘
//!   └──► cancelled | failed (no node, deadline, restored)
//! ```
//! [`step`] is the only way from one state to the next; a task that stands for others has a step of its
//! own, [`crate::fan::step`]. It decides and returns [`Action`]s; whoever owns an effect performs it. A write
//! that names a superseded attempt, or comes after the end, is refused and changes nothing.

pub use crate::terms::{BadTerms, DEFAULT_BACKOFF_MS, MAX_BACKOFF_MS, MAX_PRIORITY, MAX_RETRIES, OnLost, Terms};
use crate::{NodeId, SpoolId, UnixMs};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum TaskState {
    Pending,
    AwaitingApproval,
    Assigned,
    Running,
    Succeeded,
    Failed,
    Cancelled,
}

impl TaskState {
    pub const ALL: [TaskState; 7] =
        [Self::Pending, Self::AwaitingApproval, Self::Assigned, Self::Running, Self::Succeeded, Self::Failed, Self::Cancelled];
    pub fn is_final(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Cancelled)
    }
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::AwaitingApproval => "awaiting_approval",
            Self::Assigned => "assigned",
            Self::Running => "running",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|s| s.as_str() == text)
    }
}

/// One execution of a task: the hub's incarnation in the high half, a count per task in the low half.
/// A restore raises the incarnation, so that a restored hub cannot hand out a number again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AttemptNo(pub u64);

impl AttemptNo {
    pub fn first(incarnation: u32) -> Self {
        Self((u64::from(incarnation) << 32) | 1)
    }
    pub fn next(self, incarnation: u32) -> Self {
        Self((u64::from(incarnation) << 32) | u64::from(self.ordinal() + 1))
    }
    /// Of the hub that handed it out.
    pub fn incarnation(self) -> u32 {
        (self.0 >> 32) as u32
    }
    /// 1, 2, 3 … per task: what people see.
    pub fn ordinal(self) -> u32 {
        self.0 as u32
    }
}

/// Why a task ended as it did. The texts are part of the API.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ReasonCode {
    Exit,
    Signal,
    Timeout,
    Lost,
    Limit,
    PolicyDenied,
    ApprovalDenied,
    ApprovalTimeout,
    BadRequest,
    NotFound,
    SkillError,
    NoNode,
    NodeRevoked,
    SpoolFull,
    Deadline,
    CancelledByUser,
    SessionClosed,
}

impl ReasonCode {
    pub const ALL: [ReasonCode; 17] = [
        Self::Exit,
        Self::Signal,
        Self::Timeout,
        Self::Lost,
        Self::Limit,
        Self::PolicyDenied,
        Self::ApprovalDenied,
        Self::ApprovalTimeout,
        Self::BadRequest,
        Self::NotFound,
        Self::SkillError,
        Self::NoNode,
        Self::NodeRevoked,
        Self::SpoolFull,
        Self::Deadline,
        Self::CancelledByUser,
        Self::SessionClosed,
    ];
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Exit => "exit",
            Self::Signal => "signal",
            Self::Timeout => "timeout",
            Self::Lost => "lost",
            Self::Limit => "limit",
            Self::PolicyDenied => "policy_denied",
            Self::ApprovalDenied => "approval_denied",
            Self::ApprovalTimeout => "approval_timeout",
            Self::BadRequest => "bad_request",
            Self::NotFound => "not_found",
            Self::SkillError => "skill_error",
            Self::NoNode => "no_node",
            Self::NodeRevoked => "node_revoked",
            Self::SpoolFull => "spool_full",
            Self::Deadline => "deadline",
            Self::CancelledByUser => "cancelled_by_user",
            Self::SessionClosed => "session_closed",
        }
    }
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|c| c.as_str() == text)
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reason {
    pub code: ReasonCode,
    pub detail: String,
}

impl Reason {
    pub fn new(code: ReasonCode, detail: impl Into<String>) -> Self {
        Self { code, detail: detail.into() }
    }
}

/// How an attempt ended, in the words of its node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The program ended by itself with this code.
    Exited(i32),
    /// A signal that neither a cancel nor a time-out sent.
    Signalled(i32),
    TimedOut,
    /// The tree was ended because a cancel asked for it.
    Cancelled,
    /// The skill gave its result without a process (echo).
    Done,
    /// Started, but the node cannot say how it ended.
    Lost {
        detail: String,
    },
    /// Nothing was started, and nothing ever will be for this attempt.
    NeverStarted(NeverStarted),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NeverStarted {
    /// `start_before` had passed: another attempt may follow.
    Late,
    /// A cancel came first.
    Cancelled,
    /// The node will not or cannot run this: the task fails with this reason.
    Refused(Reason),
}

/// An execution on a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attempt {
    pub no: AttemptNo,
    pub node: NodeId,
    /// Set once starting is permitted; the spool that may answer for it.
    pub granted: Option<SpoolId>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cancel {
    pub at: UnixMs,
    pub reason: ReasonCode,
}

/// The part of a task that changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Progress {
    pub state: TaskState,
    /// The newest attempt, kept after the end.
    pub attempt: Option<Attempt>,
    pub cancel: Option<Cancel>,
    pub reason: Option<Reason>,
    pub exit_code: Option<i32>,
    pub signal: Option<i32>,
    pub assigned_at: Option<UnixMs>,
    pub started_at: Option<UnixMs>,
    pub finished_at: Option<UnixMs>,
    /// Retries that were begun, and when the next attempt may come.
    pub retried: u32,
    pub retry_at: Option<UnixMs>,
}

impl Progress {
    pub fn new() -> Self {
        Self {
            state: TaskState::Pending,
            attempt: None,
            cancel: None,
            reason: None,
            exit_code: None,
            signal: None,
            assigned_at: None,
            started_at: None,
            finished_at: None,
            retried: 0,
            retry_at: None,
        }
    }
}

impl Default for Progress {
    fn default() -> Self {
        Self::new()
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The pool chose a node. With `granted` the node may start at once. An attempt that was not granted
    /// is moved by it, to its own node or another, in the same write.
    Assigned {
        attempt: AttemptNo,
        node: NodeId,
        granted: Option<SpoolId>,
    },
    /// The node had asked with a free slot, and may start now.
    Granted {
        attempt: AttemptNo,
        spool: SpoolId,
    },
    /// An ungranted attempt is taken back.
    Withdrawn {
        attempt: AttemptNo,
    },
    Started {
        attempt: AttemptNo,
    },
    Ended {
        attempt: AttemptNo,
        outcome: Outcome,
    },
    /// The node was revoked or removed and is never asked again: the hub's own word.
    NodeRevoked {
        attempt: AttemptNo,
    },
    /// The node has been away longer than the task's caller allows: the hub's own word.
    NodeSilent {
        attempt: AttemptNo,
    },
    CancelRequested {
        reason: ReasonCode,
    },
    /// The end that its caller set has come.
    DeadlinePassed,
    /// It waited for a node longer than its caller allowed; `detail` is the last waiting code.
    Expired {
        detail: String,
    },
    /// The hub was restored from a backup in which the task waited: since then it may have run.
    Restored,
    /// Every child of a fan-out has ended, so. Of its parent alone: see [`crate::fan`].
    ChildrenEnded {
        ends: Vec<crate::fan::ChildEnd>,
    },
}

impl Event {
    /// The word in the task's event history.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Assigned { .. } => "assigned",
            Self::Granted { .. } => "granted",
            Self::Withdrawn { .. } => "withdrawn",
            Self::Started { .. } => "started",
            Self::Ended { .. } => "ended",
            Self::NodeRevoked { .. } => "node_revoked",
            Self::NodeSilent { .. } => "node_silent",
            Self::CancelRequested { .. } => "cancel_requested",
            Self::DeadlinePassed => "deadline_passed",
            Self::Expired { .. } => "expired",
            Self::Restored => "restored",
            Self::ChildrenEnded { .. } => "children_ended",
        }
    }
    pub fn attempt(&self) -> Option<AttemptNo> {
        match self {
            Self::Assigned { attempt, .. }
            | Self::Granted { attempt, .. }
            | Self::Withdrawn { attempt }
            | Self::Started { attempt }
            | Self::NodeRevoked { attempt }
            | Self::NodeSilent { attempt }
            | Self::Ended { attempt, .. } => Some(*attempt),
            Self::CancelRequested { .. } | Self::DeadlinePassed | Self::Expired { .. } | Self::Restored | Self::ChildrenEnded { .. } => {
                None
            }
        }
    }
}

/// What must now happen; the caller owns the effect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Send the order (or the `Go`) for this attempt.
    Order { node: NodeId, attempt: AttemptNo },
    /// Tell the node to end this attempt.
    Cancel { node: NodeId, attempt: AttemptNo },
    /// The node's slot is free again.
    Release { node: NodeId },
    /// The task waits for a node again.
    Requeue,
    /// The state is final: tell whoever waits.
    Finished,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    #[error("the task has ended")]
    Final,
    #[error("a later attempt has taken over")]
    Superseded,
    #[error("this has been recorded already")]
    Repeated,
    #[error("the task is not in a state that allows this")]
    Illegal,
}

/// The detail of a loss of which nobody can say whether anything was started.
pub const MAYBE_RAN: &str = "maybe_ran";

/// What an attempt's end says of its task, when no retry follows. `cancel` is what was asked for before.
pub fn verdict(outcome: &Outcome, cancel: Option<&Cancel>) -> (TaskState, Option<Reason>) {
    use TaskState::{Failed, Succeeded};
    let failed = |code, detail: String| (Failed, Some(Reason::new(code, detail)));
    match outcome {
        Outcome::Exited(0) | Outcome::Done => (Succeeded, None),
        Outcome::Exited(code) => failed(ReasonCode::Exit, format!("exit code {code}")),
        Outcome::Signalled(n) => failed(ReasonCode::Signal, format!("signal {n}")),
        Outcome::TimedOut => failed(ReasonCode::Timeout, String::new()),
        // In doubt and no longer wanted.
        Outcome::Lost { .. } if cancel.is_some() => ended_by(cancel),
        Outcome::Lost { detail } => failed(ReasonCode::Lost, detail.clone()),
        Outcome::Cancelled | Outcome::NeverStarted(NeverStarted::Cancelled | NeverStarted::Late) => ended_by(cancel),
        Outcome::NeverStarted(NeverStarted::Refused(r)) => (Failed, Some(r.clone())),
    }
}

/// The end of what was asked to end: a deadline is a failure, all else a cancel.
fn ended_by(cancel: Option<&Cancel>) -> (TaskState, Option<Reason>) {
    match cancel {
        Some(c) if c.reason == ReasonCode::Deadline => (TaskState::Failed, Some(Reason::new(c.reason, ""))),
        Some(c) => (TaskState::Cancelled, Some(Reason::new(c.reason, ""))),
        // Nobody asked the hub: the machine's own owner did.
        None => (TaskState::Cancelled, Some(Reason::new(ReasonCode::CancelledByUser, "ended on the machine by its owner"))),
    }
}

/// Is this what `on_lost` speaks of?
pub fn is_loss(code: ReasonCode) -> bool {
    matches!(code, ReasonCode::Lost | ReasonCode::NodeRevoked)
}

/// May what ended so be run again, if its caller asked for that?
fn retriable(code: ReasonCode) -> bool {
    use ReasonCode::*;
    matches!(code, Exit | Signal | Timeout | Limit | SkillError | NodeRevoked)
}

/// Decides one transition. Pure: the same arguments give the same answer.
pub fn step(terms: &Terms, before: &Progress, event: &Event, now: UnixMs) -> Result<(Progress, Vec<Action>), Refused> {
    use TaskState::*;
    if before.state.is_final() {
        return Err(Refused::Final);
    }
    let mut p = before.clone();
    if let (Some(named), false) = (event.attempt(), matches!(event, Event::Assigned { .. })) {
        match &p.attempt {
            Some(a) if a.no == named => {}
            Some(_) => return Err(Refused::Superseded),
            None => return Err(Refused::Illegal),
        }
        if p.state == Pending {
            return Err(Refused::Superseded);
        }
    }
    match event {
        Event::Assigned { attempt, node, granted } => {
            let left = ungranted(&p).cloned();
            if p.state != Pending && left.is_none() {
                return Err(Refused::Illegal);
            }
            if p.attempt.as_ref().is_some_and(|a| a.no >= *attempt) {
                return Err(Refused::Superseded);
            }
            p.state = Assigned;
            p.attempt = Some(Attempt { no: *attempt, node: *node, granted: *granted });
            p.assigned_at = Some(now);
            p.retry_at = None;
            let mut actions = left.map_or(vec![], take_back);
            actions.push(Action::Order { node: *node, attempt: *attempt });
            Ok((p, actions))
        }
        Event::Granted { spool, .. } => {
            let a = p.attempt.as_mut().expect("checked above");
            match a.granted {
                Some(s) if s == *spool => return Err(Refused::Repeated),
                Some(_) => return Err(Refused::Illegal),
                None => a.granted = Some(*spool),
            }
            let action = Action::Order { node: a.node, attempt: a.no };
            Ok((p, vec![action]))
        }
        Event::Withdrawn { .. } => {
            let mut actions = take_back(ungranted(&p).ok_or(Refused::Illegal)?.clone());
            p.state = Pending;
            p.assigned_at = None;
            actions.push(Action::Requeue);
            Ok((p, actions))
        }
        Event::Started { .. } => {
            if p.state == Running {
                return Err(Refused::Repeated);
            }
            if p.state != Assigned || p.attempt.as_ref().is_none_or(|a| a.granted.is_none()) {
                return Err(Refused::Illegal);
            }
            p.state = Running;
            p.started_at = Some(now);
            Ok((p, vec![]))
        }
        // What was not permitted to start cannot have run.
        Event::Ended { outcome, .. } if ungranted(&p).is_some() && !matches!(outcome, Outcome::NeverStarted(_)) => Err(Refused::Illegal),
        Event::Ended { outcome, .. } => {
            let node = p.attempt.as_ref().expect("checked above").node;
            let late = matches!(outcome, Outcome::NeverStarted(NeverStarted::Late));
            if late && p.cancel.is_none() {
                if p.state != Assigned {
                    return Err(Refused::Illegal);
                }
                p.state = Pending;
                p.assigned_at = None;
                return Ok((p, vec![Action::Release { node }, Action::Requeue]));
            }
            let (state, reason) = verdict(outcome, p.cancel.as_ref());
            if let Some(again) = again(terms, &p, reason.as_ref(), now) {
                return Ok((again, vec![Action::Release { node }, Action::Requeue]));
            }
            p.exit_code = if let Outcome::Exited(c) = outcome { Some(*c) } else { None };
            p.signal = if let Outcome::Signalled(n) = outcome { Some(*n) } else { None };
            end(&mut p, state, reason, now);
            Ok((p, vec![Action::Release { node }, Action::Finished]))
        }
        Event::NodeRevoked { .. } | Event::NodeSilent { .. } => {
            let a = p.attempt.as_ref().expect("checked above");
            let node = a.node;
            let silent = matches!(event, Event::NodeSilent { .. });
            if silent && a.granted.is_none() {
                // Nothing can have begun: it is withdrawn, not lost.
                return Err(Refused::Illegal);
            }
            let (state, reason) = match &p.cancel {
                Some(_) => ended_by(p.cancel.as_ref()),
                None if silent => (Failed, Some(Reason::new(ReasonCode::Lost, MAYBE_RAN))),
                None => (Failed, Some(Reason::new(ReasonCode::NodeRevoked, ""))),
            };
            // It may have come back in this very moment; a revoked one has lost its link already.
            let mut actions = if silent { vec![Action::Cancel { node, attempt: a.no }] } else { vec![] };
            actions.push(Action::Release { node });
            if let Some(again) = again(terms, &p, reason.as_ref(), now) {
                actions.push(Action::Requeue);
                return Ok((again, actions));
            }
            end(&mut p, state, reason, now);
            actions.push(Action::Finished);
            Ok((p, actions))
        }
        Event::CancelRequested { reason } => stop(p, *reason, now),
        Event::DeadlinePassed => stop(p, ReasonCode::Deadline, now),
        Event::Expired { detail } => {
            let left = ungranted(&p).cloned();
            if p.state != Pending && left.is_none() {
                return Err(Refused::Illegal);
            }
            end(&mut p, Failed, Some(Reason::new(ReasonCode::NoNode, detail.clone())), now);
            let mut actions = left.map_or(vec![], take_back);
            actions.push(Action::Finished);
            Ok((p, actions))
        }
        Event::Restored => {
            // What was told ahead may have been granted since, as what waited may have been assigned.
            if !matches!(p.state, Pending | AwaitingApproval) && ungranted(&p).is_none() {
                return Err(Refused::Illegal);
            }
            end(&mut p, Failed, Some(Reason::new(ReasonCode::Lost, MAYBE_RAN)), now);
            Ok((p, vec![Action::Finished]))
        }
        Event::ChildrenEnded { .. } => Err(Refused::Illegal),
    }
}

/// The attempt that a node was told of and may not start yet.
fn ungranted(p: &Progress) -> Option<&Attempt> {
    p.attempt.as_ref().filter(|a| p.state == TaskState::Assigned && a.granted.is_none())
}

/// Its node forgets an attempt that was not granted; a late word about it is not waited for.
fn take_back(a: Attempt) -> Vec<Action> {
    vec![Action::Cancel { node: a.node, attempt: a.no }, Action::Release { node: a.node }]
}

/// Asks for the end: waiting work has it at once, granted work when its node has answered.
fn stop(mut p: Progress, reason: ReasonCode, now: UnixMs) -> Result<(Progress, Vec<Action>), Refused> {
    if p.cancel.is_some() {
        return Err(Refused::Repeated);
    }
    p.cancel = Some(Cancel { at: now, reason });
    let held = p.attempt.clone().filter(|_| matches!(p.state, TaskState::Assigned | TaskState::Running));
    match held {
        Some(a) if a.granted.is_some() => Ok((p, vec![Action::Cancel { node: a.node, attempt: a.no }])),
        other => {
            let (state, reason) = ended_by(p.cancel.as_ref());
            end(&mut p, state, reason, now);
            let mut actions = other.map_or(vec![], take_back);
            actions.push(Action::Finished);
            Ok((p, actions))
        }
    }
}

/// The task as it waits for its next attempt, when one is left and nobody wants its end.
fn again(terms: &Terms, p: &Progress, reason: Option<&Reason>, now: UnixMs) -> Option<Progress> {
    let code = reason?.code;
    let (pause, retried) = if p.cancel.is_some() {
        return None;
    } else if terms.on_lost == OnLost::Requeue && is_loss(code) {
        (terms.pause_after_loss_ms(p.attempt.as_ref()?.no.ordinal()), p.retried)
    } else if p.retried < terms.retries && retriable(code) {
        (terms.pause_ms(p.retried), p.retried + 1)
    } else {
        return None;
    };
    Some(Progress {
        state: TaskState::Pending,
        assigned_at: None,
        started_at: None,
        retry_at: Some(now.saturating_add(pause as i64)),
        retried,
        ..p.clone()
    })
}

fn end(p: &mut Progress, state: TaskState, reason: Option<Reason>, now: UnixMs) {
    p.state = state;
    p.reason = reason;
    p.finished_at = Some(now);
    p.retry_at = None;
}

#[cfg(test)]
mod tests;

//! The life of an agent: a supervised process, run after run.
//!
//! ```text
//! starting ──► running ──► exited | failed
//!   │  ▲          │  │
//!   │  └─ due ── backing_off
//!   └───────┬─────┘  │
//!        stopping ──►└──► killed
//! ```
//! Each run of a process is one task, whose id is decided in the step that begins the run: whoever makes the task
//! makes it under that id, so that a run exists once however often its beginning is tried. [`step`] is the
//! only way from one state to the next.

use crate::{NodeId, TaskId, UnixMs};

/// The pause before the first restart, unless the caller says otherwise.
pub const DEFAULT_BACKOFF_MS: u64 = 1000;
/// The longest first pause that can be asked for.
pub const MAX_BACKOFF_MS: u64 = 3_600_000;
/// Doubling ends here, or at the first pause where that is longer.
pub const MAX_PAUSE_MS: u64 = 300_000;
/// The most restarts in a row that can be asked for; 0 is without a bound.
pub const MAX_RESTARTS: u32 = 1_000_000;
/// Who ran so long was well: what comes after it counts as the first restart.
pub const HEALTHY_MS: i64 = 60_000;

macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($(#[$of:meta])* $variant:ident = $text:literal),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum $name { $($(#[$of])* $variant),* }
        impl $name {
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];
            pub fn as_str(self) -> &'static str { match self { $(Self::$variant => $text),* } }
            pub fn parse(text: &str) -> Option<Self> { match text { $($text => Some(Self::$variant),)* _ => None } }
        }
    };
}

words! {
    Status {
        /// Its run is decided, and waits for a node or for its start there.
        Starting = "starting",
        Running = "running",
        BackingOff = "backing_off",
        /// A kill was asked for, and its process may still run.
        Stopping = "stopping",
        /// Its process ended by itself, with code 0.
        Exited = "exited",
        Failed = "failed",
        Killed = "killed",
    }
}

impl Status {
    pub fn is_final(self) -> bool {
        matches!(self, Self::Exited | Self::Failed | Self::Killed)
    }
}

words! {
    Kind {
        /// Runs nowhere: it is there until it is killed.
        Basic = "basic",
        Process = "process",
    }
}

words! {
    /// After which ends a process is run again.
    Policy { Never = "never", OnFailure = "on_failure", Always = "always" }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Restart {
    pub policy: Policy,
    /// Restarts in a row, without a run between that was well for [`HEALTHY_MS`]; 0 is without a bound.
    pub max: u32,
    pub backoff_ms: u64,
}

impl Default for Restart {
    fn default() -> Self {
        Self { policy: Policy::Never, max: 0, backoff_ms: DEFAULT_BACKOFF_MS }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadRestart {
    #[error("restart.max is at most {MAX_RESTARTS}; 0 is without a bound")]
    Max,
    #[error("restart.backoff_ms is at most {MAX_BACKOFF_MS} (an hour)")]
    Backoff,
}

impl Restart {
    pub fn validate(&self) -> Result<(), BadRestart> {
        match () {
            () if self.max > MAX_RESTARTS => Err(BadRestart::Max),
            () if self.backoff_ms > MAX_BACKOFF_MS => Err(BadRestart::Backoff),
            () => Ok(()),
        }
    }
    /// The pause before the restart that follows `in_a_row` others.
    pub fn pause_ms(&self, in_a_row: u32) -> u64 {
        let doubled = u128::from(self.backoff_ms) << in_a_row.min(32);
        doubled.min(u128::from(MAX_PAUSE_MS.max(self.backoff_ms))) as u64
    }
    fn is_spent(&self, in_a_row: u32) -> bool {
        self.max > 0 && in_a_row >= self.max
    }
}

/// One run of a process: 1, 2, 3 … per agent, and the task that it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    pub no: u32,
    pub task: TaskId,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kill {
    pub at: UnixMs,
    /// At once, without time to end by itself.
    pub force: bool,
}

/// The part of an agent that changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Life {
    pub status: Status,
    /// The newest; none of an agent that runs nowhere.
    pub run: Option<Run>,
    /// Where it runs, or ran last.
    pub node: Option<NodeId>,
    /// That were begun.
    pub restarts: u32,
    /// Of them, those since a run was well.
    pub in_a_row: u32,
    pub kill: Option<Kill>,
    /// Of the newest run.
    pub started_at: Option<UnixMs>,
    /// When the pause is over.
    pub next_at: Option<UnixMs>,
    pub ended_at: Option<UnixMs>,
    /// How its newest run ended, or why none may follow.
    pub reason: Option<String>,
}

impl Life {
    pub fn basic(now: UnixMs) -> Self {
        Self { status: Status::Running, started_at: Some(now), ..Self::process(None) }
    }
    /// Its first run is decided; [`Action::Begin`] is still to be performed.
    pub fn begun(task: TaskId) -> Self {
        Self::process(Some(Run { no: 1, task }))
    }
    fn process(run: Option<Run>) -> Self {
        Self {
            status: Status::Starting,
            run,
            node: None,
            restarts: 0,
            in_a_row: 0,
            kill: None,
            started_at: None,
            next_at: None,
            ended_at: None,
            reason: None,
        }
    }
    fn is_of(&self, task: TaskId) -> bool {
        self.run.is_some_and(|run| run.task == task)
    }
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// By itself, with code 0.
    Clean,
    Failure(String),
    /// Trying again would bring the same, or might make two of it.
    Final(String),
    /// Its task was cancelled, by a person or by the machine's owner.
    Cancelled,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    Started {
        task: TaskId,
        node: Option<NodeId>,
    },
    /// Its task waits for a node again: nothing had begun.
    Waits {
        task: TaskId,
    },
    Ended {
        task: TaskId,
        end: End,
    },
    /// The pause is over; `task` is the next run.
    Due {
        task: TaskId,
    },
    /// The run that was decided may not be begun.
    Barred {
        why: String,
    },
    KillAsked {
        force: bool,
    },
}

/// What must now happen; the caller owns the effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Make the task of this run, under its id.
    Begin(Run),
    /// Have the process ended.
    Stop {
        task: TaskId,
        force: bool,
    },
    /// Come back then.
    Rest {
        until: UnixMs,
    },
    Over,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    #[error("the agent has ended")]
    Final,
    #[error("this is about another run")]
    Superseded,
    #[error("this has been recorded already")]
    Repeated,
    #[error("the agent is not in a state that allows this")]
    Illegal,
}

/// Decides one transition. Pure: the same arguments give the same answer.
pub fn step(restart: &Restart, before: &Life, event: &Event, now: UnixMs) -> Result<(Life, Vec<Action>), Refused> {
    use Status::*;
    if before.status.is_final() {
        return Err(Refused::Final);
    }
    let mut life = before.clone();
    if let Event::Started { task, .. } | Event::Waits { task } | Event::Ended { task, .. } = event
        && (!life.is_of(*task) || life.status == BackingOff)
    {
        return Err(Refused::Superseded);
    }
    match event {
        Event::Started { node, .. } => {
            if life.status != Starting {
                return Err(Refused::Repeated);
            }
            (life.status, life.node, life.started_at) = (Running, *node, Some(now));
            Ok((life, vec![]))
        }
        Event::Waits { .. } => {
            if life.status != Running {
                return Err(Refused::Repeated);
            }
            (life.status, life.started_at) = (Starting, None);
            Ok((life, vec![]))
        }
        Event::Ended { end, .. } => Ok(ended(restart, life, end, now)),
        Event::Due { task } => {
            let Some(at) = life.next_at.filter(|_| life.status == BackingOff) else { return Err(Refused::Repeated) };
            if now < at {
                return Err(Refused::Illegal);
            }
            // Nobody inherits a program that begins again and again.
            if restart.policy == Policy::Never {
                return Ok(over(life, Failed, Some("its owner has left".into()), now));
            }
            let run = Run { no: life.run.map_or(0, |run| run.no).saturating_add(1), task: *task };
            life.restarts = life.restarts.saturating_add(1);
            life.in_a_row = life.in_a_row.saturating_add(1);
            (life.status, life.run, life.started_at, life.next_at) = (Starting, Some(run), None, None);
            Ok((life, vec![Action::Begin(run)]))
        }
        Event::Barred { why } => match life.status {
            Starting | BackingOff => Ok(over(life, Failed, Some(why.clone()), now)),
            _ => Err(Refused::Illegal),
        },
        Event::KillAsked { force } => {
            let known = life.kill;
            if known.is_some_and(|kill| kill.force || !force) {
                return Err(Refused::Repeated);
            }
            life.kill = Some(Kill { at: known.map_or(now, |kill| kill.at), force: *force });
            match life.run.filter(|_| life.status != BackingOff) {
                None => Ok(over(life, Killed, None, now)),
                Some(run) => {
                    life.status = Stopping;
                    Ok((life, vec![Action::Stop { task: run.task, force: *force }]))
                }
            }
        }
    }
}

fn ended(restart: &Restart, mut life: Life, end: &End, now: UnixMs) -> (Life, Vec<Action>) {
    if life.kill.is_some() {
        return over(life, Status::Killed, None, now);
    }
    let (again, last, reason) = match end {
        End::Cancelled => (false, Status::Killed, Some("the task of its run was cancelled".to_owned())),
        End::Final(why) => (false, Status::Failed, Some(why.clone())),
        End::Clean => (restart.policy == Policy::Always, Status::Exited, None),
        End::Failure(why) => (restart.policy != Policy::Never, Status::Failed, Some(why.clone())),
    };
    if life.started_at.is_some_and(|at| now.saturating_sub(at) >= HEALTHY_MS) {
        life.in_a_row = 0;
    }
    if !again {
        return over(life, last, reason, now);
    }
    if restart.is_spent(life.in_a_row) {
        let spent = format!("restarted {} times in a row, which is restart.max", life.in_a_row);
        let reason = reason.map_or(spent.clone(), |why| format!("{why}; {spent}"));
        return over(life, last, Some(reason), now);
    }
    let until = now.saturating_add(restart.pause_ms(life.in_a_row) as i64);
    (life.status, life.next_at, life.reason) = (Status::BackingOff, Some(until), reason);
    (life, vec![Action::Rest { until }])
}

fn over(mut life: Life, status: Status, reason: Option<String>, now: UnixMs) -> (Life, Vec<Action>) {
    (life.status, life.reason, life.next_at, life.ended_at) = (status, reason, None, Some(now));
    (life, vec![Action::Over])
}

/// What the agent's log says of a step; `life` is as it is after it.
pub fn words(event: &Event, life: &Life) -> Option<String> {
    let run = life.run.map_or(0, |run| run.no);
    let reason = || life.reason.clone().unwrap_or_else(|| "exit code 0".into());
    match event {
        Event::Started { node, .. } => Some(match node {
            Some(node) => format!("run {run} has started on {node}"),
            None => format!("run {run} has started"),
        }),
        Event::Waits { .. } => Some(format!("run {run} waits for a node again")),
        Event::Ended { .. } | Event::Barred { .. } => Some(match (life.status, life.next_at) {
            (Status::BackingOff, Some(_)) => format!("run {run} ended: {}; it is run again", reason()),
            (status, _) => match &life.reason {
                Some(why) => format!("{}: {why}", status.as_str()),
                None => status.as_str().to_owned(),
            },
        }),
        Event::Due { .. } => None,
        Event::KillAsked { force } => Some(if *force { "killed by force".into() } else { "killed".into() }),
    }
}

#[cfg(test)]
mod tests;

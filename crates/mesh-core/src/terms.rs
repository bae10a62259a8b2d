//! What a caller asks of when, where and how often a task runs, and within which bounds.

use crate::UnixMs;
use crate::select::{BadSelector, Selector};

/// A priority lies between this and its negative.
pub const MAX_PRIORITY: i32 = 100;
pub const MAX_RETRIES: u32 = 100;
/// The longest pause before a retry, asked for or reached by doubling.
pub const MAX_BACKOFF_MS: u64 = 3_600_000;
/// The first pause of who asks for retries and names none.
pub const DEFAULT_BACKOFF_MS: u64 = 500;

/// How long the node of granted work may be away, when its caller names no time: seconds.
pub const WAIT_FOR_NODE_SECS: u64 = 3600;
/// The same for who would rather fail or run again: longer than a node takes to come back after any outage.
pub const GIVE_UP_NODE_SECS: u64 = 60;

/// What becomes of granted work that is lost: its node says that it cannot tell how it went, or stays
/// away too long.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum OnLost {
    /// A node that is away is waited for; then it fails.
    #[default]
    Wait,
    /// It fails.
    Fail,
    /// It is run again, though it may have run.
    Requeue,
}

impl OnLost {
    pub const ALL: [Self; 3] = [Self::Wait, Self::Fail, Self::Requeue];
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Wait => "wait",
            Self::Fail => "fail",
            Self::Requeue => "requeue",
        }
    }
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|o| o.as_str() == text)
    }
}

/// Fixed at acceptance and sealed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Terms {
    /// Which nodes will do; none asks for nothing more than what the caller may use.
    pub select: Option<Selector>,
    /// The higher waits in front of the lower.
    pub priority: i32,
    /// It is not started before.
    pub not_before: Option<UnixMs>,
    /// It is ended then, wherever it is.
    pub deadline: Option<UnixMs>,
    /// How often it is run again after an attempt that failed.
    pub retries: u32,
    /// The pause before the first of them; it doubles each time.
    pub backoff_ms: u64,
    pub on_lost: OnLost,
    /// How long a node may be away before its granted work counts as lost; 0 is for ever, None what
    /// [`Terms::lost_after_secs`] says.
    pub lost_after: Option<u64>,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadTerms {
    #[error("priority is -{MAX_PRIORITY} to {MAX_PRIORITY}, not {0}")]
    Priority(i32),
    #[error("retries.max is at most {MAX_RETRIES}, not {0}")]
    Retries(u32),
    #[error("retries.backoff_ms is at most {MAX_BACKOFF_MS} (an hour), not {0}")]
    Backoff(u64),
    #[error("the deadline has passed")]
    DeadlinePassed,
    #[error("the deadline lies before not_before, so the task could never run")]
    DeadlineFirst,
    #[error("select: {0}")]
    Select(#[from] BadSelector),
}

impl BadTerms {
    /// The word in a problem; part of the API.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Priority(_) => "bad_priority",
            Self::Retries(_) | Self::Backoff(_) => "bad_retries",
            Self::DeadlinePassed | Self::DeadlineFirst => "bad_deadline",
            Self::Select(_) => "bad_select",
        }
    }
}

impl Terms {
    pub fn validate(&self, now: UnixMs) -> Result<(), BadTerms> {
        if !(-MAX_PRIORITY..=MAX_PRIORITY).contains(&self.priority) {
            return Err(BadTerms::Priority(self.priority));
        }
        if self.retries > MAX_RETRIES {
            return Err(BadTerms::Retries(self.retries));
        }
        if self.backoff_ms > MAX_BACKOFF_MS {
            return Err(BadTerms::Backoff(self.backoff_ms));
        }
        if let Some(deadline) = self.deadline {
            if deadline <= now {
                return Err(BadTerms::DeadlinePassed);
            }
            if self.not_before.is_some_and(|start| deadline <= start) {
                return Err(BadTerms::DeadlineFirst);
            }
        }
        Ok(self.select.as_ref().map_or(Ok(()), Selector::validate)?)
    }

    /// After how many seconds without its node granted work counts as lost; None is never.
    pub fn lost_after_secs(&self) -> Option<u64> {
        let secs = self.lost_after.unwrap_or(match self.on_lost {
            OnLost::Wait => WAIT_FOR_NODE_SECS,
            OnLost::Fail | OnLost::Requeue => GIVE_UP_NODE_SECS,
        });
        (secs > 0).then_some(secs)
    }

    /// The pause before work that was lost is run again, after so many attempts.
    /// It doubles like that of retries: what brings its node down must not go through all of them at once.
    pub fn pause_after_loss_ms(&self, attempts: u32) -> u64 {
        let first = Self { backoff_ms: if self.backoff_ms > 0 { self.backoff_ms } else { DEFAULT_BACKOFF_MS }, ..Self::default() };
        first.pause_ms(attempts.saturating_sub(1))
    }

    /// The pause before the retry that follows `retried` others.
    pub fn pause_ms(&self, retried: u32) -> u64 {
        // Twenty-two doublings of one millisecond are more than an hour.
        let doubled = u128::from(self.backoff_ms) << retried.min(32);
        doubled.min(u128::from(MAX_BACKOFF_MS)) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds() {
        let now = 1000;
        let with = |change: fn(&mut Terms)| {
            let mut t = Terms::default();
            change(&mut t);
            t.validate(now).map_err(|e| e.code())
        };
        assert_eq!(with(|_| {}), Ok(()));
        assert_eq!(with(|t| (t.priority, t.retries, t.backoff_ms) = (-100, 100, 3_600_000)), Ok(()));
        assert_eq!(with(|t| (t.not_before, t.deadline) = (Some(1), Some(1001))), Ok(()));
        assert_eq!(with(|t| t.priority = 101), Err("bad_priority"));
        assert_eq!(with(|t| t.priority = i32::MIN), Err("bad_priority"));
        assert_eq!(with(|t| t.retries = 101), Err("bad_retries"));
        assert_eq!(with(|t| t.backoff_ms = 3_600_001), Err("bad_retries"));
        assert_eq!(with(|t| t.deadline = Some(1000)), Err("bad_deadline"));
        assert_eq!(with(|t| (t.not_before, t.deadline) = (Some(2000), Some(2000))), Err("bad_deadline"));
        assert_eq!(with(|t| t.select = Some(Selector { skills: ["".to_owned()].into(), ..Default::default() })), Err("bad_select"));
    }

    #[test]
    fn how_long_a_node_may_be_away() {
        let secs = |on_lost, lost_after| Terms { on_lost, lost_after, ..Terms::default() }.lost_after_secs();
        assert_eq!(secs(OnLost::Wait, None), Some(3600));
        assert_eq!(secs(OnLost::Fail, None), Some(60));
        assert_eq!(secs(OnLost::Requeue, None), Some(60));
        for kind in OnLost::ALL {
            assert_eq!(secs(kind, Some(7)), Some(7));
            assert_eq!(secs(kind, Some(0)), None);
            assert_eq!(OnLost::parse(kind.as_str()), Some(kind));
        }
        let pauses = |backoff_ms| [1, 2, 3, 40].map(|n| Terms { backoff_ms, ..Terms::default() }.pause_after_loss_ms(n));
        assert_eq!(pauses(0), [500, 1000, 2000, 3_600_000]);
        assert_eq!(pauses(7), [7, 14, 28, 3_600_000]);
    }

    #[test]
    fn pauses_double_to_an_hour() {
        let pauses = |backoff_ms| {
            let t = Terms { backoff_ms, ..Terms::default() };
            [0, 1, 2, 12, 13, 63, 64, 100].map(|n| t.pause_ms(n))
        };
        assert_eq!(pauses(500), [500, 1000, 2000, 2_048_000, 3_600_000, 3_600_000, 3_600_000, 3_600_000]);
        assert_eq!(pauses(0), [0; 8]);
        assert_eq!(pauses(3_600_000), [3_600_000; 8]);
    }
}

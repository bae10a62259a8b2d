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

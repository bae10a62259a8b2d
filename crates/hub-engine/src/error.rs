//! The few kinds of failure that a door can tell its caller.

use crate::ports::StoreError;
use std::time::Duration;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{0}")]
    Unauthenticated(&'static str),
    #[error("{0}")]
    Forbidden(String),
    /// Also for what the caller may not know of.
    #[error("there is no such {0}, or you may not see it")]
    NotFound(&'static str),
    #[error("{detail}")]
    Conflict { code: &'static str, detail: String },
    /// Understood, but it makes no sense.
    #[error("{detail}")]
    Invalid { code: &'static str, detail: String },
    /// Named by the contract and not built yet.
    #[error("{0} is not built yet")]
    NotYet(String),
    /// Too often; how long until the next may come.
    #[error("{detail}; try again in {} s", secs(*wait))]
    RateLimited { detail: &'static str, wait: Duration },
    #[error("{detail}")]
    Unavailable { code: &'static str, detail: String },
    #[error("{0}")]
    Store(#[from] StoreError),
}

impl Error {
    pub fn invalid(code: &'static str, detail: impl ToString) -> Self {
        Self::Invalid { code, detail: detail.to_string() }
    }
    pub fn conflict(code: &'static str, detail: impl ToString) -> Self {
        Self::Conflict { code, detail: detail.to_string() }
    }
}

/// Whole seconds after which a wait is over, for people and `Retry-After`.
pub fn secs(wait: Duration) -> u64 {
    wait.as_secs() + u64::from(wait.subsec_nanos() > 0)
}

pub type Result<T> = std::result::Result<T, Error>;

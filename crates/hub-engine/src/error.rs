//! The few kinds of failure that a door can tell its caller.

use crate::ports::StoreError;

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

pub type Result<T> = std::result::Result<T, Error>;

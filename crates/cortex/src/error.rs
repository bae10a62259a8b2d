//! What can go wrong between a caller and the hub.

use crate::rest::Problem;
use std::error::Error as _;

/// Why a call has no answer that can be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The hub answered with `application/problem+json` (RFC 9457).
    #[error("{}", describe(problem))]
    Problem {
        problem: Box<Problem>,
        /// Seconds, from the header of that name.
        retry_after: Option<u64>,
    },
    /// No connection came about: nothing has been sent.
    #[error("cannot reach {url}: {reason}")]
    Unreachable { url: String, reason: String, tls: bool },
    /// The connection broke or went silent; what was asked for may have been done.
    #[error("the connection to {url} broke: {reason}")]
    Interrupted { url: String, reason: String },
    /// The other side answered, but not as a cortex hub does.
    #[error("{call}: {reason}")]
    Protocol { call: String, reason: String, status: Option<u16> },
    /// A URL or credential that cannot be used at all.
    #[error("{0}")]
    Setting(String),
    /// The caller's [`crate::TokenStore`] failed.
    #[error("the stored log-in cannot be used: {0}")]
    Store(#[source] std::io::Error),
}

fn describe(p: &Problem) -> String {
    let text = if p.detail.is_empty() { &p.title } else { &p.detail };
    format!("{text} ({} {})", p.status, p.code)
}

impl Error {
    /// The HTTP status, when there was one.
    pub fn status(&self) -> Option<u16> {
        match self {
            Self::Problem { problem, .. } => Some(problem.status),
            Self::Protocol { status, .. } => *status,
            _ => None,
        }
    }
    /// The machine-readable code of a problem, such as `not_yet`.
    pub fn code(&self) -> Option<&str> {
        match self {
            Self::Problem { problem, .. } => Some(&problem.code),
            _ => None,
        }
    }
    /// True where the same call may succeed later without anybody changing anything.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Unreachable { tls, .. } => !tls,
            Self::Interrupted { .. } => true,
            Self::Problem { .. } | Self::Protocol { .. } => self.status().is_some_and(|s| s == 408 || s == 429 || (s >= 500 && s != 501)),
            Self::Setting(_) | Self::Store(_) => false,
        }
    }
    /// The error as a problem document. One that the hub did not write has status 0.
    pub fn to_problem(&self) -> Problem {
        let (code, title) = match self {
            Self::Problem { problem, .. } => return (**problem).clone(),
            Self::Unreachable { .. } => ("unreachable", "The hub cannot be reached"),
            Self::Interrupted { .. } => ("interrupted", "The connection broke"),
            Self::Protocol { .. } => ("protocol", "The answer is not that of a cortex hub"),
            Self::Setting(_) => ("bad_setting", "A setting cannot be used"),
            Self::Store(_) => ("bad_store", "The stored log-in cannot be used"),
        };
        Problem {
            kind: "about:blank".into(),
            title: title.into(),
            status: self.status().unwrap_or(0),
            detail: self.to_string(),
            code: code.into(),
            request_id: String::new(),
        }
    }
    /// Names a failure of the HTTP client; `url` is the hub's.
    pub(crate) fn transport(url: &str, e: reqwest::Error) -> Self {
        let mut reason = e.to_string();
        let mut tls = false;
        let mut cause = e.source();
        while let Some(c) = cause {
            reason = c.to_string();
            tls |= reason.contains("certificate");
            cause = c.source();
        }
        if e.is_timeout() {
            reason = "no answer in time".to_owned();
        }
        let url = url.to_owned();
        if e.is_connect() { Self::Unreachable { url, reason, tls } } else { Self::Interrupted { url, reason } }
    }
}

//! Between the wire and the words of `mesh-core`, both ways.

use crate::node;
use mesh_core::UnixMs;
use mesh_core::input::Fate;
use mesh_core::output::Digests;
use mesh_core::task::{NeverStarted, Outcome, Reason, ReasonCode};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// A message whose fields do not make sense together.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {problem}")]
pub struct BadMessage {
    pub field: &'static str,
    pub problem: String,
}

impl BadMessage {
    pub fn new(field: &'static str, problem: impl std::fmt::Display) -> Self {
        Self { field, problem: problem.to_string() }
    }
}

/// Parses an id, naming the field in the error.
pub fn id<T: std::str::FromStr<Err = mesh_core::BadId>>(field: &'static str, text: &str) -> Result<T, BadMessage> {
    text.parse().map_err(|e| BadMessage::new(field, e))
}

/// Reads a byte field of a fixed length.
pub fn fixed<const N: usize>(field: &'static str, bytes: &[u8]) -> Result<[u8; N], BadMessage> {
    bytes.try_into().map_err(|_| BadMessage::new(field, format!("{N} bytes are expected, not {}", bytes.len())))
}

/// Reads the digests of a result: both, or none.
pub fn digests(r: &node::TaskResult) -> Result<Option<Digests>, BadMessage> {
    if r.stdout_sha256.is_empty() && r.stderr_sha256.is_empty() {
        return Ok(None);
    }
    let (stdout, stderr) = (fixed("result.stdout_sha256", &r.stdout_sha256)?, fixed("result.stderr_sha256", &r.stderr_sha256)?);
    Ok(Some(Digests { stdout, stderr }))
}

impl From<&Outcome> for node::Outcome {
    fn from(o: &Outcome) -> Self {
        use node::outcome::Kind;
        let (kind, code, reason_code, detail) = match o {
            Outcome::Exited(c) => (Kind::Exited, *c, "", ""),
            Outcome::Signalled(s) => (Kind::Signalled, *s, "", ""),
            Outcome::TimedOut => (Kind::TimedOut, 0, "", ""),
            Outcome::Cancelled => (Kind::Cancelled, 0, "", ""),
            Outcome::Done => (Kind::Done, 0, "", ""),
            Outcome::Lost { detail } => (Kind::Lost, 0, "", detail.as_str()),
            Outcome::NeverStarted(NeverStarted::Late) => (Kind::Late, 0, "", ""),
            Outcome::NeverStarted(NeverStarted::Cancelled) => (Kind::CancelledBeforeStart, 0, "", ""),
            Outcome::NeverStarted(NeverStarted::Refused(r)) => (Kind::Refused, 0, r.code.as_str(), r.detail.as_str()),
        };
        Self { kind: kind.into(), code, reason_code: reason_code.into(), detail: detail.into() }
    }
}

impl TryFrom<&node::Outcome> for Outcome {
    type Error = BadMessage;
    fn try_from(o: &node::Outcome) -> Result<Self, BadMessage> {
        use node::outcome::Kind;
        // A node's words are bounded before they are kept.
        let detail: String = o.detail.chars().take(1024).collect();
        Ok(match o.kind() {
            Kind::Unspecified => return Err(BadMessage::new("outcome.kind", "unknown")),
            Kind::Exited => Self::Exited(o.code),
            Kind::Signalled => Self::Signalled(o.code),
            Kind::TimedOut => Self::TimedOut,
            Kind::Cancelled => Self::Cancelled,
            Kind::Done => Self::Done,
            Kind::Lost => Self::Lost { detail },
            Kind::Late => Self::NeverStarted(NeverStarted::Late),
            Kind::CancelledBeforeStart => Self::NeverStarted(NeverStarted::Cancelled),
            Kind::Refused => {
                // What a node may say of work that it did not start; the rest is the hub's to decide.
                let code = match ReasonCode::parse(&o.reason_code) {
                    Some(
                        c @ (ReasonCode::PolicyDenied
                        | ReasonCode::BadRequest
                        | ReasonCode::NotFound
                        | ReasonCode::SkillError
                        | ReasonCode::SpoolFull
                        | ReasonCode::Limit),
                    ) => c,
                    _ => return Err(BadMessage::new("outcome.reason_code", format!("{:?} is not a node's to give", o.reason_code))),
                };
                Self::NeverStarted(NeverStarted::Refused(Reason { code, detail }))
            }
        })
    }
}

impl From<Fate> for node::input_answer::Code {
    fn from(fate: Fate) -> Self {
        match fate {
            Fate::Taken => Self::Taken,
            Fate::Gap => Self::Gap,
            Fate::Full => Self::Full,
            Fate::Closed => Self::Closed,
            Fate::NoInput => Self::NoInput,
            Fate::NotRunning => Self::NotRunning,
            Fate::Ended => Self::Ended,
        }
    }
}

impl TryFrom<node::input_answer::Code> for Fate {
    type Error = BadMessage;
    fn try_from(code: node::input_answer::Code) -> Result<Self, BadMessage> {
        use node::input_answer::Code;
        Ok(match code {
            Code::Unspecified => return Err(BadMessage::new("input.code", "unknown")),
            Code::Taken => Self::Taken,
            Code::Gap => Self::Gap,
            Code::Full => Self::Full,
            Code::Closed => Self::Closed,
            Code::NoInput => Self::NoInput,
            Code::NotRunning => Self::NotRunning,
            Code::Ended => Self::Ended,
        })
    }
}

/// RFC 3339 in UTC with milliseconds.
pub fn rfc3339(ms: UnixMs) -> String {
    let t = OffsetDateTime::from_unix_timestamp_nanos(i128::from(ms) * 1_000_000).unwrap_or(OffsetDateTime::UNIX_EPOCH);
    t.format(&Rfc3339).unwrap_or_default()
}

/// Reads RFC 3339 with any offset.
pub fn parse_rfc3339(text: &str) -> Result<UnixMs, BadMessage> {
    let t = OffsetDateTime::parse(text, &Rfc3339).map_err(|e| BadMessage::new("time", format!("{text:?} is not RFC 3339: {e}")))?;
    Ok((t.unix_timestamp_nanos() / 1_000_000) as i64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outcomes_round_trip() {
        let all = [
            Outcome::Exited(7),
            Outcome::Signalled(9),
            Outcome::TimedOut,
            Outcome::Cancelled,
            Outcome::Done,
            Outcome::Lost { detail: "warden_ended".into() },
            Outcome::NeverStarted(NeverStarted::Late),
            Outcome::NeverStarted(NeverStarted::Cancelled),
            Outcome::NeverStarted(NeverStarted::Refused(Reason::new(ReasonCode::NotFound, "program"))),
        ];
        for o in all {
            assert_eq!(Outcome::try_from(&node::Outcome::from(&o)).unwrap(), o);
        }
    }

    #[test]
    fn fates_round_trip() {
        for fate in Fate::ALL {
            assert_eq!(Fate::try_from(node::input_answer::Code::from(fate)).unwrap(), fate);
        }
        assert!(Fate::try_from(node::input_answer::Code::Unspecified).is_err());
    }

    #[test]
    fn digests_come_in_pairs() {
        let told = |stdout: &[u8], stderr: &[u8]| {
            digests(&node::TaskResult { stdout_sha256: stdout.into(), stderr_sha256: stderr.into(), ..Default::default() })
        };
        assert_eq!(told(&[], &[]), Ok(None));
        assert_eq!(told(&[1; 32], &[2; 32]), Ok(Some(Digests { stdout: [1; 32], stderr: [2; 32] })));
        assert!(told(&[1; 32], &[]).is_err() && told(&[], &[2; 32]).is_err() && told(&[1; 31], &[2; 32]).is_err());
    }

    #[test]
    fn a_node_cannot_give_a_reason_that_is_the_hubs() {
        let o = node::Outcome { kind: node::outcome::Kind::Refused.into(), reason_code: "node_revoked".into(), ..Default::default() };
        assert!(Outcome::try_from(&o).is_err());
        assert!(Outcome::try_from(&node::Outcome::default()).is_err());
    }

    #[test]
    fn times() {
        assert_eq!(rfc3339(1_700_000_000_123), "2023-11-14T22:13:20.123Z");
        assert_eq!(parse_rfc3339("2023-11-14T23:13:20.123+01:00").unwrap(), 1_700_000_000_123);
    }
}

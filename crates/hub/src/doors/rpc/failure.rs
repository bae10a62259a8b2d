//! Refusals of REST as error objects: one number each, and the problem beside it.

use super::protocol::{self, Failure};
use crate::doors::rest::Refusal;
use crate::doors::rest::requests::Asked;
use axum::http::StatusCode;
use std::borrow::Cow;

const INTERNAL: i32 = -32000;
const UNAUTHENTICATED: i32 = -32001;
const FORBIDDEN: i32 = -32002;
const NOT_FOUND: i32 = -32003;
const CONFLICT: i32 = -32004;
const RATE_LIMITED: i32 = -32005;
const EXHAUSTED: i32 = -32006;
const TIMED_OUT: i32 = -32007;
const UNAVAILABLE: i32 = -32008;
const POLICY_DENIED: i32 = -32009;

/// What a method may answer besides its result.
pub const CODES: &[(i32, &str)] = &[
    (protocol::METHOD_NOT_FOUND, "Method not found"),
    (protocol::INVALID_PARAMS, "Invalid params"),
    (protocol::INTERNAL_ERROR, "The answer cannot be written"),
    (INTERNAL, "Internal error; nothing was changed"),
    (UNAUTHENTICATED, "Unauthenticated"),
    (FORBIDDEN, "Forbidden"),
    (NOT_FOUND, "Not found, or the caller may not know of it"),
    (CONFLICT, "Conflict"),
    (RATE_LIMITED, "Rate limited"),
    (EXHAUSTED, "Resource exhausted"),
    (TIMED_OUT, "Timed out"),
    (UNAVAILABLE, "Unavailable"),
    (POLICY_DENIED, "Policy denied"),
];

/// The number for a refusal.
fn code(status: StatusCode, code: &str) -> i32 {
    match (status.as_u16(), code) {
        (_, "policy_denied") => POLICY_DENIED,
        (_, "timed_out") => TIMED_OUT,
        (401, _) => UNAUTHENTICATED,
        (403, _) => FORBIDDEN,
        (404, _) => NOT_FOUND,
        (409, full) if full.ends_with("_full") => EXHAUSTED,
        (409 | 412, _) => CONFLICT,
        (429, _) => RATE_LIMITED,
        (413 | 507, _) => EXHAUSTED,
        (408 | 504, _) => TIMED_OUT,
        (503, _) => UNAVAILABLE,
        (501, _) => protocol::METHOD_NOT_FOUND,
        // What was done may have been done: it is the answer that cannot be written.
        (500, "internal") => protocol::INTERNAL_ERROR,
        (400..=499, _) => protocol::INVALID_PARAMS,
        _ => INTERNAL,
    }
}

/// A refusal as the caller of a method hears it.
pub fn failure(refusal: &Refusal, asked: &Asked) -> Failure {
    let code = code(refusal.status, refusal.code);
    let message: Cow<'static, str> = match code {
        protocol::INVALID_PARAMS => format!("Invalid params: {}", refusal.detail).into(),
        protocol::METHOD_NOT_FOUND => "Method not found".into(),
        _ => refusal.detail.clone().into(),
    };
    with(Failure::new(code, message), refusal, asked)
}

/// A refusal of the message itself, before there is any method.
pub fn of_message(refusal: &Refusal, asked: &Asked) -> Failure {
    match refusal.status.as_u16() {
        400 | 415 => with(Failure::invalid_request(), refusal, asked),
        _ => failure(refusal, asked),
    }
}

fn with(failure: Failure, refusal: &Refusal, asked: &Asked) -> Failure {
    Failure { data: Some(Box::new(refusal.problem(&asked.request_id))), ..failure }
}

/// For a result that has no room in its batch.
pub fn no_room() -> Refusal {
    let detail = format!(
        "the results of this batch are more than {} bytes; the call was made, and its result is left out: ask again in a smaller batch",
        protocol::MAX_RESULTS
    );
    Refusal::new(StatusCode::PAYLOAD_TOO_LARGE, "batch_too_large", detail)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_refusal_has_its_number() {
        for (status, word, expected) in [
            (400, "bad_params", -32602),
            (401, "unauthenticated", -32001),
            (403, "forbidden", -32002),
            (404, "not_found", -32003),
            (408, "body_too_slow", -32007),
            (409, "session_ended", -32004),
            (409, "state_full", -32006),
            (412, "stale", -32004),
            (413, "body_too_large", -32006),
            (422, "bad_name", -32602),
            (403, "policy_denied", -32009),
            (429, "rate_limited", -32005),
            (500, "internal", -32603),
            (500, "other", -32000),
            (501, "not_yet", -32601),
            (503, "store_unavailable", -32008),
            (503, "timed_out", -32007),
            (504, "late", -32007),
            (507, "storage_full", -32006),
        ] {
            assert_eq!(code(StatusCode::from_u16(status).unwrap(), word), expected, "{status} {word}");
        }
    }
}

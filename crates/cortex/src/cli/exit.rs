//! What `cortex run` exits with.

use crate::Error;
use crate::rest::TaskView;

pub const TIMED_OUT: u8 = 124;
/// The mesh or the command line failed.
pub const MESH: u8 = 125;
pub const DENIED: u8 = 126;
pub const NOT_FOUND: u8 = 127;
pub const CANCELLED: u8 = 130;
/// What a local command would have ended with when its reader went away: 128 + SIGPIPE.
pub const PIPE: u8 = 141;

/// The exit code of a task in its final state.
pub fn of_task(task: &TaskView) -> u8 {
    match task.state.as_str() {
        "succeeded" => return own(task, 0),
        "cancelled" => return CANCELLED,
        "failed" => {}
        _ => return MESH,
    }
    match task.reason.as_ref().map_or("", |r| r.code.as_str()) {
        "exit" => own(task, MESH),
        "signal" => task.signal.and_then(|n| u8::try_from(n.checked_add(128)?).ok()).unwrap_or(MESH),
        "timeout" | "deadline" => TIMED_OUT,
        "policy_denied" | "approval_denied" | "approval_timeout" => DENIED,
        "not_found" => NOT_FOUND,
        "cancelled_by_user" | "session_closed" => CANCELLED,
        // lost, limit, no_node, node_revoked, spool_full, bad_request, skill_error, and what a newer
        // hub may add.
        _ => MESH,
    }
}

fn own(task: &TaskView, absent: u8) -> u8 {
    // A parent task may report a code that no process can have.
    task.exit_code.map_or(absent, |c| u8::try_from(c).unwrap_or(MESH))
}

/// The exit code when the task could not be started or followed.
pub fn of_error(error: &Error) -> u8 {
    match error {
        Error::Setting(_) => 2,
        e if e.status() == Some(403) => DENIED,
        _ => MESH,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table() {
        let check = |state: &str, reason: &str, exit: Option<i32>, signal: Option<i32>, expect: u8| {
            let reason = (!reason.is_empty()).then(|| serde_json::json!({"code": reason, "detail": ""}));
            let task: TaskView = serde_json::from_value(serde_json::json!({
                "id": "task_1", "user_id": "user_1", "actor": {"user_id": "user_1", "door": "rest"}, "skill": "shell", "spec": {},
                "state": state, "reason": reason, "exit_code": exit, "signal": signal, "attempt": 1, "created_at": "",
                "stdout_lossy": false, "stderr_lossy": false, "stdout_bytes": 0, "stderr_bytes": 0, "truncated": false,
            }))
            .unwrap();
            assert_eq!(of_task(&task), expect, "{state} {reason:?} {exit:?} {signal:?}");
        };
        check("succeeded", "", Some(0), None, 0);
        check("succeeded", "", None, None, 0);
        check("failed", "exit", Some(1), None, 1);
        check("failed", "exit", Some(255), None, 255);
        check("failed", "exit", Some(256), None, 125);
        check("failed", "exit", None, None, 125);
        check("failed", "signal", None, Some(9), 137);
        check("failed", "signal", None, Some(15), 143);
        check("failed", "signal", None, Some(i32::MAX), 125);
        check("failed", "signal", None, None, 125);
        check("failed", "timeout", None, Some(9), 124);
        check("failed", "deadline", None, None, 124);
        check("failed", "policy_denied", None, None, 126);
        check("failed", "approval_denied", None, None, 126);
        check("failed", "approval_timeout", None, None, 126);
        check("failed", "not_found", None, None, 127);
        check("cancelled", "cancelled_by_user", None, Some(15), 130);
        check("cancelled", "session_closed", None, None, 130);
        check("failed", "session_closed", None, None, 130);
        for mesh in ["lost", "limit", "bad_request", "skill_error", "no_node", "node_revoked", "spool_full", "something_new", ""] {
            check("failed", mesh, None, None, 125);
        }
        check("running", "", None, None, 125);
    }
}

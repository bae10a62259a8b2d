//! A fan-out: one task for each of many nodes, its *children*, and their *parent*, which stands for them.
//!
//! ```text
//! running ──► (every child has ended) ──► succeeded | failed | cancelled
//! ```
//! The parent is never placed. It runs from its acceptance until its last child has ended, and ends as
//! [`combine`] says. The same ends give the same answer, in whatever order they are told.

use crate::task::{Action, Cancel, Event, Progress, Reason, ReasonCode, Refused, TaskState};
use crate::{TaskId, UnixMs};

/// Children that one task may have.
pub const MAX_CHILDREN: usize = 1000;

/// How a child ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChildEnd {
    pub id: TaskId,
    pub at: UnixMs,
    /// A final one.
    pub state: TaskState,
    pub reason: Option<Reason>,
    pub exit_code: Option<i32>,
    pub signal: Option<i32>,
}

/// How a parent ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Combined {
    pub state: TaskState,
    pub reason: Option<Reason>,
    pub exit_code: Option<i32>,
    pub signal: Option<i32>,
}

/// A parent that was just accepted.
pub fn begun(now: UnixMs) -> Progress {
    Progress { state: TaskState::Running, started_at: Some(now), ..Progress::new() }
}

/// What the ends of all children come to; `cancel` is what was asked of the parent.
///
/// All succeeded: so did it. It was cancelled and that ended a child: it is cancelled, whatever else
/// became of the others. A program failed: the highest exit code. Else the child that ended first decides,
/// and of two that ended at one moment the one with the lower id.
pub fn combine(ends: &[ChildEnd], cancel: Option<&Cancel>) -> Combined {
    let as_it = |e: &ChildEnd| Combined { state: e.state, reason: e.reason.clone(), exit_code: e.exit_code, signal: e.signal };
    let unwell = || ends.iter().filter(|e| e.state != TaskState::Succeeded);
    if let Some(asked) = cancel
        && unwell().any(|e| e.state == TaskState::Cancelled)
    {
        let reason = Some(Reason::new(asked.reason, ""));
        return Combined { state: TaskState::Cancelled, reason, exit_code: None, signal: None };
    }
    let by_exit = unwell().filter(|e| e.reason.as_ref().is_some_and(|r| r.code == ReasonCode::Exit));
    let decides = by_exit.max_by_key(|e| (e.exit_code, std::cmp::Reverse((e.at, e.id)))).or_else(|| unwell().min_by_key(|e| (e.at, e.id)));
    decides.map(as_it).unwrap_or_else(|| Combined {
        state: TaskState::Succeeded,
        reason: None,
        exit_code: ends.iter().filter_map(|e| e.exit_code).max(),
        signal: None,
    })
}

/// Decides one transition of a parent. Pure: the same arguments give the same answer.
pub fn step(before: &Progress, event: &Event, now: UnixMs) -> Result<(Progress, Vec<Action>), Refused> {
    if before.state.is_final() {
        return Err(Refused::Final);
    }
    let mut p = before.clone();
    match event {
        // Its children are asked one by one; it ends when they have.
        Event::CancelRequested { .. } if p.cancel.is_some() => Err(Refused::Repeated),
        Event::CancelRequested { reason } => {
            p.cancel = Some(Cancel { at: now, reason: *reason });
            Ok((p, vec![]))
        }
        Event::ChildrenEnded { ends } if !ends.is_empty() && ends.iter().all(|e| e.state.is_final()) => {
            let Combined { state, reason, exit_code, signal } = combine(ends, p.cancel.as_ref());
            Ok((Progress { state, reason, exit_code, signal, finished_at: Some(now), ..p }, vec![Action::Finished]))
        }
        _ => Err(Refused::Illegal),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use TaskState::*;
    use proptest::prelude::*;

    fn end(n: u8, at: UnixMs, state: TaskState, code: Option<ReasonCode>, exit_code: Option<i32>) -> ChildEnd {
        let reason = code.map(|code| Reason::new(code, format!("of {n}")));
        ChildEnd { id: TaskId::from_bytes([n; 16]), at, state, reason, exit_code, signal: None }
    }
    fn well(n: u8) -> ChildEnd {
        end(n, 10, Succeeded, None, Some(0))
    }
    fn exited(n: u8, at: UnixMs, code: i32) -> ChildEnd {
        end(n, at, Failed, Some(ReasonCode::Exit), Some(code))
    }
    fn failed(n: u8, at: UnixMs, code: ReasonCode) -> ChildEnd {
        end(n, at, Failed, Some(code), None)
    }
    fn said(ends: &[ChildEnd]) -> (TaskState, Option<ReasonCode>, Option<i32>) {
        let c = combine(ends, None);
        (c.state, c.reason.map(|r| r.code), c.exit_code)
    }

    #[test]
    fn what_many_ends_come_to() {
        use ReasonCode::*;
        assert_eq!(said(&[well(1), well(2)]), (Succeeded, None, Some(0)));
        let echoed = end(1, 1, Succeeded, None, None);
        assert_eq!(said(&[echoed]), (Succeeded, None, None), "a skill without a process has no code");
        assert_eq!(said(&[exited(1, 5, 3), exited(2, 1, 5), well(3)]), (Failed, Some(Exit), Some(5)), "the highest");
        assert_eq!(
            said(&[failed(1, 1, PolicyDenied), exited(2, 9, 3)]),
            (Failed, Some(Exit), Some(3)),
            "a code weighs more than what came first"
        );
        assert_eq!(said(&[failed(1, 7, Lost), failed(2, 3, PolicyDenied), well(3)]), (Failed, Some(PolicyDenied), None), "the first");
        assert_eq!(said(&[failed(2, 3, Lost), failed(1, 3, Timeout)]), (Failed, Some(Timeout), None), "at one moment the lower id");
        let alone = end(1, 1, Cancelled, Some(CancelledByUser), None);
        assert_eq!(said(&[alone.clone(), well(2)]), (Cancelled, Some(CancelledByUser), None));

        let asked = Cancel { at: 1, reason: SessionClosed };
        let c = combine(&[exited(2, 1, 5), alone, well(3)], Some(&asked));
        assert_eq!((c.state, c.reason, c.exit_code), (Cancelled, Some(Reason::new(SessionClosed, "")), None), "who asked hears of it");
        assert_eq!(combine(&[exited(2, 1, 5), well(3)], Some(&asked)).exit_code, Some(5), "it came too late for all of them");
    }

    #[test]
    fn a_parent_has_two_ways_on() {
        let p = begun(1);
        assert_eq!((p.state, p.started_at), (Running, Some(1)));
        let cancel = Event::CancelRequested { reason: ReasonCode::CancelledByUser };
        let (asked, actions) = step(&p, &cancel, 2).unwrap();
        assert_eq!((asked.state, asked.cancel.is_some(), actions), (Running, true, vec![]), "its children end first");
        assert_eq!(step(&asked, &cancel, 3), Err(Refused::Repeated));
        let ended = |ends| Event::ChildrenEnded { ends };
        let (over, actions) = step(&p, &ended(vec![exited(1, 2, 4)]), 9).unwrap();
        assert_eq!((over.state, over.exit_code, over.finished_at, actions), (Failed, Some(4), Some(9), vec![Action::Finished]));
        assert_eq!(step(&over, &ended(vec![well(1)]), 10), Err(Refused::Final), "the first word stands");
        assert_eq!(step(&over, &cancel, 10), Err(Refused::Final));
        assert_eq!(step(&p, &ended(vec![]), 9), Err(Refused::Illegal));
        let open = end(1, 0, Running, None, None);
        assert_eq!(step(&p, &ended(vec![well(2), open]), 9), Err(Refused::Illegal), "one is still open");
        for other in [Event::DeadlinePassed, Event::Restored, Event::Expired { detail: String::new() }] {
            assert_eq!(step(&p, &other, 2), Err(Refused::Illegal), "{other:?} is its children's");
        }
    }

    fn any_end() -> impl Strategy<Value = ChildEnd> {
        let ways = prop_oneof![
            Just((Succeeded, None)),
            Just((Cancelled, Some(ReasonCode::CancelledByUser))),
            Just((Failed, Some(ReasonCode::Exit))),
            proptest::sample::select(&ReasonCode::ALL[..]).prop_map(|code| (Failed, Some(code))),
        ];
        (any::<u8>(), 0..5i64, ways, proptest::option::of(-2..300i32), proptest::option::of(1..9i32)).prop_map(
            |(n, at, (state, code), exit, signal)| {
                let exit = exit.filter(|_| matches!(code, None | Some(ReasonCode::Exit)));
                ChildEnd { signal, ..end(n, at, state, code, exit) }
            },
        )
    }

    proptest! {
        #[test]
        fn no_order_changes_the_answer(
            mut ends in prop::collection::vec(any_end(), 1..20), seed in any::<u64>(), cancelled in any::<bool>(),
        ) {
            // An id is one child's.
            ends.sort_by_key(|e| e.id);
            ends.dedup_by_key(|e| e.id);
            let cancel = cancelled.then_some(Cancel { at: 1, reason: ReasonCode::SessionClosed });
            let first = combine(&ends, cancel.as_ref());
            let mut turned = ends.clone();
            let mut n = seed;
            for i in (1..turned.len()).rev() {
                n = n.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                turned.swap(i, (n >> 33) as usize % (i + 1));
            }
            prop_assert_eq!(&combine(&turned, cancel.as_ref()), &first);
            turned.reverse();
            prop_assert_eq!(&combine(&turned, cancel.as_ref()), &first);

            prop_assert!(first.state.is_final());
            let all_well = ends.iter().all(|e| e.state == Succeeded);
            prop_assert_eq!(first.state == Succeeded, all_well, "it succeeds when all do");
            prop_assert_eq!(first.reason.is_none(), all_well);
            if first.reason.as_ref().is_some_and(|r| r.code == ReasonCode::Exit) {
                let codes = ends.iter().filter(|e| e.reason.as_ref().is_some_and(|r| r.code == ReasonCode::Exit)).map(|e| e.exit_code);
                prop_assert_eq!(Some(first.exit_code), codes.max(), "the highest");
            }
        }
    }
}

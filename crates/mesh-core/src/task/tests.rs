use super::*;
use proptest::prelude::*;

const NODE: NodeId = NodeId::from_bytes([1; 16]);
const SPOOL: SpoolId = SpoolId::from_bytes([2; 16]);

fn run(events: &[Event]) -> Result<Progress, Refused> {
    run_by(&Terms::default(), events)
}
fn run_by(terms: &Terms, events: &[Event]) -> Result<Progress, Refused> {
    events.iter().enumerate().try_fold(Progress::new(), |p, (i, e)| step(terms, &p, e, i as i64).map(|x| x.0))
}
fn a(n: u64) -> AttemptNo {
    AttemptNo((1 << 32) | n)
}
fn assigned(n: u64) -> Event {
    Event::Assigned { attempt: a(n), node: NODE, granted: Some(SPOOL) }
}
fn started(n: u64) -> Event {
    Event::Started { attempt: a(n) }
}
fn ended(n: u64, outcome: Outcome) -> Event {
    Event::Ended { attempt: a(n), outcome }
}
fn cancel() -> Event {
    Event::CancelRequested { reason: ReasonCode::CancelledByUser }
}

#[test]
fn exit_codes() {
    let p = run(&[assigned(1), started(1), ended(1, Outcome::Exited(0))]).unwrap();
    assert_eq!((p.state, p.exit_code, p.reason), (TaskState::Succeeded, Some(0), None));
    let p = run(&[assigned(1), started(1), ended(1, Outcome::Exited(7))]).unwrap();
    assert_eq!((p.state, p.exit_code), (TaskState::Failed, Some(7)));
    assert_eq!(p.reason.unwrap().code, ReasonCode::Exit);
}

#[test]
fn an_end_may_come_without_a_start() {
    let p = run(&[assigned(1), ended(1, Outcome::Exited(0))]).unwrap();
    assert_eq!(p.state, TaskState::Succeeded);
}

#[test]
fn nothing_changes_a_final_state() {
    for last in [assigned(2), started(1), ended(1, Outcome::Exited(1)), cancel()] {
        assert_eq!(run(&[assigned(1), ended(1, Outcome::Exited(0)), last]), Err(Refused::Final));
    }
}

#[test]
fn a_superseded_attempt_cannot_win() {
    let late = Outcome::NeverStarted(NeverStarted::Late);
    let second = [assigned(1), ended(1, late), assigned(2)];
    for stale in [started(1), ended(1, Outcome::Exited(0))] {
        let mut all = second.to_vec();
        all.push(stale);
        assert_eq!(run(&all), Err(Refused::Superseded));
    }
    assert_eq!(run(&[assigned(1), ended(1, Outcome::NeverStarted(NeverStarted::Late)), assigned(1)]), Err(Refused::Superseded));
}

#[test]
fn only_a_granted_attempt_starts() {
    let ungranted = Event::Assigned { attempt: a(1), node: NODE, granted: None };
    assert_eq!(run(&[ungranted.clone(), started(1)]), Err(Refused::Illegal));
    let p = run(&[ungranted.clone(), Event::Granted { attempt: a(1), spool: SPOOL }, started(1)]).unwrap();
    assert_eq!(p.state, TaskState::Running);
    let p = run(&[ungranted, Event::Withdrawn { attempt: a(1) }]).unwrap();
    assert_eq!(p.state, TaskState::Pending);
    assert_eq!(run(&[assigned(1), Event::Withdrawn { attempt: a(1) }]), Err(Refused::Illegal));
}

#[test]
fn what_is_not_granted_is_moved_by_one_step_and_its_old_node_has_no_word() {
    const OTHER: NodeId = NodeId::from_bytes([3; 16]);
    let ahead = |n| Event::Assigned { attempt: a(n), node: NODE, granted: None };
    let moved = Event::Assigned { attempt: a(2), node: OTHER, granted: Some(SPOOL) };
    let before = run(&[ahead(1)]).unwrap();
    let (p, actions) = step(&Terms::default(), &before, &moved, 5).unwrap();
    assert_eq!((p.state, p.attempt), (TaskState::Assigned, Some(Attempt { no: a(2), node: OTHER, granted: Some(SPOOL) })));
    let taken_back = [Action::Cancel { node: NODE, attempt: a(1) }, Action::Release { node: NODE }];
    assert_eq!(actions, [&taken_back[..], &[Action::Order { node: OTHER, attempt: a(2) }]].concat());
    for late in
        [Event::Granted { attempt: a(1), spool: SPOOL }, started(1), ended(1, Outcome::Exited(0)), Event::Withdrawn { attempt: a(1) }]
    {
        assert_eq!(run(&[ahead(1), moved.clone(), late]), Err(Refused::Superseded));
    }
    // Only upwards, and never once it was granted.
    assert_eq!(run(&[ahead(2), Event::Assigned { attempt: a(2), node: OTHER, granted: None }]), Err(Refused::Superseded));
    let granted = Event::Granted { attempt: a(1), spool: SPOOL };
    assert_eq!(run(&[ahead(1), granted.clone(), moved]), Err(Refused::Illegal));
    // It cannot have run, but it can have been refused; and its wait can be over.
    for forged in [Outcome::Exited(0), Outcome::Done, Outcome::Lost { detail: String::new() }] {
        assert_eq!(run(&[ahead(1), ended(1, forged)]), Err(Refused::Illegal));
    }
    assert_eq!(run(&[ahead(1), ended(1, refused(ReasonCode::PolicyDenied))]).unwrap().state, TaskState::Failed);
    for (last, state) in [(Event::Expired { detail: String::new() }, TaskState::Failed), (cancel(), TaskState::Cancelled)] {
        let (p, actions) = step(&Terms::default(), &before, &last, 5).unwrap();
        assert_eq!((p.state, actions), (state, [&taken_back[..], &[Action::Finished]].concat()));
    }
    assert_eq!(run(&[ahead(1), granted, Event::Expired { detail: String::new() }]), Err(Refused::Illegal));
}

#[test]
fn cancel_in_every_state() {
    let p = run(&[cancel()]).unwrap();
    assert_eq!((p.state, p.reason.unwrap().code), (TaskState::Cancelled, ReasonCode::CancelledByUser));
    // granted work waits for the node's word
    let p = run(&[assigned(1), cancel()]).unwrap();
    assert_eq!(p.state, TaskState::Assigned);
    assert_eq!(run(&[assigned(1), cancel(), cancel()]), Err(Refused::Repeated));
    let p = run(&[assigned(1), started(1), cancel(), ended(1, Outcome::Cancelled)]).unwrap();
    assert_eq!(p.state, TaskState::Cancelled);
    // a program that ended by itself before the cancel reached it says the truth
    let p = run(&[assigned(1), started(1), cancel(), ended(1, Outcome::Exited(0))]).unwrap();
    assert_eq!(p.state, TaskState::Succeeded);
    let lost = Outcome::Lost { detail: "maybe_ran".into() };
    for outcome in [Outcome::NeverStarted(NeverStarted::Late), lost.clone()] {
        let p = run(&[assigned(1), cancel(), ended(1, outcome)]).unwrap();
        assert_eq!(p.state, TaskState::Cancelled);
    }
    assert_eq!(run(&[assigned(1), ended(1, lost)]).unwrap().state, TaskState::Failed);
    let revoked = Event::NodeRevoked { attempt: a(1) };
    let p = run(&[assigned(1), started(1), revoked.clone()]).unwrap();
    assert_eq!((p.state, p.reason.unwrap().code), (TaskState::Failed, ReasonCode::NodeRevoked));
    assert_eq!(run(&[assigned(1), cancel(), revoked]).unwrap().state, TaskState::Cancelled);
}

#[test]
fn waiting_has_an_end() {
    let p = run(&[Event::Expired { detail: "node_offline".into() }]).unwrap();
    assert_eq!(p.reason, Some(Reason::new(ReasonCode::NoNode, "node_offline")));
    assert_eq!(run(&[assigned(1), Event::Expired { detail: String::new() }]), Err(Refused::Illegal));
}

/// What waited in a backup may have run since; what was granted in it is its node's to answer for.
#[test]
fn a_restore_ends_what_waited() {
    let p = run(&[Event::Restored]).unwrap();
    assert_eq!((p.state, p.reason), (TaskState::Failed, Some(Reason::new(ReasonCode::Lost, MAYBE_RAN))));
    assert_eq!(run(&[assigned(1), Event::Restored]), Err(Refused::Illegal));
    assert_eq!(run(&[assigned(1), started(1), Event::Restored]), Err(Refused::Illegal));
}

fn refused(code: ReasonCode) -> Outcome {
    Outcome::NeverStarted(NeverStarted::Refused(Reason::new(code, "")))
}

#[test]
fn a_failed_attempt_is_run_again_as_often_as_was_asked() {
    let terms = Terms { retries: 2, backoff_ms: 100, ..Terms::default() };
    let first = [assigned(1), started(1), ended(1, Outcome::Exited(7))];
    let p = run_by(&terms, &first).unwrap();
    assert_eq!((p.state, p.retried, p.retry_at), (TaskState::Pending, 1, Some(102)));
    assert_eq!((p.reason, p.exit_code, p.assigned_at, p.started_at, p.finished_at), (None, None, None, None, None));
    assert_eq!(p.attempt.unwrap().no, a(1), "the newest attempt is kept: its output is shown");
    let second = [&first[..], &[assigned(2)], &[ended(2, Outcome::TimedOut)]].concat();
    let p = run_by(&terms, &second).unwrap();
    assert_eq!((p.state, p.retried, p.retry_at), (TaskState::Pending, 2, Some(4 + 200)));
    let third = [&second[..], &[assigned(3)]].concat();
    assert_eq!(run_by(&terms, &third).unwrap().retry_at, None);
    let p = run_by(&terms, &[&third[..], &[ended(3, Outcome::Signalled(9))]].concat()).unwrap();
    assert_eq!((p.state, p.signal, p.reason.unwrap().code), (TaskState::Failed, Some(9), ReasonCode::Signal));
    let p = run_by(&terms, &[&third[..], &[ended(3, Outcome::Exited(0))]].concat()).unwrap();
    assert_eq!((p.state, p.exit_code, p.reason), (TaskState::Succeeded, Some(0), None));
    // Between attempts the old one has no word left.
    assert_eq!(run_by(&terms, &[&first[..], &[ended(1, Outcome::Exited(0))]].concat()), Err(Refused::Superseded));
}

#[test]
fn what_may_be_run_again_and_what_never() {
    let terms = Terms { retries: 1, ..Terms::default() };
    let state = |outcome| run_by(&terms, &[assigned(1), ended(1, outcome)]).unwrap().state;
    let again = [Outcome::Exited(1), Outcome::Signalled(9), Outcome::TimedOut, refused(ReasonCode::Limit), refused(ReasonCode::SkillError)];
    for outcome in again {
        assert_eq!(state(outcome.clone()), TaskState::Pending, "{outcome:?}");
    }
    assert_eq!(run_by(&terms, &[assigned(1), Event::NodeRevoked { attempt: a(1) }]).unwrap().state, TaskState::Pending);
    let never = [ReasonCode::PolicyDenied, ReasonCode::ApprovalDenied, ReasonCode::BadRequest, ReasonCode::NotFound, ReasonCode::SpoolFull];
    for code in never {
        assert_eq!(state(refused(code)), TaskState::Failed, "{code:?}");
    }
    assert_eq!(state(Outcome::Lost { detail: "maybe_ran".into() }), TaskState::Failed);
    assert_eq!(state(Outcome::Cancelled), TaskState::Cancelled);
    for reason in [ReasonCode::CancelledByUser, ReasonCode::SessionClosed] {
        let stop = Event::CancelRequested { reason };
        assert_eq!(run_by(&terms, &[assigned(1), stop, ended(1, Outcome::Exited(1))]).unwrap().state, TaskState::Failed);
    }
    let p = run_by(&terms, &[assigned(1), ended(1, Outcome::Exited(1)), cancel()]).unwrap();
    assert_eq!((p.state, p.retry_at), (TaskState::Cancelled, None), "a cancel ends the pause");
}

#[test]
fn a_deadline_in_every_state() {
    let late = Event::DeadlinePassed;
    let failed = |events: &[Event]| {
        let p = run(events).unwrap();
        (p.state, p.reason.map(|r| r.code))
    };
    let deadline = (TaskState::Failed, Some(ReasonCode::Deadline));
    assert_eq!(failed(std::slice::from_ref(&late)), deadline);
    let ungranted = Event::Assigned { attempt: a(1), node: NODE, granted: None };
    assert_eq!(failed(&[ungranted, late.clone()]), deadline);
    // Granted work waits for its node's word.
    assert_eq!(failed(&[assigned(1), started(1), late.clone()]), (TaskState::Running, None));
    let (_, actions) = step(&Terms::default(), &run(&[assigned(1)]).unwrap(), &late, 9).unwrap();
    assert_eq!(actions, [Action::Cancel { node: NODE, attempt: a(1) }]);
    let lost = Outcome::Lost { detail: "maybe_ran".into() };
    for outcome in [Outcome::Cancelled, lost, Outcome::NeverStarted(NeverStarted::Late), Outcome::NeverStarted(NeverStarted::Cancelled)] {
        assert_eq!(failed(&[assigned(1), late.clone(), ended(1, outcome)]), deadline);
    }
    assert_eq!(failed(&[assigned(1), late.clone(), Event::NodeRevoked { attempt: a(1) }]), deadline);
    assert_eq!(failed(&[assigned(1), late.clone(), ended(1, Outcome::Exited(0))]), (TaskState::Succeeded, None), "it was done in time");
    // Whoever asked first is named.
    let p = run(&[assigned(1), cancel(), ended(1, Outcome::Cancelled)]).unwrap();
    assert_eq!(p.reason.unwrap().code, ReasonCode::CancelledByUser);
    assert_eq!(run(&[assigned(1), cancel(), late.clone()]), Err(Refused::Repeated));
    // In the middle of a pause, and never again after it.
    let terms = Terms { retries: 9, ..Terms::default() };
    let p = run_by(&terms, &[assigned(1), ended(1, Outcome::Exited(1)), late.clone()]).unwrap();
    assert_eq!((p.state, p.reason.unwrap().code), (TaskState::Failed, ReasonCode::Deadline));
    let p = run_by(&terms, &[assigned(1), late, ended(1, Outcome::Exited(1))]).unwrap();
    assert_eq!(p.state, TaskState::Failed);
}

#[test]
fn what_is_lost_ends_as_its_caller_asked() {
    let lost = |detail: &str| ended(1, Outcome::Lost { detail: detail.into() });
    let silent = Event::NodeSilent { attempt: a(1) };
    let revoked = Event::NodeRevoked { attempt: a(1) };
    let terms = |on_lost| Terms { on_lost, backoff_ms: 100, ..Terms::default() };
    for on_lost in [OnLost::Wait, OnLost::Fail] {
        for (event, detail) in [(lost("warden_ended"), "warden_ended"), (silent.clone(), "maybe_ran")] {
            let p = run_by(&terms(on_lost), &[assigned(1), started(1), event]).unwrap();
            assert_eq!((p.state, p.reason), (TaskState::Failed, Some(Reason::new(ReasonCode::Lost, detail))));
        }
    }
    for event in [lost("maybe_ran"), silent.clone(), revoked.clone()] {
        let begun = [assigned(1), started(1), event.clone()];
        let p = run_by(&terms(OnLost::Requeue), &begun).unwrap();
        assert_eq!((p.state, p.retried, p.retry_at, p.started_at), (TaskState::Pending, 0, Some(2 + 100), None));
        // The old attempt has no word left, whatever it comes to say.
        for late in [started(1), ended(1, Outcome::Exited(0)), silent.clone()] {
            let all = [&begun[..], std::slice::from_ref(&late)].concat();
            assert_eq!(run_by(&terms(OnLost::Requeue), &all), Err(Refused::Superseded), "{late:?}");
            let all = [&begun[..], &[assigned(2), late]].concat();
            assert_eq!(run_by(&terms(OnLost::Requeue), &all), Err(Refused::Superseded));
        }
        let again = [&begun[..], &[assigned(2), Event::NodeSilent { attempt: a(2) }]].concat();
        assert_eq!(run_by(&terms(OnLost::Requeue), &again).unwrap().retry_at, Some(4 + 200), "the pause doubles");
        // Nobody wants it any more.
        let p = run_by(&terms(OnLost::Requeue), &[assigned(1), cancel(), event]).unwrap();
        assert_eq!(p.state, TaskState::Cancelled);
    }
    // A failure is no loss, and a loss takes no retry.
    let both = Terms { retries: 1, ..terms(OnLost::Requeue) };
    let p = run_by(&both, &[assigned(1), silent.clone(), assigned(2), ended(2, Outcome::Exited(3))]).unwrap();
    assert_eq!((p.state, p.retried), (TaskState::Pending, 1));
    let p = run_by(&terms(OnLost::Requeue), &[assigned(1), ended(1, Outcome::Exited(3))]).unwrap();
    assert_eq!(p.state, TaskState::Failed);
    // Only what was granted can be in doubt.
    let ungranted = Event::Assigned { attempt: a(1), node: NODE, granted: None };
    assert_eq!(run(&[ungranted, silent.clone()]), Err(Refused::Illegal));
    assert_eq!(run(&[silent]), Err(Refused::Illegal));
}

fn any_event() -> impl Strategy<Value = Event> {
    let n = 1u64..8;
    let outcome = prop_oneof![
        Just(Outcome::Exited(0)),
        Just(Outcome::Exited(3)),
        Just(Outcome::Signalled(9)),
        Just(Outcome::Cancelled),
        Just(Outcome::TimedOut),
        Just(Outcome::NeverStarted(NeverStarted::Late)),
        Just(Outcome::Lost { detail: String::new() }),
        Just(refused(ReasonCode::PolicyDenied)),
        Just(refused(ReasonCode::SkillError)),
    ];
    prop_oneof![
        (n.clone(), any::<bool>()).prop_map(|(n, g)| Event::Assigned { attempt: a(n), node: NODE, granted: g.then_some(SPOOL) }),
        n.clone().prop_map(|n| Event::Granted { attempt: a(n), spool: SPOOL }),
        n.clone().prop_map(|n| Event::Withdrawn { attempt: a(n) }),
        n.clone().prop_map(started),
        n.clone().prop_map(|n| Event::NodeRevoked { attempt: a(n) }),
        n.clone().prop_map(|n| Event::NodeSilent { attempt: a(n) }),
        (n, outcome).prop_map(|(n, o)| ended(n, o)),
        Just(cancel()),
        Just(Event::DeadlinePassed),
        Just(Event::Expired { detail: String::new() }),
        Just(Event::Restored),
    ]
}

proptest! {
    #[test]
    fn invariants_hold_over_any_history(
        events in proptest::collection::vec(any_event(), 0..60), retries in 0u32..4, backoff_ms in 0u64..5_000_000,
        on_lost in proptest::sample::select(OnLost::ALL.to_vec()),
    ) {
        let terms = Terms { retries, backoff_ms, on_lost, ..Terms::default() };
        let mut p = Progress::new();
        let (mut ends, mut failed) = (0, 0);
        let mut highest = None;
        for (i, e) in events.iter().enumerate() {
            let now = i as i64;
            let Ok((next, actions)) = step(&terms, &p, e, now) else { continue };
            ends += actions.iter().filter(|a| matches!(a, Action::Finished)).count();
            prop_assert_eq!(next.state.is_final(), next.finished_at.is_some());
            prop_assert_eq!(actions.contains(&Action::Finished), next.state.is_final());
            if next.state == TaskState::Running { prop_assert!(next.attempt.as_ref().unwrap().granted.is_some()); }
            let no = next.attempt.as_ref().map(|a| a.no);
            prop_assert!(no >= highest, "attempt numbers only rise");
            highest = no;
            // Retries are counted, bounded, and only ever follow a failure that may be retried.
            if next.retried > p.retried {
                failed += 1;
                prop_assert_eq!((next.state, next.retried), (TaskState::Pending, p.retried + 1));
                prop_assert!(p.cancel.is_none(), "nothing is run again whose end was asked for");
                let pause = next.retry_at.unwrap() - now;
                prop_assert_eq!(pause as u64, (u128::from(backoff_ms) << p.retried).min(3_600_000) as u64);
                prop_assert!(actions.contains(&Action::Requeue));
                let refused = matches!(e, Event::Ended { outcome, .. } if matches!(outcome,
                    Outcome::Exited(0) | Outcome::Cancelled | Outcome::Lost { .. } | Outcome::Done
                    | Outcome::NeverStarted(NeverStarted::Late | NeverStarted::Cancelled)));
                prop_assert!(!refused, "{e:?}");
            }
            prop_assert!(next.retried <= retries);
            prop_assert!(next.state == TaskState::Pending || next.retry_at.is_none(), "a pause belongs to who waits");
            prop_assert!(next.state.is_final() || (next.reason.is_none() && next.exit_code.is_none() && next.signal.is_none()));
            // The end that a deadline asked for is never called a cancel.
            if next.cancel.as_ref().is_some_and(|c| c.reason == ReasonCode::Deadline) {
                prop_assert!(next.state != TaskState::Cancelled);
            }
            p = next;
        }
        prop_assert!(ends <= 1);
        prop_assert_eq!(failed, p.retried);
    }
}

use super::*;
use proptest::prelude::*;

const NODE: NodeId = NodeId::from_bytes([9; 16]);

fn task(n: u8) -> TaskId {
    TaskId::from_bytes([n; 16])
}
fn by(policy: Policy, max: u32) -> Restart {
    Restart { policy, max, backoff_ms: 1000 }
}
fn started(n: u8) -> Event {
    Event::Started { task: task(n), node: Some(NODE) }
}
fn ended(n: u8, end: End) -> Event {
    Event::Ended { task: task(n), end }
}
fn failure() -> End {
    End::Failure("exit code 1".into())
}
fn run(restart: &Restart, events: &[(i64, Event)]) -> Result<Life, Refused> {
    events.iter().try_fold(Life::begun(task(1)), |life, (now, event)| step(restart, &life, event, *now).map(|x| x.0))
}

#[test]
fn ends_without_a_restart() {
    let never = by(Policy::Never, 0);
    for (end, status) in [
        (End::Clean, Status::Exited),
        (failure(), Status::Failed),
        (End::Cancelled, Status::Killed),
        (End::Final("no".into()), Status::Failed),
    ] {
        let life = run(&never, &[(1, started(1)), (2, ended(1, end))]).unwrap();
        assert_eq!((life.status, life.ended_at, life.restarts), (status, Some(2), 0));
    }
    assert_eq!(run(&by(Policy::OnFailure, 0), &[(1, ended(1, End::Clean))]).unwrap().status, Status::Exited);
    let denied = run(&by(Policy::Always, 0), &[(1, ended(1, End::Final("policy_denied".into())))]).unwrap();
    assert_eq!((denied.status, denied.reason.as_deref()), (Status::Failed, Some("policy_denied")), "it would be denied again");
}

#[test]
fn a_hundred_quick_deaths_are_slowed_and_then_are_the_end() {
    let restart = by(Policy::OnFailure, 100);
    let (mut life, mut now, mut pauses) = (Life::begun(task(1)), 0, vec![]);
    let mut no = 1u8;
    while !life.status.is_final() {
        life = step(&restart, &life, &started(no), now).unwrap().0;
        now += 1;
        life = step(&restart, &life, &ended(no, failure()), now).unwrap().0;
        if let Some(at) = life.next_at {
            assert_eq!(life.status, Status::BackingOff);
            assert_eq!(step(&restart, &life, &Event::Due { task: task(no + 1) }, at - 1), Err(Refused::Illegal), "not before its time");
            pauses.push(at - now);
            now = at;
            no += 1;
            life = step(&restart, &life, &Event::Due { task: task(no) }, now).unwrap().0;
        }
    }
    assert_eq!((life.status, life.restarts, pauses.len()), (Status::Failed, 100, 100));
    assert!(life.reason.unwrap().contains("100 times in a row"));
    assert_eq!(pauses[..4], [1000, 2000, 4000, 8000]);
    assert!(pauses.is_sorted() && pauses.iter().all(|p| *p <= MAX_PAUSE_MS as i64));
}

#[test]
fn a_healthy_run_begins_the_count_anew() {
    let restart = by(Policy::Always, 1);
    let until_second = [(0, started(1)), (1, ended(1, failure())), (1001, Event::Due { task: task(2) }), (1002, started(2))];
    let quick = run(&restart, &[&until_second[..], &[(1003, ended(2, failure()))]].concat()).unwrap();
    assert_eq!(quick.status, Status::Failed);
    let well = run(&restart, &[&until_second[..], &[(1002 + HEALTHY_MS, ended(2, failure()))]].concat()).unwrap();
    assert_eq!((well.status, well.in_a_row, well.restarts), (Status::BackingOff, 0, 1));
    assert_eq!(well.next_at, Some(1002 + HEALTHY_MS + 1000));
}

#[test]
fn kills() {
    let always = by(Policy::Always, 0);
    let kill = |force| Event::KillAsked { force };
    let stop = |force| vec![Action::Stop { task: task(1), force }];
    let (stopping, actions) = step(&always, &Life::begun(task(1)), &kill(false), 5).unwrap();
    assert_eq!((stopping.status, actions), (Status::Stopping, stop(false)), "it may have started by now");
    assert_eq!(step(&always, &stopping, &kill(false), 6), Err(Refused::Repeated));
    let (forced, actions) = step(&always, &stopping, &kill(true), 7).unwrap();
    assert_eq!((forced.kill, actions), (Some(Kill { at: 5, force: true }), stop(true)));
    assert_eq!(step(&always, &forced, &kill(false), 8), Err(Refused::Repeated), "force stays");
    for end in [End::Clean, failure(), End::Cancelled, End::Final("lost".into())] {
        let (life, actions) = step(&always, &forced, &ended(1, end), 9).unwrap();
        assert_eq!((life.status, actions), (Status::Killed, vec![Action::Over]), "however it ended, it is not run again");
    }
    let backing_off = run(&always, &[(1, ended(1, failure()))]).unwrap();
    assert_eq!(step(&always, &backing_off, &kill(false), 2).unwrap().0.status, Status::Killed);
    assert_eq!(step(&always, &Life::basic(1), &kill(false), 2).unwrap().0.status, Status::Killed);
    let over = step(&always, &backing_off, &kill(false), 2).unwrap().0;
    assert_eq!(step(&always, &over, &kill(true), 3), Err(Refused::Final));
}

#[test]
fn words_of_another_run_change_nothing() {
    let always = by(Policy::Always, 0);
    let second = [(1, ended(1, failure())), (1001, Event::Due { task: task(2) })];
    for late in [started(1), ended(1, End::Clean), Event::Waits { task: task(1) }] {
        assert_eq!(run(&always, &[&second[..], &[(1002, late)]].concat()), Err(Refused::Superseded));
    }
    assert_eq!(run(&always, &[(1, ended(1, failure())), (2, ended(1, failure()))]), Err(Refused::Superseded), "doubled");
    assert_eq!(run(&always, &[second[0].clone(), second[1].clone(), (1001, Event::Due { task: task(3) })]), Err(Refused::Repeated));
    let again = run(&always, &[(1, started(1)), (2, Event::Waits { task: task(1) }), (3, started(1))]).unwrap();
    assert_eq!((again.status, again.started_at, again.restarts), (Status::Running, Some(3), 0));
}

#[test]
fn a_run_that_may_not_be_is_the_end() {
    let barred = || Event::Barred { why: "its node was revoked".into() };
    let life = run(&by(Policy::Always, 0), &[(1, barred())]).unwrap();
    assert_eq!((life.status, life.reason.as_deref()), (Status::Failed, Some("its node was revoked")));
    assert_eq!(run(&by(Policy::Always, 0), &[(1, started(1)), (2, barred())]), Err(Refused::Illegal));
}

fn any_event() -> impl Strategy<Value = Event> {
    let end = prop_oneof![Just(End::Clean), Just(failure()), Just(End::Final("x".into())), Just(End::Cancelled),];
    let id = (1u8..6).prop_map(task);
    prop_oneof![
        3 => id.clone().prop_map(|task| Event::Started { task, node: None }),
        1 => id.clone().prop_map(|task| Event::Waits { task }),
        3 => (id.clone(), end).prop_map(|(task, end)| Event::Ended { task, end }),
        3 => id.prop_map(|task| Event::Due { task }),
        1 => Just(Event::Barred { why: "y".into() }),
        1 => any::<bool>().prop_map(|force| Event::KillAsked { force }),
    ]
}

proptest! {
    #[test]
    fn whatever_comes(
        events in proptest::collection::vec((any_event(), 0i64..200_000), 0..80), policy in proptest::sample::select(Policy::ALL.to_vec()),
        max in 0u32..4, backoff_ms in 0u64..10_000,
    ) {
        let restart = Restart { policy, max, backoff_ms };
        let (mut life, mut now, mut begun) = (Life::begun(task(1)), 0, 1);
        for (event, pause) in events {
            now += pause;
            let Ok((after, actions)) = step(&restart, &life, &event, now) else { continue };
            prop_assert!(!life.status.is_final(), "an end is the end");
            for action in &actions {
                match action {
                    // One begins when none can be there: that it was decided is the state before.
                    Action::Begin(run) => {
                        prop_assert_eq!(life.status, Status::BackingOff);
                        begun += 1;
                        prop_assert_eq!(run.no, begun);
                    }
                    Action::Rest { until } => prop_assert!(*until >= now && after.next_at == Some(*until) && after.kill.is_none()),
                    Action::Stop { .. } => prop_assert_eq!(after.status, Status::Stopping),
                    Action::Over => prop_assert!(after.status.is_final()),
                }
            }
            prop_assert_eq!(after.status.is_final(), after.ended_at.is_some());
            prop_assert_eq!(after.status == Status::BackingOff, after.next_at.is_some());
            prop_assert_eq!(after.restarts + 1, after.run.unwrap().no);
            prop_assert!(after.in_a_row <= after.restarts && (max == 0 || after.in_a_row <= max));
            prop_assert!(policy != Policy::Never || after.restarts == 0);
            life = after;
        }
    }
}

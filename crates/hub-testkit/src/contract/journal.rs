use super::sample::{assigned_task, attempt, fan, frame, key_id, node_id, session_id, spool_id, task, task_id, user_id};
use super::{T0, all, window};
use futures::future::join_all;
use hub_engine::ports::{Applied, Besides, Fan, Journal, Output};
use hub_engine::records::{OutputTotals, Stream, Task, TaskFilter, Within};
use mesh_core::TaskId;
use mesh_core::output::Digests;
use mesh_core::spec::INLINE_SPEC_BYTES;
use mesh_core::task::*;
use std::sync::Arc;

pub async fn journal(make: impl AsyncFn() -> Arc<dyn Journal>) {
    accepts(&*make().await).await;
    a_whole_life(&*make().await).await;
    refusals(&*make().await).await;
    every_field(&*make().await).await;
    races(&*make().await).await;
    many_at_once(&*make().await).await;
    lists(&*make().await).await;
    narrow(&*make().await).await;
    retries(&*make().await).await;
    losses(&*make().await).await;
    fans(&*make().await).await;
}

async fn apply(store: &dyn Journal, n: u16, event: Event, now: i64) -> Applied {
    store.apply(task_id(n), &event, Besides::default(), now).await.unwrap()
}

async fn done(store: &dyn Journal, n: u16, event: Event, now: i64) -> (Task, Vec<Action>) {
    match apply(store, n, event, now).await {
        Applied::Done(task, actions) => {
            assert_eq!(store.task(task_id(n)).await.unwrap().as_ref(), Some(&*task), "what it answers is what it holds");
            (*task, actions)
        }
        other => panic!("{other:?}"),
    }
}

fn assigned(n: u32, granted: bool) -> Event {
    Event::Assigned { attempt: attempt(n), node: node_id(n as u16), granted: granted.then_some(spool_id(1)) }
}
fn ended(n: u32, outcome: Outcome) -> Event {
    Event::Ended { attempt: attempt(n), outcome }
}

/// (seq, kind, state, attempt) of each line.
async fn history(store: &dyn Journal, id: TaskId) -> Vec<(u64, String, TaskState, Option<u32>)> {
    let lines = store.history(id).await.unwrap();
    lines.into_iter().map(|l| (l.seq, l.kind, l.state, l.attempt.map(AttemptNo::ordinal))).collect()
}

async fn accepts(store: &dyn Journal) {
    assert_eq!(store.task(task_id(1)).await.unwrap(), None);
    assert_eq!(store.history(task_id(1)).await.unwrap(), vec![]);
    store.accept(&task(1)).await.unwrap();
    assert_eq!(store.task(task_id(1)).await.unwrap(), Some(task(1)));
    assert_eq!(history(store, task_id(1)).await, [(1, "accepted".into(), TaskState::Pending, None)]);
    assert!(store.accept(&task(1)).await.is_err(), "an id is used once");
    assert_eq!(store.history(task_id(1)).await.unwrap().len(), 1, "and a refused one leaves no history");

    store.accept(&assigned_task(2)).await.unwrap();
    assert_eq!(store.task(task_id(2)).await.unwrap(), Some(assigned_task(2)));
    let lines = store.history(task_id(2)).await.unwrap();
    assert_eq!(lines.iter().map(|l| l.kind.as_str()).collect::<Vec<_>>(), ["accepted", "assigned"]);
    assert_eq!((lines[1].seq, lines[1].state, lines[1].node), (2, TaskState::Assigned, Some(node_id(1))));
    assert_eq!((lines[1].attempt, lines[1].at), (Some(attempt(1)), T0 + 2));
    assert!(lines[1].detail.contains(&node_id(1).to_string()), "it says which node: {:?}", lines[1].detail);
}

async fn a_whole_life(store: &dyn Journal) {
    use TaskState::*;
    store.accept(&task(1)).await.unwrap();
    let (t, actions) = done(store, 1, assigned(1, false), T0 + 10).await;
    assert_eq!((t.progress.state, t.progress.assigned_at), (Assigned, Some(T0 + 10)));
    assert_eq!(actions, [Action::Order { node: node_id(1), attempt: attempt(1) }]);
    let (t, actions) = done(store, 1, Event::Withdrawn { attempt: attempt(1) }, T0 + 11).await;
    assert_eq!((t.progress.state, t.progress.assigned_at), (Pending, None));
    let taken_back = [Action::Cancel { node: node_id(1), attempt: attempt(1) }, Action::Release { node: node_id(1) }];
    assert_eq!(actions, [&taken_back[..], &[Action::Requeue]].concat());
    done(store, 1, assigned(2, false), T0 + 12).await;
    let (t, _) = done(store, 1, Event::Granted { attempt: attempt(2), spool: spool_id(7) }, T0 + 13).await;
    assert_eq!(t.progress.attempt, Some(Attempt { no: attempt(2), node: node_id(2), granted: Some(spool_id(7)) }));
    let besides = Besides { result: None, sandbox_applied: Some("strict".into()), signed: Some(("key".into(), [8; 32])), digests: None };
    let started = Event::Started { attempt: attempt(2) };
    let Applied::Done(t, _) = store.apply(task_id(1), &started, besides, T0 + 14).await.unwrap() else { panic!() };
    assert_eq!((t.progress.state, t.progress.started_at), (Running, Some(T0 + 14)));
    assert_eq!((t.sandbox_applied.as_deref(), t.signed.as_ref()), (Some("strict"), Some(&("key".to_owned(), [8; 32]))));
    let (t, actions) = done(store, 1, Event::CancelRequested { reason: ReasonCode::CancelledByUser }, T0 + 15).await;
    assert_eq!(t.progress.cancel, Some(Cancel { at: T0 + 15, reason: ReasonCode::CancelledByUser }));
    assert_eq!(actions, [Action::Cancel { node: node_id(2), attempt: attempt(2) }]);
    let besides = Besides { result: Some(vec![0, 255]), ..Default::default() };
    let exit = ended(2, Outcome::Exited(3));
    let Applied::Done(t, actions) = store.apply(task_id(1), &exit, besides, T0 + 16).await.unwrap() else { panic!() };
    assert_eq!(actions, [Action::Release { node: node_id(2) }, Action::Finished]);
    assert_eq!((t.progress.state, t.progress.exit_code, t.progress.finished_at), (Failed, Some(3), Some(T0 + 16)));
    assert_eq!(t.result, Some(vec![0, 255]));
    assert_eq!(t.sandbox_applied.as_deref(), Some("strict"), "what an event does not bring stays");
    assert_eq!(store.task(task_id(1)).await.unwrap(), Some(*t));

    let kinds = [
        ("accepted", Pending, None),
        ("assigned", Assigned, Some(1)),
        ("withdrawn", Pending, Some(1)),
        ("assigned", Assigned, Some(2)),
        ("granted", Assigned, Some(2)),
        ("started", Running, Some(2)),
        ("cancel_requested", Running, None),
        ("ended", Failed, Some(2)),
    ];
    let expect: Vec<_> = kinds.into_iter().zip(1..).map(|((k, s, a), n)| (n, k.to_owned(), s, a)).collect();
    assert_eq!(history(store, task_id(1)).await, expect);
    let lines = store.history(task_id(1)).await.unwrap();
    assert_eq!(lines.iter().map(|l| l.at - T0).collect::<Vec<_>>(), [1, 10, 11, 12, 13, 14, 15, 16]);
    assert_eq!((lines[2].node, lines[6].node, lines[7].node), (Some(node_id(1)), None, Some(node_id(2))));
    assert!(lines[7].detail.contains("exit"), "it says why: {:?}", lines[7].detail);
}

async fn refusals(store: &dyn Journal) {
    use mesh_core::task::Refused::*;
    assert_eq!(apply(store, 9, assigned(1, true), T0).await, Applied::Unknown);
    store.accept(&task(1)).await.unwrap();
    assert_eq!(apply(store, 1, ended(1, Outcome::Done), T0).await, Applied::Refused(Illegal));
    done(store, 1, assigned(1, false), T0).await;
    // Moved by one write.
    let (moved, actions) = done(store, 1, assigned(2, true), T0).await;
    let taken_back = [Action::Cancel { node: node_id(1), attempt: attempt(1) }, Action::Release { node: node_id(1) }];
    assert_eq!(actions, [&taken_back[..], &[Action::Order { node: node_id(2), attempt: attempt(2) }]].concat());
    assert_eq!(moved.spec, task(1).spec, "the order needs it");
    for (node, found) in [(1, 0), (2, 1)] {
        let there = TaskFilter { node: Some(node_id(node)), ..Default::default() };
        assert_eq!(store.tasks(&there, all()).await.unwrap().len(), found);
    }
    let (before, lines) = (store.task(task_id(1)).await.unwrap(), history(store, task_id(1)).await);
    let besides = Besides {
        result: Some(vec![1]),
        sandbox_applied: Some("x".into()),
        signed: Some(("k".into(), [1; 32])),
        digests: Some(Digests::of_nothing()),
    };
    for late in [ended(1, Outcome::Done), Event::Started { attempt: attempt(1) }] {
        let applied = store.apply(task_id(1), &late, besides.clone(), T0).await.unwrap();
        assert_eq!(applied, Applied::Refused(Superseded), "a later attempt has taken over");
    }
    assert_eq!(store.task(task_id(1)).await.unwrap(), before, "a refused event changes nothing, nor does what came beside it");
    assert_eq!(history(store, task_id(1)).await, lines);
    done(store, 1, Event::Started { attempt: attempt(2) }, T0).await;
    assert_eq!(apply(store, 1, Event::Started { attempt: attempt(2) }, T0).await, Applied::Refused(Repeated));
    done(store, 1, ended(2, Outcome::Exited(0)), T0).await;
    for event in [ended(2, Outcome::Exited(1)), Event::CancelRequested { reason: ReasonCode::CancelledByUser }, assigned(3, true)] {
        assert_eq!(apply(store, 1, event, T0).await, Applied::Refused(Final));
    }
    assert_eq!(store.task(task_id(1)).await.unwrap().unwrap().progress.exit_code, Some(0));
}

/// What is written is read: every outcome, and a task with every field set.
async fn every_field(store: &dyn Journal) {
    let mut t = assigned_task(1);
    t.session = Some(session_id(3));
    t.named_node = Some(node_id(4));
    t.actor.key = Some(key_id(5));
    t.skill = "écho \"'".into();
    t.spec = vec![9; 100_000];
    t.timeout_secs = u64::MAX;
    t.progress.attempt.as_mut().unwrap().no = AttemptNo::first(u32::MAX);
    t.progress.cancel = Some(Cancel { at: -5, reason: ReasonCode::SessionClosed });
    t.progress.reason = Some(Reason::new(ReasonCode::Limit, ""));
    t.progress.exit_code = Some(i32::MIN);
    t.progress.signal = Some(9);
    t.progress.started_at = Some(i64::MAX);
    t.progress.finished_at = Some(0);
    t.result = Some(vec![]);
    t.sandbox_applied = Some(String::new());
    t.signed = Some(("k".into(), [6; 32]));
    store.accept(&t).await.unwrap();
    assert_eq!(store.task(t.id).await.unwrap(), Some(t));

    let outcomes = [
        Outcome::Exited(0),
        Outcome::Exited(-1),
        Outcome::Signalled(11),
        Outcome::TimedOut,
        Outcome::Cancelled,
        Outcome::Done,
        Outcome::Lost { detail: "power".into() },
        Outcome::NeverStarted(NeverStarted::Late),
        Outcome::NeverStarted(NeverStarted::Cancelled),
        Outcome::NeverStarted(NeverStarted::Refused(Reason::new(ReasonCode::PolicyDenied, "no network"))),
    ];
    for (n, outcome) in (10..).zip(outcomes) {
        store.accept(&assigned_task(n)).await.unwrap();
        let expect = step(&Terms::default(), &assigned_task(n).progress, &ended(1, outcome.clone()), T0 + 50).unwrap();
        let (t, actions) = done(store, n, ended(1, outcome), T0 + 50).await;
        assert_eq!((t.progress, actions), expect);
    }
    store.accept(&task(30)).await.unwrap();
    let (t, _) = done(store, 30, Event::Expired { detail: "node_offline".into() }, T0 + 99).await;
    assert_eq!(t.progress.reason, Some(Reason::new(ReasonCode::NoNode, "node_offline")));
}

/// The terms of the stored row decide, the pause is kept, and each attempt's end stands in the history.
async fn retries(store: &dyn Journal) {
    let mut t = task(1);
    t.terms = Terms {
        retries: 1,
        backoff_ms: 500,
        deadline: Some(T0 + 9_000),
        on_lost: OnLost::Requeue,
        lost_after: Some(0),
        ..Terms::default()
    };
    store.accept(&t).await.unwrap();
    done(store, 1, assigned(1, true), T0 + 10).await;
    let digests = Some(Digests { stdout: [1; 32], stderr: [2; 32] });
    let besides = Besides { result: Some(vec![1]), sandbox_applied: Some("x".into()), digests, signed: None };
    let Applied::Done(t, actions) = store.apply(t.id, &ended(1, Outcome::Exited(7)), besides, T0 + 20).await.unwrap() else { panic!() };
    assert_eq!(actions, [Action::Release { node: node_id(1) }, Action::Requeue]);
    assert_eq!((t.progress.state, t.progress.retried, t.progress.retry_at), (TaskState::Pending, 1, Some(T0 + 520)));
    assert_eq!(t.digests, digests, "also of an attempt without any output");
    assert_eq!(store.open_tasks(None, None, 10).await.unwrap(), [*t], "and is there after a restart");
    let (t, _) = done(store, 1, assigned(2, true), T0 + 530).await;
    assert_eq!(
        (t.progress.retry_at, t.result, t.sandbox_applied, t.digests),
        (None, None, None, None),
        "nothing of the attempt before is shown"
    );
    let (t, actions) = done(store, 1, Event::DeadlinePassed, T0 + 9_000).await;
    assert_eq!((t.progress.state, actions), (TaskState::Assigned, vec![Action::Cancel { node: node_id(2), attempt: attempt(2) }]));
    let (t, _) = done(store, 1, ended(2, Outcome::Cancelled), T0 + 9_001).await;
    assert_eq!((t.progress.state, t.progress.reason.unwrap().code), (TaskState::Failed, ReasonCode::Deadline));
    let lines = store.history(task_id(1)).await.unwrap();
    let kinds: Vec<&str> = lines.iter().map(|l| l.kind.as_str()).collect();
    assert_eq!(kinds, ["accepted", "assigned", "ended", "assigned", "deadline_passed", "ended"]);
    assert_eq!((lines[2].state, lines[2].detail.as_str()), (TaskState::Pending, "exit: exit code 7; retry 1 of 1 in 500 ms"));
}

/// The terms of the stored row decide what is lost and what is run again, and after a restart too.
async fn losses(store: &dyn Journal) {
    let silent = |n| Event::NodeSilent { attempt: attempt(n) };
    let mut t = task(1);
    t.terms = Terms { on_lost: OnLost::Requeue, lost_after: Some(u64::MAX), ..Terms::default() };
    store.accept(&t).await.unwrap();
    assert_eq!(store.task(t.id).await.unwrap().unwrap().terms, t.terms);
    done(store, 1, assigned(1, true), T0 + 10).await;
    let (t, actions) = done(store, 1, silent(1), T0 + 20).await;
    let node = node_id(1);
    assert_eq!(actions, [Action::Cancel { node, attempt: attempt(1) }, Action::Release { node }, Action::Requeue]);
    assert_eq!((t.progress.state, t.progress.retried, t.progress.retry_at), (TaskState::Pending, 0, Some(T0 + 520)));
    assert_eq!(store.open_tasks(None, None, 10).await.unwrap(), [t]);
    let lines = store.history(task_id(1)).await.unwrap();
    assert_eq!((lines[2].kind.as_str(), lines[2].state), ("node_silent", TaskState::Pending));
    assert_eq!(lines[2].detail, "its node was away too long; run again in 500 ms, as on_lost asks");
    store.accept(&assigned_task(2)).await.unwrap();
    let (t, _) = done(store, 2, silent(1), T0 + 30).await;
    assert_eq!((t.progress.state, t.progress.reason), (TaskState::Failed, Some(Reason::new(ReasonCode::Lost, "maybe_ran"))));
}

/// A parent and its children: written as one, counted by state, told when the last one has ended.
async fn fans(store: &dyn Journal) {
    use TaskState::*;
    // 1 stands for 2, which has its first attempt, 3 and 4.
    let whole = fan(1, 3);
    store.accept_fan(&whole).await.unwrap();
    for t in whole.tasks() {
        assert_eq!(store.task(t.id).await.unwrap().as_ref(), Some(t), "what is written is read");
    }
    let lines = store.history(task_id(1)).await.unwrap();
    assert_eq!((lines.len(), lines[0].state, lines[0].detail.as_str()), (1, Running, "shell by rest on 3 nodes"));
    assert_eq!(history(store, task_id(2)).await.len(), 2);
    // Of 11 to 14 one is there: none of them is written.
    store.accept(&task(14)).await.unwrap();
    assert!(store.accept_fan(&fan(11, 3)).await.is_err());
    for n in 11..=13 {
        assert_eq!(store.task(task_id(n)).await.unwrap(), None);
    }
    // Many fan-outs at once are as many by themselves.
    let others = [fan(21, 2), fan(31, 3), Fan { children: vec![task(2)], ..fan(41, 0) }];
    let written: Vec<bool> = join_all(others.iter().map(|f| store.accept_fan(f))).await.iter().map(Result::is_ok).collect();
    assert_eq!(written, [true, true, false]);
    assert_eq!(store.task(task_id(41)).await.unwrap(), None);

    let listed = async |filter: TaskFilter, window| -> Vec<i64> {
        store.tasks(&filter, window).await.unwrap().iter().map(|t| t.created_at - T0).collect()
    };
    let of = |parent| TaskFilter { parent: Some(task_id(parent)), ..TaskFilter::default() };
    assert_eq!(listed(of(1), all()).await, [4, 3, 2]);
    assert_eq!(listed(of(1), window(Some(task_id(4)), 1)).await, [3]);
    assert_eq!(listed(of(2), all()).await, Vec::<i64>::new());
    assert_eq!(listed(TaskFilter { state: Some(Assigned), ..of(1) }, all()).await, [2]);
    assert_eq!(listed(TaskFilter { user: Some(user_id(1)), session: None, ..of(1) }, all()).await, [4, 3, 2]);
    let granted = Within { owner: None, nodes: vec![node_id(2)], ..Within::default() };
    assert_eq!(listed(TaskFilter { within: Some(granted), ..of(1) }, all()).await, [3], "who may see a node sees its child");
    assert_eq!(listed(TaskFilter::default(), all()).await, [34, 33, 32, 31, 23, 22, 21, 14, 4, 3, 2, 1], "each in the plain list");
    let open: Vec<TaskId> = store.open_tasks(None, None, 4).await.unwrap().iter().map(|t| t.id).collect();
    assert_eq!(open, [1, 2, 3, 4].map(task_id), "a parent is open too");

    let standing = async || {
        let t = store.narrow(task_id(1)).await.unwrap().unwrap();
        let listed = TaskFilter { state: Some(t.progress.state), until: Some(T0 + 2), ..TaskFilter::default() };
        assert_eq!(store.tasks(&listed, all()).await.unwrap(), std::slice::from_ref(&t));
        let c = t.children.unwrap();
        assert_eq!(c.total, 3);
        c.by_state.into_iter().collect::<Vec<_>>()
    };
    assert_eq!(standing().await, [(Pending, 2), (Assigned, 1)]);
    assert_eq!(store.ends_of(task_id(1)).await.unwrap(), None);
    let over = |ends| Event::ChildrenEnded { ends };
    for illegal in [assigned(1, true), Event::Restored, Event::DeadlinePassed, over(vec![])] {
        assert_eq!(apply(store, 1, illegal, T0).await, Applied::Refused(Refused::Illegal), "a parent is never placed");
    }
    assert_eq!(apply(store, 2, over(vec![]), T0).await, Applied::Refused(Refused::Illegal));
    done(store, 2, ended(1, Outcome::Exited(3)), T0 + 10).await;
    assert_eq!(standing().await, [(Pending, 2), (Failed, 1)]);
    done(store, 3, Event::CancelRequested { reason: ReasonCode::CancelledByUser }, T0 + 11).await;
    let (t, _) = done(store, 1, Event::CancelRequested { reason: ReasonCode::SessionClosed }, T0 + 12).await;
    assert_eq!((t.progress.state, t.progress.cancel.unwrap().at), (Running, T0 + 12), "it ends with its children");
    assert_eq!(store.ends_of(task_id(1)).await.unwrap(), None);
    done(store, 4, Event::Expired { detail: "no_slot".into() }, T0 + 13).await;
    let mut ends = store.ends_of(task_id(1)).await.unwrap().unwrap();
    ends.sort_by_key(|e| e.id);
    let told: Vec<_> = ends.iter().map(|e| (e.at - T0, e.state, e.reason.as_ref().unwrap().code, e.exit_code)).collect();
    let expect = [
        (10, Failed, ReasonCode::Exit, Some(3)),
        (11, Cancelled, ReasonCode::CancelledByUser, None),
        (13, Failed, ReasonCode::NoNode, None),
    ];
    assert_eq!(told, expect);
    assert_eq!(ends[2].reason.as_ref().unwrap().detail, "no_slot");
    let (t, actions) = done(store, 1, over(ends.clone()), T0 + 20).await;
    assert_eq!(actions, [Action::Finished]);
    assert_eq!((t.progress.state, t.progress.finished_at), (Cancelled, Some(T0 + 20)));
    assert_eq!(apply(store, 1, over(ends), T0 + 21).await, Applied::Refused(Refused::Final));
    let kinds: Vec<String> = history(store, task_id(1)).await.into_iter().map(|l| l.1).collect();
    assert_eq!(kinds, ["accepted", "cancel_requested", "children_ended"]);
    assert_eq!(standing().await, [(Failed, 2), (Cancelled, 1)]);
}

async fn races(store: &dyn Journal) {
    store.accept(&assigned_task(1)).await.unwrap();
    let exits: Vec<Event> = (0..50).map(|code| ended(1, Outcome::Exited(code))).collect();
    let outcomes = join_all(exits.iter().map(|e| store.apply(task_id(1), e, Besides::default(), T0))).await;
    let mut winners = vec![];
    for (code, outcome) in (0..).zip(outcomes) {
        match outcome.unwrap() {
            Applied::Done(t, _) => winners.push((code, t.progress.exit_code)),
            other => assert_eq!(other, Applied::Refused(Refused::Final)),
        }
    }
    assert_eq!(winners.len(), 1, "exactly one ends it: {winners:?}");
    assert_eq!(winners[0].1, Some(winners[0].0));
    assert_eq!(store.task(task_id(1)).await.unwrap().unwrap().progress.exit_code, winners[0].1, "the winner's word is kept");
    assert_eq!(store.history(task_id(1)).await.unwrap().len(), 3);
}

/// Tasks do not hurt each other, whatever shares a commit.
async fn many_at_once(store: &dyn Journal) {
    let taken = task(7);
    store.accept(&taken).await.unwrap();
    let tasks: Vec<Task> = (1..=130).map(assigned_task).collect();
    let outcomes = join_all(tasks.iter().map(|t| store.accept(t))).await;
    for (t, outcome) in tasks.iter().zip(outcomes) {
        assert_eq!(outcome.is_err(), t.id == taken.id, "only the one whose id is taken fails");
    }
    assert_eq!(store.task(taken.id).await.unwrap(), Some(taken));
    let started = Event::Started { attempt: attempt(1) };
    let outcomes = join_all(tasks.iter().map(|t| store.apply(t.id, &started, Besides::default(), T0))).await;
    for (t, outcome) in tasks.iter().zip(outcomes) {
        match outcome.unwrap() {
            Applied::Done(after, _) => assert_eq!((after.id, after.progress.state), (t.id, TaskState::Running)),
            other => assert_eq!((t.id, other), (task_id(7), Applied::Refused(Refused::Illegal))),
        }
    }
    for t in tasks.iter().filter(|t| t.id != task_id(7)) {
        assert_eq!(store.task(t.id).await.unwrap().unwrap().spec, t.spec);
        assert_eq!(store.history(t.id).await.unwrap().len(), 3);
    }
}

async fn lists(store: &dyn Journal) {
    for n in 1..=8 {
        let mut t = task(n);
        t.session = (n % 2 == 0).then(|| session_id(1));
        t.actor.user = user_id(1 + n / 5);
        t.named_node = (n == 3).then(|| node_id(1));
        t.skill = if n == 5 { "echo".into() } else { "shell".into() };
        store.accept(&t).await.unwrap();
    }
    done(store, 1, assigned(1, true), T0).await;
    done(store, 2, assigned(2, true), T0).await;
    done(store, 4, Event::CancelRequested { reason: ReasonCode::CancelledByUser }, T0).await;

    let ids = async |filter: TaskFilter, w| -> Vec<i64> {
        let tasks = store.tasks(&filter, w).await.unwrap();
        tasks.iter().map(|t| t.created_at - T0).collect()
    };
    let f = TaskFilter::default;
    assert_eq!(ids(f(), all()).await, [8, 7, 6, 5, 4, 3, 2, 1], "newest first");
    assert_eq!(ids(f(), window(None, 3)).await, [8, 7, 6]);
    assert_eq!(ids(f(), window(Some(task_id(6)), 3)).await, [5, 4, 3], "older than the cursor");
    assert_eq!(ids(f(), window(Some(task_id(2)), 3)).await, [1]);
    assert_eq!(ids(f(), window(Some(task_id(1)), 3)).await, Vec::<i64>::new());
    assert_eq!(ids(f(), window(None, 0)).await, Vec::<i64>::new());
    assert_eq!(ids(TaskFilter { session: Some(session_id(1)), ..f() }, all()).await, [8, 6, 4, 2]);
    assert_eq!(ids(TaskFilter { session: Some(session_id(1)), ..f() }, window(Some(task_id(8)), 2)).await, [6, 4]);
    assert_eq!(ids(TaskFilter { user: Some(user_id(2)), ..f() }, all()).await, [8, 7, 6, 5]);
    assert_eq!(ids(TaskFilter { node: Some(node_id(1)), ..f() }, all()).await, [3, 1], "named for it or given to it");
    assert_eq!(ids(TaskFilter { state: Some(TaskState::Cancelled), ..f() }, all()).await, [4]);
    assert_eq!(ids(TaskFilter { state: Some(TaskState::Assigned), ..f() }, all()).await, [2, 1]);
    assert_eq!(ids(TaskFilter { skill: Some("echo".into()), ..f() }, all()).await, [5]);
    assert_eq!(ids(TaskFilter { since: Some(T0 + 7), ..f() }, all()).await, [8, 7], "inclusive");
    assert_eq!(ids(TaskFilter { until: Some(T0 + 3), ..f() }, all()).await, [2, 1], "exclusive");
    let within = |w| TaskFilter { within: Some(w), ..f() };
    assert_eq!(ids(within(Within::owned_by(user_id(2))), all()).await, [8, 7, 6, 5]);
    assert_eq!(ids(within(Within::default()), all()).await, Vec::<i64>::new());
    assert_eq!(ids(within(Within { nodes: vec![node_id(1)], ..Within::default() }), all()).await, [3, 1]);
    let many: Vec<_> = (100..40_100).map(node_id).collect();
    assert_eq!(ids(within(Within { nodes: [many, vec![node_id(1)]].concat(), ..Within::default() }), all()).await, [3, 1]);
    let granted = Within { sessions: vec![session_id(1)], nodes: vec![node_id(1)], ..Within::owned_by(user_id(2)) };
    assert_eq!(ids(within(granted), all()).await, [8, 7, 6, 5, 4, 3, 2, 1], "each once");
    let narrow = TaskFilter { session: Some(session_id(1)), user: Some(user_id(1)), since: Some(T0 + 2), until: Some(T0 + 4), ..f() };
    assert_eq!(ids(narrow, all()).await, [2], "every field narrows");

    // Every pair of what narrows, against what each of the two shows.
    let singles = [
        TaskFilter { session: Some(session_id(1)), ..f() },
        TaskFilter { node: Some(node_id(1)), ..f() },
        TaskFilter { user: Some(user_id(1)), ..f() },
        TaskFilter { user: Some(user_id(9)), ..f() },
        within(Within::owned_by(user_id(1))),
        within(Within { sessions: vec![session_id(1)], nodes: vec![node_id(1), node_id(9)], ..Within::owned_by(user_id(2)) }),
        TaskFilter { state: Some(TaskState::Assigned), ..f() },
        TaskFilter { state: Some(TaskState::Failed), ..f() },
        TaskFilter { skill: Some("shell".into()), ..f() },
        TaskFilter { since: Some(T0 + 2), ..f() },
        TaskFilter { until: Some(T0 + 8), ..f() },
        TaskFilter { since: Some(i64::MIN), until: Some(i64::MAX), ..f() },
        TaskFilter { since: Some(i64::MAX), ..f() },
        TaskFilter { until: Some(-1), ..f() },
    ];
    for one in &singles {
        let shown = ids(one.clone(), all()).await;
        for two in &singles {
            let both = TaskFilter {
                within: one.within.clone().or(two.within.clone()),
                session: one.session.or(two.session),
                node: one.node.or(two.node),
                user: one.user.or(two.user),
                state: one.state.or(two.state),
                skill: one.skill.clone().or(two.skill.clone()),
                parent: one.parent.or(two.parent),
                since: one.since.or(two.since),
                until: one.until.or(two.until),
            };
            let other = ids(two.clone(), all()).await;
            let alike = one.within.is_some() && two.within.is_some()
                || one.user.is_some() && two.user.is_some()
                || one.state.is_some() && two.state.is_some()
                || one.since.is_some() && two.since.is_some()
                || one.until.is_some() && two.until.is_some();
            let expect: Vec<i64> = shown.iter().copied().filter(|n| alike || other.contains(n)).collect();
            if !alike {
                assert_eq!(ids(both.clone(), all()).await, expect, "{both:?}");
            }
            let page = ids(both.clone(), window(Some(task_id(7)), 2)).await;
            let older: Vec<i64> = ids(both.clone(), all()).await.into_iter().filter(|n| *n < 7).take(2).collect();
            assert_eq!(page, older, "{both:?}");
        }
    }

    let open = async |session, after, limit| -> Vec<i64> {
        let tasks = store.open_tasks(session, after, limit).await.unwrap();
        tasks.iter().map(|t| t.created_at - T0).collect()
    };
    assert_eq!(open(None, None, 100).await, [1, 2, 3, 5, 6, 7, 8], "oldest first, none that ended");
    assert_eq!(open(None, None, 2).await, [1, 2]);
    assert_eq!(open(None, Some(task_id(3)), 3).await, [5, 6, 7]);
    assert_eq!(open(None, Some(task_id(8)), 3).await, Vec::<i64>::new());
    assert_eq!(open(Some(session_id(1)), None, 100).await, [2, 6, 8]);
    assert_eq!(open(Some(session_id(1)), Some(task_id(2)), 1).await, [6]);
    assert_eq!(open(Some(session_id(2)), None, 100).await, Vec::<i64>::new());
}

/// A long spec is read when it is asked for, and comes with what leads to an order.
async fn narrow(store: &dyn Journal) {
    let mut specs = vec![];
    for n in 1..=4 {
        let mut t = if n == 4 { task(n) } else { assigned_task(n) };
        let bytes = [INLINE_SPEC_BYTES, INLINE_SPEC_BYTES + 1, 50_000, 1 << 20][usize::from(n) - 1];
        t.spec = (0..bytes).map(|i| (i * 7 + usize::from(n)) as u8).collect();
        t.session = Some(session_id(1));
        store.accept(&t).await.unwrap();
        assert_eq!(store.task(t.id).await.unwrap().as_ref(), Some(&t), "alone it comes whole");
        specs.push((t.id, t.spec));
    }
    let short = |t: &Task| if t.id == task_id(1) { specs[0].1.clone() } else { vec![] };
    for t in store.tasks(&TaskFilter::default(), all()).await.unwrap() {
        assert!(t.spec == short(&t), "{}: {} bytes", t.id, t.spec.len());
        assert_eq!(Task { spec: vec![], ..t.clone() }, Task { spec: vec![], ..store.task(t.id).await.unwrap().unwrap() });
    }
    for t in store.open_tasks(None, None, 9).await.unwrap() {
        assert!(t.spec == short(&t), "{}: {} bytes", t.id, t.spec.len());
    }
    for n in 1..=4 {
        let t = store.narrow(task_id(n)).await.unwrap().unwrap();
        assert!(t.spec == short(&t), "{}: {} bytes", t.id, t.spec.len());
        assert_eq!(Task { spec: vec![], ..t.clone() }, Task { spec: vec![], ..store.task(t.id).await.unwrap().unwrap() });
    }
    assert_eq!(store.narrow(task_id(9)).await.unwrap(), None);
    let wanted: Vec<TaskId> = [3, 1, 9, 4, 2].map(task_id).into();
    let read = async |max| store.specs(&wanted, max).await.unwrap();
    let in_order = [2, 0, 3, 1].map(|i: usize| specs[i].clone());
    assert!(read(usize::MAX).await == in_order, "in the order that was asked for, without the unknown one");
    assert!(read(0).await == in_order[..1], "one at least");
    assert!(read(50_000 + INLINE_SPEC_BYTES).await == in_order[..2]);
    assert!(read(50_000 + INLINE_SPEC_BYTES + 1).await == in_order[..2], "the third would be too much");
    assert!(store.specs(&[], 9).await.unwrap().is_empty());

    for (n, event, whole) in [
        (3, Event::Started { attempt: attempt(1) }, false),
        (3, ended(1, Outcome::Exited(0)), false),
        (1, Event::Started { attempt: attempt(1) }, true),
        (4, assigned(1, true), true),
    ] {
        let Applied::Done(t, _) = apply(store, n, event.clone(), T0).await else { panic!() };
        let expect = if whole { specs[usize::from(n) - 1].1.clone() } else { vec![] };
        assert!(t.spec == expect, "{event:?}: {} bytes", t.spec.len());
        assert!(store.task(t.id).await.unwrap().unwrap().spec == specs[usize::from(n) - 1].1, "it stays as it was");
    }
}

/// A task is read with the totals of its newest attempt. For stores that are both.
pub async fn journal_and_output<S: Journal + Output + ?Sized>(make: impl AsyncFn() -> Arc<S>) {
    let store = make().await;
    let id = task_id(1);
    store.accept(&task(1)).await.unwrap();
    let apply = async |event: Event| match store.apply(id, &event, Besides::default(), T0).await.unwrap() {
        Applied::Done(task, _) => task.output,
        other => panic!("{other:?}"),
    };
    let append =
        async |n, bytes: &'static str| store.append(id, attempt(n), vec![frame(1, Stream::Stdout, bytes)], 99).await.unwrap().unwrap();
    let read = async || {
        let lists = store.tasks(&TaskFilter::default(), all()).await.unwrap();
        let one = store.task(id).await.unwrap().unwrap();
        assert_eq!(lists[0], one);
        one.output
    };
    apply(assigned(1, true)).await;
    let first = append(1, "first").await;
    assert_eq!((read().await, first.stdout_bytes), (first, 5));
    assert_eq!(apply(ended(1, Outcome::NeverStarted(NeverStarted::Late))).await, first, "kept until another attempt is made");
    assert_eq!(apply(assigned(2, true)).await, OutputTotals::default());
    assert_eq!(read().await, OutputTotals::default());
    let second = append(2, "2nd").await;
    assert_eq!(read().await, second);
    assert_eq!(store.open_tasks(None, None, 9).await.unwrap()[0].output, second);
    append(1, "late").await;
    assert_eq!(read().await, second, "an older attempt's output is not the task's");
    // What its node tells of the output stands beside it, and neither takes anything from the other.
    let digests = Some(Digests { stdout: [1; 32], stderr: [2; 32] });
    let end = ended(2, Outcome::Exited(0));
    let Applied::Done(t, _) = store.apply(id, &end, Besides { digests, ..Default::default() }, T0).await.unwrap() else { panic!() };
    assert_eq!((t.output, t.digests), (second, digests));
    assert_eq!(read().await, second);
    assert_eq!(store.task(id).await.unwrap().unwrap().digests, digests);
    store.append(id, attempt(2), vec![frame(2, Stream::Stderr, "later")], 99).await.unwrap().unwrap();
    let t = store.task(id).await.unwrap().unwrap();
    assert_eq!((t.output.stderr_bytes, t.digests), (5, digests));
}

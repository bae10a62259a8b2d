use super::sample::{agent, agent_id, assigned_task, attempt, entry_id, frame, message_id, session, session_id, task, task_id, user_id};
use super::{T0, all};
use hub_engine::ports::{Agents, Applied, Besides, Journal, Memory, Messages, Output, Purges, Sessions};
use hub_engine::records::*;
use mesh_core::SessionId;
use mesh_core::task::{Event, Outcome};
use std::sync::Arc;

/// For stores that are all of it.
pub async fn purges<S>(make: impl AsyncFn() -> Arc<S>)
where
    S: Journal + Output + Sessions + Memory + Messages + Purges + Agents + ?Sized,
{
    let store = &*make().await;
    for n in [1, 2] {
        fill(store, n).await;
        store.add_agent(&Agent { session: Some(session_id(n)), ..agent(n) }).await.unwrap();
        let source = LogSource { task: task_id(n), attempt: attempt(1) };
        let said = frame(1, Stream::Stdout, format!("{}and no end", "secret\n".repeat(20_000)));
        store.add_log(agent_id(n), source, vec![said], false, 1 << 20).await.unwrap();
    }
    let (id, by) = (session_id(1), Some(user_id(1)));
    assert_eq!(store.begin_purge(session_id(9), by, T0).await.unwrap(), PurgeStart::Unknown);
    assert_eq!(store.begin_purge(id, by, T0).await.unwrap(), PurgeStart::Active);
    store.accept(&Task { session: Some(id), ..task(90) }).await.unwrap();
    // One that ended without a word.
    let silent = Task { session: Some(id), ..assigned_task(91) };
    store.accept(&silent).await.unwrap();
    store.apply(silent.id, &Event::Ended { attempt: attempt(1), outcome: Outcome::Done }, Besides::default(), T0 + 40).await.unwrap();
    store.close_session(id, by, T0 + 50).await.unwrap();
    assert_eq!(store.begin_purge(id, by, T0).await.unwrap(), PurgeStart::TasksOpen, "what runs may still send output");
    store.apply(task_id(90), &Event::Expired { detail: "x".into() }, Besides::default(), T0 + 60).await.unwrap();
    assert_eq!(store.purging(9).await.unwrap(), vec![]);
    assert_eq!(store.begin_purge(id, by, T0 + 70).await.unwrap(), PurgeStart::Begun);
    assert_eq!(store.begin_purge(id, by, T0 + 80).await.unwrap(), PurgeStart::Begun, "begun and not done");
    assert_eq!(store.purging(9).await.unwrap(), [id], "found again after a crash");
    assert_eq!(Sessions::session(store, id).await.unwrap().unwrap().purged_at, Some(T0 + 70));

    let (mut after, mut steps) = (None, 0);
    while let PurgeStep::Until(task) = store.purge_step(id, after, 2).await.unwrap() {
        (after, steps) = (task, steps + 1);
        // As if the process had begun anew in the middle.
        if steps == 4 {
            after = None;
        }
    }
    assert!(steps > 4, "a step does no more than it may: {steps}");
    assert_eq!(store.purging(9).await.unwrap(), vec![]);
    assert_eq!(store.begin_purge(id, by, T0 + 90).await.unwrap(), PurgeStart::Done);
    while store.sweep(2).await.unwrap() > 0 {}

    assert_eq!(store.log(agent_id(1), 0, 9, 999).await.unwrap(), LogPage { total: 20_000, first: 20_000, lines: vec![] });
    let ended = mesh_core::agent::Event::Ended { task: task_id(1), end: mesh_core::agent::End::Clean };
    store.apply_agent(agent_id(1), &ended, T0 + 95, 1 << 20).await.unwrap();
    let page = store.log(agent_id(1), 0, 9, 999).await.unwrap();
    assert!(page.lines.len() == 1 && page.first == 20_000, "what had no end yet is gone too: {page:?}");
    assert_eq!(store.log(agent_id(2), 0, 9, 999).await.unwrap().first, 0, "another session's stays");
    assert_eq!(store.memory(id, "k").await.unwrap(), None);
    assert_eq!(store.messages(id, all(), u64::MAX).await.unwrap().items, vec![]);
    for n in 11..=15 {
        let t = store.task(task_id(n)).await.unwrap().unwrap();
        assert_eq!((t.output.stdout_bytes, t.output.kept_seq, t.output.truncated), (60_003, 0, true), "its size stays known");
        assert_eq!(t.result, None);
        assert_eq!(t.spec, task(n).spec, "the task itself stays");
        assert_eq!(store.totals(t.id, attempt(1)).await.unwrap(), t.output);
        assert_eq!(store.read(t.id, attempt(1), 0, usize::MAX).await.unwrap(), vec![]);
        assert_eq!(store.tail(t.id, attempt(1), Stream::Stdout, 99).await.unwrap(), b"");
    }
    for n in [90, 91] {
        assert!(!store.task(task_id(n)).await.unwrap().unwrap().output.truncated, "what had no output lost none");
    }
    // What was on its way and comes later is counted and not kept, little or much.
    for (task, seq, size) in [(task_id(11), 3, 9), (task_id(12), 3, 90_000), (silent.id, 1, 9), (silent.id, 2, 90_000)] {
        let before = store.totals(task, attempt(1)).await.unwrap();
        let late = store.append(task, attempt(1), vec![frame(seq, Stream::Stdout, vec![7; size])], 1 << 20).await.unwrap().unwrap();
        let bytes = before.stdout_bytes + size as u64;
        assert_eq!((late.durable_seq, late.kept_seq, late.stdout_bytes, late.truncated), (seq, 0, bytes, true), "{task}");
        assert_eq!(store.totals(task, attempt(1)).await.unwrap(), late);
        assert_eq!(store.task(task).await.unwrap().unwrap().output, late);
        assert_eq!(store.read(task, attempt(1), 0, usize::MAX).await.unwrap(), vec![]);
    }
    let acts: Vec<_> =
        store.activity(id, None, 99).await.unwrap().into_iter().filter(|a| a.place.1 == Place::OWN).map(|a| a.what).collect();
    assert_eq!(acts, [Happened::Session { act: SessionAct::Purged, subject: String::new() }]);

    // Another session's things are as they were.
    let id = session_id(2);
    assert!(store.memory(id, "k").await.unwrap().is_some());
    assert_eq!(store.messages(id, all(), u64::MAX).await.unwrap().items.len(), 5);
    let t = store.task(task_id(21)).await.unwrap().unwrap();
    assert_eq!((t.result.as_deref(), t.output.truncated), (Some(&b"result"[..]), false));
    assert_eq!(store.read(t.id, attempt(1), 0, usize::MAX).await.unwrap().len(), 2);
}

/// Memory, five messages, five tasks with output small and large.
async fn fill<S>(store: &S, n: u16)
where
    S: Journal + Output + Sessions + Memory + Messages + ?Sized,
{
    let id: SessionId = session_id(n);
    store.add_session(&session(n, 1)).await.unwrap();
    let entry = MemoryEntry { id: entry_id(n), session: id, key: "k".into(), value: b"1".to_vec(), updated_at: T0 };
    store.put_memory(&entry, None, 9).await.unwrap();
    for m in 1..=5 {
        let message = Message { id: message_id(n * 10 + m), session: id, role: MessageRole::User, content: "hello".into(), created_at: T0 };
        store.add_message(&message, None).await.unwrap();
        let t = Task { session: Some(id), ..assigned_task(n * 10 + m) };
        store.accept(&t).await.unwrap();
        let frames = vec![frame(1, Stream::Stdout, "abc"), frame(2, Stream::Stdout, vec![m as u8; 60_000])];
        store.append(t.id, attempt(1), frames, 1 << 20).await.unwrap();
        let besides = Besides { result: Some(b"result".to_vec()), ..Default::default() };
        let ended = Event::Ended { attempt: attempt(1), outcome: Outcome::Done };
        assert!(matches!(store.apply(t.id, &ended, besides, T0 + 40).await.unwrap(), Applied::Done(..)));
    }
}

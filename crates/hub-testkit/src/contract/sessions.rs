use super::sample::{assigned_task, attempt, node_id, session, session_id, task, task_id, user_id};
use super::{T0, all, window};
use futures::future::join_all;
use hub_engine::ports::{ACTIVITY_KEPT, ACTIVITY_OVER, Applied, Besides, Journal, Sessions};
use hub_engine::records::SessionAct::{self, *};
use hub_engine::records::{Activity, Happened, Session, SessionChange, Task, Within};
use mesh_core::SessionId;
use mesh_core::task::{Event, Outcome, ReasonCode, TaskState};
use std::sync::Arc;

pub async fn sessions(make: impl AsyncFn() -> Arc<dyn Sessions>) {
    lists(&*make().await).await;
    nodes_in_order(&*make().await).await;
    ends(&*make().await).await;
    changes(&*make().await).await;
    expiry(&*make().await).await;
    activity_of_its_own(&*make().await).await;
}

const GROUP: usize = 500;

/// A session that is used for ever does not fill the store.
pub async fn activity_has_a_bound(make: impl AsyncFn() -> Arc<dyn Sessions>) {
    let store = &*make().await;
    let (busy, quiet) = (session_id(1), session_id(2));
    store.add_session(&session(1, 1)).await.unwrap();
    store.add_session(&session(2, 1)).await.unwrap();
    let (kept, most) = (ACTIVITY_KEPT as usize, (ACTIVITY_KEPT + ACTIVITY_OVER) as usize);
    let names = async || {
        let lines = store.activity(busy, None, u32::MAX).await.unwrap();
        let name = |a: Activity| match a.what {
            Happened::Session { subject, .. } => subject,
            other => panic!("{other:?}"),
        };
        lines.into_iter().map(name).collect::<Vec<String>>()
    };
    let rename = async |n: usize| {
        let change = SessionChange { name: Some(n.to_string()), ..Default::default() };
        assert!(store.change_session(busy, &change, None, T0).await.unwrap());
    };
    let mut at = 0;
    for until in [kept - 1, most + 100, most + 700] {
        while at < until {
            let next = until.min(at + GROUP);
            join_all((at + 1..=next).map(&rename)).await;
            at = next;
        }
        let names = names().await;
        let expect = (at + 1).min(kept)..=(at + 1).min(most);
        assert!(expect.contains(&names.len()), "{} lines after {at}", names.len());
        // Those of one group may have been written in any order.
        assert!(names.iter().take(kept).filter_map(|n| n.parse::<usize>().ok()).all(|n| n + kept + GROUP > at), "the newest are there");
    }
    assert_eq!(store.activity(quiet, None, u32::MAX).await.unwrap().len(), 1, "another's are its own");
}

async fn lists(store: &dyn Sessions) {
    assert_eq!(store.session(session_id(1)).await.unwrap(), None);
    assert_eq!(store.sessions(None, all()).await.unwrap(), vec![]);
    for n in [2, 1, 4, 3] {
        let mut s = session(n, 1 + n % 2);
        s.nodes = if n == 4 { vec![node_id(9), node_id(8)] } else { vec![] };
        store.add_session(&s).await.unwrap();
        assert_eq!(store.session(s.id).await.unwrap(), Some(s));
    }
    assert!(store.add_session(&session(1, 1)).await.is_err(), "an id is used once");
    let ids = async |within: Option<Within>, w| store.sessions(within.as_ref(), w).await.unwrap().iter().map(|s| s.id).collect::<Vec<_>>();
    let id = session_id;
    assert_eq!(ids(None, all()).await, [id(4), id(3), id(2), id(1)], "newest first");
    assert_eq!(ids(None, window(Some(id(4)), 2)).await, [id(3), id(2)]);
    assert_eq!(ids(None, window(Some(id(1)), 2)).await, vec![]);
    assert_eq!(ids(Some(Within::owned_by(user_id(2))), all()).await, [id(3), id(1)]);
    assert_eq!(ids(Some(Within::owned_by(user_id(2))), window(Some(id(3)), 9)).await, [id(1)]);
    assert_eq!(ids(Some(Within::owned_by(user_id(7))), all()).await, vec![]);
    let granted = Within { sessions: vec![id(4), id(3), id(9)], ..Within::owned_by(user_id(2)) };
    assert_eq!(ids(Some(granted), all()).await, [id(4), id(3), id(1)], "each once");
    assert_eq!(ids(Some(Within::default()), all()).await, vec![], "within nothing");
}

async fn nodes_in_order(store: &dyn Sessions) {
    let id = session_id(1);
    store.add_session(&session(1, 1)).await.unwrap();
    let nodes = async || store.session(id).await.unwrap().unwrap().nodes;
    for n in [3, 1, 2, 3, 1] {
        store.attach(id, node_id(n), None, T0 + i64::from(n)).await.unwrap();
    }
    assert_eq!(nodes().await, [node_id(3), node_id(1), node_id(2)], "in the order of attachment; again changes nothing");
    assert!(store.detach(id, node_id(3), None, T0).await.unwrap());
    assert!(!store.detach(id, node_id(3), None, T0).await.unwrap(), "it was not attached");
    assert!(!store.detach(session_id(9), node_id(3), None, T0).await.unwrap());
    store.attach(id, node_id(3), None, T0).await.unwrap();
    assert_eq!(nodes().await, [node_id(1), node_id(2), node_id(3)], "who comes back comes last");
    assert!(store.attach(session_id(9), node_id(1), None, T0).await.is_err(), "there is no such session");
    assert_eq!(store.sessions(None, all()).await.unwrap()[0].nodes, nodes().await, "lists show them too");
}

async fn ends(store: &dyn Sessions) {
    let id = session_id(1);
    store.add_session(&session(1, 1)).await.unwrap();
    let end = async || store.session(id).await.unwrap().unwrap().expires_at;
    assert!(store.touch_session(id, T0 + 500).await.unwrap());
    assert_eq!(end().await, T0 + 1500, "now and its time to live");
    assert!(!store.touch_session(session_id(9), T0).await.unwrap(), "unknown");

    store.attach(id, node_id(1), None, T0 + 550).await.unwrap();
    assert_eq!(end().await, T0 + 1550, "an attachment is a use");
    assert!(store.close_session(id, None, T0 + 600).await.unwrap());
    assert!(!store.close_session(id, None, T0 + 700).await.unwrap(), "closed before");
    assert!(!store.close_session(session_id(9), None, T0).await.unwrap(), "unknown");
    let closed = store.session(id).await.unwrap().unwrap();
    assert_eq!(closed.closed_at, Some(T0 + 600), "the first close counts");
    assert_eq!(closed.nodes, [node_id(1)]);
    assert!(!closed.is_active());
    assert!(!store.touch_session(id, T0 + 900).await.unwrap());
    assert_eq!(end().await, T0 + 1550, "the end of a closed session no longer slides");
}

async fn changes(store: &dyn Sessions) {
    let id = session_id(1);
    store.add_session(&session(1, 1)).await.unwrap();
    let change = |name: Option<&str>, ttl_ms| SessionChange { name: name.map(str::to_owned), ttl_ms };
    let by = Some(user_id(1));
    assert!(store.change_session(id, &change(Some("new"), None), by, T0 + 100).await.unwrap());
    let s = store.session(id).await.unwrap().unwrap();
    assert_eq!((s.name.as_str(), s.ttl_ms, s.expires_at), ("new", 1000, T0 + 1100), "any change is a use");
    assert!(store.change_session(id, &change(None, Some(50)), by, T0 + 200).await.unwrap());
    let s = store.session(id).await.unwrap().unwrap();
    assert_eq!((s.name.as_str(), s.ttl_ms, s.expires_at), ("new", 50, T0 + 250));
    assert!(store.change_session(id, &change(Some("new"), None), by, T0 + 300).await.unwrap());
    assert!(!store.change_session(session_id(9), &change(Some("x"), None), by, T0).await.unwrap(), "unknown");
    store.close_session(id, by, T0 + 400).await.unwrap();
    assert!(!store.change_session(id, &change(Some("late"), None), by, T0 + 500).await.unwrap(), "closed");
    assert_eq!(store.session(id).await.unwrap().unwrap().name, "new");
    let told = acts(store, id).await;
    assert_eq!(told, [(Closed, String::new()), (Renamed, "new".into()), (Created, "work 1".into())], "the same name again is no news");
}

async fn expiry(store: &dyn Sessions) {
    assert_eq!(store.next_end().await.unwrap(), None);
    assert_eq!(store.expire_sessions(T0 + 9999, 10).await.unwrap(), vec![]);
    for n in 1..=4 {
        let s = session(n, n);
        store.add_session(&Session { expires_at: T0 + 100 * i64::from(n), ..s }).await.unwrap();
    }
    store.close_session(session_id(1), None, T0).await.unwrap();
    assert_eq!(store.next_end().await.unwrap(), Some(T0 + 200), "a closed one has no end to come");
    assert_eq!(store.expire_sessions(T0 + 199, 10).await.unwrap(), vec![], "not yet");
    assert_eq!(store.expire_sessions(T0 + 400, 1).await.unwrap(), [(session_id(2), user_id(2))], "at most so many, the earliest first");
    let s = store.session(session_id(2)).await.unwrap().unwrap();
    assert_eq!((s.expired_at, s.closed_at, s.is_active()), (Some(T0 + 400), None, false));
    assert!(!store.touch_session(session_id(2), T0 + 400).await.unwrap(), "what has expired does not come back");
    assert!(store.touch_session(session_id(3), T0 + 400).await.unwrap(), "a use that comes first keeps it");
    assert_eq!(store.expire_sessions(T0 + 400, 10).await.unwrap(), [(session_id(4), user_id(4))]);
    assert_eq!(store.expire_sessions(T0 + 400, 10).await.unwrap(), vec![], "told once");
    assert_eq!(acts(store, session_id(2)).await[0].0, Expired);
    assert!(store.close_session(session_id(2), None, T0 + 500).await.unwrap(), "an expired one can be closed");
}

async fn activity_of_its_own(store: &dyn Sessions) {
    let (id, by) = (session_id(1), Some(user_id(2)));
    store.add_session(&session(1, 1)).await.unwrap();
    store.add_session(&session(2, 1)).await.unwrap();
    let node = node_id(1);
    for _ in 0..2 {
        store.attach(id, node, by, T0 + 1).await.unwrap();
    }
    // At the same moment, and with a clock that went back.
    assert!(store.detach(id, node, by, T0 + 1).await.unwrap());
    assert!(!store.detach(id, node, by, T0 + 1).await.unwrap());
    store.close_session(id, by, T0 - 5000).await.unwrap();
    let told = acts(store, id).await;
    let expect = [(Closed, String::new()), (Detached, node.to_string()), (Attached, node.to_string()), (Created, "work 1".into())];
    assert_eq!(told, expect, "newest first, as they happened");
    let all = store.activity(id, None, 100).await.unwrap();
    assert_eq!((all[0].at, all[0].actor, all[3].actor), (T0 - 5000, by, Some(user_id(1))));
    let mut paged = vec![];
    while let Some(line) = store.activity(id, paged.last().map(|a: &Activity| a.place), 1).await.unwrap().pop() {
        paged.push(line);
    }
    assert_eq!(paged, all);
}

async fn acts(store: &dyn Sessions, id: SessionId) -> Vec<(SessionAct, String)> {
    let own = |a: Activity| match a.what {
        Happened::Session { act, subject } => Some((act, subject)),
        _ => None,
    };
    store.activity(id, None, 100).await.unwrap().into_iter().filter_map(own).collect()
}

/// Tasks keep their session, and stand in its activity. For stores that are both.
pub async fn sessions_and_tasks<S: Journal + Sessions + ?Sized>(make: impl AsyncFn() -> Arc<S>) {
    work_keeps_a_session(&*make().await).await;
    tasks_in_activity(&*make().await).await;
}

async fn work_keeps_a_session<S: Journal + Sessions + ?Sized>(store: &S) {
    let id = session_id(1);
    store.add_session(&session(1, 1)).await.unwrap();
    store.add_session(&session(2, 1)).await.unwrap();
    // In the other one a task waits, which keeps nothing.
    for (t, s) in [(assigned_task(1), 1), (task(2), 2)] {
        store.accept(&Task { session: Some(session_id(s)), ..t }).await.unwrap();
    }
    let apply = async |event: Event, now| {
        assert!(matches!(store.apply(task_id(1), &event, Besides::default(), now).await.unwrap(), Applied::Done(..)));
    };
    let expire = async |now| store.expire_sessions(now, 10).await.unwrap().into_iter().map(|e| e.0).collect::<Vec<_>>();
    let end = async || Sessions::session(store, id).await.unwrap().unwrap().expires_at;
    assert_eq!(expire(T0 + 1000).await, [session_id(2)], "an assigned task keeps its session, a waiting one does not");
    assert_eq!(end().await, T0 + 2000, "for its time to live, then one looks again");
    apply(Event::Started { attempt: attempt(1) }, T0 + 1500).await;
    assert_eq!(expire(T0 + 2000).await, vec![], "a running task keeps it");
    assert_eq!(end().await, T0 + 3000);
    apply(Event::Ended { attempt: attempt(1), outcome: Outcome::Exited(0) }, T0 + 2900).await;
    assert_eq!(expire(T0 + 3000).await, vec![], "its time to live counts from the end of its work");
    assert_eq!(end().await, T0 + 3900);
    assert_eq!(expire(T0 + 3899).await, vec![]);
    assert_eq!(expire(T0 + 3900).await, [id]);
}

async fn tasks_in_activity<S: Journal + Sessions + ?Sized>(store: &S) {
    let id = session_id(1);
    store.add_session(&session(1, 1)).await.unwrap();
    for n in 1..=6 {
        let session = (n != 6).then_some(id);
        store.accept(&Task { session, ..assigned_task(n) }).await.unwrap();
    }
    // Many at one moment, one of them at the moment of its acceptance.
    for (n, at) in [(1, T0 + 1), (2, T0 + 9), (3, T0 + 9), (4, T0 + 9), (6, T0 + 9)] {
        let ended = Event::Ended { attempt: attempt(1), outcome: Outcome::Exited(n) };
        store.apply(task_id(n as u16), &ended, Besides::default(), at).await.unwrap();
    }
    let all = store.activity(id, None, 100).await.unwrap();
    let word = |a: &Activity| match &a.what {
        Happened::Session { act, .. } => act.as_str().to_owned(),
        Happened::TaskAccepted { task, .. } => format!("+{}", (1..9).find(|n| task_id(*n) == *task).unwrap()),
        Happened::TaskEnded { task, state, reason, skill } => {
            assert_eq!((*state, *reason, skill.as_str()), (TaskState::Failed, Some(ReasonCode::Exit), "shell"));
            format!("-{}", (1..9).find(|n| task_id(*n) == *task).unwrap())
        }
    };
    let words: Vec<_> = all.iter().map(word).collect();
    assert_eq!(words, ["-4", "-3", "-2", "+5", "+4", "+3", "+2", "-1", "+1", "created"]);
    assert!(all.iter().all(|a| a.actor == Some(user_id(1))));
    for size in [1, 2, 3, 7] {
        let mut paged: Vec<Activity> = vec![];
        loop {
            let page = store.activity(id, paged.last().map(|a| a.place), size).await.unwrap();
            assert!(page.len() <= size as usize);
            if page.is_empty() {
                break;
            }
            paged.extend(page);
        }
        assert_eq!(paged, all, "pages of {size}");
    }
}

use super::sample::{entry_id, session, session_id, user_id};
use super::{T0, all, window};
use futures::future::join_all;
use hub_engine::ports::{Memory, Sessions};
use hub_engine::records::{MemoryEntry, SessionAct, Written};
use std::sync::Arc;

fn entry(n: u16, key: &str, value: &str) -> MemoryEntry {
    let id = entry_id(n);
    MemoryEntry { id, session: session_id(1), key: key.into(), value: value.into(), updated_at: T0 + i64::from(n) }
}

pub async fn memory<S: Memory + Sessions + ?Sized>(make: impl AsyncFn() -> Arc<S>) {
    keys_and_values(&*make().await).await;
    bounds(&*make().await).await;
}

async fn keys_and_values<S: Memory + Sessions + ?Sized>(store: &S) {
    let (id, by) = (session_id(1), Some(user_id(2)));
    store.add_session(&session(1, 1)).await.unwrap();
    store.add_session(&session(2, 1)).await.unwrap();
    assert_eq!(store.memory(id, "a").await.unwrap(), None);
    let odd = "ключ/ä\"'%_ ";
    for (n, key) in [(1, "a"), (2, odd), (3, "A")] {
        assert_eq!(store.put_memory(&entry(n, key, "{\"x\":\"\\u0000é\"}"), by, 10).await.unwrap(), Written::Done);
        assert_eq!(store.memory(id, key).await.unwrap(), Some(entry(n, key, "{\"x\":\"\\u0000é\"}")));
    }
    assert_eq!(store.memory(session_id(2), "a").await.unwrap(), None, "sessions do not see each other's");
    let end = Sessions::session(store, id).await.unwrap().unwrap().expires_at;
    assert_eq!(end, T0 + 3 + 1000, "a write is a use");

    assert_eq!(store.put_memory(&entry(7, "a", "2"), by, 10).await.unwrap(), Written::Done);
    let again = MemoryEntry { id: entry_id(1), ..entry(7, "a", "2") };
    assert_eq!(store.memory(id, "a").await.unwrap(), Some(again), "what was there keeps its place");
    let keys =
        async |w| store.memory_keys(id, w).await.unwrap().into_iter().map(|k| (k.key, k.bytes, k.updated_at - T0)).collect::<Vec<_>>();
    let bytes = "{\"x\":\"\\u0000é\"}".len() as u64;
    assert_eq!(keys(all()).await, [("A".to_owned(), bytes, 3), (odd.to_owned(), bytes, 2), ("a".to_owned(), 1, 7)]);
    assert_eq!(keys(window(Some(entry_id(3)), 1)).await, [(odd.to_owned(), bytes, 2)]);

    assert_eq!(store.remove_memory(id, "a", by, T0 + 20).await.unwrap(), Written::Done);
    assert_eq!(store.remove_memory(id, "a", by, T0 + 21).await.unwrap(), Written::Absent);
    assert_eq!(store.memory(id, "a").await.unwrap(), None);
    let lines = store.activity(id, None, 2).await.unwrap();
    let what = |act, key: &str| hub_engine::records::Happened::Session { act, subject: key.to_owned() };
    assert_eq!((&lines[0].what, lines[0].actor), (&what(SessionAct::MemoryRemoved, "a"), by));
    assert_eq!(lines[1].what, what(SessionAct::MemorySet, "a"), "what changed nothing is not told");

    store.close_session(id, by, T0 + 30).await.unwrap();
    assert_eq!(store.put_memory(&entry(40, "a", "1"), by, 10).await.unwrap(), Written::Ended);
    assert_eq!(store.remove_memory(id, "A", by, T0 + 40).await.unwrap(), Written::Ended);
    assert!(store.memory(id, "A").await.unwrap().is_some(), "what has ended can still be read");
    let nowhere = MemoryEntry { session: session_id(9), ..entry(41, "a", "1") };
    assert_eq!(store.put_memory(&nowhere, by, 10).await.unwrap(), Written::Ended);
}

async fn bounds<S: Memory + Sessions + ?Sized>(store: &S) {
    store.add_session(&session(1, 1)).await.unwrap();
    let entries: Vec<_> = (0..20).map(|n| entry(n, &format!("k{n}"), "1")).collect();
    let puts = join_all(entries.iter().map(|e| store.put_memory(e, None, 5))).await;
    let done = puts.into_iter().filter(|p| *p.as_ref().unwrap() == Written::Done).count();
    assert_eq!((done, store.memory_keys(session_id(1), all()).await.unwrap().len()), (5, 5), "no race passes the bound");
    let known = store.memory_keys(session_id(1), all()).await.unwrap()[0].key.clone();
    let big = vec![b'1'; 300_000];
    let e = MemoryEntry { value: big.clone(), ..entry(30, &known, "") };
    assert_eq!(store.put_memory(&e, None, 5).await.unwrap(), Written::Done, "a key that is there is not one more");
    assert_eq!(store.memory(session_id(1), &known).await.unwrap().unwrap().value, big);
}

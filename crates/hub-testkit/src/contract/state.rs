use super::sample::{entry_id, user_id};
use super::{T0, all, window};
use futures::future::join_all;
use hub_engine::ports::AgentState;
use hub_engine::records::{StateEntry, StateFilter, StateWritten, Within};
use std::sync::Arc;

fn entry(n: u16, agent: &str, key: &str, owner: u16) -> StateEntry {
    let value = format!("[{n}]").into();
    StateEntry { id: entry_id(n), agent: agent.into(), key: key.into(), owner: user_id(owner), value, updated_at: T0 + i64::from(n) }
}

pub async fn state(make: impl AsyncFn() -> Arc<dyn AgentState>) {
    keys_and_owners(&*make().await).await;
    lists(&*make().await).await;
    bounds_and_races(&*make().await).await;
}

async fn keys_and_owners(store: &dyn AgentState) {
    assert_eq!(store.state_owner("a").await.unwrap(), None);
    assert_eq!(store.put_state(&entry(1, "a", "k", 1), 10).await.unwrap(), StateWritten::Done);
    assert_eq!(store.state("a", "k").await.unwrap(), Some(entry(1, "a", "k", 1)));
    assert_eq!(store.state_owner("a").await.unwrap(), Some(user_id(1)));
    assert_eq!(store.put_state(&entry(2, "a", "other", 2), 10).await.unwrap(), StateWritten::Foreign);
    assert_eq!(store.put_state(&entry(3, "a", "k", 2), 10).await.unwrap(), StateWritten::Foreign);
    assert_eq!(store.put_state(&entry(4, "a", "k", 1), 10).await.unwrap(), StateWritten::Done);
    let now = StateEntry { id: entry_id(1), ..entry(4, "a", "k", 1) };
    assert_eq!(store.state("a", "k").await.unwrap(), Some(now), "what was there keeps its place");
    assert_eq!(store.state("A", "k").await.unwrap(), None, "names are exact");
    assert!(!store.remove_state("a", "k", user_id(2)).await.unwrap());
    assert!(store.remove_state("a", "k", user_id(1)).await.unwrap());
    assert!(!store.remove_state("a", "k", user_id(1)).await.unwrap());
    assert_eq!(store.state_owner("a").await.unwrap(), None);
    assert_eq!(store.put_state(&entry(5, "a", "k", 2), 10).await.unwrap(), StateWritten::Done, "an agent without keys is nobody's");
}

async fn lists(store: &dyn AgentState) {
    for (n, agent, key, owner) in [(1, "a", "x", 1), (2, "b", "x", 2), (3, "a", "y", 1), (4, "c", "x", 1)] {
        store.put_state(&entry(n, agent, key, owner), 10).await.unwrap();
    }
    let ids = async |filter: StateFilter, w, bytes| {
        let p = store.states(&filter, w, bytes).await.unwrap();
        (p.items.iter().map(|e| e.updated_at - T0).collect::<Vec<_>>(), p.more)
    };
    let f = StateFilter::default;
    assert_eq!(ids(f(), all(), 999).await, (vec![4, 3, 2, 1], false), "newest first");
    assert_eq!(ids(StateFilter { within: Some(Within::owned_by(user_id(1))), ..f() }, all(), 999).await, (vec![4, 3, 1], false));
    assert_eq!(ids(StateFilter { agent: Some("a".into()), ..f() }, all(), 999).await, (vec![3, 1], false));
    assert_eq!(ids(StateFilter { key: Some("x".into()), ..f() }, window(Some(entry_id(4)), 9), 999).await, (vec![2, 1], false));
    let granted = Within { agents: vec!["b".into(), "a".into()], ..Within::default() };
    assert_eq!(ids(StateFilter { within: Some(granted), ..f() }, all(), 999).await, (vec![3, 2, 1], false));
    let narrow = StateFilter { within: Some(Within::owned_by(user_id(1))), agent: Some("b".into()), key: Some("x".into()) };
    assert_eq!(ids(narrow, all(), 999).await, (vec![], false), "every field narrows");
    assert_eq!(ids(f(), window(None, 2), 999).await, (vec![4, 3], true));
    assert_eq!(ids(f(), all(), 8).await, (vec![4, 3], true), "no more bytes than that");
    let other = StateFilter { within: Some(Within::owned_by(user_id(1))), ..f() };
    assert_eq!(ids(other, window(Some(entry_id(4)), 1), 999).await, (vec![3], true));
}

async fn bounds_and_races(store: &dyn AgentState) {
    let entries: Vec<_> = (0..20).map(|n| entry(n, "a", &format!("k{n}"), 1 + n % 2)).collect();
    let puts = join_all(entries.iter().map(|e| store.put_state(e, 5))).await;
    let owner = store.state_owner("a").await.unwrap().unwrap();
    let mut done = 0;
    for (e, put) in entries.iter().zip(puts) {
        match put.unwrap() {
            StateWritten::Done => done += 1,
            StateWritten::Full => {}
            StateWritten::Foreign => assert_ne!(e.owner, owner),
        }
    }
    let kept = store.states(&StateFilter::default(), all(), 9999).await.unwrap().items;
    assert_eq!((done, kept.len()), (5, 5));
    assert!(kept.iter().all(|e| e.owner == owner), "an agent has one owner, whoever raced");
    assert_eq!(store.put_state(&StateEntry { id: entry_id(50), ..kept[0].clone() }, 5).await.unwrap(), StateWritten::Done);
}

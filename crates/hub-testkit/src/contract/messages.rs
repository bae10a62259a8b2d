use super::sample::{message_id, session, session_id, user_id};
use super::{T0, all, window};
use hub_engine::ports::{Messages, Sessions};
use hub_engine::records::{Happened, Message, MessageRole, SessionAct};
use std::sync::Arc;

fn message(n: u16, content: &str) -> Message {
    let role = MessageRole::ALL[usize::from(n) % 4];
    Message { id: message_id(n), session: session_id(1), role, content: content.into(), created_at: T0 + i64::from(n) }
}

pub async fn messages<S: Messages + Sessions + ?Sized>(make: impl AsyncFn() -> Arc<S>) {
    in_order(&*make().await).await;
    parts(&*make().await).await;
}

async fn in_order<S: Messages + Sessions + ?Sized>(store: &S) {
    let (id, by) = (session_id(1), Some(user_id(2)));
    for n in [1, 2] {
        store.add_session(&session(n, 1)).await.unwrap();
    }
    let odd = message(5, "a\0b\u{202e} é \u{10ffff}");
    assert_eq!(store.add_message(&odd, by).await.unwrap(), Some(odd.clone()));
    // The clock went back, and then several came in one moment.
    let mut said = vec![odd];
    for n in [3, 3, 3] {
        let m = store.add_message(&message(n, &format!("{}", said.len())), by).await.unwrap().unwrap();
        assert!(m.id > said.last().unwrap().id, "what came later stands later");
        said.push(m);
    }
    let other = Message { session: session_id(2), id: message_id(90), ..message(9, "elsewhere") };
    store.add_message(&other, by).await.unwrap().unwrap();
    said.reverse();
    let found = store.messages(id, all(), u64::MAX).await.unwrap();
    assert_eq!((&found.items, found.more), (&said, false), "newest first");
    let line = &store.activity(id, None, 1).await.unwrap()[0];
    let subject = said[0].id.to_string();
    assert_eq!((&line.what, line.actor), (&Happened::Session { act: SessionAct::Message, subject }, by));
    assert_eq!(Sessions::session(store, id).await.unwrap().unwrap().expires_at, T0 + 3 + 1000, "a message is a use");
    store.close_session(id, by, T0).await.unwrap();
    assert_eq!(store.add_message(&message(50, "late"), by).await.unwrap(), None);
    let nowhere = Message { session: session_id(9), ..message(51, "nowhere") };
    assert_eq!(store.add_message(&nowhere, by).await.unwrap(), None);
}

async fn parts<S: Messages + Sessions + ?Sized>(store: &S) {
    store.add_session(&session(1, 1)).await.unwrap();
    assert_eq!(store.messages(session_id(1), all(), 10).await.unwrap().items, vec![]);
    for n in 1..=6 {
        store.add_message(&message(n, &"é".repeat(50)), None).await.unwrap();
    }
    let ids = async |w, bytes| {
        let p = store.messages(session_id(1), w, bytes).await.unwrap();
        (p.items.iter().map(|m| m.created_at - T0).collect::<Vec<_>>(), p.more)
    };
    assert_eq!(ids(window(None, 6), 600).await, (vec![6, 5, 4, 3, 2, 1], false));
    assert_eq!(ids(window(None, 5), 600).await, (vec![6, 5, 4, 3, 2], true));
    assert_eq!(ids(window(None, 6), 350).await, (vec![6, 5, 4], true), "no more bytes than that");
    assert_eq!(ids(window(None, 6), 300).await, (vec![6, 5, 4], true));
    assert_eq!(ids(window(Some(message_id(4)), 6), 299).await, (vec![3, 2], true));
    assert_eq!(ids(window(Some(message_id(2)), 6), 1).await, (vec![1], false), "one at least");
    assert_eq!(ids(window(Some(message_id(1)), 6), 1).await, (vec![], false));
}

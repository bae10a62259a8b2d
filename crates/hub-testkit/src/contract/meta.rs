use super::T0;
use super::sample::hub_id;
use hub_engine::ports::Meta;
use hub_engine::records::{HubMeta, Restored};
use std::sync::Arc;

pub async fn meta(make: impl AsyncFn() -> Arc<dyn Meta>) {
    let store = make().await;
    store.ping().await.unwrap();
    let first = HubMeta { id: hub_id(1), incarnation: u32::MAX, created_at: T0 };
    let second = HubMeta { id: hub_id(2), incarnation: 1, created_at: T0 + 1 };
    assert_eq!(store.hub(first).await.unwrap(), first, "a new store takes what it is given");
    assert_eq!(store.hub(second).await.unwrap(), first, "later it keeps what it has");
    let fresh = make().await;
    let both = futures::join!(fresh.hub(first), fresh.hub(second));
    assert_eq!(both.0.unwrap(), both.1.unwrap(), "two that start at once agree");
    restored(make).await;
}

/// The mark of a restore: it raises the incarnation and stays until it is taken away.
async fn restored(make: impl AsyncFn() -> Arc<dyn Meta>) {
    let store = make().await;
    assert!(store.mark_restored(T0, T0, 1).await.is_err(), "there is no hub to mark");
    let fresh = HubMeta { id: hub_id(1), incarnation: 4, created_at: T0 };
    store.hub(fresh).await.unwrap();
    assert_eq!(store.restored().await.unwrap(), None);
    assert!(!store.ask_go().await.unwrap());
    assert_eq!(store.mark_restored(T0 + 9, T0 + 5, 0).await.unwrap(), HubMeta { incarnation: 5, ..fresh });
    let mark = Restored { at: T0 + 9, backup_at: T0 + 5, go: false };
    assert_eq!(store.restored().await.unwrap(), Some(mark));
    assert!(store.ask_go().await.unwrap());
    assert_eq!(store.restored().await.unwrap(), Some(Restored { go: true, ..mark }));
    // Restored once more before that: the word was not for this one.
    assert_eq!(store.mark_restored(T0 + 20, T0 + 15, 1000).await.unwrap().incarnation, 1000);
    assert_eq!(store.restored().await.unwrap(), Some(Restored { at: T0 + 20, backup_at: T0 + 15, go: false }));
    store.released().await.unwrap();
    assert_eq!(store.restored().await.unwrap(), None);
    assert_eq!(store.hub(fresh).await.unwrap().incarnation, 1000, "it stays raised");
    store.mark_restored(T0, T0, u32::MAX).await.unwrap();
    assert!(store.mark_restored(T0, T0, 1).await.is_err(), "no number comes twice");
}

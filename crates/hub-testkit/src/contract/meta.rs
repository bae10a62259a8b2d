use super::T0;
use super::sample::hub_id;
use hub_engine::ports::Meta;
use hub_engine::records::HubMeta;
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
}

use super::T0;
use super::sample::{assigned_task, attempt, fan, frame, task, task_id};
use hub_engine::ports::{Besides, Gauges, Journal, Output};
use hub_engine::records::Stream;
use mesh_core::task::{Event, ReasonCode, TaskState};
use std::sync::Arc;

/// For stores that are all of it.
pub async fn gauges<S: Journal + Output + Gauges + ?Sized>(make: impl AsyncFn() -> Arc<S>) {
    let store = make().await;
    assert_eq!(store.tasks_by_state().await.unwrap(), [].into());
    assert_eq!(store.storage().await.unwrap().output_bytes, 0);
    for n in 1..=3 {
        store.accept(&task(n)).await.unwrap();
    }
    store.accept(&assigned_task(4)).await.unwrap();
    let cancel = Event::CancelRequested { reason: ReasonCode::CancelledByUser };
    store.apply(task_id(1), &cancel, Besides::default(), T0).await.unwrap();
    let expect = [(TaskState::Pending, 2), (TaskState::Assigned, 1), (TaskState::Cancelled, 1)];
    assert_eq!(store.tasks_by_state().await.unwrap(), expect.into());

    store.accept_fan(&fan(11, 3)).await.unwrap();
    let expect = [(TaskState::Pending, 4), (TaskState::Assigned, 2), (TaskState::Cancelled, 1)];
    assert_eq!(store.tasks_by_state().await.unwrap(), expect.into(), "a parent is no work of its own");

    let large = |seq| vec![frame(seq, Stream::Stdout, vec![b'x'; 50_000])];
    store.append(task_id(4), attempt(1), large(1), 1 << 20).await.unwrap();
    let one = store.storage().await.unwrap().output_bytes;
    assert!((50_000..51_000).contains(&one), "{one}");
    store.append(task_id(4), attempt(1), large(1), 1 << 20).await.unwrap();
    assert_eq!(store.storage().await.unwrap().output_bytes, one, "the same again counts once");
    store.append(task_id(4), attempt(1), large(2), 1 << 20).await.unwrap();
    assert_eq!(store.storage().await.unwrap().output_bytes, 2 * one);
}

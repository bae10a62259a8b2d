use super::sample::{assigned_task, attempt, fan, frame, task, task_id};
use super::{T0, all};
use hub_engine::ports::{Applied, Besides, Gauges, Journal, Output, Purges, Retention};
use hub_engine::records::*;
use mesh_core::TaskId;
use mesh_core::spec::INLINE_SPEC_BYTES;
use mesh_core::task::{Event, Outcome};
use std::sync::Arc;

const ALL: u64 = u64::MAX;
const LARGE: usize = 50_000;

/// For stores that are all of it.
pub async fn retention<S>(make: impl AsyncFn() -> Arc<S>)
where
    S: Journal + Output + Purges + Retention + Gauges + ?Sized,
{
    let store = &*make().await;
    assert_eq!(store.erase_output(i64::MAX, 9).await.unwrap(), Erased::default());
    assert_eq!(store.erase_files(ALL, 9).await.unwrap(), Erased::default());
    assert_eq!(store.erase_tasks(i64::MAX, ALL, 9).await.unwrap(), Erased::default());
    // The newer a task, the earlier it ended; 6 runs on, 7 waits, 8 has little output.
    for n in 1..=5 {
        run(store, n, LARGE, Some(T0 + 1000 - i64::from(n))).await;
    }
    run(store, 6, LARGE, None).await;
    store.accept(&task(7)).await.unwrap();
    run(store, 8, 10, Some(T0 + 2000)).await;

    by_age(store).await;
    by_bytes(store).await;
    tasks(store).await;
    fans(&*make().await).await;
}

async fn by_age<S: Journal + Output + Retention + ?Sized>(store: &S) {
    assert_eq!(store.erase_output(T0 + 995, 9).await.unwrap().tasks, 0, "5 ended at this moment, and not before it");
    let erased = store.erase_output(T0 + 997, 1).await.unwrap();
    assert!(erased.tasks == 1 && erased.bytes >= LARGE as u64, "{erased:?}");
    assert_eq!(kept(store).await, [1, 2, 3, 4, 6, 8], "first the one that ended first");
    assert_eq!(store.erase_output(T0 + 997, 9).await.unwrap().tasks, 1);
    assert_eq!(store.erase_output(T0 + 997, 9).await.unwrap(), Erased::default(), "once");
    assert_eq!(kept(store).await, [1, 2, 3, 6, 8]);
    let t = store.task(task_id(5)).await.unwrap().unwrap();
    assert_eq!((t.output.stdout_bytes, t.output.kept_seq, t.output.truncated), (LARGE as u64, 0, true), "its size stays known");
    assert_eq!((t.result, t.spec.len()), (None, spec(5).len()));
    assert_eq!(store.totals(t.id, attempt(1)).await.unwrap(), t.output);
    assert_eq!(store.tail(t.id, attempt(1), Stream::Stdout, 99).await.unwrap(), b"");
    assert_eq!(store.history(t.id).await.unwrap().len(), 3, "what it was stays");
}

async fn by_bytes<S: Journal + Output + Retention + Gauges + ?Sized>(store: &S) {
    let before = store.storage().await.unwrap().output_bytes;
    let erased = store.erase_files(1, 9).await.unwrap();
    assert_eq!(erased.tasks, 1);
    assert_eq!(store.storage().await.unwrap().output_bytes, before - erased.bytes, "what is told is what is gone");
    assert_eq!(kept(store).await, [2, 3, 6, 8], "the oldest goes first");
    let erased = store.erase_files(LARGE as u64 + 1000, 9).await.unwrap();
    assert_eq!((erased.tasks, kept(store).await), (2, vec![6, 8]), "until it is enough");
    assert_eq!(store.erase_files(ALL, 9).await.unwrap(), Erased::default(), "what runs keeps its output, and what is small is no file");
    assert_eq!(store.erase_output(T0 + 1500, 9).await.unwrap(), Erased::default(), "what is gone is not due again");
}

async fn tasks<S: Journal + Output + Purges + Retention + ?Sized>(store: &S) {
    assert_eq!(store.erase_tasks(T0 + 995, ALL, 9).await.unwrap(), Erased::default());
    // Output that nobody has erased before goes too, and so does a spec that lies apart.
    run(store, 9, LARGE, Some(T0)).await;
    let erased = store.erase_tasks(T0 + 996, ALL, 1).await.unwrap();
    assert!(erased.tasks == 1 && erased.bytes > 500, "{erased:?}");
    assert_eq!(ids(store).await, [8, 7, 6, 5, 4, 3, 2, 1], "first the one that ended first, whatever became of its output");
    let t = task_id(9);
    assert_eq!(store.task(t).await.unwrap(), None);
    assert_eq!((store.history(t).await.unwrap().len(), store.specs(&[t], 9999).await.unwrap().len()), (0, 0));
    assert_eq!(store.totals(t, attempt(1)).await.unwrap(), OutputTotals::default());
    assert_eq!(store.read(t, attempt(1), 0, usize::MAX).await.unwrap(), vec![]);
    let late = Event::Ended { attempt: attempt(1), outcome: Outcome::Done };
    assert_eq!(store.apply(t, &late, Besides::default(), T0).await.unwrap(), Applied::Unknown, "a late word changes nothing");

    assert_eq!(store.erase_tasks(i64::MAX, 1, 9).await.unwrap().tasks, 1, "until it is enough");
    assert_eq!(ids(store).await, [8, 7, 6, 4, 3, 2, 1]);
    while store.erase_tasks(i64::MAX, ALL, 2).await.unwrap().tasks > 0 {}
    assert_eq!(ids(store).await, [7, 6], "what has not ended stays, whatever is asked");
    assert_eq!(store.open_tasks(None, None, 9).await.unwrap().len(), 2);
    assert_eq!(kept(store).await, [6]);
    while store.sweep(2).await.unwrap() > 0 {}
    // As if it came anew: nothing of its former self is left.
    run(store, 9, 5, None).await;
    assert_eq!(store.read(t, attempt(1), 0, usize::MAX).await.unwrap().len(), 1);
    assert_eq!(store.history(t).await.unwrap().len(), 2);
}

/// A fan-out goes as a whole, and not before its parent is due.
async fn fans<S: Journal + Retention + ?Sized>(store: &S) {
    store.accept_fan(&fan(1, 3)).await.unwrap();
    let apply = async |n, event: Event, at| {
        assert!(matches!(store.apply(task_id(n), &event, Besides::default(), at).await.unwrap(), Applied::Done(..)));
    };
    apply(2, Event::Ended { attempt: attempt(1), outcome: Outcome::Done }, T0 + 10).await;
    apply(3, Event::Expired { detail: String::new() }, T0 + 20).await;
    apply(4, Event::Expired { detail: String::new() }, T0 + 30).await;
    store.accept(&task(5)).await.unwrap();
    apply(5, Event::Expired { detail: String::new() }, T0 + 25).await;
    assert_eq!(store.erase_tasks(T0 + 29, ALL, 9).await.unwrap().tasks, 1);
    assert_eq!(ids(store).await, [4, 3, 2, 1], "children of an open parent stay with it");
    let ends = store.ends_of(task_id(1)).await.unwrap().unwrap();
    apply(1, Event::ChildrenEnded { ends }, T0 + 40).await;
    store.accept(&task(6)).await.unwrap();
    apply(6, Event::Expired { detail: String::new() }, T0 + 41).await;
    assert_eq!(store.erase_tasks(T0 + 40, ALL, 9).await.unwrap(), Erased::default());
    assert_eq!(store.erase_tasks(T0 + 99, ALL, 2).await.unwrap().tasks, 4, "all of it, also where that is more than was asked for");
    assert_eq!(ids(store).await, [6]);
    assert_eq!(store.ends_of(task_id(1)).await.unwrap(), Some(vec![]), "nobody is left");
    assert_eq!(store.history(task_id(3)).await.unwrap(), vec![]);
    // What is enough counts the children, too.
    store.accept_fan(&fan(1, 3)).await.unwrap();
    for (n, at) in [(2, 1), (3, 2), (4, 3)] {
        let attempt = attempt(1);
        let end = if n == 2 { Event::Ended { attempt, outcome: Outcome::Done } } else { Event::Expired { detail: String::new() } };
        apply(n, end, T0 + at).await;
    }
    let ends = store.ends_of(task_id(1)).await.unwrap().unwrap();
    apply(1, Event::ChildrenEnded { ends }, T0 + 4).await;
    let erased = store.erase_tasks(i64::MAX, 2500, 9).await.unwrap();
    assert_eq!((erased.tasks, ids(store).await), (4, vec![6]));
    assert!(erased.bytes > 4000, "{erased:?}");
}

fn spec(n: u16) -> Vec<u8> {
    vec![n as u8; INLINE_SPEC_BYTES + usize::from(n % 2)]
}

/// A task with output and, where it ends, a result.
async fn run<S: Journal + Output + ?Sized>(store: &S, n: u16, output: usize, end: Option<i64>) {
    let t = Task { spec: spec(n), ..assigned_task(n) };
    store.accept(&t).await.unwrap();
    store.append(t.id, attempt(1), vec![frame(1, Stream::Stdout, vec![n as u8; output])], 1 << 20).await.unwrap();
    let Some(at) = end else { return };
    let besides = Besides { result: Some(b"result".to_vec()), ..Default::default() };
    let ended = Event::Ended { attempt: attempt(1), outcome: Outcome::Done };
    assert!(matches!(store.apply(t.id, &ended, besides, at).await.unwrap(), Applied::Done(..)));
}

async fn ids<S: Journal + ?Sized>(store: &S) -> Vec<u16> {
    let n = |id: TaskId| (1..=9).find(|n| task_id(*n) == id).expect("a sample");
    store.tasks(&TaskFilter::default(), all()).await.unwrap().into_iter().map(|t| n(t.id)).collect()
}

/// Those whose output can be read.
async fn kept<S: Output + ?Sized>(store: &S) -> Vec<u16> {
    let mut kept = vec![];
    for n in 1..=9 {
        if !store.read(task_id(n), attempt(1), 0, usize::MAX).await.unwrap().is_empty() {
            kept.push(n);
        }
    }
    kept
}

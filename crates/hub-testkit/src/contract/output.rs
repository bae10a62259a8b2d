use super::sample::{attempt, frame, task_id};
use futures::future::join_all;
use hub_engine::ports::Output;
use hub_engine::records::{OutputFrame, OutputTotals, Stream::*};
use mesh_core::output::Digests;
use mesh_core::sha256;
use std::sync::Arc;

const KEEP: u64 = 1 << 30;

pub async fn output(make: impl AsyncFn() -> Arc<dyn Output>) {
    repeats_and_gaps(&*make().await).await;
    the_limit(&*make().await).await;
    given_up(&*make().await).await;
    bytes_are_exact(&*make().await).await;
    digests(&*make().await).await;
    concurrent(&*make().await).await;
}

/// What will never come is passed over, and said to be missing.
async fn given_up(store: &dyn Output) {
    let (task, no) = (task_id(1), attempt(1));
    let append = async |seq: u64| store.append(task, no, vec![frame(seq, Stdout, "x")], KEEP).await.unwrap();
    append(1).await.unwrap();
    assert_eq!(append(5).await, None);
    store.give_up(task, no, 1).await.unwrap();
    assert!(!store.totals(task, no).await.unwrap().truncated, "nothing is missing");
    store.give_up(task, no, 4).await.unwrap();
    store.give_up(task, no, 3).await.unwrap();
    let gone = OutputTotals { durable_seq: 4, stdout_bytes: 1, stderr_bytes: 0, kept_seq: 1, truncated: true };
    assert_eq!(store.totals(task, no).await.unwrap(), gone);
    assert_eq!(append(5).await, Some(OutputTotals { durable_seq: 5, stdout_bytes: 2, ..gone }), "counted, and not kept");
    assert_eq!(store.read(task, no, 0, 99).await.unwrap().len(), 1);
    store.give_up(task, attempt(2), 7).await.unwrap();
    assert_eq!(store.totals(task, attempt(2)).await.unwrap().durable_seq, 7, "also where there is nothing at all");
}

async fn repeats_and_gaps(store: &dyn Output) {
    let (task, no) = (task_id(1), attempt(1));
    assert_eq!(store.totals(task, no).await.unwrap(), OutputTotals::default(), "zero for one that has none");
    assert_eq!(store.read(task, no, 0, 99).await.unwrap(), vec![]);
    assert_eq!(store.tail(task, no, Stdout, 99).await.unwrap(), b"");
    let f = |seq| frame(seq, if seq % 2 == 0 { Stderr } else { Stdout }, format!("{seq};"));
    let append = async |seqs: &[u64]| store.append(task, no, seqs.iter().map(|s| f(*s)).collect(), KEEP).await.unwrap();

    let one = OutputTotals { durable_seq: 1, stdout_bytes: 2, stderr_bytes: 0, kept_seq: 1, truncated: false };
    assert_eq!(append(&[2]).await, None, "a gap at the beginning");
    assert_eq!(append(&[1]).await, Some(one));
    assert_eq!(append(&[1]).await, Some(one), "again");
    assert_eq!(append(&[]).await, Some(one));
    assert_eq!(append(&[3]).await, None, "a gap");
    assert_eq!(append(&[2, 4]).await, None, "a gap among them");
    assert_eq!(store.totals(task, no).await.unwrap(), one, "nothing of a refused append stays");
    let three = OutputTotals { durable_seq: 3, stdout_bytes: 4, stderr_bytes: 2, kept_seq: 3, truncated: false };
    assert_eq!(append(&[1, 2, 3]).await, Some(three), "the repeated part is dropped");
    assert_eq!(store.totals(task, no).await.unwrap(), three);
    assert_eq!(store.read(task, no, 0, 99).await.unwrap(), [f(1), f(2), f(3)]);

    assert_eq!(store.totals(task, attempt(2)).await.unwrap(), OutputTotals::default(), "each attempt has its own");
    store.append(task, attempt(2), vec![frame(1, Stdout, "second")], KEEP).await.unwrap();
    assert_eq!(store.read(task, no, 0, 99).await.unwrap().len(), 3);
    assert_eq!(store.tail(task, attempt(2), Stdout, 99).await.unwrap(), b"second");
}

async fn the_limit(store: &dyn Output) {
    let (task, no) = (task_id(1), attempt(1));
    let append = async |frames| store.append(task, no, frames, 10).await.unwrap().unwrap();
    let t = append(vec![frame(1, Stdout, "12345"), frame(2, Stderr, "67890")]).await;
    assert_eq!(t, OutputTotals { durable_seq: 2, stdout_bytes: 5, stderr_bytes: 5, kept_seq: 2, truncated: false }, "exactly full");
    let t = append(vec![frame(3, Stdout, "")]).await;
    assert_eq!((t.kept_seq, t.truncated), (3, false), "a frame without data still fits");
    let t = append(vec![frame(4, Stdout, "x"), frame(5, Stderr, "yy")]).await;
    assert_eq!(t, OutputTotals { durable_seq: 5, stdout_bytes: 6, stderr_bytes: 7, kept_seq: 3, truncated: true }, "counted, not kept");
    let t = append(vec![frame(6, Stdout, "")]).await;
    assert_eq!((t.durable_seq, t.kept_seq), (6, 3), "what is kept has no holes");
    assert_eq!(store.totals(task, no).await.unwrap(), t);
    let seqs: Vec<u64> = store.read(task, no, 0, 99).await.unwrap().iter().map(|f| f.seq).collect();
    assert_eq!(seqs, [1, 2, 3]);
    assert_eq!(store.read(task, no, 3, 99).await.unwrap(), vec![]);
    assert_eq!(store.tail(task, no, Stderr, 99).await.unwrap(), b"67890", "the end of what is kept");
}

/// Enough bytes that a store has to use whatever it uses for large output; no two frames alike.
async fn bytes_are_exact(store: &dyn Output) {
    let (task, no) = (task_id(1), attempt(1));
    let mut noise = 1u64;
    let mut next = move || {
        noise = noise.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        noise >> 33
    };
    let frames: Vec<OutputFrame> = (1..=400)
        .map(|seq| {
            let size = [0, 1, 17, 900, 5_000, 30_000][next() as usize % 6];
            let data: Vec<u8> = (0..size).map(|_| next() as u8).collect();
            frame(seq, if next() % 9 == 0 { Stderr } else { Stdout }, data)
        })
        .collect();
    let mut rest = frames.clone();
    while !rest.is_empty() {
        let later = rest.split_off(rest.len().min(1 + next() as usize % 12));
        store.append(task, no, rest, KEEP).await.unwrap().unwrap();
        rest = later;
    }
    let size = |stream| frames.iter().filter(|f| f.stream == stream).map(|f| f.data.len() as u64).sum::<u64>();
    let totals = store.totals(task, no).await.unwrap();
    assert_eq!((totals.stdout_bytes, totals.stderr_bytes, totals.durable_seq), (size(Stdout), size(Stderr), 400));

    for window in [1, 1_000, 70_000, usize::MAX] {
        let mut seen: Vec<OutputFrame> = vec![];
        loop {
            let part = store.read(task, no, seen.last().map_or(0, |f| f.seq), window).await.unwrap();
            let bytes: usize = part.iter().map(|f| f.data.len()).sum();
            assert!(bytes <= window || part.len() == 1, "{bytes} bytes in a window of {window}");
            if part.is_empty() {
                break;
            }
            seen.extend(part);
        }
        assert_eq!(seen.len(), frames.len(), "window {window}");
        assert!(seen == frames, "window {window}: order, times, streams and bytes are as given");
    }
    for after in [399, 250, 1] {
        let part = store.read(task, no, after, 1).await.unwrap();
        assert!(part[..] == frames[after as usize..after as usize + part.len()], "after {after}");
    }
    for stream in [Stdout, Stderr] {
        let all: Vec<u8> = frames.iter().filter(|f| f.stream == stream).flat_map(|f| f.data.to_vec()).collect();
        for max in [0, 1, 1_000, 300_000, usize::MAX] {
            let tail = store.tail(task, no, stream, max).await.unwrap();
            assert!(tail == all[all.len().saturating_sub(max)..], "the last {max} bytes of {stream:?}");
        }
    }
}

/// `frames` hashed by stream.
fn hashed(frames: &[OutputFrame]) -> Option<Digests> {
    let of = |stream| sha256(&frames.iter().filter(|f| f.stream == stream).flat_map(|f| f.data.to_vec()).collect::<Vec<_>>());
    Some(Digests { stdout: of(Stdout), stderr: of(Stderr) })
}

async fn digests(store: &dyn Output) {
    let (task, no) = (task_id(1), attempt(1));
    let digests = async || store.digests(task, no).await.unwrap();
    assert_eq!(digests().await, Some(Digests::of_nothing()));
    // From a few bytes to more than a store holds in a row; asked for in between, and twice.
    let all: Vec<OutputFrame> =
        (1..=9).map(|seq| frame(seq, if seq % 3 == 0 { Stderr } else { Stdout }, vec![seq as u8; 1 << (2 * seq)])).collect();
    for n in 1..=all.len() {
        store.append(task, no, vec![all[n - 1].clone()], KEEP).await.unwrap().unwrap();
        assert_eq!(digests().await, hashed(&all[..n]), "{n} frames");
        assert_eq!(digests().await, hashed(&all[..n]), "{n} frames, again");
    }
    assert_eq!(store.digests(task, attempt(2)).await.unwrap(), Some(Digests::of_nothing()), "each attempt has its own");
    store.append(task, no, vec![frame(10, Stdout, "more")], 9).await.unwrap().unwrap();
    assert_eq!(digests().await, None, "not all of it is here");
}

async fn concurrent(store: &dyn Output) {
    let appends = (1..=20).flat_map(|t| (0..5).map(move |_| t));
    let two = || vec![frame(1, Stdout, vec![b'a'; 6000]), frame(2, Stderr, vec![b'b'; 6000])];
    let all = join_all(appends.map(|t| store.append(task_id(t), attempt(1), two(), KEEP))).await;
    let expect = OutputTotals { durable_seq: 2, stdout_bytes: 6000, stderr_bytes: 6000, kept_seq: 2, truncated: false };
    for outcome in all {
        assert_eq!(outcome.unwrap(), Some(expect), "the same frames at once count once");
    }
    for t in 1..=20 {
        assert_eq!(store.read(task_id(t), attempt(1), 0, usize::MAX).await.unwrap(), two());
    }
}

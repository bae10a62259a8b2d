//! The hub's engine and the node's logic against seeded faults, with simulated time and no socket.
//!
//! A seed decides everything: the same seed gives the same trace, bit by bit. To see one again:
//!
//! ```text
//! SIM_SEED=17 cargo test -p mesh-tests --test simulation one -- --nocapture
//! SIM_SEED=17 SIM_BREAK=SkipFence cargo test …
//! ```
//! What may go wrong stands in `plan.rs`, what must hold in `oracle.rs`.
#![expect(clippy::disallowed_methods, reason = "a seed is given on the command line")]

mod carry;
mod daemon;
mod hub;
mod net;
mod node;
mod oracle;
mod plan;
mod run;
mod store;
mod warden;
mod world;

use plan::{Break, Fault, Point, TRANSITIONS};
use run::{How, Report, run};
use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// Seeds of a run; more with `SIM_SEEDS`.
const SEEDS: u64 = 2000;
/// Of them, over what really carries links.
const CARRIED_SEEDS: u64 = 200;
const CARRIED_FAULTS: [Fault; 12] = {
    use Fault::*;
    [HubCrash, HubRestore, DaemonCrash, WardenCrash, PowerCut, SpoolReplaced, LinkCut, HalfOpen, Partition, SlowLink, SecondLink, SlowStore]
};
/// Of a failed seed's trace, when it is one of many.
const LINES: usize = 100;
/// Of everything that is to be covered there is at least so much.
const AT_LEAST: u64 = 20;
/// A broken mechanism is noticed within so many seeds.
const SEEDS_TO_NOTICE: u64 = 400;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name} is a number")))
}

fn story(seed: u64, how: How, report: &Report, lines: usize) -> String {
    let Some(v) = &report.violation else { return String::new() };
    let from = report.trace.len().saturating_sub(lines);
    let mut with = how.broken.map(|b| format!(" SIM_BREAK={b:?}")).unwrap_or_default();
    if how.carried {
        with.push_str(" SIM_CARRIED=1");
    }
    let again = format!("SIM_SEED={seed}{with} cargo test -p mesh-tests --test simulation one -- --nocapture");
    format!("{}\n\nseed {seed} breaks `{}`: {}\nagain: {again}\n", report.trace[from..].join("\n"), v.invariant, v.detail)
}

/// Runs seeds on all cores until `each` has had enough; `each` sees them in any order.
fn many(seeds: std::ops::Range<u64>, how: How, each: impl Fn(u64, Report) -> bool + Sync) {
    let next = AtomicU64::new(seeds.start);
    let threads = std::thread::available_parallelism().map_or(2, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::SeqCst);
                    if seed >= seeds.end {
                        return;
                    }
                    if !each(seed, run(seed, how)) {
                        next.store(seeds.end, Ordering::SeqCst);
                    }
                }
            });
        }
    });
}

#[test]
fn one() {
    let Some(seed) = number("SIM_SEED") else { return };
    let broken = std::env::var("SIM_BREAK").ok().map(|b| Break::named(&b).unwrap_or_else(|| panic!("{b} is nothing to break")));
    let how = How { broken, carried: number("SIM_CARRIED").is_some() };
    let report = run(seed, how);
    if report.violation.is_some() {
        panic!("{}", story(seed, how, &report, usize::MAX));
    }
    println!("{}", report.trace.join("\n"));
}

#[test]
fn every_seed_holds_and_everything_is_covered() {
    let count = number("SIM_SEEDS").unwrap_or(SEEDS);
    let counts = holds(count, How::default());
    let faults = Fault::ALL.iter().map(|f| format!("fault {f:?}"));
    let points = Point::ALL.iter().map(|p| format!("crash {p:?}"));
    let wanted = TRANSITIONS.iter().map(|t| t.to_string()).chain(faults).chain(points);
    let rare: Vec<_> = wanted.filter(|w| counts.get(w).copied().unwrap_or(0) < AT_LEAST).collect();
    assert!(count < SEEDS || rare.is_empty(), "covered less than {AT_LEAST} times: {rare:#?}");
}

/// The hub's own conversation, over gRPC and HTTP/2.
#[test]
fn seeds_hold_over_what_really_carries_links() {
    let count = number("SIM_CARRIED_SEEDS").unwrap_or(CARRIED_SEEDS);
    let counts = holds(count, How { carried: true, ..How::default() });
    let faults = CARRIED_FAULTS.iter().map(|f| format!("fault {f:?}"));
    let rare: Vec<_> = faults.filter(|w| counts.get(w).copied().unwrap_or(0) < AT_LEAST).collect();
    assert!(count < CARRIED_SEEDS || rare.is_empty(), "covered less than {AT_LEAST} times: {rare:#?}");
}

/// Plays them all; gives what came about, how often.
fn holds(count: u64, how: How) -> BTreeMap<String, u64> {
    let first = number("SIM_FIRST").unwrap_or(0);
    let counts: Mutex<BTreeMap<String, u64>> = Mutex::default();
    let failed: Mutex<BTreeMap<u64, String>> = Mutex::default();
    many(first..first + count, how, |seed, report| {
        for (what, n) in &report.counts {
            *world::lock(&counts).entry(what.clone()).or_default() += n;
        }
        let bad = report.violation.is_some();
        if let Some(v) = &report.violation {
            println!("seed {seed} breaks {}: {}", v.invariant, v.detail);
            world::lock(&failed).insert(seed, story(seed, how, &report, LINES));
        }
        !bad || number("SIM_ALL").is_some()
    });
    let failed = failed.into_inner().unwrap_or_default();
    if let Some((_, story)) = failed.first_key_value() {
        panic!("{story}\nfailed: {:?}", failed.keys().collect::<Vec<_>>());
    }
    let counts = counts.into_inner().unwrap_or_default();
    counts.iter().for_each(|(what, n)| println!("{n:>8} {what}"));
    // And nothing happens that nobody has thought of.
    let unknown: Vec<_> = counts.keys().filter(|w| w.split(' ').count() == 3 && !TRANSITIONS.contains(&w.as_str())).collect();
    assert!(unknown.is_empty(), "transitions that are not in the list: {unknown:?}");
    counts
}

#[test]
fn a_seed_gives_the_same_trace_again() {
    for (seed, carried) in [(3, false), (1414, false), (99_991, false), (5, true), (77, true)] {
        let how = How { broken: None, carried };
        let (first, second) = (run(seed, how), run(seed, how));
        assert!(first.trace.len() > 50);
        let differs = first.trace.iter().zip(&second.trace).position(|(a, b)| a != b);
        assert_eq!(differs.map(|n| (&first.trace[n], &second.trace[n])), None);
        assert_eq!(first.trace.len(), second.trace.len());
    }
}

/// What no mechanism can be broken for from outside: a store that does not do what `step` decided.
#[test]
fn a_store_that_decides_for_itself_is_noticed() {
    use hub_engine::ports::{Applied, Besides, Journal};
    use hub_testkit::contract::sample;
    use mesh_core::task::{Event, ReasonCode, TaskState};
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().expect("a runtime");
    let noticed = |forge: fn(&mut hub_engine::records::Task), again: bool| {
        runtime.block_on(async {
            let (world, disk) = (world::World::new(0, None, None), hub_testkit::MemoryStore::new());
            let task = sample::task(1);
            disk.accept(&task).await.expect("memory");
            world.saw_accept(&task);
            let cancel = Event::CancelRequested { reason: ReasonCode::CancelledByUser };
            let before = disk.task(task.id).await.expect("memory");
            let applied = disk.apply(task.id, &cancel, Besides::default(), 5).await.expect("memory");
            // The oracle holds what it saw against what is there.
            let stored = hub_testkit::MemoryStore::new();
            let mut forged = disk.task(task.id).await.expect("memory").expect("it is there");
            forge(&mut forged);
            stored.accept(&forged).await.expect("memory");
            world.saw_apply(&stored, before.clone(), &cancel, 5, &applied).await;
            if again {
                world.saw_apply(&stored, before, &cancel, 6, &Applied::Done(Box::new(forged), vec![])).await;
            }
            world.violation().map(|v| v.invariant)
        })
    };
    assert_eq!(noticed(|_| {}, false), None);
    assert_eq!(noticed(|t| t.progress.state = TaskState::Failed, false), Some("history_replays"));
    assert_eq!(noticed(|_| {}, true), Some("one_final_state"));
}

#[test]
fn a_broken_mechanism_is_noticed() {
    let mut unnoticed = vec![];
    for (broken, by) in Break::ALL {
        let noticed: Mutex<Option<(u64, String)>> = Mutex::default();
        let tried = AtomicU64::new(0);
        many(0..SEEDS_TO_NOTICE, How { broken: Some(broken), carried: false }, |seed, report| {
            tried.fetch_add(1, Ordering::SeqCst);
            let Some(v) = report.violation.filter(|v| by.contains(&v.invariant)) else { return true };
            world::lock(&noticed).get_or_insert((seed, v.invariant.to_owned()));
            false
        });
        match noticed.into_inner().unwrap_or_default() {
            Some((seed, invariant)) => println!("{broken:?}: noticed by {invariant} in seed {seed}"),
            None => unnoticed.push((broken, by, tried.into_inner())),
        }
    }
    assert!(unnoticed.is_empty(), "nobody noticed: {unnoticed:?}");
}

//! What must hold, held against what really happened: it sees every commit, every start, every
//! acknowledgement, and no process can hide anything from it.

use crate::world::{World, lock};
use hub_engine::ports::{Applied, Journal, Output, Window};
use hub_engine::records::{OutputFrame, Stream, Task, TaskFilter};
use hub_testkit::MemoryStore;
use mesh_core::task::{AttemptNo, Event, OnLost, Outcome, Progress, Refused, TaskState, Terms, step};
use mesh_core::{NodeId, SpoolId, TaskId};
use std::collections::{BTreeMap, BTreeSet};

pub type Key = (TaskId, AttemptNo);

#[derive(Debug, Clone)]
pub struct Seen {
    terms: Terms,
    progress: Progress,
    /// The words of its history, in their order.
    kinds: Vec<&'static str>,
}

#[derive(Debug, Default, Clone)]
pub struct Oracle {
    /// Each task as its committed events make it.
    tasks: BTreeMap<TaskId, Seen>,
    /// Tasks that a caller was told of.
    accepted: BTreeSet<TaskId>,
    /// By which key of a caller.
    keys: BTreeMap<String, TaskId>,
    /// Every number ever handed out, also by a hub that was rolled back since.
    numbers: BTreeSet<Key>,
    /// Every grant ever committed.
    granted: BTreeMap<Key, (NodeId, SpoolId)>,
    starts: BTreeMap<Key, u32>,
    starts_of: BTreeMap<TaskId, u32>,
    /// Frames that the program of an attempt wrote, and whether it ended by itself.
    written: BTreeMap<Key, u64>,
    /// Tasks that a restore touched: of them only numbers are counted.
    restored: BTreeSet<TaskId>,
    rolled_back: bool,
    /// Some work was given up while its node was away, and may go on there until the node hears of it.
    given_up: bool,
}

/// What the `seq`th frame of an attempt holds.
pub fn content(key: &Key, seq: u64) -> Vec<u8> {
    format!("{} {} {seq}", key.0, key.1.0).into_bytes()
}
pub fn stream(seq: u64) -> Stream {
    if seq.is_multiple_of(3) { Stream::Stderr } else { Stream::Stdout }
}

impl World {
    fn oracle<T>(&self, f: impl FnOnce(&mut Oracle) -> T) -> T {
        f(&mut lock(&self.oracle))
    }

    pub fn saw_accept(&self, task: &Task) {
        let mut kinds = vec!["accepted"];
        if let Some(a) = &task.progress.attempt {
            kinds.push("assigned");
            self.count("pending assigned assigned");
            self.saw_assigned(task.id, a.no, a.node, a.granted);
        }
        let seen = Seen { terms: task.terms.clone(), progress: task.progress.clone(), kinds };
        if self.oracle(|o| o.tasks.insert(task.id, seen)).is_some() {
            self.violated("one_final_state", format_args!("{} was accepted twice", task.id));
        }
    }

    fn saw_assigned(&self, task: TaskId, no: AttemptNo, node: NodeId, granted: Option<SpoolId>) {
        if !self.oracle(|o| o.numbers.insert((task, no))) {
            self.violated("never_twice", format_args!("{task} attempt {:#x} was handed out before", no.0));
        }
        if let Some(spool) = granted {
            self.oracle(|o| o.granted.insert((task, no), (node, spool)));
        }
    }

    /// A commit of the journal, with the task before and after it.
    pub async fn saw_apply(&self, disk: &MemoryStore, before: Option<Task>, event: &Event, now: i64, applied: &Applied) {
        let Some(before) = before else { return };
        let after = disk.task(before.id).await.ok().flatten();
        let Some(after) = after else { return self.violated("nothing_lost", format_args!("{} is gone", before.id)) };
        let seen = self.oracle(|o| o.tasks.get(&before.id).cloned());
        let Some(mut seen) = seen else {
            return self.violated("history_replays", format_args!("{} was never accepted", before.id));
        };
        let decided = step(&seen.terms, &seen.progress, event, now);
        match (applied, decided) {
            (Applied::Done(..), Ok((progress, _))) => {
                let (from, to) = (seen.progress.state, progress.state);
                self.count(format!("{} {} {}", from.as_str(), event.kind(), to.as_str()));
                self.note(format_args!("{} {} {} -> {}", before.id, event.kind(), from.as_str(), to.as_str()));
                seen.progress = progress;
                seen.kinds.push(event.kind());
                if let Event::Assigned { attempt, node, granted } = event {
                    self.saw_assigned(before.id, *attempt, *node, *granted);
                }
                if matches!(event, Event::NodeSilent { .. }) {
                    self.oracle(|o| o.given_up = true);
                }
                if let Event::Ended { attempt, outcome } = event {
                    self.saw_end(disk, (before.id, *attempt), outcome).await;
                }
                if seen.progress != after.progress {
                    self.violated("history_replays", format_args!("{}: {:?} is stored as {:?}", before.id, seen.progress, after.progress));
                }
                self.oracle(|o| o.tasks.insert(before.id, seen));
            }
            (Applied::Refused(refused), Err(expected)) => {
                self.count(format!("refused {}", word(*refused)));
                if *refused != expected {
                    self.violated("history_replays", format_args!("{}: {refused:?} is not {expected:?}", before.id));
                }
                if before != after {
                    self.violated("superseded_changes_nothing", format_args!("{} changed by a refused {}", before.id, event.kind()));
                }
            }
            (applied, decided) => {
                let said = matches!(applied, Applied::Done(..));
                let ended = said && seen.progress.state.is_final();
                let invariant = if ended { "one_final_state" } else { "history_replays" };
                self.violated(invariant, format_args!("{}: done {said}, decided {decided:?}", before.id));
            }
        }
    }

    /// An end counts only with all of its output.
    async fn saw_end(&self, disk: &MemoryStore, key: Key, outcome: &Outcome) {
        let durable = disk.totals(key.0, key.1).await.map_or(0, |t| t.durable_seq);
        let written = self.oracle(|o| o.written.get(&key).copied().unwrap_or(0));
        let whole = matches!(outcome, Outcome::Exited(_) | Outcome::Signalled(_) | Outcome::TimedOut | Outcome::Cancelled | Outcome::Done);
        if whole && durable != written {
            let what = format!("{} attempt {:#x} ended with {durable} of {written} frames durable", key.0, key.1.0);
            self.violated("output_before_result", what);
        }
        if matches!(outcome, Outcome::NeverStarted(_)) {
            let started = self.oracle(|o| o.starts.get(&key).copied().unwrap_or(0));
            if started > 0 {
                self.violated("never_twice", format_args!("{} attempt {:#x} ran, and is told as never started", key.0, key.1.0));
            }
        }
    }

    pub fn told_accepted(&self, task: TaskId, key: Option<&str>) {
        self.note(format_args!("{task} told as accepted"));
        self.oracle(|o| o.accepted.insert(task));
        if let Some(key) = key {
            let first = self.oracle(|o| *o.keys.entry(key.to_owned()).or_insert(task));
            if first != task {
                self.violated("never_twice", format_args!("key {key} has made {first} and {task}"));
            }
        }
    }

    /// A program is started, now.
    pub fn saw_exec(&self, node: NodeId, spool: SpoolId, key: Key, running: usize, room: usize) {
        self.note(format_args!("exec {} {:#x} on {node}", key.0, key.1.0));
        let (granted, times, of_task, terms, restored) = self.oracle(|o| {
            let times = o.starts.entry(key).or_default();
            *times += 1;
            let times = *times;
            let all = o.starts_of.entry(key.0).or_default();
            *all += 1;
            let all = *all;
            (o.granted.get(&key).copied(), times, all, o.tasks.get(&key.0).map(|s| s.terms.clone()), o.restored.contains(&key.0))
        });
        if granted != Some((node, spool)) {
            self.violated("grant_before_start", format_args!("{} attempt {:#x} was granted to {granted:?}", key.0, key.1.0));
        }
        if times > 1 {
            self.violated("never_twice", format_args!("{} attempt {:#x} was started again", key.0, key.1.0));
        }
        let once_each = |t: &Terms| t.on_lost != OnLost::Requeue && of_task > t.retries + 1;
        if !restored && terms.as_ref().is_some_and(once_each) {
            self.violated("never_twice", format_args!("{} was started {of_task} times", key.0));
        }
        // After a restore a node ends what its hub knows nothing of; until then it has more. And a slot
        // is given back while it is not known whether its attempt was committed (see decision 21).
        let exact = !self.oracle(|o| o.rolled_back || o.given_up) && !self.counts().contains_key("fault StoreUnanswered");
        if running > room && exact {
            self.violated("slots_given_back", format_args!("{running} tasks run on {node}, which takes {room}"));
        }
    }
    pub fn saw_output(&self, key: Key, seq: u64) {
        self.oracle(|o| o.written.insert(key, seq));
    }

    /// The node was told that it may forget the end of an attempt.
    pub async fn saw_result_ack(&self, disk: &MemoryStore, node: NodeId, key: Key) {
        let Ok(Some(task)) = disk.task(key.0).await else { return };
        let p = &task.progress;
        let open = !p.state.is_final() && p.state != TaskState::Pending;
        if open && p.attempt.as_ref().is_some_and(|a| a.no == key.1 && a.node == node) {
            self.violated("acknowledged_is_durable", format_args!("the end of {} attempt {:#x} is not recorded", key.0, key.1.0));
        }
    }
    /// The node was told that it may forget output.
    pub async fn saw_output_ack(&self, disk: &MemoryStore, node: NodeId, key: Key, seq: u64) {
        let Ok(Some(task)) = disk.task(key.0).await else { return };
        let p = &task.progress;
        let open = !p.state.is_final() && p.state != TaskState::Pending;
        let ours = open && p.attempt.as_ref().is_some_and(|a| a.no == key.1 && a.node == node);
        let durable = disk.totals(key.0, key.1).await.map_or(0, |t| t.durable_seq);
        if ours && durable < seq {
            self.violated("acknowledged_is_durable", format_args!("{} frame {seq} is acknowledged, {durable} durable", key.0));
        }
    }

    /// The database is that of an earlier moment again.
    pub fn restored(&self, earlier: Oracle) {
        self.oracle(|o| {
            let now = std::mem::take(o);
            *o = Oracle { numbers: now.numbers, granted: now.granted, starts: now.starts, starts_of: now.starts_of, ..earlier };
            o.written.extend(now.written);
            o.rolled_back = true;
            o.restored = now.tasks.keys().copied().chain(now.restored).collect();
        });
    }

    /// What must hold when everything has come to rest.
    pub async fn check_end(&self, disk: &MemoryStore) {
        let o = lock(&self.oracle).clone();
        for id in &o.accepted {
            if !disk.task(*id).await.is_ok_and(|t| t.is_some()) {
                self.violated("nothing_lost", format_args!("{id} was told as accepted and is not there"));
            }
        }
        let all = disk.tasks(&TaskFilter::default(), Window { before: None, limit: u32::MAX }).await.unwrap_or_default();
        for task in all {
            let id = task.id;
            let Some(seen) = o.tasks.get(&id) else { continue };
            let history = disk.history(id).await.unwrap_or_default();
            let kinds: Vec<&str> = history.iter().map(|l| l.kind.as_str()).collect();
            let numbered = history.iter().zip(1..).all(|(l, n)| l.seq == n);
            let state = history.last().map(|l| l.state);
            if kinds != seen.kinds || !numbered || state != Some(task.progress.state) || seen.progress != task.progress {
                self.violated("history_replays", format_args!("{id}: {kinds:?} are not {:?}", seen.kinds));
            }
            if !task.progress.state.is_final() {
                self.violated("one_final_state", format_args!("{id} is {}", task.progress.state.as_str()));
            }
            if let Some(a) = &task.progress.attempt {
                self.check_output(disk, (id, a.no)).await;
            }
        }
    }

    async fn check_output(&self, disk: &MemoryStore, key: Key) {
        let totals = disk.totals(key.0, key.1).await.unwrap_or_default();
        let frames = disk.read(key.0, key.1, 0, usize::MAX).await.unwrap_or_default();
        let right = |f: &OutputFrame| f.data == content(&key, f.seq) && f.stream == stream(f.seq);
        let whole = frames.len() as u64 == totals.durable_seq && frames.iter().zip(1..).all(|(f, seq)| f.seq == seq);
        // What a hub had taken after its backup is nowhere any more, and that is said.
        let cut = totals.truncated && self.oracle(|o| o.rolled_back);
        if !(whole || cut) || !frames.iter().all(right) {
            self.violated("output_before_result", format_args!("the output of {} is not what was written", key.0));
        }
    }
}

fn word(refused: Refused) -> &'static str {
    match refused {
        Refused::Final => "final",
        Refused::Superseded => "superseded",
        Refused::Repeated => "repeated",
        Refused::Illegal => "illegal",
    }
}

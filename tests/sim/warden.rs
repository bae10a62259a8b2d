//! A node's warden as MESH.md has it: `starting` is synced before the start, the output before the end,
//! the end before anybody is told; a known attempt is answered and never started. Its spool is two
//! states: what a power cut leaves, and what the kernel still holds.

use crate::node::Machine;
use crate::oracle::{Key, content, stream};
use crate::plan::{Break, Point};
use crate::world::lock;
use hub_engine::records::{OutputFrame, Stream};
use mesh_core::policy::Grant;
use mesh_core::task::{NeverStarted, Outcome};
use mesh_core::{Digest, SpoolId};
use node_warden::frames::{Event, Known, KnownState, Request, VERSION};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::Instant;

/// What one attempt left on disk.
#[derive(Debug, Clone, Default)]
pub struct Record {
    spec: Option<Digest>,
    started_at: i64,
    end: Option<(Outcome, u64)>,
}

/// Output of one attempt: the first kept number is `freed + 1`.
#[derive(Debug, Clone, Default)]
pub struct Out {
    frames: VecDeque<OutputFrame>,
    freed: u64,
    synced: u64,
}

impl Out {
    fn last(&self) -> u64 {
        self.freed + self.frames.len() as u64
    }
}

/// The folder. The journal is written and synced in one go, so what it holds is durable.
#[derive(Debug, Clone)]
pub struct Spool {
    pub id: SpoolId,
    journal: BTreeMap<Key, Record>,
    out: BTreeMap<Key, Out>,
}

impl Spool {
    pub fn new(id: SpoolId) -> Self {
        Self { id, journal: BTreeMap::new(), out: BTreeMap::new() }
    }
    pub fn is_empty(&self) -> bool {
        self.journal.is_empty()
    }
    /// The machine lost its power.
    pub fn cut(&mut self) {
        for out in self.out.values_mut() {
            while out.last() > out.synced.max(out.freed) {
                out.frames.pop_back();
            }
        }
    }
    /// The frame after `seq` that is kept; none when there is none, or none any more.
    pub fn frame_after(&self, key: &Key, seq: u64) -> Option<OutputFrame> {
        self.out.get(key)?.frames.iter().find(|f| f.seq > seq).cloned()
    }
}

pub enum ToWarden {
    /// A daemon: from now on it hears what happens.
    Attach(mpsc::Sender<Event>),
    Say(Request),
}

enum Next {
    Output,
    End(Outcome),
}

struct Run {
    script: VecDeque<(Instant, Next)>,
    cancelled: bool,
}

enum State {
    Deciding,
    Running(Run),
    Ended,
}

struct Ready {
    grant: Grant,
    cancelled: bool,
}

/// What one turn has to write.
enum Write {
    Starting(Key, Digest),
    Exit(Key, Outcome),
    Refused(Key, Outcome),
}

pub struct Warden {
    m: Arc<Machine>,
    life: u64,
    attempts: BTreeMap<Key, State>,
    daemon: Option<mpsc::Sender<Event>>,
    writes: Vec<Write>,
    ready: Vec<Ready>,
    pending: Vec<Event>,
    stopping: bool,
}

impl Warden {
    /// Makes the memory whole again: what was started and has no end is lost.
    pub fn open(m: Arc<Machine>, life: u64) -> Self {
        let mut attempts = BTreeMap::new();
        let now = m.now_ms();
        let mut spool = lock(&m.spool);
        let Spool { journal, out, .. } = &mut *spool;
        for (key, record) in journal.iter_mut() {
            let last = out.get(key).map_or(0, Out::last);
            if record.end.is_none() {
                if let Some(out) = out.get_mut(key) {
                    // What it finds is synced before the end says how much there is.
                    out.synced = last;
                }
                record.end = Some((Outcome::Lost { detail: "warden_ended".into() }, last));
                record.started_at = record.started_at.max(now);
            }
            attempts.insert(*key, State::Ended);
        }
        out.retain(|key, _| journal.contains_key(key));
        drop(spool);
        Self { m, life, attempts, daemon: None, writes: vec![], ready: vec![], pending: vec![], stopping: false }
    }

    pub async fn run(mut self, mut inbox: mpsc::Receiver<ToWarden>) {
        loop {
            let due =
                self.attempts.values().filter_map(|s| if let State::Running(r) = s { r.script.front().map(|n| n.0) } else { None }).min();
            tokio::select! {
                biased;
                said = inbox.recv() => match said {
                    Some(said) => self.hear(said),
                    None => std::future::pending().await,
                },
                () = async { match due { Some(at) => tokio::time::sleep_until(at).await, None => std::future::pending().await } } => {}
            }
            while let Ok(said) = inbox.try_recv() {
                self.hear(said);
            }
            if self.children().await || self.settle().await {
                // Dead.
                return std::future::pending().await;
            }
            self.tell();
            if self.stopping && self.attempts.values().all(|s| matches!(s, State::Ended)) {
                self.m.warden_ended(self.life);
                return;
            }
        }
    }

    fn hear(&mut self, said: ToWarden) {
        match said {
            ToWarden::Attach(daemon) => {
                self.daemon = Some(daemon);
                self.pending.clear();
                let spool = lock(&self.m.spool);
                let attempts = self.attempts.keys().filter_map(|key| self.known(&spool, key)).collect();
                self.pending.push(Event::Welcome { version: VERSION, spool: spool.id, attempts });
            }
            ToWarden::Say(Request::Start { grant }) => self.on_start(grant),
            ToWarden::Say(Request::Cancel { task, attempt } | Request::Kill { task, attempt }) => self.on_cancel((task, attempt)),
            ToWarden::Say(Request::Acked { task, attempt, offset }) => self.on_acked((task, attempt), offset),
            ToWarden::Say(Request::Forget { task, attempt }) => self.on_forget((task, attempt)),
            ToWarden::Say(Request::Stop) => {
                self.stopping = true;
                let all: Vec<Key> = self.attempts.keys().copied().collect();
                all.into_iter().for_each(|key| self.terminate(key));
            }
            ToWarden::Say(Request::Hello { .. } | Request::Input { .. }) => {}
        }
    }

    /// One that is being decided is told when it is.
    fn known(&self, spool: &Spool, key: &Key) -> Option<Known> {
        let record = spool.journal.get(key)?;
        let last = spool.out.get(key).map_or(0, Out::last);
        let (state, last_seq) = match (&record.end, &self.attempts[key]) {
            (Some((outcome, last)), State::Ended) => (KnownState::Ended(outcome.clone()), *last),
            (_, State::Deciding) => return None,
            _ => (KnownState::Running, last),
        };
        Some(Known { task: key.0, attempt: key.1, state, output_end: last_seq, last_seq, started_at_ms: record.started_at, digests: None })
    }

    fn on_start(&mut self, grant: Grant) {
        let key = (grant.task(), grant.attempt());
        let again = self.m.world.is(Break::StartKnownAgain) && !matches!(self.attempts.get(&key), None | Some(State::Deciding));
        if self.attempts.contains_key(&key) && !again {
            let spool = lock(&self.m.spool);
            let known = spool.journal.get(&key).and_then(|r| r.spec);
            let (task, attempt) = key;
            if known.is_some_and(|d| d != *grant.spec()) {
                self.pending.push(Event::Conflict { task, attempt });
            } else if let Some(k) = self.known(&spool, &key) {
                match k.state {
                    KnownState::Running => self.pending.push(Event::Started { task, attempt, at_ms: k.started_at_ms }),
                    KnownState::Ended(outcome) => self.pending.push(ended(key, outcome, k.last_seq, self.m.now_ms())),
                }
            }
            return;
        }
        if self.stopping {
            return;
        }
        self.attempts.insert(key, State::Deciding);
        self.writes.push(Write::Starting(key, *grant.spec()));
        self.ready.push(Ready { grant, cancelled: false });
    }

    fn on_cancel(&mut self, key: Key) {
        match self.attempts.get(&key) {
            None => {
                self.attempts.insert(key, State::Deciding);
                self.writes.push(Write::Refused(key, Outcome::NeverStarted(NeverStarted::Cancelled)));
            }
            Some(State::Deciding) => {
                self.ready.iter_mut().filter(|r| (r.grant.task(), r.grant.attempt()) == key).for_each(|r| r.cancelled = true);
            }
            Some(State::Running(_)) => self.terminate(key),
            Some(State::Ended) => {
                let spool = lock(&self.m.spool);
                if let Some((outcome, last)) = spool.journal.get(&key).and_then(|r| r.end.clone()) {
                    self.pending.push(ended(key, outcome, last, self.m.now_ms()));
                }
            }
        }
    }

    fn terminate(&mut self, key: Key) {
        let grace = self.m.world.rng(|r| r.between(0, 3000));
        if let Some(State::Running(run)) = self.attempts.get_mut(&key)
            && !run.cancelled
        {
            run.cancelled = true;
            let at = Instant::now() + Duration::from_millis(grace);
            run.script.retain(|(due, next)| *due <= at && matches!(next, Next::Output));
            run.script.push_back((at, Next::End(Outcome::Cancelled)));
        }
    }

    fn on_acked(&mut self, key: Key, seq: u64) {
        let mut spool = lock(&self.m.spool);
        if let Some(out) = spool.out.get_mut(&key) {
            while out.freed < seq && out.frames.pop_front().is_some() {
                out.freed += 1;
            }
        }
    }

    fn on_forget(&mut self, key: Key) {
        if matches!(self.attempts.get(&key), Some(State::Ended)) {
            self.attempts.remove(&key);
            let mut spool = lock(&self.m.spool);
            spool.journal.remove(&key);
            spool.out.remove(&key);
        }
    }

    fn die_at(&self, point: Point) -> bool {
        let dies = self.m.world.dies_at(point);
        if dies {
            self.m.kill_warden();
        }
        dies || self.m.warden_life() != self.life
    }
    fn power_at(&self, point: Point) -> bool {
        let dies = self.m.world.dies_at(point);
        if dies {
            self.m.power_cut();
        }
        dies
    }

    /// Takes what the children wrote, and their ends. True when the warden died.
    async fn children(&mut self) -> bool {
        let now = Instant::now();
        let keys: Vec<Key> = self.attempts.keys().copied().collect();
        for key in keys {
            while let Some(State::Running(run)) = self.attempts.get_mut(&key) {
                let Some((_, next)) = run.script.pop_front_if(|n| n.0 <= now) else { break };
                match next {
                    Next::Output => {
                        let mut spool = lock(&self.m.spool);
                        let out = spool.out.entry(key).or_default();
                        let seq = out.last() + 1;
                        let data = content(&key, seq).into();
                        let of: Stream = stream(seq);
                        out.frames.push_back(OutputFrame { seq, t_ms: seq as i64, stream: of, data });
                        drop(spool);
                        self.m.world.saw_output(key, seq);
                        self.pending.push(Event::Output { task: key.0, attempt: key.1, end: seq, last_seq: seq });
                        if self.die_at(Point::WardenDuringOutput) || self.power_at(Point::PowerDuringOutput) {
                            return true;
                        }
                    }
                    Next::End(outcome) => {
                        self.attempts.insert(key, State::Deciding);
                        self.writes.push(Write::Exit(key, outcome));
                    }
                }
            }
        }
        false
    }

    /// Makes durable what this turn has brought, then acts on it. True when the warden died.
    async fn settle(&mut self) -> bool {
        while !self.writes.is_empty() {
            let writes = std::mem::take(&mut self.writes);
            let starts = writes.iter().any(|w| matches!(w, Write::Starting(..)));
            let exits = writes.iter().any(|w| matches!(w, Write::Exit(..)));
            let refuses = writes.iter().any(|w| matches!(w, Write::Refused(..)));
            self.m.world.pause(0, 5).await;
            if (starts && self.die_at(Point::WardenBeforeStarting))
                || (exits && (self.die_at(Point::WardenBeforeExit) || self.power_at(Point::PowerBeforeExit)))
                || (refuses && self.die_at(Point::WardenBeforeRefused))
            {
                return true;
            }
            let now = self.m.now_ms();
            let mut told = vec![];
            {
                let mut spool = lock(&self.m.spool);
                for write in &writes {
                    match write {
                        Write::Starting(key, spec) => {
                            if !self.m.world.is(Break::ForgetStarting) {
                                spool.journal.insert(*key, Record { spec: Some(*spec), started_at: now, end: None });
                            }
                        }
                        Write::Exit(key, outcome) => {
                            let out = spool.out.entry(*key).or_default();
                            out.synced = out.last();
                            let last = out.last();
                            let record = spool.journal.entry(*key).or_default();
                            record.end = Some((outcome.clone(), last));
                            told.push((*key, outcome.clone(), last));
                        }
                        Write::Refused(key, outcome) => {
                            spool.journal.insert(*key, Record { end: Some((outcome.clone(), 0)), ..Record::default() });
                            told.push((*key, outcome.clone(), 0));
                        }
                    }
                }
            }
            if (starts && (self.die_at(Point::WardenAfterStarting) || self.power_at(Point::PowerAfterStarting)))
                || (exits && (self.die_at(Point::WardenAfterExit) || self.power_at(Point::PowerAfterExit)))
            {
                return true;
            }
            for (key, outcome, last) in told {
                self.attempts.insert(key, State::Ended);
                self.pending.push(ended(key, outcome, last, now));
            }
            for ready in std::mem::take(&mut self.ready) {
                if self.start(ready, now) {
                    return true;
                }
            }
        }
        false
    }

    fn start(&mut self, ready: Ready, now: i64) -> bool {
        let key = (ready.grant.task(), ready.grant.attempt());
        if ready.cancelled || self.stopping {
            self.writes.push(Write::Exit(key, Outcome::NeverStarted(NeverStarted::Cancelled)));
            return false;
        }
        let running = self.attempts.values().filter(|s| matches!(s, State::Running(_))).count() + 1;
        let spool = lock(&self.m.spool).id;
        self.m.world.saw_exec(self.m.id, spool, key, running, self.m.max_tasks as usize);
        let script = self.script(ready.grant.timeout_secs());
        self.attempts.insert(key, State::Running(Run { script, cancelled: false }));
        self.pending.push(Event::Started { task: key.0, attempt: key.1, at_ms: now });
        self.die_at(Point::WardenAfterExec)
    }

    /// What the program will do.
    fn script(&self, timeout_secs: u64) -> VecDeque<(Instant, Next)> {
        self.m.world.rng(|r| {
            let mut at = Instant::now();
            let mut script = VecDeque::new();
            let long = r.chance(25);
            for _ in 0..r.below(6) {
                at += Duration::from_millis(if long { r.between(100, 8000) } else { r.between(0, 300) });
                script.push_back((at, Next::Output));
            }
            at += Duration::from_millis(r.between(0, 500));
            let end = match r.below(10) {
                0..=5 => Outcome::Exited(0),
                6 | 7 => Outcome::Exited(3),
                8 => Outcome::Signalled(9),
                _ => Outcome::Exited(1),
            };
            script.push_back((at, Next::End(end)));
            let limit = Instant::now() + Duration::from_secs(timeout_secs);
            if timeout_secs > 0 && at > limit {
                script.retain(|n| n.0 <= limit && matches!(n.1, Next::Output));
                script.push_back((limit, Next::End(Outcome::TimedOut)));
            }
            script
        })
    }

    fn tell(&mut self) {
        let told = std::mem::take(&mut self.pending);
        let gone = |d: &mpsc::Sender<Event>| told.into_iter().any(|event| d.try_send(event).is_err());
        if self.daemon.as_ref().is_some_and(gone) {
            self.daemon = None;
        }
    }
}

fn ended((task, attempt): Key, outcome: Outcome, last: u64, at_ms: i64) -> Event {
    Event::Ended { task, attempt, outcome, output_end: last, last_seq: last, at_ms, leftover: 0, digests: None }
}

//! What comes in from both sides: envelopes and payloads of the hub, the words of the warden.

use super::{ASK_AGAIN, Engine, key};
use crate::link::ahead::Keeping;
use crate::link::data::Pulled;
use crate::link::orders::{Accepted, Checked, Key, Payload, Rejected};
use crate::skills::{self, Step};
use mesh_core::spec::Spec;
use mesh_core::task::{NeverStarted, Outcome, Reason, ReasonCode};
use mesh_wire::limits;
use mesh_wire::node::{self as wire, node_frame};
use node_warden::frames::{Event, KnownState, Request};
use std::time::Duration;

impl Engine {
    pub(super) fn on_envelope(&mut self, e: &wire::Envelope) {
        // What the owner has said until now holds for what follows.
        self.look_at_owner();
        let Some(up) = &mut self.up else { return };
        match up.checker.check(e) {
            Ok(Accepted::Orders(orders)) => orders.into_iter().for_each(|o| self.on_order(o)),
            Ok(Accepted::Cancels(keys)) => keys.into_iter().for_each(|(k, now)| self.on_cancel(k, now)),
            Ok(Accepted::Input(piece)) => self.on_input(piece),
            Err(r) => self.reject(r),
        }
        self.start_pull();
    }

    pub(super) fn reject(&mut self, r: Rejected) {
        tracing::warn!(seq = r.seq, code = r.code, detail = %r.detail, "an envelope was rejected; nothing of it runs");
        let now = self.now();
        let Some(up) = &mut self.up else { return };
        let too_many = up.rejections.note(now);
        up.control.push_back(node_frame::Kind::Rejected(wire::Rejected { seq: r.seq, code: r.code.into(), detail: r.detail }));
        if too_many {
            self.lost("too many rejected envelopes", true);
        }
    }

    fn on_order(&mut self, o: Checked) {
        let key = o.key;
        if let Some(grant) = self.starting.get(&key) {
            if grant.spec() != &o.digest {
                self.conflict(key);
            }
            return;
        }
        if let Some(a) = self.attempts.get(&key) {
            if a.digest.is_some_and(|d| d != o.digest) {
                return self.conflict(key);
            }
            // A start for an attempt that is known is answered with its status and runs nothing.
            tracing::info!(task = %key, ended = a.end.is_some(), "an order for a known attempt");
            self.attempts.retell(&key);
            return self.tell(&key);
        }
        if self.pulls.holds(&key) {
            return;
        }
        if !o.granted {
            return self.keep(o);
        }
        if self.ahead.take(&key).is_some_and(|kept| kept != o.digest) {
            return self.conflict(key);
        }
        if self.ahead.was_cancelled(&key) {
            // The cancel overtook the leave to start.
            return self.over(&o, Outcome::NeverStarted(NeverStarted::Cancelled), vec![]);
        }
        self.tracks.received(key, &o.request_id);
        match self.admit(&o).and_then(|()| self.admit_to_place(&o)) {
            Err(outcome) => self.over(&o, outcome, vec![]),
            Ok(()) => match &o.payload {
                Payload::Inline(bytes) => {
                    let bytes = bytes.clone();
                    self.begin(&o, &bytes);
                }
                Payload::Pull(_) => self.pulls.push(o),
            },
        }
    }

    /// Keeps an order that may not start yet; what can never start is refused at once.
    fn keep(&mut self, o: Checked) {
        let key = o.key;
        if let Err(outcome) = self.admit(&o) {
            self.ahead.take(&key);
            return self.over(&o, outcome, vec![]);
        }
        match self.ahead.keep(key, o.digest) {
            Keeping::Kept => {
                if let Some(up) = &mut self.up {
                    up.control.push_back(node_frame::Kind::Kept(wire::Kept { task_id: key.task.to_string(), attempt: key.attempt.0 }));
                }
            }
            Keeping::Conflict => self.conflict(key),
            // It was not started and shall not be: it may come again later.
            Keeping::Full => self.over(&o, Outcome::NeverStarted(NeverStarted::Late), vec![]),
        }
    }

    /// Tells the hub of each free place for which an order waits here.
    pub(super) fn ask_for_next(&mut self, now: Duration) {
        if self.ahead.is_empty() || !matches!(self.ending, super::Ending::No) || self.owner.closed().is_some() {
            return;
        }
        let free = (self.places() as usize).saturating_sub(self.taken());
        let asked = self.ahead.ready(free, now, ASK_AGAIN);
        let Some(up) = self.up.as_mut().filter(|_| !asked.is_empty()) else { return };
        let ended: Vec<_> = self.attempts.known().into_iter().filter(|a| a.ended).take(limits::ORDERS_PER_ENVELOPE).collect();
        up.control.extend(asked.into_iter().map(|key| {
            let ended = ended.clone();
            node_frame::Kind::Ready(wire::Ready { task_id: key.task.to_string(), attempt: key.attempt.0, ended })
        }));
    }

    /// Places that are taken, or soon will be.
    fn taken(&self) -> usize {
        self.attempts.running().count() + self.starting.len() + self.pulls.count()
    }

    /// What the owner has closed may go elsewhere, or come again once it is open.
    fn admit_to_place(&mut self, o: &Checked) -> Result<(), Outcome> {
        let most = self.owner.ceiling().and_then(|c| c.max_tasks);
        let why = match (self.owner.closed(), most) {
            (Some(closed), _) => closed.as_str().to_owned(),
            (None, Some(most)) if self.taken() >= most as usize => format!("ceiling: max_tasks: {most}, and as many run"),
            _ => return Ok(()),
        };
        self.record.refused(o, &o.argv(), &why, self.p.clock.now_ms());
        Err(Outcome::NeverStarted(NeverStarted::Late))
    }

    fn admit(&self, o: &Checked) -> Result<(), Outcome> {
        let refused = |code, text: &str| Err(Outcome::NeverStarted(NeverStarted::Refused(Reason::new(code, text))));
        // A link is up, so there was a welcome.
        let Some(now) = self.p.time.now() else { return refused(ReasonCode::BadRequest, "no node time yet") };
        o.admit(now)?;
        if !matches!(self.ending, super::Ending::No) {
            // It was not started and shall not be: it may go elsewhere, or come again later.
            return Err(Outcome::NeverStarted(NeverStarted::Late));
        }
        match self.up.as_ref().and_then(|u| u.policy_problem.as_deref()) {
            Some(problem) => refused(ReasonCode::PolicyDenied, problem),
            None => Ok(()),
        }
    }

    fn begin(&mut self, o: &Checked, payload: &[u8]) {
        let Some(ceiling) = self.owner.ceiling() else { return self.over(o, Outcome::NeverStarted(NeverStarted::Late), vec![]) };
        let step = match o.spec(payload) {
            Err(outcome) => Step::Over { outcome, result: vec![] },
            Ok(Spec::Echo { payload }) => match ceiling.admit(o.user) {
                Ok(()) => skills::echo::step(payload),
                Err(r) => skills::refused(r.code, r.detail),
            },
            Ok(spec) if spec.takes_input() && !self.warden_takes_input() => {
                let detail =
                    "this node's warden is of a version without live input; `cortex-node stop` and a new start bring the present one";
                let outcome = Outcome::NeverStarted(NeverStarted::Refused(Reason::new(ReasonCode::SkillError, detail)));
                Step::Over { outcome, result: vec![] }
            }
            Ok(spec @ Spec::Shell(_)) => skills::shell::step(o, &spec, ceiling, &self.p.root, &self.p.state),
        };
        match step {
            Step::Over { outcome, result } => {
                if let Outcome::NeverStarted(NeverStarted::Refused(r)) = &outcome
                    && r.code == ReasonCode::PolicyDenied
                {
                    let argv = o.spec(payload).map_or(vec![], |s| s.argv());
                    self.record.refused(o, &argv, &r.detail, self.p.clock.now_ms());
                }
                self.over(o, outcome, result);
            }
            Step::Start(grant) => {
                self.record.start(o, grant.argv(), self.p.clock.now_ms());
                self.to_warden.push_back(Request::Start { grant: (*grant).clone() });
                self.starting.insert(o.key, grant);
                self.status_stale = true;
            }
        }
    }

    fn over(&mut self, o: &Checked, outcome: Outcome, result: Vec<u8>) {
        let key = o.key;
        if outcome == Outcome::Done {
            let now = self.p.clock.now_ms();
            self.record.start(o, &[], now);
            self.record.end(&key, &outcome, now);
        } else {
            tracing::info!(task = %key, ?outcome, "not started");
        }
        let at = self.p.time.now().unwrap_or(0);
        self.attempts.over(key, o.digest, outcome, result, at);
        self.tracks.mark(&key, "ended");
        self.tell(&key);
    }

    pub(super) fn on_cancel(&mut self, key: Key, now: bool) {
        self.pulls.cancel(&key);
        if self.ahead.cancel(&key) {
            // It was not granted as far as is known here: the hub has decided, and waits for no word.
            return;
        }
        if self.attempts.get(&key).is_some_and(|a| a.end.is_some()) {
            self.attempts.retell(&key);
            return self.tell(&key);
        }
        // Also for one that nobody knows here: the warden keeps a synced refusal.
        let now = *self.cancelling.entry(key).and_modify(|known| *known |= now).or_insert(now);
        self.to_warden.push_back(ending(&key, now));
    }

    fn conflict(&mut self, key: Key) {
        tracing::error!(task = %key, "an order named another spec for a known attempt; nothing of it runs");
        if let Some(up) = &mut self.up {
            let detail = format!("{} attempt {} is known with another spec", key.task, key.attempt.0);
            up.control.push_back(node_frame::Kind::Rejected(wire::Rejected { seq: 0, code: "conflict".into(), detail }));
        }
    }

    fn start_pull(&mut self) {
        let now = self.now();
        let Some(up) = &mut self.up else { return };
        if let Some(o) = self.pulls.start(now) {
            up.requests.push_back(wire::PayloadRequest {
                task_id: o.key.task.to_string(),
                attempt: o.key.attempt.0,
                sha256: o.digest.to_vec(),
            });
        }
    }

    pub(super) fn on_payload(&mut self, c: wire::PayloadChunk) {
        self.look_at_owner();
        match self.pulls.chunk(c, self.now()) {
            Pulled::More | Pulled::Stray => return,
            Pulled::Done(o, bytes) => match self.admit(&o).and_then(|()| self.admit_to_place(&o)) {
                Ok(()) => self.begin(&o, &bytes),
                Err(outcome) => self.over(&o, outcome, vec![]),
            },
            Pulled::Failed(o, why) => {
                let reason = Reason::new(ReasonCode::BadRequest, why);
                self.over(&o, Outcome::NeverStarted(NeverStarted::Refused(reason)), vec![]);
            }
        }
        self.start_pull();
    }

    pub(super) fn on_result_ack(&mut self, a: &wire::ResultAck) {
        let Some(key) = key(&a.task_id, a.attempt) else { return };
        if self.attempts.get(&key).is_none_or(|x| x.end.is_none()) {
            return;
        }
        self.outflow.forget(&key);
        self.tracks.over(&key, "result acknowledged");
        if self.attempts.remove(&key).is_some_and(|x| !x.local) {
            self.to_warden.push_back(Request::Forget { task: key.task, attempt: key.attempt });
        }
    }

    pub(super) fn on_warden(&mut self, event: Event) {
        match event {
            Event::Welcome { version, spool, attempts } => {
                self.warden_version = version;
                tracing::info!(%spool, attempts = attempts.len(), "attached to the warden");
                let gone = self.attempts.restore(&attempts, self.p.clock.now_ms());
                for k in &gone {
                    self.outflow.forget(k);
                    self.tracks.over(k, "forgotten");
                }
                for k in &attempts {
                    let key = Key { task: k.task, attempt: k.attempt };
                    self.answered(&key);
                    self.outflow.grown(key, k.output_end, k.last_seq);
                    if let KnownState::Ended(outcome) = &k.state {
                        self.record.end(&key, outcome, self.p.clock.now_ms());
                    }
                }
                // What was on its way when the last attachment ended. A repeated start runs nothing twice.
                let again = self.starting.values().map(|g| Request::Start { grant: (**g).clone() });
                self.to_warden.retain(|r| !matches!(r, Request::Start { .. } | Request::Cancel { .. } | Request::Kill { .. }));
                self.to_warden.extend(again);
                self.cancelling.retain(|k, _| self.attempts.get(k).is_none_or(|a| a.end.is_none()));
                let again = self.cancelling.iter().map(|(k, now)| ending(k, *now));
                self.to_warden.extend(again);
                self.status.spool_id = spool.to_string();
                let first = self.spool.replace(spool);
                if first.is_none() {
                    self.dial();
                } else if self.up.is_some() && (first != Some(spool) || !gone.is_empty()) {
                    self.lost("the warden's memory changed; the hub must hear of it", false);
                }
                self.tell_all();
            }
            Event::Started { task, attempt, at_ms } => {
                let key = Key { task, attempt };
                self.attempts.started(key, at_ms);
                self.tracks.mark(&key, "started");
                self.answered(&key);
                self.tell(&key);
            }
            Event::Output { task, attempt, end, last_seq } => self.outflow.grown(Key { task, attempt }, end, last_seq),
            Event::Ended { task, attempt, outcome, output_end, last_seq, at_ms, leftover, digests } => {
                let key = Key { task, attempt };
                self.cancelling.remove(&key);
                if leftover > 0 {
                    tracing::error!(task = %key, leftover, "processes of a task could not be ended");
                }
                self.outflow.grown(key, output_end, last_seq);
                self.record.end(&key, &outcome, at_ms);
                self.attempts.ended(key, outcome, last_seq, at_ms, digests);
                self.tracks.mark(&key, "ended");
                self.answered(&key);
                self.tell(&key);
            }
            Event::Input { task, attempt, request, fate, taken } => self.answer_input(Key { task, attempt }, request, fate, taken),
            Event::Conflict { task, attempt } => {
                let key = Key { task, attempt };
                self.starting.remove(&key);
                self.conflict(key);
            }
        }
        self.status_stale = true;
    }

    /// The warden knows of this attempt: its memory counts from here on.
    fn answered(&mut self, key: &Key) {
        if let Some(grant) = self.starting.remove(key) {
            self.attempts.set_digest(key, *grant.spec());
        }
    }
}

/// Tells the warden to end an attempt, with or without time to end by itself.
fn ending(key: &Key, now: bool) -> Request {
    let (task, attempt) = (key.task, key.attempt);
    if now { Request::Kill { task, attempt } } else { Request::Cancel { task, attempt } }
}

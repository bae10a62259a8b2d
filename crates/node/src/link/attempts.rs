//! What the daemon knows of attempts, between the warden and the hub.
//!
//! The warden's spool is the memory; this table is rebuilt from its Welcome. Only ends without a
//! process (echo, refusals, late orders) stand here alone, and they would come out the same again.

use super::orders::Key;
use mesh_core::output::Digests;
use mesh_core::task::Outcome;
use mesh_core::{Digest, UnixMs};
use mesh_wire::node as wire;
use node_warden::frames::{Known, KnownState};
use std::collections::BTreeMap;
use std::time::Duration;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct End {
    pub outcome: Outcome,
    pub last_seq: u64,
    pub at_ms: UnixMs,
    pub result: Vec<u8>,
    /// Of its whole output, if the warden knows.
    pub digests: Option<Digests>,
}

#[derive(Debug, Clone, Default)]
pub struct Attempt {
    /// Not in the warden's memory.
    pub local: bool,
    /// Of the spec; none for what an earlier daemon started.
    pub digest: Option<Digest>,
    pub started_at: Option<UnixMs>,
    pub end: Option<End>,
    /// Told on the present link.
    started_told: bool,
    /// When the end was last told on the present link.
    end_told: Option<Duration>,
}

#[derive(Debug, Default)]
pub struct Attempts(BTreeMap<Key, Attempt>);

impl Attempts {
    pub fn get(&self, key: &Key) -> Option<&Attempt> {
        self.0.get(key)
    }
    pub fn keys(&self) -> impl Iterator<Item = Key> {
        self.0.keys().copied()
    }
    pub fn running(&self) -> impl Iterator<Item = Key> {
        self.0.iter().filter(|(_, a)| a.end.is_none()).map(|(k, _)| *k)
    }
    pub fn has_untold(&self) -> bool {
        self.0.values().any(|a| a.end.is_some())
    }

    pub fn started(&mut self, key: Key, at_ms: UnixMs) {
        let a = self.0.entry(key).or_default();
        a.started_at.get_or_insert(at_ms);
    }
    pub fn ended(&mut self, key: Key, outcome: Outcome, last_seq: u64, at_ms: UnixMs, digests: Option<Digests>) {
        let a = self.0.entry(key).or_default();
        a.end = Some(End { outcome, last_seq, at_ms, result: vec![], digests });
        a.end_told = None;
    }
    /// The output of an ended attempt is only there up to this number.
    pub fn cut(&mut self, key: &Key, last_seq: u64) {
        if let Some(end) = self.0.get_mut(key).and_then(|a| a.end.as_mut())
            && last_seq < end.last_seq
        {
            // What the hub can get is not what the digests are of.
            (end.last_seq, end.digests) = (last_seq, None);
        }
    }
    /// An end that no process made.
    pub fn over(&mut self, key: Key, digest: Digest, outcome: Outcome, result: Vec<u8>, at_ms: UnixMs) {
        let end = Some(End { outcome, last_seq: 0, at_ms, result, digests: None });
        self.0.insert(key, Attempt { local: true, digest: Some(digest), end, ..Default::default() });
    }
    /// Remembers what was asked for, so that another spec under the same number is noticed.
    pub fn set_digest(&mut self, key: &Key, digest: Digest) {
        if let Some(a) = self.0.get_mut(key) {
            a.digest = Some(digest);
        }
    }
    pub fn remove(&mut self, key: &Key) -> Option<Attempt> {
        self.0.remove(key)
    }

    /// The warden has told all it knows. Gives the keys that it does not know any more.
    pub fn restore(&mut self, known: &[Known], now_ms: UnixMs) -> Vec<Key> {
        let mut gone: Vec<Key> = self.0.iter().filter(|(_, a)| !a.local).map(|(k, _)| *k).collect();
        for k in known {
            let key = Key { task: k.task, attempt: k.attempt };
            gone.retain(|g| *g != key);
            let a = self.0.entry(key).or_default();
            if k.started_at_ms > 0 {
                a.started_at = Some(k.started_at_ms);
            }
            if let KnownState::Ended(outcome) = &k.state
                && a.end.is_none()
            {
                // The spool keeps no time of the end; the hub keeps its own.
                a.end = Some(End { outcome: outcome.clone(), last_seq: k.last_seq, at_ms: now_ms, result: vec![], digests: k.digests });
            }
        }
        for g in &gone {
            self.0.remove(g);
        }
        gone
    }

    /// A new link: everything is to be told once more.
    pub fn relink(&mut self) {
        for a in self.0.values_mut() {
            a.started_told = false;
            a.end_told = None;
        }
    }
    /// The hub asked about one that is known.
    pub fn retell(&mut self, key: &Key) {
        if let Some(a) = self.0.get_mut(key) {
            a.started_told = false;
            a.end_told = None;
        }
    }
    pub fn known(&self) -> Vec<wire::KnownAttempt> {
        let all = self.0.iter();
        all.map(|(k, a)| wire::KnownAttempt { task_id: k.task.to_string(), attempt: k.attempt.0, ended: a.end.is_some() }).collect()
    }

    /// Frames that are due for one attempt; `durable` says whether its output up to a number is safe.
    pub fn tell(
        &mut self,
        key: &Key,
        now: Duration,
        repeat: Duration,
        sandbox: &str,
        durable: impl Fn(&Key, u64) -> bool,
    ) -> Vec<wire::node_frame::Kind> {
        let mut frames = vec![];
        let Some(a) = self.0.get_mut(key) else { return frames };
        if let (Some(at_ms), false) = (a.started_at, a.started_told) {
            a.started_told = true;
            frames.push(wire::node_frame::Kind::Started(wire::TaskStarted {
                task_id: key.task.to_string(),
                attempt: key.attempt.0,
                at_ms,
            }));
        }
        let due = a.end_told.is_none_or(|t| now.saturating_sub(t) >= repeat);
        if let Some(end) = a.end.as_ref().filter(|e| due && durable(key, e.last_seq)) {
            a.end_told = Some(now);
            frames.push(wire::node_frame::Kind::Result(wire::TaskResult {
                task_id: key.task.to_string(),
                attempt: key.attempt.0,
                outcome: Some((&end.outcome).into()),
                last_seq: end.last_seq,
                at_ms: end.at_ms,
                result: end.result.clone(),
                stdout_sha256: end.digests.map_or(vec![], |d| d.stdout.to_vec()),
                stderr_sha256: end.digests.map_or(vec![], |d| d.stderr.to_vec()),
                sandbox_applied: if a.started_at.is_some() { sandbox.to_owned() } else { String::new() },
            }));
        }
        frames
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_core::TaskId;
    use mesh_core::task::AttemptNo;
    use wire::node_frame::Kind;

    const NOW: Duration = Duration::from_secs(100);
    const REPEAT: Duration = Duration::from_secs(15);

    fn key(n: u8) -> Key {
        Key { task: TaskId::from_bytes([n; 16]), attempt: AttemptNo(1) }
    }
    fn tell(a: &mut Attempts, k: Key, now: Duration, durable: bool) -> Vec<Kind> {
        a.tell(&k, now, REPEAT, "x", |_, _| durable)
    }

    #[test]
    fn a_result_waits_for_its_output_and_repeats_until_acknowledged() {
        let (mut a, k) = (Attempts::default(), key(1));
        a.started(k, 5);
        assert!(matches!(tell(&mut a, k, NOW, true)[..], [Kind::Started(_)]));
        assert!(tell(&mut a, k, NOW, true).is_empty());
        a.ended(k, Outcome::Exited(0), 3, 9, None);
        assert!(tell(&mut a, k, NOW, false).is_empty(), "output is not durable yet");
        let [Kind::Result(r)] = &tell(&mut a, k, NOW, true)[..] else { panic!() };
        assert_eq!((r.last_seq, r.sandbox_applied.as_str()), (3, "x"));
        assert!(tell(&mut a, k, NOW + Duration::from_secs(14), true).is_empty());
        assert_eq!(tell(&mut a, k, NOW + REPEAT, true).len(), 1);
        a.relink();
        assert_eq!(tell(&mut a, k, NOW + REPEAT, true).len(), 2, "a new link hears both again");
        assert!(a.remove(&k).is_some() && tell(&mut a, k, NOW, true).is_empty());
    }

    #[test]
    fn the_wardens_memory_is_the_memory() {
        let mut a = Attempts::default();
        a.started(key(1), 5);
        a.over(key(2), [0; 32], Outcome::Done, b"hi".to_vec(), 6);
        let digests = Some(Digests { stdout: [1; 32], stderr: [2; 32] });
        let known = |n: u8, state| {
            let (task, attempt) = (key(n).task, AttemptNo(1));
            Known { task, attempt, state, output_end: 0, last_seq: 4, started_at_ms: 7, digests }
        };
        let gone = a.restore(&[known(3, KnownState::Running), known(4, KnownState::Ended(Outcome::Exited(1)))], 50);
        assert_eq!(gone, [key(1)]);
        assert_eq!(a.keys().collect::<Vec<_>>(), [key(2), key(3), key(4)]);
        assert_eq!(a.running().collect::<Vec<_>>(), [key(3)]);
        assert_eq!(a.known().iter().filter(|k| k.ended).count(), 2);
        let [Kind::Result(r)] = &tell(&mut a, key(2), NOW, true)[..] else { panic!() };
        assert_eq!((r.result.as_slice(), r.sandbox_applied.as_str()), (&b"hi"[..], ""));
        assert_eq!((r.stdout_sha256.len(), r.stderr_sha256.len()), (0, 0), "nothing was written that anybody could hash");
        let [_, Kind::Result(r)] = &tell(&mut a, key(4), NOW, true)[..] else { panic!() };
        assert_eq!((&r.stdout_sha256[..], &r.stderr_sha256[..]), (&[1; 32][..], &[2; 32][..]));
        a.relink();
        a.cut(&key(4), 4);
        let [_, Kind::Result(r)] = &tell(&mut a, key(4), NOW, true)[..] else { panic!() };
        assert_eq!((r.last_seq, r.stdout_sha256.len()), (4, 32), "nothing was cut off");
        a.relink();
        a.cut(&key(4), 3);
        let [_, Kind::Result(r)] = &tell(&mut a, key(4), NOW, true)[..] else { panic!() };
        assert_eq!((r.last_seq, r.stdout_sha256.len(), r.stderr_sha256.len()), (3, 0, 0), "what is missing has no digest");
    }
}

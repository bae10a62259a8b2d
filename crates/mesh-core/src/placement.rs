//! Which node gets a task. A pure function: the same history places the same way on any hub.

use crate::select::{Offers, Selector};
use crate::{NodeId, TaskId, sha256};
use std::collections::BTreeMap;

/// A node as the pool sees it now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate<'a> {
    pub node: NodeId,
    pub online: bool,
    /// Takes new work.
    pub schedulable: bool,
    /// Tasks that it can still take.
    pub room: u32,
    pub offers: &'a Offers,
    /// Slots that tasks on it hold, by kind.
    pub taken: &'a BTreeMap<String, u32>,
}

/// Has a node with `offers`, of which `taken` is taken, the slots that `select` asks for?
pub fn has_slots(select: &Selector, offers: &Offers, taken: &BTreeMap<String, u32>) -> bool {
    let free = |kind: &str| offers.slots.get(kind).map_or(0, |all| all.saturating_sub(taken.get(kind).copied().unwrap_or(0)));
    select.slots.iter().all(|(kind, n)| free(kind) >= *n)
}

/// Why a task waits; the texts are part of the API.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Waiting {
    NodeOffline,
    NoCandidate,
    NoSlot,
    NotBefore,
    Backoff,
    InDoubt,
    HubStarting,
}

impl Waiting {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NodeOffline => "node_offline",
            Self::NoCandidate => "no_candidate",
            Self::NoSlot => "no_slot",
            Self::NotBefore => "not_before",
            Self::Backoff => "backoff",
            Self::InDoubt => "in_doubt",
            Self::HubStarting => "hub_starting",
        }
    }
}

/// Chooses among `candidates` (all that the caller may use). A named node is the only candidate.
pub fn choose(task: TaskId, named: Option<NodeId>, select: Option<&Selector>, candidates: &[Candidate]) -> Result<NodeId, Waiting> {
    let mut reason = if named.is_some() { Waiting::NodeOffline } else { Waiting::NoCandidate };
    let mut best: Option<(u64, NodeId)> = None;
    for c in candidates.iter().filter(|c| c.online && named.is_none_or(|n| n == c.node)) {
        if !c.schedulable || !select.is_none_or(|s| s.fits(c.offers)) {
            // A node that is there and may not be used is another thing than one that is away.
            if reason == Waiting::NodeOffline {
                reason = Waiting::NoCandidate;
            }
            continue;
        }
        if c.room == 0 || !select.is_none_or(|s| has_slots(s, c.offers, c.taken)) {
            reason = Waiting::NoSlot;
            continue;
        }
        let score = rendezvous(task, c.node);
        if best.is_none_or(|b| (score, c.node) > b) {
            best = Some((score, c.node));
        }
    }
    best.map(|(_, n)| n).ok_or(reason)
}

/// Highest-random-weight hashing (Thaler and Ravishankar, 1998).
fn rendezvous(task: TaskId, node: NodeId) -> u64 {
    let mut bytes = [0; 32];
    bytes[..16].copy_from_slice(node.as_bytes());
    bytes[16..].copy_from_slice(task.as_bytes());
    u64::from_be_bytes(sha256(&bytes)[..8].try_into().expect("a digest has 32 bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    static NOTHING: BTreeMap<String, u32> = BTreeMap::new();
    static PLAIN: Offers = Offers { labels: BTreeMap::new(), skills: BTreeSet::new(), slots: BTreeMap::new() };

    fn c(n: u8, online: bool, room: u32) -> Candidate<'static> {
        Candidate { node: NodeId::from_bytes([n; 16]), online, schedulable: true, room, offers: &PLAIN, taken: &NOTHING }
    }

    #[test]
    fn says_why_it_waits() {
        let t = TaskId::from_bytes([1; 16]);
        let n = NodeId::from_bytes([1; 16]);
        let choose = |named, candidates: &[Candidate]| choose(t, named, None, candidates);
        assert_eq!(choose(Some(n), &[]), Err(Waiting::NodeOffline));
        assert_eq!(choose(None, &[]), Err(Waiting::NoCandidate));
        assert_eq!(choose(Some(n), &[c(1, false, 4)]), Err(Waiting::NodeOffline));
        assert_eq!(choose(Some(n), &[c(1, true, 0), c(2, true, 9)]), Err(Waiting::NoSlot));
        assert_eq!(choose(Some(n), &[c(1, true, 1)]), Ok(n));
        let draining = Candidate { schedulable: false, ..c(1, true, 1) };
        assert_eq!(choose(Some(n), std::slice::from_ref(&draining)), Err(Waiting::NoCandidate), "it is there and takes nothing");
        assert_eq!(choose(None, &[draining.clone(), c(2, true, 0)]), Err(Waiting::NoSlot));
        assert_eq!(choose(None, &[c(2, true, 0), draining]), Err(Waiting::NoSlot), "whatever the order");
    }

    #[test]
    fn a_selector_narrows_and_slots_are_counted() {
        let t = TaskId::from_bytes([1; 16]);
        let gpus =
            Offers { labels: [("os".to_owned(), "linux".to_owned())].into(), slots: [("gpu".to_owned(), 2)].into(), ..Offers::default() };
        let (one, two) = ([("gpu".to_owned(), 1)].into(), [("gpu".to_owned(), 2)].into());
        let with = |taken| Candidate { offers: &gpus, taken, ..c(1, true, 4) };
        let select = |text: &str, n: u32| Selector { slots: [("gpu".to_owned(), n)].into(), ..Selector::parse(text).unwrap() };
        let n = Ok(NodeId::from_bytes([1; 16]));
        let choose = |s: Selector, c: Candidate| choose(t, None, Some(&s), &[c]);
        assert_eq!(choose(select("os=linux", 2), with(&NOTHING)), n);
        assert_eq!(choose(select("", 1), with(&one)), n);
        assert_eq!(choose(select("", 2), with(&one)), Err(Waiting::NoSlot));
        assert_eq!(choose(select("", 1), with(&two)), Err(Waiting::NoSlot));
        assert_eq!(choose(select("", 3), with(&NOTHING)), Err(Waiting::NoCandidate), "nobody can ever have three");
        assert_eq!(choose(select("os=darwin", 1), with(&NOTHING)), Err(Waiting::NoCandidate));
        assert_eq!(choose(Selector::parse("os").unwrap(), with(&two)), n, "who asks for no slot needs none");
        assert_eq!(choose(select("", 1), Candidate { room: 0, ..with(&NOTHING) }), Err(Waiting::NoSlot));
        assert_eq!(choose(select("", 1), c(2, true, 4)), Err(Waiting::NoCandidate));
    }

    #[test]
    fn spreads_and_ignores_order() {
        let mut nodes: Vec<_> = (1..=4).map(|n| c(n, true, 1)).collect();
        let mut counts = [0; 5];
        for i in 0..1000u32 {
            let mut b = [0; 16];
            b[..4].copy_from_slice(&i.to_be_bytes());
            let t = TaskId::from_bytes(b);
            let chosen = choose(t, None, None, &nodes).unwrap();
            nodes.reverse();
            assert_eq!(choose(t, None, None, &nodes), Ok(chosen));
            counts[chosen.as_bytes()[0] as usize] += 1;
        }
        assert!(counts[1..].iter().all(|n| (180..320).contains(n)), "{counts:?}");
    }
}

//! Words of nodes that cannot be true: counted, told in the log now and then, and in the end the end of
//! the link. A true node says none, so that a liar is not worth a line for each lie.

use mesh_core::NodeId;
use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

/// On one link; beyond it nobody is mistaken any more.
const MOST_A_LINK: u64 = 1_000;

#[derive(Debug, Default)]
struct Of {
    all: u64,
    generation: u64,
    on_link: u64,
}

#[derive(Debug, Default)]
pub struct Refusals(Mutex<BTreeMap<NodeId, Of>>);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Noted {
    /// The first, second, fourth, eighth … of this node: to be logged.
    pub tell: bool,
    /// The link has said too many.
    pub too_many: bool,
}

impl Refusals {
    pub fn note(&self, node: NodeId, generation: u64) -> Noted {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let of = all.entry(node).or_default();
        if of.generation != generation {
            (of.generation, of.on_link) = (generation, 0);
        }
        (of.all, of.on_link) = (of.all + 1, of.on_link + 1);
        Noted { tell: of.all.is_power_of_two(), too_many: of.on_link >= MOST_A_LINK }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_liar_fills_no_log_and_keeps_no_link() {
        let (r, node) = (Refusals::default(), NodeId::from_bytes([1; 16]));
        let noted: Vec<Noted> = (0..2_000).map(|_| r.note(node, 1)).collect();
        assert_eq!(noted.iter().filter(|n| n.tell).count(), 11);
        assert_eq!(noted.iter().position(|n| n.too_many), Some(999));
        assert_eq!(r.note(node, 2), Noted { tell: false, too_many: false }, "a new link begins anew, the log does not");
        assert_eq!(r.note(NodeId::from_bytes([2; 16]), 1), Noted { tell: true, too_many: false });
    }
}

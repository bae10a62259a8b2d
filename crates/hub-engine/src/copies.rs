//! Two machines with one identity: a data folder that was copied, a disk image that was run twice.
//!
//! Each welcome gives a link session, and a hello names the newest one that its machine has had. A hello
//! that takes the place of a live link and knows nothing of it is of another machine. One such may have
//! a harmless cause; two within [`WINDOW`] are a copy: from then on neither is given a link, until only
//! one of them has come for as long.
//!
//! A machine that comes back over a dead connection knows the session, or lost the welcome and repeats
//! its last hello: neither counts.

use crate::delivery::Delivery;
use crate::error::{Error, Result};
use crate::events::NodeNews;
use crate::links::LinkCommand;
use crate::records::Node;
use mesh_core::NodeId;
use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Two live links that are superseded within it are a copy; nodes try again each half of it.
const WINDOW: Duration = Duration::from_secs(600);
const AT_MOST: usize = 2;
/// Sessions that are told apart while an identity is held; who makes up more is held all the same.
const MAX_KNOCKS: usize = 8;

/// The newest link session that a machine has had; empty before its first.
pub type Session = Vec<u8>;

#[derive(Debug, Default)]
struct Of {
    /// Of the newest link, and what its hello had named.
    session: Session,
    named: Session,
    /// The present link took the place of another machine's.
    foreign: bool,
    /// The present link is of the machine that had the one before it.
    continues: bool,
    /// Nothing but copies since another machine had the link: they may not have what that one was given.
    copied: bool,
    superseded: Vec<Duration>,
    /// Who came while it is held, and when last.
    held: Option<BTreeMap<Session, Duration>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    Welcome,
    Held,
    /// From now on.
    NewlyHeld,
}

#[derive(Debug, Default)]
pub struct Copies(Mutex<BTreeMap<NodeId, Of>>);

impl Copies {
    fn all(&self) -> MutexGuard<'_, BTreeMap<NodeId, Of>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Judges a hello that names a session; `live`: a link of this node is in place.
    pub fn judge(&self, node: NodeId, named: &[u8], live: bool, now: Duration) -> Verdict {
        let mut all = self.all();
        let of = all.entry(node).or_default();
        let lately = |at: &Duration| now.saturating_sub(*at) < WINDOW;
        if let Some(came) = &mut of.held {
            came.retain(|_, at| lately(at));
            if came.len() < MAX_KNOCKS || came.contains_key(named) {
                came.insert(named.to_vec(), now);
            }
            if came.len() > 1 {
                return Verdict::Held;
            }
            *of = Of::default();
        }
        of.foreign = live && of.session != named && of.named != named;
        let follows = !of.session.is_empty() && of.session == named;
        of.copied = of.foreign || (of.copied && follows);
        of.continues = follows && !of.copied;
        if of.foreign {
            of.superseded.retain(lately);
            of.superseded.push(now);
            if of.superseded.len() >= AT_MOST {
                of.held = Some([(std::mem::take(&mut of.session), now), (named.to_vec(), now)].into());
                return Verdict::NewlyHeld;
            }
        }
        Verdict::Welcome
    }
    /// A link was opened after all.
    pub fn linked(&self, node: NodeId, named: &[u8], session: &[u8]) {
        let mut all = self.all();
        let of = all.entry(node).or_default();
        (of.named, of.session) = (named.to_vec(), session.to_vec());
    }
    pub fn holds(&self, node: NodeId) -> bool {
        self.all().get(&node).is_some_and(|of| of.held.is_some())
    }
    /// Whether the present link is known to be of the machine that had the one before it. Its hello may be
    /// older than what that link still brought it: a machine changes links while it works.
    pub fn continues(&self, node: NodeId) -> bool {
        self.all().get(&node).is_some_and(|of| of.continues)
    }
    /// Whether the present machine took over from another one, and so may lack what that one was given.
    pub fn is_copied(&self, node: NodeId) -> bool {
        self.all().get(&node).is_some_and(|of| of.copied)
    }
    /// Whether the present link may be of another machine than the one that was given the node's tasks.
    pub fn is_foreign(&self, node: NodeId) -> bool {
        self.all().get(&node).is_some_and(|of| of.foreign)
    }
}

impl Delivery {
    /// Refuses a hello while its identity is held. To be asked before the link is opened.
    pub async fn tell_copies_apart(&self, node: &Node, named: &[u8]) -> Result<()> {
        const DETAIL: &str = "two machines use this node's identity; stop one of them, and join it anew with an invite of its own";
        let live = self.links.get(node.id).is_some();
        let verdict = self.links.copies().judge(node.id, named, live, self.clock.steady());
        if verdict == Verdict::NewlyHeld {
            tracing::warn!(node = %node.id, name = %node.name, "two machines use one identity; neither is given a link");
            self.links.send(node.id, LinkCommand::Close { code: "superseded", detail: DETAIL.into() });
            self.nodes.add_notice(node.id, "two machines used this node's identity, and both were held,", self.clock.now_ms()).await?;
            self.links.tell(node, NodeNews::Superseded);
        }
        if verdict == Verdict::Welcome { Ok(()) } else { Err(Error::conflict("superseded", DETAIL)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NODE: NodeId = NodeId::from_bytes([1; 16]);

    /// A hello at a minute; a welcome gives the session `new`.
    fn hello(c: &Copies, named: &str, live: bool, minute: u64, new: &str) -> Verdict {
        let verdict = c.judge(NODE, named.as_bytes(), live, Duration::from_secs(minute * 60));
        if verdict == Verdict::Welcome {
            c.linked(NODE, named.as_bytes(), new.as_bytes());
        }
        verdict
    }

    #[test]
    fn a_machine_that_comes_back_is_no_copy() {
        let c = Copies::default();
        assert_eq!(hello(&c, "", false, 0, "1"), Verdict::Welcome);
        for n in 1..20 {
            let (named, new) = (n.to_string(), (n + 1).to_string());
            assert_eq!(hello(&c, &named, true, 0, &new), Verdict::Welcome, "over a dead connection, or with a new certificate");
            assert!(!c.is_foreign(NODE) && c.continues(NODE));
        }
        assert_eq!(hello(&c, "19", true, 0, "21"), Verdict::Welcome, "the welcome before was lost");
        assert_eq!(hello(&c, "19", true, 0, "22"), Verdict::Welcome);
        assert_eq!(hello(&c, "old", false, 0, "23"), Verdict::Welcome, "a folder from a backup takes nobody's place");
        assert!(!c.is_foreign(NODE) && !c.holds(NODE) && !c.continues(NODE));
    }

    #[test]
    fn two_machines_are_held_until_one_has_gone() {
        let c = Copies::default();
        assert_eq!(hello(&c, "", false, 0, "a"), Verdict::Welcome);
        assert_eq!(hello(&c, "b", true, 1, "b2"), Verdict::Welcome);
        assert!(c.is_foreign(NODE) && !c.holds(NODE));
        assert_eq!(hello(&c, "b2", false, 2, "b3"), Verdict::Welcome);
        assert!(!c.is_foreign(NODE) && c.is_copied(NODE) && !c.continues(NODE), "a copy that comes back is one still");
        assert_eq!(hello(&c, "a", true, 6, "a2"), Verdict::NewlyHeld);
        assert!(c.holds(NODE));
        // Both come each five minutes.
        for minute in [11, 16, 21] {
            assert_eq!(hello(&c, "b3", false, minute, "-"), Verdict::Held);
            assert_eq!(hello(&c, "a", false, minute, "-"), Verdict::Held);
        }
        // Then one does not.
        assert_eq!(hello(&c, "a", false, 26, "-"), Verdict::Held);
        assert_eq!(hello(&c, "a", false, 31, "a3"), Verdict::Welcome);
        assert!(!c.holds(NODE) && !c.is_foreign(NODE));
        assert_eq!(hello(&c, "a3", true, 32, "a4"), Verdict::Welcome);
    }

    #[test]
    fn seldom_is_not_twice() {
        let c = Copies::default();
        hello(&c, "", false, 0, "a");
        for n in 0..20 {
            assert_eq!(hello(&c, &format!("x{n}"), true, 1 + n * 10, &format!("y{n}")), Verdict::Welcome);
        }
        assert_eq!(hello(&c, "z", true, 195, "-"), Verdict::NewlyHeld);
        for n in 0..100 {
            assert_eq!(hello(&c, &format!("made up {n}"), false, 196, "-"), Verdict::Held);
        }
        assert!(c.all()[&NODE].held.as_ref().is_some_and(|came| came.len() == MAX_KNOCKS));
    }
}

//! A new certificate authority and task key in the place of the old ones, in steps that a person takes, so
//! that no machine is left behind unseen.
//!
//! The keys are the port's; what may be done when is decided here: nothing goes out that a machine cannot
//! check, unless somebody says that it is left behind.

use crate::access::authorize_own;
use crate::audit::{self, Action};
use crate::error::{Error, Result};
use crate::ports::{Authority, NodeDirectory, Window};
use crate::records::Node;
use mesh_core::NodeId;
use mesh_core::permission::{Caller, Permission};
use mesh_process::SharedClock;
use std::sync::Arc;

macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($(#[$about:meta])* $word:ident = $text:literal),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum $name { $($(#[$about])* $word),* }
        impl $name {
            pub const ALL: &'static [$name] = &[$($name::$word),*];
            pub fn as_str(self) -> &'static str { match self { $(Self::$word => $text),* } }
            pub fn parse(text: &str) -> Option<Self> { match text { $($text => Some(Self::$word),)* _ => None } }
        }
    };
}

words! {
    Phase {
        /// One root, one task key.
        Steady = "steady",
        /// Nodes learn to believe the new ones; the old ones are used.
        Both = "both",
        /// The new ones are used where they are believed; the old ones still count.
        Issuing = "issuing",
    }
}
words! {
    Step { Begin = "begin", Issue = "issue", Retire = "retire", Abort = "abort" }
}

impl Phase {
    /// None when the step is not for this phase.
    pub fn after(self, step: Step) -> Option<Self> {
        match (self, step) {
            (Self::Steady, Step::Begin) => Some(Self::Both),
            (Self::Both, Step::Issue) => Some(Self::Issuing),
            (Self::Both, Step::Abort) | (Self::Issuing, Step::Retire) => Some(Self::Steady),
            _ => None,
        }
    }
}

/// Names that an answer lists; the counts tell of all.
pub const NAMED: usize = 50;
/// Nodes that one read of the registry brings.
const AT_ONCE: u32 = 500;

/// Where a rotation stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Standing {
    pub phase: Phase,
    pub seq: u64,
    pub nodes: u64,
    /// How many of them have the bundle of this sequence.
    pub acknowledged: u64,
    /// Who has not, as far as they are named.
    pub stragglers: Vec<Straggler>,
    /// Nodes whose certificate lives and is by the old root.
    pub old_certificates: u64,
    pub on_old_root: Vec<Straggler>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Straggler {
    pub node: NodeId,
    pub name: String,
}

pub struct Rotation {
    pub nodes: Arc<dyn NodeDirectory>,
    pub authority: Arc<dyn Authority>,
    pub clock: SharedClock,
    /// One step at a time.
    pub one: tokio::sync::Mutex<()>,
}

impl Rotation {
    pub async fn standing(&self, caller: &Caller) -> Result<Standing> {
        authorize_own(caller, Permission::SystemAdminister)?;
        self.look().await
    }

    /// Takes a step. With `leave_behind` nobody is waited for: who cannot follow needs a new invite.
    pub async fn step(&self, caller: &Caller, step: Step, leave_behind: bool) -> Result<Standing> {
        audit::doing(caller, Action::CaRotate);
        audit::detail("step", step.as_str());
        authorize_own(caller, Permission::SystemAdminister)?;
        let _one = self.one.lock().await;
        let stands = self.look().await?;
        audit::detail("phase", stands.phase.as_str());
        audit::detail("seq", stands.seq);
        if stands.phase.after(step).is_none() {
            return Err(Error::conflict("wrong_phase", out_of_turn(stands.phase, step)));
        }
        let behind = match step {
            Step::Issue => (stands.nodes - stands.acknowledged, &stands.stragglers, "nodes have not acknowledged the new root yet"),
            Step::Retire => (stands.old_certificates, &stands.on_old_root, "nodes still have a living certificate by the old root"),
            Step::Begin | Step::Abort => (0, &stands.stragglers, ""),
        };
        if behind.0 > 0 {
            let names: Vec<&str> = behind.1.iter().map(|s| s.name.as_str()).collect();
            if !leave_behind {
                let detail = format!(
                    "{} {}: {}; wait for them, or say --leave-behind: a machine that cannot follow needs a new invite",
                    behind.0,
                    behind.2,
                    names.join(", ")
                );
                return Err(Error::conflict("stragglers", detail));
            }
            audit::detail("left_behind", behind.0);
            tracing::warn!(step = step.as_str(), count = behind.0, names = names.join(", "), "machines are left behind");
        }
        // Before the keys change: there is no step without its entry.
        audit::now().await?;
        self.authority.step(step, self.clock.now_ms()).await?;
        tracing::info!(step = step.as_str(), "the hub's authority has changed");
        self.look().await
    }

    async fn look(&self) -> Result<Standing> {
        let (phase, seq) = self.authority.stands();
        let mut s = Standing { phase, seq, nodes: 0, acknowledged: 0, stragglers: vec![], old_certificates: 0, on_old_root: vec![] };
        let now = self.clock.now_ms();
        let mut window = Window { before: None, limit: AT_ONCE };
        loop {
            let page = self.nodes.nodes(None, window).await?;
            for n in page.iter().filter(|n| n.revoked_at.is_none()) {
                s.nodes += 1;
                // Of a higher sequence a restored hub does not know what is in it.
                if n.bundle_seq == seq {
                    s.acknowledged += 1;
                } else {
                    name(&mut s.stragglers, n);
                }
                if n.certificate.not_after > now && !self.authority.issues(&n.certificate.der) {
                    s.old_certificates += 1;
                    name(&mut s.on_old_root, n);
                }
            }
            match page.last() {
                Some(last) if page.len() == AT_ONCE as usize => window.before = Some(last.id),
                _ => return Ok(s),
            }
        }
    }
}

fn name(list: &mut Vec<Straggler>, n: &Node) {
    if list.len() < NAMED {
        list.push(Straggler { node: n.id, name: n.name.clone() });
    }
}

fn out_of_turn(phase: Phase, step: Step) -> String {
    let now = match phase {
        Phase::Steady => "no rotation is under way: start one with --begin",
        Phase::Both => "a rotation has begun and nothing is issued by the new root yet: go on with --issue, or go back with --abort",
        Phase::Issuing => "the new root issues, and there is no way back: end the rotation with --retire",
    };
    format!("{} is not the next step; {now}", step.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_have_their_turn() {
        let next = |phase: Phase| Step::ALL.iter().filter_map(|s| Some((*s, phase.after(*s)?))).collect::<Vec<_>>();
        assert_eq!(next(Phase::Steady), [(Step::Begin, Phase::Both)]);
        assert_eq!(next(Phase::Both), [(Step::Issue, Phase::Issuing), (Step::Abort, Phase::Steady)]);
        assert_eq!(next(Phase::Issuing), [(Step::Retire, Phase::Steady)]);
    }
}

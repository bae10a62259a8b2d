//! Machines: invites, enrolment, the registry and what is live of it.

use crate::access::{authorize, authorize_own, visible};
use crate::audit::{self, Action};
use crate::error::{Error, Result};
use crate::events::{Events, NodeNews};
use crate::health::{History, Sample};
use crate::idempotency::{self, Keyed};
use crate::links::{Health, Links};
use crate::ports::{Creation, Keyring, NodeDirectory, Window};
use crate::records::{Claim, HUB_LABELS, Invite, Node, NodeCertificate};
use mesh_core::capability::Capabilities;
use mesh_core::permission::{Caller, Permission, Thing};
use mesh_core::select::Selector;
use mesh_core::{Digest, HubId, InviteId, NodeId, UnixMs, enrol, name, seal, sha256};
use mesh_process::{SharedClock, entropy};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// The same key gets the same answer for this long, since the first may have been lost.
const SAME_ANSWER_MS: i64 = 10 * 60_000;
/// Renewals that a hub may have forgotten by a restore: six weeks of daily certificates.
const MAX_FORGOTTEN: u64 = 64;
/// How long after its certificate's end a node's key still stands for it.
const RECOVER_MS: i64 = 30 * 86_400_000;
/// A node recovers once after each absence; more than so many in a while is none.
const RECOVERIES: u32 = 20;
const RECOVERIES_WITHIN: Duration = Duration::from_secs(600);
const MAX_LABELS: usize = 64;
/// What a person may set for an invite's life.
const MAX_INVITE_SECS: u64 = 24 * 3600;
const MAX_INVITE_SECS_ADMIN: u64 = 30 * 24 * 3600;

#[derive(Debug, Clone, Copy)]
pub struct Lifetimes {
    pub certificate_ms: i64,
    pub invite_secs: u64,
}

/// An invite and the seed that only its file will hold.
pub struct NewInvite {
    pub invite: Invite,
    pub seed: [u8; 32],
}

/// What a machine brings to enrol.
#[derive(Debug)]
pub struct Enrolment {
    pub invite: InviteId,
    /// SubjectPublicKeyInfo (DER), already proved by the CSR's own signature.
    pub spki_der: Vec<u8>,
    pub nonce: [u8; 32],
    pub proof: Vec<u8>,
    /// Of this very channel.
    pub exporter: [u8; 32],
    pub version: String,
    pub capabilities: Capabilities,
    pub suggested_name: String,
    /// SHA-256 of the SubjectPublicKeyInfo of the roots that it believes.
    pub roots: Vec<Digest>,
}

/// What a node brings whose certificate has ended.
#[derive(Debug)]
pub struct Recovery {
    pub node: NodeId,
    /// SubjectPublicKeyInfo (DER), already proved by the CSR's own signature.
    pub spki_der: Vec<u8>,
    /// Of the certificate that is asked for; as in a renewal.
    pub counter: u64,
    pub nonce: [u8; 32],
    pub proof: Vec<u8>,
    /// Of this very channel.
    pub exporter: [u8; 32],
    /// As in an enrolment.
    pub roots: Vec<Digest>,
}

/// How often each node has recovered of late.
#[derive(Debug, Default)]
pub struct Recoveries(Mutex<(Duration, BTreeMap<NodeId, u32>)>);

impl Recoveries {
    fn admit(&self, node: NodeId, now: Duration) -> bool {
        // Each change below is complete in itself.
        let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (since, counts) = &mut *seen;
        if now.saturating_sub(*since) >= RECOVERIES_WITHIN {
            (*since, *counts) = (now, BTreeMap::new());
        }
        let count = counts.entry(node).or_default();
        *count += 1;
        *count <= RECOVERIES
    }
}

/// A skill over many nodes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Skill {
    /// Version to the number of nodes that have it.
    pub versions: BTreeMap<String, u32>,
    pub online: u32,
}

/// Nodes that one read of the registry brings.
const NODES_AT_ONCE: u32 = 500;

/// How a node stands, decided here and nowhere else.
#[derive(Debug, Clone, PartialEq)]
pub struct Standing {
    /// revoked, offline, draining, online: the first that applies.
    pub status: &'static str,
    /// Why it takes no work; none when it does.
    pub unschedulable: Option<&'static str>,
    pub running: u32,
    /// Tasks at once, by the machine's own word and the hub's bound.
    pub max_tasks: u32,
    pub health: Option<Health>,
    pub rtt_ms: Option<f64>,
}

pub struct Nodes {
    pub hub: HubId,
    pub store: Arc<dyn NodeDirectory>,
    pub keyring: Arc<dyn Keyring>,
    pub links: Arc<Links>,
    pub events: Events,
    pub history: History,
    pub recoveries: Recoveries,
    pub clock: SharedClock,
    pub lifetimes: Lifetimes,
}

impl Nodes {
    pub async fn invite(
        &self,
        caller: &Caller,
        label: Option<String>,
        labels: BTreeMap<String, String>,
        ttl_secs: Option<u64>,
        keyed: Option<Keyed>,
    ) -> Result<NewInvite> {
        const ADVICE: &str = "delete it and ask again under a new key";
        audit::doing(caller, Action::InviteCreate);
        let owner = authorize_own(caller, Permission::NodesInvite)?;
        if let Some(made) = idempotency::before::<InviteId>(keyed.as_ref()).await? {
            return idempotency::already(made, ADVICE);
        }
        if let Some(n) = &label {
            name::check(n).map_err(|e| Error::invalid("bad_name", e))?;
        }
        check_labels(&labels)?;
        let admin = authorize_own(caller, Permission::SystemAdminister).is_ok();
        let most = if admin { MAX_INVITE_SECS_ADMIN } else { MAX_INVITE_SECS };
        let ttl = ttl_secs.unwrap_or(self.lifetimes.invite_secs);
        if ttl == 0 || ttl > most {
            return Err(Error::invalid("bad_ttl", format!("ttl_secs is 1 to {most}, not {ttl}")));
        }
        let now = self.clock.now_ms();
        let seed: [u8; 32] = entropy::bytes();
        let invite = Invite {
            id: InviteId::from_parts(now, entropy::bytes()),
            owner,
            public_key: seal::public_of(&seed),
            name: label,
            labels,
            created_at: now,
            expires_at: now + ttl as i64 * 1000,
            revoked_at: None,
            used: None,
            notices: vec![],
        };
        audit::about(invite.id);
        match keyed {
            None => self.store.add_invite(&invite).await?,
            Some(k) => {
                if let Some(made) = k.create::<InviteId>(Creation::Invite(invite.clone())).await? {
                    return idempotency::already(made, ADVICE);
                }
            }
        }
        Ok(NewInvite { invite, seed })
    }

    pub async fn invites(&self, caller: &Caller, window: Window<InviteId>) -> Result<Vec<Invite>> {
        let within = visible(caller, Permission::NodesInvite)?;
        Ok(self.store.invites(within.as_ref(), window).await?)
    }

    pub async fn revoke_invite(&self, caller: &Caller, id: InviteId) -> Result<()> {
        audit::doing(caller, Action::InviteRevoke);
        audit::about(id);
        let invite = self.store.invite(id).await?.ok_or(Error::NotFound("invite"))?;
        authorize(caller, Permission::NodesInvite, (invite.owner, Thing::Other), Permission::NodesInvite, "invite")?;
        if self.store.revoke_invite(id, self.clock.now_ms()).await? {
            Ok(())
        } else {
            Err(Error::conflict("invite_used", "the invite was used or revoked before"))
        }
    }

    /// Checks the proof, uses the invite once, and certifies the machine's key.
    ///
    /// The invite is the credential here: no caller is known yet.
    pub async fn enrol(&self, e: Enrolment) -> Result<Node> {
        const REFUSED: &str = "invite_refused";
        audit::asked(Action::NodeEnrol);
        audit::about(e.invite);
        let now = self.clock.now_ms();
        let refuse = |why: &str| Error::Invalid { code: REFUSED, detail: why.to_owned() };
        let invite = self.store.invite(e.invite).await?.ok_or_else(|| refuse("this hub made no such invite"))?;
        let spki = sha256(&e.spki_der);
        let signed = enrol::proof_bytes(self.hub, e.invite, &e.exporter, &spki, &e.nonce);
        seal::verify_by(&invite.public_key, &signed, &e.proof)
            .map_err(|_| refuse("the proof does not match: the invite file was altered, or this is another channel"))?;
        let id = NodeId::from_parts(now, entropy::bytes());
        let not_after = now + self.lifetimes.certificate_ms;
        let der = self.keyring.issue_certificate(id, &e.spki_der, now, not_after, &e.roots)?;
        let suggested = Some(e.suggested_name.trim().to_owned()).filter(|n| name::check(n).is_ok());
        let node = Node {
            id,
            name: invite.name.clone().or(suggested).unwrap_or_else(|| "node".into()),
            owner: invite.owner,
            labels: invite.labels.clone(),
            slots: None,
            task_limit: None,
            draining: false,
            epoch: 0,
            max_tasks: e.capabilities.cpu_cores.clamp(1, 1024),
            version: e.version.chars().take(64).collect(),
            capabilities: e.capabilities.bounded(),
            created_at: now,
            last_seen_at: None,
            generation: 0,
            certificate: NodeCertificate { spki, der, not_after, counter: 0 },
            revoked_at: None,
            notices: vec![],
            bundle_seq: 0,
        };
        audit::detail("name", &node.name);
        audit::detail("invite", e.invite);
        audit::about(node.id);
        match self.store.claim_invite(e.invite, &node, now, SAME_ANSWER_MS).await? {
            Claim::Claimed => {
                tracing::info!(node = %node.id, name = %node.name, invite = %e.invite, "a machine enrolled");
                self.events.enrolled(&node);
                Ok(node)
            }
            Claim::Again { node } if node.revoked_at.is_some() => Err(refuse("the node of this invite was revoked")),
            Claim::Again { node } => Ok(*node),
            Claim::Removed => Err(refuse("the node of this invite was removed")),
            Claim::Expired => Err(refuse("the invite has expired; ask for a new one")),
            Claim::Revoked => Err(refuse("the invite was revoked")),
            Claim::Used => {
                tracing::warn!(invite = %e.invite, "a used invite came again with another key");
                Err(refuse("the invite was used before; if that was not you, tell the hub's owner"))
            }
            Claim::Unknown => Err(refuse("this hub made no such invite")),
        }
    }

    /// A fresh certificate for the same key, in band. The same counter and key again: the same one.
    pub async fn renew(&self, caller: &Caller, spki_der: &[u8], counter: u64, roots: &[Digest]) -> Result<NodeCertificate> {
        audit::doing(caller, Action::NodeRenew);
        let node = self.of_link(caller).await?;
        if sha256(spki_der) != node.certificate.spki {
            return Err(Error::Forbidden("a renewal keeps the node's key".into()));
        }
        let (fresh, made) = self.next_certificate(&node, spki_der, counter, roots).await?;
        if made {
            self.events.node(&node, NodeNews::Renewed { not_after: fresh.not_after });
        }
        Ok(fresh)
    }

    /// A fresh certificate for a node whose last one has ended: the machine slept, or the hub was away.
    /// Its key is the credential: no caller is known. The same counter again: the same certificate.
    pub async fn recover(&self, r: Recovery) -> Result<NodeCertificate> {
        audit::asked(Action::NodeRecover);
        audit::about(r.node);
        const NO_PROOF: Error = Error::Unauthenticated("the proof does not match: it is by another key, or for another channel");
        let spki = sha256(&r.spki_der);
        let signed = enrol::recover_bytes(self.hub, r.node, &r.exporter, &spki, r.counter, &r.nonce);
        let key = seal::ed25519_of(&r.spki_der).ok_or(NO_PROOF)?;
        seal::verify_by(&key, &signed, &r.proof).map_err(|_| NO_PROOF)?;
        let node = self.authenticate(r.node, &spki).await?;
        let now = self.clock.now_ms();
        if node.certificate.not_after.saturating_add(RECOVER_MS) < now {
            let detail = "the certificate of this node ended more than 30 days ago; join anew with a fresh invite";
            return Err(Error::conflict("recover_too_late", detail));
        }
        if !self.recoveries.admit(node.id, self.clock.steady()) {
            let detail = "this node has recovered too often; try again in some minutes".to_owned();
            return Err(Error::Unavailable { code: "recover_too_often", detail });
        }
        let ended = node.certificate.not_after;
        let (fresh, made) = self.next_certificate(&node, &r.spki_der, r.counter, &r.roots).await?;
        if made {
            tracing::info!(node = %node.id, name = %node.name, counter = r.counter, ended, "a node whose certificate had ended has a new one");
            self.events.node(&node, NodeNews::Recovered { not_after: fresh.not_after });
        }
        Ok(fresh)
    }

    /// The certificate that this counter names, and whether it was made just now.
    async fn next_certificate(&self, node: &Node, spki_der: &[u8], counter: u64, roots: &[Digest]) -> Result<(NodeCertificate, bool)> {
        let mut counter = counter;
        if counter == node.certificate.counter && counter > 0 {
            if self.keyring.counts(&node.certificate.der) {
                return Ok((node.certificate.clone(), false));
            }
            // Its root was retired since: the same answer would help nobody.
            counter += 1;
        }
        // One above, or some more: a restored hub has forgotten renewals, and a copy of a node is always behind.
        let behind = node.certificate.counter;
        if counter <= behind || counter - behind > MAX_FORGOTTEN {
            return Err(Error::conflict("stale_counter", "this renewal counter was used before: is there a copy of this node?"));
        }
        let now = self.clock.now_ms();
        let not_after = now + self.lifetimes.certificate_ms;
        let der = self.keyring.issue_certificate(node.id, spki_der, now, not_after, roots)?;
        let fresh = NodeCertificate { spki: node.certificate.spki, der, not_after, counter };
        let mut taken = true;
        for counter in behind + 1..=counter {
            taken = taken && self.store.renew(node.id, &NodeCertificate { counter, ..fresh.clone() }).await?;
        }
        if taken {
            Ok((fresh, true))
        } else {
            // Revoked at this very moment, or another one was faster.
            self.authenticate(node.id, &node.certificate.spki).await?;
            Err(Error::conflict("stale_counter", "another renewal came first"))
        }
    }

    /// The node behind a certificate, if it may speak.
    pub async fn authenticate(&self, id: NodeId, spki: &mesh_core::Digest) -> Result<Node> {
        let Some(node) = self.store.node(id).await? else {
            // A node that is told so ends for good: only one that is known to have been removed.
            let removed = self.store.was_removed(id).await?;
            return Err(if removed { revoked() } else { Error::Unauthenticated("this node is not registered here") });
        };
        if node.certificate.spki != *spki {
            return Err(Error::Unauthenticated("the certificate is not for this node's key"));
        }
        if node.revoked_at.is_some() {
            return Err(revoked());
        }
        Ok(node)
    }

    pub async fn register(&self, caller: &Caller, version: &str, capabilities: Capabilities) -> Result<Node> {
        let node = self.of_link(caller).await?;
        let version: String = version.chars().take(64).collect();
        self.store.register(node.id, &version, &capabilities.bounded()).await?;
        self.events.registered(&node, version);
        Ok(node)
    }

    /// Notes the trust bundle that a node says it has.
    pub async fn has_bundle(&self, caller: &Caller, seq: u64) -> Result<()> {
        let Caller::Node { node, .. } = caller else {
            return Err(Error::Forbidden("only a node does this".into()));
        };
        Ok(self.store.note_bundle(*node, seq.min(i64::MAX as u64)).await?)
    }

    async fn of_link(&self, caller: &Caller) -> Result<Node> {
        let Caller::Node { node, .. } = caller else {
            return Err(Error::Forbidden("only a node does this".into()));
        };
        self.store.node(*node).await?.filter(|n| n.revoked_at.is_none()).ok_or_else(revoked)
    }

    /// The nodes that fit, newest first. With a selector the registry is read on until the page is full.
    pub async fn list(&self, caller: &Caller, select: Option<&Selector>, window: Window<NodeId>) -> Result<Vec<Node>> {
        let within = visible(caller, Permission::NodesRead)?;
        let within = within.as_ref();
        let Some(select) = select else { return Ok(self.store.nodes(within, window).await?) };
        let mut found = vec![];
        let mut next = Window { before: window.before, limit: NODES_AT_ONCE };
        loop {
            let nodes = self.store.nodes(within, next).await?;
            let last = nodes.last().filter(|_| nodes.len() == NODES_AT_ONCE as usize).map(|n| n.id);
            found.extend(nodes.into_iter().filter(|n| select.fits(&n.offers())));
            if last.is_none() || found.len() >= window.limit as usize {
                found.truncate(window.limit as usize);
                return Ok(found);
            }
            next.before = last;
        }
    }

    pub async fn get(&self, caller: &Caller, id: NodeId) -> Result<Node> {
        let node = self.store.node(id).await?.ok_or(Error::NotFound("node"))?;
        authorize(caller, Permission::NodesRead, node.thing(), Permission::NodesRead, "node")?;
        Ok(node)
    }

    /// Finds a node to use for `permission` by id or by a name that fits exactly one that the caller may see or use.
    pub async fn find(&self, caller: &Caller, id_or_name: &str, permission: Permission) -> Result<Node> {
        let permitted = |n: &Node| authorize(caller, permission, n.thing(), Permission::NodesRead, "node");
        let named = match id_or_name.parse() {
            Ok(id) => self.store.node(id).await?.into_iter().collect(),
            Err(_) => self.store.nodes_named(id_or_name).await?.into_iter().filter(|n| n.revoked_at.is_none()).collect::<Vec<_>>(),
        };
        let mut seen: Vec<Node> = named.into_iter().filter(|n| !matches!(permitted(n), Err(Error::NotFound(_)))).collect();
        match seen.len() {
            0 => Err(Error::NotFound("node")),
            1 => permitted(&seen[0]).map(|()| seen.remove(0)),
            n => Err(Error::invalid("ambiguous_name", format!("{n} nodes are called {id_or_name:?}; use the id"))),
        }
    }

    /// The one of these nodes that an id, or a name that no other of them has, means.
    pub(crate) async fn among(&self, nodes: &[NodeId], id_or_name: &str) -> Result<Option<Node>> {
        if let Ok(id) = id_or_name.parse() {
            return if nodes.contains(&id) { Ok(self.store.node(id).await?) } else { Ok(None) };
        }
        let mut named = self.store.nodes_named(id_or_name).await?;
        named.retain(|n| nodes.contains(&n.id));
        Ok(if named.len() == 1 { named.pop() } else { None })
    }

    /// The skills of all nodes that the caller may see and that are not revoked.
    pub async fn skills(&self, caller: &Caller) -> Result<BTreeMap<String, Skill>> {
        let within = visible(caller, Permission::NodesRead)?;
        let within = within.as_ref();
        let mut skills: BTreeMap<String, Skill> = BTreeMap::new();
        let mut window = Window { before: None, limit: NODES_AT_ONCE };
        loop {
            let nodes = self.store.nodes(within, window).await?;
            for n in nodes.iter().filter(|n| n.revoked_at.is_none()) {
                let online = self.links.get(n.id).is_some();
                for (name, version) in &n.capabilities.skills {
                    let s = skills.entry(name.clone()).or_default();
                    *s.versions.entry(version.clone()).or_default() += 1;
                    s.online += u32::from(online);
                }
            }
            match nodes.last() {
                Some(last) if nodes.len() == NODES_AT_ONCE as usize => window.before = Some(last.id),
                _ => return Ok(skills),
            }
        }
    }

    pub fn standing(&self, node: &Node) -> Standing {
        let (link, running) = self.links.look(node.id);
        let (status, unschedulable) = match (&node.revoked_at, &link) {
            (Some(_), _) => ("revoked", Some("revoked")),
            (None, None) if self.links.copies().holds(node.id) => ("offline", Some("superseded")),
            (None, None) => ("offline", Some("offline")),
            (None, Some(l)) => (if l.draining { "draining" } else { "online" }, l.refuses(running)),
        };
        Standing {
            status,
            unschedulable,
            running,
            max_tasks: link.as_ref().map_or_else(|| node.takes_at_once(node.max_tasks), |l| l.max_tasks),
            health: link.as_ref().and_then(|l| l.health),
            rtt_ms: link.and_then(|l| l.rtt).map(|d| d.as_secs_f64() * 1000.0),
        }
    }

    pub fn report_health(&self, caller: &Caller, health: Health) -> Result<()> {
        let Caller::Node { node, .. } = caller else {
            return Err(Error::Forbidden("only a node does this".into()));
        };
        self.links.set_health(*node, health);
        if let Some(link) = self.links.get(*node) {
            self.history.note(*node, self.clock.anchored_ms(), &health, link.rtt);
            self.events.health(&link, health);
        }
        Ok(())
    }

    /// Samples of the last hour of a node that the caller has been shown, oldest first.
    pub fn samples(&self, node: &Node) -> Vec<Sample> {
        self.history.of(node.id, self.clock.anchored_ms())
    }

    /// Notes when the live nodes were last seen, in one write; a reconciler calls it.
    pub async fn note_seen(&self) -> Result<()> {
        self.history.prune(self.clock.anchored_ms());
        let ids: Vec<NodeId> = self.links.all().iter().map(|l| l.node).collect();
        if ids.is_empty() {
            return Ok(());
        }
        let now: UnixMs = self.clock.now_ms();
        Ok(self.store.seen(&ids, now).await?)
    }
}

/// What a node hears that is not (or no longer) one of this hub's. Its first word is what it goes by.
pub fn revoked() -> Error {
    Error::Forbidden("revoked: its owner or an admin revoked or removed it".into())
}

pub(crate) fn check_labels(labels: &BTreeMap<String, String>) -> Result<()> {
    if labels.len() > MAX_LABELS {
        return Err(Error::invalid("bad_label", format!("a node has at most {MAX_LABELS} labels")));
    }
    for (k, v) in labels {
        for text in [k, v] {
            name::check(text).map_err(|e| Error::invalid("bad_label", format!("label {k:?}: {e}")))?;
        }
        if k.contains(['=', ',']) || v.contains(',') {
            return Err(Error::invalid("bad_label", format!("label {k:?} holds '=' or ',', which selectors use")));
        }
        if HUB_LABELS.contains(&k.as_str()) {
            return Err(Error::invalid("bad_label", format!("the hub sets the label {k:?} from the machine itself")));
        }
    }
    Ok(())
}

//! What was granted to somebody, as it is now: grants by label become the nodes that have these labels.

use crate::error::Result;
use crate::ports::{Grants, NodeDirectory, Window};
use crate::records::{GrantFilter, Resource, Subject};
use mesh_core::permission::{Granted, Permission, Permissions, Reach, Role};
use mesh_core::{NodeId, UserId};
use mesh_process::SharedClock;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::Semaphore;

/// Grants that one user, or one role, may have.
pub const MAX_GRANTS: u32 = 1000;
/// A user's, their role's, and some that were made at the same moment.
const READ_AT_MOST: u32 = 3 * MAX_GRANTS;
/// The labels of all nodes are good for so long. What people change counts at once; a machine that joins,
/// or tells of other runtimes, changes them too.
const LABELS_FOR: Duration = Duration::from_secs(3);
/// Nodes that one read of the registry brings.
const NODES_AT_ONCE: u32 = 500;

pub struct Rights {
    grants: Arc<dyn Grants>,
    nodes: Arc<dyn NodeDirectory>,
    clock: SharedClock,
    known: Mutex<Option<Arc<Labelled>>>,
    /// One reads the registry, and the others wait for what it finds.
    reading: Semaphore,
}

/// The labels of all nodes, as selectors see them.
struct Labelled {
    epoch: u64,
    at: Duration,
    nodes: Vec<(NodeId, BTreeMap<String, String>)>,
}

impl Rights {
    pub fn new(grants: Arc<dyn Grants>, nodes: Arc<dyn NodeDirectory>, clock: SharedClock) -> Self {
        Self { grants, nodes, clock, known: Mutex::default(), reading: Semaphore::new(1) }
    }

    /// What was granted to a user and to their role.
    pub async fn of(&self, user: UserId, role: Role) -> Result<Arc<Granted>> {
        // Nothing is added to what an admin or a viewer may do.
        if !Permission::ALL.iter().any(|p| matches!(role.reach(*p), Reach::Granted | Reach::OwnAndGranted)) {
            return Ok(Arc::default());
        }
        let filter = GrantFilter { made_by: None, to: vec![Subject::User(user), Subject::Role(role)] };
        let window = Window { before: None, limit: READ_AT_MOST };
        let mut granted = Granted::default();
        let mut by_label: BTreeMap<BTreeMap<String, String>, Permissions> = BTreeMap::new();
        for grant in self.grants.grants(Some(&filter), self.clock.now_ms(), window).await? {
            let given = match grant.resource {
                Resource::Node(id) => granted.nodes.entry(id).or_default(),
                Resource::Session(id) => granted.sessions.entry(id).or_default(),
                Resource::Agent(name) => granted.agents.entry(name).or_default(),
                Resource::Labels(labels) => by_label.entry(labels).or_default(),
            };
            given.add(grant.permissions);
        }
        if !by_label.is_empty() {
            for (id, labels) in &self.labelled().await?.nodes {
                let fit = |wanted: &BTreeMap<String, String>| wanted.iter().all(|(key, value)| labels.get(key) == Some(value));
                for (_, permissions) in by_label.iter().filter(|(wanted, _)| fit(wanted)) {
                    granted.nodes.entry(*id).or_default().add(*permissions);
                }
            }
        }
        Ok(Arc::new(granted))
    }

    async fn labelled(&self) -> Result<Arc<Labelled>> {
        let epoch = self.nodes.registry_epoch().await?;
        if let Some(known) = self.known(epoch) {
            return Ok(known);
        }
        let _alone = self.reading.acquire().await;
        if let Some(known) = self.known(epoch) {
            return Ok(known);
        }
        // First: what is changed while the rest is read is read again.
        let epoch = self.nodes.registry_epoch().await?;
        let at = self.clock.steady();
        let mut nodes = vec![];
        let mut window = Window { before: None, limit: NODES_AT_ONCE };
        loop {
            let page = self.nodes.nodes(None, window).await?;
            window.before = page.last().map(|n| n.id);
            let full = page.len() == NODES_AT_ONCE as usize;
            nodes.extend(page.iter().filter(|n| n.revoked_at.is_none()).map(|n| (n.id, n.all_labels())));
            if !full {
                break;
            }
        }
        let read = Arc::new(Labelled { epoch, at, nodes });
        *self.known.lock().unwrap_or_else(PoisonError::into_inner) = Some(read.clone());
        Ok(read)
    }
    fn known(&self, epoch: u64) -> Option<Arc<Labelled>> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner).clone();
        known.filter(|l| l.epoch >= epoch && self.clock.steady().saturating_sub(l.at) < LABELS_FOR)
    }
}

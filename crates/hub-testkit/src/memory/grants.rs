//! What was granted.

use super::*;

fn lives(grant: &Grant, now: UnixMs) -> bool {
    grant.expires_at.is_none_or(|end| end > now)
}

impl State {
    pub(super) fn add_grant(&mut self, grant: &Grant) -> Stored<()> {
        let there = match &grant.resource {
            Resource::Node(id) => self.nodes.contains_key(id),
            Resource::Session(id) => self.sessions.get(id).is_some_and(|s| s.purged_at.is_none()),
            Resource::Agent(agent) => self.name_owner(agent).is_some(),
            Resource::Labels(_) => true,
        };
        if !there {
            return Err(StoreError::new("grants.add_grant", "what it is on is not there any more"));
        }
        self.grants.retain(|_, g| g.subject != grant.subject || lives(g, grant.created_at));
        add(&mut self.grants, "grants.add_grant", grant.id, grant.clone())
    }
}

#[async_trait]
impl Grants for MemoryStore {
    async fn add_grant(&self, grant: &Grant) -> Stored<()> {
        self.state().add_grant(grant)
    }
    async fn grant(&self, id: GrantId, now: UnixMs) -> Stored<Option<Grant>> {
        Ok(self.state().grants.get(&id).filter(|g| lives(g, now)).cloned())
    }
    async fn grants(&self, filter: Option<&GrantFilter>, now: UnixMs, window: Window<GrantId>) -> Stored<Vec<Grant>> {
        Ok(page(&self.state().grants, window, |g| lives(g, now) && filter.is_none_or(|f| f.has(g))))
    }
    async fn remove_grant(&self, id: GrantId) -> Stored<bool> {
        Ok(self.state().grants.remove(&id).is_some())
    }
}

//! State: what agents keep, by agent and key. An agent is any name; it belongs to who wrote its first key.

use crate::access::{authorize, authorize_own, visible};
use crate::audit::{self, Action, Resource};
use crate::error::{Error, Result};
use crate::memory::check_value;
use crate::messages::MAX_PAGE_BYTES;
use crate::ports::{self, Window};
use crate::records::{Part, StateEntry, StateFilter, StateWritten};
use mesh_core::permission::{Caller, Permission, Thing};
use mesh_core::{EntryId, UserId, name};
use mesh_process::{SharedClock, entropy};
use std::sync::Arc;

/// Keys that an agent may have.
pub const MAX_KEYS: u32 = 10_000;
/// How often a write looks again at whose an agent is, when that changed under it.
const LOOKS: usize = 4;

pub struct State {
    pub store: Arc<dyn ports::AgentState>,
    pub clock: SharedClock,
}

impl State {
    /// Adds the entry or sets its value, which is JSON.
    pub async fn put(&self, caller: &Caller, agent: &str, key: &str, value: Vec<u8>) -> Result<StateEntry> {
        audit::doing(caller, Action::StatePut);
        audit::about(Resource::new("agent", agent));
        audit::detail("key", key);
        let user = authorize_own(caller, Permission::AgentsManage)?;
        name::check(agent).map_err(|e| Error::invalid("bad_name", e))?;
        name::check_key(key).map_err(|e| Error::invalid("bad_key", e))?;
        check_value(&value)?;
        for _ in 0..LOOKS {
            let owner = match self.store.state_owner(agent).await? {
                Some(owner) => self.manage(caller, owner, agent).map(|()| owner)?,
                None => user,
            };
            let now = self.clock.now_ms();
            let id = EntryId::from_parts(now, entropy::bytes());
            let entry = StateEntry { id, agent: agent.to_owned(), key: key.to_owned(), owner, value: value.clone(), updated_at: now };
            match self.store.put_state(&entry, MAX_KEYS).await? {
                StateWritten::Done => return Ok(entry),
                StateWritten::Full => {
                    return Err(Error::conflict("state_full", format!("an agent has at most {MAX_KEYS} keys; remove one first")));
                }
                // Its last key went, or its first came, between the two.
                StateWritten::Foreign => {}
            }
        }
        Err(Error::conflict("state_contended", "others write and remove this agent's keys at the same time; try again"))
    }

    pub async fn get(&self, caller: &Caller, agent: &str, key: &str) -> Result<StateEntry> {
        let entry = self.known(caller, agent, key).await?;
        authorize(caller, Permission::AgentsRead, (entry.owner, Thing::Agent(&entry.agent)), Permission::AgentsRead, "key")?;
        Ok(entry)
    }

    /// Entries with exactly this agent and key, where they are given; newest first.
    pub async fn list(
        &self,
        caller: &Caller,
        agent: Option<String>,
        key: Option<String>,
        window: Window<EntryId>,
    ) -> Result<Part<StateEntry>> {
        let within = visible(caller, Permission::AgentsRead)?;
        let cannot_be =
            agent.as_deref().is_some_and(|a| name::check(a).is_err()) || key.as_deref().is_some_and(|k| name::check_key(k).is_err());
        if cannot_be {
            return Ok(Part { items: vec![], more: false });
        }
        Ok(self.store.states(&StateFilter { within, agent, key }, window, MAX_PAGE_BYTES).await?)
    }

    pub async fn remove(&self, caller: &Caller, agent: &str, key: &str) -> Result<()> {
        audit::doing(caller, Action::StateRemove);
        audit::about(Resource::new("agent", agent));
        audit::detail("key", key);
        let entry = self.known(caller, agent, key).await?;
        self.manage(caller, entry.owner, agent)?;
        if self.store.remove_state(agent, key, entry.owner).await? { Ok(()) } else { Err(Error::NotFound("key")) }
    }

    async fn known(&self, caller: &Caller, agent: &str, key: &str) -> Result<StateEntry> {
        // Who may read nothing at all hears that, and not what there is.
        visible(caller, Permission::AgentsRead).or_else(|e| visible(caller, Permission::AgentsManage).map_err(|_| e))?;
        if name::check(agent).is_err() || name::check_key(key).is_err() {
            return Err(Error::NotFound("key"));
        }
        self.store.state(agent, key).await?.ok_or(Error::NotFound("key"))
    }

    fn manage(&self, caller: &Caller, owner: UserId, agent: &str) -> Result<()> {
        authorize(caller, Permission::AgentsManage, (owner, Thing::Agent(agent)), Permission::AgentsRead, "agent")
    }
}

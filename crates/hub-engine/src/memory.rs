//! What a session remembers, by key.

use crate::audit::{self, Action};
use crate::error::{Error, Result};
use crate::ports::{self, Window};
use crate::records::{MemoryEntry, MemoryKey, Written};
use crate::sessions::{Sessions, ended};
use mesh_core::permission::{Caller, Permission};
use mesh_core::{EntryId, SessionId, name};
use mesh_process::{SharedClock, entropy};
use std::sync::Arc;

/// The longest value, as JSON.
pub const MAX_VALUE_BYTES: usize = 256 << 10;
/// Keys that a session may have.
pub const MAX_KEYS: u32 = 1000;

pub struct Memory {
    pub store: Arc<dyn ports::Memory>,
    pub sessions: Arc<Sessions>,
    pub clock: SharedClock,
}

impl Memory {
    /// Adds the entry or sets its value, which is JSON.
    pub async fn put(&self, caller: &Caller, session: SessionId, key: &str, value: Vec<u8>) -> Result<MemoryEntry> {
        audit::doing(caller, Action::MemoryPut);
        audit::about(session);
        audit::detail("key", key);
        self.sessions.active(caller, session, Permission::SessionsWrite).await?;
        name::check_key(key).map_err(|e| Error::invalid("bad_key", e))?;
        check_value(&value)?;
        let now = self.clock.now_ms();
        let entry = MemoryEntry { id: EntryId::from_parts(now, entropy::bytes()), session, key: key.to_owned(), value, updated_at: now };
        match self.store.put_memory(&entry, caller.user(), MAX_KEYS).await? {
            Written::Done | Written::Absent => Ok(entry),
            Written::Full => Err(Error::conflict("memory_full", format!("a session has at most {MAX_KEYS} keys; remove one first"))),
            Written::Ended => Err(ended()),
        }
    }

    pub async fn get(&self, caller: &Caller, session: SessionId, key: &str) -> Result<MemoryEntry> {
        self.sessions.get(caller, session).await?;
        // A key that cannot be written is as absent as an unknown one.
        name::check_key(key).map_err(|_| Error::NotFound("key"))?;
        self.store.memory(session, key).await?.ok_or(Error::NotFound("key"))
    }

    pub async fn keys(&self, caller: &Caller, session: SessionId, window: Window<EntryId>) -> Result<Vec<MemoryKey>> {
        self.sessions.get(caller, session).await?;
        Ok(self.store.memory_keys(session, window).await?)
    }

    pub async fn remove(&self, caller: &Caller, session: SessionId, key: &str) -> Result<()> {
        audit::doing(caller, Action::MemoryRemove);
        audit::about(session);
        audit::detail("key", key);
        self.sessions.active(caller, session, Permission::SessionsWrite).await?;
        name::check_key(key).map_err(|_| Error::NotFound("key"))?;
        match self.store.remove_memory(session, key, caller.user(), self.clock.now_ms()).await? {
            Written::Done | Written::Full => Ok(()),
            Written::Absent => Err(Error::NotFound("key")),
            Written::Ended => Err(ended()),
        }
    }
}

/// Bounds a value of a session's memory or an agent's state.
pub(crate) fn check_value(value: &[u8]) -> Result<()> {
    if value.len() > MAX_VALUE_BYTES {
        let detail = format!("a value has at most {MAX_VALUE_BYTES} bytes as JSON, not {}", value.len());
        return Err(Error::invalid("value_too_large", detail));
    }
    Ok(())
}

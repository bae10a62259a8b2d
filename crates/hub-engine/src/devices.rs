//! Devices: the log-ins of a person, as they see them. Trust is a mark for the person; it gives no right.

use crate::accounts::Accounts;
use crate::audit::{self, Action};
use crate::error::{Error, Result};
use crate::ports::Window;
use crate::records::{Device, DeviceChange};
use mesh_core::name::{self, MAX_CHARS, is_deceptive};
use mesh_core::permission::Caller;
use mesh_core::{DeviceId, UnixMs, UserId};
use std::net::IpAddr;

/// Of what a program calls itself.
const MAX_USER_AGENT_CHARS: usize = 120;
const UNNAMED: &str = "unnamed";

/// What is known of a log-in besides who it is.
#[derive(Debug, Clone, Default)]
pub struct LoginFrom {
    /// As the person's program calls the machine.
    pub name: Option<String>,
    pub user_agent: Option<String>,
    /// None: this machine, by the control socket.
    pub address: Option<IpAddr>,
}

impl LoginFrom {
    pub(crate) fn device(self, id: DeviceId, user: UserId, now: UnixMs) -> Device {
        let user_agent = self.user_agent.and_then(|text| shortened(&text, MAX_USER_AGENT_CHARS));
        let called = user_agent.as_deref().and_then(|text| shortened(text, MAX_CHARS));
        let name = self.name.and_then(|text| shortened(&text, MAX_CHARS)).or(called).unwrap_or_else(|| UNNAMED.into());
        Device { id, user, name, user_agent, first_address: self.address, address: self.address, last_seen_at: now, trusted: None }
    }
}

/// What is harmless to show of it, if anything is.
fn shortened(text: &str, most: usize) -> Option<String> {
    let kept: String = text.chars().filter(|c| !is_deceptive(*c)).take(most).collect();
    let kept = kept.trim();
    (!kept.is_empty()).then(|| kept.to_owned())
}

impl Accounts {
    /// The caller's own, newest first.
    pub async fn devices(&self, caller: &Caller, window: Window<DeviceId>) -> Result<Vec<Device>> {
        Ok(self.store.devices(person(caller)?, self.clock.now_ms(), window).await?)
    }

    pub async fn change_device(&self, caller: &Caller, id: DeviceId, change: DeviceChange) -> Result<Device> {
        audit::doing(caller, Action::DeviceChange);
        audit::about(id);
        self.own_device(caller, id).await?;
        if let Some(label) = &change.name {
            name::check(label).map_err(|e| Error::invalid("bad_name", e))?;
        }
        self.store.change_device(id, &change).await?;
        self.own_device(caller, id).await
    }

    /// Ends the log-in: its tokens count no more, and what streams to it ends.
    pub async fn remove_device(&self, caller: &Caller, id: DeviceId) -> Result<()> {
        audit::doing(caller, Action::DeviceRemove);
        audit::about(id);
        self.own_device(caller, id).await?;
        self.end_login(id.into()).await
    }

    async fn own_device(&self, caller: &Caller, id: DeviceId) -> Result<Device> {
        let owner = person(caller)?;
        let device = self.store.device(id, self.clock.now_ms()).await?;
        device.filter(|d| d.user == owner).ok_or(Error::NotFound("device"))
    }
}

fn person(caller: &Caller) -> Result<UserId> {
    caller.in_person().ok_or_else(|| Error::Forbidden("a key has nothing to do with devices; log in as the person".into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_program_says_of_itself_is_cut_and_cleaned() {
        let (id, user) = (DeviceId::from_bytes([1; 16]), UserId::from_bytes([2; 16]));
        let named = |name: Option<&str>, agent: Option<&str>| {
            let from = LoginFrom { name: name.map(Into::into), user_agent: agent.map(Into::into), address: None };
            let device = from.device(id, user, 5);
            (device.name, device.user_agent)
        };
        assert_eq!(named(Some(" desk "), Some("curl/8.5")), ("desk".into(), Some("curl/8.5".into())));
        assert_eq!(named(None, Some("curl/8.5")), ("curl/8.5".into(), Some("curl/8.5".into())));
        assert_eq!(named(Some("\u{1b}[31m\u{202e}x"), None), ("[31mx".into(), None));
        assert_eq!(named(Some("\n \t"), Some("  ")), (UNNAMED.into(), None));
        let (name, agent) = named(None, Some(&"é".repeat(5000)));
        assert_eq!((name.chars().count(), agent.unwrap().chars().count()), (MAX_CHARS, MAX_USER_AGENT_CHARS));
    }
}

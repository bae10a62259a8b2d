//! Messages in a session: what people, assistants and tools said.

use crate::audit::{self, Action};
use crate::error::{Error, Result};
use crate::events::SessionNews;
use crate::ports::{self, Window};
use crate::records::{Message, MessageRole, Part};
use crate::sessions::{Sessions, ended};
use mesh_core::permission::{Caller, Permission};
use mesh_core::{MessageId, SessionId};
use mesh_process::{SharedClock, entropy};
use std::sync::Arc;

/// The longest content.
pub const MAX_CONTENT_BYTES: usize = 1 << 20;
/// Content, or values of state, that one page of a list may bring.
pub const MAX_PAGE_BYTES: u64 = 8 << 20;

pub struct Messages {
    pub store: Arc<dyn ports::Messages>,
    pub sessions: Arc<Sessions>,
    pub clock: SharedClock,
}

impl Messages {
    pub async fn post(&self, caller: &Caller, session: SessionId, role: &str, content: String) -> Result<Message> {
        audit::doing(caller, Action::MessagePost);
        audit::about(session);
        let of = self.sessions.active(caller, session, Permission::SessionsWrite).await?;
        let role = MessageRole::parse(role).ok_or_else(|| {
            let roles = MessageRole::ALL.map(MessageRole::as_str).join(", ");
            Error::invalid("bad_role", format!("a message's role is one of {roles}"))
        })?;
        if content.len() > MAX_CONTENT_BYTES {
            let detail = format!("a message has at most {MAX_CONTENT_BYTES} bytes, not {}", content.len());
            return Err(Error::invalid("content_too_large", detail));
        }
        let now = self.clock.now_ms();
        let message = Message { id: MessageId::from_parts(now, entropy::bytes()), session, role, content, created_at: now };
        let message = self.store.add_message(&message, caller.user()).await?.ok_or_else(ended)?;
        self.sessions.events.session(of.id, of.owner, SessionNews::Message { id: message.id, role });
        Ok(message)
    }

    /// Newest first.
    pub async fn list(&self, caller: &Caller, session: SessionId, window: Window<MessageId>) -> Result<Part<Message>> {
        self.sessions.get(caller, session).await?;
        Ok(self.store.messages(session, window, MAX_PAGE_BYTES).await?)
    }
}

//! Sessions: working contexts with attached nodes.

use crate::access::{authorize, authorize_own, visible};
use crate::audit::{self, Action};
use crate::error::{Error, Result};
use crate::events::{Events, SessionNews};
use crate::idempotency::{self, Keyed};
use crate::nodes::Nodes;
use crate::pool::Pool;
use crate::ports::{self, Creation, Window};
use crate::records::{Activity, Place, Session, SessionChange};
use mesh_core::permission::{Caller, Permission};
use mesh_core::{NodeId, SessionId, name};
use mesh_process::{SharedClock, entropy};
use std::sync::Arc;

const MAX_SESSION_SECS: u64 = 30 * 24 * 3600;

pub struct Sessions {
    pub store: Arc<dyn ports::Sessions>,
    pub nodes: Arc<Nodes>,
    /// Whose waiting tasks a change of nodes may let go, or hold.
    pub pool: Arc<Pool>,
    pub events: Events,
    pub clock: SharedClock,
    pub session_hours: u64,
}

impl Sessions {
    /// Under a key that has made a session before, that one.
    pub async fn create(&self, caller: &Caller, label: &str, ttl_secs: Option<u64>, keyed: Option<Keyed>) -> Result<Session> {
        audit::doing(caller, Action::SessionCreate);
        let owner = authorize_own(caller, Permission::SessionsWrite)?;
        if let Some(made) = idempotency::before(keyed.as_ref()).await? {
            return self.permitted(caller, made, Permission::SessionsWrite).await;
        }
        name::check(label).map_err(|e| Error::invalid("bad_name", e))?;
        let ttl_ms = ttl_ms(ttl_secs.unwrap_or(self.session_hours * 3600))?;
        let now = self.clock.now_ms();
        let session = Session {
            id: SessionId::from_parts(now, entropy::bytes()),
            owner,
            name: label.to_owned(),
            created_at: now,
            expires_at: now + ttl_ms,
            ttl_ms,
            closed_at: None,
            expired_at: None,
            purged_at: None,
            device: caller.as_person().and_then(|p| p.via.device),
            nodes: vec![],
        };
        audit::about(session.id);
        audit::detail("name", label);
        match keyed {
            None => self.store.add_session(&session).await?,
            Some(k) => {
                if let Some(made) = k.create(Creation::Session(session.clone())).await? {
                    return self.permitted(caller, made, Permission::SessionsWrite).await;
                }
            }
        }
        self.events.session(session.id, session.owner, SessionNews::Created { name: session.name.clone() });
        Ok(session)
    }

    pub async fn list(&self, caller: &Caller, window: Window<SessionId>) -> Result<Vec<Session>> {
        let within = visible(caller, Permission::SessionsRead)?;
        Ok(self.store.sessions(within.as_ref(), window).await?)
    }

    pub async fn get(&self, caller: &Caller, id: SessionId) -> Result<Session> {
        self.permitted(caller, id, Permission::SessionsRead).await
    }

    /// An active session that the caller may use for `permission`.
    pub async fn active(&self, caller: &Caller, id: SessionId, permission: Permission) -> Result<Session> {
        let session = self.permitted(caller, id, permission).await?;
        if session.is_active() { Ok(session) } else { Err(ended()) }
    }

    /// Sets what `change` has.
    pub async fn change(&self, caller: &Caller, id: SessionId, label: Option<String>, ttl_secs: Option<u64>) -> Result<Session> {
        audit::doing(caller, Action::SessionChange);
        audit::about(id);
        let session = self.active(caller, id, Permission::SessionsWrite).await?;
        if let Some(label) = &label {
            name::check(label).map_err(|e| Error::invalid("bad_name", e))?;
        }
        let change = SessionChange { name: label, ttl_ms: ttl_secs.map(ttl_ms).transpose()? };
        if !self.store.change_session(id, &change, caller.user(), self.clock.now_ms()).await? {
            return Err(ended());
        }
        if let Some(name) = change.name.filter(|n| *n != session.name) {
            self.events.session(session.id, session.owner, SessionNews::Renamed { name });
        }
        self.permitted(caller, id, Permission::SessionsWrite).await
    }

    /// What happened in the session, newest first.
    pub async fn activity(&self, caller: &Caller, id: SessionId, before: Option<Place>, limit: u32) -> Result<Vec<Activity>> {
        self.permitted(caller, id, Permission::SessionsRead).await?;
        Ok(self.store.activity(id, before, limit).await?)
    }

    pub async fn attach(&self, caller: &Caller, id: SessionId, node: &str) -> Result<Session> {
        audit::doing(caller, Action::SessionAttach);
        audit::about(id);
        let session = self.active(caller, id, Permission::SessionsAttach).await?;
        // Attaching lets the session's tasks run there: the right to dispatch on that node is needed.
        let node = self.nodes.find(caller, node, Permission::TasksDispatch).await?;
        audit::detail("node", node.id);
        self.store.attach(id, node.id, caller.user(), self.clock.now_ms()).await?;
        self.pool.attachments_changed(id);
        // Removed meanwhile: either the removal saw the attachment, or it is seen here.
        if self.nodes.store.node(node.id).await?.is_none() {
            self.store.detach(id, node.id, None, self.clock.now_ms()).await?;
            self.pool.attachments_changed(id);
            return Err(Error::NotFound("node"));
        }
        if !session.nodes.contains(&node.id) {
            self.events.session(session.id, session.owner, SessionNews::Attached(node.id));
        }
        self.permitted(caller, id, Permission::SessionsAttach).await
    }

    pub async fn detach(&self, caller: &Caller, id: SessionId, node: NodeId) -> Result<()> {
        audit::doing(caller, Action::SessionDetach);
        audit::about(id);
        audit::detail("node", node);
        let session = self.permitted(caller, id, Permission::SessionsAttach).await?;
        if !self.store.detach(id, node, caller.user(), self.clock.now_ms()).await? {
            return Err(Error::NotFound("attached node"));
        }
        self.pool.attachments_changed(id);
        self.events.session(session.id, session.owner, SessionNews::Detached(node));
        Ok(())
    }

    /// Marks the session closed. Its tasks are ended by [`crate::tasks::TaskService::close_session`].
    pub(crate) async fn close(&self, caller: &Caller, id: SessionId) -> Result<()> {
        let session = self.permitted(caller, id, Permission::SessionsWrite).await?;
        // Closing twice is the same as once.
        if self.store.close_session(id, caller.user(), self.clock.now_ms()).await? {
            self.events.session(session.id, session.owner, SessionNews::Closed);
        }
        Ok(())
    }

    pub(crate) async fn permitted(&self, caller: &Caller, id: SessionId, permission: Permission) -> Result<Session> {
        let session = self.store.session(id).await?.ok_or(Error::NotFound("session"))?;
        authorize(caller, permission, session.thing(), Permission::SessionsRead, "session")?;
        Ok(session)
    }
}

pub(crate) fn ended() -> Error {
    Error::conflict("session_ended", "the session was closed or has expired; make a new one")
}

fn ttl_ms(secs: u64) -> Result<i64> {
    if secs == 0 || secs > MAX_SESSION_SECS {
        return Err(Error::invalid("bad_ttl", format!("ttl_secs is 1 to {MAX_SESSION_SECS}, not {secs}")));
    }
    Ok(secs as i64 * 1000)
}

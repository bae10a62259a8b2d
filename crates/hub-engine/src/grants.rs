//! Grants: what somebody may do with something that is not theirs. Its owner or an admin gives them.

use crate::access::{authorize_own, authorize_owner, missing, reaches_all};
use crate::accounts::Accounts;
use crate::audit::{self, Action};
use crate::error::{Error, Result};
use crate::events::Whose;
use crate::idempotency::{self, Keyed};
use crate::pool::Pool;
use crate::ports::{self, AgentState, Creation, NodeDirectory, Window};
use crate::records::{Grant, GrantFilter, Resource, Subject};
use crate::rights::MAX_GRANTS;
use mesh_core::permission::{Caller, Permission, Permissions, Role, Thing, allows};
use mesh_core::select::MAX_TERMS;
use mesh_core::{GrantId, UnixMs, UserId, name};
use mesh_process::{SharedClock, Tasks, entropy};
use std::collections::BTreeMap;
use std::sync::Arc;

pub struct Grants {
    pub store: Arc<dyn ports::Grants>,
    pub nodes: Arc<dyn NodeDirectory>,
    pub sessions: Arc<dyn ports::Sessions>,
    pub state: Arc<dyn AgentState>,
    pub accounts: Arc<Accounts>,
    /// Whose waiting tasks a grant may let go, or hold.
    pub pool: Arc<Pool>,
    pub clock: SharedClock,
    /// What crosses a commit runs here to its end, whether or not its caller waits.
    pub work: Tasks,
}

/// What a door asks to be granted.
#[derive(Debug, Clone)]
pub struct NewGrant {
    /// The id or name of a user, or a role; a name that is a role's means the role.
    pub subject: String,
    pub resource: On,
    pub permissions: Vec<String>,
    pub expires_at: Option<UnixMs>,
}

#[derive(Debug, Clone)]
pub enum On {
    /// The id of a node or session, or the name of an agent.
    One(String),
    Labels(BTreeMap<String, String>),
}

impl Grants {
    /// Under a key that has made a grant before, that one.
    pub async fn create(self: &Arc<Self>, caller: &Caller, new: NewGrant, keyed: Option<Keyed>) -> Result<Grant> {
        audit::doing(caller, Action::GrantCreate);
        let created_by = caller.user().ok_or_else(|| missing(Permission::SystemAdminister))?;
        let (resource, owner) = self.grantable(caller, new.resource).await?;
        let now = self.clock.now_ms();
        if let Some(made) = idempotency::before(keyed.as_ref()).await? {
            return self.store.grant(made, now).await?.ok_or(Error::NotFound("grant"));
        }
        let permissions = permissions(caller, &new.permissions, &resource, owner)?;
        let subject = self.subject(&new.subject).await?;
        if subject == Subject::User(created_by) {
            return Err(Error::invalid("bad_subject", "what is one's own needs no grant to oneself"));
        }
        if new.expires_at.is_some_and(|end| end <= now) {
            return Err(Error::invalid("bad_time", "expires_at lies in the past"));
        }
        let filter = GrantFilter { made_by: None, to: vec![subject] };
        let there = self.store.grants(Some(&filter), now, Window { before: None, limit: MAX_GRANTS }).await?;
        if there.len() >= MAX_GRANTS as usize {
            let detail = format!("a user or a role has at most {MAX_GRANTS} grants; remove one first, or grant by labels");
            return Err(Error::conflict("grants_full", detail));
        }
        let id = GrantId::from_parts(now, entropy::bytes());
        audit::about(id);
        audit::detail("subject", format_args!("{subject:?}"));
        audit::detail("resource", format_args!("{resource:?}"));
        let grant = Grant { id, subject, resource, permissions, created_by, created_at: now, expires_at: new.expires_at };
        let own = self.clone();
        self.finish("create grant", async move {
            match keyed {
                None => own.store.add_grant(&grant).await?,
                Some(k) => {
                    if let Some(made) = k.create(Creation::Grant(grant.clone())).await? {
                        return own.store.grant(made, now).await?.ok_or(Error::NotFound("grant"));
                    }
                }
            }
            own.changed(&grant);
            Ok(grant)
        })
        .await
    }

    /// Those that one made and those that were made to one, by name or by role; an admin sees all.
    pub async fn list(&self, caller: &Caller, window: Window<GrantId>) -> Result<Vec<Grant>> {
        let filter = shown_to(caller)?;
        Ok(self.store.grants(filter.as_ref(), self.clock.now_ms(), window).await?)
    }

    /// For who made it, who owns what it is on, and admins.
    pub async fn remove(self: &Arc<Self>, caller: &Caller, id: GrantId) -> Result<()> {
        audit::doing(caller, Action::GrantRemove);
        audit::about(id);
        let grant = self.store.grant(id, self.clock.now_ms()).await?.ok_or(Error::NotFound("grant"))?;
        let owner = match &grant.resource {
            Resource::Node(id) => self.nodes.node(*id).await?.map(|n| n.owner),
            Resource::Session(id) => self.sessions.session(*id).await?.map(|s| s.owner),
            Resource::Agent(agent) => self.state.state_owner(agent).await?,
            Resource::Labels(_) => None,
        };
        let manage = manages(&grant.resource);
        let may = [owner, Some(grant.created_by)].into_iter().flatten().any(|of| allows(caller, manage, of, Thing::Other));
        if !may && !reaches_all(caller, Permission::SystemAdminister) {
            audit::denied(caller, manage, None);
            let seen = shown_to(caller)?.is_none_or(|f| f.has(&grant));
            return Err(if seen { missing(manage) } else { Error::NotFound("grant") });
        }
        let own = self.clone();
        self.finish("remove grant", async move {
            if !own.store.remove_grant(id).await? {
                return Err(Error::NotFound("grant"));
            }
            own.changed(&grant);
            Ok(())
        })
        .await
    }

    async fn finish<T: Send + 'static>(&self, what: &'static str, work: impl Future<Output = Result<T>> + Send + 'static) -> Result<T> {
        self.work.complete(what, audit::carry(work)).await.ok_or_else(crate::tasks::stopped)?
    }

    /// Counts at once on this hub; another one reads it again within seconds.
    fn changed(&self, grant: &Grant) {
        tracing::info!(grant = %grant.id, subject = ?grant.subject, resource = ?grant.resource, "grants changed");
        self.accounts.events.rights_changed(match grant.subject {
            Subject::User(id) => Whose::User(id),
            Subject::Role(role) => Whose::Role(role),
        });
        self.pool.rights_changed();
    }

    /// The thing, if the caller may share it, and its owner if it has one.
    async fn grantable(&self, caller: &Caller, on: On) -> Result<(Resource, Option<UserId>)> {
        let text = match on {
            On::Labels(labels) => {
                // They reach what others own, now and later.
                authorize_own(caller, Permission::SystemAdminister)?;
                check_labels(&labels)?;
                return Ok((Resource::Labels(labels), None));
            }
            On::One(text) => text,
        };
        if text.starts_with("node_") {
            let id = text.parse().map_err(|_| Error::NotFound("node"))?;
            let node = self.nodes.node(id).await?.ok_or(Error::NotFound("node"))?;
            authorize_owner(caller, Permission::NodesManage, node.thing(), Permission::NodesRead, "node")?;
            if node.revoked_at.is_some() {
                return Err(Error::conflict("node_revoked", "this node was revoked"));
            }
            return Ok((Resource::Node(id), Some(node.owner)));
        }
        if text.starts_with("sess_") {
            let id = text.parse().map_err(|_| Error::NotFound("session"))?;
            let session = self.sessions.session(id).await?.ok_or(Error::NotFound("session"))?;
            authorize_owner(caller, Permission::SessionsWrite, session.thing(), Permission::SessionsRead, "session")?;
            if session.purged_at.is_some() {
                return Err(Error::conflict("session_purged", "what this session held is erased; there is nothing to share"));
            }
            return Ok((Resource::Session(id), Some(session.owner)));
        }
        let known = if name::check(&text).is_ok() { self.state.state_owner(&text).await? } else { None };
        let owner = known.ok_or(Error::NotFound("agent"))?;
        authorize_owner(caller, Permission::AgentsManage, (owner, Thing::Agent(&text)), Permission::AgentsRead, "agent")?;
        Ok((Resource::Agent(text), Some(owner)))
    }

    async fn subject(&self, text: &str) -> Result<Subject> {
        if let Some(role) = Role::parse(text) {
            return Ok(Subject::Role(role));
        }
        let user = match text.parse() {
            Ok(id) => self.accounts.store.user(id).await?,
            Err(_) => self.accounts.store.user_named(text).await?,
        };
        Ok(Subject::User(user.ok_or(Error::NotFound("user"))?.id))
    }
}

/// What one needs on a thing to share it.
fn manages(resource: &Resource) -> Permission {
    match resource {
        Resource::Node(_) => Permission::NodesManage,
        Resource::Session(_) => Permission::SessionsWrite,
        Resource::Agent(_) => Permission::AgentsManage,
        Resource::Labels(_) => Permission::SystemAdminister,
    }
}

/// None: all.
fn shown_to(caller: &Caller) -> Result<Option<GrantFilter>> {
    if reaches_all(caller, Permission::SystemAdminister) {
        return Ok(None);
    }
    let person = caller.as_person().ok_or_else(|| missing(Permission::SystemAdminister))?;
    let to = vec![Subject::User(person.user), Subject::Role(person.role)];
    Ok(Some(GrantFilter { made_by: Some(person.user), to }))
}

/// Nobody grants what they cannot do there themselves.
fn permissions(caller: &Caller, asked: &[String], resource: &Resource, owner: Option<UserId>) -> Result<Permissions> {
    if asked.is_empty() {
        return Err(Error::invalid("bad_permission", "a grant gives at least one permission, such as tasks:dispatch"));
    }
    let mut all = vec![];
    for text in asked {
        let bad = |why: &str| Error::invalid("bad_permission", format!("{text:?} {why}"));
        let permission = Permission::parse(text).ok_or_else(|| bad("is no permission; use one such as tasks:dispatch"))?;
        if !permission.is_grantable() {
            return Err(bad("cannot be granted"));
        }
        let thing = match resource {
            Resource::Node(id) => Thing::Node(*id),
            Resource::Session(id) => Thing::Session(*id),
            Resource::Agent(agent) => Thing::Agent(agent),
            Resource::Labels(_) => Thing::Other,
        };
        if !owner.map_or_else(|| reaches_all(caller, permission), |owner| allows(caller, permission, owner, thing)) {
            return Err(missing(permission));
        }
        all.push(permission);
    }
    Ok(all.into_iter().collect())
}

fn check_labels(labels: &BTreeMap<String, String>) -> Result<()> {
    let bad = |why: String| Error::invalid("bad_label", why);
    if labels.is_empty() || labels.len() > MAX_TERMS {
        return Err(bad(format!("a grant by labels names 1 to {MAX_TERMS} of them: none would be every node")));
    }
    for text in labels.iter().flat_map(|(key, value)| [key, value]) {
        name::check(text).map_err(|e| bad(format!("label {text:?}: {e}")))?;
    }
    Ok(())
}

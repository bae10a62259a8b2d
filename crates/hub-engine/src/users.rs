//! People: how they are added or invited, choose a password, and are changed. How they leave is
//! [`crate::leaving`]'s.

use crate::access::visible;
use crate::accounts::{Accounts, Tokens, check_password, fresh_token};
use crate::audit::{self, Action};
use crate::devices::LoginFrom;
use crate::error::{Error, Result};
use crate::events::Whose;
use crate::idempotency::{self, Keyed};
use crate::pool::Pool;
use crate::ports::{self, Creation, Window};
use crate::records::{Standing, User, UserChange, UserChanged, UserEntry, UserInvite};
use crate::tasks::stopped;
use mesh_core::permission::{Caller, Permission, Role};
use mesh_core::{UnixMs, UserId, name};
use mesh_process::entropy;
use std::sync::Arc;

/// How long the link of an invite can be used.
const INVITE_MS: i64 = 24 * 3600 * 1000;
const INVITE_PREFIX: &str = "cmi_";
/// One answer to all that is wrong with a link, so that it tells nobody anything.
const NO_INVITE: Error = Error::Unauthenticated("this invite is unknown, was used or has expired; ask an admin for a new one");

#[derive(Clone)]
pub struct Users {
    pub store: Arc<dyn ports::Users>,
    pub accounts: Arc<Accounts>,
    /// Where their tasks wait; none where no pool runs.
    pub pool: Option<Arc<Pool>>,
}

/// A person, and the token of the invite that was just made for them, which is told once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Told {
    pub user: UserEntry,
    pub invite: Option<String>,
}

/// What an admin asks to be changed of a person. None leaves a thing as it is.
#[derive(Clone, Default)]
pub struct Change {
    pub username: Option<String>,
    pub role: Option<String>,
    pub disabled: Option<bool>,
    /// Sets it; every log-in of theirs ends.
    pub password: Option<String>,
    /// A new link for one who has not accepted yet.
    pub invite: bool,
}

impl Users {
    pub async fn list(&self, caller: &Caller, window: Window<UserId>) -> Result<Vec<UserEntry>> {
        administers(caller)?;
        Ok(self.store.user_entries(window).await?)
    }

    /// Also one who was removed: history names them.
    pub async fn get(&self, caller: &Caller, id: UserId) -> Result<UserEntry> {
        administers(caller)?;
        self.store.user_entry(id).await?.ok_or(Error::NotFound("user"))
    }

    /// With a password they can log in at once, without one they are invited.
    pub async fn create(
        &self,
        caller: &Caller,
        username: &str,
        password: Option<String>,
        role: &str,
        keyed: Option<Keyed>,
    ) -> Result<Told> {
        audit::doing(caller, Action::UserCreate);
        administers(caller)?;
        let keyed = keyed.map(|k| k.sealed(&*self.accounts.keyring));
        let is_invite = password.is_none();
        if let Some(made) = idempotency::before::<UserId>(keyed.as_ref()).await? {
            return self.made_before(made, is_invite).await;
        }
        name::check(username).map_err(|e| Error::invalid("bad_name", e))?;
        let role = role_named(role)?;
        if let Some(password) = &password {
            check_password(password)?;
        }
        if self.store.entry_named(username).await?.is_some() {
            return Err(taken(username));
        }
        let now = self.now();
        let password_hash = match password {
            Some(password) => self.accounts.passwords.hash(password).await?,
            None => String::new(),
        };
        let id = UserId::from_parts(now, entropy::bytes());
        audit::about(id);
        audit::detail("role", role.as_str());
        let user = User { id, username: username.to_owned(), role, password_hash, created_at: now };
        let (token, invite) = is_invite.then(|| self.new_invite(now)).unzip();
        match keyed {
            None => {
                if !self.store.create_user(&user, invite.as_ref()).await? {
                    return Err(taken(username));
                }
            }
            Some(k) => match k.create::<UserId>(Creation::User(user, invite)).await {
                Ok(Some(made)) => return self.made_before(made, is_invite).await,
                Ok(None) => {}
                Err(e) => {
                    // Another may have taken the name in this moment.
                    let meanwhile = self.store.entry_named(username).await?.is_some_and(|u| u.id != id);
                    return Err(if meanwhile { taken(username) } else { e });
                }
            },
        }
        tracing::info!(user = %id, role = role.as_str(), invited = is_invite, "user added");
        Ok(Told { user: self.known(id).await?, invite: token })
    }

    async fn made_before(&self, id: UserId, is_invite: bool) -> Result<Told> {
        if is_invite {
            return idempotency::already(id, "ask for a new link with PATCH {\"invite\": true}");
        }
        Ok(Told { user: self.known(id).await?, invite: None })
    }

    /// Sets the password of who was invited; gives their name to log in with.
    pub async fn accept(&self, token: &str, password: String, from: LoginFrom) -> Result<Tokens> {
        audit::asked(Action::UserAccept);
        let (mac, now) = (self.accounts.keyring.token_mac(token), self.now());
        // First: strangers make nobody compute.
        let user = self.store.invited(&mac, now).await?.ok_or(NO_INVITE)?;
        audit::by(user);
        audit::about(user);
        check_password(&password)?;
        let hash = self.accounts.passwords.hash(password).await?;
        let user = self.store.accept_invite(&mac, &hash, now).await?.ok_or(NO_INVITE)?;
        tracing::info!(user = %user.id, "an invite was accepted");
        self.accounts.begin_login(user.id, from).await
    }

    /// Everybody may rename themselves; all else is the admins'.
    pub async fn change(&self, caller: &Caller, id: UserId, change: Change) -> Result<Told> {
        audit::doing(caller, Action::UserChange);
        audit::about(id);
        for (what, to) in [("role", change.role.as_deref()), ("disabled", change.disabled.map(|d| if d { "true" } else { "false" }))] {
            to.into_iter().for_each(|to| audit::detail(what, to));
        }
        for (what, _) in [("password", change.password.is_some()), ("invite", change.invite)].iter().filter(|(_, is)| *is) {
            audit::detail(what, "set");
        }
        let only_name = change.role.is_none() && change.disabled.is_none() && change.password.is_none() && !change.invite;
        if !(only_name && caller.in_person() == Some(id)) {
            administers(caller)?;
        }
        if only_name && change.username.is_none() {
            return Err(Error::invalid("nothing_to_change", "name what is to change: username, role, disabled, password or invite"));
        }
        if change.password.is_some() && change.invite {
            return Err(Error::invalid("bad_field", "a person is given a password or a link to choose one, not both"));
        }
        if let Some(name) = &change.username {
            name::check(name).map_err(|e| Error::invalid("bad_name", e))?;
        }
        let role = change.role.as_deref().map(role_named).transpose()?;
        if let Some(password) = &change.password {
            check_password(password)?;
            own_password_is_not_lost(caller, id)?;
        }
        let (token, invite) = change.invite.then(|| self.new_invite(self.now())).unzip();
        let password_hash = match change.password {
            Some(password) => Some(self.accounts.passwords.hash(password).await?),
            None => None,
        };
        let to = UserChange { username: change.username, role, disabled: change.disabled, invite, password_hash };
        let rights_change = role.is_some() || to.disabled.is_some() || to.password_hash.is_some();
        let (own, write) = (self.clone(), to.clone());
        // To its end, whether or not its caller waits: who reads streams must hear of it.
        let change = async move {
            let changed = own.store.change_user(id, &write, own.now()).await?;
            if rights_change && matches!(changed, UserChanged::Done { .. }) {
                own.rights_changed(id);
            }
            Ok::<_, Error>(changed)
        };
        let user = match self.accounts.work.complete("change user", audit::carry(change)).await.ok_or_else(stopped)?? {
            UserChanged::Done { before, now } => {
                if (before.role, before.standing) != (now.role, now.standing) {
                    tracing::info!(user = %id, role = now.role.as_str(), standing = ?now.standing, "user changed");
                }
                now
            }
            UserChanged::Unknown => return Err(Error::NotFound("user")),
            UserChanged::NameTaken => return Err(taken(to.username.as_deref().unwrap_or_default())),
            UserChanged::LastAdmin => return Err(last_admin()),
            UserChanged::HasPassword => {
                return Err(Error::conflict("has_password", "this user has a password and needs no invite; set a new one if it was lost"));
            }
        };
        if to.password_hash.is_some() {
            tracing::info!(user = %id, "a password was set; the log-ins of its user are ended");
        }
        Ok(Told { user, invite: token })
    }

    /// Whose name this is.
    pub async fn named(&self, caller: &Caller, username: &str) -> Result<UserEntry> {
        administers(caller)?;
        self.store.entry_named(username).await?.ok_or(Error::NotFound("user"))
    }

    pub(crate) fn rights_changed(&self, id: UserId) {
        self.accounts.events.rights_changed(Whose::User(id));
        if let Some(pool) = &self.pool {
            pool.rights_changed();
        }
    }

    pub(crate) fn now(&self) -> UnixMs {
        self.accounts.clock.now_ms()
    }

    async fn known(&self, id: UserId) -> Result<UserEntry> {
        self.store.user_entry(id).await?.ok_or(Error::NotFound("user"))
    }

    fn new_invite(&self, now: UnixMs) -> (String, UserInvite) {
        let token = fresh_token(INVITE_PREFIX);
        let mac = self.accounts.keyring.token_mac(&token);
        (token, UserInvite { mac, expires_at: now + INVITE_MS })
    }
}

/// Who took somebody's open page must not be able to keep their account. On the hub's own machine it is
/// another matter: there one may have lost it.
fn own_password_is_not_lost(caller: &Caller, id: UserId) -> Result<()> {
    let own = caller.as_person().is_some_and(|p| p.user == id && p.via.door != "socket");
    if own { Err(Error::Forbidden("change your own password with POST /auth/password, which asks for the old one".into())) } else { Ok(()) }
}

/// All about other people is the admins' alone.
pub(crate) fn administers(caller: &Caller) -> Result<()> {
    visible(caller, Permission::SystemAdminister).map(drop)
}

pub(crate) fn last_admin() -> Error {
    Error::conflict("last_admin", "nobody would be left who can administer the hub; make somebody else an admin first")
}

fn taken(username: &str) -> Error {
    Error::conflict("name_taken", format!("there is a user named {username:?} already; upper and lower case are the same"))
}

fn role_named(text: &str) -> Result<Role> {
    let words = Role::ALL.map(Role::as_str).join(", ");
    Role::parse(text).ok_or_else(|| Error::invalid("bad_role", format!("{text:?} is not a role; there are {words}")))
}

impl Standing {
    pub fn as_str(self, now: UnixMs) -> &'static str {
        match self {
            Self::Active => "active",
            Self::Invited { until } if until <= now => "invite_expired",
            Self::Invited { .. } => "invited",
            Self::Disabled => "disabled",
            Self::Removed { .. } => "removed",
        }
    }
}

//! People, their log-ins and their keys.

use crate::access::authorize_own;
use crate::audit::{self, Action};
use crate::devices::LoginFrom;
use crate::error::{Error, Result};
use crate::events::{Events, Whose};
use crate::idempotency::{self, Keyed};
use crate::ports::{self, Creation, Keyring, Passwords, Window};
use crate::records::{ApiKey, RefreshToken, Rotation, User};
use crate::rights::Rights;
use crate::tasks::stopped;
use crate::throttle::Throttle;
use mesh_core::permission::{Caller, Permission, Reach, Role, Scope};
use mesh_core::{ApiKeyId, Digest, LoginId, UnixMs, UserId, name};
use mesh_process::{SharedClock, Tasks, entropy};
use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Lifetimes, as set.
#[derive(Debug, Clone, Copy)]
pub struct Lifetimes {
    pub access_secs: u64,
    pub refresh_days: u64,
}

/// What a log-in gives.
pub struct Tokens {
    pub login: LoginId,
    pub access: String,
    pub refresh: String,
    pub expires_in: u64,
}

/// A caller and the log-in behind it, if it is a person's.
#[derive(Debug, Clone)]
pub struct Authenticated {
    pub caller: Caller,
    pub login: Option<LoginId>,
}

/// A new key; the secret is told once.
pub struct NewKey {
    pub key: ApiKey,
    pub secret: String,
}

pub const KEY_PREFIX: &str = "cmk_";
const REFRESH_PREFIX: &str = "cmr_";
/// How far the last use of a key or a log-in may lag behind: one write a minute is enough.
const LAST_USED_MS: i64 = 60_000;
/// Longer than any that was given.
const MAX_TOKEN: usize = 2048;
const WRONG_TOKEN: Error = Error::Unauthenticated("the token is unknown, altered or expired; log in again or use another API key");

/// Who was seen a moment ago, so that a busy caller costs no reads. What this hub itself changes counts
/// at once; what another hub changes, after [`RECENT`].
#[derive(Debug, Default)]
pub struct Recent(Mutex<HashMap<Digest, Seen>>);

#[derive(Debug, Clone)]
struct Seen {
    who: Authenticated,
    at: Duration,
    /// How often rights had been changed before the look.
    changes: u64,
}

/// When a caller was looked at, before the look.
#[derive(Debug, Clone, Copy)]
pub struct Look {
    at: Duration,
    changes: u64,
}

const RECENT: Duration = Duration::from_secs(1);
const RECENT_MOST: usize = 4096;

impl Recent {
    fn get(&self, mac: &Digest, now: Duration, changes: u64) -> Option<Authenticated> {
        let map = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        map.get(mac).filter(|seen| seen.changes == changes && now.saturating_sub(seen.at) < RECENT).map(|seen| seen.who.clone())
    }
    fn put(&self, mac: Digest, seen: Seen) {
        let mut map = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if map.len() >= RECENT_MOST {
            map.clear();
        }
        map.insert(mac, seen);
    }
}

pub struct Accounts {
    pub recent: Recent,
    pub store: Arc<dyn ports::Accounts>,
    pub rights: Arc<Rights>,
    pub keyring: Arc<dyn Keyring>,
    pub passwords: Arc<dyn Passwords>,
    pub clock: SharedClock,
    pub events: Events,
    pub lifetimes: Lifetimes,
    pub throttle: Throttle,
    /// What crosses a commit runs here to its end, whether or not its caller waits.
    pub work: Tasks,
}

impl Accounts {
    /// Makes the first admin on a new deployment; gives false when there are users already.
    pub async fn first_admin(&self, username: &str, password: &str) -> Result<bool> {
        if self.store.count_users().await? > 0 {
            return Ok(false);
        }
        check_password(password)?;
        let now = self.clock.now_ms();
        let user = User {
            id: UserId::from_parts(now, entropy::bytes()),
            username: username.to_owned(),
            role: Role::Admin,
            password_hash: self.passwords.hash(password.to_owned()).await?,
            created_at: now,
        };
        Ok(self.store.add_user(&user).await?)
    }

    /// Logs a person in who says a password; each wrong one is a try of the account and of the address it came from.
    pub async fn login(&self, username: &str, password: String, from: LoginFrom) -> Result<Tokens> {
        const WRONG: Error = Error::Unauthenticated("the user name or the password is wrong");
        audit::asked(Action::Login);
        if password.len() > MAX_PASSWORD_BYTES {
            return Err(WRONG);
        }
        let attempt = self.throttle.admit(username, from.address)?;
        let user = self.store.user_named(username).await?;
        if let Some(user) = &user {
            audit::about(user.id);
        }
        // An unknown name costs the same time as a wrong password.
        let hash = user.as_ref().map(|u| u.password_hash.clone());
        match self.passwords.verify(password, hash).await {
            Ok(true) => {}
            Ok(false) => return Err(WRONG),
            Err(busy) => {
                attempt.not_looked_at();
                return Err(busy);
            }
        }
        let user = user.ok_or(WRONG)?;
        attempt.succeeded();
        let tokens = self.begin_login(user.id, from).await?;
        // The password was changed, or its person disabled, while it was looked at: what ended their log-ins
        // may have come before this one.
        let now = self.store.user(user.id).await?;
        if now.is_none_or(|now| now.password_hash != user.password_hash) {
            self.end_login(tokens.login).await?;
            return Err(WRONG);
        }
        Ok(tokens)
    }

    /// Begins a log-in of somebody who has shown who they are.
    pub async fn begin_login(&self, user: UserId, from: LoginFrom) -> Result<Tokens> {
        audit::by(user);
        let now = self.clock.now_ms();
        let login = LoginId::from_parts(now, entropy::bytes());
        let refresh = fresh_token(REFRESH_PREFIX);
        let token = RefreshToken { mac: self.keyring.token_mac(&refresh), login, user, expires_at: self.refresh_end(now) };
        let device = from.device(login.into(), user, now);
        self.store.add_login(&device, &token).await?;
        tracing::info!(%user, device = %device.id, name = ?device.name, "log-in");
        Ok(self.tokens(user, login, refresh, now))
    }

    /// Gives new tokens for a refresh token that was not used before. A second use ends its family.
    pub async fn refresh(&self, token: &str, address: Option<IpAddr>) -> Result<Tokens> {
        audit::asked(Action::Refresh);
        let now = self.clock.now_ms();
        let fresh = fresh_token(REFRESH_PREFIX);
        let (old, new) = (self.keyring.token_mac(token), self.keyring.token_mac(&fresh));
        let (store, events, until) = (self.store.clone(), self.events.clone(), self.refresh_end(now));
        let rotate = async move {
            // Also of one that is refused: whose it is, is known as long as its log-in is.
            if let Some((user, login)) = store.refresh_of(&old).await? {
                audit::by(user);
                audit::about(login);
            }
            let rotation = store.rotate_refresh(&old, &new, until, now).await?;
            if let Rotation::Reused { login, .. } = rotation {
                events.rights_changed(Whose::Login(login));
            }
            Ok(rotation)
        };
        match self.work.complete("refresh log-in", audit::carry(rotate)).await.ok_or_else(stopped)?.map_err(Error::Store)? {
            Rotation::Rotated { user, login } => {
                // The old token is used up by now: its caller must have the new one.
                if let Err(error) = self.store.device_seen(login.into(), address, now).await {
                    tracing::warn!(%login, %error, "where a device was seen could not be noted");
                }
                Ok(self.tokens(user, login, fresh, now))
            }
            Rotation::Reused { user, login } => {
                tracing::warn!(%user, %login, "a refresh token came a second time; its log-in is ended");
                Err(Error::Unauthenticated("this refresh token was used before; its log-in is ended, log in again"))
            }
            Rotation::Unknown => Err(Error::Unauthenticated("the refresh token is unknown or has expired; log in again")),
        }
    }

    pub async fn logout(&self, caller: &Caller, login: LoginId) -> Result<()> {
        audit::doing(caller, Action::Logout);
        audit::about(login);
        self.end_login(login).await
    }

    pub(crate) async fn end_login(&self, login: LoginId) -> Result<()> {
        let store = self.store.clone();
        self.finish("end log-in", Whose::Login(login), async move { Ok(store.end_login(login).await?) }).await
    }

    /// Writes what ends or changes rights, and tells of it once it is written, also if its caller has hung up.
    pub(crate) async fn finish<T: Send + 'static>(
        &self,
        what: &'static str,
        whose: Whose,
        write: impl Future<Output = Result<T>> + Send + 'static,
    ) -> Result<T> {
        let events = self.events.clone();
        let work = async move {
            let done = write.await?;
            events.rights_changed(whose);
            Ok(done)
        };
        self.work.complete(what, audit::carry(work)).await.ok_or_else(stopped)?
    }

    fn refresh_end(&self, now: UnixMs) -> UnixMs {
        now + self.lifetimes.refresh_days as i64 * 86_400_000
    }

    fn tokens(&self, user: UserId, login: LoginId, refresh: String, now: UnixMs) -> Tokens {
        let expires_in = self.lifetimes.access_secs;
        let access = self.keyring.issue_access(user, login, now, now + expires_in as i64 * 1000);
        Tokens { login, access, refresh, expires_in }
    }

    /// Who a bearer token is, with the rights of now.
    pub async fn authenticate(&self, token: &str, address: Option<IpAddr>) -> Result<Authenticated> {
        if token.len() > MAX_TOKEN {
            return Err(WRONG_TOKEN);
        }
        let (mac, at, changes) = (self.keyring.token_mac(token), self.clock.steady(), *self.events.rights().borrow());
        if let Some(who) = self.recent.get(&mac, at, changes) {
            return Ok(who);
        }
        let who = self.identify(token, &mac, address).await.inspect_err(|_| audit::asked(Action::Authenticate))?;
        self.recent.put(mac, Seen { who: who.clone(), at, changes });
        Ok(who)
    }

    async fn identify(&self, token: &str, mac: &Digest, address: Option<IpAddr>) -> Result<Authenticated> {
        let now = self.clock.now_ms();
        if token.starts_with(KEY_PREFIX) {
            let key = self.store.key_by_mac(mac).await?.ok_or(WRONG_TOKEN)?;
            if key.expires_at.is_some_and(|e| e <= now) {
                return Err(WRONG_TOKEN);
            }
            let user = self.store.user(key.user).await?.ok_or(WRONG_TOKEN)?;
            if key.last_used_at.is_none_or(|t| now - t > LAST_USED_MS) {
                self.store.key_used(key.id, now).await?;
            }
            let caller = self.with_granted(Caller::key(key.id, user.id, user.role, key.scopes)).await?;
            return Ok(Authenticated { caller, login: None });
        }
        let (user, login) = self.keyring.read_access(token, now).ok_or(WRONG_TOKEN)?;
        let user = self.store.user(user).await?.ok_or(WRONG_TOKEN)?;
        let device = self.store.device(login.into(), now).await?.ok_or(WRONG_TOKEN)?;
        if now - device.last_seen_at > LAST_USED_MS {
            self.store.device_seen(device.id, address, now).await?;
        }
        let caller = self.with_granted(Caller::person(user.id, user.role)).await?;
        Ok(Authenticated { caller, login: Some(login) })
    }

    pub fn look(&self) -> Look {
        Look { at: self.clock.steady(), changes: *self.events.rights().borrow() }
    }

    /// The same caller with the rights of now, if anything may have moved since they were looked at; an error
    /// when they have ended.
    pub async fn since(&self, who: &Authenticated, look: Look) -> Result<Option<Authenticated>> {
        let now = self.look();
        if now.changes == look.changes && now.at.saturating_sub(look.at) < RECENT {
            return Ok(None);
        }
        self.still(who).await.map(Some).inspect_err(|_| audit::doing(&who.caller, Action::Authenticate))
    }

    /// The same caller with the rights of now, for a stream that outlives its token; an error when they
    /// have ended.
    pub async fn still(&self, who: &Authenticated) -> Result<Authenticated> {
        const ENDED: Error = Error::Unauthenticated("the user, the log-in or the API key has ended");
        let user = self.store.user(who.caller.user().ok_or(ENDED)?).await?.ok_or(ENDED)?;
        let now = self.clock.now_ms();
        let mut caller = match who.caller.key_id() {
            Some(id) => {
                let key = self.store.key(id).await?.filter(|k| k.expires_at.is_none_or(|e| e > now)).ok_or(ENDED)?;
                Caller::key(key.id, user.id, user.role, key.scopes)
            }
            None => Caller::person(user.id, user.role),
        };
        if let (Caller::Person(now), Some(before)) = (&mut caller, who.caller.as_person()) {
            now.via = before.via.clone();
        }
        if let Some(login) = who.login
            && self.store.device(login.into(), now).await?.is_none()
        {
            return Err(ENDED);
        }
        Ok(Authenticated { caller: self.with_granted(caller).await?, login: who.login })
    }

    async fn with_granted(&self, mut caller: Caller) -> Result<Caller> {
        if let Caller::Person(person) = &mut caller {
            person.granted = self.rights.of(person.user, person.role).await?;
        }
        Ok(caller)
    }

    /// The caller of the control socket: the hub's own uid acts as the oldest of the admins.
    pub async fn local_admin(&self) -> Result<Authenticated> {
        let user = self.store.oldest_admin().await?.ok_or(Error::NotFound("user"))?;
        let caller = self.with_granted(Caller::person(user.id, user.role)).await?;
        Ok(Authenticated { caller, login: None })
    }

    pub async fn me(&self, caller: &Caller) -> Result<(User, Vec<Permission>)> {
        let id = caller.user().ok_or(Error::NotFound("user"))?;
        let user = self.store.user(id).await?.ok_or(Error::NotFound("user"))?;
        // What can be used somewhere.
        let may = Permission::ALL.iter().copied().filter(|p| authorize_own(caller, *p).is_ok()).collect();
        Ok((user, may))
    }

    /// Changes the caller's own password; every other log-in of theirs ends.
    pub async fn change_password(&self, who: &Authenticated, current: String, new: String) -> Result<()> {
        audit::doing(&who.caller, Action::PasswordChange);
        let user = who.caller.in_person().ok_or_else(|| Error::Forbidden("a key cannot change a password; log in as the person".into()))?;
        check_password(&new)?;
        let user = self.store.user(user).await?.ok_or(Error::NotFound("user"))?;
        audit::about(user.id);
        // Who has a token only must not find the password by it.
        let address = who.caller.as_person().and_then(|p| p.via.address);
        let attempt = self.throttle.admit(&user.username, address)?;
        let wrong = || Error::Forbidden("the current password is wrong".into());
        if current.len() > MAX_PASSWORD_BYTES {
            return Err(wrong());
        }
        match self.passwords.verify(current, Some(user.password_hash.clone())).await {
            Ok(true) => attempt.succeeded(),
            Ok(false) => return Err(wrong()),
            Err(busy) => {
                attempt.not_looked_at();
                return Err(busy);
            }
        }
        let hash = self.passwords.hash(new).await?;
        // Another may have set it meanwhile, who may have had a reason.
        let (store, login) = (self.store.clone(), who.login);
        self.finish("change password", Whose::User(user.id), async move {
            let set = store.set_password(user.id, &user.password_hash, &hash, login).await?;
            if set { Ok(()) } else { Err(wrong()) }
        })
        .await
    }

    pub async fn create_key(
        &self,
        caller: &Caller,
        label: &str,
        scopes: &[String],
        expires_at: Option<UnixMs>,
        keyed: Option<Keyed>,
    ) -> Result<NewKey> {
        const ADVICE: &str = "delete it and ask again under a new key";
        audit::doing(caller, Action::KeyCreate);
        let user = caller.in_person().ok_or_else(|| Error::Forbidden("a key cannot make keys; log in as the person".into()))?;
        if let Some(made) = idempotency::before::<ApiKeyId>(keyed.as_ref()).await? {
            return idempotency::already(made, ADVICE);
        }
        name::check(label).map_err(|e| Error::invalid("bad_name", e))?;
        if scopes.is_empty() {
            return Err(Error::invalid("bad_scope", "a key needs at least one scope, such as tasks:dispatch"));
        }
        let scopes = judged_scopes(caller, scopes)?;
        let now = self.clock.now_ms();
        if expires_at.is_some_and(|e| e <= now) {
            return Err(Error::invalid("bad_time", "expires_at lies in the past"));
        }
        let secret = fresh_token(KEY_PREFIX);
        let key = ApiKey {
            id: ApiKeyId::from_parts(now, entropy::bytes()),
            user,
            name: label.to_owned(),
            prefix: secret[..KEY_PREFIX.len() + 6].to_owned(),
            mac: self.keyring.token_mac(&secret),
            scopes,
            created_at: now,
            expires_at,
            last_used_at: None,
        };
        audit::about(key.id);
        audit::detail("scopes", scopes_text(&key));
        match keyed {
            None => self.store.add_key(&key).await?,
            Some(k) => {
                if let Some(made) = k.create::<ApiKeyId>(Creation::Key(key.clone())).await? {
                    return idempotency::already(made, ADVICE);
                }
            }
        }
        Ok(NewKey { key, secret })
    }

    pub async fn keys(&self, caller: &Caller, window: Window<ApiKeyId>) -> Result<Vec<ApiKey>> {
        let user = caller.user().ok_or(Error::NotFound("user"))?;
        Ok(self.store.keys(user, window).await?)
    }

    pub async fn remove_key(&self, caller: &Caller, id: ApiKeyId) -> Result<()> {
        audit::doing(caller, Action::KeyRemove);
        audit::about(id);
        let key = self.store.key(id).await?.ok_or(Error::NotFound("API key"))?;
        if caller.user() != Some(key.user) && authorize_own(caller, Permission::SystemAdminister).is_err() {
            return Err(Error::NotFound("API key"));
        }
        if caller.key_id().is_some_and(|own| own != id) {
            return Err(Error::Forbidden("a key can remove itself only; log in as the person".into()));
        }
        let store = self.store.clone();
        self.finish("remove key", Whose::Key(id), async move {
            if store.remove_key(id).await? { Ok(()) } else { Err(Error::NotFound("API key")) }
        })
        .await
    }
}

fn scopes_text(key: &ApiKey) -> String {
    key.scopes.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
}

const MIN_PASSWORD_CHARS: usize = 12;
const MAX_PASSWORD_CHARS: usize = 256;
const MAX_PASSWORD_BYTES: usize = MAX_PASSWORD_CHARS * 4;

/// 12 to 256 characters, whatever they are.
pub fn check_password(password: &str) -> Result<()> {
    let n = password.chars().count();
    if (MIN_PASSWORD_CHARS..=MAX_PASSWORD_CHARS).contains(&n) {
        return Ok(());
    }
    Err(Error::invalid("bad_password", format!("a password has {MIN_PASSWORD_CHARS} to {MAX_PASSWORD_CHARS} characters, not {n}")))
}

/// Each once, and none of which the caller has no part: it would give nothing.
fn judged_scopes(caller: &Caller, texts: &[String]) -> Result<Vec<Scope>> {
    let mut scopes: Vec<Scope> = vec![];
    for text in texts {
        let scope = Scope::parse(text).map_err(|e| Error::invalid("bad_scope", e))?;
        if !Permission::ALL.iter().any(|p| scope.covers(*p) && caller.reach(*p) != Reach::None) {
            return Err(Error::invalid("bad_scope", format!("{text} is more than you may do yourself; see auth/me for what you may")));
        }
        if !scopes.contains(&scope) {
            scopes.push(scope);
        }
    }
    Ok(scopes)
}

/// A prefix and 256 random bits in base 62, so that a scanner can find one that leaked.
pub(crate) fn fresh_token(prefix: &str) -> String {
    const ALPHABET: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
    let mut out = String::from(prefix);
    while out.len() < prefix.len() + 43 {
        for b in entropy::bytes::<64>() {
            // Values that would make some characters likelier than others are thrown away.
            if b < 248 && out.len() < prefix.len() + 43 {
                out.push(ALPHABET[usize::from(b) % 62] as char);
            }
        }
    }
    out
}

/// A password for a person who has none yet: 100 random bits, easy to type.
pub fn made_password() -> String {
    const ALPHABET: &[u8; 32] = b"abcdefghjkmnpqrstuvwxyz23456789-";
    entropy::bytes::<24>().iter().map(|b| ALPHABET[usize::from(*b) % 31] as char).collect()
}

//! One thing per key: a request that comes again makes nothing new.
//!
//! The store alone decides which of several is the first, in the commit that writes the thing. So a
//! caller that hung up, a second hub and a request that is still under way all meet the same answer.

use crate::audit;
use crate::error::{Error, Result};
use crate::ports::{self, Creation, Known, Once};
use mesh_core::permission::Caller;
use mesh_core::{Digest, UnixMs, sha256};
use mesh_process::SharedClock;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// How long a key is remembered.
const REMEMBERED_MS: i64 = 24 * 3600 * 1000;
/// So many are forgotten by one commit: others wait for it.
const FORGET_AT_ONCE: u32 = 500;

pub struct Idempotency {
    pub store: Arc<dyn ports::Idempotency>,
    pub clock: SharedClock,
}

/// A request under a key.
#[derive(Clone)]
pub struct Keyed {
    store: Arc<dyn ports::Idempotency>,
    once: Once,
}

impl fmt::Debug for Keyed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Keyed").field("once", &self.once).finish_non_exhaustive()
    }
}

impl Idempotency {
    /// `call` names what is asked for, as the door knows it; `request` is the digest of all that is asked.
    pub fn keyed(&self, caller: &Caller, call: &str, key: &str, request: Digest) -> Keyed {
        let at = self.clock.now_ms();
        let once = Once { scope: scope(caller, call, key), request, at, since: at - REMEMBERED_MS };
        Keyed { store: self.store.clone(), once }
    }

    /// Forgets what is too old to count; a reconciler calls it.
    pub async fn forget_old(&self) -> Result<u64> {
        let until: UnixMs = self.clock.now_ms() - REMEMBERED_MS;
        let mut all = 0;
        loop {
            let some = self.store.forget(until, FORGET_AT_ONCE).await?;
            all += some;
            if some < u64::from(FORGET_AT_ONCE) {
                return Ok(all);
            }
        }
    }
}

/// An API key is a caller of its own: two programs of one person never meet in each other's keys.
fn scope(caller: &Caller, call: &str, key: &str) -> Digest {
    let mut text = vec![];
    let who = caller.key_id().map(|key| key.to_string()).or_else(|| caller.user().map(|u| u.to_string())).unwrap_or_default();
    for part in [who.as_str(), call, key] {
        text.extend_from_slice(&(part.len() as u64).to_be_bytes());
        text.extend_from_slice(part.as_bytes());
    }
    sha256(&text)
}

impl Keyed {
    /// For a request that holds a secret: a plain digest of it would let those who read the database guess.
    pub(crate) fn sealed(mut self, keyring: &dyn ports::Keyring) -> Self {
        self.once.request = keyring.token_mac(&self.once.request.map(|b| format!("{b:02x}")).concat());
        self
    }

    /// The id of what this key has made before; an error when that was another request.
    pub async fn before<Id: FromStr>(&self) -> Result<Option<Id>> {
        self.same(self.store.known(&self.once.scope, self.once.since).await?)
    }

    /// Writes the thing, unless this key has made one before: then that one's id.
    pub async fn create<Id: FromStr>(&self, thing: Creation) -> Result<Option<Id>> {
        self.same(self.store.create(thing, &self.once).await?)
    }

    fn same<Id: FromStr>(&self, known: Option<Known>) -> Result<Option<Id>> {
        let Some(known) = known else { return Ok(None) };
        if known.request != self.once.request {
            return Err(Error::invalid(
                "idempotency_mismatch",
                "this Idempotency-Key was used for another request in the last 24 hours; use a new key for a new request",
            ));
        }
        match known.thing.parse() {
            Ok(id) => {
                audit::repeated();
                Ok(Some(id))
            }
            Err(_) => Err(Error::conflict("idempotency_mismatch", format!("this Idempotency-Key has made {}", known.thing))),
        }
    }
}

/// The id of what was made before under `keyed`, if it is given.
pub async fn before<Id: FromStr>(keyed: Option<&Keyed>) -> Result<Option<Id>> {
    match keyed {
        None => Ok(None),
        Some(k) => k.before().await,
    }
}

/// For what is told once: a repeated request cannot be told it again.
pub fn already<T>(id: impl fmt::Display, advice: &str) -> Result<T> {
    Err(Error::conflict(
        "already_created",
        format!("this Idempotency-Key has made {id}, whose secret was in the first answer alone; {advice}"),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_core::permission::Role;
    use mesh_core::{ApiKeyId, UserId};

    #[test]
    fn a_scope_is_one_caller_one_call_one_key() {
        let user = UserId::from_bytes([1; 16]);
        let person = Caller::person(user, Role::Admin);
        let program = Caller::key(ApiKeyId::from_bytes([2; 16]), user, Role::Admin, []);
        let other = Caller::person(UserId::from_bytes([3; 16]), Role::Admin);
        let all = [
            scope(&person, "POST /a", "k"),
            scope(&program, "POST /a", "k"),
            scope(&other, "POST /a", "k"),
            scope(&person, "POST /ak", ""),
            scope(&person, "POST /a", "k2"),
        ];
        for (i, a) in all.iter().enumerate() {
            assert!(all[i + 1..].iter().all(|b| a != b), "{i}");
        }
        let demoted = Caller::person(user, Role::Viewer);
        assert_eq!(scope(&demoted, "POST /a", "k"), all[0], "a role is not who one is");
    }
}

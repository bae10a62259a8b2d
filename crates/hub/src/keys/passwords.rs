//! Passwords by argon2id (RFC 9106), a bounded number at once, off the async threads.

use argon2::password_hash::phc::{Output, PasswordHash};
use argon2::{Algorithm, Argon2, Block, Params, Version};
use async_trait::async_trait;
use base64::Engine;
use base64::engine::general_purpose::STANDARD_NO_PAD as B64;
use hub_engine::Error;
use hub_engine::ports::{Passwords, StoreError, Stored};
use mesh_process::entropy;
use std::sync::Arc;
use tokio::sync::Semaphore;

/// Each takes 19 MiB and a core.
const AT_ONCE: usize = 2;

/// So many more may wait: about as long as a caller is patient. Others are told to come again.
const WAITING: usize = 64;

pub struct Argon2Passwords {
    gate: Arc<Semaphore>,
    /// A place for each that computes or waits.
    queue: Arc<Semaphore>,
    /// Compared with when the user is unknown, so that the answer takes as long.
    dummy: String,
}

impl Argon2Passwords {
    pub fn new() -> Result<Self, StoreError> {
        let dummy = hash(b"nobody has this password")?;
        let places = |n| Arc::new(Semaphore::new(n));
        Ok(Self { gate: places(AT_ONCE), queue: places(AT_ONCE + WAITING), dummy })
    }

    /// Works off the async threads, in turn. The work keeps its place to its end: its caller may leave before.
    async fn in_turn<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> hub_engine::Result<T> {
        let failed = |e: String| StoreError::new("hash a password", e);
        let Ok(place) = self.queue.clone().try_acquire_owned() else {
            return Err(Error::Unavailable { code: "busy", detail: "too many log in at once; try again in a second".into() });
        };
        let turn = self.gate.clone().acquire_owned().await.map_err(|e| failed(e.to_string()))?;
        let work = move || {
            let done = work();
            drop((place, turn));
            done
        };
        Ok(tokio::task::spawn_blocking(work).await.map_err(|e| failed(e.to_string()))?)
    }
}

/// Room for one hash. The C library maps what is larger than 32 MiB and unmaps it when it is freed, while
/// smaller pieces make it keep as much for ever: only what a hash needs of this is ever touched.
const MAPPED_BYTES: usize = 33 << 20;

fn compute(argon: &Argon2<'_>, password: &[u8], salt: &[u8]) -> Result<[u8; HASH_BYTES], argon2::Error> {
    let mut memory = Vec::with_capacity((MAPPED_BYTES / Block::SIZE).max(argon.params().block_count()));
    memory.resize(argon.params().block_count(), Block::default());
    let mut out = [0; HASH_BYTES];
    argon.hash_password_into_with_memory(password, salt, &mut out, &mut memory[..])?;
    Ok(out)
}

const SALT_BYTES: usize = 16;
const HASH_BYTES: usize = 32;

/// The PHC string of a new salt and the hash under it.
fn hash(password: &[u8]) -> Stored<String> {
    let failed = |e: String| StoreError::new("hash a password", e);
    let (argon, salt) = (Argon2::default(), entropy::bytes::<SALT_BYTES>());
    let out = compute(&argon, password, &salt).map_err(|e| failed(e.to_string()))?;
    let p = argon.params();
    Ok(format!("$argon2id$v=19$m={},t={},p={}${}${}", p.m_cost(), p.t_cost(), p.p_cost(), B64.encode(salt), B64.encode(out)))
}

/// Computes the hash anew with the stored parameters and salt; compared in constant time.
fn fits(password: &[u8], phc: &str) -> bool {
    let Ok(stored) = PasswordHash::new(phc) else { return false };
    let (Ok(params), Some(salt), Some(expected)) = (Params::try_from(&stored), stored.salt, stored.hash) else { return false };
    let argon = Argon2::new(Algorithm::Argon2id, Version::V0x13, params);
    compute(&argon, password, salt.as_ref()).is_ok_and(|out| Output::new(&out).is_ok_and(|o| o == expected))
}

#[async_trait]
impl Passwords for Argon2Passwords {
    async fn hash(&self, password: String) -> hub_engine::Result<String> {
        Ok(self.in_turn(move || hash(password.as_bytes())).await??)
    }
    async fn verify(&self, password: String, stored: Option<String>) -> hub_engine::Result<bool> {
        let known = stored.is_some();
        let phc = stored.unwrap_or_else(|| self.dummy.clone());
        let fits = self.in_turn(move || fits(password.as_bytes(), &phc)).await?;
        Ok(known && fits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn right_wrong_and_unknown() {
        let p = Argon2Passwords::new().unwrap();
        let phc = p.hash("correct horse".into()).await.unwrap();
        assert!(phc.starts_with("$argon2id$"), "{phc}");
        assert!(p.verify("correct horse".into(), Some(phc.clone())).await.unwrap());
        assert!(!p.verify("wrong horse".into(), Some(phc)).await.unwrap());
        assert!(!p.verify("nobody has this password".into(), None).await.unwrap());
        for damaged in ["", "$argon2id$", "plain", "$argon2id$v=19$m=8,t=1,p=1$AAAA"] {
            assert!(!p.verify("x".into(), Some(damaged.into())).await.unwrap(), "{damaged}");
        }
    }

    /// An unknown name costs what a wrong password does, and no shorter way leads out.
    #[tokio::test]
    async fn nobody_costs_as_much_as_somebody() {
        let p = Argon2Passwords::new().unwrap();
        let cost = |phc: &str| phc.rsplitn(3, '$').last().map(str::to_owned);
        assert_eq!(cost(&p.dummy), cost(&hash(b"somebody's own password").unwrap()));
        // It is computed in turn like any other: with every turn taken, it waits.
        let turns = p.gate.clone().acquire_many_owned(AT_ONCE as u32).await.unwrap();
        let mut nobody = std::pin::pin!(p.verify("x".into(), None));
        assert!(futures::poll!(&mut nobody).is_pending());
        drop(turns);
        assert!(!nobody.await.unwrap());
    }

    #[tokio::test]
    async fn a_thousand_at_once_wait_in_a_short_queue() {
        let p = Argon2Passwords::new().unwrap();
        let turns = p.gate.clone().acquire_many_owned(AT_ONCE as u32).await.unwrap();
        let all: Vec<_> = (0..1000).map(|_| Box::pin(p.verify("x".into(), None))).collect();
        let mut waiting = vec![];
        let mut busy = 0;
        for mut one in all {
            match futures::poll!(&mut one) {
                std::task::Poll::Pending => waiting.push(one),
                std::task::Poll::Ready(Err(Error::Unavailable { code: "busy", .. })) => busy += 1,
                std::task::Poll::Ready(other) => panic!("{other:?}"),
            }
        }
        assert_eq!((waiting.len(), busy), (AT_ONCE + WAITING, 1000 - AT_ONCE - WAITING));
        // Who leaves gives the place back.
        drop(waiting);
        drop(turns);
        assert_eq!((p.queue.available_permits(), p.gate.available_permits()), (AT_ONCE + WAITING, AT_ONCE));
        assert!(!p.verify("x".into(), None).await.unwrap());
    }

    /// Who leaves while it is computed frees neither memory nor a core: the turn ends with the work.
    #[tokio::test]
    async fn a_caller_that_leaves_keeps_the_turn_until_the_end() {
        let p = Argon2Passwords::new().unwrap();
        let (go, wait) = std::sync::mpsc::sync_channel::<()>(1);
        {
            let mut leaving = std::pin::pin!(p.in_turn(move || wait.recv()));
            assert!(futures::poll!(&mut leaving).is_pending());
        }
        assert_eq!((p.gate.available_permits(), p.queue.available_permits()), (AT_ONCE - 1, AT_ONCE + WAITING - 1));
        go.send(()).unwrap();
        let _all = p.gate.acquire_many(AT_ONCE as u32).await.unwrap();
    }

    /// What others write and read: the library's own PHC strings.
    #[test]
    fn the_form_is_the_published_one() {
        use argon2::{PasswordHasher, PasswordVerifier};
        let theirs = Argon2::default().hash_password(b"a password").unwrap().to_string();
        assert!(fits(b"a password", &theirs) && !fits(b"another", &theirs));
        let ours = hash(b"a password").unwrap();
        assert!(Argon2::default().verify_password(b"a password", &PasswordHash::new(&ours).unwrap()).is_ok());
        assert_eq!(ours.rsplit_once('$').unwrap().0.rsplit_once('$').unwrap().0, "$argon2id$v=19$m=19456,t=2,p=1");
    }
}

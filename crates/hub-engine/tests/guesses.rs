//! Guessing passwords: how few of them are looked at, and that the right one is taken soon after.

use async_trait::async_trait;
use hub_engine::Error;
use hub_engine::accounts::{Accounts, Lifetimes};
use hub_engine::devices::LoginFrom;
use hub_engine::events::Events;
use hub_engine::ports::{Accounts as _, Passwords};
use hub_engine::rights::Rights;
use hub_engine::throttle::Throttle;
use hub_testkit::contract::sample;
use hub_testkit::keys::TestKeys;
use hub_testkit::memory::MemoryStore;
use mesh_process::{Clock, Tasks};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

#[derive(Default)]
struct Hands(AtomicUsize);
impl Clock for Hands {
    fn now_ms(&self) -> i64 {
        self.steady().as_millis() as i64
    }
    fn steady(&self) -> Duration {
        Duration::from_secs(1_000_000 + self.0.load(Ordering::SeqCst) as u64)
    }
    fn anchored_ms(&self) -> i64 {
        self.now_ms()
    }
}

const RIGHT: &str = "the right password";

/// Counts what costs a machine its time.
#[derive(Default)]
struct Counting(AtomicUsize);
#[async_trait]
impl Passwords for Counting {
    async fn hash(&self, password: String) -> hub_engine::Result<String> {
        Ok(password)
    }
    async fn verify(&self, password: String, stored: Option<String>) -> hub_engine::Result<bool> {
        self.0.fetch_add(1, Ordering::SeqCst);
        // Time for all the others to come.
        tokio::task::yield_now().await;
        Ok(stored.is_some_and(|s| s == password))
    }
}

struct World {
    accounts: Accounts,
    clock: Arc<Hands>,
    hashes: Arc<Counting>,
}

impl World {
    async fn new() -> Self {
        let (clock, store, hashes) = (Arc::new(Hands::default()), Arc::new(MemoryStore::new()), Arc::new(Counting::default()));
        let mut ada = sample::user(1, "ada");
        ada.role = mesh_core::permission::Role::Admin;
        ada.password_hash = RIGHT.into();
        assert!(store.add_user(&ada).await.unwrap());
        let accounts = Accounts {
            recent: Default::default(),
            store: store.clone(),
            keyring: Arc::new(TestKeys),
            passwords: hashes.clone(),
            clock: clock.clone(),
            events: Events::local(Duration::from_secs(60), clock.clone()),
            lifetimes: Lifetimes { access_secs: 600, refresh_days: 30 },
            throttle: Throttle::new(10, 5, clock.clone()),
            work: Tasks::new(),
            rights: Arc::new(Rights::new(store.clone(), store.clone(), clock.clone())),
        };
        Self { accounts, clock, hashes }
    }

    async fn try_with(&self, name: &str, password: &str, from: u32) -> Result<(), Error> {
        let address = IpAddr::from((0x0a00_0000 + from).to_be_bytes());
        self.accounts.login(name, password.into(), LoginFrom { address: Some(address), ..LoginFrom::default() }).await.map(drop)
    }

    /// Password hashes since this was asked last.
    fn hashes(&self) -> usize {
        self.hashes.0.swap(0, Ordering::SeqCst)
    }
}

fn said(r: Result<(), Error>) -> (String, Option<Duration>) {
    match r {
        Ok(()) => ("in".into(), None),
        Err(Error::RateLimited { detail, wait }) => (detail.into(), Some(wait)),
        Err(e) => (e.to_string(), None),
    }
}

#[tokio::test]
async fn a_thousand_guesses_at_once_cost_five_hashes_and_lock_nobody_out_for_long() {
    let w = World::new().await;
    let guesses = (0..1_000).map(|n| {
        let w = &w;
        async move { w.try_with("ada", &format!("a guess {n}"), 1).await }
    });
    let answers = futures::future::join_all(guesses).await;
    assert_eq!(w.hashes(), 5);
    assert!(answers.iter().all(Result::is_err));
    assert!(said(w.try_with("ada", RIGHT, 1).await).1.is_some(), "the right one waits too, from there");
    assert_eq!(w.hashes(), 0);
    assert_eq!(said(w.try_with("ada", RIGHT, 2).await).0, "in", "and not from elsewhere");
    w.clock.0.fetch_add(60, Ordering::SeqCst);
    assert_eq!(said(w.try_with("ada", RIGHT, 1).await).0, "in", "a minute later it is taken");
}

#[tokio::test]
async fn many_addresses_together_get_no_more_than_ten() {
    let w = World::new().await;
    assert_eq!(said(w.try_with("ada", RIGHT, 1).await).0, "in");
    w.hashes();
    for from in 100..1_100 {
        let _ = w.try_with("ada", "a guess", from).await;
    }
    assert_eq!(w.hashes(), 50);
    assert_eq!(said(w.try_with("ada", RIGHT, 1).await).0, "in", "where ada has been before, she is not kept waiting");
}

#[tokio::test]
async fn names_that_nobody_has_are_answered_as_others_are() {
    let w = World::new().await;
    let mut answers = vec![];
    for (name, from) in [("ada", 1), ("nobody", 2)] {
        for _ in 0..7 {
            answers.push((said(w.try_with(name, "a guess", from).await), w.hashes()));
        }
    }
    assert_eq!(answers[..7], answers[7..]);
    assert_eq!(answers.iter().filter(|(_, hashes)| *hashes == 1).count(), 10);
}

#[tokio::test]
async fn who_has_a_token_cannot_guess_the_password_by_changing_it() {
    let w = World::new().await;
    let who = w.accounts.local_admin().await.unwrap();
    let mut refused = 0;
    for n in 0..20 {
        let change = w.accounts.change_password(&who, format!("a guess {n}"), "a new password".into()).await;
        refused += usize::from(matches!(change, Err(Error::RateLimited { .. })));
    }
    assert_eq!((w.hashes(), refused), (5, 15));
    w.clock.0.fetch_add(60, Ordering::SeqCst);
    w.accounts.change_password(&who, RIGHT.into(), "a new password".into()).await.unwrap();
}

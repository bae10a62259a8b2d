//! How often somebody may ask: requests of a principal, and tries to log in.
//!
//! A try to log in takes a token of its address, one of its account from there, and one of the account from
//! everywhere. It costs no password hash when one of them is missing, and gets them back when the password
//! was right. The first two are what a stranger feels. The third bounds those who come from many addresses;
//! it is not asked for from where the person has logged in before, so that nobody can lock a person out.

use crate::buckets::{Buckets, Rate};
use crate::error::{Error, Result};
use mesh_core::permission::Caller;
use mesh_core::{ApiKeyId, UserId};
use mesh_process::SharedClock;
use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{Semaphore, SemaphorePermit};

const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);
/// Networks at once that an account may be tried from, each at its full rate.
const NETWORKS_AT_ONCE: u64 = 10;
/// Tries that compute or wait for a password hash; more are refused.
pub const TRIES_AT_ONCE: usize = 64;
/// Where people have logged in, over all accounts; the oldest go first.
const KNOWN: usize = 10_000;

/// What one stranger can have many addresses of counts as one.
pub fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits() & !u128::from(u64::MAX)).into(),
        v4 => v4,
    }
}

/// Whose requests are counted together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Principal {
    User(UserId),
    Key(ApiKeyId),
    /// Of requests without credentials that count.
    Network(IpAddr),
}

impl Principal {
    pub fn of(caller: &Caller) -> Option<Self> {
        caller.key_id().map(Self::Key).or_else(|| caller.user().map(Self::User))
    }
    pub fn at(address: IpAddr) -> Self {
        Self::Network(network(address))
    }
    fn kind(self) -> &'static str {
        match self {
            Self::User(_) => "user",
            Self::Key(_) => "key",
            Self::Network(_) => "address",
        }
    }
}

/// Requests, and messages of streams, that a principal may send.
pub struct Rates {
    /// None: as many as they like.
    buckets: Option<Buckets<Principal>>,
    clock: SharedClock,
}

impl Rates {
    /// 0 a second: no limit.
    pub fn new(per_second: u64, burst: u64, clock: SharedClock) -> Self {
        Self { buckets: (per_second > 0).then(|| Buckets::new(Rate::new(SECOND, per_second, burst))), clock }
    }

    pub fn admit(&self, who: Principal) -> Result<()> {
        let Some(buckets) = &self.buckets else { return Ok(()) };
        buckets.take(who, self.clock.steady()).map_err(|wait| {
            metrics::counter!("cortex_rate_limited_total", "principal" => who.kind()).increment(1);
            Error::RateLimited { detail: "more requests than limits.api_per_second allows", wait }
        })
    }
}

/// A name that was given, whether or not there is such a user.
type Account = u64;

/// An account and where it was tried from; None is this machine.
type From = (Account, Option<IpAddr>);

pub struct Throttle {
    addresses: Buckets<IpAddr>,
    accounts: Buckets<From>,
    everywhere: Buckets<Account>,
    known: Mutex<HashMap<From, Duration>>,
    places: Semaphore,
    hasher: RandomState,
    clock: SharedClock,
}

/// Leave for one try. Dropped, it has failed.
pub struct Try<'t> {
    throttle: &'t Throttle,
    from: From,
    asked_everywhere: bool,
    _place: SemaphorePermit<'t>,
}

impl Throttle {
    pub fn new(per_minute_address: u64, per_minute_account: u64, clock: SharedClock) -> Self {
        let a_minute = |n| Rate::new(MINUTE, n, n);
        Self {
            addresses: Buckets::new(a_minute(per_minute_address)),
            accounts: Buckets::new(a_minute(per_minute_account)),
            everywhere: Buckets::new(a_minute(per_minute_account.saturating_mul(NETWORKS_AT_ONCE))),
            known: Mutex::default(),
            places: Semaphore::new(TRIES_AT_ONCE),
            hasher: RandomState::new(),
            clock,
        }
    }

    /// Before a password is looked at. Says the same of names that nobody has.
    pub fn admit(&self, name: &str, address: Option<IpAddr>) -> Result<Try<'_>> {
        let now = self.clock.steady();
        let from: From = (self.hasher.hash_one(name.to_ascii_lowercase()), address.map(network));
        let refuse = |by: &'static str, wait| {
            metrics::counter!("cortex_logins_throttled_total", "by" => by).increment(1);
            Error::RateLimited { detail: "too many tries with a password", wait }
        };
        let Ok(place) = self.places.try_acquire() else {
            metrics::counter!("cortex_logins_throttled_total", "by" => "busy").increment(1);
            let detail = "too many log in at this moment; try again".to_owned();
            return Err(Error::Unavailable { code: "busy", detail });
        };
        if let Some(network) = from.1 {
            self.addresses.take(network, now).map_err(|wait| refuse("address", wait))?;
        }
        let asked_everywhere = !self.known().contains_key(&from);
        let attempt = Try { throttle: self, from, asked_everywhere, _place: place };
        if let Err(wait) = self.accounts.take(from, now) {
            attempt.give_back_address();
            return Err(refuse("account", wait));
        }
        if asked_everywhere && let Err(wait) = self.everywhere.take(from.0, now) {
            attempt.give_back_address();
            self.accounts.give_back(&from);
            return Err(refuse("account", wait));
        }
        Ok(attempt)
    }

    fn known(&self) -> MutexGuard<'_, HashMap<From, Duration>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Try<'_> {
    /// The password was right: the try does not count.
    pub fn succeeded(self) {
        let t = self.throttle;
        self.give_back();
        let mut known = t.known();
        if known.len() >= KNOWN
            && !known.contains_key(&self.from)
            && let Some(oldest) = known.iter().min_by_key(|(_, at)| **at).map(|(from, _)| *from)
        {
            known.remove(&oldest);
        }
        known.insert(self.from, t.clock.steady());
    }

    /// Nobody looked at the password: the try does not count, and says nothing of who made it.
    pub fn not_looked_at(self) {
        self.give_back();
    }

    fn give_back(&self) {
        self.give_back_address();
        self.throttle.accounts.give_back(&self.from);
        if self.asked_everywhere {
            self.throttle.everywhere.give_back(&self.from.0);
        }
    }

    fn give_back_address(&self) {
        if let Some(network) = &self.from.1 {
            self.throttle.addresses.give_back(network);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_process::Clock;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    #[derive(Default)]
    struct Hands(AtomicU64);
    impl Clock for Hands {
        fn now_ms(&self) -> i64 {
            0
        }
        fn steady(&self) -> Duration {
            Duration::from_secs(self.0.load(Ordering::SeqCst))
        }
        fn anchored_ms(&self) -> i64 {
            0
        }
    }

    fn throttle() -> (Throttle, Arc<Hands>) {
        let clock = Arc::new(Hands(AtomicU64::new(1_000)));
        (Throttle::new(10, 5, clock.clone()), clock)
    }

    fn address(n: u32) -> Option<IpAddr> {
        Some(IpAddr::from((0x0a00_0000 + n).to_be_bytes()))
    }

    /// How many of a hundred wrong passwords are looked at.
    fn wrong(t: &Throttle, name: &str, from: Option<IpAddr>) -> usize {
        (0..100).filter(|_| t.admit(name, from).is_ok()).count()
    }

    fn wait(t: &Throttle, name: &str, from: Option<IpAddr>) -> Option<Duration> {
        match t.admit(name, from) {
            Err(Error::RateLimited { wait, .. }) => Some(wait),
            Err(e) => panic!("{e}"),
            Ok(_) => None,
        }
    }

    #[test]
    fn an_account_and_an_address_have_their_tries_a_minute() {
        let (t, clock) = throttle();
        assert_eq!(wrong(&t, "ada", address(1)), 5);
        assert_eq!(wait(&t, "ADA", address(1)), Some(Duration::from_secs(12)), "in whatever letters");
        assert_eq!(wrong(&t, "bob", address(1)), 5);
        assert_eq!(wrong(&t, "cid", address(1)), 0, "the address has had its ten");
        assert_eq!(wrong(&t, "cid", address(2)), 5);
        assert_eq!(wrong(&t, "cid", None), 5, "this machine has no address");
        clock.0.fetch_add(60, Ordering::SeqCst);
        assert_eq!((wrong(&t, "ada", address(1)), wrong(&t, "bob", address(1))), (5, 5));
    }

    #[test]
    fn a_right_password_does_not_count() {
        let (t, _) = throttle();
        for _ in 0..100 {
            t.admit("ada", address(1)).unwrap().succeeded();
        }
        assert_eq!(wrong(&t, "ada", address(1)), 5);
    }

    #[test]
    fn strangers_lock_nobody_out_of_where_they_have_been() {
        let (t, _) = throttle();
        t.admit("ada", address(1)).unwrap().succeeded();
        let tries: usize = (10..200).map(|n| wrong(&t, "ada", address(n))).sum();
        assert_eq!(tries, 50, "over all addresses");
        assert_eq!(wrong(&t, "ada", address(2)), 0);
        assert_eq!(wrong(&t, "bob", address(10)), 5, "what was refused did not count for the address");
        assert_eq!(wrong(&t, "ada", address(1)), 5, "but from where ada comes");
    }

    #[test]
    fn an_ipv6_network_is_one_address() {
        let ip = |text: &str| Some(text.parse::<IpAddr>().unwrap());
        let (t, _) = throttle();
        assert_eq!(wrong(&t, "ada", ip("2001:db8::1")), 5);
        assert_eq!(wrong(&t, "ada", ip("2001:db8::ffff:2")), 0);
        assert_eq!(wrong(&t, "ada", ip("2001:db8:0:1::1")), 5);
        assert_eq!(wrong(&t, "bob", ip("10.0.0.1")), 5);
        assert_eq!(wrong(&t, "bob", ip("::ffff:10.0.0.1")), 0, "IPv4 in either form");
    }

    #[test]
    fn few_wait_for_a_hash_at_once() {
        let (t, _) = throttle();
        let under_way: Vec<_> = (0..1_000).map(|n| t.admit(&n.to_string(), address(n))).collect();
        assert_eq!(under_way.iter().filter(|a| a.is_ok()).count(), TRIES_AT_ONCE);
        assert!(matches!(under_way[999], Err(Error::Unavailable { code: "busy", .. })));
        drop(under_way);
        assert!(t.admit("ada", address(9_999)).is_ok());
    }

    #[test]
    fn what_is_known_is_bounded() {
        let (t, clock) = throttle();
        for n in 0..KNOWN as u32 + 50 {
            clock.0.fetch_add(1, Ordering::SeqCst);
            t.admit("ada", address(n)).unwrap().succeeded();
        }
        let known = t.known();
        assert_eq!(known.len(), KNOWN);
        let has = |n| known.keys().any(|(_, network)| *network == address(n));
        assert!(!has(49) && has(50), "the oldest went");
    }

    #[test]
    fn requests_have_their_rate_and_no_limit_is_none() {
        let clock = Arc::new(Hands::default());
        let who = Principal::at("192.0.2.1".parse().unwrap());
        let rates = Rates::new(100, 200, clock.clone());
        assert_eq!((0..1_000).filter(|_| rates.admit(who).is_ok()).count(), 200);
        assert!(matches!(rates.admit(who), Err(Error::RateLimited { wait, .. }) if wait == Duration::from_millis(10)));
        clock.0.fetch_add(1, Ordering::SeqCst);
        assert_eq!((0..1_000).filter(|_| rates.admit(who).is_ok()).count(), 100);
        let free = Rates::new(0, 200, clock);
        assert!((0..1_000).all(|_| free.admit(who).is_ok()));
    }
}

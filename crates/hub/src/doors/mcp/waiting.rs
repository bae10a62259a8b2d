//! How many requests of MCP are under way: one that waits holds a connection and a task of the hub.

use crate::doors::rest::{Refusal, Who};
use axum::http::StatusCode;
use hub_engine::throttle::Principal;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// At a time, of one user or key.
const OF_ONE: usize = 64;
/// At a time, of all.
const OF_ALL: usize = 2048;

/// Who has how many under way. What comes by the control socket counts as its admin's.
#[derive(Debug, Clone, Default)]
pub struct Waiting(Arc<Mutex<HashMap<Principal, usize>>>);

/// One request; its end gives the place free.
#[derive(Debug)]
pub struct Place {
    who: Principal,
    all: Waiting,
}

impl Waiting {
    fn map(&self) -> MutexGuard<'_, HashMap<Principal, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn enter(&self, who: &Who) -> Result<Place, Refusal> {
        let who = Principal::of(who.caller()).ok_or_else(|| Refusal::new(StatusCode::FORBIDDEN, "forbidden", "only people have tools"))?;
        self.take(who)
    }

    fn take(&self, who: Principal) -> Result<Place, Refusal> {
        let mut map = self.map();
        let (own, all) = (map.get(&who).copied().unwrap_or(0), map.values().sum::<usize>());
        if own >= OF_ONE || all >= OF_ALL {
            let detail = format!("{own} requests of yours are under way here, and {all} in all; let some end first");
            return Err(Refusal { retry_secs: Some(1), ..Refusal::new(StatusCode::TOO_MANY_REQUESTS, "too_many_requests", detail) });
        }
        map.insert(who, own + 1);
        Ok(Place { who, all: self.clone() })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut map = self.all.map();
        if let Some(n) = map.get_mut(&self.who) {
            *n -= 1;
            if *n == 0 {
                map.remove(&self.who);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_that_waits_too_often_keeps_no_other_out() {
        let waiting = Waiting::default();
        let [one, other] = [1, 2].map(|n| Principal::User(mesh_core::UserId::from_bytes([n; 16])));
        let mut held: Vec<Place> = (0..OF_ONE).map(|_| waiting.take(one).unwrap()).collect();
        let refused = waiting.take(one).unwrap_err();
        assert_eq!((refused.status, refused.code, refused.retry_secs), (StatusCode::TOO_MANY_REQUESTS, "too_many_requests", Some(1)));
        drop(waiting.take(other).unwrap());
        held.pop();
        held.push(waiting.take(one).unwrap());
        drop(held);
        assert!(waiting.map().is_empty());
    }

    #[test]
    fn all_together_have_a_bound() {
        let waiting = Waiting::default();
        let user = |n: usize| Principal::User(mesh_core::UserId::from_bytes([n as u8; 16]));
        let held: Vec<Place> = (0..OF_ALL).map(|n| waiting.take(user(n % (OF_ALL / OF_ONE))).unwrap()).collect();
        assert_eq!(waiting.take(user(OF_ALL / OF_ONE)).unwrap_err().code, "too_many_requests");
        drop(held);
    }
}

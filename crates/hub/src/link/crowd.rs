//! How many of something one network has at this moment: nobody takes all the places that strangers share.

use hub_engine::throttle::network;
use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

#[derive(Debug)]
pub struct Crowd {
    most: u32,
    /// No network without a place stands in it.
    places: Mutex<HashMap<IpAddr, u32>>,
}

/// One place of a network, until it is dropped.
#[derive(Debug)]
pub struct Place {
    crowd: Arc<Crowd>,
    network: IpAddr,
}

impl Crowd {
    /// At most so many of each network.
    pub fn new(most: u32) -> Arc<Self> {
        Arc::new(Self { most, places: Mutex::default() })
    }

    pub fn enter(self: &Arc<Self>, address: IpAddr) -> Option<Place> {
        let network = network(address);
        let mut places = self.places();
        let taken = places.get(&network).copied().unwrap_or(0);
        (taken < self.most).then(|| {
            places.insert(network, taken + 1);
            Place { crowd: self.clone(), network }
        })
    }

    fn places(&self) -> MutexGuard<'_, HashMap<IpAddr, u32>> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut places = self.crowd.places();
        match places.get_mut(&self.network) {
            Some(taken) if *taken > 1 => *taken -= 1,
            _ => drop(places.remove(&self.network)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_network_has_its_places_and_leaves_nothing_behind() {
        let crowd = Crowd::new(3);
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        let all: Vec<_> = (0..5).filter_map(|n| crowd.enter(ip(&format!("2001:db8::{n}")))).collect();
        assert_eq!(all.len(), 3);
        let other = crowd.enter(ip("192.0.2.1")).expect("another network has places of its own");
        drop(all);
        assert!(crowd.enter(ip("2001:db8::9")).is_some());
        drop(other);
        assert!(crowd.places().is_empty());
    }
}

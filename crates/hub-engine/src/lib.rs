//! What the hub does, behind every door: registry, journal, pool, sessions, people.
//!
//! It owns the order of steps, authorisation and the ports. It does *not* know SQL, HTTP, gRPC,
//! JSON, cookies or private keys.

pub mod access;
pub mod accounts;
pub mod agents;
pub mod audit;
pub mod buckets;
pub mod bus;
pub mod copies;
pub mod delivery;
pub mod devices;
pub mod error;
pub mod events;
pub mod expiry;
mod fans;
pub mod grants;
pub mod health;
pub mod idempotency;
pub mod input;
pub mod leaving;
pub mod links;
pub mod manage;
pub mod memory;
pub mod messages;
pub mod nodes;
mod open_tasks;
pub mod pool;
pub mod ports;
pub mod queue;
pub mod records;
pub mod refusals;
pub mod restore;
pub mod retention;
pub mod rights;
pub mod rotation;
pub mod runs;
pub mod sessions;
pub mod state;
pub mod stats;
pub mod tasks;
pub mod throttle;
pub mod tracks;
pub mod users;
pub mod watch;

pub use error::{Error, Result};

//! How the hub keeps what it knows: the engine's ports on SQLite or PostgreSQL, task output in
//! append-only files; the bus that several hubs share on Redis. It does *not* know policy or HTTP.
//!
//! ```text
//! write ──► bounded queue ──► writer: one transaction, one commit for all that wait ──► answers
//! read  ──► a few read connections, each on the newest commit
//! ```
//! Statements are the same on both databases; [`dialect`] holds what is not. One process at a time may
//! have a data folder open (who takes that lock is somebody else's business); several hubs may share a
//! PostgreSQL database.

mod accounts;
mod agents;
mod audit;
pub mod backup;
mod bus;
mod dialect;
mod gauges;
mod grants;
mod idempotency;
mod journal;
mod lists;
mod memory;
mod messages;
mod meta;
mod nodes;
mod output;
mod purges;
mod retention;
mod rows;
mod sessions;
mod sql;
mod state;
mod store;
mod users;
mod writer;

pub use bus::{RedisBus, RedisPlan, RedisUrl};
pub use dialect::Database;
pub use dialect::postgres::Url;
pub use store::{OpenError, Store};

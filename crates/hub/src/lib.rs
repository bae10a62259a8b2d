//! The hub process: doors, node link, keys, configuration, wiring.
//!
//! It does *not* know SQL, state transitions or placement: a door unpacks, calls one function of
//! `hub-engine`, and packs the answer.

pub mod audit;
mod backup;
pub mod cli;
pub mod config;
pub mod doors;
pub mod keys;
pub mod link;
pub mod metrics;
mod otlp;
pub mod serve;

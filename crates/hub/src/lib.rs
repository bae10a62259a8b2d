//! The hub process: doors, node link, keys, configuration, wiring.
//!
//! It does *not* know SQL, state transitions or placement: a door unpacks, calls one function of
//! `hub-engine`, and packs the answer.

mod admin;
pub mod audit;
mod backup;
mod ca;
mod certificates;
pub mod cli;
pub mod config;
mod control;
pub mod doors;
pub mod keys;
pub mod link;
pub mod machine;
pub mod metrics;
mod otlp;
pub mod reach;
pub mod serve;

//! The daemon of a machine that joined a hub: when to run what.
//!
//! It holds the link, checks each signature and the policy again, and hands permission to the warden,
//! which alone starts processes. This crate does *not* know how confinement works, nor the hub's insides.

pub mod capabilities;
pub mod ceiling;
pub mod cli;
pub mod config;
pub mod daemon;
pub mod doctor;
pub mod enrolment;
pub mod link;
pub mod record;
pub mod skills;
pub mod state;
pub mod status;
pub mod tls;
pub mod trust;
pub mod warden;
pub mod way;
pub mod workspace;

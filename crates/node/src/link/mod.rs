//! The link to the hub, and the one loop that owns everything between hub and warden.
//!
//! ```text
//!            ┌─ waiting ◄──────────── lost, refused ─────────────┐
//!            ▼                                                   │
//!         dialling ── welcome ──► up ── goodbye, silence, error ─┘
//!                                 └── renewed: dial beside it, then swap
//! ```
//! A try whose certificate has ended asks for a new one first ([`recover`]).
//!
//! Readers only read and hand over. [`engine::Engine`] decides; it waits for nothing but its inputs,
//! and whatever it wants to send lies in a queue of its own until the transport has room. Control
//! frames have their own stream, and their own queue ahead of output.

pub mod ahead;
pub mod attempts;
pub mod backoff;
pub mod connect;
pub mod data;
pub mod engine;
pub mod orders;
pub mod recover;
pub mod time;
mod tracks;

pub const GOODBYE_SUPERSEDED: &str = "superseded";
pub const GOODBYE_REVOKED: &str = "revoked";
pub const GOODBYE_CERTIFICATE_EXPIRED: &str = "certificate_expired";

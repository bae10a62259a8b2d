//! Words and decisions of the mesh: ids, task states, attempts, specs, seals, permission, placement.
//!
//! Everything here is pure. This crate does *not* know tokio, files, the environment, a clock, SQL,
//! gRPC, HTTP or JSON: time and keys arrive as arguments, answers leave as values.

pub mod agent;
pub mod audit;
pub mod bundle;
pub mod canon;
pub mod capability;
pub mod ceiling;
pub mod enrol;
pub mod fan;
pub mod ids;
pub mod input;
pub mod lines;
pub mod name;
pub mod output;
pub mod permission;
pub mod placement;
pub mod policy;
pub mod seal;
pub mod select;
pub mod spec;
pub mod task;
mod terms;

pub use ids::*;

/// Milliseconds since the Unix epoch, UTC. The only form of wall-clock time inside the product.
pub type UnixMs = i64;

/// A SHA-256 digest.
pub type Digest = [u8; 32];

/// Hashes `bytes` with SHA-256 (FIPS 180-4).
pub fn sha256(bytes: &[u8]) -> Digest {
    use sha2::Digest as _;
    sha2::Sha256::digest(bytes).into()
}

//! What tests of the hub hold in place of the world: the ports in memory, for each port the suite
//! that every implementation passes, and servers to pass it on (PostgreSQL, Redis). It does *not* know SQL.

pub mod contract;
pub mod journal;
pub mod keys;
pub mod memory;
mod nowhere;
pub mod postgres;
pub mod redis;

pub use journal::TestJournal;
pub use keys::TestKeys;
pub use memory::MemoryStore;
pub use nowhere::Nowhere;

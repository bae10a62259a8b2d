//! What another version of us must be able to read: the node link's messages, the shapes of the
//! REST door, their limits, and the way from each to the words of `mesh-core` and back.
//!
//! This crate does *not* know storage, decisions or sockets.

pub mod convert;
pub mod invite;
pub mod limits;
pub mod rest;

/// Generated from `protos/cortex/node/v1`.
#[allow(clippy::all, clippy::disallowed_types, missing_docs)]
pub mod node {
    tonic::include_proto!("cortex.node.v1");
}

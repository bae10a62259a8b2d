//! The client of a cortex hub: a typed library over its REST door, and the `cortex` command that is
//! built on it.
//!
//! ```no_run
//! # async fn example() -> Result<(), cortex::Error> {
//! let client = cortex::Client::new("http://127.0.0.1:8080", cortex::Credentials::ApiKey("…".into()))?;
//! for node in client.nodes().await? {
//!     println!("{} {}", node.name, node.status);
//! }
//! # Ok(())
//! # }
//! ```
//!
//! The documents of the calls are those of [`mesh_wire::rest`], re-exported here as [`rest`]. This
//! crate does *not* know the hub's inside, and the library part neither reads the environment nor
//! writes files: credentials are given, and kept by a [`TokenStore`] that the caller brings.

mod calls;
pub mod cli;
mod client;
mod error;
mod follow;
mod follow_log;
pub mod mcp;
pub mod sse;

pub use calls::{AuditFilter, OutputQuery, Stream, TaskFilter};
pub use client::{Client, Credentials, TokenStore, Tokens};
pub use error::Error;
pub use follow::{Follow, OutputItem, Resume};
pub use follow_log::{FollowLog, LogItem};
pub use mesh_wire::rest;

//! Doors: thin adapters over `hub-engine`. Each unpacks, calls one function, and packs the answer.

mod call;
pub mod forwarded;
pub mod hosts;
pub mod https;
pub mod listener;
mod mcp;
pub mod rest;
mod rpc;
mod socket;
mod ws;

pub use mcp::Waiting;

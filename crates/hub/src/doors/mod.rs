//! Doors: thin adapters over `hub-engine`. Each unpacks, calls one function, and packs the answer.

mod call;
pub mod forwarded;
pub mod hosts;
pub mod https;
pub mod listener;
pub mod rest;
mod rpc;
mod socket;
mod ws;

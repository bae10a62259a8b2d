//! Doors: thin adapters over `hub-engine`. Each unpacks, calls one function, and packs the answer.

pub mod listener;
pub mod rest;
mod ws;

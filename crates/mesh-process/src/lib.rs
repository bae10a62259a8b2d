//! How a process of the mesh lives: named background tasks with an owner and an end, the clock,
//! randomness, telemetry, signals, private files, configuration files, the proxy that the environment names.
//!
//! This crate does *not* know tasks, nodes or any other noun of the domain. What it wraps is banned
//! elsewhere by lint (`tokio::spawn`, `Instant::now`, `env::var`, …), so that time, randomness and
//! background work are always given and never taken.

pub mod clock;
pub mod config;
pub mod entropy;
pub mod files;
pub mod proxy;
pub mod signals;
pub mod tasks;
pub mod telemetry;

pub use clock::{Clock, SharedClock, SystemClock};
pub use tasks::Tasks;
pub use tokio_util::sync::CancellationToken;

/// Makes aws-lc-rs the process's TLS provider. Called first in every `main` (and harmless twice).
pub fn install_tls_provider() {
    // An error only says that a provider is installed already.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
}

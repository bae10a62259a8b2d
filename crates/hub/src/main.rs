//! The hub process.

use std::process::ExitCode;

/// A task asks for memory many hundred times and gives it back on other threads: with the C library's
/// allocator that was a sixth of the hub's work, and the one of static programs is slower yet.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

#[tokio::main]
async fn main() -> ExitCode {
    mesh_process::install_tls_provider();
    cortex_hub::cli::run().await
}

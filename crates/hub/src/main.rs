//! The hub process.

use std::process::ExitCode;

#[tokio::main]
async fn main() -> ExitCode {
    mesh_process::install_tls_provider();
    cortex_hub::cli::run().await
}

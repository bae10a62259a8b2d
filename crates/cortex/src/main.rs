//! The `cortex` command; everything it does is in [`cortex::cli`].

use std::process::ExitCode;

fn main() -> ExitCode {
    mesh_process::install_tls_provider();
    ExitCode::from(cortex::cli::main(std::env::args_os()))
}

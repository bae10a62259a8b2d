//! The program `cortex-node`; everything it does stands in the library.

use clap::Parser;
use std::process::ExitCode;

fn main() -> ExitCode {
    mesh_process::install_tls_provider();
    match cortex_node::cli::main(cortex_node::cli::Cli::parse()) {
        Ok(code) => code,
        Err(e) => {
            let code = e.exit_code();
            eprintln!("cortex-node: {:#}", anyhow::Error::from(e));
            ExitCode::from(code)
        }
    }
}

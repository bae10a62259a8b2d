//! Chores of the house: the architecture check, throw-away certificates, benchmarks.
//!
//! Run as `cargo xtask <chore>`. Nothing here is shipped.

pub mod arch;
pub mod bench;
pub mod certs;

use clap::{Parser, Subcommand};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

#[derive(Parser)]
#[command(name = "xtask", about = "Chores of the house", arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    chore: Chore,
}

#[derive(Subcommand)]
enum Chore {
    /// Checks the rules of ARCHITECTURE.md against the crates as they are
    CheckArch,
    /// Makes a throw-away CA with a server and a client certificate in certs-dev/
    DevCerts {
        /// Replace what is there
        #[arg(long)]
        force: bool,
    },
    /// Not yet: thousands of simulated nodes against one hub
    Load(Rest),
    /// Takes figures beside a floor; see docs/profile.md
    #[command(subcommand)]
    Bench(bench::Bench),
    #[command(name = bench::floor::SUBCOMMAND, hide = true)]
    BenchFloor(bench::floor::Options),
    #[command(name = bench::rpc::SUBCOMMAND, hide = true)]
    BenchFloorHttp,
    /// Not yet: reference pages and clients from the contracts
    Generate(Rest),
}

#[derive(clap::Args)]
struct Rest {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, hide = true)]
    _rest: Vec<String>,
}

/// Exit codes: 0 fine, 1 a check failed, 2 wrong usage or a chore that is not there yet.
pub fn run() -> ExitCode {
    let done = match Cli::parse().chore {
        Chore::CheckArch => arch::run(),
        Chore::DevCerts { force } => root().and_then(|r| certs::make(&r.join("certs-dev"), force)).map(|()| true),
        Chore::Load(_) => return not_yet("load"),
        Chore::Bench(what) => bench::run(&what),
        Chore::BenchFloor(options) => bench::floor::child(&options).map(|()| true),
        Chore::BenchFloorHttp => bench::rpc::serve_floor().map(|()| true),
        Chore::Generate(_) => return not_yet("generate"),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(e) => {
            eprintln!("xtask: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn not_yet(chore: &str) -> ExitCode {
    eprintln!("xtask: `{chore}` is planned and not yet there");
    ExitCode::from(2)
}

/// The workspace's folder: the nearest one upwards that holds both `Cargo.toml` and `crates/`.
fn root() -> anyhow::Result<PathBuf> {
    let here = std::env::current_dir()?;
    here.ancestors()
        .find(|d| d.join("Cargo.toml").is_file() && d.join("crates").is_dir())
        .map(Path::to_path_buf)
        .ok_or_else(|| anyhow::anyhow!("{} is not inside the workspace", here.display()))
}

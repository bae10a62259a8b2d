//! `bench`: figures beside a floor, taken in one run on one machine.
//!
//! A benchmark is a program that prints a table and JSON; nothing here decides whether a build passes.
#![expect(clippy::disallowed_methods, reason = "a benchmark starts the real programs and watches the real clock")]

mod account;
mod dispatch;
pub mod floor;
mod load;
mod mesh;
mod noisy;
mod ready;
mod report;
pub mod rpc;
mod syncs;

use anyhow::{Context, Result, bail};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

#[derive(clap::Subcommand)]
pub enum Bench {
    /// A task from the caller to a process and back, beside a bare spawn
    Dispatch(dispatch::Options),
    /// A task that writes a gibibyte, and what the others feel of it
    Noisy(noisy::Options),
    /// The start of a hub with many tasks in its journal
    Ready(ready::Options),
    /// A call of JSON-RPC, beside a bare axum
    Rpc(rpc::Options),
}

pub fn run(what: &Bench) -> Result<bool> {
    let built = target()?.join("release");
    if cfg!(debug_assertions) {
        // An unoptimised client would take the cores from what it measures.
        return Err(again_optimised(&built)?);
    }
    match what {
        Bench::Dispatch(options) => to_its_end(dispatch::measure(options, &built)),
        Bench::Noisy(options) => to_its_end(noisy::measure(options, &built)),
        Bench::Ready(options) => to_its_end(ready::measure(options, &built)),
        Bench::Rpc(options) => to_its_end(rpc::measure(options, &built)),
    }
}

/// Runs a benchmark; Ctrl-C ends it and the processes that it has started.
fn to_its_end(work: impl Future<Output = Result<()>>) -> Result<bool> {
    mesh_process::install_tls_provider();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let interrupted = mesh_process::signals::shutdown();
        tokio::select! {
            done = work => done.map(|()| true),
            _ = interrupted => bail!("interrupted"),
        }
    })
}

/// Builds this program with optimisation and becomes it; returns only the reason why that failed.
fn again_optimised(built: &std::path::Path) -> Result<anyhow::Error> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let done = Command::new(cargo).args(["build", "--quiet", "--release", "--locked", "-p", "xtask"]).status();
    if !done.context("cargo build")?.success() {
        bail!("the benchmark itself does not build");
    }
    let program = built.join("xtask");
    let error = Command::new(&program).args(std::env::args_os().skip(1)).exec();
    Ok(anyhow::Error::new(error).context(program.display().to_string()))
}

/// Where cargo puts what it builds.
fn target() -> Result<PathBuf> {
    let meta = cargo_metadata::MetadataCommand::new().no_deps().exec().context("cargo metadata")?;
    Ok(meta.target_directory.into_std_path_buf())
}

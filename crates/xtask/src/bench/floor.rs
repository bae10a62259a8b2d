//! The floor: the same program started with the standard library, without network or journal.

use super::account;
use super::report::percentile;
use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

pub const PROGRAM: &str = "/bin/true";
/// The name under which this program measures the floor in a process of its own, whose memory is small.
pub const SUBCOMMAND: &str = "bench-floor";

#[derive(clap::Args)]
pub struct Options {
    #[arg(long)]
    threads: usize,
    #[arg(long)]
    count: usize,
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Floor {
    pub p50_ms: f64,
    pub p99_ms: f64,
    pub per_s: f64,
    /// CPU seconds per thousand.
    pub cpu: f64,
}

/// The other side of [`measure`]: prints one [`Floor`] as JSON.
pub fn child(o: &Options) -> Result<()> {
    ensure!(o.threads > 0 && o.count > 0, "threads and count must not be 0");
    let cpu = account::of_process("self")?;
    let (next, begun) = (AtomicUsize::new(0), Instant::now());
    let work = || -> Result<Vec<f64>> {
        let mut times = vec![];
        while next.fetch_add(1, Ordering::Relaxed) < o.count {
            let at = Instant::now();
            let out = Command::new(PROGRAM).output().context(PROGRAM)?;
            ensure!(out.status.success(), "{PROGRAM}: {}", out.status);
            times.push(at.elapsed().as_secs_f64() * 1e3);
        }
        Ok(times)
    };
    let times: Result<Vec<_>> = std::thread::scope(|s| {
        let threads: Vec<_> = (0..o.threads).map(|_| s.spawn(work)).collect();
        threads.into_iter().map(|t| t.join().unwrap_or_else(|_| Err(anyhow::anyhow!("a thread of the floor panicked")))).collect()
    });
    let (secs, mut times) = (begun.elapsed().as_secs_f64(), times?.concat());
    let cpu = account::of_process("self")?.since(&cpu);
    let per_s = o.count as f64 / secs;
    let cpu = (cpu.own + cpu.children) * 1e3 / o.count as f64;
    let floor = Floor { p50_ms: percentile(&mut times, 0.50), p99_ms: percentile(&mut times, 0.99), per_s, cpu };
    println!("{}", serde_json::to_string(&floor)?);
    Ok(())
}

pub fn measure(threads: usize, count: usize) -> Result<Floor> {
    let own = std::env::current_exe()?;
    let out = Command::new(own).args([SUBCOMMAND, "--threads", &threads.to_string(), "--count", &count.to_string()]).output()?;
    ensure!(out.status.success(), "the floor: {}", String::from_utf8_lossy(&out.stderr));
    serde_json::from_slice(&out.stdout).context("the floor's answer")
}

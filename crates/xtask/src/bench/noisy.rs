//! `bench noisy`: one task that writes without end, and what the others feel of it.
//!
//! The floor is the same command into a pipe of this process.

use super::account;
use super::dispatch::{GRACE, WAIT_SECS};
use super::load::Door;
use super::mesh::Mesh;
use super::report::{Goal, Table, percentile};
use anyhow::{Context, Result, ensure};
use cortex::rest::{DispatchRequest, ShellRequest};
use mesh_process::Tasks;
use serde_json::json;
use std::cell::Cell;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const LOOK: Duration = Duration::from_millis(20);
const MIB: f64 = 1_048_576.0;

#[derive(clap::Args)]
pub struct Options {
    /// How many times all is measured
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// What the noisy task writes
    #[arg(long, default_value_t = 1024)]
    mib: u64,
    /// Tasks that tell how quick others are while it is quiet
    #[arg(long, default_value_t = 300)]
    others: usize,
    /// Also write the figures here as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

pub async fn measure(o: &Options, built: &Path) -> Result<()> {
    let mesh = Mesh::start(built).await.context("starting a hub and a node")?;
    let door = Door { address: mesh.address.clone(), token: mesh.token.clone(), connections: Tasks::new() };
    let other = json!({"node": mesh.node_id, "shell": {"argv": ["true"]}, "wait_secs": WAIT_SECS});
    door.run(&other, 100, 8).await.context("warming up")?;
    let mut figures = Table::default();
    for round in 1..=o.rounds {
        eprintln!("round {round} of {}", o.rounds);
        one_round(o, &mesh, &door, &other, &mut figures).await?;
    }
    door.connections.end(GRACE).await;
    figures.print();
    if let Some(path) = &o.json {
        let all = json!({"rounds": o.rounds, "mib": o.mib, "figures": figures.rows});
        std::fs::write(path, serde_json::to_vec_pretty(&all)?).with_context(|| path.display().to_string())?;
    }
    Ok(())
}

async fn one_round(o: &Options, mesh: &Mesh, door: &Door, other: &serde_json::Value, figures: &mut Table) -> Result<()> {
    let bytes = o.mib * 1_048_576;
    let script = format!("yes | head -c {bytes}");
    figures.add("floor: into a pipe", "MiB/s", None, floor(&script, bytes)?);

    let mut quiet = door.run(other, o.others, 1).await.context("the others while it is quiet")?;
    let quiet = percentile(&mut quiet.times_ms, 0.99);
    figures.add("others while it is quiet, p99", "ms", None, quiet);

    let request = DispatchRequest {
        node: Some(mesh.node_id.clone()),
        shell: Some(ShellRequest { argv: Some(["sh", "-c", &script].map(str::to_owned).to_vec()), ..ShellRequest::default() }),
        ..DispatchRequest::default()
    };
    let (begun, ended) = (Instant::now(), Cell::new(false));
    let task = mesh.client.dispatch(None, &request).await?;
    let mut peak = [0.0_f64; 3];
    let noisy = async {
        loop {
            tokio::time::sleep(LOOK).await;
            for (peak, (_, pid)) in peak.iter_mut().zip(mesh.pids.named()) {
                *peak = peak.max(account::resident(pid)?);
            }
            let now = mesh.client.task(&task.id).await?;
            if now.finished_at.is_some() {
                ended.set(true);
                return anyhow::Ok((now, begun.elapsed().as_secs_f64()));
            }
        }
    };
    let ((task, secs), mut others) = tokio::try_join!(noisy, door.run_while(other, 1, |_| !ended.get()))?;
    ensure!(task.state == "succeeded", "the noisy task ended as {}: {:?}", task.state, task.reason);
    ensure!(task.stdout_bytes == bytes, "{} of {bytes} bytes came through", task.stdout_bytes);
    figures.add("through", "MiB/s", Some(Goal::AtLeast(200.0)), bytes as f64 / MIB / secs);
    let noisy = percentile(&mut others.times_ms, 0.99);
    figures.add("others beside it, p50", "ms", None, percentile(&mut others.times_ms, 0.50));
    figures.add("others beside it, p99", "ms", None, noisy);
    figures.add("… p99 over the quiet one", "ms", Some(Goal::AtMost(5.0)), noisy - quiet);
    for ((name, _), peak) in mesh.pids.named().iter().zip(peak) {
        let what = match *name {
            "hub" => "hub, most memory",
            "warden" => "warden, most memory",
            _ => "node daemon, most memory",
        };
        figures.add(what, "MiB", None, peak);
    }
    Ok(())
}

fn floor(script: &str, bytes: u64) -> Result<f64> {
    let begun = Instant::now();
    let mut child = Command::new("sh").args(["-c", script]).stdout(Stdio::piped()).stdin(Stdio::null()).spawn()?;
    let mut from = child.stdout.take().context("no pipe")?;
    let (mut buffer, mut seen) = (vec![0; 64 << 10], 0u64);
    loop {
        match from.read(&mut buffer)? {
            0 => break,
            n => seen += n as u64,
        }
    }
    ensure!(child.wait()?.success() && seen == bytes, "the floor wrote {seen} of {bytes} bytes");
    Ok(bytes as f64 / MIB / begun.elapsed().as_secs_f64())
}

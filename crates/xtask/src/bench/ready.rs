//! `bench ready`: from the start of a hub's process until it serves, with many tasks in its journal.

use super::dispatch::{GRACE, WAIT_SECS};
use super::load::Door;
use super::mesh::Mesh;
use super::report::{Goal, Table};
use anyhow::{Context, Result};
use cortex::rest::{DispatchRequest, ShellRequest};
use mesh_process::Tasks;
use serde_json::json;
use std::path::{Path, PathBuf};

const IN_FLIGHT: usize = 256;

#[derive(clap::Args)]
pub struct Options {
    /// Tasks that have ended
    #[arg(long, default_value_t = 1_000_000)]
    tasks: usize,
    /// Tasks that wait for a node which is away: each is taken up when the hub starts
    #[arg(long, default_value_t = 1_000)]
    waiting: usize,
    /// How many times the hub is started
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Also write the figures here as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

pub async fn measure(o: &Options, built: &Path) -> Result<()> {
    let mut mesh = Mesh::start(built).await.context("starting a hub and a node")?;
    let door = Door { address: mesh.address.clone(), token: mesh.token.clone(), connections: Tasks::new() };
    let echo = json!({"node": mesh.node_id, "echo": {"payload": "x"}, "wait_secs": WAIT_SECS});
    eprintln!("{} tasks that end, then {} that wait", o.tasks, o.waiting);
    door.run(&echo, o.tasks, IN_FLIGHT).await.context("filling the journal")?;
    door.connections.end(GRACE).await;
    mesh.stop_node();
    let shell = ShellRequest { argv: Some(vec!["true".into()]), ..ShellRequest::default() };
    let request = DispatchRequest { node: Some(mesh.node_id.clone()), shell: Some(shell), ..DispatchRequest::default() };
    for _ in 0..o.waiting {
        mesh.client.dispatch(None, &request).await.context("a task that waits")?;
    }
    let mut figures = Table::default();
    for round in 1..=o.rounds {
        eprintln!("start {round} of {}", o.rounds);
        let took = mesh.restart_hub().await?;
        figures.add("hub, from its start until it serves", "ms", Some(Goal::AtMost(1_000.0)), took.as_secs_f64() * 1e3);
    }
    figures.print();
    if let Some(path) = &o.json {
        let all = json!({"rounds": o.rounds, "tasks": o.tasks, "waiting": o.waiting, "figures": figures.rows});
        std::fs::write(path, serde_json::to_vec_pretty(&all)?).with_context(|| path.display().to_string())?;
    }
    Ok(())
}

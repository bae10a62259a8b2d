//! `bench rpc`: what a call costs at the JSON-RPC door, beside a bare axum that answers as much.
//!
//! The floor is a process of its own on the same cores, and is measured in turn with the hub.

use super::load::Door;
use super::mesh::Mesh;
use super::report::{Goal, Table, percentile};
use anyhow::{Context, Result, ensure};
use axum::Json;
use axum::routing::post;
use mesh_process::Tasks;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// The name under which this program serves the floor in a process of its own.
pub const SUBCOMMAND: &str = "bench-floor-http";
const GRACE: Duration = Duration::from_secs(5);

#[derive(clap::Args)]
pub struct Options {
    /// How many times all is measured
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Calls of a round; figures of fewer than 20000 are not trusted
    #[arg(long, default_value_t = 50_000)]
    calls: usize,
    /// Calls in flight, each on a connection of its own
    #[arg(long, default_value_t = 32)]
    in_flight: usize,
    /// Also write the figures here as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// The other side of [`Floor`]: reads a call, answers it with as much as the hub does, until its input ends.
pub fn serve_floor() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let answer = async |Json(call): Json<Value>| {
            let result = json!({"status": "ok", "version": "0.0.0", "uptime_secs": 1, "timestamp": "2026-01-01T00:00:00.000Z"});
            Json(json!({"jsonrpc": "2.0", "result": result, "id": call["id"]}))
        };
        let app = axum::Router::new().route("/rpc", post(answer));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
        println!("{}", listener.local_addr()?);
        let owner_is_gone = async {
            let _ = tokio::task::spawn_blocking(|| std::io::stdin().read_to_end(&mut vec![])).await;
        };
        tokio::select! {
            served = async { axum::serve(listener, app).await } => served.context("the floor"),
            () = owner_is_gone => Ok(()),
        }
    })
}

/// A bare axum, which ends with its owner.
struct Floor {
    child: Child,
    address: String,
}

impl Floor {
    fn start() -> Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        let mut child = command.arg(SUBCOMMAND).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context("the floor")?;
        let mut address = String::new();
        BufReader::new(child.stdout.take().context("the floor says nothing")?).read_line(&mut address)?;
        ensure!(!address.trim().is_empty(), "the floor did not begin");
        Ok(Self { child, address: address.trim().to_owned() })
    }
}

impl Drop for Floor {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub async fn measure(o: &Options, built: &Path) -> Result<()> {
    ensure!(o.calls > 0 && o.in_flight > 0, "calls and in-flight must not be 0");
    let mesh = Mesh::start(built).await.context("starting a hub and a node")?;
    let floor = Floor::start()?;
    let door = |address: &str| Door { address: address.to_owned(), token: mesh.token.clone(), connections: Tasks::new() };
    let (bare, hub) = (door(&floor.address), door(&mesh.address));
    let call = |method: &str, params: Value| json!({"jsonrpc": "2.0", "method": method, "params": params, "id": 1});
    let (health, read) = (call("system.health", json!({})), call("node.get", json!([mesh.node_id])));
    let mut figures = Table::default();
    for round in 1..=o.rounds {
        eprintln!("round {round} of {}", o.rounds);
        let mut take = async |door: &Door, body: &Value, rate, slowest| {
            let mut run = door.calls("/rpc", body, o.calls, o.in_flight).await?;
            figures.add(rate, "/s", None, run.per_s());
            figures.add(slowest, "ms", None, percentile(&mut run.times_ms, 0.99));
            anyhow::Ok(run.per_s())
        };
        let floor = take(&bare, &health, "bare axum", "bare axum, p99").await.context("bare axum")?;
        let healths = take(&hub, &health, "system.health", "system.health, p99").await.context("system.health")?;
        let reads = take(&hub, &read, "node.get, authenticated", "node.get, p99").await.context("node.get")?;
        figures.add("system.health beside bare axum", "ratio", Some(Goal::AtLeast(0.6)), healths / floor);
        figures.add("authenticated read beside bare axum", "ratio", Some(Goal::AtLeast(0.4)), reads / floor);
    }
    bare.connections.end(GRACE).await;
    hub.connections.end(GRACE).await;
    figures.print();
    if let Some(path) = &o.json {
        let all = json!({"rounds": o.rounds, "calls": o.calls, "in_flight": o.in_flight, "figures": figures.rows});
        std::fs::write(path, serde_json::to_vec_pretty(&all)?).with_context(|| path.display().to_string())?;
    }
    Ok(())
}

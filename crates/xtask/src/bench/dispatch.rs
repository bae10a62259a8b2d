//! `bench dispatch`: what a task costs beyond the process that it starts.
//!
//! Floor and mesh are measured in turn, round by round, on the same cores: a ratio stands when a time
//! alone says nothing.

use super::account::{self, Cpu};
use super::floor::{self, Floor};
use super::load::{Door, Run};
use super::mesh::Mesh;
use super::report::{Goal, Table, percentile};
use super::syncs;
use anyhow::{Context, Result, bail};
use cortex::rest::{DispatchRequest, ShellRequest};
use cortex::{OutputItem, Resume};
use mesh_process::Tasks;
use serde_json::json;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// A floor below half of this tells of a machine that was busy with something else.
const QUIET_FLOOR_PER_S: f64 = 3_700.0;
const TRUE_IN_FLIGHT: usize = 64;
const ECHO_IN_FLIGHT: usize = 256;
pub const WAIT_SECS: u64 = 60;
/// For one round; longer means that something hangs.
const ROUND_PATIENCE: Duration = Duration::from_secs(300);
pub const GRACE: Duration = Duration::from_secs(5);

#[derive(clap::Args)]
pub struct Options {
    /// How many times all is measured
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Tasks of a round with 64 in flight; figures of fewer than 8000 are not trusted
    #[arg(long, default_value_t = 8_000)]
    tasks: usize,
    /// `echo` tasks of a round with 256 in flight
    #[arg(long, default_value_t = 20_000)]
    echo_tasks: usize,
    /// Tasks of a round, one after the other
    #[arg(long, default_value_t = 500)]
    sequential: usize,
    /// Tasks of a round whose first output is waited for
    #[arg(long, default_value_t = 25)]
    outputs: usize,
    /// Also write the figures here as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Also count the syncs of one task and of 64 at once (needs strace)
    #[arg(long)]
    syncs: bool,
}

/// Who used the CPU in one phase.
struct Phase {
    processes: [Cpu; 3],
    client: Cpu,
    machine: f64,
}

impl Phase {
    fn now(mesh: &Mesh) -> Result<Self> {
        let mut processes = [Cpu::default(); 3];
        for (cpu, (_, pid)) in processes.iter_mut().zip(mesh.pids.named()) {
            *cpu = account::of_process(pid)?;
        }
        Ok(Self { processes, client: account::of_process("self")?, machine: account::of_machine()? })
    }

    /// Adds what was used since, in CPU seconds per thousand tasks.
    fn add(&self, mesh: &Mesh, tasks: usize, what: &'static str, table: &mut Table) -> Result<()> {
        let now = Self::now(mesh)?;
        let mut add = |unit, secs: f64| table.add(what, unit, None, secs * 1e3 / tasks as f64);
        let [hub, daemon, warden] = std::array::from_fn(|i| now.processes[i].since(&self.processes[i]));
        add("hub", hub.own);
        add("node daemon", daemon.own);
        add("warden", warden.own);
        add("children", warden.children);
        add("client", now.client.since(&self.client).own);
        add("whole machine", now.machine - self.machine);
        Ok(())
    }
}

pub async fn measure(o: &Options, built: &Path) -> Result<()> {
    if o.syncs {
        syncs::check()?;
    }
    let mesh = Mesh::start(built).await.context("starting a hub and a node")?;
    let door = Door { address: mesh.address.clone(), token: mesh.token.clone(), connections: Tasks::new() };
    let spawn = json!({"node": mesh.node_id, "shell": {"argv": ["true"]}, "wait_secs": WAIT_SECS});
    let echo = json!({"node": mesh.node_id, "echo": {"payload": "x"}, "wait_secs": WAIT_SECS});

    let mut memory = Table::default();
    let resident = |table: &mut Table, what| -> Result<()> {
        for (name, pid) in mesh.pids.named() {
            table.add(what, name, None, account::resident(pid)?);
        }
        Ok(())
    };
    resident(&mut memory, "idle")?;
    let idle = |i: usize| memory.rows.get(i).map_or(f64::NAN, |r| r.median);
    let (hub_idle, node_idle) = (idle(0), idle(1) + idle(2));

    // What is slow only the first time is not what is asked.
    door.run(&spawn, 100, 8).await.context("warming up")?;
    door.run(&echo, 500, 64).await.context("warming up")?;

    let (mut figures, mut cpu) = (Table::default(), Table::default());
    let mut void_rounds = vec![];
    for round in 1..=o.rounds {
        eprintln!("round {round} of {}", o.rounds);
        let work = one_round(o, &mesh, &door, &spawn, &echo, &mut figures, &mut cpu);
        let floor = tokio::time::timeout(ROUND_PATIENCE, work).await.context("a round hangs")??;
        if floor < QUIET_FLOOR_PER_S / 2.0 {
            void_rounds.push(round);
        }
    }
    figures.add("hub, idle", "MiB", Some(Goal::AtMost(40.0)), hub_idle);
    figures.add("node daemon + warden, idle", "MiB", Some(Goal::AtMost(25.0)), node_idle);
    resident(&mut memory, "afterwards")?;

    let mut counts = vec![];
    if o.syncs {
        for at_once in [1, TRUE_IN_FLIGHT] {
            let work = async { door.run(&spawn, at_once, at_once).await.map(drop) };
            counts.push((at_once, syncs::during(&mesh, work).await?));
        }
    }
    door.connections.end(GRACE).await;

    figures.print();
    println!("\nCPU seconds per 1000 tasks (medians)");
    cpu.print_by_unit();
    println!("\nResident memory, MiB");
    memory.print_by_unit();
    for (at_once, counts) in &counts {
        println!("\nSyncs of {at_once} task{}", if *at_once == 1 { "" } else { "s at once" });
        for c in counts {
            println!("{:14} {} fdatasync, {} fsync", c.process, c.fdatasync, c.fsync);
        }
    }
    if !void_rounds.is_empty() {
        println!("\nVOID: in rounds {void_rounds:?} the floor was under half of {QUIET_FLOOR_PER_S}/s; the machine was busy");
    }
    if let Some(path) = &o.json {
        let syncs: Vec<_> = counts.iter().map(|(n, c)| json!({"tasks": n, "processes": c})).collect();
        let all = json!({
            "cores": std::thread::available_parallelism().map_or(0, usize::from),
            "rounds": o.rounds, "void_rounds": void_rounds,
            "tasks": o.tasks, "echo_tasks": o.echo_tasks, "sequential": o.sequential, "outputs": o.outputs,
            "figures": figures.rows, "cpu_secs_per_1000": cpu.rows, "memory": memory.rows, "syncs": syncs,
        });
        std::fs::write(path, serde_json::to_vec_pretty(&all)?).with_context(|| path.display().to_string())?;
    }
    Ok(())
}

/// Gives the best rate of the floor.
async fn one_round(
    o: &Options,
    mesh: &Mesh,
    door: &Door,
    spawn: &serde_json::Value,
    echo: &serde_json::Value,
    figures: &mut Table,
    cpu: &mut Table,
) -> Result<f64> {
    let alone = floor::measure(1, o.sequential.max(1))?;
    figures.add("floor, one at a time, p50", "ms", None, alone.p50_ms);
    figures.add("floor, one at a time, p99", "ms", None, alone.p99_ms);
    let mut best: Floor = alone;
    figures.add("floor, 1 thread", "/s", None, alone.per_s);
    for (threads, what) in [(2, "floor, 2 threads"), (64, "floor, 64 threads")] {
        let f = floor::measure(threads, o.tasks / 2)?;
        figures.add(what, "/s", None, f.per_s);
        if f.per_s > best.per_s {
            best = f;
        }
    }
    cpu.add("floor, its best", "children", None, best.cpu);

    let before = Phase::now(mesh)?;
    let mut one = door.run(spawn, o.sequential, 1).await.context("`true`, one at a time")?;
    before.add(mesh, o.sequential, "`true`, one at a time", cpu)?;
    let p50 = percentile(&mut one.times_ms, 0.50);
    figures.add("`true`, one at a time, p50", "ms", None, p50);
    figures.add("`true`, one at a time, p99", "ms", None, percentile(&mut one.times_ms, 0.99));
    figures.add("… p50 over the floor's", "ms", Some(Goal::AtMost(1.0)), p50 - alone.p50_ms);

    let before = Phase::now(mesh)?;
    let many = door.run(spawn, o.tasks, TRUE_IN_FLIGHT).await.context("`true`, 64 in flight")?;
    before.add(mesh, o.tasks, "`true`, 64 in flight", cpu)?;
    rate(figures, ["`true`, 64 in flight", "… p50", "… p99"], many, None, |figures, per_s| {
        figures.add("… of the floor's best", "ratio", Some(Goal::AtLeast(0.80)), per_s / best.per_s);
    });

    let before = Phase::now(mesh)?;
    let echoes = door.run(echo, o.echo_tasks, ECHO_IN_FLIGHT).await.context("`echo`, 256 in flight")?;
    before.add(mesh, o.echo_tasks, "`echo`, 256 in flight", cpu)?;
    let names = ["`echo`, 256 in flight", "… echo p50", "… echo p99"];
    rate(figures, names, echoes, Some(Goal::AtLeast(20_000.0)), |_, _| {});

    let mut delays = vec![];
    for _ in 0..o.outputs {
        delays.push(first_output_ms(mesh).await.context("the first output")?);
    }
    figures.add("first output at the caller, p50", "ms", Some(Goal::AtMost(5.0)), percentile(&mut delays, 0.50));
    figures.add("first output at the caller, p99", "ms", Some(Goal::AtMost(25.0)), percentile(&mut delays, 0.99));
    Ok(best.per_s)
}

fn rate(figures: &mut Table, names: [&'static str; 3], mut run: Run, goal: Option<Goal>, also: impl FnOnce(&mut Table, f64)) {
    figures.add(names[0], "/s", goal, run.per_s());
    also(figures, run.per_s());
    figures.add(names[1], "ms", None, percentile(&mut run.times_ms, 0.50));
    figures.add(names[2], "ms", None, percentile(&mut run.times_ms, 0.99));
}

/// From when a task reads the clock and prints it until its follower has the line.
async fn first_output_ms(mesh: &Mesh) -> Result<f64> {
    // The follower must be there first.
    let script = "sleep 0.2; exec date +%s%N";
    let request = DispatchRequest {
        node: Some(mesh.node_id.clone()),
        shell: Some(ShellRequest { argv: Some(["sh", "-c", script].map(str::to_owned).to_vec()), ..ShellRequest::default() }),
        ..DispatchRequest::default()
    };
    let task = mesh.client.dispatch(None, &request).await?;
    let mut follow = mesh.client.follow_output(&task.id, Resume::Start);
    let mut delay = None;
    while let Some(item) = follow.next().await? {
        match item {
            OutputItem::Output { data, .. } if delay.is_none() => {
                let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos();
                let printed: u128 = std::str::from_utf8(&data)?.trim().parse().context("what the task printed")?;
                delay = Some((now as f64 - printed as f64) / 1e6);
            }
            OutputItem::Broken { reason, .. } => bail!("the stream broke: {reason}"),
            OutputItem::End(task) if task.state != "succeeded" => bail!("the task ended as {}: {:?}", task.state, task.reason),
            _ => {}
        }
    }
    delay.context("the task printed nothing")
}

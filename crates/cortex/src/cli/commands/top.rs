//! `node top`: the load of the machines, again and again.

use super::Context;
use super::node::standing;
use crate::cli::args::Format;
use crate::cli::{Fail, output};
use crate::rest::{MemoryView, NodeSample, NodeStatusView, NodeView};
use futures::StreamExt as _;
use serde::Serialize;
use std::io::IsTerminal as _;
use std::time::Duration;

const EVERY: Duration = Duration::from_secs(2);
/// Machines whose load is asked for; a screen shows no more.
const ROWS: usize = 100;
/// Questions on the way to the hub at once.
const AT_ONCE: usize = 8;
/// Places of the little graph.
const GRAPH: usize = 12;

/// The screen beside the one with the history, cleared; and back.
const ENTER: &str = "\x1b[?1049h\x1b[?25l";
const LEAVE: &str = "\x1b[?25h\x1b[?1049l";
const HOME: &str = "\x1b[H";
const CLEAR_LINE_END: &str = "\x1b[K";
const CLEAR_BELOW: &str = "\x1b[J";

/// A machine and its load, where it is here.
#[derive(Serialize)]
struct Row {
    node: NodeView,
    status: Option<NodeStatusView>,
}

pub(super) async fn perform(select: Option<&str>, context: &mut Context<'_, '_>) -> Result<(), Fail> {
    if context.format() == Format::Json || !std::io::stdout().is_terminal() {
        let (rows, more) = look(select, context).await?;
        return print(&rows, more, context);
    }
    write!(context.io.out, "{ENTER}")?;
    let watched = tokio::select! {
        biased;
        _ = mesh_process::signals::shutdown() => Ok(()),
        watched = watch(select, context) => watched,
    };
    write!(context.io.out, "{LEAVE}")?;
    context.io.out.flush()?;
    watched
}

async fn watch(select: Option<&str>, context: &mut Context<'_, '_>) -> Result<(), Fail> {
    let mut failed = 0;
    loop {
        let text = match look(select, context).await {
            Ok((rows, more)) => {
                failed = 0;
                format!("{}\nCtrl-C ends this\n", table(&rows, more)?)
            }
            // A hub that is being restarted is worth waiting for; one that says no is not.
            Err(Fail::Hub(e)) if e.status().is_none() => {
                failed += 1;
                format!("the hub does not answer ({failed}): {}\n", output::clean(&e.to_string()))
            }
            Err(e) => return Err(e),
        };
        let lines: String = text.lines().map(|l| format!("{l}{CLEAR_LINE_END}\r\n")).collect();
        write!(context.io.out, "{HOME}{lines}{CLEAR_BELOW}")?;
        context.io.out.flush()?;
        tokio::time::sleep(EVERY).await;
    }
}

/// The machines by name, those that are here first; and how many more there are.
async fn look(select: Option<&str>, context: &Context<'_, '_>) -> Result<(Vec<Row>, usize), Fail> {
    let mut nodes = context.client.nodes_where(select).await?;
    nodes.retain(|n| n.status != "revoked");
    nodes.sort_by(|a, b| (a.status == "offline", &a.name, &a.id).cmp(&(b.status == "offline", &b.name, &b.id)));
    let more = nodes.len().saturating_sub(ROWS);
    nodes.truncate(ROWS);
    let client = &context.client;
    let asked = futures::stream::iter(nodes).map(|node| async move {
        if node.status == "offline" {
            return Ok(Row { node, status: None });
        }
        match client.node_status(&node.id).await {
            Ok(status) => Ok(Row { node, status: Some(status) }),
            // Removed since the list was read.
            Err(e) if e.status() == Some(404) => Ok(Row { node, status: None }),
            Err(e) => Err(e),
        }
    });
    let rows: Vec<Result<Row, crate::Error>> = asked.buffered(AT_ONCE).collect().await;
    Ok((rows.into_iter().collect::<Result<_, _>>()?, more))
}

const COLUMNS: [&str; 9] = ["name", "status", "running", "cpu", "last hour", "load", "memory", "disk", "round trip"];

fn print(rows: &[Row], more: usize, context: &mut Context<'_, '_>) -> Result<(), Fail> {
    output::list(context.io, context.format(), rows, &COLUMNS, cells)?;
    if more > 0 {
        context.tell(&format!("and {more} more; narrow it with --select"));
    }
    Ok(())
}

/// The table as text, for the screen.
fn table(rows: &[Row], more: usize) -> Result<String, Fail> {
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let mut io = crate::cli::Io { out: &mut out, err: &mut err };
    output::list(&mut io, Format::Table, rows, &COLUMNS, cells)?;
    let mut text = String::from_utf8_lossy(&out).into_owned();
    if more > 0 {
        text.push_str(&format!("and {more} more; narrow it with --select\n"));
    }
    Ok(text)
}

fn cells(row: &Row) -> Vec<String> {
    let (n, s) = (&row.node, row.status.as_ref());
    let share = |m: Option<&MemoryView>| match m.filter(|m| m.total_bytes > 0) {
        Some(m) => format!("{:.0} % of {}", m.used_bytes as f64 * 100.0 / m.total_bytes as f64, output::bytes(m.total_bytes)),
        None => "-".to_owned(),
    };
    let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
    vec![
        output::cell(&n.name),
        standing(n),
        format!("{}/{}", s.map_or(n.running, |s| s.running), n.max_tasks),
        or_dash(s.and_then(|s| s.cpu_percent).map(|p| format!("{p:.0} %"))),
        or_dash(s.filter(|s| !s.history.is_empty()).map(|s| graph(&s.history))),
        or_dash(s.and_then(|s| s.load).map(|l| format!("{l:.2}"))),
        share(s.and_then(|s| s.memory.as_ref())),
        share(s.and_then(|s| s.disk.as_ref())),
        or_dash(s.and_then(|s| s.rtt_ms).map(|ms| format!("{ms:.1} ms"))),
    ]
}

/// The processor over the last hour, oldest first: one character for each equal part of the samples.
fn graph(samples: &[NodeSample]) -> String {
    const STEPS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let part = samples.len().div_ceil(GRAPH).max(1);
    let mean = |part: &[NodeSample]| part.iter().map(|s| s.cpu_percent).sum::<f64>() / part.len() as f64;
    let step = |percent: f64| STEPS[((percent / 12.5) as usize).min(STEPS.len() - 1)];
    samples.chunks(part).map(|part| step(mean(part))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(cpu_percent: f64) -> NodeSample {
        let at = "2026-01-01T00:00:00Z".to_owned();
        NodeSample { at, cpu_percent, memory_used_bytes: 0, disk_used_bytes: 0, load: 0.0, running: 0, rtt_ms: None }
    }

    #[test]
    fn an_hour_in_twelve_characters() {
        let hour: Vec<_> = (0..240).map(|n| sample(f64::from(n) * 100.0 / 239.0)).collect();
        assert_eq!(graph(&hour), "▁▁▂▃▃▄▅▆▆▇██");
        assert_eq!(graph(&[sample(0.0), sample(100.0), sample(900.0)]), "▁██");
        assert_eq!(graph(&[]), "");
    }
}

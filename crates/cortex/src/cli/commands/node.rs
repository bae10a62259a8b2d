//! `node`: machines, and how one joins.

use super::{Context, node_id};
use crate::cli::args::{Format, NodeAdd, NodeCommand, NodeSet};
use crate::cli::{Fail, output};
use crate::rest::{CapabilitiesView, InviteRequest, MemoryView, NodeChangeRequest, NodeView};
use mesh_process::files;
use std::collections::BTreeMap;
use std::io::BufRead;
use std::path::{Path, PathBuf};

pub(super) async fn perform(command: NodeCommand, context: &mut Context<'_, '_>) -> Result<(), Fail> {
    match command {
        NodeCommand::Add(args) => add(args, context).await,
        NodeCommand::Ls { select } => ls(select.as_deref(), context).await,
        NodeCommand::Show { node } => show(&node, context).await,
        NodeCommand::Set(args) => set(args, context).await,
        NodeCommand::Drain { node } => {
            let id = node_id(&context.client, &node).await?;
            let n = context.client.drain_node(&id).await?;
            let words = match n.running {
                0 => "draining; nothing runs there".to_owned(),
                k => format!("draining; {k} tasks still run there"),
            };
            changed(&n, &words, context)
        }
        NodeCommand::Resume { node } => {
            let id = node_id(&context.client, &node).await?;
            let n = context.client.resume_node(&id).await?;
            changed(&n, "takes work again", context)
        }
        NodeCommand::Revoke { node } => {
            let id = node_id(&context.client, &node).await?;
            let n = context.client.revoke_node(&id).await?;
            changed(&n, "revoked; its entry goes with: cortex node rm", context)
        }
        NodeCommand::Rm { node, yes } => rm(&node, yes, context).await,
        NodeCommand::Top { select } => super::top::perform(select.as_deref(), context).await,
    }
}

/// A word for people; for programs the node as it now is.
fn changed(node: &NodeView, words: &str, context: &mut Context<'_, '_>) -> Result<(), Fail> {
    match context.format() {
        Format::Table => context.tell(&format!("{}: {words}", output::cell(&node.name))),
        Format::Json => output::json(context.io, node)?,
    }
    Ok(())
}

async fn set(args: NodeSet, context: &mut Context<'_, '_>) -> Result<(), Fail> {
    let nothing = args.name.is_none() && args.max_tasks.is_none() && !args.default_slots;
    if nothing && args.labels.is_empty() && args.no_labels.is_empty() && args.slots.is_empty() {
        return Err(Fail::Usage("say what to change: --name, --label, --no-label, --max-tasks, --slot or --default-slots".into()));
    }
    let id = node_id(&context.client, &args.node).await?;
    let mut change = NodeChangeRequest { name: args.name, max_tasks: args.max_tasks.map(Some), ..Default::default() };
    if !(args.labels.is_empty() && args.no_labels.is_empty() && args.slots.is_empty()) {
        let now = context.client.node(&id).await?;
        if !(args.labels.is_empty() && args.no_labels.is_empty()) {
            let mut labels = now.settings.labels;
            for key in &args.no_labels {
                if labels.remove(key).is_none() {
                    return Err(Fail::Failed(format!("{:?} is no label that its owner gave it", output::cell(key))));
                }
            }
            labels.extend(args.labels);
            change.labels = Some(labels);
        }
        if !args.slots.is_empty() {
            let mut slots = now.slots;
            slots.extend(args.slots);
            change.slots = Some(Some(slots));
        }
    }
    if args.default_slots {
        change.slots = Some(None);
    }
    let node = context.client.change_node(&id, &change).await?;
    changed(&node, "changed", context)
}

async fn rm(node: &str, yes: bool, context: &mut Context<'_, '_>) -> Result<(), Fail> {
    let id = node_id(&context.client, node).await?;
    let n = context.client.node(&id).await?;
    let name = output::cell(&n.name);
    if !yes {
        let runs = if n.running == 0 { String::new() } else { format!(", end its {} tasks", n.running) };
        let _ = write!(context.io.err, "cortex: remove {name} ({}) for good{runs}? [y/N] ", output::cell(&n.id));
        let _ = context.io.err.flush();
        if !said_yes(std::io::stdin().lock()) {
            return Err(Fail::Failed("nothing was removed; --yes removes without asking".into()));
        }
    }
    context.client.delete_node(&id).await?;
    match context.format() {
        Format::Table => context.tell(&format!("{name}: removed; its tasks stay to be read")),
        Format::Json => output::json(context.io, &serde_json::json!({ "id": id, "removed": true }))?,
    }
    Ok(())
}

/// Only a clear yes is one; so the end of the input is none.
pub(super) fn said_yes(input: impl BufRead) -> bool {
    let mut line = String::new();
    let _ = input.take(100).read_line(&mut line);
    matches!(line.trim().to_ascii_lowercase().as_str(), "y" | "yes")
}

async fn add(args: NodeAdd, context: &mut Context<'_, '_>) -> Result<(), Fail> {
    let path = invite_path(&args.name)?;
    // Before the invite is made: one that cannot be written down would lie open for nothing.
    if path.symlink_metadata().is_ok() {
        return Err(Fail::Failed(format!("{} is there already; move it away or choose another name", path.display())));
    }
    let request = InviteRequest { name: Some(args.name), labels: args.labels.into_iter().collect(), policy: None, ttl_secs: args.ttl };
    let invite = context.client.create_invite(&request).await?;
    if let Err(e) = files::create_private(&path, invite.config_yaml.as_bytes()) {
        let taken_back = match context.client.delete_invite(&invite.id).await {
            Ok(()) => "the invite was taken back".to_owned(),
            Err(e) => format!("the invite {} stays open until {}: {e}", invite.id, invite.expires_at),
        };
        return Err(Fail::Failed(format!("cannot write {}: {e}; {taken_back}", path.display())));
    }
    if context.format() == Format::Json {
        return output::json(context.io, &invite);
    }
    let file = path.display();
    context.tell(&format!("invited until {}; the secret is in {file}, for one machine, once", output::cell(&invite.expires_at)));
    context.tell("paste this on the machine:");
    writeln!(context.io.out, "{}", invite.join_command.trim_end())?;
    context.io.out.flush()?;
    context.tell(&format!("or, where cortex-node and {file} are: cortex-node join {file}"));
    Ok(())
}

/// `NAME.yaml` in the folder one is in.
fn invite_path(name: &str) -> Result<PathBuf, Fail> {
    mesh_core::name::check(name).map_err(|e| Fail::Usage(format!("{name:?} cannot name a machine: {e}")))?;
    if name.starts_with(['.', '-']) || name.contains('/') {
        return Err(Fail::Usage(format!("{name:?} cannot name a machine: its file would be hidden, an option or elsewhere")));
    }
    Ok(Path::new(&format!("{name}.yaml")).to_owned())
}

async fn ls(select: Option<&str>, context: &mut Context<'_, '_>) -> Result<(), Fail> {
    let nodes = context.client.nodes_where(select).await?;
    let now = context.now_ms;
    if nodes.is_empty() && select.is_some() {
        context.tell("no machine has these labels; see what they have with: cortex node ls");
    } else if nodes.is_empty() {
        context.tell("there are no machines yet; add one with: cortex node add NAME");
    }
    output::list(context.io, context.format(), &nodes, &["name", "status", "running", "os", "seen", "labels", "id"], |n| {
        vec![
            output::cell(&n.name),
            standing(n),
            format!("{}/{}", n.running, n.max_tasks),
            output::cell(&format!("{}/{}", n.capabilities.os, n.capabilities.arch)),
            output::ago(n.last_seen_at.as_deref(), now),
            output::pairs(&n.labels),
            output::cell(&n.id),
        ]
    })
}

/// How it stands, and why it takes no work where that is not the same word.
pub(super) fn standing(n: &NodeView) -> String {
    match &n.schedulable.reason {
        Some(why) if !n.schedulable.ok && *why != n.status => output::cell(&format!("{} ({why})", n.status)),
        _ => output::cell(&n.status),
    }
}

async fn show(node: &str, context: &mut Context<'_, '_>) -> Result<(), Fail> {
    let id = node_id(&context.client, node).await?;
    let n = context.client.node(&id).await?;
    let c = &n.capabilities;
    let mut fields = vec![
        ("name", output::cell(&n.name)),
        ("id", output::cell(&n.id)),
        ("status", output::cell(&n.status)),
        (
            "takes tasks",
            if n.schedulable.ok { "yes".to_owned() } else { format!("no: {}", output::or_dash(n.schedulable.reason.as_deref())) },
        ),
        ("running", format!("{} of {}", n.running, n.max_tasks)),
        ("seen", output::ago(n.last_seen_at.as_deref(), context.now_ms)),
        ("labels", output::pairs(&n.settings.labels)),
        ("labels by the hub", output::pairs(&of_the_hub(&n))),
        ("slots", output::pairs(&n.slots)),
        ("system", output::cell(&format!("{} {} {} ({})", c.os, c.arch, c.kernel, c.hostname))),
        ("processor", output::cell(&format!("{} × {}", c.cpu_cores, c.cpu_model))),
        ("memory", output::bytes(c.memory_bytes)),
        ("disk", output::bytes(c.disk_bytes)),
        ("runtimes", output::pairs(&c.runtimes)),
        ("skills", output::pairs(&c.skills)),
        ("sandbox works", sandbox(c, true)),
        ("sandbox lacks", sandbox(c, false)),
        ("version", output::or_dash(Some(&n.version))),
        ("certificate until", output::or_dash(n.certificate_not_after.as_deref())),
        ("owner", output::cell(&n.owner_id)),
    ];
    if let Some(limit) = n.settings.max_tasks {
        fields.push(("bound by the hub", format!("{limit} tasks")));
    }
    if n.draining && n.status != "draining" {
        fields.push(("draining", "yes, also when it is back".to_owned()));
    }
    if let Some(at) = &n.revoked_at {
        fields.push(("revoked", output::ago(Some(at), context.now_ms)));
    }
    if context.format() == Format::Table && ["online", "draining"].contains(&n.status.as_str()) {
        let s = context.client.node_status(&id).await?;
        let of = |m: &MemoryView| format!("{} of {}", output::bytes(m.used_bytes), output::bytes(m.total_bytes));
        let now = [
            ("cpu now", s.cpu_percent.map(|p| format!("{p:.0} %"))),
            ("load now", s.load.map(|l| format!("{l:.2}"))),
            ("memory used", s.memory.as_ref().map(of)),
            ("disk used", s.disk.as_ref().map(of)),
            ("round trip", s.rtt_ms.map(|ms| format!("{ms:.1} ms"))),
        ];
        fields.extend(now.into_iter().filter_map(|(name, value)| Some((name, value?))));
    }
    for gpu in &c.gpus {
        fields.push(("gpu", output::cell(&format!("{} ({})", gpu.name, output::bytes(gpu.memory_bytes)))));
    }
    for notice in &n.notices {
        fields.push(("notice", output::cell(notice)));
    }
    output::one(context.io, context.format(), &n, fields)
}

/// Those that nobody set.
fn of_the_hub(n: &NodeView) -> BTreeMap<String, String> {
    n.labels.iter().filter(|(k, v)| n.settings.labels.get(*k) != Some(v)).map(|(k, v)| (k.clone(), v.clone())).collect()
}

/// The layers that the machine has probed, by whether they work there.
fn sandbox(c: &CapabilitiesView, works: bool) -> String {
    let names: Vec<_> = c.sandbox.iter().filter(|(_, f)| f.works == works).map(|(k, _)| k.as_str()).collect();
    output::or_dash(Some(&names.join(" ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_clear_yes_removes() {
        for yes in ["y\n", "YES\n", " yes \r\n", "y"] {
            assert!(said_yes(yes.as_bytes()), "{yes:?}");
        }
        for no in ["", "\n", "n\n", "yesterday\n", "\ny\n"] {
            assert!(!said_yes(no.as_bytes()), "{no:?}");
        }
    }

    #[test]
    fn invite_files_stay_here() {
        assert_eq!(invite_path("my laptop").unwrap(), Path::new("my laptop.yaml"));
        for bad in ["", "a/b", "../x", ".hidden", "-rf", "a\nb"] {
            assert!(matches!(invite_path(bad), Err(Fail::Usage(_))), "{bad:?}");
        }
    }
}

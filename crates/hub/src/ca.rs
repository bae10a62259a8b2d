//! `cortex-hub ca`: what nodes and clients trust, and the steps of a rotation, through the hub that runs.

use crate::config::Config;
use crate::control;
use crate::keys::{Authority, Keys};
use anyhow::{Context, Result, anyhow, ensure};
use hub_engine::rotation::{Phase, Step};
use mesh_core::UnixMs;
use mesh_wire::rest::{AuthorityView, RotateRequest, StragglerView};
use std::path::Path;

/// What the keys say; how far the nodes are only a running hub can tell.
pub async fn show(config: &Config, now: UnixMs) -> Result<Vec<String>> {
    let dir = &config.data_dir;
    ensure!(dir.join("keys").join("hub-id").exists(), "there are no keys in {}; the first cortex-hub serve makes them", dir.display());
    let keys = Keys::open(dir, now).map_err(|e| anyhow!(e))?;
    let authority = keys.authority();
    let mut lines = vec![format!("hub   {}", keys.hub), format!("pin   {}", keys.pin()), format!("sign  {}", hex::encode(keys.task_key()))];
    lines.push(format!("phase {}", authority.phase.as_str()));
    lines.push(format!("seq   {}", authority.seq));
    if let Some((pin, about)) = other(&authority) {
        lines.push(format!("other {pin} ({about})"));
    }
    match view(dir).await {
        Ok(v) => lines.extend(told(&v)),
        Err(_) => lines.push("nodes the hub does not run, so nobody can say how far they are".into()),
    }
    lines.push(keys.roots_pem().trim_end().to_owned());
    Ok(lines)
}

/// The root beside the one that issues.
fn other(authority: &Authority) -> Option<(String, &'static str)> {
    match authority.phase {
        Phase::Steady => None,
        Phase::Both => Some((authority.newest().pin(), "the new root, not used yet")),
        Phase::Issuing => Some((authority.oldest().pin(), "the old root, which still counts")),
    }
}

pub async fn rotate(config: &Config, step: Step, leave_behind: bool) -> Result<Vec<String>> {
    let dir = &config.data_dir;
    let running = tokio::net::UnixStream::connect(dir.join("hub.sock")).await;
    running.with_context(|| {
        format!("no hub runs on {}: start it; a rotation goes on while it runs, since the nodes must hear of it", dir.display())
    })?;
    let body = serde_json::to_value(RotateRequest { step: step.as_str().into(), leave_behind })?;
    let answer = control::ask(dir, "POST", "/system/ca/rotate", Some(&body)).await?;
    let view: AuthorityView = serde_json::from_slice(&answer)?;
    let done = match step {
        Step::Begin => {
            "a new root and a new task key are there; when all nodes have acknowledged, go on with: cortex-hub ca rotate --issue"
        }
        Step::Issue => {
            "certificates and orders are of the new root and key; when no node is on the old root, end with: cortex-hub ca rotate --retire"
        }
        Step::Retire => "the old root and task key count no more; make a new backup with the keys",
        Step::Abort => "the new root and task key are gone again",
    };
    Ok([done.to_owned(), format!("phase {}", view.phase), format!("seq   {}", view.seq)].into_iter().chain(told(&view)).collect())
}

async fn view(dir: &Path) -> Result<AuthorityView> {
    Ok(serde_json::from_slice(&control::ask(dir, "GET", "/system/ca", None).await?)?)
}

fn told(v: &AuthorityView) -> Vec<String> {
    let mut lines = vec![format!("nodes {} of {} have acknowledged", v.acknowledged, v.nodes)];
    let named = |what: &str, count: u64, of: &[StragglerView]| {
        let mut lines: Vec<String> = of.iter().map(|s| format!("{what} {} {}", s.id, s.name)).collect();
        let more = count - (of.len() as u64).min(count);
        if more > 0 {
            lines.push(format!("{what} and {more} more"));
        }
        lines
    };
    lines.extend(named("waits for       ", v.nodes - v.acknowledged.min(v.nodes), &v.stragglers));
    if v.phase == Phase::Issuing.as_str() {
        lines.extend(named("on the old root ", v.old_certificates, &v.on_old_root));
    }
    lines
}

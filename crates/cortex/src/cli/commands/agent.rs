//! `agent`: processes that are supervised.

use super::{Context, is_id, session_id};
use crate::cli::args::{AgentCommand, AgentSpawn, Format};
use crate::cli::{Fail, output};
use crate::follow_log::LogItem;
use crate::rest::{AgentConfig, AgentKillRequest, AgentLogLine, AgentRequest, AgentView, RestartView, SelectView};
use mesh_core::select::Selector;

/// Lines that are shown of a log, unless more are asked for.
const NEWEST: u64 = 100;
/// Lines of one page.
const PAGE: u32 = 500;

pub(super) async fn perform(command: AgentCommand, context: &mut Context<'_, '_>) -> Result<(), Fail> {
    match command {
        AgentCommand::Spawn(args) => spawn(args, context).await,
        AgentCommand::Ls => ls(context).await,
        AgentCommand::Show { agent } => {
            let agent = known(&agent, context).await?;
            show(&agent, context)
        }
        AgentCommand::Kill { agent, force } => {
            let agent = known(&agent, context).await?;
            let agent = context.client.kill_agent(&agent.agent_id, &AgentKillRequest { force }).await?;
            match context.format() {
                Format::Table => context.tell(&agent.status),
                Format::Json => output::json(context.io, &agent)?,
            }
            Ok(())
        }
        AgentCommand::Logs { agent, follow, lines, all } => {
            logs(&agent, follow, if all { u64::MAX } else { lines.unwrap_or(NEWEST) }, context).await
        }
    }
}

async fn spawn(args: AgentSpawn, context: &mut Context<'_, '_>) -> Result<(), Fail> {
    let session = match &args.session {
        Some(text) => Some(session_id(&context.client, text).await?),
        None => None,
    };
    let select = match args.select.as_deref().map(Selector::parse) {
        None => None,
        Some(Ok(s)) => Some(SelectView { labels: s.labels, ..SelectView::default() }),
        Some(Err(e)) => return Err(Fail::Usage(format!("--select: {e}"))),
    };
    let config = AgentConfig {
        argv: args.script.is_none().then_some(args.argv),
        command: args.script,
        env: args.env.into_iter().collect(),
        cwd: args.cwd,
        node: args.node,
        select,
        session_id: session,
        restart: args.restart.map(|policy| RestartView { policy, max: args.max.unwrap_or(0), backoff_ms: args.backoff }),
    };
    let config = serde_json::to_value(&config).map_err(|e| Fail::Failed(format!("cannot write the config: {e}")))?;
    let config = config.as_object().cloned().unwrap_or_default();
    let agent = context.client.spawn_agent(&AgentRequest { name: args.name, agent_type: "process".into(), config }).await?;
    show(&agent, context)
}

/// By id, or by name: the newest of that name.
async fn known(text: &str, context: &Context<'_, '_>) -> Result<AgentView, Fail> {
    if is_id(text, "agent_") {
        return Ok(context.client.agent(text).await?);
    }
    let newest = context.client.agents_named(text).await?.into_iter().next();
    newest.ok_or_else(|| Fail::Failed(format!("there is no agent called {:?}, or you may not see it", output::cell(text))))
}

async fn ls(context: &mut Context<'_, '_>) -> Result<(), Fail> {
    let agents = context.client.agents().await?;
    let now = context.now_ms;
    output::list(context.io, context.format(), &agents, &["name", "type", "status", "restarts", "started", "node", "id"], |a| {
        vec![
            output::cell(&a.name),
            output::cell(&a.agent_type),
            output::cell(&a.status),
            a.restarts.to_string(),
            output::ago(a.started_at.as_deref(), now),
            output::or_dash(a.node_id.as_deref()),
            output::cell(&a.agent_id),
        ]
    })
}

fn show(a: &AgentView, context: &mut Context<'_, '_>) -> Result<(), Fail> {
    let restart = a.restart.as_ref().map(|r| match r.max {
        0 => r.policy.clone(),
        max => format!("{}, at most {max} in a row", r.policy),
    });
    let fields = vec![
        ("name", output::cell(&a.name)),
        ("id", output::cell(&a.agent_id)),
        ("type", output::cell(&a.agent_type)),
        ("status", output::cell(&a.status)),
        ("reason", output::or_dash(a.reason.as_deref())),
        ("restart", output::or_dash(restart.as_deref())),
        ("restarts", a.restarts.to_string()),
        ("node", output::or_dash(a.node_id.as_deref())),
        ("task", output::or_dash(a.task_id.as_deref())),
        ("session", output::or_dash(a.session_id.as_deref())),
        ("started", output::or_dash(a.started_at.as_deref())),
        ("next start", output::or_dash(a.next_start_at.as_deref())),
        ("ended", output::or_dash(a.ended_at.as_deref())),
    ];
    output::one(context.io, context.format(), a, fields)
}

async fn logs(agent: &str, follow: bool, newest: u64, context: &mut Context<'_, '_>) -> Result<(), Fail> {
    let id = known(agent, context).await?.agent_id;
    let total = context.client.agent_logs(&id, u64::MAX, 1).await?.total;
    let mut offset = total.saturating_sub(newest);
    if follow {
        let mut log = context.client.follow_agent(&id, offset);
        while let Some(item) = log.next().await? {
            match item {
                LogItem::Line(line) => print(&line, context)?,
                LogItem::Gap(gap) => context.tell(&format!("lines {} to {} are not kept any more", gap.from, gap.to.unwrap_or(gap.from))),
                LogItem::Broken { reason, .. } => context.tell(&format!("the connection is gone ({reason}); trying again")),
                LogItem::End(agent) => context.tell(&format!("the agent has ended: {}", agent.status)),
            }
        }
        return Ok(());
    }
    while offset < total {
        let page = context.client.agent_logs(&id, offset, PAGE).await?;
        for line in page.logs.iter().filter(|line| line.seq <= total) {
            print(line, context)?;
        }
        match page.logs.last() {
            Some(last) => offset = last.seq,
            None => break,
        }
    }
    Ok(())
}

/// As it was written, each stream to its own; for programs a document a line.
fn print(line: &AgentLogLine, context: &mut Context<'_, '_>) -> Result<(), Fail> {
    if context.format() == Format::Json {
        let text = serde_json::to_string(line).map_err(|e| Fail::Failed(format!("cannot write the line: {e}")))?;
        writeln!(context.io.out, "{text}")?;
        return Ok(context.io.out.flush()?);
    }
    let to: &mut dyn std::io::Write = if line.stream == "stdout" { context.io.out } else { context.io.err };
    let text = if line.stream == "agent" { format!("[{}]", output::cell(&line.line)) } else { line.line.clone() };
    let end = if line.cut { "" } else { "\n" };
    write!(to, "{text}{end}")?;
    Ok(to.flush()?)
}

//! `task`: what ran and what runs.

use super::{Context, node_id, session_id};
use crate::cli::args::{Format, TaskCommand, TaskLs};
use crate::cli::{Fail, output};
use crate::rest::TaskView;
use crate::{OutputItem, Resume, Stream, TaskFilter};
use mesh_core::task::TaskState;
use std::time::Duration;

/// Without `-f`, output counts as all there is when nothing more comes for so long.
const CAUGHT_UP: Duration = Duration::from_secs(2);
/// What a table shows of a command.
const COMMAND_CHARS: usize = 60;

pub(super) async fn perform(command: TaskCommand, context: &mut Context<'_, '_>) -> Result<(), Fail> {
    match command {
        TaskCommand::Ls(args) => ls(args, context).await,
        TaskCommand::Show { task } => show(&task, context).await,
        TaskCommand::Logs { follow, task } => logs(&task, follow, context).await,
        TaskCommand::Cancel { task } => {
            context.client.cancel_task(&task).await?;
            match context.format() {
                Format::Table => context.tell("asked for its end; the task says when that has come: cortex task show TASK"),
                Format::Json => {
                    let task = context.client.task(&task).await?;
                    output::json(context.io, &task)?;
                }
            }
            Ok(())
        }
    }
}

async fn ls(args: TaskLs, context: &mut Context<'_, '_>) -> Result<(), Fail> {
    if let Some(state) = &args.state
        && TaskState::parse(state).is_none()
    {
        let all: Vec<_> = TaskState::ALL.iter().map(|s| s.as_str()).collect();
        return Err(Fail::Usage(format!("{state:?} is no state of a task; those are {}", all.join(", "))));
    }
    let mut filter = TaskFilter { state: args.state, limit: Some(args.limit), ..TaskFilter::default() };
    if let Some(session) = &args.session {
        filter.session = Some(session_id(&context.client, session).await?);
    }
    if let Some(node) = &args.node {
        filter.node = Some(node_id(&context.client, node).await?);
    }
    filter.parent = args.parent;
    let page = context.client.tasks(&filter).await?;
    if context.format() == Format::Json {
        return output::json(context.io, &page);
    }
    let now = context.now_ms;
    output::list(context.io, Format::Table, &page.items, &["id", "state", "exit", "created", "command"], |t| {
        vec![
            output::cell(&t.id),
            state(t),
            t.exit_code.map_or_else(|| "-".to_owned(), |c| c.to_string()),
            output::ago(Some(&t.created_at), now),
            summary(t),
        ]
    })?;
    if page.next_cursor.is_some() {
        context.tell("there are more; see them with --limit, up to 500, or with filters");
    }
    Ok(())
}

/// The state, and why where it says little by itself.
fn state(t: &TaskView) -> String {
    match (&t.reason, &t.waiting) {
        (Some(r), _) if r.code != "exit" => output::cell(&format!("{} ({})", t.state, r.code)),
        (None, Some(w)) => output::cell(&format!("{} ({})", t.state, w.code)),
        _ => output::cell(&t.state),
    }
}

/// The command as a person would recognise it.
fn command(t: &TaskView) -> String {
    let spec = t.spec.get(&t.skill).unwrap_or(&t.spec);
    let text = match (spec.get("argv").and_then(|v| v.as_array()), spec.get("command").and_then(|v| v.as_str())) {
        (Some(argv), _) => argv.iter().filter_map(|a| a.as_str()).map(quoted).collect::<Vec<_>>().join(" "),
        (None, Some(script)) => script.to_owned(),
        (None, None) => format!("({})", t.skill),
    };
    output::cell(&text)
}

fn quoted(arg: &str) -> String {
    let plain = |c: char| c.is_alphanumeric() || "-_./=:,@%+".contains(c);
    if !arg.is_empty() && arg.chars().all(plain) { arg.to_owned() } else { format!("'{}'", arg.replace('\'', r"'\''")) }
}

fn summary(t: &TaskView) -> String {
    let text = command(t);
    if text.chars().count() <= COMMAND_CHARS {
        return text;
    }
    text.chars().take(COMMAND_CHARS - 1).chain(['…']).collect()
}

async fn show(id: &str, context: &mut Context<'_, '_>) -> Result<(), Fail> {
    let t = context.client.task(id).await?;
    let reason = |r: &Option<crate::rest::ReasonView>| r.as_ref().map(|r| output::cell(&format!("{}: {}", r.code, r.detail)));
    let mut fields = vec![("id", output::cell(&t.id)), ("state", output::cell(&t.state)), ("command", command(&t))];
    let optional = [
        ("reason", reason(&t.reason)),
        ("waiting", reason(&t.waiting)),
        ("exit code", t.exit_code.map(|c| c.to_string())),
        ("signal", t.signal.map(|n| n.to_string())),
        ("node", t.node_id.as_deref().map(output::cell)),
        ("session", t.session_id.as_deref().map(output::cell)),
        ("fan-out", t.parent_id.as_deref().map(output::cell)),
        ("children", t.children.as_ref().map(|c| format!("{}: {}", c.total, output::pairs(&c.by_state)))),
        ("created", Some(output::cell(&t.created_at))),
        ("started", t.started_at.as_deref().map(output::cell)),
        ("finished", t.finished_at.as_deref().map(output::cell)),
        ("cancel asked", t.cancel_requested_at.as_deref().map(output::cell)),
    ];
    fields.extend(optional.into_iter().filter_map(|(name, value)| Some((name, value?))));
    fields.push(("attempt", t.attempt.to_string()));
    fields.push(("output", format!("{} and {} of errors", output::bytes(t.stdout_bytes), output::bytes(t.stderr_bytes))));
    let sums = [("stdout sha256", &t.stdout_sha256), ("stderr sha256", &t.stderr_sha256)];
    fields.extend(sums.into_iter().filter_map(|(name, sum)| Some((name, output::cell(sum.as_deref()?)))));
    fields.push(("by", output::cell(&format!("{} ({})", t.actor.user_id, t.actor.door))));
    output::one(context.io, context.format(), &t, fields)?;
    if context.format() == Format::Table {
        let events = context.client.task_events(id).await?;
        writeln!(context.io.out)?;
        output::list(context.io, Format::Table, &events, &["at", "event", "state", "attempt", "detail"], |e| {
            vec![
                output::cell(&e.at),
                output::cell(&e.kind),
                output::or_dash(e.state.as_deref()),
                e.attempt.to_string(),
                output::cell(&e.detail),
            ]
        })?;
    }
    Ok(())
}

async fn logs(id: &str, follow: bool, context: &mut Context<'_, '_>) -> Result<(), Fail> {
    let task = context.client.task(id).await?;
    // Of a task that goes on, what it had written when it was asked.
    let going_on = !TaskState::parse(&task.state).is_some_and(TaskState::is_final);
    let until = (going_on && !follow).then_some(task.stdout_bytes + task.stderr_bytes);
    if until == Some(0) {
        return Ok(());
    }
    let mut seen = 0;
    let mut output = context.client.follow_output(id, Resume::Start);
    loop {
        let item = match until {
            None => output.next().await?,
            Some(_) => match tokio::time::timeout(CAUGHT_UP, output.next()).await {
                Ok(item) => item?,
                Err(_) => return Ok(()),
            },
        };
        match item {
            Some(OutputItem::Output { stream, data, .. }) => {
                let to: &mut dyn std::io::Write = if stream == Stream::Stdout { context.io.out } else { context.io.err };
                to.write_all(&data)?;
                to.flush()?;
                seen += data.len() as u64;
                if until.is_some_and(|until| seen >= until) {
                    return Ok(());
                }
            }
            Some(OutputItem::End(_)) | None => return Ok(()),
            Some(other) => super::run::note_item(context.io, &other),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_can_be_pasted() {
        assert_eq!(["ls", "-la", "a b", "", "it's", "$x"].map(quoted), ["ls", "-la", "'a b'", "''", r"'it'\''s'", "'$x'"]);
    }
}

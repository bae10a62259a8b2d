//! `run`: starts a task, streams its output, ends as it ended.

use super::{Context, fan, input, session_id};
use crate::cli::args::{Format, RunArgs};
use crate::cli::{Fail, Io, exit, output, report, say_error};
use crate::rest::{DispatchRequest, RetriesView, SelectView, ShellRequest, TaskView};
use crate::{Client, Error, OutputItem, Resume, Stream};
use base64::Engine as _;
use futures::StreamExt as _;
use mesh_core::select::Selector;
use mesh_core::task::TaskState;
use mesh_process::Tasks;
use std::io::{ErrorKind, IsTerminal as _, Read as _, Write};
use std::time::Duration;
use tokio::sync::{mpsc, watch};

/// Input is one field of a request; a hub takes 8 MiB of those unless it is set otherwise.
const MAX_STDIN_BYTES: u64 = 64 << 20;
/// Between two looks at a task that has not started.
const LOOK: Duration = Duration::from_secs(1);
/// How long the loop may take to leave by itself after the second Ctrl-C.
const LEAVE: Duration = Duration::from_secs(1);
const CANCEL_PAUSE: Duration = Duration::from_secs(1);

/// What to start and how to show it.
#[derive(Debug)]
pub struct Plan {
    /// The id of a session.
    pub session: Option<String>,
    pub request: DispatchRequest,
    pub idempotency_key: Option<String>,
    pub detach: bool,
    /// Standard input, to be sent as it comes.
    pub input: Option<mpsc::Receiver<Vec<u8>>>,
    pub format: Format,
    /// Whose credentials they are, for what an error advises.
    pub with_key: bool,
}

pub(super) async fn command(args: RunArgs, context: Context<'_, '_>) -> u8 {
    let Context { client, io, settings, .. } = context;
    let with_key = settings.uses_api_key();
    let plan = match plan(args, &client, settings.format, with_key).await {
        Ok(plan) => plan,
        Err(Fail::Hub(e)) => return failed(io, &e, settings.format, with_key),
        Err(Fail::Usage(text)) => return report(io, &Fail::Usage(text), with_key),
        Err(other) => {
            report(io, &other, with_key);
            return exit::MESH;
        }
    };
    let (pressed, interrupts) = watch::channel(0_u32);
    let tasks = Tasks::new();
    if !plan.detach {
        tasks.spawn_until_cancelled("interrupts", count_interrupts(pressed));
    }
    let code = run(&client, plan, io, interrupts).await;
    tasks.token().cancel();
    code
}

/// Counts Ctrl-C. After the second the process ends in any case, also when the loop cannot see it
/// because nobody reads what it writes.
async fn count_interrupts(pressed: watch::Sender<u32>) {
    // Where the signal cannot be taken, it ends the process as it would have without us.
    let Ok(mut signal) = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::interrupt()) else { return };
    while signal.recv().await.is_some() {
        pressed.send_modify(|n| *n += 1);
        if *pressed.borrow() > 1 {
            tokio::time::sleep(LEAVE).await;
            std::process::exit(exit::CANCELLED.into());
        }
    }
}

async fn plan(args: RunArgs, client: &Client, format: Format, with_key: bool) -> Result<Plan, Fail> {
    let stdin_base64 = if args.stdin { Some(base64::engine::general_purpose::STANDARD.encode(read_stdin()?)) } else { None };
    let session = match &args.session {
        Some(text) => Some(session_id(client, text).await?),
        None => None,
    };
    let shell = ShellRequest {
        argv: args.script.is_none().then_some(args.argv),
        command: args.script,
        cwd: args.cwd,
        env: args.env.into_iter().collect(),
        stdin_base64,
        stdin_open: args.interactive,
        ..ShellRequest::default()
    };
    let select = match args.select.as_deref().map(Selector::parse) {
        None => None,
        Some(Ok(s)) => Some(SelectView { labels: s.labels, ..SelectView::default() }),
        Some(Err(e)) => return Err(Fail::Usage(format!("--select: {e}"))),
    };
    let request = DispatchRequest {
        node: args.node,
        all: args.all.then_some(true),
        select,
        priority: args.priority,
        retries: args.retries.map(|max| RetriesView { max, backoff_ms: args.backoff }),
        on_lost: args.on_lost,
        lost_after_secs: args.lost_after,
        not_before: args.not_before,
        deadline: args.deadline,
        shell: Some(shell),
        timeout_secs: args.timeout,
        queue_secs: Some(args.queue),
        wait_secs: Some(0),
        ..DispatchRequest::default()
    };
    let input = args.interactive.then(input::read);
    Ok(Plan { session, request, idempotency_key: args.idempotency_key, detach: args.detach, input, format, with_key })
}

fn read_stdin() -> Result<Vec<u8>, Fail> {
    let stdin = std::io::stdin();
    if stdin.is_terminal() {
        return Err(Fail::Usage("--stdin sends a file or a pipe, and standard input is a terminal; write: … | cortex run --stdin".into()));
    }
    let mut bytes = Vec::new();
    let read = stdin.lock().take(MAX_STDIN_BYTES + 1).read_to_end(&mut bytes);
    read.map_err(|e| Fail::Failed(format!("cannot read standard input: {e}")))?;
    if bytes.len() as u64 > MAX_STDIN_BYTES {
        return Err(Fail::Failed(format!("standard input is longer than {}", output::bytes(MAX_STDIN_BYTES))));
    }
    Ok(bytes)
}

/// Starts what the plan says and follows it to its end; gives the exit code. `interrupts` counts how
/// often its end was asked for: once cancels the task, twice leaves.
pub async fn run(client: &Client, plan: Plan, io: &mut Io<'_>, interrupts: watch::Receiver<u32>) -> u8 {
    let dispatched = tokio::select! {
        biased;
        task = client.dispatch_once(plan.session.as_deref(), &plan.request, plan.idempotency_key.as_deref()) => task,
        () = twice(interrupts.clone()) => return exit::CANCELLED,
    };
    let task = match dispatched {
        Ok(task) => task,
        Err(e) => return failed(io, &e, plan.format, plan.with_key),
    };
    if plan.detach {
        let told = match plan.format {
            Format::Table => writeln!(io.out, "{}", task.id).and_then(|()| io.out.flush()).map_err(Fail::from),
            Format::Json => output::json(io, &task),
        };
        return match told {
            Ok(()) | Err(Fail::ReaderLeft) => 0,
            Err(fail) => {
                report(io, &fail, plan.with_key);
                exit::MESH
            }
        };
    }
    let fanned = plan.request.all == Some(true);
    let outcome = if fanned {
        fan::follow(client, &task, plan.format, io, interrupts).await
    } else {
        follow(client, &task.id, plan.format, plan.input, io, interrupts).await
    };
    match outcome {
        Outcome::Ended(task) if fanned => exit::of_task(&task),
        Outcome::Ended(task) => end(client, &task, plan.format, io).await,
        Outcome::Left => {
            io.note(&format!("left; the task may go on: cortex task show {}", task.id));
            exit::CANCELLED
        }
        Outcome::ReaderLeft => {
            // As a local command would have ended with its pipe.
            let _ = client.cancel_task(&task.id).await;
            exit::PIPE
        }
        Outcome::Failed(e) => {
            let code = failed(io, &e, plan.format, plan.with_key);
            io.note(&format!("the task may go on: cortex task logs -f {}", task.id));
            code
        }
        Outcome::CannotWrite(e) => {
            io.note(&format!("cannot write the output: {e}; the task goes on: cortex task logs -f {}", task.id));
            exit::MESH
        }
    }
}

/// How following came to its end.
pub(super) enum Outcome {
    Ended(Box<TaskView>),
    Left,
    ReaderLeft,
    CannotWrite(std::io::Error),
    Failed(Error),
}

async fn follow(
    client: &Client,
    id: &str,
    format: Format,
    input: Option<mpsc::Receiver<Vec<u8>>>,
    io: &mut Io<'_>,
    mut interrupts: watch::Receiver<u32>,
) -> Outcome {
    let mut feeding = input.map(|input| Box::pin(input::feed(client.clone(), id.to_owned(), input)));
    let mut items = client.follow_output(id, Resume::Start).into_stream();
    let mut waits = Some(looks(client.clone(), id.to_owned()));
    let mut waiting = String::new();
    let mut cancelling = None;
    loop {
        tokio::select! {
            biased;
            n = interrupted(&mut interrupts) => {
                if n > 1 {
                    return Outcome::Left;
                }
                io.note("cancelling; press Ctrl-C again to leave at once");
                cancelling = Some(Box::pin(cancel(client.clone(), id.to_owned())));
            }
            item = items.next() => match item {
                Some(Ok(OutputItem::Output { stream, data, .. })) => {
                    waits = None;
                    if format == Format::Table
                        && let Err(e) = write(io, stream, &data)
                    {
                        return if e.kind() == ErrorKind::BrokenPipe { Outcome::ReaderLeft } else { Outcome::CannotWrite(e) };
                    }
                }
                Some(Ok(OutputItem::End(task))) => return Outcome::Ended(task),
                Some(Ok(other)) => note_item(io, &other),
                Some(Err(e)) => return Outcome::Failed(e),
                None => {
                    let reason = "the output ended without the task's end".to_owned();
                    return Outcome::Failed(Error::Protocol { call: format!("output of {id}"), reason, status: None });
                }
            },
            why = maybe_next(&mut waits) => match why {
                Some(why) if why != waiting => {
                    io.note(&format!("waiting: {}", output::cell(&why)));
                    waiting = why;
                }
                Some(_) => {}
                None => waits = None,
            },
            refused = maybe(&mut feeding) => {
                feeding = None;
                if let Some(e) = refused {
                    io.note(&format!("standard input does not reach the command any more: {}", output::cell(&e.to_string())));
                }
            },
            refused = maybe(&mut cancelling) => {
                cancelling = None;
                if let Some(e) = refused {
                    io.note(&format!("the cancel was refused: {}", output::cell(&e.to_string())));
                }
            }
        }
    }
}

/// Says how the task ended where its own output does not, and gives the exit code.
async fn end(client: &Client, task: &TaskView, format: Format, io: &mut Io<'_>) -> u8 {
    if format == Format::Json {
        // The document of the task itself has the output's tail in any case.
        let document = client.task(&task.id).await;
        if let Err(Fail::Failed(text)) = output::json(io, document.as_ref().unwrap_or(task)) {
            io.note(&text);
            return exit::MESH;
        }
    }
    if let Some(reason) = &task.reason
        && reason.code != "exit"
    {
        let detail = if reason.detail.is_empty() { String::new() } else { format!(": {}", reason.detail) };
        io.note(&output::cell(&format!("{} {} ({}{detail})", task.id, task.state, reason.code)));
    }
    if task.truncated && format == Format::Table {
        io.note("the hub keeps only a part of the output; the command wrote more");
    }
    exit::of_task(task)
}

fn write(io: &mut Io<'_>, stream: Stream, data: &[u8]) -> std::io::Result<()> {
    let to: &mut dyn Write = if stream == Stream::Stdout { io.out } else { io.err };
    to.write_all(data)?;
    to.flush()
}

/// What there is to say about an item that is no output.
pub(super) fn note_item(io: &mut Io<'_>, item: &OutputItem) {
    match item {
        OutputItem::Gap(gap) => {
            let to = gap.to.map_or_else(|| "…".to_owned(), |to| to.to_string());
            io.note(&format!("output {} to {to} is missing: {}", gap.from, output::cell(&gap.reason)));
        }
        OutputItem::Broken { reason, pause } => {
            let pause = pause.as_secs_f32();
            io.note(&format!("{}; the task goes on, trying again in {pause:.1} s", output::cell(reason)));
        }
        OutputItem::Resumed => io.note("connected again"),
        OutputItem::Output { .. } | OutputItem::End(_) => {}
    }
}

/// Why a task waits, looked at each second until it has started or ended.
fn looks(client: Client, id: String) -> futures::stream::BoxStream<'static, String> {
    Box::pin(futures::stream::unfold((client, id), |(client, id)| async move {
        loop {
            tokio::time::sleep(LOOK).await;
            // The stream of the output says when the hub is away.
            let Ok(task) = client.task(&id).await else { continue };
            let state = TaskState::parse(&task.state);
            if state == Some(TaskState::Running) || state.is_some_and(TaskState::is_final) {
                return None;
            }
            if let Some(w) = task.waiting {
                let why = if w.detail.is_empty() { w.code } else { w.detail };
                return Some((why, (client, id)));
            }
            if state == Some(TaskState::AwaitingApproval) {
                return Some(("somebody must approve it".to_owned(), (client, id)));
            }
        }
    }))
}

/// Asks for the task's end until the hub has heard it; gives why it will not.
pub(super) async fn cancel(client: Client, id: String) -> Option<Error> {
    loop {
        match client.cancel_task(&id).await {
            Ok(()) => return None,
            Err(e) if e.is_transient() => tokio::time::sleep(CANCEL_PAUSE).await,
            // It has ended already, which the output is about to say.
            Err(e) if e.status() == Some(409) => return None,
            Err(e) => return Some(e),
        }
    }
}

pub(super) async fn interrupted(interrupts: &mut watch::Receiver<u32>) -> u32 {
    if interrupts.changed().await.is_err() {
        // Nobody counts any more.
        std::future::pending::<()>().await;
    }
    *interrupts.borrow_and_update()
}

/// Takes a receiver of its own, so that a first Ctrl-C stays unseen for whoever follows the task.
async fn twice(mut interrupts: watch::Receiver<u32>) {
    if interrupts.wait_for(|n| *n > 1).await.is_err() {
        std::future::pending::<()>().await;
    }
}

async fn maybe_next<S: futures::Stream + Unpin>(stream: &mut Option<S>) -> Option<S::Item> {
    match stream {
        Some(s) => s.next().await,
        None => std::future::pending().await,
    }
}

pub(super) async fn maybe<F: Future + Unpin>(work: &mut Option<F>) -> F::Output {
    match work {
        Some(w) => w.await,
        None => std::future::pending().await,
    }
}

/// The mesh failed: a line for people, and for programs a document that is no task.
fn failed(io: &mut Io<'_>, e: &Error, format: Format, with_key: bool) -> u8 {
    if format == Format::Json {
        let _ = output::json(io, &e.to_problem());
    }
    say_error(io, e, with_key);
    exit::of_error(e)
}

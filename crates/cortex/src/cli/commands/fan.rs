//! `run --all`: one command on many machines, followed together.
//!
//! On a terminal a table that fills; elsewhere each line of output with its machine before it.

use super::run::{Outcome, cancel, interrupted, maybe};
use crate::cli::args::Format;
use crate::cli::{Fail, Io, output};
use crate::rest::TaskView;
use crate::{Client, Error, OutputItem, Resume, Stream, TaskFilter};
use futures::StreamExt as _;
use futures::stream::{BoxStream, SelectAll};
use mesh_core::task::TaskState;
use serde::Serialize;
use std::collections::{BTreeMap, VecDeque};
use std::io::{ErrorKind, IsTerminal as _, Write};
use std::time::Duration;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::sync::watch;
use tokio::time::MissedTickBehavior;

/// Children whose output is followed at the same time; the others' is kept by the hub until their turn.
const FOLLOWED: usize = 64;
/// Between two looks at how the children stand.
const LOOK: Duration = Duration::from_secs(1);
/// Between two drawings of the table.
const DRAW: Duration = Duration::from_millis(250);
/// Rows of the table while it fills.
const ROWS: usize = 40;
/// Calls at once.
const AT_ONCE: usize = 8;
const PAGE: u32 = 500;
/// Of a machine's last line.
const LAST_CHARS: usize = 60;
/// What is kept of a line whose end has not come.
const LINE_BYTES: usize = 64 << 10;

/// The screen beside the one with the history, cleared; and back.
const ENTER: &str = "\x1b[?1049h\x1b[?25l";
const LEAVE: &str = "\x1b[?25h\x1b[?1049l";
const HOME: &str = "\x1b[H";
const CLEAR_LINE_END: &str = "\x1b[K";
const CLEAR_BELOW: &str = "\x1b[J";

/// What `--output json` prints.
#[derive(Serialize)]
struct Document {
    parent: TaskView,
    children: Vec<TaskView>,
}

/// A stream's text as far as its last line is not complete.
#[derive(Debug, Default)]
struct Lines(Vec<u8>);

impl Lines {
    /// The lines that are complete with this; a line that does not end is cut.
    fn push(&mut self, data: &[u8]) -> Vec<Vec<u8>> {
        let mut complete = vec![];
        for part in data.split_inclusive(|b| *b == b'\n') {
            self.0.extend_from_slice(part);
            if self.0.ends_with(b"\n") || self.0.len() >= LINE_BYTES {
                complete.push(std::mem::take(&mut self.0));
            }
        }
        complete
    }
    fn rest(&mut self) -> Option<Vec<u8>> {
        (!self.0.is_empty()).then(|| std::mem::take(&mut self.0))
    }
}

/// A child and its machine.
struct Child {
    name: String,
    task: TaskView,
    lines: [Lines; 2],
    last: String,
}

impl Child {
    fn is_over(&self) -> bool {
        TaskState::parse(&self.task.state).is_some_and(TaskState::is_final)
    }
    /// Newer views take the place of older ones; what has ended stays so.
    fn take(&mut self, task: TaskView) {
        if !self.is_over() {
            self.task = task;
        }
    }
}

struct View<'a, 'w> {
    io: &'a mut Io<'w>,
    format: Format,
    live: bool,
    width: usize,
    children: Vec<Child>,
}

/// Follows a fan-out to its end; gives how that came.
pub(super) async fn follow(
    client: &Client,
    parent: &TaskView,
    format: Format,
    io: &mut Io<'_>,
    mut interrupts: watch::Receiver<u32>,
) -> Outcome {
    let children = match children(client, &parent.id).await {
        Ok(children) => children,
        Err(e) => return Outcome::Failed(e),
    };
    let width = children.iter().map(|c| c.name.chars().count()).max().unwrap_or(0);
    let live = format == Format::Table && std::io::stdout().is_terminal();
    let mut view = View { io, format, live, width, children };
    if live && let Err(e) = write!(view.io.out, "{ENTER}") {
        return cannot_write(e);
    }
    let outcome = view.follow(client, &parent.id, &mut interrupts).await;
    if live {
        let _ = write!(view.io.out, "{LEAVE}");
        let _ = view.io.out.flush();
    }
    match outcome {
        Outcome::Ended(task) => match view.conclude(client, &task).await {
            Ok(()) => Outcome::Ended(task),
            Err(Fail::ReaderLeft) => Outcome::ReaderLeft,
            Err(Fail::Hub(e)) => Outcome::Failed(e),
            Err(Fail::Failed(text) | Fail::Usage(text)) => Outcome::CannotWrite(std::io::Error::other(text)),
        },
        other => other,
    }
}

fn cannot_write(e: std::io::Error) -> Outcome {
    if e.kind() == ErrorKind::BrokenPipe { Outcome::ReaderLeft } else { Outcome::CannotWrite(e) }
}

type Items = BoxStream<'static, (usize, Option<Result<OutputItem, Error>>)>;

/// What one of them says, and that it says no more.
fn items(client: &Client, n: usize, id: &str) -> Items {
    let said = client.follow_output(id, Resume::Start).into_stream();
    said.map(Some).chain(futures::stream::iter([None])).map(move |item| (n, item)).boxed()
}

/// By the names of their machines.
async fn children(client: &Client, parent: &str) -> Result<Vec<Child>, Error> {
    let views = views(client, parent).await?;
    // Who may not see a machine still knows its id.
    let names: BTreeMap<String, String> = match client.nodes().await {
        Ok(nodes) => nodes.into_iter().map(|n| (n.id, n.name)).collect(),
        Err(_) => BTreeMap::new(),
    };
    let name = |t: &TaskView| {
        let id = t.node_id.as_deref().unwrap_or("-");
        output::cell(names.get(id).map_or(id, String::as_str))
    };
    let child = |t: TaskView| Child { name: name(&t), task: t, lines: Default::default(), last: String::new() };
    let mut all: Vec<Child> = views.into_iter().map(child).collect();
    all.sort_by(|a, b| (&a.name, &a.task.id).cmp(&(&b.name, &b.task.id)));
    Ok(all)
}

async fn views(client: &Client, parent: &str) -> Result<Vec<TaskView>, Error> {
    let mut filter = TaskFilter { parent: Some(parent.to_owned()), limit: Some(PAGE), ..TaskFilter::default() };
    let mut all = vec![];
    loop {
        let page = client.tasks(&filter).await?;
        all.extend(page.items);
        match page.next_cursor {
            None => return Ok(all),
            cursor => filter.cursor = cursor,
        }
    }
}

impl View<'_, '_> {
    async fn follow(&mut self, client: &Client, parent: &str, interrupts: &mut watch::Receiver<u32>) -> Outcome {
        let mut ended = items(client, usize::MAX, parent);
        let mut followed = SelectAll::new();
        let mut later: VecDeque<(usize, String)> = self.children.iter().map(|c| c.task.id.clone()).enumerate().collect();
        if self.format == Format::Json {
            // The documents at the end have it.
            later.clear();
        }
        for (n, id) in later.drain(..later.len().min(FOLLOWED)) {
            followed.push(items(client, n, &id));
        }
        let mut parent_end = None;
        let mut looks = tokio::time::interval(LOOK);
        let mut draws = tokio::time::interval(DRAW);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        draws.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut look = None;
        let mut cancelling = None;
        loop {
            if let Some(task) = parent_end.take_if(|_| followed.is_empty()) {
                return Outcome::Ended(task);
            }
            tokio::select! {
                biased;
                n = interrupted(interrupts) => {
                    if n > 1 {
                        return Outcome::Left;
                    }
                    if !self.live {
                        self.io.note("cancelling on every machine; press Ctrl-C again to leave at once");
                    }
                    cancelling = Some(Box::pin(cancel(client.clone(), parent.to_owned())));
                }
                refused = maybe(&mut cancelling) => {
                    cancelling = None;
                    if let Some(e) = refused {
                        self.io.note(&format!("the cancel was refused: {}", output::cell(&e.to_string())));
                    }
                }
                _ = draws.tick(), if self.live => if let Err(e) = self.draw() {
                    return cannot_write(e);
                },
                _ = looks.tick(), if self.live && look.is_none() => {
                    let (client, parent) = (client.clone(), parent.to_owned());
                    look = Some(Box::pin(async move { views(&client, &parent).await }));
                }
                found = maybe(&mut look) => {
                    look = None;
                    // The streams of output say when the hub is away.
                    for task in found.unwrap_or_default() {
                        if let Some(child) = self.children.iter_mut().find(|c| c.task.id == task.id) {
                            child.take(task);
                        }
                    }
                }
                // That the last has ended is news as well: the parent's end may have been here before.
                next = followed.next(), if !followed.is_empty() => match next {
                    Some((n, Some(Ok(item)))) => if let Err(e) = self.said(n, item) {
                        return cannot_write(e);
                    },
                    Some((_, Some(Err(e)))) => return Outcome::Failed(e),
                    Some((_, None)) => if let Some((n, id)) = later.pop_front() {
                        followed.push(items(client, n, &id));
                    },
                    None => {}
                },
                Some((_, item)) = ended.next(), if parent_end.is_none() => match item {
                    Some(Ok(OutputItem::End(task))) => parent_end = Some(task),
                    // It has no output of its own.
                    Some(Ok(item)) => if !self.live {
                        super::run::note_item(self.io, &item);
                    },
                    Some(Err(e)) => return Outcome::Failed(e),
                    None => {
                        let reason = "the fan-out's stream ended without its end".to_owned();
                        return Outcome::Failed(Error::Protocol { call: format!("output of {parent}"), reason, status: None });
                    }
                },
            }
        }
    }

    fn said(&mut self, n: usize, item: OutputItem) -> std::io::Result<()> {
        match item {
            OutputItem::Output { stream, data, .. } => {
                for line in self.children[n].lines[place(stream)].push(&data) {
                    self.line(n, stream, &line)?;
                }
            }
            OutputItem::End(task) => {
                for stream in [Stream::Stdout, Stream::Stderr] {
                    if let Some(rest) = self.children[n].lines[place(stream)].rest() {
                        self.line(n, stream, &rest)?;
                    }
                }
                self.children[n].take(*task);
            }
            OutputItem::Gap(gap) => {
                let text = format!("output from {} on is missing: {}", gap.from, output::cell(&gap.reason));
                self.note(n, &text);
            }
            // The parent's own stream tells that the hub is away, once for all.
            OutputItem::Broken { .. } | OutputItem::Resumed => {}
        }
        Ok(())
    }
    fn note(&mut self, n: usize, text: &str) {
        if !self.live {
            let name = self.children[n].name.clone();
            self.io.note(&format!("{name}: {text}"));
        }
    }

    /// A whole line, or the last one without its end.
    fn line(&mut self, n: usize, stream: Stream, line: &[u8]) -> std::io::Result<()> {
        let child = &mut self.children[n];
        let text = line.strip_suffix(b"\n").unwrap_or(line);
        if self.live {
            if !text.is_empty() {
                child.last = shortened(&output::cell(&String::from_utf8_lossy(text)));
            }
            return Ok(());
        }
        if self.format == Format::Json {
            return Ok(());
        }
        // One write a line, so that what several machines say is never mixed within one.
        let mut out = format!("{:width$} | ", child.name, width = self.width).into_bytes();
        out.extend_from_slice(text);
        out.push(b'\n');
        let to: &mut dyn Write = if stream == Stream::Stdout { self.io.out } else { self.io.err };
        to.write_all(&out)?;
        to.flush()
    }

    fn draw(&mut self) -> std::io::Result<()> {
        let over = self.children.iter().filter(|c| c.is_over()).count();
        let mut rows: Vec<&Child> = self.children.iter().collect();
        // Where not all have room: first those that a person would look for.
        if rows.len() > ROWS {
            rows.sort_by_key(|c| (rank(c), &c.name));
        }
        let hidden = rows.len().saturating_sub(ROWS);
        rows.truncate(ROWS);
        let mut text = table(&rows).map_err(|_| std::io::Error::other("the table cannot be made"))?;
        if hidden > 0 {
            text.push_str(&format!("and {hidden} more\n"));
        }
        text.push_str(&format!("\n{over} of {} have ended; Ctrl-C cancels\n", self.children.len()));
        let lines: String = text.lines().map(|l| format!("{l}{CLEAR_LINE_END}\r\n")).collect();
        write!(self.io.out, "{HOME}{lines}{CLEAR_BELOW}")?;
        self.io.out.flush()
    }

    /// The whole result, once it is there.
    async fn conclude(&mut self, client: &Client, parent: &TaskView) -> Result<(), Fail> {
        if self.format == Format::Json {
            // The document of a task itself has the output's tail.
            let ids: Vec<String> = self.children.iter().map(|c| c.task.id.clone()).collect();
            let whole = futures::stream::iter(ids).map(|id| async move { client.task(&id).await });
            let children: Vec<Result<TaskView, Error>> = whole.buffered(AT_ONCE).collect().await;
            let parent = client.task(&parent.id).await?;
            return output::json(self.io, &Document { parent, children: children.into_iter().collect::<Result<_, _>>()? });
        }
        let all: Vec<&Child> = self.children.iter().collect();
        if self.live {
            let text = table(&all)?;
            write!(self.io.out, "{text}")?;
            self.io.out.flush()?;
        }
        let unwell: Vec<String> =
            all.iter().filter(|c| c.task.state != "succeeded").map(|c| format!("{}: {}", c.name, state(&c.task))).collect();
        if !self.live {
            unwell.iter().for_each(|line| self.io.note(line));
        }
        self.io.note(&format!("{} of {} succeeded", self.children.len() - unwell.len(), self.children.len()));
        Ok(())
    }
}

fn place(stream: Stream) -> usize {
    usize::from(stream == Stream::Stderr)
}

fn rank(child: &Child) -> u8 {
    match child.task.state.as_str() {
        "failed" => 0,
        "running" => 1,
        "cancelled" => 3,
        "succeeded" => 4,
        _ => 2,
    }
}

fn shortened(text: &str) -> String {
    if text.chars().count() <= LAST_CHARS {
        return text.to_owned();
    }
    text.chars().take(LAST_CHARS - 1).chain(['…']).collect()
}

/// The state, with what says more than it alone.
fn state(t: &TaskView) -> String {
    match (&t.reason, &t.waiting, t.exit_code) {
        (Some(r), _, Some(code)) if r.code == "exit" => format!("{} (exit {code})", output::cell(&t.state)),
        (Some(r), _, _) => output::cell(&format!("{} ({})", t.state, r.code)),
        (None, Some(w), _) => output::cell(&format!("{} ({})", t.state, w.code)),
        _ => output::cell(&t.state),
    }
}

/// From start to end.
fn took(t: &TaskView) -> String {
    let read = |at: &Option<String>| OffsetDateTime::parse(at.as_deref()?, &Rfc3339).ok();
    match (read(&t.started_at), read(&t.finished_at)) {
        (Some(from), Some(to)) => format!("{:.1} s", (to - from).as_seconds_f64().max(0.0)),
        _ => "-".to_owned(),
    }
}

fn table(rows: &[&Child]) -> Result<String, Fail> {
    #[derive(Serialize)]
    struct Row(#[serde(skip)] Vec<String>);
    let rows: Vec<Row> = rows
        .iter()
        .map(|c| {
            let exit = c.task.exit_code.map_or_else(|| "-".to_owned(), |code| code.to_string());
            Row(vec![c.name.clone(), state(&c.task), exit, took(&c.task), c.last.clone()])
        })
        .collect();
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let mut io = Io { out: &mut out, err: &mut err };
    output::list(&mut io, Format::Table, &rows, &["node", "state", "exit", "time", "last line"], |r| r.0.clone())?;
    Ok(String::from_utf8_lossy(&out).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_whole_whatever_comes_together() {
        let mut lines = Lines::default();
        assert_eq!(lines.push(b"one\ntw"), [b"one\n".to_vec()]);
        assert_eq!(lines.push(b"o\n\nthree"), [b"two\n".to_vec(), b"\n".to_vec()]);
        assert_eq!(lines.rest(), Some(b"three".to_vec()));
        assert_eq!(lines.rest(), None);
        let long = lines.push(&vec![b'x'; 3 * LINE_BYTES]);
        assert!(long.iter().all(|l| l.len() >= LINE_BYTES), "what never ends is not kept for ever");
        assert_eq!(shortened(&"ä".repeat(100)).chars().count(), LAST_CHARS);
    }
}

//! A task's output: raw bytes, or server-sent events that a reader can resume.

use super::App;
use super::body::{PathId, Query};
use super::events::GRANTED_EVERY;
use super::problem::{Answer, Refusal};
use super::views;
use super::who::Who;
use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::engine::general_purpose::STANDARD as B64;
use bytes::{Bytes, BytesMut};
use futures::stream;
use hub_engine::accounts::Authenticated;
use hub_engine::records::{OutputFrame, Stream, Task};
use hub_engine::watch::Watch;
use mesh_core::TaskId;
use mesh_core::task::AttemptNo;
use mesh_wire::rest::{AttemptEvent, EndEvent, GapEvent, OutputEvent, StreamEnd};
use serde::Deserialize;
use std::collections::VecDeque;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;
use utoipa::IntoParams;

/// Data that one read of the store brings; what a slow reader makes the hub hold.
const READ_BYTES: usize = 256 << 10;
pub(super) const COMMENT_EVERY: Duration = Duration::from_secs(15);

#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct OutputQuery {
    /// stdout, stderr or all
    stream: Option<String>,
    /// Raw output: how many bytes to leave out
    from_byte: Option<u64>,
    /// Event streams: the first `seq` wanted
    from_seq: Option<u64>,
    /// Raw output: wait for more until the task ends
    follow: Option<bool>,
}

impl OutputQuery {
    /// What there is now, as raw bytes.
    pub fn of(stream: Option<String>, from_byte: u64) -> Self {
        Self { stream, from_byte: Some(from_byte), from_seq: None, follow: None }
    }
}

/// The output of a task
///
/// Raw bytes, or with `Accept: text/event-stream` events `output`, `gap`, `end`, `stopping` and `denied` whose data are OutputEvent, GapEvent, EndEvent and StreamEnd.
#[utoipa::path(
    get, path = "/tasks/{id}/output", tag = "tasks", operation_id = "output",
    params(OutputQuery, ("last-event-id" = Option<String>, Header, description = "Event streams: the id of the last event that was seen")),
    responses((status = 200, description = "The output", content((Vec<u8> = "application/octet-stream"), (String = "text/event-stream")))),
)]
pub async fn get(
    State(app): State<App>,
    who: Who,
    PathId(id): PathId<TaskId>,
    Query(q): Query<OutputQuery>,
    headers: HeaderMap,
) -> Answer<Response> {
    let only = stream_named(q.stream.as_deref())?;
    let accept = headers.get(header::ACCEPT).and_then(|v| v.to_str().ok()).unwrap_or_default();
    let follower = follow(app, who, id).await?;
    if accept.contains("text/event-stream") {
        if q.from_byte.is_some() || q.follow.is_some() {
            return Err(Refusal::bad_request("bad_query", "an event stream takes from_seq, and always follows"));
        }
        let resumed = match headers.get("last-event-id").and_then(|v| v.to_str().ok()) {
            None => None,
            Some(text) => Some(
                Place::parse(text)
                    .ok_or_else(|| Refusal::bad_request("bad_event_id", "Last-Event-ID is the id of an event of this stream"))?,
            ),
        };
        return Ok(events(follower, only, resumed, q.from_seq.map_or(0, |n| n.saturating_sub(1))));
    }
    if q.from_seq.is_some() {
        return Err(Refusal::bad_request("bad_query", "from_seq is for event streams; raw output takes from_byte"));
    }
    Ok(raw(follower, only, q.from_byte.unwrap_or(0), q.follow.unwrap_or(false)))
}

/// stdout, stderr, or None for all.
pub fn stream_named(name: Option<&str>) -> Answer<Option<Stream>> {
    match name {
        None | Some("all") => Ok(None),
        Some("stdout") => Ok(Some(Stream::Stdout)),
        Some("stderr") => Ok(Some(Stream::Stderr)),
        Some(other) => Err(Refusal::bad_request("bad_query", format!("stream is stdout, stderr or all, not {other:?}"))),
    }
}

async fn follow(app: App, who: Who, id: TaskId) -> Answer<Follower> {
    let mut rights = app.events.rights();
    // Who it is was found out before: what was changed since is looked up.
    rights.mark_changed();
    let task = app.tasks.get_narrow(who.caller(), id).await?;
    let watch = app.tasks.watchers.subscribe(id);
    Ok(Follower::new(app, (who.authenticated().clone(), rights), task, watch))
}

/// Some of the output, as far as there is any.
pub struct Part {
    pub bytes: Vec<u8>,
    /// Of which attempt; 0 before the first.
    pub attempt: u32,
    /// The task has ended, and this is its last part.
    pub end: bool,
}

/// At most `room` bytes of what there is now, from `from_byte` on.
pub async fn part(app: App, who: Who, id: TaskId, only: Option<Stream>, from_byte: u64, room: usize) -> Answer<Part> {
    let mut follower = follow(app, who, id).await?;
    let (mut bytes, mut seq, mut skip, mut end) = (vec![], 0, from_byte, false);
    let mut attempt = follower.attempt;
    // One more than there is room for, which says that this is not the end.
    while bytes.len() <= room {
        match follower.next(seq, false).await {
            Next::Frames(frames) => {
                attempt = follower.attempt;
                seq = frames.last().map_or(seq, |f| f.seq);
                for f in frames.iter().filter(|f| only.is_none_or(|s| s == f.stream)) {
                    let drop = skip.min(f.data.len() as u64) as usize;
                    skip -= drop as u64;
                    let left = (room + 1).saturating_sub(bytes.len());
                    bytes.extend_from_slice(&f.data[drop..f.data.len().min(drop + left)]);
                }
            }
            Next::End => {
                end = follower.task.progress.state.is_final();
                break;
            }
            // Another attempt has begun: what follows is its own.
            Next::Again(_) | Next::Quiet => break,
            Next::Broken => {
                return Err(Refusal::new(StatusCode::SERVICE_UNAVAILABLE, "unavailable", "the output cannot be read now; try again"));
            }
            Next::Denied(why) => return Err(Refusal::new(StatusCode::FORBIDDEN, "forbidden", why)),
        }
    }
    bytes.truncate(room);
    Ok(Part { bytes, attempt: attempt.map_or(0, AttemptNo::ordinal), end })
}

/// What the id of an event names: an attempt, and a seq of its output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    attempt: u32,
    seq: u64,
}

impl Place {
    /// The seq alone for a first attempt, which most tasks end with; `2.17` for a later one.
    fn id(self) -> String {
        match self {
            Self { attempt: 0 | 1, seq } => seq.to_string(),
            Self { attempt, seq } => format!("{attempt}.{seq}"),
        }
    }
    fn parse(text: &str) -> Option<Self> {
        match text.split_once('.') {
            None => Some(Self { attempt: 1, seq: text.parse().ok()? }),
            Some((attempt, seq)) => Some(Self { attempt: attempt.parse().ok()?, seq: seq.parse().ok()? }),
        }
    }
}

/// Reads on behind a task until its end.
struct Follower {
    app: App,
    who: Authenticated,
    /// Somebody's rights were changed.
    rights: watch::Receiver<u64>,
    /// When the reader's rights are looked up again whatever happens.
    look_at: Instant,
    id: TaskId,
    /// Narrow: it is read again at each wake.
    task: Task,
    /// The attempt whose output is read.
    attempt: Option<AttemptNo>,
    watch: Watch,
}

enum Next {
    Frames(Vec<OutputFrame>),
    /// All of one attempt was read, and there is another: its output begins anew.
    Again(AttemptNo),
    /// Nothing new for a while.
    Quiet,
    /// Final, and all that is kept was read.
    End,
    /// The hub is stopping, or the store failed: the reader comes again.
    Broken,
    /// The reader may not read this any more, and why.
    Denied(String),
}

impl Follower {
    fn new(app: App, (who, rights): (Authenticated, watch::Receiver<u64>), task: Task, watch: Watch) -> Self {
        let attempt = task.progress.attempt.as_ref().map(|a| a.no);
        Self { id: task.id, app, who, rights, look_at: Instant::now() + GRANTED_EVERY, task, attempt, watch }
    }

    /// Looks the reader's rights up again, when it is time for that; an error when they have ended.
    async fn look(&mut self) -> Result<(), hub_engine::Error> {
        let changed = self.rights.has_changed().unwrap_or(false);
        if !changed && Instant::now() < self.look_at {
            return Ok(());
        }
        self.rights.mark_unchanged();
        self.look_at = Instant::now() + GRANTED_EVERY;
        self.who = self.app.accounts.still(&self.who).await?;
        self.app.tasks.get_narrow(&self.who.caller, self.id).await.map(drop)
    }

    /// Frames after `seq`; waits for them when `follow` is set.
    async fn next(&mut self, seq: u64, follow: bool) -> Next {
        let quiet_at = Instant::now() + COMMENT_EVERY;
        loop {
            match self.look().await {
                Ok(()) => {}
                Err(hub_engine::Error::Store(_)) => return Next::Broken,
                Err(e) => return Next::Denied(e.to_string()),
            }
            self.watch.seen();
            // State first: what was final before an empty read has no more output.
            match self.app.tasks.journal.narrow(self.id).await {
                Ok(Some(task)) => self.task = task,
                _ => return Next::Broken,
            }
            let newest = self.task.progress.attempt.as_ref().map(|a| a.no);
            if self.attempt.is_none() {
                self.attempt = newest;
            }
            match self.app.tasks.output(&self.task, self.attempt, seq, READ_BYTES).await {
                Err(_) => return Next::Broken,
                Ok(frames) if !frames.is_empty() => return Next::Frames(frames),
                Ok(_) if self.attempt != newest => {
                    self.attempt = newest;
                    // The newest is some: there was one before it.
                    if let Some(no) = newest {
                        return Next::Again(no);
                    }
                }
                Ok(_) if self.task.progress.state.is_final() || !follow => return Next::End,
                Ok(_) => {}
            }
            let stop = self.app.stop.clone();
            tokio::select! {
                biased;
                () = stop.cancelled() => return Next::Broken,
                _ = self.rights.changed() => self.rights.mark_changed(),
                () = tokio::time::sleep_until(self.look_at) => {}
                () = self.watch.changed() => {}
                () = tokio::time::sleep_until(quiet_at) => return Next::Quiet,
            }
        }
    }
}

fn raw(follower: Follower, only: Option<Stream>, from_byte: u64, follow: bool) -> Response {
    let state = (follower, 0u64, from_byte);
    let body = stream::unfold(state, move |(mut follower, mut seq, mut skip)| async move {
        loop {
            match follower.next(seq, follow).await {
                Next::Frames(frames) => {
                    seq = frames.last().map_or(seq, |f| f.seq);
                    let mut out = BytesMut::new();
                    for f in frames.iter().filter(|f| only.is_none_or(|s| s == f.stream)) {
                        let drop = skip.min(f.data.len() as u64) as usize;
                        skip -= drop as u64;
                        out.extend_from_slice(&f.data[drop..]);
                    }
                    if !out.is_empty() {
                        return Some((Ok::<Bytes, std::io::Error>(out.freeze()), (follower, seq, skip)));
                    }
                }
                Next::Quiet => {}
                Next::Again(_) => seq = 0,
                Next::End => return None,
                // A cut body tells the reader that this was not the end.
                Next::Broken => return Some((Err(std::io::Error::other("the hub is stopping")), (follower, seq, skip))),
                Next::Denied(why) => return Some((Err(std::io::Error::other(why)), (follower, seq, skip))),
            }
        }
    });
    ([(header::CONTENT_TYPE, "application/octet-stream")], Body::from_stream(body)).into_response()
}

/// What an event stream has still to say.
struct Events {
    follower: Follower,
    only: Option<Stream>,
    seq: u64,
    /// Node time of the attempt's first frame.
    begin: Option<i64>,
    ready: VecDeque<Bytes>,
    done: bool,
}

fn events(follower: Follower, only: Option<Stream>, resumed: Option<Place>, after: u64) -> Response {
    let seq = resumed.map_or(after, |place| place.seq);
    let mut state = Events { follower, only, seq, begin: None, ready: VecDeque::new(), done: false };
    if let Some(no) = state.follower.attempt
        && resumed.is_some_and(|place| place.attempt != no.ordinal())
    {
        // What was seen so far is of an attempt before this one.
        state.again(no);
    }
    let body = stream::unfold(state, |mut s| async move {
        loop {
            if let Some(event) = s.ready.pop_front() {
                return Some((Ok::<Bytes, std::io::Error>(event), s));
            }
            if s.done {
                return None;
            }
            s.read().await;
        }
    });
    let headers = [(header::CONTENT_TYPE, "text/event-stream"), (header::CACHE_CONTROL, "no-store")];
    (headers, Body::from_stream(body)).into_response()
}

impl Events {
    async fn read(&mut self) {
        match self.follower.next(self.seq, true).await {
            Next::Frames(frames) => {
                if self.begin.is_none() {
                    self.begin = self.first_t_ms(&frames).await;
                }
                let begin = self.begin.unwrap_or(0);
                let mut chunk = BytesMut::new();
                for f in frames {
                    self.seq = f.seq;
                    if self.only.is_none_or(|s| s == f.stream) {
                        chunk.extend_from_slice(&output_event(&f, self.id(f.seq), begin));
                    }
                }
                self.ready.push_back(chunk.freeze());
            }
            Next::Again(no) => self.again(no),
            Next::Quiet => self.ready.push_back(Bytes::from_static(b": quiet\n\n")),
            Next::Broken => {
                self.done = true;
                if self.follower.app.stop.is_cancelled() {
                    let detail = "the hub is stopping; come back with the last id";
                    self.ready.push_back(event("stopping", None, &StreamEnd { code: "stopping".into(), detail: detail.into() }));
                }
            }
            Next::Denied(detail) => {
                self.done = true;
                self.ready.push_back(event("denied", None, &StreamEnd { code: "rights".into(), detail }));
            }
            Next::End => {
                self.done = true;
                let totals = self.follower.task.output;
                if totals.truncated {
                    let gap = GapEvent { from: totals.kept_seq + 1, to: Some(totals.durable_seq), reason: "truncated".into() };
                    self.ready.push_back(event("gap", Some(self.id(totals.durable_seq)), &gap));
                }
                let app = self.follower.app.clone();
                // Final, so it is as it was, and whole.
                if let Ok(Some(task)) = app.tasks.journal.task(self.follower.id).await
                    && let Ok(detail) = app.tasks.detail(task).await
                {
                    self.ready.push_back(event("end", None, &EndEvent { task: views::detail(&app, detail) }));
                }
            }
        }
    }

    fn again(&mut self, no: AttemptNo) {
        (self.seq, self.begin) = (0, None);
        let attempt = no.ordinal();
        self.ready.push_back(event("attempt", Some(Place { attempt, seq: 0 }.id()), &AttemptEvent { attempt }));
    }

    fn id(&self, seq: u64) -> String {
        Place { attempt: self.follower.attempt.map_or(1, AttemptNo::ordinal), seq }.id()
    }

    async fn first_t_ms(&self, frames: &[OutputFrame]) -> Option<i64> {
        let first = frames.first()?;
        if first.seq == 1 {
            return Some(first.t_ms);
        }
        let earliest = self.follower.app.tasks.output(&self.follower.task, self.follower.attempt, 0, 1).await.ok()?;
        Some(earliest.first().unwrap_or(first).t_ms)
    }
}

fn output_event(f: &OutputFrame, id: String, begin: i64) -> Bytes {
    let stream = match f.stream {
        Stream::Stdout => "stdout",
        Stream::Stderr => "stderr",
    };
    let data = OutputEvent {
        seq: f.seq,
        stream: stream.into(),
        t_ms: f.t_ms.saturating_sub(begin).max(0) as u64,
        data_base64: B64.encode(&f.data),
    };
    event("output", Some(id), &data)
}

/// One event of the WHATWG event-stream format. JSON has no line break, so one `data:` line is enough.
pub(super) fn event(kind: &str, id: Option<String>, data: &impl serde::Serialize) -> Bytes {
    let id = id.map(|n| format!("id: {n}\n")).unwrap_or_default();
    let json = serde_json::to_string(data).unwrap_or_default();
    Bytes::from(format!("{id}event: {kind}\ndata: {json}\n\n"))
}

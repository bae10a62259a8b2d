//! Live events as server-sent events, and what the WebSocket shares with them: what was asked for, the
//! shapes, when the reader's rights are looked up again.

use super::App;
use super::body::Query;
use super::problem::{Answer, Refusal};
use super::who::Who;
use crate::doors::socket::own_origin;
use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, Uri, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures::stream;
use hub_engine::accounts::Accounts;
use hub_engine::bus::EventId;
use hub_engine::events::{Data, Event, Feed, NodeNews, SessionNews, TaskNews, Told, Topic};
use mesh_core::ceiling::Closed;
use mesh_process::{CancellationToken, SharedClock};
use mesh_wire::convert::rfc3339;
use mesh_wire::rest::{EventView, MemoryView, ReasonView, StreamEnd};
use serde::Deserialize;
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;
use utoipa::IntoParams;

const COMMENT_EVERY: Duration = Duration::from_secs(15);
/// A stream outlives its token, but not the rights behind it.
const RIGHTS_EVERY: Duration = Duration::from_secs(60);
/// Nor what was granted, which may expire, or end at another hub.
pub(in crate::doors) const GRANTED_EVERY: Duration = Duration::from_secs(4);
/// Longer than any id that was given.
const MAX_ID: usize = 128;

#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct EventsQuery {
    /// Comma-separated: nodes, tasks, sessions; all that the caller may read without it
    topics: Option<String>,
    /// The last event that was seen
    after: Option<String>,
}

/// Live events
///
/// Each event has the data of EventView; `reset` says that some were missed, `end` (StreamEnd) that the stream ends.
#[utoipa::path(
    get, path = "/events", tag = "events",
    params(EventsQuery, ("last-event-id" = Option<String>, Header, description = "The last event that was seen; weighs more than `after`")),
    responses((status = 200, description = "Server-sent events", body = String, content_type = "text/event-stream"), (status = 422, description = "A topic that is not built yet")),
)]
pub async fn get(State(app): State<App>, who: Who, Query(q): Query<EventsQuery>, uri: Uri, headers: HeaderMap) -> Answer<Response> {
    let (reader, stop) = (open(&app, who, &q, &uri, &headers)?, app.stop.clone());
    // Answered at once: the reader is in place, and has an id to come back with.
    let first = Bytes::from(format!(": open\n{}\n", id_line(reader.feed.position().as_ref())));
    let body = stream::unfold((reader, stop, Some(first), false), |(mut reader, stop, first, done)| async move {
        if done {
            return None;
        }
        let (chunk, done) = match first {
            Some(first) => (first, false),
            None => reader.chunk(&stop).await,
        };
        Some((Ok::<Bytes, std::io::Error>(chunk), (reader, stop, None, done)))
    });
    let headers = [(header::CONTENT_TYPE, "text/event-stream"), (header::CACHE_CONTROL, "no-store")];
    Ok((headers, Body::from_stream(body)).into_response())
}

/// Judges a request for events and opens the reader.
pub fn open(app: &App, who: Who, q: &EventsQuery, uri: &Uri, headers: &HeaderMap) -> Answer<Reader> {
    own_origin(app, uri, headers)?;
    let topics = q.topics.as_deref().map(|text| text.split(',').map(|t| topic(t.trim())).collect::<Answer<_>>()).transpose()?;
    // What a reader comes back with is newer than what its first address named.
    let after = headers.get("last-event-id").map(|v| v.to_str().unwrap_or_default()).or(q.after.as_deref());
    reader(app, who, topics, after)
}

/// A reader of these topics, or of all that it may read, from now on or after an event.
pub fn reader(app: &App, who: Who, topics: Option<Vec<Topic>>, after: Option<&str>) -> Answer<Reader> {
    // The bus knows no id as long as one that is cut here either: the reader hears a reset.
    let after = after.filter(|id| !id.is_empty()).map(|id| EventId::new(id.chars().take(MAX_ID).collect::<String>()));
    let feed = app.events.open(who.authenticated().clone(), topics, after.as_ref())?;
    Ok(Reader::new(feed, app.accounts.clone(), app.clock.clone()))
}

pub fn topic(name: &str) -> Answer<Topic> {
    let known = || Topic::ALL.map(Topic::as_str).join(", ");
    Topic::parse(name).ok_or_else(|| Refusal::bad_request("bad_topic", format!("there is no topic {name:?}; there is {}", known())))
}

/// One stream of events with its owner's rights.
pub struct Reader {
    pub feed: Feed,
    accounts: Arc<Accounts>,
    clock: SharedClock,
    /// When the rights are looked up again.
    pub look_at: Instant,
    quiet_at: Instant,
    _counted: Counted,
}

/// One open stream of events among those that are counted.
struct Counted(&'static str);

impl Counted {
    fn new(door: &'static str) -> Self {
        metrics::gauge!("cortex_event_streams", "door" => door).increment(1);
        Self(door)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        metrics::gauge!("cortex_event_streams", "door" => self.0).decrement(1);
    }
}

/// What a reader must now do.
pub enum Do {
    Say(Box<EventView>),
    /// Events were missed; one for each topic.
    Reset {
        views: Vec<EventView>,
        /// Under way, since the reader was too slow.
        behind: bool,
    },
    /// Nothing happened for a while.
    Quiet,
    /// [`Reader::look`], before anything more is said.
    Look,
}

fn look_every(feed: &Feed) -> Duration {
    let granted = feed.who().caller.as_person().is_some_and(|p| !p.granted.is_empty());
    if granted { GRANTED_EVERY } else { RIGHTS_EVERY }
}

impl Reader {
    pub fn new(feed: Feed, accounts: Arc<Accounts>, clock: SharedClock) -> Self {
        let now = Instant::now();
        // Who it is was found out before the feed was open: what was changed since is looked up first.
        Self { feed, accounts, clock, look_at: now, quiet_at: now + COMMENT_EVERY, _counted: Counted::new("sse") }
    }

    /// Counts the reader among those of another door.
    pub fn through(mut self, door: &'static str) -> Self {
        self._counted = Counted::new(door);
        self
    }

    /// Waits for the next. Dropping the future loses nothing.
    pub async fn next(&mut self) -> Do {
        let told = tokio::select! {
            biased;
            () = tokio::time::sleep_until(self.look_at) => return Do::Look,
            told = self.feed.next() => told,
            () = tokio::time::sleep_until(self.quiet_at) => {
                self.quiet_at = Instant::now() + COMMENT_EVERY;
                return Do::Quiet;
            }
        };
        self.quiet_at = Instant::now() + COMMENT_EVERY;
        match told {
            Told::Event(id, event) => Do::Say(Box::new(view(&id, &event))),
            Told::Reset { id, behind } => Do::Reset { views: self.resets(&id), behind },
            Told::LookAgain => {
                // Kept until it was done, even if this future's owner has something else to do first.
                self.look_at = Instant::now();
                Do::Look
            }
        }
    }

    /// Looks the reader's rights up again; says why when they have ended.
    pub async fn look(&mut self) -> Result<(), String> {
        let rights = match self.accounts.still(self.feed.who()).await {
            Ok(who) => self.feed.set_rights(who),
            Err(e) => Err(e),
        };
        self.look_at = Instant::now() + look_every(&self.feed);
        rights.map_err(|e| e.to_string())
    }

    fn resets(&self, id: &EventId) -> Vec<EventView> {
        let at = rfc3339(self.clock.now_ms());
        let one =
            |t: &Topic| EventView { id: id.to_string(), topic: t.as_str().into(), kind: "reset".into(), at: at.clone(), data: json!({}) };
        self.feed.topics().iter().map(one).collect()
    }

    /// The next part of an event stream, and whether it was the last.
    async fn chunk(&mut self, stop: &CancellationToken) -> (Bytes, bool) {
        loop {
            let next = tokio::select! {
                biased;
                () = stop.cancelled() => return (end("stopping", "the hub is stopping"), true),
                next = self.next() => next,
            };
            match next {
                Do::Say(view) => return (Bytes::from(block(&view, true)), false),
                Do::Reset { views, .. } => {
                    // The id comes with the last: who is cut off between them hears them all again.
                    let blocks = views.iter().enumerate().map(|(i, v)| block(v, i + 1 == views.len()));
                    return (Bytes::from(blocks.collect::<String>()), false);
                }
                // With the place of now, so that who returns after a long silence has missed nothing.
                Do::Quiet => return (Bytes::from(format!(": quiet\n{}\n", id_line(self.feed.position().as_ref()))), false),
                Do::Look => {
                    if let Err(detail) = self.look().await {
                        return (end("rights", &detail), true);
                    }
                }
            }
        }
    }
}

fn id_line(id: Option<&EventId>) -> String {
    id.map(|id| format!("id: {id}\n")).unwrap_or_default()
}

/// One event of the WHATWG event-stream format. JSON has no line break, so one `data:` line is enough.
fn block(view: &EventView, with_id: bool) -> String {
    let id = if with_id { format!("id: {}\n", view.id) } else { String::new() };
    format!("{id}event: {}\ndata: {}\n\n", view.kind, json(view))
}

fn end(code: &str, detail: &str) -> Bytes {
    let end = StreamEnd { code: code.into(), detail: detail.into() };
    Bytes::from(format!("event: end\ndata: {}\n\n", json(&end)))
}

pub fn json(shape: &impl serde::Serialize) -> String {
    serde_json::to_string(shape).unwrap_or_default()
}

fn view(id: &EventId, event: &Event) -> EventView {
    EventView {
        id: id.to_string(),
        topic: event.topic().map_or("", Topic::as_str).into(),
        kind: event.kind().into(),
        at: rfc3339(event.at),
        data: data(&event.data),
    }
}

fn data(data: &Data) -> Value {
    match data {
        Data::Node(id, news) => {
            let mut v = json!({ "node_id": id.to_string() });
            match news {
                NodeNews::Enrolled { name } => v["name"] = json!(name),
                NodeNews::Registered { version } => v["version"] = json!(version),
                NodeNews::Renewed { not_after } | NodeNews::Recovered { not_after } => {
                    v["certificate_not_after"] = json!(rfc3339(*not_after))
                }
                NodeNews::Online | NodeNews::Offline | NodeNews::Superseded => {}
                NodeNews::Draining | NodeNews::Resumed | NodeNews::Revoked | NodeNews::Removed => {}
                NodeNews::Renamed { name } => v["name"] = json!(name),
                NodeNews::Takes { closed, max_tasks } => {
                    v["reason"] = json!(closed.map(Closed::as_str));
                    v["max_tasks"] = json!(max_tasks);
                }
                NodeNews::Changed { labels, slots, task_limit } => {
                    v["labels"] = json!(labels);
                    v["slots"] = json!(slots);
                    v["max_tasks"] = json!(task_limit);
                }
                NodeNews::Health(h) => {
                    v["cpu_percent"] = json!(h.cpu_percent);
                    v["memory"] = json!(MemoryView { used_bytes: h.memory_used, total_bytes: h.memory_total });
                    v["disk"] = json!(MemoryView { used_bytes: h.disk_used, total_bytes: h.disk_total });
                    v["load"] = json!(h.load_1m);
                    v["running"] = json!(h.running);
                }
            }
            v
        }
        Data::Task(news) => task(news),
        Data::Session(id, news) => {
            let mut v = json!({ "session_id": id.to_string() });
            match news {
                SessionNews::Created { name } | SessionNews::Renamed { name } => v["name"] = json!(name),
                SessionNews::Closed | SessionNews::Expired | SessionNews::Purged => {}
                SessionNews::Message { id, role } => {
                    v["message_id"] = json!(id.to_string());
                    v["role"] = json!(role.as_str());
                }
                SessionNews::Attached(node) | SessionNews::Detached(node) => v["node_id"] = json!(node.to_string()),
            }
            v
        }
        Data::Rights(_) => Value::Null,
    }
}

fn task(t: &TaskNews) -> Value {
    json!({
        "task_id": t.task.to_string(),
        "session_id": t.session.map(|s| s.to_string()),
        "node_id": t.node.map(|n| n.to_string()),
        "skill": t.skill,
        "state": t.state.as_str(),
        "attempt": t.attempt,
        "reason": t.reason.as_ref().map(|r| ReasonView { code: r.code.as_str().into(), detail: r.detail.clone() }),
        "exit_code": t.exit_code,
        "signal": t.signal,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn topics_are_known_words() {
        assert_eq!(topic("tasks").unwrap(), Topic::Tasks);
        for bad in ["", "task", "nodes,", "nodes;tasks", "*"] {
            assert_eq!(topic(bad).unwrap_err().code, "bad_topic", "{bad:?}");
        }
    }
}

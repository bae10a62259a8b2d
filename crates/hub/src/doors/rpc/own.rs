//! What no one call of REST answers in JSON.

use super::discover::document_of_methods;
use super::params::Params;
use crate::doors::rest::agents::{self, LogsQuery};
use crate::doors::rest::output::{self, stream_named};
use crate::doors::rest::state::{self, ListQuery};
use crate::doors::rest::{App, PathId, Query, Refusal, VERSION, Who, system, tasks};
use axum::Json;
use axum::extract::State;
use base64::Engine;
use base64::engine::general_purpose::STANDARD as B64;
use mesh_core::{AgentId, TaskId};
use mesh_wire::convert::rfc3339;
use mesh_wire::rest::{
    AgentList, AgentLogs, AgentLogsRequest, AgentReply, HealthReply, MetricsReply, StateReply, TaskOutputRequest, TaskOutputView, TaskView,
};
use serde_json::Value;
use std::collections::BTreeMap;

/// Bytes of output in one answer, where nothing else is asked for.
const OUTPUT_BYTES: usize = 64 << 10;
/// And at most.
pub const MAX_OUTPUT_BYTES: usize = 1 << 20;

pub fn health(app: &App) -> Json<HealthReply> {
    let timestamp = rfc3339(app.clock.now_ms());
    Json(HealthReply { status: "ok".into(), version: VERSION.into(), uptime_secs: system::uptime_secs(app), timestamp })
}

/// REST has two addresses for it, one of them with a session in it.
pub async fn dispatch(app: App, who: Who, mut p: Params) -> Result<Json<TaskView>, Refusal> {
    let (.., task) = match p.id_if_given("session_id")? {
        Some(session) => tasks::dispatch_in_session(State(app), who, session, p.creating()?).await?,
        None => tasks::dispatch(State(app), who, p.creating()?).await?,
    };
    Ok(task)
}

pub async fn output(app: App, who: Who, p: Params) -> Result<Json<TaskOutputView>, Refusal> {
    let r: TaskOutputRequest = p.read()?;
    let PathId(id): PathId<TaskId> = PathId::of(&r.task_id)?;
    let only = stream_named(r.stream.as_deref())?;
    let as_text = match r.encoding.as_deref() {
        None | Some("text") => true,
        Some("base64") => false,
        Some(other) => return Err(Refusal::bad_request("bad_params", format!("encoding is text or base64, not {other:?}"))),
    };
    let room = r.max_bytes.unwrap_or(OUTPUT_BYTES as u64);
    if !(1..=MAX_OUTPUT_BYTES as u64).contains(&room) {
        return Err(Refusal::bad_request("bad_params", format!("max_bytes is 1 to {MAX_OUTPUT_BYTES}, not {room}")));
    }
    let from_byte = r.from_byte.unwrap_or(0);
    let mut part = output::part(app, who, id, only, from_byte, room as usize).await?;
    let (mut text, mut data_base64) = (None, None);
    if as_text {
        let whole = part.bytes.len() - cut_short(&part.bytes);
        // What the end leaves open stays open, and a part that holds nothing else must not hold up the rest.
        if !part.end && (whole > 0 || part.bytes.len() < room as usize) {
            part.bytes.truncate(whole);
        }
        text = Some(String::from_utf8_lossy(&part.bytes).into_owned());
    } else {
        data_base64 = Some(B64.encode(&part.bytes));
    }
    let next_byte = from_byte + part.bytes.len() as u64;
    Ok(Json(TaskOutputView { task_id: id.to_string(), attempt: part.attempt, from_byte, next_byte, end: part.end, text, data_base64 }))
}

/// Bytes at the end that begin a character and do not end it.
fn cut_short(bytes: &[u8]) -> usize {
    for (n, byte) in bytes.iter().rev().take(3).enumerate() {
        let width = match byte {
            0xc2..=0xdf => 2,
            0xe0..=0xef => 3,
            0xf0..=0xf4 => 4,
            // One that goes on: the first is further ahead.
            0x80..=0xbf => continue,
            _ => return 0,
        };
        return if width > n + 1 { n + 1 } else { 0 };
    }
    0
}

pub async fn state(app: App, who: Who, p: Params) -> Result<Json<StateReply>, Refusal> {
    let timestamp = rfc3339(app.clock.now_ms());
    let Query(q) = p.query::<ListQuery>()?;
    let Json(page) = state::list(State(app), who, Query(q)).await?;
    let mut all: BTreeMap<String, BTreeMap<String, Value>> = BTreeMap::new();
    for entry in page.items {
        all.entry(entry.agent_id).or_default().insert(entry.key, entry.value);
    }
    Ok(Json(StateReply { state: all, next_cursor: page.next_cursor, timestamp }))
}

pub async fn spawn(app: App, who: Who, p: Params) -> Result<Json<AgentReply>, Refusal> {
    let (.., Json(agent)) = agents::spawn(State(app), who, p.creating()?).await?;
    let message = if agent.task_id.is_some() { "decided; agent.list says when it runs" } else { "it is there until it is killed" };
    Ok(Json(AgentReply { agent_id: agent.agent_id, status: agent.status, message: message.into() }))
}

pub async fn agents(app: App, who: Who, p: Params) -> Result<Json<AgentList>, Refusal> {
    let Json(page) = agents::list(State(app), who, p.query()?).await?;
    Ok(Json(AgentList { count: page.items.len() as u64, agents: page.items, next_cursor: page.next_cursor }))
}

pub async fn kill(app: App, who: Who, mut p: Params) -> Result<Json<AgentReply>, Refusal> {
    let id = p.id("agent_id")?;
    let (_, Json(agent)) = agents::kill(State(app), who, id, p.optional_body()?).await?;
    let message = match agent.status.as_str() {
        "stopping" => "it ends when its node has ended it",
        _ => "it has ended",
    };
    Ok(Json(AgentReply { agent_id: agent.agent_id, status: agent.status, message: message.into() }))
}

pub async fn logs(app: App, who: Who, p: Params) -> Result<Json<AgentLogs>, Refusal> {
    let r: AgentLogsRequest = p.read()?;
    let PathId(id): PathId<AgentId> = PathId::of(&r.agent_id)?;
    agents::lines(&app, &who, id, &LogsQuery { limit: r.limit, offset: r.offset, follow: None }).await.map(Json)
}

pub async fn metrics(app: App, who: Who, _: Params) -> Result<Json<MetricsReply>, Refusal> {
    let counts = app.agents.counts(who.caller()).await?;
    let timestamp = rfc3339(app.clock.now_ms());
    let Json(mut system) = system::stats(State(app), who).await?;
    system.history.clear();
    let agents = counts.into_iter().map(|(status, n)| (status.as_str().to_owned(), n)).collect();
    Ok(Json(MetricsReply { agents, system, timestamp }))
}

/// The same for all who are known.
pub async fn discover(_: App, _: Who, _: Params) -> Result<Json<&'static Value>, Refusal> {
    Ok(Json(document_of_methods()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn characters_are_not_cut() {
        for (text, n) in [("", 0), ("a", 0), ("ä", 0), ("a€", 0), ("a😀", 0)] {
            assert_eq!(cut_short(text.as_bytes()), n, "{text}");
        }
        for text in ["ä", "€", "😀"] {
            for n in 1..text.len() {
                assert_eq!(cut_short(&text.as_bytes()[..n]), n, "{n} bytes of {text}");
            }
        }
        for never in [&[0x80, 0x80, 0x80, 0x80][..], &[0xff], &[0xc0], b"a\xf5"] {
            assert_eq!(cut_short(never), 0, "{never:?}");
        }
    }
}

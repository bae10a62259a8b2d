//! Agents: spawn, look, kill, and their logs.

use super::App;
use super::body::{Creating, OptionalBody, PathId, Query};
use super::events::GRANTED_EVERY;
use super::output::{COMMENT_EVERY, event};
use super::page::{DEFAULT_LIMIT, MAX_LIMIT, page, window};
use super::problem::{Answer, Refusal};
use super::tasks::{read_select, read_shell};
use super::who::Who;
use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderName, StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::{Bytes, BytesMut};
use futures::stream;
use hub_engine::accounts::Authenticated;
use hub_engine::agents::{NewAgent, Process, What};
use hub_engine::records::Agent;
use hub_engine::runs::Ear;
use mesh_core::agent::{DEFAULT_BACKOFF_MS, Kind, Policy, Restart, Status};
use mesh_core::lines::Line;
use mesh_core::spec::Spec;
use mesh_core::{AgentId, UnixMs};
use mesh_wire::convert::rfc3339;
use mesh_wire::rest::*;
use serde::Deserialize;
use serde_json::Value;
use std::collections::VecDeque;
use tokio::sync::watch;
use tokio::time::Instant;
use utoipa::IntoParams;

type Spawned = (StatusCode, [(HeaderName, String); 1], Json<AgentView>);

/// Spawn an agent
///
/// A process is run on the node named, else on any that fits and that the caller may use, and again as its restart
/// policy says. Each run is a task without a time-out.
#[utoipa::path(
    post, path = "/agents", tag = "agents",
    params(("Idempotency-Key" = Option<String>, Header)),
    request_body(content = AgentRequest, example = json!({"name": "watcher", "agent_type": "process", "config": {
        "node": "laptop", "argv": ["./watch", "src"], "restart": {"policy": "on_failure", "max": 10, "backoff_ms": 1000},
    }})),
    responses(
        (status = 201, description = "The agent, durable", body = AgentView, headers(("location" = String, description = "Where it is"))),
        (status = 404, description = "No such node or session, or the caller may not see it"),
        (status = 409, description = "`name_taken`; `agents_full`; the session has ended, or the node is revoked or not attached"),
        (status = 422, description = "What is asked for makes no sense; `idempotency_mismatch`"),
    ),
)]
pub async fn spawn(State(app): State<App>, who: Who, asked: Creating<AgentRequest>) -> Answer<Spawned> {
    let (r, keyed) = asked.split(&app, &who);
    let agent = app.agents.spawn(who.caller(), NewAgent { name: r.name, what: read(&r.agent_type, r.config)?, keyed }).await?;
    let location = [(header::LOCATION, format!("/api/v1/agents/{}", agent.id))];
    Ok((StatusCode::CREATED, location, Json(view(agent))))
}

fn read(agent_type: &str, config: serde_json::Map<String, Value>) -> Answer<What> {
    match Kind::parse(agent_type) {
        Some(Kind::Basic) => return Ok(What::Basic(Value::Object(config).to_string())),
        Some(Kind::Process) => {}
        // A name of the registry, which is not there yet.
        None => return Err(Refusal::not_yet(&format!("agent_type: {agent_type:?}; what there is: basic, process"))),
    }
    let c: AgentConfig =
        serde_json::from_value(Value::Object(config)).map_err(|e| Refusal::unprocessable("bad_config", format!("config: {e}")))?;
    let session = c.session_id.as_deref().map(str::parse).transpose();
    let session = session.map_err(|e| Refusal::unprocessable("bad_config", format!("config.session_id: {e}")))?;
    let restart = match c.restart {
        None => Restart::default(),
        Some(r) => Restart {
            policy: Policy::parse(&r.policy).ok_or_else(|| {
                let words = Policy::ALL.iter().map(|p| p.as_str()).collect::<Vec<_>>().join(", ");
                Refusal::unprocessable("bad_restart", format!("restart.policy is one of {words}, not {:?}", r.policy))
            })?,
            max: r.max,
            backoff_ms: r.backoff_ms.unwrap_or(DEFAULT_BACKOFF_MS),
        },
    };
    let shell = ShellRequest { argv: c.argv, command: c.command, cwd: c.cwd, env: c.env, ..ShellRequest::default() };
    let select = c.select.as_ref().map(read_select).transpose()?;
    Ok(What::Process(Box::new(Process { spec: Spec::Shell(read_shell(shell)?), session, node: c.node, select, restart })))
}

#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct ListQuery {
    pub limit: Option<u32>,
    pub cursor: Option<String>,
    /// Of exactly this name
    pub name: Option<String>,
    /// In this status
    pub status: Option<String>,
}

/// Agents that the caller may see
#[utoipa::path(get, path = "/agents", tag = "agents", params(ListQuery), responses((status = 200, description = "A page", body = Page<AgentView>)))]
pub async fn list(State(app): State<App>, who: Who, Query(q): Query<ListQuery>) -> Answer<Json<Page<AgentView>>> {
    let status = match q.status.as_deref() {
        None => None,
        Some(s) => Some(Status::parse(s).ok_or_else(|| Refusal::bad_request("bad_query", format!("{s:?} is not a status of agents")))?),
    };
    let filters = format!("agents {:?} {status:?}", q.name);
    let w = window(q.limit, q.cursor.as_deref(), &filters, AgentId::from_bytes)?;
    let found = app.agents.list(who.caller(), q.name, status, w).await?;
    Ok(Json(page(found, w.limit, &filters, |a| *a.id.as_bytes(), view)))
}

/// An agent
#[utoipa::path(get, path = "/agents/{id}", tag = "agents", responses((status = 200, description = "The agent", body = AgentView)))]
pub async fn get(State(app): State<App>, who: Who, PathId(id): PathId<AgentId>) -> Answer<Json<AgentView>> {
    Ok(Json(view(app.agents.get(who.caller(), id).await?)))
}

/// Kill an agent
///
/// Its process is given time to end by itself, or with `force` none. The status is `stopping` until its node says that
/// it ended. One that has ended stays as it is.
#[utoipa::path(
    post, path = "/agents/{id}/kill", tag = "agents",
    request_body(content = Option<AgentKillRequest>, example = json!({"force": true})),
    responses((status = 202, description = "The agent; it is being ended, or had ended", body = AgentView)),
)]
pub async fn kill(
    State(app): State<App>,
    who: Who,
    PathId(id): PathId<AgentId>,
    OptionalBody(r): OptionalBody<AgentKillRequest>,
) -> Answer<(StatusCode, Json<AgentView>)> {
    Ok((StatusCode::ACCEPTED, Json(view(app.agents.kill(who.caller(), id, r.force).await?))))
}

#[derive(Debug, Default, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct LogsQuery {
    pub limit: Option<u32>,
    /// How many lines to pass over, from the first that was ever written; what is gone is passed over anyway
    pub offset: Option<u64>,
    /// An event stream, which ends with the agent
    pub follow: Option<bool>,
}

/// The log of an agent
///
/// All that its runs wrote, line by line, and what its supervisor says. The newest `limits.output_bytes` are kept over all
/// restarts. A page ends early at 1 MiB. With `follow=true` or `Accept: text/event-stream` an event stream: `line`, `gap`,
/// `end`, `stopping` and `denied`, whose data are AgentLogLine, GapEvent, AgentEnd and StreamEnd.
#[utoipa::path(
    get, path = "/agents/{id}/logs", tag = "agents",
    params(LogsQuery, ("last-event-id" = Option<String>, Header, description = "Event streams: the id of the last event that was seen")),
    responses((status = 200, description = "Lines, oldest first", content((AgentLogs = "application/json"), (String = "text/event-stream")))),
)]
pub async fn logs(
    State(app): State<App>,
    who: Who,
    PathId(id): PathId<AgentId>,
    Query(q): Query<LogsQuery>,
    headers: HeaderMap,
) -> Answer<Response> {
    let accept = headers.get(header::ACCEPT).and_then(|v| v.to_str().ok()).unwrap_or_default();
    if q.follow != Some(true) && !accept.contains("text/event-stream") {
        return Ok(Json(lines(&app, &who, id, &q).await?).into_response());
    }
    let mut rights = app.events.rights();
    // Who it is was found out before: what was changed since is looked up.
    rights.mark_changed();
    app.agents.get(who.caller(), id).await?;
    let resumed = match headers.get("last-event-id").and_then(|v| v.to_str().ok()) {
        None => None,
        Some(text) => {
            let bad = |_| Refusal::bad_request("bad_event_id", "Last-Event-ID is the id of an event of this stream");
            Some(text.parse::<u64>().map_err(bad)?)
        }
    };
    let ear = app.agents.listen(id);
    let next = resumed.or(q.offset).unwrap_or(0);
    let (ready, look_at) = (VecDeque::new(), Instant::now() + GRANTED_EVERY);
    let state = Following { app, who: who.authenticated().clone(), rights, look_at, id, next, ear, ready, done: false };
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
    Ok((headers, Body::from_stream(body)).into_response())
}

/// One page.
pub async fn lines(app: &App, who: &Who, id: AgentId, q: &LogsQuery) -> Answer<AgentLogs> {
    let limit = q.limit.unwrap_or(DEFAULT_LIMIT);
    if !(1..=MAX_LIMIT).contains(&limit) {
        return Err(Refusal::bad_request("bad_limit", format!("limit is 1 to {MAX_LIMIT}, not {limit}")));
    }
    let (agent, page) = app.agents.logs(who.caller(), id, q.offset.unwrap_or(0), limit).await?;
    let logs = page.lines.into_iter().map(|(at, line)| line_view(at, line)).collect();
    Ok(AgentLogs { agent_id: agent.id.to_string(), logs, total: page.total, first: page.first })
}

/// Reads on behind an agent until its end.
struct Following {
    app: App,
    who: Authenticated,
    /// Somebody's rights were changed.
    rights: watch::Receiver<u64>,
    /// When the reader's rights are looked up again whatever happens.
    look_at: Instant,
    id: AgentId,
    /// The offset of the next line.
    next: u64,
    ear: Ear,
    ready: VecDeque<Bytes>,
    done: bool,
}

impl Following {
    /// Looks the reader's rights up again, when it is time for that; an error when they have ended.
    async fn look(&mut self) -> Result<(), hub_engine::Error> {
        if !self.rights.has_changed().unwrap_or(false) && Instant::now() < self.look_at {
            return Ok(());
        }
        self.rights.mark_unchanged();
        self.look_at = Instant::now() + GRANTED_EVERY;
        self.who = self.app.accounts.still(&self.who).await?;
        Ok(())
    }

    fn last(&mut self, words: Option<Bytes>) {
        self.done = true;
        self.ready.extend(words);
    }

    async fn read(&mut self) {
        let quiet_at = Instant::now() + COMMENT_EVERY;
        loop {
            self.ear.seen();
            let read = async {
                self.look().await?;
                // The agent first: its end and its last lines are one commit.
                let agent = self.app.agents.get(&self.who.caller, self.id).await?;
                let (_, page) = self.app.agents.logs(&self.who.caller, self.id, self.next, MAX_LIMIT).await?;
                Ok::<_, hub_engine::Error>((agent, page))
            };
            let (agent, page) = match read.await {
                Ok(read) => read,
                // The hub is stopping, or the store failed: the reader comes again.
                Err(hub_engine::Error::Store(_)) => return self.last(None),
                Err(why) => {
                    let end = StreamEnd { code: "rights".into(), detail: why.to_string() };
                    return self.last(Some(event("denied", None, &end)));
                }
            };
            if let Some((first, _)) = page.lines.first() {
                let mut chunk = BytesMut::new();
                if *first > self.next {
                    let gap = GapEvent { from: self.next + 1, to: Some(*first), reason: "dropped".into() };
                    chunk.extend_from_slice(&event("gap", Some(first.to_string()), &gap));
                }
                for (at, line) in page.lines {
                    self.next = at + 1;
                    chunk.extend_from_slice(&event("line", Some(self.next.to_string()), &line_view(at, line)));
                }
                return self.ready.push_back(chunk.freeze());
            }
            if agent.life.status.is_final() {
                return self.last(Some(event("end", None, &AgentEnd { agent: view(agent) })));
            }
            let stop = self.app.stop.clone();
            tokio::select! {
                biased;
                () = stop.cancelled() => {
                    let detail = "the hub is stopping; come back with the last id";
                    let end = StreamEnd { code: "stopping".into(), detail: detail.into() };
                    return self.last(Some(event("stopping", None, &end)));
                }
                _ = self.rights.changed() => self.rights.mark_changed(),
                () = tokio::time::sleep_until(self.look_at) => {}
                () = self.ear.changed() => {}
                () = tokio::time::sleep_until(quiet_at) => return self.ready.push_back(Bytes::from_static(b": quiet\n\n")),
            }
        }
    }
}

pub fn view(a: Agent) -> AgentView {
    let (life, time) = (a.life, |at: Option<UnixMs>| at.map(rfc3339));
    AgentView {
        agent_id: a.id.to_string(),
        name: a.name,
        agent_type: a.kind.as_str().into(),
        owner_id: a.owner.to_string(),
        status: life.status.as_str().into(),
        reason: life.reason,
        node_id: life.node.or(a.node).map(|id| id.to_string()),
        task_id: life.run.map(|run| run.task.to_string()),
        session_id: a.session.map(|id| id.to_string()),
        restarts: life.restarts,
        restart: (a.kind == Kind::Process).then(|| RestartView {
            policy: a.restart.policy.as_str().into(),
            max: a.restart.max,
            backoff_ms: Some(a.restart.backoff_ms),
        }),
        created_at: rfc3339(a.created_at),
        started_at: time(life.started_at),
        next_start_at: time(life.next_at),
        ended_at: time(life.ended_at),
    }
}

fn line_view(offset: u64, line: Line) -> AgentLogLine {
    AgentLogLine {
        seq: offset + 1,
        at: rfc3339(line.at),
        stream: line.source.as_str().into(),
        line: String::from_utf8_lossy(&line.text).into_owned(),
        cut: line.cut,
    }
}

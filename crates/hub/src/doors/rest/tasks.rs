//! Dispatch, look, cancel.

use super::App;
use super::body::{Creating, PathId, Query};
use super::page::{cut_page, window};
use super::problem::{Answer, Refusal};
use super::views;
use super::who::Who;
use axum::Json;
use axum::extract::State;
use axum::http::{HeaderName, StatusCode, header};
use base64::Engine;
use base64::engine::general_purpose::STANDARD as B64;
use hub_engine::records::TaskFilter;
use hub_engine::tasks::{Dispatch, MAX_WAIT_SECS};
use mesh_core::permission::Permission;
use mesh_core::select::Selector;
use mesh_core::spec::{Program, Shell, Spec};
use mesh_core::task::{DEFAULT_BACKOFF_MS, OnLost, TaskState, Terms};
use mesh_core::{SessionId, TaskId};
use mesh_wire::convert::parse_rfc3339;
use mesh_wire::rest::*;
use serde::Deserialize;
use std::collections::BTreeSet;
use utoipa::IntoParams;

type Dispatched = (StatusCode, [(HeaderName, String); 1], Json<TaskView>);

/// Run a task in a workspace of its own
///
/// On the node named, else on any that the caller may use, or with `all` on each of them. Exactly one skill.
#[utoipa::path(
    post, path = "/dispatch", tag = "tasks",
    params(("Idempotency-Key" = Option<String>, Header)),
    request_body(content = DispatchRequest, example = json!({"node": "laptop", "shell": {"argv": ["uname", "-a"]}, "wait_secs": 10})),
    responses(
        (status = 200, description = "The task, which ended within `wait_secs`", body = TaskView, headers(("location" = String, description = "Where it is"))),
        (status = 202, description = "The task, accepted and durable", body = TaskView, headers(("location" = String, description = "Where it is"))),
        (status = 404, description = "No such node or session, or the caller may not see it"),
        (status = 409, description = "The session has ended, or the node is revoked or not attached; `no_node`: with `all`, no node matches"),
        (status = 422, description = "What is asked for makes no sense, or is not built yet; `idempotency_mismatch`"),
    ),
)]
pub async fn dispatch(State(app): State<App>, who: Who, asked: Creating<DispatchRequest>) -> Answer<Dispatched> {
    let d = asked_for(&app, &who, None, asked)?;
    run(app, who, d).await
}

/// Run a task in a session's workspace
///
/// On the node named, else on any that is attached, or with `all` on each of them. Exactly one skill.
#[utoipa::path(
    post, path = "/sessions/{id}/dispatch", tag = "tasks",
    params(("Idempotency-Key" = Option<String>, Header)),
    request_body(content = DispatchRequest, example = json!({
        "shell": {"command": "make test | tail"}, "timeout_secs": 600,
        "select": {"labels": {"os": "linux"}}, "priority": 10, "retries": {"max": 3, "backoff_ms": 500},
    })),
    responses(
        (status = 200, description = "The task, which ended within `wait_secs`", body = TaskView, headers(("location" = String, description = "Where it is"))),
        (status = 202, description = "The task, accepted and durable", body = TaskView, headers(("location" = String, description = "Where it is"))),
        (status = 404, description = "No such node or session, or the caller may not see it"),
        (status = 409, description = "The session has ended, or the node is revoked or not attached; `no_node`: with `all`, no node matches"),
        (status = 422, description = "What is asked for makes no sense, or is not built yet; `idempotency_mismatch`"),
    ),
)]
pub async fn dispatch_in_session(
    State(app): State<App>,
    who: Who,
    PathId(session): PathId<SessionId>,
    asked: Creating<DispatchRequest>,
) -> Answer<Dispatched> {
    let d = asked_for(&app, &who, Some(session), asked)?;
    run(app, who, d).await
}

/// Boxed, since each future on the way would hold it twice.
fn asked_for(app: &App, who: &Who, session: Option<SessionId>, asked: Creating<DispatchRequest>) -> Answer<Box<Dispatch>> {
    let (r, keyed) = asked.split(app, who);
    let d = Dispatch { keyed, ..read(r, session)? };
    who.asked.may_wait(d.wait_secs.min(MAX_WAIT_SECS));
    Ok(Box::new(d))
}

async fn run(app: App, who: Who, d: Box<Dispatch>) -> Answer<Dispatched> {
    let task = app.tasks.dispatch(who.caller(), *d).await?;
    let location = [(header::LOCATION, format!("/api/v1/tasks/{}", task.id))];
    let status = if task.progress.state.is_final() { StatusCode::OK } else { StatusCode::ACCEPTED };
    let detail = app.tasks.detail(task).await?;
    Ok((status, location, Json(views::detail(&app, detail))))
}

/// Reads a dispatch; what the contract names and is not built is refused by name.
fn read(r: DispatchRequest, session: Option<SessionId>) -> Answer<Dispatch> {
    let unbuilt = [
        ("browser", r.browser.is_some()),
        ("container", r.container.is_some()),
        ("tool", r.tool.is_some()),
        ("agent", r.agent.is_some()),
        ("limits", r.limits.is_some()),
        ("shell.pty", r.shell.as_ref().is_some_and(|s| s.pty.is_some())),
    ];
    if let Some((name, _)) = unbuilt.iter().find(|(_, present)| *present) {
        return Err(Refusal::not_yet(name));
    }
    for (field, value, built, later) in [
        ("sandbox", r.sandbox.as_deref(), "permissive", &["strict"][..]),
        ("network", r.network.as_deref(), "full", &["none", "proxy"][..]),
    ] {
        match value {
            None => {}
            Some(v) if v == built => {}
            Some(v) if later.contains(&v) => return Err(Refusal::not_yet(&format!("{field}: {v}"))),
            Some(v) => return Err(Refusal::unprocessable("bad_value", format!("{field} cannot be {v:?}"))),
        }
    }
    let terms = read_terms(&r)?;
    let spec = match (r.shell, r.echo) {
        (Some(shell), None) => Spec::Shell(read_shell(shell)?),
        (None, Some(echo)) => Spec::Echo { payload: echo.payload.into_bytes() },
        _ => return Err(Refusal::unprocessable("bad_skill", "give exactly one of shell and echo")),
    };
    Ok(Dispatch {
        session,
        node: r.node,
        all: r.all.unwrap_or(false),
        spec,
        timeout_secs: r.timeout_secs.unwrap_or(0),
        queue_secs: r.queue_secs.unwrap_or(0),
        wait_secs: r.wait_secs.unwrap_or(0),
        terms,
        keyed: None,
    })
}

fn read_terms(r: &DispatchRequest) -> Answer<Terms> {
    let time = |field: &str, text: &Option<String>| {
        let read = text.as_deref().map(parse_rfc3339).transpose();
        read.map_err(|e| Refusal::unprocessable("bad_time", format!("{field}: {e}")))
    };
    // What is beyond its type is beyond every bound.
    let priority = r.priority.unwrap_or(0).clamp(i32::MIN.into(), i32::MAX.into()) as i32;
    let (retries, backoff_ms) = match &r.retries {
        Some(asked) if asked.max > 0 => (asked.max, asked.backoff_ms.unwrap_or(DEFAULT_BACKOFF_MS)),
        Some(asked) => (0, asked.backoff_ms.unwrap_or(0)),
        None => (0, 0),
    };
    let select = r.select.as_ref().map(read_select).transpose()?;
    let on_lost = match r.on_lost.as_deref() {
        None => OnLost::default(),
        Some(word) => OnLost::parse(word).ok_or_else(|| {
            let words = OnLost::ALL.map(OnLost::as_str).join(", ");
            Refusal::unprocessable("bad_value", format!("on_lost is one of {words}, not {word:?}"))
        })?,
    };
    Ok(Terms {
        on_lost,
        lost_after: r.lost_after_secs,
        select,
        priority,
        not_before: time("not_before", &r.not_before)?,
        deadline: time("deadline", &r.deadline)?,
        retries,
        backoff_ms,
    })
}

pub(super) fn read_select(s: &SelectView) -> Answer<Selector> {
    let skills: BTreeSet<String> = s.skills.iter().cloned().collect();
    if skills.len() < s.skills.len() {
        return Err(Refusal::unprocessable("bad_select", "select asks for a skill twice"));
    }
    Ok(Selector { labels: s.labels.clone(), skills, slots: s.slots.clone() })
}

pub(super) fn read_shell(s: ShellRequest) -> Answer<Shell> {
    let program = match (s.argv, s.command) {
        (Some(argv), None) => Program::Argv(argv),
        (None, Some(text)) => Program::Script(text),
        _ => return Err(Refusal::unprocessable("bad_shell", "shell takes exactly one of argv and command")),
    };
    let stdin = match (s.stdin, s.stdin_base64) {
        (None, None) => vec![],
        (Some(text), None) => text.into_bytes(),
        (None, Some(b)) => B64.decode(b).map_err(|e| Refusal::unprocessable("bad_base64", format!("stdin_base64: {e}")))?,
        (Some(_), Some(_)) => return Err(Refusal::unprocessable("bad_shell", "shell takes at most one of stdin and stdin_base64")),
    };
    Ok(Shell { program, cwd: s.cwd.unwrap_or_default(), env: s.env, stdin, stdin_open: s.stdin_open })
}

#[derive(Debug, Default, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct ListQuery {
    limit: Option<u32>,
    cursor: Option<String>,
    /// Of this session: its id
    session: Option<String>,
    /// Given to this node: its id or name
    node: Option<String>,
    /// Made by this user: their id
    user: Option<String>,
    /// In this state
    state: Option<String>,
    skill: Option<String>,
    /// Children of this fan-out: its id
    parent: Option<String>,
    /// Made at this time or later
    since: Option<String>,
    /// Made before this time
    until: Option<String>,
}

impl ListQuery {
    /// A page of all.
    pub fn page(limit: u32, cursor: Option<String>) -> Self {
        Self { limit: Some(limit), cursor, ..Self::default() }
    }
}

/// Tasks that the caller may see
///
/// Without `stdout`, `stderr` and `result`.
#[utoipa::path(
    get, path = "/tasks", tag = "tasks",
    params(ListQuery),
    responses(
        (status = 200, description = "A page", body = Page<TaskView>),
        (status = 404, description = "No such node, or the caller may not see it"),
    ),
)]
pub async fn list(State(app): State<App>, who: Who, Query(q): Query<ListQuery>) -> Answer<Json<Page<TaskView>>> {
    fn id<T: std::str::FromStr<Err = mesh_core::BadId>>(text: &Option<String>) -> Answer<Option<T>> {
        text.as_deref().map(str::parse).transpose().map_err(|e| Refusal::bad_request("bad_query", e))
    }
    let time = |text: &Option<String>| text.as_deref().map(parse_rfc3339).transpose().map_err(|e| Refusal::bad_request("bad_query", e));
    let state = match q.state.as_deref() {
        None => None,
        Some(s) => Some(TaskState::parse(s).ok_or_else(|| Refusal::bad_request("bad_query", format!("{s:?} is not a state")))?),
    };
    let node = match &q.node {
        None => None,
        // The tasks of a node that was removed stay to be read, by its id.
        Some(text) => match text.parse() {
            Ok(id) => Some(id),
            Err(_) => Some(app.nodes.find(who.caller(), text, Permission::NodesRead).await?.id),
        },
    };
    let filter = TaskFilter {
        within: None,
        session: id(&q.session)?,
        node,
        user: id(&q.user)?,
        state,
        skill: q.skill.clone(),
        parent: id(&q.parent)?,
        since: time(&q.since)?,
        until: time(&q.until)?,
    };
    let filters = format!("tasks {filter:?}");
    let w = window(q.limit, q.cursor.as_deref(), &filters, TaskId::from_bytes)?;
    let (found, cut) = app.tasks.list(who.caller(), filter, w).await?;
    Ok(Json(cut_page(found, w.limit, cut, &filters, |t| *t.id.as_bytes(), |t| views::task(&app, t))))
}

/// A task
///
/// With the last 64 KiB of its output as text.
#[utoipa::path(get, path = "/tasks/{id}", tag = "tasks", responses((status = 200, description = "The task", body = TaskView)))]
pub async fn get(State(app): State<App>, who: Who, PathId(id): PathId<TaskId>) -> Answer<Json<TaskView>> {
    let task = app.tasks.get(who.caller(), id).await?;
    let detail = app.tasks.detail(task).await?;
    Ok(Json(views::detail(&app, detail)))
}

/// What happened to a task
#[utoipa::path(
    get, path = "/tasks/{id}/events", tag = "tasks",
    responses((status = 200, description = "All of it, oldest first, on one page", body = Page<TaskEventView>)),
)]
pub async fn history(State(app): State<App>, who: Who, PathId(id): PathId<TaskId>) -> Answer<Json<Page<TaskEventView>>> {
    let events = app.tasks.history(who.caller(), id).await?;
    Ok(Json(Page { items: events.into_iter().map(views::event).collect(), next_cursor: None }))
}

/// Cancel a task
///
/// The state stays until the node says that it ended.
#[utoipa::path(
    post, path = "/tasks/{id}/cancel", tag = "tasks",
    responses((status = 202, description = "The task; it is being cancelled, or had ended", body = TaskView), (status = 409, description = "Its state does not allow it")),
)]
pub async fn cancel(State(app): State<App>, who: Who, PathId(id): PathId<TaskId>) -> Answer<(StatusCode, Json<TaskView>)> {
    let task = app.tasks.cancel(who.caller(), id).await?;
    let detail = app.tasks.detail(task).await?;
    Ok((StatusCode::ACCEPTED, Json(views::detail(&app, detail))))
}

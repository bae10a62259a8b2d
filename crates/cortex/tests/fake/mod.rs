//! A hub of a few routes on a free port, and the scripts that its output streams follow.

use axum::body::{Body, Bytes};
use axum::extract::{Path, RawQuery, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use axum::{Json, Router};
use base64::Engine as _;
use mesh_process::Tasks;
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use tokio::sync::watch;

pub const TASK: &str = "task_0190b2a4-7c1e-7000-8000-000000000001";

pub fn session_id(n: u32) -> String {
    format!("sess_0190b2a4-7c1e-7000-8000-{n:012}")
}

/// What one connection to a task's output does, in order.
#[derive(Debug, Clone)]
pub enum Step {
    Text(String),
    /// The connection breaks.
    Cut,
    /// Instead of a stream, this answer.
    Status(u16),
    /// Goes on when somebody asked for the task's end.
    UntilCancelled,
    /// Goes on when the task was looked at so often.
    UntilLooked(u32),
}

impl Step {
    pub fn end(task: Value) -> Self {
        Self::Text(format!("event: end\ndata: {}\n\n", json!({ "task": task })))
    }
    pub fn gap(from: u64, to: u64) -> Self {
        Self::Text(format!("id: {to}\nevent: gap\ndata: {}\n\n", json!({"from": from, "to": to, "reason": "limit"})))
    }
}

pub fn output(seq: u64, stream: &str, data: &[u8]) -> Step {
    let data = base64::engine::general_purpose::STANDARD.encode(data);
    let event = json!({"seq": seq, "stream": stream, "t_ms": 1, "data_base64": data});
    Step::Text(format!("id: {seq}\r\nevent: output\r\ndata: {event}\r\n\r\n"))
}

pub fn task(state: &str, reason: Option<(&str, &str)>, exit_code: Option<i32>) -> Value {
    json!({
        "id": TASK, "session_id": null, "node_id": null, "user_id": "user_1", "actor": {"user_id": "user_1", "door": "rest"},
        "signed": null, "parent_id": null, "skill": "shell", "spec": {}, "state": state,
        "reason": reason.map(|(code, detail)| json!({"code": code, "detail": detail})), "exit_code": exit_code, "signal": null,
        "attempt": 1, "waiting": null, "sandbox_applied": null, "created_at": "2026-01-01T00:00:00Z", "assigned_at": null,
        "started_at": null, "finished_at": null, "cancel_requested_at": null, "stdout_lossy": false, "stderr_lossy": false,
        "stdout_bytes": 0, "stderr_bytes": 0, "truncated": false,
    })
}

#[derive(Default)]
struct Told {
    scripts: VecDeque<Vec<Step>>,
    resumed_after: Vec<Option<String>>,
    output_query: String,
    dispatched: Value,
    key: Option<String>,
    refuse_dispatch: Option<(u16, String)>,
    refuse_cancel: bool,
    invites: Vec<Value>,
    task: Option<Value>,
    /// The pair that is good is number `generation`; the access token only unless expired.
    generation: u32,
    access_good: bool,
    refresh_good: bool,
    refreshes: u32,
}

#[derive(Clone)]
struct Shared {
    told: Arc<Mutex<Told>>,
    followed: watch::Sender<u32>,
    cancelled: watch::Sender<u32>,
    looked: watch::Sender<u32>,
    tasks: Tasks,
}

pub struct Hub {
    pub url: String,
    shared: Shared,
}

impl Hub {
    pub async fn start() -> Self {
        let shared = Shared {
            told: Arc::new(Mutex::new(Told::default())),
            followed: watch::Sender::new(0),
            cancelled: watch::Sender::new(0),
            looked: watch::Sender::new(0),
            tasks: Tasks::new(),
        };
        let api = Router::new()
            .route("/auth/login", post(login))
            .route("/auth/refresh", post(refresh))
            .route("/auth/logout", post(logout))
            .route("/auth/me", get(me))
            .route("/nodes/invites", post(invite))
            .route("/sessions", get(sessions))
            .route("/sessions/{id}", get(session).delete(|| async { StatusCode::NO_CONTENT }))
            .route("/dispatch", post(dispatch))
            .route("/tasks", get(|| async { problem(501, "not_yet", "told to refuse") }))
            .route("/tasks/{id}", get(show_task))
            .route("/tasks/{id}/cancel", post(cancel))
            .route("/tasks/{id}/output", get(task_output))
            .route("/api-keys/{id}", delete(|| async { StatusCode::NO_CONTENT }));
        let app = Router::new().nest("/api/v1", api).with_state(shared.clone());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        shared.tasks.spawn_until_cancelled("hub", async move { axum::serve(listener, app).await.unwrap() });
        Self { url, shared }
    }
    fn with<T>(&self, look: impl FnOnce(&mut Told) -> T) -> T {
        look(&mut self.shared.told.lock().unwrap())
    }
    /// What the next connections to the output do, one after the other.
    pub fn script<const N: usize>(&self, scripts: [Vec<Step>; N]) {
        self.with(|t| t.scripts = scripts.into());
    }
    pub fn resumed_after(&self) -> Vec<Option<String>> {
        self.with(|t| t.resumed_after.clone())
    }
    pub fn last_output_query(&self) -> String {
        self.with(|t| t.output_query.clone())
    }
    /// The idempotency key of the last dispatch.
    pub fn key(&self) -> Option<String> {
        self.with(|t| t.key.clone())
    }
    pub fn dispatched(&self) -> Value {
        self.with(|t| t.dispatched.clone())
    }
    pub fn refuse_dispatch(&self, status: u16, code: &str) {
        self.with(|t| t.refuse_dispatch = Some((status, code.to_owned())));
    }
    pub fn refuse_cancel(&self) {
        self.with(|t| t.refuse_cancel = true);
    }
    pub fn invites(&self) -> Vec<Value> {
        self.with(|t| t.invites.clone())
    }
    pub fn expire_access_tokens(&self) {
        self.with(|t| t.access_good = false);
    }
    pub fn revoke_refresh_tokens(&self) {
        self.with(|t| t.refresh_good = false);
    }
    pub fn refreshes(&self) -> u32 {
        self.with(|t| t.refreshes)
    }
    /// What a look at the task gives.
    pub fn task_shows(&self, state: &str, waiting: &str) {
        let mut shown = task(state, None, None);
        if !waiting.is_empty() {
            shown["waiting"] = json!({"code": "node_offline", "detail": waiting});
        }
        self.with(|t| t.task = Some(shown));
    }
    pub async fn followed(&self) {
        self.shared.followed.subscribe().wait_for(|n| *n > 0).await.unwrap();
    }
    pub async fn cancel_asked(&self) {
        self.shared.cancelled.subscribe().wait_for(|n| *n > 0).await.unwrap();
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        self.shared.tasks.token().cancel();
    }
}

fn problem(status: u16, code: &str, detail: &str) -> Response {
    let body = json!({"type": "about:blank", "title": "Refused", "status": status, "detail": detail, "code": code, "request_id": "req_1"});
    (StatusCode::from_u16(status).unwrap(), [(header::CONTENT_TYPE, "application/problem+json")], body.to_string()).into_response()
}

fn pair(told: &mut Told) -> Response {
    told.generation += 1;
    (told.access_good, told.refresh_good) = (true, true);
    let n = told.generation;
    Json(json!({
        "access_token": format!("access-{n}"), "refresh_token": format!("refresh-{n}"), "expires_in": 600, "token_type": "Bearer"
    }))
    .into_response()
}

/// Keys are always good, access tokens while they are.
fn allowed(told: &Told, headers: &HeaderMap) -> Result<(), Box<Response>> {
    let refuse = |detail: &str| Err(Box::new(problem(401, "unauthenticated", detail)));
    match headers.get(header::AUTHORIZATION).and_then(|v| v.to_str().ok()) {
        None => refuse("no credentials"),
        Some(v) if v.starts_with("Bearer access-") && (!told.access_good || v != format!("Bearer access-{}", told.generation)) => {
            refuse("the access token has ended")
        }
        Some(_) => Ok(()),
    }
}

async fn login(State(s): State<Shared>, Json(body): Json<Value>) -> Response {
    if body["password"] != "correct horse" {
        return problem(401, "bad_login", "wrong");
    }
    pair(&mut s.told.lock().unwrap())
}

async fn refresh(State(s): State<Shared>, Json(body): Json<Value>) -> Response {
    let mut told = s.told.lock().unwrap();
    if !told.refresh_good || body["refresh_token"] != format!("refresh-{}", told.generation) {
        // A second use ends the family.
        (told.access_good, told.refresh_good) = (false, false);
        return problem(401, "bad_refresh", "the log-in has ended");
    }
    told.refreshes += 1;
    pair(&mut told)
}

async fn logout(State(s): State<Shared>, headers: HeaderMap) -> Response {
    let mut told = s.told.lock().unwrap();
    if let Err(refusal) = allowed(&told, &headers) {
        return *refusal;
    }
    (told.access_good, told.refresh_good) = (false, false);
    StatusCode::NO_CONTENT.into_response()
}

async fn me(State(s): State<Shared>, headers: HeaderMap) -> Response {
    if let Err(refusal) = allowed(&s.told.lock().unwrap(), &headers) {
        return *refusal;
    }
    Json(json!({"user": {"id": "user_1", "username": "ada"}, "role": "admin", "permissions": ["nodes:read"]})).into_response()
}

async fn invite(State(s): State<Shared>, Json(body): Json<Value>) -> Response {
    s.told.lock().unwrap().invites.push(body);
    let reply = json!({
        "id": "inv_1", "expires_at": "2026-01-01T00:00:00Z", "config_yaml": "invite: {}\n", "join_command": "paste me", "download_url": "x"
    });
    (StatusCode::CREATED, Json(reply)).into_response()
}

fn a_session(n: u32, status: &str) -> Value {
    json!({
        "id": session_id(n), "user_id": "user_1", "name": "work", "status": status, "attached_node_ids": [],
        "created_at": "2026-01-01T00:00:00Z", "expires_at": "2026-01-02T00:00:00Z", "device_id": null
    })
}

/// Three sessions of one name on two pages; the last alone is active.
async fn sessions(RawQuery(query): RawQuery) -> Json<Value> {
    Json(match query {
        Some(q) if q.contains("cursor=more") => json!({"items": [a_session(3, "active")], "next_cursor": null}),
        _ => json!({"items": [a_session(1, "closed"), a_session(2, "expired")], "next_cursor": "more"}),
    })
}

async fn session(Path(id): Path<String>) -> Json<Value> {
    let mut s = a_session(3, "active");
    s["id"] = json!(id);
    Json(s)
}

async fn dispatch(State(s): State<Shared>, headers: HeaderMap, Json(body): Json<Value>) -> Response {
    let mut told = s.told.lock().unwrap();
    if let Err(refusal) = allowed(&told, &headers) {
        return *refusal;
    }
    told.dispatched = body;
    told.key = headers.get("idempotency-key").map(|v| v.to_str().unwrap().to_owned());
    if let Some((status, code)) = &told.refuse_dispatch {
        return problem(*status, code, "told to refuse");
    }
    (StatusCode::ACCEPTED, Json(task("pending", None, None))).into_response()
}

async fn show_task(State(s): State<Shared>) -> Response {
    s.looked.send_modify(|n| *n += 1);
    let shown = s.told.lock().unwrap().task.clone();
    match shown {
        Some(t) => Json(t).into_response(),
        None => problem(404, "not_found", "no task"),
    }
}

async fn cancel(State(s): State<Shared>) -> Response {
    let refuse = s.told.lock().unwrap().refuse_cancel;
    s.cancelled.send_modify(|n| *n += 1);
    if refuse { problem(403, "forbidden", "told to refuse") } else { StatusCode::ACCEPTED.into_response() }
}

async fn task_output(State(s): State<Shared>, headers: HeaderMap, RawQuery(query): RawQuery) -> Response {
    let query = query.unwrap_or_default();
    if headers.get(header::ACCEPT).is_none_or(|v| v != "text/event-stream") {
        return ([(header::CONTENT_TYPE, "application/octet-stream")], query).into_response();
    }
    let script = {
        let mut told = s.told.lock().unwrap();
        told.output_query = query;
        told.resumed_after.push(headers.get("Last-Event-ID").map(|v| v.to_str().unwrap().to_owned()));
        told.scripts.pop_front().unwrap_or_default()
    };
    if let Some(Step::Status(status)) = script.first() {
        return problem(*status, "unavailable", "told to refuse");
    }
    let steps = futures::stream::unfold((script.into_iter(), s), |(mut steps, s)| async move {
        loop {
            match steps.next()? {
                Step::Text(text) => {
                    s.followed.send_modify(|n| *n += 1);
                    return Some((Ok(Bytes::from(text)), (steps, s)));
                }
                Step::Cut => {
                    // A pause in the body is what makes the server send what it has.
                    tokio::task::yield_now().await;
                    return Some((Err(std::io::Error::other("cut")), (steps, s)));
                }
                Step::Status(_) => return None,
                Step::UntilCancelled => {
                    s.followed.send_modify(|n| *n += 1);
                    let refused = s.told.lock().unwrap().refuse_cancel;
                    s.cancelled.subscribe().wait_for(|n| *n > 0 && !refused).await.unwrap();
                }
                Step::UntilLooked(times) => {
                    s.looked.subscribe().wait_for(|n| *n >= times).await.unwrap();
                }
            }
        }
    });
    ([(header::CONTENT_TYPE, "text/event-stream")], Body::from_stream(steps)).into_response()
}

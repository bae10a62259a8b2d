//! Health, the root, and what is not there.

use super::problem::{Answer, Refusal};
use super::views;
use super::who::Who;
use super::{App, VERSION};
use crate::doors::rpc::methods::METHODS;
use axum::Json;
use axum::extract::{OriginalUri, Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use hub_engine::links::Told;
use hub_engine::nodes::Skill;
use mesh_wire::convert::rfc3339;
use mesh_wire::rest::{Health, Page, Ready, RestoredAttempt, RestoredNode, RestoredView, ServerInfo, SkillView, StatsView, SystemInfo};

/// What this server is
#[utoipa::path(get, path = "/", tag = "system", security(()), responses((status = 200, description = "The server", body = ServerInfo)))]
pub async fn root(State(app): State<App>) -> Json<ServerInfo> {
    Json(ServerInfo {
        name: "cortex-hub".into(),
        version: VERSION.into(),
        hub_id: app.keys.hub.to_string(),
        api: "/api/v1".into(),
        methods: METHODS.iter().map(|m| m.name.to_owned()).collect(),
    })
}

pub fn uptime_secs(app: &App) -> u64 {
    ((app.clock.now_ms() - app.facts.started_at_ms).max(0) / 1000) as u64
}

/// With less than this in the data folder a hub cannot count on its next write.
const LEAST_FREE_BYTES: u64 = 4 << 20;

/// Does the process live
#[utoipa::path(get, path = "/healthz", tag = "system", security(()), responses((status = 200, description = "It does", body = Health)))]
pub async fn healthz() -> Json<Health> {
    Json(Health { status: "ok".into() })
}

/// Can the process serve
///
/// Its store answers and has room, it is not stopping, and it does not hold back after a restore.
#[utoipa::path(
    get, path = "/readyz", tag = "system",
    security(()),
    responses((status = 200, description = "It can", body = Ready), (status = 503, description = "It cannot now")),
)]
pub async fn readyz(State(app): State<App>) -> Answer<Json<Ready>> {
    let refuse = |detail: &str| Refusal::new(StatusCode::SERVICE_UNAVAILABLE, "not_ready", detail);
    if app.stop.is_cancelled() {
        return Err(refuse("the hub is stopping"));
    }
    app.meta.ping().await.map_err(|_| refuse("the store does not answer"))?;
    if app.recovery.links.holds_back() {
        return Err(hub_engine::restore::holds_back().into());
    }
    if crate::metrics::free_bytes(&app.facts.data_dir).is_some_and(|free| free < LEAST_FREE_BYTES) {
        return Err(refuse("the disk of the data folder is full"));
    }
    let warnings = app.retention.warned.now().into_iter().map(str::to_owned).collect();
    Ok(Json(Ready { status: "ready".into(), uptime_secs: uptime_secs(&app), warnings }))
}

/// What this hub is, and since when
#[utoipa::path(get, path = "/system/info", tag = "system", responses((status = 200, description = "The hub", body = SystemInfo)))]
pub async fn info(State(app): State<App>, _who: Who) -> Json<SystemInfo> {
    Json(SystemInfo {
        version: VERSION.into(),
        hub_id: app.keys.hub.to_string(),
        started_at: rfc3339(app.facts.started_at_ms),
        uptime_secs: uptime_secs(&app),
    })
}

/// What a restore left to be looked at
///
/// For administrators, while the hub holds back. What the restore itself found is in its own words, and
/// in `restored.txt` of the data folder.
#[utoipa::path(
    get, path = "/system/restored", tag = "system",
    responses(
        (status = 200, description = "The machines that are here, and what they hold", body = RestoredView),
        (status = 404, description = "The hub does not hold back"),
    ),
)]
pub async fn restored(State(app): State<App>, who: Who) -> Answer<Json<RestoredView>> {
    let Some((mark, told)) = app.recovery.found(who.caller()).await? else {
        return Err(Refusal::new(StatusCode::NOT_FOUND, "not_found", "the hub does not hold back after a restore"));
    };
    let mut nodes = vec![];
    for (id, told) in told {
        let name = app.nodes.store.node(id).await.map_err(hub_engine::Error::from)?.map_or(String::new(), |n| n.name);
        let attempt = |t: Told| RestoredAttempt { task_id: t.task.to_string(), attempt: t.attempt.ordinal(), known: t.known };
        nodes.push(RestoredNode { id: id.to_string(), name, attempts: told.into_iter().map(attempt).collect() });
    }
    Ok(Json(RestoredView { restored_at: rfc3339(mark.at), backup_at: rfc3339(mark.backup_at), nodes }))
}

/// How much there is and how fast it goes
///
/// For who may read all nodes and all tasks. Counts are at most 15 s old.
#[utoipa::path(get, path = "/system/stats", tag = "system", responses((status = 200, description = "Counts, and samples of the last hour", body = StatsView)))]
pub async fn stats(State(app): State<App>, who: Who) -> Answer<Json<StatsView>> {
    Ok(Json(views::stats(app.statistics.get(who.caller()).await?, &app.retention.limits)))
}

/// The skills of the nodes that the caller may see
#[utoipa::path(
    get, path = "/skills", tag = "system",
    responses((status = 200, description = "All of them, on one page", body = Page<SkillView>)),
)]
pub async fn skills(State(app): State<App>, who: Who) -> Answer<Json<Page<SkillView>>> {
    let found = app.nodes.skills(who.caller()).await?;
    let view = |(name, s): (String, Skill)| SkillView { name, versions: s.versions, online: s.online };
    Ok(Json(Page { items: found.into_iter().map(view).collect(), next_cursor: None }))
}

/// First parts of paths below `/api/v1` that the contract names and that are not built yet.
const NOT_YET: &[&str] = &[
    "policies",
    "approvals",
    "workflows",
    "bundles",
    "registry",
    "notifications",
    "preferences",
    "secrets",
    "webhooks",
    "schedules",
    "settings",
    "containers",
];
/// Parts below a node, session or task that are named and not built.
const NOT_YET_BELOW: &[(&str, &[&str])] = &[
    ("nodes", &["policy"]),
    ("sessions", &["files", "manifest", "rewind", "conflicts", "sync"]),
    ("tasks", &["approve", "deny", "attach", "recording"]),
];
const NOT_YET_OUTSIDE: &[&str] = &["/capabilities", "/install.sh"];

/// 501 for what the contract promises, 405 for a wrong method, 404 for the rest.
pub async fn unknown(request: Request) -> Response {
    // Below a nested router the prefix is taken off the plain URI.
    let whole = request.extensions().get::<OriginalUri>().map_or(request.uri(), |u| &u.0);
    let (method, path) = (request.method(), whole.path());
    let inner = path.strip_prefix("/api/v1").unwrap_or(path);
    let parts: Vec<&str> = inner.split('/').filter(|p| !p.is_empty()).collect();
    let first = parts.first().copied().unwrap_or_default();
    let promised = NOT_YET.contains(&first)
        || NOT_YET_BELOW.iter().any(|(top, below)| *top == first && parts.get(2).is_some_and(|p| below.contains(p)))
        || NOT_YET_OUTSIDE.contains(&path);
    if promised {
        let detail = format!("{method} {path} is part of the contract and not built yet");
        return Refusal::new(StatusCode::NOT_IMPLEMENTED, "not_yet", detail).into_response();
    }
    if matched(&request) {
        let detail = format!("{path} does not take {method}");
        return Refusal::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", detail).into_response();
    }
    Refusal::new(StatusCode::NOT_FOUND, "not_found", format!("there is nothing at {path}")).into_response()
}

/// A route fits the path, so it must be the method that does not.
fn matched(request: &Request) -> bool {
    request.extensions().get::<axum::extract::MatchedPath>().is_some_and(|m| !m.as_str().contains("{*"))
}

//! The registry, as a person sees it.

use super::App;
use super::body::{Body, PathId, Query};
use super::page::{page, window};
use super::problem::{Answer, Refusal};
use super::views;
use super::who::Who;
use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use hub_engine::health::Sample;
use hub_engine::records::NodeChange;
use mesh_core::NodeId;
use mesh_core::select::Selector;
use mesh_wire::convert::rfc3339;
use mesh_wire::rest::*;
use serde::Deserialize;
use utoipa::IntoParams;

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct ListQuery {
    pub limit: Option<u32>,
    pub cursor: Option<String>,
    /// Labels that a node must have: `os=linux,gpu`
    pub select: Option<String>,
}

/// Nodes that the caller may see
#[utoipa::path(
    get, path = "/nodes", tag = "nodes",
    params(ListQuery),
    responses((status = 200, description = "A page", body = Page<NodeView>)),
)]
pub async fn list(State(app): State<App>, who: Who, Query(q): Query<ListQuery>) -> Answer<Json<Page<NodeView>>> {
    let select = q.select.as_deref().map(Selector::parse).transpose().map_err(|e| Refusal::bad_request("bad_selector", e))?;
    let select = select.filter(|s| *s != Selector::default());
    let filters = match &select {
        None => "nodes".to_owned(),
        Some(s) => format!("nodes {}", hex::encode(s.encode())),
    };
    let w = window(q.limit, q.cursor.as_deref(), &filters, NodeId::from_bytes)?;
    let found = app.nodes.list(who.caller(), select.as_ref(), w).await?;
    Ok(Json(page(found, w.limit, &filters, |n| *n.id.as_bytes(), |n| views::node(&app, n))))
}

/// Change a node
///
/// What is left out stays. It holds on the live link at once, and also while the node is away.
#[utoipa::path(
    patch, path = "/nodes/{id}", tag = "nodes",
    request_body(content = NodeChangeRequest, example = json!({"name": "attic", "labels": {"room": "lab"}, "slots": {"gpu": 1}, "max_tasks": 4})),
    responses(
        (status = 200, description = "The node", body = NodeView),
        (status = 409, description = "The node was revoked (`node_revoked`)"),
        (status = 422, description = "`bad_name`, `bad_label`, `bad_slots`, `bad_max_tasks`, `nothing_to_change`; `not_yet` for `policy`"),
    ),
)]
pub async fn change(
    State(app): State<App>,
    who: Who,
    PathId(id): PathId<NodeId>,
    Body(r): Body<NodeChangeRequest>,
) -> Answer<Json<NodeView>> {
    if r.policy.is_some() {
        return Err(Refusal::not_yet("a policy of a node"));
    }
    let change = NodeChange {
        name: r.name,
        labels: r.labels,
        slots: r.slots,
        // 0 and null both say that the hub sets no bound.
        task_limit: r.max_tasks.map(|n| n.filter(|n| *n > 0)),
        draining: None,
    };
    let node = app.manage.change(who.caller(), id, change).await?;
    Ok(Json(views::node(&app, node)))
}

/// Drain a node
///
/// It takes no new work until it is resumed, also after a restart; what runs goes on. Again is the same.
#[utoipa::path(
    post, path = "/nodes/{id}/drain", tag = "nodes",
    responses((status = 200, description = "The node", body = NodeView), (status = 409, description = "The node was revoked (`node_revoked`)")),
)]
pub async fn drain(State(app): State<App>, who: Who, PathId(id): PathId<NodeId>) -> Answer<Json<NodeView>> {
    let node = app.manage.drain(who.caller(), id).await?;
    Ok(Json(views::node(&app, node)))
}

/// Let a drained node take work again
///
/// Again is the same.
#[utoipa::path(
    post, path = "/nodes/{id}/resume", tag = "nodes",
    responses((status = 200, description = "The node", body = NodeView), (status = 409, description = "The node was revoked (`node_revoked`)")),
)]
pub async fn resume(State(app): State<App>, who: Who, PathId(id): PathId<NodeId>) -> Answer<Json<NodeView>> {
    let node = app.manage.resume(who.caller(), id).await?;
    Ok(Json(views::node(&app, node)))
}

/// Revoke a node
///
/// For good: its link is cut and its certificate is worth nothing. Its tasks end with the reason `node_revoked`, or
/// move where they were not granted yet. Again is the same.
#[utoipa::path(
    post, path = "/nodes/{id}/revoke", tag = "nodes",
    responses((status = 200, description = "The node", body = NodeView)),
)]
pub async fn revoke(State(app): State<App>, who: Who, PathId(id): PathId<NodeId>) -> Answer<Json<NodeView>> {
    let node = app.manage.revoke(who.caller(), id).await?;
    Ok(Json(views::node(&app, node)))
}

/// Remove a node
///
/// It is revoked, and its entry and attachments go; its tasks stay to be read.
#[utoipa::path(delete, path = "/nodes/{id}", tag = "nodes", responses((status = 204, description = "Gone")))]
pub async fn remove(State(app): State<App>, who: Who, PathId(id): PathId<NodeId>) -> Answer<StatusCode> {
    app.manage.remove(who.caller(), id).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// A node
#[utoipa::path(get, path = "/nodes/{id}", tag = "nodes", responses((status = 200, description = "The node", body = NodeView)))]
pub async fn get(State(app): State<App>, who: Who, PathId(id): PathId<NodeId>) -> Answer<Json<NodeView>> {
    let node = app.nodes.get(who.caller(), id).await?;
    Ok(Json(views::node(&app, node)))
}

/// How a node is
///
/// What it last said of itself, null while it is away; and samples of the last hour.
#[utoipa::path(
    get, path = "/nodes/{id}/status", tag = "nodes",
    responses((status = 200, description = "Its health", body = NodeStatusView)),
)]
pub async fn status(State(app): State<App>, who: Who, PathId(id): PathId<NodeId>) -> Answer<Json<NodeStatusView>> {
    let node = app.nodes.get(who.caller(), id).await?;
    let s = app.nodes.standing(&node);
    let pair = |used, total| MemoryView { used_bytes: used, total_bytes: total };
    Ok(Json(NodeStatusView {
        id: node.id.to_string(),
        status: s.status.into(),
        schedulable: views::schedulable(s.unschedulable),
        last_seen_at: node.last_seen_at.map(rfc3339),
        running: s.running,
        cpu_percent: s.health.map(|h| h.cpu_percent),
        memory: s.health.map(|h| pair(h.memory_used, h.memory_total)),
        disk: s.health.map(|h| pair(h.disk_used, h.disk_total)),
        load: s.health.map(|h| h.load_1m),
        rtt_ms: s.rtt_ms,
        history: app.nodes.samples(&node).into_iter().map(sample).collect(),
    }))
}

fn sample(s: Sample) -> NodeSample {
    NodeSample {
        at: rfc3339(s.at),
        cpu_percent: s.cpu_percent,
        memory_used_bytes: s.memory_used,
        disk_used_bytes: s.disk_used,
        load: s.load_1m,
        running: s.running,
        rtt_ms: s.rtt_ms,
    }
}

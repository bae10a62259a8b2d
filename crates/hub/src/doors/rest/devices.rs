//! Devices: the log-ins of who asks.

use super::App;
use super::body::{Body, PathId, Query};
use super::page::{PlainList, page, window};
use super::problem::Answer;
use super::views;
use super::who::Who;
use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use hub_engine::records::DeviceChange;
use mesh_core::DeviceId;
use mesh_wire::rest::{DevicePatch, DeviceView, Page};

/// The own devices
///
/// A device is a log-in that has not ended. A key has none.
#[utoipa::path(
    get, path = "/devices", tag = "devices",
    params(PlainList),
    responses((status = 200, description = "A page", body = Page<DeviceView>)),
)]
pub async fn list(State(app): State<App>, who: Who, Query(q): Query<PlainList>) -> Answer<Json<Page<DeviceView>>> {
    let w = window(q.limit, q.cursor.as_deref(), "devices", DeviceId::from_bytes)?;
    let found = app.accounts.devices(who.caller(), w).await?;
    let own = who.authenticated().login.map(DeviceId::from);
    Ok(Json(page(found, w.limit, "devices", |d| *d.id.as_bytes(), |d| views::device(d, own))))
}

/// Name a device, or say whether it is trusted
///
/// What is left out stays. Trust is a mark for its owner; it gives no right.
#[utoipa::path(
    patch, path = "/devices/{id}", tag = "devices",
    request_body(content = DevicePatch, example = json!({"name": "attic", "trusted": true})),
    responses((status = 200, description = "The device", body = DeviceView), (status = 422, description = "A name that cannot be")),
)]
pub async fn change(
    State(app): State<App>,
    who: Who,
    PathId(id): PathId<DeviceId>,
    Body(r): Body<DevicePatch>,
) -> Answer<Json<DeviceView>> {
    let change = DeviceChange { name: r.name, trusted: r.trusted };
    let device = app.accounts.change_device(who.caller(), id, change).await?;
    Ok(Json(views::device(device, who.authenticated().login.map(DeviceId::from))))
}

/// Revoke a device
///
/// Ends its log-in: no token of it counts any more, and what streams to it ends.
#[utoipa::path(delete, path = "/devices/{id}", tag = "devices", responses((status = 204, description = "Ended")))]
pub async fn remove(State(app): State<App>, who: Who, PathId(id): PathId<DeviceId>) -> Answer<StatusCode> {
    app.accounts.remove_device(who.caller(), id).await?;
    Ok(StatusCode::NO_CONTENT)
}

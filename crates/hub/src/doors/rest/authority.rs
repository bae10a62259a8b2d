//! The hub's certificate authority and the steps of its rotation.

use super::App;
use super::body::Body;
use super::problem::{Answer, Refusal};
use super::who::Who;
use axum::Json;
use axum::extract::State;
use hub_engine::rotation::{Standing, Step, Straggler};
use mesh_wire::rest::{AuthorityView, RotateRequest, StragglerView};

/// Which root and task key nodes believe
///
/// For administrators. Of who is behind, at most 50 are named.
#[utoipa::path(get, path = "/system/ca", tag = "system", operation_id = "system_ca", responses((status = 200, description = "Where a rotation stands", body = AuthorityView)))]
pub async fn get(State(app): State<App>, who: Who) -> Answer<Json<AuthorityView>> {
    Ok(Json(view(app.rotation.standing(who.caller()).await?)))
}

/// Take the next step of a rotation
///
/// `begin` makes a new root and a new task key, which nodes learn to believe; `issue` uses them; `retire` takes the
/// old ones away; `abort` goes back from `begin`. Nodes that cannot follow yet are named, and nothing is done, unless
/// `leave_behind` says so.
#[utoipa::path(
    post, path = "/system/ca/rotate", tag = "system", operation_id = "system_ca_rotate",
    request_body(content = RotateRequest, example = json!({"step": "begin"})),
    responses(
        (status = 200, description = "Where the rotation stands now", body = AuthorityView),
        (status = 409, description = "Not the next step (`wrong_phase`), or nodes would be left behind (`stragglers`)"),
        (status = 422, description = "No such step (`bad_step`)"),
    ),
)]
pub async fn rotate(State(app): State<App>, who: Who, Body(r): Body<RotateRequest>) -> Answer<Json<AuthorityView>> {
    let words = || format!("step is one of {}", Step::ALL.iter().map(|s| s.as_str()).collect::<Vec<_>>().join(", "));
    let step = Step::parse(&r.step).ok_or_else(|| Refusal::unprocessable("bad_step", words()))?;
    Ok(Json(view(app.rotation.step(who.caller(), step, r.leave_behind).await?)))
}

fn view(s: Standing) -> AuthorityView {
    let named = |list: Vec<Straggler>| list.into_iter().map(|s| StragglerView { id: s.node.to_string(), name: s.name }).collect();
    AuthorityView {
        phase: s.phase.as_str().into(),
        seq: s.seq,
        nodes: s.nodes,
        acknowledged: s.acknowledged,
        stragglers: named(s.stragglers),
        old_certificates: s.old_certificates,
        on_old_root: named(s.on_old_root),
    }
}

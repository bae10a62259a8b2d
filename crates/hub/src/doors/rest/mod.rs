//! REST, `/api/v1`.

mod accounts;
pub(super) mod agents;
pub(super) mod audit;
pub(super) mod authority;
pub(super) mod body;
mod cookie;
pub(super) mod devices;
mod docs;
mod downloads;
pub(super) mod events;
pub(super) mod grants;
pub(super) mod input;
pub(super) mod invites;
pub(super) mod memory;
pub(super) mod messages;
pub(super) mod nodes;
mod openapi;
pub(super) mod origin;
pub(super) mod output;
pub(super) mod page;
pub(super) mod problem;
mod rate;
pub(super) mod requests;
pub(super) mod sessions;
pub(super) mod state;
pub(super) mod system;
pub(super) mod tasks;
pub(super) mod users;
pub(super) mod views;
pub(super) mod who;

pub use downloads::Binaries;
pub use openapi::document;
pub use requests::{TraceParent, ended};
pub use who::Door;

pub(super) use body::{Creating, OptionalBody, PathId, PathTexts, Query};
pub(super) use problem::Refusal;
pub(super) use who::Who;

use super::forwarded::Networks;
use super::hosts::{self, Hosts};
use super::mcp;
use crate::keys::Keys;
use axum::Router;
use axum::extract::Request;
use axum::middleware;
use axum::response::{IntoResponse, Redirect, Response};
use axum::routing::post;
use hub_engine::accounts::Accounts;
use hub_engine::agents::Agents;
use hub_engine::audit::Log;
use hub_engine::events::Events;
use hub_engine::expiry::Expiry;
use hub_engine::grants::Grants;
use hub_engine::idempotency::Idempotency;
use hub_engine::leaving::Departures;
use hub_engine::manage::Management;
use hub_engine::memory::Memory;
use hub_engine::messages::Messages;
use hub_engine::nodes::Nodes;
use hub_engine::ports::Meta;
use hub_engine::restore::Recovery;
use hub_engine::retention::Retention;
use hub_engine::rotation::Rotation;
use hub_engine::sessions::Sessions;
use hub_engine::state::State;
use hub_engine::stats::Statistics;
use hub_engine::tasks::TaskService;
use hub_engine::throttle::Rates;
use hub_engine::users::Users;
use mesh_process::{CancellationToken, SharedClock, Tasks};
use std::path::PathBuf;
use std::sync::Arc;
use utoipa::OpenApi;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

/// What the handlers need. Each field is one engine service or one fact about this process.
pub struct RestState {
    pub accounts: Arc<Accounts>,
    pub grants: Arc<Grants>,
    pub users: Arc<Users>,
    pub departures: Arc<Departures>,
    pub audit: Arc<Log>,
    pub nodes: Arc<Nodes>,
    pub manage: Arc<Management>,
    pub sessions: Arc<Sessions>,
    pub memory: Memory,
    pub messages: Messages,
    pub expiry: Arc<Expiry>,
    pub state: State,
    pub statistics: Arc<Statistics>,
    pub retention: Arc<Retention>,
    pub tasks: Arc<TaskService>,
    pub agents: Arc<Agents>,
    pub idempotency: Arc<Idempotency>,
    pub events: Events,
    /// Holds the streams that outlive their request.
    pub streams: Tasks,
    pub meta: Arc<dyn Meta>,
    pub recovery: Arc<Recovery>,
    pub rotation: Rotation,
    pub rates: Arc<Rates>,
    pub waiting: mcp::Waiting,
    pub keys: Arc<Keys>,
    pub binaries: Binaries,
    pub clock: SharedClock,
    pub stop: CancellationToken,
    pub facts: Facts,
}

/// Facts about this process that doors tell.
#[derive(Debug, Clone)]
pub struct Facts {
    pub public_url: String,
    pub node_address: String,
    /// Other addresses for nodes.
    pub node_also: Vec<String>,
    /// The pin of the hub's own HTTPS, as curl takes it.
    pub download_pin: Option<String>,
    pub hosts: Hosts,
    pub trusted_proxies: Networks,
    pub started_at_ms: i64,
    pub body_bytes: usize,
    pub request_secs: u64,
    /// Where the first admin's made password is kept until it is changed.
    pub made_password_file: PathBuf,
    pub data_dir: PathBuf,
}

pub type App = Arc<RestState>;

pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// All routes of the HTTP listener and of the control socket.
pub fn router(app: App) -> Router {
    let (router, _) = routes().split_for_parts();
    router
        // It describes itself, in its own words.
        .route("/mcp", post(mcp::post))
        .fallback(unversioned)
        .method_not_allowed_fallback(system::unknown)
        .layer(middleware::from_fn_with_state(app.facts.hosts.clone(), hosts::guard))
        .layer(middleware::from_fn_with_state(app.clone(), requests::serve))
        .with_state(app)
}

/// Each route with its description: handlers say their method and path in `#[utoipa::path]`, and those
/// of one path stand in one `routes!`.
fn routes() -> OpenApiRouter<App> {
    let api = OpenApiRouter::new()
        .routes(routes!(accounts::login))
        .routes(routes!(accounts::refresh))
        .routes(routes!(accounts::logout))
        .routes(routes!(accounts::me))
        .routes(routes!(accounts::change_password))
        .routes(routes!(users::accept))
        .routes(routes!(users::list, users::create))
        .routes(routes!(users::get, users::change, users::remove))
        .routes(routes!(accounts::list_keys, accounts::create_key))
        .routes(routes!(accounts::remove_key))
        .routes(routes!(grants::list, grants::create))
        .routes(routes!(grants::remove))
        .routes(routes!(devices::list))
        .routes(routes!(devices::change, devices::remove))
        .routes(routes!(invites::list, invites::create))
        .routes(routes!(invites::revoke))
        .routes(routes!(nodes::list))
        .routes(routes!(nodes::get, nodes::change, nodes::remove))
        .routes(routes!(nodes::drain))
        .routes(routes!(nodes::resume))
        .routes(routes!(nodes::revoke))
        .routes(routes!(nodes::status))
        .routes(routes!(system::skills))
        .routes(routes!(system::info))
        .routes(routes!(system::stats))
        .routes(routes!(system::restored))
        .routes(routes!(authority::get))
        .routes(routes!(authority::rotate))
        .routes(routes!(audit::all))
        .routes(routes!(audit::export))
        .routes(routes!(audit::verify))
        .routes(routes!(audit::of_user))
        .routes(routes!(audit::of_session))
        .routes(routes!(downloads::list))
        .routes(routes!(downloads::binary))
        .routes(routes!(sessions::list, sessions::create))
        .routes(routes!(sessions::get, sessions::change, sessions::close))
        .routes(routes!(sessions::purge))
        .routes(routes!(sessions::activity))
        .routes(routes!(memory::list))
        .routes(routes!(memory::get, memory::put, memory::remove))
        .routes(routes!(messages::list, messages::post))
        .routes(routes!(sessions::attach, sessions::detach))
        .routes(routes!(tasks::dispatch_in_session))
        .routes(routes!(agents::list, agents::spawn))
        .routes(routes!(agents::get))
        .routes(routes!(agents::kill))
        .routes(routes!(agents::logs))
        .routes(routes!(state::list))
        .routes(routes!(state::get, state::put, state::remove))
        .routes(routes!(tasks::dispatch))
        .routes(routes!(tasks::list))
        .routes(routes!(tasks::get))
        .routes(routes!(tasks::history))
        .routes(routes!(tasks::cancel))
        .routes(routes!(input::send))
        .routes(routes!(output::get))
        .routes(routes!(events::get))
        .routes(routes!(super::ws::get));
    OpenApiRouter::with_openapi(openapi::Head::openapi())
        .nest("/api/v1", api)
        .routes(routes!(system::root, super::rpc::post_at_root))
        .routes(routes!(super::rpc::post))
        .routes(routes!(super::rpc::ws::get))
        .routes(routes!(system::healthz))
        .routes(routes!(system::readyz))
        .routes(routes!(docs::openapi_json))
        .routes(routes!(docs::docs))
        .routes(routes!(docs::llms_txt))
        .routes(routes!(docs::skill))
        .routes(routes!(docs::docs_file))
}

/// `/api/X` answers 308 to `/api/v1/X`; anything else is not there.
async fn unversioned(request: Request) -> Response {
    let uri = request.uri();
    if let Some(rest) = uri.path().strip_prefix("/api/").filter(|r| *r != "v1" && !r.starts_with("v1/")) {
        let query = uri.query().map(|q| format!("?{q}")).unwrap_or_default();
        return Redirect::permanent(&format!("/api/v1/{rest}{query}")).into_response();
    }
    system::unknown(request).await
}

//! The description of the HTTP door: OpenAPI 3.1, made of the handlers' `#[utoipa::path]` and of the
//! shapes. What holds for every call is written here once and not at each of them.

use super::body::MAX_KEY;
use super::page::{DEFAULT_LIMIT, MAX_LIMIT};
use crate::doors::rpc::own::MAX_OUTPUT_BYTES;
use hub_engine::events::Topic;
use hub_engine::manage::MAX_TASK_LIMIT;
use hub_engine::records::{MessageRole, SessionAct};
use hub_engine::rotation::{Phase, Step};
use hub_engine::tasks::MAX_WAIT_SECS;
use mesh_core::agent::{self, Status};
use mesh_core::audit::{Kind, Outcome};
use mesh_core::name::{MAX_CHARS, MAX_KEY_CHARS};
use mesh_core::permission::{Permission, Role};
use mesh_core::task::{MAX_BACKOFF_MS, MAX_PRIORITY, MAX_RETRIES, OnLost, ReasonCode, TaskState};
use mesh_wire::rest::*;
use serde_json::{Map, Value, json};
use std::sync::LazyLock;
use utoipa::OpenApi;

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Cortex Mesh hub",
        description = "Sends tasks to the machines of a mesh and shows what became of them.\n\n\
            Times are RFC 3339 in UTC, ids are a prefix and a lower-case UUIDv7. Every answer carries `X-Request-Id`, \
            which a request may bring. Refusals are `application/problem+json` with a stable `code`. \
            Lists are newest first; `next_cursor` of one page is `cursor` of the next. \
            Requests with unknown fields are refused; replies may grow by fields in later versions.",
        license(name = "Apache-2.0", identifier = "Apache-2.0"),
    ),
    servers((url = "/", description = "This hub")),
    security(("bearer" = [])),
    tags(
        (name = "auth", description = "Log-in and who is calling"),
        (name = "users", description = "People: added or invited, changed, removed"),
        (name = "api-keys", description = "Keys for programs, limited by scopes"),
        (name = "grants", description = "What is shared with others"),
        (name = "devices", description = "Log-ins of who asks"),
        (name = "invites", description = "One-time invites for machines"),
        (name = "nodes", description = "The machines of the mesh"),
        (name = "sessions", description = "Workspaces that tasks share, on the nodes attached to them"),
        (name = "memory", description = "What sessions remember: values by key"),
        (name = "messages", description = "What is said in sessions"),
        (name = "state", description = "What agents keep: values by key"),
        (name = "tasks", description = "What runs, ran or waits"),
        (name = "agents", description = "Processes that are supervised, run after run"),
        (name = "events", description = "What happens, as it happens"),
        (name = "audit", description = "What was done, by whom and how it ended"),
        (name = "system", description = "The hub itself"),
        (name = "json-rpc", description = "JSON-RPC 2.0: the same calls by name"),
        (name = "downloads", description = "Programs to run on nodes"),
    ),
    components(schemas(Problem, AuditEntry, EventView, StreamEnd, OutputEvent, GapEvent, AttemptEvent, EndEvent, HealthReply, StateReply, TaskOutputRequest, TaskOutputView, SubscribeRequest, SubscribeReply, UnsubscribeRequest, UnsubscribeReply, DiscoverReply, EventNotice, AgentConfig, AgentEnd, AgentReply, AgentList, AgentLogsRequest, AgentLogs, MetricsReply)),
)]
pub struct Head;

/// The whole description.
pub fn document() -> &'static Value {
    static DOCUMENT: LazyLock<Value> = LazyLock::new(|| {
        let (_, plain) = super::routes().split_for_parts();
        complete(serde_json::to_value(plain).expect("a description has no keys that are not text"))
    });
    &DOCUMENT
}

/// Adds what every operation and shape has in common.
fn complete(mut doc: Value) -> Value {
    doc["openapi"] = json!("3.1.0");
    doc["components"]["securitySchemes"]["bearer"] = json!({
        "type": "http", "scheme": "bearer",
        "description": "An access token of `POST /api/v1/auth/login`, or an API key.",
    });
    for (status, name, description) in SHARED {
        doc["components"]["responses"][name] = refusal(*status, description);
    }
    for (path, item) in members(&mut doc["paths"]) {
        for (method, operation) in members(item) {
            describe(path, method, operation);
        }
    }
    for (name, schema) in members(&mut doc["components"]["schemas"]) {
        shape(name, schema);
    }
    doc
}

fn members(v: &mut Value) -> impl Iterator<Item = (&String, &mut Value)> {
    v.as_object_mut().into_iter().flat_map(Map::iter_mut)
}

/// Refusals that come from what calls have in common; an operation names only its own.
const SHARED: &[(u16, &str, &str)] = &[
    (400, "BadRequest", "Syntax, an unknown field, a wrong type, or no `Host`"),
    (401, "Unauthenticated", "No credentials, or none that count"),
    (403, "Forbidden", "The caller may not do this"),
    (404, "NotFound", "There is no such thing, or the caller may not see it"),
    (408, "TooSlow", "The body did not come within `limits.request_secs`; the connection is closed"),
    (413, "TooLarge", "The body is larger than `limits.body_bytes`"),
    (415, "WrongMediaType", "The body is not `application/json`"),
    (421, "ForeignHost", "The request names a host that is none of the hub's (`http.allowed_hosts`)"),
    (429, "RateLimited", "More requests than `limits.api_per_second` allows the caller, or its address when there is none"),
    (431, "HeadersTooLarge", "Headers of more than 32 KiB or 100 lines; without a problem document"),
    (503, "Unavailable", "The hub cannot answer now; try again. With more connections than `limits.connections` it says so as text"),
    (507, "StorageFull", "No room to store it; nothing was taken"),
];

fn refusal(status: u16, description: &str) -> Value {
    let mut response = json!({
        "description": description,
        "content": { "application/problem+json": { "schema": { "$ref": "#/components/schemas/Problem" } } },
    });
    match status {
        // Said before a request is read, by what keeps connections.
        431 => drop(response.as_object_mut().and_then(|r| r.remove("content"))),
        503 => response["content"]["text/plain"] = json!({ "schema": { "type": "string" } }),
        _ => {}
    }
    if [429, 503, 507].contains(&status) {
        response["headers"]["Retry-After"] = json!({ "description": "Seconds", "schema": { "type": "integer", "minimum": 0 } });
    }
    response
}

fn describe(path: &str, method: &str, operation: &mut Value) {
    // Handlers of one noun have short names; with their tag they are unique.
    let tag = operation["tags"][0].as_str().unwrap_or_default().replace('-', "_");
    operation["operationId"] = json!(format!("{tag}_{}", operation["operationId"].as_str().unwrap_or_default()));
    parameters(path, operation);
    optional_body(operation);
    let takes = |place: &str| operation["parameters"].as_array().is_some_and(|p| p.iter().any(|p| p["in"] == place));
    let body = operation.get("requestBody").is_some();
    let public = operation["security"] == json!([{}]);
    let shared = [
        (400, true),
        (401, !public),
        (403, !public),
        (404, takes("path")),
        (408, body),
        (413, body),
        (415, body),
        (421, true),
        (429, !["/healthz", "/readyz"].contains(&path)),
        (431, true),
        (503, true),
        (507, path.starts_with("/api/") && method != "get"),
    ];
    let responses = operation["responses"].as_object_mut().expect("an operation has responses");
    for (status, response) in responses.iter_mut() {
        // A refusal with a shape of its own is described where it is made.
        if let Some(status) = status.parse().ok().filter(|s| *s >= 400 && response.get("content").is_none()) {
            *response = refusal(status, response["description"].as_str().unwrap_or_default());
        }
    }
    for (status, name, _) in SHARED {
        if shared.contains(&(*status, true)) {
            let shared = json!({ "$ref": format!("#/components/responses/{name}") });
            responses.entry(status.to_string()).or_insert(shared);
        }
    }
}

/// A body that may be left out is still not null when it is there.
fn optional_body(operation: &mut Value) {
    let Some(schema) = operation.pointer_mut("/requestBody/content/application~1json/schema") else { return };
    if let Some(of) = schema["oneOf"].as_array().filter(|of| of.len() == 2 && of.contains(&json!({ "type": "null" }))) {
        *schema = of.iter().find(|s| s["type"] != "null").cloned().unwrap_or_default();
        operation["requestBody"]["required"] = json!(false);
    }
}

/// First parts of a path below `/api/v1`, and the prefix of the id that follows them.
const IDS: &[(&str, &str)] = &[
    ("/api-keys/{id}", "key"),
    ("/grants/{id}", "grant"),
    ("/devices/{id}", "dev"),
    ("/audit/users/{id}", "user"),
    ("/audit/sessions/{id}", "sess"),
    ("/nodes/invites/{id}", "inv"),
    ("/nodes/{id}", "node"),
    ("/sessions/{id}", "sess"),
    ("/tasks/{id}", "task"),
    ("/users/{id}", "user"),
    ("/agents/{id}", "agent"),
];

/// Says what `{id}` is, and bounds that all lists share.
fn parameters(path: &str, operation: &mut Value) {
    let mut all = operation["parameters"].as_array().cloned().unwrap_or_default();
    let below = path.strip_prefix("/api/v1").unwrap_or(path);
    if let Some((_, prefix)) = IDS.iter().find(|(start, _)| below == *start || below.starts_with(&format!("{start}/"))) {
        all.retain(|p| p["name"] != "id");
        all.insert(0, json!({ "name": "id", "in": "path", "required": true, "schema": id(prefix) }));
    }
    for p in &mut all {
        let named = p["name"].as_str().unwrap_or_default().to_owned();
        match (p["in"].as_str().unwrap_or_default(), named.as_str()) {
            ("query", "limit") => {
                p["schema"] = json!({ "type": "integer", "minimum": 1, "maximum": MAX_LIMIT, "default": DEFAULT_LIMIT });
                p["description"] = json!("How many at most");
            }
            ("query", "cursor") => p["description"] = json!("`next_cursor` of the page before, with the same filters"),
            ("query", "since" | "until") => p["schema"] = json!({ "type": "string", "format": "date-time" }),
            ("query", "stream") => p["schema"] = json!({ "type": "string", "enum": ["stdout", "stderr", "all"], "default": "all" }),
            ("query", "state") => p["schema"] = json!({ "type": "string", "enum": TaskState::ALL.map(TaskState::as_str) }),
            ("query", "session") => p["schema"] = id("sess"),
            ("query", "parent") => p["schema"] = id("task"),
            ("query", "type") => {
                p["schema"] = json!({ "type": "string", "enum": Kind::ALL.iter().map(|k| k.as_str()).collect::<Vec<_>>() })
            }
            ("query", "outcome") => {
                p["schema"] = json!({ "type": "string", "enum": Outcome::ALL.iter().map(|o| o.as_str()).collect::<Vec<_>>() })
            }
            ("query", "status") => {
                p["schema"] = json!({ "type": "string", "enum": Status::ALL.iter().map(|s| s.as_str()).collect::<Vec<_>>() })
            }
            ("query", "user") => p["schema"] = id("user"),
            // What cannot be a name or a key is not there.
            ("path", "key") => {
                p["schema"] = json!({ "type": "string", "minLength": 1, "maxLength": MAX_KEY_CHARS });
                p["description"] = json!("Normal form C, without control or text-direction characters; `/` in it is written `%2F`");
            }
            ("path", "agent_id") => {
                p["schema"] = json!({ "type": "string", "minLength": 1, "maxLength": MAX_CHARS });
                p["description"] = json!("A name");
            }
            ("header", "Idempotency-Key") => {
                p["schema"] = json!({ "type": "string", "pattern": format!("^[!-~]{{1,{MAX_KEY}}}$") });
                p["description"] = json!("For 24 hours the same caller, call and key make one thing; else 400 `bad_idempotency_key`");
            }
            // Absence is how a query says nothing; there is no null in it.
            ("query", _) => not_null(&mut p["schema"]),
            _ => {}
        }
        unsigned(&mut p["schema"]);
    }
    if !all.is_empty() {
        operation["parameters"] = json!(all);
    }
}

fn id(prefix: &str) -> Value {
    json!({ "type": "string", "pattern": format!("^{prefix}_{UUID}$") })
}
const UUID: &str = "[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}";

/// Takes `null` out of a schema's types.
fn not_null(schema: &mut Value) {
    if let Some(types) = schema["type"].as_array_mut() {
        types.retain(|t| *t != "null");
        if let [one] = types.as_slice() {
            schema["type"] = one.clone();
        }
    }
}

/// Fields whose words are the core's own.
static WORDS: LazyLock<Vec<(&str, Vec<&str>)>> = LazyLock::new(|| {
    let states: Vec<&str> = TaskState::ALL.iter().map(|s| s.as_str()).collect();
    vec![
        ("TaskView.state", states.clone()),
        ("TaskEventView.state", states.clone()),
        ("DispatchRequest.on_lost", OnLost::ALL.iter().map(|o| o.as_str()).collect()),
        ("TaskView.on_lost", OnLost::ALL.iter().map(|o| o.as_str()).collect()),
        ("AuditEntry.type", Kind::ALL.iter().map(|k| k.as_str()).collect()),
        ("AuditEntry.outcome", Outcome::ALL.iter().map(|o| o.as_str()).collect()),
        ("AuthorityView.phase", Phase::ALL.iter().map(|p| p.as_str()).collect()),
        ("RotateRequest.step", Step::ALL.iter().map(|s| s.as_str()).collect()),
        ("NodeView.status", vec!["revoked", "offline", "draining", "online"]),
        ("NodeStatusView.status", vec!["revoked", "offline", "draining", "online"]),
        ("SessionView.status", vec!["active", "closed", "expired"]),
        ("InviteView.status", vec!["open", "used", "expired", "revoked"]),
        ("UserView.status", vec!["active", "invited", "invite_expired", "disabled", "removed"]),
        ("UserView.role", Role::ALL.iter().map(|r| r.as_str()).collect()),
        ("UserRequest.role", Role::ALL.iter().map(|r| r.as_str()).collect()),
        ("UserPatch.role", Role::ALL.iter().map(|r| r.as_str()).collect()),
        ("MeReply.role", Role::ALL.iter().map(|r| r.as_str()).collect()),
        ("GrantView.permissions", Permission::ALL.iter().filter(|p| p.is_grantable()).map(|p| p.as_str()).collect()),
        ("GrantRequest.permissions", Permission::ALL.iter().filter(|p| p.is_grantable()).map(|p| p.as_str()).collect()),
        ("MeReply.permissions", Permission::ALL.iter().map(|p| p.as_str()).collect()),
        ("ActivityView.type", SessionAct::ALL.iter().map(|a| a.as_str()).chain(["task_accepted", "task_ended"]).collect()),
        ("ActivityView.state", states.clone()),
        ("ActivityView.reason", ReasonCode::ALL.iter().map(|r| r.as_str()).collect()),
        ("MessageView.role", MessageRole::ALL.iter().map(|r| r.as_str()).collect()),
        ("MessageRequest.role", MessageRole::ALL.iter().map(|r| r.as_str()).collect()),
        ("OutputEvent.stream", vec!["stdout", "stderr"]),
        ("TaskOutputRequest.stream", vec!["stdout", "stderr", "all"]),
        ("TaskOutputRequest.encoding", vec!["text", "base64"]),
        ("SubscribeRequest.topics", Topic::ALL.iter().map(|t| t.as_str()).collect()),
        ("EventView.topic", Topic::ALL.iter().map(|t| t.as_str()).collect()),
        ("StreamEnd.code", vec!["stopping", "rights"]),
        ("AgentView.status", Status::ALL.iter().map(|s| s.as_str()).collect()),
        ("AgentView.agent_type", agent::Kind::ALL.iter().map(|k| k.as_str()).collect()),
        ("AgentLogLine.stream", vec!["stdout", "stderr", "agent"]),
    ]
});

/// Fields whose bounds the core or the engine knows: what lies beyond is 422.
const BOUNDS: &[(&str, i64, i64)] = &[
    ("DispatchRequest.priority", -(MAX_PRIORITY as i64), MAX_PRIORITY as i64),
    ("DispatchRequest.wait_secs", 0, MAX_WAIT_SECS as i64),
    ("RetriesView.max", 0, MAX_RETRIES as i64),
    ("RetriesView.backoff_ms", 0, MAX_BACKOFF_MS as i64),
    ("NodeChangeRequest.max_tasks", 0, MAX_TASK_LIMIT as i64),
    ("InputRequest.seq", 1, i64::MAX),
    ("TaskOutputRequest.max_bytes", 1, MAX_OUTPUT_BYTES as i64),
];

/// Fields that hold one kind of id wherever they stand in a reply.
const ID_FIELDS: &[(&str, &str)] = &[
    ("user_id", "user"),
    ("created_by", "user"),
    ("owner_id", "user"),
    ("node_id", "node"),
    ("session_id", "sess"),
    ("task_id", "task"),
    ("parent_id", "task"),
    ("message_id", "msg"),
    ("device_id", "dev"),
    ("hub_id", "hub"),
];

/// What the contract says of all shapes: ids, times, and that a reply's field may be null but not absent.
fn shape(name: &str, schema: &mut Value) {
    // One of several shapes has no fields of its own.
    if schema["oneOf"].is_array() {
        return;
    }
    let reply = schema["additionalProperties"] != json!(false);
    let mut always: Vec<String> =
        schema["required"].as_array().into_iter().flatten().filter_map(|v| v.as_str().map(str::to_owned)).collect();
    for (field, property) in members(&mut schema["properties"]) {
        if reply && nullable(property) && !always.contains(field) {
            always.push(field.clone());
        }
        if let Some((_, words)) = WORDS.iter().find(|(at, _)| at.split_once('.') == Some((name, field))) {
            let place = if property["items"].is_object() { &mut property["items"] } else { &mut *property };
            place["enum"] = json!(words);
        }
        // A request's field that is left out is just that.
        if let Some(property) = property.as_object_mut().filter(|p| p.get("default") == Some(&Value::Null)) {
            property.remove("default");
        }
        if let Some((_, least, most)) = BOUNDS.iter().find(|(at, ..)| at.split_once('.') == Some((name, field))) {
            (property["minimum"], property["maximum"]) = (json!(least), json!(most));
        }
        unsigned(property);
        let text = property["type"] == "string" || property["type"] == json!(["string", "null"]);
        if !text {
            continue;
        }
        if field.ends_with("_at") || ["at", "certificate_not_after", "not_before", "deadline"].contains(&field.as_str()) {
            property["format"] = json!("date-time");
        } else if let Some((_, prefix)) = ID_FIELDS.iter().find(|(f, _)| reply && f == field) {
            property["pattern"] = id(prefix)["pattern"].clone();
        }
    }
    if !always.is_empty() {
        always.sort();
        schema["required"] = json!(always);
    }
}

/// Numbers without a sign: formats of their own in the registry of formats, and how much they can hold.
fn unsigned(schema: &mut Value) {
    let (format, most) = match schema["format"].as_str() {
        Some("int32") if schema["minimum"] == 0 => ("uint32", json!(u32::MAX)),
        Some("int64") if schema["minimum"] == 0 => ("uint64", json!(u64::MAX)),
        _ => return,
    };
    schema["format"] = json!(format);
    if let Some(schema) = schema.as_object_mut() {
        schema.entry("maximum").or_insert(most);
    }
}

fn nullable(schema: &Value) -> bool {
    let null = |s: &Value| s["type"] == "null" || s["type"].as_array().is_some_and(|t| t.contains(&json!("null")));
    null(schema) || ["oneOf", "anyOf"].iter().any(|k| schema[*k].as_array().is_some_and(|of| of.iter().any(null)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::{BTreeMap, BTreeSet};

    type Calls = BTreeSet<(String, String)>;

    fn described() -> Calls {
        let mut out = Calls::new();
        for (path, item) in document()["paths"].as_object().unwrap() {
            out.extend(item.as_object().unwrap().keys().map(|method| (method.to_uppercase(), path.clone())));
        }
        out
    }

    /// A router tells its routes nowhere but in its debug text: `RouteId(7): … allow_header: Bytes(b"GET,HEAD")`
    /// and `RouteId(7): "/path"`.
    fn routed(router: &axum::Router<super::super::App>) -> Calls {
        let text = format!("{router:?}");
        let text = text.split("fallback_router").next().unwrap();
        let (mut methods, mut paths) = (BTreeMap::new(), vec![]);
        for part in text.split("RouteId(").skip(1) {
            let (id, rest) = part.split_once("): ").expect("an id and what it stands for");
            if let Some(path) = rest.strip_prefix('"') {
                paths.push((id, path.split('"').next().unwrap().to_owned()));
            } else {
                let allowed = rest.split_once("allow_header: Bytes(b\"").map_or("ANY", |(_, r)| r.split('"').next().unwrap());
                methods.insert(id, allowed.to_owned());
            }
        }
        let each = |(id, path): (&str, String)| {
            let all: Vec<_> = methods[id].split(',').filter(|m| *m != "HEAD").map(|m| (m.to_owned(), path.clone())).collect();
            all
        };
        paths.into_iter().flat_map(each).collect()
    }

    #[test]
    fn every_route_is_described_and_every_description_is_routed() {
        let (router, _) = super::super::routes().split_for_parts();
        let (routed, described) = (routed(&router), described());
        let undescribed: Vec<_> = routed.difference(&described).collect();
        assert!(
            undescribed.is_empty(),
            "routes without a description: {undescribed:?}. Give the handler #[utoipa::path(…)] and register it by \
             .routes(routes!(handler)) instead of .route(…); see docs/how-to/add-an-endpoint.md"
        );
        let unrouted: Vec<_> = described.difference(&routed).collect();
        assert!(unrouted.is_empty(), "described, but no route leads there: {unrouted:?}");
        // The walk itself sees what is added past the descriptions.
        let more = router.route("/bare", axum::routing::get(async || ()).post(async || ()));
        let bare: Calls = [("GET", "/bare"), ("POST", "/bare")].map(|(m, p)| (m.to_owned(), p.to_owned())).into();
        assert_eq!(super::tests::routed(&more).difference(&described).cloned().collect::<Calls>(), bare);
    }

    #[test]
    fn every_operation_says_what_a_reader_needs() {
        let doc = document();
        let mut ids = BTreeSet::new();
        let tags: BTreeSet<&str> = doc["tags"].as_array().unwrap().iter().map(|t| t["name"].as_str().unwrap()).collect();
        for (path, item) in doc["paths"].as_object().unwrap() {
            for (method, o) in item.as_object().unwrap() {
                let at = format!("{method} {path}");
                assert!(o["summary"].is_string(), "{at}: the handler has no doc comment");
                assert!(o["tags"][0].as_str().is_some_and(|t| tags.contains(t)), "{at}: its tag is not in Head");
                assert!(ids.insert(o["operationId"].to_string()), "{at}: operation_id {} is taken", o["operationId"]);
                let named = o["parameters"].as_array().into_iter().flatten().filter(|p| p["in"] == "path").count();
                assert_eq!(named, path.matches('{').count(), "{at}: path parameters");
                let answers = o["responses"].as_object().unwrap();
                assert!(answers.keys().any(|s| s.as_str() < "400"), "{at}: no answer that is not a refusal");
                assert!(
                    answers.values().all(|r| r["$ref"].is_string() || r["description"].as_str().is_some_and(|d| !d.is_empty())),
                    "{at}"
                );
            }
        }
    }

    #[test]
    fn what_is_said_once_finds_its_place() {
        let doc = document();
        for (at, words) in WORDS.iter() {
            let (shape, field) = at.split_once('.').unwrap();
            let property = &doc["components"]["schemas"][shape]["properties"][field];
            assert!(property["enum"] == json!(words) || property["items"]["enum"] == json!(words), "{at} is no field");
        }
        for (at, least, most) in BOUNDS {
            let (shape, field) = at.split_once('.').unwrap();
            let property = &doc["components"]["schemas"][shape]["properties"][field];
            assert!(property["type"].to_string().contains("integer"), "{at} is no field");
            assert_eq!((property["minimum"].as_i64(), property["maximum"].as_i64()), (Some(*least), Some(*most)), "{at}");
        }
        for (start, prefix) in IDS {
            let under = |p: &String| p.strip_prefix("/api/v1").is_some_and(|p| p == *start || p.starts_with(&format!("{start}/")));
            let paths = doc["paths"].as_object().unwrap();
            let found: Vec<_> = paths.iter().filter(|(p, _)| under(p)).flat_map(|(_, item)| item.as_object().unwrap().values()).collect();
            assert!(!found.is_empty(), "{start} is no path");
            for o in found {
                let p = o["parameters"].as_array().unwrap().iter().find(|p| p["name"] == "id").unwrap();
                assert_eq!(p["schema"], id(prefix));
            }
        }
        let task = &doc["components"]["schemas"]["TaskView"];
        let required: Vec<_> = task["required"].as_array().unwrap().iter().map(|v| v.as_str().unwrap()).collect();
        assert!(required.contains(&"exit_code") && !required.contains(&"stdout"), "null is there, absent is not: {required:?}");
        assert_eq!(task["properties"]["created_at"]["format"], "date-time");
        assert_eq!(doc["components"]["schemas"]["DispatchRequest"]["additionalProperties"], json!(false));
        assert!(doc["components"]["schemas"]["DispatchRequest"].get("required").is_none());
        assert_eq!(doc["openapi"], "3.1.0");
    }
}

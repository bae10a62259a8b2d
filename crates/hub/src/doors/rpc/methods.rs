//! The methods. One entry of the table is one method: its name, its parameters in the order of their
//! positions, where its shapes are described, and the handler of [`super::super::rest`] that it is.

use super::own;
use super::params::{Params, Said};
use crate::doors::rest::{App, Refusal, Who, invites, nodes, sessions, tasks};
use axum::extract::State;
use futures::future::BoxFuture;
use serde_json::value::RawValue;

pub type Work = BoxFuture<'static, Result<Box<RawValue>, Refusal>>;

pub enum Run {
    /// Needs no credentials.
    Open(fn(App) -> Work),
    Known(fn(App, Who, Params) -> Work),
    /// Belongs to one connection, which does it.
    Socket(Act),
}

/// What only a WebSocket can do.
#[derive(Debug, Clone, Copy)]
pub enum Act {
    Subscribe,
    Unsubscribe,
}

/// Where parameters and result are described: in the description of REST, by a call or by a shape's name.
#[derive(Debug, Clone, Copy)]
pub enum Shape {
    /// Both are those of this call, whose `{id}` is `node_id`, `session_id` or `task_id` here.
    Rest(&'static str),
    /// The parameters are those of this call, the result is a shape.
    Like(&'static str, &'static str),
    /// Two shapes; no parameters without the first.
    Own(Option<&'static str>, &'static str),
}
use Shape::{Like, Own, Rest};

pub struct Method {
    pub name: &'static str,
    pub params: &'static [&'static str],
    pub shape: Shape,
    pub summary: &'static str,
    pub run: Run,
}

/// A method whose caller is known: name, parameters, shape, summary, and what it answers.
macro_rules! known {
    ($name:literal, $params:expr, $shape:expr, $summary:literal, |$app:ident, $who:ident, $($p:ident)+| $work:expr) => {
        Method {
            name: $name,
            params: &$params,
            shape: $shape,
            summary: $summary,
            run: Run::Known(|$app, $who, $($p)+| Box::pin(async move { $work.await?.said() })),
        }
    };
}

/// The session, and the fields of a `DispatchRequest`.
#[rustfmt::skip]
const DISPATCH: [&str; 22] = [
    "session_id", "node", "select", "all", "shell", "echo", "browser", "container", "tool", "agent", "timeout_secs", "deadline",
    "not_before", "queue_secs", "priority", "retries", "on_lost", "lost_after_secs", "limits", "network", "sandbox", "wait_secs",
];

#[rustfmt::skip]
pub static METHODS: &[Method] = &[
    Method {
        name: "system.health", params: &[], shape: Own(None, "HealthReply"), summary: "Does the hub live; no credentials are needed",
        run: Run::Open(|app| Box::pin(async move { own::health(&app).said() })),
    },
    known!("node.list", ["limit", "cursor", "select"], Rest("GET /nodes"), "Nodes that the caller may see",
        |app, who, p| nodes::list(State(app), who, p.query()?)),
    known!("node.get", ["node_id"], Rest("GET /nodes/{id}"), "A node",
        |app, who, mut p| nodes::get(State(app), who, p.id("node_id")?)),
    known!("node.invite", ["name", "labels", "policy", "ttl_secs"], Rest("POST /nodes/invites"), "Invite a machine",
        |app, who, p| invites::create(State(app), who, p.creating()?)),
    known!("node.revoke", ["node_id"], Rest("POST /nodes/{id}/revoke"), "Revoke a node",
        |app, who, mut p| nodes::revoke(State(app), who, p.id("node_id")?)),
    known!("session.create", ["name", "ttl_secs"], Rest("POST /sessions"), "Make a session",
        |app, who, p| sessions::create(State(app), who, p.creating()?)),
    known!("session.get", ["session_id"], Rest("GET /sessions/{id}"), "A session",
        |app, who, mut p| sessions::get(State(app), who, p.id("session_id")?)),
    known!("session.list", ["limit", "cursor"], Rest("GET /sessions"), "Sessions that the caller may see",
        |app, who, p| sessions::list(State(app), who, p.query()?)),
    known!("session.close", ["session_id"], Rest("DELETE /sessions/{id}"), "Close a session",
        |app, who, mut p| sessions::close(State(app), who, p.id("session_id")?)),
    known!("session.attach", ["session_id", "node_id", "path"], Rest("PUT /sessions/{id}/nodes/{node_id}"), "Attach a node",
        |app, who, mut p| sessions::attach(State(app), who, p.texts("session_id", "node_id")?, p.optional_body()?)),
    known!("session.detach", ["session_id", "node_id"], Rest("DELETE /sessions/{id}/nodes/{node_id}"), "Detach a node",
        |app, who, mut p| sessions::detach(State(app), who, p.texts("session_id", "node_id")?)),
    known!("task.dispatch", DISPATCH, Rest("POST /sessions/{id}/dispatch"), "Run a task, in a session's workspace or one of its own",
        |app, who, p| own::dispatch(app, who, p)),
    known!("task.get", ["task_id"], Rest("GET /tasks/{id}"), "A task",
        |app, who, mut p| tasks::get(State(app), who, p.id("task_id")?)),
    known!("task.list", ["limit", "cursor", "session", "node", "user", "state", "skill", "parent", "since", "until"], Rest("GET /tasks"),
        "Tasks that the caller may see",
        |app, who, p| tasks::list(State(app), who, p.query()?)),
    known!("task.cancel", ["task_id"], Rest("POST /tasks/{id}/cancel"), "Cancel a task",
        |app, who, mut p| tasks::cancel(State(app), who, p.id("task_id")?)),
    known!("task.output", ["task_id", "from_byte", "max_bytes", "stream", "encoding"], Own(Some("TaskOutputRequest"), "TaskOutputView"),
        "What a task has put out so far, a part at a time",
        |app, who, p| own::output(app, who, p)),
    known!("agent.spawn", ["name", "agent_type", "config"], Like("POST /agents", "AgentReply"), "Spawn an agent",
        |app, who, p| own::spawn(app, who, p)),
    known!("agent.list", ["limit", "cursor", "name", "status"], Like("GET /agents", "AgentList"), "Agents that the caller may see",
        |app, who, p| own::agents(app, who, p)),
    known!("agent.kill", ["agent_id", "force"], Like("POST /agents/{id}/kill", "AgentReply"), "End an agent, by force without giving it time",
        |app, who, p| own::kill(app, who, p)),
    known!("agent.logs", ["agent_id", "limit", "offset"], Own(Some("AgentLogsRequest"), "AgentLogs"), "Lines of an agent's log, oldest first",
        |app, who, p| own::logs(app, who, p)),
    known!("system.metrics", [], Own(None, "MetricsReply"), "How many agents there are, and how much there is of everything else",
        |app, who, p| own::metrics(app, who, p)),
    known!("state.query", ["agent_id", "key", "limit", "cursor"], Like("GET /state", "StateReply"), "What agents keep",
        |app, who, p| own::state(app, who, p)),
    Method {
        name: "event.subscribe", params: &["topics", "after"], shape: Own(Some("SubscribeRequest"), "SubscribeReply"),
        summary: "Hear of what happens: events come as notifications event.notify", run: Run::Socket(Act::Subscribe),
    },
    Method {
        name: "event.unsubscribe", params: &["subscription_id"], shape: Own(Some("UnsubscribeRequest"), "UnsubscribeReply"),
        summary: "End a subscription", run: Run::Socket(Act::Unsubscribe),
    },
    known!("rpc.discover", [], Own(None, "DiscoverReply"), "This description, as OpenRPC",
        |app, who, p| own::discover(app, who, p)),
];

pub fn named(name: &str) -> Option<&'static Method> {
    METHODS.iter().find(|m| m.name == name)
}

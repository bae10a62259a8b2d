//! The calls of the REST door, one method each.

use crate::client::{Call, Client};
use crate::error::Error;
use crate::rest::*;
use bytes::Bytes;
use futures::StreamExt;
use reqwest::Method;
use serde::de::DeserializeOwned;
use std::time::Duration;

/// The most that one page of a list holds.
const PAGE: u32 = 500;

/// Which output of a task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    Stdout,
    Stderr,
}

/// Which part of a task's output as raw bytes.
#[derive(Debug, Clone, Copy, Default)]
pub struct OutputQuery {
    /// `None`: both, in the order in which they were written.
    pub stream: Option<Stream>,
    pub from_byte: u64,
    /// Go on until the task has ended.
    pub follow: bool,
}

/// Which tasks a list shows. Ids, not names; times in RFC 3339.
#[derive(Debug, Clone, Default)]
pub struct TaskFilter {
    pub session: Option<String>,
    pub node: Option<String>,
    pub user: Option<String>,
    pub state: Option<String>,
    pub skill: Option<String>,
    pub parent: Option<String>,
    pub since: Option<String>,
    pub until: Option<String>,
    /// From 1 to 500.
    pub limit: Option<u32>,
    /// Where the page before ended; belongs to the same filters.
    pub cursor: Option<String>,
}

/// Which entries of the audit log a list shows. Ids, not names; times in RFC 3339.
#[derive(Debug, Clone, Default)]
pub struct AuditFilter {
    pub kind: Option<String>,
    pub user: Option<String>,
    pub session: Option<String>,
    pub resource: Option<String>,
    pub outcome: Option<String>,
    pub door: Option<String>,
    pub since: Option<String>,
    pub until: Option<String>,
    /// From 1 to 500.
    pub limit: Option<u32>,
    /// Where the page before ended; belongs to the same filters.
    pub cursor: Option<String>,
}

impl Client {
    /// Logs in. The reply's tokens are the caller's to keep; this client does not take them on.
    pub async fn login(&self, request: &LoginRequest) -> Result<TokenReply, Error> {
        self.fetch(self.call(Method::POST, &["auth", "login"]).anonymous().json(request)).await
    }
    /// Chooses the password of who was invited, and logs in as [`Client::login`] does.
    pub async fn accept_invite(&self, request: &AcceptRequest) -> Result<TokenReply, Error> {
        self.fetch(self.call(Method::POST, &["auth", "accept"]).anonymous().json(request)).await
    }
    pub async fn logout(&self) -> Result<(), Error> {
        self.perform(self.call(Method::POST, &["auth", "logout"])).await
    }
    pub async fn me(&self) -> Result<MeReply, Error> {
        self.fetch(self.call(Method::GET, &["auth", "me"])).await
    }
    pub async fn change_password(&self, request: &PasswordRequest) -> Result<(), Error> {
        self.perform(self.call(Method::POST, &["auth", "password"]).json(request)).await
    }

    /// Without a password the person is invited; the reply alone has the link.
    pub async fn create_user(&self, request: &UserRequest) -> Result<UserView, Error> {
        self.fetch(self.call(Method::POST, &["users"]).json(request)).await
    }
    pub async fn users(&self) -> Result<Vec<UserView>, Error> {
        self.every(&["users"]).await
    }
    /// Also one who was removed.
    pub async fn user(&self, id: &str) -> Result<UserView, Error> {
        self.fetch(self.call(Method::GET, &["users", id])).await
    }
    pub async fn change_user(&self, id: &str, change: &UserPatch) -> Result<UserView, Error> {
        self.fetch(self.call(Method::PATCH, &["users", id]).json(change)).await
    }
    /// What they own passes to `transfer_to`, by id, or to the caller. `cancel` ends what they run.
    pub async fn delete_user(&self, id: &str, transfer_to: Option<&str>, cancel: bool, purge: bool) -> Result<(), Error> {
        let call = self.call(Method::DELETE, &["users", id]).query("transfer_to", transfer_to);
        self.perform(call.query("work", cancel.then_some("cancel")).query("purge", purge.then_some(true))).await
    }

    /// Makes an API key; the reply alone has its secret.
    pub async fn create_api_key(&self, request: &ApiKeyRequest) -> Result<ApiKeyView, Error> {
        self.fetch(self.call(Method::POST, &["api-keys"]).json(request)).await
    }
    pub async fn api_keys(&self) -> Result<Vec<ApiKeyView>, Error> {
        self.every(&["api-keys"]).await
    }
    pub async fn delete_api_key(&self, id: &str) -> Result<(), Error> {
        self.perform(self.call(Method::DELETE, &["api-keys", id])).await
    }

    /// Shares a node, a session, an agent, or nodes by their labels.
    pub async fn create_grant(&self, request: &GrantRequest) -> Result<GrantView, Error> {
        self.fetch(self.call(Method::POST, &["grants"]).json(request)).await
    }
    /// Those that one made and those made to one; an admin's are all.
    pub async fn grants(&self) -> Result<Vec<GrantView>, Error> {
        self.every(&["grants"]).await
    }
    pub async fn delete_grant(&self, id: &str) -> Result<(), Error> {
        self.perform(self.call(Method::DELETE, &["grants", id])).await
    }
    /// The own log-ins.
    pub async fn devices(&self) -> Result<Vec<DeviceView>, Error> {
        self.every(&["devices"]).await
    }
    /// What is left out of the change stays as it is.
    pub async fn change_device(&self, id: &str, change: &DevicePatch) -> Result<DeviceView, Error> {
        self.fetch(self.call(Method::PATCH, &["devices", id]).json(change)).await
    }
    /// Ends its log-in.
    pub async fn delete_device(&self, id: &str) -> Result<(), Error> {
        self.perform(self.call(Method::DELETE, &["devices", id])).await
    }

    /// Invites a machine; the secret is in `config_yaml` and nowhere else.
    pub async fn create_invite(&self, request: &InviteRequest) -> Result<InviteReply, Error> {
        self.fetch(self.call(Method::POST, &["nodes", "invites"]).json(request)).await
    }
    pub async fn invites(&self) -> Result<Vec<InviteView>, Error> {
        self.every(&["nodes", "invites"]).await
    }
    pub async fn delete_invite(&self, id: &str) -> Result<(), Error> {
        self.perform(self.call(Method::DELETE, &["nodes", "invites", id])).await
    }

    pub async fn nodes(&self) -> Result<Vec<NodeView>, Error> {
        self.nodes_where(None).await
    }
    /// Those whose labels fit, such as `os=linux,gpu`.
    pub async fn nodes_where(&self, select: Option<&str>) -> Result<Vec<NodeView>, Error> {
        self.every_where(&["nodes"], select).await
    }
    /// What is left out of the change stays as it is.
    pub async fn change_node(&self, id: &str, change: &NodeChangeRequest) -> Result<NodeView, Error> {
        self.fetch(self.call(Method::PATCH, &["nodes", id]).json(change)).await
    }
    /// No new work until it is resumed.
    pub async fn drain_node(&self, id: &str) -> Result<NodeView, Error> {
        self.fetch(self.call(Method::POST, &["nodes", id, "drain"])).await
    }
    pub async fn resume_node(&self, id: &str) -> Result<NodeView, Error> {
        self.fetch(self.call(Method::POST, &["nodes", id, "resume"])).await
    }
    /// For good; its tasks end.
    pub async fn revoke_node(&self, id: &str) -> Result<NodeView, Error> {
        self.fetch(self.call(Method::POST, &["nodes", id, "revoke"])).await
    }
    /// As a revocation, and its entry goes too.
    pub async fn delete_node(&self, id: &str) -> Result<(), Error> {
        self.perform(self.call(Method::DELETE, &["nodes", id])).await
    }
    pub async fn node(&self, id: &str) -> Result<NodeView, Error> {
        self.fetch(self.call(Method::GET, &["nodes", id])).await
    }
    pub async fn node_status(&self, id: &str) -> Result<NodeStatusView, Error> {
        self.fetch(self.call(Method::GET, &["nodes", id, "status"])).await
    }

    pub async fn create_session(&self, request: &SessionRequest) -> Result<SessionView, Error> {
        self.fetch(self.call(Method::POST, &["sessions"]).json(request)).await
    }
    pub async fn sessions(&self) -> Result<Vec<SessionView>, Error> {
        self.every(&["sessions"]).await
    }
    pub async fn session(&self, id: &str) -> Result<SessionView, Error> {
        self.fetch(self.call(Method::GET, &["sessions", id])).await
    }
    /// Closes a session; its tasks are cancelled.
    pub async fn close_session(&self, id: &str) -> Result<(), Error> {
        self.perform(self.call(Method::DELETE, &["sessions", id])).await
    }
    /// Sets what `change` has.
    pub async fn change_session(&self, id: &str, change: &SessionPatch) -> Result<SessionView, Error> {
        self.fetch(self.call(Method::PATCH, &["sessions", id]).json(change)).await
    }
    /// Erases what a closed or expired session held.
    pub async fn purge_session(&self, id: &str) -> Result<SessionView, Error> {
        self.fetch(self.call(Method::POST, &["sessions", id, "purge"])).await
    }
    pub async fn session_memory(&self, id: &str, key: &str) -> Result<MemoryEntryView, Error> {
        self.fetch(self.call(Method::GET, &["sessions", id, "memory", key])).await
    }
    pub async fn set_session_memory(&self, id: &str, key: &str, value: &ValueRequest) -> Result<MemoryEntryView, Error> {
        self.fetch(self.call(Method::PUT, &["sessions", id, "memory", key]).json(value)).await
    }
    pub async fn post_message(&self, id: &str, message: &MessageRequest) -> Result<MessageView, Error> {
        self.fetch(self.call(Method::POST, &["sessions", id, "messages"]).json(message)).await
    }
    /// Does the process live; needs no credentials.
    pub async fn healthz(&self) -> Result<Health, Error> {
        self.fetch(self.outside(Method::GET, &["healthz"]).anonymous()).await
    }
    /// Can it serve; needs no credentials.
    pub async fn readyz(&self) -> Result<Ready, Error> {
        self.fetch(self.outside(Method::GET, &["readyz"]).anonymous()).await
    }
    /// What the server is; needs no credentials.
    pub async fn server_info(&self) -> Result<ServerInfo, Error> {
        self.fetch(self.outside(Method::GET, &[""]).anonymous()).await
    }
    pub async fn stats(&self) -> Result<StatsView, Error> {
        self.fetch(self.call(Method::GET, &["system", "stats"])).await
    }
    pub async fn attach(&self, session: &str, node: &str, request: &AttachRequest) -> Result<(), Error> {
        self.perform(self.call(Method::PUT, &["sessions", session, "nodes", node]).json(request)).await
    }
    pub async fn detach(&self, session: &str, node: &str) -> Result<(), Error> {
        self.perform(self.call(Method::DELETE, &["sessions", session, "nodes", node])).await
    }

    /// Starts a task, in a session's workspace or in one of its own. It is not sent again when the
    /// connection breaks: [`Error::Interrupted`] leaves open whether the task exists.
    pub async fn dispatch(&self, session: Option<&str>, request: &DispatchRequest) -> Result<TaskView, Error> {
        self.dispatch_once(session, request, None).await
    }
    /// As [`Client::dispatch`]. With a key the same request may be sent again for a day, and starts
    /// nothing new: it gives the task that the first one made.
    pub async fn dispatch_once(&self, session: Option<&str>, request: &DispatchRequest, key: Option<&str>) -> Result<TaskView, Error> {
        let call = match session {
            Some(id) => self.call(Method::POST, &["sessions", id, "dispatch"]),
            None => self.call(Method::POST, &["dispatch"]),
        };
        let wait = Duration::from_secs(request.wait_secs.unwrap_or(0));
        self.fetch(call.longer_by(wait).idempotency_key(key).json(request)).await
    }
    /// One page of tasks, newest first.
    pub async fn tasks(&self, filter: &TaskFilter) -> Result<Page<TaskView>, Error> {
        let call = self
            .call(Method::GET, &["tasks"])
            .query("session", filter.session.as_ref())
            .query("node", filter.node.as_ref())
            .query("user", filter.user.as_ref())
            .query("state", filter.state.as_ref())
            .query("skill", filter.skill.as_ref())
            .query("parent", filter.parent.as_ref())
            .query("since", filter.since.as_ref())
            .query("until", filter.until.as_ref())
            .query("limit", filter.limit)
            .query("cursor", filter.cursor.as_ref());
        self.fetch(call).await
    }
    pub async fn task(&self, id: &str) -> Result<TaskView, Error> {
        self.fetch(self.call(Method::GET, &["tasks", id])).await
    }
    pub async fn task_events(&self, id: &str) -> Result<Vec<TaskEventView>, Error> {
        self.every(&["tasks", id, "events"]).await
    }
    /// Asks for the end of a task; its state stays until its node says so.
    pub async fn cancel_task(&self, id: &str) -> Result<(), Error> {
        self.perform(self.call(Method::POST, &["tasks", id, "cancel"])).await
    }
    /// Hands a piece of input to a running task; gives the highest piece that was taken. The same piece
    /// may be sent again whenever it is not known what became of it.
    pub async fn send_input(&self, id: &str, request: &InputRequest) -> Result<InputReply, Error> {
        self.fetch(self.call(Method::POST, &["tasks", id, "input"]).json(request)).await
    }
    /// A task's output as raw bytes. Nothing is resumed here: see [`Client::follow_output`].
    pub async fn output(
        &self,
        id: &str,
        query: OutputQuery,
    ) -> Result<impl futures::Stream<Item = Result<Bytes, Error>> + Send + use<>, Error> {
        let stream = match query.stream {
            None => "all",
            Some(Stream::Stdout) => "stdout",
            Some(Stream::Stderr) => "stderr",
        };
        let call = self
            .call(Method::GET, &["tasks", id, "output"])
            .query("stream", Some(stream))
            .query("from_byte", (query.from_byte > 0).then_some(query.from_byte))
            .query("follow", query.follow.then_some(true))
            .accept("application/octet-stream")
            .wait_at_most(None);
        let url = self.url().to_owned();
        Ok(self.send(&call).await?.bytes_stream().map(move |piece| piece.map_err(|e| Error::transport(&url, e))))
    }

    /// One page of the audit log, newest first.
    pub async fn audit(&self, filter: &AuditFilter) -> Result<Page<AuditEntry>, Error> {
        let call = self
            .call(Method::GET, &["audit"])
            .query("type", filter.kind.as_ref())
            .query("user", filter.user.as_ref())
            .query("session", filter.session.as_ref())
            .query("resource", filter.resource.as_ref())
            .query("outcome", filter.outcome.as_ref())
            .query("door", filter.door.as_ref())
            .query("since", filter.since.as_ref())
            .query("until", filter.until.as_ref())
            .query("limit", filter.limit)
            .query("cursor", filter.cursor.as_ref());
        self.fetch(call).await
    }
    /// All of the audit log, as JSON lines that end with a signed checkpoint.
    pub async fn audit_export(&self) -> Result<impl futures::Stream<Item = Result<Bytes, Error>> + Send + use<>, Error> {
        let call = self.call(Method::GET, &["audit", "export"]).accept("application/jsonl").wait_at_most(None);
        let url = self.url().to_owned();
        Ok(self.send(&call).await?.bytes_stream().map(move |piece| piece.map_err(|e| Error::transport(&url, e))))
    }
    /// Lets the hub check its audit log, which takes as long as that is.
    pub async fn audit_verify(&self) -> Result<AuditVerification, Error> {
        self.fetch(self.call(Method::GET, &["audit", "verify"]).wait_at_most(None)).await
    }

    pub async fn spawn_agent(&self, request: &AgentRequest) -> Result<AgentView, Error> {
        self.fetch(self.call(Method::POST, &["agents"]).json(request)).await
    }
    /// Newest first.
    pub async fn agents(&self) -> Result<Vec<AgentView>, Error> {
        self.every(&["agents"]).await
    }
    /// The newest of this name.
    pub async fn agents_named(&self, name: &str) -> Result<Vec<AgentView>, Error> {
        let page: Page<AgentView> = self.fetch(self.call(Method::GET, &["agents"]).query("name", Some(name))).await?;
        Ok(page.items)
    }
    pub async fn agent(&self, id: &str) -> Result<AgentView, Error> {
        self.fetch(self.call(Method::GET, &["agents", id])).await
    }
    pub async fn kill_agent(&self, id: &str, request: &AgentKillRequest) -> Result<AgentView, Error> {
        self.fetch(self.call(Method::POST, &["agents", id, "kill"]).json(request)).await
    }
    /// Lines of an agent's log from an offset on, oldest first.
    pub async fn agent_logs(&self, id: &str, offset: u64, limit: u32) -> Result<AgentLogs, Error> {
        self.fetch(self.call(Method::GET, &["agents", id, "logs"]).query("offset", Some(offset)).query("limit", Some(limit))).await
    }

    pub async fn downloads(&self) -> Result<Downloads, Error> {
        self.fetch(self.call(Method::GET, &["downloads"])).await
    }
    /// The node's program for a target such as `linux-x86_64`.
    pub async fn download_node(&self, target: &str) -> Result<impl futures::Stream<Item = Result<Bytes, Error>> + Send + use<>, Error> {
        let call = self.call(Method::GET, &["downloads", target, "cortex-node"]).accept("application/octet-stream").wait_at_most(None);
        let url = self.url().to_owned();
        Ok(self.send(&call).await?.bytes_stream().map(move |piece| piece.map_err(|e| Error::transport(&url, e))))
    }

    /// All pages of a list that has no filters.
    async fn every<T: DeserializeOwned>(&self, segments: &[&str]) -> Result<Vec<T>, Error> {
        self.every_where(segments, None).await
    }
    async fn every_where<T: DeserializeOwned>(&self, segments: &[&str], select: Option<&str>) -> Result<Vec<T>, Error> {
        let mut items = Vec::new();
        let mut cursor: Option<String> = None;
        loop {
            let call: Call = self.call(Method::GET, segments).query("select", select);
            let call = call.query("limit", Some(PAGE)).query("cursor", cursor.as_ref());
            let page: Page<T> = self.fetch(call).await?;
            let empty = page.items.is_empty();
            items.extend(page.items);
            match page.next_cursor {
                // An empty page that points further would never end.
                Some(next) if !empty && cursor.as_ref() != Some(&next) => cursor = Some(next),
                _ => return Ok(items),
            }
        }
    }
}

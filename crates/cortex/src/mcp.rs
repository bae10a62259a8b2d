//! MCP for programs that speak it on standard input and output: each message is carried to the hub's `/mcp` as a
//! request of its own. Nothing is kept here, so that a hub that restarts is simply asked again.

use crate::client::Client;
use crate::error::Error;
use crate::sse::Parser;
use futures::StreamExt as _;
use reqwest::Method;
use reqwest::header::CONTENT_TYPE;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};

/// Beyond the time of a call: the longest that a tool waits, and more.
const WAITS: Duration = Duration::from_secs(60);
/// Requests under way at a time.
const AT_ONCE: usize = 32;
/// Messages on their way out.
const OUT: usize = 64;
/// The revision from which each request names it by itself.
const BY_ITSELF: &str = "2026-07-28";
const VERSION_KEY: &str = "io.modelcontextprotocol/protocolVersion";

/// Carries messages for one program.
#[derive(Clone)]
pub struct Bridge {
    client: Client,
    out: mpsc::Sender<Value>,
    shared: Arc<Mutex<Shared>>,
    work: mesh_process::Tasks,
}

#[derive(Default)]
struct Shared {
    /// What was agreed on at `initialize`.
    version: Option<String>,
    /// Requests under way, by their ids; dropping the sender ends one.
    under_way: HashMap<String, oneshot::Sender<()>>,
}

impl Bridge {
    /// What the hub answers comes by the receiver, which must be read while [`Bridge::take`] is called.
    pub fn new(client: Client) -> (Self, mpsc::Receiver<Value>) {
        let (out, answers) = mpsc::channel(OUT);
        (Self { client, out, shared: Arc::default(), work: mesh_process::Tasks::new() }, answers)
    }

    fn shared(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a line of the program. Its answer comes later, and in any order; one that is no request is answered at
    /// once.
    pub fn take(&self, line: &str) -> Option<Value> {
        let message: Value = match serde_json::from_str(line) {
            Ok(message) => message,
            Err(e) => return Some(refusal(&Value::Null, -32700, &format!("a line is no JSON: {e}"), None)),
        };
        let id = message.get("id").cloned().filter(|id| !id.is_null());
        let Some(method) = message["method"].as_str() else {
            // An answer: the hub asks nothing. Or nothing that has a meaning.
            let is_answer = message.is_object() && (message.get("result").is_some() || message.get("error").is_some());
            return (!is_answer).then(|| refusal(&id.unwrap_or_default(), -32600, "a line is no JSON-RPC message", None));
        };
        match id {
            // Whoever cancels a request wants no answer. The task, if one was started, goes on.
            None if method == "notifications/cancelled" => {
                self.shared().under_way.remove(&message["params"]["requestId"].to_string());
                None
            }
            // Nothing is kept there that other notifications could change.
            None => None,
            Some(id) => self.begin(id, message),
        }
    }

    fn begin(&self, id: Value, message: Value) -> Option<Value> {
        let (cancel, cancelled) = oneshot::channel();
        let key = id.to_string();
        let full = {
            let mut shared = self.shared();
            let full = shared.under_way.len() >= AT_ONCE || shared.under_way.contains_key(&key);
            if !full {
                shared.under_way.insert(key.clone(), cancel);
            }
            full
        };
        if full {
            let why = format!("{AT_ONCE} requests are under way, or one with this id; wait for some to end");
            return Some(refusal(&id, -32600, &why, None));
        }
        let own = self.clone();
        self.work.spawn("mcp request", async move {
            tokio::select! {
                () = own.carry(id, message) => {}
                _ = cancelled => {}
            }
            own.shared().under_way.remove(&key);
        });
        None
    }

    /// Waits for what is under way.
    pub async fn finish(self) {
        self.work.end(WAITS + WAITS).await;
    }

    async fn carry(&self, id: Value, message: Value) {
        if let Err(error) = self.exchange(&id, &message).await {
            let problem = serde_json::to_value(error.to_problem()).ok();
            let (code, advice) = match error.status() {
                Some(401) => (-32001, "log in again with cortex login, or give a key that has not ended"),
                Some(403) => (-32002, "this access may not do that"),
                Some(429) => (-32005, "ask again a little later"),
                _ => (
                    -32008,
                    "what was asked for may have been done: look by its id before asking again, and wait for a task with task_wait",
                ),
            };
            let _ = self.out.send(refusal(&id, code, &format!("{error}; {advice}"), problem)).await;
        }
    }

    async fn exchange(&self, id: &Value, message: &Value) -> Result<(), Error> {
        let method = message["method"].as_str().unwrap_or_default();
        let own = message["params"]["_meta"][VERSION_KEY].as_str().map(str::to_owned);
        let by_itself = own.as_deref().is_some_and(|v| v >= BY_ITSELF);
        let version = if method == "initialize" { None } else { own.or_else(|| self.shared().version.clone()) };
        let name = match method {
            "tools/call" | "prompts/get" => message["params"]["name"].as_str(),
            "resources/read" => message["params"]["uri"].as_str(),
            _ => None,
        };
        let plain = |text: &str| text.bytes().all(|b| (0x20..0x7f).contains(&b)).then(|| text.to_owned());
        let call = self
            .client
            .outside(Method::POST, &["mcp"])
            .accept("application/json, text/event-stream")
            .header("MCP-Protocol-Version", version.as_deref().and_then(plain))
            .header("Mcp-Method", by_itself.then(|| plain(method)).flatten())
            .header("Mcp-Name", name.filter(|_| by_itself).and_then(plain))
            .json(message)
            .longer_by(WAITS);
        let response = self.client.ask(&call).await?;
        let kind = response.headers().get(CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or_default().to_owned();
        let broken = |e: reqwest::Error| Error::Interrupted { url: self.client.url().to_owned(), reason: e.without_url().to_string() };
        if kind.starts_with("application/json") {
            let answer: Value = serde_json::from_slice(&response.bytes().await.map_err(broken)?).unwrap_or_default();
            if self.pass(id, answer).await {
                return Ok(());
            }
        } else if kind.starts_with("text/event-stream") {
            let (mut parser, mut stream) = (Parser::new(), response.bytes_stream());
            while let Some(piece) = stream.next().await {
                let events = parser.push(&piece.map_err(broken)?);
                let events = events.map_err(|e| Error::Interrupted { url: self.client.url().to_owned(), reason: e.to_string() })?;
                for event in events {
                    if let Ok(said) = serde_json::from_str(&event.data)
                        && self.pass(id, said).await
                    {
                        return Ok(());
                    }
                }
            }
        } else {
            self.client.judge(&call, response).await?;
        }
        Err(Error::Interrupted { url: self.client.url().to_owned(), reason: "no answer came".into() })
    }

    /// Gives a message to the program; was it the answer?
    async fn pass(&self, id: &Value, mut said: Value) -> bool {
        if !said.is_object() {
            return false;
        }
        if let Some(version) = said["result"]["protocolVersion"].as_str() {
            self.shared().version = Some(version.to_owned());
        }
        let is_answer = said.get("result").is_some() || said.get("error").is_some();
        if is_answer && said["id"].is_null() {
            // The hub could not read the message far enough to know its id.
            said["id"] = id.clone();
        }
        let _ = self.out.send(said).await;
        is_answer
    }
}

fn refusal(id: &Value, code: i64, message: &str, data: Option<Value>) -> Value {
    let mut error = json!({"code": code, "message": message});
    if let Some(data) = data {
        error["data"] = data;
    }
    json!({"jsonrpc": "2.0", "id": id, "error": error})
}

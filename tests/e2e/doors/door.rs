//! The doors, each with its adapter: how what a test asks for is said there, and how what came is read.

use crate::wire::{self, Answer, Io, chunk, exchange, soon};
use futures::{SinkExt, StreamExt};
use mesh_tests::Hub;
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::http::HeaderValue;
use tokio_tungstenite::tungstenite::protocol::Role;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Door {
    Rest,
    /// REST on the control socket.
    Socket,
    Events,
    WebSocket,
    Rpc,
    /// JSON-RPC over a WebSocket, with subscriptions.
    RpcSocket,
    Mcp,
}

/// What a caller asks for.
#[derive(Debug, Clone, Copy)]
pub enum Call<'a> {
    /// What the key of the tests may have.
    Read,
    /// What it may not.
    Forbidden,
    /// A task, by its id.
    Task(&'a str),
    /// What no shape allows.
    Bad,
    /// A session of this name.
    Make(&'a str),
    /// A body of so many bytes.
    Sized(usize),
}

/// One question, in the words that all doors have in common.
#[derive(Debug, Clone, Copy)]
pub struct Ask<'a> {
    pub call: Call<'a>,
    /// All of the header `Authorization`.
    pub by: Option<&'a str>,
    pub host: &'a str,
    pub origin: Option<&'a str>,
    pub request_id: Option<&'a str>,
}

impl<'a> Ask<'a> {
    pub fn of(call: Call<'a>, by: Option<&'a str>) -> Self {
        Self { call, by, host: "localhost", origin: None, request_id: None }
    }
}

/// What a door told.
#[derive(Debug, Default)]
pub struct Told {
    pub answer: Answer,
    /// The problem object, wherever the door puts it; null where there is none.
    pub problem: Value,
    /// Of a JSON-RPC error, or of the frame that closed a WebSocket.
    pub number: Option<i64>,
    /// The id of what was made.
    pub made: Option<String>,
}

impl Told {
    pub fn code(&self) -> &str {
        self.problem["code"].as_str().unwrap_or_default()
    }
    pub fn is(&self) -> Want<'_> {
        Want { status: self.answer.status, code: self.code(), number: self.number }
    }
    pub fn detail(&self) -> &str {
        self.problem["detail"].as_str().unwrap_or_default()
    }
}

/// What is asked of every door, in one word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Duty {
    NoCredentials,
    WrongCredentials,
    Read,
    Forbidden,
    Absent,
    Bad,
    TooLarge,
    ForeignHost,
    ForeignOrigin,
    TooOften,
    /// The store does not answer.
    Broken,
    /// A body that does not come.
    Silent,
}

/// What an answer must be: the status of HTTP, the code of the problem (empty: there is none), and the number of the
/// JSON-RPC error or of the closing frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Want<'a> {
    pub status: u16,
    pub code: &'a str,
    pub number: Option<i64>,
}

fn plain(status: u16, code: &'static str) -> Want<'static> {
    Want { status, code, number: None }
}

fn numbered(status: u16, number: i64, code: &'static str) -> Want<'static> {
    Want { status, code, number: Some(number) }
}

impl Door {
    pub const ALL: [Door; 7] = [Door::Rest, Door::Socket, Door::Events, Door::WebSocket, Door::Rpc, Door::RpcSocket, Door::Mcp];

    /// By hand, from the reference: what each door owes. None: the door cannot be asked that.
    pub fn owes(self, duty: Duty) -> Option<Want<'static>> {
        use Door::{Events, Mcp, Rest, Rpc, RpcSocket, Socket, WebSocket};
        use Duty::*;
        Some(match (duty, self) {
            // Who may open the control socket owns the hub: it is asked for no credentials, by any name and
            // as often as one likes.
            (NoCredentials | ForeignHost | ForeignOrigin | TooOften, Socket) => plain(200, ""),
            // HTTP's own 401 is for who gives no credentials at all; each call has its own answer else.
            (NoCredentials, Rpc) => numbered(401, -32001, "unauthenticated"),
            (WrongCredentials, Rpc) => numbered(200, -32001, "unauthenticated"),
            // Some methods need nobody's, so the socket opens.
            (NoCredentials, RpcSocket) => numbered(101, -32001, "unauthenticated"),
            (NoCredentials | WrongCredentials, _) => plain(401, "unauthenticated"),
            (Read, WebSocket | RpcSocket) => plain(101, ""),
            (Read, _) => plain(200, ""),
            // A model is told of no tool that it may not use.
            (Forbidden, Mcp) => numbered(200, -32602, ""),
            (Forbidden, Rpc) => numbered(200, -32002, "forbidden"),
            (Forbidden, RpcSocket) => numbered(101, -32002, "forbidden"),
            (Forbidden, _) => plain(403, "forbidden"),
            (Absent, Rest | Socket) => plain(404, "not_found"),
            (Absent, Rpc) => numbered(200, -32003, "not_found"),
            (Absent, RpcSocket) => numbered(101, -32003, "not_found"),
            // What a tool could not do is a result, for the model to read.
            (Absent, Mcp) => plain(200, "not_found"),
            (Bad, Rest | Socket) => plain(400, "bad_field"),
            (Bad, Events | WebSocket) => plain(400, "bad_topic"),
            (Bad, Rpc) => numbered(200, -32602, "bad_params"),
            (Bad, RpcSocket) => numbered(101, -32602, "bad_params"),
            (Bad, Mcp) => plain(200, "bad_arguments"),
            (TooLarge, Rpc) => numbered(413, -32006, "body_too_large"),
            // Of a message that is too large nothing is read, so nobody knows which call it was.
            (TooLarge, RpcSocket) => numbered(101, 1002, ""),
            (Silent, Rpc) => numbered(408, -32007, "body_too_slow"),
            (TooLarge, Rest | Socket | Mcp) => plain(413, "body_too_large"),
            (Silent, Rest | Socket | Mcp) => plain(408, "body_too_slow"),
            // They have no ids and no bodies.
            (Absent | TooLarge | Silent, Events | WebSocket) | (Silent, RpcSocket) => return None,
            // The status that MCP has for it.
            (ForeignHost, Mcp) => plain(403, "foreign_host"),
            (ForeignHost, _) => plain(421, "foreign_host"),
            // A page cannot add the header, and no page of another origin can read the answer.
            (ForeignOrigin, Rest | Rpc) => plain(200, ""),
            (ForeignOrigin, _) => plain(403, "foreign_origin"),
            (TooOften, Rpc) => numbered(200, -32005, "rate_limited"),
            (TooOften, _) => plain(429, "rate_limited"),
            (Broken, Rpc) => numbered(200, -32008, "store_unavailable"),
            (Broken, _) => plain(503, "store_unavailable"),
        })
    }

    /// What the audit calls it. Events are a part of REST.
    pub fn audited_as(self) -> &'static str {
        match self {
            Door::Socket => "socket",
            Door::Mcp => "mcp",
            Door::Rpc | Door::RpcSocket => "jsonrpc",
            Door::Rest | Door::Events | Door::WebSocket => "rest",
        }
    }

    /// The door of a described path: None where it needs none of its own.
    pub fn of(path: &str, streams: bool) -> Option<Self> {
        match path {
            "/api/v1/ws" => Some(Door::WebSocket),
            "/api/v1/events" => Some(Door::Events),
            "/mcp" => Some(Door::Mcp),
            "/" | "/rpc" => Some(Door::Rpc),
            "/rpc/ws" => Some(Door::RpcSocket),
            // Streams of REST; the first is its ear.
            "/api/v1/tasks/{id}/output" | "/api/v1/agents/{id}/logs" => Some(Door::Rest),
            _ if path.starts_with("/api/v1/") && !streams => Some(Door::Rest),
            _ => None,
        }
    }

    fn is_socket(self) -> bool {
        self == Door::Socket
    }

    /// Method, path and body.
    fn line(self, call: Call) -> Option<(&'static str, String, Option<String>)> {
        let body = |v: Value| Some(v.to_string());
        Some(match (self, call) {
            (Door::Rest | Door::Socket, call) => match call {
                Call::Read => ("GET", "/api/v1/nodes".into(), None),
                Call::Forbidden => ("POST", "/api/v1/dispatch".into(), body(json!({"echo": {"payload": "x"}}))),
                Call::Task(id) => ("GET", format!("/api/v1/tasks/{id}"), None),
                Call::Bad => ("POST", "/api/v1/sessions".into(), body(json!({"nam": "x"}))),
                Call::Make(name) => ("POST", "/api/v1/sessions".into(), body(json!({"name": name}))),
                Call::Sized(bytes) => ("POST", "/api/v1/sessions".into(), body(json!({"name": "x".repeat(bytes)}))),
            },
            (Door::Rpc | Door::RpcSocket, call) => {
                let (method, params) = match call {
                    Call::Read => ("node.list", json!({})),
                    Call::Forbidden => ("task.dispatch", json!({"echo": {"payload": "x"}})),
                    Call::Task(id) => ("task.get", json!({"task_id": id})),
                    Call::Bad => ("session.create", json!({"nam": "x"})),
                    Call::Make(name) => ("session.create", json!({"name": name})),
                    Call::Sized(bytes) => ("session.create", json!({"name": "x".repeat(bytes)})),
                };
                let path = if self == Door::Rpc { "/rpc" } else { "/rpc/ws" };
                ("POST", path.into(), body(json!({"jsonrpc": "2.0", "id": 1, "method": method, "params": params})))
            }
            (Door::Mcp, call) => {
                let (tool, arguments) = match call {
                    Call::Read => ("nodes_list", json!({})),
                    Call::Forbidden => ("run", json!({"command": "true"})),
                    Call::Task(id) => ("task_wait", json!({"task_id": id, "wait_secs": 0})),
                    Call::Bad => ("session_create", json!({"nam": "x"})),
                    Call::Make(name) => ("session_create", json!({"name": name})),
                    Call::Sized(bytes) => ("session_create", json!({"name": "x".repeat(bytes)})),
                };
                let params = json!({"name": tool, "arguments": arguments});
                ("POST", "/mcp".into(), body(json!({"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params})))
            }
            (Door::Events | Door::WebSocket, call) => {
                let path = if self == Door::Events { "events" } else { "ws" };
                let query = match call {
                    Call::Read => "",
                    Call::Forbidden => "?topics=sessions,audit",
                    Call::Bad => "?topics=sessions,nonsense",
                    Call::Task(_) | Call::Make(_) | Call::Sized(_) => return None,
                };
                ("GET", format!("/api/v1/{path}{query}"), None)
            }
        })
    }

    /// The head of a request, up to the length of its body.
    fn head(self, method: &str, path: &str, ask: &Ask) -> String {
        let mut head = format!("{method} {path} HTTP/1.1\r\nhost: {}\r\n", ask.host);
        for (name, value) in [("authorization", ask.by), ("origin", ask.origin), ("x-request-id", ask.request_id)] {
            head += &value.map(|v| format!("{name}: {v}\r\n")).unwrap_or_default();
        }
        if matches!(self, Door::WebSocket | Door::RpcSocket) {
            head +=
                "connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n";
        }
        head
    }

    /// Asks, if this door can be asked that.
    pub async fn ask(self, hub: &Hub, ask: &Ask<'_>) -> Option<Told> {
        let (method, path, body) = self.line(ask.call)?;
        if self == Door::RpcSocket {
            return Some(self.say(hub, &format!("{}\r\n", self.head("GET", &path, ask)), body.unwrap_or_default()).await);
        }
        let mut request = self.head(method, &path, ask);
        if let Some(body) = &body {
            request += &format!("content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}", body.len());
        } else {
            request += "\r\n";
        }
        let (answer, _) = exchange(hub, self.is_socket(), &request).await;
        Some(self.told(answer))
    }

    /// Opens a WebSocket and says one thing; gives the first answer, be it to the opening.
    async fn say(self, hub: &Hub, opening: &str, text: String) -> Told {
        let (mut answer, io) = exchange(hub, false, opening).await;
        if answer.status != 101 {
            return self.told(answer);
        }
        let mut socket = WebSocketStream::from_raw_socket(io, Role::Client, None).await;
        let heard = soon("an answer to a message", async {
            // The hub may have closed it before all was said.
            let _ = socket.send(Message::text(text)).await;
            loop {
                match socket.next().await.expect("an answer, or a reason").expect("the socket is not cut") {
                    Message::Ping(_) => {}
                    other => return other,
                }
            }
        });
        match heard.await {
            Message::Text(text) => {
                answer.body = text.to_string();
                self.told(answer)
            }
            Message::Close(Some(frame)) => Told { answer, number: Some(u16::from(frame.code).into()), ..Told::default() },
            other => panic!("{other:?}"),
        }
    }

    pub fn told(self, answer: Answer) -> Told {
        let v = answer.json();
        let is_problem = answer.header("content-type") == Some("application/problem+json");
        let (problem, made) = match self {
            _ if is_problem => (&v, &Value::Null),
            Door::Rpc | Door::RpcSocket => (&v["error"]["data"], &v["result"]["id"]),
            Door::Mcp => (&v["result"]["_meta"]["cortexmesh/problem"], &v["result"]["structuredContent"]["id"]),
            _ => (&Value::Null, &v["id"]),
        };
        let (problem, made) = (problem.clone(), made.as_str().map(str::to_owned));
        Told { answer, problem, number: v["error"]["code"].as_i64(), made }
    }

    /// Begins to make a session of this name and says only so much of the body; None where there is no body.
    pub async fn begin(self, hub: &Hub, by: &str, name: &str) -> Option<Io> {
        use tokio::io::AsyncWriteExt;
        let ask = Ask::of(Call::Make(name), Some(by));
        let (method, path, body) = self.line(ask.call)?;
        let body = body.filter(|_| self != Door::RpcSocket)?;
        let head = self.head(method, &path, &ask);
        let begun = format!("{head}content-type: application/json\r\ncontent-length: {}\r\n\r\n{}", body.len(), &body[..body.len() / 2]);
        let mut io = wire::connect(hub, self.is_socket()).await;
        io.write_all(begun.as_bytes()).await.expect("the beginning is taken");
        Some(io)
    }

    /// Half a head, and nothing more.
    pub async fn knock(self, hub: &Hub) -> Io {
        use tokio::io::AsyncWriteExt;
        let (method, path, _) = self.line(Call::Read).expect("every door can be read");
        let mut io = wire::connect(hub, self.is_socket()).await;
        let half = format!("{method} {path} HTTP/1.1\r\nhost: localhost\r\nx-half: ");
        io.write_all(half.as_bytes()).await.expect("the beginning is taken");
        io
    }

    /// Opens the door's stream as this bearer, if it has one: of sessions, or of the task's output for REST itself.
    pub async fn listen(self, hub: &Hub, bearer: &str, task: &str) -> Option<Ear> {
        let by = format!("Bearer {bearer}");
        let ask = Ask::of(Call::Read, Some(&by));
        if matches!(self, Door::WebSocket | Door::RpcSocket) {
            let path = if self == Door::WebSocket { "/api/v1/ws?topics=sessions" } else { "/rpc/ws" };
            let mut request = format!("ws://{}{path}", hub.address()).into_client_request().expect("a request");
            request.headers_mut().insert("authorization", HeaderValue::try_from(by).expect("a header"));
            let tcp = TcpStream::connect(hub.address()).await.expect("the hub takes the connection");
            let (mut socket, _) = tokio_tungstenite::client_async(request, tcp).await.expect("a websocket");
            if self == Door::RpcSocket {
                let subscribe = json!({"jsonrpc": "2.0", "id": 1, "method": "event.subscribe", "params": {"topics": ["sessions"]}});
                socket.send(Message::text(subscribe.to_string())).await.expect("the hub hears");
                let said = soon("a subscription", socket.next()).await.expect("an answer").expect("an answer");
                assert!(said.to_text().expect("text").contains("subscription_id"), "{said}");
            }
            return Some(Ear::Socket(Box::new(socket)));
        }
        let path = match self {
            Door::Rest => format!("/api/v1/tasks/{task}/output"),
            Door::Socket | Door::Events => "/api/v1/events?topics=sessions".into(),
            _ => return None,
        };
        let request = format!("{}accept: text/event-stream\r\n\r\n", self.head("GET", &path, &ask));
        let (answer, io) = exchange(hub, self.is_socket(), &request).await;
        assert!(answer.status == 200 && answer.is_open(), "{self:?}: {answer:?}");
        Some(Ear::Stream { io, text: String::new() })
    }
}

/// An open stream.
pub enum Ear {
    Stream { io: Io, text: String },
    Socket(Box<WebSocketStream<TcpStream>>),
}

/// What a stream said.
#[derive(Debug, PartialEq)]
pub enum Heard {
    Event(Value),
    /// In the door's own word.
    End(String),
}

impl Ear {
    pub async fn next(&mut self) -> Heard {
        soon("a word of a stream", async {
            match self {
                Ear::Stream { io, text } => loop {
                    while let Some(at) = text.find("\n\n") {
                        let block: String = text.drain(..at + 2).collect();
                        let field = |name: &str| block.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(": "));
                        let Some(data) = field("data") else { continue };
                        let data: Value = serde_json::from_str(data).expect("JSON");
                        if !["end", "denied", "stopping"].contains(&field("event").unwrap_or_default()) {
                            return Heard::Event(data);
                        }
                        assert_eq!(chunk(io).await, Ok(None), "a body that says its end comes to it");
                        return Heard::End(data["code"].as_str().expect("a code").to_owned());
                    }
                    let more = chunk(io).await.expect("the stream is not cut").expect("a stream says why it ends");
                    text.push_str(&String::from_utf8_lossy(&more));
                },
                Ear::Socket(socket) => loop {
                    match socket.next().await.expect("a close frame comes first").expect("the socket is not cut") {
                        Message::Text(text) => {
                            let said: Value = serde_json::from_str(&text).expect("JSON");
                            let notified = said["method"] == "event.notify";
                            return Heard::Event(if notified { said["params"]["event"].clone() } else { said });
                        }
                        Message::Close(Some(frame)) => return Heard::End(u16::from(frame.code).to_string()),
                        Message::Ping(_) => {}
                        other => panic!("{other:?}"),
                    }
                },
            }
        })
        .await
    }

    /// Reads on until the end; gives its word.
    pub async fn end(&mut self) -> String {
        loop {
            if let Heard::End(word) = self.next().await {
                return word;
            }
        }
    }
}

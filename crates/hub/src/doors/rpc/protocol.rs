//! JSON-RPC 2.0 as such: what a message asks, and the message that answers it. It knows no method and no door.

use mesh_wire::rest::Problem;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::value::RawValue;
use serde_json::{Map, Value};
use std::borrow::Cow;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Calls of one batch. They run side by side, like the streams of one HTTP/2 connection.
pub const MAX_BATCH: usize = 100;
/// Bytes of results after which a batch takes no more of them.
pub const MAX_RESULTS: usize = 16 << 20;

pub const PARSE_ERROR: i32 = -32700;
pub const INVALID_REQUEST: i32 = -32600;
pub const METHOD_NOT_FOUND: i32 = -32601;
pub const INVALID_PARAMS: i32 = -32602;
pub const INTERNAL_ERROR: i32 = -32603;

/// The error object of an answer.
#[derive(Debug, Clone, Serialize)]
pub struct Failure {
    pub code: i32,
    pub message: Cow<'static, str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data: Option<Box<Problem>>,
}

impl Failure {
    pub fn new(code: i32, message: impl Into<Cow<'static, str>>) -> Self {
        Self { code, message: message.into(), data: None }
    }
    pub fn invalid_request() -> Self {
        Self::new(INVALID_REQUEST, "Invalid Request")
    }
    pub fn method_not_found() -> Self {
        Self::new(METHOD_NOT_FOUND, "Method not found")
    }
}

/// What a call gives: the JSON of its result.
pub type Outcome = Result<Box<RawValue>, Failure>;

/// An id as it came: it is given back to the letter.
pub type Id = Box<RawValue>;

#[derive(Debug)]
pub struct Call {
    /// None: a notification, which nobody answers.
    pub id: Option<Id>,
    pub method: String,
    params: Option<Box<RawValue>>,
    /// Judged before it runs.
    refused: Option<Failure>,
}

/// What cannot be a call, and the id that it is answered with.
#[derive(Debug)]
pub struct Broken {
    pub id: Option<Id>,
    pub failure: Failure,
}

pub type Item = Result<Call, Broken>;

/// Whatever it is, this is the answer to it.
pub fn refuse(item: &mut Item, failure: Failure) {
    match item {
        Ok(call) => call.refused = Some(failure),
        Err(broken) => broken.failure = failure,
    }
}

#[derive(Debug)]
pub enum Message {
    One(Item),
    Batch(Vec<Item>),
}

impl Message {
    pub fn items(&self) -> &[Item] {
        match self {
            Self::One(item) => std::slice::from_ref(item),
            Self::Batch(items) => items,
        }
    }
    pub fn items_mut(&mut self) -> &mut [Item] {
        match self {
            Self::One(item) => std::slice::from_mut(item),
            Self::Batch(items) => items,
        }
    }
    /// Without answer, whatever becomes of it.
    pub fn is_silent(&self) -> bool {
        self.items().iter().all(|item| item.as_ref().is_ok_and(|call| call.id.is_none()))
    }
}

/// The members of a request. One that is named twice is refused, one that is not known is passed over.
#[derive(Deserialize)]
struct Members<'m> {
    #[serde(borrow, default, deserialize_with = "there")]
    jsonrpc: Option<&'m RawValue>,
    #[serde(borrow, default, deserialize_with = "there")]
    method: Option<&'m RawValue>,
    #[serde(borrow, default, deserialize_with = "there")]
    params: Option<&'m RawValue>,
    #[serde(borrow, default, deserialize_with = "there")]
    id: Option<&'m RawValue>,
}

/// A member that is null is there all the same.
fn there<'de: 'm, 'm, D: Deserializer<'de>>(d: D) -> Result<Option<&'m RawValue>, D::Error> {
    <&'m RawValue>::deserialize(d).map(Some)
}

/// Reads a message. What is no JSON at all has no items.
pub fn read(bytes: &[u8]) -> Result<Message, Failure> {
    let no_json = |_| Failure::new(PARSE_ERROR, "Parse error");
    let text = std::str::from_utf8(bytes).map_err(|_| Failure::new(PARSE_ERROR, "Parse error"))?;
    let whole: &RawValue = serde_json::from_str(text).map_err(no_json)?;
    if !whole.get().starts_with('[') {
        return Ok(Message::One(item(whole)));
    }
    let all: Vec<&RawValue> = serde_json::from_str(whole.get()).map_err(no_json)?;
    if !(1..=MAX_BATCH).contains(&all.len()) {
        return Ok(Message::One(Err(Broken { id: None, failure: Failure::invalid_request() })));
    }
    Ok(Message::Batch(all.into_iter().map(item).collect()))
}

fn item(raw: &RawValue) -> Item {
    let broken = |id: Option<Id>| Broken { id, failure: Failure::invalid_request() };
    // A list of members would do as well otherwise.
    if !raw.get().starts_with('{') {
        return Err(broken(None));
    }
    let members: Members = serde_json::from_str(raw.get()).map_err(|_| broken(None))?;
    let id = match members.id {
        None => None,
        Some(id) if is_id(id) => Some(id.to_owned()),
        Some(_) => return Err(broken(None)),
    };
    let text = |raw: Option<&RawValue>| raw.and_then(|raw| serde_json::from_str::<String>(raw.get()).ok());
    let structured = members.params.is_none_or(|p| p.get().starts_with(['[', '{']));
    match text(members.method) {
        Some(method) if structured && text(members.jsonrpc).as_deref() == Some("2.0") => {
            Ok(Call { id, method, params: members.params.map(ToOwned::to_owned), refused: None })
        }
        _ => Err(broken(id)),
    }
}

/// A string, a number or null. `RawValue` has checked that a number is one.
fn is_id(raw: &RawValue) -> bool {
    match raw.get().as_bytes()[0] {
        b'"' => serde_json::from_str::<Cow<'_, str>>(raw.get()).is_ok(),
        b'-' | b'0'..=b'9' => true,
        _ => raw.get() == "null",
    }
}

impl Call {
    /// The parameters by name. Those that came by position have the names at those places; what is null
    /// there was left out.
    pub fn params(&self, names: &[&str]) -> Result<Map<String, Value>, String> {
        let Some(raw) = &self.params else { return Ok(Map::new()) };
        let values: Value = serde_json::from_str(raw.get()).map_err(|e| e.to_string())?;
        match values {
            Value::Object(by_name) => match by_name.keys().find(|k| !names.contains(&k.as_str())) {
                Some(unknown) => Err(format!("there is no parameter {unknown:?}; there is {}", listed(names))),
                None => Ok(by_name),
            },
            Value::Array(values) if values.len() > names.len() => {
                Err(format!("{} parameters are too many; there is {}", values.len(), listed(names)))
            }
            Value::Array(values) => {
                let named = names.iter().map(|n| (*n).to_owned()).zip(values);
                Ok(named.filter(|(_, v)| !v.is_null()).collect())
            }
            _ => Err("params is an object or an array".into()),
        }
    }
}

fn listed(names: &[&str]) -> String {
    if names.is_empty() { "none".into() } else { names.join(", ") }
}

#[derive(Serialize)]
struct Answer {
    jsonrpc: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    result: Option<Box<RawValue>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<Failure>,
    /// null where none could be read.
    id: Option<Id>,
}

impl Answer {
    fn new(id: Option<Id>, outcome: Outcome) -> Self {
        let (result, error) = match outcome {
            Ok(result) => (Some(result), None),
            Err(failure) => (None, Some(failure)),
        };
        Self { jsonrpc: "2.0", result, error, id }
    }
}

/// The message for what has no call that it could answer.
pub fn refusal(failure: Failure) -> String {
    said(&Answer::new(None, Err(failure)))
}

/// A notification of the hub's own.
pub fn notification(method: &'static str, params: &impl Serialize) -> String {
    #[derive(Serialize)]
    struct Notification<'p, P> {
        jsonrpc: &'static str,
        method: &'static str,
        params: &'p P,
    }
    said(&Notification { jsonrpc: "2.0", method, params })
}

fn said(message: &impl Serialize) -> String {
    // Shapes of ours: no key in them is not text.
    serde_json::to_string(message).unwrap_or_default()
}

/// Runs the calls of a message side by side and gives the message that answers them, in their order; none
/// when all were notifications. `full` is what a call hears whose result has no room any more.
pub async fn answer<R: Future<Output = Outcome>>(message: Message, run: impl Fn(Call) -> R, full: impl Fn() -> Failure) -> Option<String> {
    let taken = AtomicUsize::new(0);
    let one = async |item: Item| {
        let mut call = match item {
            Ok(call) => call,
            Err(Broken { id, failure }) => return Some(Answer::new(id, Err(failure))),
        };
        let id = call.id.take();
        let outcome = match call.refused.take() {
            Some(failure) => Err(failure),
            None => run(call).await,
        };
        let id = id?;
        let outcome = outcome.and_then(|result| {
            let before = taken.fetch_add(result.get().len(), Ordering::Relaxed);
            if before < MAX_RESULTS { Ok(result) } else { Err(full()) }
        });
        Some(Answer::new(Some(id), outcome))
    };
    match message {
        Message::One(item) => one(item).await.as_ref().map(said),
        Message::Batch(items) => {
            let answers: Vec<Answer> = futures::future::join_all(items.into_iter().map(one)).await.into_iter().flatten().collect();
            (!answers.is_empty()).then(|| said(&answers))
        }
    }
}

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

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// The methods of the specification's examples.
    async fn example(call: Call) -> Outcome {
        let result = match call.method.as_str() {
            "subtract" => {
                let p = call.params(&["minuend", "subtrahend"]).unwrap();
                json!(p["minuend"].as_i64().unwrap() - p["subtrahend"].as_i64().unwrap())
            }
            "sum" => {
                let p = call.params(&["a", "b", "c"]).unwrap();
                json!(p.values().map(|v| v.as_i64().unwrap()).sum::<i64>())
            }
            "get_data" => json!(["hello", 5]),
            "update" | "notify_sum" | "notify_hello" => json!(null),
            _ => return Err(Failure::method_not_found()),
        };
        Ok(serde_json::value::to_raw_value(&result).unwrap())
    }

    fn serve(text: &str) -> Option<Value> {
        serve_by(text, example)
    }
    fn serve_by<R: Future<Output = Outcome>>(text: &str, run: impl Fn(Call) -> R) -> Option<Value> {
        let said = match read(text.as_bytes()) {
            Err(failure) => Some(refusal(failure)),
            Ok(message) => futures::executor::block_on(answer(message, run, || Failure::new(-32006, "full"))),
        };
        said.map(|text| serde_json::from_str(&text).unwrap())
    }

    /// All of section 7 of the specification, in its order.
    #[test]
    fn the_examples_of_the_specification() {
        let invalid = json!({"jsonrpc": "2.0", "error": {"code": -32600, "message": "Invalid Request"}, "id": null});
        let parse = json!({"jsonrpc": "2.0", "error": {"code": -32700, "message": "Parse error"}, "id": null});
        for (sent, expected) in [
            (r#"{"jsonrpc": "2.0", "method": "subtract", "params": [42, 23], "id": 1}"#, json!({"jsonrpc": "2.0", "result": 19, "id": 1})),
            (r#"{"jsonrpc": "2.0", "method": "subtract", "params": [23, 42], "id": 2}"#, json!({"jsonrpc": "2.0", "result": -19, "id": 2})),
            (
                r#"{"jsonrpc": "2.0", "method": "subtract", "params": {"subtrahend": 23, "minuend": 42}, "id": 3}"#,
                json!({"jsonrpc": "2.0", "result": 19, "id": 3}),
            ),
            (
                r#"{"jsonrpc": "2.0", "method": "subtract", "params": {"minuend": 42, "subtrahend": 23}, "id": 4}"#,
                json!({"jsonrpc": "2.0", "result": 19, "id": 4}),
            ),
            (
                r#"{"jsonrpc": "2.0", "method": "foobar", "id": "1"}"#,
                json!({"jsonrpc": "2.0", "error": {"code": -32601, "message": "Method not found"}, "id": "1"}),
            ),
            (r#"{"jsonrpc": "2.0", "method": "foobar, "params": "bar", "baz]"#, parse.clone()),
            (r#"{"jsonrpc": "2.0", "method": 1, "params": "bar"}"#, invalid.clone()),
            (r#"[{"jsonrpc": "2.0", "method": "sum", "params": [1,2,4], "id": "1"}, {"jsonrpc": "2.0", "method"]"#, parse),
            ("[]", invalid.clone()),
            ("[1]", json!([invalid])),
            ("[1,2,3]", json!([invalid, invalid, invalid])),
            (
                r#"[{"jsonrpc": "2.0", "method": "sum", "params": [1,2,4], "id": "1"},
                    {"jsonrpc": "2.0", "method": "notify_hello", "params": [7]},
                    {"jsonrpc": "2.0", "method": "subtract", "params": [42,23], "id": "2"},
                    {"foo": "boo"},
                    {"jsonrpc": "2.0", "method": "foo.get", "params": {"name": "myself"}, "id": "5"},
                    {"jsonrpc": "2.0", "method": "get_data", "id": "9"}]"#,
                json!([
                    {"jsonrpc": "2.0", "result": 7, "id": "1"},
                    {"jsonrpc": "2.0", "result": 19, "id": "2"},
                    invalid,
                    {"jsonrpc": "2.0", "error": {"code": -32601, "message": "Method not found"}, "id": "5"},
                    {"jsonrpc": "2.0", "result": ["hello", 5], "id": "9"}
                ]),
            ),
        ] {
            assert_eq!(serve(sent), Some(expected), "{sent}");
        }
        for silent in [
            r#"{"jsonrpc": "2.0", "method": "update", "params": [1,2,3,4,5]}"#,
            r#"{"jsonrpc": "2.0", "method": "foobar"}"#,
            r#"[{"jsonrpc": "2.0", "method": "notify_sum", "params": [1,2,4]}, {"jsonrpc": "2.0", "method": "notify_hello", "params": [7]}]"#,
        ] {
            assert_eq!(serve(silent), None, "{silent}");
            assert!(read(silent.as_bytes()).unwrap().is_silent(), "{silent}");
        }
    }

    #[test]
    fn ids_come_back_to_the_letter() {
        for id in ["1", "-7", "0", "1.5", "1e3", "123456789012345678901234567890", "\"\"", "\"a\\u00e4\"", "null"] {
            let sent = format!("{{\"jsonrpc\":\"2.0\",\"method\":\"get_data\",\"id\":{id}}}");
            let message = read(sent.as_bytes()).unwrap();
            assert!(!message.is_silent(), "{id}");
            let said = futures::executor::block_on(answer(message, example, Failure::method_not_found)).unwrap();
            assert_eq!(said, format!("{{\"jsonrpc\":\"2.0\",\"result\":[\"hello\",5],\"id\":{id}}}"));
        }
        for id in ["true", "[]", "{}", "[1]", "\"\\ud800\""] {
            let sent = format!("{{\"jsonrpc\":\"2.0\",\"method\":\"get_data\",\"id\":{id}}}");
            let said = serve(&sent).unwrap();
            assert_eq!((&said["error"]["code"], &said["id"]), (&json!(INVALID_REQUEST), &json!(null)), "{id}");
        }
        // Each is answered, though they have the same.
        let twice = r#"[{"jsonrpc":"2.0","method":"sum","params":[1],"id":1},{"jsonrpc":"2.0","method":"sum","params":[2],"id":1}]"#;
        let said = serve(twice).unwrap();
        assert_eq!((said.as_array().unwrap().len(), &said[0]["result"], &said[1]["result"]), (2, &json!(1), &json!(2)));
    }

    #[test]
    fn what_is_no_request() {
        let with = |members: &str| format!("{{{members}}}");
        for (sent, id) in [
            (with(r#""method":"sum","id":1"#), json!(1)),
            (with(r#""jsonrpc":"1.0","method":"sum","id":1"#), json!(1)),
            (with(r#""jsonrpc":2.0,"method":"sum","id":1"#), json!(1)),
            (with(r#""jsonrpc":"2.0","id":"x""#), json!("x")),
            (with(r#""jsonrpc":"2.0","method":null,"id":1"#), json!(1)),
            (with(r#""jsonrpc":"2.0","method":"sum","params":null,"id":1"#), json!(1)),
            (with(r#""jsonrpc":"2.0","method":"sum","params":7,"id":1"#), json!(1)),
            (with(r#""jsonrpc":"2.0","method":"sum","params":"x""#), json!(null)),
            (with(r#""jsonrpc":"2.0","method":"sum","method":"update","id":1"#), json!(null)),
            (r#"["2.0","sum",[],1]"#.to_owned(), json!(null)),
            ("1".to_owned(), json!(null)),
            ("\"sum\"".to_owned(), json!(null)),
            ("null".to_owned(), json!(null)),
        ] {
            let said = serve(&sent).unwrap();
            let said = said.get(0).unwrap_or(&said);
            assert_eq!((&said["error"]["code"], &said["id"]), (&json!(INVALID_REQUEST), &id), "{sent}");
        }
        for no_json in [&b""[..], b"  ", b"{", b"{}{}", b"[1,]", b"\xff", b"{\"jsonrpc\":\"2.0\",\"method\":\"\xc3\x28\",\"id\":1}"] {
            assert_eq!(read(no_json).unwrap_err().code, PARSE_ERROR, "{no_json:?}");
        }
        let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
        assert_eq!(serve(&deep).unwrap()[0]["error"]["code"], INVALID_REQUEST, "a batch in a batch");
        // What the specification does not name is passed over.
        assert_eq!(serve(&with(r#""jsonrpc":"2.0","method":"sum","id":1,"meta":{"x":1}"#)).unwrap()["result"], 0);
        assert_eq!(serve(" \n [ {\"jsonrpc\":\"2.0\",\"method\":\"sum\",\"id\":1} ] ").unwrap()[0]["result"], 0);
    }

    #[test]
    fn a_batch_has_an_end() {
        let batch = |n: usize| {
            let one = r#"{"jsonrpc":"2.0","method":"sum","id":1}"#;
            format!("[{}]", vec![one; n].join(","))
        };
        assert_eq!(serve(&batch(MAX_BATCH)).unwrap().as_array().unwrap().len(), MAX_BATCH);
        let more = serve(&batch(MAX_BATCH + 1)).unwrap();
        assert_eq!((&more["error"]["code"], &more["id"]), (&json!(INVALID_REQUEST), &json!(null)));
        let nested = serve(&format!("[{}]", batch(2))).unwrap();
        assert_eq!(
            (nested.as_array().unwrap().len(), &nested[0]["error"]["code"]),
            (1, &json!(INVALID_REQUEST)),
            "a batch in a batch is none"
        );

        // Results have an end too; what comes behind it hears so.
        let large = async |_: Call| Ok(serde_json::value::to_raw_value(&"x".repeat(MAX_RESULTS / 4)).unwrap());
        let said = serve_by(&batch(10), large).unwrap();
        let full = said.as_array().unwrap().iter().filter(|a| a["error"]["code"] == -32006).count();
        assert_eq!((full, said[0]["error"].is_null(), said[9]["error"]["code"].as_i64()), (6, true, Some(-32006)));
    }

    #[test]
    fn the_calls_of_a_batch_run_side_by_side() {
        let gate = tokio::sync::Barrier::new(3);
        let met = async |_: Call| {
            gate.wait().await;
            Ok(serde_json::value::to_raw_value(&1).unwrap())
        };
        let one = r#"{"jsonrpc":"2.0","method":"x","id":1}"#;
        // The first would wait for ever for those behind it.
        assert_eq!(serve_by(&format!("[{one},{one},{one}]"), met).unwrap().as_array().unwrap().len(), 3);
    }

    #[test]
    fn parameters_find_their_names() {
        let params = |given: &str, names: &[&str]| {
            let sent = format!("{{\"jsonrpc\":\"2.0\",\"method\":\"x\",\"params\":{given}}}");
            let Message::One(Ok(call)) = read(sent.as_bytes()).unwrap() else { panic!("{sent}") };
            call.params(names).map(Value::Object)
        };
        assert_eq!(params("[1, null, 3]", &["a", "b", "c"]), Ok(json!({"a": 1, "c": 3})));
        assert_eq!(params("[]", &["a"]), Ok(json!({})));
        assert_eq!(params("{}", &[]), Ok(json!({})));
        assert_eq!(params(r#"{"b": [1]}"#, &["a", "b"]), Ok(json!({"b": [1]})));
        assert!(params("[1, 2]", &["a"]).is_err_and(|e| e.contains("too many") && e.contains('a')));
        assert!(params(r#"{"x": 1}"#, &["a"]).is_err_and(|e| e.contains("\"x\"")));
        assert!(params("[1]", &[]).is_err_and(|e| e.contains("none")));
        let deep = format!("[{}{}]", "[".repeat(100_000), "]".repeat(100_000));
        assert!(params(&deep, &["a"]).is_err(), "deeper than anything that is asked for");
    }
}

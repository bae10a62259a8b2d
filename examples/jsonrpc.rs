//! A client of the hub's JSON-RPC door, in as few words as it takes.
//!
//! ```text
//! CORTEX_URL=http://127.0.0.1:8080 CORTEX_API_KEY=cmk_… cargo run -p cortex --example jsonrpc
//! ```
#![expect(clippy::disallowed_methods, reason = "a program of its own reads its own settings")]

use reqwest::StatusCode;
use serde_json::{Value, json};
use std::error::Error;
use std::sync::atomic::{AtomicU64, Ordering};

struct Client {
    url: String,
    key: String,
    web: reqwest::Client,
    id: AtomicU64,
}

impl Client {
    fn from_env() -> Result<Self, Box<dyn Error>> {
        let setting = |name: &str| std::env::var(name).map_err(|_| format!("set {name}"));
        let (url, key) = (setting("CORTEX_URL")?, setting("CORTEX_API_KEY")?);
        Ok(Self { url: format!("{}/rpc", url.trim_end_matches('/')), key, web: reqwest::Client::new(), id: AtomicU64::new(1) })
    }

    /// One call. Parameters are an object (by name) or an array (by position).
    async fn call(&self, method: &str, params: Value) -> Result<Value, Box<dyn Error>> {
        let id = self.id.fetch_add(1, Ordering::Relaxed);
        let message = json!({"jsonrpc": "2.0", "method": method, "params": params, "id": id});
        let answer = self.send(&message).await?;
        if answer["id"] != id {
            return Err(format!("{method}: the answer is to {}, and not to {id}", answer["id"]).into());
        }
        result(method, answer)
    }

    /// Several calls in one message, side by side; their results in the order of the calls.
    async fn batch(&self, calls: &[(&str, Value)]) -> Result<Vec<Value>, Box<dyn Error>> {
        let message =
            calls.iter().enumerate().map(|(n, (method, params))| json!({"jsonrpc": "2.0", "method": method, "params": params, "id": n}));
        let mut answers = self.send(&message.collect()).await?;
        let of = |n: usize| answers.as_array_mut().and_then(|all| all.iter_mut().find(|a| a["id"] == n)).map(Value::take);
        let answers: Vec<Option<Value>> = (0..calls.len()).map(of).collect();
        calls.iter().zip(answers).map(|((method, _), answer)| result(method, answer.unwrap_or_default())).collect()
    }

    async fn send(&self, message: &Value) -> Result<Value, Box<dyn Error>> {
        let answer = self.web.post(&self.url).bearer_auth(&self.key).json(message).send().await?;
        match answer.status() {
            // 401 has an answer in it as well.
            StatusCode::OK | StatusCode::UNAUTHORIZED => Ok(answer.json().await?),
            status => Err(format!("{}: {status} {}", self.url, answer.text().await?).into()),
        }
    }
}

/// What a call gave: its result, or an error with the number and the hub's own words.
fn result(method: &str, mut answer: Value) -> Result<Value, Box<dyn Error>> {
    match answer.get("error") {
        None => Ok(answer["result"].take()),
        Some(e) => Err(format!("{method}: {} {}", e["code"], e["message"].as_str().unwrap_or("")).into()),
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let hub = Client::from_env()?;

    let health = hub.call("system.health", json!({})).await?;
    println!("system.health: {} for {} s", health["status"].as_str().unwrap_or("?"), health["uptime_secs"]);

    let state = hub.call("state.query", json!({})).await?;
    println!("state.query: {}", state["state"]);

    let lists = hub.batch(&[("node.list", json!({"limit": 5})), ("task.list", json!([5])), ("session.list", json!([5]))]).await?;
    for (what, page) in ["nodes", "tasks", "sessions"].iter().zip(&lists) {
        println!("{what}: {}", page["items"].as_array().map_or(0, Vec::len));
    }

    let agent = hub.call("agent.spawn", json!({"name": "example", "agent_type": "basic", "config": {"greeting": "hello"}})).await?;
    let id = &agent["agent_id"];
    let logs = hub.call("agent.logs", json!({"agent_id": id, "limit": 10})).await?;
    println!("agent.logs: {}", logs["logs"][0]["line"].as_str().unwrap_or("?"));
    let killed = hub.call("agent.kill", json!([id])).await?;
    println!("agent.kill: {}", killed["status"].as_str().unwrap_or("?"));

    let described = hub.call("rpc.discover", json!({})).await?;
    let names = described["methods"].as_array().into_iter().flatten().filter_map(|m| m["name"].as_str());
    println!("methods: {}", names.collect::<Vec<_>>().join(", "));
    Ok(())
}

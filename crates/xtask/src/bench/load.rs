//! A lean HTTP client: connections that are kept, one request at a time on each, every answer checked.

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::StatusCode;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use mesh_process::Tasks;
use serde::Deserialize;
use serde::de::IgnoredAny;
use std::cell::{Cell, RefCell};
use std::time::Instant;
use tokio::net::TcpStream;

/// Where and as whom tasks are dispatched.
pub struct Door {
    /// `host:port`
    pub address: String,
    pub token: String,
    pub connections: Tasks,
}

/// What came of a number of tasks.
pub struct Run {
    pub times_ms: Vec<f64>,
    pub secs: f64,
}

impl Run {
    pub fn per_s(&self) -> f64 {
        self.times_ms.len() as f64 / self.secs
    }
}

/// The part of a task that says how it ended.
#[derive(Deserialize)]
struct Answer {
    state: String,
    exit_code: Option<i32>,
}

/// The part of an answer of JSON-RPC that says whether it is a result.
#[derive(Deserialize)]
struct Called {
    result: Option<IgnoredAny>,
}

impl Door {
    async fn connect(&self) -> Result<SendRequest<Full<Bytes>>> {
        let stream = TcpStream::connect(&self.address).await.with_context(|| format!("connect to {}", self.address))?;
        stream.set_nodelay(true)?;
        let (sender, connection) = handshake(TokioIo::new(stream)).await?;
        self.connections.spawn_until_cancelled("connection", async move {
            // What breaks it, the request that was under way reports.
            let _ = connection.await;
        });
        Ok(sender)
    }

    async fn post(&self, sender: &mut SendRequest<Full<Bytes>>, path: &str, body: &Bytes) -> Result<(StatusCode, Bytes)> {
        let request = hyper::Request::post(path)
            .header("host", &self.address)
            .header("authorization", format!("Bearer {}", self.token))
            .header("content-type", "application/json")
            .body(Full::new(body.clone()))?;
        sender.ready().await?;
        let response = sender.send_request(request).await?;
        let status = response.status();
        Ok((status, response.into_body().collect().await?.to_bytes()))
    }

    async fn dispatch(&self, sender: &mut SendRequest<Full<Bytes>>, body: &Bytes) -> Result<()> {
        let (status, text) = self.post(sender, "/api/v1/dispatch", body).await?;
        let answer: Option<Answer> = serde_json::from_slice(&text).ok();
        match answer {
            // A skill that starts no process has no exit code.
            Some(a) if status == 200 && a.state == "succeeded" && a.exit_code.unwrap_or(0) == 0 => Ok(()),
            _ => bail!("a task did not succeed: {status} {}", String::from_utf8_lossy(&text)),
        }
    }

    /// Runs `count` tasks, `at_once` in flight; the first that does not succeed ends it.
    pub async fn run(&self, body: &serde_json::Value, count: usize, at_once: usize) -> Result<Run> {
        self.run_while(body, at_once, |begun| begun < count).await
    }

    /// Makes `count` calls of JSON-RPC, `at_once` in flight; the first that gives no result ends it.
    pub async fn calls(&self, path: &str, body: &serde_json::Value, count: usize, at_once: usize) -> Result<Run> {
        let body = Bytes::from(serde_json::to_vec(body)?);
        let ask = async |sender: &mut SendRequest<Full<Bytes>>| {
            let (status, text) = self.post(sender, path, &body).await?;
            let answer: Option<Called> = serde_json::from_slice(&text).ok();
            match answer {
                Some(Called { result: Some(_) }) if status == 200 => Ok(()),
                _ => bail!("a call gave no result: {status} {}", String::from_utf8_lossy(&text)),
            }
        };
        self.each(at_once, |begun| begun < count, ask).await
    }

    /// Runs tasks, `at_once` in flight, while `more` says so of the number that were begun.
    pub async fn run_while(&self, body: &serde_json::Value, at_once: usize, more: impl Fn(usize) -> bool) -> Result<Run> {
        let body = Bytes::from(serde_json::to_vec(body)?);
        self.each(at_once, more, async |sender: &mut SendRequest<Full<Bytes>>| self.dispatch(sender, &body).await).await
    }

    async fn each(
        &self,
        at_once: usize,
        more: impl Fn(usize) -> bool,
        ask: impl AsyncFn(&mut SendRequest<Full<Bytes>>) -> Result<()>,
    ) -> Result<Run> {
        let mut connections = Vec::new();
        for _ in 0..at_once {
            connections.push(self.connect().await?);
        }
        let (next, times) = (Cell::new(0), RefCell::new(vec![]));
        let begun = Instant::now();
        let work = |mut sender: SendRequest<Full<Bytes>>| {
            let (next, times, ask, more) = (&next, &times, &ask, &more);
            async move {
                while more(next.get()) {
                    next.set(next.get() + 1);
                    let at = Instant::now();
                    ask(&mut sender).await?;
                    times.borrow_mut().push(at.elapsed().as_secs_f64() * 1e3);
                }
                anyhow::Ok(())
            }
        };
        futures::future::try_join_all(connections.into_iter().map(work)).await?;
        Ok(Run { secs: begun.elapsed().as_secs_f64(), times_ms: times.into_inner() })
    }
}

//! Asks the hub that runs on this data folder, over its control socket.

use anyhow::{Result, ensure};
use axum::body::{Body, Bytes};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use std::path::Path;
use std::time::Duration;

const MAX_ANSWER: usize = 64 << 20;
const WITHIN: Duration = Duration::from_secs(30);

/// One call and the body of its answer. A refusal is an error in the hub's own words.
pub async fn ask(data_dir: &Path, method: &str, path: &str, body: Option<&Value>) -> Result<Bytes> {
    let stream = tokio::net::UnixStream::connect(data_dir.join("hub.sock")).await?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let mut request =
        hyper::Request::builder().method(method).uri(format!("/api/v1{path}")).header("host", "hub").header("connection", "close");
    if body.is_some() {
        request = request.header("content-type", "application/json");
    }
    let request = request.body(body.map_or_else(Body::empty, |b| Body::from(b.to_string())))?;
    let ask = async move {
        let answer = sender.send_request(request).await?;
        let status = answer.status();
        let body = axum::body::to_bytes(Body::new(answer.into_body()), MAX_ANSWER).await?;
        let problem = || serde_json::from_slice::<Value>(&body).ok()?["detail"].as_str().map(str::to_owned);
        ensure!(status.is_success(), "{}", problem().unwrap_or_else(|| format!("the hub answered {status}")));
        Ok(body)
    };
    let both = async { tokio::join!(ask, connection).0 };
    tokio::time::timeout(WITHIN, both).await?
}

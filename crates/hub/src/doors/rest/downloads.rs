//! The node binary of this platform, as it lies beside the hub's own.

use super::App;
use super::body::PathText;
use super::problem::{Answer, Refusal};
use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use mesh_core::Digest;
use mesh_wire::rest::{DownloadView, Downloads};
use std::path::{Path as FsPath, PathBuf};
use tokio_util::io::ReaderStream;

#[cfg(target_arch = "x86_64")]
pub const TARGET: &str = "linux-x86_64";
#[cfg(target_arch = "aarch64")]
pub const TARGET: &str = "linux-aarch64";

/// Targets that a release covers.
const TARGETS: [&str; 2] = ["linux-x86_64", "linux-aarch64"];

#[derive(Debug, Clone)]
pub struct Binary {
    pub target: &'static str,
    pub path: PathBuf,
    pub size: u64,
    pub sha256: Digest,
}

/// What this hub can hand out; read once, at start.
#[derive(Debug, Clone, Default)]
pub struct Binaries(Vec<Binary>);

impl Binaries {
    /// Looks for `cortex-node` in `dir`.
    pub fn beside(dir: &FsPath) -> Self {
        let path = dir.join("cortex-node");
        match std::fs::read(&path) {
            Ok(bytes) => Self(vec![Binary { target: TARGET, size: bytes.len() as u64, sha256: mesh_core::sha256(&bytes), path }]),
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "there is no node binary to hand out");
                Self::default()
            }
        }
    }
    pub fn of(&self, target: &str) -> Option<&Binary> {
        self.0.iter().find(|b| b.target == target)
    }
}

/// Node programs that this hub can hand out
#[utoipa::path(
    get, path = "/downloads", tag = "downloads",
    security(()),
    responses((status = 200, description = "What there is, and what is missing", body = Downloads)),
)]
pub async fn list(State(app): State<App>) -> Json<Downloads> {
    let view =
        |b: &Binary| DownloadView { target: b.target.into(), version: super::VERSION.into(), size: b.size, sha256: hex::encode(b.sha256) };
    Json(Downloads {
        items: app.binaries.0.iter().map(view).collect(),
        missing: TARGETS.iter().filter(|t| app.binaries.of(t).is_none()).map(|t| (*t).to_owned()).collect(),
    })
}

/// A node program
#[utoipa::path(
    get, path = "/downloads/{target}/cortex-node", tag = "downloads",
    security(()), params(("target" = String, Path, description = "Such as linux-x86_64")),
    responses((status = 200, description = "The program", body = Vec<u8>, content_type = "application/octet-stream", headers(("etag" = String, description = "Its SHA-256")))),
)]
pub async fn binary(State(app): State<App>, PathText(target): PathText) -> Answer<Response> {
    let b = app.binaries.of(&target).ok_or_else(|| {
        let detail = format!("this hub has no node binary for {target:?}; GET /api/v1/downloads lists what there is");
        Refusal::new(StatusCode::NOT_FOUND, "not_found", detail)
    })?;
    let gone = |e| {
        tracing::error!(path = %b.path.display(), error = %e, "the node binary cannot be read");
        Refusal::new(StatusCode::NOT_FOUND, "not_found", "the node binary is gone from the hub's folder")
    };
    let file = tokio::fs::File::open(&b.path).await.map_err(gone)?;
    let headers = [
        (header::CONTENT_TYPE, "application/octet-stream".to_owned()),
        (header::CONTENT_DISPOSITION, "attachment; filename=\"cortex-node\"".to_owned()),
        (header::ETAG, format!("\"{}\"", hex::encode(b.sha256))),
    ];
    Ok((headers, Body::from_stream(ReaderStream::new(file))).into_response())
}

//! Errors as RFC 9457 problems.

use axum::body::Body;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use hub_engine::Error;
use hub_engine::error::secs;
use mesh_wire::rest::Problem;

/// A refusal before it has its request id.
#[derive(Debug, Clone)]
pub struct Refusal {
    pub status: StatusCode,
    pub code: &'static str,
    pub detail: String,
    /// Seconds after which it may be tried again.
    pub retry_secs: Option<u64>,
}

impl Refusal {
    pub fn new(status: StatusCode, code: &'static str, detail: impl ToString) -> Self {
        Self { status, code, detail: detail.to_string(), retry_secs: None }
    }
    pub fn bad_request(code: &'static str, detail: impl ToString) -> Self {
        Self::new(StatusCode::BAD_REQUEST, code, detail)
    }
    pub fn unprocessable(code: &'static str, detail: impl ToString) -> Self {
        Self::new(StatusCode::UNPROCESSABLE_ENTITY, code, detail)
    }
    /// A field or value of a dispatch that the contract names and that is not built yet.
    pub fn not_yet(what: &str) -> Self {
        Self::unprocessable("not_yet", format!("{what} is not built yet; leave it out"))
    }
    /// The problem object, for doors that carry it in their own kind of error.
    pub fn problem(&self, request_id: &str) -> Problem {
        Problem {
            kind: "about:blank".into(),
            title: self.status.canonical_reason().unwrap_or("error").into(),
            status: self.status.as_u16(),
            detail: self.detail.clone(),
            code: self.code.into(),
            request_id: request_id.to_owned(),
        }
    }
}

impl From<Error> for Refusal {
    fn from(e: Error) -> Self {
        match e {
            Error::Unauthenticated(m) => Self::new(StatusCode::UNAUTHORIZED, "unauthenticated", m),
            Error::Forbidden(m) => Self::new(StatusCode::FORBIDDEN, "forbidden", m),
            e @ Error::NotFound(_) => Self::new(StatusCode::NOT_FOUND, "not_found", e),
            Error::Conflict { code, detail } => Self::new(StatusCode::CONFLICT, code, detail),
            Error::Invalid { code, detail } => Self::new(StatusCode::UNPROCESSABLE_ENTITY, code, detail),
            e @ Error::NotYet(_) => Self::new(StatusCode::NOT_IMPLEMENTED, "not_yet", e),
            Error::RateLimited { wait, .. } => {
                Self { retry_secs: Some(secs(wait)), ..Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limited", e) }
            }
            Error::Unavailable { code, detail } => Self::new(StatusCode::SERVICE_UNAVAILABLE, code, detail),
            Error::Store(e) if e.is_full() => {
                tracing::error!(error = %e, "there is no room to store more");
                Self::new(StatusCode::INSUFFICIENT_STORAGE, "storage_full", "the hub has no room to store this; nothing was taken")
            }
            Error::Store(e) => {
                // What failed inside is for the log; the caller gets the request id to ask with.
                tracing::error!(error = %e, "the store failed");
                Self::new(StatusCode::SERVICE_UNAVAILABLE, "store_unavailable", "the hub's store does not answer; try again")
            }
        }
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let mut response = self.status.into_response();
        response.extensions_mut().insert(self);
        response
    }
}

pub type Answer<T> = Result<T, Refusal>;

/// A refusal in an answer becomes a problem that names the request.
pub fn written(response: &mut Response, request_id: &str) {
    let status = response.status();
    let refusal = response.extensions_mut().remove::<Refusal>();
    let bare = status.is_client_error() && response.headers().get(header::CONTENT_TYPE).is_none();
    if refusal.is_none() && !bare {
        return;
    }
    let r = refusal.unwrap_or_else(|| Refusal::new(status, "refused", status.canonical_reason().unwrap_or("refused")));
    let problem = r.problem(request_id);
    let body = serde_json::to_vec(&problem).unwrap_or_default();
    *response.body_mut() = Body::from(body);
    let headers = response.headers_mut();
    headers.remove(header::CONTENT_LENGTH);
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
    hints(&r, headers);
}

/// What a client may read of a refusal without its body.
pub fn hints(r: &Refusal, headers: &mut HeaderMap) {
    if let Some(secs) = r.retry_secs {
        headers.insert(header::RETRY_AFTER, secs.into());
    }
    match r.status {
        StatusCode::UNAUTHORIZED => drop(headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"))),
        StatusCode::SERVICE_UNAVAILABLE => drop(headers.entry(header::RETRY_AFTER).or_insert(HeaderValue::from_static("1"))),
        // Somebody has to make room first.
        StatusCode::INSUFFICIENT_STORAGE => drop(headers.entry(header::RETRY_AFTER).or_insert(HeaderValue::from_static("10"))),
        // What is left of the body would be taken for the next request.
        StatusCode::REQUEST_TIMEOUT => drop(headers.insert(header::CONNECTION, HeaderValue::from_static("close"))),
        _ => {}
    }
}

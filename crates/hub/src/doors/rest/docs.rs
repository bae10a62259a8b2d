//! The description of the API and a page that shows it. All of it lies in this binary.

use super::body::PathText;
use super::openapi;
use super::problem::{Answer, Refusal};

use axum::http::{HeaderName, StatusCode, header};
use axum::response::{IntoResponse, Response};
use std::borrow::Cow;
use std::sync::{Arc, LazyLock};

/// The page loads and asks this hub alone, whatever its scripts would like.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; \
    connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

// Addresses are relative, so that the page works behind a proxy that adds a path.
const PAGE: &str = r#"<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>Cortex Mesh API</title>
<link rel="icon" href="docs/favicon-32x32.png">
<link rel="stylesheet" href="docs/swagger-ui.css">
</head>
<body>
<div id="api"></div>
<noscript>This page needs scripts; <a href="openapi.json">openapi.json</a> is what it shows.</noscript>
<script src="docs/swagger-ui-bundle.js"></script>
<script src="docs/start.js"></script>
</body>
</html>
"#;
// A validator would be a foreign host; a log-in is not kept by the page.
const START: &str = r##"SwaggerUIBundle({ url: "openapi.json", dom_id: "#api", deepLinking: true, validatorUrl: null, persistAuthorization: false });
"##;
const FILES: [&str; 3] = ["swagger-ui.css", "swagger-ui-bundle.js", "favicon-32x32.png"];

/// This description
///
/// The OpenAPI 3.1 document of all calls, as `cortex-hub openapi` prints it.
#[utoipa::path(get, path = "/openapi.json", tag = "system", security(()), responses((status = 200, description = "The document", body = serde_json::Value)))]
pub async fn openapi_json() -> impl IntoResponse {
    static TEXT: LazyLock<String> = LazyLock::new(|| openapi::document().to_string());
    ([(header::CONTENT_TYPE, "application/json")], TEXT.as_str())
}

/// The page of this description
#[utoipa::path(get, path = "/docs", tag = "system", security(()), responses((status = 200, description = "A page", body = String, content_type = "text/html")))]
pub async fn docs() -> impl IntoResponse {
    (html_headers("text/html; charset=utf-8"), PAGE)
}

fn html_headers(kind: &'static str) -> [(HeaderName, &'static str); 2] {
    [(header::CONTENT_TYPE, kind), (header::CONTENT_SECURITY_POLICY, POLICY)]
}

/// What this is, for agents
///
/// The page that agents look for first; it leads to the others.
#[utoipa::path(get, path = "/llms.txt", tag = "system", security(()), responses((status = 200, description = "A page", body = String, content_type = "text/plain")))]
pub async fn llms_txt() -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "text/plain; charset=utf-8")], include_str!("texts/llms.txt"))
}

/// How an agent works here
///
/// In two screens, in the form of a skill.
#[utoipa::path(get, path = "/docs/skill.md", tag = "system", security(()), responses((status = 200, description = "A page", body = String, content_type = "text/markdown")))]
pub async fn skill() -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "text/markdown; charset=utf-8")], include_str!("texts/skill.md"))
}

/// A file of that page
#[utoipa::path(
    get, path = "/docs/{file}", tag = "system", security(()),
    params(("file" = String, Path, description = "A name that the page uses")),
    responses(
        (status = 200, description = "The file", content((String = "text/javascript"), (String = "text/css"), (Vec<u8> = "image/png"))),
    ),
)]
pub async fn docs_file(PathText(file): PathText) -> Answer<Response> {
    if file == "start.js" {
        return Ok((html_headers("text/javascript"), START).into_response());
    }
    let absent = || Refusal::new(StatusCode::NOT_FOUND, "not_found", format!("the page has no file {file:?}"));
    let known = FILES.iter().find(|f| **f == file).ok_or_else(absent)?;
    let config = Arc::new(utoipa_swagger_ui::Config::new(["openapi.json"]));
    let found = utoipa_swagger_ui::serve(known, config).ok().flatten().ok_or_else(absent)?;
    let kind = match known.rsplit('.').next() {
        Some("css") => "text/css",
        Some("png") => "image/png",
        _ => "text/javascript",
    };
    let bytes: Cow<'static, [u8]> = found.bytes;
    Ok((html_headers(kind), [(header::CACHE_CONTROL, "public, max-age=3600")], bytes.into_owned()).into_response())
}

//! The audit log, for who may read it.

use super::App;
use super::body::{PathId, Query};
use super::page::{page, window};
use super::problem::{Answer, Refusal};
use super::who::Who;
use crate::audit;
use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use hub_engine::audit::{Export, HeadReport, Reading};
use hub_engine::records::AuditFilter;
use mesh_core::audit::{Kind, Outcome};
use mesh_core::{AuditId, SessionId, UserId};
use mesh_wire::convert::parse_rfc3339;
use mesh_wire::rest::*;
use serde::Deserialize;
use utoipa::IntoParams;

/// How long the verification of a large log may take.
const VERIFY_SECS: u64 = 600;

#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct AuditQuery {
    /// One of the nine types
    #[serde(rename = "type")]
    kind: Option<String>,
    /// Who did it
    user: Option<String>,
    session: Option<String>,
    /// The id of what it was done to
    resource: Option<String>,
    outcome: Option<String>,
    /// `rest`, `socket`, `node` or `hub`
    door: Option<String>,
    /// At this time or later
    since: Option<String>,
    /// Before this time
    until: Option<String>,
    limit: Option<u32>,
    cursor: Option<String>,
}

fn bad(e: impl ToString) -> Refusal {
    Refusal::bad_request("bad_query", e)
}

async fn list(app: App, who: Who, q: AuditQuery, user: Option<UserId>, session: Option<SessionId>) -> Answer<Json<Page<AuditEntry>>> {
    let time = |t: &Option<String>| t.as_deref().map(parse_rfc3339).transpose().map_err(bad);
    let kinds = || format!("type is one of {}", Kind::ALL.iter().map(|k| k.as_str()).collect::<Vec<_>>().join(", "));
    let filter = AuditFilter {
        kind: q.kind.as_deref().map(|t| Kind::parse(t).ok_or_else(|| bad(kinds()))).transpose()?,
        user: user.or(q.user.as_deref().map(str::parse).transpose().map_err(bad)?),
        session: session.or(q.session.as_deref().map(str::parse).transpose().map_err(bad)?),
        resource: q.resource,
        outcome: q.outcome.as_deref().map(|t| Outcome::parse(t).ok_or_else(|| bad("outcome is ok, denied or failed"))).transpose()?,
        door: q.door,
        since: time(&q.since)?,
        until: time(&q.until)?,
    };
    let filters = format!("audit {filter:?}");
    let window = window(q.limit, q.cursor.as_deref(), &filters, AuditId::from_bytes)?;
    let found = app.audit.read(who.caller(), &Reading { filter, window }).await?;
    Ok(Json(page(found, window.limit, &filters, |r| *r.id.as_bytes(), audit::entry)))
}

/// What was done
///
/// Needs `system:audit`. That it was read is itself an entry.
#[utoipa::path(get, path = "/audit", tag = "audit", params(AuditQuery), responses((status = 200, description = "A page", body = Page<AuditEntry>)))]
pub async fn all(State(app): State<App>, who: Who, Query(q): Query<AuditQuery>) -> Answer<Json<Page<AuditEntry>>> {
    list(app, who, q, None, None).await
}

/// What a user did
#[utoipa::path(get, path = "/audit/users/{id}", tag = "audit", params(AuditQuery), responses((status = 200, description = "A page", body = Page<AuditEntry>), (status = 422, description = "It stands in the path and in the query")))]
pub async fn of_user(
    State(app): State<App>,
    who: Who,
    PathId(id): PathId<UserId>,
    Query(q): Query<AuditQuery>,
) -> Answer<Json<Page<AuditEntry>>> {
    if q.user.is_some() {
        return Err(Refusal::unprocessable("bad_query", "the user stands in the path"));
    }
    list(app, who, q, Some(id), None).await
}

/// What was done in a session
#[utoipa::path(get, path = "/audit/sessions/{id}", tag = "audit", params(AuditQuery), responses((status = 200, description = "A page", body = Page<AuditEntry>), (status = 422, description = "It stands in the path and in the query")))]
pub async fn of_session(
    State(app): State<App>,
    who: Who,
    PathId(id): PathId<SessionId>,
    Query(q): Query<AuditQuery>,
) -> Answer<Json<Page<AuditEntry>>> {
    if q.session.is_some() {
        return Err(Refusal::unprocessable("bad_query", "the session stands in the path"));
    }
    list(app, who, q, None, Some(id)).await
}

/// The whole log
///
/// JSON lines: each an entry, chain by chain in their order, and a last one with a checkpoint that is signed
/// over all of them. `cortex-hub audit verify FILE` needs no more than that.
#[utoipa::path(
    get, path = "/audit/export", tag = "audit",
    responses((status = 200, description = "Entries as lines, then `{\"checkpoint\": …}`", body = AuditExportEnd, content_type = "application/jsonl")),
)]
pub async fn export(State(app): State<App>, who: Who) -> Answer<Response> {
    let export = app.audit.export(who.caller()).await?;
    let body = futures::stream::try_unfold(Some(export), |left| async {
        let Some(mut export) = left else { return Ok::<_, std::io::Error>(None) };
        lines(&mut export).await.map(|(bytes, more)| Some((bytes, more.then_some(export))))
    });
    let headers = [(header::CONTENT_TYPE, "application/jsonl"), (header::CONTENT_DISPOSITION, "attachment; filename=\"audit.jsonl\"")];
    Ok((headers, Body::from_stream(body)).into_response())
}

/// The next lines, and whether there are more.
async fn lines(export: &mut Export) -> std::io::Result<(Bytes, bool)> {
    let page = export.next().await.map_err(|error| {
        // The answer has begun; one that breaks off is no export.
        tracing::error!(%error, "an export of the audit log broke off");
        std::io::Error::other("the log cannot be read")
    })?;
    let mut bytes = vec![];
    let more = page.is_some();
    match page {
        Some(rows) => {
            for row in rows {
                serde_json::to_writer(&mut bytes, &audit::entry(row))?;
                bytes.push(b'\n');
            }
        }
        None => {
            serde_json::to_writer(&mut bytes, &audit::end(export.signed().as_ref()))?;
            bytes.push(b'\n');
        }
    }
    Ok((bytes.into(), more))
}

/// Is the log what was written
///
/// Reads all of it, checks each hash and each signature, and compares with the checkpoints outside the database.
#[utoipa::path(get, path = "/audit/verify", tag = "audit", responses((status = 200, description = "What was found", body = AuditVerification)))]
pub async fn verify(State(app): State<App>, who: Who) -> Answer<Json<AuditVerification>> {
    who.asked.may_wait(VERIFY_SECS);
    let report = app.audit.verify(who.caller()).await?;
    let head = |h: &HeadReport| AuditHeadView {
        chain: h.head.chain.to_string(),
        seq: h.head.seq,
        hash: hex::encode(h.head.hash),
        signed_seq: h.signed,
        first_bad_seq: h.flaw.map(|(seq, _)| seq),
        problem: h.flaw.map(|(_, flaw)| flaw.to_string()),
        restored: h.restored,
    };
    let heads = report.heads.iter().map(head).collect();
    Ok(Json(AuditVerification { ok: report.ok(), rows: report.rows, first_bad_seq: report.first_bad(), heads }))
}

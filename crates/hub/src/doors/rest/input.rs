//! Live input for a running task.

use super::App;
use super::body::{Body, PathId};
use super::problem::{Answer, Refusal};
use super::who::Who;
use axum::Json;
use axum::extract::State;
use axum::http::{HeaderName, StatusCode, header};
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::engine::general_purpose::STANDARD as B64;
use hub_engine::Error;
use hub_engine::input::Piece;
use mesh_core::TaskId;
use mesh_wire::rest::{InputReply, InputRequest};

/// Until a task that does not read is asked again.
const AGAIN: [(HeaderName, &str); 1] = [(header::RETRY_AFTER, "1")];

/// Feed a running task
///
/// A task that was dispatched with `shell.stdin_open`. The pieces come by their `seq`, from 1 for each attempt and
/// without gaps; whoever has no answer sends the piece again.
#[utoipa::path(
    post, path = "/tasks/{id}/input", tag = "tasks", operation_id = "input",
    request_body(content = InputRequest, example = json!({"seq": 1, "data_base64": "aGkK"})),
    responses(
        (status = 200, description = "The highest piece that was taken", body = InputReply),
        (status = 409, description = "`no_input`, `not_running`, `task_ended`, `input_gap`, `input_closed`"),
        (status = 422, description = "`bad_seq`, `empty_input`, `input_too_large`, `bad_base64`; `not_yet` for `resize`"),
        (status = 429, description = "`input_full`: the program does not read; send the same piece again"),
        (status = 503, description = "`node_offline`, `input_unanswered`: send the same piece again; or the hub cannot answer now"),
    ),
)]
pub async fn send(State(app): State<App>, who: Who, PathId(id): PathId<TaskId>, Body(r): Body<InputRequest>) -> Answer<Response> {
    let piece = read(r)?;
    match app.tasks.input(who.caller(), id, piece).await {
        Ok(seq) => Ok(Json(InputReply { seq }).into_response()),
        Err(Error::Conflict { code: code @ "input_full", detail }) => {
            Ok((AGAIN, Refusal::new(StatusCode::TOO_MANY_REQUESTS, code, detail)).into_response())
        }
        Err(e) => Err(e.into()),
    }
}

fn read(r: InputRequest) -> Answer<Piece> {
    if r.resize.is_some() {
        return Err(Refusal::not_yet("resize"));
    }
    let data = match r.data_base64 {
        None => vec![],
        Some(text) => B64.decode(text).map_err(|e| Refusal::unprocessable("bad_base64", format!("data_base64: {e}")))?,
    };
    Ok(Piece { seq: r.seq, data, eof: r.eof.unwrap_or(false) })
}

//! First contact over HTTPS, for whoever the gate lets reach it: `GET /v1/identity`, `POST /v1/identity/done`.
//!
//! May not live here: the token and what it proves (`agent`).

use axum::body::Bytes;
use axum::extract::rejection::{BytesRejection, QueryRejection};
use axum::extract::{DefaultBodyLimit, Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use portcullis_protocol::control::{Answer, Request as Ask};
use serde::Deserialize;

use super::changes::{ask_as, parse, unexpected};
use super::problem::Problem;
use super::server::Shared;
use crate::agent::control::Caller;

/// Most bytes of a proof: a few hex digests and an instance's id.
const MAX_BODY: usize = 4096;

pub(super) fn routes() -> Router<Shared> {
    Router::new()
        .route("/v1/identity", get(identity))
        .route("/v1/identity/done", post(done))
        .layer(DefaultBodyLimit::max(MAX_BODY))
}

#[derive(Deserialize)]
struct IdentityQuery {
    nonce: String,
}

async fn identity(
    State(shared): State<Shared>,
    query: Result<Query<IdentityQuery>, QueryRejection>,
) -> Result<Response, Problem> {
    let nonce = query.map(|Query(query)| query.nonce).unwrap_or_default();
    if !(16..=128).contains(&nonce.len()) || !nonce.bytes().all(|b| b.is_ascii_hexdigit()) {
        let detail = "?nonce= takes 16 to 128 hex digits of your choice";
        return Err(Problem::new(StatusCode::BAD_REQUEST, detail));
    }
    match ask_as(&shared, Caller::Anybody, Ask::Identity { nonce }).await? {
        Answer::Identity { identity } => Ok(Json(identity).into_response()),
        _ => Err(unexpected()),
    }
}

async fn done(
    State(shared): State<Shared>,
    body: Result<Bytes, BytesRejection>,
) -> Result<StatusCode, Problem> {
    let bytes = body.map_err(|e| Problem::new(e.status(), &e.body_text()))?;
    let contact = parse(&bytes)?;
    match ask_as(&shared, Caller::Anybody, Ask::FirstContact { contact }).await? {
        Answer::Done => Ok(StatusCode::NO_CONTENT),
        _ => Err(unexpected()),
    }
}

//! The end of first contact, for whoever the gate lets reach it: `POST /v1/identity/done`.
//!
//! May not live here: the token and what it proves (`agent`).

use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{Extension, State};
use axum::http::StatusCode;
use portcullis_protocol::control::{Answer, Request as Ask};

use super::extract::parse;
use super::problem::Problem;
use super::server::{Shared, ask, unexpected};
use crate::channel::Remote;

/// Most bytes of a proof: a few hex digests and an instance's id.
pub(super) const MAX_BODY: usize = 4096;

pub(super) async fn done(
    State(shared): State<Shared>,
    Extension(caller): Extension<Remote>,
    body: Result<Bytes, BytesRejection>,
) -> Result<StatusCode, Problem> {
    let bytes = body.map_err(|e| Problem::new(e.status(), &e.body_text()))?;
    let contact = parse(&bytes)?;
    match ask(&shared, &caller, Ask::FirstContact { contact }).await? {
        Answer::Done => Ok(StatusCode::NO_CONTENT),
        _ => Err(unexpected()),
    }
}

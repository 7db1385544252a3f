//! Errors of the endpoint as problem documents (RFC 9457): what the caller is told.
//!
//! May not live here: what the operator is told; the agent writes that into the journal.

use std::time::Duration;

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use portcullis_protocol::control::Refusal;
use serde::Serialize;

/// Most characters of `detail`: it may quote what the caller sent.
const MAX_DETAIL: usize = 2000;

/// And of what the agent is told of it.
const MAX_TOLD: usize = 200;

/// A problem document.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Problem {
    status: u16,
    title: &'static str,
    detail: String,
    /// Which refusal it is, where a status has several.
    #[serde(skip_serializing_if = "Option::is_none")]
    code: Option<Refusal>,
    /// Seconds after which asking again makes sense: the header `Retry-After`.
    #[serde(skip)]
    retry_after: Option<u64>,
}

impl Problem {
    /// A problem with words for the caller.
    pub fn new(status: StatusCode, detail: &str) -> Self {
        Self {
            status: status.as_u16(),
            title: status.canonical_reason().unwrap_or("Error"),
            detail: detail.chars().take(MAX_DETAIL).collect(),
            code: None,
            retry_after: None,
        }
    }

    /// The caller has no certificate of the control plane.
    pub fn not_the_control_plane() -> Self {
        Self::new(
            StatusCode::FORBIDDEN,
            "a client certificate of the control plane is needed",
        )
    }

    /// The caller asks too often.
    pub fn too_many_requests(wait: Duration) -> Self {
        let detail = "too many requests from this source; ask again when Retry-After says";
        Self::new(StatusCode::TOO_MANY_REQUESTS, detail).after(wait)
    }

    /// It may go better after this time.
    pub fn after(mut self, wait: Duration) -> Self {
        self.retry_after = Some(wait.as_secs() + 1);
        self
    }

    /// A change that the agent refused. What is wrong with the instance itself (files, kernel, disk) is the
    /// operator's business and stays in the journal.
    pub fn of(kind: Refusal, message: &str) -> Self {
        let (status, detail) = match kind {
            Refusal::BadInput => (StatusCode::UNPROCESSABLE_ENTITY, message),
            Refusal::NotPermitted => (StatusCode::FORBIDDEN, message),
            Refusal::NotFound => (StatusCode::NOT_FOUND, message),
            Refusal::Conflict | Refusal::Dangerous | Refusal::Superseded => (StatusCode::CONFLICT, message),
            Refusal::OtherGeneration => (StatusCode::PRECONDITION_FAILED, message),
            Refusal::StorageFull => (
                StatusCode::INSUFFICIENT_STORAGE,
                "the instance has no room on its disk to keep the change",
            ),
            Refusal::Failed => (
                StatusCode::INTERNAL_SERVER_ERROR,
                "the instance could not make the change; its journal says why",
            ),
        };
        Self {
            code: Some(kind),
            ..Self::new(status, detail)
        }
    }
}

/// Goes with a response that the endpoint refused by itself: what the caller is told, in few words.
#[derive(Clone)]
pub(super) struct RefusedHere(pub(super) String);

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let retry_after = self.retry_after;
        let refused_here = (self.code.is_none() && status.is_client_error())
            .then(|| RefusedHere(self.detail.chars().take(MAX_TOLD).collect()));
        let mut response = (status, Json(self)).into_response();
        if let Some(refused) = refused_here {
            response.extensions_mut().insert(refused);
        }
        let kind = HeaderValue::from_static("application/problem+json");
        response.headers_mut().insert(header::CONTENT_TYPE, kind);
        if let Some(seconds) = retry_after {
            response.headers_mut().insert(header::RETRY_AFTER, seconds.into());
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_with_the_instance_is_not_told() {
        let secret = "/var/lib/portcullis/spec.json: No space left on device";
        for (kind, status) in [(Refusal::Failed, 500), (Refusal::StorageFull, 507)] {
            let problem = Problem::of(kind, secret);
            assert_eq!(problem.status, status);
            assert!(!problem.detail.contains("portcullis/"), "{problem:?}");
        }
        let told = Problem::of(Refusal::Dangerous, "SSH is no longer let in");
        assert_eq!(
            (told.status, told.detail.as_str()),
            (409, "SSH is no longer let in")
        );
        let json = serde_json::to_value(&told).unwrap();
        assert_eq!(
            (json["code"].as_str(), json["title"].as_str()),
            (Some("dangerous"), Some("Conflict"))
        );
    }

    #[test]
    fn a_detail_has_an_end() {
        let problem = Problem::new(StatusCode::BAD_REQUEST, &"é".repeat(1 << 20));
        assert_eq!(problem.detail.chars().count(), MAX_DETAIL);
    }
}

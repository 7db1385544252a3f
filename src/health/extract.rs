//! What handlers take from a request: who calls, the name in its path, its conditions, its body.
//!
//! May not live here: what is done with it (`changes`, `server`), who is trusted (`identity`).

use std::time::Duration;

use axum::body::Bytes;
use axum::extract::rejection::{BytesRejection, PathRejection, QueryRejection};
use axum::extract::{FromRequest, FromRequestParts, Path, Query, Request};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderValue, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use portcullis_protocol::control::Request as Ask;
use portcullis_protocol::spec::{MAX_SPEC_BYTES, from_json};
use serde::Deserialize;
use serde::de::{DeserializeOwned, IgnoredAny};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::timeout;

use super::limits::LARGE_BODY;
use super::problem::Problem;
use super::server::Shared;
use crate::channel::Remote;
use crate::config::trial_time;

/// How long a large body waits for others to be done.
const ROOM_TIME: Duration = Duration::from_secs(10);
/// How long a body may take to arrive: the longest one at half a megabyte a second.
const BODY_TIME: Duration = Duration::from_secs(30);

/// A caller with a certificate of the control plane's authority. Stands first among a handler's arguments,
/// so that nothing is read from anybody else.
pub(super) struct ControlPlane(pub(super) Remote);

impl<S: Sync> FromRequestParts<S> for ControlPlane {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        match parts.extensions.get::<Remote>() {
            Some(remote) if !remote.chain.is_empty() => Ok(Self(remote.clone())),
            _ => Err(Problem::not_the_control_plane()),
        }
    }
}

/// The one variable part of a path, without its percent-encoding.
pub(super) struct Named(pub(super) String);

impl<S: Send + Sync> FromRequestParts<S> for Named {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let path = Path::<String>::from_request_parts(parts, state).await;
        path.map(|Path(name)| Self(name))
            .map_err(|e: PathRejection| Problem::new(e.status(), &e.body_text()))
    }
}

/// What goes with a change: `If-Match`, `?confirm=60s`, `?force=true`.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Conditions {
    /// `If-Match` was there; `*` is any generation.
    pub(super) conditional: bool,
    pub(super) if_generation: Option<u64>,
    pub(super) confirm_s: Option<u64>,
    pub(super) force: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ConditionsQuery {
    confirm: Option<String>,
    #[serde(default)]
    force: bool,
}

impl Conditions {
    pub(super) fn new(headers: &HeaderMap, query: ConditionsQuery) -> Result<Self, Problem> {
        let bad = |detail: &str| Problem::new(StatusCode::BAD_REQUEST, detail);
        let trial = query.confirm.as_deref().map(trial_time).transpose();
        let mut conditions = Self {
            confirm_s: trial
                .map_err(|reason| bad(&format!("?confirm=: {reason}")))?
                .map(|time| time.as_secs()),
            force: query.force,
            ..Self::default()
        };
        let mut tags = headers.get_all(header::IF_MATCH).iter();
        if let Some(tag) = tags.next() {
            conditions.conditional = true;
            conditions.if_generation = tag
                .to_str()
                .ok()
                .filter(|_| tags.next().is_none())
                .and_then(generation_of)
                .ok_or_else(|| bad("If-Match takes one ETag, as GET /v1/spec gives it, or *"))?;
        }
        Ok(conditions)
    }

    /// For a change that can cut nobody off.
    pub(super) fn harmless(self) -> Result<Self, Problem> {
        if self.force || self.confirm_s.is_some() {
            let detail = "?confirm and ?force are for changes that can cut somebody off";
            return Err(Problem::new(StatusCode::BAD_REQUEST, detail));
        }
        Ok(self)
    }

    pub(super) fn around(&self, request: Ask) -> Ask {
        match self.if_generation {
            Some(generation) => Ask::IfGeneration {
                generation,
                change: Box::new(request),
            },
            None => request,
        }
    }
}

/// The generation that a tag stands for (RFC 9110 section 8.8.3). `Some(None)` is any; a tag that is none of
/// ours, or a weak one, is generation 0, which no spec has; `None` is no tag.
fn generation_of(tag: &str) -> Option<Option<u64>> {
    let tag = tag.trim();
    if tag == "*" {
        return Some(None);
    }
    let (weak, quoted) = match tag.strip_prefix("W/") {
        Some(rest) => (true, rest),
        None => (false, tag),
    };
    let inner = quoted.strip_prefix('"')?.strip_suffix('"')?;
    if inner.contains('"') {
        return None;
    }
    Some(Some(inner.parse().ok().filter(|_| !weak).unwrap_or(0)))
}

impl<S: Send + Sync> FromRequestParts<S> for Conditions {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let query = Query::<ConditionsQuery>::from_request_parts(parts, state).await;
        let refuse = |e: QueryRejection| Problem::new(StatusCode::BAD_REQUEST, &e.body_text());
        let Query(query) = query.map_err(refuse)?;
        Self::new(&parts.headers, query)
    }
}

/// A body that is one JSON document of a type. If it is a large one, nobody else's has its room until this is
/// dropped.
pub(super) struct Body<T>(pub(super) T, pub(super) Option<OwnedSemaphorePermit>);

impl<T: DeserializeOwned> FromRequest<Shared> for Body<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, shared: &Shared) -> Result<Self, Problem> {
        if request
            .headers()
            .get(header::CONTENT_TYPE)
            .is_some_and(|kind| !may_be_json(kind))
        {
            let detail = "the body has to be application/json";
            return Err(Problem::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, detail));
        }
        let declared = request.headers().get(header::CONTENT_LENGTH);
        let declared = declared.and_then(|length| length.to_str().ok()?.parse::<usize>().ok());
        // Said before it is sent.
        if declared.is_some_and(|length| length > MAX_SPEC_BYTES) {
            let detail = format!("a body has at most {MAX_SPEC_BYTES} bytes");
            return Err(Problem::new(StatusCode::PAYLOAD_TOO_LARGE, &detail));
        }
        let large = declared.is_none_or(|length| length > LARGE_BODY);
        let room = match large {
            true => timeout(ROOM_TIME, shared.limits.large_body())
                .await
                .map_err(|_| {
                    let detail = "other large bodies are under way";
                    Problem::new(StatusCode::SERVICE_UNAVAILABLE, detail).after(ROOM_TIME)
                })?,
            false => None,
        };
        let bytes = timeout(BODY_TIME, Bytes::from_request(request, shared)).await;
        let bytes = bytes.map_err(|_| {
            let detail = format!("the body has to arrive within {} s", BODY_TIME.as_secs());
            Problem::new(StatusCode::REQUEST_TIMEOUT, &detail)
        })?;
        let bytes = bytes.map_err(|e: BytesRejection| Problem::new(e.status(), &e.body_text()))?;
        parse(&bytes).map(|value| Self(value, room))
    }
}

/// JSON by its name, or by curl's default, with which everybody writes it by hand.
fn may_be_json(kind: &HeaderValue) -> bool {
    let kind = kind
        .to_str()
        .unwrap_or_default()
        .split(';')
        .next()
        .unwrap_or_default();
    let kind = kind.trim().to_ascii_lowercase();
    kind == "application/json" || kind.ends_with("+json") || kind == "application/x-www-form-urlencoded"
}

pub(super) fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Problem> {
    if let Err(error) = serde_json::from_slice::<IgnoredAny>(bytes) {
        let detail = format!("the body is not one JSON document: {error}");
        return Err(Problem::new(StatusCode::BAD_REQUEST, &detail));
    }
    // A list of a type's values in their order would be read as well.
    if bytes.trim_ascii_start().first() != Some(&b'{') {
        let detail = "the body has to be a JSON object";
        return Err(Problem::new(StatusCode::UNPROCESSABLE_ENTITY, detail));
    }
    from_json(bytes).map_err(|problem| Problem::new(StatusCode::UNPROCESSABLE_ENTITY, &problem.to_string()))
}

/// What a request with these headers, this query and this body asks for, read as handlers do it.
///
/// # Errors
/// The answer that it is refused with.
pub fn read<T: DeserializeOwned>(headers: &HeaderMap, uri: &Uri, body: &[u8]) -> Result<T, Box<Response>> {
    let refuse = |e: QueryRejection| Problem::new(StatusCode::BAD_REQUEST, &e.body_text());
    let query = Query::<ConditionsQuery>::try_from_uri(uri).map_err(refuse);
    let conditions = query.and_then(|Query(query)| Conditions::new(headers, query));
    conditions
        .and_then(|_| parse(body))
        .map_err(|problem| Box::new(problem.into_response()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::health::changes::PeerBody;

    fn conditions(if_match: &[&str], query: &str) -> Result<Conditions, Problem> {
        let mut headers = HeaderMap::new();
        for tag in if_match {
            headers.append(header::IF_MATCH, tag.parse().unwrap());
        }
        let uri = format!("/x?{query}").parse().unwrap();
        let Query(query) = Query::try_from_uri(&uri).unwrap();
        Conditions::new(&headers, query)
    }

    #[test]
    fn conditions_are_read_or_refused() {
        assert_eq!(conditions(&[], "").unwrap(), Conditions::default());
        let all = conditions(&["\"7\""], "confirm=60s&force=true").unwrap();
        let expected = Conditions {
            conditional: true,
            if_generation: Some(7),
            confirm_s: Some(60),
            force: true,
        };
        assert_eq!(all, expected);
        assert!(all.harmless().is_err());
        for (tag, generation) in [("*", None), ("W/\"7\"", Some(0)), ("\"abc\"", Some(0))] {
            let read = conditions(&[tag], "").unwrap();
            assert_eq!(
                (read.conditional, read.if_generation),
                (true, generation),
                "{tag}"
            );
        }
        for tags in [&["7"][..], &["\"7\", \"8\""], &["\"7\"", "\"8\""], &["\""], &[""]] {
            assert!(conditions(tags, "").is_err(), "{tags:?}");
        }
        for query in ["confirm=4s", "confirm=soon", "confirm=25h"] {
            assert!(conditions(&[], query).is_err(), "{query}");
        }
    }

    #[test]
    fn a_body_of_another_kind_is_not_read() {
        let may = |kind| may_be_json(&HeaderValue::from_static(kind));
        assert!(
            may("application/json") && may("Application/JSON; charset=utf-8") && may("application/ld+json")
        );
        assert!(may("application/x-www-form-urlencoded"), "curl -d");
        assert!(!may("text/plain") && !may("multipart/form-data; boundary=x") && !may(""));
    }

    #[test]
    fn a_body_that_is_wrong_is_named() {
        let refused = |body: &str| {
            let problem = parse::<PeerBody>(body.as_bytes()).map(drop).unwrap_err();
            format!("{problem:?}")
        };
        assert!(parse::<PeerBody>(br#"{"addresses":["10.0.0.1"]}"#).is_ok());
        for (body, words) in [
            ("", ["400", "not one JSON"]),
            (r#"{"addresses":[]"#, ["400", "EOF"]),
            (r#"{"addresses":[]} x"#, ["400", "trailing"]),
            (r#"{"addresses":["::1"]}"#, ["422", "addresses[0]"]),
            (r#"{"addresses":[],"port":1}"#, ["422", "port"]),
            ("[]", ["422", "object"]),
            (r#"[["10.0.0.1"]]"#, ["422", "object"]),
        ] {
            let said = refused(body);
            assert!(words.iter().all(|word| said.contains(word)), "{body}: {said}");
        }
    }
}

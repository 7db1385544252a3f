//! The control plane's changes after launch: the spec, rules, peers, keys; each is durable and enforced
//! when its answer is there.
//!
//! May not live here: what a change means or whether it is made (`agent`), who is trusted (`identity`).

use std::time::Duration;

use axum::Json;
use axum::body::Bytes;
use axum::extract::rejection::{BytesRejection, PathRejection, QueryRejection};
use axum::extract::{FromRequest, FromRequestParts, Path, Query, Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderValue, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use jiff::Timestamp;
use portcullis_protocol::control::{Answer, Request as Ask};
use portcullis_protocol::spec::{MAX_SPEC_BYTES, Name, from_json};
use portcullis_protocol::{AuthorizedKey, FirewallRule, Peer, PeerAddress, Spec};
use serde::de::{DeserializeOwned, IgnoredAny};
use serde::{Deserialize, Serialize};
use tokio::sync::{OwnedSemaphorePermit, oneshot};
use tokio::time::timeout;

use super::limits::LARGE_BODY;
use super::problem::Problem;
use super::server::Shared;
use crate::channel::Remote;
use crate::config::trial_time;

/// What a handler gives.
pub(super) type Answered = Result<Response, Problem>;

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
pub(super) struct Named(String);

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
    conditional: bool,
    if_generation: Option<u64>,
    confirm_s: Option<u64>,
    force: bool,
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
    fn harmless(self) -> Result<Self, Problem> {
        if self.force || self.confirm_s.is_some() {
            let detail = "?confirm and ?force are for changes that can cut somebody off";
            return Err(Problem::new(StatusCode::BAD_REQUEST, detail));
        }
        Ok(self)
    }

    fn around(&self, request: Ask) -> Ask {
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
pub(super) struct Body<T>(T, Option<OwnedSemaphorePermit>);

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

/// Asks the agent, and waits until it is done.
pub(super) async fn ask(shared: &Shared, caller: &Remote, request: Ask) -> Result<Answer, Problem> {
    let (sender, answer) = oneshot::channel();
    let question = (request, caller.clone(), sender);
    let is_there = shared.published.borrow().agent;
    if is_there
        && shared.agent.send(question).await.is_ok()
        && let Ok(answer) = answer.await
    {
        return match answer {
            Answer::Refused { kind, message } => Err(Problem::of(kind, &message)),
            answer => Ok(answer),
        };
    }
    let detail = "the agent is not there";
    Err(Problem::new(StatusCode::SERVICE_UNAVAILABLE, detail))
}

/// The agent answered something else than was asked.
pub(super) fn unexpected() -> Problem {
    Problem::new(StatusCode::INTERNAL_SERVER_ERROR, "there was no answer")
}

fn etag(generation: u64) -> [(header::HeaderName, String); 1] {
    [(header::ETAG, format!("\"{generation}\""))]
}

/// What became of a change.
#[derive(Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(super) struct Changed {
    /// The generation that holds now.
    generation: u64,
    /// Whether anything had to be changed.
    changed: bool,
    /// Until when it has to be confirmed; null if it holds for good.
    confirm_until: Option<Timestamp>,
    /// Whether all required checks pass after it.
    ready: bool,
}

async fn change(shared: &Shared, caller: &ControlPlane, request: Ask) -> Answered {
    match ask(shared, &caller.0, request).await? {
        Answer::Applied {
            generation,
            changed,
            confirm_until,
            report,
        } => {
            let document = Changed {
                generation,
                changed,
                confirm_until,
                ready: report.ready,
            };
            Ok((etag(generation), Json(document)).into_response())
        }
        _ => Err(unexpected()),
    }
}

/// The accepted spec, or the one on trial, without its secrets.
pub(super) async fn spec(caller: ControlPlane, State(shared): State<Shared>) -> Answered {
    match ask(&shared, &caller.0, Ask::Spec).await? {
        Answer::Spec { spec: Some(spec) } => {
            let shown = spec.without_secrets();
            Ok((etag(shown.generation.get()), Json(shown)).into_response())
        }
        Answer::Spec { spec: None } => Err(Problem::new(StatusCode::NOT_FOUND, "no spec is accepted yet")),
        _ => Err(unexpected()),
    }
}

pub(super) async fn replace_spec(
    caller: ControlPlane,
    conditions: Conditions,
    State(shared): State<Shared>,
    Body(spec, _room): Body<Spec>,
) -> Answered {
    if !conditions.conditional {
        return Err(Problem::new(
            StatusCode::PRECONDITION_REQUIRED,
            "If-Match is needed: the ETag that GET /v1/spec gave, so that no other change is lost",
        ));
    }
    let spec = Box::new(spec);
    spec.check()
        .map_err(|e| Problem::new(StatusCode::UNPROCESSABLE_ENTITY, &e.to_string()))?;
    let request = Ask::Apply {
        spec,
        confirm_s: conditions.confirm_s,
        force: conditions.force,
    };
    change(&shared, &caller, conditions.around(request)).await
}

pub(super) async fn add_rule(
    caller: ControlPlane,
    conditions: Conditions,
    State(shared): State<Shared>,
    Body(rule, _room): Body<FirewallRule>,
) -> Answered {
    let request = conditions.harmless()?.around(Ask::AddRule { rule });
    change(&shared, &caller, request).await
}

pub(super) async fn revoke_rule(
    caller: ControlPlane,
    conditions: Conditions,
    Named(id): Named,
    State(shared): State<Shared>,
) -> Answered {
    let request = Ask::RevokeRule {
        id,
        confirm_s: conditions.confirm_s,
        force: conditions.force,
    };
    change(&shared, &caller, conditions.around(request)).await
}

/// What is said of a peer beside its name.
#[derive(Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub(super) struct PeerBody {
    /// Its addresses, one or more.
    addresses: Vec<PeerAddress>,
}

pub(super) async fn add_peer(
    caller: ControlPlane,
    conditions: Conditions,
    Named(instance): Named,
    State(shared): State<Shared>,
    Body(PeerBody { addresses }, _room): Body<PeerBody>,
) -> Answered {
    let instance: Name = instance
        .parse()
        .map_err(|reason: String| Problem::new(StatusCode::UNPROCESSABLE_ENTITY, &reason))?;
    let peer = Peer { instance, addresses };
    let request = conditions.harmless()?.around(Ask::AddPeer { peer });
    change(&shared, &caller, request).await
}

pub(super) async fn revoke_peer(
    caller: ControlPlane,
    conditions: Conditions,
    Named(instance): Named,
    State(shared): State<Shared>,
) -> Answered {
    let request = Ask::RevokePeer {
        instance,
        confirm_s: conditions.confirm_s,
        force: conditions.force,
    };
    change(&shared, &caller, conditions.around(request)).await
}

pub(super) async fn add_key(
    caller: ControlPlane,
    conditions: Conditions,
    State(shared): State<Shared>,
    Body(key, _room): Body<AuthorizedKey>,
) -> Answered {
    let request = conditions.harmless()?.around(Ask::AddKey { key });
    change(&shared, &caller, request).await
}

pub(super) async fn revoke_key(
    caller: ControlPlane,
    conditions: Conditions,
    Named(fingerprint): Named,
    State(shared): State<Shared>,
) -> Answered {
    let request = Ask::RevokeKey {
        fingerprint,
        confirm_s: conditions.confirm_s,
        force: conditions.force,
    };
    change(&shared, &caller, conditions.around(request)).await
}

/// Keeps the spec on trial: that this call came shows that the control plane still gets in, provided that
/// its connection is newer than the change.
pub(super) async fn confirm(
    caller: ControlPlane,
    Named(generation): Named,
    State(shared): State<Shared>,
) -> Answered {
    let Ok(generation) = generation.parse() else {
        return Err(Problem::new(StatusCode::BAD_REQUEST, "a generation is a number"));
    };
    change(&shared, &caller, Ask::Confirm { generation }).await
}

#[cfg(test)]
mod tests {
    use super::*;

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

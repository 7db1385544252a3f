//! The one table of what can be asked of the endpoint. The router is made from it, and so is the description,
//! `GET /openapi.json`: a new path is an entry here, with its handler.
//!
//! May not live here: what the handlers do (`server`, `changes`), how the description is written (`document`).

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::http::{StatusCode, header};
use axum::middleware::from_fn_with_state;
use axum::response::IntoResponse as _;
use axum::routing::{MethodRouter, delete, get, post, put};
use portcullis_protocol::spec::MAX_SPEC_BYTES;

use super::metrics;
use super::problem::Problem;
use super::server::{self, Shared};
use super::{changes, first_contact, refusals};

/// The description; a test of `document` keeps it current.
const DESCRIPTION: &str = include_str!("../../docs/schema/openapi.json");

/// One method of one path.
#[derive(Debug)]
pub struct Operation {
    /// Its name in generated clients.
    pub id: &'static str,
    /// In capitals, as HTTP has it.
    pub method: &'static str,
    /// With its variable part in braces.
    pub path: &'static str,
    /// What it does, in a line.
    pub summary: &'static str,
    /// Who may.
    pub caller: Who,
    /// The parameters in the query.
    pub query: &'static [Parameter],
    /// What `If-Match` is for it.
    pub if_match: IfMatch,
    /// What is sent, with an example.
    pub body: Option<(Shape, &'static str)>,
    /// What comes if it worked.
    pub answer: Shape,
    /// What else may come in the same form, with another status.
    pub unready: Option<StatusCode>,
    /// The problems that it may answer, besides those of its caller, `If-Match` and body.
    pub problems: &'static [StatusCode],
    handler: fn() -> MethodRouter<Shared>,
}

/// Who may ask.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Who {
    /// Anybody that the gate lets through.
    Anybody,
    /// Callers with a certificate of the control plane's authority.
    ControlPlane,
}

/// A parameter of the query.
#[derive(Debug)]
pub struct Parameter {
    /// Its name.
    pub name: &'static str,
    /// What it is for.
    pub summary: &'static str,
    /// Whether it can't be left out.
    pub required: bool,
    /// JSON Schema of its value, as JSON.
    pub schema: &'static str,
}

/// What `If-Match` is for an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IfMatch {
    /// Nothing.
    Unused,
    /// A condition, if it is there.
    Optional,
    /// A condition that has to be there.
    Required,
}

/// The form of what is sent or answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// Lines of text.
    Text,
    /// The health report.
    Report,
    /// The identity document.
    Identity,
    /// The spec.
    Spec,
    /// A firewall rule.
    Rule,
    /// A peer's addresses.
    Peer,
    /// An authorized key.
    Key,
    /// What became of a change.
    Changed,
    /// A description of the API.
    OpenApi,
    /// OpenMetrics.
    Metrics,
    /// The proof that somebody who knows the token pinned the keys.
    FirstContact,
    /// Nothing, with status 204.
    Nothing,
}

const TRIAL: [Parameter; 2] = [
    Parameter {
        name: "confirm",
        summary: "For how long the change is on trial: it is taken back unless it is confirmed in that time",
        required: false,
        schema: r#"{"type":"string","pattern":"^([5-9]|[1-9][0-9]{1,3})s$","example":"60s"}"#,
    },
    Parameter {
        name: "force",
        summary: "Make the change even if it could cut somebody off",
        required: false,
        schema: r#"{"type":"boolean","default":false}"#,
    },
];
const VERBOSE: [Parameter; 1] = [Parameter {
    name: "verbose",
    summary: "List all checks with their status, whatever the value",
    required: false,
    schema: r#"{"type":"string"}"#,
}];
const NONCE: [Parameter; 1] = [Parameter {
    name: "nonce",
    summary: "Hex digits of your choice, which the answer is bound to",
    required: true,
    schema: r#"{"type":"string","pattern":"^[0-9A-Fa-f]{16,128}$","example":"0123456789abcdef"}"#,
}];

/// What each change may answer: not now or dangerous, it failed, it is stopping, the disk is full.
const CHANGE: &[StatusCode] = &[
    StatusCode::CONFLICT,
    StatusCode::INTERNAL_SERVER_ERROR,
    StatusCode::SERVICE_UNAVAILABLE,
    StatusCode::INSUFFICIENT_STORAGE,
];
/// And the change of something that has to be there.
const CHANGE_OF: &[StatusCode] = &[
    StatusCode::NOT_FOUND,
    StatusCode::UNPROCESSABLE_ENTITY,
    StatusCode::CONFLICT,
    StatusCode::INTERNAL_SERVER_ERROR,
    StatusCode::SERVICE_UNAVAILABLE,
    StatusCode::INSUFFICIENT_STORAGE,
];

const RULE: &str = r#"{"id":"web","protocol":"tcp","from_port":8080,"ip_ranges":["203.0.113.0/24"]}"#;
const PEER: &str = r#"{"addresses":["10.0.0.3","fd00::3"]}"#;
const CONTACT: &str = r#"{"instance":"i-0a1","tls_spki_sha256":"00","challenge":"00","time":"2026-11-24T00:00:00Z","mac":"00"}"#;
const KEY: &str = r#"{"user":"ubuntu","key":"ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIFkKc52EQpKAMBtUiDp/N8hykSeuzBRx5gN48WTPDhWS alice"}"#;
const SPEC: &str = r#"{"version":1,"generation":2,"instance":{"id":"i-0a1"},"firewall":{"ingress":[{"id":"ssh","protocol":"tcp","from_port":22}]}}"#;

/// A question that anybody may ask: what most entries begin from.
const READ: Operation = Operation {
    id: "",
    method: "GET",
    path: "",
    summary: "",
    caller: Who::Anybody,
    query: &[],
    if_match: IfMatch::Unused,
    body: None,
    answer: Shape::Text,
    unready: None,
    problems: &[],
    handler: MethodRouter::new,
};
/// A change by the control plane.
const WRITE: Operation = Operation {
    caller: Who::ControlPlane,
    if_match: IfMatch::Optional,
    answer: Shape::Changed,
    problems: CHANGE,
    ..READ
};
/// One that takes something away.
const TAKE: Operation = Operation {
    method: "DELETE",
    query: &TRIAL,
    problems: CHANGE_OF,
    ..WRITE
};

/// All that can be asked.
pub static OPERATIONS: &[Operation] = &[
    Operation {
        id: "live",
        path: "/livez",
        summary: "Whether the agent runs",
        handler: || get(|| async { "ok" }),
        ..READ
    },
    Operation {
        id: "ready",
        path: "/readyz",
        summary: "Whether all required checks pass; else the ids of those that don't, one a line",
        query: &VERBOSE,
        unready: Some(StatusCode::SERVICE_UNAVAILABLE),
        handler: || get(server::readyz),
        ..READ
    },
    Operation {
        id: "identity",
        path: "/v1/identity",
        summary: "The TLS and SSH host keys, bound to the enrolment token and the nonce by an HMAC",
        query: &NONCE,
        answer: Shape::Identity,
        problems: &[StatusCode::BAD_REQUEST, StatusCode::NOT_FOUND],
        handler: || get(server::identity),
        ..READ
    },
    Operation {
        id: "end_first_contact",
        method: "POST",
        path: "/v1/identity/done",
        summary: "Forget the enrolment token: the keys are pinned, as the body proves",
        body: Some((Shape::FirstContact, CONTACT)),
        answer: Shape::Nothing,
        problems: &[
            StatusCode::FORBIDDEN,
            StatusCode::NOT_FOUND,
            StatusCode::INTERNAL_SERVER_ERROR,
            StatusCode::SERVICE_UNAVAILABLE,
        ],
        handler: || post(first_contact::done).layer(DefaultBodyLimit::max(first_contact::MAX_BODY)),
        ..READ
    },
    Operation {
        id: "openapi",
        path: "/openapi.json",
        summary: "This description",
        answer: Shape::OpenApi,
        handler: || get(description),
        ..READ
    },
    Operation {
        id: "health",
        path: "/v1/health",
        summary: "The health report",
        caller: Who::ControlPlane,
        answer: Shape::Report,
        problems: &[StatusCode::SERVICE_UNAVAILABLE],
        handler: || get(server::health),
        ..READ
    },
    Operation {
        id: "metrics",
        path: "/metrics",
        summary: "What the agent has counted and measured; in Prometheus' own format for who would rather have that",
        caller: Who::ControlPlane,
        answer: Shape::Metrics,
        problems: &[StatusCode::INTERNAL_SERVER_ERROR, StatusCode::SERVICE_UNAVAILABLE],
        handler: || get(metrics::metrics),
        ..READ
    },
    Operation {
        id: "get_spec",
        path: "/v1/spec",
        summary: "The accepted spec, or the one on trial, without its secrets",
        caller: Who::ControlPlane,
        answer: Shape::Spec,
        problems: &[StatusCode::NOT_FOUND, StatusCode::SERVICE_UNAVAILABLE],
        handler: || get(changes::spec),
        ..READ
    },
    Operation {
        id: "replace_spec",
        method: "PUT",
        path: "/v1/spec",
        summary: "Replace the spec; secrets that are left out stay as they are",
        query: &TRIAL,
        if_match: IfMatch::Required,
        body: Some((Shape::Spec, SPEC)),
        handler: || put(changes::replace_spec),
        ..WRITE
    },
    Operation {
        id: "add_rule",
        method: "POST",
        path: "/v1/firewall/rules",
        summary: "Let something in",
        body: Some((Shape::Rule, RULE)),
        handler: || post(changes::add_rule),
        ..WRITE
    },
    Operation {
        id: "revoke_rule",
        path: "/v1/firewall/rules/{id}",
        summary: "Let it in no longer, and end the sessions that the rule let in",
        handler: || delete(changes::revoke_rule),
        ..TAKE
    },
    Operation {
        id: "add_peer",
        method: "PUT",
        path: "/v1/cluster/peers/{instance}",
        summary: "A peer joins the cluster, or gets other addresses",
        body: Some((Shape::Peer, PEER)),
        handler: || put(changes::add_peer),
        ..WRITE
    },
    Operation {
        id: "revoke_peer",
        path: "/v1/cluster/peers/{instance}",
        summary: "A peer leaves the cluster",
        handler: || delete(changes::revoke_peer),
        ..TAKE
    },
    Operation {
        id: "add_key",
        method: "POST",
        path: "/v1/keys",
        summary: "Let an SSH key in",
        body: Some((Shape::Key, KEY)),
        handler: || post(changes::add_key),
        ..WRITE
    },
    Operation {
        id: "revoke_key",
        path: "/v1/keys/{fingerprint}",
        summary: "Let an SSH key in no longer, whoever named it",
        handler: || delete(changes::revoke_key),
        ..TAKE
    },
    Operation {
        id: "confirm",
        method: "POST",
        path: "/v1/confirm/{generation}",
        summary: "Keep the change on trial; over a connection that is newer than it",
        if_match: IfMatch::Unused,
        handler: || post(changes::confirm),
        problems: &[
            StatusCode::BAD_REQUEST,
            StatusCode::CONFLICT,
            StatusCode::INTERNAL_SERVER_ERROR,
            StatusCode::SERVICE_UNAVAILABLE,
            StatusCode::INSUFFICIENT_STORAGE,
        ],
        ..WRITE
    },
];

/// The router. A body may be as long as the longest spec.
pub(super) fn router(shared: Shared) -> Router {
    let router = OPERATIONS.iter().fold(Router::new(), |router, operation| {
        let handler = (operation.handler)();
        let handler = match operation.caller {
            Who::Anybody => handler,
            Who::ControlPlane => {
                let told: refusals::Operation = (shared.agent.clone(), operation.id);
                handler.layer(from_fn_with_state(told, refusals::tell))
            }
        };
        router.route(operation.path, handler)
    });
    router
        .fallback(|| async { Problem::new(StatusCode::NOT_FOUND, "there is nothing at this path") })
        .method_not_allowed_fallback(|| async {
            Problem::new(
                StatusCode::METHOD_NOT_ALLOWED,
                "this path does not know that method",
            )
        })
        .layer(DefaultBodyLimit::max(MAX_SPEC_BYTES))
        .layer(from_fn_with_state(shared.counts.clone(), metrics::count))
        .with_state(shared)
}

async fn description() -> axum::response::Response {
    ([(header::CONTENT_TYPE, "application/json")], DESCRIPTION).into_response()
}

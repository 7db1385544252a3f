//! The control plane's changes after launch: the spec, rules, peers, keys; each is durable and enforced
//! when its answer is there.
//!
//! May not live here: how a request is read (`extract`), what a change means or whether it is made (`agent`).

use axum::Json;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use jiff::Timestamp;
use portcullis_protocol::control::{Answer, Request as Ask};
use portcullis_protocol::spec::Name;
use portcullis_protocol::{AuthorizedKey, FirewallRule, Peer, PeerAddress, Spec};
use serde::{Deserialize, Serialize};

use super::extract::{Body, Conditions, ControlPlane, Named};
use super::problem::Problem;
use super::server::{Answered, Shared, ask, unexpected};

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

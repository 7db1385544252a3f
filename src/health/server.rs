//! The HTTPS endpoint: `/livez`, `/readyz`, `/v1/identity` for whoever the gate lets reach it,
//! `/v1/health` and changes (`changes`) for callers with a certificate of the control plane's authority.
//!
//! May not live here: changing the instance (the agent is asked to), connections and their limits
//! (`connection`), which paths there are (`routes`).

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Extension, Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use portcullis_protocol::Report;
use portcullis_protocol::control::{Answer, Request as Ask};
use portcullis_protocol::identity::is_nonce;
use rustls::ServerConfig;
use serde::Deserialize;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot, watch};

use super::connection::{self, Endpoint};
use super::extract::ControlPlane;
use super::limits::Limits;
use super::metrics::Counts;
use super::problem::Problem;
use super::routes;
use crate::channel::Remote;
use crate::config::LimitSettings;

/// What the endpoint tells; the link to the agent replaces it.
#[derive(Clone, Default)]
pub struct Published {
    /// Whether the agent is there. Without it nothing is known of the instance as it is now.
    pub agent: bool,
    /// The last report; none before the first reconcile.
    pub report: Option<Arc<Report>>,
    /// How connections are secured; none are taken before that is known.
    pub tls: Option<Arc<ServerConfig>>,
}

/// What a caller asks the agent, who that is, and where the answer goes.
pub type Question = (Ask, Remote, oneshot::Sender<Answer>);

/// What a handler gives.
pub(super) type Answered = Result<Response, Problem>;

/// What handlers share.
#[derive(Clone)]
pub(super) struct Shared {
    pub(super) published: watch::Receiver<Published>,
    /// Where the agent is asked.
    pub(super) agent: mpsc::Sender<Question>,
    /// What the endpoint counts.
    pub(super) counts: Counts,
    /// How much callers may take.
    pub(super) limits: Arc<Limits>,
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

/// Binds the endpoint's port; IPv4 only where the kernel has no IPv6.
///
/// # Errors
/// As bind(2): the port is taken, or not permitted.
pub async fn bind(listen: SocketAddr) -> std::io::Result<TcpListener> {
    match TcpListener::bind(listen).await {
        Err(error)
            if error.raw_os_error() == Some(nix::errno::Errno::EAFNOSUPPORT as i32)
                && listen.ip() == Ipv6Addr::UNSPECIFIED =>
        {
            TcpListener::bind((Ipv4Addr::UNSPECIFIED, listen.port())).await
        }
        bound => bound,
    }
}

/// Serves until the task is dropped.
pub async fn serve(
    listener: TcpListener,
    limits: LimitSettings,
    published: watch::Receiver<Published>,
    agent: mpsc::Sender<Question>,
    counts: Counts,
) {
    let limits = Arc::new(Limits::new(limits));
    let router = routes::router(Shared {
        published: published.clone(),
        agent: agent.clone(),
        counts: counts.clone(),
        limits: limits.clone(),
    });
    let endpoint = Endpoint {
        router,
        agent,
        counts,
    };
    connection::accept_all(listener, limits, published, endpoint).await;
}

#[derive(Deserialize)]
pub(super) struct ReadyzQuery {
    verbose: Option<String>,
}

pub(super) async fn readyz(
    State(shared): State<Shared>,
    query: Result<Query<ReadyzQuery>, QueryRejection>,
) -> Response {
    let query = match query {
        Ok(Query(query)) => query,
        Err(error) => return Problem::new(StatusCode::BAD_REQUEST, &error.body_text()).into_response(),
    };
    let unavailable = |why: &'static str| (StatusCode::SERVICE_UNAVAILABLE, why).into_response();
    let published = shared.published.borrow().clone();
    if !published.agent {
        return unavailable("the agent is not there\n");
    }
    let Some(report) = published.report else {
        return unavailable("starting\n");
    };
    let status = if report.ready {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    let text = match (query.verbose, report.ready) {
        (Some(_), _) => report
            .checks
            .iter()
            .map(|c| format!("{} {}\n", c.id, c.status))
            .collect(),
        (None, true) => "ok".to_owned(),
        (None, false) => report.blocking().map(|c| format!("{}\n", c.id)).collect(),
    };
    (status, text).into_response()
}

/// The report comes from the agent, which judges whether the caller may have it.
pub(super) async fn health(caller: ControlPlane, State(shared): State<Shared>) -> Answered {
    match ask(&shared, &caller.0, Ask::Status).await? {
        Answer::Report { report } => Ok(Json(report).into_response()),
        _ => Err(unexpected()),
    }
}

#[derive(Deserialize)]
pub(super) struct IdentityQuery {
    nonce: String,
}

pub(super) async fn identity(
    State(shared): State<Shared>,
    Extension(caller): Extension<Remote>,
    query: Result<Query<IdentityQuery>, QueryRejection>,
) -> Answered {
    let nonce = query.map(|Query(query)| query.nonce).unwrap_or_default();
    if !is_nonce(&nonce) {
        let detail = "?nonce= takes 16 to 128 hex digits of your choice";
        return Err(Problem::new(StatusCode::BAD_REQUEST, detail));
    }
    match ask(&shared, &caller, Ask::Identity { nonce }).await? {
        Answer::Identity { identity } => Ok(Json(identity).into_response()),
        _ => Err(unexpected()),
    }
}

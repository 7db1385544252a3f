//! The HTTPS endpoint: `/livez`, `/readyz`, `/v1/identity` for whoever the gate lets reach it,
//! `/v1/health` and changes (`changes`) for callers with a certificate of the control plane's authority.
//!
//! Strangers can talk to this: every connection has limits on time, size and number.
//! May not live here: changing the instance; the agent is asked to.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use axum::extract::rejection::QueryRejection;
use axum::extract::{Extension, Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use portcullis_protocol::Report;
use portcullis_protocol::control::{Answer, Request as Ask};
use portcullis_protocol::identity::is_nonce;
use rustls::ServerConfig;
use serde::Deserialize;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio_rustls::TlsAcceptor;

use super::changes::{self, Answered, ControlPlane, ask, unexpected};
use super::problem::Problem;
use crate::channel::Remote;
use crate::system::clock;

/// Connections served at once; more wait in the kernel's queue.
const MAX_CONNECTIONS: usize = 128;
/// Time for the TLS handshake, and for each request's header.
const HEADER_TIME: Duration = Duration::from_secs(10);
/// Longest life of a connection.
const CONNECTION_TIME: Duration = Duration::from_secs(120);
/// Most bytes of a request's header.
const MAX_HEADER_BYTES: usize = 16 << 10;

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

/// What handlers share.
#[derive(Clone)]
pub(super) struct Shared {
    pub(super) published: watch::Receiver<Published>,
    /// Where the agent is asked.
    pub(super) agent: mpsc::Sender<Question>,
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
    published: watch::Receiver<Published>,
    agent: mpsc::Sender<Question>,
) {
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let router = router(Shared {
        published: published.clone(),
        agent,
    });
    loop {
        // The semaphore is never closed.
        let Ok(slot) = slots.clone().acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok((stream, address)) => {
                let Some(tls) = published.borrow().tls.clone() else {
                    continue;
                };
                let acceptor = TlsAcceptor::from(tls);
                let router = router.clone();
                tokio::spawn(async move {
                    let _ =
                        tokio::time::timeout(CONNECTION_TIME, serve_one(stream, address, acceptor, router))
                            .await;
                    drop(slot);
                });
            }
            // Out of descriptors: wait until a connection ends rather than spin.
            Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
}

async fn serve_one(stream: TcpStream, address: SocketAddr, acceptor: TlsAcceptor, router: Router) {
    let since = clock::since_boot();
    let handshake = tokio::time::timeout(HEADER_TIME, acceptor.accept(stream)).await;
    let Ok(Ok(stream)) = handshake else { return };
    // rustls gives certificates only after it verified them against the spec's authority.
    let chain = stream.get_ref().1.peer_certificates().unwrap_or_default();
    let caller = Remote {
        since,
        address: SocketAddr::new(address.ip().to_canonical(), address.port()),
        chain: chain.iter().map(|certificate| certificate.to_vec()).collect(),
    };
    let service = TowerToHyperService::new(router.layer(Extension(caller)));
    let _ = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIME)
        .max_buf_size(MAX_HEADER_BYTES)
        .serve_connection(TokioIo::new(stream), service)
        .await;
}

fn router(shared: Shared) -> Router {
    Router::new()
        .route("/livez", get(|| async { "ok" }))
        .route("/readyz", get(readyz))
        .route("/v1/health", get(health))
        .route("/v1/identity", get(identity))
        .merge(changes::routes())
        .fallback(|| async { Problem::new(StatusCode::NOT_FOUND, "there is nothing at this path") })
        .method_not_allowed_fallback(|| async {
            Problem::new(
                StatusCode::METHOD_NOT_ALLOWED,
                "this path does not know that method",
            )
        })
        .with_state(shared)
}

#[derive(Deserialize)]
struct ReadyzQuery {
    verbose: Option<String>,
}

async fn readyz(State(shared): State<Shared>, Query(query): Query<ReadyzQuery>) -> Response {
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

async fn health(caller: ControlPlane, State(shared): State<Shared>) -> Answered {
    match ask(&shared, &caller.0, Ask::Status).await? {
        Answer::Report { report } => Ok(Json(report).into_response()),
        _ => Err(unexpected()),
    }
}

#[derive(Deserialize)]
struct IdentityQuery {
    nonce: String,
}

async fn identity(
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

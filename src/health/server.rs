//! The HTTPS endpoint: `/livez`, `/readyz`, `/v1/identity` for whoever the gate lets reach it,
//! `/v1/health` and changes (`changes`) for callers with a certificate of the control plane's authority.
//!
//! Strangers can talk to this: every connection has limits on time, size and number.
//! May not live here: changing the instance; the agent is asked to.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Extension, Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use portcullis_protocol::Report;
use rustls::ServerConfig;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::WebPkiSupportedAlgorithms;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use serde::Deserialize;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::problem::Problem;
use super::{changes, first_contact};
use crate::agent::control::{Call, Remote};
use crate::identity::TlsIdentity;
use crate::policy::observation::{Observed, Tls};
use crate::system::clock;

/// Connections served at once; more wait in the kernel's queue.
const MAX_CONNECTIONS: usize = 128;
/// Time for the TLS handshake, and for each request's header.
const HEADER_TIME: Duration = Duration::from_secs(10);
/// Longest life of a connection.
const CONNECTION_TIME: Duration = Duration::from_secs(120);
/// Most bytes of a request's header.
const MAX_HEADER_BYTES: usize = 16 << 10;

/// What the endpoint tells; the agent replaces it as a whole.
#[derive(Clone)]
pub struct Published {
    /// The last report; none before the first reconcile.
    pub report: Option<Arc<Report>>,
    /// How connections are secured.
    pub tls: Arc<ServerConfig>,
}

/// Who calls, as far as TLS proved it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Caller {
    /// Anybody that the gate lets through.
    Anybody,
    /// The holder of a certificate of the control plane's authority.
    ControlPlane(Remote),
}

/// What handlers share.
#[derive(Clone)]
pub(super) struct Shared {
    published: watch::Receiver<Published>,
    /// Where the agent is asked.
    pub(super) agent: mpsc::Sender<Call>,
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
pub async fn serve(listener: TcpListener, published: watch::Receiver<Published>, agent: mpsc::Sender<Call>) {
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
                let acceptor = TlsAcceptor::from(published.borrow().tls.clone());
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
    let caller = match chain.is_empty() {
        true => Caller::Anybody,
        false => Caller::ControlPlane(Remote {
            since,
            address: SocketAddr::new(address.ip().to_canonical(), address.port()),
            chain: chain.iter().map(|certificate| certificate.to_vec()).collect(),
        }),
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
        .merge(first_contact::routes())
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
    let report = shared.published.borrow().report.clone();
    let Some(report) = report else {
        return (StatusCode::SERVICE_UNAVAILABLE, "starting\n").into_response();
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

async fn health(State(shared): State<Shared>, Extension(caller): Extension<Caller>) -> Response {
    if caller == Caller::Anybody {
        return Problem::not_the_control_plane().into_response();
    }
    let report = shared.published.borrow().report.clone();
    match report {
        Some(report) => Json(&*report).into_response(),
        None => Problem::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "the first report is not there yet",
        )
        .into_response(),
    }
}

/// Connects to our own endpoint and says what was negotiated; only our own certificate is accepted.
///
/// # Errors
/// A reason for the operator.
pub async fn observe(listen: SocketAddr, identity: &TlsIdentity) -> Observed<Tls> {
    let address = match listen {
        SocketAddr::V6(v6) if v6.ip().is_unspecified() => SocketAddr::from((Ipv4Addr::LOCALHOST, v6.port())),
        SocketAddr::V4(v4) if v4.ip().is_unspecified() => SocketAddr::from((Ipv4Addr::LOCALHOST, v4.port())),
        other => other,
    };
    let verifier = Arc::new(OnlyThis {
        own: identity.certificates(),
    });
    let config = rustls::ClientConfig::builder()
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_no_client_auth();
    let connect = async {
        let stream = TcpStream::connect(address).await?;
        let name = ServerName::try_from("portcullis").map_err(std::io::Error::other)?;
        TlsConnector::from(Arc::new(config)).connect(name, stream).await
    };
    let stream = match tokio::time::timeout(HEADER_TIME, connect).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return Err(format!("{address}: {error}")),
        Err(_) => return Err(format!("{address}: no answer within {} s", HEADER_TIME.as_secs())),
    };
    let session = stream.get_ref().1;
    let text = |value: Option<String>| value.unwrap_or_else(|| "unknown".to_owned());
    Ok(Tls {
        version: text(
            session
                .protocol_version()
                .and_then(|v| v.as_str().map(str::to_owned)),
        ),
        cipher_suite: text(
            session
                .negotiated_cipher_suite()
                .and_then(|s| s.suite().as_str().map(str::to_owned)),
        ),
        key_exchange: text(
            session
                .negotiated_key_exchange_group()
                .map(|g| format!("{:?}", g.name())),
        ),
    })
}

fn algorithms() -> WebPkiSupportedAlgorithms {
    rustls::crypto::ring::default_provider().signature_verification_algorithms
}

/// Accepts our own certificates, by their bytes.
#[derive(Debug)]
struct OnlyThis {
    own: Vec<CertificateDer<'static>>,
}

impl ServerCertVerifier for OnlyThis {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if self.own.contains(end_entity) {
            Ok(ServerCertVerified::assertion())
        } else {
            Err(rustls::Error::General(
                "somebody else answers on our port".to_owned(),
            ))
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &rustls::DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, certificate, signature, &algorithms())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &rustls::DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, certificate, signature, &algorithms())
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        algorithms().supported_schemes()
    }
}

//! The HTTPS endpoint: `/livez`, `/readyz`, `/v1/identity` for whoever the gate lets reach it,
//! `/v1/health` and changes (`changes`) for callers with a certificate of the control plane's authority.
//!
//! May not live here: changing the instance (the agent is asked to), connections and their limits
//! (`connection`), which paths there are (`routes`).

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use portcullis_protocol::control::{Answer, Request as Ask};
use portcullis_protocol::{Report, Secret};
use rustls::ServerConfig;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::WebPkiSupportedAlgorithms;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use serde::Deserialize;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio_rustls::TlsConnector;

use super::changes::{self, Answered, ControlPlane};
use super::connection::{self, Endpoint};
use super::limits::Limits;
use super::metrics::Counts;
use super::problem::Problem;
use super::routes;
use crate::agent::control::{Call, Remote};
use crate::config::LimitSettings;
use crate::identity::TlsIdentity;
use crate::policy::observation::{Observed, Tls};

/// Time for the agent to connect to its own endpoint.
const OBSERVE_TIME: Duration = Duration::from_secs(10);

/// What the endpoint tells; the agent replaces it as a whole.
#[derive(Clone)]
pub struct Published {
    /// The last report; none before the first reconcile.
    pub report: Option<Arc<Report>>,
    /// The token that identity documents are bound by.
    pub token: Option<Secret>,
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
    identity: Arc<TlsIdentity>,
    /// Where the agent is asked.
    pub(super) agent: mpsc::Sender<Call>,
    /// What the endpoint counts.
    pub(super) counts: Counts,
    /// How much callers may take.
    pub(super) limits: Arc<Limits>,
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
    identity: Arc<TlsIdentity>,
    agent: mpsc::Sender<Call>,
    counts: Counts,
) {
    let limits = Arc::new(Limits::new(limits));
    let router = routes::router(Shared {
        published: published.clone(),
        identity,
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

/// The report comes from the agent, which judges whether the caller may have it.
pub(super) async fn health(caller: ControlPlane, State(shared): State<Shared>) -> Answered {
    match changes::ask(&shared, &caller, Ask::Status).await? {
        Answer::Report { report } => Ok(Json(report).into_response()),
        _ => Err(changes::unexpected()),
    }
}

#[derive(Deserialize)]
pub(super) struct IdentityQuery {
    nonce: String,
}

pub(super) async fn identity(
    State(shared): State<Shared>,
    query: Result<Query<IdentityQuery>, QueryRejection>,
) -> Response {
    let nonce = query.map(|Query(query)| query.nonce).unwrap_or_default();
    if !(16..=128).contains(&nonce.len()) || !nonce.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Problem::new(
            StatusCode::BAD_REQUEST,
            "?nonce= takes 16 to 128 hex digits of your choice",
        )
        .into_response();
    }
    let published = shared.published.borrow().clone();
    match (&published.report, &published.token) {
        (Some(report), Some(token)) => Json(shared.identity.document(
            &report.instance.id,
            &report.host_keys,
            &nonce,
            token,
        ))
        .into_response(),
        _ => Problem::new(StatusCode::NOT_FOUND, "no enrolment token is known").into_response(),
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
        certificate: identity.certificate().clone(),
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
    let stream = match tokio::time::timeout(OBSERVE_TIME, connect).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return Err(format!("{address}: {error}")),
        Err(_) => {
            return Err(format!(
                "{address}: no answer within {} s",
                OBSERVE_TIME.as_secs()
            ));
        }
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

/// Accepts one certificate, by its bytes.
#[derive(Debug)]
struct OnlyThis {
    certificate: CertificateDer<'static>,
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
        if *end_entity == self.certificate {
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

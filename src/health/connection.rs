//! Connections of the HTTPS endpoint, from accept(2) to their end: each has limits on time, size and number,
//! and who calls is known before a request is read.
//!
//! May not live here: what a request does (`routes` and below), how much is too much (`limits`).

use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::http::{HeaderValue, Request, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use hyper::body::{Body as _, Incoming};
use hyper::service::{Service as _, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use portcullis_protocol::control::Request as Ask;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tracing::warn;

use super::limits::{Limits, Slot};
use super::metrics::Counts;
use super::problem::Problem;
use super::rest;
use super::server::{Published, Question};
use crate::channel::Remote;
use crate::identity::caller::handshake_refusal;
use crate::log::id;
use crate::system::clock;

/// Time for the TLS handshake.
const HANDSHAKE_TIME: Duration = Duration::from_secs(10);
/// Time for each request's header, from the end of the answer before it: also how long a connection may idle.
const HEADER_TIME: Duration = Duration::from_secs(10);
/// After this time a connection takes no further request.
const CONNECTION_TIME: Duration = Duration::from_secs(120);
/// And then it may finish the one that is under way.
const LAST_ANSWER_TIME: Duration = Duration::from_secs(60);
/// Most bytes of a request's header.
const MAX_HEADER_BYTES: usize = 16 << 10;
/// How often the journal is told that callers are turned away.
const TELL_EVERY: Duration = Duration::from_secs(60);

/// What each connection needs.
#[derive(Clone)]
pub(super) struct Endpoint {
    pub(super) router: Router,
    /// Is told of certificates that fail the handshake.
    pub(super) agent: mpsc::Sender<Question>,
    pub(super) counts: Counts,
}

/// Accepts connections until the task is dropped.
pub(super) async fn accept_all(
    listener: TcpListener,
    limits: Arc<Limits>,
    published: watch::Receiver<Published>,
    endpoint: Endpoint,
) {
    let mut told: Option<Instant> = None;
    loop {
        match listener.accept().await {
            Ok((stream, address)) => {
                let now = Instant::now();
                match limits.admit(address.ip(), now) {
                    Some((slot, ended)) => {
                        let Some(tls) = published.borrow().tls.clone() else {
                            continue;
                        };
                        let acceptor = TlsAcceptor::from(tls);
                        let endpoint = endpoint.clone();
                        tokio::spawn(serve_one(stream, address, acceptor, endpoint, slot, ended));
                    }
                    None => reset(&stream),
                }
                if told.is_none_or(|told| now - told >= TELL_EVERY) && tell(&limits) {
                    told = Some(now);
                }
            }
            // Out of descriptors: wait until a connection ends rather than spin.
            Err(_) => sleep(Duration::from_millis(100)).await,
        }
    }
}

/// Closes so that nothing of the connection is left in our kernel, as TIME_WAIT or FIN_WAIT would be.
fn reset(stream: &TcpStream) {
    // Without it, it is closed the ordinary way.
    let _ = socket2::SockRef::from(stream).set_linger(Some(Duration::ZERO));
}

/// Whether there was something to tell.
fn tell(limits: &Limits) -> bool {
    let turned_away = limits.untold();
    if turned_away == Default::default() {
        return false;
    }
    warn!(
        MESSAGE_ID = id::TURNED_AWAY,
        connections = turned_away.connections,
        evicted = turned_away.evicted,
        requests = turned_away.requests,
        "callers of the HTTPS endpoint ask too much of it and were turned away"
    );
    true
}

async fn serve_one(
    stream: TcpStream,
    address: SocketAddr,
    acceptor: TlsAcceptor,
    endpoint: Endpoint,
    mut slot: Slot,
    mut ended: oneshot::Receiver<()>,
) {
    let since = clock::since_boot();
    let peer = SocketAddr::new(address.ip().to_canonical(), address.port());
    let handshake = tokio::select! {
        handshake = timeout(HANDSHAKE_TIME, acceptor.accept(stream)) => handshake,
        _ = &mut ended => return,
    };
    endpoint.counts.handshake(&handshake);
    let stream = match handshake {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return tell_refused(&error, since, peer, &endpoint.agent),
        Err(_) => return,
    };
    // rustls gives certificates only after it verified them against the spec's authority.
    let chain = stream.get_ref().1.peer_certificates().unwrap_or_default();
    let caller = Remote {
        since,
        address: peer,
        chain: chain.iter().map(|certificate| certificate.to_vec()).collect(),
    };
    if !caller.chain.is_empty() {
        slot.promote();
    }
    let limits = slot.limits().clone();
    let service = service_fn(|request| answer(request, &endpoint.router, &caller, &limits, address));
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIME)
        .max_buf_size(MAX_HEADER_BYTES)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = pin!(connection);
    tokio::select! {
        _ = connection.as_mut() => return,
        _ = &mut ended, if !slot.is_reserved() => return,
        () = sleep(CONNECTION_TIME) => connection.as_mut().graceful_shutdown(),
    }
    tokio::select! {
        _ = connection => {}
        _ = &mut ended, if !slot.is_reserved() => {}
        () = sleep(LAST_ANSWER_TIME) => {}
    }
}

/// Tells the agent of a client certificate that failed the handshake, so that it is counted. If the agent
/// is busy, nobody waits for that.
fn tell_refused(
    error: &std::io::Error,
    since: Duration,
    address: SocketAddr,
    agent: &mpsc::Sender<Question>,
) {
    let error = error
        .get_ref()
        .and_then(|inner| inner.downcast_ref::<rustls::Error>());
    let Some(reason) = error.and_then(handshake_refusal) else {
        return;
    };
    let remote = Remote {
        since,
        address,
        chain: Vec::new(),
    };
    let (nobody_waits, _) = oneshot::channel();
    let _ = agent.try_send((Ask::HandshakeRefused { reason }, remote, nobody_waits));
}

/// Answers a request, unless its source asks too often.
async fn answer(
    mut request: Request<Incoming>,
    router: &Router,
    caller: &Remote,
    limits: &Limits,
    address: SocketAddr,
) -> Result<Response, Infallible> {
    let trusted = !caller.chain.is_empty();
    let close = HeaderValue::from_static("close");
    if let Err(wait) = limits.request(address.ip(), trusted, Instant::now()) {
        let mut response = Problem::too_many_requests(wait).into_response();
        if !trusted {
            // To go on asking costs a connection, and of those there are only so many a second.
            response.headers_mut().insert(header::CONNECTION, close);
        }
        return Ok(response);
    }
    request.extensions_mut().insert(caller.clone());
    let has_body = !request.body().is_end_stream();
    let (parts, body) = request.into_parts();
    // Who waits to be told to send it is not told.
    let comes = has_body && !parts.headers.contains_key(header::EXPECT);
    let (lent, rest) = rest::lend(body, comes);
    let request = Request::from_parts(parts, lent);
    let mut response = TowerToHyperService::new(router.clone()).call(request).await?;
    // A body that was refused unread ends the connection. Who is not told would ask again over it, in vain. Who may
    // not ask keeps no connection either: roles are revoked while they are connected.
    let unread = has_body && !response.status().is_success() && !rest.read().await;
    if unread || response.status() == StatusCode::FORBIDDEN {
        response.headers_mut().insert(header::CONNECTION, close);
    }
    Ok(response)
}

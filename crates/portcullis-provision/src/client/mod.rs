//! The HTTPS client to an instance's agent: it trusts pinned keys, or the instances' authority.
//!
//! May not live here: when to ask and what to make of the answers (`wait`, the commands).

mod changes;
mod dial;
mod first_contact;
mod pin;
#[cfg(test)]
mod tests;

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::{BodyExt as _, Full, Limited};
use hyper::Request;
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use portcullis_protocol::Report;
use portcullis_protocol::report::HostKey;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use serde::{Deserialize, Serialize};

pub use changes::{Changed, Terms};
pub use dial::{Dial, NamespaceDialer, PlainDialer};
pub use first_contact::Contact;
use pin::{Authority, PinVerifier};

use crate::ca::ClientCertificate;

/// How long a connection, its handshake, and an exchange may take together.
pub const TIMEOUT: Duration = Duration::from_secs(5);

/// Largest accepted answer, in bytes.
const MAX_BODY: usize = 4 << 20;

/// Why the agent could not be asked, or may not be believed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No connection: the instance is off, or its firewall or its agent does not let us in.
    #[error("can't reach the agent at {address}: {reason}")]
    Unreachable {
        /// Where.
        address: SocketAddr,
        /// What the system said.
        reason: String,
    },
    /// The TLS handshake or the exchange failed.
    #[error("the agent at {address} did not speak TLS and HTTP as it should: {reason}")]
    Exchange {
        /// Where.
        address: SocketAddr,
        /// What failed.
        reason: String,
    },
    /// Somebody else answered.
    #[error(
        "the agent at {address} shows the TLS key {presented}, but {expected} is pinned: \
         somebody is in between, or the instance was replaced; do not trust it"
    )]
    WrongKey {
        /// Where.
        address: SocketAddr,
        /// The pinned SHA-256 of the SubjectPublicKeyInfo, hex.
        expected: String,
        /// The one that was shown, hex.
        presented: String,
    },
    /// The identity document is not proven.
    #[error("the identity that {address} shows is not proven: {reason}; do not trust it")]
    NotProven {
        /// Where.
        address: SocketAddr,
        /// What does not fit.
        reason: String,
    },
    /// An answer that is not a success.
    #[error("{path} answered {status}{}{body}", if .body.is_empty() { "" } else { ": " })]
    Status {
        /// What was asked for.
        path: String,
        /// The HTTP status.
        status: u16,
        /// What a problem document says in words (RFC 9457), or the beginning of another body.
        body: String,
        /// Which refusal it is, if a problem document says so.
        code: Option<String>,
    },
    /// An answer that can't be read.
    #[error("{path} answered something else than expected: {reason}")]
    Malformed {
        /// What was asked for.
        path: String,
        /// Why it can't be read.
        reason: String,
    },
    /// The client certificate can't be used.
    #[error("the client certificate can't be used: {0}")]
    Certificate(String),
}

/// An instance's keys, proven at first contact.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PinnedIdentity {
    /// SHA-256 of the TLS key's SubjectPublicKeyInfo, hex.
    pub tls_spki_sha256: String,
    /// sshd's host keys.
    pub host_keys: Vec<HostKey>,
}

/// Asks one agent. Each question is a connection of its own.
pub struct AgentClient {
    address: SocketAddr,
    dialer: Arc<dyn Dial>,
    pin: Option<String>,
    authority: Option<Authority>,
    certificate: Option<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)>,
}

/// A request.
struct Question {
    method: &'static str,
    path: String,
    body: Bytes,
    if_match: Option<String>,
    /// How long all of it may take.
    time: Duration,
    /// Longest accepted answer, in bytes.
    longest: usize,
}

impl Question {
    fn new(method: &'static str, path: &str, body: impl Into<Bytes>) -> Self {
        Self {
            method,
            path: path.to_owned(),
            body: body.into(),
            if_match: None,
            time: TIMEOUT,
            longest: MAX_BODY,
        }
    }

    fn get(path: &str) -> Self {
        Self::new("GET", path, "")
    }
}

struct Answer {
    status: u16,
    body: String,
    spki: String,
}

impl AgentClient {
    /// A client for the agent at `address`. Without `pin` only [`AgentClient::enrol`] can be
    /// used; without `certificate` only what any caller may ask.
    ///
    /// # Errors
    /// When the certificate can't be read.
    pub fn new(
        address: SocketAddr,
        dialer: impl Dial + 'static,
        pin: Option<String>,
        certificate: Option<&ClientCertificate>,
    ) -> Result<Self, ClientError> {
        let read = |c: &ClientCertificate| {
            let chain = CertificateDer::pem_slice_iter(c.certificate_pem.as_bytes());
            let chain = chain.collect::<Result<Vec<_>, _>>().map_err(|e| e.to_string())?;
            let key = PrivateKeyDer::from_pem_slice(c.key_pem.as_bytes()).map_err(|e| e.to_string())?;
            Ok((chain, key))
        };
        let certificate = certificate
            .map(read)
            .transpose()
            .map_err(ClientError::Certificate)?;
        Ok(Self {
            address,
            dialer: Arc::new(dialer),
            pin,
            authority: None,
            certificate,
        })
    }

    /// Accepts an enrolled instance by its certificate: the instances' authority (PEM) gave it, for this
    /// instance's id, and it holds by our clock. A pin has to fit as well, if there is one.
    pub fn with_authority(mut self, pem: &str, instance: &str) -> Self {
        self.authority = Some(Authority {
            pem: pem.to_owned(),
            instance: instance.to_owned(),
        });
        self
    }

    /// Whether the agent lives (`/livez`).
    ///
    /// # Errors
    /// When it does not answer, or not with success.
    pub async fn livez(&self) -> Result<(), ClientError> {
        let answer = self.get("/livez", self.required_pin()?).await?;
        success("/livez", &answer).map(drop)
    }

    /// Whether the instance is ready (`/readyz`): `Ok(Err(ids))` names the checks that fail.
    ///
    /// # Errors
    /// When the agent does not answer, or neither with ready nor with not ready.
    pub async fn readyz(&self) -> Result<Result<(), Vec<String>>, ClientError> {
        let answer = self.get("/readyz", self.required_pin()?).await?;
        if answer.status == 503 {
            return Ok(Err(answer
                .body
                .lines()
                .map(|line| line.trim().to_owned())
                .collect()));
        }
        success("/readyz", &answer).map(|_| Ok(()))
    }

    /// The health report (`/v1/health`), over mutual TLS.
    ///
    /// # Errors
    /// When the agent does not answer, refuses the certificate, or answers something else.
    pub async fn health(&self) -> Result<Report, ClientError> {
        let answer = self.get("/v1/health", self.required_pin()?).await?;
        parse("/v1/health", &success("/v1/health", &answer)?.body)
    }

    fn required_pin(&self) -> Result<Option<String>, ClientError> {
        if self.pin.is_some() || self.authority.is_some() {
            return Ok(self.pin.clone());
        }
        let reason = "no key is pinned for it yet".into();
        Err(ClientError::NotProven {
            address: self.address,
            reason,
        })
    }

    async fn get(&self, path: &str, pin: Option<String>) -> Result<Answer, ClientError> {
        self.ask(Question::get(path), pin).await
    }

    async fn ask(&self, question: Question, pin: Option<String>) -> Result<Answer, ClientError> {
        let verifier = Arc::new(PinVerifier::new(pin.clone(), self.authority.clone()));
        let time = question.time;
        let exchange = tokio::time::timeout(time, self.exchange(question, Arc::clone(&verifier)));
        let result = exchange.await.unwrap_or_else(|_| {
            Err(ClientError::Unreachable {
                address: self.address,
                reason: format!("no answer within {} s", time.as_secs()),
            })
        });
        // Whatever TLS made of it, this is the reason.
        if let (Some(expected), Some(presented)) = (pin, verifier.seen())
            && expected != presented
        {
            return Err(ClientError::WrongKey {
                address: self.address,
                expected,
                presented,
            });
        }
        result
    }

    async fn exchange(&self, question: Question, verifier: Arc<PinVerifier>) -> Result<Answer, ClientError> {
        let address = self.address;
        let failed = |reason: String| ClientError::Exchange { address, reason };
        let unreachable = |e: std::io::Error| ClientError::Unreachable {
            address,
            reason: e.to_string(),
        };
        let dialer = Arc::clone(&self.dialer);
        let dialed = tokio::task::spawn_blocking(move || dialer.dial(address, TIMEOUT)).await;
        let stream = dialed.map_err(|e| failed(e.to_string()))?.map_err(unreachable)?;
        stream.set_nonblocking(true).map_err(unreachable)?;
        let stream = tokio::net::TcpStream::from_std(stream).map_err(unreachable)?;
        let config = self.tls(Arc::clone(&verifier))?;
        let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
        let name = ServerName::IpAddress(address.ip().into());
        let stream = connector
            .connect(name, stream)
            .await
            .map_err(|e| failed(e.to_string()))?;
        let handshake = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await;
        let (mut sender, connection) = handshake.map_err(|e| failed(causes(&e)))?;
        let longest = question.longest;
        let request = request(question, address).map_err(|e| failed(e.to_string()))?;
        let driver = tokio::spawn(connection);
        let answered = async {
            let response = sender
                .send_request(request)
                .await
                .map_err(|e| failed(causes(&e)))?;
            let status = response.status().as_u16();
            let body = Limited::new(response.into_body(), longest).collect().await;
            let body = body.map_err(|e| failed(e.to_string()))?.to_bytes();
            let spki = verifier.seen().unwrap_or_default();
            Ok(Answer {
                status,
                body: String::from_utf8_lossy(&body).into_owned(),
                spki,
            })
        }
        .await;
        driver.abort();
        answered
    }

    fn tls(&self, verifier: Arc<PinVerifier>) -> Result<rustls::ClientConfig, ClientError> {
        let wrong = |e: rustls::Error| ClientError::Certificate(e.to_string());
        let builder =
            rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
                .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])
                .map_err(wrong)?
                .dangerous()
                .with_custom_certificate_verifier(verifier);
        match &self.certificate {
            Some((chain, key)) => builder
                .with_client_auth_cert(chain.clone(), key.clone_key())
                .map_err(wrong),
            None => Ok(builder.with_no_client_auth()),
        }
    }
}

fn request(question: Question, address: SocketAddr) -> Result<Request<Full<Bytes>>, hyper::http::Error> {
    let mut request = Request::builder()
        .method(question.method)
        .uri(question.path)
        .header("host", address.to_string())
        .header("user-agent", concat!("portcullisctl/", env!("CARGO_PKG_VERSION")));
    if let Some(tag) = question.if_match {
        request = request.header("if-match", tag);
    }
    if !question.body.is_empty() {
        request = request.header("content-type", "application/json");
    }
    request.body(Full::new(question.body))
}

/// What is read of a problem document.
#[derive(Deserialize)]
struct Problem {
    detail: String,
    #[serde(default)]
    code: Option<String>,
}

fn success<'a>(path: &str, answer: &'a Answer) -> Result<&'a Answer, ClientError> {
    if matches!(answer.status, 200 | 204) {
        return Ok(answer);
    }
    let problem: Option<Problem> = serde_json::from_str(&answer.body).ok();
    let (body, code) = match problem {
        Some(problem) => (problem.detail, problem.code),
        None => (answer.body.trim().chars().take(300).collect(), None),
    };
    Err(ClientError::Status {
        path: path.to_owned(),
        status: answer.status,
        body: body.escape_debug().to_string(),
        code,
    })
}

fn parse<T: serde::de::DeserializeOwned>(path: &str, body: &str) -> Result<T, ClientError> {
    serde_json::from_str(body).map_err(|e| ClientError::Malformed {
        path: path.to_owned(),
        reason: e.to_string(),
    })
}

/// An error with all that caused it: hyper's own text leaves the cause out.
fn causes(error: &dyn std::error::Error) -> String {
    std::iter::successors(Some(error), |e| e.source())
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(": ")
}

/// Runs a question to its end on a thread of its own, so that it can be asked from anywhere, async
/// code too.
pub fn blocking<T: Send>(
    question: impl Future<Output = Result<T, ClientError>> + Send,
) -> Result<T, ClientError> {
    on_a_thread(|| question)
}

/// As [`blocking`], for a question that is put together on that thread.
pub fn blocking_with<T: Send>(
    client: &AgentClient,
    question: impl AsyncFnOnce(&AgentClient) -> Result<T, ClientError> + Send,
) -> Result<T, ClientError> {
    on_a_thread(|| question(client))
}

fn on_a_thread<T: Send, F: Future<Output = Result<T, ClientError>>>(
    question: impl FnOnce() -> F + Send,
) -> Result<T, ClientError> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime
                .map_err(|e| ClientError::Certificate(format!("no runtime: {e}")))?
                .block_on(question())
        });
        thread
            .join()
            .unwrap_or_else(|_| Err(ClientError::Certificate("the asking thread panicked".into())))
    })
}

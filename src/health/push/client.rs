//! One delivery: the TLS client, who we are to the receiver, the request, and what its answer means.
//!
//! May not live here: what is delivered when.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use reqwest::header::{AUTHORIZATION, CONTENT_TYPE, DATE, HeaderMap, HeaderValue, RETRY_AFTER};
use reqwest::{Client, Response, StatusCode, Url};
use rustls::ClientConfig;
use tokio::time::Instant;

use super::offer::{Access, Offer, Proof};
use super::patience::retry_after;
use super::token::{Token, authorization};
use super::{platform, service_account};
use crate::identity::client::client_config;

/// Time for one try.
const REQUEST_TIME: Duration = Duration::from_secs(20);

/// Why a report was not taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The receiver asks for that much patience.
    Later(Duration),
    /// The receiver does not accept who we are (401).
    Unauthorized(String),
    /// The receiver will not take this report, whoever sends it.
    Refused(String),
    /// Anything else.
    Other(String),
}

/// What is delivered.
pub struct Parcel {
    /// The report, as JSON.
    pub body: Vec<u8>,
    /// The change's number; none for the newest report.
    pub change: Option<u64>,
}

/// Delivers to one receiver at a time; keeps the connection and the token.
#[derive(Default)]
pub struct Courier {
    access: Option<Arc<Result<Access, String>>>,
    client: Option<Client>,
    token: Option<Token>,
}

impl Courier {
    /// Delivers once.
    ///
    /// # Errors
    /// Why not, for the operator.
    pub async fn deliver(&mut self, url: &str, offer: &Offer, parcel: &Parcel) -> Result<(), Failure> {
        let access = self.know(&offer.access);
        let access = access
            .as_ref()
            .as_ref()
            .map_err(|reason| Failure::Other(reason.clone()))?;
        let client = match &self.client {
            Some(client) => client.clone(),
            None => {
                let client = build(access).map_err(Failure::Other)?;
                self.client.insert(client).clone()
            }
        };
        let mut request = client
            .post(url)
            .header(CONTENT_TYPE, "application/json")
            .headers(headers(offer, parcel))
            .body(parcel.body.clone());
        if let Some(value) = self.proof(&client, access, url).await.map_err(Failure::Other)? {
            request = request.header(AUTHORIZATION, value);
        }
        let answer = request
            .send()
            .await
            .map_err(|error| Failure::Other(describe(&error)))?;
        match answer.status().is_success() {
            true => Ok(()),
            false => Err(meaning(url, &answer)),
        }
    }

    /// Forgets the token that was given out, for the receiver does not accept it. True if there was one.
    pub fn forget_token(&mut self) -> bool {
        self.token.take().is_some()
    }

    /// With other credentials it is another connection.
    fn know(&mut self, access: &Arc<Result<Access, String>>) -> Arc<Result<Access, String>> {
        if self
            .access
            .as_ref()
            .is_none_or(|known| !Arc::ptr_eq(known, access))
        {
            *self = Self {
                access: Some(access.clone()),
                ..Self::default()
            };
        }
        access.clone()
    }

    /// The `Authorization` header, with a token that holds.
    async fn proof(
        &mut self,
        client: &Client,
        access: &Access,
        url: &str,
    ) -> Result<Option<HeaderValue>, String> {
        match &access.proof {
            Proof::None | Proof::Certificate { .. } => return Ok(None),
            Proof::Bearer(token) => {
                let value = authorization("Bearer", token);
                return value
                    .map(Some)
                    .map_err(|reason| format!("report.auth.token_file: {reason}"));
            }
            Proof::Instance { .. } | Proof::ServiceAccount { .. } => {}
        }
        let now = Instant::now();
        if self.token.as_ref().is_none_or(|token| token.is_due(now)) {
            match renewed(client, &access.proof, url).await {
                Ok(token) => self.token = Some(token),
                // A token endpoint that is away for a moment is no reason to be silent.
                Err(reason) => {
                    if !self.token.as_ref().is_some_and(|token| token.holds(now)) {
                        return Err(reason);
                    }
                    tracing::debug!(reason, "the token is not renewed yet");
                }
            }
        }
        Ok(self.token.as_ref().map(Token::value))
    }
}

async fn renewed(client: &Client, proof: &Proof, url: &str) -> Result<Token, String> {
    match proof {
        Proof::Instance { platform, audience } => {
            let receiver = without_query(url);
            platform::identity(*platform, audience.as_deref().unwrap_or(&receiver)).await
        }
        Proof::ServiceAccount {
            key,
            token_url,
            audience,
        } => service_account::exchange(client, key, token_url, audience.as_deref()).await,
        Proof::None | Proof::Certificate { .. } | Proof::Bearer(_) => {
            Err("there is no token to renew".to_owned())
        }
    }
}

fn without_query(url: &str) -> String {
    match Url::parse(url) {
        Ok(mut parsed) => {
            parsed.set_query(None);
            parsed.set_fragment(None);
            parsed.into()
        }
        Err(_) => url.to_owned(),
    }
}

/// What lets the receiver put reports in order, take each change once, and see that some are missing.
fn headers(offer: &Offer, parcel: &Parcel) -> HeaderMap {
    let mut headers = HeaderMap::new();
    let sequence = parcel.change.unwrap_or(offer.last);
    let kind = if parcel.change.is_some() {
        "change"
    } else {
        "interval"
    };
    headers.insert("portcullis-report", HeaderValue::from_static(kind));
    headers.insert("portcullis-sequence", sequence.into());
    headers.insert("portcullis-dropped", offer.dropped.into());
    if let Ok(stream) = HeaderValue::from_str(&offer.stream) {
        headers.insert("portcullis-stream", stream);
    }
    if parcel.change.is_some() {
        // A structured string (draft-ietf-httpapi-idempotency-key-header). Hex and digits always fit.
        let key = format!("\"{}-{sequence}\"", offer.stream);
        if let Ok(key) = HeaderValue::from_str(&key) {
            headers.insert("idempotency-key", key);
        }
    }
    headers
}

fn meaning(url: &str, answer: &Response) -> Failure {
    let status = answer.status();
    let text = |name| {
        answer
            .headers()
            .get(name)
            .and_then(|value: &HeaderValue| value.to_str().ok())
    };
    let asked = text(RETRY_AFTER).and_then(|value| retry_after(value, text(DATE), SystemTime::now()));
    let said = format!("{} answered {status}", without_query(url));
    match (status, asked) {
        (StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE, Some(wait)) => Failure::Later(wait),
        (StatusCode::UNAUTHORIZED, _) => Failure::Unauthorized(said),
        (
            StatusCode::BAD_REQUEST
            | StatusCode::PAYLOAD_TOO_LARGE
            | StatusCode::UNSUPPORTED_MEDIA_TYPE
            | StatusCode::UNPROCESSABLE_ENTITY,
            _,
        ) => Failure::Refused(said),
        _ => Failure::Other(said),
    }
}

/// A client of the control plane with that TLS.
///
/// # Errors
/// When it can't be made.
pub fn with_tls(tls: ClientConfig) -> Result<Client, String> {
    Client::builder()
        .user_agent(concat!("portcullis/", env!("CARGO_PKG_VERSION")))
        .https_only(true)
        .timeout(REQUEST_TIME)
        .redirect(reqwest::redirect::Policy::none())
        .no_proxy()
        .pool_max_idle_per_host(1)
        .tls_backend_preconfigured(tls)
        .build()
        .map_err(|e| describe(&e))
}

/// A client that trusts and shows what it is given.
///
/// # Errors
/// What of it can't be used.
pub fn build(access: &Access) -> Result<Client, String> {
    let tls = client_config(access.authorities.as_deref(), access.shown(), access.time);
    with_tls(tls.map_err(|reason| format!("pushing reports: {reason}"))?)
}

/// A body, up to `limit` bytes.
///
/// # Errors
/// When it is larger, or can't be read.
pub async fn bounded_body(mut answer: Response, limit: usize) -> Result<Vec<u8>, String> {
    let mut body = Vec::new();
    while let Some(chunk) = answer.chunk().await.map_err(|e| describe(&e))? {
        if body.len() + chunk.len() > limit {
            return Err(format!("the answer is larger than {limit} bytes"));
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body)
}

/// The error with its causes: reqwest's own text stops at the first.
pub fn describe(error: &reqwest::Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        text.push_str(&format!(": {inner}"));
        cause = inner.source();
    }
    text
}

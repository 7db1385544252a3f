//! The control plane's side of enrolment: who may have a certificate, once, and who may have a new one.
//!
//! May not live here: HTTP, TLS; the control plane has its own. It hands over the body, and for a renewal the
//! certificates that the caller's TLS proved.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use portcullis_protocol::Secret;
use portcullis_protocol::enrolment::{ENROLMENT_VERSION, EnrolmentAnswer, EnrolmentRequest};
use portcullis_protocol::identity::{from_hex, to_hex};
use ring::hmac;
use rustls::pki_types::CertificateDer;
use serde::{Deserialize, Serialize};

use crate::Error;
use crate::ca::write_private;
use crate::client::PinnedIdentity;
use crate::instance_ca::{InstanceCa, SigningRequest, now, spki_sha256, verify};

/// How long a certificate lives unless another time is given; it is renewed after two thirds of it.
pub const DEFAULT_LIFETIME: Duration = Duration::from_secs(86_400);

/// How long the very same request gets the very same answer again: the first one may be lost on its way.
pub const RETRY_TIME: Duration = Duration::from_secs(600);

/// Why there is no certificate.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    /// The request is not proven: an unknown instance, another token, one that was used, a changed request. It
    /// is not said which (HTTP 403).
    #[error("the request is not proven")]
    NotProven,
    /// The request can't be understood (HTTP 400).
    #[error("{0}")]
    BadRequest(String),
    /// It is not the caller's fault (HTTP 500).
    #[error(transparent)]
    Failed(#[from] Error),
}

/// What is known of an instance.
#[derive(Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
enum Entry {
    /// It may enrol with this token.
    Expected { token: Secret },
    /// It did, with these keys. The token is gone; `request` is the MAC that it proved itself by.
    Enrolled {
        identity: PinnedIdentity,
        at: Timestamp,
        request: String,
        answer: EnrolmentAnswer,
    },
}

/// Enrols instances, each once per token. What it knows is in a folder: each change is on disk before it counts.
pub struct Registrar {
    ca: InstanceCa,
    file: PathBuf,
    lifetime: Duration,
    entries: Mutex<BTreeMap<String, Entry>>,
}

impl Registrar {
    /// Opens the registrar in `folder`, with its authority, or makes it there.
    ///
    /// # Errors
    /// When the folder can't be read or written, or what is in it is damaged.
    pub fn open_or_init(folder: &Path, lifetime: Duration) -> crate::Result<Self> {
        let ca = InstanceCa::open_or_init(folder)?;
        let file = folder.join("enrolments.json");
        let entries = match fs::read(&file) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map_err(|e| Error::Failed(format!("{}: damaged: {e}", file.display())))?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => BTreeMap::new(),
            Err(error) => return Err(Error::file("read", &file)(error)),
        };
        Ok(Self {
            ca,
            file,
            lifetime,
            entries: Mutex::new(entries),
        })
    }

    /// The authority's certificate, by which clients know enrolled instances, PEM.
    pub fn certificate_pem(&self) -> &str {
        self.ca.certificate_pem()
    }

    /// Lets an instance enrol with this token, which its spec has too. One that is enrolled already enrols anew.
    ///
    /// # Errors
    /// When that can't be kept, or the token is empty.
    pub fn expect(&self, instance: &str, token: Secret) -> crate::Result<()> {
        if token.is_empty() {
            return Err(Error::BadInput("an enrolment token can't be empty".into()));
        }
        self.set(&mut self.entries(), instance, Some(Entry::Expected { token }))
    }

    /// Ends what was expected of an instance, and its renewals.
    ///
    /// # Errors
    /// When that can't be kept.
    pub fn forget(&self, instance: &str) -> crate::Result<()> {
        self.set(&mut self.entries(), instance, None)
    }

    /// The keys that an enrolled instance has.
    pub fn identity(&self, instance: &str) -> Option<PinnedIdentity> {
        match self.entries().get(instance) {
            Some(Entry::Enrolled { identity, .. }) => Some(identity.clone()),
            _ => None,
        }
    }

    /// Answers a first request. The token is used up by it; the same request is answered the same for
    /// [`RETRY_TIME`].
    ///
    /// # Errors
    /// Why there is no certificate; nothing changed then.
    pub fn enrol(&self, request: &EnrolmentRequest) -> Result<EnrolmentAnswer, Refused> {
        let signing = check(request)?;
        let mut entries = self.entries();
        let nobody = Secret::new("");
        let (token, enrolled) = match entries.get(&request.instance) {
            Some(Entry::Expected { token }) => (Some(token.clone()), None),
            Some(enrolled) => (None, Some(enrolled.clone())),
            None => (None, None),
        };
        let mac = request.mac.as_deref().and_then(from_hex).unwrap_or_default();
        let key = mac_key(token.as_ref().unwrap_or(&nobody));
        // Computed for whomever, and compared in constant time.
        let is_proven = hmac::verify(&key, &request.message(), &mac).is_ok();
        if let Some(Entry::Enrolled {
            at,
            request: proven,
            answer,
            ..
        }) = enrolled
        {
            let is_retry = Timestamp::now().duration_since(at).unsigned_abs() <= RETRY_TIME;
            return match is_retry && proven == digest(request) {
                true => Ok(answer),
                false => Err(Refused::NotProven),
            };
        }
        let Some(token) = token.filter(|_| is_proven) else {
            return Err(Refused::NotProven);
        };
        let chain = self
            .ca
            .issue(&request.instance, &request.nonce, &signing, self.lifetime)?;
        let mac = hmac::sign(&mac_key(&token), &request.answer_message(&chain));
        let mac = Some(to_hex(mac.as_ref()));
        let answer = EnrolmentAnswer { chain, mac };
        let enrolled = Entry::Enrolled {
            identity: PinnedIdentity {
                tls_spki_sha256: signing.spki_sha256(),
                host_keys: request.host_keys.clone(),
            },
            at: Timestamp::now(),
            request: digest(request),
            answer: answer.clone(),
        };
        self.set(&mut entries, &request.instance, Some(enrolled))?;
        Ok(answer)
    }

    /// Answers a renewal. `caller` are the certificates of the connection that it came over, the caller's first:
    /// TLS proved that it has the key. They are checked here, whatever TLS made of them.
    ///
    /// # Errors
    /// Why there is no certificate.
    pub fn renew(
        &self,
        caller: &[CertificateDer<'_>],
        request: &EnrolmentRequest,
    ) -> Result<EnrolmentAnswer, Refused> {
        let signing = check(request)?;
        let (leaf, rest) = caller.split_first().ok_or(Refused::NotProven)?;
        verify(self.certificate_pem(), &request.instance, leaf, rest, now())
            .map_err(|_| Refused::NotProven)?;
        let spki = spki_sha256(leaf).map_err(|_| Refused::NotProven)?;
        let known = self.identity(&request.instance).ok_or(Refused::NotProven)?;
        if spki != signing.spki_sha256() || spki != known.tls_spki_sha256 {
            return Err(Refused::NotProven);
        }
        let chain = self
            .ca
            .issue(&request.instance, &request.nonce, &signing, self.lifetime)?;
        Ok(EnrolmentAnswer { chain, mac: None })
    }

    fn entries(&self) -> MutexGuard<'_, BTreeMap<String, Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// On disk first: a token that was used is never unused again.
    fn set(
        &self,
        entries: &mut BTreeMap<String, Entry>,
        instance: &str,
        entry: Option<Entry>,
    ) -> crate::Result<()> {
        let mut new = entries.clone();
        match entry {
            Some(entry) => new.insert(instance.to_owned(), entry),
            None => new.remove(instance),
        };
        let text = serde_json::to_string_pretty(&new).map_err(|e| Error::Failed(e.to_string()))?;
        write_private(&self.file, &text)?;
        *entries = new;
        Ok(())
    }
}

/// What is wrong whoever asks.
fn check(request: &EnrolmentRequest) -> Result<SigningRequest, Refused> {
    if request.version != ENROLMENT_VERSION {
        return Err(Refused::BadRequest(format!(
            "version: {} is not known, only {ENROLMENT_VERSION} is",
            request.version
        )));
    }
    for key in request.host_keys.iter().filter(|key| key.key.is_some()) {
        // The MAC is over fingerprints.
        key.verified_key().map_err(Refused::BadRequest)?;
    }
    SigningRequest::from_pem(&request.csr).map_err(|e| Refused::BadRequest(e.to_string()))
}

/// One request, known again.
fn digest(request: &EnrolmentRequest) -> String {
    use sha2::Digest as _;
    let mac = request.mac.as_deref().unwrap_or_default();
    to_hex(&sha2::Sha256::digest(
        [&request.message(), mac.as_bytes()].concat(),
    ))
}

fn mac_key(token: &Secret) -> hmac::Key {
    hmac::Key::new(hmac::HMAC_SHA256, token.expose().as_bytes())
}

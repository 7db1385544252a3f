//! Who the instance is, and who may ask it: the TLS key that never leaves it, and the proof that
//! binds it to the enrolment token.
//!
//! May not live here: HTTP, sockets.

pub mod caller;
pub mod certificate;
pub mod client;
pub mod expiry;
pub mod server;
pub mod time;

use std::io;
use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use portcullis_protocol::Secret;
use portcullis_protocol::identity::{Identity, to_hex};
use portcullis_protocol::report::HostKey;
use rcgen::{CertificateParams, KeyPair, PublicKeyData};
use rustls::RootCertStore;
use rustls::crypto::WebPkiSupportedAlgorithms;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{self, CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use tracing::warn;

use crate::log::id;
use crate::system::{documents, files};
use certificate::{Certified, Expected, Kept};
use time::ProvenClock;

const KEY_FILE: &str = "tls.key";
const CERTIFICATE_FILE: &str = "tls.crt";
const CERTIFIED_FILE: &str = "enrolled.json";
/// A P-256 key and its certificate take under 1 kB each.
const MAX_FILE: usize = 64 << 10;

/// Makes ring the one TLS provider of the process. May be called more than once.
pub fn install_tls_provider() {
    // An error only says that it is installed already.
    let _ = rustls::crypto::ring::default_provider().install_default();
}

/// The instance's TLS identity.
pub struct TlsIdentity {
    key: PrivateKeyDer<'static>,
    certificate: CertificateDer<'static>,
    /// SHA-256 of the SubjectPublicKeyInfo, lower-case hex: what callers pin.
    pub spki_sha256: String,
    clock: Arc<ProvenClock>,
    /// What the instances' authority gave for it.
    certified: RwLock<Option<Certified>>,
}

impl TlsIdentity {
    /// Loads the identity that the state folder holds, or that of a key that the owner gives (PKCS#8 in PEM), whose
    /// certificate is there; `None` if there is none yet.
    ///
    /// # Errors
    /// When it can't be read, or is damaged; the message names the file.
    pub fn load(state: &Path, given: Option<&Secret>) -> io::Result<Option<Self>> {
        let Some(pair) = known_pair(state, given)? else {
            return Ok(None);
        };
        let certificate_file = state.join(CERTIFICATE_FILE);
        let pem = files::read(&certificate_file, MAX_FILE).map_err(|e| named(&certificate_file, &e))?;
        let Some(pem) = pem else { return Ok(None) };
        let certificate = CertificateDer::from_pem_slice(&pem).map_err(|e| named(&certificate_file, &e))?;
        let identity = Self::new(&pair, certificate);
        // The owner took a key away, or gave one: it is another one's.
        let is_its = certificate::is_of_key(&identity.certificate, &identity.spki_sha256);
        Ok(is_its.then(|| identity.load_certified(state)))
    }

    /// Loads the identity as [`Self::load`] does, or makes one in the state folder: its key never leaves the
    /// instance. One that is given is not written there.
    ///
    /// # Errors
    /// When it can't be read or written. A key that is there and unusable is an error, not
    /// replaced: callers have pinned it.
    pub fn load_or_create(state: &Path, given: Option<&Secret>) -> io::Result<Self> {
        if let Some(identity) = Self::load(state, given)? {
            return Ok(identity);
        }
        let (key_file, certificate_file) = (state.join(KEY_FILE), state.join(CERTIFICATE_FILE));
        let pair = match known_pair(state, given)? {
            // The key was made and the power went before the certificate was written; or it is given.
            Some(pair) => pair,
            None => {
                let pair = KeyPair::generate().map_err(io::Error::other)?;
                let pem = zeroize::Zeroizing::new(pair.serialize_pem());
                files::replace(&key_file, pem.as_bytes(), 0o600).map_err(|e| named(&key_file, &e))?;
                pair
            }
        };
        let certificate = self_signed(&pair).map_err(io::Error::other)?;
        files::replace(&certificate_file, certificate.pem().as_bytes(), 0o644)
            .map_err(|e| named(&certificate_file, &e))?;
        Ok(Self::new(&pair, certificate.der().clone()).load_certified(state))
    }

    /// An identity that ends with the process, for when nothing can be written.
    ///
    /// # Errors
    /// When no key can be made.
    pub fn in_memory() -> Result<Self, rcgen::Error> {
        let pair = KeyPair::generate()?;
        Ok(Self::new(&pair, self_signed(&pair)?.der().clone()))
    }

    fn new(pair: &KeyPair, certificate: CertificateDer<'static>) -> Self {
        let spki = ring::digest::digest(&ring::digest::SHA256, &pair.subject_public_key_info());
        Self {
            key: PrivatePkcs8KeyDer::from(pair.serialize_der()).into(),
            certificate,
            spki_sha256: to_hex(spki.as_ref()),
            clock: Arc::default(),
            certified: RwLock::default(),
        }
    }

    /// The certificate of the instances' authority, if this instance has one.
    pub fn certified(&self, instance: &str) -> Option<Certified> {
        let certified = self.certified.read().unwrap_or_else(PoisonError::into_inner);
        certified
            .clone()
            .filter(|certified| certified.instance == instance)
    }

    /// Keeps a certificate, durably, and uses it from now on.
    ///
    /// # Errors
    /// When it can't be written; then the old one is used.
    pub fn certify(&self, state: &Path, certified: Certified) -> io::Result<()> {
        let kept = Kept {
            instance: certified.instance.clone(),
            chain: certified.pem.clone(),
        };
        let file = state.join(CERTIFIED_FILE);
        documents::save(&file, &kept).map_err(|e| named(&file, &e))?;
        *self.certified.write().unwrap_or_else(PoisonError::into_inner) = Some(certified);
        Ok(())
    }

    /// Writes it where the folder has no key: one that is there is left alone, whatever it is.
    ///
    /// # Errors
    /// When it can't be written, or it can't be told whether one is there.
    pub fn keep(&self, state: &Path) -> io::Result<()> {
        let key_file = state.join(KEY_FILE);
        if key_file.try_exists().map_err(|e| named(&key_file, &e))? {
            return Ok(());
        }
        let (certificate, key) = self.client_pem();
        let certified = self
            .certified
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        if let Some(certified) = certified {
            self.certify(state, certified)?;
        }
        let certificate_file = state.join(CERTIFICATE_FILE);
        files::replace(&certificate_file, certificate.as_bytes(), 0o644)
            .map_err(|e| named(&certificate_file, &e))?;
        files::replace(&key_file, key.expose().as_bytes(), 0o600).map_err(|e| named(&key_file, &e))
    }

    /// A signing request by the key, PEM: the key stays here.
    ///
    /// # Errors
    /// When there is no randomness.
    pub fn signing_request(&self) -> Result<String, rcgen::Error> {
        let pair = KeyPair::try_from(self.key.secret_der())?;
        let request = CertificateParams::default().serialize_request(&pair)?;
        request.pem()
    }

    /// What an earlier process was given. One that can't be read is asked for again, some day: a new token.
    fn load_certified(self, state: &Path) -> Self {
        let file = state.join(CERTIFIED_FILE);
        let read = || -> Result<Option<Certified>, String> {
            let Some(kept) = documents::load::<Kept>(&file, MAX_FILE).map_err(|e| e.to_string())? else {
                return Ok(None);
            };
            let any = Expected::default();
            Certified::new(&kept.chain, &kept.instance, &self.spki_sha256, any).map(Some)
        };
        match read() {
            Ok(certified) => {
                if let Some(certified) = &certified {
                    self.clock.not_before(certified.issued());
                }
                *self.certified.write().unwrap_or_else(PoisonError::into_inner) = certified;
            }
            Err(reason) => {
                let file = file.display();
                warn!(
                    MESSAGE_ID = id::DEGRADED,
                    REASON = reason,
                    "{file}: {reason}: it is not used"
                );
            }
        }
        self
    }

    /// The time by which certificates are judged.
    pub fn clock(&self) -> &ProvenClock {
        &self.clock
    }

    /// The certificates that callers are shown, PEM: those of the instances' authority, if it certified this
    /// instance.
    pub fn shown_chain(&self, instance: Option<&str>) -> String {
        let certified = instance.and_then(|instance| self.certified(instance));
        certified.map_or_else(
            || pem("CERTIFICATE", &self.certificate),
            |certified| certified.pem,
        )
    }

    /// The key, PKCS#8 in PEM.
    pub fn key_pem(&self) -> Secret {
        let text = zeroize::Zeroizing::new(pem("PRIVATE KEY", self.key.secret_der()));
        Secret::new(text.as_str())
    }

    /// Our certificates, for a connection to ourselves.
    pub fn certificates(&self) -> Vec<CertificateDer<'static>> {
        let certified = self.certified.read().unwrap_or_else(PoisonError::into_inner);
        let certified = certified.iter().flat_map(|certified| certified.chain.first());
        certified.chain([&self.certificate]).cloned().collect()
    }

    /// The certificate and its key as PEM, for a connection in which the instance is the client.
    pub fn client_pem(&self) -> (String, Secret) {
        (pem("CERTIFICATE", &self.certificate), self.key_pem())
    }

    /// The identity document for a caller's nonce, bound by the enrolment token.
    pub fn document(&self, instance: &str, host_keys: &[HostKey], nonce: &str, token: &Secret) -> Identity {
        let mut identity = Identity {
            instance: instance.to_owned(),
            tls_spki_sha256: self.spki_sha256.clone(),
            host_keys: host_keys.to_vec(),
            nonce: nonce.to_owned(),
            mac: String::new(),
            challenge: None,
        };
        let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, token.expose().as_bytes());
        identity.mac = to_hex(ring::hmac::sign(&key, &identity.message()).as_ref());
        identity
    }
}

/// The key that is given, or else that of the state folder.
fn known_pair(state: &Path, given: Option<&Secret>) -> io::Result<Option<KeyPair>> {
    if let Some(given) = given {
        let pair = KeyPair::from_pem(given.expose());
        return pair
            .map(Some)
            .map_err(|e| io::Error::other(format!("the credential: {e}")));
    }
    let file = state.join(KEY_FILE);
    let pem = files::read(&file, MAX_FILE).map_err(|e| named(&file, &e))?;
    let pair = pem.map(|pem| KeyPair::from_pem(&String::from_utf8_lossy(&pem)));
    pair.transpose().map_err(|e| named(&file, &e))
}

fn pem(label: &str, der: &[u8]) -> String {
    let base64 = STANDARD.encode(der);
    format!("-----BEGIN {label}-----\n{base64}\n-----END {label}-----\n")
}

/// The algorithms by which signatures are checked.
fn algorithms() -> WebPkiSupportedAlgorithms {
    rustls::crypto::ring::default_provider().signature_verification_algorithms
}

fn named(file: &Path, error: &dyn std::fmt::Display) -> io::Error {
    io::Error::other(format!("{}: {error}", file.display()))
}

/// Valid for as long as dates can be written: callers trust the pin, not the clock, which may be
/// wrong at first boot.
fn self_signed(pair: &KeyPair) -> Result<rcgen::Certificate, rcgen::Error> {
    let mut params = CertificateParams::new(vec!["portcullis".to_owned()])?;
    params
        .distinguished_name
        .push(rcgen::DnType::CommonName, "portcullis");
    params.not_before = rcgen::date_time_ymd(1975, 1, 1);
    params.not_after = rcgen::date_time_ymd(4096, 1, 1);
    params.self_signed(pair)
}

/// A chain and its key from PEM.
fn pair(
    chain: &str,
    key: &Secret,
) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), pki_types::pem::Error> {
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(chain.as_bytes()).collect();
    Ok((chain?, PrivateKeyDer::from_pem_slice(key.expose().as_bytes())?))
}

/// Authorities from PEM.
fn roots(pem: &str) -> Result<RootCertStore, String> {
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(pem.as_bytes()) {
        let certificate = certificate.map_err(|e| format!("{e:?}"))?;
        roots.add(certificate).map_err(|e| e.to_string())?;
    }
    match roots.is_empty() {
        true => Err("there is no PEM certificate in it".to_owned()),
        false => Ok(roots),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_key_is_made_once_and_kept() {
        install_tls_provider();
        let state = tempfile::tempdir().unwrap();
        let first = TlsIdentity::load_or_create(state.path(), None).unwrap();
        let second = TlsIdentity::load_or_create(state.path(), None).unwrap();
        assert_eq!(first.spki_sha256, second.spki_sha256);
        assert_eq!(first.certificate, second.certificate);
    }

    #[test]
    fn a_key_that_is_given_is_used_and_not_written() {
        install_tls_provider();
        let state = tempfile::tempdir().unwrap();
        let pair = KeyPair::generate().unwrap();
        let given = Secret::new(pair.serialize_pem());
        let first = TlsIdentity::load_or_create(state.path(), Some(&given)).unwrap();
        let second = TlsIdentity::load_or_create(state.path(), Some(&given)).unwrap();
        assert_eq!(first.key.secret_der(), pair.serialize_der());
        assert_eq!(first.certificate, second.certificate);
        assert!(!state.path().join(KEY_FILE).exists());
        // Taken away, it is another identity, with its own certificate; and back again.
        let own = TlsIdentity::load_or_create(state.path(), None).unwrap();
        assert_ne!(own.spki_sha256, first.spki_sha256);
        assert!(certificate::is_of_key(&own.certificate, &own.spki_sha256));
        assert!(TlsIdentity::load(state.path(), Some(&given)).unwrap().is_none());
        let back = TlsIdentity::load_or_create(state.path(), Some(&given)).unwrap();
        assert_eq!(back.spki_sha256, first.spki_sha256);
        let bad = Secret::new("s3cret");
        let error = TlsIdentity::load_or_create(state.path(), Some(&bad))
            .err()
            .unwrap()
            .to_string();
        assert!(
            error.contains("the credential") && !error.contains("s3cret"),
            "{error}"
        );
    }

    #[test]
    fn a_damaged_key_is_an_error_that_names_it() {
        let state = tempfile::tempdir().unwrap();
        std::fs::write(state.path().join(KEY_FILE), "nonsense").unwrap();
        let error = TlsIdentity::load_or_create(state.path(), None)
            .err()
            .unwrap()
            .to_string();
        assert!(error.contains("tls.key"), "{error}");
        assert_eq!(
            std::fs::read_to_string(state.path().join(KEY_FILE)).unwrap(),
            "nonsense"
        );
    }

    #[test]
    fn the_mac_depends_on_token_and_nonce() {
        let state = tempfile::tempdir().unwrap();
        let identity = TlsIdentity::load_or_create(state.path(), None).unwrap();
        let mac = |nonce: &str, token: &str| identity.document("i", &[], nonce, &Secret::new(token)).mac;
        assert_eq!(mac("n", "t"), mac("n", "t"));
        assert_ne!(mac("n", "t"), mac("m", "t"));
        assert_ne!(mac("n", "t"), mac("n", "u"));
    }
}

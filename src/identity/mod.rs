//! Who the instance is, and who may ask it: the TLS key that never leaves it, and the proof that
//! binds it to the enrolment token.
//!
//! May not live here: HTTP, sockets.

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use portcullis_protocol::Secret;
use portcullis_protocol::identity::{Identity, to_hex};
use portcullis_protocol::report::HostKey;
use rcgen::{CertificateParams, KeyPair, PublicKeyData};
use rustls::RootCertStore;
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use rustls::version::{TLS12, TLS13};

use crate::channel::Setup;
use crate::system::files;

const KEY_FILE: &str = "tls.key";
const CERTIFICATE_FILE: &str = "tls.crt";
/// A P-256 key and its certificate take under 1 kB each.
const MAX_FILE: usize = 64 << 10;

/// Makes ring the one TLS provider of the process. May be called more than once.
pub fn install_tls_provider() {
    // An error only says that it is installed already.
    let _ = rustls::crypto::ring::default_provider().install_default();
}

/// The instance's TLS identity.
pub struct TlsIdentity {
    key: Secret,
    /// The certificate as PEM.
    pem: String,
    certificate: CertificateDer<'static>,
    /// SHA-256 of the SubjectPublicKeyInfo, lower-case hex: what callers pin.
    pub spki_sha256: String,
}

impl TlsIdentity {
    /// Loads the identity that the state folder holds; `None` if there is none yet.
    ///
    /// # Errors
    /// When it can't be read, or is damaged; the message names the file.
    pub fn load(state: &Path) -> io::Result<Option<Self>> {
        let key_file = state.join(KEY_FILE);
        let Some(pem) = files::read(&key_file, MAX_FILE).map_err(|e| named(&key_file, &e))? else {
            return Ok(None);
        };
        let pair = KeyPair::from_pem(&String::from_utf8_lossy(&pem)).map_err(|e| named(&key_file, &e))?;
        let certificate_file = state.join(CERTIFICATE_FILE);
        let pem = files::read(&certificate_file, MAX_FILE).map_err(|e| named(&certificate_file, &e))?;
        let Some(pem) = pem else { return Ok(None) };
        let certificate = CertificateDer::from_pem_slice(&pem).map_err(|e| named(&certificate_file, &e))?;
        let pem = String::from_utf8_lossy(&pem).into_owned();
        Ok(Some(Self::new(&pair, certificate, pem)))
    }

    /// Loads the identity from the state folder, or makes one there: its key never leaves the
    /// instance.
    ///
    /// # Errors
    /// When it can't be read or written. A key that is there and unusable is an error, not
    /// replaced: callers have pinned it.
    pub fn load_or_create(state: &Path) -> io::Result<Self> {
        if let Some(identity) = Self::load(state)? {
            return Ok(identity);
        }
        let (key_file, certificate_file) = (state.join(KEY_FILE), state.join(CERTIFICATE_FILE));
        let pair = match files::read(&key_file, MAX_FILE).map_err(|e| named(&key_file, &e))? {
            // The key was made and the power went before the certificate was written.
            Some(pem) => {
                KeyPair::from_pem(&String::from_utf8_lossy(&pem)).map_err(|e| named(&key_file, &e))?
            }
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
        Ok(Self::new(&pair, certificate.der().clone(), certificate.pem()))
    }

    /// An identity that ends with the process, for when nothing can be written.
    ///
    /// # Errors
    /// When no key can be made.
    pub fn in_memory() -> Result<Self, rcgen::Error> {
        let pair = KeyPair::generate()?;
        let certificate = self_signed(&pair)?;
        Ok(Self::new(&pair, certificate.der().clone(), certificate.pem()))
    }

    fn new(pair: &KeyPair, certificate: CertificateDer<'static>, pem: String) -> Self {
        let spki = ring::digest::digest(&ring::digest::SHA256, &pair.subject_public_key_info());
        Self {
            key: Secret::new(pair.serialize_pem()),
            pem,
            certificate,
            spki_sha256: to_hex(spki.as_ref()),
        }
    }

    /// How the endpoint is to be, for the process that has it.
    pub fn setup(&self, listen: SocketAddr, client_ca: Option<&str>) -> Setup {
        Setup {
            listen,
            key: self.key.clone(),
            certificates: self.pem.clone(),
            client_ca: client_ca.map(str::to_owned),
        }
    }

    /// The certificate, for a connection to ourselves.
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// The identity document for a caller's nonce, bound by the enrolment token.
    pub fn document(&self, instance: &str, host_keys: &[HostKey], nonce: &str, token: &Secret) -> Identity {
        let mut identity = Identity {
            instance: instance.to_owned(),
            tls_spki_sha256: self.spki_sha256.clone(),
            host_keys: host_keys.to_vec(),
            nonce: nonce.to_owned(),
            mac: String::new(),
        };
        let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, token.expose().as_bytes());
        identity.mac = to_hex(ring::hmac::sign(&key, &identity.message()).as_ref());
        identity
    }
}

/// The TLS server: 1.3 preferred, 1.2 the floor (BREV-DATA-2). With an authority, callers may show a
/// certificate of it; one of another authority ends the handshake.
///
/// # Errors
/// When the key and the certificates (PEM) are no usable pair, or the authority is none.
pub fn server_config(
    key: &Secret,
    certificates: &str,
    client_ca: Option<&str>,
) -> Result<Arc<ServerConfig>, String> {
    let unusable = |e: &dyn std::fmt::Display| format!("the TLS key of the state folder can't be used: {e}");
    let key = PrivateKeyDer::from_pem_slice(key.expose().as_bytes()).map_err(|e| unusable(&e))?;
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(certificates.as_bytes()).collect();
    let builder = ServerConfig::builder_with_protocol_versions(&[&TLS13, &TLS12]);
    let builder = match client_verifier(client_ca)? {
        Some(verifier) => builder.with_client_cert_verifier(verifier),
        None => builder.with_no_client_auth(),
    };
    let mut config = builder
        .with_single_cert(chain.map_err(|e| unusable(&e))?, key)
        .map_err(|e| unusable(&e))?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

/// Judges callers' certificates; `None` without an authority. A caller may have none.
///
/// # Errors
/// When `client_ca` of the spec is no usable certificate.
pub fn client_verifier(client_ca: Option<&str>) -> Result<Option<Arc<dyn ClientCertVerifier>>, String> {
    let Some(pem) = client_ca else { return Ok(None) };
    WebPkiClientVerifier::builder(Arc::new(roots(pem)?))
        .allow_unauthenticated()
        .build()
        .map(Some)
        .map_err(|e| format!("control_plane.client_ca: {e}"))
}

/// Whether a chain that a caller showed leads to the authority now.
///
/// # Errors
/// Why not, for the operator.
pub fn verify_chain(verifier: &dyn ClientCertVerifier, chain: &[Vec<u8>]) -> Result<(), String> {
    let chain: Vec<CertificateDer<'_>> = chain.iter().map(|der| der.as_slice().into()).collect();
    let Some((certificate, others)) = chain.split_first() else {
        return Err("there is no certificate".to_owned());
    };
    verifier
        .verify_client_cert(certificate, others, UnixTime::now())
        .map(drop)
        .map_err(|e| e.to_string())
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

fn roots(pem: &str) -> Result<RootCertStore, String> {
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(pem.as_bytes()) {
        let certificate = certificate.map_err(|e| format!("control_plane.client_ca: {e:?}"))?;
        roots
            .add(certificate)
            .map_err(|e| format!("control_plane.client_ca: {e}"))?;
    }
    if roots.is_empty() {
        return Err("control_plane.client_ca: there is no PEM certificate in it".to_owned());
    }
    Ok(roots)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_key_is_made_once_and_kept() {
        install_tls_provider();
        let state = tempfile::tempdir().unwrap();
        let first = TlsIdentity::load_or_create(state.path()).unwrap();
        let second = TlsIdentity::load_or_create(state.path()).unwrap();
        assert_eq!(first.spki_sha256, second.spki_sha256);
        assert_eq!(first.certificate, second.certificate);
        let setup = first.setup("127.0.0.1:1".parse().unwrap(), None);
        assert!(server_config(&setup.key, &setup.certificates, None).is_ok());
    }

    #[test]
    fn a_damaged_key_is_an_error_that_names_it() {
        let state = tempfile::tempdir().unwrap();
        std::fs::write(state.path().join(KEY_FILE), "nonsense").unwrap();
        let error = TlsIdentity::load_or_create(state.path())
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
        let identity = TlsIdentity::load_or_create(state.path()).unwrap();
        let mac = |nonce: &str, token: &str| identity.document("i", &[], nonce, &Secret::new(token)).mac;
        assert_eq!(mac("n", "t"), mac("n", "t"));
        assert_ne!(mac("n", "t"), mac("m", "t"));
        assert_ne!(mac("n", "t"), mac("n", "u"));
    }

    #[test]
    fn a_bad_authority_is_an_error_that_names_the_field() {
        install_tls_provider();
        let error = client_verifier(Some("x")).err().unwrap();
        assert!(error.contains("control_plane.client_ca"), "{error}");
    }

    #[test]
    fn a_chain_is_verified_by_the_authority_alone() {
        install_tls_provider();
        let authority = |name: &str| {
            let key = KeyPair::generate().unwrap();
            let mut params = CertificateParams::new(Vec::new()).unwrap();
            params.distinguished_name.push(rcgen::DnType::CommonName, name);
            params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
            let certificate = params.self_signed(&key).unwrap();
            (certificate.pem(), rcgen::Issuer::new(params, key))
        };
        let (ours, issuer) = authority("ours");
        // The name does not make it the same one.
        let (_, impostor) = authority("ours");
        let verifier = client_verifier(Some(&ours)).unwrap().unwrap();
        let issued = |by: &rcgen::Issuer<'_, KeyPair>, not_after: i32| {
            let key = KeyPair::generate().unwrap();
            let mut params = CertificateParams::new(Vec::new()).unwrap();
            params.not_after = rcgen::date_time_ymd(not_after, 1, 1);
            vec![params.signed_by(&key, by).unwrap().der().to_vec()]
        };
        assert_eq!(verify_chain(&*verifier, &issued(&issuer, 4000)), Ok(()));
        for (what, chain) in [
            ("of another authority", issued(&impostor, 4000)),
            ("expired", issued(&issuer, 2001)),
            ("none", vec![]),
            ("no certificate", vec![b"nonsense".to_vec()]),
        ] {
            assert!(verify_chain(&*verifier, &chain).is_err(), "{what}");
        }
    }
}

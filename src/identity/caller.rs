//! What a caller's certificates prove: that the spec's authority vouches for it now, and what it says of
//! itself.
//!
//! May not live here: what it may do with that (`policy::access`).

use std::sync::Arc;
use std::time::Duration;

use portcullis_protocol::control::HandshakeRefusal;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use rustls::{CertificateError, Error};
use x509_parser::prelude::{FromDer, GeneralName, ParsedExtension, X509Certificate};

use crate::policy::access::{Certificate, Denial};
use crate::policy::audit::clean;

/// Most bytes of a subject that are told: it is the caller's text.
const MAX_SUBJECT: usize = 200;

/// The authority of a spec.
pub struct Authority {
    /// As the spec has it.
    pub pem: String,
    verifier: Arc<dyn ClientCertVerifier>,
}

impl Authority {
    /// From the spec's `client_ca`.
    ///
    /// # Errors
    /// When it is no usable certificate; the message names the field.
    pub fn new(pem: &str) -> Result<Self, String> {
        let unusable = |reason: String| format!("control_plane.client_ca: {reason}");
        let roots = Arc::new(super::roots(pem).map_err(unusable)?);
        let verifier = WebPkiClientVerifier::builder(roots).build();
        Ok(Self {
            pem: pem.to_owned(),
            verifier: verifier.map_err(|e| unusable(e.to_string()))?,
        })
    }

    /// Verifies a caller's certificate at a time, in seconds since 1970: its signatures up to the
    /// authority, its dates, and that it is for clients (RFC 5280 section 6). `chain` is DER, the caller's
    /// own first.
    ///
    /// # Errors
    /// Why it is not let in.
    pub fn verify(&self, chain: &[Vec<u8>], now: i64) -> Result<Certificate, Denial> {
        let chain: Vec<CertificateDer<'_>> = chain
            .iter()
            .map(|der| CertificateDer::from(der.as_slice()))
            .collect();
        let (own, between) = chain.split_first().ok_or(Denial::Authority)?;
        let now = UnixTime::since_unix_epoch(Duration::from_secs(now.try_into().unwrap_or(0)));
        let verified = self.verifier.verify_client_cert(own, between, now);
        verified.map_err(|error| {
            let refusal = handshake_refusal(&error).unwrap_or(HandshakeRefusal::Authority);
            Denial::from(refusal)
        })?;
        read(own)
    }
}

/// What TLS's error says of a caller's certificate; none if it says nothing of it.
pub fn handshake_refusal(error: &Error) -> Option<HandshakeRefusal> {
    use CertificateError::{Expired, ExpiredContext, NotValidYet, NotValidYetContext};
    let Error::InvalidCertificate(error) = error else {
        return None;
    };
    Some(match error {
        Expired | ExpiredContext { .. } => HandshakeRefusal::Expired,
        NotValidYet | NotValidYetContext { .. } => HandshakeRefusal::NotYetValid,
        _ => HandshakeRefusal::Authority,
    })
}

/// What a certificate says, DER. It is not verified by this.
///
/// # Errors
/// When it can't be read.
pub fn read(der: &[u8]) -> Result<Certificate, Denial> {
    let (_, certificate) = X509Certificate::from_der(der).map_err(|_| Denial::Authority)?;
    let mut uris = Vec::new();
    // All of them, whatever the library makes of an extension that stands there twice.
    for extension in certificate.extensions() {
        if let ParsedExtension::SubjectAlternativeName(names) = extension.parsed_extension() {
            uris.extend(names.general_names.iter().filter_map(|name| match name {
                GeneralName::URI(uri) => Some((*uri).to_owned()),
                _ => None,
            }));
        }
    }
    let subject = certificate.subject().to_string();
    let validity = certificate.validity();
    Ok(Certificate {
        subject: clean(&subject, MAX_SUBJECT),
        serial: certificate.raw_serial_as_string(),
        uris,
        not_before: validity.not_before.timestamp(),
        not_after: validity.not_after.timestamp(),
    })
}

#[cfg(test)]
mod tests {
    use portcullis_provision::ca::{Ca, DEFAULT_LIFETIME};
    use rustls::pki_types::pem::PemObject;

    use super::*;

    fn der(pem: &str) -> Vec<u8> {
        CertificateDer::from_pem_slice(pem.as_bytes()).unwrap().to_vec()
    }

    #[test]
    fn only_the_specs_authority_vouches_and_only_for_now() {
        super::super::install_tls_provider();
        let folder = tempfile::tempdir().unwrap();
        let ca = Ca::init(&folder.path().join("one")).unwrap();
        let other = Ca::init(&folder.path().join("other")).unwrap();
        let chain = [der(&ca
            .issue("somebody", DEFAULT_LIFETIME)
            .unwrap()
            .certificate_pem)];
        let authority = Authority::new(ca.certificate_pem()).unwrap();
        let now = jiff::Timestamp::now().as_second();
        let read = authority.verify(&chain, now).unwrap();
        assert_eq!(read.subject, "CN=somebody");
        assert_eq!(read.uris, ["urn:portcullis:role:operator"]);
        assert!(!read.serial.is_empty());
        let refused = |chain: &[Vec<u8>], now| authority.verify(chain, now).unwrap_err();
        assert_eq!(refused(&chain, now + 3602), Denial::Expired);
        assert_eq!(refused(&chain, now - 302), Denial::NotYetValid);
        assert_eq!(refused(&chain, -1), Denial::NotYetValid);
        assert_eq!(refused(&[], now), Denial::Authority);
        assert_eq!(refused(&[vec![0x30, 0x00]], now), Denial::Authority);
        let foreign = other.issue("somebody", DEFAULT_LIFETIME).unwrap();
        let foreign = der(&foreign.certificate_pem);
        assert_eq!(refused(std::slice::from_ref(&foreign), now), Denial::Authority);
        // The other authority's certificate may be shown as well: it is not trusted for that.
        let with = [foreign, der(other.certificate_pem())];
        assert_eq!(refused(&with, now), Denial::Authority);
        // The authority itself is no caller.
        let own = [der(ca.certificate_pem())];
        assert_eq!(refused(&own, now), Denial::Authority);
    }

    #[test]
    fn a_flipped_bit_is_no_certificate_of_the_authority() {
        super::super::install_tls_provider();
        let folder = tempfile::tempdir().unwrap();
        let ca = Ca::init(folder.path()).unwrap();
        let good = der(&ca.issue("somebody", DEFAULT_LIFETIME).unwrap().certificate_pem);
        let authority = Authority::new(ca.certificate_pem()).unwrap();
        let now = jiff::Timestamp::now().as_second();
        assert!(authority.verify(std::slice::from_ref(&good), now).is_ok());
        for place in 0..good.len() {
            let mut bad = good.clone();
            bad[place] ^= 1;
            assert!(authority.verify(&[bad], now).is_err(), "{place}");
        }
    }

    #[test]
    fn a_subject_is_one_printable_line_and_not_long() {
        for (name, expected) in [
            ("cp\n\u{1b}[1m", "CN=cp\\n\\u{1b}[1m".to_owned()),
            ("O'Brien \"x\"", "CN=O'Brien \"x\"".to_owned()),
            (&"a".repeat(300), format!("CN={}…", "a".repeat(MAX_SUBJECT - 6))),
        ] {
            let mut params = rcgen::CertificateParams::default();
            params.distinguished_name = rcgen::DistinguishedName::new();
            params.distinguished_name.push(rcgen::DnType::CommonName, name);
            let key = rcgen::KeyPair::generate().unwrap();
            let certificate = params.self_signed(&key).unwrap();
            assert_eq!(read(certificate.der()).unwrap().subject, expected);
        }
    }

    proptest::proptest! {
        #[test]
        fn nothing_written_by_a_stranger_panics(der in proptest::collection::vec(0u8..=255, 0..400)) {
            let _ = read(&der);
        }
    }
}

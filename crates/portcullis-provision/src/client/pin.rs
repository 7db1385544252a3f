//! Trust in one key: the certificate's key is compared with the pinned one, and the handshake has
//! to be signed by it. Names, dates and issuers don't matter. Or trust in the instances' authority: it
//! certified the key for that instance, and the certificate holds. Or both.
//!
//! May not live here: how a key comes to be pinned.

use std::sync::{Mutex, PoisonError};

use portcullis_protocol::identity::to_hex;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{CertificateError, DigitallySignedStruct, Error, SignatureScheme};
use sha2::{Digest as _, Sha256};
use x509_parser::prelude::{FromDer as _, X509Certificate};

use crate::instance_ca::verify;

/// The instances' authority, and whose certificate of it is accepted.
#[derive(Clone, Debug)]
pub(super) struct Authority {
    pub(super) pem: String,
    pub(super) instance: String,
}

/// Accepts the pinned key, and what the authority certified; without either any key, which is noted.
#[derive(Debug)]
pub(super) struct PinVerifier {
    expected: Option<String>,
    authority: Option<Authority>,
    seen: Mutex<Option<String>>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl PinVerifier {
    pub(super) fn new(expected: Option<String>, authority: Option<Authority>) -> Self {
        let algorithms = rustls::crypto::ring::default_provider().signature_verification_algorithms;
        Self {
            expected,
            authority,
            seen: Mutex::default(),
            algorithms,
        }
    }

    /// SHA-256 of the SubjectPublicKeyInfo that the server showed, hex.
    pub(super) fn seen(&self) -> Option<String> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl ServerCertVerifier for PinVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let (_, certificate) = X509Certificate::from_der(end_entity)
            .map_err(|_| Error::InvalidCertificate(CertificateError::BadEncoding))?;
        let spki = to_hex(&Sha256::digest(certificate.public_key().raw));
        *self.seen.lock().unwrap_or_else(PoisonError::into_inner) = Some(spki.clone());
        if let Some(authority) = &self.authority {
            verify(
                &authority.pem,
                &authority.instance,
                end_entity,
                intermediates,
                now,
            )
            .map_err(Error::General)?;
        }
        match &self.expected {
            Some(expected) if *expected != spki => Err(Error::InvalidCertificate(
                CertificateError::ApplicationVerificationFailure,
            )),
            _ => Ok(ServerCertVerified::assertion()),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, certificate, signature, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

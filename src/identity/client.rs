//! How we ask the control plane for a certificate, as a TLS client.
//!
//! May not live here: what is asked (`agent::enrol`), HTTP.

use std::sync::Arc;
use std::time::Duration;

use portcullis_protocol::Secret;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, SignatureScheme};
use x509_parser::prelude::{FromDer as _, X509Certificate};

/// A client that trusts these authorities (PEM), whatever the clock says, for an exchange whose answer proves
/// itself. It shows a certificate (PEM, ours first) with its key, if it is given one.
///
/// # Errors
/// When there is no authority, or no usable certificate; the message names the setting.
pub fn enrolment_client(authorities: &str, shown: Option<(&str, &Secret)>) -> Result<ClientConfig, String> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let roots = super::roots(authorities).map_err(|reason| format!("report.ca_file: {reason}"))?;
    let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider.clone())
        .build()
        .map_err(|e| e.to_string())?;
    let builder = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])
        .map_err(|e| e.to_string())?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(InItsOwnTime(verifier)));
    let Some((chain, key)) = shown else {
        return Ok(builder.with_no_client_auth());
    };
    let (chain, key) = super::pair(chain, key).map_err(|e| format!("the certificate to renew: {e}"))?;
    builder
        .with_client_auth_cert(chain, key)
        .map_err(|e| e.to_string())
}

/// Checks authority, name and signature, and takes a certificate as of a day on which it holds.
///
/// Our clock may be wrong by decades, and the answer is what tells. Somebody with the key of a certificate that
/// ended gets a signing request from us, which is no secret, and can't answer it.
#[derive(Debug)]
struct InItsOwnTime(Arc<WebPkiServerVerifier>);

impl ServerCertVerifier for InItsOwnTime {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let now = match X509Certificate::from_der(end_entity) {
            Ok((_, parsed)) => {
                let at = |time: i64| u64::try_from(time).unwrap_or_default();
                let validity = parsed.validity();
                let begins = at(validity.not_before.timestamp());
                let ends = at(validity.not_after.timestamp()).max(begins);
                UnixTime::since_unix_epoch(Duration::from_secs(now.as_secs().clamp(begins, ends)))
            }
            // The inner verifier says what is wrong with it.
            Err(_) => now,
        };
        self.0
            .verify_server_cert(end_entity, intermediates, name, ocsp, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_verify_schemes()
    }
}

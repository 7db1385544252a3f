//! The instance as a TLS client of the control plane: to push reports, and to ask for a certificate.
//!
//! May not live here: what is asked (`agent::enrol`), HTTP.

use std::sync::Arc;
use std::time::Duration;

use portcullis_protocol::Secret;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{WantsClientCert, WebPkiServerVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::version::{TLS12, TLS13};
use rustls::{ClientConfig, ConfigBuilder, DigitallySignedStruct, RootCertStore, SignatureScheme};
use rustls_platform_verifier::BuilderVerifierExt as _;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::time::{KnownTime, ProvenClock};

/// A certificate that is shown, ours first, and its key; PEM both.
pub type Shown<'a> = (&'a str, &'a Secret);

/// A client that trusts these authorities (PEM), or the system's own, by what is known of the time.
///
/// # Errors
/// What of it can't be used; the message names the setting.
pub fn client_config(
    authorities: Option<&str>,
    shown: Option<Shown<'_>>,
    time: KnownTime,
) -> Result<ClientConfig, String> {
    let clock = Arc::new(ProvenClock::knowing(time));
    let builder = ClientConfig::builder_with_details(provider(), clock)
        .with_protocol_versions(&[&TLS13, &TLS12])
        .map_err(|e| e.to_string())?;
    let builder = match authorities {
        Some(pem) => builder.with_root_certificates(authorities_of(pem)?),
        None => builder
            .with_platform_verifier()
            .map_err(|e| format!("the system's authorities: {e}"))?,
    };
    finish(builder, shown)
}

/// A client that trusts these authorities, whatever the clock says, for an exchange whose answer proves itself.
///
/// # Errors
/// As [`client_config`].
pub fn enrolment_config(authorities: &str, shown: Option<Shown<'_>>) -> Result<ClientConfig, String> {
    let roots = Arc::new(authorities_of(authorities)?);
    let verifier = WebPkiServerVerifier::builder_with_provider(roots, provider())
        .build()
        .map_err(|e| e.to_string())?;
    let builder = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13, &TLS12])
        .map_err(|e| e.to_string())?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(InItsOwnTime(verifier)));
    finish(builder, shown)
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn authorities_of(pem: &str) -> Result<RootCertStore, String> {
    super::roots(pem).map_err(|reason| format!("report.ca_file: {reason}"))
}

fn finish(
    builder: ConfigBuilder<ClientConfig, WantsClientCert>,
    shown: Option<Shown<'_>>,
) -> Result<ClientConfig, String> {
    let Some((chain, key)) = shown else {
        return Ok(builder.with_no_client_auth());
    };
    let unusable =
        |e: &dyn std::fmt::Display| format!("the client's certificate and key can't be used as PEM: {e}");
    let (chain, key) = super::pair(chain, key).map_err(|e| unusable(&e))?;
    builder
        .with_client_auth_cert(chain, key)
        .map_err(|e| unusable(&e))
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

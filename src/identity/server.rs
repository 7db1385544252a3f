//! The instance as a TLS server.
//!
//! May not live here: sockets, what callers may do (`policy::access`).

use std::sync::Arc;

use rustls::ServerConfig;
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use rustls::version::{TLS12, TLS13};

use super::time::ProvenClock;
use crate::channel::Setup;

/// The TLS server: 1.3 preferred, 1.2 the floor (BREV-DATA-2). With an authority, callers may show a
/// certificate of it; one of another authority ends the handshake.
///
/// # Errors
/// When the key and the certificates are no usable pair, or the authority is none.
pub fn server_config(setup: &Setup) -> Result<Arc<ServerConfig>, String> {
    let unusable = |e: &dyn std::fmt::Display| format!("the TLS key of the state folder can't be used: {e}");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let clock = Arc::new(ProvenClock::knowing(setup.time));
    let builder = ServerConfig::builder_with_details(provider, clock)
        .with_protocol_versions(&[&TLS13, &TLS12])
        .map_err(|e| e.to_string())?;
    let builder = match &setup.client_ca {
        Some(pem) => builder.with_client_cert_verifier(verifier(pem)?),
        None => builder.with_no_client_auth(),
    };
    let (chain, key) = super::pair(&setup.certificates, &setup.key).map_err(|e| unusable(&e))?;
    let mut config = builder.with_single_cert(chain, key).map_err(|e| unusable(&e))?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

/// A caller may show no certificate.
fn verifier(pem: &str) -> Result<Arc<dyn ClientCertVerifier>, String> {
    let unusable = |e: &dyn std::fmt::Display| format!("control_plane.client_ca: {e}");
    let roots = super::roots(pem).map_err(|e| unusable(&e))?;
    WebPkiClientVerifier::builder(Arc::new(roots))
        .allow_unauthenticated()
        .build()
        .map_err(|e| unusable(&e))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::LimitSettings;
    use crate::identity::time::KnownTime;
    use crate::identity::{TlsIdentity, install_tls_provider};

    fn setup(client_ca: Option<&str>) -> Setup {
        install_tls_provider();
        let identity = TlsIdentity::in_memory().unwrap();
        Setup {
            listen: "127.0.0.1:1".parse().unwrap(),
            limits: LimitSettings::default(),
            key: identity.key_pem(),
            certificates: identity.shown_chain(None),
            client_ca: client_ca.map(str::to_owned),
            time: KnownTime::default(),
        }
    }

    #[test]
    fn the_identity_is_usable_as_it_goes_over_the_channel() {
        assert!(server_config(&setup(None)).is_ok());
        let other = Setup {
            key: setup(None).key,
            ..setup(None)
        };
        assert!(server_config(&other).is_err(), "another one's key");
    }

    #[test]
    fn a_bad_authority_is_an_error_that_names_the_field() {
        for bad in [
            "",
            "x",
            "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
        ] {
            let error = server_config(&setup(Some(bad))).err().unwrap();
            assert!(error.contains("control_plane.client_ca"), "{error}");
        }
    }
}

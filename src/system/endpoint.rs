//! What our own HTTPS endpoint negotiates: it is dialled as a caller would.
//!
//! May not live here: the endpoint itself (`health`), what is thought of it (`policy`).

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::WebPkiSupportedAlgorithms;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::policy::observation::{Observed, Tls};

/// Time for the connection and its handshake.
const HANDSHAKE_TIME: Duration = Duration::from_secs(10);

/// Connects to our own endpoint and says what was negotiated; only our own certificate is accepted.
///
/// # Errors
/// A reason for the operator.
pub async fn observe(listen: SocketAddr, own: Vec<CertificateDer<'static>>) -> Observed<Tls> {
    let address = match listen {
        SocketAddr::V6(v6) if v6.ip().is_unspecified() => SocketAddr::from((Ipv4Addr::LOCALHOST, v6.port())),
        SocketAddr::V4(v4) if v4.ip().is_unspecified() => SocketAddr::from((Ipv4Addr::LOCALHOST, v4.port())),
        other => other,
    };
    let verifier = Arc::new(OnlyThis { own });
    let config = rustls::ClientConfig::builder()
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_no_client_auth();
    let connect = async {
        let stream = TcpStream::connect(address).await?;
        let name = ServerName::try_from("portcullis").map_err(std::io::Error::other)?;
        TlsConnector::from(Arc::new(config)).connect(name, stream).await
    };
    let stream = match tokio::time::timeout(HANDSHAKE_TIME, connect).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return Err(format!("{address}: {error}")),
        Err(_) => {
            return Err(format!(
                "{address}: no answer within {} s",
                HANDSHAKE_TIME.as_secs()
            ));
        }
    };
    let session = stream.get_ref().1;
    let text = |value: Option<String>| value.unwrap_or_else(|| "unknown".to_owned());
    Ok(Tls {
        version: text(
            session
                .protocol_version()
                .and_then(|v| v.as_str().map(str::to_owned)),
        ),
        cipher_suite: text(
            session
                .negotiated_cipher_suite()
                .and_then(|s| s.suite().as_str().map(str::to_owned)),
        ),
        key_exchange: text(
            session
                .negotiated_key_exchange_group()
                .map(|g| format!("{:?}", g.name())),
        ),
    })
}

fn algorithms() -> WebPkiSupportedAlgorithms {
    rustls::crypto::ring::default_provider().signature_verification_algorithms
}

/// Accepts our own certificates, by their bytes.
#[derive(Debug)]
struct OnlyThis {
    own: Vec<CertificateDer<'static>>,
}

impl ServerCertVerifier for OnlyThis {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if self.own.contains(end_entity) {
            Ok(ServerCertVerified::assertion())
        } else {
            Err(rustls::Error::General(
                "somebody else answers on our port".to_owned(),
            ))
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &rustls::DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, certificate, signature, &algorithms())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &rustls::DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, certificate, signature, &algorithms())
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        algorithms().supported_schemes()
    }
}

//! Carrying the agent's request for a certificate to the control plane, and the answer back.
//!
//! Patiently: the control plane may be away. May not live here: what is asked and whether the answer is
//! believed (`agent::enrol`).

use std::net::Ipv6Addr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBuilder};
use portcullis_protocol::control::{Answer, Request};
use portcullis_protocol::enrolment::EnrolmentAnswer;
use reqwest::{Client, StatusCode};
use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use tokio::sync::{mpsc, oneshot, watch};
use tracing::warn;

use super::push::client::{bounded_body, describe};
use crate::agent::control::{Call, Caller, Remote};
use crate::identity::TlsIdentity;
use crate::log::id;

/// Longest wait between two tries.
const MAX_WAIT: Duration = Duration::from_secs(300);
/// Time for one try.
const REQUEST_TIME: Duration = Duration::from_secs(20);
/// Longest accepted answer, in bytes.
const MAX_ANSWER: usize = 64 << 10;

/// What is to be carried where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Errand {
    /// The control plane's address for it.
    pub url: String,
    /// The request, JSON. Nothing in it is secret.
    pub body: String,
    /// The instance whose certificate is shown, in a renewal.
    pub renewal: Option<String>,
}

/// Carries errands until the task is dropped.
pub async fn run(
    ca_file: Option<PathBuf>,
    identity: Arc<TlsIdentity>,
    mut errands: watch::Receiver<Option<Errand>>,
    agent: mpsc::Sender<Call>,
) {
    loop {
        let errand = errands.borrow_and_update().clone();
        let ended = match errand {
            None => errands.changed().await.is_err(),
            Some(errand) => {
                let carry = carry(ca_file.as_deref(), &identity, &errand, &agent);
                tokio::select! {
                    // The agent takes the errand back when it is done.
                    changed = errands.changed() => changed.is_err(),
                    () = carry => false,
                }
            }
        };
        if ended {
            return;
        }
    }
}

/// Tries until it is dropped.
async fn carry(ca_file: Option<&Path>, identity: &TlsIdentity, errand: &Errand, agent: &mpsc::Sender<Call>) {
    let waits = ExponentialBuilder::default()
        .with_jitter()
        .with_min_delay(Duration::from_secs(1))
        .with_max_delay(MAX_WAIT)
        .without_max_times()
        .build();
    for wait in waits {
        let asked = match post(ca_file, identity, errand).await {
            Ok(answer) => hand_over(answer, agent).await,
            Err(reason) => Err(reason),
        };
        match asked {
            Ok(()) => std::future::pending().await,
            Err(reason) => warn!(
                MESSAGE_ID = id::ENROLMENT_FAILED,
                REASON = reason,
                "there is no certificate yet: {reason}"
            ),
        }
        tokio::time::sleep(wait).await;
    }
}

async fn hand_over(answer: EnrolmentAnswer, agent: &mpsc::Sender<Call>) -> Result<(), String> {
    let (sender, result) = oneshot::channel();
    // Nobody to be believed: the answer proves itself.
    let nobody = Remote {
        since: Duration::ZERO,
        address: (Ipv6Addr::UNSPECIFIED, 0).into(),
        chain: Vec::new(),
    };
    let call = (Request::Enrolled { answer }, Caller::Remote(nobody), sender);
    agent.send(call).await.map_err(|e| e.to_string())?;
    match result.await.map_err(|e| e.to_string())? {
        Answer::Done => Ok(()),
        Answer::Refused { message, .. } => Err(message),
        _ => Err("the agent gave no answer".to_owned()),
    }
}

async fn post(
    ca_file: Option<&Path>,
    identity: &TlsIdentity,
    errand: &Errand,
) -> Result<EnrolmentAnswer, String> {
    let client = build(ca_file, identity, errand)?;
    let request = client
        .post(&errand.url)
        .header("content-type", "application/json")
        .body(errand.body.clone());
    let answer = request.send().await.map_err(|e| describe(&e))?;
    let status = answer.status();
    if status != StatusCode::OK {
        return Err(format!("{} answered {status}", errand.url));
    }
    let bytes = bounded_body(answer, MAX_ANSWER)
        .await
        .map_err(|reason| format!("{}: {reason}", errand.url))?;
    serde_json::from_slice(&bytes).map_err(|e| format!("{} answered something else: {e}", errand.url))
}

/// Without authorities of our own the system's are asked, by the system's clock.
fn build(ca_file: Option<&Path>, identity: &TlsIdentity, errand: &Errand) -> Result<Client, String> {
    let builder = Client::builder()
        .user_agent(concat!("portcullis/", env!("CARGO_PKG_VERSION")))
        .https_only(true)
        .timeout(REQUEST_TIME)
        .redirect(reqwest::redirect::Policy::none())
        .no_proxy();
    let builder = match (ca_file, &errand.renewal) {
        (Some(file), renewal) => {
            let tls = identity.enrolment_client(roots(file)?, renewal.as_deref())?;
            builder.tls_backend_preconfigured(tls)
        }
        (None, None) => builder.tls_version_min(reqwest::tls::Version::TLS_1_2),
        (None, Some(instance)) => {
            let pem = identity
                .certified_pem(instance)
                .ok_or("there is no certificate to renew")?;
            let shown = reqwest::Identity::from_pem(pem.as_bytes()).map_err(|e| describe(&e))?;
            builder
                .tls_version_min(reqwest::tls::Version::TLS_1_2)
                .identity(shown)
        }
    };
    builder.build().map_err(|e| describe(&e))
}

fn roots(file: &Path) -> Result<RootCertStore, String> {
    let named = |reason: String| format!("report.ca_file {}: {reason}", file.display());
    let pem = std::fs::read(file).map_err(|e| named(e.to_string()))?;
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(&pem) {
        let certificate = certificate.map_err(|e| named(format!("{e:?}")))?;
        roots.add(certificate).map_err(|e| named(e.to_string()))?;
    }
    match roots.is_empty() {
        true => Err(named("there is no PEM certificate in it".to_owned())),
        false => Ok(roots),
    }
}

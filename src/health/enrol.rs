//! Carrying the agent's request for a certificate to the control plane, and the answer back.
//!
//! Patiently: the control plane may be away. May not live here: what is asked and whether the answer is
//! believed (`agent::enrol`).

use std::net::Ipv6Addr;
use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBuilder};
use portcullis_protocol::control::{Answer, Request};
use portcullis_protocol::enrolment::EnrolmentAnswer;
use reqwest::{Client, StatusCode};
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot, watch};
use tracing::warn;

use super::push::client::{self, bounded_body, describe};
use super::push::offer::Access;
use super::server::Question;
use crate::channel::Remote;
use crate::identity::client::enrolment_config;
use crate::log::id;

/// Longest wait between two tries.
const MAX_WAIT: Duration = Duration::from_secs(300);
/// Longest accepted answer, in bytes.
const MAX_ANSWER: usize = 64 << 10;

/// What is to be carried where.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Errand {
    /// The control plane's address for it.
    pub url: String,
    /// The request, JSON. Nothing in it is secret.
    pub body: String,
    /// What the control plane is trusted by, and in a renewal the certificate that is shown; or why that can't
    /// be said.
    pub access: Result<Access, String>,
}

/// Carries errands until nobody gives any.
pub async fn run(mut errands: watch::Receiver<Option<Errand>>, agent: mpsc::Sender<Question>) {
    loop {
        let errand = errands.borrow_and_update().clone();
        let ended = match errand {
            None => errands.changed().await.is_err(),
            Some(errand) => tokio::select! {
                // The agent takes the errand back when it is done.
                changed = errands.changed() => changed.is_err(),
                () = carry(&errand, &agent) => false,
            },
        };
        if ended {
            return;
        }
    }
}

/// Tries until it is dropped.
async fn carry(errand: &Errand, agent: &mpsc::Sender<Question>) {
    let waits = ExponentialBuilder::default()
        .with_jitter()
        .with_min_delay(Duration::from_secs(1))
        .with_max_delay(MAX_WAIT)
        .without_max_times()
        .build();
    for wait in waits {
        let asked = match post(errand).await {
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

async fn hand_over(answer: EnrolmentAnswer, agent: &mpsc::Sender<Question>) -> Result<(), String> {
    let (sender, result) = oneshot::channel();
    // Nobody to be believed: the answer proves itself.
    let nobody = Remote {
        since: Duration::ZERO,
        address: (Ipv6Addr::UNSPECIFIED, 0).into(),
        chain: Vec::new(),
    };
    let call = (Request::Enrolled { answer }, nobody, sender);
    agent.send(call).await.map_err(|e| e.to_string())?;
    match result.await.map_err(|e| e.to_string())? {
        Answer::Done => Ok(()),
        Answer::Refused { message, .. } => Err(message),
        _ => Err("the agent gave no answer".to_owned()),
    }
}

async fn post(errand: &Errand) -> Result<EnrolmentAnswer, String> {
    let client = build(errand.access.as_ref().map_err(String::clone)?)?;
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

/// Without authorities of our own the system's are asked, by what is known of the time.
fn build(access: &Access) -> Result<Client, String> {
    match &access.authorities {
        Some(authorities) => client::with_tls(enrolment_config(authorities, access.shown())?),
        None => client::build(access),
    }
}

//! Pushing reports to the control plane: at once when a check, readiness or the generation changes, else
//! on an interval with jitter; patiently while the control plane is away.
//!
//! May not live here: what a report says.

use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBuilder};
use portcullis_protocol::{CheckId, Report, Status};
use reqwest::header::RETRY_AFTER;
use reqwest::{Certificate, Client, StatusCode};
use tokio::sync::watch;
use tracing::{debug, warn};

use crate::channel::Push;
use crate::log::id;

/// Longest wait between two tries, in seconds.
const MAX_WAIT: Duration = Duration::from_secs(300);
/// Time for one try.
const REQUEST_TIME: Duration = Duration::from_secs(20);

/// Why a report was not taken.
enum Failure {
    /// The receiver asks for that much patience.
    Later(Duration),
    /// Anything else.
    Other(String),
}

/// What is worth telling at once: the rest of a report changes all the time.
type News = (bool, Option<u64>, Vec<(CheckId, Status)>);

fn news(report: &Report) -> News {
    let checks = report
        .checks
        .iter()
        .map(|check| (check.id, check.status))
        .collect();
    (report.ready, report.generation, checks)
}

/// Pushes until the task is dropped.
pub async fn run(mut deliveries: watch::Receiver<Push>) {
    let mut client = None;
    let mut told: Option<News> = None;
    loop {
        let delivery = deliveries.borrow_and_update().clone();
        if let (Some(url), Some(report)) = (&delivery.url, &delivery.report)
            && told != Some(news(report))
        {
            told = deliver(&mut client, url, &mut deliveries).await;
            if deliveries.has_changed().is_err() {
                return;
            }
            continue;
        }
        tokio::select! {
            changed = deliveries.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(jittered(delivery.interval)), if delivery.url.is_some() => told = None,
        }
    }
}

/// Tries until the newest report is taken, and says what it told; `None` when there is nothing to
/// deliver there any more.
async fn deliver(
    client: &mut Option<Client>,
    url: &str,
    deliveries: &mut watch::Receiver<Push>,
) -> Option<News> {
    let backoff = ExponentialBuilder::default()
        .with_jitter()
        .with_min_delay(Duration::from_secs(1))
        .with_max_delay(MAX_WAIT)
        .without_max_times()
        .build();
    for wait in backoff {
        let delivery = deliveries.borrow_and_update().clone();
        if delivery.url.as_deref() != Some(url) {
            return None;
        }
        let report = delivery.report.as_deref()?;
        let wait = match post(&delivery, client, url, report).await {
            Ok(()) => return Some(news(report)),
            Err(Failure::Later(wait)) => wait.min(MAX_WAIT),
            Err(Failure::Other(reason)) => {
                warn!(
                    MESSAGE_ID = id::REPORT_FAILED,
                    REASON = reason,
                    "the report was not delivered: {reason}"
                );
                wait
            }
        };
        debug!(?wait, "waiting before the next try");
        tokio::time::sleep(wait).await;
        if deliveries.has_changed().is_err() {
            return None;
        }
    }
    None
}

async fn post(
    settings: &Push,
    client: &mut Option<Client>,
    url: &str,
    report: &Report,
) -> Result<(), Failure> {
    let other = |error: reqwest::Error| Failure::Other(describe(&error));
    let ready = match client.take() {
        Some(client) => client,
        None => build(settings).map_err(Failure::Other)?,
    };
    let answer = client
        .insert(ready)
        .post(url)
        .json(report)
        .send()
        .await
        .map_err(other)?;
    let status = answer.status();
    if status.is_success() {
        return Ok(());
    }
    let patience = answer
        .headers()
        .get(RETRY_AFTER)
        .and_then(|v| v.to_str().ok()?.parse::<u64>().ok());
    match patience {
        Some(seconds)
            if matches!(
                status,
                StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE
            ) =>
        {
            Err(Failure::Later(Duration::from_secs(seconds)))
        }
        _ => Err(Failure::Other(format!("{url} answered {status}"))),
    }
}

fn build(settings: &Push) -> Result<Client, String> {
    let mut builder = Client::builder()
        .user_agent(concat!("portcullis/", env!("CARGO_PKG_VERSION")))
        .https_only(true)
        .timeout(REQUEST_TIME)
        .redirect(reqwest::redirect::Policy::none())
        .no_proxy()
        .tls_version_min(reqwest::tls::Version::TLS_1_2);
    if let Some(pem) = &settings.authorities {
        let pem = pem
            .as_ref()
            .map_err(|reason| format!("report.ca_file: {reason}"))?;
        let authorities =
            Certificate::from_pem_bundle(pem.as_bytes()).map_err(|e| format!("report.ca_file: {e}"))?;
        builder = builder.tls_certs_only(authorities);
    }
    builder.build().map_err(|e| describe(&e))
}

/// The error with its causes: reqwest's own text stops at the first.
fn describe(error: &reqwest::Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        text.push_str(&format!(": {inner}"));
        cause = inner.source();
    }
    text
}

/// Between 0.9 and 1.1 times as long, so that a fleet that started together does not report together.
fn jittered(interval: Duration) -> Duration {
    let mut byte = [0u8; 1];
    // Without randomness the reports only come at the same time as others'.
    let _ = ring::rand::SecureRandom::fill(&ring::rand::SystemRandom::new(), &mut byte);
    interval.mul_f64(0.9 + 0.2 * f64::from(byte[0]) / 255.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jitter_stays_near() {
        for _ in 0..100 {
            let waited = jittered(Duration::from_secs(100)).as_secs_f64();
            assert!((89.9..=110.1).contains(&waited), "{waited}");
        }
    }
}

//! Waiting until an instance is proven ready: its agent says so, for the expected generation.
//!
//! May not live here: what ready means (the agent's checks).

use std::time::{Duration, Instant};

use portcullis_protocol::Report;

use crate::client::{ClientError, blocking};
use crate::local::{Instance, LocalProvider};
use crate::{Error, Progress, Result};

/// How long is waited unless another time is given.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(120);

/// Time between two questions.
const INTERVAL: Duration = Duration::from_millis(200);

/// Waits until the agent of the named instance says that it is ready, in `/readyz` and in the
/// health report, with (at least) the generation that was last given to it.
///
/// # Errors
/// [`Error::NotReady`] with what still fails and its remedy; at once when somebody else than the
/// pinned agent answers.
pub fn wait(
    provider: &LocalProvider,
    name: &str,
    timeout: Duration,
    progress: &dyn Progress,
) -> Result<Report> {
    let mut instance = provider.get(name)?;
    if !instance.has_agent() {
        return Err(Error::BadInput(format!(
            "{name} was launched without the agent: it can't become ready"
        )));
    }
    let certificate = provider.client_certificate()?;
    let (start, expected) = (Instant::now(), instance.spec().generation.get());
    loop {
        let reasons = match ask(&mut instance, &certificate, expected) {
            Ok(Ok(report)) => return Ok(report),
            Ok(Err(reasons)) => reasons,
            Err(error) if is_final(&error) => return Err(error),
            Err(error) => vec![error.to_string()],
        };
        progress.step(&format!("{name}: waiting: {}", brief(&reasons)));
        if start.elapsed() >= timeout {
            let waited_s = start.elapsed().as_secs();
            return Err(Error::NotReady {
                name: name.to_owned(),
                waited_s,
                reasons,
            });
        }
        std::thread::sleep(INTERVAL);
    }
}

/// Asks once: the report if all is as it has to be, else what is not.
fn ask(
    instance: &mut Instance,
    certificate: &crate::ca::ClientCertificate,
    expected: u64,
) -> Result<Result<Report, Vec<String>>> {
    instance.pin()?;
    let client = instance.client(Some(certificate))?;
    let unready = blocking(client.readyz())
        .map_err(|e| instance.agent_error(e))?
        .err();
    let report = blocking(client.health()).map_err(|e| instance.agent_error(e))?;
    let mut reasons: Vec<String> = report
        .blocking()
        .map(|check| {
            let remedy = check
                .remedy
                .as_deref()
                .map(|text| format!(" (remedy: {text})"))
                .unwrap_or_default();
            format!("{} {}: {}{remedy}", check.id, check.status, check.summary)
        })
        .collect();
    if report.generation.is_none_or(|generation| generation < expected) {
        let has = report
            .generation
            .map_or("none".to_owned(), |generation| generation.to_string());
        reasons.push(format!("generation {expected} is expected, the agent has {has}"));
    }
    reasons.extend(
        report
            .refused_spec
            .iter()
            .map(|why| format!("the agent refused the spec: {why}")),
    );
    if reasons.is_empty() && (unready.is_some() || !report.ready) {
        let ids = unready.unwrap_or_default().join(", ");
        reasons.push(format!(
            "/readyz: {}",
            if ids.is_empty() { "not ready" } else { &ids }
        ));
    }
    Ok(if reasons.is_empty() {
        Ok(report)
    } else {
        Err(reasons)
    })
}

/// Whether waiting longer can't help, or would be dangerous.
fn is_final(error: &Error) -> bool {
    matches!(
        error,
        Error::Agent {
            source: ClientError::WrongKey { .. } | ClientError::Certificate(_),
            ..
        }
    )
}

/// The first reason, shortened to one line, and how many others there are.
fn brief(reasons: &[String]) -> String {
    let first = reasons.first().map_or("", String::as_str);
    let first: String = first.lines().next().unwrap_or("").chars().take(140).collect();
    match reasons.len() {
        0 | 1 => first,
        more => format!("{first} (and {} more)", more - 1),
    }
}

//! From observations to checks, and from checks to ready.
//!
//! A check passes on evidence only. What this version does not examine is `unknown` and says so.
//! May not live here: looking at anything; the observations are given.

mod algorithms;
mod conflicts;
mod exposure;
mod gate;
mod host_keys;
mod keys;
mod logins;
mod storage;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use jiff::Timestamp;
use portcullis_protocol::text::plain;
use portcullis_protocol::{Check, CheckId, Spec, Status};
use serde_json::Value;

use super::observation::Observations;

/// What a check came to.
struct Finding {
    status: Status,
    summary: String,
    evidence: BTreeMap<String, Value>,
    remedy: Option<String>,
}

impl Finding {
    fn new(status: Status, summary: impl Into<String>) -> Self {
        Self {
            status,
            summary: summary.into(),
            evidence: BTreeMap::new(),
            remedy: None,
        }
    }

    fn pass(summary: impl Into<String>) -> Self {
        Self::new(Status::Pass, summary)
    }

    fn warn(summary: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::new(Status::Warn, summary).remedy(remedy)
    }

    fn fail(summary: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::new(Status::Fail, summary).remedy(remedy)
    }

    fn remedy(mut self, remedy: impl Into<String>) -> Self {
        self.remedy = Some(remedy.into());
        self
    }

    fn with(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.evidence.insert(name.to_owned(), value.into());
        self
    }
}

const NO_SPEC: &str = "no spec is accepted yet";

/// All checks, in the order of [`CheckId::ALL`]. `since` is kept from the previous checks where the
/// status is the same.
pub fn checks(spec: Option<&Spec>, seen: &Observations, previous: &[Check], now: Timestamp) -> Vec<Check> {
    CheckId::ALL
        .iter()
        .map(|id| {
            let finding = find(*id, spec, seen);
            let before = previous
                .iter()
                .find(|check| check.id == *id && check.status == finding.status);
            Check {
                id: *id,
                status: finding.status,
                required: is_required(*id),
                requirement: id.requirement(),
                // It may name what others named, with a line feed in it: whoever prints it, it is one line.
                summary: plain(&finding.summary),
                evidence: finding.evidence,
                since: before.map_or(now, |check| check.since),
                remedy: guided(*id, finding.status, finding.remedy),
            }
        })
        .collect()
}

/// What to do, and where an instance has more of it: the page for incidents has a section for each check.
fn guided(id: CheckId, status: Status, remedy: Option<String>) -> Option<String> {
    match (status, remedy) {
        (Status::Pass, remedy) => remedy,
        (_, Some(remedy)) => Some(format!("{remedy}; more: portcullis-operations(7), {id}")),
        (_, None) => Some(format!("see portcullis-operations(7), {id}")),
    }
}

/// Whether the instance is ready: no required check fails or is unknown.
pub fn is_ready(checks: &[Check]) -> bool {
    !checks.iter().any(Check::blocks_readiness)
}

fn is_required(id: CheckId) -> bool {
    use CheckId::{
        ExposureListeners, FirewallConflicts, SshdAlgorithms, SshdHostKeys, SshdPassword, StorageEncrypted,
    };
    !matches!(
        id,
        SshdHostKeys
            | SshdPassword
            | SshdAlgorithms
            | FirewallConflicts
            | StorageEncrypted
            | ExposureListeners
    )
}

fn find(id: CheckId, spec: Option<&Spec>, seen: &Observations) -> Finding {
    match id {
        CheckId::SystemdRunning => logins::systemd_running(&seen.systemd.manager_state),
        CheckId::SystemdSystemctl => logins::systemctl(&seen.systemd.systemctl),
        CheckId::SshdRunning => logins::sshd_running(&seen.sshd),
        CheckId::SshdReachable => logins::sshd_reachable(&seen.sshd),
        CheckId::SshdHostKeys => host_keys::host_keys(spec, seen),
        CheckId::SshdPubkey => logins::sshd_pubkey(&seen.sshd),
        CheckId::SshdPassword => logins::sshd_password(&seen.sshd),
        CheckId::SshdAlgorithms => algorithms::sshd_algorithms(&seen.sshd),
        CheckId::KeysInstalled => keys::installed(spec, &seen.keys, &seen.unfit),
        CheckId::KeysAccepted => keys::accepted(spec, &seen.keys),
        CheckId::FirewallApplied => gate::applied(&seen.gate, seen.trial_until, &seen.durable),
        CheckId::FirewallDefaultDeny => gate::default_deny(&seen.gate),
        CheckId::FirewallSshAllowed => gate::ssh_allowed(spec, &seen.sshd),
        CheckId::FirewallContainers => gate::containers(&seen.gate),
        CheckId::ClusterPeers => gate::peers(spec, &seen.gate),
        CheckId::TransitTls => transit(seen),
        CheckId::FirewallConflicts => conflicts::conflicts(&seen.conflicts),
        CheckId::ExposureListeners => exposure::listeners(&seen.exposure),
        CheckId::StorageEncrypted => storage::encrypted(spec, &seen.storage),
    }
}

fn transit(seen: &Observations) -> Finding {
    match &seen.tls {
        Ok(tls) => Finding::pass(format!(
            "the endpoint speaks {} with {}",
            tls.version, tls.cipher_suite
        ))
        .with("version", tls.version.clone())
        .with("cipher_suite", tls.cipher_suite.clone())
        .with("key_exchange", tls.key_exchange.clone())
        .with("minimum", "TLSv1_2"),
        Err(reason) => Finding::fail(
            format!("the HTTPS endpoint does not answer: {reason}"),
            "is the port taken? `ss -ltnp`",
        ),
    }
}

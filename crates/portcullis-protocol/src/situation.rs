//! What an operator on the instance looks at: the report, and what only the instance itself is asked.
//!
//! May not live here: how it is shown, secrets.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::{FirewallRule, Report, SourceRange, Spec};

/// The report with its surroundings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Situation {
    /// The last report.
    pub report: Report,
    /// When the daemon wrote its first report. It knows of nothing before: what is so since then may have
    /// been so for longer.
    pub started: Timestamp,
    /// Since when the report's `ready` is what it is.
    pub verdict_since: Timestamp,
    /// The change that has to be confirmed, if there is one.
    pub trial: Option<TrialState>,
    /// Who is let in; none before a spec is accepted.
    pub let_in: Option<LetIn>,
    /// How reports go out; none where the spec names no receiver, or nothing is known of it yet.
    #[serde(default)]
    pub deliveries: Option<Deliveries>,
}

/// How reports go out. That one more was taken is no news; that they begin or cease to be taken is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Deliveries {
    /// When the receiver last took one.
    pub last_success: Option<Timestamp>,
    /// Why it did not take the last one; none after it took one.
    pub last_error: Option<String>,
    /// How many wait.
    pub queued: u64,
    /// Since when the oldest of them waits.
    pub oldest: Option<Timestamp>,
}

/// A change that has to be confirmed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrialState {
    /// Until when.
    pub until: Timestamp,
    /// The generation that holds again otherwise; none: nothing would be let in.
    pub before: Option<u64>,
}

/// Who a spec lets in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LetIn {
    /// By rule.
    pub rules: Vec<FirewallRule>,
    /// The cluster, if there is one.
    pub cluster: Option<String>,
    /// How many other members it has.
    pub peers: usize,
    /// From where the control plane may call.
    pub control_plane: Vec<SourceRange>,
    /// How many keys the spec names.
    pub keys: usize,
}

impl LetIn {
    /// What a spec says of it.
    pub fn of(spec: &Spec) -> Self {
        let control_plane = spec.control_plane.as_ref();
        Self {
            rules: spec.firewall.ingress.clone(),
            cluster: spec.cluster.as_ref().map(|cluster| cluster.id.to_string()),
            peers: spec.cluster.as_ref().map_or(0, |cluster| cluster.peers.len()),
            control_plane: control_plane.map_or_else(Vec::new, |c| c.sources.clone()),
            keys: spec.authorized_keys.len(),
        }
    }
}

impl Situation {
    /// Whether an operator would see something else. What differs in every report, as its time and the
    /// host's load, is no news.
    pub fn is_news_after(&self, before: &Self) -> bool {
        let (now, then) = (&self.report, &before.report);
        now.ready != then.ready
            || now.instance != then.instance
            || now.generation != then.generation
            || now.refused_spec != then.refused_spec
            || now.host_keys != then.host_keys
            || now.checks != then.checks
            || self.trial != before.trial
            || self.let_in != before.let_in
            || self.last_error() != before.last_error()
    }

    fn last_error(&self) -> Option<&str> {
        self.deliveries.as_ref()?.last_error.as_deref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_time_is_no_news_and_another_check_is() {
        let report: Report = serde_json::from_str(include_str!("../tests/report-v1.json")).unwrap();
        let before = Situation {
            started: report.time,
            verdict_since: report.time,
            trial: None,
            let_in: None,
            deliveries: None,
            report,
        };
        let mut now = before.clone();
        now.report.time = Timestamp::UNIX_EPOCH;
        now.report.host.load = [9.0; 3];
        assert!(!now.is_news_after(&before));
        now.report.checks[0].summary = "something else".to_owned();
        assert!(now.is_news_after(&before));
        let mut trial = before.clone();
        trial.trial = Some(TrialState {
            until: Timestamp::UNIX_EPOCH,
            before: Some(1),
        });
        assert!(trial.is_news_after(&before));
    }
}

//! What is counted and measured, for whoever draws curves: OpenMetrics 1.0, made when it is asked for.
//!
//! Between two questions nothing happens but a counter that goes up. No label has a value that a stranger
//! chooses: names of checks, of our own rules, of requests. What can't be had is left out, never zero.
//! May not live here: what each family is called (`page`), the route and the endpoint's own counters
//! (`health::metrics`).

mod page;

use std::collections::BTreeSet;
use std::fmt;
use std::time::{Duration, Instant};

use portcullis_protocol::control::{Answer, Refusal};
use portcullis_protocol::{Report, Spec};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode_registry;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use tracing::warn;

use super::Agent;
use super::control::{Caller, refused};
use crate::health::push::offer::PushState;
use crate::identity::expiry;
use crate::log::id;
use crate::policy::observation::{Gate, Observed};
use crate::system::nftables::{Count, Nftables};
use crate::system::process::{self, Process};
use page::Page;

/// Upper bounds in seconds: a table is put back within one, a login probe on a busy host takes ten thousand.
const BUCKETS: [f64; 15] = [
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
];
/// Refusals are there from the start: a curve that begins at its first event does not show that event.
const REFUSALS: [Refusal; 9] = [
    Refusal::BadInput,
    Refusal::NotPermitted,
    Refusal::NotFound,
    Refusal::Conflict,
    Refusal::Dangerous,
    Refusal::Superseded,
    Refusal::OtherGeneration,
    Refusal::StorageFull,
    Refusal::Failed,
];

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ScopeLabels {
    scope: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    request: &'static str,
    caller: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RefusalLabels {
    reason: String,
}

/// How long looks at the instance took; shared with the gate's thread.
#[derive(Clone, Debug)]
pub struct Durations(Family<ScopeLabels, Histogram>);

impl Default for Durations {
    fn default() -> Self {
        Self(Family::new_with_constructor(|| Histogram::new(BUCKETS)))
    }
}

impl Durations {
    /// A look at a part of the instance, with what was done about it, ends now.
    pub fn took(&self, scope: &'static str, since: Instant) {
        self.observe(scope, since.elapsed());
    }

    fn observe(&self, scope: &'static str, time: Duration) {
        self.0
            .get_or_create(&ScopeLabels { scope })
            .observe(time.as_secs_f64());
    }
}

/// The agent's counters. They begin anew with each process.
pub struct Metrics {
    /// How long looks took.
    pub durations: Durations,
    requests: Family<RequestLabels, Counter>,
    refusals: Family<RefusalLabels, Counter>,
    /// What could not be had the last time, so that the journal is told once.
    missing: BTreeSet<&'static str>,
}

impl Metrics {
    /// Counters at zero, beside durations that somebody else measures too.
    pub fn new(durations: Durations) -> Self {
        let refusals = Family::<RefusalLabels, Counter>::default();
        for kind in REFUSALS {
            drop(refusals.get_or_create(&RefusalLabels { reason: word(&kind) }));
        }
        Self {
            durations,
            requests: Family::default(),
            refusals,
            missing: BTreeSet::new(),
        }
    }

    /// Counts a request and its answer.
    pub fn answered(&self, request: &'static str, caller: &Caller, answer: &Answer) {
        let caller = match caller {
            Caller::Local(_) => "local",
            Caller::Remote(_) => "remote",
        };
        self.requests
            .get_or_create(&RequestLabels { request, caller })
            .inc();
        if let Answer::Refused { kind, .. } = answer {
            self.refusals
                .get_or_create(&RefusalLabels { reason: word(kind) })
                .inc();
        }
    }

    /// The journal is told why something is left out, once.
    fn note<T>(&mut self, collector: &'static str, seen: &Observed<T>) {
        match seen {
            Ok(_) => {
                self.missing.remove(collector);
            }
            Err(reason) if self.missing.insert(collector) => warn!(
                MESSAGE_ID = id::METRICS_INCOMPLETE,
                COLLECTOR = collector,
                REASON = reason,
                "the metrics of {collector} are left out: {reason}"
            ),
            Err(_) => {}
        }
    }

    /// The families as text, without an end mark.
    fn text(&self, seen: &Seen<'_>) -> Result<String, fmt::Error> {
        let mut page = Page::default();
        page.identity(seen.spec);
        page.report(seen.report);
        page.spec(seen);
        page.gate(seen.gate, &seen.denied);
        page.add(
            "portcullis_reconcile_duration_seconds",
            "How long a look at a part of the instance took, with what was done about it",
            self.durations.0.clone(),
        );
        page.pushes(&seen.pushes);
        page.certificates(&seen.certificates);
        page.add(
            "portcullis_agent_requests",
            "Requests to the agent, over the API that ask it, and over the local socket",
            self.requests.clone(),
        );
        page.add(
            "portcullis_agent_refusals",
            "Requests that the agent refused, by reason",
            self.refusals.clone(),
        );
        page.process(&seen.process);
        page.collectors(seen);
        let mut text = String::new();
        encode_registry(&mut text, page.registry())?;
        Ok(text)
    }
}

/// What is there to tell, at the moment of the question.
struct Seen<'a> {
    spec: Option<&'a Spec>,
    report: Option<&'a Report>,
    trial_until: Option<jiff::Timestamp>,
    gate: &'a Gate,
    denied: Observed<Vec<(String, Count)>>,
    /// Each certificate that must not end, and when it does, in seconds since 1970.
    certificates: Vec<(&'static str, Observed<i64>)>,
    process: Observed<Process>,
    pushes: PushState,
}

impl Agent {
    /// What was counted, and what is to be seen now.
    pub(super) fn metrics(&mut self) -> Answer {
        // The one that is served comes first.
        let served = self.identity.certificates();
        let mut certificates: Vec<_> = served
            .first()
            .map(|served| ("instance", expiry::end_of(served)))
            .into_iter()
            .collect();
        if let Some(pem) = self.spec.as_deref().and_then(Spec::client_ca) {
            certificates.push(("client-ca", expiry::first_end(pem)));
        }
        let seen = Seen {
            spec: self.spec.as_deref(),
            report: self.report.as_deref(),
            trial_until: self.seen.trial_until,
            gate: &self.guard.seen(),
            denied: Nftables::open()
                .and_then(|mut nftables| nftables.counts())
                .map_err(|e| e.to_string()),
            certificates,
            process: process::observe(),
            pushes: self.outbox.state().borrow().clone(),
        };
        self.metrics.note("denied", &seen.denied);
        self.metrics.note("process", &seen.process);
        self.metrics.note("certificates", &seen.certificates());
        match self.metrics.text(&seen) {
            Ok(text) => Answer::Metrics { text },
            Err(error) => refused(Refusal::Failed, format!("the metrics can't be written: {error}")),
        }
    }
}

impl Seen<'_> {
    fn certificates(&self) -> Observed<()> {
        let wrong = self
            .certificates
            .iter()
            .find_map(|(name, end)| Some((name, end.as_ref().err()?)));
        wrong.map_or(Ok(()), |(name, reason)| Err(format!("{name}: {reason}")))
    }
}

/// A refusal as its `kind` says on the wire.
fn word(kind: &Refusal) -> String {
    let value = serde_json::to_value(kind).ok();
    let text = value.as_ref().and_then(|value| value.as_str());
    text.unwrap_or("unknown").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(gate: &Gate) -> Seen<'_> {
        Seen {
            spec: None,
            report: None,
            trial_until: None,
            gate,
            denied: Err("no table".to_owned()),
            certificates: vec![("instance", Ok(67_090_118_400)), ("client-ca", Err("bad".into()))],
            process: process::observe(),
            pushes: PushState::default(),
        }
    }

    #[test]
    fn what_can_not_be_had_is_left_out_and_told() {
        let gate = Gate::default();
        let text = Metrics::new(Durations::default()).text(&seen(&gate)).unwrap();
        for absent in [
            "portcullis_ready",
            "portcullis_spec",
            "denied_total",
            "client-ca",
            "last_success",
        ] {
            assert!(!text.contains(absent), "{absent}: {text}");
        }
        for line in [
            "portcullis_collector_success{collector=\"denied\"} 0.0",
            "portcullis_collector_success{collector=\"certificates\"} 0.0",
            "portcullis_collector_success{collector=\"process\"} 1.0",
            "portcullis_tls_certificate_expiry_timestamp_seconds{certificate=\"instance\"} 67090118400.0",
            "portcullis_agent_refusals_total{reason=\"not-permitted\"} 0",
            "portcullis_gate_repairs_total 0.0",
        ] {
            assert!(text.lines().any(|l| l == line), "{line}: {text}");
        }
        assert!(!text.contains("# EOF"), "{text}");
    }

    #[test]
    fn requests_refusals_and_durations_are_counted() {
        let metrics = Metrics::new(Durations::default());
        let local = Caller::Local(None);
        metrics.answered("spec", &local, &Answer::Spec { spec: None });
        metrics.answered("apply", &local, &refused(Refusal::StorageFull, "full"));
        metrics.answered("apply", &local, &refused(Refusal::StorageFull, "full"));
        metrics.durations.observe("gate", Duration::from_millis(2));
        let gate = Gate {
            repaired: 3,
            ..Gate::default()
        };
        let mut seen = seen(&gate);
        seen.pushes = PushState {
            queued: 2,
            oldest: Some("2026-01-01T00:00:00Z".parse().unwrap()),
            delivered: 5,
            ..PushState::default()
        };
        let tcp = Count {
            packets: 7,
            bytes: 420,
        };
        seen.denied = Ok(vec![("denied tcp".into(), tcp), ("rule ssh".into(), tcp)]);
        let text = metrics.text(&seen).unwrap();
        for line in [
            "portcullis_agent_requests_total{request=\"spec\",caller=\"local\"} 1",
            "portcullis_agent_requests_total{request=\"apply\",caller=\"local\"} 2",
            "portcullis_agent_refusals_total{reason=\"storage-full\"} 2",
            "portcullis_reconcile_duration_seconds_bucket{le=\"0.001\",scope=\"gate\"} 0",
            "portcullis_reconcile_duration_seconds_bucket{le=\"0.0025\",scope=\"gate\"} 1",
            "portcullis_reconcile_duration_seconds_count{scope=\"gate\"} 1",
            "portcullis_gate_repairs_total 3.0",
            "portcullis_packets_denied_total{reason=\"tcp\"} 7.0",
            "portcullis_denied_bytes_total{reason=\"tcp\"} 420.0",
            "# UNIT portcullis_denied_bytes bytes",
            "portcullis_report_queue_length 2.0",
            "portcullis_report_queue_oldest_timestamp_seconds 1767225600.0",
            "portcullis_report_pushes_total{result=\"delivered\"} 5.0",
            "portcullis_report_pushes_total{result=\"failed\"} 0.0",
        ] {
            assert!(text.lines().any(|l| l == line), "{line}: {text}");
        }
        assert!(!text.contains("ssh"), "{text}");
    }
}

//! The families: their names, units, and what their samples are made of.
//!
//! Names are fixed: dashboards and alerts rely on them. Units are base units, and stand at the end of a name.
//! May not live here: looking (`super`).

use std::fmt;

use portcullis_protocol::{Report, Spec, Status};
use prometheus_client::encoding::{EncodeMetric, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Metric, Registry, Unit};

use super::Seen;
use crate::agent::denied::reasons;
use crate::health::push::offer::PushState;
use crate::policy::observation::{Gate, Observed};
use crate::system::nftables::Count;
use crate::system::process::Process;

const STATUSES: [Status; 4] = [Status::Pass, Status::Warn, Status::Unknown, Status::Fail];

type Labels = Vec<(&'static str, String)>;

/// Samples that are made when they are asked for.
#[derive(Debug)]
struct Samples {
    is_counter: bool,
    rows: Vec<(Labels, f64)>,
}

impl Samples {
    fn write(&self, encoder: &mut MetricEncoder<'_>, value: f64) -> fmt::Result {
        match self.is_counter {
            true => encoder.encode_counter::<NoLabelSet, f64, f64>(&value, None),
            false => encoder.encode_gauge(&value),
        }
    }
}

impl EncodeMetric for Samples {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> fmt::Result {
        for (labels, value) in &self.rows {
            if labels.is_empty() {
                self.write(&mut encoder, *value)?;
            } else {
                self.write(&mut encoder.encode_family(labels)?, *value)?;
            }
        }
        Ok(())
    }

    fn metric_type(&self) -> MetricType {
        if self.is_counter {
            MetricType::Counter
        } else {
            MetricType::Gauge
        }
    }

    fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }
}

/// The families of one answer.
#[derive(Default)]
pub(super) struct Page(Registry);

impl Page {
    /// All of them.
    pub(super) fn registry(&self) -> &Registry {
        &self.0
    }

    /// The unit is the end of the name.
    pub(super) fn add(&mut self, name: &str, help: &str, metric: impl Metric) {
        for unit in [Unit::Seconds, Unit::Bytes] {
            let rest = name.strip_suffix(unit.as_str()).and_then(|n| n.strip_suffix('_'));
            if let Some(rest) = rest {
                return self.0.register_with_unit(rest, help, unit, metric);
            }
        }
        self.0.register(name, help, metric);
    }

    fn gauges(&mut self, name: &str, help: &str, rows: impl IntoIterator<Item = (Labels, f64)>) {
        let rows = rows.into_iter().collect();
        let is_counter = false;
        self.add(name, help, Samples { is_counter, rows });
    }

    /// `_total` comes after the name.
    fn counters(&mut self, name: &str, help: &str, rows: impl IntoIterator<Item = (Labels, f64)>) {
        let rows = rows.into_iter().collect();
        let is_counter = true;
        self.add(name, help, Samples { is_counter, rows });
    }

    fn gauge(&mut self, name: &str, help: &str, value: impl Into<Option<f64>>) {
        self.gauges(name, help, value.into().map(|value| (Labels::new(), value)));
    }

    /// Which program, and which instance.
    pub(super) fn identity(&mut self, spec: Option<&Spec>) {
        let version = vec![("version", env!("CARGO_PKG_VERSION"))];
        self.add("portcullis_build", "The agent that answers", Info::new(version));
        if let Some(spec) = spec {
            let (instance, cluster) = (&spec.instance, spec.cluster.as_ref());
            let text = |value: Option<String>| value.unwrap_or_default();
            let labels: Labels = vec![
                ("instance_id", instance.id.to_string()),
                ("name", text(instance.name.as_ref().map(ToString::to_string))),
                ("cluster_id", text(cluster.map(|cluster| cluster.id.to_string()))),
            ];
            let help = "Who the instance is, as its spec says";
            self.add("portcullis_instance", help, Info::new(labels));
        }
    }

    /// The last report.
    pub(super) fn report(&mut self, report: Option<&Report>) {
        let Some(report) = report else { return };
        self.gauge(
            "portcullis_ready",
            "Whether all required checks pass",
            number(report.ready),
        );
        self.gauge(
            "portcullis_report_timestamp_seconds",
            "When the last report was written; one is written when something changes",
            seconds(report.time),
        );
        let check = |name: &dyn fmt::Display| ("check", name.to_string());
        let all = report.checks.iter().flat_map(|one| {
            STATUSES.map(|status| {
                let labels = vec![check(&one.id), ("status", status.to_string())];
                (labels, number(one.status == status))
            })
        });
        self.gauges(
            "portcullis_check_status",
            "1 for the status that a check has, 0 for the others",
            all,
        );
        let required = report
            .checks
            .iter()
            .map(|one| (vec![check(&one.id)], number(one.required)));
        self.gauges(
            "portcullis_check_required",
            "Whether readiness needs the check",
            required,
        );
        let since = report
            .checks
            .iter()
            .map(|one| (vec![check(&one.id)], seconds(one.since)));
        self.gauges(
            "portcullis_check_since_timestamp_seconds",
            "Since when the check has its status",
            since,
        );
    }

    /// The spec that holds.
    pub(super) fn spec(&mut self, seen: &Seen<'_>) {
        self.gauge(
            "portcullis_spec_generation",
            "Generation of the spec that holds",
            seen.spec.map(|spec| spec.generation.get() as f64),
        );
        let refused = seen.report.map(|report| number(report.refused_spec.is_some()));
        self.gauge(
            "portcullis_spec_refused",
            "Whether the last spec was refused; what held before holds",
            refused,
        );
        self.gauge(
            "portcullis_spec_trial_end_timestamp_seconds",
            "When the spec on trial is taken back unless it is confirmed",
            seen.trial_until.map(seconds),
        );
    }

    /// The gate, and what it denied.
    pub(super) fn gate(&mut self, gate: &Gate, denied: &Observed<Vec<(String, Count)>>) {
        self.counters(
            "portcullis_gate_repairs",
            "Changes of the table by somebody else that were undone",
            [(Labels::new(), gate.repaired as f64)],
        );
        self.gauge(
            "portcullis_gate_exclusive",
            "Whether the kernel lets only the agent change the table",
            number(gate.owned),
        );
        self.gauge(
            "portcullis_gate_kept_hosts",
            "Hosts with sessions that are older than the gate and go on",
            gate.kept as f64,
        );
        let counts = denied.as_deref().map(reasons).unwrap_or_default();
        let labels = |reason: &str| vec![("reason", reason.to_owned())];
        self.counters(
            "portcullis_packets_denied",
            "Packets that were denied, by the rule that did; the kernel's counters, which begin anew with the table",
            counts
                .iter()
                .map(|(reason, count)| (labels(reason), count.packets as f64)),
        );
        self.counters(
            "portcullis_denied_bytes",
            "Bytes of the packets that were denied",
            counts
                .iter()
                .map(|(reason, count)| (labels(reason), count.bytes as f64)),
        );
    }

    /// Reports that are pushed.
    pub(super) fn pushes(&mut self, pushes: &PushState) {
        let result = |name: &str| vec![("result", name.to_owned())];
        self.counters(
            "portcullis_report_pushes",
            "Tries to push a report, by result",
            [
                (result("delivered"), pushes.delivered as f64),
                (result("failed"), pushes.failed as f64),
            ],
        );
        self.gauge(
            "portcullis_report_queue_length",
            "Reports that wait for being taken by the receiver",
            pushes.queued as f64,
        );
        self.gauge(
            "portcullis_report_queue_oldest_timestamp_seconds",
            "Since when the oldest report waits",
            pushes.oldest.map(seconds),
        );
        self.counters(
            "portcullis_reports_dropped",
            "Reports that were dropped because no more could wait",
            [(Labels::new(), pushes.dropped as f64)],
        );
        self.gauge(
            "portcullis_report_last_success_timestamp_seconds",
            "When the receiver took a report last",
            pushes.last_success.map(seconds),
        );
    }

    /// When certificates end.
    pub(super) fn certificates(&mut self, certificates: &[(&'static str, Observed<i64>)]) {
        let ends = certificates.iter().filter_map(|(name, end)| {
            let end = *end.as_ref().ok()?;
            Some((vec![("certificate", (*name).to_owned())], end as f64))
        });
        self.gauges(
            "portcullis_tls_certificate_expiry_timestamp_seconds",
            "When a certificate ends: the instance's own, and the first of those that callers are known by",
            ends,
        );
    }

    /// The names that Prometheus' client libraries agree on.
    pub(super) fn process(&mut self, process: &Observed<Process>) {
        let process = process.as_ref().ok();
        let cpu = process.map(|process| (Labels::new(), process.cpu_seconds));
        self.counters(
            "process_cpu_seconds",
            "The agent's time on processors, in user and kernel mode",
            cpu,
        );
        let mut gauge = |name: &str, help: &str, value: fn(&Process) -> Option<f64>| {
            self.gauge(name, help, process.and_then(value));
        };
        gauge("process_resident_memory_bytes", "Resident memory", |p| {
            Some(p.resident_bytes as f64)
        });
        gauge("process_virtual_memory_bytes", "Address space", |p| {
            Some(p.virtual_bytes as f64)
        });
        gauge("process_start_time_seconds", "When the agent was started", |p| {
            Some(p.start_time as f64)
        });
        gauge("process_open_fds", "Open descriptors", |p| {
            p.open_files.map(|n| n as f64)
        });
        gauge("process_max_fds", "Most descriptors that may be open", |p| {
            p.open_files_limit.map(|n| n as f64)
        });
    }

    /// What could not be had.
    pub(super) fn collectors(&mut self, seen: &Seen<'_>) {
        let all = [
            ("denied", seen.denied.is_ok()),
            ("process", seen.process.is_ok()),
            ("certificates", seen.certificates().is_ok()),
        ];
        self.gauges(
            "portcullis_collector_success",
            "Whether what the other metrics of that kind are made of could be had",
            all.map(|(name, is_ok)| (vec![("collector", name.to_owned())], number(is_ok))),
        );
    }
}

fn number(value: bool) -> f64 {
    f64::from(u8::from(value))
}

fn seconds(time: jiff::Timestamp) -> f64 {
    time.as_second() as f64
}

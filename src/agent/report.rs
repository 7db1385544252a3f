//! Writing the health report from what was seen.
//!
//! May not live here: judging (`policy::readiness`), sending.

use jiff::Timestamp;
use portcullis_protocol::report::{Agent, REPORT_VERSION, ReportInstance};
use portcullis_protocol::{Report, Spec};

use crate::policy::observation::Observations;
use crate::policy::readiness::{checks, is_ready};
use crate::system::host;

/// The report on what was seen; `since` of each check is carried on from the previous one.
pub fn write(
    spec: Option<&Spec>,
    refused: Option<&str>,
    seen: &Observations,
    previous: Option<&Report>,
) -> Report {
    let now = Timestamp::now();
    let before = previous
        .map(|report| report.checks.as_slice())
        .unwrap_or_default();
    let checks = checks(spec, seen, before, now);
    Report {
        version: REPORT_VERSION,
        instance: ReportInstance {
            id: spec.map(|s| s.instance.id.to_string()).unwrap_or_default(),
        },
        agent: Agent {
            version: env!("CARGO_PKG_VERSION").to_owned(),
        },
        generation: spec.map(|s| s.generation.get()),
        ready: is_ready(&checks),
        time: now,
        checks,
        host_keys: seen.sshd.host_keys.clone(),
        host: host::facts(),
        refused_spec: refused.map(str::to_owned),
    }
}

//! The health report: one document for `check`, `status`, `GET /v1/health` and the push.
//!
//! May not live here: how a check comes to its status (the agent's `policy::readiness`).

use std::collections::BTreeMap;
use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use crate::host_key::HostKey;
use crate::requirement::Requirement;

/// The version of the report's format.
pub const REPORT_VERSION: u32 = 1;

/// Outcome of a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Proven to be as it must be.
    Pass,
    /// Works, but somebody should look.
    Warn,
    /// Could not be found out, or is not examined by this version.
    Unknown,
    /// Proven not to be as it must be.
    Fail,
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Pass => "pass",
            Self::Warn => "warn",
            Self::Unknown => "unknown",
            Self::Fail => "fail",
        })
    }
}

macro_rules! check_ids {
    ($($(#[$doc:meta])* $variant:ident = $name:literal, $requirement:ident;)*) => {
        /// A check's name. Names are fixed: control planes rely on them.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
        pub enum CheckId {
            $($(#[$doc])* #[serde(rename = $name)] $variant,)*
        }

        impl CheckId {
            /// All checks, in the order in which reports list them.
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];

            /// The name in reports.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $name),* }
            }

            /// The requirement that the check watches.
            pub fn requirement(self) -> Requirement {
                match self { $(Self::$variant => Requirement::$requirement),* }
            }
        }
    };
}

check_ids! {
    /// The manager answers on D-Bus and its state is a working one.
    SystemdRunning = "systemd.running", BrevSys1;
    /// `systemctl is-system-running` answers.
    SystemdSystemctl = "systemd.systemctl", BrevSys1;
    /// The service or socket unit of sshd is active.
    SshdRunning = "sshd.running", BrevSsh1;
    /// A real SSH handshake succeeds.
    SshdReachable = "sshd.reachable", BrevSsh1;
    /// sshd's host keys are those that were first seen for this instance.
    SshdHostKeys = "sshd.host-keys", BrevSsh1;
    /// sshd offers public key authentication.
    SshdPubkey = "sshd.pubkey", BrevSsh2;
    /// sshd offers no password authentication.
    SshdPassword = "sshd.password", BrevSsh2;
    /// sshd offers no weak algorithm.
    SshdAlgorithms = "sshd.algorithms", BrevData3;
    /// Each key of the spec is in the file that sshd reads.
    KeysInstalled = "keys.installed", BrevSsh3;
    /// sshd says that it would accept each key.
    KeysAccepted = "keys.accepted", BrevSsh2;
    /// The kernel holds the planned ruleset, read back.
    FirewallApplied = "firewall.applied", BrevNet2;
    /// What the kernel holds denies inbound by default.
    FirewallDefaultDeny = "firewall.default-deny", BrevNet1;
    /// A rule lets SSH in.
    FirewallSshAllowed = "firewall.ssh-allowed", BrevSsh4;
    /// Published container ports are filtered too, before address translation.
    FirewallContainers = "firewall.containers", BrevNet1;
    /// Other rules of the host that work against ours.
    FirewallConflicts = "firewall.conflicts", BrevNet2;
    /// The kernel admits each peer's addresses.
    ClusterPeers = "cluster.peers", BrevClu1;
    /// Persistent storage is encrypted.
    StorageEncrypted = "storage.encrypted", BrevData1;
    /// Our own endpoint speaks TLS 1.2 or newer.
    TransitTls = "transit.tls", BrevData2;
    /// Listening sockets against the gate.
    ExposureListeners = "exposure.listeners", BrevNet1;
}

impl fmt::Display for CheckId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// One check's outcome, with what it rests on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Check {
    /// Its name.
    pub id: CheckId,
    /// Its outcome.
    pub status: Status,
    /// Whether readiness needs it.
    pub required: bool,
    /// The requirement that it watches.
    pub requirement: Requirement,
    /// The outcome in one sentence, for people.
    pub summary: String,
    /// What was observed.
    pub evidence: BTreeMap<String, serde_json::Value>,
    /// Since when the status is this one.
    pub since: jiff::Timestamp,
    /// What to do, if something is to be done.
    pub remedy: Option<String>,
}

impl Check {
    /// Whether this check keeps the instance from being ready.
    pub fn blocks_readiness(&self) -> bool {
        self.required && matches!(self.status, Status::Fail | Status::Unknown)
    }
}

/// Which instance reports.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ReportInstance {
    /// The provider's id; empty before a spec is accepted.
    pub id: String,
}

/// The program that reports.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Agent {
    /// Its version.
    pub version: String,
}

/// A mounted file system.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Disk {
    /// Where it is mounted.
    pub mount: String,
    /// Its size, in bytes.
    pub total_bytes: u64,
    /// What users can still write, in bytes.
    pub available_bytes: u64,
}

/// Facts about the host.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct HostFacts {
    /// Time since boot, in seconds.
    pub uptime_s: u64,
    /// Installed memory, in bytes.
    pub memory_bytes: u64,
    /// Load averages over 1, 5 and 15 minutes.
    pub load: [f64; 3],
    /// Mounted file systems.
    pub disks: Vec<Disk>,
}

/// The health report.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Report {
    /// Version of this format: 1.
    pub version: u32,
    /// Which instance reports.
    pub instance: ReportInstance,
    /// The program that reports.
    pub agent: Agent,
    /// Generation of the accepted spec; none before the first.
    pub generation: Option<u64>,
    /// Whether all required checks pass: a login would work, and nothing else gets in.
    pub ready: bool,
    /// When this was written.
    pub time: jiff::Timestamp,
    /// All checks.
    pub checks: Vec<Check>,
    /// sshd's public host keys.
    pub host_keys: Vec<HostKey>,
    /// Facts about the host.
    pub host: HostFacts,
    /// A refused spec's problems, until a good one is accepted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused_spec: Option<String>,
}

impl Report {
    /// The check of that name.
    pub fn check(&self, id: CheckId) -> Option<&Check> {
        self.checks.iter().find(|check| check.id == id)
    }

    /// The checks that keep the instance from being ready.
    pub fn blocking(&self) -> impl Iterator<Item = &Check> {
        self.checks.iter().filter(|check| check.blocks_readiness())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_in_json_and_in_text_agree() {
        for id in CheckId::ALL {
            assert_eq!(serde_json::to_value(id).unwrap(), id.as_str());
        }
    }

    #[test]
    fn an_old_report_is_still_read() {
        let report: Report = serde_json::from_str(include_str!("../tests/report-v1.json")).unwrap();
        assert!(report.ready);
        assert_eq!(
            report.check(CheckId::SshdRunning).unwrap().requirement,
            Requirement::BrevSsh1
        );
        assert_eq!(report.host_keys[0].key, None);
    }

    #[test]
    fn a_report_with_whole_host_keys_is_read() {
        let text = include_str!("../tests/report-v1-host-keys.json");
        let report: Report = serde_json::from_str(text).unwrap();
        assert_eq!(report.check(CheckId::SshdHostKeys).unwrap().status, Status::Pass);
        for key in &report.host_keys {
            assert_eq!(Some(key.verified_key().unwrap()), key.key);
        }
    }
}

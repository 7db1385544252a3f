//! Logging: to journald with fields and stable message ids, else to standard error.
//!
//! May not live here: secrets, and text from outside in a message (it goes into a field, where a
//! line end can't forge an entry).

use std::fs;
use std::io::IsTerminal;

use tracing::level_filters::LevelFilter;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;

use crate::policy::exposure::socket::unit_of;

/// Message ids (journald's `MESSAGE_ID`): fixed, so that `journalctl MESSAGE_ID=…` and alerts keep working.
pub mod id {
    /// The daemon has done its first reconcile.
    pub const STARTED: &str = "5b3f2d0c1a5e4c6e8d0f7a9b1c2d3e01";
    /// The daemon ends; the gate stays.
    pub const STOPPED: &str = "5b3f2d0c1a5e4c6e8d0f7a9b1c2d3e02";
    /// A spec was accepted.
    pub const SPEC_ACCEPTED: &str = "5b3f2d0c1a5e4c6e8d0f7a9b1c2d3e03";
    /// A spec was refused; nothing changed.
    pub const SPEC_REFUSED: &str = "5b3f2d0c1a5e4c6e8d0f7a9b1c2d3e04";
    /// What was accepted says something that may not be meant.
    pub const SPEC_WARNINGS: &str = "5b3f2d0c1a5e4c6e8d0f7a9b1c2d3e20";
    /// The kernel took a new ruleset.
    pub const GATE_APPLIED: &str = "5b3f2d0c1a5e4c6e8d0f7a9b1c2d3e05";
    /// Somebody else changed our table, and it was put right.
    pub const GATE_REPAIRED: &str = "5b3f2d0c1a5e4c6e8d0f7a9b1c2d3e06";
    /// The kernel refused the ruleset.
    pub const GATE_FAILED: &str = "5b3f2d0c1a5e4c6e8d0f7a9b1c2d3e07";
    /// A user's key file was written.
    pub const KEYS_WRITTEN: &str = "5b3f2d0c1a5e4c6e8d0f7a9b1c2d3e08";
    /// A user's keys could not be put in place.
    pub const KEYS_FAILED: &str = "5b3f2d0c1a5e4c6e8d0f7a9b1c2d3e09";
    /// The host keys of an instance were seen for the first time.
    pub const HOST_KEYS_REMEMBERED: &str = "5b3f2d0c1a5e4c6e8d0f7a9b1c2d3e30";
    /// The host keys are not those that were first seen, or sshd shows another one.
    pub const HOST_KEYS_CHANGED: &str = "5b3f2d0c1a5e4c6e8d0f7a9b1c2d3e31";
    /// An operator took changed host keys for good.
    pub const HOST_KEYS_TRUSTED: &str = "5b3f2d0c1a5e4c6e8d0f7a9b1c2d3e32";
    /// The instance became ready, or is no longer.
    pub const READINESS: &str = "5b3f2d0c1a5e4c6e8d0f7a9b1c2d3e0a";
    /// A report could not be delivered yet.
    pub const REPORT_FAILED: &str = "5b3f2d0c1a5e4c6e8d0f7a9b1c2d3e0b";
    /// Reports are delivered again, after tries that failed.
    pub const REPORT_DELIVERED: &str = "5b3f2d0c1a5e4c6e8d0f7a9b1c2d3e6c";
    /// A report of a change is lost: no room, no disk, or the receiver refuses it.
    pub const REPORT_DROPPED: &str = "5b3f2d0c1a5e4c6e8d0f7a9b1c2d3e6d";
    /// The credentials for pushing reports can't be used.
    pub const REPORT_CREDENTIALS: &str = "5b3f2d0c1a5e4c6e8d0f7a9b1c2d3e6e";
    /// A credential of systemd can't be used: the enrolment token, the external id.
    pub const CREDENTIAL: &str = "5b3f2d0c1a5e4c6e8d0f7a9b1c2d3e90";
    /// A spec that was on trial was confirmed.
    pub const SPEC_CONFIRMED: &str = "5b3f2d0c1a5e4c6e8d0f7a9b1c2d3e0e";
    /// A spec that was on trial was given up.
    pub const SPEC_REVERTED: &str = "5b3f2d0c1a5e4c6e8d0f7a9b1c2d3e0f";
    /// A session ended because what let it in was revoked.
    pub const SESSION_ENDED: &str = "5b3f2d0c1a5e4c6e8d0f7a9b1c2d3e0d";
    /// An SSH session ended because the key that opened it was taken away.
    pub const SSH_SESSION_ENDED: &str = "5b3f2d0c1a5e4c6e8d0f7a9b1c2d3e40";
    /// An SSH session of a user whose key was taken away could not be ended, or not be told apart.
    pub const SSH_SESSION_LEFT: &str = "5b3f2d0c1a5e4c6e8d0f7a9b1c2d3e41";
    /// A packet that no rule let in: one of the sample that is told.
    pub const DENIED: &str = "5b3f2d0c1a5e4c6e8d0f7a9b1c2d3e10";
    /// A stopped sshd was started, or could not be.
    pub const SSHD_STARTED: &str = "5b3f2d0c1a5e4c6e8d0f7a9b1c2d3e50";
    /// Our drop-in among sshd's was written or removed.
    pub const SSHD_CONFIGURED: &str = "5b3f2d0c1a5e4c6e8d0f7a9b1c2d3e51";
    /// Our drop-in could not be put in place, or was taken back.
    pub const SSHD_REFUSED: &str = "5b3f2d0c1a5e4c6e8d0f7a9b1c2d3e52";
    /// A process on the front's channel was turned away, or said what the front may not say.
    pub const FRONT_REFUSED: &str = "5b3f2d0c1a5e4c6e8d0f7a9b1c2d3e60";
    /// One of the two processes is not there for the other.
    pub const FRONT_LOST: &str = "5b3f2d0c1a5e4c6e8d0f7a9b1c2d3e61";
    /// A caller over HTTPS was refused: its certificate, its role, or what it asked for.
    pub const ACCESS_REFUSED: &str = "5b3f2d0c1a5e4c6e8d0f7a9b1c2d3e64";
    /// The owner revoked a role, or restored one.
    pub const ACCESS_CHANGED: &str = "5b3f2d0c1a5e4c6e8d0f7a9b1c2d3e65";
    /// A record of the audit log.
    pub const AUDIT: &str = "5b3f2d0c1a5e4c6e8d0f7a9b1c2d3e68";
    /// The audit log can't be written: its records wait in memory.
    pub const AUDIT_FAILED: &str = "5b3f2d0c1a5e4c6e8d0f7a9b1c2d3e69";
    /// The audit log was found to be changed, cut or taken away.
    pub const AUDIT_BROKEN: &str = "5b3f2d0c1a5e4c6e8d0f7a9b1c2d3e6a";
    /// A part of the metrics can't be had, and is left out of them.
    pub const METRICS_INCOMPLETE: &str = "5b3f2d0c1a5e4c6e8d0f7a9b1c2d3e70";
    /// Callers of the HTTPS endpoint were turned away, for they asked too much of it.
    pub const TURNED_AWAY: &str = "5b3f2d0c1a5e4c6e8d0f7a9b1c2d3e74";
    /// The enrolment token was used, and is forgotten.
    pub const TOKEN_USED: &str = "5b3f2d0c1a5e4c6e8d0f7a9b1c2d3e78";
    /// The system's clock is not what was proven.
    pub const CLOCK_WRONG: &str = "5b3f2d0c1a5e4c6e8d0f7a9b1c2d3e79";
    /// The control plane's authority certified the TLS key, for the first time or anew.
    pub const ENROLLED: &str = "5b3f2d0c1a5e4c6e8d0f7a9b1c2d3e7a";
    /// No certificate yet; it is tried again.
    pub const ENROLMENT_FAILED: &str = "5b3f2d0c1a5e4c6e8d0f7a9b1c2d3e7b";
    /// The state on disk was not what holds, and is written anew.
    pub const STATE_RESTORED: &str = "5b3f2d0c1a5e4c6e8d0f7a9b1c2d3e94";
    /// The disk does not hold what was accepted, and can't be given it.
    pub const STATE_LOST: &str = "5b3f2d0c1a5e4c6e8d0f7a9b1c2d3e95";
    /// Something that the daemon needs is missing; it goes on without.
    pub const DEGRADED: &str = "5b3f2d0c1a5e4c6e8d0f7a9b1c2d3e0c";
}

/// Starts logging: straight to the journal under systemd, and for a daemon in the background, which
/// has no standard error, wherever there is a journal.
pub fn start(verbose: bool, in_background: bool) {
    let level = if verbose {
        LevelFilter::DEBUG
    } else {
        LevelFilter::INFO
    };
    let wanted = in_background || std::env::var_os("JOURNAL_STREAM").is_some();
    let journal = wanted.then(|| tracing_journald::layer().ok()).flatten();
    match journal {
        Some(journal) => {
            let journal = journal
                .with_field_prefix(None)
                .with_syslog_identifier("portcullis".to_owned())
                .with_custom_fields(unit().map(|unit| ("OBJECT_SYSTEMD_UNIT", unit)));
            let _ = tracing_subscriber::registry()
                .with(level)
                .with(journal)
                .try_init();
        }
        None => {
            let text = tracing_subscriber::fmt::layer()
                .with_writer(std::io::stderr)
                .with_ansi(std::io::stderr().is_terminal())
                .with_target(false);
            let _ = tracing_subscriber::registry().with(level).with(text).try_init();
        }
    }
}

/// The unit that this runs in. journald looks for it by itself, but too late for a process that has just ended
/// (systemd#2913); `journalctl -u` takes root's word for it as well (systemd.journal-fields(7)).
fn unit() -> Option<String> {
    let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
    // cgroups(7): `hierarchy:controllers:path`; one hierarchy is systemd's.
    groups.lines().find_map(|line| {
        let (_, line) = line.split_once(':')?;
        match line.split_once(':')? {
            ("" | "name=systemd", path) => unit_of(path),
            _ => None,
        }
    })
}

#[cfg(test)]
mod tests {
    /// Two events of one id can't be told apart by an alert.
    #[test]
    fn each_message_has_an_id_of_its_own() {
        let source = include_str!("log.rs");
        let mut ids: Vec<&str> = source
            .lines()
            .filter_map(|line| line.trim().strip_prefix("pub const ")?.split('"').nth(1))
            .collect();
        let all = ids.len();
        ids.sort();
        ids.dedup();
        assert!(all > 20 && ids.len() == all, "{all} {}", ids.len());
        assert!(
            ids.iter()
                .all(|id| id.len() == 32 && id.bytes().all(|b| b.is_ascii_hexdigit()))
        );
    }
}

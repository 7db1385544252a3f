//! What can be said of an instance whose daemon does not answer: what the kernel, systemd and the disk say.
//!
//! May not live here: what only the daemon knows.

use std::path::Path;
use std::sync::Arc;

use jiff::Timestamp;
use portcullis_protocol::{Check, CheckId, Status};
use serde::Serialize;

use super::report::{Page, instance};
use crate::agent::gate;
use crate::agent::state::Store;
use crate::config::Settings;
use crate::policy::observation::{Observations, Observed};
use crate::policy::readiness::checks;
use crate::system::command;

/// The daemon's unit.
const UNIT: &str = "portcullis.service";
const SYSTEMCTL: &str = "/usr/bin/systemctl";

/// The checks that the kernel alone answers.
const OF_THE_KERNEL: [CheckId; 4] = [
    CheckId::FirewallApplied,
    CheckId::FirewallDefaultDeny,
    CheckId::FirewallContainers,
    CheckId::ClusterPeers,
];

/// An instance without its daemon.
#[derive(Debug, Serialize)]
pub struct Absent {
    /// Always false: nobody proves anything.
    ready: bool,
    /// Why the daemon could not be asked.
    daemon: String,
    /// What systemd says of its unit.
    unit: Option<UnitState>,
    /// Why systemd could not be asked.
    unit_error: Option<String>,
    /// The instance's id, as the accepted spec on disk has it; empty without one.
    instance: String,
    /// The accepted spec's generation, from disk.
    generation: Option<u64>,
    /// Why the spec on disk can't be used.
    spec_error: Option<String>,
    /// What the kernel says.
    checks: Vec<Check>,
    /// When this was looked at.
    time: Timestamp,
}

/// systemd's properties of a unit (org.freedesktop.systemd1(5)).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
struct UnitState {
    load: String,
    active: String,
    sub: String,
    result: String,
    exit_status: String,
    restarts: String,
    since: String,
}

impl Absent {
    /// Looks, without changing anything.
    pub async fn look(settings: &Settings, why: String) -> Self {
        let store = Store::new(&settings.state_dir);
        let (accepted, mut spec_error) = match store.spec() {
            Ok(spec) => (spec.map(Arc::new), None),
            Err(error) => (None, Some(error.to_string())),
        };
        // A change on trial is what the kernel holds; the daemon ends it when it is back.
        let spec = match store.trial(accepted.as_deref()) {
            Ok(trial) => trial.map(|trial| trial.spec).or(accepted),
            Err(error) => {
                spec_error.get_or_insert(error.to_string());
                accepted
            }
        };
        let spec = spec.as_deref();
        let now = Timestamp::now();
        let seen = Observations {
            gate: Arc::new(gate::observe(settings, spec)),
            ..Observations::unseen("the daemon does not answer")
        };
        let mut checks = checks(spec, &seen, &[], now);
        checks.retain(|check| OF_THE_KERNEL.contains(&check.id));
        let (unit, unit_error) = match unit_state().await {
            Ok(unit) => (Some(unit), None),
            Err(reason) => (None, Some(reason)),
        };
        Self {
            ready: false,
            daemon: why,
            unit,
            unit_error,
            instance: spec.map(|s| s.instance.id.to_string()).unwrap_or_default(),
            generation: spec.map(|s| s.generation.get()),
            spec_error,
            checks,
            time: now,
        }
    }

    /// Whether systemd is about to do something with the daemon; nobody tells when it has.
    pub fn is_settling(&self) -> bool {
        let states = ["activating", "deactivating", "reloading"];
        self.unit
            .as_ref()
            .is_some_and(|unit| states.contains(&unit.active.as_str()))
    }

    /// Whether an operator would see something else.
    pub fn is_news_after(&self, before: &Self) -> bool {
        let told = |absent: &Self| -> Vec<(Status, String)> {
            let checks = absent.checks.iter();
            checks
                .map(|check| (check.status, check.summary.clone()))
                .collect()
        };
        self.daemon != before.daemon
            || self.unit != before.unit
            || self.generation != before.generation
            || told(self) != told(before)
    }

    /// For people.
    pub fn text(&self, now: Timestamp, width: usize) -> String {
        let mut page = Page::new(now, width);
        page.headline("NO DAEMON", Status::Fail, &self.daemon);
        if let Some(unit) = &self.unit {
            page.fact("unit", &unit.words());
        }
        if let Some(reason) = &self.unit_error {
            page.fact("unit", &format!("systemd can't be asked: {reason}"));
        }
        page.fact(
            "instance",
            &format!("{} (from disk)", instance(&self.instance, self.generation)),
        );
        if let Some(error) = &self.spec_error {
            page.fact("spec", error);
        }
        page.fact(
            "meanwhile",
            "the kernel goes on with the rules that it holds; new specs, keys, repairs and reports wait",
        );
        page.checks(&self.checks, None);
        page.heading("To do");
        if self.unit.as_ref().is_some_and(|unit| unit.active == "active") {
            page.command("systemctl restart portcullis", "it runs and does not answer");
        } else {
            page.command("systemctl start portcullis", "opens nothing that is shut");
        }
        page.command("journalctl -u portcullis -n 30 --no-pager", "why it ended");
        page.command("portcullis check", "looks at everything without the daemon");
        page.end()
    }
}

impl UnitState {
    fn parse(text: &str) -> Self {
        let mut state = Self::default();
        for (name, value) in text.lines().filter_map(|line| line.split_once('=')) {
            let field = match name {
                "LoadState" => &mut state.load,
                "ActiveState" => &mut state.active,
                "SubState" => &mut state.sub,
                "Result" => &mut state.result,
                "ExecMainStatus" => &mut state.exit_status,
                "NRestarts" => &mut state.restarts,
                "StateChangeTimestamp" => &mut state.since,
                _ => continue,
            };
            value.clone_into(field);
        }
        state
    }

    fn words(&self) -> String {
        if self.load == "not-found" {
            return format!("{UNIT} is not installed");
        }
        let mut words = format!("{UNIT} is {} ({})", self.active, self.sub);
        if !self.since.is_empty() {
            words += &format!(" since {}", self.since);
        }
        if !matches!(self.result.as_str(), "" | "success") {
            words += &format!("; it ended with {}, status {}", self.result, self.exit_status);
        }
        if !matches!(self.restarts.as_str(), "" | "0") {
            words += &format!("; restarted {} times", self.restarts);
        }
        words
    }
}

async fn unit_state() -> Observed<UnitState> {
    let properties = "--property=LoadState,ActiveState,SubState,Result,ExecMainStatus,NRestarts,\
                      StateChangeTimestamp";
    let output = command::ask(Path::new(SYSTEMCTL), ["show", properties, UNIT]).await?;
    if !output.status.success() {
        return Err(command::said(&output));
    }
    Ok(UnitState::parse(&String::from_utf8_lossy(&output.stdout)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn absent(unit: Option<UnitState>) -> Absent {
        let time = Timestamp::UNIX_EPOCH;
        let seen = Observations::unseen("the daemon does not answer");
        let mut checks = checks(None, &seen, &[], time);
        checks.retain(|check| check.id == CheckId::FirewallDefaultDeny);
        Absent {
            ready: false,
            daemon: "/run/portcullis/control.sock: No such file or directory (os error 2)".to_owned(),
            unit_error: unit.is_none().then(|| "no bus".to_owned()),
            unit,
            instance: "i-0a1".to_owned(),
            generation: Some(3),
            spec_error: None,
            checks,
            time,
        }
    }

    #[test]
    fn without_a_daemon_it_says_what_the_kernel_holds_and_what_to_do() {
        let unit = UnitState::parse(
            "LoadState=loaded\nActiveState=failed\nSubState=failed\nResult=exit-code\nExecMainStatus=1\n\
             NRestarts=3\nStateChangeTimestamp=Tue 2026-11-24 09:41:12 UTC\n",
        );
        let text = absent(Some(unit)).text(Timestamp::UNIX_EPOCH, 100);
        let expected = "\
NO DAEMON  /run/portcullis/control.sock: No such file or directory (os error 2)
  unit      portcullis.service is failed (failed) since Tue 2026-11-24 09:41:12 UTC; it ended with
            exit-code, status 1; restarted 3 times
  instance  i-0a1, generation 3 (from disk)
  meanwhile the kernel goes on with the rules that it holds; new specs, keys, repairs and reports
            wait

FAIL     firewall.default-deny (BREV-NET-1): nf_tables can't be read: the daemon does not answer
         to do: be root; else give the unit CAP_NET_ADMIN back (`systemctl cat portcullis`), or the
         kernel its module (`modprobe nf_tables`); more: portcullis-operations(7),
         firewall.default-deny

To do
  systemctl start portcullis                     opens nothing that is shut
  journalctl -u portcullis -n 30 --no-pager      why it ended
  portcullis check                               looks at everything without the daemon";
        assert_eq!(anstream::adapter::strip_str(&text).to_string(), expected);
    }

    #[test]
    fn one_that_runs_and_is_silent_is_restarted() {
        let unit =
            UnitState::parse("LoadState=loaded\nActiveState=active\nSubState=running\nResult=success\n");
        let text = absent(Some(unit)).text(Timestamp::UNIX_EPOCH, 200);
        assert!(
            text.contains("portcullis.service is active (running)\n"),
            "{text}"
        );
        assert!(text.contains("systemctl restart portcullis"), "{text}");
        let unasked = absent(None).text(Timestamp::UNIX_EPOCH, 200);
        assert!(unasked.contains("systemd can't be asked: no bus"), "{unasked}");
    }
}

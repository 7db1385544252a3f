//! Checks of systemd and sshd: whether a login would get as far as a key.
//!
//! May not live here: asking any of them.

use std::collections::BTreeMap;

use portcullis_protocol::Status;
use serde_json::json;

use super::Finding;
use crate::policy::observation::{Handshake, Interactive, Observed, Sshd};

pub fn systemd_running(state: &Observed<String>) -> Finding {
    match state.as_deref() {
        Ok(state @ ("running" | "starting" | "initializing")) => Finding::pass(format!("systemd is {state}")),
        Ok("degraded") => Finding::warn(
            "systemd is degraded: a unit has failed",
            "look at `systemctl --failed`",
        ),
        Ok(state) => Finding::fail(
            format!("systemd is {state}"),
            "look at `systemctl list-jobs` and the journal",
        ),
        Err(reason) => Finding::fail(
            format!("systemd does not answer on D-Bus: {reason}"),
            "`systemctl start dbus.socket`, or install dbus; the gate holds without it",
        ),
    }
}

pub fn systemctl(word: &Observed<String>) -> Finding {
    match word {
        Ok(word) => Finding::pass(format!("`systemctl is-system-running` answers {word:?}")),
        Err(reason) => Finding::fail(
            format!("systemctl does not answer: {reason}"),
            "run `systemctl status` by hand",
        ),
    }
}

pub fn sshd_running(sshd: &Sshd) -> Finding {
    let remedy = "install openssh-server, then `systemctl enable --now ssh` (or sshd)";
    let units = match &sshd.units {
        Ok(units) if units.is_empty() => {
            return restarts(Finding::fail("no unit of sshd is loaded", remedy), sshd);
        }
        Ok(units) => units,
        // Whoever is woken up by that should not install what is there.
        Err(reason) => {
            return Finding::fail(
                format!("sshd's units can't be asked for: {reason}"),
                "sshd may well run: mend systemd.running first",
            );
        }
    };
    let list: BTreeMap<_, _> = units
        .iter()
        .map(|u| (u.name.clone(), json!(u.active_state)))
        .collect();
    let ports = sshd.config.as_ref().map(|c| c.ports.clone()).unwrap_or_default();
    let finding = match units.iter().find(|unit| unit.active_state == "active") {
        Some(unit) => {
            let ports = ports.iter().map(u16::to_string).collect::<Vec<_>>().join(", ");
            Finding::pass(format!("{} is active, port {ports}", unit.name))
        }
        None => Finding::fail(format!("{} is {}", units[0].name, units[0].active_state), remedy),
    };
    restarts(finding, sshd).with("units", json!(list))
}

fn restarts(finding: Finding, sshd: &Sshd) -> Finding {
    match &sshd.care.last_restart {
        Some(Ok(said) | Err(said)) => finding
            .with("restarts", sshd.care.restarts)
            .with("last_restart", said.clone()),
        None => finding,
    }
}

pub fn sshd_reachable(sshd: &Sshd) -> Finding {
    let remedy = "look at `journalctl -u ssh -u sshd` and at `sshd -t`";
    if let Some(reason) = sshd.penalised() {
        let summary = format!("whether sshd can be reached can't be told now: {reason}");
        return Finding::new(Status::Unknown, summary).remedy(
            "wait, it is looked at again by itself; so that it does not come again, let sshd listen on \
             127.0.0.1 too, or write `PerSourcePenaltyExemptList ::1` into a drop-in of /etc/ssh/sshd_config.d/",
        );
    }
    match &sshd.handshake {
        Ok(_) if !sshd.unanswered.is_empty() => {
            let (address, reason) = &sshd.unanswered[0];
            let ports: Vec<u16> = sshd
                .unanswered
                .iter()
                .map(|(address, _)| address.port())
                .collect();
            Finding::fail(
                format!("no SSH handshake on port {}: {reason}", address.port()),
                format!("{remedy}; with ssh.socket, its ListenStream= and sshd's Port must agree"),
            )
            .with("unanswered", ports)
        }
        Ok(shake) => Finding::pass(format!("{} completed an SSH handshake", answering(sshd, shake)))
            .with("server", shake.server_id.clone())
            .with("host_key", shake.host_key.fingerprint.clone())
            .with("methods", shake.methods.clone()),
        Err(reason) => Finding::fail(format!("no SSH handshake: {reason}"), remedy),
    }
}

fn answering(sshd: &Sshd, shake: &Handshake) -> String {
    let ports = sshd.config.as_ref().map(|config| config.ports.as_slice());
    match ports.unwrap_or_default() {
        ports @ [_, _, ..] => {
            let ports: Vec<String> = ports.iter().map(u16::to_string).collect();
            format!("each of the ports {}", ports.join(", "))
        }
        _ => format!("port {}", shake.port),
    }
}

pub fn sshd_pubkey(sshd: &Sshd) -> Finding {
    let remedy = "set `PubkeyAuthentication yes` in /etc/ssh/sshd_config.d/ and reload sshd";
    match (&sshd.config, &sshd.handshake) {
        (Ok(config), _) if !config.pubkey => {
            Finding::fail("sshd's configuration refuses public keys", remedy)
        }
        (_, Ok(shake)) if shake.methods.iter().any(|m| m == "publickey") => {
            Finding::pass("sshd offers publickey").with("methods", shake.methods.clone())
        }
        (_, Ok(shake)) if !shake.methods.is_empty() => {
            Finding::fail("sshd does not offer publickey", remedy).with("methods", shake.methods.clone())
        }
        (Ok(_), Ok(_)) => Finding::pass("sshd's effective configuration allows public keys"),
        (Err(reason), _) | (_, Err(reason)) => {
            Finding::new(Status::Unknown, format!("sshd could not be asked: {reason}"))
        }
    }
}

pub fn sshd_password(sshd: &Sshd) -> Finding {
    let remedy =
        "set `PasswordAuthentication no` and `KbdInteractiveAuthentication no` in a drop-in that sorts first";
    let offered = |method: &&str| {
        let offers = |shake: &Handshake| shake.methods.iter().any(|m| m == method);
        sshd.handshake.as_ref().is_ok_and(offers)
    };
    let finding = match &sshd.config {
        Ok(config) if config.password => Finding::warn("sshd accepts passwords", remedy),
        Ok(config) if config.keyboard_interactive => {
            Finding::warn("sshd accepts keyboard-interactive logins", remedy)
        }
        Ok(_) => match (
            let_in_by_match(sshd),
            ["password", "keyboard-interactive"].into_iter().find(offered),
        ) {
            (Some(finding), _) => finding,
            (None, Some(method)) => Finding::warn(
                format!("sshd offers {method}, which a Match block allows"),
                "look at `sshd -T -C user=USER,host=localhost,addr=127.0.0.1` for the spec's users",
            ),
            (None, None) => Finding::pass("sshd accepts neither passwords nor keyboard-interactive logins"),
        },
        Err(reason) => Finding::new(
            Status::Unknown,
            format!("sshd's configuration can't be read: {reason}"),
        ),
    };
    drop_in(finding, sshd)
}

/// How many users a summary names; all of them are in the evidence.
const NAMED: usize = 3;

/// Names the users with keys for whom a `Match` block allows what the configuration for all does not.
fn let_in_by_match(sshd: &Sshd) -> Option<Finding> {
    type Allows = fn(&Interactive) -> bool;
    let ways: [(&str, &str, Allows); 2] = [
        ("PasswordAuthentication", "passwords", |user| user.password),
        (
            "KbdInteractiveAuthentication",
            "keyboard-interactive logins",
            |user| user.keyboard,
        ),
    ];
    ways.into_iter().find_map(|(option, what, allows)| {
        let users = sshd.interactive.iter().filter(|(_, user)| allows(user));
        let users: Vec<&str> = users.map(|(user, _)| user.as_str()).collect();
        let first = users.first()?;
        let named = users.iter().take(NAMED).copied().collect::<Vec<_>>().join(", ");
        let more = match users.len().saturating_sub(NAMED) {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        let remedy = format!(
            "set `{option} no` in the Match block; `sshd -T -C user={first},host=localhost,addr=127.0.0.1` \
             shows what holds"
        );
        let summary = format!("sshd accepts {what} of {named}{more}, which a Match block allows");
        Some(Finding::warn(summary, remedy).with("users", users))
    })
}

/// A drop-in that the settings ask for and sshd does not have is worth a warning, whatever else there is.
fn drop_in(mut finding: Finding, sshd: &Sshd) -> Finding {
    if let Some(problem) = &sshd.care.drop_in_problem {
        finding.summary = format!(
            "{}; our drop-in for sshd does not hold: {problem}",
            finding.summary
        );
        if finding.status == Status::Pass {
            finding.status = Status::Warn;
        }
        return finding
            .remedy("mend what the summary names; it is tried again when sshd's configuration changes")
            .with("drop_in_problem", problem.clone());
    }
    finding.with("drop_in", sshd.care.drop_in)
}

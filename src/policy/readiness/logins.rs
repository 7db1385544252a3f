//! Checks of systemd and sshd: whether a login would get as far as a key.
//!
//! May not live here: asking any of them.

use std::collections::BTreeMap;

use portcullis_protocol::Status;
use serde_json::json;

use super::Finding;
use crate::policy::observation::{Observed, Sshd};

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
            "install and start dbus: `systemctl status dbus`",
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
        Ok(units) if units.is_empty() => return Finding::fail("no unit of sshd is loaded", remedy),
        Ok(units) => units,
        Err(reason) => return Finding::fail(format!("sshd's units can't be asked for: {reason}"), remedy),
    };
    let list: BTreeMap<_, _> = units
        .iter()
        .map(|u| (u.name.clone(), json!(u.active_state)))
        .collect();
    let ports = sshd.config.as_ref().map(|c| c.ports.clone()).unwrap_or_default();
    match units.iter().find(|unit| unit.active_state == "active") {
        Some(unit) => {
            let ports = ports.iter().map(u16::to_string).collect::<Vec<_>>().join(", ");
            Finding::pass(format!("{} is active, port {ports}", unit.name)).with("units", json!(list))
        }
        None => Finding::fail(format!("{} is {}", units[0].name, units[0].active_state), remedy)
            .with("units", json!(list)),
    }
}

pub fn sshd_reachable(sshd: &Sshd) -> Finding {
    match &sshd.handshake {
        Ok(shake) => Finding::pass(format!("port {} completed an SSH handshake", shake.port))
            .with("server", shake.server_id.clone())
            .with("host_key", shake.host_key.fingerprint.clone())
            .with("methods", shake.methods.clone()),
        Err(reason) => Finding::fail(
            format!("no SSH handshake: {reason}"),
            "look at `journalctl -u ssh -u sshd` and at `sshd -t`",
        ),
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
    match &sshd.config {
        Ok(config) if config.password => Finding::warn("sshd accepts passwords", remedy),
        Ok(config) if config.keyboard_interactive => {
            Finding::warn("sshd accepts keyboard-interactive logins", remedy)
        }
        Ok(_) => Finding::pass("sshd accepts neither passwords nor keyboard-interactive logins"),
        Err(reason) => Finding::new(
            Status::Unknown,
            format!("sshd's configuration can't be read: {reason}"),
        ),
    }
}

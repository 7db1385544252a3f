//! Lines for known_hosts (sshd(8), SSH_KNOWN_HOSTS FILE FORMAT) that nobody has to take on trust, and an
//! ssh that trusts only them.
//!
//! The keys come from the agent's report, over the TLS key that was pinned at first contact, and only
//! while the agent says that they are those that were first seen: it is not asked whom somebody in
//! between shows.
//! May not live here: how the agent tells (the agent), what is printed (the command line).

use std::ffi::OsString;
use std::io::Write as _;
use std::net::IpAddr;
use std::path::Path;
use std::process::Command;

use portcullis_protocol::report::HostKey;
use portcullis_protocol::{CheckId, Report, Status, UserName};
use serde::Serialize;
use tempfile::NamedTempFile;

use crate::ca::ClientCertificate;
use crate::local::Instance;
use crate::{Error, Result};

/// sshd's port, unless the report names others.
const SSH_PORT: u16 = 22;

/// By which host keys an instance is known.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct KnownHosts {
    /// The instance's name.
    pub name: String,
    /// Its id.
    pub id: String,
    /// sshd's ports.
    pub ports: Vec<u16>,
    /// The addresses and names that the keys are for, as known_hosts has them.
    pub hosts: Vec<String>,
    /// The keys; each is whole, and hashes to its fingerprint.
    pub keys: Vec<HostKey>,
}

impl KnownHosts {
    /// Asks the instance's agent, whose keys are pinned first if they are not yet.
    ///
    /// # Errors
    /// When it does not answer, is not who was pinned, or its host keys may not be trusted.
    pub fn ask(instance: &mut Instance, certificate: &ClientCertificate) -> Result<Self> {
        let report = instance.health(certificate)?;
        let name = instance.name();
        Self::from_report(name, &instance.addresses(), &report)
            .map_err(|reason| Error::Failed(format!("{name}: {reason}")))
    }

    /// From a report that came over an authenticated connection.
    ///
    /// # Errors
    /// Why its host keys may not be trusted: they changed, it can't be told, or a key is not the one of
    /// its fingerprint.
    pub fn from_report(name: &str, addresses: &[IpAddr], report: &Report) -> Result<Self, String> {
        let check = report
            .check(CheckId::SshdHostKeys)
            .ok_or("its agent is too old to watch over the host keys: upgrade it")?;
        if check.status != Status::Pass {
            let remedy = check.remedy.as_deref().map(|text| format!(" (remedy: {text})"));
            return Err(format!(
                "its host keys may not be trusted: {} is {}: {}{}",
                check.id,
                check.status,
                check.summary.escape_debug(),
                remedy.unwrap_or_default().escape_debug()
            ));
        }
        let verified = report.host_keys.iter().map(|key| {
            let line = key.verified_key()?;
            Ok(HostKey {
                key: Some(line),
                ..key.clone()
            })
        });
        let mut keys = verified.collect::<Result<Vec<_>, String>>()?;
        // ssh's own order of preference, which the order of algorithms on its command line replaces.
        keys.sort_by_key(|key| key.algorithm != "ssh-ed25519");
        if keys.is_empty() {
            return Err("its report names no host key".to_owned());
        }
        let ports = match check.evidence.get("ports") {
            Some(ports) => serde_json::from_value::<Vec<u16>>(ports.clone())
                .map_err(|e| format!("{}: the ports in its evidence: {e}", check.id))?,
            None => Vec::new(),
        };
        let ports = if ports.is_empty() { vec![SSH_PORT] } else { ports };
        let names: Vec<String> = addresses
            .iter()
            .map(ToString::to_string)
            .chain([name.to_owned()])
            .collect();
        let hosts = ports
            .iter()
            .flat_map(|port| names.iter().map(|host| host_and_port(host, *port)));
        Ok(Self {
            name: name.to_owned(),
            id: report.instance.id.clone(),
            hosts: hosts.collect(),
            ports,
            keys,
        })
    }

    /// The lines, each with its end.
    pub fn lines(&self) -> String {
        let hosts = self.hosts.join(",");
        let keys = self.keys.iter().filter_map(|key| key.key.as_deref());
        keys.map(|key| format!("{hosts} {key}\n")).collect()
    }

    /// `HostKeyAlgorithms` (ssh_config(5)) that ask for these keys and nothing else: not for a type of
    /// key that no line is about, nor for a certificate.
    pub fn algorithms(&self) -> String {
        let algorithms = self.keys.iter().map(|key| match key.algorithm.as_str() {
            // The key's type stands for SHA-1 signatures (RFC 8332).
            "ssh-rsa" => "rsa-sha2-512,rsa-sha2-256",
            other => other,
        });
        algorithms.collect::<Vec<_>>().join(",")
    }

    /// The port that ssh dials: the usual one if sshd listens there.
    fn port(&self) -> u16 {
        let usual = self.ports.iter().find(|port| **port == SSH_PORT);
        usual.or(self.ports.first()).copied().unwrap_or(SSH_PORT)
    }
}

/// As known_hosts names a port that is not the usual one.
fn host_and_port(host: &str, port: u16) -> String {
    if port == SSH_PORT {
        host.to_owned()
    } else {
        format!("[{host}]:{port}")
    }
}

/// Who logs in, with what, to do what.
#[derive(Clone, Debug, Default)]
pub struct Login {
    /// The user; the one of the spec's first key, if none.
    pub user: Option<UserName>,
    /// The private key's file; else ssh looks for keys itself.
    pub identity: Option<std::path::PathBuf>,
    /// What follows the host on ssh's command line.
    pub arguments: Vec<OsString>,
}

/// An ssh into an instance, and the file of host keys that it trusts; the file is gone when this is
/// dropped.
pub struct Ssh {
    /// The command, for the caller to run.
    pub command: Command,
    _known_hosts: NamedTempFile,
}

impl Ssh {
    /// Prepares it. It is run from the control plane's side of the instance's network, without the
    /// caller's own configuration of ssh: that could name other files of host keys, or a proxy.
    ///
    /// # Errors
    /// When the file can't be written or the private key is not there.
    pub fn new(instance: &Instance, known: &KnownHosts, login: &Login) -> Result<Self> {
        crate::local::require("ssh")?;
        if let Some(identity) = &login.identity
            && let Err(error) = std::fs::metadata(identity)
        {
            let text = format!("--identity {}: {error}", identity.display());
            return Err(Error::BadInput(text));
        }
        // Beside the instance's record: only root reads there, and it goes with the instance.
        let folder = instance.folder.as_path();
        let file = tempfile::Builder::new()
            .prefix("known_hosts.")
            .tempfile_in(folder);
        let mut file = file.map_err(Error::file("make a file in", folder))?;
        file.write_all(known.lines().as_bytes())
            .map_err(Error::file("write", file.path()))?;
        let first = instance.spec().authorized_keys.first();
        let user = login.user.as_ref().or(first.map(|key| &key.user));
        let user = user.unwrap_or(instance.user());
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--net={}", instance.network.path().display()))
            .args(["--", "ssh", "-F", "none"]);
        for option in options(known, file.path()) {
            command.args(["-o", &option]);
        }
        if let Some(identity) = &login.identity {
            command.args(["-o", "IdentitiesOnly=yes", "-i"]).arg(identity);
        }
        command
            .args(["-p", &known.port().to_string()])
            .arg(format!("{user}@{}", instance.addresses()[0]))
            .args(&login.arguments);
        Ok(Self {
            command,
            _known_hosts: file,
        })
    }
}

/// What makes ssh trust these lines and nothing else (ssh_config(5)).
fn options(known: &KnownHosts, file: &Path) -> Vec<String> {
    vec![
        format!("UserKnownHostsFile=\"{}\"", file.display()),
        "GlobalKnownHostsFile=none".to_owned(),
        "StrictHostKeyChecking=yes".to_owned(),
        "VerifyHostKeyDNS=no".to_owned(),
        "UpdateHostKeys=no".to_owned(),
        format!("HostKeyAlgorithms={}", known.algorithms()),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        serde_json::from_str(include_str!(
            "../../portcullis-protocol/tests/report-v1-host-keys.json"
        ))
        .unwrap()
    }

    fn known(report: &Report) -> Result<KnownHosts, String> {
        let addresses = ["10.77.0.2", "fd77::2"].map(|ip| ip.parse().unwrap());
        KnownHosts::from_report("gpu-0", &addresses, report)
    }

    #[test]
    fn a_line_for_each_key_with_all_names() {
        let report = report();
        let known = known(&report).unwrap();
        let lines = known.lines();
        assert_eq!(lines.lines().count(), 3);
        for (line, key) in lines.lines().zip(&report.host_keys) {
            let key = key.key.as_deref().unwrap();
            assert_eq!(line, format!("10.77.0.2,fd77::2,gpu-0 {key}"));
        }
        assert_eq!(
            known.algorithms(),
            "ssh-ed25519,rsa-sha2-512,rsa-sha2-256,ecdsa-sha2-nistp256"
        );
        assert_eq!(known.port(), 22);
    }

    #[test]
    fn other_ports_are_in_brackets() {
        let mut report = report();
        report.checks[0]
            .evidence
            .insert("ports".into(), serde_json::json!([2222, 22]));
        let known = known(&report).unwrap();
        let hosts = "[10.77.0.2]:2222,[fd77::2]:2222,[gpu-0]:2222,10.77.0.2,fd77::2,gpu-0 ssh-ed25519 ";
        assert!(known.lines().starts_with(hosts), "{}", known.lines());
        assert_eq!(known.port(), 22);
    }

    #[test]
    fn nothing_is_given_out_that_is_not_proven() {
        type Break = fn(&mut Report);
        let faults: &[(Break, &str)] = &[
            (|r| r.checks.clear(), "too old"),
            (
                |r| r.checks[0].status = Status::Fail,
                "may not be trusted: sshd.host-keys is fail",
            ),
            (
                |r| r.checks[0].status = Status::Unknown,
                "sshd.host-keys is unknown",
            ),
            (|r| r.host_keys.clear(), "no host key"),
            (|r| r.host_keys[0].key = None, "too old to tell it"),
            (
                |r| r.host_keys[0].fingerprint = r.host_keys[1].fingerprint.clone(),
                "do not trust it",
            ),
            (
                |r| {
                    r.host_keys[0]
                        .key
                        .as_mut()
                        .unwrap()
                        .push_str("\n* ssh-ed25519 AAAA")
                },
                "one line",
            ),
        ];
        assert!(known(&report()).is_ok());
        for (i, (fault, expected)) in faults.iter().enumerate() {
            let mut report = report();
            fault(&mut report);
            let error = known(&report).unwrap_err();
            assert!(error.contains(expected), "fault {i}: {error}");
        }
    }
}

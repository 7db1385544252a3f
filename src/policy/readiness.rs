//! From observations to checks, and from checks to ready.
//!
//! A check passes on evidence only. What this version does not examine is `unknown` and says so.
//! May not live here: looking at anything; the observations are given.

use std::collections::BTreeMap;

use jiff::Timestamp;
use portcullis_protocol::{Check, CheckId, Protocol, Spec, Status};
use serde_json::{Value, json};

use super::firewall::{GATE, peer_set};
use super::observation::{Gate, KeyState, Observations, Observed, Sshd};
use super::ruleset::{Family, PREROUTING, PRIORITY_DNAT, Ruleset, Verdict};

/// What a check came to.
struct Finding {
    status: Status,
    summary: String,
    evidence: BTreeMap<String, Value>,
    remedy: Option<String>,
}

impl Finding {
    fn new(status: Status, summary: impl Into<String>) -> Self {
        Self {
            status,
            summary: summary.into(),
            evidence: BTreeMap::new(),
            remedy: None,
        }
    }

    fn pass(summary: impl Into<String>) -> Self {
        Self::new(Status::Pass, summary)
    }

    fn warn(summary: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::new(Status::Warn, summary).remedy(remedy)
    }

    fn fail(summary: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::new(Status::Fail, summary).remedy(remedy)
    }

    fn later(what: &str) -> Self {
        Self::new(Status::Unknown, format!("not examined by this version: {what}"))
    }

    fn remedy(mut self, remedy: impl Into<String>) -> Self {
        self.remedy = Some(remedy.into());
        self
    }

    fn with(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.evidence.insert(name.to_owned(), value.into());
        self
    }
}

/// All checks, in the order of [`CheckId::ALL`]. `since` is kept from the previous checks where the
/// status is the same.
pub fn checks(spec: Option<&Spec>, seen: &Observations, previous: &[Check], now: Timestamp) -> Vec<Check> {
    CheckId::ALL
        .iter()
        .map(|id| {
            let finding = find(*id, spec, seen);
            let before = previous
                .iter()
                .find(|check| check.id == *id && check.status == finding.status);
            Check {
                id: *id,
                status: finding.status,
                required: is_required(*id),
                requirement: id.requirement(),
                summary: finding.summary,
                evidence: finding.evidence,
                since: before.map_or(now, |check| check.since),
                remedy: finding.remedy,
            }
        })
        .collect()
}

/// Whether the instance is ready: no required check fails or is unknown.
pub fn is_ready(checks: &[Check]) -> bool {
    !checks.iter().any(Check::blocks_readiness)
}

fn is_required(id: CheckId) -> bool {
    use CheckId::{ExposureListeners, FirewallConflicts, SshdPassword, StorageEncrypted};
    !matches!(
        id,
        SshdPassword | FirewallConflicts | StorageEncrypted | ExposureListeners
    )
}

fn find(id: CheckId, spec: Option<&Spec>, seen: &Observations) -> Finding {
    match id {
        CheckId::SystemdRunning => systemd_running(&seen.systemd.manager_state),
        CheckId::SystemdSystemctl => systemctl(&seen.systemd.systemctl),
        CheckId::SshdRunning => sshd_running(&seen.sshd),
        CheckId::SshdReachable => sshd_reachable(&seen.sshd),
        CheckId::SshdPubkey => sshd_pubkey(&seen.sshd),
        CheckId::SshdPassword => sshd_password(&seen.sshd),
        CheckId::KeysInstalled => keys_installed(spec, &seen.keys),
        CheckId::KeysAccepted => keys_accepted(spec, &seen.keys),
        CheckId::FirewallApplied => applied(&seen.gate),
        CheckId::FirewallDefaultDeny => default_deny(&seen.gate),
        CheckId::FirewallSshAllowed => ssh_allowed(spec, &seen.sshd),
        CheckId::FirewallContainers => containers(&seen.gate),
        CheckId::ClusterPeers => peers(spec, &seen.gate),
        CheckId::TransitTls => transit(seen),
        CheckId::FirewallConflicts => Finding::later("rules of other tables that work against the gate"),
        CheckId::StorageEncrypted => Finding::later("encryption of disks and swap"),
        CheckId::ExposureListeners => Finding::later("listening sockets against the gate"),
    }
}

fn systemd_running(state: &Observed<String>) -> Finding {
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

fn systemctl(word: &Observed<String>) -> Finding {
    match word {
        Ok(word) => Finding::pass(format!("`systemctl is-system-running` answers {word:?}")),
        Err(reason) => Finding::fail(
            format!("systemctl does not answer: {reason}"),
            "run `systemctl status` by hand",
        ),
    }
}

fn sshd_running(sshd: &Sshd) -> Finding {
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

fn sshd_reachable(sshd: &Sshd) -> Finding {
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

fn sshd_pubkey(sshd: &Sshd) -> Finding {
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

fn sshd_password(sshd: &Sshd) -> Finding {
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

const NO_SPEC: &str = "no spec is accepted yet";

fn keys_installed(spec: Option<&Spec>, keys: &[KeyState]) -> Finding {
    let Some(spec) = spec else {
        return Finding::new(Status::Unknown, NO_SPEC)
            .remedy("write /etc/portcullis/spec.json, or `portcullis apply`");
    };
    if spec.authorized_keys.is_empty() {
        return Finding::warn(
            "the spec names no keys: nobody can be let in by it",
            "add authorized_keys to the spec",
        );
    }
    let broken: Vec<String> = keys
        .iter()
        .filter_map(|k| k.installed.as_ref().err().map(|e| format!("{}: {e}", k.user)))
        .collect();
    let evidence: Vec<Value> = keys
        .iter()
        .map(|k| json!({"user": k.user, "fingerprint": k.key.fingerprint(), "file": k.installed.as_ref().ok()}))
        .collect();
    match broken.first() {
        None => Finding::pass(format!("{} of {} keys are in place", keys.len(), keys.len())),
        Some(first) => Finding::fail(
            format!(
                "{} of {} keys are not in place; {first}",
                broken.len(),
                keys.len()
            ),
            "mend what the summary names; a missing user is created if `keys.create_users` says so",
        ),
    }
    .with("keys", evidence)
}

fn keys_accepted(spec: Option<&Spec>, keys: &[KeyState]) -> Finding {
    let Some(spec) = spec else {
        return Finding::new(Status::Unknown, NO_SPEC);
    };
    if spec.authorized_keys.is_empty() {
        return Finding::warn("the spec names no keys", "add authorized_keys to the spec");
    }
    let state = |k: &KeyState| format!("{} {}", k.user, k.key.fingerprint());
    let refused: Vec<String> = keys
        .iter()
        .filter(|k| k.accepted == Ok(false))
        .map(state)
        .collect();
    let unasked = keys
        .iter()
        .find_map(|k| k.accepted.as_ref().err().map(|e| format!("{}: {e}", state(k))));
    match (refused.first(), unasked) {
        (Some(first), _) => Finding::fail(
            format!(
                "sshd would refuse {} of {} keys; {first}",
                refused.len(),
                keys.len()
            ),
            "look at `journalctl -u ssh -u sshd`: modes of the home and of .ssh, AuthorizedKeysFile, AllowUsers",
        ),
        (None, Some(reason)) => Finding::fail(
            format!("sshd could not be asked about a key; {reason}"),
            "see sshd.reachable",
        ),
        (None, None) => Finding::pass(format!(
            "sshd would accept all {} keys (RFC 4252 query)",
            keys.len()
        )),
    }
}

fn held(gate: &Gate) -> Result<&Ruleset, Finding> {
    match &gate.held {
        Ok(Some(held)) => Ok(held),
        Ok(None) => Err(Finding::fail(
            "the kernel holds no table inet portcullis",
            "look at `journalctl -u portcullis` for why it could not be applied",
        )),
        Err(reason) => Err(Finding::fail(
            format!("nf_tables can't be read: {reason}"),
            "check the kernel and run as root",
        )),
    }
}

fn applied(gate: &Gate) -> Finding {
    if let Err(reason) = &gate.applied {
        return Finding::fail(reason.clone(), "the message names what the kernel refused");
    }
    let held = match held(gate) {
        Ok(held) => held,
        Err(finding) => return finding,
    };
    let diff = held.diff(&gate.planned);
    let rules: usize = held.chains.iter().map(|chain| chain.rules.len()).sum();
    let finding = match diff.first() {
        None => Finding::pass(format!(
            "the kernel holds the planned ruleset: {rules} rules, {} sets",
            held.sets.len()
        )),
        Some(first) => Finding::fail(
            format!(
                "the kernel holds something else in {} lines; {}",
                diff.len(),
                first.trim()
            ),
            "somebody keeps changing table inet portcullis: `nft monitor` shows who",
        ),
    };
    finding.with("repaired", gate.repaired)
}

/// Whether the gate is closed at its end, and sits where nothing gets around it.
fn gate_hook(gate: &Gate) -> Result<&super::ruleset::Hook, Finding> {
    let chain = held(gate)?.chain(GATE);
    chain.and_then(|chain| chain.hook.as_ref()).ok_or_else(|| {
        Finding::fail(
            "the chain of the gate is missing or not hooked in",
            "see firewall.applied",
        )
    })
}

fn default_deny(gate: &Gate) -> Finding {
    match gate_hook(gate) {
        Ok(hook) if hook.policy == Verdict::Drop && hook.number == PREROUTING => {
            Finding::pass("what no rule lets in is dropped, IPv4 and IPv6, host and containers")
        }
        Ok(hook) => Finding::fail(
            format!("the gate's policy is {}", hook.policy),
            "see firewall.applied",
        ),
        Err(finding) => finding,
    }
}

fn containers(gate: &Gate) -> Finding {
    match gate_hook(gate) {
        Ok(hook) if hook.number == PREROUTING && hook.priority < PRIORITY_DNAT => Finding::pass(
            "published ports are filtered before address translation, on the port that the outside dials",
        )
        .with("priority", hook.priority),
        Ok(_) => Finding::fail("the gate comes after address translation", "see firewall.applied"),
        Err(finding) => finding,
    }
}

fn ssh_allowed(spec: Option<&Spec>, sshd: &Sshd) -> Finding {
    let Some(spec) = spec else {
        return Finding::new(Status::Unknown, NO_SPEC);
    };
    let ports = match &sshd.config {
        Ok(config) => &config.ports,
        Err(reason) => return Finding::new(Status::Unknown, format!("sshd's port is not known: {reason}")),
    };
    let rule = spec.firewall.ingress.iter().find(|rule| {
        matches!(rule.protocol, Protocol::Tcp | Protocol::Any)
            && rule
                .ports
                .is_some_and(|range| ports.iter().any(|port| range.contains(*port)))
    });
    match rule {
        Some(rule) => Finding::pass(format!("rule {rule}")).with("rule", rule.id.as_str()),
        None if spec.authorized_keys.is_empty() => {
            Finding::warn("no rule lets SSH in, and no key is named", "add a rule")
        }
        None => Finding::fail(
            format!("no rule lets SSH in (port {ports:?})"),
            "add an ingress rule for sshd's port to the spec",
        ),
    }
}

fn peers(spec: Option<&Spec>, gate: &Gate) -> Finding {
    let Some(spec) = spec else {
        return Finding::new(Status::Unknown, NO_SPEC);
    };
    let held = match held(gate) {
        Ok(held) => held,
        Err(finding) => return finding,
    };
    let wanted = Family::BOTH.map(|family| gate.planned.set(&peer_set(family)));
    let found = Family::BOTH.map(|family| held.set(&peer_set(family)));
    let count: usize = wanted.iter().flatten().map(|set| set.elements.len()).sum();
    let peers = spec.cluster.as_ref().map_or(0, |cluster| cluster.peers.len());
    if wanted != found {
        return Finding::fail(
            "the kernel does not hold the peers' addresses",
            "see firewall.applied",
        );
    }
    match &spec.cluster {
        None => Finding::pass("the spec names no cluster"),
        Some(cluster) => Finding::pass(format!(
            "{peers} peers of cluster {} are let in on all ports",
            cluster.id
        ))
        .with("addresses", count)
        .with("note", "RDMA and RoCE bypass the kernel's packet filter"),
    }
}

fn transit(seen: &Observations) -> Finding {
    match &seen.tls {
        Ok(tls) => Finding::pass(format!(
            "the endpoint speaks {} with {}",
            tls.version, tls.cipher_suite
        ))
        .with("version", tls.version.clone())
        .with("cipher_suite", tls.cipher_suite.clone())
        .with("key_exchange", tls.key_exchange.clone())
        .with("minimum", "TLSv1_2"),
        Err(reason) => Finding::fail(
            format!("the HTTPS endpoint does not answer: {reason}"),
            "is the port taken? `ss -ltnp`",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::firewall::{Inputs, ruleset};
    use crate::policy::observation::{SshdConfig, Systemd, Tls, Unit};
    use portcullis_protocol::report::HostKey;

    const KEY: &str = include_str!("../../crates/portcullis-protocol/tests/spec-v1.json");

    fn world() -> (Spec, Observations) {
        let spec = Spec::from_json(KEY.as_bytes()).unwrap();
        let planned = ruleset(Inputs {
            spec: Some(&spec),
            internal: &Default::default(),
            health_port: 7443,
        });
        let key = &spec.authorized_keys[0];
        let keys = vec![KeyState {
            user: key.user.clone(),
            key: key.key.clone(),
            installed: Ok("/home/ubuntu/.ssh/authorized_keys".into()),
            accepted: Ok(true),
        }];
        let host_key = HostKey {
            algorithm: "ssh-ed25519".into(),
            fingerprint: "SHA256:x".into(),
        };
        let observations = Observations {
            gate: Gate {
                held: Ok(Some(planned.clone())),
                planned,
                applied: Ok(()),
                repaired: 0,
            },
            systemd: Systemd {
                manager_state: Ok("running".into()),
                systemctl: Ok("running".into()),
            },
            sshd: Sshd {
                units: Ok(vec![Unit {
                    name: "ssh.service".into(),
                    active_state: "active".into(),
                }]),
                config: Ok(SshdConfig {
                    ports: vec![22],
                    pubkey: true,
                    password: false,
                    keyboard_interactive: false,
                    authorized_keys_files: vec![".ssh/authorized_keys".into()],
                    ..SshdConfig::default()
                }),
                handshake: Ok(crate::policy::observation::Handshake {
                    port: 22,
                    server_id: "SSH-2.0-x".into(),
                    host_key,
                    methods: vec!["publickey".into()],
                }),
                host_keys: vec![],
            },
            keys,
            tls: Ok(Tls {
                version: "TLSv1_3".into(),
                cipher_suite: "c".into(),
                key_exchange: "k".into(),
            }),
        };
        (spec, observations)
    }

    fn failing(spec: Option<&Spec>, seen: &Observations) -> Vec<&'static str> {
        let checks = checks(spec, seen, &[], Timestamp::UNIX_EPOCH);
        assert_eq!(is_ready(&checks), !checks.iter().any(Check::blocks_readiness));
        checks
            .iter()
            .filter(|c| c.blocks_readiness())
            .map(|c| c.id.as_str())
            .collect()
    }

    #[test]
    fn all_well_is_ready() {
        let (spec, seen) = world();
        assert_eq!(failing(Some(&spec), &seen), Vec::<&str>::new());
    }

    #[test]
    fn without_a_spec_it_is_not_ready() {
        let (_, seen) = world();
        assert!(failing(None, &seen).contains(&"keys.installed"));
    }

    /// Each thing broken alone makes exactly its checks fail.
    #[test]
    fn each_fault_has_its_check() {
        type Break = fn(&mut Observations);
        let faults: &[(Break, &[&str])] = &[
            (
                |o| o.systemd.manager_state = Err("gone".into()),
                &["systemd.running"],
            ),
            (
                |o| o.systemd.manager_state = Ok("stopping".into()),
                &["systemd.running"],
            ),
            (
                |o| o.systemd.systemctl = Err("gone".into()),
                &["systemd.systemctl"],
            ),
            (|o| o.sshd.units = Ok(vec![]), &["sshd.running"]),
            (
                |o| o.sshd.units.as_mut().unwrap()[0].active_state = "failed".into(),
                &["sshd.running"],
            ),
            (
                |o| o.sshd.config.as_mut().unwrap().pubkey = false,
                &["sshd.pubkey"],
            ),
            (
                |o| o.sshd.config.as_mut().unwrap().ports = vec![2222],
                &["firewall.ssh-allowed"],
            ),
            (
                |o| o.sshd.handshake = Err("refused".into()),
                &["sshd.reachable", "sshd.pubkey"],
            ),
            (
                |o| o.keys[0].installed = Err("no such user".into()),
                &["keys.installed"],
            ),
            (|o| o.keys[0].accepted = Ok(false), &["keys.accepted"]),
            (
                |o| o.keys[0].accepted = Err("not asked".into()),
                &["keys.accepted"],
            ),
            (
                |o| o.gate.held = Ok(None),
                &[
                    "firewall.applied",
                    "firewall.default-deny",
                    "firewall.containers",
                    "cluster.peers",
                ],
            ),
            (|o| o.gate.applied = Err("EPERM".into()), &["firewall.applied"]),
            (
                |o| {
                    let held = o.gate.held.as_mut().unwrap().as_mut().unwrap();
                    held.chains[0].hook.as_mut().unwrap().policy = Verdict::Accept;
                },
                &["firewall.applied", "firewall.default-deny"],
            ),
            (
                |o| {
                    let held = o.gate.held.as_mut().unwrap().as_mut().unwrap();
                    held.chains[0].hook.as_mut().unwrap().priority = 0;
                },
                &["firewall.applied", "firewall.containers"],
            ),
            (
                |o| {
                    let held = o.gate.held.as_mut().unwrap().as_mut().unwrap();
                    held.sets.retain(|set| set.name != "peers4");
                },
                &["firewall.applied", "cluster.peers"],
            ),
            (|o| o.tls = Err("taken".into()), &["transit.tls"]),
        ];
        for (i, (fault, expected)) in faults.iter().enumerate() {
            let (spec, mut seen) = world();
            fault(&mut seen);
            assert_eq!(failing(Some(&spec), &seen), *expected, "fault {i}");
        }
    }

    #[test]
    fn passwords_warn_and_do_not_block() {
        let (spec, mut seen) = world();
        seen.sshd.config.as_mut().unwrap().password = true;
        assert!(failing(Some(&spec), &seen).is_empty());
        let checks = checks(Some(&spec), &seen, &[], Timestamp::UNIX_EPOCH);
        assert_eq!(
            checks
                .iter()
                .find(|c| c.id == CheckId::SshdPassword)
                .unwrap()
                .status,
            Status::Warn
        );
    }

    #[test]
    fn since_is_kept_while_the_status_is() {
        let (spec, mut seen) = world();
        let early = checks(Some(&spec), &seen, &[], Timestamp::UNIX_EPOCH);
        let late = Timestamp::from_second(1000).unwrap();
        seen.tls = Err("gone".into());
        let now = checks(Some(&spec), &seen, &early, late);
        let since = |id| now.iter().find(|c| c.id == id).unwrap().since;
        assert_eq!(since(CheckId::SshdRunning), Timestamp::UNIX_EPOCH);
        assert_eq!(since(CheckId::TransitTls), late);
    }
}

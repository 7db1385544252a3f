//! Each fault has its check, and only that.
//!
//! May not live here: what is said of sshd (`sshd_findings`) and of keys
//! (`key_findings`) beside whether they block.

mod key_findings;
mod sshd_findings;

use super::*;
use crate::policy::conflicts::Comparison;
use crate::policy::exposure::Exposure;
use crate::policy::firewall::{Inputs, ruleset};
use crate::policy::key_questions::Acceptance;
use crate::policy::key_sources::{Grant, KeySource};
use crate::policy::observation::{Algorithms, Gate, KeyState, Sshd, SshdConfig, Systemd, Tls, Unit};
use crate::policy::ruleset::{Ruleset, Verdict};
use portcullis_protocol::report::HostKey;
use std::sync::Arc;

const KEY: &str = include_str!("../../../crates/portcullis-protocol/tests/spec-v1.json");

fn world() -> (Spec, Observations) {
    let spec = Spec::from_json(KEY.as_bytes()).unwrap();
    let planned = Arc::new(ruleset(Inputs {
        spec: Some(&spec),
        ..Inputs::default()
    }));
    let key = &spec.authorized_keys[0];
    let keys = vec![KeyState {
        grant: Grant {
            key: key.clone(),
            source: KeySource::Spec { generation: 1 },
        },
        installed: Ok("/home/ubuntu/.ssh/authorized_keys".into()),
        accepted: Acceptance::Accepted,
    }];
    let host_key = HostKey {
        algorithm: "ssh-ed25519".into(),
        fingerprint: "SHA256:x".into(),
        key: None,
    };
    let host_keys = vec![host_key.clone()];
    let observations = Observations {
        gate: Arc::new(Gate {
            held: Ok(Some(planned.clone())),
            planned,
            applied: Ok(()),
            ..Gate::default()
        }),
        trial_until: None,
        durable: Ok(0),
        systemd: Systemd {
            manager_state: Ok("running".into()),
            systemctl: Ok("running".into()),
        },
        sshd: Sshd {
            units: Ok(vec![Unit {
                name: "ssh.service".into(),
                active_state: "active".into(),
                changed_at: 0,
            }]),
            config: Ok(SshdConfig {
                ports: vec![22],
                pubkey: true,
                password: false,
                keyboard_interactive: false,
                authorized_keys_files: vec![".ssh/authorized_keys".into()],
                ..SshdConfig::default()
            }),
            interactive: Default::default(),
            handshake: Ok(crate::policy::observation::Handshake {
                port: 22,
                server_id: "SSH-2.0-x".into(),
                host_key,
                methods: vec!["publickey".into()],
                algorithms: Ok(Algorithms {
                    kex: vec!["curve25519-sha256".into()],
                    ..Algorithms::default()
                }),
            }),
            unanswered: vec![],
            care: Default::default(),
            host_keys,
            unpublished_host_keys: vec![],
        },
        host_keys: Ok(None),
        keys,
        unfit: vec![],
        tls: Ok(Tls {
            version: "TLSv1_3".into(),
            cipher_suite: "c".into(),
            key_exchange: "k".into(),
        }),
        storage: Ok(Default::default()),
        conflicts: Ok(Comparison {
            let_in: 1,
            tried: 1,
            ..Comparison::default()
        }),
        exposure: Ok(Exposure::default()),
    };
    (spec, observations)
}

fn gate(seen: &mut Observations) -> &mut Gate {
    Arc::make_mut(&mut seen.gate)
}

fn held(seen: &mut Observations) -> &mut Ruleset {
    Arc::make_mut(gate(seen).held.as_mut().unwrap().as_mut().unwrap())
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
            |o| {
                let address = "127.0.0.1:2222".parse().unwrap();
                o.sshd.unanswered = vec![(address, "refused".into())];
            },
            &["sshd.reachable"],
        ),
        (
            |o| o.keys[0].installed = Err("no such user".into()),
            &["keys.installed"],
        ),
        (|o| o.keys[0].accepted = Acceptance::Refused, &["keys.accepted"]),
        (
            |o| o.keys[0].accepted = Acceptance::Unknown("not asked".into()),
            &["keys.accepted"],
        ),
        (
            |o| gate(o).held = Ok(None),
            &[
                "firewall.applied",
                "firewall.default-deny",
                "firewall.containers",
                "cluster.peers",
            ],
        ),
        (|o| gate(o).applied = Err("EPERM".into()), &["firewall.applied"]),
        (
            |o| {
                let held = held(o);
                held.chains[0].hook.as_mut().unwrap().policy = Verdict::Accept;
            },
            &["firewall.applied", "firewall.default-deny"],
        ),
        (
            |o| {
                let held = held(o);
                held.chains[0].hook.as_mut().unwrap().priority = 0;
            },
            &["firewall.applied", "firewall.containers"],
        ),
        (
            |o| {
                let held = held(o);
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

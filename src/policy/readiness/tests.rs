//! Each fault has its check, and only that.

use super::*;
use crate::policy::conflicts::Comparison;
use crate::policy::exposure::Exposure;
use crate::policy::firewall::{Inputs, ruleset};
use crate::policy::host_keys::first_seen;
use crate::policy::key_questions::Acceptance;
use crate::policy::key_sources::{Grant, KeySource, Unfit};
use crate::policy::observation::{
    Algorithms, Gate, Interactive, KeyState, PENALISED, Sshd, SshdConfig, Systemd, Tls, Unit,
};
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
fn when_every_key_has_expired_no_login_would_work() {
    let (spec, mut seen) = world();
    seen.keys.clear();
    assert_eq!(failing(Some(&spec), &seen), ["keys.installed", "keys.accepted"]);
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
fn users_whom_a_match_block_lets_in_without_a_key_are_named() {
    let (spec, mut seen) = world();
    let find = |seen: &Observations| {
        assert!(failing(Some(&spec), seen).is_empty());
        let checks = checks(Some(&spec), seen, &[], Timestamp::UNIX_EPOCH);
        checks
            .into_iter()
            .find(|c| c.id == CheckId::SshdPassword)
            .unwrap()
    };
    for user in ["alice", "bob", "carol", "dave", "eve"] {
        let none = Interactive::default();
        seen.sshd.interactive.insert(user.parse().unwrap(), none);
    }
    assert_eq!(find(&seen).status, Status::Pass);
    let allow = |seen: &mut Observations, user: &str, password| {
        let allowed = Interactive {
            password,
            keyboard: true,
        };
        seen.sshd.interactive.insert(user.parse().unwrap(), allowed);
    };
    allow(&mut seen, "carol", false);
    let check = find(&seen);
    assert_eq!(check.status, Status::Warn);
    let expected = "sshd accepts keyboard-interactive logins of carol, which a Match block allows";
    assert_eq!(check.summary, expected);
    assert!(check.remedy.unwrap().contains("-C user=carol,"));
    for user in ["bob", "carol", "dave", "eve"] {
        allow(&mut seen, user, true);
    }
    let check = find(&seen);
    assert!(
        check
            .summary
            .contains("passwords of bob, carol, dave and 1 more,"),
        "{check:?}"
    );
    assert_eq!(
        check.evidence["users"],
        serde_json::json!(["bob", "carol", "dave", "eve"])
    );
    // What holds for all is said of all.
    seen.sshd.config.as_mut().unwrap().password = true;
    assert_eq!(find(&seen).summary, "sshd accepts passwords");
}

#[test]
fn sshd_that_refuses_this_host_for_its_probes_is_unknown_and_not_failed() {
    let (spec, mut seen) = world();
    let find = |seen: &Observations| {
        let checks = checks(Some(&spec), seen, &[], Timestamp::UNIX_EPOCH);
        checks
            .into_iter()
            .find(|c| c.id == CheckId::SshdReachable)
            .unwrap()
    };
    let penalised = format!("{PENALISED}: too many");
    let port = |port: u16| (std::net::Ipv6Addr::LOCALHOST, port).into();
    seen.sshd.unanswered = vec![(port(2222), penalised.clone())];
    let check = find(&seen);
    assert!(
        check.status == Status::Unknown && check.summary.contains("too many"),
        "{check:?}"
    );
    assert!(check.blocks_readiness());
    seen.sshd.unanswered.push((port(2223), "refused".into()));
    assert_eq!(
        find(&seen).status,
        Status::Fail,
        "one port is silent for another reason"
    );
    seen.sshd.unanswered.clear();
    seen.sshd.handshake = Err(penalised);
    let check = find(&seen);
    assert!(check.status == Status::Unknown && check.remedy.unwrap().contains("::1"));
    seen.sshd.handshake = Err("refused".into());
    assert_eq!(find(&seen).status, Status::Fail);
}

#[test]
fn weak_algorithms_warn_with_what_to_write_and_do_not_block() {
    let (spec, mut seen) = world();
    let find = |seen: &Observations| {
        let checks = checks(Some(&spec), seen, &[], Timestamp::UNIX_EPOCH);
        checks
            .into_iter()
            .find(|c| c.id == CheckId::SshdAlgorithms)
            .unwrap()
    };
    let check = find(&seen);
    assert_eq!(
        (check.status, &check.evidence["post_quantum"]),
        (Status::Pass, &false.into())
    );
    let offered = seen.sshd.handshake.as_mut().unwrap().algorithms.as_mut().unwrap();
    offered.kex.push("sntrup761x25519-sha512".into());
    offered.ciphers = vec!["aes128-cbc".into(), "3des-cbc".into()];
    let check = find(&seen);
    assert_eq!(
        (check.status, &check.evidence["post_quantum"]),
        (Status::Warn, &true.into())
    );
    assert!(check.summary.contains("aes128-cbc"), "{}", check.summary);
    assert!(check.remedy.unwrap().contains("Ciphers -aes128-cbc,3des-cbc"));
    assert!(failing(Some(&spec), &seen).is_empty());
    seen.sshd.handshake.as_mut().unwrap().algorithms = Err("lost".into());
    assert_eq!(find(&seen).status, Status::Unknown);
    assert!(failing(Some(&spec), &seen).is_empty());
}

#[test]
fn what_was_done_for_sshd_is_told_and_does_not_block() {
    let (spec, mut seen) = world();
    let find = |seen: &Observations, id| {
        let checks = checks(Some(&spec), seen, &[], Timestamp::UNIX_EPOCH);
        checks.into_iter().find(|c| c.id == id).unwrap()
    };
    seen.sshd.care.restarts = 2;
    seen.sshd.care.last_restart = Some(Ok("ssh.service was started".into()));
    seen.sshd.care.drop_in_problem = Some("sshd -t: no".into());
    assert_eq!(find(&seen, CheckId::SshdRunning).evidence["restarts"], 2);
    let password = find(&seen, CheckId::SshdPassword);
    assert!(password.status == Status::Warn && password.summary.contains("sshd -t: no"));
    assert!(failing(Some(&spec), &seen).is_empty());
    // A Match block shows in what is offered.
    seen.sshd.care.drop_in_problem = None;
    assert_eq!(find(&seen, CheckId::SshdPassword).status, Status::Pass);
    seen.sshd
        .handshake
        .as_mut()
        .unwrap()
        .methods
        .push("password".into());
    let password = find(&seen, CheckId::SshdPassword);
    assert!(password.status == Status::Warn && password.summary.contains("Match"));
}

#[test]
fn changed_host_keys_are_told_and_do_not_block() {
    let (spec, mut seen) = world();
    let host_keys = |seen: &Observations| {
        assert!(failing(Some(&spec), seen).is_empty());
        let checks = checks(Some(&spec), seen, &[], Timestamp::UNIX_EPOCH);
        let check = checks.into_iter().find(|c| c.id == CheckId::SshdHostKeys);
        check.unwrap()
    };
    assert_eq!(host_keys(&seen).status, Status::Unknown);
    let id = spec.instance.id.as_str();
    seen.host_keys = Ok(first_seen(id, &Ok(None), &seen.sshd, Timestamp::UNIX_EPOCH));
    let check = host_keys(&seen);
    assert_eq!(check.status, Status::Pass);
    assert_eq!(check.evidence["ports"], serde_json::json!([22]));
    assert!(!check.evidence.contains_key("host_certificates"));
    seen.sshd.config.as_mut().unwrap().host_certificates = vec!["/etc/ssh/cert.pub".into()];
    assert!(host_keys(&seen).evidence.contains_key("host_certificates"));
    seen.sshd.host_keys[0].fingerprint = "SHA256:y".into();
    let check = host_keys(&seen);
    assert_eq!(check.status, Status::Fail);
    assert_eq!(check.evidence["old"], serde_json::json!(["ssh-ed25519 SHA256:x"]));
    assert_eq!(check.evidence["new"], serde_json::json!(["ssh-ed25519 SHA256:y"]));
    // sshd still shows the old one.
    assert_eq!(check.evidence["not_on_disk"], "ssh-ed25519 SHA256:x");
    assert!(!check.remedy.unwrap().contains("ssh-keygen"));
    seen.sshd.unpublished_host_keys = vec!["/etc/ssh/k".into()];
    let remedy = host_keys(&seen).remedy.unwrap();
    assert!(
        remedy.contains("`ssh-keygen -y -f /etc/ssh/k > /etc/ssh/k.pub`"),
        "{remedy}"
    );
    seen.host_keys = Err("damaged".into());
    assert_eq!(host_keys(&seen).status, Status::Unknown);
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

fn unfit() -> Unfit {
    Unfit {
        source: KeySource::CloudInit,
        user: Some("ubuntu".parse().unwrap()),
        what: "line 1".into(),
        reason: "no key".into(),
    }
}

#[test]
fn a_key_that_is_left_out_is_a_warning_as_long_as_another_one_is_in_place() {
    let (spec, mut seen) = world();
    seen.unfit.push(unfit());
    let finding = keys::installed(Some(&spec), &seen.keys, &seen.unfit);
    assert_eq!(finding.status, Status::Warn);
    assert!(
        finding.summary.contains("line 1 (cloud-init): no key"),
        "{}",
        finding.summary
    );
    let listed = finding.evidence["keys"].as_array().unwrap().clone();
    assert_eq!(listed.len(), 2);
    assert_eq!(listed[1]["reason"], "no key");
    let finding = keys::installed(Some(&spec), &[], &seen.unfit);
    assert_eq!(finding.status, Status::Fail);
}

#[test]
fn what_sshd_could_not_be_asked_about_is_never_a_pass_by_itself() {
    let (spec, mut seen) = world();
    let key = seen.keys[0].clone();
    for (states, expected, told) in [
        (
            vec![Acceptance::Unaskable("ca".into())],
            Status::Warn,
            "no key is in place that sshd",
        ),
        (
            vec![Acceptance::Accepted, Acceptance::Unaskable("ca".into())],
            Status::Pass,
            "all 1 keys (RFC 4252 query); 1 for certificates",
        ),
        (
            vec![Acceptance::Accepted, Acceptance::Barred("it expired".into())],
            Status::Fail,
            "lets nobody in; ubuntu: it expired",
        ),
        (
            vec![Acceptance::Accepted, Acceptance::Inferred],
            Status::Pass,
            "all 2 keys (RFC 4252 query of 1",
        ),
        (
            vec![Acceptance::Accepted, Acceptance::Refused],
            Status::Fail,
            "refuse 1 of 2",
        ),
    ] {
        let with = |accepted: &Acceptance| KeyState {
            accepted: accepted.clone(),
            ..key.clone()
        };
        seen.keys = states.iter().map(with).collect();
        let finding = keys::accepted(Some(&spec), &seen.keys);
        assert_eq!(finding.status, expected, "{states:?}");
        assert!(finding.summary.contains(told), "{}", finding.summary);
    }
}

#[test]
fn of_very_many_keys_those_are_listed_that_need_somebody() {
    let (_, seen) = world();
    let mut keys = vec![seen.keys[0].clone(); keys::MAX_LISTED + 5];
    keys.last_mut().unwrap().accepted = Acceptance::Refused;
    let listed = keys::listed(&keys, &[unfit()]);
    assert_eq!(listed.len(), keys::MAX_LISTED);
    assert!(listed[0].reason.is_some() && listed[1].reason.is_some() && listed[2].reason.is_none());
}

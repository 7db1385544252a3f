//! What is said of sshd beyond that it runs: passwords, algorithms, host keys, and what was done for it.
//!
//! May not live here: that a fault has its check (the module above).

use super::*;
use crate::policy::host_keys::first_seen;
use crate::policy::observation::{Interactive, PENALISED};

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

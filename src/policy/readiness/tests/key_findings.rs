//! What is said of keys: those that are left out, that sshd could not be asked about, and very many.
//!
//! May not live here: that a fault has its check (the module above).

use super::*;
use crate::policy::key_sources::Unfit;

fn unfit() -> Unfit {
    Unfit {
        source: KeySource::CloudInit,
        user: Some("ubuntu".parse().unwrap()),
        what: "line 1".into(),
        reason: "no key".into(),
    }
}

#[test]
fn when_every_key_has_expired_no_login_would_work() {
    let (spec, mut seen) = world();
    seen.keys.clear();
    assert_eq!(failing(Some(&spec), &seen), ["keys.installed", "keys.accepted"]);
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

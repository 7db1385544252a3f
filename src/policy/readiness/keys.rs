//! Checks of the keys: each in its place, and sshd's word on it.
//!
//! May not live here: asking sshd, which keys hold.

use portcullis_protocol::key_report::{Accepted, KeyReport};
use portcullis_protocol::{Spec, Status};
use serde_json::json;

use super::{Finding, NO_SPEC};
use crate::policy::key_questions::Acceptance;
use crate::policy::key_sources::Unfit;
use crate::policy::observation::KeyState;

/// Most keys that a report lists one by one, those with something to say first: beyond that, reports
/// would be megabytes.
pub const MAX_LISTED: usize = 1000;

pub fn installed(spec: Option<&Spec>, keys: &[KeyState], unfit: &[Unfit]) -> Finding {
    let Some(spec) = spec else {
        return Finding::new(Status::Unknown, NO_SPEC)
            .remedy("write /etc/portcullis/spec.json, or `portcullis apply`");
    };
    judge_installed(spec, keys, unfit)
        .with("keys", json!(listed(keys, unfit)))
        .with("count", keys.len())
}

fn judge_installed(spec: &Spec, keys: &[KeyState], unfit: &[Unfit]) -> Finding {
    if keys.is_empty() && unfit.is_empty() {
        return match spec.authorized_keys.is_empty() {
            true => Finding::warn(
                "no source names a key: nobody can be let in by one",
                "add authorized_keys to the spec",
            ),
            false => Finding::fail(
                "every key of the spec has expired",
                "give the spec a key that is still good",
            ),
        };
    }
    let broken: Vec<&KeyState> = keys.iter().filter(|k| k.installed.is_err()).collect();
    if let Some((first, Err(reason))) = broken.first().map(|k| (k, &k.installed)) {
        return Finding::fail(
            format!(
                "{} of {} keys are not in place; {}: {reason}",
                broken.len(),
                keys.len(),
                first.grant.key.user
            ),
            "mend what the summary names; a missing user is created if `keys.create_users` says so",
        );
    }
    match unfit.first() {
        Some(first) => {
            let told = format!("{} ({}): {}", first.what, first.source, first.reason);
            let summary = format!("{} keys are left out; {told}", unfit.len());
            // Somebody counts on it; but who has a key in place gets in.
            match keys.is_empty() {
                true => Finding::fail(summary, "give a key that is accepted"),
                false => Finding::warn(summary, "mend the key where it comes from"),
            }
        }
        None => Finding::pass(format!("{} of {} keys are in place", keys.len(), keys.len())),
    }
}

pub fn accepted(spec: Option<&Spec>, keys: &[KeyState]) -> Finding {
    let Some(spec) = spec else {
        return Finding::new(Status::Unknown, NO_SPEC);
    };
    judge_accepted(spec, keys)
        .with("accepted", count(keys, Accepted::Yes))
        .with("inferred", count(keys, Accepted::Inferred))
        .with("refused", count(keys, Accepted::No))
        .with("not_asked", count(keys, Accepted::NotAsked))
        .with("unknown", count(keys, Accepted::Unknown))
}

fn judge_accepted(spec: &Spec, keys: &[KeyState]) -> Finding {
    if keys.is_empty() {
        return match spec.authorized_keys.is_empty() {
            true => Finding::warn("no source names a key", "add authorized_keys to the spec"),
            false => Finding::fail("there is no key left to ask about", "see keys.installed"),
        };
    }
    let name = |k: &KeyState| format!("{} {}", k.grant.key.user, k.grant.key.key.fingerprint());
    if let Some(first) = keys.iter().find(|k| k.accepted == Acceptance::Refused) {
        return Finding::fail(
            format!(
                "sshd would refuse {} of {} keys; {}",
                count(keys, Accepted::No),
                keys.len(),
                name(first)
            ),
            "look at `journalctl -u ssh -u sshd`: modes of the home and of .ssh, AuthorizedKeysFile, AllowUsers",
        );
    }
    let barred = keys.iter().find_map(|k| match &k.accepted {
        Acceptance::Barred(reason) => Some(format!("{}: {reason}", k.grant.key.user)),
        _ => None,
    });
    if let Some(reason) = barred {
        let remedy =
            "let the account go on: `usermod --expiredate '' USER`, or take its keys out of the spec";
        return Finding::fail(format!("a key lets nobody in; {reason}"), remedy);
    }
    let unknown = keys.iter().find_map(|k| match &k.accepted {
        Acceptance::Unknown(reason) => Some(format!("{}: {reason}", name(k))),
        _ => None,
    });
    if let Some(reason) = unknown {
        let summary = format!("sshd could not be asked about a key; {reason}");
        return Finding::fail(
            summary,
            "mend what the summary names; see keys.installed and sshd.reachable",
        );
    }
    let (asked, inferred) = (count(keys, Accepted::Yes), count(keys, Accepted::Inferred));
    let not_asked = match count(keys, Accepted::NotAsked) {
        0 => String::new(),
        some => format!("; {some} for certificates or certain sources can't be asked about"),
    };
    match (asked, inferred) {
        (0, _) => Finding::warn(
            format!("no key is in place that sshd could be asked about{not_asked}"),
            "log in by hand, or add a key without `from` and `cert-authority`",
        ),
        (asked, 0) => Finding::pass(format!(
            "sshd would accept all {asked} keys (RFC 4252 query){not_asked}"
        )),
        (asked, _) => Finding::pass(format!(
            "sshd would accept all {} keys (RFC 4252 query of {asked}, one of each user and kind){not_asked}",
            asked + inferred
        )),
    }
}

fn count(keys: &[KeyState], what: Accepted) -> usize {
    keys.iter().filter(|key| verdict(&key.accepted).0 == what).count()
}

fn verdict(acceptance: &Acceptance) -> (Accepted, Option<&str>) {
    match acceptance {
        Acceptance::Accepted => (Accepted::Yes, None),
        Acceptance::Inferred => (Accepted::Inferred, None),
        Acceptance::Refused => (Accepted::No, Some("sshd refuses it: see its log")),
        Acceptance::Barred(reason) => (Accepted::No, Some(reason)),
        Acceptance::Unaskable(reason) => (Accepted::NotAsked, Some(reason)),
        Acceptance::Unknown(reason) => (Accepted::Unknown, Some(reason)),
    }
}

/// Each key as a report lists it, the ones that need somebody first, up to [`MAX_LISTED`].
pub fn listed(keys: &[KeyState], unfit: &[Unfit]) -> Vec<KeyReport> {
    let mut list: Vec<KeyReport> = keys.iter().map(one).chain(unfit.iter().map(left_out)).collect();
    if list.len() > MAX_LISTED {
        list.sort_by_key(|key| key.reason.is_none());
        list.truncate(MAX_LISTED);
    }
    list
}

fn one(state: &KeyState) -> KeyReport {
    let key = &state.grant.key;
    let (accepted, reason) = verdict(&state.accepted);
    KeyReport {
        user: key.user.to_string(),
        fingerprint: key.key.fingerprint(),
        algorithm: key.key.algorithm(),
        comment: key.key.comment().to_owned(),
        options: key.options.to_string(),
        source: state.grant.source.to_string(),
        expires: key.expires,
        file: state
            .installed
            .as_ref()
            .ok()
            .map(|file| file.display().to_string()),
        accepted,
        reason: reason.map(str::to_owned),
    }
}

fn left_out(unfit: &Unfit) -> KeyReport {
    KeyReport {
        user: unfit.user.as_ref().map(ToString::to_string).unwrap_or_default(),
        fingerprint: unfit.what.clone(),
        algorithm: String::new(),
        comment: String::new(),
        options: String::new(),
        source: unfit.source.to_string(),
        expires: None,
        file: None,
        accepted: Accepted::Unknown,
        reason: Some(unfit.reason.clone()),
    }
}

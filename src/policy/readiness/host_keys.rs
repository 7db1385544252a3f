//! The check of sshd's host keys.
//!
//! May not live here: comparing them (`policy::host_keys`).

use std::path::PathBuf;

use portcullis_protocol::{Spec, Status};
use serde_json::{Value, json};

use super::Finding;
use crate::policy::host_keys::{Change, Comparison, KnownKey, compare, named};
use crate::policy::observation::Observations;

/// What an operator does about a change, and about a state file that can't be used.
const REMEDY: &str = "if you changed them: `portcullis keys trust-host-keys`; if not, somebody may answer in \
    this instance's place: do not log in by the new ones, find out who changed /etc/ssh, put the old ones back";

pub fn host_keys(spec: Option<&Spec>, seen: &Observations) -> Finding {
    let instance = spec.map(|spec| spec.instance.id.as_str());
    let sshd = &seen.sshd;
    let finding = match compare(instance, &seen.host_keys, sshd) {
        Comparison::Same => Finding::pass(format!(
            "{} host keys, and the one that sshd shows, are those that were first seen for this instance",
            sshd.host_keys.len()
        )),
        Comparison::Changed(change) => changed(&change, &sshd.unpublished_host_keys),
        Comparison::NotYet(reason) => Finding::new(
            Status::Unknown,
            format!("no host keys are remembered for this instance yet: {reason}"),
        ),
        Comparison::Unknown(reason) => Finding::new(
            Status::Unknown,
            format!("whether the host keys changed can't be told: {reason}"),
        ),
    };
    let known = seen.host_keys.as_ref().ok().and_then(Option::as_ref);
    let first_seen: Vec<Value> = known
        .iter()
        .flat_map(|known| &known.keys)
        .map(known_key)
        .collect();
    let on_disk: Vec<String> = sshd.host_keys.iter().map(named).collect();
    let finding = finding
        .with("instance", known.map(|known| known.instance.clone()))
        .with("first_seen", first_seen)
        .with("on_disk", on_disk)
        .with(
            "shown",
            sshd.handshake.as_ref().ok().map(|shake| named(&shake.host_key)),
        );
    let Ok(config) = &sshd.config else { return finding };
    let finding = finding.with("ports", config.ports.clone());
    // They are not examined: who trusts one trusts the authority that signed it.
    match config.host_certificates.as_slice() {
        [] => finding,
        files => finding.with("host_certificates", json!(files)),
    }
}

fn changed(change: &Change, unpublished: &[PathBuf]) -> Finding {
    let list = |keys: &[String]| match keys {
        [] => "none".to_owned(),
        keys => keys.join(", "),
    };
    let summary = match (&change.stray, change.old.is_empty() && change.new.is_empty()) {
        (Some(stray), true) => format!("sshd shows the host key {stray}, which is none of those on disk"),
        (Some(stray), false) => format!(
            "the host keys are not those that were first seen: gone {}, new {}; sshd shows {stray}, which is \
             none of those on disk",
            list(&change.old),
            list(&change.new)
        ),
        (None, _) => format!(
            "the host keys are not those that were first seen: gone {}, new {}",
            list(&change.old),
            list(&change.new)
        ),
    };
    // One that is known by its private file alone can't be compared, and looks like somebody else's.
    let publish: Vec<String> = unpublished
        .iter()
        .map(|file| file.display())
        .map(|file| format!("`ssh-keygen -y -f {file} > {file}.pub`"))
        .collect();
    let remedy = match publish.as_slice() {
        [] => REMEDY.to_owned(),
        commands => format!(
            "there is no public file of a host key, so write it first: {}; {REMEDY}",
            commands.join(", ")
        ),
    };
    Finding::fail(summary, remedy)
        .with("old", change.old.clone())
        .with("new", change.new.clone())
        .with("not_on_disk", change.stray.clone())
}

fn known_key(key: &KnownKey) -> Value {
    json!({"type": key.algorithm, "fingerprint": key.fingerprint, "since": key.first_seen})
}

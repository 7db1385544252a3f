//! The check of the algorithms that sshd offers.
//!
//! May not live here: which ones are weak (`policy::ssh_algorithms`).

use std::collections::BTreeMap;

use portcullis_protocol::Status;
use serde_json::{Value, json};

use super::Finding;
use crate::policy::observation::{Algorithms, Sshd};
use crate::policy::ssh_algorithms::{Kind, Weak, post_quantum, weak};

pub fn sshd_algorithms(sshd: &Sshd) -> Finding {
    let offered = match sshd.handshake.as_ref().map(|shake| shake.algorithms.as_ref()) {
        Ok(Ok(offered)) => offered,
        Ok(Err(reason)) | Err(reason) => {
            let summary = format!("sshd's algorithms could not be seen: {reason}");
            return Finding::new(Status::Unknown, summary).remedy("see sshd.reachable");
        }
    };
    let quantum = post_quantum(offered);
    let weak = weak(offered);
    let named = match quantum.first() {
        Some(name) => format!("post-quantum key exchange {name}"),
        None => "no post-quantum key exchange".to_owned(),
    };
    let finding = match weak.first() {
        None => Finding::pass(format!("sshd offers no weak algorithm; {named}")),
        Some(first) => Finding::warn(
            format!(
                "sshd offers {} weak algorithms, for example {}: {}; {named}",
                weak.len(),
                first.name,
                first.reason
            ),
            remedy(&weak),
        ),
    };
    evidence(finding, offered, &weak)
        .with("post_quantum", !quantum.is_empty())
        .with("post_quantum_kex", quantum)
}

/// Lines that drop them from what is offered by default (sshd_config(5): a list that begins with `-`).
fn remedy(weak: &[Weak]) -> String {
    let mut lines: BTreeMap<Kind, Vec<&str>> = BTreeMap::new();
    for Weak { kind, name, .. } in weak {
        lines.entry(*kind).or_default().push(name);
    }
    let lines = lines
        .iter()
        .map(|(kind, names)| format!("`{} -{}`", kind.option(), names.join(",")));
    let lines = lines.collect::<Vec<_>>().join(", ");
    format!("write {lines} into a drop-in of /etc/ssh/sshd_config.d/ that sorts first, and reload sshd")
}

fn evidence(finding: Finding, offered: &Algorithms, weak: &[Weak]) -> Finding {
    let weak: Vec<Value> = weak
        .iter()
        .map(|weak| json!({"name": weak.name, "option": weak.kind.option(), "reason": weak.reason}))
        .collect();
    finding
        .with("kex", offered.kex.clone())
        .with("host_key", offered.host_keys.clone())
        .with("ciphers", offered.ciphers.clone())
        .with("macs", offered.macs.clone())
        .with("weak", weak)
}

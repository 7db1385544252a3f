//! Checks of the gate and of the cluster's peers.
//!
//! May not live here: the gate's rules (`policy::firewall`).

use jiff::Timestamp;
use portcullis_protocol::{Protocol, Spec, Status};

use super::{Finding, NO_SPEC};
use crate::policy::firewall::{GATE, peer_set};
use crate::policy::observation::{Gate, Observed, Sshd};
use crate::policy::ruleset::{Family, Hook, PREROUTING, PRIORITY_DNAT, Ruleset, Verdict};

fn held(gate: &Gate) -> Result<&Ruleset, Finding> {
    match &gate.held {
        Ok(Some(held)) => Ok(held),
        Ok(None) => Err(Finding::fail(
            "the kernel holds no table inet portcullis",
            "look at `journalctl -u portcullis` for why it could not be applied",
        )),
        Err(reason) => Err(Finding::fail(
            format!("nf_tables can't be read: {reason}"),
            "be root; else give the unit CAP_NET_ADMIN back (`systemctl cat portcullis`), or the kernel its module \
             (`modprobe nf_tables`)",
        )),
    }
}

pub fn applied(gate: &Gate, trial_until: Option<Timestamp>, durable: &Observed<u64>) -> Finding {
    if let Err(reason) = &gate.applied {
        return Finding::fail(
            reason.clone(),
            "ports may be open: shut the instance at the provider; mend what is named, in the kernel or in the unit \
             (`systemctl cat portcullis`), then `portcullis lockdown`",
        );
    }
    let held = match held(gate) {
        Ok(held) => held,
        Err(finding) => return finding,
    };
    let diff = held.diff(&gate.planned);
    let rules: usize = held.chains.iter().map(|chain| chain.rules.len()).sum();
    let finding = match (diff.first(), durable) {
        (None, Err(reason)) => Finding::warn(
            format!("the kernel holds the planned ruleset, and the disk does not hold what it is for: {reason}"),
            "after a reboot an older spec holds, or none: give the state folder its disk, or room, again; what the \
             daemon holds is then written anew",
        )
        .with("durable", false),
        (None, Ok(_)) => Finding::pass(format!(
            "the kernel holds the planned ruleset: {rules} rules, {} sets{}",
            held.sets.len(),
            trial_until.map_or_else(String::new, |until| format!(
                "; it awaits confirmation until {until:.0}"
            ))
        )),
        (Some(first), _) => Finding::fail(
            format!(
                "the kernel holds something else in {} lines; {}",
                diff.len(),
                first.trim()
            ),
            "somebody keeps changing table inet portcullis: `nft monitor` shows who",
        ),
    };
    let finding = finding
        .with("repaired", gate.repaired)
        .with("exclusive", gate.owned);
    let evidence = [
        ("changed_by", gate.culprit.clone()),
        ("confirm_until", trial_until.map(|until| until.to_string())),
        (
            "state_restored",
            durable
                .as_ref()
                .ok()
                .filter(|times| **times > 0)
                .map(u64::to_string),
        ),
        (
            "older_sessions",
            (gate.kept > 0).then(|| format!("with {} hosts", gate.kept)),
        ),
    ];
    evidence
        .into_iter()
        .fold(finding, |finding, (name, value)| match value {
            Some(value) => finding.with(name, value),
            None => finding,
        })
}

/// Whether the gate is closed at its end, and sits where nothing gets around it.
fn gate_hook(gate: &Gate) -> Result<&Hook, Finding> {
    let chain = held(gate)?.chain(GATE);
    chain.and_then(|chain| chain.hook.as_ref()).ok_or_else(|| {
        Finding::fail(
            "the chain of the gate is missing or not hooked in",
            "see firewall.applied",
        )
    })
}

pub fn default_deny(gate: &Gate) -> Finding {
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

pub fn containers(gate: &Gate) -> Finding {
    match gate_hook(gate) {
        Ok(hook) if hook.number == PREROUTING && hook.priority < PRIORITY_DNAT => Finding::pass(
            "published ports are filtered before address translation, on the port that the outside dials",
        )
        .with("priority", hook.priority),
        Ok(_) => Finding::fail("the gate comes after address translation", "see firewall.applied"),
        Err(finding) => finding,
    }
}

pub fn ssh_allowed(spec: Option<&Spec>, sshd: &Sshd) -> Finding {
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
            "`portcullis firewall add --id ssh --protocol tcp --port 22`, or whatever sshd's port is, and the same rule \
             in the spec",
        ),
    }
}

pub fn peers(spec: Option<&Spec>, gate: &Gate) -> Finding {
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

//! The check of what listens, against what the gate lets in.
//!
//! `fail`: anybody gets at something that no rule of the spec names. `warn`: anybody gets at something that is
//! usually spoken in cleartext, or that a rule for many ports swept in. What listens and is shut, and a rule
//! that nobody listens behind, are in the evidence and no warning: default deny is what makes the one
//! harmless, and the other is how a port is opened before its program starts.
//! May not live here: who gets at what (`policy::exposure`).

use std::collections::BTreeSet;

use portcullis_protocol::Status;
use serde_json::{Value, json};

use super::Finding;
use crate::policy::exposure::{Exposure, Listener, Reach};
use crate::policy::observation::Observed;

/// How many listeners the report names, the most exposed first: about 10 kB of it.
const MAX_NAMED: usize = 40;
/// How many are named in a sentence.
const MAX_TOLD: usize = 5;

pub fn listeners(exposure: &Observed<Exposure>) -> Finding {
    let exposure = match exposure {
        Ok(exposure) => exposure,
        Err(reason) => {
            let summary = format!("what listens can't be judged: {reason}");
            return Finding::new(Status::Unknown, summary);
        }
    };
    let named = exposure.reachable().take(MAX_NAMED);
    let list: Vec<Value> = named.map(evidence).collect();
    let omitted = exposure.reachable().count().saturating_sub(list.len());
    let count = |reach| exposure.listeners.iter().filter(|one| one.reach == reach).count();
    let unserved: Vec<Value> = exposure
        .unserved
        .iter()
        .take(MAX_NAMED)
        .map(|one| json!({"rule": one.rule, "ports": one.ports}))
        .collect();
    judge(exposure)
        .with("reachable", list)
        .with("omitted", omitted)
        .with("shut", count(Reach::Nobody))
        .with("on_loopback", count(Reach::Loopback))
        .with("open_and_nobody_listens", unserved)
        .with("not_looked_into", exposure.not_looked_into.clone())
}

fn judge(exposure: &Exposure) -> Finding {
    let all = |wanted: &dyn Fn(&Listener) -> bool| -> Vec<&Listener> {
        exposure.reachable().filter(|listener| wanted(listener)).collect()
    };
    let anybody = |listener: &Listener| listener.reach == Reach::Anybody;
    let unnamed = all(&|listener| listener.is_unnamed());
    if !unnamed.is_empty() {
        return Finding::fail(
            format!(
                "anybody gets at what no rule of the spec names: {}",
                told(&unnamed)
            ),
            "see `firewall.applied` and `firewall.default-deny`: the gate is not as it should be",
        );
    }
    let cleartext = all(&|listener| anybody(listener) && listener.cleartext.is_some());
    if !cleartext.is_empty() {
        return Finding::warn(
            format!("anybody gets at what is usually cleartext: {}", told(&cleartext)),
            "name its sources in the rule, put TLS before it, or `portcullis firewall revoke ID`: see \
             `portcullis firewall exposure`",
        );
    }
    let swept_in = all(&|listener| listener.is_swept_in());
    if !swept_in.is_empty() {
        return Finding::warn(
            format!(
                "anybody gets at what a rule for many ports swept in: {}",
                told(&swept_in)
            ),
            "name the ports that are meant: see `portcullis firewall exposure`",
        );
    }
    let unknown = all(&|listener| listener.reach == Reach::Unknown);
    if !unknown.is_empty() {
        return Finding::new(
            Status::Unknown,
            format!("a rule of somebody else decides who gets at {}", told(&unknown)),
        );
    }
    if let Some(reason) = exposure.not_looked_into.first() {
        return Finding::new(Status::Unknown, reason.clone());
    }
    Finding::pass(words(exposure))
}

fn words(exposure: &Exposure) -> String {
    let anybody: Vec<&Listener> = exposure
        .reachable()
        .filter(|listener| listener.reach == Reach::Anybody)
        .collect();
    let named = exposure
        .reachable()
        .filter(|listener| listener.reach == Reach::Named)
        .count();
    match anybody.len() {
        0 => format!("nothing that listens is open to anybody, {named} to named sources"),
        _ => format!(
            "open to anybody: {}; {named} more to named sources",
            told(&anybody)
        ),
    }
}

/// `22/tcp (ssh.service)`, each once, not all of many.
fn told(listeners: &[&Listener]) -> String {
    let each: BTreeSet<(u16, String)> = listeners
        .iter()
        .map(|listener| {
            let what = match (&listener.cleartext, &listener.unit) {
                (Some(cleartext), _) => format!(" ({})", cleartext.protocol),
                (None, Some(unit)) => format!(" ({unit})"),
                (None, None) => String::new(),
            };
            (
                listener.port,
                format!("{}/{}{what}", listener.port, listener.protocol),
            )
        })
        .collect();
    let more = each.len().saturating_sub(MAX_TOLD);
    let shown: Vec<&str> = each
        .iter()
        .take(MAX_TOLD)
        .map(|(_, text)| text.as_str())
        .collect();
    match more {
        0 => shown.join(", "),
        more => format!("{} and {more} more", shown.join(", ")),
    }
}

/// Without process numbers: another one is no news to who reads reports.
fn evidence(listener: &Listener) -> Value {
    let by: Vec<Value> = listener
        .by
        .iter()
        .map(|grant| {
            json!({
                "rule": grant.rule,
                "who": grant.who.to_string(),
                "families": grant.families,
                "dropped_by": grant.dropped_by,
            })
        })
        .collect();
    json!({
        "protocol": listener.protocol,
        "port": listener.port,
        "listens_on": listener.listens_on,
        "unit": listener.unit,
        "uid": listener.uid,
        "published_to": listener.published_to,
        "reach": listener.reach,
        "by": by,
        "cleartext": listener.cleartext.map(|cleartext| cleartext.protocol),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::exposure::cleartext::usually;
    use crate::policy::exposure::socket::Transport;
    use crate::policy::exposure::{Grant, Who};

    fn listener(port: u16, rule: &str, who: Who, is_sweeping: bool) -> Listener {
        Listener {
            protocol: Transport::Tcp,
            port,
            listens_on: BTreeSet::new(),
            unit: Some("a.service".into()),
            program: None,
            uid: Some(0),
            published_to: BTreeSet::new(),
            reach: who.reach(),
            by: vec![Grant {
                rule: rule.into(),
                who,
                families: BTreeSet::new(),
                is_sweeping,
                dropped_by: None,
            }],
            cleartext: usually(Transport::Tcp, port, &[]),
        }
    }

    fn finding(listeners: Vec<Listener>) -> Finding {
        super::listeners(&Ok(Exposure {
            listeners,
            ..Exposure::default()
        }))
    }

    #[test]
    fn what_anybody_gets_at_is_judged_and_the_worst_is_told() {
        let ssh = || listener(22, "rule ssh", Who::Anybody, false);
        let telnet = |who| listener(23, "rule telnet", who, false);
        let peers = Who::Peers { addresses: 2 };
        let many = |crowd| Who::Sources {
            ranges: vec!["0.0.0.0/1".into()],
            more: 1,
            crowd,
        };
        for (listeners, status, words) in [
            (
                vec![],
                Status::Pass,
                "nothing that listens is open to anybody, 0 ",
            ),
            (
                vec![ssh()],
                Status::Pass,
                "open to anybody: 22/tcp (a.service); 0 more",
            ),
            (
                vec![ssh(), telnet(peers)],
                Status::Pass,
                "0 more to named sources",
            ),
            (vec![ssh(), telnet(many(false))], Status::Pass, "1 more"),
            (vec![ssh(), telnet(many(true))], Status::Warn, "23/tcp (Telnet)"),
            (
                vec![ssh(), telnet(Who::Anybody)],
                Status::Warn,
                "cleartext: 23/tcp (Telnet)",
            ),
            (
                vec![listener(4711, "rule all", Who::Anybody, true)],
                Status::Warn,
                "swept in: 4711/tcp (a.service)",
            ),
            (
                vec![ssh(), listener(4711, "", Who::Unknown, false)],
                Status::Unknown,
                "somebody else decides who gets at 4711/tcp",
            ),
            (
                vec![telnet(Who::Anybody), listener(4711, "", Who::Anybody, false)],
                Status::Fail,
                "no rule of the spec names: 4711/tcp",
            ),
        ] {
            let finding = finding(listeners);
            assert_eq!(finding.status, status, "{}", finding.summary);
            assert!(finding.summary.contains(words), "{}", finding.summary);
            assert_eq!(
                finding.remedy.is_some(),
                matches!(status, Status::Warn | Status::Fail)
            );
        }
    }

    #[test]
    fn what_could_not_be_looked_at_is_no_pass_and_many_are_bounded() {
        assert_eq!(super::listeners(&Err("no".into())).status, Status::Unknown);
        let unread = super::listeners(&Ok(Exposure {
            not_looked_into: vec!["too many".into()],
            ..Exposure::default()
        }));
        assert_eq!(unread.status, Status::Unknown);
        let many = (1000..1100).map(|port| listener(port, "rule all", Who::Anybody, false));
        let finding = finding(many.collect());
        assert!(finding.summary.contains("and 95 more"), "{}", finding.summary);
        assert_eq!(finding.evidence["reachable"].as_array().unwrap().len(), MAX_NAMED);
        assert_eq!(finding.evidence["omitted"], 60);
        assert!(serde_json::to_vec(&finding.evidence).unwrap().len() < 20_000);
    }
}

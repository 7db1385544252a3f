//! The check of other programs' rules, and what to do about each program's.
//!
//! May not live here: finding conflicts (`policy::conflicts`).

use portcullis_protocol::Status;
use serde_json::{Value, json};

use super::Finding;
use crate::policy::conflicts::{Comparison, Conflict, Hit, Program};
use crate::policy::observation::Observed;

pub fn conflicts(compared: &Observed<Comparison>) -> Finding {
    let compared = match compared {
        Ok(compared) => compared,
        Err(reason) => {
            return Finding::new(Status::Unknown, format!("other tables can't be read: {reason}"));
        }
    };
    let finding = judge(compared);
    let list: Vec<Value> = compared.conflicts.iter().map(evidence).collect();
    finding
        .with("conflicts", list)
        .with("omitted", compared.omitted)
        .with("packets_tried", compared.tried)
        .with("not_looked_into", compared.unread.clone())
}

fn judge(compared: &Comparison) -> Finding {
    let certain = compared.conflicts.iter().find(|conflict| conflict.certain);
    let possible = compared.conflicts.first();
    match (certain, possible, compared.unread.first()) {
        (Some(conflict), ..) => Finding::warn(describe(conflict, "drops", compared), remedy(conflict)),
        (None, Some(conflict), _) => {
            Finding::new(Status::Unknown, describe(conflict, "may drop", compared)).remedy(remedy(conflict))
        }
        (None, None, Some(unread)) => Finding::new(Status::Unknown, unread.clone()),
        (None, None, None) if compared.let_in == 0 => {
            Finding::pass("nothing is let in that others could drop")
        }
        (None, None, None) if compared.tried == 0 => Finding::new(
            Status::Unknown,
            "no interface that leads outside has an address yet",
        ),
        (None, None, None) => Finding::pass("no other table drops what is let in"),
    }
}

fn describe(conflict: &Conflict, verb: &str, compared: &Comparison) -> String {
    let ours: Vec<&str> = conflict
        .hits
        .iter()
        .map(|hit| hit.rule.as_str())
        .take(3)
        .collect();
    let others = match compared.conflicts.len() + compared.omitted {
        0 | 1 => String::new(),
        all => format!("; {} more", all - 1),
    };
    format!(
        "table {}, chain {} {verb} what is let in by {}: {}{others}",
        conflict.table,
        conflict.chain,
        ours.join(", "),
        conflict.rule
    )
}

fn evidence(conflict: &Conflict) -> Value {
    let hits: Vec<Value> = conflict
        .hits
        .iter()
        .map(|hit| json!({"rule": hit.rule, "packet": hit.packet}))
        .collect();
    json!({
        "table": conflict.table,
        "chain": conflict.chain,
        "hook": conflict.hook,
        "priority": conflict.priority,
        "handle": conflict.handle,
        "rule": conflict.rule,
        "certain": conflict.certain,
        "drops": hits,
    })
}

/// Port range and protocol as a program's command takes them: `22/tcp`.
fn opening(conflict: &Conflict, separator: char) -> Option<String> {
    let open = |hit: &Hit| {
        let (protocol, ports) = hit.opens?;
        let protocol = match protocol {
            6 => "tcp",
            17 => "udp",
            _ => return None,
        };
        Some(if ports.from() == ports.to() {
            format!("{}/{protocol}", ports.from())
        } else {
            format!("{}{separator}{}/{protocol}", ports.from(), ports.to())
        })
    };
    conflict.hits.iter().find_map(open)
}

fn remedy(conflict: &Conflict) -> String {
    let Conflict { table, chain, .. } = conflict;
    match (conflict.program, conflict.handle) {
        (Program::Ufw, _) => match opening(conflict, ':') {
            Some(opening) => {
                format!("`ufw allow {opening}`, or `ufw disable`: the gate denies by default without it")
            }
            None => {
                "let it in in ufw too, or `ufw disable`: the gate denies by default without it".to_owned()
            }
        },
        (Program::Firewalld, _) => match opening(conflict, '-') {
            Some(opening) => format!(
                "`firewall-cmd --permanent --add-port={opening} && firewall-cmd --reload`, or `systemctl disable --now firewalld`: \
                 the gate denies by default without it"
            ),
            None => "let it in in firewalld too, or `systemctl disable --now firewalld`".to_owned(),
        },
        (Program::Fail2ban, _) => "see `fail2ban-client status`: who is banned is not let in".to_owned(),
        (Program::LegacyIptables, _) => format!(
            "let it in there too: see `iptables-legacy-save` (or `ip6tables-legacy-save`), chain {chain}"
        ),
        (Program::Nftables, Some(handle)) => {
            format!("let it in there too, or `nft delete rule {table} {chain} handle {handle}`")
        }
        (Program::Nftables, None) => format!("let it in there too: see `nft list chain {table} {chain}`"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use portcullis_protocol::PortRange;

    fn conflict(program: Program, certain: bool) -> Conflict {
        Conflict {
            table: "ip filter".into(),
            chain: "INPUT".into(),
            hook: "input",
            priority: 0,
            handle: Some(7),
            rule: "meta l4proto tcp drop".into(),
            certain,
            program,
            hits: vec![Hit {
                rule: "rule ssh".into(),
                packet: "tcp port 22".into(),
                opens: Some((6, PortRange::new(80, 90).unwrap())),
            }],
        }
    }

    fn with(conflicts: Vec<Conflict>) -> Comparison {
        Comparison {
            conflicts,
            tried: 4,
            let_in: 1,
            ..Comparison::default()
        }
    }

    #[test]
    fn only_what_was_looked_at_and_drops_nothing_passes() {
        let status = |compared: Comparison| conflicts(&Ok(compared)).status;
        assert_eq!(status(with(vec![])), Status::Pass);
        assert_eq!(status(with(vec![conflict(Program::Ufw, true)])), Status::Warn);
        assert_eq!(status(with(vec![conflict(Program::Ufw, false)])), Status::Unknown);
        let unread = Comparison {
            unread: vec!["legacy".into()],
            ..with(vec![])
        };
        assert_eq!(status(unread), Status::Unknown);
        let nothing_tried = Comparison {
            tried: 0,
            ..with(vec![])
        };
        assert_eq!(status(nothing_tried), Status::Unknown);
        assert_eq!(status(Comparison::default()), Status::Pass);
        assert_eq!(conflicts(&Err("no".into())).status, Status::Unknown);
    }

    #[test]
    fn a_certain_conflict_is_told_first_with_its_programs_remedy() {
        for (program, words) in [
            (Program::Ufw, "ufw allow 80:90/tcp"),
            (Program::Firewalld, "--add-port=80-90/tcp"),
            (Program::Nftables, "nft delete rule ip filter INPUT handle 7"),
            (Program::LegacyIptables, "iptables-legacy-save"),
            (Program::Fail2ban, "fail2ban-client"),
        ] {
            let finding = conflicts(&Ok(with(vec![
                conflict(Program::Fail2ban, false),
                conflict(program, true),
            ])));
            assert!(
                finding.remedy.as_ref().unwrap().contains(words),
                "{:?}",
                finding.remedy
            );
            assert_eq!(
                finding.summary,
                "table ip filter, chain INPUT drops what is let in by rule ssh: meta l4proto tcp drop; 1 more"
            );
        }
    }
}

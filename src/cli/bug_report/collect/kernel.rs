//! The packet filter of a bug report: ours read by our own reader, others' summed up, and what nft says.
//!
//! May not live here: other parts of a bug report.

use std::fmt::Write;

use super::{Gathered, find, told};
use crate::agent::gate;
use crate::agent::state::Store;
use crate::config::Settings;
use crate::policy::foreign::{Foreign, Table, TableFamily};
use crate::policy::observation::Gate;
use crate::system::nftables::foreign;
use crate::system::xtables;

/// Adds what the kernel holds, and what it should.
pub async fn gate(gathered: &mut Gathered, settings: &Settings) {
    let store = Store::new(&settings.state_dir);
    let accepted = store.spec().ok().flatten();
    let trial = store.trial(accepted.as_ref()).ok().flatten();
    let spec = trial
        .as_ref()
        .map(|trial| trial.spec.as_ref())
        .or(accepted.as_ref());
    let gate = gate::observe(settings, spec);
    gathered.text("ruleset.txt", "our table, as the kernel holds it", ruleset(&gate));
    let legacy = xtables::read().await;
    let others = foreign::read().map_err(|e| e.to_string()).map(|mut others| {
        others.tables.extend(legacy.tables);
        others.unread.extend(legacy.unread);
        summary(&others)
    });
    gathered.text("other-tables.txt", "tables of other programs, summed up", others);
    if let Some(nft) = find("nft") {
        let listed = told(&nft, &["list", "ruleset"]).await;
        gathered.text("nft.txt", "`nft list ruleset`, with counters", listed);
    }
}

fn ruleset(gate: &Gate) -> Result<String, String> {
    let mut text = match gate.held.as_ref().map_err(Clone::clone)? {
        Some(held) => held.to_string(),
        None => "The kernel holds no table inet portcullis.".to_owned(),
    };
    let differs = match gate.held.as_ref().ok().and_then(Option::as_ref) {
        Some(held) => held.diff(&gate.planned),
        None => gate
            .planned
            .to_string()
            .lines()
            .map(|line| format!("+{line}"))
            .collect(),
    };
    match differs.is_empty() {
        true => text += "\n\nIt is what the accepted spec asks for.\n",
        false => {
            let _ = write!(text, "\n\nWhat would have to change:\n{}\n", differs.join("\n"));
        }
    }
    Ok(text)
}

fn summary(others: &Foreign) -> String {
    let mut text = String::new();
    for table in &others.tables {
        let rules: usize = table.chains.values().map(|chain| chain.rules.len()).sum();
        let _ = writeln!(
            text,
            "{}: {} chains, {rules} rules",
            name(table),
            table.chains.len()
        );
        for (chain, found) in &table.chains {
            if let Some(hook) = &found.hook {
                let nat = if found.nat { ", nat" } else { "" };
                let _ = writeln!(
                    text,
                    "    chain {chain}: hook {}, priority {}, policy {}, {} rules{nat}",
                    hook.number,
                    hook.priority,
                    hook.policy,
                    found.rules.len()
                );
            }
        }
    }
    for unread in &others.unread {
        let _ = writeln!(text, "not looked into: {unread}");
    }
    if text.is_empty() {
        text.push_str("There is no other table.\n");
    }
    text
}

fn name(table: &Table) -> String {
    let family = match table.family {
        TableFamily::Inet => "inet",
        TableFamily::Ip => "ip",
        TableFamily::Ip6 => "ip6",
    };
    let legacy = if table.legacy { " (legacy iptables)" } else { "" };
    format!("table {family} {}{legacy}", table.name)
}

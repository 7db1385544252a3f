//! `portcullis firewall`: the rules, what they let in, and changing them.

use std::collections::BTreeMap;

use clap::{Args, Subcommand};
use portcullis_protocol::control::{Answer, Request};
use portcullis_protocol::{FirewallRule, PortRange, Protocol, RuleId, SourceRange, Spec};
use serde_json::json;

use super::apply::{TermsArguments, change};
use super::denied::{self, DeniedArguments};
use super::exposure;
use super::status::{ask, unexpected};
use super::{Failure, Format, Global, plain_table, print, print_json, require_root, runtime};
use crate::system::nftables::{Count, Nftables};

#[derive(Debug, Subcommand)]
pub enum FirewallCommand {
    /// Show the ingress rules, and how many packets each let in.
    List,
    /// Let something in, in addition; it is durable and enforced when this returns.
    #[command(
        after_help = "Example:\n  portcullis firewall add --id web --protocol tcp --port 8080-8090 --source 10.0.0.0/8"
    )]
    Add(AddArguments),
    /// Let something in no longer; sessions that it let in end at once.
    #[command(after_help = "Example:\n  portcullis firewall revoke web")]
    Revoke(RevokeArguments),
    /// Show how many packets were denied and why, and who sent most of them.
    #[command(after_help = "Example:\n  portcullis firewall denied --top 3")]
    Denied(DeniedArguments),
    /// Show what listens on this host or is published by containers, who gets at it and by which rule.
    #[command(after_help = "Examples:\n  portcullis firewall exposure\n  \
        portcullis firewall exposure --format json | jq '.exposure.listeners[] | select(.reach == \"anybody\")'")]
    Exposure,
}

#[derive(Args, Debug)]
pub struct AddArguments {
    /// The rule's name.
    #[arg(long)]
    id: RuleId,
    /// tcp, udp, any (both), icmp (echo requests) or an IP protocol number.
    #[arg(long, default_value = "any")]
    protocol: Protocol,
    /// The port, or the first and the last: 80 or 80-90.
    #[arg(long, value_name = "PORT[-PORT]")]
    port: Option<PortRange>,
    /// An address or network that it is for; anybody, if left out. Can be repeated.
    #[arg(long, value_name = "CIDR")]
    source: Vec<SourceRange>,
}

#[derive(Args, Debug)]
pub struct RevokeArguments {
    /// The rule's name.
    id: String,
    #[command(flatten)]
    terms: TermsArguments,
}

pub fn run(global: &Global, command: &FirewallCommand) -> Result<(), Failure> {
    match command {
        FirewallCommand::List => list(global),
        FirewallCommand::Add(arguments) => {
            let rule = rule(arguments)?;
            change(global, "adding a rule", &Request::AddRule { rule })
        }
        FirewallCommand::Revoke(arguments) => {
            let request = Request::RevokeRule {
                id: arguments.id.clone(),
                confirm_s: arguments.terms.confirm_s(),
                force: arguments.terms.force(),
            };
            change(global, "revoking a rule", &request)
        }
        FirewallCommand::Denied(arguments) => denied::run(global, arguments),
        FirewallCommand::Exposure => exposure::run(global),
    }
}

fn rule(arguments: &AddArguments) -> Result<FirewallRule, Failure> {
    let rule = FirewallRule {
        id: arguments.id.clone(),
        protocol: arguments.protocol,
        ports: arguments.port,
        sources: arguments.source.clone(),
    };
    // The same checks as for a rule in a spec.
    let json = serde_json::to_value(&rule).map_err(|e| Failure::Failed(e.to_string()))?;
    serde_json::from_value(json).map_err(|e| Failure::BadInput(e.to_string()))
}

fn list(global: &Global) -> Result<(), Failure> {
    require_root("reading the rules")?;
    let socket = global.settings()?.socket;
    let answer = runtime()?.block_on(ask(&socket, &Request::Spec))?;
    let Answer::Spec { spec } = answer else {
        return Err(unexpected(&answer));
    };
    let counts = Nftables::open().and_then(|mut nftables| nftables.counts());
    let counts = counts.map_err(|e| Failure::Failed(e.to_string()))?;
    let rules = spec
        .map(|spec: Box<Spec>| spec.firewall.ingress)
        .unwrap_or_default();
    let counted = counted(&rules, &counts);
    match global.format {
        Format::Json => {
            let list: Vec<_> = counted
                .iter()
                .map(|(rule, count)| json!({"rule": rule, "packets": count.packets, "bytes": count.bytes}))
                .collect();
            print_json(&json!({"ingress": list}))
        }
        Format::Table if counted.is_empty() => print("No rule lets anything in."),
        Format::Table => print(&table(&counted)),
    }
}

/// Each rule with what all its parts in the kernel counted.
fn counted<'a>(rules: &'a [FirewallRule], counts: &[(String, Count)]) -> Vec<(&'a FirewallRule, Count)> {
    let mut sums: BTreeMap<&str, Count> = BTreeMap::new();
    for (comment, count) in counts {
        if let Some(id) = comment.strip_prefix("rule ") {
            *sums.entry(id).or_default() += *count;
        }
    }
    rules
        .iter()
        .map(|rule| (rule, sums.get(rule.id.as_str()).copied().unwrap_or_default()))
        .collect()
}

fn table(rules: &[(&FirewallRule, Count)]) -> String {
    let mut table = plain_table(["RULE", "PROTOCOL", "PORTS", "SOURCES", "PACKETS"]);
    for (rule, count) in rules {
        let sources: Vec<String> = rule.sources.iter().map(ToString::to_string).collect();
        let sources = if sources.is_empty() {
            "anywhere".to_owned()
        } else {
            sources.join(", ")
        };
        table.add_row([
            rule.id.to_string(),
            rule.protocol.to_string(),
            rule.ports
                .map_or_else(|| "-".to_owned(), |ports| ports.to_string()),
            sources,
            count.packets.to_string(),
        ]);
    }
    table.trim_fmt()
}

//! Ports of this host that another table translates for whoever comes from outside: what Docker and Podman
//! publish, and redirects.
//!
//! A port is looked for in every rule of a table that translates, and counts if a packet to it, followed
//! through the table as for conflicts, is translated.
//! May not live here: who is let in to it (`policy::exposure`).

use std::collections::BTreeMap;

use super::packets::{ANYBODY, SYN};
use super::walk::{Arrival, Outcome, Walk};
use super::{BaseChain, Uplink};
use crate::policy::explain::Packet;
use crate::policy::exposure::socket::Transport;
use crate::policy::foreign::{Action, Condition, Field, Rule, Table, TableFamily};
use crate::policy::ruleset::{Family, PREROUTING};

/// How many ports are followed.
const MAX_PORTS: usize = 512;

/// A port of this host that is translated to somewhere else.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Published {
    /// TCP or UDP.
    pub transport: Transport,
    /// The port that the outside dials.
    pub port: u16,
    /// The IP version.
    pub family: Family,
    /// What the rule does with it, for example `DNAT to 172.17.0.2:80`; empty where that is not known.
    pub to: String,
    /// The table, for example `ip nat`.
    pub table: String,
}

/// What is translated of what comes by the uplinks, and what could not be looked into.
pub(super) fn published(
    tables: &[Table],
    bases: &[BaseChain<'_>],
    uplinks: &[Uplink],
    budget: &mut usize,
) -> (Vec<Published>, Vec<String>) {
    let (mut found, mut unread) = (Vec::new(), Vec::new());
    for table in tables {
        let mut ports = ports(table);
        if ports.len() > MAX_PORTS {
            unread.push(format!(
                "table {table} translates more than {MAX_PORTS} ports, of which the first are looked at"
            ));
        }
        while ports.len() > MAX_PORTS {
            ports.pop_last();
        }
        for ((transport, port), to) in ports {
            for family in families(table) {
                if uplinks.iter().any(|uplink| {
                    is_translated(table, bases, arrival(uplink, transport, port, family), budget)
                }) {
                    found.push(Published {
                        transport,
                        port,
                        family,
                        to: to.clone(),
                        table: table.to_string(),
                    });
                }
            }
        }
    }
    found.sort();
    found.dedup();
    (found, unread)
}

fn families(table: &Table) -> Vec<Family> {
    match table.family {
        TableFamily::Inet => Family::BOTH.to_vec(),
        TableFamily::Ip => vec![Family::Ipv4],
        TableFamily::Ip6 => vec![Family::Ipv6],
    }
}

/// The ports that rules of a table that translates name, each with what the rule makes of it.
fn ports(table: &Table) -> BTreeMap<(Transport, u16), String> {
    let translates = |rule: &&Rule| matches!(rule.action, Action::Translate(_));
    let rules = || table.chains.values().flat_map(|chain| &chain.rules);
    let mut found = BTreeMap::new();
    if rules().find(translates).is_none() {
        return found;
    }
    for rule in rules() {
        let to = match &rule.action {
            Action::Translate(words) => words.as_str(),
            _ => "",
        };
        for transport in transports(rule) {
            for port in named(rule, &Field::DESTINATION_PORT).into_iter().flatten() {
                if found.len() > MAX_PORTS {
                    return found;
                }
                let kept: &mut String = found.entry((transport, port)).or_default();
                // A rule that jumps names the port too; the one that translates says where to.
                if kept.is_empty() {
                    to.clone_into(kept);
                }
            }
        }
    }
    found
}

fn transports(rule: &Rule) -> Vec<Transport> {
    let protocols = [Field::Protocol, Field::Network(9, 1), Field::Network(6, 1)];
    let numbers: Vec<u16> = protocols
        .iter()
        .filter_map(|field| named(rule, field))
        .flatten()
        .collect();
    let all = [Transport::Tcp, Transport::Udp];
    if numbers.is_empty() {
        return all.to_vec();
    }
    let is_named = |transport: &Transport| numbers.contains(&transport.number().into());
    all.into_iter().filter(is_named).collect()
}

/// The values that a rule wants of a field, if it says so; of a large range the first ones.
fn named(rule: &Rule, field: &Field) -> Option<Vec<u16>> {
    let wants = |c: &&Condition| c.field == *field && !c.negated && c.mask == field.mask();
    let condition = rule.conditions.iter().find(wants)?;
    let bound = |value: u128| u16::try_from(value).unwrap_or(u16::MAX);
    let values = condition
        .ranges
        .iter()
        .flat_map(|range| bound(*range.start())..=bound(*range.end()));
    Some(values.take(MAX_PORTS + 1).collect())
}

/// The first packet of a flow from anybody to a port; none where this host has no address.
fn arrival(uplink: &Uplink, transport: Transport, port: u16, family: Family) -> Option<Arrival> {
    let source = ANYBODY.into_iter().find(|source| Family::of(*source) == family)?;
    let mut here = uplink.addresses.iter();
    let destination = here.find(|address| Family::of(**address) == family)?;
    Some(Arrival {
        packet: Packet {
            interface: uplink.name.clone(),
            source,
            destination: Some(*destination),
            outgoing: None,
            protocol: transport.number(),
            source_port: None,
            port: Some(port),
            tcp_flags: SYN,
            icmp_type: None,
            hop_limit: 64,
            conntrack: None,
        },
        interface_index: uplink.index,
    })
}

/// Whether this table translates it, or may, unless one before it drops it.
fn is_translated(
    table: &Table,
    bases: &[BaseChain<'_>],
    arrival: Option<Arrival>,
    budget: &mut usize,
) -> bool {
    let Some(arrival) = arrival else { return false };
    for base in bases.iter().filter(|base| base.hook.number == PREROUTING) {
        match Walk::through(base.table, base.name, base.chain, &arrival, budget) {
            Outcome::Translated => return std::ptr::eq(base.table, table),
            Outcome::Dropped(_) => return false,
            Outcome::Passes | Outcome::MayBeDropped(_) => {}
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::super::{BUDGET, bases};
    use super::*;
    use crate::policy::foreign::iptables::parse;

    fn seen(text: &str) -> Vec<(String, u16, String)> {
        let tables = parse(Family::Ipv4, text);
        let uplink = Uplink {
            name: "eth0".into(),
            index: 2,
            addresses: vec!["10.0.0.2".parse().unwrap()],
        };
        let mut budget = BUDGET;
        let (found, unread) = published(&tables, &bases(&tables), &[uplink], &mut budget);
        assert_eq!(unread, Vec::<String>::new());
        let shown = |p: Published| (p.transport.to_string(), p.port, p.to);
        found.into_iter().map(shown).collect()
    }

    fn nat(rules: &str) -> String {
        format!("*nat\n:PREROUTING ACCEPT [0:0]\n:DOCKER - [0:0]\n{rules}\nCOMMIT\n")
    }

    #[test]
    fn what_docker_publishes_is_found_and_what_only_this_host_reaches_is_not() {
        let text = nat("-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER\n\
             -A DOCKER -i docker0 -j RETURN\n\
             -A DOCKER ! -i docker0 -p tcp -m tcp --dport 8080 -j DNAT --to-destination 172.17.0.2:80\n\
             -A DOCKER -d 127.0.0.1/32 ! -i docker0 -p tcp -m tcp --dport 8090 -j DNAT --to-destination 172.17.0.3:80\n\
             -A DOCKER ! -i docker0 -p udp -m udp --dport 53 -j DNAT --to-destination 172.17.0.2:53");
        let found = seen(&text);
        let ports: Vec<_> = found
            .iter()
            .map(|(kind, port, _)| (kind.as_str(), *port))
            .collect();
        assert_eq!(ports, [("tcp", 8080), ("udp", 53)], "{found:?}");
    }

    #[test]
    fn a_port_that_is_named_before_a_jump_counts_if_the_jump_leads_to_a_translation() {
        let jump = |target: &str| {
            nat(&format!(
                "-A PREROUTING -p tcp -m tcp --dport 30080 -j DOCKER\n-A DOCKER -j {target}\n-A DOCKER -p tcp \
                 --dport 1 -j REDIRECT"
            ))
        };
        let found = seen(&jump("DNAT --to-destination 10.1.0.1:80"));
        assert_eq!(found.len(), 1, "{found:?}");
        assert_eq!(found[0].1, 30080);
        assert_eq!(seen(&jump("RETURN")), []);
    }

    #[test]
    fn what_is_dropped_before_is_not_published() {
        let text = nat("-A PREROUTING -p tcp --dport 80 -j REDIRECT --to-ports 8080");
        assert_eq!(seen(&text).len(), 1);
        let raw = "*raw\n:PREROUTING ACCEPT\n-A PREROUTING -p tcp --dport 80 -j DROP\nCOMMIT\n";
        assert_eq!(seen(&format!("{raw}{text}")), []);
    }
}

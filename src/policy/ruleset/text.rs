//! The ruleset as nft(8) would write it, and what differs between two, as lines of that text.
//!
//! May not live here: conditions themselves; whatever is printed is in `super`.

use std::collections::BTreeSet;
use std::fmt;

use super::change::{Step, steps};
use super::{Conntrack, Elements, Family, Hook, Log, Match, PREROUTING, Rule, Ruleset, Set, TABLE, Verdict};

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Accept => "accept",
            Self::Drop => "drop",
            Self::Reject => "reject with icmpx port-unreachable",
        })
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ipv4 => "ipv4",
            Self::Ipv6 => "ipv6",
        })
    }
}

fn ip(family: Family) -> &'static str {
    match family {
        Family::Ipv4 => "ip",
        Family::Ipv6 => "ip6",
    }
}

impl fmt::Display for Match {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Interface(name) => write!(f, "iifname {name:?}"),
            Self::InterfaceIn(set) => write!(f, "iifname @{set}"),
            Self::Family(family) => write!(f, "meta nfproto {family}"),
            Self::Protocol(number) => match number {
                1 => f.write_str("meta l4proto icmp"),
                6 => f.write_str("meta l4proto tcp"),
                17 => f.write_str("meta l4proto udp"),
                58 => f.write_str("meta l4proto ipv6-icmp"),
                other => write!(f, "meta l4proto {other}"),
            },
            Self::Conntrack(Conntrack::Reply) => f.write_str("ct direction reply"),
            Self::Conntrack(Conntrack::Related) => f.write_str("ct state related"),
            Self::Conntrack(Conntrack::Invalid) => f.write_str("ct state invalid"),
            Self::Source(net) => write!(f, "{} saddr {net}", ip(Family::of(net.addr()))),
            Self::SourceIn(family, set) => write!(f, "{} saddr @{set}", ip(*family)),
            Self::Destination(net) => write!(f, "{} daddr {net}", ip(Family::of(net.addr()))),
            Self::RoutedTo(set) => write!(f, "fib daddr oifname @{set}"),
            Self::SourcePort(ports) => write!(f, "th sport {ports}"),
            Self::DestinationPort(ports) => write!(f, "th dport {ports}"),
            Self::IcmpType(types) if types.start() == types.end() => write!(f, "@th,0,8 {}", types.start()),
            Self::IcmpType(types) => write!(f, "@th,0,8 {}-{}", types.start(), types.end()),
            Self::HopLimit(limit) => write!(f, "ip6 hoplimit {limit}"),
            Self::NotFirstSegment => f.write_str("meta l4proto tcp tcp flags & (fin|syn|rst|ack) != syn"),
            Self::Limit { rate, burst } => write!(f, "limit rate {rate}/second burst {burst} packets"),
            Self::Foreign(text) => write!(f, "<{text}>"),
        }
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for condition in &self.matches {
            write!(f, "{condition} ")?;
        }
        if let Some(Log { group, bytes }) = self.log {
            write!(f, "log group {group} snaplen {bytes} ")?;
        }
        if self.counter {
            f.write_str("counter ")?;
        }
        if let Some(verdict) = self.verdict {
            write!(f, "{verdict} ")?;
        }
        write!(f, "comment {:?}", self.comment)
    }
}

impl fmt::Display for Elements {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list: Vec<String> = match self {
            Self::Interfaces(names) | Self::Outgoing(names) => {
                names.iter().map(|name| format!("{name:?}")).collect()
            }
            Self::Addresses(_, addresses) => addresses.iter().map(|a| a.to_string()).collect(),
            Self::Ranges(_, ranges) => ranges
                .iter()
                .map(|(first, last)| format!("{first}-{last}"))
                .collect(),
        };
        f.write_str(&list.join(", "))
    }
}

impl fmt::Display for Set {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (kind, flags) = match &self.elements {
            Elements::Interfaces(_) => ("type ifname", ""),
            Elements::Outgoing(_) => ("typeof fib daddr oifname", ""),
            Elements::Addresses(Family::Ipv4, _) => ("type ipv4_addr", ""),
            Elements::Addresses(Family::Ipv6, _) => ("type ipv6_addr", ""),
            Elements::Ranges(Family::Ipv4, _) => ("type ipv4_addr", " flags interval;"),
            Elements::Ranges(Family::Ipv6, _) => ("type ipv6_addr", " flags interval;"),
        };
        write!(f, "set {} {{ {kind};{flags}", self.name)?;
        if !self.elements.is_empty() {
            write!(f, " elements = {{ {} }}", self.elements)?;
        }
        f.write_str(" }")
    }
}

impl fmt::Display for Hook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self.number {
            PREROUTING => "prerouting".to_owned(),
            other => other.to_string(),
        };
        let Self { priority, policy, .. } = self;
        write!(f, "type filter hook {name} priority {priority}; policy {policy};")
    }
}

impl fmt::Display for Ruleset {
    /// As nft(8) would read it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "table inet {TABLE} {{")?;
        if self.dormant {
            writeln!(f, "    flags dormant")?;
        }
        for set in &self.sets {
            writeln!(f, "    {set}")?;
        }
        for chain in &self.chains {
            writeln!(f, "    chain {} {{", chain.name)?;
            if let Some(hook) = &chain.hook {
                writeln!(f, "        {hook}")?;
            }
            for rule in &chain.rules {
                writeln!(f, "        {rule}")?;
            }
            writeln!(f, "    }}")?;
        }
        f.write_str("}")
    }
}

/// Elements of a set that are written out where changes are told.
const SHOWN: usize = 10;

/// The elements, but not 100,000 of them.
fn shortened(elements: &Elements) -> String {
    let first = match elements {
        Elements::Interfaces(names) => Elements::Interfaces(names.iter().take(SHOWN).cloned().collect()),
        Elements::Outgoing(names) => Elements::Outgoing(names.iter().take(SHOWN).cloned().collect()),
        Elements::Addresses(family, all) => Elements::Addresses(*family, all.iter().take(SHOWN).collect()),
        Elements::Ranges(family, all) => Elements::Ranges(*family, all.iter().take(SHOWN).copied().collect()),
    };
    match elements.len().saturating_sub(SHOWN) {
        0 => first.to_string(),
        more => format!("{first} and {more} more"),
    }
}

impl Ruleset {
    /// What would have to change to make `self` into `wanted`: lines that go (`-`) and come (`+`).
    /// Empty if both are the same.
    pub fn diff(&self, wanted: &Self) -> Vec<String> {
        if self == wanted {
            return Vec::new();
        }
        match steps(self, wanted) {
            Some(steps) => steps.iter().flat_map(|step| self.step_lines(step)).collect(),
            None => self.outline_diff(wanted),
        }
    }

    fn step_lines(&self, step: &Step) -> Vec<String> {
        let set_line = |sign, set: &Set| format!("{sign}set {} {{ {} }}", set.name, shortened(&set.elements));
        match step {
            Step::AddSet(set) | Step::AddElements(set) => vec![set_line('+', set)],
            Step::RemoveElements(set) => vec![set_line('-', set)],
            Step::Empty(name) | Step::RemoveSet(name) => {
                self.set(name).map(|set| set_line('-', set)).into_iter().collect()
            }
            Step::AddRules { rules, .. } => rules.iter().map(|rule| format!("+{rule}")).collect(),
            Step::RemoveRule { chain, index } => {
                let rule = self.chain(chain).and_then(|chain| chain.rules.get(*index));
                rule.map(|rule| format!("-{rule}")).into_iter().collect()
            }
        }
    }

    /// For tables that differ in more than rules and elements.
    fn outline_diff(&self, wanted: &Self) -> Vec<String> {
        let (old, new) = (self.outline(), wanted.outline());
        let (olds, news): (BTreeSet<&String>, BTreeSet<&String>) =
            (old.iter().collect(), new.iter().collect());
        let gone = old.iter().filter(|line| !news.contains(line));
        let come = new.iter().filter(|line| !olds.contains(line));
        let mut diff: Vec<String> = gone
            .map(|line| format!("-{line}"))
            .chain(come.map(|line| format!("+{line}")))
            .collect();
        if diff.is_empty() {
            diff.push("~ the same rules in another order or form".to_owned());
        }
        diff
    }

    /// A line for each set, chain and rule.
    fn outline(&self) -> Vec<String> {
        let dormant = self.dormant.then(|| "flags dormant".to_owned());
        let sets = self
            .sets
            .iter()
            .map(|set| format!("set {} {{ {} }}", set.name, shortened(&set.elements)));
        let chains = self.chains.iter().flat_map(|chain| {
            let hook = chain.hook.as_ref().map_or_else(String::new, ToString::to_string);
            let head = format!("chain {} {hook}", chain.name);
            std::iter::once(head).chain(chain.rules.iter().map(ToString::to_string))
        });
        dormant.into_iter().chain(sets).chain(chains).collect()
    }
}

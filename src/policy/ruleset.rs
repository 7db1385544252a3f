//! The ruleset as a value: what table `inet portcullis` holds, or shall hold.
//!
//! One form for all uses: the plan prints it, `system::nftables` encodes it for the kernel and reads
//! the kernel back into it, so that comparing both is `==`.
//! May not live here: why a rule is there (`firewall`), netlink.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;

use ipnet::IpNet;
use portcullis_protocol::PortRange;
use serde::Serialize;

pub use addresses::Addresses;

mod addresses;
pub mod change;
mod text;

/// Name of the one table that the agent owns (family `inet`).
pub const TABLE: &str = "portcullis";

/// A whole table.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Ruleset {
    /// Whether the kernel passes it by (`NFT_TABLE_F_DORMANT`); never in a plan.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub dormant: bool,
    /// Named sets, sorted by name.
    pub sets: Vec<Set>,
    /// Chains, sorted by name.
    pub chains: Vec<Chain>,
}

/// An IP version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// IPv4.
    Ipv4,
    /// IPv6.
    Ipv6,
}

impl Family {
    /// Both.
    pub const BOTH: [Self; 2] = [Self::Ipv4, Self::Ipv6];

    /// Of an address.
    pub fn of(address: IpAddr) -> Self {
        if address.is_ipv4() { Self::Ipv4 } else { Self::Ipv6 }
    }

    /// `4` or `6`, for names of sets.
    pub fn digit(self) -> char {
        match self {
            Self::Ipv4 => '4',
            Self::Ipv6 => '6',
        }
    }
}

/// A named set.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Set {
    /// Its name.
    pub name: String,
    /// What is in it; the kind of set follows from it.
    pub elements: Elements,
}

/// What a set holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Elements {
    /// Names of interfaces that packets come in by.
    Interfaces(BTreeSet<String>),
    /// Names of interfaces that packets are routed to: to nft(8), another type.
    Outgoing(BTreeSet<String>),
    /// Single addresses of one family: a hash set, flat in its size.
    Addresses(Family, Addresses),
    /// Address ranges of one family, first to last, sorted, neither overlapping nor touching.
    Ranges(Family, Vec<(IpAddr, IpAddr)>),
}

impl Elements {
    /// Ranges that cover exactly these networks of the family, in their normal form.
    pub fn ranges(family: Family, nets: impl IntoIterator<Item = IpNet>) -> Self {
        let mut ranges: Vec<(u128, u128)> = nets
            .into_iter()
            .filter(|net| Family::of(net.addr()) == family)
            .map(|net| (to_number(net.network()), to_number(net.broadcast())))
            .collect();
        ranges.sort_unstable();
        let mut merged: Vec<(u128, u128)> = Vec::with_capacity(ranges.len());
        for (first, last) in ranges {
            match merged.last_mut() {
                Some((_, end)) if first <= end.saturating_add(1) => *end = (*end).max(last),
                _ => merged.push((first, last)),
            }
        }
        let address = |number| from_number(family, number);
        Self::Ranges(
            family,
            merged
                .into_iter()
                .map(|(first, last)| (address(first), address(last)))
                .collect(),
        )
    }

    /// How many.
    pub fn len(&self) -> usize {
        match self {
            Self::Interfaces(names) | Self::Outgoing(names) => names.len(),
            Self::Addresses(_, addresses) => addresses.len(),
            Self::Ranges(_, ranges) => ranges.len(),
        }
    }

    /// Whether nothing is in it.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

fn to_number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(v4) => u128::from(v4.to_bits()),
        IpAddr::V6(v6) => v6.to_bits(),
    }
}

fn from_number(family: Family, number: u128) -> IpAddr {
    match family {
        // Only ever called with what `to_number` made of an address of this family.
        Family::Ipv4 => Ipv4Addr::from_bits(u32::try_from(number).unwrap_or(u32::MAX)).into(),
        Family::Ipv6 => Ipv6Addr::from_bits(number).into(),
    }
}

/// The address after this one; `None` after the last.
pub fn successor(address: IpAddr) -> Option<IpAddr> {
    match address {
        IpAddr::V4(v4) => v4.to_bits().checked_add(1).map(|n| Ipv4Addr::from_bits(n).into()),
        IpAddr::V6(v6) => v6.to_bits().checked_add(1).map(|n| Ipv6Addr::from_bits(n).into()),
    }
}

/// The address before this one; `None` before the first.
pub fn predecessor(address: IpAddr) -> Option<IpAddr> {
    match address {
        IpAddr::V4(v4) => v4.to_bits().checked_sub(1).map(|n| Ipv4Addr::from_bits(n).into()),
        IpAddr::V6(v6) => v6.to_bits().checked_sub(1).map(|n| Ipv6Addr::from_bits(n).into()),
    }
}

/// A chain, and where packets come into it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Chain {
    /// Its name.
    pub name: String,
    /// Where it is hooked in; none for a chain that is only jumped to.
    pub hook: Option<Hook>,
    /// Its rules, in order.
    pub rules: Vec<Rule>,
}

/// Where a base chain sits (`type filter`), and what happens to packets that no rule decides.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Hook {
    /// `NF_INET_*` hook number (linux/netfilter.h); 0 is prerouting.
    pub number: u32,
    /// Priority among the chains of the hook; lower comes first (linux/netfilter_ipv4.h).
    pub priority: i32,
    /// What happens at the end of the chain.
    pub policy: Verdict,
}

/// `NF_INET_PRE_ROUTING`.
pub const PREROUTING: u32 = 0;
/// `NF_IP_PRI_MANGLE`: after conntrack (-200), before destination NAT (-100).
pub const PRIORITY_MANGLE: i32 = -150;
/// `NF_IP_PRI_NAT_DST`.
pub const PRIORITY_DNAT: i32 = -100;

/// What a rule does with a packet that all its matches fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// Let it go on to other tables.
    Accept,
    /// End it.
    Drop,
    /// End it, and tell the sender at once: ICMP port unreachable (RFC 792, RFC 4443). Not for policies.
    Reject,
}

/// One rule.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Rule {
    /// Says why it is there, for example `rule ssh`; kept in the kernel as the rule's comment.
    pub comment: String,
    /// All must fit.
    pub matches: Vec<Match>,
    /// Where a copy of the packet goes, if anywhere.
    pub log: Option<Log>,
    /// Whether packets are counted.
    pub counter: bool,
    /// What then happens; none: the next rule is looked at.
    pub verdict: Option<Verdict>,
}

/// A copy of a packet for a listener of nfnetlink_log; without one, nothing happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Log {
    /// Number that the listener binds to.
    pub group: u16,
    /// Bytes of the packet that are copied.
    pub bytes: u32,
}

/// What conntrack says of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Conntrack {
    /// Answers a flow whose first packet went the other way.
    Reply,
    /// Belongs to a flow without being of it, as an ICMP error does.
    Related,
    /// Of no flow and no good start of one.
    Invalid,
}

/// One condition.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Match {
    /// Came in by this interface.
    Interface(String),
    /// Came in by an interface of this set.
    InterfaceIn(String),
    /// Is of this IP version.
    Family(Family),
    /// Carries this protocol (behind all extension headers).
    Protocol(u8),
    /// Conntrack's opinion of it.
    Conntrack(Conntrack),
    /// Its source is in this network.
    Source(IpNet),
    /// Its source is in this set.
    SourceIn(Family, String),
    /// Its destination is in this network.
    Destination(IpNet),
    /// Would be forwarded to an interface of this set, as its destination stands now.
    RoutedTo(String),
    /// Its source port (of a protocol with ports).
    SourcePort(PortRange),
    /// Its destination port, as the sender dialled it.
    DestinationPort(PortRange),
    /// Its ICMP or ICMPv6 type, as the rule's protocol says.
    IcmpType(RangeInclusive<u8>),
    /// Its IPv6 hop limit.
    HopLimit(u8),
    /// Of TCP, and not the first segment of a connection (RFC 9293 section 3.5).
    NotFirstSegment,
    /// No more than so many a second came before it, but for a burst of so many.
    Limit {
        /// Packets a second.
        rate: u32,
        /// Packets beyond that at once.
        burst: u32,
    },
    /// Something that another program put there; never in a plan.
    Foreign(String),
}

impl Ruleset {
    /// The set of that name.
    pub fn set(&self, name: &str) -> Option<&Set> {
        self.sets.iter().find(|set| set.name == name)
    }

    /// The same without sets of more than `most` elements and without the rules that look into them. Those
    /// let in and do nothing else, so this lets in no more; none if there is no such set, or one of those
    /// rules does something else.
    pub fn without_large_sets(&self, most: usize) -> Option<Self> {
        let (sets, large): (Vec<&Set>, Vec<&Set>) =
            self.sets.iter().partition(|set| set.elements.len() <= most);
        let looks_into = |rule: &Rule| {
            rule.matches.iter().any(|one| match one {
                Match::InterfaceIn(name) | Match::SourceIn(_, name) | Match::RoutedTo(name) => {
                    large.iter().any(|set| set.name == *name)
                }
                _ => false,
            })
        };
        let mut rules = self.chains.iter().flat_map(|chain| &chain.rules);
        let only_let_in = rules
            .all(|rule| !looks_into(rule) || rule.verdict == Some(Verdict::Accept) && rule.log.is_none());
        if large.is_empty() || !only_let_in {
            return None;
        }
        let chains = self.chains.iter().map(|chain| Chain {
            rules: chain
                .rules
                .iter()
                .filter(|rule| !looks_into(rule))
                .cloned()
                .collect(),
            ..chain.clone()
        });
        Some(Self {
            dormant: self.dormant,
            sets: sets.into_iter().cloned().collect(),
            chains: chains.collect(),
        })
    }

    /// The chain of that name.
    pub fn chain(&self, name: &str) -> Option<&Chain> {
        self.chains.iter().find(|chain| chain.name == name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(matches: Vec<Match>, verdict: Verdict) -> Rule {
        Rule {
            comment: String::new(),
            matches,
            log: None,
            counter: true,
            verdict: Some(verdict),
        }
    }

    #[test]
    fn without_large_sets_less_is_let_in_and_nothing_else_changes() {
        let names = |count: usize| Elements::Interfaces((0..count).map(|n| format!("i{n}")).collect());
        let set = |name: &str, count| Set {
            name: name.to_owned(),
            elements: names(count),
        };
        let of = |name: &str| Match::InterfaceIn(name.to_owned());
        let small = rule(vec![of("small")], Verdict::Drop);
        let rules = vec![
            rule(vec![of("large")], Verdict::Accept),
            small.clone(),
            rule(vec![Match::Protocol(6), of("large")], Verdict::Accept),
        ];
        let hook = Hook {
            number: PREROUTING,
            priority: PRIORITY_MANGLE,
            policy: Verdict::Drop,
        };
        let mut whole = Ruleset {
            dormant: false,
            sets: vec![set("large", 3), set("small", 2)],
            chains: vec![Chain {
                name: "gate".to_owned(),
                hook: Some(hook.clone()),
                rules,
            }],
        };
        let shut = whole.without_large_sets(2).unwrap();
        assert_eq!(shut.sets, [set("small", 2)]);
        assert_eq!(
            (&shut.chains[0].rules, &shut.chains[0].hook),
            (&vec![small], &Some(hook))
        );
        assert_eq!(whole.without_large_sets(3), None);
        // A rule that drops can't be left out.
        whole.chains[0].rules[0].verdict = Some(Verdict::Drop);
        assert_eq!(whole.without_large_sets(2), None);
    }

    #[test]
    fn ranges_have_one_normal_form() {
        let nets = [
            "10.0.1.0/24",
            "10.0.0.0/24",
            "10.0.0.128/25",
            "fd00::/8",
            "192.0.2.1/32",
        ];
        let nets: Vec<IpNet> = nets.iter().map(|n| n.parse().unwrap()).collect();
        let expected = vec![
            ("10.0.0.0".parse().unwrap(), "10.0.1.255".parse().unwrap()),
            ("192.0.2.1".parse().unwrap(), "192.0.2.1".parse().unwrap()),
        ];
        assert_eq!(
            Elements::ranges(Family::Ipv4, nets.clone()),
            Elements::Ranges(Family::Ipv4, expected)
        );
        assert_eq!(Elements::ranges(Family::Ipv6, nets).len(), 1);
    }

    proptest::proptest! {
        #[test]
        fn ranges_cover_what_the_nets_cover(nets in proptest::collection::vec((0u32.., 0u8..=32), 1..8), probe: u32) {
            let nets: Vec<IpNet> = nets.iter()
                .map(|(a, len)| ipnet::Ipv4Net::new(Ipv4Addr::from_bits(*a), *len).unwrap().into()).collect();
            let probe = IpAddr::from(Ipv4Addr::from_bits(probe));
            let Elements::Ranges(_, ranges) = Elements::ranges(Family::Ipv4, nets.clone()) else { unreachable!() };
            let in_nets = nets.iter().any(|n| n.contains(&probe));
            let in_ranges = ranges.iter().any(|(a, b)| (*a..=*b).contains(&probe));
            proptest::prop_assert_eq!(in_nets, in_ranges);
        }
    }
}

//! Conditions to the kernel's expressions and back. What comes back is compared with the plan, so
//! both directions must be exact: `raise(lower(rule)) == rule`.
//!
//! May not live here: netlink messages, policy.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use netlink_packet_netfilter::nftables::{MetaKey, Operator};
use portcullis_protocol::PortRange;

use super::expression::{Expr, NETWORK_HEADER, TRANSPORT_HEADER};
use crate::policy::ruleset::{Conntrack, Family, Match, Rule};

/// Length of an interface name in registers and sets (`IFNAMSIZ`).
const IFNAMSIZ: usize = 16;

/// `NFPROTO_IPV4` and `NFPROTO_IPV6` (linux/netfilter.h).
const NFPROTO_IPV4: u8 = 2;
const NFPROTO_IPV6: u8 = 10;

/// `IPPROTO_TCP`.
const IPPROTO_TCP: u8 = 6;

/// State bits (linux/netfilter/nf_conntrack_common.h).
const CT_INVALID: u32 = 1;
const CT_RELATED: u32 = 4;
/// `enum ip_conntrack_dir` (linux/netfilter/nf_conntrack_tuple_common.h).
const IP_CT_DIR_REPLY: u8 = 1;
/// FIN, SYN, RST and ACK, and the one of them that a connection starts with.
const FLOW_FLAGS: u8 = 0x17;
const SYN: u8 = 0x02;

/// Where an address is in its header: offset and length, in bytes.
fn address_field(family: Family, source: bool) -> Expr {
    let (offset, len) = match (family, source) {
        (Family::Ipv4, true) => (12, 4),
        (Family::Ipv4, false) => (16, 4),
        (Family::Ipv6, true) => (8, 16),
        (Family::Ipv6, false) => (24, 16),
    };
    Expr::Payload {
        base: NETWORK_HEADER,
        offset,
        len,
    }
}

const SOURCE_PORT: Expr = Expr::Payload {
    base: TRANSPORT_HEADER,
    offset: 0,
    len: 2,
};
const DESTINATION_PORT: Expr = Expr::Payload {
    base: TRANSPORT_HEADER,
    offset: 2,
    len: 2,
};
const ICMP_TYPE: Expr = Expr::Payload {
    base: TRANSPORT_HEADER,
    offset: 0,
    len: 1,
};
const TCP_FLAGS: Expr = Expr::Payload {
    base: TRANSPORT_HEADER,
    offset: 13,
    len: 1,
};
const HOP_LIMIT: Expr = Expr::Payload {
    base: NETWORK_HEADER,
    offset: 7,
    len: 1,
};

/// An interface name as registers and sets hold it: padded with zeros.
pub fn interface_bytes(name: &str) -> Vec<u8> {
    let mut bytes = name.as_bytes().to_vec();
    bytes.resize(IFNAMSIZ, 0);
    bytes
}

/// An address as registers and sets hold it: big-endian.
pub fn address_bytes(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

/// The address of such bytes.
pub fn address_of(bytes: &[u8]) -> Option<IpAddr> {
    if let Ok(octets) = <[u8; 4]>::try_from(bytes) {
        return Some(Ipv4Addr::from(octets).into());
    }
    <[u8; 16]>::try_from(bytes)
        .ok()
        .map(|octets| Ipv6Addr::from(octets).into())
}

/// The interface name of such bytes.
pub fn interface_of(bytes: &[u8]) -> Option<String> {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8(bytes.get(..end)?.to_vec()).ok()
}

/// The expressions of a rule, without its comment.
pub fn lower(rule: &Rule) -> Vec<Expr> {
    let mut expressions: Vec<Expr> = rule.matches.iter().flat_map(lower_match).collect();
    expressions.extend(rule.log.map(Expr::Log));
    if rule.counter {
        expressions.push(Expr::Counter);
    }
    expressions.extend(rule.verdict.map(Expr::Verdict));
    expressions
}

fn equals(value: Vec<u8>) -> Expr {
    Expr::Cmp(Operator::Equal, value)
}

fn in_range(field: Expr, first: Vec<u8>, last: Vec<u8>) -> Vec<Expr> {
    if first == last {
        return vec![field, equals(first)];
    }
    vec![
        field,
        Expr::Cmp(Operator::GreatherThanEqual, first),
        Expr::Cmp(Operator::LessThanEqual, last),
    ]
}

fn in_network(net: IpNet, source: bool) -> Vec<Expr> {
    let mut expressions = vec![address_field(Family::of(net.addr()), source)];
    if net.prefix_len() < net.max_prefix_len() {
        expressions.push(Expr::Mask(address_bytes(net.netmask())));
    }
    expressions.push(equals(address_bytes(net.network())));
    expressions
}

fn in_state(bits: u32) -> Vec<Expr> {
    vec![
        Expr::CtState,
        Expr::Mask(bits.to_ne_bytes().to_vec()),
        Expr::Cmp(Operator::NotEqual, vec![0; 4]),
    ]
}

fn in_ports(field: Expr, ports: PortRange) -> Vec<Expr> {
    in_range(
        field,
        ports.from().to_be_bytes().to_vec(),
        ports.to().to_be_bytes().to_vec(),
    )
}

fn lower_match(condition: &Match) -> Vec<Expr> {
    match condition {
        Match::Interface(name) => vec![Expr::Meta(MetaKey::Iifname), equals(interface_bytes(name))],
        Match::InterfaceIn(set) => vec![Expr::Meta(MetaKey::Iifname), Expr::Lookup(set.clone())],
        Match::Family(family) => {
            let number = match family {
                Family::Ipv4 => NFPROTO_IPV4,
                Family::Ipv6 => NFPROTO_IPV6,
            };
            vec![Expr::Meta(MetaKey::Nfproto), equals(vec![number])]
        }
        Match::Protocol(number) => vec![Expr::Meta(MetaKey::L4Proto), equals(vec![*number])],
        Match::Conntrack(Conntrack::Reply) => vec![Expr::CtDirection, equals(vec![IP_CT_DIR_REPLY])],
        Match::Conntrack(Conntrack::Related) => in_state(CT_RELATED),
        Match::Conntrack(Conntrack::Invalid) => in_state(CT_INVALID),
        Match::Source(net) => in_network(*net, true),
        Match::Destination(net) => in_network(*net, false),
        Match::RoutedTo(set) => vec![Expr::RouteInterface, Expr::Lookup(set.clone())],
        Match::SourceIn(family, set) => vec![address_field(*family, true), Expr::Lookup(set.clone())],
        Match::SourcePort(ports) => in_ports(SOURCE_PORT, *ports),
        Match::DestinationPort(ports) => in_ports(DESTINATION_PORT, *ports),
        Match::IcmpType(types) => in_range(ICMP_TYPE, vec![*types.start()], vec![*types.end()]),
        Match::HopLimit(limit) => vec![HOP_LIMIT, equals(vec![*limit])],
        Match::NotFirstSegment => vec![
            Expr::Meta(MetaKey::L4Proto),
            equals(vec![IPPROTO_TCP]),
            TCP_FLAGS,
            Expr::Mask(vec![FLOW_FLAGS]),
            Expr::Cmp(Operator::NotEqual, vec![SYN]),
        ],
        Match::Limit { rate, burst } => vec![Expr::Limit {
            rate: *rate,
            burst: *burst,
        }],
        Match::Foreign(text) => vec![Expr::Foreign(text.clone())],
    }
}

/// The rule of such expressions. What no condition of ours lowers to becomes [`Match::Foreign`].
pub fn raise(comment: String, expressions: &[Expr]) -> Rule {
    let mut rule = Rule {
        comment,
        matches: Vec::new(),
        log: None,
        counter: false,
        verdict: None,
    };
    let mut rest = expressions;
    while let Some((first, tail)) = rest.split_first() {
        match first {
            Expr::Log(log) if rule.verdict.is_none() && !rule.counter && rule.log.is_none() => {
                rule.log = Some(*log);
                rest = tail;
            }
            Expr::Counter if rule.verdict.is_none() && !rule.counter => {
                rule.counter = true;
                rest = tail;
            }
            Expr::Verdict(verdict) if rule.verdict.is_none() => {
                rule.verdict = Some(*verdict);
                rest = tail;
            }
            _ => match raise_match(rest) {
                // A condition behind what a rule does would be lost in our order: foreign.
                Some((condition, used)) if rule.log.is_none() && !rule.counter && rule.verdict.is_none() => {
                    rule.matches.push(condition);
                    rest = rest.get(used..).unwrap_or_default();
                }
                _ => {
                    rule.matches.push(Match::Foreign(describe(first)));
                    rest = tail;
                }
            },
        }
    }
    rule
}

fn describe(expression: &Expr) -> String {
    match expression {
        Expr::Foreign(name) => name.clone(),
        other => format!("{other:?}"),
    }
}

/// The condition at the start, and how many expressions it takes. Each candidate is lowered again
/// and compared, so that nothing is taken for a condition that it is not exactly.
fn raise_match(expressions: &[Expr]) -> Option<(Match, usize)> {
    candidates(expressions).into_iter().find_map(|condition| {
        let lowered = lower_match(&condition);
        expressions
            .starts_with(&lowered)
            .then_some((condition, lowered.len()))
    })
}

fn candidates(expressions: &[Expr]) -> Vec<Match> {
    let value = |i: usize| match expressions.get(i) {
        Some(Expr::Cmp(_, value)) => Some(value.as_slice()),
        _ => None,
    };
    let byte = |i: usize| value(i).and_then(|v| v.first().copied());
    let port = |i: usize| {
        value(i)
            .and_then(|v| <[u8; 2]>::try_from(v).ok())
            .map(u16::from_be_bytes)
    };
    let ports = |i: usize| {
        let from = port(i)?;
        PortRange::new(from, port(i + 1).unwrap_or(from)).ok()
    };
    let set = || match expressions.get(1) {
        Some(Expr::Lookup(name)) => Some(name.clone()),
        _ => None,
    };
    let mut found: Vec<Option<Match>> = Vec::new();
    match expressions.first() {
        Some(Expr::Meta(MetaKey::Iifname)) => {
            found.push(value(1).and_then(interface_of).map(Match::Interface));
            found.push(set().map(Match::InterfaceIn));
        }
        Some(Expr::Meta(MetaKey::Nfproto)) => found.extend(Family::BOTH.map(|f| Some(Match::Family(f)))),
        Some(Expr::Meta(MetaKey::L4Proto)) => {
            // The longer one first: it starts as the shorter one does.
            found.push(Some(Match::NotFirstSegment));
            found.push(byte(1).map(Match::Protocol));
        }
        Some(Expr::CtState) => {
            found.extend([Conntrack::Related, Conntrack::Invalid].map(|s| Some(Match::Conntrack(s))));
        }
        Some(Expr::RouteInterface) => found.push(set().map(Match::RoutedTo)),
        Some(Expr::CtDirection) => found.push(Some(Match::Conntrack(Conntrack::Reply))),
        Some(Expr::Limit { rate, burst }) => found.push(Some(Match::Limit {
            rate: *rate,
            burst: *burst,
        })),
        Some(Expr::Payload { .. }) => {
            for family in Family::BOTH {
                found.push(set().map(|name| Match::SourceIn(family, name)));
            }
            let net = network(expressions);
            found.extend([net.map(Match::Source), net.map(Match::Destination)]);
            found.extend([
                ports(1).map(Match::SourcePort),
                ports(1).map(Match::DestinationPort),
            ]);
            let types = byte(1).map(|first| first..=byte(2).unwrap_or(first));
            // A range of one is written as one comparison, whatever comes behind it.
            found.push(types.map(Match::IcmpType));
            found.push(byte(1).map(|only| Match::IcmpType(only..=only)));
            found.push(port(1).and_then(PortRange::single).map(Match::SourcePort));
            found.push(port(1).and_then(PortRange::single).map(Match::DestinationPort));
            found.push(byte(1).map(Match::HopLimit));
        }
        _ => {}
    }
    found.into_iter().flatten().collect()
}

/// The network of an address comparison, with or without a mask before it.
fn network(expressions: &[Expr]) -> Option<IpNet> {
    match (expressions.get(1)?, expressions.get(2)) {
        (Expr::Cmp(Operator::Equal, value), _) => address_of(value).map(IpNet::from),
        (Expr::Mask(mask), Some(Expr::Cmp(Operator::Equal, value))) => {
            IpNet::with_netmask(address_of(value)?, address_of(mask)?).ok()
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::ruleset::{Log, Verdict};
    use proptest::prelude::*;

    fn any_net() -> impl Strategy<Value = IpNet> {
        prop_oneof![
            (any::<u32>(), 1u8..=32)
                .prop_map(|(a, l)| IpNet::new(Ipv4Addr::from_bits(a).into(), l).unwrap().trunc()),
            (any::<u128>(), 1u8..=128)
                .prop_map(|(a, l)| IpNet::new(Ipv6Addr::from_bits(a).into(), l).unwrap().trunc()),
        ]
    }

    fn any_ports() -> impl Strategy<Value = PortRange> {
        (1u16.., 0u16..3).prop_map(|(from, span)| PortRange::new(from, from.saturating_add(span)).unwrap())
    }

    fn any_match() -> impl Strategy<Value = Match> {
        let family = || prop_oneof![Just(Family::Ipv4), Just(Family::Ipv6)];
        prop_oneof![
            "[a-z0-9.-]{1,15}".prop_map(Match::Interface),
            "[a-z0-9]{1,20}".prop_map(Match::InterfaceIn),
            family().prop_map(Match::Family),
            any::<u8>().prop_map(Match::Protocol),
            Just(Match::Conntrack(Conntrack::Reply)),
            Just(Match::Conntrack(Conntrack::Related)),
            Just(Match::NotFirstSegment),
            any::<(u32, u32)>().prop_map(|(rate, burst)| Match::Limit { rate, burst }),
            Just(Match::Conntrack(Conntrack::Invalid)),
            any_net().prop_map(Match::Source),
            any_net().prop_map(Match::Destination),
            "[a-z0-9]{1,20}".prop_map(Match::RoutedTo),
            (family(), "[a-z0-9.]{1,20}").prop_map(|(f, s)| Match::SourceIn(f, s)),
            any_ports().prop_map(Match::SourcePort),
            any_ports().prop_map(Match::DestinationPort),
            (any::<u8>(), 0u8..3).prop_map(|(a, n)| Match::IcmpType(a..=a.saturating_add(n))),
            any::<u8>().prop_map(Match::HopLimit),
        ]
    }

    fn any_verdict() -> impl Strategy<Value = Verdict> {
        prop_oneof![Just(Verdict::Accept), Just(Verdict::Drop), Just(Verdict::Reject)]
    }

    proptest! {
        #[test]
        fn what_is_lowered_is_raised_again(
            matches in proptest::collection::vec(any_match(), 0..6),
            log in proptest::option::of(any::<(u16, u32)>().prop_map(|(group, bytes)| Log { group, bytes })),
            counter: bool,
            verdict in proptest::option::of(any_verdict()),
        ) {
            let rule = Rule { comment: "c".into(), matches, log, counter, verdict };
            prop_assert_eq!(raise("c".into(), &lower(&rule)), rule);
        }

        #[test]
        fn what_is_encoded_is_decoded_again(matches in proptest::collection::vec(any_match(), 0..6), verdict in any_verdict()) {
            let rule = Rule { comment: "c".into(), matches, log: Some(Log { group: 7, bytes: 128 }), counter: true, verdict: Some(verdict) };
            for expression in lower(&rule) {
                prop_assert_eq!(Expr::decode(&expression.encode()), expression);
            }
        }
    }

    #[test]
    fn a_changed_expression_is_never_taken_for_ours() {
        let rule = Rule {
            comment: "c".into(),
            matches: vec![
                Match::Protocol(6),
                Match::DestinationPort(PortRange::single(22).unwrap()),
            ],
            log: None,
            counter: false,
            verdict: Some(Verdict::Accept),
        };
        let mut expressions = lower(&rule);
        expressions[3] = Expr::Cmp(Operator::NotEqual, 22u16.to_be_bytes().to_vec());
        let raised = raise("c".into(), &expressions);
        assert_ne!(raised, rule);
        assert!(raised.matches.iter().any(|m| matches!(m, Match::Foreign(_))));
    }
}

//! A packet against a ruleset: what happens to it, which rule decides, and where that rule comes from.
//!
//! Works on any ruleset of our form, so it can be asked about a plan and about what the kernel was
//! read to hold.
//! May not live here: reading the kernel, sending packets.

use std::net::IpAddr;

use portcullis_protocol::Spec;
use portcullis_protocol::requirement::Requirement;
use serde::Serialize;

use super::ruleset::{Conntrack, Elements, Family, Match, PREROUTING, Rule, Ruleset, Verdict};

const TCP: u8 = 6;
/// The flag that a connection starts with, alone among these.
pub const TCP_SYN: u8 = 0x02;
/// FIN, SYN, RST and ACK.
const TCP_FLOW_FLAGS: u8 = 0x17;

/// The first packet of a flow, as it comes in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    /// The interface that it comes in by.
    pub interface: String,
    /// Its source.
    pub source: IpAddr,
    /// Its destination; none: an address of this host that is not loopback.
    pub destination: Option<IpAddr>,
    /// The interface that the destination is routed to; none: it is an address of this host.
    pub outgoing: Option<String>,
    /// IP protocol number.
    pub protocol: u8,
    /// Source port, if that matters.
    pub source_port: Option<u16>,
    /// Destination port, as the sender dials it.
    pub port: Option<u16>,
    /// TCP flags (RFC 9293 section 3.1).
    pub tcp_flags: u8,
    /// ICMP or ICMPv6 type.
    pub icmp_type: Option<u8>,
    /// IPv6 hop limit.
    pub hop_limit: u8,
    /// What conntrack says of it; none: the good start of a new flow.
    pub conntrack: Option<Conntrack>,
}

/// What happens to a packet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Explanation {
    /// Let in or dropped; none when a rule that somebody else put there can't be judged.
    pub verdict: Option<Verdict>,
    /// The rule that decides, as nft(8) would read it; none: the chain's policy.
    pub rule: Option<String>,
    /// Where the rule comes from.
    pub origin: String,
    /// The requirement that it answers for.
    pub requirement: Requirement,
}

/// Follows a packet through the chains at prerouting. `spec` only names origins.
pub fn explain(ruleset: &Ruleset, packet: &Packet, spec: Option<&Spec>) -> Explanation {
    let mut bases: Vec<_> = ruleset
        .chains
        .iter()
        .filter(|_| !ruleset.dormant)
        .filter_map(|chain| Some((chain.hook.as_ref()?, chain)))
        .filter(|(hook, _)| hook.number == PREROUTING)
        .collect();
    bases.sort_by_key(|(hook, _)| hook.priority);
    let mut last = None;
    for (hook, chain) in bases {
        let decided = chain
            .rules
            .iter()
            .find_map(|rule| match (fits(ruleset, rule, packet), rule.verdict) {
                (Fit::No, _) | (Fit::Yes, None) => None,
                (Fit::Yes, verdict) => Some((verdict, rule)),
                (Fit::Unknown, _) => Some((None, rule)),
            });
        let explanation = match decided {
            Some((verdict, rule)) => by_rule(verdict, rule, spec),
            None => by_policy(hook.policy),
        };
        let goes_on = explanation.verdict == Some(Verdict::Accept);
        last = Some(explanation);
        // A drop ends it; an accept is only this chain's.
        if !goes_on {
            break;
        }
    }
    last.unwrap_or_else(|| Explanation {
        verdict: Some(Verdict::Accept),
        rule: None,
        origin: "there is no gate".to_owned(),
        requirement: Requirement::BrevNet1,
    })
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fit {
    Yes,
    No,
    /// A condition of somebody else, on which it depends.
    Unknown,
}

fn fits(ruleset: &Ruleset, rule: &Rule, packet: &Packet) -> Fit {
    let mut fit = Fit::Yes;
    for condition in &rule.matches {
        match condition {
            Match::Foreign(_) => fit = Fit::Unknown,
            ours if !holds(ruleset, ours, packet) => return Fit::No,
            _ => {}
        }
    }
    fit
}

fn holds(ruleset: &Ruleset, condition: &Match, packet: &Packet) -> bool {
    match condition {
        Match::Interface(name) => packet.interface == *name,
        Match::InterfaceIn(set) => names(elements(ruleset, set), &packet.interface),
        Match::RoutedTo(set) => packet
            .outgoing
            .as_ref()
            .is_some_and(|name| names(elements(ruleset, set), name)),
        Match::Family(family) => Family::of(packet.source) == *family,
        Match::Protocol(number) => packet.protocol == *number,
        Match::Conntrack(state) => packet.conntrack == Some(*state),
        Match::Source(net) => net.contains(&packet.source),
        Match::SourceIn(family, set) => {
            Family::of(packet.source) == *family && is_in(elements(ruleset, set), packet.source)
        }
        Match::Destination(net) => packet.destination.is_some_and(|to| net.contains(&to)),
        Match::SourcePort(ports) => packet.source_port.is_some_and(|port| ports.contains(port)),
        Match::DestinationPort(ports) => packet.port.is_some_and(|port| ports.contains(port)),
        Match::IcmpType(types) => packet.icmp_type.is_some_and(|kind| types.contains(&kind)),
        Match::HopLimit(limit) => packet.hop_limit == *limit,
        Match::NotFirstSegment => packet.protocol == TCP && packet.tcp_flags & TCP_FLOW_FLAGS != TCP_SYN,
        // Only where packets are sampled, which decides nothing.
        Match::Limit { .. } => true,
        Match::Foreign(_) => false,
    }
}

fn elements<'a>(ruleset: &'a Ruleset, set: &str) -> Option<&'a Elements> {
    ruleset.set(set).map(|set| &set.elements)
}

fn names(elements: Option<&Elements>, interface: &str) -> bool {
    matches!(elements, Some(Elements::Interfaces(names) | Elements::Outgoing(names)) if names.contains(interface))
}

fn is_in(elements: Option<&Elements>, address: IpAddr) -> bool {
    match elements {
        Some(Elements::Addresses(_, addresses)) => addresses.contains(address),
        Some(Elements::Ranges(_, ranges)) => ranges
            .iter()
            .any(|(first, last)| (*first..=*last).contains(&address)),
        _ => false,
    }
}

fn by_policy(policy: Verdict) -> Explanation {
    Explanation {
        verdict: Some(policy),
        rule: None,
        origin: "no rule lets it in: the policy of the gate".to_owned(),
        requirement: Requirement::BrevNet1,
    }
}

/// Comments say which part of the policy made a rule.
fn by_rule(verdict: Option<Verdict>, rule: &Rule, spec: Option<&Spec>) -> Explanation {
    let generation = spec.map_or_else(String::new, |spec| format!(" of generation {}", spec.generation));
    let (origin, requirement) = match rule.comment.split_once(' ') {
        Some(("rule", id)) => (format!("ingress rule {id}{generation}"), Requirement::BrevNet2),
        Some(("peers", _)) => (format!("the cluster's peers{generation}"), Requirement::BrevClu1),
        Some(("control", _)) => (
            format!("control_plane.sources{generation}"),
            Requirement::BrevNet2,
        ),
        Some(("kept", _)) => (
            "a session that is older than the gate".to_owned(),
            Requirement::BrevSsh4,
        ),
        Some(("metadata", _)) => (
            "the metadata lock (firewall.metadata_lock)".to_owned(),
            Requirement::BrevNet3,
        ),
        Some(("denied", "container")) => (
            "rules let in to this host, not to its containers' own addresses".to_owned(),
            Requirement::BrevNet1,
        ),
        Some(("denied", what)) if what.starts_with("spoofed") || matches!(what, "invalid" | "redirect") => {
            (format!("nobody may send this: {what}"), Requirement::BrevNet1)
        }
        Some(("denied", _)) => ("no rule lets it in".to_owned(), Requirement::BrevNet1),
        Some(("base", what)) => (format!("what every host needs: {what}"), Requirement::BrevNet1),
        _ => ("somebody else than portcullis".to_owned(), Requirement::BrevNet2),
    };
    Explanation {
        verdict,
        rule: Some(rule.to_string()),
        origin,
        requirement,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::firewall::{Inputs, ruleset};

    const SPEC: &str = r#"{"version":1,"generation":7,"instance":{"id":"i"},
        "cluster":{"id":"c","peers":[{"instance":"p","addresses":["10.0.0.3","fd00::3"]}]},
        "control_plane":{"sources":["192.0.2.0/24"]},
        "firewall":{"ingress":[
          {"id":"ssh","protocol":"tcp","from_port":22},
          {"id":"web","from_port":80,"to_port":90,"ip_ranges":["10.0.0.0/8","172.16.0.0/12"]},
          {"id":"ping","protocol":"icmp"}]}}"#;

    fn tcp(from: &str, port: u16) -> Packet {
        Packet {
            interface: "eth0".into(),
            source: from.parse().unwrap(),
            destination: None,
            outgoing: None,
            protocol: 6,
            source_port: None,
            port: Some(port),
            tcp_flags: TCP_SYN,
            icmp_type: None,
            hop_limit: 64,
            conntrack: None,
        }
    }

    fn asked(packet: &Packet) -> Explanation {
        let spec = Spec::from_json(SPEC.as_bytes()).unwrap();
        let internal = ["docker0".to_owned()].into();
        let rules = ruleset(Inputs {
            spec: Some(&spec),
            internal: &internal,
            metadata_lock: true,
            ..Inputs::default()
        });
        explain(&rules, packet, Some(&spec))
    }

    #[test]
    fn each_origin_is_named() {
        for (packet, verdict, origin) in [
            (
                tcp("203.0.113.1", 22),
                Verdict::Accept,
                "ingress rule ssh of generation 7",
            ),
            (
                tcp("2001:db8::1", 22),
                Verdict::Accept,
                "ingress rule ssh of generation 7",
            ),
            (
                tcp("10.200.0.1", 85),
                Verdict::Accept,
                "ingress rule web of generation 7",
            ),
            (tcp("203.0.113.1", 85), Verdict::Drop, "no rule lets it in"),
            (
                tcp("10.0.0.3", 4711),
                Verdict::Accept,
                "the cluster's peers of generation 7",
            ),
            (
                tcp("fd00::3", 4711),
                Verdict::Accept,
                "the cluster's peers of generation 7",
            ),
            (
                tcp("192.0.2.9", 7443),
                Verdict::Accept,
                "control_plane.sources of generation 7",
            ),
            (tcp("192.0.3.9", 7443), Verdict::Drop, "no rule lets it in"),
            (
                tcp("127.0.0.1", 22),
                Verdict::Drop,
                "nobody may send this: spoofed source v4",
            ),
            (
                Packet {
                    interface: "docker0".into(),
                    ..tcp("172.17.0.2", 9)
                },
                Verdict::Accept,
                "what every host needs: internal",
            ),
            (
                Packet {
                    interface: "docker0".into(),
                    destination: Some("169.254.169.254".parse().unwrap()),
                    ..tcp("172.17.0.2", 80)
                },
                Verdict::Reject,
                "the metadata lock",
            ),
            (
                Packet {
                    interface: "docker0".into(),
                    destination: Some("169.254.169.254".parse().unwrap()),
                    ..tcp("172.17.0.2", 53)
                },
                Verdict::Accept,
                "what every host needs: internal",
            ),
            (
                Packet {
                    destination: Some("172.17.0.2".parse().unwrap()),
                    outgoing: Some("docker0".into()),
                    ..tcp("203.0.113.1", 22)
                },
                Verdict::Drop,
                "not to its containers",
            ),
            (
                Packet {
                    protocol: 17,
                    port: Some(85),
                    ..tcp("10.0.0.9", 85)
                },
                Verdict::Accept,
                "ingress rule web",
            ),
            (
                Packet {
                    protocol: 1,
                    port: None,
                    icmp_type: Some(8),
                    ..tcp("203.0.113.1", 1)
                },
                Verdict::Accept,
                "ingress rule ping",
            ),
            (
                Packet {
                    protocol: 1,
                    port: None,
                    icmp_type: Some(13),
                    ..tcp("203.0.113.1", 1)
                },
                Verdict::Drop,
                "no rule",
            ),
            (
                Packet {
                    conntrack: Some(Conntrack::Reply),
                    ..tcp("203.0.113.1", 999)
                },
                Verdict::Accept,
                "reply",
            ),
            (
                Packet {
                    conntrack: Some(Conntrack::Invalid),
                    ..tcp("203.0.113.1", 22)
                },
                Verdict::Drop,
                "invalid",
            ),
        ] {
            let explanation = asked(&packet);
            assert_eq!(explanation.verdict, Some(verdict), "{packet:?} {explanation:?}");
            assert!(explanation.origin.contains(origin), "{packet:?} {explanation:?}");
        }
    }

    #[test]
    fn a_rule_of_somebody_else_is_not_judged() {
        let mut rules = ruleset(Inputs::default());
        let foreign = Rule {
            comment: String::new(),
            matches: vec![Match::Foreign("xfrm".into())],
            log: None,
            counter: false,
            verdict: Some(Verdict::Accept),
        };
        rules.chains[0].rules.insert(0, foreign);
        let explanation = explain(&rules, &tcp("203.0.113.1", 22), None);
        assert_eq!(explanation.verdict, None);
        assert!(explanation.origin.contains("somebody else"));
    }

    #[test]
    fn without_a_gate_everything_comes_in() {
        let explanation = explain(&Ruleset::default(), &tcp("203.0.113.1", 22), None);
        assert_eq!(explanation.verdict, Some(Verdict::Accept));
        assert_eq!(explanation.origin, "there is no gate");
    }
}

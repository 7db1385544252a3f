//! Packets that stand for what the gate lets in: the first and the last of each range.
//!
//! May not live here: what happens to them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use portcullis_protocol::PortRange;

use super::walk::Arrival;
use super::{Hit, Uplink};
use crate::policy::explain::Packet;
use crate::policy::firewall::GATE;
use crate::policy::ruleset::{Elements, Family, Match, Rule, Ruleset, Verdict};

const ICMP: u8 = 1;
const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMPV6: u8 = 58;
/// TCP's SYN (RFC 9293 section 3.1).
pub const SYN: u8 = 0x02;

/// Anybody: ordinary addresses of the internet, for private and documentation ones are often dropped
/// as bogons.
pub const ANYBODY: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(45, 0, 0, 1)),
    IpAddr::V6(Ipv6Addr::new(0x2a00, 0, 0, 0, 0, 0, 0, 1)),
];

/// What is tried.
pub struct TriedAll {
    pub packets: Vec<Tried>,
    /// How many rules of the gate let something in, by the spec.
    pub rules: usize,
}

/// A packet, and the rule that lets it in.
pub struct Tried {
    rule: String,
    opens: Option<(u8, PortRange)>,
    pub arrival: Arrival,
}

impl Tried {
    pub fn hit(&self) -> Hit {
        let packet = &self.arrival.packet;
        let what = match (packet.protocol, packet.port) {
            (TCP, Some(port)) => format!("tcp port {port}"),
            (UDP, Some(port)) => format!("udp port {port}"),
            (ICMP | ICMPV6, _) => "echo request".to_owned(),
            (number, _) => format!("protocol {number}"),
        };
        let to = packet
            .destination
            .map_or_else(String::new, |to| format!(" to {to}"));
        Hit {
            rule: self.rule.clone(),
            packet: format!("{what} from {}{to} by {}", packet.source, packet.interface),
            opens: self.opens,
        }
    }
}

/// Packets for each rule of the gate that lets in what the spec names, by each uplink on which this
/// host has an address of the family.
pub fn tried(gate: &Ruleset, uplinks: &[Uplink]) -> TriedAll {
    let accepting = |rule: &&Rule| {
        // What every host needs is not the spec's.
        let of_the_spec = ["rule ", "peers ", "control plane"];
        rule.verdict == Some(Verdict::Accept) && of_the_spec.iter().any(|kind| rule.comment.starts_with(kind))
    };
    let rules = gate
        .chain(GATE)
        .into_iter()
        .flat_map(|chain| &chain.rules)
        .filter(accepting);
    let mut all = TriedAll {
        packets: Vec::new(),
        rules: 0,
    };
    for rule in rules {
        let class = Class::of(gate, rule);
        // The sets of peers are there also without peers.
        all.rules += usize::from(!class.sources.is_empty());
        for uplink in uplinks {
            all.packets.extend(class.packets(rule, uplink));
        }
    }
    all
}

/// What a rule lets in.
struct Class {
    sources: Vec<IpAddr>,
    /// Protocol, and ports or ICMP type.
    kinds: Vec<(u8, Option<PortRange>, Option<u8>)>,
}

impl Class {
    fn of(gate: &Ruleset, rule: &Rule) -> Self {
        let (mut families, mut sources) = (Family::BOTH.to_vec(), None);
        let (mut protocol, mut ports, mut icmp_type) = (None, None, None);
        for condition in &rule.matches {
            match condition {
                Match::Family(family) => families = vec![*family],
                Match::Source(net) => sources = Some(ends_of(*net)),
                Match::SourceIn(_, set) => {
                    sources = Some(gate.set(set).map(|set| ends(&set.elements)).unwrap_or_default());
                }
                Match::Protocol(number) => protocol = Some(*number),
                Match::DestinationPort(range) => ports = Some(*range),
                Match::IcmpType(types) => icmp_type = Some(*types.start()),
                _ => {}
            }
        }
        let anybody = || {
            let of_family = |address: &IpAddr| families.contains(&Family::of(*address));
            ANYBODY.into_iter().filter(of_family).collect()
        };
        let kinds = match protocol {
            Some(number) => vec![(number, ports, icmp_type)],
            // Everything: peers.
            None => {
                let all = PortRange::new(1, u16::MAX).ok();
                vec![(TCP, all, None), (UDP, all, None)]
            }
        };
        Self {
            sources: sources.unwrap_or_else(anybody),
            kinds,
        }
    }

    fn packets(&self, rule: &Rule, uplink: &Uplink) -> Vec<Tried> {
        let mut packets = Vec::new();
        for source in &self.sources {
            let family = Family::of(*source);
            let here = uplink
                .addresses
                .iter()
                .find(|address| Family::of(**address) == family);
            let Some(destination) = here else { continue };
            for (protocol, range, icmp_type) in &self.kinds {
                let mut ports: Vec<Option<u16>> = match range {
                    Some(range) => vec![Some(range.from()), Some(range.to())],
                    None => vec![None],
                };
                ports.dedup();
                packets.extend(ports.into_iter().map(|port| Tried {
                    rule: rule.comment.clone(),
                    opens: range.map(|range| (*protocol, range)),
                    arrival: Arrival {
                        packet: Packet {
                            interface: uplink.name.clone(),
                            source: *source,
                            destination: Some(*destination),
                            outgoing: None,
                            protocol: *protocol,
                            source_port: None,
                            port,
                            tcp_flags: SYN,
                            icmp_type: *icmp_type,
                            hop_limit: 64,
                            conntrack: None,
                        },
                        interface_index: uplink.index,
                    },
                }));
            }
        }
        packets
    }
}

fn both(first: IpAddr, last: IpAddr) -> Vec<IpAddr> {
    let mut ends = vec![first, last];
    ends.dedup();
    ends
}

fn ends_of(net: IpNet) -> Vec<IpAddr> {
    both(net.network(), net.broadcast())
}

fn ends(elements: &Elements) -> Vec<IpAddr> {
    let ends = match elements {
        Elements::Addresses(_, addresses) => addresses.ends(),
        Elements::Ranges(_, ranges) => {
            let (first, last) = (ranges.first(), ranges.last());
            first.zip(last).map(|((first, _), (_, last))| (*first, *last))
        }
        Elements::Interfaces(_) | Elements::Outgoing(_) => None,
    };
    ends.map(|(first, last)| both(first, last)).unwrap_or_default()
}

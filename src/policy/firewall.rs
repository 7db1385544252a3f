//! From the spec and the links to the ruleset: who gets in, and why.
//!
//! Everything is decided in one chain at prerouting, before destination NAT, on the port that the
//! outside dials: it covers the host, published container ports and direct routes to containers with
//! the same rules (docs/firewall.md).
//! May not live here: netlink, reading links.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use portcullis_protocol::{FirewallRule, PortRange, Protocol, SourceRange, Spec};

use super::metadata;
use super::ruleset::{
    Addresses, Chain, Conntrack, Elements, Family, Hook, Log, Match, PREROUTING, PRIORITY_MANGLE, Rule,
    Ruleset, Set, Verdict,
};

/// The chain that decides.
pub const GATE: &str = "gate";
/// The set of interfaces that are not filtered.
pub const INTERNAL: &str = "internal";
/// The same interfaces, as those that packets are routed to.
const CONTAINERS: &str = "internal.routed";

const ICMP: u8 = 1;
const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMPV6: u8 = 58;

/// Name of the set of peers' addresses of a family.
pub fn peer_set(family: Family) -> String {
    format!("peers{}", family.digit())
}

/// Name of the set of a family's addresses whose sessions are older than the gate.
fn kept_set(family: Family) -> String {
    format!("kept{}", family.digit())
}

/// The sample of denied packets that is told in the journal: enough of each for the addresses, the
/// protocol and the ports behind IPv6 extension headers.
pub const SAMPLE: Log = Log {
    group: 7443,
    bytes: 128,
};
/// Packets a second in that sample, and how many more at once.
const SAMPLE_RATE: u32 = 10;
const SAMPLE_BURST: u32 = 20;

/// What the ruleset is made from.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a> {
    /// The accepted spec; none before the first: then nothing is let in.
    pub spec: Option<&'a Spec>,
    /// Interfaces that are not filtered ([`super::links::internal`]).
    pub internal: &'a BTreeSet<String>,
    /// The port of the HTTPS endpoint, for the control plane.
    pub health_port: u16,
    /// Whether containers are kept from the provider's metadata services.
    pub metadata_lock: bool,
    /// Hosts with TCP sessions that are older than the gate, which goes on letting them in.
    pub kept: &'a BTreeSet<IpAddr>,
    /// Whether a sample of what is denied is copied to who listens; some kernels can't.
    pub sample: bool,
}

/// Comment of the rule that copies a sample of what is denied.
pub const SAMPLE_RULE: &str = "denied sample";

/// The hosts whose older sessions a held table keeps.
pub fn kept_by(held: &Ruleset) -> BTreeSet<IpAddr> {
    let sets = Family::BOTH.map(|family| held.set(&kept_set(family)));
    let addresses = sets.into_iter().flatten().filter_map(|set| match &set.elements {
        Elements::Addresses(_, addresses) => Some(addresses.iter()),
        _ => None,
    });
    addresses.flatten().collect()
}

/// No spec, no internal interface: the baseline.
impl Default for Inputs<'_> {
    fn default() -> Self {
        static NO_NAMES: BTreeSet<String> = BTreeSet::new();
        static NO_ADDRESSES: BTreeSet<IpAddr> = BTreeSet::new();
        Self {
            spec: None,
            internal: &NO_NAMES,
            health_port: 7443,
            metadata_lock: false,
            kept: &NO_ADDRESSES,
            sample: true,
        }
    }
}

/// The ruleset that enforces the spec: default deny (BREV-NET-1), what a host always needs, the
/// cluster's peers (BREV-CLU-1), the control plane's sources, and the explicit rules (BREV-NET-2).
pub fn ruleset(inputs: Inputs<'_>) -> Ruleset {
    let mut builder = Builder::default();
    builder.set(INTERNAL.to_owned(), Elements::Interfaces(inputs.internal.clone()));
    builder.this_host(inputs);
    builder.known_flows(inputs.kept);
    builder.peers(inputs.spec);
    builder.icmp_errors();
    builder.neighbour_discovery();
    builder.dhcp();
    builder.counted(
        "denied invalid",
        vec![Match::Conntrack(Conntrack::Invalid)],
        Some(Verdict::Drop),
    );
    if let Some(spec) = inputs.spec {
        builder.containers(inputs.internal);
        builder.control_plane(spec, inputs.health_port);
        for rule in &spec.firewall.ingress {
            builder.ingress(rule);
        }
    }
    builder.finish(inputs.sample)
}

#[derive(Default)]
struct Builder {
    sets: Vec<Set>,
    rules: Vec<Rule>,
}

impl Builder {
    fn set(&mut self, name: String, elements: Elements) {
        self.sets.push(Set { name, elements });
    }

    fn rule(&mut self, comment: &str, matches: Vec<Match>, verdict: Verdict) {
        self.rules.push(Rule {
            comment: comment.to_owned(),
            matches,
            log: None,
            counter: false,
            verdict: Some(verdict),
        });
    }

    fn counted(&mut self, comment: &str, matches: Vec<Match>, verdict: Option<Verdict>) {
        self.rules.push(Rule {
            comment: comment.to_owned(),
            matches,
            log: None,
            counter: true,
            verdict,
        });
    }

    /// What comes from this host itself, and what only pretends to: that is dropped before anything
    /// from outside is accepted (CVE-2020-8558).
    fn this_host(&mut self, inputs: Inputs<'_>) {
        use Verdict::{Accept, Drop};
        self.rule("base loopback", vec![Match::Interface("lo".to_owned())], Accept);
        // Without containers nothing more than the base is asked of the kernel.
        if inputs.metadata_lock && !inputs.internal.is_empty() {
            self.rules.extend(metadata::rules(INTERNAL));
        }
        self.rule(
            "base internal",
            vec![Match::InterfaceIn(INTERNAL.to_owned())],
            Accept,
        );
        for (name, net) in [("v4", loopback4()), ("v6", loopback6())] {
            let family = Match::Family(Family::of(net.addr()));
            self.counted(
                &format!("denied spoofed source {name}"),
                vec![family.clone(), Match::Source(net)],
                Some(Drop),
            );
            self.counted(
                &format!("denied spoofed target {name}"),
                vec![family, Match::Destination(net)],
                Some(Drop),
            );
        }
        // Conntrack counts one among the flow that it quotes; IPv6's are of no flow, and no rule lets them in.
        let redirect = vec![
            Match::Family(Family::Ipv4),
            Match::Protocol(ICMP),
            Match::IcmpType(5..=5),
        ];
        self.counted("denied redirect", redirect, Some(Drop));
    }

    /// Answers to flows that began here. A flow that came from outside is judged anew with each of its
    /// packets, and so ends with the rule or the peer that let it in: nothing has to be found and
    /// deleted, and conntrack keeps its direction, so that a packet from here can't revive it.
    fn known_flows(&mut self, kept: &BTreeSet<IpAddr>) {
        for (comment, state) in [
            ("base reply", Conntrack::Reply),
            ("base related", Conntrack::Related),
        ] {
            self.rule(comment, vec![Match::Conntrack(state)], Verdict::Accept);
        }
        for family in Family::BOTH {
            let addresses: Addresses = kept
                .iter()
                .copied()
                .filter(|a| Family::of(*a) == family)
                .collect();
            if addresses.is_empty() {
                continue;
            }
            let name = kept_set(family);
            self.set(name.clone(), Elements::Addresses(family, addresses));
            let matches = vec![
                Match::Family(family),
                Match::SourceIn(family, name),
                Match::NotFirstSegment,
            ];
            self.counted(&format!("kept {family}"), matches, Some(Verdict::Accept));
        }
    }

    /// What is left is denied: a sample of it is told, all of it is counted, by protocol.
    fn denied(&mut self, sample: bool) {
        let copied = Rule {
            comment: SAMPLE_RULE.to_owned(),
            matches: vec![Match::Limit {
                rate: SAMPLE_RATE,
                burst: SAMPLE_BURST,
            }],
            log: Some(SAMPLE),
            counter: false,
            verdict: None,
        };
        self.rules.extend(sample.then_some(copied));
        for (name, number) in [("tcp", TCP), ("udp", UDP), ("icmp", ICMP), ("icmpv6", ICMPV6)] {
            let comment = format!("denied {name}");
            self.counted(&comment, vec![Match::Protocol(number)], Some(Verdict::Drop));
        }
        self.counted("denied other", Vec::new(), Some(Verdict::Drop));
    }

    /// Path MTU and unreachable messages, also of flows that conntrack does not know (RFC 4890, RFC 1191).
    fn icmp_errors(&mut self) {
        for (comment, family, protocol, types) in [
            ("base icmp unreachable", Family::Ipv4, ICMP, 3..=3),
            ("base icmp exceeded", Family::Ipv4, ICMP, 11..=12),
            ("base icmpv6 errors", Family::Ipv6, ICMPV6, 1..=4),
        ] {
            let matches = vec![
                Match::Family(family),
                Match::Protocol(protocol),
                Match::IcmpType(types),
            ];
            self.rule(comment, matches, Verdict::Accept);
        }
    }

    /// RFC 4861: hop limit 255 proves that the sender is on the link; routers speak from link-local
    /// addresses. RFC 2710 and 3810: multicast listener queries too, with hop limit 1.
    fn neighbour_discovery(&mut self) {
        let icmpv6 = |rest: Vec<Match>| {
            let mut matches = vec![Match::Family(Family::Ipv6), Match::Protocol(ICMPV6)];
            matches.extend(rest);
            matches
        };
        let link_local = || Match::Source(link_local6());
        self.rule(
            "base neighbour discovery",
            icmpv6(vec![Match::IcmpType(135..=136), Match::HopLimit(255)]),
            Verdict::Accept,
        );
        self.rule(
            "base router advertisement",
            icmpv6(vec![
                link_local(),
                Match::IcmpType(134..=134),
                Match::HopLimit(255),
            ]),
            Verdict::Accept,
        );
        let listener = icmpv6(vec![link_local(), Match::IcmpType(130..=132), Match::HopLimit(1)]);
        self.rule("base multicast listener", listener, Verdict::Accept);
    }

    /// Replies to the host's own DHCP client: a broadcast or a new server is no known flow (RFC 2131, RFC 8415).
    fn dhcp(&mut self) {
        let udp = |family, source: Option<IpNet>, from: u16, to: u16| {
            let mut matches = vec![Match::Family(family)];
            matches.extend(source.map(Match::Source));
            matches.push(Match::Protocol(UDP));
            matches.extend(PortRange::single(from).map(Match::SourcePort));
            matches.extend(PortRange::single(to).map(Match::DestinationPort));
            matches
        };
        self.rule("base dhcp", udp(Family::Ipv4, None, 67, 68), Verdict::Accept);
        self.rule(
            "base dhcpv6",
            udp(Family::Ipv6, Some(link_local6()), 547, 546),
            Verdict::Accept,
        );
    }

    /// One set a family, whatever their number: a packet costs one look-up.
    fn peers(&mut self, spec: Option<&Spec>) {
        for family in Family::BOTH {
            let addresses: Addresses = spec
                .into_iter()
                .flat_map(Spec::peer_addresses)
                .filter(|a| Family::of(*a) == family)
                .collect();
            let name = peer_set(family);
            self.set(name.clone(), Elements::Addresses(family, addresses));
            let matches = vec![Match::Family(family), Match::SourceIn(family, name)];
            self.counted(&format!("peers {family}"), matches, Some(Verdict::Accept));
        }
    }

    /// Rules name ports of this host. Whoever has a route to a container dials the container's own ports,
    /// and a rule for 22 would open all of theirs (moby#22054). What is published still has an address
    /// of this host here.
    fn containers(&mut self, internal: &BTreeSet<String>) {
        if !internal.is_empty() {
            self.set(CONTAINERS.to_owned(), Elements::Outgoing(internal.clone()));
            let matches = vec![Match::RoutedTo(CONTAINERS.to_owned())];
            self.counted("denied container", matches, Some(Verdict::Drop));
        }
    }

    fn control_plane(&mut self, spec: &Spec, port: u16) {
        let sources = spec
            .control_plane
            .iter()
            .flat_map(|c| c.sources.iter().copied())
            .collect::<Vec<_>>();
        if let (false, Some(ports)) = (sources.is_empty(), PortRange::single(port)) {
            self.grant(
                "control plane",
                "control",
                &sources,
                &[protocol(TCP, Some(ports))],
            );
        }
    }

    fn ingress(&mut self, rule: &FirewallRule) {
        let name = format!("rule {}", rule.id);
        let sources = format!("rule.{}.", rule.id);
        match rule.protocol {
            Protocol::Tcp => self.grant(&name, &sources, &rule.sources, &[protocol(TCP, rule.ports)]),
            Protocol::Udp => self.grant(&name, &sources, &rule.sources, &[protocol(UDP, rule.ports)]),
            Protocol::Any => {
                let both = [protocol(TCP, rule.ports), protocol(UDP, rule.ports)];
                self.grant(&name, &sources, &rule.sources, &both);
            }
            Protocol::Number(number) => self.grant(&name, &sources, &rule.sources, &[protocol(number, None)]),
            Protocol::Icmp => self.echo(&name, &sources, &rule.sources),
        }
    }

    /// Echo requests of either family: type 8 and type 128.
    fn echo(&mut self, name: &str, set: &str, sources: &[SourceRange]) {
        for (family, number, kind) in [(Family::Ipv4, ICMP, 8), (Family::Ipv6, ICMPV6, 128)] {
            let Some(source) = self.sources(family, set, sources) else {
                continue;
            };
            let mut matches = vec![Match::Family(family)];
            matches.extend(source);
            matches.extend([Match::Protocol(number), Match::IcmpType(kind..=kind)]);
            self.counted(name, matches, Some(Verdict::Accept));
        }
    }

    /// Lets the sources in, for each of the alternatives. No sources: anybody.
    fn grant(&mut self, name: &str, set: &str, sources: &[SourceRange], alternatives: &[Vec<Match>]) {
        let anybody = sources.is_empty()
            || Family::BOTH
                .iter()
                .all(|family| sources.iter().any(|source| is_everything(source.net(), *family)));
        if anybody {
            for alternative in alternatives {
                self.counted(name, alternative.clone(), Some(Verdict::Accept));
            }
            return;
        }
        for family in Family::BOTH {
            let Some(source) = self.sources(family, set, sources) else {
                continue;
            };
            for alternative in alternatives {
                let mut matches = vec![Match::Family(family)];
                matches.extend(source.clone());
                matches.extend(alternative.clone());
                self.counted(name, matches, Some(Verdict::Accept));
            }
        }
    }

    /// The match for the sources of one family: `None` if there are none in it, an inner `None` if
    /// every address of the family is meant. Several ranges share one set.
    fn sources(&mut self, family: Family, set: &str, sources: &[SourceRange]) -> Option<Option<Match>> {
        if sources.is_empty() {
            return Some(None);
        }
        let nets: Vec<IpNet> = sources
            .iter()
            .map(|s| s.net())
            .filter(|net| Family::of(net.addr()) == family)
            .collect();
        match nets.as_slice() {
            [] => None,
            nets if nets.iter().any(|net| is_everything(*net, family)) => Some(None),
            [net] => Some(Some(Match::Source(*net))),
            _ => {
                let name = format!("{set}{}", family.digit());
                self.set(name.clone(), Elements::ranges(family, nets));
                Some(Some(Match::SourceIn(family, name)))
            }
        }
    }

    fn finish(mut self, sample: bool) -> Ruleset {
        self.denied(sample);
        self.sets.sort_by(|a, b| a.name.cmp(&b.name));
        let hook = Hook {
            number: PREROUTING,
            priority: PRIORITY_MANGLE,
            policy: Verdict::Drop,
        };
        let gate = Chain {
            name: GATE.to_owned(),
            hook: Some(hook),
            rules: self.rules,
        };
        Ruleset {
            dormant: false,
            sets: self.sets,
            chains: vec![gate],
        }
    }
}

fn protocol(number: u8, ports: Option<PortRange>) -> Vec<Match> {
    let mut matches = vec![Match::Protocol(number)];
    matches.extend(ports.map(Match::DestinationPort));
    matches
}

fn is_everything(net: IpNet, family: Family) -> bool {
    net.prefix_len() == 0 && Family::of(net.addr()) == family
}

fn loopback4() -> IpNet {
    Ipv4Net::new_assert(Ipv4Addr::new(127, 0, 0, 0), 8).into()
}

fn loopback6() -> IpNet {
    Ipv6Net::new_assert(Ipv6Addr::LOCALHOST, 128).into()
}

fn link_local6() -> IpNet {
    Ipv6Net::new_assert(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0), 10).into()
}

#[cfg(test)]
mod tests;

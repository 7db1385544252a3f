//! The gate's rules that let in, each asked about with one of its own sources.
//!
//! Whether a rule's sources get in does not depend on the other rules that let in, so each is asked alone:
//! in the gate as it is held, without them. What drops before it stays, and so does what comes from others.
//! May not live here: sockets.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Subnets, Ipv6Subnets};
use portcullis_protocol::PortRange;

use super::Unserved;
use super::socket::Transport;
use super::who::{Grant, Who, is_of_the_spec};
use crate::policy::explain::{Packet, TCP_SYN, explain};
use crate::policy::ruleset::{Chain, Elements, Family, Match, PREROUTING, Rule, Ruleset, Set, Verdict};

/// Anybody: ordinary addresses of the internet.
const ANYBODY: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(45, 0, 0, 1)),
    IpAddr::V6(Ipv6Addr::new(0x2a00, 0, 0, 0, 0, 0, 0, 1)),
];
/// Networks that are nobody's on the internet (RFC 1918, 6598, 3927, 4193, 4291): large ones among them are
/// no crowd.
const OWN: [&str; 7] = [
    "10.0.0.0/8",
    "172.16.0.0/12",
    "192.168.0.0/16",
    "100.64.0.0/10",
    "169.254.0.0/16",
    "fc00::/7",
    "fe80::/10",
];
/// More addresses of the internet than these are anybody: a /8 of IPv4, a /16 of IPv6.
const CROWD: [u128; 2] = [1 << 24, 1 << 112];
/// A rule with more ports than these sweeps in what nobody thought of.
const SWEEPING: u32 = 100;
/// How many of a rule's ranges are named.
const SHOWN: usize = 3;
/// How many of its ranges are tried, both ends of each.
const TRIED: usize = 4;

/// A rule that lets new flows in from outside.
struct Door<'a> {
    /// Its chain's place in the gate, and its own in the chain.
    chain: usize,
    place: usize,
    rule: &'a Rule,
    families: Vec<Family>,
    /// None: anybody.
    sources: Option<Sources>,
    protocol: Option<u8>,
    ports: Option<PortRange>,
    source_port: Option<u16>,
}

/// Sources of one IP version.
struct Sources {
    /// To ask with.
    some: Vec<IpAddr>,
    ranges: Vec<String>,
    count: usize,
    crowd: bool,
}

/// All doors of a gate.
pub struct Doors<'a> {
    gate: &'a Ruleset,
    /// An interface by which the outside comes in.
    outside: &'a str,
    doors: Vec<Door<'a>>,
    /// The places of the rules of each chain that are none.
    others: Vec<Vec<usize>>,
}

impl<'a> Doors<'a> {
    /// Finds them.
    pub fn of(gate: &'a Ruleset, outside: &'a str) -> Self {
        let (mut doors, mut others) = (Vec::new(), Vec::new());
        for (at, chain) in gate.chains.iter().enumerate() {
            let is_asked = chain.hook.as_ref().is_some_and(|hook| hook.number == PREROUTING);
            let mut rest = Vec::new();
            for (place, rule) in chain.rules.iter().enumerate() {
                match Door::of(gate, (at, place), rule).filter(|_| is_asked) {
                    Some(door) => doors.push(door),
                    None => rest.push(place),
                }
            }
            others.push(rest);
        }
        Self {
            gate,
            outside,
            doors,
            others,
        }
    }

    /// Who gets in to each of these ports of this host.
    pub fn ask(&self, ports: &BTreeSet<(Transport, u16)>) -> BTreeMap<(Transport, u16), Vec<Grant>> {
        let mut grants: BTreeMap<(Transport, u16), Vec<Grant>> = BTreeMap::new();
        // Without any door: what comes in then comes in because there is no gate, or may.
        let bare = self.only(None);
        for (transport, port) in ports {
            for family in Family::BOTH {
                let who = match self.verdict(&bare, *transport, *port, anybody(family), None) {
                    Some(Verdict::Accept) => Who::Anybody,
                    None => Who::Unknown,
                    Some(Verdict::Drop | Verdict::Reject) => continue,
                };
                grants.entry((*transport, *port)).or_default().push(Grant {
                    rule: String::new(),
                    who,
                    families: [family].into(),
                    is_sweeping: false,
                    dropped_by: None,
                });
            }
        }
        for door in &self.doors {
            let asked: Vec<_> = ports
                .iter()
                .filter(|(of, port)| door.may_fit(*of, *port))
                .collect();
            if asked.is_empty() {
                continue;
            }
            let only = self.only(Some(door));
            for (transport, port) in asked {
                let grant = self.grant(door, &only, *transport, *port);
                grants.entry((*transport, *port)).or_default().extend(grant);
            }
        }
        grants
    }

    fn grant(&self, door: &Door<'_>, only: &Ruleset, transport: Transport, port: u16) -> Option<Grant> {
        let (mut families, mut unknown) = (BTreeSet::new(), false);
        for source in door.askers() {
            match self.verdict(only, transport, port, source, door.source_port) {
                Some(Verdict::Accept) => {
                    families.insert(Family::of(source));
                }
                None => {
                    families.insert(Family::of(source));
                    unknown = true;
                }
                Some(Verdict::Drop | Verdict::Reject) => {}
            }
        }
        (!families.is_empty()).then(|| Grant {
            rule: door.name(),
            who: if unknown { Who::Unknown } else { door.who() },
            families,
            is_sweeping: door.is_sweeping(),
            dropped_by: None,
        })
    }

    fn verdict(
        &self,
        gate: &Ruleset,
        transport: Transport,
        port: u16,
        source: IpAddr,
        source_port: Option<u16>,
    ) -> Option<Verdict> {
        let packet = Packet {
            interface: self.outside.to_owned(),
            source,
            destination: None,
            outgoing: None,
            protocol: transport.number(),
            source_port,
            port: Some(port),
            tcp_flags: TCP_SYN,
            icmp_type: None,
            hop_limit: 64,
            conntrack: None,
        };
        explain(gate, &packet, None).verdict
    }

    /// The gate without the doors of this one's chain but itself; without any, of all chains. Of its set,
    /// those that it is asked with stand for all: a hundred thousand need not be copied.
    fn only(&self, door: Option<&Door<'_>>) -> Ruleset {
        let chains = self
            .gate
            .chains
            .iter()
            .zip(&self.others)
            .enumerate()
            .map(|(at, (chain, others))| {
                let rule = |place: &usize| chain.rules.get(*place).cloned();
                let rules = match door {
                    Some(door) if door.chain != at => chain.rules.clone(),
                    Some(door) => {
                        let before = others.iter().take_while(|place| **place < door.place);
                        let after = others.iter().skip_while(|place| **place < door.place);
                        before
                            .chain([&door.place])
                            .chain(after)
                            .filter_map(rule)
                            .collect()
                    }
                    None => others.iter().filter_map(rule).collect(),
                };
                Chain {
                    name: chain.name.clone(),
                    hook: chain.hook.clone(),
                    rules,
                }
            });
        let chains: Vec<Chain> = chains.collect();
        let mut sets: Vec<Set> = Vec::new();
        for name in chains.iter().flat_map(|chain| &chain.rules).flat_map(sets_of) {
            if sets.iter().any(|known| known.name == name) {
                continue;
            }
            let stands = door.filter(|door| sets_of(door.rule).any(|of| of == name));
            let few = stands.and_then(|door| Some((door.families.first()?, door.sources.as_ref()?)));
            let set = match (few, self.gate.set(name)) {
                (Some((family, sources)), _) => Set {
                    name: name.to_owned(),
                    elements: Elements::Addresses(*family, sources.some.iter().copied().collect()),
                },
                (None, Some(set)) => set.clone(),
                (None, None) => continue,
            };
            sets.push(set);
        }
        Ruleset {
            dormant: self.gate.dormant,
            sets,
            chains,
        }
    }

    /// What the spec opens and none of these serves.
    pub fn unserved(&self, served: &BTreeSet<(Transport, u16)>) -> Vec<Unserved> {
        let mut all: Vec<Unserved> = Vec::new();
        let mut used = BTreeSet::new();
        for door in &self.doors {
            let (Some(transport), Some(ports)) = (door.protocol.and_then(Transport::of), door.ports) else {
                continue;
            };
            let comment = door.name();
            if !is_of_the_spec(&comment) {
                continue;
            }
            if served
                .iter()
                .any(|(of, port)| *of == transport && ports.contains(*port))
            {
                used.insert(comment.clone());
            }
            let at = all.iter().position(|known| known.rule == comment);
            let at = at.unwrap_or_else(|| {
                all.push(Unserved {
                    rule: comment,
                    ports: Vec::new(),
                    who: Vec::new(),
                });
                all.len() - 1
            });
            let Some(unserved) = all.get_mut(at) else { continue };
            let (ports, who) = (format!("{transport} {ports}"), door.who());
            if !unserved.ports.contains(&ports) {
                unserved.ports.push(ports);
            }
            if !unserved.who.contains(&who) {
                unserved.who.push(who);
            }
        }
        all.retain(|unserved| !used.contains(&unserved.rule));
        all
    }
}

fn sets_of(rule: &Rule) -> impl Iterator<Item = &str> {
    rule.matches.iter().filter_map(|one| match one {
        Match::InterfaceIn(name) | Match::SourceIn(_, name) | Match::RoutedTo(name) => Some(name.as_str()),
        _ => None,
    })
}

fn anybody(family: Family) -> IpAddr {
    let [v4, v6] = ANYBODY;
    match family {
        Family::Ipv4 => v4,
        Family::Ipv6 => v6,
    }
}

impl<'a> Door<'a> {
    /// Of a rule that lets in new flows of TCP or UDP that come by any uplink; of no other.
    fn of(gate: &Ruleset, (chain, place): (usize, usize), rule: &'a Rule) -> Option<Self> {
        if rule.verdict != Some(Verdict::Accept) {
            return None;
        }
        let mut door = Self {
            chain,
            place,
            rule,
            families: Family::BOTH.to_vec(),
            sources: None,
            protocol: None,
            ports: None,
            source_port: None,
        };
        for condition in &rule.matches {
            match condition {
                Match::Family(family) => door.families = vec![*family],
                Match::Source(net) => {
                    door.families = vec![Family::of(net.addr())];
                    door.sources = Some(Sources::of(&[(net.network(), net.broadcast())], 1));
                }
                Match::SourceIn(family, set) => {
                    door.families = vec![*family];
                    door.sources = Some(Sources::of_set(&gate.set(set)?.elements)?);
                }
                Match::Protocol(number) => door.protocol = Some(*number),
                Match::DestinationPort(ports) => door.ports = Some(*ports),
                Match::SourcePort(ports) => door.source_port = Some(ports.from()),
                Match::Limit { .. } => {}
                // Not what a new flow from outside is, or not to be judged here.
                _ => return None,
            }
        }
        let has_sources = door.sources.as_ref().is_none_or(|sources| sources.count > 0);
        let has_ports = door.protocol.is_none_or(|number| Transport::of(number).is_some());
        (has_sources && has_ports).then_some(door)
    }

    /// Saves asking about ports that the rule does not name.
    fn may_fit(&self, transport: Transport, port: u16) -> bool {
        self.protocol.is_none_or(|number| number == transport.number())
            && self.ports.is_none_or(|ports| ports.contains(port))
    }

    fn askers(&self) -> Vec<IpAddr> {
        match &self.sources {
            Some(sources) => sources.some.clone(),
            None => self.families.iter().map(|family| anybody(*family)).collect(),
        }
    }

    fn name(&self) -> String {
        if self.rule.comment.is_empty() {
            return self.rule.to_string();
        }
        self.rule.comment.clone()
    }

    fn who(&self) -> Who {
        let comment = self.rule.comment.as_str();
        let ranges = || self.sources.as_ref().map(|sources| sources.ranges.clone());
        let more = |sources: &Sources| sources.count - sources.ranges.len();
        if let Some(what) = comment.strip_prefix("base ") {
            return Who::Base {
                what: what.to_owned(),
            };
        }
        match &self.sources {
            Some(sources) if comment.starts_with("peers ") => Who::Peers {
                addresses: sources.count,
            },
            Some(sources) if comment == "control plane" => Who::ControlPlane {
                ranges: ranges().unwrap_or_default(),
                more: more(sources),
            },
            Some(sources) => Who::Sources {
                ranges: ranges().unwrap_or_default(),
                more: more(sources),
                crowd: sources.crowd,
            },
            None => Who::Anybody,
        }
    }

    fn is_sweeping(&self) -> bool {
        self.ports
            .is_none_or(|ports| u32::from(ports.to()) - u32::from(ports.from()) >= SWEEPING)
    }
}

impl Sources {
    fn of_set(elements: &Elements) -> Option<Self> {
        match elements {
            Elements::Ranges(_, ranges) => Some(Self::of(ranges, ranges.len())),
            Elements::Addresses(_, addresses) => {
                let some: Vec<_> = addresses.iter().take(SHOWN).map(|one| (one, one)).collect();
                Some(Self::of(&some, addresses.len()))
            }
            Elements::Interfaces(_) | Elements::Outgoing(_) => None,
        }
    }

    fn of(ranges: &[(IpAddr, IpAddr)], count: usize) -> Self {
        let some = ranges
            .iter()
            .take(TRIED)
            .flat_map(|(first, last)| [*first, *last]);
        Self {
            some: some.collect(),
            ranges: ranges.iter().take(SHOWN).map(|range| shown(*range)).collect(),
            count,
            crowd: is_crowd(ranges),
        }
    }
}

/// As a network where it is one.
fn shown((first, last): (IpAddr, IpAddr)) -> String {
    if first == last {
        return first.to_string();
    }
    let nets: Vec<IpNet> = match (first, last) {
        (IpAddr::V4(a), IpAddr::V4(b)) => Ipv4Subnets::new(a, b, 0).take(2).map(IpNet::V4).collect(),
        (IpAddr::V6(a), IpAddr::V6(b)) => Ipv6Subnets::new(a, b, 0).take(2).map(IpNet::V6).collect(),
        _ => Vec::new(),
    };
    match nets.as_slice() {
        [net] => net.to_string(),
        _ => format!("{first}-{last}"),
    }
}

fn is_crowd(ranges: &[(IpAddr, IpAddr)]) -> bool {
    let own: Vec<IpNet> = OWN.iter().filter_map(|net| net.parse().ok()).collect();
    let mut counts = [0u128; 2];
    for (first, last) in ranges {
        if own.iter().any(|net| net.contains(first) && net.contains(last)) {
            continue;
        }
        let ([v4, v6], more) = (&mut counts, |a: u128, b: u128| (b - a).saturating_add(1));
        match (first, last) {
            (IpAddr::V4(a), IpAddr::V4(b)) => *v4 += more(a.to_bits().into(), b.to_bits().into()),
            (IpAddr::V6(a), IpAddr::V6(b)) => *v6 = v6.saturating_add(more(a.to_bits(), b.to_bits())),
            _ => {}
        }
    }
    counts.iter().zip(CROWD).any(|(count, crowd)| *count > crowd)
}

#[cfg(test)]
impl Doors<'_> {
    /// With how many elements the largest set is asked about.
    pub fn largest_asked(&self) -> usize {
        let all = self.doors.iter().flat_map(|door| self.only(Some(door)).sets);
        all.map(|set| set.elements.len()).max().unwrap_or_default()
    }
}

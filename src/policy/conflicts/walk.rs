//! One packet on its way through other programs' base chains: accepted, dropped, or undecided.
//!
//! Three-valued: a condition that can't be judged leaves both ways open, and both are followed.
//! May not live here: which packets are tried (`super`).

use std::ops::RangeInclusive;

use crate::policy::explain::Packet;
use crate::policy::foreign::{Action, Chain, Condition, Field, Rule, Table, TableFamily, ct_state};
use crate::policy::ruleset::{Family, Verdict};

/// Depth of jumps that is followed; the kernel refuses more (`NFT_JUMP_STACK_SIZE`).
const MAX_DEPTH: usize = 16;

/// How the packet comes in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Arrival {
    /// Its first packet of a flow, with a destination.
    pub packet: Packet,
    /// Index of the interface.
    pub interface_index: u32,
}

/// What of a field is known: the bits, and which of them.
#[derive(Clone, Copy)]
struct Known {
    bits: u128,
    known: u128,
}

impl Known {
    fn all(bits: u128) -> Self {
        Self {
            bits,
            known: u128::MAX,
        }
    }

    const NOTHING: Self = Self { bits: 0, known: 0 };
}

impl Arrival {
    fn is_v4(&self) -> bool {
        self.packet.source.is_ipv4()
    }

    fn value(&self, field: &Field) -> Known {
        let packet = &self.packet;
        match field {
            Field::Family => Known::all(if self.is_v4() { 2 } else { 10 }),
            Field::EtherType => Known::all(if self.is_v4() { 0x0800 } else { 0x86dd }),
            Field::Protocol => Known::all(packet.protocol.into()),
            Field::InterfaceName => Known::all(interface_number(&packet.interface)),
            Field::InterfaceIndex | Field::ReversePath => Known::all(self.interface_index.into()),
            // Sent to this host: PACKET_HOST.
            Field::PacketType | Field::CtDirection => Known::all(0),
            Field::CtState => Known::all(ct_state::NEW),
            // Of a new flow that nobody translates: neither IPS_SRC_NAT nor IPS_DST_NAT.
            Field::CtStatus => Known { bits: 0, known: 0x30 },
            // RTN_UNICAST and RTN_LOCAL.
            Field::SourceType => Known::all(1),
            Field::DestinationType => Known::all(2),
            Field::ReversePathExists => Known::all(1),
            Field::Network(offset, bytes) => slice(&self.network(), *offset, *bytes),
            Field::Transport(offset, bytes) => slice(&self.transport(), *offset, *bytes),
            Field::Other(_) => Known::NOTHING,
        }
    }

    /// The IP header: each byte with the bits of it that are known.
    fn network(&self) -> Vec<(u8, u8)> {
        let mut header = vec![(0, 0); if self.is_v4() { 20 } else { 40 }];
        let mut put = |offset: usize, bytes: &[u8]| {
            for (place, byte) in header.iter_mut().skip(offset).zip(bytes) {
                *place = (*byte, 0xff);
            }
        };
        let (protocol, source, destination) = if self.is_v4() { (9, 12, 16) } else { (6, 8, 24) };
        put(protocol, &[self.packet.protocol]);
        put(source, &octets(self.packet.source));
        if let Some(to) = self.packet.destination {
            put(destination, &octets(to));
        }
        if self.is_v4() {
            // No fragment: only DF is not known.
            put(7, &[0]);
            if let Some(place) = header.get_mut(6) {
                *place = (0, 0xbf);
            }
        }
        header
    }

    /// The start of the transport header, likewise.
    fn transport(&self) -> Vec<(u8, u8)> {
        let mut header = vec![(0, 0); 20];
        let mut put = |offset: usize, bytes: &[u8]| {
            for (place, byte) in header.iter_mut().skip(offset).zip(bytes) {
                *place = (*byte, 0xff);
            }
        };
        if let Some(port) = self.packet.source_port {
            put(0, &port.to_be_bytes());
        }
        if let Some(port) = self.packet.port {
            put(2, &port.to_be_bytes());
        }
        if let Some(kind) = self.packet.icmp_type {
            put(0, &[kind, 0]);
        }
        if self.packet.protocol == 6 {
            put(13, &[self.packet.tcp_flags]);
        }
        header
    }
}

fn octets(address: std::net::IpAddr) -> Vec<u8> {
    match address {
        std::net::IpAddr::V4(v4) => v4.octets().to_vec(),
        std::net::IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

/// A name as [`Field::InterfaceName`] holds it.
pub fn interface_number(name: &str) -> u128 {
    let mut bytes = [0; 16];
    for (place, byte) in bytes.iter_mut().zip(name.bytes()) {
        *place = byte;
    }
    u128::from_be_bytes(bytes)
}

fn slice(header: &[(u8, u8)], offset: u32, bytes: u32) -> Known {
    let part = usize::try_from(offset)
        .ok()
        .and_then(|offset| header.get(offset..))
        .filter(|rest| rest.len() >= bytes as usize);
    let Some(part) = part else { return Known::NOTHING };
    let mut value = Known::NOTHING;
    for (bits, known) in part.iter().take(bytes as usize) {
        value.bits = value.bits << 8 | u128::from(*bits);
        value.known = value.known << 8 | u128::from(*known);
    }
    value
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fit {
    Yes,
    No,
    Unknown,
}

impl Condition {
    fn fit(&self, arrival: &Arrival) -> Fit {
        if matches!(self.field, Field::Other(_)) {
            return Fit::Unknown;
        }
        let value = arrival.value(&self.field);
        let inside = match within(value, self.mask, &self.ranges) {
            Some(inside) => inside,
            None => return Fit::Unknown,
        };
        if inside != self.negated { Fit::Yes } else { Fit::No }
    }
}

/// Whether the masked value is in one of the ranges; none if that depends on bits that are not known.
fn within(value: Known, mask: u128, ranges: &[RangeInclusive<u128>]) -> Option<bool> {
    if value.known & mask == mask {
        return Some(ranges.iter().any(|range| range.contains(&(value.bits & mask))));
    }
    let differs = |range: &RangeInclusive<u128>| {
        range.start() == range.end() && (value.bits ^ range.start()) & value.known & mask != 0
    };
    ranges.iter().all(differs).then_some(false)
}

fn fits(rule: &Rule, arrival: &Arrival) -> Fit {
    let mut fit = Fit::Yes;
    for condition in &rule.conditions {
        match condition.fit(arrival) {
            Fit::No => return Fit::No,
            Fit::Unknown => fit = Fit::Unknown,
            Fit::Yes => {}
        }
    }
    fit
}

/// Where a packet ends: a chain, and the rule in it; none: the chain's policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place<'a> {
    /// The chain's name.
    pub chain: &'a str,
    /// The rule.
    pub rule: Option<&'a Rule>,
}

/// What a base chain does with a packet, as far as it can be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome<'a> {
    /// It goes on.
    Passes,
    /// It may go on as another one: to another address or port.
    Translated,
    /// It is dropped.
    Dropped(Place<'a>),
    /// It may be dropped here: that depends on what can't be judged.
    MayBeDropped(Place<'a>),
}

#[derive(Clone, Copy)]
enum End<'a> {
    Accept,
    Translate,
    Drop(Place<'a>),
}

/// What a chain did.
enum Flow<'a> {
    Ended(End<'a>),
    /// At least one way leads back behind the jump.
    Back,
}

/// A walk through one base chain.
pub struct Walk<'a, 'b> {
    table: &'a Table,
    arrival: &'b Arrival,
    /// Rules that may still be looked at.
    budget: &'b mut usize,
    maybe_accepted: bool,
    maybe_translated: bool,
    maybe_dropped: Option<Place<'a>>,
}

impl<'a, 'b> Walk<'a, 'b> {
    /// What a base chain of the table does with the packet. Every rule that is looked at is taken from
    /// the budget; when that is empty, nothing more is known.
    pub fn through(
        table: &'a Table,
        name: &'a str,
        base: &'a Chain,
        arrival: &'b Arrival,
        budget: &'b mut usize,
    ) -> Outcome<'a> {
        let family = Family::of(arrival.packet.source);
        if matches!(
            (table.family, family),
            (TableFamily::Ip, Family::Ipv6) | (TableFamily::Ip6, Family::Ipv4)
        ) {
            return Outcome::Passes;
        }
        let mut walk = Self {
            table,
            arrival,
            budget,
            maybe_accepted: false,
            maybe_translated: false,
            maybe_dropped: None,
        };
        let end = match walk.chain(name, base, 0) {
            Flow::Ended(end) => end,
            Flow::Back => match base.hook.as_ref().map(|hook| hook.policy) {
                Some(Verdict::Drop) => End::Drop(Place {
                    chain: name,
                    rule: None,
                }),
                _ => End::Accept,
            },
        };
        walk.outcome(end)
    }

    fn outcome(&self, end: End<'a>) -> Outcome<'a> {
        match (end, self.maybe_dropped) {
            (End::Drop(place), _) if !self.maybe_accepted && !self.maybe_translated => {
                Outcome::Dropped(place)
            }
            (End::Drop(place), None) => Outcome::MayBeDropped(place),
            (_, Some(place)) => Outcome::MayBeDropped(place),
            (End::Translate, None) => Outcome::Translated,
            (End::Accept, None) if self.maybe_translated => Outcome::Translated,
            (End::Accept, None) => Outcome::Passes,
        }
    }

    /// An end that one of the ways comes to.
    fn maybe(&mut self, end: End<'a>) {
        match end {
            End::Accept => self.maybe_accepted = true,
            End::Translate => self.maybe_translated = true,
            End::Drop(place) => {
                self.maybe_dropped.get_or_insert(place);
            }
        }
    }

    fn chain(&mut self, name: &'a str, chain: &'a Chain, depth: usize) -> Flow<'a> {
        // One of the ways is back behind the jump already.
        let mut may_be_back = false;
        for rule in &chain.rules {
            let Some(left) = self.budget.checked_sub(1) else {
                break;
            };
            *self.budget = left;
            let fit = fits(rule, self.arrival);
            if fit == Fit::No {
                continue;
            }
            let place = Place {
                chain: name,
                rule: Some(rule),
            };
            for (action, fit) in self.actions(&rule.action, fit) {
                match self.act(action, place, depth) {
                    Step::Next => {}
                    Step::Back if fit == Fit::Yes => return Flow::Back,
                    Step::Back => may_be_back = true,
                    Step::Ended(end) if fit == Fit::Yes && !may_be_back => return Flow::Ended(end),
                    Step::Ended(end) => {
                        self.maybe(end);
                        if fit == Fit::Yes {
                            return Flow::Back;
                        }
                    }
                }
            }
        }
        Flow::Back
    }

    /// The action of a rule, or those of a map that may be meant.
    fn actions(&self, action: &'a Action, fit: Fit) -> Vec<(&'a Action, Fit)> {
        let Action::Map(key, entries) = action else {
            return vec![(action, fit)];
        };
        let value = self.arrival.value(&key.field);
        let mut found = Vec::new();
        for (range, action) in entries {
            match within(value, key.mask, std::slice::from_ref(range)) {
                Some(false) => {}
                Some(true) => found.push((action, fit)),
                None => found.push((action, Fit::Unknown)),
            }
        }
        found
    }

    fn undecided(&mut self, place: Place<'a>) -> Step<'a> {
        self.maybe(End::Drop(place));
        self.maybe(End::Accept);
        Step::Next
    }

    fn act(&mut self, action: &'a Action, place: Place<'a>, depth: usize) -> Step<'a> {
        match action {
            Action::Continue | Action::Map(..) => Step::Next,
            Action::End(Verdict::Accept, _) => Step::Ended(End::Accept),
            Action::End(Verdict::Drop | Verdict::Reject, _) => Step::Ended(End::Drop(place)),
            Action::Translate(_) => Step::Ended(End::Translate),
            Action::Return => Step::Back,
            Action::Undecided(_) => self.undecided(place),
            Action::Jump(target) | Action::Goto(target) => {
                let Some((name, chain)) = self.table.chains.get_key_value(target) else {
                    return self.undecided(place);
                };
                if depth >= MAX_DEPTH {
                    return self.undecided(place);
                }
                match self.chain(name, chain, depth + 1) {
                    Flow::Ended(end) => Step::Ended(end),
                    Flow::Back if matches!(action, Action::Goto(_)) => Step::Back,
                    Flow::Back => Step::Next,
                }
            }
        }
    }
}

/// What an action leads to.
enum Step<'a> {
    Next,
    Back,
    Ended(End<'a>),
}

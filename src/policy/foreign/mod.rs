//! Other programs' packet filters as values: tables, chains and rules, as far as they can be judged.
//!
//! One form for nf_tables and for legacy iptables. What can't be judged of a packet stays as text,
//! and is then neither true nor false.
//! May not live here: judging (`conflicts`), netlink, our own table (`ruleset`).

pub mod iptables;
mod text;

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use super::ruleset::{Hook, Verdict};

/// All that was read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Foreign {
    /// The tables through which IP packets pass.
    pub tables: Vec<Table>,
    /// What was seen and could not be looked into, each with the reason and the fix.
    pub unread: Vec<String>,
}

/// Whose packets a table sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum TableFamily {
    /// Both IP versions.
    Inet,
    /// IPv4.
    Ip,
    /// IPv6.
    Ip6,
}

/// A table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    /// Whose packets it sees.
    pub family: TableFamily,
    /// Its name.
    pub name: String,
    /// Whether legacy iptables (`xtables`) holds it, and not nf_tables.
    pub legacy: bool,
    /// Its chains by name.
    pub chains: BTreeMap<String, Chain>,
}

/// A chain.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chain {
    /// Where it is hooked in; none for a chain that is only jumped to.
    pub hook: Option<Hook>,
    /// Whether it is of type `nat`: it sees only the first packet of a flow, and may translate it.
    pub nat: bool,
    /// Its rules, in order.
    pub rules: Vec<Rule>,
}

/// A rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// The kernel's number for it, which `nft delete rule` takes; none in legacy iptables.
    pub handle: Option<u64>,
    /// All must fit.
    pub conditions: Vec<Condition>,
    /// What then happens.
    pub action: Action,
}

/// What a rule does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// The next rule is looked at.
    Continue,
    /// Ends this base chain, or the packet; with the words of the rule, for example `reject`.
    End(Verdict, String),
    /// Goes on in another chain, and comes back.
    Jump(String),
    /// Goes on in another chain, and comes back to where this one would have.
    Goto(String),
    /// Back to the rule behind the jump.
    Return,
    /// Changes where the packet goes: what comes behind sees another address or port.
    Translate(String),
    /// Decided elsewhere, for example `queue`: may be any verdict.
    Undecided(String),
    /// By the value of a field (`vmap`); no entry: the next rule is looked at.
    Map(Condition, Vec<(RangeInclusive<u128>, Action)>),
}

/// One condition: the field, masked, is in one of the ranges; or in none of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Condition {
    /// What is looked at.
    pub field: Field,
    /// Which bits of it.
    pub mask: u128,
    /// Values, big-endian as numbers.
    pub ranges: Vec<RangeInclusive<u128>>,
    /// Whether it must be in none of them.
    pub negated: bool,
}

/// What is looked at of a packet.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Field {
    /// `NFPROTO_*`, one byte.
    Family,
    /// Ethernet protocol number.
    EtherType,
    /// IP protocol number, behind all extension headers.
    Protocol,
    /// Name of the interface that it came in by, padded with zeros to 16 bytes.
    InterfaceName,
    /// Index of that interface.
    InterfaceIndex,
    /// `PACKET_*` (linux/if_packet.h): to whom the frame was sent.
    PacketType,
    /// State bits as nf_tables numbers them (`NF_CT_STATE_*`).
    CtState,
    /// `IPS_*` bits (linux/netfilter/nf_conntrack_common.h).
    CtStatus,
    /// 0 in the direction of the flow's first packet.
    CtDirection,
    /// `RTN_*` of the source (linux/rtnetlink.h), as the routing table has it.
    SourceType,
    /// `RTN_*` of the destination.
    DestinationType,
    /// Index of the interface by which an answer would leave; 0 if there is no route by the one that the packet came in by.
    ReversePath,
    /// Whether there is such a route.
    ReversePathExists,
    /// Bytes of the IP header: offset and length.
    Network(u32, u32),
    /// Bytes of the transport header: offset and length.
    Transport(u32, u32),
    /// Something that can't be known of a packet; the words of the rule.
    Other(String),
}

impl Field {
    /// How many bytes it has: at most 16.
    pub fn bytes(&self) -> u32 {
        match self {
            Self::Family
            | Self::Protocol
            | Self::PacketType
            | Self::CtDirection
            | Self::ReversePathExists => 1,
            Self::EtherType => 2,
            Self::InterfaceIndex
            | Self::CtState
            | Self::CtStatus
            | Self::SourceType
            | Self::DestinationType
            | Self::ReversePath => 4,
            Self::InterfaceName | Self::Other(_) => 16,
            Self::Network(_, bytes) | Self::Transport(_, bytes) => (*bytes).min(16),
        }
    }

    /// All of its bits.
    pub fn mask(&self) -> u128 {
        u128::MAX >> (128 - 8 * self.bytes().clamp(1, 16))
    }

    /// Destination port of a protocol with ports.
    pub const DESTINATION_PORT: Self = Self::Transport(2, 2);
    /// Source port of a protocol with ports.
    pub const SOURCE_PORT: Self = Self::Transport(0, 2);
    /// TCP's flags (RFC 9293 section 3.1).
    pub const TCP_FLAGS: Self = Self::Transport(13, 1);
    /// ICMP's and ICMPv6's type.
    pub const ICMP_TYPE: Self = Self::Transport(0, 1);
}

/// State bits of conntrack as nf_tables numbers them (linux/netfilter/nf_conntrack_common.h).
pub mod ct_state {
    /// Of no flow and no good start of one.
    pub const INVALID: u128 = 1;
    /// Of a known flow.
    pub const ESTABLISHED: u128 = 2;
    /// Belongs to a known flow.
    pub const RELATED: u128 = 4;
    /// The good start of a flow.
    pub const NEW: u128 = 8;
    /// Not tracked, because a rule says so.
    pub const UNTRACKED: u128 = 64;
}

impl Condition {
    /// The whole field is in one of the ranges.
    pub fn within(field: Field, ranges: Vec<RangeInclusive<u128>>) -> Self {
        Self {
            mask: field.mask(),
            field,
            ranges,
            negated: false,
        }
    }

    /// The whole field is this.
    pub fn is(field: Field, value: u128) -> Self {
        Self::within(field, vec![value..=value])
    }

    /// One of the bits is set.
    pub fn any_bit(field: Field, bits: u128) -> Self {
        Self {
            field,
            mask: bits,
            ranges: vec![1..=u128::MAX],
            negated: false,
        }
    }

    /// Neither true nor false of any packet.
    pub fn unknown(words: impl Into<String>) -> Self {
        Self::within(Field::Other(words.into()), Vec::new())
    }

    /// It has the IPv6 extension header of that protocol number.
    pub fn extension_header(number: u8) -> Self {
        Self::is(Field::Network(6, 1), number.into())
    }

    /// The opposite, if so.
    pub fn negated_if(mut self, negated: bool) -> Self {
        self.negated ^= negated;
        self
    }
}

impl Table {
    /// A table that holds nothing yet.
    pub fn new(family: TableFamily, name: impl Into<String>, legacy: bool) -> Self {
        Self {
            family,
            name: name.into(),
            legacy,
            chains: BTreeMap::new(),
        }
    }
}

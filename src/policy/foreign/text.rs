//! Rules of others as text: close to nft(8), so that whoever knows it finds the rule in its listing.
//!
//! May not live here: values that depend on anything but the rule.

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;

use super::{Action, Condition, Field, Rule, Table, TableFamily, ct_state};

/// How many values of a set are written out.
const MAX_VALUES: usize = 8;

impl fmt::Display for TableFamily {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Inet => "inet",
            Self::Ip => "ip",
            Self::Ip6 => "ip6",
        })
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let legacy = if self.legacy { " (legacy iptables)" } else { "" };
        write!(f, "{} {}{legacy}", self.family, self.name)
    }
}

impl fmt::Display for Field {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Family => "meta nfproto",
            Self::EtherType => "meta protocol",
            Self::Protocol => "meta l4proto",
            Self::InterfaceName => "iifname",
            Self::InterfaceIndex => "iif",
            Self::PacketType => "meta pkttype",
            Self::CtState => "ct state",
            Self::CtStatus => "ct status",
            Self::CtDirection => "ct direction",
            Self::SourceType => "fib saddr type",
            Self::DestinationType => "fib daddr type",
            Self::ReversePath | Self::ReversePathExists => "fib saddr . iif oif",
            Self::Network(12, 1..=4) => "ip saddr",
            Self::Network(16, 1..=4) => "ip daddr",
            Self::Network(9, 1) => "ip protocol",
            Self::Network(6, 1) => "ip6 nexthdr",
            Self::Network(8, 16) => "ip6 saddr",
            Self::Network(24, 16) => "ip6 daddr",
            Self::Transport(0, 2) => "th sport",
            Self::Transport(2, 2) => "th dport",
            Self::Transport(13, 1) => "tcp flags",
            Self::Network(offset, bytes) => {
                return write!(f, "@nh,{},{}", u64::from(*offset) * 8, u64::from(*bytes) * 8);
            }
            Self::Transport(offset, bytes) => {
                return write!(f, "@th,{},{}", u64::from(*offset) * 8, u64::from(*bytes) * 8);
            }
            Self::Other(words) => words,
        })
    }
}

impl Field {
    fn value(&self, value: u128) -> String {
        match self {
            Self::Family if value == 2 => "ipv4".to_owned(),
            Self::Family if value == 10 => "ipv6".to_owned(),
            Self::Protocol | Self::Network(9 | 6, 1) => protocol(value),
            Self::InterfaceName => interface(value),
            Self::CtState => bits(value),
            Self::SourceType | Self::DestinationType if value == 2 => "local".to_owned(),
            Self::ReversePath | Self::ReversePathExists if value == 0 => "missing".to_owned(),
            Self::Network(12 | 16, bytes @ 1..=4) => {
                let whole = u32::try_from(value << (8 * (4 - bytes))).unwrap_or(u32::MAX);
                let length = if *bytes == 4 {
                    String::new()
                } else {
                    format!("/{}", bytes * 8)
                };
                format!("{}{length}", Ipv4Addr::from_bits(whole))
            }
            Self::Network(8 | 24, 16) => Ipv6Addr::from_bits(value).to_string(),
            Self::Transport(0 | 2, 2) => value.to_string(),
            _ if value < 256 => value.to_string(),
            _ => format!("{value:#x}"),
        }
    }
}

fn protocol(number: u128) -> String {
    match number {
        1 => "icmp".to_owned(),
        6 => "tcp".to_owned(),
        17 => "udp".to_owned(),
        58 => "ipv6-icmp".to_owned(),
        other => other.to_string(),
    }
}

fn interface(value: u128) -> String {
    let bytes = value.to_be_bytes();
    let name = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
    format!("{:?}", String::from_utf8_lossy(name))
}

fn bits(value: u128) -> String {
    let names = [
        (ct_state::INVALID, "invalid"),
        (ct_state::ESTABLISHED, "established"),
        (ct_state::RELATED, "related"),
        (ct_state::NEW, "new"),
        (ct_state::UNTRACKED, "untracked"),
    ];
    let set: Vec<&str> = names
        .iter()
        .filter(|(bit, _)| value & bit != 0)
        .map(|(_, name)| *name)
        .collect();
    set.join(",")
}

impl Condition {
    fn range(&self, range: &RangeInclusive<u128>) -> String {
        let (first, last) = (self.field.value(*range.start()), self.field.value(*range.end()));
        if first == last {
            first
        } else {
            format!("{first}-{last}")
        }
    }

    /// A prefix of the field's bits, as its length.
    fn prefix(&self) -> Option<u32> {
        let length = (self.mask << (128 - 8 * self.field.bytes())).leading_ones();
        let rest = self.field.mask().checked_shr(length).unwrap_or(0);
        (rest == self.field.mask() & !self.mask).then_some(length)
    }
}

impl fmt::Display for Condition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Field::Other(words) = &self.field {
            return f.write_str(words);
        }
        let not = if self.negated { "!= " } else { "" };
        if self.ranges == [1..=u128::MAX] {
            return write!(f, "{} {not}{}", self.field, self.field.value(self.mask));
        }
        let values: Vec<String> = self
            .ranges
            .iter()
            .take(MAX_VALUES)
            .map(|range| self.range(range))
            .collect();
        let more = if self.ranges.len() > MAX_VALUES {
            ", …"
        } else {
            ""
        };
        let values = match values.as_slice() {
            [only] => only.clone(),
            _ => format!("{{ {}{more} }}", values.join(", ")),
        };
        match (self.mask == self.field.mask(), &self.field, self.prefix()) {
            (true, ..) => write!(f, "{} {not}{values}", self.field),
            (false, Field::InterfaceName, Some(_)) => {
                write!(f, "{} {not}{}*\"", self.field, values.trim_end_matches('"'))
            }
            (false, Field::Network(12 | 16, 4) | Field::Network(8 | 24, 16), Some(length)) => {
                write!(f, "{} {not}{values}/{length}", self.field)
            }
            _ => write!(f, "{} & {:#x} {not}{values}", self.field, self.mask),
        }
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Continue => f.write_str("continue"),
            Self::End(_, words) | Self::Translate(words) | Self::Undecided(words) => f.write_str(words),
            Self::Jump(chain) => write!(f, "jump {chain}"),
            Self::Goto(chain) => write!(f, "goto {chain}"),
            Self::Return => f.write_str("return"),
            Self::Map(key, entries) => {
                let entry = |(range, action): &(RangeInclusive<u128>, Action)| {
                    format!("{} : {action}", key.range(range))
                };
                let list: Vec<String> = entries.iter().take(MAX_VALUES).map(entry).collect();
                let more = if entries.len() > MAX_VALUES { ", …" } else { "" };
                write!(f, "{} vmap {{ {}{more} }}", key.field, list.join(", "))
            }
        }
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for condition in &self.conditions {
            write!(f, "{condition} ")?;
        }
        self.action.fmt(f)
    }
}

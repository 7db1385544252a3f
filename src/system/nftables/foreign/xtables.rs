//! Matches and targets of xtables as they stand in nf_tables rules: what `iptables-nft` writes, and so
//! ufw and Docker. Their bytes are structs of the kernel's headers, in the host's order.
//!
//! May not live here: expressions of nf_tables (`decode`).

use std::net::{IpAddr, SocketAddr};

use crate::policy::foreign::iptables::{extension_header, target_action};
use crate::policy::foreign::{Action, Condition, Field, ct_state};

/// `XT_CONNTRACK_STATE` (linux/netfilter/xt_conntrack.h).
const CONNTRACK_STATE: u16 = 1;
/// Offsets in `struct xt_conntrack_mtinfo2` and `3`: `match_flags`, `invert_flags`, `state_mask`.
const CONNTRACK_FLAGS: usize = 146;
const CONNTRACK_INVERT: usize = 148;
const CONNTRACK_STATES: usize = 150;
/// `XT_CONNTRACK_STATE_UNTRACKED`.
const XT_UNTRACKED: u16 = 1 << 8;

/// The conditions of a match. What is not known here can't be judged.
pub fn conditions(name: &str, revision: u32, info: &[u8]) -> Vec<Condition> {
    let found = match name {
        "comment" => Some(Vec::new()),
        "conntrack" if revision >= 2 => conntrack(info),
        "state" => u16_at(info, 0).map(|mask| vec![Condition::any_bit(Field::CtState, states(mask))]),
        "addrtype" if revision == 1 => addrtype(info),
        "tcp" => tcp(info),
        "udp" => udp(info),
        "multiport" if revision == 1 => multiport(info),
        "icmp" | "icmp6" => icmp(info),
        "rpfilter" => rpfilter(info),
        other => extension_header(other).map(|header| vec![header]),
    };
    found.unwrap_or_else(|| vec![Condition::unknown(format!("xt match {name}"))])
}

/// What a target does; one that is not known may do anything.
pub fn target(name: &str, revision: u32, info: &[u8]) -> Action {
    match target_action(name) {
        Some(Action::Translate(words)) if name == "DNAT" => {
            let to = if revision == 2 { destination(info) } else { None };
            Action::Translate(to.map_or(words, |to| format!("{name} to {to}")))
        }
        Some(action) => action,
        None => Action::Undecided(format!("xt target {name}")),
    }
}

/// The first address and port of `struct nf_nat_range2` (linux/netfilter/nf_nat.h): flags, two addresses of
/// 16 bytes, two ports. An IPv4 address is followed by zeros, which no host's IPv6 address is.
fn destination(info: &[u8]) -> Option<String> {
    let octets: [u8; 16] = info.get(4..20)?.try_into().ok()?;
    let port = u16::from_be_bytes(info.get(36..38)?.try_into().ok()?);
    let address = match octets {
        [a, b, c, d, rest @ ..] if rest == [0; 12] => IpAddr::from([a, b, c, d]),
        octets => IpAddr::from(octets),
    };
    Some(match port {
        0 => address.to_string(),
        port => SocketAddr::new(address, port).to_string(),
    })
}

fn u16_at(info: &[u8], offset: usize) -> Option<u16> {
    let bytes = info.get(offset..offset.checked_add(2)?)?;
    Some(u16::from_ne_bytes(bytes.try_into().ok()?))
}

fn u32_at(info: &[u8], offset: usize) -> Option<u32> {
    let bytes = info.get(offset..offset.checked_add(4)?)?;
    Some(u32::from_ne_bytes(bytes.try_into().ok()?))
}

/// The first four bits are the same; those of translated flows are no bits here, for such flows are
/// not asked about.
fn states(mask: u16) -> u128 {
    let untracked = if mask & XT_UNTRACKED != 0 {
        ct_state::UNTRACKED
    } else {
        0
    };
    u128::from(mask & 0xf) | untracked
}

fn conntrack(info: &[u8]) -> Option<Vec<Condition>> {
    let (flags, inverted) = (u16_at(info, CONNTRACK_FLAGS)?, u16_at(info, CONNTRACK_INVERT)?);
    let condition = Condition::any_bit(Field::CtState, states(u16_at(info, CONNTRACK_STATES)?));
    (flags == CONNTRACK_STATE).then(|| vec![condition.negated_if(inverted & CONNTRACK_STATE != 0)])
}

/// `struct xt_addrtype_info_v1`: masks of `RTN_*` numbers, of the source and of the destination.
fn addrtype(info: &[u8]) -> Option<Vec<Condition>> {
    let (source, destination, flags) = (u16_at(info, 0)?, u16_at(info, 2)?, u32_at(info, 4)?);
    // XT_ADDRTYPE_INVERT_SOURCE and _INVERT_DEST; the others limit it to an interface.
    if flags & !3 != 0 {
        return None;
    }
    let types = |mask: u16| {
        let numbers = (0..16u128).filter(move |number| mask >> number & 1 != 0);
        numbers.map(|number| number..=number).collect::<Vec<_>>()
    };
    let both = [
        (Field::SourceType, source, flags & 1 != 0),
        (Field::DestinationType, destination, flags & 2 != 0),
    ];
    let named = both.into_iter().filter(|(_, mask, _)| *mask != 0);
    Some(
        named
            .map(|(field, mask, not)| Condition::within(field, types(mask)).negated_if(not))
            .collect(),
    )
}

/// Two ports, first and last; all of them say nothing.
fn ports(info: &[u8], offset: usize, field: Field, inverted: bool) -> Option<Option<Condition>> {
    let (first, last) = (u16_at(info, offset)?, u16_at(info, offset + 2)?);
    let all = (first, last) == (0, u16::MAX) && !inverted;
    let condition = Condition::within(field, vec![first.into()..=last.into()]);
    Some((!all).then(|| condition.negated_if(inverted)))
}

/// `struct xt_tcp`.
fn tcp(info: &[u8]) -> Option<Vec<Condition>> {
    let [option, mask, bits, inverted]: [u8; 4] = info.get(8..12)?.try_into().ok()?;
    if option != 0 {
        return None;
    }
    let mut conditions: Vec<Condition> = [
        ports(info, 0, Field::SOURCE_PORT, inverted & 1 != 0)?,
        ports(info, 4, Field::DESTINATION_PORT, inverted & 2 != 0)?,
    ]
    .into_iter()
    .flatten()
    .collect();
    if mask != 0 {
        let flags = Condition {
            mask: u128::from(mask),
            ..Condition::is(Field::TCP_FLAGS, u128::from(bits))
        };
        conditions.push(flags.negated_if(inverted & 4 != 0));
    }
    Some(conditions)
}

/// `struct xt_udp`.
fn udp(info: &[u8]) -> Option<Vec<Condition>> {
    let inverted = *info.get(8)?;
    let both = [
        ports(info, 0, Field::SOURCE_PORT, inverted & 1 != 0)?,
        ports(info, 4, Field::DESTINATION_PORT, inverted & 2 != 0)?,
    ];
    Some(both.into_iter().flatten().collect())
}

/// `struct xt_multiport_v1`: up to 15 ports; a mark says that the next one ends a range.
fn multiport(info: &[u8]) -> Option<Vec<Condition>> {
    let [which, count]: [u8; 2] = info.get(..2)?.try_into().ok()?;
    let field = match which {
        0 => Field::SOURCE_PORT,
        1 => Field::DESTINATION_PORT,
        // Either: one of two fields.
        _ => return None,
    };
    let count = usize::from(count).min(15);
    let (mut ranges, mut first) = (Vec::new(), None);
    for i in 0..count {
        let port = u128::from(u16_at(info, 2 + 2 * i)?);
        if *info.get(32 + i)? != 0 {
            first = Some(port);
        } else {
            ranges.push(first.take().unwrap_or(port)..=port);
        }
    }
    let inverted = *info.get(47)? != 0;
    Some(vec![Condition::within(field, ranges).negated_if(inverted)])
}

/// `struct ipt_icmp` and `struct ip6t_icmp`: a type and its codes.
fn icmp(info: &[u8]) -> Option<Vec<Condition>> {
    let [kind, first, last, inverted]: [u8; 4] = info.get(..4)?.try_into().ok()?;
    let any_code = (first, last) == (0, u8::MAX);
    match (kind, any_code) {
        (u8::MAX, true) => Some(Vec::new()),
        (kind, true) => Some(vec![
            Condition::is(Field::ICMP_TYPE, kind.into()).negated_if(inverted & 1 != 0),
        ]),
        _ => None,
    }
}

/// `struct xt_rpfilter_info`: whether there is a way back, or, inverted, none.
fn rpfilter(info: &[u8]) -> Option<Vec<Condition>> {
    // XT_RPFILTER_INVERT.
    let inverted = *info.first()? & 8 != 0;
    Some(vec![
        Condition::is(Field::ReversePathExists, 1).negated_if(inverted),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(name: &str, revision: u32, info: &[u8]) -> String {
        let list: Vec<String> = conditions(name, revision, info)
            .iter()
            .map(ToString::to_string)
            .collect();
        list.join(" ")
    }

    fn host(numbers: &[u16]) -> Vec<u8> {
        numbers.iter().flat_map(|n| n.to_ne_bytes()).collect()
    }

    #[test]
    fn known_matches_are_read() {
        let mut conntrack = vec![0; 164];
        conntrack[CONNTRACK_FLAGS..CONNTRACK_FLAGS + 6].copy_from_slice(&host(&[1, 0, 6]));
        assert_eq!(shown("conntrack", 3, &conntrack), "ct state established,related");
        let local = [host(&[0, 1 << 2]), vec![0; 4]].concat();
        assert_eq!(shown("addrtype", 1, &local), "fib daddr type local");
        let tcp = [host(&[0, u16::MAX, 22, 22]), vec![0, 0x17, 0x02, 4]].concat();
        assert_eq!(shown("tcp", 0, &tcp), "th dport 22 tcp flags & 0x17 != 2");
        let udp = [host(&[67, 68, 0, u16::MAX]), vec![1]].concat();
        assert_eq!(shown("udp", 0, &udp), "th sport != 67-68");
        let mut multiport = vec![0; 48];
        multiport[..2].copy_from_slice(&[1, 3]);
        multiport[2..8].copy_from_slice(&host(&[80, 443, 445]));
        multiport[33] = 1;
        assert_eq!(shown("multiport", 1, &multiport), "th dport { 80, 443-445 }");
        assert_eq!(shown("icmp", 0, &[8, 0, 255, 0]), "@th,0,8 8");
        assert_eq!(shown("rpfilter", 0, &[8]), "fib saddr . iif oif != 1");
        assert_eq!(shown("comment", 0, &[0; 256]), "");
    }

    #[test]
    fn what_is_not_known_or_too_short_is_not_judged() {
        for name in [
            "recent",
            "conntrack",
            "addrtype",
            "tcp",
            "udp",
            "multiport",
            "icmp",
            "rpfilter",
        ] {
            assert_eq!(shown(name, 1, &[]), format!("xt match {name}"));
        }
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_read(revision in 0u32..4, info: Vec<u8>) {
            for name in ["conntrack", "state", "addrtype", "tcp", "udp", "multiport", "icmp", "rpfilter"] {
                conditions(name, revision, &info);
            }
        }
    }
}

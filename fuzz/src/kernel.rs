//! Messages of the kernel. It does not lie, but other programs choose much of what it passes on: names, rules,
//! sets, packets; and its next version adds what is not known here.
//!
//! May not live here: sockets.

use std::time::{Duration, Instant};

use netlink_packet_core::{NetlinkMessage, NetlinkPayload};
use netlink_packet_netfilter::nftables::{NfTablesMessage, RuleAttribute};
use netlink_packet_netfilter::{NetfilterMessage, NetfilterMessageInner};
use portcullis::policy::denied::{Headers, Lines, Tally, interface_name};
use portcullis::policy::foreign::{Foreign, iptables};
use portcullis::policy::ruleset::{Family, Match};
use portcullis::system::netlink::{Attributes, GENMSG, RawMessage, encode, messages};
use portcullis::system::nftables::expression::Expr;
use portcullis::system::nftables::lower::{lower, raise};
use portcullis::system::nftables::{element_key, foreign as others, read_ranges};
use portcullis::system::{links, nflog, sockets};

/// The raw messages of a datagram; none if it is not understood.
fn raw(data: &[u8]) -> Vec<RawMessage> {
    let Ok(messages) = messages::<RawMessage>(data) else {
        return Vec::new();
    };
    // A message has a header of 16 bytes: whatever lengths they state, the loop ends.
    assert!(messages.len() <= data.len() / 16);
    let payloads = messages.into_iter().filter_map(|message| match message.payload {
        NetlinkPayload::InnerMessage(inner) => Some(inner),
        _ => None,
    });
    payloads.collect()
}

/// Links, addresses, routes, sockets, logged packets: never more than there was room for, each link once.
pub fn netlink(data: &[u8]) -> bool {
    let raw = raw(data);
    let of = |kind: u16| -> Vec<RawMessage> {
        raw.iter()
            .filter(|message| message.kind() == kind)
            .cloned()
            .collect()
    };
    // RTM_NEWLINK, RTM_NEWADDR, RTM_NEWROUTE.
    let (new_links, addresses, routes) = (of(16), of(20), of(24));
    let read = links::read_all(&new_links, &addresses, &routes);
    assert!(read.len() <= new_links.len());
    assert!(read.is_sorted_by(|a, b| a.index < b.index));
    let mut seen = !read.is_empty();
    for message in &raw {
        let payload = message.payload();
        seen |= sockets::read_session(payload).is_some();
        if let Some(copied) = nflog::copied(payload) {
            assert!(copied.bytes.len() <= payload.len());
            assert!(copied.interface.bytes().all(|byte| byte.is_ascii_graphic()));
            seen = true;
        }
        let sizes: usize = Attributes::behind(payload, GENMSG).map(|a| a.value().len()).sum();
        assert!(sizes <= payload.len());
    }
    seen
}

/// Has every attribute of a rule state a length that fits, as the kernel's do: the library that parses rules
/// takes that for granted within nested ones, and panics otherwise. What the attributes hold stays. `None` where there is no room for an attribute.
fn frame(attributes: &mut [u8], within: &str) -> Option<()> {
    if attributes.len() < 4 {
        return None;
    }
    let (mut rest, mut name) = (attributes, String::new());
    while rest.len() >= 4 {
        let stated = usize::from(u16::from_ne_bytes([rest[0], rest[1]]));
        let length = stated.clamp(4, rest.len());
        rest[..2].copy_from_slice(&u16::try_from(length).unwrap_or(u16::MAX).to_ne_bytes());
        let kind = u16::from_ne_bytes([rest[2], rest[3]]) & 0x3fff;
        let (attribute, behind) = rest.split_at_mut(length.next_multiple_of(4).min(rest.len()));
        rest = behind;
        let value = &mut attribute[4..length];
        match (within, kind) {
            ("rule", 4) => frame(value, "expressions")?,
            ("expressions", _) => frame(value, "expression")?,
            ("expression", 1) => {
                let text = value.split(|byte| *byte == 0).next().unwrap_or_default();
                name = String::from_utf8_lossy(text).into_owned();
            }
            ("expression", 2) => frame(value, &name)?,
            // Values that are nested once more: NFTA_CMP_DATA, NFTA_BITWISE_*, NFTA_IMMEDIATE_DATA, a verdict.
            ("cmp" | "range", 3..) | ("bitwise", 4..) | ("immediate", 2) => frame(value, "data")?,
            ("data", 2) => frame(value, "verdict")?,
            _ => {}
        }
    }
    Some(())
}

/// A rule in the plan's form, as what the kernel lists is read. Whether it is one of ours.
fn is_read_exactly(expressions: &[Expr]) -> bool {
    let rule = raise("x".to_owned(), expressions);
    let _ = rule.to_string();
    let is_foreign = |condition: &Match| matches!(condition, Match::Foreign(_));
    if rule.matches.iter().any(is_foreign) {
        return false;
    }
    assert_eq!(lower(&rule), expressions, "{rule:?}");
    !expressions.is_empty()
}

/// Our own rules and sets, as the kernel lists them: what is taken for a rule of ours is exactly that, bit for
/// bit, and an interval lies within its family.
pub fn nftables(data: &[u8]) -> bool {
    let mut seen = false;
    for message in raw(data) {
        let payload = message.payload();
        // NFT_MSG_NEWRULE.
        if message.kind() == 0x0a06 && payload.len() >= GENMSG {
            let mut payload = payload.to_vec();
            if frame(&mut payload[GENMSG..], "rule").is_none() {
                continue;
            }
            let framed = encode(RawMessage::new(0x0a06, payload), 1, 0);
            for message in messages::<NetfilterMessage>(&framed).unwrap_or_default() {
                seen |= rules(message)
                    .iter()
                    .any(|expressions| is_read_exactly(expressions));
            }
        }
        let lists = Attributes::behind(message.payload(), GENMSG);
        let keys: Vec<_> = lists.flat_map(|list| elements(list.value())).collect();
        for family in Family::BOTH {
            let bytes = if family == Family::Ipv4 { 4 } else { 16 };
            let of_family: Vec<_> = keys
                .iter()
                .filter(|(key, _)| key.len() == bytes)
                .cloned()
                .collect();
            let most = of_family.len();
            let ranges = read_ranges(family, of_family);
            assert!(ranges.len() <= most);
            assert!(
                ranges
                    .iter()
                    .all(|(first, last)| first.is_ipv4() == last.is_ipv4())
            );
            assert!(ranges.is_sorted_by_key(|(first, _)| *first));
        }
    }
    seen
}

fn rules(message: NetlinkMessage<NetfilterMessage>) -> Vec<Vec<Expr>> {
    let NetlinkPayload::InnerMessage(NetfilterMessage { inner, .. }) = message.payload else {
        return Vec::new();
    };
    let NetfilterMessageInner::NfTables(NfTablesMessage::NewRule(rule)) = inner else {
        return Vec::new();
    };
    let lists = rule.attributes.iter().filter_map(|attribute| match attribute {
        RuleAttribute::Expressions(list) => Some(list.iter().map(Expr::decode).collect()),
        _ => None,
    });
    lists.collect()
}

fn elements(list: &[u8]) -> Vec<(Vec<u8>, bool)> {
    let elements = Attributes::behind(list, 0);
    elements
        .filter_map(|element| element_key(element.value()))
        .collect()
}

/// Tables of other programs, from nf_tables and as `iptables-save` prints them: anything is read, what is not
/// understood is said to be unknown, and it can be shown on one line.
pub fn foreign(data: &[u8]) -> bool {
    let mut found = Foreign::default();
    let mut seen = false;
    for message in raw(data) {
        match message.kind() {
            // NFT_MSG_NEWTABLE, NFT_MSG_NEWCHAIN, NFT_MSG_NEWRULE.
            0x0a00 => others::take_table(message.payload(), &mut found),
            0x0a03 => others::take_chain(message.payload(), &mut found),
            0x0a06 => {
                let rule = others::rule(Attributes::behind(message.payload(), GENMSG), |_| None);
                seen |= !rule.conditions.is_empty();
                assert!(!rule.to_string().contains(char::is_control), "{rule}");
            }
            _ => {}
        }
    }
    seen |= found.tables.iter().any(|table| !table.chains.is_empty());
    if let Ok(text) = std::str::from_utf8(data) {
        for family in Family::BOTH {
            for table in iptables::parse(family, text) {
                assert!(table.legacy);
                let rules: usize = table.chains.values().map(|chain| chain.rules.len()).sum();
                assert!(rules <= text.lines().count());
                for rule in table.chains.values().flat_map(|chain| &chain.rules) {
                    assert!(!rule.to_string().contains('\n'), "{rule}");
                }
                seen |= rules > 0;
            }
        }
    }
    seen
}

/// Packets that were denied: anybody sends them. What is told of them is printable, and what is kept of them is
/// bounded.
pub fn packets(data: &[u8]) -> bool {
    let now = jiff::Timestamp::UNIX_EPOCH;
    let start = Instant::now();
    let (mut tally, mut lines) = (Tally::from(now), Lines::from(start));
    let mut counted = 0;
    // A byte says how long each is.
    let mut rest = data;
    while let Some((length, behind)) = rest.split_first() {
        let (packet, next) = behind.split_at(usize::from(*length).min(behind.len()));
        rest = next;
        let Some(headers) = Headers::parse(packet) else {
            continue;
        };
        assert!(headers.ports.is_none() || headers.icmp_type.is_none());
        let shown = headers.to_string();
        assert!(shown.bytes().all(|byte| (b' '..=b'~').contains(&byte)), "{shown}");
        tally.count(&headers, now);
        counted += 1;
        let _ = lines.ask(&headers, start + Duration::from_millis(counted));
    }
    let sample = tally.sample(10, now);
    assert_eq!(sample.packets, counted);
    assert!(sample.sources.len() <= 10);
    for source in &sample.sources {
        assert!(source.uncertainty <= source.packets && source.packets <= counted);
    }
    let name = interface_name(data);
    assert!(name.bytes().all(|byte| byte.is_ascii_graphic()));
    counted > 0
}

//! The kernel's expressions as conditions and actions (linux/netfilter/nf_tables.h). Each register is
//! followed from what was loaded into it to what is compared with it.
//!
//! May not live here: netlink sockets, matches of xtables (`xtables`).

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::rc::Rc;

use super::sets::Held;
use super::{number, text, xtables};
use crate::policy::foreign::{Action, Condition, Field, Rule};
use crate::policy::ruleset::Verdict;
use crate::system::netlink::Attributes;

const NFTA_RULE_HANDLE: u16 = 3;
const NFTA_RULE_EXPRESSIONS: u16 = 4;
const NFTA_EXPR_NAME: u16 = 1;
const NFTA_EXPR_DATA: u16 = 2;
const NFTA_DATA_VALUE: u16 = 1;
const NFTA_DATA_VERDICT: u16 = 2;
const NFTA_VERDICT_CODE: u16 = 1;
const NFTA_VERDICT_CHAIN: u16 = 2;
/// `NFT_FIB_RESULT_OIF`, `NFT_FIB_RESULT_ADDRTYPE`; `NFTA_FIB_F_SADDR`, `NFTA_FIB_F_DADDR` and
/// `NFTA_FIB_F_PRESENT`.
const FIB_OIF: u32 = 1;
const FIB_ADDRTYPE: u32 = 3;
const FIB_SOURCE: u32 = 1;
const FIB_DESTINATION: u32 = 2;
const FIB_PRESENT: u32 = 32;

/// A rule of the message's attributes. `set` tells what a set of the rule's table holds, if it can.
pub fn rule(attributes: Attributes<'_>, set: impl FnMut(&str) -> Option<Rc<Held>>) -> Rule {
    let mut decoder = Decoder {
        set,
        registers: BTreeMap::new(),
        loader: String::new(),
        conditions: Vec::new(),
        action: Action::Continue,
    };
    let mut handle = None;
    for attribute in attributes {
        match attribute.kind() {
            NFTA_RULE_HANDLE => {
                handle = <[u8; 8]>::try_from(attribute.value())
                    .ok()
                    .map(u64::from_be_bytes);
            }
            NFTA_RULE_EXPRESSIONS => {
                for expression in Attributes::behind(attribute.value(), 0) {
                    decoder.expression(&Expression::of(expression.value()));
                }
            }
            _ => {}
        }
    }
    Rule {
        handle,
        conditions: decoder.conditions,
        action: decoder.action,
    }
}

/// A big-endian number of at most 16 bytes.
pub fn big_endian(bytes: &[u8]) -> Option<u128> {
    (bytes.len() <= 16).then(|| {
        bytes
            .iter()
            .fold(0, |number, byte| number << 8 | u128::from(*byte))
    })
}

/// The action of a verdict's attributes.
pub fn verdict(attributes: &[u8]) -> Action {
    let (mut code, mut chain) = (None, String::new());
    for attribute in Attributes::behind(attributes, 0) {
        match attribute.kind() {
            NFTA_VERDICT_CODE => code = number(attribute.value()).map(u32::cast_signed),
            NFTA_VERDICT_CHAIN => chain = text(attribute.value()),
            _ => {}
        }
    }
    match code {
        Some(0) => Action::End(Verdict::Drop, "drop".to_owned()),
        Some(1) => Action::End(Verdict::Accept, "accept".to_owned()),
        // NFT_CONTINUE to NFT_RETURN.
        Some(-1) => Action::Continue,
        Some(-3) => Action::Jump(chain),
        Some(-4) => Action::Goto(chain),
        Some(-5) => Action::Return,
        _ => Action::Undecided("queue".to_owned()),
    }
}

/// An expression's name and attributes.
struct Expression<'a> {
    name: String,
    attributes: BTreeMap<u16, &'a [u8]>,
}

impl<'a> Expression<'a> {
    fn of(element: &'a [u8]) -> Self {
        let mut expression = Self {
            name: String::new(),
            attributes: BTreeMap::new(),
        };
        for (kind, value) in attributes(element) {
            match kind {
                NFTA_EXPR_NAME => expression.name = text(value),
                NFTA_EXPR_DATA => expression.attributes = attributes(value).collect(),
                _ => {}
            }
        }
        expression
    }

    fn number(&self, kind: u16) -> Option<u32> {
        self.attributes.get(&kind).and_then(|bytes| number(bytes))
    }

    /// The bytes of an attribute that holds data.
    fn data(&self, kind: u16, of: u16) -> Option<&'a [u8]> {
        attributes(self.attributes.get(&kind)?)
            .find(|(kind, _)| *kind == of)
            .map(|(_, value)| value)
    }
}

/// Kind and value of attributes one after the other; the values live as long as the bytes.
fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let [l0, l1, k0, k1, ..] = *bytes else { return None };
        let length = usize::from(u16::from_ne_bytes([l0, l1]));
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        // The two highest bits are flags (NLA_F_NESTED, NLA_F_NET_BYTEORDER).
        Some((u16::from_ne_bytes([k0, k1]) & 0x3fff, value))
    })
}

/// What a register holds.
#[derive(Clone)]
struct Loaded {
    field: Field,
    mask: u128,
    /// Whether its bytes are in the host's order.
    host: bool,
}

impl Loaded {
    fn of(field: Field) -> Self {
        let host = matches!(
            field,
            Field::InterfaceIndex
                | Field::CtState
                | Field::CtStatus
                | Field::SourceType
                | Field::DestinationType
                | Field::ReversePath
        );
        Self {
            mask: field.mask(),
            field,
            host,
        }
    }

    fn number(&self, bytes: &[u8]) -> Option<u128> {
        let number = big_endian(bytes)?;
        Some(if self.host {
            swapped(number, bytes.len())
        } else {
            number
        })
    }
}

/// A number of so many bytes in the other byte order, on hosts where that is another.
fn swapped(number: u128, bytes: usize) -> u128 {
    if cfg!(target_endian = "big") {
        return number;
    }
    number
        .swap_bytes()
        .checked_shr(u32::try_from(128 - 8 * bytes.min(16)).unwrap_or(0))
        .unwrap_or(0)
}

struct Decoder<S> {
    set: S,
    /// By the number of the 4-byte register at which they begin.
    registers: BTreeMap<u32, Loaded>,
    /// The last expression that loaded something unknown.
    loader: String,
    conditions: Vec<Condition>,
    action: Action,
}

/// `NFT_REG_1` to `NFT_REG_4` are four of the registers from `NFT_REG32_00` on.
fn register(number: Option<u32>) -> u32 {
    match number {
        Some(number @ 1..=4) => 8 + (number - 1) * 4,
        other => other.unwrap_or_default(),
    }
}

impl<S: FnMut(&str) -> Option<Rc<Held>>> Decoder<S> {
    fn expression(&mut self, e: &Expression<'_>) {
        match e.name.as_str() {
            "meta" => self.load(e.number(1), meta(e.number(2))),
            "ct" => self.load(e.number(1), ct(e.number(2))),
            "payload" => self.load(e.number(1), payload(e.number(2), e.number(3), e.number(4))),
            "exthdr" => self.extension_header(e),
            "fib" => self.load(e.number(1), fib(e.number(2), e.number(3))),
            "bitwise" => self.bitwise(e),
            "byteorder" => {
                if let Some(mut loaded) = self.registers.get(&register(e.number(1))).cloned() {
                    // NFT_BYTEORDER_NTOH.
                    loaded.host = e.number(3) == Some(0);
                    self.registers.insert(register(e.number(2)), loaded);
                }
            }
            "cmp" => self.compare(e),
            "range" => self.range(e),
            "lookup" => self.lookup(e),
            "immediate" => match e.data(2, NFTA_DATA_VERDICT) {
                Some(verdict) => self.action = self::verdict(verdict),
                None => self.load(e.number(1), Field::Other("immediate".to_owned())),
            },
            "counter" | "log" | "notrack" | "last" | "masq" | "dup" => {}
            "limit" | "quota" | "connlimit" | "dynset" => self.conditions.push(Condition::unknown(&e.name)),
            // NFT_OBJECT_COUNTER and NFT_OBJECT_CT_HELPER match always.
            "objref" if matches!(e.number(1), Some(1 | 3)) => {}
            "objref" => self.conditions.push(Condition::unknown(&e.name)),
            "reject" => self.action = Action::End(Verdict::Drop, "reject".to_owned()),
            // NFT_NAT_SNAT does not change where a packet goes.
            "nat" if e.number(1) == Some(0) => {}
            "nat" => self.action = Action::Translate("dnat".to_owned()),
            "redir" | "tproxy" => self.action = Action::Translate(e.name.clone()),
            "queue" | "synproxy" | "fwd" => self.action = Action::Undecided(e.name.clone()),
            "match" => {
                let name = e.attributes.get(&1).map(|name| text(name)).unwrap_or_default();
                let info = e.attributes.get(&3).copied().unwrap_or_default();
                self.conditions
                    .extend(xtables::conditions(&name, e.number(2).unwrap_or_default(), info));
            }
            "target" => {
                let name = e.attributes.get(&1).map(|name| text(name)).unwrap_or_default();
                let info = e.attributes.get(&3).copied().unwrap_or_default();
                self.action = xtables::target(&name, e.number(2).unwrap_or_default(), info);
            }
            other => {
                // It may have loaded any register.
                self.registers.clear();
                other.clone_into(&mut self.loader);
            }
        }
    }

    /// Without the header the rule ends, unless it only asks whether the header is there
    /// (`NFT_EXTHDR_F_PRESENT`). Whatever is not an IPv6 header (`NFT_EXTHDR_OP_IPV6`) is not known.
    fn extension_header(&mut self, e: &Expression<'_>) {
        let header = e.attributes.get(&2).and_then(|kind| kind.first());
        if let (Some(number), 0, 0) = (header, e.number(6).unwrap_or(0), e.number(5).unwrap_or(0)) {
            self.conditions.push(Condition::extension_header(*number));
        }
        self.load(e.number(1), Field::Other(e.name.clone()));
    }

    /// Without a register it is a statement that sets something.
    fn load(&mut self, into: Option<u32>, field: Field) {
        if into.is_some() {
            self.registers.insert(register(into), Loaded::of(field));
        }
    }

    fn loaded(&self, from: Option<u32>) -> Loaded {
        let other = || Loaded::of(Field::Other(self.loader.clone()));
        self.registers.get(&register(from)).cloned().unwrap_or_else(other)
    }

    fn bitwise(&mut self, e: &Expression<'_>) {
        let mut loaded = self.loaded(e.number(1));
        // NFT_BITWISE_MASK_XOR; older kernels do not say it.
        let plain = e.number(6).unwrap_or(0) == 0
            && e.data(5, NFTA_DATA_VALUE)
                .is_none_or(|xor| xor.iter().all(|b| *b == 0));
        let mask = e.data(4, NFTA_DATA_VALUE).and_then(|mask| loaded.number(mask));
        match mask.filter(|_| plain) {
            Some(mask) => loaded.mask &= mask,
            None => loaded = Loaded::of(Field::Other(loaded.field.to_string())),
        }
        self.registers.insert(register(e.number(2)), loaded);
    }

    fn unknown(&mut self, loaded: &Loaded, words: &str) {
        self.conditions
            .push(Condition::unknown(format!("{} {words}", loaded.field)));
    }

    fn compare(&mut self, e: &Expression<'_>) {
        let loaded = self.loaded(e.number(1));
        let Some(bytes) = e.data(3, NFTA_DATA_VALUE) else {
            return;
        };
        let shown = || bytes.iter().map(|b| format!("{b:02x}")).collect::<String>();
        let (Some(value), false) = (loaded.number(bytes), matches!(loaded.field, Field::Other(_))) else {
            return self.unknown(&loaded, &format!("0x{}", shown()));
        };
        let (value, mask) = leading(&loaded, bytes, value);
        let all = loaded.field.mask();
        let (ranges, negated) = match e.number(2) {
            // A mask and "not 0" say: one of these bits.
            Some(1) if value == 0 && mask != all => (vec![1..=u128::MAX], false),
            Some(op @ 0..=1) => (vec![value..=value], op == 1),
            Some(2) => (
                value.checked_sub(1).map(|last| 0..=last).into_iter().collect(),
                false,
            ),
            Some(3) => (vec![0..=value], false),
            Some(4) => (
                value
                    .checked_add(1)
                    .map(|first| first..=all)
                    .into_iter()
                    .collect(),
                false,
            ),
            Some(5) => (vec![value..=all], false),
            _ => return self.unknown(&loaded, &format!("0x{}", shown())),
        };
        self.push(Condition {
            field: loaded.field,
            mask,
            ranges,
            negated,
        });
    }

    /// The two bounds of a range come as two comparisons.
    fn push(&mut self, condition: Condition) {
        if let Some(last) = self.conditions.last_mut()
            && (&last.field, last.mask, last.negated, condition.negated)
                == (&condition.field, condition.mask, false, false)
            && let ([a], [b]) = (last.ranges.as_mut_slice(), condition.ranges.as_slice())
            && a.start().max(b.start()) <= a.end().min(b.end())
        {
            *a = *a.start().max(b.start())..=*a.end().min(b.end());
            return;
        }
        self.conditions.push(condition);
    }

    fn range(&mut self, e: &Expression<'_>) {
        let loaded = self.loaded(e.number(1));
        let bound = |kind| {
            e.data(kind, NFTA_DATA_VALUE)
                .and_then(|bytes| loaded.number(bytes))
        };
        match (&loaded.field, bound(3), bound(4), e.number(2)) {
            (Field::Other(_), ..) | (_, None, ..) | (_, _, None, _) => self.unknown(&loaded, "range"),
            (field, Some(first), Some(last), op) => {
                let condition = Condition {
                    mask: loaded.mask,
                    ..Condition::within(field.clone(), vec![first..=last])
                };
                self.push(condition.negated_if(op == Some(1)));
            }
        }
    }

    fn lookup(&mut self, e: &Expression<'_>) {
        let name = e.attributes.get(&1).map(|name| text(name)).unwrap_or_default();
        let loaded = self.loaded(e.number(2));
        let entries = entries(&loaded, (self.set)(&name));
        let inverted = e.number(5).is_some_and(|flags| flags & 1 != 0);
        match (e.number(3), entries) {
            // NFT_REG_VERDICT: a map of verdicts.
            (Some(0), Some(entries)) => {
                let key = Condition {
                    mask: loaded.mask,
                    ..Condition::within(loaded.field, Vec::new())
                };
                let verdict =
                    |(range, action): (_, Option<Action>)| (range, action.unwrap_or(Action::Continue));
                self.action = Action::Map(key, entries.into_iter().map(verdict).collect());
            }
            (Some(0), None) => self.action = Action::Undecided(format!("{} vmap @{name}", loaded.field)),
            (Some(into), _) => {
                self.unknown(&loaded, &format!("map @{name}"));
                self.load(Some(into), Field::Other(format!("@{name}")));
            }
            (None, Some(entries)) => {
                let ranges = entries.into_iter().map(|(range, _)| range).collect();
                let condition = Condition {
                    mask: loaded.mask,
                    ..Condition::within(loaded.field, ranges)
                };
                self.conditions.push(condition.negated_if(inverted));
            }
            (None, None) => self.unknown(&loaded, &format!("{}@{name}", if inverted { "!= " } else { "" })),
        }
    }
}

/// Fewer bytes than the field has compare its beginning; a name with its zero is the whole name.
fn leading(loaded: &Loaded, bytes: &[u8], value: u128) -> (u128, u128) {
    let missing = (loaded.field.bytes() as usize).saturating_sub(bytes.len()) * 8;
    let shift = u32::try_from(missing).unwrap_or(0);
    let value = value.checked_shl(shift).unwrap_or(0);
    if shift == 0 || bytes.contains(&0) {
        return (value, loaded.mask);
    }
    (value, loaded.mask & u128::MAX.checked_shl(shift).unwrap_or(0))
}

type Entries = Vec<(RangeInclusive<u128>, Option<Action>)>;

/// A set's keys as the loaded field has them; `None` if that can't be told.
fn entries(loaded: &Loaded, held: Option<Rc<Held>>) -> Option<Entries> {
    let held = held.filter(|held| held.key_bytes == loaded.field.bytes())?;
    if matches!(loaded.field, Field::Other(_)) {
        return None;
    }
    if !loaded.host {
        return Some(held.entries.clone());
    }
    let single = |(range, action): &(RangeInclusive<u128>, Option<Action>)| {
        let key = swapped(*range.start(), held.key_bytes as usize);
        (range.start() == range.end()).then(|| (key..=key, action.clone()))
    };
    held.entries.iter().map(single).collect()
}

/// `NFT_META_*`.
fn meta(key: Option<u32>) -> Field {
    match key {
        Some(1) => Field::EtherType,
        Some(3) => Field::Other("meta mark".to_owned()),
        Some(4) => Field::InterfaceIndex,
        Some(6) => Field::InterfaceName,
        Some(15) => Field::Family,
        Some(16) => Field::Protocol,
        Some(19) => Field::PacketType,
        other => Field::Other(format!("meta {}", other.unwrap_or_default())),
    }
}

/// `NFT_CT_*`.
fn ct(key: Option<u32>) -> Field {
    match key {
        Some(0) => Field::CtState,
        Some(1) => Field::CtDirection,
        Some(2) => Field::CtStatus,
        Some(3) => Field::Other("ct mark".to_owned()),
        other => Field::Other(format!("ct {}", other.unwrap_or_default())),
    }
}

fn payload(base: Option<u32>, offset: Option<u32>, bytes: Option<u32>) -> Field {
    match (base, offset, bytes) {
        (Some(1), Some(offset), Some(bytes @ 1..=16)) => Field::Network(offset, bytes),
        (Some(2), Some(offset), Some(bytes @ 1..=16)) => Field::Transport(offset, bytes),
        (base, offset, bytes) => Field::Other(format!(
            "payload {} {} {}",
            base.unwrap_or_default(),
            offset.unwrap_or_default(),
            bytes.unwrap_or_default()
        )),
    }
}

/// A source whose way back is the one that it came by is what is asked about.
fn fib(result: Option<u32>, flags: Option<u32>) -> Field {
    let has = |flag: u32| flags.is_some_and(|flags| flags & flag != 0);
    match result {
        Some(FIB_OIF) if has(FIB_SOURCE) && has(FIB_PRESENT) => Field::ReversePathExists,
        Some(FIB_OIF) if has(FIB_SOURCE) => Field::ReversePath,
        Some(FIB_ADDRTYPE) if has(FIB_SOURCE) => Field::SourceType,
        Some(FIB_ADDRTYPE) if has(FIB_DESTINATION) => Field::DestinationType,
        _ => Field::Other("fib".to_owned()),
    }
}

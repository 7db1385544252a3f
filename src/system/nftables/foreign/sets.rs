//! Elements of other programs' sets, read when a rule looks into the set.
//!
//! May not live here: rules.

use std::collections::BTreeMap;
use std::ops::{ControlFlow, RangeInclusive};
use std::rc::Rc;

use super::{Error, GENMSG, decode, everything, number, open, text};
use crate::policy::foreign::Action;
use crate::system::netlink::{Attributes, Connection, RawMessage};

/// How many elements of a set are read; a larger one is not judged.
const MAX_ELEMENTS: usize = 4096;

const GET_SET: u16 = 10 << 8 | 10;
const GET_ELEMENTS: u16 = 10 << 8 | 13;
const NFTA_SET_TABLE: u16 = 1;
const NFTA_SET_NAME: u16 = 2;
const NFTA_SET_FLAGS: u16 = 3;
const NFTA_SET_KEY_LEN: u16 = 5;
const NFTA_ELEMENTS_TABLE: u16 = 1;
const NFTA_ELEMENTS_SET: u16 = 2;
const NFTA_ELEMENTS_LIST: u16 = 3;
const NFTA_ELEMENT_KEY: u16 = 1;
const NFTA_ELEMENT_DATA: u16 = 2;
const NFTA_ELEMENT_FLAGS: u16 = 3;
const NFTA_ELEMENT_KEY_END: u16 = 10;
const NFTA_DATA_VALUE: u16 = 1;
const NFTA_DATA_VERDICT: u16 = 2;
/// `NFT_SET_INTERVAL`; `NFT_SET_TIMEOUT` and `NFT_SET_EVAL`: elements come and go with packets and time,
/// and nobody is told.
const INTERVAL: u32 = 0x4;
const TRANSIENT: u32 = 0x10 | 0x20;
/// `NFT_SET_ELEM_INTERVAL_END` and `NFT_SET_ELEM_CATCHALL`.
const INTERVAL_END: u32 = 1;
const CATCH_ALL: u32 = 2;

/// What a set holds: key ranges, big-endian as numbers, each with its verdict if the set is a map of
/// verdicts.
pub struct Held {
    /// Length of the key, in bytes.
    pub key_bytes: u32,
    /// Sorted.
    pub entries: Vec<(RangeInclusive<u128>, Option<Action>)>,
}

struct Known {
    flags: u32,
    key_bytes: u32,
    /// Once it was asked for; `None` inside: it can't be judged.
    held: Option<Option<Rc<Held>>>,
}

/// Family, table, name.
type Name = (u8, String, String);

/// All sets of all tables, and their elements as far as they were asked for.
pub struct Sets {
    known: BTreeMap<Name, Known>,
    failure: Option<Error>,
}

impl Sets {
    /// Reads which sets there are.
    pub fn read(connection: &mut Connection) -> Result<Self, Error> {
        let mut known = BTreeMap::new();
        connection.each(&everything(GET_SET), |message| {
            let payload = message.payload();
            let (mut table, mut name, mut flags, mut key_bytes) = (String::new(), String::new(), 0, 0);
            for attribute in Attributes::behind(payload, GENMSG) {
                let value = attribute.value();
                match attribute.kind() {
                    NFTA_SET_TABLE => table = text(value),
                    NFTA_SET_NAME => name = text(value),
                    NFTA_SET_FLAGS => flags = number(value).unwrap_or_default(),
                    NFTA_SET_KEY_LEN => key_bytes = number(value).unwrap_or_default(),
                    _ => {}
                }
            }
            let family = payload.first().copied().unwrap_or_default();
            let set = Known {
                flags,
                key_bytes,
                held: None,
            };
            known.insert((family, table, name), set);
            ControlFlow::Continue(())
        })?;
        Ok(Self { known, failure: None })
    }

    /// Why elements could not be read, if that happened.
    pub fn failure(self) -> Option<String> {
        self.failure
            .map(|error| format!("sets of other tables can't be read: {error}"))
    }

    /// What a set holds; `None` if that can't be told: it is transient, too large, or its keys are
    /// concatenated.
    pub fn of(&mut self, family: u8, table: &str, set: &str) -> Option<Rc<Held>> {
        let name = (family, table.to_owned(), set.to_owned());
        let known = self.known.get_mut(&name)?;
        if let Some(held) = &known.held {
            return held.clone();
        }
        let held = if known.flags & TRANSIENT != 0 || !(1..=16).contains(&known.key_bytes) {
            None
        } else {
            elements(&name, known.flags, known.key_bytes).unwrap_or_else(|error| {
                self.failure = Some(error);
                None
            })
        };
        let held = held.map(Rc::new);
        known.held = Some(held.clone());
        held
    }
}

struct Element {
    key: u128,
    end: Option<u128>,
    flags: u32,
    verdict: Option<Action>,
}

/// A connection of its own: the rules are still being dumped on the other.
fn elements((family, table, set): &Name, flags: u32, key_bytes: u32) -> Result<Option<Held>, Error> {
    let mut request = vec![*family, 0, 0, 0];
    for (kind, name) in [(NFTA_ELEMENTS_TABLE, table), (NFTA_ELEMENTS_SET, set)] {
        put_text(&mut request, kind, name);
    }
    let mut found = Vec::new();
    open()?.each(&RawMessage::new(GET_ELEMENTS, request), |message| {
        let lists = Attributes::behind(message.payload(), GENMSG).filter(|a| a.kind() == NFTA_ELEMENTS_LIST);
        for list in lists {
            found.extend(Attributes::behind(list.value(), 0).filter_map(|a| element(a.value(), key_bytes)));
        }
        if found.len() > MAX_ELEMENTS {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    })?;
    if found.len() > MAX_ELEMENTS || found.iter().any(|element| element.flags & CATCH_ALL != 0) {
        return Ok(None);
    }
    let mut entries: Vec<_> = if flags & INTERVAL == 0 || found.iter().any(|element| element.end.is_some()) {
        let single = |e: Element| (e.key..=e.end.unwrap_or(e.key), e.verdict);
        found.into_iter().map(single).collect()
    } else {
        intervals(found, key_bytes)
    };
    // A hash has no order; the rule's text should have one.
    entries.sort_by_key(|(range, _)| *range.start());
    Ok(Some(Held { key_bytes, entries }))
}

/// An attribute with a text, as netlink(7) has it: length, kind, text, a zero, and padding to 4.
fn put_text(message: &mut Vec<u8>, kind: u16, text: &str) {
    let length = u16::try_from(text.len() + 5).unwrap_or(u16::MAX);
    message.extend_from_slice(&length.to_ne_bytes());
    message.extend_from_slice(&kind.to_ne_bytes());
    message.extend_from_slice(text.as_bytes());
    message.resize((message.len() + 1).next_multiple_of(4), 0);
}

fn element(attributes: &[u8], key_bytes: u32) -> Option<Element> {
    let (mut key, mut end, mut flags, mut verdict) = (None, None, 0, None);
    for attribute in Attributes::behind(attributes, 0) {
        let data = |kind: u16| {
            let mut parts = Attributes::behind(attribute.value(), 0);
            parts
                .find(|part| part.kind() == kind)
                .map(|part| part.value().to_vec())
        };
        match attribute.kind() {
            NFTA_ELEMENT_KEY => key = data(NFTA_DATA_VALUE).and_then(|bytes| decode::big_endian(&bytes)),
            NFTA_ELEMENT_KEY_END => end = data(NFTA_DATA_VALUE).and_then(|bytes| decode::big_endian(&bytes)),
            NFTA_ELEMENT_FLAGS => flags = number(attribute.value()).unwrap_or_default(),
            NFTA_ELEMENT_DATA => verdict = data(NFTA_DATA_VERDICT).map(|bytes| decode::verdict(&bytes)),
            _ => {}
        }
    }
    // A catch-all element has no key.
    let key = if flags & CATCH_ALL != 0 { Some(0) } else { key };
    Some(Element {
        key: key.filter(|_| key_bytes <= 16)?,
        end,
        flags,
        verdict,
    })
}

/// An interval is its first key and, marked as the end, the key behind its last.
fn intervals(mut elements: Vec<Element>, key_bytes: u32) -> Vec<(RangeInclusive<u128>, Option<Action>)> {
    // At the same key an end comes before a start.
    elements.sort_by_key(|element| (element.key, element.flags & INTERVAL_END == 0));
    let highest = u128::MAX >> (128 - 8 * key_bytes.clamp(1, 16));
    let mut entries = Vec::new();
    let mut open: Option<Element> = None;
    for element in elements {
        if element.flags & INTERVAL_END == 0 {
            open = Some(element);
        } else if let (Some(start), Some(last)) = (open.take(), element.key.checked_sub(1)) {
            entries.push((start.key..=last, start.verdict));
        }
    }
    entries.extend(open.map(|start| (start.key..=highest, start.verdict)));
    entries
}

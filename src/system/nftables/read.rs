//! What the kernel holds, read back into the form that the plan has.
//!
//! Nothing is assumed: what is not exactly as our encoder makes it comes out as foreign, and so
//! differs from every plan.

use std::net::IpAddr;

use netlink_packet_netfilter::nftables::{
    ChainAttribute, GenAttribute, GenMessage, Hook as NftHook, NfTablesMessage, RuleAttribute, RuleMessage,
    SetAttribute, SetElementList, SetElementMessage, SetFlags, SetMessage,
};
use netlink_packet_netfilter::nftables::{ChainMessage, TableAttribute, TableFlags, TableMessage};
use netlink_packet_netfilter::{NetfilterMessage, NetfilterMessageInner};

use super::batch::{Handles, LARGE, TYPE_IFNAME, TYPE_STRING, UDATA_COMMENT, inet};
use super::expression::{Expr, count_of, verdict_of};
use super::lower::{address_of, interface_of, raise};
use super::{Count, Error, Held, Owner};
use crate::policy::ruleset::{
    Chain, Elements, Family, Hook, Rule, Ruleset, Set, TABLE, Verdict, predecessor,
};
use crate::system::netlink::{Attributes, Connection, GENMSG, RawMessage};

/// Attributes of set elements (linux/netfilter/nf_tables.h). They are read from the bytes: the
/// library's parser writes out the rest of the message for each element, which takes minutes for
/// 100,000 of them.
pub const NFTA_SET_ELEM_LIST_ELEMENTS: u16 = 3;
pub const NFTA_SET_ELEM_KEY: u16 = 1;
pub const NFTA_SET_ELEM_FLAGS: u16 = 3;
pub const NFTA_DATA_VALUE: u16 = 1;
const INTERVAL_END: u8 = 1;

/// How often reading starts anew when the rules changed meanwhile.
const TRIES: usize = 5;

/// Reads the table between two equal generation numbers of nf_tables, so that what comes out was
/// true at one moment.
///
/// `known` is what must be there if nf_tables is of that generation, because nobody but us has changed
/// anything since it was read: large sets of it are then not read again.
pub fn read(connection: &mut Connection, known: Option<(&Ruleset, u32)>) -> Result<Option<Held>, Error> {
    for _ in 0..TRIES {
        let before = generation(connection)?;
        let known = known.filter(|(_, generation)| *generation == before);
        let held = read_once(connection, before, known.map(|(ruleset, _)| ruleset));
        if generation(connection)? == before {
            return held;
        }
    }
    Err(Error::Unsteady)
}

fn nftables(messages: Vec<NetfilterMessage>) -> Vec<NfTablesMessage> {
    let inner = messages.into_iter().filter_map(|message| match message.inner {
        NetfilterMessageInner::NfTables(inner) => Some(inner),
        _ => None,
    });
    inner.collect()
}

fn dump(connection: &mut Connection, message: NfTablesMessage) -> Result<Vec<NfTablesMessage>, Error> {
    Ok(nftables(connection.dump(&inet(message))?))
}

/// nf_tables counts its transactions; the number is the same for all tables of a namespace.
pub fn generation(connection: &mut Connection) -> Result<u32, Error> {
    let question = NfTablesMessage::GetGen(GenMessage {
        attributes: Vec::new(),
    });
    let answers = nftables(connection.get(&inet(question))?);
    let id = answers.into_iter().find_map(|message| match message {
        NfTablesMessage::NewGen(generation) => generation.attributes.into_iter().find_map(|a| match a {
            GenAttribute::Id(id) => Some(id),
            _ => None,
        }),
        _ => None,
    });
    id.ok_or(Error::NoAnswer)
}

fn read_once(
    connection: &mut Connection,
    generation: u32,
    known: Option<&Ruleset>,
) -> Result<Option<Held>, Error> {
    let tables = dump(
        connection,
        NfTablesMessage::GetTable(TableMessage {
            attributes: Vec::new(),
        }),
    )?;
    let name = TableAttribute::Name(TABLE.to_owned());
    let ours = tables.into_iter().find_map(|message| match message {
        NfTablesMessage::NewTable(table) if table.attributes.contains(&name) => Some(table.attributes),
        _ => None,
    });
    let Some(table) = ours else { return Ok(None) };
    let (dormant, owner) = table_state(&table, connection.port());
    let (mut chains, handles) = chains(connection)?;
    let mut sets = sets(connection, known)?;
    sets.sort_by(|a, b| a.name.cmp(&b.name));
    chains.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(Some(Held {
        ruleset: Ruleset {
            dormant,
            sets,
            chains,
        },
        owner,
        handles,
        generation,
    }))
}

fn table_state(attributes: &[TableAttribute], our_port: u32) -> (bool, Owner) {
    let (mut flags, mut port) = (TableFlags::empty(), None);
    for attribute in attributes {
        match attribute {
            TableAttribute::Flags(bits) => flags = *bits,
            TableAttribute::Owner(number) => port = Some(*number),
            _ => {}
        }
    }
    let owner = match port {
        Some(port) if port == our_port => Owner::Us,
        Some(port) => Owner::Other(port),
        // The kernel takes the owner's flag away with the owner.
        None if flags.contains(TableFlags::Persisent) => Owner::Orphan,
        None => Owner::Nobody,
    };
    (flags.contains(TableFlags::Dormant), owner)
}

fn sets(connection: &mut Connection, known: Option<&Ruleset>) -> Result<Vec<Set>, Error> {
    let request = SetMessage {
        attributes: vec![SetAttribute::Table(TABLE.to_owned())],
    };
    let mut sets = Vec::new();
    for message in dump(connection, NfTablesMessage::GetSet(request))? {
        let NfTablesMessage::NewSet(set) = message else {
            continue;
        };
        if !set.attributes.contains(&SetAttribute::Table(TABLE.to_owned())) {
            continue;
        }
        let (mut name, mut flags, mut key_type, mut key_len) = (String::new(), SetFlags::empty(), 0, 0);
        for attribute in set.attributes {
            match attribute {
                SetAttribute::Name(text) => name = text,
                SetAttribute::Flags(bits) => flags = bits,
                SetAttribute::KeyType(number) => key_type = number,
                SetAttribute::KeyLen(len) => key_len = len,
                _ => {}
            }
        }
        let known = known
            .and_then(|known| known.set(&name))
            .filter(|set| set.elements.len() > LARGE);
        let elements = match known {
            Some(set) => set.elements.clone(),
            None => elements(flags, key_type, key_len, keys(connection, &name)?),
        };
        sets.push(Set { name, elements });
    }
    Ok(sets)
}

/// A set's keys, and whether each ends an interval.
type Keys = Vec<(Vec<u8>, bool)>;

fn keys(connection: &mut Connection, set: &str) -> Result<Keys, Error> {
    let request = SetElementMessage {
        attributes: vec![
            SetElementList::Table(TABLE.to_owned()),
            SetElementList::Set(set.to_owned()),
        ],
    };
    let mut keys = Vec::new();
    let request = inet(NfTablesMessage::GetSetElement(request));
    for message in connection.dump(&RawMessage::of(&request))? {
        for list in
            Attributes::behind(message.payload(), GENMSG).filter(|a| a.kind() == NFTA_SET_ELEM_LIST_ELEMENTS)
        {
            keys.extend(
                Attributes::behind(list.value(), 0).filter_map(|element| element_key(element.value())),
            );
        }
    }
    Ok(keys)
}

/// The key of an element's attributes, and whether it ends an interval.
pub fn element_key(element: &[u8]) -> Option<(Vec<u8>, bool)> {
    let (mut key, mut is_end) = (None, false);
    for part in Attributes::behind(element, 0) {
        match part.kind() {
            NFTA_SET_ELEM_KEY => {
                key = Attributes::behind(part.value(), 0)
                    .find(|d| d.kind() == NFTA_DATA_VALUE)
                    .map(|d| d.value().to_vec());
            }
            NFTA_SET_ELEM_FLAGS => is_end = part.value().last().is_some_and(|bits| bits & INTERVAL_END != 0),
            _ => {}
        }
    }
    key.map(|key| (key, is_end))
}

fn elements(flags: SetFlags, key_type: u32, key_len: u32, keys: Keys) -> Elements {
    let family = if key_len == 4 { Family::Ipv4 } else { Family::Ipv6 };
    let names = || keys.iter().filter_map(|(key, _)| interface_of(key)).collect();
    match key_type {
        TYPE_IFNAME => return Elements::Interfaces(names()),
        TYPE_STRING => return Elements::Outgoing(names()),
        _ => {}
    }
    if flags.contains(SetFlags::Interval) {
        return Elements::Ranges(family, read_ranges(family, keys));
    }
    Elements::Addresses(
        family,
        keys.iter().filter_map(|(key, _)| address_of(key)).collect(),
    )
}

/// First and last addresses, from starts and from ends that lie one behind the last address.
pub fn read_ranges(family: Family, keys: Vec<(Vec<u8>, bool)>) -> Vec<(IpAddr, IpAddr)> {
    let mut bounds: Vec<(IpAddr, bool)> = keys
        .iter()
        .filter_map(|(key, is_end)| Some((address_of(key)?, !is_end)))
        .collect();
    // At the same address an end comes before a start.
    bounds.sort_unstable();
    let highest = match family {
        Family::Ipv4 => IpAddr::from([255; 4]),
        Family::Ipv6 => IpAddr::from([255; 16]),
    };
    let mut ranges = Vec::new();
    let mut open = None;
    for (address, is_start) in bounds {
        if is_start {
            open = Some(address);
        } else if let (Some(first), Some(last)) = (open.take(), predecessor(address)) {
            ranges.push((first, last));
        }
    }
    ranges.extend(open.map(|first| (first, highest)));
    ranges
}

fn chains(connection: &mut Connection) -> Result<(Vec<Chain>, Handles), Error> {
    let (mut chains, mut handles) = (Vec::new(), Handles::new());
    for message in dump(
        connection,
        NfTablesMessage::GetChain(ChainMessage {
            attributes: Vec::new(),
        }),
    )? {
        let NfTablesMessage::NewChain(chain) = message else {
            continue;
        };
        if !chain
            .attributes
            .contains(&ChainAttribute::Table(TABLE.to_owned()))
        {
            continue;
        }
        let mut name = String::new();
        let (mut place, mut policy, mut is_filter) = (None, None, false);
        for attribute in chain.attributes {
            match attribute {
                ChainAttribute::Name(text) => name = text,
                ChainAttribute::Hook(parts) => place = hook_place(&parts),
                ChainAttribute::Policy(code) => policy = verdict_of(code),
                ChainAttribute::Type(text) => is_filter = text == "filter",
                _ => {}
            }
        }
        // A chain of another type is shown without its hook, and so differs from every plan.
        let hook = place.filter(|_| is_filter).map(|(number, priority)| Hook {
            number,
            priority,
            policy: policy.unwrap_or(Verdict::Accept),
        });
        let (rules, numbers) = rules(connection, &name)?.into_iter().unzip();
        handles.insert(name.clone(), numbers);
        chains.push(Chain { name, hook, rules });
    }
    Ok((chains, handles))
}

fn hook_place(parts: &[NftHook]) -> Option<(u32, i32)> {
    let (mut number, mut priority) = (None, None);
    for part in parts {
        match part {
            NftHook::Number(value) => number = Some((*value).into()),
            NftHook::Priority(value) => priority = Some(value.cast_signed()),
            _ => {}
        }
    }
    Some((number?, priority?))
}

fn rules(connection: &mut Connection, chain: &str) -> Result<Vec<(Rule, u64)>, Error> {
    let request = RuleMessage {
        attributes: vec![
            RuleAttribute::Table(TABLE.to_owned()),
            RuleAttribute::Chain(chain.to_owned()),
        ],
    };
    let mut rules = Vec::new();
    for message in dump(connection, NfTablesMessage::GetRule(request))? {
        let NfTablesMessage::NewRule(rule) = message else {
            continue;
        };
        let is_ours = rule.attributes.contains(&RuleAttribute::Table(TABLE.to_owned()))
            && rule.attributes.contains(&RuleAttribute::Chain(chain.to_owned()));
        if is_ours {
            rules.push(read_rule(rule.attributes));
        }
    }
    Ok(rules)
}

/// The counters of all rules of the gate that have one.
pub fn counts(connection: &mut Connection) -> Result<Vec<(String, Count)>, Error> {
    let request = RuleMessage {
        attributes: vec![RuleAttribute::Table(TABLE.to_owned())],
    };
    let mut counts = Vec::new();
    for message in dump(connection, NfTablesMessage::GetRule(request))? {
        let NfTablesMessage::NewRule(rule) = message else {
            continue;
        };
        if !rule.attributes.contains(&RuleAttribute::Table(TABLE.to_owned())) {
            continue;
        }
        let (mut comment, mut count) = (None, None);
        for attribute in &rule.attributes {
            match attribute {
                RuleAttribute::Expressions(list) => count = list.iter().find_map(count_of),
                RuleAttribute::UserData(bytes) => comment = read_comment(bytes),
                _ => {}
            }
        }
        counts.extend(comment.zip(count));
    }
    Ok(counts)
}

fn read_rule(attributes: Vec<RuleAttribute>) -> (Rule, u64) {
    let (mut comment, mut expressions, mut handle) = (String::new(), Vec::new(), 0);
    for attribute in attributes {
        match attribute {
            RuleAttribute::Expressions(list) => expressions = list.iter().map(Expr::decode).collect(),
            RuleAttribute::Handle(number) => handle = number,
            RuleAttribute::UserData(bytes) => comment = read_comment(&bytes).unwrap_or_default(),
            _ => {}
        }
    }
    (raise(comment, &expressions), handle)
}

fn read_comment(userdata: &[u8]) -> Option<String> {
    let (kind, length) = (userdata.first()?, usize::from(*userdata.get(1)?));
    if *kind != UDATA_COMMENT {
        return None;
    }
    let text = userdata.get(2..(2 + length).checked_sub(1)?)?;
    Some(String::from_utf8_lossy(text).into_owned())
}

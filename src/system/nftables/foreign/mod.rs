//! Other programs' tables, read and never touched. They are read from the bytes: other programs use
//! whatever the kernel knows, and what is not known here must not keep the rest from being read.
//!
//! May not live here: what they mean for us (`policy::conflicts`).

mod decode;
mod sets;
mod xtables;

use std::io;
use std::ops::ControlFlow;

use super::events::NFNLGRP_NFTABLES;
use super::{Error, NETLINK_NETFILTER, read};
use crate::policy::foreign::{Chain, Foreign, Table, TableFamily};
use crate::policy::ruleset::{Hook, TABLE, Verdict};
use crate::system::descriptors::Readable;
use crate::system::netlink::{Attributes, Connection, GENMSG, RawMessage};
pub use decode::rule;
use sets::Sets;

/// How many rules are read, all tables together: with a debug build 10,000 of them are read and judged
/// in 0.17 s, and these in 0.35 s.
const MAX_RULES: usize = 20_000;
/// How often reading starts anew when the rules changed meanwhile.
const TRIES: usize = 5;

/// Message types: `NFNL_SUBSYS_NFTABLES` and `NFT_MSG_GET*` (linux/netfilter/nf_tables.h).
const GET_TABLE: u16 = 10 << 8 | 1;
const GET_CHAIN: u16 = 10 << 8 | 4;
const GET_RULE: u16 = 10 << 8 | 7;
/// `NFPROTO_*` (linux/netfilter.h).
const NFPROTO_INET: u8 = 1;
const NFPROTO_IPV4: u8 = 2;
const NFPROTO_NETDEV: u8 = 5;
const NFPROTO_IPV6: u8 = 10;
/// `NF_INET_INGRESS`: chains of family inet at a device, like those of family netdev.
const INGRESS: u32 = 5;

const NFTA_TABLE_NAME: u16 = 1;
const NFTA_CHAIN_TABLE: u16 = 1;
const NFTA_CHAIN_NAME: u16 = 3;
const NFTA_CHAIN_HOOK: u16 = 4;
const NFTA_CHAIN_POLICY: u16 = 5;
const NFTA_CHAIN_TYPE: u16 = 7;
const NFTA_HOOK_HOOKNUM: u16 = 1;
const NFTA_HOOK_PRIORITY: u16 = 2;
const NFTA_RULE_TABLE: u16 = 1;
const NFTA_RULE_CHAIN: u16 = 2;

/// All tables but ours through which IP packets pass, as they were at one moment.
///
/// # Errors
/// When they can't be read, or kept changing.
pub fn read() -> Result<Foreign, Error> {
    let mut connection = open()?;
    for _ in 0..TRIES {
        let before = read::generation(&mut connection)?;
        let read = read_once();
        match read {
            Err(Error::Io(error)) if error.kind() == io::ErrorKind::Interrupted => {}
            // A set or table may be gone before it is asked for.
            read if read::generation(&mut connection)? == before => return read,
            _ => {}
        }
    }
    Err(Error::Unsteady)
}

/// Tells of changes of nf_tables, whoever made them.
pub struct Changes {
    connection: Readable<Connection>,
}

impl Changes {
    /// Subscribes.
    ///
    /// # Errors
    /// As [`super::Nftables::open`].
    pub fn open() -> Result<Self, Error> {
        let connection = Connection::open(NETLINK_NETFILTER, &[NFNLGRP_NFTABLES])?;
        connection.set_nonblocking()?;
        Ok(Self {
            connection: Readable::new(connection)?,
        })
    }

    /// Waits for a change, and takes those that are told by then with it. Lost events count as one.
    ///
    /// # Errors
    /// As recv(2).
    pub async fn next(&self) -> io::Result<()> {
        self.connection.read(Connection::drain).await
    }
}

fn open() -> Result<Connection, Error> {
    Ok(Connection::open(NETLINK_NETFILTER, &[])?)
}

/// A request for all families.
fn everything(kind: u16) -> RawMessage {
    RawMessage::new(kind, vec![0; GENMSG])
}

fn family(payload: &[u8]) -> Option<TableFamily> {
    match payload.first().copied()? {
        NFPROTO_INET => Some(TableFamily::Inet),
        NFPROTO_IPV4 => Some(TableFamily::Ip),
        NFPROTO_IPV6 => Some(TableFamily::Ip6),
        _ => None,
    }
}

fn read_once() -> Result<Foreign, Error> {
    let mut foreign = Foreign::default();
    let mut connection = open()?;
    connection.each(&everything(GET_TABLE), |message| {
        take_table(message.payload(), &mut foreign);
        ControlFlow::Continue(())
    })?;
    if foreign.tables.is_empty() {
        return Ok(foreign);
    }
    connection.each(&everything(GET_CHAIN), |message| {
        take_chain(message.payload(), &mut foreign);
        ControlFlow::Continue(())
    })?;
    let mut sets = Sets::read(&mut connection)?;
    let mut rules = 0;
    connection.each(&everything(GET_RULE), |message| {
        if rules == MAX_RULES {
            return ControlFlow::Break(());
        }
        rules += usize::from(take_rule(message.payload(), &mut foreign, &mut sets));
        ControlFlow::Continue(())
    })?;
    if rules == MAX_RULES {
        // Half of a table would be judged wrongly.
        foreign = Foreign {
            unread: vec![format!(
                "other tables hold {MAX_RULES} rules or more, which are not looked into: \
                 put what they match into sets"
            )],
            ..Foreign::default()
        };
    }
    foreign.unread.extend(sets.failure());
    Ok(foreign)
}

/// Text of an attribute: up to its zero, and on one line. Names may hold any byte, and end up in reports.
fn text(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes.split(|byte| *byte == 0).next().unwrap_or_default());
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        match c.is_control() {
            true => shown.extend(c.escape_default()),
            false => shown.push(c),
        }
    }
    shown
}

/// A big-endian number of 4 bytes.
fn number(bytes: &[u8]) -> Option<u32> {
    Some(u32::from_be_bytes(bytes.get(..4)?.try_into().ok()?))
}

/// Adds the table of a message, unless it is ours.
pub fn take_table(payload: &[u8], foreign: &mut Foreign) {
    let name = Attributes::behind(payload, GENMSG).find(|a| a.kind() == NFTA_TABLE_NAME);
    let Some(name) = name.map(|a| text(a.value())) else {
        return;
    };
    match family(payload) {
        Some(TableFamily::Inet) if name == TABLE => {}
        Some(family) => foreign.tables.push(Table::new(family, name, false)),
        None if payload.first() == Some(&NFPROTO_NETDEV) => foreign.unread.push(format!(
            "table netdev {name} filters at a device and is not looked into: see `nft list table netdev {name}`"
        )),
        // Bridges and ARP: not on the way of a packet to this host.
        None => {}
    }
}

fn table<'a>(payload: &[u8], name: &str, foreign: &'a mut Foreign) -> Option<&'a mut Table> {
    let family = family(payload)?;
    foreign
        .tables
        .iter_mut()
        .find(|table| table.family == family && table.name == name)
}

/// Adds the chain of a message to its table, if that is one of them.
pub fn take_chain(payload: &[u8], foreign: &mut Foreign) {
    let (mut of, mut name, mut kind, mut place, mut policy) =
        (String::new(), String::new(), String::new(), None, Verdict::Accept);
    for attribute in Attributes::behind(payload, GENMSG) {
        let value = attribute.value();
        match attribute.kind() {
            NFTA_CHAIN_TABLE => of = text(value),
            NFTA_CHAIN_NAME => name = text(value),
            NFTA_CHAIN_TYPE => kind = text(value),
            NFTA_CHAIN_HOOK => place = hook(value),
            // NF_DROP is 0.
            NFTA_CHAIN_POLICY if number(value) == Some(0) => policy = Verdict::Drop,
            _ => {}
        }
    }
    let Some(table) = table(payload, &of, foreign) else {
        return;
    };
    let shown = format!("{table}");
    let hook = place.map(|(number, priority)| Hook {
        number,
        priority,
        policy,
    });
    let ingress =
        table.family == TableFamily::Inet && hook.as_ref().is_some_and(|hook| hook.number == INGRESS);
    let chain = Chain {
        hook,
        nat: kind == "nat",
        rules: Vec::new(),
    };
    if ingress {
        foreign.unread.push(format!(
            "chain {name} of table {shown} filters at a device and is not looked into: see `nft list chain {shown} {name}`"
        ));
    }
    if let Some(table) = self::table(payload, &of, foreign) {
        table.chains.insert(name, chain);
    }
}

fn hook(nested: &[u8]) -> Option<(u32, i32)> {
    let (mut hook, mut priority) = (None, None);
    for attribute in Attributes::behind(nested, 0) {
        match attribute.kind() {
            NFTA_HOOK_HOOKNUM => hook = number(attribute.value()),
            NFTA_HOOK_PRIORITY => priority = number(attribute.value()).map(u32::cast_signed),
            _ => {}
        }
    }
    Some((hook?, priority?))
}

/// Whether it is a rule of one of the tables.
fn take_rule(payload: &[u8], foreign: &mut Foreign, sets: &mut Sets) -> bool {
    let (mut of, mut chain) = (String::new(), String::new());
    for attribute in Attributes::behind(payload, GENMSG) {
        match attribute.kind() {
            NFTA_RULE_TABLE => of = text(attribute.value()),
            NFTA_RULE_CHAIN => chain = text(attribute.value()),
            _ => {}
        }
    }
    let family = payload.first().copied().unwrap_or_default();
    let found = table(payload, &of, foreign).and_then(|table| table.chains.get_mut(&chain));
    let Some(found) = found else { return false };
    let rule = decode::rule(Attributes::behind(payload, GENMSG), |set| {
        sets.of(family, &of, set)
    });
    found.rules.push(rule);
    true
}

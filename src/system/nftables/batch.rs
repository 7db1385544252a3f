//! A ruleset, or steps from one to another, as one netlink batch.
//!
//! May not live here: sockets, the meaning of rules.

use std::collections::BTreeMap;

use netlink_packet_core::{
    DefaultNla, NLA_F_NESTED, NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REQUEST,
};
use netlink_packet_netfilter::nftables::{
    ChainAttribute, ChainMessage, Hook as NftHook, HookNumber, NfTablesMessage, RuleAttribute, RuleMessage,
    SetAttribute, SetDescription, SetElementFlags, SetElementList, SetElementMessage, SetFlags, SetMessage,
    TableAttribute, TableFlags, TableMessage,
};
use netlink_packet_netfilter::none::ControlMessage;
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily,
};

use super::expression::{NFT_FIB_RESULT_OIFNAME, NFTA_FIB_F_DADDR, verdict_code};
use super::lower::{address_bytes, interface_bytes, lower};
use super::read::{NFTA_DATA_VALUE, NFTA_SET_ELEM_FLAGS, NFTA_SET_ELEM_KEY, NFTA_SET_ELEM_LIST_ELEMENTS};
use crate::policy::ruleset::change::Step;
use crate::policy::ruleset::{Chain, Elements, Family, Rule, Ruleset, Set, TABLE, successor};
use crate::system::netlink::encode;

/// `NFNL_SUBSYS_NFTABLES`, which a batch names as its subsystem.
const SUBSYSTEM: u16 = 10;

/// A set has room for twice as many addresses at least. More costs the kernel time: its hash table is one
/// piece of memory.
const ROOM: usize = 1 << 12;

/// Elements in one message: an attribute's length is 16 bits, and an element of the largest kind
/// takes under 40 bytes.
const ELEMENTS_A_MESSAGE: usize = 1000;

/// An element of the most common kind, an IPv4 address, in bytes.
const ELEMENT_BYTES: usize = 16;

/// `NFTA_LIST_ELEM` (linux/netfilter/nf_tables.h).
const NFTA_LIST_ELEM: u16 = 1;

/// Data types as nft(8) numbers them (include/datatype.h of nftables); only for its listings.
const TYPE_IPADDR: u32 = 7;
const TYPE_IP6ADDR: u32 = 8;
pub const TYPE_IFNAME: u32 = 41;
pub const TYPE_STRING: u32 = 5;

/// `NFTNL_UDATA_RULE_COMMENT` of libnftnl, as nft(8) shows it.
pub const UDATA_COMMENT: u8 = 0;
const UDATA_SET_KEY_BYTE_ORDER: u8 = 0;
const UDATA_SET_KEY_TYPEOF: u8 = 3;

/// Message header of the `inet` family.
pub fn header(family: NetfilterProtoFamily, resource: u16) -> NetfilterHeader {
    NetfilterHeader::new(family, 0, resource)
}

/// A message about our table.
pub fn inet(message: NfTablesMessage) -> NetfilterMessage {
    NetfilterMessage::new(header(NetfilterProtoFamily::Inet, 0), message)
}

/// `NFNL_BATCH_GENID`: the kernel refuses the batch with `ERESTART` if its rules are no longer of this
/// generation (linux/netfilter/nfnetlink.h).
const BATCH_GENERATION: u16 = 1;
/// `NFNL_MSG_BATCH_BEGIN`.
const BATCH_BEGIN: u8 = 16;

/// A set with more elements comes after the table is shut: see [`super::Nftables::replace`].
pub const LARGE: usize = 2048;

/// A batch, ready to be sent, that remembers what each message asked for.
pub struct Batch {
    bytes: Vec<u8>,
    objects: Vec<(u32, String)>,
}

/// The kernel's numbers of the held rules, in the order of each chain.
pub type Handles = BTreeMap<String, Vec<u64>>;

impl Batch {
    /// A batch that puts this ruleset in the place of whatever the table holds.
    pub fn replacing(ruleset: &Ruleset, exclusive: bool, mut next_sequence: impl FnMut() -> u32) -> Self {
        let mut messages = vec![
            // Adding first makes the removal valid also when there is no table yet.
            message("table", NLM_F_CREATE, NfTablesMessage::NewTable(table())),
            message(
                "removal of the old table",
                0,
                NfTablesMessage::DeleteTable(table()),
            ),
            message(
                if exclusive { EXCLUSIVE_TABLE } else { "table" },
                NLM_F_CREATE,
                NfTablesMessage::NewTable(if exclusive { exclusive_table() } else { table() }),
            ),
        ];
        for (id, set) in (1..).zip(&ruleset.sets) {
            messages.push(add_set(set, id));
            messages.extend(add_elements(set));
        }
        for chain in &ruleset.chains {
            messages.push(message(
                format!("chain {}", chain.name),
                NLM_F_CREATE,
                new_chain(chain),
            ));
            let rules = chain.rules.iter();
            messages.extend(rules.map(|rule| add_rule(&chain.name, rule, NLM_F_APPEND, None)));
        }
        Self::new(messages, None, &mut next_sequence)
    }

    /// Makes the table that is there exclusive.
    pub fn adopting(mut next_sequence: impl FnMut() -> u32) -> Self {
        let table = NfTablesMessage::NewTable(exclusive_table());
        Self::new(
            vec![message(EXCLUSIVE_TABLE, NLM_F_CREATE, table)],
            None,
            &mut next_sequence,
        )
    }

    /// A batch that every kernel refuses: for its end, or, if the kernel does not know exclusive tables, for
    /// its begin already.
    pub fn probing(mut next_sequence: impl FnMut() -> u32) -> Self {
        let mut table = exclusive_table();
        table.attributes[0] = TableAttribute::Name(PROBE.to_owned());
        let twice = [(EXCLUSIVE_TABLE, 0), ("the same once more", NLM_F_EXCL)];
        let messages = twice.map(|(object, flags)| {
            message(
                object,
                NLM_F_CREATE | flags,
                NfTablesMessage::NewTable(table.clone()),
            )
        });
        Self::new(messages.into(), None, &mut next_sequence)
    }

    /// A batch that does these steps, if the kernel's rules are still of that generation. None if a
    /// step names a rule that is not there.
    pub fn changing(
        steps: &[Step],
        handles: &Handles,
        generation: u32,
        mut next_sequence: impl FnMut() -> u32,
    ) -> Option<Self> {
        let mut messages = Vec::new();
        for (id, step) in (1..).zip(steps) {
            step_messages(step, id, handles, &mut messages)?;
        }
        Some(Self::new(messages, Some(generation), &mut next_sequence))
    }

    fn new(messages: Vec<Message>, generation: Option<u32>, next_sequence: &mut impl FnMut() -> u32) -> Self {
        let control = |inner| {
            let header = header(NetfilterProtoFamily::Unspec, SUBSYSTEM);
            NetfilterMessage::new(header, NetfilterMessageInner::None(inner))
        };
        let begin = match generation {
            None => ControlMessage::BatchBegin,
            Some(generation) => ControlMessage::Other {
                message_type: BATCH_BEGIN,
                attributes: vec![DefaultNla::new(
                    BATCH_GENERATION,
                    generation.to_be_bytes().to_vec(),
                )],
            },
        };
        let mut bytes = encode(control(begin), next_sequence(), NLM_F_REQUEST);
        let mut objects = Vec::with_capacity(messages.len());
        let last = messages.len().saturating_sub(1);
        for (i, message) in messages.into_iter().enumerate() {
            let sequence = next_sequence();
            // Success is silent: only an acknowledgement of the last message tells it.
            let ack = if i == last { NLM_F_ACK } else { 0 };
            bytes.extend(encode(
                inet(message.inner),
                sequence,
                NLM_F_REQUEST | message.flags | ack,
            ));
            objects.push((sequence, message.object));
        }
        bytes.extend(encode(
            control(ControlMessage::BatchEnd),
            next_sequence(),
            NLM_F_REQUEST,
        ));
        Self { bytes, objects }
    }

    /// The bytes to send, in one piece.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// What the message of that number asked for.
    pub fn object(&self, sequence: u32) -> Option<&str> {
        self.objects
            .iter()
            .find(|(number, _)| *number == sequence)
            .map(|(_, object)| object.as_str())
    }

    /// Number of the message that is acknowledged.
    pub fn last_sequence(&self) -> u32 {
        self.objects.last().map_or(0, |(number, _)| *number)
    }
}

struct Message {
    object: String,
    flags: u16,
    inner: NfTablesMessage,
}

fn message(object: impl Into<String>, flags: u16, inner: NfTablesMessage) -> Message {
    Message {
        object: object.into(),
        flags,
        inner,
    }
}

fn table() -> TableMessage {
    TableMessage {
        attributes: vec![TableAttribute::Name(TABLE.to_owned())],
    }
}

/// What the message for [`exclusive_table`] is called: the kernel may lack just that.
pub const EXCLUSIVE_TABLE: &str = "table that only this process may change";
/// A table that never is.
const PROBE: &str = "portcullis.probe";

/// Only the socket that made it may change it (`owner`, Linux 5.12), and it outlives that socket
/// (`persist`, Linux 6.9).
fn exclusive_table() -> TableMessage {
    let mut message = table();
    let flags = TableFlags::Owner | TableFlags::Persisent;
    message.attributes.push(TableAttribute::Flags(flags));
    message
}

fn step_messages(step: &Step, id: u32, handles: &Handles, messages: &mut Vec<Message>) -> Option<()> {
    match step {
        Step::AddSet(set) => {
            messages.push(add_set(set, id));
            messages.extend(add_elements(set));
        }
        Step::AddElements(set) => messages.extend(add_elements(set)),
        Step::RemoveElements(set) => messages.extend(chunks(set).map(|chunk| {
            let what = format!("removal of elements of set {}", set.name);
            message(what, 0, NfTablesMessage::DeleteSetElement(chunk))
        })),
        Step::Empty(name) => {
            let all = elements_message(name, None);
            let what = format!("removal of all elements of set {name}");
            messages.push(message(what, 0, NfTablesMessage::DeleteSetElement(all)));
        }
        Step::AddRules { chain, after, rules } => {
            let position = match after {
                Some(index) => Some(*handles.get(chain)?.get(*index)?),
                None => None,
            };
            let append = if position.is_some() { NLM_F_APPEND } else { 0 };
            // Each goes to the same place, so the last one goes first.
            let rules = rules.iter().rev();
            messages.extend(rules.map(|rule| add_rule(chain, rule, append, position)));
        }
        Step::RemoveRule { chain, index } => {
            let handle = *handles.get(chain)?.get(*index)?;
            let what = format!("removal of rule {handle} of chain {chain}");
            messages.push(message(
                what,
                0,
                NfTablesMessage::DeleteRule(held_rule(chain, handle)),
            ));
        }
        Step::RemoveSet(name) => {
            let attributes = vec![
                SetAttribute::Table(TABLE.to_owned()),
                SetAttribute::Name(name.clone()),
            ];
            let what = format!("removal of set {name}");
            messages.push(message(
                what,
                0,
                NfTablesMessage::DeleteSet(SetMessage { attributes }),
            ));
        }
    }
    Some(())
}

fn add_set(set: &Set, id: u32) -> Message {
    message(format!("set {}", set.name), NLM_F_CREATE, new_set(set, id))
}

fn add_elements(set: &Set) -> impl Iterator<Item = Message> {
    chunks(set).map(|chunk| {
        let what = format!("elements of set {}", set.name);
        message(what, NLM_F_CREATE, NfTablesMessage::NewSetElement(chunk))
    })
}

/// The elements in as many messages as they need.
fn chunks(set: &Set) -> impl Iterator<Item = SetElementMessage> {
    let elements = elements(set);
    let chunks: Vec<_> = elements
        .chunks(ELEMENTS_A_MESSAGE)
        .map(|chunk| elements_message(&set.name, Some(chunk)))
        .collect();
    chunks.into_iter()
}

fn add_rule(chain: &str, rule: &Rule, place: u16, position: Option<u64>) -> Message {
    let what = format!("rule {:?}", rule.comment);
    message(what, NLM_F_CREATE | place, new_rule(chain, rule, position))
}

fn held_rule(chain: &str, handle: u64) -> RuleMessage {
    RuleMessage {
        attributes: vec![
            RuleAttribute::Table(TABLE.to_owned()),
            RuleAttribute::Chain(chain.to_owned()),
            RuleAttribute::Handle(handle),
        ],
    }
}

fn new_set(set: &Set, id: u32) -> NfTablesMessage {
    let (key_type, key_len, flags) = match &set.elements {
        Elements::Interfaces(_) => (TYPE_IFNAME, 16, SetFlags::empty()),
        Elements::Outgoing(_) => (TYPE_STRING, 16, SetFlags::empty()),
        Elements::Addresses(Family::Ipv4, _) => (TYPE_IPADDR, 4, SetFlags::empty()),
        Elements::Addresses(Family::Ipv6, _) => (TYPE_IP6ADDR, 16, SetFlags::empty()),
        Elements::Ranges(Family::Ipv4, _) => (TYPE_IPADDR, 4, SetFlags::Interval),
        Elements::Ranges(Family::Ipv6, _) => (TYPE_IP6ADDR, 16, SetFlags::Interval),
    };
    let mut attributes = vec![
        SetAttribute::Table(TABLE.to_owned()),
        SetAttribute::Name(set.name.clone()),
        SetAttribute::Flags(flags),
        SetAttribute::KeyType(key_type),
        SetAttribute::KeyLen(key_len),
        SetAttribute::Id(id),
    ];
    if let Elements::Addresses(_, addresses) = &set.elements {
        // Sizes the hash table at once. Room is left, since a set of a fixed size takes no more; then
        // the kernel answers ENFILE.
        let size = addresses.len().next_power_of_two().max(ROOM) * 2;
        let size = u32::try_from(size).unwrap_or(u32::MAX);
        attributes.push(SetAttribute::Description(vec![SetDescription::Size(size)]));
    }
    match &set.elements {
        // Without it nft(8) turns the names around and lists them as empty.
        Elements::Interfaces(_) => attributes.push(SetAttribute::UserData(key_byte_order())),
        // Without it nft(8) does not take its own listing back: the types would differ.
        Elements::Outgoing(_) => {
            let notes = [key_byte_order(), type_of_outgoing()].concat();
            attributes.push(SetAttribute::UserData(notes));
        }
        _ => {}
    }
    NfTablesMessage::NewSet(SetMessage { attributes })
}

/// A key, and whether it ends an interval.
type Element = (Vec<u8>, bool);

fn elements(set: &Set) -> Vec<Element> {
    let start = |key| (key, false);
    match &set.elements {
        Elements::Interfaces(names) | Elements::Outgoing(names) => {
            names.iter().map(|name| start(interface_bytes(name))).collect()
        }
        Elements::Addresses(_, addresses) => addresses.iter().map(|a| start(address_bytes(a))).collect(),
        // An interval is its first address and, marked as the end, the address after its last.
        Elements::Ranges(_, ranges) => ranges
            .iter()
            .flat_map(|(first, last)| {
                let end = successor(*last).map(|after| (address_bytes(after), true));
                [Some(start(address_bytes(*first))), end].into_iter().flatten()
            })
            .collect(),
    }
}

/// Without elements, all of the set are meant.
fn elements_message(set: &str, elements: Option<&[Element]>) -> SetElementMessage {
    let mut attributes = vec![
        SetElementList::Table(TABLE.to_owned()),
        SetElementList::Set(set.to_owned()),
    ];
    attributes.extend(elements.map(|elements| {
        let mut list = Vec::with_capacity(elements.len() * ELEMENT_BYTES);
        for element in elements {
            nested(&mut list, NFTA_LIST_ELEM, |list| {
                element_attributes(list, element)
            });
        }
        SetElementList::Other(DefaultNla::new(NFTA_SET_ELEM_LIST_ELEMENTS | NLA_F_NESTED, list))
    }));
    SetElementMessage { attributes }
}

/// As bytes: values of the library's types for each element would take longer to make and to write than
/// the kernel takes to do what they say.
fn element_attributes(bytes: &mut Vec<u8>, (key, is_end): &Element) {
    if *is_end {
        let flags = SetElementFlags::IntervalEnd.bits().to_be_bytes();
        attribute(bytes, NFTA_SET_ELEM_FLAGS, |bytes| bytes.extend(flags));
    }
    nested(bytes, NFTA_SET_ELEM_KEY, |bytes| {
        attribute(bytes, NFTA_DATA_VALUE, |bytes| bytes.extend(key));
    });
}

fn nested(bytes: &mut Vec<u8>, kind: u16, inside: impl FnOnce(&mut Vec<u8>)) {
    attribute(bytes, kind | NLA_F_NESTED, inside);
}

/// `struct nlattr` and what `inside` writes, which has to fill whole words, as all keys do.
fn attribute(bytes: &mut Vec<u8>, kind: u16, inside: impl FnOnce(&mut Vec<u8>)) {
    let start = bytes.len();
    bytes.extend([0; 2]);
    bytes.extend(kind.to_ne_bytes());
    inside(bytes);
    let length = u16::try_from(bytes.len() - start).unwrap_or(u16::MAX);
    if let Some(place) = bytes.get_mut(start..start + 2) {
        place.copy_from_slice(&length.to_ne_bytes());
    }
}

fn new_chain(chain: &Chain) -> NfTablesMessage {
    let mut attributes = vec![
        ChainAttribute::Table(TABLE.to_owned()),
        ChainAttribute::Name(chain.name.clone()),
    ];
    if let Some(hook) = &chain.hook {
        attributes.extend([
            ChainAttribute::Hook(vec![
                NftHook::Number(HookNumber::Other(hook.number)),
                NftHook::Priority(hook.priority.cast_unsigned()),
            ]),
            ChainAttribute::Policy(verdict_code(hook.policy)),
            ChainAttribute::Type("filter".to_owned()),
        ]);
    }
    NfTablesMessage::NewChain(ChainMessage { attributes })
}

fn new_rule(chain: &str, rule: &Rule, position: Option<u64>) -> NfTablesMessage {
    let mut attributes = vec![
        RuleAttribute::Table(TABLE.to_owned()),
        RuleAttribute::Chain(chain.to_owned()),
        RuleAttribute::Expressions(lower(rule).iter().map(super::expression::Expr::encode).collect()),
        RuleAttribute::UserData(comment_bytes(&rule.comment)),
    ];
    attributes.extend(position.map(RuleAttribute::Position));
    NfTablesMessage::NewRule(RuleMessage { attributes })
}

/// That keys are in the host's byte order, as nft(8) notes it for its own sets (libnftnl, `NFTNL_UDATA_SET_KEYBYTEORDER`).
fn key_byte_order() -> Vec<u8> {
    const HOST_ENDIAN: u32 = 1;
    note(UDATA_SET_KEY_BYTE_ORDER, &HOST_ENDIAN.to_ne_bytes())
}

/// That keys are what `fib daddr oifname` gives (libnftnl, `NFTNL_UDATA_SET_KEY_TYPEOF`; nftables,
/// `EXPR_FIB` and `fib_expr_build_udata`).
fn type_of_outgoing() -> Vec<u8> {
    const FIB: u32 = 26;
    let number = |kind, value: u32| note(kind, &value.to_ne_bytes());
    let result_and_flags = [number(0, NFT_FIB_RESULT_OIFNAME), number(1, NFTA_FIB_F_DADDR)].concat();
    let expression = [number(0, FIB), note(1, &result_and_flags)].concat();
    note(UDATA_SET_KEY_TYPEOF, &expression)
}

/// Kind, length, value: how nft(8) writes notes for itself.
fn note(kind: u8, value: &[u8]) -> Vec<u8> {
    let length = u8::try_from(value.len()).unwrap_or(u8::MAX);
    [&[kind, length], value].concat()
}

/// Type, length, text and a zero. Comments are ids with a short word before them: under 128 bytes.
fn comment_bytes(comment: &str) -> Vec<u8> {
    let text = comment.as_bytes();
    let mut bytes = vec![UDATA_COMMENT, u8::try_from(text.len() + 1).unwrap_or(u8::MAX)];
    bytes.extend_from_slice(text);
    bytes.push(0);
    bytes
}

//! A ruleset as one netlink batch.
//!
//! May not live here: sockets, the meaning of rules.

use netlink_packet_core::{NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_REQUEST};
use netlink_packet_netfilter::nftables::{
    ChainAttribute, ChainMessage, DataAttribute, Hook as NftHook, HookNumber, ListAttribute, NfTablesMessage,
    RuleAttribute, RuleMessage, SetAttribute, SetDescription, SetElementAttribute, SetElementFlags,
    SetElementList, SetElementMessage, SetFlags, SetMessage, TableAttribute, TableMessage,
};
use netlink_packet_netfilter::none::ControlMessage;
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily,
};

use super::expression::verdict_code;
use super::lower::{address_bytes, interface_bytes, lower};
use crate::policy::ruleset::{Chain, Elements, Family, Rule, Ruleset, Set, TABLE, successor};
use crate::system::netlink::encode;

/// `NFNL_SUBSYS_NFTABLES`, which a batch names as its subsystem.
const SUBSYSTEM: u16 = 10;

/// Elements in one message: an attribute's length is 16 bits, and an element of the largest kind
/// takes under 40 bytes.
const ELEMENTS_A_MESSAGE: usize = 1000;

/// Data types as nft(8) numbers them (include/datatype.h of nftables); only for its listings.
const TYPE_IPADDR: u32 = 7;
const TYPE_IP6ADDR: u32 = 8;
pub const TYPE_IFNAME: u32 = 41;

/// `NFTNL_UDATA_RULE_COMMENT` of libnftnl, as nft(8) shows it.
pub const UDATA_COMMENT: u8 = 0;
const UDATA_SET_KEY_BYTE_ORDER: u8 = 0;

/// Message header of the `inet` family.
pub fn header(family: NetfilterProtoFamily, resource: u16) -> NetfilterHeader {
    NetfilterHeader::new(family, 0, resource)
}

/// A message about our table.
pub fn inet(message: NfTablesMessage) -> NetfilterMessage {
    NetfilterMessage::new(header(NetfilterProtoFamily::Inet, 0), message)
}

/// A batch, ready to be sent, that remembers what each message asked for.
pub struct Batch {
    bytes: Vec<u8>,
    objects: Vec<(u32, String)>,
}

impl Batch {
    /// A batch that puts this ruleset in the place of whatever the table holds.
    pub fn replacing(ruleset: &Ruleset, mut next_sequence: impl FnMut() -> u32) -> Self {
        let mut messages = vec![
            // Adding first makes the removal valid also when there is no table yet.
            message("table", NLM_F_CREATE, NfTablesMessage::NewTable(table())),
            message(
                "removal of the old table",
                0,
                NfTablesMessage::DeleteTable(table()),
            ),
            message("table", NLM_F_CREATE, NfTablesMessage::NewTable(table())),
        ];
        for (id, set) in (1..).zip(&ruleset.sets) {
            messages.push(message(
                format!("set {}", set.name),
                NLM_F_CREATE,
                new_set(set, id),
            ));
            let elements = elements(set);
            for chunk in elements.chunks(ELEMENTS_A_MESSAGE) {
                let what = format!("elements of set {}", set.name);
                messages.push(message(what, NLM_F_CREATE, new_elements(set, chunk)));
            }
        }
        for chain in &ruleset.chains {
            messages.push(message(
                format!("chain {}", chain.name),
                NLM_F_CREATE,
                new_chain(chain),
            ));
            for rule in &chain.rules {
                let what = format!("rule {:?}", rule.comment);
                messages.push(message(what, NLM_F_CREATE | NLM_F_APPEND, new_rule(chain, rule)));
            }
        }
        Self::new(messages, &mut next_sequence)
    }

    fn new(messages: Vec<Message>, next_sequence: &mut impl FnMut() -> u32) -> Self {
        let control = |inner| {
            let header = header(NetfilterProtoFamily::Unspec, SUBSYSTEM);
            NetfilterMessage::new(header, NetfilterMessageInner::None(inner))
        };
        let mut bytes = encode(
            control(ControlMessage::BatchBegin),
            next_sequence(),
            NLM_F_REQUEST,
        );
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

fn new_set(set: &Set, id: u32) -> NfTablesMessage {
    let (key_type, key_len, flags) = match &set.elements {
        Elements::Interfaces(_) => (TYPE_IFNAME, 16, SetFlags::empty()),
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
        // Sizes the hash table at once. Room is left, since a set of a fixed size takes no more.
        let size = addresses.len().next_power_of_two().max(1 << 16) * 2;
        let size = u32::try_from(size).unwrap_or(u32::MAX);
        attributes.push(SetAttribute::Description(vec![SetDescription::Size(size)]));
    }
    if let Elements::Interfaces(_) = &set.elements {
        // Without it nft(8) turns the names around and lists them as empty.
        attributes.push(SetAttribute::UserData(key_byte_order()));
    }
    NfTablesMessage::NewSet(SetMessage { attributes })
}

type Element = ListAttribute<SetElementAttribute>;

fn element(key: Vec<u8>) -> Element {
    ListAttribute::Element(vec![SetElementAttribute::Key(DataAttribute::Value(key))])
}

fn elements(set: &Set) -> Vec<Element> {
    match &set.elements {
        Elements::Interfaces(names) => names.iter().map(|name| element(interface_bytes(name))).collect(),
        Elements::Addresses(_, addresses) => addresses.iter().map(|a| element(address_bytes(*a))).collect(),
        // An interval is its first address and, marked as the end, the address after its last.
        Elements::Ranges(_, ranges) => ranges
            .iter()
            .flat_map(|(first, last)| {
                let end = successor(*last).map(|after| {
                    ListAttribute::Element(vec![
                        SetElementAttribute::Flags(SetElementFlags::IntervalEnd),
                        SetElementAttribute::Key(DataAttribute::Value(address_bytes(after))),
                    ])
                });
                [Some(element(address_bytes(*first))), end].into_iter().flatten()
            })
            .collect(),
    }
}

fn new_elements(set: &Set, elements: &[Element]) -> NfTablesMessage {
    NfTablesMessage::NewSetElement(SetElementMessage {
        attributes: vec![
            SetElementList::Table(TABLE.to_owned()),
            SetElementList::Set(set.name.clone()),
            SetElementList::Elements(elements.to_vec()),
        ],
    })
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

fn new_rule(chain: &Chain, rule: &Rule) -> NfTablesMessage {
    NfTablesMessage::NewRule(RuleMessage {
        attributes: vec![
            RuleAttribute::Table(TABLE.to_owned()),
            RuleAttribute::Chain(chain.name.clone()),
            RuleAttribute::Expressions(lower(rule).iter().map(super::expression::Expr::encode).collect()),
            RuleAttribute::UserData(comment_bytes(&rule.comment)),
        ],
    })
}

/// That keys are in the host's byte order, as nft(8) notes it for its own sets (libnftnl, `NFTNL_UDATA_SET_KEYBYTEORDER`).
fn key_byte_order() -> Vec<u8> {
    const HOST_ENDIAN: u32 = 1;
    let mut bytes = vec![UDATA_SET_KEY_BYTE_ORDER, 4];
    bytes.extend(HOST_ENDIAN.to_ne_bytes());
    bytes
}

/// Type, length, text and a zero. Comments are ids with a short word before them: under 128 bytes.
fn comment_bytes(comment: &str) -> Vec<u8> {
    let text = comment.as_bytes();
    let mut bytes = vec![UDATA_COMMENT, u8::try_from(text.len() + 1).unwrap_or(u8::MAX)];
    bytes.extend_from_slice(text);
    bytes.push(0);
    bytes
}

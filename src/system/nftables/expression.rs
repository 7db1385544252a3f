//! The kernel's expressions, as far as our rules use them, to and from netlink attributes
//! (linux/netfilter/nf_tables.h). All of them work on register 1.
//!
//! May not live here: which expressions make up a condition (`lower`).

use netlink_packet_core::{DefaultNla, Nla};
use netlink_packet_netfilter::nftables::{
    Bitwise, Cmp, DataAttribute, ExpressionAttribute, Expressions, Immediate, ListAttribute, Lookup, Meta,
    MetaKey, Operator, Payload, Register, Verdict as NftVerdict, VerdictAttribute,
};

use super::Count;
use crate::policy::ruleset::{Log, Verdict};

const NFTA_CT_DREG: u16 = 1;
const NFTA_CT_KEY: u16 = 2;
const NFT_CT_STATE: u32 = 0;
const NFT_CT_DIRECTION: u32 = 1;
const NFTA_COUNTER_BYTES: u16 = 1;
const NFTA_COUNTER_PACKETS: u16 = 2;
const NFTA_LIMIT_RATE: u16 = 1;
const NFTA_LIMIT_UNIT: u16 = 2;
const NFTA_LIMIT_BURST: u16 = 3;
const NFTA_LIMIT_TYPE: u16 = 4;
const NFTA_LIMIT_FLAGS: u16 = 5;
const NFT_LIMIT_PKTS: u32 = 0;
const NFTA_LOG_GROUP: u16 = 1;
const NFTA_LOG_SNAPLEN: u16 = 3;
const NFTA_REJECT_TYPE: u16 = 1;
const NFTA_REJECT_ICMP_CODE: u16 = 2;
const NFT_REJECT_ICMPX_UNREACH: u32 = 2;
const NFT_REJECT_ICMPX_PORT_UNREACH: u8 = 1;
const NFTA_FIB_DREG: u16 = 1;
const NFTA_FIB_RESULT: u16 = 2;
const NFTA_FIB_FLAGS: u16 = 3;
/// The interface's name is asked for.
pub const NFT_FIB_RESULT_OIFNAME: u32 = 2;
/// By the destination.
pub const NFTA_FIB_F_DADDR: u32 = 1 << 1;
const NF_DROP: u32 = 0;
const NF_ACCEPT: u32 = 1;

/// `NFT_PAYLOAD_NETWORK_HEADER`.
pub const NETWORK_HEADER: u32 = 1;
/// `NFT_PAYLOAD_TRANSPORT_HEADER`.
pub const TRANSPORT_HEADER: u32 = 2;

/// One expression.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Expr {
    /// Load a property of the packet.
    Meta(MetaKey),
    /// Load conntrack's state bits, host-endian.
    CtState,
    /// Load conntrack's direction of the packet, a byte.
    CtDirection,
    /// Load the name of the interface that the destination is routed to; zeros for an address of
    /// this host.
    RouteInterface,
    /// Load bytes of a header.
    Payload {
        /// Which header: [`NETWORK_HEADER`] or [`TRANSPORT_HEADER`].
        base: u32,
        /// Where in it, in bytes.
        offset: u32,
        /// How many bytes.
        len: u32,
    },
    /// Keep only the bits of the mask.
    Mask(Vec<u8>),
    /// Go on only if the register compares so.
    Cmp(Operator, Vec<u8>),
    /// Go on only if the register is in the set.
    Lookup(String),
    /// Go on only below this many packets a second, with a burst.
    Limit {
        /// Packets a second.
        rate: u32,
        /// So many more at once.
        burst: u32,
    },
    /// Copy to a listener.
    Log(Log),
    /// Count.
    Counter,
    /// Decide.
    Verdict(Verdict),
    /// Something that none of our rules has.
    Foreign(String),
}

impl Expr {
    /// As an element of a rule's expression list.
    pub fn encode(&self) -> ListAttribute<ExpressionAttribute> {
        let register = Register::Reg1;
        let other = |name: &str, attributes| Expressions::Other {
            expression_type: name.to_owned(),
            attributes,
        };
        match self {
            Self::Meta(key) => Expressions::Meta(vec![Meta::DestinationRegister(register), Meta::Key(*key)]),
            Self::CtState => other("ct", conntrack(NFT_CT_STATE)),
            Self::CtDirection => other("ct", conntrack(NFT_CT_DIRECTION)),
            Self::RouteInterface => other("fib", fib()),
            Self::Limit { rate, burst } => other("limit", limit(*rate, *burst)),
            Self::Log(log) => other("log", self::log(*log)),
            Self::Payload { base, offset, len } => Expressions::Payload(vec![
                Payload::DestinationRegister(register),
                Payload::Base(*base),
                Payload::Offset(*offset),
                Payload::Len(*len),
            ]),
            Self::Mask(mask) => Expressions::Bitwise(vec![
                Bitwise::SourceRegister(register),
                Bitwise::DestinationRegister(register),
                Bitwise::Length(u32::try_from(mask.len()).unwrap_or(u32::MAX)),
                Bitwise::Mask(DataAttribute::Value(mask.clone())),
                Bitwise::Xor(DataAttribute::Value(vec![0; mask.len()])),
            ]),
            Self::Cmp(operator, value) => Expressions::Cmp(vec![
                Cmp::SourceRegister(register),
                Cmp::Op(*operator),
                Cmp::Data(DataAttribute::Value(value.clone())),
            ]),
            Self::Lookup(set) => {
                Expressions::Lookup(vec![Lookup::Set(set.clone()), Lookup::SourceRegister(register)])
            }
            Self::Counter => other("counter", Vec::new()),
            Self::Verdict(Verdict::Reject) => other("reject", reject()),
            Self::Verdict(verdict) => {
                let code = NftVerdict::Other(verdict_code(*verdict));
                Expressions::Immediate(vec![
                    Immediate::DestinationRegister(Register::Verdict),
                    Immediate::Data(DataAttribute::Verdict(vec![VerdictAttribute::Code(code)])),
                ])
            }
            Self::Foreign(name) => other(name, Vec::new()),
        }
        .into()
    }

    /// From an element of a rule's expression list. Whatever our encoder would not have made comes
    /// out as [`Expr::Foreign`], so that it can never compare equal to a rule of ours.
    pub fn decode(element: &ListAttribute<ExpressionAttribute>) -> Self {
        let ListAttribute::Element(attributes) = element else {
            return Self::Foreign("unknown".into());
        };
        let mut name = "unknown".to_owned();
        for attribute in attributes {
            match attribute {
                ExpressionAttribute::Name(text) => name.clone_from(text),
                ExpressionAttribute::Data(data) => {
                    return Self::decode_data(data).unwrap_or(Self::Foreign(name));
                }
                _ => {}
            }
        }
        // The kernel leaves the data of an expression without attributes away.
        if name == "counter" {
            Self::Counter
        } else {
            Self::Foreign(name)
        }
    }

    fn decode_data(data: &Expressions) -> Option<Self> {
        match data {
            Expressions::Meta(attributes) => decode_meta(attributes),
            Expressions::Payload(attributes) => decode_payload(attributes),
            Expressions::Bitwise(attributes) => decode_mask(attributes),
            Expressions::Cmp(attributes) => decode_cmp(attributes),
            Expressions::Lookup(attributes) => decode_lookup(attributes),
            Expressions::Immediate(attributes) => decode_verdict(attributes),
            Expressions::Other {
                expression_type,
                attributes,
            } => match expression_type.as_str() {
                "counter" => Some(Self::Counter),
                "ct" if same(attributes, &conntrack(NFT_CT_STATE)) => Some(Self::CtState),
                "ct" if same(attributes, &conntrack(NFT_CT_DIRECTION)) => Some(Self::CtDirection),
                "fib" if same(attributes, &fib()) => Some(Self::RouteInterface),
                "reject" if same(attributes, &reject()) => Some(Self::Verdict(Verdict::Reject)),
                "limit" => decode_limit(attributes),
                "log" => decode_log(attributes),
                _ => None,
            },
            _ => None,
        }
    }
}

/// What a counter says; none for another expression.
pub fn count_of(element: &ListAttribute<ExpressionAttribute>) -> Option<Count> {
    let ListAttribute::Element(attributes) = element else {
        return None;
    };
    attributes.iter().find_map(|attribute| match attribute {
        ExpressionAttribute::Data(Expressions::Other {
            expression_type,
            attributes,
        }) if expression_type == "counter" => Some(Count {
            packets: u64::from_be_bytes(value(attributes, NFTA_COUNTER_PACKETS)?),
            bytes: u64::from_be_bytes(value(attributes, NFTA_COUNTER_BYTES)?),
        }),
        _ => None,
    })
}

/// The kernel's number for a verdict, in rules and as a chain's policy.
pub fn verdict_code(verdict: Verdict) -> u32 {
    match verdict {
        // The kernel's own rejecting ends in a drop.
        Verdict::Drop | Verdict::Reject => NF_DROP,
        Verdict::Accept => NF_ACCEPT,
    }
}

/// The verdict of a number; `None` for one that our rules don't use.
pub fn verdict_of(code: u32) -> Option<Verdict> {
    match code {
        NF_DROP => Some(Verdict::Drop),
        NF_ACCEPT => Some(Verdict::Accept),
        _ => None,
    }
}

fn conntrack(key: u32) -> Vec<DefaultNla> {
    vec![be32(NFTA_CT_DREG, Register::Reg1.into()), be32(NFTA_CT_KEY, key)]
}

fn fib() -> Vec<DefaultNla> {
    vec![
        be32(NFTA_FIB_DREG, Register::Reg1.into()),
        be32(NFTA_FIB_RESULT, NFT_FIB_RESULT_OIFNAME),
        be32(NFTA_FIB_FLAGS, NFTA_FIB_F_DADDR),
    ]
}

fn reject() -> Vec<DefaultNla> {
    vec![
        be32(NFTA_REJECT_TYPE, NFT_REJECT_ICMPX_UNREACH),
        DefaultNla::new(NFTA_REJECT_ICMP_CODE, vec![NFT_REJECT_ICMPX_PORT_UNREACH]),
    ]
}

fn limit(rate: u32, burst: u32) -> Vec<DefaultNla> {
    let be64 = |kind, value: u64| DefaultNla::new(kind, value.to_be_bytes().to_vec());
    vec![
        be64(NFTA_LIMIT_RATE, rate.into()),
        be64(NFTA_LIMIT_UNIT, 1),
        be32(NFTA_LIMIT_BURST, burst),
        be32(NFTA_LIMIT_TYPE, NFT_LIMIT_PKTS),
        be32(NFTA_LIMIT_FLAGS, 0),
    ]
}

fn decode_limit(attributes: &[DefaultNla]) -> Option<Expr> {
    let rate = u32::try_from(u64::from_be_bytes(value(attributes, NFTA_LIMIT_RATE)?)).ok()?;
    let burst = u32::from_be_bytes(value(attributes, NFTA_LIMIT_BURST)?);
    same(attributes, &limit(rate, burst)).then_some(Expr::Limit { rate, burst })
}

fn log(log: Log) -> Vec<DefaultNla> {
    vec![
        DefaultNla::new(NFTA_LOG_GROUP, log.group.to_be_bytes().to_vec()),
        be32(NFTA_LOG_SNAPLEN, log.bytes),
    ]
}

fn decode_log(attributes: &[DefaultNla]) -> Option<Expr> {
    let group = u16::from_be_bytes(value(attributes, NFTA_LOG_GROUP)?);
    let bytes = u32::from_be_bytes(value(attributes, NFTA_LOG_SNAPLEN)?);
    let found = Log { group, bytes };
    same(attributes, &log(found)).then_some(Expr::Log(found))
}

/// The kernel may give attributes in another order.
fn same(attributes: &[DefaultNla], expected: &[DefaultNla]) -> bool {
    attributes.len() == expected.len() && expected.iter().all(|e| attributes.contains(e))
}

fn value<const N: usize>(attributes: &[DefaultNla], kind: u16) -> Option<[u8; N]> {
    let attribute = attributes.iter().find(|a| a.kind() == kind)?;
    let mut bytes = vec![0; attribute.value_len()];
    attribute.emit_value(&mut bytes);
    bytes.try_into().ok()
}

fn be32(kind: u16, value: u32) -> DefaultNla {
    DefaultNla::new(kind, value.to_be_bytes().to_vec())
}

fn decode_meta(attributes: &[Meta]) -> Option<Expr> {
    let mut found = None;
    for attribute in attributes {
        match attribute {
            Meta::Key(key) => found = Some(Expr::Meta(*key)),
            Meta::DestinationRegister(Register::Reg1) => {}
            _ => return None,
        }
    }
    found
}

fn decode_payload(attributes: &[Payload]) -> Option<Expr> {
    let (mut b, mut o, mut l) = (None, None, None);
    for attribute in attributes {
        match attribute {
            Payload::Base(value) => b = Some(*value),
            Payload::Offset(value) => o = Some(*value),
            Payload::Len(value) => l = Some(*value),
            Payload::DestinationRegister(Register::Reg1) => {}
            _ => return None,
        }
    }
    Some(Expr::Payload {
        base: b?,
        offset: o?,
        len: l?,
    })
}

fn decode_mask(attributes: &[Bitwise]) -> Option<Expr> {
    let mut found = None;
    for attribute in attributes {
        match attribute {
            Bitwise::Mask(DataAttribute::Value(mask)) => found = Some(Expr::Mask(mask.clone())),
            Bitwise::Xor(DataAttribute::Value(xor)) if xor.iter().all(|byte| *byte == 0) => {}
            // NFT_BITWISE_MASK_XOR, said by newer kernels only.
            Bitwise::Op(0) | Bitwise::Length(_) => {}
            Bitwise::SourceRegister(Register::Reg1) | Bitwise::DestinationRegister(Register::Reg1) => {}
            _ => return None,
        }
    }
    found
}

fn decode_cmp(attributes: &[Cmp]) -> Option<Expr> {
    let (mut operator, mut value) = (None, None);
    for attribute in attributes {
        match attribute {
            Cmp::Op(op) => operator = Some(*op),
            Cmp::Data(DataAttribute::Value(bytes)) => value = Some(bytes.clone()),
            Cmp::SourceRegister(Register::Reg1) => {}
            _ => return None,
        }
    }
    Some(Expr::Cmp(operator?, value?))
}

fn decode_lookup(attributes: &[Lookup]) -> Option<Expr> {
    let mut found = None;
    for attribute in attributes {
        match attribute {
            Lookup::Set(name) => found = Some(Expr::Lookup(name.clone())),
            Lookup::SourceRegister(Register::Reg1) | Lookup::Flags(0) | Lookup::SetId(_) => {}
            _ => return None,
        }
    }
    found
}

fn decode_verdict(attributes: &[Immediate]) -> Option<Expr> {
    let mut found = None;
    for attribute in attributes {
        match attribute {
            Immediate::Data(DataAttribute::Verdict(parts)) => match parts.as_slice() {
                [VerdictAttribute::Code(code)] => found = verdict_of((*code).into()).map(Expr::Verdict),
                _ => return None,
            },
            Immediate::DestinationRegister(Register::Verdict) => {}
            _ => return None,
        }
    }
    found
}

//! The kernel's expressions, as far as our rules use them, to and from netlink attributes
//! (linux/netfilter/nf_tables.h). All of them work on register 1.
//!
//! May not live here: which expressions make up a condition (`lower`).

use netlink_packet_core::DefaultNla;
use netlink_packet_netfilter::nftables::{
    Bitwise, Cmp, DataAttribute, ExpressionAttribute, Expressions, Immediate, ListAttribute, Lookup, Meta,
    MetaKey, Operator, Payload, Register, Verdict as NftVerdict, VerdictAttribute,
};

use crate::policy::ruleset::Verdict;

const NFTA_CT_DREG: u16 = 1;
const NFTA_CT_KEY: u16 = 2;
const NFT_CT_STATE: u32 = 0;
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
    /// Load bytes of a header.
    Payload { base: u32, offset: u32, len: u32 },
    /// Keep only the bits of the mask.
    Mask(Vec<u8>),
    /// Go on only if the register compares so.
    Cmp(Operator, Vec<u8>),
    /// Go on only if the register is in the set.
    Lookup(String),
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
            Self::CtState => other(
                "ct",
                vec![
                    be32(NFTA_CT_DREG, register.into()),
                    be32(NFTA_CT_KEY, NFT_CT_STATE),
                ],
            ),
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
                "ct" => {
                    let expected = [
                        be32(NFTA_CT_DREG, Register::Reg1.into()),
                        be32(NFTA_CT_KEY, NFT_CT_STATE),
                    ];
                    let same = attributes.len() == 2 && expected.iter().all(|e| attributes.contains(e));
                    same.then_some(Self::CtState)
                }
                _ => None,
            },
            _ => None,
        }
    }
}

/// The kernel's number for a verdict, in rules and as a chain's policy.
pub fn verdict_code(verdict: Verdict) -> u32 {
    match verdict {
        Verdict::Drop => NF_DROP,
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

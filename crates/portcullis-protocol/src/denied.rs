//! What the daemon tells of denied packets: who sent them, and what they asked for.
//!
//! May not live here: how packets are sampled and counted.

use ipnet::IpNet;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// A sample of the denied packets of the last hour or more. The kernel takes at most 10 a second, so
/// numbers compare sources with each other; how much was denied is in the kernel's counters.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeniedSample {
    /// When it begins.
    pub since: Timestamp,
    /// Packets in it.
    pub packets: u64,
    /// Those with most packets first.
    pub sources: Vec<DeniedSource>,
}

/// Where denied packets came from, by their own word: a source can be forged.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeniedSource {
    /// An IPv4 address, an IPv6 /64 (a host can have any address of it), or a link-local IPv6 address.
    pub source: IpNet,
    /// Packets of it in the sample, at most.
    pub packets: u64,
    /// By how much that may be too high, because memory is bounded.
    pub uncertainty: u64,
    /// When the last one came.
    pub last_seen: Timestamp,
    /// What most of them were for, most first.
    pub targets: Vec<DeniedTarget>,
}

/// What denied packets were for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeniedTarget {
    /// `tcp`, `udp`, `icmp`, `icmpv6`, or an IP protocol number.
    pub protocol: String,
    /// Destination port, if the protocol has ports.
    pub port: Option<u16>,
    /// ICMP or ICMPv6 type.
    pub icmp_type: Option<u8>,
    /// Packets, at most.
    pub packets: u64,
}

//! Denied packets, as far as they are told: what their headers say, who sends most, which get a line.
//!
//! Everything here is made of what strangers send: it is parsed into numbers and addresses first, and
//! memory is bounded whatever comes.
//! May not live here: taking packets from the kernel, writing to the journal, counting all of them
//! (the kernel does that).

mod lines;
mod packet;
mod tally;

use std::net::IpAddr;

use ipnet::IpNet;

pub use lines::Lines;
pub use packet::{Headers, interface_name, protocol_name};
pub use tally::Tally;

/// What a packet is for, whoever sends it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Target {
    /// IP protocol number.
    pub protocol: u8,
    /// Destination port.
    pub port: Option<u16>,
    /// ICMP or ICMPv6 type.
    pub icmp_type: Option<u8>,
}

/// Bits of an IPv6 address that say which network a host is in; within it, it takes the address it
/// likes (RFC 4291 section 2.5.1, RFC 8981).
const NETWORK_BITS: u8 = 64;

/// What counts as one source: an IPv4 address; an IPv6 network; of the link-local addresses each, for
/// all of them are of one network.
pub fn origin(source: IpAddr) -> IpNet {
    let host = IpNet::from(source);
    match source {
        IpAddr::V6(v6) if !v6.is_unicast_link_local() => {
            IpNet::new(source, NETWORK_BITS).unwrap_or(host).trunc()
        }
        _ => host,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_is_an_ipv4_address_or_an_ipv6_network() {
        for (address, expected) in [
            ("203.0.113.7", "203.0.113.7/32"),
            ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
            ("fe80::1", "fe80::1/128"),
        ] {
            assert_eq!(origin(address.parse().unwrap()).to_string(), expected);
        }
    }
}

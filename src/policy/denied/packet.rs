//! The headers of a copied packet: what is in it, in numbers.
//!
//! May not live here: anything that looks at what the packet carries.

use std::borrow::Cow;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::Target;

const ICMP: u8 = 1;
const ICMPV6: u8 = 58;
/// TCP, UDP, DCCP, SCTP and UDP-Lite: two ports come first.
const WITH_PORTS: [u8; 5] = [6, 17, 33, 132, 136];

/// IPv6 extension headers (RFC 8200 section 4, RFC 4302).
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const DESTINATION_OPTIONS: u8 = 60;

const IPV4_HEADER: usize = 20;
const IPV6_HEADER: usize = 40;

/// What a packet's headers say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Headers {
    /// Where it says that it is from.
    pub source: IpAddr,
    /// Where to.
    pub destination: IpAddr,
    /// IP protocol number; of IPv6, behind the extension headers, or that of the first of them that is
    /// not whole in the copy.
    pub protocol: u8,
    /// Source and destination port; none in a later fragment, or if the copy ends before them.
    pub ports: Option<(u16, u16)>,
    /// ICMP or ICMPv6 type; none as with ports.
    pub icmp_type: Option<u8>,
}

impl Headers {
    /// Reads the beginning of an IPv4 or IPv6 packet (RFC 791, RFC 8200); none if it is neither.
    pub fn parse(packet: &[u8]) -> Option<Self> {
        match packet.first()? >> 4 {
            4 => Self::ipv4(packet),
            6 => Self::ipv6(packet),
            _ => None,
        }
    }

    fn ipv4(packet: &[u8]) -> Option<Self> {
        let header: &[u8; IPV4_HEADER] = packet.first_chunk()?;
        let length = usize::from(header[0] & 0x0f) * 4;
        let body = packet.get(length.max(IPV4_HEADER)..).unwrap_or_default();
        let is_later_fragment = u16::from_be_bytes([header[6], header[7]]) & 0x1fff != 0;
        let address = |at: usize| {
            Some(Ipv4Addr::from(u32::from_be_bytes(
                *header.get(at..)?.first_chunk()?,
            )))
        };
        Some(Self::new(
            address(12)?.into(),
            address(16)?.into(),
            header[9],
            if is_later_fragment { &[] } else { body },
        ))
    }

    fn ipv6(packet: &[u8]) -> Option<Self> {
        let header: &[u8; IPV6_HEADER] = packet.first_chunk()?;
        let address = |at: usize| Some(Ipv6Addr::from(*header.get(at..)?.first_chunk::<16>()?));
        let (protocol, body) = behind_extensions(header[6], packet.get(IPV6_HEADER..)?);
        Some(Self::new(address(8)?.into(), address(24)?.into(), protocol, body))
    }

    fn new(source: IpAddr, destination: IpAddr, protocol: u8, body: &[u8]) -> Self {
        let ports = match body {
            [a, b, c, d, ..] if WITH_PORTS.contains(&protocol) => {
                Some((u16::from_be_bytes([*a, *b]), u16::from_be_bytes([*c, *d])))
            }
            _ => None,
        };
        let is_icmp = protocol == if source.is_ipv4() { ICMP } else { ICMPV6 };
        Self {
            source,
            destination,
            protocol,
            ports,
            icmp_type: body.first().copied().filter(|_| is_icmp),
        }
    }

    /// What it is for.
    pub fn target(&self) -> Target {
        Target {
            protocol: self.protocol,
            port: self.ports.map(|(_, to)| to),
            icmp_type: self.icmp_type,
        }
    }
}

/// The upper-layer protocol and what is there of it. Each extension header takes bytes, so this ends.
fn behind_extensions(mut protocol: u8, mut rest: &[u8]) -> (u8, &[u8]) {
    loop {
        let [next, length, ..] = *rest else {
            return (protocol, rest);
        };
        let bytes = match protocol {
            HOP_BY_HOP | ROUTING | DESTINATION_OPTIONS => (usize::from(length) + 1) * 8,
            AUTHENTICATION => (usize::from(length) + 2) * 4,
            FRAGMENT => 8,
            _ => return (protocol, rest),
        };
        let Some((header, behind)) = rest.split_at_checked(bytes) else {
            return (protocol, &[]);
        };
        let is_later_fragment = protocol == FRAGMENT
            && matches!(header, [_, _, a, b, ..] if u16::from_be_bytes([*a, *b]) >> 3 != 0);
        (protocol, rest) = (next, behind);
        if is_later_fragment {
            return (protocol, &[]);
        }
    }
}

/// For people; made of numbers and addresses alone.
impl fmt::Display for Headers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&protocol_name(self.protocol))?;
        if let Some(kind) = self.icmp_type {
            write!(f, " type {kind}")?;
        }
        match self.ports {
            Some((from, to)) => {
                let (from, to) = (
                    SocketAddr::new(self.source, from),
                    SocketAddr::new(self.destination, to),
                );
                write!(f, " from {from} to {to}")
            }
            None => write!(f, " from {} to {}", self.source, self.destination),
        }
    }
}

/// The name of a protocol that most people know, or its number.
pub fn protocol_name(number: u8) -> Cow<'static, str> {
    match number {
        ICMP => "icmp".into(),
        6 => "tcp".into(),
        17 => "udp".into(),
        ICMPV6 => "icmpv6".into(),
        number => number.to_string().into(),
    }
}

/// An interface's name as it can be printed. The kernel takes every byte but `/`, `:` and white space, and
/// who makes containers may choose it.
pub fn interface_name(name: &[u8]) -> String {
    let shown = |byte: &u8| {
        if byte.is_ascii_graphic() {
            char::from(*byte)
        } else {
            '?'
        }
    };
    name.iter().map(shown).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Extension headers of whole packets, each of any length that it may have.
    fn extensions() -> impl Strategy<Value = Vec<(u8, u8)>> {
        let kinds = vec![HOP_BY_HOP, ROUTING, FRAGMENT, AUTHENTICATION, DESTINATION_OPTIONS];
        proptest::collection::vec((prop::sample::select(kinds), 0u8..8), 0..6)
    }

    fn extended(extensions: &[(u8, u8)], protocol: u8, body: &[u8]) -> (u8, Vec<u8>) {
        let (mut next, mut bytes) = (protocol, body.to_vec());
        for (kind, length) in extensions.iter().rev() {
            let size = match *kind {
                FRAGMENT => 8,
                AUTHENTICATION => (usize::from(*length) + 2) * 4,
                _ => (usize::from(*length) + 1) * 8,
            };
            let mut header = vec![0; size];
            header[..2].copy_from_slice(&[next, *length]);
            bytes = [header, bytes].concat();
            next = *kind;
        }
        (next, bytes)
    }

    fn ipv4(
        source: Ipv4Addr,
        destination: Ipv4Addr,
        protocol: u8,
        options: u8,
        offset: u16,
        body: &[u8],
    ) -> Vec<u8> {
        let mut packet = vec![0; 20 + usize::from(options) * 4];
        (packet[0], packet[9]) = (0x45 + options, protocol);
        packet[6..8].copy_from_slice(&offset.to_be_bytes());
        packet[12..16].copy_from_slice(&source.octets());
        packet[16..20].copy_from_slice(&destination.octets());
        [packet, body.to_vec()].concat()
    }

    fn ipv6(source: Ipv6Addr, destination: Ipv6Addr, next: u8, body: &[u8]) -> Vec<u8> {
        let mut packet = vec![0x60, 0, 0, 0, 0, 0, next, 64];
        packet.extend(source.octets());
        packet.extend(destination.octets());
        packet.extend(body);
        packet
    }

    fn expected(source: IpAddr, destination: IpAddr, protocol: u8, body: [u8; 4]) -> Headers {
        let [a, b, c, d] = body;
        let is_icmp = protocol == if source.is_ipv4() { 1 } else { 58 };
        Headers {
            source,
            destination,
            protocol,
            ports: [6, 17, 33, 132, 136]
                .contains(&protocol)
                .then(|| (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]))),
            icmp_type: is_icmp.then_some(a),
        }
    }

    fn upper() -> impl Strategy<Value = u8> {
        prop::sample::select(vec![1u8, 2, 6, 17, 33, 47, 50, 58, 59, 132, 136, 255])
    }

    proptest! {
        #[test]
        fn an_ipv4_packet_reads_back(
            source: Ipv4Addr, destination: Ipv4Addr, protocol in upper(), options in 0u8..=10, body: [u8; 4],
        ) {
            let packet = ipv4(source, destination, protocol, options, 0x4000, &body);
            let wanted = expected(source.into(), destination.into(), protocol, body);
            prop_assert_eq!(Headers::parse(&packet), Some(wanted));
            let later = ipv4(source, destination, protocol, options, 0x2001, &body);
            let wanted = Headers { ports: None, icmp_type: None, ..wanted };
            prop_assert_eq!(Headers::parse(&later), Some(wanted));
        }

        #[test]
        fn an_ipv6_packet_reads_back_behind_its_extension_headers(
            source: Ipv6Addr, destination: Ipv6Addr, protocol in upper(), chain in extensions(), body: [u8; 4],
        ) {
            let (next, bytes) = extended(&chain, protocol, &body);
            let packet = ipv6(source, destination, next, &bytes);
            let wanted = expected(source.into(), destination.into(), protocol, body);
            prop_assert_eq!(Headers::parse(&packet), Some(wanted));
            // A copy that ends early has the addresses, and never ports of something else.
            for end in 40..packet.len() {
                let cut = Headers::parse(&packet[..end]).unwrap();
                prop_assert_eq!((cut.source, cut.destination), (wanted.source, wanted.destination));
                prop_assert_eq!(cut.ports, None);
            }
        }

        #[test]
        fn random_bytes_are_read_or_not_and_make_plain_text(
            version in prop::sample::select(vec![0x45u8, 0x4f, 0x40, 0x60, 0x6f]),
            mut bytes in proptest::collection::vec(any::<u8>(), 0..160),
            name in proptest::collection::vec(any::<u8>(), 0..16),
        ) {
            let _ = Headers::parse(&bytes);
            if let Some(first) = bytes.first_mut() {
                *first = version;
            }
            if let Some(headers) = Headers::parse(&bytes) {
                let text = format!("{headers} by {}", interface_name(&name));
                prop_assert!(text.bytes().all(|b| b == b' ' || b.is_ascii_graphic()), "{:?}", text);
            }
        }
    }

    #[test]
    fn a_later_ipv6_fragment_has_no_ports() {
        let [from, to] = [Ipv6Addr::LOCALHOST; 2];
        let fragment = [17, 0, 0, 8, 0, 0, 0, 1, 1, 2, 3, 4];
        let headers = Headers::parse(&ipv6(from, to, FRAGMENT, &fragment)).unwrap();
        assert_eq!((headers.protocol, headers.ports), (17, None));
    }

    #[test]
    fn what_a_packet_carries_is_not_in_its_text() {
        let payload = b"\0\x16\0\x50\n\x1b[31mMESSAGE_ID=5b3f\nMESSAGE=ready";
        let (from, to) = (Ipv4Addr::new(203, 0, 113, 7), Ipv4Addr::new(10, 0, 0, 1));
        let text = |protocol| {
            Headers::parse(&ipv4(from, to, protocol, 0, 0, payload))
                .unwrap()
                .to_string()
        };
        assert_eq!(text(17), "udp from 203.0.113.7:22 to 10.0.0.1:80");
        assert_eq!(text(1), "icmp type 0 from 203.0.113.7 to 10.0.0.1");
        assert_eq!(text(47), "47 from 203.0.113.7 to 10.0.0.1");
        assert_eq!(interface_name(b"a\x1b[31m\nb\xff"), "a?[31m?b?");
    }
}

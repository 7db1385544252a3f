//! Packets put together byte by byte: what a sender who keeps no rules would send.
//!
//! May not live here: what ought to become of them.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used)]

use std::net::{IpAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, SockaddrIn6, sendto, socket,
};

/// The flag that a connection starts with (RFC 9293 section 3.1).
pub const SYN: u8 = 0x02;
/// The acknowledgement flag.
pub const ACK: u8 = 0x10;

/// A TCP segment, without its checksum.
pub fn tcp(from: u16, to: u16, flags: u8, data: &[u8]) -> Vec<u8> {
    let mut tcp = [from.to_be_bytes(), to.to_be_bytes()].concat();
    tcp.extend([0, 0, 0, 1, 0, 0, 0, u8::from(flags & ACK != 0)]);
    tcp.extend([0x50, flags, 0x10, 0, 0, 0, 0, 0]);
    [&tcp, data].concat()
}

/// A UDP datagram, without its checksum.
pub fn udp(from: u16, to: u16, data: &[u8]) -> Vec<u8> {
    let mut udp = [from, to, 8 + data.len() as u16].map(u16::to_be_bytes).concat();
    udp.extend([0, 0]);
    [&udp, data].concat()
}

/// An ICMP or ICMPv6 message, without its checksum.
pub fn icmp(kind: u8, data: &[u8]) -> Vec<u8> {
    [&[kind, 0, 0, 0, 0, 1, 0, 1], data].concat()
}

fn checksum(parts: &[&[u8]]) -> [u8; 2] {
    let bytes: Vec<u8> = parts.concat();
    let sum: u32 = bytes
        .chunks(2)
        .map(|c| u32::from(u16::from_be_bytes([c[0], *c.get(1).unwrap_or(&0)])))
        .sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    let folded = (folded & 0xffff) + (folded >> 16);
    (!(folded as u16)).to_be_bytes()
}

/// The same with a right checksum, so that conntrack judges what is in it.
pub fn with_checksum(mut body: Vec<u8>, protocol: u8, header: &Header) -> Vec<u8> {
    let length = (body.len() as u32).to_be_bytes();
    let pseudo = match (header.source, header.destination) {
        (IpAddr::V4(from), IpAddr::V4(to)) if protocol != 1 => {
            [&from.octets()[..], &to.octets(), &[0, protocol], &length[2..]].concat()
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            [&from.octets()[..], &to.octets(), &length, &[0, 0, 0, protocol]].concat()
        }
        _ => Vec::new(),
    };
    let at = match protocol {
        6 => 16,
        17 => 6,
        1 | 58 => 2,
        _ => return body,
    };
    let sum = checksum(&[&pseudo, &body]);
    body[at..at + 2].copy_from_slice(&sum);
    body
}

/// An IPv6 extension header (RFC 8200 section 4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extension {
    HopByHop,
    DestinationOptions,
    /// Of that type, with no segments left.
    Routing(u8),
    /// Of a datagram that is whole: an atomic fragment (RFC 6946).
    Fragment,
}

impl Extension {
    fn number(self) -> u8 {
        match self {
            Self::HopByHop => 0,
            Self::DestinationOptions => 60,
            Self::Routing(_) => 43,
            Self::Fragment => 44,
        }
    }

    fn bytes(self, next: u8) -> [u8; 8] {
        match self {
            // One option: six bytes of padding.
            Self::HopByHop | Self::DestinationOptions => [next, 0, 1, 4, 0, 0, 0, 0],
            Self::Routing(kind) => [next, 0, kind, 0, 0, 0, 0, 0],
            // An id that no datagram in two parts has: with one of those, the first part would wait for this.
            Self::Fragment => [next, 0, 0, 0, 0xff, 0xff, 0xff, 0xff],
        }
    }
}

/// The body behind the extension headers, and the number of the first of them.
pub fn extended(extensions: &[Extension], protocol: u8, body: Vec<u8>) -> (u8, Vec<u8>) {
    let mut next = protocol;
    let mut bytes = body;
    for extension in extensions.iter().rev() {
        bytes = [&extension.bytes(next)[..], &bytes].concat();
        next = extension.number();
    }
    (next, bytes)
}

/// The body behind the option that makes routers look at it (RFC 2711), as multicast listeners send it.
pub fn router_alert(protocol: u8, body: Vec<u8>) -> (u8, Vec<u8>) {
    let options = [protocol, 0, 5, 2, 0, 0, 1, 0];
    (Extension::HopByHop.number(), [&options[..], &body].concat())
}

/// What an IP header says; both addresses are of one family.
#[derive(Clone, Copy, Debug)]
pub struct Header {
    pub source: IpAddr,
    pub destination: IpAddr,
    /// Time to live, or hop limit.
    pub hop_limit: u8,
    /// Tells packets apart: the IPv4 id, the IPv6 flow label and the id of IPv6 fragments. Not 0.
    pub number: u16,
}

impl Header {
    /// The whole packet.
    pub fn datagram(&self, protocol: u8, body: &[u8]) -> Vec<u8> {
        self.packet(protocol, 0, body)
    }

    /// The packet in two, cut behind so many bytes of its body: a multiple of 8.
    pub fn fragments(&self, protocol: u8, body: &[u8], at: usize) -> [Vec<u8>; 2] {
        let (first, later) = body.split_at(at);
        let offset = (at / 8) as u16;
        match self.source {
            IpAddr::V4(_) => {
                const MORE: u16 = 1 << 13;
                [
                    self.packet(protocol, MORE, first),
                    self.packet(protocol, offset, later),
                ]
            }
            IpAddr::V6(_) => {
                let part = |offset_and_more: u16, part: &[u8]| {
                    let [a, b] = offset_and_more.to_be_bytes();
                    let [c, d] = self.number.to_be_bytes();
                    let bytes = [&[protocol, 0, a, b, 0, 0, c, d], part].concat();
                    self.packet(Extension::Fragment.number(), 0, &bytes)
                };
                [part(1, first), part(offset << 3, later)]
            }
        }
    }

    fn packet(&self, protocol: u8, flags_and_offset: u16, body: &[u8]) -> Vec<u8> {
        match (self.source, self.destination) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                let mut header = vec![0x45, 0];
                header.extend(((20 + body.len()) as u16).to_be_bytes());
                header.extend(self.number.to_be_bytes());
                header.extend(flags_and_offset.to_be_bytes());
                header.extend([self.hop_limit, protocol, 0, 0]);
                header.extend(from.octets());
                header.extend(to.octets());
                let sum = checksum(&[&header]);
                header[10..12].copy_from_slice(&sum);
                [&header, body].concat()
            }
            (IpAddr::V6(from), IpAddr::V6(to)) => {
                let mut header = vec![0x60, 0];
                header.extend(self.number.to_be_bytes());
                header.extend((body.len() as u16).to_be_bytes());
                header.extend([protocol, self.hop_limit]);
                header.extend(from.octets());
                header.extend(to.octets());
                [&header, body].concat()
            }
            _ => unreachable!("one family a packet"),
        }
    }
}

/// A socket that sends packets as they are.
pub fn raw(family: AddressFamily) -> OwnedFd {
    socket(family, SockType::Raw, SockFlag::empty(), SockProtocol::Raw).unwrap()
}

/// Sends a packet towards an address; the scope is that of a link-local one.
pub fn send(socket: &OwnedFd, bytes: &[u8], destination: IpAddr, scope: u32) {
    let sent = match destination {
        IpAddr::V4(to) => sendto(
            socket.as_raw_fd(),
            bytes,
            &SockaddrIn::from(SocketAddrV4::new(to, 0)),
            MsgFlags::empty(),
        ),
        IpAddr::V6(to) => {
            let to = SockaddrIn6::from(SocketAddrV6::new(to, 0, 0, scope));
            sendto(socket.as_raw_fd(), bytes, &to, MsgFlags::empty())
        }
    };
    assert_eq!(sent.unwrap(), bytes.len());
}

//! nf_tables by hand: batches whose bytes are ready before the clock starts, so that what is measured is
//! the kernel's work on them and no client's. Netlink works a batch off before send(2) returns.
//!
//! May not live here: the engine.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use netlink_sys::{Socket, SocketAddr};
use nix::sys::socket::{setsockopt, sockopt};

/// Message types (linux/netfilter/nfnetlink.h, nf_tables.h).
const BATCH_BEGIN: u16 = 16;
const BATCH_END: u16 = 17;
const SUBSYSTEM: u16 = 10;
const NEW_TABLE: u16 = 0;
const DELETE_TABLE: u16 = 2;
const NEW_SET: u16 = 9;
const NEW_ELEMENTS: u16 = 12;
const NEW_GENERATION: u16 = 15;
/// Flags (linux/netlink.h).
const REQUEST: u16 = 1;
const ACK: u16 = 4;
const CREATE: u16 = 0x400;
const NESTED: u16 = 1 << 15;
const UNSPEC: u8 = 0;
const INET: u8 = 1;
/// `NFNLGRP_NFTABLES`.
const EVENTS: u32 = 7;
const HEADER: usize = 16;

/// A socket that sends ready batches.
pub struct Raw(Socket);

impl Raw {
    pub fn open() -> Self {
        let mut socket = Socket::new(12).unwrap();
        socket.bind(&SocketAddr::new(0, 0)).unwrap();
        setsockopt(&socket, sockopt::SndBufForce, &(64 << 20)).unwrap();
        setsockopt(&socket, sockopt::RcvBufForce, &(64 << 20)).unwrap();
        Self(socket)
    }

    /// When send(2) was called, and when it returned.
    ///
    /// # Panics
    /// When the kernel refuses the batch.
    pub fn send(&self, batch: &[u8]) -> (Instant, Instant) {
        let start = Instant::now();
        self.0.send(batch, 0).unwrap();
        let end = Instant::now();
        let (answer, _) = self.0.recv_from_full().unwrap();
        let errno = i32::from_ne_bytes(answer[HEADER..HEADER + 4].try_into().unwrap());
        assert_eq!(errno, 0, "the kernel refused the batch");
        (start, end)
    }

    /// The time of send(2) alone.
    pub fn time(&self, batch: &[u8]) -> Duration {
        let (start, end) = self.send(batch);
        end - start
    }
}

/// Tells of transactions.
pub struct Watcher(Socket);

impl Watcher {
    pub fn open() -> Self {
        let Raw(socket) = Raw::open();
        socket.add_membership(EVENTS).unwrap();
        Self(socket)
    }

    /// Waits for the end of the next transaction.
    pub fn next(&self) -> Instant {
        loop {
            let (datagram, _) = self.0.recv_from_full().unwrap();
            let now = Instant::now();
            let mut rest = datagram.as_slice();
            while rest.len() >= HEADER {
                let length = u32::from_ne_bytes(rest[..4].try_into().unwrap()) as usize;
                let kind = u16::from_ne_bytes(rest[4..6].try_into().unwrap());
                if kind == SUBSYSTEM << 8 | NEW_GENERATION {
                    return now;
                }
                rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
            }
        }
    }

    /// Throws away what is there.
    pub fn drain(&self) {
        const DONTWAIT: i32 = 0x40;
        let mut buffer = Vec::with_capacity(1 << 16);
        while self.0.recv(&mut buffer, DONTWAIT).is_ok() {
            buffer.clear();
        }
    }
}

/// A table with a set of these addresses, as the engine makes its own: sized at once, elements a thousand
/// to a message.
pub fn table_with(addresses: &[Ipv4Addr]) -> Vec<u8> {
    let size = u32::try_from(addresses.len().next_power_of_two().max(1 << 16) * 2).unwrap();
    let set = [
        text(1, "kernel"),
        text(2, "peers"),
        attribute(3, &0u32.to_be_bytes()),
        attribute(4, &7u32.to_be_bytes()),
        attribute(5, &4u32.to_be_bytes()),
        attribute(10, &1u32.to_be_bytes()),
        attribute(NESTED | 9, &attribute(1, &size.to_be_bytes())),
    ];
    let mut messages = vec![
        (NEW_TABLE, INET, text(1, "kernel")),
        (NEW_SET, INET, set.concat()),
    ];
    messages.extend(elements(addresses));
    batch(&messages)
}

/// More elements for it.
pub fn more(addresses: &[Ipv4Addr]) -> Vec<u8> {
    batch(&elements(addresses))
}

/// What `nft flush ruleset` sends: all tables of all families go.
pub fn flush() -> Vec<u8> {
    batch(&[(DELETE_TABLE, UNSPEC, Vec::new())])
}

type Message = (u16, u8, Vec<u8>);

fn elements(addresses: &[Ipv4Addr]) -> Vec<Message> {
    let one = |address: &Ipv4Addr| {
        attribute(
            NESTED | 1,
            &attribute(NESTED | 1, &attribute(1, &address.octets())),
        )
    };
    let message = |chunk: &[Ipv4Addr]| {
        let list: Vec<u8> = chunk.iter().flat_map(one).collect();
        let parts = [text(1, "kernel"), text(2, "peers"), attribute(NESTED | 3, &list)];
        (NEW_ELEMENTS, INET, parts.concat())
    };
    addresses.chunks(1000).map(message).collect()
}

fn text(kind: u16, text: &str) -> Vec<u8> {
    attribute(kind, &[text.as_bytes(), &[0]].concat())
}

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(value.len() + 4).unwrap();
    let mut bytes = [&length.to_ne_bytes(), &kind.to_ne_bytes(), value].concat();
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

fn batch(messages: &[Message]) -> Vec<u8> {
    let mut bytes = message(BATCH_BEGIN, REQUEST, UNSPEC, SUBSYSTEM, &[]);
    for (i, (kind, family, attributes)) in messages.iter().enumerate() {
        let is_last = i + 1 == messages.len();
        let create = if *kind == DELETE_TABLE { 0 } else { CREATE };
        let flags = REQUEST | create | if is_last { ACK } else { 0 };
        bytes.extend(message(SUBSYSTEM << 8 | kind, flags, *family, 0, attributes));
    }
    bytes.extend(message(BATCH_END, REQUEST, UNSPEC, SUBSYSTEM, &[]));
    bytes
}

/// `struct nlmsghdr`, `struct nfgenmsg`, attributes.
fn message(kind: u16, flags: u16, family: u8, resource: u16, attributes: &[u8]) -> Vec<u8> {
    let length = u32::try_from(HEADER + 4 + attributes.len()).unwrap();
    let mut bytes = [
        length.to_ne_bytes().as_slice(),
        &kind.to_ne_bytes(),
        &flags.to_ne_bytes(),
    ]
    .concat();
    bytes.extend([0; 8]);
    bytes.extend([family, 0]);
    bytes.extend(resource.to_be_bytes());
    bytes.extend(attributes);
    bytes
}

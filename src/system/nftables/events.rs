//! Changes of our table by others, and who they were, as nf_tables tells them.
//!
//! May not live here: what is done about them.

use std::cell::RefCell;
use std::fmt;
use std::io;

use netlink_packet_core::NetlinkPayload;
use nix::errno::Errno;

use super::{Error, NETLINK_NETFILTER};
use crate::policy::ruleset::TABLE;
use crate::system::descriptors::Readable;
use crate::system::netlink::{Attributes, Connection, DONTWAIT, GENMSG, RawMessage};

/// `NFNLGRP_NFTABLES`: every change of every table is told here (linux/netfilter/nfnetlink.h).
pub const NFNLGRP_NFTABLES: u32 = 7;
/// `NFT_MSG_NEWGEN`: the end of a transaction, with the process that made it.
const NEWGEN: u8 = 15;
const NFTA_GEN_PROC_PID: u16 = 2;
const NFTA_GEN_PROC_NAME: u16 = 3;
/// The attribute that names the table, in messages about tables, chains, rules, sets and elements alike.
const NFTA_TABLE: u16 = 1;
/// `NFPROTO_INET` (linux/netfilter.h).
const INET: u8 = 1;
/// Events of a burst that the kernel may keep for us, in bytes.
const QUEUE: usize = 1 << 20;

/// A process that changed nf_tables, as the kernel saw it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Author {
    /// Process id, in the host's namespace.
    pub pid: u32,
    /// The command's name (`TASK_COMM_LEN`: at most 15 bytes), which the process may choose.
    pub name: String,
}

impl fmt::Display for Author {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Quoted and escaped: a line end in it forges no log line.
        write!(f, "{:?} (process {})", self.name, self.pid)
    }
}

/// Tells of changes of our table that others made.
pub struct Events {
    connection: Readable<Connection>,
    seen: RefCell<Seen>,
}

/// What the datagrams so far told of a transaction whose end is still to come.
#[derive(Default)]
struct Seen {
    touched: bool,
    /// What is ready to be told: who made the last such transaction.
    foreign: Option<Option<Author>>,
}

impl Events {
    /// Subscribes. Changes over the connection of that number are left out.
    ///
    /// # Errors
    /// As [`super::Nftables::open`].
    pub fn open(own: u32) -> Result<Self, Error> {
        let connection = Connection::open(NETLINK_NETFILTER, &[NFNLGRP_NFTABLES])?;
        connection.reserve(QUEUE);
        connection.ignore(own)?;
        connection.set_nonblocking()?;
        Ok(Self {
            connection: Readable::new(connection)?,
            seen: RefCell::default(),
        })
    }

    /// Waits until somebody else has changed our table; those changes that are told by then are one.
    /// Says who made the last of them, if that is known. Lost events count as a change by nobody known.
    /// Nothing is lost if this is no longer waited for.
    ///
    /// # Errors
    /// As recv(2).
    pub async fn next(&self) -> io::Result<Option<Author>> {
        self.connection.read(|connection| self.take(connection)).await
    }

    /// Takes all that is there; `WouldBlock` if nothing of it is foreign.
    fn take(&self, connection: &Connection) -> io::Result<Option<Author>> {
        let mut seen = self.seen.borrow_mut();
        loop {
            match connection.receive::<RawMessage>(DONTWAIT) {
                Ok(messages) => {
                    for message in messages {
                        if let NetlinkPayload::InnerMessage(raw) = &message.payload {
                            seen.note(raw);
                        }
                    }
                }
                Err(error) if error.raw_os_error() == Some(Errno::ENOBUFS as i32) => {
                    *seen = Seen {
                        touched: false,
                        foreign: Some(None),
                    };
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return seen.foreign.take().ok_or(error);
                }
                Err(error) => return Err(error),
            }
        }
    }
}

impl Seen {
    fn note(&mut self, message: &RawMessage) {
        let [.., kind] = message.kind().to_be_bytes();
        let payload = message.payload();
        if kind == NEWGEN {
            if std::mem::take(&mut self.touched) {
                self.foreign = Some(author(payload));
            }
            return;
        }
        let is_ours = payload.first() == Some(&INET)
            && Attributes::behind(payload, GENMSG)
                .any(|a| a.kind() == NFTA_TABLE && text(a.value()) == TABLE.as_bytes());
        self.touched |= is_ours;
    }
}

fn text(value: &[u8]) -> &[u8] {
    value.strip_suffix(&[0]).unwrap_or(value)
}

fn author(payload: &[u8]) -> Option<Author> {
    let (mut pid, mut name) = (None, None);
    for attribute in Attributes::behind(payload, GENMSG) {
        match attribute.kind() {
            NFTA_GEN_PROC_PID => pid = attribute.value().try_into().ok().map(u32::from_be_bytes),
            NFTA_GEN_PROC_NAME => name = Some(String::from_utf8_lossy(text(attribute.value())).into_owned()),
            _ => {}
        }
    }
    Some(Author {
        pid: pid?,
        name: name?,
    })
}

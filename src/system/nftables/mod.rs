//! The kernel's packet filter: one atomic batch for the whole table, and reading it back.
//!
//! Everything is in table `inet portcullis`; no other table is touched, and only `foreign` reads them.
//! May not live here: what the ruleset should be (`policy::firewall`).

mod batch;
mod expression;
pub mod foreign;
mod lower;
mod read;

use std::io;

use netlink_packet_netfilter::NetfilterMessage;
use nix::errno::Errno;

use super::netlink::Connection;
use super::readable::Readable;
use crate::policy::ruleset::Ruleset;

/// `NETLINK_NETFILTER`.
const NETLINK_NETFILTER: isize = 12;
/// `NFNLGRP_NFTABLES`: every change of every table is told here (linux/netfilter/nfnetlink.h).
const NFNLGRP_NFTABLES: u32 = 7;

/// Why the kernel does not hold what it should.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Netlink itself failed.
    #[error("netlink: {0}{hint}", hint = hint(.0))]
    Io(#[from] io::Error),
    /// The kernel refused one message of the batch; nothing of the batch was done.
    #[error("the kernel refused {object}: {}{hint}", .errno.desc(), hint = hint_errno(*.errno))]
    Refused {
        /// What was asked for, for example `rule "rule ssh"`.
        object: String,
        /// Why.
        errno: Errno,
    },
    /// The kernel said nothing about the batch.
    #[error("the kernel did not answer the batch")]
    NoAnswer,
    /// The table kept changing while it was read.
    #[error("the table kept changing while it was read")]
    Unsteady,
}

fn hint(error: &io::Error) -> &'static str {
    error
        .raw_os_error()
        .map_or("", |number| hint_errno(Errno::from_raw(number)))
}

/// What an operator can do about it.
fn hint_errno(errno: Errno) -> &'static str {
    match errno {
        Errno::EPERM | Errno::EACCES => " (CAP_NET_ADMIN is needed: run as root)",
        Errno::EPROTONOSUPPORT | Errno::EOPNOTSUPP | Errno::EAFNOSUPPORT => {
            " (this kernel lacks nf_tables: CONFIG_NF_TABLES and CONFIG_NF_TABLES_INET are needed)"
        }
        Errno::ENOENT => {
            " (the kernel lacks a feature that the rule uses: CONFIG_NFT_CT and CONFIG_NF_CONNTRACK)"
        }
        Errno::ENOMEM | Errno::ENOBUFS | Errno::EMSGSIZE => " (the kernel ran out of memory for it)",
        _ => "",
    }
}

/// A connection to nf_tables.
pub struct Nftables {
    connection: Connection,
}

impl Nftables {
    /// Connects.
    ///
    /// # Errors
    /// When the kernel has no netfilter netlink, or the caller may not use it.
    pub fn open() -> Result<Self, Error> {
        Ok(Self {
            connection: Connection::open(NETLINK_NETFILTER, &[])?,
        })
    }

    /// Replaces the whole table in one transaction: packets see the old rules or the new ones,
    /// never none and never half.
    ///
    /// # Errors
    /// When the kernel refuses; then nothing changed.
    pub fn replace(&mut self, ruleset: &Ruleset) -> Result<(), Error> {
        let batch = batch::Batch::replacing(ruleset, || self.connection.next_sequence());
        let answers = self.connection.send_batch::<NetfilterMessage>(batch.bytes())?;
        if let Some(refusal) = answers.iter().find(|answer| answer.errno != 0) {
            let object = batch.object(refusal.sequence).unwrap_or("the batch").to_owned();
            return Err(Error::Refused {
                object,
                errno: Errno::from_raw(refusal.errno),
            });
        }
        if answers
            .iter()
            .any(|answer| answer.sequence == batch.last_sequence())
        {
            Ok(())
        } else {
            Err(Error::NoAnswer)
        }
    }

    /// What the kernel holds in our table now; `None` if there is no such table.
    ///
    /// # Errors
    /// When it can't be read.
    pub fn read(&mut self) -> Result<Option<Ruleset>, Error> {
        read::read(&mut self.connection)
    }
}

/// Tells of changes of nf_tables, whoever made them.
pub struct Events {
    connection: Readable<Connection>,
}

impl Events {
    /// Subscribes.
    ///
    /// # Errors
    /// As [`Nftables::open`].
    pub fn open() -> Result<Self, Error> {
        let connection = Connection::open(NETLINK_NETFILTER, &[NFNLGRP_NFTABLES])?;
        connection.set_nonblocking()?;
        Ok(Self {
            connection: Readable::new(connection)?,
        })
    }

    /// Waits for an event, and takes those of the same moment with it. Lost events count as one.
    ///
    /// # Errors
    /// As recv(2).
    pub async fn next(&self) -> io::Result<()> {
        self.connection.read(Connection::drain).await
    }
}

//! The kernel's packet filter: one atomic batch for the whole table, and reading it back.
//!
//! Everything is in table `inet portcullis`; no other table is touched, and only `foreign` reads them.
//! May not live here: what the ruleset should be (`policy::firewall`).

mod batch;
pub mod events;
pub mod expression;
pub mod foreign;
pub mod lower;
mod read;

use std::io;
use std::os::fd::AsFd;

use netlink_packet_netfilter::NetfilterMessage;
use nix::errno::Errno;

use super::netlink::Connection;
use super::{descriptors, systemd};
use crate::policy::ruleset::Ruleset;
use crate::policy::ruleset::change::Step;
use batch::Handles;
pub use read::{element_key, read_ranges};

/// `NETLINK_NETFILTER`.
pub(super) const NETLINK_NETFILTER: isize = 12;

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
    /// Somebody changed nf_tables since it was read.
    #[error("nf_tables changed since it was read")]
    Moved,
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
        Errno::EPERM | Errno::EACCES => {
            " (CAP_NET_ADMIN is needed, and the table may be another process's own: is a portcullis running?)"
        }
        Errno::EPROTONOSUPPORT | Errno::EOPNOTSUPP | Errno::EAFNOSUPPORT => {
            " (this kernel lacks nf_tables: CONFIG_NF_TABLES and CONFIG_NF_TABLES_INET are needed)"
        }
        Errno::ENOENT => {
            " (the kernel lacks a feature that the rule uses: CONFIG_NF_CONNTRACK, CONFIG_NFT_CT, CONFIG_NFT_LIMIT, \
             CONFIG_NFT_LOG or CONFIG_NETFILTER_NETLINK_LOG)"
        }
        Errno::ENOMEM | Errno::ENOBUFS | Errno::EMSGSIZE => " (the kernel ran out of memory for it)",
        _ => "",
    }
}

/// Whether the kernel does not know tables that only this process may change.
fn lacks_exclusive(result: &Result<(), Error>) -> bool {
    matches!(result, Err(Error::Refused { object, errno: Errno::EOPNOTSUPP }) if object == batch::EXCLUSIVE_TABLE)
}

/// Who alone may change the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// Whoever has CAP_NET_ADMIN.
    Nobody,
    /// The same: whose it was has ended. It can be taken over in one step.
    Orphan,
    /// This connection.
    Us,
    /// Another netlink socket, by its number.
    Other(u32),
}

/// What the kernel held at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    /// The rules.
    pub ruleset: Ruleset,
    /// Who may change them.
    pub owner: Owner,
    handles: Handles,
    generation: u32,
}

/// What a rule's counter says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// Packets.
    pub packets: u64,
    /// Their bytes.
    pub bytes: u64,
}

impl std::ops::AddAssign for Count {
    fn add_assign(&mut self, other: Self) {
        self.packets = self.packets.saturating_add(other.packets);
        self.bytes = self.bytes.saturating_add(other.bytes);
    }
}

/// A connection to nf_tables.
pub struct Nftables {
    connection: Connection,
    /// Whether the table is to be ours alone, as far as the kernel knows how.
    exclusive: bool,
}

/// Under which name systemd keeps the connection while no daemon runs.
const KEPT: &str = "nftables";

impl Nftables {
    /// Connects.
    ///
    /// # Errors
    /// When the kernel has no netfilter netlink, or the caller may not use it.
    pub fn open() -> Result<Self, Error> {
        Ok(Self {
            connection: Connection::open(NETLINK_NETFILTER, &[])?,
            exclusive: false,
        })
    }

    /// Connects for the writer of the table, with the socket that systemd kept since the last one, if it
    /// did. With `exclusive`, tables that are made over this connection can be changed only over it,
    /// where the kernel knows how (Linux 6.9): other programs' changes then fail, and their flushes
    /// pass it by. A kept socket stays the owner also while no daemon runs.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_writer(exclusive: bool) -> Result<Self, Error> {
        let connection = match descriptors::kept_socket(KEPT) {
            Some(socket) => Connection::over(socket)?,
            None => Connection::open(NETLINK_NETFILTER, &[])?,
        };
        if exclusive {
            systemd::keep(KEPT, connection.as_fd());
        } else {
            systemd::keep_no_longer(KEPT);
        }
        Ok(Self {
            connection,
            exclusive,
        })
    }

    /// The number by which the kernel knows this connection, in [`Owner::Other`] and in events.
    pub fn port(&self) -> u32 {
        self.connection.port()
    }

    /// Whether a table that this connection makes is its own.
    pub fn is_exclusive(&self) -> bool {
        self.exclusive
    }

    /// Asks the kernel whether a table can be this connection's own, and changes nothing. Otherwise a table
    /// that is nobody's would be made anew each time, without its counters and, for a moment, large sets.
    pub fn probe_exclusive(&mut self) {
        if self.exclusive {
            let probe = batch::Batch::probing(|| self.connection.next_sequence());
            self.exclusive = !lacks_exclusive(&self.send(&probe));
        }
    }

    /// Replaces the whole table: packets see the old rules or the new ones, never none and never half.
    /// The gate is shut in one transaction, without large sets, which only let in; they come in a second one.
    /// Even empty ones would take the kernel longer to make than all the rest.
    ///
    /// # Errors
    /// When the kernel refuses. If it refuses the large sets, the gate is shut without them.
    pub fn replace(&mut self, ruleset: &Ruleset) -> Result<(), Error> {
        if let Some(shut) = ruleset.without_large_sets(batch::LARGE) {
            self.replace_at_once(&shut)?;
        }
        self.replace_at_once(ruleset)
    }

    /// Replaces the whole table in one transaction, large sets included: for a table that is in force and
    /// lets in no more than it should, so that there is no hurry.
    ///
    /// # Errors
    /// When the kernel refuses; nothing changed then.
    pub fn replace_at_once(&mut self, ruleset: &Ruleset) -> Result<(), Error> {
        let sequence = || self.connection.next_sequence();
        let batch = batch::Batch::replacing(ruleset, self.exclusive, sequence);
        let result = self.send(&batch);
        if lacks_exclusive(&result) {
            self.exclusive = false;
            return self.replace_at_once(ruleset);
        }
        result
    }

    /// Does the steps in one transaction, provided that nf_tables is as it was when `held` was read.
    ///
    /// # Errors
    /// [`Error::Moved`] if it is not; else when the kernel refuses. Nothing changed then.
    pub fn change(&mut self, held: &Held, steps: &[Step]) -> Result<(), Error> {
        let batch = batch::Batch::changing(steps, &held.handles, held.generation, || {
            self.connection.next_sequence()
        });
        match self.send(&batch.ok_or(Error::Moved)?) {
            Err(Error::Refused {
                errno: Errno::ERESTART,
                ..
            }) => Err(Error::Moved),
            result => result,
        }
    }

    /// Makes the table of an owner that has ended our own, as it is.
    ///
    /// # Errors
    /// When the kernel refuses; nothing changed then.
    pub fn adopt(&mut self) -> Result<(), Error> {
        let batch = batch::Batch::adopting(|| self.connection.next_sequence());
        self.send(&batch)
    }

    fn send(&mut self, batch: &batch::Batch) -> Result<(), Error> {
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
    pub fn read(&mut self) -> Result<Option<Held>, Error> {
        read::read(&mut self.connection, None)
    }

    /// What the counters of our rules count, each with its rule's comment.
    ///
    /// # Errors
    /// When they can't be read.
    pub fn counts(&mut self) -> Result<Vec<(String, Count)>, Error> {
        read::counts(&mut self.connection)
    }

    /// What the kernel holds after one transaction of ours that made `expected` of what was held
    /// `before`. Rules and small sets are read. Large sets are taken as `expected` if nf_tables' own
    /// count of transactions says that ours was the only one, and read if it was not.
    ///
    /// # Errors
    /// When it can't be read.
    pub fn read_after(&mut self, before: &Held, expected: &Ruleset) -> Result<Option<Held>, Error> {
        // The kernel never uses 0.
        let next = before.generation.checked_add(1).unwrap_or(1);
        read::read(&mut self.connection, Some((expected, next)))
    }
}

//! Copies of packets that a rule logs to a group (linux/netfilter/nfnetlink_log.h).
//!
//! May not live here: what is in a packet (`policy::denied`), which packets are logged.

use std::io;

use netlink_packet_core::NetlinkPayload;
use nix::errno::Errno;
use nix::net::if_::if_indextoname;

use super::descriptors::Readable;
use super::netlink::{Attributes, Connection, DONTWAIT, GENMSG, RawMessage, add_attribute};
use super::nftables::NETLINK_NETFILTER;
use crate::policy::denied::interface_name;
use crate::policy::ruleset::Log;

/// `NFNL_SUBSYS_ULOG`, the first byte of a message's type; the second is `NFULNL_MSG_PACKET` or
/// `NFULNL_MSG_CONFIG`.
const PACKET: u16 = 4 << 8;
const CONFIG: u16 = 4 << 8 | 1;
/// Attributes of a packet.
const NFULA_IFINDEX_INDEV: u16 = 4;
const NFULA_PAYLOAD: u16 = 9;
/// Attributes of the configuration, and values of them.
const NFULA_CFG_CMD: u16 = 1;
const NFULA_CFG_MODE: u16 = 2;
const NFULA_CFG_QTHRESH: u16 = 5;
const BIND: u8 = 1;
const COPY_PACKET: u8 = 2;

/// The beginning of a packet that came in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Copied {
    /// From the IP header on.
    pub bytes: Vec<u8>,
    /// The interface that it came in by, as it can be printed; its number if it is gone.
    pub interface: String,
}

/// A group's only listener.
pub struct Group {
    connection: Readable<Connection>,
}

impl Group {
    /// Binds to the group of a log, in the network namespace of the calling thread. Each packet is told
    /// at once: the rule limits how many there are.
    ///
    /// No protocol family is bound (`NFULNL_CFG_CMD_PF_BIND`): that would change its default logger
    /// (`/proc/net/netfilter/nf_log`) for everybody.
    ///
    /// # Errors
    /// `EPERM` if another process is bound to the group or `CAP_NET_ADMIN` is missing, `EINVAL` from a kernel
    /// without nfnetlink_log (CONFIG_NETFILTER_NETLINK_LOG).
    pub fn bind(log: Log) -> io::Result<Self> {
        let mut connection = Connection::open(NETLINK_NETFILTER, &[])?;
        // Version 0, the group where other subsystems have a resource's number.
        let mut question = vec![0, 0];
        question.extend(log.group.to_be_bytes());
        add_attribute(&mut question, NFULA_CFG_CMD, &[BIND]);
        let [a, b, c, d] = log.bytes.to_be_bytes();
        add_attribute(&mut question, NFULA_CFG_MODE, &[a, b, c, d, COPY_PACKET, 0]);
        add_attribute(&mut question, NFULA_CFG_QTHRESH, &1u32.to_be_bytes());
        connection.get(&RawMessage::new(CONFIG, question))?;
        connection.set_nonblocking()?;
        Ok(Self {
            connection: Readable::new(connection)?,
        })
    }

    /// Waits for packets. Those that did not fit the queue are missing from the sample, and no failure.
    ///
    /// # Errors
    /// As recv(2).
    pub async fn next(&self) -> io::Result<Vec<Copied>> {
        loop {
            let received = self
                .connection
                .read(|connection| connection.receive::<RawMessage>(DONTWAIT))
                .await;
            match received {
                Ok(messages) => {
                    let payloads = messages.iter().filter_map(|message| match &message.payload {
                        NetlinkPayload::InnerMessage(raw) if raw.kind() == PACKET => Some(raw.payload()),
                        _ => None,
                    });
                    return Ok(payloads.filter_map(copied).collect());
                }
                Err(error) if error.raw_os_error() == Some(Errno::ENOBUFS as i32) => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// The packet of one message; `None` if there is none in it.
pub fn copied(message: &[u8]) -> Option<Copied> {
    let (mut bytes, mut index) = (None, 0);
    for attribute in Attributes::behind(message, GENMSG) {
        match attribute.kind() {
            NFULA_PAYLOAD => bytes = Some(attribute.value().to_vec()),
            NFULA_IFINDEX_INDEV => index = attribute.value().try_into().map_or(0, u32::from_be_bytes),
            _ => {}
        }
    }
    let interface = match if_indextoname(index) {
        Ok(name) => interface_name(name.to_bytes()),
        Err(_) => index.to_string(),
    };
    bytes.map(|bytes| Copied { bytes, interface })
}

//! Links, their addresses and routes, from rtnetlink(7).
//!
//! May not live here: which links are uplinks (`policy::links`).

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;

use super::descriptors::Readable;
use super::netlink::{Attributes, Connection, RawMessage, add_attribute, u32_at};
use crate::policy::links::Link;

/// `NETLINK_ROUTE`.
const NETLINK_ROUTE: isize = 0;
/// `RTNLGRP_LINK`, `RTNLGRP_IPV4_IFADDR`, `RTNLGRP_IPV4_ROUTE`, `RTNLGRP_IPV6_IFADDR`,
/// `RTNLGRP_IPV6_ROUTE` (linux/rtnetlink.h).
const GROUPS: [u32; 5] = [1, 5, 7, 9, 11];

/// Message types (linux/rtnetlink.h).
const RTM_GETLINK: u16 = 18;
const RTM_GETADDR: u16 = 22;
const RTM_GETROUTE: u16 = 26;
/// Lengths of `struct ifinfomsg`, `struct ifaddrmsg` and `struct rtmsg`.
const LINK_HEADER: usize = 16;
const ADDRESS_HEADER: usize = 8;
const ROUTE_HEADER: usize = 12;
/// Where `rtm_type` is in it.
const ROUTE_TYPE: usize = 7;
/// Attributes (linux/if_link.h, linux/rtnetlink.h).
const IFLA_IFNAME: u16 = 3;
const IFLA_MASTER: u16 = 10;
const IFLA_LINKINFO: u16 = 18;
const IFLA_INFO_KIND: u16 = 1;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_MULTIPATH: u16 = 9;
/// Length of `struct rtnexthop`.
const NEXT_HOP_HEADER: usize = 8;
/// Address families (linux/socket.h); everything else than `AF_INET` that has routes is IPv6.
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
/// `RT_TABLE_LOCAL`: the kernel's own table of local addresses.
const TABLE_LOCAL: u8 = 255;
/// `RTN_UNICAST`.
const UNICAST: u8 = 1;
/// `RT_SCOPE_LINK`: addresses of this scope and beyond reach no further than the link.
const SCOPE_LINK: u8 = 253;

/// All links with what the addresses and routes say of them.
///
/// # Errors
/// When netlink can't be used or read.
pub fn read() -> io::Result<Vec<Link>> {
    let mut connection = Connection::open(NETLINK_ROUTE, &[])?;
    let mut dump = |kind, header| connection.dump(&RawMessage::new(kind, vec![0; header]));
    let links = dump(RTM_GETLINK, LINK_HEADER)?;
    let addresses = dump(RTM_GETADDR, ADDRESS_HEADER)?;
    Ok(read_all(&links, &addresses, &dump(RTM_GETROUTE, ROUTE_HEADER)?))
}

/// The links that the kernel's messages tell of, in the order of their numbers. What is not understood, and
/// what belongs to no link of them, is left out.
pub fn read_all(links: &[RawMessage], addresses: &[RawMessage], routes: &[RawMessage]) -> Vec<Link> {
    let links = links.iter().filter_map(|message| read_link(message.payload()));
    let mut links: BTreeMap<u32, Link> = links.map(|link| (link.index, link)).collect();
    for message in addresses {
        read_address(message.payload(), &mut links);
    }
    for message in routes {
        read_route(message.payload(), &mut links);
    }
    links.into_values().collect()
}

/// The interface by which this host reaches an address.
///
/// # Errors
/// When there is no route to it.
pub fn interface_to(address: IpAddr) -> io::Result<Option<String>> {
    route_to(address, |_| true)
}

/// The interface that packets to an address would be forwarded to; none for an address of this host, and
/// for one that no route leads to.
///
/// # Errors
/// When netlink can't be used or read.
pub fn forwarded_to(address: IpAddr) -> io::Result<Option<String>> {
    match route_to(address, |route| route.get(ROUTE_TYPE) == Some(&UNICAST)) {
        Err(error) if error.kind() == io::ErrorKind::NetworkUnreachable => Ok(None),
        answer => answer,
    }
}

fn route_to(address: IpAddr, counts: impl Fn(&[u8]) -> bool) -> io::Result<Option<String>> {
    let mut connection = Connection::open(NETLINK_ROUTE, &[])?;
    let (family, octets) = match address {
        IpAddr::V4(v4) => (AF_INET, v4.octets().to_vec()),
        IpAddr::V6(v6) => (AF_INET6, v6.octets().to_vec()),
    };
    let bits = u8::try_from(octets.len() * 8).unwrap_or(u8::MAX);
    let mut question = vec![0; ROUTE_HEADER];
    question[..2].copy_from_slice(&[family, bits]);
    add_attribute(&mut question, RTA_DST, &octets);
    let answers = connection.get(&RawMessage::new(RTM_GETROUTE, question))?;
    let mut routes = answers
        .iter()
        .map(RawMessage::payload)
        .filter(|route| counts(route));
    let index = routes.find_map(|route| outgoing(route).pop());
    let mut links = connection
        .dump(&RawMessage::new(RTM_GETLINK, vec![0; LINK_HEADER]))?
        .into_iter();
    Ok(links
        .find_map(|message| read_link(message.payload()).filter(|link| Some(link.index) == index))
        .map(|link| link.name))
}

fn read_link(payload: &[u8]) -> Option<Link> {
    let mut link = Link {
        index: u32_at(payload, 4)?,
        ..Link::default()
    };
    for attribute in Attributes::behind(payload, LINK_HEADER) {
        match attribute.kind() {
            IFLA_IFNAME => link.name = text(attribute.value()),
            IFLA_MASTER => link.controller = u32_at(attribute.value(), 0),
            IFLA_LINKINFO => {
                let mut infos = Attributes::behind(attribute.value(), 0);
                link.kind = infos
                    .find(|info| info.kind() == IFLA_INFO_KIND)
                    .map(|info| text(info.value()));
            }
            _ => {}
        }
    }
    Some(link)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes.split(|byte| *byte == 0).next().unwrap_or_default()).into_owned()
}

fn read_address(payload: &[u8], links: &mut BTreeMap<u32, Link>) {
    let (Some(scope), Some(index)) = (payload.get(3), u32_at(payload, 4)) else {
        return;
    };
    if let Some(link) = links.get_mut(&index) {
        link.has_address |= *scope < SCOPE_LINK;
    }
}

fn read_route(payload: &[u8], links: &mut BTreeMap<u32, Link>) {
    let [family, length, _, _, table, _, _, kind, ..] = payload else {
        return;
    };
    if *kind != UNICAST || *table == TABLE_LOCAL {
        return;
    }
    let host_length = if *family == AF_INET { 32 } else { 128 };
    for index in outgoing(payload) {
        if let Some(link) = links.get_mut(&index) {
            link.has_default_route |= *length == 0;
            link.has_host_route |= *length == host_length;
        }
    }
}

/// Indices of the interfaces that a route leads through.
fn outgoing(payload: &[u8]) -> Vec<u32> {
    let mut indices = Vec::new();
    for attribute in Attributes::behind(payload, ROUTE_HEADER) {
        match attribute.kind() {
            RTA_OIF => indices.extend(u32_at(attribute.value(), 0)),
            RTA_MULTIPATH => indices.extend(next_hops(attribute.value())),
            _ => {}
        }
    }
    indices
}

fn next_hops(mut rest: &[u8]) -> Vec<u32> {
    let mut indices = Vec::new();
    while let [low, high, ..] = rest {
        let length = usize::from(u16::from_ne_bytes([*low, *high]));
        indices.extend(u32_at(rest, 4));
        if length < NEXT_HOP_HEADER {
            break;
        }
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    indices
}

/// Tells when a link, an address or a route comes, goes or changes.
pub struct Events {
    connection: Readable<Connection>,
}

impl Events {
    /// Subscribes.
    ///
    /// # Errors
    /// When netlink can't be used.
    pub fn open() -> io::Result<Self> {
        let connection = Connection::open(NETLINK_ROUTE, &GROUPS)?;
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

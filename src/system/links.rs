//! Links, their addresses and routes, from rtnetlink(7).
//!
//! May not live here: which links are uplinks (`policy::links`).

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;

use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage};
use netlink_packet_route::route::{RouteAttribute, RouteMessage, RouteType};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::netlink::Connection;
use super::readable::Readable;
use crate::policy::links::Link;

/// `NETLINK_ROUTE`.
const NETLINK_ROUTE: isize = 0;
/// `RTNLGRP_LINK`, `RTNLGRP_IPV4_IFADDR`, `RTNLGRP_IPV4_ROUTE`, `RTNLGRP_IPV6_IFADDR`,
/// `RTNLGRP_IPV6_ROUTE` (linux/rtnetlink.h).
const GROUPS: [u32; 5] = [1, 5, 7, 9, 11];
/// `RT_TABLE_LOCAL`: the kernel's own table of local addresses.
const TABLE_LOCAL: u8 = 255;

/// All links with what the addresses and routes say of them.
///
/// # Errors
/// When netlink can't be used or read.
pub fn read() -> io::Result<Vec<Link>> {
    let mut connection = Connection::open(NETLINK_ROUTE, &[])?;
    let mut links = BTreeMap::new();
    for message in connection.dump(&RouteNetlinkMessage::GetLink(LinkMessage::default()))? {
        if let RouteNetlinkMessage::NewLink(link) = message {
            links.insert(link.header.index, read_link(&link));
        }
    }
    for message in connection.dump(&RouteNetlinkMessage::GetAddress(AddressMessage::default()))? {
        let RouteNetlinkMessage::NewAddress(address) = message else {
            continue;
        };
        if let Some(link) = links.get_mut(&address.header.index) {
            link.has_address |= address.attributes.iter().any(is_beyond_the_link);
        }
    }
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut request = RouteMessage::default();
        request.header.address_family = family;
        for message in connection.dump(&RouteNetlinkMessage::GetRoute(request))? {
            if let RouteNetlinkMessage::NewRoute(route) = message {
                read_route(&route, &mut links);
            }
        }
    }
    Ok(links.into_values().collect())
}

fn read_link(message: &LinkMessage) -> Link {
    let mut link = Link {
        index: message.header.index,
        ..Link::default()
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::Controller(index) => link.controller = Some(*index),
            LinkAttribute::LinkInfo(infos) => {
                link.kind = infos.iter().find_map(|info| match info {
                    LinkInfo::Kind(kind) => Some(kind_name(kind)),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    link
}

fn kind_name(kind: &InfoKind) -> String {
    kind.to_string().to_ascii_lowercase()
}

fn is_beyond_the_link(attribute: &AddressAttribute) -> bool {
    match attribute {
        AddressAttribute::Address(IpAddr::V4(_)) | AddressAttribute::Local(IpAddr::V4(_)) => true,
        AddressAttribute::Address(IpAddr::V6(v6)) => !v6.is_unicast_link_local(),
        _ => false,
    }
}

fn read_route(route: &RouteMessage, links: &mut BTreeMap<u32, Link>) {
    let header = &route.header;
    if header.kind != RouteType::Unicast || header.table == TABLE_LOCAL {
        return;
    }
    let host_length = if header.address_family == AddressFamily::Inet {
        32
    } else {
        128
    };
    for index in outgoing(route) {
        if let Some(link) = links.get_mut(&index) {
            link.has_default_route |= header.destination_prefix_length == 0;
            link.has_host_route |= header.destination_prefix_length == host_length;
        }
    }
}

fn outgoing(route: &RouteMessage) -> Vec<u32> {
    let indices = route.attributes.iter().flat_map(|attribute| match attribute {
        RouteAttribute::Oif(index) => vec![*index],
        RouteAttribute::MultiPath(hops) => hops.iter().map(|hop| hop.interface_index).collect(),
        _ => Vec::new(),
    });
    indices.collect()
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

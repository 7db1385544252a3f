//! Sockets of this network namespace that take what comes from outside, from sock_diag(7): TCP sockets that
//! listen, and UDP sockets that are bound and connected to nobody.
//!
//! Two dumps a family and no walk through processes: the kernel says of each socket whose it is and which
//! control group made it, and the group's path names the unit. Raw sockets, SCTP and UDP-Lite are not asked
//! for: asking would have the kernel load their modules.
//! May not live here: who reaches them (`policy::exposure`), which program holds them (`socket_owners`).

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::unix::fs::DirEntryExt;
use std::path::{Path, PathBuf};

use super::netlink::{Attributes, Connection, RawMessage, u32_at};
use crate::policy::exposure::socket::{Socket, Transport, is_ephemeral, unit_of};

/// `NETLINK_SOCK_DIAG`.
const NETLINK_SOCK_DIAG: isize = 4;
/// `SOCK_DIAG_BY_FAMILY` (linux/sock_diag.h).
const BY_FAMILY: u16 = 20;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
/// States (include/net/tcp_states.h of the kernel): a UDP socket that is connected is `ESTABLISHED`.
const LISTEN: u8 = 10;
const CLOSE: u8 = 7;
/// Length of `struct inet_diag_sockid`, and of `struct inet_diag_msg` (linux/inet_diag.h).
const ID_BYTES: usize = 48;
const MESSAGE_BYTES: usize = 72;
/// Offsets in the latter.
const LOCAL_PORT: usize = 4;
const REMOTE_PORT: usize = 6;
const LOCAL_ADDRESS: usize = 8;
const INTERFACE: usize = 40;
const UID: usize = 64;
const INODE: usize = 68;
/// Attributes (linux/inet_diag.h). The group's id is told by Linux 5.8 and newer.
const INET_DIAG_SKV6ONLY: u16 = 11;
const INET_DIAG_CGROUP_ID: u16 = 21;

/// Where the unified hierarchy is mounted, or is beside the older one.
const CGROUPS: [&str; 2] = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"];
/// How many control groups are looked through for those of the sockets.
const MAX_CGROUPS: usize = 10_000;
/// The range of ports that the kernel gives to who names none.
const EPHEMERAL: &str = "/proc/sys/net/ipv4/ip_local_port_range";

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// The sockets, each with its unit where the kernel tells.
    pub sockets: Vec<Socket>,
    /// UDP sockets with a port that nobody chose: those of clients. They come and go.
    pub ephemeral: BTreeSet<u16>,
}

/// All sockets of this network namespace that take what comes from outside. `interfaces` names what a
/// socket is bound to.
///
/// # Errors
/// When the kernel lacks sock_diag (CONFIG_INET_DIAG, CONFIG_INET_UDP_DIAG).
pub fn read(interfaces: &BTreeMap<u32, String>) -> io::Result<Found> {
    let mut connection = Connection::open(NETLINK_SOCK_DIAG, &[])?;
    let (mut sockets, mut groups) = (Vec::new(), Vec::new());
    for transport in [Transport::Tcp, Transport::Udp] {
        for family in [AF_INET, AF_INET6] {
            let question = RawMessage::new(BY_FAMILY, request(family, transport));
            let dump = connection.dump(&question)?;
            let read = dump
                .iter()
                .filter_map(|message| socket(message.payload(), transport, interfaces));
            for (socket, group) in read {
                sockets.push(socket);
                groups.push(group);
            }
        }
    }
    let wanted = groups.iter().copied().flatten().collect();
    let paths = cgroups(&wanted);
    for (socket, group) in sockets.iter_mut().zip(groups) {
        let path = group.and_then(|id| paths.get(&id));
        socket.unit = path.and_then(|path| unit_of(path));
    }
    let range = fs::read_to_string(EPHEMERAL).unwrap_or_default();
    let ephemeral = sockets
        .iter()
        .filter(|socket| socket.transport == Transport::Udp && is_ephemeral(&range, socket.local.port()))
        .map(|socket| socket.local.port())
        .collect();
    Ok(Found { sockets, ephemeral })
}

/// `struct inet_diag_req_v2`.
fn request(family: u8, transport: Transport) -> Vec<u8> {
    let state = match transport {
        Transport::Tcp => LISTEN,
        Transport::Udp => CLOSE,
    };
    let mut bytes = vec![family, transport.number(), 0, 0];
    bytes.extend((1u32 << state).to_ne_bytes());
    bytes.extend([0; ID_BYTES]);
    bytes
}

/// A socket, and the id of the control group that made it.
fn socket(
    message: &[u8],
    transport: Transport,
    interfaces: &BTreeMap<u32, String>,
) -> Option<(Socket, Option<u64>)> {
    let port = |at: usize| Some(u16::from_be_bytes(message.get(at..at + 2)?.try_into().ok()?));
    // Not bound to a port, or connected: nothing new comes to it.
    if port(LOCAL_PORT)? == 0 || port(REMOTE_PORT)? != 0 {
        return None;
    }
    let address = match *message.first()? {
        AF_INET => IpAddr::from(Ipv4Addr::from(bytes::<4>(message, LOCAL_ADDRESS)?)),
        AF_INET6 => IpAddr::from(Ipv6Addr::from(bytes::<16>(message, LOCAL_ADDRESS)?)),
        _ => return None,
    };
    let (mut v6_only, mut group) = (false, None);
    for attribute in Attributes::behind(message, MESSAGE_BYTES) {
        match attribute.kind() {
            INET_DIAG_SKV6ONLY => v6_only = attribute.value().first().is_some_and(|only| *only != 0),
            INET_DIAG_CGROUP_ID => group = bytes::<8>(attribute.value(), 0).map(u64::from_ne_bytes),
            _ => {}
        }
    }
    let interface = match u32_at(message, INTERFACE)? {
        0 => None,
        index => Some(
            interfaces
                .get(&index)
                .cloned()
                .unwrap_or_else(|| format!("#{index}")),
        ),
    };
    let socket = Socket {
        transport,
        local: SocketAddr::new(address, port(LOCAL_PORT)?),
        v6_only,
        interface,
        uid: u32_at(message, UID)?,
        inode: u32_at(message, INODE)?,
        unit: None,
        program: None,
    };
    Some((socket, group))
}

fn bytes<const N: usize>(message: &[u8], at: usize) -> Option<[u8; N]> {
    message.get(at..at + N)?.try_into().ok()
}

/// The paths of these control groups, as far as they are found: a group's id is the number of its folder.
fn cgroups(wanted: &BTreeSet<u64>) -> BTreeMap<u64, String> {
    let mut found = BTreeMap::new();
    let mounted = CGROUPS
        .iter()
        .map(Path::new)
        .find(|path| path.join("cgroup.controllers").exists());
    let Some(root) = mounted.filter(|_| !wanted.is_empty()) else {
        return found;
    };
    let mut folders = vec![PathBuf::new()];
    let mut looked_at = 0;
    while let Some(folder) = folders.pop() {
        looked_at += 1;
        if looked_at > MAX_CGROUPS || found.len() == wanted.len() {
            break;
        }
        for entry in fs::read_dir(root.join(&folder)).into_iter().flatten().flatten() {
            if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                continue;
            }
            let path = folder.join(entry.file_name());
            if wanted.contains(&entry.ino()) {
                found.insert(entry.ino(), path.to_string_lossy().into_owned());
            }
            folders.push(path);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, UdpSocket};

    fn all() -> Vec<Socket> {
        read(&BTreeMap::new()).unwrap().sockets
    }

    fn at(address: SocketAddr, transport: Transport) -> Option<Socket> {
        let here = |socket: &Socket| (socket.local, socket.transport) == (address, transport);
        all().into_iter().find(here)
    }

    #[test]
    fn what_listens_is_found_and_what_is_connected_is_not() {
        for any in ["127.0.0.1:0", "[::1]:0"] {
            let tcp = TcpListener::bind(any).unwrap();
            let udp = UdpSocket::bind(any).unwrap();
            let (tcp_at, udp_at) = (tcp.local_addr().unwrap(), udp.local_addr().unwrap());
            let found = at(tcp_at, Transport::Tcp).expect("a listener");
            assert_eq!(found.uid, nix::unistd::geteuid().as_raw());
            assert_ne!(found.inode, 0);
            assert!(at(udp_at, Transport::Udp).is_some());
            // A connected one hears only its peer.
            udp.connect(tcp_at).unwrap();
            assert_eq!(at(udp_at, Transport::Udp), None);
        }
    }

    #[test]
    fn dual_stack_and_v6_only_are_told_apart() {
        use socket2::{Domain, Socket as Raw, Type};
        for only in [true, false] {
            for (kind, transport) in [(Type::STREAM, Transport::Tcp), (Type::DGRAM, Transport::Udp)] {
                let raw = Raw::new(Domain::IPV6, kind, None).unwrap();
                raw.set_only_v6(only).unwrap();
                let any: SocketAddr = "[::]:0".parse().unwrap();
                raw.bind(&any.into()).unwrap();
                if transport == Transport::Tcp {
                    raw.listen(1).unwrap();
                }
                let bound = raw.local_addr().unwrap().as_socket().unwrap();
                assert_eq!(at(bound, transport).unwrap().v6_only, only);
            }
        }
    }
}

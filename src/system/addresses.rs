//! This host's addresses, by interface.
//!
//! May not live here: which of them matter.

use std::io;
use std::net::IpAddr;

use nix::ifaddrs::getifaddrs;
use nix::sys::socket::SockaddrStorage;

/// Each address with the name of its interface.
///
/// # Errors
/// As getifaddrs(3).
pub fn read() -> io::Result<Vec<(String, IpAddr)>> {
    let found = getifaddrs()?.filter_map(|entry| Some((entry.interface_name, ip(&entry.address?)?)));
    Ok(found.collect())
}

fn ip(address: &SockaddrStorage) -> Option<IpAddr> {
    let v4 = address.as_sockaddr_in().map(|v4| v4.ip().into());
    v4.or_else(|| address.as_sockaddr_in6().map(|v6| v6.ip().into()))
}

//! A socket that takes what comes from outside, as a value, and what its names mean.
//!
//! May not live here: asking the kernel (`system::listeners`), who reaches it (`super::judge`).

use std::fmt;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use serde::{Deserialize, Serialize};

use crate::policy::ruleset::Family;

/// A protocol with ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl Transport {
    /// IP protocol number.
    pub fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
        }
    }

    /// Of an IP protocol number.
    pub fn of(number: u8) -> Option<Self> {
        [Self::Tcp, Self::Udp]
            .into_iter()
            .find(|transport| transport.number() == number)
    }
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

/// A process that holds a socket.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Program {
    /// Its number; the lowest one, if several hold the socket.
    pub pid: u32,
    /// The program's file, as the kernel has it: `/proc/PID/exe`. A process can't choose it freely.
    pub file: Option<String>,
    /// What the process calls itself: `/proc/PID/comm`. It may say anything.
    pub name: String,
}

impl Program {
    /// What to call it: the file's name, for a process may call itself what it likes.
    pub fn short(&self) -> &str {
        let file = self
            .file
            .as_deref()
            .map(|file| file.trim_end_matches(" (deleted)"));
        let last = file.and_then(|file| file.rsplit('/').next());
        last.filter(|last| !last.is_empty()).unwrap_or(&self.name)
    }
}

/// A socket that takes what comes from outside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Socket {
    /// TCP and listening, or UDP and not connected.
    pub transport: Transport,
    /// What it is bound to.
    pub local: SocketAddr,
    /// Whether one that is bound to `[::]` hears IPv6 alone (`IPV6_V6ONLY`).
    pub v6_only: bool,
    /// The interface that it is bound to, if any (`SO_BINDTODEVICE`).
    pub interface: Option<String>,
    /// Whose it is.
    pub uid: u32,
    /// Its number, by which a process that holds it can be found.
    pub inode: u32,
    /// The unit that made it, if that is known.
    pub unit: Option<String>,
    /// The program that holds it, if that is known.
    pub program: Option<Program>,
}

impl Socket {
    /// The IP versions that it hears.
    pub fn families(&self) -> Vec<Family> {
        match self.local.ip() {
            IpAddr::V4(_) => vec![Family::Ipv4],
            IpAddr::V6(Ipv6Addr::UNSPECIFIED) if !self.v6_only => Family::BOTH.to_vec(),
            // `::ffff:10.0.0.1`: an IPv6 socket that hears IPv4 alone.
            IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some() => vec![Family::Ipv4],
            IpAddr::V6(_) => vec![Family::Ipv6],
        }
    }

    /// Whether it is this host's own business: bound to a loopback address, or to the interface.
    pub fn is_loopback(&self) -> bool {
        self.local.ip().to_canonical().is_loopback() || self.interface.as_deref() == Some("lo")
    }

    /// What it is bound to, for people: `*`, `0.0.0.0`, `[::]`, an address, and the interface.
    pub fn bound_to(&self) -> String {
        let address = match self.local.ip() {
            IpAddr::V6(Ipv6Addr::UNSPECIFIED) if !self.v6_only => "*".to_owned(),
            IpAddr::V6(v6) if v6.to_ipv4_mapped().is_none() => format!("[{v6}]"),
            other => other.to_canonical().to_string(),
        };
        match &self.interface {
            Some(interface) => format!("{address}%{interface}"),
            None => address,
        }
    }
}

/// The unit of a control group: the first part of its path that is no slice (systemd.slice(5)). What a
/// user or a container makes lies below a unit of the system, so it can't pretend to be another one.
pub fn unit_of(cgroup: &str) -> Option<String> {
    let mut parts = cgroup.split('/').filter(|part| !part.is_empty());
    let unit = parts.find(|part| !part.ends_with(".slice"))?;
    // A leading `_` keeps names apart from the kernel's own files.
    let unit = unit.strip_prefix('_').unwrap_or(unit);
    let is_unit = [".service", ".socket", ".scope", ".mount", ".swap"]
        .iter()
        .any(|suffix| unit.ends_with(suffix));
    is_unit.then(|| unit.to_owned())
}

/// Whether the kernel gives the port to who names none: it is in the range, two numbers.
pub fn is_ephemeral(range: &str, port: u16) -> bool {
    let mut bounds = range.split_whitespace().map(str::parse::<u16>);
    match (bounds.next(), bounds.next()) {
        (Some(Ok(first)), Some(Ok(last))) => (first..=last).contains(&port),
        _ => false,
    }
}

/// The unit whose `Listen` of systemd names this socket, among all that systemd listens for: each a unit,
/// `Stream` or `Datagram`, and an address (org.freedesktop.systemd1(5)).
pub fn activated_by<'a>(socket: &Socket, listens: &'a [(String, String, String)]) -> Option<&'a str> {
    let kind = match socket.transport {
        Transport::Tcp => "Stream",
        Transport::Udp => "Datagram",
    };
    let is_it = |(_, of, address): &&(String, String, String)| {
        // A link-local address has its interface somewhere: `[fe80::1]:22%eth0`, `[fe80::1%eth0]:22`.
        let start = address.split('%').next().unwrap_or_default();
        let port = address.rsplit_once("]:").map_or("", |(_, port)| port);
        let inner = format!("{start}]:{port}");
        of == kind
            && [start, inner.as_str()]
                .iter()
                .any(|text| text.parse() == Ok(socket.local))
    };
    listens.iter().find(is_it).map(|(unit, ..)| unit.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn socket(local: &str, v6_only: bool) -> Socket {
        Socket {
            transport: Transport::Tcp,
            local: local.parse().unwrap(),
            v6_only,
            interface: None,
            uid: 0,
            inode: 1,
            unit: None,
            program: None,
        }
    }

    #[test]
    fn a_unit_is_the_first_part_that_is_no_slice() {
        for (path, unit) in [
            ("system.slice/ssh.service", Some("ssh.service")),
            ("system.slice/ssh.socket", Some("ssh.socket")),
            (
                "system.slice/system-getty.slice/getty@tty1.service",
                Some("getty@tty1.service"),
            ),
            (
                "user.slice/user-1000.slice/session-3.scope",
                Some("session-3.scope"),
            ),
            // What a user makes is below the user's own unit.
            (
                "user.slice/user-1000.slice/user@1000.service/ssh.service",
                Some("user@1000.service"),
            ),
            (
                "system.slice/docker-0a.scope/system.slice/ssh.service",
                Some("docker-0a.scope"),
            ),
            ("init.scope", Some("init.scope")),
            ("system.slice/_cpu.service", Some("cpu.service")),
            ("system.slice", None),
            ("kubepods/pod1", None),
            ("", None),
        ] {
            assert_eq!(unit_of(path).as_deref(), unit, "{path}");
        }
    }

    #[test]
    fn addresses_say_which_versions_are_heard_and_from_where() {
        use Family::{Ipv4, Ipv6};
        for (local, v6_only, families, loopback, shown) in [
            ("0.0.0.0:1", false, vec![Ipv4], false, "0.0.0.0"),
            ("[::]:1", false, vec![Ipv4, Ipv6], false, "*"),
            ("[::]:1", true, vec![Ipv6], false, "[::]"),
            ("[::ffff:10.0.0.1]:1", false, vec![Ipv4], false, "10.0.0.1"),
            ("[::ffff:127.0.0.1]:1", false, vec![Ipv4], true, "127.0.0.1"),
            ("127.5.0.1:1", false, vec![Ipv4], true, "127.5.0.1"),
            ("[::1]:1", true, vec![Ipv6], true, "[::1]"),
        ] {
            let socket = socket(local, v6_only);
            assert_eq!(socket.families(), families, "{local}");
            assert_eq!(socket.is_loopback(), loopback, "{local}");
            assert_eq!(socket.bound_to(), shown);
        }
        let on_loopback = Socket {
            interface: Some("lo".into()),
            ..socket("0.0.0.0:1", false)
        };
        assert!(on_loopback.is_loopback());
    }

    #[test]
    fn a_program_is_called_by_its_file() {
        let program = |file: Option<&str>| Program {
            pid: 1,
            file: file.map(str::to_owned),
            name: "sshd".into(),
        };
        assert_eq!(program(Some("/tmp/evil (deleted)")).short(), "evil");
        assert_eq!(program(Some("/usr/sbin/sshd")).short(), "sshd");
        assert_eq!(program(None).short(), "sshd");
    }

    #[test]
    fn an_activated_socket_is_found_by_what_systemd_listens_for() {
        let listens: Vec<_> = [
            ("a.socket", "Stream", "/run/a"),
            ("b.socket", "Datagram", "[::]:22"),
            ("ssh.socket", "Stream", "[::]:22"),
            ("c.socket", "Stream", "[fe80::1%eth0]:23"),
            ("d.socket", "Stream", "[fe80::1]:24%eth0"),
        ]
        .map(|(unit, kind, at)| (unit.to_owned(), kind.to_owned(), at.to_owned()))
        .into();
        assert_eq!(
            activated_by(&socket("[::]:22", false), &listens),
            Some("ssh.socket")
        );
        assert_eq!(
            activated_by(&socket("[fe80::1]:23", false), &listens),
            Some("c.socket")
        );
        assert_eq!(
            activated_by(&socket("[fe80::1]:24", false), &listens),
            Some("d.socket")
        );
        assert_eq!(activated_by(&socket("0.0.0.0:22", false), &listens), None);
    }

    #[test]
    fn a_range_that_is_none_holds_nothing() {
        assert!(is_ephemeral("32768\t60999\n", 40_000));
        assert!(!is_ephemeral("32768\t60999\n", 22));
        assert!(!is_ephemeral("", 40_000));
    }
}

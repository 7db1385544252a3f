//! TCP sessions and listening sockets of this host, from sock_diag(7), and ending a session.
//!
//! May not live here: which sessions are to end.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::netlink::{Connection, RawMessage};

/// `NETLINK_SOCK_DIAG`.
const NETLINK_SOCK_DIAG: isize = 4;
/// `SOCK_DIAG_BY_FAMILY` and `SOCK_DESTROY` (linux/sock_diag.h).
const BY_FAMILY: u16 = 20;
const DESTROY: u16 = 21;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
const IPPROTO_TCP: u8 = 6;
/// States of a socket (include/net/tcp_states.h of the kernel).
const LISTEN: u8 = 10;
/// Sessions in both directions, or half closed: ESTABLISHED, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT.
const SESSION_STATES: [u8; 4] = [1, 4, 5, 8];
/// Offset and length of `struct inet_diag_sockid` in `struct inet_diag_msg` (linux/inet_diag.h).
const ID_AT: usize = 4;
const ID_BYTES: usize = 48;
/// Where the kernel's number for the socket is in it: no later socket has the same.
const COOKIE_AT: usize = 40;

/// A TCP session of a socket of this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Session {
    /// This host's end.
    pub local: SocketAddr,
    /// The other end.
    pub remote: SocketAddr,
    /// Whether the other end began it: somebody here listens on the port.
    pub is_inbound: bool,
    family: u8,
    /// `struct inet_diag_sockid` with its cookie, so that no later socket is meant.
    id: Vec<u8>,
}

/// A TCP socket that listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Listener {
    /// Where.
    pub local: SocketAddr,
    /// The kernel's number for it (`idiag_cookie`): one that listens there later has another.
    pub cookie: u64,
}

/// All TCP sockets of this network namespace that listen.
///
/// # Errors
/// When the kernel lacks sock_diag (CONFIG_INET_DIAG).
pub fn listeners() -> io::Result<BTreeSet<Listener>> {
    let listener = |(_, socket): (u8, Session)| {
        let cookie = socket.id.get(COOKIE_AT..)?.try_into().ok()?;
        Some(Listener {
            local: socket.local,
            cookie: u64::from_ne_bytes(cookie),
        })
    };
    Ok(dump(1 << LISTEN)?.into_iter().filter_map(listener).collect())
}

/// All TCP sessions of this network namespace's sockets.
///
/// # Errors
/// When the kernel lacks sock_diag (CONFIG_INET_DIAG).
pub fn sessions() -> io::Result<Vec<Session>> {
    let states = SESSION_STATES
        .iter()
        .fold(1 << LISTEN, |all, state| all | 1 << state);
    let (listening, mut sessions): (Vec<_>, Vec<_>) =
        dump(states)?.into_iter().partition(|(state, _)| *state == LISTEN);
    let listening: BTreeSet<u16> = listening.iter().map(|(_, socket)| socket.local.port()).collect();
    for (_, session) in &mut sessions {
        session.is_inbound = listening.contains(&session.local.port());
    }
    Ok(sessions.into_iter().map(|(_, session)| session).collect())
}

/// The TCP sockets in these states (a bit for each), and the state of each.
fn dump(states: u32) -> io::Result<Vec<(u8, Session)>> {
    let mut connection = Connection::open(NETLINK_SOCK_DIAG, &[])?;
    let mut found = Vec::new();
    for family in [AF_INET, AF_INET6] {
        let question = request(family, states, &[0; ID_BYTES]);
        let messages = connection.dump(&RawMessage::new(BY_FAMILY, question))?;
        found.extend(
            messages
                .iter()
                .filter_map(|message| read_session(message.payload())),
        );
    }
    Ok(found)
}

/// Ends a session at once: both ends see it reset.
///
/// # Errors
/// `EOPNOTSUPP` when the kernel can't (CONFIG_INET_DIAG_DESTROY), `ENOENT` when it has ended meanwhile.
pub fn end(session: &Session) -> io::Result<()> {
    let mut connection = Connection::open(NETLINK_SOCK_DIAG, &[])?;
    let question = request(session.family, u32::MAX, &session.id);
    connection.get(&RawMessage::new(DESTROY, question))?;
    Ok(())
}

/// `struct inet_diag_req_v2`.
fn request(family: u8, states: u32, id: &[u8]) -> Vec<u8> {
    let mut bytes = vec![family, IPPROTO_TCP, 0, 0];
    bytes.extend(states.to_ne_bytes());
    bytes.extend(id);
    bytes
}

/// State and ends of the socket of one answer (`struct inet_diag_msg`); `None` if it is cut off.
pub fn read_session(message: &[u8]) -> Option<(u8, Session)> {
    let [family, state, ..] = *message else {
        return None;
    };
    let id = message.get(ID_AT..ID_AT + ID_BYTES)?;
    let port = |at: usize| Some(u16::from_be_bytes(id.get(at..at + 2)?.try_into().ok()?));
    let address = |at: usize| {
        Some(match family {
            AF_INET => IpAddr::from(Ipv4Addr::from(<[u8; 4]>::try_from(id.get(at..at + 4)?).ok()?)),
            _ => {
                IpAddr::from(Ipv6Addr::from(<[u8; 16]>::try_from(id.get(at..at + 16)?).ok()?)).to_canonical()
            }
        })
    };
    let session = Session {
        local: SocketAddr::new(address(4)?, port(0)?),
        remote: SocketAddr::new(address(20)?, port(2)?),
        is_inbound: false,
        family,
        id: id.to_vec(),
    };
    Some((state, session))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::net::{TcpListener, TcpStream};

    #[test]
    fn a_session_is_found_at_both_ends_and_can_be_ended() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (_server, _) = listener.accept().unwrap();
        let (local, remote) = (client.local_addr().unwrap(), client.peer_addr().unwrap());
        let all = sessions().unwrap();
        let ours = |local, remote| {
            all.iter()
                .find(|s| s.local == local && s.remote == remote)
                .unwrap()
        };
        assert!(!ours(local, remote).is_inbound);
        assert!(ours(remote, local).is_inbound);
        // Ending it needs root, as all of `make test` does.
        end(ours(remote, local)).unwrap();
        assert_eq!(
            client.read(&mut [0]).unwrap_err().kind(),
            io::ErrorKind::ConnectionReset
        );
    }
    #[test]
    fn a_socket_that_listens_anew_is_another() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let local = listener.local_addr().unwrap();
        let here = || -> Vec<u64> {
            let all = listeners().unwrap();
            let here = all.iter().filter(|l| l.local == local);
            here.map(|l| l.cookie).collect()
        };
        let before = here();
        assert_eq!(before.len(), 1);
        assert_eq!(here(), before);
        drop(listener);
        // A process that another test starts at this moment has it until it runs its program.
        let end = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while !here().is_empty() {
            assert!(std::time::Instant::now() < end);
            std::thread::yield_now();
        }
        let _again = TcpListener::bind(local).unwrap();
        assert_eq!(here().len(), 1);
        assert_ne!(here(), before);
    }
}

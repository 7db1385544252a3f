//! Measuring who reaches what, with real connections between namespaces.
//!
//! May not live here: what ought to be reachable. That is for the caller to compare.

use std::fmt;
use std::io::{self, ErrorKind};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::Result;
use crate::local::{Instance, in_namespace};

/// How long is waited for an answer. On one machine one comes in well under a millisecond.
pub const ANSWER_TIME: Duration = Duration::from_millis(700);

/// The protocol of a probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// A TCP connection.
    Tcp,
    /// A UDP datagram that an echo has to answer.
    Udp,
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

/// From where a probe is sent.
#[derive(Clone, Debug)]
pub struct Vantage {
    /// A name for people.
    pub label: String,
    /// The network namespace that it is sent from.
    pub namespace: PathBuf,
}

/// What a probe is sent to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// TCP or UDP.
    pub transport: Transport,
    /// Address and port.
    pub address: SocketAddr,
}

/// What came of a probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Reached {
    /// Something answered.
    Open,
    /// The host answered that nothing listens: the probe got through.
    Closed,
    /// No answer: it was dropped on the way (or, for UDP, nobody echoes).
    Filtered,
    /// It could not be sent, or an error came back.
    Unreachable,
}

impl fmt::Display for Reached {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Open => "open",
            Self::Closed => "closed",
            Self::Filtered => "filtered",
            Self::Unreachable => "unreachable",
        })
    }
}

/// Probes all pairs at once; the results are in the order of the probes.
///
/// # Errors
/// When a namespace can't be entered.
pub fn measure(probes: &[(Vantage, Target)]) -> io::Result<Vec<Reached>> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = probes
            .iter()
            .map(|(from, to)| scope.spawn(|| in_namespace(&from.namespace, || probe(*to))))
            .collect();
        let panicked = |_| Err(io::Error::other("a probe panicked"));
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(panicked))
            .collect()
    })
}

/// Probes one target from the calling thread's namespace.
pub fn probe(target: Target) -> Reached {
    let result = match target.transport {
        Transport::Tcp => TcpStream::connect_timeout(&target.address, ANSWER_TIME).map(drop),
        Transport::Udp => echo(target.address),
    };
    match result {
        Ok(()) => Reached::Open,
        Err(e) => match e.kind() {
            ErrorKind::ConnectionRefused => Reached::Closed,
            ErrorKind::TimedOut | ErrorKind::WouldBlock => Reached::Filtered,
            _ => Reached::Unreachable,
        },
    }
}

fn echo(address: SocketAddr) -> io::Result<()> {
    let any = if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = UdpSocket::bind(any)?;
    socket.connect(address)?;
    let until = Instant::now() + ANSWER_TIME;
    // Twice, since a datagram may be lost while an address is being looked up.
    for _ in 0..2 {
        socket.send(b"portcullis")?;
        let left = until
            .saturating_duration_since(Instant::now())
            .max(Duration::from_millis(1));
        socket.set_read_timeout(Some(left / 2 + Duration::from_millis(1)))?;
        match socket.recv(&mut [0; 64]) {
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            other => return other.map(drop),
        }
    }
    Err(ErrorKind::TimedOut.into())
}

/// Echoes on the ports that it is given, and tells systemd when all are bound.
const LISTEN: &str = r#"
import os, selectors, socket, sys
selector = selectors.DefaultSelector()
for word in sys.argv[1:]:
    kind, port = word.split(":")
    for family, address in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
        s = socket.socket(family, socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM)
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        s.bind((address, int(port)))
        if kind == "tcp":
            s.listen(64)
        selector.register(s, selectors.EVENT_READ, kind)
with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
    notify.connect(os.environ["NOTIFY_SOCKET"].replace("@", "\0", 1))
    notify.send(b"READY=1")
while True:
    for key, _ in selector.select():
        try:
            if key.data == "tcp":
                connection, _ = key.fileobj.accept()
                connection.close()
            else:
                data, peer = key.fileobj.recvfrom(2048)
                key.fileobj.sendto(data, peer)
        except OSError:
            pass
"#;

/// Starts listeners inside an instance, on IPv4 and IPv6: TCP that accepts, UDP that echoes. They
/// run until the instance reboots.
///
/// # Errors
/// When they can't be started, for example because a port is taken.
pub fn listen_inside(instance: &Instance, ports: &[(Transport, u16)]) -> Result<()> {
    let words: Vec<String> = ports
        .iter()
        .map(|(transport, port)| format!("{transport}:{port}"))
        .collect();
    let unit = [
        "systemd-run",
        "--quiet",
        "--collect",
        "--service-type=notify",
        "--unit=reach-listeners",
    ];
    let mut command = unit.to_vec();
    command.extend(["-p", "NotifyAccess=all", "--", "python3", "-c", LISTEN]);
    command.extend(words.iter().map(String::as_str));
    instance.exec_ok(&command).map(drop)
}

/// A TCP listener of this process, inside a namespace, that accepts and closes until dropped. Then the port is free.
pub struct Listener {
    address: SocketAddr,
    namespace: PathBuf,
    stop: std::sync::Arc<std::sync::atomic::AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Listener {
    /// Listens on `port` of all IPv4 and IPv6 addresses of the namespace.
    ///
    /// # Errors
    /// When the namespace can't be entered or the port is taken.
    pub fn new(namespace: impl Into<PathBuf>, port: u16) -> io::Result<Self> {
        use std::sync::atomic::Ordering;
        let namespace = namespace.into();
        let listener = in_namespace(&namespace, || TcpListener::bind(("::", port)))??;
        let address = SocketAddr::new(
            std::net::Ipv6Addr::LOCALHOST.into(),
            listener.local_addr()?.port(),
        );
        let stop = std::sync::Arc::<std::sync::atomic::AtomicBool>::default();
        let stopped = std::sync::Arc::clone(&stop);
        let thread =
            std::thread::spawn(
                move || {
                    while listener.accept().is_ok() && !stopped.load(Ordering::Relaxed) {}
                },
            );
        Ok(Self {
            address,
            namespace,
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.stop.store(true, std::sync::atomic::Ordering::Relaxed);
        // Wakes the thread up; should it fail, the thread ends with the process.
        let woken = in_namespace(&self.namespace, || {
            TcpStream::connect_timeout(&self.address, ANSWER_TIME)
        });
        if let (Ok(Ok(_)), Some(thread)) = (woken, self.thread.take()) {
            // It has nothing to say.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(transport: Transport, address: SocketAddr) -> Target {
        Target { transport, address }
    }

    #[test]
    fn open_closed_and_filtered_are_told_apart() {
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = tcp.local_addr().unwrap();
        assert_eq!(probe(target(Transport::Tcp, address)), Reached::Open);
        drop(tcp);
        assert_eq!(probe(target(Transport::Tcp, address)), Reached::Closed);

        let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
        let address = udp.local_addr().unwrap();
        // Bound, but nobody answers.
        assert_eq!(probe(target(Transport::Udp, address)), Reached::Filtered);
        let echo = udp.try_clone().unwrap();
        std::thread::spawn(move || {
            let mut buffer = [0; 64];
            while let Ok((length, peer)) = echo.recv_from(&mut buffer) {
                let _ = echo.send_to(&buffer[..length], peer);
            }
        });
        assert_eq!(probe(target(Transport::Udp, address)), Reached::Open);
        assert_eq!(
            probe(target(Transport::Udp, "127.0.0.1:1".parse().unwrap())),
            Reached::Closed
        );
    }
}

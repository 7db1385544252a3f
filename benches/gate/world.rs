//! A host and a stranger on one link, and a probe between them.
//!
//! May not live here: firewalls.

use std::net::{Ipv4Addr, UdpSocket};

use crate::common::{self, Namespace};

pub const HOST: Ipv4Addr = Ipv4Addr::new(172, 16, 9, 1);
pub const STRANGER: Ipv4Addr = Ipv4Addr::new(172, 16, 9, 2);
/// An address of the stranger that can be named as a peer's.
pub const PEER: Ipv4Addr = Ipv4Addr::new(172, 16, 9, 3);
/// A port that no rule names.
pub const DENIED: u16 = 9;

pub struct World {
    pub host: Namespace,
    pub outside: Namespace,
}

impl World {
    pub fn new() -> Self {
        let (host, outside) = (Namespace::new("host"), Namespace::new("out"));
        host.connect("eth0", &outside, "eth0");
        for (namespace, address) in [(&host, HOST), (&outside, STRANGER), (&outside, PEER)] {
            common::run(&format!(
                "ip -n {} addr add {address}/24 dev eth0",
                namespace.name()
            ));
        }
        Self { host, outside }
    }

    /// A socket that does not wait.
    pub fn bound(namespace: &Namespace, address: Ipv4Addr, port: u16) -> UdpSocket {
        let socket = namespace.enter(|| UdpSocket::bind((address, port)).unwrap());
        socket.set_nonblocking(true).unwrap();
        socket
    }

    /// From an address outside to a port of the host: the sender, and the receiver.
    pub fn inbound(&self, from: Ipv4Addr, port: u16) -> (UdpSocket, UdpSocket) {
        let (here, there) = (
            Self::bound(&self.host, HOST, port),
            Self::bound(&self.outside, from, 0),
        );
        there.connect((HOST, port)).unwrap();
        (there, here)
    }

    pub fn probe(&self) -> Probe {
        let probe = Probe(self.inbound(STRANGER, DENIED));
        // The neighbour's address is asked for once.
        common::run(&format!(
            "ip netns exec {} ping -c1 -W1 {STRANGER}",
            self.host.name()
        ));
        probe
    }
}

/// Sends to a port that no rule names.
pub struct Probe((UdpSocket, UdpSocket));

impl Probe {
    /// Whether a packet gets in now: it has, or has been dropped, when send(2) returns.
    pub fn is_open(&self) -> bool {
        let Probe((there, here)) = self;
        there.send(&[0]).unwrap();
        here.recv(&mut [0]).is_ok()
    }
}

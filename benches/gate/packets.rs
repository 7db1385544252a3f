//! What a packet costs on its way in: hosts with different firewalls, in turns.
//!
//! One thread sends and receives: over a veth pair the kernel takes a packet through the receiver's
//! firewall before send(2) returns, so the time of send(2) has all of it in it.
//! May not live here: loading firewalls at speed (`peers`).

use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use portcullis::system::nftables::Nftables;
use portcullis_figures::{Better, Cell, Column, Plot, Row, Samples, Side, Table, Unit, timed};

use crate::benches::recipe::recipe;
use crate::common::{Namespace, eventually};
use crate::sandbox::{self, Server, must};
use crate::specs::{peer, plan, rule, spec};
use crate::world::{DENIED, HOST, PEER, STRANGER, World};

/// The port of the first rule; those of the others follow.
const FIRST: u16 = 1001;
/// A port of the stranger.
const OUTSIDE: u16 = 3000;

/// Packets at once: as many as a socket's buffer takes.
const BURST: u16 = 100;
const ROUNDS: u16 = 60;
const CONNECTIONS: u32 = 100;
const STREAMS: usize = 3;

/// A host with a firewall.
struct Case {
    name: &'static str,
    side: Side,
    /// What of ours it is compared with.
    beside: Option<&'static str>,
    world: World,
    /// Port of the last rule.
    last: u16,
    has_firewall: bool,
    has_peers: bool,
}

impl Case {
    fn new(
        (name, side): (&'static str, Side),
        (rules, peers): (u16, usize),
        arm: fn(&[String], Vec<String>),
    ) -> Self {
        let world = World::new();
        let last = FIRST + rules.max(1) - 1;
        // TCP comes with the first.
        let mut named = vec![rule("any", FIRST)];
        named.extend((FIRST + 1..=last).map(|port| rule("udp", port)));
        // The one that sends is the last of them: a list is walked to its end.
        let mut addresses: Vec<String> = (1..peers).map(peer).collect();
        addresses.extend((peers > 0).then(|| PEER.to_string()));
        sandbox::enter(&world.host, || arm(&named, addresses));
        Self {
            name,
            side,
            beside: (side == Side::Theirs && peers > 0).then_some(WITH_PEERS),
            world,
            last,
            has_firewall: rules > 0,
            has_peers: peers > 0,
        }
    }
}

/// The row of ours that a list of as many peers is compared with.
const WITH_PEERS: &str = "gate, 10 rules, 1,000 peers";

fn cases() -> Vec<Case> {
    use Side::{Floor, Ours, Theirs};
    vec![
        Case::new(("gate, 10 rules", Ours), (10, 0), gate),
        Case::new(("gate, 50 rules", Ours), (50, 0), gate),
        Case::new((WITH_PEERS, Ours), (10, 1_000), gate),
        Case::new(("gate, 10 rules, 100,000 peers", Ours), (10, 100_000), gate),
        Case::new(("ufw and `DOCKER-USER`, 10 rules", Theirs), (10, 0), |_, _| {
            incumbent()
        }),
        Case::new(
            ("iptables, 10 rules, a list of 1,000 peers", Theirs),
            (10, 1_000),
            |_, peers| list(&peers),
        ),
        Case::new(("no firewall, no conntrack", Floor), (0, 0), |_, _| {}),
    ]
}

fn gate(rules: &[String], peers: Vec<String>) {
    let plan = plan(&spec(peers, rules));
    Nftables::open().unwrap().replace(&plan).unwrap();
}

/// As user data does it today.
fn incumbent() {
    let udp: Vec<u16> = (FIRST..FIRST + 10).collect();
    std::fs::write("/run/recipe", recipe(&[FIRST], &udp)).unwrap();
    must("sh /run/recipe");
}

fn list(peers: &[String]) {
    let mut text =
        "*filter\n:INPUT DROP [0:0]\n:FORWARD DROP [0:0]\n:OUTPUT ACCEPT [0:0]\n-A INPUT -i lo -j ACCEPT\n\
        -A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\n"
            .to_owned();
    for peer in peers {
        text += &format!("-A INPUT -s {peer} -j ACCEPT\n");
    }
    text += &format!("-A INPUT -p tcp --dport {FIRST} -j ACCEPT\n");
    for port in FIRST..FIRST + 10 {
        text += &format!("-A INPUT -p udp --dport {port} -j ACCEPT\n");
    }
    std::fs::write("/run/rules", text + "COMMIT\n").unwrap();
    must("iptables-restore /run/rules");
}

/// Sends a burst and counts what arrives: all of it or nothing, or the figure means nothing.
fn burst(senders: &[&UdpSocket], receiver: &UdpSocket, arrives: bool) -> Duration {
    let (time, ()) = timed(|| {
        for i in 0..BURST {
            senders[usize::from(i) % senders.len()].send(&[0; 18]).unwrap();
        }
    });
    let expected = if arrives { BURST } else { 0 };
    let (mut arrived, patience) = (0, Instant::now());
    while patience.elapsed() < Duration::from_millis(if arrives { 1000 } else { 1 }) && (arrived < BURST) {
        match receiver.recv(&mut [0; 32]) {
            Ok(_) => arrived += 1,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => panic!("{error}"),
        }
    }
    assert_eq!(arrived, expected, "of {BURST} packets");
    time / u32::from(BURST)
}

/// What is measured in one world.
struct Flows<'a> {
    case: &'a Case,
    reply: (UdpSocket, UdpSocket),
    first: (UdpSocket, UdpSocket),
    last: (UdpSocket, UdpSocket),
    peer: (UdpSocket, UdpSocket),
    denied: (UdpSocket, UdpSocket),
    listener: TcpListener,
}

/// The columns.
const KINDS: [&str; 7] = [
    "reply",
    "inbound, 1st rule",
    "inbound, last rule",
    "new flow",
    "new flow, last peer",
    "dropped",
    "TCP handshake",
];

impl<'a> Flows<'a> {
    fn new(case: &'a Case) -> Self {
        let world = &case.world;
        let first = world.inbound(STRANGER, FIRST);
        // Without rules, the first is the last.
        let last = world.inbound(STRANGER, if case.last == FIRST { FIRST + 1 } else { case.last });
        for (there, here) in [&first, &last] {
            // A packet each way: what follows is established.
            there.send(&[0]).unwrap();
            let (_, from) = here.recv_from(&mut [0]).unwrap();
            here.send_to(&[0], from).unwrap();
        }
        let (here, there) = (
            World::bound(&world.host, HOST, 2000),
            World::bound(&world.outside, STRANGER, OUTSIDE),
        );
        here.connect((STRANGER, OUTSIDE)).unwrap();
        there.connect((HOST, 2000)).unwrap();
        here.send(&[0]).unwrap();
        Self {
            case,
            reply: (there, here),
            first,
            last,
            peer: world.inbound(PEER, 4711),
            denied: world.inbound(STRANGER, DENIED),
            listener: world.host.enter(|| TcpListener::bind((HOST, FIRST)).unwrap()),
        }
    }

    /// One round: a time for each kind, where it applies.
    fn round(&self, round: u16) -> [Option<Duration>; KINDS.len()] {
        let Case {
            has_firewall,
            has_peers,
            ..
        } = *self.case;
        [
            Some(burst(&[&self.reply.0], &self.reply.1, true)),
            Some(burst(&[&self.first.0], &self.first.1, true)),
            Some(burst(&[&self.last.0], &self.last.1, true)),
            Some(self.new_flows(round, STRANGER, FIRST, &self.first.1)),
            has_peers.then(|| self.new_flows(round, PEER, 4711, &self.peer.1)),
            has_firewall.then(|| burst(&[&self.denied.0], &self.denied.1, false)),
            round.is_multiple_of(10).then(|| self.connections()),
        ]
    }

    /// Each packet from a port of its own that was not used before.
    fn new_flows(&self, round: u16, from: Ipv4Addr, port: u16, receiver: &UdpSocket) -> Duration {
        let base = 5000 + round * BURST;
        let senders: Vec<UdpSocket> = self.case.world.outside.enter(|| {
            let sender = |i| {
                let socket = UdpSocket::bind((from, base + i)).unwrap();
                socket.connect((HOST, port)).unwrap();
                socket
            };
            (0..BURST).map(sender).collect()
        });
        burst(&senders.iter().collect::<Vec<_>>(), receiver, true)
    }

    /// Handshakes, one after the other.
    fn connections(&self) -> Duration {
        let to = SocketAddr::from((HOST, FIRST));
        let listener = &self.listener;
        self.case.world.outside.enter(move || {
            let (time, pairs) = timed(|| {
                let pair = |_| {
                    let outside = TcpStream::connect_timeout(&to, Duration::from_secs(2)).unwrap();
                    (outside, listener.accept().unwrap())
                };
                (0..CONNECTIONS).map(pair).collect::<Vec<_>>()
            });
            drop(pairs);
            time / CONNECTIONS
        })
    }
}

pub fn run() -> Vec<Table> {
    let cases = cases();
    let flows: Vec<Flows<'_>> = cases.iter().map(Flows::new).collect();
    let mut times_of: Vec<[Vec<Duration>; KINDS.len()]> = cases.iter().map(|_| Default::default()).collect();
    // In turns: what else the machine does meets all alike.
    for round in 0..ROUNDS {
        for (flows, times) in flows.iter().zip(&mut times_of) {
            for (times, time) in times.iter_mut().zip(flows.round(round)) {
                times.extend(time);
            }
        }
    }
    drop(flows);
    let cell = |times: Vec<Duration>| (!times.is_empty()).then(|| Samples::new(times)).into();
    let rows = cases
        .iter()
        .zip(times_of)
        .map(|(case, times)| row(case, times.map(cell).into()));
    let single = Table {
        title: "What a packet costs on its way in".to_owned(),
        method: "18 bytes over UDP, in bursts of 100 over a veth pair: the time of send(2) has the receiver's firewall \
                 in it. \"Inbound\" flows were begun by the stranger; whether their rule still holds is asked \
                 for each packet, so that revoking takes effect at once; elsewhere \"established\" ends the question. \
                 Most of what any firewall adds is connection tracking."
            .to_owned(),
        columns: KINDS.map(Column::time).into(),
        rows: rows.collect(),
        plot: Plot::Bars {
            columns: vec![0, 1, 3, 5],
            logarithmic: false,
        },
    };
    vec![single, streams(&cases)]
}

fn row(case: &Case, cells: Vec<Cell>) -> Row {
    Row {
        name: case.name.to_owned(),
        side: case.side,
        beside: case.beside.map(str::to_owned),
        cells,
    }
}

/// TCP at full speed, to a server on the host and to a client on it.
fn streams(cases: &[Case]) -> Table {
    let mut rates: Vec<[Vec<f64>; 2]> = cases.iter().map(|_| Default::default()).collect();
    for _ in 0..STREAMS {
        for (Case { world, .. }, rates) in cases.iter().zip(&mut rates) {
            rates[0].push(stream(&world.outside, &world.host, HOST, FIRST, ""));
            rates[1].push(stream(&world.host, &world.outside, STRANGER, OUTSIDE, "-R"));
        }
    }
    let rows = cases
        .iter()
        .zip(rates)
        .map(|(case, both)| row(case, both.map(Cell::many).into()));
    let rate = |name| Column::of(name, Unit::BitsPerSecond, Better::More);
    Table {
        title: "TCP at full speed into the host".to_owned(),
        method: "iperf3, one second each time. Runs differ by a tenth.".to_owned(),
        columns: vec![rate("inbound flow"), rate("reply")],
        rows: rows.collect(),
        plot: Plot::None,
    }
}

/// Bits in a second that arrive.
fn stream(client: &Namespace, server: &Namespace, to: Ipv4Addr, port: u16, how: &str) -> f64 {
    let _server = server.enter(|| Server::start(&format!("iperf3 -s -1 -p {port}")));
    let line = format!("iperf3 -c {to} -p {port} -t 1 -J {how}");
    // It does not say when it listens, and a client that fails to connect reports that, and success.
    let rate = || {
        let report: serde_json::Value =
            serde_json::from_str(&sandbox::text(&line)?).map_err(|e| e.to_string())?;
        let rate = report["end"]["sum_received"]["bits_per_second"].as_f64();
        rate.ok_or_else(|| report["error"].to_string())
    };
    client.enter(|| eventually(Duration::from_secs(5), "iperf3", rate))
}

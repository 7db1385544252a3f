//! `explain` tells the truth: thousands of random packets are sent into a network namespace, and what
//! the kernel let through is compared with what `explain` said, packet by packet. Some come in
//! fragments or behind extension headers, which must make no difference.
//!
//! May not live here: how packets are put together (common/packets.rs).
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use common::Namespace;
use common::packets::{ACK, Extension, Header, SYN, extended, icmp, raw, send, tcp, udp, with_checksum};
use portcullis::policy::explain::{Packet, explain};
use portcullis::policy::firewall::{Inputs, ruleset};
use portcullis::policy::ruleset::{Conntrack, Ruleset, Verdict};
use portcullis::system::nftables::Nftables;
use portcullis_protocol::Spec;
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{Config, RngSeed, TestRunner};

/// Packets a family and ruleset.
const PACKETS: u16 = 4000;

const SPECS: [&str; 3] = [
    "",
    r#","cluster":{"id":"c","peers":[{"instance":"p","addresses":["10.9.0.3","198.51.100.7","fd09::3","2001:db8::7"]}]},
       "firewall":{"ingress":[{"id":"ssh","protocol":"tcp","from_port":22}]}"#,
    r#","control_plane":{"sources":["192.0.2.0/24","2001:db8:1::/48","198.51.100.128/25"]},
       "firewall":{"ingress":[
        {"id":"low","from_port":1,"to_port":1000,"ip_ranges":["198.51.100.0/25","2001:db8::/33"]},
        {"id":"web","protocol":"tcp","from_port":8000,"to_port":8100,"ip_ranges":["0.0.0.0/0"]},
        {"id":"dns","protocol":"udp","from_port":53,"ip_ranges":["::/0","192.0.2.0/25"]},
        {"id":"gre","protocol":47,"ip_ranges":["198.51.100.0/24"]},
        {"id":"ping","protocol":"icmp","ip_ranges":["198.51.100.0/24","2001:db8::/32"]}]}"#,
];

/// What a random packet is made of; addresses and ports are taken from where rules draw their lines.
#[derive(Clone, Debug)]
struct Sent {
    packet: Packet,
    /// Bytes behind the transport header.
    data: usize,
    extensions: Vec<Extension>,
    fragments: Fragments,
}

/// How a datagram is cut, and how many bytes behind the first place where it may be: conntrack puts it
/// together again before the gate sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fragments {
    None,
    InOrder(usize),
    LaterFirst(usize),
    /// The first is lost.
    OnlyLater(usize),
}

fn fragments() -> impl Strategy<Value = Fragments> {
    let at = || (1usize..6).prop_map(|blocks| blocks * 8);
    prop_oneof![
        4 => Just(Fragments::None),
        1 => at().prop_map(Fragments::InOrder),
        1 => at().prop_map(Fragments::LaterFirst),
        1 => at().prop_map(Fragments::OnlyLater),
    ]
}

/// In the order of RFC 8200 section 4.1; none for IPv4.
fn extensions(icmp: u8) -> impl Strategy<Value = Vec<Extension>> {
    use Extension::{DestinationOptions, Fragment, HopByHop, Routing};
    let all = vec![
        HopByHop,
        DestinationOptions,
        Routing(0),
        Routing(2),
        Fragment,
        DestinationOptions,
    ];
    let most = if icmp == 58 { all.len() } else { 0 };
    prop_oneof![3 => Just(Vec::new()), 2 => prop::sample::subsequence(all, 0..=most)]
}

const RST: u8 = 0x04;
const FIN_ACK: u8 = 0x11;

fn v4() -> impl Strategy<Value = IpAddr> {
    prop_oneof![
        (0u8..=255).prop_map(|n| Ipv4Addr::new(198, 51, 100, n).into()),
        (0u8..=255).prop_map(|n| Ipv4Addr::new(192, 0, 2, n).into()),
        (1u8..=9).prop_map(|n| Ipv4Addr::new(10, 9, 0, n).into()),
        (0u8..=255).prop_map(|n| Ipv4Addr::new(127, 0, 0, n).into()),
        (1u8..=223, any::<[u8; 3]>()).prop_map(|(a, [b, c, d])| Ipv4Addr::new(a, b, c, d).into()),
    ]
}

fn v6() -> impl Strategy<Value = IpAddr> {
    let address = |a: u16, b: u16, c: u16, d: u16| Ipv6Addr::new(a, b, c, 0, 0, 0, 0, d).into();
    prop_oneof![
        (0u16..9, 0u16..2).prop_map(move |(d, c)| address(0x2001, 0xdb8, c, d)),
        any::<(u16, u16)>().prop_map(move |(c, d)| address(0x2001, 0xdb8, c, d)),
        (1u16..9).prop_map(move |d| address(0xfd09, 0, 0, d)),
        any::<u16>().prop_map(move |d| address(0xfe80, 0, 0, d)),
        any::<(u16, u16)>().prop_map(move |(c, d)| address(0x2a00, 1, c, d)),
    ]
}

fn port() -> impl Strategy<Value = u16> {
    prop_oneof![
        prop::sample::select(vec![
            22, 23, 53, 67, 68, 546, 547, 999, 1000, 1001, 7443, 7999, 8000, 8100, 8101
        ]),
        1u16..,
    ]
}

/// What conntrack makes of the first packet of a flow (net/netfilter/nf_conntrack_proto_*.c).
fn conntrack(protocol: u8, flags: u8, icmp_type: u8) -> Option<Conntrack> {
    let good = match protocol {
        6 => flags == SYN || flags == ACK,
        1 => matches!(icmp_type, 8 | 13 | 15 | 17),
        // Neighbour and multicast discovery are not tracked at all.
        58 => matches!(icmp_type, 128 | 130..=137 | 139 | 143),
        _ => true,
    };
    (!good).then_some(Conntrack::Invalid)
}

fn sent(source: impl Strategy<Value = IpAddr>, icmp: u8) -> impl Strategy<Value = Sent> {
    let protocol = prop_oneof![4 => Just(6u8), 4 => Just(17), 3 => Just(icmp), 1 => prop::sample::select(vec![2u8, 47, 89])];
    let icmp_type = prop_oneof![
        prop::sample::select(vec![0u8, 1, 2, 3, 4, 5, 8, 9, 11, 12, 13]),
        prop::sample::select(vec![128u8, 129, 130, 131, 132, 133, 134, 135, 136, 137]),
    ];
    let flags = prop::sample::select(vec![SYN, ACK, RST, FIN_ACK]);
    let hop_limit = prop::sample::select(vec![1u8, 64, 255]);
    let interface = prop_oneof![9 => Just("eth0"), 1 => Just("int0")];
    (
        source,
        protocol,
        icmp_type,
        flags,
        hop_limit,
        interface,
        (port(), port()),
        (extensions(icmp), fragments()),
    )
        .prop_map(
            move |(source, protocol, kind, flags, hop_limit, interface, ports, (extensions, fragments))| {
                let (source_port, port) = ports;
                let has_ports = protocol == 6 || protocol == 17;
                let packet = Packet {
                    interface: interface.to_owned(),
                    source,
                    destination: None,
                    outgoing: None,
                    protocol,
                    source_port: has_ports.then_some(source_port),
                    port: has_ports.then_some(port),
                    tcp_flags: flags,
                    icmp_type: (protocol == icmp).then_some(kind),
                    hop_limit,
                    conntrack: conntrack(protocol, flags, kind),
                };
                // Enough for both fragments, behind whatever header.
                let data = if fragments == Fragments::None { 0 } else { 64 };
                let mut extensions = extensions;
                if fragments != Fragments::None {
                    extensions.retain(|extension| *extension != Extension::Fragment);
                }
                Sent {
                    packet,
                    data,
                    extensions,
                    fragments,
                }
            },
        )
}

/// The packets that carry it, over one link or the other.
fn packets(sent: &Sent, header: Header) -> Vec<Vec<u8>> {
    let packet = &sent.packet;
    let [from, to] = [packet.source_port, packet.port].map(Option::unwrap_or_default);
    let data = vec![0; sent.data];
    let body = match packet.protocol {
        6 => tcp(from, to, packet.tcp_flags, &data),
        17 => udp(from, to, &data),
        1 | 58 => icmp(packet.icmp_type.unwrap(), &data),
        _ => [vec![0; 8], data].concat(),
    };
    let body = with_checksum(body, packet.protocol, &header);
    let (first, body) = extended(&sent.extensions, packet.protocol, body);
    // The kernel drops an IPv6 datagram whose first fragment lacks a part of the headers (RFC 8200 section 4.5).
    let headers = if header.source.is_ipv6() {
        8 * sent.extensions.len() + 24
    } else {
        0
    };
    match sent.fragments {
        Fragments::None => vec![header.datagram(first, &body)],
        Fragments::InOrder(at) => header.fragments(first, &body, headers + at).into(),
        Fragments::LaterFirst(at) => {
            let [one, two] = header.fragments(first, &body, headers + at);
            vec![two, one]
        }
        Fragments::OnlyLater(at) => {
            let [_, two] = header.fragments(first, &body, headers + at);
            vec![two]
        }
    }
}

/// A host with two links, both to the same stranger, who knows its hardware addresses.
fn world() -> (Namespace, Namespace) {
    let (host, stranger) = (Namespace::new("judge"), Namespace::new("sender"));
    for (link, number) in [("eth0", 9), ("int0", 8)] {
        host.connect(link, &stranger, link);
        let mac = host.run(&format!("cat /sys/class/net/{link}/address"));
        for (namespace, last) in [(&host, 1), (&stranger, 2)] {
            common::run(&format!(
                "ip -n {} addr add 10.{number}.0.{last}/24 dev {link}",
                namespace.name()
            ));
            common::run(&format!(
                "ip -n {} addr add fd0{number}::{last}/64 dev {link} nodad",
                namespace.name()
            ));
        }
        for address in [format!("10.{number}.0.1"), format!("fd0{number}::1")] {
            let mac = mac.trim();
            common::run(&format!(
                "ip -n {} neigh replace {address} lladdr {mac} dev {link} nud permanent",
                stranger.name()
            ));
        }
    }
    (host, stranger)
}

/// Behind the gate, each packet that came through leaves its number.
const WITNESS: &str = r#"table inet witness {
    set seen4 { typeof ip id; size 65535; flags dynamic; }
    set seen6 { typeof ip6 flowlabel; size 65535; flags dynamic; }
    chain pre { type filter hook prerouting priority -149; policy accept;
        iifname "lo" accept
        meta nfproto ipv4 add @seen4 { ip id }
        meta nfproto ipv6 add @seen6 { ip6 flowlabel }
    }
}
"#;

fn seen(host: &Namespace, set: &str) -> BTreeSet<u16> {
    let listing = host.run(&format!("nft -j list set inet witness {set}"));
    let json: serde_json::Value = serde_json::from_str(&listing).unwrap();
    let lists = json["nftables"].as_array().unwrap();
    let elements = lists
        .iter()
        .find_map(|o| o["set"]["elem"].as_array())
        .cloned()
        .unwrap_or_default();
    // The kernel's own packets have the id 0, or a flow label beyond 19 bits.
    let numbers = elements
        .iter()
        .map(|e| e.get("elem").map_or(e, |elem| &elem["val"]).as_u64().unwrap());
    numbers.filter_map(|number| u16::try_from(number).ok()).collect()
}

/// Random packets, each of a flow of its own: the second packet of a flow may be part of an answered one.
fn draw(runner: &mut TestRunner, strategy: &impl Strategy<Value = Sent>) -> Vec<Sent> {
    let mut flows = BTreeSet::new();
    let mut packets = Vec::new();
    while packets.len() < usize::from(PACKETS) {
        let sent = strategy.new_tree(runner).unwrap().current();
        let Packet {
            source,
            protocol,
            source_port,
            port,
            icmp_type,
            ..
        } = sent.packet;
        if flows.insert((source, protocol, source_port, port, icmp_type)) {
            packets.push(sent);
        }
    }
    packets
}

fn destination(sent: &Sent) -> IpAddr {
    let text = match (sent.packet.interface.as_str(), sent.packet.source.is_ipv4()) {
        ("eth0", true) => "10.9.0.1",
        (_, true) => "10.8.0.1",
        ("eth0", false) => "fd09::1",
        (_, false) => "fd08::1",
    };
    text.parse().unwrap()
}

/// Sends them all, and gives those for which the kernel and `explain` differ.
fn differing(
    host: &Namespace,
    stranger: &Namespace,
    rules: &Ruleset,
    all: &[Sent],
    set: &str,
) -> (usize, Vec<String>) {
    use nix::sys::socket::AddressFamily;
    let family = if all[0].packet.source.is_ipv4() {
        AddressFamily::Inet
    } else {
        AddressFamily::Inet6
    };
    stranger.enter(|| {
        let socket = raw(family);
        for (number, sent) in (1u16..).zip(all) {
            let header = Header {
                source: sent.packet.source,
                destination: destination(sent),
                hop_limit: sent.packet.hop_limit,
                number,
            };
            for packet in packets(sent, header) {
                send(&socket, &packet, header.destination, 0);
            }
        }
    });
    let came = seen(host, set);
    let numbered = || (1u16..).zip(all).filter(|(number, _)| came.contains(number));
    let in_two = numbered().filter(|(_, sent)| sent.fragments != Fragments::None);
    assert!(
        in_two.count() > 50,
        "datagrams in fragments have to come through too"
    );
    let extended = numbered().filter(|(_, sent)| !sent.extensions.is_empty());
    assert!(all[0].packet.source.is_ipv4() || extended.count() > 50);
    let differing = (1u16..).zip(all).filter_map(|(number, sent)| {
        let said = explain(rules, &sent.packet, None);
        // A datagram that is not whole is nobody's.
        let expected = match sent.fragments {
            Fragments::OnlyLater(_) => Some(Verdict::Drop),
            _ => said.verdict,
        };
        let truth = if came.contains(&number) {
            Verdict::Accept
        } else {
            Verdict::Drop
        };
        (expected != Some(truth)).then(|| format!("kernel: {truth}; said: {said:?}; {sent:?}"))
    });
    (came.len(), differing.collect())
}

#[test]
fn explain_says_what_the_kernel_does() {
    let witness = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(witness.path(), WITNESS).unwrap();
    let mut runner = TestRunner::new(Config {
        rng_seed: RngSeed::Random,
        ..Config::default()
    });
    for rest in SPECS {
        let json = format!(r#"{{"version":1,"generation":1,"instance":{{"id":"i"}}{rest}}}"#);
        let spec = Spec::from_json(json.as_bytes()).unwrap();
        let internal = ["int0".to_owned()].into();
        let planned = ruleset(Inputs {
            spec: Some(&spec),
            internal: &internal,
            ..Inputs::default()
        });
        for (set, all) in [
            ("seen4", draw(&mut runner, &sent(v4(), 1))),
            ("seen6", draw(&mut runner, &sent(v6(), 58))),
        ] {
            // New namespaces: no flow of an earlier round is known.
            let (host, stranger) = world();
            host.run(&format!("nft -f {}", witness.path().display()));
            let held = host.enter(|| {
                let mut nftables = Nftables::open().unwrap();
                nftables.replace(&planned).unwrap();
                nftables.read().unwrap().unwrap()
            });
            let (came, wrong) = differing(&host, &stranger, &held.ruleset, &all, set);
            assert!(
                came > 100 && came < all.len(),
                "{came} of {} came through: no test of anything",
                all.len()
            );
            assert!(
                wrong.is_empty(),
                "{} of {} differ:\n{}",
                wrong.len(),
                all.len(),
                wrong[..wrong.len().min(5)].join("\n")
            );
        }
    }
}

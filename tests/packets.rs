//! What a host needs from its network besides the rules of a spec, and what only looks like it: path MTU
//! discovery, neighbours, routers, redirects, multicast listeners.
//!
//! Each time the same is tried with a gate that lacks the rule, or without a gate.
//! May not live here: verdicts on single packets of any kind (tests/explain.rs).
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use common::packets::{Header, raw, router_alert, send, udp, with_checksum};
use common::{Namespace, eventually};
use nix::sys::socket::AddressFamily;
use portcullis::policy::firewall::{Inputs, ruleset};
use portcullis::policy::ruleset::Ruleset;
use portcullis::system::nftables::Nftables;
use portcullis_protocol::Spec;

const SOON: Duration = Duration::from_secs(5);
/// How long is waited for what must not come.
const NEVER: Duration = Duration::from_millis(300);

fn ip(namespace: &Namespace, rest: &str) -> String {
    common::run(&format!("ip -n {} {rest}", namespace.name()))
}

/// The gate that lets TCP port 22 in, without the rules of some comments.
fn gate_without(comments: &[&str]) -> Ruleset {
    let json = br#"{"version":1,"generation":1,"instance":{"id":"i"},
        "firewall":{"ingress":[{"id":"ssh","protocol":"tcp","from_port":22}]}}"#;
    let spec = Spec::from_json(json).unwrap();
    let mut planned = ruleset(Inputs {
        spec: Some(&spec),
        ..Inputs::default()
    });
    let rules = &mut planned.chains[0].rules;
    let before = rules.len();
    rules.retain(|rule| !comments.contains(&rule.comment.as_str()));
    assert_eq!(
        rules.len(),
        before - comments.len(),
        "{comments:?} are rules of the gate"
    );
    planned
}

fn shut(host: &Namespace, gate: &Ruleset) {
    host.enter(|| Nftables::open().unwrap().replace(gate).unwrap());
}

fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// A host and a neighbour on one link; hardware addresses are asked for.
fn neighbours() -> (Namespace, Namespace) {
    let (host, neighbour) = (Namespace::new("host"), Namespace::new("neighbour"));
    host.connect("eth0", &neighbour, "eth0");
    for (namespace, last) in [(&host, 1), (&neighbour, 2)] {
        ip(namespace, &format!("addr add 10.9.0.{last}/24 dev eth0"));
        ip(namespace, &format!("addr add fd09::{last}/64 dev eth0 nodad"));
        ip(namespace, &format!("addr add fe80::{last}/64 dev eth0 nodad"));
    }
    (host, neighbour)
}

/// Index of the link, which link-local and multicast destinations need.
fn scope(namespace: &Namespace) -> u32 {
    namespace
        .run("cat /sys/class/net/eth0/ifindex")
        .trim()
        .parse()
        .unwrap()
}

/// An ICMPv6 message of a type with these bytes behind its checksum.
fn icmp6(from: &Namespace, source: &str, destination: &str, hop_limit: u8, kind: u8, rest: &[u8]) {
    let header = Header {
        source: address(source),
        destination: address(destination),
        hop_limit,
        number: 1,
    };
    let body = with_checksum([&[kind, 0, 0, 0], rest].concat(), 58, &header);
    let scope = scope(from);
    from.enter(|| {
        let socket = raw(AddressFamily::Inet6);
        send(&socket, &header.datagram(58, &body), header.destination, scope);
    });
}

// Path MTU discovery (RFC 1191, RFC 8201)

/// A host, two routers with a narrow link between them, and a far end that knows of none of it.
fn narrow_path() -> [Namespace; 4] {
    let all = ["host", "near", "mid", "far"].map(Namespace::new);
    let [host, near, mid, far] = &all;
    for (number, a, b) in [(1, host, near), (2, near, mid), (3, mid, far)] {
        a.connect(&format!("r{number}"), b, &format!("l{number}"));
        for (namespace, link, last) in [(a, 'r', 1), (b, 'l', 2)] {
            let link = format!("{link}{number}");
            ip(namespace, &format!("addr add 10.{number}.0.{last}/24 dev {link}"));
            ip(
                namespace,
                &format!("addr add fd0{number}::{last}/64 dev {link} nodad"),
            );
            if number == 2 {
                ip(namespace, &format!("link set {link} mtu 1300"));
            }
        }
    }
    for router in [near, mid] {
        router.run("sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1");
    }
    for (namespace, gateways) in [
        (host, ["10.1.0.2", "fd01::2"]),
        (near, ["10.2.0.2", "fd02::2"]),
        (mid, ["10.2.0.1", "fd02::1"]),
        (far, ["10.3.0.1", "fd03::1"]),
    ] {
        for gateway in gateways {
            ip(namespace, &format!("route add default via {gateway}"));
        }
    }
    all
}

/// Whether a megabyte from the host arrives; at the listener or at who dialled it.
fn transfers(
    host: &Namespace,
    far: &Namespace,
    far_address: &str,
    host_address: &str,
    host_dials: bool,
) -> bool {
    const AMOUNT: usize = 1 << 20;
    let (server, client) = if host_dials { (far, host) } else { (host, far) };
    let at = SocketAddr::new(address(if host_dials { far_address } else { host_address }), 22);
    let listener = server.enter(|| TcpListener::bind(at).unwrap());
    let dialled = client.enter(|| TcpStream::connect_timeout(&at, SOON).unwrap());
    let (accepted, _) = listener.accept().unwrap();
    let (mut sender, mut receiver) = if host_dials {
        (dialled, accepted)
    } else {
        (accepted, dialled)
    };
    receiver.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    sender.set_write_timeout(Some(Duration::from_secs(2))).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || sender.write_all(&vec![7; AMOUNT]).is_ok());
        let mut received = 0;
        let mut buffer = vec![0; 1 << 16];
        while let Ok(length @ 1..) = receiver.read(&mut buffer) {
            received += length;
        }
        received == AMOUNT
    })
}

/// One transfer, to a host that hears the routers or does not.
fn finds_path_mtu(host_address: &str, far_address: &str, host_dials: bool, deaf: bool) {
    const DEAF: &str =
        "table inet deaf { chain pre { type filter hook prerouting priority -160; policy accept;
        icmp type destination-unreachable drop\n icmpv6 type packet-too-big drop\n }\n }\n";
    let [host, _near, _mid, far] = narrow_path();
    shut(&host, &gate_without(&[]));
    if deaf {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), DEAF).unwrap();
        host.run(&format!("nft -f {}", file.path().display()));
    }
    let arrived = transfers(&host, &far, far_address, host_address, host_dials);
    assert_eq!(arrived, !deaf, "{far_address}, host dials: {host_dials}");
    // It came by a message of the router, which the host keeps.
    let route = ip(&host, &format!("route get {far_address}"));
    assert_eq!(route.contains("mtu 1300"), !deaf, "{route}");
}

#[test]
fn path_mtu_discovery_works_for_flows_of_either_direction() {
    std::thread::scope(|scope| {
        for (host, far) in [("10.1.0.1", "10.3.0.2"), ("fd01::1", "fd03::2")] {
            for (host_dials, deaf) in [(true, false), (false, false), (true, true), (false, true)] {
                scope.spawn(move || finds_path_mtu(host, far, host_dials, deaf));
            }
        }
    });
}

// Neighbours and routers (RFC 4861)

#[test]
fn neighbour_discovery_works_and_needs_its_rule() {
    let reaches = |from: &Namespace, to: &str| {
        let to = SocketAddr::new(address(to), 22);
        from.enter(|| TcpStream::connect_timeout(&to, NEVER).is_ok())
    };
    for (comments, expected) in [(&["base neighbour discovery"][..], false), (&[][..], true)] {
        let (host, neighbour) = neighbours();
        let _listeners = [&host, &neighbour].map(|n| n.enter(|| TcpListener::bind("[::]:22").unwrap()));
        shut(&host, &gate_without(comments));
        assert_eq!(reaches(&host, "fd09::2"), expected, "{comments:?}");
        assert_eq!(reaches(&neighbour, "fd09::1"), expected, "{comments:?}");
    }
}

/// Packets that passed the gate, by a rule of nft(8) behind it.
struct Passed<'a>(&'a Namespace);

impl<'a> Passed<'a> {
    fn count(host: &'a Namespace, condition: &str) -> Self {
        let text = format!(
            "table inet witness {{ counter c {{ }}\n chain pre {{ type filter hook prerouting priority -149; policy accept;
            {condition} counter name c\n }}\n }}\n"
        );
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        host.run(&format!("nft -f {}", file.path().display()));
        Self(host)
    }

    fn so_far(&self) -> u64 {
        common::knock::counters(&self.0.run("nft -j list counters table inet witness"))("c")
    }
}

/// The gate stands before the kernel's own check of the hop limit.
#[test]
fn neighbour_messages_from_behind_a_router_are_dropped() {
    let (host, neighbour) = neighbours();
    let passed = Passed::count(
        &host,
        "icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } ip6 saddr fd09::66",
    );
    let target: [u8; 16] = "fd09::1".parse::<Ipv6Addr>().unwrap().octets();
    let forge = |kind: u8, hop_limit: u8| {
        let rest = [&[0; 4], &target[..]].concat();
        icmp6(&neighbour, "fd09::66", "fd09::1", hop_limit, kind, &rest);
    };
    forge(135, 64);
    forge(136, 64);
    assert_eq!(passed.so_far(), 2, "without the gate");
    shut(&host, &gate_without(&[]));
    forge(135, 64);
    forge(136, 64);
    assert_eq!(passed.so_far(), 2);
    forge(135, 255);
    forge(136, 255);
    assert_eq!(passed.so_far(), 4, "from the link itself");
}

/// A router that speaks for a day, and a prefix to take an address from.
fn router_advertisement(prefix: &str) -> Vec<u8> {
    let day = 86_400u32.to_be_bytes();
    let mut rest = vec![64, 0, 0x70, 0x80, 0, 0, 0, 0, 0, 0, 0, 0];
    // Prefix information: on-link, for addresses (RFC 4861 section 4.6.2).
    rest.extend([3, 4, 64, 0xc0]);
    rest.extend([day, day, [0; 4]].concat());
    rest.extend(prefix.parse::<Ipv6Addr>().unwrap().octets());
    rest
}

#[test]
fn only_a_router_on_the_link_gives_routes_and_addresses() {
    for (comments, expected) in [(&[][..], true), (&["base router advertisement"][..], false)] {
        let (host, neighbour) = neighbours();
        host.run("sysctl -qw net.ipv6.conf.eth0.accept_ra=1 net.ipv6.conf.eth0.accept_dad=0");
        shut(&host, &gate_without(comments));
        let passed = Passed::count(&host, "icmpv6 type nd-router-advert");
        // Forged: from afar, from an address that is not link-local, and both.
        for (source, hop_limit) in [("fe80::2", 64), ("fd09::2", 255), ("2001:db8::1", 64)] {
            icmp6(
                &neighbour,
                source,
                "ff02::1",
                hop_limit,
                134,
                &router_advertisement("2001:db8:bad::"),
            );
        }
        assert_eq!(passed.so_far(), 0);
        icmp6(
            &neighbour,
            "fe80::2",
            "ff02::1",
            255,
            134,
            &router_advertisement("2001:db8:7::"),
        );
        let configured = || {
            let route = ip(&host, "-6 route show default");
            let addresses = ip(&host, "-6 addr show dev eth0");
            assert!(!addresses.contains("2001:db8:bad:"), "{addresses}");
            (route.contains("via fe80::2"), addresses.contains("2001:db8:7:"))
        };
        if expected {
            eventually(SOON, "a route and an address", || match configured() {
                (true, true) => Ok(()),
                other => Err(other),
            });
        } else {
            std::thread::sleep(NEVER);
            assert_eq!(configured(), (false, false));
        }
        assert_eq!(passed.so_far(), u64::from(expected));
    }
}

// Redirects (RFC 792)

/// One that quotes a packet of a flow which the host began belongs to that flow, says conntrack.
#[test]
fn a_redirect_changes_no_route() {
    for with_gate in [true, false] {
        let (host, neighbour) = neighbours();
        host.run(
            "sysctl -qw net.ipv4.conf.all.accept_redirects=1 net.ipv4.conf.eth0.accept_redirects=1 \
            net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.eth0.rp_filter=0",
        );
        ip(&host, "route add default via 10.9.0.2");
        // The new gateway has to be there.
        ip(
            &host,
            "neigh replace 10.9.0.66 lladdr 02:00:00:00:00:66 dev eth0 nud permanent",
        );
        if with_gate {
            shut(&host, &gate_without(&[]));
        }
        let flow = host.enter(|| UdpSocket::bind("10.9.0.1:4000").unwrap());
        let far = address("203.0.113.7");
        let redirect = || {
            flow.send_to(b"?", (far, 53)).unwrap();
            let quoted = Header {
                source: address("10.9.0.1"),
                destination: far,
                hop_limit: 64,
                number: 1,
            };
            let body = with_checksum(udp(4000, 53, b"?"), 17, &quoted);
            let quoted = quoted.datagram(17, &body);
            let header = Header {
                source: address("10.9.0.2"),
                destination: address("10.9.0.1"),
                hop_limit: 64,
                number: 2,
            };
            // Code 1: for this host; then the new gateway.
            let message = [&[5, 1, 0, 0, 10, 9, 0, 66][..], &quoted].concat();
            let message = with_checksum(message, 1, &header);
            neighbour.enter(|| {
                send(
                    &raw(AddressFamily::Inet),
                    &header.datagram(1, &message),
                    header.destination,
                    0,
                )
            });
        };
        let gateway = || ip(&host, "route get 203.0.113.7");
        redirect();
        if with_gate {
            std::thread::sleep(NEVER);
            redirect();
            assert!(gateway().contains("via 10.9.0.2"), "{}", gateway());
        } else {
            eventually(SOON, "another gateway", || {
                redirect();
                let now = gateway();
                if now.contains("via 10.9.0.66") {
                    Ok(())
                } else {
                    Err(now)
                }
            });
        }
    }
}

// Multicast listeners (RFC 2710, RFC 3810)

#[test]
fn a_listener_answers_queries_from_the_link() {
    for (comments, expected) in [(&[][..], true), (&["base multicast listener"][..], false)] {
        let (host, neighbour) = neighbours();
        shut(&host, &gate_without(comments));
        let group: Ipv6Addr = "ff02::1234".parse().unwrap();
        let socket = host.enter(|| UdpSocket::bind("[::]:5000").unwrap());
        socket.join_multicast_v6(&group, scope(&host)).unwrap();
        // What it reports of its own accord is of version 2, the answer to a query of version 1 is not.
        let reports = Passed::count(&neighbour, "icmpv6 type mld-listener-report ip6 daddr ff02::1234");
        let passed = Passed::count(&host, "icmpv6 type mld-listener-query");
        let query = |source: &str, hop_limit: u8| {
            let header = Header {
                source: address(source),
                destination: address("ff02::1"),
                hop_limit,
                number: 1,
            };
            let rest = [&[0, 100, 0, 0][..], &[0; 16]].concat();
            let body = with_checksum([&[130, 0, 0, 0], &rest[..]].concat(), 58, &header);
            let (first, body) = router_alert(58, body);
            let scope = scope(&neighbour);
            neighbour.enter(|| {
                send(
                    &raw(AddressFamily::Inet6),
                    &header.datagram(first, &body),
                    header.destination,
                    scope,
                )
            });
        };
        // Forged: from afar.
        query("fe80::2", 64);
        query("2001:db8::1", 1);
        assert_eq!(passed.so_far(), 0);
        query("fe80::2", 1);
        assert_eq!(passed.so_far(), u64::from(expected));
        if expected {
            eventually(SOON, "a report", || match reports.so_far() {
                0 => Err("none"),
                _ => Ok(()),
            });
        } else {
            std::thread::sleep(NEVER);
            assert_eq!(reports.so_far(), 0);
        }
    }
}

// Replies of DHCP servers (RFC 2131); tests/instances/dhcp.rs has a real client

#[test]
fn a_dhcp_server_may_answer_from_an_address_that_was_not_asked() {
    for (comments, expected) in [(&[][..], true), (&["base dhcp"][..], false)] {
        let (host, neighbour) = neighbours();
        shut(&host, &gate_without(comments));
        let client = host.enter(|| UdpSocket::bind("0.0.0.0:68").unwrap());
        client.set_read_timeout(Some(NEVER)).unwrap();
        let answers = |from: &str, to: &str| {
            let server = neighbour.enter(|| UdpSocket::bind(from).unwrap());
            server.send_to(b"offer", to).unwrap();
            client.recv(&mut [0; 16]).is_ok()
        };
        assert_eq!(answers("10.9.0.2:67", "10.9.0.1:68"), expected);
        assert!(
            !answers("10.9.0.2:4000", "10.9.0.1:68"),
            "not from a server's port"
        );
    }
}

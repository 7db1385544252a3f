//! What was denied can be seen: counted by reason, packet by packet, and a sample of it told by headers
//! alone, in a real kernel.
//!
//! May not live here: which packets are denied (`gate`, `explain`), the journal (`instances`).
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use common::daemon::Daemon;
use common::packets::{Extension, Header, SYN, extended, icmp, raw, send, tcp, udp, with_checksum};
use common::{Namespace, eventually};
use nix::sys::socket::AddressFamily;
use portcullis::policy::denied::Headers;
use portcullis::policy::firewall::{Inputs, SAMPLE, ruleset};
use portcullis::policy::ruleset::Ruleset;
use portcullis::system::nflog::{Copied, Group};
use portcullis::system::nftables::{Count, Nftables};
use portcullis_protocol::Spec;
use serde_json::Value;

const SOON: Duration = Duration::from_secs(10);
const RST: u8 = 0x04;
const HOST: [&str; 2] = ["10.9.0.1", "fd09::1"];
/// What would be a line of its own, or a field, wherever it was written as it is.
const FORGERY: &[u8] =
    b"\nMESSAGE=forged\nMESSAGE_ID=00000000000000000000000000000bad\nPRIORITY=0\n\x1b[2Jforged\r\n\0\0\0\0forged\n";

/// The kernel of the stranger says nothing by itself that is denied: it would be counted too.
const QUIET: &str = "table inet quiet { chain out { type filter hook output priority 0;
    icmpv6 type { mld-listener-report, mld2-listener-report, nd-router-solicit } drop
}; }";

/// A host and a stranger who knows its hardware address, so that packets with any source get there.
fn world() -> (Namespace, Namespace) {
    let (host, stranger) = (Namespace::new("denier"), Namespace::new("stranger"));
    let quiet = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(quiet.path(), QUIET).unwrap();
    stranger.run(&format!("nft -f {}", quiet.path().display()));
    host.connect("eth0", &stranger, "eth0");
    let mac = host.run("cat /sys/class/net/eth0/address");
    for (namespace, last) in [(&host, 1), (&stranger, 2)] {
        let name = namespace.name();
        common::run(&format!("ip -n {name} addr add 10.9.0.{last}/24 dev eth0"));
        common::run(&format!("ip -n {name} addr add fd09::{last}/64 dev eth0 nodad"));
    }
    for address in HOST {
        let (name, mac) = (stranger.name(), mac.trim());
        common::run(&format!(
            "ip -n {name} neigh replace {address} lladdr {mac} dev eth0 nud permanent"
        ));
    }
    (host, stranger)
}

fn planned(ingress: &str) -> Ruleset {
    let json = format!(
        r#"{{"version":1,"generation":1,"instance":{{"id":"i"}},"firewall":{{"ingress":[{ingress}]}}}}"#
    );
    let spec = Spec::from_json(json.as_bytes()).unwrap();
    ruleset(Inputs {
        spec: Some(&spec),
        ..Inputs::default()
    })
}

fn apply(host: &Namespace, ingress: &str) {
    host.enter(|| Nftables::open().unwrap().replace(&planned(ingress)).unwrap());
}

/// A packet to the host's address of its family.
struct Sent {
    bytes: Vec<u8>,
    destination: IpAddr,
}

fn packet(source: &str, protocol: u8, extensions: &[Extension], body: Vec<u8>) -> Sent {
    let source: IpAddr = source.parse().unwrap();
    let destination = HOST[usize::from(source.is_ipv6())].parse().unwrap();
    let header = Header {
        source,
        destination,
        hop_limit: 64,
        number: 7,
    };
    let body = with_checksum(body, protocol, &header);
    let (first, body) = extended(extensions, protocol, body);
    Sent {
        bytes: header.datagram(first, &body),
        destination,
    }
}

fn syn(source: &str, port: u16) -> Sent {
    packet(source, 6, &[], tcp(40000, port, SYN, &[]))
}

fn datagram(source: &str, from: u16, port: u16) -> Sent {
    packet(source, 17, &[], udp(from, port, FORGERY))
}

fn send_all<'a>(stranger: &Namespace, packets: impl IntoIterator<Item = &'a Sent> + Send) {
    stranger.enter(|| {
        let sockets = [AddressFamily::Inet, AddressFamily::Inet6].map(raw);
        for packet in packets {
            let socket = &sockets[usize::from(packet.destination.is_ipv6())];
            send(socket, &packet.bytes, packet.destination, 0);
        }
    });
}

/// What the kernel has counted for each rule that has counted anything.
fn counts(host: &Namespace) -> BTreeMap<String, Count> {
    let mut sums = BTreeMap::<String, Count>::new();
    for (comment, count) in host.enter(|| Nftables::open().unwrap().counts().unwrap()) {
        if count.packets > 0 {
            *sums.entry(comment).or_default() += count;
        }
    }
    sums
}

#[track_caller]
fn until_counted(host: &Namespace, expected: &BTreeMap<String, Count>) {
    eventually(SOON, "the counters", || {
        let now = counts(host);
        if now == *expected { Ok(()) } else { Err(now) }
    });
}

/// Packets of each reason, a different number of each.
fn of_each_reason() -> Vec<(&'static str, Vec<Sent>)> {
    let many = |times: usize, packet: &dyn Fn() -> Sent| (0..times).map(|_| packet()).collect::<Vec<_>>();
    let to_loopback = || {
        let header = Header {
            source: "10.9.0.2".parse().unwrap(),
            destination: "127.0.0.1".parse().unwrap(),
            hop_limit: 64,
            number: 7,
        };
        Sent {
            bytes: header.datagram(6, &with_checksum(tcp(40000, 6379, SYN, &[]), 6, &header)),
            destination: HOST[0].parse().unwrap(),
        }
    };
    let mut tcp_of_all = many(2, &|| syn("10.9.0.2", 23));
    tcp_of_all.extend(many(1, &|| syn("203.0.113.7", 23)));
    tcp_of_all.extend(many(3, &|| syn("2001:db8::7", 23)));
    vec![
        ("denied tcp", tcp_of_all),
        ("denied udp", many(4, &|| datagram("203.0.113.8", 9, 53))),
        (
            "denied icmp",
            many(5, &|| packet("10.9.0.2", 1, &[], icmp(8, FORGERY))),
        ),
        (
            "denied icmpv6",
            many(7, &|| packet("fd09::2", 58, &[], icmp(128, FORGERY))),
        ),
        (
            "denied other",
            many(8, &|| packet("10.9.0.2", 47, &[], vec![0; 8])),
        ),
        ("denied spoofed source v4", many(9, &|| syn("127.0.0.1", 22))),
        ("denied spoofed target v4", many(10, &to_loopback)),
        (
            "denied invalid",
            many(11, &|| packet("10.9.0.2", 6, &[], tcp(40000, 24, RST, &[]))),
        ),
    ]
}

fn expected(sent: &[(&'static str, Vec<Sent>)]) -> BTreeMap<String, Count> {
    let count = |packets: &[Sent]| Count {
        packets: packets.len() as u64,
        bytes: packets.iter().map(|packet| packet.bytes.len() as u64).sum(),
    };
    sent.iter()
        .map(|(reason, packets)| ((*reason).to_owned(), count(packets)))
        .collect()
}

#[test]
fn each_denied_packet_is_counted_once_by_its_reason() {
    let (host, stranger) = world();
    apply(&host, "");
    let sent = of_each_reason();
    send_all(&stranger, sent.iter().flat_map(|(_, packets)| packets));
    until_counted(&host, &expected(&sent));

    // The same with rules: what is let in is not counted as denied.
    apply(
        &host,
        r#"{"id":"t","protocol":"tcp","from_port":23},{"id":"u","protocol":"udp","from_port":53},
           {"id":"ping","protocol":"icmp"},{"id":"gre","protocol":47}"#,
    );
    send_all(&stranger, sent.iter().flat_map(|(_, packets)| packets));
    let mut let_in = expected(&sent);
    for (rule, reasons) in [
        ("rule t", &["denied tcp"][..]),
        ("rule u", &["denied udp"]),
        ("rule ping", &["denied icmp", "denied icmpv6"]),
        ("rule gre", &["denied other"]),
    ] {
        let mut sum = Count::default();
        reasons
            .iter()
            .for_each(|reason| sum += let_in.remove(*reason).unwrap());
        let_in.insert(rule.to_owned(), sum);
    }
    until_counted(&host, &let_in);
}

/// Binds in the host's namespace, sends, and gives what is copied until there are so many or nothing
/// more came for a second.
fn copies(host: &Namespace, stranger: &Namespace, sent: &[Sent], wanted: usize) -> Vec<Copied> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    host.enter(|| {
        runtime.block_on(async {
            let group = Group::bind(SAMPLE).unwrap();
            send_all(stranger, sent);
            let mut copies = Vec::new();
            while copies.len() < wanted {
                match tokio::time::timeout(Duration::from_secs(1), group.next()).await {
                    Ok(more) => copies.extend(more.unwrap()),
                    Err(_) => break,
                }
            }
            copies
        })
    })
}

#[test]
fn a_denied_packet_is_told_by_its_headers() {
    let (host, stranger) = world();
    apply(&host, r#"{"id":"open","protocol":"tcp","from_port":80}"#);
    let chain = [Extension::HopByHop, Extension::DestinationOptions];
    let sent = [
        // Let in: no copy of it.
        syn("203.0.113.7", 80),
        syn("203.0.113.7", 22),
        datagram("203.0.113.8", 5353, 53),
        packet("10.9.0.2", 1, &[], icmp(8, FORGERY)),
        packet("10.9.0.2", 47, &[], FORGERY.to_vec()),
        packet("2001:db8::7", 6, &chain, tcp(40001, 23, SYN, FORGERY)),
        packet("fd09::2", 58, &chain, icmp(128, &[])),
    ];
    let copies = copies(&host, &stranger, &sent, sent.len() - 1);
    let told: Vec<String> = copies
        .iter()
        .map(|copy| format!("{} by {}", Headers::parse(&copy.bytes).unwrap(), copy.interface))
        .collect();
    assert_eq!(
        told,
        [
            "tcp from 203.0.113.7:40000 to 10.9.0.1:22 by eth0",
            "udp from 203.0.113.8:5353 to 10.9.0.1:53 by eth0",
            "icmp type 8 from 10.9.0.2 to 10.9.0.1 by eth0",
            "47 from 10.9.0.2 to 10.9.0.1 by eth0",
            "tcp from [2001:db8::7]:40001 to [fd09::1]:23 by eth0",
            "icmpv6 type 128 from fd09::2 to fd09::1 by eth0",
        ]
    );
    assert!(copies.iter().all(|copy| copy.bytes.len() <= 128), "{copies:?}");
}

#[test]
fn the_kernel_copies_few_packets_of_a_flood_and_counts_all() {
    let (host, stranger) = world();
    apply(&host, "");
    let flood: Vec<Sent> = (1..=500).map(|port| datagram("203.0.113.7", 9, port)).collect();
    let start = Instant::now();
    let copies = copies(&host, &stranger, &flood, flood.len()).len();
    let most = 20 + 10 * (start.elapsed().as_secs() as usize + 1);
    assert!((20..=most).contains(&copies), "{copies} copies, {most} at most");
    until_counted(&host, &expected(&[("denied udp", flood)]));
}

/// Who logs for themselves, a tool or a second daemon, is not disturbed, and told of.
#[test]
fn a_group_has_one_listener_and_is_free_when_that_ends() {
    let host = Namespace::new("group");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    host.enter(|| {
        let _guard = runtime.enter();
        let loggers = || std::fs::read_to_string("/proc/thread-self/net/netfilter/nf_log").unwrap();
        let before = loggers();
        let first = Group::bind(SAMPLE).unwrap();
        // The default loggers of the protocol families are as they were.
        assert_eq!(loggers(), before);
        let error = Group::bind(SAMPLE).err().unwrap();
        assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied, "{error}");
        drop(first);
        // A program that another test starts has the socket too, until it is executed.
        let start = Instant::now();
        while let Err(error) = Group::bind(SAMPLE) {
            assert!(start.elapsed() < Duration::from_secs(5), "{error}");
            std::thread::yield_now();
        }
    });
}

fn denied(daemon: &Daemon) -> Value {
    let output = daemon.portcullis(&["firewall", "denied", "--format", "json"], b"");
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

fn lines(daemon: &Daemon) -> Vec<String> {
    let log = daemon.log();
    let lines = log.lines().filter(|line| line.contains(" denied "));
    lines.map(str::to_owned).collect()
}

#[test]
fn the_daemon_tells_who_and_how_often_and_a_scan_makes_few_lines() {
    let (host, stranger) = world();
    let mut daemon = Daemon::start(&host);
    let pings: Vec<Sent> = (0..3)
        .map(|_| packet("2001:db8::7", 58, &[], icmp(128, FORGERY)))
        .collect();
    let first: Vec<Sent> = (0..5).map(|_| datagram("203.0.113.7", 9, 53)).collect();
    send_all(&stranger, pings.iter().chain(&first));
    let seen = eventually(SOON, "the sample", || {
        let seen = denied(&daemon);
        if seen["sample"]["packets"] == 8 {
            Ok(seen)
        } else {
            Err(seen)
        }
    });
    let counted = seen["counted"].as_array().unwrap();
    let of = |reason: &str| {
        let found = counted.iter().find(|entry| entry["reason"] == reason);
        found.unwrap()["packets"].as_u64().unwrap()
    };
    assert_eq!((of("udp"), of("icmpv6"), of("tcp")), (5, 3, 0), "{seen}");
    let sources = seen["sample"]["sources"].as_array().unwrap();
    assert_eq!(sources[0]["source"], "203.0.113.7/32");
    assert_eq!(
        (&sources[0]["packets"], &sources[0]["targets"][0]["port"]),
        (&5.into(), &53.into())
    );
    assert_eq!(sources[1]["source"], "2001:db8::/64");
    assert_eq!(sources[1]["targets"][0]["icmp_type"], 128);
    // One line each, and nothing that was in the packets.
    let told = lines(&daemon);
    assert_eq!(told.len(), 2, "{told:#?}");
    assert!(
        told[1].contains("denied udp from 203.0.113.7:9 to 10.9.0.1:53 by eth0")
            && told[1].contains("UNTOLD=2"),
        "{told:#?}"
    );
    assert!(
        !daemon.log().contains("forged") && !daemon.log().contains('\x1b'),
        "{}",
        daemon.log()
    );

    // A scan for as long as the kernel's limit takes to copy more than gets lines.
    let (start, mut ports) = (Instant::now(), 1000u16..);
    let sampled = eventually(SOON, "the sample of a scan", || {
        let scan: Vec<Sent> = ports
            .by_ref()
            .take(20)
            .map(|port| datagram("203.0.113.7", 9, port))
            .collect();
        send_all(&stranger, &scan);
        let seen = denied(&daemon)["sample"]["packets"].as_u64().unwrap();
        if seen >= 60 { Ok(seen) } else { Err(seen) }
    });
    let told = lines(&daemon).len() as u64;
    let most = 20 + start.elapsed().as_secs() + 3;
    assert!(
        (20..=most).contains(&told),
        "{told} lines of {sampled}, {most} at most"
    );
    let all = 5 + u64::from(ports.start) - 1000;

    // The counters are there without the daemon, and what is missing is said.
    daemon.stop();
    let seen = denied(&daemon);
    assert_eq!(seen["sample"], Value::Null);
    assert!(
        seen["no_sample"]
            .as_str()
            .unwrap()
            .contains("is the daemon running?"),
        "{seen}"
    );
    let counted = seen["counted"].as_array().unwrap();
    assert!(counted.iter().any(|entry| entry["packets"] == all), "{seen}");
    let table = daemon.portcullis(&["firewall", "denied"], b"").stdout;
    let table = String::from_utf8(table).unwrap();
    assert!(
        table.contains("every packet is counted") && table.contains(&all.to_string()),
        "{table}"
    );
}

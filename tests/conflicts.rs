//! Other programs' tables in a real kernel: what is said of them is what packets meet.
//!
//! Each table is tried with a connection from outside: it gets in before the table is there, and then
//! does what the comparison says.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use common::Namespace;
use portcullis::agent::neighbours::compare;
use portcullis::policy::conflicts::Comparison;
use portcullis::policy::firewall::{Inputs, ruleset};
use portcullis::policy::foreign::Foreign;
use portcullis::policy::links::LinkSettings;
use portcullis::policy::ruleset::Ruleset;
use portcullis::system::nftables::{Nftables, foreign};
use portcullis_protocol::Spec;

const ADDRESSES: [&str; 2] = ["10.9.0.1:22", "[fd09::1]:22"];

/// A host that lets SSH in by its gate and listens, and a stranger who gets in.
struct World {
    host: Namespace,
    stranger: Namespace,
    gate: Ruleset,
    _listener: TcpListener,
}

impl World {
    fn new() -> Self {
        let (host, stranger) = common::host_and_stranger();
        let spec = Spec::from_json(
            br#"{"version":1,"generation":1,"instance":{"id":"i"},
                "firewall":{"ingress":[{"id":"ssh","protocol":"tcp","from_port":22,"ip_ranges":["10.9.0.2","fd09::2"]}]}}"#,
        );
        let gate = ruleset(Inputs {
            spec: Some(&spec.unwrap()),
            ..Inputs::default()
        });
        let listener = host.enter(|| {
            Nftables::open().unwrap().replace(&gate).unwrap();
            TcpListener::bind("[::]:22").unwrap()
        });
        let world = Self {
            host,
            stranger,
            gate,
            _listener: listener,
        };
        assert_eq!(world.gets_in(), [true; 2], "before any other table is there");
        let found = world.compared();
        assert!(found.conflicts.is_empty() && found.tried >= 2, "{found:?}");
        world
    }

    /// Whether the stranger gets in, over IPv4 and IPv6.
    fn gets_in(&self) -> [bool; 2] {
        ADDRESSES.map(|to| {
            let to: SocketAddr = to.parse().unwrap();
            self.stranger
                .enter(move || TcpStream::connect_timeout(&to, Duration::from_millis(300)).is_ok())
        })
    }

    fn compared(&self) -> Comparison {
        let look = || compare(&self.gate, &LinkSettings::default(), Foreign::default());
        self.host.enter(look).unwrap()
    }

    /// Loads rules of nft(8) in the place of the tables that the last call made.
    fn load(&self, rules: &str) {
        let file = tempfile::NamedTempFile::new().unwrap();
        // nft wants a line end behind the last rule of a chain.
        let rules = rules.replace(" }", "\n }");
        let text = format!("table inet t\ndelete table inet t\ntable ip t4\ndelete table ip t4\n{rules}\n");
        std::fs::write(file.path(), text).unwrap();
        self.host.run(&format!("nft -f {}", file.path().display()));
    }
}

/// The rules that drop, each with its chain, and with `?` if it only may.
fn dropping(found: &Comparison) -> Vec<String> {
    let show = |c: &portcullis::policy::conflicts::Conflict| {
        assert!(c.hits.iter().all(|hit| hit.rule == "rule ssh"), "{c:?}");
        format!(
            "{} {}: {}{}",
            c.table,
            c.chain,
            c.rule,
            if c.certain { "" } else { "?" }
        )
    };
    found.conflicts.iter().map(show).collect()
}

const INPUT: &str = "type filter hook input priority 0;";

/// Rules of nft(8), who is said to drop, and whether the stranger gets in.
type Case = (String, Vec<&'static str>, [bool; 2]);

#[track_caller]
fn meets(cases: &[Case]) {
    let world = World::new();
    for (rules, expected, gets_in) in cases {
        world.load(rules);
        assert_eq!(dropping(&world.compared()), *expected, "{rules}");
        assert_eq!(world.gets_in(), *gets_in, "{rules}");
    }
    world.load("");
    assert_eq!(world.gets_in(), [true; 2], "without other tables again");
}

#[test]
fn what_is_said_of_another_table_is_what_packets_meet() {
    meets(&[
        (
            format!("table inet t {{ chain in {{ {INPUT} policy drop; }} }}"),
            vec!["inet t in: policy drop"],
            [false; 2],
        ),
        (
            format!(
                "table inet t {{ chain in {{ {INPUT} policy drop; tcp dport 22 accept; meta nfproto ipv6 icmpv6 type {{ 135, 136 }} accept; }} }}"
            ),
            vec![],
            [true; 2],
        ),
        (
            format!(
                "table inet t {{ chain own {{ tcp dport 20-30 drop; }}; chain in {{ {INPUT} ip saddr 10.9.0.0/24 jump own; }} }}"
            ),
            vec!["inet t own: meta l4proto tcp th dport 20-30 drop"],
            [false, true],
        ),
        (
            format!(
                "table inet t {{ chain own {{ return; }}; chain in {{ {INPUT} policy drop; meta l4proto tcp goto own; tcp dport 22 accept; }} }}"
            ),
            vec!["inet t in: policy drop"],
            [false; 2],
        ),
        (
            format!("table ip t4 {{ chain in {{ {INPUT} ip saddr 10.9.0.2 ip daddr 10.9.0.1 reject; }} }}"),
            vec!["ip t4 in: ip saddr 10.9.0.2 ip daddr 10.9.0.1 reject"],
            [false, true],
        ),
        // Accepted there before it would be dropped there, in the same chain.
        (
            format!(
                "table inet t {{ chain in {{ {INPUT} iifname \"eth*\" tcp dport {{ 22, 80-90 }} accept; tcp dport 22 drop; }} }}"
            ),
            vec![],
            [true; 2],
        ),
        // An accept of one table is not final for the next.
        (
            format!(
                "table ip t4 {{ chain in {{ {INPUT} accept; }} }}; table inet t {{ chain in {{ type filter hook input priority 10; tcp dport {{ 22, 80-90 }} drop; }} }}"
            ),
            vec!["inet t in: meta l4proto tcp th dport { 22, 80-90 } drop"],
            [false; 2],
        ),
    ]);
}

#[test]
fn the_other_hooks_are_told_apart() {
    meets(&[
        // At prerouting, before and after the gate.
        (
            "table inet t { chain pre { type filter hook prerouting priority -300; iif != lo tcp flags syn tcp dport 22 drop; } }".to_owned(),
            vec!["inet t pre: iif != 1 meta l4proto tcp tcp flags 2 th dport 22 drop"],
            [false; 2],
        ),
        (
            "table inet t { chain pre { type filter hook prerouting priority -50; ct state new tcp dport 22 drop; } }".to_owned(),
            vec!["inet t pre: ct state new meta l4proto tcp th dport 22 drop"],
            [false; 2],
        ),
        // What is forwarded is none of the host's ports.
        (
            "table inet t { chain behind { type filter hook forward priority 0; policy drop; } }".to_owned(),
            vec![],
            [true; 2],
        ),
    ]);
}

#[test]
fn what_distributions_ship_is_understood() {
    meets(&[
        // As ufw and the kernel's documentation have them: neither is true of such a packet.
        (
            format!(
                "table inet t {{ chain in {{ {INPUT} rt type 0 drop; ip frag-off & 0x1fff != 0 drop; tcp flags & (fin|syn|rst|ack) != syn ct state new drop; }} }}"
            ),
            vec![],
            [true; 2],
        ),
        // A verdict map, a reverse path filter and the types of addresses, as distributions use them.
        (
            format!(
                "table inet t {{ chain in {{ {INPUT} policy drop; ct state vmap {{ established : accept, related : accept, invalid : drop }}; iif lo accept; meta l4proto ipv6-icmp accept; tcp dport vmap {{ 22 : accept, 23 : drop }} }}; chain pre {{ type filter hook prerouting priority 10; fib saddr . iif oif missing drop; fib daddr type != local drop; ct status dnat drop }} }}"
            ),
            vec![],
            [true; 2],
        ),
        (
            format!("table inet t {{ chain in {{ {INPUT} tcp dport vmap {{ 22 : drop, 23 : accept }} }} }}"),
            vec!["inet t in: meta l4proto tcp th dport vmap { 22 : drop, 23 : accept }"],
            [false; 2],
        ),
    ]);
}

#[test]
fn named_sets_are_looked_into_and_those_that_packets_fill_are_not_judged() {
    let world = World::new();
    let set = |flags: &str, elements: &str, rule: &str| {
        format!(
            "table inet t {{ set s {{ type ipv4_addr; {flags} {elements} }}; chain in {{ {INPUT} {rule} }} }}"
        )
    };
    for (rules, expected) in [
        (
            set("", "elements = { 10.9.0.2 }", "ip saddr @s drop"),
            "inet t in: meta nfproto ipv4 ip saddr 10.9.0.2 drop",
        ),
        (set("", "elements = { 10.9.0.3 }", "ip saddr @s drop"), ""),
        (
            set(
                "flags interval;",
                "elements = { 10.9.0.0/25 }",
                "ip saddr @s drop",
            ),
            "inet t in: meta nfproto ipv4 ip saddr 10.9.0.0-10.9.0.127 drop",
        ),
        (
            set("flags timeout;", "", "ip saddr @s drop"),
            "inet t in: meta nfproto ipv4 ip saddr @s drop?",
        ),
        (set("", "", "limit rate 1/minute drop"), "inet t in: limit drop?"),
        (
            set("", "", "meta mark 7 drop"),
            "inet t in: meta mark 0x07000000 drop?",
        ),
        (set("", "", "ip saddr . tcp dport { 10.9.0.2 . 22 } drop"), "?"),
    ] {
        world.load(&rules);
        let found = dropping(&world.compared()).join("; ");
        if expected == "?" {
            assert!(found.ends_with("drop?"), "{rules}\n{found}");
        } else {
            assert_eq!(found, expected, "{rules}");
        }
    }
}

#[test]
fn our_own_table_is_not_read_and_tables_at_a_device_are_named() {
    let world = World::new();
    assert_eq!(world.host.enter(|| foreign::read().unwrap()), Foreign::default());
    world.host.run("nft add table inet other");
    let tables = world.host.enter(|| foreign::read().unwrap()).tables;
    assert_eq!(
        tables.iter().map(ToString::to_string).collect::<Vec<_>>(),
        ["inet other"]
    );
    world.host.run("nft add table netdev dev");
    let unread = world.compared().unread;
    assert!(
        unread.len() == 1 && unread[0].contains("netdev dev"),
        "{unread:?}"
    );
}

/// A port that another program translates is no port of this host any more.
#[test]
fn a_translated_port_is_not_judged_behind_the_translation() {
    let world = World::new();
    world.load(&format!(
        "table ip t4 {{ chain pre {{ type nat hook prerouting priority -100; tcp dport 22 dnat to 172.30.0.2:80; }}; \
         chain in {{ {INPUT} policy drop; }} }}"
    ));
    assert_eq!(dropping(&world.compared()), Vec::<String>::new());
    world.load(&format!(
        "table ip t4 {{ chain pre {{ type nat hook prerouting priority -100; tcp dport 23 dnat to 172.30.0.2:80; }}; \
         chain in {{ {INPUT} policy drop; }} }}"
    ));
    assert_eq!(dropping(&world.compared()), ["ip t4 in: policy drop"]);
}

/// Ten thousand rules of others cost a bounded time, and a limit keeps more from costing more.
#[test]
fn ten_thousand_rules_are_read_within_a_second() {
    let world = World::new();
    let many = |count: u32| {
        let rules: String = (0..count)
            .map(|i| {
                format!(
                    "ip saddr 198.18.{}.{} tcp dport {} drop\n",
                    i >> 8 & 255,
                    i & 255,
                    i % 60_000 + 1
                )
            })
            .collect();
        world.load(&format!(
            "table inet t {{ chain in {{ {INPUT}\n{rules} tcp dport 22 drop\n}} }}"
        ));
    };
    many(10_000);
    let start = Instant::now();
    let found = world.compared();
    let took = start.elapsed();
    println!("10,000 rules: {took:?}");
    assert_eq!(dropping(&found), ["inet t in: meta l4proto tcp th dport 22 drop"]);
    assert!(took < Duration::from_secs(1), "{took:?}");
    many(25_000);
    let start = Instant::now();
    let found = world.compared();
    println!("25,000 rules: {:?}", start.elapsed());
    assert!(found.conflicts.is_empty() && found.unread.len() == 1, "{found:?}");
}

//! Who gets at what, on gates made from specs.

use std::collections::BTreeSet;
use std::net::IpAddr;

use portcullis_protocol::Spec;
use proptest::prelude::*;

use super::socket::{Program, Socket, Transport};
use super::*;
use crate::policy::conflicts::published::Published;
use crate::policy::explain::{Packet, TCP_SYN, explain};
use crate::policy::firewall::{self, ruleset};
use crate::policy::ruleset::{Match, Rule, Verdict};

use Transport::{Tcp, Udp};

fn spec(rest: &str) -> Spec {
    let text = format!(r#"{{"version":1,"generation":1,"instance":{{"id":"i"}}{rest}}}"#);
    Spec::from_json(text.as_bytes()).unwrap()
}

fn gate(spec: &Spec) -> Ruleset {
    ruleset(firewall::Inputs {
        spec: Some(spec),
        internal: &["docker0".to_owned()].into(),
        ..firewall::Inputs::default()
    })
}

const SPEC: &str = r#","cluster":{"id":"c","peers":[{"instance":"p","addresses":["10.0.0.3","fd00::3"]}]},
    "control_plane":{"sources":["192.0.2.0/24"]},
    "firewall":{"ingress":[
      {"id":"ssh","protocol":"tcp","from_port":22},
      {"id":"web","protocol":"tcp","from_port":80,"ip_ranges":["10.0.0.0/8","fd00::/8"]},
      {"id":"half","protocol":"tcp","from_port":81,"ip_ranges":["0.0.0.0/1","128.0.0.0/2"]},
      {"id":"v4","protocol":"tcp","from_port":82,"ip_ranges":["0.0.0.0/0"]},
      {"id":"many","from_port":9000,"to_port":9999},
      {"id":"idle","protocol":"udp","from_port":53}]}"#;

fn socket(transport: Transport, local: &str) -> Socket {
    Socket {
        transport,
        local: local.parse().unwrap(),
        v6_only: false,
        interface: None,
        uid: 0,
        inode: 1,
        unit: Some("a.service".into()),
        program: None,
    }
}

fn judged(gate: &Ruleset, sockets: &[Socket], others: &Comparison) -> Exposure {
    judge(Inputs {
        sockets,
        ephemeral: &(32768..=60999).collect(),
        gate,
        uplinks: &[],
        others,
    })
}

fn one(gate: &Ruleset, socket: Socket) -> Listener {
    let mut exposure = judged(gate, &[socket], &Comparison::default());
    assert_eq!(exposure.listeners.len(), 1);
    exposure.listeners.remove(0)
}

/// Each who gets in, with its rule.
fn by(listener: &Listener) -> Vec<String> {
    listener
        .by
        .iter()
        .map(|grant| format!("{}: {}", grant.rule, grant.who))
        .collect()
}

#[test]
fn each_listener_has_who_gets_in_and_by_which_rule() {
    let gate = gate(&spec(SPEC));
    let peers = "peers: 2 peer addresses";
    for (socket, reach, rules) in [
        (
            socket(Tcp, "[::]:22"),
            Reach::Anybody,
            vec![peers, "rule ssh: anybody"],
        ),
        (
            socket(Tcp, "0.0.0.0:23"),
            Reach::Peers,
            vec!["peers: 1 peer address"],
        ),
        (
            socket(Tcp, "[::]:80"),
            Reach::Named,
            vec![peers, "rule web: 10.0.0.0/8, fd00::/8"],
        ),
        (
            socket(Tcp, "10.1.1.1:80"),
            Reach::Named,
            vec!["peers: 1 peer address", "rule web: 10.0.0.0/8"],
        ),
        // Three quarters of the internet are anybody.
        (
            socket(Tcp, "[::]:81"),
            Reach::Anybody,
            vec![peers, "rule half: 0.0.0.0-191.255.255.255"],
        ),
        (
            socket(Tcp, "[fd00::1]:82"),
            Reach::Peers,
            vec!["peers: 1 peer address"],
        ),
        (
            socket(Tcp, "[::]:7443"),
            Reach::Named,
            vec![peers, "control plane: 192.0.2.0/24"],
        ),
        (
            socket(Udp, "0.0.0.0:9001"),
            Reach::Anybody,
            vec!["peers: 1 peer address", "rule many: anybody"],
        ),
        (socket(Tcp, "127.0.0.1:22"), Reach::Loopback, vec![]),
        (socket(Tcp, "[::1]:22"), Reach::Loopback, vec![]),
        (socket(Tcp, "[::ffff:127.0.0.1]:22"), Reach::Loopback, vec![]),
    ] {
        let listener = one(&gate, socket);
        assert_eq!(
            (listener.reach, by(&listener)),
            (reach, rules.iter().map(|r| (*r).to_owned()).collect())
        );
        assert!(!listener.is_unnamed());
        assert_eq!(listener.is_swept_in(), listener.port == 9001);
    }
}

#[test]
fn an_interface_may_be_this_hosts_own() {
    let gate = gate(&spec(SPEC));
    let on = |name: &str| Socket {
        interface: Some(name.into()),
        ..socket(Tcp, "0.0.0.0:22")
    };
    assert_eq!(one(&gate, on("docker0")).reach, Reach::Containers);
    assert_eq!(one(&gate, on("lo")).reach, Reach::Loopback);
    assert_eq!(one(&gate, on("eth0")).reach, Reach::Anybody);
    let exposure = judged(&gate, &[], &Comparison::default());
    assert_eq!(exposure.internal_interfaces, ["docker0"]);
}

#[test]
fn what_every_host_needs_is_told_apart_from_the_spec() {
    let gate = gate(&spec(""));
    let dhcp = one(&gate, socket(Udp, "10.0.0.2:68"));
    assert_eq!(dhcp.reach, Reach::Base);
    assert_eq!(by(&dhcp), ["base dhcp: what every host needs: dhcp"]);
    assert_eq!(one(&gate, socket(Udp, "10.0.0.2:69")).reach, Reach::Nobody);
    assert_eq!(one(&gate, socket(Udp, "[fe80::1]:546")).reach, Reach::Base);
}

#[test]
fn without_a_gate_anybody_gets_at_everything_and_a_rule_of_others_is_not_judged() {
    let anything = || socket(Tcp, "[::]:4711");
    let open = one(&Ruleset::default(), anything());
    assert_eq!(open.reach, Reach::Anybody);
    assert!(open.is_unnamed());
    let mut dormant = gate(&spec(""));
    dormant.dormant = true;
    assert!(one(&dormant, anything()).is_unnamed());
    let mut changed = gate(&spec(SPEC));
    let foreign = |matches| Rule {
        comment: String::new(),
        matches,
        log: None,
        counter: false,
        verdict: Some(Verdict::Accept),
    };
    let rules = &mut changed.chains[0].rules;
    rules.insert(
        0,
        foreign(vec![Match::Protocol(6), Match::Foreign("xfrm".into())]),
    );
    assert_eq!(one(&changed, anything()).reach, Reach::Unknown);
    assert_eq!(one(&changed, socket(Udp, "[::]:4711")).reach, Reach::Peers);
    // One that can be judged is, and the spec does not name it.
    let mut changed = gate(&spec(""));
    changed.chains[0]
        .rules
        .insert(0, foreign(vec![Match::Protocol(6)]));
    assert!(one(&changed, anything()).is_unnamed());
}

#[test]
fn what_is_published_is_one_with_its_proxy_and_stands_alone_without() {
    let gate = gate(&spec(SPEC));
    let published = |port, family| Published {
        transport: Tcp,
        port,
        family,
        to: "DNAT to 172.17.0.2:80".into(),
        table: "ip nat".into(),
    };
    let others = Comparison {
        published: vec![published(22, Family::Ipv4), published(82, Family::Ipv4)],
        ..Comparison::default()
    };
    let exposure = judged(&gate, &[socket(Tcp, "0.0.0.0:22")], &others);
    let seen: Vec<_> = exposure
        .listeners
        .iter()
        .map(|one| (one.port, one.uid, one.reach, one.cleartext.map(|c| c.protocol)))
        .collect();
    // It is HTTP by the container's port.
    let http = Some("HTTP");
    assert_eq!(
        seen,
        [
            (22, Some(0), Reach::Anybody, http),
            (82, None, Reach::Anybody, http)
        ]
    );
    assert_eq!(
        exposure.listeners[1].published_to,
        ["172.17.0.2:80".to_owned()].into()
    );
}

#[test]
fn what_another_table_drops_is_named_beside_it_and_counts_as_reachable() {
    let gate = gate(&spec(SPEC));
    let conflict = |hook| Conflict {
        table: "ip filter".into(),
        chain: "INPUT".into(),
        hook,
        priority: 0,
        handle: None,
        rule: "DROP".into(),
        certain: true,
        program: crate::policy::conflicts::Program::Ufw,
        hits: vec![crate::policy::conflicts::Hit {
            rule: "rule ssh".into(),
            packet: String::new(),
            opens: None,
        }],
    };
    let published = Published {
        transport: Tcp,
        port: 22,
        family: Family::Ipv4,
        to: "redir".into(),
        table: "ip nat".into(),
    };
    let drops = Some("table ip filter, chain INPUT drops it".to_owned());
    for (hook, publish, expected) in [
        ("input", false, drops.clone()),
        // What goes to a container passes no chain at input.
        ("input", true, None),
        ("prerouting", true, drops.clone()),
    ] {
        let others = Comparison {
            conflicts: vec![conflict(hook)],
            published: publish.then(|| published.clone()).into_iter().collect(),
            ..Comparison::default()
        };
        let exposure = judged(&gate, &[socket(Tcp, "[::]:22")], &others);
        let ssh = &exposure.listeners[0];
        let dropped: Vec<_> = ssh.by.iter().map(|grant| grant.dropped_by.clone()).collect();
        assert_eq!((ssh.reach, dropped), (Reach::Anybody, vec![None, expected]));
        assert_eq!(ssh.published_to.contains("another port of this host"), publish);
    }
}

#[test]
fn what_nobody_serves_is_named_and_what_is_served_is_not() {
    let gate = gate(&spec(SPEC));
    let sockets = [
        socket(Tcp, "[::]:22"),
        socket(Tcp, "127.0.0.1:80"),
        socket(Udp, "[::]:9999"),
        socket(Udp, "0.0.0.0:40000"),
    ];
    let exposure = judged(&gate, &sockets, &Comparison::default());
    let unserved: Vec<_> = exposure
        .unserved
        .iter()
        .map(|one| (one.rule.as_str(), one.ports.join(" ")))
        .collect();
    let expected = [
        ("control plane", "tcp 7443"),
        ("rule web", "tcp 80"),
        ("rule half", "tcp 81"),
        ("rule v4", "tcp 82"),
        ("rule idle", "udp 53"),
    ];
    assert_eq!(unserved, expected.map(|(rule, ports)| (rule, ports.to_owned())));
    // A client's socket is of interest only if more than peers get at it.
    assert_eq!((exposure.clients, exposure.listeners.len()), (1, 3));
    let wide = self::gate(&spec(
        r#","firewall":{"ingress":[{"id":"a","from_port":1,"to_port":65535}]}"#,
    ));
    let exposure = judged(&wide, &sockets, &Comparison::default());
    assert_eq!((exposure.clients, exposure.listeners.len()), (0, 4));
}

#[test]
fn workers_of_one_program_are_one_listener_and_others_are_not() {
    let gate = gate(&spec(SPEC));
    let of = |local: &str, pid, name: &str| Socket {
        program: Some(Program {
            pid,
            file: Some(format!("/usr/sbin/{name}")),
            name: "same".into(),
        }),
        ..socket(Tcp, local)
    };
    let sockets = [
        of("0.0.0.0:80", 9, "nginx"),
        of("[::]:80", 7, "nginx"),
        of("0.0.0.0:80", 8, "other"),
    ];
    let exposure = judged(&gate, &sockets, &Comparison::default());
    let seen: Vec<_> = exposure
        .listeners
        .iter()
        .map(|one| (one.program.as_ref().unwrap().pid, one.listens_on.len()))
        .collect();
    assert_eq!(seen, [(7, 2), (8, 1)]);
}

#[test]
fn a_hundred_thousand_peers_are_one_question() {
    let peers: Vec<String> = (0..100_000u32)
        .map(|n| {
            let ip = std::net::Ipv4Addr::from_bits(0x0a00_0000 + n);
            format!(r#"{{"instance":"p{n}","addresses":["{ip}"]}}"#)
        })
        .collect();
    let rest = format!(r#","cluster":{{"id":"c","peers":[{}]}}"#, peers.join(","));
    let gate = gate(&spec(&rest));
    let doors = grants::Doors::of(&gate, "eth0");
    assert!(doors.largest_asked() <= 8, "{}", doors.largest_asked());
    let sockets: Vec<_> = (1..500)
        .map(|port| socket(Tcp, &format!("0.0.0.0:{port}")))
        .collect();
    let exposure = judged(&gate, &sockets, &Comparison::default());
    assert_eq!(exposure.listeners.len(), 499);
    assert_eq!(by(&exposure.listeners[0]), ["peers: 100000 peer addresses"]);
}

fn address() -> impl Strategy<Value = IpAddr> {
    prop_oneof![
        (0..8u32).prop_map(|n| std::net::Ipv4Addr::from_bits(0x0a00_0000 + n).into()),
        (0..8u128).prop_map(|n| std::net::Ipv6Addr::from_bits((0xfd << 120) + n).into()),
        any::<[u8; 4]>().prop_map(IpAddr::from),
    ]
}

#[derive(Clone, Debug)]
struct RuleOf {
    protocol: &'static str,
    ports: (u16, u16),
    sources: Vec<(IpAddr, u8)>,
}

fn rule() -> impl Strategy<Value = RuleOf> {
    let source = (address(), 0..=9u8).prop_map(|(ip, n)| {
        let longest = if ip.is_ipv4() { 32 } else { 128 };
        (
            ip,
            longest - n.min(8) * u8::from(n < 9) - if n == 9 { longest } else { 0 },
        )
    });
    (
        prop::sample::select(vec!["tcp", "udp", "any"]),
        (1..12u16, 0..3u16),
        prop::collection::vec(source, 0..4),
    )
        .prop_map(|(protocol, (from, more), sources)| RuleOf {
            protocol,
            ports: (from, from + more),
            sources,
        })
}

fn spec_of(rules: &[RuleOf], peers: &[IpAddr]) -> Spec {
    let rules: Vec<_> = rules
        .iter()
        .enumerate()
        .map(|(at, rule)| {
            let nets: Vec<_> = rule
                .sources
                .iter()
                .map(|(ip, length)| ipnet::IpNet::new(*ip, *length).unwrap().trunc().to_string())
                .collect();
            serde_json::json!({"id": format!("r{at}"), "protocol": rule.protocol,
                "from_port": rule.ports.0, "to_port": rule.ports.1, "ip_ranges": nets})
        })
        .collect();
    let peers: BTreeSet<_> = peers.iter().collect();
    let peers: Vec<_> = peers
        .into_iter()
        .filter(|ip| !ip.is_loopback() && !ip.is_unspecified() && !ip.is_multicast())
        .filter(|ip| matches!(ip, IpAddr::V4(v4) if v4.octets()[0] == 10) || ip.is_ipv6())
        .enumerate()
        .map(|(at, ip)| serde_json::json!({"instance": format!("p{at}"), "addresses": [ip]}))
        .collect();
    let text = serde_json::json!({"version": 1, "generation": 1, "instance": {"id": "i"},
        "cluster": {"id": "c", "peers": peers}, "firewall": {"ingress": rules}});
    Spec::from_json(&serde_json::to_vec(&text).unwrap()).unwrap()
}

/// Whether a grant of the table says that this source gets in, by what the spec says of the grant's rule.
fn says(grant: &Grant, spec: &Spec, source: IpAddr) -> bool {
    if !grant.families.contains(&Family::of(source)) {
        return false;
    }
    match grant.rule.strip_prefix("rule ") {
        Some(id) => {
            let rule = spec
                .firewall
                .ingress
                .iter()
                .find(|rule| rule.id.as_str() == id)
                .unwrap();
            rule.sources.is_empty() || rule.sources.iter().any(|range| range.net().contains(&source))
        }
        None => grant.rule == "peers" && spec.peer_addresses().any(|peer| peer == source),
    }
}

proptest! {
    /// `explain`, which is tried against the kernel packet by packet, and the table say the same of whoever
    /// sends to whatever listens.
    #[test]
    fn the_table_and_explain_say_the_same(
        rules in prop::collection::vec(rule(), 0..5),
        peers in prop::collection::vec(address(), 0..4),
        source in address(),
        port in 1..16u16,
        is_tcp in any::<bool>(),
        local in prop::sample::select(vec!["0.0.0.0", "[::]", "10.9.9.9", "[fd09::9]"]),
    ) {
        let spec = spec_of(&rules, &peers);
        let gate = gate(&spec);
        let transport = if is_tcp { Tcp } else { Udp };
        let socket = socket(transport, &format!("{local}:{port}"));
        let heard = socket.families().contains(&Family::of(source));
        let packet = Packet {
            interface: "eth0".into(),
            source,
            destination: None,
            outgoing: None,
            protocol: transport.number(),
            source_port: Some(50_000),
            port: Some(port),
            tcp_flags: TCP_SYN,
            icmp_type: None,
            hop_limit: 64,
            conntrack: None,
        };
        let gets_in = explain(&gate, &packet, None).verdict == Some(Verdict::Accept) && heard;
        let listener = one(&gate, socket);
        // Nobody may send from a loopback address, whatever a rule's range holds.
        let said = !source.is_loopback() && listener.by.iter().any(|grant| says(grant, &spec, source));
        prop_assert_eq!(said, gets_in, "{:?} {:?}", listener, packet);
        if listener.reach == Reach::Nobody {
            prop_assert!(listener.by.is_empty() && !gets_in);
        }
    }
}

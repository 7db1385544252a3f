//! The gate in a real kernel: what is planned is what is held, and packets obey.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use common::Namespace;
use portcullis::policy::firewall::{Inputs, ruleset};
use portcullis::policy::links::{LinkSettings, internal};
use portcullis::policy::ruleset::Ruleset;
use portcullis::system::links;
use portcullis::system::nftables::{Error, Nftables};
use portcullis_protocol::Spec;

fn spec(rest: &str) -> Spec {
    Spec::from_json(format!(r#"{{"version":1,"generation":1,"instance":{{"id":"i-1"}}{rest}}}"#).as_bytes())
        .unwrap()
}

fn planned(rest: &str) -> Ruleset {
    ruleset(Inputs {
        spec: Some(&spec(rest)),
        ..Inputs::default()
    })
}

const RICH: &str = r#","cluster":{"id":"c","peers":[{"instance":"p","addresses":["10.9.0.3","fd09::3","2e66::"]}]},
    "control_plane":{"sources":["192.0.2.0/24","2001:db8::/32","198.51.100.7"]},
    "firewall":{"ingress":[
      {"id":"ssh","protocol":"tcp","from_port":22,"ip_ranges":["0.0.0.0/0","::/0"]},
      {"id":"web","from_port":80,"to_port":90,"ip_ranges":["10.0.0.0/8","172.16.0.0/12","255.255.255.0/24","fd00::/8","ff00::/9"]},
      {"id":"gre","protocol":47,"ip_ranges":["192.0.2.1"]},
      {"id":"ping","protocol":"icmp"}]}"#;

/// A host and a stranger on one link, both families.
fn world() -> (Namespace, Namespace) {
    let (host, stranger) = (Namespace::new("host"), Namespace::new("stranger"));
    host.connect("eth0", &stranger, "eth0");
    for (namespace, v4, v6) in [
        (&host, "10.9.0.1/24", "fd09::1/64"),
        (&stranger, "10.9.0.2/24", "fd09::2/64"),
    ] {
        common::run(&format!("ip -n {} addr add {v4} dev eth0", namespace.name()));
        common::run(&format!(
            "ip -n {} addr add {v6} dev eth0 nodad",
            namespace.name()
        ));
    }
    (host, stranger)
}

fn held(nftables: &mut Nftables) -> Option<Ruleset> {
    nftables.read().unwrap().map(|held| held.ruleset)
}

fn answers(from: &Namespace, to: &str) -> bool {
    let to: SocketAddr = to.parse().unwrap();
    from.enter(move || TcpStream::connect_timeout(&to, Duration::from_millis(300)).is_ok())
}

#[test]
fn what_is_planned_is_what_the_kernel_holds() {
    let host = Namespace::new("readback");
    host.enter(|| {
        let mut nftables = Nftables::open().unwrap();
        assert_eq!(held(&mut nftables), None);
        for rest in ["", RICH, ""] {
            let plan = planned(rest);
            nftables.replace(&plan).unwrap();
            let held = held(&mut nftables).unwrap();
            assert_eq!(held, plan, "{:#?}", held.diff(&plan));
        }
    });
}

/// nft(8) reads our table and finds the same: set types, comments and all.
#[test]
fn nft_lists_it_and_takes_the_listing_back() {
    let host = Namespace::new("listing");
    let plan = planned(RICH);
    host.enter(|| Nftables::open().unwrap().replace(&plan).unwrap());
    let listing = host.run("nft list table inet portcullis");
    for expected in [
        "comment \"rule ssh\"",
        "10.9.0.3",
        "policy drop",
        "type ifname",
        "255.255.255.0/24",
    ] {
        assert!(listing.contains(expected), "{expected} is not in\n{listing}");
    }
    assert!(!listing.contains("unknown"), "{listing}");
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), format!("flush ruleset\n{listing}")).unwrap();
    host.run(&format!("nft -f {}", file.path().display()));
}

#[test]
fn a_hundred_thousand_peers_are_one_transaction() {
    let peers: Vec<String> = (0..100_000u32)
        .map(|i| {
            format!(
                r#"{{"instance":"p{i}","addresses":["10.{}.{}.{}"]}}"#,
                i >> 16,
                i >> 8 & 255,
                i & 255
            )
        })
        .collect();
    let plan = planned(&format!(
        r#","cluster":{{"id":"c","peers":[{}]}}"#,
        peers.join(",")
    ));
    let host = Namespace::new("many");
    host.enter(|| {
        let mut nftables = Nftables::open().unwrap();
        nftables.replace(&plan).unwrap();
        assert!(held(&mut nftables).unwrap() == plan);
    });
}

#[test]
fn a_changed_rule_is_seen() {
    let host = Namespace::new("drift");
    let plan = planned(RICH);
    let held = || host.enter(|| held(&mut Nftables::open().unwrap()));
    for change in [
        "nft insert rule inet portcullis gate accept",
        "nft add element inet portcullis peers4 { 203.0.113.9 }",
        "nft chain inet portcullis gate { policy accept ; }",
        "nft add chain inet portcullis more",
        "nft add table inet portcullis { flags dormant ; }",
        "nft flush chain inet portcullis gate",
        "nft delete table inet portcullis",
    ] {
        host.enter(|| Nftables::open().unwrap().replace(&plan).unwrap());
        assert_eq!(held().as_ref(), Some(&plan));
        host.run(change);
        assert_ne!(held().as_ref(), Some(&plan), "{change} was not seen");
    }
}

#[test]
fn only_what_a_rule_names_is_let_in() {
    let (host, stranger) = world();
    let listeners = host
        .enter(|| ["0.0.0.0:22", "0.0.0.0:81", "[::]:23"].map(|address| TcpListener::bind(address).unwrap()));
    // The positive control: without the gate, all of them answer.
    for port in ["10.9.0.1:22", "10.9.0.1:81", "[fd09::1]:23"] {
        assert!(answers(&stranger, port), "{port} should answer without the gate");
    }
    host.enter(|| Nftables::open().unwrap().replace(&planned(RICH)).unwrap());
    assert!(answers(&stranger, "10.9.0.1:22"));
    assert!(answers(&stranger, "10.9.0.1:81"), "10.9.0.2 is within 10.0.0.0/8");
    assert!(!answers(&stranger, "[fd09::1]:23"));
    host.enter(|| Nftables::open().unwrap().replace(&planned("")).unwrap());
    for port in ["10.9.0.1:22", "10.9.0.1:81", "[fd09::1]:23"] {
        assert!(!answers(&stranger, port), "{port} should be shut");
    }
    // The host itself still gets out, in both families.
    let outside = stranger.enter(|| {
        [
            TcpListener::bind("0.0.0.0:99").unwrap(),
            TcpListener::bind("[::]:98").unwrap(),
        ]
    });
    assert!(answers(&host, "10.9.0.2:99") && answers(&host, "[fd09::2]:98"));
    drop((listeners, outside));
}

#[test]
fn a_peer_reaches_every_port() {
    let (host, stranger) = world();
    let _listener = host.enter(|| TcpListener::bind("[::]:4711").unwrap());
    let peer = r#","cluster":{"id":"c","peers":[{"instance":"p","addresses":["10.9.0.2","fd09::2"]}]}"#;
    host.enter(|| Nftables::open().unwrap().replace(&planned("")).unwrap());
    assert!(!answers(&stranger, "10.9.0.1:4711") && !answers(&stranger, "[fd09::1]:4711"));
    host.enter(|| Nftables::open().unwrap().replace(&planned(peer)).unwrap());
    assert!(answers(&stranger, "10.9.0.1:4711") && answers(&stranger, "[fd09::1]:4711"));
}

/// moby#22054: a published port is decided by the port that the outside dials, before DNAT.
#[test]
fn a_published_port_is_shut_unless_its_outside_port_is_named() {
    let (host, stranger) = world();
    let container = Namespace::new("container");
    host.connect("br-x", &container, "eth0");
    common::run(&format!("ip -n {} addr add 172.30.0.1/24 dev br-x", host.name()));
    common::run(&format!(
        "ip -n {} addr add 172.30.0.2/24 dev eth0",
        container.name()
    ));
    common::run(&format!(
        "ip -n {} route add default via 172.30.0.1",
        container.name()
    ));
    common::run(&format!(
        "ip -n {} route add 172.30.0.0/24 via 10.9.0.1",
        stranger.name()
    ));
    host.run("sysctl -qw net.ipv4.ip_forward=1");
    let rules = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(rules.path(), "table ip nat { chain pre { type nat hook prerouting priority -100; tcp dport 8080 dnat to 172.30.0.2:80 ; }; }").unwrap();
    host.run(&format!("nft -f {}", rules.path().display()));
    let _listener = container.enter(|| TcpListener::bind("0.0.0.0:80").unwrap());
    assert!(answers(&stranger, "10.9.0.1:8080"), "published, no gate");
    assert!(answers(&stranger, "172.30.0.2:80"), "routed directly, no gate");

    let rule = |port: u16| {
        format!(r#","firewall":{{"ingress":[{{"id":"r","protocol":"tcp","from_port":{port}}}]}}"#)
    };
    // Port 80 is the container's; the outside dials 8080.
    host.enter(|| Nftables::open().unwrap().replace(&planned("")).unwrap());
    assert!(!answers(&stranger, "10.9.0.1:8080") && !answers(&stranger, "172.30.0.2:80"));
    host.enter(|| Nftables::open().unwrap().replace(&planned(&rule(80))).unwrap());
    assert!(
        !answers(&stranger, "10.9.0.1:8080"),
        "a rule for the container's port does not open the outside's"
    );
    host.enter(|| Nftables::open().unwrap().replace(&planned(&rule(8080))).unwrap());
    assert!(answers(&stranger, "10.9.0.1:8080"));
    assert!(
        !answers(&stranger, "172.30.0.2:80"),
        "the container itself stays out of reach"
    );
}

/// CVE-2020-8558: with route_localnet, packets from outside could reach services on 127.0.0.1.
#[test]
fn loopback_addresses_from_outside_are_dropped() {
    let (host, stranger) = world();
    let _listener = host.enter(|| TcpListener::bind("127.0.0.1:6379").unwrap());
    host.run("sysctl -qw net.ipv4.conf.all.route_localnet=1");
    stranger.run("sysctl -qw net.ipv4.conf.all.route_localnet=1");
    common::run(&format!(
        "ip -n {} route del local 127.0.0.0/8 table local",
        stranger.name()
    ));
    common::run(&format!("ip -n {} addr del 127.0.0.1/8 dev lo", stranger.name()));
    common::run(&format!(
        "ip -n {} route add 127.0.0.1/32 via 10.9.0.1",
        stranger.name()
    ));
    assert!(
        answers(&stranger, "127.0.0.1:6379"),
        "the attack works without the gate"
    );
    let open = planned(r#","firewall":{"ingress":[{"id":"r","protocol":"tcp","from_port":6379}]}"#);
    host.enter(|| Nftables::open().unwrap().replace(&open).unwrap());
    assert!(
        !answers(&stranger, "127.0.0.1:6379"),
        "and not with it, even where a rule opens the port"
    );
}

#[test]
fn an_uplink_is_known_by_its_routes_and_a_bridge_by_its_ports() {
    let (host, _stranger) = world();
    common::run(&format!("ip -n {} link add any0 type bridge", host.name()));
    let internal_links = || host.enter(|| internal(&links::read().unwrap(), &LinkSettings::default()));
    assert_eq!(internal_links(), ["any0".to_owned()].into());
    common::run(&format!("ip -n {} route add default via 10.9.0.2", host.name()));
    let all = host.enter(|| links::read().unwrap());
    assert!(
        all.iter().any(|l| l.name == "eth0"
            && l.has_default_route
            && l.has_address
            && l.kind.as_deref() == Some("veth")),
        "{all:?}"
    );
    common::run(&format!("ip -n {} link set eth0 master any0", host.name()));
    assert!(
        internal_links().is_empty(),
        "a bridge with an uplink in it is no longer internal"
    );
}

#[test]
fn a_refusal_names_the_object_and_changes_nothing() {
    let host = Namespace::new("refused");
    host.enter(|| {
        let mut nftables = Nftables::open().unwrap();
        let good = planned("");
        nftables.replace(&good).unwrap();
        let mut bad = planned(RICH);
        bad.sets.retain(|set| set.name != "rule.web.4");
        match nftables.replace(&bad) {
            Err(error @ Error::Refused { .. }) => assert!(error.to_string().contains("rule web"), "{error}"),
            other => panic!("{other:?}"),
        }
        assert_eq!(held(&mut nftables), Some(good));
    });
}

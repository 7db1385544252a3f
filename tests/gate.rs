//! The gate in a real kernel: what is planned is what is held, and packets obey.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use common::{Namespace, host_and_stranger};
use portcullis::policy::firewall::{Inputs, ruleset};
use portcullis::policy::links::{LinkSettings, internal};
use portcullis::policy::metadata;
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

fn held(nftables: &mut Nftables) -> Option<Ruleset> {
    nftables.read().unwrap().map(|held| held.ruleset)
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
    let internal = ["docker0".to_owned(), "br-1".to_owned()].into();
    let plan = ruleset(Inputs {
        spec: Some(&spec(RICH)),
        internal: &internal,
        metadata_lock: true,
        ..Inputs::default()
    });
    host.enter(|| Nftables::open().unwrap().replace(&plan).unwrap());
    let listing = host.run("nft list table inet portcullis");
    for expected in [
        "comment \"rule ssh\"",
        "10.9.0.3",
        "policy drop",
        "\"br-1\"",
        "\"docker0\"",
        "fib daddr oifname @internal.routed",
        "255.255.255.0/24",
    ] {
        assert!(listing.contains(expected), "{expected} is not in\n{listing}");
    }
    assert!(!listing.contains("unknown"), "{listing}");
    let file = tempfile::NamedTempFile::new().unwrap();
    for text in [listing, plan.to_string()] {
        std::fs::write(file.path(), format!("flush ruleset\n{text}")).unwrap();
        host.run(&format!("nft -f {}", file.path().display()));
    }
}

#[test]
fn a_hundred_thousand_peers_are_one_transaction() {
    let plan = common::table::planned(100_000, &[]);
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
    let (host, stranger) = host_and_stranger();
    let listeners = host
        .enter(|| ["0.0.0.0:22", "0.0.0.0:81", "[::]:23"].map(|address| TcpListener::bind(address).unwrap()));
    // The positive control: without the gate, all of them answer.
    for port in ["10.9.0.1:22", "10.9.0.1:81", "[fd09::1]:23"] {
        assert!(stranger.reaches(port), "{port} should answer without the gate");
    }
    host.enter(|| Nftables::open().unwrap().replace(&planned(RICH)).unwrap());
    assert!(stranger.reaches("10.9.0.1:22"));
    assert!(stranger.reaches("10.9.0.1:81"), "10.9.0.2 is within 10.0.0.0/8");
    assert!(!stranger.reaches("[fd09::1]:23"));
    host.enter(|| Nftables::open().unwrap().replace(&planned("")).unwrap());
    for port in ["10.9.0.1:22", "10.9.0.1:81", "[fd09::1]:23"] {
        assert!(!stranger.reaches(port), "{port} should be shut");
    }
    // The host itself still gets out, in both families.
    let outside = stranger.enter(|| {
        [
            TcpListener::bind("0.0.0.0:99").unwrap(),
            TcpListener::bind("[::]:98").unwrap(),
        ]
    });
    assert!(host.reaches("10.9.0.2:99") && host.reaches("[fd09::2]:98"));
    drop((listeners, outside));
}

#[test]
fn a_peer_reaches_every_port() {
    let (host, stranger) = host_and_stranger();
    let _listener = host.enter(|| TcpListener::bind("[::]:4711").unwrap());
    let peer = r#","cluster":{"id":"c","peers":[{"instance":"p","addresses":["10.9.0.2","fd09::2"]}]}"#;
    host.enter(|| Nftables::open().unwrap().replace(&planned("")).unwrap());
    assert!(!stranger.reaches("10.9.0.1:4711") && !stranger.reaches("[fd09::1]:4711"));
    host.enter(|| Nftables::open().unwrap().replace(&planned(peer)).unwrap());
    assert!(stranger.reaches("10.9.0.1:4711") && stranger.reaches("[fd09::1]:4711"));
}

/// A container on a bridge of the host, and a way to it for the stranger, both families.
fn container(host: &Namespace, stranger: &Namespace) -> Namespace {
    let container = Namespace::new("container");
    let (h, c, s) = (host.name(), container.name(), stranger.name());
    host.connect("port-x", &container, "eth0");
    common::run(&format!("ip -n {h} link add br-x type bridge"));
    common::run(&format!("ip -n {h} link set port-x master br-x"));
    common::run(&format!("ip -n {h} link set br-x up"));
    for (net, nodad) in [("172.30.0.", ""), ("fd30::", "nodad")] {
        let length = if nodad.is_empty() { 24 } else { 64 };
        common::run(&format!("ip -n {h} addr add {net}1/{length} dev br-x {nodad}"));
        common::run(&format!("ip -n {c} addr add {net}2/{length} dev eth0 {nodad}"));
        common::run(&format!("ip -n {c} route add default via {net}1"));
    }
    common::run(&format!("ip -n {s} route add 172.30.0.0/24 via 10.9.0.1"));
    common::run(&format!("ip -n {s} route add fd30::/64 via fd09::1"));
    host.run("sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1");
    container
}

/// The plan of a host with its links as they are.
fn plan_with_links(host: &Namespace, rest: &str, metadata_lock: bool) -> Ruleset {
    let links = host.enter(|| links::read().unwrap());
    ruleset(Inputs {
        spec: Some(&spec(rest)),
        internal: &internal(&links, &LinkSettings::default()),
        metadata_lock,
        ..Inputs::default()
    })
}

/// Puts a plan in place, and reads it back.
fn put(host: &Namespace, plan: &Ruleset) {
    host.enter(|| {
        let mut nftables = Nftables::open().unwrap();
        nftables.replace(plan).unwrap();
        assert_eq!(held(&mut nftables).as_ref(), Some(plan));
    });
}

/// moby#22054: a published port is decided by the port that the outside dials, before DNAT, and no
/// rule is for the container's own address.
#[test]
fn a_published_port_is_shut_unless_its_outside_port_is_named() {
    let (host, stranger) = host_and_stranger();
    let container = container(&host, &stranger);
    let rules = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(
        rules.path(),
        "table inet nat { chain pre { type nat hook prerouting priority -100;
         tcp dport 8080 dnat ip to 172.30.0.2:80 ; tcp dport 8080 dnat ip6 to [fd30::2]:80 ; }; }",
    )
    .unwrap();
    host.run(&format!("nft -f {}", rules.path().display()));
    let _listener = container.enter(|| TcpListener::bind("[::]:80").unwrap());
    // What `explain --to` asks.
    for (address, interface) in [
        ("172.30.0.2", Some("br-x")),
        ("fd30::2", Some("br-x")),
        ("172.30.0.1", None),
        ("fd30::1", None),
        ("10.9.0.2", Some("eth0")),
        ("203.0.113.1", None),
    ] {
        let found = host.enter(|| links::forwarded_to(address.parse().unwrap()).unwrap());
        assert_eq!(found.as_deref(), interface, "{address}");
    }
    let published = ["10.9.0.1:8080", "[fd09::1]:8080"];
    let routed = ["172.30.0.2:80", "[fd30::2]:80"];
    for address in published.iter().chain(&routed) {
        stranger.until_reaches(address);
    }
    let rule = |port: u16| {
        format!(r#","firewall":{{"ingress":[{{"id":"r","protocol":"tcp","from_port":{port}}}]}}"#)
    };
    // Port 80 is the container's; the outside dials 8080.
    for (rest, open) in [(String::new(), false), (rule(80), false), (rule(8080), true)] {
        put(&host, &plan_with_links(&host, &rest, false));
        for address in published {
            assert_eq!(stranger.reaches(address), open, "{address}, {rest}");
        }
        for address in routed {
            assert!(!stranger.reaches(address), "{address}, {rest}");
        }
    }
    // Containers still get out, and the host to them.
    let _outside = stranger.enter(|| TcpListener::bind("[::]:99").unwrap());
    assert!(container.reaches("10.9.0.2:99") && container.reaches("[fd09::2]:99"));
    assert!(host.reaches(routed[0]) && host.reaches(routed[1]));
}

/// Containers are refused at once; the host, name look-ups and other addresses are not.
#[test]
fn the_metadata_lock_refuses_containers_and_not_the_host() {
    let (host, outside) = host_and_stranger();
    let container = container(&host, &outside);
    for address in metadata::ADDRESSES {
        let gateway = if address.is_ipv4() { "10.9.0.2" } else { "fd09::2" };
        common::run(&format!("ip -n {} addr add {address} dev lo", outside.name()));
        common::run(&format!(
            "ip -n {} route add {address} via {gateway}",
            host.name()
        ));
    }
    let _listeners = outside.enter(|| ["[::]:80", "[::]:53"].map(|on| TcpListener::bind(on).unwrap()));
    for address in metadata::ADDRESSES {
        let to = SocketAddr::new(address, 80).to_string();
        container.until_reaches(&to);
        host.until_reaches(&to);
    }
    let dial = |from: &Namespace, port: u16| {
        let refused = |address| {
            let to = SocketAddr::new(address, port);
            let limit = Duration::from_secs(2);
            from.enter(move || {
                TcpStream::connect_timeout(&to, limit)
                    .err()
                    .map(|error| error.kind())
            })
        };
        metadata::ADDRESSES.map(refused)
    };
    for (lock, answer) in [(false, None), (true, Some(ErrorKind::ConnectionRefused))] {
        put(&host, &plan_with_links(&host, "", lock));
        assert_eq!(dial(&container, 80), [answer; metadata::ADDRESSES.len()]);
        assert_eq!(dial(&container, 53), [None; metadata::ADDRESSES.len()], "names");
        assert_eq!(dial(&host, 80), [None; metadata::ADDRESSES.len()], "the host");
        assert!(container.reaches("10.9.0.2:80") && container.reaches("[fd09::2]:80"));
    }
    let listing = host.run("nft list table inet portcullis");
    for expected in [
        "iifname @internal ip daddr 169.254.169.254",
        "iifname @internal ip6 daddr fd00:ec2::254",
        "reject comment \"metadata lock\"",
    ] {
        assert!(listing.contains(expected), "{expected} is not in\n{listing}");
    }
}

/// CVE-2020-8558: with route_localnet, packets from outside could reach services on 127.0.0.1.
#[test]
fn loopback_addresses_from_outside_are_dropped() {
    let (host, stranger) = host_and_stranger();
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
        stranger.reaches("127.0.0.1:6379"),
        "the attack works without the gate"
    );
    let open = planned(r#","firewall":{"ingress":[{"id":"r","protocol":"tcp","from_port":6379}]}"#);
    host.enter(|| Nftables::open().unwrap().replace(&open).unwrap());
    assert!(
        !stranger.reaches("127.0.0.1:6379"),
        "and not with it, even where a rule opens the port"
    );
}

#[test]
fn an_uplink_is_known_by_its_routes_and_a_bridge_by_its_ports() {
    let (host, _stranger) = host_and_stranger();
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

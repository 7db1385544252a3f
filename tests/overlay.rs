//! Why an overlay is filtered like an uplink: whoever forges a peer's address outside speaks freely inside.
//!
//! May not live here: which links are internal otherwise (`tests/gate.rs`).
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::net::TcpListener;

use common::{Namespace, run};
use portcullis::policy::firewall::{Inputs, ruleset};
use portcullis::policy::links::{LinkSettings, internal};
use portcullis::system::links;
use portcullis::system::nftables::Nftables;
use portcullis_protocol::Spec;

const PEER: &str = r#"{"version":1,"generation":1,"instance":{"id":"i"},
    "cluster":{"id":"c","peers":[{"instance":"p","addresses":["10.9.0.2"]}]}}"#;

/// Hardware addresses of the overlay's ends, as a node's agent tells them to the others.
const HOST_MAC: &str = "02:aa:00:00:00:01";
const PEER_MAC: &str = "02:aa:00:00:00:02";

/// A host, a peer and a stranger on one link.
struct World {
    host: Namespace,
    peer: Namespace,
    stranger: Namespace,
    _wire: Namespace,
}

fn world() -> World {
    let wire = Namespace::new("wire");
    run(&format!("ip -n {} link add br0 type bridge", wire.name()));
    run(&format!("ip -n {} link set br0 up", wire.name()));
    let [host, peer, stranger] = [("host", 1), ("peer", 2), ("stranger", 9)].map(|(label, number)| {
        let one = Namespace::new(label);
        one.connect("eth0", &wire, label);
        run(&format!("ip -n {} link set {label} master br0", wire.name()));
        run(&format!(
            "ip -n {} addr add 10.9.0.{number}/24 dev eth0",
            one.name()
        ));
        one
    });
    for (own, own_number, own_mac, other, other_mac) in [
        (&host, 1, HOST_MAC, 2, PEER_MAC),
        (&peer, 2, PEER_MAC, 1, HOST_MAC),
    ] {
        let ip = |rest: &str| run(&format!("ip -n {} {rest}", own.name()));
        // As flannel makes it.
        ip(&format!(
            "link add flannel.1 address {own_mac} type vxlan id 1 local 10.9.0.{own_number} dstport 8472 nolearning"
        ));
        ip(&format!("addr add 10.244.{own_number}.0/32 dev flannel.1"));
        ip("link set flannel.1 up");
        ip(&format!(
            "neigh add 10.244.{other}.0 lladdr {other_mac} dev flannel.1"
        ));
        ip(&format!(
            "route add 10.244.{other}.0/24 via 10.244.{other}.0 dev flannel.1 onlink"
        ));
        run(&format!(
            "bridge -n {} fdb append {other_mac} dst 10.9.0.{other} dev flannel.1",
            own.name()
        ));
    }
    // What a new namespace has of it is the machine's setting.
    host.run("sysctl -qw net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.eth0.rp_filter=0 net.ipv4.conf.flannel/1.rp_filter=0");
    World {
        host,
        peer,
        stranger,
        _wire: wire,
    }
}

impl World {
    /// The stranger sends into the overlay with this outer source, and from its own address inside.
    fn stranger_sends_as(&self, outer: &str) {
        let ip = |rest: &str| run(&format!("ip -n {} {rest}", self.stranger.name()));
        // It forges the peer's address and does not take it over.
        self.stranger
            .run("sysctl -qw net.ipv4.conf.all.arp_ignore=1 net.ipv4.conf.all.arp_announce=2");
        ip(&format!("addr replace {outer}/32 dev lo"));
        ip(&format!(
            "link add vx type vxlan id 1 local {outer} remote 10.9.0.1 dstport 8472"
        ));
        ip("link set vx up");
        ip(&format!("neigh add 10.244.1.0 lladdr {HOST_MAC} dev vx"));
        ip("route add 10.244.1.0/32 dev vx src 10.9.0.9");
    }

    /// The plan of the host with its links as they are.
    fn shut(&self, settings: &LinkSettings) {
        let spec = Spec::from_json(PEER.as_bytes()).unwrap();
        self.host.enter(|| {
            let internal = internal(&links::read().unwrap(), settings);
            let plan = ruleset(Inputs {
                spec: Some(&spec),
                internal: &internal,
                ..Inputs::default()
            });
            Nftables::open().unwrap().replace(&plan).unwrap();
        });
    }
}

const INSIDE: &str = "10.244.1.0:4711";

#[test]
fn an_overlay_is_filtered_because_outer_addresses_can_be_forged() {
    let world = world();
    let _listener = world.host.enter(|| TcpListener::bind("0.0.0.0:4711").unwrap());
    world.stranger_sends_as("10.9.0.2");
    world.peer.until_reaches(INSIDE);
    world.stranger.until_reaches(INSIDE);
    // Were the overlay trusted, the stranger would have a session with a port that no rule opens.
    world.shut(&LinkSettings {
        trusted: ["flannel.1".to_owned()].into(),
        ..LinkSettings::default()
    });
    world.peer.until_reaches(INSIDE);
    world.stranger.until_reaches(INSIDE);
    world.shut(&LinkSettings::default());
    assert!(!world.stranger.reaches(INSIDE));
    // The price: a peer is let in by the address that is its own, and not by its overlay's.
    assert!(world.peer.reaches("10.9.0.1:4711") && !world.peer.reaches(INSIDE));
}

/// Without a forged source the outer packets themselves are dropped, also where the overlay is trusted.
#[test]
fn a_trusted_overlay_takes_packets_from_peers_only() {
    let world = world();
    let _listener = world.host.enter(|| TcpListener::bind("0.0.0.0:4711").unwrap());
    world.stranger_sends_as("10.9.0.9");
    world.stranger.until_reaches(INSIDE);
    world.shut(&LinkSettings {
        trusted: ["flannel.1".to_owned()].into(),
        ..LinkSettings::default()
    });
    world.peer.until_reaches(INSIDE);
    assert!(!world.stranger.reaches(INSIDE));
}

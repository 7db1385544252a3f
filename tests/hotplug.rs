//! Links that come, change and go while the daemon runs.
//!
//! May not live here: which links are internal (`policy::links` and its tests).
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use common::daemon::Daemon;
use common::knock::{CLOSED, counters, while_knocking, witness};
use common::{Namespace, eventually};

const SOON: Duration = Duration::from_secs(10);
const HARDWARE: &str = "02:00:00:00:05:01";

fn addresses(last: u8) -> [IpAddr; 2] {
    [format!("10.5.0.{last}"), format!("fd05::{last}")].map(|address| address.parse().unwrap())
}

/// `ip` inside a namespace.
fn ip(namespace: &Namespace, rest: &str) -> String {
    common::run(&format!("ip -n {} {rest}", namespace.name()))
}

/// Waits until so many more packets came since the witness was last asked, and gives those that passed.
fn until_more_arrived(host: &Namespace, what: &str) -> u64 {
    let count = || {
        let counter = counters(&host.run("nft -j list counters table inet witness"));
        ["arrived", "passed"]
            .map(|point| ["ipv4", "ipv6"].map(|family| counter(&format!("{point}_closed_{family}"))))
    };
    let [before, _] = count();
    eventually(SOON, what, || {
        let [now, passed] = count();
        let more = [0, 1].map(|family| now[family] - before[family]);
        if more.iter().all(|more| *more >= 50) {
            Ok(passed.iter().sum())
        } else {
            Err(more)
        }
    })
}

/// A switch with a stranger on it who knows the host's addresses before the host has them.
fn stranger_on_a_switch() -> (Namespace, Namespace) {
    let (switch, stranger) = (Namespace::new("switch"), Namespace::new("stranger"));
    ip(&switch, "link add br0 type bridge");
    ip(&switch, "link set br0 up");
    switch.connect("s", &stranger, "eth0");
    ip(&switch, "link set s master br0");
    for (own, host) in addresses(2).into_iter().zip(addresses(1)) {
        let length = if own.is_ipv4() { "24" } else { "64 nodad" };
        let (address, length) = (own, length.replacen(' ', " dev eth0 ", 1));
        let device = if own.is_ipv4() { " dev eth0" } else { "" };
        ip(&stranger, &format!("addr add {address}/{length}{device}"));
        ip(
            &stranger,
            &format!("neigh replace {host} lladdr {HARDWARE} dev eth0 nud permanent"),
        );
    }
    (switch, stranger)
}

#[test]
fn a_plugged_link_is_filtered_from_its_first_packet() {
    let host = Namespace::new("host");
    let (switch, stranger) = stranger_on_a_switch();
    let daemon = Daemon::start(&host);
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), witness()).unwrap();
    host.run(&format!("nft -f {}", file.path().display()));
    let enter = |knock: &(dyn Fn() -> u16 + Sync)| stranger.enter(knock);
    while_knocking(enter, addresses(2), addresses(1), || {
        ip(
            &host,
            &format!(
                "link add eth1 address {HARDWARE} type veth peer name p netns {}",
                switch.name()
            ),
        );
        ip(&switch, "link set p master br0 up");
        ip(&host, "link set eth1 up");
        assert_eq!(
            until_more_arrived(&host, "knocks on a link without an address"),
            0
        );
        ip(&host, "addr add 10.5.0.1/24 dev eth1");
        ip(&host, "addr add fd05::1/64 dev eth1 nodad");
        assert_eq!(until_more_arrived(&host, "knocks on a link with addresses"), 0);
        ip(&host, "route add default via 10.5.0.2");
        ip(&host, "route add default via fd05::2");
        assert_eq!(until_more_arrived(&host, "knocks on an uplink"), 0);
        // A route to one host, as a routed pod has it: with an address it is none.
        ip(&host, "route add 10.5.0.2/32 dev eth1");
        assert_eq!(
            until_more_arrived(&host, "knocks on an uplink with a host route"),
            0
        );

        // The positive control: they pass once nobody holds the table.
        drop(daemon);
        host.run("nft delete table inet portcullis");
        let passed = until_more_arrived(&host, "knocks without the gate");
        assert!(passed >= 100, "{passed}");
    });
}

/// Whether the container gets a connection to the host.
fn reaches(container: &Namespace) -> bool {
    let host = SocketAddr::new("10.6.0.1".parse().unwrap(), CLOSED);
    container.enter(|| TcpStream::connect_timeout(&host, Duration::from_millis(300)).is_ok())
}

/// Waits until the bridge is in the set of internal links, or is not; and connections obey.
#[track_caller]
fn becomes(host: &Namespace, container: &Namespace, internal: bool, because: &str) {
    let start = Instant::now();
    eventually(SOON, because, || {
        let set = host.run("nft list set inet portcullis internal");
        if set.contains("\"br-c\"") == internal {
            Ok(())
        } else {
            Err(set)
        }
    });
    println!("{because}: after {:?}", start.elapsed());
    assert_eq!(reaches(container), internal, "{because}");
}

#[test]
fn a_bridge_is_internal_as_long_as_its_ports_are() {
    let (host, container) = (Namespace::new("host"), Namespace::new("container"));
    let _daemon = Daemon::start(&host);
    let _listener = host.enter(|| TcpListener::bind(("0.0.0.0", CLOSED)).unwrap());
    // A hardware address of its own: it would take its ports', and the container would not know it.
    ip(&host, "link add br-c address 02:00:00:00:06:01 type bridge");
    host.connect("c0", &container, "eth0");
    ip(&host, "addr add 10.6.0.1/24 dev br-c");
    ip(&host, "link set br-c up");
    ip(&container, "addr add 10.6.0.2/24 dev eth0");
    ip(&host, "link set c0 master br-c");
    becomes(&host, &container, true, "a bridge for containers");

    ip(&host, "link add other type vxlan id 5 dstport 4789");
    ip(&host, "link set other master br-c up");
    becomes(&host, &container, false, "a port that may lead anywhere");
    ip(&host, "link set other nomaster");
    becomes(&host, &container, true, "that port gone");

    ip(&host, "route add default via 10.6.0.2");
    becomes(&host, &container, false, "a default route over it");
    ip(&host, "route del default");
    becomes(&host, &container, true, "that route gone");

    // The container's own link is filtered as soon as it is no port, whatever the bridge is.
    ip(&host, "link set c0 nomaster");
    ip(&host, "addr del 10.6.0.1/24 dev br-c");
    ip(&host, "addr add 10.6.0.1/24 dev c0");
    assert!(!reaches(&container), "a veth that is no port is not internal");
}

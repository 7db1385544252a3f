//! What a stranger reaches beside a real Docker that publishes a port which no rule names.
//!
//! May not live here: boots (`power_on`).

use std::net::{IpAddr, SocketAddr};

use portcullis_figures::{Better, Cell, Column, Plot, Table, Unit};
use portcullis_provision::local::Outsider;
use portcullis_provision::reach::{Reached, Target, Transport, measure};

use crate::lab::{Machine, READY_TIME, Run, eventually, inside, vantage};
use crate::site::{CLOSED, Gate, Site};

const PACKAGES: [&str; 2] = ["docker.io", "busybox-static"];
/// Published by Docker, named by no rule.
const PUBLISHED: u16 = 8081;
/// Where the container listens.
const INNER: u16 = 80;

/// IPv6 is off in Docker unless it is asked for; its storage is on an instance whose disk is an overlay.
const START: &str = r#"set -e; mkdir -p /etc/docker
echo '{"ipv6": true, "fixed-cidr-v6": "fd00:d0c::/64", "experimental": true, "ip6tables": true}' > /etc/docker/daemon.json
systemctl restart docker
mkdir -p /tmp/image/bin; cp /bin/busybox /tmp/image/bin
tar -C /tmp/image -cf /tmp/image.tar .; docker import /tmp/image.tar server:latest
docker network create --ipv6 --subnet 172.28.0.0/24 --subnet fd00:28::/64 dual
docker run -d --restart always --stop-signal KILL --name web --network dual -p 8081:80 \
    server:latest /bin/busybox httpd -f -p 80"#;

pub fn run(site: &mut Site) -> Table {
    let stranger = site.lab.stranger();
    let rows = Gate::ALL.map(|gate| gate.row(counts(site, &stranger, gate)));
    let count = |name| Column::of(name, Unit::Count, Better::Less);
    Table {
        title: "What a stranger reaches and no rule names".to_owned(),
        method: "Of six addresses, over TCP: a program on the host, a port that Docker publishes, and the container itself by a \
                 route to its network, each over IPv4 and IPv6. Docker runs with IPv6. The table by hand is at \
                 the same place of the packet's way as the gate. A flush is `nft flush ruleset`, by another program, and nothing is \
                 done about it by hand. firewalld's reload takes Docker's own rules along, and what is published may not answer then."
            .to_owned(),
        columns: vec![
            count("when it is ready"),
            count("Docker restarted"),
            count("applied again"),
            count("flushed"),
        ],
        rows: rows.into(),
        plot: Plot::None,
    }
}

fn counts(site: &Site, stranger: &Outsider, gate: Gate) -> Vec<Cell> {
    let machine = site.launch(gate, &PACKAGES);
    machine.ok(START);
    let inner = container(&machine);
    for address in &inner {
        let net = if address.is_ipv4() {
            "172.28.0.0/24"
        } else {
            "fd00:28::/64"
        };
        let gateway = machine.instance.addresses()[usize::from(address.is_ipv6())];
        inside(&stranger.path(), "ip")
            .args(["route", "replace", net, "via", &gateway.to_string()])
            .succeed();
    }
    let outer = machine.instance.addresses();
    let mut targets: Vec<SocketAddr> = outer.iter().map(|ip| SocketAddr::new(*ip, CLOSED)).collect();
    targets.extend(outer.iter().map(|ip| SocketAddr::new(*ip, PUBLISHED)));
    targets.extend(inner.iter().map(|ip| SocketAddr::new(*ip, INNER)));
    let counts = [
        "true",
        "systemctl restart docker",
        gate.again(),
        "nft flush ruleset",
    ]
    .map(|step| {
        machine.ok(step);
        serves(&machine);
        Cell::one(reached(stranger, &targets) as f64)
    });
    site.end();
    counts.into()
}

/// The container's addresses.
fn container(machine: &Machine) -> Vec<IpAddr> {
    let template = "{{range .NetworkSettings.Networks}}{{.IPAddress}} {{.GlobalIPv6Address}}{{end}}";
    let said = machine.ok(&format!("docker inspect -f '{template}' web"));
    let addresses: Vec<IpAddr> = said
        .split_whitespace()
        .map(|word| word.parse().unwrap())
        .collect();
    assert_eq!(addresses.len(), 2, "IPv4 and IPv6");
    addresses
}

/// All of them answer inside, so that what a stranger does not reach was shut.
fn serves(machine: &Machine) {
    let script = format!(
        "set -e; ncat -z -w 2 ::1 {CLOSED}
         for ip in $(docker inspect -f '{{{{range .NetworkSettings.Networks}}}}{{{{.IPAddress}}}} {{{{.GlobalIPv6Address}}}}{{{{end}}}}' web)
         do ncat -z -w 2 $ip {INNER}; done"
    );
    eventually(READY_TIME, "everything listens", || {
        let said = machine.run(&script);
        if said.success() { Ok(()) } else { Err(said) }
    });
}

fn reached(stranger: &Outsider, targets: &[SocketAddr]) -> usize {
    let tcp = |address: &SocketAddr| Target {
        transport: Transport::Tcp,
        address: *address,
    };
    let probes: Vec<_> = targets
        .iter()
        .map(|address| (vantage(stranger), tcp(address)))
        .collect();
    let seen = measure(&probes).unwrap();
    seen.iter().filter(|seen| **seen == Reached::Open).count()
}

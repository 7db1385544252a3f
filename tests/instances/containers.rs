//! Real container engines: what they publish, what they do to the packet filter, and what their
//! containers need.
//!
//! May not live here: kinds of links (`policy::links`), single rules (`tests/gate.rs`).

use std::net::{IpAddr, SocketAddr};

use portcullis_provision::local::Outsider;
use portcullis_provision::reach::{Listener, Reached, Target, Transport, measure};
use serde_json::Value;

use crate::lab::{Lab, Machine, Run, SOON, allow, eventually, inside, vantage};

use Reached::{Filtered, Open};

/// An engine, and what differs between engines.
struct Engine {
    program: &'static str,
    packages: &'static [&'static str],
    /// Before anything of it is used: IPv6, and storage on an instance whose disk is an overlay.
    settings: &'static str,
    /// Makes all its rules anew.
    restart: &'static str,
}

const DOCKER: Engine = Engine {
    program: "docker",
    packages: &["docker.io", "busybox-static"],
    settings: r#"mkdir -p /etc/docker
        echo '{"ipv6": true, "fixed-cidr-v6": "fd00:d0c::/64", "experimental": true, "ip6tables": true}' \
            > /etc/docker/daemon.json
        systemctl restart docker"#,
    restart: "systemctl restart docker",
};

const PODMAN: Engine = Engine {
    program: "podman",
    packages: &["podman", "runc", "netavark", "iptables", "busybox-static"],
    settings: r#"mkdir -p /etc/containers
        cat > /etc/containers/storage.conf <<'END'
[storage]
driver = "vfs"
runroot = "/run/containers/storage"
graphroot = "/var/lib/containers/storage"
END
        printf '[containers]\npids_limit = 0\n' > /etc/containers/containers.conf"#,
    restart: "podman network reload --all",
};

/// The port that all of them serve.
const INNER: u16 = 80;

/// Names, networks and what is published. `dual` is a network of IPv4 and IPv6 with any engine.
const CONTAINERS: [(&str, &str, &str); 4] = [
    ("web", "--network dual", "-p 8080:80"),
    ("near-web", "--network dual", ""),
    ("plain", "", "-p 8081:80"),
    ("local", "", "-p 127.0.0.1:8090:80"),
];

/// Where containers' addresses are.
const CONTAINER_NETS: [&str; 4] = ["172.16.0.0/12", "10.88.0.0/16", "fd00:d0c::/64", "fd00:28::/64"];

/// An instance with an engine and containers, and a stranger with routes to them.
struct World {
    machine: Machine,
    stranger: Outsider,
    engine: Engine,
    _lab: Lab,
}

impl World {
    fn new(engine: Engine) -> Self {
        let lab = Lab::new();
        let mut request = lab.request("one", "c-1");
        request.image.packages = engine.packages.iter().map(|name| (*name).to_owned()).collect();
        let machine = lab.launch_many(&[request]).remove(0);
        let stranger = lab.stranger();
        for net in CONTAINER_NETS {
            let gateway = machine.instance.addresses()[usize::from(net.contains(':'))];
            let mut ip = inside(&stranger.path(), "ip");
            ip.args(["route", "add", net, "via", &gateway.to_string()])
                .succeed();
        }
        let world = Self {
            machine,
            stranger,
            engine,
            _lab: lab,
        };
        world.start_containers();
        world
    }

    fn start_containers(&self) {
        let Engine {
            program, settings, ..
        } = self.engine;
        self.machine.ok(&format!(
            "set -e; {settings}
             mkdir -p /tmp/image/bin; cp /bin/busybox /tmp/image/bin
             tar -C /tmp/image -cf /tmp/image.tar .; {program} import /tmp/image.tar server:latest
             {program} network create --ipv6 --subnet 172.28.0.0/24 --subnet fd00:28::/64 dual"
        ));
        for (name, network, published) in CONTAINERS {
            self.machine.ok(&format!(
                "{program} run -d --restart always --stop-signal KILL --name {name} {network} {published} \
                 server:latest /bin/busybox httpd -f -p {INNER}"
            ));
        }
        assert_eq!(self.addresses("web").len(), 2, "IPv4 and IPv6");
    }

    /// The addresses that the engine gave to a container.
    fn addresses(&self, container: &str) -> Vec<IpAddr> {
        let template = "{{range .NetworkSettings.Networks}}{{.IPAddress}} {{.GlobalIPv6Address}}{{end}}";
        let program = self.engine.program;
        let said = self
            .machine
            .ok(&format!("{program} inspect -f '{template}' {container}"));
        let addresses: Vec<IpAddr> = said
            .split_whitespace()
            .map(|word| word.parse().unwrap())
            .collect();
        assert!(!addresses.is_empty(), "{container} has no address");
        addresses
    }

    /// The host's addresses with a published port, of the families that the container has.
    fn published(&self, container: &str, port: u16) -> Vec<SocketAddr> {
        let inner = self.addresses(container);
        let addresses = self.machine.instance.addresses().into_iter();
        let both = addresses.filter(|ip| inner.iter().any(|own| own.is_ipv4() == ip.is_ipv4()));
        both.map(|ip| SocketAddr::new(ip, port)).collect()
    }

    /// The containers' own addresses, which the stranger has a route to.
    fn routed(&self, containers: &[&str]) -> Vec<SocketAddr> {
        let addresses = containers.iter().flat_map(|name| self.addresses(name));
        addresses.map(|ip| SocketAddr::new(ip, INNER)).collect()
    }

    fn seen(&self, addresses: &[SocketAddr]) -> Vec<Reached> {
        assert!(!addresses.is_empty());
        let tcp = |address: &SocketAddr| Target {
            transport: Transport::Tcp,
            address: *address,
        };
        let probes = addresses
            .iter()
            .map(|address| (vantage(&self.stranger), tcp(address)));
        measure(&probes.collect::<Vec<_>>()).unwrap()
    }

    /// The stranger gets at none of them.
    #[track_caller]
    fn shut(&self, addresses: &[SocketAddr]) {
        assert_eq!(
            self.seen(addresses),
            vec![Filtered; addresses.len()],
            "{addresses:?}"
        );
    }

    /// The stranger gets at all of them, once the engine has started them.
    #[track_caller]
    fn open(&self, addresses: &[SocketAddr]) {
        let wanted = vec![Open; addresses.len()];
        eventually(SOON, &format!("{addresses:?} are open"), || {
            let seen = self.seen(addresses);
            if seen == wanted { Ok(()) } else { Err(seen) }
        });
    }

    /// SSH and these are let in.
    fn rules(&mut self, more: &[&str]) {
        let rules = ["22/tcp"].iter().chain(more).map(|text| allow(text)).collect();
        self.machine.push(|spec| spec.firewall.ingress = rules);
    }

    /// The positive control, and the agent started after the engine.
    fn without_gate(&self, look: impl FnOnce()) {
        self.machine
            .ok("systemctl stop portcullis && nft delete table inet portcullis");
        look();
        self.machine.ok("systemctl start portcullis");
        self.machine.until_ready();
    }

    /// What `portcullis firewall exposure` says of a TCP port.
    fn exposure(&self, port: u16) -> Value {
        let said = self.machine.ok("portcullis firewall exposure --format json");
        let table: Value = serde_json::from_str(&said).unwrap();
        let all = table["exposure"]["listeners"].as_array().unwrap();
        let rows: Vec<&Value> = all
            .iter()
            .filter(|row| row["protocol"] == "tcp" && row["port"] == port)
            .collect();
        assert_eq!(rows.len(), 1, "{port}: {said}");
        rows[0].clone()
    }

    /// Whether a connection from inside the container comes about.
    fn reaches(&self, container: &str, to: SocketAddr) -> Result<(), String> {
        let program = self.engine.program;
        let (ip, port) = (to.ip(), to.port());
        let said = self.machine.run(&format!(
            "{program} exec {container} /bin/busybox nc -w 3 {ip} {port}"
        ));
        if said.success() {
            Ok(())
        } else {
            Err(format!("{said:?}"))
        }
    }
}

const ALL: [&str; 4] = ["web", "near-web", "plain", "local"];

#[test]
fn what_docker_publishes_is_shut_unless_a_rule_names_the_outside_port() {
    tried_with(DOCKER);
}

#[test]
fn what_podman_publishes_is_shut_unless_a_rule_names_the_outside_port() {
    tried_with(PODMAN);
}

fn tried_with(engine: Engine) {
    let mut world = World::new(engine);
    rules_name_ports_of_the_host(&mut world);
    containers_reach_what_they_need(&world);
    the_engines_own_rules_do_not_matter(&mut world);
}

/// moby#22054 and moby#52224.
fn rules_name_ports_of_the_host(world: &mut World) {
    let (web, plain) = (world.published("web", 8080), world.published("plain", 8081));
    let routed = world.routed(&ALL);
    let all = [web.clone(), plain.clone(), routed.clone()].concat();
    world.shut(&all);
    world.without_gate(|| {
        // Docker lets in to containers' addresses what is published; Podman, everything.
        world.open(&[web.clone(), plain.clone(), world.routed(&["web", "plain"])].concat());
    });
    world.shut(&all);
    world.rules(&["80/tcp"]);
    world.shut(&all);
    world.rules(&["8080/tcp"]);
    world.open(&web);
    world.shut(&[plain, routed].concat());
    // The table says the same, with a proxy that holds the port and without.
    for (port, reach) in [(8080, "anybody"), (8081, "nobody"), (8090, "loopback")] {
        let row = world.exposure(port);
        assert_eq!(row["reach"], reach, "{port}: {row}");
        if port != 8090 {
            let inner = world.addresses(if port == 8080 { "web" } else { "plain" })[0];
            let to = row["published_to"].to_string();
            assert!(to.contains(&format!("{inner}:{INNER}")), "{row}");
        }
    }
    world.rules(&[]);
    world.shut(&all);
}

fn containers_reach_what_they_need(world: &World) {
    let _outside = Listener::new(world.stranger.path(), 8443).unwrap();
    for (container, near) in [("web", "near-web"), ("plain", "local")] {
        let own = world.addresses(container);
        let outside = world.stranger.addresses().into_iter();
        let outside = outside.filter(|ip| own.iter().any(|own| own.is_ipv4() == ip.is_ipv4()));
        let outside = outside.map(|ip| SocketAddr::new(ip, 8443));
        for to in outside.chain(world.routed(&[near])) {
            eventually(SOON, &format!("{container} reaches {to}"), || {
                world.reaches(container, to)
            });
        }
    }
    for to in world.routed(&ALL) {
        world.machine.ok(&format!("ncat -z -w 3 {} {INNER}", to.ip()));
    }
}

/// CVE-2025-54388: a reload of another program took Docker's rules away.
fn the_engines_own_rules_do_not_matter(world: &mut World) {
    let on_loopback = world.published("local", 8090);
    let shut = [world.published("web", 8080), on_loopback, world.routed(&ALL)].concat();
    let forget = "nft list tables | grep -v portcullis | while read -r _ family name
        do nft delete table \"$family\" \"$name\"; done; nft list tables";
    assert_eq!(world.machine.ok(forget), "table inet portcullis");
    world.shut(&shut);
    world.without_gate(|| world.open(&world.routed(&ALL)));
    world.shut(&shut);
    world.machine.ok(world.engine.restart);
    world.shut(&shut);
    world.rules(&["8080/tcp"]);
    world.open(&world.published("web", 8080));
    world.shut(&[world.published("plain", 8081), world.routed(&ALL)].concat());
}

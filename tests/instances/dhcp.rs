//! Addresses by DHCP while the gate is shut: a second link of an instance, its own client
//! (systemd-networkd), real servers, leases of seconds.
//!
//! May not live here: replies that no client of today depends on (tests/packets.rs).

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::Value;

use crate::common::Namespace;
use crate::lab::{Lab, Machine, Run, eventually, inside};

/// A lease is renewed after 2 s, by whoever answers after 4 s, and over after 8 s.
const LEASE: Duration = Duration::from_secs(8);

/// DHCP servers of both families on one link; they end with their test.
struct Servers {
    processes: Vec<Child>,
    folder: PathBuf,
}

impl Servers {
    fn start(lab: &Lab, network: &Namespace, link: &str) -> Self {
        let folder = lab.path(link);
        fs::create_dir(&folder).unwrap();
        // A copy, since distributions confine the original to its own files.
        let program = folder.join("dhcpd");
        fs::copy("/usr/sbin/dhcpd", &program).expect("isc-dhcp-server is installed by packaging/setup");
        let times = "default-lease-time 8; max-lease-time 8; min-lease-time 8;
            option dhcp-renewal-time 2; option dhcp-rebinding-time 4;";
        let configurations = [
            (
                "-4",
                format!(
                    "authoritative; {times} subnet 10.5.0.0 netmask 255.255.255.0 {{ range 10.5.0.100 10.5.0.120; }}"
                ),
            ),
            (
                "-6",
                format!(
                    "authoritative; {times} preferred-lifetime 6; subnet6 fd05::/64 {{ range6 fd05::100 fd05::120; }}"
                ),
            ),
        ];
        let start = |(family, text): (&str, String)| {
            let file = |name: &str| folder.join(format!("{name}{family}"));
            fs::write(file("conf"), text).unwrap();
            fs::write(file("leases"), "").unwrap();
            let mut server = Command::new("ip");
            server.args(["netns", "exec", network.name()]).arg(&program);
            server
                .args(["-f", "-q", "--no-pid", family, "-cf"])
                .arg(file("conf"))
                .arg("-lf")
                .arg(file("leases"))
                .arg(link);
            let log = fs::File::create(file("log")).unwrap();
            server.stdin(Stdio::null()).stderr(log).spawn().unwrap()
        };
        let processes = configurations.map(start).into();
        Self { processes, folder }
    }

    /// What they said; for a test that fails.
    fn log(&self) -> String {
        ["-4", "-6"]
            .map(|family| fs::read_to_string(self.folder.join(format!("log{family}"))).unwrap())
            .concat()
    }
}

impl Drop for Servers {
    fn drop(&mut self) {
        for process in &mut self.processes {
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

/// Seconds for which the leased addresses are still good, IPv4 and IPv6.
fn left(machine: &Machine) -> [Option<u64>; 2] {
    let listing: Value = serde_json::from_str(&machine.ok("ip -j addr show dev eth1")).unwrap();
    let addresses = listing[0]["addr_info"].as_array().unwrap().clone();
    ["10.5.0.1", "fd05::1"].map(|begin| {
        let leased = addresses
            .iter()
            .find(|a| a["local"].as_str().is_some_and(|local| local.starts_with(begin)));
        leased.and_then(|address| address["valid_life_time"].as_u64())
    })
}

/// Waits until the time of both leases went up so many times: each is a renewal that the client got.
fn renewed(machine: &Machine, times: usize, what: &str, servers: &Servers) {
    let mut renewals = [0; 2];
    let mut before = left(machine);
    eventually(LEASE * 4, what, || {
        let now = left(machine);
        for family in [0, 1] {
            assert!(
                now[family].is_some(),
                "{what}: a lease was lost: {now:?}\n{}",
                servers.log()
            );
            renewals[family] += usize::from(now[family] > before[family]);
        }
        before = now;
        if renewals.iter().all(|count| *count >= times) {
            Ok(())
        } else {
            Err((renewals, now))
        }
    });
}

/// A link into the instance, with a place for servers at the other end.
fn plug(machine: &Machine) -> Namespace {
    let network = Namespace::new("lan");
    let ip = |rest: &str| crate::common::run(&format!("ip -n {} {rest}", network.name()));
    ip("link add br0 type bridge");
    ip("link set br0 up");
    for (link, last) in [("one", 2), ("two", 3)] {
        // A server each, with addresses of its own.
        ip(&format!("link add {link} type veth peer name {link}p"));
        ip(&format!("link set {link}p master br0 up"));
        ip(&format!("addr add 10.5.0.{last}/24 dev {link}"));
        ip(&format!("addr add fd05::{last}/64 dev {link} nodad"));
        ip(&format!("link set {link} up"));
    }
    inside(&machine.instance.network_namespace(), "ip")
        .args([
            "link",
            "add",
            "eth1",
            "type",
            "veth",
            "peer",
            "name",
            "p",
            "netns",
            network.name(),
        ])
        .succeed();
    ip("link set dev p master br0 up");
    machine.ok("mkdir -p /run/systemd/network
        printf '[Match]\\nName=eth1\\n[Network]\\nDHCP=yes\\nIPv6AcceptRA=no\\n[DHCPv6]\\nWithoutRA=solicit\\n' \\
            > /run/systemd/network/20-eth1.network
        networkctl reload");
    network
}

#[test]
fn dhcp_gives_and_renews_addresses_while_the_gate_is_shut() {
    let lab = Lab::new();
    let machine = lab.launch();
    let network = plug(&machine);
    let one = Servers::start(&lab, &network, "one");
    let both = |servers: &Servers| {
        eventually(LEASE * 3, "two leases", || match left(&machine) {
            [Some(_), Some(_)] => Ok(()),
            other => Err((other, servers.log())),
        });
    };
    both(&one);
    renewed(&machine, 2, "renewals by the same server", &one);
    // It goes away, and another one answers who asks all.
    drop(one);
    let two = Servers::start(&lab, &network, "two");
    renewed(&machine, 2, "renewals by another server", &two);

    // The control: without the rule no answer to a client that asked all of them gets in.
    machine.ok("systemctl stop portcullis
        rule=$(nft -a list chain inet portcullis gate | sed -n 's/.*\"base dhcpv6\".*handle //p')
        nft delete rule inet portcullis gate handle $rule");
    eventually(LEASE * 3, "the lease is lost", || match left(&machine) {
        [Some(_), None] => Ok(()),
        other => Err(other),
    });
    machine.ok("systemctl start portcullis");
    both(&two);
}

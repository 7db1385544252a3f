//! What `portcullis firewall exposure` says of who gets at what, against who really does: real sockets of
//! every kind, real containers, real connections from a stranger, from a named source and from a peer.
//!
//! May not live here: judging single cases (`policy::exposure`), what the gate lets in (`gate`, `containers`).

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use portcullis_protocol::{CheckId, Status};
use portcullis_provision::local::Outsider;
use portcullis_provision::reach::{Reached, Target, Transport, Vantage, measure};
use serde_json::Value;

use crate::lab::{Lab, Machine, SOON, USER, allow, eventually, vantage};

use Transport::{Tcp, Udp};

/// Kind, address and port; `6only` says that `[::]` hears IPv6 alone. `HOST` is the host's IPv4 address.
const SOCKETS: &str = "tcp,0.0.0.0,7001 tcp,6only,7001 udp,0.0.0.0,7001 udp,6only,7001 tcp,::,7002 udp,::,7002 \
    tcp,6only,7003 tcp,0.0.0.0,7004 tcp,127.0.0.1,7005 tcp,::1,7005 tcp,HOST,7006 tcp,::,7009 udp,::,7009";

/// TCP that accepts and UDP that echoes.
const LISTEN: &str = r#"
import selectors, socket, sys
selector = selectors.DefaultSelector()
for word in sys.argv[1:]:
    kind, address, port = word.split(",")
    only = address == "6only"
    address = "::" if only else address
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    s = socket.socket(family, socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, only)
    s.bind((address, int(port)))
    if kind == "tcp":
        s.listen(64)
    selector.register(s, selectors.EVENT_READ, kind)
while True:
    for key, _ in selector.select():
        if key.data == "tcp":
            key.fileobj.accept()[0].close()
        else:
            data, peer = key.fileobj.recvfrom(2048)
            key.fileobj.sendto(data, peer)
"#;

/// A socket of systemd's own that starts something for each connection.
const ACTIVATED: &str = "set -e
printf '[Socket]\\nListenStream=7008\\nAccept=yes\\n' > /run/systemd/system/activated.socket
printf '[Service]\\nExecStart=/bin/true\\n' > /run/systemd/system/activated@.service
systemctl daemon-reload; systemctl start activated.socket";

/// A unit's socket that others may share.
const SHARED: &str = "set -e
printf '[Socket]\\nListenStream=7014\\nReusePort=yes\\nAccept=yes\\n' > /run/systemd/system/shared.socket
cp /run/systemd/system/activated@.service /run/systemd/system/shared@.service
systemctl daemon-reload; systemctl start shared.socket";

/// Listens in systemd's own control group.
const WITHIN: &str = r#"
import socket, time
open("/sys/fs/cgroup/init.scope/cgroup.procs", "w").write("0")
for port in (7014, 7015):
    s = socket.socket(socket.AF_INET6)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    s.bind(("::", port))
    s.listen()
    globals()[f"s{port}"] = s
time.sleep(600)
"#;

/// A program whose name looks like lines of the table and commands the terminal, started by a user.
const FORGED: &str = "set -e
name=$(printf '/tmp/busybox\\033[2J\\n  22:tcp     sshd (ssh.service)  rule forged')
cp /bin/busybox \"$name\"
systemd-run --quiet --unit=forged --uid=UBUNTU sh -c 'exec \"$0\" httpd -f -p 7007' \"$name\"";

/// Docker with IPv6, one port that is published everywhere and one on loopback.
const DOCKER: &str = r#"set -e; mkdir -p /etc/docker /tmp/image/bin
echo '{"ipv6": true, "fixed-cidr-v6": "fd00:d0c::/64", "experimental": true, "ip6tables": true}' > /etc/docker/daemon.json
systemctl restart docker
cp /bin/busybox /tmp/image/bin; tar -C /tmp/image -cf /tmp/image.tar .; docker import /tmp/image.tar server:latest
docker run -d --stop-signal KILL --name web -p 8080:80 server:latest /bin/busybox httpd -f -p 80
docker run -d --stop-signal KILL --name local -p 127.0.0.1:8090:80 server:latest /bin/busybox httpd -f -p 80
docker run -d --stop-signal KILL --name shut -p 8081:80 server:latest /bin/busybox httpd -f -p 80"#;

/// A port without a socket: another table sends it on.
const REDIRECT: &str = "nft 'table ip other { chain pre { type nat hook prerouting priority -100; \
    tcp dport 7010 redirect to :7001; }; }'";

/// Rules for all but 7007, 7009 and 8081.
const RULES: [&str; 11] = [
    "22/tcp", "7001/tcp", "7001/udp", "7002/tcp", "7002/udp", "7003/tcp", "7005/tcp", "7006/tcp", "7008/tcp",
    "7010/tcp", "8090/tcp",
];

/// All that is asked about.
const PORTS: [(Transport, u16); 17] = [
    (Tcp, 22),
    (Tcp, 7001),
    (Udp, 7001),
    (Tcp, 7002),
    (Udp, 7002),
    (Tcp, 7003),
    (Tcp, 7004),
    (Tcp, 7005),
    (Tcp, 7006),
    (Tcp, 7007),
    (Tcp, 7008),
    (Tcp, 7009),
    (Udp, 7009),
    (Tcp, 7010),
    (Tcp, 8080),
    (Tcp, 8081),
    (Tcp, 8090),
];

/// From where is asked, with the addresses that packets from there have.
struct From {
    vantage: Vantage,
    addresses: [IpAddr; 2],
    is_peer: bool,
}

impl From {
    fn outsider(outsider: &Outsider) -> Self {
        Self {
            vantage: vantage(outsider),
            addresses: outsider.addresses(),
            is_peer: false,
        }
    }
}

struct World {
    machine: Machine,
    from: Vec<From>,
    _named: Outsider,
    _stranger: Outsider,
    _peer: Machine,
    _lab: Lab,
}

impl World {
    fn new() -> Self {
        let lab = Lab::new();
        let mut requests = [lab.request("one", "c-1"), lab.request("two", "c-1")];
        requests[0].image.packages = vec!["docker.io".into(), "busybox-static".into()];
        let mut machines = lab.launch_many(&requests);
        let (peer, mut machine) = (machines.remove(1), machines.remove(0));
        let named = lab.provider.outsider("named").unwrap();
        let stranger = lab.stranger();
        let sockets = SOCKETS.replace("HOST", &machine.v4().to_string());
        machine.ok(&format!(
            "systemd-run --quiet --unit=sockets python3 -c '{LISTEN}' {sockets}"
        ));
        machine.ok(ACTIVATED);
        machine.ok(&FORGED.replace("UBUNTU", USER));
        machine.ok(DOCKER);
        machine.ok(REDIRECT);
        let [v4, v6] = named.addresses();
        machine.push(|spec| {
            spec.firewall.ingress = RULES.map(allow).into();
            for text in [
                format!("7004/tcp@{v4}"),
                format!("7009/tcp@{v6}"),
                "8080/tcp".into(),
            ] {
                spec.firewall.ingress.push(allow(&text));
            }
        });
        let from = vec![
            From::outsider(&stranger),
            From::outsider(&named),
            From {
                vantage: peer.vantage(),
                addresses: peer.instance.addresses(),
                is_peer: true,
            },
        ];
        Self {
            machine,
            from,
            _named: named,
            _stranger: stranger,
            _peer: peer,
            _lab: lab,
        }
    }

    fn table(&self) -> Value {
        let text = self.machine.ok("portcullis firewall exposure --format json");
        serde_json::from_str(&text).unwrap()
    }

    fn rows(table: &Value, transport: Transport, port: u16) -> impl Iterator<Item = &Value> {
        let all = table["exposure"]["listeners"].as_array().unwrap();
        all.iter()
            .filter(move |row| row["protocol"] == transport.to_string() && row["port"] == port)
    }

    /// The one row of a port.
    fn row(table: &Value, transport: Transport, port: u16) -> &Value {
        let rows: Vec<_> = Self::rows(table, transport, port).collect();
        assert_eq!(rows.len(), 1, "{transport} {port}: {rows:#?}");
        rows[0]
    }

    /// Whether the table says that a sender gets at the port, by the words of its rows alone.
    fn says(table: &Value, transport: Transport, port: u16, from: &From, sender: IpAddr) -> bool {
        let family = if sender.is_ipv4() { "ipv4" } else { "ipv6" };
        let grants = Self::rows(table, transport, port).flat_map(|row| row["by"].as_array().unwrap());
        grants
            .filter(|grant| {
                grant["families"]
                    .as_array()
                    .unwrap()
                    .iter()
                    .any(|of| of == family)
            })
            .any(|grant| match grant["who"]["kind"].as_str().unwrap() {
                "anybody" => true,
                "peers" => from.is_peer,
                "sources" => grant["who"]["ranges"].as_array().unwrap().iter().any(|range| {
                    let range = range.as_str().unwrap();
                    let net = range
                        .parse::<IpNet>()
                        .or_else(|_| range.parse::<IpAddr>().map(IpNet::from));
                    net.is_ok_and(|net| net.contains(&sender))
                }),
                other => panic!("{other}: {grant}"),
            })
    }

    /// Each port, from each place, over both IP versions: what is reached, and what the table says.
    fn differences(&self) -> Result<usize, Vec<String>> {
        let table = self.table();
        let (mut probes, mut said) = (Vec::new(), Vec::new());
        for (transport, port) in PORTS {
            for from in &self.from {
                for (to, sender) in self.machine.instance.addresses().into_iter().zip(from.addresses) {
                    let address = SocketAddr::new(to, port);
                    probes.push((from.vantage.clone(), Target { transport, address }));
                    said.push(Self::says(&table, transport, port, from, sender));
                }
            }
        }
        let seen = measure(&probes).unwrap();
        let differs = |(((from, to), said), seen): (((&Vantage, &Target), &bool), &Reached)| {
            ((*seen == Reached::Open) != *said).then(|| {
                format!(
                    "{} {} {}: {seen}, said: {said}",
                    from.label, to.transport, to.address
                )
            })
        };
        let pairs = probes.iter().map(|(from, to)| (from, to)).zip(&said).zip(&seen);
        let wrong: Vec<String> = pairs.filter_map(differs).collect();
        let open = seen.iter().filter(|one| **one == Reached::Open).count();
        if wrong.is_empty() { Ok(open) } else { Err(wrong) }
    }
}

#[test]
fn the_exposure_table_says_who_really_gets_at_what() {
    let mut world = World::new();
    // Containers and sockets of units are there when they have started.
    let open = eventually(SOON, "the table and the probes say the same", || {
        world.differences()
    });
    println!("{open} of {} probes got in", PORTS.len() * 6);
    assert!(open > 60, "{open}");
    let table = world.table();
    names_and_places(&world, &table);
    forged_names_make_no_lines(&world);
    the_report_says_it_too(&world);
    a_socket_in_systemds_own_group_is_of_the_unit_that_listens_there(&world);
    a_rule_changes_both(&mut world);
    without_a_gate_it_fails(&world);
}

fn names_and_places(world: &World, table: &Value) {
    let row = |transport, port| World::row(table, transport, port);
    let reach: BTreeMap<u16, &str> = PORTS
        .iter()
        .filter(|(transport, _)| *transport == Tcp)
        .map(|(_, port)| (*port, row(Tcp, *port)["reach"].as_str().unwrap()))
        .collect();
    let expected = BTreeMap::from([
        (22, "anybody"),
        (7001, "anybody"),
        (7002, "anybody"),
        (7003, "anybody"),
        (7004, "named"),
        (7005, "loopback"),
        (7006, "anybody"),
        (7007, "peers"),
        (7008, "anybody"),
        (7009, "named"),
        (7010, "anybody"),
        (8080, "anybody"),
        (8081, "peers"),
        (8090, "loopback"),
    ]);
    assert_eq!(reach, expected);
    for (port, on) in [
        (7001, vec!["0.0.0.0", "[::]"]),
        (7002, vec!["*"]),
        (7003, vec!["[::]"]),
        (7004, vec!["0.0.0.0"]),
        (7005, vec!["127.0.0.1", "[::1]"]),
        (7010, vec![]),
    ] {
        assert_eq!(row(Tcp, port)["listens_on"], serde_json::json!(on), "{port}");
    }
    assert_eq!(row(Tcp, 7006)["listens_on"][0], world.machine.v4().to_string());
    for (port, unit) in [
        (22, "ssh.service"),
        (7002, "sockets.service"),
        (7007, "forged.service"),
        (7008, "activated.socket"),
        (8080, "docker.service"),
    ] {
        assert_eq!(row(Tcp, port)["unit"], unit);
    }
    for (port, program) in [(22, "sshd"), (7002, "python3"), (8080, "docker-proxy")] {
        let file = row(Tcp, port)["program"]["file"].as_str().unwrap();
        assert!(file.rsplit('/').next().unwrap().starts_with(program), "{file}");
    }
    let user = world.machine.ok(&format!("id -u {USER}"));
    assert_eq!(row(Tcp, 7007)["uid"].to_string(), user);
    let inside = row(Tcp, 8080)["published_to"].as_array().unwrap();
    assert!(
        inside.iter().all(|to| to.as_str().unwrap().ends_with(":80")),
        "{inside:?}"
    );
    assert_eq!(row(Tcp, 8080)["cleartext"]["protocol"], "HTTP");
    assert_eq!(row(Tcp, 7010)["uid"], Value::Null);
    let unserved = table["exposure"]["unserved"].to_string();
    for (rule, is_unserved) in [("tcp 7005", true), ("tcp 8090", true), ("tcp 7003", false)] {
        assert_eq!(unserved.contains(rule), is_unserved, "{unserved}");
    }
}

/// The user's program, whatever it calls itself, stays a word in its own line.
fn forged_names_make_no_lines(world: &World) {
    let text = world.machine.ok("portcullis firewall exposure");
    assert!(!text.contains('\u{1b}'), "{text:?}");
    assert!(text.contains("busybox\\u{1b}[2J\\n"), "{text}");
    let of_ssh: Vec<&str> = text
        .lines()
        .filter(|line| line.trim_start().starts_with("22/tcp"))
        .collect();
    assert_eq!(of_ssh.len(), 1, "{text}");
    assert!(
        !text.lines().any(|line| line.trim_start().starts_with("22:tcp")),
        "{text}"
    );
    assert!(
        of_ssh[0].contains("ssh.service") && !of_ssh[0].contains("forged"),
        "{text}"
    );
    println!("{text}");
}

/// The daemon knows no programs, and the same units and rules.
fn the_report_says_it_too(world: &World) {
    let check = world
        .machine
        .until_check(CheckId::ExposureListeners, Status::Warn);
    assert!(check.summary.contains("8080/tcp (HTTP)"), "{}", check.summary);
    let reachable = check.evidence["reachable"].as_array().unwrap();
    let of = |port: u16| {
        reachable
            .iter()
            .find(|row| row["port"] == port && row["protocol"] == "tcp")
            .unwrap()
    };
    for (port, unit) in [
        (22, "ssh.service"),
        (7007, "forged.service"),
        (7008, "activated.socket"),
    ] {
        assert_eq!(of(port)["unit"], unit);
    }
    assert_eq!(of(7004)["reach"], "named");
    // No event tells that a program begins to listen: who asks is told all the same.
    world
        .machine
        .ok("systemd-run --quiet --unit=late sh -c 'sleep 2; exec python3 -m http.server 7444'");
    eventually(SOON, "a late listener is told", || {
        let report = world.machine.try_status()?;
        let evidence = &report.check(CheckId::ExposureListeners).unwrap().evidence;
        let all = evidence["reachable"].as_array().unwrap();
        let late = all
            .iter()
            .any(|row| row["port"] == 7444 && row["unit"] == "late.service");
        if late { Ok(()) } else { Err(format!("{all:?}")) }
    });
}

/// Some versions of systemd make the sockets of their units in their own control group. Here a process in it
/// shares a unit's port, and has another one of its own.
fn a_socket_in_systemds_own_group_is_of_the_unit_that_listens_there(world: &World) {
    world.machine.ok(&format!(
        "{SHARED}\nsystemd-run --quiet --unit=within python3 -c '{WITHIN}'"
    ));
    eventually(SOON, "both are there", || {
        let table = world.table();
        let units = |port| -> Vec<String> {
            let rows = World::rows(&table, Tcp, port);
            rows.map(|row| row["unit"].as_str().unwrap_or_default().to_owned())
                .collect()
        };
        let seen = (units(7014), units(7015));
        let shared = "shared.socket".to_owned();
        let expected = (vec![shared.clone(), shared], vec!["init.scope".to_owned()]);
        if seen == expected { Ok(()) } else { Err(seen) }
    });
}

/// The positive control: what is shut is let in by a rule, and then the table says so.
fn a_rule_changes_both(world: &mut World) {
    for port in [7007u16, 8081] {
        let stranger = world.from[0].vantage.clone();
        assert_eq!(
            world.machine.seen_from(&stranger, Tcp, port),
            [Reached::Filtered; 2]
        );
        world.machine.ok(&format!(
            "portcullis firewall add --id late --protocol tcp --port {port}"
        ));
        assert_eq!(world.machine.seen_from(&stranger, Tcp, port), [Reached::Open; 2]);
        let table = world.table();
        let row = World::row(&table, Tcp, port);
        assert_eq!(row["reach"], "anybody");
        let by = row["by"].as_array().unwrap();
        assert!(by.iter().any(|grant| grant["rule"] == "rule late"), "{by:?}");
        world.machine.ok("portcullis firewall revoke late");
        assert_eq!(World::row(&world.table(), Tcp, port)["reach"], "peers");
    }
    // What is in cleartext is shut, and then nothing is left to warn of.
    world.machine.ok("portcullis firewall revoke allow-8080-tcp");
    eventually(SOON, "the table and the probes say the same", || {
        world.differences()
    });
    let check = world
        .machine
        .until_check(CheckId::ExposureListeners, Status::Pass);
    assert!(
        check.summary.contains("22/tcp (ssh.service)"),
        "{}",
        check.summary
    );
}

/// Without the table anybody gets at everything but loopback, and that is what is said.
fn without_a_gate_it_fails(world: &World) {
    world
        .machine
        .ok("systemctl stop portcullis && nft delete table inet portcullis");
    let open = eventually(SOON, "the table and the probes say the same", || {
        world.differences()
    });
    let table = world.table();
    assert_eq!(table["status"], "fail", "{table}");
    assert_eq!(World::row(&table, Tcp, 7007)["reach"], "anybody");
    println!("{open} probes got in without a gate");
    world.machine.ok("systemctl start portcullis");
    world.machine.until_ready();
    world
        .machine
        .until_check(CheckId::ExposureListeners, Status::Pass);
}

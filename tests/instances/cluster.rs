//! The main job: who reaches which port of whom, before and after a reboot.
//!
//! May not live here: what happens when something breaks (`faults`).

use std::collections::BTreeSet;
use std::net::SocketAddr;

use portcullis_provision::progress::Quiet;
use portcullis_provision::reach::{Listener, Reached, Target, Transport, listen_inside, measure};
use portcullis_provision::wait::wait;

use crate::lab::{Lab, Machine, Pace, READY_TIME, SOON, USER, allow, eventually, scan, vantage};

use Reached::{Closed, Filtered, Open};
use Transport::{Tcp, Udp};

/// Listeners that no rule names: a low port, some that training jobs take, the highest.
const UNNAMED: [(Transport, u16); 6] = [
    (Tcp, 111),
    (Tcp, 29_500),
    (Tcp, 65_535),
    (Udp, 53),
    (Udp, 4791),
    (Udp, 61_001),
];

/// Listeners that a rule names.
const NAMED: [(Transport, u16); 2] = [(Tcp, 8080), (Tcp, 60_999)];

/// Their rules.
const NAMED_RULES: [&str; 2] = ["8080/tcp", "60999/tcp"];

fn listen(machine: &Machine) {
    let ports: Vec<_> = UNNAMED.into_iter().chain(NAMED).collect();
    listen_inside(&machine.instance, &ports).unwrap();
}

#[test]
fn peers_reach_every_port_and_all_others_only_what_a_rule_allows() {
    let lab = Lab::new();
    let requests = [("gpu-0", "c-1"), ("gpu-1", "c-1"), ("gpu-2", "c-2")].map(|(name, cluster)| {
        let mut request = lab.request(name, cluster);
        request.rules.extend(NAMED_RULES.map(allow));
        request
    });
    let machines = lab.launch_many(&requests);
    let stranger = lab.stranger();
    machines.iter().for_each(listen);
    let anywhere: Vec<_> = [22]
        .into_iter()
        .chain(NAMED.map(|(_, port)| port))
        .map(|port| (Tcp, port))
        .collect();
    let (mut names, mut probes, mut expected) = (Vec::new(), Vec::new(), Vec::new());
    for to in &machines {
        let members = machines
            .iter()
            .map(|from| (from.vantage(), from.instance.cluster() == to.instance.cluster()));
        for (from, together) in members.chain([(vantage(&stranger), false)]) {
            let named = anywhere.iter().map(|what| (*what, true));
            for ((transport, port), open) in UNNAMED.map(|what| (what, together)).into_iter().chain(named) {
                for ip in to.instance.addresses() {
                    let address = SocketAddr::new(ip, port);
                    names.push(format!("{} to {transport} {address}", from.label));
                    probes.push((from.clone(), Target { transport, address }));
                    expected.push(if open { Open } else { Filtered });
                }
            }
        }
    }
    let seen = measure(&probes).unwrap();
    let expected: Vec<_> = names.iter().zip(expected).collect();
    assert_eq!(names.iter().zip(seen).collect::<Vec<_>>(), expected);
    outbound_works(&machines, &stranger);
}

fn outbound_works(machines: &[Machine], stranger: &portcullis_provision::local::Outsider) {
    let targets = stranger.addresses().map(|ip| Target {
        transport: Tcp,
        address: SocketAddr::new(ip, 8443),
    });
    for machine in machines {
        let probes = targets.map(|target| (machine.vantage(), target));
        let listener = Listener::new(stranger.path(), 8443).unwrap();
        assert_eq!(measure(&probes).unwrap(), [Open; 2]);
        drop(listener);
        // The answer that nobody listens comes in as well.
        eventually(SOON, "the listener is gone", || {
            let seen = measure(&probes).unwrap();
            if seen == [Closed; 2] { Ok(()) } else { Err(seen) }
        });
        for ip in stranger.addresses() {
            machine.ok(&format!("ping -c 1 -W 2 {ip}"));
        }
    }
}

#[test]
fn a_full_scan_finds_only_the_allowed_ports() {
    let lab = Lab::new();
    let mut request = lab.request("one", "c-1");
    request.rules.extend(NAMED_RULES.map(allow));
    let machine = lab.launch_many(&[request]).remove(0);
    let stranger = lab.stranger();
    listen(&machine);
    let outside = &stranger.path();
    let scan_both = || {
        std::thread::scope(|scope| {
            let scans = machine
                .instance
                .addresses()
                .map(|ip| scope.spawn(move || scan(outside, ip, Pace::Unanswered)));
            scans.map(|thread| thread.join().unwrap())
        })
    };
    let allowed = BTreeSet::from([22, NAMED[0].1, NAMED[1].1]);
    assert_eq!(scan_both(), [allowed.clone(), allowed]);
    let udp = || {
        let ports = UNNAMED.iter().filter(|(transport, _)| *transport == Udp);
        ports
            .map(|(_, port)| machine.seen_from(&vantage(&stranger), Udp, *port))
            .collect::<Vec<_>>()
    };
    assert_eq!(udp(), [[Filtered; 2]; 3]);

    // The same probes get in once the gate is taken away: they would have seen what listens.
    machine.ok("systemctl stop portcullis && nft delete table inet portcullis");
    let listening: BTreeSet<u16> = machine
        .ok("ss -Hltn | awk '{print $4}' | grep -v '^127\\.\\|^\\[::1\\]' | sed 's/.*://'")
        .lines()
        .map(|port| port.parse().unwrap())
        .collect();
    let unnamed = UNNAMED.iter().filter(|(transport, _)| *transport == Tcp);
    for (_, port) in unnamed {
        assert!(listening.contains(port), "{port} of {listening:?}");
    }
    // Every port answers now, and a busy machine loses some of so many answers.
    let mut found = [BTreeSet::new(), BTreeSet::new()];
    eventually(READY_TIME, "all that listens is found", || {
        for (all, address) in found.iter_mut().zip(machine.instance.addresses()) {
            all.extend(scan(outside, address, Pace::Careful));
        }
        if found.iter().all(|open| *open == listening) {
            Ok(())
        } else {
            Err(format!("{found:?} of {listening:?}"))
        }
    });
    assert_eq!(udp(), [[Open; 2]; 3]);
}

/// A moment of this boot, in microseconds; 0 is never.
fn moment(machine: &Machine, unit: &str, property: &str) -> u64 {
    let text = machine.unit(unit, property);
    let moment = text.parse().unwrap();
    assert!(moment > 0, "{unit} {property}: {text}");
    moment
}

#[test]
fn a_reboot_shuts_before_the_network_and_keeps_generation_identity_and_keys() {
    let lab = Lab::new();
    let mut machine = lab
        .launch_many(&[lab.request("gpu-0", "c-1"), lab.request("gpu-1", "c-1")])
        .remove(0);
    machine.push(|spec| spec.firewall.ingress.extend(NAMED_RULES.map(allow)));
    machine.until_ready();
    let keys = format!("cat ~{USER}/.ssh/authorized_keys");
    let before = (
        machine.table(),
        machine.ok(&keys),
        machine.instance.identity().unwrap().clone(),
    );
    lab.provider.reboot("gpu-0").unwrap();
    let report = wait(&lab.provider, "gpu-0", READY_TIME, &Quiet).unwrap();
    let machine = lab.machine("gpu-0");
    assert_eq!(report.generation, Some(2));
    let after = (
        machine.table(),
        machine.ok(&keys),
        machine.instance.identity().unwrap().clone(),
    );
    assert_eq!(after, before);

    listen(&machine);
    let (peer, stranger) = (lab.machine("gpu-1"), lab.stranger());
    for (transport, port) in UNNAMED {
        let seen = machine.seen_from(&peer.vantage(), transport, port);
        assert_eq!(seen, [Open; 2], "peer, {transport}/{port}");
        let seen = machine.seen_from(&vantage(&stranger), transport, port);
        assert_eq!(seen, [Filtered; 2], "stranger, {transport}/{port}");
    }
    for port in [22, NAMED[0].1, NAMED[1].1] {
        assert_eq!(machine.seen_from(&vantage(&stranger), Tcp, port), [Open; 2]);
    }

    let shut = moment(&machine, "portcullis-lockdown", "ActiveEnterTimestampMonotonic");
    for (unit, property) in [
        ("network-pre.target", "ActiveEnterTimestampMonotonic"),
        ("systemd-networkd", "InactiveExitTimestampMonotonic"),
        ("ssh", "InactiveExitTimestampMonotonic"),
        ("cloud-init-local", "InactiveExitTimestampMonotonic"),
    ] {
        let later = moment(&machine, unit, property);
        assert!(shut <= later, "{unit}: {later}, shut: {shut}");
        println!("shut {:.3} s before {unit}", (later - shut) as f64 / 1e6);
    }
}

//! What the journal of an instance says of denied packets, whatever they carry.
//!
//! May not live here: counting, sampling and the command (`tests/denied.rs`).

use std::net::{SocketAddr, UdpSocket};
use std::time::Instant;

use portcullis_provision::local::{Outsider, in_namespace};
use serde_json::Value;

use crate::lab::{Lab, Machine, SOON, eventually};

/// `portcullis::log::id::DENIED`: others filter by it, so it is fixed.
const DENIED: &str = "5b3f2d0c1a5e4c6e8d0f7a9b1c2d3e10";
/// What a packet carries to look like an entry of its own.
const FORGED: &str = "00000000000000000000000000000bad";

fn forgery() -> String {
    format!("MESSAGE=forged\nMESSAGE_ID={FORGED}\nPRIORITY=0\nNOTE=\x1b[2Jforged\n")
}

fn entries(machine: &Machine, matched: &str) -> Vec<Value> {
    let lines = machine.ok(&format!("journalctl -q -b -o json {matched}"));
    lines
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

fn text<'a>(entry: &'a Value, field: &str) -> &'a str {
    entry[field].as_str().unwrap_or_default()
}

/// Sends the forgery to these UDP ports; gives the sender's address and port.
fn send(machine: &Machine, stranger: &Outsider, ports: std::ops::Range<u16>) -> SocketAddr {
    let to = machine.v4();
    let sent = in_namespace(&stranger.path(), || {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        for port in ports {
            socket.connect((to, port)).unwrap();
            socket.send(forgery().as_bytes()).unwrap();
        }
        socket.local_addr().unwrap()
    });
    sent.unwrap()
}

fn told(machine: &Machine, port: u16) -> Vec<Value> {
    entries(machine, &format!("MESSAGE_ID={DENIED} PORT={port}"))
}

#[test]
fn denied_packets_forge_nothing_in_the_journal_and_do_not_fill_it() {
    let lab = Lab::new();
    let machine = lab.launch();
    let stranger = lab.stranger();
    let from = send(&machine, &stranger, 4999..5000);
    let entry = eventually(SOON, "a line", || told(&machine, 4999).pop().ok_or("none"));
    let (source, host) = (from.ip(), machine.v4());
    assert_eq!(
        text(&entry, "MESSAGE"),
        format!("denied udp from {from} to {host}:4999 by eth0")
    );
    for (field, expected) in [
        ("SOURCE", source.to_string()),
        ("DESTINATION", host.to_string()),
        ("PROTOCOL", "udp".to_owned()),
        ("SOURCE_PORT", from.port().to_string()),
        ("INTERFACE", "eth0".to_owned()),
        ("_SYSTEMD_UNIT", "portcullis.service".to_owned()),
    ] {
        assert_eq!(text(&entry, field), expected, "{field} of {entry:#}");
    }
    let forged = format!("MESSAGE_ID={FORGED}");
    assert!(entries(&machine, &forged).is_empty());
    // The same bytes, written as they are, would have made such an entry.
    assert!(
        machine
            .run_with("logger --journald", forgery().as_bytes())
            .success()
    );
    eventually(SOON, "a forged entry", || {
        entries(&machine, &forged).pop().ok_or("none")
    });

    let start = Instant::now();
    let before = entries(&machine, &format!("MESSAGE_ID={DENIED}")).len();
    send(&machine, &stranger, 5000..5500);
    let counted = eventually(SOON, "the flood is counted", || {
        let seen = machine.ok("portcullis firewall denied --format json");
        let seen: Value = serde_json::from_str(&seen).unwrap();
        let counted = seen["counted"].as_array().unwrap().clone();
        let udp = counted.iter().find(|entry| entry["reason"] == "udp").cloned();
        udp.and_then(|udp| udp["packets"].as_u64())
            .filter(|packets| *packets >= 501)
            .ok_or(seen)
    });
    let lines = entries(&machine, &format!("MESSAGE_ID={DENIED}")).len() - before;
    let most = 20 + start.elapsed().as_secs() as usize + 1;
    println!("{counted} packets, {lines} lines");
    assert!((1..=most).contains(&lines), "{lines} lines, {most} at most");
}

#[test]
fn an_image_can_keep_denied_packets_out_of_the_journal() {
    let lab = Lab::new();
    let machine = lab.launch();
    let stranger = lab.stranger();
    let from = send(&machine, &stranger, 4998..4999);
    eventually(SOON, "a line", || told(&machine, 4998).pop().ok_or("none"));
    machine.ok(
        "printf '[firewall]\\nlog_denied = false\\n' > /etc/portcullis/conf.d/quiet.toml
        systemctl restart portcullis",
    );
    machine.until_ready();
    send(&machine, &stranger, 4999..5000);
    // It is seen all the same,
    eventually(SOON, "the sample", || {
        let seen = machine.ok("portcullis firewall denied --format json");
        let source = format!("{}/32", from.ip());
        if seen.contains(&source) { Ok(()) } else { Err(seen) }
    });
    // and the journal has all that was written until then.
    machine.ok("journalctl --sync");
    assert!(told(&machine, 4999).is_empty());
}

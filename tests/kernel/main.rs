//! The agent on a kernel that users run: Debian 12's 6.1, which knows no `persist` for tables, and so no table
//! that is the daemon's own. In a whole virtual machine, whose power can go.
//!
//! Without KVM, so everything is slower than it would be there. Wants what `packaging/setup` installs, and Debian
//! 12's package lists. May not live here: the machine (`guest.rs`), what it does (`guest/`).
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "../common/mod.rs"]
mod common;
mod guest;
mod keys;
mod stacks;
mod storage;

use std::time::Duration;

use guest::Guest;
use portcullis_protocol::{CheckId, Report};
use serde_json::{Value, json};

/// So long a foreign change may last until it is seen to be undone. On an idle machine that takes a third of a second,
/// most of it for looking; the daemon itself takes milliseconds (`tests/engine.rs`).
const AT_ONCE: Duration = Duration::from_secs(5);

#[track_caller]
fn old_kernel(guest: &Guest) {
    let kernel = guest.ok("kernel");
    assert!(
        kernel.starts_with("6.1."),
        "Debian 12's kernel is wanted: {kernel}"
    );
    guest.ok("network");
}

/// Which of the knocks are answered: port 22 by IPv4 and IPv6, then port 80.
#[track_caller]
fn knocks(guest: &Guest, when: &str) -> [bool; 4] {
    ["22", "22-ipv6", "80", "80-ipv6"].map(|which| guest.is_open(&format!("{when}-{which}")))
}

/// What `firewall.applied` tells.
#[track_caller]
fn evidence(guest: &Guest, step: &str) -> Value {
    let report: Report = guest.json(step);
    let check = report.check(CheckId::FirewallApplied).unwrap();
    assert_eq!(json!(check.status), "pass", "{check:?}");
    json!(check.evidence)
}

#[test]
fn a_kernel_without_persist_gets_a_gate_that_nobody_owns() {
    let mut guest = Guest::boot("gate", None);
    guest.until_off();
    old_kernel(&guest);
    assert_eq!(knocks(&guest, "open"), [true; 4], "without the gate");

    assert_eq!(guest.ok("lockdown"), "shut: nothing in, everything out\n");
    // An owner would be listed, as it is for a table that has one.
    assert!(guest.ok("owned").contains("flags owner"));
    let table = guest.ok("lockdown-table");
    assert!(
        table.contains("policy drop") && !table.contains("flags"),
        "{table}"
    );
    assert_eq!(knocks(&guest, "lockdown"), [false; 4]);

    guest.ok("daemon");
    guest.ok("apply");
    guest.ok("ranges");
    each_kind_of_rule_is_there(guest.ok("rules-table"));
    assert_eq!(knocks(&guest, "rules"), [true, false, false, false]);
    for (step, verdict) in [
        ("explain-22", "accept"),
        ("explain-22-ipv6", "drop"),
        ("explain-80", "drop"),
        ("explain-80-ipv6", "drop"),
        ("explain-interval", "accept"),
        ("explain-peer", "accept"),
        ("explain-outside", "drop"),
        ("explain-inside", "accept"),
    ] {
        guest.ok(step);
        assert_eq!(
            guest.json::<Value>(step)["explanation"]["verdict"],
            verdict,
            "{step}"
        );
    }
    undone(&guest, &["flush", "delete", "insert", "element"]);
    assert_eq!(knocks(&guest, "undone"), knocks(&guest, "rules"));

    guest.ok("add");
    assert!(guest.is_open("added-80"));
    guest.ok("revoke");
    assert!(!guest.is_open("revoked-80"));
    denied_packets_are_counted(&guest);
    guest.ok("many");
    undone(&guest, &["many-flush"]);
    println!("memory of the daemon:\n{}", guest.ok("memory"));
}

#[track_caller]
fn each_kind_of_rule_is_there(table: &str) {
    for kind in [
        "counter reject comment \"metadata lock\"",
        "ct direction reply",
        "ct state related",
        "fib daddr oifname @internal.routed",
        "ip saddr @peers4",
        "ip saddr @rule.sets.4 tcp dport 80-90",
        "flags interval",
        "icmpv6 type echo-request",
        "meta l4proto 47",
        "limit rate 10/second burst 20 packets log group 7443 snaplen 128",
    ] {
        assert!(table.contains(kind), "{kind} is not in\n{table}");
    }
}

/// What others changed while one daemon was there.
#[track_caller]
fn undone(guest: &Guest, changes: &[&str]) {
    for (repaired, change) in (1..).zip(changes) {
        guest.ok(change);
        let undone = format!("{change}-undone");
        guest.ok(&undone);
        let took = guest.step(&undone).took;
        println!("{change} was undone within {took:?}");
        assert!(took < AT_ONCE, "{change} was undone after {took:?}");
        let evidence = evidence(guest, &format!("{change}-status"));
        assert_eq!(evidence["repaired"], repaired, "{change}");
        assert_eq!(evidence["exclusive"], false);
        let by = evidence["changed_by"].as_str().unwrap();
        assert!(by.starts_with("\"nft\""), "{change}: {by}");
    }
}

/// The sample is told, and the kernel's counters outlive a daemon: the next one does not make the table anew.
#[track_caller]
fn denied_packets_are_counted(guest: &Guest) {
    let tcp = |step: &str| -> u64 {
        let denied: Value = guest.json(step);
        let reasons = denied["counted"].as_array().unwrap();
        let tcp = reasons.iter().find(|counted| counted["reason"] == "tcp");
        tcp.unwrap()["packets"].as_u64().unwrap()
    };
    let before = tcp("count-before");
    assert!(before > 0);
    guest.ok("next-daemon");
    assert!(tcp("count-after") >= before, "counted anew");
    let sample: Value = guest.json("count-before");
    let sources = sample["sample"]["sources"].as_array().unwrap();
    assert!(
        sources.iter().any(|source| source["source"] == "10.9.0.2/32"),
        "{sample}"
    );
}

/// The trial is durable, and over with the boot: what was accepted before it holds.
#[test]
fn a_power_cut_in_a_trial_leaves_what_was_accepted() {
    let folder = tempfile::tempdir().unwrap();
    let disk = folder.path().join("disk");
    common::run(&format!("mke2fs -q -t ext4 {} 16M", disk.display()));

    let mut guest = Guest::boot("cut", Some(&disk));
    guest.cut_after("cut");
    old_kernel(&guest);
    for step in ["disk", "lockdown", "daemon", "accepted", "trial"] {
        guest.ok(step);
    }
    let on_trial = [false, false, true, true];
    assert_eq!(knocks(&guest, "trial"), on_trial);
    assert_eq!(
        knocks(&guest, "killed"),
        on_trial,
        "the kernel holds the gate, not the daemon"
    );
    let written = files(&guest, "files");
    for file in ["spec.json", "trial.json", "unsynchronised"] {
        assert!(written.contains(&file), "{file} is not among {written:?}");
    }

    let mut after = Guest::boot("restart", Some(&disk));
    after.until_off();
    old_kernel(&after);
    after.ok("disk");
    let left = files(&after, "files");
    assert!(
        !left.contains(&"unsynchronised"),
        "the power was not really cut: {left:?}"
    );
    assert!(
        left.contains(&"spec.json") && left.contains(&"trial.json"),
        "{left:?}"
    );
    assert_eq!(knocks(&after, "open"), [true; 4], "without the gate");
    assert_eq!(after.ok("lockdown"), "shut, but for what generation 1 lets in\n");
    let accepted = [true, true, false, false];
    assert_eq!(knocks(&after, "lockdown"), accepted);
    after.ok("daemon");
    assert_eq!(after.json::<Report>("status").generation, Some(1));
    assert_eq!(knocks(&after, "daemon"), accepted);
    assert!(!files(&after, "files-then").contains(&"trial.json"));
}

#[track_caller]
fn files<'a>(guest: &'a Guest, step: &str) -> Vec<&'a str> {
    guest.ok(step).lines().collect()
}

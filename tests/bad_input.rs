//! Specs that are wrong, odd or very large, through the command line and the spec file, with a running
//! daemon and a real kernel.
//!
//! May not live here: which specs are valid (the protocol crate's tests).
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::fs;
use std::time::{Duration, Instant};

use common::daemon::Daemon;
use common::{Namespace, eventually};

const SOON: Duration = Duration::from_secs(20);

fn spec(generation: u64, rest: &str) -> String {
    format!(r#"{{"version":1,"generation":{generation},"instance":{{"id":"i-1"}}{rest}}}"#)
}

fn rules(count: usize) -> String {
    let rules = (0..count).map(|i| format!(r#"{{"id":"r{i}","from_port":{}}}"#, i % 60_000 + 1));
    format!(
        r#","firewall":{{"ingress":[{}]}}"#,
        rules.collect::<Vec<_>>().join(",")
    )
}

fn peers(count: usize) -> String {
    let peers = (0..count).map(|i| {
        let (a, b, c) = (i >> 16, i >> 8 & 255, i & 255);
        format!(r#"{{"instance":"p{i}","addresses":["10.{a}.{b}.{c}","fd00::{a:x}:{b:x}:{c:x}"]}}"#)
    });
    format!(
        r#","cluster":{{"id":"c","peers":[{}]}}"#,
        peers.collect::<Vec<_>>().join(",")
    )
}

fn table(host: &Namespace) -> String {
    host.run("nft -s list table inet portcullis")
}

/// What is wrong, and what the message has to name.
fn bad() -> Vec<(String, &'static str)> {
    let peer = |rest: &str| format!(r#","cluster":{{"id":"c","peers":[{rest}]}}"#);
    let rule = |rest: &str| format!(r#","firewall":{{"ingress":[{rest}]}}"#);
    vec![
        (
            rule(r#"{"id":"a","from_port":90,"to_port":80}"#),
            "firewall.ingress[0]: to_port of rule a: the range 90 to 80 is reversed",
        ),
        (
            rule(r#"{"id":"a","from_port":1,"ip_ranges":["10.0.0.0/33"]}"#),
            "firewall.ingress[0].ip_ranges[0]: \"10.0.0.0/33\"",
        ),
        (
            rule(r#"{"id":"a","from_port":1,"ip_ranges":["::ffff:10.0.0.0/64"]}"#),
            "write the IPv4 range",
        ),
        (
            rule(r#"{"id":"a","from_port":1},{"id":"a","from_port":2}"#),
            "firewall.ingress[1].id: \"a\" is taken",
        ),
        (
            rules(100_001),
            "firewall.ingress: 100001 rules are too many: at most 1000",
        ),
        (
            peers(100_001),
            "cluster.peers: 100001 peers are too many: at most 100000",
        ),
        (
            peer(r#"{"instance":"p","addresses":["0.0.0.0/0"]}"#),
            "\"0.0.0.0/0\" is not an IP address",
        ),
        (
            peer(r#"{"instance":"p","addresses":["::/0"]}"#),
            "\"::/0\" is not an IP address",
        ),
        (
            peer(r#"{"instance":"p","addresses":["::"]}"#),
            "the unspecified address",
        ),
        (
            peer(
                r#"{"instance":"p","addresses":["10.0.0.1"]},{"instance":"q","addresses":["::ffff:10.0.0.1"]}"#,
            ),
            "cluster.peers[1].addresses: 10.0.0.1 is already an address of peers[0]",
        ),
        (
            peer(r#"{"instance":"p","addresses":["10.0.0.1"]},{"instance":"p","addresses":["10.0.0.2"]}"#),
            "cluster.peers[1].instance: p is already peers[0]",
        ),
    ]
}

#[test]
fn a_bad_spec_is_refused_with_its_field_and_changes_not_a_byte() {
    let host = Namespace::new("bad");
    let daemon = Daemon::start(&host);
    let good = spec(1, &rules(2));
    let applied = daemon.portcullis(&["apply", "--spec", "-"], good.as_bytes());
    assert_eq!(applied.status.code(), Some(0), "{applied:?}");
    let state = || (table(&host), fs::read(daemon.accepted()).unwrap());
    let before = state();
    assert!(before.0.contains("rule r1"), "{}", before.0);
    for (rest, expected) in bad() {
        let text = spec(2, &rest);
        for command in ["apply", "plan"] {
            let refused = daemon.portcullis(&[command, "--spec", "-"], text.as_bytes());
            let said = String::from_utf8_lossy(&refused.stderr);
            assert_eq!(refused.status.code(), Some(2), "{expected}: {said}");
            assert!(
                said.contains("standard input") && said.contains(expected),
                "{expected}: {said}"
            );
            assert!(refused.stdout.is_empty(), "{refused:?}");
        }
        let fresh = daemon.injected().with_extension("new");
        fs::write(&fresh, &text).unwrap();
        fs::rename(&fresh, daemon.injected()).unwrap();
        eventually(SOON, expected, || {
            let log = daemon.log();
            if log.contains(&expected.replace('"', "\\\"")) || log.contains(expected) {
                Ok(())
            } else {
                Err(log)
            }
        });
        assert_eq!(state(), before, "{expected}");
    }
}

#[test]
fn a_range_with_host_bits_is_taken_and_the_operator_is_told() {
    let host = Namespace::new("odd");
    let daemon = Daemon::start(&host);
    let odd = spec(
        1,
        r#","firewall":{"ingress":[{"id":"a","protocol":"tcp","from_port":22,"ip_ranges":["10.1.2.3/8","::ffff:192.0.2.0/120"]}]}"#,
    );
    let warning = "firewall.ingress[0].ip_ranges[0]: 10.1.2.3/8 has host bits: it is taken as 10.0.0.0/8";
    let plan = daemon.portcullis(&["plan", "--spec", "-"], odd.as_bytes());
    assert!(
        String::from_utf8_lossy(&plan.stdout).contains(warning),
        "{plan:?}"
    );
    let plan = daemon.portcullis(&["plan", "--spec", "-", "--format", "json"], odd.as_bytes());
    let plan: serde_json::Value = serde_json::from_slice(&plan.stdout).unwrap();
    assert_eq!(plan["warnings"], serde_json::json!([warning]));
    assert!(!daemon.log().contains("host bits"));
    let applied = daemon.portcullis(&["apply", "--spec", "-"], odd.as_bytes());
    assert_eq!(applied.status.code(), Some(0), "{applied:?}");
    assert!(
        String::from_utf8_lossy(&applied.stderr).contains(warning),
        "{applied:?}"
    );
    assert!(daemon.log().contains(warning), "{}", daemon.log());
    let table = table(&host);
    assert!(
        table.contains("10.0.0.0/8") && table.contains("192.0.2.0/24"),
        "{table}"
    );
}

/// All limits at once.
#[test]
fn the_largest_spec_is_enforced() {
    let host = Namespace::new("large");
    let daemon = Daemon::start(&host);
    let ranges = |i: usize| {
        let ranges = (0..100).map(|j| {
            let net = (i * 100 + j) * 2;
            format!(r#""172.{}.{}.{}/32""#, net >> 16, net >> 8 & 255, net & 255)
        });
        ranges.collect::<Vec<_>>().join(",")
    };
    let rules = (0..1000).map(|i| {
        format!(
            r#"{{"id":"r{i}","from_port":{},"ip_ranges":[{}]}}"#,
            i + 1,
            ranges(i)
        )
    });
    let rules = rules.collect::<Vec<_>>().join(",");
    let text = spec(
        1,
        &format!(r#"{},"firewall":{{"ingress":[{rules}]}}"#, peers(100_000)),
    );
    let start = Instant::now();
    let applied = daemon.portcullis(&["apply", "--spec", "-"], text.as_bytes());
    assert_eq!(
        applied.status.code(),
        Some(0),
        "{}",
        String::from_utf8_lossy(&applied.stderr)
    );
    println!(
        "{} bytes of spec were enforced after {:?}",
        text.len(),
        start.elapsed()
    );
    assert!(table(&host).contains("rule r999"));
}

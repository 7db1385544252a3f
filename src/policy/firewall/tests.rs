//! What a spec makes of the rules.
//!
//! May not live here: a kernel (`tests/gate.rs`).

use super::*;

fn rules_for(rest: &str) -> Ruleset {
    let json = format!(r#"{{"version":1,"generation":1,"instance":{{"id":"i-1"}}{rest}}}"#);
    let spec = Spec::from_json(json.as_bytes()).unwrap();
    ruleset(Inputs {
        spec: Some(&spec),
        ..Inputs::default()
    })
}

fn lines(ruleset: &Ruleset, comment: &str) -> Vec<String> {
    let rules = &ruleset.chain(GATE).unwrap().rules;
    rules
        .iter()
        .filter(|r| r.comment == comment)
        .map(ToString::to_string)
        .collect()
}

#[test]
fn without_a_spec_nothing_but_the_base_is_there() {
    let none = ruleset(Inputs::default());
    let gate = none.chain(GATE).unwrap();
    assert_eq!(gate.hook.as_ref().unwrap().policy, Verdict::Drop);
    let unexpected: Vec<_> = gate
        .rules
        .iter()
        .filter(|r| {
            r.verdict == Some(Verdict::Accept)
                && !r.comment.starts_with("base ")
                && !r.comment.starts_with("peers ")
        })
        .collect();
    assert!(unexpected.is_empty(), "{unexpected:?}");
    assert!(none.set("peers4").unwrap().elements.is_empty());
}

#[test]
fn both_families_open_is_one_rule() {
    let rules = rules_for(
        r#","firewall":{"ingress":[{"id":"ssh","protocol":"tcp","from_port":22,"ip_ranges":["0.0.0.0/0","::/0"]}]}"#,
    );
    assert_eq!(
        lines(&rules, "rule ssh"),
        ["meta l4proto tcp th dport 22 counter accept comment \"rule ssh\""]
    );
}

#[test]
fn one_family_open_leaves_the_other_shut() {
    let rules = rules_for(
        r#","firewall":{"ingress":[{"id":"w","from_port":80,"to_port":90,"ip_ranges":["0.0.0.0/0"]}]}"#,
    );
    assert_eq!(
        lines(&rules, "rule w"),
        [
            "meta nfproto ipv4 meta l4proto tcp th dport 80-90 counter accept comment \"rule w\"",
            "meta nfproto ipv4 meta l4proto udp th dport 80-90 counter accept comment \"rule w\"",
        ]
    );
}

#[test]
fn several_sources_share_a_set_and_one_needs_none() {
    let rules = rules_for(
        r#","firewall":{"ingress":[{"id":"w","protocol":"tcp","from_port":80,
           "ip_ranges":["10.0.0.0/8","192.0.2.7","2001:db8::/32"]}]}"#,
    );
    assert_eq!(rules.set("rule.w.4").unwrap().elements.len(), 2);
    assert!(rules.set("rule.w.6").is_none());
    assert_eq!(
        lines(&rules, "rule w"),
        [
            "meta nfproto ipv4 ip saddr @rule.w.4 meta l4proto tcp th dport 80 counter accept comment \"rule w\"",
            "meta nfproto ipv6 ip6 saddr 2001:db8::/32 meta l4proto tcp th dport 80 counter accept comment \"rule w\"",
        ]
    );
}

#[test]
fn peers_go_into_sets_and_never_make_rules() {
    let peers: Vec<String> = (0..500u32)
        .map(|i| {
            format!(
                r#"{{"instance":"p{i}","addresses":["10.1.{}.{}","fd00::{i:x}:1"]}}"#,
                i / 250,
                i % 250 + 1
            )
        })
        .collect();
    let with = rules_for(&format!(
        r#","cluster":{{"id":"c","peers":[{}]}}"#,
        peers.join(",")
    ));
    assert_eq!(with.set("peers4").unwrap().elements.len(), 500);
    assert_eq!(with.set("peers6").unwrap().elements.len(), 500);
    assert_eq!(with.chains[0].rules.len(), rules_for("").chains[0].rules.len());
}

#[test]
fn echo_needs_a_rule() {
    assert!(lines(&rules_for(""), "rule ping").is_empty());
    let rules = rules_for(r#","firewall":{"ingress":[{"id":"ping","protocol":"icmp"}]}"#);
    assert_eq!(lines(&rules, "rule ping").len(), 2);
}

#[test]
fn the_control_plane_reaches_only_its_port() {
    let rules = rules_for(r#","control_plane":{"sources":["192.0.2.0/24"]}"#);
    assert_eq!(
        lines(&rules, "control plane"),
        [
            "meta nfproto ipv4 ip saddr 192.0.2.0/24 meta l4proto tcp th dport 7443 counter accept comment \"control plane\""
        ]
    );
    assert!(lines(&rules_for(r#","control_plane":{}"#), "control plane").is_empty());
}

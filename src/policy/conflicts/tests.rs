//! What is a conflict and what is none, on tables written as values.

use super::*;
use crate::policy::firewall::{Inputs, ruleset};
use crate::policy::foreign::{Action, Condition, Field, Rule, TableFamily, ct_state, iptables};
use crate::policy::ruleset::{Family, Verdict};
use portcullis_protocol::Spec;

fn gate(rest: &str) -> Ruleset {
    let text = format!(r#"{{"version":1,"generation":1,"instance":{{"id":"i"}}{rest}}}"#);
    ruleset(Inputs {
        spec: Some(&Spec::from_json(text.as_bytes()).unwrap()),
        ..Inputs::default()
    })
}

fn ssh() -> Ruleset {
    gate(r#","firewall":{"ingress":[{"id":"ssh","protocol":"tcp","from_port":22}]}"#)
}

fn uplinks() -> Vec<Uplink> {
    vec![Uplink {
        name: "eth0".into(),
        index: 2,
        addresses: vec!["10.0.0.2".parse().unwrap(), "fd00::2".parse().unwrap()],
    }]
}

/// Compares with the rules of a legacy table `filter`, IPv4.
fn against(gate: &Ruleset, lines: &str) -> Comparison {
    let text = format!("*filter\n:INPUT ACCEPT [0:0]\n:FORWARD DROP [0:0]\n{lines}\nCOMMIT\n");
    let foreign = Foreign {
        tables: iptables::parse(Family::Ipv4, &text),
        unread: Vec::new(),
    };
    let found = find(gate, &uplinks(), foreign);
    assert!(found.tried > 0, "nothing was tried");
    found
}

/// The rules that drop, each with `?` if it only may.
fn dropping(found: &Comparison) -> Vec<String> {
    let show = |c: &Conflict| format!("{}: {}{}", c.chain, c.rule, if c.certain { "" } else { "?" });
    found.conflicts.iter().map(show).collect()
}

#[test]
fn each_kind_of_drop_is_found_and_what_passes_is_not() {
    let policy = ":INPUT DROP [0:0]";
    for (lines, expected) in [
        ("", vec![]),
        (policy, vec!["INPUT: policy drop"]),
        (":INPUT DROP\n-A INPUT -p tcp --dport 22 -j ACCEPT", vec![]),
        (
            "-A INPUT -p tcp --dport 22 -j REJECT",
            vec!["INPUT: meta l4proto tcp th dport 22 REJECT"],
        ),
        ("-A INPUT -p tcp --dport 23 -j DROP", vec![]),
        ("-A INPUT -i lo -j DROP\n-A INPUT ! -i eth+ -j DROP", vec![]),
        (
            "-A INPUT -d 10.0.0.2 -j DROP",
            vec!["INPUT: ip daddr 10.0.0.2 DROP"],
        ),
        ("-A INPUT -d 172.17.0.2 -j DROP", vec![]),
        // The order decides.
        ("-A INPUT -j ACCEPT\n-A INPUT -j DROP", vec![]),
        // Jumps, returns and gotos.
        (
            ":own -\n-A INPUT -j own\n-A own -p tcp -j DROP",
            vec!["own: meta l4proto tcp DROP"],
        ),
        (
            ":own -\n-A INPUT -j own\n-A INPUT -j DROP\n-A own -j RETURN\n-A own -j ACCEPT",
            vec!["INPUT: DROP"],
        ),
        (
            ":INPUT DROP\n:own -\n-A INPUT -g own\n-A INPUT -j ACCEPT\n-A own -j RETURN",
            vec!["INPUT: policy drop"],
        ),
        (
            ":own -\n-A INPUT -j own\n-A own -j INPUT",
            vec!["INPUT: jump own?"],
        ),
        // What can't be judged leaves both ways open.
        (
            "-A INPUT -m recent --update -j DROP",
            vec!["INPUT: -m recent --update DROP?"],
        ),
        (
            ":INPUT DROP\n-A INPUT -m recent --set -j ACCEPT",
            vec!["INPUT: policy drop?"],
        ),
        (
            "-A INPUT -m limit --limit 3/min -j ACCEPT\n-A INPUT -j ACCEPT",
            vec![],
        ),
        (
            ":own -\n-A INPUT -j own\n-A INPUT -j ACCEPT\n-A own -m recent -j RETURN\n-A own -j DROP",
            vec!["own: DROP?"],
        ),
        ("-A INPUT -j NFQUEUE --queue-num 1", vec!["INPUT: NFQUEUE?"]),
        // It is the first packet of a flow.
        ("-A INPUT -m conntrack --ctstate INVALID -j DROP", vec![]),
        (
            "-A INPUT -p tcp ! --tcp-flags FIN,SYN,RST,ACK SYN -m conntrack --ctstate NEW -j DROP",
            vec![],
        ),
    ] {
        let found = against(&ssh(), lines);
        assert_eq!(dropping(&found), expected, "{lines}");
    }
}

#[test]
fn a_hit_names_our_rule_and_the_packet() {
    let found = against(&ssh(), ":INPUT DROP [0:0]\n:ufw-user-input - [0:0]");
    let [conflict] = found.conflicts.as_slice() else {
        panic!("{found:?}")
    };
    assert_eq!(
        (conflict.table.as_str(), conflict.hook),
        ("ip filter (legacy iptables)", "input")
    );
    assert_eq!(conflict.program, Program::Ufw);
    let [hit] = conflict.hits.as_slice() else {
        panic!("{conflict:?}")
    };
    assert_eq!(hit.rule, "rule ssh");
    assert_eq!(hit.packet, "tcp port 22 from 45.0.0.1 to 10.0.0.2 by eth0");
    assert_eq!(hit.opens, Some((6, PortRange::single(22).unwrap())));
}

/// Docker drops what is forwarded, and translates published ports: neither concerns the host's ports.
#[test]
fn a_container_programs_rules_are_no_conflict() {
    let docker = "*nat\n:PREROUTING ACCEPT\n:DOCKER -\n-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER\n\
        -A DOCKER ! -i docker0 -p tcp -m tcp --dport 8080 -j DNAT --to-destination 172.17.0.2:80\nCOMMIT\n\
        *raw\n:PREROUTING ACCEPT\n-A PREROUTING -d 172.17.0.2/32 ! -i docker0 -j DROP\nCOMMIT\n\
        *filter\n:INPUT DROP\n:FORWARD DROP\n:DOCKER-USER -\n-A FORWARD -j DOCKER-USER\n-A DOCKER-USER -j DROP\n\
        -A INPUT -p tcp --dport 22 -j ACCEPT\nCOMMIT\n";
    let foreign = |text: &str| Foreign {
        tables: iptables::parse(Family::Ipv4, text),
        unread: Vec::new(),
    };
    let both = gate(
        r#","firewall":{"ingress":[{"id":"ssh","protocol":"tcp","from_port":22},{"id":"web","protocol":"tcp","from_port":8080}]}"#,
    );
    assert_eq!(
        dropping(&find(&both, &uplinks(), foreign(docker))),
        Vec::<String>::new()
    );
    // The control: without the translation, port 8080 is the host's, and dropped.
    let host = docker.replace("DNAT", "RETURN");
    assert_eq!(
        dropping(&find(&both, &uplinks(), foreign(&host))),
        ["INPUT: policy drop"]
    );
}

#[test]
fn every_kind_of_what_is_let_in_is_tried() {
    let all = gate(
        r#","cluster":{"id":"c","peers":[{"instance":"p","addresses":["10.9.0.3","fd09::3"]}]},
        "control_plane":{"sources":["192.0.2.0/24"]},
        "firewall":{"ingress":[
          {"id":"web","from_port":80,"to_port":90,"ip_ranges":["10.0.0.0/8","172.16.0.0/12"]},
          {"id":"gre","protocol":47,"ip_ranges":["192.0.2.1"]},
          {"id":"ping","protocol":"icmp"}]}"#,
    );
    let hits = |lines: &str| {
        let found = against(&all, lines);
        let hits = found.conflicts.into_iter().flat_map(|c| c.hits);
        hits.map(|hit| format!("{}: {}", hit.rule, hit.packet))
            .collect::<Vec<_>>()
    };
    assert_eq!(
        hits(":INPUT DROP"),
        [
            "peers ipv4: tcp port 1 from 10.9.0.3 to 10.0.0.2 by eth0",
            "control plane: tcp port 7443 from 192.0.2.0 to 10.0.0.2 by eth0",
            "rule web: tcp port 80 from 10.0.0.0 to 10.0.0.2 by eth0",
            "rule gre: protocol 47 from 192.0.2.1 to 10.0.0.2 by eth0",
            "rule ping: echo request from 45.0.0.1 to 10.0.0.2 by eth0",
        ]
    );
    // Both ends of each range.
    assert_eq!(
        hits("-A INPUT -s 172.31.255.255 -p udp --dport 90 -j DROP"),
        ["rule web: udp port 90 from 172.31.255.255 to 10.0.0.2 by eth0"]
    );
    // Every host needs those; they are not the spec's.
    assert_eq!(hits("-A INPUT -p udp --dport 68 -j DROP"), Vec::<String>::new());
}

#[test]
fn nothing_is_tried_where_nothing_can_come_in() {
    assert_eq!(find(&ssh(), &[], Foreign::default()).tried, 0);
    let without_v6 = [Uplink {
        addresses: vec!["10.0.0.2".parse().unwrap()],
        ..uplinks().remove(0)
    }];
    let ip6 = ":INPUT DROP\n";
    let foreign = Foreign {
        tables: iptables::parse(Family::Ipv6, &format!("*filter\n{ip6}")),
        unread: Vec::new(),
    };
    assert_eq!(
        dropping(&find(&ssh(), &without_v6, foreign.clone())),
        Vec::<String>::new()
    );
    assert_eq!(
        dropping(&find(&ssh(), &uplinks(), foreign)),
        ["INPUT: policy drop"]
    );
    assert_eq!(find(&gate(""), &uplinks(), Foreign::default()).let_in, 0);
}

/// A table with one base chain at input.
fn inet(rules: Vec<Rule>) -> Foreign {
    let mut table = Table::new(TableFamily::Inet, "t", false);
    let hook = Hook {
        number: INPUT,
        priority: 0,
        policy: Verdict::Accept,
    };
    let chain = Chain {
        hook: Some(hook),
        nat: false,
        rules,
    };
    table.chains.insert("in".into(), chain);
    Foreign {
        tables: vec![table],
        unread: Vec::new(),
    }
}

#[test]
fn a_verdict_map_is_followed() {
    let drop = || Action::End(Verdict::Drop, "drop".into());
    let state = |bit: u128, action| (bit..=bit, action);
    let map = |entries| Rule {
        handle: Some(1),
        conditions: Vec::new(),
        action: Action::Map(Condition::within(Field::CtState, Vec::new()), entries),
    };
    let found = find(
        &ssh(),
        &uplinks(),
        inet(vec![map(vec![state(ct_state::INVALID, drop())])]),
    );
    assert_eq!(dropping(&found), Vec::<String>::new());
    let found = find(
        &ssh(),
        &uplinks(),
        inet(vec![map(vec![state(ct_state::NEW, drop())])]),
    );
    assert_eq!(dropping(&found), ["in: ct state vmap { new : drop }"]);
}

#[test]
fn too_many_rules_are_said_and_nothing_false_is() {
    let other = Rule {
        handle: None,
        conditions: vec![Condition::is(Field::Protocol, 17)],
        action: Action::Continue,
    };
    let mut foreign = inet(vec![other; 3_000_000]);
    let hook = foreign.tables[0]
        .chains
        .get_mut("in")
        .unwrap()
        .hook
        .as_mut()
        .unwrap();
    hook.policy = Verdict::Drop;
    let found = find(&ssh(), &uplinks(), foreign);
    assert_eq!(
        found.conflicts.len(),
        1,
        "the first packet is within the budget: {found:?}"
    );
    assert_eq!(found.conflicts[0].hits.len(), 1);
    assert!(found.unread[0].contains("too many rules"), "{found:?}");
}

//! What an operator sees, at 80 columns.

use std::collections::BTreeSet;

use portcullis_protocol::Spec;

use super::*;
use crate::policy::conflicts::Comparison;
use crate::policy::conflicts::published::Published;
use crate::policy::exposure::socket::{Program, Socket, Transport};
use crate::policy::exposure::{Inputs, judge};
use crate::policy::firewall::{self, ruleset};

use Transport::{Tcp, Udp};

const SPEC: &str = r#"{"version":1,"generation":1,"instance":{"id":"i"},
    "cluster":{"id":"c","peers":[{"instance":"p","addresses":["10.0.0.3","fd00::3"]}]},
    "control_plane":{"sources":["192.0.2.0/24"]},
    "firewall":{"ingress":[
      {"id":"ssh","protocol":"tcp","from_port":22},
      {"id":"web","protocol":"tcp","from_port":8080},
      {"id":"metrics","protocol":"tcp","from_port":9100,
       "ip_ranges":["10.0.0.0/8","172.16.0.0/12","192.168.7.0/24","198.51.100.0/24","fd00::/8"]},
      {"id":"later","from_port":8443,"to_port":8450}]}}"#;

fn socket(transport: Transport, local: &str, unit: &str, program: &str) -> Socket {
    Socket {
        transport,
        local: local.parse().unwrap(),
        v6_only: true,
        interface: None,
        uid: 1000,
        inode: 1,
        unit: (!unit.is_empty()).then(|| unit.to_owned()),
        program: (!program.is_empty()).then(|| Program {
            pid: 7,
            file: Some(format!("/usr/bin/{program}")),
            name: program.to_owned(),
        }),
    }
}

fn seen(sockets: &[Socket]) -> Exposure {
    let gate = ruleset(firewall::Inputs {
        spec: Some(&Spec::from_json(SPEC.as_bytes()).unwrap()),
        internal: &["docker0".to_owned()].into(),
        ..firewall::Inputs::default()
    });
    let to = |port, family| Published {
        transport: Tcp,
        port,
        family,
        to: "DNAT to 172.17.0.2:80".into(),
        table: "ip nat".into(),
    };
    let others = Comparison {
        published: vec![to(8080, Family::Ipv4), to(8081, Family::Ipv4)],
        ..Comparison::default()
    };
    judge(Inputs {
        sockets,
        ephemeral: &BTreeSet::from([40_000]),
        gate: &gate,
        uplinks: &[],
        others: &others,
    })
}

fn shown(exposure: &Exposure, width: usize) -> String {
    let observations = Observations {
        exposure: Ok(exposure.clone()),
        ..Observations::unseen("no")
    };
    let all = checks(None, &observations, &[], Timestamp::UNIX_EPOCH);
    let check = all
        .iter()
        .find(|check| check.id == CheckId::ExposureListeners)
        .unwrap();
    anstream::adapter::strip_str(&text(exposure, check, width)).to_string()
}

#[test]
fn the_table_fits_and_says_who_by_which_rule() {
    let sockets = [
        socket(Tcp, "0.0.0.0:22", "ssh.service", "sshd"),
        socket(Tcp, "[::]:22", "ssh.service", "sshd"),
        socket(Tcp, "0.0.0.0:8080", "docker.service", "docker-proxy"),
        socket(
            Tcp,
            "0.0.0.0:9100",
            "node-exporter.service",
            "prometheus-node-exporter",
        ),
        socket(Tcp, "[::]:7443", "portcullis.service", ""),
        socket(Tcp, "10.0.0.2:5432", "postgresql@15-main.service", "postgres"),
        socket(Udp, "0.0.0.0:40000", "systemd-timesyncd.service", ""),
        socket(
            Udp,
            "127.0.0.53:53",
            "systemd-resolved.service",
            "systemd-resolved",
        ),
        socket(Tcp, "127.0.0.1:631", "", ""),
    ];
    let text = shown(&seen(&sockets), 80);
    println!("{text}");
    assert_eq!(text, include_str!("table.txt").trim_end());
    for line in text.lines() {
        assert!(line.chars().count() <= 80, "{line}");
    }
}

#[test]
fn names_of_others_are_words_and_nothing_else() {
    let evil = "x\n  22/tcp  sshd\u{1b}[2J\u{202e}";
    let unit = format!("{evil}.service");
    let exposure = seen(&[socket(Tcp, "[::]:7443", &unit, evil)]);
    for width in [40, 80, usize::MAX] {
        let text = shown(&exposure, width);
        assert!(text.chars().all(|c| c == '\n' || !c.is_control()), "{text:?}");
        assert!(!text.contains('\u{202e}'), "{text:?}");
        assert!(
            !text.lines().any(|line| line.trim_start().starts_with("22/tcp")),
            "{text}"
        );
    }
}

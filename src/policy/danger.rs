//! What a change of the spec could cut off: SSH, the control plane, the cluster. Such a change is made on
//! trial, or on purpose.
//!
//! May not live here: what is done about it.

use ipnet::IpNet;
use portcullis_protocol::{Protocol, Spec};

/// What `new` cuts off that `old` let in, as clauses for an operator. `ssh_ports` are sshd's.
pub fn dangers(old: &Spec, new: &Spec, ssh_ports: &[u16]) -> Vec<String> {
    let mut dangers = Vec::new();
    let lost = |before: Vec<IpNet>, after: &[IpNet]| {
        before
            .into_iter()
            .find(|net| !after.iter().any(|other| other.contains(net)))
    };
    if let Some(net) = lost(ssh_sources(old, ssh_ports), &ssh_sources(new, ssh_ports)) {
        dangers.push(format!("SSH is no longer let in from {net}"));
    }
    if let Some(net) = lost(control_sources(old), &control_sources(new)) {
        dangers.push(format!("the control plane is no longer let in from {net}"));
    }
    if old.peer_addresses().next().is_some() && new.peer_addresses().next().is_none() {
        dangers.push("no peer of the cluster is left".to_owned());
    }
    if !old.authorized_keys.is_empty() && new.authorized_keys.is_empty() {
        dangers.push("no authorized key is left".to_owned());
    }
    dangers
}

fn ssh_sources(spec: &Spec, ports: &[u16]) -> Vec<IpNet> {
    let everywhere = || {
        [
            IpNet::from(ipnet::Ipv4Net::default()),
            ipnet::Ipv6Net::default().into(),
        ]
    };
    let rules = spec.firewall.ingress.iter().filter(|rule| {
        matches!(rule.protocol, Protocol::Tcp | Protocol::Any)
            && rule
                .ports
                .is_some_and(|range| ports.iter().any(|port| range.contains(*port)))
    });
    rules
        .flat_map(|rule| match rule.sources.as_slice() {
            [] => everywhere().to_vec(),
            sources => sources.iter().map(|source| source.net()).collect(),
        })
        .collect()
}

fn control_sources(spec: &Spec) -> Vec<IpNet> {
    let sources = spec.control_plane.iter().flat_map(|control| &control.sources);
    sources.map(|source| source.net()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(rest: &str) -> Spec {
        let json = format!(r#"{{"version":1,"generation":1,"instance":{{"id":"i"}}{rest}}}"#);
        Spec::from_json(json.as_bytes()).unwrap()
    }

    const FULL: &str = r#","cluster":{"id":"c","peers":[{"instance":"p","addresses":["10.0.0.3"]}]},
        "control_plane":{"sources":["192.0.2.0/24"]},
        "authorized_keys":[{"user":"u","key":"ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIF2d3G4Uk7mWlw9tD5zQ0T1q4c9kC1S6pT3q1z1V2h3K a"}],
        "firewall":{"ingress":[{"id":"ssh","protocol":"tcp","from_port":22,"ip_ranges":["0.0.0.0/0","::/0"]}]}"#;

    #[test]
    fn each_thing_that_is_cut_off_is_named() {
        let full = spec(FULL);
        assert_eq!(dangers(&full, &full, &[22]), Vec::<String>::new());
        for (from, to, expected) in [
            (r#""from_port":22"#, r#""from_port":80"#, "SSH"),
            (
                r#""0.0.0.0/0","::/0""#,
                r#""10.0.0.0/8","::/0""#,
                "SSH is no longer let in from 0.0.0.0/0",
            ),
            ("192.0.2.0/24", "192.0.2.0/25", "control plane"),
            (r#"{"instance":"p","addresses":["10.0.0.3"]}"#, "", "no peer"),
        ] {
            let after = FULL.replace(from, to);
            assert_ne!(after, FULL);
            let dangers = dangers(&full, &spec(&after), &[22]);
            assert!(
                matches!(dangers.as_slice(), [one] if one.contains(expected)),
                "{dangers:?}"
            );
        }
        assert_eq!(dangers(&full, &spec(""), &[22]).len(), 4);
    }

    #[test]
    fn wider_and_elsewhere_is_no_danger() {
        let narrow =
            spec(r#","firewall":{"ingress":[{"id":"a","from_port":22,"ip_ranges":["10.1.0.0/16"]}]}"#);
        let wide =
            spec(r#","firewall":{"ingress":[{"id":"b","protocol":"tcp","from_port":20,"to_port":30}]}"#);
        assert_eq!(dangers(&narrow, &wide, &[22]), Vec::<String>::new());
        assert_eq!(dangers(&narrow, &spec(""), &[2222]), Vec::<String>::new());
    }
}

//! What tests of the gate share: specs, plans, a runtime as the daemon has it, and the table as text.

use std::time::Duration;

use portcullis::config::Settings;
use portcullis::policy::firewall::{Inputs, ruleset};
use portcullis::policy::observation;
use portcullis::policy::ruleset::Ruleset;
use portcullis::system::nftables::{Held, Nftables};
use portcullis_protocol::Spec;

pub fn spec(peers: u32, rules: &[&str]) -> Spec {
    let address = |i: u32| format!("10.{}.{}.{}", i >> 16, i >> 8 & 255, i & 255);
    spec_of((0..peers).map(address), rules)
}

/// A spec with a peer at each of these addresses, and what the rules say.
pub fn spec_of(peers: impl IntoIterator<Item = String>, rules: &[impl AsRef<str>]) -> Spec {
    let peers = peers.into_iter().enumerate();
    let peers = peers.map(|(i, address)| format!(r#"{{"instance":"p{i}","addresses":["{address}"]}}"#));
    let peers: Vec<String> = peers.collect();
    let rules: Vec<&str> = rules.iter().map(AsRef::as_ref).collect();
    let json = format!(
        r#"{{"version":1,"generation":1,"instance":{{"id":"i-1"}},
           "cluster":{{"id":"c","peers":[{}]}},"firewall":{{"ingress":[{}]}}}}"#,
        peers.join(","),
        rules.join(",")
    );
    Spec::from_json(json.as_bytes()).unwrap()
}

pub const SSH: &str = r#"{"id":"ssh","protocol":"tcp","from_port":22}"#;
pub const WEB: &str =
    r#"{"id":"web","protocol":"tcp","from_port":80,"ip_ranges":["10.9.0.0/24","192.0.2.0/24"]}"#;
pub const DNS: &str = r#"{"id":"dns","protocol":"udp","from_port":53,"ip_ranges":["10.9.0.0/24"]}"#;

pub fn planned(peers: u32, rules: &[&str]) -> Ruleset {
    let spec = spec(peers, rules);
    ruleset(Inputs {
        spec: Some(&spec),
        ..Inputs::default()
    })
}

/// Our table as `nft -s list table` prints it, without who owns it: the same for a daemon and the next one.
pub fn as_held(listed: &str) -> String {
    let lines = listed
        .lines()
        .map(|line| line.split(" # progname").next().unwrap_or_default());
    lines
        .filter(|line| !line.starts_with("\tflags"))
        .collect::<Vec<_>>()
        .join("\n")
}

pub fn read(nftables: &mut Nftables) -> Held {
    nftables.read().unwrap().expect("there is a table")
}

/// Settings of a guard: an exclusive table or a shared one.
pub fn settings(exclusive_table: bool) -> Settings {
    Settings {
        exclusive_table,
        ..Settings::default()
    }
}

/// A runtime as the daemon has it.
pub fn wait<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        tokio::time::timeout(Duration::from_secs(20), future)
            .await
            .expect("in time")
    })
}

pub fn is_in_place(gate: &observation::Gate) -> bool {
    gate.applied.is_ok()
        && gate
            .held
            .as_ref()
            .is_ok_and(|held| held.as_ref() == Some(&gate.planned))
}

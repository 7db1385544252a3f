//! Specs and plans of any size.
//!
//! May not live here: applying them.

use portcullis::config::Settings;
use portcullis::policy::firewall::{Inputs, ruleset};
use portcullis::policy::ruleset::Ruleset;
use portcullis_protocol::Spec;

pub use crate::common::table::spec_of as spec;

/// The address of a peer.
pub fn peer(number: usize) -> String {
    format!("10.{}.{}.{}", number >> 16, number >> 8 & 255, number & 255)
}

/// One rule, for anybody.
pub fn rule(protocol: &str, port: u16) -> String {
    format!(r#"{{"id":"{protocol}-{port}","protocol":"{protocol}","from_port":{port}}}"#)
}

/// So many peers, and SSH.
pub fn with_peers(count: usize) -> Spec {
    spec((0..count).map(peer), &[rule("tcp", 22)])
}

pub fn plan(spec: &Spec) -> Ruleset {
    ruleset(Inputs {
        spec: Some(spec),
        ..Inputs::default()
    })
}

/// The daemon's settings, with its table in others' reach or not.
pub fn settings(exclusive_table: bool) -> Settings {
    Settings {
        exclusive_table,
        ..Settings::default()
    }
}

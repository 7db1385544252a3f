//! The metadata lock: containers of this host do not reach the services that tell an instance its
//! user-data and hand out its credentials.
//!
//! May not live here: whether it is on (a setting), and how the host itself reaches them: its own
//! packets do not come in.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use portcullis_protocol::PortRange;

use super::ruleset::{Family, Match, Rule, Verdict};

/// Where such services answer, by the providers' own documents.
pub const ADDRESSES: [IpAddr; 6] = [
    // AWS IMDS, Google Cloud, Azure IMDS, OpenStack, Nebius.
    IpAddr::V4(Ipv4Addr::new(169, 254, 169, 254)),
    // AWS ECS: the task's credentials.
    IpAddr::V4(Ipv4Addr::new(169, 254, 170, 2)),
    // Alibaba Cloud.
    IpAddr::V4(Ipv4Addr::new(100, 100, 100, 200)),
    // Azure's wire server.
    IpAddr::V4(Ipv4Addr::new(168, 63, 129, 16)),
    // AWS IMDS.
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254)),
    // Google Cloud: fd20:ce::254.
    IpAddr::V6(Ipv6Addr::new(0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254)),
];

/// `IPPROTO_TCP` and `IPPROTO_UDP`, by which names are looked up.
const NAME_PROTOCOLS: [u8; 2] = [6, 17];
const NAME_PORT: u16 = 53;

/// The comment of the rules that refuse.
pub const LOCK: &str = "metadata lock";

/// Refuses what comes in by an interface of the set for one of [`ADDRESSES`]. Name look-ups go on: on
/// Google Cloud and Azure the name server has the same address.
pub fn rules(interfaces: &str) -> Vec<Rule> {
    let rule = |comment: &str, matches: Vec<Match>, verdict| Rule {
        comment: comment.to_owned(),
        matches: [vec![Match::InterfaceIn(interfaces.to_owned())], matches].concat(),
        log: None,
        counter: verdict == Verdict::Reject,
        verdict: Some(verdict),
    };
    let names = NAME_PROTOCOLS.map(|protocol| {
        let mut matches = vec![Match::Protocol(protocol)];
        matches.extend(PortRange::single(NAME_PORT).map(Match::DestinationPort));
        rule("base internal names", matches, Verdict::Accept)
    });
    let refused = ADDRESSES.map(|address| {
        let matches = vec![
            Match::Family(Family::of(address)),
            Match::Destination(address.into()),
        ];
        rule(LOCK, matches, Verdict::Reject)
    });
    names.into_iter().chain(refused).collect()
}

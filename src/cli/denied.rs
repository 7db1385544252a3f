//! `portcullis firewall denied`: how much was denied and why, and who sent most of it.

use clap::Args;
use ipnet::IpNet;
use portcullis_protocol::control::{Answer, Request};
use portcullis_protocol::denied::{DeniedSample, DeniedSource, DeniedTarget};
use serde_json::{Value, json};

use super::status::{ask, unexpected};
use super::{Failure, Format, Global, plain_table, print, print_json, require_root, runtime};
use crate::agent::denied::reasons;
use crate::system::nftables::{Count, Nftables};

/// Targets of a source that are shown.
const SHOWN_TARGETS: usize = 3;

#[derive(Args, Debug)]
pub struct DeniedArguments {
    /// How many sources are shown.
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u16).range(0..=1000))]
    top: u16,
}

pub fn run(global: &Global, arguments: &DeniedArguments) -> Result<(), Failure> {
    require_root("reading what was denied")?;
    let counts = Nftables::open().and_then(|mut nftables| nftables.counts());
    let counts = counts.map_err(|e| Failure::Failed(e.to_string()))?;
    let reasons = reasons(&counts);
    if reasons.is_empty() {
        let text = "the kernel holds no table inet portcullis: nothing is denied, and nothing counted \
            (is the daemon running? `systemctl status portcullis`)";
        return Err(Failure::Failed(text.to_owned()));
    }
    // The counters are the kernel's, and there without a daemon.
    let sample = sample(global, arguments.top).map_err(|failure| failure.to_string());
    match global.format {
        Format::Json => print_json(&document(&reasons, &sample)),
        Format::Table => print(&text(&reasons, &sample)),
    }
}

fn sample(global: &Global, top: u16) -> Result<DeniedSample, Failure> {
    let socket = global.settings()?.socket;
    let top = usize::from(top);
    match runtime()?.block_on(ask(&socket, &Request::Denied { top }))? {
        Answer::Denied { sample } => Ok(sample),
        other => Err(unexpected(&other)),
    }
}

fn document(reasons: &[(&str, Count)], sample: &Result<DeniedSample, String>) -> Value {
    let counted: Vec<_> = reasons
        .iter()
        .map(|(reason, count)| json!({"reason": reason, "packets": count.packets, "bytes": count.bytes}))
        .collect();
    match sample {
        Ok(sample) => json!({"counted": counted, "sample": sample}),
        Err(why) => json!({"counted": counted, "sample": null, "no_sample": why}),
    }
}

fn text(reasons: &[(&str, Count)], sample: &Result<DeniedSample, String>) -> String {
    let seen: Vec<_> = reasons.iter().filter(|(_, count)| count.packets > 0).collect();
    let counted = if seen.is_empty() {
        "Nothing was denied since the rules were put in place.".to_owned()
    } else {
        let rows = seen.iter().map(|(reason, count)| {
            [
                (*reason).to_owned(),
                count.packets.to_string(),
                count.bytes.to_string(),
            ]
        });
        let counters = table(["REASON", "PACKETS", "BYTES"], rows);
        format!("Denied since the rules were put in place; every packet is counted:\n{counters}")
    };
    let sources = match sample {
        Err(why) => format!("Who sent them is not known: {why}"),
        Ok(sample) if sample.packets == 0 => {
            format!("The daemon has seen none of them since {:.0}.", sample.since)
        }
        Ok(sample) => {
            let sources = table(
                ["SOURCE", "PACKETS", "LAST SEEN", "FOR"],
                sample.sources.iter().map(row),
            );
            format!(
                "Sources, from a sample of {} packets that no rule lets in, since {:.0} (at most 10 a second; a \
                 source can be forged):\n\
                 {sources}",
                sample.packets, sample.since
            )
        }
    };
    format!("{counted}\n\n{sources}")
}

fn row(source: &DeniedSource) -> [String; 4] {
    let mut targets: Vec<String> = source.targets.iter().take(SHOWN_TARGETS).map(target).collect();
    if source.targets.len() > SHOWN_TARGETS {
        targets.push("and others".to_owned());
    }
    let packets = match source.uncertainty {
        0 => source.packets.to_string(),
        _ => format!(
            "{} to {}",
            source.packets.saturating_sub(source.uncertainty),
            source.packets
        ),
    };
    [
        plain(source.source),
        packets,
        format!("{:.0}", source.last_seen),
        targets.join(", "),
    ]
}

fn target(target: &DeniedTarget) -> String {
    let DeniedTarget {
        protocol, packets, ..
    } = target;
    match (target.port, target.icmp_type) {
        (Some(port), _) => format!("{protocol} {port} ({packets})"),
        (None, Some(kind)) => format!("{protocol} type {kind} ({packets})"),
        (None, None) => format!("{protocol} ({packets})"),
    }
}

/// A single address without its length.
fn plain(net: IpNet) -> String {
    if net.prefix_len() == net.max_prefix_len() {
        return net.addr().to_string();
    }
    net.to_string()
}

fn table<const N: usize>(header: [&str; N], rows: impl Iterator<Item = [String; N]>) -> String {
    let mut table = plain_table(header);
    for row in rows {
        table.add_row(row);
    }
    table.trim_fmt()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counted(packets: u64) -> Count {
        Count {
            packets,
            bytes: packets * 40,
        }
    }

    #[test]
    fn what_is_exact_and_what_is_a_sample_is_said() {
        let none = text(&[("tcp", counted(0))], &Err("no daemon".into()));
        assert_eq!(
            none,
            "Nothing was denied since the rules were put in place.\n\nWho sent them is not known: no daemon"
        );
        let since = "2026-01-01T00:00:00Z".parse().unwrap();
        let sample = DeniedSample {
            since,
            packets: 9,
            sources: vec![DeniedSource {
                source: "203.0.113.7/32".parse().unwrap(),
                packets: 9,
                uncertainty: 2,
                last_seen: since,
                targets: vec![DeniedTarget {
                    protocol: "icmp".into(),
                    port: None,
                    icmp_type: Some(8),
                    packets: 9,
                }],
            }],
        };
        let some = text(&[("tcp", counted(0)), ("icmp", counted(30))], &Ok(sample));
        for expected in [
            "every packet is counted",
            "a sample of 9 packets",
            "203.0.113.7  7 to 9",
            "icmp type 8 (9)",
        ] {
            assert!(some.contains(expected), "{some}");
        }
        assert!(!some.contains("tcp"), "{some}");
    }
}

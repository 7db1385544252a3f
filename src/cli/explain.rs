//! `portcullis explain`: what the kernel does with a packet, and why.

use std::net::IpAddr;

use clap::Args;
use portcullis_protocol::Protocol;
use serde_json::json;

use super::{Failure, Format, Global, print, print_json, require_root};
use crate::agent::state::Store;
use crate::policy::explain::{Explanation, Packet, TCP_SYN, explain};
use crate::system::links;
use crate::system::nftables::Nftables;

/// `ICMP` and `ICMPv6` echo requests.
const ECHO: [(u8, u8); 2] = [(1, 8), (58, 128)];

#[derive(Args, Debug)]
pub struct ExplainArguments {
    /// Where the packet comes from.
    #[arg(long, value_name = "ADDR")]
    from: IpAddr,
    /// Where it goes to; an address of this host, if left out.
    #[arg(long, value_name = "ADDR")]
    to: Option<IpAddr>,
    /// tcp, udp, icmp (an echo request) or an IP protocol number.
    #[arg(long)]
    protocol: Protocol,
    /// The port that the sender dials; for tcp and udp.
    #[arg(long)]
    port: Option<u16>,
    /// The interface that it comes in by; the one with a default route, if left out.
    #[arg(long, value_name = "NAME")]
    interface: Option<String>,
}

pub fn run(global: &Global, arguments: &ExplainArguments) -> Result<(), Failure> {
    let (protocol, icmp_type) = protocol(arguments)?;
    require_root("reading the kernel's rules")?;
    let settings = global.settings()?;
    let packet = Packet {
        interface: interface(arguments)?,
        source: arguments.from,
        destination: arguments.to,
        outgoing: outgoing(arguments)?,
        protocol,
        source_port: None,
        port: arguments.port,
        tcp_flags: TCP_SYN,
        icmp_type,
        hop_limit: 64,
        conntrack: None,
    };
    let failed = |error: &dyn std::fmt::Display| Failure::Failed(error.to_string());
    let held = Nftables::open()
        .and_then(|mut nftables| nftables.read())
        .map_err(|e| failed(&e))?;
    // The spec only names where a rule comes from.
    let spec = Store::new(&settings.state_dir).spec().ok().flatten();
    let explanation = explain(
        &held.map(|held| held.ruleset).unwrap_or_default(),
        &packet,
        spec.as_ref(),
    );
    match global.format {
        Format::Json => print_json(&json!({"interface": packet.interface, "explanation": explanation})),
        Format::Table => print(&text(&packet, &explanation)),
    }
}

fn protocol(arguments: &ExplainArguments) -> Result<(u8, Option<u8>), Failure> {
    let bad = |text: &str| Err(Failure::BadInput(text.to_owned()));
    if let Some(to) = arguments.to
        && to.is_ipv4() != arguments.from.is_ipv4()
    {
        return bad("--from and --to: one is IPv4 and the other IPv6");
    }
    let [v4, v6] = ECHO;
    match (arguments.protocol, arguments.port) {
        (Protocol::Tcp | Protocol::Udp, None | Some(0)) => {
            bad("--port is needed for tcp and udp: 1 to 65535")
        }
        (Protocol::Tcp, Some(_)) => Ok((6, None)),
        (Protocol::Udp, Some(_)) => Ok((17, None)),
        (Protocol::Any, _) => bad("--protocol: a packet has one protocol: tcp, udp, icmp or a number"),
        (_, Some(_)) => bad("--port: only tcp and udp have ports"),
        (Protocol::Icmp, None) => {
            let (number, kind) = if arguments.from.is_ipv4() { v4 } else { v6 };
            Ok((number, Some(kind)))
        }
        (Protocol::Number(number), None) => Ok((number, None)),
    }
}

fn interface(arguments: &ExplainArguments) -> Result<String, Failure> {
    if let Some(name) = &arguments.interface {
        return Ok(name.clone());
    }
    let links = links::read().map_err(|e| Failure::Failed(format!("links can't be read: {e}")))?;
    let uplink = links.into_iter().find(|link| link.has_default_route);
    uplink.map(|link| link.name).ok_or_else(|| {
        Failure::BadInput("no interface has a default route: say which one with --interface".to_owned())
    })
}

/// A destination that is no address of this host would be forwarded.
fn outgoing(arguments: &ExplainArguments) -> Result<Option<String>, Failure> {
    let found = arguments.to.map(links::forwarded_to).transpose();
    let failed = |error| Failure::Failed(format!("the route can't be looked up: {error}"));
    found.map(Option::flatten).map_err(failed)
}

fn text(packet: &Packet, explanation: &Explanation) -> String {
    let verdict = match explanation.verdict {
        Some(verdict) => verdict.to_string().to_uppercase(),
        None => "UNKNOWN (a rule of somebody else can't be judged)".to_owned(),
    };
    let rule = explanation.rule.as_deref().unwrap_or("(the chain's policy)");
    format!(
        "{verdict}  a new flow from {} by {}\n  because:     {}\n  rule:        {rule}\n  requirement: {} {}",
        packet.source,
        packet.interface,
        explanation.origin,
        explanation.requirement,
        explanation.requirement.text(),
    )
}

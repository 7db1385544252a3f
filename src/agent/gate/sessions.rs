//! TCP sessions that a change of the gate concerns: those that are older than it, and those whose
//! rule or peer is gone.
//!
//! The gate itself stops the packets of the latter; ending their sockets tells both ends, and frees
//! a shell that would otherwise wait for hours.
//! May not live here: reading sockets (`system::sockets`).

use std::collections::BTreeSet;
use std::net::IpAddr;

use tracing::{debug, info};

use crate::log::id;
use crate::policy::explain::{Packet, TCP_SYN, explain};
use crate::policy::ruleset::{Ruleset, Verdict};
use crate::system::links;
use crate::system::sockets::{self, Session};

/// Hosts with a session that the rules would not let in, or that began here: packets of the latter may
/// come in before one goes out, and conntrack would take them for a flow from outside.
pub fn older_than_the_gate(planned: &Ruleset) -> BTreeSet<IpAddr> {
    let sessions = living().into_iter();
    sessions
        .filter(|session| !session.is_inbound || !lets_in(planned, &first_packet(session)))
        .map(|session| session.remote.ip())
        .collect()
}

/// Leaves only hosts that still have a session.
pub fn retain_living(hosts: &mut BTreeSet<IpAddr>) {
    let living: BTreeSet<IpAddr> = living().into_iter().map(|session| session.remote.ip()).collect();
    hosts.retain(|host| living.contains(host));
}

/// Ends the sessions from outside that the old rules let in and the new ones do not.
pub fn end_revoked(old: &Ruleset, new: &Ruleset) {
    for session in living().into_iter().filter(|session| session.is_inbound) {
        let packet = first_packet(&session);
        if !lets_in(old, &packet) || lets_in(new, &packet) {
            continue;
        }
        let remote = session.remote;
        match sockets::end(&session) {
            Ok(()) => info!(
                MESSAGE_ID = id::SESSION_ENDED,
                REMOTE = %remote,
                LOCAL = %session.local,
                "the session of {remote} is ended: nothing lets it in any more"
            ),
            // Its packets are dropped all the same.
            Err(error) => debug!(%remote, %error, "a session's socket could not be ended"),
        }
    }
}

fn living() -> Vec<Session> {
    let mut sessions = sockets::sessions().unwrap_or_else(|error| {
        debug!(%error, "sockets can't be listed");
        Vec::new()
    });
    sessions
        .retain(|session| !session.remote.ip().is_loopback() && session.remote.ip() != session.local.ip());
    sessions
}

fn lets_in(ruleset: &Ruleset, packet: &Packet) -> bool {
    explain(ruleset, packet, None).verdict == Some(Verdict::Accept)
}

/// The packet that would begin the session anew.
fn first_packet(session: &Session) -> Packet {
    Packet {
        interface: links::interface_to(session.remote.ip())
            .ok()
            .flatten()
            .unwrap_or_default(),
        source: session.remote.ip(),
        destination: Some(session.local.ip()),
        outgoing: None,
        protocol: 6,
        source_port: Some(session.remote.port()),
        port: Some(session.local.port()),
        tcp_flags: TCP_SYN,
        icmp_type: None,
        hop_limit: 64,
        conntrack: None,
    }
}

//! Who gets at what listens: looked at whenever a report is written, and for `portcullis firewall exposure`.
//!
//! No event tells of a new socket. The daemon looks whenever anything else made it look (systemd tells of
//! each unit that starts) and whenever somebody asks how it is, and keeps no timer for it.
//! May not live here: judging (`policy::exposure`).

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Agent;
use crate::policy::conflicts::{Comparison, uplinks};
use crate::policy::exposure::socket::activated_by;
use crate::policy::exposure::{Exposure, Inputs, judge};
use crate::policy::links::{Link, LinkSettings};
use crate::policy::observation::{Gate, Observed};
use crate::policy::ruleset::Ruleset;
use crate::system::as_user::off_thread;
use crate::system::listeners::Found;
use crate::system::{addresses, links, listeners, socket_owners, socket_units};

/// Shortest time between two looks that somebody causes by asking.
const PAUSE: Duration = Duration::from_secs(1);

/// The unit of systemd's own process.
const INIT: &str = "init.scope";

impl Agent {
    /// Looks, whatever is known.
    pub(super) async fn look_at_exposure(&mut self) {
        let start = Instant::now();
        let (gate, links) = (&self.seen.gate, &self.settings.links);
        self.seen.exposure = look(gate, &self.seen.conflicts, links, false).await;
        self.metrics.durations.took("exposure", start);
        self.exposure_seen = Some(Instant::now());
    }

    /// Looks because somebody asks how it is; if something else is seen, the report says so from then on.
    pub(super) async fn look_at_exposure_again(&mut self) {
        let is_fresh = self.exposure_seen.is_none_or(|seen| seen.elapsed() < PAUSE);
        if is_fresh || self.report.is_none() {
            return;
        }
        let before = self.seen.exposure.clone();
        self.look_at_exposure().await;
        let is_news = match (&before, &self.seen.exposure) {
            (Ok(before), Ok(now)) => now.is_news_after(before),
            (before, now) => before != now,
        };
        if is_news {
            self.publish();
        }
    }
}

/// What is judged, as it was read.
struct Seen {
    found: Found,
    links: Vec<Link>,
    addresses: Vec<(String, IpAddr)>,
}

/// Looks at all sockets and judges them against what the kernel holds, off the caller's thread. Programs are
/// named only where that is asked for: it takes rights that the daemon does not have.
///
/// # Errors
/// When the sockets, the gate, other tables or the links can't be read.
pub async fn look(
    gate: &Arc<Gate>,
    others: &Observed<Comparison>,
    settings: &LinkSettings,
    programs: bool,
) -> Observed<Exposure> {
    let others = others.clone();
    let others = others.map_err(|reason| format!("other tables can't be read: {reason}"))?;
    let mut seen = off_thread(move || read(programs))
        .await
        .map_err(|e| e.to_string())??;
    let unread = name_units(&mut seen.found).await;
    let (gate, settings) = (gate.clone(), settings.clone());
    let exposure = off_thread(move || judged(&seen, &gate, &others, &settings)).await;
    let mut exposure = exposure.map_err(|e| e.to_string())??;
    exposure.not_looked_into.extend(unread);
    Ok(exposure)
}

fn read(programs: bool) -> Observed<Seen> {
    let links = links::read().map_err(|error| format!("links can't be read: {error}"))?;
    let addresses = addresses::read().map_err(|error| format!("addresses can't be read: {error}"))?;
    let names: BTreeMap<u32, String> = links.iter().map(|link| (link.index, link.name.clone())).collect();
    let mut found = listeners::read(&names)
        .map_err(|error| format!("the kernel does not list sockets (sock_diag): {error}"))?;
    if programs {
        name_programs(&mut found);
    }
    Ok(Seen {
        found,
        links,
        addresses,
    })
}

fn judged(seen: &Seen, gate: &Gate, others: &Comparison, settings: &LinkSettings) -> Observed<Exposure> {
    let held = gate.held.as_ref();
    let held = held.map_err(|reason| format!("nf_tables can't be read: {reason}"))?;
    let empty = Ruleset::default();
    Ok(judge(Inputs {
        sockets: &seen.found.sockets,
        ephemeral: &seen.found.ephemeral,
        gate: held.as_deref().unwrap_or(&empty),
        uplinks: &uplinks(&seen.links, settings, &seen.addresses),
        others,
    }))
}

/// What systemd's own process listens for belongs to its socket units.
async fn name_units(found: &mut Found) -> Option<String> {
    let is_inits = |unit: &Option<String>| unit.as_deref() == Some(INIT);
    if !found.sockets.iter().any(|socket| is_inits(&socket.unit)) {
        return None;
    }
    match socket_units::listens().await {
        Ok(listens) => {
            for socket in found.sockets.iter_mut().filter(|socket| is_inits(&socket.unit)) {
                if let Some(unit) = activated_by(socket, &listens) {
                    socket.unit = Some(unit.to_owned());
                }
            }
            None
        }
        Err(reason) => Some(reason),
    }
}

fn name_programs(found: &mut Found) {
    let inodes = found.sockets.iter().map(|socket| socket.inode).collect();
    let mut programs = socket_owners::programs(&inodes);
    for socket in &mut found.sockets {
        socket.program = programs.remove(&socket.inode);
    }
}

//! Listening sockets and published ports against the gate: who reaches them, and by which rule.
//!
//! The gate is asked what it does with packets, as `explain` asks it; nothing is judged a second time here.
//! Each of its rules that lets in is asked about once, with one of its sources: a hundred thousand peers are
//! one question. What comes out is an upper bound: another program's table may still drop it, and that is
//! named beside it and changes nothing else, for such a rule may go at any time.
//! May not live here: looking at sockets (`system::listeners`), the check's status (`readiness`).

pub mod cleartext;
mod grants;
pub mod socket;
#[cfg(test)]
mod tests;
mod who;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use serde::Serialize;

use super::conflicts::{Comparison, Conflict, Uplink};
use super::firewall::INTERNAL;
use super::ruleset::{Elements, Family, Ruleset};
use cleartext::Cleartext;
use grants::Doors;
use socket::{Program, Socket, Transport};
pub use who::{Grant, Who};
use who::{is_of_the_spec, merged};

/// What is judged.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a> {
    /// The sockets.
    pub sockets: &'a [Socket],
    /// UDP ports of clients: those that nobody gets at but peers are only counted.
    pub ephemeral: &'a BTreeSet<u16>,
    /// What the kernel holds; an empty one lets everything in.
    pub gate: &'a Ruleset,
    /// By which interfaces the outside comes in.
    pub uplinks: &'a [Uplink],
    /// What other programs' tables drop and translate.
    pub others: &'a Comparison,
}

/// Who gets at what.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Exposure {
    /// What listens, the most exposed first.
    pub listeners: Vec<Listener>,
    /// What a rule opens and nobody listens on.
    pub unserved: Vec<Unserved>,
    /// Interfaces of this host's containers: what comes by them reaches every listener that is not on loopback.
    pub internal_interfaces: Vec<String>,
    /// UDP sockets of clients that nobody gets at but peers.
    pub clients: usize,
    /// What could not be looked into.
    pub not_looked_into: Vec<String>,
}

/// How far the outside gets, from the worst on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reach {
    /// Anybody gets in, or sources so many that it comes to the same.
    Anybody,
    /// That depends on a rule that can't be judged.
    Unknown,
    /// Sources that the spec names: of a rule, the control plane.
    Named,
    /// The cluster's peers, and nobody else.
    Peers,
    /// What every host needs, answers to its DHCP client for one.
    Base,
    /// Nobody outside: it is bound to an interface of this host's containers.
    Containers,
    /// Nobody: the gate shuts it.
    Nobody,
    /// Nobody but this host itself.
    Loopback,
}

/// One thing that listens: sockets of one owner on a port, or a port that is translated, or both.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Listener {
    /// TCP or UDP.
    pub protocol: Transport,
    /// The port that the outside dials.
    pub port: u16,
    /// What its sockets are bound to; `*` is every address of both IP versions. Empty without a socket.
    pub listens_on: BTreeSet<String>,
    /// The systemd unit that made the socket, if that is known.
    pub unit: Option<String>,
    /// The program that holds it, if that is known.
    pub program: Option<Program>,
    /// Whose the socket is; none without one.
    pub uid: Option<u32>,
    /// Where another table translates it to, for example `172.17.0.2:80`.
    pub published_to: BTreeSet<String>,
    /// How far the outside gets.
    pub reach: Reach,
    /// Who gets in, and by which rule.
    pub by: Vec<Grant>,
    /// What it speaks, if that usually is in cleartext.
    pub cleartext: Option<Cleartext>,
}

/// A port, or several, that a rule opens and nobody listens on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Unserved {
    /// The rule, for example `rule web`.
    pub rule: String,
    /// Protocol and ports, for example `tcp 80-90`.
    pub ports: Vec<String>,
    /// For whom it is open.
    pub who: Vec<Who>,
}

/// Sockets with the same key are one listener.
type Key = (Transport, u16, Option<String>, Option<String>, Option<u32>, Kind);

/// Where a socket can be reached at all.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Loopback,
    Containers,
    Outside,
}

#[derive(Default)]
struct Gathered {
    families: BTreeSet<Family>,
    listens_on: BTreeSet<String>,
    program: Option<Program>,
    published: BTreeMap<Family, String>,
}

/// Judges everything.
pub fn judge(inputs: Inputs<'_>) -> Exposure {
    let internal = internal(inputs.gate);
    let gathered = gather(inputs, &internal);
    let outside = inputs.uplinks.first().map_or("(outside)", |uplink| &uplink.name);
    let doors = Doors::of(inputs.gate, outside);
    let wanted: BTreeSet<(Transport, u16)> = gathered.keys().map(|key| (key.0, key.1)).collect();
    let grants = doors.ask(&wanted);
    let mut exposure = Exposure {
        internal_interfaces: internal.into_iter().collect(),
        not_looked_into: inputs.others.unpublished.clone(),
        ..Exposure::default()
    };
    let mut served = BTreeSet::new();
    for (key, gathered) in gathered {
        let (transport, port) = (key.0, key.1);
        let all = grants
            .get(&(transport, port))
            .map(Vec::as_slice)
            .unwrap_or_default();
        let listener = listener(key, gathered, all, &inputs.others.conflicts);
        if matches!(listener.reach, Reach::Loopback | Reach::Containers) {
            exposure.listeners.push(listener);
            continue;
        }
        served.insert((transport, port));
        let is_shut = matches!(listener.reach, Reach::Nobody | Reach::Peers);
        if is_shut && transport == Transport::Udp && inputs.ephemeral.contains(&port) {
            exposure.clients += 1;
        } else {
            exposure.listeners.push(listener);
        }
    }
    exposure
        .listeners
        .sort_by(|a, b| (a.reach, a.port, a.protocol, &a.unit).cmp(&(b.reach, b.port, b.protocol, &b.unit)));
    exposure.unserved = doors.unserved(&served);
    exposure
}

/// Interfaces that the gate does not filter.
fn internal(gate: &Ruleset) -> BTreeSet<String> {
    match gate.set(INTERNAL).map(|set| &set.elements) {
        Some(Elements::Interfaces(names)) => names.clone(),
        _ => BTreeSet::new(),
    }
}

fn gather(inputs: Inputs<'_>, internal: &BTreeSet<String>) -> BTreeMap<Key, Gathered> {
    let mut all: BTreeMap<Key, Gathered> = BTreeMap::new();
    for socket in inputs.sockets {
        let on_internal = socket
            .interface
            .as_ref()
            .is_some_and(|name| internal.contains(name));
        let kind = match (socket.is_loopback(), on_internal) {
            (true, _) => Kind::Loopback,
            (_, true) => Kind::Containers,
            _ => Kind::Outside,
        };
        let program = socket.program.as_ref().map(|program| program.short().to_owned());
        let key = (
            socket.transport,
            socket.local.port(),
            socket.unit.clone(),
            program,
            Some(socket.uid),
            kind,
        );
        let gathered = all.entry(key).or_default();
        gathered.families.extend(socket.families());
        gathered.listens_on.insert(socket.bound_to());
        let lowest = gathered.program.iter().chain(&socket.program).min().cloned();
        gathered.program = lowest;
    }
    publish(inputs.others, &mut all);
    all
}

/// A translated port that has a socket too is one with it: Docker's proxy holds it for this host's own use.
fn publish(others: &Comparison, all: &mut BTreeMap<Key, Gathered>) {
    for published in &others.published {
        let is_it =
            |key: &&Key| (key.0, key.1, &key.5) == (published.transport, published.port, &Kind::Outside);
        let key = all.keys().find(is_it).cloned();
        let key = key.unwrap_or((
            published.transport,
            published.port,
            None,
            None,
            None,
            Kind::Outside,
        ));
        let gathered = all.entry(key).or_default();
        gathered.families.insert(published.family);
        gathered.published.insert(published.family, published.to.clone());
    }
}

fn listener(key: Key, gathered: Gathered, all: &[Grant], conflicts: &[Conflict]) -> Listener {
    let (transport, port, unit, _, uid, kind) = key;
    let mut by = Vec::new();
    if kind == Kind::Outside {
        for grant in all {
            let families: BTreeSet<Family> =
                grant.families.intersection(&gathered.families).copied().collect();
            if !families.is_empty() {
                let dropped_by = dropped_by(grant, conflicts, gathered.published.is_empty());
                by.push(Grant {
                    families,
                    dropped_by,
                    ..grant.clone()
                });
            }
        }
    }
    let reach = match kind {
        Kind::Loopback => Reach::Loopback,
        Kind::Containers => Reach::Containers,
        Kind::Outside => by
            .iter()
            .map(|grant| grant.who.reach())
            .min()
            .unwrap_or(Reach::Nobody),
    };
    let published_to: BTreeSet<String> = gathered.published.into_values().map(|to| target(&to)).collect();
    let names: Vec<&str> = gathered
        .program
        .iter()
        .map(Program::short)
        .chain(unit.as_deref())
        .collect();
    let inner = published_to.iter().find_map(|to| to.parse::<SocketAddr>().ok());
    let cleartext = cleartext::usually(transport, inner.map_or(port, |to| to.port()), &names);
    Listener {
        protocol: transport,
        port,
        listens_on: gathered.listens_on,
        unit,
        program: gathered.program,
        uid,
        published_to,
        reach,
        by: merged(by),
        cleartext,
    }
}

/// `DNAT to 172.17.0.2:80` goes to `172.17.0.2:80`.
fn target(words: &str) -> String {
    let lower = words.to_ascii_lowercase();
    match words.split_once(" to ") {
        Some((_, to)) => to.to_owned(),
        None if lower.starts_with("redir") => "another port of this host".to_owned(),
        None => "another address".to_owned(),
    }
}

/// Who else drops what the rule lets in. What is translated to a container passes no chain at input.
fn dropped_by(grant: &Grant, conflicts: &[Conflict], to_this_host: bool) -> Option<String> {
    let hits = |conflict: &&Conflict| {
        let on_the_way = to_this_host || conflict.hook != "input";
        on_the_way && conflict.hits.iter().any(|hit| hit.rule == grant.rule)
    };
    let conflict = conflicts.iter().find(hits)?;
    let verb = if conflict.certain { "drops" } else { "may drop" };
    Some(format!(
        "table {}, chain {} {verb} it",
        conflict.table, conflict.chain
    ))
}

impl Exposure {
    /// Whether something else is told than before: clients' sockets come and go, and are not.
    pub fn is_news_after(&self, before: &Self) -> bool {
        self.listeners != before.listeners
            || self.unserved != before.unserved
            || self.internal_interfaces != before.internal_interfaces
            || self.not_looked_into != before.not_looked_into
    }

    /// Listeners that somebody outside gets at.
    pub fn reachable(&self) -> impl Iterator<Item = &Listener> {
        self.listeners.iter().filter(|listener| listener.is_reachable())
    }
}

impl Listener {
    /// Whether somebody outside gets at it.
    pub fn is_reachable(&self) -> bool {
        matches!(
            self.reach,
            Reach::Anybody | Reach::Unknown | Reach::Named | Reach::Peers | Reach::Base
        )
    }

    /// Whether anybody gets at it, and no rule of the spec says so.
    pub fn is_unnamed(&self) -> bool {
        let wrong = |grant: &Grant| grant.who.reach() == Reach::Anybody && !is_of_the_spec(&grant.rule);
        self.by.iter().any(wrong)
    }

    /// Whether anybody gets at it by a rule that names so many ports that nobody meant this one.
    pub fn is_swept_in(&self) -> bool {
        let mut anybody = self
            .by
            .iter()
            .filter(|grant| grant.who.reach() == Reach::Anybody)
            .peekable();
        anybody.peek().is_some() && anybody.all(|grant| grant.is_sweeping)
    }
}

//! What we let in and another program's table drops: accepting is not final in nf_tables.
//!
//! For each rule of the gate that lets something in, packets that stand for it are followed through
//! every other base chain at prerouting and input. Chains at forward are not judged: what is
//! forwarded was translated to a container's address and port, and its filter is the container
//! program's business. A packet that another table translates is judged up to there.
//! May not live here: reading tables (`system::nftables::foreign`), advice (`readiness`).

mod packets;
pub mod published;
#[cfg(test)]
mod tests;
mod walk;

use std::net::IpAddr;

use portcullis_protocol::PortRange;

use super::foreign::{Chain, Foreign, Table};
use super::links::{Link, LinkSettings, internal};
use super::ruleset::{Hook, PREROUTING, Ruleset};
use packets::{Tried, tried};
use published::Published;
use walk::{Outcome, Place, Walk};

/// `NF_INET_LOCAL_IN`.
pub const INPUT: u32 = 1;

/// How many uplinks are asked about.
const MAX_UPLINKS: usize = 8;
/// How many conflicts are kept.
pub const MAX_CONFLICTS: usize = 20;
/// How many of our rules are kept for each.
const MAX_HITS: usize = 20;
/// How many rules are looked at, all packets together: under a second's work.
const BUDGET: usize = 5_000_000;

/// An interface by which the outside comes in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Uplink {
    /// Its name.
    pub name: String,
    /// Its index.
    pub index: u32,
    /// This host's addresses on it, those of a wider scope first.
    pub addresses: Vec<IpAddr>,
}

/// The interfaces by which the outside comes in: those with a default route and those that the settings
/// name; if there are none, all that are not internal.
pub fn uplinks(links: &[Link], settings: &LinkSettings, addresses: &[(String, IpAddr)]) -> Vec<Uplink> {
    let known = |link: &&Link| link.has_default_route || settings.uplinks.contains(&link.name);
    let internal = internal(links, settings);
    let outside = |link: &&Link| link.name != "lo" && !internal.contains(&link.name);
    let mut chosen: Vec<&Link> = links.iter().filter(known).filter(outside).collect();
    if chosen.is_empty() {
        chosen = links.iter().filter(outside).collect();
    }
    let uplink = |link: &Link| {
        let here = addresses.iter().filter(|(name, _)| *name == link.name);
        let mut addresses: Vec<IpAddr> = here.map(|(_, address)| *address).collect();
        addresses.sort_by_key(|address| is_link_local(*address));
        Uplink {
            name: link.name.clone(),
            index: link.index,
            addresses,
        }
    };
    chosen.into_iter().take(MAX_UPLINKS).map(uplink).collect()
}

fn is_link_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    }
}

/// What came of comparing what we let in with what others drop.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Comparison {
    /// Where what we let in is dropped, or may be.
    pub conflicts: Vec<Conflict>,
    /// How many more there are than were kept.
    pub omitted: usize,
    /// How many packets were tried.
    pub tried: usize,
    /// How many of our rules let something in.
    pub let_in: usize,
    /// What could not be looked into, each with the reason and the fix.
    pub unread: Vec<String>,
    /// What other tables translate of what comes from outside.
    pub published: Vec<Published>,
    /// What of that could not be looked into.
    pub unpublished: Vec<String>,
}

/// A place where another program drops what we let in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conflict {
    /// Family and name of the table, for example `ip filter`.
    pub table: String,
    /// The chain that drops.
    pub chain: String,
    /// The hook by which the packet came there: `prerouting` or `input`.
    pub hook: &'static str,
    /// The base chain's priority at the hook.
    pub priority: i32,
    /// The rule's handle; none for a policy, and in legacy iptables.
    pub handle: Option<u64>,
    /// The rule, as nft(8) would show it; or `policy drop`.
    pub rule: String,
    /// Whether it is dropped; if not, that depends on what can't be judged from here.
    pub certain: bool,
    /// Who keeps the table, as far as its names tell.
    pub program: Program,
    /// What of ours it drops; a packet for each rule.
    pub hits: Vec<Hit>,
}

/// A program that keeps tables of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    /// Known by chains that begin with `ufw`.
    Ufw,
    /// Known by the table's name, or chains of its zones.
    Firewalld,
    /// Known by chains or tables that begin with `f2b-`.
    Fail2ban,
    /// Somebody else; in nf_tables.
    Nftables,
    /// Somebody else; in legacy iptables.
    LegacyIptables,
}

/// A rule of ours that lets in what is dropped elsewhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hit {
    /// Its comment, for example `rule ssh`.
    pub rule: String,
    /// The packet that was tried.
    pub packet: String,
    /// The rule's IP protocol and destination ports, where it names them.
    pub opens: Option<(u8, PortRange)>,
}

/// Finds what the gate lets in and other tables drop. What comes by interfaces that are not uplinks is
/// not asked about.
pub fn find(gate: &Ruleset, uplinks: &[Uplink], foreign: Foreign) -> Comparison {
    let tried = tried(gate, uplinks);
    let mut found = Comparison {
        tried: tried.packets.len(),
        let_in: tried.rules,
        unread: foreign.unread,
        ..Comparison::default()
    };
    let bases = bases(&foreign.tables);
    let mut budget = BUDGET;
    (found.published, found.unpublished) =
        published::published(&foreign.tables, &bases, uplinks, &mut budget);
    budget = BUDGET;
    for packet in &tried.packets {
        follow(packet, &bases, &mut budget, &mut found);
        if budget == 0 {
            found.unread.push(format!(
                "other tables hold too many rules: only {BUDGET} steps of comparing are made"
            ));
            break;
        }
    }
    found
}

struct BaseChain<'a> {
    table: &'a Table,
    name: &'a str,
    chain: &'a Chain,
    hook: &'a Hook,
}

/// In the order in which a packet to this host passes them.
fn bases(tables: &[Table]) -> Vec<BaseChain<'_>> {
    let mut bases: Vec<BaseChain<'_>> = tables
        .iter()
        .flat_map(|table| {
            table.chains.iter().filter_map(move |(name, chain)| {
                let hook = chain.hook.as_ref()?;
                Some(BaseChain {
                    table,
                    name,
                    chain,
                    hook,
                })
            })
        })
        .filter(|base| [PREROUTING, INPUT].contains(&base.hook.number))
        .collect();
    bases.sort_by_key(|base| (base.hook.number, base.hook.priority));
    bases
}

fn follow(tried: &Tried, bases: &[BaseChain<'_>], budget: &mut usize, found: &mut Comparison) {
    for base in bases {
        let outcome = Walk::through(base.table, base.name, base.chain, &tried.arrival, budget);
        if *budget == 0 {
            // The walk ended early: what it came to is not true.
            return;
        }
        match outcome {
            Outcome::Passes => {}
            Outcome::Translated => return,
            Outcome::Dropped(place) => return found.add(base, place, true, tried.hit()),
            Outcome::MayBeDropped(place) => found.add(base, place, false, tried.hit()),
        }
    }
}

impl Conflict {
    fn is_at(&self, other: &Self) -> bool {
        let place = |c: &Self| (c.hook, c.priority, c.handle, c.certain);
        place(self) == place(other)
            && (&self.table, &self.chain, &self.rule) == (&other.table, &other.chain, &other.rule)
    }
}

impl Comparison {
    fn add(&mut self, base: &BaseChain<'_>, place: Place<'_>, certain: bool, hit: Hit) {
        let conflict = Conflict {
            table: base.table.to_string(),
            chain: place.chain.to_owned(),
            hook: if base.hook.number == INPUT {
                "input"
            } else {
                "prerouting"
            },
            priority: base.hook.priority,
            handle: place.rule.and_then(|rule| rule.handle),
            rule: place
                .rule
                .map_or_else(|| "policy drop".to_owned(), ToString::to_string),
            certain,
            program: program(base.table, place.chain),
            hits: Vec::new(),
        };
        let at = self.conflicts.iter().position(|known| known.is_at(&conflict));
        if at.is_none() && self.conflicts.len() >= MAX_CONFLICTS {
            self.omitted += 1;
            return;
        }
        let at = at.unwrap_or_else(|| {
            self.conflicts.push(conflict);
            self.conflicts.len() - 1
        });
        let Some(kept) = self.conflicts.get_mut(at) else {
            return;
        };
        if kept.hits.len() < MAX_HITS && !kept.hits.iter().any(|known| known.rule == hit.rule) {
            kept.hits.push(hit);
        }
    }
}

fn program(table: &Table, chain: &str) -> Program {
    let has = |prefix: &str| table.chains.keys().any(|name| name.starts_with(prefix));
    if chain.starts_with("f2b-") || table.name.starts_with("f2b-") {
        Program::Fail2ban
    } else if table.name.starts_with("firewalld") || has("IN_public") {
        Program::Firewalld
    } else if has("ufw") {
        Program::Ufw
    } else if table.legacy {
        Program::LegacyIptables
    } else {
        Program::Nftables
    }
}

//! Whom the gate lets in, as values and in words.
//!
//! May not live here: finding out (`super::grants`).

use std::collections::BTreeSet;
use std::fmt;

use serde::Serialize;

use super::Reach;
use crate::policy::ruleset::Family;

/// Whom a rule lets in.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Who {
    /// Anybody.
    Anybody,
    /// That depends on what somebody else put into the gate.
    Unknown,
    /// Named sources.
    Sources {
        /// Some of them.
        ranges: Vec<String>,
        /// How many more there are.
        more: usize,
        /// Whether they are so many addresses of the internet that it comes to anybody.
        crowd: bool,
    },
    /// The cluster's peers.
    Peers {
        /// How many addresses.
        addresses: usize,
    },
    /// The control plane's sources.
    ControlPlane {
        /// Some of them.
        ranges: Vec<String>,
        /// How many more there are.
        more: usize,
    },
    /// What every host needs, whatever the spec says.
    Base {
        /// What for, for example `dhcp`.
        what: String,
    },
}

impl Who {
    /// How far that is.
    pub fn reach(&self) -> Reach {
        match self {
            Self::Anybody | Self::Sources { crowd: true, .. } => Reach::Anybody,
            Self::Unknown => Reach::Unknown,
            Self::Sources { .. } | Self::ControlPlane { .. } => Reach::Named,
            Self::Peers { .. } => Reach::Peers,
            Self::Base { .. } => Reach::Base,
        }
    }
}

impl fmt::Display for Who {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |ranges: &[String], more: &usize| match more {
            0 => ranges.join(", "),
            more => format!("{} and {more} more", ranges.join(", ")),
        };
        match self {
            Self::Anybody => f.write_str("anybody"),
            Self::Unknown => f.write_str("not known: a rule of somebody else decides"),
            Self::Sources { ranges, more, .. } => f.write_str(&list(ranges, more)),
            Self::Peers { addresses: 1 } => f.write_str("1 peer address"),
            Self::Peers { addresses } => write!(f, "{addresses} peer addresses"),
            Self::ControlPlane { ranges, more } => f.write_str(&list(ranges, more)),
            Self::Base { what } => write!(f, "what every host needs: {what}"),
        }
    }
}

/// That somebody gets in, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Grant {
    /// The rule's comment in the kernel, for example `rule web`.
    pub rule: String,
    /// Who.
    pub who: Who,
    /// Over which IP versions.
    pub families: BTreeSet<Family>,
    /// Whether the rule names so many ports that nobody meant each of them.
    #[serde(skip)]
    pub is_sweeping: bool,
    /// Another program's chain that drops it, or may.
    pub dropped_by: Option<String>,
}

/// Whether the spec made the rule.
pub fn is_of_the_spec(comment: &str) -> bool {
    ["rule ", "peers ", "control plane"]
        .iter()
        .any(|kind| comment.starts_with(kind))
}

/// Those of one rule of the spec are one, whatever rules of the kernel it was made into.
pub fn merged(grants: Vec<Grant>) -> Vec<Grant> {
    let mut all: Vec<Grant> = Vec::new();
    for grant in grants {
        let name = |grant: &Grant| match grant.who {
            Who::Peers { .. } => "peers".to_owned(),
            _ => grant.rule.clone(),
        };
        let same = |known: &&mut Grant| {
            name(known) == name(&grant)
                && std::mem::discriminant(&known.who) == std::mem::discriminant(&grant.who)
        };
        match all.iter_mut().find(same) {
            Some(known) => {
                known.who.join(&grant.who);
                known.families.extend(&grant.families);
                known.is_sweeping &= grant.is_sweeping;
                known.dropped_by = known.dropped_by.take().or(grant.dropped_by);
            }
            None => all.push(Grant {
                rule: name(&grant),
                ..grant
            }),
        }
    }
    all
}

impl Who {
    /// Those of another IP version join.
    fn join(&mut self, other: &Self) {
        match (self, other) {
            (Self::Peers { addresses }, Self::Peers { addresses: others }) => *addresses += others,
            (
                Self::Sources { ranges, more, crowd },
                Self::Sources {
                    ranges: others,
                    more: other_more,
                    crowd: other_crowd,
                },
            ) => {
                join(ranges, more, others, *other_more);
                *crowd |= other_crowd;
            }
            (
                Self::ControlPlane { ranges, more },
                Self::ControlPlane {
                    ranges: others,
                    more: other_more,
                },
            ) => join(ranges, more, others, *other_more),
            _ => {}
        }
    }
}

fn join(ranges: &mut Vec<String>, more: &mut usize, others: &[String], other_more: usize) {
    for other in others
        .iter()
        .filter(|other| !ranges.contains(other))
        .cloned()
        .collect::<Vec<_>>()
    {
        ranges.push(other);
    }
    *more += other_more;
}

//! What a well-formed spec may not say, and what it had better not say.
//!
//! May not live here: the form of single fields, which their types check when they are read.

use std::collections::BTreeMap;

use super::storage::{MAX_ATTESTATIONS, MAX_ATTESTED_DISKS};
use super::{Cluster, MAX_PEERS, MAX_RULES, MAX_SOURCES, Problem, SPEC_VERSION, Spec};
use crate::{FirewallRule, Secret, SourceRange};

/// Characters of a token that nobody guesses: 128 random bits take so many in base64.
const SAFE_TOKEN: usize = 22;

/// Why a token can be guessed, if it can: it is short.
pub fn guessable(token: &Secret) -> Option<String> {
    let length = token.expose().len();
    (1..SAFE_TOKEN)
        .contains(&length)
        .then(|| format!("it has {length} characters, and can be guessed: {SAFE_TOKEN} random ones are safe"))
}

impl Spec {
    /// What is accepted and may not be what was meant: ranges with host bits, a token that is short. Each with its field, and
    /// with what is made of it.
    pub fn warnings(&self) -> Vec<Problem> {
        let sources = self.source_fields();
        let odd = sources.filter(|(_, source)| source.has_host_bits());
        let odd = odd.map(|(field, source)| Problem {
            field,
            reason: format!("{source} has host bits: it is taken as {}", source.net()),
        });
        odd.chain(self.short_token()).collect()
    }

    /// A token that can be guessed by whoever hears an answer that is bound to it.
    fn short_token(&self) -> Option<Problem> {
        guessable(self.enrolment_token()?).map(|reason| Problem {
            field: "control_plane.enrolment_token".to_owned(),
            reason,
        })
    }

    /// All sources with their fields.
    fn source_fields(&self) -> impl Iterator<Item = (String, SourceRange)> {
        let rules = self.rule_lists().into_iter().flat_map(|(list, rules)| {
            let rules = rules.iter().enumerate();
            rules.flat_map(move |(i, rule)| {
                let sources = rule.sources.iter().enumerate();
                sources.map(move |(j, source)| (format!("{list}[{i}].ip_ranges[{j}]"), *source))
            })
        });
        let control = self.control_plane.iter().flat_map(|c| &c.sources).enumerate();
        rules.chain(control.map(|(i, source)| (format!("control_plane.sources[{i}]"), *source)))
    }

    fn rule_lists(&self) -> [(&'static str, &[FirewallRule]); 2] {
        [
            ("firewall.ingress", &self.firewall.ingress),
            ("firewall.egress", &self.firewall.egress),
        ]
    }

    /// What makes it unusable as a whole.
    pub(super) fn problems(&self) -> Vec<Problem> {
        let mut found = self.too_many();
        if self.version != SPEC_VERSION {
            let reason = format!(
                "{} is not known: this program reads version {SPEC_VERSION}",
                self.version
            );
            found.push(problem("version", reason));
        }
        for (list, rules) in self.rule_lists() {
            repeated(
                rules.iter().enumerate().map(|(i, r)| (&r.id, i)),
                &mut found,
                |i, id, first| {
                    let reason = format!("{:?} is taken by {list}[{first}]", id.as_str());
                    problem(format!("{list}[{i}].id"), reason)
                },
            );
        }
        if let Some(cluster) = &self.cluster {
            self.peer_problems(cluster, &mut found);
        }
        let keys = self.authorized_keys.iter().enumerate();
        repeated(
            keys.map(|(i, k)| ((&k.user, k.key.fingerprint()), i)),
            &mut found,
            |i, (user, key), first| {
                let reason = format!("{key} is already given to {user} by authorized_keys[{first}]");
                problem(format!("authorized_keys[{i}].key"), reason)
            },
        );
        found
    }

    fn too_many(&self) -> Vec<Problem> {
        let peers = self.cluster.iter().map(|c| c.peers.len()).sum();
        let rules = |rules: &[FirewallRule]| rules.iter().map(|rule| rule.sources.len()).sum();
        let control = self.control_plane.iter().map(|c| c.sources.len()).sum();
        let [ingress, egress] = self.rule_lists();
        let attested = self.storage.iter().flat_map(|storage| &storage.attested);
        let disks = attested.clone().map(|claim| claim.disks.len()).max();
        let counts: [(_, _, usize, _); 9] = [
            ("storage.attested", "claims", attested.count(), MAX_ATTESTATIONS),
            (
                "storage.attested",
                "disks",
                disks.unwrap_or_default(),
                MAX_ATTESTED_DISKS,
            ),
            ("cluster.peers", "peers", peers, MAX_PEERS),
            (
                "cluster.peers",
                "addresses",
                self.peer_addresses().count(),
                2 * MAX_PEERS,
            ),
            (ingress.0, "rules", ingress.1.len(), MAX_RULES),
            (ingress.0, "sources", rules(ingress.1), MAX_SOURCES),
            (egress.0, "rules", egress.1.len(), MAX_RULES),
            (egress.0, "sources", rules(egress.1), MAX_SOURCES),
            ("control_plane.sources", "sources", control, MAX_SOURCES),
        ];
        let over = counts.into_iter().filter(|(_, _, count, limit)| count > limit);
        over.map(|(field, what, count, limit)| {
            problem(field, format!("{count} {what} are too many: at most {limit}"))
        })
        .collect()
    }

    fn peer_problems(&self, cluster: &Cluster, found: &mut Vec<Problem>) {
        let peers = || cluster.peers.iter().enumerate();
        repeated(peers().map(|(i, p)| (&p.instance, i)), found, |i, name, first| {
            let reason = format!("{name} is already peers[{first}]");
            problem(format!("cluster.peers[{i}].instance"), reason)
        });
        repeated(
            peers().flat_map(|(i, p)| p.addresses.iter().map(move |a| (a.get(), i))),
            found,
            |i, address, first| {
                let reason = format!("{address} is already an address of peers[{first}]");
                problem(format!("cluster.peers[{i}].addresses"), reason)
            },
        );
        for (i, peer) in peers() {
            if peer.addresses.is_empty() {
                let reason = format!("peer {} has no address", peer.instance);
                found.push(problem(format!("cluster.peers[{i}].addresses"), reason));
            }
            if peer.instance == self.instance.id {
                let reason = format!("{} is this instance itself", peer.instance);
                found.push(problem(format!("cluster.peers[{i}].instance"), reason));
            }
        }
    }
}

fn problem(field: impl Into<String>, reason: String) -> Problem {
    Problem {
        field: field.into(),
        reason,
    }
}

/// Adds a problem for each value that was seen before: its index, the value, and the first one's index.
fn repeated<K: Ord>(
    values: impl Iterator<Item = (K, usize)>,
    found: &mut Vec<Problem>,
    describe: impl Fn(usize, &K, usize) -> Problem,
) {
    let mut seen: BTreeMap<K, usize> = BTreeMap::new();
    for (value, index) in values {
        match seen.get(&value) {
            Some(first) => found.push(describe(index, &value, *first)),
            None => {
                seen.insert(value, index);
            }
        }
    }
}

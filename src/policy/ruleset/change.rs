//! From the table that is held to the one that is wanted, in as few steps as do it; and whether what
//! is held lets in more than what is wanted.
//!
//! May not live here: how steps are sent to the kernel.

use super::{Chain, Elements, Rule, Ruleset, Set, Verdict};

/// One step. All of them are done in one transaction, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// A set comes, with its elements.
    AddSet(Set),
    /// Elements come into a set.
    AddElements(Set),
    /// Elements leave a set.
    RemoveElements(Set),
    /// All elements leave the set of this name.
    Empty(String),
    /// Rules come into a chain.
    AddRules {
        /// The chain's name.
        chain: String,
        /// Behind which of the held rules, counted from 0; none: before all of them.
        after: Option<usize>,
        /// The rules, in order.
        rules: Vec<Rule>,
    },
    /// A rule leaves a chain.
    RemoveRule {
        /// The chain's name.
        chain: String,
        /// Which of the held rules, counted from 0.
        index: usize,
    },
    /// The set of this name goes.
    RemoveSet(String),
}

/// The steps that make `held` into `wanted`, none if they are the same; `None` if only a new table
/// will do, because chains, hooks or kinds of sets differ.
pub fn steps(held: &Ruleset, wanted: &Ruleset) -> Option<Vec<Step>> {
    let same_chain = |(a, b): (&Chain, &Chain)| a.name == b.name && a.hook == b.hook;
    let chains = || held.chains.iter().zip(&wanted.chains);
    if held.dormant != wanted.dormant || held.chains.len() != wanted.chains.len() || !chains().all(same_chain)
    {
        return None;
    }
    let mut steps = Vec::new();
    for set in &wanted.sets {
        match held.set(&set.name) {
            None => steps.push(Step::AddSet(set.clone())),
            Some(old) => element_steps(old, set, &mut steps)?,
        }
    }
    for (old, new) in chains() {
        rule_steps(old, new, &mut steps);
    }
    let gone = held.sets.iter().filter(|set| wanted.set(&set.name).is_none());
    steps.extend(gone.map(|set| Step::RemoveSet(set.name.clone())));
    Some(steps)
}

fn element_steps(old: &Set, new: &Set, steps: &mut Vec<Step>) -> Option<()> {
    if old == new {
        return Some(());
    }
    let of = |elements| Set {
        name: new.name.clone(),
        elements,
    };
    let (come, gone) = match (&old.elements, &new.elements) {
        (Elements::Interfaces(a), Elements::Interfaces(b)) => (
            Elements::Interfaces(b.difference(a).cloned().collect()),
            Elements::Interfaces(a.difference(b).cloned().collect()),
        ),
        (Elements::Outgoing(a), Elements::Outgoing(b)) => (
            Elements::Outgoing(b.difference(a).cloned().collect()),
            Elements::Outgoing(a.difference(b).cloned().collect()),
        ),
        (Elements::Addresses(f, a), Elements::Addresses(g, b)) if f == g => (
            Elements::Addresses(*g, b.without(a)),
            Elements::Addresses(*f, a.without(b)),
        ),
        // Kernels differ in what they take for an overlap with an interval that leaves in the same
        // transaction; emptying and filling is what all of them do alike.
        (Elements::Ranges(f, _), Elements::Ranges(g, _)) if f == g => {
            steps.push(Step::Empty(new.name.clone()));
            steps.push(Step::AddElements(new.clone()));
            return Some(());
        }
        _ => return None,
    };
    if !gone.is_empty() {
        steps.push(Step::RemoveElements(of(gone)));
    }
    if !come.is_empty() {
        steps.push(Step::AddElements(of(come)));
    }
    Some(())
}

/// What is the same at the start and at the end stays, with its counters.
fn rule_steps(old: &Chain, new: &Chain, steps: &mut Vec<Step>) {
    let (a, b) = (&old.rules, &new.rules);
    let start = a.iter().zip(b).take_while(|(x, y)| x == y).count();
    let rest = a.len().min(b.len()) - start;
    let end = a
        .iter()
        .rev()
        .zip(b.iter().rev())
        .take(rest)
        .take_while(|(x, y)| x == y)
        .count();
    let rules: Vec<Rule> = b.iter().take(b.len() - end).skip(start).cloned().collect();
    if !rules.is_empty() {
        steps.push(Step::AddRules {
            chain: new.name.clone(),
            after: start.checked_sub(1),
            rules,
        });
    }
    steps.extend((start..a.len() - end).map(|index| Step::RemoveRule {
        chain: old.name.clone(),
        index,
    }));
}

/// Whether `held` may let in something that `wanted` does not. When in doubt, it does. A table that
/// only lacks some of what is to be let in is shut too tightly, and can wait.
pub fn opens(held: Option<&Ruleset>, wanted: &Ruleset) -> bool {
    let Some(held) = held else { return true };
    held.dormant
        || held.chains.len() != wanted.chains.len()
        || held
            .chains
            .iter()
            .zip(&wanted.chains)
            .any(|(a, b)| chain_opens(a, b))
        || held
            .sets
            .iter()
            .any(|set| wanted.set(&set.name).is_none_or(|wanted| !is_within(set, wanted)))
}

/// Sets of what is let in: fewer elements let in less. What is routed to some interfaces is shut out, and
/// fewer of them shut less.
fn is_within(held: &Set, wanted: &Set) -> bool {
    match (&held.elements, &wanted.elements) {
        (Elements::Interfaces(a), Elements::Interfaces(b)) => a.is_subset(b),
        (Elements::Outgoing(a), Elements::Outgoing(b)) => b.is_subset(a),
        (Elements::Addresses(f, a), Elements::Addresses(g, b)) => f == g && a.without(b).is_empty(),
        (a, b) => a == b,
    }
}

/// Held are the wanted rules in their order; only such that let in are missing.
fn chain_opens(held: &Chain, wanted: &Chain) -> bool {
    if held.name != wanted.name || held.hook != wanted.hook {
        return true;
    }
    let mut rest = held.rules.iter().peekable();
    for rule in &wanted.rules {
        if rest.peek() == Some(&rule) {
            rest.next();
        } else if !matches!(rule.verdict, None | Some(Verdict::Accept)) {
            return true;
        }
    }
    rest.next().is_some()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::firewall::{Inputs, ruleset};
    use crate::policy::ruleset::Match;
    use portcullis_protocol::Spec;
    use proptest::prelude::*;

    fn with(rules: &[u16], peers: &[u8]) -> Ruleset {
        let rules: Vec<String> = rules
            .iter()
            .map(|p| {
                format!(r#"{{"id":"r{p}","protocol":"tcp","from_port":{p},"ip_ranges":["10.0.0.0/8","192.0.2.{}"]}}"#, p % 200)
            })
            .collect();
        let peers: Vec<String> = peers
            .iter()
            .map(|p| format!(r#"{{"instance":"i{p}","addresses":["10.1.0.{p}"]}}"#))
            .collect();
        let spec = format!(
            r#"{{"version":1,"generation":1,"instance":{{"id":"i"}},
               "cluster":{{"id":"c","peers":[{}]}},"firewall":{{"ingress":[{}]}}}}"#,
            peers.join(","),
            rules.join(",")
        );
        let spec = Spec::from_json(spec.as_bytes()).unwrap();
        ruleset(Inputs {
            spec: Some(&spec),
            ..Inputs::default()
        })
    }

    /// Does what the steps say, as the kernel would.
    fn done(held: &Ruleset, steps: &[Step]) -> Ruleset {
        let mut after = held.clone();
        // Positions are those of the held rules: removed ones leave a gap until the end.
        let mut slots: Vec<Vec<(Option<usize>, Option<Rule>)>> = held
            .chains
            .iter()
            .map(|c| {
                c.rules
                    .iter()
                    .cloned()
                    .enumerate()
                    .map(|(i, r)| (Some(i), Some(r)))
                    .collect()
            })
            .collect();
        for step in steps {
            match step {
                Step::AddSet(set) => after.sets.push(set.clone()),
                Step::RemoveSet(name) => after.sets.retain(|s| s.name != *name),
                Step::Empty(name) => {
                    let set = after.sets.iter_mut().find(|s| s.name == *name).unwrap();
                    let Elements::Ranges(_, ranges) = &mut set.elements else {
                        panic!()
                    };
                    ranges.clear();
                }
                Step::AddElements(more) | Step::RemoveElements(more) => {
                    let add = matches!(step, Step::AddElements(_));
                    let set = after.sets.iter_mut().find(|s| s.name == more.name).unwrap();
                    match (&mut set.elements, &more.elements) {
                        (Elements::Addresses(_, a), Elements::Addresses(_, b)) if add => {
                            *a = a.iter().chain(b.iter()).collect();
                        }
                        (Elements::Addresses(_, a), Elements::Addresses(_, b)) => *a = a.without(b),
                        (Elements::Ranges(_, a), Elements::Ranges(_, b)) => a.extend(b),
                        _ => panic!(),
                    }
                }
                Step::AddRules {
                    chain,
                    after: place,
                    rules,
                } => {
                    let chain = held.chains.iter().position(|c| c.name == *chain).unwrap();
                    let at = place.map_or(0, |i| {
                        1 + slots[chain].iter().position(|(n, _)| *n == Some(i)).unwrap()
                    });
                    slots[chain].splice(at..at, rules.iter().cloned().map(|r| (None, Some(r))));
                }
                Step::RemoveRule { chain, index } => {
                    let chain = held.chains.iter().position(|c| c.name == *chain).unwrap();
                    let slot = slots[chain].iter_mut().find(|(n, _)| *n == Some(*index)).unwrap();
                    assert!(slot.1.take().is_some());
                }
            }
        }
        for (chain, slots) in after.chains.iter_mut().zip(slots) {
            chain.rules = slots.into_iter().filter_map(|(_, rule)| rule).collect();
        }
        after.sets.sort_by(|a, b| a.name.cmp(&b.name));
        after
    }

    proptest! {
        #[test]
        fn steps_lead_to_what_is_wanted(
            a in proptest::collection::btree_set(1u16..30, 0..8), p in proptest::collection::btree_set(1u8..30, 0..8),
            b in proptest::collection::btree_set(1u16..30, 0..8), q in proptest::collection::btree_set(1u8..30, 0..8),
        ) {
            let list = |set: std::collections::BTreeSet<u16>| set.into_iter().collect::<Vec<_>>();
            let (held, wanted) = (
                with(&list(a), &p.into_iter().collect::<Vec<_>>()),
                with(&list(b), &q.into_iter().collect::<Vec<_>>()),
            );
            let steps = steps(&held, &wanted).unwrap();
            prop_assert_eq!(steps.is_empty(), held == wanted);
            prop_assert_eq!(done(&held, &steps), wanted);
        }
    }

    #[test]
    fn one_peer_and_one_rule_are_one_step_each() {
        let base = with(&[22, 80], &[1, 2]);
        assert_eq!(steps(&base, &with(&[22, 80], &[1, 2, 3])).unwrap().len(), 1);
        assert_eq!(steps(&base, &with(&[22, 80], &[1])).unwrap().len(), 1);
        // A rule with several sources brings its set along.
        let added = steps(&base, &with(&[22, 25, 80], &[1, 2])).unwrap();
        assert!(
            matches!(added.as_slice(), [Step::AddSet(_), Step::AddRules { rules, .. }] if rules.len() == 1)
        );
    }

    #[test]
    fn another_hook_needs_another_table() {
        let wanted = with(&[22], &[]);
        let mut held = wanted.clone();
        held.chains[0].hook.as_mut().unwrap().policy = Verdict::Accept;
        assert_eq!(steps(&held, &wanted), None);
        held = wanted.clone();
        held.dormant = true;
        assert_eq!(steps(&held, &wanted), None);
    }

    #[test]
    fn only_what_lets_in_may_be_missing() {
        let wanted = with(&[22, 80], &[1, 2]);
        assert!(opens(None, &wanted) && !opens(Some(&wanted), &wanted));
        assert!(!opens(Some(&with(&[80], &[1])), &with(&[80], &[1, 2])));
        let without = |comment: &str| {
            let mut held = wanted.clone();
            held.chains[0].rules.retain(|rule| rule.comment != comment);
            assert_ne!(held, wanted);
            opens(Some(&held), &wanted)
        };
        assert!(!without("rule r80") && !without("base dhcp") && without("denied spoofed source v4"));
        let changed = |change: fn(&mut Ruleset)| {
            let mut held = wanted.clone();
            change(&mut held);
            opens(Some(&held), &wanted)
        };
        assert!(changed(|held| held.dormant = true));
        assert!(changed(|held| held.chains[0].hook = None));
        assert!(changed(
            |held| held.chains[0].rules[0].matches = vec![Match::Foreign("x".into())]
        ));
        assert!(changed(|held| held.chains[0].rules.swap(0, 1)));
        assert!(opens(Some(&with(&[22, 80], &[1, 2, 3])), &wanted));
        let routed = |names: &[&str]| {
            let mut ruleset = wanted.clone();
            ruleset.sets[0].elements = Elements::Outgoing(names.iter().map(|n| (*n).to_owned()).collect());
            ruleset
        };
        let (one, two) = (routed(&["a"]), routed(&["a", "b"]));
        assert!(opens(Some(&one), &two) && !opens(Some(&two), &one));
    }
}

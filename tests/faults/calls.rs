//! The daemon killed at each system call of a change, and each file call of a change failing.
//!
//! May not live here: how a process is stopped at a call (`tracer`).

use std::collections::BTreeMap;
use std::process::Output;

use nix::errno::Errno;
use portcullis_protocol::{Generation, Spec};

use crate::bench::START_TIME;
use crate::bench::{Bench, Look};
use crate::common::eventually;
use crate::tracer::{Calls, Fault, Plan, while_traced};

/// How a change is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    /// A new spec: a rule and a key are others.
    Apply,
    /// One rule comes or goes, as over the API.
    Rule,
}

/// What holds, and what does after the next change.
struct Turns {
    bench: Bench,
    change: Change,
    looks: [Look; 2],
    rules: [Spec; 2],
    /// Whether the state is the other of the two.
    other: bool,
    generation: u64,
}

impl Turns {
    /// A daemon with a first spec, that has changed there and back once.
    fn new(change: Change) -> Self {
        let mut bench = Bench::new();
        bench.start();
        let first = bench.spec(1, false);
        let applied = bench.portcullis(&["apply", "--spec", "-"], &first.to_json());
        assert!(applied.status.success(), "{applied:?}");
        let look = bench.look();
        assert!(
            look.table.contains("policy drop") && look.key_file.contains("tester"),
            "{look:?}"
        );
        let mut turns = Self {
            looks: [look.clone(), look],
            rules: [first.clone(), first],
            bench,
            change,
            other: false,
            generation: 1,
        };
        for _ in 0..2 {
            let said = turns.ask();
            assert!(said.status.success(), "{said:?}");
            turns.changed();
            let at = usize::from(turns.other);
            (turns.looks[at], turns.rules[at]) = (turns.bench.look(), turns.bench.accepted());
        }
        assert!(turns.looks[0].table != turns.looks[1].table);
        assert_eq!(
            turns.looks[0].key_file != turns.looks[1].key_file,
            change == Change::Apply
        );
        turns.bench.witness();
        turns
    }

    /// Asks for the next change.
    fn ask(&self) -> Output {
        match (self.change, self.other) {
            (Change::Apply, other) => {
                let spec = self.bench.spec(self.generation + 1, !other);
                self.bench
                    .portcullis(&["apply", "--force", "--spec", "-"], &spec.to_json())
            }
            (Change::Rule, false) => {
                let add = [
                    "firewall",
                    "add",
                    "--id",
                    "web",
                    "--protocol",
                    "tcp",
                    "--port",
                    "8081",
                ];
                self.bench.portcullis(&add, b"")
            }
            (Change::Rule, true) => self.bench.portcullis(&["firewall", "revoke", "web"], b""),
        }
    }

    /// The change was made.
    fn changed(&mut self) {
        (self.other, self.generation) = (!self.other, self.generation + 1);
    }

    /// The spec before or after the change.
    fn spec(&self, after: bool) -> Spec {
        let mut spec = self.rules[usize::from(self.other != after)].clone();
        spec.generation = Generation::new(self.generation + u64::from(after)).unwrap();
        spec
    }

    fn expected(&self, after: bool) -> &Look {
        &self.looks[usize::from(self.other != after)]
    }

    /// Which of the two specs is on disk; it must be one of them, whole.
    #[track_caller]
    fn is_after(&self, context: &str) -> bool {
        let on_disk = self.bench.accepted();
        let after = on_disk == self.spec(true);
        assert!(after || on_disk == self.spec(false), "{context}: {on_disk:?}");
        after
    }

    /// The kernel and the key file come to be as the spec on disk, without a hand.
    #[track_caller]
    fn until_whole(&self, after: bool, context: &str) {
        eventually(START_TIME, context, || {
            let look = self.bench.look();
            if look == *self.expected(after) {
                Ok(())
            } else {
                Err(look)
            }
        });
    }
}

/// Whether every system call is tried.
pub fn all() -> bool {
    std::env::var("FAULTS").is_ok_and(|value| value == "all")
}

/// How often something was tried, by what it was.
#[derive(Default)]
pub struct Tally {
    tried: BTreeMap<String, u32>,
    pub survived: u32,
    pub made: u32,
}

impl Tally {
    /// Prints it; all have to be survived.
    pub fn tell(&self, what: &str) {
        let tried: u32 = self.tried.values().sum();
        println!(
            "{what}: {tried} tried, {} survived; {} made the change",
            self.survived, self.made
        );
        for (kind, count) in &self.tried {
            println!("    {count:4} {kind}");
        }
        assert_eq!(tried, self.survived);
    }

    /// Counts a call by its name, without what it was about.
    pub fn count(&mut self, call: &str) {
        let name = call.split(' ').next().unwrap_or_default();
        *self.tried.entry(name.to_owned()).or_default() += 1;
    }
}

fn killed_at_each_call(change: Change) {
    let mut turns = Turns::new(change);
    let calls = if all() { Calls::All } else { Calls::Changing };
    let mut tally = Tally::default();
    for at in 1.. {
        let plan = Plan {
            fault: Fault::Kill,
            calls,
            at,
        };
        let (said, hit) = {
            let Turns { bench, .. } = &turns;
            bench.while_knocking(|| while_traced(bench.pid(), plan, || turns.ask()))
        };
        let Some(call) = hit else {
            assert!(said.status.success(), "{said:?}");
            break;
        };
        let context = format!("killed at call {at}, {call}");
        tally.count(&call);
        turns.bench.was_killed();
        // Nobody is there: what the kernel and the disk hold now is all there is.
        let now = turns.bench.look();
        let [before, after] = [false, true].map(|after| turns.expected(after).clone());
        assert!(
            [&before.table, &after.table].contains(&&now.table),
            "{context}: {now:?}"
        );
        assert!(
            [&before.key_file, &after.key_file].contains(&&now.key_file),
            "{context}: {now:?}"
        );
        let made = turns.is_after(&context);
        assert!(
            made || !said.status.success(),
            "{context}: acknowledged, and lost"
        );
        turns.bench.spawn();
        let report = turns.bench.until_answers();
        let generation = turns.generation + u64::from(made);
        assert_eq!(report.generation, Some(generation), "{context}");
        assert_eq!(turns.is_after(&context), made, "{context}");
        turns.until_whole(made, &context);
        tally.survived += 1;
        if made {
            tally.made += 1;
            turns.changed();
        }
    }
    let [kept_out, let_in] = turns.bench.was_never_open();
    println!("{kept_out} packets were kept out, {let_in} let in, none wrongly");
    tally.tell(&format!("killed, {change:?}, {calls:?} calls"));
    assert!(tally.survived > 10 && tally.made > 0 && tally.made < tally.survived);
}

#[test]
fn killed_at_each_call_of_a_new_spec_either_state_stands_whole() {
    killed_at_each_call(Change::Apply);
}

#[test]
fn killed_at_each_call_of_a_rule_either_state_stands_whole() {
    killed_at_each_call(Change::Rule);
}

#[test]
fn each_failing_file_call_refuses_the_change_whole_or_makes_it() {
    let mut turns = Turns::new(Change::Apply);
    let calls = if all() {
        Calls::FilesAndOpening
    } else {
        Calls::Files
    };
    let errors = [
        Errno::ENOSPC,
        Errno::EIO,
        Errno::EROFS,
        Errno::EMFILE,
        Errno::ENOMEM,
    ];
    for errno in errors {
        let mut tally = Tally::default();
        for at in 1.. {
            let pid = turns.bench.pid();
            let plan = Plan {
                fault: Fault::Fails(errno),
                calls,
                at,
            };
            let (said, hit) = turns
                .bench
                .while_knocking(|| while_traced(pid, plan, || turns.ask()));
            let Some(call) = hit else {
                assert!(said.status.success(), "{said:?}");
                turns.changed();
                break;
            };
            let context = format!(
                "{errno} at call {at}, {call}: {}",
                String::from_utf8_lossy(&said.stderr)
            );
            tally.count(&call);
            let report = turns
                .bench
                .status()
                .unwrap_or_else(|| panic!("{context}: no answer: {}", turns.bench.log()));
            let made = turns.is_after(&context);
            assert_eq!(said.status.success(), made, "{context}");
            assert!(made || !said.stderr.is_empty(), "{context}");
            assert_eq!(
                report.generation,
                Some(turns.generation + u64::from(made)),
                "{context}"
            );
            turns.until_whole(made, &context);
            assert_eq!(turns.bench.pid(), pid);
            tally.survived += 1;
            if made {
                tally.made += 1;
                turns.changed();
            }
        }
        tally.tell(&format!("{errno}"));
        assert!(tally.survived > 10 && tally.made > 0 && tally.made < tally.survived);
    }
    turns.bench.was_never_open();
    // What the last one said is what the next one finds.
    turns.bench.end();
    assert_eq!(turns.bench.start().generation, Some(turns.generation));
    turns.until_whole(false, "started anew");
}

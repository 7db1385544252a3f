//! The daemon killed at each system call of its own start: the gate stays what lockdown, or the daemon before, left,
//! or is what the spec says; the next start comes to the same end.
//!
//! May not live here: kills while it runs (`calls`).

use std::fs;
use std::path::Path;

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use portcullis_protocol::Report;

use crate::bench::{Bench, Look, START_TIME};
use crate::calls::{Tally, all};
use crate::common::eventually;
use crate::tracer::{Calls, Fault, Plan, while_traced};

/// What the daemon finds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Start {
    /// Nothing but a spec in the file of the first boot, and a gate that is shut.
    First,
    /// What an earlier one accepted, and its gate.
    Again,
}

/// Without `FAULTS=all`, one of so many calls is tried: those that come first, and another one of each group
/// each time.
const STEP: u32 = 6;

/// As a boot makes it before the daemon starts, with nothing accepted.
fn first_boot(bench: &Bench) {
    for folder in ["state", "home/faulty/.ssh"] {
        let _ = fs::remove_dir_all(bench.path(folder));
    }
    bench.lockdown();
}

/// Starts the daemon into a fault, while somebody knocks. Gives its first report, or at which call it was killed.
fn start_into(bench: &mut Bench, plan: Plan) -> Result<Report, String> {
    bench.spawn_stopped();
    let pid = bench.pid();
    let (report, hit) = bench.while_knocking(|| {
        while_traced(pid, plan, || {
            match kill(Pid::from_raw(pid.cast_signed()), Signal::SIGCONT) {
                // Killed already: whether by us is looked at below.
                Ok(()) | Err(Errno::ESRCH) => {}
                Err(error) => panic!("{error}"),
            }
            eventually(START_TIME, "it answers, or is killed", || {
                match Path::new(&format!("/proc/{pid}")).exists() {
                    true => bench.status().map(Some).ok_or_else(|| bench.log()),
                    false => Ok(None),
                }
            })
        })
    });
    match (report, hit) {
        // It may have answered just before the call.
        (_, Some(call)) => {
            bench.was_killed();
            Err(call)
        }
        (report, None) => Ok(report.unwrap_or_else(|| panic!("it ended by itself: {}", bench.log()))),
    }
}

fn killed_at_each_call(start: Start) {
    let mut bench = Bench::new();
    let spec = bench.spec(1, false);
    fs::write(bench.path("injected.json"), spec.to_json()).unwrap();
    first_boot(&bench);
    let shut = bench.look();
    assert!(shut.table.contains("policy drop"), "{shut:?}");
    bench.witness();
    bench.start();
    let whole = bench.look();
    assert!(
        whole.table != shut.table && whole.key_file.contains("tester"),
        "{whole:?}"
    );
    bench.end();
    let calls = if all() { Calls::All } else { Calls::Changing };
    let step = if all() { 1 } else { STEP };
    let before = if start == Start::First { &shut } else { &whole };
    let mut tally = Tally::default();
    for at in (1..).step_by(step as usize) {
        if start == Start::First {
            first_boot(&bench);
        }
        let fault = Fault::Kill;
        // Another one of each group in each round of a whole run of the tests.
        let at = at + std::process::id() % step;
        let call = match start_into(&mut bench, Plan { fault, calls, at }) {
            Err(call) => call,
            Ok(report) => {
                assert_eq!(report.generation, Some(1));
                break;
            }
        };
        let context = format!("{start:?}, killed at call {at}, {call}");
        tally.count(&call);
        is_one_of(&bench, &[before, &whole], &context);
        let made = fs::exists(bench.path("state/spec.json")).unwrap();
        assert!(made || start == Start::First, "{context}: lost");
        assert!(!made || bench.accepted() == spec, "{context}");
        // Nobody does anything for it but to start it again.
        bench.spawn();
        assert_eq!(bench.until_answers().generation, Some(1), "{context}");
        eventually(START_TIME, &context, || match bench.look() {
            look if look == whole => Ok(()),
            look => Err(look),
        });
        assert_eq!(bench.accepted(), spec, "{context}");
        bench.end();
        tally.survived += 1;
        tally.made += u32::from(made);
    }
    let [kept_out, let_in] = match start {
        Start::First => bench.let_nothing_else_in(),
        Start::Again => bench.was_never_open(),
    };
    println!("{kept_out} packets were kept out, {let_in} let in, none wrongly");
    tally.tell(&format!("killed while it starts, {start:?}, {calls:?} calls"));
    assert!(tally.survived > 5 && tally.made > 0);
}

/// Nobody is there: what the kernel and the disk hold now is all there is.
#[track_caller]
fn is_one_of(bench: &Bench, looks: &[&Look], context: &str) {
    let now = bench.look();
    assert!(
        looks.iter().any(|look| look.table == now.table),
        "{context}: {now:?}"
    );
    assert!(
        looks.iter().any(|look| look.key_file == now.key_file),
        "{context}: {now:?}"
    );
}

#[test]
fn killed_at_each_call_of_its_first_start_the_next_one_is_whole() {
    killed_at_each_call(Start::First);
}

#[test]
fn killed_at_each_call_of_a_later_start_the_gate_never_changes() {
    killed_at_each_call(Start::Again);
}

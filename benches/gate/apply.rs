//! Shutting a host, and shutting it again: time, processes, and whether it is open meanwhile.
//!
//! May not live here: a host that others open (`drift`), how others shut it (`contenders`).

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use portcullis::agent::gate::guard::Guard;
use portcullis::agent::state::Store;
use portcullis_figures::{Better, Cell, Column, Plot, Row, Samples, Table, Unit, timed};
use portcullis_protocol::Spec;

use crate::contenders::{ByHand, Contender, Firewalld, Recipe};
use crate::sandbox::{self, must};
use crate::specs::{rule, settings, spec};
use crate::world::{Probe, World};

const PORTS: [u16; 3] = [22, 80, 443];
const ROUNDS: usize = 15;
/// The others take seconds.
const FEWER: usize = 5;
/// Time between two packets of the prober.
const INTERVAL: Duration = Duration::from_micros(300);
const TRACE: &str = "/run/trace";
const CONFIG: &str = "/run/portcullis.toml";

/// One way to shut a host: times, processes, and how long it was open each time that it was shut again.
struct Way {
    first: Samples,
    again: Samples,
    processes: usize,
    open: Cell,
}

pub fn run() -> Table {
    let cells = |way: Way| {
        vec![
            way.first.into(),
            way.again.into(),
            Cell::one(way.processes as f64),
            way.open,
        ]
    };
    let mut rows = vec![
        Row::ours("portcullis, the running daemon", cells(daemon())),
        Row::ours("`portcullis lockdown`, a process", cells(process())),
    ];
    for (other, rounds) in [
        (&Recipe as &dyn Contender, FEWER),
        (&Firewalld, FEWER),
        (&ByHand, ROUNDS),
    ] {
        rows.push(Row::theirs(other.name(), cells(contender(other, rounds))));
    }
    Table {
        title: "Shutting a host".to_owned(),
        method: "Three ports for anybody, then one more. \"Again\" is on a host that is shut; \"open while again\" is \
                 for how long packets to a port that no rule names got in then, one tried each 0.3 ms. portcullis \
                 reads the kernel's table back and compares it; a table by hand is neither read back nor checked \
                 nor kept for the next boot. firewalld's first time is its start; afterwards one of its ports is added for good and it \
                 reloads. Processes are those of a command, counted by strace(1); firewalld's own is not among them."
            .to_owned(),
        columns: vec![
            Column::time("from nothing"),
            Column::time("again"),
            Column::of("processes", Unit::Count, Better::Less),
            Column::time("open while again"),
        ],
        rows,
        plot: Plot::Bars {
            columns: vec![1, 3],
            logarithmic: true,
        },
    }
}

/// The ports, and one more: each round has another.
fn ports(round: usize) -> Vec<u16> {
    PORTS.into_iter().chain([8080 + round as u16]).collect()
}

fn wanted(round: usize) -> Spec {
    spec(
        [],
        &ports(round)
            .iter()
            .map(|port| rule("tcp", *port))
            .collect::<Vec<_>>(),
    )
}

fn process() -> Way {
    let program = env!("CARGO_BIN_EXE_portcullis");
    let line = format!("{program} lockdown --config {CONFIG}");
    let prepare = |round| {
        std::fs::write(CONFIG, "[paths]\nstate = \"/run/state\"\n").unwrap();
        Store::new(Path::new("/run/state"))
            .save_spec(&wanted(round))
            .unwrap();
    };
    let first = Samples::of(ROUNDS, |_| {
        let world = World::new();
        sandbox::enter(&world.host, || {
            prepare(0);
            must(&line)
        })
    });
    let world = World::new();
    let probe = world.probe();
    assert!(probe.is_open(), "it is open before");
    sandbox::enter(&world.host, || {
        prepare(0);
        must(&line);
        let (again, open) = again(&probe, ROUNDS, |round| {
            prepare(round);
            must(&line)
        });
        Way {
            first,
            again,
            processes: processes(&line),
            open,
        }
    })
}

fn daemon() -> Way {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let enforce = |guard: &Guard, round| {
        let wanted = Some(Arc::new(wanted(round)));
        let (time, gate) = timed(|| runtime.block_on(guard.enforce(wanted)));
        let held = gate.held.as_ref().unwrap();
        assert!(
            held.as_ref() == Some(&gate.planned),
            "the kernel holds what was planned"
        );
        time
    };
    let start = |world: &World| world.host.enter(|| Guard::start(&settings(true)).unwrap());
    let first = Samples::of(ROUNDS, |_| enforce(&start(&World::new()), 0));
    let world = World::new();
    let (guard, probe) = (start(&world), world.probe());
    assert!(probe.is_open(), "it is open before");
    enforce(&guard, 0);
    let (again, open) = again(&probe, ROUNDS, |round| enforce(&guard, round));
    Way {
        first,
        again,
        processes: 0,
        open,
    }
}

fn contender(other: &dyn Contender, rounds: usize) -> Way {
    let first = Samples::of(rounds, |_| {
        let world = World::new();
        sandbox::enter(&world.host, || {
            let mut running = other.stage();
            other.shut(&PORTS, &mut running)
        })
    });
    let world = World::new();
    let probe = world.probe();
    assert!(probe.is_open(), "it is open before");
    sandbox::enter(&world.host, || {
        let mut running = other.stage();
        other.shut(&PORTS, &mut running);
        let (again, open) = again(&probe, rounds, |round| {
            other.prepare(&ports(round));
            must(&other.again(&ports(round)))
        });
        other.prepare(&ports(rounds + 1));
        Way {
            first,
            again,
            processes: processes(&other.again(&PORTS)),
            open,
        }
    })
}

/// How many processes a command is, by strace(1); not while it is timed.
fn processes(line: &str) -> usize {
    must(&format!("strace -f -e trace=none -o {TRACE} {line}"));
    let trace = std::fs::read_to_string(TRACE).unwrap();
    // A thread ends with a line too.
    let ends = trace.lines().filter(|line| line.contains("+++ exited"));
    ends.count()
}

/// Shuts it so often, and tells how long each took, and how long packets got in meanwhile.
fn again(probe: &Probe, rounds: usize, mut shut: impl FnMut(usize) -> Duration) -> (Samples, Cell) {
    let (mut times, mut open, mut tries) = (Vec::new(), Vec::new(), 0);
    for round in 1..=rounds {
        let (time, (lasted, probes)) = watched(probe, || shut(round));
        times.push(time);
        open.push(lasted);
        tries += probes;
    }
    (Samples::new(times), Cell::lasted(&Samples::new(open), tries))
}

/// Probes all the while: how long it was open, and how many probes there were.
fn watched<T>(probe: &Probe, what: impl FnOnce() -> T) -> (T, (Duration, u64)) {
    assert!(!probe.is_open(), "it is shut before it is shut again");
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let prober = scope.spawn(|| {
            let (mut open, mut probes, mut since) = (Duration::ZERO, 0, None::<Instant>);
            while !done.load(Ordering::Relaxed) {
                let now = Instant::now();
                let is_open = probe.is_open();
                open += since.map_or(Duration::ZERO, |since| now - since);
                since = is_open.then_some(now);
                probes += 1;
                thread::sleep(INTERVAL);
            }
            (open, probes)
        });
        let result = what();
        done.store(true, Ordering::Relaxed);
        (result, prober.join().unwrap())
    })
}

//! Shutting a host, and shutting it again: time, processes, and whether it is open meanwhile.
//!
//! May not live here: a host that others open (`drift`).

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use portcullis::agent::gate::guard::Guard;
use portcullis::agent::state::Store;
use portcullis_protocol::Spec;

use crate::sandbox::{self, must};
use crate::specs::{rule, settings, spec};
use crate::stats::{self, Samples, time, timed, times};
use crate::world::{Probe, World};

const PORTS: [u16; 3] = [22, 80, 443];
const ROUNDS: usize = 15;
/// The recipe takes seconds.
const RECIPE_ROUNDS: usize = 5;
/// Time between two packets of the prober.
const INTERVAL: Duration = Duration::from_micros(300);
const SCRIPT: &str = "/run/recipe";
const TRACE: &str = "/run/trace";
const CONFIG: &str = "/run/portcullis.toml";

/// What user data does today: ufw for the host, and for containers the chain that Docker leaves to users.
/// Names of bridges are those that such recipes list.
pub fn recipe(tcp: &[u16], udp: &[u16]) -> String {
    let mut lines = vec![
        "set -e".to_owned(),
        "ufw --force reset".to_owned(),
        "ufw default deny incoming".to_owned(),
        "ufw default allow outgoing".to_owned(),
    ];
    lines.extend(tcp.iter().map(|port| format!("ufw allow {port}/tcp")));
    lines.extend(udp.iter().map(|port| format!("ufw allow {port}/udp")));
    lines.push("ufw --force enable".to_owned());
    // Docker would have made it.
    lines.push("iptables -N DOCKER-USER 2>/dev/null && iptables -I FORWARD -j DOCKER-USER || iptables -F DOCKER-USER".to_owned());
    let chain = [
        "-m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
        "-i lo -j ACCEPT",
        "-i docker0 ! -o docker0 -j ACCEPT",
        "-i br+ ! -o br+ -j ACCEPT",
        "-i cni+ -j ACCEPT",
        "-i cali+ -j ACCEPT",
        "-i flannel+ -j ACCEPT",
        "-s 10.42.0.0/16 -j ACCEPT",
        "-s 10.43.0.0/16 -j ACCEPT",
        "-p tcp --dport 22 -j ACCEPT",
        "-p tcp --dport 443 -j ACCEPT",
        "-j DROP",
    ];
    lines.extend(chain.iter().map(|rule| format!("iptables -A DOCKER-USER {rule}")));
    lines.join("\n")
}

/// One way to shut a host.
struct Way {
    name: &'static str,
    first: Samples,
    again: Samples,
    processes: String,
    open: String,
}

pub fn run() -> String {
    let ways = [process(), daemon(), incumbent()];
    let [.., incumbent] = &ways;
    let cell =
        |mine: &Samples, theirs: &Samples| format!("{}, {}", mine.summary(), times(theirs.ratio(mine)));
    let row = |way: &Way| {
        vec![
            way.name.to_owned(),
            cell(&way.first, &incumbent.first),
            cell(&way.again, &incumbent.again),
            way.processes.clone(),
            way.open.clone(),
        ]
    };
    let header = ["", "from nothing", "again", "processes", "open while again"];
    let title = "Three ports for anybody (× faster than ufw and DOCKER-USER)";
    stats::print(title, &header, ways.iter().map(row).collect());
    let told = |way: &Way| {
        let (first, again) = (time(way.first.median()), time(way.again.median()));
        format!(
            "{}: {first}, again {again}, {} processes, open {}",
            way.name, way.processes, way.open
        )
    };
    ways.each_ref().map(told).join("; ")
}

/// The ports, and one more: each round has another spec.
fn wanted(more: u16) -> Spec {
    let ports = PORTS.into_iter().chain([more]);
    spec([], &ports.map(|port| rule("tcp", port)).collect::<Vec<_>>())
}

fn process() -> Way {
    let program = env!("CARGO_BIN_EXE_portcullis");
    let line = format!("{program} lockdown --config {CONFIG}");
    let prepare = || {
        std::fs::write(CONFIG, "[paths]\nstate = \"/run/state\"\n").unwrap();
        Store::new(Path::new("/run/state"))
            .save_spec(&wanted(8080))
            .unwrap();
    };
    let first = Samples::of(ROUNDS, |_| {
        let world = World::new();
        sandbox::enter(&world.host, || {
            prepare();
            must(&line)
        })
    });
    let world = World::new();
    let probe = world.probe();
    assert!(probe.is_open(), "it is open before");
    let (again, processes, open) = sandbox::enter(&world.host, || {
        prepare();
        must(&line);
        let mut again = Vec::new();
        let open = watched(&probe, || {
            for round in 0..ROUNDS {
                Store::new(Path::new("/run/state"))
                    .save_spec(&wanted(8081 + round as u16))
                    .unwrap();
                again.push(must(&line));
            }
        });
        (Samples::new(again), processes(&line), open)
    });
    Way {
        name: "portcullis lockdown",
        first,
        again,
        processes,
        open,
    }
}

fn daemon() -> Way {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let enforce = |guard: &Guard, more| {
        let wanted = Some(Arc::new(wanted(more)));
        let (time, gate) = timed(|| runtime.block_on(guard.enforce(wanted)));
        let held = gate.held.as_ref().unwrap();
        assert!(
            held.as_ref() == Some(&gate.planned),
            "the kernel holds what was planned"
        );
        time
    };
    let start = |world: &World| world.host.enter(|| Guard::start(&settings(true)).unwrap());
    let first = Samples::of(ROUNDS, |_| enforce(&start(&World::new()), 8080));
    let world = World::new();
    let (guard, probe) = (start(&world), world.probe());
    assert!(probe.is_open(), "it is open before");
    enforce(&guard, 8080);
    let mut again = Vec::new();
    let open = watched(&probe, || {
        again.extend((0..ROUNDS).map(|round| enforce(&guard, 8081 + round as u16)));
    });
    Way {
        name: "portcullis, the running daemon",
        first,
        again: Samples::new(again),
        processes: "0".to_owned(),
        open,
    }
}

fn incumbent() -> Way {
    let line = format!("sh {SCRIPT}");
    let prepare = || std::fs::write(SCRIPT, recipe(&PORTS, &[])).unwrap();
    let first = Samples::of(RECIPE_ROUNDS, |_| {
        let world = World::new();
        sandbox::enter(&world.host, || {
            prepare();
            must(&line)
        })
    });
    let world = World::new();
    let probe = world.probe();
    assert!(probe.is_open(), "it is open before");
    let (again, processes, open) = sandbox::enter(&world.host, || {
        prepare();
        must(&line);
        let mut again = Vec::new();
        let open = watched(&probe, || again.extend((0..RECIPE_ROUNDS).map(|_| must(&line))));
        (Samples::new(again), processes(&line), open)
    });
    Way {
        name: "ufw and DOCKER-USER",
        first,
        again,
        processes,
        open,
    }
}

/// How many processes a command is, by strace(1); not while it is timed.
fn processes(line: &str) -> String {
    must(&format!("strace -f -e trace=none -o {TRACE} {line}"));
    let trace = std::fs::read_to_string(TRACE).unwrap();
    trace.matches("+++ exited").count().to_string()
}

/// Probes all the while: how long it was open.
fn watched(probe: &Probe, what: impl FnOnce()) -> String {
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
        what();
        done.store(true, Ordering::Relaxed);
        let (open, probes) = prober.join().unwrap();
        match open {
            Duration::ZERO => format!("never, {probes} probes"),
            open => format!("{} in all, {probes} probes", time(open)),
        }
    })
}

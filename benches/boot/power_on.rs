//! A first boot and a second one: how long until it can be handed over, and for how long a port was open that no
//! rule names.
//!
//! May not live here: containers (`containers`), what is left when it runs (`weight`).

use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use portcullis::log::id;
use portcullis_figures::{Better, Cell, Column, Plot, Row, Samples, Table, Unit};
use portcullis_provision::local::{Outsider, in_namespace};
use portcullis_provision::progress::Quiet;

use crate::lab::Machine;
use crate::prober::{self, Seen};
use crate::site::{Gate, Site};

const ROUNDS: usize = 3;

/// What a boot gave.
struct Boot {
    seen: Seen,
    /// From power-on until sshd's banner came to a stranger.
    login: Duration,
    /// Until it may be handed over, and how that is known.
    ready: Duration,
}

pub fn run(site: &mut Site) -> Vec<Table> {
    let stranger = site.lab.stranger();
    let (mut first, mut second) = (Vec::new(), Vec::new());
    for gate in Gate::ALL {
        let (mut firsts, mut seconds) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            let (one, two) = boots(site, &stranger, gate);
            firsts.push(one);
            seconds.push(two);
        }
        first.push(gate.row(cells(gate, &firsts, known(gate))));
        second.push(gate.row(cells(gate, &seconds, known(gate))));
    }
    let method = "The stranger sends a packet to the closed port each millisecond, from before the link is up; \"open\" is for how \
                  long they were answered. Power-on is the start of the first process. ";
    vec![
        table(
            "The first boot",
            first,
            &format!(
                "{method}portcullis lets in no SSH before a spec was accepted, and \
            is ready when its checks have proven it, a login among them. For the others, ready is the end of cloud-init, \
            which the script is a part of: nothing is proven then. Debian's firewalld and cloud-init each wait for the other (firewalld#414), so firewalld has the order that is recommended there, after the network is up."
            ),
        ),
        table(
            "A reboot",
            second,
            "The same instance again. portcullis holds what it accepted before the network comes up; ufw keeps \
            its own rules for the next boot, and what the script added with iptables(8) is gone. nftables.service takes its rules away \
            when it is stopped, at the end of the boot before.",
        ),
    ]
}

fn known(gate: Gate) -> &'static str {
    match gate {
        Gate::Portcullis => "proven",
        _ => "cloud-init ended",
    }
}

fn table(title: &str, rows: Vec<Row>, method: &str) -> Table {
    Table {
        title: title.to_owned(),
        method: method.to_owned(),
        columns: vec![
            Column::time("open over IPv4"),
            Column::time("open over IPv6"),
            Column::time("sshd answers a stranger"),
            Column::time("ready"),
            Column::of("what ready means", Unit::Count, Better::Neither),
        ],
        rows,
        plot: Plot::Bars {
            columns: vec![0, 3],
            logarithmic: false,
        },
    }
}

fn cells(gate: Gate, boots: &[Boot], known: &str) -> Vec<Cell> {
    let tries = boots.iter().map(|boot| boot.seen.tries).sum();
    let open = |family: usize| {
        // Nothing ever shuts it.
        if gate == Gate::Nothing {
            return Cell::ForGood(boots[0].seen.open[family].as_secs_f64());
        }
        let times = boots.iter().map(|boot| boot.seen.open[family]).collect();
        Cell::lasted(&Samples::new(times), tries)
    };
    let times = |of: fn(&Boot) -> Duration| Samples::new(boots.iter().map(of).collect()).into();
    vec![
        open(0),
        open(1),
        times(|boot| boot.login),
        times(|boot| boot.ready),
        Cell::Said(known.to_owned()),
    ]
}

/// A first boot, and a second one of the same instance.
fn boots(site: &Site, stranger: &Outsider, gate: Gate) -> (Boot, Boot) {
    let request = site.request(gate, &[]);
    let (machine, seen) = std::thread::scope(|scope| {
        let launching = scope.spawn(|| site.lab.provider.launch(&request, &Quiet).unwrap());
        let (instance, _) = site.lab.introduce(stranger, "one");
        watched(stranger, instance.addresses(), || {
            launching.join().unwrap();
            site.booted(gate)
        })
    });
    let first = boot(&machine, gate, seen);
    let (machine, seen) = watched(stranger, machine.instance.addresses(), || {
        site.lab.provider.reboot("one").unwrap();
        site.booted(gate)
    });
    let second = boot(&machine, gate, seen);
    site.end();
    (first, second)
}

fn watched<T>(stranger: &Outsider, at: [IpAddr; 2], act: impl FnOnce() -> T) -> (T, Seen) {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let probing = scope.spawn(|| in_namespace(&stranger.path(), || prober::probe(at, &stop)).unwrap());
        let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(act));
        // A banner that was seen before it was ready is told; one that comes right after it too.
        stop.store(true, Ordering::Relaxed);
        let seen = probing.join().unwrap();
        let done = done.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        (done, seen)
    })
}

fn boot(machine: &Machine, gate: Gate, seen: Seen) -> Boot {
    let on = power_on(machine);
    let ready = match gate {
        Gate::Portcullis => became_ready(machine),
        _ => seconds(&machine.ok("stat -c %.9Y /run/cloud-init/result.json")),
    };
    // On a reboot, the one before may still have answered.
    let banner = seen.banners.iter().find(|banner| **banner > on);
    Boot {
        login: *banner.expect("sshd answered") - on,
        ready: ready - on,
        seen,
    }
}

fn seconds(text: &str) -> Duration {
    Duration::from_secs_f64(text.trim().parse().unwrap())
}

/// When the first process was started, as time since 1970: proc_pid_stat(5) has it in ticks since the machine's boot.
fn power_on(machine: &Machine) -> Duration {
    let said = machine.ok("echo $(date +%s.%N) $(cut -d' ' -f1 /proc/uptime) $(cut -d')' -f2 /proc/1/stat | cut -d' ' -f21) $(getconf CLK_TCK)");
    let numbers: Vec<f64> = said.split(' ').map(|word| word.parse().unwrap()).collect();
    Duration::from_secs_f64(numbers[0] - numbers[1] + numbers[2] / numbers[3])
}

/// When the daemon said so, in this boot.
fn became_ready(machine: &Machine) -> Duration {
    let said = machine.ok(&format!(
        "journalctl -q -b -o json --output-fields=_SOURCE_REALTIME_TIMESTAMP,MESSAGE MESSAGE_ID={}",
        id::READINESS
    ));
    let entries = said
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    let ready = entries.filter(|entry| {
        entry["MESSAGE"]
            .as_str()
            .is_some_and(|text| text.starts_with("ready"))
    });
    let micros = ready.map(|entry| {
        entry["_SOURCE_REALTIME_TIMESTAMP"]
            .as_str()
            .unwrap()
            .parse()
            .unwrap()
    });
    Duration::from_micros(micros.min().expect("it became ready"))
}

//! Requests a second over connections that stay, how long each takes at a fixed rate, and handshakes a second.
//!
//! May not live here: the servers.

use std::fs;
use std::time::Duration;

use portcullis_figures::{Better, Cell, Column, Plot, Samples, Table, Unit};

use crate::lab::Run;
use crate::servers::{Server, Site};

const ROUNDS: usize = 3;
/// Seconds of each.
const SECONDS: u32 = 3;
/// Fixed rate, of all clients together.
const RATE: u32 = 1000;
const CLIENTS: u32 = 20;

/// One server's figures: time for one request, and time of a CPU for it.
struct Load {
    each: Vec<Duration>,
    cpu: Vec<Duration>,
}

pub fn run(site: &Site) -> Table {
    let title = "Requests a second";
    let method = "wrk: 32 connections that stay, one thread asks.";
    table(site, title, method, &["-c32"])
}

pub fn handshakes(site: &Site) -> Table {
    let title = "Handshakes a second";
    let method = "wrk: one request on each connection, 16 at once, none resumed.";
    table(site, title, method, &["-c16", "-HConnection: close"])
}

fn table(site: &Site, title: &str, method: &str, options: &[&str]) -> Table {
    let mut loads = Server::ALL.map(|_| Load {
        each: Vec::new(),
        cpu: Vec::new(),
    });
    // Round by round, so that a busy minute of the machine is not one server's alone.
    for _ in 0..ROUNDS {
        for (server, load) in Server::ALL.into_iter().zip(&mut loads) {
            let before = site.usage(server);
            let count = wrk(site, server, options);
            let cpu = site.usage(server).cpu - before.cpu;
            load.each.push(Duration::from_secs(SECONDS.into()).div_f64(count));
            load.cpu.push(cpu.div_f64(count));
        }
    }
    let cells = loads.map(|load| {
        let rates = load.each.iter().map(|each| 1.0 / each.as_secs_f64());
        vec![Cell::many(rates), Samples::new(load.cpu).into()]
    });
    Table {
        title: title.to_owned(),
        method: method.to_owned(),
        columns: vec![
            Column::of("a second", Unit::PerSecond, Better::More),
            Column::time("CPU time for one"),
        ],
        rows: Server::rows(cells),
        plot: Plot::Bars {
            columns: vec![0],
            logarithmic: false,
        },
    }
}

/// How many answers there were.
fn wrk(site: &Site, server: Server, options: &[&str]) -> f64 {
    let mut command = site.inside("wrk");
    command
        .args(["-t1", &format!("-d{SECONDS}s")])
        .args(options)
        .arg(server.url());
    let said = command.succeed();
    for bad in ["Non-2xx", "Socket errors"] {
        assert!(!said.contains(bad), "{}: {said}", server.name());
    }
    // "  12345 requests in 3.00s, 1.06MB read"
    let line = said
        .lines()
        .find(|line| line.contains(" requests in "))
        .expect(&said);
    line.split_whitespace().next().unwrap().parse().unwrap()
}

pub fn latency(site: &Site) -> Table {
    let mut taken = Server::ALL.map(|_| Vec::new());
    for _ in 0..2 {
        for (server, taken) in Server::ALL.into_iter().zip(&mut taken) {
            taken.extend(h2load(site, server));
        }
    }
    let cells = taken.map(|taken| {
        let taken = Samples::new(taken);
        let p99 = Cell::one(taken.quantile(0.99).as_secs_f64());
        vec![taken.into(), p99]
    });
    Table {
        title: format!("How long a request takes at {RATE} a second"),
        method: format!("h2load: sent by the clock, {CLIENTS} connections that stay."),
        columns: vec![Column::time("median"), Column::time("99th percentile")],
        rows: Server::rows(cells),
        plot: Plot::None,
    }
}

/// How long each request took.
fn h2load(site: &Site, server: Server) -> Vec<Duration> {
    let log = site.file("h2load.tsv");
    let _ = fs::remove_file(&log);
    let mut command = site.inside("h2load");
    command.args(["--h1", "-t1", &format!("-c{CLIENTS}")]);
    command.args([
        &format!("--rps={}", RATE / CLIENTS),
        &format!("-n{}", RATE * SECONDS),
    ]);
    let said = command
        .arg(format!("--log-file={}", log.display()))
        .arg(server.url())
        .succeed();
    assert!(
        said.contains(" 0 failed, 0 errored, 0 timeout"),
        "{}: {said}",
        server.name()
    );
    // Start, status, microseconds.
    let text = fs::read_to_string(&log).unwrap();
    let lines = text.lines().map(|line| line.split('\t').collect::<Vec<_>>());
    let taken = lines.map(|words| {
        assert_eq!(words[1], "200", "{}", server.name());
        Duration::from_micros(words[2].parse().unwrap())
    });
    let taken: Vec<_> = taken.collect();
    assert_eq!(taken.len(), usize::try_from(RATE * SECONDS).unwrap());
    taken
}

//! Requests a second over connections that stay, how long each takes at a fixed rate, and handshakes a second.
//!
//! May not live here: the servers.

use std::fs;
use std::time::Duration;

use crate::lab::Run;
use crate::servers::{Server, Site};
use crate::stats::{self, Samples, time, times};

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

pub fn run(site: &Site) {
    let title = "Requests a second: TLS 1.3, 32 connections that stay, one thread asks";
    table(site, title, &["-c32"]);
}

pub fn handshakes(site: &Site) {
    let title = "Handshakes a second: one request on each connection, 16 at once, none resumed";
    table(site, title, &["-c16", "-HConnection: close"]);
}

fn table(site: &Site, title: &str, options: &[&str]) {
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
    let loads = loads.map(|load| (Samples::new(load.each), Samples::new(load.cpu)));
    let [_, nginx, _] = &loads;
    let rate = |duration: Duration| format!("{:.0}", 1.0 / duration.as_secs_f64());
    let rows = Server::ALL.iter().zip(&loads).map(|(server, (each, cpu))| {
        vec![
            server.name().to_owned(),
            format!(
                "{} ({} to {})",
                rate(each.median()),
                rate(each.max()),
                rate(each.quantile(0.0))
            ),
            times(1.0 / each.ratio(&nginx.0)),
            time(cpu.median()),
            times(cpu.ratio(&nginx.1)),
        ]
    });
    let header = ["", "a second", "of nginx's", "CPU time for one", "of nginx's"];
    stats::print(title, &header, rows.collect());
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

pub fn latency(site: &Site) {
    let mut taken = Server::ALL.map(|_| Vec::new());
    for _ in 0..2 {
        for (server, taken) in Server::ALL.into_iter().zip(&mut taken) {
            taken.extend(h2load(site, server));
        }
    }
    let taken = taken.map(Samples::new);
    let [_, nginx, _] = &taken;
    let p99 = |samples: &Samples| samples.quantile(0.99);
    let rows = Server::ALL.iter().zip(&taken).map(|(server, taken)| {
        vec![
            server.name().to_owned(),
            time(taken.median()),
            time(p99(taken)),
            times(p99(taken).as_secs_f64() / p99(nginx).as_secs_f64()),
            time(taken.max()),
            taken.len().to_string(),
        ]
    });
    let title =
        format!("Time for a request at {RATE} a second, sent by the clock, {CLIENTS} connections that stay");
    let header = ["", "median", "p99", "of nginx's", "longest", "requests"];
    stats::print(&title, &header, rows.collect());
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

//! `make bench`: what the HTTPS endpoint of a real instance costs, beside nginx with a static file and
//! prometheus-node-exporter, in one run.
//!
//! All three are asked over the instance's loopback, with TLS and a key of the same kind, by programs that
//! Debian has: wrk, and h2load for a fixed rate. Needs root, the package that `make deb` made, and what
//! `packaging/setup bench` installs.
//! May not live here: the tables themselves, one file each.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod memory;
mod requests;
mod servers;

#[path = "../common/mod.rs"]
mod benches;
#[path = "../../tests/common/mod.rs"]
mod common;
#[path = "../../tests/instances/lab.rs"]
#[allow(dead_code)]
mod lab;

use std::process::ExitCode;
use std::time::Instant;

use benches::{Table, stats};
use servers::Site;

const TABLES: [Table<fn(&Site)>; 4] = [
    // First: what is idle must not have been busy.
    ("memory", memory::run),
    ("requests", requests::run),
    ("latency", requests::latency),
    ("handshakes", requests::handshakes),
];

fn main() -> ExitCode {
    let tables = match benches::chosen(&TABLES, "This boots an instance") {
        Ok(tables) => tables,
        Err(code) => return code,
    };
    let start = Instant::now();
    let site = Site::new();
    println!("{}", site.facts());
    for (name, table) in tables {
        println!("\n## {name}");
        table(&site);
    }
    println!(
        "\nLoad of the machine at the end: {}. Took {} s.",
        benches::load(),
        start.elapsed().as_secs()
    );
    ExitCode::SUCCESS
}

//! `make bench`: the gate beside what users would pick instead, in one run, as medians and ratios.
//!
//! Needs root and the programs that `packaging/setup bench` installs. Everything happens in network
//! namespaces made here. Names of tables as arguments choose among them.
//! May not live here: the tables themselves, one file each.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod apply;
mod drift;
mod packets;
mod peers;
mod raw;
mod sandbox;
mod specs;
mod world;

#[path = "../common/mod.rs"]
mod benches;
#[path = "../../tests/common/mod.rs"]
mod common;

use std::fs;
use std::process::ExitCode;
use std::time::Instant;

use benches::{Table, load, stats};

/// Each prints its table and gives its summary.
const TABLES: [Table<fn() -> String>; 4] = [
    ("peers", peers::run),
    ("packets", packets::run),
    ("drift", drift::run),
    ("apply", apply::run),
];

fn main() -> ExitCode {
    let tables = match benches::chosen(&TABLES, "This makes network namespaces") {
        Ok(tables) => tables,
        Err(code) => return code,
    };
    let versions = match sandbox::versions() {
        Ok(versions) => versions,
        Err(reason) => {
            eprintln!("{reason}");
            return ExitCode::FAILURE;
        }
    };
    let start = Instant::now();
    facts(&versions);
    let mut summary = Vec::new();
    for (name, table) in tables {
        println!("\n## {name}");
        summary.push(format!("- {}", table()));
    }
    println!(
        "\nLoad of the machine at the end: {}. Took {} s.",
        load(),
        start.elapsed().as_secs()
    );
    ExitCode::SUCCESS
}

fn facts(versions: &[String]) {
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let cpus = fs::read_to_string("/proc/cpuinfo").unwrap();
    let model = cpus.lines().find_map(|line| line.strip_prefix("model name\t: "));
    println!(
        "portcullis {}, Linux {}, {} × {}. Load of the machine at the start: {}.\nBeside {}.",
        env!("CARGO_PKG_VERSION"),
        kernel.trim(),
        std::thread::available_parallelism().unwrap(),
        model.unwrap_or("unknown CPU"),
        load(),
        versions.join("; ")
    );
    println!(
        "Built as the release is, but without link-time optimisation. Each figure: median (least to most, number)."
    );
}

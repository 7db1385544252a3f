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
mod stats;
mod world;

#[path = "../../tests/common/mod.rs"]
mod common;

use std::fs;
use std::process::ExitCode;
use std::time::Instant;

/// A name, and what prints the table and gives its summary.
type Bench = (&'static str, fn() -> String);

const TABLES: [Bench; 4] = [
    ("peers", peers::run),
    ("packets", packets::run),
    ("drift", drift::run),
    ("apply", apply::run),
];

fn main() -> ExitCode {
    // Cargo adds options of its own.
    let wanted: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let is_table = |name: &String| TABLES.iter().any(|(table, _)| table == name);
    if let Some(unknown) = wanted.iter().find(|name| !is_table(name)) {
        let names = TABLES.map(|(name, _)| name).join(", ");
        eprintln!("there is no table {unknown:?}: {names}");
        return ExitCode::from(2);
    }
    if !nix::unistd::geteuid().is_root() {
        eprintln!("This makes network namespaces: run it as root (sudo -E make bench).");
        return ExitCode::from(3);
    }
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
    for (name, table) in TABLES {
        if wanted.is_empty() || wanted.iter().any(|w| w == name) {
            println!("\n## {name}");
            summary.push(format!("- {}", table()));
        }
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

fn load() -> String {
    let load = fs::read_to_string("/proc/loadavg").unwrap();
    load.split(' ').next().unwrap_or_default().to_owned()
}

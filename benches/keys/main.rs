//! `make bench`: what keys cost on a real instance, from `portcullis apply` to sshd's answer, beside what
//! scripts and cloud-init do.
//!
//! Needs root and the package that `make deb` made. The instance is made here and gone afterwards. Names of
//! tables as arguments choose among them.
//! May not live here: the tables themselves, one file each.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod others;
mod probe;
mod site;
mod write;

#[path = "../../tests/common/mod.rs"]
mod common;
#[path = "../../tests/instances/lab.rs"]
#[allow(dead_code)]
mod lab;
#[path = "../gate/stats.rs"]
#[allow(dead_code)]
mod stats;

use std::process::ExitCode;
use std::time::Instant;

use site::Site;

/// A name, and what prints the table.
type Bench = (&'static str, fn(&mut Site));

const TABLES: [Bench; 2] = [("write", write::run), ("probe", probe::run)];

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
        eprintln!("This boots an instance: run it as root (sudo -E make bench).");
        return ExitCode::from(3);
    }
    let start = Instant::now();
    let mut site = Site::new();
    println!("{}", site.facts());
    println!("Each figure: median (least to most, number).");
    for (name, table) in TABLES {
        if wanted.is_empty() || wanted.iter().any(|w| w == name) {
            println!("\n## {name}");
            table(&mut site);
        }
    }
    println!("\nTook {} s.", start.elapsed().as_secs());
    ExitCode::SUCCESS
}

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
use site::Site;

const TABLES: [Table<fn(&mut Site)>; 2] = [("write", write::run), ("probe", probe::run)];

fn main() -> ExitCode {
    let tables = match benches::chosen(&TABLES, "This boots an instance") {
        Ok(tables) => tables,
        Err(code) => return code,
    };
    let start = Instant::now();
    let mut site = Site::new();
    println!("{}", site.facts());
    println!("Each figure: median (least to most, number).");
    for (name, table) in tables {
        println!("\n## {name}");
        table(&mut site);
    }
    println!("\nTook {} s.", start.elapsed().as_secs());
    ExitCode::SUCCESS
}

//! What all benchmarks begin with: which tables are wanted, who runs them, and samples.
//!
//! May not live here: what is measured.
#![allow(dead_code)]

pub mod stats;

use std::process::ExitCode;

/// A name, and what prints the table.
pub type Table<T> = (&'static str, T);

/// The tables that the arguments choose; all of them without arguments.
///
/// # Errors
/// How the program has to end: an unknown name, or not root; said already.
pub fn chosen<T: Copy>(tables: &[Table<T>], why_root: &str) -> Result<Vec<Table<T>>, ExitCode> {
    // Cargo adds options of its own.
    let wanted: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let is_table = |name: &String| tables.iter().any(|(table, _)| table == name);
    if let Some(unknown) = wanted.iter().find(|name| !is_table(name)) {
        let names: Vec<&str> = tables.iter().map(|(name, _)| *name).collect();
        eprintln!("there is no table {unknown:?}: {}", names.join(", "));
        return Err(ExitCode::from(2));
    }
    if !nix::unistd::geteuid().is_root() {
        eprintln!("{why_root}: run it as root (sudo -E make bench).");
        return Err(ExitCode::from(3));
    }
    let is_wanted = |name: &str| wanted.is_empty() || wanted.iter().any(|w| w == name);
    Ok(tables
        .iter()
        .copied()
        .filter(|(name, _)| is_wanted(name))
        .collect())
}

/// The load of the machine over the last minute.
pub fn load() -> String {
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    load.split(' ').next().unwrap_or_default().to_owned()
}

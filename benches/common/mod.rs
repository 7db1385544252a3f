//! What all benchmarks do: take the tables that are wanted, print them, and keep them as a chapter of the page.
//!
//! May not live here: what is measured, and how it is shown (`portcullis_figures`).
#![allow(dead_code)]

pub mod recipe;

use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use portcullis_figures::{Chapter, Machine, Table};

/// A name, and what measures the tables of that name at a site.
pub type Group<S> = (&'static str, fn(&mut S) -> Vec<Table>);

/// Where something is measured, and what it is compared with; or why not.
pub type Made<S> = Result<(S, Vec<String>), String>;

/// A benchmark: a chapter of the page without its figures.
pub struct Benchmark<S: 'static> {
    /// Its name.
    pub name: &'static str,
    /// Its place on the page.
    pub place: u32,
    /// Heading.
    pub title: &'static str,
    /// How it is measured.
    pub method: &'static str,
    /// In the order in which they are measured.
    pub groups: &'static [Group<S>],
    /// Where it is measured, and what it is compared with.
    pub site: fn() -> Made<S>,
}

impl<S> Benchmark<S> {
    /// Measures the groups that the arguments name, all of them without arguments, and prints their tables.
    /// With `--save` all are measured and kept in docs/benchmarks.
    pub fn run(&self) -> ExitCode {
        let arguments: Vec<String> = std::env::args().skip(1).collect();
        let save = arguments.iter().any(|argument| argument == "--save");
        // Cargo adds options of its own.
        let wanted: Vec<&str> = arguments
            .iter()
            .map(String::as_str)
            .filter(|a| !a.starts_with('-'))
            .collect();
        if let Some(error) = self.misuse(&wanted, save) {
            eprintln!("{error}");
            return ExitCode::from(2);
        }
        if !nix::unistd::geteuid().is_root() {
            eprintln!("This makes network namespaces and instances: run it as root (sudo -E make bench).");
            return ExitCode::from(3);
        }
        match self.measure(&wanted, save) {
            Ok(()) => ExitCode::SUCCESS,
            Err(reason) => {
                eprintln!("{reason}");
                ExitCode::FAILURE
            }
        }
    }

    fn misuse(&self, wanted: &[&str], save: bool) -> Option<String> {
        let names: Vec<&str> = self.groups.iter().map(|(name, _)| *name).collect();
        if let Some(unknown) = wanted.iter().find(|name| !names.contains(name)) {
            return Some(format!("there is no table {unknown:?}: {}", names.join(", ")));
        }
        (save && !wanted.is_empty()).then(|| "--save keeps all tables: name none".to_owned())
    }

    fn measure(&self, wanted: &[&str], save: bool) -> Result<(), String> {
        let start = Instant::now();
        println!("{}: load of the machine {}.", self.title, load());
        let (mut site, beside) = (self.site)()?;
        println!(
            "Beside {}.\nEach figure: median (least to most, number), times ours.",
            beside.join("; ")
        );
        let mut tables = Vec::new();
        for (name, group) in self.groups {
            if wanted.is_empty() || wanted.contains(name) {
                for table in group(&mut site) {
                    println!("\n{}", table.to_text());
                    tables.push(table);
                }
            }
        }
        drop(site);
        let seconds = start.elapsed().as_secs();
        println!("\nLoad of the machine at the end: {}. Took {seconds} s.", load());
        if !save {
            return Ok(());
        }
        let chapter = Chapter {
            name: self.name.to_owned(),
            place: self.place,
            title: self.title.to_owned(),
            method: self.method.to_owned(),
            machine: Machine::this(env!("CARGO_PKG_VERSION")).map_err(|error| error.to_string())?,
            beside,
            seconds,
            tables,
        };
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/benchmarks");
        let file = chapter
            .save(&folder)
            .map_err(|error| format!("can't keep it: {error}"))?;
        println!("Kept in {}: `make figures` makes the page of it.", file.display());
        Ok(())
    }
}

/// The load of the machine over the last minute.
pub fn load() -> String {
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    load.split(' ').next().unwrap_or_default().to_owned()
}

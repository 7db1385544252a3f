//! What it adds to an image, and what stays in memory when nothing happens.
//!
//! May not live here: memory under load (the endpoint's benchmark).

use std::fs;
use std::path::Path;
use std::thread::sleep;
use std::time::Duration;

use portcullis_figures::{Better, Cell, Column, Plot, Row, Table, Unit};

use crate::lab::Machine;
use crate::site::{Gate, Site};

/// Agents of clouds that Debian has, each with its command, as its unit has it, and a pattern of its processes.
const AGENTS: [(&str, &str, &str); 2] = [
    ("google-guest-agent", "google_guest_agent", "google_guest_agent"),
    ("waagent", "/usr/sbin/waagent -daemon", "waagent"),
];
/// How long an instance is left alone before its memory is looked at.
const IDLE: Duration = Duration::from_secs(20);

pub fn run(site: &mut Site) -> Vec<Table> {
    vec![sizes(site), memory(site)]
}

fn sizes(site: &Site) -> Table {
    let row = |gate: Gate| {
        // The overlay of the benchmark comes first, and the base last.
        let image = site.image(gate, &[]);
        let added = &image.layers[1..image.layers.len() - 1];
        gate.row(vec![Cell::one(
            added.iter().map(|layer| shipped(layer)).sum::<u64>() as f64,
        )])
    };
    let mut rows: Vec<Row> = [Gate::Portcullis, Gate::Recipe, Gate::Firewalld, Gate::ByHand]
        .map(row)
        .into();
    for (package, ..) in AGENTS {
        let image = site.image(Gate::Nothing, &[package]);
        let added = shipped(&image.layers[1]);
        rows.push(Row::theirs(package, vec![Cell::one(added as f64)]));
    }
    Table {
        title: "What it adds to an image".to_owned(),
        method: "Files below `/usr` and `/etc`, with what it needs and Debian's image with systemd, sshd, cloud-init and nftables \
                 does not have yet."
            .to_owned(),
        columns: vec![Column::of("files", Unit::Bytes, Better::Less)],
        rows,
        plot: Plot::Bars {
            columns: vec![0],
            logarithmic: false,
        },
    }
}

/// Bytes of the files of a layer that a package ships.
fn shipped(layer: &Path) -> u64 {
    fn sum(folder: &Path) -> u64 {
        let entries = fs::read_dir(folder).into_iter().flatten().flatten();
        entries
            .map(|entry| match entry.file_type() {
                Ok(kind) if kind.is_dir() => sum(&entry.path()),
                Ok(kind) if kind.is_file() => entry.metadata().map_or(0, |data| data.len()),
                _ => 0,
            })
            .sum()
    }
    sum(&layer.join("usr")) + sum(&layer.join("etc"))
}

fn memory(site: &Site) -> Table {
    let row = |gate: Gate, pattern: &str| {
        let machine = site.launch(gate, &[]);
        sleep(IDLE);
        let cells = usage(&machine, pattern);
        site.end();
        gate.row(cells)
    };
    let mut rows = vec![
        row(Gate::Portcullis, "/usr/bin/portcullis"),
        row(Gate::Recipe, "ufw"),
        row(Gate::Firewalld, "firewalld"),
    ];
    let names = AGENTS.map(|(package, ..)| package);
    let machine = site.launch(Gate::Nothing, &names);
    for (package, command, _) in AGENTS {
        machine.ok(&format!("systemd-run -q --unit bench-{package} {command}"));
    }
    sleep(IDLE);
    rows.extend(AGENTS.map(|(package, _, pattern)| Row::theirs(package, usage(&machine, pattern))));
    site.end();
    Table {
        title: "What stays in memory".to_owned(),
        method: format!(
            "PSS of all its processes on an instance that was left alone for {} s. The clouds' agents run without their cloud here, \
             and keep asking for it; they have no firewall, and portcullis sets no host name.",
            IDLE.as_secs()
        ),
        columns: vec![
            Column::of("memory", Unit::Bytes, Better::Less),
            Column::of("processes", Unit::Count, Better::Neither),
        ],
        rows,
        plot: Plot::Bars {
            columns: vec![0],
            logarithmic: false,
        },
    }
}

/// Memory and number of the processes whose command line has the pattern.
fn usage(machine: &Machine, pattern: &str) -> Vec<Cell> {
    // Not the one that asks.
    let pattern = format!("[{}]{}", &pattern[..1], &pattern[1..]);
    let said = machine.ok(&format!(
        "count=0; kib=0
         for pid in $(pgrep -f '{pattern}'); do
             pss=$(awk '/^Pss:/ {{ print $2 }}' /proc/$pid/smaps_rollup 2>/dev/null)
             [ -z \"$pss\" ] || {{ count=$((count + 1)); kib=$((kib + pss)); }}
         done; echo $kib $count"
    ));
    let numbers: Vec<f64> = said.split(' ').map(|word| word.parse().unwrap()).collect();
    vec![Cell::one(numbers[0] * 1024.0), Cell::one(numbers[1])]
}

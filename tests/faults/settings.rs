//! Each file of the settings damaged in each way: the boot's lockdown shuts the gate with the defaults, the daemon
//! that starts and the commands name the file, one that runs goes on; with the file mended, all works again.
//!
//! May not live here: what a setting may be (`src/config.rs`).

use std::fs;
use std::process::Output;

use crate::bench::Bench;
use crate::damage::{DAMAGES, Damage};

/// The gate before the network, with the defaults' state folder being this bench's: nothing of the machine's own is
/// read.
fn lockdown(bench: &Bench) -> Output {
    bench.host.run("nft flush ruleset");
    let mounts = "mount -t tmpfs none /var/lib && mkdir /var/lib/portcullis && \
                  mount --bind $0/state /var/lib/portcullis && exec $1 --config $0/portcullis.toml lockdown";
    let said = bench
        .inside(&["timeout", "30", "unshare", "--mount", "sh", "-c", mounts])
        .arg(bench.path("conf.d").parent().unwrap())
        .arg(env!("CARGO_BIN_EXE_portcullis"))
        .output()
        .unwrap();
    assert!(said.status.success(), "{said:?}");
    said
}

/// Tries one damage of one file. Those that make another file of settings are the daemon's to obey.
fn try_one(bench: &mut Bench, name: &str, damage: Damage, holds: &str) {
    let context = format!("{name}, {damage:?}");
    let path = bench.path(name);
    let good = fs::read(&path).unwrap();
    let generation = bench.start().generation;
    damage.apply(&path);
    let is_valid = damage == Damage::Empty;
    let is_named = |said: &Output| String::from_utf8_lossy(&said.stderr).contains(&*path.to_string_lossy());
    // The one that runs reads no settings anew; who would ask it is told which file it is.
    assert_eq!(bench.table(), holds, "{context}");
    if !is_valid {
        let said = bench.portcullis(&["status"], b"");
        assert!(
            said.status.code() == Some(2) && is_named(&said),
            "{context}: {said:?}"
        );
    }
    bench.end();
    let said = lockdown(bench);
    assert_eq!(bench.table(), holds, "{context}: before the network");
    assert!(is_valid || is_named(&said), "{context}: {said:?}");
    if !is_valid {
        for command in ["run", "check"] {
            let said = bench.portcullis(&[command], b"");
            assert!(
                said.status.code() == Some(2) && is_named(&said),
                "{context}, {command}: {said:?}"
            );
        }
    }
    assert_eq!(bench.table(), holds, "{context}");
    if path.is_dir() {
        fs::remove_dir(&path).unwrap();
    } else {
        fs::remove_file(&path).unwrap();
    }
    fs::write(&path, good).unwrap();
    assert_eq!(bench.start().generation, generation, "{context}");
    assert_eq!(bench.table(), holds, "{context}");
    bench.end();
}

#[test]
fn each_damaged_file_of_settings_leaves_the_gate_and_is_named() {
    let mut bench = Bench::new();
    fs::create_dir(bench.path("conf.d")).unwrap();
    let drop_in = "conf.d/10.toml";
    // Of a setting that does not change the gate: with the defaults it is the same.
    fs::write(bench.path(drop_in), "[audit]\nmax_bytes = 1000000\n").unwrap();
    bench.start();
    let said = bench.portcullis(&["apply", "--spec", "-"], &bench.spec(1, false).to_json());
    assert!(said.status.success(), "{said:?}");
    let holds = bench.table();
    assert!(holds.contains("policy drop") && holds.contains("8080"), "{holds}");
    bench.end();
    let mut tried = 0;
    for name in ["portcullis.toml", drop_in] {
        for damage in DAMAGES {
            // Without its paths, this daemon would be the machine's.
            if (name, damage) != ("portcullis.toml", Damage::Empty) {
                try_one(&mut bench, name, damage, &holds);
                tried += 1;
            }
        }
    }
    println!("damaged settings: {tried} tried, {tried} survived");
}

//! Each file of the state damaged in each way: the next daemon comes up with the gate as it was, or shut, and says
//! which file it is.
//!
//! May not live here: faults while the daemon runs (`calls`).

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use portcullis::system::documents;

use crate::bench::Bench;
use crate::damage::{DAMAGES, Damage};

/// What is in the state folder, and one of which words has to be said when it is damaged; no words where nothing is
/// lost that anybody could miss.
const FILES: [(&str, &[&str]); 17] = [
    ("spec.json", &["spec.json"]),
    ("trial.json", &["trial.json"]),
    ("managed-users.json", &["managed-users.json"]),
    ("revoked-keys.json", &["revoked-keys.json"]),
    ("access.json", &["access.json"]),
    ("tls.key", &["tls.key"]),
    ("tls.crt", &["tls.crt"]),
    ("enrolled.json", &["enrolled.json"]),
    ("enrolment-request.json", &["enrolment-request.json"]),
    ("time.json", &["time.json"]),
    ("host-keys.json", &["host-keys.json"]),
    ("used-tokens.json", &["used-tokens.json"]),
    // Without the setting that sessions end with their keys, it is only removed.
    ("session-keys.json", &[]),
    (
        "audit/audit.log",
        &[
            "BROKEN",
            "audit: is not a file",
            "was never finished",
            "larger than",
        ],
    ),
    (
        "audit/audit.head",
        &["its head was not there", "audit: is not a file"],
    ),
    ("spool/stream.json", &["stream.json"]),
    // The newest report that waits; the others are like it.
    ("spool/REPORT", &[]),
];

/// Files that a daemon of this bench has no reason to write, as it would write them.
const WRITTEN: [(&str, &str); 8] = [
    (
        "revoked-keys.json",
        r#"["SHA256:0000000000000000000000000000000000000000000"]"#,
    ),
    ("access.json", r#"{"all":null,"roles":{}}"#),
    ("enrolled.json", r#"{"instance":"i-1","chain":""}"#),
    ("enrolment-request.json", r#"{"instance":"i-1"}"#),
    (
        "time.json",
        r#"{"boot":"b","known":{"earliest":null,"proven":null},"now":1}"#,
    ),
    (
        "host-keys.json",
        r#"{"instance":"i-1","keys":[{"type":"ssh-ed25519","fingerprint":"SHA256:0","first_seen":"2026-01-01T00:00:00Z"}]}"#,
    ),
    ("used-tokens.json", r#"["00"]"#),
    ("session-keys.json", r#"{"boot":"b","current":[],"pending":[]}"#),
];

/// A state folder with all of it, and the gate for it: nothing accepted, the accepted spec, and that on trial.
struct Good {
    folder: tempfile::TempDir,
    tables: [String; 3],
}

fn copy(from: &Path, to: &Path) {
    let _ = fs::remove_dir_all(to);
    crate::common::run(&format!("cp -a {} {}", from.display(), to.display()));
}

fn files_of(folder: &Path) -> BTreeSet<PathBuf> {
    let mut found = BTreeSet::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => found.extend(files_of(&path)),
            false => _ = found.insert(path),
        }
    }
    found
}

/// The path of one of [`FILES`] in a state folder.
fn path_of(state: &Path, name: &str) -> PathBuf {
    match name {
        "spool/REPORT" => {
            let spool = files_of(&state.join("spool"));
            spool
                .into_iter()
                .rfind(|path| !path.ends_with("stream.json"))
                .unwrap()
        }
        name => state.join(name),
    }
}

impl Good {
    fn made_by(bench: &mut Bench) -> Self {
        bench.start();
        let shut = bench.table();
        let apply = |bench: &Bench, spec: &[u8], more: &[&str]| {
            let said = bench.portcullis(&[&["apply", "--spec", "-"][..], more].concat(), spec);
            assert!(said.status.success(), "{said:?}");
            bench.table()
        };
        let accepted = apply(bench, &bench.spec(1, false).to_json(), &[]);
        let on_trial = apply(bench, &bench.spec(2, true).to_json(), &["--confirm", "3600s"]);
        bench.end();
        let state = bench.path("state");
        for (name, text) in WRITTEN {
            documents::replace(&state.join(name), text.as_bytes()).unwrap();
        }
        let folder = tempfile::tempdir().unwrap();
        copy(&state, &folder.path().join("state"));
        let tables = [shut, accepted, on_trial];
        assert_eq!(tables.iter().collect::<BTreeSet<_>>().len(), 3);
        assert!(
            tables.iter().all(|table| table.contains("policy drop")),
            "{tables:?}"
        );
        Self { folder, tables }
    }

    /// Nothing that the daemon keeps is missing in [`FILES`].
    fn is_all_known(&self) {
        let state = self.folder.path().join("state");
        let known: BTreeSet<PathBuf> = FILES.iter().map(|(name, _)| path_of(&state, name)).collect();
        for path in files_of(&state) {
            let is_report = path.parent().unwrap().ends_with("spool");
            assert!(
                known.contains(&path) || is_report,
                "{} is not tried",
                path.display()
            );
        }
    }
}

/// Tries one damage of one file.
fn try_one(bench: &mut Bench, good: &Good, (name, words): (&str, &[&str]), damage: Damage) {
    let context = format!("{name}, {damage:?}");
    let state = bench.path("state");
    copy(&good.folder.path().join("state"), &state);
    let path = path_of(&state, name);
    let [shut, accepted, on_trial] = &good.tables;
    let holds = match name {
        "spec.json" => {
            fs::remove_file(state.join("trial.json")).unwrap();
            shut
        }
        "trial.json" => accepted,
        _ => on_trial,
    };
    damage.apply(&path);
    if ["spec.json", "trial.json"].contains(&name) {
        bench.lockdown();
        assert_eq!(&bench.table(), holds, "{context}: before the network");
    }
    fs::write(bench.path("log"), "").unwrap();
    let pid = {
        bench.spawn();
        bench.pid()
    };
    let report = bench.until_answers();
    assert_eq!(&bench.table(), holds, "{context}");
    let log = bench.log();
    let verdict = bench.portcullis(&["audit", "verify"], b"");
    let verdict = String::from_utf8_lossy(&[verdict.stdout, verdict.stderr].concat()).into_owned();
    let told = log + &serde_json::to_string(&report).unwrap() + &verdict;
    // The head's last word is which record is the oldest: that is found again in the log.
    let words = match (name, damage) {
        ("audit/audit.head", Damage::OtherWord) => &[],
        _ => words,
    };
    assert!(
        words.is_empty() || words.iter().any(|word| told.contains(word)),
        "{context} is not told of: {told}"
    );
    let peak = peak_mib(pid);
    assert!(peak < 128, "{context}: {peak} MiB of memory");
    // It is as able to change as before, once what stands in the way is moved out of it.
    let said = match name {
        "spec.json" | "trial.json" => {
            if damage == Damage::Folder {
                fs::remove_dir(&path).unwrap();
            }
            bench.portcullis(
                &["apply", "--force", "--spec", "-"],
                &bench.spec(3, true).to_json(),
            )
        }
        _ => bench.portcullis(&["confirm", "2"], b""),
    };
    assert!(said.status.success(), "{context}: {said:?}");
    assert_eq!(&bench.table(), on_trial, "{context}");
    assert_eq!(bench.pid(), pid);
    bench.end();
}

fn peak_mib(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() / 1024
}

#[test]
fn each_damaged_state_file_leaves_the_gate_and_is_named() {
    // Two at a time: most of it is waiting.
    let survived: usize = std::thread::scope(|scope| {
        let halves = [0, 1].map(|half| {
            scope.spawn(move || {
                let mut bench = Bench::new();
                let good = Good::made_by(&mut bench);
                good.is_all_known();
                let mut survived = 0;
                for file in FILES.into_iter().skip(half).step_by(2) {
                    for damage in DAMAGES.into_iter().chain([Damage::OtherWord]) {
                        try_one(&mut bench, &good, file, damage);
                        survived += 1;
                    }
                }
                survived
            })
        });
        halves.into_iter().map(|half| half.join().unwrap()).sum()
    });
    let tried = FILES.len() * (DAMAGES.len() + 1);
    println!("damaged state files: {tried} tried, {survived} survived");
    assert_eq!(survived, tried);
}

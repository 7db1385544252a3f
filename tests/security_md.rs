//! SECURITY.md is complete: each requirement and each threat has its row, each row and each promise names a test,
//! and that one is compiled, is run, and is the only one of its name (`make test-one`).
//!
//! The lists are fixed: a requirement or a threat goes away by a decision, not with its row. That what is named also
//! passed is checked by `tests/run`, after the tests.
//! May not live here: whether a test proves what its row says; that is read by people, and tried by breaking things.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "common/sources.rs"]
mod sources;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use portcullis_protocol::CheckId;
use portcullis_protocol::requirement::Requirement;
use sources::rust_files;

/// What the project answers for.
const REQUIREMENTS: [&str; 36] = [
    "BREV-SSH-1",
    "BREV-SSH-2",
    "BREV-SSH-3",
    "BREV-SSH-4",
    "BREV-SYS-1",
    "BREV-NET-1",
    "BREV-NET-2",
    "BREV-NET-3",
    "BREV-NET-4",
    "BREV-CLU-1",
    "BREV-CLU-2",
    "BREV-CLU-3",
    "BREV-CLU-4",
    "BREV-DATA-1",
    "BREV-DATA-2",
    "BREV-DATA-3",
    "BREV-DOC-1",
    "BREV-DOC-2",
    "NEB-1",
    "NEB-2",
    "NEB-3",
    "NEB-4",
    "NEB-5",
    "BREF-1",
    "BREF-2",
    "BREF-3",
    "BREF-4",
    "BREF-5",
    "BREF-6",
    "SRE-1",
    "SRE-2",
    "SRE-3",
    "SRE-4",
    "SRE-5",
    "SRE-6",
    "SRE-7",
];

/// What went wrong elsewhere, attacks to try, and who attacks: the first words of each row.
const THREATS: [&str; 47] = [
    "a published port passes an `input` policy of drop",
    "`--dport` in DOCKER-USER means the container's port",
    "Docker's nftables backend has no DOCKER-USER",
    "IPv6 forgotten for containers",
    "`flush ruleset` by one program",
    "open between boot and firewall",
    "fail-open scripts",
    "`modules_disabled=1`",
    "agent writes as root through a user's link",
    "agent deletes or truncates the user's keys",
    "all users' keys written to a shared file",
    "modes, SELinux labels, StrictModes",
    "NFS homes with root_squash",
    "ssh.service inactive until the first connection",
    "sshd is up before the key is there",
    "host keys change with the instance id",
    "`netplan try` did not revert",
    "failsafe ports too wide",
    "revoked peers keep live flows",
    "random ports of NCCL",
    "interface patterns",
    "clock wrong at first boot",
    "retry storms, 429",
    "enrolment token expires on a slow boot",
    "user-data readable by workloads",
    "\"encrypted?\" answered wrongly",
    "agents grow",
    "direct route to a container's address",
    "port published on loopback only",
    "packets from outside with a loopback source",
    "foreign flush while probing",
    "kill mid-apply",
    "lock-out by a bad policy",
    "flow of a revoked peer",
    "link and rename races",
    "a key with newline or options",
    "forged router advertisement",
    "token theft and replay",
    "man in the middle of the first SSH",
    "control plane answering 429 or never",
    "log injection",
    "stolen token",
    "malicious local user",
    "malicious container",
    "rogue peer",
    "compromised control plane",
    "supply chain",
];

/// States whose guarantee is told.
const STATES: [&str; 7] = [
    "power-on",
    "before the spec",
    "spec enforced",
    "awaiting confirmation",
    "daemon down",
    "table lost",
    "disk full",
];

fn document() -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("SECURITY.md")).unwrap()
}

/// A section of the document with all that is below it.
#[track_caller]
fn section<'a>(text: &'a str, heading: &str) -> &'a str {
    let (_, rest) = text
        .split_once(&format!("\n## {heading}\n"))
        .unwrap_or_else(|| panic!("no section {heading:?}"));
    rest.split("\n## ").next().unwrap()
}

/// The cells of each row of a section's tables. A bar behind a backslash is no border.
fn rows(section: &str) -> Vec<Vec<String>> {
    let lines = section.lines().filter(|line| line.starts_with("| "));
    lines
        .map(|line| {
            let line = line.replace("\\|", "\u{0}");
            let cells = line.trim_matches('|').split('|');
            cells.map(|cell| cell.trim().replace('\u{0}', "|")).collect()
        })
        .collect()
}

/// All Rust files of the repository in which a test may stand, by their path within it.
fn sources() -> BTreeMap<PathBuf, String> {
    let folders = ["src", "tests", "crates", "fuzz/src"];
    folders.into_iter().flat_map(rust_files).collect()
}

/// How many functions of that name a test harness runs: the attribute stands above the name, perhaps with a comment
/// or other attributes between. (That none is left out on purpose, `tests/shape.rs` sees to.)
fn tests_named(sources: &BTreeMap<PathBuf, String>, name: &str) -> usize {
    let call = format!("fn {name}(");
    let is_run = |text: &str, at: usize| {
        let before = text[..at].rsplit("\n}\n").next().unwrap_or_default();
        // What stands before `fn` on its own line is no line of the attributes.
        let lines = before.split('\n').rev().skip(1).map(str::trim);
        let attributes: Vec<&str> = lines
            .take_while(|line| line.starts_with('#') || line.starts_with("//"))
            .collect();
        let has = |start: &str| attributes.iter().any(|line| line.starts_with(start));
        (has("#[test]") || has("#[tokio::test")) && !has("#[cfg")
    };
    let found = sources
        .values()
        .flat_map(|text| text.match_indices(&call).map(move |(at, _)| (text, at)));
    found.filter(|(text, at)| is_run(text, *at)).count()
}

fn is_test(sources: &BTreeMap<PathBuf, String>, name: &str) -> bool {
    tests_named(sources, name) == 1
}

fn named_tests(cell: &str) -> Vec<&str> {
    let parts = cell.split("test:`").skip(1);
    parts.filter_map(|part| part.split('`').next()).collect()
}

/// Names tests that exist; or says that there is none, and "what is not covered" says it too.
#[track_caller]
fn is_tried(what: &str, cell: &str, sources: &BTreeMap<PathBuf, String>) {
    let tests = named_tests(cell);
    if tests.is_empty() {
        assert!(cell.starts_with("no test"), "{what} has no test: {cell:?}");
    }
    for test in tests {
        assert!(
            is_test(sources, test),
            "{what} names {test}, which is no test, or one of two"
        );
    }
}

#[test]
fn each_requirement_has_its_row_with_setting_check_and_test() {
    let (text, sources) = (document(), sources());
    let rows = rows(section(&text, "Requirements"));
    let known: BTreeSet<&str> = CheckId::ALL.iter().map(|id| id.as_str()).collect();
    let uncovered = section(&text, "What is not covered");
    for id in REQUIREMENTS {
        let found: Vec<_> = rows.iter().filter(|row| row[0] == id).collect();
        let [row] = found[..] else {
            panic!("{id} has {} rows", found.len());
        };
        let [_, requirement, setting, check, tests] = &row[..] else {
            panic!("{id} has {} cells", row.len());
        };
        assert!(!requirement.is_empty() && !setting.is_empty(), "{id}: {row:?}");
        let checks = check
            .split('`')
            .skip(1)
            .step_by(2)
            .filter(|word| known.contains(word));
        let because = check
            .strip_prefix("no check: ")
            .is_some_and(|reason| reason.len() > 5);
        assert!(checks.count() > 0 || because, "{id} has no check: {check:?}");
        is_tried(id, tests, &sources);
        if tests.starts_with("no test") {
            assert!(uncovered.contains(id), "{id} has no test, and that is not told");
        }
    }
    // None that somebody added elsewhere is left out here.
    for requirement in Requirement::ALL {
        assert!(REQUIREMENTS.contains(&requirement.id()), "{requirement}");
    }
    // What a check watches, its requirement names.
    for check in CheckId::ALL {
        let watched = check.requirement().id();
        let row = rows.iter().find(|row| row[0] == watched).unwrap();
        assert!(
            row[3].contains(&format!("`{check}`")),
            "{watched} does not name {check}"
        );
    }
}

#[test]
fn each_threat_has_its_row_with_mitigation_and_test() {
    let (text, sources) = (document(), sources());
    let rows = rows(section(&text, "Threats"));
    for threat in THREATS {
        let found: Vec<_> = rows.iter().filter(|row| row[0].starts_with(threat)).collect();
        let [row] = found[..] else {
            panic!("{threat:?} has {} rows", found.len());
        };
        assert!(row.len() == 3 && row[1].len() > 5, "{threat}: {row:?}");
        is_tried(threat, &row[2], &sources);
    }
}

#[test]
fn each_state_has_its_guarantee() {
    let (text, sources) = (document(), sources());
    let rows = rows(section(&text, "What holds in each state"));
    for state in STATES {
        let row = rows.iter().find(|row| row[0].starts_with(state));
        let row = row.unwrap_or_else(|| panic!("no state {state:?}"));
        assert!(
            row.len() == 5 && row[1].len() > 5 && row[2].len() > 3,
            "{state}: {row:?}"
        );
        is_tried(state, &row[4], &sources);
    }
}

#[test]
fn the_contact_and_the_terms_of_disclosure_are_there() {
    let text = document();
    let terms = section(&text, "Reporting a vulnerability");
    for words in [
        "private vulnerability reporting",
        "@",
        "working days",
        "90 days",
        "Good-faith",
    ] {
        assert!(terms.contains(words), "{words}");
    }
}

#[test]
fn compliance_notes_name_checks_that_exist() {
    let text = document();
    let rows = rows(section(&text, "Compliance notes"));
    let known: BTreeSet<&str> = CheckId::ALL.iter().map(|id| id.as_str()).collect();
    for standard in [
        "CIS Debian 12",
        "CIS Debian 13",
        "CIS Distribution Independent",
        "CIS Controls 8.1, 4.4",
        "SOC 2 CC6.6",
        "SOC 2 CC8.1",
        "ISO/IEC 27001 A.8.20",
    ] {
        let row = rows.iter().find(|row| row[0].starts_with(standard)).unwrap();
        assert!(row[2].len() > 5, "{row:?}");
    }
    let named = rows
        .iter()
        .skip(1)
        .flat_map(|row| row[2].split('`').skip(1).step_by(2));
    let checks: BTreeSet<&str> = named.filter(|word| known.contains(word)).collect();
    assert!(checks.len() > 10, "{checks:?}");
}

/// What is promised in a table has a test in its last cell, or says that there is none, and so does what is not covered.
#[test]
fn each_row_that_promises_something_names_a_test() {
    let (text, sources) = (document(), sources());
    let mut tried = 0;
    for (heading, columns) in [
        ("What holds in each state", 5),
        ("Who may do what, with which credential, for how long", 6),
        ("Requirements", 5),
        ("Threats", 3),
        ("All attacks and faults that are tried", 4),
    ] {
        // Below the heads of the tables and their lines.
        let is_head = |row: &[String]| ["state", "credential", "id", "threat"].contains(&row[0].as_str());
        for row in rows(section(&text, heading)) {
            if is_head(&row) || row[0].starts_with("attack or") || row[0].starts_with("--") {
                continue;
            }
            assert_eq!(row.len(), columns, "{heading}: {row:?}");
            is_tried(&row[0], &row[columns - 1], &sources);
            tried += 1;
        }
    }
    assert!(tried > 150, "only {tried} rows");
}

/// The paragraphs of the sections that promise something name a test, but for those that lead to a table or say what
/// is trusted.
#[test]
fn each_paragraph_that_promises_something_names_a_test() {
    let text = document();
    let model = section(&text, "The model");
    let gate = model.split("**The gate:**").nth(1).unwrap();
    assert!(!named_tests(gate).is_empty(), "{gate}");
    for (heading, at_least) in [
        ("What each process may do", 4),
        ("Who may do what, with which credential, for how long", 1),
    ] {
        let mut paragraphs = 0;
        for paragraph in section(&text, heading).split("\n\n").map(str::trim) {
            if paragraph.is_empty() || paragraph.starts_with('|') || paragraph.ends_with(':') {
                continue;
            }
            assert!(!named_tests(paragraph).is_empty(), "{heading}: {paragraph}");
            paragraphs += 1;
        }
        assert!(paragraphs >= at_least, "{heading}: {paragraphs}");
    }
}

/// Rust leaves out a file that no other one declares, and says nothing.
#[test]
fn each_file_with_tests_is_part_of_a_program() {
    let sources = sources();
    let is_root = |path: &Path| {
        let name = path.file_name().unwrap();
        let in_tests = path.parent().unwrap().ends_with("tests");
        name == "main.rs" || name == "lib.rs" || in_tests
    };
    let declares = |path: &Path, module: &str| {
        sources.get(path).is_some_and(|text| {
            let line = format!("mod {module};");
            text.lines().any(|l| {
                l.trim_start_matches("pub(crate) ")
                    .trim_start_matches("pub(super) ")
                    .trim_start_matches("pub ")
                    == line
            })
        })
    };
    for (path, text) in &sources {
        if is_root(path) || !(text.contains("#[test]") || text.contains("#[tokio::test")) {
            continue;
        }
        let (folder, stem) = (
            path.parent().unwrap(),
            path.file_stem().unwrap().to_str().unwrap(),
        );
        let (folder, module) = match stem {
            "mod" => (
                folder.parent().unwrap(),
                folder.file_name().unwrap().to_str().unwrap(),
            ),
            stem => (folder, stem),
        };
        let above = [
            folder.join("main.rs"),
            folder.join("lib.rs"),
            folder.join("mod.rs"),
            folder.with_extension("rs"),
        ];
        // Or by its path.
        let by_path = format!("#[path = \"{}\"]", path.file_name().unwrap().to_str().unwrap());
        let beside = sources
            .iter()
            .filter(|(other, _)| other.parent() == path.parent());
        let found = above.iter().any(|file| declares(file, module))
            || beside.into_iter().any(|(_, text)| text.contains(&by_path));
        assert!(
            found,
            "{} is in no program: nobody declares {module}",
            path.display()
        );
    }
    // The look itself.
    assert!(declares(Path::new("src/lib.rs"), "log"));
    assert!(!declares(Path::new("src/lib.rs"), "nobody"));
}

/// The rights that are told are those that the unit has.
#[test]
fn the_table_of_rights_is_the_units() {
    let text = document();
    let process = rows(section(&text, "What each process may do"));
    let told: BTreeSet<&str> = process
        .iter()
        .flat_map(|row| row[0].split('`').filter(|word| word.starts_with("CAP_")))
        .collect();
    let unit = Path::new(env!("CARGO_MANIFEST_DIR")).join("systemd/portcullis.service");
    let unit = fs::read_to_string(unit).unwrap();
    let has: Vec<&str> = unit
        .lines()
        .filter_map(|line| line.strip_prefix("CapabilityBoundingSet="))
        .flat_map(str::split_whitespace)
        .collect();
    assert_eq!(told, has.into_iter().collect::<BTreeSet<_>>());
}

/// One command for any test, and a check after all of them that those of the document passed.
#[test]
fn the_commands_are_told_and_there() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let read = |name: &str| fs::read_to_string(root.join(name)).unwrap();
    assert!(document().contains("make test-one NAME="));
    assert!(read("CONTRIBUTING.md").contains("make test-one NAME="));
    assert!(read("Makefile").contains("\ntest-one:") && read("Makefile").contains("\ttests/run\n"));
}

/// Every test that is named anywhere in the document is one that a harness runs.
#[test]
fn what_the_document_calls_a_test_is_one() {
    let (text, sources) = (document(), sources());
    let named: BTreeSet<&str> = named_tests(&text).into_iter().collect();
    assert!(named.len() > 100, "only {}", named.len());
    let missing: Vec<&&str> = named.iter().filter(|name| !is_test(&sources, name)).collect();
    assert!(missing.is_empty(), "{missing:?}");
    // The look itself: a helper is no test, and a name that is nowhere is none.
    for other in ["is_test", "sources", "no_such_test_anywhere"] {
        assert!(!is_test(&sources, other), "{other}");
    }
}

/// Links within the document lead to a heading.
#[test]
fn links_within_the_document_lead_somewhere() {
    let text = document();
    let anchor = |heading: &str| -> String {
        let kept = heading.trim().to_lowercase();
        let kept = kept.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c));
        kept.map(|c| if c == ' ' { '-' } else { c }).collect()
    };
    let headings = text.lines().filter(|line| line.starts_with('#'));
    let anchors: BTreeSet<String> = headings
        .map(|line| anchor(line.trim_start_matches('#')))
        .collect();
    for link in text
        .split("](#")
        .skip(1)
        .filter_map(|rest| rest.split(')').next())
    {
        assert!(anchors.contains(link), "#{link} leads nowhere: {anchors:?}");
    }
}

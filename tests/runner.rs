//! What `tests/run` makes of tests that pass, fail or hang: with a cargo and fuzzers that say what they are told to.
//!
//! May not live here: what the tests themselves have to hold.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Output};

// What a test program with two tests does. One that hangs has started a process in a session of its own.
const PASSES: &str = "echo 'test one ... ok'; echo 'test two ... ok'";
const FAILS: &str = "echo 'test one ... ok'; echo 'test two ... FAILED'; exit 101";
const HANGS: &str = "echo 'test one ... ok'; echo 'test two has been running for over 60 seconds'
    setsid sleep 300 & echo $! > left; sleep 300";
const FUZZED: &str = "echo '2 passed, 0 failed'";

/// Runs a copy of the script over a program that does one thing at first and another when it is run once more.
fn run(first: &str, then: &str, fuzzers: &str) -> (Output, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let script = |name: &str, text: &str| {
        let path = folder.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    };
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/run");
    script("tests/run", &fs::read_to_string(source).unwrap());
    script(
        "first",
        &format!("#!/bin/bash\necho 'running 2 tests'\n{first}\n"),
    );
    script("then", &format!("#!/bin/bash\necho 'running 1 test'\n{then}\n"));
    script("fuzz/run", &format!("#!/bin/bash\n{fuzzers}\n"));
    let cargo = "#!/bin/bash\ncase \"$*\" in *--no-run) exit;; *--exact*) program=then;; *) program=first;; esac\n\
                 echo '     Running x'\n./$program\n";
    script("bin/cargo", cargo);
    fs::write(folder.path().join("SECURITY.md"), "test:`two`\n").unwrap();
    let path = format!(
        "{}/bin:{}",
        folder.path().display(),
        std::env::var("PATH").unwrap()
    );
    let output = Command::new("timeout")
        .arg("60")
        .arg(folder.path().join("tests/run"))
        .env("PATH", path)
        .env("TEST_SILENCE", "1")
        .output()
        .unwrap();
    (output, folder)
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&[&output.stdout[..], &output.stderr].concat()).into_owned()
}

#[test]
fn tests_that_pass_pass_and_the_fuzzers_have_their_say() {
    let (output, _folder) = run(PASSES, FAILS, FUZZED);
    let said = text(&output);
    assert!(output.status.success(), "{said}");
    for line in ["Running x", "test two ... ok", "2 passed, 0 failed"] {
        assert!(said.contains(line), "{line}: {said}");
    }
    let (output, _folder) = run(PASSES, PASSES, "echo broken; exit 1");
    assert!(
        output.status.code() == Some(1) && text(&output).contains("broken"),
        "{output:?}"
    );
}

#[test]
fn what_security_md_names_has_to_have_passed() {
    let (output, _folder) = run("echo 'test one ... ok'", PASSES, FUZZED);
    let said = text(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(
        said.contains("names tests that did not pass in this run:\ntwo"),
        "{said}"
    );
}

#[test]
fn a_test_that_fails_has_one_more_try_and_is_named() {
    let (output, _folder) = run(FAILS, "echo 'test two ... ok'", FUZZED);
    let said = text(&output);
    assert!(output.status.success(), "{said}");
    assert!(
        said.contains("UNSTEADY: passed only at the second try: two"),
        "{said}"
    );
    let (output, _folder) = run(FAILS, "echo 'test two ... FAILED'; exit 101", FUZZED);
    assert_eq!(output.status.code(), Some(101), "{output:?}");
    let many = "for name in a b c d; do echo \"test $name ... FAILED\"; done; exit 101";
    let (output, _folder) = run(many, PASSES, FUZZED);
    assert_eq!(output.status.code(), Some(101), "more than a few: {output:?}");
    assert!(!text(&output).contains("run once more"), "{output:?}");
}

#[test]
fn a_test_that_hangs_is_ended_with_all_it_started_and_is_a_failure() {
    let (output, folder) = run(HANGS, "echo 'test two ... ok'", FUZZED);
    let said = text(&output);
    assert!(output.status.success(), "{said}");
    assert!(
        said.contains("HANGS: ") && said.contains("thread first: "),
        "{said}"
    );
    assert!(said.contains("sleep 300"), "who was there: {said}");
    assert!(said.contains("second try: two"), "{said}");
    let left = fs::read_to_string(folder.path().join("left")).unwrap();
    let state = fs::read_to_string(format!("/proc/{}/stat", left.trim()));
    assert!(
        state.as_ref().map_or(true, |state| state.contains(") Z ")),
        "{state:?}"
    );

    let (output, _folder) = run(HANGS, HANGS, FUZZED);
    assert!(!output.status.success(), "{output:?}");
    // Of two tests neither has a result: the other one never had its turn.
    let early = HANGS.replace("echo 'test one ... ok'; ", "");
    let (output, _folder) = run(&early, "echo 'test two ... ok'", FUZZED);
    assert!(!output.status.success(), "{output:?}");
}

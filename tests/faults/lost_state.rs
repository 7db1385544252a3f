//! The state folder is taken away, emptied or covered while the daemon runs: what was accepted is written anew, or
//! the report says that the disk does not hold it, and it is as soon as it can be.
//!
//! May not live here: damaged files at a start (`state_files`), disks that do not come at a boot
//! (`tests/instances/fault_boots.rs`).

use std::fs;
use std::os::unix::fs::symlink;

use portcullis::system::documents;
use portcullis_protocol::{Check, CheckId, Status};

use crate::bench::{Bench, START_TIME};
use crate::common::eventually;

/// What the report says of the gate once it says that.
#[track_caller]
fn until_told(bench: &Bench, what: &str, is_so: impl Fn(&Check) -> bool) -> Check {
    eventually(START_TIME, what, || {
        let report = bench.status().ok_or("no answer")?;
        let check = report.check(CheckId::FirewallApplied).unwrap();
        if is_so(check) {
            Ok(check.clone())
        } else {
            Err(format!("{check:?}"))
        }
    })
}

fn restored(check: &Check) -> Option<&str> {
    check
        .evidence
        .get("state_restored")
        .and_then(|times| times.as_str())
}

/// The key that callers pin, however its lines are broken.
fn tls_key(bench: &Bench) -> String {
    let text = fs::read_to_string(bench.path("state/tls.key")).unwrap();
    text.split_whitespace().collect()
}

/// A script among the daemon's own mounts, where $0 is the state folder.
fn among_its_mounts(bench: &Bench, script: &str) {
    let pid = bench.pid().to_string();
    let said = bench
        .inside(&["nsenter", "-t", &pid, "-m", "sh", "-c", script])
        .arg(bench.path("state"))
        .output()
        .unwrap();
    assert!(said.status.success(), "{script}: {said:?}");
}

/// The daemon that starts next is the same instance, with the same spec.
fn starts_as(bench: &mut Bench, key: &str) {
    let (table, accepted) = (bench.table(), bench.accepted());
    bench.end();
    let report = bench.start();
    assert_eq!(report.generation, Some(accepted.generation.get()));
    assert_eq!((bench.table(), bench.accepted()), (table, accepted));
    assert_eq!(tls_key(bench), key);
}

#[test]
fn a_state_folder_that_goes_is_written_anew_and_told_of() {
    let mut bench = Bench::new();
    bench.start();
    for (generation, other) in [(1, false), (2, true)] {
        let spec = bench.spec(generation, other).to_json();
        let said = bench.portcullis(&["apply", "--force", "--spec", "-"], &spec);
        assert!(said.status.success(), "{said:?}");
    }
    let state = bench.path("state");
    let (table, accepted, key) = (bench.table(), bench.accepted(), tls_key(&bench));
    let healthy = until_told(&bench, "as it should be", |check| check.status == Status::Pass);
    assert_eq!(restored(&healthy), None);
    let pid = bench.pid();
    let losses: [(&str, &dyn Fn()); 5] = [
        // At once, whatever the daemon writes there at that moment.
        ("gone", &|| fs::rename(&state, bench.path("gone")).unwrap()),
        ("emptied", &|| {
            fs::rename(&state, bench.path("emptied")).unwrap();
            let _ = fs::create_dir(&state);
        }),
        ("without its spec", &|| {
            fs::remove_file(state.join("spec.json")).unwrap()
        }),
        ("with another spec", &|| {
            documents::replace(&state.join("spec.json"), &bench.spec(9, false).to_json()).unwrap();
        }),
        ("with an endless one", &|| {
            fs::remove_file(state.join("spec.json")).unwrap();
            symlink("/dev/zero", state.join("spec.json")).unwrap();
        }),
    ];
    for (times, (what, lose)) in (1..).zip(losses) {
        lose();
        let check = until_told(&bench, what, |check| {
            restored(check) == Some(&times.to_string()) && check.status == Status::Pass
        });
        assert_eq!(bench.accepted(), accepted, "{what}: {check:?}");
        assert_eq!(tls_key(&bench), key, "{what}");
        assert_eq!((bench.table(), bench.pid()), (table.clone(), pid), "{what}");
    }
    assert!(
        bench.log().contains("what the daemon holds is written anew"),
        "{}",
        bench.log()
    );
    let audit = bench.portcullis(&["audit"], b"");
    assert!(
        String::from_utf8_lossy(&audit.stdout).contains("restore-state"),
        "{audit:?}"
    );
    starts_as(&mut bench, &key);
}

#[test]
fn a_mount_over_the_state_folder_is_written_to_or_told_of() {
    let mut bench = Bench::new();
    bench.start();
    let said = bench.portcullis(&["apply", "--spec", "-"], &bench.spec(1, false).to_json());
    assert!(said.status.success(), "{said:?}");
    let (table, key) = (bench.table(), tls_key(&bench));

    // An empty disk: what holds is on it from now on.
    among_its_mounts(&bench, "mount -t tmpfs -o mode=700 none \"$0\"");
    until_told(&bench, "written anew", |check| restored(check) == Some("1"));
    among_its_mounts(
        &bench,
        "grep -Eq '\"generation\": ?1,' \"$0/spec.json\" && test -s \"$0/tls.key\"",
    );
    // Not the old disk, with what was accepted before.
    among_its_mounts(&bench, "umount -l \"$0\"");
    until_told(&bench, "as it was", |check| check.status == Status::Pass);

    // One that nothing can be written to.
    among_its_mounts(&bench, "mount -t tmpfs -o ro none \"$0\"");
    let check = until_told(&bench, "told", |check| check.status == Status::Warn);
    assert!(check.summary.contains("Read-only file system"), "{check:?}");
    assert_eq!(check.evidence["durable"], false);
    let remedy = check.remedy.as_deref().unwrap();
    assert!(
        remedy.contains("give the state folder its disk, or room, again")
            && remedy.ends_with("portcullis-operations(7), firewall.applied"),
        "{check:?}"
    );
    assert!(bench.log().contains("can't be given it"), "{}", bench.log());
    assert_eq!(bench.table(), table);
    let said = bench.portcullis(
        &["apply", "--force", "--spec", "-"],
        &bench.spec(2, true).to_json(),
    );
    assert_eq!(said.status.code(), Some(1), "{said:?}");
    assert_eq!(bench.table(), table);
    // The disk is there again, and nobody tells.
    among_its_mounts(&bench, "umount -l \"$0\"");
    until_told(&bench, "as it was", |check| check.status == Status::Pass);
    let spec = bench.spec(2, true).to_json();
    let said = bench.portcullis(&["apply", "--force", "--spec", "-"], &spec);
    assert!(said.status.success(), "{said:?}");
    starts_as(&mut bench, &key);
}

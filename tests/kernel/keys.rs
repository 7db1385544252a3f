//! Key files where other kernels are needed than the one that runs the tests: with SELinux on, and with
//! quotas for users.
//!
//! No policy is loaded, so the label is whatever its owner sets, and a new file has none. May not live here:
//! what a policy would allow.

use portcullis_protocol::{CheckId, Report};
use serde_json::json;

use crate::common;
use crate::guest::Guest;

const LABEL: &str = "system_u:object_r:ssh_home_t:s0";
const OTHER_LABEL: &str = "system_u:object_r:user_home_t:s0";

#[test]
fn a_key_file_keeps_its_selinux_label_and_stays_whole_over_quota() {
    let folder = tempfile::tempdir().unwrap();
    let disk = folder.path().join("disk");
    common::run(&format!(
        "mke2fs -q -t ext4 -b 1024 -O quota -E quotatype=usrquota {} 16M",
        disk.display()
    ));
    let mut guest = Guest::boot_with("selinux=1 security=selinux", "keys", Some(&disk));
    guest.until_off();
    for step in ["sshd", "home", "selinux", "relabel", "daemon", "relabel-again"] {
        guest.ok(step);
    }

    // The positive control: a file that is replaced plainly loses its label.
    assert_eq!(label(&guest, "replaced"), "system_u:object_r:plain_t:s0");
    let lost = guest.step("replaced-label");
    assert!(lost.complaint.contains("No such attribute"), "{lost:?}");

    assert_written(&guest, "first", "first");
    assert_eq!(label(&guest, "first-label"), LABEL);
    assert_eq!(guest.ok("first-folder"), ".\n..\nauthorized_keys\n");
    assert_written(&guest, "second", "second");
    assert_eq!(label(&guest, "second-label"), OTHER_LABEL);

    over_quota(&guest);
    guest.ok("raise");
    assert_written(&guest, "fourth", "fourth");
    assert_eq!(label(&guest, "fourth-label"), OTHER_LABEL);
}

fn over_quota(guest: &Guest) {
    guest.ok("limit");
    guest.ok("full-root");
    let refused = guest.step("full-alice");
    assert!(
        refused.code != 0 && refused.complaint.contains("quota exceeded"),
        "there is no quota: {refused:?}"
    );
    let report: Report = guest.json("third-status");
    let check = report.check(CheckId::KeysInstalled).unwrap();
    assert_eq!(json!(check.status), "fail", "{check:?}");
    let text = json!(check).to_string();
    assert!(text.contains("quota exceeded"), "{text}");
    assert!(text.contains("free space or raise the user's quota"), "{text}");
    // As it was, and nothing is left beside it.
    assert_eq!(guest.ok("third-file"), guest.ok("second-file"));
    assert_eq!(label(guest, "third-label"), OTHER_LABEL);
    assert_eq!(guest.ok("third-folder"), ".\n..\nauthorized_keys\n");
}

/// The key with this comment is the only one of ours, and the user's line is still there.
#[track_caller]
fn assert_written(guest: &Guest, step: &str, comment: &str) {
    let file = guest.ok(&format!("{step}-file"));
    let ours: Vec<&str> = file
        .lines()
        .filter(|line| line.ends_with("#portcullis"))
        .collect();
    assert_eq!(ours.len(), 1, "{:?}: {file}", guest.step(step));
    assert!(ours[0].contains(&format!(" {comment} ")), "{file}");
    assert!(file.ends_with("\n# mine\n"), "{file}");
}

/// A label as it is printed, without its end: the kernel keeps a NUL there, setfattr does not.
#[track_caller]
fn label<'a>(guest: &'a Guest, step: &str) -> &'a str {
    guest.ok(step).trim_end_matches(['\0', '\n'])
}

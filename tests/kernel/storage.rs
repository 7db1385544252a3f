//! Encryption at rest on real devices: LUKS2, LUKS1 and plain dm-crypt, with LVM, RAID, btrfs and files between them
//! and the file systems, and the same without encryption.
//!
//! May not live here: kinds that this kernel or this machine has not (recorded trees, `tests/storage`).

use std::path::{Path, PathBuf};

use portcullis_protocol::{Check, CheckId, Report};
use serde_json::{Value, json};

use crate::guest::Guest;
use crate::old_kernel;

const DISKS: usize = 8;
const DISK_BYTES: u64 = 160 << 20;
pub const AES: &str = "AES-256-XTS";

/// As the first machine's disks cost: nothing until they are written to.
pub fn disks(folder: &Path, count: usize, bytes: u64) -> Vec<PathBuf> {
    (0..count)
        .map(|at| {
            let path = folder.join(format!("disk-{at}"));
            std::fs::File::create(&path).unwrap().set_len(bytes).unwrap();
            path
        })
        .collect()
}

#[track_caller]
pub fn check(guest: &Guest, step: &str) -> Check {
    let report: Report = guest.json(step);
    report.check(CheckId::StorageEncrypted).unwrap().clone()
}

#[track_caller]
pub fn volume<'a>(check: &'a Check, point: &str) -> &'a Value {
    let volumes = check.evidence["volumes"].as_array().unwrap();
    let found = volumes.iter().find(|volume| volume["mounts"][0] == point);
    found.unwrap_or_else(|| panic!("{point} is not told: {volumes:#?}"))
}

/// The devices on the way from a volume down.
pub fn way(volume: &Value) -> Vec<(&str, &str)> {
    let steps = volume["way"].as_array().unwrap().iter();
    steps
        .map(|step| (step["what"].as_str().unwrap(), step["device"].as_str().unwrap()))
        .collect()
}

#[track_caller]
pub fn is(check: &Check, point: &str, state: &str, algorithms: &[&str]) {
    let volume = volume(check, point);
    assert_eq!(volume["state"], state, "{volume:#?}");
    assert_eq!(volume["algorithms"], json!(algorithms), "{volume:#?}");
}

#[test]
fn what_luks_encrypts_is_verified_and_the_same_without_it_is_absent() {
    let folder = tempfile::tempdir().unwrap();
    let disks = disks(folder.path(), DISKS, DISK_BYTES);
    let mut guest = Guest::boot_on("", "storage", disks.iter().map(PathBuf::as_path));
    guest.until_off();
    old_kernel(&guest);

    let none = check(&guest, "empty");
    assert_eq!(
        (json!(none.status), &none.evidence["state"]),
        (json!("pass"), &json!("none"))
    );
    each_kind_is_followed(&guest);
    each_leg_counts(&guest);
    the_daemon_is_told(&guest);
}

#[track_caller]
fn each_kind_is_followed(guest: &Guest) {
    for step in [
        "luks2-partitions",
        "luks2",
        "lvm-on-luks",
        "luks-on-lvm",
        "half-a-raid",
        "half-a-btrfs",
        "plain",
        "image-plain",
        "image-luks",
    ] {
        guest.ok(step);
    }
    let first = check(guest, "first");
    is(&first, "/luks2", "verified", &[AES]);
    let luks = &volume(&first, "/luks2")["way"][0];
    assert_eq!(
        [
            &luks["what"],
            &luks["cipher"],
            &luks["key_bits"],
            &luks["cipher_seen_in"]
        ],
        [
            &json!("LUKS2"),
            &json!("aes-xts-plain64"),
            &json!(512),
            &json!("dmsetup table")
        ]
    );
    is(&first, "/plain", "absent", &[]);
    assert_eq!(
        way(volume(&first, "/plain")),
        [("partition", "vda3"), ("disk", "vda")]
    );
    assert!(volume(&first, "/boot")["excused"].is_string());
    assert_eq!(json!(first.status), "fail");

    let half = check(guest, "half");
    for (point, kinds) in [
        ("/lvm-on-luks", ["LVM", "LUKS2", "disk"].as_slice()),
        ("/luks-on-lvm", &["LUKS2", "LVM", "disk"]),
        ("/image-luks", &["loop", "LUKS2", "partition", "disk"]),
        ("/dev/mapper/vg0-swap", &["LVM", "LUKS2", "disk"]),
    ] {
        is(&half, point, "verified", &[AES]);
        let found: Vec<&str> = way(volume(&half, point))
            .into_iter()
            .map(|(what, _)| what)
            .collect();
        assert_eq!(found, kinds, "{point}");
    }
    is(&half, "/dev/mapper/short", "verified", &["AES-128-XTS"]);
    assert!(volume(&half, "/dev/mapper/short")["lesser"].is_string());
    is(&half, "/image-plain", "absent", &[]);
}

/// A plain leg of a RAID, or of btrfs, makes the whole plain; encrypted, it does not.
#[track_caller]
fn each_leg_counts(guest: &Guest) {
    for step in ["whole-raid", "whole-btrfs", "null"] {
        guest.ok(step);
    }
    let (half, whole) = (check(guest, "half"), check(guest, "whole"));
    for (point, plain_leg) in [("/raid", "vde"), ("/btrfs", "vdg")] {
        is(&half, point, "absent", &[AES]);
        assert_eq!(way(volume(&half, point)).last(), Some(&("disk", plain_leg)));
        is(&whole, point, "verified", &[AES]);
    }
    is(&whole, "/null", "absent", &[]);
    let reason = volume(&whole, "/null")["reason"].as_str().unwrap();
    assert!(reason.contains("cipher_null-ecb encrypts nothing"), "{reason}");
    // No key is in what was recorded, nor in a report.
    assert!(guest.ok("whole-record").contains("luks2: 0 "));
}

/// What changes is told by the kernel: nobody asked for a look.
#[track_caller]
fn the_daemon_is_told(guest: &Guest) {
    for step in [
        "daemon", "spec", "absent", "off", "claim", "attested", "umount", "lesser", "swapoff", "verified",
    ] {
        guest.ok(step);
    }
    let attested = check(guest, "attested-status");
    assert_eq!(json!(attested.status), "warn");
    is(&attested, "/plain", "attested", &[]);
    assert!(
        attested
            .summary
            .contains("attested, not verified: cloud.example says")
    );
    let lesser = check(guest, "lesser-status");
    assert_eq!(json!(lesser.status), "warn");
    assert!(lesser.summary.contains("a key of 128 bits"), "{}", lesser.summary);
    let verified = check(guest, "verified-status");
    assert_eq!(verified.evidence["state"], "verified");
    assert_eq!(
        verified.summary,
        format!("all 7 volumes are encrypted with {AES}; /boot must be plain to boot from")
    );
}

/// The daemon has no CAP_SYS_ADMIN and opens no device: what the cipher is, only the unit can ask.
#[test]
fn a_sandboxed_daemon_asks_a_unit_for_ciphers_and_without_it_knows_none() {
    let folder = tempfile::tempdir().unwrap();
    let disks = disks(folder.path(), DISKS, DISK_BYTES);
    // What systemd tells the kernel's log stays off the console: it would be in the middle of a line.
    let mut guest = Guest::boot_on("loglevel=1", "units", disks.iter().map(PathBuf::as_path));
    guest.until_off();
    old_kernel(&guest);
    for step in [
        "luks2-partitions",
        "luks2",
        "start",
        "answers",
        "absent",
        "umount",
        "verified",
    ] {
        guest.ok(step);
    }
    assert_eq!(guest.ok("first-process"), "systemd\n");
    let sandbox = guest.ok("sandbox");
    let effective = sandbox
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .unwrap();
    let effective = u64::from_str_radix(effective.trim(), 16).unwrap();
    assert_eq!(
        effective & (1 << 21),
        0,
        "the daemon has CAP_SYS_ADMIN: {sandbox}"
    );

    let absent = check(&guest, "absent-status");
    is(&absent, "/plain", "absent", &[]);
    is(&absent, "/luks2", "verified", &[AES]);
    let verified = check(&guest, "verified-status");
    assert_eq!(verified.evidence["state"], "verified");
    assert!(
        verified.summary.contains("/boot must be plain"),
        "{}",
        verified.summary
    );

    for step in [
        "stop-socket",
        "remount",
        "unasked",
        "start-socket",
        "remount-again",
        "asked",
        "stop",
    ] {
        guest.ok(step);
    }
    let unasked = check(&guest, "unasked-status");
    is(&unasked, "/luks2", "unknown", &[]);
    assert!(
        unasked
            .summary
            .contains("dm-0 is LUKS2; its cipher is not known: portcullis-storage.socket"),
        "{}",
        unasked.summary
    );
    assert!(
        unasked
            .remedy
            .unwrap()
            .contains("systemctl status portcullis-storage.socket")
    );
    // It goes with the daemon.
    assert_eq!(guest.step("socket").output, "inactive\n");
}

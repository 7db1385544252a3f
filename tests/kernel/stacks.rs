//! Encryption at rest on real stacks: caches, paths, snapshots, integrity, swaps with random keys, layers in layers,
//! and what only looks encrypted. Compared with what cryptsetup itself says.
//!
//! May not live here: LUKS, LVM, RAID and btrfs by themselves (`storage.rs`).

use std::path::PathBuf;

use portcullis_protocol::Check;

use crate::guest::Guest;
use crate::old_kernel;
use crate::storage::{AES, check, disks, is, volume, way};

const STEPS: [&str; 20] = [
    "modules",
    "random_swap",
    "zrams",
    "bcaches",
    "multipath",
    "luks1",
    "sealed",
    "integrity",
    "nested",
    "snapshot",
    "inner",
    "odd",
    "feed",
    "ciphers",
    "folders",
    "places",
    "elsewhere",
    "user",
    "tables",
    "truth",
];

#[test]
fn stacks_are_followed_and_nothing_that_only_looks_encrypted_is_verified() {
    let folder = tempfile::tempdir().unwrap();
    let disks = disks(folder.path(), 24, 40 << 20);
    let mut guest = Guest::boot_on("", "stacks", disks.iter().map(PathBuf::as_path));
    guest.until_off();
    old_kernel(&guest);
    for step in STEPS {
        guest.ok(step);
    }
    guest.ok("record");
    let check = check(&guest, "check");
    what_encrypts_is_verified(&guest, &check);
    what_does_not_is_absent(&check);
    names_and_paths_prove_nothing(&guest, &check);
}

#[track_caller]
fn what_encrypts_is_verified(guest: &Guest, check: &Check) {
    for (point, kinds) in [
        ("/dev/mapper/swap", ["plain dm-crypt", "disk"].as_slice()),
        ("/dev/zram2", &["memory", "plain dm-crypt", "disk"]),
        ("/cached", &["bcache", "plain dm-crypt", "disk"]),
        ("/paths", &["LUKS2", "multipath", "disk"]),
        ("/luks1", &["LUKS1", "disk"]),
        ("/sealed", &["LUKS2", "dm-integrity", "disk"]),
        ("/inner", &["LUKS2", "LUKS2", "disk"]),
        ("/odd name", &["plain dm-crypt", "disk"]),
        ("/capi", &["device mapper", "disk"]),
        ("/twin", &["device mapper", "disk"]),
    ] {
        is(check, point, "verified", &[AES]);
        let found: Vec<&str> = way(volume(check, point))
            .into_iter()
            .map(|(what, _)| what)
            .collect();
        assert_eq!(found, kinds, "{point}");
    }
    is(check, "/short", "verified", &["AES-128-XTS"]);
    assert!(volume(check, "/short")["lesser"].is_string());
    assert_eq!(volume(check, "/luks1")["way"][0]["options"][0], "allow_discards");
    // Memory alone is no storage.
    let volumes = check.evidence["volumes"].as_array().unwrap();
    assert!(!volumes.iter().any(|volume| volume["mounts"][0] == "/dev/zram0"));
    // cryptsetup says the same: 512 bits for XTS, and 256 more where a checksum has a key too.
    let truth = guest.ok("truth");
    assert_eq!(truth.matches("cipher:  aes-xts-plain64").count(), 10, "{truth}");
    assert_eq!(truth.matches("keysize: 512 bits").count(), 9, "{truth}");
    assert_eq!(truth.matches("keysize: 768 bits").count(), 1, "{truth}");
}

#[track_caller]
fn what_does_not_is_absent(check: &Check) {
    for (point, why) in [
        ("/dev/zram1", "the disk vdc encrypts"),
        ("/half-cached", "the disk vdh encrypts"),
        ("/integrity", "the disk vdm encrypts"),
        // LVM on LUKS on RAID; what a write replaces goes to the snapshot's store.
        ("/nested", "the disk vdp encrypts"),
        ("/null", "cipher_null-ecb encrypts nothing"),
        ("/capi-null", "encrypts nothing"),
        ("/ecb", "ECB shows which blocks are alike"),
        ("/alike", "all sectors have the same vector"),
        ("/fake", "the disk vds encrypts"),
        ("/victim", "the disk vds encrypts"),
        ("/folders", "the disk vdu encrypts"),
        ("/plain", "the disk vda encrypts"),
    ] {
        let volume = volume(check, point);
        assert_eq!(volume["state"], "absent", "{volume:#?}");
        let reason = volume["reason"].as_str().unwrap();
        assert!(reason.contains(why), "{point}: {reason}");
    }
    assert!(volume(check, "/folders")["fscrypt"].is_string());
}

#[track_caller]
fn names_and_paths_prove_nothing(guest: &Guest, check: &Check) {
    let volumes = check.evidence["volumes"].as_array().unwrap();
    // What is mounted over another one does not hide it.
    let over = volumes.iter().filter(|volume| volume["mounts"][0] == "/over");
    let mut over: Vec<&str> = over.map(|volume| volume["state"].as_str().unwrap()).collect();
    over.sort_unstable();
    assert_eq!(over, ["absent", "verified"]);
    // A disk that a container alone has mounted, and its file: the path leads to an encrypted volume here.
    let elsewhere = volumes
        .iter()
        .find(|volume| volume["source"] == "/dev/vdx")
        .unwrap();
    assert_eq!(elsewhere["state"], "absent");
    assert_eq!(elsewhere["seen_in"], "/sys/fs/ext4");
    assert_eq!(guest.ok("elsewhere").lines().last(), Some("/over/hidden/image"));
    // Its table is told under a name that is no line; the one of its twin is not taken for it.
    is(check, "/feed", "unknown", &[]);
    is(check, "/from-elsewhere", "unknown", &[]);
    is(check, "/merged", "unknown", &[]);
}

//! Encryption at rest on recorded trees of /proc and /sys: each kind of storage, read by the agent's own reader.
//!
//! `record` records one; each tree says where it is from. On a real kernel the same is tried by `tests/kernel`. May
//! not live here: the parsers' own tests (beside them).
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use jiff::Timestamp;
use portcullis::policy::observation::Observations;
use portcullis::policy::readiness::checks;
use portcullis::policy::storage::answers::Answers;
use portcullis::system::storage::Sight;
use portcullis_protocol::{Check, CheckId, Spec};
use serde_json::{Value, json};

/// Makes the tree below a folder, and gives what privileged programs said.
fn make(root: &Path, text: &str) -> String {
    let mut asked = None;
    let mut file = None;
    let place = |path: &str| {
        let path = root.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        path
    };
    for line in text.lines() {
        let words: Vec<&str> = line.split(' ').collect();
        match words.as_slice() {
            ["#", ..] => {}
            ["@file", path] => {
                let path = place(path);
                fs::write(&path, "").unwrap();
                file = Some(path);
            }
            ["@link", path, target] => symlink(target, place(path)).unwrap(),
            ["@dir", path, mode] => {
                let path = place(path);
                fs::create_dir_all(&path).unwrap();
                let mode = u32::from_str_radix(mode, 8).unwrap();
                fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            }
            ["@asked"] => asked = Some(String::new()),
            _ => match (&mut asked, &file) {
                (Some(asked), _) => *asked += &format!("{line}\n"),
                (None, Some(file)) => {
                    fs::write(file, fs::read_to_string(file).unwrap() + line + "\n").unwrap()
                }
                (None, None) => panic!("{line:?} belongs to nothing"),
            },
        }
    }
    asked.unwrap_or_default()
}

/// The check of a tree, and each volume's first mount point, state and algorithms.
fn look(tree: &str, attested: Value) -> (Check, Vec<(String, String, String)>) {
    let folder = tempfile::tempdir().unwrap();
    let file = format!("{}/tests/storage/trees/{tree}.tree", env!("CARGO_MANIFEST_DIR"));
    let asked = make(folder.path(), &fs::read_to_string(file).unwrap());
    let storage = Sight::of(folder.path()).unwrap().with(Answers::read(&asked));
    let spec =
        json!({"version": 1, "generation": 1, "instance": {"id": "i"}, "storage": {"attested": attested}});
    let spec = Spec::from_json(spec.to_string().as_bytes()).unwrap();
    let seen = Observations {
        storage: Ok(storage),
        ..Observations::unseen("not asked")
    };
    let checks = checks(Some(&spec), &seen, &[], Timestamp::UNIX_EPOCH);
    let mut checks = checks.into_iter();
    let check = checks
        .find(|check| check.id == CheckId::StorageEncrypted)
        .unwrap();
    let volumes = check.evidence["volumes"].as_array().unwrap();
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let mut told: Vec<(String, String, String)> = volumes
        .iter()
        .map(|volume| {
            let algorithms = volume["algorithms"].as_array().unwrap();
            let algorithms: Vec<&str> = algorithms.iter().map(|name| name.as_str().unwrap()).collect();
            (
                volume["mounts"][0].as_str().unwrap_or_default().to_owned(),
                text(&volume["state"]),
                algorithms.join(" "),
            )
        })
        .collect();
    told.sort();
    (check, told)
}

#[track_caller]
fn are(told: &[(String, String, String)], expected: &[(&str, &str, &str)]) {
    let told: Vec<(&str, &str, &str)> = told
        .iter()
        .map(|(point, state, algorithms)| (point.as_str(), state.as_str(), algorithms.as_str()))
        .collect();
    assert_eq!(told, expected);
}

#[track_caller]
fn reason(check: &Check, point: &str) -> String {
    let volumes = check.evidence["volumes"].as_array().unwrap();
    let volume = volumes
        .iter()
        .find(|volume| volume["mounts"][0] == point)
        .unwrap();
    volume["reason"].as_str().unwrap().to_owned()
}

const AES: &str = "AES-256-XTS";

#[test]
fn each_kind_of_device_is_followed_to_its_disks() {
    let (check, told) = look("half", json!([]));
    are(
        &told,
        &[
            ("/boot", "absent", ""),
            ("/btrfs", "absent", AES),
            ("/dev/mapper/short", "verified", "AES-128-XTS"),
            ("/dev/mapper/vg0-swap", "verified", AES),
            ("/image-luks", "verified", AES),
            ("/image-plain", "absent", ""),
            ("/luks-on-lvm", "verified", AES),
            ("/luks2", "verified", AES),
            ("/lvm-on-luks", "verified", AES),
            ("/plain", "absent", ""),
            ("/raid", "absent", AES),
        ],
    );
    assert_eq!(json!(check.status), "fail");
    assert_eq!(
        reason(&check, "/raid"),
        "nothing between the file system and the disk vde encrypts"
    );
    assert!(check.remedy.unwrap().contains("LUKS2"));
    let volumes = check.evidence["volumes"].as_array().unwrap();
    let lvm = volumes
        .iter()
        .find(|volume| volume["mounts"][0] == "/lvm-on-luks")
        .unwrap();
    let way: Vec<&Value> = lvm["way"]
        .as_array()
        .unwrap()
        .iter()
        .map(|step| &step["device"])
        .collect();
    assert_eq!(way, ["dm-2", "dm-1", "vdb"]);
    let luks = &lvm["way"][1];
    assert_eq!(
        [&luks["what"], &luks["name"], &luks["cipher"], &luks["algorithm"]],
        ["LUKS2", "pv", "aes-xts-plain64", AES]
    );
    assert_eq!(
        [&luks["key_bits"], &luks["cipher_seen_in"]],
        [&json!(512), &json!("dmsetup table")]
    );
    assert_eq!(lvm["way"][2]["serial"], "disk-1");
    // What has to be plain is told and does not count.
    let boot = volumes.last().unwrap();
    assert_eq!(boot["mounts"], json!(["/boot"]));
    assert!(boot["excused"].as_str().unwrap().contains("firmware"));
}

#[test]
fn all_legs_encrypted_is_verified_and_a_null_cipher_is_nothing() {
    let (check, told) = look("whole", json!([]));
    for (point, state, algorithms) in [
        ("/btrfs", "verified", AES),
        ("/raid", "verified", AES),
        ("/null", "absent", ""),
    ] {
        assert!(
            told.contains(&(point.to_owned(), state.to_owned(), algorithms.to_owned())),
            "{point}: {told:?}"
        );
    }
    assert_eq!(
        reason(&check, "/null"),
        "dm-10: the cipher cipher_null-ecb encrypts nothing"
    );
}

#[test]
fn a_claim_attests_what_it_names_and_verifies_nothing() {
    let expect = |attested: Value, status: &str, states: [&str; 4]| {
        let (check, told) = look("cloud", attested);
        let [root, scratch, home, efi] = states;
        are(
            &told,
            &[
                ("/", root, ""),
                ("/boot/efi", efi, ""),
                ("/home", home, ""),
                ("/scratch space", scratch, ""),
                // On the root's disk: a file to swap to, and a snap's, that is removed and still mounted.
                ("/snap/core/17200", root, ""),
                ("/swapfile", root, ""),
            ],
        );
        assert_eq!(json!(check.status), status, "{check:?}");
        check
    };
    let none = expect(json!([]), "fail", ["absent", "absent", "unknown", "absent"]);
    assert!(
        none.summary.starts_with("/, and 3 more: not encrypted"),
        "{}",
        none.summary
    );
    assert!(none.remedy.unwrap().contains("storage.attested"));
    // By its serial number; another disk and a share are not meant.
    let ebs = json!({"by": "aws-ebs", "algorithm": "AES-256", "disks": ["vol0123456789abcdef0"]});
    let one = expect(
        json!([ebs]),
        "fail",
        ["attested", "absent", "unknown", "attested"],
    );
    assert!(
        one.summary.starts_with("/scratch space: not encrypted"),
        "{}",
        one.summary
    );
    let all = json!([{"by": "cloud.example"}]);
    let all = expect(all, "unknown", ["attested", "attested", "unknown", "attested"]);
    assert_eq!(all.summary, "/home: another machine keeps the data");
    let share = json!([{"by": "cloud.example"}, {"by": "files.example", "disks": ["files.example:/home"]}]);
    let share = expect(share, "warn", ["attested"; 4]);
    assert!(
        share
            .summary
            .contains("attested, not verified: cloud.example says"),
        "{}",
        share.summary
    );
}

/// What a pool is on is known only after it was asked for: it may be dm-crypt.
#[test]
fn where_zfs_is_tables_are_asked_for_too() {
    let folder = tempfile::tempdir().unwrap();
    let file = format!("{}/tests/storage/trees/zfs.tree", env!("CARGO_MANIFEST_DIR"));
    make(folder.path(), &fs::read_to_string(file).unwrap());
    let questions = Sight::of(folder.path()).unwrap().questions();
    assert!(questions.zfs && questions.tables);
}

#[test]
fn zfs_says_what_it_encrypts_and_else_its_disks_count() {
    let (check, told) = look("zfs", json!([]));
    are(
        &told,
        &[
            ("/", "verified", "AES-256-GCM"),
            ("/fast", "absent", ""),
            ("/home", "verified", "AES-128-CCM"),
            ("/home/.zfs/snapshot/monday", "verified", "AES-128-CCM"),
            ("/locked", "unknown", ""),
            ("/srv", "verified", AES),
        ],
    );
    assert_eq!(json!(check.status), "fail");
    assert!(reason(&check, "/locked").contains("its key is \"unavailable\""));
}

#[test]
fn what_only_looks_encrypted_is_never_verified() {
    let (check, told) = look("odd", json!([]));
    are(
        &told,
        &[
            ("/", "unknown", ""),
            ("/cached", "unknown", AES),
            ("/changed", "unknown", ""),
            ("/folders", "absent", ""),
            ("/gone", "unknown", ""),
            ("/half", "absent", ""),
            ("/mnt/remote", "unknown", ""),
            ("/new", "unknown", ""),
            ("/path", "absent", ""),
            // An upper layer that does nothing takes nothing away from the lower one.
            ("/twice", "verified", AES),
        ],
    );
    assert_eq!(json!(check.status), "fail");
    for (point, why) in [
        ("/", "the drive itself encrypts (OPAL)"),
        ("/cached", "the cache of bcache0 is not told"),
        ("/changed", "changed while it was looked at"),
        (
            "/gone",
            "is LUKS2; its cipher is not known: the kernel's table of it was not told",
        ),
        ("/new", "the target inlinecrypt is not known here"),
    ] {
        assert!(
            reason(&check, point).contains(why),
            "{point}: {}",
            reason(&check, point)
        );
    }
    let volumes = check.evidence["volumes"].as_array().unwrap();
    let folders = volumes
        .iter()
        .find(|volume| volume["mounts"][0] == "/folders")
        .unwrap();
    assert!(folders["fscrypt"].as_str().unwrap().contains("as a whole is not"));
}

#[test]
fn recorded_stacks_are_followed_to_what_holds_their_data() {
    let (check, told) = look("stacks", json!([]));
    assert_eq!(json!(check.status), "fail");
    for (point, state, algorithms) in [
        ("/cached", "verified", AES),
        ("/half-cached", "absent", AES),
        ("/nested", "absent", AES),
        ("/odd name", "verified", AES),
        ("/sealed", "verified", AES),
        ("/paths", "verified", AES),
        ("/inner", "verified", AES),
        ("/dev/zram1", "absent", ""),
        ("/dev/zram2", "verified", AES),
        ("/fake", "absent", ""),
        ("/victim", "absent", ""),
        ("/alike", "absent", ""),
        ("/from-elsewhere", "unknown", ""),
    ] {
        let expected = (point.to_owned(), state.to_owned(), algorithms.to_owned());
        assert!(told.contains(&expected), "{point}: {told:?}");
    }
}

/// The kernel ends each name with a line feed; one of the name's own is part of it. Beside it is the same name without
/// one, which is encrypted, on the same disk.
#[test]
fn a_name_that_ends_in_a_line_feed_is_not_taken_for_the_same_without() {
    let (check, told) = look("feed", json!([]));
    are(
        &told,
        &[
            ("/dev/mapper/swap", "verified", AES),
            ("/dev/mapper/swap\n", "unknown", ""),
            ("/feed", "unknown", ""),
            ("/twin", "verified", AES),
            ("/victim", "absent", ""),
        ],
    );
    assert_eq!(json!(check.status), "fail");
    assert!(
        reason(&check, "/feed").contains("dm-1 is a device of the device mapper; its cipher is not known"),
        "{}",
        reason(&check, "/feed")
    );
    // What people read stays one line.
    assert!(!check.summary.contains('\n'), "{}", check.summary);
    let mangled = look("feed", json!([{"by": "cloud.example"}])).0;
    assert!(!mangled.summary.contains('\n'), "{}", mangled.summary);
}

#[test]
fn without_the_kernels_tables_a_name_proves_nothing() {
    let (check, told) = look("untold", json!([]));
    are(
        &told,
        &[
            ("/", "unknown", ""),
            ("/made by hand", "unknown", ""),
            ("/plain", "absent", ""),
        ],
    );
    assert!(
        reason(&check, "/").contains("dm-0 is LUKS2"),
        "{}",
        reason(&check, "/")
    );
    assert!(
        reason(&check, "/").contains("Operation not permitted"),
        "{}",
        reason(&check, "/")
    );
    // LVM alone never encrypts, whatever the table says.
    assert!(
        check.summary.starts_with("/plain: not encrypted"),
        "{}",
        check.summary
    );
}

#[test]
fn memory_is_no_storage_and_what_is_outside_is_unknown() {
    let (check, told) = look("live", json!([]));
    are(&told, &[("/", "unknown", ""), ("/dev/zram1", "absent", "")]);
    assert!(reason(&check, "/").contains("not to be seen from inside"));
    assert_eq!(json!(check.status), "fail");
}

#[test]
fn circles_and_gaps_are_unknown_and_the_walk_ends() {
    let (check, told) = look("circle", json!([{"by": "cloud.example"}]));
    are(
        &told,
        &[
            ("/", "unknown", ""),
            ("/loop", "unknown", ""),
            ("/missing", "unknown", ""),
            ("/tree", "unknown", ""),
        ],
    );
    assert_eq!(json!(check.status), "unknown");
    assert!(reason(&check, "/").contains("round in a circle"));
    assert!(reason(&check, "/missing").contains("/sys/dev/block/8:0"));
}

#[test]
fn only_a_boot_partition_that_root_alone_writes_to_is_let_off() {
    let folder = tempfile::tempdir().unwrap();
    let file = format!("{}/tests/storage/trees/half.tree", env!("CARGO_MANIFEST_DIR"));
    make(folder.path(), &fs::read_to_string(file).unwrap());
    let for_boot = || {
        let storage = Sight::of(folder.path()).unwrap().with(Answers::default());
        let boot = storage.volumes.iter().find(|v| v.points == ["/boot"]).unwrap();
        boot.for_boot
    };
    assert!(for_boot());
    fs::set_permissions(folder.path().join("boot"), fs::Permissions::from_mode(0o777)).unwrap();
    assert!(!for_boot());
}

#[test]
fn a_kernel_that_does_not_tell_is_an_error_with_the_files_name() {
    let folder = tempfile::tempdir().unwrap();
    let error = Sight::of(folder.path()).err().unwrap();
    assert!(error.contains("mountinfo"), "{error}");
    make(folder.path(), "@file proc/1/mountinfo\nno line\n");
    let error = Sight::of(folder.path()).err().unwrap();
    assert!(error.contains("\"no line\""), "{error}");
}

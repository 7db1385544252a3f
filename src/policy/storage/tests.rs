//! The walk against a plain search for a way that nothing encrypts.

use super::answers::Segment;
use super::walk::{State, judge};
use super::*;
use proptest::prelude::*;

fn number(minor: usize) -> Number {
    Number {
        major: 253,
        minor: minor as u32,
    }
}

/// What a device does: encrypts, pretends to, passes on, is a disk.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Does {
    Encrypt,
    Pretend,
    Pass,
    Disk,
}

fn world(devices: &[(Does, Vec<usize>)]) -> Storage {
    let mut storage = Storage {
        volumes: vec![Volume {
            points: vec!["/".to_owned()],
            kind: "ext4".to_owned(),
            source: "/dev/mapper/0".to_owned(),
            backing: Backing::Devices(vec![number(0)]),
            for_boot: false,
            fscrypt: false,
        }],
        ..Storage::default()
    };
    for (at, (does, below)) in devices.iter().enumerate() {
        let below: Vec<Number> = match does {
            Does::Disk => Vec::new(),
            _ => below.iter().map(|below| number(below % devices.len())).collect(),
        };
        let crypt = |cipher: &str| Segment::Crypt {
            cipher: cipher.to_owned(),
            key_bits: 512,
            below: below.first().copied(),
            sectors: 8,
            options: Vec::new(),
        };
        let segment = match does {
            Does::Encrypt => crypt("aes-xts-plain64"),
            Does::Pretend => crypt("cipher_null-ecb"),
            _ => Segment::Other("linear".to_owned()),
        };
        storage.answers.tables.insert(at.to_string(), vec![segment]);
        let kind = match does {
            Does::Disk => Kind::Disk { serial: None },
            _ => Kind::Mapped {
                name: at.to_string(),
                uuid: "CRYPT-LUKS2-x".to_owned(),
            },
        };
        let name = format!("dm-{at}");
        storage.devices.insert(number(at), Device { name, kind, below });
    }
    storage
}

/// Whether data gets from this device to a disk, or to nowhere that is known, without being encrypted.
fn leaks(storage: &Storage, devices: &[(Does, Vec<usize>)]) -> bool {
    let mut seen = BTreeSet::new();
    let mut to_see = vec![number(0)];
    while let Some(here) = to_see.pop() {
        let does = devices[here.minor as usize].0;
        if does == Does::Encrypt || !seen.insert(here) {
            continue;
        }
        let below = &storage.devices[&here].below;
        if below.is_empty() {
            return true;
        }
        to_see.extend(below);
    }
    false
}

fn any_world() -> impl Strategy<Value = Vec<(Does, Vec<usize>)>> {
    let does = prop_oneof![
        Just(Does::Encrypt),
        Just(Does::Pretend),
        Just(Does::Pass),
        Just(Does::Pass),
        Just(Does::Disk)
    ];
    let below = proptest::collection::vec(any::<usize>(), 1..4);
    proptest::collection::vec((does, below), 1..12)
}

proptest! {
    /// Any graph, with circles too: the walk ends, and says "verified" only if no way leads past encryption.
    #[test]
    fn verified_means_that_no_way_is_plain(devices in any_world()) {
        let storage = world(&devices);
        let judged = judge(&storage, &[]);
        prop_assert_eq!(judged.len(), 1);
        let is_verified = judged[0].found.state == State::Verified;
        prop_assert!(!is_verified || !leaks(&storage, &devices), "{:?}", judged);
        // A claim is one of disks, and never verifies.
        let claim = serde_json::from_str(r#"{"by":"cloud.example"}"#).unwrap();
        let claimed = judge(&storage, &[claim]);
        prop_assert_eq!(claimed[0].found.state == State::Verified, is_verified);
    }
}

#[test]
fn lists_are_sorted_for_the_search() {
    assert!(!is_persistent("tmpfs") && !is_persistent("autofs") && !is_persistent("tracefs"));
    assert!(is_persistent("ext4") && is_persistent("overlay") && is_persistent("fuse.rclone"));
    assert!(NOT_PERSISTENT.is_sorted() && SHARES.is_sorted());
}

/// Devices that nobody can tell of.
struct Blind;

impl Look for Blind {
    fn btrfs(&self, _: &str) -> Result<Vec<Number>, String> {
        Err("not told".to_owned())
    }
    fn device(&self, _: &str) -> Result<Number, String> {
        Err("not told".to_owned())
    }
    fn others_may_write(&self, _: &str) -> bool {
        false
    }
    fn has_fscrypt(&self, _: &str) -> bool {
        false
    }
}

/// Who mounts a program's file system chooses its name (mount(8), `subtype`).
#[test]
fn what_a_user_calls_his_own_file_system_excuses_nothing() {
    let backing = |kind: &str, point: &str, user: u32| {
        let line =
            format!("40 1 0:40 / {point} rw,nosuid - {kind} me@cloud:/ rw,user_id={user},group_id={user}");
        let mounts = super::mounts::mounts(&line).unwrap();
        let (volumes, _) = volumes(&mounts, &[], &Blind);
        volumes.first().map(|volume| volume.backing.clone())
    };
    // Root's sshfs is a share, which a claim may name; a user's is a program that keeps data wherever it likes.
    assert_eq!(backing("fuse.sshfs", "/data", 0), Some(Backing::Share));
    assert!(matches!(
        backing("fuse.sshfs", "/data", 1000),
        Some(Backing::Unknown(_))
    ));
    // The desktop's portal holds nothing, where the desktop mounts it.
    assert_eq!(backing("fuse.portal", "/run/user/1000/doc", 1000), None);
    assert!(matches!(
        backing("fuse.portal", "/data", 1000),
        Some(Backing::Unknown(_))
    ));
}

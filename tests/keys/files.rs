//! Installing keys in homes whose users work against it. Each refusal has its positive control: the same
//! call succeeds once the obstacle is gone.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

use portcullis::system::key_files::{install, read_back, remove_all};
use portcullis_protocol::AuthorizedKey;
use rustix::fs::{XattrFlags, setxattr};

use super::home::*;

#[test]
fn a_fresh_home_gets_a_folder_and_a_file_of_its_user() {
    let homes = Homes::new();
    let user = homes.user("alice", ALICE);
    assert_eq!(read_back(&user, &config()).unwrap().keys, []);
    assert!(!remove_all(&user, &config()).unwrap().changed);
    assert!(
        !user.home.join(".ssh").exists(),
        "nothing to remove makes nothing"
    );

    assert!(install(&user, &config(), &keys(&user)).unwrap().changed);
    assert_installs(&user);
    let folder = fs::metadata(user.home.join(".ssh")).unwrap();
    assert_eq!((folder.uid(), folder.mode() & 0o7777), (ALICE, 0o700));
    assert_eq!(
        fs::read_dir(user.home.join(".ssh")).unwrap().count(),
        1,
        "no temporary file is left"
    );
}

#[test]
fn the_users_bytes_survive_and_nothing_is_written_twice() {
    let homes = Homes::new();
    let user = homes.user("alice", ALICE);
    let file = own_keys(&user);
    assert!(install(&user, &config(), &keys(&user)).unwrap().changed);
    assert!(fs::read(&file).unwrap().ends_with(OWN));

    let inode = fs::metadata(&file).unwrap().ino();
    assert!(!install(&user, &config(), &keys(&user)).unwrap().changed);
    assert_eq!(
        fs::metadata(&file).unwrap().ino(),
        inode,
        "unchanged is not written"
    );

    assert!(remove_all(&user, &config()).unwrap().changed);
    assert_eq!(fs::read(&file).unwrap(), OWN);
}

#[test]
fn keys_that_are_taken_away_are_named() {
    const OTHER: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJdD7y3aLq454yWBdwLWbieU1ebz9/cu7/QEXn9OIeZJ x";
    let homes = Homes::new();
    let user = homes.user("alice", ALICE);
    let mut both = keys(&user);
    both.push(AuthorizedKey {
        key: OTHER.parse().unwrap(),
        ..both[0].clone()
    });
    let removed = |keys: &[AuthorizedKey]| {
        let outcome = install(&user, &config(), keys).unwrap();
        let lines = outcome.removed.iter().map(ToString::to_string);
        (outcome.changed, lines.collect::<Vec<_>>())
    };
    assert_eq!(removed(&both), (true, vec![]));
    both.reverse();
    assert_eq!(removed(&both), (true, vec![]), "another order takes none away");
    both[0].expires = Some("2099-01-01T00:00:00Z".parse().unwrap());
    assert_eq!(removed(&both), (true, vec![]), "nor does an end that is to come");
    assert_eq!(removed(&both[..1]), (true, vec![KEY.to_owned()]));
    assert_eq!(removed(&both[..1]), (false, vec![]));
    let outcome = remove_all(&user, &config()).unwrap();
    assert_eq!(outcome.removed.len(), 1);
}

#[test]
fn a_tighter_mode_stays_and_a_wider_one_does_not() {
    let homes = Homes::new();
    let user = homes.user("alice", ALICE);
    let file = own_keys(&user);
    for (before, after) in [(0o400, 0o400), (0o644, 0o600)] {
        remove_all(&user, &config()).unwrap();
        mode(&file, before);
        assert!(install(&user, &config(), &keys(&user)).unwrap().changed);
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o7777, after);
    }
}

#[test]
fn another_users_key_is_never_written() {
    let homes = Homes::new();
    let (alice, bob) = (homes.user("alice", ALICE), homes.user("bob", BOB));
    assert!(
        install(&alice, &config(), &keys(&bob))
            .unwrap_err()
            .to_string()
            .contains("a key of bob")
    );
    assert!(!alice.home.join(".ssh").exists());

    let mut shared = config();
    shared.authorized_keys_files = vec!["/etc/ssh/authorized_keys".into()];
    let error = install(&alice, &shared, &keys(&alice)).unwrap_err().to_string();
    assert!(error.contains("one file for all users"), "{error}");
    assert_installs(&alice);
}

#[test]
fn links_are_not_followed() {
    let homes = Homes::new();
    let canary = homes.canary();
    let user = homes.user("alice", ALICE);
    let folder = user.home.join(".ssh");
    symlink(&canary.folder, &folder).unwrap();
    assert_refused(&user, ".ssh\" is a symbolic link");
    fs::remove_file(&folder).unwrap();

    let file = ssh_folder(&user).join("authorized_keys");
    symlink(&canary.file, &file).unwrap();
    assert_refused(&user, "authorized_keys\" is a symbolic link");
    fs::remove_file(&file).unwrap();

    // Even one that leads to a file of the user's own.
    fs::write(user.home.join("mine"), "").unwrap();
    symlink("../mine", &file).unwrap();
    assert_refused(&user, "authorized_keys\" is a symbolic link");
    fs::remove_file(&file).unwrap();

    assert_installs(&user);
    canary.assert_alive();
}

#[test]
fn what_is_not_a_file_of_the_users_own_is_refused() {
    let homes = Homes::new();
    let canary = homes.canary();
    let user = homes.user("alice", ALICE);
    let file = ssh_folder(&user).join("authorized_keys");

    fs::hard_link(&canary.file, &file).unwrap();
    assert_refused(&user, "has a second hard link");
    fs::remove_file(&file).unwrap();

    nix::unistd::mkfifo(&file, nix::sys::stat::Mode::S_IRWXU).unwrap();
    own(&file, ALICE);
    assert_refused(&user, "is not a regular file");
    fs::remove_file(&file).unwrap();

    fs::create_dir(&file).unwrap();
    own(&file, ALICE);
    assert_refused(&user, "is not a regular file");
    fs::remove_dir(&file).unwrap();

    let listener = std::os::unix::net::UnixListener::bind(&file).unwrap();
    own(&file, ALICE);
    assert_refused(&user, "is not a regular file");
    drop(listener);
    fs::remove_file(&file).unwrap();

    fs::write(&file, vec![b'#'; (1 << 20) + 1]).unwrap();
    own(&file, ALICE);
    assert_refused(&user, "is larger than 1048576 bytes");
    fs::remove_file(&file).unwrap();

    fs::remove_dir(user.home.join(".ssh")).unwrap();
    fs::write(user.home.join(".ssh"), "").unwrap();
    assert_refused(&user, ".ssh\" is not a folder");
    fs::remove_file(user.home.join(".ssh")).unwrap();

    assert_installs(&user);
    canary.assert_alive();
}

#[test]
fn what_sshd_does_not_trust_is_refused() {
    let homes = Homes::new();
    let user = homes.user("alice", ALICE);
    let file = own_keys(&user);
    let folder = user.home.join(".ssh");

    for (path, good) in [(&user.home, 0o755), (&folder, 0o700), (&file, 0o600)] {
        for bad in [0o020, 0o002] {
            mode(path, good | bad);
            assert_refused(&user, &format!("{path:?} is writable by others"));
        }
        mode(path, good);
        if path != &file {
            own(path, BOB);
            mode(path, 0o755);
            assert_refused(&user, &format!("{path:?} belongs to uid {BOB}"));
            own(path, ALICE);
            mode(path, good);
        }
    }
    assert_installs(&user);
    assert!(fs::read(&file).unwrap().ends_with(OWN));
}

#[test]
fn a_missing_or_unreachable_home_is_named() {
    let homes = Homes::new();
    let user = homes.user("alice", ALICE);
    fs::remove_dir(&user.home).unwrap();
    assert_refused(&user, "can't open the home");
    homes.user("alice", ALICE);

    // The user's own permissions count, not root's.
    mode(homes.path(), 0o700);
    assert_refused(&user, "check the owner and mode");
    mode(homes.path(), 0o755);
    assert_installs(&user);
}

#[test]
fn a_file_left_by_a_crash_is_in_nobodys_way() {
    let homes = Homes::new();
    let canary = homes.canary();
    let user = homes.user("alice", ALICE);
    let left = ssh_folder(&user).join("authorized_keys.portcullis-new");
    symlink(&canary.file, &left).unwrap();
    assert_installs(&user);
    assert!(!left.is_symlink());

    remove_all(&user, &config()).unwrap();
    fs::write(&left, "half").unwrap();
    own(&left, ALICE);
    assert_installs(&user);
    canary.assert_alive();
}

/// A disk that was labelled elsewhere: without SELinux nobody may set a label, and none is needed.
#[test]
fn a_label_of_selinux_is_in_nobodys_way() {
    let homes = Homes::new();
    let user = homes.user("alice", ALICE);
    let file = own_keys(&user);
    let label = b"system_u:object_r:ssh_home_t:s0\0";
    setxattr(&file, "security.selinux", label, XattrFlags::empty()).unwrap();
    assert_installs(&user);
    assert!(fs::read(&file).unwrap().ends_with(OWN));
}

//! What a user, or an administrator, may have put where keys go: devices, files that can't be changed, file
//! systems that take nothing. Each refusal has its positive control: the same call succeeds once the
//! obstacle is gone.
//!
//! May not live here: whose home it is (`owners`), what moves meanwhile (`races`).

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::symlink;
use std::path::Path;

use nix::mount::MsFlags;
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use portcullis::system::key_files::{install, read_back, remove_all};
use rustix::fs::{IFlags, ioctl_setflags};

use super::home::*;

/// What only writing meets; reading back says how it is.
#[track_caller]
fn assert_not_written(user: &portcullis::system::accounts::Account, expected: &str) {
    let error = install(user, &config(), &keys(user)).unwrap_err().to_string();
    assert!(error.contains(expected), "expected {expected:?}: {error}");
    assert_eq!(read_back(user, &config()).unwrap().keys, []);
}

#[test]
fn a_device_is_refused_and_not_read() {
    let homes = Homes::new();
    let user = homes.user("alice", ALICE);
    tmpfs_home(&user, MsFlags::empty(), "size=1m");
    let file = ssh_folder(&user).join("authorized_keys");
    let device = |kind, major, minor| {
        let _ = fs::remove_file(&file);
        mknod(
            &file,
            kind,
            Mode::from_bits_truncate(0o600),
            makedev(major, minor),
        )
        .unwrap();
        own(&file, ALICE);
    };
    // The positive control: a device that works here, and never ends (zero(4)).
    device(SFlag::S_IFCHR, 1, 5);
    let mut some = [1; 8];
    File::open(&file).unwrap().read_exact(&mut some).unwrap();
    assert_eq!(some, [0; 8]);
    assert_refused(&user, "authorized_keys\" is not a regular file");
    // null(4), and numbers that have no driver.
    for (kind, major, minor) in [
        (SFlag::S_IFCHR, 1, 3),
        (SFlag::S_IFCHR, 10, 254),
        (SFlag::S_IFCHR, 4000, 1),
        (SFlag::S_IFBLK, 4000, 1),
    ] {
        device(kind, major, minor);
        assert_refused(&user, "authorized_keys\" is not a regular file");
    }
    fs::remove_file(&file).unwrap();

    // In the folder's place.
    let folder = user.home.join(".ssh");
    fs::remove_dir(&folder).unwrap();
    mknod(&folder, SFlag::S_IFCHR, Mode::S_IRWXU, makedev(1, 5)).unwrap();
    own(&folder, ALICE);
    assert_refused(&user, ".ssh\" is not a folder");
    fs::remove_file(&folder).unwrap();
    assert_installs(&user);
}

fn flags(path: &Path, flags: IFlags) {
    ioctl_setflags(File::open(path).unwrap(), flags).unwrap();
}

#[test]
fn what_is_immutable_stays_and_is_named() {
    let homes = Homes::new();
    let user = homes.user("alice", ALICE);
    tmpfs_home(&user, MsFlags::empty(), "size=1m");
    flags(&user.home, IFlags::IMMUTABLE);
    assert_not_written(&user, ".ssh\": Operation not permitted");
    flags(&user.home, IFlags::empty());

    let file = own_keys(&user);
    let folder = user.home.join(".ssh");
    for (path, flag) in [
        (&file, IFlags::IMMUTABLE),
        (&file, IFlags::APPEND),
        (&folder, IFlags::IMMUTABLE),
    ] {
        flags(path, flag);
        assert_not_written(&user, "immutable or append-only (lsattr(1)): chattr -ia");
        assert_eq!(fs::read(&file).unwrap(), OWN);
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 1, "no half file is left");
        flags(path, IFlags::empty());
    }

    // Nothing can be taken away either: what is left behind is not read by sshd, and harms nobody.
    flags(&folder, IFlags::APPEND);
    assert_not_written(&user, "immutable or append-only");
    assert_not_written(&user, "can't remove");
    assert_eq!(fs::read(&file).unwrap(), OWN);
    flags(&folder, IFlags::empty());

    assert_installs(&user);
    assert!(fs::read(&file).unwrap().ends_with(OWN));
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 1);

    // Removing is refused as loudly.
    flags(&file, IFlags::IMMUTABLE);
    let error = remove_all(&user, &config()).unwrap_err().to_string();
    assert!(error.contains("immutable"), "{error}");
    flags(&file, IFlags::empty());
    assert!(remove_all(&user, &config()).unwrap().changed);
}

#[test]
fn a_folder_in_the_temporary_files_place_is_named() {
    let homes = Homes::new();
    let canary = homes.canary();
    let user = homes.user("alice", ALICE);
    let new = ssh_folder(&user).join("authorized_keys.portcullis-new");
    fs::create_dir(&new).unwrap();
    symlink(&canary.folder, new.join("link")).unwrap();
    own(&new, ALICE);
    assert_not_written(
        &user,
        "authorized_keys.portcullis-new\": Is a directory (os error 21): remove it",
    );
    fs::remove_dir_all(&new).unwrap();

    // A second name of root's file is taken away, and the file is not touched.
    fs::hard_link(&canary.file, &new).unwrap();
    assert_installs(&user);
    canary.assert_alive();
}

#[test]
fn a_file_of_roots_own_in_the_way_is_replaced_only_if_it_may_be_read() {
    let homes = Homes::new();
    let canary = homes.canary();
    let user = homes.user("alice", ALICE);
    let file = own_keys(&user);
    own(&file, 0);
    assert_refused(&user, "Permission denied");
    assert_eq!(fs::read(&file).unwrap(), OWN);

    // sshd trusts what is root's, and the folder is the user's.
    mode(&file, 0o644);
    assert_installs(&user);
    assert!(fs::read(&file).unwrap().ends_with(OWN));
    canary.assert_alive();
}

#[test]
fn a_read_only_file_system_is_named() {
    let homes = Homes::new();
    let user = homes.user("alice", ALICE);
    tmpfs_home(&user, MsFlags::empty(), "size=1m");
    let file = own_keys(&user);
    tmpfs_home(&user, MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY, "size=1m");
    let error = install(&user, &config(), &keys(&user)).unwrap_err().to_string();
    assert!(error.contains("mount the file system read-write"), "{error}");
    assert_eq!(fs::read(&file).unwrap(), OWN);

    tmpfs_home(&user, MsFlags::MS_REMOUNT, "size=1m");
    assert_installs(&user);
}

#[test]
fn a_full_disk_leaves_the_old_file_whole() {
    let homes = Homes::new();
    let user = homes.user("alice", ALICE);
    tmpfs_home(&user, MsFlags::empty(), "size=64k");
    let file = own_keys(&user);
    let ballast = user.home.join("ballast");
    let _ = fs::write(&ballast, vec![0; 128 << 10]);
    let error = install(&user, &config(), &keys(&user)).unwrap_err().to_string();
    assert!(error.contains("free space"), "{error}");
    assert_eq!(fs::read(&file).unwrap(), OWN);
    assert_eq!(
        fs::read_dir(user.home.join(".ssh")).unwrap().count(),
        1,
        "no half file is left"
    );

    fs::remove_file(&ballast).unwrap();
    assert_installs(&user);
}

#[test]
fn a_full_table_of_inodes_leaves_nothing() {
    let homes = Homes::new();
    let user = homes.user("alice", ALICE);
    // One for the home itself.
    tmpfs_home(&user, MsFlags::empty(), "nr_inodes=1");
    assert_not_written(&user, "can't create");
    assert_not_written(&user, "free space");
    tmpfs_home(&user, MsFlags::MS_REMOUNT, "nr_inodes=2");
    assert_not_written(&user, "can't write");
    assert_eq!(fs::read_dir(user.home.join(".ssh")).unwrap().count(), 0);
    tmpfs_home(&user, MsFlags::MS_REMOUNT, "nr_inodes=9");
    assert_installs(&user);
}

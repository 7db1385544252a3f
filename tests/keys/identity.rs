//! Who a thread is while it acts as a user: that user, with their groups, and nobody else.
//!
//! May not live here: what is done as the user.

use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, chown};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::mpsc;
use std::thread;

use nix::sys::stat::umask;
use portcullis::system::accounts::Account;
use portcullis::system::as_user::run_as;
use portcullis::system::key_files::install;
use rustix::process::{getegid, geteuid, getgroups};
use rustix::thread::{
    CapabilitySet, Gid, Uid, capabilities, gettid, set_thread_groups, set_thread_res_gid, set_thread_res_uid,
};

use super::home::*;

fn somebody(uid: u32, gid: u32, groups: &[u32]) -> Account {
    Account {
        name: "alice".parse().unwrap(),
        uid,
        gid,
        groups: groups.to_vec(),
        home: "/".into(),
        shell: "".into(),
    }
}

#[test]
fn a_thread_has_the_users_groups_and_no_others() {
    let homes = Homes::new();
    let file = homes.path().join("of a group");
    fs::write(&file, "").unwrap();
    mode(&file, 0o040);
    chown(&file, Some(0), Some(61003)).unwrap();
    // Root's own groups, which a user must not keep.
    set_thread_groups(&[Gid::from_raw(0), Gid::from_raw(61003)]).unwrap();

    let reads = |user: &Account| run_as(user, || File::open(&file).is_ok()).unwrap();
    assert!(reads(&somebody(ALICE, ALICE, &[ALICE, 61003])));
    assert!(reads(&somebody(ALICE, 61003, &[])));
    assert!(!reads(&somebody(ALICE, ALICE, &[ALICE])));
    assert!(!reads(&somebody(ALICE, ALICE, &[])));

    let seen = run_as(&somebody(ALICE, BOB, &[BOB, 61003]), || {
        let groups: Vec<u32> = getgroups().unwrap().iter().map(|group| group.as_raw()).collect();
        let effective = capabilities(None).unwrap().effective;
        (geteuid().as_raw(), getegid().as_raw(), groups, effective)
    });
    assert_eq!(
        seen.unwrap(),
        (ALICE, BOB, vec![BOB, 61003], CapabilitySet::empty())
    );
    // Nothing had to be switched back.
    assert!(geteuid().is_root());
    assert_eq!(getgroups().unwrap().len(), 2);
}

/// The kernel takes the largest number for "as it is", and who asked would stay root (compare
/// CVE-2019-14287 of sudo).
#[test]
fn a_number_that_changes_nothing_is_refused() {
    need_root();
    // The positive control: this is what it would be.
    let as_it_is = Uid::from_raw(u32::MAX - 1);
    assert_ne!(
        run_as(&somebody(as_it_is.as_raw(), 1, &[]), geteuid).unwrap(),
        Uid::ROOT
    );
    let unchanged = thread::spawn(|| nix::unistd::setresuid(same(), same(), same()).map(|()| geteuid()));
    assert_eq!(unchanged.join().unwrap().unwrap(), Uid::ROOT);

    for user in [
        somebody(u32::MAX, ALICE, &[]),
        somebody(ALICE, u32::MAX, &[]),
        somebody(ALICE, ALICE, &[u32::MAX]),
    ] {
        let error = run_as(&user, || panic!("it ran as somebody else")).unwrap_err();
        assert!(
            error.to_string().contains("4294967295 stands for no user"),
            "{error}"
        );
    }
}

fn same() -> nix::unistd::Uid {
    nix::unistd::Uid::from_raw(u32::MAX)
}

#[test]
fn the_umask_neither_opens_nor_shuts_a_key_file() {
    let homes = Homes::new();
    let before = umask(nix::sys::stat::Mode::empty());
    for (name, bits) in [("open", 0o000), ("usual", 0o022), ("shut", 0o077)] {
        umask(nix::sys::stat::Mode::from_bits_truncate(bits));
        let user = homes.user(name, ALICE);
        assert_installs(&user);
        let folder = fs::metadata(user.home.join(".ssh")).unwrap();
        assert_eq!(folder.mode() & 0o7777, 0o700, "{name}");
    }
    umask(before);
}

/// Root is a user like any other: no link is followed in that home either.
#[test]
fn root_is_nobody_special() {
    let homes = Homes::new();
    let canary = homes.canary();
    let user = Account {
        groups: vec![0],
        ..homes.user("toor", 0)
    };
    let folder = user.home.join(".ssh");
    std::os::unix::fs::symlink(&canary.folder, &folder).unwrap();
    assert_refused(&user, ".ssh\" is a symbolic link");
    fs::remove_file(&folder).unwrap();

    mode(&user.home, 0o777);
    assert_refused(&user, "is writable by others");
    mode(&user.home, 0o755);
    own(&user.home, ALICE);
    assert_refused(&user, &format!("belongs to uid {ALICE}"));
    own(&user.home, 0);
    assert_installs(&user);
    canary.assert_alive();
}

#[test]
fn what_is_written_has_the_users_own_group() {
    let homes = Homes::new();
    let mut user = homes.user("alice", ALICE);
    user.gid = BOB;
    user.groups = vec![BOB];
    install(&user, &config(), &keys(&user)).unwrap();
    let file = fs::metadata(user.home.join(".ssh/authorized_keys")).unwrap();
    assert_eq!((file.uid(), file.gid()), (ALICE, BOB));
}

/// While the agent acts as a user, that user may neither stop nor trace it.
#[test]
fn the_user_may_not_signal_the_thread_that_acts_for_them() {
    need_root();
    let user = somebody(ALICE, ALICE, &[ALICE]);
    // The positive control: a thread that becomes the user wholly can be killed by them.
    assert!(may_signal_while(|work| {
        let (uid, gid) = (Uid::from_raw(ALICE), Gid::from_raw(ALICE));
        set_thread_groups(&[]).unwrap();
        set_thread_res_gid(gid, gid, gid).unwrap();
        set_thread_res_uid(uid, uid, uid).unwrap();
        work();
    }));
    assert!(!may_signal_while(|work| run_as(&user, work).unwrap()));
}

fn may_signal_while(act: impl FnOnce(Box<dyn FnOnce() + Send>) + Send) -> bool {
    let ((tell, told), (end, ended)) = (mpsc::channel(), mpsc::channel::<()>());
    thread::scope(|scope| {
        scope.spawn(|| {
            act(Box::new(move || {
                tell.send(gettid().as_raw_nonzero().to_string()).unwrap();
                ended.recv().unwrap();
            }));
        });
        let thread = told.recv().unwrap();
        let kill = Command::new("/bin/sh")
            .args(["-c", "kill -0 $0", &thread])
            .uid(ALICE)
            .gid(ALICE)
            .output();
        end.send(()).unwrap();
        kill.unwrap().status.success()
    })
}

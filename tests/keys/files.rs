//! Installing keys in homes whose users work against it. Each refusal has its positive control: the same
//! call succeeds once the obstacle is gone.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;

use nix::mount::{MsFlags, mount};
use portcullis::system::accounts::Account;
use portcullis::system::as_user::run_as;
use portcullis::system::key_files::{install, read_back, remove_all};
use portcullis_protocol::AuthorizedKey;
use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::thread::{Gid, Uid, gettid, set_thread_groups, set_thread_res_gid, set_thread_res_uid};

use super::home::*;

fn assert_refused(user: &Account, expected: &str) {
    let error = install(user, &config(), &keys(user)).unwrap_err().to_string();
    assert!(error.contains(expected), "expected {expected:?}: {error}");
    let error = read_back(user, &config()).unwrap_err();
    assert!(
        error.contains(expected),
        "expected {expected:?} on reading: {error}"
    );
}

fn assert_installs(user: &Account) {
    let outcome = install(user, &config(), &keys(user)).unwrap();
    let (path, found) = read_back(user, &config()).unwrap();
    assert_eq!((&path, found.len()), (&outcome.path, 1));
    let meta = fs::metadata(&path).unwrap();
    assert_eq!(
        (meta.uid(), meta.gid(), meta.mode() & 0o7777),
        (user.uid, user.gid, 0o600)
    );
}

#[test]
fn a_fresh_home_gets_a_folder_and_a_file_of_its_user() {
    let homes = Homes::new();
    let user = homes.user("alice", ALICE);
    assert_eq!(read_back(&user, &config()).unwrap().1, []);
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

#[test]
fn a_read_only_file_system_is_named() {
    let homes = Homes::new();
    let user = homes.user("alice", ALICE);
    let tmpfs = |flags| mount(Some("tmpfs"), &user.home, Some("tmpfs"), flags, Some("size=1m")).unwrap();
    tmpfs(MsFlags::empty());
    own(&user.home, ALICE);
    mode(&user.home, 0o755);
    let file = own_keys(&user);
    tmpfs(MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY);
    let error = install(&user, &config(), &keys(&user)).unwrap_err().to_string();
    assert!(error.contains("mount the file system read-write"), "{error}");
    assert_eq!(fs::read(&file).unwrap(), OWN);

    tmpfs(MsFlags::MS_REMOUNT);
    assert_installs(&user);
}

#[test]
fn a_full_disk_leaves_the_old_file_whole() {
    let homes = Homes::new();
    let user = homes.user("alice", ALICE);
    mount(
        Some("tmpfs"),
        &user.home,
        Some("tmpfs"),
        MsFlags::empty(),
        Some("size=64k"),
    )
    .unwrap();
    own(&user.home, ALICE);
    mode(&user.home, 0o755);
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

/// droplet-agent#141: while keys are installed, the user swaps `.ssh` for a link to root's folder.
#[test]
fn a_renamer_gains_nothing() {
    let homes = Homes::new();
    let canary = homes.canary();
    for user in [homes.user("alice", ALICE), homes.user("bob", BOB)] {
        own_keys(&user);
        let (folder, link) = (user.home.join(".ssh"), user.home.join("link"));
        symlink(&canary.folder, &link).unwrap();
        let stop = AtomicBool::new(false);
        let (mut done, mut refused) = (0, 0);
        thread::scope(|scope| {
            let renamer = scope.spawn(|| {
                run_as(&user, || {
                    while !stop.load(Ordering::Relaxed) {
                        exchange(&folder, &link);
                    }
                })
            });
            for round in 0..300 {
                let keys = if round % 2 == 0 { keys(&user) } else { Vec::new() };
                match install(&user, &config(), &keys) {
                    Ok(_) => done += 1,
                    Err(error) => {
                        assert!(error.to_string().contains("symbolic link"), "{error}");
                        refused += 1;
                    }
                }
            }
            stop.store(true, Ordering::Relaxed);
            renamer.join().unwrap().unwrap();
        });
        assert!(
            done > 0 && refused > 0,
            "the race was not run: {done} done, {refused} refused"
        );
        if folder.is_symlink() {
            exchange(&folder, &link);
        }
        assert_installs(&user);
        assert!(fs::read(folder.join("authorized_keys")).unwrap().ends_with(OWN));
        canary.assert_alive();
    }
}

fn exchange(a: &Path, b: &Path) {
    renameat_with(CWD, a, CWD, b, RenameFlags::EXCHANGE).unwrap();
}

/// An editor puts a new file in the old one's place while keys come and go.
#[test]
fn an_editor_meanwhile_never_makes_a_mixture() {
    let homes = Homes::new();
    let user = homes.user("alice", ALICE);
    let file = own_keys(&user);
    for round in 0..50 {
        let keys = if round % 2 == 0 { keys(&user) } else { Vec::new() };
        let mut content = fs::read(&file).unwrap();
        content.extend_from_slice(format!("# {round}\n").as_bytes());
        thread::scope(|scope| {
            let writer = scope.spawn(|| install(&user, &config(), &keys));
            // As an editor does it: a new file in the old one's place.
            let new = user.home.join("new");
            fs::write(&new, &content).unwrap();
            own(&new, ALICE);
            mode(&new, 0o600);
            fs::rename(&new, &file).unwrap();
            writer.join().unwrap().unwrap();
        });
        install(&user, &config(), &keys).unwrap();
        let now = fs::read(&file).unwrap();
        assert!(now.windows(OWN.len()).any(|part| part == OWN), "round {round}");
    }
}

/// While the agent acts as a user, that user may neither stop nor trace it.
#[test]
fn the_user_may_not_signal_the_thread_that_acts_for_them() {
    need_root();
    let user = Account {
        name: "alice".parse().unwrap(),
        uid: ALICE,
        gid: ALICE,
        groups: vec![ALICE],
        home: "/".into(),
        shell: "".into(),
    };
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

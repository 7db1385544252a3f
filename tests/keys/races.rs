//! Users who change their homes while keys are put there.
//!
//! May not live here: homes that hold still.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::stat::umask;
use portcullis::system::accounts::Account;
use portcullis::system::as_user::run_as;
use portcullis::system::key_files::install;
use rustix::fs::{CWD, Mode, OFlags, RenameFlags, openat, renameat_with, symlinkat};

use super::home::*;
use crate::common::Over;

/// A race that was not run within this time is a broken test.
const LONG: Duration = Duration::from_secs(60);

/// A home whose user swaps all that can be swapped for what leads to root's canary.
struct Swapped {
    user: Account,
    canary: PathBuf,
    stop: AtomicBool,
}

impl Swapped {
    fn new(user: Account, canary: &Canary) -> Self {
        let file = own_keys(&user);
        let folder = file.parent().unwrap();
        symlink(&canary.folder, user.home.join("link")).unwrap();
        let other = user.home.join("other");
        fs::create_dir(&other).unwrap();
        own(&other, user.uid);
        // A hard link to root's file: users may not make one where protected_hardlinks is set.
        fs::hard_link(&canary.file, folder.join("hard")).unwrap();
        symlink(&canary.file, folder.join("soft")).unwrap();
        Self {
            user,
            canary: canary.file.clone(),
            stop: AtomicBool::new(false),
        }
    }

    /// What the user does until it is over, in two threads.
    fn attack<'a>(&'a self, scope: &'a thread::Scope<'a, '_>) {
        scope.spawn(|| {
            run_as(&self.user, || {
                while !self.stop.load(Ordering::Relaxed) {
                    exchange(CWD, &self.user.home, ".ssh", "link");
                    exchange(CWD, &self.user.home, ".ssh", "link");
                    exchange(CWD, &self.user.home, ".ssh", "other");
                    exchange(CWD, &self.user.home, ".ssh", "other");
                }
            })
        });
        // From the folder itself, wherever it is just then.
        let folder = openat(
            CWD,
            self.user.home.join(".ssh"),
            OFlags::RDONLY | OFlags::NOFOLLOW,
            Mode::empty(),
        );
        let folder = folder.unwrap();
        scope.spawn(move || {
            run_as(&self.user, || {
                let here = Path::new("");
                while !self.stop.load(Ordering::Relaxed) {
                    for other in ["hard", "soft"] {
                        exchange(&folder, here, "authorized_keys", other);
                        exchange(&folder, here, "authorized_keys", other);
                    }
                    let _ = symlinkat(&self.canary, &folder, "authorized_keys.portcullis-new");
                }
            })
        });
    }

    /// Ends the attack and takes its tools away: the links, and the folder that is not `.ssh`.
    fn clear(&self) {
        let home = &self.user.home;
        if home.join(".ssh").is_symlink() {
            exchange(CWD, home, ".ssh", "link");
        }
        if !home.join(".ssh/hard").exists() && home.join("other/hard").exists() {
            exchange(CWD, home, ".ssh", "other");
        }
        for entry in fs::read_dir(home.join(".ssh")).unwrap().flatten() {
            let meta = entry.metadata().unwrap();
            if meta.is_symlink() || std::os::unix::fs::MetadataExt::nlink(&meta) > 1 {
                fs::remove_file(entry.path()).unwrap();
            }
        }
    }

    /// The user's own bytes are in one of the files, whatever name the user gave it.
    fn assert_own_bytes(&self) {
        let folders = [".ssh", "other"].map(|name| self.user.home.join(name));
        let files = folders
            .iter()
            .flat_map(|folder| fs::read_dir(folder).unwrap().flatten());
        let kept = files
            .filter(|entry| entry.file_type().unwrap().is_file())
            .any(|entry| fs::read(entry.path()).unwrap().ends_with(OWN));
        assert!(kept, "the user's own keys are gone");
    }
}

/// Swaps two names at once. What is not there just now, or is root's, can't be.
fn exchange(folder: impl std::os::fd::AsFd, path: &Path, a: &str, b: &str) {
    let _ = renameat_with(
        &folder,
        path.join(a),
        &folder,
        path.join(b),
        RenameFlags::EXCHANGE,
    );
}

/// What others do (droplet-agent#141): a file of the home, by its path, as root.
fn naive(user: &Account) {
    let file = OpenOptions::new()
        .append(true)
        .open(user.home.join(".ssh/authorized_keys"));
    let _ = file.and_then(|mut file| file.write_all(b"key\n"));
}

/// The positive control: this attack succeeds against who writes by path.
#[test]
fn who_writes_by_path_is_led_astray() {
    let homes = Homes::new();
    let canary = homes.canary();
    let swapped = Swapped::new(homes.user("alice", ALICE), &canary);
    let began = Instant::now();
    thread::scope(|scope| {
        let _over = Over(&swapped.stop);
        swapped.attack(scope);
        while canary.is_alive() && began.elapsed() < LONG {
            naive(&swapped.user);
        }
    });
    assert!(!canary.is_alive(), "the attack attacks nothing");
}

/// While keys come and go a thousand times, under two users at once, both swap their folders, files and
/// our temporary file for links to root's file.
#[test]
fn a_renamer_gains_nothing() {
    let homes = Homes::new();
    let canary = homes.canary();
    let users =
        [("alice", ALICE), ("bob", BOB)].map(|(name, uid)| Swapped::new(homes.user(name, uid), &canary));
    thread::scope(|scope| {
        for swapped in &users {
            swapped.attack(scope);
            scope.spawn(|| {
                // Whatever comes of it, the attackers end with this.
                let over = Over(&swapped.stop);
                let (done, refused) = thousand_rounds(&swapped.user);
                drop(over);
                assert!(
                    done > 0 && refused > 0,
                    "the race was not run: {done} done, {refused} refused"
                );
                println!("{}: {done} done, {refused} refused", swapped.user.name);
            });
        }
    });
    canary.assert_alive();
    for swapped in &users {
        swapped.clear();
        swapped.assert_own_bytes();
        assert_installs(&swapped.user);
        swapped.assert_own_bytes();
    }
    canary.assert_alive();
}

/// How often it was done, and how often refused.
fn thousand_rounds(user: &Account) -> (usize, usize) {
    let (mut done, mut refused) = (0, 0);
    for round in 0..1000 {
        let keys = if round % 2 == 0 { keys(user) } else { Vec::new() };
        match install(user, &config(), &keys) {
            Ok(_) => done += 1,
            Err(error) => {
                let error = error.to_string();
                let known = [
                    "is a symbolic link",
                    "has a second hard link",
                    "times while it was merged",
                    // The user's own temporary file, or none, where ours was.
                    "authorized_keys.portcullis-new\": File exists",
                    "No such file or directory",
                ];
                assert!(known.iter().any(|known| error.contains(known)), "{error}");
                refused += 1;
            }
        }
    }
    (done, refused)
}

/// Another user looks for a moment in which a new file can be read, in a folder that lets everybody look.
#[test]
fn a_key_file_is_never_readable_by_others_not_even_at_first() {
    let homes = Homes::new();
    umask(nix::sys::stat::Mode::empty());
    let user = homes.user("alice", ALICE);
    let file = own_keys(&user);
    let folder = user.home.join(".ssh");
    mode(&folder, 0o755);
    let new = folder.join("authorized_keys.portcullis-new");
    let (stop, seen, read) = (AtomicBool::new(false), AtomicUsize::new(0), AtomicUsize::new(0));
    let bob = homes.user("bob", BOB);
    let (stop, seen, read, watched) = (&stop, &seen, &read, &new);
    thread::scope(|scope| {
        let watcher = scope.spawn(move || {
            run_as(&bob, || {
                while !stop.load(Ordering::Relaxed) {
                    match File::open(watched) {
                        Ok(mut file) => {
                            let _ = file.read(&mut [0; 16]);
                            read.fetch_add(1, Ordering::Relaxed);
                        }
                        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
                            seen.fetch_add(1, Ordering::Relaxed);
                        }
                        Err(_) => {}
                    }
                }
            })
        });
        let over = Over(stop);
        let began = Instant::now();
        let until = |counted: &AtomicUsize, work: &dyn Fn(usize)| {
            for round in 0.. {
                work(round);
                if (round >= 200 && counted.load(Ordering::Relaxed) > 0) || began.elapsed() > LONG {
                    break;
                }
            }
        };
        // Until the watcher has met the new file: so it would also have met one that is open to all.
        until(seen, &|round| {
            mode(&file, if round % 4 < 2 { 0o644 } else { 0o600 });
            let keys = if round % 2 == 0 { keys(&user) } else { Vec::new() };
            install(&user, &config(), &keys).unwrap();
        });
        let read_of_ours = read.load(Ordering::Relaxed);
        // The positive control: a file that is tightened after it was made.
        until(read, &|_| {
            fs::write(&new, "secret").unwrap();
            mode(&new, 0o600);
            fs::remove_file(&new).unwrap();
        });
        drop(over);
        watcher.join().unwrap().unwrap();
        assert!(seen.load(Ordering::Relaxed) > 0, "the watcher saw nothing");
        assert_eq!(read_of_ours, 0, "a new file could be read by others");
    });
    assert!(
        read.load(Ordering::Relaxed) > 0,
        "the watcher can't read anything"
    );
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

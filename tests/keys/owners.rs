//! Whose home it is: somebody else's, root's, one behind a link, one that two names share, and names and
//! homes that only just are some.
//!
//! May not live here: what lies in a home.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, symlink};
use std::thread;

use nix::sched::{CloneFlags, unshare};
use nix::unistd::{chdir, chroot};
use portcullis::system::accounts::{self, Account};
use portcullis::system::key_files::{install, read_back, remove_all};
use portcullis_protocol::{AuthorizedKey, UserName};

use super::home::*;
use super::sshd::instance;

#[test]
fn somebody_elses_home_is_refused() {
    let homes = Homes::new();
    let canary = homes.canary();
    let (alice, bob) = (homes.user("alice", ALICE), homes.user("bob", BOB));
    let file = own_keys(&bob);
    let astray = Account {
        home: bob.home.clone(),
        ..alice.clone()
    };
    assert_refused(&astray, &format!("belongs to uid {BOB}"));
    assert_eq!(fs::read(&file).unwrap(), OWN);
    assert_installs(&bob);

    // Root's is trusted, as sshd does, but nothing can be made in it.
    own(&alice.home, 0);
    let error = install(&alice, &config(), &keys(&alice)).unwrap_err().to_string();
    assert!(error.contains("can't create"), "{error}");
    assert!(error.contains("check the owner and mode"), "{error}");
    ssh_folder(&alice);
    assert_installs(&alice);
    canary.assert_alive();
}

#[test]
fn a_home_behind_a_link_of_roots_is_a_home() {
    let homes = Homes::new();
    let mut user = homes.user("alice", ALICE);
    let link = homes.path().join("link");
    symlink(&user.home, &link).unwrap();
    user.home = link;
    assert_installs(&user);
}

/// Where a user chose the way to the home, it is walked as that user, and what it leads to is checked.
#[test]
fn a_home_behind_a_link_of_the_users_leads_nowhere_new() {
    let homes = Homes::new();
    let canary = homes.canary();
    let (alice, bob) = (homes.user("alice", ALICE), homes.user("bob", BOB));
    let bobs = own_keys(&bob);
    let chosen = Account {
        home: alice.home.join("home"),
        ..alice.clone()
    };
    let lead_to = |target: &std::path::Path| {
        let _ = fs::remove_file(&chosen.home);
        symlink(target, &chosen.home).unwrap();
    };

    lead_to(&bob.home);
    assert_refused(&chosen, &format!("belongs to uid {BOB}"));
    assert_eq!(fs::read(&bobs).unwrap(), OWN);

    // Root's folder is trusted, and closed to this user.
    lead_to(&canary.folder);
    let error = install(&chosen, &config(), &keys(&chosen)).unwrap_err();
    assert!(error.to_string().contains("Permission denied"), "{error}");
    assert!(!remove_all(&chosen, &config()).unwrap().changed);
    canary.assert_alive();
    // Even with a file there.
    let roots = homes.path().join("with keys");
    fs::create_dir_all(roots.join(".ssh")).unwrap();
    fs::write(roots.join(".ssh/authorized_keys"), "root's own\n").unwrap();
    lead_to(&roots);
    let error = install(&chosen, &config(), &keys(&chosen)).unwrap_err();
    assert!(error.to_string().contains("Permission denied"), "{error}");
    assert_eq!(
        fs::read(roots.join(".ssh/authorized_keys")).unwrap(),
        b"root's own\n"
    );

    lead_to(&chosen.home);
    assert_refused(&chosen, "can't open the home");
    let own_folder = alice.home.join("really");
    fs::create_dir(&own_folder).unwrap();
    own(&own_folder, ALICE);
    lead_to(&own_folder);
    assert_installs(&chosen);
}

/// One uid, one home: each is the other, to the kernel and to sshd. One file holds the keys of whoever
/// was installed last.
#[test]
fn two_names_of_one_user_have_one_file() {
    let homes = Homes::new();
    let alice = homes.user("alice", ALICE);
    let file = own_keys(&alice);
    let twin = Account {
        name: "alice-too".parse().unwrap(),
        ..alice.clone()
    };
    assert_installs(&alice);
    let other = AuthorizedKey {
        key: OTHER.parse().unwrap(),
        ..keys(&twin).remove(0)
    };
    assert!(
        install(&twin, &config(), std::slice::from_ref(&other))
            .unwrap()
            .changed
    );
    let found = read_back(&alice, &config()).unwrap().keys;
    assert!(found.iter().map(|line| &line.key).eq([&other.key]), "{found:?}");
    assert!(fs::read(&file).unwrap().ends_with(OWN));
}

#[test]
fn a_home_of_two_users_is_its_owners() {
    let homes = Homes::new();
    let alice = homes.user("alice", ALICE);
    let bob = Account {
        home: alice.home.clone(),
        ..homes.user("bob", BOB)
    };
    assert_installs(&alice);
    assert_refused(&bob, &format!("belongs to uid {ALICE}"));
    // In a home of root's, the folder is that of one of them.
    own(&alice.home, 0);
    mode(&alice.home.join(".ssh"), 0o755);
    assert_installs(&alice);
    assert_refused(&bob, &format!(".ssh\" belongs to uid {ALICE}"));
    // A group that both are in changes nothing: sshd trusts no such home.
    mode(&alice.home, 0o775);
    for user in [&alice, &bob] {
        assert_refused(user, "is writable by others");
    }
}

/// passwd(5) as an administrator wrote it.
fn entry(name: &str, home: &str) -> Account {
    let mut file = OpenOptions::new().append(true).open("/etc/passwd").unwrap();
    writeln!(file, "{name}:x:{ALICE}:{ALICE}::{home}:/bin/sh").unwrap();
    accounts::lookup(&name.parse().unwrap()).unwrap()
}

#[test]
fn homes_that_are_no_place() {
    let _homes = instance();
    for (name, home) in [
        ("nowhere", ""),
        ("here", "home/here"),
        ("dot", "."),
        ("up", "../up"),
    ] {
        let user = entry(name, home);
        assert_refused(
            &user,
            &format!("the home {home:?} of {name} is not an absolute path"),
        );
    }
    // The way there is walked as the user.
    fs::create_dir("/run/closed").unwrap();
    mode("/run/closed".as_ref(), 0o700);
    fs::create_dir("/run/there").unwrap();
    own("/run/there".as_ref(), ALICE);
    let user = entry("roundabout", "/run/closed/../there");
    assert_refused(&user, "Permission denied");
    mode("/run/closed".as_ref(), 0o755);
    assert_installs(&user);
    let user = entry("missing", "/run/missing");
    assert_refused(
        &user,
        "can't open the home \"/run/missing\": No such file or directory",
    );
    let user = entry("device", "/dev/null");
    assert_refused(&user, "can't open the home \"/dev/null\": Not a directory");
}

#[test]
fn the_root_folder_as_a_home() {
    let homes = Homes::new();
    let cell = homes.path().join("cell");
    fs::create_dir_all(&cell).unwrap();
    thread::scope(|scope| {
        scope.spawn(|| {
            // This thread's own root, not that of the test.
            unshare(CloneFlags::CLONE_FS).unwrap();
            chroot(&cell).unwrap();
            chdir("/").unwrap();
            let user = Account {
                name: "alice".parse().unwrap(),
                uid: ALICE,
                gid: ALICE,
                groups: vec![ALICE],
                home: "/".into(),
                shell: "".into(),
            };
            let error = install(&user, &config(), &keys(&user)).unwrap_err().to_string();
            assert!(
                error.contains("can't create \"/.ssh\": Permission denied"),
                "{error}"
            );
            ssh_folder(&user);
            assert_installs(&user);
        });
    });
    assert_eq!(
        fs::metadata(cell.join(".ssh/authorized_keys")).unwrap().uid(),
        ALICE
    );
}

#[test]
fn odd_names_have_homes_and_keys_like_others() {
    let _homes = instance();
    let longest = "a".repeat(32);
    for name in ["a.b-c_d", "_x", "A1", "x-", "x.", longest.as_str()] {
        fs::create_dir_all("/home").unwrap();
        let home = format!("/home/{name}");
        fs::create_dir(&home).unwrap();
        own(home.as_ref(), ALICE);
        let user = entry(name, &home);
        let outcome = install(&user, &config(), &keys(&user)).unwrap();
        assert_eq!(
            outcome.path,
            std::path::Path::new(&home).join(".ssh/authorized_keys")
        );
        assert_installs(&user);
        // As a folder's name too, in AuthorizedKeysFile.
        let mut by_name = config();
        by_name.authorized_keys_files = vec!["/home/%u/keys-%U".into()];
        let path = install(&user, &by_name, &keys(&user)).unwrap().path;
        assert_eq!(path, std::path::Path::new(&home).join(format!("keys-{ALICE}")));
    }
}

#[test]
fn names_that_could_be_more_than_a_name_are_refused() {
    let longest = "a".repeat(33);
    for name in [
        "",
        ".",
        "..",
        ".ssh",
        "../root",
        "a/b",
        "/etc",
        "-x",
        "1000",
        "a b",
        "a:b",
        "a\nb",
        "a\0",
        "%u",
        "a%h",
        "$(id)",
        "a;b",
        "a,b",
        "a=b",
        "a*",
        "a\\b",
        "\u{fc}ber",
        "root ",
        "a$",
        longest.as_str(),
    ] {
        assert!(name.parse::<UserName>().is_err(), "{name:?}");
        let key = serde_json::json!({ "user": name, "key": KEY });
        let error = serde_json::from_value::<AuthorizedKey>(key)
            .unwrap_err()
            .to_string();
        assert!(error.contains("is not a login name"), "{name:?}: {error}");
        assert!(!error.contains(char::is_control), "{name:?}: {error:?}");
    }
    for name in ["root", "a.b-c_d"] {
        let key = serde_json::json!({ "user": name, "key": KEY });
        assert!(serde_json::from_value::<AuthorizedKey>(key).is_ok());
    }
}

//! What a file's replacement does with what somebody wrote meanwhile, where no race has to be won.
//!
//! May not live here: files of users, races (`tests/keys`).

use super::*;

/// Whoever runs this, at home in that folder.
fn me(home: &Path) -> Account {
    Account {
        name: "alice".parse().unwrap(),
        uid: nix::unistd::geteuid().as_raw(),
        gid: nix::unistd::getegid().as_raw(),
        groups: Vec::new(),
        home: home.to_owned(),
        shell: PathBuf::new(),
    }
}

/// An editor that saves between our reading and our writing keeps what it wrote: the merge is made anew.
#[test]
fn what_somebody_wrote_meanwhile_is_not_replaced() {
    let home = tempfile::tempdir().unwrap();
    let account = me(home.path());
    let at = |name: &str| home.path().join(name);
    let name = OsStr::new("authorized_keys");
    let folder = Folder {
        fd: File::open(home.path()).unwrap().into(),
        path: home.path().to_owned(),
        way: Vec::new(),
    };
    std::fs::write(at("authorized_keys"), "theirs\n").unwrap();
    let old = read(&account, &folder, name).unwrap();
    // Nobody wrote: ours takes its place.
    assert!(replace(&folder, name, old.as_ref(), b"first\n").unwrap());
    for is_new_file in [false, true] {
        let old = read(&account, &folder, name).unwrap();
        if is_new_file {
            std::fs::write(at("saved"), "saved\n").unwrap();
            std::fs::rename(at("saved"), at("authorized_keys")).unwrap();
        } else {
            std::fs::write(at("authorized_keys"), "longer than before\n").unwrap();
        }
        let saved = std::fs::read(at("authorized_keys")).unwrap();
        assert!(!replace(&folder, name, old.as_ref(), b"ours\n").unwrap());
        assert_eq!(std::fs::read(at("authorized_keys")).unwrap(), saved);
        assert_eq!(std::fs::read_dir(home.path()).unwrap().count(), 1);
    }
    // One that came where there was none.
    std::fs::remove_file(at("authorized_keys")).unwrap();
    let none = read(&account, &folder, name).unwrap();
    assert!(none.is_none());
    std::fs::write(at("authorized_keys"), "new\n").unwrap();
    assert!(!replace(&folder, name, None, b"ours\n").unwrap());
}

//! Throw-away homes of two users that exist as numbers only.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use portcullis::policy::observation::SshdConfig;
use portcullis::system::accounts::Account;
use portcullis_protocol::AuthorizedKey;

pub const ALICE: u32 = 61001;
pub const BOB: u32 = 61002;

pub const KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIFkKc52EQpKAMBtUiDp/N8hykSeuzBRx5gN48WTPDhWS ours";
pub const OWN: &[u8] = b"# mine\r\nssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJdD7y3aLq454yWBdwLWbieU1ebz9/cu7/QEXn9OIeZJ me\n\xe9 no end";

/// Fails the test, rather than skipping it, if this is not root.
pub fn need_root() {
    assert!(
        rustix::process::geteuid().is_root(),
        "run these tests as root: they act as other users"
    );
}

/// A folder with homes, in a mount namespace of this thread's own: mounts made here end with the test.
pub struct Homes(tempfile::TempDir);

impl Homes {
    pub fn new() -> Self {
        need_root();
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        mount(
            None::<&str>,
            "/",
            None::<&str>,
            MsFlags::MS_REC | MsFlags::MS_PRIVATE,
            None::<&str>,
        )
        .unwrap();
        let folder = tempfile::tempdir().unwrap();
        mode(folder.path(), 0o755);
        Self(folder)
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// A user with a home of their own, mode 0755.
    pub fn user(&self, name: &str, uid: u32) -> Account {
        let home = self.path().join(name);
        fs::create_dir_all(&home).unwrap();
        own(&home, uid);
        mode(&home, 0o755);
        Account {
            name: name.parse().unwrap(),
            uid,
            gid: uid,
            groups: vec![uid],
            home,
            shell: "/bin/bash".into(),
        }
    }

    /// Root's folder with a file that nobody else may change.
    pub fn canary(&self) -> Canary {
        let folder = self.path().join("root");
        fs::create_dir_all(&folder).unwrap();
        let file = folder.join("authorized_keys");
        fs::write(&file, "root's own\n").unwrap();
        mode(&file, 0o644);
        Canary {
            seen: Canary::look(&file),
            folder,
            file,
        }
    }
}

impl Drop for Homes {
    /// What a test mounted on a home would keep the folder from being removed.
    fn drop(&mut self) {
        for home in fs::read_dir(self.path()).into_iter().flatten().flatten() {
            let _ = umount2(&home.path(), MntFlags::MNT_DETACH);
        }
    }
}

/// A file of root, and how it was.
pub struct Canary {
    pub folder: PathBuf,
    pub file: PathBuf,
    seen: (Vec<u8>, u32, u32, i64, i64, u64),
}

impl Canary {
    fn look(file: &Path) -> (Vec<u8>, u32, u32, i64, i64, u64) {
        let meta = fs::metadata(file).unwrap();
        (
            fs::read(file).unwrap(),
            meta.uid(),
            meta.mode(),
            meta.mtime(),
            meta.mtime_nsec(),
            meta.ino(),
        )
    }

    pub fn assert_alive(&self) {
        assert_eq!(Self::look(&self.file), self.seen, "a file of root was changed");
        assert_eq!(
            fs::read_dir(&self.folder).unwrap().count(),
            1,
            "something was put in root's folder"
        );
    }
}

/// A configuration as OpenSSH 9.2's own default.
pub fn config() -> SshdConfig {
    SshdConfig {
        version: Some((9, 2)),
        ports: vec![22],
        listen: Vec::new(),
        pubkey: true,
        password: false,
        keyboard_interactive: false,
        authorized_keys_files: vec![".ssh/authorized_keys".into(), ".ssh/authorized_keys2".into()],
        host_key_files: Vec::new(),
        host_certificates: vec![],
    }
}

pub fn keys(user: &Account) -> Vec<AuthorizedKey> {
    vec![AuthorizedKey {
        user: user.name.clone(),
        key: KEY.parse().unwrap(),
        expires: None,
    }]
}

/// The user's `.ssh` with a file of their own.
pub fn ssh_folder(user: &Account) -> PathBuf {
    let folder = user.home.join(".ssh");
    fs::create_dir_all(&folder).unwrap();
    own(&folder, user.uid);
    mode(&folder, 0o700);
    folder
}

pub fn own_keys(user: &Account) -> PathBuf {
    let file = ssh_folder(user).join("authorized_keys");
    fs::write(&file, OWN).unwrap();
    own(&file, user.uid);
    mode(&file, 0o600);
    file
}

pub fn own(path: &Path, uid: u32) {
    chown(path, Some(uid), Some(uid)).unwrap();
}

pub fn mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

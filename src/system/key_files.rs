//! Authorized-keys files in users' homes: written and read as their user, through descriptors, never
//! through a link, and never in place.
//!
//! Nothing here trusts a home. Each folder is opened below the one before without following links, and
//! what was opened is checked, so that a home that changes meanwhile gains nothing. The checks are those
//! of sshd's `StrictModes` (sshd_config(5)): owned by the user or root, writable by nobody else, from the
//! home down to the file. What sshd would not read is not written either, but reported.
//!
//! May not live here: what the file should say (`policy::keys`), which file it is (`policy::key_path`).

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use portcullis_protocol::key::KeyLine;
use portcullis_protocol::{AuthorizedKey, PublicKey};
use rustix::fs::{self, AtFlags, FileType, Mode, OFlags, ResolveFlags, Stat};
use rustix::io::Errno;
use thiserror::Error;

use super::accounts::Account;
use super::as_user::run_as;
use super::selinux;
use super::stamp::{FolderStamp, Stamp, Version};
use crate::policy::key_path::{KeyPathError, key_path};
use crate::policy::keys::{Expiry, installed, merge};
use crate::policy::observation::{Observed, SshdConfig};

/// Largest file that is read, in bytes: thousands of keys.
const MAX_FILE: u64 = 1 << 20;

/// How often a file that changes while it is merged is merged again.
const MAX_TRIES: usize = 5;

/// A file after [`install`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The file that sshd reads.
    pub path: PathBuf,
    /// Whether it had to be written.
    pub changed: bool,
    /// Keys of ours that were in it before and are not any more.
    pub removed: Vec<PublicKey>,
}

/// Why keys could not be written or read.
#[derive(Debug, Error)]
pub enum KeyFileError {
    /// sshd reads no file that is this user's alone.
    #[error(transparent)]
    Path(#[from] KeyPathError),
    /// passwd(5) has no path from the root for the home.
    #[error("the home {0:?} of {1} is not an absolute path: usermod --home PATH {1}")]
    Home(PathBuf, String),
    /// A key is for somebody else.
    #[error("a key of {0} was to be written to the file of {1}: this is a bug of portcullis")]
    Foreign(String, String),
    /// The thread could not become the user.
    #[error("can't act as the user {0}: {1} (portcullis needs CAP_SETUID and CAP_SETGID)")]
    Switch(String, io::Error),
    /// A link where none is followed.
    #[error(
        "{0:?} is a symbolic link: portcullis does not follow links in a home, put the folder or file itself there"
    )]
    Link(PathBuf),
    /// Something else than a file.
    #[error("{0:?} is not a regular file: remove it")]
    NotAFile(PathBuf),
    /// Something else than a folder.
    #[error("{0:?} is not a folder: remove it")]
    NotAFolder(PathBuf),
    /// A second name leads to the same file.
    #[error("{0:?} has a second hard link: replace it by a copy of its own")]
    HardLink(PathBuf),
    /// Not a size that such a file has.
    #[error("{0:?} is larger than {MAX_FILE} bytes: shorten it")]
    TooLarge(PathBuf),
    /// sshd's `StrictModes` refuses it.
    #[error("{path:?} {what}, so sshd does not trust keys below it: {fix}")]
    Untrusted {
        /// What is not as it must be.
        path: PathBuf,
        /// How it is.
        what: String,
        /// The command that helps.
        fix: String,
    },
    /// Somebody else writes it all the time.
    #[error("{0:?} changed {MAX_TRIES} times while it was merged: stop what else writes it")]
    Busy(PathBuf),
    /// The policy of SELinux refused.
    #[error(
        "can't give {path:?} the SELinux label {label:?} of the file that it replaces: {source}: \
         see `ausearch -m avc`, or remove that file and let `restorecon` label the next one"
    )]
    Label {
        /// The new file.
        path: PathBuf,
        /// The old file's label.
        label: String,
        /// What the system said.
        source: Errno,
    },
    /// The system refused.
    #[error("can't {doing} {path:?}: {source}{}", hint(source))]
    System {
        /// What was tried.
        doing: &'static str,
        /// With what.
        path: PathBuf,
        /// What the system said.
        source: Errno,
    },
}

fn hint(errno: &Errno) -> &'static str {
    match *errno {
        Errno::ACCESS => ": check the owner and mode of it and of the folders above, for its user",
        Errno::PERM => {
            ": it, the file or the folder may be immutable or append-only (lsattr(1)): chattr -ia takes that off"
        }
        Errno::ISDIR => ": remove it",
        Errno::ROFS => ": mount the file system read-write, or put the keys outside the home",
        Errno::NOSPC | Errno::DQUOT => ": free space or raise the user's quota; the file is as it was",
        Errno::NOSYS => {
            ": openat2 needs Linux 5.6 or newer, and a sandbox that lets it through (RestrictSUIDSGID= does not)"
        }
        Errno::NOENT => ": create it",
        _ => "",
    }
}

type Result<T> = std::result::Result<T, KeyFileError>;

/// Makes the user's file hold exactly `keys` in our block, and all else in it as it was. A file that is
/// so already is not written. Blocks; see [`super::as_user::off_thread`].
///
/// The new content is on disk when this returns. A failure leaves the old file whole.
pub fn install(account: &Account, config: &SshdConfig, keys: &[AuthorizedKey]) -> Result<Outcome> {
    if let Some(key) = keys.iter().find(|key| key.user != account.name) {
        return Err(KeyFileError::Foreign(
            key.user.to_string(),
            account.name.to_string(),
        ));
    }
    let expiry = Expiry::understood_by(config.version);
    in_home(account, config, |below| {
        for _ in 0..MAX_TRIES {
            let Some((folder, name)) = open_folders(account, below, !keys.is_empty())? else {
                return Ok(Outcome {
                    path: account.home.join(below),
                    changed: false,
                    removed: Vec::new(),
                });
            };
            let path = folder.path.join(name);
            let old = read(account, &folder, name)?;
            let content = merge(old.as_ref().map_or(&[], |old| &old.content), keys, expiry);
            if content == old.as_ref().map_or(&[][..], |old| &old.content) {
                return Ok(Outcome {
                    path,
                    changed: false,
                    removed: Vec::new(),
                });
            }
            if replace(&folder, name, old.as_ref(), &content)? {
                return Ok(Outcome {
                    path,
                    changed: true,
                    removed: old.map_or_else(Vec::new, |old| removed(&old.content, keys)),
                });
            }
        }
        Err(KeyFileError::Busy(account.home.join(below)))
    })
}

/// Keys of ours that a file held and that are not to be in it any more.
pub fn removed(old: &[u8], keys: &[AuthorizedKey]) -> Vec<PublicKey> {
    let before = installed(old).into_iter().map(|line| line.key);
    before
        .filter(|old| !keys.iter().any(|new| new.key.same_key(old)))
        .collect()
}

/// Takes our keys out of the user's file. The caller remembers for which users it installed keys, and
/// calls this for each that the spec no longer names: the file itself does not tell.
pub fn remove_all(account: &Account, config: &SshdConfig) -> Result<Outcome> {
    install(account, config, &[])
}

/// The file that sshd reads for this user, and our keys in it; the reason, if sshd would not trust it.
/// A missing file holds no keys. Blocks.
pub fn read_back(account: &Account, config: &SshdConfig) -> Observed<ReadBack> {
    in_home(account, config, |below| {
        let (way, file) = match open_folders(account, below, false)? {
            Some((folder, name)) => {
                let file = read(account, &folder, name)?;
                (folder.way, file)
            }
            None => (Vec::new(), None),
        };
        Ok(ReadBack {
            path: account.home.join(below),
            keys: file
                .as_ref()
                .map_or_else(Vec::new, |file| installed(&file.content)),
            stamp: Stamp::new(way, file.map(|file| Version::of(&file.stat))),
        })
    })
    .map_err(|error| error.to_string())
}

/// A file's content as sshd reads it: as the user, and through links. For whoever audits; nothing that is
/// written depends on it. None if there is no file. Blocks.
pub fn read_as_sshd(account: &Account, path: &Path) -> Observed<Option<Vec<u8>>> {
    let read = || -> io::Result<Option<Vec<u8>>> {
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let fd = match fs::open(path, flags, Mode::empty()) {
            Ok(fd) => fd,
            Err(Errno::NOENT) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        if FileType::from_raw_mode(fs::fstat(&fd)?.st_mode) != FileType::RegularFile {
            return Err(io::Error::other("not a regular file"));
        }
        let mut content = Vec::new();
        File::from(fd).take(MAX_FILE).read_to_end(&mut content)?;
        Ok(Some(content))
    };
    let content = run_as(account, read).and_then(|content| content);
    content.map_err(|error| format!("{}: {error}", path.display()))
}

/// What a user's file holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReadBack {
    /// The file that sshd reads.
    pub path: PathBuf,
    /// Our keys in it.
    pub keys: Vec<KeyLine>,
    /// How the file and the folders above it were.
    pub stamp: Stamp,
}

impl ReadBack {
    /// Of a file of root's, outside of homes. It is opened through links, so who asks looks at them first.
    ///
    /// # Errors
    /// The file can't be read. One that is not there holds no keys.
    pub fn of_root(path: PathBuf) -> io::Result<Self> {
        let (mut content, mut version) = (Vec::new(), None);
        match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
            Ok(file) => {
                version = Some(Version::of(&fs::fstat(&file)?));
                file.take(MAX_FILE).read_to_end(&mut content)?;
            }
        }
        Ok(Self {
            path,
            keys: installed(&content),
            stamp: Stamp::new(Vec::new(), version),
        })
    }
}

/// Runs `work` as the user, with the path of the key file below the home.
fn in_home<T: Send>(
    account: &Account,
    config: &SshdConfig,
    work: impl FnOnce(&Path) -> Result<T> + Send,
) -> Result<T> {
    // A relative one would lead to wherever this process happens to be.
    if !account.home.is_absolute() {
        return Err(KeyFileError::Home(account.home.clone(), account.name.to_string()));
    }
    let below = key_path(
        &config.authorized_keys_files,
        &account.name,
        account.uid,
        &account.home,
    )?;
    run_as(account, || work(&below)).map_err(|error| KeyFileError::Switch(account.name.to_string(), error))?
}

/// An open folder, and the path that led to it, for messages only.
struct Folder {
    fd: OwnedFd,
    path: PathBuf,
    /// Of this folder and those above it, down from the home.
    way: Vec<FolderStamp>,
}

impl Folder {
    /// Opens what is directly below, and is not a link.
    fn open(&self, name: &OsStr, flags: OFlags, mode: Mode) -> std::result::Result<OwnedFd, Errno> {
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        fs::openat2(&self.fd, name, flags | OFlags::CLOEXEC, mode, resolve)
    }
}

/// The folder that holds the file, and the file's name. None if a folder is missing and not to be made.
fn open_folders<'a>(account: &Account, below: &'a Path, make: bool) -> Result<Option<(Folder, &'a OsStr)>> {
    let path = account.home.clone();
    // The way to the home is root's (/home may well be a link); what is below is the user's.
    let fd = fs::open(
        &path,
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .map_err(|source| system("open the home", &path, source))?;
    let way = vec![FolderStamp::of(&check(account, &fd, &path)?)];
    let mut folder = Folder { fd, path, way };
    let mut names = below.iter().peekable();
    while let Some(name) = names.next() {
        if names.peek().is_none() {
            return Ok(Some((folder, name)));
        }
        match open_folder(account, &folder, name, make)? {
            Some(next) => folder = next,
            None => return Ok(None),
        }
    }
    Ok(None)
}

fn open_folder(account: &Account, parent: &Folder, name: &OsStr, make: bool) -> Result<Option<Folder>> {
    let path = parent.path.join(name);
    let open = || parent.open(name, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty());
    let opened = match open() {
        Err(Errno::NOENT) if make => {
            match fs::mkdirat(&parent.fd, name, Mode::RWXU) {
                // Somebody else made it just now: it is checked like any other.
                Ok(()) | Err(Errno::EXIST) => {}
                Err(source) => return Err(system("create", &path, source)),
            }
            fs::fsync(&parent.fd).map_err(|source| system("sync", &parent.path, source))?;
            open()
        }
        opened => opened,
    };
    let fd = match opened {
        Ok(fd) => fd,
        Err(Errno::NOENT) if !make => return Ok(None),
        Err(Errno::LOOP) => return Err(KeyFileError::Link(path)),
        Err(Errno::NOTDIR) => return Err(KeyFileError::NotAFolder(path)),
        Err(source) => return Err(system("open", &path, source)),
    };
    let mut way = parent.way.clone();
    way.push(FolderStamp::of(&check(account, &fd, &path)?));
    Ok(Some(Folder { fd, path, way }))
}

/// A file as it was read.
struct Old {
    content: Vec<u8>,
    stat: Stat,
    label: Option<Vec<u8>>,
}

fn read(account: &Account, folder: &Folder, name: &OsStr) -> Result<Option<Old>> {
    let path = folder.path.join(name);
    // Non-blocking: else a FIFO would wait for a writer for ever.
    let fd = match folder.open(
        name,
        OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY,
        Mode::empty(),
    ) {
        Ok(fd) => fd,
        Err(Errno::NOENT) => return Ok(None),
        Err(Errno::LOOP) => return Err(KeyFileError::Link(path)),
        // A socket, or a device without a driver.
        Err(Errno::NXIO | Errno::NODEV) => return Err(KeyFileError::NotAFile(path)),
        Err(source) => return Err(system("open", &path, source)),
    };
    let stat = fs::fstat(&fd).map_err(|source| system("examine", &path, source))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(KeyFileError::NotAFile(path));
    }
    if stat.st_nlink > 1 {
        return Err(KeyFileError::HardLink(path));
    }
    check(account, &fd, &path)?;
    let label = selinux::label(&fd).map_err(|source| system("read the SELinux label of", &path, source))?;
    let mut content = Vec::new();
    File::from(fd)
        .take(MAX_FILE + 1)
        .read_to_end(&mut content)
        .map_err(|error| system("read", &path, errno(&error)))?;
    if content.len() as u64 > MAX_FILE {
        return Err(KeyFileError::TooLarge(path));
    }
    Ok(Some(Old { content, stat, label }))
}

/// sshd's rule for the home, the file, and each folder between.
fn check(account: &Account, fd: &OwnedFd, path: &Path) -> Result<Stat> {
    let stat = fs::fstat(fd).map_err(|source| system("examine", path, source))?;
    let untrusted = |what: String, fix: String| {
        Err(KeyFileError::Untrusted {
            path: path.to_owned(),
            what,
            fix,
        })
    };
    if stat.st_uid != account.uid && stat.st_uid != 0 {
        return untrusted(
            format!("belongs to uid {}", stat.st_uid),
            format!("chown {} {path:?}", account.name),
        );
    }
    if stat.st_mode & 0o022 != 0 {
        return untrusted(
            format!("is writable by others (mode {:04o})", stat.st_mode & 0o7777),
            format!("chmod go-w {path:?}"),
        );
    }
    Ok(stat)
}

/// Puts `content` in the old file's place. False if the old one is not what it was when it was read.
fn replace(folder: &Folder, name: &OsStr, old: Option<&Old>, content: &[u8]) -> Result<bool> {
    let mut new = OsString::from(name);
    new.push(".portcullis-new");
    let path = folder.path.join(&new);
    // A fixed name: what a crash left behind is found again, and nothing piles up.
    match fs::unlinkat(&folder.fd, &new, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => {}
        Err(source) => return Err(system("remove", &path, source)),
    }
    let mode = old.map_or(0o600, |old| old.stat.st_mode & 0o600);
    let label = old.and_then(|old| old.label.as_deref());
    let done = write_new(folder, &new, Mode::from_raw_mode(mode), label, content)
        .and_then(|()| Ok(unchanged(folder, name, old)? && rename(folder, &new, name)?));
    if !matches!(done, Ok(true)) {
        // The first failure is the one to tell.
        let _ = fs::unlinkat(&folder.fd, &new, AtFlags::empty());
    }
    done
}

fn write_new(folder: &Folder, new: &OsStr, mode: Mode, label: Option<&[u8]>, content: &[u8]) -> Result<()> {
    let path = folder.path.join(new);
    let failed = |source| system("write", &path, source);
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL;
    let fd = folder.open(new, flags, Mode::RUSR | Mode::WUSR).map_err(failed)?;
    // Whatever the umask: the mode at creation is only ever made tighter.
    fs::fchmod(&fd, mode).map_err(failed)?;
    // sshd may read only what is labelled for it.
    if let Some(label) = label {
        selinux::set_label(&fd, label).map_err(|source| KeyFileError::Label {
            path: path.clone(),
            label: String::from_utf8_lossy(label).trim_end_matches('\0').to_owned(),
            source,
        })?;
    }
    let mut file = File::from(fd);
    file.write_all(content).map_err(|error| failed(errno(&error)))?;
    file.sync_all().map_err(|error| failed(errno(&error)))
}

fn unchanged(folder: &Folder, name: &OsStr, old: Option<&Old>) -> Result<bool> {
    match (fs::statat(&folder.fd, name, AtFlags::SYMLINK_NOFOLLOW), old) {
        (Ok(now), Some(old)) => Ok(Version::of(&now) == Version::of(&old.stat)),
        (Err(Errno::NOENT), old) => Ok(old.is_none()),
        (Ok(_), None) => Ok(false),
        (Err(source), _) => Err(system("examine", &folder.path.join(name), source)),
    }
}

fn rename(folder: &Folder, new: &OsStr, name: &OsStr) -> Result<bool> {
    let path = folder.path.join(name);
    fs::renameat(&folder.fd, new, &folder.fd, name).map_err(|source| system("replace", &path, source))?;
    fs::fsync(&folder.fd).map_err(|source| system("sync", &folder.path, source))?;
    Ok(true)
}

fn system(doing: &'static str, path: &Path, source: Errno) -> KeyFileError {
    KeyFileError::System {
        doing,
        path: path.to_owned(),
        source,
    }
}

fn errno(error: &io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

#[cfg(test)]
mod tests;

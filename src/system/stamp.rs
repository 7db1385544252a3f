//! How files were when they were looked at, to tell later whether anybody changed them.
//!
//! May not live here: opening files, what is concluded from it.

use rustix::fs::Stat;

/// How a key file and the folders above it were: equal as long as nobody changed what sshd looks at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stamp {
    way: Vec<FolderStamp>,
    file: Option<Version>,
}

impl Stamp {
    /// Of the folders from the home down, and of the file, if it is there.
    pub fn new(way: Vec<FolderStamp>, file: Option<Version>) -> Self {
        Self { way, file }
    }
}

/// Which folder it is, and who may write to it. Not its times: users make files in their homes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FolderStamp {
    device: u64,
    inode: u64,
    mode: u32,
    owner: u32,
}

impl FolderStamp {
    /// Of a folder.
    pub fn of(stat: &Stat) -> Self {
        Self {
            device: stat.st_dev,
            inode: stat.st_ino,
            mode: stat.st_mode,
            owner: stat.st_uid,
        }
    }
}

/// What changes whenever a file does: content, mode and owner move its times.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Version {
    device: u64,
    inode: u64,
    size: i64,
    modified: (i64, u64),
    changed: (i64, u64),
}

impl Version {
    /// Of a file.
    #[allow(
        clippy::useless_conversion,
        reason = "the fields' types differ between architectures"
    )]
    pub fn of(stat: &Stat) -> Self {
        Self {
            device: stat.st_dev,
            inode: stat.st_ino,
            size: stat.st_size,
            modified: (stat.st_mtime, stat.st_mtime_nsec.into()),
            changed: (stat.st_ctime, stat.st_ctime_nsec.into()),
        }
    }
}

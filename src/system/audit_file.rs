//! The audit log's files: one that lines are appended to, older ones beside it, and the head.
//!
//! `audit.log` is the newest. When it is full it becomes `audit-NUMBER.log`, after the number of its last
//! record, with one rename: so a crash leaves no order in doubt.
//! May not live here: what a line says, or whether it is believed (`policy::audit`).

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::files;

/// The newest file's name.
pub const NEWEST: &str = "audit.log";
/// The head's name.
const HEAD: &str = "audit.head";
/// More bytes than a head has.
const MAX_HEAD: u64 = 4096;

/// The name of an older file whose last record has this number.
fn older_name(last: u64) -> String {
    format!("audit-{last:020}.log")
}

/// The number of an older file's last record, by its name; `None` for other names.
pub fn last_of(name: &str) -> Option<u64> {
    let number = name.strip_prefix("audit-")?.strip_suffix(".log")?;
    number.parse().ok().filter(|last| older_name(*last) == name)
}

/// The names of a log's files in a folder, the oldest first.
///
/// # Errors
/// As opendir(3); a folder that is not there has none.
pub fn names(folder: &Path) -> io::Result<Vec<String>> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut names = Vec::new();
    for entry in entries {
        let Ok(name) = entry?.file_name().into_string() else {
            continue;
        };
        if last_of(&name).is_some() {
            names.push(name);
        }
    }
    names.sort();
    if folder.join(NEWEST).exists() {
        names.push(NEWEST.to_owned());
    }
    Ok(names)
}

/// The head's bytes; `None` if there is none.
///
/// # Errors
/// As open(2) and read(2).
pub fn head(folder: &Path) -> io::Result<Option<Vec<u8>>> {
    let file = match files::open(&folder.join(HEAD), OpenOptions::new().read(true)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file?,
    };
    let mut bytes = Vec::new();
    file.take(MAX_HEAD).read_to_end(&mut bytes)?;
    Ok(Some(bytes))
}

/// A whole file of the log.
///
/// # Errors
/// As open(2) and read(2), and `FileTooLarge` over `limit`.
pub fn read(folder: &Path, name: &str, limit: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let file = files::open(&folder.join(name), OpenOptions::new().read(true))?;
    file.take(limit + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit {
        let reason = format!("larger than {limit} bytes");
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, reason));
    }
    Ok(bytes)
}

/// The last bytes of a file of the log, at most `most`.
///
/// # Errors
/// As open(2) and read(2).
pub fn tail(folder: &Path, name: &str, most: u64) -> io::Result<Vec<u8>> {
    let mut file = files::open(&folder.join(name), OpenOptions::new().read(true))?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(most)))?;
    let mut bytes = Vec::new();
    file.take(most).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// The newest file, open for appending.
#[derive(Debug)]
pub struct Newest {
    folder: PathBuf,
    file: File,
    head: File,
    length: u64,
    inode: (u64, u64),
}

impl Newest {
    /// Opens it in a folder, for root alone; both are made if they are missing. What stands after the last
    /// `unfinished` bytes is cut off.
    ///
    /// # Errors
    /// As mkdir(2), open(2), ftruncate(2) and fsync(2).
    pub fn open(folder: &Path, unfinished: u64) -> io::Result<Self> {
        DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
        let path = folder.join(NEWEST);
        let mut options = OpenOptions::new();
        let file = files::open(&path, options.append(true).create(true).mode(0o600))?;
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(false).mode(0o600);
        let head = files::open(&folder.join(HEAD), &mut options)?;
        if head.metadata()?.len() > MAX_HEAD {
            // None of ours, and what stands behind ours would make it unreadable for good.
            head.set_len(0)?;
        }
        let found = file.metadata()?;
        let length = found.len().saturating_sub(unfinished);
        if unfinished > 0 {
            file.set_len(length)?;
        }
        file.sync_all()?;
        File::open(folder)?.sync_all()?;
        Ok(Self {
            folder: folder.to_owned(),
            file,
            head,
            length,
            inode: (found.dev(), found.ino()),
        })
    }

    /// How long it is.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Whether it still is the file of that name, and as long as it was left: somebody may have taken it
    /// away, cut it or written to it, or mounted something over it.
    pub fn is_as_left(&self) -> bool {
        fs::metadata(self.folder.join(NEWEST))
            .is_ok_and(|now| (now.dev(), now.ino()) == self.inode && now.len() == self.length)
    }

    /// Appends a line; it is on the disk when this returns, or nothing of it is in the file.
    ///
    /// # Errors
    /// As write(2) and fdatasync(2). The flag says whether the file is as it was before; if not, it has to be
    /// opened anew.
    pub fn append(&mut self, line: &[u8]) -> Result<(), (io::Error, bool)> {
        let written = self.file.write_all(line).and_then(|()| self.file.sync_data());
        if let Err(error) = written {
            let is_cut = self.file.set_len(self.length).is_ok();
            return Err((error, is_cut));
        }
        self.length += line.len() as u64;
        Ok(())
    }

    /// Writes the head over the one before, in place: that needs no room. It is on the disk some time later;
    /// an older one than the log's end does no harm.
    ///
    /// # Errors
    /// As pwrite(2).
    pub fn set_head(&self, head: &[u8]) -> io::Result<()> {
        self.head.write_all_at(head, 0)
    }

    /// Makes it an older file, whose last record has the number `last`, and begins a new one.
    ///
    /// # Errors
    /// As rename(2), open(2) and fsync(2).
    pub fn rotate(self, last: u64) -> io::Result<Self> {
        let older = self.folder.join(older_name(last));
        fs::rename(self.folder.join(NEWEST), older)?;
        Self::open(&self.folder, 0)
    }
}

/// Removes an older file.
///
/// # Errors
/// As unlink(2).
pub fn remove(folder: &Path, name: &str) -> io::Result<()> {
    fs::remove_file(folder.join(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_keep_their_order_and_an_unfinished_end_is_cut_off() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().join("audit");
        assert_eq!(names(&folder).unwrap(), [""; 0]);
        let mut newest = Newest::open(&folder, 0).unwrap();
        newest.append(b"one\n").unwrap();
        newest = newest.rotate(1).unwrap();
        newest.append(b"two\nthr").unwrap();
        fs::write(folder.join("audit-7.log"), "not ours").unwrap();
        let expected = ["audit-00000000000000000001.log", NEWEST];
        assert_eq!(names(&folder).unwrap(), expected);
        assert_eq!(tail(&folder, NEWEST, 3).unwrap(), b"thr");
        assert!(read(&folder, NEWEST, 5).is_err());
        let newest = Newest::open(&folder, 3).unwrap();
        assert_eq!((newest.length(), newest.is_as_left()), (4, true));
        assert_eq!(read(&folder, NEWEST, 5).unwrap(), b"two\n");
        fs::write(folder.join(NEWEST), "other").unwrap();
        assert!(!newest.is_as_left());
        let mode = fs::metadata(folder.join(NEWEST)).unwrap().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(fs::metadata(&folder).unwrap().mode() & 0o777, 0o700);
    }

    #[test]
    fn the_head_is_written_over_in_place() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(head(folder.path()).unwrap(), None);
        let newest = Newest::open(folder.path(), 0).unwrap();
        for text in ["one", "two"] {
            newest.set_head(text.as_bytes()).unwrap();
            assert_eq!(head(folder.path()).unwrap().unwrap(), text.as_bytes());
        }
    }
}

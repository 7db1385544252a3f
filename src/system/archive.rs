//! A compressed archive that is made in memory and written once: a full disk keeps nobody from having it.
//!
//! May not live here: what is in it.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use flate2::Compression;
use flate2::write::GzEncoder;
use tar::{Builder, Header};

/// An archive as tar(1) and gzip(1) make them. All in it is root's, for root alone, and of one time.
pub struct Archive {
    folder: String,
    time: u64,
    tar: Builder<GzEncoder<Vec<u8>>>,
}

impl Archive {
    /// An empty one, whose files are in a folder of that name; `time` in seconds since 1970.
    pub fn new(folder: &str, time: u64) -> Self {
        let encoder = GzEncoder::new(Vec::new(), Compression::default());
        Self {
            folder: folder.to_owned(),
            time,
            tar: Builder::new(encoder),
        }
    }

    /// Adds a file.
    ///
    /// # Errors
    /// When the name does not fit into a header.
    pub fn add(&mut self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let mut header = Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o600);
        header.set_mtime(self.time);
        let path = format!("{}/{name}", self.folder);
        self.tar.append_data(&mut header, path, bytes)
    }

    /// All of it.
    ///
    /// # Errors
    /// None in memory.
    pub fn finish(self) -> io::Result<Vec<u8>> {
        self.tar.into_inner()?.finish()
    }
}

/// Writes a new file for root alone, durably. One that is there already, or a link, is left as it is; a file that
/// could not be written whole is removed.
///
/// # Errors
/// As open(2), write(2) and fsync(2).
pub fn write_new(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)?;
    let written = file.write_all(bytes).and_then(|()| file.sync_all());
    if written.is_err() {
        let _ = fs::remove_file(path);
    }
    written
}

/// A file or folder as it was found below another one.
#[derive(Debug, PartialEq, Eq)]
pub struct Listed {
    /// Its path below the folder.
    pub name: String,
    /// Its permissions, with its type (inode(7)).
    pub mode: u32,
    /// Its owner.
    pub uid: u32,
    /// Its length in bytes.
    pub size: u64,
    /// When it was last written, in seconds since 1970.
    pub modified: i64,
}

/// Most files that are listed.
const MAX_LISTED: usize = 2000;

/// What is in a folder and below, by name, without what is in the files. Links are not followed. Beyond 2000
/// entries the rest is left out.
///
/// # Errors
/// When a folder can't be read.
pub fn list(folder: &Path) -> io::Result<Vec<Listed>> {
    let mut listed = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(here) = folders.pop() {
        for entry in fs::read_dir(&here)? {
            let path = entry?.path();
            // It may be gone by now.
            let Ok(found) = fs::symlink_metadata(&path) else {
                continue;
            };
            if listed.len() == MAX_LISTED {
                return Ok(listed);
            }
            listed.push(Listed {
                name: path.strip_prefix(folder).unwrap_or(&path).display().to_string(),
                mode: found.mode(),
                uid: found.uid(),
                size: found.len(),
                modified: found.mtime(),
            });
            if found.is_dir() {
                folders.push(path);
            }
        }
    }
    listed.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(listed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn tar_reads_what_was_made() {
        let mut archive = Archive::new("bundle", 1_700_000_000);
        archive.add("a.txt", b"first\n").unwrap();
        archive.add("sub/b.json", b"{}").unwrap();
        let bytes = archive.finish().unwrap();
        let again = {
            let mut archive = Archive::new("bundle", 1_700_000_000);
            archive.add("a.txt", b"first\n").unwrap();
            archive.add("sub/b.json", b"{}").unwrap();
            archive.finish().unwrap()
        };
        assert_eq!(bytes, again);
        let mut tar = Command::new("tar")
            .args(["-tvz", "--utc", "--full-time"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        tar.stdin.take().unwrap().write_all(&bytes).unwrap();
        let output = tar.wait_with_output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success(), "{text}");
        assert!(
            text.contains("-rw------- 0/0") && text.contains("2023-11-14 22:13:20 bundle/a.txt"),
            "{text}"
        );
        assert!(text.contains("bundle/sub/b.json"), "{text}");
    }

    #[test]
    fn a_file_is_new_and_for_its_owner_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out");
        write_new(&path, b"x").unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert_eq!(
            write_new(&path, b"y").unwrap_err().kind(),
            io::ErrorKind::AlreadyExists
        );
        assert_eq!(fs::read(&path).unwrap(), b"x");
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(folder.path().join("elsewhere"), &link).unwrap();
        assert!(write_new(&link, b"z").is_err());
        assert!(!folder.path().join("elsewhere").exists());
    }

    #[test]
    fn a_folder_is_listed_without_content() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("sub")).unwrap();
        fs::write(folder.path().join("sub/f"), "12345").unwrap();
        let listed = list(folder.path()).unwrap();
        let names: Vec<(&str, u64)> = listed
            .iter()
            .map(|entry| (entry.name.as_str(), entry.size))
            .collect();
        assert_eq!(names[1], ("sub/f", 5));
        assert!(list(&folder.path().join("none")).is_err());
    }
}

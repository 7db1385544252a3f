//! Our one file among sshd's drop-ins: read, replaced, removed; and what sshd would do without it.
//!
//! May not live here: what the file says (`policy::sshd_drop_in`), when to take it back (`agent::sshd`).

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, symlink};
use std::path::{Path, PathBuf};

use super::files;
use super::sshd::Sshd;
use crate::policy::observation::{Observed, SshdConfig};
use crate::policy::sshd_drop_in::{NAME, is_ours};

/// Largest file of sshd's that is read, in bytes.
const MAX_FILE: usize = 1 << 20;

/// Where sshd's files are.
#[derive(Clone, Debug)]
pub struct DropIn {
    /// `sshd_config`.
    main: PathBuf,
    /// `sshd_config.d`.
    folder: PathBuf,
    /// For a copy that is only asked about; root's.
    scratch: PathBuf,
}

impl DropIn {
    /// The instance's own.
    pub fn find() -> Self {
        Self::new(Path::new("/etc/ssh"), Path::new("/run/portcullis/sshd"))
    }

    /// The one below `etc`, with a folder for copies.
    pub fn new(etc: &Path, scratch: &Path) -> Self {
        Self {
            main: etc.join("sshd_config"),
            folder: etc.join("sshd_config.d"),
            scratch: scratch.to_owned(),
        }
    }

    /// The drop-in's path.
    pub fn path(&self) -> PathBuf {
        self.folder.join(NAME)
    }

    /// What the drop-in says now; none if there is none.
    ///
    /// # Errors
    /// It can't be read, or is somebody else's.
    pub fn current(&self) -> Observed<Option<Vec<u8>>> {
        let path = self.path();
        let content = files::read(&path, MAX_FILE)
            .map_err(|error| format!("can't read {}: {error}", path.display()))?;
        match content {
            Some(content) if !is_ours(&content) => {
                Err(format!("{} is not portcullis' own: move it away", path.display()))
            }
            content => Ok(content),
        }
    }

    /// Makes it say `content`, durably; none: removes it.
    ///
    /// # Errors
    /// The file system's word, with what helps.
    pub fn put(&self, content: Option<&[u8]>) -> Observed<()> {
        let path = self.path();
        match content {
            Some(content) => files::replace(&path, content, 0o644),
            None => files::remove(&path),
        }
        .map_err(|error| {
            let fix = match error.kind() {
                io::ErrorKind::NotFound => ": create the folder, and include it in /etc/ssh/sshd_config",
                io::ErrorKind::ReadOnlyFilesystem => {
                    ": if /etc is writable, restart portcullis, whose sandbox opens the folder only if it is \
                     there when it starts"
                }
                _ => "",
            };
            format!("can't write {}: {error}{fix}", path.display())
        })
    }

    /// All that the other files say, as far as it can be read: with it another, a change that was refused
    /// may go through.
    pub fn others(&self) -> Vec<(PathBuf, Vec<u8>)> {
        let folder = fs::read_dir(&self.folder).into_iter().flatten().flatten();
        let mut paths: Vec<PathBuf> = folder
            .filter(|entry| {
                !entry.file_name().as_encoded_bytes().starts_with(b".") && entry.file_name() != NAME
            })
            .map(|entry| entry.path())
            .chain([self.main.clone()])
            .collect();
        paths.sort();
        let read = |path: PathBuf| {
            let content = files::read(&path, MAX_FILE).ok().flatten()?;
            Some((path, content))
        };
        paths.into_iter().filter_map(read).collect()
    }

    /// What sshd would do without the drop-in (outside of `Match` blocks): it is asked about a copy of its
    /// configuration that lacks it.
    ///
    /// # Errors
    /// The configuration is broken, or does not name the folder in a way that can be copied.
    pub async fn base(&self, sshd: &Sshd) -> Observed<SshdConfig> {
        if self.current()?.is_none() {
            return sshd.effective_config(None).await;
        }
        let copied = self
            .copy()
            .map_err(|error| format!("can't copy sshd's configuration: {error}"))
            .and_then(|copied| {
                copied.ok_or_else(|| {
                    format!(
                        "no Include of {} names {}",
                        self.main.display(),
                        self.folder.display()
                    )
                })
            });
        let asked = match copied {
            Ok(main) => sshd.clone().with_config(main).effective_config(None).await,
            Err(reason) => Err(reason),
        };
        // Nobody needs it any more; what is left is replaced the next time.
        let _ = fs::remove_dir_all(&self.scratch);
        asked
    }

    /// A copy of the configuration without our file; none if no `Include` names the folder.
    fn copy(&self) -> io::Result<Option<PathBuf>> {
        let main = files::read(&self.main, MAX_FILE)?.unwrap_or_default();
        let main = String::from_utf8(main).map_err(io::Error::other)?;
        let copy = self.scratch.join("sshd_config.d");
        let Some(main) = elsewhere(&main, &self.folder, &copy) else {
            return Ok(None);
        };
        match fs::remove_dir_all(&self.scratch) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&copy)?;
        for entry in fs::read_dir(&self.folder)? {
            let entry = entry?;
            if entry.file_name() != NAME {
                symlink(entry.path(), copy.join(entry.file_name()))?;
            }
        }
        let path = self.scratch.join("sshd_config");
        files::replace(&path, main.as_bytes(), 0o600)?;
        Ok(Some(path))
    }
}

/// sshd's main file with `folder` in its `Include` lines (absolute, or below /etc/ssh) replaced by `copy`;
/// none if there is no such line. Keywords are in any case (sshd_config(5)).
fn elsewhere(main: &str, folder: &Path, copy: &Path) -> Option<String> {
    let (folder, copy) = (folder.to_str()?, copy.to_str()?);
    let mut found = false;
    let lines = main.lines().map(|line| {
        let keyword = line
            .trim_start()
            .split(|c: char| c.is_whitespace() || c == '=')
            .next();
        if !keyword.is_some_and(|word| word.eq_ignore_ascii_case("include")) {
            return line.to_owned();
        }
        let absolute = line.replace(&format!("{folder}/"), &format!("{copy}/"));
        let line = match absolute == line {
            true => line.replace("sshd_config.d/", &format!("{copy}/")),
            false => absolute,
        };
        found |= line.contains(copy);
        line
    });
    let text = lines.collect::<Vec<_>>().join("\n") + "\n";
    found.then_some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_includes_lead_elsewhere() {
        let (folder, copy) = (
            Path::new("/etc/ssh/sshd_config.d"),
            Path::new("/run/x/sshd_config.d"),
        );
        let there = |text: &str| elsewhere(text, folder, copy);
        assert_eq!(
            there("# Include /etc/ssh/sshd_config.d/*.conf\nPort 22\n  include \"/etc/ssh/sshd_config.d/*.conf\"").unwrap(),
            "# Include /etc/ssh/sshd_config.d/*.conf\nPort 22\n  include \"/run/x/sshd_config.d/*.conf\"\n"
        );
        assert_eq!(
            there("Include=sshd_config.d/*.conf").unwrap(),
            "Include=/run/x/sshd_config.d/*.conf\n"
        );
        for none in [
            "",
            "Port 22",
            "#Include /etc/ssh/sshd_config.d/*",
            "Include /etc/ssh/other.d/*",
        ] {
            assert_eq!(there(none), None, "{none}");
        }
    }

    #[test]
    fn what_is_not_ours_is_never_touched() {
        let etc = tempfile::tempdir().unwrap();
        let scratch = etc.path().join("scratch");
        let drop_in = DropIn::new(etc.path(), &scratch);
        assert!(drop_in.put(Some(b"x")).unwrap_err().contains("create the folder"));
        fs::create_dir(etc.path().join("sshd_config.d")).unwrap();
        assert_eq!(drop_in.current(), Ok(None));
        drop_in.put(None).unwrap();
        fs::write(drop_in.path(), "PasswordAuthentication yes\n").unwrap();
        assert!(drop_in.current().unwrap_err().contains("move it away"));
        assert_eq!(drop_in.others(), []);
        let image = etc.path().join("sshd_config.d/01-image.conf");
        fs::write(&image, "x").unwrap();
        assert_eq!(drop_in.others(), [(image, b"x".to_vec())]);
    }
}

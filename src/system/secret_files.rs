//! Files with secrets that an owner puts on the instance: read only if nobody else can read them.
//!
//! May not live here: what is in them.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use portcullis_protocol::Secret;
use zeroize::Zeroizing;

use super::injected::credential_folders;
use crate::config::report::CREDENTIAL;

/// The credential that is the enrolment token, where the spec has none.
pub const ENROLMENT_TOKEN: &str = "portcullis.enrolment_token";
/// The credential that is the external id, where the spec has none.
pub const EXTERNAL_ID: &str = "portcullis.external_id";
/// The credential that is the TLS key, PKCS#8 in PEM, in the place of one that is made and kept on disk.
pub const TLS_KEY: &str = "portcullis.tls_key";

/// Largest file: a key with a chain of certificates has a few kilobytes.
const MAX_BYTES: u64 = 256 << 10;

/// The path of a setting: as it is, or for `credential:NAME` that of systemd's credential, the service's own
/// before the system's.
pub fn place(setting: &Path) -> PathBuf {
    match credential_name(setting) {
        Some(name) => place_in(&credential_folders(), name),
        None => setting.to_owned(),
    }
}

/// Whether a setting names a credential. Those of a unit never change while it runs.
pub fn is_credential(setting: &Path) -> bool {
    credential_name(setting).is_some()
}

fn credential_name(setting: &Path) -> Option<&str> {
    setting.to_str()?.strip_prefix(CREDENTIAL)
}

/// The first place where it is, or the first one where it could be.
fn place_in(folders: &[PathBuf], name: &str) -> PathBuf {
    let mut places = folders.iter().map(|folder| folder.join(name));
    let there = places.clone().find(|path| path.exists());
    there.or_else(|| places.next()).unwrap_or_default()
}

/// The secret in a credential of systemd, without white space around it; `None` if there is none of that name.
///
/// # Errors
/// As [`read_secret`], and when nothing is in it.
pub fn credential(name: &str) -> Result<Option<Secret>, String> {
    credential_in(&credential_folders(), name)
}

fn credential_in(folders: &[PathBuf], name: &str) -> Result<Option<Secret>, String> {
    let path = place_in(folders, name);
    if path
        .symlink_metadata()
        .is_err_and(|e| e.kind() == ErrorKind::NotFound)
    {
        return Ok(None);
    }
    let text = read_secret(&path)?;
    match text.trim() {
        "" => Err(format!("{}: is empty", path.display())),
        text => Ok(Some(Secret::new(text))),
    }
}

/// Reads a secret as text.
///
/// # Errors
/// When it can't be read, others can read or write it, or it is not root's; the text names the file.
pub fn read_secret(setting: &Path) -> Result<Zeroizing<String>, String> {
    read(setting, nix::unistd::geteuid().as_raw(), true)
}

/// Reads a file that is no secret (certificates) as text.
///
/// # Errors
/// When it can't be read; the text names the file.
pub fn read_public(setting: &Path) -> Result<String, String> {
    read(setting, 0, false).map(|text| text.as_str().to_owned())
}

fn read(setting: &Path, owner: u32, secret: bool) -> Result<Zeroizing<String>, String> {
    let path = place(setting);
    let named = |reason: &dyn std::fmt::Display| format!("{}: {reason}", path.display());
    // A named pipe must not hold up the daemon.
    let mut options = OpenOptions::new();
    options.read(true).custom_flags(nix::libc::O_NONBLOCK);
    let file = options.open(&path).map_err(|e| named(&e))?;
    let meta = file.metadata().map_err(|e| named(&e))?;
    if !meta.is_file() {
        return Err(named(&"is not a file"));
    }
    if secret && meta.mode() & 0o077 != 0 {
        let mode = meta.mode() & 0o7777;
        return Err(named(&format!(
            "others can get at this secret (mode {mode:04o}): chmod 600 it"
        )));
    }
    if secret && meta.uid() != owner {
        return Err(named(&format!(
            "belongs to user {}: it must be root's",
            meta.uid()
        )));
    }
    content(file).map_err(|e| named(&e))
}

fn content(file: File) -> std::io::Result<Zeroizing<String>> {
    // With its room from the start it is not moved, and no copy stays behind.
    let size = usize::try_from(file.metadata()?.len().min(MAX_BYTES)).unwrap_or_default();
    let mut text = Zeroizing::new(String::with_capacity(size + 64));
    file.take(MAX_BYTES + 1).read_to_string(&mut text)?;
    if text.len() as u64 > MAX_BYTES {
        return Err(std::io::Error::other(format!("larger than {MAX_BYTES} bytes")));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_secret_that_others_can_read_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        fs::write(&path, "hunter2\n").unwrap();
        let read_with = |mode| {
            fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
            read_secret(&path)
        };
        assert_eq!(read_with(0o600).unwrap().as_str(), "hunter2\n");
        assert_eq!(read_with(0o400).unwrap().as_str(), "hunter2\n");
        for mode in [0o644, 0o640, 0o604, 0o620] {
            let error = read_with(mode).unwrap_err();
            assert!(
                error.contains("chmod 600") && error.contains("token: "),
                "{error}"
            );
            assert!(!error.contains("hunter2"), "{error}");
        }
        assert_eq!(read_public(&path).unwrap(), "hunter2\n");
        fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        let error = read(&path, 4_000_000, true).unwrap_err();
        assert!(error.contains("must be root's"), "{error}");
    }

    #[test]
    fn what_is_no_file_or_too_large_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pipe");
        nix::unistd::mkfifo(
            &path,
            nix::sys::stat::Mode::S_IRUSR | nix::sys::stat::Mode::S_IWUSR,
        )
        .unwrap();
        assert!(read_secret(&path).unwrap_err().contains("is not a file"));
        assert!(read_secret(folder.path()).unwrap_err().contains("is not a file"));
        assert!(
            read_secret(&folder.path().join("none"))
                .unwrap_err()
                .contains("none: ")
        );
        let path = folder.path().join("large");
        fs::write(&path, vec![b'a'; MAX_BYTES as usize + 1]).unwrap();
        assert!(read_public(&path).unwrap_err().contains("larger than"));
    }

    #[test]
    fn a_credential_is_there_or_not_or_can_not_be_used() {
        let folder = tempfile::tempdir().unwrap();
        let folders = ["own", "system"].map(|name| folder.path().join(name));
        let put = |at: usize, text: &str, mode| {
            let path = folders[at].join("x");
            fs::write(&path, text).unwrap();
            fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
        };
        let read =
            || credential_in(&folders, "x").map(|secret| secret.map(|secret| secret.expose().to_owned()));
        assert_eq!(read(), Ok(None));
        for folder in &folders {
            fs::create_dir(folder).unwrap();
        }
        assert_eq!(read(), Ok(None));
        put(1, "of the system\n", 0o400);
        assert_eq!(read(), Ok(Some("of the system".to_owned())));
        put(0, " own ", 0o600);
        assert_eq!(read(), Ok(Some("own".to_owned())));
        // One that is there and can't be used is not passed over.
        for (text, mode, expected) in [(" \n", 0o600, "is empty"), ("s3cret", 0o644, "chmod 600")] {
            put(0, text, mode);
            let error = read().unwrap_err();
            assert!(
                error.contains(expected) && error.contains("own/x") && !error.contains("s3cret"),
                "{error}"
            );
        }
    }

    #[test]
    fn a_credential_has_its_place() {
        assert_eq!(place(Path::new("/etc/x")), Path::new("/etc/x"));
        assert_eq!(
            place(Path::new("credential:report.token")),
            Path::new("/run/credentials/portcullis.service/report.token")
        );
    }
}

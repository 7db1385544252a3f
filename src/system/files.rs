//! Files that root alone owns: replaced whole, and on disk when the call returns.
//!
//! May not live here: files in users' homes (`key_files`).

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;

/// Puts `bytes` in the place of the file, with mode `mode`: a reader, and a machine that loses power
/// at any moment, sees the old content or the new one, whole.
///
/// # Errors
/// As open(2), write(2), fsync(2) and rename(2); the old content then stands. Only if the very last step fails, the
/// folder's fsync(2), the new content is there, and power lost now may bring back the old one.
pub fn replace(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("/"));
    // Before anything is changed: it may be that no file can be opened.
    let open_folder = File::open(folder)?;
    // Hidden: a folder's reader that takes files by their name does not take this one.
    let mut name = OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(".new");
    let temporary = folder.join(name);
    let written = write_new(&temporary, bytes, mode).and_then(|()| fs::rename(&temporary, path));
    if written.is_err() {
        // A rest of a failed try would only be in the way of the next one.
        let _ = fs::remove_file(&temporary);
    }
    written?;
    open_folder.sync_all()
}

/// Opens a file that must be one. A named pipe would hold up the caller for ever, and a device has no end.
///
/// # Errors
/// As open(2), and when it is something else than a file.
pub fn open(path: &Path, options: &mut OpenOptions) -> io::Result<File> {
    let file = options.custom_flags(nix::libc::O_NONBLOCK).open(path)?;
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(io::Error::other("is not a file")),
    }
}

/// Removes a file, durably; one that is not there is no error.
///
/// # Errors
/// As unlink(2) and fsync(2).
pub fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
        Ok(()) => File::open(path.parent().unwrap_or(Path::new("/")))?.sync_all(),
    }
}

fn write_new(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(path)?;
    // Whatever the umask.
    file.set_permissions(Permissions::from_mode(mode))?;
    file.write_all(bytes)?;
    file.sync_all()
}

/// Reads a file, up to `limit` bytes; `None` if there is none.
///
/// # Errors
/// As open(2) and read(2), `FileTooLarge` over the limit, and when it is something else than a file.
pub fn read(path: &Path, limit: usize) -> io::Result<Option<Vec<u8>>> {
    use std::io::Read;
    let file = match open(path, OpenOptions::new().read(true)) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut bytes = Vec::new();
    file.take(limit as u64 + 1).read_to_end(&mut bytes)?;
    if bytes.len() > limit {
        return Err(io::Error::new(
            io::ErrorKind::FileTooLarge,
            format!("larger than {limit} bytes"),
        ));
    }
    Ok(Some(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_replaced_whole_with_its_mode() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("spec.json");
        assert_eq!(read(&path, 10).unwrap(), None);
        for text in ["one", "two"] {
            replace(&path, text.as_bytes(), 0o600).unwrap();
            assert_eq!(read(&path, 10).unwrap().unwrap(), text.as_bytes());
        }
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        assert!(read(&path, 2).is_err());
    }

    #[test]
    fn a_failed_try_leaves_the_old_content() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("spec.json");
        replace(&path, b"old", 0o600).unwrap();
        fs::create_dir(folder.path().join(".spec.json.new")).unwrap();
        assert!(replace(&path, b"new", 0o600).is_err());
        assert_eq!(fs::read(&path).unwrap(), b"old");
    }

    #[test]
    fn what_is_no_file_is_an_error_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let pipe = folder.path().join("pipe");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRUSR).unwrap();
        let device = folder.path().join("device");
        std::os::unix::fs::symlink("/dev/zero", &device).unwrap();
        for path in [pipe.as_path(), &device, folder.path()] {
            let error = read(path, 9).unwrap_err().to_string();
            assert_eq!(error, "is not a file", "{}", path.display());
        }
    }
}

//! A user's keys in the place that the settings name: a block in the home, or a file of root's outside of it.
//!
//! May not live here: how a home is written (`key_files`), where the file is (`policy::key_path`).

use std::collections::BTreeSet;
use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::Path;

use portcullis_protocol::{AuthorizedKey, PublicKey, UserName};
use rustix::io::Errno;

use super::accounts::Account;
use super::files;
use super::key_files::{self, KeyFileError, Outcome, ReadBack};
use crate::policy::key_path::{KeyPlace, SYSTEM_FOLDER, read_system_path, system_path};
use crate::policy::keys::{Expiry, merge};
use crate::policy::observation::{Observed, SshdConfig};

/// Largest file that is read, in bytes.
const MAX_FILE: usize = 1 << 20;

/// Where keys are put, and what is done about the other place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placing {
    /// Where they are.
    pub place: KeyPlace,
    /// With keys in root's file: whether our block leaves the home. Before sshd is known to read that file,
    /// the block stays, and only loses what is revoked.
    pub clear_home: bool,
}

impl Placing {
    /// For whoever only looks.
    pub fn seen(place: KeyPlace) -> Self {
        Self {
            place,
            clear_home: false,
        }
    }
}

/// As [`key_files::install`], in that place; and our keys leave the other one. Blocks.
///
/// # Errors
/// As there; and sshd does not read root's file, which is written all the same.
pub fn install(
    placing: Placing,
    account: &Account,
    config: &SshdConfig,
    keys: &[AuthorizedKey],
) -> Result<Outcome, KeyFileError> {
    if placing.place == KeyPlace::Home {
        let outcome = key_files::install(account, config, keys)?;
        // Not before they are in the home.
        remove_system(&account.name)?;
        return Ok(outcome);
    }
    let (changed, removed) = install_system(&account.name, keys, config)?;
    let path = read_system_path(
        &config.authorized_keys_files,
        &account.name,
        account.uid,
        &account.home,
    );
    leave_home(placing, account, config, keys);
    Ok(Outcome {
        path: path?,
        changed,
        removed,
    })
}

/// As [`key_files::read_back`], from that place. Blocks.
///
/// # Errors
/// sshd does not read that file, or would not trust it.
pub fn read_back(placing: Placing, account: &Account, config: &SshdConfig) -> Observed<ReadBack> {
    if placing.place == KeyPlace::Home {
        return key_files::read_back(account, config);
    }
    let files = &config.authorized_keys_files;
    let path =
        read_system_path(files, &account.name, account.uid, &account.home).map_err(|e| e.to_string())?;
    trusted(&path)?;
    let read = ReadBack::of_root(path.clone());
    read.map_err(|error| format!("can't read {}: {error}", path.display()))
}

/// Takes our keys out of the place for a user who left, and says which they were. Blocks.
///
/// # Errors
/// As [`key_files::remove_all`].
pub fn remove_all(
    placing: Placing,
    account: &Account,
    config: &SshdConfig,
) -> Result<Vec<PublicKey>, KeyFileError> {
    let mut removed = match placing.place {
        KeyPlace::Home => key_files::remove_all(account, config)?.removed,
        KeyPlace::System => Vec::new(),
    };
    removed.extend(remove_system(&account.name)?);
    Ok(removed)
}

/// Removes root's files of everybody else: the folder is ours alone.
///
/// # Errors
/// What could not be removed.
pub fn sweep(users: &BTreeSet<UserName>) -> io::Result<()> {
    let entries = match fs::read_dir(SYSTEM_FOLDER) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name();
        if !users.iter().any(|user| name == user.as_str()) {
            files::remove(&entry.path())?;
        }
    }
    Ok(())
}

/// Whether the file had to be written, and which keys it held that it does not hold now. It holds the keys
/// and nothing else.
fn install_system(
    user: &UserName,
    keys: &[AuthorizedKey],
    config: &SshdConfig,
) -> Result<(bool, Vec<PublicKey>), KeyFileError> {
    let path = system_path(user);
    if keys.is_empty() {
        return remove_system(user).map(|removed| (false, removed));
    }
    let content = merge(&[], keys, Expiry::understood_by(config.version));
    let failed = |doing| {
        let path = path.clone();
        move |source: io::Error| system(doing, &path, &source)
    };
    let old = files::read(&path, MAX_FILE).map_err(failed("read"))?;
    if old.as_deref() == Some(&content) && trusted(&path).is_ok() {
        return Ok((false, Vec::new()));
    }
    make_folder().map_err(failed("create the folder of"))?;
    // sshd reads it as its user.
    files::replace(&path, &content, 0o644).map_err(failed("write"))?;
    Ok((true, key_files::removed(&old.unwrap_or_default(), keys)))
}

fn make_folder() -> io::Result<()> {
    match DirBuilder::new().mode(0o755).create(SYSTEM_FOLDER) {
        // Whatever the umask.
        Ok(()) => fs::set_permissions(SYSTEM_FOLDER, Permissions::from_mode(0o755)),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(error),
    }
}

fn remove_system(user: &UserName) -> Result<Vec<PublicKey>, KeyFileError> {
    let path = system_path(user);
    let failed = |source: io::Error| system("remove", &path, &source);
    let Some(old) = files::read(&path, MAX_FILE).map_err(failed)? else {
        return Ok(Vec::new());
    };
    files::remove(&path).map_err(failed)?;
    Ok(key_files::removed(&old, &[]))
}

/// Our block in the home goes, or holds nothing that is not wanted any more. A home that can't be written is
/// why keys are elsewhere: that is no failure.
fn leave_home(placing: Placing, account: &Account, config: &SshdConfig, keys: &[AuthorizedKey]) {
    let left = match (placing.clear_home, key_files::read_back(account, config)) {
        (true, _) => key_files::remove_all(account, config),
        (false, Ok(read)) => {
            let kept: Vec<AuthorizedKey> = keys
                .iter()
                .filter(|key| read.keys.iter().any(|held| held.key.same_key(&key.key)))
                .cloned()
                .collect();
            key_files::install(account, config, &kept)
        }
        (false, Err(_)) => return,
    };
    if let Err(error) = left {
        tracing::debug!(user = account.name.as_str(), %error, "the home is left as it is");
    }
}

/// sshd's rule (sshd_config(5), `StrictModes`) for a file outside of homes, and that a user can reach it.
fn trusted(file: &Path) -> Observed<()> {
    for path in file.ancestors() {
        let data = match fs::symlink_metadata(path) {
            // Without a file there are no keys, and that is told elsewhere.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            data => data.map_err(|error| format!("can't examine {}: {error}", path.display()))?,
        };
        let place = path.display();
        let needed = if data.is_dir() { 0o001 } else { 0o004 };
        if !(data.is_dir() || path == file && data.is_file()) {
            return Err(format!(
                "{place} is a link or no file, so sshd's keys are not there: remove it"
            ));
        }
        if data.uid() != 0 {
            return Err(format!(
                "{place} belongs to uid {}, so sshd does not trust it: chown root {place}",
                data.uid()
            ));
        }
        if data.mode() & 0o022 != 0 {
            return Err(format!(
                "{place} is writable by others, so sshd does not trust it: chmod go-w {place}"
            ));
        }
        if data.mode() & needed == 0 {
            return Err(format!(
                "{place} is closed to users, as whom sshd reads it: chmod o+rX {place}"
            ));
        }
    }
    Ok(())
}

fn system(doing: &'static str, path: &Path, source: &io::Error) -> KeyFileError {
    KeyFileError::System {
        doing,
        path: path.to_owned(),
        source: Errno::from_io_error(source).unwrap_or(Errno::IO),
    }
}

//! What outlives the process: the accepted spec, and the users whose key files hold our lines.
//!
//! May not live here: deciding what is accepted (`super::Agent`).

use std::collections::BTreeSet;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use portcullis_protocol::control::Refusal;
use portcullis_protocol::spec::MAX_SPEC_BYTES;
use portcullis_protocol::{Spec, UserName};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tracing::warn;

use crate::log::id;
use crate::system::{clock, documents, files};

const SPEC_FILE: &str = "spec.json";
const TRIAL_FILE: &str = "trial.json";
const USERS_FILE: &str = "managed-users.json";
const REVOKED_FILE: &str = "revoked-keys.json";
const MAX_LIST_BYTES: usize = 1 << 20;

/// A spec that holds until its time is over, or for good once it is confirmed. The accepted spec stays
/// on disk beside it: after a reboot, that one holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Trial {
    /// The spec.
    pub spec: Arc<Spec>,
    /// When it began, as time since boot.
    pub began: Duration,
    /// Until when by the wall clock, for people.
    pub until: Timestamp,
    /// When it is over, as time since boot.
    ends: Duration,
    /// The boot that these times are of.
    boot: String,
}

impl Trial {
    /// One that begins now. If the boot can't be told from others, it does not survive the process.
    pub fn of(spec: Arc<Spec>, time: Duration) -> Self {
        let (began, now) = (clock::since_boot(), Timestamp::now());
        Self {
            spec,
            began,
            until: now.checked_add(time).unwrap_or(now),
            ends: began + time,
            boot: clock::this_boot().unwrap_or_default(),
        }
    }

    /// How long it goes on.
    pub fn remaining(&self) -> Duration {
        self.ends.saturating_sub(clock::since_boot())
    }

    fn is_of_this_boot(&self) -> bool {
        clock::this_boot().is_ok_and(|boot| boot == self.boot)
    }
}

/// State that can't be read or written.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The file system's word.
    #[error("{}: {error}{hint}", path.display(), hint = hint(error))]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// The file is there and is not what was written.
    #[error("{}: damaged: {reason}{way_out}", path.display(), way_out = way_out(path))]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

impl StateError {
    fn of(path: &Path, error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::InvalidData => Self::damaged(path, &error),
            _ => Self::Io {
                path: path.to_owned(),
                error,
            },
        }
    }

    fn damaged(path: &Path, reason: &dyn std::fmt::Display) -> Self {
        Self::Damaged {
            path: path.to_owned(),
            reason: reason.to_string(),
        }
    }

    /// It as a reason to refuse a change.
    pub fn refused(self) -> (Refusal, String) {
        let full = [io::ErrorKind::StorageFull, io::ErrorKind::QuotaExceeded];
        let kind = match &self {
            Self::Io { error, .. } if full.contains(&error.kind()) => Refusal::StorageFull,
            _ => Refusal::Failed,
        };
        (kind, self.to_string())
    }
}

fn way_out(path: &Path) -> &'static str {
    match path.file_name().and_then(|name| name.to_str()) {
        Some(SPEC_FILE | TRIAL_FILE) => {
            " (move it away; a spec is accepted again with `portcullis apply --spec FILE`)"
        }
        _ => "",
    }
}

fn hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            " (free some space; nothing was changed)"
        }
        io::ErrorKind::ReadOnlyFilesystem => " (mount it read-write; nothing was changed)",
        io::ErrorKind::PermissionDenied => " (run as root)",
        _ => "",
    }
}

/// The state folder.
#[derive(Clone, Debug)]
pub struct Store {
    folder: PathBuf,
}

impl Store {
    /// The store in a folder, which is made on the first write.
    pub fn new(folder: &Path) -> Self {
        Self {
            folder: folder.to_owned(),
        }
    }

    /// The folder, made if it is missing, for root alone.
    ///
    /// # Errors
    /// When it can't be made.
    pub fn folder(&self) -> Result<&Path, StateError> {
        let made = DirBuilder::new().recursive(true).mode(0o700).create(&self.folder);
        made.map_err(|error| StateError::Io {
            path: self.folder.clone(),
            error,
        })?;
        Ok(&self.folder)
    }

    /// The accepted spec; `None` before the first.
    ///
    /// # Errors
    /// When it is there and can't be read, or is damaged.
    pub fn spec(&self) -> Result<Option<Spec>, StateError> {
        let path = self.path(SPEC_FILE);
        let content = documents::read(&path, MAX_SPEC_BYTES).map_err(|error| StateError::of(&path, error))?;
        let spec = content.map(|content| Spec::from_json(&content)).transpose();
        spec.map_err(|error| StateError::damaged(&path, &error))
    }

    /// Makes this the accepted spec, durably.
    ///
    /// # Errors
    /// When it can't be written; the old one then stands, or is to be put back with [`Self::take_back`].
    pub fn save_spec(&self, spec: &Spec) -> Result<(), StateError> {
        let path = self.folder()?.join(SPEC_FILE);
        documents::replace(&path, &spec.to_json()).map_err(|error| StateError::of(&path, error))
    }

    /// Takes the accepted spec back to an older one, or to none.
    ///
    /// # Errors
    /// When it can't be written.
    pub fn restore_spec(&self, spec: Option<&Spec>) -> Result<(), StateError> {
        let path = self.folder.join(SPEC_FILE);
        match spec {
            Some(spec) => self.save_spec(spec),
            None => fs::remove_file(&path).map_err(|error| StateError::Io { path, error }),
        }
    }

    /// Takes a spec back that could not be saved: it may be in place, and only its durability failed.
    ///
    /// # Errors
    /// When it is there, and the old one can't be written.
    pub fn take_back(&self, new: &Spec, old: Option<&Spec>) -> Result<(), StateError> {
        match self.spec() {
            Ok(Some(found)) if found == *new => self.restore_spec(old),
            _ => Ok(()),
        }
    }

    /// The spec on trial, if there is one whose time is not over. The trial of an earlier boot is over, as
    /// is one of a spec that was accepted since.
    ///
    /// # Errors
    /// When it is there and can't be read, or is damaged.
    pub fn trial(&self, accepted: Option<&Spec>) -> Result<Option<Trial>, StateError> {
        let Some(trial) = self.load::<Trial>(TRIAL_FILE, MAX_SPEC_BYTES)? else {
            return Ok(None);
        };
        let checked = trial.spec.check();
        checked.map_err(|error| StateError::damaged(&self.path(TRIAL_FILE), &error))?;
        let is_newer = accepted.is_none_or(|accepted| trial.spec.generation > accepted.generation);
        let goes_on = is_newer && trial.is_of_this_boot() && !trial.remaining().is_zero();
        Ok(goes_on.then_some(trial))
    }

    /// Remembers a trial, durably.
    ///
    /// # Errors
    /// When it can't be written.
    pub fn save_trial(&self, trial: &Trial) -> Result<(), StateError> {
        self.save(TRIAL_FILE, trial)
    }

    /// Forgets the trial, if there is one.
    ///
    /// # Errors
    /// When its file can't be removed.
    pub fn forget_trial(&self) -> Result<(), StateError> {
        self.remove(TRIAL_FILE)
    }

    /// Users whose key files may hold lines of ours. An unreadable list is an empty one: then a
    /// user who left the spec meanwhile is not cleaned up, which `portcullis check` can't miss for
    /// those who stay.
    pub fn users(&self) -> BTreeSet<UserName> {
        let read = self.load(USERS_FILE, MAX_LIST_BYTES);
        let users = read.unwrap_or_else(|error| {
            warn!(MESSAGE_ID = id::DEGRADED, %error, "who had keys of ours before is not known: see `portcullis keys audit`");
            None
        });
        users.unwrap_or_default()
    }

    /// Remembers them, durably.
    ///
    /// # Errors
    /// When the list can't be written.
    pub fn save_users(&self, users: &BTreeSet<UserName>) -> Result<(), StateError> {
        self.save(USERS_FILE, users)
    }

    /// Fingerprints of keys that were revoked on the instance: of these, sources beside the spec bring
    /// none back.
    ///
    /// # Errors
    /// When the list is there and can't be read, or is damaged: then nobody knows what was revoked.
    pub fn revoked(&self) -> Result<BTreeSet<String>, StateError> {
        Ok(self.load(REVOKED_FILE, MAX_LIST_BYTES)?.unwrap_or_default())
    }

    /// Remembers them, durably.
    ///
    /// # Errors
    /// When the list can't be written.
    pub fn save_revoked(&self, revoked: &BTreeSet<String>) -> Result<(), StateError> {
        self.save(REVOKED_FILE, revoked)
    }

    /// The accepted spec's file.
    pub(super) fn spec_path(&self) -> PathBuf {
        self.folder.join(SPEC_FILE)
    }

    /// A file of the folder.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// What a document of the folder holds, of up to `limit` bytes; `None` if there is none.
    ///
    /// # Errors
    /// When it is there and can't be read, or is damaged.
    pub(super) fn load<T: DeserializeOwned>(
        &self,
        name: &str,
        limit: usize,
    ) -> Result<Option<T>, StateError> {
        let path = self.path(name);
        documents::load(&path, limit).map_err(|error| StateError::of(&path, error))
    }

    /// Keeps a document, durably.
    ///
    /// # Errors
    /// When it can't be written; then the old one stands.
    pub(super) fn save(&self, name: &str, value: &impl Serialize) -> Result<(), StateError> {
        let path = self.folder()?.join(name);
        documents::save(&path, value).map_err(|error| StateError::of(&path, error))
    }

    /// Removes a file of the folder, durably; one that is not there is no error.
    pub(super) fn remove(&self, name: &str) -> Result<(), StateError> {
        let path = self.folder.join(name);
        files::remove(&path).map_err(|error| StateError::Io { path, error })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_accepted_spec_reads_back_and_damage_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::new(&folder.path().join("state"));
        assert!(store.spec().unwrap().is_none());
        let spec = Spec::from_json(include_bytes!(
            "../../crates/portcullis-protocol/tests/spec-v1.json"
        ))
        .unwrap();
        store.save_spec(&spec).unwrap();
        assert_eq!(store.spec().unwrap(), Some(spec.clone()));
        store.restore_spec(None).unwrap();
        assert_eq!(store.spec().unwrap(), None);
        store.save_spec(&spec).unwrap();
        for damage in ["", "{", "{\"version\":9}"] {
            fs::write(folder.path().join("state/spec.json"), damage).unwrap();
            let error = store.spec().unwrap_err().to_string();
            assert!(error.contains("spec.json: damaged"), "{error}");
        }
    }

    #[test]
    fn what_could_not_be_saved_is_taken_back_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::new(folder.path());
        let bytes = include_bytes!("../../crates/portcullis-protocol/tests/spec-v1.json");
        let old = Spec::from_json(bytes).unwrap();
        let mut new = old.clone();
        new.generation = new.generation.next();
        for (on_disk, held, after) in [
            (&new, Some(&old), Some(&old)),
            (&new, None, None),
            (&old, Some(&old), Some(&old)),
        ] {
            store.save_spec(on_disk).unwrap();
            store.take_back(&new, held).unwrap();
            assert_eq!(store.spec().unwrap().as_ref(), after);
        }
    }

    #[test]
    fn revoked_keys_are_remembered_and_a_damaged_list_is_no_list() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::new(folder.path());
        assert_eq!(store.revoked().unwrap(), BTreeSet::new());
        let revoked: BTreeSet<String> = ["SHA256:x".to_owned()].into();
        store.save_revoked(&revoked).unwrap();
        assert_eq!(store.revoked().unwrap(), revoked);
        fs::write(folder.path().join(REVOKED_FILE), "[").unwrap();
        let error = store.revoked().unwrap_err().to_string();
        assert!(error.contains("revoked-keys.json: damaged"), "{error}");
    }

    #[test]
    fn a_full_disk_is_told_from_other_failures() {
        let refused = |kind: io::ErrorKind| {
            let (path, error) = (PathBuf::from("/x"), kind.into());
            StateError::Io { path, error }.refused().0
        };
        assert_eq!(refused(io::ErrorKind::StorageFull), Refusal::StorageFull);
        assert_eq!(refused(io::ErrorKind::QuotaExceeded), Refusal::StorageFull);
        assert_eq!(refused(io::ErrorKind::ReadOnlyFilesystem), Refusal::Failed);
    }

    #[test]
    fn users_are_remembered() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::new(folder.path());
        assert!(store.users().is_empty());
        let users: BTreeSet<UserName> = ["a".parse().unwrap(), "b".parse().unwrap()].into();
        store.save_users(&users).unwrap();
        assert_eq!(store.users(), users);
    }
}

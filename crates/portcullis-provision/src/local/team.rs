//! The external ids of a state directory's instances. All belong to one team, so new ones share one id;
//! those that were launched otherwise keep theirs.
//!
//! May not live here: what an instance makes of an id (the agent).

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use portcullis_protocol::Secret;

use super::instance::Record;
use super::launch::random_hex;
use crate::ca::write_private;
use crate::{Error, Result};

/// The team's external id, made on first use. Its maker holds the state directory's lock.
pub(super) fn external_id(state: &Path) -> Result<Secret> {
    if let Some(id) = read(state)? {
        return Ok(id);
    }
    let id = random_hex(16)?;
    write_private(&path(state), &id)?;
    Ok(Secret::new(id))
}

/// The external ids of all instances of a state directory, and of those to come, each once.
///
/// # Errors
/// When a record can't be read.
pub(crate) fn external_ids(state: &Path) -> Result<Vec<Secret>> {
    let mut ids: Vec<Secret> = read(state)?.into_iter().collect();
    for folder in folders(state)? {
        let record = match Record::read(&folder) {
            // Another program ended it meanwhile.
            Err(_) if !folder.exists() => continue,
            record => record?,
        };
        let control_plane = record.spec.control_plane;
        if let Some(id) = control_plane.and_then(|control| control.external_id)
            && !ids.contains(&id)
        {
            ids.push(id);
        }
    }
    Ok(ids)
}

/// The folders of instances; one without a record is just being made or removed.
pub(super) fn folders(state: &Path) -> Result<Vec<PathBuf>> {
    let folder = state.join("instances");
    let entries = match fs::read_dir(&folder) {
        Ok(entries) => entries,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(Error::file("read", &folder)(e)),
    };
    let folders = entries.flatten().map(|entry| entry.path());
    Ok(folders
        .filter(|folder| folder.join("instance.json").exists())
        .collect())
}

fn path(state: &Path) -> PathBuf {
    state.join("external-id")
}

fn read(state: &Path) -> Result<Option<Secret>> {
    let path = path(state);
    match fs::read_to_string(&path) {
        Ok(text) => Ok(Some(Secret::new(text.trim()))),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Error::file("read", &path)(e)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_team_has_one_id() {
        let state = tempfile::tempdir().unwrap();
        assert_eq!(external_ids(state.path()).unwrap(), []);
        let id = external_id(state.path()).unwrap();
        assert!(id.expose().len() == 32);
        assert_eq!(external_id(state.path()).unwrap(), id);
        assert_eq!(external_ids(state.path()).unwrap(), [id]);
    }
}

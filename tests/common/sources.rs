//! The repository's own Rust files, for tests of how it is written.
//!
//! May not live here: what is asked of them.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// All below a folder of the repository, by their path within it.
pub fn rust_files(folder: &str) -> BTreeMap<PathBuf, String> {
    fn walk(root: &Path, folder: &Path, found: &mut BTreeMap<PathBuf, String>) {
        for entry in fs::read_dir(root.join(folder)).unwrap() {
            let path = folder.join(entry.unwrap().file_name());
            if root.join(&path).is_dir() {
                walk(root, &path, found);
            } else if path.extension().is_some_and(|e| e == "rs") {
                found.insert(path.clone(), fs::read_to_string(root.join(path)).unwrap());
            }
        }
    }
    let mut found = BTreeMap::new();
    walk(
        Path::new(env!("CARGO_MANIFEST_DIR")),
        Path::new(folder),
        &mut found,
    );
    assert!(!found.is_empty(), "{folder} has no Rust files");
    found
}

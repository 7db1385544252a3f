//! The secrets of this instance, so that they can be taken out of what is gathered.
//!
//! May not live here: taking them out (`policy::redaction`).

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;
use zeroize::Zeroizing;

use crate::config::Settings;
use crate::config::report::Auth;
use crate::policy::key_sources::is_key_credential;
use crate::policy::redaction::Redactor;
use crate::system::files;
use crate::system::injected::credential_folders;
use crate::system::secret_files::place;

/// Largest file that is looked into for secrets.
const MAX_BYTES: usize = 4 << 20;
/// Specs in the state folder.
const SPECS: [&str; 2] = ["spec.json", "trial.json"];
/// The key of the HTTPS endpoint, in the state folder.
const TLS_KEY: &str = "tls.key";

/// All that are known. What can't be read is not in the bundle either: nothing else reads it.
pub fn known(settings: &Settings, settings_files: &[PathBuf]) -> Redactor {
    let mut redactor = Redactor::default();
    for text in settings_files.iter().filter_map(|file| read(file)) {
        redactor.add_settings(&text);
    }
    let specs = SPECS.map(|name| settings.state_dir.join(name));
    for spec in specs.iter().chain([&place(&settings.spec_file)]) {
        // By its names only: one that is refused has secrets too.
        let document = read(spec).and_then(|text| serde_json::from_str::<Value>(&text).ok());
        redactor.add_named(&document.unwrap_or_default());
    }
    add_file(&mut redactor, &settings.state_dir.join(TLS_KEY));
    for setting in named_by(&settings.report.auth) {
        add_file(&mut redactor, &place(&setting));
    }
    for folder in credential_folders() {
        let entries = fs::read_dir(folder).into_iter().flatten().flatten();
        let secret = entries.filter(|entry| !entry.file_name().to_str().is_some_and(is_key_credential));
        for entry in secret {
            add_file(&mut redactor, &entry.path());
        }
    }
    redactor
}

/// Files with secrets that the settings name.
fn named_by(auth: &Auth) -> Vec<PathBuf> {
    match auth {
        Auth::None | Auth::InstanceIdentity { .. } | Auth::Mtls { files: None } => Vec::new(),
        Auth::Mtls {
            files: Some((_, key)),
        } => vec![key.clone()],
        Auth::Bearer { token_file } => vec![token_file.clone()],
        Auth::ServiceAccount { key_file, .. } => vec![key_file.clone()],
    }
}

/// A token, a key in PEM, or the JSON of a service account, whose other fields are no secrets.
fn add_file(redactor: &mut Redactor, file: &Path) {
    let Some(text) = read(file) else { return };
    match serde_json::from_str::<Value>(&text) {
        Ok(document @ Value::Object(_)) => redactor.add_named(&document),
        // A certificate may be beside the key; it is not in any file of a bundle.
        _ => redactor.add(&text),
    }
}

fn read(file: &Path) -> Option<Zeroizing<String>> {
    let bytes = Zeroizing::new(files::read(file, MAX_BYTES).ok()??);
    Some(Zeroizing::new(String::from_utf8_lossy(&bytes).into_owned()))
}

//! `portcullis plan`: what a spec would change.

use std::path::Path;

use portcullis_protocol::Spec;
use serde_json::json;

use super::{Failure, Format, Global, print, print_json, read_spec, runtime};
use crate::agent::gate;
use crate::agent::logins::{self, Mode};
use crate::agent::sessions::RemovedKeys;
use crate::agent::state::Store;
use crate::policy::observation::{Gate, KeyState};
use crate::policy::ruleset::Ruleset;

pub fn run(global: &Global, path: &Path) -> Result<(), Failure> {
    let spec = read_spec(path)?;
    let settings = global.settings()?;
    let gate = gate::observe(&settings, Some(&spec));
    let store = Store::new(&settings.state_dir);
    let keys = runtime()?
        .block_on(logins::look(
            Some(&spec),
            &store,
            Mode::Observe,
            &RemovedKeys::default(),
        ))
        .keys;
    let held = gate.held.clone().ok().flatten().unwrap_or_default();
    let changes = held.diff(&gate.planned);
    match global.format {
        Format::Json => print_json(&json!({
            "generation": spec.generation,
            "warnings": spec.warnings().iter().map(ToString::to_string).collect::<Vec<_>>(),
            "ruleset": &*gate.planned,
            "nft": gate.planned.to_string(),
            "firewall_changes": changes,
            "keys": keys.iter().map(key_json).collect::<Vec<_>>(),
            "unreadable": gate.held.as_ref().err(),
        })),
        Format::Table => print(&text(&spec, &gate, &held, &changes, &keys)),
    }
}

fn key_json(key: &KeyState) -> serde_json::Value {
    json!({
        "user": key.user,
        "fingerprint": key.key.fingerprint(),
        "installed": key.installed.is_ok(),
        "file": key.installed.as_ref().ok(),
        "reason": key.installed.as_ref().err(),
    })
}

fn text(spec: &Spec, gate: &Gate, held: &Ruleset, changes: &[String], keys: &[KeyState]) -> String {
    let mut lines = vec![format!(
        "# The ruleset of generation {}, as nft(8) would read it",
        spec.generation
    )];
    lines.push(gate.planned.to_string());
    lines.push(String::new());
    let warnings = spec.warnings();
    if !warnings.is_empty() {
        lines.push("# Warnings".to_owned());
        lines.extend(warnings.iter().map(ToString::to_string));
        lines.push(String::new());
    }
    match &gate.held {
        Err(reason) => lines.push(format!("# What the kernel holds now can't be read: {reason}")),
        Ok(None) => lines.push("# The kernel holds no table yet: all of it is new.".to_owned()),
        Ok(Some(_)) if changes.is_empty() => {
            lines.push("# The kernel holds it already: no change.".to_owned())
        }
        Ok(Some(_)) => {
            let count = changes.len();
            lines.push(format!(
                "# {count} lines of the kernel's {} would change:",
                held.to_string().lines().count()
            ));
            lines.extend(changes.iter().cloned());
        }
    }
    lines.push(String::new());
    lines.push("# Keys".to_owned());
    for key in keys {
        let state = match &key.installed {
            Ok(file) => format!("in place in {}", file.display()),
            Err(reason) => format!("to be put in place ({reason})"),
        };
        lines.push(format!("{} {}: {state}", key.user, key.key.fingerprint()));
    }
    if keys.is_empty() {
        lines.push("none".to_owned());
    }
    lines.join("\n")
}

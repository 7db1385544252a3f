//! `portcullis plan`: what a spec would change.

use std::path::Path;

use portcullis_protocol::Spec;
use serde_json::json;

use super::{Failure, Format, Global, print, print_json, read_spec, runtime};
use crate::agent::gate;
use crate::agent::logins;
use crate::agent::state::Store;
use crate::policy::key_sources::Unfit;
use crate::policy::observation::{Gate, KeyState};
use crate::policy::ruleset::Ruleset;

pub fn run(global: &Global, path: &Path) -> Result<(), Failure> {
    let spec = read_spec(path)?;
    let settings = global.settings()?;
    let gate = gate::observe(&settings, Some(&spec));
    let store = Store::new(&settings.state_dir);
    let logins = logins::observe(Some(&spec), &store, &settings, settings.sshd.keys);
    let logins = runtime()?.block_on(logins);
    let (keys, unfit) = (logins.keys, logins.unfit);
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
            "keys_left_out": unfit.iter().map(unfit_json).collect::<Vec<_>>(),
            "unreadable": gate.held.as_ref().err(),
        })),
        Format::Table => {
            print(&[gate_text(&spec, &gate, &held, &changes), keys_text(&keys, &unfit)].join("\n"))
        }
    }
}

fn key_json(key: &KeyState) -> serde_json::Value {
    json!({
        "user": key.grant.key.user,
        "fingerprint": key.grant.key.key.fingerprint(),
        "source": key.grant.source.to_string(),
        "installed": key.installed.is_ok(),
        "file": key.installed.as_ref().ok(),
        "reason": key.installed.as_ref().err(),
    })
}

fn unfit_json(unfit: &Unfit) -> serde_json::Value {
    json!({
        "user": unfit.user,
        "key": unfit.what,
        "source": unfit.source.to_string(),
        "reason": unfit.reason,
    })
}

fn gate_text(spec: &Spec, gate: &Gate, held: &Ruleset, changes: &[String]) -> String {
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
    lines.join("\n")
}

fn keys_text(keys: &[KeyState], unfit: &[Unfit]) -> String {
    let mut lines = vec!["# Keys".to_owned()];
    for unfit in unfit {
        lines.push(format!(
            "{} from {} is left out: {}",
            unfit.what, unfit.source, unfit.reason
        ));
    }
    for key in keys {
        let state = match &key.installed {
            Ok(file) => format!("in place in {}", file.display()),
            Err(reason) => format!("to be put in place ({reason})"),
        };
        let (user, fingerprint) = (&key.grant.key.user, key.grant.key.key.fingerprint());
        lines.push(format!("{user} {fingerprint} from {}: {state}", key.grant.source));
    }
    if keys.is_empty() && unfit.is_empty() {
        lines.push("none".to_owned());
    }
    lines.join("\n")
}

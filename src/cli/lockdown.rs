//! `portcullis lockdown`: the gate, before the network.

use super::{Failure, Format, Global, print, print_json, require_root};
use crate::agent::gate;
use crate::log;

pub fn run(global: &Global) -> Result<(), Failure> {
    require_root("the lockdown")?;
    log::start(global.verbose, false);
    let state = gate::lockdown(global.config.as_deref()).map_err(Failure::Failed)?;
    match global.format {
        Format::Table => print(&state),
        Format::Json => print_json(&serde_json::json!({"enforced": true, "state": state})),
    }
}

//! Other programs' packet filters: read, and compared with what the gate lets in.
//!
//! May not live here: the comparison (`policy::conflicts`). It only looks: nothing here may be waited
//! for before the gate is in place.

use crate::policy::conflicts::{Comparison, find, uplinks};
use crate::policy::foreign::Foreign;
use crate::policy::links::LinkSettings;
use crate::policy::observation::Observed;
use crate::policy::ruleset::Ruleset;
use crate::system::{addresses, links, nftables, xtables};

/// Looks at everything, off the caller's thread.
pub async fn look(gate: &Ruleset, settings: &LinkSettings) -> Observed<Comparison> {
    let legacy = xtables::read().await;
    let (gate, settings) = (gate.clone(), settings.clone());
    tokio::task::spawn_blocking(move || compare(&gate, &settings, legacy))
        .await
        .map_err(|error| error.to_string())?
}

/// Reads the tables of nf_tables and compares them, and those of legacy iptables, with the gate.
///
/// # Errors
/// When tables, links or addresses can't be read.
pub fn compare(gate: &Ruleset, settings: &LinkSettings, legacy: Foreign) -> Observed<Comparison> {
    let mut foreign = nftables::foreign::read().map_err(|error| error.to_string())?;
    foreign.tables.extend(legacy.tables);
    foreign.unread.extend(legacy.unread);
    let links = links::read().map_err(|error| format!("links can't be read: {error}"))?;
    let addresses = addresses::read().map_err(|error| format!("addresses can't be read: {error}"))?;
    Ok(find(gate, &uplinks(&links, settings, &addresses), foreign))
}

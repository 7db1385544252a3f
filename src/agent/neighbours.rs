//! Other programs' packet filters: looked at when something changes, and compared with what the gate
//! lets in.
//!
//! A task of its own, beside the gate's thread and the daemon's loop: nobody waits for it.
//! May not live here: the comparison (`policy::conflicts`).

use std::future::pending;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::sleep;

use super::events::opened;
use crate::policy::conflicts::{Comparison, find, uplinks};
use crate::policy::foreign::Foreign;
use crate::policy::links::LinkSettings;
use crate::policy::observation::{Gate, Observed};
use crate::policy::ruleset::Ruleset;
use crate::system::nftables::foreign::{self, Changes};
use crate::system::{addresses, links, xtables};

/// How long after a change others of the same cause are waited for: a program loads its tables in
/// several transactions.
const SETTLE: Duration = Duration::from_millis(100);
/// Shortest time between two looks: somebody may change tables all the time.
const PAUSE: Duration = Duration::from_secs(1);

/// Starts looking, at once and whenever a table, a link or the gate changes. The receiver tells when
/// something else is seen.
pub fn watch(
    settings: LinkSettings,
    gate: watch::Receiver<Arc<Gate>>,
) -> watch::Receiver<Observed<Comparison>> {
    let (publish, seen) = watch::channel(Err("not looked at yet".to_owned()));
    tokio::spawn(keep_looking(settings, gate, publish));
    seen
}

async fn keep_looking(
    settings: LinkSettings,
    mut gate: watch::Receiver<Arc<Gate>>,
    publish: watch::Sender<Observed<Comparison>>,
) {
    // Subscribed before the first look: what changes during it is seen by the next.
    let tables = opened("changes of other programs' tables", Changes::open());
    let links = opened("changes of links", links::Events::open());
    loop {
        let planned = gate.borrow_and_update().planned.clone();
        let compared = look(&planned, &settings).await;
        publish.send_if_modified(|last| {
            let is_new = *last != compared;
            *last = compared;
            is_new
        });
        sleep(PAUSE).await;
        tokio::select! {
            () = happened(&tables, Changes::next) => {}
            () = happened(&links, links::Events::next) => {}
            changed = gate.changed() => if changed.is_err() {
                return;
            },
        }
        sleep(SETTLE).await;
    }
}

/// Waits for an event; a source that is not there, or broke, has none.
pub(super) async fn happened<T>(source: &Option<T>, next: impl AsyncFn(&T) -> io::Result<()>) {
    if let Some(source) = source
        && next(source).await.is_ok()
    {
        return;
    }
    pending().await
}

/// Looks at everything, off the caller's thread.
pub async fn look(gate: &Arc<Ruleset>, settings: &LinkSettings) -> Observed<Comparison> {
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
    let mut foreign = foreign::read().map_err(|error| error.to_string())?;
    foreign.tables.extend(legacy.tables);
    foreign.unread.extend(legacy.unread);
    let links = links::read().map_err(|error| format!("links can't be read: {error}"))?;
    let addresses = addresses::read().map_err(|error| format!("addresses can't be read: {error}"))?;
    Ok(find(gate, &uplinks(&links, settings, &addresses), foreign))
}

//! Encryption at rest: looked at once, and when mounts, swaps or block devices change.
//!
//! A task of its own, as for other programs' tables: nobody waits for it. May not live here: what is seen
//! (`system::storage`), what it proves (`policy::storage`).

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::sleep;

use super::events::opened;
use super::neighbours::happened;
use crate::policy::observation::Observed;
use crate::policy::storage::Storage;
use crate::system::storage::observe;
use crate::system::storage::watch::{Changes, Devices};

/// How long after a change others of the same cause are waited for: a volume is opened, then mounted.
const SETTLE: Duration = Duration::from_millis(200);
/// Shortest time between two looks: containers mount all the time, and users may.
const PAUSE: Duration = Duration::from_secs(2);

/// Starts looking. The receiver tells when something else is seen.
pub fn watch() -> watch::Receiver<Observed<Storage>> {
    let (publish, seen) = watch::channel(Err("not looked at yet".to_owned()));
    tokio::spawn(keep_looking(publish));
    seen
}

async fn keep_looking(publish: watch::Sender<Observed<Storage>>) {
    // Opened before the first look: what changes during it is seen by the next.
    let mounts = opened("changes of mounts", Changes::of_mounts());
    let swaps = opened("changes of swaps", Changes::of_swaps());
    let devices = opened("changes of block devices", Devices::open());
    while !publish.is_closed() {
        let storage = observe().await;
        publish.send_if_modified(|last| {
            let is_new = *last != storage;
            *last = storage;
            is_new
        });
        sleep(PAUSE).await;
        tokio::select! {
            () = happened(&mounts, Changes::next) => {}
            () = happened(&swaps, Changes::next) => {}
            () = happened(&devices, Devices::next) => {}
            () = publish.closed() => return,
        }
        sleep(SETTLE).await;
    }
}

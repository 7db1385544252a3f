//! What is known of the time outlasts the daemon: all of it until the next boot, and then that it is not earlier.
//!
//! May not live here: judging by it (`identity::time`), who proves a time.

use serde::{Deserialize, Serialize};
use tracing::warn;

use super::state::Store;
use crate::identity::time::{KnownTime, ProvenClock};
use crate::log::id;
use crate::system::clock;

const FILE: &str = "time.json";
const MAX_BYTES: usize = 4 << 10;

#[derive(Deserialize, Serialize)]
struct Kept {
    /// The boot that it is known in.
    boot: String,
    known: KnownTime,
    /// What time it was when this was written, in seconds since 1970.
    now: i64,
}

/// Lets a clock know what an earlier process knew.
pub(super) fn recall(store: &Store, clock: &ProvenClock) {
    match store.load::<Kept>(FILE, MAX_BYTES) {
        Ok(None) => {}
        Ok(Some(kept)) if clock::this_boot().is_ok_and(|boot| boot == kept.boot) => clock.know(kept.known),
        Ok(Some(kept)) => clock.not_before(kept.now),
        Err(error) => warn!(MESSAGE_ID = id::DEGRADED, %error, "what was known of the time is lost: {error}"),
    }
}

/// Keeps what a clock knows. If it can't be kept, it holds as long as this process.
pub(super) fn keep(store: &Store, clock: &ProvenClock) {
    let kept = Kept {
        boot: clock::this_boot().unwrap_or_default(),
        known: clock.what_is_known(),
        now: clock.now(),
    };
    if let Err(error) = store.save(FILE, &kept) {
        warn!(MESSAGE_ID = id::DEGRADED, %error, "what is known of the time is not kept");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::system::documents;

    const LATER: i64 = 4_000_000_000;

    #[test]
    fn a_proven_time_is_known_to_the_next_process_and_is_a_bound_for_the_next_boot() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::new(folder.path());
        let (first, second, third) = (
            ProvenClock::default(),
            ProvenClock::default(),
            ProvenClock::default(),
        );
        recall(&store, &first);
        assert!(first.now() < LATER);
        first.prove(LATER);
        keep(&store, &first);
        recall(&store, &second);
        assert_eq!(second.what_is_known(), first.what_is_known());

        let mut other: Kept = store.load(FILE, MAX_BYTES).unwrap().unwrap();
        other.boot = "another".to_owned();
        store.save(FILE, &other).unwrap();
        recall(&store, &third);
        assert!(third.now() >= LATER);
        assert_ne!(third.what_is_known(), first.what_is_known(), "it is not proven");
    }

    #[test]
    fn what_is_damaged_is_not_believed() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::new(folder.path());
        for damage in ["", "{", "{\"now\":99999999999}", "[]"] {
            std::fs::write(folder.path().join(FILE), documents::enclose(damage.as_bytes())).unwrap();
            let clock = ProvenClock::default();
            recall(&store, &clock);
            assert_eq!(clock.what_is_known(), KnownTime::default(), "{damage}");
        }
    }
}

//! What has to outlive the daemon so that sessions end with their keys: which keys let users in at the last
//! look, and which were taken away and not looked for yet. A daemon that is killed at any moment of a
//! revocation finds at its next start what is left to do.
//!
//! May not live here: ending sessions (`sessions`).

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use portcullis_protocol::{PublicKey, UserName};
use serde::{Deserialize, Serialize};
use tracing::warn;

use super::state::{StateError, Store};
use crate::log::id;
use crate::system::clock;
use crate::system::ssh_sessions::Revoked;

const FILE: &str = "session-keys.json";
/// A few hundred bytes for each key that a spec of the largest size could name.
const MAX_BYTES: usize = 64 << 20;

/// What is on disk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Kept {
    /// The boot that it is of: sessions end with it.
    boot: String,
    /// Users and fingerprints of the keys that let them in at the last look.
    current: BTreeSet<(UserName, String)>,
    /// Keys that were taken away, and whose sessions may live.
    pending: Vec<Revoked>,
}

/// Keys that were taken from users, and whose sessions nobody has looked for yet.
#[derive(Clone, Debug, Default)]
pub struct RemovedKeys(Arc<Mutex<Noted>>);

#[derive(Debug, Default)]
struct Noted {
    current: BTreeSet<(UserName, String)>,
    fresh: Vec<Revoked>,
    /// Looked for now.
    under_way: Vec<Revoked>,
    /// Where it is kept, and for which boot; without it, all is forgotten with the process.
    kept: Option<(Store, Kept)>,
}

impl RemovedKeys {
    /// What an earlier process of this boot left, and a place for what comes. If sessions are not to end
    /// with their keys (`wanted`), nothing is kept.
    pub fn load(store: &Store, wanted: bool) -> Self {
        let boot = clock::this_boot().unwrap_or_default();
        if !wanted || boot.is_empty() {
            if let Err(error) = store.forget_session_keys() {
                warn!(MESSAGE_ID = id::DEGRADED, %error, "keys of an earlier time are still remembered");
            }
            return Self::default();
        }
        let kept = store.session_keys().unwrap_or_else(|error| {
            warn!(MESSAGE_ID = id::DEGRADED, %error, "whose keys were taken away before is not known");
            None
        });
        let kept = kept.filter(|kept| kept.boot == boot).unwrap_or(Kept {
            boot,
            ..Kept::default()
        });
        Self(Arc::new(Mutex::new(Noted {
            current: kept.current.clone(),
            fresh: kept.pending.clone(),
            under_way: Vec::new(),
            kept: Some((store.clone(), kept)),
        })))
    }

    /// Notes that these keys of a user are gone from the user's file, now.
    pub fn add(&self, user: &UserName, keys: &[PublicKey]) {
        let fingerprints = keys.iter().map(PublicKey::fingerprint);
        self.lock().push(user, fingerprints);
    }

    /// Notes which keys let users in now, and keeps on disk what is left to do. Those that did at the last
    /// call and do not now are gone, too: what is in the files does not tell alone, for users may take a
    /// key out of theirs just before it is revoked, or keep it from being written.
    pub fn now_current(&self, current: BTreeSet<(UserName, String)>) {
        let mut noted = self.lock();
        let before = std::mem::replace(&mut noted.current, current);
        let gone: Vec<_> = before.difference(&noted.current).cloned().collect();
        for (user, fingerprint) in gone {
            noted.push(&user, [fingerprint]);
        }
        noted.keep();
    }

    /// The keys whose sessions are to be looked for. They stay on disk until [`Self::done`].
    pub fn take(&self) -> Vec<Revoked> {
        let mut noted = self.lock();
        let taken = std::mem::take(&mut noted.fresh);
        if noted.kept.is_some() {
            noted.under_way.extend(taken.iter().cloned());
        }
        taken
    }

    /// Forgets keys whose sessions were looked for.
    pub fn done(&self, revoked: &[Revoked]) {
        let mut noted = self.lock();
        noted.under_way.retain(|key| !revoked.contains(key));
        noted.keep();
    }

    fn lock(&self) -> MutexGuard<'_, Noted> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Noted {
    fn push(&mut self, user: &UserName, fingerprints: impl IntoIterator<Item = String>) {
        let at = clock::since_boot();
        let revoked = fingerprints.into_iter().map(|fingerprint| Revoked {
            user: user.clone(),
            fingerprint,
            at,
        });
        self.fresh.extend(revoked);
    }

    /// Writes what differs from what is on disk. That it can't is no reason to keep sessions alive.
    fn keep(&mut self) {
        let Some((store, kept)) = &mut self.kept else {
            return;
        };
        let now = Kept {
            boot: kept.boot.clone(),
            current: self.current.clone(),
            pending: self.under_way.iter().chain(&self.fresh).cloned().collect(),
        };
        if now == *kept {
            return;
        }
        match store.save_session_keys(&now) {
            Ok(()) => *kept = now,
            Err(error) => {
                warn!(MESSAGE_ID = id::DEGRADED, %error, "sessions of revoked keys live on if the daemon is killed now");
            }
        }
    }
}

impl Store {
    fn session_keys(&self) -> Result<Option<Kept>, StateError> {
        self.load(FILE, MAX_BYTES)
    }

    fn save_session_keys(&self, kept: &Kept) -> Result<(), StateError> {
        self.save(FILE, kept)
    }

    fn forget_session_keys(&self) -> Result<(), StateError> {
        self.remove(FILE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(fingerprints: &[&str]) -> BTreeSet<(UserName, String)> {
        let key = |fingerprint: &&str| ("ubuntu".parse().unwrap(), (*fingerprint).to_owned());
        fingerprints.iter().map(key).collect()
    }

    fn names(revoked: &[Revoked]) -> Vec<&str> {
        revoked.iter().map(|key| key.fingerprint.as_str()).collect()
    }

    fn store() -> (tempfile::TempDir, Store) {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::new(folder.path());
        (folder, store)
    }

    #[test]
    fn whatever_the_moment_of_its_end_the_next_process_knows_what_is_left() {
        let (_folder, store) = store();
        let first = RemovedKeys::load(&store, true);
        first.now_current(set(&["a", "b"]));
        assert_eq!(names(&first.take()), [""; 0]);
        // It ended after the new spec was on disk, and before it looked at the keys.
        let second = RemovedKeys::load(&store, true);
        second.now_current(set(&["b"]));
        // Before it looked for sessions.
        let third = RemovedKeys::load(&store, true);
        third.now_current(set(&["b"]));
        let at = third.lock().fresh[0].at;
        assert_eq!(names(&third.take()), ["a"]);
        // While it looked, and another key was taken away.
        third.now_current(set(&[]));
        let fourth = RemovedKeys::load(&store, true);
        let taken = fourth.take();
        assert_eq!((names(&taken), taken[0].at), (vec!["a", "b"], at));
        // After the first was done.
        fourth.done(&taken[..1]);
        let fifth = RemovedKeys::load(&store, true);
        let taken = fifth.take();
        assert_eq!(names(&taken), ["b"]);
        fifth.done(&taken);
        assert_eq!(names(&RemovedKeys::load(&store, true).take()), [""; 0]);
    }

    #[test]
    fn another_boot_has_no_sessions_of_this_one() {
        let (_folder, store) = store();
        let removed = RemovedKeys::load(&store, true);
        removed.now_current(set(&["a", "b"]));
        removed.now_current(set(&["b"]));
        let mut kept = store.session_keys().unwrap().unwrap();
        assert_eq!(names(&kept.pending), ["a"]);
        kept.boot = "another".to_owned();
        store.save_session_keys(&kept).unwrap();
        let next = RemovedKeys::load(&store, true);
        next.now_current(set(&[]));
        assert_eq!(names(&next.take()), [""; 0]);
    }

    #[test]
    fn without_the_setting_nothing_is_kept_and_damage_is_nothing() {
        let (folder, store) = store();
        RemovedKeys::load(&store, true).now_current(set(&["a"]));
        assert!(store.session_keys().unwrap().is_some());
        let unwanted = RemovedKeys::load(&store, false);
        unwanted.now_current(set(&["a"]));
        unwanted.now_current(set(&[]));
        assert_eq!(store.session_keys().unwrap(), None);
        std::fs::write(folder.path().join(FILE), "{").unwrap();
        assert!(store.session_keys().unwrap_err().to_string().contains(FILE));
        let next = RemovedKeys::load(&store, true);
        next.now_current(set(&["a"]));
        assert_eq!(names(&next.take()), [""; 0]);
    }
}

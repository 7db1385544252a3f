//! What was accepted stays on disk: a state folder that is taken away, emptied or covered while the daemon runs
//! gets back what the daemon holds, and the report tells of it.
//!
//! May not live here: how a file is written (`state`), what is accepted (`accept`).

use std::fs;
use std::os::unix::fs::MetadataExt;

use portcullis_protocol::Spec;
use tracing::{error, warn};

use super::Agent;
use super::state::Store;
use crate::log::id;

/// What tells a file from another one in its place (stat(2)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    device: u64,
    inode: u64,
    bytes: u64,
    modified: [i64; 2],
}

impl Store {
    /// The accepted spec's file, as it is now; none if there is none, or it can't be looked at.
    pub(super) fn stamp(&self) -> Option<Stamp> {
        let file = fs::symlink_metadata(self.spec_path()).ok()?;
        Some(Stamp {
            device: file.dev(),
            inode: file.ino(),
            bytes: file.size(),
            modified: [file.mtime(), file.mtime_nsec()],
        })
    }
}

impl Agent {
    /// Whether the accepted spec's file is the one that was last seen to hold it. One stat(2).
    fn is_durable(&self) -> bool {
        self.accepted().is_none() || self.kept.is_some() && self.kept == self.store.stamp()
    }

    /// Sees to it that the disk holds what was accepted. Our own writes are looked at here as well, once.
    pub(super) fn keep_durable(&mut self) {
        if self.is_durable() {
            return;
        }
        let Some(accepted) = self.accepted().cloned() else {
            return;
        };
        let on_disk = self.store.spec().ok().flatten();
        if on_disk.is_some_and(|on_disk| self.tokens.stripped(on_disk) == accepted) {
            self.kept = self.store.stamp();
            if self.seen.durable.is_err() {
                self.seen.durable = Ok(self.restored);
            }
            return;
        }
        match self.write_anew(&accepted) {
            Ok(()) => {
                self.kept = self.store.stamp();
                self.restored += 1;
                self.seen.durable = Ok(self.restored);
                warn!(
                    MESSAGE_ID = id::STATE_RESTORED,
                    GENERATION = accepted.generation.get(),
                    "{} did not hold the accepted spec any more: what the daemon holds is written anew",
                    self.store.spec_path().display()
                );
                let holds = self.spec.clone();
                let reason = "the state on disk was not what holds: it is written anew".to_owned();
                self.record_own("restore-state", holds.as_ref(), Some(reason));
            }
            Err(reason) => {
                if self.seen.durable.as_ref() != Err(&reason) {
                    error!(
                        MESSAGE_ID = id::STATE_LOST,
                        REASON = reason,
                        "the disk does not hold what was accepted, and can't be given it: {reason}"
                    );
                }
                self.seen.durable = Err(reason);
                // The file that was there may come back as it was.
                self.kept = None;
            }
        }
    }

    /// Looks whether the disk holds what was accepted, when nothing else is a reason to. Nobody tells when a folder
    /// is covered by a mount.
    pub fn look_at_state(&mut self) {
        if !self.is_durable() {
            self.publish();
        }
    }

    /// The spec that the disk has to hold.
    fn accepted(&self) -> Option<&Spec> {
        match &self.trial {
            Some(_) => self.before_trial.as_deref(),
            None => self.spec.as_deref(),
        }
    }

    /// Writes what is in memory and not on disk: the spec, what must not come back, and what callers pinned.
    fn write_anew(&self, accepted: &Spec) -> Result<(), String> {
        self.store.save_spec(accepted).map_err(|e| e.to_string())?;
        let trial = self.trial.as_ref().map(|trial| self.store.save_trial(trial));
        let written = [
            trial.unwrap_or(Ok(())),
            self.tokens.keep(&self.store),
            self.keep_revocations(),
            self.keep_host_keys(),
        ];
        for result in written {
            result.map_err(|e| e.to_string())?;
        }
        if self.identity_lost.is_some() {
            return Ok(());
        }
        self.identity
            .keep(&self.settings.state_dir)
            .map_err(|e| e.to_string())
    }
}

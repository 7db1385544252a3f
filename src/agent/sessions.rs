//! SSH sessions end with the key that opened them, if the setting `keys.end_sessions` says so.
//!
//! May not live here: how sessions are found and ended (`system::ssh_sessions`).

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use portcullis_protocol::{PublicKey, UserName};
use tokio::time::sleep;
use tracing::{error, info};

use super::Agent;
use crate::log::id;
use crate::system::clock;
use crate::system::ssh_sessions::{self, Found, Revoked, Session};

/// Who revokes a key may sit in a session that it opened, and is to read the answer first.
const ANSWER_TIME: Duration = Duration::from_millis(300);

/// Whom sshd let in just before the key was gone may be in its log only now.
const SECOND_LOOK: Duration = Duration::from_millis(1200);

/// Keys that were taken from users and whose sessions nobody has looked for yet.
#[derive(Clone, Debug, Default)]
pub struct RemovedKeys(Arc<Mutex<Vec<Revoked>>>);

impl RemovedKeys {
    /// Notes that these keys of a user are gone from the user's file, now.
    pub fn add(&self, user: &UserName, keys: &[PublicKey]) {
        self.push(user, keys.iter().map(PublicKey::fingerprint));
    }

    fn push(&self, user: &UserName, fingerprints: impl IntoIterator<Item = String>) {
        let at = clock::since_boot();
        let revoked = fingerprints.into_iter().map(|fingerprint| Revoked {
            user: user.clone(),
            fingerprint,
            at,
        });
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .extend(revoked);
    }

    fn take(&self) -> Vec<Revoked> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Agent {
    /// Notes keys that let users in at the last call and do not now. What is in the files does not tell
    /// alone: users may take a key out of theirs just before it is revoked, or keep it from being written.
    pub(super) fn note_revoked_keys(&mut self) {
        if self.spec.is_none() {
            return;
        }
        let keys = self.seen.keys.iter().map(|state| &state.grant.key);
        let current = keys
            .map(|key| (key.user.clone(), key.key.fingerprint()))
            .collect();
        let before = std::mem::replace(&mut self.current_keys, current);
        for (user, fingerprint) in before.difference(&self.current_keys) {
            self.removed_keys.push(user, [fingerprint.clone()]);
        }
    }

    /// Ends the sessions of keys that are gone, in the background. To be called when an answer has been
    /// given.
    pub fn end_sessions(&self) {
        let revoked = self.removed_keys.take();
        if self.settings.end_sessions && !revoked.is_empty() {
            tokio::spawn(async move { end(&revoked).await });
        }
    }
}

async fn end(revoked: &[Revoked]) {
    sleep(ANSWER_TIME).await;
    // What can't be told yet may be in the log at the second look.
    if let Ok(found) = ssh_sessions::find(revoked).await {
        end_all(found.sessions).await;
    }
    sleep(SECOND_LOOK).await;
    match ssh_sessions::find(revoked).await {
        Ok(Found { sessions, unknown }) => {
            end_all(sessions).await;
            for reason in unknown {
                error!(MESSAGE_ID = id::SSH_SESSION_LEFT, "{reason}");
            }
        }
        Err(reason) => {
            let users: BTreeSet<&str> = revoked.iter().map(|key| key.user.as_str()).collect();
            let users = Vec::from_iter(users).join(", ");
            error!(
                MESSAGE_ID = id::SSH_SESSION_LEFT,
                USERS = users,
                REASON = reason,
                "SSH sessions that keys opened which {users} had can't be found, so they go on: {reason}"
            );
        }
    }
}

/// All at once: one that does not want to end does not keep the others alive.
async fn end_all(sessions: Vec<Session>) {
    let mut tasks = tokio::task::JoinSet::new();
    for session in sessions {
        tasks.spawn(async move {
            let ended = ssh_sessions::end(&session).await;
            tell(&session, ended);
        });
    }
    while tasks.join_next().await.is_some() {}
}

fn tell(session: &Session, ended: Result<(), String>) {
    let (user, fingerprint) = (session.user.as_str(), session.fingerprint.as_str());
    let from = match session.from {
        Some(address) => address.to_string(),
        None => "this host".to_owned(),
    };
    let login = session.login.as_ref().map_or("", |login| &login.id);
    let open = clock::since_boot().saturating_sub(session.since).as_secs();
    match ended {
        Ok(()) => info!(
            MESSAGE_ID = id::SSH_SESSION_ENDED,
            USER = user,
            FINGERPRINT = fingerprint,
            REMOTE = from,
            SESSION = login,
            OPEN_SECONDS = open,
            "the SSH session of {user} from {from}, open for {open} s, was ended with its key {fingerprint}"
        ),
        Err(reason) => error!(
            MESSAGE_ID = id::SSH_SESSION_LEFT,
            USER = user,
            FINGERPRINT = fingerprint,
            REMOTE = from,
            SESSION = login,
            PROCESS = session.pid,
            REASON = reason,
            "the SSH session of {user} from {from} could not be ended with its key {fingerprint}: {reason}"
        ),
    }
}

//! SSH sessions end with the key that opened them, if the setting `keys.end_sessions` says so.
//!
//! May not live here: how sessions are found and ended (`system::ssh_sessions`), what is known of
//! keys (`session_keys`).

use std::collections::BTreeSet;
use std::time::Duration;

use tokio::time::sleep;
use tracing::{error, info};

use super::Agent;
use super::session_keys::RemovedKeys;
use crate::log::id;
use crate::system::clock;
use crate::system::ssh_sessions::{self, Found, Revoked, Session};

/// Who revokes a key may sit in a session that it opened, and is to read the answer first.
const ANSWER_TIME: Duration = Duration::from_millis(300);

/// Whom sshd let in just before the key was gone may be in its log only now.
const SECOND_LOOK: Duration = Duration::from_millis(1200);

impl Agent {
    /// Notes which keys let users in, and which no longer do; on disk when this returns.
    pub(super) fn note_revoked_keys(&mut self) {
        if self.spec.is_none() {
            return;
        }
        let keys = self.seen.keys.iter().map(|state| &state.grant.key);
        let current = keys.map(|key| (key.user.clone(), key.key.fingerprint()));
        self.removed_keys.now_current(current.collect());
    }

    /// Ends the sessions of keys that are gone, in the background. To be called when an answer has been
    /// given.
    pub fn end_sessions(&self) {
        let revoked = self.removed_keys.take();
        if self.settings.end_sessions && !revoked.is_empty() {
            let removed = self.removed_keys.clone();
            tokio::spawn(async move { end(&revoked, &removed).await });
        }
    }
}

async fn end(revoked: &[Revoked], removed: &RemovedKeys) {
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
            removed.done(revoked);
        }
        // The next start tries again.
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

//! The host keys that are this instance's own: kept on disk, remembered when first seen, and taken anew
//! when an operator says so.
//!
//! May not live here: comparing them (`policy::host_keys`), making or changing them (nobody here does).

use jiff::Timestamp;
use portcullis_protocol::control::{Answer, Refusal};
use tracing::{info, warn};

use super::control::{Caller, refused};
use super::state::{StateError, Store};
use super::{Agent, Scope};
use crate::log::id;
use crate::policy::host_keys::{Change, Comparison, KnownHostKeys, compare, first_seen, trusted};
use crate::policy::observation::Observed;

const FILE: &str = "host-keys.json";
const MAX_BYTES: usize = 1 << 16;

impl Store {
    /// The host keys that are known; none before the first were seen. A file that can't be read is an
    /// error, never none: then whatever is there now would be taken for what was first seen.
    ///
    /// # Errors
    /// Why it can't be read, and what to do.
    pub fn host_keys(&self) -> Observed<Option<KnownHostKeys>> {
        let reason = match self.load::<KnownHostKeys>(FILE, MAX_BYTES) {
            Ok(Some(known)) if known.keys.is_empty() => "there is no key in it".to_owned(),
            Ok(known) => return Ok(known),
            Err(StateError::Damaged { reason, .. }) => reason,
            Err(error) => return Err(error.to_string()),
        };
        Err(format!(
            "{}: damaged: {reason} (compare the host keys with what you know of them, then `portcullis keys \
             trust-host-keys`)",
            self.path(FILE).display()
        ))
    }

    /// Remembers them, durably.
    ///
    /// # Errors
    /// When they can't be written; then what was known stands.
    pub fn save_host_keys(&self, known: &KnownHostKeys) -> Result<(), StateError> {
        self.save(FILE, known)
    }
}

impl Agent {
    /// Remembers the host keys that were just seen if none are known for this instance, and tells the
    /// journal when they change.
    pub(super) fn look_at_host_keys(&mut self) {
        let instance = self.spec.as_deref().map(|spec| spec.instance.id.to_string());
        // A spec on trial may name an instance that nobody confirms.
        if let (Some(instance), None) = (&instance, &self.trial)
            && let Some(keys) = first_seen(instance, &self.seen.host_keys, &self.seen.sshd, Timestamp::now())
        {
            self.seen.host_keys = match self.store.save_host_keys(&keys) {
                Ok(()) => {
                    let keys_text = texts(&keys);
                    info!(
                        MESSAGE_ID = id::HOST_KEYS_REMEMBERED,
                        INSTANCE = instance,
                        KEYS = keys_text,
                        "the host keys of {instance} are remembered: {keys_text}"
                    );
                    let holds = self.spec.clone();
                    self.record_own("remember-host-keys", holds.as_ref(), Some(keys_text));
                    Ok(Some(keys))
                }
                Err(error) => {
                    warn!(MESSAGE_ID = id::DEGRADED, %error, "the host keys can't be remembered");
                    Ok(None)
                }
            };
        }
        let alert = match compare(instance.as_deref(), &self.seen.host_keys, &self.seen.sshd) {
            Comparison::Changed(change) => Some(change),
            // Not being able to look is no end of it.
            Comparison::Unknown(_) => return,
            Comparison::Same | Comparison::NotYet(_) => None,
        };
        if alert != self.host_key_alert {
            if let Some(change) = &alert {
                log_change(change);
            }
            self.host_key_alert = alert;
        }
    }

    /// Writes the host keys that are known.
    pub(super) fn keep_host_keys(&self) -> Result<(), StateError> {
        match &self.seen.host_keys {
            Ok(Some(keys)) => self.store.save_host_keys(keys),
            _ => Ok(()),
        }
    }

    /// Takes the host keys as they are now for this instance's own: whoever asks changed them.
    pub(super) async fn trust_host_keys(&mut self, caller: &Caller) -> Answer {
        self.reconcile(&[Scope::Logins].into()).await;
        let Some(instance) = self.spec.as_deref().map(|spec| spec.instance.id.to_string()) else {
            let reason = "no spec is accepted yet: host keys are remembered for the instance that it names";
            return refused(Refusal::Failed, reason);
        };
        let before = self.seen.host_keys.clone().ok().flatten();
        let keys = match trusted(&instance, before.as_ref(), &self.seen.sshd, Timestamp::now()) {
            Ok(keys) => keys,
            Err(reason) => return refused(Refusal::Failed, reason),
        };
        let changed = before.as_ref() != Some(&keys);
        if changed {
            if let Err(error) = self.store.save_host_keys(&keys) {
                return refused(Refusal::Failed, error.to_string());
            }
            log_trust(&instance, before.as_ref(), &keys, caller);
            self.seen.host_keys = Ok(Some(keys));
            self.host_key_alert = None;
            self.publish();
        }
        Answer::HostKeys {
            changed,
            host_keys: self.seen.sshd.host_keys.clone(),
        }
    }
}

fn texts(keys: &KnownHostKeys) -> String {
    let all = keys
        .keys
        .iter()
        .map(|key| format!("{} {}", key.algorithm, key.fingerprint));
    all.collect::<Vec<_>>().join(", ")
}

fn log_change(change: &Change) {
    let (old, new) = (change.old.join(", "), change.new.join(", "));
    let stray = change.stray.as_deref().unwrap_or_default();
    warn!(
        MESSAGE_ID = id::HOST_KEYS_CHANGED,
        OLD = old,
        NEW = new,
        NOT_ON_DISK = stray,
        "the host keys are not those that were first seen: gone {old:?}, new {new:?}, shown and not on disk \
         {stray:?}"
    );
}

fn log_trust(instance: &str, before: Option<&KnownHostKeys>, now: &KnownHostKeys, caller: &Caller) {
    let (old, new) = (before.map(texts).unwrap_or_default(), texts(now));
    let process = match caller {
        Caller::Local(process) => *process,
        Caller::Remote(_) => None,
    };
    warn!(
        MESSAGE_ID = id::HOST_KEYS_TRUSTED,
        INSTANCE = instance,
        OLD = old,
        NEW = new,
        CALLER_PID = process,
        "the host keys of {instance} are trusted anew: {new}; before {old:?}"
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn they_read_back_and_damage_is_no_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::new(&folder.path().join("state"));
        assert_eq!(store.host_keys(), Ok(None));
        let text =
            r#"{"instance":"i","keys":[{"type":"t","fingerprint":"f","first_seen":"2026-11-24T00:00:00Z"}]}"#;
        let known: KnownHostKeys = serde_json::from_str(text).unwrap();
        store.save_host_keys(&known).unwrap();
        assert_eq!(store.host_keys(), Ok(Some(known)));
        let path = folder.path().join("state").join(FILE);
        for damage in ["", "{", "{}", r#"{"instance":"i","keys":[]}"#] {
            fs::write(&path, damage).unwrap();
            let error = store.host_keys().unwrap_err();
            assert!(
                error.contains("host-keys.json: damaged") && error.contains("trust-host-keys"),
                "{error}"
            );
        }
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        assert!(store.host_keys().is_err());
    }
}

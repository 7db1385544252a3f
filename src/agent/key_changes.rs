//! Keys that are added and revoked on the instance.
//!
//! May not live here: which keys hold (`policy::key_sources`), putting them in place (`logins`).

use jiff::Timestamp;
use portcullis_protocol::control::Refusal;
use portcullis_protocol::{AuthorizedKey, Spec};
use tracing::info;

use super::accept::{Refused, Terms};
use super::state::StateError;
use super::{Agent, Scope};
use crate::log::id;

impl Agent {
    /// Adds a key to the spec. A key that was revoked here is named on purpose now.
    pub(super) async fn add_key(&mut self, key: AuthorizedKey, terms: Terms) -> Result<bool, Refused> {
        if key.expires.is_some_and(|end| end <= Timestamp::now()) {
            return Err((Refusal::BadInput, "expires: that time is over".to_owned()));
        }
        let fingerprint = key.key.fingerprint();
        let changed = self
            .change_spec(terms.source("keys add"), |spec| add(spec, key), terms)
            .await?;
        let mut revoked = self.store.revoked().map_err(StateError::refused)?;
        if revoked.remove(&fingerprint) {
            self.store.save_revoked(&revoked).map_err(StateError::refused)?;
        }
        Ok(changed)
    }

    /// Takes a key out of the spec, and remembers that no other source may bring it back.
    pub(super) async fn revoke_key(&mut self, fingerprint: &str, terms: Terms) -> Result<bool, Refused> {
        let fingerprint = match fingerprint.starts_with("SHA256:") {
            true => fingerprint.to_owned(),
            false => format!("SHA256:{fingerprint}"),
        };
        let named = self.spec.as_ref().is_some_and(|spec| {
            spec.authorized_keys
                .iter()
                .any(|k| k.key.fingerprint() == fingerprint)
        });
        let held = self
            .seen
            .keys
            .iter()
            .any(|k| k.grant.key.key.fingerprint() == fingerprint);
        self.check_generation(terms)?;
        if !named && !held {
            return Err(self.unknown_key(&fingerprint));
        }
        let before = self.store.revoked().map_err(StateError::refused)?;
        let mut revoked = before.clone();
        // First: a crash in between must not leave another source to bring it back.
        if revoked.insert(fingerprint.clone()) {
            self.store.save_revoked(&revoked).map_err(StateError::refused)?;
        }
        if !named {
            info!(
                MESSAGE_ID = id::SPEC_ACCEPTED,
                FINGERPRINT = fingerprint,
                SOURCE = terms.source("keys revoke"),
                "a key that is not the spec's was revoked: {fingerprint}"
            );
            self.reconcile(&[Scope::KeyFiles].into()).await;
            return Ok(true);
        }
        let change = |spec: &mut Spec| {
            spec.authorized_keys
                .retain(|key| key.key.fingerprint() != fingerprint);
            Ok(true)
        };
        let result = self.change_spec(terms.source("keys revoke"), change, terms).await;
        if result.is_err() {
            self.store.save_revoked(&before).map_err(StateError::refused)?;
        }
        result
    }

    fn unknown_key(&self, fingerprint: &str) -> Refused {
        let keys = self.seen.keys.iter();
        let known: Vec<String> = keys
            .map(|k| format!("{} ({})", k.grant.key.key.fingerprint(), k.grant.key.user))
            .collect();
        let reason = format!(
            "no source names a key {fingerprint:?}; the keys are: {} (a user's own lines: `portcullis keys audit`)",
            known.join(", ")
        );
        (Refusal::NotFound, reason)
    }
}

/// The same key again is no change; one of the same user with other options or another end is refused.
fn add(spec: &mut Spec, key: AuthorizedKey) -> Result<bool, Refused> {
    let same = |old: &&AuthorizedKey| old.user == key.user && old.key.same_key(&key.key);
    match spec.authorized_keys.iter().find(same) {
        Some(old) if old.options == key.options && old.expires == key.expires => return Ok(false),
        Some(old) => {
            let reason = format!(
                "{} has the key {} already, with other options or another end: revoke it first",
                old.user,
                old.key.fingerprint()
            );
            return Err((Refusal::Conflict, reason));
        }
        None => spec.authorized_keys.push(key),
    }
    spec.check().map_err(|e| (Refusal::BadInput, e.to_string()))?;
    Ok(true)
}

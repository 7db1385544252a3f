//! First contact: the identity document, bound by the enrolment token, and the end of that token.
//!
//! A token is used once. Whoever proves with it that this instance's key is pinned ends it: durably first,
//! then on disk and in memory. The injected spec file may still hold it; the agent knows it by its hash.
//! May not live here: HTTP, certificates.

use std::sync::Arc;
use std::time::Duration;

use portcullis_protocol::control::{Answer, Refusal};
use portcullis_protocol::identity::{FirstContact, from_hex, is_nonce, to_hex};
use portcullis_protocol::spec::guessable;
use portcullis_protocol::{Secret, Spec};
use ring::hmac;
use ring::rand::SystemRandom;
use tracing::{info, warn};

use super::Agent;
use super::control::refused;
use super::state::{StateError, Store};
use crate::log::id;
use crate::system::clock;
use crate::system::secret_files::{ENROLMENT_TOKEN, credential};

const FILE: &str = "used-tokens.json";
const MAX_BYTES: usize = 1 << 20;
/// How many are remembered. Each belongs to a generation, so an older one than these does not come back.
const MAX_USED: usize = 1000;
/// How long a challenge may be answered.
const CHALLENGE_TIME: Duration = Duration::from_secs(60);

impl Store {
    /// Hashes of the tokens that were used.
    ///
    /// # Errors
    /// When the list is there and can't be read, or is damaged: then nobody knows which were.
    pub fn used_tokens(&self) -> Result<Vec<String>, StateError> {
        Ok(self.load(FILE, MAX_BYTES)?.unwrap_or_default())
    }

    fn save_used_tokens(&self, used: &[String]) -> Result<(), StateError> {
        self.save(FILE, &used)
    }
}

/// Which tokens are over, and the questions that are put to those who claim to know one.
pub(super) struct Tokens {
    used: Result<Vec<String>, String>,
    /// The credential's token, until it was used. It is good where the spec has none.
    given: Option<Secret>,
    /// Signs challenges, so that none has to be remembered: strangers may ask for as many as they like.
    challenges: hmac::Key,
}

impl Tokens {
    /// Writes what is known of them where nothing is.
    pub(super) fn keep(&self, store: &Store) -> Result<(), StateError> {
        match &self.used {
            Ok(used) if !used.is_empty() => store.save_used_tokens(used),
            _ => Ok(()),
        }
    }

    /// What is known on disk.
    ///
    /// # Errors
    /// When the system gives no random numbers.
    pub(super) fn load(store: &Store) -> Result<Self, String> {
        let random = hmac::Key::generate(hmac::HMAC_SHA256, &SystemRandom::new());
        let used = store.used_tokens().map_err(|error| {
            warn!(MESSAGE_ID = id::DEGRADED, %error, "no enrolment token is believed: which were used is not known");
            error.to_string()
        });
        let mut tokens = Self {
            used,
            given: None,
            challenges: random.map_err(|_| "the system gives no random numbers".to_owned())?,
        };
        let given = credential(ENROLMENT_TOKEN).unwrap_or_else(|reason| {
            warn!(
                MESSAGE_ID = id::CREDENTIAL,
                REASON = reason,
                "the enrolment token of the credential can't be used: {reason}"
            );
            None
        });
        tokens.given = given.filter(|token| !tokens.is_used(token));
        if let Some(reason) = tokens.given.as_ref().and_then(guessable) {
            warn!(
                MESSAGE_ID = id::SPEC_WARNINGS,
                "credential {ENROLMENT_TOKEN}: {reason}"
            );
        }
        Ok(tokens)
    }

    /// Whether this token was used.
    fn is_used(&self, token: &Secret) -> bool {
        self.used.as_ref().is_ok_and(|used| used.contains(&hash(token)))
    }

    /// The spec without a token that was used.
    pub(super) fn stripped(&self, spec: Spec) -> Spec {
        match spec.enrolment_token() {
            Some(token) if self.is_used(token) => spec.without_token(),
            _ => spec,
        }
    }

    /// A question that can be answered for [`CHALLENGE_TIME`], at a time since boot.
    fn challenge(&self, now: Duration) -> String {
        let time = u64::try_from(now.as_millis()).unwrap_or(u64::MAX).to_be_bytes();
        let tag = hmac::sign(&self.challenges, &time);
        to_hex(&time) + &to_hex(tag.as_ref())
    }

    fn is_fresh(&self, challenge: &str, now: Duration) -> bool {
        let Some(bytes) = from_hex(challenge) else {
            return false;
        };
        let Some((time, tag)) = bytes.split_first_chunk::<8>() else {
            return false;
        };
        let asked = Duration::from_millis(u64::from_be_bytes(*time));
        hmac::verify(&self.challenges, time, tag).is_ok() && now.saturating_sub(asked) <= CHALLENGE_TIME
    }
}

/// What is kept of a token: enough to know it again.
fn hash(token: &Secret) -> String {
    let text = [b"portcullis used token v1\0", token.expose().as_bytes()].concat();
    let text = zeroize::Zeroizing::new(text);
    to_hex(ring::digest::digest(&ring::digest::SHA256, &text).as_ref())
}

/// A token as the key of an HMAC.
pub(super) fn mac_key(token: &Secret) -> hmac::Key {
    hmac::Key::new(hmac::HMAC_SHA256, token.expose().as_bytes())
}

impl Agent {
    /// The token of the spec that holds, or the credential's where it has none, if it was not used.
    pub(super) fn token(&self) -> Option<&Secret> {
        let of_spec = self.spec.as_deref()?.enrolment_token();
        let token = of_spec.or(self.tokens.given.as_ref())?;
        (self.tokens.used.is_ok() && !token.is_empty()).then_some(token)
    }

    /// The identity document for a caller's nonce.
    pub(super) fn identity_document(&self, nonce: &str) -> Answer {
        if !is_nonce(nonce) {
            return refused(Refusal::BadInput, "a nonce has 16 to 128 hex digits");
        }
        let (Some(spec), Some(token)) = (self.spec.as_deref(), self.token()) else {
            return refused(Refusal::NotFound, "no enrolment token is known");
        };
        let instance = spec.instance.id.as_str();
        let mut identity = self
            .identity
            .document(instance, &self.seen.sshd.host_keys, nonce, token);
        identity.challenge = Some(self.tokens.challenge(clock::since_boot()));
        Answer::Identity { identity }
    }

    /// Ends the token, if the caller proves that he knows it and pinned our key. All that is wrong gets one
    /// answer, and the MAC is computed whatever is wrong: nothing is learned from it.
    pub(super) async fn first_contact(&mut self, contact: FirstContact) -> Answer {
        let nobody = Secret::new("");
        let token = self.token();
        let mac = from_hex(&contact.mac).unwrap_or_default();
        let key = mac_key(token.unwrap_or(&nobody));
        let is_proven = hmac::verify(&key, &contact.message(), &mac).is_ok();
        let is_fresh = self.tokens.is_fresh(&contact.challenge, clock::since_boot());
        let instance = self.spec.as_deref().map(|spec| spec.instance.id.as_str());
        let is_ours =
            instance == Some(&contact.instance) && contact.tls_spki_sha256 == self.identity.spki_sha256;
        if token.is_none() || !(is_proven & is_fresh & is_ours) {
            return refused(Refusal::NotPermitted, "this proves no first contact");
        }
        self.prove_time(contact.time.as_second());
        match self.use_up_token("first contact").await {
            Ok(()) => Answer::Done,
            Err(error) => {
                let (kind, reason) = error.refused();
                refused(kind, reason)
            }
        }
    }

    /// Never uses the token again, and forgets it: on disk, in memory. A credential's token beside the spec's is
    /// over as well: it would be a second first contact, that nobody waits for.
    pub(super) async fn use_up_token(&mut self, why: &str) -> Result<(), StateError> {
        if self.token().is_none() {
            return Ok(());
        }
        let of_spec = self.spec.as_deref().and_then(Spec::enrolment_token);
        let mut used = self.tokens.used.clone().unwrap_or_default();
        used.extend(of_spec.into_iter().chain(&self.tokens.given).map(hash));
        used.drain(..used.len().saturating_sub(MAX_USED));
        self.store.save_used_tokens(&used)?;
        self.tokens.used = Ok(used);
        self.tokens.given = None;
        // From here on it is over, whatever else fails.
        let strip = |tokens: &Tokens, spec: &Arc<Spec>| Arc::new(tokens.stripped(Spec::clone(spec)));
        self.spec = self.spec.as_ref().map(|spec| strip(&self.tokens, spec));
        self.before_trial = self.before_trial.as_ref().map(|spec| strip(&self.tokens, spec));
        if let (Some(trial), Some(spec)) = (&mut self.trial, &self.spec) {
            trial.spec = spec.clone();
        }
        self.wipe_from_disk();
        self.seen.gate = self.guard.enforce(self.spec.clone()).await;
        info!(
            MESSAGE_ID = id::TOKEN_USED,
            CAUSE = why,
            "the enrolment token was used ({why}): it is forgotten"
        );
        Ok(())
    }

    /// Writes what holds without the token, where the disk still has one. What can't be written now is wiped at
    /// the next start.
    pub(super) fn wipe_from_disk(&self) {
        let accepted = match &self.trial {
            Some(_) => &self.before_trial,
            None => &self.spec,
        };
        let differs = |spec: &&Spec| {
            let on_disk = self.store.spec();
            on_disk.is_ok_and(|on_disk| on_disk.is_some_and(|on_disk| on_disk != **spec))
        };
        let saved = accepted
            .as_deref()
            .filter(differs)
            .map(|spec| self.store.save_spec(spec));
        let trial = self.trial.as_ref().map(|trial| self.store.save_trial(trial));
        for error in [saved, trial].into_iter().flatten().filter_map(Result::err) {
            warn!(MESSAGE_ID = id::DEGRADED, %error, "the used enrolment token stays on disk until the next start");
        }
    }

    /// Somebody proved what time it is. The journal is told when the system's clock is wrong.
    pub(super) fn prove_time(&self, unix: i64) {
        let clock = self.identity.clock();
        clock.prove(unix);
        self.tell_front();
        if let Some(off) = clock.wrong_by() {
            warn!(
                MESSAGE_ID = id::CLOCK_WRONG,
                AHEAD_S = off,
                "the system's clock is off by {off} s: certificates are judged by the proven time until it is set \
                 (timedatectl)"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_used_token_is_known_again_and_a_damaged_list_is_no_list() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::new(folder.path());
        let json =
            br#"{"version":1,"generation":1,"instance":{"id":"i"},"control_plane":{"enrolment_token":"t"}}"#;
        let spec = Spec::from_json(json).unwrap();
        let fresh = Tokens::load(&store).unwrap();
        assert!(fresh.stripped(spec.clone()).enrolment_token().is_some());
        store.save_used_tokens(&[hash(&Secret::new("t"))]).unwrap();
        let kept = store.used_tokens().unwrap();
        assert_eq!(kept[0].len(), 64, "a hash and not the token: {kept:?}");
        let used = Tokens::load(&store).unwrap();
        assert!(used.stripped(spec.clone()).enrolment_token().is_none());
        std::fs::write(folder.path().join(FILE), "[").unwrap();
        assert!(Tokens::load(&store).unwrap().used.is_err());
    }

    #[test]
    fn a_challenge_is_ours_and_fresh() {
        let folder = tempfile::tempdir().unwrap();
        let tokens = || Tokens::load(&Store::new(folder.path())).unwrap();
        let (ours, others) = (tokens(), tokens());
        let now = Duration::from_secs(1000);
        let challenge = ours.challenge(now);
        assert!(ours.is_fresh(&challenge, now) && ours.is_fresh(&challenge, now + CHALLENGE_TIME));
        assert!(!ours.is_fresh(&challenge, now + CHALLENGE_TIME * 2));
        assert!(!others.is_fresh(&challenge, now));
        for damaged in ["", "00", "zz", &challenge[2..], &format!("{challenge}00")] {
            assert!(!ours.is_fresh(damaged, now), "{damaged}");
        }
    }
}

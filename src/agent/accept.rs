//! Which spec holds: taken from the file or a caller, checked, made durable, enforced; on trial until
//! it is confirmed, if that was asked for; and given up again if it was not.
//!
//! May not live here: how callers ask (`control`), how it is enforced (`gate`, `logins`).

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use portcullis_protocol::Spec;
use portcullis_protocol::control::Refusal;
use portcullis_protocol::spec::MAX_SPEC_BYTES;
use tracing::{info, warn};

use super::control::Caller;
use super::state::{StateError, Trial};
use super::{Agent, Scope};
use crate::identity::caller::Authority;
use crate::log::id;
use crate::policy::danger::dangers;
use crate::system::secret_files::place;
use crate::system::{callers, files};

/// Why a spec is not accepted: the kind, and the reason for the operator. Nothing changed then.
pub type Refused = (Refusal, String);

/// How a spec is accepted.
#[derive(Clone, Copy, Debug, Default)]
pub struct Terms {
    /// It is given up again unless it is confirmed within this time.
    pub confirm: Option<Duration>,
    /// It may cut off whoever asks for it.
    pub force: bool,
    /// It was asked for by the control plane, over the API.
    pub remote: bool,
    /// The generation that the accepted spec must still have.
    pub if_generation: Option<u64>,
}

impl Terms {
    /// Where a change comes from, for the journal. `command` is what a local caller used.
    pub fn source(self, command: &'static str) -> &'static str {
        match self.remote {
            true => "control plane",
            false => command,
        }
    }

    /// How to make a change that could cut the caller off.
    fn way_out(self) -> &'static str {
        match self.remote {
            true => {
                "make it with ?confirm=60s (portcullisctl: --confirm 60s), which takes it back unless it is \
                 confirmed over a new connection, or with ?force=true (--force)"
            }
            false => {
                "apply it with --confirm 60s, which takes it back unless you confirm it over a new connection, \
                 or with --force"
            }
        }
    }
}

impl Agent {
    /// Looks at the injected spec file.
    pub async fn take_spec_file(&mut self) {
        let path = place(&self.settings.spec_file);
        let bytes = match files::read(&path, MAX_SPEC_BYTES) {
            Ok(Some(bytes)) => bytes,
            Ok(None) => return,
            Err(error) => return self.refuse(&path, (Refusal::Failed, error.to_string())),
        };
        warn_if_readable(&path);
        let spec = match Spec::from_json(&bytes) {
            Ok(spec) => self.tokens.stripped(spec),
            Err(error) => return self.refuse(&path, (Refusal::BadInput, error.to_string())),
        };
        // On every boot the file of the first boot is still there.
        let accepted = self.spec.as_ref().map(|s| s.generation);
        if accepted.is_some_and(|accepted| spec.generation < accepted) || self.spec.as_deref() == Some(&spec)
        {
            info!(
                GENERATION = spec.generation.get(),
                "the spec file holds nothing newer"
            );
            return;
        }
        // Whoever writes the file has root on the instance's disk, and nobody waits for an answer.
        let terms = Terms {
            force: true,
            ..Terms::default()
        };
        let before = self.spec.clone();
        match self.accept(spec, &path.display().to_string(), terms).await {
            Ok(_) => self.record_file(&path, before.as_ref(), None),
            Err(refused) => self.refuse(&path, refused),
        }
    }

    fn refuse(&mut self, path: &Path, (kind, reason): Refused) {
        let holds = self.spec.clone();
        self.record_file(path, holds.as_ref(), Some((kind, reason.clone())));
        let reason = format!("{}: {reason}", path.display());
        log_refusal(&reason);
        self.refused = Some(reason);
        self.publish();
    }

    /// Makes a spec the accepted one: durable first, then enforced. When it can't be enforced, the
    /// old one stands again, on disk and in the kernel. True when something changed.
    ///
    /// # Errors
    /// The kind of refusal and the reason; then nothing changed.
    pub async fn accept(&mut self, spec: Spec, source: &str, terms: Terms) -> Result<bool, Refused> {
        let spec = self.tokens.stripped(spec);
        if self.spec.as_deref() == Some(&spec) {
            return Ok(false);
        }
        self.check_generation(terms)?;
        self.check_acceptable(&spec, terms)?;
        if let Some(pem) = spec.client_ca() {
            Authority::new(pem).map_err(|reason| (Refusal::BadInput, reason))?;
        }
        let spec = Arc::new(spec);
        let trial = terms.confirm.map(|time| Trial::of(spec.clone(), time));
        self.save(&spec, trial.as_ref())?;
        let gate = self.guard.enforce(Some(spec.clone())).await;
        if let Err(reason) = &gate.applied {
            let reason = reason.clone();
            let restored = match &trial {
                Some(_) => self.store.forget_trial(),
                None => self.store.restore_spec(self.spec.as_deref()),
            };
            self.seen.gate = self.guard.enforce(self.spec.clone()).await;
            self.publish();
            return Err((Refusal::Failed, with_restore(reason, restored)));
        }
        self.seen.gate = gate;
        let generation = spec.generation.get();
        info!(
            MESSAGE_ID = id::SPEC_ACCEPTED,
            GENERATION = generation,
            SOURCE = source,
            ON_TRIAL = trial.is_some(),
            "generation {generation} was accepted{}",
            if trial.is_some() {
                " until it is confirmed or its time is over"
            } else {
                ""
            }
        );
        log_warnings(&spec);
        if let Some(trial) = trial {
            self.before_trial = self.spec.take();
            self.trial = Some(trial);
        }
        self.spec = Some(spec.clone());
        self.refused = None;
        self.tell_front();
        self.reconcile(&[Scope::KeyFiles, Scope::Endpoint].into()).await;
        Ok(true)
    }

    /// Makes a spec durable, or leaves what was.
    fn save(&mut self, spec: &Spec, trial: Option<&Trial>) -> Result<(), Refused> {
        let saved = match trial {
            Some(trial) => self.store.save_trial(trial),
            None => self.store.save_spec(spec),
        };
        if saved.is_ok() && trial.is_none() {
            self.kept = self.store.stamp();
        }
        saved.map_err(|error| {
            let taken_back = match trial {
                Some(_) => self.store.forget_trial(),
                None => self.store.take_back(spec, self.spec.as_deref()),
            };
            not_saved(error, taken_back)
        })
    }

    /// Refuses a change by a caller who knows another spec than the accepted one.
    pub(super) fn check_generation(&self, terms: Terms) -> Result<(), Refused> {
        let accepted = self.spec.as_ref().map_or(0, |spec| spec.generation.get());
        match terms.if_generation {
            Some(known) if known != accepted => {
                let reason = format!("generation {accepted} holds, not the one that the change is for");
                Err((Refusal::OtherGeneration, reason))
            }
            _ => Ok(()),
        }
    }

    fn check_acceptable(&self, spec: &Spec, terms: Terms) -> Result<(), Refused> {
        if let Some(trial) = &self.trial {
            let reason = format!(
                "generation {} awaits confirmation until {}: confirm it, or wait until it is given up",
                trial.spec.generation, trial.until
            );
            return Err((Refusal::Superseded, reason));
        }
        for (at, key) in spec.authorized_keys.iter().enumerate() {
            let fits = key.key.check_size(self.settings.min_rsa_bits);
            fits.map_err(|reason| {
                let reason = format!("authorized_keys[{at}].key: {reason} (setting keys.min_rsa_bits)");
                (Refusal::BadInput, reason)
            })?;
        }
        let Some(accepted) = &self.spec else { return Ok(()) };
        if spec.generation <= accepted.generation {
            let reason = format!(
                "generation: {} is not above the accepted {}: only a higher one replaces it",
                spec.generation, accepted.generation
            );
            return Err((Refusal::Superseded, reason));
        }
        let ports = self
            .seen
            .sshd
            .config
            .as_ref()
            .map_or(&[22][..], |config| &config.ports);
        let dangers = dangers(accepted, spec, ports);
        if dangers.is_empty() || terms.force || terms.confirm.is_some() {
            return Ok(());
        }
        let reason = format!(
            "this could cut you off: {}; {}",
            dangers.join("; "),
            terms.way_out()
        );
        Err((Refusal::Dangerous, reason))
    }

    /// When the spec on trial is given up.
    pub fn trial_ends(&self) -> Option<Duration> {
        self.trial.as_ref().map(Trial::remaining)
    }

    /// Makes the spec on trial the accepted one for good. A caller over an SSH session, or a connection of
    /// the control plane, that is older than the change proves nothing.
    ///
    /// # Errors
    /// When no spec of that generation is on trial, or the caller's session is too old.
    pub fn confirm(&mut self, generation: u64, caller: &Caller) -> Result<(), Refused> {
        let Some(trial) = self
            .trial
            .as_ref()
            .filter(|trial| trial.spec.generation.get() == generation)
        else {
            let waiting = match &self.trial {
                Some(trial) => format!("generation {} does", trial.spec.generation),
                None => "no change does".to_owned(),
            };
            let reason = format!("generation {generation} does not await confirmation; {waiting}");
            return Err((Refusal::Superseded, reason));
        };
        let session = match caller {
            Caller::Local(process) => process.and_then(callers::ssh_session_start),
            Caller::Remote(remote) => Some(remote.since),
        };
        if session.is_some_and(|began| began < trial.began) {
            let reason = "this session is older than the change, so it does not show that a new one works: \
                          connect anew and confirm there";
            return Err((Refusal::Superseded, reason.to_owned()));
        }
        self.store.save_spec(&trial.spec).map_err(|error| {
            let before = self.before_trial.as_deref();
            not_saved(error, self.store.take_back(&trial.spec, before))
        })?;
        // A trial of a generation that is accepted is over, should it stay on disk.
        let _ = self.store.forget_trial();
        (self.trial, self.before_trial) = (None, None);
        info!(
            MESSAGE_ID = id::SPEC_CONFIRMED,
            GENERATION = generation,
            "generation {generation} was confirmed"
        );
        self.publish();
        Ok(())
    }

    /// Gives up the spec on trial, if its time is over: what was accepted before holds again.
    pub async fn end_trial(&mut self) {
        let Some(trial) = self.trial.take_if(|trial| trial.remaining().is_zero()) else {
            return;
        };
        let generation = trial.spec.generation.get();
        let on_trial = self.spec.take();
        self.spec = self.before_trial.take();
        let reason =
            format!("generation {generation} was not confirmed in time: what held before holds again");
        warn!(
            MESSAGE_ID = id::SPEC_REVERTED,
            GENERATION = generation,
            "{reason}"
        );
        self.record_own("trial-ended", on_trial.as_ref(), Some(reason.clone()));
        self.refused = Some(reason);
        if let Err(error) = self.store.forget_trial() {
            warn!(MESSAGE_ID = id::DEGRADED, %error, "the trial that is over stays on disk until the next start");
        }
        self.seen.gate = self.guard.enforce(self.spec.clone()).await;
        self.tell_front();
        self.reconcile(&[Scope::KeyFiles, Scope::Endpoint].into()).await;
    }
}

/// One line, so that what stands in a spec can't look like another entry.
pub fn log_refusal(reason: &str) {
    let line = reason.lines().collect::<Vec<_>>().join("; ");
    warn!(
        MESSAGE_ID = id::SPEC_REFUSED,
        REASON = reason,
        "a spec was refused, nothing changed: {line}"
    );
}

/// One entry, with as many as an operator would read.
fn log_warnings(spec: &Spec) {
    const TOLD: usize = 10;
    let warnings = spec.warnings();
    if warnings.is_empty() {
        return;
    }
    let told: Vec<String> = warnings.iter().take(TOLD).map(ToString::to_string).collect();
    let told = told.join("; ");
    warn!(
        MESSAGE_ID = id::SPEC_WARNINGS,
        COUNT = warnings.len(),
        "{} warnings about generation {}: {told}",
        warnings.len(),
        spec.generation
    );
}

/// There is an enrolment token in it (OSSN-0074).
fn warn_if_readable(path: &Path) {
    if let Ok(metadata) = std::fs::metadata(path)
        && metadata.mode() & 0o077 != 0
    {
        let (file, mode) = (path.display().to_string(), metadata.mode() & 0o777);
        warn!(
            MESSAGE_ID = id::DEGRADED,
            FILE = file,
            "{file} has mode {mode:o}: others can read the token in it"
        );
    }
}

/// What could not be saved is refused. If it can't be taken back either, the next start may find it.
fn not_saved(error: StateError, taken_back: Result<(), StateError>) -> Refused {
    let (kind, reason) = error.refused();
    match taken_back {
        Ok(()) => (kind, reason),
        Err(error) => (
            kind,
            format!("{reason}; the disk may hold it all the same: {error}"),
        ),
    }
}

fn with_restore(reason: String, restored: Result<(), StateError>) -> String {
    match restored {
        Ok(()) => format!("{reason}; the old state stands"),
        Err(error) => format!("{reason}; the old state stands in the kernel, but not on disk: {error}"),
    }
}

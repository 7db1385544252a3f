//! The agent as it starts: with what an earlier one left on disk, or with what may be assumed without it.
//!
//! May not live here: what it does once it runs (`agent`), what is on disk and how (`state`).

use std::collections::BTreeSet;
use std::sync::Arc;

use portcullis_protocol::Spec;
use tokio::sync::watch;
use tracing::{error, warn};

use super::access::Access;
use super::denied::Denied;
use super::enrol::Enrolment;
use super::first_contact::Tokens;
use super::front::Published;
use super::gate::guard::Guard;
use super::metrics::Metrics;
use super::outbox::Outbox;
use super::restart::Restarter;
use super::session_keys::RemovedKeys;
use super::situation::Situations;
use super::sshd::Configured;
use super::state::{Store, Trial};
use super::{Agent, audit, endpoint, known_time, logins, neighbours, storage};
use crate::config::Settings;
use crate::identity::TlsIdentity;
use crate::log::id;
use crate::policy::observation::Observations;
use crate::system::secret_files::{TLS_KEY, credential};

impl Agent {
    /// The agent with the state that an earlier one left. A disk that can't be read or written is
    /// reported, not a reason to end.
    ///
    /// # Errors
    /// When not even a TLS key in memory can be made.
    pub async fn new(settings: Settings) -> Result<Self, String> {
        let store = Store::new(&settings.state_dir);
        let (identity, identity_lost) = load_identity(&store)?;
        let mut refused = None;
        let accepted = store.spec().unwrap_or_else(|error| {
            error!(MESSAGE_ID = id::DEGRADED, %error, "the accepted spec can't be used: nothing is let in");
            refused = Some(error.to_string());
            None
        });
        let tokens = Tokens::load(&store)?;
        let accepted = accepted.map(|spec| Arc::new(tokens.stripped(spec)));
        let mut trial = resume_trial(&store, accepted.as_deref());
        if let Some(trial) = &mut trial {
            trial.spec = Arc::new(tokens.stripped(Spec::clone(&trial.spec)));
        }
        let (spec, before_trial) = match &trial {
            Some(trial) => (Some(trial.spec.clone()), accepted),
            None => (accepted, None),
        };
        let guard = Guard::start(&settings).map_err(|e| format!("the gate's thread: {e}"))?;
        let seen = Observations {
            gate: guard.enforce(spec.clone()).await,
            host_keys: store.host_keys(),
            ..Observations::unseen("not looked at yet")
        };
        let metrics = Metrics::new(guard.durations());
        let neighbours = neighbours::watch(settings.links.clone(), guard.watch());
        let denied = Denied::watch(settings.log_denied);
        let configured = Configured::new(settings.sshd, &store);
        let restarter = Restarter::new(settings.restart_sshd);
        let access = Access::new(settings.access.clone(), &store);
        let removed_keys = RemovedKeys::load(&store, settings.end_sessions);
        known_time::recall(&store, identity.clock());
        if let Err(error) = store.revoked() {
            warn!(MESSAGE_ID = id::DEGRADED, %error, "which keys were revoked is not known: only the spec brings keys");
        }
        let enrolment = Enrolment::load(&store, &identity, spec.as_deref());
        let identity = Arc::new(identity);
        let outbox = Outbox::start(
            settings.report.clone(),
            settings.state_dir.clone(),
            identity.clone(),
        );
        let published = watch::Sender::new(Published {
            setup: Arc::new(endpoint::setup(&settings, &identity, spec.as_deref())),
            report: None,
        });
        let audit = audit::log::Log::new(
            audit::log::Log::folder(&settings.state_dir),
            settings.audit_max_bytes,
        );
        let agent = Self {
            settings,
            store,
            spec,
            trial,
            before_trial,
            refused,
            guard,
            access,
            neighbours,
            storage: storage::watch(),
            denied,
            configured,
            restarter,
            identity,
            identity_lost,
            kept: None,
            restored: 0,
            seen,
            exposure_seen: None,
            host_key_alert: None,
            report: None,
            situations: Situations::default(),
            published,
            front: watch::Sender::default(),
            outbox,
            known_logins: logins::Memory::default(),
            key_files: BTreeSet::new(),
            removed_keys,
            tokens,
            enrolment,
            next_try: None,
            key_failures: 0,
            audit,
            metrics,
        };
        agent.wipe_from_disk();
        Ok(agent)
    }
}

/// The kept identity, or one in memory and why.
fn load_identity(store: &Store) -> Result<(TlsIdentity, Option<String>), String> {
    let load = || {
        let given = credential(TLS_KEY)?;
        let folder = store.folder().map_err(|e| e.to_string())?;
        TlsIdentity::load_or_create(folder, given.as_ref()).map_err(|e| e.to_string())
    };
    match load() {
        Ok(identity) => Ok((identity, None)),
        Err(reason) => {
            error!(
                MESSAGE_ID = id::DEGRADED,
                REASON = reason,
                "the TLS key can't be kept: {reason}"
            );
            Ok((TlsIdentity::in_memory().map_err(|e| e.to_string())?, Some(reason)))
        }
    }
}

/// The trial that an earlier process began, if it goes on. The file of one that is over is removed.
fn resume_trial(store: &Store, accepted: Option<&Spec>) -> Option<Trial> {
    let trial = store.trial(accepted).unwrap_or_else(|error| {
        error!(MESSAGE_ID = id::DEGRADED, %error, "a trial can't be used: what held before it holds");
        None
    });
    if trial.is_none()
        && let Err(error) = store.forget_trial()
    {
        warn!(MESSAGE_ID = id::DEGRADED, %error, "the rest of a trial can't be removed");
    }
    trial
}

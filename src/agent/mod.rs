//! The daemon: events in, reconcile, report out. It owns the accepted spec.
//!
//! May not live here: decisions (`policy`), effects (`system`). What stays in the kernel and on disk
//! does not depend on this process being alive.

mod accept;
pub mod access;
mod answer;
pub mod audit;
pub mod control;
pub mod denied;
mod durable;
mod endpoint;
mod enrol;
pub mod events;
pub mod exposure;
mod first_contact;
pub mod front;
pub mod gate;
mod host_keys;
pub mod key_audit;
mod key_changes;
mod known_time;
mod login_questions;
pub mod logins;
pub mod metrics;
pub mod neighbours;
pub mod outbox;
pub mod report;
mod report_access;
pub mod restart;
pub mod session_keys;
pub mod sessions;
pub mod situation;
pub mod spool;
pub mod sshd;
mod start;
pub mod state;
pub mod storage;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use portcullis_protocol::{Report, Spec};
use tokio::sync::watch;
use tracing::{info, warn};

use crate::config::Settings;
use crate::identity::TlsIdentity;
use crate::log::id;
use crate::policy::conflicts::Comparison;
use crate::policy::host_keys::Change;
use crate::policy::key_sources::Unfit;
use crate::policy::observation::{Gate, KeyState, Observations, Observed};
use crate::policy::storage::Storage;
use crate::system::systemd;
use access::Access;
use denied::Denied;
use durable::Stamp;
use enrol::Enrolment;
use first_contact::Tokens;
use front::{FrontState, Published};
use gate::guard::Guard;
use metrics::Metrics;
use outbox::Outbox;
use restart::Restarter;
use session_keys::RemovedKeys;
use situation::Situations;
use sshd::Configured;
use state::{Store, Trial};

/// Penalties that sshd acts on last 15 s at least, and a probe costs 5 s (sshd_config(5),
/// `PerSourcePenalties`): after this, one more is answered.
const PENALTY_TIME: Duration = Duration::from_secs(20);
/// From a second, the pause before keys are tried again doubles as often: to a quarter of an hour.
const MOST_DOUBLED: u32 = 10;

/// What has to be looked at again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Scope {
    /// The kernel's table, links and routes, and other programs' tables.
    Gate,
    /// systemd's own state.
    Systemd,
    /// Whether systemd or a unit of sshd is in another state than before; if so, all of it.
    Units,
    /// sshd and the keys, as if nothing were known of them.
    Logins,
    /// The keys, where files or the spec changed, and nothing else did.
    KeyFiles,
    /// Our own endpoint.
    Endpoint,
    /// What was seen of storage.
    Storage,
}

impl Scope {
    /// Everything.
    pub const ALL: [Self; 5] = [
        Self::Gate,
        Self::Systemd,
        Self::Logins,
        Self::Endpoint,
        Self::Storage,
    ];
}

/// The daemon's state.
pub struct Agent {
    settings: Settings,
    store: Store,
    /// The spec that holds: the accepted one, or the one on trial.
    spec: Option<Arc<Spec>>,
    trial: Option<Trial>,
    /// What holds again if the trial is not confirmed.
    before_trial: Option<Arc<Spec>>,
    /// Why the last spec was refused, until one is accepted.
    refused: Option<String>,
    guard: Guard,
    access: Access,
    neighbours: watch::Receiver<Observed<Comparison>>,
    storage: watch::Receiver<Observed<Storage>>,
    denied: Denied,
    configured: Configured,
    restarter: Restarter,
    identity: Arc<TlsIdentity>,
    /// Why the TLS key is only in memory, if it is.
    identity_lost: Option<String>,
    /// The accepted spec's file when it was last seen to hold it.
    kept: Option<Stamp>,
    /// How often the state had to be written anew.
    restored: u64,
    seen: Observations,
    /// When sockets were last looked at.
    exposure_seen: Option<Instant>,
    /// What the journal was last told of the host keys.
    host_key_alert: Option<Change>,
    report: Option<Arc<Report>>,
    situations: Situations,
    published: watch::Sender<Published>,
    front: watch::Sender<FrontState>,
    outbox: Outbox,
    known_logins: logins::Memory,
    /// Files whose change may concern keys.
    pub key_files: BTreeSet<PathBuf>,
    removed_keys: RemovedKeys,
    tokens: Tokens,
    enrolment: Enrolment,
    /// When logins are looked at again without an event: sshd may answer this host again then.
    next_try: Option<tokio::time::Instant>,
    /// Looks in a row that found a key not put in place.
    key_failures: u32,
    audit: audit::log::Log,
    metrics: Metrics,
}

impl Agent {
    /// What the HTTPS endpoint is told.
    pub fn published(&self) -> watch::Receiver<Published> {
        self.published.subscribe()
    }

    /// How the front is; who talks to it says so.
    pub fn front(&self) -> &watch::Sender<FrontState> {
        &self.front
    }

    /// Where pushed reports wait.
    pub fn outbox(&self) -> &Outbox {
        &self.outbox
    }

    /// What was accepted and reported is on disk when this returns, as far as it is not delivered.
    pub async fn close(&mut self) {
        self.keep_durable();
        self.outbox.close().await;
    }

    /// The settings.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Tells when the gate is seen in another state.
    pub fn watch_gate(&self) -> watch::Receiver<Arc<Gate>> {
        self.guard.watch()
    }

    /// Tells when other programs' tables are seen to drop something else than before.
    pub fn watch_neighbours(&self) -> watch::Receiver<Observed<Comparison>> {
        self.neighbours.clone()
    }

    /// Tells when something else is seen of storage.
    pub fn watch_storage(&self) -> watch::Receiver<Observed<Storage>> {
        self.storage.clone()
    }

    /// The last report.
    pub fn report(&self) -> Option<&Report> {
        self.report.as_deref()
    }

    /// When a stopped sshd is to be looked at again.
    pub fn restart_due(&self) -> Option<tokio::time::Instant> {
        self.restarter.due()
    }

    /// When logins are to be looked at again because sshd could not be asked, and nobody tells when it can be.
    pub fn next_try(&self) -> Option<tokio::time::Instant> {
        self.next_try
    }

    /// When the next key of the spec expires.
    pub fn next_expiry(&self) -> Option<Timestamp> {
        let now = Timestamp::now();
        let keys = self.spec.iter().flat_map(|s| &s.authorized_keys);
        keys.filter_map(|key| key.expires).filter(|end| *end > now).min()
    }

    /// Enforces and looks at what the scopes name, and publishes the report.
    pub async fn reconcile(&mut self, scopes: &BTreeSet<Scope>) {
        let scopes = self.widened(scopes).await;
        if scopes.contains(&Scope::Gate) {
            self.seen.gate = self.guard.seen();
            self.seen.conflicts = self.neighbours.borrow().clone();
        }
        if scopes.contains(&Scope::Storage) {
            self.seen.storage = self.storage.borrow().clone();
        }
        if scopes.contains(&Scope::Logins) {
            self.known_logins.forget();
        }
        let logins = scopes.contains(&Scope::Logins) || scopes.contains(&Scope::KeyFiles);
        let durations = self.metrics.durations.clone();
        if logins {
            let start = Instant::now();
            self.look_at_logins().await;
            // A drop-in that a running sshd could not be asked about yet has no event of its own.
            let units = self.seen.sshd.units.as_deref().unwrap_or_default();
            let runs = units.iter().any(|unit| unit.active_state == "active");
            let again = self.seen.sshd.penalised().is_some() || self.configured.is_unproven() && runs;
            let pause = again.then_some(PENALTY_TIME).or(self.key_pause());
            self.next_try = pause.map(|pause| tokio::time::Instant::now() + pause);
            self.note_revoked_keys();
            self.look_at_host_keys();
            durations.took("logins", start);
        }
        if scopes.contains(&Scope::Systemd) {
            let start = Instant::now();
            self.seen.systemd = systemd::observe().await;
            durations.took("systemd", start);
        }
        if logins || scopes.contains(&Scope::Systemd) {
            self.restarter.tend().await;
            self.tell_care();
        }
        if scopes.contains(&Scope::Endpoint) {
            let start = Instant::now();
            self.seen.tls = match &self.identity_lost {
                Some(reason) => Err(format!(
                    "the TLS key can't be kept, callers who pinned it are turned away: {reason}"
                )),
                None => self.look_at_endpoint().await,
            };
            durations.took("endpoint", start);
        }
        self.look_at_exposure().await;
        self.publish();
        self.tend_enrolment();
    }

    /// When keys that could not be put in place are tried again: nobody tells that a full disk has room. Ever more
    /// rarely, since most reasons want a hand, and that is an event.
    fn key_pause(&mut self) -> Option<Duration> {
        if self.seen.keys.iter().all(|key| key.installed.is_ok()) {
            self.key_failures = 0;
            return None;
        }
        let pause = Duration::from_secs(1 << self.key_failures.min(MOST_DOUBLED));
        self.key_failures += 1;
        Some(pause)
    }

    /// systemd tells of every job of every unit. Only a state that differs is worth a login probe.
    async fn widened(&self, scopes: &BTreeSet<Scope>) -> BTreeSet<Scope> {
        let mut wide = scopes.clone();
        if wide.remove(&Scope::Units) {
            let (manager, units) = tokio::join!(systemd::manager_state(), systemd::sshd_units());
            if manager != self.seen.systemd.manager_state {
                wide.insert(Scope::Systemd);
            }
            // One that was restarted is active before and after: it matters if it did not answer.
            let sshd = &self.seen.sshd;
            let silent = sshd.handshake.is_err() || !sshd.unanswered.is_empty();
            let runs = units
                .as_ref()
                .is_ok_and(|units| units.iter().any(|unit| unit.active_state == "active"));
            if units != sshd.units || silent && runs {
                wide.insert(Scope::Logins);
            }
        }
        wide
    }

    /// The same failure again is no news.
    fn log_new_failures(&self, keys: &[KeyState], unfit: &[Unfit]) {
        let before = self.seen.keys.iter().map(|key| (&key.grant.key, &key.installed));
        let before: BTreeMap<_, _> = before
            .map(|(key, installed)| ((&key.user, key.key.fingerprint()), installed))
            .collect();
        for key in keys {
            let user = &key.grant.key.user;
            let then = before.get(&(user, key.grant.key.key.fingerprint()));
            if let Err(reason) = &key.installed
                && then.is_none_or(|then| *then != &key.installed)
            {
                warn!(
                    MESSAGE_ID = id::KEYS_FAILED,
                    USER = user.as_str(),
                    REASON = reason,
                    "a key could not be put in place: {reason}"
                );
            }
        }
        for left_out in unfit.iter().filter(|unfit| !self.seen.unfit.contains(unfit)) {
            let (what, reason) = (&left_out.what, &left_out.reason);
            warn!(
                MESSAGE_ID = id::KEYS_FAILED,
                SOURCE = left_out.source.to_string(),
                REASON = reason,
                "a key is left out, {what}: {reason}"
            );
        }
    }

    fn publish(&mut self) {
        self.keep_durable();
        self.seen.trial_until = self.trial.as_ref().map(|trial| trial.until);
        let previous = self.report.take();
        let report = report::write(
            self.spec.as_deref(),
            self.refused.as_deref(),
            &self.seen,
            previous.as_deref(),
        );
        if previous.is_none_or(|before| before.ready != report.ready) {
            let blocking: Vec<&str> = report.blocking().map(|check| check.id.as_str()).collect();
            let blocking = blocking.join(" ");
            let verdict = if report.ready {
                "ready".to_owned()
            } else {
                format!("not ready: {blocking}")
            };
            info!(
                MESSAGE_ID = id::READINESS,
                READY = report.ready,
                BLOCKING = blocking,
                "{verdict}"
            );
        }
        let report = Arc::new(report);
        self.report = Some(report.clone());
        self.tell_situation();
        self.published
            .send_modify(|published| published.report = Some(report));
        self.tell_outbox();
    }

    /// The outbox is told the last report, where it goes, and by what time the receiver is judged.
    fn tell_outbox(&self) {
        let Some(report) = self.report.clone() else { return };
        let url = self.spec.as_deref().and_then(Spec::report_url);
        let url = url.map(|url| url.as_str().to_owned());
        self.outbox.tell(report, url, self.identity.clone());
    }
}

//! The daemon: events in, reconcile, report out. It owns the accepted spec.
//!
//! May not live here: decisions (`policy`), effects (`system`). What stays in the kernel and on disk
//! does not depend on this process being alive.

pub mod control;
pub mod events;
pub mod gate;
pub mod logins;
pub mod neighbours;
pub mod report;
pub mod state;

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use jiff::Timestamp;
use portcullis_protocol::control::{Answer, Refusal, Request};
use portcullis_protocol::spec::MAX_SPEC_BYTES;
use portcullis_protocol::{Report, Spec};
use tokio::sync::watch;
use tracing::{error, info, warn};

use crate::config::Settings;
use crate::health::push::Delivery;
use crate::health::server::{self, Published};
use crate::identity::TlsIdentity;
use crate::log::id;
use crate::policy::observation::{KeyState, Observations, Observed, Sshd, Systemd};
use crate::system::{files, systemd};
use control::refused;
use gate::Gatekeeper;
use logins::Mode;
use state::{StateError, Store};

/// What has to be looked at again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Scope {
    /// The kernel's table, links and routes.
    Gate,
    /// systemd's own state.
    Systemd,
    /// Whether systemd or a unit of sshd is in another state than before; if so, all of it.
    Units,
    /// sshd and the keys.
    Logins,
    /// Our own endpoint.
    Endpoint,
}

impl Scope {
    /// Everything.
    pub const ALL: [Self; 4] = [Self::Gate, Self::Systemd, Self::Logins, Self::Endpoint];
}

/// The daemon's state.
pub struct Agent {
    settings: Settings,
    store: Store,
    spec: Option<Spec>,
    /// Why the last spec was refused, until one is accepted.
    refused: Option<String>,
    keeper: Gatekeeper,
    identity: Arc<TlsIdentity>,
    /// Why the TLS key is only in memory, if it is.
    identity_lost: Option<String>,
    seen: Observations,
    report: Option<Arc<Report>>,
    published: watch::Sender<Published>,
    deliveries: watch::Sender<Delivery>,
    /// Files whose change may concern keys.
    pub key_files: BTreeSet<PathBuf>,
}

impl Agent {
    /// The agent with the state that an earlier one left. A disk that can't be read or written is
    /// reported, not a reason to end.
    ///
    /// # Errors
    /// When not even a TLS key in memory can be made.
    pub fn new(settings: Settings) -> Result<Self, String> {
        let store = Store::new(&settings.state_dir);
        let (identity, identity_lost) = load_identity(&store)?;
        let mut refused = None;
        let spec = store.spec().unwrap_or_else(|error| {
            error!(MESSAGE_ID = id::DEGRADED, %error, "the accepted spec can't be used: nothing is let in");
            refused = Some(error.to_string());
            None
        });
        let mut keeper = Gatekeeper::new(&settings);
        let seen = Observations {
            gate: keeper.reconcile(spec.as_ref()),
            systemd: Systemd {
                manager_state: not_yet(),
                systemctl: not_yet(),
            },
            sshd: Sshd {
                units: not_yet(),
                config: not_yet(),
                handshake: not_yet(),
                host_keys: Vec::new(),
            },
            keys: Vec::new(),
            tls: not_yet(),
            conflicts: not_yet(),
        };
        let tls = tls_or_without_authority(&identity, spec.as_ref())?;
        let token = spec.as_ref().and_then(Spec::enrolment_token).cloned();
        let published = watch::Sender::new(Published {
            report: None,
            token,
            tls,
        });
        Ok(Self {
            settings,
            store,
            spec,
            refused,
            keeper,
            identity: Arc::new(identity),
            identity_lost,
            seen,
            report: None,
            published,
            deliveries: watch::Sender::default(),
            key_files: BTreeSet::new(),
        })
    }

    /// What the HTTPS endpoint tells.
    pub fn published(&self) -> watch::Receiver<Published> {
        self.published.subscribe()
    }

    /// What is pushed.
    pub fn deliveries(&self) -> watch::Receiver<Delivery> {
        self.deliveries.subscribe()
    }

    /// The TLS identity.
    pub fn identity(&self) -> Arc<TlsIdentity> {
        self.identity.clone()
    }

    /// The settings.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// The last report.
    pub fn report(&self) -> Option<&Report> {
        self.report.as_deref()
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
            self.seen.gate = self.keeper.reconcile(self.spec.as_ref());
            // Only after the gate is in place: this may take as long as others' rules are many.
            self.seen.conflicts = neighbours::look(&self.seen.gate.planned, &self.settings.links).await;
        }
        if scopes.contains(&Scope::Logins) {
            let mode = Mode::Reconcile {
                create_users: self.settings.create_users,
            };
            let seen = logins::look(self.spec.as_ref(), &self.store, mode).await;
            self.log_new_failures(&seen.keys);
            (self.seen.sshd, self.seen.keys, self.key_files) = (seen.sshd, seen.keys, seen.files);
        }
        if scopes.contains(&Scope::Systemd) {
            self.seen.systemd = systemd::observe().await;
        }
        if scopes.contains(&Scope::Endpoint) {
            self.seen.tls = match &self.identity_lost {
                Some(reason) => Err(format!(
                    "the TLS key can't be kept, callers who pinned it are turned away: {reason}"
                )),
                None => server::observe(self.settings.listen, &self.identity).await,
            };
        }
        self.publish();
    }

    /// systemd tells of every job of every unit. Only a state that differs is worth a login probe.
    async fn widened(&self, scopes: &BTreeSet<Scope>) -> BTreeSet<Scope> {
        let mut wide = scopes.clone();
        if wide.remove(&Scope::Units) {
            let (manager, units) = tokio::join!(systemd::manager_state(), systemd::sshd_units());
            if manager != self.seen.systemd.manager_state {
                wide.insert(Scope::Systemd);
            }
            if units != self.seen.sshd.units {
                wide.insert(Scope::Logins);
            }
        }
        wide
    }

    /// The same failure again is no news.
    fn log_new_failures(&self, keys: &[KeyState]) {
        for key in keys {
            let before = self
                .seen
                .keys
                .iter()
                .find(|k| k.user == key.user && k.key == key.key);
            if let Err(reason) = &key.installed
                && before.is_none_or(|before| before.installed != key.installed)
            {
                let user = key.user.as_str();
                warn!(
                    MESSAGE_ID = id::KEYS_FAILED,
                    USER = user,
                    REASON = reason,
                    "a key could not be put in place: {reason}"
                );
            }
        }
    }

    fn publish(&mut self) {
        let previous = self.report.take();
        let report = report::write(
            self.spec.as_ref(),
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
        let url = self
            .spec
            .as_ref()
            .and_then(Spec::report_url)
            .map(|url| url.as_str().to_owned());
        self.published
            .send_modify(|published| published.report = Some(report.clone()));
        self.deliveries.send_replace(Delivery {
            url,
            report: Some(report),
        });
    }

    /// Looks at the injected spec file.
    pub async fn take_spec_file(&mut self) {
        let path = self.settings.spec_file.clone();
        let bytes = match files::read(&path, MAX_SPEC_BYTES) {
            Ok(Some(bytes)) => bytes,
            Ok(None) => return,
            Err(error) => return self.refuse(format!("{}: {error}", path.display())),
        };
        warn_if_readable(&path);
        let spec = match Spec::from_json(&bytes) {
            Ok(spec) => spec,
            Err(error) => return self.refuse(format!("{}: {error}", path.display())),
        };
        // On every boot the file of the first boot is still there.
        let accepted = self.spec.as_ref().map(|s| s.generation);
        if accepted.is_some_and(|accepted| spec.generation < accepted) || self.spec.as_ref() == Some(&spec) {
            info!(
                GENERATION = spec.generation.get(),
                "the spec file holds nothing newer"
            );
            return;
        }
        if let Err((_, reason)) = self.accept(spec, &path.display().to_string()).await {
            self.refuse(format!("{}: {reason}", path.display()));
        }
    }

    fn refuse(&mut self, reason: String) {
        log_refusal(&reason);
        self.refused = Some(reason);
        self.publish();
    }

    /// Makes a spec the accepted one: durable first, then enforced. When it can't be enforced, the
    /// old one stands again, on disk and in the kernel. True when something changed.
    ///
    /// # Errors
    /// The kind of refusal and the reason; then nothing changed.
    pub async fn accept(&mut self, spec: Spec, source: &str) -> Result<bool, (Refusal, String)> {
        if let Some(accepted) = &self.spec {
            if *accepted == spec {
                return Ok(false);
            }
            if spec.generation <= accepted.generation {
                let reason = format!(
                    "generation: {} is not above the accepted {}: only a higher one replaces it",
                    spec.generation, accepted.generation
                );
                return Err((Refusal::Failed, reason));
            }
        }
        let tls = self
            .identity
            .server_config(Some(&spec))
            .map_err(|reason| (Refusal::BadInput, reason))?;
        self.store
            .save_spec(&spec)
            .map_err(|error| (Refusal::Failed, error.to_string()))?;
        let gate = self.keeper.reconcile(Some(&spec));
        if let Err(reason) = &gate.applied {
            let reason = reason.clone();
            let restored = self.store.restore_spec(self.spec.as_ref());
            self.seen.gate = self.keeper.reconcile(self.spec.as_ref());
            self.publish();
            return Err((Refusal::Failed, with_restore(reason, restored)));
        }
        self.seen.gate = gate;
        let token = spec.enrolment_token().cloned();
        let generation = spec.generation.get();
        info!(
            MESSAGE_ID = id::SPEC_ACCEPTED,
            GENERATION = generation,
            SOURCE = source,
            "generation {generation} was accepted"
        );
        self.spec = Some(spec);
        self.refused = None;
        self.published
            .send_modify(|published| (published.tls, published.token) = (tls, token));
        self.reconcile(&[Scope::Logins, Scope::Endpoint].into()).await;
        Ok(true)
    }

    /// Answers a local caller.
    pub async fn answer(&mut self, request: Request) -> Answer {
        match request {
            Request::Spec => Answer::Spec {
                spec: self.spec.clone().map(Box::new),
            },
            Request::Status => match &self.report {
                Some(report) => Answer::Report {
                    report: Box::new(Report::clone(report)),
                },
                None => refused(Refusal::Failed, "the first report is not there yet"),
            },
            Request::Apply { spec } => {
                let generation = spec.generation.get();
                match (self.accept(*spec, "apply").await, &self.report) {
                    (Ok(changed), Some(report)) => Answer::Applied {
                        generation,
                        changed,
                        report: Box::new(Report::clone(report)),
                    },
                    (Ok(_), None) => refused(Refusal::Failed, "there is no report"),
                    (Err((kind, reason)), _) => {
                        log_refusal(&reason);
                        refused(kind, reason)
                    }
                }
            }
        }
    }
}

/// One line, so that what stands in a spec can't look like another entry.
fn log_refusal(reason: &str) {
    let line = reason.lines().collect::<Vec<_>>().join("; ");
    warn!(
        MESSAGE_ID = id::SPEC_REFUSED,
        REASON = reason,
        "a spec was refused, nothing changed: {line}"
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

fn with_restore(reason: String, restored: Result<(), StateError>) -> String {
    match restored {
        Ok(()) => format!("{reason}; the old state stands"),
        Err(error) => format!("{reason}; the old state stands in the kernel, but not on disk: {error}"),
    }
}

/// The kept identity, or one in memory and why.
fn load_identity(store: &Store) -> Result<(TlsIdentity, Option<String>), String> {
    let kept = store.folder().map_err(|e| e.to_string());
    match kept.and_then(|folder| TlsIdentity::load_or_create(folder).map_err(|e| e.to_string())) {
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

/// A spec with an unusable authority is refused when it comes in. For one that is accepted already the
/// endpoint goes on, and nobody is the control plane.
fn tls_or_without_authority(
    identity: &TlsIdentity,
    spec: Option<&Spec>,
) -> Result<Arc<rustls::ServerConfig>, String> {
    identity.server_config(spec).or_else(|reason| {
        error!(
            MESSAGE_ID = id::DEGRADED,
            REASON = reason,
            "the control plane can't be known: {reason}"
        );
        identity.server_config(None)
    })
}

fn not_yet<T>() -> Observed<T> {
    Err("not looked at yet".to_owned())
}

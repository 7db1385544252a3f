//! The daemon's loop: wait for an event, find out what it concerns, reconcile that.
//!
//! Nothing is polled. The timers are the watchdog's, the next key's expiry, the certificate's renewal, the
//! next start of an sshd that fails, the next try to put keys in place that could not be, and, while there is no
//! D-Bus, the next try to reach it.
//! May not live here: what reconciling does.

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tracing::{info, warn};

use super::front::{self, FrontState, StartedBy};
use super::{Agent, Scope, control};
use crate::channel;
use crate::config::Settings;
use crate::health::push::offer::PushState;
use crate::log::id;
use crate::policy::conflicts::Comparison;
use crate::policy::observation::{Gate, Observed};
use crate::policy::storage::Storage;
use crate::system::alarm::Alarm;
use crate::system::secret_files::is_credential;
use crate::system::systemd;
use crate::system::watch::{Topic, Watch};

/// How long after an event others of the same cause are waited for.
const SETTLE: Duration = Duration::from_millis(5);
/// Shortest time between two looks at logins because of files.
const LOGINS_PAUSE: Duration = Duration::from_millis(800);
/// How long the first look at the endpoint waits for the front: it takes a few milliseconds.
const FRONT_TIME: Duration = Duration::from_secs(1);
/// systemd tells of every job; at boot there are hundreds.
const SETTLE_UNITS: Duration = Duration::from_millis(100);

/// Runs the daemon until it is told to stop; calls `started` after the first reconcile.
///
/// # Errors
/// When it can't start at all; the gate is in place then, if the kernel can hold one.
pub async fn run(settings: Settings, front: StartedBy, started: impl FnOnce()) -> Result<(), String> {
    let mut terminate = signal(SignalKind::terminate()).map_err(|e| e.to_string())?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(|e| e.to_string())?;
    let mut agent = Agent::new(settings).await?;
    let mut sources = Sources::open(&agent, front).await?;
    agent.audit_start();
    sources.front_may_listen().await;
    agent.take_spec_file().await;
    agent.reconcile(&Scope::ALL.into()).await;
    agent.end_sessions();
    sources.watch_keys(&agent);
    info!(MESSAGE_ID = id::STARTED, "started");
    tell_systemd(&agent, true);
    started();
    loop {
        let event = tokio::select! {
            event = sources.next(&agent) => event,
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
        };
        handle(&mut agent, event).await;
        agent.end_sessions();
        sources.watch_keys(&agent);
        tell_systemd(&agent, false);
    }
    let _ = sd_notify::notify(&[NotifyState::Stopping]);
    agent.close().await;
    agent.audit_stop();
    info!(MESSAGE_ID = id::STOPPED, "stopped; the gate stays in the kernel");
    Ok(())
}

/// Something that happened.
enum Event {
    /// The injected spec changed.
    Spec,
    /// The scopes need a look.
    Look(BTreeSet<Scope>),
    /// A local caller asks.
    Call(control::Call),
    /// The time of a spec on trial is over.
    TrialEnds,
    /// Pushing reports goes another way than before.
    Deliveries,
    /// The audit log has something to write.
    Audit,
    /// The certificate is to be renewed.
    Renewal,
    /// Nothing that needs doing at once: the state is looked at, and the watchdog is told that we live.
    Alive,
}

async fn handle(agent: &mut Agent, event: Event) {
    match event {
        Event::Spec => agent.take_spec_file().await,
        Event::Look(scopes) => agent.reconcile(&scopes).await,
        Event::Call((request, caller, answer)) => {
            // A caller who went away needs no answer.
            let _ = answer.send(agent.answer_recorded(request, caller).await);
        }
        Event::TrialEnds => agent.end_trial().await,
        Event::Deliveries => agent.tell_situation(),
        Event::Audit => agent.tend_audit(),
        Event::Renewal => agent.tend_enrolment(),
        Event::Alive => agent.look_at_state(),
    }
}

fn tell_systemd(agent: &Agent, started: bool) {
    let status = match agent.report() {
        Some(report) if report.ready => format!("Ready, generation {}", report.generation.unwrap_or(0)),
        Some(report) => {
            let blocking: Vec<&str> = report.blocking().map(|check| check.id.as_str()).collect();
            format!("Not ready: {}", blocking.join(", "))
        }
        None => "Starting".to_owned(),
    };
    let mut states = vec![NotifyState::Status(&status), NotifyState::Watchdog];
    if started {
        states.push(NotifyState::Ready);
    }
    let _ = sd_notify::notify(&states);
}

/// Where events come from.
struct Sources {
    watch: Option<Watch>,
    gate: watch::Receiver<Arc<Gate>>,
    neighbours: watch::Receiver<Observed<Comparison>>,
    storage: watch::Receiver<Observed<Storage>>,
    units: mpsc::Receiver<()>,
    calls: mpsc::Receiver<control::Call>,
    /// When logins are looked at because files changed.
    logins_due: Option<Instant>,
    /// What is looked at then: all of them, if more than key files changed.
    logins_scope: Scope,
    /// When that happened last.
    logins_looked: Option<Instant>,
    front: watch::Receiver<FrontState>,
    deliveries: watch::Receiver<PushState>,
    watchdog: Option<Duration>,
    alarm: Alarm,
    last_watchdog: Instant,
}

impl Sources {
    async fn open(agent: &Agent, front: StartedBy) -> Result<Self, String> {
        let settings = agent.settings();
        let (call_sender, calls) = mpsc::channel(8);
        let socket = settings.socket.display();
        match control::bind(&settings.socket).await {
            Ok(listener) => {
                tokio::spawn(control::serve(
                    listener,
                    call_sender.clone(),
                    agent.watch_situation(),
                ));
            }
            // Two daemons would undo each other's work.
            Err(error) if error.kind() == ErrorKind::AddrInUse => return Err(format!("{socket}: {error}")),
            Err(error) => {
                warn!(MESSAGE_ID = id::DEGRADED, %error, "{socket}: local commands can't reach the daemon")
            }
        }
        let outbox = agent.outbox();
        let ends = front::Ends {
            published: agent.published(),
            offers: outbox.offers(),
            said: outbox.said(),
            errands: agent.errands(),
            calls: call_sender,
            state: agent.front().clone(),
        };
        let front_socket = channel::socket(&settings.socket);
        tokio::spawn(async move { front::run(front, &front_socket, ends).await });
        let (unit_sender, units) = mpsc::channel(1);
        tokio::spawn(async move {
            while !unit_sender.is_closed() {
                let was_there = systemd::bus_is_there();
                if let Err(reason) = systemd::watch_units(&unit_sender).await {
                    tracing::debug!(reason, "systemd's units are not watched yet");
                }
                systemd::bus_may_answer(was_there).await;
            }
        });
        let watchdog = sd_notify::watchdog_enabled().map(|limit| limit / 2);
        Ok(Self {
            watch: open_watch(settings),
            gate: agent.watch_gate(),
            neighbours: agent.watch_neighbours(),
            storage: agent.watch_storage(),
            units,
            calls,
            logins_due: None,
            logins_scope: Scope::KeyFiles,
            logins_looked: None,
            front: agent.front().subscribe(),
            deliveries: agent.outbox().state(),
            watchdog,
            alarm: Alarm::new(),
            last_watchdog: Instant::now(),
        })
    }

    /// Waits a moment for the front, so that the first report does not say that there is no endpoint.
    async fn front_may_listen(&mut self) {
        let decided = |state: &FrontState| !matches!(state, FrontState::Absent(_));
        // Without a front the check of the endpoint says so.
        let _ = timeout(FRONT_TIME, self.front.wait_for(decided)).await;
    }

    /// Watches the key files of the spec's users; where a folder is not there yet, the nearest one
    /// above it. What changed between the last look and a new watch is seen by one more look.
    fn watch_keys(&mut self, agent: &Agent) {
        let Some(watch) = &mut self.watch else { return };
        let before = watch.places();
        for file in &agent.key_files {
            let mut nearest = file.as_path();
            while watch.file_and_folder(Topic::Keys, nearest).is_err() {
                match nearest.parent() {
                    Some(parent) => nearest = parent,
                    None => break,
                }
            }
        }
        if watch.places() > before {
            self.logins_are_due(Scope::KeyFiles);
        }
    }

    /// A new spec is taken at once; what else changed concerns logins.
    fn sorted(&mut self, topics: &BTreeSet<Topic>) -> Event {
        let others: BTreeSet<Topic> = topics.iter().copied().filter(|t| *t != Topic::Spec).collect();
        if others == [Topic::Keys].into() {
            self.logins_are_due(Scope::KeyFiles);
        } else if !others.is_empty() {
            self.logins_are_due(Scope::Logins);
        }
        if topics.contains(&Topic::Spec) {
            Event::Spec
        } else {
            Event::Alive
        }
    }

    /// Logins are looked at, at once, but not more often than every [`LOGINS_PAUSE`]: users can change
    /// their files as often as they like, and each look asks sshd.
    fn logins_are_due(&mut self, scope: Scope) {
        if scope == Scope::Logins {
            self.logins_scope = scope;
        }
        let now = Instant::now();
        let due = self
            .logins_looked
            .map_or(now, |looked| now.max(looked + LOGINS_PAUSE));
        self.logins_due.get_or_insert(due);
    }

    fn look_at_logins(&mut self) -> Event {
        self.logins_due = None;
        self.logins_looked = Some(Instant::now());
        Event::Look([std::mem::replace(&mut self.logins_scope, Scope::KeyFiles)].into())
    }

    async fn next(&mut self, agent: &Agent) -> Event {
        let expiry = agent.next_expiry().map(|end| {
            let wait = jiff::Timestamp::now()
                .duration_until(end)
                .try_into()
                .unwrap_or(Duration::ZERO);
            Instant::now() + wait
        });
        let trial_ends = agent.trial_ends().map(|remaining| Instant::now() + remaining);
        let watchdog = self.watchdog.map(|interval| self.last_watchdog + interval);
        let event = tokio::select! {
            Some(call) = self.calls.recv() => Event::Call(call),
            topics = changed(&mut self.watch) => {
                let topics = settled(&mut self.watch, topics).await;
                self.sorted(&topics)
            }
            () = until(self.logins_due) => self.look_at_logins(),
            Ok(()) = self.gate.changed() => Event::Look([Scope::Gate].into()),
            Ok(()) = self.neighbours.changed() => Event::Look([Scope::Gate].into()),
            Ok(()) = self.deliveries.changed() => Event::Deliveries,
            Ok(()) = self.front.changed() => Event::Look([Scope::Endpoint].into()),
            Ok(()) = self.storage.changed() => Event::Look([Scope::Storage].into()),
            () = until(trial_ends) => Event::TrialEnds,
            () = until(agent.audit_due()) => Event::Audit,
            () = until(agent.renewal_due()) => Event::Renewal,
            () = until(agent.next_try()) => Event::Look([Scope::Logins].into()),
            () = until(agent.restart_due()) => Event::Look([Scope::Systemd].into()),
            Some(()) = self.units.recv() => {
                sleep(SETTLE_UNITS).await;
                let _ = self.units.try_recv();
                Event::Look([Scope::Units].into())
            }
            () = until(expiry) => Event::Look([Scope::KeyFiles].into()),
            () = self.alarm.until(watchdog) => Event::Alive,
        };
        self.last_watchdog = Instant::now();
        event
    }
}

fn open_watch(settings: &Settings) -> Option<Watch> {
    let open = || -> std::io::Result<Watch> {
        let mut watch = Watch::new()?;
        // A credential does not change.
        if !is_credential(&settings.spec_file) {
            if let Some(folder) = settings.spec_file.parent() {
                // Packaged; made here too for images without the package.
                let _ = std::fs::create_dir_all(folder);
            }
            watch.file(Topic::Spec, &settings.spec_file)?;
        }
        // Who is locked, or in which group, decides as well who gets in.
        for file in ["/etc/passwd", "/etc/shadow", "/etc/group"] {
            watch.file(Topic::Accounts, Path::new(file))?;
        }
        for folder in ["/etc/ssh", "/etc/ssh/sshd_config.d"] {
            // Absent without sshd; then there is nothing to be told of.
            let _ = watch.folder(Topic::Sshd, Path::new(folder));
        }
        Ok(watch)
    };
    open()
        .inspect_err(|error| {
            warn!(MESSAGE_ID = id::DEGRADED, %error, "files are not watched: a new spec needs `portcullis apply`");
        })
        .ok()
}

/// Waits for files to change. What inotify told is returned without another wait in between, for the
/// caller may stop waiting at any time, and then it would be lost.
async fn changed(watch: &mut Option<Watch>) -> BTreeSet<Topic> {
    let Some(inner) = watch else {
        return std::future::pending().await;
    };
    match inner.changed().await {
        Ok(topics) => topics,
        Err(error) => {
            warn!(MESSAGE_ID = id::DEGRADED, %error, "files are no longer watched");
            *watch = None;
            BTreeSet::new()
        }
    }
}

/// An editor writes, renames and changes modes: one look for all of it. A spec does not wait.
async fn settled(watch: &mut Option<Watch>, mut topics: BTreeSet<Topic>) -> BTreeSet<Topic> {
    while !topics.contains(&Topic::Spec) {
        match timeout(SETTLE, changed(watch)).await {
            Ok(more) if !more.is_empty() => topics.extend(more),
            _ => break,
        }
    }
    topics
}

/// A source of events; one that can't be opened is told of once, and has none.
pub fn opened<T, E: std::fmt::Display>(what: &str, source: Result<T, E>) -> Option<T> {
    source
        .inspect_err(|error| warn!(MESSAGE_ID = id::DEGRADED, %error, "{what} are not told"))
        .ok()
}

/// Waits for a moment; without one, for ever.
pub async fn until(moment: Option<Instant>) {
    match moment {
        Some(moment) => sleep_until(moment).await,
        None => std::future::pending().await,
    }
}

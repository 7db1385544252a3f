//! systemd over D-Bus: its state, sshd's units, and an event when they may have changed
//! (org.freedesktop.systemd1(5)).
//!
//! May not live here: which state is good, when to look again.

use std::future::poll_fn;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::pin::Pin;
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::sync::mpsc::{self, error::TrySendError};
use tokio::time::timeout;
use zbus::export::futures_core::Stream;
use zbus::message::Type;
use zbus::{Connection, MatchRule, MessageStream, OwnedObjectPath, fdo};

use super::command::{ask, said};
use super::watch::{Topic, Watch};
use crate::policy::observation::{Observed, SshdUnit, Systemd, Unit};

/// What sshd's units are called: Debian says ssh, the others sshd; a socket starts the service on demand.
const SSHD_UNITS: [&str; 4] = ["ssh.service", "sshd.service", "ssh.socket", "sshd.socket"];

const SYSTEMCTL: &str = "/usr/bin/systemctl";

const MANAGER: &str = "org.freedesktop.systemd1";
const MANAGER_PATH: &str = "/org/freedesktop/systemd1";
const MANAGER_INTERFACE: &str = "org.freedesktop.systemd1.Manager";

/// The system bus (dbus-daemon(1)).
const BUS_SOCKET: &str = "/run/dbus/system_bus_socket";

/// Between two tries to reach a bus that is there and does not answer, or where its coming can't be watched.
const BUS_RETRY: Duration = Duration::from_secs(1);

/// How long the bus, or systemd on it, may take to answer.
const TIMEOUT: Duration = Duration::from_secs(5);

/// A row of `ListUnitsByPatterns`: name, description, load state, active state, sub state, followed unit,
/// path, job number, job type, job path.
pub(super) type UnitRow = (
    String,
    String,
    String,
    String,
    String,
    String,
    OwnedObjectPath,
    u32,
    String,
    OwnedObjectPath,
);

#[zbus::proxy(
    interface = "org.freedesktop.systemd1.Manager",
    default_service = "org.freedesktop.systemd1",
    default_path = "/org/freedesktop/systemd1"
)]
trait Manager {
    /// The overall state. systemd sends no signal when it changes, so it must not be cached.
    #[zbus(property(emits_changed_signal = "false"))]
    fn system_state(&self) -> zbus::Result<String>;

    /// Makes systemd send signals, until this connection ends.
    fn subscribe(&self) -> zbus::Result<()>;

    /// Units in memory. Unlike `ListUnitsByNames` and `LoadUnit`, this loads none: loading one that does
    /// not exist sends signals, and whoever looks because of a signal would look for ever.
    fn list_units_by_patterns(&self, states: &[&str], names: &[&str]) -> zbus::Result<Vec<UnitRow>>;

    /// Paths of unit files, and whether they are enabled.
    fn list_unit_files_by_patterns(
        &self,
        states: &[&str],
        names: &[&str],
    ) -> zbus::Result<Vec<(String, String)>>;

    /// Starts a unit; the path of the job that does it.
    fn start_unit(&self, name: &str, mode: &str) -> zbus::Result<OwnedObjectPath>;

    /// Makes a unit read its configuration; the path of the job that does it.
    fn reload_unit(&self, name: &str, mode: &str) -> zbus::Result<OwnedObjectPath>;

    /// Stops and starts a unit; the path of the job that does it.
    fn restart_unit(&self, name: &str, mode: &str) -> zbus::Result<OwnedObjectPath>;

    /// A job ended, with a result: `done`, `failed`, `timeout`, ….
    #[zbus(signal)]
    fn job_removed(&self, id: u32, job: OwnedObjectPath, unit: &str, result: &str) -> zbus::Result<()>;
}

#[zbus::proxy(
    interface = "org.freedesktop.systemd1.Unit",
    default_service = "org.freedesktop.systemd1"
)]
trait Unit {
    /// When its state last changed, in microseconds of the monotonic clock. Not cached: it is asked for
    /// once.
    #[zbus(property(emits_changed_signal = "false"))]
    fn state_change_timestamp_monotonic(&self) -> zbus::Result<u64>;

    /// Units that start it when something happens, for example its socket.
    #[zbus(property(emits_changed_signal = "false"))]
    fn triggered_by(&self) -> zbus::Result<Vec<String>>;

    /// `active`, `inactive`, ….
    #[zbus(property(emits_changed_signal = "false"))]
    fn active_state(&self) -> zbus::Result<String>;
}

/// Asks systemd how it is, over D-Bus and through its own program.
pub async fn observe() -> Systemd {
    let (manager_state, systemctl) = tokio::join!(manager_state(), systemctl_state(Path::new(SYSTEMCTL)));
    Systemd {
        manager_state,
        systemctl,
    }
}

/// The service and socket units of sshd that are loaded; empty if none is. systemd forgets a unit that is
/// neither active nor failed nor wanted by another one.
pub async fn sshd_units() -> Observed<Vec<Unit>> {
    answered("list units", async {
        let bus = Connection::system().await?;
        let manager = ManagerProxy::new(&bus).await?;
        let rows = manager.list_units_by_patterns(&[], &SSHD_UNITS).await?;
        let mut units = loaded(rows);
        // To ask for a unit that systemd has forgotten meanwhile would load it.
        let services = |unit: &&mut Unit| unit.name.ends_with(".service") && unit.active_state != "inactive";
        for unit in units.iter_mut().filter(services) {
            let proxy = UnitProxy::builder(&bus)
                .path(unit_path(&unit.name))
                .build()
                .await?;
            unit.changed_at = proxy.state_change_timestamp_monotonic().await?;
        }
        Ok(units)
    })
    .await
}

/// The units of sshd, whether they are enabled, and whether systemd is about to do something with them.
///
/// # Errors
/// systemd does not answer.
pub async fn sshd_unit_files() -> Observed<Vec<SshdUnit>> {
    answered("list unit files", async {
        let bus = Connection::system().await?;
        let manager = ManagerProxy::new(&bus).await?;
        let rows = manager.list_units_by_patterns(&[], &SSHD_UNITS).await?;
        let files = manager
            .list_unit_files_by_patterns(&["enabled", "enabled-runtime"], &SSHD_UNITS)
            .await?;
        let enabled = |name: &str| files.iter().any(|(path, _)| Path::new(path).ends_with(name));
        let rows = rows.into_iter().filter(|row| row.2 == "loaded");
        Ok(rows
            .map(|(name, _, _, active_state, _, _, _, job, ..)| SshdUnit {
                enabled: enabled(&name),
                name,
                active_state,
                busy: job != 0,
            })
            .collect())
    })
    .await
}

/// Whether an active socket starts this unit: then the socket holds its ports, and not the unit itself.
///
/// # Errors
/// systemd does not answer.
pub async fn is_behind_socket(unit: &str) -> Observed<bool> {
    answered("tell what starts a unit", async {
        let bus = Connection::system().await?;
        let proxy = async |name: &str| UnitProxy::builder(&bus).path(unit_path(name)).build().await;
        for trigger in proxy(unit).await?.triggered_by().await? {
            if trigger.ends_with(".socket") && proxy(&trigger).await?.active_state().await? == "active" {
                return Ok(true);
            }
        }
        Ok(false)
    })
    .await
}

/// What a job of systemd is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Job {
    /// Start the unit.
    Start,
    /// Make it read its configuration.
    Reload,
    /// Stop it and start it.
    Restart,
}

/// Has systemd start, reload or restart a unit, and waits for the job's end: its result is `done` if all went well
/// (org.freedesktop.systemd1(5), `JobRemoved`).
///
/// # Errors
/// systemd does not take the job, or does not end it in time.
pub async fn run_job(job: Job, unit: &str) -> Observed<String> {
    let what = match job {
        Job::Start => format!("start {unit}"),
        Job::Reload => format!("reload {unit}"),
        Job::Restart => format!("restart {unit}"),
    };
    answered(&what, async {
        let bus = Connection::system().await?;
        let manager = ManagerProxy::new(&bus).await?;
        manager.subscribe().await?;
        // Listened to before it begins: it may end at once.
        let mut ended = manager.receive_job_removed().await?;
        let path = match job {
            Job::Start => manager.start_unit(unit, "replace").await?,
            Job::Reload => manager.reload_unit(unit, "replace").await?,
            Job::Restart => manager.restart_unit(unit, "replace").await?,
        };
        while let Some(signal) = poll_fn(|context| Pin::new(&mut ended).poll_next(context)).await {
            let signal = signal.args()?;
            if *signal.job() == path {
                return Ok((*signal.result()).to_owned());
            }
        }
        Err(zbus::Error::Failure("D-Bus closed the connection".to_owned()))
    })
    .await
}

/// Sends an event when a unit of sshd, or systemd's own state, may have changed. Returns when nobody
/// receives any more.
///
/// Each change comes several times; events that nobody took yet are one, so give it a channel that holds
/// one. What changed before this is ready is not told: an event is sent as soon as it is.
///
/// # Errors
/// There is no bus or no systemd on it, or the connection ended. The caller tries again later.
pub async fn watch_units(events: &mpsc::Sender<()>) -> Result<(), String> {
    let (_bus, mut signals) = answered("subscribe", subscribe()).await?;
    let mut lost = Ok(());
    loop {
        match events.try_send(()) {
            Ok(()) | Err(TrySendError::Full(())) => {}
            Err(TrySendError::Closed(())) => return Ok(()),
        }
        // That the bus is gone is an event as well.
        lost?;
        tokio::select! {
            signal = next_signal(&mut signals) => lost = signal,
            () = events.closed() => return Ok(()),
        }
    }
}

/// Whether the bus's socket is there; it comes later than the daemon.
pub fn bus_is_there() -> bool {
    Path::new(BUS_SOCKET).exists()
}

/// Waits until it is worth trying to reach the bus again. Where its socket was missing: until it comes;
/// where it was there and did not answer: for a while.
pub async fn bus_may_answer(was_there: bool) {
    if was_there || bus_appears().await.is_err() {
        tokio::time::sleep(BUS_RETRY).await;
    }
}

async fn bus_appears() -> std::io::Result<()> {
    let mut watch = Watch::new()?;
    loop {
        // The folder comes with the socket, so its parent is watched until it is there.
        watch.folder(Topic::Bus, Path::new("/run"))?;
        let _ = watch.file(Topic::Bus, Path::new(BUS_SOCKET));
        if bus_is_there() {
            return Ok(());
        }
        watch.changed().await?;
    }
}

/// `SystemState` of the manager.
pub async fn manager_state() -> Observed<String> {
    answered("tell its state", async {
        let bus = Connection::system().await?;
        ManagerProxy::new(&bus).await?.system_state().await
    })
    .await
}

/// The word that `systemctl is-system-running` prints (systemctl(1)); its status only says whether that
/// word is `running`.
async fn systemctl_state(program: &Path) -> Observed<String> {
    let output = ask(program, ["is-system-running"]).await?;
    match String::from_utf8_lossy(&output.stdout).trim() {
        "" => Err(format!("systemctl is-system-running: {}", said(&output))),
        word => Ok(word.escape_debug().to_string()),
    }
}

/// Waits for an answer of systemd, with a reason if there is none.
pub(super) async fn answered<T>(
    what: &str,
    answer: impl Future<Output = zbus::Result<T>>,
) -> Result<T, String> {
    match timeout(TIMEOUT, answer).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(error)) => Err(format!("systemd can't {what} over D-Bus: {error}")),
        Err(_) => Err(format!(
            "systemd did not {what} over D-Bus within {} s",
            TIMEOUT.as_secs()
        )),
    }
}

/// Asks systemd to keep a descriptor for the next process of this unit, also if this one is killed;
/// `FileDescriptorStoreMax=` lets it. Without systemd nothing happens.
pub fn keep(name: &str, descriptor: BorrowedFd<'_>) {
    // Without FDPOLL=0, systemd drops a socket that has an error to tell.
    let states = [
        NotifyState::FdStore,
        NotifyState::FdName(name),
        NotifyState::Custom("FDPOLL=0"),
    ];
    if let Err(error) = sd_notify::notify_with_fds(&states, &[descriptor]) {
        tracing::debug!(%error, "systemd does not keep the connection to nf_tables");
    }
}

/// Asks systemd to let go of what it keeps under this name.
pub fn keep_no_longer(name: &str) {
    let _ = sd_notify::notify(&[NotifyState::FdStoreRemove, NotifyState::FdName(name)]);
}

fn loaded(rows: Vec<UnitRow>) -> Vec<Unit> {
    let mut units: Vec<Unit> = rows
        .into_iter()
        .filter(|(_, _, load_state, ..)| load_state == "loaded")
        .map(|(name, _, _, active_state, ..)| Unit {
            name,
            active_state,
            changed_at: 0,
        })
        .collect();
    units.sort_by(|a, b| a.name.cmp(&b.name));
    units
}

async fn subscribe() -> zbus::Result<(Connection, MessageStream)> {
    let bus = Connection::system().await?;
    let signals = MessageStream::from(&bus);
    let dbus = fdo::DBusProxy::new(&bus).await?;
    for rule in match_rules()? {
        dbus.add_match_rule(rule).await?;
    }
    ManagerProxy::new(&bus).await?.subscribe().await?;
    Ok((bus, signals))
}

/// The units' own changes, and those of the manager: jobs that ended (a failed one degrades it), units
/// read anew, and the end of the boot.
fn match_rules() -> zbus::Result<Vec<MatchRule<'static>>> {
    let signal = || MatchRule::builder().msg_type(Type::Signal).sender(MANAGER);
    let changed = SSHD_UNITS.map(|unit| {
        signal()
            .path(unit_path(unit))
            .interface("org.freedesktop.DBus.Properties")
            .member("PropertiesChanged")
    });
    let manager = ["JobRemoved", "Reloading", "StartupFinished"].map(|member| {
        signal()
            .path(MANAGER_PATH)
            .interface(MANAGER_INTERFACE)
            .member(member)
    });
    changed
        .into_iter()
        .chain(manager)
        .map(|rule| rule.build())
        .collect()
}

/// The object of a unit, loaded or not: what is not a letter or digit is `_` and two hex digits.
fn unit_path(name: &str) -> String {
    let escaped: String = name
        .bytes()
        .map(|byte| match byte {
            byte if byte.is_ascii_alphanumeric() => char::from(byte).to_string(),
            byte => format!("_{byte:02x}"),
        })
        .collect();
    format!("{MANAGER_PATH}/unit/{escaped}")
}

async fn next_signal(messages: &mut MessageStream) -> Result<(), String> {
    loop {
        match poll_fn(|context| Pin::new(&mut *messages).poll_next(context)).await {
            // Answers to our own calls come here too.
            Some(Ok(message)) if message.message_type() != Type::Signal => {}
            Some(Ok(_)) => return Ok(()),
            Some(Err(error)) => return Err(format!("the connection to D-Bus failed: {error}")),
            None => return Err("D-Bus closed the connection".to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn row(name: &str, load_state: &str, active_state: &str) -> UnitRow {
        let path = || OwnedObjectPath::try_from("/").unwrap();
        let text = str::to_owned;
        (
            text(name),
            text(""),
            text(load_state),
            text(active_state),
            text(""),
            text(""),
            path(),
            0,
            text(""),
            path(),
        )
    }

    #[test]
    fn only_loaded_units() {
        let units = loaded(vec![
            row("ssh.socket", "loaded", "active"),
            row("ssh.service", "loaded", "inactive"),
            row("sshd.socket", "not-found", "inactive"),
        ]);
        let unit = |name: &str, state: &str| Unit {
            name: name.to_owned(),
            active_state: state.to_owned(),
            changed_at: 0,
        };
        assert_eq!(
            units,
            [unit("ssh.service", "inactive"), unit("ssh.socket", "active")]
        );
    }

    #[test]
    fn units_have_paths_before_they_are_loaded() {
        assert_eq!(
            unit_path("ssh.service"),
            "/org/freedesktop/systemd1/unit/ssh_2eservice"
        );
        assert_eq!(match_rules().unwrap().len(), 7);
    }

    #[tokio::test]
    async fn the_word_of_systemctl_counts_and_not_its_status() {
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("systemctl");
        for (script, expected) in [
            ("echo degraded; exit 1", Ok("degraded".to_owned())),
            (
                "echo no bus >&2; exit 1",
                Err("systemctl is-system-running: no bus".to_owned()),
            ),
        ] {
            std::fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
            std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
            assert_eq!(systemctl_state(&program).await, expected);
        }
    }
}

//! Whether a stopped sshd is to be started, and as which unit.
//!
//! May not live here: starting it (`system::systemd`), when (`agent::sshd`).

use super::observation::SshdUnit;

/// What to do about sshd's units.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Restart {
    /// One is active.
    Runs,
    /// None is active, and systemd is about to change that, or the host is on its way up or down.
    Wait,
    /// This one is to be started.
    Start(String),
    /// None is active, and none is enabled: that is how its administrator wants it.
    Disabled,
}

/// What to do, with the manager in this state (`SystemState`). A unit that failed is started also while the
/// host boots; one that is only inactive may have its turn yet.
pub fn decide(manager: &str, units: &[SshdUnit]) -> Restart {
    let is = |state: &'static str| move |unit: &&SshdUnit| unit.active_state == state;
    if units.iter().any(|unit| is("active")(&unit)) {
        return Restart::Runs;
    }
    let at_rest = |unit: &SshdUnit| !unit.busy && matches!(&*unit.active_state, "inactive" | "failed");
    let booting =
        matches!(manager, "initializing" | "starting") && !units.iter().any(|unit| is("failed")(&unit));
    if manager == "stopping" || booting || !units.iter().all(at_rest) {
        return Restart::Wait;
    }
    let enabled = || units.iter().filter(|unit| unit.enabled);
    let socket = enabled().find(|unit| unit.name.ends_with(".socket"));
    match socket.or_else(|| enabled().next()) {
        Some(unit) => Restart::Start(unit.name.clone()),
        None => Restart::Disabled,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unit(name: &str, active_state: &str, enabled: bool) -> SshdUnit {
        SshdUnit {
            name: name.into(),
            active_state: active_state.into(),
            enabled,
            busy: false,
        }
    }

    fn start(name: &str) -> Restart {
        Restart::Start(name.into())
    }

    #[test]
    fn the_enabled_one_is_started_and_a_socket_first() {
        let service = |state| unit("ssh.service", state, true);
        let socket = |enabled| unit("ssh.socket", "inactive", enabled);
        assert_eq!(
            decide("running", &[service("active"), socket(false)]),
            Restart::Runs
        );
        assert_eq!(
            decide("running", &[service("inactive"), socket(false)]),
            start("ssh.service")
        );
        assert_eq!(
            decide("degraded", &[service("failed"), socket(true)]),
            start("ssh.socket")
        );
        assert_eq!(
            decide(
                "running",
                &[unit("ssh.service", "inactive", false), socket(false)]
            ),
            Restart::Disabled
        );
        assert_eq!(decide("running", &[]), Restart::Disabled);
        // The socket waits for the first connection: that is a running sshd.
        let listening = unit("ssh.socket", "active", true);
        assert_eq!(
            decide("running", &[service("inactive"), listening]),
            Restart::Runs
        );
    }

    #[test]
    fn what_systemd_is_about_to_do_is_waited_for() {
        let mut stopped = unit("ssh.service", "inactive", true);
        for manager in ["initializing", "starting", "stopping"] {
            assert_eq!(
                decide(manager, std::slice::from_ref(&stopped)),
                Restart::Wait,
                "{manager}"
            );
        }
        let failed = unit("ssh.service", "failed", true);
        assert_eq!(
            decide("starting", std::slice::from_ref(&failed)),
            start("ssh.service")
        );
        assert_eq!(decide("stopping", &[failed]), Restart::Wait);
        stopped.busy = true;
        assert_eq!(decide("running", &[stopped]), Restart::Wait);
        for state in ["activating", "deactivating", "reloading"] {
            assert_eq!(
                decide("running", &[unit("ssh.service", state, true)]),
                Restart::Wait
            );
        }
    }
}

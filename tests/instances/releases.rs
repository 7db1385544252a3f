//! The same promises on each release: other versions of OpenSSH, systemd, cloud-init and the C library, and
//! sshd behind a socket on one of them.
//!
//! May not live here: what one release is enough for (`login`, `boot`, `faults`).

use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use jiff::{SignedDuration, Timestamp};
use portcullis_protocol::{AuthorizedKey, CheckId, PublicKey, Report, Status};
use portcullis_provision::local::{Output, Outsider};

use crate::lab::{Lab, Machine, Run, SOON, USER, eventually};
use crate::login::{ssh, with_password};

/// A release, and the versions that make it another one.
pub struct Release {
    suite: &'static str,
    openssh: &'static str,
    systemd: &'static str,
    /// sshd is started by the first connection.
    socket: bool,
}

pub const BULLSEYE: Release = Release {
    suite: "bullseye",
    openssh: "OpenSSH_8.4",
    systemd: "systemd 247 ",
    socket: false,
};

pub const BOOKWORM: Release = Release {
    suite: "bookworm",
    openssh: "OpenSSH_9.2",
    systemd: "systemd 252 ",
    socket: false,
};

pub const TRIXIE: Release = Release {
    suite: "trixie",
    openssh: "OpenSSH_10.0",
    systemd: "systemd 257 ",
    socket: true,
};

#[test]
fn logins_are_proven_on_debian_11() {
    logins_are_proven_on(&BULLSEYE);
}

#[test]
fn logins_are_proven_on_debian_12() {
    logins_are_proven_on(&BOOKWORM);
}

#[test]
fn logins_are_proven_on_debian_13_with_sshd_behind_a_socket() {
    logins_are_proven_on(&TRIXIE);
}

fn logins_are_proven_on(release: &Release) {
    let lab = Lab::new();
    let mut machine = launch(&lab, release);
    it_is_the_release(&machine, release);
    let stranger = lab.stranger();
    only_the_injected_key_logs_in(&lab, &machine, &stranger);
    if release.socket {
        the_socket_is_enough(&machine);
        looking_often_is_not_penalised(&lab, &machine);
    }
    readiness_follows_sshd(&machine, release);
    a_revoked_key_is_refused(&lab, &mut machine, &stranger);
    lab.provider.reboot("one").unwrap();
    machine.until_ready();
    succeeds(&login(&lab, &machine, &stranger, "id"));
    sshd_itself_ends_a_key(&lab, &mut machine, &stranger, release);
}

/// One instance of the release, ready. Where sshd is behind a socket, the image has it so from the first boot.
pub fn launch(lab: &Lab, release: &Release) -> Machine {
    let mut request = lab.request("one", "c-1");
    request.image.suite = release.suite.into();
    if release.socket {
        request.image.overlay = Some(overlay_with_socket(lab));
    }
    lab.launch_many(&[request]).remove(0)
}

/// What `systemctl disable ssh.service` and `systemctl enable ssh.socket` leave of an image.
fn overlay_with_socket(lab: &Lab) -> PathBuf {
    let overlay = lab.path("overlay");
    let units = overlay.join("etc/systemd/system");
    fs::create_dir_all(units.join("sockets.target.wants")).unwrap();
    fs::create_dir_all(units.join("multi-user.target.wants")).unwrap();
    symlink(
        "/usr/lib/systemd/system/ssh.socket",
        units.join("sockets.target.wants/ssh.socket"),
    )
    .unwrap();
    // An overlay's way to say that a file below is gone.
    for gone in ["multi-user.target.wants/ssh.service", "sshd.service"] {
        Command::new("mknod")
            .arg(units.join(gone))
            .args(["c", "0", "0"])
            .succeed();
    }
    overlay
}

fn it_is_the_release(machine: &Machine, release: &Release) {
    let client = machine.ok("ssh -V 2>&1");
    assert!(client.starts_with(release.openssh), "{client}");
    let systemd = machine.ok("systemctl --version");
    assert!(systemd.starts_with(release.systemd), "{systemd}");
    let report = machine.status();
    for id in [
        CheckId::SystemdRunning,
        CheckId::SystemdSystemctl,
        CheckId::SshdRunning,
        CheckId::SshdReachable,
        CheckId::SshdPubkey,
        CheckId::SshdPassword,
        CheckId::KeysInstalled,
        CheckId::KeysAccepted,
        CheckId::FirewallApplied,
        CheckId::FirewallDefaultDeny,
    ] {
        let check = report.check(id).unwrap();
        assert_eq!(check.status, Status::Pass, "{}: {check:#?}", release.suite);
    }
}

fn login(lab: &Lab, machine: &Machine, from: &Outsider, key: &str) -> Output {
    ssh(lab, machine, from, &lab.path(key))
        .args(["-o", "BatchMode=yes", "id -un"])
        .output_text()
}

#[track_caller]
fn succeeds(output: &Output) {
    assert_eq!(output.stdout.trim(), USER, "{output:#?}");
}

/// By what sshd thinks of the key or the password, not by what it thinks of the address.
#[track_caller]
fn is_refused(output: &Output) {
    assert_eq!(output.code, Some(255), "{output:#?}");
    assert!(
        output.stderr.contains("Permission denied (publickey)"),
        "{output:#?}"
    );
}

fn only_the_injected_key_logs_in(lab: &Lab, machine: &Machine, stranger: &Outsider) {
    succeeds(&login(lab, machine, stranger, "id"));
    lab.new_key("other");
    is_refused(&login(lab, machine, stranger, "other"));
    machine.ok(&format!("echo {USER}:correct-horse | chpasswd"));
    is_refused(&with_password(lab, machine, stranger, "correct-horse"));
    // Restarted, since an sshd behind a socket does not survive a reload: it can't bind what systemd holds.
    let drop_in = "/etc/ssh/sshd_config.d/00-test.conf";
    machine.ok(&format!(
        "echo 'PasswordAuthentication yes' > {drop_in}; systemctl restart ssh"
    ));
    eventually(SOON, "the password is taken", || {
        let output = with_password(lab, machine, stranger, "correct-horse");
        if output.stdout.trim() == USER {
            Ok(())
        } else {
            Err(output)
        }
    });
    machine.ok(&format!("rm {drop_in}; systemctl restart ssh"));
}

/// Readiness is lost when nothing of sshd is left that would answer, and comes back with it.
fn readiness_follows_sshd(machine: &Machine, release: &Release) {
    let (all, first) = match release.socket {
        true => ("ssh.socket ssh.service", "ssh.socket"),
        false => ("ssh.service", "ssh.service"),
    };
    machine.ok(&format!("systemctl stop {all}"));
    machine.until_check(CheckId::SshdRunning, Status::Fail);
    assert!(!machine.status().ready);
    // All these starts may come within ten seconds: systemd would have enough of them (StartLimitBurst=).
    machine.ok(&format!("systemctl reset-failed {all}; systemctl start {first}"));
    machine.until_ready();
}

fn a_revoked_key_is_refused(lab: &Lab, machine: &mut Machine, stranger: &Outsider) {
    let second = key(lab.new_key("second"), None);
    machine.push(|spec| spec.authorized_keys.push(second));
    machine.until_ready();
    succeeds(&login(lab, machine, stranger, "second"));
    machine.push(|spec| spec.authorized_keys.truncate(1));
    machine.until_ready();
    is_refused(&login(lab, machine, stranger, "second"));
    succeeds(&login(lab, machine, stranger, "id"));
}

/// With nobody there to remove it: sshd reads the end that stands beside the key.
fn sshd_itself_ends_a_key(lab: &Lab, machine: &mut Machine, stranger: &Outsider, release: &Release) {
    if release.openssh == "OpenSSH_8.4" {
        // It reads local time only, so the end is written for the last zone of the world: be there.
        machine.ok("ln -sf /usr/share/zoneinfo/Pacific/Kiritimati /etc/localtime; test -s /etc/localtime");
    }
    let lasts = Duration::from_secs(8);
    let end = Timestamp::now() + SignedDuration::try_from(lasts).unwrap();
    let ends = Instant::now() + lasts;
    let brief = lab.new_key("brief");
    let line = brief.to_line();
    machine.push(|spec| spec.authorized_keys.push(key(brief, Some(end))));
    machine.until_ready();
    machine.ok("systemctl stop portcullis");
    succeeds(&login(lab, machine, stranger, "brief"));
    // sshd counts whole seconds.
    std::thread::sleep((ends + Duration::from_secs(1)).saturating_duration_since(Instant::now()));
    is_refused(&login(lab, machine, stranger, "brief"));
    machine.ok(&format!("grep -F '{line}' /home/{USER}/.ssh/authorized_keys"));
    succeeds(&login(lab, machine, stranger, "id"));
}

fn key(key: PublicKey, expires: Option<Timestamp>) -> AuthorizedKey {
    AuthorizedKey {
        user: USER.parse().unwrap(),
        options: portcullis_protocol::KeyOptions::default(),
        key,
        expires,
    }
}

/// OpenSSH 9.8 and newer refuse a source that keeps coming without logging in, as a probe does.
fn looking_often_is_not_penalised(lab: &Lab, machine: &Machine) {
    for look in 0..20 {
        let output = machine.run("portcullis check --format json");
        let report: Report = serde_json::from_str(&output.stdout).unwrap();
        assert!(output.success() && report.ready, "look {look}: {report:#?}");
    }
    // Somebody else who keeps coming is refused before being asked who it is.
    let persistent = lab.provider.outsider("persistent").unwrap();
    eventually(SOON, "a penalty", || {
        let output = login(lab, machine, &persistent, "other");
        assert!(!output.success());
        match output.stderr.contains("Permission denied") {
            true => Err(output),
            false => Ok(()),
        }
    });
}

/// Over IPv6 each probe comes from one address, which OpenSSH 9.8 and newer refuse when they are many.
#[test]
fn an_sshd_that_has_enough_of_probes_is_unknown_and_answers_again() {
    let lab = Lab::new();
    let with_service = Release {
        socket: false,
        ..TRIXIE
    };
    let machine = launch(&lab, &with_service);
    machine.ok("echo 'AddressFamily inet6' > /etc/ssh/sshd_config.d/10-v6.conf; systemctl restart ssh");
    machine.until_ready();
    let check = eventually(SOON, "a penalty", || {
        let output = machine.run("portcullis check --format json");
        let report: Report = serde_json::from_str(&output.stdout).unwrap();
        let check = report.check(CheckId::SshdReachable).unwrap().clone();
        match check.status {
            Status::Pass => Err(check),
            _ => Ok(check),
        }
    });
    assert_eq!(check.status, Status::Unknown, "{check:?}");
    assert!(check.summary.contains("PerSourcePenalties"), "{check:?}");
    // The daemon hears of it at its next look, and looks again when it is over.
    machine.ok("touch /etc/ssh/sshd_config.d/10-v6.conf");
    machine.until_check(CheckId::SshdReachable, Status::Unknown);
    // Each look before owes sshd 5 s, and this one counts them all; the daemon looks every 20 s.
    eventually(Duration::from_secs(120), "it answers again", || {
        let report = machine.try_status()?;
        let check = report.check(CheckId::SshdReachable).cloned();
        match report.ready {
            true => Ok(()),
            false => Err(format!("{check:?}")),
        }
    });
}

/// systemd holds the port; sshd itself runs from the first connection on, which may be the probe's.
fn the_socket_is_enough(machine: &Machine) {
    // `check` changes nothing, so the folder that sshd's service took with it is made here, as the daemon does.
    machine.ok("systemctl stop portcullis ssh.service; mkdir /run/sshd");
    assert_eq!(machine.unit("ssh.service", "ActiveState"), "inactive");
    let output = machine.run("portcullis check --format json");
    let report: Report = serde_json::from_str(&output.stdout).unwrap();
    let check = report.check(CheckId::SshdRunning).unwrap();
    assert!(check.summary.contains("ssh.socket is active"), "{check:#?}");
    for id in [
        CheckId::SshdRunning,
        CheckId::SshdReachable,
        CheckId::KeysAccepted,
    ] {
        assert_eq!(report.check(id).unwrap().status, Status::Pass, "{report:#?}");
    }
    assert_eq!(machine.unit("ssh.service", "ActiveState"), "active");
    machine.ok("systemctl start portcullis");
    machine.until_ready();
}

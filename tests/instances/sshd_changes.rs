//! Changes of sshd's configuration that are cut short, that are made before sshd answers, and that an sshd
//! behind a socket has to read.
//!
//! May not live here: what is changed and why (`sshd`).

use portcullis::log::id::SSHD_REFUSED;
use portcullis_protocol::{CheckId, Status};

use crate::client::Client;
use crate::lab::{Lab, Machine, SOON, USER, eventually};
use crate::login::{reload_sshd, ssh};
use crate::releases::{self, TRIXIE};
use crate::sshd::{DROP_IN, JUDGED, logs_in, methods, set, told};

const UNPROVEN: &str = "/var/lib/portcullis/sshd-drop-in-unproven";

fn exists(machine: &Machine, path: &str) -> bool {
    machine.run(&format!("test -e {path}")).success()
}

#[track_caller]
fn until_gone(machine: &Machine, path: &str) {
    eventually(JUDGED, &format!("{path} is gone"), || {
        match exists(machine, path) {
            true => Err("it is there"),
            false => Ok(()),
        }
    });
}

/// sshd's unit with other lines, for as long as the instance runs.
fn unit_says(machine: &Machine, unit: &str, lines: &str) {
    machine.ok(&format!(
        "mkdir -p /run/systemd/system/{unit}.d
        printf '[Service]\\n{lines}\\n' > /run/systemd/system/{unit}.d/test.conf
        systemctl daemon-reload"
    ));
}

#[test]
fn a_daemon_that_is_killed_before_sshd_reads_the_drop_in_has_it_read_at_its_next_start() {
    let lab = Lab::new();
    let machine = lab.launch();
    let stranger = lab.stranger();
    let home = format!("/home/{USER}/.ssh/authorized_keys");
    machine.ok("echo 'PasswordAuthentication yes' > /etc/ssh/sshd_config.d/01-image.conf");
    reload_sshd(&machine);
    machine.until_check(CheckId::SshdPassword, Status::Warn);
    // A reload that takes its time and then comes to nothing, and a daemon that does not come back at once.
    unit_says(
        &machine,
        "ssh.service",
        "ExecReload=\\nExecReload=/bin/sh -c \"test ! -e /run/no-reload || ! sleep 3\"\\nExecReload=/bin/kill -HUP $MAINPID",
    );
    unit_says(&machine, "portcullis.service", "RestartSec=8");
    machine.ok("touch /run/no-reload");
    machine.ok(&format!(
        "printf '[sshd]\\nharden = true\\n[keys]\\nfile = \"system\"\\n' > /etc/portcullis/conf.d/sshd.toml
        systemctl restart --no-block portcullis
        until test -e {DROP_IN}; do sleep 0.02; done; kill -KILL $(systemctl show -P MainPID portcullis)"
    ));
    eventually(SOON, "the reload has failed", || {
        match machine.unit("ssh", "ActiveState").as_str() {
            "active" => Ok(()),
            other => Err(other.to_owned()),
        }
    });
    machine.ok("rm /run/no-reload");
    // It is written, and the sshd that runs knows nothing of it.
    assert!(exists(&machine, UNPROVEN));
    assert_eq!(methods(&lab, &machine, &stranger), "publickey,password");
    assert!(machine.ok(&format!("cat {home}")).contains("ssh-ed25519"));
    until_gone(&machine, UNPROVEN);
    assert_eq!(methods(&lab, &machine, &stranger), "publickey");
    eventually(SOON, "the home is cleared", || {
        let text = machine.run(&format!("cat {home}")).stdout;
        if text.contains("ssh-ed25519") {
            Err(text)
        } else {
            Ok(())
        }
    });
    assert!(logs_in(&lab, &machine, &stranger));
    machine.until_ready();
    assert!(exists(&machine, DROP_IN));
}

#[test]
fn a_drop_in_from_before_sshd_answered_is_judged_once_it_does() {
    let lab = Lab::new();
    let machine = lab.launch();
    let stranger = lab.stranger();
    let written_without_sshd = |image: &str| {
        set(&machine, "");
        until_gone(&machine, DROP_IN);
        machine.ok(&format!(
            "printf 'PasswordAuthentication yes\\n{image}' > /etc/ssh/sshd_config.d/01-image.conf; systemctl stop ssh"
        ));
        machine.until_check(CheckId::SshdRunning, Status::Fail);
        set(&machine, "[sshd]\\nharden = true\\n");
        eventually(SOON, "it is written", || {
            if exists(&machine, DROP_IN) {
                Ok(())
            } else {
                Err("it is not there")
            }
        });
        // Nobody can say yet what it does to logins.
        machine.until_check(CheckId::SshdReachable, Status::Fail);
        assert!(exists(&machine, UNPROVEN));
        machine.ok("systemctl start ssh");
    };
    written_without_sshd("");
    until_gone(&machine, UNPROVEN);
    machine.until_ready();
    assert!(exists(&machine, DROP_IN));
    assert_eq!(methods(&lab, &machine, &stranger), "publickey");

    // With it, there is no way in. What sshd read before must not pass for what it reads then, however long
    // that takes it.
    unit_says(
        &machine,
        "ssh.service",
        "ExecReload=\\nExecReload=/bin/sh -c \"(sleep 2; kill -HUP $MAINPID) &\"",
    );
    written_without_sshd("Match User ubuntu\\n AuthenticationMethods publickey,password\\n");
    let check = eventually(JUDGED, "it is taken out", || {
        let report = machine.try_status()?;
        let check = report.check(CheckId::SshdPassword).cloned().ok_or("none")?;
        match check.evidence.contains_key("drop_in_problem") {
            true => Ok(check),
            false => Err(format!("{check:?}")),
        }
    });
    assert!(check.summary.contains("no longer works"), "{check:?}");
    assert!(!exists(&machine, DROP_IN) && !exists(&machine, UNPROVEN));
    machine.until_ready();
    // And that is that, for the next looks too.
    let refused = told(&machine, SSHD_REFUSED);
    assert!(refused > 0);
    machine.ok("touch /etc/ssh/sshd_config.d/01-image.conf");
    machine.until_ready();
    assert_eq!(told(&machine, SSHD_REFUSED), refused);
}

/// A reload would end it: it can't take the port that its socket has.
#[test]
fn an_sshd_that_a_socket_started_is_restarted_to_read_the_drop_in() {
    let lab = Lab::new();
    let machine = releases::launch(&lab, &TRIXIE);
    let stranger = lab.stranger();
    machine.ok(
        "echo 'PasswordAuthentication yes' > /etc/ssh/sshd_config.d/10-image.conf; systemctl restart ssh",
    );
    assert_eq!(methods(&lab, &machine, &stranger), "publickey,password");
    let mut session = Client::shell("id", &mut ssh(&lab, &machine, &stranger, &lab.path("id")));
    assert_eq!(machine.unit("ssh.service", "ActiveState"), "active");
    for (settings, expected) in [
        ("[sshd]\\nharden = true\\n", "publickey"),
        ("", "publickey,password"),
    ] {
        let before = machine.unit("ssh.service", "MainPID");
        set(&machine, settings);
        let status = match settings {
            "" => Status::Warn,
            _ => Status::Pass,
        };
        machine.until_check(CheckId::SshdPassword, status);
        machine.until_ready();
        assert_eq!(methods(&lab, &machine, &stranger), expected);
        assert_eq!(machine.unit("ssh.service", "ActiveState"), "active");
        assert_ne!(machine.unit("ssh.service", "MainPID"), before);
        assert_eq!(machine.unit("ssh.service", "NRestarts"), "0");
        session.answers();
    }
    assert!(logs_in(&lab, &machine, &stranger));
    assert_eq!(machine.run("journalctl -b -u ssh -g 'Cannot bind'").code, Some(1));
    // What is spared.
    machine.run("systemctl reload ssh");
    eventually(SOON, "a reload ends it", || {
        let told = machine.run("journalctl -b -u ssh -g 'Cannot bind'");
        if told.success() { Ok(()) } else { Err(told) }
    });
}

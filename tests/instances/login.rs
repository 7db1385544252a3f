//! Logging in: the injected key does, no other one and no password; what the user wrote stays.
//!
//! May not live here: files of keys without an instance (`tests/keys`).

use std::path::Path;
use std::process::Command;

use portcullis_protocol::AuthorizedKey;
use portcullis_provision::local::{Output, Outsider};

use crate::lab::{Lab, Machine, Run, SOON, USER, eventually, inside};

/// A known_hosts file from the instance's own host key.
fn known_hosts(lab: &Lab, machine: &Machine) -> std::path::PathBuf {
    let key = machine.ok("cat /etc/ssh/ssh_host_ed25519_key.pub");
    let path = lab.path("known_hosts");
    let line = format!("{} {key}\n", machine.v4());
    // Another ssh may be reading it.
    if std::fs::read_to_string(&path).ok().as_deref() != Some(&line) {
        std::fs::write(&path, line).unwrap();
    }
    path
}

/// `ssh` from a stranger, who has to be shown the host key that is known.
pub fn ssh(lab: &Lab, machine: &Machine, from: &Outsider, identity: &Path) -> Command {
    ssh_as(USER, lab, machine, from, identity)
}

/// As [`ssh`], as another user.
pub fn ssh_as(user: &str, lab: &Lab, machine: &Machine, from: &Outsider, identity: &Path) -> Command {
    let mut command = inside(&from.path(), "ssh");
    let known = known_hosts(lab, machine);
    command
        .args([
            "-F",
            "none",
            "-o",
            "StrictHostKeyChecking=yes",
            "-o",
            "IdentitiesOnly=yes",
        ])
        .args(["-o", "IdentityAgent=none", "-o", "ConnectTimeout=5"])
        .arg("-o")
        .arg(format!("UserKnownHostsFile={}", known.display()))
        .arg("-i")
        .arg(identity)
        .arg(format!("{user}@{}", machine.v4()));
    command
}

/// Has sshd read its files, and waits until it did: systemd is done when sshd was told, and for a moment after
/// that it listens nowhere.
pub fn reload_sshd(machine: &Machine) {
    machine.ok("sockets() { ss -Hltne 'sport = :22' | grep -o 'sk:[0-9a-f]*'; }
        before=$(sockets); systemctl reload ssh
        until now=$(sockets) && [ \"$now\" != \"$before\" ]; do sleep 0.05; done");
}

/// Tries to log in with a password, and with no key.
pub fn with_password(lab: &Lab, machine: &Machine, from: &Outsider, password: &str) -> Output {
    let answer = lab.path("askpass");
    std::fs::write(&answer, format!("#!/bin/sh\necho {password}\n")).unwrap();
    Command::new("chmod").arg("700").arg(&answer).succeed();
    ssh(lab, machine, from, Path::new("none"))
        .args(["-o", "PreferredAuthentications=password,keyboard-interactive"])
        .args(["-o", "NumberOfPasswordPrompts=1", "id -un"])
        .env("SSH_ASKPASS", &answer)
        .env("SSH_ASKPASS_REQUIRE", "force")
        .output_text()
}

#[test]
fn the_injected_key_logs_in_and_no_other_key_or_password_does() {
    let lab = Lab::new();
    let machine = lab.launch();
    let stranger = lab.stranger();
    let said = ssh(&lab, &machine, &stranger, &lab.path("id"))
        .args(["-o", "BatchMode=yes", "id -un; sudo -n id -u"])
        .succeed();
    assert_eq!(said, format!("{USER}\n0\n"));

    lab.new_key("other");
    let refused = ssh(&lab, &machine, &stranger, &lab.path("other"))
        .args(["-o", "BatchMode=yes", "true"])
        .output_text();
    assert_eq!(refused.code, Some(255), "{refused:?}");
    assert!(
        refused.stderr.contains("Permission denied (publickey)"),
        "{refused:?}"
    );

    // A password that is right gets in nowhere, until somebody lets sshd take passwords.
    machine.ok(&format!("echo {USER}:correct-horse | chpasswd"));
    let with_password = || with_password(&lab, &machine, &stranger, "correct-horse");
    let refused = with_password();
    assert_eq!(refused.code, Some(255), "{refused:?}");
    assert!(refused.stderr.contains("Permission denied"), "{refused:?}");
    machine.ok("echo 'PasswordAuthentication yes' > /etc/ssh/sshd_config.d/00-test.conf");
    reload_sshd(&machine);
    eventually(SOON, "the password is taken", || {
        let output = with_password();
        if output.stdout.trim() == USER {
            Ok(())
        } else {
            Err(output)
        }
    });
}

#[test]
fn the_users_own_lines_survive_key_changes_byte_for_byte() {
    let lab = Lab::new();
    let mut machine = lab.launch();
    let file = format!("/home/{USER}/.ssh/authorized_keys");
    let ours = machine.ok(&format!("cat {file}"));
    // Line ends of another system, bytes that are no UTF-8, an option, no line end at the end.
    let own =
        b"# mine\r\n\n  ssh-ed25519 not-even-a-key\xff\xfe me\nno-pty,command=\"/bin/true\" ssh-rsa AAAA x";
    let put = format!(
        "cat > {file}.new && chown {USER}: {file}.new && chmod 600 {file}.new && mv {file}.new {file}"
    );
    assert!(machine.run_with(&put, own).success());
    let holds = |machine: &Machine, what: &str| machine.run(&format!("grep -qF '{what}' {file}")).success();
    let id = lab.public_key("id").to_line();
    eventually(SOON, "the key that was removed is back", || {
        if holds(&machine, &id) {
            Ok(())
        } else {
            Err(machine.run(&format!("cat {file}")))
        }
    });
    assert_ne!(ours, "");

    let (first, second) = (lab.public_key("id"), lab.new_key("second"));
    let key = |key| AuthorizedKey {
        user: USER.parse().unwrap(),
        options: portcullis_protocol::KeyOptions::default(),
        key,
        expires: None,
    };
    machine.push(|spec| spec.authorized_keys = vec![key(second.clone())]);
    machine.until_ready();
    assert!(holds(&machine, &second.to_line()) && !holds(&machine, &first.to_line()));
    // What of the file is not ours is the user's, in the user's order.
    let hex = |machine: &Machine| machine.ok(&format!("od -An -v -tx1 {file} | tr -d ' \\n'"));
    let own_hex: String = own.iter().map(|byte| format!("{byte:02x}")).collect();
    assert!(
        hex(&machine).contains(&own_hex),
        "{}",
        machine.ok(&format!("cat -A {file}"))
    );

    let stranger = lab.stranger();
    let logs_in = |name: &str| {
        ssh(&lab, &machine, &stranger, &lab.path(name))
            .args(["-o", "BatchMode=yes", "id -un"])
            .output_text()
            .success()
    };
    assert!(logs_in("second") && !logs_in("id"));

    machine.push(|spec| spec.authorized_keys.clear());
    eventually(SOON, "the file has the user's bytes alone", || {
        let now = hex(&machine);
        if now == own_hex {
            Ok(())
        } else {
            Err(machine.ok(&format!("cat -A {file}")))
        }
    });
    let mode = machine.ok(&format!("stat -c '%a %U %G' {file}"));
    assert_eq!(mode, format!("600 {USER} {USER}"));
}

//! What the agent does for sshd where the settings ask for it: starting it again, turning passwords off,
//! keys in files of root's; and that it gives way where that would lock somebody out.
//!
//! May not live here: what it only looks at (`tests/keys`).

use std::time::Duration;

use portcullis::log::id::{SSHD_CONFIGURED, SSHD_REFUSED, SSHD_STARTED};
use portcullis_protocol::{CheckId, Status};
use portcullis_provision::local::Outsider;

use crate::lab::{Lab, Machine, Run, SOON, USER, eventually};
use crate::login::{reload_sshd, ssh};

pub const DROP_IN: &str = "/etc/ssh/sshd_config.d/00-portcullis.conf";
const SYSTEM: &str = "/etc/portcullis/authorized_keys.d";

/// How long a change of sshd that is judged and taken back may take.
pub const JUDGED: Duration = Duration::from_secs(30);

/// The methods that a stranger is offered.
pub fn methods(lab: &Lab, machine: &Machine, stranger: &Outsider) -> String {
    let said = ssh(lab, machine, stranger, &lab.path("id"))
        .args([
            "-o",
            "BatchMode=yes",
            "-o",
            "PreferredAuthentications=none",
            "true",
        ])
        .output_text();
    let (_, methods) = said
        .stderr
        .split_once("Permission denied (")
        .unwrap_or_else(|| panic!("{said:?}"));
    methods.trim_end().trim_end_matches(").").to_owned()
}

pub fn logs_in(lab: &Lab, machine: &Machine, stranger: &Outsider) -> bool {
    let said = ssh(lab, machine, stranger, &lab.path("id"))
        .args(["-o", "BatchMode=yes", "id -un"])
        .output_text();
    said.success() && said.stdout.trim() == USER
}

pub fn set(machine: &Machine, settings: &str) {
    machine.ok(&format!(
        "printf '{settings}' > /etc/portcullis/conf.d/sshd.toml; systemctl restart portcullis"
    ));
}

/// Entries in the journal with a message id.
pub fn told(machine: &Machine, id: &str) -> usize {
    let lines = machine.ok(&format!("journalctl -b -o cat MESSAGE_ID={id}"));
    lines.lines().count()
}

#[test]
fn a_stopped_sshd_comes_back_once_and_not_in_a_loop() {
    let lab = Lab::new();
    let machine = lab.launch();
    // Without the setting it stays as its administrator left it.
    machine.ok("systemctl stop ssh");
    machine.until_check(CheckId::SshdRunning, Status::Fail);
    set(&machine, "[sshd]\\nrestart = true\\n");
    machine.until_ready();
    let check = machine.status().check(CheckId::SshdRunning).cloned().unwrap();
    assert_eq!(check.evidence["restarts"], 1, "{check:?}");
    assert_eq!(
        check.evidence["last_restart"], "ssh.service was started",
        "{check:?}"
    );
    assert_eq!(told(&machine, SSHD_STARTED), 1);

    // Again at once: that may be a loop.
    machine.ok("systemctl stop ssh");
    machine.until_check(CheckId::SshdRunning, Status::Fail);
    // The time is what is measured: nothing to wait for.
    std::thread::sleep(Duration::from_secs(5));
    assert_eq!(machine.unit("ssh", "ActiveState"), "inactive");
    eventually(
        Duration::from_secs(40),
        "started after the pause",
        || match machine.unit("ssh", "ActiveState").as_str() {
            "active" => Ok(()),
            other => Err(other.to_owned()),
        },
    );
    assert_eq!(told(&machine, SSHD_STARTED), 2);

    // One that is disabled is not wanted.
    machine.ok("systemctl disable --now ssh");
    let check = eventually(SOON, "it is told why nothing is started", || {
        let report = machine.try_status()?;
        let check = report.check(CheckId::SshdRunning).cloned().ok_or("none")?;
        match check.evidence.get("last_restart") {
            Some(said)
                if said
                    .as_str()
                    .is_some_and(|said| said.contains("no unit of sshd is enabled")) =>
            {
                Ok(check)
            }
            other => Err(format!("{other:?}")),
        }
    });
    assert_eq!(check.status, Status::Fail);
    assert_eq!(told(&machine, SSHD_STARTED), 2);
}

#[test]
fn hardening_turns_passwords_off_before_an_images_drop_in_and_back_on_when_it_is_not_wished() {
    let lab = Lab::new();
    let machine = lab.launch();
    let stranger = lab.stranger();
    machine.ok(
        "printf 'PasswordAuthentication yes\\nKbdInteractiveAuthentication yes\\nPermitRootLogin no\\n' \
         > /etc/ssh/sshd_config.d/01-image.conf",
    );
    reload_sshd(&machine);
    eventually(SOON, "passwords are offered", || {
        match methods(&lab, &machine, &stranger) {
            methods if methods == "publickey,password,keyboard-interactive" => Ok(()),
            other => Err(other),
        }
    });
    assert!(logs_in(&lab, &machine, &stranger));
    machine.until_check(CheckId::SshdPassword, Status::Warn);

    set(&machine, "[sshd]\\nharden = true\\n");
    machine.until_check(CheckId::SshdPassword, Status::Pass);
    machine.until_ready();
    assert_eq!(methods(&lab, &machine, &stranger), "publickey");
    assert!(logs_in(&lab, &machine, &stranger));
    let text = machine.ok(&format!("cat {DROP_IN}"));
    assert!(text.starts_with("# Written by portcullis"), "{text}");
    // What the image is stricter in stays.
    let effective = machine.ok("sshd -T");
    for line in [
        "permitrootlogin no",
        "passwordauthentication no",
        "x11forwarding no",
        "maxauthtries 6",
    ] {
        assert!(effective.lines().any(|l| l == line), "{line}");
    }
    assert_eq!(machine.ok(&format!("stat -c '%a %U' {DROP_IN}")), "644 root");
    assert_eq!(told(&machine, SSHD_CONFIGURED), 1);
    assert_eq!(machine.run("ls /run/portcullis/sshd").code, Some(2));

    // It stays so: somebody who removes the file gets it back.
    machine.ok(&format!("rm {DROP_IN}"));
    eventually(SOON, "it is back", || {
        match machine.run(&format!("cat {DROP_IN}")) {
            output if output.stdout.trim_end() == text => Ok(()),
            output => Err(output),
        }
    });

    set(&machine, "");
    eventually(SOON, "it is gone", || {
        match machine.run(&format!("test -e {DROP_IN}")).success() {
            false => Ok(()),
            true => Err("it is there"),
        }
    });
    machine.until_check(CheckId::SshdPassword, Status::Warn);
    assert_eq!(
        methods(&lab, &machine, &stranger),
        "publickey,password,keyboard-interactive"
    );
}

#[test]
fn a_match_block_that_takes_passwords_of_one_of_the_users_names_that_user() {
    let lab = Lab::new();
    let mut machine = lab.launch();
    // Asked first of all, and not concerned.
    let mut key = machine.spec.authorized_keys[0].clone();
    key.user = "root".parse().unwrap();
    machine.push(|spec| spec.authorized_keys.push(key));
    machine.until_ready();
    machine.until_check(CheckId::SshdPassword, Status::Pass);
    let block = |user: &str| {
        machine.ok(&format!(
            "printf 'Match User {user}\\n PasswordAuthentication yes\\n' > /etc/ssh/sshd_config.d/10-match.conf"
        ));
        reload_sshd(&machine);
    };
    block(USER);
    let check = machine.until_check(CheckId::SshdPassword, Status::Warn);
    assert!(
        check.summary.contains(&format!("passwords of {USER},")),
        "{check:?}"
    );
    assert_eq!(check.evidence["users"], serde_json::json!([USER]));
    assert_eq!(methods(&lab, &machine, &lab.stranger()), "publickey,password");
    // Somebody without keys from us is not ours to name.
    block("daemon");
    machine.until_check(CheckId::SshdPassword, Status::Pass);
}

/// With two factors of which one is the password, turning passwords off locks everybody out. sshd itself refuses
/// a configuration where that holds for all; where it holds for one user, only the probe sees it.
#[test]
fn hardening_that_would_lock_somebody_out_is_taken_back() {
    let lab = Lab::new();
    let machine = lab.launch();
    let stranger = lab.stranger();
    for (image, reason) in [
        ("AuthenticationMethods publickey,password", "sshd -t"),
        (
            "Match User ubuntu\\n AuthenticationMethods publickey,password",
            "no longer works",
        ),
    ] {
        set(&machine, "");
        machine.ok(&format!(
            "printf 'PasswordAuthentication yes\\n{image}\\n' > /etc/ssh/sshd_config.d/01-image.conf"
        ));
        reload_sshd(&machine);
        machine.until_ready();
        set(&machine, "[sshd]\\nharden = true\\n");
        let check = eventually(JUDGED, "it is taken back", || {
            let report = machine.try_status()?;
            let check = report.check(CheckId::SshdPassword).cloned().ok_or("none")?;
            match check.evidence.get("drop_in_problem") {
                Some(said) => Ok((said.as_str().unwrap_or_default().to_owned(), check)),
                None => Err(format!("{check:?}")),
            }
        });
        assert!(
            check.0.contains(reason) && check.0.contains("as it was before"),
            "{check:?}"
        );
        assert_eq!(check.1.status, Status::Warn);
        assert!(!machine.run(&format!("test -e {DROP_IN}")).success());
        machine.until_ready();
        // The password is asked for again, after the key.
        let said = ssh(&lab, &machine, &stranger, &lab.path("id"))
            .args(["-o", "BatchMode=yes", "true"])
            .output_text();
        assert!(said.stderr.contains("Permission denied (password)"), "{said:?}");
        // And that is that, until something changes.
        let refused = told(&machine, SSHD_REFUSED);
        machine.ok("touch /etc/ssh/sshd_config.d/01-image.conf");
        machine.status();
        assert_eq!(told(&machine, SSHD_REFUSED), refused);
    }
    // Once the cause is gone it is done.
    machine.ok("echo 'PasswordAuthentication yes' > /etc/ssh/sshd_config.d/01-image.conf");
    reload_sshd(&machine);
    machine.until_check(CheckId::SshdPassword, Status::Pass);
    assert!(logs_in(&lab, &machine, &stranger));
}

#[test]
fn a_main_file_that_includes_no_drop_ins_is_named() {
    let lab = Lab::new();
    let machine = lab.launch();
    machine.ok(
        "sed -i 's/^Include/#Include/' /etc/ssh/sshd_config; echo 'PasswordAuthentication yes' >> /etc/ssh/sshd_config",
    );
    reload_sshd(&machine);
    set(&machine, "[sshd]\\nharden = true\\n");
    let check = eventually(JUDGED, "it is told", || {
        let report = machine.try_status()?;
        let check = report.check(CheckId::SshdPassword).cloned().ok_or("none")?;
        match check.summary.contains("Include") {
            true => Ok(check),
            false => Err(format!("{check:?}")),
        }
    });
    assert_eq!(check.status, Status::Warn);
}

#[test]
fn keys_in_roots_files_let_in_without_touching_the_home_and_move_both_ways() {
    let lab = Lab::new();
    let mut machine = lab.launch();
    let stranger = lab.stranger();
    let home = format!("/home/{USER}/.ssh/authorized_keys");
    let id = lab.public_key("id").to_line();
    machine.ok(&format!("echo '# mine' >> {home}"));
    assert!(machine.ok(&format!("cat {home}")).contains(&id));

    set(&machine, "[keys]\\nfile = \"system\"\\n");
    eventually(SOON, "the home has the user's lines alone", || {
        match machine.ok(&format!("cat {home}")) {
            text if text == "# mine" => Ok(()),
            text => Err(text),
        }
    });
    machine.until_ready();
    let check = machine.status().check(CheckId::KeysInstalled).cloned().unwrap();
    assert_eq!(
        check.evidence["keys"][0]["file"],
        format!("{SYSTEM}/{USER}"),
        "{check:?}"
    );
    assert_eq!(
        machine.ok(&format!("stat -c '%a %U %G' {SYSTEM} {SYSTEM}/{USER}")),
        "755 root root\n644 root root"
    );
    assert!(logs_in(&lab, &machine, &stranger));
    // What the user wrote still counts, and comes first.
    let files = machine.ok("sshd -T | grep -i ^authorizedkeysfile");
    assert_eq!(
        files,
        format!("authorizedkeysfile .ssh/authorized_keys .ssh/authorized_keys2 {SYSTEM}/%u")
    );

    // A home that is not there, and one that nobody may write.
    machine.ok(&format!("mv /home/{USER} /home/away"));
    second_key_works(&lab, &mut machine, &stranger, "without-a-home");
    machine.ok(&format!(
        "mkdir /home/{USER}; mount -t tmpfs -o ro,uid=$(id -u {USER}),mode=0700 none /home/{USER}"
    ));
    second_key_works(&lab, &mut machine, &stranger, "read-only");
    machine.ok(&format!(
        "umount /home/{USER}; rmdir /home/{USER}; mv /home/away /home/{USER}"
    ));

    // A file that somebody changed is put right; one of nobody goes.
    machine.ok(&format!(
        "echo x > {SYSTEM}/{USER}; chmod 666 {SYSTEM}/{USER}; echo x > {SYSTEM}/mallory"
    ));
    eventually(SOON, "put right", || {
        let seen = machine.run(&format!("ls {SYSTEM}; stat -c %a {SYSTEM}/{USER}"));
        match seen.stdout == format!("{USER}\n644\n") {
            true => Ok(()),
            false => Err(seen),
        }
    });
    machine.until_ready();

    // Back to the home.
    set(&machine, "");
    eventually(SOON, "nothing is left", || {
        let seen = machine.run(&format!("ls {SYSTEM} {DROP_IN}"));
        match seen.stdout.trim() {
            "/etc/portcullis/authorized_keys.d:" => Ok(()),
            _ => Err(seen),
        }
    });
    machine.until_ready();
    let text = machine.ok(&format!("cat {home}"));
    assert!(text.contains("portcullis") && text.ends_with("# mine"), "{text}");
    assert!(logs_in(&lab, &machine, &stranger));
}

/// Another key takes the place of the one that let in; then the first one is back.
#[track_caller]
fn second_key_works(lab: &Lab, machine: &mut Machine, stranger: &Outsider, name: &str) {
    let (first, second) = (lab.public_key("id"), lab.new_key(name));
    machine.push(|spec| spec.authorized_keys[0].key = second.clone());
    machine.until_ready();
    let said = ssh(lab, machine, stranger, &lab.path(name))
        .args(["-o", "BatchMode=yes", "id -un"])
        .output_text();
    assert!(said.stdout.trim() == USER, "{name}: {said:?}");
    assert!(
        !logs_in(lab, machine, stranger),
        "{name}: the old key still lets in"
    );
    machine.push(|spec| spec.authorized_keys[0].key = first.clone());
    machine.until_ready();
}

#[test]
fn a_match_block_that_hides_roots_file_is_named_and_leaving_the_spec_removes_it() {
    let lab = Lab::new();
    let mut machine = lab.launch();
    set(&machine, "[keys]\\nfile = \"system\"\\n");
    machine.until_ready();
    machine.ok(&format!(
        "printf 'Match User {USER}\\n AuthorizedKeysFile .ssh/other\\n' > /etc/ssh/sshd_config.d/10-match.conf"
    ));
    let check = machine.until_check(CheckId::KeysInstalled, Status::Fail);
    assert!(
        check.summary.contains("Match") && check.summary.contains(".ssh/other"),
        "{check:?}"
    );
    machine.ok("rm /etc/ssh/sshd_config.d/10-match.conf");
    machine.until_ready();
    machine.push(|spec| spec.authorized_keys.clear());
    eventually(SOON, "the file is gone", || {
        match machine.run(&format!("ls {SYSTEM}")).stdout {
            empty if empty.is_empty() => Ok(()),
            other => Err(other),
        }
    });
}

#[test]
fn each_port_is_asked_and_a_socket_is_an_sshd_that_runs() {
    let lab = Lab::new();
    let machine = lab.launch();
    machine.ok("printf 'Port 22\\nPort 2222\\n' > /etc/ssh/sshd_config.d/10-ports.conf");
    // sshd has not read it yet: one of the ports that it should have does not answer.
    let check = machine.until_check(CheckId::SshdReachable, Status::Fail);
    assert!(check.summary.contains("port 2222"), "{check:?}");
    machine.ok("systemctl restart ssh");
    let check = machine.until_check(CheckId::SshdReachable, Status::Pass);
    assert!(check.summary.contains("22, 2222"), "{check:?}");
    machine.until_check(CheckId::FirewallSshAllowed, Status::Pass);
    let algorithms = machine.status().check(CheckId::SshdAlgorithms).cloned().unwrap();
    assert_eq!(algorithms.evidence["post_quantum"], true, "{algorithms:?}");

    machine.ok("rm /etc/ssh/sshd_config.d/10-ports.conf; systemctl disable --now ssh; systemctl enable --now ssh.socket");
    machine.until_ready();
    let check = machine.until_check(CheckId::SshdRunning, Status::Pass);
    assert_eq!(check.evidence["units"]["ssh.socket"], "active", "{check:?}");
    let stranger = lab.stranger();
    assert!(logs_in(&lab, &machine, &stranger));
    // Passwords go off in an sshd that the socket started.
    machine.ok(
        "echo 'PasswordAuthentication yes' > /etc/ssh/sshd_config.d/10-image.conf; systemctl stop ssh.service",
    );
    assert_eq!(methods(&lab, &machine, &stranger), "publickey,password");
    set(&machine, "[sshd]\\nharden = true\\nrestart = true\\n");
    machine.until_check(CheckId::SshdPassword, Status::Pass);
    assert_eq!(methods(&lab, &machine, &stranger), "publickey");
    // And the socket is what is started again; the first connection, a probe's, then starts the service.
    machine.ok("systemctl stop ssh.socket ssh.service");
    eventually(SOON, "it listens again", || {
        match machine.unit("ssh.socket", "ActiveState").as_str() {
            "active" => Ok(()),
            other => Err(other.to_owned()),
        }
    });
    machine.until_ready();
    let check = machine.status().check(CheckId::SshdRunning).cloned().unwrap();
    assert_eq!(
        check.evidence["last_restart"], "ssh.socket was started",
        "{check:?}"
    );
    assert!(logs_in(&lab, &machine, &stranger));
}

//! Users whom the spec names and the instance lacks.
//!
//! May not live here: the files of users who are there (`login`).

use portcullis_protocol::{AuthorizedKey, CheckId, Status};

use crate::lab::Lab;

fn key(lab: &Lab, user: &str) -> AuthorizedKey {
    AuthorizedKey {
        user: user.parse().unwrap(),
        options: portcullis_protocol::KeyOptions::default(),
        key: lab.public_key("id"),
        expires: None,
    }
}

#[test]
fn a_missing_user_is_named_and_noticed_when_it_comes() {
    let lab = Lab::new();
    let mut machine = lab.launch();
    machine.push(|spec| spec.authorized_keys.push(key(&lab, "alice")));
    let check = machine.until_check(CheckId::KeysInstalled, Status::Fail);
    assert!(check.summary.contains("alice"), "{check:?}");
    assert!(check.remedy.is_some_and(|remedy| remedy.contains("create_users")));
    let report = machine.status();
    assert!(!report.ready);
    // The others are not made to wait for her.
    let keys = machine.ok("cat ~ubuntu/.ssh/authorized_keys");
    assert!(keys.contains(&lab.public_key("id").to_line()), "{keys}");
    machine.ok("useradd -m alice");
    machine.until_ready();
    let keys = machine.ok("cat ~alice/.ssh/authorized_keys");
    assert!(keys.contains(&lab.public_key("id").to_line()), "{keys}");
    assert_eq!(
        machine.ok("stat -c '%a %U' ~alice/.ssh ~alice/.ssh/authorized_keys"),
        "700 alice\n600 alice"
    );
}

/// cloud-init#3829 and its like: one file for two names lets each other's keys in.
#[test]
fn two_names_of_one_user_do_not_fight_over_one_file() {
    let lab = Lab::new();
    let mut machine = lab.launch();
    machine.ok("useradd -o -u $(id -u ubuntu) -g ubuntu -d /home/ubuntu -M -s /bin/bash zed");
    machine.push(|spec| spec.authorized_keys.push(key(&lab, "zed")));
    let check = machine.until_check(CheckId::KeysInstalled, Status::Fail);
    assert!(check.summary.contains("zed and ubuntu are one user"), "{check:?}");
    let file = "/home/ubuntu/.ssh/authorized_keys";
    let before = machine.ok(&format!("stat -c '%i %Y' {file}; cat {file}"));
    assert!(before.contains(&lab.public_key("id").to_line()), "{before}");
    // Whatever wakes the daemon, the file stays.
    machine.ok("touch /etc/ssh/sshd_config");
    let check = machine.until_check(CheckId::KeysAccepted, Status::Fail);
    assert_eq!(check.evidence["accepted"], 1);
    assert_eq!(machine.ok(&format!("stat -c '%i %Y' {file}; cat {file}")), before);
    machine.push(|spec| {
        spec.authorized_keys.pop();
    });
    machine.until_ready();
}

#[test]
fn a_missing_user_is_created_if_the_image_says_so() {
    let lab = Lab::new();
    let mut machine = lab.launch();
    machine.ok(
        "printf '[keys]\\ncreate_users = true\\n' > /etc/portcullis/conf.d/users.toml
        mkdir -p /etc/systemd/system/portcullis.service.d
        cp /usr/share/doc/portcullis/examples/create-users.conf /etc/systemd/system/portcullis.service.d/
        systemctl daemon-reload && systemctl restart portcullis",
    );
    assert_eq!(machine.run("id bob").code, Some(1));
    machine.push(|spec| spec.authorized_keys.push(key(&lab, "bob")));
    machine.until_ready();
    let keys = machine.ok("cat ~bob/.ssh/authorized_keys");
    assert!(keys.contains(&lab.public_key("id").to_line()), "{keys}");
    assert_eq!(machine.ok("stat -c '%a %U' ~bob/.ssh/authorized_keys"), "600 bob");
    // Nobody can log in to the new account with a password.
    assert_eq!(machine.ok("passwd -S bob | cut -d' ' -f2"), "L");
    let id = lab.path("id");
    let id = std::fs::read(id).unwrap();
    assert!(machine.run_with("umask 077; cat > /root/id", &id).success());
    assert_eq!(
        machine
            .ok("ssh -F none -o StrictHostKeyChecking=no -o BatchMode=yes -i /root/id bob@127.0.0.1 id -un"),
        "bob"
    );
}

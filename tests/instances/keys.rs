//! Keys on a running instance: added, revoked, from other sources than the spec, with options.
//!
//! May not live here: files of keys without an instance (`tests/keys`), the spec's own keys (`login`).

use std::path::PathBuf;

use portcullis_protocol::key_report::{Accepted, KeyReport};
use portcullis_protocol::{AuthorizedKey, CheckId, PublicKey, Status};
use portcullis_provision::local::{Output, Outsider};
use serde_json::Value;

use crate::lab::{Lab, Machine, Run, SOON, USER, eventually, host};
use crate::login::ssh;

/// An instance, and a stranger who tries keys.
pub struct Door {
    pub lab: Lab,
    pub machine: Machine,
    stranger: Outsider,
}

impl Door {
    pub fn new() -> Self {
        let lab = Lab::new();
        let machine = lab.launch();
        let stranger = lab.stranger();
        Self {
            lab,
            machine,
            stranger,
        }
    }

    /// What a login with a key of [`Lab::new_key`] comes to.
    pub fn try_login(&self, key: &str) -> Output {
        ssh(&self.lab, &self.machine, &self.stranger, &self.lab.path(key))
            .args(["-o", "BatchMode=yes", "id -un"])
            .output_text()
    }

    #[track_caller]
    pub fn lets_in(&self, key: &str) {
        let output = self.try_login(key);
        assert_eq!(output.stdout.trim(), USER, "{output:?}");
    }

    #[track_caller]
    fn keeps_out(&self, key: &str) {
        let output = self.try_login(key);
        assert_eq!(output.code, Some(255), "{output:?}");
        assert!(
            output.stderr.contains("Permission denied (publickey)"),
            "{output:?}"
        );
    }

    /// `portcullis keys …`, with something on standard input.
    fn keys(&self, arguments: &str, input: &str) -> Output {
        self.machine
            .run_with(&format!("portcullis keys {arguments}"), input.as_bytes())
    }

    fn list(&self) -> Vec<KeyReport> {
        let output = self.keys("list --format json", "");
        let json: Value = serde_json::from_str(&output.stdout).unwrap_or_else(|e| panic!("{e}: {output:?}"));
        serde_json::from_value(json["keys"].clone()).unwrap()
    }

    /// Waits until the daemon lists a key as it should be.
    #[track_caller]
    fn until_listed(&self, key: &PublicKey, expected: impl Fn(&KeyReport) -> bool) -> KeyReport {
        let fingerprint = key.fingerprint();
        eventually(SOON, "the key is listed as it should be", || {
            let list = self.list();
            let found = list.iter().find(|k| k.fingerprint == fingerprint && expected(k));
            found.cloned().ok_or(list)
        })
    }

    /// Waits until nobody names a key any more.
    #[track_caller]
    fn until_gone(&self, key: &PublicKey) {
        let fingerprint = key.fingerprint();
        eventually(SOON, "the key is gone", || {
            let list = self.list();
            match list
                .iter()
                .any(|k| k.fingerprint == fingerprint && k.file.is_some())
            {
                true => Err(list),
                false => Ok(()),
            }
        });
    }
}

fn json(output: &Output) -> Value {
    assert!(output.success(), "{output:?}");
    serde_json::from_str(&output.stdout).unwrap()
}

#[test]
fn keys_are_added_and_revoked_on_the_instance_and_hold_when_the_command_returns() {
    let door = Door::new();
    let (first, second) = (door.lab.public_key("id"), door.lab.new_key("second"));
    door.keeps_out("second");
    let added = json(&door.keys(
        &format!("add --user {USER} --expires 2099-01-01T00:00:00Z --format json -"),
        &second.to_line(),
    ));
    assert_eq!(
        (&added["generation"], &added["changed"]),
        (&2.into(), &true.into())
    );
    door.lets_in("second");
    let listed = door.until_listed(&second, |key| key.accepted == Accepted::Yes);
    assert_eq!((listed.user.as_str(), listed.source.as_str()), (USER, "spec 2"));
    assert_eq!(listed.file, Some(format!("/home/{USER}/.ssh/authorized_keys")));
    assert!(listed.expires.is_some());
    // Again is no change.
    let again = door.keys(
        &format!("add --user {USER} --expires 2099-01-01T00:00:00Z --format json -"),
        &second.to_line(),
    );
    assert_eq!(json(&again)["changed"], false);

    let revoked = json(&door.keys(&format!("revoke {} --format json", second.fingerprint()), ""));
    assert_eq!(revoked["generation"], 3);
    door.keeps_out("second");
    door.lets_in("id");
    assert!(
        door.list()
            .iter()
            .all(|key| key.fingerprint == first.fingerprint())
    );
    let on_disk = door.machine.ok("cat /var/lib/portcullis/spec.json");
    assert!(!on_disk.contains(&second.to_line()), "{on_disk}");

    // The last one is not given up by accident.
    let last = door.keys(&format!("revoke {}", first.fingerprint()), "");
    assert_eq!(last.code, Some(2), "{last:?}");
    assert!(last.stderr.contains("no authorized key is left"), "{last:?}");
    door.lets_in("id");
}

#[test]
fn what_is_no_key_or_would_run_something_is_refused_by_name_and_changes_nothing() {
    let door = Door::new();
    let machine = &door.machine;
    let before =
        machine.ok("sha256sum $(find /var/lib/portcullis -maxdepth 1 -type f | sort) /home/*/.ssh/*");
    let line = door.lab.new_key("second").to_line();
    let add = |arguments: &str, input: &str| door.keys(&format!("add --user {USER} {arguments} -"), input);
    for (output, expected) in [
        (
            add("", &format!("command=\"id >/tmp/x\" {line}")),
            "option \"command\" of a key is not accepted",
        ),
        (
            add("", &format!("environment=\"A=b\" {line}")),
            "option \"environment\"",
        ),
        (
            add("", &format!("{line}\n{line}")),
            "one line without control characters",
        ),
        (
            add("", "-----BEGIN OPENSSH PRIVATE KEY-----"),
            "this is a private key",
        ),
        (add("", &format!("{line} {}", "x".repeat(100_000))), "too long"),
        (add("", ""), "not an OpenSSH public key"),
        (add("--expires 2001-01-01T00:00:00Z", &line), "that time is over"),
        (
            door.keys("add --user 'a b' -", &line),
            "\"a b\" is not a login name",
        ),
        (
            door.keys(&format!("add --user {USER} /no/such/file"), ""),
            "/no/such/file",
        ),
        (
            door.keys("revoke SHA256:nobody", ""),
            "no source names a key \"SHA256:nobody\"",
        ),
    ] {
        assert_eq!(output.code, Some(2), "{expected}: {output:?}");
        assert!(output.stderr.contains(expected), "{expected}: {output:?}");
    }
    // A small RSA key: fit for OpenSSH, not for this image, until it says so.
    host("ssh-keygen")
        .args(["-q", "-t", "rsa", "-b", "2048", "-N", "", "-f"])
        .arg(door.lab.path("small"))
        .succeed();
    let small = door.lab.public_key("small").to_line();
    let output = add("", &small);
    assert_eq!(output.code, Some(2), "{output:?}");
    assert!(
        output
            .stderr
            .contains("authorized_keys[1].key: an RSA key of 2048 bits is too small: at least 3072"),
        "{output:?}"
    );
    let nobody = machine.run(&format!("su {USER} -c 'portcullis keys revoke SHA256:x'"));
    assert_eq!(nobody.code, Some(3), "{nobody:?}");
    assert_eq!(
        machine.ok("sha256sum $(find /var/lib/portcullis -maxdepth 1 -type f | sort) /home/*/.ssh/*"),
        before
    );

    machine.set("keys", "min_rsa_bits = 2048");
    machine.until_ready();
    let output = add("", &small);
    assert!(output.success(), "{output:?}");
    door.lets_in("small");
}

/// Puts keys where a platform's metadata service has them, and boots as a new instance does.
fn boot_with_platform_keys(door: &Door, keys: &[&PublicKey]) {
    let keys: Vec<String> = keys.iter().map(|key| key.to_line()).collect();
    let meta = serde_json::json!({"instance-id": "i-again", "local-hostname": "one", "public-keys": keys});
    let seed = "/var/lib/cloud/seed/nocloud/meta-data";
    let put = door
        .machine
        .run_with(&format!("cat > {seed}"), meta.to_string().as_bytes());
    assert!(put.success(), "{put:?}");
    door.lab.provider.reboot("one").unwrap();
}

#[test]
fn keys_of_credentials_and_of_cloud_init_hold_and_say_where_they_come_from() {
    let mut door = Door::new();
    let (spec, credential) = (door.lab.public_key("id"), door.lab.new_key("credential"));
    let (platform, both) = (door.lab.new_key("platform"), door.lab.new_key("both"));
    door.machine.ok(&format!(
        "mkdir -p /etc/systemd/system/portcullis.service.d
        printf '[Service]\\nSetCredential=portcullis.authorized_keys.{USER}:%s\\n' '{}' \
            > /etc/systemd/system/portcullis.service.d/keys.conf
        printf '[keys]\\ncloud_init_user = \"{USER}\"\\n' > /etc/portcullis/conf.d/keys.toml",
        format_args!("{}\\n{}", credential.to_line(), both.to_line())
    ));
    boot_with_platform_keys(&door, &[&platform, &both, &spec]);
    door.machine = door.lab.machine("one");
    let place = format!("/home/{USER}/.ssh/authorized_keys");
    for (key, source) in [
        (&spec, "spec 1".to_owned()),
        (
            &credential,
            format!("credential portcullis.authorized_keys.{USER}"),
        ),
        // Two name it: the first of them holds.
        (&both, format!("credential portcullis.authorized_keys.{USER}")),
        (&platform, "cloud-init".to_owned()),
    ] {
        let listed = door.until_listed(key, |listed| listed.accepted == Accepted::Yes);
        assert_eq!((listed.source, listed.file), (source, Some(place.clone())));
    }
    for name in ["id", "credential", "platform", "both"] {
        door.lets_in(name);
    }

    // Revoked is revoked, whoever names it, and stays so.
    for key in [&platform, &both] {
        let output = door.keys(&format!("revoke {}", key.fingerprint()), "");
        assert!(output.success(), "{output:?}");
    }
    let kept_out = |door: &Door| {
        door.until_gone(&platform);
        door.keeps_out("platform");
        door.keeps_out("both");
        door.lets_in("credential");
        let listed = door.until_listed(&platform, |key| key.file.is_none());
        assert!(
            listed
                .reason
                .is_some_and(|reason| reason.contains("revoked on this instance"))
        );
    };
    kept_out(&door);
    door.lab.provider.reboot("one").unwrap();
    door.machine = door.lab.machine("one");
    door.until_listed(&credential, |key| key.accepted == Accepted::Yes);
    kept_out(&door);

    // Unless somebody names it on purpose.
    let added = door.keys(&format!("add --user {USER} -"), &both.to_line());
    assert!(added.success(), "{added:?}");
    door.lets_in("both");
}

/// Signs a user key, as an organisation's authority does.
fn certify(lab: &Lab, authority: &str, key: &str) -> PathBuf {
    host("ssh-keygen")
        .args(["-q", "-I", "somebody", "-n", USER, "-V", "+5m", "-s"])
        .arg(lab.path(authority))
        .arg(lab.path(&format!("{key}.pub")))
        .succeed();
    lab.path(&format!("{key}-cert.pub"))
}

#[test]
fn options_narrow_a_login_and_an_authority_lets_in_whom_it_signed() {
    let mut door = Door::new();
    for name in ["authority", "other-authority", "signed", "forged", "elsewhere"] {
        door.lab.new_key(name);
    }
    let key = |line: String| -> AuthorizedKey {
        serde_json::from_value(serde_json::json!({"user": USER, "key": line})).unwrap()
    };
    certify(&door.lab, "authority", "signed");
    certify(&door.lab, "other-authority", "forged");
    door.keeps_out("signed");
    let authority = door.lab.public_key("authority");
    let elsewhere = door.lab.public_key("elsewhere");
    let narrowed = key(format!("from=\"192.0.2.0/24\" {elsewhere}"));
    let signs = key(format!("cert-authority,principals=\"{USER}\" {authority}"));
    let mut spec = door
        .machine
        .next(|spec| spec.authorized_keys.extend([narrowed, signs]));
    let output = door.machine.apply(&spec);
    assert!(output.success(), "{output:?}");
    door.lets_in("signed");
    door.keeps_out("forged");
    // The authority itself is nobody, and nobody can be asked about it.
    door.keeps_out("authority");
    door.keeps_out("elsewhere");
    for key in [&authority, &elsewhere] {
        let listed = door.until_listed(key, |listed| listed.accepted == Accepted::NotAsked);
        assert!(listed.reason.is_some() && listed.file.is_some(), "{listed:?}");
    }
    let check = door.machine.until_check(CheckId::KeysAccepted, Status::Pass);
    assert_eq!(
        (&check.evidence["accepted"], &check.evidence["not_asked"]),
        (&1.into(), &2.into())
    );

    // The same key from where it may come.
    spec.generation = spec.generation.next();
    spec.authorized_keys[1] = key(format!("from=\"10.0.0.0/8,fd00::/8\" {elsewhere}"));
    let output = door.machine.apply(&spec);
    assert!(output.success(), "{output:?}");
    door.lets_in("elsewhere");
}

#[test]
fn an_audit_shows_every_key_of_everybody_and_what_is_odd() {
    let door = Door::new();
    let machine = &door.machine;
    let (own, roots) = (door.lab.new_key("own"), door.lab.new_key("roots"));
    machine.ok(&format!(
        "echo 'command=\"/bin/date\" {own}' >> /home/{USER}/.ssh/authorized_keys
        mkdir -pm 700 /root/.ssh && echo '{roots}' > /root/.ssh/authorized_keys2
        useradd -m -s /usr/sbin/nologin closed && mkdir ~closed/.ssh && echo '{own}' > ~closed/.ssh/authorized_keys"
    ));
    let audit = json(&door.keys("audit --format json", ""));
    let mut lines = Vec::new();
    for user in audit["users"].as_array().unwrap() {
        for file in user["files"].as_array().unwrap() {
            for line in file["lines"].as_array().unwrap() {
                let text = |value: &Value| value.as_str().unwrap().to_owned();
                let place = format!("{} {}:{}", text(&user["user"]), text(&file["path"]), line["line"]);
                let notes = line["notes"].to_string();
                lines.push((place, text(&line["fingerprint"]), line["ours"] == true, notes));
            }
        }
    }
    let file = format!("{USER} /home/{USER}/.ssh/authorized_keys");
    let expected = [
        (
            "root /root/.ssh/authorized_keys2:1".to_owned(),
            roots.fingerprint(),
            false,
            "[]",
        ),
        (
            format!("{file}:2"),
            door.lab.public_key("id").fingerprint(),
            true,
            "[]",
        ),
        (
            format!("{file}:4"),
            own.fingerprint(),
            false,
            "[\"runs a command of its own\"]",
        ),
    ];
    let expected = expected.map(|(place, key, ours, notes)| (place, key, ours, notes.to_owned()));
    // cloud-init gives root a key of its own on some releases; who can't log in is not there.
    for line in &expected {
        assert!(lines.contains(line), "{line:?}: {lines:#?}");
    }
    assert!(
        !lines.iter().any(|(place, ..)| place.starts_with("closed")),
        "{lines:#?}"
    );
    let text = door.keys("audit", "").stdout;
    assert!(
        text.contains("runs a command of its own") && text.contains(&roots.fingerprint()),
        "{text}"
    );

    // A home that sshd does not trust is told with what to do.
    machine.ok(&format!("chmod g+w /home/{USER}"));
    let text = door.keys("audit", "").stdout;
    assert!(text.contains("chmod go-w"), "{text}");
}

/// How often sshd was asked about a user since the daemon started, by sshd's own log.
fn asked(machine: &Machine, user: &str) -> usize {
    let count = format!(
        "journalctl --sync; journalctl -b -o cat -t sshd | grep -c 'authenticating user {user} 127.99' || true"
    );
    machine.ok(&count).parse().unwrap()
}

#[test]
fn a_change_in_one_home_asks_sshd_nothing_about_others_and_touches_no_file() {
    let mut door = Door::new();
    door.machine.ok("useradd -m alice");
    let key = door.lab.public_key("id");
    door.machine.push(|spec| {
        spec.authorized_keys.push(AuthorizedKey {
            user: "alice".parse().unwrap(),
            options: Default::default(),
            key,
            expires: None,
        });
    });
    let machine = &door.machine;
    machine.until_ready();
    let files = format!("/home/alice/.ssh/authorized_keys /home/{USER}/.ssh/authorized_keys");
    let stat = || machine.ok(&format!("stat -c '%i %Y %Z %n' /home/*/.ssh {files}"));
    // sshd writes its log after it answered.
    eventually(SOON, "both were asked about", || {
        match (asked(machine, USER), asked(machine, "alice")) {
            (ubuntu, alice) if ubuntu > 0 && alice > 0 => Ok(()),
            other => Err(other),
        }
    });
    let before = stat();
    // A look that finds nothing changed; the end of the boot may have one of everything meanwhile.
    eventually(SOON, "sshd is asked about alice alone", || {
        let (ubuntu, alice) = (asked(machine, USER), asked(machine, "alice"));
        machine.ok("touch /home/alice/.ssh/other; touch -c /home/alice/.ssh/authorized_keys");
        eventually(SOON, "sshd is asked about alice", || {
            match asked(machine, "alice") {
                now if now > alice => Ok(()),
                now => Err(now),
            }
        });
        match asked(machine, USER) {
            now if now == ubuntu => Ok(()),
            now => Err((ubuntu, now)),
        }
    });
    let contents = |stat: &str| -> Vec<String> {
        let inodes = stat
            .lines()
            .map(|line| line.split(' ').next().unwrap().to_owned());
        inodes.collect()
    };
    assert_eq!(contents(&stat()), contents(&before), "a file was replaced");
    // When sshd itself may have changed, all are asked about.
    let ubuntu = asked(machine, USER);
    machine.ok("touch /etc/ssh/sshd_config");
    eventually(SOON, "sshd is asked about everybody", || {
        match asked(machine, USER) {
            now if now > ubuntu => Ok(()),
            now => Err(now),
        }
    });
}

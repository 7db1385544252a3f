//! The host keys of an instance: told to whoever asks the right one, and watched.
//!
//! May not live here: keys that let users in (`login`).

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use portcullis_protocol::{Check, CheckId, Status};
use portcullis_provision::known_hosts::{KnownHosts, Login, Ssh};
use portcullis_provision::local::Output;
use serde_json::Value;

use crate::lab::{Lab, Machine, Run, SOON, USER, eventually, host};
use crate::login::reload_sshd;

const KEY: &str = "/etc/ssh/ssh_host_ed25519_key";
const STATE: &str = "/var/lib/portcullis/host-keys.json";
const CHANGED: &str = "5b3f2d0c1a5e4c6e8d0f7a9b1c2d3e31";
const TRUSTED: &str = "5b3f2d0c1a5e4c6e8d0f7a9b1c2d3e32";

/// What an alert may take, all in all; it is printed how long it took.
const ALERT_TIME: Duration = Duration::from_secs(3);

/// `portcullisctl`, as the package's build made it.
pub fn portcullisctl(lab: &Lab, arguments: &[&str]) -> Command {
    let built = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/release/portcullisctl");
    let named = std::env::var_os("PORTCULLIS_TEST_CTL").map_or(built, PathBuf::from);
    assert!(named.is_file(), "no {}: run `make deb`", named.display());
    let mut command = host(named.to_str().unwrap());
    command
        .arg("--state-dir")
        .arg(lab.provider.state_dir())
        .args(arguments);
    command
}

/// The real ssh with a file of known hosts, from the control plane's side.
fn ssh(lab: &Lab, known_hosts: &Path, address: &str) -> Output {
    lab.beside("ssh")
        .args([
            "-F",
            "none",
            "-o",
            "StrictHostKeyChecking=yes",
            "-o",
            "BatchMode=yes",
        ])
        .args([
            "-o",
            "IdentitiesOnly=yes",
            "-o",
            "GlobalKnownHostsFile=none",
            "-i",
        ])
        .arg(lab.path("id"))
        .arg("-o")
        .arg(format!("UserKnownHostsFile={}", known_hosts.display()))
        .args([&format!("{USER}@{address}"), "id -un"])
        .output_text()
}

/// `portcullisctl ssh one -- COMMAND` with the lab's key.
fn login(lab: &Lab, command: &str) -> Output {
    let id = lab.path("id");
    portcullisctl(lab, &["ssh", "one", "--identity"])
        .arg(id)
        .args(["--", "-o", "BatchMode=yes", command])
        .output_text()
}

fn fingerprint(machine: &Machine) -> String {
    machine.ok(&format!("ssh-keygen -lf {KEY}.pub | cut -d' ' -f2"))
}

/// Another host key in place of the instance's, as sshd shows it then.
fn swap(machine: &Machine) -> String {
    machine.ok(&format!(
        "mkdir -p /root/old && mv {KEY} {KEY}.pub /root/old/ && ssh-keygen -q -t ed25519 -N '' -f {KEY} \
         && systemctl restart ssh"
    ));
    fingerprint(machine)
}

fn listed(check: &Check, name: &str) -> Vec<String> {
    let list = check.evidence.get(name).and_then(Value::as_array);
    let list = list.unwrap_or_else(|| panic!("no {name}: {check:#?}"));
    list.iter()
        .map(|text| text.as_str().unwrap().to_owned())
        .collect()
}

fn entries(machine: &Machine, id: &str) -> Vec<Value> {
    let text = machine.ok(&format!("journalctl -b -o json MESSAGE_ID={id}"));
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

#[track_caller]
fn alerts(machine: &Machine, old: &str, new: &str) {
    let check = machine.until_check(CheckId::SshdHostKeys, Status::Fail);
    assert_eq!(listed(&check, "old"), [format!("ssh-ed25519 {old}")]);
    assert_eq!(listed(&check, "new"), [format!("ssh-ed25519 {new}")]);
    assert!(!check.required && check.remedy.unwrap().contains("trust-host-keys"));
}

#[test]
fn nobody_says_yes_to_an_unknown_host_key() {
    let lab = Lab::new();
    let machine = lab.launch();
    let check = machine.until_check(CheckId::SshdHostKeys, Status::Pass);
    assert_eq!(check.evidence["ports"], serde_json::json!([22]), "{check:#?}");
    let file = lab.path("known_hosts");

    // Without the lines, ssh does not go on.
    fs::write(&file, "").unwrap();
    for address in machine.instance.addresses() {
        let refused = ssh(&lab, &file, &address.to_string());
        assert!(
            refused.stderr.contains("Host key verification failed"),
            "{refused:?}"
        );
    }
    let lines = portcullisctl(&lab, &["known-hosts", "one"]).succeed();
    assert_eq!(lines, portcullisctl(&lab, &["known-hosts"]).succeed());
    for kind in ["ed25519", "rsa", "ecdsa"] {
        let key = machine.ok(&format!("cut -d' ' -f1,2 /etc/ssh/ssh_host_{kind}_key.pub"));
        assert!(lines.contains(&format!(",one {key}\n")), "{kind}: {lines}");
    }
    fs::write(&file, &lines).unwrap();
    for address in machine.instance.addresses() {
        let output = ssh(&lab, &file, &address.to_string());
        assert_eq!(output.stdout, format!("{USER}\n"), "{output:?}");
    }

    // ssh-keygen reads them, by each name.
    for name in ["one".to_owned(), machine.v4().to_string()] {
        let mut find = host("ssh-keygen");
        let found = find.args(["-F", &name, "-l", "-f"]).arg(&file).succeed();
        assert!(found.contains(&fingerprint(&machine)), "{found}");
    }
    let json = portcullisctl(&lab, &["known-hosts", "one", "--format", "json"]).succeed();
    let json: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["keys"].as_array().unwrap().len(), 3, "{json:#}");
    assert_eq!(json["id"], machine.instance.id());

    let missing = portcullisctl(&lab, &["known-hosts", "two"]).output_text();
    assert_eq!(missing.code, Some(2), "{missing:?}");

    assert_eq!(login(&lab, "true").code, Some(0));
    assert_eq!(login(&lab, "exit 7").code, Some(7));
    assert_eq!(login(&lab, "id -un").stdout, format!("{USER}\n"));
    let files = fs::read_dir(lab.provider.state_dir().join("instances/one")).unwrap();
    let left = files.flatten().map(|file| file.file_name());
    assert!(
        !left
            .into_iter()
            .any(|name| name.to_string_lossy().contains("known_hosts"))
    );
}

#[test]
fn another_port_is_known_by_its_number() {
    let lab = Lab::new();
    let mut machine = lab.launch();
    machine.push(|spec| spec.firewall.ingress.push(crate::lab::allow("2222/tcp")));
    machine.ok("echo 'Port 2222' > /etc/ssh/sshd_config.d/port.conf && systemctl restart ssh");
    machine.until_ready();
    let lines = eventually(SOON, "the port is told", || {
        let lines = portcullisctl(&lab, &["known-hosts", "one"]).output_text();
        let first = format!("[{}]:2222,", machine.v4());
        if lines.stdout.starts_with(&first) {
            Ok(lines.stdout)
        } else {
            Err(lines)
        }
    });
    assert!(lines.contains(",[one]:2222 ssh-ed25519 "), "{lines}");
    assert_eq!(login(&lab, "id -un").stdout, format!("{USER}\n"));
}

#[test]
fn a_swapped_host_key_is_refused_told_and_stays_so_until_it_is_trusted() {
    let lab = Lab::new();
    let machine = lab.launch();
    machine.until_check(CheckId::SshdHostKeys, Status::Pass);
    let file = lab.path("known_hosts");
    fs::write(&file, portcullisctl(&lab, &["known-hosts", "one"]).succeed()).unwrap();
    let address = machine.v4().to_string();
    assert!(ssh(&lab, &file, &address).success());
    let mut instance = lab.provider.get("one").unwrap();
    let certificate = lab.provider.client_certificate().unwrap();
    let before = KnownHosts::ask(&mut instance, &certificate).unwrap();

    let old = fingerprint(&machine);
    let start = Instant::now();
    let new = swap(&machine);
    alerts(&machine, &old, &new);
    println!("from before the swap to the alert: {:?}", start.elapsed());
    assert!(start.elapsed() < ALERT_TIME, "{:?}", start.elapsed());
    let refused = ssh(&lab, &file, &address);
    assert!(
        refused.stderr.contains("REMOTE HOST IDENTIFICATION HAS CHANGED"),
        "{refused:?}"
    );
    assert!(machine.until_ready().ready);
    let told = entries(&machine, CHANGED);
    assert_eq!(told[0]["OLD"], format!("ssh-ed25519 {old}"), "{told:#?}");
    assert_eq!(told[0]["NEW"], format!("ssh-ed25519 {new}"), "{told:#?}");

    // Nobody is given the new one, and who was given the old ones before is not let near it.
    let none = portcullisctl(&lab, &["known-hosts"]).output_text();
    assert_eq!((none.code, none.stdout.as_str()), (Some(1), ""), "{none:?}");
    assert!(
        none.stderr.contains(&new) && none.stderr.contains("sshd.host-keys is fail"),
        "{none:?}"
    );
    assert_eq!(login(&lab, "true").code, Some(1));
    let late = Login {
        identity: Some(lab.path("id")),
        arguments: vec!["true".into()],
        ..Login::default()
    };
    let mut late = Ssh::new(&instance, &before, &late).unwrap();
    let late = late.command.output_text();
    assert_eq!(late.code, Some(255), "{late:?}");
    assert!(
        late.stderr.contains("REMOTE HOST IDENTIFICATION HAS CHANGED"),
        "{late:?}"
    );

    // Neither a new daemon nor a new boot takes it for granted.
    let remembered = machine.ok(&format!("cat {STATE}"));
    machine.ok("systemctl restart portcullis");
    alerts(&machine, &old, &new);
    lab.provider.reboot("one").unwrap();
    let machine = lab.machine("one");
    machine.until_ready();
    alerts(&machine, &old, &new);
    assert_eq!(machine.ok(&format!("cat {STATE}")), remembered);

    let check = machine.run("portcullis check --format json").stdout;
    assert!(check.contains(&new), "{check}");
    assert_eq!(machine.ok(&format!("cat {STATE}")), remembered);

    assert_eq!(
        machine
            .run(&format!("su {USER} -c 'portcullis keys trust-host-keys'"))
            .code,
        Some(3)
    );
    let said = machine.ok("portcullis keys trust-host-keys");
    assert!(said.contains(&new) && !said.contains(&old), "{said}");
    let check = machine.status().check(CheckId::SshdHostKeys).unwrap().clone();
    assert_eq!(check.status, Status::Pass, "{check:#?}");
    let told = entries(&machine, TRUSTED);
    assert!(
        told.len() == 1 && told[0]["NEW"].as_str().unwrap().contains(&new),
        "{told:#?}"
    );
    assert!(told[0]["OLD"].as_str().unwrap().contains(&old), "{told:#?}");
    assert_eq!(login(&lab, "true").code, Some(0));
    let again = machine.ok("portcullis keys trust-host-keys --format json");
    let again: Value = serde_json::from_str(&again).unwrap();
    assert_eq!(again["changed"], false);
    assert_eq!(machine.ok(&format!("stat -c '%a %U' {STATE}")), "600 root");
}

/// What is on disk stays as it was, so that only the handshake can tell.
#[test]
fn a_host_key_that_is_none_of_those_on_disk_is_told() {
    let lab = Lab::new();
    let machine = lab.launch();
    machine.until_check(CheckId::SshdHostKeys, Status::Pass);
    let new = machine.ok(
        "ssh-keygen -q -t ed25519 -N '' -f /root/other && ssh-keygen -lf /root/other.pub | cut -d' ' -f2",
    );
    let told = |machine: &Machine| {
        let check = machine.until_check(CheckId::SshdHostKeys, Status::Fail);
        let stray = format!("ssh-ed25519 {new}");
        assert_eq!(check.evidence["not_on_disk"], stray, "{check:#?}");
        assert_eq!(listed(&check, "new"), [stray]);
        assert!(listed(&check, "old").is_empty());
        assert!(machine.until_ready().ready);
        // It can't be taken for good as long as nobody can read it.
        let refused = machine.run("portcullis keys trust-host-keys");
        assert_eq!(refused.code, Some(1), "{refused:?}");
        assert!(refused.stderr.contains(&new), "{refused:?}");
    };
    // Nothing below /etc/ssh changes: the restart is what is noticed.
    machine.ok("echo 'SSHD_OPTS=\"-h /root/other\"' > /etc/default/ssh && systemctl restart ssh");
    told(&machine);
    machine.ok("rm /etc/default/ssh && systemctl restart ssh");
    machine.until_check(CheckId::SshdHostKeys, Status::Pass);

    // Only the private half changes.
    machine.ok(&format!("cp {KEY} /root/key && cat /root/other > {KEY}"));
    reload_sshd(&machine);
    told(&machine);
    machine.ok(&format!("cat /root/key > {KEY}"));
    reload_sshd(&machine);
    machine.until_check(CheckId::SshdHostKeys, Status::Pass);

    // One that is removed is missed.
    machine.ok("mv /etc/ssh/ssh_host_rsa_key.pub /root/");
    let gone = machine.until_check(CheckId::SshdHostKeys, Status::Fail);
    assert!(listed(&gone, "old")[0].starts_with("ssh-rsa "), "{gone:#?}");
    machine.ok("mv /root/ssh_host_rsa_key.pub /etc/ssh/");
    machine.until_check(CheckId::SshdHostKeys, Status::Pass);
}

#[test]
fn a_damaged_memory_of_host_keys_is_unknown_until_somebody_looks() {
    let lab = Lab::new();
    let machine = lab.launch();
    machine.until_check(CheckId::SshdHostKeys, Status::Pass);
    machine.ok(&format!("echo '{{' > {STATE} && systemctl restart portcullis"));
    machine.until_ready();
    let check = machine.until_check(CheckId::SshdHostKeys, Status::Unknown);
    assert!(
        check.summary.contains(STATE) && check.summary.contains("damaged"),
        "{check:#?}"
    );
    assert_eq!(machine.ok(&format!("cat {STATE}")), "{");
    assert_eq!(
        portcullisctl(&lab, &["known-hosts", "one"]).output_text().code,
        Some(1)
    );
    machine.ok("portcullis keys trust-host-keys");
    machine.until_check(CheckId::SshdHostKeys, Status::Pass);
    assert!(
        portcullisctl(&lab, &["known-hosts", "one"])
            .output_text()
            .success()
    );
}

/// An image of an instance that became another one: cloud-init makes new host keys, and they are its own.
#[test]
fn another_instance_id_starts_anew() {
    let lab = Lab::new();
    let mut machine = lab.launch();
    machine.until_check(CheckId::SshdHostKeys, Status::Pass);
    let old = fingerprint(&machine);
    let new = swap(&machine);
    alerts(&machine, &old, &new);
    machine.push(|spec| spec.instance.id = "i-other".parse().unwrap());
    let check = machine.until_check(CheckId::SshdHostKeys, Status::Pass);
    assert_eq!(check.evidence["instance"], "i-other");
    let state = machine.ok(&format!("cat {STATE}"));
    assert!(
        state.contains("i-other") && state.contains(&new) && !state.contains(&old),
        "{state}"
    );
}

/// sshd shows a key that nobody else may read: without its public file it is a stranger's.
#[test]
fn a_host_key_without_its_public_file_is_told_with_the_way_to_write_it() {
    let lab = Lab::new();
    let machine = lab.launch();
    machine.until_check(CheckId::SshdHostKeys, Status::Pass);
    machine.ok(&format!("rm {KEY}.pub"));
    let check = machine.until_check(CheckId::SshdHostKeys, Status::Fail);
    let remedy = check.remedy.unwrap();
    let command = remedy.split('`').nth(1).unwrap();
    assert_eq!(command, format!("ssh-keygen -y -f {KEY} > {KEY}.pub"));
    machine.ok(command);
    machine.until_check(CheckId::SshdHostKeys, Status::Pass);
}

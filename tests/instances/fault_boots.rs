//! Boots that go wrong: lockdown fails, the disk of the state does not come, settings are damaged. The gate is shut or
//! what was accepted, the journal says why, and the instance is ready once the cause is gone.
//!
//! May not live here: boots that go well (`boot`), faults while it runs (`faults`).

use std::time::Duration;

use portcullis_protocol::{CheckId, Report, Status};
use portcullis_provision::reach::{Reached, Transport, listen_inside};

use crate::lab::{Lab, Machine, eventually, vantage};

use Reached::{Filtered, Open};
use Transport::Tcp;

/// How long a step of a boot may take on a loaded machine.
const BOOT_STEP: Duration = Duration::from_secs(60);

/// Begins a boot that may not come to its end, and gives the instance as it is then.
#[track_caller]
fn begin_boot(lab: &Lab, machine: &Machine) -> Machine {
    let before = machine.instance.boots();
    machine.instance.exec(&["systemctl", "reboot"]).unwrap();
    eventually(BOOT_STEP, "another boot", || {
        let now = lab.machine("one");
        let answers = now.instance.exec(&["systemctl", "show", "-P", "Version"]);
        match answers {
            Ok(said) if said.success() && now.instance.boots() > before => Ok(now),
            other => Err(format!("{} boots, {other:?}", now.instance.boots())),
        }
    })
}

/// Waits until a script succeeds inside.
#[track_caller]
fn until(machine: &Machine, script: &str) {
    eventually(BOOT_STEP, script, || {
        let said = machine.run(script);
        if said.success() { Ok(()) } else { Err(said) }
    });
}

/// Waits until the boot that was begun is over, and the daemon ready.
#[track_caller]
fn until_booted(machine: &Machine) -> Report {
    until(
        machine,
        "systemctl is-system-running --wait | grep -Eq 'running|degraded'",
    );
    machine.until_ready()
}

#[track_caller]
fn is_held_back(machine: &Machine, what: &str) {
    assert_eq!(
        machine.unit("portcullis-lockdown", "ActiveState"),
        "activating",
        "{what}"
    );
    for unit in [
        "network-pre.target",
        "systemd-networkd",
        "cloud-init-local",
        "ssh",
        "portcullis",
    ] {
        assert_eq!(machine.unit(unit, "ActiveState"), "inactive", "{what}: {unit}");
    }
    let links = machine.ok("ip -o link show up");
    assert!(!links.contains("eth0"), "{what}: {links}");
    let addresses = machine.ok("ip -o address show dev eth0 scope global");
    assert_eq!(addresses, "", "{what}");
}

/// The kernel refuses the gate: its unit may not speak to it.
const REFUSED: &str = "/etc/systemd/system/portcullis-lockdown.service.d/refused.conf";

#[test]
fn a_lockdown_that_fails_holds_the_network_back_and_says_why() {
    let lab = Lab::new();
    let machine = lab.launch();
    let stranger = lab.stranger();
    let from = vantage(&stranger);
    assert_eq!(machine.seen_from(&from, Tcp, 22), [Open; 2]);
    assert!(machine.ok("ip -o link show up").contains("eth0"));
    machine.ok(&format!(
        "mkdir -p $(dirname {REFUSED}) && \
         printf '[Service]\\nRestrictAddressFamilies=\\nRestrictAddressFamilies=AF_UNIX\\n' >{REFUSED}"
    ));
    let machine = begin_boot(&lab, &machine);
    let told = "journalctl -b -u portcullis-lockdown -o cat";
    // It is tried more than once.
    until(
        &machine,
        &format!("[ $({told} | grep -c 'next try in 5 s') -gt 1 ]"),
    );
    let told = machine.ok(told);
    assert!(told.contains("Address family not supported"), "no reason: {told}");
    let where_to = machine.unit("portcullis-lockdown", "StandardError");
    assert_eq!(where_to, "journal+console");
    is_held_back(&machine, "refused");
    assert_eq!(machine.seen_from(&from, Tcp, 22), [Filtered; 2]);

    // Once it succeeds the boot goes on by itself.
    machine.ok(&format!(
        "rm {REFUSED} && systemctl daemon-reload && systemctl restart portcullis-lockdown"
    ));
    until_booted(&machine);
    assert_eq!(machine.seen_from(&from, Tcp, 22), [Open; 2]);
}

/// A program that is damaged may run all the same, as a shell runs an empty file: only a gate ends the wait.
#[test]
fn a_boot_without_lockdown_waits_shut_and_goes_on_once_it_can() {
    let lab = Lab::new();
    let machine = lab.launch();
    let stranger = lab.stranger();
    let from = vantage(&stranger);
    assert_eq!(machine.seen_from(&from, Tcp, 22), [Open; 2]);
    let table = machine.table();
    // As a power cut may leave it.
    machine.ok("mv /usr/bin/portcullis /usr/bin/away && install -m 755 /dev/null /usr/bin/portcullis");
    let machine = begin_boot(&lab, &machine);
    let waits =
        "journalctl -b -u portcullis-lockdown -o cat | grep -c 'the network waits until lockdown succeeds'";
    let next_try = || {
        let tries = machine.run(waits).stdout.trim().parse::<u32>().unwrap_or(0);
        until(&machine, &format!("[ $({waits}) -gt {tries} ]"));
    };
    let is_shut = |what: &str| {
        is_held_back(&machine, what);
        assert_eq!(machine.seen_from(&from, Tcp, 22), [Filtered; 2], "{what}");
    };
    next_try();
    is_shut("empty");
    for (what, damage) in [
        (
            "of zeros",
            "head -c 100000 /dev/zero > new && chmod 755 new && mv new portcullis",
        ),
        (
            "half of it",
            "head -c 1000000 away > new && chmod 755 new && mv new portcullis",
        ),
        ("gone", "rm portcullis"),
    ] {
        machine.ok(&format!("cd /usr/bin && {damage}"));
        next_try();
        is_shut(what);
    }
    machine.ok("mv /usr/bin/away /usr/bin/portcullis");
    until_booted(&machine);
    assert_eq!(machine.table(), table);
    assert_eq!(machine.seen_from(&from, Tcp, 22), [Open; 2]);
}

#[test]
fn a_boot_without_the_disk_of_the_state_is_shut_and_recovers_with_it() {
    let lab = Lab::new();
    let mut machine = lab.launch();
    let stranger = lab.stranger();
    let from = vantage(&stranger);
    machine.push(|_| ());
    let (generation, table) = (machine.spec.generation.get(), machine.table());
    let key = machine.ok("sha256sum /var/lib/portcullis/tls.key");
    // A disk of its own, as systemd sees it; away when the boot wants it. (systemd makes a folder that is to be bound
    // and is not there, but not one that a link leads to.)
    machine.ok("systemctl stop portcullis portcullis-front
        cp -a /var/lib/portcullis /root/disk && rm -r /var/lib/portcullis && mkdir -m 700 /var/lib/portcullis
        echo '/root/link /var/lib/portcullis none bind,nofail 0 0' >> /etc/fstab
        ln -s /root/away/disk /root/link && systemctl daemon-reload");
    let machine = begin_boot(&lab, &machine);
    until(&machine, "systemctl is-active ssh");
    listen_inside(&machine.instance, &[(Tcp, 9000)]).unwrap();
    assert_eq!(machine.unit("portcullis-lockdown", "ActiveState"), "active");
    assert_eq!(machine.unit("var-lib-portcullis.mount", "ActiveState"), "failed");
    assert_eq!(machine.unit("portcullis", "ActiveState"), "inactive");
    for port in [22, 9000] {
        assert_eq!(machine.seen_from(&from, Tcp, port), [Filtered; 2]);
    }
    let baseline = machine.table();
    assert!(
        baseline.contains("policy drop") && !baseline.contains("dport 22"),
        "{baseline}"
    );
    // Out is open.
    for address in stranger.addresses() {
        machine.ok(&format!("ping -c 1 -W 5 {address}"));
    }
    let said = machine.run("portcullis status");
    assert!(said.stdout.contains("NO DAEMON"), "{said:?}");
    assert!(said.stdout.contains("portcullis.service is inactive"), "{said:?}");
    assert_eq!(machine.unit("var-lib-portcullis.mount", "Result"), "exit-code");
    // Nothing was written beneath it, where it would be covered later.
    assert_eq!(machine.ok("ls -A /var/lib/portcullis"), "");

    machine.ok("ln -sfn /root/disk /root/link && systemctl start var-lib-portcullis.mount");
    assert_eq!(until_booted(&machine).generation, Some(generation));
    assert_eq!(
        (
            machine.table(),
            machine.ok("sha256sum /var/lib/portcullis/tls.key")
        ),
        (table, key)
    );
    assert_eq!(machine.seen_from(&from, Tcp, 22), [Open; 2]);
    assert_eq!(machine.seen_from(&from, Tcp, 9000), [Filtered; 2]);
}

#[test]
fn damaged_settings_at_a_boot_and_state_that_is_deleted_leave_an_instance_that_is_reached() {
    let lab = Lab::new();
    let mut machine = lab.launch();
    let stranger = lab.stranger();
    let from = vantage(&stranger);
    machine.push(|_| ());
    let (generation, table) = (machine.spec.generation.get(), machine.table());
    let key = |machine: &Machine| machine.ok("tr -d '\\n' < /var/lib/portcullis/tls.key | sha256sum");
    let pinned = key(&machine);

    machine.ok("printf '[firewall' > /etc/portcullis/conf.d/bad.toml");
    let machine = begin_boot(&lab, &machine);
    until(&machine, "systemctl is-active ssh");
    // The daemon is tried again and again, and the gate is what was accepted.
    until(&machine, "[ $(systemctl show -P NRestarts portcullis) -gt 1 ]");
    listen_inside(&machine.instance, &[(Tcp, 9000)]).unwrap();
    assert_eq!(machine.table(), table);
    assert_eq!(machine.seen_from(&from, Tcp, 22), [Open; 2]);
    assert_eq!(machine.seen_from(&from, Tcp, 9000), [Filtered; 2]);
    for unit in ["portcullis", "portcullis-lockdown"] {
        let journal = machine.ok(&format!("journalctl -b -o verbose --no-pager -u {unit}"));
        assert!(
            journal.contains("/etc/portcullis/conf.d/bad.toml"),
            "{unit}: {journal}"
        );
    }
    machine.ok("rm /etc/portcullis/conf.d/bad.toml");
    assert_eq!(until_booted(&machine).generation, Some(generation));

    // It may not write anew what is not gone yet.
    machine.ok(
        "systemctl kill -s STOP portcullis; rm -r /var/lib/portcullis; systemctl kill -s CONT portcullis",
    );
    let check = eventually(BOOT_STEP, "it is written anew", || {
        let report = machine.try_status()?;
        let check = report.check(CheckId::FirewallApplied).ok_or("it is not there")?;
        match check.evidence.get("state_restored") {
            Some(_) => Ok(check.clone()),
            None => Err(format!("{check:?}")),
        }
    });
    assert_eq!(
        (check.status, &check.evidence["state_restored"]),
        (Status::Pass, &"1".into())
    );
    assert_eq!(key(&machine), pinned);
    machine.ok("systemctl restart portcullis");
    assert_eq!(machine.until_ready().generation, Some(generation));
    assert_eq!((machine.table(), key(&machine)), (table, pinned));
}

//! Boots that go wrong before the daemon: lockdown that fails, a disk with the state that is not there. The instance
//! waits or lets nobody in, and says why.
//!
//! May not live here: boots that go well (`boot.rs`), what breaks later (`faults.rs`).

use portcullis_provision::local::Outsider;
use portcullis_provision::reach::{Reached, Transport};

use crate::lab::{Lab, Machine, READY_TIME, eventually, vantage};

use Reached::{Filtered, Open};

fn ssh_from(stranger: &Outsider, machine: &Machine) -> [Reached; 2] {
    machine.seen_from(&vantage(stranger), Transport::Tcp, 22)
}

/// Begins another boot and does not wait for its end.
fn begin_to_boot(machine: &Machine) {
    let before = machine.instance.boots();
    // The answer may be cut short by what it does.
    machine.run("systemctl reboot");
    eventually(READY_TIME, "another boot", || match machine.instance.boots() {
        now if now > before => Ok(()),
        now => Err(now),
    });
}

/// The kernel refuses the gate: its unit may not speak to it.
const REFUSED: &str = "/etc/systemd/system/portcullis-lockdown.service.d/refused.conf";

#[test]
fn a_lockdown_that_fails_holds_the_network_back_and_says_why() {
    let lab = Lab::new();
    let machine = lab.launch();
    let stranger = lab.stranger();
    // The positive control: it is up, and answers.
    assert_eq!(ssh_from(&stranger, &machine), [Open; 2]);
    let is_up = |machine: &Machine| machine.ok("ip -o link show up").contains("eth0");
    assert!(is_up(&machine));
    machine.ok(&format!(
        "mkdir -p $(dirname {REFUSED}) && \
         printf '[Service]\\nRestrictAddressFamilies=\\nRestrictAddressFamilies=AF_UNIX\\n' >{REFUSED}"
    ));

    begin_to_boot(&machine);
    let told = eventually(READY_TIME, "it is tried more than once", || {
        let told = machine.run("journalctl -b -u portcullis-lockdown -o cat").stdout;
        match told.matches("next try in 5 s").count() {
            0 | 1 => Err(told),
            _ => Ok(told),
        }
    });
    assert!(told.contains("Address family not supported"), "no reason: {told}");
    let where_to = machine.unit("portcullis-lockdown", "StandardError");
    assert_eq!(where_to, "journal+console");
    assert_eq!(machine.unit("portcullis-lockdown", "ActiveState"), "activating");
    for unit in [
        "network-pre.target",
        "systemd-networkd",
        "cloud-init-local",
        "ssh",
        "portcullis",
    ] {
        assert_eq!(machine.unit(unit, "ActiveState"), "inactive", "{unit}");
    }
    assert!(!is_up(&machine), "{}", machine.ok("ip -o link"));
    assert!(!ssh_from(&stranger, &machine).contains(&Open));

    // Once it succeeds the boot goes on by itself.
    machine.ok(&format!(
        "rm {REFUSED} && systemctl daemon-reload && systemctl restart portcullis-lockdown"
    ));
    eventually(READY_TIME, "the boot's end", || {
        match machine.run("systemctl is-system-running").stdout.trim() {
            "running" | "degraded" => Ok(()),
            state => Err(state.to_owned()),
        }
    });
    machine.until_ready();
    assert_eq!(ssh_from(&stranger, &machine), [Open; 2]);
}

#[test]
fn without_the_disk_of_its_state_an_instance_lets_nobody_in() {
    let lab = Lab::new();
    let machine = lab.launch();
    let stranger = lab.stranger();
    assert_eq!(ssh_from(&stranger, &machine), [Open; 2]);
    let held = machine.table();
    // As a disk of its own that is away: what is below its place is an empty folder.
    machine.ok("systemctl stop portcullis portcullis-front && cd /var/lib \
        && mv portcullis away && mkdir -m 700 portcullis \
        && echo 'none /var/lib/portcullis nosuchfs nofail 0 0' >>/etc/fstab");
    lab.provider.reboot("one").unwrap();
    assert_eq!(machine.unit("var-lib-portcullis.mount", "ActiveState"), "failed");
    assert_eq!(machine.unit("portcullis-lockdown", "ActiveState"), "active");
    assert_eq!(machine.unit("portcullis", "ActiveState"), "inactive");
    // sshd is up, and nobody gets there; out is open.
    assert_eq!(machine.unit("ssh", "ActiveState"), "active");
    assert_eq!(ssh_from(&stranger, &machine), [Filtered; 2]);
    let baseline = machine.table();
    assert!(
        baseline.contains("policy drop") && !baseline.contains("dport 22"),
        "{baseline}"
    );
    for address in stranger.addresses() {
        machine.ok(&format!("ping -c 1 -W 5 {address}"));
    }

    // Back with its disk, all is as it was.
    machine.ok(
        "sed -i '/nosuchfs/d' /etc/fstab && cd /var/lib && rmdir portcullis && mv away portcullis \
        && systemctl daemon-reload && systemctl start portcullis",
    );
    machine.until_ready();
    assert_eq!(machine.table(), held);
    assert_eq!(ssh_from(&stranger, &machine), [Open; 2]);
}

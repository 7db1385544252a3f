//! What breaks on an instance, and that the gate holds and the report says what is wrong meanwhile.
//!
//! May not live here: kernels that refuse a ruleset (`tests/gate.rs`).

use std::time::{Duration, Instant};

use portcullis_protocol::{CheckId, Status};
use portcullis_provision::local::Outsider;
use portcullis_provision::reach::{Reached, Transport, listen_inside};

use crate::lab::{Lab, Machine, SOON, USER, accepted, allow, eventually, vantage};

use Reached::{Filtered, Open};
use Transport::Tcp;

/// Within which time a change by somebody else has to be undone.
const UNDO_TIME: Duration = Duration::from_secs(2);

/// Whether the gate is as the first spec wants it: SSH, and nothing of what else listens.
#[track_caller]
fn holds(machine: &Machine, stranger: &Outsider) {
    let from = vantage(stranger);
    assert_eq!(machine.seen_from(&from, Tcp, 9000), [Filtered; 2]);
    assert_eq!(machine.seen_from(&from, Tcp, 22), [Open; 2]);
}

fn instance_that_listens(lab: &Lab) -> (Machine, Outsider) {
    let machine = lab.launch();
    listen_inside(&machine.instance, &[(Tcp, 9000)]).unwrap();
    let stranger = lab.stranger();
    holds(&machine, &stranger);
    (machine, stranger)
}

/// Waits until a check tells of a fault as somebody can use it who was woken up: by its own id, the cause in its
/// summary, what to do in its remedy, which ends with the section of the page that the instance has; and `status` shows it.
#[track_caller]
fn fails(machine: &Machine, id: CheckId, cause: &str, to_do: &str) {
    let check = eventually(SOON, &format!("{id} fails: {cause}"), || {
        let report = machine.try_status()?;
        let check = report.check(id).ok_or("it is not there")?;
        match check.status == Status::Fail && check.summary.contains(cause) {
            true => Ok(check.clone()),
            false => Err(format!("{check:?}")),
        }
    });
    let remedy = check.remedy.as_deref().unwrap_or_default();
    let (remedy, section) = remedy
        .split_once("portcullis-operations(7), ")
        .unwrap_or_default();
    assert!(remedy.contains(to_do), "{to_do}: {check:?}");
    assert_eq!(section, id.to_string(), "{check:?}");
    machine.ok(&format!(
        "grep -qxF '### `{id}`' /usr/share/doc/portcullis/operations.md"
    ));
    // Lines are broken anywhere.
    let words = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
    let shown = words(&machine.run("portcullis status").stdout);
    assert!(
        shown.contains(&words(cause)) && shown.contains(&words(to_do)),
        "{check:?}: {shown}"
    );
}

#[test]
fn a_killed_daemon_leaves_the_gate_and_comes_back() {
    let lab = Lab::new();
    let (machine, stranger) = instance_that_listens(&lab);
    let table = machine.table();
    let pid = machine.main_pid();
    machine.ok(&format!("kill -9 {pid}"));
    assert_eq!(machine.table(), table);
    holds(&machine, &stranger);
    eventually(SOON, "another daemon", || {
        let now = machine.main_pid();
        if now != 0 && now != pid { Ok(()) } else { Err(now) }
    });
    machine.until_ready();
    assert_eq!(machine.table(), table);
    holds(&machine, &stranger);
    // Nothing is wrong any more; that something was, and what, is in the journal.
    let journal = machine.ok("journalctl -b -o cat -u portcullis");
    assert!(journal.contains("code=killed, status=9/KILL"), "{journal}");
}

/// Where the kernel knows owner and persist: others' changes fail, their flushes pass it by, also in the
/// second between a crash and the next start.
#[test]
fn the_gate_is_out_of_others_reach_while_the_daemon_is_up_or_comes_back() {
    let lab = Lab::new();
    let (machine, stranger) = instance_that_listens(&lab);
    let table = machine.table();
    for change in [
        "nft delete table inet portcullis",
        "nft insert rule inet portcullis gate accept",
        "nft flush chain inet portcullis gate",
    ] {
        let output = machine.run(change);
        assert!(
            output.stderr.contains("Operation not permitted"),
            "{change}: {output:?}"
        );
    }
    machine.ok("nft flush ruleset");
    assert_eq!(machine.table(), table);
    holds(&machine, &stranger);
    // Flushed all the time from the crash until the next daemon is up; each time it is there.
    let survived = machine.ok(
        "pid=$(systemctl show -P MainPID portcullis); kill -9 $pid; flushes=0
         until new=$(systemctl show -P MainPID portcullis); [ $new != 0 ] && [ $new != $pid ] \\
               && [ \"$(systemctl is-active portcullis)\" = active ]; do
             nft flush ruleset && nft list table inet portcullis > /dev/null && flushes=$((flushes + 1)) || exit 1
         done
         echo $flushes",
    );
    assert!(survived.parse::<u32>().unwrap() > 3, "{survived}");
    machine.until_ready();
    let report = machine.status();
    let check = report.check(CheckId::FirewallApplied).unwrap();
    assert_eq!(
        (&check.evidence["exclusive"], &check.evidence["repaired"]),
        (&true.into(), &0.into())
    );
    assert_eq!(machine.table(), table);
    // It still can change the table: the socket that owns it came back to it.
    machine.ok("portcullis firewall add --id more --protocol tcp --port 9000");
    assert_eq!(machine.seen_from(&vantage(&stranger), Tcp, 9000), [Open; 2]);
    machine.ok("portcullis firewall revoke more");
    holds(&machine, &stranger);
}

#[test]
fn foreign_changes_of_the_gate_are_undone_and_a_stopped_daemon_leaves_it() {
    let lab = Lab::new();
    let (machine, stranger) = instance_that_listens(&lab);
    // As on a kernel without owner and persist.
    machine.set("firewall", "exclusive_table = false");
    let table = machine.table();
    let repaired = || {
        let report = machine.status();
        let check = report.check(CheckId::FirewallApplied).unwrap();
        check.evidence["repaired"].as_u64().unwrap()
    };
    let mut before = repaired();
    for change in [
        "nft flush ruleset",
        "nft delete table inet portcullis",
        "nft insert rule inet portcullis gate accept",
        "nft flush chain inet portcullis gate",
        "nft 'chain inet portcullis gate { policy accept; }'",
    ] {
        machine.ok(change);
        let start = Instant::now();
        eventually(UNDO_TIME, change, || {
            let now = machine.run("nft -s list table inet portcullis").stdout;
            if now.trim_end() == table { Ok(()) } else { Err(now) }
        });
        println!("{change}: undone after {:?}", start.elapsed());
        let now = eventually(SOON, "counted", || {
            if repaired() > before {
                Ok(repaired())
            } else {
                Err(before)
            }
        });
        before = now;
        holds(&machine, &stranger);
    }
    machine.until_ready();

    machine.ok("systemctl stop portcullis");
    assert_eq!(machine.table(), table);
    holds(&machine, &stranger);
    // Nobody is there to undo it: what listens can be reached.
    machine.ok("nft delete table inet portcullis");
    assert_eq!(machine.seen_from(&vantage(&stranger), Tcp, 9000), [Open; 2]);
    machine.ok("systemctl start portcullis");
    assert_eq!(machine.table(), table);
    holds(&machine, &stranger);
}

#[test]
fn readiness_follows_sshd() {
    let lab = Lab::new();
    let machine = lab.launch();
    machine.ok("systemctl stop ssh");
    let start = Instant::now();
    let start_it = "`systemctl enable --now ssh`";
    machine.until_check(CheckId::SshdRunning, Status::Fail);
    println!("a stopped sshd was reported after {:?}", start.elapsed());
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    fails(
        &machine,
        CheckId::SshdRunning,
        "ssh.service is inactive",
        start_it,
    );
    let look = "`journalctl -u ssh -u sshd`";
    fails(&machine, CheckId::SshdReachable, "no SSH handshake: ", look);
    assert!(!machine.status().ready);
    machine.ok("systemctl start ssh");
    machine.until_ready();

    // Without its program it can't come back, and the report says why.
    machine.ok("mv /usr/sbin/sshd /root/; systemctl stop ssh; ! systemctl start ssh");
    fails(&machine, CheckId::SshdRunning, "ssh.service is ", start_it);
    fails(&machine, CheckId::SshdReachable, "install openssh-server", look);
    machine.ok("mv /root/sshd /usr/sbin/; systemctl reset-failed ssh; systemctl start ssh");
    machine.until_ready();
}

#[test]
fn modes_that_sshd_does_not_trust_are_reported() {
    let lab = Lab::new();
    let machine = lab.launch();
    machine.ok(&format!("chmod g+w /home/{USER}"));
    let cause = format!("\"/home/{USER}\" is writable by others (mode 0775)");
    for id in [CheckId::KeysInstalled, CheckId::KeysAccepted] {
        fails(&machine, id, &cause, "mend what the summary names");
    }
    assert!(!machine.status().ready);
    machine.ok(&format!("chmod g-w /home/{USER}"));
    machine.until_ready();
}

#[test]
fn without_dbus_the_daemon_stays_and_says_so() {
    let lab = Lab::new();
    let (machine, stranger) = instance_that_listens(&lab);
    let (pid, table) = (machine.main_pid(), machine.table());
    machine.ok(
        "systemctl stop dbus.socket dbus.service; ! systemctl is-active -q dbus.service && ! busctl status",
    );
    fails(
        &machine,
        CheckId::SystemdRunning,
        "D-Bus",
        "`systemctl start dbus.socket`",
    );
    // Nobody is sent to install an sshd that runs.
    fails(
        &machine,
        CheckId::SshdRunning,
        "can't be asked for: ",
        "mend systemd.running first",
    );
    assert_eq!((machine.main_pid(), machine.table()), (pid, table));
    holds(&machine, &stranger);
    machine.ok("systemctl start dbus.socket dbus.service");
    machine.until_ready();
    assert_eq!(machine.main_pid(), pid);
    // It hears of units again.
    machine.ok("systemctl stop ssh");
    machine.until_check(CheckId::SshdRunning, Status::Fail);
}

/// A spec that can't be stored is refused with that reason; nothing of it holds.
#[track_caller]
fn is_refused(machine: &mut Machine, stranger: &Outsider, reason: &str, to_do: &str) {
    let pid = machine.main_pid();
    // The disk as the daemon sees it.
    let on_disk = format!("nsenter -t {pid} -m cat /var/lib/portcullis/spec.json");
    let before = (machine.table(), machine.ok(&on_disk));
    let spec = machine.next(|spec| spec.firewall.ingress.push(allow("9000/tcp")));
    let output = machine.apply(&spec);
    assert_eq!(output.code, Some(1), "{output:?}");
    let words = output.stderr.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(words.contains(reason) && words.contains(to_do), "{output:?}");
    assert!(
        words.contains("nothing was changed") && words.contains("/var/lib/portcullis"),
        "{output:?}"
    );
    let after = (machine.table(), machine.ok(&on_disk));
    assert_eq!(after, before);
    assert_eq!(machine.main_pid(), pid);
    holds(machine, stranger);
}

#[test]
fn a_full_or_read_only_disk_refuses_a_spec_and_changes_nothing() {
    let lab = Lab::new();
    let (mut machine, stranger) = instance_that_listens(&lab);
    // In the daemon's own mount namespace: it does not see mounts that come later elsewhere. It has its audit log
    // open, wherever that is.
    let state = "/var/lib/portcullis";
    let there = |machine: &Machine, script: &str| {
        let pid = machine.main_pid();
        machine.ok(&format!("nsenter -t {pid} -m sh -c '{script}'"))
    };
    let small = format!(
        "mkdir -p /run/small && mount -t tmpfs -o size=64k,mode=700 small /run/small && \
         cp -a {state}/. /run/small/ && mount --bind /run/small {state} && \
         dd if=/dev/zero of={state}/filler bs=4k status=none || true"
    );
    there(&machine, &small);
    is_refused(
        &mut machine,
        &stranger,
        "No space left on device",
        "free some space",
    );
    there(
        &machine,
        &format!("rm {state}/filler && umount -l {state} && umount -l /run/small"),
    );

    there(
        &machine,
        &format!("mount --bind {state} {state} && mount -o remount,bind,ro {state}"),
    );
    is_refused(
        &mut machine,
        &stranger,
        "Read-only file system",
        "mount it read-write",
    );
    there(&machine, &format!("umount -l {state}"));

    let spec = machine.next(|spec| spec.firewall.ingress.push(allow("9000/tcp")));
    let output = machine.apply(&spec);
    assert!(output.success(), "{output:?}");
    assert_eq!(machine.seen_from(&vantage(&stranger), Tcp, 9000), [Open; 2]);
    let on_disk = machine.ok("cat /var/lib/portcullis/spec.json");
    assert_eq!(on_disk, accepted(&spec));
}

#[test]
fn a_damaged_accepted_spec_opens_nothing_and_is_reported() {
    let lab = Lab::new();
    let (mut machine, stranger) = instance_that_listens(&lab);
    machine.ok("systemctl stop portcullis
        printf '{\"version\":1,' > /var/lib/portcullis/spec.json
        rm /etc/portcullis/spec.json
        systemctl start portcullis");
    let report = machine.status();
    assert!(!report.ready);
    let reason = report.refused_spec.clone().expect("a reason");
    assert!(
        reason.contains("/var/lib/portcullis/spec.json: damaged: ") && reason.contains("move it away"),
        "{reason}"
    );
    assert!(
        machine
            .run("portcullis status")
            .stdout
            .contains("A spec was refused")
    );
    let check = report.check(CheckId::KeysInstalled).unwrap();
    assert_eq!(
        (check.status, check.summary.as_str()),
        (Status::Unknown, "no spec is accepted yet")
    );
    assert!(
        check.remedy.as_ref().unwrap().contains("`portcullis apply`"),
        "{check:?}"
    );
    let from = vantage(&stranger);
    for port in [22, 9000] {
        assert_eq!(machine.seen_from(&from, Tcp, port), [Filtered; 2]);
    }
    let table = machine.table();
    let lockdown = machine.run("portcullis lockdown");
    assert!(lockdown.success(), "{lockdown:?}");
    assert_eq!(machine.table(), table);
    // Whoever hands it a spec again has it back.
    machine.push(|_| ());
    let report = machine.until_ready();
    assert_eq!(report.refused_spec, None);
    holds(&machine, &stranger);
}

/// A kernel without nf_tables answers the same way: the gate can be neither read nor written.
#[test]
fn without_the_right_to_the_packet_filter_the_daemon_stays_and_says_so() {
    let lab = Lab::new();
    let (machine, stranger) = instance_that_listens(&lab);
    let table = machine.table();
    machine.ok("mkdir -p /run/systemd/system/portcullis.service.d
        printf '[Service]\\nCapabilityBoundingSet=~CAP_NET_ADMIN\\n' > /run/systemd/system/portcullis.service.d/no.conf
        systemctl daemon-reload
        systemctl restart portcullis");
    for (id, to_do) in [
        (CheckId::FirewallApplied, "shut the instance at the provider"),
        (CheckId::FirewallDefaultDeny, "give the unit CAP_NET_ADMIN back"),
        (CheckId::FirewallContainers, "give the unit CAP_NET_ADMIN back"),
        (CheckId::ClusterPeers, "give the unit CAP_NET_ADMIN back"),
    ] {
        fails(&machine, id, "CAP_NET_ADMIN", to_do);
    }
    assert_eq!(machine.ok("systemctl is-active portcullis"), "active");
    assert_eq!(machine.table(), table);
    holds(&machine, &stranger);
    machine.ok("rm /run/systemd/system/portcullis.service.d/no.conf
        systemctl daemon-reload
        systemctl restart portcullis");
    machine.until_ready();
}

#[test]
fn without_sshd_the_daemon_stays_and_says_so() {
    let lab = Lab::new();
    let machine = lab.launch();
    machine.ok(
        "systemctl stop ssh.service && mv /usr/sbin/sshd /usr/sbin/sshd.away && systemctl restart portcullis",
    );
    for (id, cause, to_do) in [
        (CheckId::SshdReachable, "install openssh-server", "`sshd -t`"),
        (
            CheckId::SshdRunning,
            "ssh.service is inactive",
            "install openssh-server",
        ),
        (
            CheckId::KeysAccepted,
            "sshd could not be asked about a key",
            "sshd.reachable",
        ),
    ] {
        fails(&machine, id, cause, to_do);
    }
    assert_eq!(machine.ok("systemctl is-active portcullis"), "active");
    machine.ok("mv /usr/sbin/sshd.away /usr/sbin/sshd && systemctl start ssh.service");
    machine.until_ready();
}

//! Other programs' firewalls side by side with the agent: what they drop of what the spec lets in is
//! reported with the place and the way out, and nobody harms the other's tables.
//!
//! May not live here: hand-written tables (`tests/conflicts.rs`).

use portcullis_protocol::{Check, CheckId, Report, Status};
use portcullis_provision::local::Outsider;
use portcullis_provision::reach::{Reached, Transport};
use serde_json::Value;

use crate::lab::{Lab, Machine, SOON, eventually, vantage};

use Reached::Open;
use Transport::Tcp;

/// What a stranger sees of SSH, over IPv4 and IPv6.
fn ssh(machine: &Machine, stranger: &Outsider) -> [Reached; 2] {
    machine.seen_from(&vantage(stranger), Tcp, 22)
}

/// The check's conflicts: table, chain, rule, and our rules that it drops.
fn conflicts(check: &Check) -> Vec<[String; 4]> {
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let ours = |conflict: &Value| {
        let hits = conflict["drops"].as_array().unwrap().iter();
        hits.map(|hit| text(&hit["rule"])).collect::<Vec<_>>().join(",")
    };
    let list = check.evidence["conflicts"].as_array().unwrap().iter();
    list.map(|c| [text(&c["table"]), text(&c["chain"]), text(&c["rule"]), ours(c)])
        .collect()
}

/// Waits until SSH is among what the check says is dropped, or is not.
#[track_caller]
fn until_ssh_is(dropped: bool, machine: &Machine) -> Check {
    eventually(SOON, &format!("SSH dropped: {dropped}"), || {
        let report = machine.try_status()?;
        let check = report
            .check(CheckId::FirewallConflicts)
            .ok_or("it is not there")?;
        let named = conflicts(check)
            .iter()
            .any(|[.., ours]| ours.contains("rule allow-22-tcp"));
        // `unknown` says nothing of either.
        if named == dropped && check.status != Status::Unknown {
            Ok(check.clone())
        } else {
            Err(format!("{check:#?}"))
        }
    })
}

#[test]
fn what_ufw_drops_is_named_until_ufw_lets_it_in() {
    let lab = Lab::new();
    let mut request = lab.request("one", "c-1");
    request.image.packages = vec!["ufw".to_owned()];
    let machine = lab.launch_many(&[request]).remove(0);
    let stranger = lab.stranger();
    let table = machine.table();
    assert_eq!(ssh(&machine, &stranger), [Open; 2]);
    machine.until_check(CheckId::FirewallConflicts, Status::Pass);

    machine.ok("ufw --force enable");
    // ufw loads one family after the other, and the daemon may look in between.
    let check = eventually(SOON, "both families are named", || {
        let check = until_ssh_is(true, &machine);
        let found = conflicts(&check);
        let names = |table| found.iter().any(|c| c[..3] == [table, "INPUT", "policy drop"]);
        if names("ip filter") && names("ip6 filter") {
            Ok(check)
        } else {
            Err(found)
        }
    });
    assert_eq!(ssh(&machine, &stranger), [Reached::Filtered; 2], "{check:#?}");
    assert_eq!(check.status, Status::Warn);
    assert!(check.remedy.unwrap().contains("ufw allow "));
    // The instance says the same whoever asks.
    let asked = machine.run("portcullis check --format json");
    assert!(asked.stdout.contains("\"policy drop\""), "{asked:?}");

    machine.ok("ufw allow 22/tcp");
    until_ssh_is(false, &machine);
    assert_eq!(ssh(&machine, &stranger), [Open; 2]);
    machine.ok("ufw reject 22/tcp");
    let found = conflicts(&until_ssh_is(true, &machine));
    assert!(!ssh(&machine, &stranger).contains(&Open));
    let by_rule = |c: &[String; 4]| c[1] == "ufw-user-input" && c[2] == "meta l4proto tcp th dport 22 REJECT";
    assert!(found.iter().any(by_rule), "{found:#?}");
    machine.ok("ufw allow 22/tcp && ufw allow 7443/tcp && ufw reload");
    machine.until_check(CheckId::FirewallConflicts, Status::Pass);
    assert_eq!(ssh(&machine, &stranger), [Open; 2]);

    machine.until_ready();
    assert_eq!(machine.table(), table, "ufw left the gate alone");

    legacy_rules_are_named(&machine, &stranger);
}

/// Legacy iptables, of the package that ufw needs. netlink tells nothing of it.
fn legacy_rules_are_named(machine: &Machine, stranger: &Outsider) {
    machine.ok("iptables-legacy -A INPUT -p tcp --dport 22 -j DROP");
    assert_eq!(ssh(machine, stranger), [Reached::Filtered, Open]);
    let asked = machine.run("portcullis check --format json");
    let report: Report = serde_json::from_str(&asked.stdout).unwrap();
    let found = conflicts(report.check(CheckId::FirewallConflicts).unwrap());
    let rule = "meta l4proto tcp th dport 22 DROP";
    assert_eq!(
        found,
        [["ip filter (legacy iptables)", "INPUT", rule, "rule allow-22-tcp"]]
    );
    // The daemon has no right to raw sockets, and says so. Any event makes it look.
    machine.ok("nft add table inet any");
    let check = machine.until_check(CheckId::FirewallConflicts, Status::Unknown);
    assert!(check.summary.contains("can't be looked into"), "{check:?}");
    assert!(check.summary.contains("`portcullis check`"), "{check:?}");
}

#[test]
fn what_firewalld_drops_is_named_until_its_zone_lets_it_in() {
    let lab = Lab::new();
    let mut request = lab.request("one", "c-1");
    // netbase: it wants /etc/protocols.
    request.image.packages = vec!["firewalld".to_owned(), "netbase".to_owned()];
    // Debian's firewalld and cloud-init's network stage wait for each other at boot, and systemd leaves
    // something out, now this and now that. Here it starts after the boot.
    let units = lab.path("overlay/etc/systemd/system");
    std::fs::create_dir_all(&units).unwrap();
    std::os::unix::fs::symlink("/dev/null", units.join("firewalld.service")).unwrap();
    request.image.overlay = Some(lab.path("overlay"));
    let machine = lab.launch_many(&[request]).remove(0);
    machine.ok("systemctl unmask firewalld && systemctl start firewalld && firewall-cmd --state");
    let stranger = lab.stranger();
    let table = machine.table();
    until_ssh_is(false, &machine);
    assert_eq!(ssh(&machine, &stranger), [Open; 2]);

    machine.ok("firewall-cmd --remove-service=ssh");
    let check = until_ssh_is(true, &machine);
    assert!(!ssh(&machine, &stranger).contains(&Open), "{check:#?}");
    assert_eq!(check.status, Status::Warn);
    assert!(
        check.remedy.as_ref().unwrap().contains("firewall-cmd"),
        "{check:#?}"
    );
    let found = conflicts(&check);
    let zone = |c: &[String; 4]| c[0] == "inet firewalld" && c[1] == "filter_IN_public" && c[2] == "reject";
    assert!(found.iter().any(zone), "{found:#?}");

    // The permanent zone has the service still.
    machine.ok("firewall-cmd --permanent --add-port=7443/tcp && firewall-cmd --reload");
    machine.until_check(CheckId::FirewallConflicts, Status::Pass);
    assert_eq!(ssh(&machine, &stranger), [Open; 2]);
    machine.ok("systemctl restart firewalld && firewall-cmd --state");
    machine.until_check(CheckId::FirewallConflicts, Status::Pass);
    machine.until_ready();
    assert_eq!(machine.table(), table, "firewalld left the gate alone");
}

//! Changes made on the instance: rules that come and go, and specs on trial.
//!
//! May not live here: what a spec may hold (`specs`).

use portcullis_protocol::CheckId;
use portcullis_provision::reach::{Reached, Transport, listen_inside};
use serde_json::Value;

use crate::lab::{Lab, Machine, Run, SOON, eventually, vantage};
use crate::login::ssh;

use Reached::{Filtered, Open};
use Transport::Tcp;

fn rules(machine: &Machine) -> Vec<Value> {
    let list: Value = serde_json::from_str(&machine.ok("portcullis firewall list --format json")).unwrap();
    list["ingress"].as_array().unwrap().clone()
}

fn generation(machine: &Machine) -> u64 {
    machine.status().generation.unwrap()
}

#[test]
fn rules_come_and_go_and_are_counted_durable_and_enforced_at_once() {
    let lab = Lab::new();
    let machine = lab.launch();
    listen_inside(&machine.instance, &[(Tcp, 9000), (Tcp, 9001)]).unwrap();
    let stranger = lab.stranger();
    let from = vantage(&stranger);
    assert_eq!(machine.seen_from(&from, Tcp, 9000), [Filtered; 2]);
    let added = "portcullis firewall add --id web --protocol tcp --port 9000-9001";
    machine.ok(added);
    assert_eq!(machine.seen_from(&from, Tcp, 9000), [Open; 2]);
    assert_eq!(machine.seen_from(&from, Tcp, 9001), [Open; 2]);
    assert_eq!(generation(&machine), 2);
    assert!(
        machine.ok(added).contains("accepted already"),
        "the same again is no change"
    );
    assert_eq!(generation(&machine), 2);
    let list = rules(&machine);
    assert_eq!((list.len(), &list[1]["rule"]["id"]), (2, &Value::from("web")));
    assert!(list[1]["packets"].as_u64().unwrap() >= 4, "{list:?}");
    assert!(machine.ok("portcullis firewall list").contains("9000-9001"));
    // Durable: after a crash too.
    machine.ok("kill -9 $(systemctl show -P MainPID portcullis)");
    machine.until_ready();
    assert_eq!(generation(&machine), 2);
    machine.ok("portcullis firewall revoke web");
    assert_eq!(machine.seen_from(&from, Tcp, 9000), [Filtered; 2]);
    assert_eq!(generation(&machine), 3);
    let ssh = machine.spec.firewall.ingress[0].id.clone();
    for (bad, word) in [
        ("add --id web --protocol tcp", "port"),
        (
            &format!("add --id {ssh} --protocol tcp --port 23"),
            "revoke it first",
        ),
        ("add --id x --protocol tcp --port 90-80", "80"),
        (
            "add --id x --protocol tcp --port 80 --source 300.0.0.0/8",
            "300.0.0.0/8",
        ),
        ("revoke nothing", "the rules are: "),
        (&format!("revoke {ssh}"), "--confirm"),
    ] {
        let output = machine.run(&format!("portcullis firewall {bad}"));
        assert_eq!(output.code, Some(2), "{bad}: {output:?}");
        assert!(output.stderr.contains(word), "{bad}: {output:?}");
    }
    assert_eq!(generation(&machine), 3, "what was refused changed nothing");
}

/// Puts a spec without any rule on trial: nobody gets in any more.
fn cut_off(machine: &Machine, seconds: u64) -> u64 {
    let spec = machine.next(|spec| spec.firewall.ingress.clear());
    let refused = machine.run_with("portcullis apply --spec -", &spec.to_json());
    assert_eq!(refused.code, Some(2), "{refused:?}");
    assert!(refused.stderr.contains("SSH is no longer let in"), "{refused:?}");
    let output = machine.run_with(
        &format!("portcullis apply --spec - --confirm {seconds}s --format json"),
        &spec.to_json(),
    );
    assert!(output.success(), "{output:?}");
    let said: Value = serde_json::from_str(&output.stdout).unwrap();
    assert!(said["confirm_until"].is_string(), "{said}");
    spec.generation.get()
}

#[track_caller]
fn until_back(machine: &Machine, generation_before: u64) {
    let report = eventually(SOON, "what held before holds again", || {
        match machine.try_status() {
            Ok(report) if report.generation == Some(generation_before) && report.ready => Ok(report),
            other => Err(format!("{other:?}")),
        }
    });
    assert!(
        report
            .refused_spec
            .is_none_or(|reason| reason.contains("not confirmed"))
    );
}

/// firewalld#57: a bad policy that locks its author out.
#[test]
fn a_change_that_cuts_off_is_taken_back_unless_confirmed() {
    let lab = Lab::new();
    let machine = lab.launch();
    let stranger = lab.stranger();
    let from = vantage(&stranger);
    assert_eq!(machine.seen_from(&from, Tcp, 22), [Open; 2]);
    let on_trial = cut_off(&machine, 5);
    assert_eq!(machine.seen_from(&from, Tcp, 22), [Filtered; 2]);
    let report = machine.status();
    let check = report.check(CheckId::FirewallApplied).unwrap();
    assert!(check.summary.contains("awaits confirmation"), "{check:?}");
    // Nothing else changes meanwhile, and only this generation can be confirmed.
    let other = machine.run("portcullis firewall add --id x --port 1");
    assert!(
        !other.success() && other.stderr.contains("awaits confirmation"),
        "{other:?}"
    );
    assert!(
        !machine
            .run(&format!("portcullis confirm {}", on_trial + 1))
            .success()
    );
    until_back(&machine, on_trial - 1);
    assert_eq!(machine.seen_from(&from, Tcp, 22), [Open; 2]);
    let late = machine.run(&format!("portcullis confirm {on_trial}"));
    assert!(
        !late.success() && late.stderr.contains("no change does"),
        "{late:?}"
    );
}

#[test]
fn a_trial_outlives_a_crash_and_ends_with_a_reboot() {
    let lab = Lab::new();
    let machine = lab.launch();
    let stranger = lab.stranger();
    let from = vantage(&stranger);
    let on_trial = cut_off(&machine, 8);
    machine.ok("kill -9 $(systemctl show -P MainPID portcullis)");
    let report = eventually(SOON, "the next daemon", || machine.try_status());
    assert_eq!(
        report.generation,
        Some(on_trial),
        "the crash did not end the trial"
    );
    assert_eq!(machine.seen_from(&from, Tcp, 22), [Filtered; 2]);
    until_back(&machine, on_trial - 1);
    assert_eq!(machine.seen_from(&from, Tcp, 22), [Open; 2]);

    // The time is over while no daemon runs.
    cut_off(&machine, 5);
    machine.ok("systemctl stop portcullis");
    assert_eq!(
        machine.seen_from(&from, Tcp, 22),
        [Filtered; 2],
        "the kernel holds what is on trial"
    );
    // What is waited for is that time itself.
    machine.ok("sleep 5; systemctl start portcullis");
    until_back(&machine, on_trial - 1);

    cut_off(&machine, 3600);
    lab.provider.reboot("one").unwrap();
    let machine = lab.machine("one");
    until_back(&machine, on_trial - 1);
    assert_eq!(machine.seen_from(&from, Tcp, 22), [Open; 2]);
    assert!(!machine.run("test -e /var/lib/portcullis/trial.json").success());
}

/// The proof that a new login works is a new login.
#[test]
fn only_a_session_that_is_newer_than_the_change_confirms_it() {
    let lab = Lab::new();
    let machine = lab.launch();
    let stranger = lab.stranger();
    let spec = machine.next(|spec| spec.firewall.ingress.push(crate::lab::allow("9000/tcp")));
    machine.run_with("cat > /root/next.json", &spec.to_json());
    let generation = spec.generation;
    let ssh = |script: &str| {
        let mut command = ssh(&lab, &machine, &stranger, &lab.path("id"));
        command.args(["-o", "BatchMode=yes", script]).output_text()
    };
    let old = ssh(&format!(
        "sudo portcullis apply --spec /root/next.json --confirm 60s && sudo portcullis confirm {generation}"
    ));
    assert_ne!(old.code, Some(0), "{old:?}");
    assert!(old.stderr.contains("older than the change"), "{old:?}");
    let new = ssh(&format!("sudo portcullis confirm {generation}"));
    assert_eq!(new.code, Some(0), "{new:?}");
    // It holds for good.
    machine.ok("! test -e /var/lib/portcullis/trial.json && systemctl restart portcullis");
    machine.until_ready();
    assert_eq!(machine.status().generation, Some(generation.get()));
    assert_eq!(rules(&machine).len(), 2);
}

//! What a running instance does with specs: good, bad, older, the same; and what its commands say.
//!
//! May not live here: which specs are valid (the protocol crate's tests).

use std::time::Instant;

use portcullis_provision::reach::{Reached, Transport, listen_inside};
use serde_json::Value;

use crate::lab::{Lab, Machine, SOON, accepted, allow, eventually, vantage};

use Reached::{Filtered, Open};
use Transport::Tcp;

const SPEC: &str = "/etc/portcullis/spec.json";

/// Puts bytes in the place of the spec file, as one step.
fn put(machine: &Machine, bytes: &[u8]) {
    let script = format!("umask 077; cat > {SPEC}.new && mv {SPEC}.new {SPEC}");
    assert!(machine.run_with(&script, bytes).success());
}

/// The next spec as JSON, changed in ways that the types do not allow.
fn broken(machine: &Machine, change: impl FnOnce(&mut Value)) -> Vec<u8> {
    let mut json = serde_json::from_slice(&machine.next(|_| ()).to_json()).unwrap();
    change(&mut json);
    serde_json::to_vec(&json).unwrap()
}

/// What is wrong, and what the message has to name.
fn broken_specs(machine: &Machine) -> Vec<(&'static str, Vec<u8>)> {
    vec![
        ("line 1", b"{\"version\": 1,".to_vec()),
        (
            "colour",
            broken(machine, |json| json["firewall"]["colour"] = "red".into()),
        ),
        (
            "firewall.ingress[0].ip_ranges[0]",
            broken(machine, |json| {
                json["firewall"]["ingress"][0]["ip_ranges"] = vec!["10.0.0.0/33"].into()
            }),
        ),
        (
            "firewall.ingress[0]: from_port",
            broken(machine, |json| {
                json["firewall"]["ingress"][0]["from_port"] = 70_000.into()
            }),
        ),
        (
            "firewall.ingress[1]",
            broken(machine, |json| {
                let rule = json["firewall"]["ingress"][0].clone();
                json["firewall"]["ingress"].as_array_mut().unwrap().push(rule);
            }),
        ),
    ]
}

#[test]
fn a_spec_file_that_is_not_valid_changes_nothing_and_names_the_field() {
    let lab = Lab::new();
    let mut machine = lab.launch();
    let stranger = lab.stranger();
    listen_inside(&machine.instance, &[(Tcp, 8080)]).unwrap();
    let table = machine.table();
    let accepted = "cat /var/lib/portcullis/spec.json";
    let on_disk = machine.ok(accepted);
    for (named, bytes) in broken_specs(&machine) {
        put(&machine, &bytes);
        let report = eventually(SOON, &format!("refused, naming {named}"), || {
            let report = machine.try_status()?;
            match &report.refused_spec {
                Some(reason) if reason.contains(named) && reason.contains(SPEC) => Ok(report),
                other => Err(format!("{other:?}")),
            }
        });
        assert_eq!(report.generation, Some(1));
        assert!(report.ready, "what was accepted before still holds: {report:#?}");
        assert_eq!(
            (machine.table(), machine.ok(accepted)),
            (table.clone(), on_disk.clone())
        );
    }

    // A good one is taken as soon as the file is in place.
    assert_eq!(machine.seen_from(&vantage(&stranger), Tcp, 8080), [Filtered; 2]);
    let spec = machine.next(|spec| spec.firewall.ingress.push(allow("8080/tcp")));
    machine.instance.write_spec(&spec).unwrap();
    let start = Instant::now();
    eventually(SOON, "enforced", || {
        let table = machine.table();
        if table.contains("8080") {
            Ok(())
        } else {
            Err(table)
        }
    });
    println!("a spec file was enforced after {:?}", start.elapsed());
    assert_eq!(machine.seen_from(&vantage(&stranger), Tcp, 8080), [Open; 2]);
    let report = machine.until_generation(2);
    assert_eq!(report.refused_spec, None);

    // One that is older is not an error of anybody, and changes nothing.
    let table = machine.table();
    put(&machine, &machine.spec.to_json());
    machine.ok("touch /etc/portcullis/spec.json");
    let said = "journalctl -u portcullis -o cat | grep -c 'holds nothing newer'";
    eventually(SOON, "looked at", || {
        let output = machine.run(said);
        if output.stdout.trim() == "0" {
            Err(output)
        } else {
            Ok(())
        }
    });
    assert_eq!((machine.status().generation, machine.table()), (Some(2), table));
}

#[test]
fn apply_is_enforced_when_it_returns_and_refuses_what_is_older_or_malformed() {
    let lab = Lab::new();
    let mut machine = lab.launch();
    let stranger = lab.stranger();
    listen_inside(&machine.instance, &[(Tcp, 8080)]).unwrap();
    assert_eq!(machine.seen_from(&vantage(&stranger), Tcp, 8080), [Filtered; 2]);
    let older = machine.spec.clone();
    let spec = machine.next(|spec| spec.firewall.ingress.push(allow("8080/tcp")));

    // The plan shows what would come, and changes nothing.
    let before = (machine.table(), machine.ok("cat /var/lib/portcullis/spec.json"));
    let plan = machine.run_with("portcullis plan --spec -", &spec.to_json());
    assert!(plan.success(), "{plan:?}");
    assert!(
        plan.stdout
            .lines()
            .any(|line| line.starts_with('+') && line.contains("8080")),
        "{plan:?}"
    );
    let json = machine.run_with("portcullis plan --spec - --format json", &spec.to_json());
    let json: Value = serde_json::from_str(&json.stdout).unwrap();
    assert!(json["firewall_changes"].to_string().contains("8080"), "{json}");
    let after = (machine.table(), machine.ok("cat /var/lib/portcullis/spec.json"));
    assert_eq!(after, before);

    let start = Instant::now();
    let applied = machine.apply(&spec);
    println!("apply returned after {:?}", start.elapsed());
    assert!(applied.success(), "{applied:?}");
    assert_eq!(machine.seen_from(&vantage(&stranger), Tcp, 8080), [Open; 2]);
    let on_disk = machine.ok("cat /var/lib/portcullis/spec.json");
    assert_eq!(on_disk, accepted(&spec));

    let again = machine.apply(&spec);
    assert!(
        again.success() && again.stdout.contains("was accepted already"),
        "{again:?}"
    );
    let table = machine.table();
    let refused = machine.run_with("portcullis apply --spec -", &older.to_json());
    assert_eq!(refused.code, Some(1), "{refused:?}");
    assert!(refused.stderr.contains("generation"), "{refused:?}");

    machine.run_with(
        "cat > /tmp/bad.json",
        br#"{"version":1,"generation":9,"instance":{"id":"i"},"x":1}"#,
    );
    let refused = machine.run("portcullis apply --spec /tmp/bad.json");
    assert_eq!(refused.code, Some(2), "{refused:?}");
    assert!(
        refused.stderr.contains("/tmp/bad.json") && refused.stderr.contains("`x`"),
        "{refused:?}"
    );
    assert_eq!(machine.run("portcullis apply --spec /absent.json").code, Some(2));

    machine.run_with("cat > /tmp/good.json", &machine.next(|_| ()).to_json());
    let refused = machine.run("sudo -u nobody portcullis apply --spec /tmp/good.json");
    assert_eq!(refused.code, Some(3), "{refused:?}");
    assert_eq!((machine.status().generation, machine.table()), (Some(2), table));
}

#[test]
fn every_json_output_is_one_document_and_exit_codes_say_how_it_is() {
    let lab = Lab::new();
    let machine = lab.launch();
    machine.run_with("cat > /tmp/next.json", &machine.next(|_| ()).to_json());
    for (command, code) in [
        ("check", 0),
        ("status", 0),
        ("plan --spec /tmp/next.json", 0),
        ("lockdown", 0),
        ("apply --spec /tmp/next.json", 0),
    ] {
        let output = machine.run(&format!("portcullis {command} --format json"));
        assert_eq!(output.code, Some(code), "{command}: {output:?}");
        let document: Value = serde_json::from_str(&output.stdout).expect(command);
        assert!(document.is_object(), "{command}: {document}");
        let text = machine.run(&format!("portcullis {command}"));
        assert_eq!(text.code, Some(code), "{command}: {text:?}");
        assert!(
            !text.stdout.is_empty() && !text.stdout.starts_with('{'),
            "{command}: {text:?}"
        );
    }
    assert!(machine.ok("portcullis check").contains("READY"));
    machine.ok("systemctl stop ssh");
    let check = machine.run("portcullis check --format json");
    assert_eq!(check.code, Some(1), "{check:?}");
    let report: Value = serde_json::from_str(&check.stdout).unwrap();
    assert_eq!(report["ready"], false);
    machine.ok("systemctl start ssh");
    machine.until_ready();
    assert_eq!(machine.run("portcullis check").code, Some(0));

    for command in ["check", "run", "lockdown", "status"] {
        let output = machine.run(&format!("sudo -u nobody portcullis {command}"));
        assert_eq!(output.code, Some(3), "{command}: {output:?}");
    }
    for command in ["", "no-such-command", "check --no-such-flag", "plan"] {
        let output = machine.run(&format!("portcullis {command}"));
        assert_eq!(output.code, Some(2), "{command}: {output:?}");
    }
    assert_eq!(machine.run("portcullis --help").code, Some(0));
}

#[test]
fn bad_settings_are_refused_by_file_and_line_and_leave_the_running_daemon_alone() {
    let lab = Lab::new();
    let machine = lab.launch();
    let (pid, table) = (machine.main_pid(), machine.table());
    machine.ok("printf '[firewall]\\ncolour = 1\\n' > /etc/portcullis/conf.d/bad.toml");
    for command in ["run", "check", "status"] {
        let output = machine.run(&format!("portcullis {command}"));
        assert_eq!(output.code, Some(2), "{command}: {output:?}");
        for word in ["/etc/portcullis/conf.d/bad.toml", "line 2", "colour"] {
            assert!(output.stderr.contains(word), "{command}: {word}: {output:?}");
        }
    }
    assert_eq!((machine.main_pid(), machine.table()), (pid, table.clone()));
    machine.ok("rm /etc/portcullis/conf.d/bad.toml");
    assert!(machine.status().ready);
    // Settings that break while it is off: the gate is there all the same.
    machine.ok("printf 'nonsense' > /etc/portcullis/conf.d/bad.toml; portcullis lockdown");
    assert_eq!(machine.table(), table);
}

/// What `explain` says about a packet is what a real connection meets.
#[test]
fn explain_agrees_with_real_connections() {
    let lab = Lab::new();
    let machine = lab.launch();
    listen_inside(&machine.instance, &[(Tcp, 9000)]).unwrap();
    let stranger = lab.stranger();
    let from = vantage(&stranger);
    for (port, reached, word) in [(22, Reached::Open, "accept"), (9000, Reached::Filtered, "drop")] {
        assert_eq!(machine.seen_from(&from, Tcp, port), [reached; 2]);
        for address in stranger.addresses() {
            let said = machine.ok(&format!(
                "portcullis explain --from {address} --protocol tcp --port {port} --format json"
            ));
            let said: Value = serde_json::from_str(&said).unwrap();
            assert_eq!(said["explanation"]["verdict"], word, "{said}");
            assert_eq!(said["interface"], "eth0");
        }
    }
    let text = machine.ok("portcullis explain --from 203.0.113.7 --protocol tcp --port 22");
    for expected in [
        "ACCEPT",
        "ingress rule allow-22-tcp of generation 1",
        "BREV-NET-2",
    ] {
        assert!(text.contains(expected), "{text}");
    }
    for bad in [
        "--protocol tcp",
        "--protocol icmp --port 1",
        "--protocol any --port 1",
        "--protocol tcp --port 1 --to ::1",
    ] {
        let output = machine.run(&format!("portcullis explain --from 203.0.113.7 {bad}"));
        assert_eq!(output.code, Some(2), "{bad}: {output:?}");
    }
}

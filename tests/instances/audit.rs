//! The audit log of an instance: who did what, that it is whole, and that what is done to it is found.
//!
//! May not live here: what can be tested of the chain without an instance (`policy::audit`).

use serde_json::{Value, json};

use crate::api::{Api, rule};
use crate::endpoint::curl;
use crate::lab::{Lab, Machine, READY_TIME, Run, SOON, USER, allow, eventually};
use crate::login::ssh;

pub const LOG: &str = "/var/lib/portcullis/audit/audit.log";

fn records_by(machine: &Machine, prefix: &str) -> Vec<Value> {
    let said = machine.ok(&format!("{prefix} portcullis audit --format json"));
    let log: Value = serde_json::from_str(&said).unwrap();
    assert_eq!(log["whole"], true, "{log:#}");
    log["records"].as_array().unwrap().clone()
}

pub fn records(machine: &Machine) -> Vec<Value> {
    records_by(machine, "")
}

/// The last record of an action with a result.
#[track_caller]
fn last<'a>(records: &'a [Value], action: &str, result: &str) -> &'a Value {
    let mut fitting = records
        .iter()
        .rev()
        .filter(|record| record["action"] == action && record["result"] == result);
    let found = fitting.next();
    found.unwrap_or_else(|| panic!("no {action} that was {result}: {records:#?}"))
}

#[track_caller]
pub fn is_whole(machine: &Machine) {
    let said = machine.run("portcullis audit verify");
    assert!(said.success() && said.stdout.contains("Whole: "), "{said:?}");
}

/// It is found to be broken, at a place.
#[track_caller]
fn is_broken(machine: &Machine, words: &str) {
    let said = machine.run("portcullis audit verify");
    assert_eq!(said.code, Some(1), "{words}: {said:?}");
    assert!(said.stdout.contains(words), "{words}: {said:?}");
}

#[test]
fn changes_and_refusals_are_recorded_with_who_what_before_and_after_and_no_secret() {
    let lab = Lab::new();
    let mut machine = lab.launch();
    let api = Api::new(&lab, &machine);
    let stranger = lab.stranger();
    // By a user who logged in and became root.
    ssh(&lab, &machine, &stranger, &lab.path("id"))
        .arg("sudo portcullis firewall add --id web --protocol tcp --port 9000")
        .succeed();
    api.done("POST", "/v1/firewall/rules", &rule("api", 9001));
    let absent = api.ask("DELETE", "/v1/firewall/rules/nothing", &Value::Null);
    assert_eq!(absent.status, 404);
    let key = lab.new_key("new");
    api.done("POST", "/v1/keys", &json!({"user": USER, "key": key.to_line()}));
    api.done("POST", "/v1/keys", &json!({"user": USER, "key": key.to_line()}));
    let refused = machine.run("portcullis firewall add --id web --protocol tcp --port 1");
    assert_eq!(refused.code, Some(2), "{refused:?}");
    // These never get to the agent as a call.
    let garbage = api.ask("POST", "/v1/keys", &json!({"user": "\u{1b}[1m"}));
    assert_eq!(garbage.status, 422, "{garbage:?}");
    let beside = lab.provider.network().path();
    let nobody = curl(&beside, &machine, "/v1/spec", &[]).unwrap();
    assert_eq!(nobody.status, 403);
    let absent_path = curl(&beside, &machine, "/v1/nothing", &[]).unwrap();
    assert_eq!(absent_path.status, 404);

    let all = eventually(SOON, "refusals of the endpoint are in the log", || {
        let all = records(&machine);
        match all
            .iter()
            .filter(|record| record["action"] == "call-refused")
            .count()
        {
            0 | 1 => Err(all.len()),
            _ => Ok(all),
        }
    });
    let of_endpoint: Vec<&Value> = all
        .iter()
        .filter(|record| record["action"] == "call-refused")
        .collect();
    let [bad, unknown] = of_endpoint.as_slice() else {
        panic!("{of_endpoint:?}")
    };
    assert_eq!(
        [
            &bad["refusal"],
            &bad["parameters"]["operation"],
            &bad["parameters"]["status"]
        ],
        ["bad-input", "add_key", "422"]
    );
    assert!(bad["who"]["subject"].as_str().unwrap().contains("CN="), "{bad}");
    assert_eq!(
        [
            &unknown["refusal"],
            &unknown["parameters"]["operation"],
            &unknown["parameters"]["status"]
        ],
        ["not-permitted", "get_spec", "403"]
    );
    assert!(
        unknown["who"]["address"].as_str().unwrap().contains(':'),
        "{unknown}"
    );
    let begin = last(&all, "spec-file", "changed");
    assert_eq!(
        (&begin["generation_before"], &begin["generation"], &begin["who"]),
        (
            &Value::Null,
            &json!(1),
            &json!({"kind": "file", "path": "/etc/portcullis/spec.json"})
        )
    );
    let web = all
        .iter()
        .find(|r| r["changes"]["rules_added"] == json!(["web"]))
        .unwrap();
    assert_eq!(
        (&web["generation_before"], &web["generation"], &web["result"]),
        (&json!(1), &json!(2), &json!("changed"))
    );
    let who = &web["who"];
    assert_eq!(
        (&who["kind"], &who["login_user"], &who["uid"]),
        (&json!("local"), &json!(USER), &json!(0))
    );
    let command = who["command"].as_str().unwrap();
    assert!(command.starts_with("portcullis < sudo"), "{command}");
    let by_api = last(&all, "add-rule", "changed");
    assert_eq!(by_api["changes"]["rules_added"], json!(["api"]));
    assert_eq!(by_api["generation"], 3);
    let who = &by_api["who"];
    assert!(who["subject"].as_str().unwrap().contains("CN="), "{who}");
    assert!(who["serial"].as_str().unwrap().len() >= 8, "{who}");
    assert!(who["address"].as_str().unwrap().contains(':'), "{who}");
    let absent = last(&all, "revoke-rule", "refused");
    assert_eq!(
        (
            &absent["refusal"],
            &absent["parameters"]["rule"],
            &absent["generation"]
        ),
        (&json!("not-found"), &json!("nothing"), &json!(3))
    );
    let added = last(&all, "add-key", "changed");
    let fingerprint = format!("{USER} {}", key.fingerprint());
    assert_eq!(added["changes"]["keys_added"], json!([fingerprint]));
    last(&all, "add-key", "unchanged");
    let refused = last(&all, "add-rule", "refused");
    assert_eq!(
        (&refused["refusal"], &refused["who"]["kind"]),
        (&json!("conflict"), &json!("local"))
    );
    for record in &all {
        assert!(
            record["time"].is_string() && record["boot"].as_str().unwrap().len() > 30,
            "{record}"
        );
        assert!(record["since_boot_ms"].as_u64().unwrap() > 0, "{record}");
    }

    // A spec file whose token is no text: its number is a secret all the same.
    machine.ok("sed 's/\"enrolment_token\": *\"[^\"]*\"/\"enrolment_token\": 827364519283746/' /etc/portcullis/spec.json > /run/bad
        grep -q 827364519283746 /run/bad && cat /run/bad > /etc/portcullis/spec.json");
    eventually(SOON, "the file is refused", || {
        let all = records(&machine);
        let refused = all
            .iter()
            .any(|r| r["action"] == "spec-file" && r["result"] == "refused");
        if refused { Ok(()) } else { Err(all) }
    });
    // On trial, and not confirmed.
    machine.spec.generation = portcullis_protocol::Generation::new(9).unwrap();
    let spec = machine.next(|spec| spec.firewall.ingress.push(allow("9005/tcp")));
    let trial = machine.run_with("portcullis apply --spec - --confirm 5s --force", &spec.to_json());
    assert!(trial.success(), "{trial:?}");
    let all = eventually(READY_TIME, "the trial ends", || {
        let all = records(&machine);
        let ended = all.iter().any(|r| r["action"] == "trial-ended");
        if ended { Ok(all) } else { Err(all.len()) }
    });
    assert!(last(&all, "apply", "changed")["confirm_until"].is_string());
    let ended = last(&all, "trial-ended", "changed");
    assert_eq!(
        (&ended["generation_before"], &ended["generation"]),
        (&json!(10), &json!(4))
    );
    assert_eq!(ended["who"]["kind"], "agent");

    is_whole(&machine);
    let log = machine.ok(&format!("cat {LOG}"));
    let journal = machine.ok("journalctl -b -u portcullis -o json --all");
    assert!(
        journal.contains("AUDIT_HASH") && journal.contains("AUDIT_SEQ"),
        "{journal}"
    );
    let control = machine.spec.control_plane.as_ref().unwrap();
    let line = key.to_line();
    let mut hidden = vec![
        "827364519283746",
        machine.spec.enrolment_token().unwrap().expose(),
        line.split(' ').nth(1).unwrap(),
    ];
    hidden.extend(control.external_id.as_ref().map(|id| id.expose()));
    for secret in hidden {
        assert!(!log.contains(secret), "{secret} is in the log");
        assert!(!journal.contains(secret), "{secret} is in the journal");
    }
    // What is shown without the daemon, of the last hour, and of no time at all.
    machine.ok("systemctl stop portcullis");
    let table = machine.ok("portcullis audit --since 1h");
    assert!(
        table.contains("rule + web") && table.contains("GENERATION"),
        "{table}"
    );
    assert_eq!(machine.ok("portcullis audit --since 0s"), "There is no record.");
    assert_eq!(machine.run("portcullis audit --since soon").code, Some(2));
    assert_eq!(
        machine
            .run("setpriv --reuid 1000 --clear-groups portcullis audit")
            .code,
        Some(3)
    );
}

#[test]
fn what_is_done_to_the_log_is_found_with_its_line() {
    let lab = Lab::new();
    let machine = lab.launch();
    machine.set("audit", "max_bytes = 131072");
    machine.until_ready();
    // Two files that are full, and one that is not.
    eventually(READY_TIME * 4, "the log is rotated twice", || {
        machine.ok("for i in $(seq 20); do
                 portcullis firewall add --id web --protocol tcp --port 9000 > /dev/null
                 portcullis firewall revoke web > /dev/null
             done");
        let files = machine.ok("ls /var/lib/portcullis/audit/audit-*.log 2> /dev/null | wc -l");
        if files.parse::<u32>().unwrap() >= 2 {
            Ok(())
        } else {
            Err(files)
        }
    });
    is_whole(&machine);
    machine.ok("systemctl stop portcullis; cp -a /var/lib/portcullis/audit /root/whole; test $(wc -l < /root/whole/audit.log) -ge 2 || \
        { systemctl start portcullis; portcullis firewall add --id a --protocol tcp --port 1; portcullis firewall revoke a; \
          systemctl stop portcullis; rm -r /root/whole; cp -a /var/lib/portcullis/audit /root/whole; }");
    let size = machine.ok("du -b -c /root/whole/*.log | tail -1 | cut -f1");
    assert!(size.parse::<u32>().unwrap() <= 131_072, "{size}");
    let older = machine.ok("cd /root/whole; ls audit-*.log | head -1");
    let newer = machine.ok("cd /root/whole; ls audit-*.log | sed -n 2p");
    let lines: usize = machine
        .ok(&format!("wc -l < /root/whole/{older}"))
        .parse()
        .unwrap();
    assert!(lines > 10);
    is_whole(&machine);
    for (tampering, words) in [
        (
            format!("sed -i '9s/web/wed/' {older}"),
            format!("{older} line 9: record 9 is not as it was written"),
        ),
        (
            format!("sed -i 9d {older}"),
            format!("{older} line 9: record 9 is missing"),
        ),
        (
            format!("sed -i '4{{h;d}};5G' {older}"),
            format!("{older} line 4: record 4 is missing"),
        ),
        (
            format!("sed -i '7i{{}}' {older}"),
            format!("{older} line 7: it is too short"),
        ),
        (
            format!("truncate -s -1 {older}"),
            format!("{older} line {lines}: it was never finished"),
        ),
        (
            format!("mv {older} x; mv {newer} {older}; mv x {newer}"),
            format!("{older} line 1: records 1 to {lines} are missing"),
        ),
        (
            format!("rm {older}"),
            format!("{newer} line 1: records 1 to {lines} are missing"),
        ),
        (
            "sed -i '$d' audit.log".to_owned(),
            "audit.log, at its end: record".to_owned(),
        ),
        (
            "truncate -s -9 audit.log".to_owned(),
            "audit.log, at its end: record".to_owned(),
        ),
        ("rm *.log".to_owned(), "are cut off".to_owned()),
    ] {
        machine.ok(&format!("cd /var/lib/portcullis/audit && {tampering}"));
        is_broken(&machine, &words);
        machine.ok("rm -r /var/lib/portcullis/audit; cp -a /root/whole /var/lib/portcullis/audit");
        is_whole(&machine);
    }
    // Without the head, a cut is only missed by who has a hash from before.
    let hash =
        machine.ok("portcullis audit verify --format json | grep -o '\"head\": \"[^\"]*' | cut -d'\"' -f4");
    machine.ok("cd /var/lib/portcullis/audit; sed -i '$d' audit.log; rm audit.head");
    let said = machine.run("portcullis audit verify");
    assert!(
        said.success() && said.stdout.contains("The head is not there"),
        "{said:?}"
    );
    let said = machine.run(&format!("portcullis audit verify --head {hash}"));
    assert_eq!(said.code, Some(1), "{said:?}");
    assert_eq!(machine.run("portcullis audit verify --head x").code, Some(2));
    machine.ok("rm -r /var/lib/portcullis/audit; cp -a /root/whole /var/lib/portcullis/audit");
    assert!(
        machine
            .run(&format!("portcullis audit verify --head {hash}"))
            .success()
    );
    // A daemon that finds its log cut says so for ever; one that finds an unfinished line goes on.
    machine.ok(&format!(
        "printf '{{\"seq\":' >> {LOG}; systemctl start portcullis"
    ));
    machine.until_ready();
    machine.ok("portcullis firewall add --id late --protocol tcp --port 9000");
    is_whole(&machine);
    let all = records(&machine);
    let note = all.iter().rev().find(|r| r["action"] == "log").unwrap();
    assert!(
        note["reason"].as_str().unwrap().contains("never finished"),
        "{note}"
    );
    machine.ok(&format!(
        "systemctl stop portcullis; sed -i '$d' {LOG}; systemctl start portcullis"
    ));
    machine.until_ready();
    machine.ok("portcullis firewall revoke late");
    is_broken(&machine, "missing before this line");
    machine.ok(
        "journalctl -b -u portcullis MESSAGE_ID=5b3f2d0c1a5e4c6e8d0f7a9b1c2d3e6a | grep 'not as it was left'",
    );
}

#[test]
fn each_acknowledged_change_is_in_the_log_however_often_the_daemon_is_killed() {
    let lab = Lab::new();
    let machine = lab.launch();
    machine.ok("cat > /root/changes <<'END'
for i in $(seq 900); do
    portcullis firewall add --id k$i --protocol tcp --port 9000 && echo k$i >> /root/acknowledged || sleep 0.2
    test -e /root/enough && break
done
END
        systemd-run --quiet --unit=changes sh /root/changes");
    let acknowledged = || machine.run("cat /root/acknowledged").stdout.lines().count();
    for round in 0..5 {
        let before = acknowledged();
        let pid = eventually(READY_TIME, "some changes", || match acknowledged() {
            now if now > before + 2 => Ok(machine.main_pid()),
            now => Err((round, now)),
        });
        machine.ok(&format!("kill -9 {pid}"));
        eventually(READY_TIME, "another daemon", || match machine.main_pid() {
            now if now != 0 && now != pid => Ok(()),
            now => Err(now),
        });
    }
    machine.ok("touch /root/enough");
    eventually(READY_TIME, "the last change", || {
        match machine.run("systemctl is-active changes").stdout.trim() {
            "active" => Err(acknowledged()),
            _ => Ok(()),
        }
    });
    machine.until_ready();
    is_whole(&machine);
    let all = records(&machine);
    let added: Vec<&str> = all
        .iter()
        .filter_map(|record| record["changes"]["rules_added"][0].as_str())
        .collect();
    let acknowledged = machine.ok("cat /root/acknowledged");
    assert!(acknowledged.lines().count() >= 15);
    for id in acknowledged.lines() {
        assert!(added.contains(&id), "{id} is not in the log");
    }
}

#[test]
fn what_a_full_disk_keeps_out_of_the_log_comes_later() {
    let lab = Lab::new();
    let machine = lab.launch();
    let api = Api::new(&lab, &machine);
    // In the daemon's own mount namespace: it does not see mounts that come later elsewhere.
    let pid = machine.main_pid();
    let prefix = format!("nsenter -t {pid} -m");
    let there = |script: &str| machine.ok(&format!("{prefix} sh -c '{script}'"));
    let full = |folder: &str, size: &str| {
        there(&format!(
            "mkdir -p /run/small && mount -t tmpfs -o size={size},mode=700 small /run/small && \
             cp -a {folder}/. /run/small/ && mount --bind /run/small {folder} && \
             ! dd if=/dev/zero of={folder}/filler bs=1k status=none"
        ));
    };
    let folder = "/var/lib/portcullis/audit";
    full(folder, "32k");
    // What is left of a page is soon full.
    for port in 9000..9012 {
        assert!(
            api.done("POST", "/v1/firewall/rules", &rule(&format!("r{port}"), port))
                .1
        );
    }
    let journal = machine.ok("journalctl -b -u portcullis -o cat");
    assert!(journal.contains("not in the audit log yet: CN="), "{journal}");
    let before = records_by(&machine, &prefix);
    assert!(
        !before
            .iter()
            .any(|r| r["changes"]["rules_added"] == json!(["r9011"]))
    );
    there(&format!("rm {folder}/filler"));
    assert!(api.done("POST", "/v1/firewall/rules", &rule("after", 9100)).1);
    let all = records_by(&machine, &prefix);
    for port in 9000..9012 {
        let id = json!([format!("r{port}")]);
        assert_eq!(
            all.iter().filter(|r| r["changes"]["rules_added"] == id).count(),
            1
        );
    }
    there(&format!("umount -l {folder} && umount -l /run/small"));

    // A state folder without room refuses the change, and the refusal is told.
    full("/var/lib/portcullis", "512k");
    assert_eq!(
        api.ask("POST", "/v1/firewall/rules", &rule("full", 9200)).status,
        507
    );
    there("rm /var/lib/portcullis/filler");
    assert!(api.done("POST", "/v1/firewall/rules", &rule("full", 9200)).1);
    let all = records_by(&machine, &prefix);
    let refused = last(&all, "add-rule", "refused");
    assert_eq!(
        (&refused["refusal"], &refused["changes"]),
        (&json!("storage-full"), &Value::Null)
    );
    last(&all, "add-rule", "changed");
}

//! Changes over the HTTPS API by `portcullisctl`.
//!
//! May not live here: the API itself (`api`).

use portcullis_provision::reach::{Reached, Transport, listen_inside};
use serde_json::{Value, json};

use crate::api::{is_let_in, is_turned_away, logs_in, state};
use crate::host_keys::portcullisctl;
use crate::lab::{Lab, Machine, Run, USER, vantage};

use Reached::{Filtered, Open};
use Transport::Tcp;

#[test]
fn portcullisctl_changes_rules_and_keys_through_the_api() {
    let lab = Lab::new();
    let machine = lab.launch();
    let ctl = |arguments: &[&str]| portcullisctl(&lab, arguments).output_text();
    let json = |arguments: &[&str]| -> Value {
        let mut all = arguments.to_vec();
        all.extend(["--format", "json"]);
        serde_json::from_str(&portcullisctl(&lab, &all).succeed()).unwrap()
    };
    listen_inside(&machine.instance, &[(Tcp, 9000)]).unwrap();
    let stranger = lab.stranger();
    let from = vantage(&stranger);
    assert_eq!(machine.seen_from(&from, Tcp, 9000), [Filtered; 2]);
    let add = [
        "firewall",
        "add",
        "one",
        "--id",
        "web",
        "--protocol",
        "tcp",
        "--port",
        "9000",
    ];
    let added = json(&add);
    assert_eq!(
        (&added["generation"], &added["changed"]),
        (&json!(2), &json!(true))
    );
    assert_eq!(machine.seen_from(&from, Tcp, 9000), [Open; 2]);
    assert_eq!(json(&add)["changed"], false);
    let list = ctl(&["firewall", "list", "one"]);
    assert!(
        list.stdout.contains("web") && list.stdout.contains("9000"),
        "{list:?}"
    );
    assert_eq!(json(&["firewall", "list", "one"])["ingress"][1]["id"], "web");
    // Made on trial, and confirmed over a new connection.
    let revoked = json(&["firewall", "revoke", "one", "web", "--confirm", "60s"]);
    assert_eq!(revoked["confirm_until"], Value::Null, "{revoked}");
    machine.ok("! test -e /var/lib/portcullis/trial.json");
    assert_eq!(machine.seen_from(&from, Tcp, 9000), [Filtered; 2]);

    lab.new_key("new");
    let file = lab.path("new.pub");
    let added = ctl(&["keys", "add", "one", "--user", USER, file.to_str().unwrap()]);
    assert!(added.stdout.contains("generation 4 is accepted"), "{added:?}");
    is_let_in(&logs_in(&lab, &machine, &stranger, "new"));
    let fingerprint = lab.public_key("new").fingerprint();
    let list = ctl(&["keys", "list", "one"]);
    assert!(list.stdout.contains(&fingerprint), "{list:?}");
    assert!(ctl(&["keys", "revoke", "one", &fingerprint]).success());
    is_turned_away(&logs_in(&lab, &machine, &stranger, "new"));

    let ssh = machine.spec.firewall.ingress[0].id.to_string();
    let last = lab.public_key("id").fingerprint();
    let before = state(&machine);
    for (bad, code, words) in [
        (&["firewall", "revoke", "one", "nothing"][..], 2, "no rule"),
        (&["firewall", "revoke", "one", &ssh], 2, "SSH is no longer let in"),
        (&["keys", "revoke", "one", &last], 2, "no authorized key is left"),
        (&["keys", "revoke", "one", "SHA256:x/y"], 2, "SHA256:x/y"),
        (
            &["firewall", "add", "one", "--id", "x", "--protocol", "tcp"],
            2,
            "port",
        ),
        (&["firewall", "list", "two"], 2, "two"),
    ] {
        let output = ctl(bad);
        assert_eq!(output.code, Some(code), "{bad:?}: {output:?}");
        assert!(output.stderr.contains(words), "{bad:?}: {output:?}");
    }
    assert_eq!(state(&machine), before);
}

#[test]
fn members_of_a_cluster_are_told_who_joins_and_who_leaves() {
    let lab = Lab::new();
    let requests = [("one", "c-1"), ("two", "c-1"), ("new", "c-2")].map(|(name, c)| lab.request(name, c));
    let machines = lab.launch_many(&requests);
    for machine in &machines {
        listen_inside(&machine.instance, &[(Tcp, 9000)]).unwrap();
    }
    let [one, two, new] = [0, 1, 2].map(|at| &machines[at]);
    let ctl = |arguments: &[&str]| portcullisctl(&lab, arguments).output_text();
    let seen = |from: &Machine, to: &Machine| to.seen_from(&from.vantage(), Tcp, 9000);
    let together = |expected: Reached| {
        for other in [one, two] {
            assert_eq!(
                seen(new, other),
                [expected; 2],
                "new to {}",
                other.instance.name()
            );
            assert_eq!(
                seen(other, new),
                [expected; 2],
                "{} to new",
                other.instance.name()
            );
        }
        assert_eq!([seen(one, two), seen(two, one)], [[Open; 2]; 2]);
    };
    together(Filtered);
    let elsewhere = ctl(&["cluster", "join", "new", "c-1"]);
    assert_eq!(elsewhere.code, Some(2), "{elsewhere:?}");
    assert!(elsewhere.stderr.contains("cluster leave new"), "{elsewhere:?}");
    assert!(ctl(&["cluster", "leave", "new"]).success());
    let written = machines
        .iter()
        .map(|m| m.ok("stat -c %Y.%i /etc/portcullis/spec.json"));
    let written: Vec<_> = written.collect();
    for _ in 0..2 {
        let joined = ctl(&["cluster", "join", "new", "c-1"]);
        assert!(joined.success(), "{joined:?}");
        together(Open);
    }
    let shown = ctl(&["cluster", "show", "c-1", "--format", "json"]).stdout;
    let shown: Value = serde_json::from_str(&shown).unwrap();
    for member in shown["members"].as_array().unwrap() {
        assert_eq!(member["peers"].as_array().unwrap().len(), 2, "{shown:#}");
    }
    assert_eq!(shown["members"].as_array().unwrap().len(), 3);
    let left = ctl(&["cluster", "leave", "new"]);
    assert!(left.success(), "{left:?}");
    together(Filtered);
    assert_eq!(ctl(&["cluster", "leave", "new"]).code, Some(2));

    // One that can't be told is named, and told when it is said again.
    assert!(ctl(&["cluster", "join", "new", "c-1"]).success());
    one.ok("systemctl stop portcullis");
    let partly = ctl(&["cluster", "leave", "new"]);
    assert_eq!(partly.code, Some(1), "{partly:?}");
    assert!(
        partly.stderr.contains("one: can't reach") && !partly.stderr.contains("two:"),
        "{partly:?}"
    );
    assert_eq!(seen(new, two), [Filtered; 2]);
    assert_eq!(seen(new, one), [Open; 2], "the kernel holds what it was told");
    one.ok("systemctl start portcullis");
    let rest = ctl(&["cluster", "leave", "new"]);
    assert!(rest.success(), "{rest:?}");
    together(Filtered);
    // Through the API, not through files.
    let after = machines
        .iter()
        .map(|m| m.ok("stat -c %Y.%i /etc/portcullis/spec.json"));
    assert_eq!(after.collect::<Vec<_>>(), written);
    // What is done through files goes on from there.
    lab.provider.terminate(&["two"]).unwrap();
    let record = lab.provider.get("one").unwrap();
    one.until_generation(record.spec().generation.get());
    assert!(record.spec().cluster.as_ref().unwrap().peers.is_empty());
}

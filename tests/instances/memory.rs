//! What is over is in no memory any more: of the daemon, and of the process that speaks to the network.
//!
//! Each secret is found first, in the process that has to know it. May not live here: cores, files, logs
//! (`secrets`).

use portcullis_protocol::Secret;

use crate::api::Api;
use crate::first_contact::{expect, introduce};
use crate::hunt::Hunt;
use crate::lab::{Lab, READY_TIME, eventually};
use crate::receiver::{Authority, PATIENTLY, Server, push_to_us, put, trust};

const UNITS: [&str; 2] = ["portcullis", "portcullis-front"];
const BY_FILE: &str = "by-file-c4ca4238a0b923820dcc509a6f75849b";
const BY_COMMAND: &str = "by-command-c81e728d9d4c2f636f067f89cc14862c";
const OVER_HTTPS: &str = "over-https-eccbc87e4b5ce2fe28308fd9f2a7baf3";
const BEARER: &str = "bearer-a87ff679a2f3e71d9181a67b7542122c";
const NEXT_BEARER: &str = "next-e4da3b7fbbce2345d7772b0674a318d5";

impl Hunt<'_> {
    /// The process knows it: it has to, and the look would find what is left of it.
    #[track_caller]
    fn knows(&self, unit: &str, name: &str) {
        let found = self.in_memory(unit);
        assert!(found.contains_key(name), "{unit} should know {name}: {found:?}");
    }

    /// Nothing of it is left. What a connection holds is wiped when it ends.
    #[track_caller]
    fn has_forgotten(&self, units: &[&str], name: &str) {
        eventually(READY_TIME, &format!("{name} is in no memory"), || {
            let found = units
                .iter()
                .map(|unit| (*unit, self.in_memory(unit).remove(name)));
            let left: Vec<_> = found.filter(|(_, places)| places.is_some()).collect();
            if left.is_empty() {
                Ok(())
            } else {
                Err(format!("{left:?}"))
            }
        });
    }
}

/// A process that reads secrets and keeps them.
fn keep_all(hunt: &Hunt<'_>) {
    let script = "import time\nkept = open('/run/hunt/patterns').read()\nprint('kept', flush=True)\ntime.sleep(1000)\n";
    put(hunt.machine, "../../run/hunt/keep", "600", script);
    hunt.machine
        .ok("systemd-run --quiet --unit=keeper python3 /run/hunt/keep");
    eventually(READY_TIME, "it has read them", || {
        match hunt
            .machine
            .run("journalctl -u keeper -o cat")
            .stdout
            .contains("kept")
        {
            true => Ok(()),
            false => Err("not yet"),
        }
    });
}

#[test]
fn what_is_over_is_in_no_memory() {
    let lab = Lab::new();
    let mut machine = lab.launch();
    let first = machine.spec.enrolment_token().unwrap().clone();
    let scanned = lab.machine("one");
    let known = vec![
        ("first token", first.expose().to_owned()),
        ("token by the file", BY_FILE.to_owned()),
        ("token by a command", BY_COMMAND.to_owned()),
        ("token over https", OVER_HTTPS.to_owned()),
        ("bearer", BEARER.to_owned()),
        ("next bearer", NEXT_BEARER.to_owned()),
    ];
    let names: Vec<&str> = known.iter().map(|(name, _)| *name).collect();
    let hunt = Hunt::new(&scanned, known);
    keep_all(&hunt);
    for name in names {
        hunt.knows("keeper", name);
    }
    // It was launched and waited for: that is a first contact.
    hunt.has_forgotten(&UNITS, "first token");

    expect(&mut machine, &Secret::new(BY_FILE));
    hunt.knows("portcullis", "token by the file");
    hunt.has_forgotten(&["portcullis-front"], "token by the file");
    introduce(&machine, &Secret::new(BY_FILE)).unwrap();
    hunt.has_forgotten(&UNITS, "token by the file");

    let spec = machine.next(|spec| {
        spec.control_plane.as_mut().unwrap().enrolment_token = Some(Secret::new(BY_COMMAND));
    });
    assert!(machine.apply(&spec).success());
    hunt.knows("portcullis", "token by a command");
    introduce(&machine, &Secret::new(BY_COMMAND)).unwrap();
    hunt.has_forgotten(&UNITS, "token by a command");

    // Here it passes through both processes.
    let spec = machine.next(|spec| {
        spec.control_plane.as_mut().unwrap().enrolment_token = Some(Secret::new(OVER_HTTPS));
    });
    let held = format!("If-Match: \"{}\"", machine.spec.generation);
    let put = Api::new(&lab, &machine).with(&["-H", &held], "PUT", "/v1/spec", &spec.to_json());
    assert_eq!(put.status, 200, "{put:?}");
    machine.spec = spec;
    hunt.knows("portcullis", "token over https");
    hunt.has_forgotten(&["portcullis-front"], "token over https");
    introduce(&machine, &Secret::new(OVER_HTTPS)).unwrap();
    hunt.has_forgotten(&UNITS, "token over https");

    credentials_for_pushing(&lab, &mut machine, &hunt);

    // A new process reads the injected file, which still has a token, and forgets it again.
    machine.ok("systemctl restart portcullis");
    machine.until_ready();
    for name in ["token by the file", "bearer"] {
        hunt.has_forgotten(&UNITS, name);
    }
}

/// The token that reports go with is known as long as it is used, to both.
fn credentials_for_pushing(lab: &Lab, machine: &mut crate::lab::Machine, hunt: &Hunt<'_>) {
    let authority = Authority::new();
    let receiver = Server::reports(lab, &authority, &[]);
    put(machine, "report.token", "600", BEARER);
    let auth =
        "interval = \"1s\"\n[report.auth]\nkind = \"bearer\"\ntoken_file = \"/etc/portcullis/report.token\"";
    trust(machine, &authority, auth);
    push_to_us(machine);
    let with = |token: &str| {
        receiver.until(PATIENTLY, token, |asked| {
            asked.header("authorization").ends_with(token)
        });
    };
    with(BEARER);
    for unit in UNITS {
        hunt.knows(unit, "bearer");
    }
    put(machine, "report.token", "600", NEXT_BEARER);
    with(NEXT_BEARER);
    hunt.has_forgotten(&UNITS, "bearer");
    for unit in UNITS {
        hunt.knows(unit, "next bearer");
    }
}

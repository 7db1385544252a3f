//! The API as it describes itself: checked against a real instance by Schemathesis, which knows nothing of it
//! but the description.
//!
//! May not live here: what a change does (`api`), limits (`limits`).

use std::path::{Path, PathBuf};
use std::process::Command;

use portcullis_provision::local::{AGENT_PORT, Output};
use serde_json::Value;

use crate::endpoint::{curl, files};
use crate::lab::{Lab, Machine, Run};

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Runs Schemathesis with the control plane's certificate from where the control plane is.
fn schemathesis(lab: &Lab, machine: &Machine, document: &Path, options: &[&str]) -> Output {
    let program = root().join("target/tools/schemathesis/bin/st");
    assert!(
        program.exists(),
        "{} is missing: run `make test`",
        program.display()
    );
    let certificate = files(lab, "right", &lab.provider.client_certificate().unwrap());
    let mut command = Command::new("timeout");
    command
        .args(["600", "nsenter", "--no-fork"])
        .arg(format!("--net={}", lab.provider.network().path().display()))
        .arg(program)
        .arg("--config-file")
        .arg(root().join("tests/instances/schemathesis.toml"))
        .arg("run")
        .arg(document)
        .args(["--url", &format!("https://{}:{AGENT_PORT}", machine.v4())])
        .arg("--request-cert")
        .arg(&certificate[0])
        .arg("--request-cert-key")
        .arg(&certificate[1])
        .args(["--checks", "all"])
        .args(options)
        // What it leaves behind goes with the lab.
        .current_dir(lab.path(""))
        .env("PYTHONPATH", root().join("tests/instances"))
        .env("PYTHONDONTWRITEBYTECODE", "1");
    command.output_text()
}

/// The description that the instance gives to anybody, in a file.
fn description(lab: &Lab, machine: &Machine) -> (Value, PathBuf) {
    let answer = curl(&lab.provider.network().path(), machine, "/openapi.json", &[]).unwrap();
    assert_eq!(
        (answer.status, answer.kind.as_str()),
        (200, "application/json"),
        "{answer:?}"
    );
    let file = lab.path("openapi.json");
    std::fs::write(&file, &answer.body).unwrap();
    (serde_json::from_str(&answer.body).unwrap(), file)
}

#[test]
fn the_api_is_as_it_describes_itself() {
    let lab = Lab::new();
    let machine = lab.launch();
    let pids = || (machine.main_pid(), machine.unit("portcullis-front", "MainPID"));
    let before = pids();
    let (document, file) = description(&lab, &machine);
    let methods = document["paths"].as_object().unwrap().values();
    let operations: usize = methods.map(|path| path.as_object().unwrap().len()).sum();

    let output = schemathesis(&lab, &machine, &file, &[]);
    println!("{}", output.stdout);
    assert_eq!(pids(), before, "nothing crashed");
    assert!(
        output.success(),
        "{}\n{}",
        output.stderr,
        machine
            .run("journalctl -b -u portcullis -u portcullis-front -o short-monotonic | tail -n 60")
            .stdout
    );
    assert!(
        output.stdout.contains(&format!("Tested: {operations}")),
        "not all of it was asked"
    );
    // It was not cut off half-way, and it has changed something.
    let report = machine.try_status().unwrap();
    assert!(report.generation > Some(1), "{:?}", report.generation);

    // A description that is wrong would have been found: the report has no colour.
    let mut wrong = document;
    wrong["components"]["schemas"]["Report"]["required"]
        .as_array_mut()
        .unwrap()
        .push("colour".into());
    std::fs::write(&file, wrong.to_string()).unwrap();
    let output = schemathesis(&lab, &machine, &file, &["--include-path", "/v1/health"]);
    assert!(
        output.code == Some(1) && output.stdout.contains("\"colour\" is a required property"),
        "{output:?}"
    );
}
